//! What was measured on a device, for people and for programs.

use super::shared::{self, SharedRow};
use crate::common::report::{Column, digits, row, table};
use crate::html::Timed;
use crate::workload::Choice;
use crate::{Part, Precision, part_name};
use clap::ValueEnum;
use serde::Serialize;

/// The JSON output as it is.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) metadata: Metadata,
    /// Of routing and order.
    pub(super) rows: Vec<Row>,
    pub(super) layers: Vec<LayerRow>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) shared: Vec<SharedRow>,
}

#[derive(Debug, Serialize)]
pub(super) struct Metadata {
    pub(super) bench: &'static str,
    pub(super) crate_version: &'static str,
    pub(super) device: String,
    pub(super) device_name: String,
    pub(super) compute_capability: String,
    /// Of the logits and the hidden states.
    pub(super) dtype: Precision,
    /// Of the tile map that belongs to `routed-order`.
    pub(super) tile_rows: usize,
    pub(super) seed: u64,
    pub(super) iters: usize,
    pub(super) seconds: f64,
    /// `n` bytes copied inside the device's memory count as `2 n`.
    pub(super) copy_gb_per_s: f64,
    /// 10^12 multiplications and additions per second of a product of large bf16 matrices, where layers are measured and the
    /// device has such a product.
    pub(super) matmul_tflop_per_s: Option<f64>,
    /// A kernel that does nothing, inside a graph, if the driver takes it.
    pub(super) empty_kernel_us: Option<f64>,
    /// What an allocation that is freed adds to it.
    pub(super) allocation_us: Option<f64>,
}

/// One measurement. Times are of one call, in microseconds.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) part: Part,
    pub(super) method: String,
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    pub(super) num_tokens: usize,
    /// Calls of a graph, each with logits of its own.
    pub(super) calls: usize,
    /// Replays.
    pub(super) iterations: usize,
    pub(super) median_us: f64,
    pub(super) p10_us: f64,
    pub(super) p90_us: f64,
    /// What a call must read and write.
    pub(super) bytes: usize,
    /// `bytes` at `copy_gb_per_s`, or an empty kernel, whichever is longer.
    pub(super) floor_us: f64,
    /// `floor_us / median_us`.
    pub(super) floor_ratio: f64,
    /// The same routing composed of Candle's own operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) candle: Option<Candle>,
}

/// One measurement of a layer without its gate. Times are of one call, in microseconds.
#[derive(Debug, Serialize)]
pub(super) struct LayerRow {
    pub(super) part: Part,
    pub(super) profile: &'static str,
    pub(super) weights: &'static str,
    pub(super) method: String,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    /// Of all ranks.
    pub(super) num_experts: usize,
    pub(super) top_k: usize,
    /// Ranks that share the experts; the busiest one of each call is measured.
    pub(super) ep_size: usize,
    /// Layers that the calls take in turn.
    pub(super) num_layers: usize,
    pub(super) routing: &'static str,
    /// On each rank.
    pub(super) num_tokens: usize,
    /// Calls of a graph.
    pub(super) calls: usize,
    /// Replays.
    pub(super) iterations: usize,
    pub(super) median_us: f64,
    pub(super) p10_us: f64,
    pub(super) p90_us: f64,
    /// Of the measured rank, on average over the calls.
    pub(super) slots: f64,
    /// Of a rank, on average over the ranks.
    pub(super) mean_slots: f64,
    /// Experts of the measured rank that have a slot, on average over the calls.
    pub(super) distinct_experts: f64,
    /// The weights of these experts.
    pub(super) bytes: f64,
    /// Of the experts.
    pub(super) flops: f64,
    /// `bytes` at `copy_gb_per_s`, or `flops` at `matmul_tflop_per_s`, or an empty kernel, whichever is longest.
    pub(super) floor_us: f64,
    /// `floor_us / median_us`.
    pub(super) floor_ratio: f64,
    #[serde(flatten)]
    pub(super) breakdown: Breakdown,
}

/// Medians of the steps of a layer, each in a graph of its own.
#[derive(Debug, Serialize)]
pub(super) struct Breakdown {
    /// Routing and order.
    pub(super) routed_order_us: f64,
    /// Experts and weighted sum.
    pub(super) experts_us: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Candle {
    pub(super) median_us: Option<f64>,
    pub(super) timing: Timing,
    pub(super) error: Option<String>,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Timing {
    /// Replays of a graph, as the rows.
    Graph,
    /// Calls from the host, waited for.
    Wall,
    Failed,
}

impl Report {
    /// For people.
    pub(super) fn text(&self) -> String {
        let mut sections = vec![self.heading()];
        if !self.rows.is_empty() {
            sections.push(self.rows_table());
        }
        if !self.layers.is_empty() {
            sections.extend([self.layers_text(), self.balance_text()]);
        }
        if !self.shared.is_empty() {
            sections.push(shared::text(&self.shared));
        }
        sections.push(self.floors_text());
        sections.join("\n\n")
    }

    /// What was measured on.
    pub(super) fn heading(&self) -> String {
        let Metadata { device_name, compute_capability, dtype, .. } = &self.metadata;
        let dtype = dtype.to_possible_value().map_or(String::new(), |value| value.get_name().to_string());
        format!(
            "MoE on {device_name} (compute capability {compute_capability}), {dtype} logits and hidden states; one call inside \
             a replayed graph."
        )
    }

    /// Rows and layers, for charts of each part and of each layer.
    pub(super) fn timed(&self) -> Vec<Timed> {
        let of_row = |row: &Row| Timed {
            chart: format!("{}, {}", part_name(row.part), row.method),
            line: format!("{} experts, top-{}", row.num_experts, row.top_k),
            num_tokens: row.num_tokens,
            median_us: row.median_us,
            p10_us: row.p10_us,
            p90_us: row.p90_us,
            floor_us: row.floor_us,
        };
        let of_layer = |row: &LayerRow| Timed {
            chart: format!("Layer of {}, busiest of {} ranks", row.profile, row.ep_size),
            line: row.routing.into(),
            num_tokens: row.num_tokens,
            median_us: row.median_us,
            p10_us: row.p10_us,
            p90_us: row.p90_us,
            floor_us: row.floor_us,
        };
        self.rows.iter().map(of_row).chain(self.layers.iter().map(of_layer)).collect()
    }

    /// What stands below the tables.
    pub(super) fn floors_text(&self) -> String {
        let Metadata { copy_gb_per_s, matmul_tflop_per_s, empty_kernel_us, allocation_us, .. } = &self.metadata;
        let or_unknown = |us: &Option<f64>| us.map_or("unknown".into(), |us| format!("{} us", digits(us)));
        let mut text = format!(
            "Copy bandwidth of this run: {} GB/s (n bytes copied count as 2n). Empty kernel: {}; an allocation adds {}.\n\
             Floor: what must be read and written at copy bandwidth, or an empty kernel, whichever is longer.",
            digits(*copy_gb_per_s),
            or_unknown(empty_kernel_us),
            or_unknown(allocation_us)
        );
        if !self.layers.is_empty() {
            let rate = matmul_tflop_per_s.map_or("unknown".into(), |rate| format!("{} TFLOP/s", digits(rate)));
            text += &format!(
                "\nFloor of a layer: the weights of the experts touched at copy bandwidth, or their products at the rate of a \
                 large bf16 product ({rate}), whichever is longer."
            );
        }
        text
    }

    fn layers_text(&self) -> String {
        let mut table = table([
            Column::Text("profile"),
            Column::Number("ranks"),
            Column::Number("tokens"),
            Column::Text("routing"),
            Column::Number("experts"),
            Column::Number("us"),
            Column::Number("p10 .. p90"),
            Column::Number("floor us"),
            Column::Number("floor / us"),
            Column::Number("routing + order us"),
            Column::Number("experts us"),
        ]);
        for line in &self.layers {
            table.add_row(row([
                line.profile.to_string(),
                line.ep_size.to_string(),
                line.num_tokens.to_string(),
                line.routing.to_string(),
                digits(line.distinct_experts),
                digits(line.median_us),
                format!("{} .. {}", digits(line.p10_us), digits(line.p90_us)),
                digits(line.floor_us),
                format!("{:.2}", line.floor_ratio),
                digits(line.breakdown.routed_order_us),
                digits(line.breakdown.experts_us),
            ]));
        }
        format!(
            "Layers, {} weights: routing, order, experts and their weighted sum, without the gate. Of several ranks the busiest, \
             with the tokens of all and without communication; tokens: of each rank.\n{}",
            self.layers[0].weights,
            table.trim_fmt()
        )
    }

    /// What balance would buy.
    fn balance_text(&self) -> String {
        let mut table = table([
            Column::Text("profile"),
            Column::Number("ranks"),
            Column::Number("tokens"),
            Column::Number("random: slots"),
            Column::Number("experts"),
            Column::Number("us"),
            Column::Number("perfect: slots"),
            Column::Number("experts"),
            Column::Number("us"),
            Column::Number("random / perfect"),
        ]);
        let (random, perfect): (Vec<_>, Vec<_>) =
            self.layers.iter().partition(|line| line.routing == Choice::Random.name());
        for (random, perfect) in random.into_iter().zip(perfect) {
            let [random_cells, perfect_cells] =
                [random, perfect].map(|line| [line.slots, line.distinct_experts, line.median_us].map(digits));
            let place = [random.profile.to_string(), random.ep_size.to_string(), random.num_tokens.to_string()];
            let ratio = format!("{:.2}", random.median_us / perfect.median_us);
            table.add_row(row(place.into_iter().chain(random_cells).chain(perfect_cells).chain([ratio])));
        }
        format!(
            "What balance would buy (slots and experts of the rank that is measured)\n{}\n\
             Perfect routing is for measuring: the output of a model that runs with it is meaningless. At few tokens it touches \
             more experts than random routing, and takes longer.",
            table.trim_fmt()
        )
    }

    fn rows_table(&self) -> String {
        let mut table = table([
            Column::Text("part"),
            Column::Text("method"),
            Column::Number("experts"),
            Column::Number("top-k"),
            Column::Number("tokens"),
            Column::Number("median us"),
            Column::Number("p10 .. p90"),
            Column::Number("floor us"),
            Column::Number("floor / median"),
            Column::Number("candle us"),
        ]);
        for line in &self.rows {
            let candle = match &line.candle {
                Some(Candle { median_us: Some(us), timing: Timing::Wall, .. }) => format!("{} (wall)", digits(*us)),
                Some(Candle { median_us: Some(us), .. }) => digits(*us),
                Some(_) => "fails".into(),
                None => "-".into(),
            };
            table.add_row(row([
                part_name(line.part),
                line.method.clone(),
                line.num_experts.to_string(),
                line.top_k.to_string(),
                line.num_tokens.to_string(),
                digits(line.median_us),
                format!("{} .. {}", digits(line.p10_us), digits(line.p90_us)),
                digits(line.floor_us),
                format!("{:.2}", line.floor_ratio),
                candle,
            ]));
        }
        table.trim_fmt()
    }
}
