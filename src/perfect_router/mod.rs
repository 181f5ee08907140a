//! Perfect router: cached logits that spread tokens evenly over expert-parallel ranks.
//!
//! Replace a gate's logits by these and every rank receives the same number of slots, so that a run measures what balance
//! would buy. **Perfect routing is for measuring: the output of the model is meaningless.** Learned parameters are never
//! modified; a selection bias must be left out while perfect logits are routed
//! ([`Router::without_selection_bias`](crate::routing::Router::without_selection_bias)).
//!
//! * [`Plan`] is what one sender does: which experts each of its tokens goes to, flat in closed form, grouped by a round
//!   that is worked out once, or with a hot spot ([`Imbalance`]) to measure skew instead.
//! * [`Schedule`] says how the plans of all senders relate: which to use for communication, which for whole layers.
//! * [`PerfectRouterStore`] keeps the logits that make routing follow a plan.

#[cfg(feature = "cuda")]
mod cuda;
mod flat;
mod imbalance;
mod plan;
mod planner;
mod schedule;
mod store;

pub use imbalance::{Hotspot, Imbalance};
pub use plan::{Balance, Plan};
pub use schedule::Schedule;
pub use store::{PerfectRouterKey, PerfectRouterStore, StoreStatistics};

/// What stands in for the gate's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PerfectRouterConfig {
    /// How the plans of the senders relate.
    pub schedule: Schedule,
    /// A hot spot, to measure skew instead of balance.
    pub imbalance: Option<Imbalance>,
}

/// Whether the environment asks for perfect routing: `ENABLE_PERFECT_ROUTER=1`.
///
/// The one place that reads the variable; blocks are told through their builder.
pub fn enabled_by_environment() -> bool {
    std::env::var_os("ENABLE_PERFECT_ROUTER").is_some_and(|value| value == "1")
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
