//! A group on the host as the ground on which devices exchange rows: it compares the calls and keeps watch, and what a
//! device does stands beside it.

use super::board::{Board, Fault, error_at};
use super::call::{Offer, Payload, Site, Terms};
use super::communicator::Communicator;
use super::error::{Collective, EpError, EpErrorKind};
use super::member::{Member, Outside};
use super::procs::Procs;
use super::threads::Threads;
use std::sync::Arc;

/// What changes hands in place of rows.
pub(super) type Notes = Vec<Vec<u8>>;

/// A rank of a group on the host, for communicators that move their rows another way.
pub(super) trait Control: Communicator {
    /// Meets the others in a call of which only `note` goes through this group. Gives the notes of all ranks, in rank order.
    fn announce(&mut self, op: Collective, offer: Result<(Terms, Vec<u8>), String>) -> Result<(Site, Notes), EpError>;

    /// Poisons the group because this rank cannot carry out the call at `site`; what failed before counts more.
    fn give_up(&mut self, site: &Site, kind: EpErrorKind) -> EpError;

    /// For another thread that watches over the group.
    fn overseer(&self) -> Overseer;

    /// Leaves, and joins the next generation.
    fn rebuilt(self: Box<Self>) -> Result<Box<dyn Control>, EpError>;
}

impl<O: Outside> Member<O> {
    fn announced(&mut self, op: Collective, offer: Result<(Terms, Vec<u8>), String>) -> Result<(Site, Notes), EpError> {
        let offer: Offer = offer.map(|(terms, note)| (terms, Payload::Note(note)));
        let (site, posts) = self.meet(op, offer)?;
        let note = |payload: &Payload| match payload {
            Payload::Note(note) => note.clone(),
            _ => Vec::new(),
        };
        Ok((site, posts.iter().map(|post| note(&post.payload)).collect()))
    }

    fn watched(&self) -> Overseer {
        Overseer { board: Arc::clone(&self.board), outside: self.outside.clone(), rank: self.rank() }
    }
}

macro_rules! control_through_field {
    ($type:ty) => {
        impl Control for $type {
            fn announce(
                &mut self,
                op: Collective,
                offer: Result<(Terms, Vec<u8>), String>,
            ) -> Result<(Site, Notes), EpError> {
                self.0.announced(op, offer)
            }

            fn give_up(&mut self, site: &Site, kind: EpErrorKind) -> EpError {
                self.0.give_up(site, kind)
            }

            fn overseer(&self) -> Overseer {
                self.0.watched()
            }

            fn rebuilt(self: Box<Self>) -> Result<Box<dyn Control>, EpError> {
                Ok(Box::new((*self).rebuild()?))
            }
        }
    };
}

control_through_field!(Threads);
control_through_field!(Procs);

/// Watches over a group, and can give it up, from any thread.
#[derive(Clone)]
pub(super) struct Overseer {
    board: Arc<Board>,
    outside: Arc<dyn Outside>,
    rank: usize,
}

impl Overseer {
    /// Has the group failed?
    pub(super) fn has_failed(&self) -> bool {
        self.board.health().1.is_some()
    }

    /// The first rank that is gone without having ended its calls, and how.
    pub(super) fn lost(&self) -> Option<EpErrorKind> {
        self.board.lost()
    }

    /// Poisons the group because the call at `site` will not end well; what failed before counts more.
    pub(super) fn fail(&self, site: &Site, kind: EpErrorKind) {
        self.outside.tell(&self.board.fail(Fault::of_all(error_at(self.rank, site, kind))));
    }
}
