//! One rank's part in measuring, whatever carries its rows.
//!
//! ```text
//! for every backend and batch size:
//!     check       dispatch, hand back what was received, combine: is it what it should be on every rank?
//!     warm up and time, again and again:
//!         barrier, dispatch    timed from leaving the barrier
//!         barrier, combine     timed from leaving the barrier
//!     tell all ranks the samples
//! ```
//!
//! 1. What the experts make of the tokens is worked out once, by the check, so that nothing but communication stands between
//!    two barriers.
//! 2. No backend may be at an advantage by its place in the order, so the allocator is settled before the first.
//! 3. On a device the time is the device's: `device.rs`.
//! 4. Ranks leave a barrier one after the other, and whoever leaves first waits for the others in dispatch. So every rank
//!    notes when it entered, on a clock that all share, and the report says how late each of them was.

use crate::backends::Backend;
use crate::check::first_mismatch;
use crate::clock::{Clock, nanoseconds};
use crate::measurement::{Measurement, Samples, Volume};
use crate::settings::Settings;
use crate::workload::{Tokens, nothing};
use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_moe::ep::{
    Communicator, Dispatched, Metered, Reduction, Sharing, Step, Strategy, Transfer, combine, combine_sums, dispatch,
};
use candle_moe::experts::weighted_sum;
use candle_moe::order::{ExpertOrder, NO_SLOT};
use std::hint::black_box;
use std::time::Instant;

/// A little less than the largest block that glibc keeps.
const SETTLING_BYTES: usize = (32 << 20) - (64 << 10);

/// Measures all batch sizes with all backends, with tensors on `device`; a collective, and every rank gets the same result. `begin` hears
/// what comes, and how much is done.
pub(crate) fn measure(
    communicator: &mut dyn Communicator,
    device: &Device,
    settings: &Settings,
    backends: &[Backend],
    begin: &dyn Fn(String, usize),
) -> Result<Vec<Measurement>> {
    settings.agree(communicator, backends)?;
    settle_allocator();
    let clock = Clock::new();
    let mut measurements = Vec::new();
    for backend in backends {
        for &local_batch_size in &settings.local_batch_sizes {
            let title = format!("{backend}, {local_batch_size} tokens per rank");
            communicator.set_label(&title);
            begin(title, measurements.len());
            let layer = Layer::new(communicator, device, settings, backend, local_batch_size)?;
            let (round, volume) = layer.check(communicator)?;
            let samples = layer.time(communicator, &round, clock, volume, backend)?;
            let ranks = all_samples(communicator, &samples)?;
            measurements.push(Measurement::new(settings, backend, local_batch_size, ranks)?);
        }
    }
    Ok(measurements)
}

/// Brings the allocator into the state of a program that has run for a while.
///
/// The one of glibc maps a block that is larger than any freed before anew each time, up to 32 MiB, and its pages are cleared
/// again. So whatever is measured first would pay for what comes later, several times over.
fn settle_allocator() {
    drop(black_box(vec![0u8; SETTLING_BYTES]));
}

/// Everybody's samples, in rank order.
fn all_samples(communicator: &mut dyn Communicator, samples: &Samples) -> Result<Vec<Samples>> {
    let ranks = communicator.all_gather_bytes(&serde_json::to_vec(samples)?)?;
    Ok(ranks.iter().map(|bytes| serde_json::from_slice(bytes)).collect::<Result<_, _>>()?)
}

/// What this rank sends, and to whom.
pub(crate) struct Layer<'a> {
    pub(crate) settings: &'a Settings,
    sharing: Sharing<'a>,
    step: Step,
    /// On the host.
    tokens: Tokens,
    /// Where they are sent from.
    placed: Tokens,
    title: String,
}

/// What the experts of this rank were given and hand back.
pub(crate) struct Round {
    order: ExpertOrder,
    results: Results,
}

/// As combine takes them.
enum Results {
    /// Of each slot.
    Rows(Tensor),
    /// Of each token.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for devices that reach each other's memory"))]
    Sums(Tensor),
}

impl<'a> Layer<'a> {
    fn new(
        communicator: &mut dyn Communicator,
        device: &Device,
        settings: &'a Settings,
        backend: &Backend,
        local_batch_size: usize,
    ) -> Result<Self> {
        let tokens = match backend.strategy {
            Strategy::Replicated => Tokens::of_all_ranks(settings, local_batch_size)?,
            _ => Tokens::of_rank(settings, local_batch_size, communicator.rank())?,
        };
        let step = Step::agree(communicator, tokens.hidden.dim(0)?)?;
        let Settings { reduction, placement, .. } = settings;
        let sharing = Sharing { strategy: backend.strategy, reduction: *reduction, placement };
        let placed = tokens.to_device(device)?;
        Ok(Self {
            settings,
            sharing,
            step,
            tokens,
            placed,
            title: format!("{backend}, {local_batch_size} tokens per rank"),
        })
    }

    pub(crate) fn dispatch(&self, communicator: &mut dyn Communicator) -> candle_core::Result<Dispatched> {
        dispatch(communicator, &self.step, &self.sharing, &self.placed.hidden, &self.placed.routing)
    }

    /// One round; an error on every rank if the result of one is wrong.
    fn check(&self, communicator: &mut dyn Communicator) -> Result<(Round, Volume)> {
        let mut metered = Metered::new(communicator);
        let dispatched = self.dispatch(&mut metered)?;
        let sent = metered.take_transfers();
        let round = self.hand_back(metered.rank(), &dispatched)?;
        let combined = self.combine(&mut metered, &dispatched, &round)?;
        let volume = match self.sharing.strategy {
            Strategy::Peer => self.volume_of_peer(metered.rank(), &dispatched, &round)?,
            _ => Volume::new(round.num_rows()?, &sent, &metered.take_transfers()),
        };
        let Tokens { hidden, routing } = &self.tokens;
        communicator.settle()?;
        let combined = combined.to_device(&Device::Cpu)?;
        let mismatch = first_mismatch(hidden, &routing.topk_weights, &combined, self.rounding())?.unwrap_or_default();
        let mismatches = communicator.all_gather_bytes(mismatch.as_bytes())?;
        match mismatches.iter().enumerate().find(|(_, mismatch)| !mismatch.is_empty()) {
            Some((rank, mismatch)) => {
                bail!("check failed: {}: rank {rank}, {}", self.title, String::from_utf8_lossy(mismatch))
            }
            None => Ok((round, volume)),
        }
    }

    /// Experts that return what they are given.
    fn hand_back(&self, rank: usize, dispatched: &Dispatched) -> Result<Round> {
        let local_experts = self.sharing.placement.local(rank)?;
        let order = ExpertOrder::new(dispatched.topk_ids(), self.settings.num_experts, local_experts)?;
        let hidden = dispatched.hidden();
        // On a device there is a row for each slot, whoever it is for.
        let num_rows = match hidden.device() {
            Device::Cpu => order.expert_counts.to_vec1::<u32>()?.iter().sum::<u32>() as usize,
            _ => order.num_tokens() * order.top_k(),
        };
        let rows = match num_rows {
            0 => nothing((0, self.settings.hidden_size), DType::F32, hidden.device())?,
            _ => {
                let slots = order.sorted_slots.narrow(0, 0, num_rows)?.to_vec1::<u32>()?;
                // Nobody reads the rows behind the last slot.
                let token = |slot: &u32| if *slot == NO_SLOT { 0 } else { slot / self.settings.top_k as u32 };
                let tokens = Tensor::from_vec(slots.iter().map(token).collect::<Vec<_>>(), num_rows, hidden.device())?;
                hidden.contiguous()?.index_select(&tokens, 0)?.to_dtype(DType::F32)?
            }
        };
        if self.sharing.strategy != Strategy::Peer {
            return Ok(Round { order, results: Results::Rows(rows) });
        }
        let dtype = hidden.dtype();
        let results = match dispatched.weights_here() {
            Some(topk_weights) => Results::Sums(weighted_sum(&rows, topk_weights, &order)?.to_dtype(dtype)?),
            None => Results::Rows(rows.to_dtype(dtype)?),
        };
        Ok(Round { order, results })
    }

    pub(crate) fn combine(
        &self,
        communicator: &mut dyn Communicator,
        dispatched: &Dispatched,
        round: &Round,
    ) -> candle_core::Result<Tensor> {
        match &round.results {
            Results::Rows(rows) => combine(communicator, dispatched, rows, &round.order),
            Results::Sums(sums) => combine_sums(communicator, dispatched, sums),
        }
    }

    /// As [`combine`](Self::combine), of results that lie where the others fetch them from, where there is such a place: those of two
    /// rounds before.
    #[cfg(feature = "cuda")]
    pub(crate) fn combine_in_place(
        &self,
        communicator: &mut dyn Communicator,
        dispatched: &Dispatched,
        round: &Round,
    ) -> candle_core::Result<Tensor> {
        let (Results::Rows(results) | Results::Sums(results)) = &round.results;
        let (num_rows, hidden_size) = results.dims2()?;
        let Some(peer) = communicator.as_peer().filter(|_| num_rows > 0) else {
            return self.combine(communicator, dispatched, round);
        };
        let results = peer.room_for_results(results.dtype(), num_rows, hidden_size)?;
        match &round.results {
            Results::Rows(_) => combine(communicator, dispatched, &results, &round.order),
            Results::Sums(_) => combine_sums(communicator, dispatched, &results),
        }
    }

    /// What partial sums lose on their way, relative to their terms.
    fn rounding(&self) -> f64 {
        match (self.sharing.strategy, self.sharing.reduction, self.settings.dtype) {
            (Strategy::Peer, Reduction::RankPartial, DType::BF16) => 2f64.powi(-8),
            (Strategy::Peer, Reduction::RankPartial, DType::F16) => 2f64.powi(-11),
            _ => 0.0,
        }
    }

    /// What kernels move, as it follows from where tokens go.
    fn volume_of_peer(&self, rank: usize, dispatched: &Dispatched, round: &Round) -> Result<Volume> {
        let Settings { ep_size, hidden_size, top_k, dtype, placement, .. } = self.settings;
        let all = dispatched.topk_ids().to_vec2::<u32>()?;
        let owners = |ids: &Vec<u32>| -> Result<Vec<usize>> {
            ids.iter().map(|&id| Ok(placement.owner(id as usize)?)).collect()
        };
        let counts = self.step.token_counts();
        let first: usize = counts[..rank].iter().sum();
        let (mut to, mut from, mut slots_to, mut slots_from) = (vec![0; *ep_size], 0, vec![0; *ep_size], 0);
        for (token, ids) in all.iter().enumerate() {
            let owners = owners(ids)?;
            let is_own = (first..first + counts[rank]).contains(&token);
            let here = owners.iter().filter(|&&owner| owner == rank).count();
            if !is_own {
                from += usize::from(here > 0);
                slots_from += here;
                continue;
            }
            for other in 0..*ep_size {
                let there = owners.iter().filter(|&&owner| owner == other).count();
                to[other] += usize::from(there > 0);
                slots_to[other] += there;
            }
        }
        let others = |of: &[usize]| of.iter().sum::<usize>() - of[rank];
        let row_bytes = hidden_size * dtype.size_in_bytes();
        let told = counts[rank] * top_k * (size_of::<u32>() + size_of::<f32>());
        // Rows that come home are those that went, or one for each slot.
        let (back, handed_back, kept) = match self.sharing.reduction {
            Reduction::RankPartial => (others(&to), from, to[rank]),
            Reduction::SlotOrder => (others(&slots_to), slots_from, slots_to[rank]),
        };
        Ok(Volume {
            expert_rows: round.num_rows()?,
            rows_sent: others(&to),
            rows_received: from,
            rows_kept: to[rank],
            combine_rows_sent: handed_back,
            combine_rows_received: back,
            dispatch_bytes_sent: others(&to) * row_bytes + told * (ep_size - 1),
            dispatch_bytes_kept: to[rank] * row_bytes + told,
            combine_bytes_sent: handed_back * row_bytes,
            combine_bytes_kept: kept * row_bytes,
        })
    }

    fn time(
        &self,
        communicator: &mut dyn Communicator,
        round: &Round,
        clock: Clock,
        volume: Volume,
        backend: &Backend,
    ) -> Result<Samples> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = self.placed.hidden.device() {
            let is_captured = self.settings.cuda_graph && backend.may_be_captured();
            return crate::device::time(self, communicator, round, (clock, volume), device, is_captured);
        }
        let _ = backend;
        let mut samples = Samples::new(volume);
        for iteration in 0..self.settings.warmup.saturating_add(self.settings.iters) {
            communicator.barrier()?;
            let arrived = Instant::now();
            let dispatched = self.dispatch(communicator)?;
            let dispatch_time = arrived.elapsed();
            communicator.barrier()?;
            let started = Instant::now();
            let combined = self.combine(communicator, &dispatched, round)?;
            let combine_time = started.elapsed();
            black_box(combined);
            if iteration >= self.settings.warmup {
                samples.dispatch_ns.push(nanoseconds(dispatch_time));
                samples.combine_ns.push(nanoseconds(combine_time));
                samples.arrival_ns.push(clock.read(arrived));
            }
        }
        Ok(samples)
    }
}

impl Round {
    /// Slots of this rank's experts.
    fn num_rows(&self) -> Result<usize> {
        Ok(self.order.expert_counts.to_vec1::<u32>()?.iter().sum::<u32>() as usize)
    }
}

impl Volume {
    /// `expert_rows`: slots of this rank's experts; and what dispatch and combine moved.
    fn new(expert_rows: usize, dispatched: &[Transfer], combined: &[Transfer]) -> Self {
        // Hidden states, ids and weights travel in as many rows.
        let rows = |transfers: &[Transfer], of: fn(&Transfer) -> usize| transfers.iter().map(of).max().unwrap_or(0);
        let bytes = |transfers: &[Transfer], of: fn(&Transfer) -> usize| transfers.iter().map(of).sum();
        Self {
            expert_rows,
            rows_sent: rows(dispatched, |transfer| transfer.rows_sent),
            rows_received: rows(dispatched, |transfer| transfer.rows_received),
            rows_kept: rows(dispatched, |transfer| transfer.rows_kept),
            combine_rows_sent: rows(combined, |transfer| transfer.rows_sent),
            combine_rows_received: rows(combined, |transfer| transfer.rows_received),
            dispatch_bytes_sent: bytes(dispatched, Transfer::bytes_sent),
            dispatch_bytes_kept: bytes(dispatched, Transfer::bytes_kept),
            combine_bytes_sent: bytes(combined, Transfer::bytes_sent),
            combine_bytes_kept: bytes(combined, Transfer::bytes_kept),
        }
    }
}
