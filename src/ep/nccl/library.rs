//! The calls of the library, with errors that say what it said. Only what version 2.18 has is called.

use candle_core::cuda_backend::cudarc::nccl::result::{self, NcclError, NcclStatus};
use candle_core::cuda_backend::cudarc::nccl::sys;
use std::ffi::{CStr, c_char, c_void};

/// The oldest version with everything that is called here, as the library numbers itself.
pub(super) const OLDEST_VERSION: i32 = 21800;
const ID_BYTES: usize = 128;

/// What the ranks of one group recognise each other by.
#[derive(Clone, Copy)]
pub(super) struct UniqueId(sys::ncclUniqueId);

/// A communicator of the library. Whoever has a copy sees to it that none is used after the end.
#[derive(Clone, Copy)]
pub(super) struct Comm(sys::ncclComm_t);

// SAFETY: the library lets any thread use a communicator, one at a time; only an abort may come in between.
unsafe impl Send for Comm {}

/// The version of the library that was found.
pub(super) fn version() -> Result<i32, String> {
    result::get_nccl_version().map_err(|error| describe("ncclGetVersion", &error))
}

/// `2.18.3` for 21803.
pub(super) fn version_name(version: i32) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

impl UniqueId {
    pub(super) fn new() -> Result<Self, String> {
        result::get_uniqueid().map(Self).map_err(|error| describe("ncclGetUniqueId", &error))
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        self.0.internal.iter().map(|&byte| byte as u8).collect()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; ID_BYTES] = bytes.try_into().ok()?;
        Some(Self(sys::ncclUniqueId { internal: bytes.map(|byte| byte as c_char) }))
    }
}

impl Comm {
    /// Waits until all ranks of `id` have come. The context of this rank's device is current.
    pub(super) fn join(id: UniqueId, rank: usize, world_size: usize) -> Result<Self, String> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: `comm` is written before it is read, where the call succeeds.
        let joined = unsafe { result::comm_init_rank(&mut comm, world_size as i32, id.0, rank as i32) };
        checked("ncclCommInitRank", joined)?;
        if comm.is_null() { Err("ncclCommInitRank: it gave no communicator".to_string()) } else { Ok(Self(comm)) }
    }

    /// Gives it up: whatever waits for other ranks, on the device or in a call, ends without a result.
    ///
    /// # Safety
    /// No copy is used for another call afterwards.
    pub(super) unsafe fn abort(self) -> Result<(), String> {
        // SAFETY: the caller's promise.
        checked("ncclCommAbort", unsafe { result::comm_abort(self.0) })
    }

    /// Ends it, when what was enqueued is done.
    ///
    /// # Safety
    /// No copy is used for another call afterwards.
    pub(super) unsafe fn destroy(self) -> Result<(), String> {
        // SAFETY: the caller's promise.
        checked("ncclCommDestroy", unsafe { result::comm_destroy(self.0) })
    }
}

/// What the library counts in.
#[derive(Clone, Copy)]
pub(super) enum Element {
    Byte,
    F16,
    BF16,
    F32,
    F64,
}

impl Element {
    fn raw(self) -> sys::ncclDataType_t {
        match self {
            Self::Byte => sys::ncclDataType_t::ncclUint8,
            Self::F16 => sys::ncclDataType_t::ncclFloat16,
            Self::BF16 => sys::ncclDataType_t::ncclBfloat16,
            Self::F32 => sys::ncclDataType_t::ncclFloat32,
            Self::F64 => sys::ncclDataType_t::ncclFloat64,
        }
    }
}

/// Part of the memory of this rank's device.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) address: u64,
    /// In elements.
    pub(super) len: usize,
    pub(super) element: Element,
}

/// A communicator, and the stream on which its work is enqueued.
///
/// All calls have in common: the spans are memory of the device that stays alive until the stream has come to the work, and
/// what is received is written by nobody else. What a call is given for the other ranks is the same on all of them.
pub(super) struct Queue {
    pub(super) comm: Comm,
    pub(super) stream: sys::cudaStream_t,
}

impl Queue {
    /// Work that is enqueued as one. The group is closed even where something in it was refused.
    pub(super) fn grouped(&self, work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        checked("ncclGroupStart", result::group_start())?;
        let done = work();
        let closed = checked("ncclGroupEnd", result::group_end());
        done.and(closed)
    }

    /// # Safety
    /// See [`Queue`]; `to` has room for what all ranks send, `from.len` each.
    pub(super) unsafe fn all_gather(&self, from: Span, to: u64) -> Result<(), String> {
        let (send, receive) = (from.address as *const c_void, to as *mut c_void);
        // SAFETY: the caller's promise.
        let done = unsafe { result::all_gather(send, receive, from.len, from.element.raw(), self.comm.0, self.stream) };
        checked("ncclAllGather", done)
    }

    /// # Safety
    /// See [`Queue`]; `to` has room for `from.len`, and `from` is memory of rank `root`, anything elsewhere.
    pub(super) unsafe fn broadcast(&self, from: Span, to: u64, root: usize) -> Result<(), String> {
        let (send, receive, kind) = (from.address as *const c_void, to as *mut c_void, from.element.raw());
        // SAFETY: the caller's promise.
        let done = unsafe { result::broadcast(send, receive, from.len, kind, root as i32, self.comm.0, self.stream) };
        checked("ncclBroadcast", done)
    }

    /// # Safety
    /// See [`Queue`]; `to` has room for `from.len`.
    pub(super) unsafe fn all_reduce(&self, from: Span, to: u64) -> Result<(), String> {
        let (send, receive, kind) = (from.address as *const c_void, to as *mut c_void, from.element.raw());
        let sum = sys::ncclRedOp_t::ncclSum;
        // SAFETY: the caller's promise.
        let done = unsafe { result::all_reduce(send, receive, from.len, kind, sum, self.comm.0, self.stream) };
        checked("ncclAllReduce", done)
    }

    /// # Safety
    /// See [`Queue`]; `from` begins as many times `to.len` as there are ranks.
    pub(super) unsafe fn reduce_scatter(&self, from: u64, to: Span) -> Result<(), String> {
        let (send, receive, kind) = (from as *const c_void, to.address as *mut c_void, to.element.raw());
        let sum = sys::ncclRedOp_t::ncclSum;
        // SAFETY: the caller's promise.
        let done = unsafe { result::reduce_scatter(send, receive, to.len, kind, sum, self.comm.0, self.stream) };
        checked("ncclReduceScatter", done)
    }

    /// # Safety
    /// See [`Queue`]; on rank `root`, `to` has room for `from.len`.
    pub(super) unsafe fn reduce(&self, from: Span, to: u64, root: usize) -> Result<(), String> {
        let (send, receive, kind) = (from.address as *const c_void, to as *mut c_void, from.element.raw());
        let sum = sys::ncclRedOp_t::ncclSum;
        // SAFETY: the caller's promise.
        let done = unsafe { result::reduce(send, receive, from.len, kind, sum, root as i32, self.comm.0, self.stream) };
        checked("ncclReduce", done)
    }

    /// # Safety
    /// See [`Queue`]; `peer` receives as much in the same group.
    pub(super) unsafe fn send(&self, from: Span, peer: usize) -> Result<(), String> {
        let (send, kind) = (from.address as *const c_void, from.element.raw());
        // SAFETY: the caller's promise.
        checked("ncclSend", unsafe { result::send(send, from.len, kind, peer as i32, self.comm.0, self.stream) })
    }

    /// # Safety
    /// See [`Queue`]; `peer` sends as much in the same group.
    pub(super) unsafe fn receive(&self, to: Span, peer: usize) -> Result<(), String> {
        let (receive, kind) = (to.address as *mut c_void, to.element.raw());
        // SAFETY: the caller's promise.
        checked("ncclRecv", unsafe { result::recv(receive, to.len, kind, peer as i32, self.comm.0, self.stream) })
    }
}

fn checked(call: &str, outcome: Result<NcclStatus, NcclError>) -> Result<(), String> {
    outcome.map(drop).map_err(|error| describe(call, &error))
}

/// The call, the number and name of the error, what that means, and the last words of the library.
fn describe(call: &str, NcclError(code): &NcclError) -> String {
    // SAFETY: the library gives strings that are never released, or null.
    let (meaning, last) =
        unsafe { (text(sys::ncclGetErrorString(*code)), text(sys::ncclGetLastError(std::ptr::null_mut()))) };
    let mut what = format!("{call}: error {} ({code:?}, {meaning})", *code as u32);
    if !last.is_empty() {
        what.push_str(&format!("; its last words: {last}"));
    }
    what
}

/// # Safety
/// `words` is null or a string that stays alive meanwhile.
unsafe fn text(words: *const c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().trim().to_string()
}
