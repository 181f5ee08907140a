#![doc = include_str!("../README.md")]

pub mod block;
pub mod checkpoint;
mod copied;
#[cfg(feature = "cuda")]
mod cuda;
pub mod ep;
pub mod experts;
mod host;
pub mod models;
pub mod order;
mod partition;
pub mod perfect_router;
pub mod routing;
