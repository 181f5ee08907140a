//! One test binary, a module per room.

mod checkpoint;
mod ep;
mod examples_bench;
mod gpt_oss;
mod gpt_oss_parts;
mod program;
mod routing;
