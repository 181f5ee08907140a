//! Contiguous host slices of CPU tensors, for the CPU body of every room.

use candle_core::{Result, Storage, Tensor, WithDType, bail};

/// Runs `f` on the elements of a CPU tensor in row-major order, whatever its strides and start offset.
///
/// Errors name `op` and `argument`: wrong dtype, or a tensor that does not live on the CPU.
pub(crate) fn with_slice<T: WithDType, R>(
    tensor: &Tensor,
    op: &str,
    argument: &str,
    f: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    if tensor.dtype() != T::DTYPE {
        bail!("{op}: {argument} has dtype {:?}, expected {:?}", tensor.dtype(), T::DTYPE)
    }
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        bail!("{op}: {argument} is on {:?}, expected the CPU", tensor.device().location())
    };
    let start = layout.start_offset();
    f(&storage.as_slice::<T>()?[start..start + layout.shape().elem_count()])
}

/// `len` copies of `value`, or an error that says that the memory is not there.
pub(crate) fn try_filled<T: Clone>(op: &str, value: T, len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    if vec.try_reserve_exact(len).is_err() {
        bail!("{op}: cannot allocate {len} elements of {} bytes", size_of::<T>())
    }
    vec.resize(len, value);
    Ok(vec)
}

/// `a * b`, or an error that names `op` and both factors.
pub(crate) fn checked_product(op: &str, a: (&str, usize), b: (&str, usize)) -> Result<usize> {
    match a.1.checked_mul(b.1) {
        Some(product) => Ok(product),
        None => bail!("{op}: {} {} times {} {} overflows", a.0, a.1, b.0, b.1),
    }
}
