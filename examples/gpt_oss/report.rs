//! What was generated and who did how much work, for people and for programs.

use crate::arguments::{Arguments, LaunchName, Plan};
use crate::common::report::{Column, OutputFormat, digits, joined, print, print_json, row, table};
use crate::run::Generation;
use crate::text::Text;
use anyhow::Result;
use candle_moe::block::Load;
use candle_moe::ep::Rebalancing;
use candle_moe::models::gpt_oss::Config;
use clap::ValueEnum;
use serde_json::{Value, json};
use std::fmt::Write;

const WARNING: &str = "perfect routing is for measuring: the generated tokens are meaningless";
/// Experts that a table shows; JSON has them all.
const MAX_EXPERTS: usize = 32;

pub(crate) struct Report<'a> {
    pub(crate) arguments: &'a Arguments,
    /// What the ranks are.
    pub(crate) launch: LaunchName,
    pub(crate) plan: &'a Plan,
    pub(crate) config: &'a Config,
    pub(crate) text: &'a Text,
    pub(crate) load_seconds: f64,
    /// Of the weights of all experts.
    pub(crate) expert_bytes: usize,
    /// The first layer's.
    pub(crate) strategy: String,
    pub(crate) main: Generation,
    /// The same tokens under the other routing.
    pub(crate) comparison: Option<Generation>,
    /// Layer by layer, the same tokens under learned routing, with experts placed by its load.
    pub(crate) placed: Option<Vec<Placed>>,
}

impl Report<'_> {
    pub(crate) fn print(&self) -> Result<()> {
        match self.arguments.output {
            OutputFormat::Table => print(self.for_people()?.trim_end()),
            OutputFormat::Json => print_json(&self.for_programs()?),
        }
    }

    fn reduction(&self) -> String {
        name(self.arguments.reduction)
    }

    fn expert_gb_per_second(&self) -> f64 {
        self.expert_bytes as f64 / 1e9 / self.load_seconds.max(1e-9)
    }

    fn for_programs(&self) -> Result<Value> {
        let comparison = match &self.comparison {
            None => Value::Null,
            Some(other) => json!({
                "perfect_router": other.perfect_router,
                "timing": timing(other, self.plan.prompt_ids.len()),
                "load": load(&other.load),
            }),
        };
        let mut timing = timing(&self.main, self.plan.prompt_ids.len());
        timing["load_seconds"] = self.load_seconds.into();
        timing["expert_bytes"] = self.expert_bytes.into();
        timing["expert_gb_per_second"] = self.expert_gb_per_second().into();
        Ok(json!({
            "model": self.arguments.model,
            "device": self.arguments.device.to_string(),
            "dtype": self.plan.options.dtype.as_str(),
            "ep_size": self.plan.options.ep_size,
            "launch": name(self.launch),
            "strategy": self.strategy,
            "reduction": self.reduction(),
            "perfect_router": self.main.perfect_router,
            "warning": self.main.perfect_router.then_some(WARNING),
            "prompt_ids": self.plan.prompt_ids,
            "generated_ids": self.main.generated_ids,
            "text": self.text.decode(&self.main.generated_ids)?,
            "timing": timing,
            "load": load(&self.main.load),
            "comparison": comparison,
            "placement": self.placement_for_programs(),
        }))
    }

    fn for_people(&self) -> Result<String> {
        let mut out = String::new();
        let (config, options, main) = (self.config, &self.plan.options, &self.main);
        writeln!(
            out,
            "{}: {} layers, {} experts, top-{}, hidden {}; read in {} s, {} GB/s of experts",
            self.arguments.model.file_name().unwrap_or_default().to_string_lossy(),
            config.num_layers,
            config.num_experts,
            config.top_k,
            config.hidden_size,
            digits(self.load_seconds),
            digits(self.expert_gb_per_second())
        )?;
        writeln!(
            out,
            "{} {}, {} ranks, {} strategy, {} routing, {} reduction",
            self.arguments.device,
            options.dtype.as_str(),
            options.ep_size,
            self.strategy,
            routing(main),
            self.reduction()
        )?;
        if main.perfect_router {
            writeln!(out, "WARNING: {WARNING}")?;
        }
        writeln!(out, "\nprompt ids     {}", joined(&self.plan.prompt_ids, MAX_EXPERTS, 0))?;
        writeln!(out, "generated ids  {}", joined(&main.generated_ids, MAX_EXPERTS, 0))?;
        match (self.text.decode(&main.generated_ids)?, self.text) {
            (Some(text), _) => writeln!(out, "text           {text:?}")?,
            (None, Text::IdsOnly(reason)) => writeln!(out, "text           none, token ids only: {reason}")?,
            (None, _) => (),
        }
        let mut runs = vec![main];
        runs.extend(&self.comparison);
        runs.sort_by_key(|run| run.perfect_router);
        writeln!(out, "\nspeed\n{}", self.speed_table(&runs))?;
        writeln!(out, "\nslots per rank, all layers, prompt and generation\n{}", self.rank_table(&runs))?;
        writeln!(out, "\nslots per rank, layer by layer\n{}", layer_table(&runs))?;
        writeln!(out, "\nslots per expert, all layers\n{}", self.expert_table(&runs))?;
        if let Some(table) = self.placement_table() {
            let physical_experts = self.arguments.physical_experts.unwrap_or_default();
            writeln!(
                out,
                "\nbusiest rank over mean, with up to {physical_experts} physical experts placed by this load\n{table}"
            )?;
        }
        if runs.iter().any(|run| run.perfect_router) {
            writeln!(out, "\nLearned is what the model chose; perfect is what even ranks would have had to do.")?;
            writeln!(out, "{}{}.", WARNING[..1].to_uppercase(), &WARNING[1..])?;
        }
        Ok(out)
    }

    fn placement_table(&self) -> Option<comfy_table::Table> {
        let columns = ["as it is", "expected", "placed", "physical experts"].map(Column::Number);
        let experts = Column::Text("experts of each rank");
        let mut table = table([Column::Text("layer")].into_iter().chain(columns).chain([experts]));
        for (layer, placed) in self.placed.as_ref()?.iter().enumerate() {
            let Rebalancing { placement, imbalance_before, imbalance_after } = &placed.rebalancing;
            let cells = [*imbalance_before, *imbalance_after, imbalance(&placed.slots_per_rank)];
            let cells = cells.map(|imbalance| format!("{imbalance:.3}"));
            let experts = [placement.num_physical().to_string(), placement.to_string()];
            table.add_row(row(std::iter::once(layer.to_string()).chain(cells).chain(experts)));
        }
        Some(table)
    }

    fn placement_for_programs(&self) -> Value {
        let Some(layers) = &self.placed else { return Value::Null };
        let layer = |(layer, placed): (usize, &Placed)| {
            json!({
                "layer": layer,
                "imbalance_before": placed.rebalancing.imbalance_before,
                "imbalance_expected": placed.rebalancing.imbalance_after,
                "imbalance_after": imbalance(&placed.slots_per_rank),
                "slots_per_rank": placed.slots_per_rank,
                "physical_to_expert": placed.rebalancing.placement.physical_to_expert(),
            })
        };
        layers.iter().enumerate().map(layer).collect()
    }

    fn speed_table(&self, runs: &[&Generation]) -> comfy_table::Table {
        let columns = ["prompt tokens", "prompt ms", "decode steps", "ms per step", "tokens/s"].map(Column::Number);
        let mut table = table([Column::Text("routing")].into_iter().chain(columns));
        for run in runs {
            table.add_row(row([
                routing(run).to_string(),
                self.plan.prompt_ids.len().to_string(),
                digits(run.prompt_seconds * 1e3),
                run.decode_steps.to_string(),
                digits(run.decode_seconds * 1e3 / run.decode_steps.max(1) as f64),
                digits(run.decode_steps as f64 / run.decode_seconds.max(1e-9)),
            ]));
        }
        table
    }

    fn rank_table(&self, runs: &[&Generation]) -> comfy_table::Table {
        let columns = runs.iter().flat_map(|run| [Column::Number(routing(run)), Column::Number("share")]);
        let mut table = table([Column::Text("rank"), Column::Text("experts")].into_iter().chain(columns));
        let totals: Vec<_> = runs.iter().map(|run| total(&run.load, |load| &load.slots_per_rank)).collect();
        let mut first = 0;
        for rank in 0..self.plan.options.ep_size {
            let (experts, ranks) = (self.config.num_experts, self.plan.options.ep_size);
            let owned = experts / ranks + usize::from(rank < experts % ranks);
            let mut cells = vec![rank.to_string(), format!("{first}..{}", first + owned)];
            first += owned;
            for total in &totals {
                let sum = total.iter().sum::<u64>().max(1);
                cells.push(total[rank].to_string());
                cells.push(format!("{:.1} %", 100.0 * total[rank] as f64 / sum as f64));
            }
            table.add_row(row(cells));
        }
        let mut cells = vec!["max / mean".to_string(), String::new()];
        for total in &totals {
            cells.push(format!("{:.3}", imbalance(total)));
            cells.push(String::new());
        }
        table.add_row(row(cells));
        table
    }

    fn expert_table(&self, runs: &[&Generation]) -> comfy_table::Table {
        let columns = runs.iter().map(|run| Column::Number(routing(run)));
        let mut table = table([Column::Text("expert")].into_iter().chain(columns));
        let totals: Vec<_> = runs.iter().map(|run| total(&run.load, |load| &load.slots_per_expert)).collect();
        for expert in 0..self.config.num_experts.min(MAX_EXPERTS) {
            let cells = totals.iter().map(|total| total[expert].to_string());
            table.add_row(row(std::iter::once(expert.to_string()).chain(cells)));
        }
        if self.config.num_experts > MAX_EXPERTS {
            let hidden = format!("... {} more", self.config.num_experts - MAX_EXPERTS);
            table.add_row(row(std::iter::once(hidden).chain(totals.iter().map(|_| String::new()))));
        }
        let cells = totals.iter().map(|total| format!("{:.3}", imbalance(total)));
        table.add_row(row(std::iter::once("max / mean".to_string()).chain(cells)));
        table
    }
}

/// A layer whose experts were placed anew, and what its ranks had to do then.
pub(crate) struct Placed {
    rebalancing: Rebalancing,
    slots_per_rank: Vec<u64>,
}

impl Placed {
    /// `again` is the run with the placements of `layers`.
    pub(crate) fn layers(layers: Vec<Rebalancing>, again: &Generation) -> Vec<Self> {
        let layer = |(rebalancing, load): (Rebalancing, &Load)| Self {
            rebalancing,
            slots_per_rank: load.slots_per_rank.clone(),
        };
        layers.into_iter().zip(&again.load).map(layer).collect()
    }
}

fn layer_table(runs: &[&Generation]) -> comfy_table::Table {
    let columns = runs.iter().flat_map(|run| [Column::Text(routing(run)), Column::Number("max - min")]);
    let mut table = table([Column::Text("layer")].into_iter().chain(columns));
    let num_layers = runs.first().map_or(0, |run| run.load.len());
    for layer in 0..num_layers {
        let mut cells = vec![layer.to_string()];
        for run in runs {
            let slots = &run.load[layer].slots_per_rank;
            cells.push(joined(slots, 16, 0));
            cells.push(spread(slots).to_string());
        }
        table.add_row(row(cells));
    }
    table
}

/// As on the command line.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
}

fn routing(run: &Generation) -> &'static str {
    if run.perfect_router { "perfect" } else { "learned" }
}

fn total(layers: &[Load], slots: impl Fn(&Load) -> &Vec<u64>) -> Vec<u64> {
    let mut sum = vec![0; layers.first().map_or(0, |load| slots(load).len())];
    for load in layers {
        sum.iter_mut().zip(slots(load)).for_each(|(sum, slots)| *sum += slots);
    }
    sum
}

/// How much longer the busiest takes than if all did the same.
fn imbalance(slots: &[u64]) -> f64 {
    let mean = slots.iter().sum::<u64>() as f64 / slots.len().max(1) as f64;
    if mean == 0.0 { 1.0 } else { slots.iter().copied().max().unwrap_or(0) as f64 / mean }
}

fn spread(slots: &[u64]) -> u64 {
    slots.iter().max().unwrap_or(&0) - slots.iter().min().unwrap_or(&0)
}

fn timing(run: &Generation, prompt_tokens: usize) -> Value {
    json!({
        "prompt_seconds": run.prompt_seconds,
        "prompt_tokens_per_second": prompt_tokens as f64 / run.prompt_seconds.max(1e-9),
        "decode_steps": run.decode_steps,
        "decode_seconds": run.decode_seconds,
        "decode_tokens_per_second": run.decode_steps as f64 / run.decode_seconds.max(1e-9),
    })
}

fn load(layers: &[Load]) -> Value {
    let layer = |(layer, load): (usize, &Load)| {
        json!({
            "layer": layer,
            "slots_per_rank": load.slots_per_rank,
            "slots_per_expert": load.slots_per_expert,
            "max_minus_min_per_rank": spread(&load.slots_per_rank),
        })
    };
    layers.iter().enumerate().map(layer).collect()
}
