//! Repeated measurements and what they say.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Samples that a [`Meter`] takes at the very least.
const MIN_SAMPLES: usize = 3;

/// How often something is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Calls that are not counted, before the others.
    pub(crate) warm_up: usize,
    /// Samples at most (three at least).
    pub(crate) iterations: usize,
    /// Time after which no further sample is started, warm-up not counted.
    pub(crate) time: Duration,
}

/// Takes samples until the budget is used up.
///
/// For loops that do more than time one closure (see [`measure`] for those): `while meter.wants_more() { ... record }`.
#[derive(Debug)]
pub(crate) struct Meter {
    budget: Budget,
    warm_up_left: usize,
    started: Option<Instant>,
    seconds: Vec<f64>,
}

impl Meter {
    pub(crate) fn new(budget: Budget) -> Self {
        Self { budget, warm_up_left: budget.warm_up, started: None, seconds: Vec::new() }
    }

    /// Whether another call is due, warm-up included.
    pub(crate) fn wants_more(&mut self) -> bool {
        if self.warm_up_left > 0 {
            return true;
        }
        let started = self.started.get_or_insert_with(Instant::now);
        let (taken, spent) = (self.seconds.len(), started.elapsed());
        taken < MIN_SAMPLES || (taken < self.budget.iterations && spent < self.budget.time)
    }

    /// Counts what a call took, unless it belonged to the warm-up.
    pub(crate) fn record(&mut self, elapsed: Duration) {
        match self.warm_up_left {
            0 => self.seconds.push(elapsed.as_secs_f64()),
            _ => self.warm_up_left -= 1,
        }
    }

    /// What was measured.
    pub(crate) fn summary(&self) -> Summary {
        Summary::of(&self.seconds)
    }
}

/// Times `call`, which is told how many calls went before, until the budget is used up.
pub(crate) fn measure<E>(budget: Budget, mut call: impl FnMut(usize) -> Result<(), E>) -> Result<Summary, E> {
    let mut meter = Meter::new(budget);
    let mut calls = 0;
    while meter.wants_more() {
        let start = Instant::now();
        call(calls)?;
        meter.record(start.elapsed());
        calls += 1;
    }
    Ok(meter.summary())
}

/// The median of some samples and how far they spread, in the unit of the samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) count: usize,
    pub(crate) median: f64,
    pub(crate) mean: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Of the sample: the divisor is `count - 1`.
    pub(crate) stdev: f64,
    pub(crate) p10: f64,
    pub(crate) p90: f64,
}

impl Summary {
    /// Quantiles are interpolated linearly. Of no samples, all is 0.
    pub(crate) fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let count = sorted.len();
        let quantile = |q: f64| {
            let place = q * count.saturating_sub(1) as f64;
            let at = |i: usize| sorted.get(i).or(sorted.last()).copied().unwrap_or(0.0);
            let (low, high) = (at(place as usize), at(place as usize + 1));
            low + (high - low) * place.fract()
        };
        let mean = sorted.iter().sum::<f64>() / count.max(1) as f64;
        let squares: f64 = sorted.iter().map(|s| (s - mean).powi(2)).sum();
        Self {
            count,
            median: quantile(0.5),
            mean,
            min: quantile(0.0),
            max: quantile(1.0),
            stdev: (squares / count.saturating_sub(1).max(1) as f64).sqrt(),
            p10: quantile(0.1),
            p90: quantile(0.9),
        }
    }

    /// The same in another unit.
    pub(crate) fn scaled(self, factor: f64) -> Self {
        Self {
            count: self.count,
            median: self.median * factor,
            mean: self.mean * factor,
            min: self.min * factor,
            max: self.max * factor,
            stdev: self.stdev * factor,
            p10: self.p10 * factor,
            p90: self.p90 * factor,
        }
    }
}
