//! Which rank this process is, by what its launcher says in environment variables.

use candle_core::{Result, bail};
use std::fmt;

/// Ports for groups whose launcher does not name a free one, so that two groups of one machine rarely meet.
const PORTS: std::ops::Range<u64> = 20_000..30_000;

/// The port for the group of that number.
fn port_of_group(number: u64) -> u16 {
    (PORTS.start + number % (PORTS.end - PORTS.start)) as u16
}

/// Who started this process as a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Nobody: rank and size were given explicitly.
    Explicit,
    /// `torchrun`, or whatever sets its variables.
    Torchrun,
    /// `srun`.
    Slurm,
    /// OpenMPI's `mpirun`.
    OpenMpi,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Explicit => "explicit configuration",
            Self::Torchrun => "torchrun",
            Self::Slurm => "Slurm",
            Self::OpenMpi => "OpenMPI",
        })
    }
}

/// What a process knows of its group before it meets the others. See [`Environment::detect`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// Where `rank` and `world_size` come from.
    pub launcher: Launcher,
    /// This rank, below `world_size`.
    pub rank: usize,
    /// The number of ranks.
    pub world_size: usize,
    /// This rank among those of the same machine.
    pub local_rank: usize,
    /// The host name or address of rank 0.
    pub address: String,
    /// The port at which rank 0 listens.
    pub port: u16,
    /// Which life of the group this is.
    pub generation: u64,
}

/// What is configured explicitly, and wins over every variable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// For [`Environment::rank`]; comes with `world_size`.
    pub rank: Option<usize>,
    /// For [`Environment::world_size`]; comes with `rank`.
    pub world_size: Option<usize>,
    /// For [`Environment::local_rank`].
    pub local_rank: Option<usize>,
    /// For [`Environment::address`].
    pub address: Option<String>,
    /// For [`Environment::port`].
    pub port: Option<u16>,
    /// For [`Environment::generation`].
    pub generation: Option<u64>,
}

impl Environment {
    /// Reads the variables of this process; see [`Environment::from_lookup`].
    ///
    /// # Errors
    ///
    /// Those of [`Environment::from_lookup`]; a variable that is not Unicode.
    pub fn detect(overrides: &Overrides) -> Result<Option<Self>> {
        let read = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self::from_lookup(overrides, read)
    }

    /// Which rank this is, `None` if no launcher says so.
    ///
    /// | | rank, world_size, local_rank | address | port | generation |
    /// | --- | --- | --- | --- | --- |
    /// | first `overrides` | both of the first two, and the third, else the rank | given | given | given |
    /// | else torchrun's | `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | `MASTER_ADDR` | `MASTER_PORT`; 20000 + (`MASTER_PORT` + 1) % 10000 where `TORCHELASTIC_USE_AGENT_STORE` says that torchrun listens at `MASTER_PORT` itself | `TORCHELASTIC_RESTART_COUNT`, else 0 |
    /// | else Slurm's | `SLURM_PROCID`, `SLURM_NTASKS`, `SLURM_LOCALID` | `MASTER_ADDR`, else the first host of `SLURM_JOB_NODELIST`, else `SLURM_LAUNCH_NODE_IPADDR` | `MASTER_PORT`, else 20000 + `SLURM_JOB_ID` % 10000 | 0 |
    /// | else OpenMPI's | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK` | `MASTER_ADDR` | `MASTER_PORT` | 0 |
    ///
    /// `lookup` gives the value of a variable; one that is empty counts as not set. A launcher has spoken if its rank, size or
    /// local rank is set; `MASTER_ADDR` and `MASTER_PORT` alone say nothing.
    ///
    /// # Errors
    ///
    /// Variables or overrides that are half set, no numbers, out of range, or contradict each other. Each error names the
    /// variable, its value, and what to do.
    pub fn from_lookup(overrides: &Overrides, lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let variables = Variables(&lookup);
        let Some(who) = variables.who(overrides)? else { return Ok(None) };
        let Who { launcher, rank, world_size, local_rank } = who;
        let address = match &overrides.address {
            Some(address) => address.clone(),
            None => variables.address(launcher)?,
        };
        let port = match overrides.port {
            Some(port) => port,
            None => variables.port(launcher)?,
        };
        let generation = match (overrides.generation, launcher) {
            (Some(generation), _) => generation,
            (None, Launcher::Torchrun) => variables.number("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0),
            (None, _) => 0,
        };
        if port == 0 {
            bail!("environment: the port of rank 0 is 0, expected 1 to 65535; choose a free one")
        }
        Ok(Some(Self { launcher, rank, world_size, local_rank, address, port, generation }))
    }
}

struct Who {
    launcher: Launcher,
    rank: usize,
    world_size: usize,
    local_rank: usize,
}

/// The variables with which a launcher says who a process is.
struct Names {
    launcher: Launcher,
    rank: &'static str,
    world_size: &'static str,
    local_rank: &'static str,
}

const TORCHRUN: Names =
    Names { launcher: Launcher::Torchrun, rank: "RANK", world_size: "WORLD_SIZE", local_rank: "LOCAL_RANK" };
const SLURM: Names =
    Names { launcher: Launcher::Slurm, rank: "SLURM_PROCID", world_size: "SLURM_NTASKS", local_rank: "SLURM_LOCALID" };
const OPEN_MPI: Names = Names {
    launcher: Launcher::OpenMpi,
    rank: "OMPI_COMM_WORLD_RANK",
    world_size: "OMPI_COMM_WORLD_SIZE",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
};

struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn number(&self, name: &str) -> Result<Option<u64>> {
        let Some(value) = self.text(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => bail!("environment: {name} is {value:?}, expected a number from 0 on; correct or unset it"),
        }
    }

    fn who(&self, overrides: &Overrides) -> Result<Option<Who>> {
        match (overrides.rank, overrides.world_size) {
            (Some(rank), Some(world_size)) => {
                let local_rank = overrides.local_rank.unwrap_or(rank);
                let who = Who { launcher: Launcher::Explicit, rank, world_size, local_rank };
                return check(who, ["rank", "world_size", "local_rank"]).map(Some);
            }
            (Some(rank), None) => {
                bail!("environment: rank {rank} was configured without world_size; give both or none")
            }
            (None, Some(size)) => {
                bail!("environment: world_size {size} was configured without rank; give both or none")
            }
            (None, None) => {}
        }
        for names in [TORCHRUN, SLURM, OPEN_MPI] {
            if let Some(who) = self.who_by(&names)? {
                self.agrees_with_open_mpi(&who)?;
                let local_rank = overrides.local_rank.unwrap_or(who.local_rank);
                return check(Who { local_rank, ..who }, [names.rank, names.world_size, names.local_rank]).map(Some);
            }
        }
        Ok(None)
    }

    fn who_by(&self, names: &Names) -> Result<Option<Who>> {
        let all = [names.rank, names.world_size, names.local_rank];
        // A batch script of Slurm knows how many tasks there will be, and is none of them.
        let is_batch = names.launcher == Launcher::Slurm && self.text(names.rank).is_none();
        if is_batch || all.iter().all(|name| self.text(name).is_none()) {
            return Ok(None);
        }
        let number = |name: &str| match self.number(name)? {
            Some(number) => Ok(usize::try_from(number).unwrap_or(usize::MAX)),
            None => {
                let set = all.iter().find_map(|name| Some(format!("{name} is {:?}", self.text(name)?)));
                bail!(
                    "environment: {name} is not set, but {}; start all ranks with {}, or unset all of {}",
                    set.unwrap_or_default(),
                    names.launcher,
                    all.join(", ")
                )
            }
        };
        let (rank, world_size, local_rank) =
            (number(names.rank)?, number(names.world_size)?, number(names.local_rank)?);
        Ok(Some(Who { launcher: names.launcher, rank, world_size, local_rank }))
    }

    /// `mpirun` that starts ranks under the names of torchrun must mean the same ones. (With Slurm, torchrun itself is what is
    /// started, and numbers its ranks as it likes.)
    fn agrees_with_open_mpi(&self, who: &Who) -> Result<()> {
        if who.launcher != Launcher::Torchrun {
            return Ok(());
        }
        let Some(other) = self.who_by(&OPEN_MPI)? else { return Ok(()) };
        for (name, mine, its, theirs) in [
            (TORCHRUN.rank, who.rank, OPEN_MPI.rank, other.rank),
            (TORCHRUN.world_size, who.world_size, OPEN_MPI.world_size, other.world_size),
        ] {
            if mine != theirs {
                bail!("environment: {name} is {mine}, but {its} is {theirs}; unset the one that is not meant")
            }
        }
        Ok(())
    }

    fn address(&self, launcher: Launcher) -> Result<String> {
        if let Some(address) = self.text("MASTER_ADDR") {
            return Ok(address);
        }
        match launcher {
            Launcher::Explicit => bail!(
                "environment: the address of rank 0 is not configured and MASTER_ADDR is not set; give one, on one machine \
                 127.0.0.1"
            ),
            Launcher::Torchrun => bail!(
                "environment: MASTER_ADDR is not set, but RANK is; start all ranks with torchrun, or set it to the host of \
                 rank 0, on one machine 127.0.0.1"
            ),
            Launcher::OpenMpi => bail!(
                "environment: MASTER_ADDR is not set, but OMPI_COMM_WORLD_RANK is; set it to the host of rank 0 and pass it on \
                 with mpirun -x MASTER_ADDR -x MASTER_PORT"
            ),
            Launcher::Slurm => {}
        }
        if let Some(nodes) = self.text("SLURM_JOB_NODELIST") {
            return match first_host(&nodes) {
                Some(host) => Ok(host),
                None => bail!(
                    "environment: SLURM_JOB_NODELIST is {nodes:?}, expected hosts such as node[01-04,7]; set MASTER_ADDR to \
                     the host of rank 0"
                ),
            };
        }
        match self.text("SLURM_LAUNCH_NODE_IPADDR") {
            Some(address) => Ok(address),
            None => bail!(
                "environment: neither SLURM_JOB_NODELIST nor SLURM_LAUNCH_NODE_IPADDR is set, but SLURM_PROCID is; start the \
                 ranks with srun, or set MASTER_ADDR to the host of rank 0"
            ),
        }
    }

    /// Whether torchrun's agent listens at `MASTER_PORT` itself.
    fn agent_listens(&self, launcher: Launcher) -> bool {
        let agent = self.text("TORCHELASTIC_USE_AGENT_STORE");
        launcher == Launcher::Torchrun && agent.is_some_and(|value| value.eq_ignore_ascii_case("true") || value == "1")
    }

    fn port(&self, launcher: Launcher) -> Result<u16> {
        if let Some(port) = self.number("MASTER_PORT")? {
            return match u16::try_from(port) {
                Ok(taken) if taken > 0 && self.agent_listens(launcher) => Ok(port_of_group(port + 1)),
                Ok(port) if port > 0 => Ok(port),
                _ => bail!("environment: MASTER_PORT is {port}, expected 1 to 65535; choose a free port"),
            };
        }
        if launcher == Launcher::Slurm {
            let Some(job) = self.number("SLURM_JOB_ID")? else {
                bail!(
                    "environment: SLURM_JOB_ID is not set, but SLURM_PROCID is; start the ranks with srun, or set MASTER_PORT \
                     to a free port"
                )
            };
            return Ok(port_of_group(job));
        }
        bail!(
            "environment: the port of rank 0 is not configured and MASTER_PORT is not set ({launcher}); set it to a free port, \
             the same for all ranks"
        )
    }
}

fn check(who: Who, [rank, world_size, local_rank]: [&str; 3]) -> Result<Who> {
    if who.world_size == 0 {
        bail!("environment: {world_size} is 0, expected at least 1; start at least one rank")
    }
    for (name, value) in [(rank, who.rank), (local_rank, who.local_rank)] {
        if value >= who.world_size {
            bail!(
                "environment: {name} is {value}, expected less than {world_size}, which is {}; start all ranks alike",
                who.world_size
            )
        }
    }
    Ok(who)
}

/// The first host of a list of Slurm's, such as `node[003-005,010],login`.
fn first_host(nodes: &str) -> Option<String> {
    let end = nodes.find([',', '[']).unwrap_or(nodes.len());
    let (stem, rest) = nodes.split_at(end);
    let Some(numbers) = rest.strip_prefix('[') else {
        return Some(stem.to_string()).filter(|host| !host.is_empty());
    };
    let (numbers, rest) = numbers.split_once(']')?;
    let first = numbers.split([',', '-']).next().filter(|first| !first.is_empty())?;
    // What follows the brackets belongs to every host of them.
    let suffix = rest.split(',').next().unwrap_or_default();
    (!suffix.contains('[')).then(|| format!("{stem}{first}{suffix}"))
}
