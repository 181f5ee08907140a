//! Where ranks that are threads meet again after a failure.
//!
//! ```text
//! join(rank, generation):
//!     refuse a generation that was formed or given up before, and a rank that has a seat
//!     take the seat; the last one to come makes the board and wakes everybody
//!     otherwise wait for the board, for the end of this attempt, or the deadline, which ends it
//! ```

use super::board::{Board, error_at};
use super::call::Site;
use super::communicator::Deadlines;
use super::error::{Collective, EpError, EpErrorKind};
use super::threads::{MAX_RANKS, Threads};
use candle_core::{Result as CandleResult, bail};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The place where the ranks of a group of [`Threads`] meet to build it anew. Clones are the same place.
///
/// A generation begins when every rank has joined it. Each generation is attempted once: one that was formed, or that some
/// rank waited for in vain, is refused from then on, so nothing of an old group can be taken for a part of a new one.
#[derive(Clone)]
pub struct Lobby(Arc<Shared>);

struct Shared {
    world_size: usize,
    deadlines: Deadlines,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The newest generation that was formed.
    board: Arc<Board>,
    /// The newest generation that was attempted, formed or not.
    newest: u64,
    /// Who waits for `newest`, while it gathers.
    seats: Option<Vec<bool>>,
    /// Why `newest` was given up.
    given_up: Option<EpErrorKind>,
}

impl Lobby {
    /// The lobby of a group whose generation 0 nobody has joined; [`Threads::group`] has one that has.
    pub(super) fn new(world_size: usize, deadlines: impl Into<Deadlines>) -> CandleResult<Self> {
        if world_size == 0 || world_size > MAX_RANKS {
            bail!("Threads::group: world_size is {world_size}, it must be 1 to {MAX_RANKS}");
        }
        Ok(Self::of(world_size, deadlines.into()))
    }

    pub(super) fn of(world_size: usize, deadlines: Deadlines) -> Self {
        let board = Arc::new(Board::shared(world_size, 0));
        let state = Mutex::new(State { board, newest: 0, seats: None, given_up: None });
        Self(Arc::new(Shared { world_size, deadlines, state, changed: Condvar::new() }))
    }

    pub(super) fn first_board(&self) -> Arc<Board> {
        Arc::clone(&self.lock().board)
    }

    pub(super) fn deadlines(&self) -> Deadlines {
        self.0.deadlines
    }

    /// The number of the newest generation that every rank has joined.
    pub fn generation(&self) -> u64 {
        self.lock().board.generation()
    }

    /// Joins generation `generation` of the group as `rank`, and waits for the others at most
    /// [`Deadlines::warm_up`]. The first to join poisons the generation before, so that nobody stays behind in it.
    ///
    /// # Errors
    ///
    /// [`OldGeneration`](EpErrorKind::OldGeneration): `generation` is not above all that were attempted, or a later one was
    /// begun meanwhile. [`Timeout`](EpErrorKind::Timeout): ranks are missing; the generation is then given up for all.
    /// [`DuplicateRank`](EpErrorKind::DuplicateRank), [`BadArgument`](EpErrorKind::BadArgument): `rank` has joined before, or
    /// is not below the number of ranks.
    pub fn join(&self, rank: usize, generation: u64) -> Result<Threads, EpError> {
        let label = Arc::from(format!("generation {generation}"));
        let site = Site { op: Collective::Rendezvous, step: 0, label };
        let board = self.seat(rank, generation).map_err(|kind| error_at(rank, &site, kind))?;
        Ok(Threads::on(board, rank, self.clone()))
    }

    fn seat(&self, rank: usize, generation: u64) -> Result<Arc<Board>, EpErrorKind> {
        let arrived = Instant::now();
        let deadline = self.0.deadlines.warm_up;
        let mut state = self.lock();
        self.begin(&mut state, rank, generation)?;
        self.take_seat(&mut state, rank)?;
        loop {
            if state.board.generation() == generation {
                return Ok(Arc::clone(&state.board));
            }
            if state.newest != generation {
                return Err(EpErrorKind::OldGeneration { generation, current: state.newest });
            }
            let Some(seats) = &state.seats else {
                let given_up = state.given_up.clone();
                return Err(given_up.unwrap_or(EpErrorKind::OldGeneration { generation, current: state.newest }));
            };
            let wait = deadline.checked_sub(arrived.elapsed()).unwrap_or_default();
            if wait.is_zero() {
                let missing = seats.iter().enumerate().filter(|(_, taken)| !**taken).map(|(rank, _)| rank).collect();
                state.seats = None;
                state.given_up = Some(EpErrorKind::Timeout { missing, deadline });
                self.0.changed.notify_all();
                continue;
            }
            state = self.0.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Opens the attempt at `generation`, unless it is open.
    fn begin(&self, state: &mut State, rank: usize, generation: u64) -> Result<(), EpErrorKind> {
        let world_size = self.0.world_size;
        if rank >= world_size {
            return Err(EpErrorKind::BadArgument(format!(
                "rank is {rank}, it must be below world_size = {world_size}"
            )));
        }
        let is_open = generation == state.newest && state.seats.is_some();
        if generation <= state.newest && !is_open {
            return Err(EpErrorKind::OldGeneration { generation, current: state.newest });
        }
        if !is_open {
            state.newest = generation;
            state.seats = Some(vec![false; world_size]);
            let reason = format!("the group is built anew, as generation {generation}");
            state.board.abort(rank, EpErrorKind::Aborted { by: Some(rank), reason });
            self.0.changed.notify_all();
        }
        Ok(())
    }

    /// The last one to sit down makes the board.
    fn take_seat(&self, state: &mut State, rank: usize) -> Result<(), EpErrorKind> {
        let seats = state.seats.get_or_insert_default();
        match seats.get_mut(rank) {
            Some(taken) if !*taken => *taken = true,
            _ => return Err(EpErrorKind::DuplicateRank { rank }),
        }
        if seats.iter().all(|taken| *taken) {
            state.seats = None;
            state.board.succeed(state.newest);
            state.board = Arc::new(Board::shared(self.0.world_size, state.newest));
            self.0.changed.notify_all();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Lobby {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Lobby")
            .field("world_size", &self.0.world_size)
            .field("generation", &state.board.generation())
            .field("gathering", &state.seats)
            .finish()
    }
}
