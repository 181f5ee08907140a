//! The ep room.
