//! Putting the posted tensors together, on each rank's own thread.
//!
//! Tensors without elements never reach a Candle kernel: their result follows from the shape alone.

use super::call::{Payload, Post};
use candle_core::{Result, Tensor, bail};

/// The tensors that the ranks posted, in rank order.
pub(super) fn posted_rows(posts: &[Post]) -> impl Iterator<Item = &Tensor> {
    posts.iter().filter_map(|post| match &post.payload {
        Payload::Rows(rows) | Payload::Routed(rows, _) | Payload::Part(rows) => Some(rows),
        Payload::Nothing | Payload::Bytes(_) | Payload::Note(_) => None,
    })
}

/// The parts below each other, contiguous.
pub(super) fn concat(parts: &[Tensor]) -> Result<Tensor> {
    let Some(first) = parts.first() else {
        bail!("no rank posted rows");
    };
    let Some((_, row)) = first.dims().split_first() else {
        bail!("a scalar has no rows");
    };
    let mut num_rows = 0usize;
    for part in parts {
        // Only rows without elements can be that many.
        num_rows = match num_rows.checked_add(part.dim(0)?) {
            Some(num_rows) => num_rows,
            None => bail!("more than {} rows", usize::MAX),
        };
    }
    let filled: Vec<&Tensor> = parts.iter().filter(|part| part.elem_count() > 0).collect();
    match (parts, filled.as_slice()) {
        (_, []) => {
            let shape = [&[num_rows], row].concat();
            Tensor::zeros(shape, first.dtype(), first.device())
        }
        ([alone], _) => alone.contiguous(),
        // `Tensor::cat` of one tensor is that tensor, whose memory belongs to another rank.
        (_, [single]) => single.force_contiguous(),
        (_, filled) => Tensor::cat(filled, 0),
    }
}

/// The sum of the parts, added in their order, contiguous.
pub(super) fn sum(parts: impl IntoIterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let mut parts = parts.into_iter();
    let Some(first) = parts.next() else {
        bail!("no rank posted values");
    };
    let first = first?;
    if first.elem_count() == 0 {
        return Tensor::zeros(first.shape(), first.dtype(), first.device());
    }
    parts.try_fold(first, |sum, part| sum + part?)?.contiguous()
}

/// Rank `rank`'s part of the sum.
pub(super) fn sum_of_part(posts: &[Post], counts: &[usize], rank: usize) -> Result<Tensor> {
    let (start, len) = part(counts, rank);
    let parts = posts.iter().filter_map(|post| match &post.payload {
        Payload::Rows(rows) => Some(rows.narrow(0, start, len)),
        Payload::Part(rows) => Some(Ok(rows.clone())),
        _ => None,
    });
    sum(parts)
}

/// The rows for rank `rank`, grouped by source, and how many came from each.
pub(super) fn received(posts: &[Post], rank: usize) -> Result<(Tensor, Vec<usize>)> {
    let mut parts = Vec::with_capacity(posts.len());
    let mut counts = Vec::with_capacity(posts.len());
    for post in posts {
        let rows = match &post.payload {
            Payload::Routed(rows, send_counts) => {
                let (start, len) = part(send_counts, rank);
                rows.narrow(0, start, len)?
            }
            Payload::Part(rows) => rows.clone(),
            _ => continue,
        };
        counts.push(rows.dim(0)?);
        parts.push(rows);
    }
    Ok((concat(&parts)?, counts))
}

/// Where the rows of `rank` start, and how many there are. The sum of `counts` fits: it was checked.
fn part(counts: &[usize], rank: usize) -> (usize, usize) {
    let start = counts.iter().take(rank).sum();
    (start, counts.get(rank).copied().unwrap_or(0))
}
