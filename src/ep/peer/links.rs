//! What ranks of one process share: flags, and rooms in the memory of their devices, which all of them reach.

use super::super::device::{device_kind, room_of};
use super::super::error::EpErrorKind;
use crate::cuda::allocate_plain;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, result, sys};
use candle_core::{CudaDevice, DType, Tensor};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

/// `kMaxRanks` of the source.
pub(super) const MAX_RANKS: usize = 16;
/// Words of a `Mailbox`.
pub(super) const MAILBOX_WORDS: usize = MAX_RANKS + 2;

/// The memory of a group that ranks read and write at each other. It is there as long as any of them.
pub(super) struct Links {
    kept: Mutex<Vec<Tensor>>,
}

/// Where ranks that are built together find what they share, by a number that rank 0 tells them.
static BUILT: LazyLock<Mutex<HashMap<u64, Weak<Links>>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(0);

fn built() -> MutexGuard<'static, HashMap<u64, Weak<Links>>> {
    BUILT.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Links {
    /// Those of a new group, and their number.
    pub(super) fn open() -> (u64, Arc<Self>) {
        let (number, links) = (NEXT.fetch_add(1, Ordering::Relaxed), Arc::new(Self { kept: Mutex::default() }));
        let mut built = built();
        built.retain(|_, links| links.strong_count() > 0);
        built.insert(number, Arc::downgrade(&links));
        (number, links)
    }

    /// Those of a group that another rank has opened.
    pub(super) fn join(number: u64) -> Option<Arc<Self>> {
        built().get(&number).and_then(Weak::upgrade)
    }

    /// New memory of this device: `elements`, 0 where the device was told so.
    pub(super) fn room(&self, cuda: &CudaDevice, dtype: DType, elements: usize) -> Result<Tensor, EpErrorKind> {
        let bytes = elements.max(1).saturating_mul(dtype.size_in_bytes());
        let address = allocate_plain(cuda, "peer", bytes).map_err(|error| device_kind(&error))?;
        // SAFETY: the memory is new, as large as that, and nobody else's to free.
        let room = unsafe { room_of(cuda, dtype, address, elements.max(1)) }?;
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(room.clone());
        Ok(room)
    }
}

/// What the host and the kernels of a rank tell each other; `Lifeline` of the source.
#[repr(C)]
struct Words {
    given_up: AtomicU32,
    waiting: [AtomicU32; MAX_RANKS],
}

/// [`Words`] in memory of the host that all devices see.
pub(super) struct Lifeline {
    words: NonNull<Words>,
    context: Arc<CudaContext>,
}

// SAFETY: the words are atomic.
unsafe impl Send for Lifeline {}
// SAFETY: as above.
unsafe impl Sync for Lifeline {}

impl Lifeline {
    pub(super) fn new(cuda: &CudaDevice) -> Result<Self, EpErrorKind> {
        let context = Arc::clone(cuda.cuda_stream().context());
        context.bind_to_thread().map_err(|error| device_kind(&error))?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a context is current.
        let words = unsafe { result::malloc_host(size_of::<Words>(), flags) }.map_err(|error| device_kind(&error))?;
        // SAFETY: as large as that, and not yet anybody else's.
        unsafe { ptr::write_bytes(words.cast::<u8>(), 0, size_of::<Words>()) };
        match NonNull::new(words.cast()) {
            Some(words) => Ok(Self { words, context }),
            None => Err(EpErrorKind::Library("the host gave no memory to the device".to_string())),
        }
    }

    fn words(&self) -> &Words {
        // SAFETY: it is there until this is dropped, and was zeroed.
        unsafe { self.words.as_ref() }
    }

    /// For kernels; devices know the memory by the address that the host has for it.
    pub(super) fn address(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    pub(super) fn give_up(&self) {
        self.words().given_up.store(1, Ordering::Release);
    }

    /// The ranks for which the device has waited long.
    pub(super) fn waits_for(&self) -> Vec<usize> {
        let waits = |(rank, word): (usize, &AtomicU32)| (word.load(Ordering::Acquire) != 0).then_some(rank);
        self.words().waiting.iter().enumerate().filter_map(waits).collect()
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        // SAFETY: the last of those that know it; kernels that do have ended.
        let freed = self
            .context
            .bind_to_thread()
            .and_then(|()| unsafe { result::free_host(self.words.as_ptr().cast::<c_void>()) });
        if let Err(error) = freed {
            tracing::warn!(%error, "memory of the host was not freed");
        }
    }
}

/// Lets kernels of this rank's device use the memory of another.
pub(super) fn reach(cuda: &CudaDevice, ordinal: usize) -> Result<(), EpErrorKind> {
    let stream = cuda.cuda_stream();
    let own = stream.context();
    if own.ordinal() == ordinal {
        return Ok(());
    }
    let other = CudaContext::new(ordinal).map_err(|error| device_kind(&error))?;
    own.bind_to_thread().map_err(|error| device_kind(&error))?;
    let mut can = 0;
    // SAFETY: `can` is written during the call.
    let asked = unsafe { sys::cuDeviceCanAccessPeer(&mut can, own.cu_device(), other.cu_device()) };
    asked.result().map_err(|error| device_kind(&error))?;
    if can == 0 {
        let own = own.ordinal();
        return Err(EpErrorKind::Library(format!("CUDA device {own} does not reach the memory of device {ordinal}")));
    }
    // SAFETY: both contexts live, since devices are never taken down here.
    match unsafe { sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0) } {
        sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        status => {
            let own = own.ordinal();
            Err(EpErrorKind::Library(format!(
                "CUDA device {own} may not use the memory of device {ordinal}: {status:?}"
            )))
        }
    }
}
