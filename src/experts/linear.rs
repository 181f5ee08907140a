//! A plain linear layer through the same dot products as the experts.

#[cfg(feature = "cuda")]
use super::cuda;
use super::{ExpertProjection, ExpertWeights, check_hidden, cpu};
use candle_core::{Device, Result, Tensor, bail};

/// `hidden x weight^T + bias`, accumulated in float32 and rounded once to the dtype of `hidden`.
///
/// A token's result does not depend on the batch it is in, to the bit: gates and decoders that must give the same numbers
/// for a prompt in one piece, in chunks or spread over ranks are built on it. Weights stay in their stored dtype.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_moe::experts::Linear;
/// let linear = Linear::new(Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?, None)?;
/// let out = linear.forward(&Tensor::new(&[[1f32, 1.]], &Device::Cpu)?)?;
/// assert_eq!(out.to_vec2::<f32>()?, [[3., 7.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Linear(ExpertProjection);

impl Linear {
    /// `weight` is `[out_features, in_features]`, `bias` `[out_features]`, both in f32, bf16 or f16.
    ///
    /// # Errors
    /// Other shapes or dtypes.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        if weight.rank() != 2 {
            bail!("linear: weight has shape {:?}, expected [out_features, in_features]", weight.shape())
        }
        let out_features = weight.dims()[0];
        let bias = match bias {
            Some(bias) if bias.dims() == [out_features] => Some(bias.unsqueeze(0)?),
            Some(bias) => bail!("linear: bias has shape {:?}, expected [{out_features}]", bias.shape()),
            None => None,
        };
        ExpertProjection::new(ExpertWeights::dense(weight.unsqueeze(0)?)?, bias).map(Self)
    }

    /// A projection of one expert, in any format, as a layer of its own.
    ///
    /// # Errors
    /// More or fewer experts than one.
    pub fn from_projection(projection: ExpertProjection) -> Result<Self> {
        match projection.weights().num_experts() {
            1 => Ok(Self(projection)),
            experts => bail!("linear: the projection has {experts} experts, expected 1"),
        }
    }

    /// The same on `device`.
    ///
    /// # Errors
    /// What copying tensors there may fail with.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.0.to_device(device).map(Self)
    }

    /// Where the weight is.
    pub fn device(&self) -> &Device {
        self.0.weights().device()
    }

    /// How the weight is stored, as [`ExpertWeights::format`] says it.
    pub fn format(&self) -> &'static str {
        self.0.weights().format()
    }

    /// Columns of the weight.
    pub fn in_features(&self) -> usize {
        self.0.weights().in_features()
    }

    /// Rows of the weight.
    pub fn out_features(&self) -> usize {
        self.0.weights().out_features()
    }

    /// `hidden [num_tokens, in_features]` in f32, bf16 or f16 to `[num_tokens, out_features]` in the same dtype.
    ///
    /// # Errors
    /// A shape or dtype that does not fit, or tensors that do not live on one device.
    pub fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        check_hidden(hidden, None, self.in_features())?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = hidden.device() {
            return cuda::linear(&self.0, hidden, device);
        }
        cpu::linear(&self.0, hidden)
    }
}
