//! How many slots each token of a round gives each rank.
//!
//! A walk says which groups each token may use. Looked for is a deal of whole slots on it that keeps every rank, after every
//! token, between two limits, and brings all ranks back to the same number at the end of the round. That is a flow: from
//! each token to the ranks in its reach, and from each rank and token on to the same rank one token later, where what
//! flows is what the rank has received so far.
//!
//! 1. First all ranks have the same limits: as close together as the first token allows at best, then one further apart,
//!    and so on. Where the limits stand is tried on both ends of what fractions of slots would give the ranks, and all
//!    around the mean. Walks are tried in which every token goes on to groups that the last one did not use; in which
//!    it fills the ranks of a group to one height before it goes on; in which it takes the groups whose ranks have received
//!    least; and in which it takes, of the sets of groups that allow the first token's difference, the one that leaves the
//!    ranks most level, even if some groups are then never used.
//! 2. Ranks that cannot be kept together so get limits of their own: if a token could give fractions of a slot, and gave
//!    every expert of its groups the same, what the rank would have received, rounded down and up. Such a deal always
//!    exists: the limits of a rank over time are nested, and so are those of a token, and two nested families of limits
//!    around a fractional solution have a whole one between them (their matrix is totally unimodular). At the end of the
//!    round nothing is left to round, so that every rank has received in proportion to its experts.
//! 3. Where even that is too large to work out, each token gives its slots to the ranks that have received least.

use super::flow::Network;
use crate::partition::Partition;
use crate::perfect_router::greatest_common_divisor;
use crate::routing::ExpertGroups;
use std::cell::OnceCell;

/// How much further apart than the first token's the limits of all ranks may be.
const SLACK: usize = 4;
/// How often the fewest tokens that can end even go into a round.
const MAX_REPEATS: usize = 6;
/// Sets of groups that the first token is tried with; beyond them its difference is not known.
const MAX_SETS: usize = 4096;
/// Sets of groups that are compared for every token.
const MAX_BEST_SETS: usize = 64;
/// Tokens times ranks of a round in step 1, and in step 2.
const MAX_SEARCHED: usize = 1 << 12;
const MAX_SOLVED: usize = 1 << 16;

/// The tokens of a round.
pub(super) struct Deal {
    pub(super) tokens: Vec<Token>,
    /// Whether all ranks have received the same at the end.
    pub(super) is_even: bool,
    /// The largest difference between two ranks after any token.
    pub(super) max_minus_min: usize,
    /// Whether the first token alone makes it necessary.
    pub(super) is_smallest: bool,
}

/// One token: the groups it chooses from, and how many slots it gives each rank.
pub(super) struct Token {
    pub(super) groups: Vec<usize>,
    pub(super) slots_per_rank: Vec<usize>,
}

/// What each rank may have received after each token, `[token][rank]`.
struct Limits {
    least: Vec<Vec<usize>>,
    most: Vec<Vec<usize>>,
}

/// The groups that each token may use.
struct Walk<'a> {
    geometry: Geometry<'a>,
    tokens: Vec<Vec<usize>>,
}

/// A round for `table[group][rank]` experts.
pub(super) fn deal(table: &[Vec<usize>], experts: Partition, groups: ExpertGroups, top_k: usize) -> Deal {
    let (num_groups, num_ranks) = (groups.num_groups, experts.parts);
    // Cut into num_groups * num_ranks equal parts, each group has num_ranks of them and each rank num_groups.
    let overlap = |group: usize, rank: usize| {
        let start = (group * num_ranks).max(rank * num_groups);
        ((group + 1) * num_ranks).min((rank + 1) * num_groups).saturating_sub(start)
    };
    let overlaps: Vec<Vec<_>> =
        (0..num_groups).map(|group| (0..num_ranks).map(|rank| overlap(group, rank)).collect()).collect();
    let geometry = Geometry { table, top_k, topk_group: groups.topk_group };
    let order = group_order(&overlaps);
    let (unavoidable, best_sets) = geometry.best_sets();
    // Made when they are tried: nested ranks and groups need the first alone.
    let walks: Vec<OnceCell<Option<(Walk<'_>, Shares)>>> = geometry.kinds().iter().map(|_| OnceCell::new()).collect();
    let walk_and_shares = |kind: &Kind| {
        let walk = geometry.walk_of(kind, &order, &best_sets)?;
        let shares = walk.shares(&overlaps, num_ranks);
        Some((walk, shares))
    };
    let first = unavoidable.unwrap_or_else(|| geometry.level_spread(&order[..groups.topk_group]));
    let alike = (first..=first + SLACK).find_map(|apart| {
        walks.iter().zip(geometry.kinds()).find_map(|(walk, kind)| {
            let (walk, shares) = walk.get_or_init(|| walk_and_shares(&kind)).as_ref()?;
            let mut limits = walk.limits(shares, apart);
            limits.find_map(|limits| walk.solve(&limits)).map(|slots| walk.finish(slots, unavoidable))
        })
    });
    let in_proportion = || {
        let whole = experts.total / greatest_common_divisor(experts.total, top_k);
        let walk = geometry.around(&order, groups.topk_group, 1, whole, MAX_SOLVED)?;
        let slots = walk.solve(&Limits::around(&walk.shares(table, experts.total / num_groups)))?;
        Some(walk.finish(slots, unavoidable))
    };
    alike.or_else(in_proportion).unwrap_or_else(|| {
        let walk = geometry.least_loaded((MAX_SEARCHED / num_ranks).max(1));
        let slots = walk.levelled();
        walk.finish(slots, unavoidable)
    })
}

/// A way to walk through the groups.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// In order, `step / per` groups further with every token.
    Around {
        step: usize,
        per: usize,
    },
    LeastLoaded {
        tokens: usize,
    },
    MostLevel {
        tokens: usize,
    },
}

/// Who owns what, and what a token wants.
#[derive(Clone, Copy)]
struct Geometry<'a> {
    /// Experts that each group has on each rank.
    table: &'a [Vec<usize>],
    top_k: usize,
    topk_group: usize,
}

impl<'a> Geometry<'a> {
    fn num_ranks(&self) -> usize {
        self.table[0].len()
    }

    /// Tokens after which all ranks can have the same number of slots.
    fn fewest_tokens(&self) -> usize {
        self.num_ranks() / greatest_common_divisor(self.num_ranks(), self.top_k)
    }

    fn walk(self, tokens: Vec<Vec<usize>>) -> Walk<'a> {
        Walk { geometry: self, tokens }
    }

    /// The walks to try, none of them long.
    fn kinds(&self) -> Vec<Kind> {
        let (num_ranks, fewest) = (self.num_ranks(), self.fewest_tokens());
        let ranks_per_group = (num_ranks / self.table.len()).max(1);
        let height = self.top_k.div_ceil(self.topk_group * ranks_per_group) * ranks_per_group;
        let mut lengths: Vec<usize> = (1..=MAX_REPEATS).map(|times| times * fewest).collect();
        lengths.extend([num_ranks, 2 * num_ranks]);
        lengths.retain(|tokens| tokens * num_ranks <= MAX_SEARCHED);
        let around = [Kind::Around { step: self.topk_group, per: 1 }, Kind::Around { step: self.top_k, per: height }];
        let least_loaded = lengths.iter().map(|&tokens| Kind::LeastLoaded { tokens });
        let most_level = lengths.iter().map(|&tokens| Kind::MostLevel { tokens });
        around.into_iter().chain(least_loaded).chain(most_level).collect()
    }

    /// `None` for a walk that would be too long, or has no sets to choose from.
    fn walk_of(&self, kind: &Kind, order: &[usize], best_sets: &[Vec<usize>]) -> Option<Walk<'a>> {
        match *kind {
            Kind::Around { step, per } => self.around(order, step, per, self.fewest_tokens(), MAX_SEARCHED),
            Kind::LeastLoaded { tokens } => Some(self.least_loaded(tokens)),
            Kind::MostLevel { .. } if best_sets.is_empty() => None,
            Kind::MostLevel { tokens } => Some(self.most_level(best_sets, tokens)),
        }
    }

    /// Token `t` stands at group `t * step / per` of the order; goes round whole, in a multiple of `multiple` tokens. `None`
    /// if that is too long.
    fn around(&self, order: &[usize], step: usize, per: usize, multiple: usize, most: usize) -> Option<Walk<'a>> {
        let num_groups = order.len();
        let once = num_groups * per / greatest_common_divisor(num_groups * per, step);
        let num_tokens = (once / greatest_common_divisor(once, multiple)).checked_mul(multiple)?;
        if num_tokens.checked_mul(self.num_ranks())? > most {
            return None;
        }
        let groups_of =
            |token: usize| (0..self.topk_group).map(|i| order[(token * step / per + i) % num_groups]).collect();
        Some(self.walk((0..num_tokens).map(groups_of).collect()))
    }

    /// Each token's groups: one after the other the group whose experts' ranks have received least on average, of those
    /// the one that was used least.
    fn least_loaded(&self, num_tokens: usize) -> Walk<'a> {
        let &Self { table, top_k, topk_group } = self;
        let mut received = vec![0; self.num_ranks()];
        let mut used = vec![0; table.len()];
        let next = |received: &[usize], used: &[usize], groups: &[usize]| {
            // All groups have equally many experts, so sums compare as averages do.
            let load =
                |group: &usize| table[*group].iter().zip(received).map(|(experts, load)| experts * load).sum::<usize>();
            let left = (0..table.len()).filter(|group| !groups.contains(group));
            left.min_by_key(|group| (load(group), used[*group], *group))
        };
        let groups_of = |_| {
            let mut groups: Vec<usize> = Vec::with_capacity(topk_group);
            let mut expected = received.clone();
            while let (true, Some(group)) = (groups.len() < topk_group, next(&expected, &used, &groups)) {
                let part = (groups.len() + 1) * top_k / topk_group - groups.len() * top_k / topk_group;
                groups.push(group);
                used[group] += 1;
                level(&mut expected, |rank| table[group][rank], part);
            }
            self.give(&mut received, &groups);
            groups
        };
        self.walk((0..num_tokens).map(groups_of).collect())
    }

    /// Each token's groups: of `sets` the one that leaves the ranks most level, of those the one that was used least.
    fn most_level(&self, sets: &[Vec<usize>], num_tokens: usize) -> Walk<'a> {
        let mut received = vec![0; self.num_ranks()];
        let mut used = vec![0; sets.len()];
        let groups_of = |_| {
            let after = |set: &usize| {
                let mut received = received.clone();
                self.give(&mut received, &sets[*set]);
                (spread(&received), received.iter().map(|load| load * load).sum::<usize>(), used[*set])
            };
            let set = (0..sets.len()).min_by_key(after).unwrap_or(0);
            used[set] += 1;
            self.give(&mut received, &sets[set]);
            sets[set].clone()
        };
        self.walk((0..num_tokens).map(groups_of).collect())
    }

    /// Gives a token's slots to the ranks in reach of `groups` that have received least.
    fn give(&self, received: &mut [usize], groups: &[usize]) {
        level(received, |rank| groups.iter().map(|&group| self.table[group][rank]).sum(), self.top_k);
    }

    /// The smallest difference between two ranks that one token can leave, and some sets of groups that leave it. `None` and
    /// no sets where there are too many to look at.
    fn best_sets(&self) -> (Option<usize>, Vec<Vec<usize>>) {
        let num_groups = self.table.len();
        let count = (0..self.topk_group).try_fold(1usize, |n, i| Some(n.checked_mul(num_groups - i)? / (i + 1)));
        if count.is_none_or(|count| count > MAX_SETS || count * self.top_k * self.num_ranks() > 1 << 24) {
            return (None, Vec::new());
        }
        let (mut smallest, mut best) = (usize::MAX, Vec::new());
        for_each_set(0, num_groups, self.topk_group, &mut Vec::new(), &mut |set| {
            let spread = self.level_spread(set);
            if spread < smallest {
                smallest = spread;
                best.clear();
            }
            if spread == smallest && best.len() < MAX_BEST_SETS {
                best.push(set.to_vec());
            }
        });
        (Some(smallest), best)
    }

    /// The difference that one token leaves that gives each slot to the rank that has least.
    fn level_spread(&self, groups: &[usize]) -> usize {
        let mut received = vec![0; self.num_ranks()];
        self.give(&mut received, groups);
        spread(&received)
    }
}

/// Gives each of `slots` to the rank with room that has received least.
fn level(received: &mut [usize], room: impl Fn(usize) -> usize, slots: usize) {
    let mut room: Vec<usize> = (0..received.len()).map(room).collect();
    for _ in 0..slots {
        let open = (0..received.len()).filter(|&rank| room[rank] > 0);
        if let Some(least) = open.min_by_key(|&rank| received[rank]) {
            received[least] += 1;
            room[least] -= 1;
        }
    }
}

/// The groups, each next to be the one that leaves the ranks closest together.
fn group_order(overlaps: &[Vec<usize>]) -> Vec<usize> {
    let mut received = vec![0; overlaps[0].len()];
    let mut order: Vec<usize> = Vec::with_capacity(overlaps.len());
    while order.len() < overlaps.len() {
        let squares = |group: &usize| -> usize {
            received.iter().zip(&overlaps[*group]).map(|(a, b): (&usize, &usize)| (a + b) * (a + b)).sum()
        };
        let left = (0..overlaps.len()).filter(|group| !order.contains(group));
        let Some(next) = left.min_by_key(squares) else { break };
        received.iter_mut().zip(&overlaps[next]).for_each(|(received, more)| *received += more);
        order.push(next);
    }
    order
}

fn spread(received: &[usize]) -> usize {
    received.iter().max().unwrap_or(&0) - received.iter().min().unwrap_or(&0)
}

fn for_each_set(first: usize, num_groups: usize, size: usize, chosen: &mut Vec<usize>, f: &mut impl FnMut(&[usize])) {
    if chosen.len() == size {
        return f(chosen);
    }
    for group in first..num_groups {
        chosen.push(group);
        for_each_set(group + 1, num_groups, size, chosen, f);
        chosen.pop();
    }
}

/// What each rank would have received after each token if there were fractions of slots.
struct Shares {
    /// `[token][rank]`
    numerators: Vec<Vec<u128>>,
    denominator: u128,
}

impl Walk<'_> {
    fn num_ranks(&self) -> usize {
        self.geometry.num_ranks()
    }

    /// Each token's slots to the ranks that have received least.
    fn levelled(&self) -> Vec<Vec<usize>> {
        let mut received = vec![0; self.num_ranks()];
        let slots_of = |groups: &Vec<usize>| {
            let before = received.clone();
            self.geometry.give(&mut received, groups);
            received.iter().zip(before).map(|(after, before)| after - before).collect()
        };
        self.tokens.iter().map(slots_of).collect()
    }

    /// Limits that are the same for all ranks: `most - least = apart`, at several places.
    fn limits<'s>(&'s self, shares: &'s Shares, apart: usize) -> impl Iterator<Item = Limits> + 's {
        let lowest = |row: &Vec<u128>| row.iter().min().map_or(0, |least| least / shares.denominator) as usize;
        let highest = |row: &Vec<u128>| row.iter().max().map_or(0, |most| most.div_ceil(shares.denominator)) as usize;
        let mean = move |tokens: usize| tokens * self.geometry.top_k / self.num_ranks();
        let from = move |least: Vec<usize>| {
            let end = mean(self.tokens.len());
            Limits::alike(&least, apart, &vec![end; self.num_ranks()])
        };
        let above_lowest = from(shares.numerators.iter().map(lowest).collect());
        let below_highest = from(shares.numerators.iter().map(|row| highest(row).saturating_sub(apart)).collect());
        let around_mean = (0..=apart)
            .map(move |below| from((1..=self.tokens.len()).map(|tokens| mean(tokens).saturating_sub(below)).collect()));
        [above_lowest, below_highest].into_iter().chain(around_mean)
    }

    /// What each rank would have received after each token, where a group gives a rank `parts[group][rank] / whole` of what
    /// it gets.
    fn shares(&self, parts: &[Vec<usize>], whole: usize) -> Shares {
        let mut received = vec![0u128; self.num_ranks()];
        let numerators = self.tokens.iter().map(|groups| {
            for &group in groups {
                received
                    .iter_mut()
                    .zip(&parts[group])
                    .for_each(|(sum, part)| *sum += (*part * self.geometry.top_k) as u128);
            }
            received.clone()
        });
        Shares { numerators: numerators.collect(), denominator: (self.geometry.topk_group * whole) as u128 }
    }

    /// Whole slots within the limits, `[token][rank]`.
    fn solve(&self, limits: &Limits) -> Option<Vec<Vec<usize>>> {
        let (num_tokens, num_ranks) = (self.tokens.len(), self.num_ranks());
        let (source, sink) = (0, 1);
        let token_node = |token: usize| 2 + token;
        let rank_node = |token: usize, rank: usize| 2 + num_tokens + token * num_ranks + rank;
        let mut network = Network::new(2 + num_tokens + num_tokens * num_ranks);
        let mut deals = Vec::with_capacity(num_tokens);
        let mut needed = 0;
        for (token, groups) in self.tokens.iter().enumerate() {
            network.edge(source, token_node(token), self.geometry.top_k);
            let mut deal = Vec::with_capacity(num_ranks);
            for rank in 0..num_ranks {
                let room: usize = groups.iter().map(|&group| self.geometry.table[group][rank]).sum();
                deal.push(network.edge(token_node(token), rank_node(token, rank), room));
                // What a rank must have by now goes to the sink; what it has beyond goes on to the next token.
                let before = if token == 0 { 0 } else { limits.least[token - 1][rank] };
                let more = limits.least[token][rank].checked_sub(before)?;
                needed += more;
                network.edge(rank_node(token, rank), sink, more);
                let beyond = limits.most[token][rank].checked_sub(limits.least[token][rank])?;
                if token + 1 < num_tokens {
                    network.edge(rank_node(token, rank), rank_node(token + 1, rank), beyond);
                }
            }
            deals.push(deal);
        }
        if network.fill(source, sink) != needed {
            return None;
        }
        for rank in 0..num_ranks {
            let beyond = limits.most[num_tokens - 1][rank] - limits.least[num_tokens - 1][rank];
            network.edge(rank_node(num_tokens - 1, rank), sink, beyond);
        }
        if needed + network.fill(source, sink) != num_tokens * self.geometry.top_k {
            return None;
        }
        let flows = |deal: Vec<usize>| deal.into_iter().map(|edge| network.flow(edge)).collect();
        Some(deals.into_iter().map(flows).collect())
    }

    fn finish(&self, slots: Vec<Vec<usize>>, unavoidable: Option<usize>) -> Deal {
        let mut received = vec![0; self.num_ranks()];
        let (mut max_minus_min, mut last) = (0, 0);
        for slots in &slots {
            received.iter_mut().zip(slots).for_each(|(sum, slots): (&mut usize, _)| *sum += slots);
            last = spread(&received);
            max_minus_min = last.max(max_minus_min);
        }
        let tokens = self.tokens.iter().cloned().zip(slots);
        Deal {
            tokens: tokens.map(|(groups, slots_per_rank)| Token { groups, slots_per_rank }).collect(),
            is_even: last == 0,
            max_minus_min,
            is_smallest: unavoidable == Some(max_minus_min),
        }
    }
}

impl Limits {
    /// The same for all ranks, which are to have received `end` at the end.
    fn alike(least: &[usize], apart: usize, end: &[usize]) -> Self {
        let rows = |from: usize| -> Vec<Vec<usize>> {
            let mut rows: Vec<_> = least.iter().map(|least| vec![least + from; end.len()]).collect();
            rows.last_mut().into_iter().for_each(|last| last.copy_from_slice(end));
            rows
        };
        Self { least: rows(0), most: rows(apart) }
    }

    /// Every share rounded down and up.
    fn around(shares: &Shares) -> Self {
        let rounded = |round: fn(u128, u128) -> u128| {
            let row = |row: &Vec<u128>| row.iter().map(|share| round(*share, shares.denominator) as usize).collect();
            shares.numerators.iter().map(row).collect()
        };
        Self { least: rounded(|a, b| a / b), most: rounded(u128::div_ceil) }
    }
}
