//! Faults of ranks with a device each, again and again, in the middle of steps of a block: the others hear of it in time and by name,
//! their devices stay usable, the group is built anew, and its next steps are right to the last bit.
//!
//! A step is a forward pass and the replay of a captured one. A replay asks nobody on the host, so who replays alone waits on
//! its device.

use super::captured;
use super::ranks::{DeviceRank, SLACK, are_emulated, one_at_a_time, there_are};
use super::sharded::Layer;
use crate::devices::to_host;
use crate::faults::accused;
use crate::oracle::{self, Random};
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::{DType, Device, Result, Tensor};
use candle_moe::block::MoeBlock;
#[cfg(feature = "nccl")]
use candle_moe::ep::Nccl;
use candle_moe::ep::{Communicator, Deadlines, EpError, EpErrorKind, Peer, Reduction, Step, Strategy, launch};
use std::sync::Barrier;
use std::time::{Duration, Instant};

const DEADLINES: Deadlines = Deadlines { warm_up: Duration::from_secs(60), serving: Duration::from_millis(400) };
const NUM_TOKENS: usize = 5;

/// A rank with its block, its input, and what comes of it.
struct Member<R> {
    // Dropped before the rank, as the library wants it.
    replay: Option<(CudaGraph, Tensor)>,
    ranks: R,
    block: MoeBlock,
    input: Tensor,
    expected: Vec<u32>,
}

impl<R: DeviceRank> Member<R> {
    /// Ready to step. Emulated devices capture nothing that a library carries.
    fn new(mut ranks: R, strategy: Strategy) -> Self {
        let mut random = Random(17);
        let layer = Layer::new(&mut random, 128, 192, DType::BF16, true);
        let device = ranks.device().clone();
        let all: Vec<_> = (0..ranks.world_size()).map(|_| layer.hidden(&mut random, NUM_TOKENS)).collect();
        let input = all[ranks.rank()].to_device(&device).unwrap();
        let alone = layer.block(1, 0, |builder| builder).to_device(&device).unwrap();
        let expected = bits(&alone.forward_alone(&input).unwrap());
        let options = |builder: candle_moe::block::MoeBlockBuilder| {
            builder.label("layer 7").strategy(strategy).reduction(Reduction::SlotOrder)
        };
        let block = layer.block(ranks.world_size(), ranks.rank(), options).to_device(&device).unwrap();
        let step = Step::agree(&mut ranks, NUM_TOKENS).unwrap();
        // Twice, for two rooms that take turns.
        let output = (0..2).map(|_| block.forward(&input, &mut ranks, &step).unwrap()).next_back().unwrap();
        ranks.settle().unwrap();
        let is_captured = strategy == Strategy::Peer || !are_emulated();
        let replay = is_captured.then(|| {
            let output = output.zeros_like().unwrap();
            let (graph, ()) = captured(&device, || {
                output.slice_set(&block.forward(&input, &mut ranks, &step).unwrap(), 0, 0).unwrap();
            });
            (graph, output)
        });
        ranks.barrier().unwrap();
        ranks.start_serving();
        Self { replay, ranks, block, input, expected }
    }

    fn step(&mut self) -> Result<()> {
        let step = Step::agree(&mut self.ranks, NUM_TOKENS)?;
        let output = self.block.forward(&self.input, &mut self.ranks, &step)?;
        self.ranks.settle()?;
        assert_eq!(bits(&output), self.expected);
        self.replay()
    }

    fn replay(&mut self) -> Result<()> {
        let Some((graph, output)) = &self.replay else { return Ok(()) };
        graph.launch().map_err(candle_core::Error::wrap)?;
        self.ranks.settle()?;
        assert_eq!(bits(output), self.expected);
        Ok(())
    }

    /// The rank alone; its graph is gone, and its device does what it is told.
    fn survivor(self) -> R {
        let Self { ranks, replay, .. } = self;
        drop(replay);
        let ones = Tensor::ones(1000, DType::F32, ranks.device()).unwrap();
        assert_eq!(ones.sum_all().unwrap().to_scalar::<f32>().unwrap(), 1000.0, "the context is usable");
        ranks
    }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    oracle::bits_of(&to_host(tensor))
}

/// What rank 1 does instead of its next step, and what rank 0 does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// Its thread returns, while rank 0 makes a forward pass.
    Return,
    /// Its thread returns, while rank 0 replays.
    ReturnFromReplay,
    /// It makes the call with other rows.
    Shape,
}

/// Both ranks' errors and how long rank 0 took to hear of it; then both step anew.
fn one_fault<R: DeviceRank>(strategy: Strategy, fault: Fault, steps: usize) -> Duration {
    let (gone, noticed) = (Barrier::new(2), Barrier::new(2));
    let ranks = launch(2, DEADLINES, |threads| {
        let (rank, lobby) = (threads.rank(), threads.lobby());
        let device = Device::new_cuda(rank).unwrap();
        let mut member = Member::new(R::over(threads, &device).unwrap(), strategy);
        (0..steps).for_each(|_| member.step().unwrap());
        if rank == 1 {
            let again = match fault {
                Fault::Shape => {
                    gone.wait();
                    let rows = Tensor::ones((1, 7), DType::F32, &device).unwrap();
                    let error = member.ranks.all_gather(&rows, &[1, 1]).unwrap_err();
                    assert!(matches!(error.kind, EpErrorKind::Desync { rank: 1, .. }), "{error}");
                    member.survivor().rebuilt()
                }
                _ => {
                    drop(member.survivor());
                    gone.wait();
                    noticed.wait();
                    lobby.join(rank, 1).and_then(|threads| R::over(threads, &device))
                }
            };
            let mut member = Member::new(again.unwrap(), strategy);
            (0..3).for_each(|_| member.step().unwrap());
            return Duration::ZERO;
        }
        gone.wait();
        let began = Instant::now();
        match fault {
            Fault::Return => assert!(member.step().is_err()),
            Fault::ReturnFromReplay => assert!(member.replay().is_err()),
            Fault::Shape => {
                let rows = Tensor::ones((1, 8), DType::F32, &device).unwrap();
                assert!(member.ranks.all_gather(&rows, &[1, 1]).is_err());
            }
        }
        let took = began.elapsed();
        let error: EpError = member.ranks.health().cause.unwrap();
        assert_eq!(accused(&error.kind), [1], "{fault:?}: {error}");
        let limit = if fault == Fault::ReturnFromReplay { DEADLINES.serving + SLACK } else { SLACK };
        assert!(took < limit, "{fault:?}: {took:?}");
        let survivor = member.survivor();
        if fault != Fault::Shape {
            noticed.wait();
        }
        let mut member = Member::new(survivor.rebuilt().unwrap(), strategy);
        (0..3).for_each(|_| member.step().unwrap());
        took
    });
    ranks.unwrap().into_iter().map(|rank| rank.unwrap()).max().unwrap()
}

fn threads_are_survived<R: DeviceRank>(name: &str, strategy: Strategy, faults: &[Fault]) {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    let times = if are_emulated() { 2 } else { 20 };
    for &fault in faults {
        // An emulated device waits before anybody can say how long it may.
        if fault == Fault::ReturnFromReplay && are_emulated() {
            continue;
        }
        let mut took: Vec<_> = (0..times).map(|n| one_fault::<R>(strategy, fault, n % 4)).collect();
        took.sort();
        println!(
            "{name}, {fault:?}: {times} times, heard of within {:?} (median), {:?} (longest)",
            took[times / 2],
            took[times - 1]
        );
    }
}

#[test]
fn peers_that_return_early_or_make_another_call_are_survived() {
    threads_are_survived::<Peer>("Peer", Strategy::Peer, &[Fault::Return, Fault::ReturnFromReplay, Fault::Shape]);
}

#[cfg(feature = "nccl")]
#[test]
fn threads_that_return_early_are_survived() {
    threads_are_survived::<Nccl>("Nccl", Strategy::Gather, &[Fault::Return, Fault::ReturnFromReplay]);
}

#[cfg(feature = "nccl")]
#[test]
fn threads_that_make_another_call_are_survived() {
    threads_are_survived::<Nccl>("Nccl", Strategy::Gather, &[Fault::Shape]);
}

#[cfg(feature = "nccl")]
mod processes {
    use super::*;
    use crate::procs::{Blow, CHECKED_STEPS, Kind, SERVING, joined, say, say_error, strike_often};

    const WITH_DEVICES: Kind =
        Kind { test: "cuda::faults::processes::rank_with_a_device", world_size: |_| 2, groups: 1 };

    /// Not a test: a rank that a test below starts as a process of its own. It steps until something fails, then meets the other
    /// anew and makes a few more steps.
    #[test]
    #[ignore = "run by the tests that start ranks as processes"]
    fn rank_with_a_device() {
        let Some((number, procs)) = joined() else { return };
        let device = Device::new_cuda(number).unwrap();
        let mut member = Member::new(Nccl::over_procs(procs, &device).unwrap(), Strategy::Gather);
        if member.ranks.generation() == 0 {
            say("ready");
            let error = (0..).find_map(|_| member.step().err()).unwrap();
            say_error(&member.ranks, error);
            member = Member::new(member.survivor().rebuild().unwrap(), Strategy::Gather);
        }
        member.ranks.set_deadline(DEADLINES.warm_up);
        (0..CHECKED_STEPS).for_each(|_| member.step().unwrap());
        let generation = member.ranks.generation();
        drop(member);
        say(&format!("done in generation {generation}"));
    }

    #[test]
    #[ignore = "needs two devices of which processes can have one each"]
    fn killed_processes_with_devices_are_named_within_a_second_and_replaced() {
        let _turn = one_at_a_time();
        if there_are(2) && !are_emulated() {
            strike_often(&WITH_DEVICES, |_| Blow::Kill, "killed, with devices", Duration::from_secs(1));
        }
    }

    #[test]
    #[ignore = "needs two devices of which processes can have one each"]
    fn stopped_processes_with_devices_are_named_at_the_deadline_and_replaced_or_return() {
        let _turn = one_at_a_time();
        if there_are(2) && !are_emulated() {
            let blow = |seed| if seed % 2 == 0 { Blow::Stop } else { Blow::Pause };
            strike_often(&WITH_DEVICES, blow, "stopped, with devices", SERVING + SLACK);
        }
    }
}
