//! Routing, expert order and whole layers on a CUDA device.
//!
//! A row is the time of one call inside a captured graph, from events around its replay: as many calls as there are inputs,
//! so that logits come from memory and not from the cache (`layer` says what stands in for that in layers). The outputs of a call are freed inside the graph, which
//! takes nodes of its own; `allocation_us` says what an allocation of one output costs beside an empty kernel.

mod layer;
mod plot;
mod report;
mod shared;

use crate::common::graph::{self, Graph, Stopwatch};
use crate::common::progress;
use crate::common::random::Random;
use crate::common::report::{BadArguments, OutputFormat, Verdict, plain, print, print_json};
use crate::common::stats::{Budget, Summary, measure};
use crate::{Args, Part, Precision, Shape, html, part_name};
use anyhow::{Context, Result, anyhow};
use candle_core::{CudaDevice, D, DType, Device, Tensor};
use candle_moe::order::{ExpertOrder, OrderOptions, RoutedOrder};
use candle_moe::routing::{ExpertGroups, Router, RoutingMethod};
use report::{Candle, Metadata, Report, Row, Timing};
use std::hint::black_box;
use std::path::PathBuf;

/// Bytes of logits that the calls of a graph read at least, where that takes no more than the most calls.
const ROTATED_BYTES: usize = 128 << 20;
const MAX_CALLS: usize = 32;
const MIN_CALLS: usize = 4;
/// Bytes of each buffer of the copy that bandwidth is measured by.
const COPY_BYTES: usize = 512 << 20;
/// Rows and columns of the matrices whose product is the rate of a large one.
const MATMUL_SIZE: usize = 8192;
/// Rows of a tile map.
const TILE_ROWS: usize = 64;

/// What people route with, and what the kernels are compared on.
fn default_shapes() -> Vec<(Shape, RoutingMethod)> {
    let groups = ExpertGroups { num_groups: 8, topk_group: 4 };
    let deepseek = RoutingMethod::DeepSeekV3 { groups, routed_scaling_factor: 2.5 };
    let pairs = [
        (16, 1),
        (32, 4),
        (60, 4),
        (64, 6),
        (96, 6),
        (128, 4),
        (160, 6),
        (256, 8),
        (384, 8),
        (512, 10),
        (512, 22),
        (576, 8),
        (896, 16),
    ];
    let renormalize = pairs.map(|(num_experts, top_k)| (Shape { num_experts, top_k }, RoutingMethod::Renormalize));
    renormalize.into_iter().chain([(Shape { num_experts: 256, top_k: 8 }, deepseek)]).collect()
}

pub(crate) fn run(args: &Args, ordinal: usize) -> Result<Verdict> {
    let bench = Bench::new(args, ordinal)?;
    let report = bench.run()?;
    if let Some(file) = &bench.plot {
        std::fs::write(file, plot::svg(&report)).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if let Some(file) = &args.html {
        html::write(file, &format!("{}\n{}", report.heading(), report.floors_text()), &report.timed())?;
    }
    match args.output {
        OutputFormat::Json => print_json(&report)?,
        OutputFormat::Table => print(report.text())?,
    }
    Ok(Verdict::Passed)
}

/// The parts that are measured on shapes, and whether layers are measured.
fn parts(args: &Args) -> Result<(Vec<Part>, bool), BadArguments> {
    let of_shapes = [Part::Routing, Part::Order, Part::RoutedOrder];
    let of_layers = [Part::Layer, Part::Shared];
    if let Some(&part) = args.only.iter().find(|part| !of_shapes.contains(part) && !of_layers.contains(part)) {
        let text = format!(
            "--only {} is measured on the CPU only; choose routing, order, routed-order, layer or shared",
            part_name(part)
        );
        return Err(BadArguments(text));
    }
    let (names_shapes, names_layers) = (!args.shape.is_empty() || args.method.is_some(), !args.profile.is_empty());
    let asked = |part: &Part, otherwise| if args.only.is_empty() { otherwise } else { args.only.contains(part) };
    let parts: Vec<_> = of_shapes.into_iter().filter(|part| asked(part, names_shapes || !names_layers)).collect();
    let layers = asked(&Part::Layer, names_layers || !names_shapes);
    let layers_at_all = layers || args.only.contains(&Part::Shared);
    if !layers_at_all && (names_layers || !args.ep_size.is_empty() || args.skew > 0.0 || args.plot.is_some()) {
        let text = "--profile, --ep-size, --skew and --plot are for layers; choose --only layer, or --shape EXPERTSxTOP_K for \
                    routing and order";
        return Err(BadArguments(text.into()));
    }
    if parts.is_empty() && names_shapes {
        let text = "--shape and --method are for routing and order; choose a --profile for layers";
        return Err(BadArguments(text.into()));
    }
    Ok((parts, layers))
}

struct Bench {
    device: Device,
    stopwatch: Stopwatch,
    parts: Vec<Part>,
    shapes: Vec<(Shape, RoutingMethod)>,
    num_tokens: Vec<usize>,
    layers: Option<layer::Options>,
    shared: Option<shared::Options>,
    plot: Option<PathBuf>,
    precision: Precision,
    budget: Budget,
    seed: u64,
}

impl Bench {
    fn new(args: &Args, ordinal: usize) -> Result<Self> {
        let (parts, measures_layers) = parts(args)?;
        let layers = measures_layers.then(|| layer::Options::new(args)).transpose()?;
        let shared = args.only.contains(&Part::Shared).then(|| shared::Options::new(args)).transpose()?;
        let method = args.method.unwrap_or(RoutingMethod::Renormalize);
        let shapes = match (&args.shape[..], args.method) {
            ([], None) => default_shapes(),
            ([], Some(method)) => default_shapes().into_iter().map(|(shape, _)| (shape, method)).collect(),
            (shapes, _) => shapes.iter().map(|&shape| (shape, method)).collect(),
        };
        let device = Device::new_cuda(ordinal)
            .map_err(|error| anyhow!("cannot use CUDA device {ordinal}: {}", plain(&error)))?;
        Ok(Self {
            stopwatch: Stopwatch::new(cuda(&device)?)?,
            shapes: if parts.is_empty() { Vec::new() } else { shapes },
            parts,
            num_tokens: match &args.num_tokens[..] {
                [] => (0..=15).map(|power| 1 << power).collect(),
                asked => asked.iter().map(|n| n.get()).collect(),
            },
            layers,
            shared,
            plot: args.plot.clone(),
            precision: args.dtype.unwrap_or(Precision::Bf16),
            budget: Budget { warm_up: 3, iterations: args.iters.get(), time: args.seconds },
            seed: args.seed,
            device,
        })
    }

    fn run(&self) -> Result<Report> {
        let num_layer_rows = self.layers.as_ref().map_or(0, layer::Options::num_rows);
        let num_rows = self.shapes.len() * self.num_tokens.len() * (self.parts.len() + 1) + num_layer_rows;
        let bar = progress::bar(1 + num_rows);
        bar.set_message("floors");
        let metadata = self.metadata()?;
        bar.inc(1);
        let mut rows = Vec::new();
        for &(shape, method) in &self.shapes {
            for &num_tokens in &self.num_tokens {
                let Shape { num_experts, top_k } = shape;
                bar.set_message(format!("{num_experts} experts, top-{top_k}, {num_tokens} tokens"));
                let workload = Workload::new(self, shape, method, num_tokens)?;
                let candle = workload.candle()?;
                bar.inc(1);
                for &part in &self.parts {
                    rows.push(workload.row(
                        part,
                        &metadata,
                        (part == Part::Routing).then(|| candle.clone()).flatten(),
                    )?);
                    bar.inc(1);
                }
            }
        }
        let layers = match &self.layers {
            Some(layers) => layers.run(self, &metadata, &bar)?,
            None => Vec::new(),
        };
        let shared = match &self.shared {
            Some(shared) => {
                bar.set_message("shared layers");
                shared.run(self)?
            }
            None => Vec::new(),
        };
        bar.finish_and_clear();
        Ok(Report { metadata, rows, layers, shared })
    }

    /// The replays of a graph of `calls` calls, each with outputs of its own.
    fn replays<T>(&self, calls: usize, call: impl Fn(usize) -> candle_core::Result<T>) -> Result<Summary> {
        let all = || (0..calls).try_for_each(|input| call(input).map(|output| drop(black_box(output))));
        // First calls load kernels.
        all()?;
        let graph = Graph::capture(cuda(&self.device)?, || Ok(all()?))?;
        self.stopwatch.replays(Budget { warm_up: 1, ..self.budget }, &graph)
    }

    fn metadata(&self) -> Result<Metadata> {
        let device = cuda(&self.device)?;
        let context = device.cuda_stream().context().clone();
        let (major, minor) = context.compute_capability()?;
        Ok(Metadata {
            bench: "bench_moe",
            crate_version: env!("CARGO_PKG_VERSION"),
            device: format!("cuda:{}", context.ordinal()),
            device_name: context.name()?,
            compute_capability: format!("{major}.{minor}"),
            dtype: self.precision,
            tile_rows: TILE_ROWS,
            seed: self.seed,
            iters: self.budget.iterations,
            seconds: self.budget.time.as_secs_f64(),
            copy_gb_per_s: self.copy_gb_per_s()?,
            matmul_tflop_per_s: self.layers.as_ref().and_then(|_| self.matmul_tflop_per_s()),
            empty_kernel_us: self.empty_kernel_us(false),
            allocation_us: match (self.empty_kernel_us(true), self.empty_kernel_us(false)) {
                (Some(both), Some(kernel)) => Some(both - kernel),
                _ => None,
            },
        })
    }

    /// Bytes read and written by a copy inside the device's memory, per second.
    fn copy_gb_per_s(&self) -> Result<f64> {
        let device = cuda(&self.device)?;
        let source = device.alloc_zeros::<u8>(COPY_BYTES)?;
        let mut target = device.alloc_zeros::<u8>(COPY_BYTES)?;
        let budget = Budget { warm_up: 2, iterations: 20, ..self.budget };
        let seconds = self.stopwatch.measure(budget, || Ok(device.memcpy_dtod(&source, &mut target)?))?;
        Ok(2.0 * COPY_BYTES as f64 / seconds.median / 1e9)
    }

    /// Of Candle's product of two large matrices in bf16; nothing where the device has none.
    fn matmul_tflop_per_s(&self) -> Option<f64> {
        let mut random = Random::new(self.seed);
        let mut square = |size: usize| {
            let matrix = random.many_floats(&[size, size], 1.0)?.to_dtype(DType::BF16)?;
            matrix.to_device(&self.device)
        };
        // A small one says whether there is any.
        let small = square(16).ok()?;
        small.matmul(&small).ok()?;
        let (a, b) = (square(MATMUL_SIZE).ok()?, square(MATMUL_SIZE).ok()?);
        let budget = Budget { warm_up: 3, iterations: 20, ..self.budget };
        let seconds = self.stopwatch.measure(budget, || {
            black_box(a.matmul(&b)?);
            Ok(())
        });
        Some(2.0 * (MATMUL_SIZE as f64).powi(3) / seconds.ok()?.median / 1e12)
    }

    /// A launch of nothing, in a graph; with an allocation that is freed beside it, if asked for. Nothing where the driver
    /// does not take the kernel.
    fn empty_kernel_us(&self, allocates: bool) -> Option<f64> {
        let device = cuda(&self.device).ok()?;
        graph::launch_empty(device).ok()?;
        let graph = Graph::capture(device, || {
            for _ in 0..MAX_CALLS {
                let _held = match allocates {
                    // SAFETY: nothing reads it.
                    true => Some(unsafe { device.alloc::<u32>(1024)? }),
                    false => None,
                };
                graph::launch_empty(device)?;
            }
            Ok(())
        });
        let seconds = self.stopwatch.replays(self.budget, &graph.ok()?).ok()?;
        Some(seconds.median * 1e6 / MAX_CALLS as f64)
    }
}

fn cuda(device: &Device) -> Result<&CudaDevice> {
    Ok(device.as_cuda_device()?)
}

/// One shape with one number of tokens.
struct Workload<'a> {
    bench: &'a Bench,
    shape: Shape,
    router: Router,
    /// The router's selection bias, if it has one.
    bias: Option<Tensor>,
    num_tokens: usize,
    /// Of every call, in turn.
    logits: Vec<Tensor>,
}

impl<'a> Workload<'a> {
    fn new(bench: &'a Bench, shape: Shape, method: RoutingMethod, num_tokens: usize) -> Result<Self> {
        let Shape { num_experts, top_k } = shape;
        let mut router = Router::new(method, top_k)?;
        let dtype = bench.precision.dtype();
        let bytes = (num_tokens * num_experts * dtype.size_in_bytes()).max(1);
        let num_inputs = ROTATED_BYTES.div_ceil(bytes).clamp(MIN_CALLS, MAX_CALLS);
        let mut random = Random::new(bench.seed ^ (num_experts * 31 + top_k) as u64 ^ (num_tokens as u64) << 32);
        let one = random.floats(&[num_tokens, num_experts], 1.5, dtype)?;
        let mut bias = None;
        if method.takes_selection_bias() {
            // As the models have one.
            let values = random.floats(&[num_experts], 0.1, DType::F32)?;
            router = router.with_selection_bias(&values)?;
            bias = Some(values.to_device(&bench.device)?);
        }
        // Different rows first, so that every call chooses differently; the host's random numbers are made once.
        let turned = |turn: usize| {
            let first = turn * num_tokens / num_inputs;
            let (head, tail) = (one.narrow(0, 0, first)?, one.narrow(0, first, num_tokens - first)?);
            let turned = if first == 0 { one.clone() } else { Tensor::cat(&[&tail, &head], 0)? };
            turned.to_device(&bench.device)
        };
        let logits = (0..num_inputs).map(turned).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Self { bench, shape, router, bias, num_tokens, logits })
    }

    fn row(&self, part: Part, metadata: &Metadata, candle: Option<Candle>) -> Result<Row> {
        let Shape { num_experts, top_k } = self.shape;
        let seconds = match part {
            Part::Order => self.time_order(),
            Part::RoutedOrder => self.time_routed_order(),
            _ => self.time_routing(),
        }
        .with_context(|| format!("{part:?} of {} tokens, {num_experts} experts, top-{top_k}", self.num_tokens))?;
        let Summary { median, p10, p90, count, .. } = seconds.scaled(1e6 / self.logits.len() as f64);
        let bytes = self.bytes(part);
        let copy_us = bytes as f64 / metadata.copy_gb_per_s / 1e3;
        let floor_us = metadata.empty_kernel_us.map_or(copy_us, |empty| empty.max(copy_us));
        Ok(Row {
            part,
            method: self.router.method().to_string(),
            num_experts,
            top_k,
            num_tokens: self.num_tokens,
            calls: self.logits.len(),
            iterations: count,
            median_us: median,
            p10_us: p10,
            p90_us: p90,
            bytes,
            floor_us,
            floor_ratio: floor_us / median,
            candle,
        })
    }

    /// What a call must read and write.
    fn bytes(&self, part: Part) -> usize {
        let Shape { num_experts, top_k } = self.shape;
        let num_slots = self.num_tokens * top_k;
        let routing = self.num_tokens * num_experts * self.bench.precision.dtype().size_in_bytes() + num_slots * 8;
        let order = num_slots * 8 + num_experts * 8 + 4;
        match part {
            Part::Order => order + num_slots * 4,
            Part::RoutedOrder => routing + order + 8 * (num_slots / TILE_ROWS + num_experts.min(num_slots)),
            _ => routing,
        }
    }

    /// The replays of a graph in which `call` is done for every input.
    fn replays<T>(&self, call: impl Fn(usize) -> candle_core::Result<T>) -> Result<Summary> {
        self.bench.replays(self.logits.len(), call)
    }

    fn time_routing(&self) -> Result<Summary> {
        self.replays(|input| self.router.route(&self.logits[input]))
    }

    fn time_order(&self) -> Result<Summary> {
        let ids = self.logits.iter().map(|logits| Ok(self.router.route(logits)?.topk_ids));
        let ids = ids.collect::<candle_core::Result<Vec<_>>>()?;
        self.replays(|input| ExpertOrder::new(&ids[input], self.shape.num_experts, 0..self.shape.num_experts))
    }

    fn time_routed_order(&self) -> Result<Summary> {
        let options = OrderOptions { tile_rows: Some(TILE_ROWS), ..Default::default() };
        self.replays(|input| RoutedOrder::new(&self.router, &self.logits[input], &options))
    }

    /// Ids and weights composed of Candle's own operations.
    fn compose(&self, input: usize) -> candle_core::Result<(Tensor, Tensor)> {
        use RoutingMethod::{DeepSeekV4, Default, Llama4, Renormalize, RenormalizeNaive};
        let (logits, method) = (self.logits[input].to_dtype(DType::F32)?, self.router.method());
        let scores = match method {
            Default | Renormalize | RenormalizeNaive => candle_nn::ops::softmax_last_dim(&logits)?,
            DeepSeekV4 { .. } => (logits.exp()? + 1.0)?.log()?.sqrt()?,
            _ => candle_nn::ops::sigmoid(&logits)?,
        };
        let choice = match &self.bias {
            Some(bias) => scores.broadcast_add(bias)?,
            None => scores.clone(),
        };
        let choice = if method.groups().is_limit() { keep_best_groups(&choice, method.groups())? } else { choice };
        let ids = choice.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, self.shape.top_k)?.contiguous()?;
        let weights = scores.gather(&ids, D::Minus1)?;
        let weights = match method {
            Default | Llama4 => weights,
            _ => weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?,
        };
        let factor = f64::from(method.routed_scaling_factor());
        Ok((ids, if factor == 1.0 { weights } else { (weights * factor)? }))
    }

    /// The time of the same routing by [`compose`](Self::compose).
    fn candle(&self) -> Result<Option<Candle>> {
        if !self.bench.parts.contains(&Part::Routing) {
            return Ok(None);
        }
        let compose = |input: usize| self.compose(input);
        if let Err(error) = compose(0) {
            return Ok(Some(Candle { median_us: None, timing: Timing::Failed, error: Some(plain(&error)) }));
        }
        // Candle uploads shapes for some operations; a graph can hold only those that were uploaded before.
        let uploaded = cuda(&self.bench.device)?.enable_cuda_graph_htod_cache();
        let replayed = self.replays(compose);
        drop(uploaded);
        if let Ok(seconds) = replayed {
            let median_us = Some(seconds.median * 1e6 / self.logits.len() as f64);
            return Ok(Some(Candle { median_us, timing: Timing::Graph, error: None }));
        }
        let all = |_| -> Result<()> {
            (0..self.logits.len()).try_for_each(|input| compose(input).map(|output| drop(black_box(output))))?;
            Ok(self.bench.device.synchronize()?)
        };
        let seconds = measure(self.bench.budget, all)?;
        let median_us = Some(seconds.median * 1e6 / self.logits.len() as f64);
        Ok(Some(Candle { median_us, timing: Timing::Wall, error: None }))
    }
}

/// Scores that are very low outside of the groups whose two best experts have the greatest sums.
fn keep_best_groups(scores: &Tensor, groups: ExpertGroups) -> candle_core::Result<Tensor> {
    const LOW: f64 = -1e9;
    let ExpertGroups { num_groups, topk_group } = groups;
    let (num_tokens, num_experts) = scores.dims2()?;
    let size = num_experts / num_groups;
    let grouped = scores.reshape((num_tokens, num_groups, size))?;
    let (sorted, _) = grouped.sort_last_dim(false)?;
    let sums = sorted.narrow(D::Minus1, 0, size.min(2))?.sum(D::Minus1)?;
    let kept = sums.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, topk_group)?.contiguous()?;
    let ones = kept.ones_like()?.to_dtype(DType::F32)?;
    let is_kept = sums.zeros_like()?.scatter_add(&kept, &ones, D::Minus1)?;
    let penalty = is_kept.affine(-LOW, LOW)?.unsqueeze(D::Minus1)?;
    grouped.broadcast_add(&penalty)?.reshape((num_tokens, num_experts))
}
