//! Ranks whose devices reach each other's memory: collectives and faults as those of every rank with a device, and what is theirs
//! alone.

use super::captured;
use super::ranks::{
    PATIENT, SLACK, anew, are_emulated, gather, on_devices, one_at_a_time, tests_of, there_are, world_sizes,
};
use crate::devices::to_host;
use crate::oracle::{self, Random};
use candle_core::{DType, Device, Tensor};
use candle_moe::block::MoeBlock;
use candle_moe::ep::{
    Communicator, EpErrorKind, Peer, Placement, Reduction, Sharing, Step, Strategy, Threads, combine, combine_sums,
    dispatch, launch,
};
use candle_moe::experts::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, Linear, weighted_sum};
use candle_moe::order::ExpertOrder;
use candle_moe::routing::{Router, Routing, RoutingMethod};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

tests_of!(Peer);

const NUM_EXPERTS: usize = 7;
const TOP_K: usize = 3;
const HIDDEN_SIZE: usize = 20;

/// Tokens of a rank, on its device.
struct Batch {
    hidden: Tensor,
    routing: Routing,
}

impl Batch {
    fn new(random: &mut Random, num_tokens: usize, device: &Device) -> Self {
        let floats = |random: &mut Random, width| {
            let dims = [num_tokens, width];
            oracle::floats(&random.units(num_tokens * width, 1.0), &dims, DType::F32).0.to_device(device).unwrap()
        };
        let logits = floats(random, NUM_EXPERTS);
        let router = Router::new(RoutingMethod::Renormalize, TOP_K).unwrap();
        Self { hidden: floats(random, HIDDEN_SIZE), routing: router.route(&logits).unwrap() }
    }

    /// What comes home when each expert returns its tokens: these, since weights add up to 1.
    fn assert_is(&self, combined: &Tensor, context: &str) {
        let values = |tensor: &Tensor| to_host(tensor).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (found, expected) in values(combined).iter().zip(values(&self.hidden)) {
            assert!((found - expected).abs() <= 1e-5, "{context}: {found}, expected {expected}");
        }
    }
}

/// What experts make of the tokens that return them.
fn hand_back(ranks: &Peer, placement: &Placement, hidden: &Tensor, topk_ids: &Tensor) -> (Tensor, ExpertOrder) {
    let local = placement.local(ranks.rank()).unwrap();
    let order = ExpertOrder::new(topk_ids, NUM_EXPERTS, local).unwrap();
    let top_k = TOP_K as u32;
    let slots = to_host(&order.sorted_slots).to_vec1::<u32>().unwrap();
    let tokens: Vec<u32> = slots.iter().map(|&slot| if slot == u32::MAX { 0 } else { slot / top_k }).collect();
    let tokens = Tensor::new(tokens, hidden.device()).unwrap();
    (hidden.index_select(&tokens, 0).unwrap(), order)
}

/// Two batches are under way at once, in every order that makes sense.
#[test]
fn two_batches_are_under_way_at_once() {
    let _turn = one_at_a_time();
    for world_size in world_sizes() {
        for reduction in Reduction::ALL {
            on_devices(world_size, |mut ranks: Peer| {
                let (rank, device) = (ranks.rank(), ranks.device().clone());
                let mut random = Random(7 + rank as u64);
                let placement = Placement::contiguous(NUM_EXPERTS, world_size).unwrap();
                let sharing = Sharing { strategy: Strategy::Peer, reduction, placement: &placement };
                let num_tokens = 3 + 2 * rank;
                let step = Step::agree(&mut ranks, num_tokens).unwrap();
                for round in 0..12 {
                    let batches: Vec<_> = (0..3).map(|_| Batch::new(&mut random, num_tokens, &device)).collect();
                    let under_way = if round % 2 == 0 { 2 } else { 1 };
                    for batches in batches.chunks(under_way) {
                        let sent: Vec<_> = batches
                            .iter()
                            .map(|batch| dispatch(&mut ranks, &step, &sharing, &batch.hidden, &batch.routing).unwrap())
                            .collect();
                        for (batch, dispatched) in batches.iter().zip(&sent) {
                            let (rows, order) =
                                hand_back(&ranks, &placement, dispatched.hidden(), dispatched.topk_ids());
                            let combined = match dispatched.weights_here() {
                                Some(weights) => {
                                    let sums = weighted_sum(&rows, weights, &order).unwrap();
                                    combine_sums(&mut ranks, dispatched, &sums).unwrap()
                                }
                                None => combine(&mut ranks, dispatched, &rows, &order).unwrap(),
                            };
                            batch.assert_is(&combined, &format!("{reduction}, rank {rank}, round {round}"));
                        }
                    }
                }
                ranks.settle().unwrap();
            });
        }
    }
    there_are(2);
}

/// A graph that one rank replays alone waits on its device; nothing of the host waits with it.
#[test]
fn a_device_that_waits_alone_is_called_off() {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    for is_aborted in [false, true] {
        // Emulated devices do their work at once, before anybody says how long it may take.
        if !is_aborted && are_emulated() {
            continue;
        }
        let noticed = Barrier::new(2);
        on_devices(2, |mut ranks: Peer| {
            let device = ranks.device().clone();
            let rows = Tensor::ones((4, 8), DType::F32, &device).unwrap();
            ranks.all_reduce(&rows).unwrap();
            ranks.set_label("layer 5");
            let (graph, _sum) = captured(&device, || ranks.all_reduce(&rows).unwrap());
            ranks.settle().unwrap();
            ranks.barrier().unwrap();
            ranks.start_serving();
            if ranks.rank() == 1 {
                noticed.wait();
            } else {
                let handle = ranks.abort_handle();
                let aborter = thread::spawn(move || {
                    thread::sleep(Duration::from_millis(100));
                    if is_aborted {
                        handle.abort("no more");
                    }
                });
                let began = Instant::now();
                graph.launch().unwrap();
                let error = ranks.settle().unwrap_err();
                let took = began.elapsed();
                noticed.wait();
                aborter.join().unwrap();
                assert_eq!(error.label, "layer 5", "{error}");
                match is_aborted {
                    true => assert!(matches!(error.kind, EpErrorKind::Aborted { by: Some(0), .. }), "{error}"),
                    false => assert_eq!(
                        error.kind,
                        EpErrorKind::Timeout { missing: vec![1], deadline: PATIENT.serving },
                        "{error}"
                    ),
                }
                assert!(took < PATIENT.serving + SLACK, "{took:?}");
            }
            drop(graph);
            let ones = Tensor::ones(1000, DType::F32, &device).unwrap();
            assert_eq!(ones.sum_all().unwrap().to_scalar::<f32>().unwrap(), 1000.0, "the context is usable");
            anew(ranks);
        });
    }
}

#[test]
fn a_capture_that_is_larger_than_any_call_before_is_refused() {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    on_devices(2, |mut ranks: Peer| {
        gather(&mut ranks, 1, &[1, 1]).unwrap();
        let device = ranks.device().clone();
        let rows = Tensor::ones((64, 64), DType::F32, &device).unwrap();
        let empty = Tensor::zeros(4, DType::F32, &device).unwrap();
        let (_graph, text) = captured(&device, || {
            // Something that may be captured, or there is no graph.
            empty.zero_set().unwrap();
            ranks.all_reduce(&rows).unwrap_err().to_string()
        });
        assert!(text.contains("make one of its size first"), "{text}");
        anew(ranks);
    });
}

#[test]
fn what_cannot_be_is_said_at_the_start() {
    let _turn = one_at_a_time();
    if !there_are(1) {
        return;
    }
    let errors = launch(2, PATIENT, |threads| Peer::over_threads(threads, &Device::Cpu).map(drop).unwrap_err());
    for error in errors.unwrap() {
        let text = error.unwrap().to_string();
        assert!(text.contains("it must be a CUDA device"), "{text}");
    }
    let errors = launch(2, PATIENT, |threads| {
        let device = Device::new_cuda(0).unwrap();
        Peer::over_threads(threads, &device).map(drop).unwrap_err()
    });
    for error in errors.unwrap() {
        let text = error.unwrap().to_string();
        assert!(text.contains("ranks 0 and 1 both have CUDA device 0"), "{text}");
    }
    let errors = launch(17, PATIENT, |threads| {
        let device = Device::new_cuda(0).unwrap();
        Peer::over_threads(threads, &device).map(drop).unwrap_err()
    });
    for error in errors.unwrap() {
        let text = error.unwrap().to_string();
        assert!(text.contains("there are 17 ranks, there must be at most 16"), "{text}");
    }
}

/// The strategy needs such ranks, and says so where they are others.
#[test]
fn other_ranks_are_refused_by_the_strategy() {
    let mut random = Random(5);
    let mut floats = |dims: &[usize]| oracle::floats(&random.units(dims.iter().product(), 1.0), dims, DType::F32).0;
    let gate = floats(&[NUM_EXPERTS, HIDDEN_SIZE]);
    let (gate_up, down) = (floats(&[NUM_EXPERTS, 16, HIDDEN_SIZE]), floats(&[NUM_EXPERTS, HIDDEN_SIZE, 8]));
    let hidden = floats(&[2, HIDDEN_SIZE]);
    let errors = launch(2, PATIENT, |mut threads: Threads| {
        let local = Placement::contiguous(NUM_EXPERTS, 2).unwrap().local(threads.rank()).unwrap();
        let own = |weight: &Tensor| weight.narrow(0, local.start, local.len()).unwrap().contiguous().unwrap();
        let projection = |weight| ExpertProjection::new(ExpertWeights::dense(own(weight)).unwrap(), None).unwrap();
        let experts =
            Experts::new(projection(&gate_up), projection(&down), GateUpRows::Concatenated, Activation::Silu).unwrap();
        let router = Router::new(RoutingMethod::Renormalize, TOP_K).unwrap();
        let block = MoeBlock::builder(Linear::new(gate.clone(), None).unwrap(), router, experts)
            .shard(2, threads.rank())
            .strategy(Strategy::Peer)
            .build()
            .unwrap();
        let step = Step::agree(&mut threads, 2).unwrap();
        block.forward(&hidden, &mut threads, &step).unwrap_err().to_string()
    });
    for error in errors.unwrap() {
        let error = error.unwrap();
        assert!(error.contains("the ranks do not reach each other's memory"), "{error}");
    }
}
