//! Ranks that fail on purpose: nobody hangs, nothing wrong is handed out, everybody names who and where; and generations.

use crate::collectives::Call;
use candle_moe::ep::{
    Collective, Communicator, Deadlines, EpError, EpErrorKind, Faulty, Injection, Lobby, Schedule, Threads, launch,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const RUNS: u64 = 1000;
const NUM_CALLS: u64 = 12;
const DEADLINES: Deadlines = Deadlines { warm_up: Duration::from_secs(10), serving: Duration::from_millis(300) };
/// What no run takes if nothing hangs.
const WATCHDOG: Duration = Duration::from_secs(30);

/// The ranks that an error accuses.
pub(crate) fn accused(kind: &EpErrorKind) -> Vec<usize> {
    match kind {
        EpErrorKind::Timeout { missing, .. } => missing.clone(),
        EpErrorKind::RankLeft { rank }
        | EpErrorKind::RankPanicked { rank }
        | EpErrorKind::RankLost { rank, .. }
        | EpErrorKind::Desync { rank, .. } => vec![*rank],
        EpErrorKind::Aborted { by, .. } => by.iter().copied().collect(),
        EpErrorKind::Poisoned { cause } => accused(&cause.kind),
        other => panic!("accuses nobody: {other}"),
    }
}

/// Asserts that the error says whose it is, of which call, and who is to blame.
pub(crate) fn assert_named(error: &EpError) {
    let text = error.to_string();
    let beginning = format!("rank {}: {} (step {}", error.rank, error.op, error.step);
    assert!(text.starts_with(&beginning), "{text}");
    assert!(!accused(&error.kind).is_empty(), "{text}");
}

/// What one rank made of the calls of a run.
struct Account {
    /// The number of calls that were right, before the first error.
    right: u64,
    error: Option<EpError>,
}

#[derive(Clone, Copy)]
struct Run {
    seed: u64,
    world_size: usize,
}

impl Run {
    fn new(seed: u64) -> Self {
        Self { seed, world_size: 2 + (seed % 5) as usize }
    }

    fn call(self, number: u64) -> Call {
        Call::new(self.seed * 100 + number, self.world_size)
    }

    fn schedule(self, rank: usize) -> Schedule {
        Schedule::seeded(self.seed, rank, self.world_size, NUM_CALLS, DEADLINES.serving * 2)
    }

    /// Which call of which rank goes wrong, and how.
    fn injected(self) -> (usize, u64, Injection) {
        let of_rank = |rank| {
            let schedule = self.schedule(rank);
            (0..NUM_CALLS).find_map(|call| Some((rank, call, schedule.of(call)?)))
        };
        (0..self.world_size).find_map(of_rank).unwrap()
    }

    fn accounts(self) -> Vec<Account> {
        let ranks = launch(self.world_size, DEADLINES, |ranks| self.rank(ranks)).unwrap();
        ranks.into_iter().map(|account| account.unwrap_or_else(|panic| panic!("seed {}: {panic}", self.seed))).collect()
    }

    fn rank(self, ranks: Threads) -> Account {
        let (rank, lobby) = (ranks.rank(), ranks.lobby());
        let skipped = |call| self.schedule(rank).of(call) == Some(Injection::Skip);
        let mut ranks = Faulty::new(ranks, |rank| self.schedule(rank));
        ranks.start_serving();
        let mut account = Account { right: 0, error: None };
        for number in 0..NUM_CALLS {
            ranks.set_label(&format!("call {number}"));
            match self.call(number).make(&mut ranks) {
                Ok(outcome) if !skipped(number) => assert_eq!(outcome, self.call(number).expected(rank)),
                Ok(_) => {}
                Err(error) => {
                    account.error = Some(error);
                    break;
                }
            }
            account.right += 1;
        }
        if account.error.is_some() {
            let later = ranks.barrier().unwrap_err();
            assert!(matches!(later.kind, EpErrorKind::Poisoned { .. } | EpErrorKind::RankLeft { .. }), "{later}");
        }
        self.anew(rank, ranks.into_inner(), &lobby);
        account
    }

    /// The group is built anew, with a new rank in the place of one that died, and is right.
    fn anew(self, rank: usize, survivor: Option<Threads>, lobby: &Lobby) {
        let ranks = match survivor {
            Some(survivor) => survivor.rebuild(),
            None => lobby.join(rank, 1),
        };
        let mut ranks = ranks.unwrap();
        assert_eq!((ranks.generation(), ranks.health().next_step), (1, 0));
        for number in NUM_CALLS..NUM_CALLS + 3 {
            let outcome = self.call(number).make(&mut ranks).unwrap();
            assert_eq!(outcome, self.call(number).expected(rank));
        }
    }

    /// Judges what the ranks made of the fault.
    fn check(self, accounts: &[Account]) {
        let (victim, call, injection) = self.injected();
        let place = format!("seed {}: rank {victim} of {}, call {call}, {injection:?}", self.seed, self.world_size);
        // The call of which the others must hear that it failed.
        let failing = match injection {
            Injection::Death | Injection::Silence | Injection::Skip => Some(call),
            Injection::WrongShape => self.call(call).has_rows().then_some(call),
            Injection::Double => Some(call + 1).filter(|call| *call < NUM_CALLS),
            _ => None,
        };
        for (rank, account) in accounts.iter().enumerate() {
            account.error.iter().for_each(assert_named);
            if rank == victim || matches!(injection, Injection::Delay(_)) {
                continue;
            }
            let Some(failing) = failing else {
                assert!(account.error.is_none(), "{place}: {:?}", account.error);
                continue;
            };
            let error = account.error.as_ref().unwrap_or_else(|| panic!("{place}: rank {rank} did not notice"));
            assert_eq!((error.step, account.right), (failing, failing), "{place}: {error}");
            // Of two that differ it is always rank 1 that is named.
            if self.world_size > 2 || !matches!(error.kind, EpErrorKind::Desync { .. }) {
                assert!(accused(&error.kind).contains(&victim), "{place}: {error}");
            }
        }
    }
}

#[test]
fn a_thousand_faults_are_survived_and_named() {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let run = Run::new(next.fetch_add(1, Ordering::Relaxed));
                    if run.seed >= RUNS {
                        return;
                    }
                    let (done, watchdog) = channel();
                    std::thread::spawn(move || done.send(run.accounts()));
                    match watchdog.recv_timeout(WATCHDOG) {
                        Ok(accounts) => run.check(&accounts),
                        Err(error) => panic!("seed {}: {:?} hangs or panics: {error}", run.seed, run.injected()),
                    }
                }
            });
        }
    });
}

#[test]
fn every_kind_of_fault_is_among_the_thousand() {
    let mut kinds = [0; 6];
    for seed in 0..RUNS {
        let kind = match Run::new(seed).injected().2 {
            Injection::Delay(_) => 0,
            Injection::Silence => 1,
            Injection::Death => 2,
            Injection::WrongShape => 3,
            Injection::Skip => 4,
            Injection::Double => 5,
            other => panic!("{other:?}"),
        };
        kinds[kind] += 1;
    }
    assert!(kinds.iter().all(|kind| *kind > 100), "{kinds:?}");
}

#[test]
fn a_delay_within_the_deadline_is_no_fault() {
    let delay = Injection::Delay(Duration::from_millis(50));
    let outcomes = launch(3, Duration::from_secs(10), |ranks| {
        let mut ranks = Faulty::new(ranks, |rank| Schedule::new().at(rank as u64, delay));
        (0..3).try_for_each(|_| ranks.barrier())
    });
    assert_eq!(outcomes.unwrap(), [Ok(Ok(())), Ok(Ok(())), Ok(Ok(()))]);
}

#[test]
fn the_serving_deadline_counts_from_the_start_of_serving() {
    let mut group = Threads::group(2, DEADLINES).unwrap();
    let mut first = group.remove(0);
    assert_eq!((first.deadline(), first.deadlines()), (DEADLINES.warm_up, DEADLINES));
    first.start_serving();
    assert_eq!(first.deadline(), DEADLINES.serving);
    let start = Instant::now();
    let error = first.barrier().unwrap_err();
    assert!(start.elapsed() < DEADLINES.serving + Duration::from_millis(500));
    assert_eq!(error.kind, EpErrorKind::Timeout { missing: vec![1], deadline: DEADLINES.serving });
}

// ---------------------------------------------------------------------------------------------
// Generations

#[test]
fn handles_of_an_old_generation_are_refused_by_both_numbers() {
    let group = Threads::group(3, DEADLINES).unwrap();
    let mut outcomes = std::thread::scope(|scope| {
        let ranks: Vec<_> = group
            .into_iter()
            .map(|mut old| {
                scope.spawn(move || {
                    let (rank, lobby) = (old.rank(), old.lobby());
                    let mut new = lobby.join(rank, 4).unwrap();
                    assert_eq!((new.generation(), lobby.generation()), (4, 4));
                    // The new one works while the old one is still there.
                    new.barrier().unwrap();
                    let refused: Vec<_> = (0..2).map(|_| old.barrier().unwrap_err()).collect();
                    let again = lobby.join(rank, 4).unwrap_err();
                    let older = lobby.join(rank, 3).unwrap_err();
                    let from_old = old.rebuild().unwrap_err();
                    new.barrier().unwrap();
                    [refused, vec![again, older, from_old]].concat()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    for errors in &mut outcomes {
        for (error, generation) in errors.iter().zip([0, 0, 4, 3, 1]) {
            assert_eq!(error.kind, EpErrorKind::OldGeneration { generation, current: 4 });
            let text = error.to_string();
            assert!(text.contains(&format!("generation {generation}")) && text.contains('4'), "{text}");
        }
        assert_eq!(errors[2].op, Collective::Rendezvous);
    }
}

#[test]
fn whoever_waits_in_the_old_generation_hears_that_it_is_over() {
    let mut group = Threads::group(2, Duration::from_secs(20)).unwrap();
    let (last, mut first) = (group.pop().unwrap(), group.pop().unwrap());
    let lobby = first.lobby();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| first.barrier());
        let anew = scope.spawn(|| last.rebuild());
        let error = waits.join().unwrap().unwrap_err();
        let EpErrorKind::Aborted { by: Some(1), reason } = &error.kind else {
            // It may have been before the barrier that rank 1 left.
            assert_eq!(error.kind, EpErrorKind::RankLeft { rank: 1 });
            lobby.join(0, 1).unwrap();
            return anew.join().unwrap().map(drop).unwrap();
        };
        assert!(reason.contains("generation 1"), "{reason}");
        lobby.join(0, 1).unwrap();
        anew.join().unwrap().unwrap();
    });
}

#[test]
fn a_generation_that_a_rank_waited_for_in_vain_is_never_used() {
    let deadline = Duration::from_millis(100);
    let mut group = Threads::group(3, deadline).unwrap();
    let lobby = group[0].lobby();
    let (second, first) = (group.remove(1), group.remove(0));
    let start = Instant::now();
    let errors = std::thread::scope(|scope| {
        let ranks = [scope.spawn(|| first.rebuild()), scope.spawn(|| second.rebuild())];
        ranks.map(|rank| rank.join().unwrap().unwrap_err())
    });
    assert!(start.elapsed() < deadline + Duration::from_millis(500));
    for error in &errors {
        let missing = EpErrorKind::Timeout { missing: vec![2], deadline };
        // The second may have come when the first had given up.
        let late = EpErrorKind::OldGeneration { generation: 1, current: 1 };
        assert!(error.kind == missing || error.kind == late, "{error}");
        assert_eq!((error.op, error.label.as_str()), (Collective::Rendezvous, "generation 1"));
    }
    let late = group.remove(0).rebuild().unwrap_err();
    assert_eq!(late.kind, EpErrorKind::OldGeneration { generation: 1, current: 1 });
    assert_eq!(lobby.generation(), 0);
    let ranks = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..3)
            .map(|rank| (rank, lobby.clone()))
            .map(|(rank, lobby)| scope.spawn(move || lobby.join(rank, 2)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap().unwrap().generation()).collect::<Vec<_>>()
    });
    assert_eq!(ranks, [2, 2, 2]);
}

#[test]
fn the_lobby_refuses_ranks_that_are_there_or_cannot_be() {
    let group = Threads::group(2, DEADLINES).unwrap();
    let lobby = group[0].lobby();
    let error = lobby.join(2, 1).unwrap_err();
    assert!(matches!(&error.kind, EpErrorKind::BadArgument(what) if what.contains("rank is 2")), "{error}");
    std::thread::scope(|scope| {
        let one = scope.spawn(|| lobby.join(1, 1));
        let other = scope.spawn(|| lobby.join(1, 1));
        while !one.is_finished() && !other.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let (refused, waits) = if one.is_finished() { (one, other) } else { (other, one) };
        assert_eq!(refused.join().unwrap().unwrap_err().kind, EpErrorKind::DuplicateRank { rank: 1 });
        lobby.join(0, 1).unwrap();
        waits.join().unwrap().unwrap();
    });
}
