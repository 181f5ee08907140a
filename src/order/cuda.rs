//! Expert order on CUDA: the launches of `cuda/order/`, whose `order.cuh` says how.

use super::{ExpertOrder, OP, OrderSpec, TileMap};
use crate::cuda::{
    Binary, Buffer, Launch, Properties, Section, Sections, checked_shared, launch, properties, slice_of,
};
use crate::routing::Router;
use crate::routing::cuda as routing;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DeviceRepr};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Tensor, bail};

/// The most threads of a block, and the fewest.
const MAX_THREADS: usize = 512;
const MIN_THREADS: usize = 32;
/// Bytes of counters, one for each warp and expert, that are worth having more warps.
const MAX_COUNTERS: usize = 64 * 1024;
/// Blocks of a cluster, at most.
const CLUSTER: usize = 8;
/// What a warp takes in one launch: up to here one block or one cluster is faster than two launches.
const WHOLE_TOKENS_PER_WARP: usize = 2;
const WHOLE_SLOTS_PER_WARP: usize = 64;
/// Chunks of a large batch, for each multiprocessor, and chunks that a block places.
const CHUNKS_PER_MULTIPROCESSOR: usize = 2;
/// Slots of a chunk, at most: its counters have 16 bits.
const MAX_CHUNK_SLOTS: usize = u16::MAX as usize;
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
    max_tiles: u32,
    warp_slots: u32,
    num_chunks: u32,
    chunks_per_block: u32,
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

/// How slots are cut into the parts of warps and blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    threads: usize,
    warp_slots: usize,
    num_chunks: usize,
    /// One launch, of one block or one cluster.
    whole: bool,
}

impl Cut {
    /// Cuts `num_units` units of `unit` slots. `whole_units` is what a warp takes in one launch at most; parts are made of
    /// `grain` units.
    fn new(num_units: usize, unit: usize, grain: usize, whole_units: usize, pitch: usize, device: Properties) -> Self {
        let mut threads = MAX_THREADS;
        while threads > MIN_THREADS && threads / 32 * pitch * size_of::<u16>() > MAX_COUNTERS {
            threads /= 2;
        }
        let warps = threads / 32;
        let part = |blocks: usize| num_units.div_ceil(blocks * warps).max(1).next_multiple_of(grain);
        let cluster = if device.has_clusters { CLUSTER } else { 1 };
        for blocks in [1, 2, 4, CLUSTER] {
            if blocks <= cluster && part(blocks) <= whole_units {
                return Self { threads, warp_slots: part(blocks) * unit, num_chunks: blocks, whole: true };
            }
        }
        let most = (MAX_CHUNK_SLOTS / warps / unit).max(1);
        let most = if most > grain { most / grain * grain } else { most };
        let units = part(device.num_multiprocessors * CHUNKS_PER_MULTIPROCESSOR).min(most);
        let num_chunks = num_units.div_ceil(units * warps);
        Self { threads, warp_slots: units * unit, num_chunks, whole: false }
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
        let tiles = match spec.tile_rows {
            Some(_) => Some(TileMap {
                tile_experts: sections.tensor(self.tile_experts, self.max_tiles)?,
                tile_starts: sections.tensor(self.tile_starts, self.max_tiles)?,
            }),
            None => None,
        };
        let order = ExpertOrder {
            expert_counts: sections.tensor(self.expert_counts, num_local)?,
            expert_offsets: sections.tensor(self.expert_offsets, num_local + 1)?,
            sorted_slots: sections.tensor(self.sorted_slots, num_slots)?,
            slot_rank: sections.tensor(self.slot_rank, num_slots)?,
            num_tokens: spec.num_tokens,
            top_k: spec.top_k,
            local_experts: spec.local_experts,
        };
        Ok((order, tiles))
    }

    fn arguments(&self, spec: &OrderSpec, cut: Cut, per_block: usize, address: &dyn Fn(Section) -> u64) -> Arguments {
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
            num_local: spec.local_experts.len() as u32,
            // More rows than slots are as many as slots.
            tile_rows: spec.tile_rows.map_or(0, |rows| rows.min(u32::MAX as usize) as u32),
            max_tiles: self.max_tiles as u32,
            warp_slots: cut.warp_slots as u32,
            num_chunks: cut.num_chunks as u32,
            chunks_per_block: per_block as u32,
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

/// The launches of an order: how the first one is made, and the second one if there is one.
#[derive(Debug, Clone, Copy)]
struct Launches {
    first: Launch,
    second: Option<Launch>,
    chunks_per_block: usize,
}

impl Launches {
    fn new(device: &CudaDevice, spec: &OrderSpec, cut: Cut) -> Result<Self> {
        let pitch = pitch(spec.local_experts.len());
        // The block's row, four vectors of sums and offsets, the room for sums over the block.
        let sums = pitch * size_of::<u16>() + (4 * pitch + 2 + 64) * size_of::<u32>();
        let counters = cut.threads / 32 * pitch * size_of::<u16>();
        let what = format!("num_local_experts {}", spec.local_experts.len());
        let shared = checked_shared(device, OP, &what, sums + counters)?;
        let mut first = Launch::new(cut.num_chunks, cut.threads as u32, shared);
        if cut.whole {
            first.cluster = cut.num_chunks as u32;
            return Ok(Self { first, second: None, chunks_per_block: 1 });
        }
        let chunks_per_block = cut.num_chunks.div_ceil(properties(device)?.num_multiprocessors);
        let blocks = cut.num_chunks.div_ceil(chunks_per_block);
        let second = Launch { starts_early: true, ..Launch::new(blocks, cut.threads as u32, sums) };
        Ok(Self { first, second: Some(second), chunks_per_block })
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
    let cut = Cut::new(spec.num_slots(), 1, 32, WHOLE_SLOTS_PER_WARP, pitch, properties(device)?);
    let launches = Launches::new(device, &spec, cut)?;
    let mut buffer = Buffer::default();
    let outputs = Outputs::new(&mut buffer, &spec, cut)?;
    let (storage, layout) = topk_ids.storage_and_layout();
    let stream = device.cuda_stream();
    let (ids, _ids) = slice_of::<u32>(&storage, OP, "topk_ids")?.device_ptr(&stream);
    let write = |address: &dyn Fn(Section) -> u64| {
        let arguments = outputs.arguments(&spec, cut, launches.chunks_per_block, address);
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

/// Whether the fused kernels take logits of this shape.
pub(super) fn fuses(router_logits: &Tensor, router: &Router) -> bool {
    match *router_logits.dims() {
        [num_tokens, num_experts] => {
            num_tokens > 0 && routing::row_kernel(router_logits.dtype(), num_experts, router).is_some()
        }
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
    let Some(kernel) = routing::row_kernel(storage.dtype(), num_experts, router) else {
        bail!("{OP}: num_experts {num_experts} with top_k {} is not fused with routing", spec.top_k)
    };
    let pitch = pitch(spec.local_experts.len());
    let cut = Cut::new(num_tokens, spec.top_k, 1, WHOLE_TOKENS_PER_WARP, pitch, properties(device)?);
    let launches = Launches::new(device, &spec, cut)?;
    let mut buffer = Buffer::default();
    let topk_ids = buffer.section(routing::num_slots(layout, router)?);
    let outputs = Outputs::new(&mut buffer, &spec, cut)?;
    let mut weights = None;
    let write = |address: &dyn Fn(Section) -> u64| {
        let order = outputs.arguments(&spec, cut, launches.chunks_per_block, address);
        with_map(&spec, device, order, |mut order| {
            order.topk_ids = address(topk_ids);
            weights = Some(routing::write_weights(storage, layout, router, num_valid_tokens, |mut routing| {
                routing.topk_ids = order.topk_ids;
                let arguments = RoutedArguments { routing, order };
                // SAFETY: `RoutedArguments` and `Arguments` are the parameters of the kernels; `write_weights` and the
                // sections cover what they read and write; `place` waits for the kernel before it by itself.
                unsafe {
                    launch(device, Binary::Routed, &format!("routed_{kernel}"), launches.first, arguments)?;
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
    let shared = checked_shared(device, OP, &what, (32 + num_local + 1) * size_of::<u32>())?;
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
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Properties = Properties { num_multiprocessors: 132, max_shared: 232_448, has_clusters: true };

    /// Every slot lies in the part of exactly one warp, parts are whole units, and counters hold a chunk.
    #[test]
    fn cuts_cover_all_slots() {
        for device in [H100, Properties { has_clusters: false, num_multiprocessors: 1, ..H100 }] {
            for pitch in [8, 256, 4096, 16384] {
                for (unit, grain) in [(1, 32), (1, 1), (8, 1), (22, 1), (4096, 1)] {
                    for num_units in (1..300).chain([1023, 4224, 4225, 1 << 20, (1 << 32) / unit - 1]) {
                        let cut = Cut::new(num_units, unit, grain, 64, pitch, device);
                        let warps = cut.threads / 32;
                        let chunk = warps * cut.warp_slots;
                        assert!(cut.num_chunks * chunk >= num_units * unit, "{cut:?}");
                        assert!(cut.whole || (cut.num_chunks - 1) * chunk < num_units * unit, "{cut:?}");
                        assert!(cut.warp_slots.is_multiple_of(unit), "{cut:?}");
                        assert!(chunk <= MAX_CHUNK_SLOTS || unit > 1000, "{cut:?}");
                        assert!(!cut.whole || cut.num_chunks <= if device.has_clusters { CLUSTER } else { 1 });
                    }
                }
            }
        }
    }
}
