//! How rows travel between ranks, and how results become one, by name.

use candle_core::{Error, Result, bail};
use std::fmt;
use std::str::FromStr;

/// How tokens reach the ranks of their experts, and results come home.
///
/// | strategy | dispatch | combine, [`SlotOrder`](Reduction::SlotOrder) | combine, [`RankPartial`](Reduction::RankPartial) |
/// | --- | --- | --- | --- |
/// | `Solo` | nothing | nothing | nothing |
/// | `Replicated` | nothing: every rank holds all tokens | all-gather of rows | all-reduce of partial sums |
/// | `Gather` | all-gather: every token to every rank | all-to-all of rows | reduce-scatter of partial sums |
/// | `Exchange` | all-to-all: a token once to each rank that has some of its slots | all-to-all of rows | all-to-all of partial sums |
/// | `Peer` | a token once to each rank that has some of its slots, written to its device's memory | rows are read from there | partial sums are read from there |
///
/// All of them give the same results: in slot order for any number of ranks and any placement, as partial sums for the same
/// placement, bit for bit, but those of `Peer`, which are rounded on their way. [`Problem::choose`](super::Problem::choose) knows which is best.
///
/// ```
/// use candle_moe::ep::Strategy;
/// let strategy: Strategy = "exchange".parse()?;
/// assert_eq!(strategy, Strategy::Exchange);
/// assert_eq!(strategy.to_string(), "exchange");
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Strategy {
    /// One rank.
    Solo,
    /// Every rank holds all tokens, works on the slots of its experts, and gets all results.
    Replicated,
    /// Every rank sees all tokens.
    Gather,
    /// A rank sees the tokens that have slots there.
    Exchange,
    /// The same without a library between the ranks, which are `Peer`s: threads of one process with CUDA devices that reach each
    /// other's memory. Partial sums travel in the dtype of the hidden states.
    Peer,
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Self; 5] = [Self::Solo, Self::Replicated, Self::Gather, Self::Exchange, Self::Peer];

    /// The name that [`FromStr`] accepts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Solo => "solo",
            Self::Replicated => "replicated",
            Self::Gather => "gather",
            Self::Exchange => "exchange",
            Self::Peer => "peer",
        }
    }
}

/// How the results of a token's experts become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Reduction {
    /// Every slot's row comes home and is summed in slot order in float32: the same bits for every `ep_size`, strategy and
    /// placement.
    #[default]
    SlotOrder,
    /// Each rank sums its own rows in slot order, the partial sums are added in rank order, all in float32: the same bits for
    /// the same placement, and fewer bytes to move. Before the last rounding it is within `top_k * 2^-23` times the sum of the
    /// terms' magnitudes of what slot order gives; with [`Strategy::Peer`], which rounds each partial sum to the dtype of the hidden
    /// states on its way, within that dtype's half unit in the last place of each.
    RankPartial,
}

impl Reduction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::SlotOrder, Self::RankPartial];

    /// The name that [`FromStr`] accepts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::SlotOrder => "slot-order",
            Self::RankPartial => "rank-partial",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Strategy {
    type Err = Error;

    /// Case, `-` and `_` do not count; an unknown name lists the known ones.
    fn from_str(name: &str) -> Result<Self> {
        named("strategy", name, &Self::ALL, Self::name)
    }
}

impl FromStr for Reduction {
    type Err = Error;

    /// Case, `-` and `_` do not count; an unknown name lists the known ones.
    fn from_str(name: &str) -> Result<Self> {
        named("reduction", name, &Self::ALL, Self::name)
    }
}

fn named<T: Copy>(op: &str, name: &str, all: &[T], name_of: fn(&T) -> &'static str) -> Result<T> {
    let plain = |s: &str| s.replace(['-', '_'], "").to_ascii_lowercase();
    match all.iter().find(|item| plain(name_of(item)) == plain(name)) {
        Some(item) => Ok(*item),
        None => {
            let known: Vec<_> = all.iter().map(name_of).collect();
            bail!("{op}: unknown name {name:?}, expected one of {}", known.join(", "))
        }
    }
}
