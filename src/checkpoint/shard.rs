//! One safetensors file: its map and its header.

use super::CheckpointError;
use candle_core::DType;
use memmap2::Mmap;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Longest header that is read: far more than any checkpoint needs, far less than memory.
const MAX_HEADER: u64 = 100 << 20;

pub(super) struct Shard {
    pub(super) file: PathBuf,
    map: Mmap,
    data_start: usize,
    pub(super) tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies in the data of its shard, checked against the size of the file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

#[derive(Deserialize)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl Shard {
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io = |error: std::io::Error| CheckpointError::Io { file: path.into(), reason: error.to_string() };
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(CheckpointError::Io { file: path.into(), reason: "not a plain file".into() });
        }
        // SAFETY: the map is read-only and private to this struct, and every access is bounds-checked against its length.
        // What the type system cannot rule out is another process that shortens or rewrites the file meanwhile;
        // `Checkpoint::open` documents that this must not happen.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let found = map.len() as u64;
        let Some((length, rest)) = map.split_first_chunk::<8>() else {
            return Err(CheckpointError::HeaderTooShort { file: path.into(), found });
        };
        let (length, limit) = (u64::from_le_bytes(*length), MAX_HEADER.min(rest.len() as u64));
        if length > limit {
            return Err(CheckpointError::HeaderTooLarge { file: path.into(), found: length, limit });
        }
        let data_start = 8 + length as usize;
        let tensors = parse_header(path, &rest[..length as usize], found - data_start as u64, found)?;
        Ok(Self { file: path.into(), map, data_start, tensors })
    }

    /// The bytes of a range inside the data.
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.map[self.data_start..][range]
    }
}

/// Reads the header and checks that the tensors tile the `data_len` bytes of data exactly.
fn parse_header(
    file: &Path,
    header: &[u8],
    data_len: u64,
    file_len: u64,
) -> Result<BTreeMap<String, Entry>, CheckpointError> {
    let invalid = |reason: String| CheckpointError::HeaderInvalid { file: file.into(), reason };
    let entries: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|error| invalid(error.to_string()))?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, value) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
        let entry: HeaderEntry = serde_json::from_value(value).map_err(|error| invalid(format!("{name}: {error}")))?;
        let Some(dtype) = dtype(&entry.dtype) else {
            return Err(CheckpointError::UnsupportedDtype { file: file.into(), tensor: name, found: entry.dtype });
        };
        let size = entry.shape.iter().try_fold(dtype.size_in_bytes(), |size, dim| size.checked_mul(*dim));
        let Some(expected) = size.and_then(|size| u64::try_from(size).ok()) else {
            return Err(CheckpointError::ShapeOverflow { file: file.into(), tensor: name, shape: entry.shape });
        };
        let (start, end) = entry.data_offsets;
        match end.checked_sub(start) {
            Some(found) if found == expected => tensors.push((start, end, name, dtype, entry.shape)),
            Some(found) => {
                return Err(CheckpointError::SizeMismatch { file: file.into(), tensor: name, found, expected });
            }
            None => {
                return Err(CheckpointError::OffsetsInvalid {
                    file: file.into(),
                    tensor: name,
                    found: start..end,
                    expected_start: start,
                });
            }
        }
    }
    tensors.sort_by_key(|&(start, end, ..)| (start, end));
    let mut data_end = 0;
    for (start, end, name, ..) in &tensors {
        if *start != data_end {
            return Err(CheckpointError::OffsetsInvalid {
                file: file.into(),
                tensor: name.clone(),
                found: *start..*end,
                expected_start: data_end,
            });
        }
        data_end = *end;
    }
    // data_end comes from the header: saturate, it only has to be named.
    let expected = data_end.saturating_add(file_len - data_len);
    if data_end > data_len {
        return Err(CheckpointError::Truncated { file: file.into(), found: file_len, expected });
    }
    if data_end < data_len {
        return Err(CheckpointError::TrailingBytes { file: file.into(), found: file_len, expected });
    }
    let entry = |(start, end, name, dtype, shape)| (name, Entry { dtype, shape, range: start as usize..end as usize });
    Ok(tensors.into_iter().map(entry).collect())
}

fn dtype(name: &str) -> Option<DType> {
    Some(match name {
        "U8" => DType::U8,
        "U32" => DType::U32,
        "I64" => DType::I64,
        "F8_E4M3" => DType::F8E4M3,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        "F32" => DType::F32,
        _ => return None,
    })
}
