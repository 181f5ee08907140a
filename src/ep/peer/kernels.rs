//! The launches of `cuda/ep/peer.cu`.

use super::super::placement::Placement;
use super::links::MAX_RANKS;
use crate::cuda::{Binary, Launch, launch, properties};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, DType, Result, bail};

const OP: &str = "peer";
/// `kThreads` and `kThreadsOfRows` of the source, and threads of a multiprocessor.
const MAX_THREADS: usize = 1024;
const MAX_THREADS_OF_ROWS: usize = 512;
const MULTIPROCESSOR_THREADS: usize = 2048;
/// Bytes that a thread moves at once.
const UNIT: usize = 16;

/// `Group` of the source.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Group {
    pub(super) mailboxes: [u64; MAX_RANKS],
    pub(super) lifeline: u64,
    pub(super) rank: u32,
    pub(super) num_ranks: u32,
}

/// `Owners` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Owners {
    first: [u32; MAX_RANKS + 1],
}

impl Owners {
    pub(super) fn new(placement: &Placement) -> Result<Self> {
        let mut first = [u32::MAX; MAX_RANKS + 1];
        for rank in 0..placement.ep_size() {
            let local = placement.local(rank)?;
            let (Some(start), Ok(begin), Ok(end)) =
                (first.get_mut(rank..rank + 2), u32::try_from(local.start), u32::try_from(local.end))
            else {
                bail!("{OP}: the placement is of {} ranks, expected at most {MAX_RANKS}", placement.ep_size())
            };
            start.copy_from_slice(&[begin, end]);
        }
        Ok(Self { first })
    }
}

/// `DispatchArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct DispatchArguments {
    pub(super) group: Group,
    pub(super) owners: Owners,
    pub(super) hidden: u64,
    pub(super) topk_ids: u64,
    pub(super) topk_weights: u64,
    pub(super) to_hidden: [u64; MAX_RANKS],
    pub(super) to_topk_ids: [u64; MAX_RANKS],
    pub(super) to_topk_weights: [u64; MAX_RANKS],
    pub(super) num_tokens: u32,
    pub(super) top_k: u32,
    pub(super) row_units: u32,
    pub(super) waits: u32,
}

/// `CombineArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct CombineArguments {
    pub(super) group: Group,
    pub(super) owners: Owners,
    pub(super) rows: [u64; MAX_RANKS],
    pub(super) slot_rank: [u64; MAX_RANKS],
    pub(super) topk_ids: u64,
    pub(super) topk_weights: u64,
    pub(super) sums: u64,
    pub(super) num_tokens: u32,
    pub(super) top_k: u32,
    pub(super) hidden_size: u32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernels' parameters.
unsafe impl DeviceRepr for Group {}
// SAFETY: as above.
unsafe impl DeviceRepr for DispatchArguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for CombineArguments {}

/// What is pulled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pulled {
    Sums,
    Rows,
}

/// A block for each token, as many as are there at once.
fn blocks(device: &CudaDevice, num_tokens: u32, (row_units, max_threads): (usize, usize)) -> Result<Launch> {
    let threads = row_units.next_multiple_of(32).clamp(64, max_threads);
    let resident = properties(device)?.num_multiprocessors * (MULTIPROCESSOR_THREADS / threads);
    let blocks = (num_tokens as usize).clamp(1, resident.max(1));
    Ok(Launch { starts_early: true, ..Launch::new(blocks, threads as u32, 0) })
}

/// Pushes tokens whose rows have `row_bytes`.
///
/// # Safety
/// The addresses are those of the source, with room for this rank's tokens at each rank, and stay; all ranks of the group launch
/// the same.
pub(super) unsafe fn push(device: &CudaDevice, mut arguments: DispatchArguments, row_bytes: usize) -> Result<()> {
    // Rows of a room begin at multiples of their bytes, behind a start that is at one of 16.
    let fits = |unit: &usize| row_bytes.is_multiple_of(*unit) && arguments.hidden.is_multiple_of(*unit as u64);
    let Some(unit) = [UNIT, 4, 2].into_iter().find(fits) else {
        bail!("{OP}: a row has {row_bytes} bytes, expected an even number")
    };
    let row_units = row_bytes / unit;
    arguments.row_units = row_units as u32;
    let how = blocks(device, arguments.num_tokens, (row_units, MAX_THREADS))?;
    // SAFETY: the caller's promise; the kernel waits for the one before it.
    unsafe { launch(device, Binary::Peer, &format!("peer_dispatch_{unit}"), how, arguments) }
}

/// Pulls rows in `from` and puts sums in `to`.
///
/// # Safety
/// As [`push`]; `sums` has room for this rank's tokens.
pub(super) unsafe fn pull(
    device: &CudaDevice,
    arguments: CombineArguments,
    what: Pulled,
    (from, to): (DType, DType),
) -> Result<()> {
    let (what, max_threads) = match what {
        Pulled::Sums => ("sums", MAX_THREADS),
        Pulled::Rows => ("rows", MAX_THREADS_OF_ROWS),
    };
    let width = UNIT / from.size_in_bytes();
    let width = if (arguments.hidden_size as usize).is_multiple_of(width) { width } else { 1 };
    let columns = (arguments.hidden_size as usize).div_ceil(width);
    let how = blocks(device, arguments.num_tokens, (columns, max_threads))?;
    let name = format!("peer_{what}_{}_{}_{width}", from.as_str(), to.as_str());
    // SAFETY: the caller's promise; the kernel waits for the one before it.
    unsafe { launch(device, Binary::Peer, &name, how, arguments) }
}

/// Meets the ranks.
///
/// # Safety
/// All ranks of the group launch it.
pub(super) unsafe fn meet(device: &CudaDevice, group: Group) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { wait(device, "peer_meet", group) }
}

/// Waits for the ranks where [`push`] did not.
///
/// # Safety
/// All ranks of the group push.
pub(super) unsafe fn arrive(device: &CudaDevice, group: Group) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { wait(device, "peer_arrive", group) }
}

/// # Safety
/// That of the kernel.
unsafe fn wait(device: &CudaDevice, kernel: &str, group: Group) -> Result<()> {
    let how = Launch { starts_early: true, ..Launch::new(1, 32, 0) };
    // SAFETY: the caller's promise; the kernel waits for the one before it.
    unsafe { launch(device, Binary::Peer, kernel, how, group) }
}
