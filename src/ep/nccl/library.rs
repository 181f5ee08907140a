//! NCCL as it is called: the few functions that this crate needs, looked up in the library when the first group is built, so
//! that programs start without it and hear what is missing. Errors say what the library said; only what version 2.18 has is called.

use super::super::device::Carrier;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

/// Where the library is looked for, by the rules of the system's loader.
const NAME: &str = "libnccl.so.2";
/// The oldest version with everything that is called here, as the library numbers itself.
pub(super) const OLDEST_VERSION: i32 = 21800;
const ID_BYTES: usize = 128;

type Handle = *mut c_void;
type Stream = *mut c_void;
type Status = c_int;

const SUCCESS: Status = 0;
const SUM: c_int = 0;

/// What the ranks of one group recognise each other by.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId([u8; ID_BYTES]);

/// A communicator of the library. Whoever has a copy sees to it that none is used after the end.
#[derive(Clone, Copy)]
pub(super) struct Comm {
    functions: &'static Functions,
    handle: Handle,
}

// SAFETY: the library lets any thread use a communicator, one at a time; only an abort may come in between.
unsafe impl Send for Comm {}

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),* $(,)?) -> $result:ty;)*) => {
        /// The library, which stays loaded.
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
            _library: Library,
        }

        impl Functions {
            /// # Safety
            /// `library` is NCCL: its functions have the types that they are declared with.
            unsafe fn look_up(library: Library) -> Result<Self, String> {
                $(
                    // SAFETY: the caller's promise.
                    let $field = match unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($name) } {
                        Ok(symbol) => *symbol,
                        Err(error) => return Err(format!("{NAME} lacks a function: {error}")),
                    };
                )*
                Ok(Self { $($field,)* _library: library })
            }
        }
    };
}

functions! {
    get_version = b"ncclGetVersion": fn(*mut c_int) -> Status;
    get_unique_id = b"ncclGetUniqueId": fn(*mut UniqueId) -> Status;
    comm_init_rank = b"ncclCommInitRank": fn(*mut Handle, c_int, UniqueId, c_int) -> Status;
    comm_destroy = b"ncclCommDestroy": fn(Handle) -> Status;
    comm_abort = b"ncclCommAbort": fn(Handle) -> Status;
    get_error_string = b"ncclGetErrorString": fn(Status) -> *const c_char;
    get_last_error = b"ncclGetLastError": fn(Handle) -> *const c_char;
    group_start = b"ncclGroupStart": fn() -> Status;
    group_end = b"ncclGroupEnd": fn() -> Status;
    all_gather = b"ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> Status;
    reduce_scatter = b"ncclReduceScatter": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;
    all_reduce = b"ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;
    reduce = b"ncclReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, Handle, Stream) -> Status;
    broadcast = b"ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;
    send = b"ncclSend": fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> Status;
    recv = b"ncclRecv": fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;
}

impl Functions {
    /// The library, loaded once; or why it cannot be used, which stays so.
    fn get() -> Result<&'static Self, String> {
        static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
        FUNCTIONS.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, String> {
        // SAFETY: what NCCL runs when it is loaded asks nothing of its caller.
        let library = unsafe { Library::new(NAME) };
        let library = library.map_err(|error| {
            let needed = version_name(OLDEST_VERSION);
            format!("{NAME} cannot be loaded, NCCL {needed} or newer is needed: {error}")
        })?;
        // SAFETY: it has the name of NCCL.
        unsafe { Self::look_up(library) }
    }

    /// The call, the number of the error, what that means, and the last words of the library.
    fn checked(&self, call: &str, status: Status) -> Result<(), String> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: every number has a meaning, and the last words may be asked for without a communicator.
        let (meaning, last) =
            unsafe { (text((self.get_error_string)(status)), text((self.get_last_error)(std::ptr::null_mut()))) };
        let mut what = format!("{call}: error {status} ({meaning})");
        if !last.is_empty() {
            what.push_str(&format!("; its last words: {last}"));
        }
        Err(what)
    }
}

/// The version of the library that was found.
pub(super) fn version() -> Result<i32, String> {
    let (functions, mut version) = (Functions::get()?, 0);
    // SAFETY: `version` is there during the call.
    functions.checked("ncclGetVersion", unsafe { (functions.get_version)(&raw mut version) })?;
    Ok(version)
}

/// `2.18.3` for 21803.
pub(super) fn version_name(version: i32) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

impl UniqueId {
    pub(super) fn new() -> Result<Self, String> {
        let (functions, mut id) = (Functions::get()?, Self([0; ID_BYTES]));
        // SAFETY: `id` is there during the call.
        functions.checked("ncclGetUniqueId", unsafe { (functions.get_unique_id)(&raw mut id) })?;
        Ok(id)
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        self.0.to_vec()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl Comm {
    /// Waits until all ranks of `id` have come. The context of this rank's device is current.
    pub(super) fn join(id: UniqueId, rank: usize, world_size: usize) -> Result<Self, String> {
        let (functions, mut handle) = (Functions::get()?, std::ptr::null_mut());
        // SAFETY: `handle` is written before it is read, where the call succeeds.
        let status = unsafe { (functions.comm_init_rank)(&raw mut handle, world_size as c_int, id, rank as c_int) };
        functions.checked("ncclCommInitRank", status)?;
        match handle.is_null() {
            true => Err("ncclCommInitRank: it gave no communicator".to_string()),
            false => Ok(Self { functions, handle }),
        }
    }
}

impl Carrier for Comm {
    unsafe fn abort(self) -> Result<(), String> {
        // SAFETY: the caller's promise.
        self.functions.checked("ncclCommAbort", unsafe { (self.functions.comm_abort)(self.handle) })
    }

    unsafe fn destroy(self) -> Result<(), String> {
        // SAFETY: the caller's promise.
        self.functions.checked("ncclCommDestroy", unsafe { (self.functions.comm_destroy)(self.handle) })
    }
}

/// What the library counts in, by its own numbers.
#[derive(Clone, Copy)]
#[repr(i32)]
pub(super) enum Element {
    Byte = 1,
    F16 = 6,
    F32 = 7,
    F64 = 8,
    BF16 = 9,
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
    comm: Comm,
    stream: Stream,
}

impl Queue {
    pub(super) fn of(comm: &Comm, stream: &CudaStream) -> Self {
        Self { comm: *comm, stream: stream.cu_stream().cast() }
    }

    /// Work that is enqueued as one. The group is closed even where something in it was refused.
    pub(super) fn grouped(&self, work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        let functions = self.comm.functions;
        // SAFETY: takes nothing.
        functions.checked("ncclGroupStart", unsafe { (functions.group_start)() })?;
        let done = work();
        // SAFETY: a group is open.
        let closed = functions.checked("ncclGroupEnd", unsafe { (functions.group_end)() });
        done.and(closed)
    }

    /// # Safety
    /// See [`Queue`]; `to` has room for what all ranks send, `from.len` each.
    pub(super) unsafe fn all_gather(&self, from: Span, to: u64) -> Result<(), String> {
        let Comm { functions, handle } = self.comm;
        // SAFETY: the caller's promise.
        functions.checked("ncclAllGather", unsafe {
            (functions.all_gather)(from.address as _, to as _, from.len, from.element as c_int, handle, self.stream)
        })
    }

    /// # Safety
    /// See [`Queue`]; `to` has room for `from.len`, and `from` is memory of rank `root`, anything elsewhere.
    pub(super) unsafe fn broadcast(&self, from: Span, to: u64, root: usize) -> Result<(), String> {
        let Comm { functions, handle } = self.comm;
        // SAFETY: the caller's promise.
        functions.checked("ncclBroadcast", unsafe {
            (functions.broadcast)(
                from.address as _,
                to as _,
                from.len,
                from.element as c_int,
                root as c_int,
                handle,
                self.stream,
            )
        })
    }

    /// # Safety
    /// See [`Queue`]; `to` has room for `from.len`.
    pub(super) unsafe fn all_reduce(&self, from: Span, to: u64) -> Result<(), String> {
        let Comm { functions, handle } = self.comm;
        // SAFETY: the caller's promise.
        functions.checked("ncclAllReduce", unsafe {
            (functions.all_reduce)(
                from.address as _,
                to as _,
                from.len,
                from.element as c_int,
                SUM,
                handle,
                self.stream,
            )
        })
    }

    /// # Safety
    /// See [`Queue`]; `from` begins as many times `to.len` as there are ranks.
    pub(super) unsafe fn reduce_scatter(&self, from: u64, to: Span) -> Result<(), String> {
        let Comm { functions, handle } = self.comm;
        // SAFETY: the caller's promise.
        functions.checked("ncclReduceScatter", unsafe {
            (functions.reduce_scatter)(
                from as _,
                to.address as _,
                to.len,
                to.element as c_int,
                SUM,
                handle,
                self.stream,
            )
        })
    }

    /// # Safety
    /// See [`Queue`]; on rank `root`, `to` has room for `from.len`.
    pub(super) unsafe fn reduce(&self, from: Span, to: u64, root: usize) -> Result<(), String> {
        let Comm { functions, handle } = self.comm;
        // SAFETY: the caller's promise.
        functions.checked("ncclReduce", unsafe {
            (functions.reduce)(
                from.address as _,
                to as _,
                from.len,
                from.element as c_int,
                SUM,
                root as c_int,
                handle,
                self.stream,
            )
        })
    }

    /// # Safety
    /// See [`Queue`]; `peer` receives as much in the same group.
    pub(super) unsafe fn send(&self, from: Span, peer: usize) -> Result<(), String> {
        let Comm { functions, handle } = self.comm;
        // SAFETY: the caller's promise.
        functions.checked("ncclSend", unsafe {
            (functions.send)(from.address as _, from.len, from.element as c_int, peer as c_int, handle, self.stream)
        })
    }

    /// # Safety
    /// See [`Queue`]; `peer` sends as much in the same group.
    pub(super) unsafe fn receive(&self, to: Span, peer: usize) -> Result<(), String> {
        let Comm { functions, handle } = self.comm;
        // SAFETY: the caller's promise.
        functions.checked("ncclRecv", unsafe {
            (functions.recv)(to.address as _, to.len, to.element as c_int, peer as c_int, handle, self.stream)
        })
    }
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
