//! One test binary, a module per room.
mod block;
mod ep;
mod experts;
mod oracle;
mod order;
mod perfect_router;
mod routing;
