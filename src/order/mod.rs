//! Expert order: the slots of a batch, grouped by expert.
//!
//! A slot is one (token, k) pair, `slot = token * top_k + k`. Grouped matrix multiplication wants the rows of one expert
//! side by side: [`ExpertOrder`] lists the slots by expert and, inside an expert, in slot order (a stable counting sort,
//! the same from run to run), with the inverse map to bring results home.
//!
//! A range of local experts may filter: slots of other experts are skipped, as are slots that hold [`NO_EXPERT`]. An
//! [`ExpertMap`] may rename experts to the physical experts that hold them, with replicas, in the same pass.
//! [`RoutedOrder`] goes from router logits to the order in one step.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod map;
mod routed;

pub use crate::routing::NO_EXPERT;
pub use map::ExpertMap;
pub use routed::{OrderOptions, RoutedOrder};

use candle_core::{DType, Device, Result, Tensor, TensorId, bail};
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
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "the CPU has kernels of one kind"))]
    batch: Batch,
}

/// What the kernels of experts are chosen by: all that was ordered and, where ranks share a batch, what they ordered, so that all
/// ranks with devices of the same kind choose alike.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "the CPU has kernels of one kind"))]
pub(crate) struct Batch {
    pub(crate) num_slots: usize,
    pub(crate) num_experts: usize,
}

#[cfg(feature = "cuda")]
impl Batch {
    /// Slots that an expert has on average.
    pub(crate) fn slots_per_expert(self) -> usize {
        self.num_slots.div_ceil(self.num_experts.max(1))
    }
}

/// Tiles of a grouped matrix multiplication: each covers up to `tile_rows` places of one expert.
#[derive(Debug, Clone)]
pub struct TileMap {
    /// u32 `[max_tiles]`: the local expert (counted from the start of the range) of each tile; [`NO_EXPERT`] past the last.
    pub tile_experts: Tensor,
    /// u32 `[max_tiles]`: the first place of each tile in `sorted_slots`; [`NO_SLOT`] past the last.
    pub tile_starts: Tensor,
    tile_rows: usize,
    /// That of the order's sorted slots, whose places these are.
    order: TensorId,
}

impl TileMap {
    /// Places of a tile, at most.
    pub fn tile_rows(&self) -> usize {
        self.tile_rows
    }

    /// Whether its places are those of `order`, or of a copy of it that shares its tensors.
    pub fn is_of(&self, order: &ExpertOrder) -> bool {
        self.order == order.sorted_slots.id()
    }
}

impl ExpertOrder {
    /// Orders `topk_ids`, u32 `[num_tokens, top_k]` with values below `num_experts` or [`NO_EXPERT`], keeping the slots
    /// of `local_experts` only. Zero tokens are fine.
    ///
    /// On CUDA nothing waits for the device, so an id out of range is no error there: its slot is skipped.
    ///
    /// # Errors
    /// Wrong rank or dtype, an id out of range, a range beyond `num_experts`, more than 2^32 - 2 slots. On CUDA more local
    /// experts than fit a block's shared memory (about 8000 at compute capability 9.0).
    pub fn new(topk_ids: &Tensor, num_experts: usize, local_experts: Range<usize>) -> Result<Self> {
        Self::checked(topk_ids, num_experts, OrderOptions { local_experts: Some(local_experts), ..Default::default() })
    }

    /// Orders `topk_ids`, u32 `[num_tokens, top_k]` with values below the map's `num_experts` or [`NO_EXPERT`], by the
    /// physical experts that hold them, keeping the slots of the physical experts `local_experts` only.
    ///
    /// # Errors
    /// As [`new`](Self::new); a range beyond the map's physical experts.
    pub fn with_map(topk_ids: &Tensor, map: &ExpertMap, local_experts: Range<usize>) -> Result<Self> {
        let options = OrderOptions { local_experts: Some(local_experts), map: Some(map.clone()), ..Default::default() };
        Self::checked(topk_ids, map.num_experts(), options)
    }

    fn checked(topk_ids: &Tensor, num_experts: usize, options: OrderOptions) -> Result<Self> {
        let &[num_tokens, top_k] = topk_ids.dims() else {
            bail!("{OP}: topk_ids has shape {:?}, expected [num_tokens, top_k]", topk_ids.shape())
        };
        if topk_ids.dtype() != DType::U32 {
            bail!("{OP}: topk_ids has dtype {:?}, expected u32", topk_ids.dtype())
        }
        let spec = OrderSpec::new(num_tokens, top_k, num_experts, &options)?;
        Self::of(topk_ids, spec).map(|(order, _)| order)
    }

    /// The order of ids whose shape `spec` has checked.
    fn of(topk_ids: &Tensor, spec: OrderSpec) -> Result<(Self, Option<TileMap>)> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = topk_ids.device() {
            return cuda::order(topk_ids, device, spec);
        }
        let order = crate::host::with_slice(topk_ids, OP, "topk_ids", |ids: &[u32]| cpu::order(ids, &spec))?;
        let vector = |values: Vec<u32>| {
            let len = values.len();
            Tensor::from_vec(values, len, &Device::Cpu)
        };
        let batch = spec.batch();
        let OrderSpec { num_tokens, top_k, tile_rows, local_experts, .. } = spec;
        let order = Self {
            expert_counts: vector(order.expert_counts)?,
            expert_offsets: vector(order.expert_offsets)?,
            sorted_slots: vector(order.sorted_slots)?,
            slot_rank: vector(order.slot_rank)?,
            num_tokens,
            top_k,
            local_experts,
            batch,
        };
        let tiles = tile_rows.map(|tile_rows| order.tile_map(tile_rows)).transpose()?;
        Ok((order, tiles))
    }

    /// Tokens of the batch.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Slots per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// The batch that this is a part of.
    #[cfg(feature = "cuda")]
    pub(crate) fn batch(&self) -> Batch {
        self.batch
    }

    /// As part of a batch of `num_slots` slots for `num_experts` experts.
    pub(crate) fn among(self, num_slots: usize, num_experts: usize) -> Self {
        Self { batch: Batch { num_slots, num_experts }, ..self }
    }

    /// The same with each slot as a token of its own.
    pub(crate) fn of_single_slots(&self) -> Self {
        Self { num_tokens: self.num_tokens * self.top_k, top_k: 1, ..self.clone() }
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
        check_tile_rows(tile_rows)?;
        let max_tiles = max_tiles(self.num_tokens * self.top_k, tile_rows, self.local_experts.len());
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = self.expert_offsets.device() {
            return cuda::tile_map(self, device, tile_rows, max_tiles);
        }
        let (experts, starts) = crate::host::with_slice(&self.expert_offsets, OP, "expert_offsets", |offsets| {
            Ok(cpu::tile_map(offsets, tile_rows, max_tiles))
        })?;
        Ok(TileMap {
            tile_experts: Tensor::from_vec(experts, max_tiles, &Device::Cpu)?,
            tile_starts: Tensor::from_vec(starts, max_tiles, &Device::Cpu)?,
            tile_rows,
            order: self.sorted_slots.id(),
        })
    }
}

/// What an order is asked for, checked.
#[derive(Debug, Clone)]
struct OrderSpec {
    num_tokens: usize,
    top_k: usize,
    num_experts: usize,
    local_experts: Range<usize>,
    map: Option<ExpertMap>,
    tile_rows: Option<usize>,
}

impl OrderSpec {
    fn batch(&self) -> Batch {
        let num_experts = self.map.as_ref().map_or(self.num_experts, ExpertMap::num_physical);
        Batch { num_slots: self.num_tokens * self.top_k, num_experts }
    }

    fn new(num_tokens: usize, top_k: usize, num_experts: usize, options: &OrderOptions) -> Result<Self> {
        let OrderOptions { local_experts, map, tile_rows, .. } = options.clone();
        if num_experts > NO_EXPERT as usize {
            bail!("{OP}: num_experts is {num_experts}, expected at most {NO_EXPERT}")
        }
        if let Some(map) = &map
            && map.num_experts() != num_experts
        {
            bail!("{OP}: the map is of {} experts, expected num_experts, which is {num_experts}", map.num_experts())
        }
        let num_physical = map.as_ref().map_or(num_experts, ExpertMap::num_physical);
        let local_experts = local_experts.unwrap_or(0..num_physical);
        if local_experts.start > local_experts.end || local_experts.end > num_physical {
            bail!("{OP}: local_experts is {local_experts:?}, expected a range inside 0..{num_physical}")
        }
        if num_tokens.checked_mul(top_k).is_none_or(|num_slots| num_slots >= NO_SLOT as usize) {
            bail!("{OP}: topk_ids has shape [{num_tokens}, {top_k}], expected fewer than {NO_SLOT} slots")
        }
        if let Some(tile_rows) = tile_rows {
            check_tile_rows(tile_rows)?;
        }
        Ok(Self { num_tokens, top_k, num_experts, local_experts, map, tile_rows })
    }

    /// The place of a slot's expert among the local ones.
    fn local_expert(&self, slot: usize, id: u32) -> Option<usize> {
        let id = id as usize;
        if id >= self.num_experts {
            return None;
        }
        let physical = self.map.as_ref().map_or(id, |map| map.physical(slot / self.top_k, id));
        self.local_experts.contains(&physical).then(|| physical - self.local_experts.start)
    }

    #[cfg(feature = "cuda")]
    fn num_slots(&self) -> usize {
        self.num_tokens * self.top_k
    }

    #[cfg(feature = "cuda")]
    fn max_tiles(&self) -> usize {
        self.tile_rows.map_or(0, |tile_rows| max_tiles(self.num_slots(), tile_rows, self.local_experts.len()))
    }
}

fn check_tile_rows(tile_rows: usize) -> Result<()> {
    if tile_rows == 0 {
        bail!("{OP}: tile_rows is 0, expected at least 1")
    }
    Ok(())
}

/// Full tiles, and one partial tile for each expert that can have one.
fn max_tiles(num_slots: usize, tile_rows: usize, num_local: usize) -> usize {
    num_slots / tile_rows + num_local.min(num_slots)
}
