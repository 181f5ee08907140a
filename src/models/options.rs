//! How the MoE layers of a model run.

use crate::ep::{Placement, Reduction, Strategy};
use candle_core::{DType, Device, Result, bail};
use std::time::Duration;

const OP: &str = "moe options";

/// How the MoE layers run.
#[derive(Debug, Clone)]
pub struct MoeOptions {
    /// The dtype of the hidden states of a model that holds them itself (`gpt_oss`): f32 or bf16.
    pub dtype: DType,
    /// Where weights and hidden states are: the CPU, or this rank's CUDA device.
    pub device: Device,
    /// Ranks, each a thread, a process or a device with its own experts.
    pub ep_size: usize,
    /// How results are summed.
    pub reduction: Reduction,
    /// How tokens and results travel between ranks, instead of [what is found best](crate::ep::Problem::choose).
    pub strategy: Option<Strategy>,
    /// Who holds the experts of each MoE layer, the first MoE layer first, instead of contiguous ranges. Each rank reads the
    /// experts that it holds, replicas too.
    pub placements: Option<Vec<Placement>>,
    /// Balanced routing. **For measuring: the output is then meaningless.**
    pub perfect_router: bool,
    /// Longest wait for another rank, of a model that starts the ranks itself (`gpt_oss`).
    pub deadline: Duration,
}

impl Default for MoeOptions {
    /// float32 on the CPU, one rank, slot order, the best strategy, contiguous experts, learned routing, a minute.
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            device: Device::Cpu,
            ep_size: 1,
            reduction: Reduction::SlotOrder,
            strategy: None,
            placements: None,
            perfect_router: false,
            deadline: Duration::from_secs(60),
        }
    }
}

impl MoeOptions {
    /// Who holds the experts of the MoE layer number `layer`, dense layers not counted; `ep_rank` is one of the ranks.
    pub(super) fn placement(&self, layer: usize, num_experts: usize, ep_rank: usize) -> Result<Placement> {
        let placement = self.placement_of(layer, num_experts)?;
        if ep_rank >= self.ep_size {
            bail!("{OP}: ep_rank is {ep_rank}, expected less than ep_size, which is {}", self.ep_size)
        }
        Ok(placement)
    }

    fn placement_of(&self, layer: usize, num_experts: usize) -> Result<Placement> {
        let Some(placements) = &self.placements else { return Placement::contiguous(num_experts, self.ep_size) };
        let Some(placement) = placements.get(layer) else {
            let given = placements.len();
            bail!("{OP}: placements has {given} layers, expected one for MoE layer {layer}, counted from 0, too")
        };
        let (found, expected) = ((placement.num_experts(), placement.ep_size()), (num_experts, self.ep_size));
        if found != expected {
            bail!(
                "{OP}: placements[{layer}] is of {} experts on {} ranks, expected {} experts on ep_size = {} ranks",
                found.0,
                found.1,
                expected.0,
                expected.1
            )
        }
        Ok(placement.clone())
    }
}
