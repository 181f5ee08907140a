//! The command line, and what it means for a model.

use crate::common::report::{BadArguments, OutputFormat, plain};
use crate::devices::Place;
use crate::text::Text;
use anyhow::Result;
use candle_core::{DType, Device};
use candle_moe::ep::{Deadlines, Environment, MAX_PROCS, Problem, Reduction, Strategy};
use candle_moe::models::gpt_oss::{Config, MoeOptions, Sampler, SamplingConfig};
use candle_moe::perfect_router::enabled_by_environment;
use clap::{ArgGroup, Parser, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-gpt-oss");
/// What a model reads when it is given nothing.
const DEFAULT_PROMPT: &str = "A mixture of experts is";
const DEFAULT_PROMPT_TOKENS: u32 = 32;
/// For the rendezvous of ranks, and for reading a checkpoint that another rank may have read already.
const WARM_UP: Duration = Duration::from_secs(600);

/// Generate with a GPT-OSS checkpoint (published, original/ or bf16 layout) through expert-parallel MoE blocks.
#[derive(Debug, Parser)]
#[command(
    name = "gpt_oss",
    allow_negative_numbers = true,
    group = ArgGroup::new("input").args(["prompt", "input_ids", "input_ids_file"])
)]
pub(crate) struct Arguments {
    /// Folder with config.json and safetensors files [default: the tiny checkpoint of this repository]
    #[arg(long, value_name = "DIR", default_value = TINY, hide_default_value = true)]
    pub(crate) model: PathBuf,
    /// cpu, cuda or cuda:N; with cuda each rank has the device of its number. CUDA is for programs built with --features cuda,
    /// and several ranks on it for those with --features nccl
    #[arg(long, default_value = "cpu", value_parser = str::parse::<Place>)]
    pub(crate) device: Place,
    /// Dtype of the hidden states
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
    /// Ranks, each with its own experts [default: 4, on CUDA 1, or as many as a launcher started]
    #[arg(long, alias = "ep_size", value_name = "N")]
    ep_size: Option<usize>,
    /// What ranks are [default: the processes that torchrun, srun or mpirun started, else threads]
    #[arg(long, value_enum)]
    pub(crate) launch: Option<LaunchName>,
    /// How results of a token's experts are summed
    #[arg(long, value_enum, default_value = "slot-order")]
    pub(crate) reduction: ReductionName,
    /// How tokens reach the ranks of their experts, and results come home
    #[arg(long, value_enum, default_value = "auto")]
    strategy: StrategyName,
    /// Route evenly instead of as learned; for measuring, the text is meaningless (also ENABLE_PERFECT_ROUTER=1)
    #[arg(long, alias = "perfect_router")]
    perfect_router: bool,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Token ids to continue: 1,2,3
    #[arg(long, alias = "input_ids", value_name = "IDS", value_delimiter = ',')]
    input_ids: Option<Vec<u32>>,
    /// File of token ids to continue, separated by commas or white space
    #[arg(long, alias = "input_ids_file", value_name = "FILE")]
    input_ids_file: Option<PathBuf>,
    /// Tokens to generate
    #[arg(long, alias = "max_new_tokens", value_name = "N", default_value_t = 24)]
    max_new_tokens: usize,
    /// 0 always takes the best token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Sample from the smallest set of best tokens that has this probability
    #[arg(long, alias = "top_p", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,
    /// Same seed, same tokens
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Do not run a second time with the other routing
    #[arg(long, alias = "no_comparison")]
    pub(crate) no_comparison: bool,
    /// Place up to N physical experts a layer, replicas included, by this run's load, and run again: how even are the ranks then?
    /// With --launch threads and on one device only
    #[arg(long, alias = "physical_experts", value_name = "N")]
    pub(crate) physical_experts: Option<usize>,
    /// Write the prompt's logits and what every MoE layer computed
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) dump: Option<PathBuf>,
    /// What stdout carries
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) output: OutputFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LaunchName {
    /// Threads of this process
    Threads,
    /// Processes of this machine: those of a launcher, or else started by this program
    #[value(alias = "processes")]
    Procs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ReductionName {
    /// In the order of the token's choice: the same bits for every number of ranks
    SlotOrder,
    /// Each rank its own, then over ranks: fewer bytes to move
    RankPartial,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StrategyName {
    /// The best for the number of ranks and of experts a token has
    Auto,
    /// Nothing travels: for one rank
    Solo,
    /// Every token to every rank
    Gather,
    /// A token to the ranks of its experts
    Exchange,
    /// Only results travel: for tokens that every rank holds, which here is for one rank
    Replicated,
    /// A token to the ranks of its experts, through the devices' memory: for threads on CUDA devices that reach each other's
    Peer,
}

impl StrategyName {
    fn forced(self) -> Option<Strategy> {
        match self {
            Self::Auto => None,
            Self::Solo => Some(Strategy::Solo),
            Self::Gather => Some(Strategy::Gather),
            Self::Exchange => Some(Strategy::Exchange),
            Self::Replicated => Some(Strategy::Replicated),
            Self::Peer => Some(Strategy::Peer),
        }
    }
}

/// Arguments that make sense for the model.
pub(crate) struct Plan {
    /// Of every rank, but for the device, which is the CPU until a rank [opens](Place::open) its own.
    pub(crate) options: MoeOptions,
    pub(crate) sampling: SamplingConfig,
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) max_new_tokens: usize,
    pub(crate) eos_token_ids: Vec<u32>,
}

impl Plan {
    /// How long ranks wait for each other.
    pub(crate) fn deadlines(&self) -> Deadlines {
        Deadlines { warm_up: WARM_UP, serving: self.options.deadline }
    }

    /// The options of a rank on `device`.
    pub(crate) fn options_on(&self, device: &Device) -> MoeOptions {
        MoeOptions { device: device.clone(), ..self.options.clone() }
    }
}

impl Arguments {
    /// `launched` is the rank that a launcher wants this process to be, if one does.
    pub(crate) fn plan(&self, config: &Config, text: &Text, launched: Option<&Environment>) -> Result<Plan> {
        let bad = |message: String| Err(BadArguments(message).into());
        let world_size = launched.map(|environment| environment.world_size);
        let is_cpu = self.device == Place::Cpu;
        let usual = world_size.unwrap_or(if is_cpu { 4.min(config.num_experts) } else { 1 });
        let ep_size = self.ep_size.unwrap_or(usual);
        if let Some(world_size) = world_size.filter(|size| *size != ep_size) {
            return bad(format!(
                "--ep-size {ep_size}: expected {world_size}, as many ranks as were started; or leave it out"
            ));
        }
        if ep_size == 0 || ep_size > config.num_experts {
            return bad(format!("--ep-size {ep_size}: expected 1 to {}, the experts of a layer", config.num_experts));
        }
        let strategy = self.strategy.forced();
        self.device.check(ep_size, launched, strategy)?;
        let processes = world_size.is_some() || self.launch == Some(LaunchName::Procs);
        if processes && ep_size > MAX_PROCS {
            return bad(format!(
                "--ep-size {ep_size}: expected at most {MAX_PROCS} processes; or use --launch threads"
            ));
        }
        if processes && self.physical_experts.is_some() {
            return bad("--physical-experts: expected ranks that are threads; use --launch threads".into());
        }
        if self.physical_experts.is_some() && ep_size > 1 && !is_cpu {
            return bad(format!(
                "--physical-experts: expected --device cpu or one rank; ranks on --device {} hold experts in order, each once",
                self.device
            ));
        }
        let (fewest, most) = (config.num_experts, config.num_experts * ep_size);
        if let Some(n) = self.physical_experts.filter(|n| !(fewest..=most).contains(n)) {
            return bad(format!(
                "--physical-experts {n}: expected {fewest} to {most}, each expert once and once for each of {ep_size} ranks"
            ));
        }
        let reduction = match self.reduction {
            ReductionName::SlotOrder => Reduction::SlotOrder,
            ReductionName::RankPartial => Reduction::RankPartial,
        };
        let peer_access = strategy == Some(Strategy::Peer) && !is_cpu && !processes;
        let problem = Problem { ep_size, top_k: config.top_k, reduction, replicated_tokens: false, peer_access };
        if let Err(error) = problem.choose(strategy) {
            return bad(format!("--{}; leave it out for the best", plain(&error)));
        }
        if strategy.is_some_and(|strategy| strategy != Strategy::Solo) && ep_size == 1 && !is_cpu {
            return bad(format!("--strategy: expected auto or solo for one rank on --device {}", self.device));
        }
        let perfect_router = self.perfect_router || enabled_by_environment();
        if self.physical_experts.is_some() && perfect_router && self.no_comparison {
            return bad("--physical-experts: expected a run with learned routing; leave out --no-comparison".into());
        }
        let prompt_ids = self.prompt_ids(config, text)?;
        let positions = prompt_ids.len().saturating_add(self.max_new_tokens);
        if positions > config.max_position_embeddings {
            return bad(format!(
                "{} prompt tokens and --max-new-tokens {}: expected at most {} in all",
                prompt_ids.len(),
                self.max_new_tokens,
                config.max_position_embeddings
            ));
        }
        let sampling = SamplingConfig { temperature: self.temperature, top_p: self.top_p, seed: self.seed };
        if let Err(error) = Sampler::new(sampling) {
            return bad(error.to_string());
        }
        Ok(Plan {
            options: MoeOptions {
                dtype: match self.dtype {
                    Dtype::F32 => DType::F32,
                    Dtype::Bf16 => DType::BF16,
                },
                device: Device::Cpu,
                ep_size,
                reduction,
                strategy,
                perfect_router,
                ..Default::default()
            },
            sampling,
            prompt_ids,
            max_new_tokens: self.max_new_tokens,
            eos_token_ids: config.eos_token_ids.clone(),
        })
    }

    fn prompt_ids(&self, config: &Config, text: &Text) -> Result<Vec<u32>> {
        let ids = if let Some(prompt) = &self.prompt {
            text.encode(prompt)?
        } else if let Some(ids) = &self.input_ids {
            ids.clone()
        } else if let Some(file) = &self.input_ids_file {
            read_ids(file)?
        } else if text.is_available() {
            text.encode(DEFAULT_PROMPT)?
        } else {
            (1..=DEFAULT_PROMPT_TOKENS).map(|id| id % config.vocab_size as u32).collect()
        };
        match ids.iter().find(|&&id| id as usize >= config.vocab_size) {
            Some(id) => Err(BadArguments(format!(
                "token id {id}: expected less than {}, the vocabulary of the model",
                config.vocab_size
            ))
            .into()),
            None if ids.is_empty() => {
                Err(BadArguments("the prompt has no tokens; expected at least one".into()).into())
            }
            None => Ok(ids),
        }
    }
}

fn read_ids(file: &std::path::Path) -> Result<Vec<u32>> {
    let name = file.display();
    let text =
        std::fs::read_to_string(file).map_err(|error| BadArguments(format!("--input-ids-file {name}: {error}")))?;
    let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
    let parse = |word: &str| {
        word.parse().map_err(|_| {
            BadArguments(format!("--input-ids-file {name}: {word:?} is no token id; expected 1,2,3 or 1 2 3")).into()
        })
    };
    words.map(parse).collect()
}
