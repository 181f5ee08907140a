//! One rank's side of one collective: what all ranks must agree on, and what it brings along.
//!
//! The argument checks live here. They need no other rank, so they hold for any communicator.

use super::error::Collective;
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// Where a collective stands in the life of a group.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Site {
    pub(super) op: Collective,
    pub(super) step: u64,
    pub(super) label: Arc<str>,
}

/// The part of the arguments that must be the same on every rank.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Terms {
    pub(super) dtype: Option<DType>,
    /// The shape behind the first dimension, or the whole shape for an all-reduce.
    pub(super) shape: Vec<usize>,
    pub(super) counts: Vec<usize>,
}

/// What a rank brings along. Tensors are handles on the caller's memory, not copies.
pub(super) enum Payload {
    Nothing,
    Rows(Tensor),
    /// Rows grouped by destination, with the number of rows for each.
    Routed(Tensor, Vec<usize>),
    /// Of what a rank of another process brings along, the rows that are meant for this one.
    Part(Tensor),
    Bytes(Vec<u8>),
}

/// What a rank lays on the board.
pub(super) struct Post {
    pub(super) site: Site,
    pub(super) terms: Terms,
    pub(super) payload: Payload,
}

impl Post {
    pub(super) fn agrees_with(&self, other: &Post) -> bool {
        self.site == other.site && self.terms == other.terms
    }

    /// The two calls in words, as far as they differ.
    pub(super) fn difference(&self, other: &Post) -> (String, String) {
        let differing: Vec<(String, String)> =
            self.fields().into_iter().zip(other.fields()).filter(|(mine, theirs)| mine != theirs).collect();
        let (mine, theirs): (Vec<_>, Vec<_>) = differing.into_iter().unzip();
        (mine.join(", "), theirs.join(", "))
    }

    fn fields(&self) -> [String; 6] {
        let (site, terms) = (&self.site, &self.terms);
        [
            site.op.to_string(),
            format!("step {}", site.step),
            format!("label {:?}", site.label),
            match terms.dtype {
                Some(dtype) => format!("dtype {}", dtype.as_str()),
                None => "no tensor".to_string(),
            },
            match site.op {
                Collective::AllReduce => format!("shape {:?}", terms.shape),
                _ => format!("rows of shape {:?}", terms.shape),
            },
            format!("counts {:?}", terms.counts),
        ]
    }
}

/// Terms and payload, or what is wrong with the arguments.
pub(super) type Offer = Result<(Terms, Payload), String>;

/// `rows` is `[counts[rank], ...]`.
pub(super) fn offer_all_gather(rows: &Tensor, counts: &[usize], rank: usize, world_size: usize) -> Offer {
    one_per_rank("counts", counts, world_size)?;
    let mine = counts.get(rank).copied().unwrap_or(0);
    let shape = rows_of(rows, mine, "counts[rank]")?;
    let terms = Terms { dtype: Some(rows.dtype()), shape, counts: counts.to_vec() };
    Ok((terms, Payload::Rows(rows.detach())))
}

/// `rows` is `[sum(counts), ...]` of floats.
pub(super) fn offer_reduce_scatter(rows: &Tensor, counts: &[usize], world_size: usize) -> Offer {
    let total = one_per_rank("counts", counts, world_size)?;
    let shape = rows_of(rows, total, "sum(counts)")?;
    summable("rows", rows)?;
    let terms = Terms { dtype: Some(rows.dtype()), shape, counts: counts.to_vec() };
    Ok((terms, Payload::Rows(rows.detach())))
}

/// `rows` is `[sum(send_counts), ...]`; each rank has its own counts.
pub(super) fn offer_all_to_all(rows: &Tensor, send_counts: &[usize], world_size: usize) -> Offer {
    let total = one_per_rank("send_counts", send_counts, world_size)?;
    let shape = rows_of(rows, total, "sum(send_counts)")?;
    let terms = Terms { dtype: Some(rows.dtype()), shape, counts: Vec::new() };
    Ok((terms, Payload::Routed(rows.detach(), send_counts.to_vec())))
}

/// `values` is any tensor of floats.
pub(super) fn offer_all_reduce(values: &Tensor) -> Offer {
    on_the_cpu("values", values)?;
    summable("values", values)?;
    let terms = Terms { dtype: Some(values.dtype()), shape: values.dims().to_vec(), counts: Vec::new() };
    Ok((terms, Payload::Rows(values.detach())))
}

/// Checks that there is one count per rank; returns the sum.
fn one_per_rank(name: &str, counts: &[usize], world_size: usize) -> Result<usize, String> {
    if counts.len() != world_size {
        return Err(format!("{name} has {} entries, it must have one per rank, {world_size}", counts.len()));
    }
    let add = |sum: usize, &count: &usize| sum.checked_add(count);
    counts.iter().try_fold(0, add).ok_or_else(|| {
        let limit = usize::MAX;
        format!("the sum of {name} = {counts:?} is above {limit}")
    })
}

/// Checks that `rows` has the number of rows that `limit` names; returns the shape of one row.
fn rows_of(rows: &Tensor, expected: usize, limit: &str) -> Result<Vec<usize>, String> {
    on_the_cpu("rows", rows)?;
    match rows.dims().split_first() {
        Some((&num_rows, shape)) if num_rows == expected => Ok(shape.to_vec()),
        Some((num_rows, _)) => Err(format!("rows has {num_rows} rows, it must have {limit} = {expected}")),
        None => Err("rows is a scalar, it must have at least one dimension".to_string()),
    }
}

fn on_the_cpu(name: &str, tensor: &Tensor) -> Result<(), String> {
    if !tensor.device().is_cpu() {
        return Err(format!("{name} is on {:?}, it must be on the CPU", tensor.device().location()));
    }
    match tensor.dtype() {
        DType::U8
        | DType::U32
        | DType::I16
        | DType::I32
        | DType::I64
        | DType::BF16
        | DType::F16
        | DType::F32
        | DType::F64
        | DType::F8E4M3 => Ok(()),
        packed => Err(format!("{name} has dtype {}, which Candle cannot copy row by row", packed.as_str())),
    }
}

fn summable(name: &str, tensor: &Tensor) -> Result<(), String> {
    match tensor.dtype() {
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        other => Err(format!("{name} has dtype {}, it must be f32, f64, f16 or bf16 to be summed", other.as_str())),
    }
}
