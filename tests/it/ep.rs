//! Ranks as threads: every collective against the naive computation, and every fault by name.

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_moe::ep::{Collective, Communicator, EpError, EpErrorKind, MAX_RANKS, Solo, Threads, Topology, launch};
use std::time::{Duration, Instant};

const PATIENT: Duration = Duration::from_secs(20);
/// What a fault may take beyond the deadline.
const SLACK: Duration = Duration::from_millis(500);

/// A small generator, so that every rank can work out every other rank's input.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Zero a third of the time.
    pub(crate) fn count(&mut self) -> usize {
        (self.next() % 6).saturating_sub(1) as usize
    }

    /// Magnitudes so different that the order of a sum shows.
    fn value(&mut self) -> f32 {
        let scale = 10f32.powi((self.next() % 12) as i32 - 4);
        (self.next() % 2001) as f32 / 1000. * scale - scale
    }

    pub(crate) fn rows(&mut self, num_rows: usize) -> Vec<Vec<f32>> {
        let row = |_| (0..WIDTH).map(|_| self.value()).collect();
        (0..num_rows).map(row).collect()
    }
}

pub(crate) const WIDTH: usize = 3;

pub(crate) fn tensor(rows: &[Vec<f32>]) -> Tensor {
    Tensor::from_vec(rows.concat(), (rows.len(), WIDTH), &Device::Cpu).unwrap()
}

pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    assert!(tensor.is_contiguous());
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

pub(crate) fn bits_of(rows: &[Vec<f32>]) -> Vec<u32> {
    rows.concat().into_iter().map(f32::to_bits).collect()
}

/// Adds row tables in the order given.
pub(crate) fn naive_sum(tables: &[Vec<Vec<f32>>]) -> Vec<Vec<f32>> {
    let mut sum = tables[0].clone();
    for table in &tables[1..] {
        for (sum, value) in sum.iter_mut().flatten().zip(table.iter().flatten()) {
            *sum += value;
        }
    }
    sum
}

/// Runs `body` on every rank; no rank may panic.
fn on_ranks<T: Send>(world_size: usize, deadline: Duration, body: impl Fn(Threads) -> T + Sync) -> Vec<T> {
    let ranks = launch(world_size, deadline, body).unwrap();
    ranks.into_iter().map(Result::unwrap).collect()
}

fn ones(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
}

/// The error of the first failing call, after checking that all later calls are refused with its cause.
fn fails_for_good<T>(ranks: &mut Threads, first: Result<T, EpError>) -> EpError {
    let error = first.err().expect("the call should fail");
    assert_eq!(error.rank, ranks.rank());
    let cause = ranks.health().cause.expect("the group is poisoned");
    for _ in 0..2 {
        let start = Instant::now();
        let later = ranks.barrier().unwrap_err();
        assert!(start.elapsed() < SLACK);
        let EpErrorKind::Poisoned { cause: within } = &later.kind else {
            panic!("not poisoned: {later}");
        };
        assert_eq!(**within, cause);
        assert_eq!(later.first_cause(), &cause);
    }
    assert!(ranks.all_gather(&ones((1, 1)), &[]).is_err());
    error
}

// ---------------------------------------------------------------------------------------------
// Topology

#[test]
fn topology_splits_into_ranges_that_differ_by_one() {
    for num_experts in 1..40 {
        for ep_size in 1..=num_experts {
            let mut next = 0;
            for rank in 0..ep_size {
                let topology = Topology::new(num_experts, ep_size, rank).unwrap();
                let range = topology.local_experts();
                assert_eq!(range, topology.experts_of(rank).unwrap());
                assert_eq!(range.start, next);
                let extra = usize::from(rank < num_experts % ep_size);
                assert_eq!(range.len(), num_experts / ep_size + extra);
                for expert in range.clone() {
                    assert_eq!(topology.owner(expert).unwrap(), rank);
                }
                next = range.end;
            }
            assert_eq!(next, num_experts);
        }
    }
}

#[test]
fn topology_names_the_argument_that_is_wrong() {
    let text = |result: candle_core::Result<Topology>| result.unwrap_err().to_string();
    assert!(text(Topology::new(8, 0, 0)).contains("ep_size is 0"));
    assert!(text(Topology::new(8, 9, 0)).contains("ep_size is 9, it must be at most num_experts"));
    assert!(text(Topology::new(0, 1, 0)).contains("num_experts = 0"));
    assert!(text(Topology::new(8, 4, 4)).contains("ep_rank is 4, it must be below ep_size = 4"));
    let topology = Topology::new(8, 4, 3).unwrap();
    assert!(topology.owner(8).is_err());
    assert!(topology.owner(usize::MAX).is_err());
    assert!(topology.experts_of(4).is_err());
    let huge = Topology::new(usize::MAX, 7, 6).unwrap();
    assert_eq!(huge.local_experts().end, usize::MAX);
    assert_eq!(huge.owner(usize::MAX - 1).unwrap(), 6);
}

// ---------------------------------------------------------------------------------------------
// Collectives against the naive computation

#[test]
fn all_gather_matches_naive() {
    for world_size in 1..=8 {
        on_ranks(world_size, PATIENT, |mut ranks| {
            let mut random = Random(world_size as u64);
            for round in 0..30 {
                let mut counts: Vec<usize> = (0..world_size).map(|_| random.count()).collect();
                if round == 7 {
                    counts.fill(0);
                }
                let all: Vec<_> = counts.iter().map(|&n| random.rows(n)).collect();
                let gathered = ranks.all_gather(&tensor(&all[ranks.rank()]), &counts).unwrap();
                assert_eq!(gathered.dims(), [counts.iter().sum(), WIDTH]);
                assert_eq!(bits(&gathered), bits_of(&all.concat()));
            }
        });
    }
}

#[test]
fn reduce_scatter_and_all_reduce_match_naive_bit_for_bit() {
    for world_size in 1..=8 {
        on_ranks(world_size, PATIENT, |mut ranks| {
            let rank = ranks.rank();
            let mut random = Random(100 + world_size as u64);
            for round in 0..30 {
                let mut counts: Vec<usize> = (0..world_size).map(|_| random.count()).collect();
                if round == 7 {
                    counts.fill(0);
                }
                let total = counts.iter().sum();
                let all: Vec<_> = (0..world_size).map(|_| random.rows(total)).collect();
                let sum = naive_sum(&all);
                let start: usize = counts[..rank].iter().sum();

                let mine = ranks.reduce_scatter(&tensor(&all[rank]), &counts).unwrap();
                assert_eq!(mine.dims(), [counts[rank], WIDTH]);
                assert_eq!(bits(&mine), bits_of(&sum[start..start + counts[rank]]));

                let whole = ranks.all_reduce(&tensor(&all[rank])).unwrap();
                assert_eq!(whole.dims(), [total, WIDTH]);
                assert_eq!(bits(&whole), bits_of(&sum));
            }
        });
    }
}

#[test]
fn all_to_all_matches_naive() {
    for world_size in 1..=8 {
        on_ranks(world_size, PATIENT, |mut ranks| {
            let rank = ranks.rank();
            let mut random = Random(200 + world_size as u64);
            for round in 0..30 {
                // table[source][destination]
                let table: Vec<Vec<Vec<Vec<f32>>>> = (0..world_size)
                    .map(|source| {
                        let silent = round == 7 || source == round % world_size;
                        let mut rows = || {
                            let count = random.count();
                            random.rows(if silent { 0 } else { count })
                        };
                        (0..world_size).map(|_| rows()).collect()
                    })
                    .collect();
                let send_counts: Vec<usize> = table[rank].iter().map(Vec::len).collect();
                let (received, counts) = ranks.all_to_all(&tensor(&table[rank].concat()), &send_counts).unwrap();
                let expected: Vec<_> = table.iter().map(|row| row[rank].clone()).collect();
                assert_eq!(counts, expected.iter().map(Vec::len).collect::<Vec<_>>());
                assert_eq!(received.dims(), [counts.iter().sum(), WIDTH]);
                assert_eq!(bits(&received), bits_of(&expected.concat()));
            }
        });
    }
}

#[test]
fn all_gather_bytes_and_barrier() {
    for world_size in 1..=8 {
        on_ranks(world_size, PATIENT, |mut ranks| {
            for round in 0..30 {
                let of = |rank: usize| vec![rank as u8; (rank * 7 + round) % 4];
                let all = ranks.all_gather_bytes(&of(ranks.rank())).unwrap();
                assert_eq!(all, (0..world_size).map(of).collect::<Vec<_>>());
                ranks.barrier().unwrap();
            }
            assert_eq!(ranks.health().next_step, 60);
        });
    }
}

#[test]
fn every_dtype_and_rank_travels() {
    let dtypes = [
        DType::U8,
        DType::U32,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::BF16,
        DType::F16,
        DType::F32,
        DType::F64,
        DType::F8E4M3,
    ];
    on_ranks(3, PATIENT, |mut ranks| {
        let counts = [2, 0, 1];
        for dtype in dtypes {
            for row in [&[][..], &[2], &[2, 3], &[0], &[2, 0]] {
                let shape = [&[counts[ranks.rank()]], row].concat();
                let rows = ones(shape).to_dtype(dtype).unwrap();
                let all = ranks.all_gather(&rows, &counts).unwrap();
                let (received, _) = ranks.all_to_all(&all, &[1, 1, 1]).unwrap();
                let whole = ones([&[3], row].concat());
                for result in [all, received] {
                    assert_eq!(result.dtype(), dtype);
                    assert_eq!(result.dims(), whole.dims());
                    let result = result.to_dtype(DType::F32).unwrap();
                    assert_eq!(bits(&result), bits(&whole));
                }
            }
        }
        for dtype in [DType::BF16, DType::F16, DType::F32, DType::F64] {
            let scalar = ones(()).to_dtype(dtype).unwrap();
            let sum = ranks.all_reduce(&scalar).unwrap();
            assert_eq!((sum.dims(), sum.dtype()), (&[][..], dtype));
            let sum = sum.to_dtype(DType::F32).unwrap();
            assert_eq!(sum.to_scalar::<f32>().unwrap(), 3.);
            let none = ranks.all_reduce(&ones((0, 4)).to_dtype(dtype).unwrap());
            assert_eq!(none.unwrap().dims(), [0, 4]);
        }
    });
}

#[test]
fn views_with_strides_and_offsets() {
    let views = |rank: usize| -> Vec<Tensor> {
        let base = Tensor::arange(0f32, 60., &Device::Cpu).unwrap();
        let base = (base + 100. * rank as f64).unwrap();
        let wide = base.reshape((6, 10)).unwrap();
        vec![
            wide.i((2..6, ..)).unwrap(),                             // offset
            wide.i((1..5, 3..7)).unwrap(),                           // offset and stride
            wide.t().unwrap().i((4..8, ..)).unwrap(),                // transposed
            wide.i((3, ..)).unwrap().broadcast_as((4, 10)).unwrap(), // stride 0
            base.reshape((3, 4, 5)).unwrap().transpose(0, 1).unwrap(),
        ]
    };
    for world_size in [1, 2, 3] {
        on_ranks(world_size, PATIENT, |mut ranks| {
            let rank = ranks.rank();
            let all: Vec<Vec<Tensor>> = (0..world_size).map(views).collect();
            for view in 0..all[0].len() {
                let solid: Vec<Tensor> = all.iter().map(|views| views[view].force_contiguous().unwrap()).collect();
                let mine = &all[rank][view];

                let gathered = ranks.all_gather(mine, &vec![4; world_size]).unwrap();
                assert_eq!(bits(&gathered), bits(&Tensor::cat(&solid, 0).unwrap()));

                let mut counts = vec![0; world_size];
                counts[world_size - 1] = 1;
                counts[0] += 3;
                let start: usize = counts[..rank].iter().sum();
                let mut sum = solid[0].clone();
                for part in &solid[1..] {
                    sum = (sum + part).unwrap();
                }
                let part = sum.narrow(0, start, counts[rank]).unwrap();
                let scattered = ranks.reduce_scatter(mine, &counts).unwrap();
                assert_eq!(bits(&scattered), bits(&part.force_contiguous().unwrap()));
                assert_eq!(bits(&ranks.all_reduce(mine).unwrap()), bits(&sum));

                let (received, _) = ranks.all_to_all(mine, &counts).unwrap();
                let parts: Vec<Tensor> = solid
                    .iter()
                    .map(|rows| rows.narrow(0, start, counts[rank]).unwrap())
                    .filter(|rows| rows.elem_count() > 0)
                    .collect();
                if !parts.is_empty() {
                    assert_eq!(bits(&received), bits(&Tensor::cat(&parts, 0).unwrap()));
                }
            }
        });
    }
}

/// `Tensor::cat` of a single tensor is the tensor itself: a result must not be another rank's memory.
#[test]
fn results_share_no_memory_with_other_ranks() {
    on_ranks(2, PATIENT, |mut ranks| {
        let mine = ones((2 * ranks.rank(), 3));
        let gathered = ranks.all_gather(&mine, &[0, 2]).unwrap();
        ranks.barrier().unwrap();
        if ranks.rank() == 0 {
            gathered.slice_set(&ones((1, 3)).affine(0., 9.).unwrap(), 0, 0).unwrap();
        }
        ranks.barrier().unwrap();
        assert_eq!(bits(&mine), bits(&ones((2 * ranks.rank(), 3))));
    });
}

#[test]
fn results_carry_no_gradient() {
    on_ranks(2, PATIENT, |mut ranks| {
        let weight = candle_core::Var::ones((1, 2), DType::F32, &Device::Cpu).unwrap();
        let rows = (weight.as_tensor() * 2.).unwrap();
        assert!(!ranks.all_gather(&rows, &[1, 1]).unwrap().track_op());
        assert!(!ranks.all_reduce(&rows).unwrap().track_op());
    });
}

// ---------------------------------------------------------------------------------------------
// Life of a group

/// The last collective is over for a rank as soon as it returns: leaving then disturbs nobody.
#[test]
fn an_orderly_end_disturbs_nobody() {
    for _ in 0..300 {
        let sums = on_ranks(6, PATIENT, |mut ranks| {
            let sum = ranks.all_reduce(&ones(1)).unwrap();
            sum.to_vec1::<f32>().unwrap()[0]
        });
        assert_eq!(sums, [6.; 6]);
    }
}

#[test]
fn a_rank_that_panics_after_its_last_call_disturbs_nobody() {
    for _ in 0..20 {
        let ranks = launch(4, PATIENT, |mut ranks| {
            let result = ranks.barrier();
            assert_ne!(ranks.rank(), 3, "late trouble");
            result
        })
        .unwrap();
        for outcome in &ranks[..3] {
            assert_eq!(outcome, &Ok(Ok(())));
        }
        let message = ranks[3].as_ref().unwrap_err();
        assert!(message.contains("rank 3") && message.contains("late trouble"));
    }
}

#[test]
fn health_and_labels_and_deadlines() {
    let mut group = Threads::group(2, PATIENT).unwrap();
    let mut last = group.pop().unwrap();
    let mut first = group.pop().unwrap();
    assert_eq!((first.rank(), last.rank(), first.world_size()), (0, 1, 2));
    assert_eq!(first.deadline(), PATIENT);
    let health = first.health();
    assert_eq!((health.world_size, health.next_step), (2, 0));
    assert_eq!((health.alive, health.cause), (vec![true, true], None));

    first.set_deadline(Duration::from_millis(30));
    assert_eq!(last.deadline(), PATIENT);
    first.set_label("layer 3");
    let start = Instant::now();
    let error = first.barrier().unwrap_err();
    assert!(start.elapsed() < Duration::from_millis(30) + SLACK);
    assert_eq!((error.op, error.step), (Collective::Barrier, 0));
    assert_eq!(error.label, "layer 3");
    let text = error.to_string();
    for part in ["rank 0", "barrier", "step 0", "layer 3", "[1]", "30ms"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(candle_core::Error::from(error.clone()).to_string().contains(&text));
    assert_eq!(last.health().cause, Some(error.clone()));
    let heard = last.barrier();
    assert_eq!(fails_for_good(&mut last, heard).kind, error.kind);
    fails_for_good(&mut first, Err::<(), _>(error));
    drop(last);
    assert_eq!(first.health().alive, [true, false]);
}

#[test]
fn group_sizes_have_limits() {
    for world_size in [0, MAX_RANKS + 1, usize::MAX] {
        let error = Threads::group(world_size, PATIENT).unwrap_err();
        assert!(error.to_string().contains("world_size is"));
        assert!(launch(world_size, PATIENT, |_| ()).is_err());
    }
    // Waiting "for ever" and not at all are deadlines too.
    on_ranks(4, Duration::MAX, |mut ranks| ranks.barrier().unwrap());
    let errors = on_ranks(2, Duration::ZERO, |mut ranks| ranks.barrier());
    for error in errors {
        let kind = error.unwrap_err().kind;
        assert!(matches!(kind, EpErrorKind::Timeout { .. }), "{kind}");
    }
}

// ---------------------------------------------------------------------------------------------
// Faults

/// Runs ranks that return the first error of a faulty step, and checks how long each took to learn it.
fn faulty(
    world_size: usize,
    deadline: Duration,
    body: impl Fn(&mut Threads) -> Option<EpError> + Sync,
) -> Vec<Option<EpError>> {
    on_ranks(world_size, deadline, |mut ranks| {
        let start = Instant::now();
        let error = body(&mut ranks);
        assert!(start.elapsed() < deadline + SLACK, "{error:?}");
        error
    })
}

#[test]
fn an_early_drop_is_named() {
    for leaver in 0..4 {
        let errors = faulty(4, PATIENT, |ranks| {
            ranks.barrier().unwrap();
            if ranks.rank() == leaver {
                return None;
            }
            let result = ranks.all_reduce(&ones(2));
            Some(fails_for_good(ranks, result))
        });
        for (rank, error) in errors.into_iter().enumerate() {
            assert_eq!(error.is_none(), rank == leaver);
            if let Some(error) = error {
                assert_eq!(error.kind, EpErrorKind::RankLeft { rank: leaver });
                assert_eq!((error.op, error.step), (Collective::AllReduce, 1));
            }
        }
    }
}

#[test]
fn a_panic_is_named() {
    let start = Instant::now();
    let outcomes = launch(4, PATIENT, |mut ranks| {
        ranks.barrier().unwrap();
        if ranks.rank() == 2 {
            std::thread::sleep(Duration::from_millis(20));
            panic!("out of cheese");
        }
        let result = ranks.all_gather(&ones((1, 2)), &[1; 4]);
        fails_for_good(&mut ranks, result)
    })
    .unwrap();
    assert!(start.elapsed() < Duration::from_secs(2));
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        if rank == 2 {
            let message = outcome.unwrap_err();
            assert!(message.contains("rank 2") && message.contains("out of cheese"));
        } else {
            assert_eq!(outcome.unwrap().kind, EpErrorKind::RankPanicked { rank: 2 });
        }
    }
}

/// All ranks fail at once with a `Desync` that names `odd`; returns what was expected and found.
fn desync(
    world_size: usize,
    odd: usize,
    body: impl Fn(&mut Threads) -> Result<(), EpError> + Sync,
) -> (String, String) {
    let start = Instant::now();
    let errors = faulty(world_size, PATIENT, |ranks| {
        let result = body(ranks);
        Some(fails_for_good(ranks, result))
    });
    assert!(start.elapsed() < Duration::from_secs(2), "not at once");
    let kinds: Vec<EpErrorKind> = errors.into_iter().map(|e| e.unwrap().kind).collect();
    assert!(kinds.iter().all(|kind| kind == &kinds[0]), "{kinds:?}");
    match kinds[0].clone() {
        EpErrorKind::Desync { rank, expected, found } => {
            assert_eq!(rank, odd);
            (expected, found)
        }
        other => panic!("not a desync: {other}"),
    }
}

#[test]
fn a_skipped_call_is_named() {
    for (world_size, odd) in [(2, 1), (3, 0), (5, 3), (8, 0), (8, 7)] {
        let (expected, found) = desync(world_size, odd, |ranks| {
            let counts = vec![1; world_size];
            if ranks.rank() != odd {
                ranks.all_gather(&ones((1, 2)), &counts)?;
            }
            ranks.reduce_scatter(&ones((world_size, 2)), &counts)?;
            Ok(())
        });
        assert!(expected.contains("all_gather"), "{expected}");
        assert!(found.contains("reduce_scatter"), "{found}");
    }
}

#[test]
fn a_skipped_layer_is_named_by_its_label() {
    let (expected, found) = desync(4, 2, |ranks| {
        for layer in 0..4 {
            if ranks.rank() == 2 && layer == 1 {
                continue;
            }
            ranks.set_label(&format!("layer {layer}"));
            ranks.all_reduce(&ones(2))?;
        }
        Ok(())
    });
    assert_eq!(expected, "label \"layer 1\"");
    assert_eq!(found, "label \"layer 2\"");
}

#[test]
fn a_doubled_call_is_named() {
    let (expected, found) = desync(4, 1, |ranks| {
        ranks.barrier()?;
        if ranks.rank() == 1 {
            ranks.barrier()?;
        }
        ranks.all_reduce(&ones(2))?;
        Ok(())
    });
    assert!(expected.contains("all_reduce") && found.contains("barrier"));
}

/// Without labels, an unnoticed extra call shows when the others are done.
#[test]
fn one_call_too_many_at_the_end_is_named() {
    let errors = faulty(3, PATIENT, |ranks| {
        ranks.barrier().unwrap();
        if ranks.rank() != 1 {
            return None;
        }
        let result = ranks.barrier();
        Some(fails_for_good(ranks, result))
    });
    let kind = errors[1].clone().unwrap().kind;
    assert!(matches!(kind, EpErrorKind::RankLeft { rank: 0 | 2 }), "{kind}");
}

#[test]
fn another_shape_dtype_or_count_is_named() {
    let (expected, found) = desync(3, 2, |ranks| {
        let width = if ranks.rank() == 2 { 5 } else { 4 };
        ranks.all_gather(&ones((1, width)), &[1; 3])?;
        Ok(())
    });
    assert_eq!(expected, "rows of shape [4]");
    assert_eq!(found, "rows of shape [5]");

    let (expected, found) = desync(3, 0, |ranks| {
        let dtype = [DType::F16, DType::F32, DType::F32][ranks.rank()];
        ranks.all_reduce(&ones(3).to_dtype(dtype).unwrap())?;
        Ok(())
    });
    assert_eq!((expected.as_str(), found.as_str()), ("dtype f32", "dtype f16"));

    let (expected, found) = desync(3, 1, |ranks| {
        let counts = if ranks.rank() == 1 { [1, 1, 2] } else { [1, 1, 1] };
        ranks.all_gather(&ones((1, 2)), &counts)?;
        Ok(())
    });
    assert_eq!(expected, "counts [1, 1, 1]");
    assert_eq!(found, "counts [1, 1, 2]");

    let (expected, found) = desync(2, 1, |ranks| {
        ranks.all_reduce(&ones((2, ranks.rank() + 2)))?;
        Ok(())
    });
    assert_eq!(expected, "shape [2, 2]");
    assert_eq!(found, "shape [2, 3]");
}

/// Ranks that come late must not keep a disagreement from being reported.
#[test]
fn a_desync_does_not_wait_for_late_ranks() {
    let late = Duration::from_millis(1500);
    let outcomes = on_ranks(8, PATIENT, |mut ranks| {
        if ranks.rank() >= 3 {
            std::thread::sleep(late);
        }
        let start = Instant::now();
        let result = match ranks.rank() {
            1 => ranks.barrier(),
            _ => ranks.all_reduce(&ones(1)).map(|_| ()),
        };
        let took = start.elapsed();
        (fails_for_good(&mut ranks, result), took)
    });
    for (error, took) in outcomes {
        assert!(took < SLACK, "{took:?}");
        assert!(matches!(error.kind, EpErrorKind::Desync { rank: 1, .. }), "{error}");
    }
}

#[test]
fn an_abort_from_another_thread_wakes_everybody() {
    let errors = faulty(4, PATIENT, |ranks| {
        ranks.barrier().unwrap();
        if ranks.rank() == 3 {
            let handle = ranks.abort_handle();
            let other = handle.clone();
            std::thread::sleep(Duration::from_millis(50));
            std::thread::spawn(move || other.abort("shutting down")).join().unwrap();
            handle.abort("second thoughts come too late");
        }
        let start = Instant::now();
        let result = ranks.barrier();
        assert!(start.elapsed() < Duration::from_secs(2));
        Some(fails_for_good(ranks, result))
    });
    for error in errors {
        let error = error.unwrap();
        let expected = EpErrorKind::Aborted { by: Some(3), reason: "shutting down".to_string() };
        assert_eq!(error.kind, expected);
    }
}

#[test]
fn ranks_that_sleep_past_the_deadline_are_named() {
    let deadline = Duration::from_millis(200);
    let outcomes = on_ranks(5, deadline, |mut ranks| {
        ranks.barrier().unwrap();
        ranks.set_label("layer 7");
        if [1, 4].contains(&ranks.rank()) {
            std::thread::sleep(deadline * 3);
        }
        let start = Instant::now();
        let result = ranks.all_to_all(&ones((5, 2)), &[1; 5]);
        let took = start.elapsed();
        (fails_for_good(&mut ranks, result), took)
    });
    for (rank, (error, took)) in outcomes.into_iter().enumerate() {
        assert!(took < deadline + SLACK, "rank {rank} took {took:?}");
        let expected = EpErrorKind::Timeout { missing: vec![1, 4], deadline };
        assert_eq!(error.kind, expected);
        assert_eq!((error.op, error.step), (Collective::AllToAll, 1));
        assert_eq!(error.label, "layer 7");
    }
}

// ---------------------------------------------------------------------------------------------
// Bad arguments

type Call = fn(&mut dyn Communicator) -> Result<(), EpError>;

/// Calls that no group of two (or one) can carry out, and a word that the error must contain.
fn bad_calls() -> Vec<(Call, &'static str)> {
    fn ids(num_rows: usize) -> Tensor {
        Tensor::zeros((num_rows, 2), DType::U32, &Device::Cpu).unwrap()
    }
    vec![
        (|c| c.all_gather(&ones((1, 2)), &[]).map(drop), "counts has 0 entries"),
        (|c| c.all_gather(&ones((1, 2)), &[1; 9]).map(drop), "counts has 9 entries"),
        (
            |c| c.all_gather(&ones((3, 2)), &vec![1; c.world_size()]).map(drop),
            "rows has 3 rows, it must have counts[rank] = 1",
        ),
        (|c| c.all_gather(&ones(()), &vec![1; c.world_size()]).map(drop), "scalar"),
        (|c| c.reduce_scatter(&ones((1, 2)), &[]).map(drop), "counts has 0 entries"),
        (
            |c| c.reduce_scatter(&ones((9, 2)), &vec![1; c.world_size()]).map(drop),
            "rows has 9 rows, it must have sum(counts)",
        ),
        (|c| c.reduce_scatter(&ids(c.world_size()), &vec![1; c.world_size()]).map(drop), "dtype u32"),
        (|c| c.all_to_all(&ones((1, 2)), &[1; 9]).map(drop), "send_counts has 9 entries"),
        (|c| c.all_to_all(&ones((9, 2)), &vec![1; c.world_size()]).map(drop), "sum(send_counts)"),
        (|c| c.all_to_all(&ones((9, 2)), &vec![usize::MAX; c.world_size()]).map(drop), "send_counts"),
        (|c| c.all_to_all(&ones(()), &vec![0; c.world_size()]).map(drop), "scalar"),
        (|c| c.all_reduce(&ids(2)).map(drop), "it must be f32, f64, f16 or bf16"),
    ]
}

#[test]
fn bad_arguments_are_named_and_the_others_do_not_hang() {
    for (call, word) in bad_calls() {
        let errors = faulty(2, PATIENT, |ranks| {
            let result = if ranks.rank() == 1 { call(ranks) } else { ranks.barrier() };
            Some(fails_for_good(ranks, result))
        });
        let kinds: Vec<EpErrorKind> = errors.into_iter().map(|e| e.unwrap().kind).collect();
        let EpErrorKind::BadArgument(what) = &kinds[1] else {
            panic!("{word}: {}", kinds[1]);
        };
        assert!(what.contains(word), "{what}");
        let EpErrorKind::Aborted { by: Some(1), reason } = &kinds[0] else {
            panic!("{word}: {}", kinds[0]);
        };
        assert!(reason.contains(word), "{reason}");
    }
}

#[test]
fn solo_makes_the_same_checks() {
    for (call, word) in bad_calls() {
        let mut solo = Solo::new();
        solo.barrier().unwrap();
        let error = call(&mut solo).unwrap_err();
        assert!(matches!(&error.kind, EpErrorKind::BadArgument(what) if what.contains(word)));
        assert_eq!((error.rank, error.step), (0, 1));
        let later = solo.barrier().unwrap_err();
        assert!(matches!(&later.kind, EpErrorKind::Poisoned { cause } if **cause == error));
    }
    let mut solo = Solo::default();
    solo.set_label("layer 1");
    solo.abort_handle().abort("enough");
    let error = solo.all_reduce(&ones(2)).unwrap_err();
    assert!(matches!(error.kind, EpErrorKind::Aborted { by: Some(0), .. }));
    assert_eq!(solo.health().alive, [true]);
}

/// Rows without elements can be so many that their sum does not fit.
#[test]
fn absurd_counts_of_empty_rows_do_not_panic() {
    let errors = on_ranks(2, PATIENT, |mut ranks| {
        let many = Tensor::zeros((usize::MAX, 0), DType::F32, &Device::Cpu).unwrap();
        ranks.all_to_all(&many, &[usize::MAX, 0]).err()
    });
    assert!(matches!(errors[0].as_ref().unwrap().kind, EpErrorKind::Tensor(_)));
    let error = on_ranks(2, PATIENT, |mut ranks| ranks.all_gather(&ones((1, 1)), &[1, usize::MAX]).unwrap_err());
    assert!(error.iter().any(|e| matches!(e.kind, EpErrorKind::BadArgument(_))));
}
