//! One test binary, a module per room.
mod ep;
mod examples_bench;
mod program;
