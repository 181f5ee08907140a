//! Finding the rank that was started with other settings, before it costs a wrong result or a wait.

use super::Communicator;
use candle_core::{Result, bail};
use std::collections::BTreeMap;
use std::fmt::Display;

const OP: &str = "fingerprint";
const ABSENT: &str = "nothing";

/// What must be the same on every rank, field by field, the version of this crate first.
///
/// ```
/// use candle_moe::ep::{Communicator, Fingerprint, launch};
/// use std::time::Duration;
/// let outcomes = launch(3, Duration::from_secs(5), |mut ranks| {
///     let top_k = if ranks.rank() == 1 { 8 } else { 4 };
///     Fingerprint::new().with("num_experts", 128).with("top_k", top_k).agree(&mut ranks)
/// })?;
/// for outcome in outcomes {
///     let error = outcome.expect("no rank panics").unwrap_err().to_string();
///     assert!(error.starts_with("fingerprint: rank 1 has top_k 8, expected that of the group, 4"));
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// Names, which are distinct, and values.
    fields: Vec<(String, String)>,
}

impl Fingerprint {
    /// The version of this crate and nothing else.
    pub fn new() -> Self {
        Self { fields: Vec::new() }.with("version", env!("CARGO_PKG_VERSION"))
    }

    /// With another field. A name that is there already gets the new value.
    pub fn with(mut self, name: &str, value: impl Display) -> Self {
        let value = value.to_string();
        match self.fields.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => *known = value,
            None => self.fields.push((name.into(), value)),
        }
        self
    }

    /// With the fields of `other`, whose names then begin with `prefix`; its version is left out.
    pub fn with_all(self, prefix: &str, other: &Self) -> Self {
        let fields = other.fields.iter().filter(|(name, _)| name != "version");
        fields.fold(self, |all, (name, value)| all.with(&format!("{prefix}{name}"), value))
    }

    /// Names and values, in the order in which they are compared.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Compares the ranks' fingerprints. A collective, for start-up: every rank calls it once, and one call can carry the
    /// fingerprints of many layers.
    ///
    /// # Errors
    /// Those of the communicator. Where ranks differ, the same error on every rank, which names the first field that differs,
    /// the lowest rank whose value is not that of the largest number of ranks (of equally many, of the lowest rank), and both
    /// values.
    pub fn agree(&self, communicator: &mut dyn Communicator) -> Result<()> {
        let ranks = communicator.all_gather_bytes(&self.to_bytes())?;
        if ranks.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(());
        }
        let ranks = ranks.iter().enumerate().map(|(rank, bytes)| Self::from_bytes(rank, bytes));
        let ranks = ranks.collect::<Result<Vec<_>>>()?;
        match ranks.iter().flat_map(Self::fields).find_map(|(name, _)| odd_rank(name, &ranks)) {
            Some(Odd { rank, name, found, expected }) => {
                bail!("{OP}: rank {rank} has {name} {found}, expected that of the group, {expected}")
            }
            // The same fields in another order.
            None => Ok(()),
        }
    }

    fn value(&self, name: &str) -> &str {
        self.fields().find(|(known, _)| *known == name).map_or(ABSENT, |(_, value)| value)
    }

    /// Strings with their lengths ahead: name, value, name, value.
    fn to_bytes(&self) -> Vec<u8> {
        let strings = self.fields.iter().flat_map(|(name, value)| [name, value]);
        strings.flat_map(|s| (s.len() as u64).to_le_bytes().into_iter().chain(s.bytes())).collect()
    }

    fn from_bytes(rank: usize, bytes: &[u8]) -> Result<Self> {
        let mut strings = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some((string, later)) = split_string(rest) else {
                bail!(
                    "{OP}: rank {rank} sent {} bytes that are no fingerprint; is it a program of another kind?",
                    bytes.len()
                )
            };
            strings.push(string.to_string());
            rest = later;
        }
        let pairs = strings.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone()));
        Ok(Self { fields: pairs.collect() })
    }
}

impl Default for Fingerprint {
    fn default() -> Self {
        Self::new()
    }
}

/// The string at the start of `bytes`, and what follows it.
fn split_string(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<8>()?;
    let (string, later) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    Some((std::str::from_utf8(string).ok()?, later))
}

/// A rank with a value of its own.
struct Odd<'a> {
    rank: usize,
    name: &'a str,
    found: &'a str,
    expected: &'a str,
}

/// The lowest rank whose value of `name` is not the group's.
fn odd_rank<'a>(name: &'a str, ranks: &'a [Fingerprint]) -> Option<Odd<'a>> {
    let mut parties: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (rank, fingerprint) in ranks.iter().enumerate() {
        parties.entry(fingerprint.value(name)).or_default().push(rank);
    }
    // The largest, and of equally large ones that with the lowest rank.
    let (expected, _) = parties.iter().min_by_key(|(_, members)| (usize::MAX - members.len(), members[0]))?;
    let rank = ranks.iter().position(|fingerprint| fingerprint.value(name) != *expected)?;
    Some(Odd { rank, name, found: ranks[rank].value(name), expected })
}
