//! Graphs and the time that the device takes.

use super::stats::{Budget, Meter, Summary};
use anyhow::{Context, Result};
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaGraph, LaunchConfig, sys};
use std::time::Duration;

/// A kernel that does nothing.
const EMPTY: &str = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry empty() { ret; }\n";

/// Puts a kernel that does nothing on the stream.
pub(crate) fn launch_empty(device: &CudaDevice) -> Result<()> {
    let function = device.get_or_load_custom_func("empty", "examples_empty", EMPTY)?;
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the kernel takes nothing and touches nothing.
    unsafe { function.builder().launch(config) }?;
    Ok(())
}

/// Work that was captured, to be replayed.
pub(crate) struct Graph(CudaGraph);

impl Graph {
    /// Captures what `work` puts on the device's stream.
    pub(crate) fn capture(device: &CudaDevice, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let worked = work();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // Ends the capture in any case, so that the stream can be used again.
        let graph = stream.end_capture(flags);
        worked?;
        Ok(Self(graph?.context("nothing was captured")?))
    }
}

/// Times work on the device by events around it.
pub(crate) struct Stopwatch {
    device: CudaDevice,
    start: CudaEvent,
    end: CudaEvent,
}

impl Stopwatch {
    pub(crate) fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let event = || stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Self { device: device.clone(), start: event()?, end: event()? })
    }

    /// Seconds that `work` takes on the device.
    pub(crate) fn measure(&self, budget: Budget, mut work: impl FnMut() -> Result<()>) -> Result<Summary> {
        let mut meter = Meter::new(budget);
        while meter.wants_more() {
            meter.record(self.once(&mut work)?);
        }
        Ok(meter.summary())
    }

    /// What `work` takes on the device, once.
    pub(crate) fn once(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let stream = self.device.cuda_stream();
        self.start.record(&stream)?;
        work()?;
        self.end.record(&stream)?;
        Ok(Duration::from_secs_f64(f64::from(self.start.elapsed_ms(&self.end)?) / 1e3))
    }

    /// What one replay takes.
    pub(crate) fn replay(&self, graph: &Graph) -> Result<Duration> {
        self.once(|| Ok(graph.0.launch()?))
    }

    /// Seconds of one replay.
    pub(crate) fn replays(&self, budget: Budget, graph: &Graph) -> Result<Summary> {
        self.measure(budget, || Ok(graph.0.launch()?))
    }
}
