//! What all ranks must know about a forward step before its first layer.

use super::{Communicator, reason};
use candle_core::{Result, Tensor, bail};

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
#[derive(Debug, Clone)]
pub struct Step {
    token_counts: Vec<usize>,
    first_token: usize,
    num_valid_tokens: Option<Tensor>,
}

impl Step {
    /// Tells every rank that this one holds `num_tokens` tokens, and learns theirs. A collective: every rank calls it.
    ///
    /// # Errors
    /// Those of the communicator; counts whose sum overflows. An error aborts the group, so that no other rank waits.
    pub fn agree(communicator: &mut dyn Communicator, num_tokens: usize) -> Result<Self> {
        let step = Self::try_agree(communicator, num_tokens);
        if let Err(error) = &step {
            communicator.abort_handle().abort(&reason(error));
        }
        step
    }

    fn try_agree(communicator: &mut dyn Communicator, num_tokens: usize) -> Result<Self> {
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
        Ok(Self { token_counts, first_token: 0, num_valid_tokens: None })
    }

    /// Sets where this rank's tokens stand in their sequence (0 otherwise).
    ///
    /// A perfect router continues its schedule from there, so that a sequence that is decoded token by token is as balanced
    /// as one that is not. Leave it 0 where the address of the planned logits must not change.
    pub fn starting_at(self, first_token: usize) -> Self {
        Self { first_token, ..self }
    }

    /// Says that only the first tokens of this rank are real, and the others padding, as in a batch of fixed size: padding is
    /// routed to no expert, and its output is 0.
    ///
    /// An all-gather still moves the rows of padding, whose number the other ranks do not know; an exchange does not, and
    /// experts and combine skip them.
    ///
    /// `num_valid_tokens` is u32 with one element, on the device of the hidden states, and may change between layers or
    /// graph replays; other ranks need not know.
    pub fn with_valid_tokens(self, num_valid_tokens: &Tensor) -> Self {
        Self { num_valid_tokens: Some(num_valid_tokens.clone()), ..self }
    }

    /// Tokens of each rank, padding included.
    pub fn token_counts(&self) -> &[usize] {
        &self.token_counts
    }

    /// Where this rank's tokens stand in their sequence.
    pub fn first_token(&self) -> usize {
        self.first_token
    }

    /// How many of this rank's tokens are real; `None` when all are.
    pub fn num_valid_tokens(&self) -> Option<&Tensor> {
        self.num_valid_tokens.as_ref()
    }

    /// Tokens of all ranks, padding included.
    pub fn num_tokens(&self) -> usize {
        self.token_counts.iter().sum()
    }
}
