//! Expert order on CUDA: the launches of `cuda/order/`, whose `order.cuh` says how.

use super::{ExpertOrder, OP, OrderSpec, TileMap};
use crate::cuda::{
    Binary, Buffer, Launch, Properties, Section, Sections, checked_shared, launch, properties, slice_of,
};
use crate::routing::Router;
use crate::routing::cuda::{self as routing, Place, RowKernel};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceRepr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor, bail};

/// Threads of a block, at most.
const MAX_THREADS: usize = 512;
/// Units that a word of a mask has room for.
const WORD_UNITS: usize = 32;
/// Bytes of masks, counters and experts of a chunk, where a chunk of one word does not need more and a block has them.
const MAX_CHUNK_BYTES: usize = 160 * 1024;
/// Groups of threads that add up the rows of chunks, at most, and the sums of all of them where one group does not need more
/// and a block has room for them.
const MAX_GROUPS: usize = 16;
const MAX_SUMS: usize = 16 * 1024;
/// Up to here one launch of one block is faster than two.
const WHOLE_SLOTS: usize = 1024;
/// The same for tokens, for each that a warp routes at once: those that a block routes at once.
const WHOLE_TOKENS: usize = MAX_THREADS / 32;
/// Slots, and tokens, of a chunk, at least: smaller chunks are more rows of counts.
const LEAST_SLOTS: usize = 256;
const LEAST_TOKENS: usize = 32;
/// Words of a chunk's masks, at most.
const MAX_CHUNK_WORDS: usize = 256;
/// Threads of the kernel that makes a tile map from offsets.
const TILE_THREADS: u32 = 512;

/// What the kernels are told; `OrderArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct Arguments {
    topk_ids: u64,
    replica_offsets: u64,
    replicas: u64,
    chunk_counts: u64,
    expert_counts: u64,
    expert_offsets: u64,
    sorted_slots: u64,
    slot_rank: u64,
    tile_experts: u64,
    tile_starts: u64,
    num_slots: u32,
    top_k: u32,
    num_experts: u32,
    turn: u32,
    first_local: u32,
    num_local: u32,
    tile_rows: u32,
    tile_shift: u32,
    max_tiles: u32,
    unit_slots: u32,
    unit_inverse: u32,
    chunk_units: u32,
    chunk_words: u32,
    num_chunks: u32,
    chunks_per_block: u32,
    group_bits: u32,
    column_bits: u32,
    packed: u32,
    whole: u32,
}

/// `RoutedArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct RoutedArguments {
    routing: routing::Arguments,
    order: Arguments,
}

/// `TileArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct TileArguments {
    expert_offsets: u64,
    tile_experts: u64,
    tile_starts: u64,
    num_local: u32,
    tile_rows: u32,
    max_tiles: u32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernels' parameters.
unsafe impl DeviceRepr for Arguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for RoutedArguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for TileArguments {}

/// How units (tokens whose slots go to different experts, or single slots) are cut into chunks, one for each block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    unit_slots: usize,
    chunk_units: usize,
    num_chunks: usize,
    /// One chunk, one launch.
    whole: bool,
}

impl Cut {
    /// Cuts `num_units` units of `unit_slots` slots; up to `whole_units` of them are not cut, and chunks are not made smaller
    /// than `least_units`.
    fn new(
        num_units: usize,
        unit_slots: usize,
        (whole_units, least_units): (usize, usize),
        pitch: usize,
        device: Properties,
    ) -> Self {
        let one = Self { unit_slots, chunk_units: WORD_UNITS, num_chunks: 1, whole: true };
        // What is not cut has its offsets beside it.
        let bytes = MAX_CHUNK_BYTES.min(device.max_shared.saturating_sub(offset_bytes(pitch)));
        let most = (bytes / one.chunk_bytes(pitch)).clamp(1, MAX_CHUNK_WORDS) * WORD_UNITS;
        if num_units <= whole_units.min(most) {
            return Self { chunk_units: num_units.max(1), ..one };
        }
        let units = num_units.div_ceil(device.num_multiprocessors).max(least_units);
        // Whole words, once there is more than one.
        let units = if units > WORD_UNITS { units.next_multiple_of(WORD_UNITS) } else { units };
        let chunk_units = units.min(most);
        Self { chunk_units, num_chunks: num_units.div_ceil(chunk_units), whole: false, ..one }
    }

    /// Words of a chunk's masks.
    fn chunk_words(&self) -> usize {
        self.chunk_units.div_ceil(WORD_UNITS)
    }

    /// Bytes of a chunk's masks, counters and experts.
    fn chunk_bytes(&self, pitch: usize) -> usize {
        let slots = self.chunk_units * self.unit_slots;
        self.chunk_words() * pitch * (size_of::<u32>() + size_of::<u16>()) + slots * size_of::<u16>()
    }
}

/// The outputs of an order, as sections of one buffer.
#[derive(Debug, Clone, Copy)]
struct Outputs {
    expert_counts: Section,
    expert_offsets: Section,
    sorted_slots: Section,
    slot_rank: Section,
    tile_experts: Section,
    tile_starts: Section,
    chunk_counts: Section,
    max_tiles: usize,
}

impl Outputs {
    fn new(buffer: &mut Buffer, spec: &OrderSpec, cut: Cut) -> Result<Self> {
        let (num_local, num_slots) = (spec.local_experts.len(), spec.num_slots());
        let max_tiles = checked_tiles(spec.max_tiles())?;
        Ok(Self {
            expert_counts: buffer.section(num_local),
            expert_offsets: buffer.section(num_local + 1),
            sorted_slots: buffer.section(num_slots),
            slot_rank: buffer.section(num_slots),
            tile_experts: buffer.section(max_tiles),
            tile_starts: buffer.section(max_tiles),
            chunk_counts: buffer.section(if cut.whole { 0 } else { cut.num_chunks * pitch(num_local) / 2 }),
            max_tiles,
        })
    }

    fn order(&self, sections: &Sections, spec: OrderSpec) -> Result<(ExpertOrder, Option<TileMap>)> {
        let (num_local, num_slots) = (spec.local_experts.len(), spec.num_slots());
        let order = ExpertOrder {
            expert_counts: sections.tensor(self.expert_counts, num_local)?,
            expert_offsets: sections.tensor(self.expert_offsets, num_local + 1)?,
            sorted_slots: sections.tensor(self.sorted_slots, num_slots)?,
            slot_rank: sections.tensor(self.slot_rank, num_slots)?,
            num_tokens: spec.num_tokens,
            top_k: spec.top_k,
            batch: spec.batch(),
            local_experts: spec.local_experts,
        };
        let tiles = match spec.tile_rows {
            Some(tile_rows) => Some(TileMap {
                tile_experts: sections.tensor(self.tile_experts, self.max_tiles)?,
                tile_starts: sections.tensor(self.tile_starts, self.max_tiles)?,
                tile_rows,
                order: order.sorted_slots.id(),
            }),
            None => None,
        };
        Ok((order, tiles))
    }

    fn arguments(
        &self,
        spec: &OrderSpec,
        cut: Cut,
        launches: &Launches,
        address: &dyn Fn(Section) -> u64,
    ) -> Arguments {
        // More rows than slots are as many as slots.
        let tile_rows = spec.tile_rows.map_or(0, |rows| rows.min(u32::MAX as usize) as u32);
        let num_local = spec.local_experts.len();
        Arguments {
            topk_ids: 0,
            replica_offsets: 0,
            replicas: 0,
            chunk_counts: address(self.chunk_counts),
            expert_counts: address(self.expert_counts),
            expert_offsets: address(self.expert_offsets),
            sorted_slots: address(self.sorted_slots),
            slot_rank: address(self.slot_rank),
            tile_experts: address(self.tile_experts),
            tile_starts: address(self.tile_starts),
            num_slots: spec.num_slots() as u32,
            top_k: spec.top_k as u32,
            num_experts: spec.num_experts as u32,
            turn: spec.map.as_ref().map_or(0, |map| map.turn),
            first_local: spec.local_experts.start as u32,
            num_local: num_local as u32,
            tile_rows,
            tile_shift: if tile_rows.is_power_of_two() { tile_rows.trailing_zeros() } else { u32::BITS },
            max_tiles: self.max_tiles as u32,
            unit_slots: cut.unit_slots as u32,
            unit_inverse: (1u64 << 32).div_ceil(cut.unit_slots as u64) as u32,
            chunk_units: cut.chunk_units as u32,
            chunk_words: cut.chunk_words() as u32,
            num_chunks: cut.num_chunks as u32,
            chunks_per_block: launches.chunks_per_block as u32,
            group_bits: launches.groups.trailing_zeros(),
            column_bits: (pitch(num_local) / 8).next_power_of_two().trailing_zeros(),
            packed: u32::from(launches.packed),
            whole: u32::from(cut.whole),
        }
    }
}

/// A number of tiles that kernels can count to, in steps of all their threads.
fn checked_tiles(max_tiles: usize) -> Result<usize> {
    const MOST: usize = u32::MAX as usize - (1 << 24);
    if max_tiles > MOST {
        bail!("{OP}: the tile map has {max_tiles} tiles, expected at most {MOST} on CUDA; choose more tile_rows")
    }
    Ok(max_tiles)
}

/// Counters of a row in memory: a row is read 16 bytes at a time.
fn pitch(num_local: usize) -> usize {
    num_local.next_multiple_of(8)
}

/// Bytes of totals, offsets of slots and tiles, and of the room for sums over the block.
fn offset_bytes(pitch: usize) -> usize {
    (3 * pitch + 2 + 64) * size_of::<u32>()
}

/// Groups of threads that add up rows, a power of two, so that their sums fit even where they take 32 bits.
fn num_groups(pitch: usize, device: Properties) -> usize {
    let fits = |groups: usize| place_bytes(groups, pitch, size_of::<u32>()) <= device.max_shared;
    let mut groups = MAX_GROUPS;
    while groups > 1 && (groups * pitch > MAX_SUMS || !fits(groups)) {
        groups /= 2;
    }
    groups
}

/// Bytes of shared memory of `place`: both sums of each group, the offsets, the chunk's places.
fn place_bytes(groups: usize, pitch: usize, sum: usize) -> usize {
    2 * groups * pitch * sum + offset_bytes(pitch) + pitch * size_of::<u32>()
}

/// The launches of an order: how the first one is made, and the second one if there is one.
#[derive(Debug, Clone, Copy)]
struct Launches {
    first: Launch,
    second: Option<Launch>,
    chunks_per_block: usize,
    /// Groups of threads that add up rows, a power of two.
    groups: usize,
    /// Whether the sums of a group fit 16 bits.
    packed: bool,
}

impl Launches {
    /// `warp_units` is what a warp of the first launch takes at once.
    fn new(device: &CudaDevice, spec: &OrderSpec, cut: Cut, warp_units: usize) -> Result<Self> {
        let num_local = spec.local_experts.len();
        let pitch = pitch(num_local);
        let what = format!("num_local_experts {num_local}");
        let chunk = cut.chunk_bytes(pitch).next_multiple_of(size_of::<u32>());
        let mut warps = cut.chunk_units.div_ceil(warp_units);
        if cut.whole {
            // A thread for each expert.
            warps = warps.max(num_local.div_ceil(32));
        }
        let threads = (32 * warps).clamp(32, MAX_THREADS);
        let shared = checked_shared(device, OP, &what, chunk + if cut.whole { offset_bytes(pitch) } else { 0 })?;
        let first = Launch::new(cut.num_chunks, threads as u32, shared);
        if cut.whole {
            return Ok(Self { first, second: None, chunks_per_block: 1, groups: 1, packed: false });
        }
        let properties = properties(device)?;
        let groups = num_groups(pitch, properties);
        // Rows go round the groups, a few at once where they are short.
        let at_once = (MAX_THREADS / groups / (pitch / 8).next_power_of_two()).max(1);
        let rows = cut.num_chunks.div_ceil(groups * at_once) * at_once;
        let packed = rows * cut.chunk_units <= u16::MAX as usize;
        let sum = if packed { size_of::<u16>() } else { size_of::<u32>() };
        let chunks_per_block = cut.num_chunks.div_ceil(properties.num_multiprocessors);
        let shared = checked_shared(device, OP, &what, place_bytes(groups, pitch, sum))?;
        let second = Launch::new(cut.num_chunks.div_ceil(chunks_per_block), MAX_THREADS as u32, shared);
        let second = Some(Launch { starts_early: true, ..second });
        Ok(Self { first, second, chunks_per_block, groups, packed })
    }
}

/// Runs `f` with the arguments that carry the map's addresses.
fn with_map(
    spec: &OrderSpec,
    device: &CudaDevice,
    mut arguments: Arguments,
    f: impl FnOnce(Arguments) -> Result<()>,
) -> Result<()> {
    let Some(map) = &spec.map else { return f(arguments) };
    let stream = device.cuda_stream();
    let (offsets, replicas) = (map.replica_offsets.on(device)?, map.replicas.on(device)?);
    let (offsets, _) = offsets.storage_and_layout();
    let (replicas, _) = replicas.storage_and_layout();
    let (offsets, _offsets) = slice_of::<u32>(&offsets, OP, "map")?.device_ptr(&stream);
    let (replicas, _replicas) = slice_of::<u32>(&replicas, OP, "map")?.device_ptr(&stream);
    (arguments.replica_offsets, arguments.replicas) = (offsets, replicas);
    f(arguments)
}

/// Orders ids that are given.
pub(super) fn order(topk_ids: &Tensor, device: &CudaDevice, spec: OrderSpec) -> Result<(ExpertOrder, Option<TileMap>)> {
    let topk_ids = topk_ids.contiguous()?;
    let pitch = pitch(spec.local_experts.len());
    let cut = Cut::new(spec.num_slots(), 1, (WHOLE_SLOTS, LEAST_SLOTS), pitch, properties(device)?);
    let launches = Launches::new(device, &spec, cut, 32)?;
    let mut buffer = Buffer::default();
    let outputs = Outputs::new(&mut buffer, &spec, cut)?;
    let (storage, layout) = topk_ids.storage_and_layout();
    let stream = device.cuda_stream();
    let (ids, _ids) = slice_of::<u32>(&storage, OP, "topk_ids")?.device_ptr(&stream);
    let write = |address: &dyn Fn(Section) -> u64| {
        let arguments = outputs.arguments(&spec, cut, &launches, address);
        with_map(&spec, device, arguments, |mut arguments| {
            arguments.topk_ids = ids + (layout.start_offset() * size_of::<u32>()) as u64;
            // SAFETY: `Arguments` is the parameter of both kernels; the ids are contiguous and the sections as long as the
            // kernels take them for; `place` waits for `order` by itself.
            unsafe {
                launch(device, Binary::Order, "order", launches.first, arguments)?;
                launches.second.map_or(Ok(()), |second| launch(device, Binary::Order, "place", second, arguments))
            }
        })
    };
    // SAFETY: the kernels write every count, offset, slot, rank and tile; the counters of chunks are read by `place` only.
    let sections = unsafe { buffer.fill(device, OP, write)? };
    outputs.order(&sections, spec)
}

/// What comes out of a fused launch.
pub(super) struct Routed {
    pub(super) topk_ids: Tensor,
    pub(super) topk_weights: CudaStorage,
    pub(super) order: ExpertOrder,
    pub(super) tiles: Option<TileMap>,
}

/// The fused kernel for logits of this shape, where there is one that is faster than routing and order in turn.
fn fused_kernel(dtype: DType, num_tokens: usize, num_experts: usize, router: &Router) -> Option<RowKernel> {
    if num_tokens == 0 {
        return None;
    }
    routing::row_kernel(dtype, num_tokens, num_experts, router, Place::Ordered)
}

/// Refuses what cannot be ordered, before anything is routed for it.
pub(super) fn check(spec: &OrderSpec) -> Result<()> {
    checked_tiles(spec.max_tiles()).map(drop)
}

/// Whether the fused kernels take logits of this shape.
pub(super) fn fuses(router_logits: &Tensor, router: &Router) -> bool {
    match *router_logits.dims() {
        [num_tokens, num_experts] => fused_kernel(router_logits.dtype(), num_tokens, num_experts, router).is_some(),
        _ => false,
    }
}

/// Routes and orders logits of a shape that [`fuses`].
pub(super) fn route_and_order(
    storage: &CudaStorage,
    layout: &Layout,
    router: &Router,
    num_valid_tokens: Option<&Tensor>,
    spec: OrderSpec,
) -> Result<Routed> {
    let device = storage.device();
    let (num_tokens, num_experts) = (layout.dims()[0], layout.dims()[1]);
    let Some(kernel) = fused_kernel(storage.dtype(), num_tokens, num_experts, router) else {
        bail!("{OP}: num_experts {num_experts} with top_k {} is not fused with routing", spec.top_k)
    };
    let pitch = pitch(spec.local_experts.len());
    let limits = (WHOLE_TOKENS * kernel.warp_tokens, LEAST_TOKENS);
    let cut = Cut::new(num_tokens, spec.top_k, limits, pitch, properties(device)?);
    let launches = Launches::new(device, &spec, cut, kernel.warp_tokens)?;
    let mut buffer = Buffer::default();
    let topk_ids = buffer.section(routing::num_slots(layout, router)?);
    let outputs = Outputs::new(&mut buffer, &spec, cut)?;
    let mut weights = None;
    let write = |address: &dyn Fn(Section) -> u64| {
        let order = outputs.arguments(&spec, cut, &launches, address);
        with_map(&spec, device, order, |mut order| {
            order.topk_ids = address(topk_ids);
            weights = Some(routing::write_weights(storage, layout, router, num_valid_tokens, |mut routing| {
                routing.topk_ids = order.topk_ids;
                let arguments = RoutedArguments { routing, order };
                // SAFETY: `RoutedArguments` and `Arguments` are the parameters of the kernels; `write_weights` and the
                // sections cover what they read and write; `place` waits for the kernel before it by itself.
                unsafe {
                    launch(device, Binary::Routed, &format!("routed_{}", kernel.name), launches.first, arguments)?;
                    launches.second.map_or(Ok(()), |second| launch(device, Binary::Order, "place", second, order))
                }
            })?);
            Ok(())
        })
    };
    // SAFETY: the kernels write every id, count, offset, slot, rank and tile; the counters of chunks are read by `place` only.
    let sections = unsafe { buffer.fill(device, OP, write)? };
    let Some(topk_weights) = weights else { bail!("{OP}: nothing was launched") };
    let (order, tiles) = outputs.order(&sections, spec)?;
    Ok(Routed { topk_ids: sections.tensor(topk_ids, (num_tokens, router.top_k()))?, topk_weights, order, tiles })
}

/// The tile map of offsets that are given.
pub(super) fn tile_map(
    order: &ExpertOrder,
    device: &CudaDevice,
    tile_rows: usize,
    max_tiles: usize,
) -> Result<TileMap> {
    let max_tiles = checked_tiles(max_tiles)?;
    let mut buffer = Buffer::default();
    let (tile_experts, tile_starts) = (buffer.section(max_tiles), buffer.section(max_tiles));
    let num_local = order.local_experts.len();
    let what = format!("num_local_experts {num_local}");
    let shared = checked_shared(device, OP, &what, (64 + num_local + 1) * size_of::<u32>())?;
    let (storage, layout) = order.expert_offsets.storage_and_layout();
    let stream = device.cuda_stream();
    let (offsets, _offsets) = slice_of::<u32>(&storage, OP, "expert_offsets")?.device_ptr(&stream);
    let write = |address: &dyn Fn(Section) -> u64| {
        let arguments = TileArguments {
            expert_offsets: offsets + (layout.start_offset() * size_of::<u32>()) as u64,
            tile_experts: address(tile_experts),
            tile_starts: address(tile_starts),
            num_local: num_local as u32,
            tile_rows: tile_rows.min(u32::MAX as usize) as u32,
            max_tiles: max_tiles as u32,
        };
        let blocks = max_tiles.div_ceil(TILE_THREADS as usize).min(properties(device)?.num_multiprocessors);
        let how = Launch::new(blocks.max(1), TILE_THREADS, shared);
        // SAFETY: `TileArguments` is the kernel's parameter; an order has `num_local + 1` offsets side by side, and the
        // sections have `max_tiles` words.
        unsafe { launch(device, Binary::Order, "tiles", how, arguments) }
    };
    // SAFETY: the kernel writes every tile.
    let sections = unsafe { buffer.fill(device, OP, write)? };
    Ok(TileMap {
        tile_experts: sections.tensor(tile_experts, max_tiles)?,
        tile_starts: sections.tensor(tile_starts, max_tiles)?,
        tile_rows,
        order: order.sorted_slots.id(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Properties =
        Properties { num_multiprocessors: 132, max_shared: 232_448, has_clusters: true, is_hopper: true };
    const A100: Properties =
        Properties { num_multiprocessors: 108, max_shared: 166_912, has_clusters: false, is_hopper: false };
    const L4: Properties =
        Properties { num_multiprocessors: 58, max_shared: 101_376, has_clusters: false, is_hopper: false };

    /// Every unit lies in exactly one chunk, and a block has room for a chunk.
    #[test]
    fn cuts_cover_all_units() {
        for device in [H100, A100, L4, Properties { num_multiprocessors: 1, ..H100 }] {
            for pitch in [0, 8, 256, 896, 2048, 4096, 16384] {
                for (unit_slots, limits) in [(1, (1024, 256)), (8, (64, 32)), (16, (64, 32)), (32, (16, 8))] {
                    let counts = (1..300).chain([928, 960, 1023, 1024, 1025, 4224, 4225, 1 << 18, 1 << 20]);
                    for num_units in counts.chain([(1 << 32) / unit_slots - 1]) {
                        check_cut(Cut::new(num_units, unit_slots, limits, pitch, device), num_units, pitch, device);
                    }
                }
            }
        }
    }

    fn check_cut(cut: Cut, num_units: usize, pitch: usize, device: Properties) {
        assert!(cut.num_chunks * cut.chunk_units >= num_units, "{cut:?}");
        assert!((cut.num_chunks - 1) * cut.chunk_units < num_units, "{cut:?}");
        assert!(cut.chunk_units <= u16::MAX as usize, "{cut:?}");
        assert!(cut.chunk_words() == 1 || cut.chunk_bytes(pitch) <= MAX_CHUNK_BYTES, "{cut:?}");
        assert!(!cut.whole || cut.num_chunks == 1, "{cut:?}");
        if pitch <= 2048 {
            let bytes = cut.chunk_bytes(pitch) + if cut.whole { offset_bytes(pitch) } else { 0 };
            assert!(bytes <= device.max_shared, "{cut:?} with {pitch} experts takes {bytes} bytes of {device:?}");
        }
    }

    /// As many groups as fit, down to one: on an H100 up to 8000 experts and more.
    #[test]
    fn sums_of_groups_fit_a_block() {
        for (device, most) in [(H100, 9672), (A100, 6936), (L4, 4208)] {
            for pitch in (8..=most).step_by(8) {
                let bytes = place_bytes(num_groups(pitch, device), pitch, size_of::<u32>());
                assert!(bytes <= device.max_shared, "{pitch} experts take {bytes} bytes of {device:?}");
            }
        }
        assert_eq!([32, 256, 1024, 4096, 8000].map(|pitch| num_groups(pitch, H100)), [16, 16, 16, 4, 1]);
    }
}
