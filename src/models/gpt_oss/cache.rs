//! Keys and values of the positions that later tokens can see.

use super::Config;
use candle_core::{Result, Tensor, bail};

/// Positions of room in a new full-attention buffer; it doubles when it is full.
const MIN_CAPACITY: usize = 256;

/// The key-value cache of one sequence.
///
/// A sliding layer keeps its last `sliding_window` positions, a full layer all of them in a buffer that doubles as it
/// fills, up to the longest sequence of the model.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
    len: usize,
    max_len: usize,
}

#[derive(Debug)]
pub(super) struct LayerCache {
    /// `None` for full attention.
    window: Option<usize>,
    max_len: usize,
    kept: Option<Kept>,
}

/// Keys and values, `[num_key_value_heads, capacity, head_dim]`, of which the first `len` positions are in use.
#[derive(Debug)]
struct Kept {
    keys: Tensor,
    values: Tensor,
    len: usize,
}

impl Cache {
    /// An empty cache for a model.
    pub fn new(config: &Config) -> Self {
        let max_len = config.max_position_embeddings;
        let layer =
            |&sliding: &bool| LayerCache { window: sliding.then_some(config.sliding_window), max_len, kept: None };
        Self { layers: config.sliding_layers.iter().map(layer).collect(), len: 0, max_len }
    }

    /// Positions seen so far: the position of the next token.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was seen yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that each layer keeps.
    pub fn kept_positions(&self) -> Vec<usize> {
        self.layers.iter().map(|layer| layer.kept.as_ref().map_or(0, |kept| kept.len)).collect()
    }

    /// Forgets the sequence.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(|layer| layer.kept = None);
        self.len = 0;
    }

    pub(super) fn num_layers(&self) -> usize {
        self.layers.len()
    }

    pub(super) fn layer(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }

    pub(super) fn check_room(&self, num_tokens: usize) -> Result<()> {
        match self.len.checked_add(num_tokens) {
            Some(len) if len <= self.max_len => Ok(()),
            _ => bail!(
                "gpt-oss cache: {} positions and {num_tokens} tokens, expected at most {} in all",
                self.len,
                self.max_len
            ),
        }
    }

    pub(super) fn advance(&mut self, num_tokens: usize) {
        self.len += num_tokens;
    }
}

impl LayerCache {
    /// Adds keys and values `[num_key_value_heads, num_tokens, head_dim]`; returns what these tokens can see, oldest first
    /// and themselves last.
    pub(super) fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        match self.window {
            Some(window) => self.append_sliding(keys, values, window),
            None => self.append_full(keys, values),
        }
    }

    fn append_sliding(&mut self, keys: &Tensor, values: &Tensor, window: usize) -> Result<(Tensor, Tensor)> {
        let (keys, values) = match &self.kept {
            None => (keys.clone(), values.clone()),
            Some(kept) => (Tensor::cat(&[&kept.keys, keys], 1)?, Tensor::cat(&[&kept.values, values], 1)?),
        };
        let all = keys.dims()[1];
        let len = all.min(window);
        let tail = |t: &Tensor| t.narrow(1, all - len, len)?.force_contiguous();
        self.kept = Some(Kept { keys: tail(&keys)?, values: tail(&values)?, len });
        Ok((keys, values))
    }

    fn append_full(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let held = self.kept.as_ref().map_or(0, |kept| kept.len);
        let len = held + keys.dims()[1];
        let capacity = self.kept.as_ref().map_or(0, |kept| kept.keys.dims()[1]);
        if len > capacity {
            let capacity = len.max(2 * capacity).max(MIN_CAPACITY).min(self.max_len.max(len));
            let grow = |new: &Tensor, old: Option<&Tensor>| {
                let buffer = Tensor::zeros((new.dims()[0], capacity, new.dims()[2]), new.dtype(), new.device())?;
                if let Some(old) = old {
                    buffer.slice_set(&old.narrow(1, 0, held)?.contiguous()?, 1, 0)?;
                }
                Ok::<_, candle_core::Error>(buffer)
            };
            let old = self.kept.as_ref();
            self.kept = Some(Kept {
                keys: grow(keys, old.map(|kept| &kept.keys))?,
                values: grow(values, old.map(|kept| &kept.values))?,
                len: held,
            });
        }
        let Some(kept) = &mut self.kept else { bail!("gpt-oss cache: no buffer for {len} positions") };
        kept.keys.slice_set(&keys.contiguous()?, 1, held)?;
        kept.values.slice_set(&values.contiguous()?, 1, held)?;
        kept.len = len;
        Ok((kept.keys.narrow(1, 0, len)?, kept.values.narrow(1, 0, len)?))
    }
}
