//! How the MoE layers of a model run.

use crate::ep::Reduction;
use candle_core::DType;
use std::time::Duration;

/// How the MoE layers run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeOptions {
    /// The dtype of the hidden states of a model that holds them itself (`gpt_oss`): f32 or bf16.
    pub dtype: DType,
    /// Ranks, each a thread with its own experts.
    pub ep_size: usize,
    /// How results are summed.
    pub reduction: Reduction,
    /// Balanced routing. **For measuring: the output is then meaningless.**
    pub perfect_router: bool,
    /// Longest wait for another rank, of a model that starts the ranks itself (`gpt_oss`).
    pub deadline: Duration,
}

impl Default for MoeOptions {
    /// float32, one rank, slot order, learned routing, a minute.
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            ep_size: 1,
            reduction: Reduction::SlotOrder,
            perfect_router: false,
            deadline: Duration::from_secs(60),
        }
    }
}
