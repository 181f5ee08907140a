//! Layers whose experts several CUDA devices of one host share, with everything that travels, beside one device that has all experts
//! and all tokens.
//!
//! ```text
//! shared     a graph of calls of blocks, one block for each device, through Peer
//! dispatch   a graph of the same dispatches alone       combine   a graph of the same combines alone
//! alone      a graph of calls of a block with all experts, on the tokens of all ranks
//! ```
//!
//! Calls take several layers in turn, as in `layer`. The gate is included. A sample of several devices is that of the slowest.

use super::{Bench, Stopwatch, cuda, graph::Graph};
use crate::common::random::Random;
use crate::common::report::{BadArguments, Column, digits, row, table};
use crate::common::stats::Summary;
use crate::workload::{Choice, Profile, WeightFormat};
use crate::{Args, DEADLINE, PROFILES, ProfileName};
use anyhow::{Context, Result, anyhow};
use candle_core::cuda_backend::cudarc::driver::CudaContext;
use candle_core::{DType, Device, Tensor};
use candle_moe::block::MoeBlock;
use candle_moe::ep::{
    Communicator, Dispatched, Peer, Placement, Reduction, Sharing, Step, Strategy, Threads, combine_sums, dispatch,
    launch,
};
use candle_moe::experts::{Experts, Linear};
use candle_moe::perfect_router::{PerfectRouterConfig, Schedule};
use candle_moe::routing::{Router, Routing};
use serde::Serialize;
use std::time::Duration;

/// Layers that calls take in turn.
const LAYERS: usize = 2;
/// Experts whose values are drawn; the others repeat them.
const DISTINCT_EXPERTS: usize = 4;
const CALLS: usize = 8;
const MAX_REPLAYS: usize = 40;
const WARM_UP: usize = 5;
/// On each device.
const MAX_TOKENS: usize = 4096;

/// What the arguments say about shared layers.
pub(super) struct Options {
    profiles: Vec<Profile>,
    ep_sizes: Vec<usize>,
    num_tokens: Vec<usize>,
    weights: WeightFormat,
    schedule: Schedule,
}

/// Times are of one call, in microseconds.
#[derive(Debug, Serialize)]
pub(super) struct SharedRow {
    profile: &'static str,
    weights: &'static str,
    /// Devices that share the experts.
    ep_size: usize,
    routing: &'static str,
    /// On each device.
    num_tokens: usize,
    median_us: f64,
    p10_us: f64,
    p90_us: f64,
    dispatch_us: f64,
    combine_us: f64,
    /// What is left of the median: gate, routing, order and experts.
    experts_us: f64,
    /// All tokens on one device with all experts.
    alone_us: f64,
    /// Of all devices.
    tokens_per_s: f64,
    /// `alone_us / median_us`: the same tokens on more devices.
    speedup: f64,
}

impl Options {
    pub(super) fn new(args: &Args) -> Result<Self, BadArguments> {
        let asked = |name: ProfileName| match args.profile.is_empty() {
            true => name == ProfileName::GptOss120b,
            false => {
                args.profile.contains(&name) || (args.profile.contains(&ProfileName::All) && name != ProfileName::Tiny)
            }
        };
        let options = Self {
            profiles: PROFILES.into_iter().filter(|(name, _)| asked(*name)).map(|(_, profile)| profile).collect(),
            ep_sizes: match &args.ep_size[..] {
                [] => vec![2],
                asked => asked.iter().map(|n| n.get()).collect(),
            },
            num_tokens: match &args.num_tokens[..] {
                [] => (0..).map(|power| 1 << power).take_while(|&count| count <= MAX_TOKENS).collect(),
                asked => asked.iter().map(|n| n.get()).collect(),
            },
            weights: args.weights,
            schedule: args.schedule,
        };
        let devices = CudaContext::device_count().map_or(0, |count| count.max(0) as usize);
        for &ep_size in &options.ep_sizes {
            if ep_size > devices {
                let text = format!(
                    "--only shared needs {ep_size} CUDA devices and there are {devices}; choose a smaller --ep-size"
                );
                return Err(BadArguments(text));
            }
            if let Some(profile) = options.profiles.iter().find(|profile| profile.num_experts % ep_size != 0) {
                let Profile { name, num_experts, .. } = profile;
                let text = format!("profile {name} has {num_experts} experts; choose an --ep-size that divides them");
                return Err(BadArguments(text));
            }
        }
        Ok(options)
    }

    pub(super) fn run(&self, bench: &Bench) -> Result<Vec<SharedRow>> {
        let mut rows = Vec::new();
        for profile in &self.profiles {
            for &ep_size in &self.ep_sizes {
                let layer = Layer::new(bench, self, *profile, ep_size)?;
                let alone = layer.alone()?;
                let ranks = launch(ep_size, DEADLINE, |threads| layer.rank(threads))?;
                let ranks = ranks.into_iter().map(|rank| rank.map_err(|panic| anyhow!(panic))?);
                let shared = ranks.collect::<Result<Vec<_>>>()?.into_iter().next().context("no rank")?;
                rows.extend(alone.into_iter().zip(shared).map(|(alone, shared)| layer.row(alone, shared)));
            }
        }
        Ok(rows)
    }
}

/// The numbers of a layer, on the host.
struct Layer<'a> {
    bench: &'a Bench,
    options: &'a Options,
    profile: Profile,
    ep_size: usize,
    gate: Tensor,
    router: Router,
    /// Of one device.
    experts: Experts,
    all_experts: Experts,
    /// Of all tokens of the longest call, and some more.
    hidden: Tensor,
}

/// Medians in seconds, of the slowest device.
struct Times {
    choice: Choice,
    num_tokens: usize,
    whole: Summary,
    dispatch: f64,
    combine: f64,
}

impl<'a> Layer<'a> {
    fn new(bench: &'a Bench, options: &'a Options, profile: Profile, ep_size: usize) -> Result<Self> {
        let Profile { num_experts, hidden_size, top_k, method, .. } = profile;
        let (mut random, dtype) = (Random::new(bench.seed), bench.precision.dtype());
        let mut router = Router::new(method, top_k)?;
        if method.takes_selection_bias() {
            router = router.with_selection_bias(&random.floats(&[num_experts], 0.1, DType::F32)?)?;
        }
        let rows = (options.num_tokens.iter().copied().max().unwrap_or(0) + CALLS) * ep_size;
        // Logits with a deviation of 1.5.
        let gate = random.floats(&[num_experts, hidden_size], 4.5 / (hidden_size as f32).sqrt(), dtype)?;
        Ok(Self {
            gate,
            router,
            experts: random.experts(&profile, options.weights, num_experts / ep_size, DISTINCT_EXPERTS)?,
            all_experts: random.experts(&profile, options.weights, num_experts, DISTINCT_EXPERTS)?,
            hidden: random.many_floats(&[rows, hidden_size], 1.0)?.to_dtype(dtype)?,
            bench,
            options,
            profile,
            ep_size,
        })
    }

    fn blocks(&self, ep_size: usize, rank: usize, choice: Choice, device: &Device) -> Result<Vec<MoeBlock>> {
        let experts = if ep_size == 1 { &self.all_experts } else { &self.experts };
        let config = PerfectRouterConfig { schedule: self.options.schedule, ..Default::default() };
        let builder = MoeBlock::builder(Linear::new(self.gate.clone(), None)?, self.router.clone(), experts.clone());
        let builder = builder.shard(ep_size, rank).reduction(Reduction::RankPartial).perfect_router_config(config);
        let block = builder.peer_access(ep_size > 1).perfect_router(choice == Choice::Perfect).build()?;
        Ok((0..LAYERS).map(|_| block.to_device(device)).collect::<candle_core::Result<_>>()?)
    }

    /// Rows and routings that are asked for, in the order of the result.
    fn cases(&self) -> impl Iterator<Item = (Choice, usize)> {
        let of_choice = |choice| self.options.num_tokens.iter().map(move |&num_tokens| (choice, num_tokens));
        [Choice::Random, Choice::Perfect].into_iter().flat_map(of_choice)
    }

    /// Seconds of a call of one device that has everything.
    fn alone(&self) -> Result<Vec<f64>> {
        let device = &self.bench.device;
        let mut medians = Vec::new();
        let mut blocks = self.blocks(1, 0, Choice::Random, device)?;
        for (choice, num_tokens) in self.cases() {
            blocks.iter_mut().try_for_each(|block| block.set_perfect_router(choice == Choice::Perfect))?;
            let all = num_tokens * self.ep_size;
            let inputs = (0..CALLS).map(|call| self.hidden.narrow(0, call, all)?.to_device(device));
            let inputs = inputs.collect::<candle_core::Result<Vec<_>>>()?;
            let seconds = self.bench.replays(CALLS, |call| blocks[call % LAYERS].forward_alone(&inputs[call]))?;
            medians.push(seconds.median / CALLS as f64);
        }
        Ok(medians)
    }

    /// The life of a rank; all get the same result.
    fn rank(&self, threads: Threads) -> Result<Vec<Times>> {
        let rank = threads.rank();
        let device = Device::new_cuda(rank)?;
        let mut ranks = Peer::over_threads(threads, &device)?;
        let mut blocks = self.blocks(self.ep_size, rank, Choice::Random, &device)?;
        let mut times = Vec::new();
        for (choice, num_tokens) in self.cases() {
            blocks.iter_mut().try_for_each(|block| block.set_perfect_router(choice == Choice::Perfect))?;
            times.push(self.measure(&mut ranks, &blocks, choice, num_tokens)?);
        }
        Ok(times)
    }

    fn measure(&self, ranks: &mut Peer, blocks: &[MoeBlock], choice: Choice, num_tokens: usize) -> Result<Times> {
        let device = ranks.device().clone();
        let first = ranks.rank() * num_tokens;
        let inputs = (0..CALLS).map(|call| self.hidden.narrow(0, call + first, num_tokens)?.to_device(&device));
        let inputs = inputs.collect::<candle_core::Result<Vec<_>>>()?;
        let step = Step::agree(ranks, num_tokens)?;
        // First calls load kernels, make rooms, and say where tokens go.
        let mut routings = Vec::new();
        for (call, hidden) in inputs.iter().enumerate() {
            routings.push(blocks[call % LAYERS].forward_traced(hidden, ranks, &step)?.routing);
        }
        ranks.settle()?;
        let whole = Graph::capture(cuda(&device)?, || {
            inputs.iter().enumerate().try_for_each(|(call, hidden)| {
                blocks[call % LAYERS].forward(hidden, ranks, &step).map(drop).map_err(Into::into)
            })
        })?;
        let whole = self.replays(ranks, &whole)?;
        let placement = Placement::contiguous(self.profile.num_experts, self.ep_size)?;
        let sharing = Sharing { strategy: Strategy::Peer, reduction: Reduction::RankPartial, placement: &placement };
        let send = |ranks: &mut Peer, hidden: &Tensor, routing: &Routing| -> candle_core::Result<Dispatched> {
            dispatch(ranks, &step, &sharing, hidden, routing)
        };
        let mut sent = None;
        let dispatches = Graph::capture(cuda(&device)?, || {
            inputs.iter().zip(&routings).try_for_each(|(hidden, routing)| {
                sent = Some(send(ranks, hidden, routing)?);
                Ok(())
            })
        })?;
        let sent = sent.context("no call")?;
        let combines = Graph::capture(cuda(&device)?, || {
            (0..CALLS).try_for_each(|_| {
                let (rows, hidden_size) = sent.hidden().dims2()?;
                let sums = ranks.room_for_results(sent.hidden().dtype(), rows, hidden_size)?;
                combine_sums(ranks, &sent, &sums).map(drop).map_err(Into::into)
            })
        })?;
        let (dispatch, combine) = (self.replays(ranks, &dispatches)?.median, self.replays(ranks, &combines)?.median);
        Ok(Times { choice, num_tokens, whole, dispatch, combine })
    }

    /// Seconds of a call, from replays of a graph of [`CALLS`] on all devices at once.
    fn replays(&self, ranks: &mut Peer, graph: &Graph) -> Result<Summary> {
        let stopwatch = Stopwatch::new(cuda(ranks.device())?)?;
        let replays = self.bench.budget.iterations.min(MAX_REPLAYS);
        let mut seconds = Vec::new();
        for replay in 0..WARM_UP + replays {
            ranks.barrier()?;
            let took: Duration = stopwatch.replay(graph)?;
            ranks.settle()?;
            if replay >= WARM_UP {
                seconds.push(took.as_secs_f64() / CALLS as f64);
            }
        }
        let of_ranks = ranks.all_gather_bytes(&serde_json::to_vec(&seconds)?)?;
        let of_ranks = of_ranks.iter().map(|bytes| serde_json::from_slice::<Vec<f64>>(bytes));
        let of_ranks = of_ranks.collect::<Result<Vec<_>, _>>()?;
        let slowest = |replay: usize| of_ranks.iter().map(|of_rank| of_rank[replay]).fold(0.0, f64::max);
        Ok(Summary::of(&(0..replays).map(slowest).collect::<Vec<_>>()))
    }

    fn row(&self, alone: f64, times: Times) -> SharedRow {
        let Times { choice, num_tokens, whole, dispatch, combine } = times;
        SharedRow {
            profile: self.profile.name,
            weights: self.options.weights.name(),
            ep_size: self.ep_size,
            routing: choice.name(),
            num_tokens,
            median_us: whole.median * 1e6,
            p10_us: whole.p10 * 1e6,
            p90_us: whole.p90 * 1e6,
            dispatch_us: dispatch * 1e6,
            combine_us: combine * 1e6,
            experts_us: (whole.median - dispatch - combine) * 1e6,
            alone_us: alone * 1e6,
            tokens_per_s: (num_tokens * self.ep_size) as f64 / whole.median,
            speedup: alone / whole.median,
        }
    }
}

/// For people.
pub(super) fn text(rows: &[SharedRow]) -> String {
    let mut table = table([
        Column::Text("profile"),
        Column::Number("devices"),
        Column::Text("routing"),
        Column::Number("tokens"),
        Column::Number("us"),
        Column::Number("p10 .. p90"),
        Column::Number("dispatch us"),
        Column::Number("experts us"),
        Column::Number("combine us"),
        Column::Number("tokens / s"),
        Column::Number("one device us"),
        Column::Number("speedup"),
    ]);
    for line in rows {
        table.add_row(row([
            line.profile.to_string(),
            line.ep_size.to_string(),
            line.routing.to_string(),
            line.num_tokens.to_string(),
            digits(line.median_us),
            format!("{} .. {}", digits(line.p10_us), digits(line.p90_us)),
            digits(line.dispatch_us),
            digits(line.experts_us),
            digits(line.combine_us),
            digits(line.tokens_per_s),
            digits(line.alone_us),
            format!("{:.2}", line.speedup),
        ]));
    }
    format!(
        "Layers that devices share, each with as many tokens, and one device with all experts and all these tokens. The gate is \
         included; experts: what dispatch and combine leave of the whole.\n{}\n\
         Perfect routing is for measuring: the output of a model that runs with it is meaningless.",
        table.trim_fmt()
    )
}
