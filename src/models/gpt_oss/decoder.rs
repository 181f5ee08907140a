//! The dense half of the model: embeddings, attention, norms and the head around the MoE layers.

use super::attention::{Attention, Positions};
use super::cache::Cache;
use super::layout::{LayerRole, ModelRole};
use super::rope::Rope;
use super::weights::Weights;
use super::{Config, MoeLayers};
use crate::checkpoint::Checkpoint;
use crate::experts::Linear;
use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::ops::rms_norm;

const OP: &str = "gpt-oss decoder";

/// Everything of the model that is not an expert layer, for one sequence at a time.
///
/// Linear layers keep their weights in the stored dtype, multiply in float32 and round once; norms and attention are
/// float32 inside. A token's result does not depend on how the prompt is cut, up to the rounding of attention.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    dtype: DType,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    rope: Rope,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Norm,
    attention: Attention,
    moe_norm: Norm,
}

/// Which tokens need logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// All: `[num_tokens, vocab_size]`.
    All,
    /// The last only: `[1, vocab_size]`.
    Last,
}

impl Decoder {
    /// Reads the dense tensors of a checkpoint in any of the [layouts](super) to `device`. `dtype` is that of the hidden states:
    /// f32 or bf16.
    ///
    /// # Errors
    /// Tensors of two layouts or of none, missing or unfit tensors, another dtype.
    pub fn load(checkpoint: &Checkpoint, config: &Config, dtype: DType, device: &Device) -> Result<Self> {
        config.validate()?;
        if !matches!(dtype, DType::F32 | DType::BF16) {
            bail!("{OP}: dtype is {dtype:?}, expected f32 or bf16")
        }
        let weights = Weights::new(checkpoint, config, device)?;
        let (vocab_size, hidden_size) = (config.vocab_size, config.hidden_size);
        let layer = |layer: usize| {
            let norm = |role: LayerRole| Norm::new(weights.layer(layer, role, &[hidden_size])?, config);
            Ok(Layer {
                attention_norm: norm(LayerRole::AttentionNorm)?,
                attention: Attention::load(&weights, layer)?,
                moe_norm: norm(LayerRole::MoeNorm)?,
            })
        };
        let vocabulary = |role: ModelRole| weights.model(role, &[vocab_size, hidden_size]);
        let decoder = Self {
            dtype,
            embedding: vocabulary(ModelRole::Embedding)?,
            layers: (0..config.num_layers).map(layer).collect::<Result<_>>()?,
            norm: Norm::new(weights.model(ModelRole::Norm, &[hidden_size])?, config)?,
            head: Linear::new(vocabulary(ModelRole::Head)?, None)?,
            rope: Rope::new(&config.rope, config.head_dim),
            config: config.clone(),
        };
        // Other threads, whose streams do not wait for this one's, may be the next to use it.
        device.synchronize()?;
        Ok(decoder)
    }

    /// The model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The dtype of the hidden states.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Runs `input_ids` after what `cache` holds; the result is f32.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, more positions than the model has, a cache of another model, or an error of
    /// the MoE layers; after an error in the middle of a step the cache must be [reset](Cache::reset).
    pub fn forward(
        &self,
        input_ids: &[u32],
        cache: &mut Cache,
        moe: &mut dyn MoeLayers,
        logits: Logits,
    ) -> Result<Tensor> {
        self.check(input_ids, cache)?;
        let (first, num_tokens) = (cache.len(), input_ids.len());
        let device = self.embedding.device();
        let (cos, sin) = self.rope.tables(first, num_tokens, device)?;
        let positions = Positions { first, cos, sin };
        let ids = Tensor::new(input_ids, device)?;
        moe.begin(first, num_tokens)?;
        let mut hidden = self.embedding.index_select(&ids, 0)?.to_dtype(self.dtype)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.forward(&hidden)?;
            hidden = (hidden + layer.attention.forward(&normed, &positions, cache.layer(index))?)?;
            let normed = layer.moe_norm.forward(&hidden)?;
            let out = moe.forward(index, &normed)?;
            if out.dims() != hidden.dims() || out.dtype() != self.dtype {
                bail!("{OP}: layer {index}: the MoE layer returned {:?} in {:?}", out.shape(), out.dtype())
            }
            hidden = (hidden + out)?;
        }
        cache.advance(num_tokens);
        let hidden = match logits {
            Logits::All => hidden,
            Logits::Last => hidden.narrow(0, num_tokens - 1, 1)?,
        };
        let logits = self.head.forward(&self.norm.forward(&hidden)?)?.to_dtype(DType::F32)?;
        moe.end()?;
        Ok(logits)
    }

    pub(super) fn check(&self, input_ids: &[u32], cache: &Cache) -> Result<()> {
        if input_ids.is_empty() {
            bail!("{OP}: input_ids is empty, expected at least one token")
        }
        if let Some(id) = input_ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            bail!("{OP}: token id {id}, expected less than vocab_size, which is {}", self.config.vocab_size)
        }
        if cache.num_layers() != self.layers.len() {
            bail!("{OP}: the cache has {} layers, expected {}", cache.num_layers(), self.layers.len())
        }
        cache.check_room(input_ids.len())
    }
}

/// Root-mean-square norm: float32 inside, one rounding.
#[derive(Debug)]
struct Norm {
    /// f32 `[hidden_size]`
    weight: Tensor,
    eps: f32,
}

impl Norm {
    fn new(weight: Tensor, config: &Config) -> Result<Self> {
        Ok(Self { weight: weight.to_dtype(DType::F32)?, eps: config.rms_norm_eps as f32 })
    }

    fn forward(&self, hidden: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(&hidden.to_dtype(DType::F32)?.contiguous()?, &self.weight, self.eps)?;
        normed.to_dtype(hidden.dtype())
    }
}
