//! A rank, whatever carries its posts to the others: the one body of every communicator of this crate.
//!
//! ```text
//! collective(op, arguments):
//!     check the arguments            else: poison the group, BadArgument
//!     carry the post to other processes
//!     meet the others on the board   else: the fault; Poisoned from the second time on
//!     put the result together        else: poison the group, Tensor
//! ```

use super::board::{Board, Fault, Waiting, error_at};
use super::call::{Offer, Payload, Place, Post, Site, Terms};
use super::communicator::{AbortHandle, Communicator, Deadlines, Health};
use super::error::{Collective, EpError, EpErrorKind, reason};
use super::rows;
use super::wire::cut;
use candle_core::{Device, Result as CandleResult, Tensor};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How ranks that do not share this board hear of what happens on it.
pub(super) trait Outside: Send + Sync + 'static {
    /// Sends this rank's post, without waiting; or says which argument is too large to be sent.
    fn carry(&self, post: &Post) -> Result<(), String>;

    /// Sends news of a fault, without waiting. They may be old.
    fn tell(&self, fault: &Fault);

    /// Says where this rank waits, without waiting for that to arrive.
    fn tell_waiting(&self, waiting: Waiting);
}

/// All ranks share the board.
pub(super) struct Nobody;

impl Outside for Nobody {
    fn carry(&self, _: &Post) -> Result<(), String> {
        Ok(())
    }

    fn tell(&self, _: &Fault) {}

    fn tell_waiting(&self, _: Waiting) {}
}

pub(super) struct Member<O> {
    pub(super) board: Arc<Board>,
    pub(super) outside: Arc<O>,
    rank: usize,
    step: u64,
    label: Arc<str>,
    deadlines: Deadlines,
    deadline: Duration,
    /// Has a call of this rank failed?
    failed: bool,
}

impl<O: Outside> Member<O> {
    pub(super) fn new(board: Arc<Board>, outside: Arc<O>, rank: usize, deadlines: Deadlines) -> Self {
        let deadline = deadlines.warm_up;
        Self { board, outside, rank, step: 0, label: Arc::from(""), deadlines, deadline, failed: false }
    }

    /// One collective: check, meet the others, put the result together.
    fn collective<T>(
        &mut self,
        op: Collective,
        offer: Offer,
        build: impl FnOnce(&[Post]) -> CandleResult<T>,
    ) -> Result<T, EpError> {
        let (site, posts) = self.meet(op, offer)?;
        build(&posts).map_err(|error| self.give_up(&site, EpErrorKind::Tensor(reason(&error))))
    }

    /// Checks, and meets the others: what everybody laid on the board.
    pub(super) fn meet(&mut self, op: Collective, offer: Offer) -> Result<(Site, Arc<Vec<Post>>), EpError> {
        let site = Site { op, step: self.step, label: Arc::clone(&self.label) };
        self.step = self.step.wrapping_add(1);
        if let Some(current) = self.board.successor() {
            let kind = EpErrorKind::OldGeneration { generation: self.board.generation(), current };
            return Err(error_at(self.rank, &site, kind));
        }
        let (terms, payload) = match offer {
            Ok(offer) => offer,
            Err(what) => return Err(self.give_up(&site, EpErrorKind::BadArgument(what))),
        };
        if let Some(fault) = self.board.fault_at(site.step) {
            return Err(self.hear(&site, &fault));
        }
        let post = Post { site: site.clone(), terms, payload };
        if let Err(what) = self.outside.carry(&post) {
            return Err(self.give_up(&site, EpErrorKind::BadArgument(what)));
        }
        match self.board.meet(self.rank, post, self.deadline, |waiting| self.outside.tell_waiting(waiting)) {
            Ok(posts) => Ok((site, posts)),
            Err(fault) => Err(self.hear(&site, &fault)),
        }
    }

    /// What arguments are checked against.
    fn place(&self) -> Place<'static> {
        Place { device: &Device::Cpu, rank: self.rank, world_size: self.world_size() }
    }

    /// Poisons the group because this rank cannot carry out its own call.
    pub(super) fn give_up(&mut self, site: &Site, kind: EpErrorKind) -> EpError {
        // The others can put their results of a call together in which every rank took part.
        let since = site.step + u64::from(matches!(kind, EpErrorKind::Tensor(_)));
        let cause = error_at(self.rank, site, kind);
        let heard = EpErrorKind::Aborted { by: Some(self.rank), reason: cause.to_string() };
        let own = Arc::new(Fault { cause, heard, since });
        let first = self.board.fail(Arc::clone(&own));
        if !Arc::ptr_eq(&own, &first) {
            return self.hear(site, &first);
        }
        self.failed = true;
        self.outside.tell(&own);
        own.cause.clone()
    }

    /// The fault, the first time that this rank hears of it; afterwards only that there was one.
    fn hear(&mut self, site: &Site, fault: &Fault) -> EpError {
        let kind = if std::mem::replace(&mut self.failed, true) {
            EpErrorKind::Poisoned { cause: Box::new(fault.cause.clone()) }
        } else {
            self.outside.tell(fault);
            fault.heard.clone()
        };
        error_at(self.rank, site, kind)
    }
}

impl<O: Outside> Communicator for Member<O> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.board.world_size()
    }

    fn set_label(&mut self, label: &str) {
        if *self.label != *cut(label) {
            self.label = Arc::from(cut(label));
        }
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    fn deadlines(&self) -> Deadlines {
        self.deadlines
    }

    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let offer = self.place().all_gather(rows, counts).map(|terms| (terms, Payload::Rows(rows.detach())));
        self.collective(Collective::AllGather, offer, |posts| {
            let parts: Vec<Tensor> = rows::posted_rows(posts).cloned().collect();
            rows::concat(&parts)
        })
    }

    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let rank = self.rank;
        let offer = self.place().reduce_scatter(rows, counts).map(|terms| (terms, Payload::Rows(rows.detach())));
        self.collective(Collective::ReduceScatter, offer, |posts| rows::sum_of_part(posts, counts, rank))
    }

    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError> {
        let rank = self.rank;
        let routed = || Payload::Routed(rows.detach(), send_counts.to_vec());
        let offer = self.place().all_to_all(rows, send_counts).map(|terms| (terms, routed()));
        self.collective(Collective::AllToAll, offer, |posts| rows::received(posts, rank))
    }

    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError> {
        let offer = self.place().all_reduce(values).map(|terms| (terms, Payload::Rows(values.detach())));
        self.collective(Collective::AllReduce, offer, |posts| rows::sum(rows::posted_rows(posts).cloned().map(Ok)))
    }

    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EpError> {
        let offer = Ok((Terms::default(), Payload::Bytes(bytes.to_vec())));
        self.collective(Collective::AllGatherBytes, offer, |posts| {
            let bytes = posts.iter().filter_map(|post| match &post.payload {
                Payload::Bytes(bytes) => Some(bytes.clone()),
                _ => None,
            });
            Ok(bytes.collect())
        })
    }

    fn barrier(&mut self) -> Result<(), EpError> {
        let offer = Ok((Terms::default(), Payload::Nothing));
        self.collective(Collective::Barrier, offer, |_| Ok(()))
    }

    fn abort_handle(&self) -> AbortHandle {
        let (board, outside, rank) = (Arc::clone(&self.board), Arc::clone(&self.outside), self.rank);
        AbortHandle::new(move |reason| {
            let heard = EpErrorKind::Aborted { by: Some(rank), reason: reason.to_string() };
            outside.tell(&board.abort(rank, heard));
        })
    }

    fn health(&self) -> Health {
        let (alive, cause) = self.board.health();
        let (world_size, generation) = (self.board.world_size(), self.board.generation());
        Health { world_size, generation, next_step: self.step, alive, cause }
    }
}

impl<O> fmt::Debug for Member<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member")
            .field("rank", &self.rank)
            .field("world_size", &self.board.world_size())
            .field("generation", &self.board.generation())
            .field("next_step", &self.step)
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}

/// Implements [`Communicator`] for a type whose first field is one.
macro_rules! communicate_through_field {
    ($type:ty) => {
        impl $crate::ep::Communicator for $type {
            fn rank(&self) -> usize {
                self.0.rank()
            }

            fn world_size(&self) -> usize {
                self.0.world_size()
            }

            fn set_label(&mut self, label: &str) {
                self.0.set_label(label);
            }

            fn deadline(&self) -> std::time::Duration {
                self.0.deadline()
            }

            fn set_deadline(&mut self, deadline: std::time::Duration) {
                self.0.set_deadline(deadline);
            }

            fn deadlines(&self) -> $crate::ep::Deadlines {
                self.0.deadlines()
            }

            fn all_gather(
                &mut self,
                rows: &candle_core::Tensor,
                counts: &[usize],
            ) -> Result<candle_core::Tensor, $crate::ep::EpError> {
                self.0.all_gather(rows, counts)
            }

            fn reduce_scatter(
                &mut self,
                rows: &candle_core::Tensor,
                counts: &[usize],
            ) -> Result<candle_core::Tensor, $crate::ep::EpError> {
                self.0.reduce_scatter(rows, counts)
            }

            fn all_to_all(
                &mut self,
                rows: &candle_core::Tensor,
                send_counts: &[usize],
            ) -> Result<(candle_core::Tensor, Vec<usize>), $crate::ep::EpError> {
                self.0.all_to_all(rows, send_counts)
            }

            fn all_reduce(&mut self, values: &candle_core::Tensor) -> Result<candle_core::Tensor, $crate::ep::EpError> {
                self.0.all_reduce(values)
            }

            fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, $crate::ep::EpError> {
                self.0.all_gather_bytes(bytes)
            }

            fn barrier(&mut self) -> Result<(), $crate::ep::EpError> {
                self.0.barrier()
            }

            fn settle(&mut self) -> Result<(), $crate::ep::EpError> {
                self.0.settle()
            }

            fn abort_handle(&self) -> $crate::ep::AbortHandle {
                self.0.abort_handle()
            }

            fn health(&self) -> $crate::ep::Health {
                self.0.health()
            }
        }
    };
}

pub(super) use communicate_through_field;
