//! Ranks as threads of one process.

use super::board::{Board, Fault, Presence, error_at};
use super::call::{
    Offer, Payload, Post, Site, Terms, offer_all_gather, offer_all_reduce, offer_all_to_all, offer_reduce_scatter,
};
use super::communicator::{AbortHandle, Communicator, Health};
use super::error::{Collective, EpError, EpErrorKind};
use super::rows;
use candle_core::{Result as CandleResult, Tensor, bail};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The largest group that [`Threads::group`] builds.
pub const MAX_RANKS: usize = 1024;

/// A rank that is a thread of this process. Tensors are on the CPU.
///
/// Rows change hands as handles: each rank copies or adds what it needs on its own thread, outside
/// of any lock. Besides what every [`Communicator`] promises:
///
/// * A rank that drops its handle while a call of the others needs it fails that call at once, with
///   [`RankLeft`](EpErrorKind::RankLeft) or, when its thread is panicking,
///   [`RankPanicked`](EpErrorKind::RankPanicked). Dropping after the last collective is the ordinary end
///   and disturbs nobody, not even ranks that have yet to wake up from that collective.
/// * A rank that makes another call than the others is named ([`Desync`](EpErrorKind::Desync)) as soon
///   as more than half of the ranks agree against it or everybody has arrived, and within 0.1 s of the first
///   disagreement in any case. A skipped call looks like the next call unless operation, label, dtype, row
///   shape or counts differ, so set a label per layer; what is left shows at the end as a rank that left.
pub struct Threads {
    board: Arc<Board>,
    rank: usize,
    step: u64,
    label: Arc<str>,
    deadline: Duration,
    /// Has a call of this rank failed?
    failed: bool,
}

impl Threads {
    /// Builds a group and returns one handle per rank, in rank order; move each into its own thread.
    ///
    /// `deadline` is how long each call waits for the other ranks, counted from its own arrival.
    ///
    /// # Errors
    ///
    /// `world_size` is zero or above [`MAX_RANKS`].
    pub fn group(world_size: usize, deadline: Duration) -> CandleResult<Vec<Self>> {
        if world_size == 0 || world_size > MAX_RANKS {
            bail!("Threads::group: world_size is {world_size}, it must be 1 to {MAX_RANKS}");
        }
        let board = Arc::new(Board::new(world_size));
        let handle = |rank| Self::on(&board, rank, deadline);
        Ok((0..world_size).map(handle).collect())
    }

    /// A group of one.
    pub(super) fn alone() -> Self {
        Self::on(&Arc::new(Board::new(1)), 0, Duration::MAX)
    }

    fn on(board: &Arc<Board>, rank: usize, deadline: Duration) -> Self {
        Self { board: Arc::clone(board), rank, step: 0, label: Arc::from(""), deadline, failed: false }
    }

    /// One collective: check, meet the others, put the result together.
    fn collective<T>(
        &mut self,
        op: Collective,
        offer: Offer,
        build: impl FnOnce(&[Post]) -> CandleResult<T>,
    ) -> Result<T, EpError> {
        let site = Site { op, step: self.step, label: Arc::clone(&self.label) };
        self.step = self.step.wrapping_add(1);
        let (terms, payload) = match offer {
            Ok(offer) => offer,
            Err(what) => return Err(self.give_up(&site, EpErrorKind::BadArgument(what))),
        };
        let post = Post { site: site.clone(), terms, payload };
        match self.board.meet(self.rank, post, self.deadline) {
            Ok(posts) => build(&posts).map_err(|error| self.give_up(&site, EpErrorKind::Tensor(error.to_string()))),
            Err(fault) => Err(self.hear(&site, &fault)),
        }
    }

    /// Poisons the group because this rank cannot carry out its own call.
    fn give_up(&mut self, site: &Site, kind: EpErrorKind) -> EpError {
        let cause = error_at(self.rank, site, kind);
        let heard = EpErrorKind::Aborted { by: Some(self.rank), reason: cause.to_string() };
        let own = Arc::new(Fault { cause, heard });
        let first = self.board.fail(Arc::clone(&own));
        if !Arc::ptr_eq(&own, &first) {
            return self.hear(site, &first);
        }
        self.failed = true;
        own.cause.clone()
    }

    /// The fault, the first time that this rank hears of it; afterwards only that there was one.
    fn hear(&mut self, site: &Site, fault: &Fault) -> EpError {
        let kind = if std::mem::replace(&mut self.failed, true) {
            EpErrorKind::Poisoned { cause: Box::new(fault.cause.clone()) }
        } else {
            fault.heard.clone()
        };
        error_at(self.rank, site, kind)
    }
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.board.world_size()
    }

    fn set_label(&mut self, label: &str) {
        if *self.label != *label {
            self.label = Arc::from(label);
        }
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let offer = offer_all_gather(rows, counts, self.rank, self.world_size());
        self.collective(Collective::AllGather, offer, |posts| {
            let parts: Vec<Tensor> = rows::posted_rows(posts).cloned().collect();
            rows::concat(&parts)
        })
    }

    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let rank = self.rank;
        let offer = offer_reduce_scatter(rows, counts, self.world_size());
        self.collective(Collective::ReduceScatter, offer, |posts| rows::sum_of_part(posts, counts, rank))
    }

    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError> {
        let rank = self.rank;
        let offer = offer_all_to_all(rows, send_counts, self.world_size());
        self.collective(Collective::AllToAll, offer, |posts| rows::received(posts, rank))
    }

    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError> {
        let offer = offer_all_reduce(values);
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
        let (board, rank) = (Arc::clone(&self.board), self.rank);
        AbortHandle::new(move |reason| {
            let heard = EpErrorKind::Aborted { by: Some(rank), reason: reason.to_string() };
            board.abort(rank, heard);
        })
    }

    fn health(&self) -> Health {
        let (alive, cause) = self.board.health();
        Health { world_size: self.board.world_size(), next_step: self.step, alive, cause }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let presence = if std::thread::panicking() { Presence::Panicked } else { Presence::Left };
        self.board.leave(self.rank, presence);
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threads")
            .field("rank", &self.rank)
            .field("world_size", &self.board.world_size())
            .field("next_step", &self.step)
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}
