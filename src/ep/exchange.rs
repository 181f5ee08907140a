//! The `Exchange` strategy: a token goes to the ranks that have some of its slots, once to each.
//!
//! ```text
//! destinations[token]   the owners of the token's slots, each once, in rank order
//! dispatch              for each rank in turn, the tokens that go there: hidden states, physical ids, weights where ranks sum
//! combine  SlotOrder    rows travel home one by one; summed there in slot order
//!          RankPartial  a rank sums its rows of each token that it received; the sums travel back as the tokens came,
//!                       and are added in rank order
//! ```
//!
//! 1. The destinations of a token are to ranks what its slots are to experts, so the tokens to send are an expert order of the
//!    destinations, and adding up what comes back is the sum over that order with weights of 1.
//! 2. On a device the host copies the ids to know how many tokens go where, and waits for them.
//! 3. A token brings all of its ids along. Who receives it works on its own and skips the others, so nothing has to say which
//!    of them the token came for.

use super::dispatch::{Dispatched, Sharing, WayHome};
use super::slots::nothing_like;
use super::{Communicator, Reduction, home};
use crate::host::with_slice;
use crate::order::{ExpertOrder, NO_EXPERT};
use crate::routing::Routing;
use candle_core::{DType, Device, Result, Tensor};

pub(super) fn dispatch(
    communicator: &mut dyn Communicator,
    sharing: &Sharing<'_>,
    hidden: &Tensor,
    routing: &Routing,
) -> Result<Dispatched> {
    let Routing { topk_ids, topk_weights } = routing;
    let device = hidden.device();
    let owners = home::owners(sharing.placement, topk_ids)?;
    let ranks = destinations(&owners)?;
    let destinations = home::order_of_ranks(sharing.placement, &ranks)?;
    let send_counts: Vec<usize> = destinations.expert_counts.to_vec1::<u32>()?.iter().map(|&n| n as usize).collect();
    let tokens = tokens_to_send(&destinations, send_counts.iter().sum())?;
    let mut send = |rows: &Tensor| -> Result<_> {
        Ok(communicator.all_to_all(&home::chosen(rows, tokens.clone())?, &send_counts)?)
    };
    let (hidden, counts) = send(hidden)?;
    let (received_ids, _) = send(topk_ids)?;
    let way_home = match sharing.reduction {
        Reduction::SlotOrder => {
            let by_owner = home::order_of_ranks(sharing.placement, &owners.to_device(device)?)?;
            WayHome::RowByRow { topk_weights: topk_weights.clone(), counts, by_owner }
        }
        Reduction::RankPartial => {
            let (topk_weights, _) = send(topk_weights)?;
            let destinations = match device.is_cpu() {
                true => destinations,
                false => home::order_of_ranks(sharing.placement, &ranks.to_device(device)?)?,
            };
            WayHome::Summed { topk_weights, counts, destinations }
        }
    };
    Ok(Dispatched { hidden, topk_ids: received_ids, way_home })
}

/// Sends `partial`, f32 `[sum of counts, hidden_size]`, back to where the tokens came from, and adds up what comes home.
pub(super) fn add_partial(
    communicator: &mut dyn Communicator,
    partial: &Tensor,
    counts: &[usize],
    destinations: &ExpertOrder,
) -> Result<Tensor> {
    let (received, _) = communicator.all_to_all(partial, counts)?;
    if destinations.num_tokens() == 0 && !partial.device().is_cpu() {
        return nothing_like(partial, &[0, partial.dims()[1]]);
    }
    let ones = Tensor::ones((destinations.num_tokens(), destinations.top_k()), DType::F32, partial.device())?;
    home::sum_received(&received, &ones, destinations)
}

/// The ranks that each token goes to, ascending, each once, on the host. The `expert_counts` of their order are the tokens for each
/// rank.
fn destinations(owners: &Tensor) -> Result<Tensor> {
    let (_, top_k) = owners.dims2()?;
    let ranks = with_slice(owners, home::OP, "owners", |owners: &[u32]| {
        let mut ranks = owners.to_vec();
        for ranks in ranks.chunks_exact_mut(top_k.max(1)) {
            ranks.sort_unstable();
            for k in (1..top_k).rev() {
                if ranks[k] == ranks[k - 1] {
                    ranks[k] = NO_EXPERT;
                }
            }
        }
        Ok(ranks)
    })?;
    Tensor::from_vec(ranks, owners.shape(), &Device::Cpu)
}

/// The tokens of the first `num_rows` places of `destinations`, all that are in use.
fn tokens_to_send(destinations: &ExpertOrder, num_rows: usize) -> Result<Vec<u32>> {
    let top_k = destinations.top_k();
    with_slice(&destinations.sorted_slots, home::OP, "sorted_slots", |slots: &[u32]| {
        Ok(slots[..num_rows].iter().map(|&slot| slot / top_k as u32).collect())
    })
}
