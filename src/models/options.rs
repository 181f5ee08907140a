//! How the MoE layers of a model run.

use crate::ep::Reduction;
use candle_core::{DType, Device};
use std::time::Duration;

/// How the MoE layers run.
#[derive(Debug, Clone)]
pub struct MoeOptions {
    /// The dtype of the hidden states of a model that holds them itself (`gpt_oss`): f32 or bf16.
    pub dtype: DType,
    /// Where weights and hidden states are: the CPU, or a CUDA device, which has one rank.
    pub device: Device,
    /// Ranks, each a thread or a process with its own experts.
    pub ep_size: usize,
    /// How results are summed.
    pub reduction: Reduction,
    /// Balanced routing. **For measuring: the output is then meaningless.**
    pub perfect_router: bool,
    /// Longest wait for another rank, of a model that starts the ranks itself (`gpt_oss`).
    pub deadline: Duration,
}

impl Default for MoeOptions {
    /// float32 on the CPU, one rank, slot order, learned routing, a minute.
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            device: Device::Cpu,
            ep_size: 1,
            reduction: Reduction::SlotOrder,
            perfect_router: false,
            deadline: Duration::from_secs(60),
        }
    }
}
