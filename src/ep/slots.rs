//! Rows of slots, on a device: the ways home of which the host need not know how much goes where.
//!
//! ```text
//! slots[s]   the row of slot s on the rank that has its expert, 0 elsewhere     [tokens of all ranks, top_k * hidden_size]
//! home       the sum of all ranks' slots, for the rank that has the token       each slot has one term that is not 0
//! ```
//!
//! Adding 0 changes no bit that a sum would see, so the order in which ranks are added does not matter, and what comes home is
//! summed in slot order as ever. It moves `top_k` rows of a token where one by one moves as many among all ranks.

use crate::experts::weighted_sum;
use crate::order::ExpertOrder;
use candle_core::{DType, Result, Tensor};

/// The rows of all slots of the order, side by side for each token: f32 `[num_tokens, top_k * hidden_size]`.
pub(super) fn by_token(rows: &Tensor, order: &ExpertOrder) -> Result<Tensor> {
    let (num_tokens, top_k, hidden_size) = (order.num_tokens(), order.top_k(), rows.dims()[1]);
    if num_tokens == 0 {
        return nothing_like(rows, &[0, top_k * hidden_size]);
    }
    // Each slot's sum of one row, or of none; Candle's own selection of rows cannot be captured in a graph.
    let ones = Tensor::ones((num_tokens * top_k, 1), DType::F32, rows.device())?;
    weighted_sum(rows, &ones, &order.of_single_slots())?.reshape((num_tokens, top_k * hidden_size))
}

/// The sums over slots, in slot order.
pub(super) fn sum(slots: &Tensor, topk_weights: &Tensor) -> Result<Tensor> {
    let (num_tokens, top_k) = topk_weights.dims2()?;
    let hidden_size = slots.dims()[1] / top_k.max(1);
    if num_tokens == 0 {
        return nothing_like(slots, &[0, hidden_size]);
    }
    // Slots in the order of their numbers.
    let order = ExpertOrder::new(&Tensor::zeros((num_tokens, top_k), DType::U32, slots.device())?, 1, 0..1)?;
    weighted_sum(&slots.reshape((num_tokens * top_k, hidden_size))?, topk_weights, &order)
}

/// No rows, of the dtype of `tensor` and where it is; Candle makes errors of most operations on none.
pub(super) fn nothing_like(tensor: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let width = dims.get(1..).unwrap_or_default().iter().product::<usize>();
    let some = Tensor::zeros((1, width.max(1)), tensor.dtype(), tensor.device())?;
    let none = some.narrow(0, 0, 0)?.narrow(1, 0, width)?;
    if dims.len() == 2 { Ok(none) } else { none.reshape([&[0], dims.get(1..).unwrap_or_default()].concat()) }
}
