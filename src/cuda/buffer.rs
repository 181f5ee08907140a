//! One allocation for all u32 outputs of a launch, handed out as views.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut, DeviceRepr, result};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Result, Shape, Storage, Tensor, bail};
use std::sync::Arc;

/// Words between the starts of sections, so that each can be read 16 bytes at a time.
const ALIGNMENT: usize = 4;

/// A part of a [`Buffer`], in words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section {
    first: usize,
    len: usize,
}

/// Sections that are laid out first and then allocated together: an allocation costs more than a small kernel.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    len: usize,
}

impl Buffer {
    /// Room for `len` words.
    pub(crate) fn section(&mut self, len: usize) -> Section {
        let section = Section { first: self.len, len };
        self.len = self.len.saturating_add(len).saturating_add(ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        section
    }

    /// Allocates the sections, has `launch` write them, and wraps them up. `launch` is given the address of each.
    ///
    /// # Safety
    /// `launch` puts a kernel on the device's stream that writes every word of every section that is read later.
    pub(crate) unsafe fn fill(
        self,
        device: &CudaDevice,
        op: &str,
        launch: impl FnOnce(&dyn Fn(Section) -> u64) -> Result<()>,
    ) -> Result<Sections> {
        let stream: Arc<CudaStream> = device.cuda_stream();
        // SAFETY: the caller's kernel writes what is read.
        let mut words: CudaSlice<u32> = unsafe { allocate(device, op, self.len)? };
        {
            let (address, _written) = words.device_ptr_mut(&stream);
            launch(&|section: Section| address + (section.first * size_of::<u32>()) as u64)?;
        }
        let len = words.len();
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(words, device.clone()));
        Ok(Sections { words: Tensor::from_storage(storage, len, BackpropOp::none(), false) })
    }
}

/// Memory for `len` elements, at least one since nothing else can be allocated, or an error that says for what it was.
///
/// # Safety
/// What the memory holds is written before it is read.
pub(crate) unsafe fn allocate<T: DeviceRepr>(device: &CudaDevice, op: &str, len: usize) -> Result<CudaSlice<T>> {
    let len = len.max(1);
    let Some(bytes) = len.checked_mul(size_of::<T>()).filter(|bytes| *bytes <= isize::MAX as usize) else {
        bail!("{op}: cannot allocate {len} elements of {} bytes on {:?}", size_of::<T>(), device.location())
    };
    // SAFETY: the caller's promise.
    match unsafe { device.alloc::<T>(len) } {
        Ok(memory) => Ok(memory),
        Err(error) => bail!("{op}: cannot allocate {bytes} bytes on {:?}: {error}", device.location()),
    }
}

/// Memory of the device that other devices can be let to, as Candle's own cannot; all 0.
pub(crate) fn allocate_plain(device: &CudaDevice, op: &str, bytes: usize) -> Result<u64> {
    let stream = device.cuda_stream();
    let allocated = stream.context().bind_to_thread().and_then(|()| {
        // SAFETY: a context is current, and the memory is new.
        unsafe {
            let address = result::malloc_sync(bytes)?;
            result::memset_d8_async(address, 0, bytes, stream.cu_stream())?;
            Ok(address)
        }
    });
    // Before another device writes there.
    match allocated.and_then(|address| stream.synchronize().map(|()| address)) {
        Ok(address) => Ok(address),
        Err(error) => bail!("{op}: cannot allocate {bytes} bytes on {:?}: {error}", device.location()),
    }
}

/// A buffer that was filled.
pub(crate) struct Sections {
    words: Tensor,
}

impl Sections {
    /// A section as a tensor, a view of the buffer.
    pub(crate) fn tensor(&self, section: Section, shape: impl Into<Shape>) -> Result<Tensor> {
        self.words.narrow(0, section.first, section.len)?.reshape(shape.into())
    }
}
