//! Perfect logits on CUDA: the launch of `cuda/perfect_router/logits.cu`.

use super::Plan;
use super::store::OP;
use crate::cuda::{Binary, Launch, allocate, launch, slice_of};
use crate::host::checked_product;
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Device, Result, Storage, Tensor};

/// Threads of a block; each warp writes a row.
const THREADS: u32 = 256;

/// What the kernels are told; `LogitsArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct Arguments {
    logits: u64,
    slots: u64,
    cells: u64,
    num_rows: u64,
    period: u64,
    slot_period: u64,
    num_experts: u32,
    top_k: u32,
    kind: u32,
    round: u32,
    ep_size: u32,
    ep_rank: u32,
    is_saturated: u32,
    planned: u32,
    others: u32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernels' parameter.
unsafe impl DeviceRepr for Arguments {}

/// What a plan is on the device.
pub(super) struct DevicePlan {
    pub(super) kind: Kind,
    /// Of a round, `{cell, slots of the cell before it}` of each slot; of a list, the experts.
    pub(super) slots: Vec<u32>,
    /// Of a round, `{first expert, experts, slots of a round modulo experts}` of each cell.
    pub(super) cells: Vec<u32>,
}

/// Which of the plans that the source knows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// The closed form; it repeats after `slot_period` slots.
    Flat { slot_period: usize, is_saturated: bool },
    /// A round of `num_tokens`.
    Grouped { num_tokens: usize },
    /// The experts of every token.
    Listed,
}

/// The logits of the first `rows` tokens of a plan, `[rows, num_experts]`: `planned` and `others` are the bits of the two.
pub(super) fn generate<L: CudaDType + DeviceRepr>(
    plan: &Plan,
    rows: usize,
    device: &CudaDevice,
    [planned, others]: [u32; 2],
) -> Result<Tensor> {
    let num_experts = plan.num_experts();
    let len = checked_product(OP, ("num_tokens", rows), ("num_experts", num_experts))?;
    // SAFETY: the kernel writes every logit before anything reads it.
    let mut logits = unsafe { allocate::<L>(device, OP, len)? };
    if rows > 0 {
        let stream = device.cuda_stream();
        let DevicePlan { kind, slots, cells } = plan.for_device(rows)?;
        let (slots, cells) = (uploaded(slots, device)?, uploaded(cells, device)?);
        let (slots, cells) = (slots.storage_and_layout(), cells.storage_and_layout());
        let (slots, _slots) = slice_of::<u32>(&slots.0, OP, "slots")?.device_ptr(&stream);
        let (cells, _cells) = slice_of::<u32>(&cells.0, OP, "cells")?.device_ptr(&stream);
        let (address, _logits) = logits.device_ptr_mut(&stream);
        let (number, slot_period, is_saturated, round) = match kind {
            Kind::Flat { slot_period, is_saturated } => (0, slot_period, is_saturated, 1),
            Kind::Grouped { num_tokens } => (1, 1, false, num_tokens),
            Kind::Listed => (2, 1, false, 1),
        };
        let arguments = Arguments {
            logits: address,
            slots,
            cells,
            num_rows: rows as u64,
            period: plan.period() as u64,
            slot_period: slot_period as u64,
            num_experts: num_experts as u32,
            top_k: plan.top_k() as u32,
            kind: number,
            round: round as u32,
            ep_size: plan.ep_size() as u32,
            ep_rank: plan.ep_rank() as u32,
            is_saturated: u32::from(is_saturated),
            planned,
            others,
        };
        let name = if size_of::<L>() == 4 { "logits_32" } else { "logits_16" };
        let how = Launch::new(rows.div_ceil(THREADS as usize / 32), THREADS, 0);
        // SAFETY: `Arguments` is the kernel's parameter; the logits have `rows` rows of `num_experts` elements of the size in
        // the kernel's name, and the tables are those of the plan's kind; they are freed in the stream's order.
        unsafe { launch(device, Binary::PerfectRouter, name, how, arguments)? };
    }
    // Other threads, whose streams do not wait for this one's, share the buffer from here on.
    device.synchronize()?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(logits, device.clone()));
    Ok(Tensor::from_storage(storage, (rows, num_experts), BackpropOp::none(), false))
}

/// A table on the device; an empty one has one element, since nothing else can be allocated.
fn uploaded(mut table: Vec<u32>, device: &CudaDevice) -> Result<Tensor> {
    if table.is_empty() {
        table.push(0);
    }
    Tensor::new(table.as_slice(), &Device::Cuda(device.clone()))
}
