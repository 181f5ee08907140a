//! What a block does on CUDA besides the work of the other rooms: the launches of `cuda/block/block.cu`.

use super::OP;
use crate::cuda::{Binary, Launch, launch, slice_of};
use crate::host::checked_product;
use crate::routing::Routing;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Result, Shape, Storage, Tensor};

const THREADS: u32 = 256;

/// `CountArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct CountArguments {
    expert_counts: u64,
    slots: u64,
    num_experts: u64,
}

/// `SharedArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct SharedArguments {
    topk_ids: u64,
    ids: u64,
    weights: u64,
    num_slots: u64,
    top_k: u32,
    num_shared: u32,
}

// SAFETY: device addresses and plain numbers, in the C layout of the kernel's parameter.
unsafe impl DeviceRepr for CountArguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for SharedArguments {}

/// Adds `expert_counts` u32 to `slots` i64, both contiguous and `[num_experts]`, in place.
pub(super) fn count(slots: &Tensor, expert_counts: &Tensor, device: &CudaDevice) -> Result<()> {
    let num_experts = slots.elem_count();
    let stream = device.cuda_stream();
    let (to, from) = (slots.storage_and_layout(), expert_counts.storage_and_layout());
    let (to_first, from_first) = (to.1.start_offset(), from.1.start_offset());
    let (slots, _slots) = slice_of::<i64>(&to.0, OP, "load")?.device_ptr(&stream);
    let (counts, _counts) = slice_of::<u32>(&from.0, OP, "expert_counts")?.device_ptr(&stream);
    let arguments = CountArguments {
        expert_counts: counts + (from_first * size_of::<u32>()) as u64,
        slots: slots + (to_first * size_of::<i64>()) as u64,
        num_experts: num_experts as u64,
    };
    let how = Launch::new(num_experts.div_ceil(THREADS as usize), THREADS, 0);
    // SAFETY: `CountArguments` is the kernel's parameter. An order of all experts has a count for each of the `num_experts`
    // slots. The kernel adds atomically, so that whoever else counts does not matter; who reads waits for the stream.
    unsafe { launch(device, Binary::Block, "count_slots", how, arguments) }
}

/// The routing of every token to `num_shared` experts with weight 1; of padding, whose `topk_ids` are no expert, to none.
pub(super) fn everyone(topk_ids: &Tensor, num_shared: usize, device: &CudaDevice) -> Result<Routing> {
    let (num_tokens, top_k) = topk_ids.dims2()?;
    let num_slots = checked_product(OP, ("num_tokens", num_tokens), ("shared experts", num_shared))?;
    // SAFETY: the kernel writes every element before anything reads it.
    let (mut ids, mut weights) =
        unsafe { (device.alloc::<u32>(num_slots.max(1))?, device.alloc::<f32>(num_slots.max(1))?) };
    if num_slots > 0 {
        let stream = device.cuda_stream();
        let topk_ids = topk_ids.contiguous()?;
        let (storage, layout) = topk_ids.storage_and_layout();
        let (first, _topk_ids) = slice_of::<u32>(&storage, OP, "topk_ids")?.device_ptr(&stream);
        let (ids_address, _ids) = ids.device_ptr_mut(&stream);
        let (weights_address, _weights) = weights.device_ptr_mut(&stream);
        let arguments = SharedArguments {
            topk_ids: first + (layout.start_offset() * size_of::<u32>()) as u64,
            ids: ids_address,
            weights: weights_address,
            num_slots: num_slots as u64,
            top_k: top_k as u32,
            num_shared: num_shared as u32,
        };
        let how = Launch::new(num_slots.div_ceil(THREADS as usize), THREADS, 0);
        // SAFETY: `SharedArguments` is the kernel's parameter; `topk_ids` has `top_k` ids for each token, ids and weights have
        // `num_slots` elements; all are freed in the stream's order.
        unsafe { launch(device, Binary::Block, "shared_slots", how, arguments)? };
    }
    let shape = (num_tokens, num_shared);
    Ok(Routing { topk_ids: tensor(ids, shape, device), topk_weights: tensor(weights, shape, device) })
}

fn tensor<T: CudaDType>(values: CudaSlice<T>, shape: impl Into<Shape>, device: &CudaDevice) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
