//! What was measured, for people and for programs.

use crate::common::report::{Column, digits, row, table};
use crate::html::Timed;
use crate::memory::Bandwidth;
use crate::{Part, Precision, part_name};
use clap::ValueEnum;
use serde::Serialize;

/// The JSON output as it is.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) metadata: Metadata,
    pub(crate) rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Metadata {
    pub(crate) bench: &'static str,
    pub(crate) crate_version: &'static str,
    pub(crate) device: &'static str,
    /// Where the system says so.
    pub(crate) cpu_model: Option<String>,
    pub(crate) threads: usize,
    pub(crate) dtype: Precision,
    pub(crate) weights: &'static str,
    pub(crate) ep_size: usize,
    pub(crate) schedule: &'static str,
    pub(crate) seed: u64,
    pub(crate) iters: usize,
    pub(crate) seconds: f64,
    #[serde(flatten)]
    pub(crate) bandwidth: Bandwidth,
}

/// One measurement. Times are in microseconds, rates in 10^9 per second.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) profile: &'static str,
    pub(crate) part: Part,
    pub(crate) routing: &'static str,
    /// On each rank.
    pub(crate) num_tokens: usize,
    pub(crate) iterations: usize,
    pub(crate) median_us: f64,
    pub(crate) p10_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) mean_us: f64,
    pub(crate) stdev_us: f64,
    pub(crate) min_us: f64,
    pub(crate) max_us: f64,
    /// Experts that a call touches on all ranks together, on average.
    pub(crate) distinct_experts: f64,
    /// For a layer the weights of these experts; otherwise what is read and written.
    pub(crate) bytes: f64,
    pub(crate) gb_per_s: f64,
    /// Of the experts.
    pub(crate) flops: Option<f64>,
    pub(crate) gflop_per_s: Option<f64>,
    pub(crate) copy_gb_per_s: f64,
    /// `gb_per_s / copy_gb_per_s`.
    pub(crate) copy_ratio: f64,
    /// `bytes` at `copy_gb_per_s`.
    pub(crate) floor_us: f64,
    /// Where the time of a layer goes; measured on their own, with one rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lines: Option<Lines>,
}

/// Medians.
#[derive(Debug, Serialize)]
pub(crate) struct Lines {
    pub(crate) gate_and_routing_us: f64,
    pub(crate) order_us: f64,
    pub(crate) experts_us: f64,
    /// Dispatch and combine.
    pub(crate) combine_us: f64,
}

impl Report {
    /// For people.
    pub(crate) fn text(&self) -> String {
        let Metadata { weights, bandwidth, .. } = &self.metadata;
        let mut sections = vec![self.heading()];
        sections.push(self.rows_table());
        sections.extend(self.lines_table());
        sections.push(format!(
            "Copy bandwidth of this run: {} GB/s (n bytes copied count as 2n, read and written); read only: {} GB/s.\n\
             MB: weights of the experts touched, for routing and order what is read and written. Floor: MB at copy bandwidth.",
            digits(bandwidth.copy_gb_per_s),
            digits(bandwidth.read_gb_per_s)
        ));
        let single = self.rows.iter().filter(|row| row.part == Part::Layer && row.num_tokens == 1).map(|row| {
            format!(
                "One token, {}, {weights}, {} routing: {} GB/s of weights, {:.2} of the copy bandwidth.\n",
                row.profile,
                row.routing,
                digits(row.gb_per_s),
                row.copy_ratio
            )
        });
        sections.push(single.collect::<String>().trim_end().to_string());
        sections.retain(|section| !section.is_empty());
        sections.join("\n\n")
    }

    /// What was measured on.
    pub(crate) fn heading(&self) -> String {
        let Metadata { cpu_model, threads, dtype, weights, ep_size, .. } = &self.metadata;
        let dtype = dtype.to_possible_value().map_or(String::new(), |value| value.get_name().to_string());
        format!(
            "MoE on the CPU ({}, {threads} threads): {dtype} hidden states, {weights} weights, {ep_size} rank{}.\n\
             Perfect routing is for measuring: the output of a model that runs with it is meaningless.",
            cpu_model.as_deref().unwrap_or("unknown model"),
            if *ep_size == 1 { "" } else { "s" }
        )
    }

    /// The rows, for charts of each part of each profile.
    pub(crate) fn timed(&self) -> Vec<Timed> {
        let timed = |row: &Row| Timed {
            chart: format!("{}, {}", row.profile, part_name(row.part)),
            line: row.routing.into(),
            num_tokens: row.num_tokens,
            median_us: row.median_us,
            p10_us: row.p10_us,
            p90_us: row.p90_us,
            floor_us: row.floor_us,
        };
        self.rows.iter().map(timed).collect()
    }

    fn rows_table(&self) -> String {
        let mut table = table([
            Column::Text("profile"),
            Column::Text("part"),
            Column::Text("routing"),
            Column::Number("tokens"),
            Column::Number("median us"),
            Column::Number("p10 .. p90"),
            Column::Number("experts"),
            Column::Number("MB"),
            Column::Number("GB/s"),
            Column::Number("of copy"),
            Column::Number("floor us"),
            Column::Number("GFLOP/s"),
        ]);
        for line in &self.rows {
            table.add_row(row([
                line.profile.to_string(),
                part_name(line.part),
                line.routing.to_string(),
                line.num_tokens.to_string(),
                digits(line.median_us),
                format!("{} .. {}", digits(line.p10_us), digits(line.p90_us)),
                digits(line.distinct_experts),
                digits(line.bytes / 1e6),
                digits(line.gb_per_s),
                format!("{:.2}", line.copy_ratio),
                digits(line.floor_us),
                line.gflop_per_s.map_or("-".into(), digits),
            ]));
        }
        table.trim_fmt()
    }

    fn lines_table(&self) -> Option<String> {
        let mut table = table([
            Column::Text("profile"),
            Column::Text("routing"),
            Column::Number("tokens"),
            Column::Number("gate + routing us"),
            Column::Number("order us"),
            Column::Number("experts us"),
            Column::Number("combine us"),
        ]);
        for line in &self.rows {
            let Some(lines) = &line.lines else { continue };
            table.add_row(row([
                line.profile.to_string(),
                line.routing.to_string(),
                line.num_tokens.to_string(),
                digits(lines.gate_and_routing_us),
                digits(lines.order_us),
                digits(lines.experts_us),
                digits(lines.combine_us),
            ]));
        }
        (!table.is_empty())
            .then(|| format!("Inside the layer (medians, each step timed on its own)\n{}", table.trim_fmt()))
    }
}
