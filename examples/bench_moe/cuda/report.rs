//! What was measured on a device, for people and for programs.

use crate::common::report::{Column, digits, row, table};
use crate::{Part, Precision};
use clap::ValueEnum;
use serde::Serialize;

/// The JSON output as it is.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) metadata: Metadata,
    pub(super) rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
pub(super) struct Metadata {
    pub(super) bench: &'static str,
    pub(super) crate_version: &'static str,
    pub(super) device: String,
    pub(super) device_name: String,
    pub(super) compute_capability: String,
    /// Of the logits.
    pub(super) dtype: Precision,
    /// Of the tile map that belongs to `routed-order`.
    pub(super) tile_rows: usize,
    pub(super) seed: u64,
    pub(super) iters: usize,
    pub(super) seconds: f64,
    /// `n` bytes copied inside the device's memory count as `2 n`.
    pub(super) copy_gb_per_s: f64,
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
        let Metadata { device_name, compute_capability, dtype, copy_gb_per_s, empty_kernel_us, allocation_us, .. } =
            &self.metadata;
        let dtype = dtype.to_possible_value().map_or(String::new(), |value| value.get_name().to_string());
        let or_unknown = |us: &Option<f64>| us.map_or("unknown".into(), |us| format!("{} us", digits(us)));
        format!(
            "MoE on {device_name} (compute capability {compute_capability}), {dtype} logits; one call inside a replayed graph.\n\n\
             {}\n\n\
             Copy bandwidth of this run: {} GB/s (n bytes copied count as 2n). Empty kernel: {}; an allocation adds {}.\n\
             Floor: what must be read and written at copy bandwidth, or an empty kernel, whichever is longer.",
            self.rows_table(),
            digits(*copy_gb_per_s),
            or_unknown(empty_kernel_us),
            or_unknown(allocation_us)
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
                line.part.to_possible_value().map_or(String::new(), |value| value.get_name().to_string()),
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
