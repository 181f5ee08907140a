//! What ranks in different processes say to each other, as bytes.
//!
//! ```text
//! magic "cMoE" | header length u32 | payload length u64 | header (JSON) | payload
//! ```
//!
//! Integers are little-endian. The header says what the message is and which generation of the group it belongs to; the
//! payload carries rows or bytes as they lie in memory, for the ranks are on one machine.
//!
//! A peer may be anything that found the port. So lengths are limited before anything is read, a payload is stored as it
//! comes in and never reserved in advance, and its length must be the one that dtype and shape make it.

use super::board::{Fault, Waiting, error_at};
use super::call::{Payload, Post, Site, Terms};
use super::error::{Collective, EpError, EpErrorKind, reason};
use crate::host::{try_filled, with_slice};
use candle_core::{DType, Device, Result as CandleResult, Tensor, WithDType, bail};
use float8::F8E4M3;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

const MAGIC: [u8; 4] = *b"cMoE";
const PREFIX_BYTES: usize = 16;
/// Of a header: a label, a row shape, a count per rank; or an error that quotes another.
const MAX_HEADER_BYTES: usize = 1 << 16;
/// Of a label or a reason, so that headers stay below their limit even where every byte is escaped.
const MAX_TEXT_BYTES: usize = 2048;
/// Of the rows or bytes that one rank sends to one other in one call.
pub(super) const MAX_PAYLOAD_BYTES: u64 = 1 << 33;
/// How much room a payload gets before it is there.
const FIRST_BYTES: u64 = 1 << 20;

/// The header of a message.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Envelope {
    pub(super) generation: u64,
    pub(super) message: Message,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// A rank introduces itself, to rank 0 or, with the token of the group, to another rank.
    Hello(Hello),
    /// Rank 0 still waits for these.
    Waiting { missing: Vec<usize> },
    /// The group is complete; where each rank listens.
    Welcome { token: u64, addresses: Vec<SocketAddr> },
    /// A rank is connected with all others.
    Ready,
    /// All ranks are.
    Begin,
    /// This is not going to be a group.
    Refused { kind: EpErrorKind },
    /// A rank's part in a call.
    Call(Call),
    /// Where a rank waits, beyond its deadline or asked by one that does.
    Waits(Waiting),
    /// The group has failed.
    Failed { cause: EpError, heard: EpErrorKind, since: u64 },
    /// A rank drops its handle.
    Leave { panicked: bool },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) version: String,
    /// Where this rank listens; rank 0 fills in the address that it sees.
    pub(super) port: u16,
    /// What only members of the group know; 0 at first.
    pub(super) token: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Call {
    op: Collective,
    step: u64,
    label: String,
    dtype: Option<String>,
    shape: Vec<usize>,
    counts: Vec<usize>,
    /// Rows in the payload.
    num_rows: usize,
    /// Whether the payload is a note on rows that travel another way.
    #[serde(default)]
    note: bool,
}

/// A message on its way to one peer. The payload is shared by all that it goes to.
#[derive(Clone)]
pub(super) struct Outgoing {
    head: Arc<[u8]>,
    payload: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Outgoing {
    /// A message without payload. One that does not fit into a header is not sent: `None`.
    pub(super) fn message(generation: u64, message: Message) -> Option<Self> {
        Self::with(generation, message, Arc::default(), 0..0)
    }

    fn with(generation: u64, message: Message, payload: Arc<Vec<u8>>, range: Range<usize>) -> Option<Self> {
        let header = serde_json::to_vec(&Envelope { generation, message }).ok()?;
        let len = u32::try_from(header.len()).ok().filter(|_| header.len() <= MAX_HEADER_BYTES)?;
        let head = [&MAGIC[..], &len.to_le_bytes(), &(range.len() as u64).to_le_bytes(), &header].concat();
        Some(Self { head: head.into(), payload, range })
    }

    pub(super) fn write_to(&self, mut stream: impl Write) -> io::Result<()> {
        stream.write_all(&self.head)?;
        stream.write_all(self.payload.get(self.range.clone()).unwrap_or_default())
    }
}

/// Reads one message and its payload; the payload of all but calls must be empty. Errors say what is wrong with the peer.
pub(super) fn read_from(mut stream: impl Read) -> io::Result<(Envelope, Vec<u8>)> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut prefix = [0; PREFIX_BYTES];
    stream.read_exact(&mut prefix)?;
    let [m0, m1, m2, m3, h0, h1, h2, h3, payload_len @ ..] = prefix;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(wrong(format!("it sent {:02x?} where a message begins, expected {MAGIC:02x?}", [m0, m1, m2, m3])));
    }
    let header_len = u32::from_le_bytes([h0, h1, h2, h3]) as usize;
    if header_len > MAX_HEADER_BYTES {
        return Err(wrong(format!("it announced a header of {header_len} bytes, the limit is {MAX_HEADER_BYTES}")));
    }
    let payload_len = u64::from_le_bytes(payload_len);
    if payload_len > MAX_PAYLOAD_BYTES {
        return Err(wrong(format!("it announced {payload_len} bytes, the limit is {MAX_PAYLOAD_BYTES}")));
    }
    let mut header = vec![0; header_len];
    stream.read_exact(&mut header)?;
    let envelope: Envelope =
        serde_json::from_slice(&header).map_err(|error| wrong(format!("it sent a header that is none: {error}")))?;
    envelope.message.check_payload(payload_len).map_err(wrong)?;
    let mut payload = Vec::with_capacity(payload_len.min(FIRST_BYTES) as usize);
    stream.take(payload_len).read_to_end(&mut payload)?;
    if payload.len() as u64 != payload_len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((envelope, payload))
}

impl Message {
    /// Checks the length of a payload before it is read.
    fn check_payload(&self, len: u64) -> Result<(), String> {
        let expected = match self {
            Self::Call(call) => match call.payload_bytes()? {
                Some(expected) => expected,
                None => return Ok(()),
            },
            _ => 0,
        };
        if len == expected {
            return Ok(());
        }
        Err(format!("it announced {len} bytes, where its message has {expected}"))
    }

    /// News of a fault, cut to what fits.
    pub(super) fn failed(fault: &Fault) -> Self {
        let mut cause = fault.cause.clone();
        cause.label = cut(&cause.label).to_string();
        Self::Failed {
            heard: cut_kind(&fault.heard),
            since: fault.since,
            cause: EpError { kind: cut_kind(&cause.kind), ..cause },
        }
    }
}

/// The longest beginning of `text` that is within the limit.
pub(super) fn cut(text: &str) -> &str {
    let mut len = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    &text[..len]
}

fn cut_kind(kind: &EpErrorKind) -> EpErrorKind {
    use EpErrorKind as Kind;
    let cut = |text: &str| cut(text).to_string();
    match kind {
        Kind::Aborted { by, reason } => Kind::Aborted { by: *by, reason: cut(reason) },
        Kind::BadArgument(what) => Kind::BadArgument(cut(what)),
        Kind::Tensor(what) => Kind::Tensor(cut(what)),
        Kind::Desync { rank, expected, found } => {
            Kind::Desync { rank: *rank, expected: cut(expected), found: cut(found) }
        }
        Kind::RankLost { rank, reason } => Kind::RankLost { rank: *rank, reason: cut(reason) },
        other => other.clone(),
    }
}

/// `post` as it goes to each rank of the group: all of it, or the rows that are meant for that rank. Or what of the
/// arguments is too large.
pub(super) fn calls(generation: u64, post: &Post, world_size: usize) -> Result<Vec<Outgoing>, String> {
    let (site, terms) = (&post.site, &post.terms);
    let parts = Parts::of(post).map_err(|error| reason(&error))?;
    let to_rank = |rank: usize| {
        let (num_rows, range) = parts.of_rank(rank);
        if range.len() as u64 > MAX_PAYLOAD_BYTES {
            let bytes = range.len();
            return Err(format!("what goes to rank {rank} has {bytes} bytes, the limit is {MAX_PAYLOAD_BYTES}"));
        }
        let call = Call {
            op: site.op,
            step: site.step,
            label: site.label.to_string(),
            dtype: terms.dtype.map(|dtype| dtype.as_str().to_string()),
            shape: terms.shape.clone(),
            counts: terms.counts.clone(),
            num_rows,
            note: matches!(post.payload, Payload::Note(_)),
        };
        let message = Outgoing::with(generation, Message::Call(call), Arc::clone(&parts.bytes), range);
        message.ok_or_else(|| format!("shape has {} dimensions, too many to be sent", terms.shape.len()))
    };
    match parts.rows_per_rank {
        // The same for all is put into words once.
        None => Ok(vec![to_rank(0)?; world_size]),
        Some(_) => (0..world_size).map(to_rank).collect(),
    }
}

/// The payload of a post, and which part goes to whom.
struct Parts {
    bytes: Arc<Vec<u8>>,
    num_rows: usize,
    row_bytes: usize,
    /// `None`: everything to everybody.
    rows_per_rank: Option<Vec<usize>>,
}

impl Parts {
    fn of(post: &Post) -> CandleResult<Self> {
        let (rows, rows_per_rank) = match &post.payload {
            Payload::Nothing => return Ok(Self::whole(Vec::new(), 0)),
            Payload::Bytes(bytes) | Payload::Note(bytes) => return Ok(Self::whole(bytes.clone(), 0)),
            // What came from another rank is not sent on.
            Payload::Part(_) => return Ok(Self::whole(Vec::new(), 0)),
            Payload::Rows(rows) if post.site.op == Collective::ReduceScatter => (rows, post.terms.counts.clone()),
            Payload::Rows(rows) => {
                let num_rows = rows.dims().first().copied().unwrap_or(1);
                return Ok(Self::whole(bytes_of(rows)?, num_rows));
            }
            Payload::Routed(rows, send_counts) => (rows, send_counts.clone()),
        };
        let row_bytes = post.terms.shape.iter().fold(rows.dtype().size_in_bytes(), |n, &size| n.saturating_mul(size));
        Ok(Self { bytes: bytes_of(rows)?.into(), num_rows: 0, row_bytes, rows_per_rank: Some(rows_per_rank) })
    }

    fn whole(bytes: Vec<u8>, num_rows: usize) -> Self {
        Self { bytes: bytes.into(), num_rows, row_bytes: 0, rows_per_rank: None }
    }

    fn of_rank(&self, rank: usize) -> (usize, Range<usize>) {
        let Some(counts) = &self.rows_per_rank else { return (self.num_rows, 0..self.bytes.len()) };
        let first: usize = counts.iter().take(rank).sum();
        let num_rows = counts.get(rank).copied().unwrap_or(0);
        // Rows without elements can be so many that only their bytes can be counted.
        let place = |row: usize| row.saturating_mul(self.row_bytes).min(self.bytes.len());
        (num_rows, place(first)..place(first.saturating_add(num_rows)))
    }
}

impl Call {
    /// How many bytes the payload must have; `None` if any number will do.
    fn payload_bytes(&self) -> Result<Option<u64>, String> {
        let dtype = match (self.op, self.dtype()?) {
            (Collective::AllGatherBytes, None) => return Ok(None),
            (
                Collective::AllGather | Collective::ReduceScatter | Collective::AllToAll | Collective::AllReduce,
                Some(_),
            ) if self.note => return Ok(None),
            (Collective::Barrier, None) => return Ok(Some(0)),
            (
                Collective::AllGather | Collective::ReduceScatter | Collective::AllToAll | Collective::AllReduce,
                Some(dtype),
            ) => dtype,
            (op, _) => return Err(format!("it sent {op} with dtype {:?}", self.dtype)),
        };
        let bytes = self.dims().iter().try_fold(dtype.size_in_bytes(), |bytes, &size| bytes.checked_mul(size));
        // A zero may stand behind the sizes that are too large.
        let bytes = if self.dims().contains(&0) { Some(0) } else { bytes };
        match bytes {
            Some(bytes) => Ok(Some(bytes as u64)),
            None => Err(format!("it sent a tensor of shape {:?}, which no memory holds", self.dims())),
        }
    }

    fn dtype(&self) -> Result<Option<DType>, String> {
        let Some(name) = &self.dtype else { return Ok(None) };
        match name.parse() {
            Ok(DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0) | Err(_) => {
                Err(format!("it sent dtype {name:?}, which does not travel"))
            }
            Ok(dtype) => Ok(Some(dtype)),
        }
    }

    fn dims(&self) -> Vec<usize> {
        match self.op {
            Collective::AllReduce => self.shape.clone(),
            _ => [&[self.num_rows], &self.shape[..]].concat(),
        }
    }

    /// The post of rank `sender`, as rank `receiver` lays it down.
    pub(super) fn into_post(self, payload: Vec<u8>, sender: usize, receiver: usize) -> Result<Post, String> {
        let dims = self.dims();
        let dtype = self.dtype()?;
        let due = match self.op {
            Collective::AllGather => self.counts.get(sender),
            Collective::ReduceScatter => self.counts.get(receiver),
            _ => Some(&self.num_rows),
        };
        if due != Some(&self.num_rows) && !self.note {
            return Err(format!("it sent {} rows with counts {:?}", self.num_rows, self.counts));
        }
        let tensor = |dtype| {
            let tensor = match payload.is_empty() {
                true => Tensor::zeros(dims.as_slice(), dtype, &Device::Cpu),
                false => Tensor::from_raw_buffer(&payload, dtype, &dims, &Device::Cpu),
            };
            tensor.map_err(|error| format!("it sent rows that are none: {error}"))
        };
        let payload = match (self.op, dtype) {
            _ if self.note => Payload::Note(payload),
            (Collective::AllGather | Collective::AllReduce, Some(dtype)) => Payload::Rows(tensor(dtype)?),
            (_, Some(dtype)) => Payload::Part(tensor(dtype)?),
            (Collective::AllGatherBytes, None) => Payload::Bytes(payload),
            (_, None) => Payload::Nothing,
        };
        let site = Site { op: self.op, step: self.step, label: self.label.into() };
        Ok(Post { site, terms: Terms { dtype, shape: self.shape, counts: self.counts }, payload })
    }
}

/// The elements in row-major order, as they lie in memory.
fn bytes_of(tensor: &Tensor) -> CandleResult<Vec<u8>> {
    match tensor.dtype() {
        DType::U8 => bytes_with(tensor, u8::to_ne_bytes),
        DType::U32 => bytes_with(tensor, u32::to_ne_bytes),
        DType::I16 => bytes_with(tensor, i16::to_ne_bytes),
        DType::I32 => bytes_with(tensor, i32::to_ne_bytes),
        DType::I64 => bytes_with(tensor, i64::to_ne_bytes),
        DType::BF16 => bytes_with(tensor, bf16::to_ne_bytes),
        DType::F16 => bytes_with(tensor, f16::to_ne_bytes),
        DType::F32 => bytes_with(tensor, f32::to_ne_bytes),
        DType::F64 => bytes_with(tensor, f64::to_ne_bytes),
        DType::F8E4M3 => bytes_with(tensor, |value: F8E4M3| [value.to_bits()]),
        packed => bail!("rows has dtype {}, which does not travel", packed.as_str()),
    }
}

fn bytes_with<T: WithDType, const N: usize>(tensor: &Tensor, to_bytes: impl Fn(T) -> [u8; N]) -> CandleResult<Vec<u8>> {
    if tensor.elem_count() == 0 {
        return Ok(Vec::new());
    }
    with_slice(tensor, "wire", "rows", |values: &[T]| {
        let mut bytes = try_filled("wire", 0u8, size_of_val(values))?;
        let places = bytes.as_chunks_mut().0;
        places.iter_mut().zip(values).for_each(|(place, value)| *place = to_bytes(*value));
        Ok(bytes)
    })
}

/// The error of a rank that does not become a member of generation `generation`.
pub(super) fn rendezvous_error(rank: usize, generation: u64, kind: EpErrorKind) -> EpError {
    let label = format!("generation {generation}").into();
    error_at(rank, &Site { op: Collective::Rendezvous, step: 0, label }, kind)
}
