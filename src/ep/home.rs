//! Rows that travel home one by one: the order in which they are sent, and that in which they arrive.

use super::Placement;
use crate::host::with_slice;
use crate::order::{ExpertOrder, NO_EXPERT, NO_SLOT};
use candle_core::{Device, Result, Tensor, bail};

pub(super) const OP: &str = "combine";

/// The rows of this rank in slot order, which is by the rank that has the token, where `counts` are the tokens of each; and how
/// many rows there are for each.
pub(super) fn in_slot_order(rows: &Tensor, order: &ExpertOrder, counts: &[usize]) -> Result<(Tensor, Vec<usize>)> {
    let (places, row_counts) = with_slice(&order.slot_rank, OP, "slot_rank", |slot_rank: &[u32]| {
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
    if rows.rank() != 2 || rows.dims()[0] != num_rows {
        bail!("{OP}: rows has shape {:?}, expected {num_rows} rows, those of the order", rows.shape())
    }
    let places = Tensor::from_vec(places, num_rows, &Device::Cpu)?;
    Ok((rows.contiguous()?.index_select(&places, 0)?, row_counts))
}

/// The order in which rows come home: by owner of the physical expert, then by slot.
pub(super) fn by_owner(placement: &Placement, physical_ids: &Tensor) -> Result<ExpertOrder> {
    order_of_ranks(placement, &owners(placement, physical_ids)?)
}

/// The ranks that have the physical experts, u32 like them; [`NO_EXPERT`] stays.
pub(super) fn owners(placement: &Placement, physical_ids: &Tensor) -> Result<Tensor> {
    let owner = |&id: &u32| match id {
        NO_EXPERT => Ok(NO_EXPERT),
        id => Ok(placement.owner(id as usize)? as u32),
    };
    let owners =
        with_slice(physical_ids, OP, "topk_ids", |ids: &[u32]| ids.iter().map(owner).collect::<Result<Vec<_>>>())?;
    Tensor::from_vec(owners, physical_ids.shape(), &Device::Cpu)
}

/// Ranks in the place of experts: it is the same counting sort.
pub(super) fn order_of_ranks(placement: &Placement, ranks: &Tensor) -> Result<ExpertOrder> {
    ExpertOrder::new(ranks, placement.ep_size(), 0..placement.ep_size())
}
