//! GPT-OSS: checkpoints in the published MXFP4 layout, on one rank or several.
//!
//! * [`Config`] is `config.json`.
//! * [`Decoder`] is everything around the experts, with its [`Cache`].
//! * [`ShardedMoe`] runs the MoE layers of all ranks, each rank a thread with its own experts.
//! * [`Model`] puts them together; [`Sampler`] chooses tokens.

mod attention;
mod cache;
mod config;
mod decoder;
mod model;
mod moe;
mod rope;
mod sampling;
mod weights;

pub use cache::Cache;
pub use config::{Config, RopeConfig};
pub use decoder::{Decoder, Logits};
pub use model::Model;
pub use moe::{MoeLayers, MoeOptions, ShardedMoe, load_moe_block};
pub use sampling::{Sampler, SamplingConfig};
