//! One test binary, a module per room.
mod ep;
mod gpt_oss;
