//! The sharded block: against the float64 oracle on one rank, against one rank on many, and its faults by name.

use crate::devices::{self, line, to_host};
use crate::oracle::{self, Bounded, FLOATS, Matrix, Random};
use candle_core::{DType, Device, Result, Tensor};
use candle_moe::block::{MoeBlock, MoeBlockBuilder, MoeOutput};
use candle_moe::ep::{Communicator, Placement, Reduction, Solo, Step, Strategy, Threads, Topology, launch};
use candle_moe::experts::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, Linear};
use candle_moe::order::ExpertOrder;
use candle_moe::perfect_router::{Hotspot, Imbalance, PerfectRouterConfig, Plan, Schedule};
use candle_moe::routing::{ExpertGroups, Router, RoutingMethod};
use std::time::{Duration, Instant};

pub(crate) const HIDDEN: usize = 33;
const INTERMEDIATE: usize = 20;
const PATIENT: Duration = Duration::from_secs(20);
/// What "prompt" means for an error, however busy the machine is.
const PROMPT: Duration = Duration::from_secs(5);

/// All weights of a layer.
pub(crate) struct Layer {
    num_experts: usize,
    gate: (Tensor, Tensor),
    gate_up: (Tensor, Tensor),
    down: (Tensor, Tensor),
    selection_bias: Tensor,
}

impl Layer {
    pub(crate) fn new(seed: u64, num_experts: usize, dtype: DType) -> Self {
        let mut random = Random(seed);
        let mut tensor = |shape: &[usize], scale| {
            let values = random.units(shape.iter().product(), scale);
            oracle::floats(&values, shape, dtype).0
        };
        Self {
            num_experts,
            gate: (tensor(&[num_experts, HIDDEN], 0.5), tensor(&[num_experts], 0.2)),
            gate_up: (
                tensor(&[num_experts, 2 * INTERMEDIATE, HIDDEN], 0.4),
                tensor(&[num_experts, 2 * INTERMEDIATE], 0.4),
            ),
            down: (tensor(&[num_experts, HIDDEN, INTERMEDIATE], 0.4), tensor(&[num_experts, HIDDEN], 0.4)),
            selection_bias: tensor(&[num_experts], 0.3),
        }
    }

    pub(crate) fn router(&self, method: RoutingMethod, top_k: usize) -> Router {
        let router = Router::new(method, top_k).unwrap();
        if method.takes_selection_bias() { router.with_selection_bias(&self.selection_bias).unwrap() } else { router }
    }

    /// The block of one rank, which is given its own experts only.
    pub(crate) fn shard(&self, router: Router, ep_size: usize, ep_rank: usize) -> MoeBlockBuilder {
        let range = Topology::new(self.num_experts, ep_size, ep_rank).unwrap().local_experts();
        self.holding(&range.collect::<Vec<_>>(), router).shard(ep_size, ep_rank)
    }

    /// The same with a placement.
    pub(crate) fn placed(&self, router: Router, placement: &Placement, ep_rank: usize) -> MoeBlockBuilder {
        self.holding(placement.experts_of(ep_rank).unwrap(), router).placement(placement.clone(), ep_rank)
    }

    fn holding(&self, experts: &[usize], router: Router) -> MoeBlockBuilder {
        let ids = Tensor::new(experts.iter().map(|&id| id as u32).collect::<Vec<_>>(), &Device::Cpu).unwrap();
        let local = |tensor: &Tensor| tensor.index_select(&ids, 0).unwrap();
        let projection = |(weight, bias): &(Tensor, Tensor)| {
            ExpertProjection::new(ExpertWeights::dense(local(weight)).unwrap(), Some(local(bias))).unwrap()
        };
        let experts = Experts::new(
            projection(&self.gate_up),
            projection(&self.down),
            GateUpRows::Interleaved,
            Activation::GPT_OSS,
        )
        .unwrap();
        let gate = Linear::new(self.gate.0.clone(), Some(self.gate.1.clone())).unwrap();
        MoeBlock::builder(gate, router, experts)
    }

    /// What the gate makes of `hidden`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Tensor {
        Linear::new(self.gate.0.clone(), Some(self.gate.1.clone())).unwrap().forward(hidden).unwrap()
    }

    fn matrices((weight, bias): &(Tensor, Tensor)) -> Vec<Matrix> {
        let wide = |row: Vec<f32>| row.into_iter().map(f64::from).collect::<Vec<f64>>();
        let weight = weight.to_dtype(DType::F32).unwrap().to_vec3::<f32>().unwrap();
        let matrix = |(rows, bias): (Vec<Vec<f32>>, Vec<f32>)| Matrix {
            rows: rows.into_iter().map(wide).collect(),
            bias: wide(bias),
        };
        weight.into_iter().zip(oracle::rows_of(bias)).map(matrix).collect()
    }
}

pub(crate) fn hidden_states(seed: u64, num_tokens: usize, dtype: DType) -> Tensor {
    oracle::floats(&Random(seed).units(num_tokens * HIDDEN, 1.5), &[num_tokens, HIDDEN], dtype).0
}

/// Runs `body` on every rank; no rank may panic.
pub(crate) fn on_ranks<T: Send>(ep_size: usize, body: impl Fn(Threads) -> T + Sync) -> Vec<T> {
    launch(ep_size, PATIENT, body).unwrap().into_iter().map(|rank| rank.unwrap()).collect()
}

/// Every rank's tokens through every rank's shard.
fn sharded(hidden: &Tensor, counts: &[usize], build: impl Fn(usize) -> MoeBlock + Sync) -> Vec<MoeOutput> {
    let own = |rank: usize| hidden.narrow(0, counts[..rank].iter().sum(), counts[rank]).unwrap();
    on_ranks(counts.len(), |mut ranks| {
        let rank = ranks.rank();
        let step = Step::agree(&mut ranks, counts[rank]).unwrap();
        assert_eq!(step.token_counts(), counts);
        build(rank).forward_traced(&own(rank), &mut ranks, &step).unwrap()
    })
}

fn random_counts(random: &mut Random, ep_size: usize) -> Vec<usize> {
    (0..ep_size).map(|_| if random.below(3) == 0 { 0 } else { random.below(9) }).collect()
}

/// (num_experts, ep_size)
const GROUPS: [(usize, usize); 7] = [(8, 1), (8, 2), (8, 3), (8, 4), (8, 8), (7, 3), (7, 7)];

/// What a block of one rank computes of `hidden`, on the device of both.
fn trace(block: &MoeBlock, hidden: &Tensor) -> Result<MoeOutput> {
    trace_padded(block, hidden, None)
}

fn trace_padded(block: &MoeBlock, hidden: &Tensor, num_valid_tokens: Option<usize>) -> Result<MoeOutput> {
    let mut solo = Solo::new();
    let step = Step::agree(&mut solo, hidden.dims().first().copied().unwrap_or(0))?;
    let step = match num_valid_tokens {
        Some(num_valid) => step.with_valid_tokens(&Tensor::new(num_valid as u32, hidden.device())?),
        None => step,
    };
    block.forward_traced(hidden, &mut solo, &step)
}

#[test]
fn one_rank_equals_the_oracle() {
    for dtype in FLOATS {
        for method in oracle::methods() {
            let layer = Layer::new(1, 8, dtype);
            let hidden = hidden_states(2, 12, dtype);
            let block = layer.shard(layer.router(method, 3), 1, 0).build().unwrap();
            let in_a_group = on_ranks(1, |mut ranks| {
                let step = Step::agree(&mut ranks, 12).unwrap();
                block.forward_traced(&hidden, &mut ranks, &step).unwrap()
            });
            let alone = block.forward_alone(&hidden).unwrap();
            assert_eq!(oracle::bits_of(&alone), oracle::bits_of(&in_a_group[0].hidden));
            for device in devices::all() {
                let block = block.to_device(&device).unwrap();
                let output = trace(&block, &hidden.to_device(&device).unwrap()).unwrap();
                assert_eq!((output.hidden.dtype(), output.hidden.dims()), (dtype, hidden.dims()));
                layer.assert_output(&hidden, &output, method, dtype);
            }
        }
    }
}

impl Layer {
    /// Up to eight experts for each token.
    #[track_caller]
    pub(crate) fn assert_output(&self, hidden: &Tensor, output: &MoeOutput, method: RoutingMethod, dtype: DType) {
        let gate = &Self::matrices(&(self.gate.0.unsqueeze(0).unwrap(), self.gate.1.unsqueeze(0).unwrap()))[0];
        let (gate_up, down) = (Self::matrices(&self.gate_up), Self::matrices(&self.down));
        let bias = self.selection_bias.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        let host = |tensor: &Tensor| oracle::rows_of(&to_host(tensor));
        let (logits, out) = (host(&output.router_logits), host(&output.hidden));
        let ids = output.routing.topk_ids.to_vec2::<u32>().unwrap();
        for (token, x) in oracle::rows_of(hidden).iter().enumerate() {
            let exact: Vec<_> = x.iter().map(|&x| Bounded { value: x.into(), error: 0.0 }).collect();
            for (expected, &found) in gate.apply(&exact).into_iter().zip(&logits[token]) {
                let rounded = oracle::rounded(expected, dtype);
                let error = rounded.error + if dtype == DType::F32 { expected.error } else { 0.0 };
                assert!((f64::from(found) - rounded.value).abs() <= error, "router logit {found} {expected:?}");
            }
            let row: Vec<f64> = logits[token].iter().map(|&l| l.into()).collect();
            let scores = oracle::scores(method, &row, Some(&bias)).unwrap_or(row.clone());
            let top_k = ids[token].len();
            assert_eq!(ids[token], oracle::choose(&scores, top_k), "{method}");
            let weights = oracle::weights(method, &row, &ids[token]);
            let mut sum = vec![Bounded { value: 0.0, error: 1e-30 }; HIDDEN];
            for (&id, weight) in ids[token].iter().zip(&weights) {
                let (gate_up, down) = (&gate_up[id as usize], &down[id as usize]);
                let y = oracle::expert(gate_up, down, GateUpRows::Interleaved, Activation::GPT_OSS, x, dtype);
                for (sum, y) in sum.iter_mut().zip(y) {
                    sum.value += weight * y.value;
                    // The weight is off by 1e-6; the product and up to seven additions round, by half an epsilon each.
                    sum.error += weight * y.error + y.value.abs() * (1e-6 + weight * 4.0 * f64::from(f32::EPSILON));
                }
            }
            for (sum, &found) in sum.into_iter().zip(&out[token]) {
                let rounded = oracle::rounded(sum, dtype);
                let error = rounded.error + if dtype == DType::F32 { sum.error } else { 0.0 };
                let off = (f64::from(found) - rounded.value).abs();
                assert!(off <= error, "{method} {dtype:?} token {token}: {found}, not {rounded:?}");
            }
        }
    }
}

#[test]
fn slot_order_gives_the_bits_of_one_rank_for_every_group_and_uneven_counts() {
    let mut random = Random(3);
    for (num_experts, ep_size) in GROUPS {
        for dtype in FLOATS {
            let layer = Layer::new(4, num_experts, dtype);
            for method in [RoutingMethod::Renormalize, RoutingMethod::MiniMax2] {
                let counts = random_counts(&mut random, ep_size);
                let num_tokens = counts.iter().sum();
                let hidden = hidden_states(random.next(), num_tokens, dtype);
                let alone = layer.shard(layer.router(method, 3), 1, 0).build().unwrap();
                let expected = alone.forward_alone(&hidden).unwrap();
                let outputs = sharded(&hidden, &counts, |rank| {
                    let block = layer.shard(layer.router(method, 3), ep_size, rank).build().unwrap();
                    assert_eq!(block.experts().num_experts(), block.placement().local(rank).unwrap().len());
                    block
                });
                let bits: Vec<u32> = outputs.iter().flat_map(|output| oracle::bits_of(&output.hidden)).collect();
                assert_eq!(bits, oracle::bits_of(&expected), "{num_experts} experts, counts {counts:?}, {method}");
                for (output, &count) in outputs.iter().zip(&counts) {
                    assert_eq!((output.hidden.dims(), output.hidden.dtype()), (&[count, HIDDEN][..], dtype));
                    assert_eq!(output.router_logits.dims(), [count, num_experts]);
                    assert_eq!(output.routing.topk_ids.dims(), [count, 3]);
                }
            }
        }
    }
}

#[test]
fn a_group_without_any_token_gives_empty_results() {
    for reduction in [Reduction::SlotOrder, Reduction::RankPartial] {
        let layer = Layer::new(4, 8, DType::F32);
        let hidden = hidden_states(1, 0, DType::F32);
        for output in sharded(&hidden, &[0, 0, 0], |rank| {
            layer.shard(layer.router(RoutingMethod::Default, 2), 3, rank).reduction(reduction).build().unwrap()
        }) {
            assert_eq!(output.hidden.dims(), [0, HIDDEN]);
        }
    }
}

#[test]
fn rank_partial_equals_one_rank_within_rounding_and_itself_to_the_bit() {
    let mut random = Random(5);
    for (num_experts, ep_size) in GROUPS {
        let layer = Layer::new(6, num_experts, DType::F32);
        let counts = random_counts(&mut random, ep_size);
        let hidden = hidden_states(random.next(), counts.iter().sum(), DType::F32);
        let alone = layer.shard(layer.router(RoutingMethod::Renormalize, 4), 1, 0).build().unwrap();
        let expected = alone.forward_alone(&hidden).unwrap();
        let run = || -> Vec<u32> {
            let outputs = sharded(&hidden, &counts, |rank| {
                let router = layer.router(RoutingMethod::Renormalize, 4);
                layer.shard(router, ep_size, rank).reduction(Reduction::RankPartial).build().unwrap()
            });
            outputs.iter().flat_map(|output| oracle::bits_of(&output.hidden)).collect()
        };
        let first = run();
        assert_eq!(first, run(), "another run, other bits");
        // Four terms of one token in another order of additions: each addition rounds a sum of magnitudes below 20.
        for (a, b) in first.iter().zip(oracle::bits_of(&expected)) {
            let (a, b) = (f32::from_bits(*a), f32::from_bits(b));
            assert!((a - b).abs() <= 8.0 * f32::EPSILON * 20.0, "{a} {b}");
        }
    }
}

#[test]
fn many_layers_may_share_a_step_and_a_communicator() {
    let layers: Vec<Layer> = (0..3).map(|seed| Layer::new(seed, 8, DType::BF16)).collect();
    let router = |layer: &Layer| layer.router(RoutingMethod::RenormalizeNaive, 2);
    let hidden = hidden_states(9, 10, DType::BF16);
    let mut expected = hidden.clone();
    for layer in &layers {
        expected = layer.shard(router(layer), 1, 0).build().unwrap().forward_alone(&expected).unwrap();
    }
    let counts = [3, 0, 5, 2];
    let outputs = on_ranks(4, |mut ranks| {
        let rank = ranks.rank();
        let step = Step::agree(&mut ranks, counts[rank]).unwrap();
        let mut hidden = hidden.narrow(0, counts[..rank].iter().sum(), counts[rank]).unwrap();
        for (i, layer) in layers.iter().enumerate() {
            ranks.set_label(&format!("layer {i}"));
            hidden = layer.shard(router(layer), 4, rank).build().unwrap().forward(&hidden, &mut ranks, &step).unwrap();
        }
        oracle::bits_of(&hidden)
    });
    assert_eq!(outputs.concat(), oracle::bits_of(&expected));
}

// ---------------------------------------------------------------------------------------------
// Faults

const SENDING: [Strategy; 2] = [Strategy::Gather, Strategy::Exchange];

/// Rank 1 of three brings `bad`; every rank must fail at once, and the others must name it.
#[track_caller]
fn everybody_fails(bad: &Tensor, words: &[&str]) {
    let layer = Layer::new(7, 8, DType::F32);
    let good = hidden_states(8, 2, DType::F32);
    for strategy in SENDING {
        let outcomes: Vec<(Result<Tensor>, Duration)> = on_ranks(3, |mut ranks| {
            let rank = ranks.rank();
            let step = Step::agree(&mut ranks, 2).unwrap();
            let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 3, rank);
            let block = builder.strategy(strategy).build().unwrap();
            let start = Instant::now();
            let outcome = block.forward(if rank == 1 { bad } else { &good }, &mut ranks, &step);
            (outcome, start.elapsed())
        });
        for (rank, (outcome, elapsed)) in outcomes.into_iter().enumerate() {
            let error = outcome.expect_err("a rank went on").to_string();
            assert!(elapsed < PROMPT, "rank {rank} waited {elapsed:?}");
            if rank != 1 {
                assert!(error.contains("rank 1"), "rank {rank} does not name rank 1: {error}");
            }
            let lacks = |word: &&&str| !error.contains(**word);
            assert_eq!(words.iter().find(lacks), None, "{strategy}, rank {rank}: {error:?}");
        }
    }
}

#[test]
fn a_rank_with_a_wrong_hidden_state_fails_the_others_at_once_and_by_name() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    everybody_fails(&zeros(&[3, HIDDEN], DType::F32), &["hidden", "[3, 33]"]);
    everybody_fails(&zeros(&[0, HIDDEN], DType::F32), &["hidden", "[0, 33]"]);
    everybody_fails(&zeros(&[2, HIDDEN + 1], DType::F32), &["hidden", "[2, 34]"]);
    everybody_fails(&zeros(&[2, 0], DType::F32), &["hidden", "[2, 0]"]);
    everybody_fails(&zeros(&[2], DType::F32), &["hidden", "[2]"]);
    everybody_fails(&zeros(&[], DType::F32), &["hidden", "[]"]);
    everybody_fails(&zeros(&[1, 2, HIDDEN], DType::F32), &["hidden", "[1, 2, 33]"]);
    everybody_fails(&zeros(&[2, HIDDEN], DType::F64), &["hidden", "F64"]);
    everybody_fails(&zeros(&[2, HIDDEN], DType::U8), &["hidden", "U8"]);
    // Right on its own, but not what the others bring.
    everybody_fails(&zeros(&[2, HIDDEN], DType::BF16), &["rank 1", "bf16"]);
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let layer = Layer::new(7, 8, DType::F32);
    let good = hidden_states(8, 2, DType::F32);
    for strategy in SENDING {
        let errors = on_ranks(3, |mut ranks| {
            let rank = ranks.rank();
            let step = Step::agree(&mut ranks, 2).unwrap();
            if rank == 2 {
                return None;
            }
            let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 3, rank);
            let start = Instant::now();
            let block = builder.strategy(strategy).build().unwrap();
            let error = block.forward(&good, &mut ranks, &step).unwrap_err().to_string();
            assert!(start.elapsed() < PROMPT);
            Some(error)
        });
        for error in errors.into_iter().flatten() {
            assert!(error.contains("rank 2"), "{strategy}: {error}");
        }
    }
}

/// Three ranks whose blocks `build` makes, of which rank 0 is another: every rank's error.
fn errors_of_a_group(build: impl Fn(usize) -> MoeBlock + Sync) -> Vec<String> {
    let good = hidden_states(8, 2, DType::F32);
    on_ranks(3, |mut ranks| {
        let block = build(ranks.rank());
        let step = Step::agree(&mut ranks, 2).unwrap();
        block.forward(&good, &mut ranks, &step).unwrap_err().to_string()
    })
}

#[test]
fn a_rank_with_another_top_k_or_strategy_or_reduction_cannot_go_unnoticed() {
    let layer = Layer::new(7, 8, DType::F32);
    for strategy in SENDING {
        let block = |rank: usize, top_k: usize, strategy: Strategy, reduction: Reduction| {
            let builder = layer.shard(layer.router(RoutingMethod::Renormalize, top_k), 3, rank);
            builder.strategy(strategy).reduction(reduction).build().unwrap()
        };
        let (slots, partial) = (Reduction::SlotOrder, Reduction::RankPartial);
        let [gather, exchange] = SENDING;
        let other = if strategy == gather { exchange } else { gather };
        for (what, errors) in [
            ("top_k", errors_of_a_group(|rank| block(rank, if rank == 0 { 3 } else { 2 }, strategy, slots))),
            ("strategy", errors_of_a_group(|rank| block(rank, 2, if rank == 0 { other } else { strategy }, slots))),
            ("reduction", errors_of_a_group(|rank| block(rank, 2, strategy, if rank == 0 { partial } else { slots }))),
        ] {
            errors.iter().for_each(|error| assert!(error.contains("rank 0"), "{strategy}, other {what}: {error}"));
        }
    }
}

#[test]
fn a_communicator_of_another_place_is_refused() {
    let layer = Layer::new(7, 8, DType::F32);
    let block = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 4, 1).build().unwrap();
    let error = block.forward_alone(&hidden_states(1, 2, DType::F32)).unwrap_err().to_string();
    for word in ["moe block", "rank 0 of 1", "rank 1 of 4"] {
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }
}

// ---------------------------------------------------------------------------------------------
// Perfect router

pub(crate) fn spread(counts: &[u64]) -> u64 {
    counts.iter().max().unwrap() - counts.iter().min().unwrap()
}

#[test]
fn perfect_routing_loads_the_ranks_within_one_for_every_token_count_of_one_sender() {
    let layer = Layer::new(10, 8, DType::F32);
    for (top_k, ep_size) in [(1, 4), (2, 4), (3, 4), (3, 8), (5, 2)] {
        let loads = on_ranks(ep_size, |mut ranks| {
            let rank = ranks.rank();
            let router = layer.router(RoutingMethod::Renormalize, top_k);
            let builder = layer.shard(router, ep_size, rank).perfect_router(true).statistics(true);
            let block = builder.build().unwrap();
            assert!(block.is_perfect());
            let mut loads = Vec::new();
            for num_tokens in 1..=40 {
                let own = if rank == 0 { num_tokens } else { 0 };
                let hidden = hidden_states(num_tokens as u64, own, DType::F32);
                let step = Step::agree(&mut ranks, own).unwrap();
                block.reset_load().unwrap();
                let output = block.forward_traced(&hidden, &mut ranks, &step).unwrap();
                loads.push((num_tokens, block.load().unwrap()));
                if rank == 0 {
                    let plan = Plan::new(8, top_k, ep_size, 0).unwrap();
                    for (token, ids) in output.routing.topk_ids.to_vec2::<u32>().unwrap().into_iter().enumerate() {
                        let mut planned = plan.topk_ids(token, 1).unwrap();
                        planned.sort_unstable();
                        let mut ids = ids;
                        ids.sort_unstable();
                        assert_eq!(ids, planned);
                    }
                }
            }
            loads
        });
        for loads in &loads {
            assert_eq!(loads, &loads[..].to_vec());
            for (num_tokens, load) in loads {
                assert_eq!(load.slots_per_rank.len(), ep_size);
                assert_eq!(load.slots_per_rank.iter().sum::<u64>(), (num_tokens * top_k) as u64);
                assert!(spread(&load.slots_per_rank) <= 1, "{num_tokens} tokens, top {top_k}: {load:?}");
                assert!(spread(&load.slots_per_expert) <= 1, "{num_tokens} tokens, top {top_k}: {load:?}");
            }
        }
        assert!(loads.iter().all(|rank| rank == &loads[0]), "ranks disagree about the load");
    }
}

#[test]
fn perfect_routing_stays_balanced_when_a_sequence_continues_token_by_token() {
    let layer = Layer::new(10, 8, DType::F32);
    let (ep_size, top_k) = (4, 3);
    let loads = on_ranks(ep_size, |mut ranks| {
        let rank = ranks.rank();
        let router = layer.router(RoutingMethod::Default, top_k);
        let builder = layer.shard(router, ep_size, rank).perfect_router(true).statistics(true);
        let block = builder.build().unwrap();
        let mut spreads = Vec::new();
        // A prompt of five tokens, then one at a time.
        let mut first = 0;
        for num_tokens in std::iter::once(5).chain(std::iter::repeat_n(1, 40)) {
            let own = if rank == 0 { num_tokens } else { 0 };
            let step = Step::agree(&mut ranks, own).unwrap().starting_at(first);
            assert_eq!(step.first_token(), first);
            block.forward(&hidden_states(3, own, DType::F32), &mut ranks, &step).unwrap();
            first += num_tokens;
            spreads.push((first, block.load().unwrap()));
        }
        spreads
    });
    for (num_tokens, load) in &loads[0] {
        assert_eq!(load.slots_per_rank.iter().sum::<u64>(), (num_tokens * top_k) as u64);
        assert!(spread(&load.slots_per_rank) <= 1, "after {num_tokens} tokens: {load:?}");
    }
}

#[test]
fn perfect_routing_reports_the_gate_as_computed_and_leaves_the_selection_bias_alone() {
    let layer = Layer::new(11, 8, DType::BF16);
    let hidden = hidden_states(12, 9, DType::BF16);
    let bias = oracle::bits_of(&layer.selection_bias);
    let router = layer.router(RoutingMethod::MiniMax2, 2);
    // A bias that would win against any planned logit, if it were added.
    let strong = (Tensor::new(&[9f32, 8., 7., 6., 5., 4., 3., 2.], &Device::Cpu).unwrap() * 100.0).unwrap();
    let strong = Router::new(RoutingMethod::MiniMax2, 2).unwrap().with_selection_bias(&strong).unwrap();
    for router in [router, strong] {
        let build = |perfect| layer.shard(router.clone(), 1, 0).perfect_router(perfect).build().unwrap();
        let trace = |block: &MoeBlock| trace(block, &hidden).unwrap();
        let before = trace(&build(false));
        let perfect = trace(&build(true));
        let after = trace(&build(false));
        assert_eq!(oracle::bits_of(&perfect.router_logits), oracle::bits_of(&before.router_logits));
        let plan = Plan::new(8, 2, 1, 0).unwrap();
        for (token, ids) in perfect.routing.topk_ids.to_vec2::<u32>().unwrap().into_iter().enumerate() {
            let mut planned = plan.topk_ids(token, 1).unwrap();
            let mut ids = ids;
            planned.sort_unstable();
            ids.sort_unstable();
            assert_eq!(ids, planned, "the bias disturbed the plan");
        }
        assert_eq!(oracle::bits_of(&after.hidden), oracle::bits_of(&before.hidden));
        let ids = |output: &MoeOutput| output.routing.topk_ids.to_vec2::<u32>().unwrap();
        assert_eq!(ids(&after), ids(&before), "the bias was changed");
    }
    assert_eq!(oracle::bits_of(&layer.selection_bias), bias);
}

#[test]
fn perfect_routing_balances_ranks_of_different_lengths() {
    let layer = Layer::new(11, 7, DType::F32);
    for schedule in Schedule::ALL {
        let loads = on_ranks(3, |mut ranks| {
            let rank = ranks.rank();
            let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 3, rank).perfect_router(true);
            let config = PerfectRouterConfig { schedule, imbalance: None };
            let block = builder.perfect_router_config(config).statistics(true).build().unwrap();
            let step = Step::agree(&mut ranks, 3).unwrap();
            block.forward(&hidden_states(rank as u64, 3, DType::F32), &mut ranks, &step).unwrap();
            block.load().unwrap()
        });
        for load in loads {
            assert_eq!(load.slots_per_rank, [6, 6, 6], "{schedule}");
            // The slots of all senders are one sequence: experts of a rank are within one of each other.
            assert!(schedule != Schedule::GlobalSlot || spread(&load.slots_per_expert[..3]) <= 1, "{load:?}");
        }
    }
}

#[test]
fn perfect_routing_of_a_grouped_router_follows_the_grouped_plan() {
    let layer = Layer::new(12, 8, DType::F32);
    let groups = ExpertGroups { num_groups: 4, topk_group: 2 };
    let method = RoutingMethod::DeepSeekV3 { groups, routed_scaling_factor: 2.5 };
    let loads = on_ranks(4, |mut ranks| {
        let rank = ranks.rank();
        let block =
            layer.shard(layer.router(method, 2), 4, rank).perfect_router(true).statistics(true).build().unwrap();
        let step = Step::agree(&mut ranks, 4).unwrap();
        let hidden = hidden_states(rank as u64, 4, DType::F32);
        let ids = block.forward_traced(&hidden, &mut ranks, &step).unwrap().routing.topk_ids;
        let planned = Plan::new(8, 2, 4, rank).unwrap().with_groups(groups).unwrap().topk_ids(0, 4).unwrap();
        for (ids, planned) in ids.to_vec2::<u32>().unwrap().iter().zip(planned.chunks(2)) {
            assert!(planned.iter().all(|id| ids.contains(id)), "{ids:?}, not {planned:?}");
        }
        block.load().unwrap().slots_per_rank
    });
    assert_eq!(loads, vec![vec![8; 4]; 4]);
}

#[test]
fn a_hot_rank_of_the_perfect_router_receives_its_part() {
    let layer = Layer::new(13, 8, DType::F32);
    for (fraction, expected) in [(0.0, [10; 4]), (1.0, [0, 40, 0, 0])] {
        let imbalance = Some(Imbalance { hotspot: Hotspot::Rank(1), fraction, seed: 3 });
        let config = PerfectRouterConfig { imbalance, ..Default::default() };
        let loads = on_ranks(4, |mut ranks| {
            let rank = ranks.rank();
            let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 4, rank).statistics(true);
            let block = builder.perfect_router_config(config).perfect_router(true).build().unwrap();
            let step = Step::agree(&mut ranks, 5).unwrap();
            block.forward(&hidden_states(rank as u64, 5, DType::F32), &mut ranks, &step).unwrap();
            block.load().unwrap().slots_per_rank
        });
        assert_eq!(loads, vec![expected.to_vec(); 4]);
    }
    let imbalance = Some(Imbalance { hotspot: Hotspot::Rank(4), fraction: 0.5, seed: 3 });
    let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 4, 0);
    let builder = builder.perfect_router_config(PerfectRouterConfig { imbalance, ..Default::default() });
    let error = builder.build().unwrap_err().to_string();
    assert!(error.contains("hot rank is 4") && error.contains("less than 4"), "{error}");
}

// ---------------------------------------------------------------------------------------------
// Padding and shared experts

/// `num` experts that every token goes to.
pub(crate) fn shared_experts(seed: u64, num: usize, dtype: DType) -> Experts {
    let mut random = Random(seed);
    let mut weights = |rows: usize, columns: usize| {
        let values = random.units(num * rows * columns, 0.4);
        let tensor = oracle::floats(&values, &[num, rows, columns], dtype).0;
        ExpertProjection::new(ExpertWeights::dense(tensor).unwrap(), None).unwrap()
    };
    let (gate_up, down) = (weights(2 * 12, HIDDEN), weights(HIDDEN, 12));
    Experts::new(gate_up, down, GateUpRows::Concatenated, Activation::Silu).unwrap()
}

#[test]
fn shared_experts_add_what_they_make_of_every_token() {
    let layer = Layer::new(31, 8, DType::F32);
    let counts = [3, 0, 6];
    let hidden = hidden_states(32, 9, DType::F32);
    for num_shared in [1, 2] {
        let shared = shared_experts(33, num_shared, DType::F32);
        let routed = layer.shard(layer.router(RoutingMethod::Renormalize, 3), 1, 0).build().unwrap();
        let routed = oracle::rows_of(&routed.forward_alone(&hidden).unwrap());
        // Each shared expert for itself, as a layer that routes every token to its only expert with weight 1.
        let mut expected = vec![vec![0f32; HIDDEN]; 9];
        let ids: Vec<u32> = (0..9).flat_map(|_| 0..num_shared as u32).collect();
        let ids = Tensor::from_vec(ids, (9, num_shared), &Device::Cpu).unwrap();
        let order = ExpertOrder::new(&ids, num_shared, 0..num_shared).unwrap();
        let rows = oracle::rows_of(&shared.forward(&hidden, &order).unwrap());
        let places = order.slot_rank.to_vec1::<u32>().unwrap();
        for (slot, &place) in places.iter().enumerate() {
            expected[slot / num_shared].iter_mut().zip(&rows[place as usize]).for_each(|(sum, row)| *sum += row);
        }
        for (sum, routed) in expected.iter_mut().flatten().zip(routed.concat()) {
            *sum += routed;
        }
        for ep_size in [1, 3] {
            let counts = if ep_size == 1 { vec![9] } else { counts.to_vec() };
            let outputs = sharded(&hidden, &counts, |rank| {
                let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 3), ep_size, rank);
                builder.shared_experts(shared.clone()).build().unwrap()
            });
            let found: Vec<Vec<f32>> = outputs.iter().flat_map(|output| oracle::rows_of(&output.hidden)).collect();
            assert_eq!(found, expected, "{num_shared} shared, {ep_size} ranks");
        }
    }
}

#[test]
fn shared_experts_of_another_width_are_refused() {
    let layer = Layer::new(34, 4, DType::F32);
    let narrow = |rows, columns| {
        let weights = Tensor::zeros((1, rows, columns), DType::F32, &Device::Cpu).unwrap();
        ExpertProjection::new(ExpertWeights::dense(weights).unwrap(), None).unwrap()
    };
    let shared = Experts::new(narrow(8, 32), narrow(32, 4), GateUpRows::Concatenated, Activation::Silu).unwrap();
    let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 1, 0).shared_experts(shared);
    let error = builder.build().unwrap_err().to_string();
    assert!(error.contains("shared experts have hidden_size 32") && error.contains("33"), "{error}");
}

#[test]
fn padding_is_0_and_changes_no_other_token() {
    let layer = Layer::new(35, 8, DType::BF16);
    let counts = [5, 4, 6];
    let valid = [2usize, 0, 6];
    let clean = oracle::rows_of(&hidden_states(36, 15, DType::BF16));
    // Whatever stands in padding: NaN, infinities.
    let rows: Vec<Vec<f32>> = clean
        .into_iter()
        .enumerate()
        .map(|(i, row)| match i {
            2..=4 => vec![f32::NAN; HIDDEN],
            5..=8 => vec![f32::INFINITY; HIDDEN],
            _ => row,
        })
        .collect();
    let hidden = Tensor::new(rows, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    for perfect in [false, true] {
        for reduction in [Reduction::SlotOrder, Reduction::RankPartial] {
            let build = |rank| {
                let builder = layer.shard(layer.router(RoutingMethod::MiniMax2, 3), 3, rank).reduction(reduction);
                let shared = shared_experts(37, 1, DType::BF16);
                builder.shared_experts(shared).perfect_router(perfect).statistics(true).build().unwrap()
            };
            let rows = |rank: usize, num: usize| hidden.narrow(0, counts[..rank].iter().sum(), num).unwrap();
            let alone = on_ranks(3, |mut ranks| {
                let rank = ranks.rank();
                let step = Step::agree(&mut ranks, valid[rank]).unwrap();
                build(rank).forward(&rows(rank, valid[rank]), &mut ranks, &step).unwrap()
            });
            let padded = on_ranks(3, |mut ranks| {
                let rank = ranks.rank();
                let num_valid = Tensor::new(valid[rank] as u32, &Device::Cpu).unwrap();
                let step = Step::agree(&mut ranks, counts[rank]).unwrap().with_valid_tokens(&num_valid);
                let block = build(rank);
                let output = block.forward_traced(&rows(rank, counts[rank]), &mut ranks, &step).unwrap();
                assert_eq!(block.load().unwrap().slots_per_rank.iter().sum::<u64>(), 3 * 8, "padding was counted");
                assert_eq!(output.router_logits.dims(), [counts[rank], 8]);
                output.hidden
            });
            for rank in 0..3 {
                let (alone, padded) = (oracle::bits_of(&alone[rank]), oracle::bits_of(&padded[rank]));
                assert_eq!(padded[..valid[rank] * HIDDEN], alone, "perfect {perfect}, {reduction:?}, rank {rank}");
                assert!(padded[valid[rank] * HIDDEN..].iter().all(|bits| *bits == 0));
            }
        }
    }
}

#[test]
fn the_router_dtype_is_that_of_the_logits_and_not_of_the_output() {
    let layer = Layer::new(38, 8, DType::BF16);
    let hidden = hidden_states(39, 7, DType::BF16);
    let trace = |builder: MoeBlockBuilder| trace(&builder.build().unwrap(), &hidden).unwrap();
    let builder = || layer.shard(layer.router(RoutingMethod::DeepSeekV4 { routed_scaling_factor: 1.0 }, 2), 1, 0);
    let (rounded, exact) = (trace(builder()), trace(builder().router_dtype(DType::F32)));
    assert_eq!((exact.router_logits.dtype(), exact.hidden.dtype()), (DType::F32, DType::BF16));
    assert_eq!(rounded.router_logits.dtype(), DType::BF16);
    let again = exact.router_logits.to_dtype(DType::BF16).unwrap();
    assert_eq!(oracle::bits_of(&again), oracle::bits_of(&rounded.router_logits));
    assert_ne!(oracle::bits_of(&exact.router_logits), oracle::bits_of(&rounded.router_logits));
    let error = builder().router_dtype(DType::U8).build().unwrap_err().to_string();
    assert!(error.contains("router_dtype is U8") && error.contains("f32, bf16 or f16"), "{error}");
}

// ---------------------------------------------------------------------------------------------
// Statistics

#[test]
fn the_load_equals_a_naive_count_over_all_ranks_and_calls() {
    for (num_experts, ep_size) in [(8, 4), (7, 3), (8, 1)] {
        let layer = Layer::new(13, num_experts, DType::F32);
        let counts: Vec<usize> = (0..ep_size).map(|rank| [4, 0, 7, 1][rank]).collect();
        let per_rank = on_ranks(ep_size, |mut ranks| {
            let rank = ranks.rank();
            let router = layer.router(RoutingMethod::Llama4, 3);
            let block = layer.shard(router, ep_size, rank).statistics(true).build().unwrap();
            let mut ids = Vec::new();
            for call in 0..3u64 {
                let step = Step::agree(&mut ranks, counts[rank]).unwrap();
                let hidden = hidden_states(100 * call + rank as u64, counts[rank], DType::F32);
                let output = block.forward_traced(&hidden, &mut ranks, &step).unwrap();
                ids.extend(output.routing.topk_ids.flatten_all().unwrap().to_vec1::<u32>().unwrap());
            }
            let load = block.load().unwrap();
            block.reset_load().unwrap();
            assert!(block.load().unwrap().slots_per_expert.iter().all(|&count| count == 0));
            (ids, load)
        });
        let ids: Vec<u32> = per_rank.iter().flat_map(|(ids, _)| ids.clone()).collect();
        let per_expert: Vec<u64> =
            (0..num_experts as u32).map(|e| ids.iter().filter(|&&id| id == e).count() as u64).collect();
        for (_, load) in &per_rank {
            assert_eq!(load.slots_per_expert, per_expert);
            let of_rank = |rank| Topology::new(num_experts, ep_size, rank).unwrap().local_experts();
            let expected: Vec<u64> = (0..ep_size).map(|rank| per_expert[of_rank(rank)].iter().sum()).collect();
            assert_eq!(load.slots_per_rank, expected);
        }
    }
}

#[test]
fn the_load_of_a_block_without_statistics_is_an_error() {
    let layer = Layer::new(13, 8, DType::F32);
    let block = layer.shard(layer.router(RoutingMethod::Default, 1), 1, 0).build().unwrap();
    block.reset_load().unwrap();
    let error = block.load().unwrap_err().to_string();
    assert!(error.contains("moe block") && error.contains("statistics"), "{error}");
}

// ---------------------------------------------------------------------------------------------
// One rank on CUDA, beside the CPU

/// How far apart the outputs of devices may be, in parts of the largest. The sums are float32 in another order; what is
/// rounded to the dtype between the projections, and at the end, may then fall to the next number.
pub(crate) fn apart(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 4e-6,
        DType::F16 => 2f32.powi(-10),
        _ => 2f32.powi(-7),
    }
}

#[track_caller]
pub(crate) fn assert_close(found: &Tensor, expected: &Tensor, context: &str) {
    assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()), "{context}");
    let values = |t: &Tensor| oracle::rows_of(&to_host(t)).concat();
    let (found, dtype, expected) = (values(found), found.dtype(), values(expected));
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let off = (found - expected).abs();
        assert!(off <= apart(dtype) * largest, "{context}: {i} is {found}, not {expected}; the largest is {largest}");
    }
}

/// A block of float32 logits, so that devices choose the same experts, which has everything.
fn full_block(layer: &Layer, dtype: DType, num_shared: usize, perfect: bool) -> MoeBlock {
    let builder = layer.shard(layer.router(RoutingMethod::MiniMax2, 3), 1, 0).router_dtype(DType::F32);
    let builder = builder.perfect_router(perfect).statistics(true);
    match num_shared {
        0 => builder.build().unwrap(),
        _ => builder.shared_experts(shared_experts(41, num_shared, dtype)).build().unwrap(),
    }
}

#[test]
fn cuda_gives_the_outputs_and_the_load_of_the_cpu_and_repeats_bit_for_bit() {
    let Some(device) = devices::cuda() else { return };
    for dtype in FLOATS {
        let layer = Layer::new(40, 8, dtype);
        for (num_tokens, valid) in [(1, None), (9, None), (9, Some(5)), (9, Some(0)), (70, None), (70, Some(70))] {
            let hidden = hidden_states(42, num_tokens, dtype);
            let there = hidden.to_device(device).unwrap();
            for (perfect, num_shared) in [(false, 0), (false, 2), (true, 0), (true, 1)] {
                let context = format!("{dtype:?}, {valid:?} of {num_tokens}, perfect {perfect}, {num_shared} shared");
                let cpu = full_block(&layer, dtype, num_shared, perfect);
                let cuda = cpu.to_device(device).unwrap();
                assert_eq!((cuda.device().location(), cuda.is_perfect()), (device.location(), perfect));
                let expected = trace_padded(&cpu, &hidden, valid).unwrap();
                let found = trace_padded(&cuda, &there, valid).unwrap();
                assert_close(&found.router_logits, &expected.router_logits, &context);
                let ids = |output: &MoeOutput| output.routing.topk_ids.to_vec2::<u32>().unwrap();
                assert_eq!(ids(&found), ids(&expected), "{context}");
                assert_close(&found.routing.topk_weights, &expected.routing.topk_weights, &context);
                assert_close(&found.hidden, &expected.hidden, &context);
                let bits = |output: &MoeOutput| oracle::bits_of(&to_host(&output.hidden));
                let padding = &bits(&found)[valid.unwrap_or(num_tokens) * HIDDEN..];
                assert!(padding.iter().all(|&bits| bits == 0), "{context}: padding is not 0");
                assert_eq!(cuda.load().unwrap(), cpu.load().unwrap(), "{context}");
                assert_eq!(bits(&trace_padded(&cuda, &there, valid).unwrap()), bits(&found), "{context}");
                trace_padded(&cpu, &hidden, valid).unwrap();
                assert_eq!(cuda.load().unwrap(), cpu.load().unwrap(), "{context}: twice");
                cuda.reset_load().unwrap();
                assert!(cuda.load().unwrap().slots_per_expert.iter().all(|&slots| slots == 0), "{context}");
            }
        }
    }
}

#[test]
fn zero_tokens_give_empty_results_on_every_device() {
    for device in devices::all() {
        for dtype in FLOATS {
            for (perfect, num_shared) in [(false, 0), (true, 1)] {
                let block = full_block(&Layer::new(43, 8, dtype), dtype, num_shared, perfect);
                let block = block.to_device(&device).unwrap();
                // Nothing of no elements can be allocated on CUDA.
                let hidden = hidden_states(44, 1, dtype).to_device(&device).unwrap().narrow(0, 0, 0).unwrap();
                for valid in [None, Some(0), Some(3)] {
                    let output = trace_padded(&block, &hidden, valid).unwrap();
                    assert_eq!((output.hidden.dims(), output.hidden.dtype()), (&[0, HIDDEN][..], dtype));
                    let logits = &output.router_logits;
                    assert_eq!((logits.dims(), logits.dtype()), (&[0, 8][..], DType::F32));
                    assert_eq!(output.routing.topk_ids.dims(), [0, 3]);
                }
                assert_eq!(block.load().unwrap().slots_per_rank, [0]);
            }
        }
    }
}

#[test]
fn hidden_states_that_do_not_fit_are_refused_with_the_same_words_on_every_device() {
    let layer = Layer::new(45, 8, DType::F32);
    let cpu = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 1, 0).build().unwrap();
    for (shape, dtype, word) in [
        (&[3, HIDDEN + 1][..], DType::F32, "[3, 34]"),
        (&[HIDDEN], DType::F32, "[33]"),
        (&[1, 2, HIDDEN], DType::F32, "[1, 2, 33]"),
        (&[2, HIDDEN], DType::F64, "F64"),
        (&[2, HIDDEN], DType::U8, "U8"),
    ] {
        let errors = devices::all().map(|device| {
            let block = cpu.to_device(&device).unwrap();
            let hidden = Tensor::zeros(shape, dtype, &device).unwrap();
            let mut solo = Solo::new();
            let step = Step::agree(&mut solo, shape[0]).unwrap();
            let error = line(block.forward(&hidden, &mut solo, &step).unwrap_err());
            // The group was given up.
            let good = hidden_states(46, shape[0], DType::F32).to_device(&device).unwrap();
            let after = line(block.forward(&good, &mut solo, &step).unwrap_err());
            assert!(after.contains(&error), "{after}");
            error
        });
        let errors: Vec<_> = errors.collect();
        assert!(errors[0].contains("hidden") && errors[0].contains(word), "{errors:?}");
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    }
}

#[test]
fn parts_and_hidden_states_on_different_devices_are_refused() {
    let Some(device) = devices::cuda() else { return };
    let layer = Layer::new(47, 8, DType::F32);
    let builder = |ep_size| layer.shard(layer.router(RoutingMethod::Renormalize, 2), ep_size, 0);
    let cpu = builder(1).build().unwrap();
    let cuda = cpu.to_device(device).unwrap();
    let hidden = hidden_states(48, 2, DType::F32);
    let error = line(cuda.forward_alone(&hidden).unwrap_err());
    assert!(error.contains("moe block: hidden is on Cpu, expected the device of the experts, Cuda"), "{error}");
    let error = line(cpu.forward_alone(&hidden.to_device(device).unwrap()).unwrap_err());
    assert!(error.contains("moe block: hidden is on Cuda") && error.contains("experts, Cpu"), "{error}");

    let gate = Linear::new(layer.gate.0.clone(), None).unwrap();
    let router = layer.router(RoutingMethod::Renormalize, 2);
    let mixed = MoeBlock::builder(gate.clone(), router.clone(), cuda.experts().clone());
    let error = line(mixed.build().unwrap_err());
    assert!(error.contains("the gate is on Cpu, expected the device of the experts, Cuda"), "{error}");
    let mixed = MoeBlock::builder(gate, router, cpu.experts().clone());
    let shared = shared_experts(49, 1, DType::F32).to_device(device).unwrap();
    let error = line(mixed.shared_experts(shared).build().unwrap_err());
    assert!(error.contains("the shared experts are on Cuda") && error.contains("experts, Cpu"), "{error}");
}

#[test]
fn a_block_that_was_built_from_parts_on_a_device_is_the_one_that_was_brought_there() {
    let layer = Layer::new(50, 8, DType::BF16);
    let cpu = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 1, 0).build().unwrap();
    let hidden = hidden_states(51, 6, DType::BF16);
    for device in devices::all() {
        let gate = Linear::new(layer.gate.0.clone(), Some(layer.gate.1.clone())).unwrap().to_device(&device).unwrap();
        let experts = cpu.experts().to_device(&device).unwrap();
        let built = MoeBlock::builder(gate, layer.router(RoutingMethod::Renormalize, 2), experts).build().unwrap();
        let hidden = hidden.to_device(&device).unwrap();
        let bits = |block: &MoeBlock| oracle::bits_of(&to_host(&block.forward_alone(&hidden).unwrap()));
        assert_eq!(bits(&built), bits(&cpu.to_device(&device).unwrap()));
    }
}
