//! Blocks of several ranks with a device each against one rank on one device: the same bits in slot order, and close otherwise,
//! for every strategy, token counts and shapes of every kernel.

use super::ranks::{DeviceRank, are_emulated, on_devices, one_at_a_time, there_are, world_sizes};
use super::{captured, overwrite};
use crate::devices::to_host;
use crate::oracle::{self, Random};
use candle_core::cuda_backend::cudarc::driver::result;
use candle_core::{DType, Device, Tensor};
use candle_moe::block::{MoeBlock, MoeBlockBuilder, MoeOutput};
#[cfg(feature = "nccl")]
use candle_moe::ep::Nccl;
use candle_moe::ep::{Peer, Placement, Reduction, Step, Strategy};
use candle_moe::experts::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, Linear};
use candle_moe::routing::{Router, RoutingMethod};
use half::bf16;

const NUM_EXPERTS: usize = 10;
const TOP_K: usize = 3;
#[cfg(feature = "nccl")]
const SENDING: [Strategy; 3] = [Strategy::Replicated, Strategy::Gather, Strategy::Exchange];
const PUSHING: [Strategy; 2] = [Strategy::Peer, Strategy::Exchange];

/// The numbers of a layer, on the host.
pub(super) struct Layer {
    gate: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: Option<(Tensor, Tensor)>,
    dtype: DType,
}

impl Layer {
    pub(super) fn new(
        random: &mut Random,
        hidden_size: usize,
        intermediate_size: usize,
        dtype: DType,
        has_shared: bool,
    ) -> Self {
        let mut floats =
            |dims: &[usize], scale| oracle::floats(&random.units(dims.iter().product(), scale), dims, dtype).0;
        let (h, i) = (hidden_size, intermediate_size);
        Self {
            gate: floats(&[NUM_EXPERTS, h], 1.0),
            gate_up: floats(&[NUM_EXPERTS, 2 * i, h], 0.2),
            down: floats(&[NUM_EXPERTS, h, i], 0.2),
            shared: has_shared.then(|| (floats(&[1, 2 * i, h], 0.2), floats(&[1, h, i], 0.2))),
            dtype,
        }
    }

    fn experts(gate_up: Tensor, down: Tensor) -> Experts {
        let projection = |weight| ExpertProjection::new(ExpertWeights::dense(weight).unwrap(), None).unwrap();
        Experts::new(projection(gate_up), projection(down), GateUpRows::Concatenated, Activation::Silu).unwrap()
    }

    pub(super) fn block(
        &self,
        ep_size: usize,
        rank: usize,
        options: impl Fn(MoeBlockBuilder) -> MoeBlockBuilder,
    ) -> MoeBlock {
        let local = Placement::contiguous(NUM_EXPERTS, ep_size).unwrap().local(rank).unwrap();
        let own = |weight: &Tensor| weight.narrow(0, local.start, local.len()).unwrap().contiguous().unwrap();
        let gate = Linear::new(self.gate.clone(), None).unwrap();
        let router = Router::new(RoutingMethod::Renormalize, TOP_K).unwrap();
        let experts = Self::experts(own(&self.gate_up), own(&self.down));
        let builder = options(MoeBlock::builder(gate, router, experts).shard(ep_size, rank).statistics(true));
        let builder = match &self.shared {
            Some((gate_up, down)) => builder.shared_experts(Self::experts(gate_up.clone(), down.clone())),
            None => builder,
        };
        builder.build().unwrap()
    }

    pub(super) fn hidden(&self, random: &mut Random, num_tokens: usize) -> Tensor {
        let h = self.gate.dims()[1];
        oracle::floats(&random.units(num_tokens * h, 1.0), &[num_tokens, h], self.dtype).0
    }
}

fn there(tensor: &Tensor, device: &Device) -> Tensor {
    let &[num_rows, width] = tensor.dims() else { panic!("{:?}", tensor.shape()) };
    match num_rows {
        0 => Tensor::zeros((1, width), tensor.dtype(), device).unwrap().narrow(0, 0, 0).unwrap(),
        _ => tensor.to_device(device).unwrap(),
    }
}

/// What a rank gets of its own tokens, and the slots of each expert that it has counted.
fn run<R: DeviceRank>(
    layer: &Layer,
    ranks: &mut R,
    hidden: &Tensor,
    strategy: Strategy,
    reduction: Reduction,
) -> (Tensor, Vec<u64>) {
    let device = ranks.device().clone();
    let replicated = strategy == Strategy::Replicated;
    let options =
        |builder: MoeBlockBuilder| builder.strategy(strategy).reduction(reduction).replicated_tokens(replicated);
    let block = layer.block(ranks.world_size(), ranks.rank(), options).to_device(&device).unwrap();
    let step = Step::agree(ranks, hidden.dims()[0]).unwrap();
    let MoeOutput { hidden, .. } = block.forward_traced(&there(hidden, &device), ranks, &step).unwrap();
    ranks.settle().unwrap();
    (to_host(&hidden), block.load().unwrap().slots_per_expert)
}

fn alone(layer: &Layer, hidden: &Tensor) -> (Tensor, Vec<u64>) {
    let device = Device::new_cuda(0).unwrap();
    let block = layer.block(1, 0, |builder| builder).to_device(&device).unwrap();
    let output = to_host(&block.forward_alone(&there(hidden, &device)).unwrap());
    (output, block.load().unwrap().slots_per_expert)
}

/// The rows below each other, of which some have none.
fn stacked(parts: &[Tensor]) -> Tensor {
    let filled: Vec<_> = parts.iter().filter(|part| part.elem_count() > 0).collect();
    if filled.is_empty() { parts[0].clone() } else { Tensor::cat(&filled, 0).unwrap() }
}

fn assert_near(found: &Tensor, expected: &Tensor, dtype: DType, context: &str) {
    let numbers =
        |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (found, expected) = (numbers(found), numbers(expected));
    let largest = expected.iter().fold(0f64, |largest, value| largest.max(value.abs()));
    let bound = largest
        * match dtype {
            DType::BF16 => 1.0 / 64.0,
            DType::F16 => 1.0 / 512.0,
            _ => 1e-5,
        };
    assert_eq!(found.len(), expected.len(), "{context}");
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= bound, "{context}: {found}, expected {expected}");
    }
}

#[cfg(feature = "nccl")]
#[test]
fn every_strategy_gives_what_one_device_does() {
    give_what_one_device_does::<Nccl>(&SENDING);
}

#[test]
fn peers_give_what_one_device_does() {
    give_what_one_device_does::<Peer>(&PUSHING);
}

fn give_what_one_device_does<R: DeviceRank>(strategies: &[Strategy]) {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    let mut random = Random(91);
    // Sizes for the tensor cores, and such that are not.
    let shapes = [(128, 192, DType::BF16), (64, 128, DType::F16), (40, 24, DType::BF16), (128, 64, DType::F32)];
    for world_size in world_sizes() {
        for (n, (hidden_size, intermediate_size, dtype)) in shapes.into_iter().enumerate() {
            let layer = Layer::new(&mut random, hidden_size, intermediate_size, dtype, n % 2 == 1);
            // Few tokens, some, many for each expert; ranks with none; none at all.
            for most in [0, 2, 9, 70] {
                let counts: Vec<usize> = (0..world_size).map(|_| random.below(most + 1)).collect();
                let hidden: Vec<Tensor> = counts.iter().map(|&count| layer.hidden(&mut random, count)).collect();
                let all = stacked(&hidden);
                let (expected, slots) = alone(&layer, &all);
                for &strategy in strategies {
                    for reduction in Reduction::ALL {
                        let context = format!("{counts:?} {hidden_size} {dtype:?} {strategy} {reduction}");
                        let of_ranks = on_devices(world_size, |mut ranks: R| {
                            let own = if strategy == Strategy::Replicated { &all } else { &hidden[ranks.rank()] };
                            let warm = run(&layer, &mut ranks, own, strategy, reduction);
                            // Once they serve, shared experts work beside dispatch.
                            if layer.shared.is_some() {
                                ranks.start_serving();
                                let (again, counted) = run(&layer, &mut ranks, own, strategy, reduction);
                                assert_eq!(oracle::bits_of(&again), oracle::bits_of(&warm.0), "{context}: served");
                                assert_eq!(counted, warm.1, "{context}: served");
                            }
                            warm
                        });
                        let (outputs, counted): (Vec<_>, Vec<_>) = of_ranks.into_iter().unzip();
                        assert!(counted.iter().all(|counted| *counted == slots), "{context}: {counted:?}");
                        let outputs = match strategy {
                            Strategy::Replicated => outputs,
                            _ => vec![stacked(&outputs)],
                        };
                        for output in &outputs {
                            match reduction {
                                Reduction::SlotOrder => {
                                    assert_eq!(oracle::bits_of(output), oracle::bits_of(&expected), "{context}");
                                }
                                Reduction::RankPartial => assert_near(output, &expected, dtype, &context),
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A rank's block and what it needs for steps.
struct Member<R> {
    ranks: R,
    block: MoeBlock,
}

impl<R: DeviceRank> Member<R> {
    fn new(layer: &Layer, ranks: R, strategy: Strategy, reduction: Reduction) -> Self {
        let options = |builder: MoeBlockBuilder| {
            builder.strategy(strategy).reduction(reduction).replicated_tokens(strategy == Strategy::Replicated)
        };
        let block = layer.block(ranks.world_size(), ranks.rank(), options).to_device(ranks.device()).unwrap();
        Self { ranks, block }
    }

    fn forward(&mut self, hidden: &Tensor) -> Tensor {
        let step = Step::agree(&mut self.ranks, hidden.dims()[0]).unwrap();
        self.block.forward(hidden, &mut self.ranks, &step).unwrap()
    }
}

#[cfg(feature = "nccl")]
#[test]
fn a_captured_graph_of_several_ranks_follows_its_inputs() {
    if !are_emulated() {
        graphs_follow_their_inputs::<Nccl>(&[Strategy::Gather, Strategy::Replicated]);
    }
}

#[test]
fn a_captured_graph_of_peers_follows_its_inputs() {
    graphs_follow_their_inputs::<Peer>(&[Strategy::Peer, Strategy::Gather]);
}

fn graphs_follow_their_inputs<R: DeviceRank>(strategies: &[Strategy]) {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    let mut random = Random(92);
    let layer = Layer::new(&mut random, 128, 192, DType::BF16, true);
    let num_tokens = 9;
    for (strategy, reduction) in
        strategies.iter().flat_map(|&strategy| Reduction::ALL.into_iter().map(move |reduction| (strategy, reduction)))
    {
        // One for all ranks, so that replicated tokens are the same.
        let inputs: Vec<_> = (0..3).map(|_| layer.hidden(&mut random, num_tokens)).collect();
        on_devices(2, |ranks: R| {
            let device = ranks.device().clone();
            let mut member = Member::new(&layer, ranks, strategy, reduction);
            let input = inputs[0].to_device(&device).unwrap();
            let eager: Vec<_> =
                inputs.iter().map(|hidden| member.forward(&hidden.to_device(&device).unwrap())).collect();
            member.ranks.settle().unwrap();
            let output = eager[0].zeros_like().unwrap();
            let (graph, ()) = captured(&device, || output.slice_set(&member.forward(&input), 0, 0).unwrap());
            for round in 0..30 {
                let n = round % inputs.len();
                overwrite(&input, &inputs[n].flatten_all().unwrap().to_vec1::<bf16>().unwrap());
                graph.launch().unwrap();
                member.ranks.settle().unwrap();
                let context = format!("{strategy} {reduction}, round {round}");
                assert_eq!(oracle::bits_of(&to_host(&output)), oracle::bits_of(&to_host(&eager[n])), "{context}");
            }
            // A graph of collectives is dropped before the rank.
            drop(graph);
        });
    }
}

#[cfg(feature = "nccl")]
#[test]
#[ignore = "takes long: ten thousand steps for each strategy"]
fn ten_thousand_steps_leave_no_memory_behind() {
    steps_leave_no_memory_behind::<Nccl>(&[Strategy::Gather, Strategy::Exchange]);
}

#[test]
#[ignore = "takes long: ten thousand steps for each reduction"]
fn ten_thousand_steps_of_peers_leave_no_memory_behind() {
    steps_leave_no_memory_behind::<Peer>(&[Strategy::Peer]);
}

fn steps_leave_no_memory_behind<R: DeviceRank>(strategies: &[Strategy]) {
    let _turn = one_at_a_time();
    if !there_are(2) || are_emulated() {
        return;
    }
    let mut random = Random(93);
    let layer = Layer::new(&mut random, 128, 192, DType::BF16, false);
    for &strategy in strategies {
        on_devices(2, |ranks: R| {
            let (rank, device) = (ranks.rank(), ranks.device().clone());
            let mut random = Random(94 + rank as u64);
            let all = layer.hidden(&mut random, 40).to_device(&device).unwrap();
            let mut member = Member::new(&layer, ranks, strategy, Reduction::SlotOrder);
            let mut free = 0;
            for step in 0..10_000 {
                let output = member.forward(&all.narrow(0, 0, random.below(41)).unwrap());
                if step % 100 == 0 {
                    member.ranks.settle().unwrap();
                    assert!(
                        output.dims()[0] == 0
                            || to_host(&output)
                                .to_dtype(DType::F32)
                                .unwrap()
                                .sum_all()
                                .unwrap()
                                .to_scalar::<f32>()
                                .unwrap()
                                .is_finite()
                    );
                }
                if step == 1000 {
                    free = free_memory(&device);
                }
            }
            member.ranks.settle().unwrap();
            let left = free_memory(&device);
            assert!(left + (64 << 20) >= free, "{strategy}: {free} bytes were free after a tenth, {left} at the end");
        });
    }
}

fn free_memory(device: &Device) -> usize {
    device.synchronize().unwrap();
    result::mem_get_info().unwrap().0
}
