//! Memory between the kernels of a call, kept from call to call.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, sys};
use candle_core::{CudaDevice, Result, bail};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes between the starts of parts.
const ALIGNMENT: usize = 256;

thread_local! {
    /// By device and stream. A thread has a stream of its own, so calls that share a workspace follow each other.
    static WORKSPACES: RefCell<HashMap<(usize, usize), Workspace>> = RefCell::default();
}

#[derive(Default)]
struct Workspace {
    bytes: Option<CudaSlice<u8>>,
    /// Smaller ones, which captured graphs may hold.
    outgrown: Vec<CudaSlice<u8>>,
    /// Where the blocks of a cooperative kernel meet; 0 before and after.
    meeting: Option<CudaSlice<u32>>,
}

impl Workspace {
    /// Runs `f` on the workspace of the calling thread on the stream of `device`.
    fn with<R>(device: &CudaDevice, f: impl FnOnce(&mut Self, &Arc<CudaStream>) -> Result<R>) -> Result<R> {
        let stream = device.cuda_stream();
        let place = (stream.context().ordinal(), stream.cu_stream() as usize);
        WORKSPACES.with_borrow_mut(|workspaces| f(workspaces.entry(place).or_default(), &stream))
    }
}

/// Refuses to allocate what a graph that is being captured would hold.
fn check_not_captured(stream: &CudaStream, op: &str) -> Result<()> {
    match stream.capture_status() {
        Ok(sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE) | Err(_) => Ok(()),
        Ok(_) => bail!("{op}: the workspace must grow while a graph is captured; make the same call once before"),
    }
}

/// The address of two numbers that are 0 between the kernels of the calling thread's stream.
pub(crate) fn meeting(device: &CudaDevice, op: &str) -> Result<u64> {
    Workspace::with(device, |workspace, stream| {
        if workspace.meeting.is_none() {
            check_not_captured(stream, op)?;
            workspace.meeting = Some(device.alloc_zeros::<u32>(2)?);
        }
        Ok(workspace.meeting.as_ref().map_or(0, |meeting| meeting.device_ptr(stream).0))
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
