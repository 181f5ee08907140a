//! A block on a device: the rooms in turn, and not a word to the host.
//!
//! ```text
//! gate     logits = round(W x + b)                     to the router's dtype
//! routing  RoutedOrder                                 ids, weights, order and tiles in one launch or two
//! experts  forward_weighted_to                         sums over the slots, rounded once where nothing is added
//! shared   forward_weighted of everyone, added in f32
//! ```
//!
//! Among several ranks dispatch and combine stand around the experts, as on the CPU, and the order is made of what dispatch brings;
//! shared experts work while tokens are on their way, where dispatch lets them ([`dispatch_beside`]).

use super::{MoeBlock, MoeOutput, everyone_to};
#[cfg(feature = "cuda")]
use crate::ep::work_among_peers;
use crate::ep::{Communicator, Dispatched, Sharing, Step, Strategy, combine, combine_sums, dispatch, dispatch_beside};
use crate::order::{ExpertOrder, OrderOptions, RoutedOrder};
use crate::routing::Routing;
use candle_core::{DType, Result, Tensor};

impl MoeBlock {
    /// [`forward_traced`](Self::forward_traced) of arguments that fit the group.
    pub(super) fn forward_on_device(
        &self,
        hidden: &Tensor,
        communicator: &mut dyn Communicator,
        step: &Step,
    ) -> Result<MoeOutput> {
        let router_logits = match self.router_dtype {
            Some(dtype) => self.gate.forward(&converted(hidden, dtype)?)?,
            None => self.gate.forward(hidden)?,
        };
        if self.choice.strategy() != Strategy::Solo {
            let (hidden, routing) = self.share_on_device(hidden, &router_logits, communicator, step)?;
            return Ok(MoeOutput { hidden, router_logits, routing });
        }
        // Before the routing: nothing is allocated between its kernels and those of the experts.
        let sum = self.experts.room_for_sums(hidden, self.dtype_of_sums(hidden))?;
        let routed = self.route_on_device(hidden, &router_logits, step)?;
        // Nothing is sent, but a group that was given up stays so.
        communicator.barrier()?;
        let sum = self.sum_on_device(hidden, &routed, sum)?;
        if let Some(load) = &self.load {
            load.count_experts(&routed.order.expert_counts)?;
        }
        Ok(MoeOutput { hidden: sum, router_logits, routing: routed.routing })
    }

    /// What the experts of all ranks make of this rank's tokens, in the dtype of `hidden`.
    fn share_on_device(
        &self,
        hidden: &Tensor,
        router_logits: &Tensor,
        communicator: &mut dyn Communicator,
        step: &Step,
    ) -> Result<(Tensor, Routing)> {
        let routing = self.route(router_logits, step)?;
        let sharing =
            Sharing { strategy: self.choice.strategy(), reduction: self.reduction, placement: &self.placement };
        let num_all = if sharing.strategy == Strategy::Replicated { hidden.dims()[0] } else { step.num_tokens() };
        let (dispatched, everyone) = match &self.shared_experts {
            Some(shared) => {
                let everyone = || match hidden.dims()[0] {
                    0 => Ok(None),
                    _ => everyone_to(shared, hidden, &routing.topk_ids, num_all).map(Some),
                };
                dispatch_beside(communicator, step, &sharing, hidden, &routing, everyone)?
            }
            None => (dispatch(communicator, step, &sharing, hidden, &routing)?, None),
        };
        let local = self.placement.local(self.ep_rank)?;
        let num_physical = self.placement.num_physical();
        let order = ExpertOrder::new(dispatched.topk_ids(), num_physical, local)?
            .among(num_all.saturating_mul(self.router.top_k()), num_physical);
        // As one rank would round them.
        let mut sum = self.work_on_device(communicator, &dispatched, &order, self.dtype_of_sums(hidden))?;
        if let Some(load) = &self.load {
            let counts = match self.choice.strategy() {
                Strategy::Exchange => self.counts_of_ranks(communicator, &order)?,
                _ => ExpertOrder::new(dispatched.topk_ids(), num_physical, 0..num_physical)?.expert_counts,
            };
            load.count_experts(&counts)?;
        }
        if hidden.dims()[0] == 0 {
            return Ok((hidden.clone(), routing));
        }
        if let Some(everyone) = everyone {
            sum = (sum + everyone)?;
        }
        Ok((sum.to_dtype(hidden.dtype())?, routing))
    }

    /// The experts' work on what dispatch brought, and the way home, to sums in `dtype` or float32.
    fn work_on_device(
        &self,
        communicator: &mut dyn Communicator,
        dispatched: &Dispatched,
        order: &ExpertOrder,
        dtype: DType,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.choice.strategy() == Strategy::Peer {
            return work_among_peers(communicator, dispatched, &self.experts, order, dtype);
        }
        let hidden = dispatched.hidden();
        let nothing = hidden.dims()[0] == 0;
        match dispatched.weights_here() {
            Some(_) if nothing => combine_sums(communicator, dispatched, &converted(hidden, DType::F32)?),
            Some(topk_weights) => {
                let sums = self.experts.forward_weighted(hidden, topk_weights, order, None, DType::F32)?;
                combine_sums(communicator, dispatched, &sums)
            }
            None if nothing => combine(communicator, dispatched, &converted(hidden, DType::F32)?, order),
            None => combine(communicator, dispatched, &self.experts.forward_as_weighted(hidden, order, dtype)?, order),
        }
    }

    fn route_on_device(&self, hidden: &Tensor, router_logits: &Tensor, step: &Step) -> Result<RoutedOrder> {
        let (router, logits) = self.logits_in_use(router_logits, step)?;
        let tile_rows =
            self.experts.tile_rows(hidden.dims()[0], self.router.top_k(), hidden.dtype(), hidden.device())?;
        let num_valid_tokens = step.num_valid_tokens().cloned();
        RoutedOrder::new(&router, &logits, &OrderOptions { tile_rows, num_valid_tokens, ..Default::default() })
    }

    /// Shared experts are added in float32.
    fn dtype_of_sums(&self, hidden: &Tensor) -> DType {
        if self.shared_experts.is_some() { DType::F32 } else { hidden.dtype() }
    }

    /// What the experts make of the tokens, in the dtype of `hidden`; `sums` is memory for those of the routed ones.
    fn sum_on_device(&self, hidden: &Tensor, routed: &RoutedOrder, sums: Tensor) -> Result<Tensor> {
        if hidden.dims()[0] == 0 {
            // Candle launches nothing for no elements, and says that this is an error.
            return Ok(hidden.clone());
        }
        let RoutedOrder { routing, order, tiles } = routed;
        self.experts.forward_weighted_to(hidden, &routing.topk_weights, order, tiles.as_ref(), &sums)?;
        let Some(shared) = &self.shared_experts else { return Ok(sums) };
        (sums + everyone_to(shared, hidden, &routing.topk_ids, hidden.dims()[0])?)?.to_dtype(hidden.dtype())
    }
}

/// `tensor` in `dtype`, also where it has no elements, of which Candle makes an error on CUDA.
fn converted(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    match *tensor.dims() {
        [0, width] => Tensor::zeros((1, width.max(1)), dtype, tensor.device())?.narrow(0, 0, 0)?.narrow(1, 0, width),
        _ => tensor.to_dtype(dtype),
    }
}
