//! Routing on CUDA: the launches of `cuda/routing/topk.cu`, which says how.

use super::{OP, Router, RoutingMethod};
use crate::cuda::{Binary, Buffer, Launch, Section, allocate, checked_shared, launch, slice_of};
use crate::host::checked_product;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};

/// Threads of a block of the kernels that give a warp to each token.
const ROW_THREADS: u32 = 128;
/// The most experts, and slots, that a warp keeps in registers.
const MAX_ROW_EXPERTS: usize = 1024;
const MAX_ROW_SLOTS: usize = 32;
/// The most slots, and experts, of the kernels that give a warp to several tokens.
const MAX_SHARED_SLOTS: usize = 8;
const MAX_SHARED_EXPERTS: usize = 512;
/// Tokens from which on a warp for each token counts its instructions, and not their delay.
const MANY_TOKENS: usize = 1024;
/// Threads of a block of the kernels that give a block to each token.
const ANY_THREADS: u32 = 256;
/// Blocks that walk over the tokens in those kernels.
const MAX_ANY_BLOCKS: usize = 1 << 16;

/// What the kernels are told; `RoutingArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Arguments {
    logits: u64,
    stride_token: i64,
    stride_expert: i64,
    num_tokens: u64,
    num_experts: u32,
    top_k: u32,
    bias: u64,
    num_valid: u64,
    pub(crate) topk_ids: u64,
    topk_weights: u64,
    score: i32,
    weight: i32,
    factor: f32,
    num_groups: u32,
    topk_group: u32,
    group_bits: u32,
    many: u32,
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
    let device = storage.device();
    let (num_tokens, num_experts) = (layout.dims()[0], layout.dims()[1]);
    let mut buffer = Buffer::default();
    let ids = buffer.section(num_slots(layout, router)?);
    let mut weights = None;
    let write = |address: &dyn Fn(Section) -> u64| {
        weights = Some(write_weights(storage, layout, router, num_valid_tokens, |mut arguments| {
            arguments.topk_ids = address(ids);
            let (name, how) = match row_kernel(storage.dtype(), num_tokens, num_experts, router, Place::Alone) {
                Some(RowKernel { name, warp_tokens }) => {
                    let blocks = num_tokens.div_ceil(ROW_THREADS as usize / 32 * warp_tokens);
                    (name, Launch::new(blocks, ROW_THREADS, 0))
                }
                None => {
                    let shared = shared_of_any(device, num_experts, router)?;
                    let how = Launch::new(num_tokens.min(MAX_ANY_BLOCKS), ANY_THREADS, shared);
                    (format!("any_{}", kind(storage.dtype(), router)), how)
                }
            };
            // SAFETY: `Arguments` is the kernel's parameter, and `write_weights` and the section of the ids cover what the
            // kernel reads and writes; all of it is freed in the stream's order.
            unsafe { launch(device, Binary::Routing, &name, how, arguments) }
        })?);
        Ok(())
    };
    // SAFETY: the kernel writes every slot, those of padding too.
    let sections = unsafe { buffer.fill(device, OP, write)? };
    let Some(weights) = weights else { bail!("{OP}: nothing was launched") };
    Ok((sections.tensor(ids, (num_tokens, router.top_k))?, weights))
}

/// Slots of the batch; checks that logits and slots can be counted.
pub(crate) fn num_slots(layout: &Layout, router: &Router) -> Result<usize> {
    let (num_tokens, num_experts) = (layout.dims()[0], layout.dims()[1]);
    // A broadcast view may stand for more logits than 64 bits count.
    checked_product(OP, ("num_tokens", num_tokens), ("num_experts", num_experts))?;
    checked_product(OP, ("num_tokens", num_tokens), ("top_k", router.top_k))
}

/// Allocates the weights and has `launch` write them. Its arguments lack `topk_ids` only; nothing is launched for no tokens.
pub(crate) fn write_weights(
    storage: &CudaStorage,
    layout: &Layout,
    router: &Router,
    num_valid_tokens: Option<&Tensor>,
    launch: impl FnOnce(Arguments) -> Result<()>,
) -> Result<CudaStorage> {
    let (device, stream) = (storage.device(), storage.device().cuda_stream());
    let num_slots = num_slots(layout, router)?;
    // SAFETY: the kernel writes every slot, of padding tokens too, before anything reads it.
    let mut weights = unsafe { allocate::<f32>(device, OP, num_slots)? };
    if num_slots > 0 {
        let (logits, _logits) = match storage.dtype() {
            DType::F32 => device_address(storage.as_cuda_slice::<f32>()?, &stream),
            DType::F16 => device_address(storage.as_cuda_slice::<f16>()?, &stream),
            DType::BF16 => device_address(storage.as_cuda_slice::<bf16>()?, &stream),
            dtype => bail!("{OP}: router_logits has dtype {dtype:?}, expected f32, f16 or bf16"),
        };
        let bias = router.selection_bias.as_ref().map(|bias| bias.on(device)).transpose()?;
        let bias = bias.as_ref().map(Tensor::storage_and_layout);
        let bias = match &bias {
            Some((storage, _)) => Some(slice_of::<f32>(storage, OP, "selection bias")?.device_ptr(&stream)),
            None => None,
        };
        let num_valid = num_valid_tokens.map(Tensor::storage_and_layout);
        let num_valid = match &num_valid {
            Some((storage, layout)) => {
                let slice = slice_of::<u32>(storage, OP, "num_valid_tokens")?;
                Some((slice.device_ptr(&stream), (layout.start_offset() * size_of::<u32>()) as u64))
            }
            None => None,
        };
        let (weights, _weights) = weights.device_ptr_mut(&stream);
        let groups = router.method.groups();
        let (score, weight, _) = parts(router.method);
        launch(Arguments {
            logits: logits + (layout.start_offset() * storage.dtype().size_in_bytes()) as u64,
            stride_token: layout.stride()[0] as i64,
            stride_expert: layout.stride()[1] as i64,
            num_tokens: layout.dims()[0] as u64,
            num_experts: layout.dims()[1] as u32,
            top_k: router.top_k as u32,
            bias: bias.as_ref().map_or(0, |(address, _)| *address),
            num_valid: num_valid.as_ref().map_or(0, |((address, _), offset)| address + offset),
            topk_ids: 0,
            topk_weights: weights,
            score,
            weight,
            factor: router.method.routed_scaling_factor(),
            num_groups: groups.num_groups as u32,
            topk_group: groups.topk_group as u32,
            group_bits: (layout.dims()[1] / groups.num_groups.max(1)).max(1).ilog2(),
            many: u32::from(layout.dims()[0] >= MANY_TOKENS),
        })?;
    }
    Ok(CudaStorage::wrap_cuda_slice(weights, device.clone()))
}

/// What the kernels of the gradient are told; `BackwardArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct BackwardArguments {
    logits: u64,
    topk_ids: u64,
    topk_weights: u64,
    grad_weights: u64,
    grad_logits: u64,
    stride_token: i64,
    stride_expert: i64,
    num_tokens: u64,
    num_experts: u32,
    top_k: u32,
    weight: i32,
    factor: f32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernels' parameter.
unsafe impl DeviceRepr for BackwardArguments {}

/// The gradient of the logits, contiguous and in their dtype, from that of the weights.
pub(super) fn backward(
    device: &CudaDevice,
    router: &Router,
    logits: &Tensor,
    topk_ids: &Tensor,
    topk_weights: &Tensor,
    grad: &Tensor,
) -> Result<Tensor> {
    match logits.dtype() {
        DType::F16 => backward_as::<f16>(device, router, logits, topk_ids, topk_weights, grad),
        DType::BF16 => backward_as::<bf16>(device, router, logits, topk_ids, topk_weights, grad),
        _ => backward_as::<f32>(device, router, logits, topk_ids, topk_weights, grad),
    }
}

fn backward_as<L: CudaDType + DeviceRepr>(
    device: &CudaDevice,
    router: &Router,
    logits: &Tensor,
    topk_ids: &Tensor,
    topk_weights: &Tensor,
    grad: &Tensor,
) -> Result<Tensor> {
    let (num_tokens, num_experts) = logits.dims2()?;
    // SAFETY: the kernel writes every element before anything reads it.
    let mut grad_logits = unsafe { allocate::<L>(device, OP, logits.elem_count())? };
    if num_tokens > 0 {
        let stream = device.cuda_stream();
        let (topk_ids, topk_weights) = (topk_ids.contiguous()?, topk_weights.contiguous()?);
        let grad = grad.to_dtype(DType::F32)?.contiguous()?;
        let (ids, weights, grad) =
            (topk_ids.storage_and_layout(), topk_weights.storage_and_layout(), grad.storage_and_layout());
        let dtype = logits.dtype();
        let (logits, layout) = logits.storage_and_layout();
        let offset = |layout: &Layout, size: usize| (layout.start_offset() * size) as u64;
        let (ids_ptr, _ids) = slice_of::<u32>(&ids.0, OP, "topk_ids")?.device_ptr(&stream);
        let (weights_ptr, _weights) = slice_of::<f32>(&weights.0, OP, "topk_weights")?.device_ptr(&stream);
        let (grad_ptr, _grad) = slice_of::<f32>(&grad.0, OP, "the gradient")?.device_ptr(&stream);
        let (logits_ptr, _logits) = slice_of::<L>(&logits, OP, "router_logits")?.device_ptr(&stream);
        let (grad_logits, _grad_logits) = grad_logits.device_ptr_mut(&stream);
        let arguments = BackwardArguments {
            logits: logits_ptr + offset(layout, size_of::<L>()),
            topk_ids: ids_ptr + offset(ids.1, size_of::<u32>()),
            topk_weights: weights_ptr + offset(weights.1, size_of::<f32>()),
            grad_weights: grad_ptr + offset(grad.1, size_of::<f32>()),
            grad_logits,
            stride_token: layout.stride()[0] as i64,
            stride_expert: layout.stride()[1] as i64,
            num_tokens: num_tokens as u64,
            num_experts: num_experts as u32,
            top_k: router.top_k as u32,
            weight: parts(router.method).1,
            factor: router.method.routed_scaling_factor(),
        };
        let how = Launch::new(num_tokens.div_ceil(ROW_THREADS as usize / 32), ROW_THREADS, 0);
        let name = format!("backward_{}", dtype.as_str());
        // SAFETY: `BackwardArguments` is the kernel's parameter; logits and their gradient have the shape that it is told,
        // the other three are contiguous with `num_tokens` rows of `top_k`.
        unsafe { launch(device, Binary::RoutingBackward, &name, how, arguments)? };
    }
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(grad_logits, device.clone()));
    Ok(Tensor::from_storage(storage, (num_tokens, num_experts), BackpropOp::none(), false))
}

fn device_address<'a, T>(slice: &'a CudaSlice<T>, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
    slice.device_ptr(stream)
}

/// Dtype and score in the names of kernels.
fn kind(dtype: DType, router: &Router) -> String {
    format!("{}_{}", dtype.as_str(), parts(router.method).2)
}

/// A kernel that keeps rows in registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowKernel {
    pub(crate) name: String,
    /// Tokens that a warp routes at once.
    pub(crate) warp_tokens: usize,
}

/// Where tokens are routed, which says what is fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a launch of its own: few tokens have the whole device.
    Alone,
    /// In the blocks that order them: a block routes up to 16 tokens at once where a warp takes one.
    Ordered,
}

/// The kernel that routes such rows, if they fit registers; where they are ordered, if that is faster than to route them alone.
pub(crate) fn row_kernel(
    dtype: DType,
    num_tokens: usize,
    num_experts: usize,
    router: &Router,
    place: Place,
) -> Option<RowKernel> {
    let shared = merge_kernel(dtype, num_tokens, num_experts, router, place);
    shared.or_else(|| threshold_kernel(dtype, num_tokens, num_experts, router, place)).or_else(|| {
        // A warp for each token is slow where only a few multiprocessors work.
        let most = match (num_experts, compares_logits(router.method)) {
            (0..=128, _) | (129..=256, true) => 16,
            (129..=256, false) | (_, true) => 4,
            _ => 0,
        };
        if place == Place::Ordered && num_tokens > most {
            return None;
        }
        let width = row_width(num_experts, router)?;
        Some(RowKernel { name: format!("row_{}_{width}", kind(dtype, router)), warp_tokens: 1 })
    })
}

/// Whether a method compares the logits themselves, and no scores of them.
fn compares_logits(method: RoutingMethod) -> bool {
    parts(method).2 == "logit"
}

/// Whether keys of 16 bits say which logits are chosen.
fn has_narrow_keys(dtype: DType, method: RoutingMethod) -> bool {
    matches!(dtype, DType::F16 | DType::BF16) && compares_logits(method)
}

/// Whether a row of such a router fits the kernels of several tokens per warp. Default's denominator takes all logits.
fn may_share_warp(num_experts: usize, router: &Router) -> bool {
    num_experts <= MAX_SHARED_EXPERTS && router.top_k <= MAX_SHARED_SLOTS && router.method != RoutingMethod::Default
}

/// Of cuda/routing/merge.cuh, where it is faster than a warp for each token.
fn merge_kernel(
    dtype: DType,
    num_tokens: usize,
    num_experts: usize,
    router: &Router,
    place: Place,
) -> Option<RowKernel> {
    if !has_narrow_keys(dtype, router.method) || !may_share_warp(num_experts, router) {
        return None;
    }
    let slots = if router.top_k <= 4 && num_experts <= 256 { 4 } else { 8 };
    let lanes = match (num_experts, slots) {
        (0..=128, 4) => 4,
        (0..=256, _) => 8,
        _ => 16,
    };
    // With few tokens a warp is reduced a few times sooner than lists are merged, unless they are short, or a lane of the
    // warp has more than 8 experts. Two tokens of a warp are many steps for the few blocks that order them.
    let gains = match place {
        Place::Alone => num_tokens >= 256 || lanes == 4 && num_experts <= 64 || num_experts > 256,
        Place::Ordered => {
            num_tokens >= 256 || if lanes == 16 { num_tokens <= 32 } else { lanes == 4 || num_tokens > 4 }
        }
    };
    if !gains {
        return None;
    }
    let chunks = num_experts.div_ceil(8 * lanes);
    let name = format!("merge_{}_{lanes}_{chunks}_{slots}", dtype.as_str());
    Some(RowKernel { name, warp_tokens: 32 / lanes })
}

/// Of cuda/routing/threshold.cuh, where it is faster than a warp for each token with a round for each slot.
fn threshold_kernel(
    dtype: DType,
    num_tokens: usize,
    num_experts: usize,
    router: &Router,
    place: Place,
) -> Option<RowKernel> {
    if has_narrow_keys(dtype, router.method) || !may_share_warp(num_experts, router) {
        return None;
    }
    let short = num_experts <= 128;
    let light = short || compares_logits(router.method) && num_experts <= 256;
    let lanes = match place {
        Place::Ordered if light && num_tokens >= 256 => 8,
        Place::Ordered => return None,
        Place::Alone if light && num_tokens >= 1024 => 8,
        Place::Alone if !short && num_tokens >= 2048 => 16,
        Place::Alone if !short && router.top_k > 4 => 32,
        Place::Alone => return None,
    };
    let chunks = num_experts.div_ceil(8 * lanes);
    let groups = router.method.groups();
    if groups.is_limit() {
        let group_size = num_experts / groups.num_groups;
        let whole_lanes = group_size.is_power_of_two() && (8..=8 * lanes).contains(&group_size);
        if num_experts != 8 * lanes * chunks || !whole_lanes {
            return None;
        }
    }
    let name = format!("threshold_{}_{lanes}_{chunks}", kind(dtype, router));
    Some(RowKernel { name, warp_tokens: 32 / lanes })
}

/// The experts that each lane keeps, where a warp can keep a row.
fn row_width(num_experts: usize, router: &Router) -> Option<usize> {
    if num_experts > MAX_ROW_EXPERTS || router.top_k > MAX_ROW_SLOTS {
        return None;
    }
    let width = num_experts.div_ceil(32).next_power_of_two();
    // Each lane keeps the score of one group.
    let groups = router.method.groups();
    (!groups.is_limit() || groups.num_groups <= 32).then_some(width)
}

/// Bytes of shared memory of the general kernel: keys, groups, chosen logits.
fn shared_of_any(device: &CudaDevice, num_experts: usize, router: &Router) -> Result<usize> {
    let words = num_experts.saturating_add(router.method.groups().num_groups).saturating_add(2 * router.top_k);
    // The compiler's own share: the best of each warp.
    let bytes = words.saturating_mul(size_of::<u32>()).saturating_add(512);
    checked_shared(device, OP, &format!("num_experts {num_experts} with top_k {}", router.top_k), bytes)
}
