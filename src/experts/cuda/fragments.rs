//! Weights in fragment order: the launches of `cuda/experts/pack.cu`; `cuda/experts/fragments.cuh` has the order.

use super::super::weights::{ExpertWeights, Values};
use super::super::{GateUpRows, OP};
use super::held::Held;
use crate::cuda::{Binary, Launch, launch};
use candle_core::cuda_backend::cudarc::driver::{DevicePtrMut, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Storage, Tensor, bail};

/// Columns of a unit, and rows of a band.
pub(crate) const UNIT_COLUMNS: usize = 64;
pub(crate) const BAND_ROWS: usize = 16;
const THREADS: u32 = 256;
const MAX_BLOCKS: usize = 1 << 16;
/// The largest scale byte whose power of two, multiplied by what nibbles lack, is a bfloat16.
const MAX_FOLDED_SCALE: u8 = 128;

/// What a number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Mxfp4 {
        /// Whether every scale can be multiplied into its weights in bfloat16.
        has_small_scales: bool,
    },
    Bf16,
    F16,
}

impl Format {
    /// In the names of kernels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mxfp4 { .. } => "mxfp4",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Bytes of a unit's values, and of its scales.
    pub(crate) fn unit_bytes(self) -> (usize, usize) {
        match self {
            Self::Mxfp4 { .. } => (512, 32),
            Self::Bf16 | Self::F16 => (2048, 0),
        }
    }
}

/// The matrices of a projection, in fragment order on a CUDA device.
#[derive(Debug, Clone)]
pub(crate) struct Fragments {
    pub(crate) format: Format,
    /// u32, all experts'.
    pub(crate) values: Tensor,
    /// u32, all experts'.
    pub(crate) scales: Option<Tensor>,
}

impl Fragments {
    /// The same on another CUDA device.
    pub(crate) fn to_device(&self, device: &Device) -> Result<Self> {
        if !device.is_cuda() {
            bail!("{OP}: weights that were arranged for CUDA cannot go to {:?}; keep a copy there", device.location())
        }
        let scales = self.scales.as_ref().map(|scales| scales.to_device(device)).transpose()?;
        Ok(Self { values: self.values.to_device(device)?, scales, ..*self })
    }

    pub(crate) fn bytes(&self) -> usize {
        let words = self.values.elem_count() + self.scales.as_ref().map_or(0, Tensor::elem_count);
        words * size_of::<u32>()
    }
}

/// What the kernels are told; `PackArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct Arguments {
    published: u64,
    packed: u64,
    num_words: u64,
    kind: u32,
    gate_up_rows: u32,
    rows: u32,
    columns: u32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernels' parameter.
unsafe impl DeviceRepr for Arguments {}

/// The weights in fragment order, if they are on a CUDA device, of a format that tensor cores take, in whole bands and units;
/// else as they are. `gate_up_rows` says how gate and up lie in the matrix, if it has both.
pub(crate) fn arranged(weights: ExpertWeights, gate_up_rows: Option<GateUpRows>) -> Result<ExpertWeights> {
    let (rows, columns) = (weights.out_features(), weights.in_features());
    let whole = rows.is_multiple_of(BAND_ROWS) && columns.is_multiple_of(UNIT_COLUMNS);
    if !whole || rows * columns * weights.num_experts() == 0 || u32::try_from(rows.max(columns)).is_err() {
        return Ok(weights);
    }
    let len = rows * columns * weights.num_experts();
    let pack = |name, published: &Tensor, num_words| pack(name, published, num_words, [rows, columns], gate_up_rows);
    let fragments = match &weights.values {
        Values::Dense(weight) if weight.device().is_cuda() => {
            let format = match weight.dtype() {
                DType::BF16 => Format::Bf16,
                DType::F16 => Format::F16,
                _ => return Ok(weights),
            };
            Fragments { format, values: pack("pack_16", weight, len / 2)?, scales: None }
        }
        Values::Mxfp4 { blocks, scales, max_scale } if blocks.device().is_cuda() => Fragments {
            format: Format::Mxfp4 { has_small_scales: *max_scale <= MAX_FOLDED_SCALE },
            values: pack("pack_mxfp4", blocks, len / 8)?,
            scales: Some(pack("pack_mxfp4_scales", scales, len / 32 / size_of::<u32>())?),
        },
        _ => return Ok(weights),
    };
    Ok(ExpertWeights { values: Values::Fragments(fragments), ..weights })
}

fn pack(
    name: &str,
    published: &Tensor,
    num_words: usize,
    [rows, columns]: [usize; 2],
    gate_up_rows: Option<GateUpRows>,
) -> Result<Tensor> {
    let Device::Cuda(device) = published.device() else { bail!("{OP}: weights are not on a CUDA device") };
    let published = Held::new(published, device, "weights")?;
    // SAFETY: the kernel writes every word before anything reads it.
    let mut packed = match unsafe { device.alloc::<u32>(num_words) } {
        Ok(packed) => packed,
        Err(error) => bail!("{OP}: cannot allocate {} bytes for weights: {error}", num_words * size_of::<u32>()),
    };
    let stream = device.cuda_stream();
    {
        let (address, _written) = packed.device_ptr_mut(&stream);
        let arguments = Arguments {
            published: published.address()?,
            packed: address,
            num_words: num_words as u64,
            kind: u32::from(gate_up_rows.is_none()),
            gate_up_rows: u32::from(gate_up_rows == Some(GateUpRows::Interleaved)),
            rows: rows as u32,
            columns: columns as u32,
        };
        let how = Launch::new(num_words.div_ceil(THREADS as usize).min(MAX_BLOCKS), THREADS, 0);
        // SAFETY: `Arguments` is the kernel's parameter; the published weights have `num_words` words worth of numbers in
        // matrices of `rows` and `columns`, and both are freed in the stream's order.
        unsafe { launch(device, Binary::ExpertsPack, name, how, arguments)? };
    }
    storage(packed, device)
}

fn storage(words: candle_core::cuda_backend::cudarc::driver::CudaSlice<u32>, device: &CudaDevice) -> Result<Tensor> {
    let len = words.len();
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(words, device.clone()));
    Ok(Tensor::from_storage(storage, len, BackpropOp::none(), false))
}
