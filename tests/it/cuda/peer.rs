//! Ranks whose devices reach each other's memory: collectives and faults as those of every rank with a device, and what is theirs
//! alone.

use super::ranks::tests_of;
use candle_moe::ep::Peer;

tests_of!(Peer);
