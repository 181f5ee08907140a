//! The plan of one sender.

#[cfg(feature = "cuda")]
use super::cuda::{DevicePlan, Kind};
use super::flat::Flat;
use super::greatest_common_divisor;
use super::imbalance::Imbalance;
use super::planner::Round;
use crate::host::{checked_product, try_filled};
use crate::partition::Partition;
use crate::routing::ExpertGroups;
use candle_core::{Result, bail};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

const OP: &str = "perfect-router";
/// Groups of a plan, and groups times ranks, so that working it out takes a bounded time.
const MAX_GROUPS: usize = 256;
const MAX_PAIRS: usize = 1 << 16;
/// Tokens after which a plan begins anew at the latest, so that the logits of any position fit memory.
const MAX_PERIOD: usize = 1 << 14;

/// Which experts each token of one sender goes to.
///
/// Row `t` of a plan does not depend on how many tokens there are. Rank `r` owns the experts that
/// [`Topology`](crate::ep::Topology) gives it: ranges in rank order whose lengths differ by at most one.
///
/// Without groups and with even ranks the plan is TensorRT-LLM's rank-rotated formula. For slot `i = token * top_k + k` and
/// `experts_per_rank = num_experts / ep_size`:
///
/// ```text
/// g        = i + ep_rank
/// receiver = g mod ep_size
/// local    = (g / ep_size) mod experts_per_rank
/// expert   = receiver * experts_per_rank + local
/// ```
///
/// Ranks of different lengths take their turn in the same way: `local` is then modulo the receiver's own experts. Any
/// consecutive slots of one sender load the receivers within one of each other, and the experts of a receiver too (unless
/// tokens have more slots than `ep_size` times the experts of the shorter ranks, which must give the longer ones more); at
/// each step the senders hit different receivers.
///
/// With [groups](Self::with_groups) a token's experts lie in `topk_group` groups, so one token reaches some ranks only, and
/// the [balance](Self::balance) is what that allows. For 256 experts, top-8, 8 groups, 4 of them:
///
/// | ranks | largest difference after any token | smallest that any plan can have | even after each | slots of a rank then |
/// | ---: | ---: | ---: | ---: | ---: |
/// | 1, 2, 4 | 0 | 0 | token | |
/// | 8 | 2 | 2 | 2 tokens | 2 |
/// | 16 | 1 | 1 | 2 tokens | 1 |
/// | 32 | 1 | 1 | 4 tokens | 1 |
/// | 64 | 1 | 1 | 8 tokens | 1 |
///
/// ```
/// use candle_moe::perfect_router::Plan;
/// let plan = Plan::new(8, 2, 4, 1)?;
/// assert_eq!(plan.topk_ids(0, 4)?, [2, 4, 6, 1, 3, 5, 7, 0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Plan {
    parameters: Parameters,
    rows: Rows,
}

/// What the rows follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Parameters {
    experts: Partition,
    top_k: usize,
    ep_rank: usize,
    /// [`ExpertGroups::ONE`] where they are no limit.
    groups: ExpertGroups,
    /// `None` where no token is hot.
    imbalance: Option<Imbalance>,
}

#[derive(Debug, Clone)]
enum Rows {
    Flat(Flat),
    Grouped(Arc<Round>),
}

/// How far apart the ranks are that a sender loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balance {
    /// Tokens after which all ranks have received the same number of slots, again and again.
    pub round: usize,
    /// The largest difference between the slots of two ranks, from the first token to any other; it is reached.
    pub max_minus_min: usize,
    /// Whether the first token alone makes it necessary, so that no plan has a smaller one. Where this is false there may be
    /// a plan with a smaller one.
    pub is_smallest: bool,
}

impl PartialEq for Plan {
    fn eq(&self, other: &Self) -> bool {
        self.parameters == other.parameters
    }
}

impl Eq for Plan {}

impl Hash for Plan {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parameters.hash(state);
    }
}

impl Plan {
    /// The plan of sender `ep_rank` among `ep_size`, without groups.
    ///
    /// # Errors
    /// `ep_size` is 0 or above `num_experts`, `num_experts` is above `u32::MAX`, `ep_rank >= ep_size`, `top_k` is outside
    /// `1..=num_experts`.
    pub fn new(num_experts: usize, top_k: usize, ep_size: usize, ep_rank: usize) -> Result<Self> {
        if ep_size == 0 {
            bail!("{OP}: ep_size is 0, expected at least 1")
        }
        if num_experts == 0 || num_experts > u32::MAX as usize {
            bail!("{OP}: num_experts is {num_experts}, expected 1 to {}", u32::MAX)
        }
        if ep_size > num_experts {
            bail!("{OP}: ep_size is {ep_size}, expected at most num_experts, which is {num_experts}")
        }
        if ep_rank >= ep_size {
            bail!("{OP}: ep_rank is {ep_rank}, expected less than ep_size, which is {ep_size}")
        }
        if top_k == 0 || top_k > num_experts {
            bail!("{OP}: top_k is {top_k}, expected 1 to num_experts, which is {num_experts}")
        }
        let experts = Partition { total: num_experts, parts: ep_size };
        let parameters = Parameters { experts, top_k, ep_rank, groups: ExpertGroups::ONE, imbalance: None };
        Ok(Self { parameters, rows: Rows::Flat(Flat::new(experts, top_k, ep_rank)) })
    }

    /// A plan whose tokens choose from `groups.topk_group` groups, so that grouped routing follows it.
    ///
    /// The plan is worked out here, once, in a time that depends on ranks and groups but not on tokens: about 0.1 ms for
    /// DeepSeek-V3 over 8 or 16 ranks, up to about a second where ranks and groups fit each other worst.
    ///
    /// # Errors
    /// Groups that do not fit `num_experts` and `top_k`; more than 256 groups, or 65536 pairs of a group and a rank.
    pub fn with_groups(self, groups: ExpertGroups) -> Result<Self> {
        let Parameters { experts, top_k, ep_rank, .. } = self.parameters;
        groups.check(OP, experts.total, top_k)?;
        if groups.is_limit() && groups.num_groups > MAX_GROUPS {
            bail!("{OP}: num_groups is {}, expected at most {MAX_GROUPS} to plan for", groups.num_groups)
        }
        let pairs = groups.num_groups.saturating_mul(experts.parts);
        if groups.is_limit() && pairs > MAX_PAIRS {
            bail!("{OP}: num_groups times ep_size is {pairs}, expected at most {MAX_PAIRS} to plan for")
        }
        let (groups, rows) = match groups.is_limit() {
            true => (groups, Rows::Grouped(Arc::new(Round::new(experts, groups, top_k, ep_rank)))),
            false => (ExpertGroups::ONE, Rows::Flat(Flat::new(experts, top_k, ep_rank))),
        };
        Ok(Self { parameters: Parameters { groups, ..self.parameters }, rows })
    }

    /// The plan with a hot spot.
    ///
    /// # Errors
    /// A fraction outside 0 to 1, a rank or expert that does not exist.
    pub fn with_imbalance(mut self, imbalance: Imbalance) -> Result<Self> {
        imbalance.check(OP, self.parameters.experts)?;
        self.parameters.imbalance = (imbalance.fraction > 0.0).then_some(imbalance);
        Ok(self)
    }

    /// Experts in all.
    pub fn num_experts(&self) -> usize {
        self.parameters.experts.total
    }

    /// Slots per token.
    pub fn top_k(&self) -> usize {
        self.parameters.top_k
    }

    /// Ranks.
    pub fn ep_size(&self) -> usize {
        self.parameters.experts.parts
    }

    /// The sender.
    pub fn ep_rank(&self) -> usize {
        self.parameters.ep_rank
    }

    /// The groups that tokens choose from; [`ExpertGroups::ONE`] where they are no limit.
    pub fn groups(&self) -> ExpertGroups {
        self.parameters.groups
    }

    /// The hot spot.
    pub fn imbalance(&self) -> Option<Imbalance> {
        self.parameters.imbalance
    }

    /// The rank that owns `expert`, of those below `num_experts`.
    pub fn receiver(&self, expert: u32) -> usize {
        self.parameters.experts.owner(expert as usize)
    }

    /// How far apart the ranks are that this sender loads. `None` where they drift apart: the plan has a hot spot, or no way
    /// was found to keep ranks even (which may not exist, where ranks have different lengths and tokens many slots); ranks
    /// are then loaded in proportion to their experts.
    pub fn balance(&self) -> Option<Balance> {
        if self.parameters.imbalance.is_some() {
            return None;
        }
        match &self.rows {
            Rows::Flat(flat) if flat.is_saturated() => None,
            Rows::Flat(flat) => {
                let round = flat.round();
                Some(Balance { round, max_minus_min: usize::from(round > 1), is_smallest: true })
            }
            Rows::Grouped(round) => round.balance(),
        }
    }

    /// The number of tokens after which the rows repeat, at most 16384 (or one round, if that is longer).
    ///
    /// A plan that could go on longer without repeating begins anew there, at the end of a round: the ranks stay as even as
    /// they were, but across the seam the experts of a rank may differ by one slot more.
    pub fn period(&self) -> usize {
        let (own, round) = match &self.rows {
            Rows::Flat(flat) => (flat.period(), flat.round()),
            Rows::Grouped(round) => (round.period(), round.num_tokens),
        };
        let whole = match self.parameters.imbalance {
            None => own,
            Some(_) => own.saturating_mul(Imbalance::PERIOD / greatest_common_divisor(own, Imbalance::PERIOD)),
        };
        if whole <= MAX_PERIOD { whole } else { (MAX_PERIOD / round).max(1) * round }
    }

    /// The experts of `num_tokens` tokens from `first_token` on, `[num_tokens, top_k]`: distinct for each token, in slot
    /// order.
    ///
    /// # Errors
    /// More slots than fit memory.
    pub fn topk_ids(&self, first_token: usize, num_tokens: usize) -> Result<Vec<u32>> {
        let top_k = self.parameters.top_k;
        let mut ids = try_filled(OP, 0, checked_product(OP, ("num_tokens", num_tokens), ("top_k", top_k))?)?;
        let period = self.period();
        let mut token = first_token % period;
        for row in ids.chunks_exact_mut(top_k) {
            self.write_row(token, row);
            token = if token + 1 == period { 0 } else { token + 1 };
        }
        Ok(ids)
    }

    /// What a kernel needs to write the first `num_tokens` rows.
    ///
    /// A hot spot is worked out here, token by token, since its turns are too many for a kernel that runs once.
    #[cfg(feature = "cuda")]
    pub(super) fn for_device(&self, num_tokens: usize) -> Result<DevicePlan> {
        if self.parameters.imbalance.is_some() {
            let slots = self.topk_ids(0, num_tokens.min(self.period()))?;
            return Ok(DevicePlan { kind: Kind::Listed, slots, cells: Vec::new() });
        }
        Ok(match &self.rows {
            Rows::Flat(flat) => DevicePlan {
                kind: Kind::Flat { slot_period: flat.period_in_slots(), is_saturated: flat.is_saturated() },
                slots: Vec::new(),
                cells: Vec::new(),
            },
            Rows::Grouped(round) => {
                let (slots, cells) = round.tables();
                DevicePlan { kind: Kind::Grouped { num_tokens: round.num_tokens }, slots, cells }
            }
        })
    }

    /// The experts of token `token`, which is below the period.
    pub(super) fn write_row(&self, token: usize, row: &mut [u32]) {
        match &self.rows {
            Rows::Flat(flat) => flat.write(token, row),
            Rows::Grouped(round) => round.write(token, row),
        }
        let Parameters { experts, ep_rank, groups, imbalance, .. } = self.parameters;
        if let Some(imbalance) = imbalance {
            imbalance.redirect(experts, groups, ep_rank, token, row);
        }
    }
}
