//! The routing methods by name.

use candle_core::{Error, bail};
use std::fmt;
use std::str::FromStr;

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
/// | `Llama4` | l | sigmoid(l) | Llama 4 |
/// | `MiniMax2` | sigmoid(l) + b | sigmoid(l) / (sum over `C` + 1e-20) | MiniMax-M2 |
/// | `SigmoidRenorm` | sigmoid(l) | sigmoid(l) / sum over `C` | |
///
/// Softmax and sigmoid are increasing, so every method without a bias compares the logits themselves: two logits
/// whose scores would round to the same float32 are still told apart. `MiniMax2` compares the float32 value of
/// sigmoid(l) + b, and experts whose float32 values are equal are tied; where all chosen sigmoids are far below 1e-20, its
/// weights go to 0 as the formula says.
///
/// More methods will come (grouped selection among them); a `match` needs a wildcard arm.
///
/// ```
/// use candle_moe::routing::RoutingMethod;
/// let method: RoutingMethod = "renormalize".parse()?;
/// assert_eq!(method, RoutingMethod::Renormalize);
/// assert_eq!(method.to_string(), "Renormalize");
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
    /// Top-k, then the sigmoid of each chosen logit.
    Llama4,
    /// Sigmoid plus selection bias chooses; the sigmoids of the chosen are divided by their sum + 1e-20.
    MiniMax2,
    /// Sigmoids of the chosen divided by their sum.
    SigmoidRenorm,
}

impl RoutingMethod {
    /// Every method, in the order of the table.
    pub const ALL: [Self; 6] =
        [Self::Default, Self::Renormalize, Self::RenormalizeNaive, Self::Llama4, Self::MiniMax2, Self::SigmoidRenorm];

    /// The name that [`FromStr`] accepts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Default => "Default",
            Self::Renormalize => "Renormalize",
            Self::RenormalizeNaive => "RenormalizeNaive",
            Self::Llama4 => "Llama4",
            Self::MiniMax2 => "MiniMax2",
            Self::SigmoidRenorm => "SigmoidRenorm",
        }
    }

    /// Whether a selection bias takes part in the choice.
    pub fn takes_selection_bias(&self) -> bool {
        matches!(self, Self::MiniMax2)
    }
}

impl fmt::Display for RoutingMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for RoutingMethod {
    type Err = Error;

    /// Case, `-` and `_` do not count; an unknown name lists the known ones.
    fn from_str(name: &str) -> Result<Self, Error> {
        let plain = |s: &str| s.replace(['-', '_'], "").to_ascii_lowercase();
        match Self::ALL.iter().find(|method| plain(method.name()) == plain(name)) {
            Some(method) => Ok(*method),
            None => {
                let known = Self::ALL.map(|method| method.name()).join(", ");
                bail!("routing method: unknown name {name:?}, expected one of {known}")
            }
        }
    }
}
