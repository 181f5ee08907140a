//! Whole layers on a CUDA device: router logits to routing, expert order and the weighted sum of the experts.
//!
//! The gate, a small matrix product before it, is not included. The calls of a graph take several layers in turn, which have
//! the same weights at different addresses, so that a call does not find them in the L2 cache. With several ranks that share
//! the experts, a call is that of the busiest rank: it has the tokens of all ranks and a share of the experts, and its
//! communication is not included.

use super::report::{Breakdown, LayerRow, Metadata};
use super::{Bench, cuda};
use crate::common::random::Random;
use crate::common::report::BadArguments;
use crate::common::stats::Summary;
use crate::workload::{Choice, Profile, WeightFormat};
use crate::{Args, PROFILES, Part, ProfileName};
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use candle_moe::ep::Topology;
use candle_moe::experts::Experts;
use candle_moe::order::{OrderOptions, RoutedOrder};
use candle_moe::perfect_router::{PerfectRouterKey, PerfectRouterStore, Plan, Schedule};
use candle_moe::routing::Router;
use indicatif::ProgressBar;
use std::ops::Range;

/// Layers at most, where a quarter of the free memory holds them.
const MAX_LAYERS: usize = 4;
/// Experts whose values are drawn; the others repeat them.
const DISTINCT_EXPERTS: usize = 4;
/// Tokens of all ranks together that are measured without being asked for.
const MAX_TOKENS: usize = 8192;
/// Calls of a graph. At few tokens so many, or as many as samples are asked for, that different choices even out and starting
/// the graph does not count.
const CALLS: usize = 4;
const CALLS_OF_FEW: usize = 16;
const FEW_TOKENS: usize = 64;
/// Rows that logits and hidden states have beyond the longest call, so that every call has others.
const SPARE_ROWS: usize = FEW_TOKENS * CALLS_OF_FEW;
/// Ranks of DeepSeek-V3, unless asked for.
const DEEPSEEK_RANKS: usize = 8;

/// What the arguments say about layers.
pub(super) struct Options {
    profiles: Vec<(ProfileName, Profile)>,
    /// Whether profiles that do not fit are left out.
    all: bool,
    ep_sizes: Vec<usize>,
    num_tokens: Vec<usize>,
    weights: WeightFormat,
    schedule: Schedule,
    skew: f32,
}

impl Options {
    pub(super) fn new(args: &Args) -> Result<Self, BadArguments> {
        let all = args.profile.is_empty() || args.profile.contains(&ProfileName::All);
        let asked = |name| args.profile.contains(&name) || (all && name != ProfileName::Tiny);
        let options = Self {
            profiles: PROFILES.into_iter().filter(|(name, _)| asked(*name)).collect(),
            all,
            ep_sizes: args.ep_size.iter().map(|n| n.get()).collect(),
            num_tokens: args.num_tokens.iter().map(|n| n.get()).collect(),
            weights: args.weights,
            schedule: args.schedule,
            skew: args.skew,
        };
        for (ep_size, (_, profile)) in options.cases() {
            if profile.num_experts % ep_size != 0 {
                let Profile { name, num_experts, .. } = profile;
                let text = format!("profile {name} has {num_experts} experts; choose an --ep-size that divides them");
                return Err(BadArguments(text));
            }
        }
        Ok(options)
    }

    /// Ranks and profiles.
    fn cases(&self) -> impl Iterator<Item = (usize, &(ProfileName, Profile))> {
        self.profiles.iter().flat_map(|case| {
            let usual = if case.0 == ProfileName::DeepSeekV3 { DEEPSEEK_RANKS } else { 1 };
            let ep_sizes = if self.ep_sizes.is_empty() { vec![usual] } else { self.ep_sizes.clone() };
            ep_sizes.into_iter().map(move |ep_size| (ep_size, case))
        })
    }

    /// On each rank.
    fn token_counts(&self, ep_size: usize) -> Vec<usize> {
        let usual = |power: &usize| power * ep_size <= MAX_TOKENS;
        match &self.num_tokens[..] {
            [] => (0..).map(|power| 1 << power).take_while(usual).collect(),
            asked => asked.to_vec(),
        }
    }

    /// Rows of the result.
    pub(super) fn num_rows(&self) -> usize {
        self.cases().map(|(ep_size, _)| 2 * self.token_counts(ep_size).len()).sum()
    }

    pub(super) fn run(&self, bench: &Bench, metadata: &Metadata, bar: &ProgressBar) -> Result<Vec<LayerRow>> {
        let mut rows = Vec::new();
        for (ep_size, (_, profile)) in self.cases() {
            bar.set_message(format!("{}: weights", profile.name));
            let token_counts = self.token_counts(ep_size);
            let most = token_counts.iter().copied().max().unwrap_or(0);
            let Some(num_layers) = self.num_layers(bench, profile, ep_size, most)? else { continue };
            let workload = Workload::new(bench, metadata, self, *profile, ep_size, most, num_layers)?;
            for &num_tokens in &token_counts {
                for choice in [Choice::Random, Choice::Perfect] {
                    bar.set_message(format!("{}: {} routing, {num_tokens} tokens", profile.name, choice.name()));
                    rows.push(workload.row(choice, num_tokens)?);
                    bar.inc(1);
                }
            }
        }
        Ok(rows)
    }

    /// As many layers as fit. Where not even one does, an error, or nothing for a profile that was not asked for by its name.
    fn num_layers(&self, bench: &Bench, profile: &Profile, ep_size: usize, most: usize) -> Result<Option<usize>> {
        let free = cuda(&bench.device)?.cuda_stream().context().mem_get_info().map_or(usize::MAX, |(free, _)| free);
        let layer = self.weights.expert_bytes(profile) * (profile.num_experts / ep_size);
        // Hidden states and the result; for each slot a row between the projections, and one behind them in float32.
        let Profile { hidden_size, intermediate_size, top_k, .. } = *profile;
        let per_token = 4 * hidden_size + top_k * (2 * intermediate_size + 4 * hidden_size);
        let work = most.saturating_mul(ep_size).saturating_mul(per_token);
        let roomy = free / 4 / layer;
        let fitting = free.saturating_sub(work) / layer;
        match fitting.min(roomy.max(2)).min(MAX_LAYERS) {
            0 if self.all => Ok(None),
            0 => {
                let text = format!(
                    "profile {} with {most} tokens needs about {:.1} GB on the device and {:.1} GB are free; choose fewer \
                     --num-tokens, a larger --ep-size or a smaller --profile",
                    profile.name,
                    layer.saturating_add(work) as f64 / 1e9,
                    free as f64 / 1e9
                );
                Err(BadArguments(text).into())
            }
            layers => Ok(Some(layers)),
        }
    }
}

/// The layers of a profile, and what their calls work on.
struct Workload<'a> {
    bench: &'a Bench,
    metadata: &'a Metadata,
    profile: Profile,
    weights: WeightFormat,
    schedule: Schedule,
    ep_size: usize,
    layers: Vec<Experts>,
    router: Router,
    /// Of each rank, under perfect routing.
    plans: Vec<Plan>,
    /// Rows that calls take some of.
    hidden: Tensor,
    logits: Tensor,
}

/// What one call works on.
struct Call {
    layer: usize,
    hidden: Tensor,
    logits: Tensor,
    /// Memory for what comes out, as a block has it before it routes.
    sums: Tensor,
    share: Share,
}

/// What a rank has to do in a call.
struct Share {
    local_experts: Range<usize>,
    slots: usize,
    /// Experts that have a slot.
    touched: usize,
}

impl<'a> Workload<'a> {
    fn new(
        bench: &'a Bench,
        metadata: &'a Metadata,
        options: &Options,
        profile: Profile,
        ep_size: usize,
        most: usize,
        num_layers: usize,
    ) -> Result<Self> {
        let Profile { num_experts, hidden_size, top_k, method, .. } = profile;
        let (mut random, dtype) = (Random::new(bench.seed), bench.precision.dtype());
        let experts = random.experts(&profile, options.weights, num_experts / ep_size, DISTINCT_EXPERTS)?;
        let layers = (0..num_layers).map(|_| experts.to_device(&bench.device)).collect::<candle_core::Result<_>>()?;
        drop(experts);
        let mut router = Router::new(method, top_k)?;
        if method.takes_selection_bias() {
            router = router.with_selection_bias(&random.floats(&[num_experts], 0.1, DType::F32)?)?;
        }
        let rows = most * ep_size + SPARE_ROWS;
        let on_device = |tensor: Tensor| tensor.to_dtype(dtype)?.to_device(&bench.device);
        let deviation = 3f32.sqrt();
        let preference = random.floats(&[1, num_experts], options.skew * deviation, DType::F32)?;
        let logits = random.floats(&[rows, num_experts], 1.5 * deviation, DType::F32)?.broadcast_add(&preference)?;
        Ok(Self {
            bench,
            metadata,
            profile,
            weights: options.weights,
            schedule: options.schedule,
            ep_size,
            layers,
            router,
            plans: (0..ep_size).map(|rank| profile.plan(ep_size, rank)).collect::<candle_core::Result<_>>()?,
            hidden: on_device(random.many_floats(&[rows, hidden_size], 1.0)?)?,
            logits: on_device(logits)?,
        })
    }

    fn row(&self, choice: Choice, num_tokens: usize) -> Result<LayerRow> {
        let Profile { name, num_experts, top_k, hidden_size, intermediate_size, .. } = self.profile;
        let calls = self.calls(choice, num_tokens)?;
        let what = || format!("{name}, {} routing, {num_tokens} tokens", choice.name());
        let seconds =
            self.time(&calls, |call| self.layer(&calls[call], &self.order(&calls[call])?)).with_context(what)?;
        let breakdown = self.breakdown(&calls).with_context(what)?;
        let Summary { median, p10, p90, count, .. } = seconds.scaled(1e6);
        let mean = |of: fn(&Share) -> usize| {
            calls.iter().map(|call| of(&call.share)).sum::<usize>() as f64 / calls.len() as f64
        };
        let (slots, touched) = (mean(|share| share.slots), mean(|share| share.touched));
        let floor_us = calls.iter().map(|call| self.floor_us(&call.share)).sum::<f64>() / calls.len() as f64;
        Ok(LayerRow {
            part: Part::Layer,
            profile: name,
            weights: self.weights.name(),
            method: self.router.method().to_string(),
            hidden_size,
            intermediate_size,
            num_experts,
            top_k,
            ep_size: self.ep_size,
            num_layers: self.layers.len(),
            routing: choice.name(),
            num_tokens,
            calls: calls.len(),
            iterations: count,
            median_us: median,
            p10_us: p10,
            p90_us: p90,
            slots,
            mean_slots: (num_tokens * top_k) as f64,
            distinct_experts: touched,
            bytes: touched * self.layers[0].bytes_per_expert() as f64,
            flops: slots * self.profile.flops_per_slot(),
            floor_us,
            floor_ratio: floor_us / median,
            breakdown,
        })
    }

    fn breakdown(&self, calls: &[Call]) -> Result<Breakdown> {
        let orders = calls.iter().map(|call| self.order(call)).collect::<candle_core::Result<Vec<_>>>()?;
        let order = self.time(calls, |call| self.order(&calls[call]))?;
        let experts = self.time(calls, |call| self.layer(&calls[call], &orders[call]))?;
        Ok(Breakdown { routed_order_us: order.median * 1e6, experts_us: experts.median * 1e6 })
    }

    /// Seconds of a call, from replays of a graph of all of them.
    fn time<T>(&self, calls: &[Call], work: impl Fn(usize) -> candle_core::Result<T>) -> Result<Summary> {
        Ok(self.bench.replays(calls.len(), work)?.scaled(1.0 / calls.len() as f64))
    }

    /// Routing and order.
    fn order(&self, call: &Call) -> candle_core::Result<RoutedOrder> {
        let (num_tokens, dtype) = (call.hidden.dims()[0], call.hidden.dtype());
        let experts = &self.layers[call.layer];
        let options = OrderOptions {
            local_experts: Some(call.share.local_experts.clone()),
            tile_rows: experts.tile_rows(num_tokens, self.profile.top_k, dtype, &self.bench.device)?,
            ..Default::default()
        };
        RoutedOrder::new(&self.router, &call.logits, &options)
    }

    /// The experts and the weighted sum.
    fn layer(&self, call: &Call, routed: &RoutedOrder) -> candle_core::Result<()> {
        let RoutedOrder { routing, order, tiles } = routed;
        let (experts, weights) = (&self.layers[call.layer], &routing.topk_weights);
        experts.forward_weighted_to(&call.hidden, weights, order, tiles.as_ref(), &call.sums)
    }

    fn calls(&self, choice: Choice, num_tokens: usize) -> Result<Vec<Call>> {
        let all_tokens = num_tokens * self.ep_size;
        let calls_of_few = CALLS_OF_FEW.min(self.bench.budget.iterations).max(CALLS);
        let calls = if all_tokens <= FEW_TOKENS { calls_of_few } else { CALLS };
        let spare = self.logits.dims()[0] - all_tokens + 1;
        let of_call = |call: usize| {
            let first = call * all_tokens % spare;
            let logits = match choice {
                Choice::Random => self.logits.narrow(0, first, all_tokens)?,
                Choice::Perfect => self.planned_logits(call, num_tokens)?,
            };
            let hidden = self.hidden.narrow(0, first, all_tokens)?;
            Ok(Call {
                layer: call % self.layers.len(),
                sums: hidden.zeros_like()?,
                hidden,
                share: self.busiest(&logits)?,
                logits,
            })
        };
        (0..calls.next_multiple_of(self.layers.len())).map(of_call).collect()
    }

    /// Of the tokens of all ranks, in rank order.
    fn planned_logits(&self, call: usize, num_tokens: usize) -> Result<Tensor> {
        let token_counts = vec![num_tokens; self.ep_size];
        let of_rank = |rank| {
            let (sender, first) = self.schedule.start(rank, &token_counts);
            let key = PerfectRouterKey { plan: self.plans[sender].clone(), dtype: self.logits.dtype() };
            let first = first + call * num_tokens;
            PerfectRouterStore::global().logits_from(&key, first, num_tokens, &self.bench.device)
        };
        let logits = (0..self.ep_size).map(of_rank).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&logits, 0)?)
    }

    /// The share of the rank whose floor is highest, and among those of the one with the most slots.
    fn busiest(&self, logits: &Tensor) -> Result<Share> {
        let topk_ids = self.router.route(logits)?.topk_ids.flatten_all()?.to_vec1::<u32>()?;
        let mut loads = vec![0; self.profile.num_experts];
        topk_ids.into_iter().for_each(|expert| loads[expert as usize] += 1);
        let of_rank = |rank| -> Result<Share> {
            let local_experts = Topology::new(self.profile.num_experts, self.ep_size, rank)?.local_experts();
            let loads = &loads[local_experts.clone()];
            let touched = loads.iter().filter(|&&load| load > 0).count();
            Ok(Share { slots: loads.iter().sum(), touched, local_experts })
        };
        let shares = (0..self.ep_size).map(of_rank).collect::<Result<Vec<_>>>()?;
        let busier = |a: &Share, b: &Share| self.floor_us(a).total_cmp(&self.floor_us(b)).then(a.slots.cmp(&b.slots));
        shares.into_iter().max_by(busier).context("no rank")
    }

    /// The weights of the experts that have a slot at copy bandwidth, or the products at the rate of a large one, or an
    /// empty kernel, whichever is longest.
    fn floor_us(&self, share: &Share) -> f64 {
        let Metadata { copy_gb_per_s, matmul_tflop_per_s, empty_kernel_us, .. } = self.metadata;
        let bytes = share.touched * self.layers[0].bytes_per_expert();
        let flops = share.slots as f64 * self.profile.flops_per_slot();
        let copy_us = bytes as f64 / copy_gb_per_s / 1e3;
        let product_us = matmul_tflop_per_s.map_or(0.0, |rate| flops / rate / 1e6);
        copy_us.max(product_us).max(empty_kernel_us.unwrap_or(0.0))
    }
}
