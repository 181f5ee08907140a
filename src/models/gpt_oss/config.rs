//! `config.json` of GPT-OSS.

use crate::checkpoint::{CheckpointError, read_json};
use candle_core::{Result, bail};
use serde::{Deserialize, Deserializer};
use std::path::Path;

const OP: &str = "gpt-oss config";
/// Sizes above this are a mistake, and their products would overflow.
const MAX_SIZE: usize = 1 << 24;

/// The token that ends a message, for files that name none.
const PUBLISHED_EOS: u32 = 200_002;

/// A GPT-OSS model, as its `config.json` describes it: that of the published repositories, or that of their folder
/// `original/`, whose spelling of YaRN is `rope_scaling_factor`, `rope_ntk_alpha` and `rope_ntk_beta`.
///
/// What a file leaves out is as in the published models: sliding layers are the even ones, `rms_norm_eps` is 1e-5, and a
/// vocabulary that has token 200002 ends with it.
///
/// ```
/// use candle_moe::models::gpt_oss::Config;
/// let config = Config::from_file(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-gpt-oss/config.json"))?;
/// assert_eq!((config.num_experts, config.top_k), (8, 4));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "File")]
pub struct Config {
    /// Decoder layers.
    pub num_layers: usize,
    /// Experts of each layer, all of them (`num_local_experts` or `num_experts` in the file).
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside an expert.
    pub intermediate_size: usize,
    /// Width of an attention head, even.
    pub head_dim: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Bound of the SwiGLU clamps.
    pub swiglu_limit: f64,
    /// Slope of the SwiGLU sigmoid.
    pub swiglu_alpha: f64,
    /// Whether each layer sees only a window.
    pub sliding_layers: Vec<bool>,
    /// Names of layer types that are neither `sliding_attention` nor `full_attention`.
    unknown_layer_types: Vec<String>,
    /// Positions that a sliding layer sees, its own included.
    pub sliding_window: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Token ids.
    pub vocab_size: usize,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// How the file says that the experts are stored: `mxfp4`, or nothing. The tensors decide.
    pub quant_method: Option<String>,
    attention_bias: bool,
    tie_word_embeddings: bool,
}

/// Rotary embedding, stretched by YaRN where `rope_type` is `yarn`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RopeConfig {
    /// `yarn` or `default`.
    #[serde(default = "default_rope_type", alias = "type")]
    pub rope_type: String,
    /// Base of the frequencies.
    #[serde(default)]
    pub rope_theta: Option<f64>,
    /// How many times longer sequences become.
    #[serde(default = "one")]
    pub factor: f64,
    /// Rotations over the original length above which a frequency is kept.
    #[serde(default = "thirty_two")]
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`.
    #[serde(default = "one")]
    pub beta_slow: f64,
    /// Whether the bounds between the two are rounded outwards to whole dimensions.
    #[serde(default = "yes")]
    pub truncate: bool,
    /// Sequence length of the training before stretching.
    #[serde(default)]
    pub original_max_position_embeddings: usize,
}

fn default_rope_type() -> String {
    "default".into()
}
fn one() -> f64 {
    1.0
}
fn thirty_two() -> f64 {
    32.0
}
fn yes() -> bool {
    true
}

/// The file, older and newer spellings and that of `original/` alike.
#[derive(Deserialize)]
struct File {
    num_hidden_layers: usize,
    num_local_experts: Option<usize>,
    num_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    experts_per_token: Option<usize>,
    hidden_size: usize,
    intermediate_size: usize,
    head_dim: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    #[serde(default = "yes")]
    attention_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    swiglu_limit: Option<f64>,
    swiglu_alpha: Option<f64>,
    layer_types: Option<Vec<String>>,
    sliding_window: usize,
    #[serde(default = "published_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeConfig>,
    rope_parameters: Option<RopeConfig>,
    rope_scaling_factor: Option<f64>,
    rope_ntk_alpha: Option<f64>,
    rope_ntk_beta: Option<f64>,
    initial_context_length: Option<usize>,
    #[serde(default = "longest")]
    max_position_embeddings: usize,
    vocab_size: usize,
    #[serde(default, deserialize_with = "one_or_many")]
    eos_token_id: Option<Vec<u32>>,
    quantization_config: Option<Quantization>,
}

#[derive(Deserialize)]
struct Quantization {
    quant_method: String,
}

fn published_eps() -> f64 {
    1e-5
}

fn longest() -> usize {
    131_072
}

/// A list, `null` for an empty one, or one id.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Vec<u32>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }
    Ok(Some(match Option::<Ids>::deserialize(deserializer)? {
        None => Vec::new(),
        Some(Ids::One(id)) => vec![id],
        Some(Ids::Many(ids)) => ids,
    }))
}

impl File {
    /// YaRN as `original/` spells it; `None` in a file of another spelling.
    fn original_rope(&self) -> Option<RopeConfig> {
        Some(RopeConfig {
            rope_type: "yarn".into(),
            rope_theta: None,
            factor: self.rope_scaling_factor?,
            beta_fast: self.rope_ntk_beta.unwrap_or(32.0),
            beta_slow: self.rope_ntk_alpha.unwrap_or(1.0),
            truncate: false,
            original_max_position_embeddings: self.initial_context_length.unwrap_or(4096),
        })
    }
}

impl TryFrom<File> for Config {
    type Error = &'static str;

    fn try_from(file: File) -> std::result::Result<Self, Self::Error> {
        const PLAIN: RopeConfig = RopeConfig {
            rope_type: String::new(),
            rope_theta: None,
            factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            original_max_position_embeddings: 0,
        };
        let plain = RopeConfig { rope_type: default_rope_type(), ..PLAIN };
        let original_rope = file.original_rope();
        let stretched = file.rope_parameters.or(file.rope_scaling).or(original_rope);
        let rope = stretched.unwrap_or(plain);
        let num_experts = file.num_local_experts.or(file.num_experts);
        let default_eos = || (file.vocab_size > PUBLISHED_EOS as usize).then_some(PUBLISHED_EOS).into_iter().collect();
        let (sliding_layers, unknown_layer_types) = match file.layer_types {
            // A count that is absurd is refused by `validate`, not allocated here.
            None => ((0..file.num_hidden_layers.min(MAX_SIZE)).map(|layer| layer % 2 == 0).collect(), Vec::new()),
            Some(types) => (
                types.iter().map(|name| name == "sliding_attention").collect(),
                types.into_iter().filter(|name| name != "sliding_attention" && name != "full_attention").collect(),
            ),
        };
        Ok(Self {
            num_layers: file.num_hidden_layers,
            num_experts: num_experts.ok_or("missing field `num_local_experts` or `num_experts`")?,
            top_k: file.num_experts_per_tok.or(file.experts_per_token).unwrap_or(4),
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            head_dim: file.head_dim,
            num_attention_heads: file.num_attention_heads,
            num_key_value_heads: file.num_key_value_heads,
            swiglu_limit: file.swiglu_limit.unwrap_or(7.0),
            swiglu_alpha: file.swiglu_alpha.unwrap_or(1.702),
            sliding_layers,
            unknown_layer_types,
            sliding_window: file.sliding_window,
            rms_norm_eps: file.rms_norm_eps,
            rope: RopeConfig { rope_theta: rope.rope_theta.or(file.rope_theta), ..rope },
            max_position_embeddings: file.max_position_embeddings,
            vocab_size: file.vocab_size,
            eos_token_ids: file.eos_token_id.unwrap_or_else(default_eos),
            quant_method: file.quantization_config.map(|q| q.quant_method),
            attention_bias: file.attention_bias,
            tie_word_embeddings: file.tie_word_embeddings,
        })
    }
}

impl Config {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// A file that cannot be read, is no JSON, lacks a field, or [describes no model](Self::validate).
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

    /// Checks that the sizes describe a model that this crate can run.
    ///
    /// # Errors
    /// Names the field, its value and what was expected.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("num_hidden_layers", self.num_layers),
            ("num_local_experts", self.num_experts),
            ("num_experts_per_tok", self.top_k),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("head_dim", self.head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("sliding_window", self.sliding_window),
            ("max_position_embeddings", self.max_position_embeddings),
            ("vocab_size", self.vocab_size),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
            bail!("{OP}: {name} is {size}, expected 1 to {MAX_SIZE}")
        }
        if self.top_k > self.num_experts {
            bail!("{OP}: num_experts_per_tok is {}, expected at most {} experts", self.top_k, self.num_experts)
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            bail!(
                "{OP}: num_attention_heads is {}, expected a multiple of num_key_value_heads, which is {}",
                self.num_attention_heads,
                self.num_key_value_heads
            )
        }
        if !self.head_dim.is_multiple_of(2) {
            bail!("{OP}: head_dim is {}, expected an even number", self.head_dim)
        }
        if self.sliding_layers.len() != self.num_layers {
            bail!("{OP}: layer_types has {} entries, expected {}", self.sliding_layers.len(), self.num_layers)
        }
        if let Some(name) = self.unknown_layer_types.first() {
            bail!("{OP}: layer type {name:?} is unknown, expected sliding_attention or full_attention")
        }
        if !self.attention_bias {
            bail!("{OP}: attention_bias is false, expected true as in every published model")
        }
        if self.tie_word_embeddings {
            bail!("{OP}: tie_word_embeddings is true, expected false as in every published model")
        }
        if let Some(method) = self.quant_method.as_deref().filter(|&method| method != "mxfp4") {
            bail!("{OP}: quant_method is {method:?}, expected mxfp4")
        }
        let numbers = [
            ("rms_norm_eps", self.rms_norm_eps),
            ("swiglu_limit", self.swiglu_limit),
            ("swiglu_alpha", self.swiglu_alpha),
        ];
        if let Some((name, value)) = numbers.into_iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            bail!("{OP}: {name} is {value}, expected a finite number above 0")
        }
        self.rope.validate()
    }
}

impl RopeConfig {
    fn validate(&self) -> Result<()> {
        let theta = self.rope_theta.unwrap_or(f64::NAN);
        if !(theta.is_finite() && theta > 1.0) {
            bail!("{OP}: rope_theta is {:?}, expected a number above 1", self.rope_theta)
        }
        match self.rope_type.as_str() {
            "default" => Ok(()),
            "yarn" => {
                if !(self.factor.is_finite() && self.factor >= 1.0) {
                    bail!("{OP}: rope factor is {}, expected at least 1", self.factor)
                }
                if !(self.beta_slow > 0.0 && self.beta_fast > self.beta_slow && self.beta_fast.is_finite()) {
                    bail!(
                        "{OP}: rope beta_fast is {} and beta_slow is {}, expected beta_fast above beta_slow above 0",
                        self.beta_fast,
                        self.beta_slow
                    )
                }
                if self.original_max_position_embeddings == 0 {
                    bail!("{OP}: original_max_position_embeddings is 0, expected the length before stretching")
                }
                Ok(())
            }
            other => bail!("{OP}: rope_type is {other:?}, expected yarn or default"),
        }
    }
}
