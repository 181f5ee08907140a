//! Rows as memory of the device.

use super::super::error::{EpErrorKind, reason};
use crate::cuda::allocate;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Result as CandleResult, Storage, Tensor};
use float8::F8E4M3;
use half::{bf16, f16};

/// How rows are shared out among the ranks, in rank order.
pub(in super::super) struct Shares<'a> {
    counts: &'a [usize],
    /// The shape of one row, and its elements.
    row: &'a [usize],
    row_elements: usize,
    element_bytes: usize,
}

#[cfg_attr(not(feature = "nccl"), allow(dead_code, reason = "some is for the library"))]
impl<'a> Shares<'a> {
    /// `rows` has rows of the shape that all have. The sum of `counts` fits: it was checked.
    pub(in super::super) fn new(rows: &'a Tensor, counts: &'a [usize]) -> Self {
        let row = rows.dims().get(1..).unwrap_or_default();
        // A zero may stand behind sizes that are too large.
        let product = row.iter().fold(1usize, |product, &size| product.saturating_mul(size));
        let row_elements = if row.contains(&0) { 0 } else { product };
        Self { counts, row, row_elements, element_bytes: rows.dtype().size_in_bytes() }
    }

    pub(in super::super) fn rows(&self, rank: usize) -> usize {
        self.counts.get(rank).copied().unwrap_or(0)
    }

    pub(in super::super) fn num_rows(&self) -> usize {
        self.counts.iter().fold(0, |sum: usize, &count| sum.saturating_add(count))
    }

    /// Of a tensor with `num_rows` such rows.
    pub(in super::super) fn shape(&self, num_rows: usize) -> Vec<usize> {
        [&[num_rows], self.row].concat()
    }

    pub(in super::super) fn elements(&self, rank: usize) -> usize {
        self.rows(rank).saturating_mul(self.row_elements)
    }

    pub(in super::super) fn bytes(&self, rank: usize) -> usize {
        self.elements(rank).saturating_mul(self.element_bytes)
    }

    pub(in super::super) fn row_bytes(&self) -> usize {
        self.row_elements.saturating_mul(self.element_bytes)
    }

    /// Where the share of `rank` begins, in bytes.
    pub(in super::super) fn offset(&self, rank: usize) -> u64 {
        (0..rank).fold(0u64, |sum, rank| sum.saturating_add(self.bytes(rank) as u64))
    }

    pub(in super::super) fn are_empty(&self) -> bool {
        self.filled().next().is_none()
    }

    pub(in super::super) fn are_equal(&self) -> bool {
        self.counts.iter().all(|&count| count == self.rows(0))
    }

    /// The ranks that have anything.
    pub(in super::super) fn filled(&self) -> impl Iterator<Item = usize> {
        (0..self.counts.len()).filter(|&rank| self.elements(rank) > 0)
    }
}

/// A new tensor whose memory `fill` enqueues the writing of, given its address: never null, even without elements.
pub(in super::super) fn fresh(
    device: &CudaDevice,
    dtype: DType,
    shape: &[usize],
    fill: impl FnOnce(u64) -> Result<(), EpErrorKind>,
) -> Result<Tensor, EpErrorKind> {
    match dtype {
        DType::U8 => fresh_of::<u8>(device, shape, fill),
        DType::U32 => fresh_of::<u32>(device, shape, fill),
        DType::I16 => fresh_of::<i16>(device, shape, fill),
        DType::I32 => fresh_of::<i32>(device, shape, fill),
        DType::I64 => fresh_of::<i64>(device, shape, fill),
        DType::BF16 => fresh_of::<bf16>(device, shape, fill),
        DType::F16 => fresh_of::<f16>(device, shape, fill),
        DType::F32 => fresh_of::<f32>(device, shape, fill),
        DType::F64 => fresh_of::<f64>(device, shape, fill),
        DType::F8E4M3 => fresh_of::<F8E4M3>(device, shape, fill),
        packed => Err(EpErrorKind::Tensor(format!("rows has dtype {}, which does not travel", packed.as_str()))),
    }
}

fn fresh_of<T: CudaDType + DeviceRepr>(
    device: &CudaDevice,
    shape: &[usize],
    fill: impl FnOnce(u64) -> Result<(), EpErrorKind>,
) -> Result<Tensor, EpErrorKind> {
    let mut memory = room_for::<T>(device, shape).map_err(|error| EpErrorKind::Tensor(reason(&error)))?;
    let stream = device.cuda_stream();
    {
        let (address, _written) = memory.device_ptr_mut(&stream);
        fill(address)?;
    }
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(memory, device.clone()));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// Memory that was not Candle's before as a tensor, which frees it.
///
/// # Safety
/// At `address` are as many elements of the device's memory, which nobody else frees.
pub(in super::super) unsafe fn room_of(
    device: &CudaDevice,
    dtype: DType,
    address: u64,
    elements: usize,
) -> Result<Tensor, EpErrorKind> {
    let stream = device.cuda_stream();
    macro_rules! of {
        ($type:ty) => {{
            // SAFETY: the caller's promise.
            let slice = unsafe { stream.upgrade_device_ptr::<$type>(address, elements) };
            Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()))
        }};
    }
    let storage = match dtype {
        DType::U8 => of!(u8),
        DType::U32 => of!(u32),
        DType::BF16 => of!(bf16),
        DType::F16 => of!(f16),
        DType::F32 => of!(f32),
        other => return Err(EpErrorKind::Tensor(format!("there are no rooms of dtype {}", other.as_str()))),
    };
    Ok(Tensor::from_storage(storage, elements, BackpropOp::none(), false))
}

fn room_for<T: DeviceRepr>(device: &CudaDevice, shape: &[usize]) -> CandleResult<CudaSlice<T>> {
    let elements = shape.iter().fold(1usize, |product, &size| product.saturating_mul(size));
    let elements = if shape.contains(&0) { 0 } else { elements };
    // SAFETY: what is read of it is what was received, which is all of it.
    unsafe { allocate(device, "rows", elements) }
}

/// Where the first element of a contiguous tensor lies; good until the tensor is dropped, and memory is freed in the stream's order.
pub(in super::super) fn address_of(tensor: &Tensor, device: &CudaDevice) -> Result<u64, EpErrorKind> {
    let mut found = 0;
    with_address(tensor, device, |address| {
        found = address;
        Ok(())
    })?;
    Ok(found)
}

/// Gives `work` the address of the first element of a contiguous tensor. Without elements it may be null.
pub(super) fn with_address(
    tensor: &Tensor,
    device: &CudaDevice,
    work: impl FnOnce(u64) -> Result<(), EpErrorKind>,
) -> Result<(), EpErrorKind> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(EpErrorKind::Tensor("the rows are not on a CUDA device".to_string()));
    };
    let first = layout.start_offset();
    macro_rules! of {
        ($slice:expr) => {{
            let stream = device.cuda_stream();
            let (address, _read) = $slice.device_ptr(&stream);
            work(address + (first * tensor.dtype().size_in_bytes()) as u64)
        }};
    }
    match &storage.slice {
        CudaStorageSlice::U8(slice) => of!(slice),
        CudaStorageSlice::U32(slice) => of!(slice),
        CudaStorageSlice::I16(slice) => of!(slice),
        CudaStorageSlice::I32(slice) => of!(slice),
        CudaStorageSlice::I64(slice) => of!(slice),
        CudaStorageSlice::BF16(slice) => of!(slice),
        CudaStorageSlice::F16(slice) => of!(slice),
        CudaStorageSlice::F32(slice) => of!(slice),
        CudaStorageSlice::F64(slice) => of!(slice),
        CudaStorageSlice::F8E4M3(slice) => of!(slice),
        _ => Err(EpErrorKind::Tensor(format!("rows has dtype {}, which does not travel", tensor.dtype().as_str()))),
    }
}
