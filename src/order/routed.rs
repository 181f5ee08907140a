//! From router logits to expert order.

use super::{ExpertMap, ExpertOrder, OP, OrderSpec, TileMap};
use crate::routing::{Router, Routing};
use candle_core::{Result, Tensor, bail};
use std::ops::Range;

/// What an order keeps, renames and adds.
#[derive(Debug, Clone, Default)]
pub struct OrderOptions {
    /// The experts whose slots are in the order: of the physical ones where there is a map. All, unless set.
    pub local_experts: Option<Range<usize>>,
    /// Which physical experts hold the experts that routing chooses. Each expert is one physical expert, unless set.
    pub map: Option<ExpertMap>,
    /// Rows of a tile, for a tile map.
    pub tile_rows: Option<usize>,
    /// Tokens that are no padding, as in [`Router::route_padded`]. All, unless set.
    pub num_valid_tokens: Option<Tensor>,
}

/// Routing with the order of its slots.
#[derive(Debug, Clone)]
pub struct RoutedOrder {
    /// Ids, of the experts that the router knows, and weights.
    pub routing: Routing,
    /// The slots in expert order.
    pub order: ExpertOrder,
    /// Tiles of the order, where they were asked for.
    pub tiles: Option<TileMap>,
}

impl RoutedOrder {
    /// Routes `router_logits` `[num_tokens, num_experts]` and orders the slots.
    ///
    /// The same as [`Router::route`] (or [`Router::route_padded`]), [`ExpertOrder::new`] (or [`ExpertOrder::with_map`]) and
    /// [`ExpertOrder::tile_map`]. On CUDA it takes one launch for up to 16 tokens of up to 1024 experts, `top_k` up to 32 and
    /// up to 32 groups; where f16 or bf16 logits are compared themselves, which [`RoutingMethod::Default`] does not, with
    /// `top_k` up to 8 and up to 512 experts, one launch for up to 32 to 128 tokens and two for more. Everything else is
    /// routed and ordered in turn.
    ///
    /// [`RoutingMethod::Default`]: crate::routing::RoutingMethod::Default
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_moe::order::{OrderOptions, RoutedOrder};
    /// use candle_moe::routing::{Router, RoutingMethod};
    /// let router = Router::new(RoutingMethod::Renormalize, 1)?;
    /// let logits = Tensor::new(&[[0f32, 1.], [1., 0.], [0., 1.]], &Device::Cpu)?;
    /// let routed = RoutedOrder::new(&router, &logits, &OrderOptions::default())?;
    /// assert_eq!(routed.order.sorted_slots.to_vec1::<u32>()?, [1, 0, 2]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As those three.
    pub fn new(router: &Router, router_logits: &Tensor, options: &OrderOptions) -> Result<Self> {
        let &[num_tokens, num_experts] = router_logits.dims() else {
            bail!("{OP}: router_logits has shape {:?}, expected [num_tokens, num_experts]", router_logits.shape())
        };
        let spec = OrderSpec::new(num_tokens, router.top_k(), num_experts, options)?;
        if let Some(num_valid) = &options.num_valid_tokens {
            Router::check_num_valid(router_logits, num_valid)?;
        }
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(_) = router_logits.device() {
            return Self::on_cuda(router, router_logits, options, spec);
        }
        Self::separately(router, router_logits, options, spec)
    }

    fn separately(router: &Router, logits: &Tensor, options: &OrderOptions, spec: OrderSpec) -> Result<Self> {
        let routing = match &options.num_valid_tokens {
            Some(num_valid) => router.route_padded(logits, num_valid)?,
            None => router.route(logits)?,
        };
        let (order, tiles) = ExpertOrder::of(&routing.topk_ids, spec)?;
        Ok(Self { routing, order, tiles })
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(router: &Router, logits: &Tensor, options: &OrderOptions, spec: OrderSpec) -> Result<Self> {
        use std::sync::{Arc, OnceLock};
        super::cuda::check(&spec)?;
        if !super::cuda::fuses(logits, router) {
            return Self::separately(router, logits, options, spec);
        }
        let ordered = Arc::new(OnceLock::new());
        let (router_of_op, num_valid, slot) = (router.clone(), options.num_valid_tokens.clone(), ordered.clone());
        let body = move |storage: &candle_core::CudaStorage, layout: &candle_core::Layout| {
            let spec = spec.clone();
            let routed = super::cuda::route_and_order(storage, layout, &router_of_op, num_valid.as_ref(), spec)?;
            // The first application stays, as in routing.
            let _ = slot.set((routed.order, routed.tiles));
            Ok((routed.topk_ids, routed.topk_weights))
        };
        let routing = router.route_with(logits, Arc::new(body))?;
        match ordered.get().cloned() {
            Some((order, tiles)) => Ok(Self { routing, order, tiles }),
            None => bail!("{OP}: the op left no order"),
        }
    }
}
