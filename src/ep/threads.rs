//! Ranks as threads of one process.

use super::board::{Board, Presence};
use super::communicator::{Communicator, Deadlines};
use super::error::EpError;
use super::lobby::Lobby;
use super::member::{Member, Nobody, communicate_through_field};
use candle_core::Result as CandleResult;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The largest group that [`Threads::group`] builds.
pub const MAX_RANKS: usize = 1024;

/// A rank that is a thread of this process. Tensors are on the CPU.
///
/// Rows change hands as handles: each rank copies or adds what it needs on its own thread, outside
/// of any lock. Besides what every [`Communicator`](super::Communicator) promises:
///
/// * A rank that drops its handle while a call of the others needs it fails that call at once, with
///   [`RankLeft`](super::EpErrorKind::RankLeft) or, when its thread is panicking,
///   [`RankPanicked`](super::EpErrorKind::RankPanicked). Dropping after the last collective is the ordinary end
///   and disturbs nobody, not even ranks that have yet to wake up from that collective.
/// * A rank that makes another call than the others is named ([`Desync`](super::EpErrorKind::Desync)) as soon
///   as more than half of the ranks agree against it or everybody has arrived, and within 0.1 s of the first
///   disagreement in any case. A skipped call looks like the next call unless operation, label, dtype, row
///   shape or counts differ, so set a label per layer; what is left shows at the end as a rank that left.
pub struct Threads(pub(super) Member<Nobody>, Lobby);

impl Threads {
    /// Builds a group and returns one handle per rank, in rank order; move each into its own thread.
    ///
    /// `deadlines` is how long each call waits for the other ranks, counted from its own arrival: one [`Duration`], or one
    /// for warm-up and one for serving.
    ///
    /// # Errors
    ///
    /// `world_size` is zero or above [`MAX_RANKS`].
    pub fn group(world_size: usize, deadlines: impl Into<Deadlines>) -> CandleResult<Vec<Self>> {
        let lobby = Lobby::new(world_size, deadlines)?;
        let board = lobby.first_board();
        Ok((0..world_size).map(|rank| Self::on(Arc::clone(&board), rank, lobby.clone())).collect())
    }

    /// Leaves this group, and joins the next generation of it as the same rank: see [`Lobby::join`].
    ///
    /// # Errors
    ///
    /// Those of [`Lobby::join`].
    pub fn rebuild(self) -> Result<Self, EpError> {
        let (rank, generation, lobby) = (self.0.rank(), self.0.generation(), self.lobby());
        drop(self);
        lobby.join(rank, generation.saturating_add(1))
    }

    /// Where a thread that takes the place of a rank joins the group when it is built anew.
    pub fn lobby(&self) -> Lobby {
        self.1.clone()
    }

    /// A group of one.
    pub(super) fn alone() -> Self {
        let lobby = Lobby::of(1, Duration::MAX.into());
        Self::on(lobby.first_board(), 0, lobby)
    }

    pub(super) fn on(board: Arc<Board>, rank: usize, lobby: Lobby) -> Self {
        Self(Member::new(board, Arc::new(Nobody), rank, lobby.deadlines()), lobby)
    }
}

communicate_through_field!(Threads);

impl Drop for Threads {
    fn drop(&mut self) {
        let presence = if std::thread::panicking() { Presence::Panicked } else { Presence::Left };
        self.0.board.leave(self.0.rank(), presence);
    }
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Threads").field(&self.0).finish()
    }
}
