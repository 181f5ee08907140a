//! DeepSeek-V3: the MoE layers of its checkpoints (and of R1 and Kimi-K2, which share the layout), one block per layer and
//! rank.
//!
//! * [`Config`] is `config.json`.
//! * [`load_moe_block`] reads one layer for one rank: gate with selection bias, routed and shared experts, in float dtypes or
//!   in the published FP8 form, which stays in 8 bits.
//!
//! Attention and the dense first layers are not here.

mod config;
mod moe;

pub use config::Config;
pub use moe::load_moe_block;
