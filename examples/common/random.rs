//! Seeded random numbers.

use candle_core::{DType, Device, Result, Tensor};

/// A small seeded generator (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The generator of one part of what `self` is for; parts are independent.
    pub(crate) fn part(&self, part: u64) -> Self {
        Self(Self(self.0 ^ Self(part).next()).next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `-1..1`.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Uniform in `-scale..scale`.
    pub(crate) fn floats(&mut self, shape: &[usize], scale: f32, dtype: DType) -> Result<Tensor> {
        let values: Vec<_> = (0..shape.iter().product()).map(|_| self.float() * scale).collect();
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
    }
}
