//! Which tokens each rank holds, and where they go.
//!
//! Every rank works out its own from the seed; with tokens that all ranks hold, those of all ranks in rank order.

use crate::common::random::Random;
use crate::settings::Settings;
use candle_core::{DType, Device, Result, Tensor};
use candle_moe::perfect_router::{Hotspot, Imbalance, PerfectRouterKey, PerfectRouterStore, Plan};
use candle_moe::routing::{Router, Routing, RoutingMethod};
use serde::Serialize;

/// Added to the logits of hot experts, which are between -1 and 1 otherwise.
const HOT: f32 = 2.0;

/// How far from even the work is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// The same number of tokens everywhere, for experts that are drawn evenly.
    BalancedRandom,
    /// A part of the tokens goes to the experts of one rank.
    HotRank { hot_rank: usize, hot_fraction: f32 },
    /// A part of the tokens goes to one expert.
    HotExpert { hot_expert: usize, hot_fraction: f32 },
    /// Each rank holds more tokens than the one before, as many as otherwise in all.
    Ragged,
    /// One rank holds no tokens.
    ZeroRank { zero_rank: usize },
}

impl Workload {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::BalancedRandom => "balanced-random",
            Self::HotRank { .. } => "hot-rank",
            Self::HotExpert { .. } => "hot-expert",
            Self::Ragged => "ragged",
            Self::ZeroRank { .. } => "zero-rank",
        }
    }

    /// Tokens of each rank.
    pub(crate) fn token_counts(&self, ep_size: usize, local_batch_size: usize) -> Vec<usize> {
        let count = |rank| match self {
            Self::Ragged => {
                // In proportion to 1, 2, 3, ..., rounded so that the sum is right.
                let (total, parts) = ((ep_size * local_batch_size) as u128, (ep_size * (ep_size + 1)) as u128);
                let before = |rank: usize| (total * (rank * (rank + 1)) as u128 / parts) as usize;
                before(rank + 1) - before(rank)
            }
            Self::ZeroRank { zero_rank } if *zero_rank == rank => 0,
            _ => local_batch_size,
        };
        (0..ep_size).map(count).collect()
    }

    /// The hot spot and the part of the tokens that goes there.
    fn hotspot(&self) -> Option<(Hotspot, f32)> {
        match *self {
            Self::HotRank { hot_rank, hot_fraction } => Some((Hotspot::Rank(hot_rank), hot_fraction)),
            Self::HotExpert { hot_expert, hot_fraction } => Some((Hotspot::Expert(hot_expert), hot_fraction)),
            _ => None,
        }
    }
}

/// Tokens with their routing.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    /// `[num_tokens, hidden_size]`
    pub(crate) hidden: Tensor,
    pub(crate) routing: Routing,
}

/// No rows on `device`; Candle allocates nothing for no elements on CUDA.
pub(crate) fn nothing((_, width): (usize, usize), dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::zeros((1, width), dtype, device)?.narrow(0, 0, 0)
}

impl Tokens {
    /// A copy on `device`.
    pub(crate) fn to_device(&self, device: &Device) -> Result<Self> {
        let there = |tensor: &Tensor| match *tensor.dims() {
            [0, width] => nothing((0, width), tensor.dtype(), device),
            _ => tensor.to_device(device),
        };
        let Routing { topk_ids, topk_weights } = &self.routing;
        let routing = Routing { topk_ids: there(topk_ids)?, topk_weights: there(topk_weights)? };
        Ok(Self { hidden: there(&self.hidden)?, routing })
    }

    /// The tokens that rank `rank` holds.
    pub(crate) fn of_rank(settings: &Settings, local_batch_size: usize, rank: usize) -> Result<Self> {
        let counts = settings.workload.token_counts(settings.ep_size, local_batch_size);
        let num_tokens = counts[rank];
        let mut random = Random::new(settings.seed).part(local_batch_size as u64).part(rank as u64);
        let hidden = match num_tokens {
            0 => Tensor::zeros((0, settings.hidden_size), settings.dtype, &Device::Cpu)?,
            _ => random.floats(&[num_tokens, settings.hidden_size], 1.0, settings.dtype)?,
        };
        let router_logits = match settings.perfect_router {
            true => planned_logits(settings, rank, num_tokens)?,
            false => random_logits(settings, &mut random, num_tokens)?,
        };
        let router = Router::new(RoutingMethod::Renormalize, settings.top_k)?;
        Ok(Self { hidden, routing: router.route(&router_logits)? })
    }

    /// The tokens of all ranks.
    pub(crate) fn of_all_ranks(settings: &Settings, local_batch_size: usize) -> Result<Self> {
        let ranks = (0..settings.ep_size).map(|rank| Self::of_rank(settings, local_batch_size, rank));
        let ranks = ranks.collect::<Result<Vec<_>>>()?;
        let below_each_other = |of_rank: fn(&Self) -> &Tensor| -> Result<Tensor> {
            let filled: Vec<_> = ranks.iter().map(of_rank).filter(|tensor| tensor.elem_count() > 0).collect();
            match filled.as_slice() {
                [] => Ok(of_rank(&ranks[0]).clone()),
                filled => Tensor::cat(filled, 0),
            }
        };
        let hidden = below_each_other(|tokens| &tokens.hidden)?;
        let topk_ids = below_each_other(|tokens| &tokens.routing.topk_ids)?;
        let topk_weights = below_each_other(|tokens| &tokens.routing.topk_weights)?;
        Ok(Self { hidden, routing: Routing { topk_ids, topk_weights } })
    }
}

/// The plan that perfect routing follows on a rank.
pub(crate) fn plan(settings: &Settings, rank: usize) -> Result<Plan> {
    let plan = Plan::new(settings.num_experts, settings.top_k, settings.ep_size, rank)?;
    match settings.workload.hotspot() {
        Some((hotspot, fraction)) => plan.with_imbalance(Imbalance { hotspot, fraction, seed: settings.seed }),
        None => Ok(plan),
    }
}

fn planned_logits(settings: &Settings, rank: usize, num_tokens: usize) -> Result<Tensor> {
    let key = PerfectRouterKey { plan: plan(settings, rank)?, dtype: DType::F32 };
    PerfectRouterStore::global().logits(&key, num_tokens, &Device::Cpu)
}

fn random_logits(settings: &Settings, random: &mut Random, num_tokens: usize) -> Result<Tensor> {
    let num_experts = settings.num_experts;
    let mut logits = vec![0f32; num_tokens * num_experts];
    for row in logits.chunks_exact_mut(num_experts) {
        row.iter_mut().for_each(|logit| *logit = random.float());
        let Some((hotspot, fraction)) = settings.workload.hotspot() else { continue };
        if (random.float() + 1.0) / 2.0 < fraction {
            let hot = match hotspot {
                Hotspot::Rank(rank) => settings.placement.local(rank)?,
                Hotspot::Expert(expert) => expert..expert + 1,
            };
            row[hot].iter_mut().for_each(|logit| *logit += HOT);
        }
    }
    Tensor::from_vec(logits, (num_tokens, num_experts), &Device::Cpu)
}
