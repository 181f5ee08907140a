//! Strategies, reductions and placements against one rank and the float64 oracle; what travels; how they are chosen; and the
//! fingerprints that find a rank of other settings.

use crate::block::{HIDDEN, Layer, hidden_states, on_ranks, shared_experts, spread};
use crate::devices::line;
use crate::oracle::{self, Random};
use candle_core::{DType, Device, Tensor};
use candle_moe::block::{MoeBlock, MoeBlockBuilder, MoeOutput};
use candle_moe::ep::{
    AbortHandle, Communicator, EpError, Fingerprint, Health, Placement, Problem, Reduction, Step, Strategy, Threads,
};
use candle_moe::experts::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, Linear, weighted_sum};
use candle_moe::order::ExpertOrder;
use candle_moe::perfect_router::{Hotspot, Imbalance, PerfectRouterConfig, Schedule};
use candle_moe::routing::{Router, Routing, RoutingMethod};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::time::Duration;

const SENDING: [Strategy; 3] = [Strategy::Replicated, Strategy::Gather, Strategy::Exchange];

/// A communicator that keeps the calls of its rank: name, rows that it gave, and the last dimension.
struct Recorded {
    ranks: Threads,
    calls: Vec<(&'static str, usize, usize)>,
}

impl Recorded {
    fn note(&mut self, name: &'static str, rows: &Tensor) {
        self.calls.push((name, rows.dims()[0], rows.dims().last().copied().unwrap_or(0)));
    }
}

type Outcome<T> = Result<T, EpError>;

impl Communicator for Recorded {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }
    fn world_size(&self) -> usize {
        self.ranks.world_size()
    }
    fn set_label(&mut self, label: &str) {
        self.ranks.set_label(label);
    }
    fn deadline(&self) -> Duration {
        self.ranks.deadline()
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.ranks.set_deadline(deadline);
    }
    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Outcome<Tensor> {
        self.note("all_gather", rows);
        self.ranks.all_gather(rows, counts)
    }
    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Outcome<Tensor> {
        self.note("reduce_scatter", rows);
        self.ranks.reduce_scatter(rows, counts)
    }
    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Outcome<(Tensor, Vec<usize>)> {
        self.note("all_to_all", rows);
        self.ranks.all_to_all(rows, send_counts)
    }
    fn all_reduce(&mut self, values: &Tensor) -> Outcome<Tensor> {
        self.note("all_reduce", values);
        self.ranks.all_reduce(values)
    }
    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Outcome<Vec<Vec<u8>>> {
        self.calls.push(("all_gather_bytes", 1, bytes.len()));
        self.ranks.all_gather_bytes(bytes)
    }
    fn barrier(&mut self) -> Outcome<()> {
        self.calls.push(("barrier", 0, 0));
        self.ranks.barrier()
    }
    fn abort_handle(&self) -> AbortHandle {
        self.ranks.abort_handle()
    }
    fn health(&self) -> Health {
        self.ranks.health()
    }
}

/// Every expert somewhere, replicas anywhere, any number of experts on a rank.
fn random_placement(random: &mut Random, num_experts: usize, ep_size: usize) -> Placement {
    let mut ranks = vec![Vec::new(); ep_size];
    for expert in random.distinct(num_experts, num_experts) {
        ranks[random.below(ep_size)].push(expert as usize);
    }
    for experts in &mut ranks {
        let extra = usize::from(experts.is_empty()) + [0, 0, 1, 3][random.below(4)];
        experts.extend((0..extra).map(|_| random.below(num_experts)));
    }
    Placement::explicit(num_experts, &ranks).unwrap()
}

/// A group: its layer, who holds what, and the tokens of each rank.
struct Group<'a> {
    layer: &'a Layer,
    router: Router,
    placement: Placement,
    counts: Vec<usize>,
    /// Of all ranks, in rank order.
    hidden: Tensor,
}

impl Group<'_> {
    fn builder(&self, strategy: Strategy, reduction: Reduction, rank: usize) -> MoeBlockBuilder {
        let builder = self.layer.placed(self.router.clone(), &self.placement, rank);
        builder.strategy(strategy).reduction(reduction).replicated_tokens(strategy == Strategy::Replicated)
    }

    fn own(&self, rank: usize) -> Tensor {
        self.hidden.narrow(0, self.counts[..rank].iter().sum(), self.counts[rank]).unwrap()
    }

    /// What every rank gets: of its own tokens, or of all tokens where all ranks hold them.
    fn run(&self, strategy: Strategy, reduction: Reduction) -> Vec<MoeOutput> {
        on_ranks(self.placement.ep_size(), |mut ranks| {
            let rank = ranks.rank();
            let hidden = if strategy == Strategy::Replicated { self.hidden.clone() } else { self.own(rank) };
            let step = Step::agree(&mut ranks, hidden.dims()[0]).unwrap();
            let block = self.builder(strategy, reduction, rank).build().unwrap();
            assert_eq!(block.strategy().strategy(), strategy);
            block.forward_traced(&hidden, &mut ranks, &step).unwrap()
        })
    }

    /// The bits of the outputs of all tokens.
    #[track_caller]
    fn bits(&self, strategy: Strategy, outputs: &[MoeOutput]) -> Vec<u32> {
        let bits: Vec<Vec<u32>> = outputs.iter().map(|output| oracle::bits_of(&output.hidden)).collect();
        if strategy != Strategy::Replicated {
            return bits.concat();
        }
        assert!(bits.iter().all(|rank| *rank == bits[0]), "ranks disagree");
        bits[0].clone()
    }
}

/// Those of the host.
fn strategies(ep_size: usize) -> impl Iterator<Item = Strategy> {
    let is_possible = move |strategy: &Strategy| match strategy {
        Strategy::Solo => ep_size == 1,
        Strategy::Peer => false,
        _ => true,
    };
    Strategy::ALL.into_iter().filter(is_possible)
}

fn random_counts(random: &mut Random, ep_size: usize) -> Vec<usize> {
    (0..ep_size).map(|_| if random.below(3) == 0 { 0 } else { random.below(7) }).collect()
}

// ---------------------------------------------------------------------------------------------
// Results

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn every_strategy_reduction_and_placement_gives_the_result_of_one_rank(
        seed in any::<u64>(), ep_size in 1usize..17, num_experts in 1usize..24, top_k in 1usize..9, dtype in 0usize..3
    ) {
        let (mut random, dtype, top_k) = (Random(seed), oracle::FLOATS[dtype], top_k.min(num_experts));
        let layer = Layer::new(random.next(), num_experts, dtype);
        let method = [RoutingMethod::Renormalize, RoutingMethod::MiniMax2][random.below(2)];
        let counts = random_counts(&mut random, ep_size);
        let group = Group {
            layer: &layer,
            router: layer.router(method, top_k),
            placement: random_placement(&mut random, num_experts, ep_size),
            hidden: hidden_states(random.next(), counts.iter().sum(), dtype),
            counts,
        };
        let alone = layer.shard(group.router.clone(), 1, 0).build().unwrap().forward_alone(&group.hidden).unwrap();
        let alone = oracle::bits_of(&alone);
        let mut partial: Option<Vec<u32>> = None;
        for strategy in strategies(ep_size) {
            let outputs = group.run(strategy, Reduction::SlotOrder);
            prop_assert_eq!(&group.bits(strategy, &outputs), &alone, "{} of {}", strategy, &group.placement);

            // Partial sums are those of the placement, whatever the strategy; the oracle has room for their order.
            let outputs = group.run(strategy, Reduction::RankPartial);
            let bits = group.bits(strategy, &outputs);
            prop_assert_eq!(&bits, partial.get_or_insert(bits.clone()), "{} of {}", strategy, &group.placement);
            for (rank, output) in outputs.iter().enumerate() {
                let hidden = if strategy == Strategy::Replicated { group.hidden.clone() } else { group.own(rank) };
                prop_assert_eq!((output.hidden.dims(), output.hidden.dtype()), (hidden.dims(), dtype));
                layer.assert_output(&hidden, output, method, dtype);
            }
        }
    }
}

#[test]
fn partial_sums_repeat_bit_for_bit_and_are_within_their_bound_of_slot_order() {
    let mut random = Random(5);
    let layer = Layer::new(6, 12, DType::F32);
    for ep_size in [2, 5, 16] {
        let counts = random_counts(&mut random, ep_size);
        let group = Group {
            layer: &layer,
            router: layer.router(RoutingMethod::Renormalize, 5),
            placement: random_placement(&mut random, 12, ep_size),
            hidden: hidden_states(random.next(), counts.iter().sum(), DType::F32),
            counts,
        };
        let alone = layer.shard(group.router.clone(), 1, 0).build().unwrap();
        let expected = oracle::rows_of(&alone.forward_alone(&group.hidden).unwrap()).concat();
        let logits = layer.logits(&group.hidden);
        let Routing { topk_ids, topk_weights } = group.router.route(&logits).unwrap();
        let order = ExpertOrder::new(&topk_ids, 12, 0..12).unwrap();
        let magnitudes = alone.experts().forward(&group.hidden, &order).unwrap().abs().unwrap();
        let magnitudes = oracle::rows_of(&weighted_sum(&magnitudes, &topk_weights, &order).unwrap()).concat();
        for strategy in SENDING {
            let run = || group.bits(strategy, &group.run(strategy, Reduction::RankPartial));
            let first = run();
            assert_eq!(first, run(), "{strategy}: another run, other bits");
            for ((bits, expected), magnitude) in first.iter().zip(&expected).zip(&magnitudes) {
                let off = (f32::from_bits(*bits) - expected).abs();
                assert!(off <= 5.0 * f32::EPSILON * magnitude, "{strategy}: {off} from {expected}");
            }
        }
    }
}

#[test]
fn padding_goes_nowhere_is_0_and_changes_no_other_token() {
    let layer = Layer::new(35, 9, DType::BF16);
    let placement = Placement::explicit(9, &[vec![8, 1, 2], vec![0, 3, 4, 8], vec![5, 6, 7, 1]]).unwrap();
    let counts = vec![5, 4, 6];
    let valid = [2usize, 0, 6];
    for strategy in SENDING {
        // Where all ranks hold all tokens, they hold the same padding.
        let all = strategy == Strategy::Replicated;
        let (counts, valid) = if all { (vec![6; 3], [4; 3]) } else { (counts.clone(), valid) };
        let clean = oracle::rows_of(&hidden_states(36, counts.iter().sum(), DType::BF16));
        let is_padding = |i: usize| {
            let rank = (0..3).find(|&rank| i < counts[..=rank].iter().sum()).unwrap();
            i - counts[..rank].iter().sum::<usize>() >= valid[rank]
        };
        let rows = clean.into_iter().enumerate();
        let rows: Vec<_> = rows.map(|(i, row)| if is_padding(i) { vec![f32::NAN; HIDDEN] } else { row }).collect();
        let hidden = Tensor::new(rows, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let rows = |rank: usize, num: usize| {
            let first = if all { 0 } else { counts[..rank].iter().sum() };
            hidden.narrow(0, first, num).unwrap()
        };
        for reduction in Reduction::ALL {
            let block = |rank: usize| {
                let builder = layer.placed(layer.router(RoutingMethod::MiniMax2, 3), &placement, rank);
                let builder = builder.shared_experts(shared_experts(37, 1, DType::BF16)).statistics(true);
                builder.strategy(strategy).reduction(reduction).replicated_tokens(all).build().unwrap()
            };
            let alone = on_ranks(3, |mut ranks| {
                let rank = ranks.rank();
                let step = Step::agree(&mut ranks, valid[rank]).unwrap();
                block(rank).forward(&rows(rank, valid[rank]), &mut ranks, &step).unwrap()
            });
            let padded = on_ranks(3, |ranks| {
                let mut ranks = Recorded { ranks, calls: Vec::new() };
                let rank = ranks.rank();
                let num_valid = Tensor::new(valid[rank] as u32, &Device::Cpu).unwrap();
                let step = Step::agree(&mut ranks, counts[rank]).unwrap().with_valid_tokens(&num_valid);
                let block = block(rank);
                let output = block.forward(&rows(rank, counts[rank]), &mut ranks, &step).unwrap();
                let slots: u64 = block.load().unwrap().slots_per_rank.iter().sum();
                let tokens = if all { 4 } else { 8 };
                assert_eq!(slots, 3 * tokens, "{strategy}: padding was counted");
                let sent = ranks.calls.iter().find(|call| call.0 == "all_to_all").map_or(0, |call| call.1);
                assert!(strategy != Strategy::Exchange || valid[rank] > 0 || sent == 0, "padding was sent");
                output
            });
            for rank in 0..3 {
                let (alone, padded) = (oracle::bits_of(&alone[rank]), oracle::bits_of(&padded[rank]));
                // Other tokens are other replicas' turns, which does not show in slot order.
                if reduction == Reduction::SlotOrder {
                    assert_eq!(padded[..valid[rank] * HIDDEN], alone, "{strategy}, rank {rank}");
                }
                assert!(padded[valid[rank] * HIDDEN..].iter().all(|bits| *bits == 0), "{strategy}, rank {rank}");
                assert!(padded.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{strategy}, rank {rank}");
            }
        }
    }
}

#[test]
fn perfect_routing_is_even_with_every_strategy_and_placement() {
    let mut random = Random(51);
    let layer = Layer::new(10, 8, DType::F32);
    let random_placement = random_placement(&mut random, 8, 5);
    for placement in [Placement::contiguous(8, 5).unwrap(), random_placement] {
        for strategy in SENDING {
            let all = strategy == Strategy::Replicated;
            let counts = if all { [7; 5] } else { [3, 0, 4, 1, 5] };
            let loads = on_ranks(5, |mut ranks| {
                let rank = ranks.rank();
                let builder = layer.placed(layer.router(RoutingMethod::MiniMax2, 3), &placement, rank);
                let config = PerfectRouterConfig { schedule: Schedule::GlobalSlot, imbalance: None };
                let builder = builder.perfect_router(true).perfect_router_config(config).statistics(true);
                let block = builder.strategy(strategy).replicated_tokens(all).build().unwrap();
                let step = Step::agree(&mut ranks, counts[rank]).unwrap();
                let hidden = hidden_states(if all { 1 } else { rank as u64 }, counts[rank], DType::F32);
                let output = block.forward(&hidden, &mut ranks, &step).unwrap();
                (block.load().unwrap(), oracle::bits_of(&output))
            });
            let tokens = if all { 7 } else { 13 };
            for (load, bits) in &loads {
                assert_eq!(load.slots_per_rank.iter().sum::<u64>(), 3 * tokens, "{strategy}");
                assert_eq!(load.slots_per_expert.iter().sum::<u64>(), 3 * tokens, "{strategy}");
                assert!(spread(&load.slots_per_rank) <= 1, "{strategy}, {placement}: {load:?}");
                assert_eq!(load, &loads[0].0, "{strategy}: ranks disagree about the load");
                assert!(!all || *bits == loads[0].1, "ranks route the same tokens differently");
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// What travels

#[test]
fn an_exchange_sends_a_token_once_to_each_rank_and_nothing_asks_the_host() {
    let layer = Layer::new(61, 12, DType::F32);
    let mut random = Random(62);
    for ep_size in [2, 4, 9] {
        let placement = random_placement(&mut random, 12, ep_size);
        let map = placement.map().unwrap();
        let counts = random_counts(&mut random, ep_size);
        let calls = |strategy: Strategy, reduction: Reduction| {
            on_ranks(ep_size, |mut ranks| {
                let rank = ranks.rank();
                let counts = if strategy == Strategy::Replicated { &vec![6; ep_size] } else { &counts };
                let step = Step::agree(&mut ranks, counts[rank]).unwrap();
                let mut ranks = Recorded { ranks, calls: Vec::new() };
                let builder = layer.placed(layer.router(RoutingMethod::Renormalize, 4), &placement, rank);
                let builder = builder.strategy(strategy).reduction(reduction);
                let block = builder.replicated_tokens(strategy == Strategy::Replicated).build().unwrap();
                let hidden = hidden_states(rank as u64, counts[rank], DType::F32);
                let hidden = if strategy == Strategy::Replicated { hidden_states(9, 6, DType::F32) } else { hidden };
                let output = block.forward_traced(&hidden, &mut ranks, &step).unwrap();
                (ranks.calls, output.routing.topk_ids)
            })
        };
        for (rank, (calls, topk_ids)) in calls(Strategy::Exchange, Reduction::SlotOrder).into_iter().enumerate() {
            let turn = counts[..rank].iter().sum::<usize>() as u32;
            let physical = map.clone().with_turn(turn).physical_ids(&topk_ids).unwrap().to_vec2::<u32>().unwrap();
            let ranks_of = |ids: &Vec<u32>| -> BTreeSet<usize> {
                ids.iter().map(|&id| placement.owner(id as usize).unwrap()).collect()
            };
            let tokens: usize = physical.iter().map(|ids| ranks_of(ids).len()).sum();
            assert_eq!(calls[..2], [("all_to_all", tokens, HIDDEN), ("all_to_all", tokens, 4)]);
            assert_eq!((calls.len(), calls[2].0), (3, "all_to_all"));
        }
        let names = |strategy, reduction| -> Vec<Vec<&str>> {
            let of_rank = |(calls, _): (Vec<(&'static str, usize, usize)>, Tensor)| calls.iter().map(|c| c.0).collect();
            calls(strategy, reduction).into_iter().map(of_rank).collect()
        };
        let (gather, all, scatter) = ("all_gather", "all_to_all", "reduce_scatter");
        for (strategy, reduction, expected) in [
            (Strategy::Replicated, Reduction::SlotOrder, vec![gather]),
            (Strategy::Replicated, Reduction::RankPartial, vec!["all_reduce"]),
            (Strategy::Gather, Reduction::SlotOrder, vec![gather, gather, all]),
            (Strategy::Gather, Reduction::RankPartial, vec![gather, gather, gather, scatter]),
            (Strategy::Exchange, Reduction::RankPartial, vec![all, all, all, all]),
        ] {
            assert_eq!(names(strategy, reduction), vec![expected; ep_size], "{strategy}, {reduction}");
        }
    }
}

#[test]
fn the_load_is_that_of_all_ranks_with_every_strategy_and_counts_replicas_where_they_are() {
    let layer = Layer::new(63, 6, DType::F32);
    let placement = Placement::explicit(6, &[vec![0, 1, 5], vec![2, 3, 5, 4], vec![5]]).unwrap();
    for strategy in SENDING {
        let all = strategy == Strategy::Replicated;
        let counts = if all { [8; 3] } else { [5, 0, 7] };
        let per_rank = on_ranks(3, |mut ranks| {
            let rank = ranks.rank();
            let builder = layer.placed(layer.router(RoutingMethod::Renormalize, 3), &placement, rank);
            let block = builder.strategy(strategy).replicated_tokens(all).statistics(true).build().unwrap();
            let step = Step::agree(&mut ranks, counts[rank]).unwrap();
            let hidden = hidden_states(if all { 3 } else { rank as u64 }, counts[rank], DType::F32);
            let ids = block.forward_traced(&hidden, &mut ranks, &step).unwrap().routing.topk_ids;
            (ids.to_vec2::<u32>().unwrap(), block.load().unwrap())
        });
        let mut per_expert = vec![0; 6];
        let mut slots_per_rank = vec![0; 3];
        let senders = if all { &per_rank[..1] } else { &per_rank[..] };
        for (token, ids) in senders.iter().flat_map(|(ids, _)| ids).enumerate() {
            for &id in ids {
                per_expert[id as usize] += 1;
                slots_per_rank[[0, 0, 1, 1, 1, token % 3][id as usize]] += 1;
            }
        }
        for (_, load) in &per_rank {
            assert_eq!((&load.slots_per_expert, &load.slots_per_rank), (&per_expert, &slots_per_rank), "{strategy}");
        }
    }
}

#[test]
fn replicas_take_turns_when_a_sequence_continues_token_by_token() {
    let layer = Layer::new(64, 2, DType::F32);
    // Every token goes to both experts; each has a replica on each of two of the ranks.
    let placement = Placement::explicit(2, &[[0], [1], [0], [1]]).unwrap();
    for strategy in SENDING {
        let loads = on_ranks(4, |mut ranks| {
            let builder = layer.placed(layer.router(RoutingMethod::Renormalize, 2), &placement, ranks.rank());
            let all = strategy == Strategy::Replicated;
            let block = builder.strategy(strategy).replicated_tokens(all).statistics(true).build().unwrap();
            for first in 0..10 {
                let own = usize::from(all || ranks.rank() == 0);
                let step = Step::agree(&mut ranks, own).unwrap().starting_at(first);
                block.forward(&hidden_states(first as u64, own, DType::F32), &mut ranks, &step).unwrap();
            }
            block.load().unwrap().slots_per_rank
        });
        assert_eq!(loads, vec![vec![5; 4]; 4], "{strategy}");
    }
}

// ---------------------------------------------------------------------------------------------
// The choice

fn problem(ep_size: usize, top_k: usize, replicated_tokens: bool) -> Problem {
    Problem { ep_size, top_k, reduction: Reduction::SlotOrder, replicated_tokens, peer_access: false }
}

#[test]
fn the_best_strategy_follows_from_the_problem() {
    for (ep_size, top_k, replicated_tokens, expected) in [
        (1, 4, false, Strategy::Solo),
        (1, 4, true, Strategy::Solo),
        (2, 4, false, Strategy::Gather),
        (4, 4, false, Strategy::Gather),
        (5, 4, false, Strategy::Exchange),
        (2, 1, false, Strategy::Exchange),
        (16, 8, false, Strategy::Exchange),
        (2, 4, true, Strategy::Replicated),
        (16, 8, true, Strategy::Replicated),
    ] {
        for reduction in Reduction::ALL {
            let problem = Problem { reduction, ..problem(ep_size, top_k, replicated_tokens) };
            let choice = problem.choose(None).unwrap();
            assert_eq!(choice.strategy(), expected, "{problem:?}");
            assert_eq!(choice, problem.choose(None).unwrap());
            let rejected: Vec<Strategy> = choice.rejected().iter().map(|(strategy, _)| *strategy).collect();
            assert_eq!(rejected, Strategy::ALL.into_iter().filter(|&s| s != expected).collect::<Vec<_>>());
            let text = choice.to_string();
            assert!(text.starts_with(&format!("{expected}, since ")), "{text}");
            for (strategy, reason) in choice.rejected() {
                assert!(text.contains(&format!("; not {strategy}, {reason}")) && reason.len() > 10, "{text}");
            }
            // Where devices reach each other's memory nothing goes another way, if there is anything to send.
            let choice = Problem { peer_access: true, ..problem }.choose(None).unwrap();
            let expected = match expected {
                Strategy::Gather | Strategy::Exchange => Strategy::Peer,
                other => other,
            };
            assert_eq!(choice.strategy(), expected, "{choice}");
        }
    }
}

#[test]
fn a_forced_strategy_is_taken_or_is_an_error() {
    for (ep_size, replicated_tokens, possible) in [
        (1, false, &[Strategy::Solo, Strategy::Replicated, Strategy::Gather, Strategy::Exchange][..]),
        (4, false, &[Strategy::Gather, Strategy::Exchange]),
        (4, true, &[Strategy::Replicated, Strategy::Gather, Strategy::Exchange]),
    ] {
        for strategy in Strategy::ALL {
            let outcome = problem(ep_size, 2, replicated_tokens).choose(Some(strategy));
            match possible.contains(&strategy) {
                true => {
                    let choice = outcome.unwrap();
                    assert_eq!((choice.strategy(), choice.reason()), (strategy, "since it was asked for"));
                }
                false => {
                    let error = outcome.unwrap_err().to_string();
                    assert!(error.starts_with(&format!("strategy: {strategy} was asked for, which ")), "{error}");
                }
            }
        }
    }
    let among_peers = |ep_size, replicated| Problem { peer_access: true, ..problem(ep_size, 2, replicated) };
    let choice = among_peers(4, false).choose(Some(Strategy::Peer)).unwrap();
    assert_eq!((choice.strategy(), choice.reason()), (Strategy::Peer, "since it was asked for"));
    for (ep_size, replicated, words) in [(1, false, "ep_size is 1"), (4, true, "each holds all")] {
        let error = among_peers(ep_size, replicated).choose(Some(Strategy::Peer)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let layer = Layer::new(1, 8, DType::F32);
    for (strategy, words) in [(Strategy::Solo, "ep_size is 4"), (Strategy::Replicated, "all tokens on every rank")] {
        let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 2), 4, 1);
        let error = builder.strategy(strategy).build().unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(strategy.name()), "{error}");
    }
    // What is not forced is chosen.
    let of = |ep_size| layer.shard(layer.router(RoutingMethod::Renormalize, 2), ep_size, 0);
    assert_eq!(of(2).build().unwrap().strategy().strategy(), Strategy::Gather);
    assert_eq!(of(4).build().unwrap().strategy().strategy(), Strategy::Exchange);
    assert_eq!(of(4).replicated_tokens(true).build().unwrap().strategy().strategy(), Strategy::Replicated);
}

/// Of all pairs of ranks that a token's two slots may go to, how many other ranks has rank 0 to send to, and how many slots?
#[test]
fn traffic_is_the_mean_over_all_tokens_there_can_be() {
    let (mut ranks, mut slots, mut tokens) = (0, 0, 0);
    for a in 0..3 {
        for b in 0..3 {
            let others = [a, b].into_iter().filter(|&rank| rank != 0);
            slots += others.clone().count();
            ranks += others.collect::<BTreeSet<_>>().len();
            tokens += 1;
        }
    }
    let mean = |sum: usize| sum as f64 / f64::from(tokens);
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a}, not {b}");
    for reduction in Reduction::ALL {
        let is_partial = reduction == Reduction::RankPartial;
        let problem = Problem { reduction, ..problem(3, 2, false) };
        let exchange = problem.traffic(Strategy::Exchange);
        close(exchange.dispatched_rows, mean(ranks));
        close(exchange.combined_rows, if is_partial { mean(ranks) } else { mean(slots) });
        assert_eq!(problem.traffic(Strategy::Peer), exchange);
        let gather = problem.traffic(Strategy::Gather);
        close(gather.dispatched_rows, 2.0);
        close(gather.combined_rows, if is_partial { 2.0 } else { mean(slots) });
        let replicated = problem.traffic(Strategy::Replicated);
        close(replicated.dispatched_rows, 0.0);
        close(replicated.combined_rows, 4.0);
        close(problem.traffic(Strategy::Solo).combined_rows, 0.0);
        // Where every rank holds all tokens, what is sent is sent by each of them.
        let copies = Problem { replicated_tokens: true, ..problem };
        close(copies.traffic(Strategy::Gather).dispatched_rows, 6.0);
        close(copies.traffic(Strategy::Exchange).dispatched_rows, 3.0 * mean(ranks));
        close(copies.traffic(Strategy::Replicated).combined_rows, 4.0);
    }
}

#[test]
fn names_are_read_back_and_unknown_ones_list_the_known() {
    for strategy in Strategy::ALL {
        assert_eq!(strategy.name().to_uppercase().parse::<Strategy>().unwrap(), strategy);
    }
    for reduction in Reduction::ALL {
        assert_eq!(reduction.name().replace('-', "_").parse::<Reduction>().unwrap(), reduction);
    }
    let error = "pigeon".parse::<Strategy>().unwrap_err().to_string();
    assert!(error.contains("\"pigeon\"") && error.contains("solo, replicated, gather, exchange, peer"), "{error}");
    let error = "".parse::<Reduction>().unwrap_err().to_string();
    assert!(error.contains("slot-order, rank-partial"), "{error}");
}

// ---------------------------------------------------------------------------------------------
// Fingerprints

/// Everything that a fingerprint compares, of a block of zeros.
#[derive(Clone)]
struct Settings {
    label: Option<&'static str>,
    placement: Placement,
    top_k: usize,
    hidden_size: usize,
    intermediate_size: usize,
    gate_dtype: DType,
    gate_up_dtype: DType,
    down_dtype: DType,
    activation: Activation,
    router_dtype: Option<DType>,
    method: RoutingMethod,
    num_shared: usize,
    strategy: Strategy,
    replicated: bool,
    reduction: Reduction,
    perfect: bool,
    config: PerfectRouterConfig,
    statistics: bool,
}

impl Settings {
    fn usual() -> Self {
        Self {
            label: None,
            placement: Placement::contiguous(8, 3).unwrap(),
            top_k: 2,
            hidden_size: 6,
            intermediate_size: 4,
            gate_dtype: DType::F32,
            gate_up_dtype: DType::F32,
            down_dtype: DType::F32,
            activation: Activation::Silu,
            router_dtype: None,
            method: RoutingMethod::Renormalize,
            num_shared: 0,
            strategy: Strategy::Gather,
            replicated: false,
            reduction: Reduction::SlotOrder,
            perfect: false,
            config: PerfectRouterConfig::default(),
            statistics: false,
        }
    }

    fn build(&self, rank: usize) -> MoeBlock {
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        let experts = |num: usize| {
            let projection = |rows, columns, dtype| {
                let weights = ExpertWeights::dense(zeros(&[num, rows, columns], dtype)).unwrap();
                ExpertProjection::new(weights, None).unwrap()
            };
            let gate_up = projection(2 * self.intermediate_size, self.hidden_size, self.gate_up_dtype);
            let down = projection(self.hidden_size, self.intermediate_size, self.down_dtype);
            Experts::new(gate_up, down, GateUpRows::Concatenated, self.activation).unwrap()
        };
        let gate = zeros(&[self.placement.num_experts(), self.hidden_size], self.gate_dtype);
        let router = Router::new(self.method, self.top_k).unwrap();
        let local = experts(self.placement.local(rank).unwrap().len());
        let mut builder = MoeBlock::builder(Linear::new(gate, None).unwrap(), router, local)
            .placement(self.placement.clone(), rank)
            .strategy(if self.replicated { Strategy::Replicated } else { self.strategy })
            .replicated_tokens(self.replicated)
            .reduction(self.reduction)
            .perfect_router(self.perfect)
            .perfect_router_config(self.config)
            .statistics(self.statistics);
        if let Some(label) = self.label {
            builder = builder.label(label);
        }
        if let Some(dtype) = self.router_dtype {
            builder = builder.router_dtype(dtype);
        }
        if self.num_shared > 0 {
            builder = builder.shared_experts(experts(self.num_shared));
        }
        builder.build().unwrap()
    }
}

/// A field, how the usual settings are changed in it, the value then, the usual value.
type Change = (&'static str, fn(&mut Settings), &'static str, &'static str);

fn changes() -> Vec<Change> {
    vec![
        ("label", |s| s.label = Some("layer 1"), "layer 1", "none"),
        ("num_experts", |s| s.placement = Placement::contiguous(9, 3).unwrap(), "9", "8"),
        ("top_k", |s| s.top_k = 3, "3", "2"),
        ("hidden_size", |s| s.hidden_size = 7, "7", "6"),
        ("intermediate_size", |s| s.intermediate_size = 5, "5", "4"),
        ("gate_dtype", |s| s.gate_dtype = DType::BF16, "bf16", "f32"),
        ("router_dtype", |s| s.router_dtype = Some(DType::F32), "f32", "that of hidden"),
        ("routing_method", |s| s.method = RoutingMethod::Default, "Default", "Renormalize"),
        ("gate_up_weights", |s| s.gate_up_dtype = DType::F16, "f16 Concatenated", "f32 Concatenated"),
        ("down_weights", |s| s.down_dtype = DType::F16, "f16", "f32"),
        ("activation", |s| s.activation = Activation::GPT_OSS, "SwigluOss", "Silu"),
        ("shared_experts", |s| s.num_shared = 1, "1 of intermediate_size 4, f32 Concatenated", "none"),
        ("ep_size", |s| s.placement = Placement::contiguous(8, 4).unwrap(), "4", "3"),
        ("strategy", |s| s.strategy = Strategy::Exchange, "exchange", "gather"),
        ("reduction", |s| s.reduction = Reduction::RankPartial, "rank-partial", "slot-order"),
        ("placement", |s| s.placement = Placement::balanced(&[1; 8], 3, 9).unwrap(), "", "0..3 | 3..6 | 6 7"),
        ("perfect_router", |s| s.perfect = true, "on", "off"),
        ("perfect_router_schedule", |s| s.config.schedule = Schedule::GlobalSlot, "global-slot", "rank-rotated"),
        (
            "perfect_router_imbalance",
            |s| s.config.imbalance = Some(Imbalance { hotspot: Hotspot::Rank(1), fraction: 0.5, seed: 3 }),
            "Imbalance { hotspot: Rank(1)",
            "none",
        ),
        ("statistics", |s| s.statistics = true, "on", "off"),
    ]
}

/// Blocks of one shape, with one collective each, so that nothing but the label tells them apart.
#[test]
fn a_block_that_a_rank_leaves_out_is_named_by_its_label() {
    on_ranks(3, |mut ranks| {
        let build = |label| Settings { label: Some(label), replicated: true, ..Settings::usual() }.build(ranks.rank());
        let blocks = ["layer 0", "layer 1", "layer 2"].map(build);
        assert_eq!(blocks[1].label(), Some("layer 1"));
        let hidden = Tensor::zeros((4, 6), DType::F32, &Device::Cpu).unwrap();
        let step = Step::agree(&mut ranks, 4).unwrap();
        let left_out = usize::from(ranks.rank() == 1);
        let outcome = blocks.iter().enumerate().filter(|(i, _)| left_out == 0 || *i != 1).try_for_each(|(_, block)| {
            let out = block.forward(&hidden, &mut ranks, &step)?;
            assert_eq!(out.dims(), [4, 6]);
            Ok::<_, candle_core::Error>(())
        });
        let error = outcome.unwrap_err().to_string();
        let names = ["rank 1", "label \"layer 1\"", "label \"layer 2\""];
        assert!(names.iter().all(|name| error.contains(name)), "{error}");
    });
}

#[test]
fn ranks_of_the_same_settings_agree() {
    on_ranks(3, |ranks| {
        let mut ranks = Recorded { ranks, calls: Vec::new() };
        let block = Settings::usual().build(ranks.rank());
        MoeBlock::agree(&[], &mut ranks).unwrap();
        MoeBlock::agree(&[block], &mut ranks).unwrap();
        assert_eq!(ranks.calls.len(), 2, "one exchange for each comparison");
    });
}

#[test]
fn a_rank_of_other_settings_is_named_by_every_rank_with_the_field_and_both_values() {
    let covered: BTreeSet<&str> = changes().iter().map(|change| change.0).chain(["version"]).collect();
    let fields = Settings::usual().build(0).fingerprint();
    assert_eq!(fields.fields().map(|(name, _)| name).collect::<BTreeSet<_>>(), covered, "fields without a change");
    for (field, change, found, expected) in changes() {
        for odd in [0, 1, 2] {
            let errors = on_ranks(3, |mut ranks| {
                let rank = ranks.rank();
                let mut settings = Settings::usual();
                let same = settings.build(rank);
                if rank == odd {
                    change(&mut settings);
                }
                // The second of two layers.
                line(MoeBlock::agree(&[same, settings.build(rank)], &mut ranks).unwrap_err())
            });
            for error in &errors {
                assert_eq!(error, &errors[0], "ranks disagree about who is odd");
                let start = format!("fingerprint: rank {odd} has layer 1 {field} {found}");
                assert!(error.starts_with(&start), "{error}, not {start}");
                let (_, group) = error.split_once("expected that of the group, ").unwrap();
                assert!(group.starts_with(expected), "{error}, not {expected}");
            }
        }
    }
}

#[test]
fn another_version_or_number_of_layers_or_another_program_is_named() {
    let errors = on_ranks(3, |mut ranks| {
        let rank = ranks.rank();
        let block = || Settings::usual().build(rank);
        let version = if rank == 2 { "0.0.9" } else { env!("CARGO_PKG_VERSION") };
        let version = Fingerprint::new().with("version", version).with("top_k", rank);
        let version = version.agree(&mut ranks).unwrap_err();
        let blocks: Vec<MoeBlock> = (0..if rank == 1 { 1 } else { 2 }).map(|_| block()).collect();
        let layers = MoeBlock::agree(&blocks, &mut ranks).unwrap_err();
        let extra = if rank == 0 { Fingerprint::new().with("x", 1) } else { Fingerprint::new() };
        let extra = extra.agree(&mut ranks).unwrap_err();
        let bytes = match rank {
            1 => ranks.all_gather_bytes(b"no fingerprint").map(|_| String::new()).unwrap(),
            _ => line(Fingerprint::new().agree(&mut ranks).unwrap_err()),
        };
        [line(version), line(layers), line(extra), bytes]
    });
    let version = env!("CARGO_PKG_VERSION");
    for (rank, [other_version, layers, extra, bytes]) in errors.into_iter().enumerate() {
        let expected = format!("fingerprint: rank 2 has version 0.0.9, expected that of the group, {version}");
        assert_eq!(other_version, expected);
        assert_eq!(layers, "fingerprint: rank 1 has layers 1, expected that of the group, 2");
        assert_eq!(extra, "fingerprint: rank 0 has x 1, expected that of the group, nothing");
        assert!(rank == 1 || bytes.contains("rank 1 sent 14 bytes that are no fingerprint"), "{bytes}");
    }
}
