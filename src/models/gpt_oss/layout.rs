//! How checkpoints name and store the tensors of the model: the only place that knows.
//!
//! The original layout holds the bytes of the published one, with queries, keys and values in one tensor. The bf16 layout has
//! the published names but for the experts, whose matrices are transposed.

use super::Config;
use crate::checkpoint::Checkpoint;
use candle_core::{Result, bail};
use std::ops::Range;

const OP: &str = "gpt-oss layout";
const KNOWN: &str = "expected one of the layouts published (model.layers.N.mlp.experts.gate_up_proj_blocks), original \
                     (block.N.mlp.mlp1_weight.blocks), bf16 (model.layers.N.mlp.experts.gate_up_proj)";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Published,
    Original,
    Bf16,
}

/// What a tensor outside the decoder layers is for.
#[derive(Debug, Clone, Copy)]
pub(super) enum ModelRole {
    Embedding,
    Norm,
    Head,
}

/// What a tensor of a decoder layer is for; for a linear layer the tensors are `.weight` and `.bias`.
#[derive(Debug, Clone, Copy)]
pub(super) enum LayerRole {
    AttentionNorm,
    Query,
    Key,
    Value,
    Output,
    Sinks,
    MoeNorm,
    Gate,
}

/// What a projection of the experts is for.
#[derive(Debug, Clone, Copy)]
pub(super) enum ExpertRole {
    GateUp,
    Down,
}

/// The tensors of an expert projection.
pub(super) struct ExpertNames {
    pub(super) matrices: Matrices,
    /// `[num_experts, out_features]`
    pub(super) bias: String,
}

pub(super) enum Matrices {
    /// u8 `[num_experts, out_features, in_features / 32, 16]` and `[num_experts, out_features, in_features / 32]`.
    Mxfp4 { blocks: String, scales: String },
    /// Floats `[num_experts, in_features, out_features]`.
    Transposed(String),
}

impl Layout {
    /// The layout whose tensors a checkpoint holds.
    ///
    /// # Errors
    /// Tensors of two layouts, or of none.
    pub(super) fn detect(checkpoint: &Checkpoint) -> Result<Self> {
        let find = |belongs: fn(&str) -> bool| checkpoint.names().find(|name| belongs(name));
        let (original, root) = (find(is_original), find(is_root));
        let (blocks, floats) = (find(is_mxfp4_experts), find(is_float_experts));
        let folder = checkpoint.folder().display();
        match (original, root, blocks, floats) {
            (Some(_), None, ..) => Ok(Self::Original),
            (None, _, Some(_), None) => Ok(Self::Published),
            (None, _, None, Some(_)) => Ok(Self::Bf16),
            (None, _, None, None) => bail!("{OP}: {folder}: no expert tensors of a known layout; {KNOWN}"),
            (Some(a), Some(b), ..) | (_, _, Some(a), Some(b)) => {
                bail!("{OP}: {folder}: {a} and {b} belong to different layouts; {KNOWN}")
            }
        }
    }

    pub(super) fn model(self, role: ModelRole) -> &'static str {
        let (root, original) = match role {
            ModelRole::Embedding => ("model.embed_tokens.weight", "embedding.weight"),
            ModelRole::Norm => ("model.norm.weight", "norm.scale"),
            ModelRole::Head => ("lm_head.weight", "unembedding.weight"),
        };
        if self == Self::Original { original } else { root }
    }

    pub(super) fn layer(self, layer: usize, role: LayerRole) -> String {
        let (root, original) = match role {
            LayerRole::AttentionNorm => ("input_layernorm.weight", "attn.norm.scale"),
            LayerRole::Query => ("self_attn.q_proj", "attn.qkv"),
            LayerRole::Key => ("self_attn.k_proj", "attn.qkv"),
            LayerRole::Value => ("self_attn.v_proj", "attn.qkv"),
            LayerRole::Output => ("self_attn.o_proj", "attn.out"),
            LayerRole::Sinks => ("self_attn.sinks", "attn.sinks"),
            LayerRole::MoeNorm => ("post_attention_layernorm.weight", "mlp.norm.scale"),
            LayerRole::Gate => ("mlp.router", "mlp.gate"),
        };
        if self == Self::Original {
            format!("block.{layer}.{original}")
        } else {
            format!("model.layers.{layer}.{root}")
        }
    }

    pub(super) fn experts(self, layer: usize, role: ExpertRole) -> ExpertNames {
        let (root, original) = match role {
            ExpertRole::GateUp => ("gate_up_proj", "mlp1"),
            ExpertRole::Down => ("down_proj", "mlp2"),
        };
        let (root, original) =
            (format!("model.layers.{layer}.mlp.experts.{root}"), format!("block.{layer}.mlp.{original}"));
        let mxfp4 = |blocks, scales| Matrices::Mxfp4 { blocks, scales };
        match self {
            Self::Published => ExpertNames {
                matrices: mxfp4(format!("{root}_blocks"), format!("{root}_scales")),
                bias: format!("{root}_bias"),
            },
            Self::Original => ExpertNames {
                matrices: mxfp4(format!("{original}_weight.blocks"), format!("{original}_weight.scales")),
                bias: format!("{original}_bias"),
            },
            Self::Bf16 => ExpertNames { bias: format!("{root}_bias"), matrices: Matrices::Transposed(root) },
        }
    }

    /// Where the rows of a linear layer stand in its tensor, and how many rows the tensor has.
    pub(super) fn rows(self, role: LayerRole, out_features: usize, config: &Config) -> (Range<usize>, usize) {
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let first = match (self, role) {
            (Self::Original, LayerRole::Query) => 0,
            (Self::Original, LayerRole::Key) => queries,
            (Self::Original, LayerRole::Value) => queries + keys,
            _ => return (0..out_features, out_features),
        };
        (first..first + out_features, queries + 2 * keys)
    }

    /// Whether the experts are stored in blocks of values that share a scale.
    pub(super) fn is_mxfp4(self) -> bool {
        self != Self::Bf16
    }
}

fn is_original(name: &str) -> bool {
    name.starts_with("block.") || matches!(name, "embedding.weight" | "norm.scale" | "unembedding.weight")
}

/// Names that the published and the bf16 layout share, or that either has.
fn is_root(name: &str) -> bool {
    name.starts_with("model.") || name.starts_with("lm_head.")
}

fn is_mxfp4_experts(name: &str) -> bool {
    is_root(name) && name.contains(".mlp.experts.") && (name.ends_with("_blocks") || name.ends_with("_scales"))
}

fn is_float_experts(name: &str) -> bool {
    is_root(name) && [".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"].iter().any(|end| name.ends_with(end))
}
