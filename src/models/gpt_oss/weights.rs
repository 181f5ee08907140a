//! The dense tensors of a checkpoint.

use super::Config;
use crate::checkpoint::Checkpoint;
use crate::experts::Linear;
use candle_core::{DType, Device, Result, Tensor};

/// The dense tensors of a checkpoint by their published names, in their stored dtype.
pub(super) struct Weights<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) config: &'a Config,
    pub(super) device: &'a Device,
}

impl Weights<'_> {
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(self.checkpoint.tensor(name, shape, &[DType::BF16, DType::F32, DType::F16], self.device)?)
    }

    pub(super) fn linear(&self, name: &str, out_features: usize, in_features: usize, bias: bool) -> Result<Linear> {
        let weight = self.tensor(&format!("{name}.weight"), &[out_features, in_features])?;
        let bias = match bias {
            true => Some(self.tensor(&format!("{name}.bias"), &[out_features])?),
            false => None,
        };
        Linear::new(weight, bias)
    }
}
