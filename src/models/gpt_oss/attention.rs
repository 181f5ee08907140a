//! Grouped-query attention with sinks, over a window or over everything before.
//!
//! ```text
//! scores = q k^T / sqrt(head_dim)                      float32
//! probs  = softmax([scores, sink]) without its last column
//! out    = (probs v) through the output projection
//! ```
//!
//! Queries, keys and values are rounded to the dtype of the model after the rotation, as they stand in the cache; scores
//! and probabilities stay in float32.

use super::cache::LayerCache;
use super::layout::LayerRole;
use super::weights::Weights;
use crate::experts::Linear;
use candle_core::{D, DType, Result, Tensor};
use candle_nn::{ops::softmax_last_dim, rotary_emb::rope};

#[derive(Debug)]
pub(super) struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// f32 `[num_attention_heads]`
    sinks: Tensor,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

/// Where the tokens of a forward pass stand, and how they are rotated.
pub(super) struct Positions {
    pub(super) first: usize,
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

impl Attention {
    pub(super) fn load(weights: &Weights<'_>, layer: usize) -> Result<Self> {
        let config = weights.config;
        let (num_heads, num_kv_heads, head_dim) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let linear = |role: LayerRole, out: usize, inp: usize| weights.linear(layer, role, out, inp);
        let sinks = weights.layer(layer, LayerRole::Sinks, &[num_heads])?;
        Ok(Self {
            query: linear(LayerRole::Query, num_heads * head_dim, config.hidden_size)?,
            key: linear(LayerRole::Key, num_kv_heads * head_dim, config.hidden_size)?,
            value: linear(LayerRole::Value, num_kv_heads * head_dim, config.hidden_size)?,
            output: linear(LayerRole::Output, config.hidden_size, num_heads * head_dim)?,
            sinks: sinks.to_dtype(DType::F32)?,
            num_heads,
            num_kv_heads,
            head_dim,
            window: config.sliding_layers[layer].then_some(config.sliding_window),
        })
    }

    /// `hidden [num_tokens, hidden_size]` in, the same out.
    pub(super) fn forward(&self, hidden: &Tensor, positions: &Positions, cache: &mut LayerCache) -> Result<Tensor> {
        let num_tokens = hidden.dims()[0];
        let heads = |projection: &Linear, num: usize| {
            projection.forward(hidden)?.reshape((num_tokens, num, self.head_dim))?.transpose(0, 1)?.contiguous()
        };
        let rotated = |x: Tensor| {
            let x = x.to_dtype(DType::F32)?.unsqueeze(0)?;
            rope(&x, &positions.cos, &positions.sin)?.squeeze(0)?.to_dtype(hidden.dtype())
        };
        let query = rotated(heads(&self.query, self.num_heads)?)?;
        let key = rotated(heads(&self.key, self.num_kv_heads)?)?;
        let value = heads(&self.value, self.num_kv_heads)?;
        let (keys, values) = cache.append(&key, &value)?;
        let (keys, values) = (keys.to_dtype(DType::F32)?, values.to_dtype(DType::F32)?);
        let num_keys = keys.dims()[1];

        // The query heads of one key head stand together: [num_kv_heads, group * num_tokens, head_dim].
        let group = self.num_heads / self.num_kv_heads;
        let query = query.to_dtype(DType::F32)?.reshape((self.num_kv_heads, group * num_tokens, self.head_dim))?;
        let scores = (query.matmul(&keys.t()?)? / (self.head_dim as f64).sqrt())?;
        let scores = scores.reshape((self.num_heads, num_tokens, num_keys))?;
        let first_key = positions.first + num_tokens - num_keys;
        let mask = self.mask(positions.first, num_tokens, first_key, num_keys, scores.device())?;
        let scores = match mask {
            Some(mask) => scores.broadcast_add(&mask)?,
            None => scores,
        };
        let sinks = self.sinks.reshape((self.num_heads, 1, 1))?.broadcast_as((self.num_heads, num_tokens, 1))?;
        let probs = softmax_last_dim(&Tensor::cat(&[&scores, &sinks.contiguous()?], D::Minus1)?)?;
        let probs = probs.narrow(D::Minus1, 0, num_keys)?.contiguous()?;
        let probs = probs.reshape((self.num_kv_heads, group * num_tokens, num_keys))?;
        let out = probs.matmul(&values)?.reshape((self.num_heads, num_tokens, self.head_dim))?;
        let out = out.transpose(0, 1)?.reshape((num_tokens, self.num_heads * self.head_dim))?;
        self.output.forward(&out.to_dtype(hidden.dtype())?)
    }

    /// 0 where a token sees a key, -inf where it does not: f32 `[num_tokens, num_keys]`; `None` when all is seen.
    fn mask(
        &self,
        first: usize,
        num_tokens: usize,
        first_key: usize,
        num_keys: usize,
        device: &candle_core::Device,
    ) -> Result<Option<Tensor>> {
        let sees =
            |position: usize, key: usize| key <= position && self.window.is_none_or(|window| position - key < window);
        if num_tokens == 1 && sees(first, first_key) {
            return Ok(None);
        }
        let keys = first_key..first_key + num_keys;
        let value = |position, key| if sees(position, key) { 0.0 } else { f32::NEG_INFINITY };
        let mask: Vec<f32> =
            (first..first + num_tokens).flat_map(|p| keys.clone().map(move |key| value(p, key))).collect();
        Tensor::from_vec(mask, (num_tokens, num_keys), device).map(Some)
    }
}
