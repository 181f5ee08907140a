//! The machine's memory: how fast it is.

use super::common::stats::{Budget, Summary, measure};
use rayon::prelude::*;
use serde::Serialize;
use std::convert::Infallible;
use std::hint::black_box;
use std::time::Duration;

/// Bytes of each of the two buffers, well above the share of a shared cache that a run can hope for.
const BUFFER_BYTES: usize = 256 << 20;
/// What a thread does at a time.
const PIECE: usize = (1 << 20) / size_of::<u64>();

/// Bandwidths with all threads, in 10^9 bytes per second.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Bandwidth {
    /// Copying between two buffers; `n` bytes copied count as `2 n` bytes moved, those read and those written.
    pub(crate) copy_gb_per_s: f64,
    /// Reading only, `n` bytes per pass: what weights are streamed with.
    pub(crate) read_gb_per_s: f64,
}

impl Bandwidth {
    /// Medians over a few passes.
    pub(crate) fn measure() -> Self {
        let budget = Budget { warm_up: 1, iterations: 15, time: Duration::from_millis(800) };
        let source = vec![1u64; BUFFER_BYTES / size_of::<u64>()];
        let mut target = vec![0u64; source.len()];
        let rate = |bytes: usize, seconds: Summary| bytes as f64 / seconds.median / 1e9;
        let copy = measure::<Infallible>(budget, |_| {
            let pieces = target.par_chunks_mut(PIECE).zip(source.par_chunks(PIECE));
            pieces.for_each(|(target, source)| target.copy_from_slice(source));
            black_box(&target);
            Ok(())
        });
        let read = measure::<Infallible>(budget, |_| {
            let sum = |piece: &[u64]| piece.iter().fold(0u64, |sum, &value| sum.wrapping_add(value));
            black_box(black_box(&source).par_chunks(PIECE).map(sum).reduce(|| 0, u64::wrapping_add));
            Ok(())
        });
        let (Ok(copy), Ok(read)) = (copy, read);
        Self { copy_gb_per_s: rate(2 * BUFFER_BYTES, copy), read_gb_per_s: rate(BUFFER_BYTES, read) }
    }
}
