//! The `Gather` strategy: every rank sees all tokens and works on the slots of its own experts.
//!
//! ```text
//! dispatch   all-gather of hidden states and physical ids, and of weights where ranks sum
//! combine    SlotOrder     rows travel home one by one; summed there in slot order. On a device reduce-scatter adds the slots of all
//!                          ranks, each of which one rank has, so that the host need not know where they go
//!            RankPartial   each rank sums its own rows; reduce-scatter adds the partial sums in rank order
//! ```
//!
//! With `ep_size <= top_k` and uniform routing nearly every token reaches every rank anyway, so the all-gather moves the
//! fewest bytes.

use super::dispatch::{Dispatched, Sharing, WayHome};
use super::{Communicator, Reduction, Step, home};
use crate::routing::Routing;
use candle_core::{Result, Tensor};

pub(super) fn dispatch(
    communicator: &mut dyn Communicator,
    step: &Step,
    sharing: &Sharing<'_>,
    hidden: &Tensor,
    routing: &Routing,
) -> Result<Dispatched> {
    let counts = step.token_counts().to_vec();
    let hidden = communicator.all_gather(hidden, &counts)?;
    let topk_ids = communicator.all_gather(&routing.topk_ids, &counts)?;
    let way_home = match sharing.reduction {
        Reduction::SlotOrder if !hidden.device().is_cpu() => {
            WayHome::ScatteredSlots { topk_weights: routing.topk_weights.clone(), counts }
        }
        Reduction::SlotOrder => {
            let by_owner = home::by_owner(sharing.placement, &routing.topk_ids)?;
            WayHome::RowByRow { topk_weights: routing.topk_weights.clone(), counts, by_owner }
        }
        Reduction::RankPartial => {
            WayHome::Scattered { topk_weights: communicator.all_gather(&routing.topk_weights, &counts)?, counts }
        }
    };
    Ok(Dispatched { hidden, topk_ids, way_home })
}
