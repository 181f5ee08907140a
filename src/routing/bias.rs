//! The selection bias, where routing needs it.

use candle_core::{DType, Result, Tensor};
#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};

/// A selection bias in float32 on the host, and on each device that routing has run on.
#[derive(Debug)]
pub(super) struct SelectionBias {
    values: Vec<f32>,
    #[cfg(feature = "cuda")]
    copies: Mutex<Vec<Tensor>>,
}

impl SelectionBias {
    pub(super) fn new(bias: &Tensor) -> Result<Self> {
        Ok(Self {
            values: bias.to_dtype(DType::F32)?.to_vec1()?,
            #[cfg(feature = "cuda")]
            copies: Mutex::default(),
        })
    }

    /// `[num_experts]`
    pub(super) fn values(&self) -> &[f32] {
        &self.values
    }

    /// The same on `device`, copied there at its first use.
    #[cfg(feature = "cuda")]
    pub(super) fn on(&self, device: &candle_core::Device) -> Result<Tensor> {
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(copy) = copies.iter().find(|copy| copy.device().same_device(device)) {
            return Ok(copy.clone());
        }
        let copy = Tensor::new(self.values.as_slice(), device)?;
        copies.push(copy.clone());
        Ok(copy)
    }
}
