//! The launches of `cuda/experts/single.cu`: a token, or few slots, each by itself.

use super::super::Experts;
use super::{Arguments, Call, Home, Weights};
use crate::cuda::{Binary, Launch, Properties, launch};
use crate::order::Batch;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Result};

/// Teams of a block, its warps and its features, quads that a warp has under way, bytes of a quad, and shared memory that the kernel
/// has beside that of the launch.
const TEAMS: usize = 3;
const WARPS: usize = TEAMS * 5;
const FEATURES: usize = TEAMS * 32;
const QUADS: usize = 2;
const QUAD_BYTES: usize = 2176;
const STATIC_SHARED: usize = 4096;
/// Of a block there that adds up parts: threads and columns.
const PART_THREADS: u32 = 512;
const PART_COLUMNS: usize = 32;
/// Slots of a batch up to which each is worked on by itself, where the device has a multiprocessor for each chunk. They are in
/// fewer tiles than a warp has lanes.
const MAX_SLOTS: usize = 16;

/// `SingleArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct SingleArguments {
    gate_up: Arguments,
    down: Arguments,
    slot_rank: u64,
    chunks: u32,
}

/// `PartsArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct PartsArguments {
    parts: u64,
    topk_weights: u64,
    slot_rank: u64,
    output: u64,
    chunks: u32,
    top_k: u32,
    hidden_size: u32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernels' parameters.
unsafe impl DeviceRepr for SingleArguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for PartsArguments {}

/// Whether the kernels take `num_slots` slots, a part of `batch`, of experts in MXFP4.
pub(super) fn fits(experts: &Experts, num_slots: usize, batch: Batch, device: Properties) -> bool {
    num_slots.max(batch.num_slots) <= MAX_SLOTS
        && batch.num_slots * chunks(experts) <= device.num_multiprocessors
        && shared(experts).is_some_and(|shared| shared + STATIC_SHARED <= device.max_shared)
}

/// Chunks of the intermediate features of a place.
pub(super) fn chunks(experts: &Experts) -> usize {
    experts.intermediate_size().div_ceil(FEATURES)
}

/// Bytes of shared memory of its blocks; `None` if there is nothing to multiply.
fn shared(experts: &Experts) -> Option<usize> {
    let (hidden_size, intermediate_size) = (experts.hidden_size(), experts.intermediate_size());
    let token = hidden_size * size_of::<u16>();
    let sums = (1 + TEAMS) * hidden_size * size_of::<f32>();
    let rings = WARPS * QUADS * QUAD_BYTES;
    (hidden_size > 0 && intermediate_size > 0).then_some(token + sums + rings)
}

/// The launch of its first kernel.
fn single_launch(experts: &Experts, num_slots: usize) -> Launch {
    let shared = shared(experts).unwrap_or_default();
    Launch { starts_early: true, ..Launch::new(num_slots * chunks(experts), 32 * WARPS as u32, shared) }
}

/// The launch of the one that adds up the parts of `count` tokens, or slots.
fn parts_launch(count: usize, hidden_size: usize) -> Launch {
    Launch { starts_early: true, ..Launch::new(count * hidden_size.div_ceil(PART_COLUMNS), PART_THREADS, 0) }
}

impl Call<'_> {
    /// Puts `rows`, float32 `[num_slots, hidden_size]`, on the stream, and the `parts` that they are made of.
    pub(super) fn single_rows(&self, parts: u64, rows: u64) -> Result<()> {
        self.make_parts(parts)?;
        let arguments = PartsArguments { output: rows, top_k: 1, ..self.parts(parts)? };
        self.add_parts("single_rows", self.num_slots, arguments)
    }

    /// The same with weighted sums in `dtype`.
    pub(super) fn single_sums(&self, home: &Home<'_>, parts: u64, dtype: DType, sums: u64) -> Result<()> {
        self.make_parts(parts)?;
        let topk_weights = home.topk_weights.address()?;
        let arguments = PartsArguments { topk_weights, output: sums, ..self.parts(parts)? };
        self.add_parts(&format!("single_sums_{}", dtype.as_str()), home.num_tokens, arguments)
    }

    fn make_parts(&self, parts: u64) -> Result<()> {
        let experts = self.experts;
        let weights = (Weights::new(&experts.gate_up, self.device)?, Weights::new(&experts.down, self.device)?);
        let arguments = SingleArguments {
            gate_up: self.gate_up(&weights.0, 0)?,
            down: self.down(&weights.1, 0, parts)?,
            slot_rank: self.slot_rank.address()?,
            chunks: chunks(experts) as u32,
        };
        let how = single_launch(experts, self.num_slots);
        // SAFETY: `SingleArguments` is the kernel's parameter; `parts` has `chunks` rows for each slot, and the rest is as in
        // `project`.
        unsafe { launch(self.device, Binary::ExpertsSingle, "single", how, arguments) }
    }

    fn parts(&self, parts: u64) -> Result<PartsArguments> {
        Ok(PartsArguments {
            parts,
            topk_weights: 0,
            slot_rank: self.slot_rank.address()?,
            output: 0,
            chunks: chunks(self.experts) as u32,
            top_k: self.top_k as u32,
            hidden_size: self.experts.hidden_size() as u32,
        })
    }

    /// Adds up parts to rows or sums, `count` of them.
    fn add_parts(&self, kernel: &str, count: usize, arguments: PartsArguments) -> Result<()> {
        let how = parts_launch(count, self.experts.hidden_size());
        // SAFETY: `PartsArguments` is the kernel's parameter; ranks of the order are below its slots, which have parts, the output
        // has `count` rows, and the kernel waits for the one in front of it.
        unsafe { launch(self.device, Binary::ExpertsSingle, kernel, how, arguments) }
    }
}
