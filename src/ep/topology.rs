//! Which rank owns which experts.

use crate::partition::Partition;
use candle_core::{Result, bail};
use std::ops::Range;

/// The split of `num_experts` experts over `ep_size` ranks, seen from rank `ep_rank`.
///
/// Every rank owns one contiguous range; the ranges follow each other in rank order and their
/// lengths differ by at most one: the first `num_experts % ep_size` ranks own one expert more.
///
/// ```
/// use candle_moe::ep::Topology;
///
/// let topology = Topology::new(10, 4, 1)?;
/// assert_eq!(topology.local_experts(), 3..6);
/// assert_eq!(topology.experts_of(3)?, 8..10);
/// assert_eq!(topology.owner(7)?, 2);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    experts: Partition,
    ep_rank: usize,
}

impl Topology {
    /// Splits `num_experts` experts over `ep_size` ranks, as seen from `ep_rank`.
    ///
    /// # Errors
    ///
    /// `ep_size` is zero or above `num_experts` (a rank would own nothing), or `ep_rank` is not
    /// below `ep_size`.
    pub fn new(num_experts: usize, ep_size: usize, ep_rank: usize) -> Result<Self> {
        if ep_size == 0 {
            bail!("topology: ep_size is 0, it must be at least 1");
        }
        if ep_size > num_experts {
            bail!("topology: ep_size is {ep_size}, it must be at most num_experts = {num_experts}");
        }
        if ep_rank >= ep_size {
            bail!("topology: ep_rank is {ep_rank}, it must be below ep_size = {ep_size}");
        }
        Ok(Self { experts: Partition { total: num_experts, parts: ep_size }, ep_rank })
    }

    /// All experts of the layer, over all ranks.
    pub fn num_experts(&self) -> usize {
        self.experts.total
    }

    /// The number of ranks that share the experts.
    pub fn ep_size(&self) -> usize {
        self.experts.parts
    }

    /// This rank.
    pub fn ep_rank(&self) -> usize {
        self.ep_rank
    }

    /// The experts that this rank owns; never empty.
    pub fn local_experts(&self) -> Range<usize> {
        self.experts.range(self.ep_rank)
    }

    /// The experts that `rank` owns; never empty.
    ///
    /// # Errors
    ///
    /// `rank` is not below `ep_size`.
    pub fn experts_of(&self, rank: usize) -> Result<Range<usize>> {
        if rank >= self.ep_size() {
            bail!("experts_of: rank is {rank}, it must be below ep_size = {}", self.ep_size());
        }
        Ok(self.experts.range(rank))
    }

    /// The rank that owns `expert`.
    ///
    /// # Errors
    ///
    /// `expert` is not below `num_experts`.
    pub fn owner(&self, expert: usize) -> Result<usize> {
        if expert >= self.num_experts() {
            bail!("owner: expert is {expert}, it must be below num_experts = {}", self.num_experts());
        }
        Ok(self.experts.owner(expert))
    }
}
