//! GPT-OSS on one rank or several.
//!
//! Checkpoints come in three layouts, told apart by the names of their tensors:
//!
//! | layout | where | experts |
//! | --- | --- | --- |
//! | published | root of the published repositories | MXFP4 |
//! | original | the folder `original/` of these repositories, with a `config.json` of its own | MXFP4 |
//! | bf16 | copies by third parties | bf16, f16 or f32, `[num_experts, in_features, out_features]` |
//!
//! * [`Config`] is `config.json`.
//! * [`Decoder`] is everything around the experts, with its [`Cache`].
//! * [`ShardedMoe`] runs the MoE layers of all ranks, each rank a thread with its own experts, or a process or a device
//!   that [`serve`]s.
//! * [`Model`] puts them together; [`Sampler`] chooses tokens.

mod attention;
mod cache;
mod config;
mod decoder;
mod layout;
mod model;
mod moe;
mod rope;
mod sampling;
mod weights;

pub use crate::models::MoeOptions;
pub use cache::Cache;
pub use config::{Config, RopeConfig};
pub use decoder::{Decoder, Logits};
pub use model::Model;
pub use moe::{MoeLayers, ShardedMoe, load_moe_block, serve};
pub use sampling::{Sampler, SamplingConfig};
