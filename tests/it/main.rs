//! One test binary, a module per room.
mod block;
mod ep;
mod experts;
mod no_panic;
mod oracle;
mod order;
mod perfect_router;
mod routing;
