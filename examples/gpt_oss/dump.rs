//! Writes what the model computed for the prompt, to be compared with other implementations.

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use candle_moe::models::gpt_oss::{Cache, Logits, Model, MoeLayers, ShardedMoe};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Runs the prompt and writes `logits` and `layers.N.{router_logits, topk_ids, topk_weights, moe_input, moe_output}` in
/// float32 and int64; returns the logits of the last token.
pub(crate) fn dump_prompt(model: &mut Model, ids: &[u32], cache: &mut Cache, file: &Path) -> Result<Vec<f32>> {
    let mut pieces = BTreeMap::new();
    let (decoder, moe) = model.parts_mut();
    for chunk in ids.chunks(256) {
        let mut recorder = Recorder { moe, pieces: &mut pieces };
        let logits = decoder.forward(chunk, cache, &mut recorder, Logits::All)?;
        recorder.keep("logits".into(), &logits, DType::F32)?;
    }
    let whole = |(name, pieces): (&String, &Vec<Tensor>)| Ok((name.clone(), Tensor::cat(pieces, 0)?));
    let tensors = pieces.iter().map(whole).collect::<Result<HashMap<_, _>>>()?;
    candle_core::safetensors::save(&tensors, file).with_context(|| format!("--dump {}", file.display()))?;
    let logits = &tensors["logits"];
    Ok(logits.narrow(0, ids.len() - 1, 1)?.flatten_all()?.to_vec1()?)
}

/// Stands in front of the MoE layers and keeps what passes, chunk by chunk.
struct Recorder<'a> {
    moe: &'a mut ShardedMoe,
    pieces: &'a mut BTreeMap<String, Vec<Tensor>>,
}

impl Recorder<'_> {
    fn keep(&mut self, name: String, tensor: &Tensor, dtype: DType) -> candle_core::Result<()> {
        self.pieces.entry(name).or_default().push(tensor.to_dtype(dtype)?);
        Ok(())
    }
}

impl MoeLayers for Recorder<'_> {
    fn begin(&mut self, first_token: usize, num_tokens: usize) -> candle_core::Result<()> {
        self.moe.begin(first_token, num_tokens)
    }

    fn forward(&mut self, layer: usize, hidden: &Tensor) -> candle_core::Result<Tensor> {
        let output = self.moe.forward_traced(layer, hidden)?;
        let name = |what: &str| format!("layers.{layer}.{what}");
        self.keep(name("router_logits"), &output.router_logits, DType::F32)?;
        self.keep(name("topk_ids"), &output.routing.topk_ids, DType::I64)?;
        self.keep(name("topk_weights"), &output.routing.topk_weights, DType::F32)?;
        self.keep(name("moe_input"), hidden, DType::F32)?;
        self.keep(name("moe_output"), &output.hidden, DType::F32)?;
        Ok(output.hidden)
    }

    fn end(&mut self) -> candle_core::Result<()> {
        self.moe.end()
    }
}
