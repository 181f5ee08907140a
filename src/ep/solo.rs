//! The group of one rank.

use super::member::communicate_through_field;
use super::threads::Threads;

/// The only rank of its group: never waits, and copies nothing that is contiguous.
///
/// It makes the same checks with the same errors as [`Threads`], so what runs on one rank has its
/// arguments right for many.
#[derive(Debug)]
pub struct Solo(Threads);

impl Solo {
    /// A group of one.
    pub fn new() -> Self {
        Self(Threads::alone())
    }
}

impl Default for Solo {
    fn default() -> Self {
        Self::new()
    }
}

communicate_through_field!(Solo);
