//! What all ranks must know about a forward step before its first layer.

use super::Communicator;
use candle_core::{Result, bail};

/// One forward step: how many tokens every rank holds.
///
/// Agreed on once per step and reused by all layers; uneven and zero counts are ordinary.
///
/// ```
/// use candle_moe::ep::{Solo, Step};
/// let step = Step::agree(&mut Solo::new(), 5)?;
/// assert_eq!(step.token_counts(), [5]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    token_counts: Vec<usize>,
    first_token: usize,
}

impl Step {
    /// Tells every rank that this one holds `num_tokens` tokens, and learns theirs. A collective: every rank calls it.
    ///
    /// # Errors
    /// Those of the communicator; counts whose sum overflows.
    pub fn agree(communicator: &mut dyn Communicator, num_tokens: usize) -> Result<Self> {
        let counts = communicator.all_gather_bytes(&(num_tokens as u64).to_le_bytes())?;
        let mut token_counts = Vec::with_capacity(counts.len());
        let mut total = 0usize;
        for (rank, bytes) in counts.iter().enumerate() {
            let count = <[u8; 8]>::try_from(bytes.as_slice()).ok().map(u64::from_le_bytes);
            let Some(count) = count.and_then(|count| usize::try_from(count).ok()) else {
                bail!("step: rank {rank} announced {} bytes, expected a number of tokens in 8", bytes.len())
            };
            match total.checked_add(count) {
                Some(sum) => total = sum,
                None => bail!("step: rank {rank} announced {count} tokens, expected at most {}", usize::MAX - total),
            }
            token_counts.push(count);
        }
        Ok(Self { token_counts, first_token: 0 })
    }

    /// Sets where this rank's tokens stand in their sequence (0 otherwise).
    ///
    /// A perfect router continues its schedule from there, so that a sequence that is decoded token by token is as balanced
    /// as one that is not. Leave it 0 where the address of the planned logits must not change.
    pub fn starting_at(self, first_token: usize) -> Self {
        Self { first_token, ..self }
    }

    /// Tokens of each rank.
    pub fn token_counts(&self) -> &[usize] {
        &self.token_counts
    }

    /// Where this rank's tokens stand in their sequence.
    pub fn first_token(&self) -> usize {
        self.first_token
    }

    /// Tokens of all ranks.
    pub fn num_tokens(&self) -> usize {
        self.token_counts.iter().sum()
    }
}
