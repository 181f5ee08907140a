//! Running one function on every rank of a group of threads.

use super::communicator::Deadlines;
use super::threads::Threads;
use candle_core::Result as CandleResult;
use std::any::Any;
use std::thread;

/// Runs `body` once per rank, each on its own thread, and returns what the ranks returned, in
/// rank order.
///
/// A rank that panics becomes an `Err` that names the rank and its panic message; the other ranks'
/// collectives fail with [`RankPanicked`](super::EpErrorKind::RankPanicked), and they end as they please.
/// Returns when all ranks have ended.
///
/// # Errors
///
/// `world_size` is zero or above [`MAX_RANKS`](super::MAX_RANKS).
pub fn launch<T, F>(world_size: usize, deadlines: impl Into<Deadlines>, body: F) -> CandleResult<Vec<Result<T, String>>>
where
    T: Send,
    F: Fn(Threads) -> T + Sync,
{
    let handles = Threads::group(world_size, deadlines)?;
    let body = &body;
    Ok(thread::scope(|scope| {
        let ranks: Vec<_> = handles
            .into_iter()
            .enumerate()
            .map(|(rank, handle)| {
                thread::Builder::new().name(format!("rank {rank}")).spawn_scoped(scope, move || body(handle))
            })
            .collect();
        let outcome = |(rank, started): (usize, std::io::Result<thread::ScopedJoinHandle<'_, T>>)| {
            match started {
                Ok(thread) => thread.join().map_err(|panic| format!("rank {rank} panicked: {}", message(&*panic))),
                // The handle went down with the closure, so the others find that this rank left.
                Err(error) => Err(format!("rank {rank} could not start its thread: {error}")),
            }
        };
        ranks.into_iter().enumerate().map(outcome).collect()
    }))
}

fn message(panic: &(dyn Any + Send)) -> &str {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else {
        "no message"
    }
}
