//! One MoE layer of a checkpoint for one rank.

use super::Config;
use crate::block::MoeBlock;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::experts::{
    Activation, ExpertProjection, ExpertWeights, Experts, FP8_BLOCK, GateUpRows, Linear, fp8_row_scales,
};
use crate::host::{checked_product, with_slice};
use crate::models::MoeOptions;
use crate::routing::Router;
use candle_core::{DType, Device, Result, Tensor, WithDType, bail};
use float8::F8E4M3;
use half::{bf16, f16};

const OP: &str = "deepseek-v3 moe";
const FLOATS: [DType; 3] = [DType::BF16, DType::F32, DType::F16];

/// Reads the MoE layer `layer` for rank `ep_rank`: the gate, the shared experts, and the bytes of this rank's experts only;
/// then brings it to `options.device`.
///
/// `options.dtype` and `options.deadline` do not matter here: the block takes hidden states in f32, bf16 or f16. Its router
/// logits are f32 whatever the hidden states are, as in the published model.
///
/// Tensors, with `P` for `model.layers.N.mlp`:
///
/// | tensor | dtype | shape |
/// | --- | --- | --- |
/// | `P.gate.weight` | float | `[num_experts, hidden_size]` |
/// | `P.gate.e_score_correction_bias` | float | `[num_experts]` |
/// | `P.experts.E.{gate,up}_proj.weight` | float or F8_E4M3 | `[intermediate_size, hidden_size]` |
/// | `P.experts.E.down_proj.weight` | the same | `[hidden_size, intermediate_size]` |
/// | `P.shared_experts.{gate,up,down}_proj.weight` | float or F8_E4M3 | the same, `num_shared_experts` times as wide |
/// | `....weight_scale_inv`, with F8_E4M3 | f32 | one for each block of 128 x 128 |
///
/// Float means bf16, f16 or f32.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_moe::checkpoint::Checkpoint;
/// use candle_moe::models::{MoeOptions, deepseek_v3};
/// let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-deepseek-v3");
/// let config = deepseek_v3::Config::from_file(format!("{folder}/config.json"))?;
/// let checkpoint = Checkpoint::open(folder)?;
/// let block = deepseek_v3::load_moe_block(&checkpoint, &config, 3, &MoeOptions::default(), 0)?;
/// let hidden = Tensor::zeros((5, config.hidden_size), DType::F32, &Device::Cpu)?;
/// assert_eq!(block.forward_alone(&hidden)?.dims(), [5, 128]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A layer without experts or that does not exist; missing or unfit tensors; several ranks on CUDA.
pub fn load_moe_block(
    checkpoint: &Checkpoint,
    config: &Config,
    layer: usize,
    options: &MoeOptions,
    ep_rank: usize,
) -> Result<MoeBlock> {
    config.validate()?;
    if layer >= config.num_layers || layer < config.first_moe_layer {
        bail!("{OP}: layer is {layer}, expected {} to {}", config.first_moe_layer, config.num_layers - 1)
    }
    let placement = options.placement(layer - config.first_moe_layer, config.num_experts, ep_rank)?;
    let weights = Weights { checkpoint, prefix: format!("model.layers.{layer}.mlp") };
    let (hidden_size, num_experts) = (config.hidden_size, config.num_experts);
    let float = |name: &str, shape: &[usize]| {
        checkpoint.tensor(&format!("{}.{name}", weights.prefix), shape, &FLOATS, &Device::Cpu)
    };
    let gate = Linear::new(float("gate.weight", &[num_experts, hidden_size])?, None)?;
    let bias = float("gate.e_score_correction_bias", &[num_experts])?;
    let router = Router::new(config.routing_method(), config.top_k)?.with_selection_bias(&bias)?;
    let stems: Vec<_> = placement.experts_of(ep_rank)?.iter().map(|expert| format!("experts.{expert}")).collect();
    let mut builder = MoeBlock::builder(gate, router, weights.experts(&stems, hidden_size, config.intermediate_size)?);
    if config.num_shared_experts > 0 {
        let width = config.num_shared_experts * config.intermediate_size;
        builder = builder.shared_experts(weights.experts(&["shared_experts".into()], hidden_size, width)?);
    }
    builder
        .label(format!("layer {layer}"))
        .router_dtype(DType::F32)
        .placement(placement, ep_rank)
        .strategy(options.strategy)
        .reduction(options.reduction)
        .perfect_router(options.perfect_router)
        .statistics(true)
        .build()?
        .to_device(&options.device)
}

struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
}

impl Weights<'_> {
    /// The experts that `stems` name.
    fn experts(&self, stems: &[String], hidden_size: usize, intermediate_size: usize) -> Result<Experts> {
        let gate_up = self.projection(stems, &["gate_proj", "up_proj"], intermediate_size, hidden_size)?;
        let down = self.projection(stems, &["down_proj"], hidden_size, intermediate_size)?;
        Experts::new(gate_up, down, GateUpRows::Concatenated, Activation::Silu)
    }

    /// For each expert the matrices `parts` below each other, each `[rows, columns]`.
    fn projection(&self, stems: &[String], parts: &[&str], rows: usize, columns: usize) -> Result<ExpertProjection> {
        let name = |stem: &String, part: &&str| format!("{}.{stem}.{part}.weight", self.prefix);
        let names: Vec<_> = stems.iter().flat_map(|stem| parts.iter().map(move |part| name(stem, part))).collect();
        let shape = (stems.len(), parts.len() * rows, columns);
        // What the first is, all must be: reading them says otherwise.
        let info = self.checkpoint.info(&names[0])?;
        let weights = match info.dtype {
            Some(DType::F8E4M3) => {
                let values = self.stacked(&names, rows, columns, |v: F8E4M3| v.to_bits())?.reshape(shape)?;
                let scales = self.row_scales(&names, rows, columns)?.reshape((shape.0, shape.1, ()))?;
                let place =
                    || format!("{}, matrix {} and the {} after it", info.file.display(), names[0], names.len() - 1);
                ExpertWeights::fp8(values, scales).map_err(|error| error.context(place()))?
            }
            Some(DType::F32) => ExpertWeights::dense(self.stacked(&names, rows, columns, |v: f32| v)?.reshape(shape)?)?,
            Some(DType::F16) => ExpertWeights::dense(self.stacked(&names, rows, columns, |v: f16| v)?.reshape(shape)?)?,
            Some(DType::BF16) => {
                ExpertWeights::dense(self.stacked(&names, rows, columns, |v: bf16| v)?.reshape(shape)?)?
            }
            _ => {
                return Err(CheckpointError::WrongDtype {
                    file: info.file,
                    tensor: names[0].clone(),
                    found: info.dtype_name,
                    expected: ["bf16", "f16", "f32", "f8e4m3"].map(String::from).to_vec(),
                }
                .into());
            }
        };
        ExpertProjection::new(weights, None)
    }

    /// The tensors `[rows, columns]` below each other, each value through `convert`. One after the other, so that besides the
    /// result there is never more than one of them.
    fn stacked<T: WithDType, U: WithDType>(
        &self,
        names: &[String],
        rows: usize,
        columns: usize,
        convert: fn(T) -> U,
    ) -> Result<Tensor> {
        let len = checked_product(OP, ("rows", rows), ("columns", columns))?;
        let total = checked_product(OP, ("matrices", names.len()), ("values of a matrix", len))?;
        let mut all: Vec<U> = Vec::new();
        if all.try_reserve_exact(total).is_err() {
            bail!("{OP}: cannot allocate {total} values of {} bytes", size_of::<U>())
        }
        for name in names {
            let matrix = self.checkpoint.tensor(name, &[rows, columns], &[T::DTYPE], &Device::Cpu)?;
            with_slice(&matrix, OP, name, |values: &[T]| {
                all.extend(values.iter().map(|&value| convert(value)));
                Ok(())
            })?;
        }
        Tensor::from_vec(all, (names.len() * rows, columns), &Device::Cpu)
    }

    /// The scales of the tensors' rows below each other: `[rows of all, ceil(columns / 128)]`.
    fn row_scales(&self, names: &[String], rows: usize, columns: usize) -> Result<Tensor> {
        let blocks = [rows.div_ceil(FP8_BLOCK), columns.div_ceil(FP8_BLOCK)];
        let scales = names.iter().map(|name| {
            let scales = self.checkpoint.tensor(&format!("{name}_scale_inv"), &blocks, &[DType::F32], &Device::Cpu)?;
            if let Some(scale) = scales.flatten_all()?.to_vec1::<f32>()?.into_iter().find(|scale| !scale.is_finite()) {
                bail!("{OP}: {name}_scale_inv: a scale is {scale}, expected finite numbers")
            }
            fp8_row_scales(&scales.unsqueeze(0)?, rows)?.squeeze(0)
        });
        Tensor::cat(&scales.collect::<Result<Vec<_>>>()?, 0)
    }
}
