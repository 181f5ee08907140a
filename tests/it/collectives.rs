//! Random collectives, and what they must give: any rank can work out every rank's input.

use crate::ep::{Random, bits, bits_of, naive_sum, tensor};
use candle_moe::ep::{Communicator, EpError};

/// One collective of a group, the same for a seed on every rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    seed: u64,
    world_size: usize,
}

/// What a rank has got: shape, bits, rows from each source; or bytes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Rows(Vec<usize>, Vec<u32>),
    Routed(Vec<usize>, Vec<u32>, Vec<usize>),
    Bytes(Vec<Vec<u8>>),
    Nothing,
}

type Rows = Vec<Vec<f32>>;

impl Call {
    pub(crate) fn new(seed: u64, world_size: usize) -> Self {
        Self { seed: seed + 1, world_size }
    }

    fn random(&self, salt: u64) -> Random {
        let mut random = Random((self.seed << 8) + salt + 1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    fn op(&self) -> u64 {
        self.random(250).next() % 6
    }

    /// Has it rows, whose shape may be wrong?
    pub(crate) fn has_rows(&self) -> bool {
        self.op() < 4
    }

    /// Does the order in which ranks are added show in the result?
    #[cfg_attr(not(feature = "nccl"), allow(dead_code, reason = "for devices"))]
    pub(crate) fn is_sum(&self) -> bool {
        matches!(self.op(), 1 | 2)
    }

    fn counts(&self, salt: u64) -> Vec<usize> {
        let mut random = self.random(100 + salt);
        (0..self.world_size).map(|_| random.count()).collect()
    }

    fn rows(&self, rank: usize, num_rows: usize) -> Rows {
        self.random(rank as u64).rows(num_rows)
    }

    fn bytes(&self, rank: usize) -> Vec<u8> {
        let mut random = self.random(rank as u64);
        (0..random.next() % 50).map(|_| random.next() as u8).collect()
    }

    /// The rows of `rank` for each destination.
    fn routed(&self, rank: usize) -> Vec<Rows> {
        let mut random = self.random(rank as u64);
        self.counts(rank as u64).into_iter().map(|count| random.rows(count)).collect()
    }

    pub(crate) fn make(&self, ranks: &mut dyn Communicator) -> Result<Outcome, EpError> {
        let rank = ranks.rank();
        let counts = self.counts(0);
        let total = counts.iter().sum();
        let rows = |result: candle_core::Tensor| Outcome::Rows(result.dims().to_vec(), bits(&result));
        match self.op() {
            0 => ranks.all_gather(&tensor(&self.rows(rank, counts[rank])), &counts).map(rows),
            1 => ranks.reduce_scatter(&tensor(&self.rows(rank, total)), &counts).map(rows),
            2 => ranks.all_reduce(&tensor(&self.rows(rank, total))).map(rows),
            3 => {
                let routed = self.routed(rank);
                let send_counts: Vec<usize> = routed.iter().map(Vec::len).collect();
                let (result, counts) = ranks.all_to_all(&tensor(&routed.concat()), &send_counts)?;
                Ok(Outcome::Routed(result.dims().to_vec(), bits(&result), counts))
            }
            4 => ranks.all_gather_bytes(&self.bytes(rank)).map(Outcome::Bytes),
            _ => ranks.barrier().map(|()| Outcome::Nothing),
        }
    }

    pub(crate) fn expected(&self, rank: usize) -> Outcome {
        let ranks = 0..self.world_size;
        let counts = self.counts(0);
        let total = counts.iter().sum();
        let outcome = |rows: &[Vec<f32>]| Outcome::Rows(vec![rows.len(), crate::ep::WIDTH], bits_of(rows));
        match self.op() {
            0 => outcome(&ranks.flat_map(|r| self.rows(r, counts[r])).collect::<Rows>()),
            op @ (1 | 2) => {
                let sum = naive_sum(&ranks.map(|r| self.rows(r, total)).collect::<Vec<_>>());
                let start: usize = counts[..rank].iter().sum();
                if op == 1 { outcome(&sum[start..start + counts[rank]]) } else { outcome(&sum) }
            }
            3 => {
                let parts: Vec<Rows> = ranks.map(|r| self.routed(r)[rank].clone()).collect();
                let rows = parts.concat();
                let shape = vec![rows.len(), crate::ep::WIDTH];
                Outcome::Routed(shape, bits_of(&rows), parts.iter().map(Vec::len).collect())
            }
            4 => Outcome::Bytes(ranks.map(|r| self.bytes(r)).collect()),
            _ => Outcome::Nothing,
        }
    }
}
