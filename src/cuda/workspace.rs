//! Memory between the kernels of a call, kept from call to call.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, sys};
use candle_core::{CudaDevice, Result, bail};
use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// Bytes between the starts of parts.
const ALIGNMENT: usize = 256;

thread_local! {
    /// By device and stream. A thread has a stream of its own, so calls that share a workspace follow each other.
    static WORKSPACES: RefCell<Workspaces> = RefCell::default();
}

/// Those of threads that have ended, by device: nothing can be freed in the order of a stream that ends with its thread.
static LEFT: LazyLock<Mutex<HashMap<usize, Vec<Workspace>>>> = LazyLock::new(Mutex::default);

fn left() -> MutexGuard<'static, HashMap<usize, Vec<Workspace>>> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Workspaces(HashMap<(usize, usize), Workspace>);

impl Drop for Workspaces {
    fn drop(&mut self) {
        for ((ordinal, _), workspace) in self.0.drain() {
            left().entry(ordinal).or_default().push(workspace);
        }
    }
}

#[derive(Default)]
struct Workspace {
    bytes: Option<CudaSlice<u8>>,
    /// Smaller ones, which captured graphs may hold.
    outgrown: Vec<CudaSlice<u8>>,
    /// What the blocks of a cooperative kernel tell each other, and smaller ones.
    signals: Option<CudaSlice<u32>>,
    outgrown_signals: Vec<CudaSlice<u32>>,
}

impl Workspace {
    /// Runs `f` on the workspace of the calling thread on the stream of `device`.
    fn with<R>(device: &CudaDevice, f: impl FnOnce(&mut Self, &Arc<CudaStream>) -> Result<R>) -> Result<R> {
        let stream = device.cuda_stream();
        let ordinal = stream.context().ordinal();
        let place = (ordinal, stream.cu_stream() as usize);
        WORKSPACES.with_borrow_mut(|workspaces| {
            let workspace = match workspaces.0.entry(place) {
                Entry::Occupied(held) => held.into_mut(),
                Entry::Vacant(free) => free.insert(Self::new(device, ordinal)?),
            };
            f(workspace, &stream)
        })
    }

    /// One that a thread has left, when the device has done what that thread gave it; an empty one where there is none.
    fn new(device: &CudaDevice, ordinal: usize) -> Result<Self> {
        let is_captured = check_not_captured(&device.cuda_stream(), "").is_err();
        let inherited = if is_captured { None } else { left().get_mut(&ordinal).and_then(Vec::pop) };
        match inherited {
            Some(workspace) => match device.cuda_stream().context().synchronize() {
                Ok(()) => Ok(workspace),
                Err(error) => bail!("cuda: device {ordinal} cannot be waited for: {error}"),
            },
            None => Ok(Self::default()),
        }
    }
}

/// Refuses to allocate what a graph that is being captured would hold.
fn check_not_captured(stream: &CudaStream, op: &str) -> Result<()> {
    match stream.capture_status() {
        Ok(sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE) | Err(_) => Ok(()),
        Ok(_) => bail!("{op}: the workspace must grow while a graph is captured; make the same call once before"),
    }
}

/// The address of `len` numbers that start at 0 and that the kernels of the calling thread's stream alone change.
pub(crate) fn signals(device: &CudaDevice, op: &str, len: usize) -> Result<u64> {
    Workspace::with(device, |workspace, stream| {
        let held = workspace.signals.as_ref().map_or(0, CudaSlice::len);
        if held < len {
            check_not_captured(stream, op)?;
            let grown = device.alloc_zeros::<u32>(len.next_power_of_two())?;
            workspace.outgrown_signals.extend(workspace.signals.replace(grown));
        }
        Ok(workspace.signals.as_ref().map_or(0, |signals| signals.device_ptr(stream).0))
    })
}

/// The addresses of parts of the calling thread's workspace on the stream of `device`, of as many bytes as asked for, with
/// anything in them. They are good for kernels on that stream until the next call of this function, and in captured graphs
/// as long as the thread lives.
pub(crate) fn workspace<const N: usize>(device: &CudaDevice, op: &str, parts: [usize; N]) -> Result<[u64; N]> {
    let mut len = 0usize;
    let mut starts = [0; N];
    for (start, part) in starts.iter_mut().zip(parts) {
        *start = len as u64;
        len = match part.checked_next_multiple_of(ALIGNMENT).and_then(|part| len.checked_add(part)) {
            Some(len) if len <= isize::MAX as usize => len,
            _ => bail!("{op}: a workspace of {parts:?} bytes cannot be counted"),
        };
    }
    Workspace::with(device, |workspace, stream| {
        let held = workspace.bytes.as_ref().map_or(0, CudaSlice::len);
        if held < len {
            check_not_captured(stream, op)?;
            // What is outgrown stays, so that it grows by half at least, not by a little again and again.
            let len = len.max(held + held / 2);
            // SAFETY: kernels write what they read of it.
            let grown = match unsafe { device.alloc::<u8>(len) } {
                Ok(grown) => grown,
                Err(error) => bail!("{op}: cannot allocate {len} bytes on {:?}: {error}", device.id()),
            };
            workspace.outgrown.extend(workspace.bytes.replace(grown));
        }
        let first = workspace.bytes.as_ref().map_or(0, |bytes| bytes.device_ptr(stream).0);
        Ok(starts.map(|start| first + start))
    })
}
