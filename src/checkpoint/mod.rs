//! The checkpoint room.
