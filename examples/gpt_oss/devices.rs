//! Where ranks are: on the CPU, or each on a CUDA device of its own.

use crate::common::report::{BadArguments, plain};
use anyhow::{Result, anyhow};
use candle_core::Device;
use candle_moe::ep::{Communicator, Deadlines, Environment, Procs, Strategy, Threads};
use std::fmt;
use std::str::FromStr;
use std::thread;

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Cpu,
    /// The device of that number; without one, that of each rank's own number on its machine.
    Cuda(Option<usize>),
}

impl Place {
    /// Whether there will be a device for each of `ep_size` ranks, or for the one that `launched` made of this process.
    pub(crate) fn check(
        self,
        ep_size: usize,
        launched: Option<&Environment>,
        strategy: Option<Strategy>,
    ) -> Result<(), BadArguments> {
        let Self::Cuda(ordinal) = self else { return Ok(()) };
        if !cfg!(feature = "cuda") {
            let advice = "this program was built without it; build with --features cuda, or use --device cpu";
            return Err(BadArguments(format!("--device {self}: {advice}")));
        }
        if ep_size > 1 && !cfg!(feature = "nccl") && strategy != Some(Strategy::Peer) {
            return Err(BadArguments(format!(
                "--ep-size {ep_size}: expected 1 with --device {self}, since this program was built without NCCL; build with \
                 --features nccl, or use --strategy peer or --device cpu"
            )));
        }
        let found = num_devices();
        match (ordinal, launched) {
            (None, Some(Environment { local_rank, .. })) if *local_rank >= found => Err(BadArguments(format!(
                "--device {self}: expected a CUDA device for each rank, and this is rank {local_rank} of its machine and sees \
                 {found}; start as many ranks, or name its device with --device cuda:N"
            ))),
            (Some(_), None) if ep_size > 1 => Err(BadArguments(format!(
                "--device {self}: expected cuda, which gives each of {ep_size} ranks a device of its own; or use --ep-size 1"
            ))),
            (None, None) if ep_size > 1 && found < ep_size => Err(BadArguments(format!(
                "--ep-size {ep_size}: expected as many CUDA devices, one for each rank, and there are {found}; choose fewer \
                 ranks, or use --device cpu"
            ))),
            _ => Ok(()),
        }
    }

    /// The device of the rank that has the number `local_rank` on this machine.
    pub(crate) fn open(self, local_rank: usize) -> Result<Device> {
        let Self::Cuda(ordinal) = self else { return Ok(Device::Cpu) };
        Device::new_cuda(ordinal.unwrap_or(local_rank)).map_err(|error| {
            BadArguments(format!("--device {self}: {}; use another, or --device cpu", plain(&error))).into()
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(ordinal)) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let ordinal = name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        match (name, ordinal) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(None)),
            (_, Some(ordinal)) => Ok(Self::Cuda(Some(ordinal))),
            _ => Err("expected cpu, cuda or cuda:N".into()),
        }
    }
}

#[cfg(feature = "cuda")]
fn num_devices() -> usize {
    use candle_core::cuda_backend::cudarc::driver::CudaContext;
    CudaContext::device_count().map_or(0, |count| count.max(0) as usize)
}

#[cfg(not(feature = "cuda"))]
fn num_devices() -> usize {
    0
}

/// A handle on the group, and the device that this rank's tensors are on.
pub(crate) struct Rank {
    pub(crate) communicator: Box<dyn Communicator>,
    pub(crate) device: Device,
}

impl Rank {
    /// A process that has met the others.
    pub(crate) fn of_procs(procs: Procs, device: Device) -> Result<Self> {
        let communicator = match device.is_cpu() || procs.world_size() == 1 {
            true => Box::new(procs),
            false => over_procs(procs, &device)?,
        };
        Ok(Self { communicator, device })
    }

    /// A thread of this process, on the device of its number.
    fn of_threads(threads: Threads, place: Place, strategy: Option<Strategy>) -> Result<Self> {
        let device = place.open(threads.rank())?;
        let communicator = match strategy {
            Some(Strategy::Peer) => among_peers(threads, &device)?,
            _ => over_threads(threads, &device)?,
        };
        Ok(Self { communicator, device })
    }
}

/// Does `first` as rank 0 on this thread, and `other` as every other rank on a thread of its own, with a device for each.
pub(crate) fn with_threads<T>(
    (place, strategy): (Place, Option<Strategy>),
    ep_size: usize,
    deadlines: Deadlines,
    first: impl FnOnce(Rank) -> Result<T>,
    other: impl Fn(Rank) -> Result<()> + Sync,
) -> Result<T> {
    let mut handles = Threads::group(ep_size, deadlines)?.into_iter();
    let handle = handles.next().ok_or_else(|| anyhow!("a group without ranks"))?;
    let other = &other;
    thread::scope(|scope| {
        let spawn = |handle: Threads| {
            let thread = thread::Builder::new().name(format!("rank {}", handle.rank()));
            // Where there is no thread, the handle goes, and the others hear that this rank left.
            thread.spawn_scoped(scope, move || other(Rank::of_threads(handle, place, strategy)?))
        };
        let others: Vec<_> = handles.map(spawn).collect();
        let outcome = Rank::of_threads(handle, place, strategy).and_then(first);
        let end = |thread: std::io::Result<thread::ScopedJoinHandle<'_, Result<()>>>| match thread?.join() {
            Ok(outcome) => outcome,
            Err(_) => Err(anyhow!("a thread that was a rank panicked")),
        };
        let ends: Vec<_> = others.into_iter().map(end).collect();
        with_causes(outcome, ends)
    })
}

/// The outcome of rank 0, whose error may be but the echo of what ended another rank.
fn with_causes<T>(outcome: Result<T>, others: Vec<Result<()>>) -> Result<T> {
    let mut failed: Vec<_> = others.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    failed.dedup();
    match outcome {
        Ok(_) if !failed.is_empty() => Err(anyhow!(failed.join("; "))),
        Err(error) if !failed.is_empty() && !error.is::<BadArguments>() => {
            Err(anyhow!("{error:#}; the other ranks ended with: {}", failed.join("; ")))
        }
        outcome => outcome,
    }
}

/// Ranks that are devices of this process and reach each other's memory.
#[cfg(feature = "cuda")]
fn among_peers(threads: Threads, device: &Device) -> Result<Box<dyn Communicator>> {
    Ok(Box::new(candle_moe::ep::Peer::over_threads(threads, device)?))
}

#[cfg(not(feature = "cuda"))]
fn among_peers(_: Threads, _: &Device) -> Result<Box<dyn Communicator>> {
    Err(anyhow!("expected a program built with --features cuda"))
}

/// What carries the rows of ranks that are devices of this process.
#[cfg(feature = "nccl")]
fn over_threads(threads: Threads, device: &Device) -> Result<Box<dyn Communicator>> {
    Ok(Box::new(candle_moe::ep::Nccl::over_threads(threads, device)?))
}

/// What carries the rows of ranks that are processes with a device each.
#[cfg(feature = "nccl")]
fn over_procs(procs: Procs, device: &Device) -> Result<Box<dyn Communicator>> {
    Ok(Box::new(candle_moe::ep::Nccl::over_procs(procs, device)?))
}

#[cfg(not(feature = "nccl"))]
fn over_threads(_: Threads, _: &Device) -> Result<Box<dyn Communicator>> {
    Err(anyhow!("expected a program built with --features nccl"))
}

#[cfg(not(feature = "nccl"))]
fn over_procs(_: Procs, _: &Device) -> Result<Box<dyn Communicator>> {
    Err(anyhow!("expected a program built with --features nccl"))
}
