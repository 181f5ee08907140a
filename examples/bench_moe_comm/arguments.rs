//! The command line, and what it asks for.

use crate::backends::{Backend, Transport, Wish, Wishes};
use crate::common::arguments::with_dashes;
use crate::common::machine;
use crate::common::report::{BadArguments, OutputFormat, plain};
use crate::profiles::ProfileName;
use crate::settings::Settings;
use crate::workload::Workload;
use candle_core::DType;
use candle_moe::ep::{MAX_PROCS, MAX_RANKS, Placement, Reduction, Strategy};
use candle_moe::perfect_router::enabled_by_environment;
use clap::{Parser, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

const DEFAULT_EP_SIZE: usize = 4;
const DEFAULT_BATCH_END: usize = 64;
const DEFAULT_HOT_FRACTION: f32 = 0.5;

/// Time dispatch and combine of an expert-parallel MoE layer alone, without experts.
///
/// Tokens go to the ranks of their experts, which hand back what they were given, and the results come home and are summed.
/// Before each batch size is timed, one round is compared with the sum worked out by each rank for itself.
///
/// Every time is that of a rank from entering dispatch (or combine) to leaving it; all ranks leave a barrier right before. On
/// CUDA devices it is a tenth of what ten of them take on the device in a graph, but for exchange, which no graph can hold.
/// GB/s: "wire" counts the bytes that go to other ranks (hidden states, expert ids, weights, results); "logical" counts
/// those of tokens and results that stay home too. Where ranks are threads the wire is memory.
///
/// Perfect routing is for measuring: the output of a model that runs with it is meaningless.
///
/// Names of flags may have underscores for dashes: --ep_size. Ranks may also be started by torchrun, srun or mpirun.
#[derive(Debug, Parser)]
#[command(name = "bench_moe_comm", allow_negative_numbers = true)]
pub(crate) struct Arguments {
    /// Ranks that share the experts [default: 4, or as many as a launcher started]
    #[arg(long, value_name = "N")]
    ep_size: Option<usize>,
    /// What ranks are and how tokens travel, separated by commas: threads, procs or nccl (a CUDA device for each rank), by the
    /// best strategy or with -gather, -exchange, -replicated or -solo behind it; peer (CUDA devices that reach each other's
    /// memory); or all, which is those of threads and procs. With -replicated every rank holds the tokens of all ranks
    /// [default: threads, or procs where a launcher started the ranks]
    #[arg(long, value_name = "NAMES")]
    backend: Option<Wishes>,
    /// Sizes of the layer
    #[arg(long, value_enum, value_name = "NAME", default_value_t = ProfileName::GptOss)]
    profile: ProfileName,
    /// Another hidden size than the profile's
    #[arg(long, value_name = "N")]
    hidden_size: Option<usize>,
    /// Other experts per token than the profile's
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Another number of experts than the profile's
    #[arg(long, value_name = "N")]
    num_experts: Option<usize>,
    /// Dtype of the hidden states; results travel in float32, or with peer in this
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    dtype: Precision,
    /// How the results of a token's experts are summed
    #[arg(long, value_enum, default_value_t = ReductionName::SlotOrder)]
    reduction: ReductionName,
    /// Smallest number of tokens of each rank
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    batch_begin: usize,
    /// Largest number of tokens of each rank [default: 64, or the smallest if that is more]
    #[arg(short = 'e', long, value_name = "N")]
    batch_end: Option<usize>,
    /// Each number of tokens is the one before times this
    #[arg(short, long, value_name = "N", default_value_t = 2)]
    factor: usize,
    /// Rounds that are timed
    #[arg(long, value_name = "N", default_value_t = 200)]
    iters: usize,
    /// Rounds before them that are not
    #[arg(long, value_name = "N", default_value_t = 20)]
    warmup: usize,
    /// Route evenly instead of at random; for measuring (also ENABLE_PERFECT_ROUTER=1)
    #[arg(long)]
    perfect_router: bool,
    /// How uneven the work is
    #[arg(long, value_enum, value_name = "NAME", default_value_t = WorkloadName::BalancedRandom)]
    workload: WorkloadName,
    /// The rank of --workload hot-rank [default: 0]
    #[arg(long, value_name = "N")]
    hot_rank: Option<usize>,
    /// The expert of --workload hot-expert [default: 0]
    #[arg(long, value_name = "N")]
    hot_expert: Option<usize>,
    /// The part of the tokens that goes to the hot rank or expert for sure, 0 to 1 [default: 0.5]
    #[arg(long, value_name = "F")]
    hot_fraction: Option<f32>,
    /// The rank of --workload zero-rank [default: the last]
    #[arg(long, value_name = "N")]
    zero_rank: Option<usize>,
    /// Draws hidden states and routing
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Report mean, median, stdev, min and max of every rank, instead of its median
    #[arg(long)]
    pub(crate) iter_stats: bool,
    /// Time every call on CUDA devices for itself, host and device, and not fifty of them in a graph; on the CPU there are none
    /// anyway
    #[arg(long)]
    no_cuda_graph: bool,
    /// What to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    pub(crate) output: OutputFormat,
    /// Also write the JSON report into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) output_file: Option<PathBuf>,
    /// Also draw the report into this file, a web page of its own
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// This process is a rank of a run that another process reports: measure these backends and print what that one needs
    #[arg(long, value_name = "NAMES", hide = true)]
    pub(crate) measure_for_report: Option<Wishes>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    Bf16,
    F16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ReductionName {
    /// Every result comes home and is summed in the order of the token's choice: the same bits for every number of ranks
    SlotOrder,
    /// Each rank sums its own, the sums come home: fewer bytes to move
    RankPartial,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WorkloadName {
    /// The same number of tokens everywhere, experts drawn evenly
    BalancedRandom,
    /// A part of the tokens (--hot-fraction) goes to the experts of one rank (--hot-rank)
    HotRank,
    /// A part of the tokens (--hot-fraction) goes to one expert (--hot-expert)
    HotExpert,
    /// Rank 1 holds twice the tokens of rank 0, rank 2 three times as many, and so on; as many as otherwise in all
    Ragged,
    /// One rank (--zero-rank) holds no tokens
    ZeroRank,
}

impl Arguments {
    /// Those of this process. Ends it where they are not well formed.
    pub(crate) fn read() -> Self {
        Self::parse_from(with_dashes(std::env::args_os()))
    }

    /// What is to be measured, as the user or the process that reports has it; `None` is the default.
    pub(crate) fn wishes(&self) -> Option<&Wishes> {
        self.measure_for_report.as_ref().or(self.backend.as_ref())
    }

    /// `world_size` is the number of processes that a launcher started as ranks, if one did.
    pub(crate) fn settings(&self, world_size: Option<usize>) -> Result<Settings, BadArguments> {
        let bad = |message: String| Err(BadArguments(message));
        let sizes = self.profile.sizes();
        let hidden_size = self.hidden_size.unwrap_or(sizes.hidden_size);
        let top_k = self.top_k.unwrap_or(sizes.top_k);
        let num_experts = self.num_experts.unwrap_or(sizes.num_experts);
        if hidden_size == 0 {
            return bad("--hidden-size 0: expected at least 1".into());
        }
        if top_k == 0 || top_k > num_experts {
            return bad(format!(
                "--top-k {top_k}: expected 1 to {num_experts}, the experts; choose fewer, or more with --num-experts"
            ));
        }
        let ep_size = self.ep_size.or(world_size).unwrap_or(DEFAULT_EP_SIZE.min(num_experts));
        if let Some(world_size) = world_size.filter(|size| *size != ep_size) {
            return bad(format!(
                "--ep-size {ep_size}: expected {world_size}, as many ranks as were started; or leave it out"
            ));
        }
        if ep_size > MAX_RANKS {
            return bad(format!("--ep-size {ep_size}: expected at most {MAX_RANKS} ranks"));
        }
        let placement = Placement::contiguous(num_experts, ep_size).map_err(|_| {
            BadArguments(format!("--ep-size {ep_size}: expected 1 to {num_experts}, the experts that ranks share"))
        })?;
        if self.iters == 0 {
            return bad("--iters 0: expected at least 1".into());
        }
        Ok(Settings {
            profile: self.profile.name(),
            hidden_size,
            top_k,
            num_experts,
            ep_size,
            dtype: match self.dtype {
                Precision::F32 => DType::F32,
                Precision::Bf16 => DType::BF16,
                Precision::F16 => DType::F16,
            },
            reduction: match self.reduction {
                ReductionName::SlotOrder => Reduction::SlotOrder,
                ReductionName::RankPartial => Reduction::RankPartial,
            },
            local_batch_sizes: self.local_batch_sizes()?,
            iters: self.iters,
            warmup: self.warmup,
            perfect_router: self.perfect_router || enabled_by_environment(),
            workload: self.workload(ep_size, num_experts)?,
            seed: self.seed,
            placement,
            cuda_graph: !self.no_cuda_graph,
        })
    }

    fn local_batch_sizes(&self) -> Result<Vec<usize>, BadArguments> {
        let (begin, factor) = (self.batch_begin, self.factor);
        let end = self.batch_end.unwrap_or(DEFAULT_BATCH_END.max(begin));
        match (begin, factor) {
            (0, _) => Err(BadArguments("--batch-begin 0: expected at least 1 token".into())),
            (_, 0 | 1) => Err(BadArguments(format!("--factor {factor}: expected at least 2, or the sizes never end"))),
            _ if end < begin => Err(BadArguments(format!(
                "--batch-end {end}: expected at least --batch-begin, which is {begin}; choose a larger one, or leave it out"
            ))),
            _ => Ok(std::iter::successors(Some(begin), |size| size.checked_mul(factor).filter(|size| *size <= end))
                .collect()),
        }
    }

    fn workload(&self, ep_size: usize, num_experts: usize) -> Result<Workload, BadArguments> {
        let name = self.workload;
        let hot = [WorkloadName::HotRank, WorkloadName::HotExpert];
        for (is_given, flag, known) in [
            (self.hot_rank.is_some(), "--hot-rank", &hot[..1]),
            (self.hot_expert.is_some(), "--hot-expert", &hot[1..]),
            (self.hot_fraction.is_some(), "--hot-fraction", &hot[..]),
            (self.zero_rank.is_some(), "--zero-rank", &[WorkloadName::ZeroRank][..]),
        ] {
            if is_given && !known.contains(&name) {
                let known: Vec<_> = known.iter().map(|name| format!("--workload {}", value_name(name))).collect();
                return Err(BadArguments(format!("{flag}: expected with {} only; add it", known.join(" or "))));
            }
        }
        let below = |flag, value: usize, limit: usize, what| match value < limit {
            true => Ok(value),
            false => Err(BadArguments(format!("{flag} {value}: expected less than {limit}, the {what}"))),
        };
        let hot_fraction = self.hot_fraction.unwrap_or(DEFAULT_HOT_FRACTION);
        if !(0.0..=1.0).contains(&hot_fraction) {
            return Err(BadArguments(format!("--hot-fraction {hot_fraction}: expected 0 to 1")));
        }
        Ok(match name {
            WorkloadName::BalancedRandom => Workload::BalancedRandom,
            WorkloadName::HotRank => {
                let hot_rank = below("--hot-rank", self.hot_rank.unwrap_or(0), ep_size, "ranks")?;
                Workload::HotRank { hot_rank, hot_fraction }
            }
            WorkloadName::HotExpert => {
                let hot_expert = below("--hot-expert", self.hot_expert.unwrap_or(0), num_experts, "experts")?;
                Workload::HotExpert { hot_expert, hot_fraction }
            }
            WorkloadName::Ragged => Workload::Ragged,
            WorkloadName::ZeroRank if ep_size == 1 => {
                let advice = "or nobody holds tokens; choose a larger --ep-size, or another workload";
                return Err(BadArguments(format!("--workload zero-rank: expected at least 2 ranks, {advice}")));
            }
            WorkloadName::ZeroRank => {
                let zero_rank = below("--zero-rank", self.zero_rank.unwrap_or(ep_size - 1), ep_size, "ranks")?;
                Workload::ZeroRank { zero_rank }
            }
        })
    }

    /// What is measured. `launched`: this process is one of the ranks that a launcher started.
    pub(crate) fn backends(&self, settings: &Settings, launched: bool) -> Result<Vec<Backend>, BadArguments> {
        let usual = if launched { Transport::Procs } else { Transport::Threads };
        let usual = Wishes::These(vec![Wish::best(usual)]);
        let wishes = self.wishes().unwrap_or(&usual);
        if launched && (wishes.name(Transport::Threads) || wishes.name(Transport::Peer)) {
            return Err(BadArguments(format!(
                "--backend {wishes}: expected procs or nccl only, since a launcher started the ranks as processes; or ask for \
                 threads or peer only"
            )));
        }
        if launched && wishes.name(Transport::Procs) && wishes.name(Transport::Nccl) {
            return Err(BadArguments(format!(
                "--backend {wishes}: expected procs or nccl where a launcher started the ranks, one at a time"
            )));
        }
        let transports = if launched { &[Transport::Procs, Transport::Nccl][..] } else { &Transport::ALL };
        let &Settings { ep_size, top_k, reduction, .. } = settings;
        let backends = Backend::list(wishes, transports, (ep_size, top_k, reduction))
            .map_err(|error| BadArguments(format!("--backend {wishes}: {}", plain(&error))))?;
        if ep_size > MAX_PROCS && backends.iter().any(|backend| backend.transport == Transport::Procs) {
            return Err(BadArguments(format!(
                "--ep-size {ep_size}: expected at most {MAX_PROCS} processes; choose fewer, or threads"
            )));
        }
        for transport in [Transport::Nccl, Transport::Peer] {
            if backends.iter().any(|backend| backend.transport == transport) {
                check_devices(wishes, transport, if launched { 1 } else { ep_size })?;
            }
        }
        check_memory(settings, &backends)?;
        Ok(backends)
    }

    /// The arguments with which this program measures `backends` as a rank, besides its own.
    pub(crate) fn for_ranks(backends: &[Backend]) -> [OsString; 2] {
        ["--measure-for-report".into(), Backend::names(backends).into()]
    }
}

/// Whether there are as many CUDA devices as ranks of this process.
#[cfg(feature = "cuda")]
fn check_devices(wishes: &Wishes, transport: Transport, needed: usize) -> Result<(), BadArguments> {
    if transport == Transport::Nccl && !cfg!(feature = "nccl") {
        return Err(BadArguments(format!("--backend {wishes}: expected a program built with --features nccl")));
    }
    use candle_core::cuda_backend::cudarc::driver::CudaContext;
    let found = CudaContext::device_count().map_or(0, |count| count.max(0) as usize);
    match found >= needed {
        true => Ok(()),
        false => Err(BadArguments(format!(
            "--backend {wishes}: expected {needed} CUDA devices, one for each rank, and there are {found}; choose --ep-size \
             {found}, or start a process for each device"
        ))),
    }
}

#[cfg(not(feature = "cuda"))]
fn check_devices(wishes: &Wishes, transport: Transport, _: usize) -> Result<(), BadArguments> {
    let feature = if transport == Transport::Nccl { "nccl" } else { "cuda" };
    Err(BadArguments(format!("--backend {wishes}: expected a program built with --features {feature}")))
}

/// Whether all ranks together find room on this machine.
fn check_memory(settings: &Settings, backends: &[Backend]) -> Result<(), BadArguments> {
    let &Settings { hidden_size, top_k, num_experts, ep_size, dtype, .. } = settings;
    let most = settings.local_batch_sizes.last().copied().unwrap_or(0);
    let all_ranks_get_all_results = backends.iter().any(|backend| backend.strategy == Strategy::Replicated);
    // Of each token, hidden states at all ranks; in float32, rows of all slots at their rank, on their way and at home.
    let copies_of_rows = if all_ranks_get_all_results { 2 + ep_size } else { 3 };
    let row = ep_size * dtype.size_in_bytes() + copies_of_rows.saturating_mul(top_k) * 4;
    let per_token = hidden_size.saturating_mul(row).saturating_add(num_experts.saturating_mul(4));
    let needed = most.saturating_mul(ep_size).saturating_mul(per_token);
    match machine::available_memory().unwrap_or(isize::MAX as usize / 2) {
        available if needed > available => Err(BadArguments(format!(
            "{most} tokens on each of {ep_size} ranks need about {:.1} GB of memory and {:.1} GB are available; choose a \
             smaller --batch-end or --ep-size",
            needed as f64 / 1e9,
            available as f64 / 1e9
        ))),
        _ => Ok(()),
    }
}

fn value_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
}
