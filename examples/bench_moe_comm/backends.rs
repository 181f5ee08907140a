//! What carries rows between ranks, and by which strategy: `threads-gather`, `procs-exchange`, `nccl-gather`, `peer` and so on.

use candle_moe::ep::{Problem, Reduction, Strategy};
use std::fmt;
use std::str::FromStr;

/// What ranks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// Threads of this process.
    Threads,
    /// Processes of this machine, over local sockets.
    Procs,
    /// CUDA devices, as threads of this process or as the processes that a launcher started.
    Nccl,
    /// CUDA devices that reach each other's memory, as threads of this process; a strategy of its own.
    Peer,
}

impl Transport {
    pub(crate) const ALL: [Self; 4] = [Self::Threads, Self::Procs, Self::Nccl, Self::Peer];
    /// Those that need nothing but a CPU, which is what `all` means.
    const OF_THE_HOST: [Self; 2] = [Self::Threads, Self::Procs];

    /// Whether ranks have a CUDA device each.
    pub(crate) fn has_devices(self) -> bool {
        matches!(self, Self::Nccl | Self::Peer)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Procs => "procs",
            Self::Nccl => "nccl",
            Self::Peer => "peer",
        }
    }
}

/// One name in `--backend`: a transport, and a strategy if not the best one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) transport: Transport,
    strategy: Option<Strategy>,
}

impl Wish {
    /// The best strategy.
    pub(crate) fn best(transport: Transport) -> Self {
        Self { transport, strategy: None }
    }

    /// Every name.
    fn all() -> impl Iterator<Item = Self> {
        Transport::ALL.into_iter().flat_map(|transport| {
            let strategies: &[_] = match transport {
                Transport::Peer => &[],
                _ => &[Strategy::Gather, Strategy::Exchange, Strategy::Replicated, Strategy::Solo],
            };
            let forced = strategies.iter().map(move |&strategy| Self { transport, strategy: Some(strategy) });
            std::iter::once(Self::best(transport)).chain(forced)
        })
    }
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.transport.name())?;
        self.strategy.map_or(Ok(()), |strategy| write!(f, "-{strategy}"))
    }
}

/// `--backend`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wishes {
    /// Every strategy on every transport of the host.
    All,
    These(Vec<Wish>),
}

impl Wishes {
    /// The transports that are asked for by name.
    pub(crate) fn name(&self, transport: Transport) -> bool {
        match self {
            Self::All => false,
            Self::These(wishes) => wishes.iter().any(|wish| wish.transport == transport),
        }
    }

    /// One by one, without `solo` where there are several ranks, transport by transport.
    fn on(&self, transport: Transport, ep_size: usize) -> Vec<Wish> {
        let sensible = |wish: &Wish| match wish.strategy {
            Some(Strategy::Solo) => ep_size == 1,
            strategy => strategy.is_some(),
        };
        match self {
            Self::All if !Transport::OF_THE_HOST.contains(&transport) => Vec::new(),
            Self::All => Wish::all().filter(|wish| wish.transport == transport && sensible(wish)).collect(),
            Self::These(wishes) => wishes.iter().copied().filter(|wish| wish.transport == transport).collect(),
        }
    }
}

impl fmt::Display for Wishes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::These(wishes) => f.write_str(&wishes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
        }
    }
}

impl FromStr for Wishes {
    type Err = String;

    fn from_str(names: &str) -> Result<Self, String> {
        let plain = |name: &str| name.trim().replace('_', "-").to_ascii_lowercase();
        if plain(names) == "all" {
            return Ok(Self::All);
        }
        let wish = |name: &str| {
            let found = Wish::all().find(|wish| wish.to_string() == plain(name));
            found.ok_or_else(|| {
                let known = Wish::all().map(|wish| wish.to_string()).collect::<Vec<_>>().join(", ");
                format!("unknown backend {name:?}, expected all, or some of {known}")
            })
        };
        names.split(',').map(wish).collect::<Result<_, _>>().map(Self::These)
    }
}

/// A backend that is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backend {
    pub(crate) transport: Transport,
    pub(crate) strategy: Strategy,
    /// Why this strategy.
    pub(crate) reason: String,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.transport {
            Transport::Peer => f.write_str(self.transport.name()),
            _ => write!(f, "{}-{}", self.transport.name(), self.strategy),
        }
    }
}

impl Backend {
    /// Those that are wished for, each once, those of `transports` only.
    pub(crate) fn list(
        wishes: &Wishes,
        transports: &[Transport],
        (ep_size, top_k, reduction): (usize, usize, Reduction),
    ) -> candle_core::Result<Vec<Self>> {
        let mut backends: Vec<Self> = Vec::new();
        for Wish { transport, strategy } in transports.iter().flat_map(|&transport| wishes.on(transport, ep_size)) {
            let replicated_tokens = strategy == Some(Strategy::Replicated);
            let peer_access = transport == Transport::Peer;
            let choice = Problem { ep_size, top_k, reduction, replicated_tokens, peer_access }.choose(strategy)?;
            let backend = Self { transport, strategy: choice.strategy(), reason: choice.reason().to_string() };
            if !backends.iter().any(|other| other.to_string() == backend.to_string()) {
                backends.push(backend);
            }
        }
        Ok(backends)
    }

    /// Whether a graph can hold its calls: the host need not know on the way how much goes where.
    pub(crate) fn may_be_captured(&self) -> bool {
        self.transport.has_devices() && self.strategy != Strategy::Exchange
    }

    /// The names, separated by commas.
    pub(crate) fn names(backends: &[Self]) -> String {
        backends.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }
}
