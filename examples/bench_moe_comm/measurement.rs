//! What the ranks' samples of one batch size say together.

use crate::backends::Backend;
use crate::common::stats::Summary;
use crate::settings::Settings;
use crate::workload;
use candle_core::Result;
use serde::{Deserialize, Serialize};

/// How far apart the rows of ranks may be under perfect routing.
const EVEN: usize = 1;

/// What one rank measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Samples {
    pub(crate) volume: Volume,
    pub(crate) dispatch_ns: Vec<u64>,
    pub(crate) combine_ns: Vec<u64>,
    /// When it entered dispatch, on the clock of all ranks.
    pub(crate) arrival_ns: Vec<u64>,
}

impl Samples {
    pub(crate) fn new(volume: Volume) -> Self {
        Self { volume, dispatch_ns: Vec::new(), combine_ns: Vec::new(), arrival_ns: Vec::new() }
    }
}

/// What one rank moves in a round.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Volume {
    /// Slots of its experts.
    pub(crate) expert_rows: usize,
    /// Tokens for other ranks, from other ranks, and for itself, in dispatch.
    pub(crate) rows_sent: usize,
    pub(crate) rows_received: usize,
    pub(crate) rows_kept: usize,
    /// Results for other ranks and from other ranks.
    pub(crate) combine_rows_sent: usize,
    pub(crate) combine_rows_received: usize,
    /// Everything, ids and weights too.
    pub(crate) dispatch_bytes_sent: usize,
    pub(crate) dispatch_bytes_kept: usize,
    pub(crate) combine_bytes_sent: usize,
    pub(crate) combine_bytes_kept: usize,
}

impl Volume {
    /// With what stays home.
    pub(crate) fn dispatch_logical_bytes(&self) -> usize {
        self.dispatch_bytes_sent + self.dispatch_bytes_kept
    }

    /// With what stays home.
    pub(crate) fn combine_logical_bytes(&self) -> usize {
        self.combine_bytes_sent + self.combine_bytes_kept
    }
}

/// Of one rank; times in microseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct RankMeasurement {
    pub(crate) dispatch_us: Summary,
    pub(crate) combine_us: Summary,
    /// How late it entered dispatch, compared with the first rank.
    pub(crate) arrival_skew_us: Summary,
    pub(crate) volume: Volume,
}

/// One backend with one batch size.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measurement {
    pub(crate) backend: String,
    pub(crate) local_batch_size: usize,
    /// Tokens of each rank; with tokens that all ranks hold, the part of each.
    pub(crate) token_counts: Vec<usize>,
    pub(crate) ranks: Vec<RankMeasurement>,
    /// Of the rank that took longest, round by round.
    pub(crate) slowest_dispatch_us: Summary,
    pub(crate) slowest_combine_us: Summary,
    /// Whether perfect routing was as even as it promises; `None` where it promises nothing.
    pub(crate) is_even: Option<bool>,
}

impl Measurement {
    pub(crate) fn new(
        settings: &Settings,
        backend: &Backend,
        local_batch_size: usize,
        samples: Vec<Samples>,
    ) -> Result<Self> {
        let rounds = samples.iter().map(|rank| rank.arrival_ns.len()).min().unwrap_or(0);
        let across =
            |of: &dyn Fn(&Samples) -> u64, pick: fn(u64, u64) -> u64| samples.iter().map(of).reduce(pick).unwrap_or(0);
        let first: Vec<_> = (0..rounds).map(|round| across(&|rank| rank.arrival_ns[round], u64::min)).collect();
        let late = |rank: &Samples| -> Vec<u64> {
            rank.arrival_ns.iter().zip(&first).map(|(arrival, first)| arrival - first).collect()
        };
        let longest = |of: fn(&Samples) -> &[u64]| -> Vec<u64> {
            (0..rounds).map(|round| across(&|rank| of(rank)[round], u64::max)).collect()
        };
        let slowest_dispatch_us = microseconds(&longest(|rank| &rank.dispatch_ns));
        let slowest_combine_us = microseconds(&longest(|rank| &rank.combine_ns));
        let rank = |samples: &Samples| RankMeasurement {
            dispatch_us: microseconds(&samples.dispatch_ns),
            combine_us: microseconds(&samples.combine_ns),
            arrival_skew_us: microseconds(&late(samples)),
            volume: samples.volume,
        };
        let token_counts = settings.workload.token_counts(settings.ep_size, local_batch_size);
        let ranks: Vec<_> = samples.iter().map(rank).collect();
        let is_even = promises_even_rows(settings, &token_counts)?.then(|| are_even(&ranks));
        Ok(Self {
            backend: backend.to_string(),
            local_batch_size,
            token_counts,
            ranks,
            slowest_dispatch_us,
            slowest_combine_us,
            is_even,
        })
    }

    /// How late the rank enters dispatch that is last, most of the time.
    pub(crate) fn skew_us(&self) -> f64 {
        self.ranks.iter().map(|rank| rank.arrival_skew_us.median).fold(0.0, f64::max)
    }

    /// The sum over ranks.
    pub(crate) fn total(&self, of: impl Fn(&Volume) -> usize) -> usize {
        self.ranks.iter().map(|rank| of(&rank.volume)).sum()
    }
}

fn microseconds(nanoseconds: &[u64]) -> Summary {
    let samples: Vec<_> = nanoseconds.iter().map(|&nanoseconds| nanoseconds as f64 / 1e3).collect();
    Summary::of(&samples)
}

/// Senders with as many tokens each, and a plan without a hot spot, that keeps ranks even.
fn promises_even_rows(settings: &Settings, token_counts: &[usize]) -> Result<bool> {
    let equal = token_counts.windows(2).all(|counts| counts[0] == counts[1]);
    Ok(settings.perfect_router && equal && workload::plan(settings, 0)?.balance().is_some())
}

fn are_even(ranks: &[RankMeasurement]) -> bool {
    let spread = |of: fn(&Volume) -> usize| {
        let rows = || ranks.iter().map(|rank| of(&rank.volume));
        rows().max().unwrap_or(0) - rows().min().unwrap_or(0)
    };
    [spread(|volume| volume.rows_received), spread(|volume| volume.expert_rows)].iter().all(|&spread| spread <= EVEN)
}
