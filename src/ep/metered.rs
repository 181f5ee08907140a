//! A rank that keeps count of what it sends and receives.

use super::communicator::{AbortHandle, Communicator, Deadlines, Health};
use super::error::{Collective, EpError};
use candle_core::Tensor;
use std::time::Duration;

/// What one collective moved, from the point of view of one rank, with a communicator that sends every rank directly what
/// that one needs, as those of this crate do.
///
/// | | sent | received | kept |
/// | --- | --- | --- | --- |
/// | all-gather | own rows, to each other rank | the others' rows | own rows |
/// | reduce-scatter | each other rank's part | own part, from each other rank | own part |
/// | all-to-all | rows for others | rows from others | rows for itself |
/// | all-reduce | all rows, to each other rank | all rows, from each other rank | all rows |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The collective.
    pub op: Collective,
    /// Rows for other ranks.
    pub rows_sent: usize,
    /// Rows from other ranks.
    pub rows_received: usize,
    /// Rows that this rank would send to itself: they stay.
    pub rows_kept: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
}

impl Transfer {
    /// Bytes for other ranks.
    pub fn bytes_sent(&self) -> usize {
        self.rows_sent.saturating_mul(self.row_bytes)
    }

    /// Bytes that stay.
    pub fn bytes_kept(&self) -> usize {
        self.rows_kept.saturating_mul(self.row_bytes)
    }
}

/// A rank that notes the [`Transfer`] of every collective of tensors; all calls are those of the communicator within. What kernels
/// move by themselves, with [`Strategy::Peer`](super::Strategy::Peer), is not noted.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_moe::ep::{Communicator, Metered, launch};
/// use std::time::Duration;
/// let sent = launch(3, Duration::from_secs(5), |mut ranks| -> candle_core::Result<_> {
///     let rows = Tensor::zeros((2, 4), candle_core::DType::F32, &Device::Cpu)?;
///     let mut ranks = Metered::new(&mut ranks);
///     ranks.all_gather(&rows, &[2, 2, 2])?;
///     Ok(ranks.take_transfers()[0].bytes_sent())
/// })?;
/// for sent in sent {
///     assert_eq!(sent.expect("no rank panics")?, 2 * 2 * 16, "two rows of 16 bytes to two ranks");
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct Metered<'a> {
    inner: &'a mut dyn Communicator,
    transfers: Vec<Transfer>,
}

impl<'a> Metered<'a> {
    /// Begins with nothing noted.
    pub fn new(inner: &'a mut dyn Communicator) -> Self {
        Self { inner, transfers: Vec::new() }
    }

    /// What was noted since the last time, in the order of the calls. Calls that failed are not among it.
    pub fn take_transfers(&mut self) -> Vec<Transfer> {
        std::mem::take(&mut self.transfers)
    }

    fn note(&mut self, op: Collective, tensor: &Tensor, [rows_sent, rows_received, rows_kept]: [usize; 3]) {
        let row: usize = tensor.dims().iter().skip(1).product();
        let row_bytes = row.saturating_mul(tensor.dtype().size_in_bytes());
        self.transfers.push(Transfer { op, rows_sent, rows_received, rows_kept, row_bytes });
    }

    /// The sum of all counts but this rank's, and that one.
    fn others_and_own(&self, counts: &[usize]) -> (usize, usize) {
        let own = counts.get(self.rank()).copied().unwrap_or(0);
        let total = counts.iter().fold(0usize, |sum, &count| sum.saturating_add(count));
        (total.saturating_sub(own), own)
    }

    fn other_ranks(&self) -> usize {
        self.world_size().saturating_sub(1)
    }
}

impl Communicator for Metered<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn set_label(&mut self, label: &str) {
        self.inner.set_label(label);
    }

    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.inner.set_deadline(deadline);
    }

    fn deadlines(&self) -> Deadlines {
        self.inner.deadlines()
    }

    fn generation(&self) -> u64 {
        self.inner.generation()
    }

    fn start_serving(&mut self) {
        self.inner.start_serving();
    }

    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let result = self.inner.all_gather(rows, counts)?;
        let (others, own) = self.others_and_own(counts);
        self.note(Collective::AllGather, rows, [own.saturating_mul(self.other_ranks()), others, own]);
        Ok(result)
    }

    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let result = self.inner.reduce_scatter(rows, counts)?;
        let (others, own) = self.others_and_own(counts);
        self.note(Collective::ReduceScatter, rows, [others, own.saturating_mul(self.other_ranks()), own]);
        Ok(result)
    }

    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError> {
        let (received, counts) = self.inner.all_to_all(rows, send_counts)?;
        let ((sent, kept), (got, _)) = (self.others_and_own(send_counts), self.others_and_own(&counts));
        self.note(Collective::AllToAll, rows, [sent, got, kept]);
        Ok((received, counts))
    }

    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError> {
        let result = self.inner.all_reduce(values)?;
        // A scalar is one row of one value.
        let rows = values.dims().first().copied().unwrap_or(1);
        let to_others = rows.saturating_mul(self.other_ranks());
        self.note(Collective::AllReduce, values, [to_others, to_others, rows]);
        Ok(result)
    }

    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EpError> {
        self.inner.all_gather_bytes(bytes)
    }

    fn barrier(&mut self) -> Result<(), EpError> {
        self.inner.barrier()
    }

    fn settle(&mut self) -> Result<(), EpError> {
        self.inner.settle()
    }

    #[cfg(feature = "cuda")]
    fn as_peer(&mut self) -> Option<&mut super::Peer> {
        self.inner.as_peer()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }

    fn health(&self) -> Health {
        self.inner.health()
    }
}
