//! Times routing, expert order, perfect-router plans and one whole MoE layer on the CPU, learned-like random routing beside
//! perfect routing; with the feature `cuda` and `--device cuda`, routing, expert order and whole layers on a CUDA device.
//!
//! ```text
//! cargo run --release --example bench_moe -- --profile gpt-oss-20b --num-tokens 1 --only layer
//! ```
//!
//! Every time stands beside its floor: the bytes that the call must touch, at the bandwidth with which the same run
//! copies memory. Consecutive calls go to different layers and experts, so that weights come from memory, as in a model.
//! At small batch a balanced table touches more experts than real routing, so perfect routing is no lower bound there.

// Each example uses its part of what they share.
#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
mod cuda;
mod html;
mod memory;
mod report;
mod workload;

use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device};
use candle_moe::block::MoeBlock;
use candle_moe::ep::{Communicator, Placement, Reduction, Sharing, Solo, Step, Strategy, combine, dispatch, launch};
use candle_moe::experts::Linear;
use candle_moe::order::ExpertOrder;
use candle_moe::perfect_router::{PerfectRouterKey, PerfectRouterStore, Plan, Schedule};
use candle_moe::routing::{Router, Routing, RoutingMethod};
use clap::{Parser, ValueEnum};
use common::machine;
use common::progress;
use common::random::Random;
use common::report::{BadArguments, OutputFormat, Verdict, finish, plain, print, print_json};
use common::stats::{Budget, Meter, Summary, measure};
use indicatif::ProgressBar;
use memory::Bandwidth;
use report::{Lines, Metadata, Report, Row};
use serde::Serialize;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};
use workload::{
    Choice, DEEPSEEK_V3, GPT_OSS_20B, GPT_OSS_120B, Inputs, Layer, Profile, QWEN3_30B_A3B, TINY, WeightFormat,
    planned_experts,
};

/// Ranks wait for each other no longer than this.
const DEADLINE: Duration = Duration::from_secs(600);
const WARM_UP: usize = 1;
/// Bytes of a layer that is measured without being asked for by its profile's name.
const MAX_LAYER_OF_ALL: usize = 1 << 30;

/// Time routing, expert order and one whole MoE layer on the CPU or on CUDA, random against perfect routing.
///
/// On CUDA --shape chooses what routing and order are measured on, --profile the layers; with one of them alone the other is
/// left out unless --only asks for it.
///
/// Perfect routing is for measuring: the output of a model that runs with it is meaningless.
#[derive(Debug, Parser)]
#[command(name = "bench_moe", allow_negative_numbers = true)]
struct Args {
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceName,
    /// Sizes of the layer; several separated by commas [default: all, on CUDA all but tiny]
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    profile: Vec<ProfileName>,
    /// On CUDA: experts and slots per token, as 256x8; several separated by commas [default: those of many models]
    #[arg(long, value_name = "EXPERTSxTOP_K", value_delimiter = ',')]
    shape: Vec<Shape>,
    /// On CUDA: how to route, as Renormalize or DeepSeekV3:num_groups=8,topk_group=4 [default: Renormalize, and
    /// DeepSeekV3 beside it where no shape is given]
    #[arg(long, value_name = "NAME", value_parser = method)]
    method: Option<RoutingMethod>,
    /// Tokens of a call on each rank; several separated by commas [default: 1,8,32,128; on CUDA all powers of two up to
    /// 32768, for layers up to 8192 tokens of all ranks]
    #[arg(long, alias = "num_tokens", value_name = "N", value_delimiter = ',')]
    num_tokens: Vec<NonZeroUsize>,
    /// Ranks that share the experts, as threads; on CUDA the busiest rank of so many is measured, and several numbers may be
    /// separated by commas [default: 1, on CUDA 8 for deepseek-v3]
    #[arg(long, alias = "ep_size", value_name = "N", value_delimiter = ',')]
    ep_size: Vec<NonZeroUsize>,
    /// On CUDA: how much random routing prefers some experts, as the standard deviation of what is added to an expert's
    /// logits; those of a token have one of 1.5
    #[arg(long, value_name = "DEVIATION", default_value_t = 0.0, value_parser = skew)]
    skew: f32,
    /// Dtype of the hidden states and the gate, on CUDA of the logits [default: f32, on CUDA bf16]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// How the experts' weights are stored
    #[arg(long, value_enum, default_value_t = WeightFormat::Mxfp4)]
    weights: WeightFormat,
    /// Samples of a row at most (three at least)
    #[arg(long, value_name = "N", default_value = "200")]
    iters: NonZeroUsize,
    /// Time after which a row takes no further sample
    #[arg(long, value_name = "SECONDS", default_value = "0.1", value_parser = seconds)]
    seconds: Duration,
    /// How perfect routing deals out the slots of the ranks
    #[arg(long, value_name = "NAME", default_value_t = Schedule::GlobalSlot, value_parser = schedule)]
    schedule: Schedule,
    /// Seed of weights and hidden states
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// What to measure; several separated by commas [default: all]
    #[arg(long, value_enum, value_name = "PART", value_delimiter = ',')]
    only: Vec<Part>,
    /// On CUDA: draw the time of layers against the number of tokens
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Also draw the report as a web page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// What to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    output: OutputFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProfileName {
    /// hidden 128, intermediate 192, 8 experts, top-4
    Tiny,
    /// hidden 2880, intermediate 2880, 32 experts, top-4
    #[value(name = "gpt-oss-20b", alias = "gpt_oss_20b")]
    GptOss20b,
    /// hidden 2880, intermediate 2880, 128 experts, top-4
    #[value(name = "gpt-oss-120b", alias = "gpt_oss_120b")]
    GptOss120b,
    /// hidden 7168, intermediate 2048, 256 experts, top-8 of 4 out of 8 groups, without the shared expert
    #[value(name = "deepseek-v3", alias = "deepseek_v3")]
    DeepSeekV3,
    /// hidden 2048, intermediate 768, 128 experts, top-8
    #[value(name = "qwen3-30b-a3b", alias = "qwen3_30b_a3b")]
    Qwen330bA3b,
    /// Every profile; the layers of those only that fit a gigabyte, or the memory of the CUDA device
    All,
}

const PROFILES: [(ProfileName, Profile); 5] = [
    (ProfileName::Tiny, TINY),
    (ProfileName::GptOss20b, GPT_OSS_20B),
    (ProfileName::GptOss120b, GPT_OSS_120B),
    (ProfileName::DeepSeekV3, DEEPSEEK_V3),
    (ProfileName::Qwen330bA3b, QWEN3_30B_A3B),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Precision {
    F32,
    F16,
    Bf16,
}

impl Precision {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceName {
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let ordinal = name
            .strip_prefix("cuda")
            .map(|rest| rest.strip_prefix(':').unwrap_or(if rest.is_empty() { "0" } else { "" }));
        match (name, ordinal.map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err("expected cpu, cuda or cuda:N".into()),
        }
    }
}

/// `--shape`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    num_experts: usize,
    top_k: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (num_experts, top_k) = text.split_once('x').ok_or("expected EXPERTSxTOP_K, as 256x8")?;
        let number = |text: &str| text.parse::<usize>().map_err(|_| format!("{text:?} is no number"));
        let shape = Self { num_experts: number(num_experts)?, top_k: number(top_k)? };
        match (1..=shape.num_experts).contains(&shape.top_k) {
            true => Ok(shape),
            false => Err(format!("top_k is {}, expected 1 to {}", shape.top_k, shape.num_experts)),
        }
    }
}

fn method(name: &str) -> Result<RoutingMethod, String> {
    name.parse().map_err(|error| plain(&error))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    /// Router logits to chosen experts and weights
    Routing,
    /// Chosen experts to expert order
    Order,
    /// Router logits to expert order and tiles in one step; on CUDA only
    #[value(alias = "routed_order")]
    #[serde(rename = "routed-order")]
    RoutedOrder,
    /// The plan of the perfect router: which expert each slot goes to, worked out anew, on one thread
    Plan,
    /// Gate, routing, order, experts and combination; on CUDA without the gate
    Layer,
    /// A layer whose experts several CUDA devices share, with all that travels, beside one device; if asked for
    Shared,
}

/// As the command line has it.
fn part_name(part: Part) -> String {
    part.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
}

fn skew(text: &str) -> Result<f32, String> {
    let skew = text.parse::<f32>().ok().filter(|skew| skew.is_finite() && *skew >= 0.0);
    skew.ok_or("expected a number that is not negative".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|_| "expected a number of seconds".to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "expected a number of seconds that is not negative".into())
}

fn schedule(name: &str) -> Result<Schedule, String> {
    name.parse().map_err(|error| plain(&error))
}

fn main() -> ExitCode {
    finish(run(&Args::parse()))
}

fn run(args: &Args) -> Result<Verdict> {
    match args.device {
        DeviceName::Cpu => run_on_cpu(args),
        DeviceName::Cuda(ordinal) => run_on_cuda(args, ordinal),
    }
}

#[cfg(feature = "cuda")]
use cuda::run as run_on_cuda;

#[cfg(not(feature = "cuda"))]
fn run_on_cuda(_: &Args, _: usize) -> Result<Verdict> {
    let text =
        "this program was built without CUDA; build it with: cargo build --release --features cuda --example bench_moe";
    Err(BadArguments(text.into()).into())
}

fn run_on_cpu(args: &Args) -> Result<Verdict> {
    if !args.shape.is_empty()
        || args.method.is_some()
        || args.only.iter().any(|part| matches!(part, Part::RoutedOrder | Part::Shared))
    {
        let text = "--shape, --method, --only routed-order and --only shared are for --device cuda; choose a --profile on the CPU";
        return Err(BadArguments(text.into()).into());
    }
    if args.plot.is_some() || args.skew > 0.0 || args.ep_size.len() > 1 {
        let text = "--plot, --skew and several numbers for --ep-size are for --device cuda; leave them out on the CPU";
        return Err(BadArguments(text.into()).into());
    }
    let bench = Bench::new(args)?;
    let report = bench.run()?;
    if let Some(file) = &args.html {
        html::write(file, &report.heading(), &report.timed())?;
    }
    match args.output {
        OutputFormat::Json => print_json(&report)?,
        OutputFormat::Table => print(report.text())?,
    }
    Ok(Verdict::Passed)
}

/// The arguments, checked.
struct Bench {
    /// What is measured of each profile.
    profiles: Vec<(Profile, Vec<Part>)>,
    schedule: Schedule,
    num_tokens: Vec<usize>,
    ep_size: usize,
    dtype: DType,
    precision: Precision,
    weights: WeightFormat,
    budget: Budget,
    seed: u64,
}

impl Bench {
    fn new(args: &Args) -> Result<Self> {
        let all = args.profile.is_empty() || args.profile.contains(&ProfileName::All);
        let named = |name| args.profile.contains(&name);
        let precision = args.dtype.unwrap_or(Precision::F32);
        let wanted = PROFILES.into_iter().filter(|(name, _)| named(*name) || all);
        let parts_of = |name, profile: &Profile| -> Vec<Part> {
            let fits = named(name) || args.weights.layer_bytes(profile) <= MAX_LAYER_OF_ALL;
            let asked = |part: &Part| args.only.is_empty() || args.only.contains(part);
            let parts = [Part::Routing, Part::Order, Part::Plan, Part::Layer];
            parts.into_iter().filter(|part| asked(part) && (*part != Part::Layer || fits)).collect()
        };
        let bench = Self {
            profiles: wanted.map(|(name, profile)| (profile, parts_of(name, &profile))).collect(),
            schedule: args.schedule,
            num_tokens: match &args.num_tokens[..] {
                [] => vec![1, 8, 32, 128],
                asked => asked.iter().map(|n| n.get()).collect(),
            },
            ep_size: args.ep_size.first().map_or(1, |n| n.get()),
            dtype: precision.dtype(),
            precision,
            weights: args.weights,
            budget: Budget { warm_up: WARM_UP, iterations: args.iters.get(), time: args.seconds },
            seed: args.seed,
        };
        for (profile, parts) in &bench.profiles {
            bench.check(profile, parts)?;
        }
        if let Some(threads) = args.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global();
            pool.with_context(|| format!("cannot start {threads} threads; choose a smaller --threads"))?;
        }
        Ok(bench)
    }

    /// Whether the sizes fit each other and the memory.
    fn check(&self, profile: &Profile, parts: &[Part]) -> Result<(), BadArguments> {
        let Profile { name, num_experts, .. } = profile;
        if let Err(error) = profile.plan(self.ep_size, 0) {
            let error = plain(&error);
            return Err(BadArguments(format!("profile {name}: {error}; choose an --ep-size of at most {num_experts}")));
        }
        let most = self.num_tokens.iter().copied().max().unwrap_or(0);
        // Hidden states of two inputs; in a layer the rows of every slot on their way, some workspace.
        let rows = if parts.contains(&Part::Layer) { 4 + 3 * profile.top_k } else { 4 };
        let per_token = if needs_inputs(parts) { 4 * profile.hidden_size * rows * self.ep_size } else { 0 };
        let layer = if parts.contains(&Part::Layer) { self.weights.layer_bytes(profile) } else { 0 };
        let needed = most.saturating_mul(per_token).saturating_add(layer);
        match machine::available_memory().unwrap_or(isize::MAX as usize / 2) {
            available if needed > available => Err(BadArguments(format!(
                "profile {name} with {most} tokens needs about {:.1} GB of memory and {:.1} GB are available; choose fewer \
                 --num-tokens or a smaller --profile",
                needed as f64 / 1e9,
                available as f64 / 1e9
            ))),
            _ => Ok(()),
        }
    }

    fn run(&self) -> Result<Report> {
        let steps = |(_, parts): &(Profile, Vec<Part>)| 1 + self.num_tokens.len() * parts.len() * 2;
        let bar = progress::bar(1 + self.profiles.iter().map(steps).sum::<usize>());
        bar.set_message("memory bandwidth");
        let bandwidth = Bandwidth::measure();
        bar.inc(1);
        let mut rows = Vec::new();
        for (profile, parts) in &self.profiles {
            bar.set_message(format!("{}: weights", profile.name));
            let layers = self.layers(profile, parts.contains(&Part::Layer))?;
            bar.inc(1);
            for &num_tokens in &self.num_tokens {
                let workload = Workload::new(self, profile, &layers, num_tokens, needs_inputs(parts))?;
                for &part in parts {
                    for choice in [Choice::Random, Choice::Perfect] {
                        // Only the perfect router has a plan.
                        if (part, choice) != (Part::Plan, Choice::Random) {
                            rows.push(workload.row(part, choice, &bandwidth, &bar)?);
                        }
                    }
                }
            }
        }
        bar.finish_and_clear();
        Ok(Report { metadata: self.metadata(bandwidth), rows })
    }

    /// Layers with the same gate and different weights. Two, where memory allows, so that a cache holds less of them.
    fn layers(&self, profile: &Profile, measured: bool) -> Result<Vec<Layer>> {
        let mut random = Random::new(self.seed);
        // Logits with a standard deviation of about 1.5.
        let scale = 4.5 / (profile.hidden_size as f32).sqrt();
        let gate = random.floats(&[profile.num_experts, profile.hidden_size], scale, self.dtype)?;
        let gate = Linear::new(gate, None)?;
        // Where the layer is not measured, routing and order need a gate only.
        let roomy =
            machine::available_memory().is_some_and(|available| available / 4 > self.weights.layer_bytes(profile));
        (0..if measured && roomy { 2 } else { 1 })
            .map(|_| Ok(Layer::random(profile, self.weights, gate.clone(), self.ep_size, measured, &mut random)?))
            .collect()
    }

    fn metadata(&self, bandwidth: Bandwidth) -> Metadata {
        Metadata {
            bench: "bench_moe",
            crate_version: env!("CARGO_PKG_VERSION"),
            device: "cpu",
            cpu_model: machine::cpu_model(),
            threads: rayon::current_num_threads(),
            dtype: self.precision,
            weights: self.weights.name(),
            ep_size: self.ep_size,
            schedule: self.schedule.name(),
            seed: self.seed,
            iters: self.budget.iterations,
            seconds: self.budget.time.as_secs_f64(),
            bandwidth,
        }
    }
}

/// Whether hidden states are needed to measure `parts`.
fn needs_inputs(parts: &[Part]) -> bool {
    parts.iter().any(|part| *part != Part::Plan)
}

/// One number of tokens of one profile.
struct Workload<'a> {
    bench: &'a Bench,
    profile: &'a Profile,
    layers: &'a [Layer],
    num_tokens: usize,
    inputs: Inputs,
}

impl<'a> Workload<'a> {
    fn new(
        bench: &'a Bench,
        profile: &'a Profile,
        layers: &'a [Layer],
        num_tokens: usize,
        with_inputs: bool,
    ) -> Result<Self> {
        let mut random = Random::new(bench.seed ^ num_tokens as u64);
        let input_tokens = if with_inputs { num_tokens } else { 0 };
        let inputs = Inputs::random(profile, layers, bench.ep_size, input_tokens, bench.dtype, &mut random)?;
        Ok(Self { bench, profile, layers, num_tokens, inputs })
    }

    fn row(&self, part: Part, choice: Choice, bandwidth: &Bandwidth, bar: &ProgressBar) -> Result<Row> {
        let &Self { profile, num_tokens, .. } = self;
        let Profile { num_experts, top_k, .. } = *profile;
        bar.set_message(format!(
            "{}: {}, {} routing, {num_tokens} tokens",
            profile.name,
            part_name(part),
            choice.name()
        ));
        let seconds = match part {
            Part::Routing => self.time_routing(choice)?,
            Part::Order | Part::RoutedOrder => self.time_order(choice)?,
            Part::Plan => self.time_plan()?,
            // Shared layers are for devices.
            Part::Layer | Part::Shared => self.time_layer(choice)?,
        };
        let lines = match part {
            Part::Layer if self.bench.ep_size == 1 => Some(self.time_lines(choice)?),
            _ => None,
        };
        bar.inc(1);
        let distinct_experts = match choice {
            Choice::Random => self.inputs.distinct_experts(),
            Choice::Perfect => planned_experts(profile, self.bench.schedule, self.bench.ep_size, num_tokens)?,
        };
        let num_slots = num_tokens * top_k;
        let bytes = match part {
            Part::Routing => (num_tokens * num_experts * self.bench.dtype.size_in_bytes() + num_slots * 8) as f64,
            Part::Order | Part::RoutedOrder => (num_slots * 12 + num_experts * 8 + 4) as f64,
            Part::Plan => (num_slots * 4) as f64,
            Part::Layer | Part::Shared => distinct_experts * self.layers[0].bytes_per_expert() as f64,
        };
        let flops = (part == Part::Layer).then(|| profile.flops(num_tokens) * self.bench.ep_size as f64);
        let copy_gb_per_s = bandwidth.copy_gb_per_s;
        let gb_per_s = bytes / seconds.median / 1e9;
        let Summary { count, median, mean, min, max, stdev, p10, p90 } = seconds.scaled(1e6);
        Ok(Row {
            profile: profile.name,
            part,
            routing: choice.name(),
            num_tokens,
            iterations: count,
            median_us: median,
            p10_us: p10,
            p90_us: p90,
            mean_us: mean,
            stdev_us: stdev,
            min_us: min,
            max_us: max,
            distinct_experts,
            bytes,
            gb_per_s,
            flops,
            gflop_per_s: flops.map(|flops| flops / seconds.median / 1e9),
            copy_gb_per_s,
            copy_ratio: gb_per_s / copy_gb_per_s,
            floor_us: bytes / copy_gb_per_s / 1e3,
            lines,
        })
    }

    /// The routing of rank 0's tokens.
    fn time_routing(&self, choice: Choice) -> Result<Summary> {
        let chooser = Chooser::new(self, choice)?;
        Ok(measure(self.bench.budget, |call| {
            black_box(chooser.route(call, &self.inputs.of_call(call).router_logits[0])?);
            Ok::<_, candle_core::Error>(())
        })?)
    }

    /// The expert order of rank 0's tokens, over all experts.
    fn time_order(&self, choice: Choice) -> Result<Summary> {
        let chooser = Chooser::new(self, choice)?;
        let mut meter = Meter::new(self.bench.budget);
        let num_experts = self.profile.num_experts;
        let mut call = 0;
        while meter.wants_more() {
            let routing = chooser.route(call, &self.inputs.of_call(call).router_logits[0])?;
            let start = Instant::now();
            black_box(ExpertOrder::new(&routing.topk_ids, num_experts, 0..num_experts)?);
            meter.record(start.elapsed());
            call += 1;
        }
        Ok(meter.summary())
    }

    /// Rank 0's plan from nothing to the experts of every slot.
    fn time_plan(&self) -> Result<Summary> {
        let plan = || self.profile.plan(self.bench.ep_size, 0)?.topk_ids(0, self.num_tokens);
        Ok(measure(self.bench.budget, |_| plan().map(|ids| drop(black_box(ids))))?)
    }

    /// The whole layer, on all ranks.
    fn time_layer(&self, choice: Choice) -> Result<Summary> {
        let ep_size = self.bench.ep_size;
        let blocks = |rank| {
            self.layers
                .iter()
                .map(|layer| layer.block(rank, choice, self.bench.schedule))
                .collect::<Result<Vec<_>, _>>()
        };
        if ep_size == 1 {
            return self.time_rank(&mut Solo::new(), &blocks(0)?);
        }
        let ranks = launch(ep_size, DEADLINE, |mut ranks| {
            let blocks = blocks(ranks.rank())?;
            self.time_rank(&mut ranks, &blocks)
        })?;
        let ranks = ranks.into_iter().map(|rank| rank.map_err(|panic| anyhow!(panic))?);
        let summaries = ranks.collect::<Result<Vec<_>>>()?;
        summaries.into_iter().next().context("no rank")
    }

    /// One rank's part; rank 0 holds the clock, and the forward pass ends when all ranks have done their part for it.
    fn time_rank(&self, communicator: &mut dyn Communicator, blocks: &[MoeBlock]) -> Result<Summary> {
        let rank = communicator.rank();
        let mut meter = Meter::new(self.bench.budget);
        for call in 0.. {
            let wants_more = rank == 0 && meter.wants_more();
            if communicator.all_gather_bytes(&[wants_more.into()])?[0] == [0] {
                break;
            }
            let hidden = &self.inputs.of_call(call).hidden[rank];
            let step = Step::agree(communicator, self.num_tokens)?.starting_at(self.first_token(call));
            let start = Instant::now();
            black_box(blocks[call % blocks.len()].forward(hidden, communicator, &step)?);
            meter.record(start.elapsed());
        }
        Ok(meter.summary())
    }

    /// The steps of a layer one by one, as the block takes them.
    fn time_lines(&self, choice: Choice) -> Result<Lines> {
        let chooser = Chooser::new(self, choice)?;
        let num_experts = self.profile.num_experts;
        let placement = Placement::contiguous(num_experts, 1)?;
        let sharing = Sharing { strategy: Strategy::Solo, reduction: Reduction::default(), placement: &placement };
        let solo = &mut Solo::new();
        let step = Step::agree(solo, self.num_tokens)?;
        let [mut gate_and_routing, mut order_line, mut experts, mut combination] =
            [(); 4].map(|()| Meter::new(self.bench.budget));
        let mut call = 0;
        // The experts take the most time, so they decide when it is over.
        while experts.wants_more() {
            let layer = &self.layers[call % self.layers.len()];
            let hidden = &self.inputs.of_call(call).hidden[0];
            let start = Instant::now();
            let routing = chooser.route(call, &layer.gate.forward(hidden)?)?;
            let routed = Instant::now();
            let dispatched = dispatch(solo, &step, &sharing, hidden, &routing)?;
            let sent = Instant::now();
            let order = ExpertOrder::new(dispatched.topk_ids(), num_experts, 0..num_experts)?;
            let ordered = Instant::now();
            let rows = layer.shards[0].forward(dispatched.hidden(), &order)?;
            let computed = Instant::now();
            black_box(combine(solo, &dispatched, &rows, &order)?);
            combination.record(computed.elapsed() + (sent - routed));
            gate_and_routing.record(routed - start);
            order_line.record(ordered - sent);
            experts.record(computed - ordered);
            call += 1;
        }
        let microseconds = |meter: Meter| meter.summary().median * 1e6;
        Ok(Lines {
            gate_and_routing_us: microseconds(gate_and_routing),
            order_us: microseconds(order_line),
            experts_us: microseconds(experts),
            combine_us: microseconds(combination),
        })
    }

    /// Where the perfect plan stands at a call: every layer walks through all of it.
    fn first_token(&self, call: usize) -> usize {
        call / self.layers.len() * self.num_tokens
    }
}

/// Routing on rank 0 as a block does it.
struct Chooser<'a> {
    workload: &'a Workload<'a>,
    router: &'a Router,
    plan: Option<Plan>,
}

impl<'a> Chooser<'a> {
    fn new(workload: &'a Workload<'a>, choice: Choice) -> Result<Self> {
        let plan = match choice {
            Choice::Random => None,
            // Under either schedule rank 0 begins its own plan.
            Choice::Perfect => Some(workload.profile.plan(workload.bench.ep_size, 0)?),
        };
        Ok(Self { workload, router: &workload.layers[0].router, plan })
    }

    fn route(&self, call: usize, router_logits: &candle_core::Tensor) -> candle_core::Result<Routing> {
        let Some(plan) = &self.plan else { return self.router.route(router_logits) };
        let key = PerfectRouterKey { plan: plan.clone(), dtype: router_logits.dtype() };
        let (first, num_tokens) = (self.workload.first_token(call), self.workload.num_tokens);
        self.router.route(&PerfectRouterStore::global().logits_from(&key, first, num_tokens, &Device::Cpu)?)
    }
}
