//! Checkpoints that are right, and every way in which one can be wrong.

use candle_core::{DType, Device, Tensor};
use candle_moe::checkpoint::{Checkpoint, CheckpointError, read_json};
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::gpt_oss::tiny_folder;

/// A temporary folder that goes away with the value.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("candle-moe-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    fn write(&self, name: &str, bytes: &[u8]) -> &Self {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self
    }

    fn open(&self) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::open(&self.0)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A safetensors file with this header and data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

const HEADER: &str =
    r#"{"a":{"dtype":"U8","shape":[2,3],"data_offsets":[0,6]},"b":{"dtype":"F32","shape":[2],"data_offsets":[6,14]}}"#;
const DATA: [u8; 14] = [1, 2, 3, 4, 5, 6, 0, 0, 128, 63, 0, 0, 0, 64];

fn valid() -> Vec<u8> {
    file(HEADER, &DATA)
}

fn index(weight_map: &[(&str, &str)]) -> Vec<u8> {
    let map: HashMap<_, _> = weight_map.iter().copied().collect();
    serde_json::to_vec(&serde_json::json!({ "weight_map": map })).unwrap()
}

/// Opens a folder with this single file; the message must name the file and everything in `names`.
fn error_of(bytes: &[u8], names: &[&str]) -> CheckpointError {
    let folder = Folder::new();
    let error = folder.write("model.safetensors", bytes).open().unwrap_err();
    let message = error.to_string();
    for name in names.iter().chain(&["model.safetensors"]) {
        assert!(message.contains(name), "{message:?} does not name {name}");
    }
    error
}

#[test]
fn reads_what_candle_reads() {
    let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
    let mut expected = HashMap::new();
    for shard in ["model-00001-of-00002", "model-00002-of-00002"] {
        expected.extend(
            candle_core::safetensors::load(format!("{}/{shard}.safetensors", tiny_folder()), &Device::Cpu).unwrap(),
        );
    }
    assert_eq!(checkpoint.names().count(), expected.len());
    for (name, expected) in &expected {
        let found = checkpoint.tensor(name, expected.dims(), &[expected.dtype()], &Device::Cpu).unwrap();
        let bytes = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bytes(&found), bytes(expected), "{name}");
    }
    assert_eq!(checkpoint.bytes_read(), checkpoint.total_bytes());
}

#[test]
fn rows_touch_their_own_bytes_only() {
    let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
    let name = "model.layers.1.mlp.experts.gate_up_proj_blocks";
    let shape = [8, 384, 4, 16];
    let read = |rows| checkpoint.rows(name, &shape, &[DType::U8], rows, &Device::Cpu).unwrap();
    assert_eq!(read(3..3).dims(), [0, 384, 4, 16]);
    assert!(checkpoint.ranges_read(name).is_empty() && checkpoint.bytes_read() == 0);
    let row = 384 * 4 * 16u64;
    let part = read(5..7);
    assert_eq!(checkpoint.ranges_read(name), [5 * row..7 * row]);
    read(4..5);
    read(1..2);
    assert_eq!(checkpoint.ranges_read(name), [row..2 * row, 4 * row..7 * row]);
    assert_eq!(checkpoint.bytes_read(), 4 * row);
    let whole = checkpoint.tensor(name, &shape, &[DType::U8], &Device::Cpu).unwrap();
    let bytes = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    assert_eq!(bytes(&part), bytes(&whole.narrow(0, 5, 2).unwrap()));
    assert_eq!(checkpoint.bytes_read(), 8 * row, "bytes that are read again count once");
}

#[test]
fn unaligned_tensors_are_read() {
    let folder = Folder::new();
    let checkpoint = folder.write("model.safetensors", &valid()).open().unwrap();
    let b = checkpoint.tensor("b", &[2], &[DType::F32], &Device::Cpu).unwrap();
    assert_eq!(b.to_vec1::<f32>().unwrap(), [1.0, 2.0]);
}

#[test]
fn a_single_file_of_any_name_is_a_checkpoint_and_two_are_not() {
    let folder = Folder::new();
    assert!(folder.write("weights.safetensors", &valid()).open().unwrap().contains("a"));
    let error = folder.write("more.safetensors", &valid()).open().unwrap_err();
    assert!(matches!(error, CheckpointError::NotFound { .. }), "{error}");
}

#[test]
fn what_is_not_there_is_named() {
    let folder = Folder::new();
    assert!(matches!(folder.open().unwrap_err(), CheckpointError::NotFound { .. }));
    assert!(matches!(Checkpoint::open("/no/such/folder").unwrap_err(), CheckpointError::NotFound { .. }));
    let file = folder.write("model.safetensors", &valid()).0.join("model.safetensors");
    assert!(matches!(Checkpoint::open(file).unwrap_err(), CheckpointError::NotFound { .. }));
    let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
    let error = checkpoint.info("model.layers.0.mlp.router.weights").unwrap_err();
    assert!(error.to_string().contains("model.layers.0.mlp.router.weight"), "{error}");
}

#[test]
fn headers_that_lie_are_found_before_anything_is_read() {
    use CheckpointError::*;
    assert!(matches!(error_of(b"", &[]), HeaderTooShort { found: 0, .. } | Io { .. }));
    assert!(matches!(error_of(&[1; 7], &["7"]), HeaderTooShort { found: 7, .. }));
    assert!(matches!(error_of(&[255; 64], &[&u64::MAX.to_string(), "56"]), HeaderTooLarge { .. }));
    assert!(matches!(error_of(&file("{", &[]), &[]), HeaderInvalid { .. }));
    assert!(matches!(error_of(&file("[]", &[]), &[]), HeaderInvalid { .. }));
    assert!(matches!(error_of(&file(r#"{"a":{"dtype":"U8"}}"#, &[]), &["a", "shape"]), HeaderInvalid { .. }));
    let one = |dtype: &str, shape: &str, offsets: &str, data: &[u8], names: &[&str]| {
        let header = format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
        error_of(&file(&header, data), &[&[": t: "], names].concat())
    };
    assert!(matches!(one("F32", "[-1]", "[0,4]", &[0; 4], &[]), HeaderInvalid { .. }));
    let huge = format!("[{0},{0}]", 1u64 << 60);
    assert!(matches!(one("F32", &huge, "[0,4]", &[0; 4], &["overflows"]), ShapeOverflow { .. }));
    assert!(matches!(one("NEW", &huge, "[0,4]", &[0; 4], &["overflows"]), ShapeOverflow { .. }));
    assert!(matches!(one("F32", "[2]", "[0,4]", &[0; 4], &["4", "8"]), SizeMismatch { found: 4, expected: 8, .. }));
    assert!(matches!(one("F32", "[1]", "[4,0]", &[0; 4], &[]), OffsetsInvalid { .. }));
    assert!(matches!(one("F32", "[1]", "[4,8]", &[0; 8], &[]), OffsetsInvalid { expected_start: 0, .. }));
    let far = format!("[{},{}]", u64::MAX - 4, u64::MAX);
    assert!(matches!(one("F32", "[1]", &far, &[0; 4], &[]), OffsetsInvalid { .. }));
    let overlap = HEADER.replace("[6,14]", "[5,13]");
    assert!(matches!(error_of(&file(&overlap, &DATA), &["b"]), OffsetsInvalid { expected_start: 6, .. }));
    let truncated = &valid()[..valid().len() - 1];
    let expected = valid().len() as u64;
    assert!(matches!(error_of(truncated, &["truncated"]), Truncated { expected: e, .. } if e == expected));
    assert!(matches!(error_of(&[valid(), vec![0]].concat(), &[]), TrailingBytes { .. }));
}

/// Strides are products of the dimensions behind them, whether or not one before them is 0.
#[test]
fn a_zero_dimension_does_not_hide_an_overflow() {
    let empty = |shape: &str| file(&format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#), &[]);
    for shape in [format!("[0,{0},{0}]", 1u64 << 40), format!("[{0},0,{0}]", 1u64 << 40), format!("[0,{}]", 1u64 << 62)]
    {
        let error = error_of(&empty(&shape), &["t", "overflows"]);
        assert!(matches!(error, CheckpointError::ShapeOverflow { .. }), "{error}");
    }
    let folder = Folder::new();
    let checkpoint = folder.write("model.safetensors", &empty("[0,1099511627776]")).open().unwrap();
    let tensor = checkpoint.tensor("t", &[0, 1 << 40], &[DType::F32], &Device::Cpu).unwrap();
    assert_eq!(tensor.dims(), [0, 1 << 40]);
}

#[test]
fn a_name_twice_in_one_header_is_a_duplicate() {
    for header in [HEADER.replace("\"b\"", "\"a\""), HEADER.replace("\"b\"", "\"\\u0061\"")] {
        let error = error_of(&file(&header, &DATA), &["a is in", "already"]);
        assert!(matches!(error, CheckpointError::DuplicateTensor { .. }), "{error}");
    }
    // Also where both entries are the same.
    let entry = r#""a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#;
    let error = error_of(&file(&format!("{{{entry},{entry}}}"), &[0; 2]), &["a is in"]);
    assert!(matches!(error, CheckpointError::DuplicateTensor { .. }), "{error}");
    let error = error_of(&file(&HEADER.replace("[2,3]", r#"[6],"shape":[2,3]"#), &DATA), &["a: duplicate field"]);
    assert!(matches!(error, CheckpointError::HeaderInvalid { .. }), "{error}");
}

/// A tensor `t` of this dtype between two that can be read, in a file of its own.
fn with_foreign_tensor(dtype: &str, shape: &str, bytes: usize) -> (Folder, Result<Checkpoint, CheckpointError>) {
    let entry = |name: &str, dtype: &str, shape: &str, start: usize, end: usize| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let (first, last) = (entry("a", "U8", "[2]", 0, 2), entry("z", "U8", "[1]", 2 + bytes, 3 + bytes));
    let header = format!("{{{first},{},{last}}}", entry("t", dtype, shape, 2, 2 + bytes));
    let folder = Folder::new();
    folder.write("model.safetensors", &file(&header, &vec![7; 3 + bytes]));
    let opened = folder.open();
    (folder, opened)
}

#[test]
fn a_dtype_that_cannot_be_read_harms_only_its_own_tensor() {
    for (dtype, bits) in [
        ("BOOL", 8),
        ("I8", 8),
        ("F8_E5M2", 8),
        ("F8_E8M0", 8),
        ("F8_E4M3FNUZ", 8),
        ("F8_E5M2FNUZ", 8),
        ("I16", 16),
        ("U16", 16),
        ("I32", 32),
        ("U64", 64),
        ("F64", 64),
        ("C64", 64),
        ("F4", 4),
        ("F6_E2M3", 6),
        ("F6_E3M2", 6),
    ] {
        let (_folder, checkpoint) = with_foreign_tensor(dtype, "[3,4]", 12 * bits / 8);
        let checkpoint = checkpoint.unwrap();
        let info = checkpoint.info("t").unwrap();
        assert_eq!((info.dtype, info.dtype_name.as_str(), info.bytes), (None, dtype, 12 * bits as u64 / 8));
        let z = checkpoint.tensor("z", &[1], &[DType::U8], &Device::Cpu).unwrap();
        assert_eq!(z.to_vec1::<u8>().unwrap(), [7]);
        let whole = checkpoint.tensor("t", &[3, 4], &[DType::U8], &Device::Cpu);
        let rows = checkpoint.rows("t", &[3, 4], &[DType::U8], 0..1, &Device::Cpu);
        for error in [whole.unwrap_err(), rows.unwrap_err()] {
            assert!(matches!(error, CheckpointError::UnsupportedDtype { .. }), "{error}");
            assert!(error.to_string().contains(&format!("model.safetensors: t: dtype {dtype} is not supported")));
        }
        assert_eq!(checkpoint.bytes_read(), 1);
        let (_folder, checkpoint) = with_foreign_tensor(dtype, "[3,4]", 12 * bits / 8 + 1);
        assert!(matches!(checkpoint.unwrap_err(), CheckpointError::SizeMismatch { .. }), "{dtype}");
    }
}

#[test]
fn a_dtype_of_the_future_has_any_size() {
    for bytes in [0, 1, 5] {
        let (_folder, checkpoint) = with_foreign_tensor("F3", "[3,4]", bytes);
        let checkpoint = checkpoint.unwrap();
        assert_eq!(checkpoint.info("t").unwrap().bytes, bytes as u64);
        let error = checkpoint.tensor("t", &[3, 4], &[DType::U8], &Device::Cpu).unwrap_err();
        assert!(matches!(error, CheckpointError::UnsupportedDtype { .. }), "{error}");
    }
    // Its place is checked all the same.
    let header = r#"{"t":{"dtype":"F3","shape":[1],"data_offsets":[4,0]}}"#;
    assert!(matches!(error_of(&file(header, &[0; 4]), &["t"]), CheckpointError::OffsetsInvalid { .. }));
}

#[test]
fn an_index_that_lies_is_found() {
    use CheckpointError::*;
    let check = |weight_map: &[(&str, &str)], names: &[&str]| {
        let folder = Folder::new();
        folder.write("x.safetensors", &valid()).write("model.safetensors.index.json", &index(weight_map));
        let error = folder.open().unwrap_err();
        for name in names {
            assert!(error.to_string().contains(name), "{error} does not name {name}");
        }
        error
    };
    assert!(matches!(check(&[("a", "y.safetensors")], &["y.safetensors", "index.json"]), MissingShard { .. }));
    assert!(matches!(check(&[("c", "x.safetensors")], &["x.safetensors", "c"]), TensorNotInShard { .. }));
    for escape in ["../x.safetensors", "/x.safetensors", "", "..", "sub/x.safetensors", "sub\\x.safetensors"] {
        assert!(matches!(check(&[("a", escape)], &["a", "index.json"]), IndexPathEscapes { .. }), "{escape}");
    }
    let folder = Folder::new();
    folder.write("model.safetensors.index.json", b"{}");
    assert!(matches!(folder.open().unwrap_err(), Json { .. }));
    let folder = Folder::new();
    let both = index(&[("a", "x.safetensors"), ("b", "y.safetensors")]);
    folder.write("x.safetensors", &valid()).write("y.safetensors", &valid());
    let error = folder.write("model.safetensors.index.json", &both).open().unwrap_err();
    assert!(matches!(error, DuplicateTensor { .. }), "{error}");
}

#[test]
fn expectations_are_checked_and_named() {
    use CheckpointError::*;
    let folder = Folder::new();
    let checkpoint = folder.write("model.safetensors", &valid()).open().unwrap();
    let error = checkpoint.tensor("a", &[3, 2], &[DType::U8], &Device::Cpu).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, WrongShape { .. }));
    assert!(message.contains("model.safetensors: a: shape [2, 3], expected [3, 2]"), "{message}");
    let error = checkpoint.tensor("a", &[2, 3], &[DType::F32, DType::BF16], &Device::Cpu).unwrap_err();
    assert!(matches!(error, WrongDtype { .. }));
    assert!(error.to_string().contains("a: dtype u8, expected f32 or bf16"), "{error}");
    for rows in [Range::from((0, 3)), (2, 1).into(), (3, 3).into(), (0, usize::MAX).into()] {
        let error = checkpoint.rows("a", &[2, 3], &[DType::U8], rows.0, &Device::Cpu).unwrap_err();
        assert!(matches!(error, RowsOutOfRange { num_rows: 2, .. }), "{error}");
    }
    assert_eq!(checkpoint.bytes_read(), 0);
}

/// A range that may run backwards.
struct Range(std::ops::Range<usize>);

impl From<(usize, usize)> for Range {
    fn from((start, end): (usize, usize)) -> Self {
        Self(start..end)
    }
}

#[test]
fn json_errors_name_file_and_place() {
    let folder = Folder::new();
    folder.write("config.json", b"{\n  \"a\": ]");
    let error = read_json::<serde_json::Value>(folder.0.join("config.json")).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("line 2"), "{error}");
}

/// Whatever is in the file: an error or tensors that can be read, and never a panic.
fn survives(bytes: &[u8]) {
    let folder = Folder::new();
    if let Ok(checkpoint) = folder.write("model.safetensors", bytes).open() {
        let mut readable = 0;
        for name in checkpoint.names() {
            let info = checkpoint.info(name).unwrap();
            let read = checkpoint.tensor(name, &info.shape, info.dtype.as_slice(), &Device::Cpu);
            assert_eq!(read.is_ok(), info.dtype.is_some(), "{read:?}");
            readable += info.dtype.map_or(0, |_| info.bytes);
        }
        assert_eq!(checkpoint.bytes_read(), readable);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((0..1000usize, any::<u8>()), 1..6)) {
        let mut bytes = valid();
        for (place, byte) in flips {
            let len = bytes.len();
            bytes[place % len] = byte;
        }
        survives(&bytes);
    }

    #[test]
    fn truncated_files_never_panic(len in 0..140usize) {
        survives(&valid()[..len.min(valid().len())]);
    }

    #[test]
    fn any_header_never_panics(
        shape in prop::collection::vec(any::<u64>(), 0..4),
        start in any::<u64>(),
        end in any::<u64>(),
        data in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let header = format!(r#"{{"t":{{"dtype":"F16","shape":{shape:?},"data_offsets":[{start},{end}]}}}}"#);
        survives(&file(&header, &data));
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        survives(&bytes);
    }
}

#[test]
fn a_shard_that_is_cut_off_is_an_error_that_names_it() {
    let folder = Folder::new();
    for name in ["model.safetensors.index.json", "model-00001-of-00002.safetensors"] {
        std::fs::copy(Path::new(&tiny_folder()).join(name), folder.0.join(name)).unwrap();
    }
    let error = folder.open().unwrap_err();
    assert!(matches!(error, CheckpointError::MissingShard { .. }));
    assert!(error.to_string().contains("model-00002-of-00002.safetensors"), "{error}");
    let whole = std::fs::read(Path::new(&tiny_folder()).join("model-00002-of-00002.safetensors")).unwrap();
    let error = folder.write("model-00002-of-00002.safetensors", &whole[..whole.len() / 2]).open().unwrap_err();
    assert!(matches!(error, CheckpointError::Truncated { .. }));
    assert!(error.to_string().contains("model-00002-of-00002.safetensors"), "{error}");
}
