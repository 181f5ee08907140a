//! Ranks with a CUDA device each, whose rows NCCL carries.
//!
//! ```text
//! collective(rows):
//!     meet the others on the host, as ranks of the CPU do      else: their errors
//!     enqueue the library's operation on the device's stream   else: poison the group, Library
//!     hand an event behind it to the watchdog
//! ```

mod library;

use super::call::Site;
use super::communicator::{AbortHandle, Communicator, Deadlines, Health};
use super::control::Control;
use super::device::Carrier as _;
use super::device::{OnDevice, Shares, group_given_up};
use super::error::{Collective, EpError, EpErrorKind};
use super::procs::Procs;
use super::threads::Threads;
use super::wire::rendezvous_error;
use candle_core::cuda_backend::cudarc::driver::CudaContext;
use candle_core::{CudaDevice, DType, Device, Tensor};
use library::{Comm, Element, OLDEST_VERSION, Queue, Span, UniqueId, version_name};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How often is looked whether the group fails while the library brings the ranks together.
const LOOK: Duration = Duration::from_millis(10);

/// A rank with a CUDA device of its own; NCCL carries the rows.
///
/// It stands on a group on the host: [`Threads`] where the ranks are threads of one process, [`Procs`] where they are
/// processes. Every call meets the others there first, so checks, errors, deadlines, labels and generations are the host
/// group's, and nothing is moved by a call that not all ranks have made. Then the operation is enqueued on Candle's current
/// stream of the device, and the call returns without waiting for the device. Besides what every [`Communicator`] promises:
///
/// * Tensors are on the device that the rank was built with, the same [`Device`] and not only the same ordinal. An argument
///   may be dropped or written after the call by work of the same stream.
/// * What an `Ok` tensor holds counts only after [`Communicator::settle`], which waits for the device. Work that does not end
///   within the deadline poisons the group: with [`Timeout`](EpErrorKind::Timeout) where ranks of this machine have not begun as
///   many calls or are not seen any more, else with [`Unfinished`](EpErrorKind::Unfinished), which names the call. Whatever
///   poisons the group makes the device drop the work that waits for other ranks, so its queue goes on.
/// * Sums are in NCCL's order: the same in every run of one group of devices, but not that of the CPU.
/// * In a stream that is being captured the ranks meet when it is captured, not when it is replayed, and a replay has no
///   deadline but that of the next `settle`. NCCL wants graphs to be dropped before the rank is.
/// * Until [`Communicator::start_serving`] each call meets the others a second time at its end, on the host: a rank that went on alone might
///   load kernels, and the driver might keep the others from enqueueing their part until its device is done.
/// * [`Library`](EpErrorKind::Library) is what NCCL refuses; it poisons the group.
/// * The meeting of the ranks at the start is call number 0 of the group.
///
/// [`Communicator::all_gather_bytes`] and [`Communicator::barrier`] concern the host only.
///
/// The library, `libnccl.so.2` of version 2.18 or newer, is looked for by the rules of the system's loader when the first group is
/// built; programs start without it.
pub struct Nccl(OnDevice<Comm>);

/// What a rank tells the others at the start.
#[derive(Serialize, Deserialize)]
struct Hello {
    version: Result<i32, String>,
    host: String,
    ordinal: usize,
    uuid: Vec<u8>,
    /// Of rank 0.
    id: Option<Result<Vec<u8>, String>>,
}

impl Nccl {
    /// Makes a rank that is a thread of this process one of a CUDA device. All ranks call it, each with a device of its own,
    /// and wait for each other at most for the current deadline.
    ///
    /// # Errors
    ///
    /// [`BadArgument`](EpErrorKind::BadArgument): `device` is no CUDA device. [`Library`](EpErrorKind::Library): NCCL is
    /// older than 2.18 somewhere, two ranks have the same device, or NCCL says no. [`Mismatch`](EpErrorKind::Mismatch): ranks
    /// have different versions of it. [`Unfinished`](EpErrorKind::Unfinished): it did not bring the ranks together in time.
    /// And [those of every call](Communicator#).
    pub fn over_threads(threads: Threads, device: &Device) -> Result<Self, EpError> {
        Self::over(Box::new(threads), device)
    }

    /// Makes a rank that is a process one of a CUDA device, as [`Nccl::over_threads`] does.
    ///
    /// # Errors
    ///
    /// Those of [`Nccl::over_threads`].
    pub fn over_procs(procs: Procs, device: &Device) -> Result<Self, EpError> {
        Self::over(Box::new(procs), device)
    }

    /// Leaves this group, and joins the next generation of it as the same rank on the same device.
    ///
    /// # Errors
    ///
    /// Those of [`Threads::rebuild`] or [`Procs::rebuild`], and of [`Nccl::over_threads`].
    pub fn rebuild(self) -> Result<Self, EpError> {
        let (control, device) = self.0.rebuilt()?;
        Self::over(control, &device)
    }

    /// The device of this rank.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    fn over(mut control: Box<dyn Control>, device: &Device) -> Result<Self, EpError> {
        let (rank, generation) = (control.rank(), control.generation());
        let label = format!("generation {generation}").into();
        let site = Site { op: Collective::Rendezvous, step: 0, label };
        let Device::Cuda(cuda) = device else {
            let what = format!("device is {:?}, it must be a CUDA device", device.location());
            return Err(control.give_up(&site, EpErrorKind::BadArgument(what)));
        };
        let hellos = greet(&mut *control, cuda)?;
        let id = agree(&hellos).map_err(|kind| rendezvous_error(rank, generation, kind))?;
        let context = Arc::clone(cuda.cuda_stream().context());
        let comm = bring_together(&*control, id, &context).map_err(|kind| control.give_up(&site, kind))?;
        Ok(Self(OnDevice::start(comm, control, device, cuda, &site)?))
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.0.control.rank()
    }

    fn world_size(&self) -> usize {
        self.0.control.world_size()
    }

    fn set_label(&mut self, label: &str) {
        self.0.control.set_label(label);
    }

    fn deadline(&self) -> Duration {
        self.0.control.deadline()
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.0.control.set_deadline(deadline);
    }

    fn deadlines(&self) -> Deadlines {
        self.0.control.deadlines()
    }

    fn start_serving(&mut self) {
        self.0.start_serving();
    }

    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let terms = self.0.place().all_gather(rows, counts);
        let (site, _, arrived) = self.0.announce(Collective::AllGather, terms, Vec::new())?;
        let shares = Shares::new(rows, counts);
        let rank = self.rank();
        self.0.carry((&site, arrived), rows, &shares.shape(shares.num_rows()), |comm, stream, from, to| {
            let queue = Queue::of(comm, stream);
            let own = Span { address: from, len: shares.bytes(rank), element: Element::Byte };
            if shares.are_empty() {
                return Ok(());
            }
            if shares.are_equal() {
                // SAFETY: `from` and `to` are a rank's rows and room for those of all, contiguous.
                return unsafe { queue.all_gather(own, to) };
            }
            queue.grouped(|| {
                shares.filled().try_for_each(|root| {
                    let place = to + shares.offset(root);
                    // Whoever is not the root names no memory of its own, since that may be none.
                    let address = if root == rank { from } else { place };
                    // SAFETY: as above; the part of each rank has its own place.
                    unsafe { queue.broadcast(Span { address, len: shares.bytes(root), ..own }, place, root) }
                })
            })
        })
    }

    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let terms = self.0.place().reduce_scatter(rows, counts);
        let (site, _, arrived) = self.0.announce(Collective::ReduceScatter, terms, Vec::new())?;
        let shares = Shares::new(rows, counts);
        let (rank, element) = (self.rank(), element_of(rows.dtype()));
        self.0.carry((&site, arrived), rows, &shares.shape(shares.rows(rank)), |comm, stream, from, to| {
            let queue = Queue::of(comm, stream);
            if shares.are_empty() {
                return Ok(());
            }
            if shares.are_equal() {
                let to = Span { address: to, len: shares.elements(rank), element };
                // SAFETY: `from` and `to` are rows for all ranks and room for those of this one, contiguous.
                return unsafe { queue.reduce_scatter(from, to) };
            }
            let span = |root| Span { address: from + shares.offset(root), len: shares.elements(root), element };
            queue.grouped(|| {
                // SAFETY: as above; only rank `root` writes to `to`.
                shares.filled().try_for_each(|root| unsafe { queue.reduce(span(root), to, root) })
            })
        })
    }

    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError> {
        let terms = self.0.place().all_to_all(rows, send_counts);
        let (site, notes, arrived) = self.0.announce(Collective::AllToAll, terms, note_of(send_counts))?;
        let rank = self.rank();
        let counts: Option<Vec<usize>> = notes.iter().map(|note| count_of(note, rank)).collect();
        let Some(counts) = counts else {
            let what = "a rank did not say how many rows it sends".to_string();
            return Err(self.0.control.give_up(&site, EpErrorKind::Tensor(what)));
        };
        let (sent, received) = (Shares::new(rows, send_counts), Shares::new(rows, &counts));
        let tensor =
            self.0.carry((&site, arrived), rows, &received.shape(received.num_rows()), |comm, stream, from, to| {
                let queue = Queue::of(comm, stream);
                if sent.are_empty() && received.are_empty() {
                    return Ok(());
                }
                let send =
                    |peer| Span { address: from + sent.offset(peer), len: sent.bytes(peer), element: Element::Byte };
                let receive = |peer| Span {
                    address: to + received.offset(peer),
                    len: received.bytes(peer),
                    element: Element::Byte,
                };
                queue.grouped(|| {
                    // SAFETY: the parts are rows of this rank, and room for what each source said that it sends.
                    sent.filled().try_for_each(|peer| unsafe { queue.send(send(peer), peer) })?;
                    // SAFETY: as above.
                    received.filled().try_for_each(|peer| unsafe { queue.receive(receive(peer), peer) })
                })
            })?;
        Ok((tensor, counts))
    }

    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError> {
        let terms = self.0.place().all_reduce(values);
        let (site, _, arrived) = self.0.announce(Collective::AllReduce, terms, Vec::new())?;
        let (len, element) = (values.elem_count(), element_of(values.dtype()));
        self.0.carry((&site, arrived), values, values.dims(), |comm, stream, from, to| match len {
            0 => Ok(()),
            // SAFETY: `from` and `to` are `len` values and room for as many, contiguous.
            len => unsafe { Queue::of(comm, stream).all_reduce(Span { address: from, len, element }, to) },
        })
    }

    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EpError> {
        self.0.control.all_gather_bytes(bytes)
    }

    fn barrier(&mut self) -> Result<(), EpError> {
        self.0.control.barrier()
    }

    fn settle(&mut self) -> Result<(), EpError> {
        self.0.settle()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.0.control.abort_handle()
    }

    fn health(&self) -> Health {
        self.0.control.health()
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .field("generation", &self.generation())
            .field("device", &self.0.device.location())
            .finish_non_exhaustive()
    }
}

/// Tells all ranks what library and device this one has, and hears the same of them.
fn greet(control: &mut dyn Control, cuda: &CudaDevice) -> Result<Vec<Hello>, EpError> {
    let (rank, generation) = (control.rank(), control.generation());
    let stream = cuda.cuda_stream();
    let context = stream.context();
    let hello = Hello {
        version: library::version(),
        host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_string(),
        ordinal: context.ordinal(),
        uuid: context.uuid().map(|uuid| uuid.bytes.iter().map(|&byte| byte as u8).collect()).unwrap_or_default(),
        id: (rank == 0).then(|| UniqueId::new().map(UniqueId::to_bytes)),
    };
    let unreadable = |error: serde_json::Error| {
        rendezvous_error(rank, generation, EpErrorKind::Library(format!("a rank says what none would: {error}")))
    };
    let bytes = serde_json::to_vec(&hello).map_err(unreadable)?;
    let hellos = control.all_gather_bytes(&bytes)?;
    hellos.iter().map(|bytes| serde_json::from_slice(bytes).map_err(unreadable)).collect()
}

/// The number of the group, or what does not fit: every rank comes to the same.
fn agree(hellos: &[Hello]) -> Result<UniqueId, EpErrorKind> {
    let mut first = None;
    for (rank, hello) in hellos.iter().enumerate() {
        let version = match &hello.version {
            Ok(version) => *version,
            Err(what) => return Err(EpErrorKind::Library(format!("rank {rank}: {what}"))),
        };
        if version < OLDEST_VERSION {
            let (found, needed) = (version_name(version), version_name(OLDEST_VERSION));
            return Err(EpErrorKind::Library(format!("rank {rank} found NCCL {found}, it must be {needed} or newer")));
        }
        let expected = *first.get_or_insert(version);
        if version != expected {
            let name = |version| format!("NCCL {}", version_name(version));
            return Err(EpErrorKind::Mismatch { rank, expected: name(expected), found: name(version) });
        }
        let same = |other: &Hello| other.host == hello.host && other.uuid == hello.uuid;
        if let Some(other) = hellos.iter().take(rank).position(same) {
            let (ordinal, host) = (hello.ordinal, &hello.host);
            return Err(EpErrorKind::Library(format!(
                "ranks {other} and {rank} both have CUDA device {ordinal} of {host}; give each rank a device of its own"
            )));
        }
    }
    match hellos.first().and_then(|hello| hello.id.as_ref()) {
        Some(Ok(id)) => {
            UniqueId::from_bytes(id).ok_or_else(|| EpErrorKind::Library("the id of rank 0 is none".to_string()))
        }
        Some(Err(what)) => Err(EpErrorKind::Library(format!("rank 0: {what}"))),
        None => Err(EpErrorKind::Library("rank 0 made no id".to_string())),
    }
}

/// Has the library bring the ranks together, on a thread of its own, since nothing stops it there.
fn bring_together(control: &dyn Control, id: UniqueId, context: &Arc<CudaContext>) -> Result<Comm, EpErrorKind> {
    let (rank, world_size, deadline) = (control.rank(), control.world_size(), control.deadline());
    let (overseer, began, context) = (control.overseer(), Instant::now(), Arc::clone(context));
    let (sender, receiver) = channel();
    let join = move || {
        let bound = context.bind_to_thread().map_err(|error| format!("the device cannot be used: {error}"));
        let joined = sender.send(bound.and_then(|()| Comm::join(id, rank, world_size)));
        if let Err(refused) = joined
            && let Ok(comm) = refused.0
        {
            // SAFETY: nobody else has it.
            let _ = unsafe { comm.abort() };
        }
    };
    let thread = thread::Builder::new().name(format!("rank {rank} joins"));
    thread.spawn(join).map_err(|error| EpErrorKind::Library(format!("no thread to join on: {error}")))?;
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(joined) => return joined.map_err(EpErrorKind::Library),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(EpErrorKind::Library("ncclCommInitRank panicked".to_string()));
            }
            Err(RecvTimeoutError::Timeout) if overseer.has_failed() => return Err(group_given_up()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(kind) = overseer.lost() {
            return Err(kind);
        }
        if began.elapsed() >= deadline {
            return Err(EpErrorKind::Unfinished { op: Collective::Rendezvous, step: 0, deadline });
        }
    }
}

/// What the others must know of an all-to-all.
fn note_of(send_counts: &[usize]) -> Vec<u8> {
    send_counts.iter().flat_map(|&count| (count as u64).to_le_bytes()).collect()
}

fn count_of(note: &[u8], rank: usize) -> Option<usize> {
    let count = note.as_chunks().0.get(rank)?;
    usize::try_from(u64::from_le_bytes(*count)).ok()
}

/// Of what can be summed; anything else is refused before.
fn element_of(dtype: DType) -> Element {
    match dtype {
        DType::F16 => Element::F16,
        DType::BF16 => Element::BF16,
        DType::F32 => Element::F32,
        DType::F64 => Element::F64,
        _ => Element::Byte,
    }
}
