//! One test binary, a module per room.

mod checkpoint;
mod ep;
mod gpt_oss;
mod gpt_oss_parts;
mod routing;
