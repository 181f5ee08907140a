//! Naive float64 versions of every room, written from the contract and not from the code; and random input for them.

use candle_core::{DType, Device, Tensor};
use candle_moe::experts::{Activation, GateUpRows};
use candle_moe::routing::{ExpertGroups, RoutingMethod};
use half::{bf16, f16};
use std::cmp::Ordering;
use std::ops::Range;

pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// (num_experts, top_k) of published models.
pub(crate) const MODELS: [(usize, usize); 16] = [
    (8, 2),
    (16, 1),
    (32, 4),
    (60, 4),
    (64, 6),
    (64, 8),
    (128, 4),
    (128, 8),
    (160, 6),
    (256, 8),
    (384, 6),
    (384, 8),
    (512, 10),
    (512, 22),
    (576, 8),
    (896, 16),
];

// ---------------------------------------------------------------------------------------------
// Random input

/// A small generator (splitmix64): the same numbers on every machine and rank.
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn units(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.unit() * scale).collect()
    }

    /// `count` distinct numbers below `n`.
    pub(crate) fn distinct(&mut self, n: usize, count: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        for i in 0..count {
            let j = i + self.below(n - i);
            all.swap(i, j);
        }
        all.truncate(count);
        all
    }
}

/// A tensor of `dtype`, and the float32 values that it really holds.
pub(crate) fn floats(values: &[f32], shape: &[usize], dtype: DType) -> (Tensor, Vec<f32>) {
    let held: Vec<f32> = match dtype {
        DType::F16 => values.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
        DType::BF16 => values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
        _ => values.to_vec(),
    };
    let tensor = match dtype {
        DType::F16 => Tensor::from_vec(values.iter().map(|&v| f16::from_f32(v)).collect(), shape, &Device::Cpu),
        DType::BF16 => Tensor::from_vec(values.iter().map(|&v| bf16::from_f32(v)).collect(), shape, &Device::Cpu),
        _ => Tensor::from_vec(values.to_vec(), shape, &Device::Cpu),
    };
    (tensor.unwrap(), held)
}

/// The float32 values of a tensor, row by row.
pub(crate) fn rows_of(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_dtype(DType::F32).unwrap().to_vec2().unwrap()
}

pub(crate) fn bits_of(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

// ---------------------------------------------------------------------------------------------
// Routing

/// Every method, the grouped one with all experts in one group, so that all of them fit any number of experts.
pub(crate) fn methods() -> impl Iterator<Item = RoutingMethod> {
    RoutingMethod::ALL.into_iter().map(|method| match method {
        RoutingMethod::DeepSeekV3 { routed_scaling_factor, .. } => {
            RoutingMethod::DeepSeekV3 { groups: ExpertGroups::ONE, routed_scaling_factor }
        }
        other => other,
    })
}

/// The grouped method with every kind of groups that fits: one expert a group, a few, all groups kept, as few as can be.
pub(crate) fn grouped_methods(num_experts: usize, top_k: usize) -> Vec<RoutingMethod> {
    let mut methods = Vec::new();
    for num_groups in [2, 3, 4, 8, num_experts] {
        if num_experts.is_multiple_of(num_groups) {
            let fewest = top_k.div_ceil(num_experts / num_groups);
            let mut kept = [fewest, (fewest + num_groups) / 2, num_groups - 1, num_groups].map(|kept| kept.max(fewest));
            kept.sort_unstable();
            let distinct = kept.iter().enumerate().filter(|&(i, kept_groups)| i == 0 || kept[i - 1] != *kept_groups);
            methods.extend(distinct.map(|(_, &topk_group)| RoutingMethod::DeepSeekV3 {
                groups: ExpertGroups { num_groups, topk_group },
                routed_scaling_factor: 2.5,
            }));
        }
    }
    methods
}

/// Descending; NaN after everything, -0 equal to +0.
pub(crate) fn descending(a: f64, b: f64) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => Ordering::Equal,
        (true, false) => Ordering::Greater,
        (false, true) => Ordering::Less,
        (false, false) => b.partial_cmp(&a).unwrap(),
    }
}

/// The `top_k` best, best first, ties to the lower id.
pub(crate) fn choose(scores: &[f64], top_k: usize) -> Vec<u32> {
    let mut ids: Vec<usize> = (0..scores.len()).collect();
    ids.sort_by(|&a, &b| descending(scores[a], scores[b]).then(a.cmp(&b)));
    ids.iter().take(top_k).map(|&id| id as u32).collect()
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// sqrt(ln(1 + e^x)) without overflow.
pub(crate) fn root_softplus(x: f64) -> f64 {
    (x.max(0.0) + (-x.abs()).exp().ln_1p()).sqrt()
}

/// What each expert is chosen by, of the methods that take a bias; `None` where the logits themselves are compared.
pub(crate) fn scores(method: RoutingMethod, row: &[f64], bias: Option<&[f32]>) -> Option<Vec<f64>> {
    let score: fn(f64) -> f64 = match method {
        RoutingMethod::MiniMax2 | RoutingMethod::DeepSeekV3 { .. } => sigmoid,
        RoutingMethod::DeepSeekV4 { .. } => |x| if x.is_nan() { x } else { root_softplus(x) },
        _ => return None,
    };
    Some(row.iter().enumerate().map(|(e, &l)| score(l) + bias.map_or(0.0, |bias| f64::from(bias[e]))).collect())
}

/// The sum of the two best scores of each group; of one where the other is missing or NaN.
pub(crate) fn group_scores(scores: &[f64], num_groups: usize) -> Vec<f64> {
    let score = |group: &[f64]| {
        let best: Vec<f64> = choose(group, 2).into_iter().map(|id| group[id as usize]).collect();
        match best[..] {
            [first, second] if !second.is_nan() => first + second,
            _ => best[0],
        }
    };
    scores.chunks(scores.len() / num_groups).map(score).collect()
}

/// A logit that counts for nothing.
fn is_void(logit: f64) -> bool {
    logit.is_nan() || logit == f64::NEG_INFINITY
}

/// Softmax over `pool`, at the chosen ones; the largest of the pool is among them.
fn softmax(pool: &[f64], chosen: &[f64]) -> Vec<f64> {
    let best = pool.iter().copied().fold(f64::NAN, f64::max);
    if is_void(best) {
        return vec![1.0 / pool.len() as f64; chosen.len()];
    }
    let share = |logit: f64| match best == f64::INFINITY {
        true => f64::from(u8::from(logit == best)),
        false if is_void(logit) => 0.0,
        false => (logit - best).exp(),
    };
    let sum: f64 = pool.iter().map(|&l| share(l)).sum();
    chosen.iter().map(|&l| share(l) / sum).collect()
}

/// The weights of the chosen experts of one row.
pub(crate) fn weights(method: RoutingMethod, row: &[f64], ids: &[u32]) -> Vec<f64> {
    let chosen: Vec<f64> = ids.iter().map(|&id| row[id as usize]).collect();
    let sigmoids = || chosen.iter().map(|&l| if l.is_nan() { 0.0 } else { sigmoid(l) });
    match method {
        RoutingMethod::Default => softmax(row, &chosen),
        RoutingMethod::Renormalize | RoutingMethod::RenormalizeNaive => softmax(&chosen, &chosen),
        RoutingMethod::Llama4 => sigmoids().collect(),
        RoutingMethod::MiniMax2 | RoutingMethod::DeepSeekV3 { .. } => {
            let (sum, factor) = (sigmoids().sum::<f64>() + 1e-20, f64::from(method.routed_scaling_factor()));
            sigmoids().map(|s| s / sum * factor).collect()
        }
        // The logarithm of the root does not vanish for logits far below 0; +inf is above everything.
        RoutingMethod::DeepSeekV4 { routed_scaling_factor } => {
            let log_root = |l: f64| match l {
                _ if is_void(l) => f64::NEG_INFINITY,
                _ if l < -30.0 => l / 2.0,
                _ => root_softplus(l).ln(),
            };
            let logs: Vec<f64> = chosen.iter().map(|&l| log_root(l)).collect();
            softmax(&logs, &logs).into_iter().map(|share| share * f64::from(routed_scaling_factor)).collect()
        }
        // sigmoid = e^l / (1 + e^l); the logarithm does not vanish for logits far below 0.
        RoutingMethod::SigmoidRenorm => {
            let log_sigmoid =
                |l: f64| if is_void(l) { f64::NEG_INFINITY } else { l.min(0.0) - (-l.abs()).exp().ln_1p() };
            let logs: Vec<f64> = chosen.iter().map(|&l| log_sigmoid(l)).collect();
            softmax(&logs, &logs)
        }
        other => panic!("the oracle does not know {other}"),
    }
}

// ---------------------------------------------------------------------------------------------
// Expert order

/// (expert, slot) of every slot of a local expert, sorted.
pub(crate) fn order(ids: &[u32], local: &Range<usize>) -> Vec<(usize, usize)> {
    let slots = ids.iter().enumerate().map(|(slot, &id)| (id as usize, slot));
    let mut sorted: Vec<_> = slots.filter(|(id, _)| local.contains(id)).collect();
    sorted.sort();
    sorted
}

// ---------------------------------------------------------------------------------------------
// Perfect router

/// (receiver, expert) of slot `i` of sender `rank`.
pub(crate) fn planned(num_experts: usize, ep_size: usize, rank: usize, i: usize) -> (usize, usize) {
    let experts_per_rank = (num_experts / ep_size) as u128;
    let g = i as u128 + rank as u128;
    let receiver = g % ep_size as u128;
    let local = g / ep_size as u128 % experts_per_rank;
    (receiver as usize, (receiver * experts_per_rank + local) as usize)
}

// ---------------------------------------------------------------------------------------------
// Experts

/// One matrix, its bias (zeros if there is none).
#[derive(Clone)]
pub(crate) struct Matrix {
    pub(crate) rows: Vec<Vec<f64>>,
    pub(crate) bias: Vec<f64>,
}

/// One value and how far a float32 computation may be from it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounded {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

const EPS: f64 = f32::EPSILON as f64;

impl Matrix {
    /// `W x + b` with float32 accumulation of `n` products: each of the additions rounds a partial sum that is at most the
    /// sum of magnitudes, so `(n + 2) * 2^-24` of that sum, and what the inputs' own errors make of it.
    pub(crate) fn apply(&self, x: &[Bounded]) -> Vec<Bounded> {
        let row = |(row, bias): (&Vec<f64>, &f64)| {
            let pairs = || row.iter().zip(x);
            let value = pairs().map(|(w, x)| w * x.value).sum::<f64>() + bias;
            let magnitude = pairs().map(|(w, x)| (w * x.value).abs()).sum::<f64>() + bias.abs();
            let inherited = pairs().map(|(w, x)| w.abs() * x.error).sum::<f64>();
            let error = (x.len() + 2) as f64 * EPS / 2.0 * magnitude + inherited + 1e-40;
            Bounded { value, error }
        };
        self.rows.iter().zip(&self.bias).map(row).collect()
    }
}

/// The nearest value of `dtype`.
pub(crate) fn round(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(value as f32).to_f64(),
        DType::BF16 => bf16::from_f32(value as f32).to_f64(),
        _ => f64::from(value as f32),
    }
}

/// What became of `x` under a function that never falls.
fn through(x: Bounded, f: impl Fn(f64) -> f64) -> Bounded {
    let value = f(x.value);
    let to = |end: f64| if end == value { 0.0 } else { (end - value).abs() };
    Bounded { value, error: to(f(x.value + x.error)).max(to(f(x.value - x.error))) }
}

/// Nothing but the rounded value, unless the error of `x` reaches over a boundary.
pub(crate) fn rounded(x: Bounded, dtype: DType) -> Bounded {
    through(x, |x| round(x, dtype))
}

fn activate(activation: Activation, gate: Bounded, up: Bounded) -> Bounded {
    // g * sigmoid(slope * g) * factor, where g * sigmoid(..) cannot be off by more than `range`.
    let (gate, slope, factor, range) = match activation {
        Activation::Silu => (gate, 1.0, up, f64::INFINITY),
        Activation::SwigluOss { alpha, limit } => {
            let limit = f64::from(limit);
            let up = through(up, |u| u.clamp(-limit, limit));
            let range = if alpha >= 1.0 { limit + 1.0 } else { f64::INFINITY };
            (through(gate, |g| g.min(limit)), f64::from(alpha), Bounded { value: up.value + 1.0, ..up }, range)
        }
        other => panic!("the oracle does not know {other:?}"),
    };
    let g = gate.value;
    let swish = g * sigmoid(slope * g);
    let value = swish * factor.value;
    // x * sigmoid(a x) has a slope below 1.1. The exponential of a large argument a x is off by its rounding,
    // |a x| * 2^-24, relative.
    let inherited = (1.1 * gate.error).min(range) * (factor.value.abs() + factor.error) + factor.error * swish.abs();
    let own = (8.0 + (slope * g).abs().min(120.0)) * EPS * value.abs() + EPS * swish.abs() + 1e-37;
    Bounded { value, error: inherited + own }
}

/// One token through one expert: float32, one rounding of the activation to `dtype`.
pub(crate) fn expert(
    gate_up: &Matrix,
    down: &Matrix,
    rows: GateUpRows,
    activation: Activation,
    x: &[f32],
    dtype: DType,
) -> Vec<Bounded> {
    let x: Vec<_> = x.iter().map(|&x| Bounded { value: x.into(), error: 0.0 }).collect();
    let t = gate_up.apply(&x);
    let intermediate_size = t.len() / 2;
    let h: Vec<_> = (0..intermediate_size)
        .map(|j| {
            let (gate, up) = match rows {
                GateUpRows::Interleaved => (t[2 * j], t[2 * j + 1]),
                GateUpRows::Concatenated => (t[j], t[intermediate_size + j]),
            };
            let h = activate(activation, gate, up);
            if dtype == DType::F32 { h } else { rounded(h, dtype) }
        })
        .collect();
    down.apply(&h)
}
