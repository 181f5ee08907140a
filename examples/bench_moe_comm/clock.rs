//! One clock for all ranks of a machine.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Readings of both clocks, of which the one that was interrupted least counts.
const READINGS: usize = 32;

/// Turns instants, which a process cannot tell another, into numbers that ranks can compare.
///
/// Threads share what it reads, and so do the processes of a machine. Ranks on several machines can compare as well as
/// their clocks agree.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    instant: Instant,
    /// The same moment, in nanoseconds since 1970.
    nanoseconds: u64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        let readings = (0..READINGS).map(|_| {
            let before = Instant::now();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let width = before.elapsed();
            (width, Self { instant: before + width / 2, nanoseconds: nanoseconds(now) })
        });
        let best = readings.min_by_key(|(width, _)| *width);
        best.map_or(Self { instant: Instant::now(), nanoseconds: 0 }, |(_, clock)| clock)
    }

    /// Nanoseconds since 1970, of an instant after this clock was made.
    pub(crate) fn read(&self, instant: Instant) -> u64 {
        self.nanoseconds.saturating_add(nanoseconds(instant.saturating_duration_since(self.instant)))
    }
}

/// Enough for 500 years.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
