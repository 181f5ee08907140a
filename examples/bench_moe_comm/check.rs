//! Whether combine brings home what it should when every expert returns what it was given: each token's hidden state times
//! the sum of its weights.

use candle_core::{DType, Result, Tensor, bail};

/// One value of the weighted sum, and what it may be off by.
struct Expected {
    value: f64,
    tolerance: f64,
}

/// The first value of `combined` `[num_tokens, hidden_size]` that is not the sum over `topk_weights` `[num_tokens, top_k]`,
/// in slot order, of weight times `hidden` `[num_tokens, hidden_size]`; `None` if all are.
///
/// The slots of a token are multiplied and added in float32, in any order, so a value may be off by `2 * top_k * 2^-23` times
/// the sum of the terms' magnitudes, and by `on_the_way` times that, the rounding of partial sums. Every weight must belong to
/// an expert.
pub(crate) fn first_mismatch(
    hidden: &Tensor,
    topk_weights: &Tensor,
    combined: &Tensor,
    on_the_way: f64,
) -> Result<Option<String>> {
    if combined.dims() != hidden.dims() {
        bail!("combine gave shape {:?}, expected {:?}", combined.shape(), hidden.shape())
    }
    if hidden.elem_count() == 0 {
        return Ok(None);
    }
    let rows = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_vec2::<f32>();
    let (hidden, topk_weights, combined) = (rows(hidden)?, rows(topk_weights)?, rows(combined)?);
    let tokens = hidden.iter().zip(&topk_weights).zip(&combined).enumerate();
    Ok(tokens
        .filter_map(|(token, ((hidden, weights), combined))| wrong_value(token, hidden, weights, combined, on_the_way))
        .next())
}

fn wrong_value(token: usize, hidden: &[f32], weights: &[f32], combined: &[f32], on_the_way: f64) -> Option<String> {
    let sum: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
    let magnitude: f64 = weights.iter().map(|&weight| f64::from(weight).abs()).sum();
    let rounding = 2.0 * weights.len() as f64 * f64::from(f32::EPSILON) + on_the_way;
    let expected = |hidden: f32| Expected {
        value: f64::from(hidden) * sum,
        tolerance: f64::from(hidden).abs() * magnitude * rounding,
    };
    hidden.iter().zip(combined).enumerate().find_map(|(column, (&hidden, &found))| {
        let Expected { value, tolerance } = expected(hidden);
        // Not "greater": NaN is wrong too.
        let is_right = (f64::from(found) - value).abs() <= tolerance;
        (!is_right).then(|| format!("token {token}, column {column}: combine gave {found}, expected {value}"))
    })
}
