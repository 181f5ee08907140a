//! Models built from the rooms: the only place that knows tensor names and configurations.

pub mod deepseek_v3;
pub mod gpt_oss;
mod options;

pub use options::MoeOptions;
