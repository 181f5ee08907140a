//! The rank-rotated schedule.

use candle_core::{Result, bail};

const OP: &str = "perfect-router";

/// Which expert each slot of one sender goes to.
///
/// For sender `ep_rank` and slot `i = token * top_k + k`, with `experts_per_rank = num_experts / ep_size`:
///
/// ```text
/// g        = i + ep_rank
/// receiver = g mod ep_size
/// local    = (g / ep_size) mod experts_per_rank
/// expert   = receiver * experts_per_rank + local
/// ```
///
/// At step `i` the senders hit `ep_size` different receivers (a Latin square). Any consecutive slots of one sender load
/// the receivers within one of each other, and the experts too. The schedule repeats after `num_experts` slots.
///
/// ```
/// use candle_moe::perfect_router::Schedule;
/// let schedule = Schedule::new(8, 2, 4, 1)?;
/// let tokens: Vec<_> = (0..4).map(|token| schedule.experts(token).collect::<Vec<_>>()).collect();
/// assert_eq!(tokens, [[2, 4], [6, 1], [3, 5], [7, 0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Schedule {
    num_experts: usize,
    top_k: usize,
    ep_size: usize,
    ep_rank: usize,
}

impl Schedule {
    /// The schedule of sender `ep_rank` among `ep_size`.
    ///
    /// # Errors
    /// `ep_size == 0`, `num_experts` not a positive multiple of `ep_size` or above `u32::MAX`, `ep_rank >= ep_size`, `top_k` outside
    /// `1..=num_experts`.
    pub fn new(num_experts: usize, top_k: usize, ep_size: usize, ep_rank: usize) -> Result<Self> {
        if ep_size == 0 {
            bail!("{OP}: ep_size is 0, expected at least 1")
        }
        if num_experts > u32::MAX as usize {
            bail!("{OP}: num_experts is {num_experts}, expected at most {}", u32::MAX)
        }
        if num_experts == 0 || !num_experts.is_multiple_of(ep_size) {
            bail!("{OP}: num_experts is {num_experts}, expected a positive multiple of ep_size, which is {ep_size}")
        }
        if ep_rank >= ep_size {
            bail!("{OP}: ep_rank is {ep_rank}, expected less than ep_size, which is {ep_size}")
        }
        if top_k == 0 || top_k > num_experts {
            bail!("{OP}: top_k is {top_k}, expected 1 to num_experts, which is {num_experts}")
        }
        Ok(Self { num_experts, top_k, ep_size, ep_rank })
    }

    /// Experts in all.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Slots per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Ranks.
    pub fn ep_size(&self) -> usize {
        self.ep_size
    }

    /// The sender.
    pub fn ep_rank(&self) -> usize {
        self.ep_rank
    }

    /// The rank that receives slot `slot`.
    pub fn receiver(&self, slot: usize) -> usize {
        (slot % self.num_experts + self.ep_rank) % self.ep_size
    }

    /// The expert of slot `slot`.
    pub fn expert(&self, slot: usize) -> usize {
        let g = slot % self.num_experts + self.ep_rank;
        let experts_per_rank = self.num_experts / self.ep_size;
        g % self.ep_size * experts_per_rank + g / self.ep_size % experts_per_rank
    }

    /// The `top_k` distinct experts of a token, in slot order.
    pub fn experts(&self, token: usize) -> impl Iterator<Item = usize> + '_ {
        // Reduced first, so that no token number overflows.
        let first = token % self.num_experts * self.top_k;
        (first..first + self.top_k).map(|slot| self.expert(slot))
    }

    /// The number of tokens after which the rows repeat.
    pub fn period(&self) -> usize {
        self.num_experts / greatest_common_divisor(self.num_experts, self.top_k)
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
