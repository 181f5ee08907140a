//! The meeting place of the ranks as one process sees it: a mutex, a condition variable, one round at a time.
//!
//! ```text
//! meet(rank, post):
//!     posts[rank] = post
//!     all posted and all agree -> move the posts out as this round's result, wake everybody
//!     otherwise wait for the result, a fault, a rank that left, or the deadline
//! arrive(rank, post): the same without waiting, for a rank of another process
//! ```
//!
//! Ranks that are threads share one board. A rank that is a process has a board of its own, on which what it hears of the
//! others is laid down; so both kinds of groups judge by the same rules.
//!
//! 1. A rank posts to the next round only after it took the result of the last one, so at most one
//!    result waits to be taken. It is freed when the last rank has taken it.
//! 2. A finished round is looked for before anything that went wrong: whoever took part in it gets it,
//!    even when another rank has left or failed since. Between processes, news of a fault in a later call may overtake the
//!    last posts of this one; such a fault waits for its call.
//! 3. Disagreement is judged when it is clear who is odd (a party with more than half of the ranks, or
//!    everybody posted), else after a short grace, so that the order of arrival does not decide
//!    who is blamed.
//! 4. Only handles move under the lock. Rows are copied and added by each rank after it has left.
//! 5. A rank of another process that did not come may be waiting itself, in the call before, for one that sent its posts to
//!    this process and no further. So at its deadline a rank tells the others where it waits and for whom; who waits in the
//!    call before answers with the same, whatever its own deadline is. A moment later those are blamed that are missing and
//!    have told nothing; if all have, those that they miss.
//! 6. A rank of another process may be done with a round that this one still waits for, and be one call ahead. It cannot be
//!    two ahead without this process's post.

use super::call::{Post, Site};
use super::error::{Collective, EpError, EpErrorKind};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a disagreement waits for more ranks to show who is odd.
const GRACE: Duration = Duration::from_millis(100);
/// How long the news of another process may take.
const NEWS: Duration = Duration::from_millis(100);

pub(super) struct Board {
    world_size: usize,
    generation: u64,
    /// How many of the ranks take their results here.
    takers: usize,
    /// How long the news of another rank may take.
    news: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    round: u64,
    /// Of the current round, by rank.
    posts: Vec<Option<Post>>,
    /// Of the round after it, by rank.
    early: Vec<Option<Post>>,
    /// What ranks of other processes told last of waiting.
    waiting: Vec<Option<Waiting>>,
    /// Since when two posts of the current round disagree.
    disagreement: Option<Instant>,
    finished: Option<Finished>,
    presence: Vec<Presence>,
    fault: Option<Arc<Fault>>,
    /// The generation that took this one's place.
    successor: Option<u64>,
}

/// Where a rank waits, and for whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Waiting {
    pub(super) step: u64,
    pub(super) missing: Vec<usize>,
}

struct Finished {
    round: u64,
    posts: Arc<Vec<Post>>,
    to_take: usize,
}

#[derive(Clone, PartialEq, Eq)]
pub(super) enum Presence {
    Here,
    Left,
    Panicked,
    /// Its process is gone, or not to be trusted.
    Lost(String),
}

/// The first failure of the group.
pub(super) struct Fault {
    /// As the rank that found it saw it.
    pub(super) cause: EpError,
    /// As the other ranks hear of it.
    pub(super) heard: EpErrorKind,
    /// The first call that nobody can carry out any more.
    pub(super) since: u64,
}

impl Fault {
    /// A failure of the call that `cause` names, of which the others hear the same.
    pub(super) fn of_all(cause: EpError) -> Arc<Self> {
        Arc::new(Self { heard: cause.kind.clone(), since: cause.step, cause })
    }
}

impl Board {
    /// The board of a process in which all ranks are threads.
    pub(super) fn shared(world_size: usize, generation: u64) -> Self {
        Self::new(world_size, generation, world_size, Duration::ZERO)
    }

    /// The board of a process that is one rank.
    pub(super) fn of_one_process(world_size: usize, generation: u64) -> Self {
        // A single other rank can wait for nobody but this one.
        Self::new(world_size, generation, 1, if world_size > 2 { NEWS } else { Duration::ZERO })
    }

    fn new(world_size: usize, generation: u64, takers: usize, news: Duration) -> Self {
        let no_posts = || (0..world_size).map(|_| None).collect();
        Self {
            world_size,
            generation,
            takers,
            news,
            state: Mutex::new(State {
                round: 0,
                posts: no_posts(),
                early: no_posts(),
                waiting: vec![None; world_size],
                disagreement: None,
                finished: None,
                presence: vec![Presence::Here; world_size],
                fault: None,
                successor: None,
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn world_size(&self) -> usize {
        self.world_size
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// What keeps a rank from making call number `step`.
    pub(super) fn fault_at(&self, step: u64) -> Option<Arc<Fault>> {
        self.lock().fault_at(step)
    }

    /// The generation that took this one's place.
    pub(super) fn successor(&self) -> Option<u64> {
        self.lock().successor
    }

    /// Posts and waits for the others; returns everybody's posts of this round in rank order. Calls `tell` if the deadline has
    /// passed and the others should know that this rank waits; it must not wait, for it has the lock.
    pub(super) fn meet(
        &self,
        rank: usize,
        post: Post,
        deadline: Duration,
        tell: impl FnOnce(Waiting),
    ) -> Result<Arc<Vec<Post>>, Arc<Fault>> {
        let mut tell = Some(tell);
        let arrived = Instant::now();
        let site = post.site.clone();
        let mut state = self.lock();
        let round = state.round;
        if let Some(fault) = state.fault_at(round) {
            return Err(fault);
        }
        if let Some(place) = state.posts.get_mut(rank) {
            *place = Some(post);
        }
        self.judge(&mut state);
        loop {
            if let Some(posts) = state.take_finished(round) {
                return Ok(posts);
            }
            if let Some(fault) = state.fault_at(round) {
                return Err(fault);
            }
            let kind = match state.verdict(rank, deadline, arrived.elapsed(), self.news) {
                Err(kind) => kind,
                Ok(wait) => {
                    if arrived.elapsed() >= deadline
                        && let Some(tell) = tell.take()
                    {
                        tell(state.waiting());
                    }
                    state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                    continue;
                }
            };
            return Err(self.set_fault(&mut state, Fault::of_all(error_at(rank, &site, kind))));
        }
    }

    /// Lays down the post of a rank of another process, or says why no rank would send it.
    pub(super) fn arrive(&self, rank: usize, post: Post) -> Result<(), String> {
        let mut state = self.lock();
        if state.fault_at(state.round).is_some() {
            return Ok(());
        }
        state.accept(rank, post)?;
        self.judge(&mut state);
        Ok(())
    }

    /// Notes where rank `other` of another process waits. What rank `own` of this process has to answer, if it waits in the call
    /// before.
    pub(super) fn hear_waiting(&self, other: usize, waiting: Waiting, own: usize) -> Option<Waiting> {
        let mut state = self.lock();
        let waits_before = state.posts.get(own).is_some_and(Option::is_some) && is_before(state.round, waiting.step);
        if let Some(place) = state.waiting.get_mut(other) {
            *place = Some(waiting);
        }
        waits_before.then(|| state.waiting())
    }

    /// Poisons the group, unless it is; returns the fault that counts.
    pub(super) fn fail(&self, fault: Arc<Fault>) -> Arc<Fault> {
        self.set_fault(&mut self.lock(), fault)
    }

    /// Poisons the group on behalf of `rank`, outside of any call.
    pub(super) fn abort(&self, rank: usize, kind: EpErrorKind) -> Arc<Fault> {
        let mut state = self.lock();
        let site = Site { op: Collective::Abort, step: state.round, label: Arc::from("") };
        self.set_fault(&mut state, Fault::of_all(error_at(rank, &site, kind)))
    }

    /// Notes that generation `current` has taken this one's place.
    pub(super) fn succeed(&self, current: u64) {
        self.lock().successor = Some(current);
    }

    /// Notes that a rank dropped its handle, or how it was lost. The first news of a rank that is gone counts.
    pub(super) fn leave(&self, rank: usize, how: Presence) {
        if let Some(place) = self.lock().presence.get_mut(rank)
            && *place == Presence::Here
        {
            *place = how;
        }
        self.changed.notify_all();
    }

    /// Waits until every rank but `rank` is gone, at most `patience`.
    pub(super) fn wait_for_farewells(&self, rank: usize, patience: Duration) {
        let somebody_is_here = |state: &mut State| {
            let mut others = state.presence.iter().enumerate().filter(|(other, _)| *other != rank);
            others.any(|(_, presence)| *presence == Presence::Here)
        };
        let state = self.lock();
        drop(self.changed.wait_timeout_while(state, patience, somebody_is_here));
    }

    /// The first rank that is gone without a proper farewell, and how.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for devices"))]
    pub(super) fn lost(&self) -> Option<EpErrorKind> {
        let lost = |(rank, presence): (usize, &Presence)| match presence {
            Presence::Panicked => Some(EpErrorKind::RankPanicked { rank }),
            Presence::Lost(reason) => Some(EpErrorKind::RankLost { rank, reason: reason.clone() }),
            Presence::Here | Presence::Left => None,
        };
        self.lock().presence.iter().enumerate().find_map(lost)
    }

    /// Who still holds a handle, and the fault if there is one.
    pub(super) fn health(&self) -> (Vec<bool>, Option<EpError>) {
        let state = self.lock();
        let alive = state.presence.iter().map(|p| *p == Presence::Here);
        let cause = state.fault.as_ref().map(|fault| fault.cause.clone());
        (alive.collect(), cause)
    }

    /// An arrival as such wakes nobody: only the last one, or one that disagrees.
    fn judge(&self, state: &mut State) {
        if state.finish_round(self.takers) || state.note_disagreement() {
            self.changed.notify_all();
        }
    }

    fn set_fault(&self, state: &mut State, fault: Arc<Fault>) -> Arc<Fault> {
        if state.fault.is_none() {
            if fault.since <= state.round {
                state.posts.iter_mut().chain(&mut state.early).for_each(|post| *post = None);
            }
            self.changed.notify_all();
        }
        Arc::clone(state.fault.get_or_insert(fault))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn fault_at(&self, step: u64) -> Option<Arc<Fault>> {
        self.fault.as_ref().filter(|fault| fault.since <= step).map(Arc::clone)
    }

    /// Takes the post of a rank that may be one call ahead.
    fn accept(&mut self, rank: usize, post: Post) -> Result<(), String> {
        let (Some(current), Some(early)) = (self.posts.get_mut(rank), self.early.get_mut(rank)) else {
            return Err(format!("there is no rank {rank}"));
        };
        let due = self.round.wrapping_add(u64::from(current.is_some()));
        if post.site.step != due || early.is_some() {
            return Err(format!("it sent its call of step {} when step {due} was due", post.site.step));
        }
        *if current.is_none() { current } else { early } = Some(post);
        Ok(())
    }

    /// Ends the round if every rank posted the same call.
    fn finish_round(&mut self, takers: usize) -> bool {
        if self.posts.iter().any(Option::is_none) || self.disagreeing() {
            return false;
        }
        let posts: Vec<Post> = self.posts.iter_mut().filter_map(Option::take).collect();
        self.finished = Some(Finished { round: self.round, to_take: takers, posts: Arc::new(posts) });
        self.round = self.round.wrapping_add(1);
        std::mem::swap(&mut self.posts, &mut self.early);
        true
    }

    fn take_finished(&mut self, round: u64) -> Option<Arc<Vec<Post>>> {
        let finished = self.finished.as_mut().filter(|f| f.round == round)?;
        finished.to_take = finished.to_take.saturating_sub(1);
        if finished.to_take == 0 {
            self.finished.take().map(|finished| finished.posts)
        } else {
            Some(Arc::clone(&finished.posts))
        }
    }

    fn note_disagreement(&mut self) -> bool {
        if self.disagreement.is_none() && self.disagreeing() {
            self.disagreement = Some(Instant::now());
        }
        self.disagreement.is_some()
    }

    fn disagreeing(&self) -> bool {
        let mut posted = self.posts.iter().flatten();
        posted.next().is_some_and(|first| posted.any(|post| !post.agrees_with(first)))
    }

    /// How much longer to wait for the current round, or why it is lost.
    fn verdict(
        &self,
        own: usize,
        deadline: Duration,
        waited: Duration,
        news: Duration,
    ) -> Result<Duration, EpErrorKind> {
        let mut wait = deadline.saturating_sub(waited);
        if let Some(since) = self.disagreement {
            wait = wait.min(GRACE.saturating_sub(since.elapsed()));
            if let Some(desync) = self.odd_rank(wait.is_zero()) {
                return Err(desync);
            }
        }
        let absent = || self.posts.iter().enumerate().filter(|(_, p)| p.is_none());
        for (rank, _) in absent() {
            match self.presence.get(rank) {
                Some(Presence::Left) => return Err(EpErrorKind::RankLeft { rank }),
                Some(Presence::Panicked) => return Err(EpErrorKind::RankPanicked { rank }),
                Some(Presence::Lost(reason)) => return Err(EpErrorKind::RankLost { rank, reason: reason.clone() }),
                Some(Presence::Here) | None => {}
            }
        }
        if !wait.is_zero() {
            return Ok(wait);
        }
        let patience = deadline.saturating_add(news).saturating_sub(waited);
        if patience.is_zero() {
            Err(EpErrorKind::Timeout { missing: self.blamed(own), deadline })
        } else {
            Ok(patience)
        }
    }

    /// Where this process's rank waits.
    fn waiting(&self) -> Waiting {
        Waiting { step: self.round, missing: self.missing() }
    }

    fn missing(&self) -> Vec<usize> {
        self.posts.iter().enumerate().filter(|(_, post)| post.is_none()).map(|(rank, _)| rank).collect()
    }

    /// Those who are missing and do not wait themselves in the call before; if all do, those that they miss, but for the rank
    /// `own`, which came there.
    fn blamed(&self, own: usize) -> Vec<usize> {
        let missing = self.missing();
        let told = |rank: &usize| {
            let waiting = self.waiting.get(*rank).and_then(Option::as_ref);
            waiting.filter(|waiting| is_before(waiting.step, self.round)).map(|waiting| &waiting.missing)
        };
        let silent: Vec<usize> = missing.iter().copied().filter(|rank| told(rank).is_none()).collect();
        if !silent.is_empty() {
            return silent;
        }
        let mut missed: Vec<usize> =
            missing.iter().filter_map(told).flatten().copied().filter(|rank| *rank != own).collect();
        missed.sort_unstable();
        missed.dedup();
        if missed.is_empty() { missing } else { missed }
    }

    /// Who made another call than the largest party; `None` while more posts could tell, unless
    /// the time is up.
    fn odd_rank(&self, time_is_up: bool) -> Option<EpErrorKind> {
        let posted: Vec<(usize, &Post)> =
            self.posts.iter().enumerate().filter_map(|(rank, post)| Some((rank, post.as_ref()?))).collect();
        let party = |of: &Post| posted.iter().filter(|(_, p)| p.agrees_with(of)).count();
        // Of equally large parties, the one that was met first has the lowest rank.
        let (size, truth) = posted.iter().fold((0, None), |best, &(_, post)| {
            let size = party(post);
            if size > best.0 { (size, Some(post)) } else { best }
        });
        let world_size = self.posts.len();
        if !time_is_up && size <= world_size / 2 && posted.len() < world_size {
            return None;
        }
        let truth = truth?;
        let &(rank, odd) = posted.iter().find(|(_, p)| !p.agrees_with(truth))?;
        let (expected, found) = truth.difference(odd);
        Some(EpErrorKind::Desync { rank, expected, found })
    }
}

/// Is `step` the call before `next`?
fn is_before(step: u64, next: u64) -> bool {
    step.wrapping_add(1) == next
}

/// The error of `rank`'s call at `site`.
pub(super) fn error_at(rank: usize, site: &Site, kind: EpErrorKind) -> EpError {
    EpError { rank, op: site.op, step: site.step, label: site.label.to_string(), kind }
}
