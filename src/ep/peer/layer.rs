//! A layer's way to its experts and home.

use super::super::call::{Site, Terms};
use super::super::communicator::Communicator;
use super::super::device::{address_of, fresh, tensor_kind};
use super::super::error::{Collective, EpError, EpErrorKind};
use super::super::placement::Placement;
use super::kernels::{self, CombineArguments, DispatchArguments, Owners, Pulled};
use super::links::MAX_RANKS;
use super::rooms::Use;
use super::{Peer, copy, words};
use crate::routing::Routing;
use candle_core::{DType, Result as CandleResult, Tensor};
use std::time::Instant;

/// The tokens of all ranks of which this rank has experts, in the rooms, with the ids and weights of all tokens.
pub(in super::super) struct Pushed {
    pub(in super::super) hidden: Tensor,
    pub(in super::super) topk_ids: Tensor,
    pub(in super::super) topk_weights: Tensor,
}

/// How a rank's tokens come home.
#[derive(Clone, Copy)]
pub(in super::super) struct Way<'a> {
    /// Tokens of each rank.
    pub(in super::super) counts: &'a [usize],
    pub(in super::super) placement: &'a Placement,
    /// Of this rank's own tokens.
    pub(in super::super) routing: &'a Routing,
    /// Of the sums.
    pub(in super::super) dtype: DType,
}

impl Way<'_> {
    fn num_tokens(&self) -> usize {
        self.counts.iter().sum()
    }
}

impl Peer {
    /// Sends each of this rank's tokens to the ranks that have some of its experts. `hidden` and `routing` have
    /// `counts[rank]` rows, and the ids are physical experts. What `beside` puts on the stream stands between sending and
    /// waiting for the others, in captures and from [`Communicator::start_serving`] on: before, it may load kernels, and comes
    /// first.
    pub(in super::super) fn push<T>(
        &mut self,
        counts: &[usize],
        placement: &Placement,
        (hidden, routing): (&Tensor, &Routing),
        beside: Option<impl FnOnce() -> CandleResult<T>>,
    ) -> Result<(Pushed, Option<CandleResult<T>>), EpError> {
        let waits = beside.is_none();
        // A stream that does not say whether it is captured will not take the call either.
        let may_load = !self.ground.is_serving() && !self.ground.is_captured().unwrap_or(false);
        let (beside, first) = match beside {
            Some(beside) if may_load => (None, Some(beside())),
            beside => (beside, None),
        };
        let (hidden_size, top_k) = (hidden.dims()[1], routing.topk_ids.dims()[1]);
        let terms = self.ground.place().all_gather(hidden, counts);
        let shape = vec![hidden_size, top_k, placement.num_physical()];
        let terms = terms.map(|terms| Terms { shape, ..terms });
        let (site, _, arrived) = self.ground.announce(Collective::Dispatch, terms, Vec::new())?;
        let num_tokens: usize = counts.iter().sum();
        let turn = self.dispatches;
        self.dispatches = turn.wrapping_add(1);
        let to_hidden = self.room(&site, (Use::Hidden, hidden.dtype()), num_tokens * hidden_size, turn)?;
        let to_ids = self.room(&site, (Use::Ids, DType::U32), num_tokens * top_k, turn)?;
        let to_weights = self.room(&site, (Use::Weights, DType::F32), num_tokens * top_k, turn)?;
        let (own, own_ids, own_weights, owners) = self.prepared(&site, || {
            let Routing { topk_ids, topk_weights } = routing;
            Ok((aligned(hidden)?, aligned(topk_ids)?, aligned(topk_weights)?, Owners::new(placement)?))
        })?;
        let begin = first_of(counts, self.rank());
        let row_bytes = hidden_size * hidden.dtype().size_in_bytes();
        self.put(&site, arrived, |cuda, group| {
            let arguments = DispatchArguments {
                group,
                owners,
                hidden: address_of(&own, cuda)?,
                topk_ids: address_of(&own_ids, cuda)?,
                topk_weights: address_of(&own_weights, cuda)?,
                to_hidden: to_hidden.at(begin * row_bytes),
                to_topk_ids: to_ids.at(begin * top_k * size_of::<u32>()),
                to_topk_weights: to_weights.at(begin * top_k * size_of::<f32>()),
                num_tokens: own_ids.dims()[0] as u32,
                top_k: top_k as u32,
                row_units: 0,
                waits: u32::from(waits),
            };
            // SAFETY: every rank has rooms for the tokens of all, this one's from `begin` on, and all ranks have met.
            unsafe { kernels::push(cuda, arguments, row_bytes) }.map_err(|error| tensor_kind(&error))
        })?;
        let made = first.or_else(|| beside.map(|beside| beside()));
        if !waits {
            // Also where that failed: the others have heard that this rank came.
            let (cuda, group) = (self.ground.cuda.clone(), self.group);
            // SAFETY: all ranks have met, to push.
            let arrive = || unsafe { kernels::arrive(&cuda, group) }.map_err(|error| words(tensor_kind(&error)));
            let arrives = self.ground.enqueue_more(&site, |_, _| arrive());
            arrives.map_err(|kind| self.ground.control.give_up(&site, kind))?;
        }
        self.ground.leave(&site)?;
        let pushed = self.prepared(&site, || {
            Ok(Pushed {
                hidden: to_hidden.view(num_tokens, hidden_size)?,
                topk_ids: to_ids.view(num_tokens, top_k)?,
                topk_weights: to_weights.view(num_tokens, top_k)?,
            })
        })?;
        Ok((pushed, made))
    }

    /// Pulls the ranks' sums over their slots, `[num_received, hidden_size]` on each, and adds them in rank order:
    /// `[counts[rank], hidden_size]`.
    pub(in super::super) fn pull_sums(&mut self, sums: &Tensor, way: Way<'_>) -> Result<Tensor, EpError> {
        self.pull(Pulled::Sums, sums, None, way)
    }

    /// Pulls the rows of slots, `[num_slots, hidden_size]` on each rank where `slot_rank` says, and adds them in slot order.
    pub(in super::super) fn pull_rows(
        &mut self,
        rows: &Tensor,
        slot_rank: &Tensor,
        way: Way<'_>,
    ) -> Result<Tensor, EpError> {
        self.pull(Pulled::Rows, rows, Some(slot_rank), way)
    }

    fn pull(
        &mut self,
        what: Pulled,
        results: &Tensor,
        slot_rank: Option<&Tensor>,
        way: Way<'_>,
    ) -> Result<Tensor, EpError> {
        let (hidden_size, top_k) = (results.dims()[1], way.routing.topk_ids.dims()[1]);
        let shape = vec![hidden_size, top_k, usize::from(what == Pulled::Rows)];
        let terms = Terms { dtype: Some(results.dtype()), shape, counts: way.counts.to_vec() };
        let (site, _, arrived) = self.ground.announce(Collective::Combine, Ok(terms), Vec::new())?;
        let (rank, turn, num_slots) = (self.rank(), self.combines, way.num_tokens() * top_k);
        self.combines = turn.wrapping_add(1);
        let room = self.room(&site, (Use::Results, results.dtype()), results.elem_count(), turn)?;
        let places = match slot_rank {
            Some(_) => Some(self.room(&site, (Use::Places, DType::U32), num_slots, turn)?),
            None => None,
        };
        let (ids, weights, results, slot_rank, owners) = self.prepared(&site, || {
            let Routing { topk_ids, topk_weights } = way.routing;
            let slot_rank = slot_rank.map(Tensor::contiguous).transpose()?;
            let owners = Owners::new(way.placement)?;
            Ok((aligned(topk_ids)?, aligned(topk_weights)?, results.contiguous()?, slot_rank, owners))
        })?;
        let (first, num_tokens) = (first_of(way.counts, rank), way.counts.get(rank).copied().unwrap_or(0));
        let behind = if what == Pulled::Sums { first * hidden_size * results.dtype().size_in_bytes() } else { 0 };
        let slots_behind = first * top_k * size_of::<u32>();
        let (cuda, group) = (self.ground.cuda.clone(), self.group);
        let put = |stream: &_, to: u64| -> Result<(), EpErrorKind> {
            copy(address_of(&results, &cuda)?, room.begin(rank), bytes_of(&results), stream)?;
            if let (Some(slot_rank), Some(places)) = (&slot_rank, &places) {
                copy(address_of(slot_rank, &cuda)?, places.begin(rank), bytes_of(slot_rank), stream)?;
            }
            let arguments = CombineArguments {
                group,
                owners,
                rows: room.at(behind),
                slot_rank: places.as_ref().map_or([0; MAX_RANKS], |places| places.at(slots_behind)),
                topk_ids: address_of(&ids, &cuda)?,
                topk_weights: address_of(&weights, &cuda)?,
                sums: to,
                num_tokens: num_tokens as u32,
                top_k: top_k as u32,
                hidden_size: hidden_size as u32,
            };
            // SAFETY: every rank has a room with results for the tokens of all, and all ranks have met.
            unsafe { kernels::pull(&cuda, arguments, what, (results.dtype(), way.dtype)) }
                .map_err(|error| tensor_kind(&error))
        };
        let sums = fresh(&cuda, way.dtype, &[num_tokens, hidden_size], |to| {
            self.ground.enqueue(&site, arrived, |_, stream| put(stream, to).map_err(words))
        });
        let sums = sums.map_err(|kind| self.ground.control.give_up(&site, kind))?;
        self.ground.leave(&site)?;
        Ok(sums)
    }

    /// Puts work on the stream, watched.
    fn put(
        &mut self,
        site: &Site,
        arrived: Instant,
        work: impl FnOnce(&candle_core::CudaDevice, kernels::Group) -> Result<(), EpErrorKind>,
    ) -> Result<(), EpError> {
        let (cuda, group) = (self.ground.cuda.clone(), self.group);
        let done = self.ground.enqueue(site, arrived, |_, _| work(&cuda, group).map_err(words));
        done.map_err(|kind| self.ground.control.give_up(site, kind))
    }
}

/// The first of a rank's tokens among those of all.
fn first_of(counts: &[usize], rank: usize) -> usize {
    counts.iter().take(rank).sum()
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}

/// Contiguous, at a multiple of 16 bytes.
fn aligned(tensor: &Tensor) -> CandleResult<Tensor> {
    let tensor = tensor.contiguous()?;
    let start = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
    if start.is_multiple_of(16) { Ok(tensor) } else { tensor.force_contiguous() }
}
