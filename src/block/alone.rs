//! A block of one rank on a device: the rooms in turn, and not a word to the host.
//!
//! ```text
//! gate     logits = round(W x + b)                     to the router's dtype
//! routing  RoutedOrder                                 ids, weights, order and tiles in one launch or two
//! experts  forward_weighted                            sums over the slots, rounded once where nothing is added
//! shared   forward_weighted of everyone, added in f32
//! ```

use super::{MoeBlock, MoeOutput, everyone_to};
use crate::ep::{Communicator, Step};
use crate::order::{OrderOptions, RoutedOrder};
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
        let routed = self.route_on_device(hidden, &router_logits, step)?;
        // Nothing is sent, but a group that was given up stays so.
        communicator.barrier()?;
        let sum = self.sum_on_device(hidden, &routed)?;
        if let Some(load) = &self.load {
            load.count_experts(&routed.order.expert_counts)?;
        }
        Ok(MoeOutput { hidden: sum, router_logits, routing: routed.routing })
    }

    fn route_on_device(&self, hidden: &Tensor, router_logits: &Tensor, step: &Step) -> Result<RoutedOrder> {
        let (router, logits) = self.logits_in_use(router_logits, step)?;
        let tile_rows =
            self.experts.tile_rows(hidden.dims()[0], self.router.top_k(), hidden.dtype(), hidden.device())?;
        let num_valid_tokens = step.num_valid_tokens().cloned();
        RoutedOrder::new(&router, &logits, &OrderOptions { tile_rows, num_valid_tokens, ..Default::default() })
    }

    /// What the experts make of the tokens, in the dtype of `hidden`.
    fn sum_on_device(&self, hidden: &Tensor, routed: &RoutedOrder) -> Result<Tensor> {
        if hidden.dims()[0] == 0 {
            // Candle launches nothing for no elements, and says that this is an error.
            return Ok(hidden.clone());
        }
        let RoutedOrder { routing, order, tiles } = routed;
        let weighted =
            |dtype| self.experts.forward_weighted(hidden, &routing.topk_weights, order, tiles.as_ref(), dtype);
        match &self.shared_experts {
            None => weighted(hidden.dtype()),
            Some(shared) => {
                (weighted(DType::F32)? + everyone_to(shared, hidden, &routing.topk_ids)?)?.to_dtype(hidden.dtype())
            }
        }
    }
}

/// `tensor` in `dtype`, also where it has no elements, of which Candle makes an error on CUDA.
fn converted(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    match *tensor.dims() {
        [0, width] => Tensor::zeros((1, width.max(1)), dtype, tensor.device())?.narrow(0, 0, 0)?.narrow(1, 0, width),
        _ => tensor.to_dtype(dtype),
    }
}
