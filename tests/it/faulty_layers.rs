//! Layers whose ranks fail on purpose, by every strategy and reduction, among threads and among processes: nobody hangs, what
//! is handed out has the bits of a run without faults, everybody names who, where and when, and the group built anew is right.

use crate::block::{Layer, hidden_states};
use crate::devices::line;
use crate::faults::{accused, assert_named};
use crate::oracle::{Random, bits_of};
use crate::procs::on_procs;
use candle_core::{DType, Result, Tensor};
use candle_moe::block::MoeBlock;
use candle_moe::ep::{
    Communicator, Deadlines, EpError, EpErrorKind, Faulty, Injection, Lobby, Placement, Procs, ProcsConfig, Reduction,
    Schedule, Step, Strategy, Threads, launch,
};
use candle_moe::routing::RoutingMethod;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

const SENDING: [Strategy; 3] = [Strategy::Gather, Strategy::Exchange, Strategy::Replicated];
const NUM_STEPS: usize = 2;
const NUM_LAYERS: usize = 2;
const NUM_EXPERTS: usize = 7;
const TOP_K: usize = 3;
const DEADLINES: Deadlines = Deadlines { warm_up: Duration::from_secs(20), serving: Duration::from_secs(1) };
/// What a fault may take beyond the deadline, or to be heard of where nobody has to wait for it.
const SLACK: Duration = Duration::from_millis(500);
/// What no run takes if nothing hangs.
const WATCHDOG: Duration = Duration::from_secs(60);

static LAYERS: LazyLock<Vec<Layer>> =
    LazyLock::new(|| (0..NUM_LAYERS as u64).map(|seed| Layer::new(seed, NUM_EXPERTS, DType::F32)).collect());

/// How ranks share the layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Way {
    strategy: Strategy,
    reduction: Reduction,
    world_size: usize,
}

impl Way {
    pub(crate) fn all(world_sizes: std::ops::Range<usize>) -> impl Iterator<Item = Self> {
        let pairs = SENDING.into_iter().flat_map(|strategy| Reduction::ALL.map(|reduction| (strategy, reduction)));
        pairs.flat_map(move |(strategy, reduction)| {
            world_sizes.clone().map(move |world_size| Self { strategy, reduction, world_size })
        })
    }

    /// The layers of one rank, whose experts have replicas elsewhere.
    fn blocks(self, rank: usize) -> Vec<MoeBlock> {
        let replicated = self.strategy == Strategy::Replicated;
        let placement = Placement::balanced(&[1; NUM_EXPERTS], self.world_size, NUM_EXPERTS + self.world_size).unwrap();
        let block = |layer: &Layer| {
            let builder = layer.placed(layer.router(RoutingMethod::Renormalize, TOP_K), &placement, rank);
            let builder = builder.strategy(self.strategy).reduction(self.reduction).replicated_tokens(replicated);
            builder.statistics(true).build().unwrap()
        };
        LAYERS.iter().map(block).collect()
    }

    /// What a rank holds in a step: a few tokens, or none; where all hold all tokens, the same.
    fn hidden(self, rank: usize, step: usize) -> Tensor {
        let owner = if self.strategy == Strategy::Replicated { 0 } else { rank };
        let mut random = Random((step * 100 + owner + 1) as u64);
        let num_tokens = if owner == 1 && step == 0 { 0 } else { 1 + random.below(5) };
        hidden_states(random.next(), num_tokens, DType::F32)
    }

    /// One forward step; what each layer gives is added to `outputs`.
    fn step(
        self,
        ranks: &mut dyn Communicator,
        blocks: &[MoeBlock],
        number: usize,
        outputs: &mut Vec<Vec<u32>>,
    ) -> Result<()> {
        let mut hidden = self.hidden(ranks.rank(), number % NUM_STEPS);
        ranks.set_label("step");
        let step = Step::agree(ranks, hidden.dims()[0])?;
        for (layer, block) in blocks.iter().enumerate() {
            ranks.set_label(&format!("layer {layer}"));
            hidden = block.forward(&hidden, ranks, &step)?;
            outputs.push(bits_of(&hidden));
        }
        Ok(())
    }

    /// Without faults, among threads.
    pub(crate) fn faultless(self) -> Case {
        let blocks: Vec<_> = (0..self.world_size).map(|rank| self.blocks(rank)).collect();
        let ranks = launch(self.world_size, Duration::from_secs(60), |mut ranks| {
            let (blocks, mut outputs) = (&blocks[ranks.rank()], Vec::new());
            (0..NUM_STEPS).for_each(|number| self.step(&mut ranks, blocks, number, &mut outputs).unwrap());
            (outputs, ranks.health().next_step)
        });
        let (outputs, calls): (_, Vec<u64>) = ranks.unwrap().into_iter().map(|rank| rank.unwrap()).unzip();
        Case { way: self, blocks, outputs, num_calls: calls[0] }
    }
}

/// What is right.
#[derive(Debug)]
pub(crate) struct Case {
    way: Way,
    /// Of each rank.
    blocks: Vec<Vec<MoeBlock>>,
    /// Of each rank: the bits that every layer of every step gives.
    outputs: Vec<Vec<Vec<u32>>>,
    /// Collectives that a rank makes in all steps.
    num_calls: u64,
}

impl Case {
    /// One forward step of a rank; what it gives must be right.
    pub(crate) fn step(&self, ranks: &mut dyn Communicator, number: usize) -> Result<()> {
        let (rank, mut outputs) = (ranks.rank(), Vec::new());
        self.way.step(ranks, &self.blocks[rank], number, &mut outputs)?;
        assert_eq!(outputs, self.outputs[rank][number % NUM_STEPS * NUM_LAYERS..][..NUM_LAYERS], "{:?}", self.way);
        Ok(())
    }

    fn calls_per_step(&self) -> u64 {
        self.num_calls / NUM_STEPS as u64
    }

    /// The layer of a call; `None` for the one with which a step begins.
    fn layer(&self, call: u64) -> Option<u64> {
        let calls_per_layer = (self.calls_per_step() - 1) / NUM_LAYERS as u64;
        (call % self.calls_per_step()).checked_sub(1).map(|call| call / calls_per_layer)
    }

    fn label(&self, call: u64) -> String {
        self.layer(call).map_or("step".into(), |layer| format!("layer {layer}"))
    }

    /// The number of layers that are done before a call.
    fn layers_before(&self, call: u64) -> usize {
        (call / self.calls_per_step()) as usize * NUM_LAYERS + self.layer(call).unwrap_or(0) as usize
    }
}

/// A rank that can be built anew.
trait Rank: Communicator + Sized {
    /// Where the group meets anew.
    type Place: Send;
    fn place(&self) -> Self::Place;
    fn anew(self) -> Self;
    fn in_place_of(rank: usize, place: Self::Place) -> Self;
}

impl Rank for Threads {
    type Place = Lobby;
    fn place(&self) -> Lobby {
        self.lobby()
    }
    fn anew(self) -> Self {
        self.rebuild().unwrap()
    }
    fn in_place_of(rank: usize, place: Lobby) -> Self {
        place.join(rank, 1).unwrap()
    }
}

impl Rank for Procs {
    type Place = ProcsConfig;
    fn place(&self) -> ProcsConfig {
        self.config().clone()
    }
    fn anew(self) -> Self {
        self.rebuild().unwrap()
    }
    fn in_place_of(_: usize, place: ProcsConfig) -> Self {
        Self::join(ProcsConfig { generation: 1, ..place }, DEADLINES).unwrap()
    }
}

/// What one rank made of a run.
struct Account {
    outputs: Vec<Vec<u32>>,
    failure: Option<Failure>,
}

/// An error, and the first one of the group as this rank heard of it.
struct Failure {
    text: String,
    cause: Option<EpError>,
    /// Since the first step began.
    after: Duration,
}

#[derive(Clone)]
struct Run {
    seed: u64,
    case: Arc<Case>,
}

impl Run {
    fn world_size(&self) -> usize {
        self.case.way.world_size
    }

    fn schedule(&self, rank: usize) -> Schedule {
        Schedule::seeded(self.seed, rank, self.world_size(), self.case.num_calls, DEADLINES.serving * 2)
    }

    /// Which call of which rank goes wrong, and how.
    fn injected(&self) -> (usize, u64, Injection) {
        let of_rank = |rank| {
            let schedule = self.schedule(rank);
            (0..self.case.num_calls).find_map(|call| Some((rank, call, schedule.of(call)?)))
        };
        (0..self.world_size()).find_map(of_rank).unwrap()
    }

    fn place(&self) -> String {
        let (victim, call, injection) = self.injected();
        format!("seed {}, {:?}: rank {victim}, call {call}, {injection:?}", self.seed, self.case.way)
    }

    fn among_threads(&self) -> Vec<Account> {
        let ranks = launch(self.world_size(), DEADLINES, |ranks| self.rank(ranks)).unwrap();
        ranks.into_iter().map(|account| account.unwrap_or_else(|panic| panic!("{}: {panic}", self.place()))).collect()
    }

    fn among_procs(&self) -> Vec<Account> {
        on_procs(self.world_size(), DEADLINES, |ranks| self.rank(ranks))
    }

    fn rank<R: Rank>(&self, ranks: R) -> Account {
        let (rank, place) = (ranks.rank(), ranks.place());
        let mut ranks = Faulty::new(ranks, |rank| self.schedule(rank));
        let (way, blocks, mut outputs) = (self.case.way, &self.case.blocks[rank], Vec::new());
        ranks.start_serving();
        let start = Instant::now();
        let outcome = (0..NUM_STEPS).try_for_each(|number| way.step(&mut ranks, blocks, number, &mut outputs));
        let failure = outcome.err().map(|error| {
            let after = start.elapsed();
            self.assert_poisoned(&mut ranks);
            Failure { text: line(error), cause: ranks.health().cause, after }
        });
        let mut ranks = match ranks.into_inner() {
            Some(survivor) => survivor.anew(),
            None => R::in_place_of(rank, place),
        };
        assert_eq!((ranks.generation(), ranks.health().next_step), (1, 0));
        let mut again = Vec::new();
        (0..NUM_STEPS).for_each(|number| way.step(&mut ranks, blocks, number, &mut again).unwrap());
        assert_eq!(again, self.case.outputs[rank], "{}: rank {rank} built anew", self.place());
        Account { outputs, failure }
    }

    /// Whoever has heard of a fault hears nothing else any more, at once.
    fn assert_poisoned<R: Rank>(&self, ranks: &mut Faulty<R>) {
        let start = Instant::now();
        // The first call of a rank that found its own fault outside of a call.
        let _ = ranks.barrier().unwrap_err();
        let later = ranks.barrier().unwrap_err();
        assert!(
            matches!(later.kind, EpErrorKind::Poisoned { .. } | EpErrorKind::RankLeft { .. }),
            "{}: {later}",
            self.place()
        );
        assert!(start.elapsed() < DEADLINES.serving / 2, "{}: {:?}", self.place(), start.elapsed());
    }

    /// The call of which the others must hear that it failed.
    fn failing(&self) -> Option<u64> {
        let (_, call, injection) = self.injected();
        match injection {
            Injection::Death | Injection::Silence | Injection::Skip => Some(call),
            Injection::WrongShape => self.case.layer(call).map(|_| call),
            Injection::Double => Some(call + 1).filter(|call| *call < self.case.num_calls),
            _ => None,
        }
    }

    /// Judges what the ranks made of the fault.
    fn check(&self, accounts: &[Account]) {
        let (victim, _, injection) = self.injected();
        for (rank, account) in accounts.iter().enumerate() {
            let right = &self.case.outputs[rank];
            // Whoever skips a call makes up its result.
            if rank != victim || injection != Injection::Skip {
                assert_eq!(account.outputs, right[..account.outputs.len()], "{}: rank {rank}", self.place());
            }
            account.failure.iter().for_each(|failure| {
                self.check_named(rank, failure);
                self.check_prompt(rank, failure);
            });
            if rank == victim || matches!(injection, Injection::Delay(_)) {
                continue;
            }
            match (self.failing(), &account.failure) {
                (Some(call), Some(failure)) => self.check_failure(rank, account, call, failure),
                (Some(call), None) => panic!("{}: rank {rank} did not notice call {call}", self.place()),
                (None, Some(failure)) => panic!("{}: rank {rank}: {}", self.place(), failure.text),
                (None, None) => assert_eq!(account.outputs.len(), right.len()),
            }
        }
    }

    /// The error names rank, operation and step, or says what is wrong with what this rank itself was given, and then the
    /// group has heard of it with rank, operation and step.
    fn check_named(&self, rank: usize, failure: &Failure) {
        match &failure.cause {
            Some(cause) => assert_named(cause),
            None => assert!(failure.text.contains("(step "), "{}: {}", self.place(), failure.text),
        }
        let is_named = failure.text.starts_with(&format!("rank {rank}: "));
        let is_own = failure.cause.as_ref().is_some_and(|cause| accused(&cause.kind) == [rank]);
        assert!(is_named || is_own, "{}: {}", self.place(), failure.text);
    }

    /// A rank that did nothing wrong waits only for one that is silent; the calls before the fault take no time to speak of.
    fn check_prompt(&self, rank: usize, failure: &Failure) {
        let (victim, _, injection) = self.injected();
        let limit = match injection {
            Injection::Silence | Injection::Delay(_) => DEADLINES.serving + SLACK,
            _ => SLACK,
        };
        assert!(rank == victim || failure.after < limit, "{}: rank {rank}: {:?}", self.place(), failure.after);
    }

    /// What a rank that did nothing wrong must have heard.
    fn check_failure(&self, rank: usize, account: &Account, call: u64, failure: &Failure) {
        let (place, (victim, ..)) = (self.place(), self.injected());
        let text = &failure.text;
        assert!(text.starts_with(&format!("rank {rank}: ")), "{place}: {text}");
        assert!(text.contains(&format!("(step {call}, {})", self.case.label(call))), "{place}: {text}");
        assert_eq!(account.outputs.len(), self.case.layers_before(call), "{place}: {text}");
        let cause = failure.cause.as_ref().unwrap_or_else(|| panic!("{place}: no cause of {text}"));
        // Of two that differ it is always rank 1 that is named.
        if self.world_size() > 2 || !matches!(cause.kind, EpErrorKind::Desync { .. }) {
            assert!(accused(&cause.kind).contains(&victim), "{place}: {cause}");
        }
    }
}

/// Runs `seeds` faults of each case, several at a time.
fn check_all(ways: impl Iterator<Item = Way>, seeds: u64, accounts: fn(&Run) -> Vec<Account>) -> u64 {
    let cases: Vec<_> = ways.map(|way| Arc::new(way.faultless())).collect();
    let seeded = |number: u64, case: &Arc<Case>| Run { seed: number, case: Arc::clone(case) };
    let per_case = |(i, case)| (0..seeds).map(move |seed| seeded(i as u64 * seeds + seed, case));
    let runs: Vec<Run> = cases.iter().enumerate().flat_map(per_case).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (done, watchdog) = channel();
            let own = run.clone();
            std::thread::spawn(move || done.send(accounts(&own)));
            match watchdog.recv_timeout(WATCHDOG) {
                Ok(accounts) => run.check(&accounts),
                Err(error) => panic!("{} hangs or panics: {error}", run.place()),
            }
        }
    };
    std::thread::scope(|scope| (0..16).for_each(|_| drop(scope.spawn(work))));
    runs.len() as u64
}

#[test]
fn a_thousand_faults_in_layers_of_threads_are_survived_and_named() {
    assert!(check_all(Way::all(2..7), 34, Run::among_threads) > 1000);
}

#[test]
fn faults_in_layers_of_processes_are_survived_and_named() {
    assert!(check_all(Way::all(2..5), 8, Run::among_procs) > 100);
}
