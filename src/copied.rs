//! Constants that are needed on the host and on devices.

use candle_core::WithDType;
#[cfg(feature = "cuda")]
use candle_core::{CudaDevice, Device, DeviceLocation, Result, Tensor};
#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};

/// Numbers on the host, and a copy on each device that has used them.
#[derive(Debug)]
pub(crate) struct Copied<T> {
    values: Vec<T>,
    #[cfg(feature = "cuda")]
    copies: Mutex<Vec<(DeviceLocation, Tensor)>>,
}

impl<T: WithDType> Copied<T> {
    pub(crate) fn new(values: Vec<T>) -> Self {
        Self {
            values,
            #[cfg(feature = "cuda")]
            copies: Mutex::default(),
        }
    }

    pub(crate) fn values(&self) -> &[T] {
        &self.values
    }

    /// The numbers on `device`, copied there at its first use.
    #[cfg(feature = "cuda")]
    pub(crate) fn on(&self, device: &CudaDevice) -> Result<Tensor> {
        let device = Device::Cuda(device.clone());
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, copy)) = copies.iter().find(|(location, _)| *location == device.location()) {
            return Ok(copy.clone());
        }
        let copy = Tensor::new(self.values.as_slice(), &device)?;
        // Other threads, whose streams do not wait for this one's, may be the next to use it.
        device.synchronize()?;
        copies.push((device.location(), copy.clone()));
        Ok(copy)
    }
}
