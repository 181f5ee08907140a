//! One test binary, a module per room.

#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges are compared")]

mod block;
mod checkpoint;
mod collectives;
#[cfg(feature = "cuda")]
mod cuda;
mod deepseek_v3;
mod devices;
mod environment;
mod ep;
mod examples_bench;
mod examples_comm;
mod examples_gpt_oss;
mod examples_perfect_router;
mod experts;
mod faults;
mod faulty_layers;
mod gpt_oss;
mod gpt_oss_parts;
mod metered;
mod no_panic;
mod oracle;
mod order;
mod perfect_router;
mod placement;
mod procs;
mod program;
mod routing;
mod strategies;
