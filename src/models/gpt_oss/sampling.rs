//! Choosing the next token.

use candle_core::{Result, bail};

const OP: &str = "sampler";

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; 0 always takes the best token.
    pub temperature: f64,
    /// Samples from the smallest set of best tokens whose probabilities reach this sum.
    pub top_p: f64,
    /// Same seed, same tokens.
    pub seed: u64,
}

impl SamplingConfig {
    /// Always the best token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, seed: 0 };
}

/// Chooses tokens from logits.
///
/// ```
/// use candle_moe::models::gpt_oss::{Sampler, SamplingConfig};
/// let mut sampler = Sampler::new(SamplingConfig::GREEDY)?;
/// assert_eq!(sampler.sample(&[0.1, 2.0, 2.0, f32::NAN])?, 1);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplingConfig,
    state: u64,
}

impl Sampler {
    /// # Errors
    /// A temperature that is negative or not finite, or a `top_p` outside `0 < top_p <= 1`.
    pub fn new(config: SamplingConfig) -> Result<Self> {
        if !(config.temperature.is_finite() && config.temperature >= 0.0) {
            bail!("{OP}: temperature is {}, expected a finite number of at least 0", config.temperature)
        }
        if !(config.top_p > 0.0 && config.top_p <= 1.0) {
            bail!("{OP}: top_p is {}, expected above 0 and at most 1", config.top_p)
        }
        Ok(Self { config, state: config.seed })
    }

    /// A token id for `logits [vocab_size]`. Ties go to the lower id; NaN is never chosen.
    ///
    /// # Errors
    /// No logit is a number above -inf.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let usable = |l: f32| !l.is_nan() && l > f32::NEG_INFINITY;
        let mut ids: Vec<u32> = (0..logits.len() as u32).filter(|&id| usable(logits[id as usize])).collect();
        let best = ids.iter().copied().reduce(|a, b| if logits[b as usize] > logits[a as usize] { b } else { a });
        let Some(best) = best else { bail!("{OP}: none of {} logits is a number above -inf", logits.len()) };
        if self.config.temperature == 0.0 || logits[best as usize] == f32::INFINITY {
            return Ok(best);
        }
        let best = f64::from(logits[best as usize]);
        let weight = |id: u32| ((f64::from(logits[id as usize]) - best) / self.config.temperature).exp();
        if self.config.top_p < 1.0 {
            ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            let enough = self.config.top_p * ids.iter().map(|&id| weight(id)).sum::<f64>();
            let mut sum = 0.0;
            let needed = ids.iter().position(|&id| {
                sum += weight(id);
                sum >= enough
            });
            ids.truncate(needed.map_or(ids.len(), |last| last + 1));
        }
        let mut left = uniform(&mut self.state) * ids.iter().map(|&id| weight(id)).sum::<f64>();
        let chosen = ids.iter().copied().find(|&id| {
            left -= weight(id);
            left < 0.0
        });
        // Rounding can leave a rest behind the last token.
        Ok(chosen.or(ids.last().copied()).unwrap_or(0))
    }
}

/// A number in 0..1 (SplitMix64).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}
