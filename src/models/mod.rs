//! Models.

pub mod gpt_oss;
