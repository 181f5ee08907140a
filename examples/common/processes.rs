//! Ranks as processes: what a launcher started, or what a program starts itself.

use super::report::{BadArguments, plain};
use anyhow::{Context, Result, anyhow, bail};
use candle_moe::ep::{Environment, Overrides};
use std::collections::hash_map::RandomState;
use std::ffi::OsString;
use std::hash::BuildHasher;
use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long ranks may take to end by themselves once one of them has failed.
const GRACE: Duration = Duration::from_secs(5);
const ADDRESS: &str = "127.0.0.1";
/// Variables that must not contradict those that ranks are given.
const OPEN_MPI: [&str; 3] = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"];

/// The rank that a launcher wants this process to be, if one started it. `advice` says how to do without.
pub(crate) fn launched(advice: &str) -> Result<Option<Environment>> {
    let detected = Environment::detect(&Overrides::default());
    detected.map_err(|error| BadArguments(format!("{}; {advice}", plain(&error))).into())
}

/// Runs this program once for each rank, as torchrun would; rank 0 writes to this program's stdout.
pub(crate) fn run(num_ranks: usize) -> Result<()> {
    Ranks::start(num_ranks, &[], Stdio::inherit)?.wait()
}

/// Runs this program once for each rank, with `more` arguments, and returns what rank 0 writes to stdout.
pub(crate) fn stdout_of(num_ranks: usize, more: &[OsString]) -> Result<Vec<u8>> {
    let mut ranks = Ranks::start(num_ranks, more, Stdio::piped)?;
    let stdout = ranks.0.first_mut().and_then(|(child, _)| child.stdout.take());
    // A pipe that nobody reads would hold rank 0 up.
    let reader = thread::spawn(move || read(stdout));
    ranks.wait()?;
    reader.join().map_err(|_| anyhow!("the thread that reads what rank 0 writes panicked"))?
}

fn read(stdout: Option<ChildStdout>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut stdout) = stdout {
        stdout.read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// The processes, and how they ended. Those that run when this is dropped are killed.
struct Ranks(Vec<(Child, Option<ExitStatus>)>);

impl Ranks {
    /// Starts them; `stdout` is that of rank 0.
    fn start(num_ranks: usize, more: &[OsString], stdout: impl Fn() -> Stdio) -> Result<Self> {
        let port = free_port().context("no free port for ranks as processes to meet at; use threads")?;
        let mut ranks = Self(Vec::new());
        for rank in 0..num_ranks {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(std::env::args_os().skip(1)).args(more).stdin(Stdio::null());
            command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            command.env("WORLD_SIZE", num_ranks.to_string());
            command.env("MASTER_ADDR", ADDRESS).env("MASTER_PORT", port.to_string());
            // What a launcher said of this process is not true of its ranks.
            for name in OPEN_MPI {
                command.env_remove(name);
            }
            command.stdout(if rank == 0 { stdout() } else { Stdio::null() });
            let child = command.spawn().with_context(|| format!("cannot start rank {rank} as a process"))?;
            ranks.0.push((child, None));
        }
        Ok(ranks)
    }

    /// Waits until all have ended; not for ever once one has failed.
    fn wait_for_all(&mut self) -> Result<()> {
        let mut failed: Option<Instant> = None;
        loop {
            for (child, status) in self.0.iter_mut().filter(|(_, status)| status.is_none()) {
                *status = child.try_wait()?;
                if status.is_some_and(|status| !status.success()) {
                    failed.get_or_insert_with(Instant::now);
                }
            }
            if self.0.iter().all(|(_, status)| status.is_some()) || failed.is_some_and(|at| at.elapsed() > GRACE) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the ranks have ended, and names those that failed.
    fn wait(&mut self) -> Result<()> {
        self.wait_for_all()?;
        match self.failures() {
            failures if failures.is_empty() => Ok(()),
            failures => bail!("{}", failures.join("; ")),
        }
    }

    /// The ranks that failed, first those that were not ended by an error of their own, which is what the others ended of.
    fn failures(&self) -> Vec<String> {
        let mut failed: Vec<_> = self
            .0
            .iter()
            .enumerate()
            .filter_map(|(rank, (_, status))| match status {
                Some(status) if status.success() => None,
                Some(status) => Some((status.code().is_some(), format!("rank {rank} ended with {status}"))),
                None => Some((true, format!("rank {rank} did not end by itself"))),
            })
            .collect();
        failed.sort_by_key(|(by_itself, _)| *by_itself);
        failed.into_iter().map(|(_, text)| text).collect()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for (child, _) in self.0.iter_mut().filter(|(_, status)| status.is_none()) {
            // An error: it has ended meanwhile.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A port below those that the system hands out for connections, so that it is still free when rank 0 listens.
fn free_port() -> Option<u16> {
    let first = RandomState::new().hash_one(std::process::id()) as u16 % 10_000;
    let ports = (0..100).map(|offset| 20_000 + (first + offset) % 10_000);
    ports.into_iter().find(|port| TcpListener::bind((ADDRESS, *port)).is_ok())
}
