//! One test binary, a module per room.
mod ep;
mod oracle;
mod order;
mod perfect_router;
mod routing;
