//! Ranks of one process whose devices reach each other's memory: kernels write and read there, and no library is between them.
//!
//! ```text
//! dispatch   meet on the host; one kernel pushes tokens to the rooms of the ranks that have their experts, and waits for theirs
//! combine    meet on the host; one kernel waits for the ranks, and pulls what they have made of this rank's tokens
//! others     meet on the host; copies to the others' rooms, a round, a copy out of the own room, a round
//! ```
//!
//! The kernels, and why two rooms of each kind are enough, are in `cuda/ep/peer.cu`, the flags in `cuda/ep/mailbox.cuh`.

mod kernels;
mod layer;
mod links;
mod rooms;

pub(super) use layer::Way;

use super::call::Site;
use super::communicator::{AbortHandle, Communicator, Deadlines, Health};
use super::control::Control;
use super::device::{Carrier, OnDevice, Shares, address_of, device_kind, tensor_kind};
use super::error::{Collective, EpError, EpErrorKind};
use super::rows;
use super::threads::Threads;
use super::wire::rendezvous_error;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, sys};
use candle_core::{CudaDevice, DType, Device, Tensor};
use kernels::Group;
use links::{Lifeline, Links, MAILBOX_WORDS, MAX_RANKS, reach};
use rooms::{Room, Rooms, Use, gather_words};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long the device is waited for when a rank leaves, before the memory that others may still write to is left to itself.
const DRAINING: Duration = Duration::from_secs(2);

/// A rank that is a thread of this process with a CUDA device of its own, where devices reach each other's memory.
///
/// It stands on a group on the host as `Nccl` does, and promises what that does: calls are compared there first, the work goes
/// to Candle's current stream, [`Communicator::settle`] waits for it, a captured call meets the others on the host when it is captured.
/// What differs:
///
/// * [`Strategy::Peer`](super::Strategy::Peer) is for it alone: tokens are pushed to, and results pulled from, the other
///   devices' memory, one kernel each.
/// * The other collectives are there for everything else; they copy twice, and sums are in rank order.
/// * Nothing traps or hangs: a kernel that waits for a rank that does not come is called off when the deadline is over or
///   the group fails, and the error is a [`Timeout`](EpErrorKind::Timeout) that names whom the device waited for.
/// * Rooms grow to the largest call so far, and a capture needs a call of its size before. They are freed when the last rank of
///   the group is dropped; graphs must be dropped before.
pub struct Peer {
    ground: OnDevice<Line>,
    ties: Ties,
    group: Group,
    rooms: Rooms,
    /// How many there were; the rooms take turns.
    dispatches: usize,
    combines: usize,
}

/// What kernels of this rank may use until they have ended.
struct Ties {
    cuda: CudaDevice,
    links: Arc<Links>,
    lifeline: Arc<Lifeline>,
}

/// How the watchdog calls off what waits.
#[derive(Clone)]
struct Line(Arc<Lifeline>);

impl Carrier for Line {
    unsafe fn abort(self) -> Result<(), String> {
        self.0.give_up();
        Ok(())
    }

    unsafe fn destroy(self) -> Result<(), String> {
        Ok(())
    }

    fn missing(&self) -> Vec<usize> {
        self.0.waits_for()
    }
}

/// What a rank tells the others at the start.
#[derive(Serialize, Deserialize)]
struct Hello {
    ordinal: usize,
    /// Of rank 0: the number under which [`Links`] are found.
    links: Option<u64>,
}

impl Peer {
    /// Makes a rank that is a thread of this process one of a CUDA device. All ranks call it, and wait for each other at most
    /// for the current deadline.
    ///
    /// # Errors
    ///
    /// [`BadArgument`](EpErrorKind::BadArgument): `device` is no CUDA device, or there are more than 16 ranks.
    /// [`Library`](EpErrorKind::Library): two ranks have the same device, whose kernels would wait for each other; a device does
    /// not reach the memory of another, or it fails. And
    /// [those of every call](Communicator#).
    pub fn over_threads(threads: Threads, device: &Device) -> Result<Self, EpError> {
        Self::over(Box::new(threads), device)
    }

    /// Leaves this group, and joins the next generation of it as the same rank on the same device.
    ///
    /// # Errors
    ///
    /// Those of [`Threads::rebuild`] and of [`Peer::over_threads`].
    pub fn rebuild(self) -> Result<Self, EpError> {
        let Self { ground, ties, .. } = self;
        drop(ties);
        let (control, device) = ground.rebuilt()?;
        Self::over(control, &device)
    }

    /// The device of this rank.
    pub fn device(&self) -> &Device {
        &self.ground.device
    }

    fn over(mut control: Box<dyn Control>, device: &Device) -> Result<Self, EpError> {
        let (rank, generation, num_ranks) = (control.rank(), control.generation(), control.world_size());
        let label = format!("generation {generation}").into();
        let site = Site { op: Collective::Rendezvous, step: 0, label };
        let cuda = match device {
            Device::Cuda(cuda) if num_ranks <= MAX_RANKS => cuda,
            Device::Cuda(_) => {
                let what = format!("there are {num_ranks} ranks, there must be at most {MAX_RANKS}");
                return Err(control.give_up(&site, EpErrorKind::BadArgument(what)));
            }
            _ => {
                let what = format!("device is {:?}, it must be a CUDA device", device.location());
                return Err(control.give_up(&site, EpErrorKind::BadArgument(what)));
            }
        };
        let (links, ordinals) = greet(&mut *control, cuda).map_err(|kind| match kind {
            Greeting::Refused(kind) => rendezvous_error(rank, generation, kind),
            Greeting::Failed(error) => error,
        })?;
        let begun = ordinals.iter().try_for_each(|&ordinal| reach(cuda, ordinal)).and_then(|()| {
            let mailbox = links.room(cuda, DType::U32, MAILBOX_WORDS)?;
            Ok((mailbox, Arc::new(Lifeline::new(cuda)?)))
        });
        let (mailbox, lifeline) = begun.map_err(|kind| control.give_up(&site, kind))?;
        let own = address_of(&mailbox, cuda).map_err(|kind| control.give_up(&site, kind))?;
        let addresses = gather_words(&mut *control, own)?;
        let mut group =
            Group { lifeline: lifeline.address(), rank: rank as u32, num_ranks: num_ranks as u32, ..Group::default() };
        group.mailboxes[..num_ranks].copy_from_slice(&addresses);
        let ground = OnDevice::start(Line(Arc::clone(&lifeline)), control, device, cuda, &site)?;
        let ties = Ties { cuda: cuda.clone(), links, lifeline };
        Ok(Self { ground, ties, group, rooms: Rooms::default(), dispatches: 0, combines: 0 })
    }

    /// Where the others will pull the results of the next combine from: `[num_rows, hidden_size]`. Results that are written there
    /// before need not be copied. Where there was no such room before, all ranks meet on the host to make it, so they all ask,
    /// and for as many rows.
    ///
    /// # Errors
    ///
    /// No memory; a dtype that results cannot have; and [those of every call](Communicator#).
    pub fn room_for_results(&mut self, dtype: DType, num_rows: usize, hidden_size: usize) -> Result<Tensor, EpError> {
        let none = || Site { op: Collective::Combine, step: 0, label: "".into() };
        let site = self.ground.last().unwrap_or_else(none);
        let elements = num_rows.saturating_mul(hidden_size);
        let room = self.room(&site, (Use::Results, dtype), elements, self.combines)?;
        self.prepared(&site, || room.view(num_rows, hidden_size))
    }

    /// A room for `elements` on every rank, which all ranks ask for in the same call.
    fn room(&mut self, site: &Site, what: (Use, DType), elements: usize, turn: usize) -> Result<Room, EpError> {
        if let Some(room) = self.rooms.get(what, elements, turn) {
            return Ok(room);
        }
        let ground = &mut self.ground;
        if ground.is_captured().map_err(|kind| ground.control.give_up(site, kind))? {
            let what = "a call in a capture is larger than any before it; make one of its size first".to_string();
            return Err(ground.control.give_up(site, EpErrorKind::BadArgument(what)));
        }
        let grown = self.rooms.grow(what, elements, &self.ties, &mut *ground.control)?;
        grown.map_err(|kind| ground.control.give_up(site, kind))?;
        match self.rooms.get(what, elements, turn) {
            Some(room) => Ok(room),
            None => Err(ground.control.give_up(site, EpErrorKind::Tensor("a room did not grow".to_string()))),
        }
    }

    /// What must not fail any more, now that all ranks have met; if it does, the group is given up.
    fn prepared<T>(&mut self, site: &Site, made: impl FnOnce() -> candle_core::Result<T>) -> Result<T, EpError> {
        made().map_err(|error| self.ground.control.give_up(site, tensor_kind(&error)))
    }

    /// Copies parts of `rows` to the others' rooms, and what came to a new tensor of `shape`.
    fn exchange(
        &mut self,
        (site, arrived): (&Site, Instant),
        rows: &Tensor,
        sends: &[Send],
        (room_bytes, shape): (usize, &[usize]),
    ) -> Result<Tensor, EpError> {
        let room = self.room(site, (Use::Anything, DType::U8), room_bytes, 0)?;
        let (cuda, group) = (self.ground.cuda.clone(), self.group);
        let bytes = if shape.contains(&0) { 0 } else { shape.iter().product::<usize>() * rows.dtype().size_in_bytes() };
        self.ground.carry((site, arrived), rows, shape, |_, stream, from, to| {
            let put = || {
                for send in sends {
                    let there = room.begin(send.rank) + send.to;
                    copy(from + send.from, there, send.bytes, stream)?;
                }
                meet(&cuda, group)?;
                copy(room.begin(group.rank as usize), to, bytes, stream)?;
                // Nobody sends the next rows before all have taken these.
                meet(&cuda, group)
            };
            put().map_err(words)
        })
    }
}

/// Some bytes for a rank, and where they go in its room.
struct Send {
    rank: usize,
    from: u64,
    to: u64,
    bytes: usize,
}

impl Ties {
    /// Whether the device has ended what it was given, which is waited for.
    fn are_free(&self) -> bool {
        let stream = self.cuda.cuda_stream();
        let began = Instant::now();
        let free = stream.context().bind_to_thread().and_then(|()| stream.record_event(None)).and_then(|behind| {
            while began.elapsed() < DRAINING {
                if behind.try_is_complete()? {
                    return Ok(true);
                }
                thread::sleep(Duration::from_micros(100));
            }
            Ok(false)
        });
        free.is_ok_and(|free| free)
    }
}

impl Drop for Ties {
    fn drop(&mut self) {
        if self.are_free() {
            return;
        }
        self.lifeline.give_up();
        if !self.are_free() {
            tracing::warn!("a device is not done with the memory of its group; left to itself");
            std::mem::forget((Arc::clone(&self.links), Arc::clone(&self.lifeline)));
        }
    }
}

impl Communicator for Peer {
    fn rank(&self) -> usize {
        self.ground.control.rank()
    }

    fn world_size(&self) -> usize {
        self.ground.control.world_size()
    }

    fn set_label(&mut self, label: &str) {
        self.ground.control.set_label(label);
    }

    fn deadline(&self) -> Duration {
        self.ground.control.deadline()
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.ground.control.set_deadline(deadline);
    }

    fn deadlines(&self) -> Deadlines {
        self.ground.control.deadlines()
    }

    fn start_serving(&mut self) {
        self.ground.start_serving();
    }

    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let terms = self.ground.place().all_gather(rows, counts);
        let (site, _, arrived) = self.ground.announce(Collective::AllGather, terms, Vec::new())?;
        let (shares, own) = (Shares::new(rows, counts), self.rank());
        let sends: Vec<_> = (0..counts.len())
            .map(|rank| Send { rank, from: 0, to: shares.offset(own), bytes: shares.bytes(own) })
            .collect();
        let all = shares.offset(counts.len()) as usize;
        self.exchange((&site, arrived), rows, &sends, (all, &shares.shape(shares.num_rows())))
    }

    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let terms = self.ground.place().reduce_scatter(rows, counts);
        let (site, _, arrived) = self.ground.announce(Collective::ReduceScatter, terms, Vec::new())?;
        let (shares, own) = (Shares::new(rows, counts), self.rank());
        let part = |rank: usize| {
            let to = (own * shares.bytes(rank)) as u64;
            Send { rank, from: shares.offset(rank), to, bytes: shares.bytes(rank) }
        };
        let sends: Vec<_> = (0..counts.len()).map(part).collect();
        let most = (0..counts.len()).map(|rank| shares.bytes(rank)).max().unwrap_or(0) * counts.len();
        let shape = [&[counts.len()], shares.shape(shares.rows(own)).as_slice()].concat();
        let parts = self.exchange((&site, arrived), rows, &sends, (most, &shape))?;
        self.sum(&site, &parts)
    }

    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError> {
        let terms = self.ground.place().all_to_all(rows, send_counts);
        let note = serde_json::to_vec(send_counts).unwrap_or_default();
        let (site, notes, arrived) = self.ground.announce(Collective::AllToAll, terms, note)?;
        let read: Option<Vec<Vec<usize>>> = notes.iter().map(|note| serde_json::from_slice(note).ok()).collect();
        let Some(counts) = read.filter(|counts| counts.iter().all(|counts| counts.len() == send_counts.len())) else {
            let what = "a rank did not say how many rows it sends".to_string();
            return Err(self.ground.control.give_up(&site, EpErrorKind::Tensor(what)));
        };
        let own = self.rank();
        // Rows that a rank gets from those before `source`.
        let before = |rank: usize, source: usize| counts.iter().take(source).map(|counts| counts[rank]).sum::<usize>();
        let shares = Shares::new(rows, send_counts);
        let part = |rank: usize| {
            let to = (before(rank, own) * shares.row_bytes()) as u64;
            Send { rank, from: shares.offset(rank), to, bytes: shares.bytes(rank) }
        };
        let sends: Vec<_> = (0..send_counts.len()).map(part).collect();
        let most = (0..counts.len()).map(|rank| before(rank, counts.len())).max().unwrap_or(0) * shares.row_bytes();
        let received: Vec<usize> = counts.iter().map(|counts| counts[own]).collect();
        let shape = shares.shape(received.iter().sum());
        Ok((self.exchange((&site, arrived), rows, &sends, (most, &shape))?, received))
    }

    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError> {
        let terms = self.ground.place().all_reduce(values);
        let (site, _, arrived) = self.ground.announce(Collective::AllReduce, terms, Vec::new())?;
        let (own, num_ranks) = (self.rank(), self.world_size());
        let bytes = values.elem_count() * values.dtype().size_in_bytes();
        let sends: Vec<_> =
            (0..num_ranks).map(|rank| Send { rank, from: 0, to: (own * bytes) as u64, bytes }).collect();
        let shape = [&[num_ranks], values.dims()].concat();
        let parts = self.exchange((&site, arrived), values, &sends, (num_ranks * bytes, &shape))?;
        self.sum(&site, &parts)
    }

    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EpError> {
        self.ground.control.all_gather_bytes(bytes)
    }

    fn barrier(&mut self) -> Result<(), EpError> {
        self.ground.control.barrier()
    }

    fn settle(&mut self) -> Result<(), EpError> {
        self.ground.settle()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.ground.control.abort_handle()
    }

    fn health(&self) -> Health {
        self.ground.control.health()
    }

    fn as_peer(&mut self) -> Option<&mut Peer> {
        Some(self)
    }
}

impl Peer {
    /// The sum over the first dimension, in its order.
    fn sum(&mut self, site: &Site, parts: &Tensor) -> Result<Tensor, EpError> {
        let summed = || rows::sum((0..parts.dims()[0]).map(|rank| parts.get(rank)));
        self.prepared(site, summed)
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .field("generation", &self.generation())
            .field("device", &self.ground.device.location())
            .finish_non_exhaustive()
    }
}

enum Greeting {
    Refused(EpErrorKind),
    Failed(EpError),
}

/// What the group shares, and the ordinals of all ranks' devices.
fn greet(control: &mut dyn Control, cuda: &CudaDevice) -> Result<(Arc<Links>, Vec<usize>), Greeting> {
    let opened = (control.rank() == 0).then(Links::open);
    let hello =
        Hello { ordinal: cuda.cuda_stream().context().ordinal(), links: opened.as_ref().map(|(number, _)| *number) };
    let unreadable = |error: serde_json::Error| {
        Greeting::Refused(EpErrorKind::Library(format!("a rank says what none would: {error}")))
    };
    let bytes = serde_json::to_vec(&hello).map_err(unreadable)?;
    let hellos = control.all_gather_bytes(&bytes).map_err(Greeting::Failed)?;
    let hellos: Vec<Hello> =
        hellos.iter().map(|bytes| serde_json::from_slice(bytes).map_err(unreadable)).collect::<Result<_, _>>()?;
    let number = hellos.first().and_then(|hello| hello.links);
    let joined = number.and_then(Links::join);
    // Rank 0 holds them until everybody has them.
    control.barrier().map_err(Greeting::Failed)?;
    drop(opened);
    for (rank, Hello { ordinal, .. }) in hellos.iter().enumerate() {
        if let Some(other) = hellos.iter().take(rank).position(|other| other.ordinal == *ordinal) {
            let what =
                format!("ranks {other} and {rank} both have CUDA device {ordinal}; give each rank a device of its own");
            return Err(Greeting::Refused(EpErrorKind::Library(what)));
        }
    }
    match joined {
        Some(links) => Ok((links, hellos.iter().map(|hello| hello.ordinal).collect())),
        None => Err(Greeting::Refused(EpErrorKind::Library("rank 0 is not in this process".to_string()))),
    }
}

fn meet(cuda: &CudaDevice, group: Group) -> Result<(), EpErrorKind> {
    // SAFETY: the ranks have met on the host for the call that this belongs to.
    unsafe { kernels::meet(cuda, group) }.map_err(|error| tensor_kind(&error))
}

/// Copies between memory of any devices; nothing where it is there already.
fn copy(from: u64, to: u64, bytes: usize, stream: &CudaStream) -> Result<(), EpErrorKind> {
    if bytes == 0 || from == to {
        return Ok(());
    }
    // SAFETY: rows of this rank, and room for them, which stay until the stream has come here.
    unsafe { sys::cuMemcpyAsync(to, from, bytes, stream.cu_stream()) }.result().map_err(|error| device_kind(&error))
}

fn words(kind: EpErrorKind) -> String {
    kind.to_string()
}
