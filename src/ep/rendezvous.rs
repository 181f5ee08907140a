//! How ranks that are processes find each other over TCP.
//!
//! ```text
//! rank 0                                       rank r
//! listen at the address                        listen at a port of its own
//! for every Hello:                             connect to the address, again and again; Hello
//!     other size, version, generation, rank
//!     taken: Refused, to it or to everybody
//!     otherwise Waiting for .., to everybody   <- Waiting: who is missing
//! all there: Welcome to everybody              <- Welcome: everybody's address and the group's token
//!                                              connect to ranks 1..r, Hello with the token
//!                                              accept ranks r+1.., check their Hello
//!                                              Ready
//! all are ready: Begin to everybody            <- Begin
//! one is gone meanwhile: Refused               <- Refused
//! ```
//!
//! 1. Everything is over at the deadline, for every rank by its own clock. Rank 0 then tells those who came who is missing.
//! 2. A stranger costs a connection and a short thread, nothing else: it is dropped when it says no proper Hello in time.
//! 3. A straggler of an old generation is refused alone, for the new one is none of its business. Whatever else differs can
//!    only be a mistake in how the ranks were started, so it ends the attempt for all, at once.
//! 4. The token keeps the members of two groups apart that happen to use the same ports.

use super::error::{EpError, EpErrorKind};
use super::procs::ProcsConfig;
use super::wire::{Envelope, Hello, Message, Outgoing, cut, read_from, rendezvous_error};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Between two looks at the door.
const PAUSE: Duration = Duration::from_millis(2);
/// Between two attempts to reach rank 0.
const RETRY: Duration = Duration::from_millis(20);
/// How long a guest may take to introduce itself, and how long a message to one may take.
const PATIENCE: Duration = Duration::from_millis(1000);
/// Guests who have not introduced themselves yet.
const MAX_STRANGERS: usize = 256;

/// Said of who answers at the address.
const STRANGER: &str = "what answers there is not the rank 0 of this group";

type Kind = EpErrorKind;
/// One connection per other rank; `None` in this rank's own place.
pub(super) type Streams = Vec<Option<TcpStream>>;

/// Meets the other ranks, or says who is missing or wrong.
pub(super) fn meet(config: &ProcsConfig, deadline: Duration) -> Result<Streams, EpError> {
    let clock = Clock { started: Instant::now(), deadline };
    let streams = match config.rank {
        0 => welcome_all(config, clock),
        _ => join(config, clock),
    };
    streams.map_err(|kind| rendezvous_error(config.rank, config.generation, kind))
}

#[derive(Clone, Copy)]
struct Clock {
    started: Instant,
    deadline: Duration,
}

impl Clock {
    /// `None` when the time is up.
    fn left(self) -> Option<Duration> {
        self.deadline.checked_sub(self.started.elapsed()).filter(|left| !left.is_zero())
    }

    fn timeout(self, missing: Vec<usize>) -> Kind {
        Kind::Timeout { missing, deadline: self.deadline }
    }
}

/// The side of rank 0.
fn welcome_all(config: &ProcsConfig, clock: Clock) -> Result<Streams, Kind> {
    let place = (config.address.as_str(), config.port);
    let listener = TcpListener::bind(place)
        .map_err(|error| unreachable(config, &format!("rank 0 cannot listen there: {error}; choose a free port")))?;
    let door = Door::open(listener)?;
    let mut guests: Vec<Option<Guest>> = (0..config.world_size).map(|_| None).collect();
    let outcome = gather(config, clock, &door, &mut guests).and_then(|()| connect_all(config, clock, &guests));
    tell_all(config, &guests, || match &outcome {
        Ok(()) => Message::Begin,
        Err(kind) => Message::Refused { kind: kind.clone() },
    });
    outcome?;
    Ok(guests.into_iter().map(|guest| guest.map(|guest| guest.stream)).collect())
}

/// Lets the guests connect with each other, and waits until all have.
fn connect_all(config: &ProcsConfig, clock: Clock, guests: &[Option<Guest>]) -> Result<(), Kind> {
    let addresses: Vec<_> =
        guests.iter().map(|guest| guest.as_ref().map_or(nowhere(), |guest| guest.address)).collect();
    let token = RandomState::new().hash_one(std::process::id()).max(1);
    tell_all(config, guests, || Message::Welcome { token, addresses: addresses.clone() });
    let mut waiting: Vec<(usize, &TcpStream)> =
        guests.iter().enumerate().filter_map(|(rank, guest)| Some((rank, &guest.as_ref()?.stream))).collect();
    while !waiting.is_empty() {
        if clock.left().is_none() {
            return Err(clock.timeout(waiting.into_iter().map(|(rank, _)| rank).collect()));
        }
        let mut still = Vec::new();
        for (rank, stream) in waiting {
            match look(stream) {
                Look::Quiet => still.push((rank, stream)),
                Look::News if is_ready(stream) => {}
                Look::News | Look::Closed => {
                    let reason = "its connection closed during the rendezvous; see how that process ended".to_string();
                    return Err(Kind::RankLost { rank, reason });
                }
            }
        }
        waiting = still;
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn is_ready(stream: &TcpStream) -> bool {
    let clock = Clock { started: Instant::now(), deadline: PATIENCE };
    matches!(read_from(Patient { stream, clock }), Ok((Envelope { message: Message::Ready, .. }, _)))
}

fn nowhere() -> SocketAddr {
    (IpAddr::from([0, 0, 0, 0]), 0).into()
}

struct Guest {
    stream: TcpStream,
    /// Where it listens.
    address: SocketAddr,
}

/// Waits until every other rank is a guest.
fn gather(config: &ProcsConfig, clock: Clock, door: &Door, guests: &mut [Option<Guest>]) -> Result<(), Kind> {
    loop {
        let missing = missing(guests);
        if missing.is_empty() {
            // Ranks that ran out of patience, or died, have to come again.
            guests.iter_mut().for_each(|guest| *guest = guest.take().filter(|guest| !is_gone(&guest.stream)));
            if guests.iter().skip(1).all(Option::is_some) {
                return Ok(());
            }
            continue;
        }
        let Some(left) = clock.left() else { return Err(clock.timeout(missing)) };
        let Some(visit) = door.next(left) else { continue };
        admit(config, visit, guests)?;
        let missing = self::missing(guests);
        if !missing.is_empty() {
            tell_all(config, guests, || Message::Waiting { missing: missing.clone() });
        }
    }
}

fn missing(guests: &[Option<Guest>]) -> Vec<usize> {
    guests.iter().enumerate().skip(1).filter(|(_, guest)| guest.is_none()).map(|(rank, _)| rank).collect()
}

/// Gives a guest its place, or refuses it; an error ends the attempt for all.
fn admit(config: &ProcsConfig, visit: Visit, guests: &mut [Option<Guest>]) -> Result<(), Kind> {
    let Visit { stream, generation, hello } = visit;
    let refuse = |kind: Kind| {
        send(&stream, config.generation, Message::Refused { kind: kind.clone() });
        kind
    };
    let differs = |field: &str, expected: String, found: &str| {
        let (expected, found) = (format!("{field} {expected}"), format!("{field} {}", cut(found)));
        Err(refuse(Kind::Mismatch { rank: hello.rank, expected, found }))
    };
    if generation < config.generation {
        refuse(Kind::OldGeneration { generation, current: config.generation });
        return Ok(());
    }
    if generation > config.generation {
        return Err(refuse(Kind::OldGeneration { generation: config.generation, current: generation }));
    }
    if hello.version != VERSION {
        return differs("candle-moe version", VERSION.into(), &hello.version);
    }
    if hello.world_size != config.world_size {
        return differs("world_size", config.world_size.to_string(), &hello.world_size.to_string());
    }
    let Some(place) = guests.get_mut(hello.rank).filter(|_| hello.rank > 0) else {
        let limit = format!("1 to {}", config.world_size - 1);
        return match hello.rank {
            0 => Err(refuse(Kind::DuplicateRank { rank: 0 })),
            rank => differs("rank", limit, &rank.to_string()),
        };
    };
    if place.as_ref().is_some_and(|guest| !is_gone(&guest.stream)) {
        return Err(refuse(Kind::DuplicateRank { rank: hello.rank }));
    }
    let Ok(peer) = stream.peer_addr() else { return Ok(()) };
    *place = Some(Guest { stream, address: SocketAddr::new(peer.ip(), hello.port) });
    Ok(())
}

fn tell_all(config: &ProcsConfig, guests: &[Option<Guest>], message: impl Fn() -> Message) {
    for guest in guests.iter().flatten() {
        send(&guest.stream, config.generation, message());
    }
}

/// A guest that cannot be reached is found out by [`is_gone`] or by the first call.
fn send(stream: &TcpStream, generation: u64, message: Message) -> bool {
    let _ = stream.set_write_timeout(Some(PATIENCE));
    Outgoing::message(generation, message).is_some_and(|message| message.write_to(stream).is_ok())
}

fn is_gone(stream: &TcpStream) -> bool {
    look(stream) == Look::Closed
}

#[derive(PartialEq, Eq)]
enum Look {
    Quiet,
    /// There is something to read.
    News,
    Closed,
}

/// What the other side has done, without waiting.
fn look(stream: &TcpStream) -> Look {
    let peek = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    if stream.set_nonblocking(false).is_err() {
        return Look::Closed;
    }
    match peek {
        Ok(0) => Look::Closed,
        Ok(_) => Look::News,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Look::Quiet,
        Err(_) => Look::Closed,
    }
}

/// The side of every other rank.
fn join(config: &ProcsConfig, clock: Clock) -> Result<Streams, Kind> {
    let rank = config.rank;
    let mut streams: Streams = (0..config.world_size).map(|_| None).collect();
    let (first, door, token, addresses) = reach_rank_0(config, clock)?;
    let hello = |port| Hello { rank, world_size: config.world_size, version: VERSION.into(), port, token };
    for (other, address) in addresses.iter().enumerate().take(rank).skip(1) {
        let Some(left) = clock.left() else { return Err(clock.timeout(vec![other])) };
        let lost = |error: io::Error| {
            let reason = format!("at {address}, during the rendezvous: {error}; see how that process ended");
            Kind::RankLost { rank: other, reason }
        };
        let stream = TcpStream::connect_timeout(address, left).map_err(lost)?;
        if !send(&stream, config.generation, Message::Hello(hello(0))) {
            return Err(lost(io::ErrorKind::ConnectionReset.into()));
        }
        if let Some(place) = streams.get_mut(other) {
            *place = Some(stream);
        }
    }
    loop {
        let is_missing = |other: &usize| streams.get(*other).is_none_or(Option::is_none);
        let missing: Vec<usize> = (rank + 1..config.world_size).filter(is_missing).collect();
        if missing.is_empty() {
            break;
        }
        let Some(left) = clock.left() else { return Err(clock.timeout(missing)) };
        if look(&first) != Look::Quiet {
            // Nothing but the end of the attempt is due before this rank is ready.
            return wait_for_begin(config, clock, &first).and_then(|()| Err(unreachable(config, STRANGER)));
        }
        let Some(Visit { stream, generation, hello }) = door.next(left) else { continue };
        let is_member = generation == config.generation && hello.token == token && hello.rank > rank;
        match streams.get_mut(hello.rank).filter(|place| is_member && place.is_none()) {
            Some(place) => *place = Some(stream),
            None => tracing::debug!(rank, other = hello.rank, "a connection of no member was dropped"),
        }
    }
    send(&first, config.generation, Message::Ready);
    wait_for_begin(config, clock, &first)?;
    if let Some(place) = streams.first_mut() {
        *place = Some(first);
    }
    Ok(streams)
}

/// Waits until rank 0 says that all are ready, or why they will not be.
fn wait_for_begin(config: &ProcsConfig, clock: Clock, stream: &TcpStream) -> Result<(), Kind> {
    match read_from(Patient { stream, clock }) {
        Ok((Envelope { message: Message::Begin, .. }, _)) => Ok(()),
        Ok((Envelope { message: Message::Refused { kind }, .. }, _)) => Err(kind),
        Ok(_) => Err(unreachable(config, STRANGER)),
        // Rank 0 knows who is not ready, and is silent.
        Err(error) if is_timeout(&error) => Err(clock.timeout(vec![0])),
        Err(error) => {
            let reason = format!("its connection closed during the rendezvous ({error}); see how that process ended");
            Err(Kind::RankLost { rank: 0, reason })
        }
    }
}

/// Introduces itself to rank 0 until it answers; returns the connection, where this rank listens, and what rank 0 told.
fn reach_rank_0(config: &ProcsConfig, clock: Clock) -> Result<(TcpStream, Door, u64, Vec<SocketAddr>), Kind> {
    let mut missing = vec![0];
    let mut last_error = None;
    loop {
        let Some(left) = clock.left() else {
            return Err(match last_error {
                Some(error) if missing == [0] => unreachable(
                    config,
                    &format!(
                        "no answer from rank 0 within {:?} ({error}); is it running, with this address, or has it given \
                         up or begun without this rank?",
                        clock.deadline
                    ),
                ),
                _ => clock.timeout(missing),
            });
        };
        match connect(config, left).and_then(|stream| Ok((Door::beside(&stream)?, stream))) {
            Ok((door, stream)) => {
                let (rank, world_size) = (config.rank, config.world_size);
                let hello = Hello { rank, world_size, version: VERSION.into(), port: door.port, token: 0 };
                send(&stream, config.generation, Message::Hello(hello));
                match wait_for_welcome(config, clock, &stream, &mut missing) {
                    Ok(Some((token, addresses))) => return Ok((stream, door, token, addresses)),
                    Ok(None) => last_error = Some("it closed the connection".to_string()),
                    Err(kind) => return Err(kind),
                }
            }
            Err(error) => last_error = Some(error.to_string()),
        }
        thread::sleep(RETRY.min(left));
    }
}

fn connect(config: &ProcsConfig, left: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in (config.address.as_str(), config.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, left) {
            // A port of this machine that nobody listens at may be connected with itself.
            Ok(stream) if stream.local_addr()? == stream.peer_addr()? => continue,
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// `None`: rank 0 has closed the connection. `missing` is kept up to date.
fn wait_for_welcome(
    config: &ProcsConfig,
    clock: Clock,
    stream: &TcpStream,
    missing: &mut Vec<usize>,
) -> Result<Option<(u64, Vec<SocketAddr>)>, Kind> {
    loop {
        let Some(left) = clock.left() else { return Err(clock.timeout(missing.clone())) };
        let answer = stream.set_read_timeout(Some(left)).and_then(|()| read_from(Patient { stream, clock }));
        let _ = stream.set_read_timeout(None);
        let Envelope { generation, message } = match answer {
            Ok((envelope, _)) => envelope,
            Err(error) if is_timeout(&error) => continue,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(unreachable(config, &format!("what answers there is not rank 0: {error}")));
            }
            Err(_) => return Ok(None),
        };
        match message {
            Message::Refused { kind } => return Err(kind),
            Message::Waiting { missing: others } => *missing = others,
            Message::Welcome { token, addresses }
                if generation == config.generation && addresses.len() == config.world_size =>
            {
                return Ok(Some((token, addresses)));
            }
            _ => return Err(unreachable(config, STRANGER)),
        }
    }
}

/// Reads until the time is up, however slowly the bytes come.
struct Patient<'a> {
    stream: &'a TcpStream,
    clock: Clock,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(left) = self.clock.left() else { return Err(io::ErrorKind::TimedOut.into()) };
        self.stream.set_read_timeout(Some(left))?;
        let mut stream = self.stream;
        stream.read(buffer)
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn unreachable(config: &ProcsConfig, what: &str) -> Kind {
    Kind::Unreachable(format!("{}:{}: {what}", config.address, config.port))
}

/// A listener, and the guests who have introduced themselves.
struct Door {
    listener: TcpListener,
    port: u16,
    strangers: Arc<AtomicUsize>,
    sender: Sender<Visit>,
    visits: Receiver<Visit>,
}

struct Visit {
    stream: TcpStream,
    generation: u64,
    hello: Hello,
}

impl Door {
    /// At any port of the address from which `stream` goes out.
    fn beside(stream: &TcpStream) -> io::Result<Self> {
        let listener = TcpListener::bind((stream.local_addr()?.ip(), 0))?;
        Self::of(listener)
    }

    fn open(listener: TcpListener) -> Result<Self, Kind> {
        Self::of(listener).map_err(|error| Kind::Unreachable(format!("cannot listen: {error}")))
    }

    fn of(listener: TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let (sender, visits) = channel();
        Ok(Self { listener, port, strangers: Arc::default(), sender, visits })
    }

    /// The next guest; `None` if there is none for a moment, at most `left`.
    fn next(&self, left: Duration) -> Option<Visit> {
        match self.listener.accept() {
            Ok((stream, _)) => self.let_in(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The one who came has gone already, or there are too many open files for now.
            Err(error) => tracing::debug!(%error, "cannot accept a connection"),
        }
        self.visits.recv_timeout(PAUSE.min(left)).ok()
    }

    /// Hears who it is, on a thread that ends soon.
    fn let_in(&self, stream: TcpStream) {
        if self.strangers.fetch_add(1, Ordering::Relaxed) >= MAX_STRANGERS {
            self.strangers.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let (strangers, sender) = (Arc::clone(&self.strangers), self.sender.clone());
        let hear = move || {
            if let Some(visit) = hear(stream) {
                // Nobody listens any more: the group is complete.
                let _ = sender.send(visit);
            }
            strangers.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = thread::Builder::new().name("rendezvous".into()).spawn(hear) {
            self.strangers.fetch_sub(1, Ordering::Relaxed);
            tracing::debug!(%error, "cannot start a thread for a connection");
        }
    }
}

fn hear(stream: TcpStream) -> Option<Visit> {
    stream.set_nonblocking(false).ok()?;
    let clock = Clock { started: Instant::now(), deadline: PATIENCE };
    let envelope = read_from(Patient { stream: &stream, clock });
    stream.set_read_timeout(None).ok()?;
    match envelope {
        Ok((Envelope { generation, message: Message::Hello(hello) }, _)) => Some(Visit { stream, generation, hello }),
        Ok(_) => None,
        Err(error) => {
            tracing::debug!(%error, "a stranger was sent away");
            None
        }
    }
}
