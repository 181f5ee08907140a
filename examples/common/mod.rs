//! What the example programs share: arguments, ranks as processes, reports, charts and pages, graphs of CUDA, progress, statistics.
//!
//! Data goes to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 failed check or failed run, 2 bad arguments.

pub(crate) mod arguments;
pub(crate) mod chart;
#[cfg(feature = "cuda")]
pub(crate) mod graph;
pub(crate) mod machine;
pub(crate) mod page;
pub(crate) mod processes;
pub(crate) mod progress;
pub(crate) mod random;
pub(crate) mod report;
pub(crate) mod stats;
