//! The weights of one projection, for every local expert.

use candle_core::{DType, Result, Tensor, bail};

/// Values that share a scale.
pub const MXFP4_BLOCK: usize = 32;

/// One matrix `[out_features, in_features]` per local expert.
///
/// MXFP4 stays in 4 bits: value = `table[nibble] * 2^(scale - 127)`, table 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same negated
/// (bit 3 is the sign). With scale bytes 253 and 254 the largest values are beyond float32 and infinite. Byte `b` of a block holds elements `2b` (low nibble) and `2b + 1` (high nibble).
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    pub(super) values: Values,
    num_experts: usize,
    out_features: usize,
    in_features: usize,
}

#[derive(Debug, Clone)]
pub(super) enum Values {
    /// `[num_local_experts, out_features, in_features]`, contiguous.
    Dense(Tensor),
    /// u8 `[num_local_experts, out_features, in_features / 32, 16]` and `[.., in_features / 32]`, contiguous.
    Mxfp4 { blocks: Tensor, scales: Tensor },
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
        crate::host::with_slice(&scales, "mxfp4 weights", "scales", |scales: &[u8]| {
            match scales.iter().position(|&scale| scale == u8::MAX) {
                Some(place) => {
                    let (row, block) = (place / num_blocks, place % num_blocks);
                    bail!(
                        "mxfp4 weights: scale of expert {}, row {}, block {block} is 255, which stands for NaN; \
                         expected at most 254",
                        row / out_features,
                        row % out_features
                    )
                }
                None => Ok(()),
            }
        })?;
        Ok(Self { values: Values::Mxfp4 { blocks, scales }, num_experts, out_features, in_features })
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

    /// Bytes that the weights of one expert take.
    pub fn bytes_per_expert(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let all = match &self.values {
            Values::Dense(weight) => bytes(weight),
            Values::Mxfp4 { blocks, scales } => bytes(blocks) + bytes(scales),
        };
        all / self.num_experts.max(1)
    }
}
