//! The `Gather` strategy: every rank sees all tokens and works on the slots of its own experts.
//!
//! ```text
//! dispatch   all-gather of hidden states, topk_ids and topk_weights
//! combine    SlotOrder     rows travel home one by one; summed there in slot order
//!            RankPartial   each rank sums its own rows; reduce-scatter adds the partial sums in rank order
//! ```
//!
//! With `ep_size <= top_k` and uniform routing nearly every token reaches every rank anyway, so the all-gather moves the
//! fewest bytes.

use super::{Communicator, Step, Topology};
use crate::experts::weighted_sum;
use crate::host::with_slice;
use crate::order::{ExpertOrder, NO_EXPERT, NO_SLOT};
use crate::routing::Routing;
use candle_core::{Device, Result, Tensor, bail};

const OP: &str = "gather";

/// How the results of a token's experts become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Every slot's row comes home and is summed in slot order in float32: the same bits for every `ep_size`.
    #[default]
    SlotOrder,
    /// Each rank sums its own rows, the partial sums are added in rank order: the same bits for a fixed `ep_size`, and
    /// fewer bytes to move.
    RankPartial,
}

/// The tokens of all ranks, in rank order.
#[derive(Debug, Clone)]
pub struct Dispatched {
    /// `[sum of token counts, hidden_size]`
    pub hidden: Tensor,
    /// The routing of those tokens.
    pub routing: Routing,
}

/// What a rank has when its experts are done.
#[derive(Debug, Clone, Copy)]
pub struct Results<'a> {
    /// f32 `[num_rows, hidden_size]`: the results of the local experts for the dispatched tokens, in expert order.
    pub rows: &'a Tensor,
    /// That order.
    pub order: &'a ExpertOrder,
    /// The tokens of all ranks.
    pub dispatched: &'a Dispatched,
    /// The routing of this rank's own tokens.
    pub home: &'a Routing,
    /// Who owns which experts.
    pub topology: &'a Topology,
}

/// Sends this rank's tokens to all ranks and receives theirs. A collective.
///
/// `hidden` is `[token_counts[rank], hidden_size]`, `routing` has as many rows.
///
/// # Errors
/// Those of the communicator, row counts that do not match the step among them.
pub fn dispatch(
    communicator: &mut dyn Communicator,
    step: &Step,
    hidden: &Tensor,
    routing: &Routing,
) -> Result<Dispatched> {
    let counts = step.token_counts();
    Ok(Dispatched {
        hidden: communicator.all_gather(hidden, counts)?,
        routing: Routing {
            topk_ids: communicator.all_gather(&routing.topk_ids, counts)?,
            topk_weights: communicator.all_gather(&routing.topk_weights, counts)?,
        },
    })
}

/// Brings the results of this rank's tokens home and sums them: f32 `[token_counts[rank], hidden_size]`. A collective.
///
/// # Errors
/// Those of the communicator; shapes that do not fit.
pub fn combine(
    communicator: &mut dyn Communicator,
    step: &Step,
    reduction: Reduction,
    results: &Results<'_>,
) -> Result<Tensor> {
    let Results { rows, order, dispatched, home, topology } = results;
    match reduction {
        Reduction::RankPartial => {
            let partial = weighted_sum(rows, &dispatched.routing.topk_weights, order)?;
            Ok(communicator.reduce_scatter(&partial, step.token_counts())?)
        }
        Reduction::SlotOrder => {
            let (places, counts) = rows_by_home(step, order)?;
            let sent = rows.index_select(&places, 0)?;
            let (received, _) = communicator.all_to_all(&sent, &counts)?;
            weighted_sum(&received, &home.topk_weights, &order_by_owner(topology, &home.topk_ids)?)
        }
    }
}

/// The rows of this rank in slot order, which is by home rank, and how many go to each.
fn rows_by_home(step: &Step, order: &ExpertOrder) -> Result<(Tensor, Vec<usize>)> {
    if step.num_tokens() != order.num_tokens() {
        bail!("{OP}: the order has {} tokens, expected the {} of the step", order.num_tokens(), step.num_tokens())
    }
    with_slice(&order.slot_rank, OP, "slot_rank", |slot_rank: &[u32]| {
        let mut places: Vec<u32> = Vec::new();
        let mut counts = Vec::with_capacity(step.token_counts().len());
        let mut rest = slot_rank;
        for &num_tokens in step.token_counts() {
            let (slots, later) = rest.split_at(num_tokens * order.top_k());
            rest = later;
            let before = places.len();
            places.extend(slots.iter().filter(|&&place| place != NO_SLOT));
            counts.push(places.len() - before);
        }
        let len = places.len();
        Ok((Tensor::from_vec(places, len, &Device::Cpu)?, counts))
    })
}

/// The order in which rows come home: by owner of the expert, then by slot. It is an expert order of the owners.
fn order_by_owner(topology: &Topology, topk_ids: &Tensor) -> Result<ExpertOrder> {
    let owners = with_slice(topk_ids, OP, "topk_ids", |ids: &[u32]| {
        let owner = |&id: &u32| match id {
            NO_EXPERT => Ok(NO_EXPERT),
            id => Ok(topology.owner(id as usize)? as u32),
        };
        ids.iter().map(owner).collect::<Result<Vec<_>>>()
    })?;
    let owners = Tensor::from_vec(owners, topk_ids.shape(), &Device::Cpu)?;
    ExpertOrder::new(&owners, topology.ep_size(), 0..topology.ep_size())
}
