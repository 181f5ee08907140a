//! Experts on the CPU.
//!
//! ```text
//! for each wave of groups (a group: up to MAX_GROUP rows of one expert)
//!     x    = gather the tokens of each group, packed for the dot products
//!     t    = W1 x          parallel over (group, rows of W1)
//!     h    = activation(t + b1), packed
//!     y    = W2 h          parallel over (group, rows of W2)
//!     rows = transpose(y) + b2
//! ```
//!
//! 1. A task owns a band of weight rows and streams it once for all tokens of its group; its products stand transposed,
//!    `[weight rows, tokens]`, so that tasks write disjoint slices.
//! 2. Waves bound the workspace: a prompt of any length needs `MAX_WAVE` rows of it.

use super::simd::{PackedTokens, WeightRows, dot_rows};
use super::weights::Values;
use super::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, OP};
use crate::host::{checked_product, try_filled, with_slice};
use crate::order::{ExpertOrder, NO_SLOT};
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of one expert that share a pass over its weights.
const MAX_GROUP: usize = 256;
/// Rows whose intermediate values exist at the same time.
const MAX_WAVE: usize = 1024;
/// Weight values of a task: enough to hide its start, small enough to spread over the cores.
const VALUES_PER_TASK: usize = 256 * 1024;

/// Multiplications below which waking other threads costs more than it saves.
const MIN_PARALLEL: usize = 256 * 1024;

/// Rows of one local expert: places of the expert order.
struct Group {
    expert: usize,
    places: Range<usize>,
}

pub(super) fn forward(experts: &Experts, hidden: &Tensor, order: &ExpertOrder) -> Result<Tensor> {
    let hidden_size = experts.hidden_size();
    let offsets = order.expert_offsets.to_vec1::<u32>()?;
    let num_rows = offsets.last().map_or(0, |&total| total as usize);
    let len = checked_product(OP, ("num_rows", num_rows), ("hidden_size", hidden_size))?;
    let mut rows = try_filled(OP, 0f32, len)?;
    let round = rounding(hidden.dtype());
    let hidden = hidden.to_dtype(DType::F32)?;
    with_slice(&hidden, OP, "hidden", |hidden: &[f32]| {
        with_slice(&order.sorted_slots, OP, "sorted_slots", |slots: &[u32]| {
            let token = |place: usize| &hidden[slots[place] as usize / order.top_k() * hidden_size..][..hidden_size];
            let mut rest = rows.as_mut_slice();
            for wave in waves(&offsets) {
                let wave_rows: usize = wave.iter().map(|group| group.places.len()).sum();
                let (out, later) = rest.split_at_mut(wave_rows * hidden_size);
                rest = later;
                forward_wave(experts, &wave, &token, round, out)?;
            }
            Ok(())
        })
    })?;
    Tensor::from_vec(rows, (num_rows, hidden_size), &Device::Cpu)
}

/// Maps in order, over threads when there are at least [`MIN_PARALLEL`] multiplications to share.
fn map<T: Sync, R: Send>(items: &[T], multiplications: usize, f: impl Fn(&T) -> R + Send + Sync) -> Vec<R> {
    match multiplications < MIN_PARALLEL {
        true => items.iter().map(f).collect(),
        false => items.par_iter().map(f).collect(),
    }
}

/// Runs `f` on every row of `width` values, over threads when there are many values.
fn for_each_row(rows: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    match rows.len() < MIN_PARALLEL {
        true => rows.chunks_exact_mut(width.max(1)).enumerate().for_each(|(i, row)| f(i, row)),
        false => rows.par_chunks_exact_mut(width.max(1)).enumerate().for_each(|(i, row)| f(i, row)),
    }
}

/// Cuts the order into groups, and the groups into waves, both in order.
fn waves(offsets: &[u32]) -> Vec<Vec<Group>> {
    let mut waves: Vec<Vec<Group>> = Vec::new();
    let mut rows_in_wave = MAX_WAVE;
    for (expert, bounds) in offsets.windows(2).enumerate() {
        let (mut start, end) = (bounds[0] as usize, bounds[1] as usize);
        while start < end {
            let places = start..end.min(start + MAX_GROUP);
            start = places.end;
            if rows_in_wave + places.len() > MAX_WAVE {
                waves.push(Vec::new());
                rows_in_wave = 0;
            }
            rows_in_wave += places.len();
            if let Some(wave) = waves.last_mut() {
                wave.push(Group { expert, places });
            }
        }
    }
    waves
}

fn forward_wave<'a>(
    experts: &Experts,
    wave: &[Group],
    token: &(impl Fn(usize) -> &'a [f32] + Sync),
    round: fn(f32) -> f32,
    out: &mut [f32],
) -> Result<()> {
    let (gate_up, down) = (&experts.gate_up, &experts.down);
    let num_rows: usize = wave.iter().map(|group| group.places.len()).sum();
    let work = num_rows.saturating_mul(gate_up.weights.out_features().saturating_mul(gate_up.weights.in_features()));
    let inputs = map(wave, work, |group| {
        let tokens: Vec<_> = group.places.clone().map(token).collect();
        let value = |t: usize, i: usize| tokens[t][i];
        (group.expert, PackedTokens::pack(experts.hidden_size(), tokens.len(), value))
    });
    let products = grouped_product(&gate_up.weights, &inputs)?;
    let hidden = with_bias(gate_up, |bias| {
        let groups: Vec<_> = inputs.iter().zip(&products).collect();
        Ok(map(&groups, work, |((expert, input), product)| {
            let bias = bias.map(|bias| &bias[expert * gate_up.weights.out_features()..]);
            (*expert, activate(experts, input.num_tokens(), product, bias, round))
        }))
    })?;
    let products = grouped_product(&down.weights, &hidden)?;
    with_bias(down, |bias| {
        let hidden_size = experts.hidden_size();
        let mut rest = out;
        for ((expert, input), product) in hidden.iter().zip(&products) {
            let num_tokens = input.num_tokens();
            let (rows, later) = rest.split_at_mut(num_tokens * hidden_size);
            rest = later;
            let bias = bias.map(|bias| &bias[expert * hidden_size..]);
            transpose(product, num_tokens, bias, rows);
        }
        Ok(())
    })
}

/// The activation of one group: `product` is `[2 * intermediate_size, num_tokens]`.
fn activate(
    experts: &Experts,
    num_tokens: usize,
    product: &[f32],
    bias: Option<&[f32]>,
    round: fn(f32) -> f32,
) -> PackedTokens {
    let intermediate_size = experts.intermediate_size();
    let activation: Activation = experts.activation;
    let value = |row: usize, t: usize| product[row * num_tokens + t] + bias.map_or(0.0, |bias| bias[row]);
    PackedTokens::pack(intermediate_size, num_tokens, |t, j| {
        let (gate, up) = match experts.gate_up_rows {
            GateUpRows::Interleaved => (2 * j, 2 * j + 1),
            GateUpRows::Concatenated => (j, intermediate_size + j),
        };
        round(activation.apply(value(gate, t), value(up, t)))
    })
}

/// `rows[t] = product[.., t] + bias`; `product` is `[hidden_size, num_tokens]`.
fn transpose(product: &[f32], num_tokens: usize, bias: Option<&[f32]>, rows: &mut [f32]) {
    let hidden_size = product.len() / num_tokens.max(1);
    for_each_row(rows, hidden_size, |t, row| {
        for (j, value) in row.iter_mut().enumerate() {
            *value = product[j * num_tokens + t] + bias.map_or(0.0, |bias| bias[j]);
        }
    });
}

/// `hidden [num_tokens, in_features] x weight [1, out_features, in_features]`, plus bias, in float32 and rounded once to
/// the dtype of `hidden`: the same bits for a token whatever the batch.
pub(super) fn linear(projection: &ExpertProjection, hidden: &Tensor) -> Result<Tensor> {
    let weights = &projection.weights;
    let (num_tokens, out_features) = (hidden.dims()[0], weights.out_features());
    let len = checked_product(OP, ("num_tokens", num_tokens), ("out_features", out_features))?;
    let mut rows = try_filled(OP, 0f32, len)?;
    // A product that saturates belongs to sizes that only empty tensors have.
    let group_len = out_features.saturating_mul(MAX_GROUP).max(1);
    with_slice(&hidden.to_dtype(DType::F32)?, OP, "hidden", |hidden: &[f32]| {
        let in_features = weights.in_features();
        with_bias(projection, |bias| {
            for (group, rows) in rows.chunks_mut(group_len).enumerate() {
                let (first, tokens) = (group * MAX_GROUP, rows.len() / out_features);
                let input = PackedTokens::pack(in_features, tokens, |t, i| hidden[(first + t) * in_features + i]);
                let product = grouped_product(weights, &[(0, input)])?;
                transpose(&product[0], tokens, bias, rows);
            }
            Ok(())
        })
    })?;
    Tensor::from_vec(rows, (num_tokens, out_features), &Device::Cpu)?.to_dtype(hidden.dtype())
}

/// The product of each input with the matrix of its expert, `[out_features, num_tokens]` each.
fn grouped_product(weights: &ExpertWeights, inputs: &[(usize, PackedTokens)]) -> Result<Vec<Vec<f32>>> {
    let (out_features, in_features) = (weights.out_features(), weights.in_features());
    let zeros = |(_, input): &(usize, PackedTokens)| {
        let len = checked_product(OP, ("out_features", out_features), ("num_rows", input.num_tokens()))?;
        try_filled(OP, 0f32, len)
    };
    let mut products = inputs.iter().map(zeros).collect::<Result<Vec<_>>>()?;
    let rows_per_task = VALUES_PER_TASK.div_ceil(in_features.max(1));
    with_rows(weights, |all| {
        let mut tasks = Vec::new();
        for ((expert, input), product) in inputs.iter().zip(&mut products) {
            let band = rows_per_task * input.num_tokens();
            for (i, out) in product.chunks_mut(band.max(1)).enumerate() {
                let first = expert * out_features + i * rows_per_task;
                tasks.push((all.slice(first..first + out.len() / input.num_tokens(), in_features), input, out));
            }
        }
        let num_tokens: usize = inputs.iter().map(|(_, input)| input.num_tokens()).sum();
        match num_tokens.saturating_mul(out_features.saturating_mul(in_features)) < MIN_PARALLEL {
            true => tasks.into_iter().for_each(|(rows, input, out)| dot_rows(rows, input, out)),
            false => tasks.into_par_iter().for_each(|(rows, input, out)| dot_rows(rows, input, out)),
        }
        Ok(())
    })?;
    Ok(products)
}

/// Runs `f` on all weight rows of all local experts.
fn with_rows<R>(weights: &ExpertWeights, f: impl FnOnce(WeightRows<'_>) -> Result<R>) -> Result<R> {
    match &weights.values {
        Values::Dense(weight) => {
            let (storage, layout) = weight.storage_and_layout();
            let (start, len) = (layout.start_offset(), layout.shape().elem_count());
            match &*storage {
                Storage::Cpu(CpuStorage::F32(w)) => f(WeightRows::F32(&w[start..start + len])),
                Storage::Cpu(CpuStorage::BF16(w)) => f(WeightRows::Bf16(&w[start..start + len])),
                Storage::Cpu(CpuStorage::F16(w)) => f(WeightRows::F16(&w[start..start + len])),
                _ => {
                    bail!("{OP}: weights are {:?} on {:?}, expected floats on the CPU", weight.dtype(), weight.device())
                }
            }
        }
        Values::Mxfp4 { blocks, scales, .. } => with_slice(blocks, OP, "blocks", |blocks: &[u8]| {
            with_slice(scales, OP, "scales", |scales: &[u8]| f(WeightRows::Mxfp4 { blocks, scales }))
        }),
        Values::Fp8 { values, scales } => with_slice(values, OP, "values", |values: &[u8]| {
            with_slice(scales, OP, "scales", |scales: &[f32]| f(WeightRows::Fp8 { values, scales }))
        }),
        #[cfg(feature = "cuda")]
        Values::Fragments(_) => bail!("{OP}: weights are on a CUDA device, expected the CPU"),
    }
}

fn with_bias<R>(projection: &ExpertProjection, f: impl FnOnce(Option<&[f32]>) -> Result<R>) -> Result<R> {
    match &projection.bias {
        None => f(None),
        Some(bias) => with_slice(bias, OP, "bias", |bias: &[f32]| f(Some(bias))),
    }
}

fn rounding(dtype: DType) -> fn(f32) -> f32 {
    match dtype {
        DType::BF16 => |x| bf16::from_f32(x).to_f32(),
        DType::F16 => |x| f16::from_f32(x).to_f32(),
        _ => |x| x,
    }
}

pub(super) fn weighted_sum(rows: &Tensor, topk_weights: &Tensor, order: &ExpertOrder) -> Result<Tensor> {
    let &[num_rows, hidden_size] = rows.dims() else {
        bail!("{OP}: rows has shape {:?}, expected [num_rows, hidden_size]", rows.shape())
    };
    let num_used = order.expert_offsets.to_vec1::<u32>()?.last().map_or(0, |&total| total as usize);
    if num_rows != num_used {
        bail!("{OP}: rows has {num_rows} rows, expected the {num_used} of the order")
    }
    let (num_tokens, top_k) = (order.num_tokens(), order.top_k());
    let len = checked_product(OP, ("num_tokens", num_tokens), ("hidden_size", hidden_size))?;
    let mut sums = try_filled(OP, 0f32, len)?;
    with_slice(rows, OP, "rows", |rows: &[f32]| {
        with_slice(topk_weights, OP, "topk_weights", |weights: &[f32]| {
            with_slice(&order.slot_rank, OP, "slot_rank", |rank: &[u32]| {
                for_each_row(&mut sums, hidden_size, |token, sum| {
                    for slot in token * top_k..(token + 1) * top_k {
                        if rank[slot] != NO_SLOT {
                            let row = &rows[rank[slot] as usize * hidden_size..][..hidden_size];
                            sum.iter_mut().zip(row).for_each(|(s, r)| *s += weights[slot] * r);
                        }
                    }
                });
                Ok(())
            })
        })
    })?;
    Tensor::from_vec(sums, (num_tokens, hidden_size), &Device::Cpu)
}
