//! What each sender sends, and how it adds up.

use candle_moe::perfect_router::Plan;
use serde::Serialize;

/// One sender's part of a plan.
pub(crate) struct Sender {
    pub(crate) rank: usize,
    pub(crate) plan: Plan,
    /// Where the sender stands in its plan.
    pub(crate) first_token: usize,
    /// `[num_tokens, top_k]`
    pub(crate) topk_ids: Vec<u32>,
    /// The receiving rank of each slot.
    pub(crate) receivers: Vec<usize>,
    /// The difference between two ranks, at most, after each token.
    pub(crate) spreads: Vec<usize>,
    pub(crate) load: Counts,
}

#[derive(Clone)]
pub(crate) struct Counts {
    pub(crate) per_rank: Vec<usize>,
    pub(crate) per_expert: Vec<usize>,
}

/// Slots of ranks and experts.
#[derive(Debug, Serialize)]
pub(crate) struct Load {
    pub(crate) per_rank: Spread,
    pub(crate) per_expert: Spread,
}

/// Slots of each rank or expert.
#[derive(Debug, Serialize)]
pub(crate) struct Spread {
    pub(crate) counts: Vec<usize>,
    pub(crate) min: usize,
    pub(crate) max: usize,
    pub(crate) max_minus_min: usize,
}

impl Sender {
    pub(crate) fn new(rank: usize, plan: Plan, first_token: usize, num_tokens: usize) -> candle_core::Result<Self> {
        let topk_ids = plan.topk_ids(first_token, num_tokens)?;
        let receivers: Vec<_> = topk_ids.iter().map(|&expert| plan.receiver(expert)).collect();
        let mut load = Counts::new(plan.num_experts(), plan.ep_size());
        let mut spreads = Vec::with_capacity(num_tokens);
        for row in topk_ids.chunks(plan.top_k()) {
            for &expert in row {
                load.per_expert[expert as usize] += 1;
                load.per_rank[plan.receiver(expert)] += 1;
            }
            spreads.push(Spread::of(&load.per_rank).max_minus_min);
        }
        Ok(Self { rank, plan, first_token, topk_ids, receivers, spreads, load })
    }

    /// The experts of each token.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = &[u32]> {
        self.topk_ids.chunks(self.plan.top_k())
    }
}

impl Counts {
    pub(crate) fn new(num_experts: usize, ep_size: usize) -> Self {
        Self { per_rank: vec![0; ep_size], per_expert: vec![0; num_experts] }
    }

    pub(crate) fn of_all(senders: &[Sender]) -> Self {
        let mut all = Self::new(senders[0].load.per_expert.len(), senders.len());
        for Sender { load, .. } in senders {
            all.per_rank.iter_mut().zip(&load.per_rank).for_each(|(sum, count)| *sum += count);
            all.per_expert.iter_mut().zip(&load.per_expert).for_each(|(sum, count)| *sum += count);
        }
        all
    }

    pub(crate) fn load(&self) -> Load {
        Load { per_rank: Spread::of(&self.per_rank), per_expert: Spread::of(&self.per_expert) }
    }
}

impl Spread {
    pub(crate) fn of(counts: &[usize]) -> Self {
        let min = counts.iter().copied().min().unwrap_or(0);
        let max = counts.iter().copied().max().unwrap_or(0);
        Self { counts: counts.to_vec(), min, max, max_minus_min: max - min }
    }
}
