//! Routing on the CPU.
//!
//! For each row, in float32:
//!
//! ```text
//! value[e] = what the method chooses by
//! key[e]   = order(value[e]) << 32 | !e        unsigned; NaN lowest, -0 = +0, lower id wins a tie
//! chosen   = the top_k largest keys, descending; of the experts of the best groups, where the method has groups
//! weight   = what the method makes of the chosen logits
//! ```
//!
//! 1. Keys are distinct, so every selection algorithm gives the same answer; a sorted list of `top_k` keys with an early
//!    way out is the fastest while `top_k` is small, a partition otherwise.
//! 2. The exponential and the logarithm are our own, of additions, multiplications and one division in a fixed order: the
//!    same bits on every machine, which the choice by a score + bias depends on.

use super::{ExpertGroups, NO_EXPERT, OP, Router, RoutingMethod};
use crate::host::{checked_product, try_filled};
use candle_core::{Layout, Result, WithDType};
use rayon::prelude::*;

/// Rows below which a thread is not worth waking.
const MIN_LOGITS_PER_TASK: usize = 16 * 1024;
/// Longest list that is kept sorted by insertion.
const MAX_INSERTION: usize = 32;

/// Routes the first `num_valid_tokens` rows of `logits`, the others to no expert; returns the ids and the weights, both
/// `[num_tokens, top_k]`.
pub(super) fn route<L: WithDType + Into<f32>>(
    logits: &[L],
    layout: &Layout,
    num_experts: usize,
    num_valid_tokens: usize,
    router: &Router,
) -> Result<(Vec<u32>, Vec<f32>)> {
    let num_tokens = layout.dims()[0];
    // A broadcast view may stand for more logits than 64 bits count.
    checked_product(OP, ("num_tokens", num_tokens), ("num_experts", num_experts))?;
    let num_slots = checked_product(OP, ("num_tokens", num_tokens), ("top_k", router.top_k))?;
    let mut ids = try_filled(OP, NO_EXPERT, num_slots)?;
    let mut weights = try_filled(OP, 0f32, num_slots)?;
    let (stride_token, stride_expert) = (layout.stride()[0], layout.stride()[1]);
    let rows_per_task = MIN_LOGITS_PER_TASK.div_ceil(num_experts.max(1));
    let bias = router.selection_bias.as_ref().map(|bias| bias.values());
    ids.par_chunks_exact_mut(router.top_k)
        .zip(weights.par_chunks_exact_mut(router.top_k))
        .take(num_valid_tokens)
        .enumerate()
        .with_min_len(rows_per_task)
        .for_each_init(Scratch::default, |scratch, (token, (ids, weights))| {
            let start = layout.start_offset() + token * stride_token;
            let row = (0..num_experts).map(|e| logits[start + e * stride_expert].into());
            scratch.route_row(row, router.method, bias, ids, weights);
        });
    Ok((ids, weights))
}

#[derive(Default)]
struct Scratch {
    logits: Vec<f32>,
    scores: Vec<f32>,
    keys: Vec<u64>,
    groups: Vec<u32>,
}

impl Scratch {
    fn route_row(
        &mut self,
        row: impl Iterator<Item = f32>,
        method: RoutingMethod,
        bias: Option<&[f32]>,
        ids: &mut [u32],
        weights: &mut [f32],
    ) {
        self.logits.clear();
        self.logits.extend(row);
        match method {
            RoutingMethod::MiniMax2 | RoutingMethod::DeepSeekV3 { .. } => {
                self.choose(sigmoid, bias, method.groups(), ids)
            }
            RoutingMethod::DeepSeekV4 { .. } => self.choose(root_softplus, bias, method.groups(), ids),
            _ => select(self.logits.iter().copied().enumerate(), &mut self.keys, ids),
        }
        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = self.logits[id as usize];
        }
        weigh(method, &self.logits, weights);
    }

    /// Chooses by `score(logit) + bias`, inside the best groups.
    fn choose(&mut self, score: fn(f32) -> f32, bias: Option<&[f32]>, groups: ExpertGroups, ids: &mut [u32]) {
        let Self { logits, scores, keys, groups: chosen } = self;
        scores.clear();
        match bias {
            Some(bias) => scores.extend(logits.iter().zip(bias).map(|(&logit, bias)| score(logit) + bias)),
            None => scores.extend(logits.iter().map(|&logit| score(logit))),
        }
        if !groups.is_limit() {
            return select(scores.iter().copied().enumerate(), keys, ids);
        }
        let size = scores.len() / groups.num_groups;
        chosen.resize(groups.topk_group, 0);
        select(scores.chunks_exact(size).map(group_score).enumerate(), keys, chosen);
        let members = chosen.iter().flat_map(|&group| {
            let first = group as usize * size;
            (first..first + size).map(|expert| (expert, scores[expert]))
        });
        select(members, keys, ids);
    }
}

/// The sum of the two best scores; one alone where the other is missing or NaN.
fn group_score(scores: &[f32]) -> f32 {
    let mut best = [f32::NAN; 2];
    for &score in scores {
        if order(score) > order(best[0]) {
            best = [score, best[0]];
        } else if order(score) > order(best[1]) {
            best[1] = score;
        }
    }
    if best[1].is_nan() { best[0] } else { best[0] + best[1] }
}

/// Writes the ids of the `ids.len()` best values, best first.
fn select(values: impl Iterator<Item = (usize, f32)>, keys: &mut Vec<u64>, ids: &mut [u32]) {
    let top_k = ids.len();
    let key = |(e, value): (usize, f32)| u64::from(order(value)) << 32 | u64::from(!(e as u32));
    keys.clear();
    if top_k <= MAX_INSERTION {
        for key in values.map(key) {
            if keys.len() == top_k {
                if key < keys[top_k - 1] {
                    continue;
                }
                keys.pop();
            }
            let place = keys.partition_point(|&other| other > key);
            keys.insert(place, key);
        }
    } else {
        keys.extend(values.map(key));
        if top_k < keys.len() {
            keys.select_nth_unstable_by(top_k - 1, |a, b| b.cmp(a));
        }
        keys[..top_k].sort_unstable_by(|a, b| b.cmp(a));
    }
    for (id, key) in ids.iter_mut().zip(&*keys) {
        *id = !(*key as u32);
    }
}

/// An unsigned number that orders like the value: NaN is 0, -0 and +0 are the same.
fn order(value: f32) -> u32 {
    if value.is_nan() {
        return 0;
    }
    let bits = (value + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// Turns the chosen logits, best first, into weights. `all` are the logits of the whole row.
fn weigh(method: RoutingMethod, all: &[f32], chosen: &mut [f32]) {
    match method {
        RoutingMethod::Default => softmax_of(all, chosen),
        RoutingMethod::Renormalize | RoutingMethod::RenormalizeNaive => {
            let best = chosen[0];
            chosen.iter_mut().for_each(|w| *w = share(*w, best));
            let sum = lane_sum(chosen);
            chosen.iter_mut().for_each(|w| *w /= sum);
        }
        RoutingMethod::Llama4 => chosen.iter_mut().for_each(|w| *w = sigmoid_or_zero(*w)),
        RoutingMethod::MiniMax2 | RoutingMethod::DeepSeekV3 { .. } => {
            let factor = method.routed_scaling_factor();
            chosen.iter_mut().for_each(|w| *w = sigmoid_or_zero(*w));
            let sum = lane_sum(chosen) + EPSILON;
            chosen.iter_mut().for_each(|w| *w = *w / sum * factor);
        }
        RoutingMethod::DeepSeekV4 { routed_scaling_factor } => {
            root_softplus_shares(chosen);
            chosen.iter_mut().for_each(|w| *w *= routed_scaling_factor);
        }
        // Far below 0 a sigmoid is e^l, and the quotient a softmax, which does not vanish as the sigmoids do.
        RoutingMethod::SigmoidRenorm if chosen[0] < SIGMOID_IS_EXP || chosen[0].is_nan() => {
            weigh(RoutingMethod::Renormalize, all, chosen);
        }
        RoutingMethod::SigmoidRenorm => {
            chosen.iter_mut().for_each(|w| *w = sigmoid_or_zero(*w));
            let sum = lane_sum(chosen);
            chosen.iter_mut().for_each(|w| *w /= sum);
        }
    }
}

/// What MiniMax-M2 and DeepSeek-V3 add to the sum of the chosen sigmoids.
const EPSILON: f32 = 1e-20;

/// Below this logit, `1 + e^l` is 1 in float32, and sigmoid(l) and softplus(l) are e^l.
const SIGMOID_IS_EXP: f32 = -20.0;

/// `sqrt(softplus(l))` of each chosen logit over the sum of all: they are in the order of score + bias, not of logits.
fn root_softplus_shares(chosen: &mut [f32]) {
    let best = chosen.iter().copied().fold(f32::NAN, f32::max);
    let value = |logit: f32| match logit {
        // The root is e^(l/2), and the quotient a softmax, which does not vanish as the roots do; so is that of void ones.
        _ if best.is_nan() || best < SIGMOID_IS_EXP => share(logit / 2.0, best / 2.0),
        _ if best == f32::INFINITY => share(logit, best),
        _ if logit.is_nan() => 0.0,
        _ => root_softplus(logit),
    };
    chosen.iter_mut().for_each(|w| *w = value(*w));
    let sum = lane_sum(chosen);
    chosen.iter_mut().for_each(|w| *w /= sum);
}

/// Softmax over `all`, at the `chosen` logits.
fn softmax_of(all: &[f32], chosen: &mut [f32]) {
    let best = chosen[0];
    let denominator = denominator(all, best);
    chosen.iter_mut().for_each(|w| *w = share(*w, best) / denominator);
}

/// Added up in double precision, since rows are long.
fn denominator(logits: &[f32], best: f32) -> f32 {
    logits.iter().map(|&l| f64::from(share(l, best))).sum::<f64>() as f32
}

/// The sum in the order in which a warp adds up, so that weights have the same bits on CUDA: 32 lanes in turn, then halves.
fn lane_sum(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 32];
    for row in values.chunks(lanes.len()) {
        lanes.iter_mut().zip(row).for_each(|(lane, value)| *lane += value);
    }
    for half in [16, 8, 4, 2, 1] {
        let (low, high) = lanes.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
    }
    lanes[0]
}

/// The part of a logit in a softmax whose largest logit is `best`, before the division.
///
/// `exp(logit - best)`, made whole where that is no number: NaN and -inf count 0, as does anything finite beside +inf;
/// when `best` itself is NaN or -inf, everything counts 1, so that the weights come out equal.
fn share(logit: f32, best: f32) -> f32 {
    if best.is_nan() || best == f32::NEG_INFINITY || logit == best {
        1.0
    } else if logit < best && best.is_finite() {
        exp(logit - best)
    } else {
        0.0
    }
}

fn sigmoid_or_zero(logit: f32) -> f32 {
    if logit.is_nan() { 0.0 } else { sigmoid(logit) }
}

fn sigmoid(logit: f32) -> f32 {
    let e = exp(-logit.abs());
    if logit >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

fn root_softplus(logit: f32) -> f32 {
    let tail = ln_1p(exp(-logit.abs()));
    if logit > 0.0 { (logit + tail).sqrt() } else { tail.sqrt() }
}

/// `ln(1 + y)` for `y` in 0..=1 within 3 units in the last place; NaN stays NaN.
///
/// `2 atanh(z)` with `z = y / (2 + y)`, at most 1/3, as its power series up to `z^15`.
fn ln_1p(y: f32) -> f32 {
    let z = y / (2.0 + y);
    let square = z * z;
    let mut p = 1.0 / 15.0;
    for c in [1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0] {
        p = p * square + c;
    }
    let z2 = z + z;
    z2 + z2 * (square * p)
}

/// `e^x` for `x <= 0` within 2 units in the last place; NaN stays NaN.
///
/// `2^n * e^r` with `n = round(x / ln 2)`; ln 2 is split in two so that `r` is exact, and `e^r` is a polynomial
/// (coefficients of the Cephes library). No fused multiply-add: it would change the bits from machine to machine.
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    if x < -104.0 {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.500_000_1] {
        p = p * r + c;
    }
    let e_r = p * (r * r) + r + 1.0;
    // Two factors, each a normal number, so that results below 2^-126 round once.
    let n = if n.is_nan() { return x } else { n as i32 };
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    if n >= -126 { e_r * power(n) } else { (e_r * power(-64)) * power(n + 64) }
}

/// What the forward pass decided.
pub(super) struct Chosen<'a> {
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    pub(super) ids: &'a [u32],
    pub(super) weights: &'a [f32],
}

/// The gradient of a loss with respect to the logits, from its gradient with respect to the weights.
pub(super) fn backward(method: RoutingMethod, chosen: &Chosen<'_>, logits: &[f32], grad: &[f32]) -> Vec<f32> {
    let mut out = vec![0f32; logits.len()];
    let slots = |token: usize| token * chosen.top_k..(token + 1) * chosen.top_k;
    for (token, out) in out.chunks_exact_mut(chosen.num_experts.max(1)).enumerate() {
        let logits = &logits[token * chosen.num_experts..][..chosen.num_experts];
        let ids = &chosen.ids[slots(token)];
        let (weights, grad) = (&chosen.weights[slots(token)], &grad[slots(token)]);
        let is_padding = ids.contains(&NO_EXPERT);
        if is_padding || !ids.iter().map(|&id| logits[id as usize]).fold(f32::NAN, f32::max).is_finite() {
            continue;
        }
        backward_row(method, logits, ids, weights, grad, out);
    }
    out
}

/// The gradient of one row; `s` is a sigmoid, `w` a weight, `g` its gradient.
fn backward_row(method: RoutingMethod, logits: &[f32], ids: &[u32], weights: &[f32], grad: &[f32], out: &mut [f32]) {
    let mean: f32 = weights.iter().zip(grad).map(|(w, g)| w * g).sum();
    let slots = ids.iter().map(|&id| id as usize).zip(weights.iter().zip(grad));
    match method {
        RoutingMethod::Default => {
            out.copy_from_slice(logits);
            let best = logits[ids[0] as usize];
            let denominator = denominator(logits, best);
            out.iter_mut().for_each(|o| *o = -mean * (share(*o, best) / denominator));
            slots.for_each(|(id, (w, g))| out[id] += w * g);
        }
        RoutingMethod::Renormalize | RoutingMethod::RenormalizeNaive => {
            slots.for_each(|(id, (w, g))| out[id] = w * (g - mean));
        }
        RoutingMethod::Llama4 => slots.for_each(|(id, (w, g))| out[id] = g * w * (1.0 - w)),
        RoutingMethod::MiniMax2 | RoutingMethod::SigmoidRenorm => {
            for (id, (w, g)) in slots {
                out[id] = w * (1.0 - sigmoid_or_zero(logits[id])) * (g - mean);
            }
        }
        // Weights that are multiplied by 0 cannot move.
        _ if method.routed_scaling_factor() == 0.0 => {}
        RoutingMethod::DeepSeekV3 { routed_scaling_factor, .. } => {
            for (id, (w, g)) in slots {
                out[id] = w * (1.0 - sigmoid_or_zero(logits[id])) * (g - mean / routed_scaling_factor);
            }
        }
        RoutingMethod::DeepSeekV4 { routed_scaling_factor } => {
            for (id, (w, g)) in slots {
                out[id] = w * root_softplus_slope(logits[id]) * (g - mean / routed_scaling_factor);
            }
        }
    }
}

/// The derivative of ln(sqrt(softplus(l))), which is sigmoid(l) / (2 softplus(l)).
fn root_softplus_slope(logit: f32) -> f32 {
    let root = root_softplus(logit);
    // Below, sigmoid and softplus are both e^l. NaN has no weight that could move.
    if logit.is_nan() || logit < SIGMOID_IS_EXP { 0.5 } else { sigmoid(logit) / (2.0 * (root * root)) }
}
