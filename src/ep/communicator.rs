//! The contract of a group of ranks.

use super::error::EpError;
use candle_core::Tensor;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// One rank's handle on a group of ranks. It has one owner at a time, which makes the calls.
///
/// **Collectives.** Every rank makes the same calls in the same order; each call is numbered. A call
/// returns when every rank has made it. Operation, number, label, dtype, row shape and `counts` are
/// compared before any data moves. A result that is `Ok` contains every rank's share of the same call.
///
/// **Tensors.** On the CPU, or on the one device of this rank where an implementation says so; of any Candle dtype but the packed MX ones; views, strides and
/// offsets are fine, and so are zero rows. Results are contiguous and carry no gradient. With more than one
/// rank they share no memory with anybody's argument; with one rank they may share the caller's own.
/// An argument is read by the other ranks until they return from the same call: do not write into its memory in
/// place before the *next* collective of this rank has succeeded.
///
/// **Sums** run in rank order 0, 1, 2, ... in the dtype given, so the same input gives the same
/// bits on every rank and in every run. Give float32: narrower floats round after each addition.
///
/// **Failure.** Every call returns, at the latest, at its deadline. The first failure poisons
/// the group for good: each rank's next (or current) call returns the fault itself, all later ones
/// [`Poisoned`](super::EpErrorKind::Poisoned) at once. Arguments that are wrong on their own
/// ([`BadArgument`](super::EpErrorKind::BadArgument)) poison the group too, since that rank cannot take
/// part: the others get [`Aborted`](super::EpErrorKind::Aborted) naming it. Any method may return any
/// [`EpErrorKind`](super::EpErrorKind). A poisoned group can be built anew, as its next
/// [generation](Communicator::generation).
pub trait Communicator: Send {
    /// This rank, below [`Communicator::world_size`].
    fn rank(&self) -> usize;

    /// The number of ranks in the group, at least 1.
    fn world_size(&self) -> usize;

    /// Names what the following collectives belong to, such as `layer 3`.
    ///
    /// The label stands in errors, and all ranks must give the same one: it tells a skipped call from
    /// the next call of the same kind and shape. The first 2048 bytes of it count.
    fn set_label(&mut self, label: &str);

    /// How long each call of this rank waits for the others, counted from its own arrival.
    fn deadline(&self) -> Duration;

    /// Changes [`Communicator::deadline`] for the calls that follow. It concerns this rank only; the shortest wait in the
    /// group decides.
    fn set_deadline(&mut self, deadline: Duration);

    /// The deadlines that this rank was built with; without such, the current one for both.
    fn deadlines(&self) -> Deadlines {
        self.deadline().into()
    }

    /// Says that warm-up is over: kernels are loaded, and from now on [`Deadlines::serving`] counts. All ranks say it between the same
    /// calls.
    fn start_serving(&mut self) {
        let serving = self.deadlines().serving;
        self.set_deadline(serving);
    }

    /// Which life of the group this handle belongs to: 0, and one more for every time that it was built anew.
    ///
    /// Numbers of generations are never used again, and a handle of an old one is refused with
    /// [`OldGeneration`](super::EpErrorKind::OldGeneration).
    fn generation(&self) -> u64 {
        self.health().generation
    }

    /// Brings the rows of all ranks to all ranks.
    ///
    /// `rows` is `[counts[rank], ...]`, the result `[sum(counts), ...]` in rank order. `counts` holds
    /// one number of rows per rank and is the same on every rank.
    ///
    /// # Errors
    ///
    /// See [the failures](Communicator#).
    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError>;

    /// Adds the ranks' rows and gives each rank its part of the sum.
    ///
    /// `rows` is `[sum(counts), ...]` of f32, f64, f16 or bf16, the result `[counts[rank], ...]`: the rows
    /// that come after those of the lower ranks. `counts` is the same on every rank.
    ///
    /// # Errors
    ///
    /// See [the failures](Communicator#).
    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError>;

    /// Sends each row to one rank.
    ///
    /// `rows` is `[sum(send_counts), ...]`, grouped by destination: first `send_counts[0]` rows for
    /// rank 0, then those for rank 1, and so on. `send_counts` is this rank's own business. The result is the
    /// received rows grouped by source in rank order, and how many came from each source.
    ///
    /// # Errors
    ///
    /// See [the failures](Communicator#).
    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError>;

    /// Adds the ranks' tensors, of one shape and of dtype f32, f64, f16 or bf16; all ranks get the sum.
    ///
    /// # Errors
    ///
    /// See [the failures](Communicator#).
    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError>;

    /// Brings everybody's bytes to everybody: entry `r` is what rank `r` gave. Lengths may differ.
    ///
    /// # Errors
    ///
    /// See [the failures](Communicator#).
    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EpError>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    ///
    /// See [the failures](Communicator#).
    fn barrier(&mut self) -> Result<(), EpError>;

    /// Waits until everything that this rank has called so far has really happened, at the latest until the deadlines of
    /// those calls.
    ///
    /// On the CPU a call has happened when it returns, and this returns at once. On a device a call returns when its work
    /// stands in the device's queue: what an `Ok` tensor holds counts only after this has returned `Ok`.
    ///
    /// # Errors
    ///
    /// See [the failures](Communicator#); an error names the call that did not end.
    fn settle(&mut self) -> Result<(), EpError> {
        Ok(())
    }

    /// The rank itself, where its device reaches the memory of the others': what [`Strategy::Peer`](super::Strategy::Peer) needs.
    #[cfg(feature = "cuda")]
    fn as_peer(&mut self) -> Option<&mut super::Peer> {
        None
    }

    /// A handle with which any thread can give the group up.
    fn abort_handle(&self) -> AbortHandle;

    /// What this rank knows of the group, without waiting for anybody.
    fn health(&self) -> Health;
}

/// How long a rank waits for the others.
///
/// A [`Duration`] stands for two that are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// Counts for the meeting of the ranks, first or anew, and for every call until [`Communicator::start_serving`]: ranks
    /// read weights and warm up at their own pace.
    pub warm_up: Duration,
    /// Counts from then on: how long a step may keep a client waiting before the group is given up.
    pub serving: Duration,
}

impl From<Duration> for Deadlines {
    fn from(both: Duration) -> Self {
        Self { warm_up: both, serving: both }
    }
}

/// Gives a group up from any thread: everybody who waits wakes up with
/// [`Aborted`](super::EpErrorKind::Aborted), and the group is poisoned.
///
/// A group that has failed before keeps its first cause.
#[derive(Clone)]
pub struct AbortHandle(Arc<dyn Fn(&str) + Send + Sync>);

impl AbortHandle {
    /// A handle that calls `abort` with the reason; for implementations of [`Communicator`].
    pub fn new(abort: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(abort))
    }

    /// Gives the group up; `reason` stands in everybody's error.
    pub fn abort(&self, reason: &str) {
        (self.0)(reason);
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AbortHandle")
    }
}

/// The state of a group, from [`Communicator::health`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// The number of ranks in the group.
    pub world_size: usize,
    /// Which life of the group this is, see [`Communicator::generation`].
    pub generation: u64,
    /// The number that this rank's next collective will carry.
    pub next_step: u64,
    /// Per rank: does it still hold its handle?
    pub alive: Vec<bool>,
    /// The failure that poisoned the group, if any.
    pub cause: Option<EpError>,
}
