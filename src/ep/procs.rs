//! Ranks as processes of one machine.
//!
//! ```text
//! collective:   put the post on the board, hand it to one writer thread per peer, wait at the board
//! reader:       one thread per peer: lays down what that rank sends on this process's board
//! writer:       one thread per peer: writes what it is handed, so that a peer that does not read holds nobody up
//! drop:         say farewell, wait a moment until everybody has heard it, close
//! ```
//!
//! 1. Every rank sends every other what that one needs, over a connection of their own. So each rank judges by what it heard
//!    itself, and nothing has to be passed on; the time it takes is that of one hop.
//! 2. The board is the one of [`Threads`](super::Threads): results, errors and their words are the same. Rows are added in
//!    rank order by each rank for itself, so the bits are the same too.
//! 3. The kernel closes the connections of a process that is killed, so nobody waits for a deadline to hear of it. Only a
//!    process that is stopped has to be waited for.
//! 4. Whoever finds a fault tells everybody; what arrives twice or late is ignored.
//! 5. A peer that breaks the rules is treated as one that died.

use super::board::{Board, Fault, Presence, Waiting};
use super::call::Post;
use super::communicator::{Communicator, Deadlines};
use super::environment::Environment;
use super::error::{EpError, EpErrorKind};
use super::member::{Member, Outside, communicate_through_field};
use super::rendezvous::{Streams, meet};
use super::wire::{Envelope, Message, Outgoing, calls, read_from, rendezvous_error};
use std::fmt;
use std::io::{self, BufReader, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The largest group of [`Procs`]: every rank has a connection and two threads for every other.
pub const MAX_PROCS: usize = 64;
const READ_BYTES: usize = 1 << 16;
/// How long a rank that leaves waits for the others to hear it.
const FAREWELL: Duration = Duration::from_millis(300);

/// What a process has to know to become a rank of [`Procs`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcsConfig {
    /// This rank, below `world_size`.
    pub rank: usize,
    /// The number of ranks, 1 to [`MAX_PROCS`].
    pub world_size: usize,
    /// The host name or address at which rank 0 listens.
    pub address: String,
    /// The port at which rank 0 listens.
    pub port: u16,
    /// Which life of the group this is; 0 at first.
    pub generation: u64,
}

impl From<&Environment> for ProcsConfig {
    fn from(environment: &Environment) -> Self {
        Self {
            rank: environment.rank,
            world_size: environment.world_size,
            address: environment.address.clone(),
            port: environment.port,
            generation: environment.generation,
        }
    }
}

/// A rank that is a process. Tensors are on the CPU.
///
/// Results, sums, checks and errors are those of [`Threads`](super::Threads), bit by bit and word by word. Besides what every
/// [`Communicator`] promises:
///
/// * A process that is killed or ends without dropping its handle fails the call that needs it at once, with
///   [`RankLost`](EpErrorKind::RankLost); one that is stopped is named at the deadline
///   (0.1 s later in groups of three and more, so that it is not mixed up with those that wait for it too).
/// * What one rank sends to one other in one call has at most 8 GiB, else
///   [`BadArgument`](EpErrorKind::BadArgument).
/// * A peer that sends anything but proper messages is treated as lost; memory for what it sends grows as that comes in.
///
/// The ranks trust each other's numbers, and everybody who can reach their ports: this is for one machine, or a network of one's
/// own. All of them run the same version of this crate on processors of the same byte order.
pub struct Procs(pub(super) Member<Links>, Ends);

communicate_through_field!(Procs);

struct Ends {
    config: ProcsConfig,
    threads: Vec<JoinHandle<()>>,
}

/// The connections to the other ranks.
pub(super) struct Links {
    generation: u64,
    peers: Vec<Option<Peer>>,
}

struct Peer {
    stream: TcpStream,
    queue: Sender<Job>,
}

/// What a writer does.
enum Job {
    Send(Outgoing),
    /// Says that nothing more will come, and ends.
    Close,
}

impl Procs {
    /// Meets the other ranks at `config`'s address, at most within [`Deadlines::warm_up`].
    ///
    /// # Errors
    ///
    /// Each names [`Collective::Rendezvous`](super::Collective::Rendezvous). [`BadArgument`](EpErrorKind::BadArgument): `config`
    /// makes no sense. [`Timeout`](EpErrorKind::Timeout): ranks are missing. [`Unreachable`](EpErrorKind::Unreachable): rank 0
    /// cannot listen, or nobody does. [`Mismatch`](EpErrorKind::Mismatch), [`DuplicateRank`](EpErrorKind::DuplicateRank): ranks
    /// do not fit together; all of them hear it. [`OldGeneration`](EpErrorKind::OldGeneration): a later generation meets there.
    /// [`RankLost`](EpErrorKind::RankLost): a rank died meanwhile.
    pub fn join(config: ProcsConfig, deadlines: impl Into<Deadlines>) -> Result<Self, EpError> {
        let deadlines = deadlines.into();
        let failed = |kind| rendezvous_error(config.rank, config.generation, kind);
        check(&config).map_err(|what| failed(EpErrorKind::BadArgument(what)))?;
        let streams = match config.world_size {
            1 => vec![None],
            _ => meet(&config, deadlines.warm_up)?,
        };
        Self::connect(&config, deadlines, streams)
            .map_err(|error| failed(EpErrorKind::Unreachable(format!("the other ranks: {error}"))))
    }

    /// Leaves this group, and meets the next generation of it as the same rank, at the same address.
    ///
    /// # Errors
    ///
    /// Those of [`Procs::join`].
    pub fn rebuild(self) -> Result<Self, EpError> {
        let generation = self.config().generation.saturating_add(1);
        let config = ProcsConfig { generation, ..self.config().clone() };
        let deadlines = self.deadlines();
        drop(self);
        Self::join(config, deadlines)
    }

    /// What this rank joined with.
    pub fn config(&self) -> &ProcsConfig {
        &self.1.config
    }

    fn connect(config: &ProcsConfig, deadlines: Deadlines, streams: Streams) -> io::Result<Self> {
        let (rank, generation) = (config.rank, config.generation);
        let board = Arc::new(Board::of_one_process(config.world_size, generation));
        let mut links = Links { generation, peers: Vec::new() };
        let mut jobs = Vec::new();
        for stream in streams {
            let (queue, receiver) = channel();
            jobs.push(receiver);
            links.peers.push(stream.map(|stream| Peer { stream, queue }));
        }
        let links = Arc::new(links);
        let member = Member::new(Arc::clone(&board), Arc::clone(&links), rank, deadlines);
        // From here on, dropping closes what is open.
        let mut procs = Self(member, Ends { config: config.clone(), threads: Vec::new() });
        for ((other, peer), jobs) in links.peers.iter().enumerate().zip(jobs) {
            let Some(Peer { stream, queue }) = peer else { continue };
            stream.set_nodelay(true)?;
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(None)?;
            let (from, to) = (stream.try_clone()?, stream.try_clone()?);
            let reader = Reader { board: Arc::clone(&board), rank, other, generation, queue: queue.clone() };
            let name = |what: &str| thread::Builder::new().name(format!("rank {rank} {what} {other}"));
            let threads = &mut procs.1.threads;
            threads.push(name("to").spawn(move || write(&to, &jobs))?);
            threads.push(name("from").spawn(move || reader.run(&from))?);
        }
        Ok(procs)
    }
}

fn check(config: &ProcsConfig) -> Result<(), String> {
    let ProcsConfig { rank, world_size, port, .. } = config;
    if *world_size == 0 || *world_size > MAX_PROCS {
        return Err(format!("world_size is {world_size}, it must be 1 to {MAX_PROCS}"));
    }
    if rank >= world_size {
        return Err(format!("rank is {rank}, it must be below world_size = {world_size}"));
    }
    if *port == 0 && *world_size > 1 {
        return Err("port is 0, it must be the one at which rank 0 listens".to_string());
    }
    Ok(())
}

impl Links {
    fn hand_over(&self, job: impl Fn(usize) -> Option<Job>) {
        for (rank, peer) in self.peers.iter().enumerate() {
            if let (Some(peer), Some(job)) = (peer, job(rank)) {
                // A writer has ended where there is nobody to write to; the reader beside it tells the board.
                let _ = peer.queue.send(job);
            }
        }
    }

    fn send_all(&self, message: Message) {
        let message = Outgoing::message(self.generation, message);
        self.hand_over(|_| message.clone().map(Job::Send));
    }
}

impl Outside for Links {
    fn carry(&self, post: &Post) -> Result<(), String> {
        if self.peers.len() > 1 {
            let calls = calls(self.generation, post, self.peers.len())?;
            self.hand_over(|rank| calls.get(rank).cloned().map(Job::Send));
        }
        Ok(())
    }

    fn tell(&self, fault: &Fault) {
        self.send_all(Message::failed(fault));
    }

    fn tell_waiting(&self, waiting: Waiting) {
        self.send_all(Message::Waits(waiting));
    }
}

/// The life of a writer.
fn write(stream: &TcpStream, jobs: &Receiver<Job>) {
    while let Ok(Job::Send(message)) = jobs.recv() {
        if let Err(error) = message.write_to(stream) {
            tracing::debug!(%error, "a rank does not listen any more");
            return;
        }
    }
    // An error: it is closed already.
    let _ = stream.shutdown(Shutdown::Write);
}

struct Reader {
    board: Arc<Board>,
    rank: usize,
    other: usize,
    generation: u64,
    /// Of the writer to the same rank.
    queue: Sender<Job>,
}

impl Reader {
    /// The life of a reader: until the other rank leaves or is lost.
    fn run(self, stream: &TcpStream) {
        let end = self.read(BufReader::with_capacity(READ_BYTES, stream));
        let lost = matches!(end, Presence::Lost(_));
        self.board.leave(self.other, end);
        // Whoever leaves waits to hear that its farewell was heard.
        let _ = self.queue.send(Job::Close);
        if lost {
            // What is on its way to it cannot be written, and need not.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn read(&self, mut stream: impl Read) -> Presence {
        loop {
            let (Envelope { generation, message }, payload) = match read_from(&mut stream) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return Presence::Lost(error.to_string()),
                Err(error) => {
                    return Presence::Lost(format!(
                        "its connection closed without a farewell ({error}); see how that process ended"
                    ));
                }
            };
            if generation != self.generation {
                let current = self.generation;
                return Presence::Lost(format!("it sent a message of generation {generation} to generation {current}"));
            }
            let heard = match message {
                Message::Call(call) => {
                    call.into_post(payload, self.other, self.rank).and_then(|post| self.board.arrive(self.other, post))
                }
                Message::Waits(waiting) => {
                    if let Some(own) = self.board.hear_waiting(self.other, waiting, self.rank) {
                        // A writer that has ended has nobody to write to.
                        let answer = Outgoing::message(self.generation, Message::Waits(own));
                        let _ = answer.map(|answer| self.queue.send(Job::Send(answer)));
                    }
                    Ok(())
                }
                Message::Failed { cause, heard, since } => {
                    self.board.fail(Arc::new(Fault { cause, heard, since }));
                    Ok(())
                }
                Message::Leave { panicked: true } => return Presence::Panicked,
                Message::Leave { panicked: false } => return Presence::Left,
                _ => Err("it sent what belongs to a rendezvous".to_string()),
            };
            if let Err(what) = heard {
                return Presence::Lost(what);
            }
        }
    }
}

impl Drop for Procs {
    fn drop(&mut self) {
        let Self(member, ends) = self;
        let panicked = thread::panicking();
        let links = &member.outside;
        links.send_all(Message::Leave { panicked });
        links.hand_over(|_| Some(Job::Close));
        member.board.wait_for_farewells(ends.config.rank, FAREWELL);
        for peer in links.peers.iter().flatten() {
            // An error: it is closed already.
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
        for thread in ends.threads.drain(..) {
            // Both ends are closed, so nothing keeps it.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Procs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Procs").field(&self.0).field(&self.1.config).finish()
    }
}
