//! Times on CUDA devices.
//!
//! ```text
//! in graphs    capture fifty calls; again and again: barrier, replay   a sample is a fiftieth of the time between two events
//! without      again and again: barrier, call                          a sample is the time between two events
//! ```
//!
//! Where ranks fetch results from each other, the results lie there before: a layer's experts write them there.
//!
//! Ranks replay alike, and the first of fifty calls waits for whoever left the barrier last.

use crate::clock::{Clock, nanoseconds};
use crate::common::graph::{Graph, Stopwatch};
use crate::measure::{Layer, Round};
use crate::measurement::{Samples, Volume};
use anyhow::Result;
use candle_core::CudaDevice;
use candle_moe::ep::Communicator;
use std::time::Instant;

/// Calls in a graph.
const CALLS: u32 = 50;

/// The samples of this rank.
pub(crate) fn time(
    layer: &Layer<'_>,
    communicator: &mut dyn Communicator,
    round: &Round,
    (clock, volume): (Clock, Volume),
    device: &CudaDevice,
    is_captured: bool,
) -> Result<Samples> {
    let stopwatch = Stopwatch::new(device)?;
    let mut samples = Samples::new(volume);
    let dispatched = layer.dispatch(communicator)?;
    let combined = |communicator: &mut dyn Communicator| -> Result<()> {
        layer.combine_in_place(communicator, &dispatched, round)?;
        Ok(())
    };
    // With the check's that is two rounds, after which all places have their results.
    layer.combine(communicator, &dispatched, round)?;
    combined(communicator)?;
    communicator.settle()?;
    let graphs = match is_captured {
        true => {
            let dispatches = Graph::capture(device, || {
                (0..CALLS).try_for_each(|_| layer.dispatch(communicator).map(drop)).map_err(Into::into)
            })?;
            let combines = Graph::capture(device, || (0..CALLS).try_for_each(|_| combined(communicator)))?;
            Some((dispatches, combines))
        }
        false => None,
    };
    for iteration in 0..layer.settings.warmup.saturating_add(layer.settings.iters) {
        communicator.barrier()?;
        let arrived = Instant::now();
        let dispatch_time = match &graphs {
            Some((dispatches, _)) => stopwatch.replay(dispatches)? / CALLS,
            None => stopwatch.once(|| Ok(layer.dispatch(communicator).map(drop)?))?,
        };
        communicator.barrier()?;
        let combine_time = match &graphs {
            Some((_, combines)) => stopwatch.replay(combines)? / CALLS,
            None => stopwatch.once(|| combined(communicator))?,
        };
        communicator.settle()?;
        if iteration >= layer.settings.warmup {
            samples.dispatch_ns.push(nanoseconds(dispatch_time));
            samples.combine_ns.push(nanoseconds(combine_time));
            samples.arrival_ns.push(clock.read(arrived));
        }
    }
    Ok(samples)
}
