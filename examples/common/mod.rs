//! What the example programs share: reports, progress, statistics.
//!
//! Data goes to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 failed check or failed run, 2 bad arguments.

pub(crate) mod progress;
pub(crate) mod report;
pub(crate) mod stats;
