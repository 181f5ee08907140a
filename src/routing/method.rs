//! The routing methods by name.

use candle_core::{Error, Result, bail};
use std::fmt;
use std::str::FromStr;

const OP: &str = "routing method";

/// How a router turns a row of `router_logits` into chosen experts and their weights.
///
/// The names are those of TensorRT-LLM's `RoutingMethodType`. `l` is a logit, `b` the selection bias of
/// [`Router::with_selection_bias`](super::Router::with_selection_bias), `C` the set of chosen experts.
///
/// | method | chooses by | weight | models |
/// | --- | --- | --- | --- |
/// | `Default` | softmax(l) | the softmax value over all experts | Mixtral-like, not renormalised |
/// | `Renormalize` | l | softmax over `C` | GPT-OSS |
/// | `RenormalizeNaive` | softmax(l) | softmax values divided by their sum over `C` | Qwen3 |
/// | `DeepSeekV3` | sigmoid(l) + b, inside the best groups | sigmoid(l) / (sum over `C` + 1e-20) * factor | DeepSeek-V3 and R1; Kimi-K2 (one group) |
/// | `Llama4` | l | sigmoid(l) | Llama 4 |
/// | `MiniMax2` | sigmoid(l) + b | sigmoid(l) / (sum over `C` + 1e-20) | MiniMax-M2 |
/// | `SigmoidRenorm` | sigmoid(l) | sigmoid(l) / sum over `C` | |
/// | `DeepSeekV4` | sqrt(softplus(l)) + b | sqrt(softplus(l)) / sum over `C` * factor | DeepSeek-V4 |
///
/// Softmax and sigmoid are increasing, so the methods that take no bias compare the logits themselves: two logits whose
/// scores would round to the same float32 are still told apart. The methods that take one compare the float32 value of
/// their score, with or without a bias, and experts whose float32 values are equal are tied.
///
/// Where all chosen sigmoids are far below 1e-20, the weights of `DeepSeekV3` and `MiniMax2` go to 0, as the formula
/// says; those of `DeepSeekV4` and `SigmoidRenorm` do not, since their quotient has a limit, a softmax of l / 2 and of l.
///
/// # Names
/// A method is written as its name, and after a colon the parameters that it has, in any order:
///
/// ```
/// use candle_moe::routing::{ExpertGroups, RoutingMethod};
/// let method: RoutingMethod = "renormalize".parse()?;
/// assert_eq!(method, RoutingMethod::Renormalize);
/// assert_eq!(method.to_string(), "Renormalize");
///
/// // Without parameters it has the published ones.
/// let method: RoutingMethod = "DeepSeekV3".parse()?;
/// assert_eq!(method.to_string(), "DeepSeekV3:num_groups=8,topk_group=4,routed_scaling_factor=2.5");
/// let kimi: RoutingMethod = "deepseek-v3:num_groups=1,topk_group=1,routed_scaling_factor=2.827".parse()?;
/// assert_eq!(kimi.groups(), ExpertGroups::ONE);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RoutingMethod {
    /// Softmax over all experts, then top-k.
    Default,
    /// Top-k, then softmax over the chosen.
    Renormalize,
    /// Softmax, top-k, divide by the sum of the chosen. Equal to `Renormalize`, and computed like it.
    RenormalizeNaive,
    /// Sigmoid plus selection bias chooses, first groups, then experts inside them; the sigmoids of the chosen are
    /// divided by their sum + 1e-20 and multiplied by the factor.
    DeepSeekV3 {
        /// Which part of the experts a token may choose from.
        groups: ExpertGroups,
        /// Multiplies every weight; finite and not negative.
        routed_scaling_factor: f32,
    },
    /// Top-k, then the sigmoid of each chosen logit.
    Llama4,
    /// Sigmoid plus selection bias chooses; the sigmoids of the chosen are divided by their sum + 1e-20.
    MiniMax2,
    /// Sigmoids of the chosen divided by their sum.
    SigmoidRenorm,
    /// sqrt(softplus) plus selection bias chooses; the roots of the chosen are divided by their sum and multiplied by the
    /// factor.
    DeepSeekV4 {
        /// Multiplies every weight; finite and not negative.
        routed_scaling_factor: f32,
    },
}

/// A limit on which experts one token may choose: those of its `topk_group` best groups.
///
/// Experts form `num_groups` groups of equal size, in id order. The score of a group is the float32 sum of the two best
/// scores in it (of its only one where a group has one expert); NaN scores count only where a group has nothing else.
/// Groups are chosen like experts: the best first, a tie to the lower group, NaN below every number. Experts outside the
/// chosen groups cannot be chosen, whatever their score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExpertGroups {
    /// Groups, a divisor of `num_experts`.
    pub num_groups: usize,
    /// Groups that a token chooses from, 1 to `num_groups`; together they must have `top_k` experts.
    pub topk_group: usize,
}

impl ExpertGroups {
    /// All experts in one group: no limit.
    pub const ONE: Self = Self { num_groups: 1, topk_group: 1 };

    /// Whether some expert may be out of reach for a token.
    pub fn is_limit(&self) -> bool {
        self.topk_group < self.num_groups
    }

    /// Checks the groups against the experts; errors begin with `op`.
    pub(crate) fn check(&self, op: &str, num_experts: usize, top_k: usize) -> Result<()> {
        let &Self { num_groups, topk_group } = self;
        if num_groups == 0 || !num_experts.is_multiple_of(num_groups) {
            bail!("{op}: num_groups is {num_groups}, expected a divisor of num_experts, which is {num_experts}")
        }
        if topk_group == 0 || topk_group > num_groups {
            bail!("{op}: topk_group is {topk_group}, expected 1 to num_groups, which is {num_groups}")
        }
        let reachable = num_experts / num_groups * topk_group;
        if top_k > reachable {
            bail!(
                "{op}: top_k is {top_k}, expected at most the {reachable} experts of {topk_group} groups of {}",
                num_experts / num_groups
            )
        }
        Ok(())
    }
}

impl RoutingMethod {
    /// Every method, in the order of the table, with its published parameters.
    pub const ALL: [Self; 8] = [
        Self::Default,
        Self::Renormalize,
        Self::RenormalizeNaive,
        Self::DeepSeekV3 { groups: ExpertGroups { num_groups: 8, topk_group: 4 }, routed_scaling_factor: 2.5 },
        Self::Llama4,
        Self::MiniMax2,
        Self::SigmoidRenorm,
        Self::DeepSeekV4 { routed_scaling_factor: 1.5 },
    ];

    /// The name, without parameters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Default => "Default",
            Self::Renormalize => "Renormalize",
            Self::RenormalizeNaive => "RenormalizeNaive",
            Self::DeepSeekV3 { .. } => "DeepSeekV3",
            Self::Llama4 => "Llama4",
            Self::MiniMax2 => "MiniMax2",
            Self::SigmoidRenorm => "SigmoidRenorm",
            Self::DeepSeekV4 { .. } => "DeepSeekV4",
        }
    }

    /// Whether a selection bias takes part in the choice.
    pub fn takes_selection_bias(&self) -> bool {
        matches!(self, Self::MiniMax2 | Self::DeepSeekV3 { .. } | Self::DeepSeekV4 { .. })
    }

    /// The groups that limit the choice; [`ExpertGroups::ONE`] for methods without groups.
    pub fn groups(&self) -> ExpertGroups {
        match self {
            Self::DeepSeekV3 { groups, .. } => *groups,
            _ => ExpertGroups::ONE,
        }
    }

    /// What multiplies the weights; 1 for methods without a factor.
    pub fn routed_scaling_factor(&self) -> f32 {
        match self {
            Self::DeepSeekV3 { routed_scaling_factor, .. } | Self::DeepSeekV4 { routed_scaling_factor } => {
                *routed_scaling_factor
            }
            _ => 1.0,
        }
    }

    /// Checks what does not depend on the number of experts; errors begin with `op`.
    pub(super) fn check(&self, op: &str) -> Result<()> {
        let factor = self.routed_scaling_factor();
        if !(factor.is_finite() && factor >= 0.0) {
            bail!("{op}: routed_scaling_factor is {factor}, expected a finite number that is not negative")
        }
        Ok(())
    }

    fn set(&mut self, parameter: &str, value: &str) -> Result<()> {
        let name = self.name();
        let count = || value.parse::<usize>().map_err(|_| expected(parameter, value, "a whole number"));
        let number = || value.parse::<f32>().map_err(|_| expected(parameter, value, "a number"));
        match (self, parameter) {
            (Self::DeepSeekV3 { groups, .. }, "num_groups") => groups.num_groups = count()?,
            (Self::DeepSeekV3 { groups, .. }, "topk_group") => groups.topk_group = count()?,
            (Self::DeepSeekV3 { routed_scaling_factor, .. }, "routed_scaling_factor")
            | (Self::DeepSeekV4 { routed_scaling_factor }, "routed_scaling_factor") => {
                *routed_scaling_factor = number()?;
            }
            (Self::DeepSeekV3 { .. }, _) => {
                bail!(
                    "{OP}: {name} has no parameter {parameter:?}, expected num_groups, topk_group or \
                     routed_scaling_factor"
                )
            }
            (Self::DeepSeekV4 { .. }, _) => {
                bail!("{OP}: {name} has no parameter {parameter:?}, expected routed_scaling_factor")
            }
            _ => bail!("{OP}: {name} has no parameter {parameter:?}, expected the name alone"),
        }
        Ok(())
    }
}

fn expected(parameter: &str, value: &str, what: &str) -> Error {
    Error::Msg(format!("{OP}: {parameter} is {value:?}, expected {what}"))
}

impl fmt::Display for RoutingMethod {
    /// What [`FromStr`] reads back as the same method.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::DeepSeekV3 { groups: ExpertGroups { num_groups, topk_group }, routed_scaling_factor: factor } => {
                write!(f, ":num_groups={num_groups},topk_group={topk_group},routed_scaling_factor={factor}")
            }
            Self::DeepSeekV4 { routed_scaling_factor } => write!(f, ":routed_scaling_factor={routed_scaling_factor}"),
            _ => Ok(()),
        }
    }
}

impl FromStr for RoutingMethod {
    type Err = Error;

    /// Case, `-` and `_` do not count in the name; an unknown name lists the known ones.
    fn from_str(text: &str) -> Result<Self> {
        let plain = |s: &str| s.replace(['-', '_'], "").to_ascii_lowercase();
        let (name, parameters) = match text.split_once(':') {
            Some((name, parameters)) => (name, Some(parameters)),
            None => (text, None),
        };
        let Some(&(mut method)) = Self::ALL.iter().find(|method| plain(method.name()) == plain(name)) else {
            let known = Self::ALL.map(|method| method.name()).join(", ");
            bail!("{OP}: unknown name {name:?}, expected one of {known}")
        };
        for parameter in parameters.into_iter().flat_map(|parameters| parameters.split(',')) {
            match parameter.split_once('=') {
                Some((parameter, value)) => method.set(parameter.trim(), value.trim())?,
                None => bail!("{OP}: {parameter:?} is no parameter of {}, expected parameter=value", method.name()),
            }
        }
        Ok(method)
    }
}
