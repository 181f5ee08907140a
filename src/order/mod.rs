//! Expert order: the slots of a batch, grouped by expert.
//!
//! A slot is one (token, k) pair, `slot = token * top_k + k`. Grouped matrix multiplication wants the rows of one expert
//! side by side: [`ExpertOrder`] lists the slots by expert and, inside an expert, in slot order (a stable counting sort,
//! the same from run to run), with the inverse map to bring results home.
//!
//! A range of local experts may filter: slots of other experts are skipped, as are slots that hold [`NO_EXPERT`].

mod cpu;

pub use crate::routing::NO_EXPERT;

use candle_core::{DType, Device, Result, Tensor, bail};
use std::ops::Range;

const OP: &str = "expert-order";

/// Marks an unused place in `sorted_slots`, and in `slot_rank` a slot that is not in the order.
pub const NO_SLOT: u32 = u32::MAX;

/// The slots of the local experts in expert order, and the way back.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_moe::order::{ExpertOrder, NO_SLOT};
/// let topk_ids = Tensor::new(&[[2u32, 0], [1, 2]], &Device::Cpu)?;
/// let order = ExpertOrder::new(&topk_ids, 3, 0..3)?;
/// assert_eq!(order.expert_offsets.to_vec1::<u32>()?, [0, 1, 2, 4]);
/// assert_eq!(order.sorted_slots.to_vec1::<u32>()?, [1, 2, 0, 3]);
/// let local = ExpertOrder::new(&topk_ids, 3, 1..3)?;
/// assert_eq!(local.slot_rank.to_vec1::<u32>()?, [1, NO_SLOT, 0, 2]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ExpertOrder {
    /// u32 `[num_local_experts]`: slots of each local expert.
    pub expert_counts: Tensor,
    /// u32 `[num_local_experts + 1]`: exclusive prefix sum of the counts, the total last.
    pub expert_offsets: Tensor,
    /// u32 `[num_tokens * top_k]`: slots by (expert, slot); places after the total hold [`NO_SLOT`].
    pub sorted_slots: Tensor,
    /// u32 `[num_tokens * top_k]`: the place of each slot in `sorted_slots`, or [`NO_SLOT`].
    pub slot_rank: Tensor,
    num_tokens: usize,
    top_k: usize,
    local_experts: Range<usize>,
}

/// Tiles of a grouped matrix multiplication: each covers up to `tile_rows` places of one expert.
#[derive(Debug, Clone)]
pub struct TileMap {
    /// u32 `[max_tiles]`: the local expert (counted from the start of the range) of each tile; [`NO_EXPERT`] past the last.
    pub tile_experts: Tensor,
    /// u32 `[max_tiles]`: the first place of each tile in `sorted_slots`; [`NO_SLOT`] past the last.
    pub tile_starts: Tensor,
}

impl ExpertOrder {
    /// Orders `topk_ids`, u32 `[num_tokens, top_k]` with values below `num_experts` or [`NO_EXPERT`], keeping the slots
    /// of `local_experts` only. Zero tokens are fine.
    ///
    /// # Errors
    /// Wrong rank or dtype, an id out of range, a range beyond `num_experts`, more than 2^32 - 2 slots.
    pub fn new(topk_ids: &Tensor, num_experts: usize, local_experts: Range<usize>) -> Result<Self> {
        let &[num_tokens, top_k] = topk_ids.dims() else {
            bail!("{OP}: topk_ids has shape {:?}, expected [num_tokens, top_k]", topk_ids.shape())
        };
        if topk_ids.dtype() != DType::U32 {
            bail!("{OP}: topk_ids has dtype {:?}, expected u32", topk_ids.dtype())
        }
        if num_experts > NO_EXPERT as usize {
            bail!("{OP}: num_experts is {num_experts}, expected at most {NO_EXPERT}")
        }
        if local_experts.start > local_experts.end || local_experts.end > num_experts {
            bail!("{OP}: local_experts is {local_experts:?}, expected a range inside 0..{num_experts}")
        }
        if num_tokens.checked_mul(top_k).is_none_or(|num_slots| num_slots >= NO_SLOT as usize) {
            bail!("{OP}: topk_ids has shape {:?}, expected fewer than {NO_SLOT} slots", topk_ids.shape())
        }
        let order = crate::host::with_slice(topk_ids, OP, "topk_ids", |ids: &[u32]| {
            cpu::order(ids, num_experts, local_experts.clone())
        })?;
        let vector = |values: Vec<u32>| {
            let len = values.len();
            Tensor::from_vec(values, len, &Device::Cpu)
        };
        Ok(Self {
            expert_counts: vector(order.expert_counts)?,
            expert_offsets: vector(order.expert_offsets)?,
            sorted_slots: vector(order.sorted_slots)?,
            slot_rank: vector(order.slot_rank)?,
            num_tokens,
            top_k,
            local_experts,
        })
    }

    /// Tokens of the batch.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Slots per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// The experts whose slots are in the order.
    pub fn local_experts(&self) -> Range<usize> {
        self.local_experts.clone()
    }

    /// Tiles of `tile_rows` rows over the order.
    ///
    /// The tensors have room for the worst case, which follows from the shapes alone, so that a launch needs no copy to
    /// the host: `num_slots / tile_rows` full tiles, and one partial tile for each expert that can have one.
    ///
    /// # Errors
    /// `tile_rows` is 0.
    pub fn tile_map(&self, tile_rows: usize) -> Result<TileMap> {
        if tile_rows == 0 {
            bail!("{OP}: tile_rows is 0, expected at least 1")
        }
        let num_slots = self.num_tokens * self.top_k;
        let max_tiles = num_slots / tile_rows + self.local_experts.len().min(num_slots);
        let (experts, starts) = crate::host::with_slice(&self.expert_offsets, OP, "expert_offsets", |offsets| {
            Ok(cpu::tile_map(offsets, tile_rows, max_tiles))
        })?;
        Ok(TileMap {
            tile_experts: Tensor::from_vec(experts, max_tiles, &Device::Cpu)?,
            tile_starts: Tensor::from_vec(starts, max_tiles, &Device::Cpu)?,
        })
    }
}
