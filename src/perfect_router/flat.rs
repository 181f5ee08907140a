//! The plan without groups, in closed form.

use super::greatest_common_divisor;
use crate::partition::Partition;

/// The experts of each slot, for one sender: round-robin over the ranks, and inside a rank over its experts.
///
/// With slot `i = token * top_k + k`, sender `ep_rank` and `experts_per_rank = num_experts / ep_size`:
///
/// ```text
/// g        = i + ep_rank
/// receiver = g mod ep_size
/// local    = (g / ep_size) mod (experts of the receiver)
/// ```
///
/// * At step `i` the senders hit `ep_size` different receivers (a Latin square).
/// * Any consecutive slots of a sender load the ranks within one of each other, and the experts of a rank too.
/// * The `top_k` slots of a token go to different experts as long as no receiver meets more of them than it has experts,
///   `top_k <= ep_size * (num_experts / ep_size)`.
/// * Beyond that, which takes ranks of different lengths, every token must give the longer ranks more. Then the slots go
///   round-robin over all experts instead, listed by (local, rank): experts stay within one of each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flat {
    experts: Partition,
    top_k: usize,
    ep_rank: usize,
}

impl Flat {
    pub(super) fn new(experts: Partition, top_k: usize, ep_rank: usize) -> Self {
        Self { experts, top_k, ep_rank }
    }

    /// Whether tokens have so many slots that ranks cannot be even.
    pub(super) fn is_saturated(&self) -> bool {
        self.top_k > self.experts.parts * self.experts.shorter()
    }

    /// Slots after which the plan repeats.
    pub(super) fn period_in_slots(&self) -> usize {
        let Partition { total, parts } = self.experts;
        match self.is_saturated() || self.experts.num_longer() == 0 {
            true => total,
            // Receivers repeat after `parts`, experts after the length of each rank.
            false => parts.saturating_mul(self.experts.shorter()).saturating_mul(self.experts.shorter() + 1),
        }
    }

    /// Tokens after which all ranks have received the same number of slots.
    pub(super) fn round(&self) -> usize {
        self.experts.parts / greatest_common_divisor(self.experts.parts, self.top_k)
    }

    /// Tokens after which the plan repeats.
    pub(super) fn period(&self) -> usize {
        let slots = self.period_in_slots();
        slots / greatest_common_divisor(slots, self.top_k)
    }

    /// The experts of token `token`, which is below the period.
    pub(super) fn write(&self, token: usize, row: &mut [u32]) {
        let Partition { total, parts } = self.experts;
        // In 128 bits: the period in slots is below num_experts squared, but not its product with top_k.
        let first = (token as u128 * self.top_k as u128 % self.period_in_slots() as u128) as usize;
        let first = first + self.ep_rank;
        if self.is_saturated() {
            for (i, expert) in row.iter_mut().enumerate() {
                let place = (first + i) % total;
                *expert = (self.experts.range(place % parts).start + place / parts) as u32;
            }
            return;
        }
        let (mut receiver, mut visit) = (first % parts, first / parts);
        for expert in row {
            let local = self.experts.range(receiver);
            *expert = (local.start + visit % local.len()) as u32;
            receiver += 1;
            if receiver == parts {
                (receiver, visit) = (0, visit + 1);
            }
        }
    }
}
