//! What is measured: the arguments, checked.

use crate::backends::Backend;
use crate::workload::Workload;
use candle_core::{DType, Result};
use candle_moe::ep::{Communicator, Fingerprint, Placement, Reduction};

/// The same on every rank.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The name of the profile; the sizes may be others.
    pub(crate) profile: String,
    pub(crate) hidden_size: usize,
    pub(crate) top_k: usize,
    pub(crate) num_experts: usize,
    pub(crate) ep_size: usize,
    pub(crate) dtype: DType,
    pub(crate) reduction: Reduction,
    /// Ascending.
    pub(crate) local_batch_sizes: Vec<usize>,
    pub(crate) iters: usize,
    pub(crate) warmup: usize,
    pub(crate) perfect_router: bool,
    pub(crate) workload: Workload,
    pub(crate) seed: u64,
    pub(crate) placement: Placement,
    /// Whether calls on a device are timed as part of graphs, where a strategy allows it.
    pub(crate) cuda_graph: bool,
}

impl Settings {
    /// Finds the rank that was started with other settings. A collective.
    pub(crate) fn agree(&self, communicator: &mut dyn Communicator, backends: &[Backend]) -> Result<()> {
        Fingerprint::new()
            .with("backend", Backend::names(backends))
            .with("hidden_size", self.hidden_size)
            .with("top_k", self.top_k)
            .with("num_experts", self.num_experts)
            .with("dtype", self.dtype.as_str())
            .with("reduction", self.reduction)
            .with("local_batch_size", format!("{:?}", self.local_batch_sizes))
            .with("iters", self.iters)
            .with("warmup", self.warmup)
            .with("perfect_router", self.perfect_router)
            .with("workload", format!("{:?}", self.workload))
            .with("seed", self.seed)
            .with("cuda_graph", self.cuda_graph)
            .agree(communicator)
    }

    /// Experts of the rank that has most of them.
    pub(crate) fn experts_per_rank(&self) -> usize {
        self.num_experts.div_ceil(self.ep_size)
    }
}
