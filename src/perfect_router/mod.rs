//! Perfect router: cached logits that spread tokens evenly over expert-parallel ranks.
//!
//! Replace a gate's logits by these and every rank receives the same number of slots, so that a run measures what balance
//! would buy. **Perfect routing is for measuring: the output of the model is meaningless.** Learned parameters are never
//! modified; a selection bias must be left out while perfect logits are routed
//! ([`Router::without_selection_bias`](crate::routing::Router::without_selection_bias)).
//!
//! [`Schedule`] is the plan, [`PerfectRouterStore`] the cache of the logits that realise it. The schedule rotates by
//! sender (*rank-rotated*): at step `i` the senders hit different receivers, which is what a benchmark of communication
//! wants. It balances ranks, and experts only over whole periods: at few tokens per rank, senders overlap on experts, so a
//! whole layer loads fewer weights than it could. At small batch a balanced table in turn touches more experts than real
//! routing does, so its time is not a lower bound.

mod schedule;
mod store;

pub use schedule::Schedule;
pub use store::{PerfectRouterKey, PerfectRouterStore, StoreStatistics};

/// Whether the environment asks for perfect routing: `ENABLE_PERFECT_ROUTER=1`.
///
/// The one place that reads the variable; blocks are told through
/// [`MoeBlockBuilder::perfect_router`](crate::block::MoeBlockBuilder::perfect_router).
pub fn enabled_by_environment() -> bool {
    std::env::var_os("ENABLE_PERFECT_ROUTER").is_some_and(|value| value == "1")
}
