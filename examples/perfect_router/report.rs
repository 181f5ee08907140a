//! What the program found out, for people and for programs.

use crate::arguments::Arguments;
use crate::check::Check;
use crate::common::report::{Column, digits, joined, row, table};
use crate::senders::{Counts, Load, Sender, Spread};
use anyhow::Result;
use candle_moe::perfect_router::{Hotspot, Imbalance};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const NOTE: &str =
    "Perfect routing is for measuring: the output of a model that runs with it is meaningless.";

/// What tables show before they say "more".
const MAX_TABLE_ROWS: usize = 64;
const MAX_STEPS: usize = 16;
const MAX_SENDERS: usize = 16;
const MAX_SLOTS_IN_LINE: usize = 16;

/// The JSON output as it is.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    note: &'static str,
    pub(crate) num_experts: usize,
    pub(crate) top_k: usize,
    pub(crate) ep_size: usize,
    /// The senders that are shown.
    pub(crate) ep_ranks: Vec<usize>,
    pub(crate) num_tokens: usize,
    pub(crate) method: String,
    pub(crate) schedule: &'static str,
    groups: Groups,
    /// A part of the tokens goes to one place.
    pub(crate) imbalance: Option<HotPlace>,
    /// Tokens after which the plan of a sender repeats.
    period: usize,
    /// What the plan promises of each sender.
    pub(crate) bound: Option<Bound>,
    /// Experts that all senders touch with their first token.
    pub(crate) experts_of_first_tokens: usize,
    /// Per sender `[num_tokens, top_k]`.
    topk_ids: BTreeMap<usize, Vec<Vec<u32>>>,
    /// Per sender the receiving rank of each slot, `[num_tokens * top_k]`.
    receivers: BTreeMap<usize, Vec<usize>>,
    pub(crate) balance: Balance,
    pub(crate) check: Check,
}

#[derive(Debug, Serialize)]
struct Groups {
    num_groups: usize,
    topk_group: usize,
}

#[derive(Debug, Serialize)]
pub(crate) struct HotPlace {
    hot: &'static str,
    index: usize,
    fraction: f32,
    seed: u64,
    /// The part of all slots that the place received.
    measured: f64,
    /// Of a rank, over many tokens and without groups.
    expected: f64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Bound {
    /// Tokens after which all ranks have received the same.
    pub(crate) round: usize,
    pub(crate) max_minus_min: usize,
    /// Whether no plan can have a smaller one.
    pub(crate) is_smallest: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Balance {
    /// Over all `ep_size` senders, shown or not.
    pub(crate) all_senders: Load,
    pub(crate) per_sender: BTreeMap<usize, Load>,
    /// The largest difference between two ranks after any token, of any sender that is shown.
    pub(crate) largest_max_minus_min: usize,
}

impl Report {
    pub(crate) fn new(arguments: &Arguments, senders: &[Sender]) -> Result<Self> {
        let &Arguments { num_experts, top_k, ep_size, num_tokens, method, schedule, .. } = arguments;
        let shown = &senders[arguments.shown()];
        let all = Counts::of_all(senders);
        let groups = method.groups();
        let first_tokens = senders.iter().flat_map(|sender| sender.tokens().next().unwrap_or_default());
        let plan = &senders[0].plan;
        Ok(Self {
            note: NOTE,
            num_experts,
            top_k,
            ep_size,
            ep_ranks: arguments.shown().collect(),
            num_tokens,
            method: method.to_string(),
            schedule: schedule.name(),
            groups: Groups { num_groups: groups.num_groups, topk_group: groups.topk_group },
            imbalance: arguments.imbalance()?.map(|imbalance| HotPlace::new(imbalance, &all, top_k)),
            period: plan.period(),
            bound: plan.balance().map(|balance| Bound {
                round: balance.round,
                max_minus_min: balance.max_minus_min,
                is_smallest: balance.is_smallest,
            }),
            experts_of_first_tokens: first_tokens.collect::<BTreeSet<_>>().len(),
            topk_ids: shown.iter().map(|s| (s.rank, s.tokens().map(<[u32]>::to_vec).collect())).collect(),
            receivers: shown.iter().map(|sender| (sender.rank, sender.receivers.clone())).collect(),
            check: Check::new(method, schedule, shown, senders)?,
            balance: Balance {
                all_senders: all.load(),
                per_sender: shown.iter().map(|sender| (sender.rank, sender.load.load())).collect(),
                largest_max_minus_min: shown.iter().flat_map(|s| s.spreads.iter().copied()).max().unwrap_or(0),
            },
        })
    }

    pub(crate) fn text(&self) -> String {
        let sections = [
            format!("{}\n{NOTE}", self.headline()),
            self.promise(),
            self.who_gets_what(),
            self.receivers_by_step(),
            self.balance_table(),
            self.check.text(),
        ];
        sections.join("\n\n")
    }

    pub(crate) fn headline(&self) -> String {
        let &Self { num_experts, top_k, ep_size, num_tokens, .. } = self;
        let (few, many) = (num_experts / ep_size, num_experts.div_ceil(ep_size));
        let each = if few == many { format!("{few}") } else { format!("{many} or {few}") };
        format!(
            "Perfect router, {} schedule: {num_experts} experts, top-{top_k}, {ep_size} ranks with {each} experts each, \
             {num_tokens} tokens per sender, method {}.",
            self.schedule, self.method
        )
    }

    pub(crate) fn promise(&self) -> String {
        let measured = self.balance.largest_max_minus_min;
        let first =
            format!("All senders together touch {} experts with their first token.", self.experts_of_first_tokens);
        match (&self.imbalance, &self.bound) {
            (Some(hot), _) => {
                let HotPlace { hot, index, fraction, seed, measured, expected } = hot;
                format!(
                    "Hot {hot} {index}: {} % of the tokens (seed {seed}). It received {} % of the slots; {} % are expected over \
                     many tokens without groups.",
                    fraction * 100.0,
                    digits(measured * 100.0),
                    digits(expected * 100.0)
                )
            }
            (None, Some(Bound { round, max_minus_min, is_smallest })) => format!(
                "The ranks that a sender loads are even after every {round} tokens of its plan and at most {max_minus_min} slots \
                 apart in between{}; measured: {measured}. {first}",
                if *is_smallest { ", the smallest difference that there can be" } else { "" }
            ),
            (None, None) => format!(
                "Ranks of different lengths cannot be even here: they are loaded in proportion to their experts. {first}"
            ),
        }
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

impl HotPlace {
    fn new(imbalance: Imbalance, all: &Counts, top_k: usize) -> Self {
        let Imbalance { hotspot, fraction, seed } = imbalance;
        let slots = all.per_rank.iter().sum::<usize>().max(1) as f64;
        let (hot, index, count, others, most) = match hotspot {
            Hotspot::Rank(rank) => ("rank", rank, all.per_rank[rank], 1.0 / all.per_rank.len() as f64, 1.0),
            Hotspot::Expert(expert) => {
                ("expert", expert, all.per_expert[expert], 1.0 / all.per_expert.len() as f64, 1.0 / top_k as f64)
            }
        };
        let part = f64::from(fraction);
        Self {
            hot,
            index,
            fraction,
            seed,
            measured: count as f64 / slots,
            expected: part * most + (1.0 - part) * others,
        }
    }
}

fn not_shown(hidden: usize, what: &str) -> String {
    if hidden == 0 { String::new() } else { format!("\n({hidden} more {what} not shown; --output json has all)") }
}
