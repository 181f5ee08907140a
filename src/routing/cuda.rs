//! Routing on CUDA: the launches of `cuda/routing/topk.cu`, which says how.

use super::{OP, Router, RoutingMethod};
use crate::cuda::{Binary, Launch, launch};
use crate::host::checked_product;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

/// Threads of a block of the kernels that give a warp to each token.
const ROW_THREADS: u32 = 128;
/// The most experts, and slots, that a warp keeps in registers.
const MAX_ROW_EXPERTS: usize = 1024;
const MAX_ROW_SLOTS: usize = 32;
/// Threads of a block of the kernels that give a block to each token, and the shared memory that it can have.
const ANY_THREADS: u32 = 256;
const MAX_SHARED: usize = 96 * 1024;
/// Blocks that walk over the tokens in those kernels.
const MAX_ANY_BLOCKS: usize = 1 << 16;

/// The kernel's parameter; `Arguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct Arguments {
    logits: u64,
    stride_token: i64,
    stride_expert: i64,
    num_tokens: u64,
    num_experts: u32,
    top_k: u32,
    bias: u64,
    num_valid: u64,
    topk_ids: u64,
    topk_weights: u64,
    score: i32,
    weight: i32,
    factor: f32,
    num_groups: u32,
    topk_group: u32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernel's parameter.
unsafe impl DeviceRepr for Arguments {}

/// The numbers by which the kernels know what a method is made of, and the name of its score.
fn parts(method: RoutingMethod) -> (i32, i32, &'static str) {
    match method {
        RoutingMethod::Default => (0, 0, "logit"),
        RoutingMethod::Renormalize | RoutingMethod::RenormalizeNaive => (0, 1, "logit"),
        RoutingMethod::DeepSeekV3 { .. } | RoutingMethod::MiniMax2 => (1, 2, "sigmoid"),
        RoutingMethod::Llama4 => (0, 3, "logit"),
        RoutingMethod::SigmoidRenorm => (0, 4, "logit"),
        RoutingMethod::DeepSeekV4 { .. } => (2, 5, "root_softplus"),
    }
}

/// Routes the logits; returns the ids as a tensor and the weights as storage, both `[num_tokens, top_k]`.
pub(super) fn route(
    storage: &CudaStorage,
    layout: &Layout,
    router: &Router,
    num_valid_tokens: Option<&Tensor>,
) -> Result<(Tensor, CudaStorage)> {
    match storage.dtype() {
        DType::F32 => route_as::<f32>(storage, layout, router, num_valid_tokens, "f32"),
        DType::F16 => route_as::<f16>(storage, layout, router, num_valid_tokens, "f16"),
        DType::BF16 => route_as::<bf16>(storage, layout, router, num_valid_tokens, "bf16"),
        dtype => bail!("{OP}: router_logits has dtype {dtype:?}, expected f32, f16 or bf16"),
    }
}

fn route_as<T: CudaDType>(
    storage: &CudaStorage,
    layout: &Layout,
    router: &Router,
    num_valid_tokens: Option<&Tensor>,
    dtype: &str,
) -> Result<(Tensor, CudaStorage)> {
    let device = storage.device();
    let stream = device.cuda_stream();
    let (num_tokens, num_experts) = (layout.dims()[0], layout.dims()[1]);
    // A broadcast view may stand for more logits than 64 bits count.
    checked_product(OP, ("num_tokens", num_tokens), ("num_experts", num_experts))?;
    let num_slots = checked_product(OP, ("num_tokens", num_tokens), ("top_k", router.top_k))?;
    // SAFETY: the kernel writes every slot, of padding tokens too, before anything reads it.
    let (mut ids, mut weights) = unsafe { (device.alloc::<u32>(num_slots)?, device.alloc::<f32>(num_slots)?) };
    if num_tokens > 0 {
        let bias = match &router.selection_bias {
            Some(bias) => Some(bias.on(&candle_core::Device::Cuda(device.clone()))?),
            None => None,
        };
        let bias = bias.as_ref().map(Tensor::storage_and_layout);
        let bias = match &bias {
            Some((storage, _)) => cuda_slice::<f32>(storage, "selection bias")?,
            None => None,
        };
        let logits = storage.as_cuda_slice::<T>()?;
        let num_valid = num_valid_tokens.map(Tensor::storage_and_layout);
        let num_valid = match &num_valid {
            Some((storage, layout)) => {
                cuda_slice::<u32>(storage, "num_valid_tokens")?.map(|slice| (slice, layout.start_offset()))
            }
            None => None,
        };
        let (logits_ptr, _logits) = logits.device_ptr(&stream);
        let (ids_ptr, _ids) = ids.device_ptr_mut(&stream);
        let (weights_ptr, _weights) = weights.device_ptr_mut(&stream);
        let bias_ptr = bias.map(|bias| bias.device_ptr(&stream));
        let valid_ptr = num_valid.as_ref().map(|(slice, offset)| (slice.device_ptr(&stream), *offset));
        let groups = router.method.groups();
        let (score, weight, score_name) = parts(router.method);
        let arguments = Arguments {
            logits: logits_ptr + (layout.start_offset() * size_of::<T>()) as u64,
            stride_token: layout.stride()[0] as i64,
            stride_expert: layout.stride()[1] as i64,
            num_tokens: num_tokens as u64,
            num_experts: num_experts as u32,
            top_k: router.top_k as u32,
            bias: bias_ptr.as_ref().map_or(0, |(pointer, _)| *pointer),
            num_valid: valid_ptr
                .as_ref()
                .map_or(0, |((pointer, _), offset)| pointer + (offset * size_of::<u32>()) as u64),
            topk_ids: ids_ptr,
            topk_weights: weights_ptr,
            score,
            weight,
            factor: router.method.routed_scaling_factor(),
            num_groups: groups.num_groups as u32,
            topk_group: groups.topk_group as u32,
        };
        let (name, how) = match row_width(num_experts, router) {
            Some(width) => {
                let rows = ROW_THREADS as usize / 32;
                let how = Launch { blocks: num_tokens.div_ceil(rows), threads: ROW_THREADS, shared: 0 };
                (format!("row_{dtype}_{score_name}_{width}"), how)
            }
            None => {
                let shared = shared_of(num_experts, router)?;
                let how = Launch { blocks: num_tokens.min(MAX_ANY_BLOCKS), threads: ANY_THREADS, shared };
                (format!("any_{dtype}_{score_name}"), how)
            }
        };
        // SAFETY: `Arguments` is the kernel's parameter; logits cover `num_tokens` rows of `num_experts` with these strides,
        // since the layout says so; ids and weights have `num_slots` elements, the bias `num_experts`; all of them are
        // borrowed until the launch is on the stream, and freed in the stream's order.
        unsafe { launch(device, Binary::Routing, &name, how, arguments)? };
    }
    let shape = Shape::from((num_tokens, router.top_k));
    let ids = Storage::Cuda(CudaStorage::wrap_cuda_slice(ids, device.clone()));
    let ids = Tensor::from_storage(ids, shape, BackpropOp::none(), false);
    Ok((ids, CudaStorage::wrap_cuda_slice(weights, device.clone())))
}

fn cuda_slice<'a, T: CudaDType>(storage: &'a Storage, argument: &str) -> Result<Option<&'a CudaSlice<T>>> {
    match storage {
        Storage::Cuda(storage) => storage.as_cuda_slice::<T>().map(Some),
        _ => bail!("{OP}: {argument} is not on the device of router_logits"),
    }
}

/// The experts that each lane keeps, where a warp can keep a row.
fn row_width(num_experts: usize, router: &Router) -> Option<usize> {
    if num_experts > MAX_ROW_EXPERTS || router.top_k > MAX_ROW_SLOTS {
        return None;
    }
    let width = num_experts.div_ceil(32).next_power_of_two();
    let groups = router.method.groups();
    if groups.is_limit() {
        // Groups must be whole lanes, a power of two of them, and fill the warp.
        let size = num_experts / groups.num_groups;
        let fits = num_experts == 32 * width && size.is_multiple_of(width) && (size / width).is_power_of_two();
        return fits.then_some(width);
    }
    Some(width)
}

/// Shared memory of the general kernel: keys, groups, chosen logits.
fn shared_of(num_experts: usize, router: &Router) -> Result<u32> {
    let words = num_experts.saturating_add(router.method.groups().num_groups).saturating_add(2 * router.top_k);
    let bytes = words.saturating_mul(4).saturating_add(512);
    if bytes > MAX_SHARED {
        bail!(
            "{OP}: num_experts {num_experts} with top_k {} needs {bytes} bytes of shared memory on CUDA, expected at most \
             {MAX_SHARED}",
            router.top_k
        )
    }
    Ok(bytes as u32)
}
