//! The tensors of a checkpoint by their roles, whatever its layout.

use super::Config;
use super::layout::{ExpertRole, LayerRole, Layout, Matrices, ModelRole};
use crate::checkpoint::Checkpoint;
use crate::experts::{ExpertProjection, ExpertWeights, Linear, MXFP4_BLOCK};
use crate::host::{checked_product, try_filled, with_slice};
use candle_core::{DType, Device, Result, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

const OP: &str = "gpt-oss weights";
const FLOATS: [DType; 3] = [DType::BF16, DType::F32, DType::F16];
/// Side of the square that a transposition moves at once: a cache line of 16-bit values.
const TILE: usize = 32;

/// The tensors of a checkpoint, each in its stored dtype.
pub(super) struct Weights<'a> {
    pub(super) config: &'a Config,
    checkpoint: &'a Checkpoint,
    layout: Layout,
    device: &'a Device,
}

impl<'a> Weights<'a> {
    /// # Errors
    /// Tensors of two layouts, or of none.
    pub(super) fn new(checkpoint: &'a Checkpoint, config: &'a Config, device: &'a Device) -> Result<Self> {
        Ok(Self { config, checkpoint, layout: Layout::detect(checkpoint)?, device })
    }

    pub(super) fn is_mxfp4(&self) -> bool {
        self.layout.is_mxfp4()
    }

    pub(super) fn model(&self, role: ModelRole, shape: &[usize]) -> Result<Tensor> {
        Ok(self.checkpoint.tensor(self.layout.model(role), shape, &FLOATS, self.device)?)
    }

    pub(super) fn layer(&self, layer: usize, role: LayerRole, shape: &[usize]) -> Result<Tensor> {
        Ok(self.checkpoint.tensor(&self.layout.layer(layer, role), shape, &FLOATS, self.device)?)
    }

    /// A linear layer of a decoder layer, bias included.
    pub(super) fn linear(
        &self,
        layer: usize,
        role: LayerRole,
        out_features: usize,
        in_features: usize,
    ) -> Result<Linear> {
        let stem = self.layout.layer(layer, role);
        let (rows, num_rows) = self.layout.rows(role, out_features, self.config);
        let read = |part: &str, shape: &[usize]| {
            self.checkpoint.rows(&format!("{stem}.{part}"), shape, &FLOATS, rows.clone(), self.device)
        };
        Linear::new(read("weight", &[num_rows, in_features])?, Some(read("bias", &[num_rows])?))
    }

    /// A projection of the experts `experts`, in this order, whose bytes only are read: `[out_features, in_features]` each, and
    /// a bias.
    pub(super) fn experts(
        &self,
        layer: usize,
        role: ExpertRole,
        experts: &[usize],
        out_features: usize,
        in_features: usize,
    ) -> Result<ExpertProjection> {
        let names = self.layout.experts(layer, role);
        let num_experts = self.config.num_experts;
        let read = |name: &str, shape: &[usize], dtypes: &[DType]| self.rows(name, shape, dtypes, experts);
        let weights = match &names.matrices {
            Matrices::Mxfp4 { blocks, scales } => {
                let num_blocks = in_features / MXFP4_BLOCK;
                let blocks = read(blocks, &[num_experts, out_features, num_blocks, 16], &[DType::U8])?;
                let values = read(scales, &[num_experts, out_features, num_blocks], &[DType::U8])?;
                let file = self.checkpoint.info(scales)?.file;
                let place = || format!("{}: {scales}", file.display());
                ExpertWeights::mxfp4(blocks, values).map_err(|error| error.context(place()))?
            }
            Matrices::Transposed(name) => {
                let shape = [num_experts, in_features, out_features];
                ExpertWeights::dense(self.transposed(name, shape, experts)?)?
            }
        };
        ExpertProjection::new(weights, Some(read(&names.bias, &[num_experts, out_features], &FLOATS)?))
    }

    /// The rows `rows` of a tensor of this shape, each run of them in one piece.
    fn rows(&self, name: &str, shape: &[usize], dtypes: &[DType], rows: &[usize]) -> Result<Tensor> {
        let runs = rows.chunk_by(|a, b| a + 1 == *b);
        let read = |run: &[usize]| self.checkpoint.rows(name, shape, dtypes, run[0]..run[0] + run.len(), self.device);
        match runs.map(read).collect::<std::result::Result<Vec<_>, _>>()?.as_slice() {
            [run] => Ok(run.clone()),
            runs => Tensor::cat(runs, 0),
        }
    }

    /// The experts `experts` of a tensor of this shape, each matrix transposed.
    fn transposed(&self, name: &str, shape: [usize; 3], experts: &[usize]) -> Result<Tensor> {
        // No rows, no bytes: what is checked is shape and dtype.
        let nothing = self.checkpoint.rows(name, &shape, &FLOATS, 0..0, self.device)?;
        match nothing.dtype() {
            DType::BF16 => self.transposed_as::<bf16>(name, shape, experts),
            DType::F16 => self.transposed_as::<f16>(name, shape, experts),
            _ => self.transposed_as::<f32>(name, shape, experts),
        }
    }

    /// One expert after the other, so that besides the result there is never more than one of them.
    fn transposed_as<T: WithDType>(&self, name: &str, shape: [usize; 3], experts: &[usize]) -> Result<Tensor> {
        let [_, rows, columns] = shape;
        let len = checked_product(OP, ("in_features", rows), ("out_features", columns))?;
        let total = checked_product(OP, ("num_local_experts", experts.len()), ("values of an expert", len))?;
        let mut all = try_filled(OP, T::from_f64(0.0), total)?;
        for (out, expert) in all.chunks_exact_mut(len).zip(experts) {
            let stored = self.checkpoint.rows(name, &shape, &FLOATS, *expert..expert + 1, self.device)?;
            with_slice(&stored, OP, name, |stored: &[T]| {
                transpose(stored, rows, columns, out);
                Ok(())
            })?;
        }
        Tensor::from_vec(all, (experts.len(), columns, rows), self.device)
    }
}

/// `out[c][r] = stored[r][c]`: bands of rows of `out` over threads, tiles within a band, so that every cache line that is
/// touched is used up while it is there.
fn transpose<T: Copy + Send + Sync>(stored: &[T], rows: usize, columns: usize, out: &mut [T]) {
    out.par_chunks_mut(TILE * rows).enumerate().for_each(|(band, out)| {
        let first = band * TILE;
        for start in (0..rows).step_by(TILE) {
            let end = rows.min(start + TILE);
            for (column, out) in out.chunks_exact_mut(rows).enumerate() {
                let values = stored[start * columns..end * columns].chunks_exact(columns);
                out[start..end].iter_mut().zip(values).for_each(|(out, values)| *out = values[first + column]);
            }
        }
    });
}
