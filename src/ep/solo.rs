//! The group of one rank.

use super::communicator::{AbortHandle, Communicator, Health};
use super::error::EpError;
use super::threads::Threads;
use candle_core::Tensor;
use std::time::Duration;

/// The only rank of its group: never waits, and copies nothing that is contiguous.
///
/// It makes the same checks with the same errors as [`Threads`], so what runs on one rank has its
/// arguments right for many.
#[derive(Debug)]
pub struct Solo(Threads);

impl Solo {
    /// A group of one.
    pub fn new() -> Self {
        Self(Threads::alone())
    }
}

impl Default for Solo {
    fn default() -> Self {
        Self::new()
    }
}

impl Communicator for Solo {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn set_label(&mut self, label: &str) {
        self.0.set_label(label);
    }

    fn deadline(&self) -> Duration {
        self.0.deadline()
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.0.set_deadline(deadline);
    }

    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        self.0.all_gather(rows, counts)
    }

    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        self.0.reduce_scatter(rows, counts)
    }

    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError> {
        self.0.all_to_all(rows, send_counts)
    }

    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError> {
        self.0.all_reduce(values)
    }

    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EpError> {
        self.0.all_gather_bytes(bytes)
    }

    fn barrier(&mut self) -> Result<(), EpError> {
        self.0.barrier()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.0.abort_handle()
    }

    fn health(&self) -> Health {
        self.0.health()
    }
}
