//! What stands between the two products of an expert.

use candle_core::{Result, bail};

/// The gated activation of an expert: gate and up in, hidden out, in float32.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `silu(gate) * up`: Mixtral, Qwen3, DeepSeek.
    Silu,
    /// GPT-OSS: `gate = min(gate, limit)`, `up = clamp(up, -limit, limit)`, then `gate * sigmoid(alpha * gate) * (up + 1)`.
    SwigluOss {
        /// Slope of the sigmoid, 1.702 in the published models.
        alpha: f32,
        /// Bound of the clamps, 7.0 in the published models.
        limit: f32,
    },
}

impl Activation {
    /// GPT-OSS as published.
    pub const GPT_OSS: Self = Self::SwigluOss { alpha: 1.702, limit: 7.0 };

    pub(super) fn check(&self, op: &str) -> Result<()> {
        match *self {
            Self::SwigluOss { alpha, limit } if !(alpha.is_finite() && limit > 0.0) => {
                bail!("{op}: SwiGLU alpha is {alpha} and limit is {limit}, expected a finite alpha and a limit above 0")
            }
            _ => Ok(()),
        }
    }

    /// NaN in either input comes out as NaN.
    #[inline]
    pub(super) fn apply(&self, gate: f32, up: f32) -> f32 {
        match *self {
            Self::Silu => gate / (1.0 + (-gate).exp()) * up,
            Self::SwigluOss { alpha, limit } => {
                let gate = if gate > limit { limit } else { gate };
                let up = if up > limit {
                    limit
                } else if up < -limit {
                    -limit
                } else {
                    up
                };
                gate / (1.0 + (-alpha * gate).exp()) * (up + 1.0)
            }
        }
    }
}
