//! Which strategy is best for a layer, and why the others are not.

use super::{Reduction, Strategy};
use candle_core::{Result, bail};
use std::fmt;

/// What a strategy is chosen for. The choice follows from these numbers alone, so all ranks make the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Ranks.
    pub ep_size: usize,
    /// Slots of a token.
    pub top_k: usize,
    /// How results are summed.
    pub reduction: Reduction,
    /// Whether every rank holds all tokens, in the same order, instead of its own.
    pub replicated_tokens: bool,
    /// Whether the ranks are `Peer`s: CUDA devices of one process that reach each other's memory.
    pub peer_access: bool,
}

/// Rows of a token that travel between ranks, on average, if each slot goes to any rank with the same probability. A token's
/// experts are distinct, so it really reaches a little more ranks than that.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Traffic {
    /// Hidden states, in their dtype.
    pub dispatched_rows: f64,
    /// Results, in float32.
    pub combined_rows: f64,
}

/// A strategy, and why it is this one.
///
/// ```
/// use candle_moe::ep::{Problem, Reduction, Strategy};
/// let problem = Problem {
///     ep_size: 8,
///     top_k: 4,
///     reduction: Reduction::SlotOrder,
///     replicated_tokens: false,
///     peer_access: false,
/// };
/// let choice = problem.choose(None)?;
/// assert_eq!(choice.strategy(), Strategy::Exchange);
/// assert_eq!(
///     choice.to_string(),
///     "exchange, since a token reaches 2.9 of 7 other ranks only; not solo, which is for one rank, and ep_size is 8; not \
///      replicated, which needs all tokens on every rank, and each rank holds its own; not gather, which sends a token to all \
///      of them, and ep_size 8 is above top_k 4; not peer, which needs ranks whose devices reach each other's memory, and these \
///      are none"
/// );
/// // A strategy that cannot be is an error.
/// assert!(problem.choose(Some(Strategy::Replicated)).is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    strategy: Strategy,
    reason: String,
    rejected: Vec<(Strategy, String)>,
}

impl Problem {
    /// `forced`, or else the best strategy:
    ///
    /// * `Solo` on one rank;
    /// * `Replicated` where every rank holds all tokens, which need not travel then;
    /// * `Peer` where devices reach each other's memory: a token goes once to each rank that has some of its slots, and nothing
    ///   asks the host;
    /// * `Gather` up to `ep_size == top_k`: nearly every token has slots on nearly every rank, and an all-gather has nothing to
    ///   pack and shapes that follow from the numbers of tokens;
    /// * `Exchange` above.
    ///
    /// # Errors
    /// No ranks. The forced strategy is not possible: `Solo` with several ranks, `Replicated` where ranks hold their own tokens, `Peer`
    /// where they hold all, or where they are no `Peer`s.
    pub fn choose(&self, forced: Option<Strategy>) -> Result<Choice> {
        if self.ep_size == 0 {
            bail!("strategy: ep_size is 0, expected at least 1")
        }
        let (strategy, reason) = match forced {
            Some(strategy) => match self.obstacle(strategy) {
                Some(obstacle) => bail!("strategy: {strategy} was asked for, {obstacle}"),
                None => (strategy, "since it was asked for".to_string()),
            },
            None => self.best(),
        };
        let why_not = |other| {
            let because = match (self.obstacle(other), forced) {
                (Some(obstacle), _) => obstacle,
                (None, Some(_)) => format!("since {strategy} was asked for"),
                (None, None) => self.drawback(other),
            };
            (other, because)
        };
        let others = Strategy::ALL.into_iter().filter(|&other| other != strategy);
        Ok(Choice { strategy, reason, rejected: others.map(why_not).collect() })
    }

    /// What travels between ranks with a strategy: of each token of a rank, or, where every rank holds all tokens, of each token
    /// that they all hold.
    pub fn traffic(&self, strategy: Strategy) -> Traffic {
        let other_ranks = self.ep_size.saturating_sub(1) as f64;
        let copies = if self.replicated_tokens { self.ep_size as f64 } else { 1.0 };
        let top_k = self.top_k as f64;
        let rows_of_slots = top_k * other_ranks / self.ep_size.max(1) as f64;
        let by_reduction = |slot_order, rank_partial| match self.reduction {
            Reduction::SlotOrder => slot_order,
            Reduction::RankPartial => rank_partial,
        };
        let (dispatched, combined) = match strategy {
            Strategy::Solo => (0.0, 0.0),
            // Each slot's row to all others; or partial sums to who adds them, and the sum back to all.
            Strategy::Replicated => (0.0, by_reduction(top_k * other_ranks, 2.0 * other_ranks)),
            Strategy::Gather => (copies * other_ranks, copies * by_reduction(rows_of_slots, other_ranks)),
            Strategy::Exchange | Strategy::Peer => {
                let reached = copies * self.reached_ranks();
                (reached, by_reduction(copies * rows_of_slots, reached))
            }
        };
        Traffic { dispatched_rows: dispatched, combined_rows: combined }
    }

    /// Other ranks that have slots of a token, on average: each is missed if all slots go elsewhere.
    fn reached_ranks(&self) -> f64 {
        let ranks = self.ep_size.max(1) as f64;
        (ranks - 1.0) * (1.0 - (1.0 - 1.0 / ranks).powf(self.top_k as f64))
    }

    /// Why a strategy cannot be, after its name.
    fn obstacle(&self, strategy: Strategy) -> Option<String> {
        let ep_size = self.ep_size;
        match strategy {
            Strategy::Solo if ep_size != 1 => Some(format!("which is for one rank, and ep_size is {ep_size}")),
            Strategy::Replicated if ep_size != 1 && !self.replicated_tokens => {
                Some("which needs all tokens on every rank, and each rank holds its own".into())
            }
            Strategy::Peer if ep_size == 1 => Some("which is for several ranks, and ep_size is 1".into()),
            Strategy::Peer if self.replicated_tokens => {
                Some("which is for ranks with tokens of their own, and each holds all".into())
            }
            Strategy::Peer if !self.peer_access => {
                Some("which needs ranks whose devices reach each other's memory, and these are none".into())
            }
            _ => None,
        }
    }

    fn best(&self) -> (Strategy, String) {
        let Self { ep_size, top_k, .. } = *self;
        if ep_size == 1 {
            (Strategy::Solo, "since there is one rank".into())
        } else if self.replicated_tokens {
            (Strategy::Replicated, "since every rank holds all tokens".into())
        } else if self.peer_access {
            (Strategy::Peer, "since the devices reach each other's memory".into())
        } else if ep_size <= top_k {
            (Strategy::Gather, format!("since a token reaches {} anyway", self.reached()))
        } else {
            (Strategy::Exchange, format!("since a token reaches {} only", self.reached()))
        }
    }

    /// Why a strategy that could be is not the best, after its name.
    fn drawback(&self, strategy: Strategy) -> String {
        let Self { ep_size, top_k, .. } = *self;
        match strategy {
            _ if ep_size == 1 => "which sends, and there is nobody to send to".into(),
            _ if self.replicated_tokens => {
                format!("which would work on every token {ep_size} times, once for each rank")
            }
            _ if self.peer_access => "which takes the way through a library".into(),
            Strategy::Gather => {
                format!("which sends a token to all of them, and ep_size {ep_size} is above top_k {top_k}")
            }
            _ => format!("which packs rows to leave out few, since ep_size {ep_size} is not above top_k {top_k}"),
        }
    }

    fn reached(&self) -> String {
        format!("{:.1} of {} other ranks", self.reached_ranks(), self.ep_size - 1)
    }
}

impl Choice {
    /// The strategy.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Why it is this one.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The other strategies, each with why it is not that one.
    pub fn rejected(&self) -> &[(Strategy, String)] {
        &self.rejected
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.strategy, self.reason)?;
        self.rejected.iter().try_for_each(|(strategy, reason)| write!(f, "; not {strategy}, {reason}"))
    }
}
