//! Expert parallelism: who owns which experts, and how ranks exchange rows.
//!
//! * [`Topology`] splits the experts of a layer over the ranks.
//! * [`Communicator`] is one rank's handle on the group: collectives with per-rank row counts, which
//!   return within a deadline, name who is missing or out of step, and never hand out a partial
//!   result. [`Solo`] is the group of one, [`Threads`] has its ranks as threads of one process, [`Procs`] as processes of
//!   one machine; the three give the same bits and the same errors. With the feature `nccl`, `Nccl` puts ranks of either kind
//!   on a CUDA device each; with the feature `cuda`, `Peer` does so for threads whose devices reach each other's memory.
//! * [`Deadlines`] are how long ranks wait for each other: for warm-up and for serving.
//! * A group that failed is built anew as the next generation: [`Threads::rebuild`] and [`Procs::rebuild`] for ranks that are
//!   still there, a [`Lobby`] or [`Procs::join`] for those that take another's place.
//! * [`Environment`] is what torchrun, Slurm or OpenMPI say of a process that they start as a rank.
//! * [`Step`] is what the ranks agree on before a forward step; [`dispatch`] and [`combine`] bring tokens to their experts and
//!   results home, by any [`Strategy`] and [`Reduction`], of which [`Problem::choose`] knows the best.
//! * [`Placement`] says which rank holds which experts, replicas included: in order, for the load that was measured, or as given.
//! * [`Fingerprint`] finds the rank that was started with other settings.
//! * [`launch`] runs a function on every rank of a [`Threads`] group. [`Faulty`] is a rank that fails on purpose, for tests;
//!   [`Metered`] is one that keeps count of what it sends.
//!
//! Uneven and zero row counts are ordinary input everywhere.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_moe::ep::{Communicator, launch};
//! use std::time::Duration;
//!
//! // Rank 0 holds one row, rank 1 holds two.
//! let counts = [1, 2];
//! let sums = launch(2, Duration::from_secs(5), |mut ranks| -> candle_core::Result<f32> {
//!     let rank = ranks.rank();
//!     let rows = Tensor::full(rank as f32 + 1.0, (counts[rank], 4), &Device::Cpu)?;
//!     ranks.set_label("layer 0");
//!     let all = ranks.all_gather(&rows, &counts)?; // [3, 4], in rank order
//!     let mine = ranks.reduce_scatter(&all, &counts)?; // [counts[rank], 4]
//!     mine.sum_all()?.to_scalar()
//! })?;
//! for (rank, sum) in sums.into_iter().enumerate() {
//!     assert_eq!(sum.expect("no rank panics")?, [8.0, 32.0][rank]);
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```

mod board;
mod call;
mod choice;
mod communicator;
#[cfg(feature = "cuda")]
mod control;
#[cfg(feature = "cuda")]
mod device;
mod dispatch;
mod environment;
mod error;
mod exchange;
mod faulty;
mod fingerprint;
mod gather;
mod home;
mod launch;
mod lobby;
mod member;
mod metered;
#[cfg(feature = "nccl")]
mod nccl;
#[cfg(feature = "cuda")]
mod peer;
mod placement;
mod procs;
#[cfg(feature = "cuda")]
mod pushed;
mod rendezvous;
mod replicated;
mod rows;
mod slots;
mod solo;
mod step;
mod strategy;
mod threads;
mod topology;
mod wire;

pub use choice::{Choice, Problem, Traffic};
pub use communicator::{AbortHandle, Communicator, Deadlines, Health};
pub use dispatch::{Dispatched, Sharing, combine, combine_sums, dispatch, dispatch_beside};
pub use environment::{Environment, Launcher, Overrides};
pub(crate) use error::reason;
pub use error::{Collective, EpError, EpErrorKind};
pub use faulty::{Faulty, Injection, Schedule};
pub use fingerprint::Fingerprint;
pub use launch::launch;
pub use lobby::Lobby;
pub use metered::{Metered, Transfer};
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
#[cfg(feature = "cuda")]
pub use peer::Peer;
pub use placement::{Placement, Rebalancing};
pub use procs::{MAX_PROCS, Procs, ProcsConfig};
#[cfg(feature = "cuda")]
pub(crate) use pushed::work as work_among_peers;
pub use solo::Solo;
pub use step::Step;
pub use strategy::{Reduction, Strategy};
pub use threads::{MAX_RANKS, Threads};
pub use topology::Topology;
