//! One rank's side of one collective: what all ranks must agree on, and what it brings along.
//!
//! The argument checks live here. They need no other rank, so they hold for any communicator.

use super::error::Collective;
use candle_core::{DType, Device, Tensor};
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
    /// Rows stay where they are, and travel without the board; this is what the others must know of them.
    Note(Vec<u8>),
}

/// What a rank lays on the board.
pub(super) struct Post {
    pub(super) site: Site,
    pub(super) terms: Terms,
    pub(super) payload: Payload,
}

impl Post {
    pub(super) fn agrees_with(&self, other: &Post) -> bool {
        self.site == other.site && self.terms == other.terms && self.has_note() == other.has_note()
    }

    fn has_note(&self) -> bool {
        matches!(self.payload, Payload::Note(_))
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
                Some(dtype) if self.has_note() => format!("dtype {} on a device", dtype.as_str()),
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

/// Where a rank's tensors are, and which rank of how many it is: what arguments are checked against.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) device: &'a Device,
    pub(super) rank: usize,
    pub(super) world_size: usize,
}

impl Place<'_> {
    /// `rows` is `[counts[rank], ...]`.
    pub(super) fn all_gather(self, rows: &Tensor, counts: &[usize]) -> Result<Terms, String> {
        one_per_rank("counts", counts, self.world_size)?;
        let mine = counts.get(self.rank).copied().unwrap_or(0);
        let shape = self.rows_of(rows, mine, "counts[rank]")?;
        Ok(Terms { dtype: Some(rows.dtype()), shape, counts: counts.to_vec() })
    }

    /// `rows` is `[sum(counts), ...]` of floats.
    pub(super) fn reduce_scatter(self, rows: &Tensor, counts: &[usize]) -> Result<Terms, String> {
        let total = one_per_rank("counts", counts, self.world_size)?;
        let shape = self.rows_of(rows, total, "sum(counts)")?;
        summable("rows", rows)?;
        Ok(Terms { dtype: Some(rows.dtype()), shape, counts: counts.to_vec() })
    }

    /// `rows` is `[sum(send_counts), ...]`; each rank has its own counts.
    pub(super) fn all_to_all(self, rows: &Tensor, send_counts: &[usize]) -> Result<Terms, String> {
        let total = one_per_rank("send_counts", send_counts, self.world_size)?;
        let shape = self.rows_of(rows, total, "sum(send_counts)")?;
        Ok(Terms { dtype: Some(rows.dtype()), shape, counts: Vec::new() })
    }

    /// `values` is any tensor of floats.
    pub(super) fn all_reduce(self, values: &Tensor) -> Result<Terms, String> {
        self.holds("values", values)?;
        summable("values", values)?;
        Ok(Terms { dtype: Some(values.dtype()), shape: values.dims().to_vec(), counts: Vec::new() })
    }

    /// Checks that `rows` has the number of rows that `limit` names; returns the shape of one row.
    fn rows_of(self, rows: &Tensor, expected: usize, limit: &str) -> Result<Vec<usize>, String> {
        self.holds("rows", rows)?;
        match rows.dims().split_first() {
            Some((&num_rows, shape)) if num_rows == expected => Ok(shape.to_vec()),
            Some((num_rows, _)) => Err(format!("rows has {num_rows} rows, it must have {limit} = {expected}")),
            None => Err("rows is a scalar, it must have at least one dimension".to_string()),
        }
    }

    /// Checks that the tensor is here, and of a dtype that can be copied.
    fn holds(self, name: &str, tensor: &Tensor) -> Result<(), String> {
        if !tensor.device().same_device(self.device) {
            let (found, expected) = (tensor.device().location(), self.device.location());
            return Err(match self.device {
                Device::Cpu => format!("{name} is on {found:?}, it must be on the CPU"),
                _ if found == expected => {
                    format!(
                        "{name} is on another Device of {found:?}, it must be on the one that this rank was built with"
                    )
                }
                _ => format!("{name} is on {found:?}, it must be on {expected:?}"),
            });
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

fn summable(name: &str, tensor: &Tensor) -> Result<(), String> {
    match tensor.dtype() {
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        other => Err(format!("{name} has dtype {}, it must be f32, f64, f16 or bf16 to be summed", other.as_str())),
    }
}
