//! Checkpoints: safetensors folders through memory maps, of which a rank touches only what it asks for.
//!
//! [`Checkpoint::open`] reads the headers and checks all that headers and file sizes can tell; [`Checkpoint::tensor`] and
//! [`Checkpoint::rows`] copy the bytes of a tensor or of a range of its rows, and nothing else. The room knows no model:
//! callers say which names, shapes and dtypes they expect.

mod error;
mod header;
mod shard;

pub use error::CheckpointError;

use candle_core::{DType, Device, Tensor};
use header::Entry;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use shard::Shard;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Largest JSON file that is read.
const MAX_JSON: u64 = 100 << 20;

/// An opened checkpoint. Share it between ranks by reference or [`Arc`](std::sync::Arc).
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_moe::checkpoint::Checkpoint;
/// let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-gpt-oss");
/// let checkpoint = Checkpoint::open(folder)?;
/// let scales = "model.layers.0.mlp.experts.down_proj_scales";
/// // The scales of experts 2 and 3 out of 8.
/// let rows = checkpoint.rows(scales, &[8, 128, 6], &[DType::U8], 2..4, &Device::Cpu)?;
/// assert_eq!(rows.dims(), [2, 128, 6]);
/// assert_eq!(checkpoint.bytes_read(), 2 * 128 * 6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct Checkpoint {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// Name to shard.
    places: BTreeMap<String, usize>,
    read: Mutex<BTreeMap<String, Vec<Range<u64>>>>,
}

/// What a checkpoint says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The file that holds it.
    pub file: PathBuf,
    /// Its stored dtype, `None` where this crate cannot read it.
    pub dtype: Option<DType>,
    /// Its stored dtype as the file spells it: `BF16`.
    pub dtype_name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its size.
    pub bytes: u64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Maps the shards that `model.safetensors.index.json` names; else `model.safetensors`; else the only `.safetensors`
    /// file of the folder.
    ///
    /// The files must not be changed while the checkpoint is open: they are mapped, not copied.
    ///
    /// # Errors
    /// Everything that headers and file sizes can be wrong in, before any tensor is read. A tensor of a dtype that this
    /// crate cannot read is no error until it is read.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let folder = folder.as_ref();
        let index = folder.join(INDEX);
        let mut checkpoint =
            Self { folder: folder.into(), shards: Vec::new(), places: BTreeMap::new(), read: Mutex::default() };
        if index.exists() {
            let weight_map = read_json::<Index>(&index)?.weight_map;
            for file in shard_files(&index, &weight_map)? {
                checkpoint.add(&folder.join(file), &index)?;
            }
            checkpoint.check_index(&weight_map)?;
        } else {
            let file = single_file(folder)?;
            checkpoint.add(&file, &file)?;
        }
        tracing::info!(
            folder = %folder.display(),
            shards = checkpoint.shards.len(),
            tensors = checkpoint.places.len(),
            bytes = checkpoint.total_bytes(),
            "opened checkpoint"
        );
        Ok(checkpoint)
    }

    fn add(&mut self, file: &Path, index: &Path) -> Result<(), CheckpointError> {
        if !file.exists() {
            return Err(CheckpointError::MissingShard { file: file.into(), index: index.into() });
        }
        let shard = Shard::open(file)?;
        for name in shard.tensors.keys() {
            if let Some(first) = self.places.insert(name.clone(), self.shards.len()) {
                return Err(CheckpointError::DuplicateTensor {
                    tensor: name.clone(),
                    first: self.shards[first].file.clone(),
                    second: file.into(),
                });
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    fn check_index(&self, weight_map: &BTreeMap<String, String>) -> Result<(), CheckpointError> {
        for (tensor, name) in weight_map {
            let file = self.folder.join(name);
            let held = self.places.get(tensor).is_some_and(|&shard| self.shards[shard].file == file);
            if !held {
                return Err(CheckpointError::TensorNotInShard { file, tensor: tensor.clone() });
            }
        }
        Ok(())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// What the checkpoint says of a tensor.
    ///
    /// # Errors
    /// [`MissingTensor`](CheckpointError::MissingTensor), with the nearest names.
    pub fn info(&self, name: &str) -> Result<TensorInfo, CheckpointError> {
        let (shard, entry) = self.find(name)?;
        Ok(TensorInfo {
            file: shard.file.clone(),
            dtype: entry.dtype,
            dtype_name: entry.dtype_name.clone(),
            shape: entry.shape.clone(),
            bytes: entry.range.len() as u64,
        })
    }

    /// A whole tensor in its stored dtype, which must be one of `dtypes`.
    ///
    /// # Errors
    /// No such tensor, another shape or dtype, or a dtype that this crate cannot read at all.
    pub fn tensor(
        &self,
        name: &str,
        shape: &[usize],
        dtypes: &[DType],
        device: &Device,
    ) -> Result<Tensor, CheckpointError> {
        let (shard, entry, dtype) = self.find_as(name, shape, dtypes)?;
        self.copy(shard, entry, name, 0..entry.range.len(), (shape, dtype), device)
    }

    /// The rows `rows` of a tensor of shape `shape`: `[rows.len(), shape[1..]]`. Touches only their bytes.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor); rows that the tensor does not have.
    pub fn rows(
        &self,
        name: &str,
        shape: &[usize],
        dtypes: &[DType],
        rows: Range<usize>,
        device: &Device,
    ) -> Result<Tensor, CheckpointError> {
        let (shard, entry, dtype) = self.find_as(name, shape, dtypes)?;
        let num_rows = shape.first().copied().unwrap_or(0);
        if rows.start > rows.end || rows.end > num_rows {
            let (file, tensor) = (shard.file.clone(), name.to_string());
            return Err(CheckpointError::RowsOutOfRange { file, tensor, found: rows, num_rows });
        }
        let row_bytes = entry.range.len() / num_rows.max(1);
        let mut shape = shape.to_vec();
        if let Some(first) = shape.first_mut() {
            *first = rows.len();
        }
        self.copy(shard, entry, name, rows.start * row_bytes..rows.end * row_bytes, (&shape, dtype), device)
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().flat_map(|shard| shard.tensors.values()).map(|entry| entry.range.len() as u64).sum()
    }

    /// Bytes of tensors that were touched so far, each counted once.
    pub fn bytes_read(&self) -> u64 {
        self.read_log(|log| log.values().flatten().map(|range| range.end - range.start).sum())
    }

    /// The byte ranges inside tensor `name` that were touched so far, merged and sorted.
    pub fn ranges_read(&self, name: &str) -> Vec<Range<u64>> {
        self.read_log(|log| log.get(name).cloned().unwrap_or_default())
    }

    fn read_log<R>(&self, f: impl FnOnce(&mut BTreeMap<String, Vec<Range<u64>>>) -> R) -> R {
        f(&mut self.read.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn find(&self, name: &str) -> Result<(&Shard, &Entry), CheckpointError> {
        let shard = self.places.get(name).map(|&shard| &self.shards[shard]);
        match shard.and_then(|shard| Some((shard, shard.tensors.get(name)?))) {
            Some(found) => Ok(found),
            None => Err(CheckpointError::MissingTensor {
                folder: self.folder.clone(),
                tensor: name.into(),
                similar: self.similar_names(name),
            }),
        }
    }

    fn find_as(
        &self,
        name: &str,
        shape: &[usize],
        dtypes: &[DType],
    ) -> Result<(&Shard, &Entry, DType), CheckpointError> {
        let (shard, entry) = self.find(name)?;
        let Some(dtype) = entry.dtype else {
            return Err(CheckpointError::UnsupportedDtype {
                file: shard.file.clone(),
                tensor: name.into(),
                found: entry.dtype_name.clone(),
            });
        };
        if entry.shape != shape {
            return Err(CheckpointError::WrongShape {
                file: shard.file.clone(),
                tensor: name.into(),
                found: entry.shape.clone(),
                expected: shape.into(),
            });
        }
        if !dtypes.contains(&dtype) {
            return Err(CheckpointError::WrongDtype {
                file: shard.file.clone(),
                tensor: name.into(),
                found: dtype.as_str().into(),
                expected: dtypes.iter().map(|dtype| dtype.as_str().into()).collect(),
            });
        }
        Ok((shard, entry, dtype))
    }

    fn copy(
        &self,
        shard: &Shard,
        entry: &Entry,
        name: &str,
        range: Range<usize>,
        (shape, dtype): (&[usize], DType),
        device: &Device,
    ) -> Result<Tensor, CheckpointError> {
        let (start, end) = (entry.range.start + range.start, entry.range.start + range.end);
        let candle = |error: candle_core::Error| CheckpointError::Candle {
            file: shard.file.clone(),
            tensor: name.into(),
            reason: error.to_string(),
        };
        if range.is_empty() {
            return Tensor::zeros(shape, dtype, device).map_err(candle);
        }
        self.read_log(|log| {
            let ranges = log.entry(name.into()).or_default();
            ranges.push(range.start as u64..range.end as u64);
            merge(ranges);
        });
        Tensor::from_raw_buffer(shard.bytes(start..end), dtype, shape, device).map_err(candle)
    }

    /// Up to three existing names that share the longest beginning and end with `name`.
    fn similar_names(&self, name: &str) -> Vec<String> {
        let shared = |other: &str| {
            let from_start = name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
            let from_end = name.bytes().rev().zip(other.bytes().rev()).take_while(|(a, b)| a == b).count();
            (from_start + from_end).min(name.len().min(other.len()))
        };
        let mut names: Vec<_> = self.names().map(|other| (shared(other), other)).collect();
        names.sort_by_key(|&(shared, _)| std::cmp::Reverse(shared));
        let near = |&&(shared, _): &&(usize, &str)| 2 * shared > name.len();
        names.iter().filter(near).take(3).map(|(_, name)| name.to_string()).collect()
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("folder", &self.folder)
            .field("shards", &self.shards.len())
            .field("tensors", &self.places.len())
            .finish()
    }
}

/// Reads a JSON file of at most 100 MB.
///
/// # Errors
/// [`Io`](CheckpointError::Io), or [`Json`](CheckpointError::Json) with line and column.
pub fn read_json<T: DeserializeOwned>(file: impl AsRef<Path>) -> Result<T, CheckpointError> {
    let file = file.as_ref();
    let io = |error: std::io::Error| CheckpointError::Io { file: file.into(), reason: error.to_string() };
    let size = std::fs::metadata(file).map_err(io)?.len();
    if size > MAX_JSON {
        let reason = format!("{size} bytes, expected at most {MAX_JSON}");
        return Err(CheckpointError::Json { file: file.into(), reason });
    }
    let text = std::fs::read(file).map_err(io)?;
    serde_json::from_slice(&text)
        .map_err(|error| CheckpointError::Json { file: file.into(), reason: error.to_string() })
}

/// The distinct files of an index, each a plain name.
fn shard_files(index: &Path, weight_map: &BTreeMap<String, String>) -> Result<Vec<String>, CheckpointError> {
    for (tensor, file) in weight_map {
        let plain = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
        if !plain || file.contains(['/', '\\']) {
            return Err(CheckpointError::IndexPathEscapes {
                file: index.into(),
                tensor: tensor.clone(),
                found: file.clone(),
            });
        }
    }
    let mut files: Vec<_> = weight_map.values().cloned().collect();
    files.sort();
    files.dedup();
    Ok(files)
}

fn single_file(folder: &Path) -> Result<PathBuf, CheckpointError> {
    let single = folder.join(SINGLE);
    if single.exists() {
        return Ok(single);
    }
    let not_found = |reason: String| CheckpointError::NotFound { folder: folder.into(), reason };
    let entries = std::fs::read_dir(folder).map_err(|error| not_found(error.to_string()))?;
    let is_shard = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "safetensors");
    let files: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_shard).collect();
    match files.as_slice() {
        [file] => Ok(file.clone()),
        [] => Err(not_found("no .safetensors file".into())),
        files => Err(not_found(format!("{} .safetensors files and no index", files.len()))),
    }
}

/// Sorts ranges and joins those that touch.
fn merge(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges.drain(..) {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    *ranges = merged;
}
