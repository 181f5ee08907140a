//! A rank that fails on purpose, for testing what the others make of it.

use super::communicator::{AbortHandle, Communicator, Deadlines, Health};
use super::error::{Collective, EpError, EpErrorKind};
use candle_core::{Result as CandleResult, Tensor};
use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

/// What goes wrong with a call of a [`Faulty`] rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Injection {
    /// The call is made this much later.
    Delay(Duration),
    /// The call is not made before the others have given up.
    Silence,
    /// The handle is dropped instead; this and all later calls return [`RankLeft`](EpErrorKind::RankLeft).
    Death,
    /// The call is made with rows (or values) of another shape; a call that has none is made as it is.
    WrongShape,
    /// The call is not made, and returns zeros.
    Skip,
    /// The call is made twice, and returns what the first one did, or the error of the second.
    Double,
}

/// Which calls of a [`Faulty`] rank go wrong. The first call has number 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule(BTreeMap<u64, Injection>);

impl Schedule {
    /// Nothing goes wrong.
    pub fn new() -> Self {
        Self::default()
    }

    /// Call number `call` goes wrong too, in this way.
    pub fn at(mut self, call: u64, injection: Injection) -> Self {
        self.0.insert(call, injection);
        self
    }

    /// One of the first `num_calls` calls of one of `world_size` ranks goes wrong in one of the ways, delays being at most
    /// `longest`; this is the part of `rank`. The same arguments give the same schedule.
    pub fn seeded(seed: u64, rank: usize, world_size: usize, num_calls: u64, longest: Duration) -> Self {
        let mut state = seed;
        let mut below = |limit: u64| {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ (mixed >> 31)) % limit.max(1)
        };
        let (victim, call) = (below(world_size as u64), below(num_calls));
        let delay = Duration::from_micros(below(u64::try_from(longest.as_micros()).unwrap_or(u64::MAX)));
        let injection = match below(6) {
            0 => Injection::Delay(delay),
            1 => Injection::Silence,
            2 => Injection::Death,
            3 => Injection::WrongShape,
            4 => Injection::Skip,
            _ => Injection::Double,
        };
        if victim == rank as u64 && num_calls > 0 { Self::new().at(call, injection) } else { Self::new() }
    }

    /// What goes wrong with call number `call`.
    pub fn of(&self, call: u64) -> Option<Injection> {
        self.0.get(&call).copied()
    }
}

/// **For testing.** A rank whose calls go wrong as a [`Schedule`] says; all others are those of the communicator within.
///
/// ```
/// use candle_moe::ep::{Communicator, EpErrorKind, Faulty, Injection, Schedule, launch};
/// use std::time::Duration;
///
/// let schedule = |rank| if rank == 1 { Schedule::new().at(2, Injection::Death) } else { Schedule::new() };
/// let outcomes = launch(3, Duration::from_secs(5), |ranks| {
///     let mut ranks = Faulty::new(ranks, schedule);
///     (0..4).find_map(|_| ranks.barrier().err())
/// })?;
/// for outcome in outcomes {
///     let error = outcome.expect("no rank panics").expect("the third barrier fails");
///     assert_eq!((error.step, error.kind), (2, EpErrorKind::RankLeft { rank: 1 }));
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Faulty<C> {
    /// `None` after a death.
    inner: Option<C>,
    schedule: Schedule,
    calls: u64,
    label: String,
    deadlines: Deadlines,
    deadline: Duration,
    abort_handle: AbortHandle,
    /// As it was at first; after a death, as it was then.
    health: Health,
    rank: usize,
}

/// What a call does besides going right.
struct Ways<T> {
    op: Collective,
    /// What it returns when it is skipped.
    zeros: CandleResult<T>,
}

impl<C: Communicator> Faulty<C> {
    /// Wraps a rank; `schedule` is asked once, for that rank.
    pub fn new(inner: C, schedule: impl FnOnce(usize) -> Schedule) -> Self {
        Self {
            schedule: schedule(inner.rank()),
            calls: 0,
            label: String::new(),
            deadlines: inner.deadlines(),
            deadline: inner.deadline(),
            abort_handle: inner.abort_handle(),
            health: inner.health(),
            rank: inner.rank(),
            inner: Some(inner),
        }
    }

    /// The communicator within, unless it died; to be [rebuilt](super::Threads::rebuild), say.
    pub fn into_inner(self) -> Option<C> {
        self.inner
    }

    /// One call. `make` is given the communicator and whether its rows are to have another shape.
    fn call<T>(
        &mut self,
        ways: Ways<T>,
        mut make: impl FnMut(&mut C, bool) -> Result<T, EpError>,
    ) -> Result<T, EpError> {
        let injection = self.schedule.of(self.calls);
        self.calls += 1;
        if injection == Some(Injection::Death) {
            self.health = self.health();
            self.inner = None;
        }
        let error = |kind, step| EpError { rank: self.rank, op: ways.op, step, label: self.label.clone(), kind };
        let Some(inner) = &mut self.inner else {
            return Err(error(EpErrorKind::RankLeft { rank: self.rank }, self.health.next_step));
        };
        match injection {
            Some(Injection::Delay(delay)) => thread::sleep(delay),
            Some(Injection::Silence) => wait_until_poisoned(inner),
            Some(Injection::WrongShape) => return make(inner, true),
            Some(Injection::Skip) => {
                let step = inner.health().next_step;
                return ways.zeros.map_err(|what| error(EpErrorKind::Tensor(what.to_string()), step));
            }
            Some(Injection::Double) => {
                let first = make(inner, false)?;
                return make(inner, false).map(|_| first);
            }
            Some(Injection::Death) | None => {}
        }
        make(inner, false)
    }
}

/// Does not wait much longer than the others do.
fn wait_until_poisoned(inner: &impl Communicator) {
    let patience = inner.deadline().saturating_mul(2).saturating_add(Duration::from_secs(1));
    let start = Instant::now();
    while inner.health().cause.is_none() && start.elapsed() < patience {
        thread::sleep(Duration::from_millis(1));
    }
}

/// The tensor, or with one more dimension if it is to be bent.
fn bent(tensor: &Tensor, bend: bool) -> Tensor {
    match bend {
        true => tensor.unsqueeze(tensor.rank()).unwrap_or_else(|_| tensor.clone()),
        false => tensor.clone(),
    }
}

/// `num_rows` rows like those of `rows`, all zero.
fn zero_rows(rows: &Tensor, num_rows: usize) -> CandleResult<Tensor> {
    let row = rows.dims().get(1..).unwrap_or_default();
    Tensor::zeros([&[num_rows], row].concat(), rows.dtype(), rows.device())
}

impl<C: Communicator> Communicator for Faulty<C> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.health.world_size
    }

    fn set_label(&mut self, label: &str) {
        self.label = label.to_string();
        if let Some(inner) = &mut self.inner {
            inner.set_label(label);
        }
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
        if let Some(inner) = &mut self.inner {
            inner.set_deadline(deadline);
        }
    }

    fn deadlines(&self) -> Deadlines {
        self.deadlines
    }

    fn start_serving(&mut self) {
        if let Some(inner) = self.inner.as_mut() {
            inner.start_serving();
        }
    }

    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let num_rows = counts.iter().fold(0, |sum: usize, &count| sum.saturating_add(count));
        let ways = Ways { op: Collective::AllGather, zeros: zero_rows(rows, num_rows) };
        self.call(ways, |inner, bend| inner.all_gather(&bent(rows, bend), counts))
    }

    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let num_rows = counts.get(self.rank).copied().unwrap_or(0);
        let ways = Ways { op: Collective::ReduceScatter, zeros: zero_rows(rows, num_rows) };
        self.call(ways, |inner, bend| inner.reduce_scatter(&bent(rows, bend), counts))
    }

    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError> {
        let nothing = |rows| (rows, vec![0; self.health.world_size]);
        let ways = Ways { op: Collective::AllToAll, zeros: zero_rows(rows, 0).map(nothing) };
        self.call(ways, |inner, bend| inner.all_to_all(&bent(rows, bend), send_counts))
    }

    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError> {
        let ways = Ways { op: Collective::AllReduce, zeros: values.zeros_like() };
        self.call(ways, |inner, bend| inner.all_reduce(&bent(values, bend)))
    }

    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EpError> {
        let zeros = Ok(vec![Vec::new(); self.health.world_size]);
        self.call(Ways { op: Collective::AllGatherBytes, zeros }, |inner, _| inner.all_gather_bytes(bytes))
    }

    fn barrier(&mut self) -> Result<(), EpError> {
        self.call(Ways { op: Collective::Barrier, zeros: Ok(()) }, |inner, _| inner.barrier())
    }

    fn settle(&mut self) -> Result<(), EpError> {
        self.inner.as_mut().map_or(Ok(()), Communicator::settle)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort_handle.clone()
    }

    fn health(&self) -> Health {
        match &self.inner {
            Some(inner) => inner.health(),
            None => self.health.clone(),
        }
    }
}
