//! Rotary position embedding with YaRN.
//!
//! Dimension pair `i` of `head_dim / 2` turns by `position * frequency[i]`, where
//!
//! ```text
//! base[i]      = rope_theta^(-2i / head_dim)
//! dimension(r) = head_dim * ln(original_length / (2 pi r)) / (2 ln rope_theta)      pair that turns r times
//! ramp[i]      = clamp((i - dimension(beta_fast)) / (dimension(beta_slow) - dimension(beta_fast)), 0, 1)
//! frequency[i] = base[i] * (1 - ramp[i]) + base[i] / factor * ramp[i]
//! ```
//!
//! and cosine and sine are multiplied by `0.1 ln(factor) + 1`. Pairs are (first half, second half) of a head.

use super::RopeConfig;
use candle_core::{Device, Result, Tensor};
use std::f64::consts::PI;

#[derive(Debug, Clone)]
pub(super) struct Rope {
    frequencies: Vec<f64>,
    concentration: f64,
}

impl Rope {
    pub(super) fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let theta = config.rope_theta.unwrap_or(10_000.0);
        let base = |i: usize| theta.powf(-2.0 * i as f64 / head_dim as f64);
        if config.rope_type != "yarn" {
            return Self { frequencies: (0..head_dim / 2).map(base).collect(), concentration: 1.0 };
        }
        let original = config.original_max_position_embeddings as f64;
        let dimension = |turns: f64| head_dim as f64 * (original / (2.0 * PI * turns)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (dimension(config.beta_fast), dimension(config.beta_slow));
        if config.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        let width = if high > low { high - low } else { 0.001 };
        let frequency = |i: usize| {
            let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
            base(i) * (1.0 - ramp) + base(i) / config.factor * ramp
        };
        Self { frequencies: (0..head_dim / 2).map(frequency).collect(), concentration: 0.1 * config.factor.ln() + 1.0 }
    }

    /// Cosines and sines of positions `first..first + num_tokens`, f32 `[num_tokens, head_dim / 2]` each.
    pub(super) fn tables(&self, first: usize, num_tokens: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let table = |f: fn(f64) -> f64| {
            let positions = first..first + num_tokens;
            let value = |p: usize, w: f64| (f(p as f64 * w) * self.concentration) as f32;
            let values: Vec<_> = positions.flat_map(|p| self.frequencies.iter().map(move |&w| value(p, w))).collect();
            Tensor::from_vec(values, (num_tokens, self.frequencies.len()), device)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }
}
