//! The header of a safetensors file: JSON that gives every tensor a dtype, a shape and its place in the data.
//!
//! 1. The tensors must tile the data exactly: no gap, no overlap, nothing after the last.
//! 2. The JSON is visited entry by entry, since a map would keep the last of two equal names silently.
//! 3. A dtype that this crate cannot read is no fault of the file: it only cannot be read. Its size is checked where the
//!    format says how wide it is.

use super::CheckpointError;
use candle_core::DType;
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// The entry that describes no tensor.
const METADATA: &str = "__metadata__";

/// Where a tensor lies in the data of its shard, checked against the size of the file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// As the header spells it.
    pub(super) dtype_name: String,
    /// `None` where this crate cannot read it.
    pub(super) dtype: Option<DType>,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

/// The entries in the order of the file, equal names included.
struct Header(Vec<(String, HeaderEntry)>);

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensor names to dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            match map.next_value() {
                Ok(entry) => entries.push((name, entry)),
                Err(error) => return Err(A::Error::custom(format!("{name}: {error}"))),
            }
        }
        Ok(Header(entries))
    }
}

/// Reads a header and checks that its tensors tile the `data_len` bytes of data behind it.
pub(super) fn parse(file: &Path, header: &[u8], data_len: u64) -> Result<BTreeMap<String, Entry>, CheckpointError> {
    let Header(mut tensors) = serde_json::from_slice(header)
        .map_err(|error| CheckpointError::HeaderInvalid { file: file.into(), reason: error.to_string() })?;
    tensors.iter().try_for_each(|(name, entry)| check_size(file, name, entry))?;
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    if let Some(twice) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let tensor = twice[0].0.clone();
        return Err(CheckpointError::DuplicateTensor { tensor, first: file.into(), second: file.into() });
    }
    tensors.sort_by_key(|(_, entry)| entry.data_offsets);
    let data_end = check_tiling(file, &tensors)?;
    check_length(file, data_end, data_len, 8 + header.len() as u64)?;
    Ok(tensors.into_iter().map(|(name, entry)| (name, entry.checked())).collect())
}

/// Checks the offsets of one tensor against its shape and dtype.
fn check_size(file: &Path, name: &str, entry: &HeaderEntry) -> Result<(), CheckpointError> {
    let bits = known(&entry.dtype).map(|(_, bits, _)| bits);
    // A zero makes the product small, but strides are products of the other dimensions.
    let mut dims = entry.shape.iter().map(|&dim| dim.max(1));
    let Some(total) = dims.try_fold(bits.unwrap_or(1), |total, dim| total.checked_mul(dim)) else {
        return Err(CheckpointError::ShapeOverflow {
            file: file.into(),
            tensor: name.into(),
            shape: entry.shape.clone(),
        });
    };
    let (start, end) = entry.data_offsets;
    let Some(found) = end.checked_sub(start) else {
        return Err(misplaced(file, name, entry, start));
    };
    let expected = if entry.shape.contains(&0) { 0 } else { total.div_ceil(8) as u64 };
    match bits.is_some() && found != expected {
        true => Err(CheckpointError::SizeMismatch { file: file.into(), tensor: name.into(), found, expected }),
        false => Ok(()),
    }
}

/// Checks that each tensor starts where the one before it ends; the end of the last.
fn check_tiling(file: &Path, tensors: &[(String, HeaderEntry)]) -> Result<u64, CheckpointError> {
    tensors.iter().try_fold(0, |data_end, (name, entry)| match entry.data_offsets {
        (start, end) if start == data_end => Ok(end),
        _ => Err(misplaced(file, name, entry, data_end)),
    })
}

fn misplaced(file: &Path, name: &str, entry: &HeaderEntry, expected_start: u64) -> CheckpointError {
    let found = entry.data_offsets.0..entry.data_offsets.1;
    CheckpointError::OffsetsInvalid { file: file.into(), tensor: name.into(), found, expected_start }
}

fn check_length(file: &Path, data_end: u64, data_len: u64, data_start: u64) -> Result<(), CheckpointError> {
    // data_end comes from the header: saturate, it only has to be named.
    let (found, expected) = (data_start + data_len, data_start.saturating_add(data_end));
    match data_end.cmp(&data_len) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(CheckpointError::Truncated { file: file.into(), found, expected }),
        std::cmp::Ordering::Less => Err(CheckpointError::TrailingBytes { file: file.into(), found, expected }),
    }
}

impl HeaderEntry {
    /// The entry, once its offsets are known to lie inside a mapped file.
    fn checked(self) -> Entry {
        let (start, end) = self.data_offsets;
        Entry {
            dtype: known(&self.dtype).and_then(|(_, _, dtype)| dtype),
            dtype_name: self.dtype,
            shape: self.shape,
            range: start as usize..end as usize,
        }
    }
}

/// A dtype by its name in the format: bits of an element, and what it is read as, if it is read.
type Known = (&'static str, usize, Option<DType>);

fn known(name: &str) -> Option<Known> {
    KNOWN.into_iter().find(|(known, ..)| *known == name)
}

const KNOWN: [Known; 22] = [
    ("BOOL", 8, None),
    ("F4", 4, None),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, Some(DType::U8)),
    ("I8", 8, None),
    ("F8_E5M2", 8, None),
    ("F8_E4M3", 8, Some(DType::F8E4M3)),
    ("F8_E8M0", 8, None),
    ("F8_E4M3FNUZ", 8, None),
    ("F8_E5M2FNUZ", 8, None),
    ("I16", 16, None),
    ("U16", 16, None),
    ("F16", 16, Some(DType::F16)),
    ("BF16", 16, Some(DType::BF16)),
    ("I32", 32, None),
    ("U32", 32, Some(DType::U32)),
    ("F32", 32, Some(DType::F32)),
    ("C64", 64, None),
    ("F64", 64, None),
    ("I64", 64, Some(DType::I64)),
    ("U64", 64, None),
];
