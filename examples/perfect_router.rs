//! Shows the plan of the perfect router: who gets what, how balanced it is, and that routing follows it.
//!
//! ```text
//! cargo run --release --example perfect_router -- --num-experts 256 --top-k 8 --ep-size 8 --num-tokens 128
//! ```
//!
//! The check routes the planned logits with the routing method in f32, f16 and bf16 and compares the chosen experts, as
//! sets, with the formula of the schedule; the program ends with exit code 1 if they differ.

// Each example uses its part of what they share.
#[allow(dead_code)]
mod common;

use anyhow::Result;
use candle_core::{DType, Device};
use candle_moe::perfect_router::{PerfectRouterKey, PerfectRouterStore, Plan};
use candle_moe::routing::{Router, RoutingMethod};
use clap::{Parser, ValueEnum};
use common::report::{
    BadArguments, Column, OutputFormat, Verdict, finish, joined, plain, print, print_json, row, table,
};
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::str::FromStr;

const NOTE: &str = "Perfect routing is for measuring: the output of a model that runs with it is meaningless.";
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Slots of all senders that still make a sensible report.
const MAX_SLOTS: usize = 1 << 26;
/// Tokens that are routed at once in the check.
const CHECKED_AT_ONCE: usize = 4096;

/// What tables show before they say "more".
const MAX_TABLE_ROWS: usize = 64;
const MAX_STEPS: usize = 16;
const MAX_SENDERS: usize = 16;
const MAX_SLOTS_IN_LINE: usize = 16;

/// Show the plan of the perfect router: who gets what, how balanced it is, and that routing follows it.
///
/// Perfect routing is for measuring: the output of a model that runs with it is meaningless.
#[derive(Debug, Parser)]
#[command(name = "perfect_router", allow_negative_numbers = true)]
struct Args {
    /// Experts of the layer, a multiple of --ep-size
    #[arg(long, alias = "num_experts", value_name = "N", default_value_t = 8)]
    num_experts: usize,
    /// Experts per token
    #[arg(long, alias = "top_k", value_name = "N", default_value_t = 2)]
    top_k: usize,
    /// Ranks that share the experts
    #[arg(long, alias = "ep_size", value_name = "N", default_value_t = 4)]
    ep_size: usize,
    /// The sender to show, or all of them
    #[arg(long, alias = "ep_rank", value_name = "N|all", default_value = "all")]
    ep_rank: Senders,
    /// Tokens of every sender
    #[arg(long, alias = "num_tokens", value_name = "N", default_value_t = 4)]
    num_tokens: usize,
    /// The routing method that the plan is checked with
    #[arg(long, value_name = "NAME", default_value = "Renormalize", value_parser = method)]
    method: RoutingMethod,
    /// How slots are dealt out
    #[arg(long, value_enum, default_value_t = ScheduleName::RankRotated)]
    schedule: ScheduleName,
    /// What to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    output: OutputFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum ScheduleName {
    /// Slot i of sender r goes to rank (i + r) mod ep_size
    #[value(alias = "rank_rotated")]
    RankRotated,
}

#[derive(Debug, Clone, Copy)]
enum Senders {
    All,
    One(usize),
}

impl FromStr for Senders {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text.eq_ignore_ascii_case("all") => Ok(Self::All),
            Ok(rank) => Ok(Self::One(rank)),
            Err(_) => Err("expected a rank (0, 1, ...) or all".into()),
        }
    }
}

fn method(name: &str) -> Result<RoutingMethod, String> {
    name.parse().map_err(|error| plain(&error))
}

fn main() -> ExitCode {
    finish(run(&Args::parse()))
}

fn run(args: &Args) -> Result<Verdict> {
    let report = Report::new(args)?;
    match args.output {
        OutputFormat::Json => print_json(&report)?,
        OutputFormat::Table => print(report.text())?,
    }
    Ok(if report.check.passed { Verdict::Passed } else { Verdict::Failed })
}

/// What the program found out; the JSON output as it is.
#[derive(Debug, Serialize)]
struct Report {
    note: &'static str,
    num_experts: usize,
    top_k: usize,
    ep_size: usize,
    /// The senders that are shown.
    ep_ranks: Vec<usize>,
    num_tokens: usize,
    method: &'static str,
    schedule: ScheduleName,
    /// Tokens after which the plan of a sender repeats.
    period: usize,
    /// Per sender `[num_tokens, top_k]`.
    topk_ids: BTreeMap<usize, Vec<Vec<usize>>>,
    /// Per sender the receiving rank of each slot, `[num_tokens * top_k]`.
    receivers: BTreeMap<usize, Vec<usize>>,
    balance: Balance,
    check: Check,
}

#[derive(Debug, Serialize)]
struct Balance {
    /// Over all `ep_size` senders, shown or not.
    all_senders: Load,
    per_sender: BTreeMap<usize, Load>,
}

#[derive(Debug, Serialize)]
struct Load {
    per_rank: Spread,
    per_expert: Spread,
}

/// Slots of each rank or expert.
#[derive(Debug, Serialize)]
struct Spread {
    counts: Vec<usize>,
    min: usize,
    max: usize,
    max_minus_min: usize,
}

#[derive(Debug, Serialize)]
struct Check {
    passed: bool,
    /// The routing op chose the experts of the formula.
    routing: Vec<RoutingCheck>,
    /// At every step all senders have different receivers.
    latin_square: bool,
    /// No sender loads two ranks, or two experts, with slot counts that differ by more than one.
    balanced_per_sender: bool,
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
    planned: Vec<usize>,
    chosen: Vec<usize>,
}

impl Report {
    fn new(args: &Args) -> Result<Self> {
        let &Args { num_experts, top_k, ep_size, num_tokens, .. } = args;
        let shown = match args.ep_rank {
            Senders::All => 0..ep_size,
            Senders::One(rank) => rank..rank.saturating_add(1),
        };
        // Rank 0 first, so that a fault of the sizes is named before one of the rank.
        for rank in [0, shown.start] {
            Plan::new(num_experts, top_k, ep_size, rank).map_err(|error| advice(args, &error))?;
        }
        let slots = num_tokens.checked_mul(top_k).and_then(|slots| slots.checked_mul(ep_size));
        if slots.is_none_or(|slots| slots > MAX_SLOTS) {
            let text = format!(
                "num_tokens is {num_tokens}, which makes more than {MAX_SLOTS} slots with top_k {top_k} and ep_size \
                 {ep_size}; ask for fewer tokens, the plan repeats after num_experts = {num_experts} slots"
            );
            return Err(BadArguments(text).into());
        }
        let plans = (0..ep_size)
            .map(|rank| Sender::new(Plan::new(num_experts, top_k, ep_size, rank)?, num_tokens))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let senders = &plans[shown.clone()];
        let per_sender: BTreeMap<_, _> = senders.iter().map(|plan| (plan.rank(), plan.load.spread())).collect();
        let mut all = Counts::new(num_experts, ep_size);
        plans.iter().for_each(|plan| all.add(&plan.load));
        Ok(Self {
            note: NOTE,
            num_experts,
            top_k,
            ep_size,
            ep_ranks: shown.collect(),
            num_tokens,
            method: args.method.name(),
            schedule: args.schedule,
            period: plans[0].plan.period(),
            topk_ids: senders.iter().map(|plan| (plan.rank(), plan.topk_ids.clone())).collect(),
            receivers: senders.iter().map(|plan| (plan.rank(), plan.receivers.clone())).collect(),
            check: Check::new(args.method, senders, &plans, &per_sender)?,
            balance: Balance { all_senders: all.spread(), per_sender },
        })
    }

    fn text(&self) -> String {
        let &Self { num_experts, top_k, ep_size, num_tokens, .. } = self;
        let mut sections = vec![format!(
            "Perfect router, rank-rotated schedule: {num_experts} experts, top-{top_k}, {ep_size} ranks with {} experts each, \
             {num_tokens} tokens per sender, method {}.\n{NOTE}",
            num_experts / ep_size,
            self.method
        )];
        sections.push(self.who_gets_what());
        sections.push(self.receivers_by_step());
        sections.push(self.balance_table());
        sections.push(self.check.text());
        sections.join("\n\n")
    }

    fn who_gets_what(&self) -> String {
        let mut table = table([
            Column::Number("sender"),
            Column::Number("token"),
            Column::Text("experts by slot"),
            Column::Text("receivers by slot"),
        ]);
        let width = |n: usize| n.saturating_sub(1).to_string().len();
        let per_sender = (MAX_TABLE_ROWS / self.ep_ranks.len().max(1)).max(2);
        let mut shown = 0;
        for (rank, tokens) in &self.topk_ids {
            let receivers = self.receivers[rank].chunks(self.top_k);
            for (token, (experts, receivers)) in tokens.iter().zip(receivers).enumerate().take(per_sender) {
                if shown == MAX_TABLE_ROWS {
                    break;
                }
                shown += 1;
                table.add_row(row([
                    rank.to_string(),
                    token.to_string(),
                    joined(experts, MAX_SLOTS_IN_LINE, width(self.num_experts)),
                    joined(receivers, MAX_SLOTS_IN_LINE, width(self.ep_size)),
                ]));
            }
        }
        let total = self.num_tokens * self.ep_ranks.len();
        format!("Who gets what\n{}{}", table.trim_fmt(), not_shown(total - shown, "rows"))
    }

    fn receivers_by_step(&self) -> String {
        let senders: Vec<_> = self.receivers.iter().take(MAX_SENDERS).collect();
        let names: Vec<_> = senders.iter().map(|(rank, _)| format!("sender {rank}")).collect();
        let mut table =
            table(std::iter::once(Column::Number("step")).chain(names.iter().map(|name| Column::Number(name))));
        let steps = self.num_tokens * self.top_k;
        for step in 0..steps.min(MAX_STEPS) {
            table.add_row(row(std::iter::once(step).chain(senders.iter().map(|(_, receivers)| receivers[step]))));
        }
        format!(
            "Receiver at each step (one slot of every sender)\n{}{}{}",
            table.trim_fmt(),
            not_shown(steps.saturating_sub(MAX_STEPS), "steps"),
            not_shown(self.receivers.len() - senders.len(), "senders"),
        )
    }

    fn balance_table(&self) -> String {
        let mut table = table([
            Column::Text("sent by"),
            Column::Text("to"),
            Column::Number("slots"),
            Column::Number("min"),
            Column::Number("max"),
            Column::Number("max - min"),
            Column::Text("slots of each"),
        ]);
        let mut add = |sender: &str, load: &Load| {
            for (to, spread) in [("ranks", &load.per_rank), ("experts", &load.per_expert)] {
                let Spread { counts, min, max, max_minus_min } = spread;
                let slots: usize = counts.iter().sum();
                let counts = joined(counts, MAX_SLOTS_IN_LINE, 1);
                table.add_row(row([
                    sender.to_string(),
                    to.to_string(),
                    slots.to_string(),
                    min.to_string(),
                    max.to_string(),
                    max_minus_min.to_string(),
                    counts,
                ]));
            }
        };
        add(&format!("all {} ranks", self.ep_size), &self.balance.all_senders);
        for (rank, load) in self.balance.per_sender.iter().take(MAX_SENDERS) {
            add(&format!("rank {rank}"), load);
        }
        let hidden = self.balance.per_sender.len().saturating_sub(MAX_SENDERS);
        format!("Balance\n{}{}", table.trim_fmt(), not_shown(hidden, "senders"))
    }
}

fn not_shown(hidden: usize, what: &str) -> String {
    if hidden == 0 { String::new() } else { format!("\n({hidden} more {what} not shown; --output json has all)") }
}

/// The library's error, and what to do next.
fn advice(args: &Args, error: &candle_core::Error) -> BadArguments {
    let &Args { num_experts, ep_size, .. } = args;
    let next = match args.ep_rank {
        _ if ep_size == 0 => "choose --ep-size 1 or more".into(),
        _ if num_experts == 0 || num_experts % ep_size != 0 => {
            let below = num_experts / ep_size * ep_size;
            let above = below + ep_size;
            let experts = if below == 0 { format!("{above}") } else { format!("{below} or {above}") };
            let fit = (1..=ep_size.min(num_experts)).rev().find(|&size| num_experts % size == 0);
            let size = fit.map_or(String::new(), |size| format!(", or --ep-size {size}"));
            format!("choose --num-experts {experts}{size}")
        }
        _ if args.top_k == 0 || args.top_k > num_experts => format!("choose --top-k from 1 to {num_experts}"),
        _ => format!("choose --ep-rank from 0 to {}, or all", ep_size - 1),
    };
    BadArguments(format!("{}; {next}", plain(error)))
}

/// The plan of one sender.
struct Sender {
    plan: Plan,
    topk_ids: Vec<Vec<usize>>,
    receivers: Vec<usize>,
    load: Counts,
}

struct Counts {
    per_rank: Vec<usize>,
    per_expert: Vec<usize>,
}

impl Sender {
    fn new(plan: Plan, num_tokens: usize) -> candle_core::Result<Self> {
        let ids: Vec<usize> = plan.topk_ids(0, num_tokens)?.into_iter().map(|id| id as usize).collect();
        let topk_ids: Vec<Vec<_>> = ids.chunks(plan.top_k()).map(<[_]>::to_vec).collect();
        let receivers: Vec<_> = ids.iter().map(|&id| plan.receiver(id as u32)).collect();
        let mut load = Counts::new(plan.num_experts(), plan.ep_size());
        topk_ids.iter().flatten().for_each(|&expert| load.per_expert[expert] += 1);
        receivers.iter().for_each(|&rank| load.per_rank[rank] += 1);
        Ok(Self { plan, topk_ids, receivers, load })
    }

    fn rank(&self) -> usize {
        self.plan.ep_rank()
    }
}

impl Counts {
    fn new(num_experts: usize, ep_size: usize) -> Self {
        Self { per_rank: vec![0; ep_size], per_expert: vec![0; num_experts] }
    }

    fn add(&mut self, other: &Self) {
        self.per_rank.iter_mut().zip(&other.per_rank).for_each(|(sum, count)| *sum += count);
        self.per_expert.iter_mut().zip(&other.per_expert).for_each(|(sum, count)| *sum += count);
    }

    fn spread(&self) -> Load {
        let spread = |counts: &[usize]| {
            let min = counts.iter().copied().min().unwrap_or(0);
            let max = counts.iter().copied().max().unwrap_or(0);
            Spread { counts: counts.to_vec(), min, max, max_minus_min: max - min }
        };
        Load { per_rank: spread(&self.per_rank), per_expert: spread(&self.per_expert) }
    }
}

impl Check {
    fn new(method: RoutingMethod, senders: &[Sender], plans: &[Sender], loads: &BTreeMap<usize, Load>) -> Result<Self> {
        let routing = DTYPES.map(|dtype| RoutingCheck::new(method, senders, dtype));
        let routing = routing.into_iter().collect::<Result<Vec<_>>>()?;
        let steps = plans[0].receivers.len();
        let mut met = vec![usize::MAX; plans.len()];
        let latin_square = (0..steps)
            .all(|step| plans.iter().all(|plan| std::mem::replace(&mut met[plan.receivers[step]], step) != step));
        let balanced_per_sender =
            loads.values().all(|load| load.per_rank.max_minus_min <= 1 && load.per_expert.max_minus_min <= 1);
        let passed = routing.iter().all(|check| check.mismatches == 0) && latin_square && balanced_per_sender;
        Ok(Self { passed, routing, latin_square, balanced_per_sender })
    }

    fn text(&self) -> String {
        let word = |good: bool| if good { "ok" } else { "FAILED" };
        let mut lines = vec![format!("Check: {}", word(self.passed))];
        for RoutingCheck { dtype, tokens, mismatches, first_mismatch } in &self.routing {
            lines.push(format!(
                "  {:6}  routing the planned logits in {dtype} chooses the plan for {} of {tokens} tokens",
                word(*mismatches == 0),
                tokens - mismatches
            ));
            if let Some(Mismatch { ep_rank, token, planned, chosen }) = first_mismatch {
                lines.push(format!(
                    "          first: sender {ep_rank}, token {token}: planned {planned:?}, chosen {chosen:?}"
                ));
            }
        }
        lines.push(format!("  {:6}  at every step all senders have different receivers", word(self.latin_square)));
        lines.push(format!(
            "  {:6}  no sender differs by more than one slot between ranks, or between experts",
            word(self.balanced_per_sender)
        ));
        lines.join("\n")
    }
}

impl RoutingCheck {
    /// Routes the stored logits of `senders` and compares the chosen experts with the formula.
    fn new(method: RoutingMethod, senders: &[Sender], dtype: DType) -> Result<Self> {
        let store = PerfectRouterStore::new();
        let mut check = Self { dtype: dtype.as_str(), tokens: 0, mismatches: 0, first_mismatch: None };
        for Sender { plan, topk_ids, .. } in senders {
            let key = PerfectRouterKey { plan: plan.clone(), dtype };
            let router = Router::new(method, plan.top_k())?;
            for first in (0..topk_ids.len()).step_by(CHECKED_AT_ONCE) {
                let num_tokens = CHECKED_AT_ONCE.min(topk_ids.len() - first);
                let logits = store.logits_from(&key, first, num_tokens, &Device::Cpu)?;
                let ids = router.route(&logits)?.topk_ids.to_vec2::<u32>()?;
                for (token, ids) in (first..).zip(ids) {
                    check.compare(plan, token, ids);
                }
            }
        }
        Ok(check)
    }

    fn compare(&mut self, plan: &Plan, token: usize, ids: Vec<u32>) {
        let slots = token * plan.top_k()..(token + 1) * plan.top_k();
        let planned: Vec<_> = slots.map(|slot| formula(plan, slot)).collect();
        let mut chosen: Vec<_> = ids.into_iter().map(|id| id as usize).collect();
        chosen.sort_unstable();
        let mut expected = planned.clone();
        expected.sort_unstable();
        self.tokens += 1;
        if chosen != expected {
            self.mismatches += 1;
            self.first_mismatch.get_or_insert(Mismatch { ep_rank: plan.ep_rank(), token, planned, chosen });
        }
    }
}

/// The rank-rotated schedule as its documentation states it, so that the check does not ask the code that it checks.
fn formula(schedule: &Plan, slot: usize) -> usize {
    let g = slot + schedule.ep_rank();
    let experts_per_rank = schedule.num_experts() / schedule.ep_size();
    let receiver = g % schedule.ep_size();
    let local = (g / schedule.ep_size()) % experts_per_rank;
    receiver * experts_per_rank + local
}
