//! The ways in which a checkpoint can be wrong.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

/// What is wrong with a checkpoint: one variant per way, each naming the file, the tensor where there is one, what was
/// found and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the fields are named after what Display says of them")]
pub enum CheckpointError {
    /// The folder holds no checkpoint.
    NotFound { folder: PathBuf, reason: String },
    /// The operating system said no.
    Io { file: PathBuf, reason: String },
    /// A JSON file that is none, or says something else.
    Json { file: PathBuf, reason: String },
    /// The file is too short for the length of its header.
    HeaderTooShort { file: PathBuf, found: u64 },
    /// The length of the header is beyond the limit or the file.
    HeaderTooLarge { file: PathBuf, found: u64, limit: u64 },
    /// The header is no JSON of the expected form.
    HeaderInvalid { file: PathBuf, reason: String },
    /// A tensor has a dtype that this crate does not read.
    UnsupportedDtype { file: PathBuf, tensor: String, found: String },
    /// The number of bits of a shape overflows, zero dimensions counted as ones.
    ShapeOverflow { file: PathBuf, tensor: String, shape: Vec<usize> },
    /// The data offsets of a tensor do not match its shape and dtype.
    SizeMismatch { file: PathBuf, tensor: String, found: u64, expected: u64 },
    /// The data offsets of a tensor are not where the tensor before it ended: reversed, overlapping, or with a gap.
    OffsetsInvalid { file: PathBuf, tensor: String, found: Range<u64>, expected_start: u64 },
    /// The file ends before its data.
    Truncated { file: PathBuf, found: u64, expected: u64 },
    /// The file goes on after its data.
    TrailingBytes { file: PathBuf, found: u64, expected: u64 },
    /// Two shards hold a tensor of the same name, or one shard holds it twice.
    DuplicateTensor { tensor: String, first: PathBuf, second: PathBuf },
    /// The index names a file that is not a plain name inside the folder.
    IndexPathEscapes { file: PathBuf, tensor: String, found: String },
    /// A shard that the index names does not exist.
    MissingShard { file: PathBuf, index: PathBuf },
    /// A shard lacks a tensor that the index places in it.
    TensorNotInShard { file: PathBuf, tensor: String },
    /// No such tensor.
    MissingTensor { folder: PathBuf, tensor: String, similar: Vec<String> },
    /// A tensor of another shape.
    WrongShape { file: PathBuf, tensor: String, found: Vec<usize>, expected: Vec<usize> },
    /// A tensor of another dtype.
    WrongDtype { file: PathBuf, tensor: String, found: String, expected: Vec<String> },
    /// Rows that the tensor does not have.
    RowsOutOfRange { file: PathBuf, tensor: String, found: Range<usize>, num_rows: usize },
    /// Candle could not make a tensor of the bytes.
    Candle { file: PathBuf, tensor: String, reason: String },
}

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use CheckpointError::*;
        match self {
            NotFound { folder, reason } => write!(
                f,
                "{}: no checkpoint: {reason}; expected model.safetensors, or shards with model.safetensors.index.json",
                folder.display()
            ),
            Io { file, reason } => write!(f, "{}: {reason}", file.display()),
            Json { file, reason } => write!(f, "{}: {reason}", file.display()),
            HeaderTooShort { file, found } => {
                write!(f, "{}: {found} bytes, expected at least 8 for the length of the header", file.display())
            }
            HeaderTooLarge { file, found, limit } => {
                write!(f, "{}: the header claims {found} bytes, expected at most {limit}", file.display())
            }
            HeaderInvalid { file, reason } => write!(f, "{}: invalid header: {reason}", file.display()),
            UnsupportedDtype { file, tensor, found } => write!(
                f,
                "{}: {tensor}: dtype {found} is not supported, expected one of U8, U32, I64, F8_E4M3, F16, BF16, F32",
                file.display()
            ),
            ShapeOverflow { file, tensor, shape } => {
                write!(f, "{}: {tensor}: the size of shape {shape:?} overflows", file.display())
            }
            SizeMismatch { file, tensor, found, expected } => write!(
                f,
                "{}: {tensor}: data offsets span {found} bytes, expected {expected} by shape and dtype",
                file.display()
            ),
            OffsetsInvalid { file, tensor, found, expected_start } => write!(
                f,
                "{}: {tensor}: data offsets are {found:?}, expected them to start at {expected_start} and not to end \
                 before they start",
                file.display()
            ),
            Truncated { file, found, expected } => write!(
                f,
                "{}: truncated: {found} bytes, expected {expected} by its header; fetch the file again",
                file.display()
            ),
            TrailingBytes { file, found, expected } => {
                write!(f, "{}: {found} bytes, expected {expected} by its header", file.display())
            }
            DuplicateTensor { tensor, first, second } => {
                write!(f, "{}: {tensor} is in {} already, expected it once", second.display(), first.display())
            }
            IndexPathEscapes { file, tensor, found } => write!(
                f,
                "{}: {tensor}: the index names the file {found:?}, expected a plain name inside the folder",
                file.display()
            ),
            MissingShard { file, index } => write!(
                f,
                "{}: missing, though {} names it; fetch the rest of the checkpoint",
                file.display(),
                index.display()
            ),
            TensorNotInShard { file, tensor } => {
                write!(f, "{}: {tensor} is missing, though the index places it here", file.display())
            }
            MissingTensor { folder, tensor, similar } => {
                write!(f, "{}: no tensor {tensor}", folder.display())?;
                if !similar.is_empty() {
                    write!(f, "; the nearest names are {}", similar.join(", "))?;
                }
                Ok(())
            }
            WrongShape { file, tensor, found, expected } => {
                write!(f, "{}: {tensor}: shape {found:?}, expected {expected:?}", file.display())
            }
            WrongDtype { file, tensor, found, expected } => {
                write!(f, "{}: {tensor}: dtype {found}, expected {}", file.display(), expected.join(" or "))
            }
            RowsOutOfRange { file, tensor, found, num_rows } => {
                write!(f, "{}: {tensor}: rows {found:?}, expected a range inside 0..{num_rows}", file.display())
            }
            Candle { file, tensor, reason } => write!(f, "{}: {tensor}: {reason}", file.display()),
        }
    }
}

impl std::error::Error for CheckpointError {}

impl From<CheckpointError> for candle_core::Error {
    fn from(error: CheckpointError) -> Self {
        Self::wrap(error)
    }
}
