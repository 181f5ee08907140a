//! Experts: the grouped two-layer perceptrons of a mixture.
//!
//! For each row of an [`ExpertOrder`], with the hidden state `x` of its token and the matrices of its expert:
//!
//! ```text
//! gate, up = rows of (W1 x + b1)
//! h        = round(activation(gate, up))          to the dtype of the hidden states
//! out      = W2 h + b2                            float32
//! ```
//!
//! Products accumulate in float32; biases and the activation are float32. On the CPU a row's result does not depend on which
//! other rows are in the batch, to the bit, nor on the format that the weights are held in: formats that hold the same numbers
//! give the same bits. On CUDA the number of slots for each expert chooses kernels that add up in other orders. MXFP4 and FP8
//! weights are decoded in registers, never as a whole.

mod activation;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod linear;
mod simd;
mod weights;

pub use activation::Activation;
pub use linear::Linear;
pub use weights::{ExpertWeights, FP8_BLOCK, MXFP4_BLOCK, fp8_row_scales};

use crate::order::{ExpertOrder, TileMap};
use candle_core::{DType, Device, Result, Tensor, bail};

const OP: &str = "experts";

/// How the rows of the first projection divide into gate and up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateUpRows {
    /// Row `2j` is gate `j`, row `2j + 1` is up `j` (GPT-OSS).
    Interleaved,
    /// All gate rows, then all up rows.
    Concatenated,
}

/// A projection of every local expert: weights and, where the model has one, a bias.
#[derive(Debug, Clone)]
pub struct ExpertProjection {
    weights: ExpertWeights,
    bias: Option<Tensor>,
}

impl ExpertProjection {
    /// `bias` is `[num_local_experts, out_features]` in f32, bf16 or f16; it is kept in f32.
    ///
    /// # Errors
    /// A bias of another shape or dtype.
    pub fn new(weights: ExpertWeights, bias: Option<Tensor>) -> Result<Self> {
        let bias = match bias {
            None => None,
            Some(bias) => {
                if bias.dims() != [weights.num_experts(), weights.out_features()] {
                    bail!(
                        "{OP}: bias has shape {:?}, expected {:?}",
                        bias.shape(),
                        [weights.num_experts(), weights.out_features()]
                    )
                }
                if !matches!(bias.dtype(), DType::F32 | DType::BF16 | DType::F16) {
                    bail!("{OP}: bias has dtype {:?}, expected f32, bf16 or f16", bias.dtype())
                }
                let bias = bias.to_dtype(DType::F32)?.contiguous()?;
                // Kernels copy 16 bytes at a time.
                let is_aligned = bias.layout().start_offset().is_multiple_of(4);
                Some(if is_aligned { bias } else { bias.force_contiguous()? })
            }
        };
        Ok(Self { weights, bias })
    }

    /// The same on `device`.
    ///
    /// # Errors
    /// What copying tensors there may fail with.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.to_device(device)).transpose()?;
        Ok(Self { weights: self.weights.to_device(device)?, bias })
    }

    /// The matrices.
    pub fn weights(&self) -> &ExpertWeights {
        &self.weights
    }

    /// On CUDA, in the order that tensor cores take; `gate_up_rows` says how gate and up lie in the matrix, if it has both.
    #[cfg(feature = "cuda")]
    fn arranged(self, gate_up_rows: Option<GateUpRows>) -> Result<Self> {
        Ok(Self { weights: cuda::fragments::arranged(self.weights, gate_up_rows)?, bias: self.bias })
    }

    #[cfg(not(feature = "cuda"))]
    fn arranged(self, _: Option<GateUpRows>) -> Result<Self> {
        Ok(self)
    }
}

fn check_hidden(hidden: &Tensor, num_tokens: Option<usize>, hidden_size: usize) -> Result<()> {
    let fits =
        hidden.rank() == 2 && hidden.dims()[1] == hidden_size && num_tokens.is_none_or(|n| hidden.dims()[0] == n);
    if !fits {
        let num_tokens = num_tokens.map_or("num_tokens".into(), |n| n.to_string());
        bail!("{OP}: hidden has shape {:?}, expected [{num_tokens}, {hidden_size}]", hidden.shape())
    }
    if !matches!(hidden.dtype(), DType::F32 | DType::BF16 | DType::F16) {
        bail!("{OP}: hidden has dtype {:?}, expected f32, bf16 or f16", hidden.dtype())
    }
    Ok(())
}

/// The local experts of a rank.
#[derive(Debug, Clone)]
pub struct Experts {
    gate_up: ExpertProjection,
    down: ExpertProjection,
    gate_up_rows: GateUpRows,
    activation: Activation,
}

impl Experts {
    /// `gate_up` is `[2 * intermediate_size, hidden_size]` per expert, `down` is `[hidden_size, intermediate_size]`.
    ///
    /// # Errors
    /// Shapes that do not fit each other, or an activation with a limit that is not above 0.
    pub fn new(
        gate_up: ExpertProjection,
        down: ExpertProjection,
        gate_up_rows: GateUpRows,
        activation: Activation,
    ) -> Result<Self> {
        activation.check(OP)?;
        let (first, second) = (&gate_up.weights, &down.weights);
        if first.num_experts() != second.num_experts() {
            bail!("{OP}: gate_up has {} experts and down has {}", first.num_experts(), second.num_experts())
        }
        if second.in_features().checked_mul(2) != Some(first.out_features()) {
            bail!(
                "{OP}: gate_up has {} rows, expected twice the {} columns of down",
                first.out_features(),
                second.in_features()
            )
        }
        if first.in_features() != second.out_features() {
            bail!(
                "{OP}: gate_up has {} columns, expected the {} rows of down",
                first.in_features(),
                second.out_features()
            )
        }
        let (gate_up, down) = (gate_up.arranged(Some(gate_up_rows))?, down.arranged(None)?);
        Ok(Self { gate_up, down, gate_up_rows, activation })
    }

    /// The same on `device`. On CUDA, where weights are MXFP4, bf16 or f16 and the sizes are whole (intermediate_size and
    /// hidden_size multiples of 64), they are arranged as its tensor cores take them, one projection after the other, so that
    /// no more than one projection is there twice; other weights are as they are, and slow.
    ///
    /// # Errors
    /// What copying tensors there may fail with; weights that were arranged for CUDA do not come back to the CPU.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let gate_up = self.gate_up.to_device(device)?.arranged(Some(self.gate_up_rows))?;
        let down = self.down.to_device(device)?.arranged(None)?;
        Ok(Self { gate_up, down, gate_up_rows: self.gate_up_rows, activation: self.activation })
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.down.weights.device()
    }

    /// The projection to gate and up.
    pub fn gate_up(&self) -> &ExpertProjection {
        &self.gate_up
    }

    /// How its rows divide into gate and up.
    pub fn gate_up_rows(&self) -> GateUpRows {
        self.gate_up_rows
    }

    /// The projection back to hidden states.
    pub fn down(&self) -> &ExpertProjection {
        &self.down
    }

    /// What stands between the two.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Local experts.
    pub fn num_experts(&self) -> usize {
        self.down.weights.num_experts()
    }

    /// Width of the hidden states.
    pub fn hidden_size(&self) -> usize {
        self.down.weights.out_features()
    }

    /// Width between the two projections.
    pub fn intermediate_size(&self) -> usize {
        self.down.weights.in_features()
    }

    /// Bytes of one expert's weights, biases included.
    pub fn bytes_per_expert(&self) -> usize {
        let bias = |p: &ExpertProjection| p.bias.as_ref().map_or(0, |_| 4 * p.weights.out_features());
        let bytes = |p: &ExpertProjection| p.weights.bytes_per_expert() + bias(p);
        bytes(&self.gate_up) + bytes(&self.down)
    }

    /// Applies the experts to the rows of `order`: `hidden` is `[num_tokens, hidden_size]` in f32, bf16 or f16; the result
    /// is f32 `[num_rows, hidden_size]`, a row per place of `order.sorted_slots` that is in use, not yet weighted.
    ///
    /// On CUDA, where nothing waits to learn how many places are in use, there is a row for every slot, and those behind the
    /// last place in use are 0. Sums are added up in another order there than on the CPU.
    ///
    /// # Errors
    /// Shapes, dtypes or a number of experts that do not fit, or tensors that do not live on one device.
    pub fn forward(&self, hidden: &Tensor, order: &ExpertOrder) -> Result<Tensor> {
        self.check_order(hidden, order)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = hidden.device() {
            return cuda::forward(self, hidden, order, device);
        }
        cpu::forward(self, hidden, order)
    }

    /// Rows of a tile that [`forward_weighted`](Self::forward_weighted) works with on `device` for that many tokens, to be
    /// asked for with the order; `None` where it needs no tiles.
    ///
    /// # Errors
    /// A CUDA device that cannot be asked.
    pub fn tile_rows(&self, num_tokens: usize, top_k: usize, dtype: DType, device: &Device) -> Result<Option<usize>> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            return cuda::tile_rows(self, num_tokens.saturating_mul(top_k), dtype, device).map(Some);
        }
        let _ = (num_tokens, top_k, dtype, device);
        Ok(None)
    }

    /// The rows of [`forward`](Self::forward), rounded as [`forward_weighted`](Self::forward_weighted) rounds them on the way to sums
    /// in `dtype`, so that rows that travel first give the same bits.
    pub(crate) fn forward_as_weighted(&self, hidden: &Tensor, order: &ExpertOrder, dtype: DType) -> Result<Tensor> {
        let rows = self.forward(hidden, order)?;
        let rounded = self.rows_dtype(hidden, order, dtype)?;
        if rounded == DType::F32 { Ok(rows) } else { rows.to_dtype(rounded)?.to_dtype(DType::F32) }
    }

    /// The dtype of rows on their way to sums in `dtype`.
    pub(crate) fn rows_dtype(&self, hidden: &Tensor, order: &ExpertOrder, dtype: DType) -> Result<DType> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = hidden.device() {
            return cuda::rows_dtype(self, order, hidden.dtype(), dtype, device);
        }
        let _ = (hidden, order, dtype);
        Ok(DType::F32)
    }

    /// Writes the rows of [`forward`](Self::forward) to the memory of `rows`, `[num_slots, hidden_size]` in
    /// [`rows_dtype`](Self::rows_dtype); what lies behind the last place in use is left as it is.
    #[cfg(feature = "cuda")]
    pub(crate) fn forward_to(&self, hidden: &Tensor, order: &ExpertOrder, rows: &Tensor) -> Result<()> {
        self.check_order(hidden, order)?;
        cuda::forward_to(self, hidden, order, rows)
    }

    /// [`forward`](Self::forward) and [`weighted_sum`] in one: `[num_tokens, hidden_size]` in `dtype`, which is f32 or that of
    /// `hidden`, rounded once. Where both are bfloat16, CUDA may round the rows too, before they are added up in float32: it
    /// does from seven slots for each expert on. `tiles` are those of the order with [`tile_rows`](Self::tile_rows), and are
    /// made where they are not given, or others, or those of another order.
    ///
    /// On CUDA it is captured in a graph after a first call of the same shape on the same thread, whose workspace it uses: the
    /// graph is good as long as that thread lives.
    ///
    /// # Errors
    /// As those two; another `dtype`.
    pub fn forward_weighted(
        &self,
        hidden: &Tensor,
        topk_weights: &Tensor,
        order: &ExpertOrder,
        tiles: Option<&TileMap>,
        dtype: DType,
    ) -> Result<Tensor> {
        self.check_weighted(hidden, topk_weights, order, dtype)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = hidden.device() {
            return cuda::forward_weighted(self, hidden, topk_weights, order, tiles, dtype, device);
        }
        let _ = tiles;
        cpu::weighted_sum(&cpu::forward(self, hidden, order)?, topk_weights, order)?.to_dtype(dtype)
    }

    /// [`forward_weighted`](Self::forward_weighted) to memory that is there: contiguous `sums`, `[num_tokens, hidden_size]` in f32
    /// or the dtype of `hidden`, on its device, on CUDA at a multiple of 16 bytes. There an allocation between two kernels keeps
    /// the second from beginning while the first ends; with memory from before the routing there is none from there to the sums.
    ///
    /// # Errors
    /// As [`forward_weighted`](Self::forward_weighted); `sums` of another shape, dtype, device or layout.
    pub fn forward_weighted_to(
        &self,
        hidden: &Tensor,
        topk_weights: &Tensor,
        order: &ExpertOrder,
        tiles: Option<&TileMap>,
        sums: &Tensor,
    ) -> Result<()> {
        let expected = [order.num_tokens(), self.hidden_size()];
        if sums.dims() != expected || !sums.is_contiguous() {
            bail!("{OP}: sums has {:?}, expected {expected:?} side by side", sums.layout())
        }
        if !sums.device().same_device(hidden.device()) {
            bail!("{OP}: sums is on {:?}, expected it where hidden is", sums.device().location())
        }
        if sums.dtype() != DType::F32 && sums.dtype() != hidden.dtype() {
            bail!("{OP}: sums has dtype {:?}, expected F32 or that of hidden, {:?}", sums.dtype(), hidden.dtype())
        }
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = hidden.device() {
            self.check_weighted(hidden, topk_weights, order, sums.dtype())?;
            return cuda::forward_weighted_to(self, hidden, topk_weights, order, tiles, sums, device);
        }
        let made = self.forward_weighted(hidden, topk_weights, order, tiles, sums.dtype())?;
        if made.elem_count() == 0 { Ok(()) } else { sums.slice_set(&made, 0, 0) }
    }

    /// Memory for sums of `hidden` in `dtype`, of which nothing is known.
    pub(crate) fn room_for_sums(&self, hidden: &Tensor, dtype: DType) -> Result<Tensor> {
        let shape = (hidden.dims()[0], self.hidden_size());
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = hidden.device() {
            return cuda::room_for_sums(shape, dtype, device);
        }
        Tensor::zeros(shape, dtype, hidden.device())
    }

    fn check_weighted(&self, hidden: &Tensor, topk_weights: &Tensor, order: &ExpertOrder, dtype: DType) -> Result<()> {
        if dtype != DType::F32 && dtype != hidden.dtype() {
            bail!("{OP}: dtype is {dtype:?}, expected F32 or that of hidden, {:?}", hidden.dtype())
        }
        self.check_order(hidden, order)?;
        check_topk_weights(topk_weights, order)
    }

    fn check_order(&self, hidden: &Tensor, order: &ExpertOrder) -> Result<()> {
        check_hidden(hidden, Some(order.num_tokens()), self.hidden_size())?;
        if order.local_experts().len() != self.num_experts() {
            bail!(
                "{OP}: the order covers {} local experts, expected {}",
                order.local_experts().len(),
                self.num_experts()
            )
        }
        Ok(())
    }
}

fn check_topk_weights(topk_weights: &Tensor, order: &ExpertOrder) -> Result<()> {
    if topk_weights.dims() != [order.num_tokens(), order.top_k()] {
        bail!(
            "{OP}: topk_weights has shape {:?}, expected {:?}",
            topk_weights.shape(),
            [order.num_tokens(), order.top_k()]
        )
    }
    Ok(())
}

/// Brings rows home: `sum over k of topk_weights[t, k] * rows[slot_rank[t * top_k + k]]`, in slot order, in float32.
///
/// `rows` is f32 `[num_rows, hidden_size]` as [`Experts::forward`] returns it, `topk_weights` f32 `[num_tokens, top_k]`;
/// slots outside the order add nothing. The result is f32 `[num_tokens, hidden_size]`.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn weighted_sum(rows: &Tensor, topk_weights: &Tensor, order: &ExpertOrder) -> Result<Tensor> {
    check_topk_weights(topk_weights, order)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = rows.device() {
        return cuda::weighted_sum(rows, topk_weights, order, device);
    }
    cpu::weighted_sum(rows, topk_weights, order)
}
