//! What the blocks of a group must have in common, compared before the first step.

use super::MoeBlock;
use crate::ep::{Communicator, Fingerprint};
use crate::experts::Experts;
use candle_core::Result;

impl MoeBlock {
    /// Compares the ranks' blocks, all layers in one exchange. A collective, for start-up: every rank calls it once, with its
    /// blocks of the same layers.
    ///
    /// Compared are the number of layers and, for each, the [`fingerprint`](Self::fingerprint).
    ///
    /// # Errors
    /// Those of [`Fingerprint::agree`]: ranks that differ get the same error, which names rank, layer, field and both values.
    pub fn agree(blocks: &[Self], communicator: &mut dyn Communicator) -> Result<()> {
        let mut all = Fingerprint::new().with("layers", blocks.len());
        for (layer, block) in blocks.iter().enumerate() {
            all = all.with_all(&format!("layer {layer} "), &block.fingerprint());
        }
        all.agree(communicator)
    }

    /// What must be the same on every rank: the label, shapes, formats and dtypes, routing, strategy, reduction, placement, perfect routing,
    /// and whether slots are counted. Weights themselves are not compared.
    pub fn fingerprint(&self) -> Fingerprint {
        let perfect = &self.perfect_config;
        let shared = self.shared_experts.as_ref().map_or("none".into(), shared_experts);
        let imbalance = perfect.imbalance.map_or("none".into(), |imbalance| format!("{imbalance:?}"));
        Fingerprint::new()
            .with("label", self.label().unwrap_or("none"))
            .with("num_experts", self.placement.num_experts())
            .with("top_k", self.router.top_k())
            .with("hidden_size", self.experts.hidden_size())
            .with("intermediate_size", self.experts.intermediate_size())
            .with("gate_dtype", self.gate.format())
            .with("router_dtype", self.router_dtype.map_or("that of hidden", |dtype| dtype.as_str()))
            .with("routing_method", self.router.method())
            .with("gate_up_weights", gate_up_weights(&self.experts))
            .with("down_weights", self.experts.down().weights().format())
            .with("activation", format!("{:?}", self.experts.activation()))
            .with("shared_experts", shared)
            .with("ep_size", self.placement.ep_size())
            .with("strategy", self.choice.strategy())
            .with("reduction", self.reduction)
            .with("placement", &self.placement)
            .with("perfect_router", if self.is_perfect() { "on" } else { "off" })
            .with("perfect_router_schedule", perfect.schedule)
            .with("perfect_router_imbalance", imbalance)
            .with("statistics", if self.load.is_some() { "on" } else { "off" })
    }
}

/// Format and order of rows, such as `mxfp4 Interleaved`.
fn gate_up_weights(experts: &Experts) -> String {
    format!("{} {:?}", experts.gate_up().weights().format(), experts.gate_up_rows())
}

fn shared_experts(shared: &Experts) -> String {
    let (num, size) = (shared.num_experts(), shared.intermediate_size());
    let (gate_up, down) = (gate_up_weights(shared), shared.down().weights().format());
    format!("{num} of intermediate_size {size}, {gate_up}, {down}, {:?}", shared.activation())
}
