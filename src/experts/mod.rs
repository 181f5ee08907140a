//! The experts room.
