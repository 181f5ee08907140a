//! A whole model, ready to generate.

use super::{Cache, Config, Decoder, Logits, ShardedMoe};
use crate::checkpoint::Checkpoint;
use crate::ep::{Communicator, reason};
use crate::models::MoeOptions;
use candle_core::{Result, Tensor};
use std::path::Path;

/// Prompt tokens that go through together, so that attention scores of a long prompt fit memory.
const PROMPT_CHUNK: usize = 256;

/// GPT-OSS from a checkpoint folder: the decoder in the caller's thread, the experts sharded over ranks.
///
/// ```
/// use candle_moe::models::gpt_oss::{Cache, Logits, Model, MoeOptions};
/// let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-gpt-oss");
/// let mut model = Model::load(folder, &MoeOptions { ep_size: 2, ..Default::default() }, &|_, _| ())?;
/// let mut cache = Cache::new(model.config());
/// let logits = model.forward(&[1, 2, 3], &mut cache, Logits::Last)?;
/// assert_eq!(logits.dims(), [1, 512]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Model {
    decoder: Decoder,
    moe: ShardedMoe,
}

impl Model {
    /// Loads `folder`: `config.json` and safetensors files in any of the [layouts](super), told apart by the names of the
    /// tensors. `progress(done, total)` hears of every part, from any thread.
    ///
    /// # Errors
    /// Everything that can be wrong with the checkpoint or the options, tensors of two layouts or of none included.
    pub fn load(
        folder: impl AsRef<Path>,
        options: &MoeOptions,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Self> {
        Self::with(folder.as_ref(), options, options.ep_size, progress, |checkpoint, config, step| {
            ShardedMoe::load(checkpoint, config, options, step)
        })
    }

    /// Loads `folder` as rank 0 of a group, of processes or of devices, of which every other rank [serves](super::serve) the
    /// same folder with the same options but for its own device: see [`ShardedMoe::join`].
    ///
    /// # Errors
    /// As [`Model::load`] and [`ShardedMoe::join`].
    pub fn join(
        folder: impl AsRef<Path>,
        options: &MoeOptions,
        communicator: Box<dyn Communicator>,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<Self> {
        Self::with(folder.as_ref(), options, 1, progress, |checkpoint, config, step| {
            ShardedMoe::join(checkpoint, config, options, communicator, step)
        })
    }

    /// `moe` reads the layers of `num_ranks` ranks.
    fn with(
        folder: &Path,
        options: &MoeOptions,
        num_ranks: usize,
        progress: &(dyn Fn(usize, usize) + Sync),
        moe: impl FnOnce(&Checkpoint, &Config, &(dyn Fn() + Sync)) -> Result<ShardedMoe>,
    ) -> Result<Self> {
        let config = Config::from_file(folder.join("config.json"))?;
        let checkpoint = Checkpoint::open(folder)?;
        let total = 1 + config.num_layers.saturating_mul(num_ranks);
        let done = std::sync::atomic::AtomicUsize::new(0);
        let step = || progress(1 + done.fetch_add(1, std::sync::atomic::Ordering::Relaxed), total);
        // Before the experts: when those are read, ranks wait for each other no longer than in serving.
        let decoder = Decoder::load(&checkpoint, &config, options.dtype, &options.device)?;
        step();
        let moe = moe(&checkpoint, &config, &step)?;
        Ok(Self { decoder, moe })
    }

    /// The model's description.
    pub fn config(&self) -> &Config {
        self.decoder.config()
    }

    /// The decoder without its MoE layers.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The MoE layers.
    pub fn moe(&self) -> &ShardedMoe {
        &self.moe
    }

    /// The MoE layers, to switch them or to count anew.
    pub fn moe_mut(&mut self) -> &mut ShardedMoe {
        &mut self.moe
    }

    /// Both halves, for callers that put themselves between them.
    pub fn parts_mut(&mut self) -> (&Decoder, &mut ShardedMoe) {
        (&self.decoder, &mut self.moe)
    }

    /// Runs `input_ids` after what `cache` holds, in one piece; logits are f32 `[num_tokens or 1, vocab_size]`.
    ///
    /// Where ranks are devices this waits until all have done their part, no longer than the deadline.
    ///
    /// # Errors
    /// As [`Decoder::forward`]. An error ends the group of ranks: load the model again.
    pub fn forward(&mut self, input_ids: &[u32], cache: &mut Cache, logits: Logits) -> Result<Tensor> {
        self.decoder.check(input_ids, cache)?;
        let output = self.decoder.forward(input_ids, cache, &mut self.moe, logits);
        if let Err(error) = &output {
            self.moe.abort(&reason(error));
        }
        output
    }

    /// Runs a prompt in chunks; the logits of its last token, f32 `[vocab_size]`. `progress` hears of every chunk with the
    /// tokens done.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn prompt(
        &mut self,
        input_ids: &[u32],
        cache: &mut Cache,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<f32>> {
        self.decoder.check(input_ids, cache)?;
        let mut logits = None;
        let mut done = 0;
        for chunk in input_ids.chunks(PROMPT_CHUNK) {
            logits = Some(self.forward(chunk, cache, Logits::Last)?);
            done += chunk.len();
            progress(done);
        }
        match logits {
            Some(logits) => logits.flatten_all()?.to_vec1(),
            None => candle_core::bail!("gpt-oss: the prompt is empty, expected at least one token"),
        }
    }
}
