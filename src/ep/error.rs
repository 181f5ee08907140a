//! What can go wrong between ranks, and the words for it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// The operation that an [`EpError`] speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Collective {
    /// [`Communicator::all_gather`](super::Communicator::all_gather)
    AllGather,
    /// [`Communicator::reduce_scatter`](super::Communicator::reduce_scatter)
    ReduceScatter,
    /// [`Communicator::all_to_all`](super::Communicator::all_to_all)
    AllToAll,
    /// [`Communicator::all_reduce`](super::Communicator::all_reduce)
    AllReduce,
    /// [`Communicator::all_gather_bytes`](super::Communicator::all_gather_bytes)
    AllGatherBytes,
    /// [`Communicator::barrier`](super::Communicator::barrier)
    Barrier,
    /// Tokens go to their experts through the devices' memory, with [`Strategy::Peer`](super::Strategy::Peer).
    Dispatch,
    /// Their results come home the same way.
    Combine,
    /// Not a collective: somebody used an [`AbortHandle`](super::AbortHandle).
    Abort,
    /// Not a collective: the ranks meet for the first time, or anew. Its step is 0.
    Rendezvous,
}

impl Collective {
    /// The name of the method, such as `all_gather`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::AllReduce => "all_reduce",
            Self::AllGatherBytes => "all_gather_bytes",
            Self::Barrier => "barrier",
            Self::Dispatch => "dispatch",
            Self::Combine => "combine",
            Self::Abort => "abort",
            Self::Rendezvous => "rendezvous",
        }
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A collective failed: who reports it, in which call, and why.
///
/// The first failing call of each rank carries the fault itself; every later call carries
/// [`EpErrorKind::Poisoned`] around the first cause. [`EpError::first_cause`] sees through that.
///
/// As a [`candle_core::Error`] it keeps its text only: that type cannot be taken apart again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpError {
    /// The rank whose call failed.
    pub rank: usize,
    /// The call that failed.
    pub op: Collective,
    /// The number of that call in the life of the group; the first collective has number 0.
    pub step: u64,
    /// The caller's name for what the call belonged to, such as `layer 3`; may be empty.
    pub label: String,
    /// Why it failed.
    pub kind: EpErrorKind,
}

/// Why a collective failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum EpErrorKind {
    /// Some ranks did not make the call in time.
    Timeout {
        /// The ranks that had not arrived, in ascending order.
        missing: Vec<usize>,
        /// The wait that was allowed to the rank that ran out of patience first.
        deadline: Duration,
    },
    /// A rank dropped its handle before making this call.
    RankLeft {
        /// The rank that left.
        rank: usize,
    },
    /// A rank dropped its handle while its thread was panicking.
    RankPanicked {
        /// The rank that panicked.
        rank: usize,
    },
    /// The process of a rank ended without a farewell, or sent what no rank sends; with ranks as processes.
    RankLost {
        /// The rank that is gone.
        rank: usize,
        /// How that showed.
        reason: String,
    },
    /// A handle, a message or a rank belongs to a generation of the group that is over.
    OldGeneration {
        /// The generation that it belongs to.
        generation: u64,
        /// The generation that counts.
        current: u64,
    },
    /// At the rendezvous: two ranks were started for groups that differ.
    Mismatch {
        /// The rank that joined with another value than rank 0.
        rank: usize,
        /// What rank 0 has, such as `world_size 4`.
        expected: String,
        /// What `rank` has.
        found: String,
    },
    /// At the rendezvous: two processes or threads claim the same rank.
    DuplicateRank {
        /// The rank that was claimed twice.
        rank: usize,
    },
    /// At the rendezvous: an address that cannot be listened at or reached.
    Unreachable(
        /// The address and what the system said.
        String,
    ),
    /// A rank made another call than the rest of the group.
    ///
    /// The truth is what the largest number of ranks called; of equally large parties, the one with
    /// the lowest rank. So with two ranks it is always rank 1 that is named, and the two texts show both
    /// sides.
    Desync {
        /// The lowest rank that disagrees.
        rank: usize,
        /// What the group called, as far as it differs.
        expected: String,
        /// What `rank` called, as far as it differs.
        found: String,
    },
    /// The group was given up: through an [`AbortHandle`](super::AbortHandle), or because a rank's own
    /// call could not be carried out (that rank gets [`EpErrorKind::BadArgument`] or
    /// [`EpErrorKind::Tensor`], the others get this).
    Aborted {
        /// The rank that gave up; `None` when it was nobody in the group.
        by: Option<usize>,
        /// In that rank's words.
        reason: String,
    },
    /// An earlier failure made the group unusable. Nothing was attempted.
    Poisoned {
        /// The first failure, as the rank that found it saw it. Never itself `Poisoned`.
        cause: Box<EpError>,
    },
    /// Every rank arrived, but the device of this rank did not carry the call out in time.
    Unfinished {
        /// The call that did not end.
        op: Collective,
        /// Its number.
        step: u64,
        /// How long its end was waited for.
        deadline: Duration,
    },
    /// The library that moves rows between devices refused, is missing something, or does not fit to the devices.
    Library(
        /// The library's call, the number and name of its error, and its last words; or what does not fit.
        String,
    ),
    /// This rank's own arguments cannot be right, whatever the others do.
    BadArgument(
        /// The argument, its value and its limit.
        String,
    ),
    /// Every rank arrived, but Candle could not put this rank's result together.
    Tensor(
        /// Candle's message.
        String,
    ),
}

impl EpError {
    /// The failure that made the group unusable: the cause inside [`EpErrorKind::Poisoned`], else
    /// this error.
    pub fn first_cause(&self) -> &EpError {
        match &self.kind {
            EpErrorKind::Poisoned { cause } => cause.first_cause(),
            _ => self,
        }
    }
}

impl fmt::Display for EpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}: {} (step {}", self.rank, self.op, self.step)?;
        if !self.label.is_empty() {
            write!(f, ", {}", self.label)?;
        }
        write!(f, "): {}", self.kind)
    }
}

impl fmt::Display for EpErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout { missing, deadline } => write!(
                f,
                "no call from ranks {missing:?} within {deadline:?}; see what they were doing, or raise the deadline"
            ),
            Self::RankLeft { rank } => write!(
                f,
                "rank {rank} dropped its communicator before this call; look for an early return on rank {rank}"
            ),
            Self::RankPanicked { rank } => {
                write!(f, "rank {rank} panicked before this call; look for its panic message")
            }
            Self::RankLost { rank, reason } => write!(f, "lost rank {rank}: {reason}"),
            Self::OldGeneration { generation, current } => write!(
                f,
                "refused, generation {generation} of the group is over and the current one is {current}; \
                 join or rebuild with generation {current} or later"
            ),
            Self::Mismatch { rank, expected, found } => {
                write!(f, "rank {rank} joined with {found}, expected {expected} as rank 0 has; start all ranks alike")
            }
            Self::DuplicateRank { rank } => {
                write!(f, "rank {rank} was claimed twice; give every rank a number of its own")
            }
            Self::Unreachable(what) => write!(f, "{what}"),
            Self::Desync { rank, expected, found } => write!(
                f,
                "rank {rank} made another call than the group: expected {expected}, found {found}; \
                 look for a call that rank {rank} skipped, repeated or made with other arguments"
            ),
            Self::Aborted { by: Some(rank), reason } => write!(f, "aborted by rank {rank}: {reason}"),
            Self::Aborted { by: None, reason } => write!(f, "aborted: {reason}"),
            Self::Poisoned { cause } => {
                write!(f, "not attempted, the group failed before and has to be built anew; first cause: {cause}")
            }
            Self::Unfinished { op, step, deadline } => write!(
                f,
                "{op} of step {step} did not end on the device within {deadline:?}, although every rank called it; \
                 see what the devices were doing, or raise the deadline"
            ),
            Self::Library(what) => write!(f, "{what}"),
            Self::BadArgument(what) => write!(f, "bad argument: {what}"),
            Self::Tensor(what) => write!(f, "cannot build the result: {what}"),
        }
    }
}

impl std::error::Error for EpError {}

/// What an error says, without the stack that Candle may have added: other ranks have no use for it, and finding its names may
/// take longer than they should wait.
pub(crate) fn reason(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => reason(inner),
        other => other.to_string(),
    }
}

impl From<EpError> for candle_core::Error {
    fn from(error: EpError) -> Self {
        candle_core::Error::wrap(error)
    }
}
