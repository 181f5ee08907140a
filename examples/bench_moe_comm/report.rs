//! What was measured, for people and for programs.

use crate::backends::Backend;
use crate::common::machine;
use crate::common::report::{Column, digits, row, table};
use crate::common::stats::Summary;
use crate::measurement::{Measurement, RankMeasurement, Volume};
use crate::settings::Settings;
use crate::workload::Workload;
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::thread::available_parallelism;

const PERFECT: &str = "perfect routing is for measuring: the output of a model that runs with it is meaningless";

/// The JSON output as it is.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Report {
    benchmark_metadata: Metadata,
    results: Vec<Row>,
    /// For the table and the plots.
    #[serde(skip)]
    pub(crate) measurements: Vec<Measurement>,
    #[serde(skip)]
    reasons: Vec<String>,
}

#[derive(Debug, serde::Serialize)]
struct Metadata {
    bench: &'static str,
    profile: String,
    /// Several are separated by commas.
    backend: String,
    ep_size: usize,
    hidden_size: usize,
    local_batch_size: Vec<usize>,
    top_k: usize,
    dtype: &'static str,
    perfect_router: bool,
    /// Where ranks have different numbers of experts, the larger.
    experts_per_rank: usize,
    num_experts_total: usize,
    device: String,
    cuda_graph: bool,
    /// What to bear in mind.
    warning: Option<String>,
    crate_version: &'static str,
    reduction: &'static str,
    workload: Workload,
    seed: u64,
    iters: usize,
    warmup: usize,
    cpu_model: Option<String>,
    cpu_cores: usize,
}

/// One backend with one batch size. Times are in microseconds, rates in 10^9 bytes per second.
#[derive(Debug, serde::Serialize)]
struct Row {
    backend: String,
    local_batch_size: usize,
    dispatch_us: ByRank<Time>,
    combine_us: ByRank<Time>,
    /// How late a rank entered dispatch, compared with the first.
    arrival_skew_us: ByRank<Time>,
    /// Tokens that each rank holds.
    num_tokens: ByRank<usize>,
    /// Tokens that dispatch sends to other ranks, gets from other ranks, and leaves at home.
    rows_sent: ByRank<usize>,
    rows_received: ByRank<usize>,
    rows_kept: ByRank<usize>,
    /// Slots of the rank's experts.
    expert_rows: ByRank<usize>,
    combine_rows_sent: ByRank<usize>,
    combine_rows_received: ByRank<usize>,
    /// Bytes for other ranks, in the median time of the rank.
    dispatch_wire_gb_per_s: ByRank<f64>,
    combine_wire_gb_per_s: ByRank<f64>,
    /// With the bytes that stay home.
    dispatch_logical_gb_per_s: ByRank<f64>,
    combine_logical_gb_per_s: ByRank<f64>,
    all_ranks: AllRanks,
    /// Whether rows per rank are equal within one under perfect routing; null where that is not promised.
    rows_even: Option<bool>,
}

/// The slowest rank of each round, and the bytes of all ranks in that time.
#[derive(Debug, serde::Serialize)]
struct AllRanks {
    dispatch_us: Time,
    combine_us: Time,
    dispatch_wire_gb_per_s: f64,
    combine_wire_gb_per_s: f64,
    dispatch_logical_gb_per_s: f64,
    combine_logical_gb_per_s: f64,
}

/// A value for each rank: `{"rank0": .., "rank1": ..}`.
#[derive(Debug)]
struct ByRank<T>(Vec<T>);

impl<T: Serialize> Serialize for ByRank<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (rank, value) in self.0.iter().enumerate() {
            map.serialize_entry(&format!("rank{rank}"), value)?;
        }
        map.end()
    }
}

/// Microseconds: the median, or all that `--iter-stats` asks for.
#[derive(Debug, serde::Serialize)]
#[serde(untagged)]
enum Time {
    Median(f64),
    Statistics { mean: f64, median: f64, stdev: f64, min: f64, max: f64 },
}

impl Time {
    fn new(summary: &Summary, iter_stats: bool) -> Self {
        let Summary { mean, median, stdev, min, max, .. } = *summary;
        match iter_stats {
            true => Self::Statistics { mean, median, stdev, min, max },
            false => Self::Median(median),
        }
    }
}

/// 10^9 bytes per second; 0 where nothing is sent.
pub(crate) fn gb_per_s(bytes: usize, microseconds: f64) -> f64 {
    if bytes == 0 || microseconds <= 0.0 { 0.0 } else { bytes as f64 / microseconds / 1e3 }
}

impl Row {
    fn new(measurement: &Measurement, iter_stats: bool) -> Self {
        let ranks = &measurement.ranks;
        let time = |of: fn(&RankMeasurement) -> &Summary| {
            ByRank(ranks.iter().map(|rank| Time::new(of(rank), iter_stats)).collect())
        };
        let count = |of: fn(&Volume) -> usize| ByRank(ranks.iter().map(|rank| of(&rank.volume)).collect());
        let rate = |of: fn(&RankMeasurement) -> (usize, f64)| {
            let rate = |rank| {
                let (bytes, microseconds) = of(rank);
                gb_per_s(bytes, microseconds)
            };
            ByRank(ranks.iter().map(rate).collect())
        };
        Self {
            backend: measurement.backend.clone(),
            local_batch_size: measurement.local_batch_size,
            dispatch_us: time(|rank| &rank.dispatch_us),
            combine_us: time(|rank| &rank.combine_us),
            arrival_skew_us: time(|rank| &rank.arrival_skew_us),
            num_tokens: ByRank(measurement.token_counts.clone()),
            rows_sent: count(|volume| volume.rows_sent),
            rows_received: count(|volume| volume.rows_received),
            rows_kept: count(|volume| volume.rows_kept),
            expert_rows: count(|volume| volume.expert_rows),
            combine_rows_sent: count(|volume| volume.combine_rows_sent),
            combine_rows_received: count(|volume| volume.combine_rows_received),
            dispatch_wire_gb_per_s: rate(|rank| (rank.volume.dispatch_bytes_sent, rank.dispatch_us.median)),
            combine_wire_gb_per_s: rate(|rank| (rank.volume.combine_bytes_sent, rank.combine_us.median)),
            dispatch_logical_gb_per_s: rate(|rank| (rank.volume.dispatch_logical_bytes(), rank.dispatch_us.median)),
            combine_logical_gb_per_s: rate(|rank| (rank.volume.combine_logical_bytes(), rank.combine_us.median)),
            all_ranks: AllRanks::new(measurement, iter_stats),
            rows_even: measurement.is_even,
        }
    }
}

impl AllRanks {
    fn new(measurement: &Measurement, iter_stats: bool) -> Self {
        let (dispatch, combine) = (&measurement.slowest_dispatch_us, &measurement.slowest_combine_us);
        Self {
            dispatch_us: Time::new(dispatch, iter_stats),
            combine_us: Time::new(combine, iter_stats),
            dispatch_wire_gb_per_s: gb_per_s(measurement.total(|v| v.dispatch_bytes_sent), dispatch.median),
            combine_wire_gb_per_s: gb_per_s(measurement.total(|v| v.combine_bytes_sent), combine.median),
            dispatch_logical_gb_per_s: gb_per_s(measurement.total(Volume::dispatch_logical_bytes), dispatch.median),
            combine_logical_gb_per_s: gb_per_s(measurement.total(Volume::combine_logical_bytes), combine.median),
        }
    }
}

impl Report {
    pub(crate) fn new(
        settings: &Settings,
        backends: &[Backend],
        iter_stats: bool,
        measurements: Vec<Measurement>,
    ) -> Self {
        Self {
            benchmark_metadata: Metadata::new(settings, backends),
            results: measurements.iter().map(|measurement| Row::new(measurement, iter_stats)).collect(),
            measurements,
            reasons: backends.iter().map(|backend| format!("{backend}, {}", backend.reason)).collect(),
        }
    }

    /// Whether perfect routing kept all its promises.
    pub(crate) fn passed(&self) -> bool {
        self.measurements.iter().all(|measurement| measurement.is_even != Some(false))
    }

    /// For people. `all_ranks`: with a table of every rank.
    pub(crate) fn text(&self, every_rank: bool) -> String {
        let mut sections = vec![self.heading(), self.times_table()];
        if every_rank {
            sections.push(format!("Every rank\n{}", self.ranks_table()));
        }
        sections.push(
            "us: the slowest rank of each round, from entering to leaving; median, and p10 .. p90 behind it. GB/s: bytes of all ranks\n\
             together in the median; wire: what goes to other ranks, logical: with tokens and results that stay home.\n\
             Expert rows: slots that the experts of a rank get, the least and the most. Skew: how late the last rank enters dispatch\n\
             after the first. Checked before timing: every token comes home as the weighted sum that it should be."
                .to_string(),
        );
        sections.extend(self.evenness());
        sections.join("\n\n")
    }

    /// What is measured, in words.
    pub(crate) fn heading(&self) -> String {
        let Metadata { profile, hidden_size, top_k, num_experts_total, dtype, ep_size, .. } = &self.benchmark_metadata;
        let Metadata { reduction, workload, perfect_router, seed, iters, warmup, .. } = &self.benchmark_metadata;
        let routing = if *perfect_router { "perfect routing" } else { "random routing" };
        let mut lines = vec![
            format!(
                "Dispatch and combine of a MoE layer, without experts: {profile}, hidden {hidden_size}, top-{top_k} of \
                 {num_experts_total} experts, {dtype}"
            ),
            format!(
                "{ep_size} rank{} on {}; workload {}, {routing}, {reduction} reduction, seed {seed}; {iters} rounds after {warmup}",
                if *ep_size == 1 { "" } else { "s" },
                self.benchmark_metadata.place(),
                workload.name(),
            ),
        ];
        lines.extend(self.reasons.iter().cloned());
        lines.extend(self.benchmark_metadata.warning.iter().map(|warning| format!("Warning: {warning}.")));
        lines.join("\n")
    }

    fn times_table(&self) -> String {
        let mut table = table([
            Column::Text("backend"),
            Column::Number("tokens/rank"),
            Column::Number("dispatch us"),
            Column::Number("p10 .. p90"),
            Column::Number("GB/s wire"),
            Column::Number("logical"),
            Column::Number("combine us"),
            Column::Number("p10 .. p90"),
            Column::Number("GB/s wire"),
            Column::Number("logical"),
            Column::Number("expert rows"),
            Column::Number("skew us"),
        ]);
        for measurement in &self.measurements {
            let Measurement { slowest_dispatch_us: dispatch, slowest_combine_us: combine, .. } = measurement;
            let sizes = AllRanks::new(measurement, false);
            table.add_row(row([
                measurement.backend.clone(),
                least_and_most(measurement.token_counts.iter().copied()),
                digits(dispatch.median),
                spread(dispatch),
                digits(sizes.dispatch_wire_gb_per_s),
                digits(sizes.dispatch_logical_gb_per_s),
                digits(combine.median),
                spread(combine),
                digits(sizes.combine_wire_gb_per_s),
                digits(sizes.combine_logical_gb_per_s),
                least_and_most(measurement.ranks.iter().map(|rank| rank.volume.expert_rows)),
                digits(measurement.skew_us()),
            ]));
        }
        table.trim_fmt()
    }

    fn ranks_table(&self) -> String {
        let mut table = table([
            Column::Text("backend"),
            Column::Number("rank"),
            Column::Number("tokens"),
            Column::Number("dispatch us"),
            Column::Number("stdev"),
            Column::Number("min .. max"),
            Column::Number("combine us"),
            Column::Number("stdev"),
            Column::Number("min .. max"),
            Column::Number("rows sent"),
            Column::Number("received"),
            Column::Number("kept"),
            Column::Number("expert rows"),
            Column::Number("skew us"),
        ]);
        for measurement in &self.measurements {
            for (rank, (of_rank, tokens)) in measurement.ranks.iter().zip(&measurement.token_counts).enumerate() {
                let RankMeasurement { dispatch_us, combine_us, arrival_skew_us, volume } = of_rank;
                table.add_row(row([
                    measurement.backend.clone(),
                    rank.to_string(),
                    tokens.to_string(),
                    digits(dispatch_us.median),
                    digits(dispatch_us.stdev),
                    format!("{} .. {}", digits(dispatch_us.min), digits(dispatch_us.max)),
                    digits(combine_us.median),
                    digits(combine_us.stdev),
                    format!("{} .. {}", digits(combine_us.min), digits(combine_us.max)),
                    volume.rows_sent.to_string(),
                    volume.rows_received.to_string(),
                    volume.rows_kept.to_string(),
                    volume.expert_rows.to_string(),
                    digits(arrival_skew_us.median),
                ]));
            }
        }
        table.trim_fmt()
    }

    /// What became of the promise of perfect routing.
    fn evenness(&self) -> Option<String> {
        if !self.benchmark_metadata.perfect_router {
            return None;
        }
        let uneven = self.measurements.iter().filter(|measurement| measurement.is_even == Some(false));
        let uneven: Vec<_> = uneven
            .map(|measurement| format!("{}, {} tokens per rank", measurement.backend, measurement.local_batch_size))
            .collect();
        Some(match self.measurements.iter().any(|measurement| measurement.is_even.is_some()) {
            _ if !uneven.is_empty() => {
                format!("CHECK FAILED: rows per rank differ by more than one: {}", uneven.join("; "))
            }
            true => "Rows per rank are equal within one, as perfect routing promises: checked.".into(),
            false => {
                "This workload is uneven on purpose, so perfect routing does not promise equal rows per rank.".into()
            }
        })
    }
}

impl Metadata {
    fn new(settings: &Settings, backends: &[Backend]) -> Self {
        let cpu_cores = available_parallelism().map_or(1, |cores| cores.get());
        Self {
            bench: "bench_moe_comm",
            profile: settings.profile.clone(),
            backend: Backend::names(backends),
            ep_size: settings.ep_size,
            hidden_size: settings.hidden_size,
            local_batch_size: settings.local_batch_sizes.clone(),
            top_k: settings.top_k,
            dtype: settings.dtype.as_str(),
            perfect_router: settings.perfect_router,
            experts_per_rank: settings.experts_per_rank(),
            num_experts_total: settings.num_experts,
            device: device(backends),
            cuda_graph: settings.cuda_graph && backends.iter().any(Backend::may_be_captured),
            warning: warning(settings, cpu_cores),
            crate_version: env!("CARGO_PKG_VERSION"),
            reduction: settings.reduction.name(),
            workload: settings.workload,
            seed: settings.seed,
            iters: settings.iters,
            warmup: settings.warmup,
            cpu_model: machine::cpu_model(),
            cpu_cores,
        }
    }
}

impl Metadata {
    /// What the ranks run on.
    fn place(&self) -> String {
        let cpu =
            || format!("the CPU ({}, {} cores)", self.cpu_model.as_deref().unwrap_or("unknown model"), self.cpu_cores);
        match self.device.as_str() {
            "cpu" => cpu(),
            device => {
                let graphs = if self.cuda_graph { "from CUDA graphs" } else { "call by call" };
                let device =
                    device.strip_prefix("cpu, ").map_or_else(|| device.into(), |device| format!("{}, {device}", cpu()));
                format!("{device}, {graphs}")
            }
        }
    }
}

/// Where the tensors of all ranks are.
fn device(backends: &[Backend]) -> String {
    let is_on_device = |backend: &Backend| backend.transport.has_devices();
    match (backends.iter().any(is_on_device), backends.iter().all(is_on_device)) {
        (false, _) => "cpu".into(),
        (true, true) => machine::cuda_device(),
        (true, false) => format!("cpu, {}", machine::cuda_device()),
    }
}

fn warning(settings: &Settings, cpu_cores: usize) -> Option<String> {
    let perfect = settings.perfect_router.then(|| PERFECT.to_string());
    let crowded = (settings.ep_size > cpu_cores).then(|| {
        format!("{} ranks share {cpu_cores} cores, so ranks wait for cores as well as for each other", settings.ep_size)
    });
    let warnings: Vec<_> = [perfect, crowded].into_iter().flatten().collect();
    (!warnings.is_empty()).then(|| warnings.join("; "))
}

fn spread(summary: &Summary) -> String {
    format!("{} .. {}", digits(summary.p10), digits(summary.p90))
}

fn least_and_most(values: impl Iterator<Item = usize> + Clone) -> String {
    let (least, most) = (values.clone().min().unwrap_or(0), values.max().unwrap_or(0));
    if least == most { most.to_string() } else { format!("{least} .. {most}") }
}
