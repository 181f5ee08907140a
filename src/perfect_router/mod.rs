//! The perfect_router room.
