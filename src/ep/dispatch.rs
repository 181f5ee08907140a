//! Dispatch and combine, whatever the strategy.
//!
//! ```text
//! hidden, physical ids -> dispatch -> tokens for this rank's experts -> order, experts -> rows -> combine -> sums of own tokens
//! ```
//!
//! The checks and the types are here, the bodies in a file for each strategy. What dispatch knows of the way home it leaves in
//! [`Dispatched`], so that combine needs nothing but the rows.

#[cfg(feature = "cuda")]
use super::pushed;
use super::{Communicator, Placement, Reduction, Step, Strategy, exchange, gather, home, replicated, slots};
use crate::experts::weighted_sum;
use crate::order::ExpertOrder;
use crate::routing::Routing;
use candle_core::{DType, Result, Tensor, bail};

const DISPATCH: &str = "dispatch";
const COMBINE: &str = "combine";

/// How a layer is shared; the same on every rank.
#[derive(Debug, Clone, Copy)]
pub struct Sharing<'a> {
    /// How tokens and rows travel.
    pub strategy: Strategy,
    /// How results are summed.
    pub reduction: Reduction,
    /// Who holds which experts.
    pub placement: &'a Placement,
}

/// The tokens that this rank works on, from all ranks, and how their results come home.
#[derive(Debug, Clone)]
pub struct Dispatched {
    pub(super) hidden: Tensor,
    pub(super) topk_ids: Tensor,
    pub(super) way_home: WayHome,
}

/// How results come home. Weights are f32 `[.., top_k]` of the tokens that are summed, own or received; counts are the
/// received tokens of each rank.
#[derive(Debug, Clone)]
pub(super) enum WayHome {
    /// They are home.
    Here { topk_weights: Tensor },
    /// Sums of own rows are added over all ranks, for all ranks.
    AllReduced { topk_weights: Tensor },
    /// Everybody gets all rows, which arrive in the order `by_owner`.
    AllGathered { topk_weights: Tensor, by_owner: ExpertOrder },
    /// Rows are added slot by slot over all ranks, for all ranks.
    ReducedSlots { topk_weights: Tensor },
    /// Rows are added slot by slot over all ranks, for the rank that has the token.
    ScatteredSlots { topk_weights: Tensor, counts: Vec<usize> },
    /// Sums of own rows are added over all ranks, for the rank that has the token.
    Scattered { topk_weights: Tensor, counts: Vec<usize> },
    /// Sums of own rows go to the rank that has the token, where they arrive in the order `destinations`.
    Summed { topk_weights: Tensor, counts: Vec<usize>, destinations: ExpertOrder },
    /// Rows go to the rank that has the token, where they arrive in the order `by_owner`.
    RowByRow { topk_weights: Tensor, counts: Vec<usize>, by_owner: ExpertOrder },
    /// The rank that has the token fetches rows or sums from the others' memory.
    #[cfg(feature = "cuda")]
    Pulled(pushed::Pulled),
}

impl Dispatched {
    /// `[num_received, hidden_size]`: the hidden states of the tokens, grouped by the rank that has them.
    pub fn hidden(&self) -> &Tensor {
        &self.hidden
    }

    /// f32 `[num_received, top_k]`: the weights with which this rank sums its own rows before they travel; `None` where rows
    /// travel one by one.
    pub fn weights_here(&self) -> Option<&Tensor> {
        match &self.way_home {
            WayHome::Here { topk_weights }
            | WayHome::AllReduced { topk_weights }
            | WayHome::Scattered { topk_weights, .. }
            | WayHome::Summed { topk_weights, .. } => Some(topk_weights),
            #[cfg(feature = "cuda")]
            WayHome::Pulled(pulled) => pulled.weights_here.as_ref(),
            _ => None,
        }
    }

    /// Whether results may travel in this dtype, which is not f32.
    fn may_travel_in(&self, dtype: DType) -> bool {
        #[cfg(feature = "cuda")]
        if matches!(self.way_home, WayHome::Pulled(_)) {
            return dtype == self.hidden.dtype();
        }
        let _ = dtype;
        false
    }

    /// u32 `[num_received, top_k]`: physical experts, those of other ranks included, or
    /// [`NO_EXPERT`](crate::order::NO_EXPERT).
    pub fn topk_ids(&self) -> &Tensor {
        &self.topk_ids
    }
}

/// Sends this rank's tokens to where their experts are, and receives those for its own. A collective.
///
/// `hidden` is `[token_counts[rank], hidden_size]`; `routing` has as many rows, and its ids are physical experts
/// ([`ExpertMap::physical_ids`](crate::order::ExpertMap::physical_ids)).
///
/// # Errors
/// Those of the communicator; row counts that do not match the step; a group of another size than the placement, or of several
/// ranks for `Solo`; ids that the placement does not have; token counts that differ, with `Replicated`.
pub fn dispatch(
    communicator: &mut dyn Communicator,
    step: &Step,
    sharing: &Sharing<'_>,
    hidden: &Tensor,
    routing: &Routing,
) -> Result<Dispatched> {
    check_sharing(communicator, step, sharing)?;
    check_tokens(step.token_counts()[communicator.rank()], hidden, routing)?;
    match sharing.strategy {
        Strategy::Solo => {
            // Nothing is sent, but a group that was given up stays so.
            communicator.barrier()?;
            Ok(Dispatched {
                hidden: hidden.clone(),
                topk_ids: routing.topk_ids.clone(),
                way_home: WayHome::Here { topk_weights: routing.topk_weights.clone() },
            })
        }
        Strategy::Replicated => replicated::dispatch(step, sharing, hidden, routing),
        Strategy::Gather => gather::dispatch(communicator, step, sharing, hidden, routing),
        Strategy::Exchange => exchange::dispatch(communicator, sharing, hidden, routing),
        #[cfg(feature = "cuda")]
        Strategy::Peer => {
            let nothing = None::<fn() -> Result<()>>;
            pushed::dispatch(communicator, step, sharing, (hidden, routing), nothing).map(|(dispatched, _)| dispatched)
        }
        #[cfg(not(feature = "cuda"))]
        Strategy::Peer => bail!("{DISPATCH}: the strategy is peer, expected another without the feature `cuda`"),
    }
}

/// [`dispatch`], and `beside`, which needs nothing of it: with [`Strategy::Peer`], in captures and once the group serves
/// ([`Communicator::start_serving`]), the device does it while tokens are on their way, otherwise before or after.
///
/// # Errors
/// Those of [`dispatch`] and of `beside`. Where `beside` fails the others do not hear of it.
pub fn dispatch_beside<T>(
    communicator: &mut dyn Communicator,
    step: &Step,
    sharing: &Sharing<'_>,
    hidden: &Tensor,
    routing: &Routing,
    beside: impl FnOnce() -> Result<T>,
) -> Result<(Dispatched, T)> {
    #[cfg(feature = "cuda")]
    if sharing.strategy == Strategy::Peer {
        check_sharing(communicator, step, sharing)?;
        check_tokens(step.token_counts()[communicator.rank()], hidden, routing)?;
        return match pushed::dispatch(communicator, step, sharing, (hidden, routing), Some(beside))? {
            (dispatched, Some(made)) => Ok((dispatched, made)),
            (_, None) => bail!("{DISPATCH}: nothing came of what was to be done beside"),
        };
    }
    let dispatched = dispatch(communicator, step, sharing, hidden, routing)?;
    Ok((dispatched, beside()?))
}

/// Brings the results of this rank's tokens home and sums them: f32 `[token_counts[rank], hidden_size]`. A collective.
///
/// `rows` is f32 `[num_rows, hidden_size]`, or with [`Strategy::Peer`] in the dtype of the hidden states, what the local experts made of the dispatched tokens, in the order `order` of
/// [`Dispatched::topk_ids`].
///
/// # Errors
/// Those of the communicator; an order of other tokens; rows that are not those of the order.
pub fn combine(
    communicator: &mut dyn Communicator,
    dispatched: &Dispatched,
    rows: &Tensor,
    order: &ExpertOrder,
) -> Result<Tensor> {
    check_order(dispatched, order)?;
    if rows.dtype() != DType::F32 && !dispatched.may_travel_in(rows.dtype()) {
        bail!("{COMBINE}: rows has dtype {:?}, expected F32", rows.dtype())
    }
    if let Some(topk_weights) = dispatched.weights_here() {
        return combine_sums(communicator, dispatched, &weighted_sum(rows, topk_weights, order)?);
    }
    match &dispatched.way_home {
        WayHome::ReducedSlots { topk_weights } => {
            slots::sum(&communicator.all_reduce(&slots::by_token(rows, order)?)?, topk_weights)
        }
        WayHome::ScatteredSlots { topk_weights, counts } => {
            slots::sum(&communicator.reduce_scatter(&slots::by_token(rows, order)?, counts)?, topk_weights)
        }
        WayHome::AllGathered { topk_weights, by_owner } => {
            replicated::gather_rows(communicator, rows, order, topk_weights, by_owner)
        }
        WayHome::RowByRow { topk_weights, counts, by_owner } => {
            let (sent, counts) = home::in_slot_order(rows, order, counts)?;
            let (received, _) = communicator.all_to_all(&sent, &counts)?;
            home::sum_received(&received, topk_weights, by_owner)
        }
        #[cfg(feature = "cuda")]
        WayHome::Pulled(pulled) => pushed::combine_rows(communicator, pulled, rows, order),
        WayHome::Here { .. } | WayHome::AllReduced { .. } | WayHome::Scattered { .. } | WayHome::Summed { .. } => {
            bail!("{COMBINE}: rows were not summed where they are, expected that")
        }
    }
}

/// As [`combine`], of what is summed already: `sums` is f32 `[num_received, hidden_size]`, or with [`Strategy::Peer`] in the dtype of the hidden states, the sums over the local
/// slots of each token with the weights of [`Dispatched::weights_here`], where there are such.
///
/// # Errors
/// Those of the communicator; sums of other tokens; a way home on which nothing is summed here.
pub fn combine_sums(communicator: &mut dyn Communicator, dispatched: &Dispatched, sums: &Tensor) -> Result<Tensor> {
    let num_received = dispatched.topk_ids.dims()[0];
    if sums.rank() != 2
        || sums.dims()[0] != num_received
        || (sums.dtype() != DType::F32 && !dispatched.may_travel_in(sums.dtype()))
    {
        bail!("{COMBINE}: sums has shape {:?}, {:?}, expected {num_received} rows of F32", sums.shape(), sums.dtype())
    }
    match &dispatched.way_home {
        WayHome::Here { .. } => Ok(sums.clone()),
        WayHome::AllReduced { .. } => Ok(communicator.all_reduce(sums)?),
        WayHome::Scattered { counts, .. } => Ok(communicator.reduce_scatter(sums, counts)?),
        WayHome::Summed { counts, destinations, .. } => exchange::add_partial(communicator, sums, counts, destinations),
        #[cfg(feature = "cuda")]
        WayHome::Pulled(pulled) if pulled.weights_here.is_some() => pushed::combine_sums(communicator, pulled, sums),
        _ => bail!("{COMBINE}: sums were given, expected rows, which are summed at home"),
    }
}

fn check_sharing(communicator: &dyn Communicator, step: &Step, sharing: &Sharing<'_>) -> Result<()> {
    let (ep_size, ranks) = (sharing.placement.ep_size(), communicator.world_size());
    if ranks != ep_size {
        bail!("{DISPATCH}: the communicator has {ranks} ranks, expected those of the placement, {ep_size}")
    }
    if step.token_counts().len() != ranks {
        bail!(
            "{DISPATCH}: the step has {} ranks, expected those of the communicator, {ranks}",
            step.token_counts().len()
        )
    }
    if sharing.strategy == Strategy::Solo && ranks != 1 {
        bail!("{DISPATCH}: the strategy is solo, expected another for {ranks} ranks")
    }
    Ok(())
}

fn check_tokens(num_tokens: usize, hidden: &Tensor, routing: &Routing) -> Result<()> {
    let Routing { topk_ids, topk_weights } = routing;
    for (name, tensor) in [("hidden", hidden), ("topk_ids", topk_ids), ("topk_weights", topk_weights)] {
        if tensor.rank() != 2 || tensor.dims()[0] != num_tokens {
            bail!("{DISPATCH}: {name} has shape {:?}, expected {num_tokens} rows, those of the step", tensor.shape())
        }
    }
    if topk_weights.dims() != topk_ids.dims() {
        bail!(
            "{DISPATCH}: topk_weights has shape {:?}, expected that of topk_ids, {:?}",
            topk_weights.shape(),
            topk_ids.shape()
        )
    }
    for (name, tensor, dtype) in [("topk_ids", topk_ids, DType::U32), ("topk_weights", topk_weights, DType::F32)] {
        if tensor.dtype() != dtype {
            bail!("{DISPATCH}: {name} has dtype {:?}, expected {dtype:?}", tensor.dtype())
        }
    }
    Ok(())
}

fn check_order(dispatched: &Dispatched, order: &ExpertOrder) -> Result<()> {
    if dispatched.topk_ids.dims() != [order.num_tokens(), order.top_k()] {
        bail!(
            "{COMBINE}: the order is of topk_ids [{}, {}], expected the dispatched ones, {:?}",
            order.num_tokens(),
            order.top_k(),
            dispatched.topk_ids.shape()
        )
    }
    Ok(())
}
