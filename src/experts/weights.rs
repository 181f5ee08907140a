//! The weights of one projection, for every local expert.

use crate::host::{checked_product, try_filled, with_slice};
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};

/// Values that share a scale.
pub const MXFP4_BLOCK: usize = 32;

/// Columns of an FP8 row that share a scale; the published blocks are as high as they are wide.
pub const FP8_BLOCK: usize = 128;

/// 2^119: with the largest value of E4M3, 448, the product stays inside float32.
const FP8_MAX_SCALE: f32 = (1u128 << 119) as f32;

/// One matrix `[out_features, in_features]` per local expert.
///
/// MXFP4 stays in 4 bits: value = `table[nibble] * 2^(scale - 127)`, table 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same negated
/// (bit 3 is the sign); with scale bytes 253 and 254 the largest values are beyond float32 and infinite. Byte `b` of a block
/// holds elements `2b` (low nibble) and `2b + 1` (high nibble).
///
/// FP8 stays in 8 bits: weight = value * scale of its row and its block of [`FP8_BLOCK`] columns, rounded to float32 and
/// then accumulated in float32 like the others.
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    pub(super) values: Values,
    pub(super) num_experts: usize,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
}

#[derive(Debug, Clone)]
pub(super) enum Values {
    /// `[num_local_experts, out_features, in_features]`, contiguous.
    Dense(Tensor),
    /// u8 `[num_local_experts, out_features, in_features / 32, 16]` and `[.., in_features / 32]`, contiguous; no scale is above
    /// `max_scale`.
    Mxfp4 { blocks: Tensor, scales: Tensor, max_scale: u8 },
    /// The bits of E4M3 as u8 `[num_local_experts, out_features, in_features]` and f32 `[.., in_features / 128 rounded up]`,
    /// contiguous.
    Fp8 { values: Tensor, scales: Tensor },
    /// On CUDA, as its tensor cores take them.
    #[cfg(feature = "cuda")]
    Fragments(super::cuda::fragments::Fragments),
}

impl ExpertWeights {
    /// Weights `[num_local_experts, out_features, in_features]` in f32, bf16 or f16.
    ///
    /// # Errors
    /// Another rank or dtype.
    pub fn dense(weight: Tensor) -> Result<Self> {
        let &[num_experts, out_features, in_features] = weight.dims() else {
            bail!("expert weights: shape {:?}, expected [num_local_experts, out_features, in_features]", weight.shape())
        };
        if !matches!(weight.dtype(), DType::F32 | DType::BF16 | DType::F16) {
            bail!("expert weights: dtype {:?}, expected f32, bf16 or f16", weight.dtype())
        }
        Ok(Self { values: Values::Dense(weight.contiguous()?), num_experts, out_features, in_features })
    }

    /// MXFP4 weights as published: `blocks` u8 `[num_local_experts, out_features, in_features / 32, 16]`, `scales` u8
    /// `[num_local_experts, out_features, in_features / 32]`.
    ///
    /// # Errors
    /// Other shapes or dtypes, or a scale byte of 255, which stands for NaN.
    pub fn mxfp4(blocks: Tensor, scales: Tensor) -> Result<Self> {
        let &[num_experts, out_features, num_blocks, 16] = blocks.dims() else {
            bail!(
                "mxfp4 weights: blocks have shape {:?}, expected [num_local_experts, out_features, in_features / 32, 16]",
                blocks.shape()
            )
        };
        if scales.dims() != [num_experts, out_features, num_blocks] {
            bail!(
                "mxfp4 weights: scales have shape {:?}, expected {:?}",
                scales.shape(),
                [num_experts, out_features, num_blocks]
            )
        }
        if blocks.dtype() != DType::U8 || scales.dtype() != DType::U8 {
            bail!("mxfp4 weights: dtypes {:?} and {:?}, expected u8 and u8", blocks.dtype(), scales.dtype())
        }
        let Some(in_features) = num_blocks.checked_mul(MXFP4_BLOCK) else {
            bail!(
                "mxfp4 weights: blocks have shape {:?}, expected at most {} blocks to a row",
                blocks.shape(),
                usize::MAX / MXFP4_BLOCK
            )
        };
        let (blocks, scales) = (blocks.contiguous()?, scales.contiguous()?);
        let max_scale = with_slice(&scales, "mxfp4 weights", "scales", |scales: &[u8]| {
            match scales.iter().position(|&scale| scale == u8::MAX) {
                Some(index) => bail!(
                    "mxfp4 weights: scale of {} is 255, which stands for NaN; expected at most 254",
                    place(index, out_features, num_blocks, "block")
                ),
                None => Ok(scales.iter().copied().max().unwrap_or(0)),
            }
        })?;
        Ok(Self { values: Values::Mxfp4 { blocks, scales, max_scale }, num_experts, out_features, in_features })
    }

    /// FP8 weights as DeepSeek-V3 publishes them: `values` F8E4M3, or its bits as u8 (which are not copied),
    /// `[num_local_experts, out_features, in_features]`; `scales` f32 `[num_local_experts, out_features, in_features / 128
    /// rounded up]`, which [`fp8_row_scales`] makes from published ones. `in_features` may be any number.
    ///
    /// # Errors
    /// Other shapes or dtypes, a value that is NaN, a scale that is not finite or above 2^119 in magnitude (products could
    /// leave float32), or tensors that do not live on the CPU.
    pub fn fp8(values: Tensor, scales: Tensor) -> Result<Self> {
        let &[num_experts, out_features, in_features] = values.dims() else {
            bail!(
                "fp8 weights: values have shape {:?}, expected [num_local_experts, out_features, in_features]",
                values.shape()
            )
        };
        let num_blocks = in_features.div_ceil(FP8_BLOCK);
        if scales.dims() != [num_experts, out_features, num_blocks] {
            bail!(
                "fp8 weights: scales have shape {:?}, expected {:?}",
                scales.shape(),
                [num_experts, out_features, num_blocks]
            )
        }
        let values = match values.dtype() {
            DType::F8E4M3 if scales.dtype() == DType::F32 => fp8_bits(&values)?,
            DType::U8 if scales.dtype() == DType::F32 => values.contiguous()?,
            dtype => bail!(
                "fp8 weights: dtypes {dtype:?} and {:?}, expected F8E4M3 or its bits as u8, and f32",
                scales.dtype()
            ),
        };
        let scales = scales.contiguous()?;
        with_slice(&values, "fp8 weights", "values", |values: &[u8]| {
            match values.iter().position(|value| value & 0x7f == 0x7f) {
                Some(index) => bail!(
                    "fp8 weights: value of {} is NaN, expected numbers",
                    place(index, out_features, in_features, "column")
                ),
                None => Ok(()),
            }
        })?;
        with_slice(&scales, "fp8 weights", "scales", |scales: &[f32]| {
            match scales.iter().position(|scale| scale.is_nan() || scale.abs() > FP8_MAX_SCALE) {
                Some(index) => bail!(
                    "fp8 weights: scale of {} is {}, expected at most 2^119 in magnitude",
                    place(index, out_features, num_blocks, "block"),
                    scales[index]
                ),
                None => Ok(()),
            }
        })?;
        Ok(Self { values: Values::Fp8 { values, scales }, num_experts, out_features, in_features })
    }

    /// The same on `device`.
    ///
    /// # Errors
    /// What copying tensors there may fail with.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let values = match &self.values {
            Values::Dense(weight) => Values::Dense(weight.to_device(device)?),
            Values::Mxfp4 { blocks, scales, max_scale } => Values::Mxfp4 {
                blocks: blocks.to_device(device)?,
                scales: scales.to_device(device)?,
                max_scale: *max_scale,
            },
            Values::Fp8 { values, scales } => {
                Values::Fp8 { values: values.to_device(device)?, scales: scales.to_device(device)? }
            }
            #[cfg(feature = "cuda")]
            Values::Fragments(fragments) => Values::Fragments(fragments.to_device(device)?),
        };
        Ok(Self { values, ..*self })
    }

    /// Where they are.
    pub fn device(&self) -> &Device {
        match &self.values {
            Values::Dense(values) | Values::Mxfp4 { blocks: values, .. } | Values::Fp8 { values, .. } => {
                values.device()
            }
            #[cfg(feature = "cuda")]
            Values::Fragments(fragments) => fragments.values.device(),
        }
    }

    /// Local experts.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Rows of each matrix.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of each matrix.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// How the weights are stored: `f32`, `bf16`, `f16`, `mxfp4` or `fp8`.
    pub fn format(&self) -> &'static str {
        match &self.values {
            Values::Dense(weight) => weight.dtype().as_str(),
            Values::Mxfp4 { .. } => "mxfp4",
            Values::Fp8 { .. } => "fp8",
            #[cfg(feature = "cuda")]
            Values::Fragments(fragments) => fragments.format.name(),
        }
    }

    /// Bytes that the weights of one expert take.
    pub fn bytes_per_expert(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let all = match &self.values {
            Values::Dense(weight) => bytes(weight),
            Values::Mxfp4 { blocks, scales, .. } => bytes(blocks) + bytes(scales),
            Values::Fp8 { values, scales } => bytes(values) + bytes(scales),
            #[cfg(feature = "cuda")]
            Values::Fragments(fragments) => fragments.bytes(),
        };
        all / self.num_experts.max(1)
    }
}

/// The scales of [`ExpertWeights::fp8`] from published ones: `scale_inv` is f32 `[num_local_experts, out_features / 128
/// rounded up, num_blocks]`, a scale per block of 128 x 128; the result is f32 `[num_local_experts, out_features,
/// num_blocks]`, each row of scales repeated for its 128 rows.
///
/// Rows may then be concatenated where `out_features` is no multiple of 128, as for gate and up:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_moe::experts::{ExpertWeights, fp8_row_scales};
/// let values = Tensor::zeros((1, 200, 300), DType::F8E4M3, &Device::Cpu)?; // of gate, and of up
/// let scale_inv = Tensor::ones((1, 2, 3), DType::F32, &Device::Cpu)?;
/// let scales = fp8_row_scales(&scale_inv, 200)?;
/// assert_eq!(scales.dims(), [1, 200, 3]);
/// let gate_up = ExpertWeights::fp8(Tensor::cat(&[&values, &values], 1)?, Tensor::cat(&[&scales, &scales], 1)?)?;
/// assert_eq!(gate_up.out_features(), 400);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Another shape or dtype, or a tensor that does not live on the CPU.
pub fn fp8_row_scales(scale_inv: &Tensor, out_features: usize) -> Result<Tensor> {
    const OP: &str = "fp8_row_scales";
    let row_blocks = out_features.div_ceil(FP8_BLOCK);
    let (num_experts, num_blocks) = match *scale_inv.dims() {
        [num_experts, rows, num_blocks] if rows == row_blocks => (num_experts, num_blocks),
        _ => bail!(
            "{OP}: scale_inv has shape {:?}, expected [num_local_experts, {row_blocks}, num_blocks] for out_features \
             {out_features}",
            scale_inv.shape()
        ),
    };
    let num_rows = checked_product(OP, ("num_local_experts", num_experts), ("out_features", out_features))?;
    let mut scales = try_filled(OP, 0f32, checked_product(OP, ("num_rows", num_rows), ("num_blocks", num_blocks))?)?;
    with_slice(scale_inv, OP, "scale_inv", |scale_inv: &[f32]| {
        for (row, scales) in scales.chunks_exact_mut(num_blocks.max(1)).enumerate() {
            let published = row / out_features * row_blocks + row % out_features / FP8_BLOCK;
            scales.copy_from_slice(&scale_inv[published * num_blocks..][..num_blocks]);
        }
        Ok(())
    })?;
    Tensor::from_vec(scales, (num_experts, out_features, num_blocks), &Device::Cpu)
}

/// The bits of F8E4M3 values as u8, so that they are plain bytes from here on.
fn fp8_bits(values: &Tensor) -> Result<Tensor> {
    let values = values.contiguous()?;
    let (storage, layout) = values.storage_and_layout();
    let Storage::Cpu(CpuStorage::F8E4M3(all)) = &*storage else {
        bail!("fp8 weights: values are on {:?}, expected the CPU", values.device().location())
    };
    let mut bits = try_filled("fp8 weights", 0u8, layout.shape().elem_count())?;
    bits.iter_mut().zip(&all[layout.start_offset()..]).for_each(|(bits, value)| *bits = value.to_bits());
    Tensor::from_vec(bits, layout.shape(), &Device::Cpu)
}

/// Where an element of `[num_local_experts, out_features, width]` stands; `unit` names the last dimension.
fn place(index: usize, out_features: usize, width: usize, unit: &str) -> String {
    let row = index / width;
    format!("expert {}, row {}, {unit} {}", row / out_features, row % out_features, index % width)
}
