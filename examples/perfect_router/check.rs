//! Whether routing follows the plan, and whether the plan keeps what it promises.

use crate::senders::{Counts, Sender, Spread};
use anyhow::Result;
use candle_core::{DType, Device};
use candle_moe::perfect_router::{PerfectRouterKey, PerfectRouterStore, Plan, Schedule};
use candle_moe::routing::{ExpertGroups, Router, RoutingMethod};
use serde::Serialize;
use std::collections::BTreeSet;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Tokens that are routed at once.
const ROUTED_AT_ONCE: usize = 4096;

#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) passed: bool,
    /// The routing op chose the experts of the plan.
    routing: Vec<RoutingCheck>,
    /// The experts of each token are distinct and lie in as many groups as a token may use.
    tokens_are_valid: bool,
    /// The plan is the documented formula, where it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    formula: Option<bool>,
    /// At every step all senders have different receivers, where the plan promises it.
    #[serde(skip_serializing_if = "Option::is_none")]
    latin_square: Option<bool>,
    /// No sender's ranks were ever further apart than the bound, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    balanced_per_sender: Option<bool>,
    /// All senders together end within the bound, where their slots are one sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    balanced_together: Option<bool>,
}

#[derive(Debug, Serialize)]
struct RoutingCheck {
    dtype: &'static str,
    tokens: usize,
    mismatches: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_mismatch: Option<Mismatch>,
}

#[derive(Debug, Serialize)]
struct Mismatch {
    ep_rank: usize,
    token: usize,
    planned: Vec<u32>,
    chosen: Vec<u32>,
}

impl Check {
    /// Checks the senders `shown`, and all of them where they matter together.
    pub(crate) fn new(method: RoutingMethod, schedule: Schedule, shown: &[Sender], all: &[Sender]) -> Result<Self> {
        let plan = &all[0].plan;
        let rotated = schedule == Schedule::RankRotated;
        let bound = plan.balance().map(|balance| balance.max_minus_min);
        // A sender that begins in the middle of a plan sees the difference of two of its moments.
        let own_bound = bound.map(|bound| if rotated { bound } else { 2 * bound });
        let routing = DTYPES.map(|dtype| RoutingCheck::new(method, shown, dtype));
        let mut check = Self {
            passed: false,
            routing: routing.into_iter().collect::<Result<_>>()?,
            tokens_are_valid: shown
                .iter()
                .all(|sender| sender.tokens().all(|row| is_valid(row, plan, method.groups()))),
            formula: (rotated && is_formula(plan)).then(|| shown.iter().all(follows_formula)),
            latin_square: (rotated && promises_latin_square(plan)).then(|| is_latin_square(all)),
            balanced_per_sender: own_bound
                .map(|bound| shown.iter().all(|sender| sender.spreads.iter().all(|spread| *spread <= bound))),
            balanced_together: bound
                .filter(|_| !rotated)
                .map(|bound| Spread::of(&Counts::of_all(all).per_rank).max_minus_min <= bound),
        };
        let promises = [check.formula, check.latin_square, check.balanced_per_sender, check.balanced_together];
        check.passed = check.tokens_are_valid
            && check.routing.iter().all(|routing| routing.mismatches == 0)
            && promises.into_iter().all(|kept| kept.unwrap_or(true));
        Ok(check)
    }

    /// A line for each check: whether it held, and what it says.
    pub(crate) fn lines(&self) -> Vec<(bool, String)> {
        let mut lines = Vec::new();
        for RoutingCheck { dtype, tokens, mismatches, first_mismatch } in &self.routing {
            let mut text = format!(
                "routing the planned logits in {dtype} chooses the plan for {} of {tokens} tokens",
                tokens - mismatches
            );
            if let Some(Mismatch { ep_rank, token, planned, chosen }) = first_mismatch {
                text += &format!("; first: sender {ep_rank}, token {token}: planned {planned:?}, chosen {chosen:?}");
            }
            lines.push((*mismatches == 0, text));
        }
        lines.push((
            self.tokens_are_valid,
            "the experts of every token are distinct and in as many groups as it may use".into(),
        ));
        for (kept, text) in [
            (self.formula, "the plan is the documented formula"),
            (self.latin_square, "at every step all senders have different receivers"),
            (self.balanced_per_sender, "no sender's ranks were ever further apart than the bound allows"),
            (self.balanced_together, "all senders together leave the ranks within the bound"),
        ] {
            lines.extend(kept.map(|kept| (kept, text.to_string())));
        }
        lines
    }

    pub(crate) fn text(&self) -> String {
        let word = |good: bool| if good { "ok" } else { "FAILED" };
        let lines = self.lines().into_iter().map(|(good, text)| format!("\n  {:6}  {text}", word(good)));
        format!("Check: {}{}", word(self.passed), lines.collect::<String>())
    }
}

fn is_valid(row: &[u32], plan: &Plan, groups: ExpertGroups) -> bool {
    let size = (plan.num_experts() / groups.num_groups) as u32;
    let distinct: BTreeSet<_> = row.iter().collect();
    let used: BTreeSet<_> = row.iter().map(|expert| expert / size).collect();
    distinct.len() == row.len() && used.len() <= groups.topk_group
}

/// Whether the plan is the published formula: no groups, no hot spot, ranks of one length.
fn is_formula(plan: &Plan) -> bool {
    let flat = plan.groups() == ExpertGroups::ONE && plan.imbalance().is_none();
    flat && plan.num_experts().is_multiple_of(plan.ep_size())
}

/// The formula as its documentation states it, so that the check does not ask the code that it checks.
fn follows_formula(sender: &Sender) -> bool {
    let plan = &sender.plan;
    let experts_per_rank = plan.num_experts() / plan.ep_size();
    sender.topk_ids.iter().enumerate().all(|(slot, &expert)| {
        let g = slot + plan.ep_rank();
        let (receiver, local) = (g % plan.ep_size(), g / plan.ep_size() % experts_per_rank);
        expert as usize == receiver * experts_per_rank + local
    })
}

fn promises_latin_square(plan: &Plan) -> bool {
    let (ranks, groups) = (plan.ep_size(), plan.groups().num_groups);
    let nested = ranks.is_multiple_of(groups) || groups.is_multiple_of(ranks);
    let even = plan.num_experts().is_multiple_of(ranks);
    plan.balance().is_some() && (plan.groups() == ExpertGroups::ONE || (nested && even))
}

fn is_latin_square(all: &[Sender]) -> bool {
    let mut met = vec![usize::MAX; all.len()];
    let steps = all[0].receivers.len();
    (0..steps).all(|step| all.iter().all(|sender| std::mem::replace(&mut met[sender.receivers[step]], step) != step))
}

impl RoutingCheck {
    /// Routes the stored logits of `senders` and compares the chosen experts with the plan, as sets.
    fn new(method: RoutingMethod, senders: &[Sender], dtype: DType) -> Result<Self> {
        let store = PerfectRouterStore::new();
        let mut check = Self { dtype: dtype.as_str(), tokens: 0, mismatches: 0, first_mismatch: None };
        for sender in senders {
            let top_k = sender.plan.top_k();
            let key = PerfectRouterKey { plan: sender.plan.clone(), dtype };
            let router = Router::new(method, top_k)?;
            for (piece, planned) in sender.topk_ids.chunks(ROUTED_AT_ONCE * top_k).enumerate() {
                let first = piece * ROUTED_AT_ONCE;
                let logits =
                    store.logits_from(&key, sender.first_token + first, planned.len() / top_k, &Device::Cpu)?;
                let chosen = router.route(&logits)?.topk_ids.to_vec2::<u32>()?;
                for (i, (planned, chosen)) in planned.chunks(top_k).zip(chosen).enumerate() {
                    check.compare(sender.rank, first + i, planned, chosen);
                }
            }
        }
        Ok(check)
    }

    fn compare(&mut self, ep_rank: usize, token: usize, planned: &[u32], chosen: Vec<u32>) {
        self.tokens += 1;
        if planned.iter().collect::<BTreeSet<_>>() != chosen.iter().collect::<BTreeSet<_>>() {
            self.mismatches += 1;
            self.first_mismatch.get_or_insert_with(|| Mismatch { ep_rank, token, planned: planned.to_vec(), chosen });
        }
    }
}
