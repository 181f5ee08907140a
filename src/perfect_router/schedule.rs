//! How the slots of all senders are dealt out, by name.

use candle_core::{Error, Result, bail};
use std::fmt;
use std::str::FromStr;

const OP: &str = "perfect-router schedule";

/// How the plans of the senders relate to each other.
///
/// | schedule | every sender is balanced over ranks | all senders together are balanced over experts | use it for |
/// | --- | --- | --- | --- |
/// | `RankRotated` | yes, and at each step the senders have different receivers | only over whole periods: senders overlap | dispatch and combine |
/// | `GlobalSlot` | yes | yes: the slots of all senders are one sequence | a whole layer |
///
/// `GlobalSlot` counts padding among the tokens of a rank. It is one sequence as long as all ranks stand at the same token of
/// their sequences ([`Step::starting_at`](crate::ep::Step::starting_at)), and balanced over experts to one slot where plans
/// have no groups.
///
/// At one token for each of 8 ranks, 256 experts and top-8, all senders together touch 15 experts under `RankRotated` and 64
/// under `GlobalSlot`: a layer that is measured with the first loads too few weights. At small batch a balanced table in
/// turn touches more experts than learned routing does, so its time is not a lower bound.
///
/// ```
/// use candle_moe::perfect_router::Schedule;
/// let schedule: Schedule = "global-slot".parse()?;
/// assert_eq!(schedule.to_string(), "global-slot");
/// // Rank 2 begins where ranks 0 and 1 end, in the plan of sender 0 that all of them share.
/// assert_eq!(schedule.start(2, &[3, 4, 5]), (0, 7));
/// assert_eq!(Schedule::RankRotated.start(2, &[3, 4, 5]), (2, 0));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Schedule {
    /// Every sender has a plan of its own, rotated by its rank.
    #[default]
    RankRotated,
    /// The tokens of all senders follow each other in one plan.
    GlobalSlot,
}

impl Schedule {
    /// Every schedule.
    pub const ALL: [Self; 2] = [Self::RankRotated, Self::GlobalSlot];

    /// The name that [`FromStr`] accepts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::RankRotated => "rank-rotated",
            Self::GlobalSlot => "global-slot",
        }
    }

    /// Whose plan rank `ep_rank` follows, and from which token on, where `token_counts` are the tokens of each rank.
    pub fn start(&self, ep_rank: usize, token_counts: &[usize]) -> (usize, usize) {
        match self {
            Self::RankRotated => (ep_rank, 0),
            Self::GlobalSlot => (0, token_counts.iter().take(ep_rank).fold(0, |sum, count| sum.saturating_add(*count))),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Schedule {
    type Err = Error;

    /// Case, `-` and `_` do not count; an unknown name lists the known ones.
    fn from_str(name: &str) -> Result<Self> {
        let plain = |s: &str| s.replace(['-', '_'], "").to_ascii_lowercase();
        match Self::ALL.iter().find(|schedule| plain(schedule.name()) == plain(name)) {
            Some(schedule) => Ok(*schedule),
            None => {
                let known = Self::ALL.map(|schedule| schedule.name()).join(", ");
                bail!("{OP}: unknown name {name:?}, expected one of {known}")
            }
        }
    }
}
