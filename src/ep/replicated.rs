//! The `Replicated` strategy: every rank holds all tokens, so nothing is sent but results.
//!
//! ```text
//! dispatch   nothing
//! combine    SlotOrder     all-gather of all ranks' rows, which every rank sums in slot order; on a device all-reduce adds the
//!                          slots of all ranks instead, each of which one rank has
//!            RankPartial   each rank sums its own rows; all-reduce adds the partial sums in rank order
//! ```
//!
//! All ranks have routed the same tokens, so each knows how many rows the others bring.

use super::dispatch::{Dispatched, Sharing, WayHome};
use super::{Communicator, Reduction, Step, home};
use crate::experts::weighted_sum;
use crate::order::ExpertOrder;
use crate::routing::Routing;
use candle_core::{Result, Tensor, bail};

const OP: &str = "replicated";

pub(super) fn dispatch(step: &Step, sharing: &Sharing<'_>, hidden: &Tensor, routing: &Routing) -> Result<Dispatched> {
    if step.token_counts().windows(2).any(|counts| counts[0] != counts[1]) {
        bail!(
            "{OP}: token_counts is {:?}, expected the same on every rank, which holds all tokens",
            step.token_counts()
        )
    }
    let Routing { topk_ids, topk_weights } = routing.clone();
    let way_home = match sharing.reduction {
        Reduction::SlotOrder if !hidden.device().is_cpu() => WayHome::ReducedSlots { topk_weights },
        Reduction::SlotOrder => {
            WayHome::AllGathered { topk_weights, by_owner: home::by_owner(sharing.placement, &topk_ids)? }
        }
        Reduction::RankPartial => WayHome::AllReduced { topk_weights },
    };
    Ok(Dispatched { hidden: hidden.clone(), topk_ids, way_home })
}

/// Every rank's rows to every rank, summed in slot order.
pub(super) fn gather_rows(
    communicator: &mut dyn Communicator,
    rows: &Tensor,
    order: &ExpertOrder,
    topk_weights: &Tensor,
    by_owner: &ExpertOrder,
) -> Result<Tensor> {
    let (rows, _) = home::in_slot_order(rows, order, &[order.num_tokens()])?;
    let counts: Vec<usize> = by_owner.expert_counts.to_vec1::<u32>()?.iter().map(|&n| n as usize).collect();
    weighted_sum(&communicator.all_gather(&rows, &counts)?, topk_weights, by_owner)
}
