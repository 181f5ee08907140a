//! What is measured: layers with random weights, and inputs that keep the weights out of the cache.

use crate::common::random::Random;
use candle_core::{DType, Device, Result, Shape, Tensor, WithDType};
use candle_moe::block::MoeBlock;
use candle_moe::ep::Topology;
use candle_moe::experts::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, Linear, MXFP4_BLOCK};
use candle_moe::perfect_router::{PerfectRouterConfig, Plan, Schedule};
use candle_moe::routing::{ExpertGroups, Router, RoutingMethod};
use half::bf16;
use rayon::prelude::*;
use std::collections::BTreeSet;

/// The sizes of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Profile {
    pub(crate) name: &'static str,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_experts: usize,
    pub(crate) top_k: usize,
    pub(crate) method: RoutingMethod,
    pub(crate) activation: Activation,
    /// Whether the experts have biases.
    pub(crate) expert_bias: bool,
}

/// Small enough for any machine.
pub(crate) const TINY: Profile =
    Profile { name: "tiny", hidden_size: 128, intermediate_size: 192, num_experts: 8, ..GPT_OSS_20B };
/// A layer of GPT-OSS 20B.
pub(crate) const GPT_OSS_20B: Profile = Profile {
    name: "gpt-oss-20b",
    hidden_size: 2880,
    intermediate_size: 2880,
    num_experts: 32,
    top_k: 4,
    method: RoutingMethod::Renormalize,
    activation: Activation::GPT_OSS,
    expert_bias: true,
};
/// A layer of GPT-OSS 120B.
pub(crate) const GPT_OSS_120B: Profile = Profile { name: "gpt-oss-120b", num_experts: 128, ..GPT_OSS_20B };
/// A layer of Qwen3-30B-A3B.
pub(crate) const QWEN3_30B_A3B: Profile = Profile {
    name: "qwen3-30b-a3b",
    hidden_size: 2048,
    intermediate_size: 768,
    num_experts: 128,
    top_k: 8,
    method: RoutingMethod::RenormalizeNaive,
    activation: Activation::Silu,
    expert_bias: false,
};
/// A layer of DeepSeek-V3 without its shared expert.
pub(crate) const DEEPSEEK_V3: Profile = Profile {
    name: "deepseek-v3",
    hidden_size: 7168,
    intermediate_size: 2048,
    num_experts: 256,
    top_k: 8,
    method: RoutingMethod::DeepSeekV3 {
        groups: ExpertGroups { num_groups: 8, topk_group: 4 },
        routed_scaling_factor: 2.5,
    },
    activation: Activation::Silu,
    expert_bias: false,
};

impl Profile {
    /// Multiplications and additions of the experts.
    pub(crate) fn flops(&self, num_tokens: usize) -> f64 {
        self.flops_per_slot() * (num_tokens * self.top_k) as f64
    }

    /// Multiplications and additions of one expert for one token.
    pub(crate) fn flops_per_slot(&self) -> f64 {
        6.0 * (self.hidden_size * self.intermediate_size) as f64
    }

    /// The plan that stands in for the gate on a rank.
    pub(crate) fn plan(&self, ep_size: usize, ep_rank: usize) -> Result<Plan> {
        Plan::new(self.num_experts, self.top_k, ep_size, ep_rank)?.with_groups(self.method.groups())
    }
}

/// How the experts' weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum WeightFormat {
    /// 4-bit values with a scale per 32, as GPT-OSS is published
    Mxfp4,
    /// Dense bfloat16
    Bf16,
}

impl WeightFormat {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mxfp4 => "mxfp4",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of a layer's experts, without biases.
    pub(crate) fn layer_bytes(self, profile: &Profile) -> usize {
        self.expert_bytes(profile) * profile.num_experts
    }

    /// Bytes of one expert, without biases.
    pub(crate) fn expert_bytes(self, profile: &Profile) -> usize {
        let values = 3 * profile.hidden_size * profile.intermediate_size;
        match self {
            Self::Mxfp4 => values / 2 + values / MXFP4_BLOCK,
            Self::Bf16 => values * 2,
        }
    }
}

impl Random {
    /// `len` values in parallel, eight from each number drawn: `make` turns a byte of it into a value.
    fn fill<T: Copy + Default + Send>(&mut self, len: usize, make: impl Fn(u8) -> T + Sync) -> Vec<T> {
        const PIECE: usize = 1 << 16;
        let seed = self.next();
        let mut values = vec![T::default(); len];
        values.par_chunks_mut(PIECE).enumerate().for_each(|(i, piece)| {
            let mut random = Self::new(seed.wrapping_add(i as u64).wrapping_mul(0xd134_2543_de82_ef95));
            for eight in piece.chunks_mut(8) {
                eight.iter_mut().zip(random.next().to_le_bytes()).for_each(|(value, byte)| *value = make(byte));
            }
        });
        values
    }

    /// As [`floats`](Self::floats), in float32, from few different numbers: fast.
    #[cfg(feature = "cuda")]
    pub(crate) fn many_floats(&mut self, shape: &[usize], scale: f32) -> Result<Tensor> {
        let value = |byte: u8| (f32::from(byte) / 127.5 - 1.0) * scale;
        Tensor::from_vec(self.fill(shape.iter().product(), value), shape, &Device::Cpu)
    }

    /// A matrix per expert; the values of the first `distinct` experts are repeated for the others.
    fn weights(
        &mut self,
        format: WeightFormat,
        distinct: usize,
        (num_experts, out_features, in_features): (usize, usize, usize),
    ) -> Result<ExpertWeights> {
        match format {
            WeightFormat::Mxfp4 => {
                let num_blocks = in_features / MXFP4_BLOCK;
                let blocks = self.fill(distinct * out_features * num_blocks * 16, |byte| byte);
                let blocks = repeated(blocks, (num_experts, out_features, num_blocks, 16))?;
                // 2^-9 to 2^-6: with values up to 6, weights of the size that models have.
                let scales = self.fill(distinct * out_features * num_blocks, |byte| 118 + byte % 4);
                ExpertWeights::mxfp4(blocks, repeated(scales, (num_experts, out_features, num_blocks))?)
            }
            WeightFormat::Bf16 => {
                let value = |byte: u8| bf16::from_f32((f32::from(byte) - 127.5) / 4096.0);
                let values = self.fill(distinct * out_features * in_features, value);
                ExpertWeights::dense(repeated(values, (num_experts, out_features, in_features))?)
            }
        }
    }

    /// `num_experts` experts of a layer, of which the first `distinct` are repeated for the others.
    pub(crate) fn experts(
        &mut self,
        profile: &Profile,
        format: WeightFormat,
        num_experts: usize,
        distinct: usize,
    ) -> Result<Experts> {
        let mut projection = |out_features, in_features| {
            let shape = (num_experts, out_features, in_features);
            let weights = self.weights(format, distinct.min(num_experts), shape)?;
            let bias = match profile.expert_bias {
                true => Some(self.floats(&[num_experts, out_features], 0.1, DType::F32)?),
                false => None,
            };
            ExpertProjection::new(weights, bias)
        };
        let (hidden, intermediate) = (profile.hidden_size, profile.intermediate_size);
        let (gate_up, down) = (projection(2 * intermediate, hidden)?, projection(hidden, intermediate)?);
        Experts::new(gate_up, down, GateUpRows::Interleaved, profile.activation)
    }
}

/// `values` again and again.
fn repeated<T: WithDType>(mut values: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let (first, len) = (values.len(), shape.elem_count());
    values.reserve_exact(len - first);
    while values.len() < len {
        values.extend_from_within(..first.min(len - values.len()));
    }
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// The gate of a layer and its experts, shard by shard.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) gate: Linear,
    pub(crate) router: Router,
    /// The experts of each rank.
    pub(crate) shards: Vec<Experts>,
}

/// What chooses the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The random gate, on random hidden states.
    Random,
    /// The perfect router.
    Perfect,
}

impl Choice {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Perfect => "perfect",
        }
    }
}

impl Layer {
    /// A layer over `ep_size` ranks; without experts where `with_experts` says so.
    pub(crate) fn random(
        profile: &Profile,
        format: WeightFormat,
        gate: Linear,
        ep_size: usize,
        with_experts: bool,
        random: &mut Random,
    ) -> Result<Self> {
        let mut shard = |rank| {
            let num_experts = Topology::new(profile.num_experts, ep_size, rank)?.local_experts().len();
            random.experts(profile, format, num_experts, num_experts)
        };
        Ok(Self {
            gate,
            router: Router::new(profile.method, profile.top_k)?,
            shards: (0..if with_experts { ep_size } else { 0 }).map(&mut shard).collect::<Result<_>>()?,
        })
    }

    /// Rank `rank`'s part of the layer; the weights are shared, not copied.
    pub(crate) fn block(&self, rank: usize, choice: Choice, schedule: Schedule) -> Result<MoeBlock> {
        MoeBlock::builder(self.gate.clone(), self.router.clone(), self.shards[rank].clone())
            .shard(self.shards.len(), rank)
            .perfect_router(choice == Choice::Perfect)
            .perfect_router_config(PerfectRouterConfig { schedule, imbalance: None })
            .build()
    }

    pub(crate) fn bytes_per_expert(&self) -> usize {
        self.shards[0].bytes_per_expert()
    }
}

/// Hidden states for one call and what the gate makes of them, for each rank.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) hidden: Vec<Tensor>,
    pub(crate) router_logits: Vec<Tensor>,
    /// Experts that any rank chose.
    pub(crate) experts: BTreeSet<usize>,
}

/// Inputs to rotate over, and the order to do it in.
#[derive(Debug)]
pub(crate) struct Inputs {
    inputs: Vec<Input>,
    sequence: Vec<usize>,
}

/// Calls before the rotation over the inputs starts anew.
const ROTATION: usize = 64;
/// Values of all hidden states together.
const MAX_VALUES: usize = 16 << 20;

impl Inputs {
    /// Random inputs, for single tokens ordered so that a call meets experts that were not used for as long as possible:
    /// their weights then come from memory and not from the cache, as they do in a model with many layers.
    pub(crate) fn random(
        profile: &Profile,
        layers: &[Layer],
        ep_size: usize,
        num_tokens: usize,
        dtype: DType,
        random: &mut Random,
    ) -> Result<Self> {
        let values = (num_tokens * profile.hidden_size * ep_size).max(1);
        let count = (MAX_VALUES / values).clamp(2, 256);
        let inputs = (0..count).map(|_| {
            let hidden = (0..ep_size)
                .map(|_| random.floats(&[num_tokens, profile.hidden_size], 1.0, dtype))
                .collect::<Result<Vec<_>>>()?;
            Input::new(&layers[0], hidden)
        });
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let sequence = rotation(&inputs, layers.len(), profile.num_experts);
        Ok(Self { inputs, sequence })
    }

    /// The input of call `call`.
    pub(crate) fn of_call(&self, call: usize) -> &Input {
        &self.inputs[self.sequence[call % ROTATION]]
    }

    /// How many experts a call touches, on average over the rotation.
    pub(crate) fn distinct_experts(&self) -> f64 {
        let touched = self.sequence.iter().map(|&input| self.inputs[input].experts.len());
        touched.sum::<usize>() as f64 / ROTATION as f64
    }
}

impl Input {
    fn new(layer: &Layer, hidden: Vec<Tensor>) -> Result<Self> {
        let router_logits = hidden.iter().map(|hidden| layer.gate.forward(hidden)).collect::<Result<Vec<_>>>()?;
        let mut experts = BTreeSet::new();
        for logits in &router_logits {
            let topk_ids = layer.router.route(logits)?.topk_ids;
            experts.extend(topk_ids.flatten_all()?.to_vec1::<u32>()?.into_iter().map(|id| id as usize));
        }
        Ok(Self { hidden, router_logits, experts })
    }
}

/// Greedily, for each call the input whose most recently used expert was used longest ago. Call `i` goes to layer
/// `i % num_layers`.
///
/// Inputs that touch different numbers of experts take turns instead: the choice would prefer those that touch few.
fn rotation(inputs: &[Input], num_layers: usize, num_experts: usize) -> Vec<usize> {
    if inputs.iter().any(|input| input.experts.len() != inputs[0].experts.len()) {
        return (0..ROTATION).map(|call| call % inputs.len()).collect();
    }
    let mut last_use = vec![vec![0; num_experts]; num_layers];
    let mut sequence = Vec::with_capacity(ROTATION);
    for call in 0..ROTATION {
        let last_use = &mut last_use[call % num_layers];
        let recent = |input: &Input| {
            let mut uses: Vec<_> = input.experts.iter().map(|&expert| last_use[expert]).collect();
            uses.sort_unstable_by(|a: &usize, b| b.cmp(a));
            uses
        };
        let best = (0..inputs.len()).min_by_key(|&input| recent(&inputs[input])).unwrap_or(0);
        inputs[best].experts.iter().for_each(|&expert| last_use[expert] = call + 1);
        sequence.push(best);
    }
    sequence
}

/// Calls over which touched experts are averaged at most.
const MAX_CALLS: usize = 256;

/// Experts that a call touches under perfect routing, on average over the calls of a period, or the first of them.
pub(crate) fn planned_experts(profile: &Profile, schedule: Schedule, ep_size: usize, num_tokens: usize) -> Result<f64> {
    let token_counts = vec![num_tokens; ep_size];
    let starts = (0..ep_size).map(|rank| schedule.start(rank, &token_counts));
    let plans =
        starts.map(|(sender, first)| Ok((profile.plan(ep_size, sender)?, first))).collect::<Result<Vec<_>>>()?;
    let period = plans[0].0.period();
    let calls = period.min(MAX_CALLS);
    let mut touched = 0;
    for call in 0..calls {
        let mut experts = BTreeSet::new();
        for (plan, first) in &plans {
            // Rows repeat after a period, so no call needs more of them.
            experts.extend(plan.topk_ids(first + call * num_tokens, num_tokens.min(period))?);
        }
        touched += experts.len();
    }
    Ok(touched as f64 / calls as f64)
}
