//! The command line, and the plans that it asks for.

use crate::common::report::{BadArguments, OutputFormat, plain};
use crate::senders::Sender;
use candle_moe::perfect_router::{Hotspot, Imbalance, Plan, Schedule};
use candle_moe::routing::RoutingMethod;
use clap::Parser;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

/// Slots of all senders that still make a sensible report.
const MAX_SLOTS: usize = 1 << 26;

/// Show the plan of the perfect router: who gets what, how balanced it is, and that routing follows it.
///
/// Perfect routing is for measuring: the output of a model that runs with it is meaningless.
#[derive(Debug, Parser)]
#[command(name = "perfect_router", allow_negative_numbers = true)]
pub(crate) struct Arguments {
    /// Experts of the layer
    #[arg(long, alias = "num_experts", value_name = "N", default_value_t = 8)]
    pub(crate) num_experts: usize,
    /// Experts per token
    #[arg(long, alias = "top_k", value_name = "N", default_value_t = 2)]
    pub(crate) top_k: usize,
    /// Ranks that share the experts
    #[arg(long, alias = "ep_size", value_name = "N", default_value_t = 4)]
    pub(crate) ep_size: usize,
    /// The sender to show, or all of them
    #[arg(long, alias = "ep_rank", value_name = "N|all", default_value = "all")]
    ep_rank: Ranks,
    /// Tokens of every sender
    #[arg(long, alias = "num_tokens", value_name = "N", default_value_t = 4)]
    pub(crate) num_tokens: usize,
    /// The routing method that the plan is for, with its parameters after a colon: DeepSeekV3:num_groups=8,topk_group=4
    #[arg(long, value_name = "NAME", default_value = "Renormalize", value_parser = method)]
    pub(crate) method: RoutingMethod,
    /// How the plans of the senders relate: rank-rotated or global-slot
    #[arg(long, value_name = "NAME", default_value_t = Schedule::RankRotated, value_parser = schedule)]
    pub(crate) schedule: Schedule,
    /// The rank that hot tokens go to, to see skew instead of balance
    #[arg(long, alias = "hot_rank", value_name = "N", conflicts_with = "hot_expert")]
    hot_rank: Option<usize>,
    /// The expert that hot tokens go to
    #[arg(long, alias = "hot_expert", value_name = "N")]
    hot_expert: Option<usize>,
    /// The part of the tokens that is hot, 0 to 1 [default: 0.5]
    #[arg(long, alias = "hot_fraction", value_name = "F")]
    hot_fraction: Option<f32>,
    /// Draws the hot tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// What to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    pub(crate) output: OutputFormat,
    /// Also draw plan and balance into this file, a web page of its own
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy)]
enum Ranks {
    All,
    One(usize),
}

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text.eq_ignore_ascii_case("all") => Ok(Self::All),
            Ok(rank) => Ok(Self::One(rank)),
            Err(_) => Err("expected a rank (0, 1, ...) or all".into()),
        }
    }
}

fn method(name: &str) -> Result<RoutingMethod, String> {
    name.parse().map_err(|error| plain(&error))
}

fn schedule(name: &str) -> Result<Schedule, String> {
    name.parse().map_err(|error| plain(&error))
}

impl Arguments {
    /// The senders to show.
    pub(crate) fn shown(&self) -> Range<usize> {
        match self.ep_rank {
            Ranks::All => 0..self.ep_size,
            Ranks::One(rank) => rank..rank.saturating_add(1),
        }
    }

    /// The hot spot.
    pub(crate) fn imbalance(&self) -> Result<Option<Imbalance>, BadArguments> {
        let hotspot = match (self.hot_rank, self.hot_expert) {
            (Some(rank), _) => Hotspot::Rank(rank),
            (None, Some(expert)) => Hotspot::Expert(expert),
            (None, None) if self.hot_fraction.is_some() => {
                return Err(BadArguments(
                    "--hot-fraction without a hot spot; add --hot-rank N or --hot-expert N".into(),
                ));
            }
            (None, None) => return Ok(None),
        };
        Ok(Some(Imbalance { hotspot, fraction: self.hot_fraction.unwrap_or(0.5), seed: self.seed }))
    }

    /// Every sender with its part of the plan.
    pub(crate) fn senders(&self) -> anyhow::Result<Vec<Sender>> {
        let imbalance = self.imbalance()?;
        // Rank 0 first, so that a fault of the sizes is named before one of the rank.
        for rank in [0, self.shown().start] {
            self.plan(rank, imbalance).map_err(|error| self.advice(&error))?;
        }
        let &Self { num_tokens, top_k, ep_size, .. } = self;
        let slots = num_tokens.checked_mul(top_k).and_then(|slots| slots.checked_mul(ep_size));
        if slots.is_none_or(|slots| slots > MAX_SLOTS) {
            return Err(BadArguments(format!(
                "num_tokens is {num_tokens}, which makes more than {MAX_SLOTS} slots with top_k {top_k} and ep_size \
                 {ep_size}; ask for fewer tokens, the plan repeats"
            ))
            .into());
        }
        let counts = vec![num_tokens; ep_size];
        let sender = |rank| {
            let (plan, first_token) = self.schedule.start(rank, &counts);
            Sender::new(rank, self.plan(plan, imbalance)?, first_token, num_tokens)
        };
        Ok((0..ep_size).map(sender).collect::<candle_core::Result<_>>()?)
    }

    fn plan(&self, ep_rank: usize, imbalance: Option<Imbalance>) -> candle_core::Result<Plan> {
        let plan = Plan::new(self.num_experts, self.top_k, self.ep_size, ep_rank)?.with_groups(self.method.groups())?;
        match imbalance {
            Some(imbalance) => plan.with_imbalance(imbalance),
            None => Ok(plan),
        }
    }

    /// The library's error, and what to do next.
    fn advice(&self, error: &candle_core::Error) -> BadArguments {
        let &Self { num_experts, top_k, ep_size, .. } = self;
        let groups = self.method.groups();
        let next = match error.to_string() {
            _ if ep_size == 0 => "choose --ep-size 1 or more".into(),
            _ if num_experts < ep_size => format!("choose --num-experts {ep_size} or more, or a smaller --ep-size"),
            _ if self.shown().start >= ep_size => format!("choose --ep-rank from 0 to {}, or all", ep_size - 1),
            _ if top_k == 0 || top_k > num_experts => format!("choose --top-k from 1 to {num_experts}"),
            text if text.contains("num_groups is")
                || text.contains("topk_group is")
                || text.contains(" groups of ") =>
            {
                let fit = (1..=groups.num_groups.max(1)).rev().find(|&n| num_experts.is_multiple_of(n)).unwrap_or(1);
                format!(
                    "choose other groups, for example --method {}:num_groups={fit},topk_group={fit}",
                    self.method.name()
                )
            }
            _ => {
                "choose --hot-rank below --ep-size, --hot-expert below --num-experts, --hot-fraction from 0 to 1".into()
            }
        };
        BadArguments(format!("{}; {next}", plain(error)))
    }
}
