//! What watches over the work of a device: one thread per rank.
//!
//! ```text
//! every few milliseconds:
//!     forget the calls whose work is done
//!     a call overdue, or its work failed      -> poison the group, naming that call
//!     a rank lost while calls are under way   -> poison the group
//!     the group is poisoned, by whomever      -> abort the communicator, once: queues drain
//! ```
//!
//! 1. A call is watched from before it enters the library, since that may block too, until an event behind its work is done.
//! 2. The library allows one thing from another thread while its owner is in a call: the abort, which makes that call return.
//!    An owner that is inside is left a moment to come out by itself; one that is outside is let in no more.
//! 3. Whoever is late on this machine is named, by what is seen of it (`pulse.rs`) or what the device says.
//! 4. Events are asked on a thread that relaxes its capture mode, so that asking disturbs no capture of another thread.
//! 5. Work that an abort has cut short looks done. So what was under way is noted as torn before the abort.

use super::super::call::Site;
use super::super::control::Overseer;
use super::super::error::EpErrorKind;
use super::pulse::Pulse;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, sys};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often is looked while calls are under way.
const BUSY: Duration = Duration::from_millis(2);
/// How often is looked otherwise.
const IDLE: Duration = Duration::from_millis(10);
/// How often the owner looks while it waits.
const OWNER: Duration = Duration::from_micros(50);
/// How long an owner that is inside a call is waited for before an abort.
const COMING_OUT: Duration = Duration::from_millis(100);
/// How long the end of the communicator is waited for, beyond the work that is under way.
const ENDING: Duration = Duration::from_secs(2);
/// The longest that work under way is waited for when a rank leaves.
const LEAVING: Duration = Duration::from_secs(30);

/// What carries rows between devices, as its rank's watchdog has it.
pub(in super::super) trait Carrier: Clone + Send + 'static {
    /// Makes the device drop whatever waits for other ranks, from any thread.
    ///
    /// # Safety
    /// No copy of it is used any more, but by calls that are under way.
    unsafe fn abort(self) -> Result<(), String>;

    /// Ends it where nothing is under way.
    ///
    /// # Safety
    /// No copy of it is used any more.
    unsafe fn destroy(self) -> Result<(), String>;

    /// The ranks that the device has waited long for, if it says so.
    fn missing(&self) -> Vec<usize> {
        Vec::new()
    }
}

/// The owner's side.
pub(super) struct Watchdog<C: Carrier> {
    shared: Arc<Shared<C>>,
    overseer: Overseer,
    thread: Option<JoinHandle<()>>,
}

struct Shared<C> {
    state: Mutex<State<C>>,
    changed: Condvar,
}

struct State<C> {
    /// `None` when it was ended.
    carrier: Option<C>,
    /// Whether the owner is in a call of the library.
    inside: bool,
    /// Calls under way, oldest first.
    watched: VecDeque<Watched>,
    /// The oldest call that an abort has cut short.
    torn: Option<Site>,
    leaving: Option<Leaving>,
    ended: bool,
    /// What is seen of the other ranks, where they are on this machine.
    pulse: Option<Pulse>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// When the work is done.
    InPeace,
    AtOnce,
}

struct Watched {
    site: Site,
    since: Instant,
    deadline: Duration,
    /// Behind the work; `None` while the owner is inside.
    behind: Option<CudaEvent>,
}

/// What the owner enters the library for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Call,
    /// The rest of the last call, which the other ranks need not have.
    More,
}

/// The group was given up before the call could be made, or while it was made.
pub(in super::super) struct GivenUp;

impl<C: Carrier> Watchdog<C> {
    pub(super) fn start(
        carrier: C,
        context: Arc<CudaContext>,
        overseer: Overseer,
        (rank, pulse): (usize, Option<Pulse>),
    ) -> io::Result<Self> {
        let state = State {
            carrier: Some(carrier),
            inside: false,
            watched: VecDeque::new(),
            torn: None,
            leaving: None,
            ended: false,
            pulse,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let mut watchdog = Self { shared: Arc::clone(&shared), overseer: overseer.clone(), thread: None };
        let thread = thread::Builder::new().name(format!("rank {rank} watch"));
        watchdog.thread = Some(thread.spawn(move || shared.run(&context, &overseer))?);
        Ok(watchdog)
    }

    /// The owner enters the library for the call at `site`, which began at `since`. [`Watchdog::leave`] follows.
    pub(super) fn enter(
        &self,
        (site, entry): (&Site, Entry),
        since: Instant,
        deadline: Duration,
    ) -> Result<C, GivenUp> {
        let mut state = self.shared.lock();
        let carrier = state.carrier.clone().ok_or(GivenUp)?;
        state.inside = true;
        if let Some(pulse) = state.pulse.as_mut().filter(|_| entry == Entry::Call) {
            pulse.begin();
        }
        state.watched.push_back(Watched { site: site.clone(), since, deadline, behind: None });
        Ok(carrier)
    }

    /// The owner has come out; `behind` is recorded behind its work, which has a whole deadline from now on. Without it
    /// there is nothing to be watched.
    pub(super) fn leave(&self, behind: Option<CudaEvent>) -> Result<(), GivenUp> {
        let mut state = self.shared.lock();
        state.inside = false;
        self.shared.changed.notify_all();
        if state.carrier.is_none() {
            return Err(GivenUp);
        }
        match behind {
            Some(behind) => {
                if let Some(last) = state.watched.back_mut() {
                    last.since = Instant::now();
                    last.behind = Some(behind);
                }
            }
            None => drop(state.watched.pop_back()),
        }
        Ok(())
    }

    /// Waits until nothing is under way; or names the oldest call that was cut short.
    pub(super) fn wait(&self) -> Result<(), Site> {
        let mut state = self.shared.lock();
        loop {
            // What failed is for the other thread.
            let _ = state.forget_what_is_done();
            if let Some(site) = &state.torn {
                return Err(site.clone());
            }
            if state.watched.is_empty() || state.carrier.is_none() {
                return Ok(());
            }
            state = self.shared.wait(state, OWNER);
        }
    }

    /// The end, in peace or not: never longer than the work under way may take, and a moment.
    fn end(&mut self) {
        let in_peace = !thread::panicking() && !self.overseer.has_failed();
        let mut state = self.shared.lock();
        state.leaving = Some(if in_peace { Leaving::InPeace } else { Leaving::AtOnce });
        self.shared.changed.notify_all();
        let under_way = state.watched.iter().map(|watched| watched.deadline).max().unwrap_or_default();
        let mut ended = self.shared.wait_for_end(state, under_way.min(LEAVING) + ENDING);
        if !ended {
            self.shared.lock().leaving = Some(Leaving::AtOnce);
            self.shared.changed.notify_all();
            ended = self.shared.wait_for_end(self.shared.lock(), ENDING);
        }
        match self.thread.take() {
            // It has nothing left to do but to return.
            Some(thread) if ended => drop(thread.join()),
            _ => tracing::warn!("the library does not let go of its communicator; left to itself"),
        }
    }
}

impl<C: Carrier> Drop for Watchdog<C> {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end();
        }
    }
}

impl<C: Carrier> Shared<C> {
    /// The life of the thread.
    fn run(&self, context: &Arc<CudaContext>, overseer: &Overseer) {
        if let Err(error) = context.bind_to_thread() {
            tracing::warn!(%error, "the device cannot be watched");
        }
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the mode is read and written during the call only.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
        let mut state = self.lock();
        while !state.ended {
            state = self.look(state, overseer);
        }
        self.changed.notify_all();
    }

    /// Looks once, and waits.
    fn look<'a>(&'a self, mut state: MutexGuard<'a, State<C>>, overseer: &Overseer) -> MutexGuard<'a, State<C>> {
        if let Some(pulse) = &mut state.pulse {
            pulse.beat();
        }
        if state.carrier.is_some() && state.must_abort(overseer) {
            state = self.abort(state);
        }
        match state.leaving {
            Some(Leaving::InPeace) if state.carrier.is_some() && !state.watched.is_empty() => {}
            Some(leaving) => return self.finish(state, leaving),
            None => {}
        }
        if state.watched.is_empty() {
            self.changed.notify_all();
        }
        let pause = if state.watched.is_empty() { IDLE } else { BUSY };
        self.wait(state, pause)
    }

    fn abort<'a>(&'a self, mut state: MutexGuard<'a, State<C>>) -> MutexGuard<'a, State<C>> {
        let Some(carrier) = state.carrier.take() else { return state };
        state.torn = state.watched.front().map(|watched| watched.site.clone());
        self.changed.notify_all();
        let inside = |state: &mut State<C>| state.inside;
        let waited = self.changed.wait_timeout_while(state, COMING_OUT, inside);
        drop(waited.unwrap_or_else(PoisonError::into_inner).0);
        // SAFETY: nobody is let in any more, and whoever is inside has the library's word that it comes out.
        if let Err(what) = unsafe { carrier.abort() } {
            tracing::warn!(what, "the communicator was not given up in order");
        }
        let mut state = self.lock();
        state.watched.clear();
        self.changed.notify_all();
        state
    }

    fn finish<'a>(&'a self, mut state: MutexGuard<'a, State<C>>, leaving: Leaving) -> MutexGuard<'a, State<C>> {
        if leaving == Leaving::AtOnce {
            state = self.abort(state);
        }
        if let Some(carrier) = state.carrier.take() {
            drop(state);
            // SAFETY: the owner is leaving, and the communicator is nobody else's.
            if let Err(what) = unsafe { carrier.destroy() } {
                tracing::warn!(what, "the communicator did not end in order");
            }
            state = self.lock();
        }
        state.ended = true;
        state
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State<C>>, pause: Duration) -> MutexGuard<'a, State<C>> {
        self.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0
    }

    fn wait_for_end(&self, state: MutexGuard<'_, State<C>>, patience: Duration) -> bool {
        let going = |state: &mut State<C>| !state.ended;
        self.changed.wait_timeout_while(state, patience, going).unwrap_or_else(PoisonError::into_inner).0.ended
    }

    fn lock(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: Carrier> State<C> {
    /// Poisons the group where a call went wrong; is it poisoned?
    fn must_abort(&mut self, overseer: &Overseer) -> bool {
        let failed = self.forget_what_is_done();
        if overseer.has_failed() {
            return true;
        }
        let Some(oldest) = self.watched.front() else { return false };
        let kind = match failed {
            Err(what) => Some(EpErrorKind::Library(what)),
            Ok(()) => overseer.lost().or_else(|| oldest.overdue(self.carrier.as_ref(), self.pulse.as_ref())),
        };
        if let Some(kind) = kind {
            overseer.fail(&oldest.site, kind);
            return true;
        }
        false
    }

    /// Work of one stream ends in its order.
    fn forget_what_is_done(&mut self) -> Result<(), String> {
        while let Some(event) = self.watched.front().and_then(|oldest| oldest.behind.as_ref()) {
            match event.try_is_complete() {
                Ok(true) if self.carrier.is_some() => drop(self.watched.pop_front()),
                Ok(_) => break,
                Err(error) => return Err(format!("the device failed: {error}")),
            }
        }
        Ok(())
    }
}

impl Watched {
    fn overdue(&self, carrier: Option<&impl Carrier>, pulse: Option<&Pulse>) -> Option<EpErrorKind> {
        if self.since.elapsed() < self.deadline {
            return None;
        }
        let (op, step, deadline) = (self.site.op, self.site.step, self.deadline);
        let mut missing = carrier.map(Carrier::missing).unwrap_or_default();
        if missing.is_empty() {
            missing = pulse.map(Pulse::behind).unwrap_or_default();
        }
        Some(match missing.is_empty() {
            true => EpErrorKind::Unfinished { op, step, deadline },
            false => EpErrorKind::Timeout { missing, deadline },
        })
    }
}
