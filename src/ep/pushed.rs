//! The `Peer` strategy: ranks push tokens to, and pull results from, the memory of each other's devices.
//!
//! ```text
//! dispatch   each token to the ranks that have some of its experts, once; ids and weights of all tokens to all
//! combine    SlotOrder     the rows of slots are pulled from the ranks that have them, and summed in slot order
//!            RankPartial   each rank sums its own rows; the partial sums are pulled, and added in rank order
//! ```
//!
//! As with [`gather`](super::gather) the tokens of all ranks have places on each, so that the host need not know what goes where.
//! Those of tokens without a local slot hold anything, and nothing reads them.

use super::dispatch::{Dispatched, Sharing, WayHome};
use super::peer::{Peer, Way};
use super::{Communicator, Placement, Reduction, Step};
use crate::experts::Experts;
use crate::order::ExpertOrder;
use crate::routing::Routing;
use candle_core::{DType, Result, Tensor, bail};

/// How results come home.
#[derive(Debug, Clone)]
pub(super) struct Pulled {
    /// Of this rank's own tokens.
    routing: Routing,
    /// Of all tokens, where each rank sums its own rows.
    pub(super) weights_here: Option<Tensor>,
    counts: Vec<usize>,
    placement: Placement,
}

impl Pulled {
    fn way(&self, dtype: DType) -> Way<'_> {
        Way { counts: &self.counts, placement: &self.placement, routing: &self.routing, dtype }
    }
}

fn peer_of(communicator: &mut dyn Communicator) -> Result<&mut Peer> {
    match communicator.as_peer() {
        Some(peer) => Ok(peer),
        None => bail!("peer: the ranks do not reach each other's memory, expected those of a Peer"),
    }
}

/// With what `beside` gives, which the device does while tokens are on their way.
pub(super) fn dispatch<T>(
    communicator: &mut dyn Communicator,
    step: &Step,
    sharing: &Sharing<'_>,
    (hidden, routing): (&Tensor, &Routing),
    beside: Option<impl FnOnce() -> Result<T>>,
) -> Result<(Dispatched, Option<T>)> {
    let peer = peer_of(communicator)?;
    let (pushed, beside) = peer.push(step.token_counts(), sharing.placement, (hidden, routing), beside)?;
    let beside = beside.transpose()?;
    let pulled = Pulled {
        routing: routing.clone(),
        weights_here: (sharing.reduction == Reduction::RankPartial).then_some(pushed.topk_weights),
        counts: step.token_counts().to_vec(),
        placement: sharing.placement.clone(),
    };
    let way_home = WayHome::Pulled(pulled);
    Ok((Dispatched { hidden: pushed.hidden, topk_ids: pushed.topk_ids, way_home }, beside))
}

/// Of rows in the order `order`.
pub(super) fn combine_rows(
    communicator: &mut dyn Communicator,
    pulled: &Pulled,
    rows: &Tensor,
    order: &ExpertOrder,
) -> Result<Tensor> {
    Ok(peer_of(communicator)?.pull_rows(rows, &order.slot_rank, pulled.way(DType::F32))?)
}

/// Of sums over the slots of each rank.
pub(super) fn combine_sums(communicator: &mut dyn Communicator, pulled: &Pulled, sums: &Tensor) -> Result<Tensor> {
    Ok(peer_of(communicator)?.pull_sums(sums, pulled.way(DType::F32))?)
}

/// The experts' work on what was dispatched, straight to where the others pull from, and the way home: sums in `dtype`. Partial sums
/// are in the dtype of the hidden states.
pub(crate) fn work(
    communicator: &mut dyn Communicator,
    dispatched: &Dispatched,
    experts: &Experts,
    order: &ExpertOrder,
    dtype: DType,
) -> Result<Tensor> {
    let WayHome::Pulled(pulled) = &dispatched.way_home else {
        bail!("peer: the tokens came another way, expected by the strategy peer")
    };
    let peer = peer_of(communicator)?;
    let hidden = &dispatched.hidden;
    let (num_tokens, hidden_size) = hidden.dims2()?;
    match &pulled.weights_here {
        Some(topk_weights) => {
            let sums = peer.room_for_results(hidden.dtype(), num_tokens, hidden_size)?;
            if num_tokens > 0 {
                experts.forward_weighted_to(hidden, topk_weights, order, None, &sums)?;
            }
            Ok(peer.pull_sums(&sums, pulled.way(dtype))?)
        }
        None => {
            let rows_dtype = experts.rows_dtype(hidden, order, dtype)?;
            let rows = peer.room_for_results(rows_dtype, num_tokens * order.top_k(), hidden_size)?;
            if num_tokens > 0 {
                experts.forward_to(hidden, order, &rows)?;
            }
            Ok(peer.pull_rows(&rows, &order.slot_rank, pulled.way(dtype))?)
        }
    }
}
