//! The plan with groups: each token chooses its experts from `topk_group` of `num_groups` groups.
//!
//! # What cannot be avoided
//!
//! A token reaches only the ranks that own experts of its groups. If that is never all of them, some rank gets nothing from
//! the first token and some rank at least `ceil(top_k / reach)` slots, where `reach` is the largest number of ranks that
//! `topk_group` groups touch: no plan whose rows do not depend on the number of tokens can stay below that difference.
//!
//! # What can be reached
//!
//! Where every rank owns equally many experts, there is always a number of tokens after which all ranks have received the
//! same. Proof: let the tokens choose sets of groups so that each group is chosen equally often, and let each token give
//! every expert of its groups the same fraction of a slot. By symmetry every expert receives the same in total, and so does
//! every rank. A fractional flow from tokens through (token, expert) edges of capacity 1 to ranks with whole demands has an
//! integral one beside it, which is a plan.
//!
//! # What is built
//!
//! A *round* of tokens that brings all ranks back to the same number; it repeats for ever, so the largest difference inside
//! it holds from the first token to any other. On the way the ranks stay as close together as whole slots allow (see
//! [`deal`]). Where that is no more than the first token's own difference, no plan does better, and
//! [`Balance::is_smallest`] says so; where the ranks own whole groups or the groups whole ranks, an exhaustive search over
//! all plans (up to 12 experts, in the tests) has never found a better one either.
//!
//! Ranks of different lengths are brought to the same number too where the search finds how; otherwise each rank receives in
//! proportion to its experts, exactly so after every round. Balance of the ranks goes before the use of all experts: where
//! only some sets of groups reach the ranks evenly, only those are used.
//!
//! A round is a small table; a row of the plan is looked up in it. Inside the cell that a rank and a group share, slots go
//! round-robin over the experts: they stay within one of each other.

mod deal;
mod flow;

use super::greatest_common_divisor;
use super::plan::Balance;
use crate::partition::Partition;
use crate::routing::ExpertGroups;
use deal::{Deal, Token, deal};

/// A plan with groups, for one sender.
#[derive(Debug, Clone)]
pub(super) struct Round {
    cells: Vec<Cell>,
    /// `[tokens of the round, top_k]`
    slots: Vec<Slot>,
    pub(super) num_tokens: usize,
    top_k: usize,
    balance: Option<Balance>,
}

/// The experts that a group has on a rank.
#[derive(Debug, Clone, Copy)]
struct Cell {
    first_expert: u32,
    num_experts: u32,
    /// Slots that the cell receives in a round.
    slots_per_round: u64,
}

/// A slot of the round: its cell, and how many slots the cell received before it in the round.
#[derive(Debug, Clone, Copy)]
struct Slot {
    cell: u32,
    before: u32,
}

/// Which rank and group share each cell.
struct Places {
    /// Sorted, since cells stand in expert order.
    rank_and_group: Vec<(usize, usize)>,
    num_ranks: usize,
    num_groups: usize,
}

impl Round {
    /// The round of sender `ep_rank`. The groups fit the experts and `top_k`.
    pub(super) fn new(experts: Partition, groups: ExpertGroups, top_k: usize, ep_rank: usize) -> Self {
        let grouped = Partition { total: experts.total, parts: groups.num_groups };
        let (places, mut cells) = cells(experts, grouped);
        let mut table = vec![vec![0; experts.parts]; groups.num_groups];
        for (&(rank, group), cell) in places.rank_and_group.iter().zip(&cells) {
            table[group][rank] = cell.num_experts as usize;
        }
        let Deal { tokens, is_even, max_minus_min, is_smallest } = deal(&table, experts, groups, top_k);
        let balance = is_even.then_some(Balance { round: tokens.len(), max_minus_min, is_smallest });
        let mut slots = Vec::with_capacity(tokens.len() * top_k);
        let turn = if experts.num_longer() == 0 { places.turn(ep_rank) } else { Turn::of_slots(ep_rank) };
        for token in &tokens {
            let mut row = places.slots_of(token, &mut cells);
            row.rotate_left(turn.slots % top_k);
            slots.extend(row);
        }
        let images: Vec<usize> = (0..cells.len()).map(|cell| places.image(cell, &turn)).collect();
        slots.iter_mut().for_each(|slot| slot.cell = images[slot.cell as usize] as u32);
        let mut turned = cells.clone();
        for (cell, &image) in cells.iter().zip(&images) {
            turned[image].slots_per_round = cell.slots_per_round;
        }
        Self { cells: turned, slots, num_tokens: tokens.len(), top_k, balance }
    }

    /// How far apart the ranks are; `None` where they drift apart.
    pub(super) fn balance(&self) -> Option<Balance> {
        self.balance
    }

    /// Tokens after which the plan repeats: every cell has gone round its experts.
    pub(super) fn period(&self) -> usize {
        let turns = self.cells.iter().fold(1usize, |turns, cell| {
            let own = cell.num_experts as usize;
            let own = own / greatest_common_divisor(own, (cell.slots_per_round % own as u64) as usize);
            turns.saturating_mul(own / greatest_common_divisor(own, turns))
        });
        turns.saturating_mul(self.num_tokens)
    }

    /// Slots and cells in numbers, as kernels take them: `{cell, before}` and `{first expert, experts, slots per round modulo
    /// experts}`.
    #[cfg(feature = "cuda")]
    pub(super) fn tables(&self) -> (Vec<u32>, Vec<u32>) {
        let slots = self.slots.iter().flat_map(|slot| [slot.cell, slot.before]).collect();
        let cell = |cell: &Cell| {
            [cell.first_expert, cell.num_experts, (cell.slots_per_round % u64::from(cell.num_experts)) as u32]
        };
        (slots, self.cells.iter().flat_map(cell).collect())
    }

    /// The experts of token `token`.
    pub(super) fn write(&self, token: usize, row: &mut [u32]) {
        let (round, token) = (token / self.num_tokens, token % self.num_tokens);
        let slots = &self.slots[token * self.top_k..][..self.top_k];
        for (expert, slot) in row.iter_mut().zip(slots) {
            let cell = &self.cells[slot.cell as usize];
            let size = u64::from(cell.num_experts);
            // Reduced first, so that no round number overflows.
            let before = round as u64 % size * (cell.slots_per_round % size) + u64::from(slot.before);
            *expert = cell.first_expert + (before % size) as u32;
        }
    }
}

/// The cells that are not empty, in expert order.
fn cells(experts: Partition, groups: Partition) -> (Places, Vec<Cell>) {
    let (mut rank_and_group, mut cells) = (Vec::new(), Vec::new());
    for rank in 0..experts.parts {
        let of_rank = experts.range(rank);
        for group in groups.owner(of_rank.start)..=groups.owner(of_rank.end - 1) {
            let of_group = groups.range(group);
            let shared = of_rank.start.max(of_group.start)..of_rank.end.min(of_group.end);
            rank_and_group.push((rank, group));
            cells.push(Cell {
                first_expert: shared.start as u32,
                num_experts: shared.len() as u32,
                slots_per_round: 0,
            });
        }
    }
    (Places { rank_and_group, num_ranks: experts.parts, num_groups: groups.parts }, cells)
}

/// How the plan of a sender differs from that of sender 0: a renaming of ranks and groups under which ranks and groups stay
/// what they are, and where there are not enough of those, another order of a token's slots.
struct Turn {
    /// In parts of which ranks and groups both have whole numbers.
    parts: usize,
    /// Of the ranks inside a group.
    inside: usize,
    slots: usize,
}

impl Turn {
    fn of_slots(slots: usize) -> Self {
        Self { parts: 0, inside: 0, slots }
    }
}

impl Places {
    /// With ranks of equal length, turning by a common part of ranks and groups renames both; where groups own whole
    /// ranks, these may turn inside their group too. A rank's images for all senders are then all ranks, so that at each step
    /// the senders have different receivers.
    fn turn(&self, ep_rank: usize) -> Turn {
        let parts = greatest_common_divisor(self.num_ranks, self.num_groups);
        let (within, beyond) = (ep_rank % parts, ep_rank / parts);
        match self.num_ranks.is_multiple_of(self.num_groups) {
            true => Turn { parts: within, inside: beyond, slots: 0 },
            false => Turn { parts: within, inside: 0, slots: beyond },
        }
    }

    fn image(&self, cell: usize, turn: &Turn) -> usize {
        let parts = greatest_common_divisor(self.num_ranks, self.num_groups);
        let (rank, group) = self.rank_and_group[cell];
        let rank = (rank + turn.parts * (self.num_ranks / parts)) % self.num_ranks;
        let group = (group + turn.parts * (self.num_groups / parts)) % self.num_groups;
        let rank = match turn.inside {
            0 => rank,
            inside => {
                let ranks_per_group = self.num_ranks / self.num_groups;
                rank / ranks_per_group * ranks_per_group + (rank + inside) % ranks_per_group
            }
        };
        // Cells of equal ranks and groups are renamed to cells; any other turn leaves them where they are.
        self.rank_and_group.binary_search(&(rank, group)).unwrap_or(cell)
    }

    /// The slots of a token: rank after rank, one slot each until all have theirs; of a rank's cells, the one that received
    /// least for its size.
    fn slots_of(&self, token: &Token, cells: &mut [Cell]) -> Vec<Slot> {
        let before_token: Vec<u64> = cells.iter().map(|cell| cell.slots_per_round).collect();
        let has_room = |cells: &[Cell], cell: usize| {
            cells[cell].slots_per_round - before_token[cell] < u64::from(cells[cell].num_experts)
        };
        let mut slots = Vec::new();
        let most = token.slots_per_rank.iter().copied().max().unwrap_or(0);
        for pass in 0..most {
            for rank in (0..self.num_ranks).filter(|&rank| token.slots_per_rank[rank] > pass) {
                let open = (0..cells.len()).filter(|&cell| {
                    let (of_rank, group) = self.rank_and_group[cell];
                    of_rank == rank && token.groups.contains(&group) && has_room(cells, cell)
                });
                let least = open.min_by(|&a, &b| {
                    let (a, b) = (&cells[a], &cells[b]);
                    let filled = |of: &Cell, other: &Cell| of.slots_per_round * u64::from(other.num_experts);
                    filled(a, b).cmp(&filled(b, a))
                });
                if let Some(cell) = least {
                    slots.push(Slot { cell: cell as u32, before: cells[cell].slots_per_round as u32 });
                    cells[cell].slots_per_round += 1;
                }
            }
        }
        slots
    }
}
