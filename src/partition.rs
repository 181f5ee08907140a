//! A range cut into parts whose lengths differ by at most one, the longer parts first.

use std::ops::Range;

/// `0..total` in `parts` consecutive ranges. `1 <= parts <= total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Partition {
    pub(crate) total: usize,
    pub(crate) parts: usize,
}

impl Partition {
    /// The length of the shorter parts.
    pub(crate) fn shorter(&self) -> usize {
        self.total / self.parts
    }

    /// How many parts are one longer.
    pub(crate) fn num_longer(&self) -> usize {
        self.total % self.parts
    }

    /// The range of part `part`.
    pub(crate) fn range(&self, part: usize) -> Range<usize> {
        let start = part * self.shorter() + part.min(self.num_longer());
        start..start + self.len(part)
    }

    /// The length of part `part`.
    pub(crate) fn len(&self, part: usize) -> usize {
        self.shorter() + usize::from(part < self.num_longer())
    }

    /// The part that `place` lies in.
    pub(crate) fn owner(&self, place: usize) -> usize {
        let (shorter, num_longer) = (self.shorter(), self.num_longer());
        let boundary = num_longer * (shorter + 1);
        if place < boundary { place / (shorter + 1) } else { num_longer + (place - boundary) / shorter }
    }
}
