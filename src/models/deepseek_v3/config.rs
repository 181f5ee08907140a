//! `config.json` of DeepSeek-V3.

use crate::checkpoint::{CheckpointError, read_json};
use crate::experts::FP8_BLOCK;
use crate::routing::{ExpertGroups, RoutingMethod};
use candle_core::{Result, bail};
use serde::Deserialize;
use std::path::Path;

const OP: &str = "deepseek-v3 config";
/// Sizes above this are a mistake, and their products would overflow.
const MAX_SIZE: usize = 1 << 24;

/// What a `config.json` says of the MoE layers of DeepSeek-V3, and of models with the same layers (R1, Kimi-K2).
///
/// ```
/// use candle_moe::models::deepseek_v3::Config;
/// let config = Config::from_file(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-deepseek-v3/config.json"))?;
/// assert_eq!((config.num_experts, config.top_k, config.groups.num_groups), (32, 4, 4));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Deserialize)]
#[serde(from = "Published")]
pub struct Config {
    /// Decoder layers.
    pub num_layers: usize,
    /// The first layers, which have no experts.
    pub first_moe_layer: usize,
    /// Routed experts of each layer (`n_routed_experts` in the file).
    pub num_experts: usize,
    /// Routed experts per token.
    pub top_k: usize,
    /// Experts that every token goes to (`n_shared_experts`), stored as one of so many times the width; 0 for none.
    pub num_shared_experts: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside a routed expert (`moe_intermediate_size`).
    pub intermediate_size: usize,
    /// Which part of the experts a token may choose from (`n_group`, `topk_group`).
    pub groups: ExpertGroups,
    /// Multiplies the weights of the routed experts.
    pub routed_scaling_factor: f64,
    /// What the loader cannot do otherwise, as the file says it.
    fixed: Fixed,
}

/// Fields of which only one value is known.
#[derive(Debug, Clone)]
struct Fixed {
    norm_topk_prob: bool,
    scoring_func: String,
    topk_method: String,
    hidden_act: String,
    moe_layer_freq: usize,
    quantization: Option<Quantization>,
}

#[derive(Deserialize)]
struct Published {
    num_hidden_layers: usize,
    #[serde(default)]
    first_k_dense_replace: usize,
    n_routed_experts: usize,
    num_experts_per_tok: usize,
    n_shared_experts: Option<usize>,
    hidden_size: usize,
    moe_intermediate_size: usize,
    n_group: Option<usize>,
    topk_group: Option<usize>,
    #[serde(default = "one")]
    routed_scaling_factor: f64,
    #[serde(default = "yes")]
    norm_topk_prob: bool,
    #[serde(default = "sigmoid")]
    scoring_func: String,
    #[serde(default = "noaux_tc")]
    topk_method: String,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default = "every")]
    moe_layer_freq: usize,
    quantization_config: Option<Quantization>,
}

#[derive(Debug, Clone, Deserialize)]
struct Quantization {
    quant_method: String,
    #[serde(default)]
    weight_block_size: Option<Vec<usize>>,
}

fn one() -> f64 {
    1.0
}
fn every() -> usize {
    1
}
fn yes() -> bool {
    true
}
fn sigmoid() -> String {
    "sigmoid".into()
}
fn noaux_tc() -> String {
    "noaux_tc".into()
}
fn silu() -> String {
    "silu".into()
}

impl From<Published> for Config {
    fn from(file: Published) -> Self {
        Self {
            num_layers: file.num_hidden_layers,
            first_moe_layer: file.first_k_dense_replace,
            num_experts: file.n_routed_experts,
            top_k: file.num_experts_per_tok,
            num_shared_experts: file.n_shared_experts.unwrap_or(0),
            hidden_size: file.hidden_size,
            intermediate_size: file.moe_intermediate_size,
            groups: ExpertGroups { num_groups: file.n_group.unwrap_or(1), topk_group: file.topk_group.unwrap_or(1) },
            routed_scaling_factor: file.routed_scaling_factor,
            fixed: Fixed {
                norm_topk_prob: file.norm_topk_prob,
                scoring_func: file.scoring_func,
                topk_method: file.topk_method,
                hidden_act: file.hidden_act,
                moe_layer_freq: file.moe_layer_freq,
                quantization: file.quantization_config,
            },
        }
    }
}

impl Config {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// A file that cannot be read, is no JSON, lacks a field, or [describes no layer](Self::validate).
    pub fn from_file(file: impl AsRef<Path>) -> Result<Self> {
        let config: Self = read_json(&file)?;
        match config.validate() {
            Ok(()) => Ok(config),
            Err(error) => Err(CheckpointError::Json { file: file.as_ref().into(), reason: error.to_string() }.into()),
        }
    }

    /// Reads and checks the text of a `config.json`.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn from_json(text: &str) -> Result<Self> {
        match serde_json::from_str::<Self>(text) {
            Ok(config) => config.validate().map(|()| config),
            Err(error) => bail!("{OP}: {error}"),
        }
    }

    /// The routing of the layers.
    pub fn routing_method(&self) -> RoutingMethod {
        RoutingMethod::DeepSeekV3 { groups: self.groups, routed_scaling_factor: self.routed_scaling_factor as f32 }
    }

    /// Checks that the sizes describe layers that this crate can run.
    ///
    /// # Errors
    /// Names the field, its value and what was expected.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("num_hidden_layers", self.num_layers),
            ("n_routed_experts", self.num_experts),
            ("num_experts_per_tok", self.top_k),
            ("hidden_size", self.hidden_size),
            ("moe_intermediate_size", self.intermediate_size),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
            bail!("{OP}: {name} is {size}, expected 1 to {MAX_SIZE}")
        }
        if self.num_shared_experts > MAX_SIZE / self.intermediate_size {
            bail!(
                "{OP}: n_shared_experts is {}, expected at most {}",
                self.num_shared_experts,
                MAX_SIZE / self.intermediate_size
            )
        }
        if self.top_k > self.num_experts {
            bail!("{OP}: num_experts_per_tok is {}, expected at most {} experts", self.top_k, self.num_experts)
        }
        if self.first_moe_layer >= self.num_layers {
            bail!(
                "{OP}: first_k_dense_replace is {}, expected less than the {} layers",
                self.first_moe_layer,
                self.num_layers
            )
        }
        self.groups.check(OP, self.num_experts, self.top_k)?;
        if !(self.routed_scaling_factor.is_finite() && self.routed_scaling_factor > 0.0) {
            bail!("{OP}: routed_scaling_factor is {}, expected a finite number above 0", self.routed_scaling_factor)
        }
        self.fixed.validate()
    }
}

impl Fixed {
    fn validate(&self) -> Result<()> {
        let names = [
            ("scoring_func", &self.scoring_func, "sigmoid"),
            ("topk_method", &self.topk_method, "noaux_tc"),
            ("hidden_act", &self.hidden_act, "silu"),
        ];
        if let Some((name, found, expected)) = names.into_iter().find(|(_, found, expected)| found != expected) {
            bail!("{OP}: {name} is {found:?}, expected {expected}")
        }
        if !self.norm_topk_prob {
            bail!("{OP}: norm_topk_prob is false, expected true as in DeepSeek-V3")
        }
        if self.moe_layer_freq != 1 {
            bail!("{OP}: moe_layer_freq is {}, expected 1 as in DeepSeek-V3", self.moe_layer_freq)
        }
        match &self.quantization {
            None => Ok(()),
            Some(Quantization { quant_method, .. }) if quant_method != "fp8" => {
                bail!("{OP}: quant_method is {quant_method:?}, expected fp8")
            }
            Some(Quantization { weight_block_size, .. }) => match weight_block_size.as_deref() {
                None | Some([FP8_BLOCK, FP8_BLOCK]) => Ok(()),
                Some(other) => bail!("{OP}: weight_block_size is {other:?}, expected [{FP8_BLOCK}, {FP8_BLOCK}]"),
            },
        }
    }
}
