//! Which rank holds which experts, chosen by what the experts are asked for.

use crate::host::with_slice;
use crate::order::{ExpertMap, NO_EXPERT};
use crate::partition::Partition;
use candle_core::{Device, Result, Tensor, bail};
use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;

const OP: &str = "placement";

/// Physical experts on ranks: which expert each of them holds, an expert more than once where it has replicas.
///
/// Rank `r` has the physical experts `local(r)`, contiguous ranges in rank order. They differ by one at most, as
/// [`Topology`](super::Topology) has them, unless they are given one by one. The replicas of an expert share its slots evenly,
/// as [`ExpertMap`] deals them.
///
/// ```
/// use candle_moe::ep::Placement;
/// // Expert 0 is asked for as often as all others together.
/// let slots_per_expert = [300, 100, 100, 100];
/// let before = Placement::contiguous(4, 2)?;
/// assert_eq!(before.rank_loads(&slots_per_expert)?, [400.0, 200.0]);
/// // One expert may be held twice on each rank.
/// let after = Placement::balanced(&slots_per_expert, 2, 6)?;
/// assert_eq!(after.rank_loads(&slots_per_expert)?, [300.0, 300.0]);
/// assert_eq!(after.map()?.replicas(0)?.len(), 2);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    num_experts: usize,
    /// `[ep_size + 1]`: where the physical experts of each rank begin.
    rank_offsets: Vec<usize>,
    physical_to_expert: Vec<usize>,
}

impl Placement {
    /// Every expert once, in order: the placement of a model that nobody has measured.
    ///
    /// # Errors
    /// `ep_size` is 0 or above `num_experts`.
    pub fn contiguous(num_experts: usize, ep_size: usize) -> Result<Self> {
        Self::new(num_experts, ep_size, (0..num_experts).collect())
    }

    /// The placement of `num_physical` physical experts that evens out the ranks when experts go on being asked for as
    /// `slots_per_expert` says, the counts of [`Load`](crate::block::Load).
    ///
    /// Replicas go one after the other to the expert whose replicas have most to do each; then the physical experts are dealt
    /// out, those with most to do first, each to the rank that has least to do and room; then pairs change places while that
    /// lowers the load of the busiest rank. Where that leaves it more than a hundredth above the mean, it is tried with fewer
    /// replicas for busy experts and the others for those that have least to do: a replica takes a place from another expert,
    /// which can cost more than it brings. No rank gets an expert twice if that can be helped, and without replicas the result is
    /// never worse than [`contiguous`](Self::contiguous). The same input gives the same placement.
    ///
    /// # Errors
    /// `ep_size` is 0 or above `num_physical`; fewer physical experts than experts, or more than one of each for every rank.
    pub fn balanced(slots_per_expert: &[u64], ep_size: usize, num_physical: usize) -> Result<Self> {
        let num_experts = slots_per_expert.len();
        if num_physical < num_experts || num_physical > num_experts.saturating_mul(ep_size) {
            bail!(
                "{OP}: num_physical is {num_physical}, expected {num_experts} to {}, all experts once and once for each rank",
                num_experts.saturating_mul(ep_size)
            )
        }
        check_ranks(num_physical, ep_size)?;
        let extra = num_physical - num_experts;
        let first = Self::packed(slots_per_expert, ep_size, num_physical, extra)?;
        let mut best = (first.imbalance(slots_per_expert)?, first);
        for num_busy in fewer(extra) {
            if best.0 <= NEARLY_EVEN {
                break;
            }
            let placement = Self::packed(slots_per_expert, ep_size, num_physical, num_busy)?;
            let imbalance = placement.imbalance(slots_per_expert)?;
            if imbalance < best.0 {
                best = (imbalance, placement);
            }
        }
        if extra == 0 {
            let contiguous = Self::contiguous(num_experts, ep_size)?;
            if contiguous.imbalance(slots_per_expert)? <= best.0 {
                return Ok(contiguous);
            }
        }
        Ok(best.1)
    }

    /// With `num_busy` replicas for the experts that have most to do, and the others for those that have least.
    fn packed(slots_per_expert: &[u64], ep_size: usize, num_physical: usize, num_busy: usize) -> Result<Self> {
        let replicas = replicated(slots_per_expert, ep_size, num_physical, num_busy);
        let mut deal = Deal::new(check_ranks(num_physical, ep_size)?, replicas);
        deal.exchange();
        Self::new(slots_per_expert.len(), ep_size, deal.physical_to_expert())
    }

    /// What to change for a measured load, and what the change buys: the [`balanced`](Self::balanced) placement of
    /// `num_physical` physical experts on the same ranks where that leaves the busiest rank with less to do; otherwise this
    /// one, if no rank of it holds more than it is to hold. So the balance is never worse afterwards, unless this placement is
    /// too large to stay.
    ///
    /// `slots_per_expert` are the counts of a block's [`Load`](crate::block::Load), which are those of all ranks.
    ///
    /// ```
    /// use candle_moe::ep::{Placement, Rebalancing};
    /// let now = Placement::contiguous(4, 2)?;
    /// let Rebalancing { placement, imbalance_before, imbalance_after } = now.rebalanced(&[300, 100, 100, 100], 6)?;
    /// assert_eq!((imbalance_before, imbalance_after), (400.0 / 300.0, 1.0));
    /// assert_eq!(placement.num_physical(), 6);
    /// // An even load is no reason to move anything.
    /// assert_eq!(now.rebalanced(&[100; 4], 5)?.placement, now);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`balanced`](Self::balanced); `slots_per_expert` is of another number of experts.
    pub fn rebalanced(&self, slots_per_expert: &[u64], num_physical: usize) -> Result<Rebalancing> {
        let imbalance_before = self.imbalance(slots_per_expert)?;
        let placement = Self::balanced(slots_per_expert, self.ep_size(), num_physical)?;
        let imbalance_after = placement.imbalance(slots_per_expert)?;
        let may_stay = (0..self.ep_size()).all(|rank| self.range(rank).len() <= placement.range(rank).len());
        Ok(if may_stay && imbalance_before <= imbalance_after {
            Rebalancing { placement: self.clone(), imbalance_before, imbalance_after: imbalance_before }
        } else {
            Rebalancing { placement, imbalance_before, imbalance_after }
        })
    }

    /// Rank `r` holds `experts_of_rank[r]`, in this order: any experts, as many as each rank is to hold.
    ///
    /// ```
    /// use candle_moe::ep::Placement;
    /// // Both ranks hold expert 2.
    /// let placement = Placement::explicit(4, &[vec![0, 1, 2], vec![3, 2]])?;
    /// assert_eq!(placement.map()?.replicas(2)?, [2, 4]);
    /// assert_eq!(placement.local(1)?, 3..5);
    /// assert_eq!(placement.to_string(), "0..3 | 3 2");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// No ranks, a rank without experts, an expert that is not below `num_experts`, an expert that no rank holds.
    pub fn explicit(num_experts: usize, experts_of_rank: &[impl AsRef<[usize]>]) -> Result<Self> {
        if experts_of_rank.is_empty() {
            bail!("{OP}: ep_size is 0, expected at least 1")
        }
        let mut placement = Self { num_experts, rank_offsets: vec![0], physical_to_expert: Vec::new() };
        let mut is_held = vec![false; num_experts];
        for (rank, experts) in experts_of_rank.iter().enumerate() {
            let experts = experts.as_ref();
            if experts.is_empty() {
                bail!("{OP}: rank {rank} holds no experts, expected at least one")
            }
            for &expert in experts {
                match is_held.get_mut(expert) {
                    Some(is_held) => *is_held = true,
                    None => bail!("{OP}: rank {rank} holds expert {expert}, expected less than {num_experts}"),
                }
            }
            placement.physical_to_expert.extend_from_slice(experts);
            placement.rank_offsets.push(placement.physical_to_expert.len());
        }
        if let Some(expert) = is_held.iter().position(|is_held| !is_held) {
            bail!("{OP}: no rank holds expert {expert}, expected every expert below {num_experts} somewhere")
        }
        Ok(placement)
    }

    fn new(num_experts: usize, ep_size: usize, physical_to_expert: Vec<usize>) -> Result<Self> {
        let ranks = check_ranks(physical_to_expert.len(), ep_size)?;
        let rank_offsets = std::iter::once(0).chain((0..ep_size).map(|rank| ranks.range(rank).end)).collect();
        Ok(Self { num_experts, rank_offsets, physical_to_expert })
    }

    /// Experts that routing knows.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Physical experts, replicas included.
    pub fn num_physical(&self) -> usize {
        self.physical_to_expert.len()
    }

    /// Ranks.
    pub fn ep_size(&self) -> usize {
        self.rank_offsets.len() - 1
    }

    /// `[num_physical]`: the expert that each physical expert holds.
    pub fn physical_to_expert(&self) -> &[usize] {
        &self.physical_to_expert
    }

    /// The physical experts of a rank; never empty.
    ///
    /// # Errors
    /// `rank` is not below [`ep_size`](Self::ep_size).
    pub fn local(&self, rank: usize) -> Result<Range<usize>> {
        if rank >= self.ep_size() {
            bail!("{OP}: rank is {rank}, expected less than ep_size = {}", self.ep_size())
        }
        Ok(self.range(rank))
    }

    /// The experts that a rank holds, in the order of its physical experts.
    ///
    /// # Errors
    /// As [`local`](Self::local).
    pub fn experts_of(&self, rank: usize) -> Result<&[usize]> {
        Ok(&self.physical_to_expert[self.local(rank)?])
    }

    /// The rank that has a physical expert.
    ///
    /// # Errors
    /// `physical` is not below [`num_physical`](Self::num_physical).
    pub fn owner(&self, physical: usize) -> Result<usize> {
        if physical >= self.num_physical() {
            bail!("{OP}: physical expert is {physical}, expected less than {}", self.num_physical())
        }
        Ok(self.rank_offsets.partition_point(|&first| first <= physical) - 1)
    }

    fn range(&self, rank: usize) -> Range<usize> {
        self.rank_offsets[rank]..self.rank_offsets[rank + 1]
    }

    /// Whether it is [`contiguous`](Self::contiguous), so that physical experts are experts.
    pub fn is_contiguous(&self) -> bool {
        Self::contiguous(self.num_experts, self.ep_size()).is_ok_and(|contiguous| contiguous == *self)
    }

    /// The physical experts that stand in for the experts of a [plan](crate::perfect_router::Plan), u32 of any shape: a plan
    /// deals slots to the ranks of [`contiguous`](Self::contiguous), and each rank passes its own on to its physical experts in
    /// turn. So ranks are as even as planned; which experts they hold does not matter to a plan.
    ///
    /// # Errors
    /// More ranks than experts; an id that is not below `num_experts` and not [`NO_EXPERT`]; ids that are not on the CPU.
    pub fn standing_in(&self, planned_ids: &Tensor) -> Result<Tensor> {
        let planned = check_ranks(self.num_experts, self.ep_size())?;
        let stand_in = |&id: &u32| match id {
            NO_EXPERT => Ok(NO_EXPERT),
            id if (id as usize) < self.num_experts => {
                let rank = planned.owner(id as usize);
                let held = self.range(rank);
                Ok((held.start + (id as usize - planned.range(rank).start) % held.len()) as u32)
            }
            id => bail!("{OP}: planned_ids has expert {id}, expected less than {}", self.num_experts),
        };
        let physical =
            with_slice(planned_ids, OP, "planned_ids", |ids| ids.iter().map(stand_in).collect::<Result<_>>())?;
        Tensor::from_vec(physical, planned_ids.shape(), &Device::Cpu)
    }

    /// What [`ExpertOrder::with_map`](crate::order::ExpertOrder::with_map) needs.
    ///
    /// # Errors
    /// More physical experts than 32 bits count.
    pub fn map(&self) -> Result<ExpertMap> {
        ExpertMap::new(self.num_experts, &self.physical_to_expert)
    }

    /// `[ep_size]`: the slots that each rank has to work on, if the replicas of an expert share its slots evenly.
    ///
    /// # Errors
    /// `slots_per_expert` is of another number of experts.
    pub fn rank_loads(&self, slots_per_expert: &[u64]) -> Result<Vec<f64>> {
        if slots_per_expert.len() != self.num_experts {
            bail!("{OP}: slots_per_expert has {} experts, expected {}", slots_per_expert.len(), self.num_experts)
        }
        let mut replicas = vec![0u64; self.num_experts];
        self.physical_to_expert.iter().for_each(|&expert| replicas[expert] += 1);
        let load = |&expert: &usize| slots_per_expert[expert] as f64 / replicas[expert] as f64;
        let of_rank = |rank| self.physical_to_expert[self.range(rank)].iter().map(load).sum();
        Ok((0..self.ep_size()).map(of_rank).collect())
    }

    /// The load of the busiest rank over the mean: 1 is even, and what is above it is time that the others wait. 1 where there
    /// is no load.
    ///
    /// # Errors
    /// As [`rank_loads`](Self::rank_loads).
    pub fn imbalance(&self, slots_per_expert: &[u64]) -> Result<f64> {
        let loads = self.rank_loads(slots_per_expert)?;
        let (sum, most) = loads.iter().fold((0.0, 0.0f64), |(sum, most), load| (sum + load, most.max(*load)));
        Ok(if sum > 0.0 { most * loads.len() as f64 / sum } else { 1.0 })
    }
}

/// A placement for a measured load, and the balance of that load before and after, as [`Placement::imbalance`] has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Rebalancing {
    /// Where experts are to be.
    pub placement: Placement,
    /// The load of the busiest rank over the mean where experts are now.
    pub imbalance_before: f64,
    /// The same where they are to be, if the load stays as it was.
    pub imbalance_after: f64,
}

/// The experts of each rank, runs of them as ranges: `0..4 | 4 6 7`.
impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for rank in 0..self.ep_size() {
            let experts = &self.physical_to_expert[self.range(rank)];
            let runs = experts.chunk_by(|a, b| a + 1 == *b).flat_map(|run| match run {
                // Two are as short as their range.
                [] => Vec::new(),
                [first, .., last] if run.len() > 2 => vec![format!("{first}..{}", last + 1)],
                few => few.iter().map(usize::to_string).collect(),
            });
            let separator = if rank == 0 { "" } else { " | " };
            write!(f, "{separator}{}", runs.collect::<Vec<_>>().join(" "))?;
        }
        Ok(())
    }
}

fn check_ranks(num_physical: usize, ep_size: usize) -> Result<Partition> {
    if ep_size == 0 || ep_size > num_physical {
        bail!("{OP}: ep_size is {ep_size}, expected 1 to {num_physical}, a physical expert for each rank")
    }
    Ok(Partition { total: num_physical, parts: ep_size })
}

/// A physical expert.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Replica {
    expert: usize,
    load: f64,
}

/// Busiest rank over mean from which on nothing else is tried.
const NEARLY_EVEN: f64 = 1.01;
/// Ways to divide replicas between busy and idle experts that are tried.
const MAX_TRIED: usize = 16;

/// How many of `extra` replicas are for busy experts where all is too many; 0 last.
fn fewer(extra: usize) -> impl Iterator<Item = usize> {
    let steps = extra.min(MAX_TRIED);
    (0..steps).rev().map(move |step| extra * step / steps)
}

/// Physical experts, those with most to do first: `num_busy` replicas for the experts that have most to do, the others for
/// those that have least.
fn replicated(slots_per_expert: &[u64], ep_size: usize, num_physical: usize, num_busy: usize) -> Vec<Replica> {
    let mut counts = vec![1usize; slots_per_expert.len()];
    let load = |expert: usize, count: usize| slots_per_expert[expert] as f64 / count as f64;
    for replica in 0..num_physical - slots_per_expert.len() {
        let extendable = (0..counts.len()).filter(|&expert| counts[expert] < ep_size);
        let by_load = |a: &usize, b: &usize| load(*a, counts[*a]).total_cmp(&load(*b, counts[*b]));
        // The first of those that have as much to do.
        let chosen = match replica < num_busy {
            true => extendable.max_by(|a, b| by_load(a, b).then(b.cmp(a))),
            false => extendable.min_by(by_load),
        };
        if let Some(expert) = chosen {
            counts[expert] += 1;
        }
    }
    let copies =
        |(expert, &count): (usize, &usize)| std::iter::repeat_n(Replica { expert, load: load(expert, count) }, count);
    let mut replicas: Vec<_> = counts.iter().enumerate().flat_map(copies).collect();
    replicas.sort_by(|a, b| b.load.total_cmp(&a.load));
    replicas
}

/// Replicas dealt out to ranks.
struct Deal {
    ranks: Vec<Vec<Replica>>,
}

impl Deal {
    fn new(partition: Partition, replicas: Vec<Replica>) -> Self {
        let mut deal = Self { ranks: vec![Vec::new(); partition.parts] };
        for replica in replicas {
            let has_room = |rank: &usize| deal.ranks[*rank].len() < partition.range(*rank).len();
            let holds = |rank: usize| deal.ranks[rank].iter().any(|held| held.expert == replica.expert);
            let idlest = |a: &usize, b: &usize| holds(*a).cmp(&holds(*b)).then(deal.load(*a).total_cmp(&deal.load(*b)));
            if let Some(rank) = (0..partition.parts).filter(has_room).min_by(idlest) {
                deal.ranks[rank].push(replica);
            }
        }
        deal
    }

    fn load(&self, rank: usize) -> f64 {
        self.ranks[rank].iter().map(|replica| replica.load).sum()
    }

    /// Exchanges pairs: to take experts off ranks that hold them twice, then to lower the load of the busiest rank.
    fn exchange(&mut self) {
        while self.part_twins() {}
        // Each exchange lowers the busiest rank's load or the number of ranks that have it, so it ends; the limit is for
        // roundings.
        let limit = 8 * self.ranks.iter().map(Vec::len).sum::<usize>();
        for _ in 0..limit {
            let busiest = (0..self.ranks.len()).max_by(|&a, &b| self.load(a).total_cmp(&self.load(b)).then(b.cmp(&a)));
            let Some((busiest, exchange)) = busiest.and_then(|rank| Some((rank, self.best_exchange(rank)?))) else {
                return;
            };
            self.swap(busiest, exchange);
        }
    }

    /// Gives away one of two replicas of an expert on the same rank.
    fn part_twins(&mut self) -> bool {
        for rank in 0..self.ranks.len() {
            let is_twin = |i: usize| (0..i).any(|j| self.ranks[rank][j].expert == self.ranks[rank][i].expert);
            let Some(mine) = (0..self.ranks[rank].len()).find(|&i| is_twin(i)) else { continue };
            for other in 0..self.ranks.len() {
                for theirs in 0..self.ranks[other].len() {
                    let exchange = Exchange { mine, other, theirs };
                    if other != rank && self.is_allowed(rank, exchange) {
                        self.swap(rank, exchange);
                        return true;
                    }
                }
            }
        }
        false
    }

    /// That which leaves the busier of both ranks with least to do, if that is less than `rank` has now.
    fn best_exchange(&self, rank: usize) -> Option<Exchange> {
        let now = self.load(rank);
        let mut best: Option<(f64, Exchange)> = None;
        for other in (0..self.ranks.len()).filter(|&other| other != rank) {
            let their_load = self.load(other);
            for (mine, given) in self.ranks[rank].iter().enumerate() {
                for (theirs, taken) in self.ranks[other].iter().enumerate() {
                    let moved = given.load - taken.load;
                    let after = (now - moved).max(their_load + moved);
                    let exchange = Exchange { mine, other, theirs };
                    let is_better = after < best.map_or(now * (1.0 - 1e-12), |(least, _)| least);
                    if is_better && self.is_allowed(rank, exchange) {
                        best = Some((after, exchange));
                    }
                }
            }
        }
        best.map(|(_, exchange)| exchange)
    }

    /// Whether no rank gets an expert that it has.
    fn is_allowed(&self, rank: usize, Exchange { mine, other, theirs }: Exchange) -> bool {
        let (given, taken) = (self.ranks[rank][mine].expert, self.ranks[other][theirs].expert);
        let has = |rank: usize, expert, except| {
            self.ranks[rank].iter().enumerate().any(|(i, held)| i != except && held.expert == expert)
        };
        given != taken && !has(rank, taken, mine) && !has(other, given, theirs)
    }

    fn swap(&mut self, rank: usize, Exchange { mine, other, theirs }: Exchange) {
        let given = self.ranks[rank][mine];
        self.ranks[rank][mine] = std::mem::replace(&mut self.ranks[other][theirs], given);
    }

    /// Rank after rank, on each rank by expert.
    fn physical_to_expert(mut self) -> Vec<usize> {
        let by_expert = |a: &Replica, b: &Replica| -> Ordering { a.expert.cmp(&b.expert) };
        self.ranks.iter_mut().for_each(|rank| rank.sort_by(by_expert));
        self.ranks.into_iter().flatten().map(|replica| replica.expert).collect()
    }
}

#[derive(Debug, Clone, Copy)]
struct Exchange {
    mine: usize,
    other: usize,
    theirs: usize,
}
