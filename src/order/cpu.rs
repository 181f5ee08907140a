//! Expert order on the CPU: a counting sort in three passes over the slots.

use super::{NO_EXPERT, NO_SLOT, OP, OrderSpec};
use crate::host::try_filled;
use candle_core::{Result, bail};

pub(super) struct Order {
    pub(super) expert_counts: Vec<u32>,
    pub(super) expert_offsets: Vec<u32>,
    pub(super) sorted_slots: Vec<u32>,
    pub(super) slot_rank: Vec<u32>,
}

pub(super) fn order(ids: &[u32], spec: &OrderSpec) -> Result<Order> {
    let num_local = spec.local_experts.len();
    let mut expert_counts = try_filled(OP, 0u32, num_local)?;
    for (slot, &id) in ids.iter().enumerate() {
        if let Some(expert) = spec.local_expert(slot, id) {
            expert_counts[expert] += 1;
        } else if id as usize >= spec.num_experts && id != NO_EXPERT {
            let num_experts = spec.num_experts;
            bail!("{OP}: slot {slot} has expert id {id}, expected less than num_experts, which is {num_experts}")
        }
    }
    let mut expert_offsets = try_filled(OP, 0, num_local + 1)?;
    let mut total = 0;
    for (offset, count) in expert_offsets[1..].iter_mut().zip(&expert_counts) {
        total += count;
        *offset = total;
    }

    let mut next = try_filled(OP, 0, num_local)?;
    next.copy_from_slice(&expert_offsets[..num_local]);
    let mut sorted_slots = try_filled(OP, NO_SLOT, ids.len())?;
    let mut slot_rank = try_filled(OP, NO_SLOT, ids.len())?;
    for (slot, &id) in ids.iter().enumerate() {
        if let Some(expert) = spec.local_expert(slot, id) {
            let place = &mut next[expert];
            sorted_slots[*place as usize] = slot as u32;
            slot_rank[slot] = *place;
            *place += 1;
        }
    }
    Ok(Order { expert_counts, expert_offsets, sorted_slots, slot_rank })
}

/// The expert and the first place of every tile, padded to `max_tiles`.
pub(super) fn tile_map(offsets: &[u32], tile_rows: usize, max_tiles: usize) -> (Vec<u32>, Vec<u32>) {
    let mut experts = Vec::with_capacity(max_tiles);
    let mut starts = Vec::with_capacity(max_tiles);
    for (expert, bounds) in offsets.windows(2).enumerate() {
        for start in (bounds[0]..bounds[1]).step_by(tile_rows) {
            experts.push(expert as u32);
            starts.push(start);
        }
    }
    experts.resize(max_tiles, NO_EXPERT);
    starts.resize(max_tiles, NO_SLOT);
    (experts, starts)
}
