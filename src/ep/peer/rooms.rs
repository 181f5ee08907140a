//! Rooms: memory of the same size on every rank, which grows to the largest call so far.

use super::super::control::Control;
use super::super::device::address_of;
use super::super::error::{EpError, EpErrorKind};
use super::Ties;
use super::links::MAX_RANKS;
use candle_core::{DType, Tensor};
use std::collections::HashMap;

/// What a room is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Use {
    Hidden,
    Ids,
    Weights,
    /// Sums, or rows of slots.
    Results,
    /// Where rows of slots are.
    Places,
    Anything,
}

/// Two of each, for calls in turn.
#[derive(Default)]
pub(super) struct Rooms(HashMap<(Use, DType), [Room; 2]>);

/// Memory of the same size on every rank.
#[derive(Clone)]
pub(super) struct Room {
    /// All of this rank's.
    pub(super) own: Tensor,
    /// By rank.
    addresses: Vec<u64>,
}

impl Rooms {
    /// The room that is large enough; all ranks have as large ones.
    pub(super) fn get(&self, what: (Use, DType), elements: usize, turn: usize) -> Option<Room> {
        let pair = self.0.get(&what)?;
        pair.get(turn % 2).filter(|room| room.own.elem_count() >= elements.max(1)).cloned()
    }

    /// Makes larger rooms. All ranks do so in the same call. The old ones stay for graphs that know them.
    pub(super) fn grow(
        &mut self,
        what: (Use, DType),
        elements: usize,
        Ties { links, cuda, .. }: &Ties,
        control: &mut dyn Control,
    ) -> Result<Result<(), EpErrorKind>, EpError> {
        // More than is asked for, so that growing token by token does not fill the memory.
        let elements = elements.max(self.0.get(&what).map_or(0, |[room, _]| room.own.elem_count() / 2 * 3));
        let one = || -> Result<_, EpErrorKind> {
            let own = links.room(cuda, what.1, elements)?;
            let address = address_of(&own, cuda)?;
            Ok((own, address))
        };
        let ((first, at_first), (second, at_second)) = match one().and_then(|first| Ok((first, one()?))) {
            Ok(made) => made,
            Err(kind) => return Ok(Err(kind)),
        };
        let (of_first, of_second) = (gather_words(control, at_first)?, gather_words(control, at_second)?);
        let pair = [Room { own: first, addresses: of_first }, Room { own: second, addresses: of_second }];
        self.0.insert(what, pair);
        Ok(Ok(()))
    }
}

impl Room {
    pub(super) fn view(&self, rows: usize, columns: usize) -> candle_core::Result<Tensor> {
        self.own.narrow(0, 0, rows * columns)?.reshape((rows, columns))
    }

    /// Where it begins at a rank.
    pub(super) fn begin(&self, rank: usize) -> u64 {
        self.addresses.get(rank).copied().unwrap_or(0)
    }

    /// By rank, `bytes` behind the start.
    pub(super) fn at(&self, bytes: usize) -> [u64; MAX_RANKS] {
        let mut places = [0; MAX_RANKS];
        for (place, address) in places.iter_mut().zip(&self.addresses) {
            *place = address + bytes as u64;
        }
        places
    }
}

/// Every rank's number.
pub(super) fn gather_words(control: &mut dyn Control, word: u64) -> Result<Vec<u64>, EpError> {
    let words = control.all_gather_bytes(&word.to_le_bytes())?;
    let word = |bytes: &Vec<u8>| bytes.as_slice().try_into().map_or(0, u64::from_le_bytes);
    Ok(words.iter().map(word).collect())
}
