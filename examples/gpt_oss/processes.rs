//! Ranks as processes: what a launcher started, or what this program starts itself.

use crate::arguments::{Arguments, LaunchName};
use crate::common::report::{BadArguments, Verdict, plain};
use anyhow::{Context, Result, bail};
use candle_moe::checkpoint::Checkpoint;
use candle_moe::ep::{Communicator, Deadlines, Environment, Overrides, Procs, ProcsConfig};
use candle_moe::models::gpt_oss::{self, Config, MoeOptions};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// For the rendezvous, and for reading a checkpoint that another rank may have read already.
const WARM_UP: Duration = Duration::from_secs(600);
/// How long ranks may take to end by themselves once one of them has failed.
const GRACE: Duration = Duration::from_secs(5);
const ADDRESS: &str = "127.0.0.1";

/// The rank that a launcher wants this process to be; `None` if it is to have all ranks itself, or to start them.
pub(crate) fn launched(arguments: &Arguments) -> Result<Option<Environment>> {
    if arguments.launch == Some(LaunchName::Threads) {
        return Ok(None);
    }
    let advice = "or use --launch threads";
    let environment = Environment::detect(&Overrides::default())
        .map_err(|error| BadArguments(format!("{}; {advice}", plain(&error))))?;
    // A launcher that started one process leaves it to this one what its ranks are.
    Ok(environment.filter(|environment| environment.world_size > 1 || arguments.launch.is_some()))
}

pub(crate) fn join(environment: &Environment, options: &MoeOptions) -> Result<Procs> {
    let deadlines = Deadlines { warm_up: WARM_UP, serving: options.deadline };
    Ok(Procs::join(ProcsConfig::from(environment), deadlines)?)
}

/// The life of a rank other than 0.
pub(crate) fn serve(model: &Path, config: &Config, options: &MoeOptions, ranks: &mut dyn Communicator) -> Result<()> {
    Ok(gpt_oss::serve(&Checkpoint::open(model)?, config, options, ranks, &|| ())?)
}

/// Runs this program once for each rank, as torchrun would; rank 0 writes to this program's stdout.
pub(crate) fn start(ep_size: usize) -> Result<Verdict> {
    let port = free_port().context("--launch procs: no free port to meet at; use --launch threads")?;
    let mut ranks = Ranks(Vec::new());
    for rank in 0..ep_size {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1)).stdin(Stdio::null());
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", ep_size.to_string());
        command.env("MASTER_ADDR", ADDRESS).env("MASTER_PORT", port.to_string());
        if rank > 0 {
            command.stdout(Stdio::null());
        }
        let child = command.spawn().with_context(|| format!("--launch procs: cannot start rank {rank}"))?;
        ranks.0.push((child, None));
    }
    ranks.wait()?;
    ranks.verdict()
}

/// The processes, and how they ended. Those that run when this is dropped are killed.
struct Ranks(Vec<(Child, Option<ExitStatus>)>);

impl Ranks {
    /// Waits until all have ended; not for ever once one has failed.
    fn wait(&mut self) -> Result<()> {
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

    /// Names the ranks that failed; first those that were not ended by an error of their own, which is what the others
    /// ended of.
    fn verdict(&self) -> Result<Verdict> {
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
        if failed.is_empty() {
            return Ok(Verdict::Passed);
        }
        failed.sort_by_key(|(by_itself, _)| *by_itself);
        let failed: Vec<_> = failed.into_iter().map(|(_, text)| text).collect();
        bail!("{}", failed.join("; "))
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
