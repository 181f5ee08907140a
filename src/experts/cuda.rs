//! Experts on CUDA: the launches of `cuda/experts/general.cu`.

use super::weights::Values;
use super::{Activation, ExpertProjection, Experts, GateUpRows, OP};
use crate::cuda::{Binary, Launch, launch, slice_of};
use crate::host::checked_product;
use crate::order::ExpertOrder;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};
use std::sync::Arc;

/// Rows of one expert that a block takes, and its output features; of the source.
const TILE_ROWS: usize = 16;
const BAND: usize = 32;
const THREADS: u32 = 256;

/// What the kernels are told; `ProjectionArguments` of the source.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Arguments {
    weights: u64,
    scales: u64,
    bias: u64,
    input: u64,
    output: u64,
    sorted_slots: u64,
    expert_offsets: u64,
    tile_experts: u64,
    tile_starts: u64,
    num_rows: u32,
    top_k: u32,
    in_features: u32,
    out_features: u32,
    gate_up_rows: u32,
    activation: u32,
    alpha: f32,
    limit: f32,
}

/// `HomeArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct HomeArguments {
    rows: u64,
    topk_weights: u64,
    slot_rank: u64,
    sums: u64,
    num_tokens: u64,
    top_k: u32,
    hidden_size: u32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernels' parameters.
unsafe impl DeviceRepr for Arguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for HomeArguments {}

/// A tensor that stays alive while kernels that use it are put on the stream.
struct Held {
    tensor: Tensor,
    stream: Arc<CudaStream>,
}

impl Held {
    /// The tensor on `device`, contiguous.
    fn new(tensor: &Tensor, device: &CudaDevice, argument: &str) -> Result<Self> {
        match tensor.device() {
            candle_core::Device::Cuda(_) => {}
            other => bail!("{OP}: {argument} is on {:?}, expected a CUDA device", other.location()),
        }
        Ok(Self { tensor: tensor.contiguous()?, stream: device.cuda_stream() })
    }

    /// Where its first element lies. The address is good until the tensor is dropped; memory is freed in the stream's order.
    fn address(&self) -> Result<u64> {
        let (storage, layout) = self.tensor.storage_and_layout();
        let first = match self.tensor.dtype() {
            DType::U8 => slice_of::<u8>(&storage, OP, "tensor")?.device_ptr(&self.stream).0,
            DType::U32 => slice_of::<u32>(&storage, OP, "tensor")?.device_ptr(&self.stream).0,
            DType::F32 => slice_of::<f32>(&storage, OP, "tensor")?.device_ptr(&self.stream).0,
            DType::F16 => slice_of::<f16>(&storage, OP, "tensor")?.device_ptr(&self.stream).0,
            DType::BF16 => slice_of::<bf16>(&storage, OP, "tensor")?.device_ptr(&self.stream).0,
            dtype => bail!("{OP}: dtype {dtype:?} is not known on CUDA"),
        };
        Ok(first + (layout.start_offset() * self.tensor.dtype().size_in_bytes()) as u64)
    }
}

/// The numbers of a projection on the device.
struct Weights {
    format: &'static str,
    weights: Held,
    scales: Option<Held>,
    bias: Option<Held>,
}

impl Weights {
    fn new(projection: &ExpertProjection, device: &CudaDevice) -> Result<Self> {
        let held = |tensor: &Tensor, argument| Held::new(tensor, device, argument);
        let (format, weights, scales) = match &projection.weights.values {
            Values::Dense(weight) => (weight.dtype().as_str(), held(weight, "weights")?, None),
            Values::Mxfp4 { blocks, scales } => ("mxfp4", held(blocks, "blocks")?, Some(held(scales, "scales")?)),
            Values::Fp8 { values, scales } => ("fp8", held(values, "values")?, Some(held(scales, "scales")?)),
        };
        let bias = projection.bias.as_ref().map(|bias| held(bias, "bias")).transpose()?;
        Ok(Self { format, weights, scales, bias })
    }

    fn arguments(&self, in_features: usize, out_features: usize) -> Result<Arguments> {
        let address = |held: &Option<Held>| held.as_ref().map_or(Ok(0), Held::address);
        Ok(Arguments {
            weights: self.weights.address()?,
            scales: address(&self.scales)?,
            bias: address(&self.bias)?,
            in_features: in_features as u32,
            out_features: out_features as u32,
            ..Arguments::default()
        })
    }
}

/// Allocates an output that is zero, and has `write` put what fills it on the stream.
fn output<T: WithDType + CudaDType + DeviceRepr + ValidAsZeroBits>(
    device: &CudaDevice,
    shape: impl Into<Shape>,
    write: impl FnOnce(u64) -> Result<()>,
) -> Result<Tensor> {
    let (shape, stream) = (shape.into(), device.cuda_stream());
    let mut values = device.alloc_zeros::<T>(shape.elem_count().max(1))?;
    {
        let (address, _written) = values.device_ptr_mut(&stream);
        write(address)?;
    }
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, device.clone()));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// An output in one of the dtypes of hidden states.
fn output_as(
    dtype: DType,
    device: &CudaDevice,
    shape: impl Into<Shape>,
    write: impl FnOnce(u64) -> Result<()>,
) -> Result<Tensor> {
    match dtype {
        DType::F16 => output::<f16>(device, shape, write),
        DType::BF16 => output::<bf16>(device, shape, write),
        _ => output::<f32>(device, shape, write),
    }
}

/// Blocks of a projection of `num_tiles` tiles.
fn projection_launch(num_tiles: usize, out_features: usize) -> Result<Launch> {
    let blocks = checked_product(OP, ("tiles", num_tiles), ("bands", out_features.div_ceil(BAND)))?;
    Ok(Launch::new(blocks, THREADS, 0))
}

pub(super) fn forward(experts: &Experts, hidden: &Tensor, order: &ExpertOrder, device: &CudaDevice) -> Result<Tensor> {
    let (hidden_size, intermediate_size) = (experts.hidden_size(), experts.intermediate_size());
    let (dtype, num_slots) = (hidden.dtype(), order.num_tokens() * order.top_k());
    let tiles = order.tile_map(TILE_ROWS)?;
    let num_tiles = tiles.tile_experts.elem_count();
    if num_tiles == 0 || hidden_size == 0 {
        return output::<f32>(device, (num_slots, hidden_size), |_| Ok(()));
    }
    let held = |tensor: &Tensor, argument| Held::new(tensor, device, argument);
    let (tile_experts, tile_starts) = (held(&tiles.tile_experts, "tiles")?, held(&tiles.tile_starts, "tiles")?);
    let (sorted_slots, offsets) = (held(&order.sorted_slots, "order")?, held(&order.expert_offsets, "order")?);
    let of_order = |arguments: Arguments| -> Result<Arguments> {
        Ok(Arguments {
            sorted_slots: sorted_slots.address()?,
            expert_offsets: offsets.address()?,
            tile_experts: tile_experts.address()?,
            tile_starts: tile_starts.address()?,
            top_k: order.top_k() as u32,
            ..arguments
        })
    };
    let hidden = held(hidden, "hidden")?;
    let (gate_up, down) = (Weights::new(&experts.gate_up, device)?, Weights::new(&experts.down, device)?);
    let activated = output_as(dtype, device, (num_slots, intermediate_size), |address| {
        if intermediate_size == 0 {
            return Ok(());
        }
        let (activation, alpha, limit) = match experts.activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::SwigluOss { alpha, limit } => (1, alpha, limit),
        };
        let arguments = Arguments {
            input: hidden.address()?,
            output: address,
            gate_up_rows: u32::from(experts.gate_up_rows == GateUpRows::Interleaved),
            activation,
            alpha,
            limit,
            ..of_order(gate_up.arguments(hidden_size, intermediate_size)?)?
        };
        let name = format!("gate_up_{}_{}", gate_up.format, dtype.as_str());
        let how = projection_launch(num_tiles, intermediate_size)?;
        // SAFETY: `Arguments` is the kernel's parameter; `Experts::new` has checked that the weights fit the features, the
        // order's tiles name its places, and the output has a row for each of them.
        unsafe { launch(device, Binary::Experts, &name, how, arguments) }
    })?;
    let activated = held(&activated, "activated")?;
    output::<f32>(device, (num_slots, hidden_size), |address| {
        let arguments = Arguments {
            input: activated.address()?,
            output: address,
            ..of_order(down.arguments(intermediate_size, hidden_size)?)?
        };
        let name = format!("down_{}_{}", down.format, dtype.as_str());
        // SAFETY: as above.
        unsafe { launch(device, Binary::Experts, &name, projection_launch(num_tiles, hidden_size)?, arguments) }
    })
}

pub(super) fn linear(projection: &ExpertProjection, hidden: &Tensor, device: &CudaDevice) -> Result<Tensor> {
    let (dtype, num_tokens) = (hidden.dtype(), hidden.dims()[0]);
    let (in_features, out_features) = (projection.weights.in_features(), projection.weights.out_features());
    let Ok(num_rows) = u32::try_from(num_tokens) else {
        bail!("{OP}: num_tokens is {num_tokens}, expected at most {}", u32::MAX)
    };
    let (hidden, weights) = (Held::new(hidden, device, "hidden")?, Weights::new(projection, device)?);
    output_as(dtype, device, (num_tokens, out_features), |address| {
        if num_tokens == 0 || out_features == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            input: hidden.address()?,
            output: address,
            num_rows,
            ..weights.arguments(in_features, out_features)?
        };
        let how = projection_launch(num_tokens.div_ceil(TILE_ROWS), out_features)?;
        let name = format!("linear_{}_{}", weights.format, dtype.as_str());
        // SAFETY: `Arguments` is the kernel's parameter; `hidden` has `num_rows` rows of `in_features`, the output as many of
        // `out_features`.
        unsafe { launch(device, Binary::Experts, &name, how, arguments) }
    })
}

pub(super) fn weighted_sum(
    rows: &Tensor,
    topk_weights: &Tensor,
    order: &ExpertOrder,
    device: &CudaDevice,
) -> Result<Tensor> {
    let &[num_rows, hidden_size] = rows.dims() else {
        bail!("{OP}: rows has shape {:?}, expected [num_rows, hidden_size]", rows.shape())
    };
    let (num_tokens, top_k) = (order.num_tokens(), order.top_k());
    if num_rows != num_tokens * top_k {
        bail!("{OP}: rows has {num_rows} rows, expected the {} slots of the order on CUDA", num_tokens * top_k)
    }
    let held = |tensor: &Tensor, argument| Held::new(tensor, device, argument);
    let (rows, weights) = (held(rows, "rows")?, held(topk_weights, "topk_weights")?);
    if rows.tensor.dtype() != DType::F32 || weights.tensor.dtype() != DType::F32 {
        bail!(
            "{OP}: rows has dtype {:?} and topk_weights {:?}, expected f32 and f32",
            rows.tensor.dtype(),
            weights.tensor.dtype()
        )
    }
    let slot_rank = held(&order.slot_rank, "slot_rank")?;
    output::<f32>(device, (num_tokens, hidden_size), |sums| {
        let len = checked_product(OP, ("num_tokens", num_tokens), ("hidden_size", hidden_size))?;
        if len == 0 {
            return Ok(());
        }
        let arguments = HomeArguments {
            rows: rows.address()?,
            topk_weights: weights.address()?,
            slot_rank: slot_rank.address()?,
            sums,
            num_tokens: num_tokens as u64,
            top_k: top_k as u32,
            hidden_size: hidden_size as u32,
        };
        let how = Launch::new(len.div_ceil(THREADS as usize), THREADS, 0);
        // SAFETY: `HomeArguments` is the kernel's parameter; ranks of the order are below its slots, which `rows` has a row
        // for, and the sums have `len` elements.
        unsafe { launch(device, Binary::Experts, "home", how, arguments) }
    })
}
