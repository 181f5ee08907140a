//! Rows that travel home one by one: the order in which they are sent, and that in which they arrive.
//!
//! How many go where follows from the routing, which the host has to know for that: on a device it is copied there, and waited
//! for. [`slots`](super::slots) is the way without.

use super::Placement;
use super::slots::nothing_like;
use crate::experts::weighted_sum;
use crate::host::with_slice;
use crate::order::{ExpertOrder, NO_EXPERT, NO_SLOT};
use candle_core::{Device, Result, Tensor, bail};

pub(super) const OP: &str = "combine";

/// The rows of this rank in slot order, which is by the rank that has the token, where `counts` are the tokens of each; and how
/// many rows there are for each.
pub(super) fn in_slot_order(rows: &Tensor, order: &ExpertOrder, counts: &[usize]) -> Result<(Tensor, Vec<usize>)> {
    let (places, row_counts) = with_slice(&on_host(&order.slot_rank)?, OP, "slot_rank", |slot_rank: &[u32]| {
        let mut places: Vec<u32> = Vec::new();
        let mut row_counts = Vec::with_capacity(counts.len());
        let mut rest = slot_rank;
        for &num_tokens in counts {
            let (slots, later) = rest.split_at(num_tokens * order.top_k());
            rest = later;
            let before = places.len();
            places.extend(slots.iter().filter(|&&place| place != NO_SLOT));
            row_counts.push(places.len() - before);
        }
        Ok((places, row_counts))
    })?;
    let num_rows = places.len();
    // On a device there is a row for each slot, whoever it is for.
    let expected = if rows.device().is_cpu() { num_rows } else { order.num_tokens() * order.top_k() };
    if rows.rank() != 2 || rows.dims()[0] != expected {
        bail!("{OP}: rows has shape {:?}, expected {expected} rows, those of the order", rows.shape())
    }
    Ok((chosen(rows, places)?, row_counts))
}

/// The rows at `places`.
pub(super) fn chosen(rows: &Tensor, places: Vec<u32>) -> Result<Tensor> {
    let (device, len) = (rows.device(), places.len());
    if len == 0 && !device.is_cpu() {
        return nothing_like(rows, rows.dims());
    }
    rows.contiguous()?.index_select(&Tensor::from_vec(places, len, device)?, 0)
}

/// What came home, in the order of `order`, summed.
pub(super) fn sum_received(received: &Tensor, topk_weights: &Tensor, order: &ExpertOrder) -> Result<Tensor> {
    let num_slots = order.num_tokens() * order.top_k();
    let missing = num_slots.saturating_sub(received.dims()[0]);
    if received.device().is_cpu() || num_slots == 0 || missing == 0 {
        return weighted_sum(received, topk_weights, order);
    }
    // There is a row for each slot on a device, but nobody sends rows of padding.
    let hidden_size = received.dims()[1];
    let rows = match received.dims()[0] {
        0 => Tensor::zeros((num_slots, hidden_size), received.dtype(), received.device())?,
        _ => received.pad_with_zeros(0, 0, missing)?,
    };
    weighted_sum(&rows, topk_weights, order)
}

/// A copy for the host, which waits for the device.
pub(super) fn on_host(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_device(&Device::Cpu)
}

/// The order in which rows come home: by owner of the physical expert, then by slot.
pub(super) fn by_owner(placement: &Placement, physical_ids: &Tensor) -> Result<ExpertOrder> {
    order_of_ranks(placement, &owners(placement, physical_ids)?.to_device(physical_ids.device())?)
}

/// The ranks that have the physical experts, u32 like them, on the host; [`NO_EXPERT`] stays.
pub(super) fn owners(placement: &Placement, physical_ids: &Tensor) -> Result<Tensor> {
    let owner = |&id: &u32| match id {
        NO_EXPERT => Ok(NO_EXPERT),
        id => Ok(placement.owner(id as usize)? as u32),
    };
    let owners = with_slice(&on_host(physical_ids)?, OP, "topk_ids", |ids: &[u32]| {
        ids.iter().map(owner).collect::<Result<Vec<_>>>()
    })?;
    Tensor::from_vec(owners, physical_ids.shape(), &Device::Cpu)
}

/// Ranks in the place of experts: it is the same counting sort.
pub(super) fn order_of_ranks(placement: &Placement, ranks: &Tensor) -> Result<ExpertOrder> {
    ExpertOrder::new(ranks, placement.ep_size(), 0..placement.ep_size())
}
