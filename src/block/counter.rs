//! The slots that every physical expert had, counted where the block runs.

use super::OP;
use crate::order::NO_EXPERT;
#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{Device, Result, Tensor, bail};
use std::sync::{Mutex, PoisonError};

#[derive(Debug)]
pub(super) enum Counter {
    Host(Mutex<Vec<u64>>),
    /// i64 `[num_physical]`, at one address for life, so that replays of a captured graph count too.
    #[cfg(feature = "cuda")]
    Device(Tensor),
}

impl Counter {
    pub(super) fn new(num_physical: usize, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Host(Mutex::new(vec![0; num_physical]))),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                let slots = Tensor::zeros(num_physical, DType::I64, device)?;
                // Other threads, whose streams do not wait for this one's, may be the first to count.
                device.synchronize()?;
                Ok(Self::Device(slots))
            }
            other => bail!("{OP}: statistics on {:?}, expected the CPU or CUDA", other.location()),
        }
    }

    /// Adds the slots of `topk_ids`, physical experts, which are on the CPU.
    pub(super) fn count_ids(&self, topk_ids: &Tensor) -> Result<()> {
        match self {
            Self::Host(slots) => crate::host::with_slice(topk_ids, OP, "topk_ids", |ids: &[u32]| {
                let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
                ids.iter().filter(|&&id| id != NO_EXPERT).for_each(|&id| slots[id as usize] += 1);
                Ok(())
            }),
            #[cfg(feature = "cuda")]
            Self::Device(_) => bail!("{OP}: topk_ids are on {:?}, expected the CPU", topk_ids.device().location()),
        }
    }

    /// Adds `expert_counts`, u32 `[num_physical]` where the counter is; on a device without waiting for them.
    pub(super) fn count_experts(&self, expert_counts: &Tensor) -> Result<()> {
        match (self, expert_counts.device()) {
            (Self::Host(slots), Device::Cpu) => {
                crate::host::with_slice(expert_counts, OP, "expert_counts", |counts: &[u32]| {
                    let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
                    slots.iter_mut().zip(counts).for_each(|(slots, &count)| *slots += u64::from(count));
                    Ok(())
                })
            }
            #[cfg(feature = "cuda")]
            (Self::Device(slots), Device::Cuda(device)) => super::cuda::count(slots, expert_counts, device),
            (_, other) => bail!("{OP}: expert_counts are on {:?}, expected the device that counts", other.location()),
        }
    }

    pub(super) fn slots(&self) -> Result<Vec<u64>> {
        match self {
            Self::Host(slots) => Ok(slots.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            #[cfg(feature = "cuda")]
            Self::Device(slots) => Ok(slots.to_vec1::<i64>()?.into_iter().map(i64::cast_unsigned).collect()),
        }
    }

    pub(super) fn reset(&self) -> Result<()> {
        match self {
            Self::Host(slots) => {
                slots.lock().unwrap_or_else(PoisonError::into_inner).fill(0);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Device(slots) => slots.zero_set(),
        }
    }
}
