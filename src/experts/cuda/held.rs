//! Tensors as kernels take and give them.

use super::super::OP;
use crate::cuda::slice_of;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};
use std::sync::Arc;

/// A tensor that stays alive while kernels that use it are put on the stream.
pub(super) struct Held {
    tensor: Tensor,
    stream: Arc<CudaStream>,
}

impl Held {
    /// The tensor on `device`, contiguous.
    pub(super) fn new(tensor: &Tensor, device: &CudaDevice, argument: &str) -> Result<Self> {
        let here = Device::Cuda(device.clone());
        if !here.same_device(tensor.device()) {
            bail!(
                "{OP}: {argument} is on {:?}, expected the device of hidden, {:?}",
                tensor.device().location(),
                here.location()
            )
        }
        Ok(Self { tensor: tensor.contiguous()?, stream: device.cuda_stream() })
    }

    /// The same at a multiple of 16 bytes, where kernels load as much at once.
    pub(super) fn aligned(self) -> Result<Self> {
        if self.address()?.is_multiple_of(16) {
            return Ok(self);
        }
        Ok(Self { tensor: self.tensor.force_contiguous()?, ..self })
    }

    pub(super) fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// Where its first element lies. The address is good until the tensor is dropped; memory is freed in the stream's order.
    pub(super) fn address(&self) -> Result<u64> {
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

/// Whether an output is 0 before it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fresh {
    Zero,
    /// All of it will be written.
    Undefined,
}

/// Allocates an output in one of the dtypes of hidden states, and has `write` put what fills it on the stream.
pub(super) fn output(
    dtype: DType,
    device: &CudaDevice,
    shape: impl Into<Shape>,
    fresh: Fresh,
    write: impl FnOnce(u64) -> Result<()>,
) -> Result<Tensor> {
    match dtype {
        DType::F16 => output_of::<f16>(device, shape.into(), fresh, write),
        DType::BF16 => output_of::<bf16>(device, shape.into(), fresh, write),
        _ => output_of::<f32>(device, shape.into(), fresh, write),
    }
}

fn output_of<T: WithDType + CudaDType + DeviceRepr + ValidAsZeroBits>(
    device: &CudaDevice,
    shape: Shape,
    fresh: Fresh,
    write: impl FnOnce(u64) -> Result<()>,
) -> Result<Tensor> {
    let (len, stream) = (shape.elem_count().max(1), device.cuda_stream());
    let allocated = match fresh {
        Fresh::Zero => device.alloc_zeros::<T>(len),
        // SAFETY: the caller's kernels write every element before anything reads it.
        Fresh::Undefined => unsafe { device.alloc::<T>(len) },
    };
    let mut values = match allocated {
        Ok(values) => values,
        Err(error) => bail!("{OP}: cannot allocate {} bytes for {shape:?}: {error}", len * size_of::<T>()),
    };
    {
        let (address, _written) = values.device_ptr_mut(&stream);
        write(address)?;
    }
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, device.clone()));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}
