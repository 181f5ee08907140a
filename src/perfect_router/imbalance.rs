//! How bad is skew? A plan with a hot spot.

use crate::partition::Partition;
use crate::routing::ExpertGroups;
use candle_core::{Result, bail};
use std::hash::{Hash, Hasher};
use std::ops::Range;

/// A plan's hot spot: a part of the tokens, drawn by a seed, goes to one rank or one expert.
///
/// A hot token gives the hot rank as many of its slots as the rank has experts in the groups that the token uses (all
/// `top_k`, where those are enough), in turn over the rank's experts and, where the rank has part in more groups than a
/// token may use, over these; it gives a hot expert one slot, since its experts are distinct. Its other slots stay in the plan as far as the groups allow. So over many tokens, without groups, the
/// hot rank has about `fraction + (1 - fraction) / ep_size` of the slots.
#[derive(Debug, Clone, Copy)]
pub struct Imbalance {
    /// Where hot tokens go.
    pub hotspot: Hotspot,
    /// The part of the tokens that is hot, 0 to 1.
    pub fraction: f32,
    /// Draws the hot tokens; every sender draws its own.
    pub seed: u64,
}

/// What is hot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hotspot {
    /// The experts of this rank.
    Rank(usize),
    /// This expert.
    Expert(usize),
}

/// By the bits of the fraction, so that a value is a key.
impl PartialEq for Imbalance {
    fn eq(&self, other: &Self) -> bool {
        self.bits() == other.bits()
    }
}

impl Eq for Imbalance {}

impl Hash for Imbalance {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bits().hash(state);
    }
}

impl Imbalance {
    /// Tokens after which the draw of hot tokens repeats.
    pub(super) const PERIOD: usize = 4096;

    fn bits(&self) -> (Hotspot, u32, u64) {
        (self.hotspot, self.fraction.to_bits(), self.seed)
    }

    pub(super) fn check(&self, op: &str, experts: Partition) -> Result<()> {
        if !(0.0..=1.0).contains(&self.fraction) {
            bail!("{op}: the hotspot fraction is {}, expected 0 to 1", self.fraction)
        }
        let (name, value, limit) = match self.hotspot {
            Hotspot::Rank(rank) => ("rank", rank, experts.parts),
            Hotspot::Expert(expert) => ("expert", expert, experts.total),
        };
        if value >= limit {
            bail!("{op}: the hot {name} is {value}, expected less than {limit}")
        }
        Ok(())
    }

    /// Whether token `token` of sender `ep_rank` is hot.
    fn is_hot(&self, ep_rank: usize, token: usize) -> bool {
        let sender = mixed(mixed(self.seed).wrapping_add(ep_rank as u64));
        let draw = mixed(sender.wrapping_add((token % Self::PERIOD) as u64));
        ((draw >> 40) as f32) < self.fraction * (1 << 24) as f32
    }

    /// Redirects the planned `row` of a token, if it is hot.
    pub(super) fn redirect(
        &self,
        experts: Partition,
        groups: ExpertGroups,
        ep_rank: usize,
        token: usize,
        row: &mut [u32],
    ) {
        if !self.is_hot(ep_rank, token) {
            return;
        }
        let hot = match self.hotspot {
            Hotspot::Rank(rank) => experts.range(rank),
            Hotspot::Expert(expert) => expert..expert + 1,
        };
        let size = experts.total / groups.num_groups;
        let group_of = |expert: usize| expert / size;
        let mut kept: Vec<usize> = Vec::with_capacity(groups.topk_group);
        let hot_groups = rotated(group_of(hot.start)..group_of(hot.end - 1) + 1, token);
        let planned_groups = row.iter().map(|&expert| group_of(expert as usize));
        for group in hot_groups.chain(planned_groups).chain(rotated(0..groups.num_groups, token)) {
            if kept.len() < groups.topk_group && !kept.contains(&group) {
                kept.push(group);
            }
        }
        let may = |expert: &usize| kept.contains(&group_of(*expert));
        let planned: Vec<usize> = row.iter().map(|&expert| expert as usize).collect();
        let turn = token.wrapping_mul(row.len());
        let others = kept.iter().flat_map(|&group| rotated(group * size..(group + 1) * size, turn));
        // Planned experts of the hot spot come with the others of it, in their turn.
        let candidates = rotated(hot, turn).filter(may).chain(planned.into_iter().filter(may)).chain(others);
        let mut chosen: Vec<usize> = Vec::with_capacity(row.len());
        for expert in candidates {
            if chosen.len() == row.len() {
                break;
            }
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
        row.iter_mut().zip(chosen).for_each(|(slot, expert)| *slot = expert as u32);
    }
}

/// The range, beginning at its element `turn mod len`.
fn rotated(range: Range<usize>, turn: usize) -> impl Iterator<Item = usize> {
    let first = range.start + turn % range.len();
    (first..range.end).chain(range.start..first)
}

/// A random number from a number (the finaliser of SplitMix64).
fn mixed(number: u64) -> u64 {
    let z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
