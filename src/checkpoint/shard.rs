//! One safetensors file: its map and its header.

use super::CheckpointError;
use super::header::{self, Entry};
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
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
        let header = read_header(path, &file, map.len() as u64)?;
        let data_start = 8 + header.len();
        let tensors = header::parse(path, &header, (map.len() - data_start) as u64)?;
        Ok(Self { file: path.into(), map, data_start, tensors })
    }

    /// The bytes of a range inside the data.
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.map[self.data_start..][range]
    }
}

/// The header of a file of `found` bytes, read and not mapped: the parser needs bytes that stay as they are, whoever
/// writes to the file meanwhile.
fn read_header(path: &Path, mut file: &File, found: u64) -> Result<Vec<u8>, CheckpointError> {
    let io = |error: std::io::Error| CheckpointError::Io { file: path.into(), reason: error.to_string() };
    let Some(rest) = found.checked_sub(8) else {
        return Err(CheckpointError::HeaderTooShort { file: path.into(), found });
    };
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let (length, limit) = (u64::from_le_bytes(length), MAX_HEADER.min(rest));
    if length > limit {
        return Err(CheckpointError::HeaderTooLarge { file: path.into(), found: length, limit });
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(io)?;
    Ok(header)
}
