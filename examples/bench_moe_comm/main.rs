//! Times dispatch and combine of an expert-parallel MoE layer alone, without experts, for ranks that are threads,
//! processes or CUDA devices.
//!
//! ```text
//! cargo run --release --example bench_moe_comm -- --ep-size 8 --profile deepseek_v3 --backend all -b 1 -e 128 -f 2
//! ```
//!
//! Flags and JSON keys are those of TensorRT-LLM's `bench_moe_comm.py`, with more of both. A rank's part of the
//! measurement knows nothing of its transport, and results come together over the communicator that is measured, so all
//! transports are measured alike.

mod arguments;
mod backends;
mod check;
mod clock;
#[allow(dead_code, reason = "each example uses its part")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
mod device;
mod html;
mod measure;
mod measurement;
mod profiles;
mod report;
mod settings;
mod workload;

#[cfg(not(feature = "nccl"))]
use anyhow::bail;
use anyhow::{Context, Result, anyhow};
use arguments::Arguments;
use backends::{Backend, Transport};
use candle_core::Device;
#[cfg(feature = "nccl")]
use candle_moe::ep::Nccl;
#[cfg(feature = "cuda")]
use candle_moe::ep::Peer;
use candle_moe::ep::{Communicator, Environment, Procs, ProcsConfig, launch};
use common::report::{OutputFormat, Verdict, finish, print, print_json};
use common::{processes, progress};
use measure::measure;
use measurement::Measurement;
use report::Report;
use settings::Settings;
use std::process::ExitCode;
use std::time::Duration;

/// Ranks wait for each other no longer than this.
const DEADLINE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    finish(run(&Arguments::read()))
}

fn run(arguments: &Arguments) -> Result<Verdict> {
    let launched = launched(arguments)?;
    let settings = arguments.settings(launched.as_ref().map(|environment| environment.world_size))?;
    let backends = arguments.backends(&settings, launched.is_some())?;
    if let Some(environment) = launched {
        return take_part(&environment, arguments, &settings, &backends);
    }
    let mut measurements = Vec::new();
    for transport in Transport::ALL {
        let of_transport: Vec<_> = backends.iter().filter(|backend| backend.transport == transport).cloned().collect();
        if !of_transport.is_empty() {
            measurements.extend(match transport {
                Transport::Threads => with_threads(&settings, &of_transport)?,
                Transport::Procs => with_processes(&settings, &of_transport)?,
                Transport::Nccl => with_devices(&settings, &of_transport)?,
                Transport::Peer => with_peers(&settings, &of_transport)?,
            });
        }
    }
    report(arguments, &settings, &backends, measurements)
}

/// The rank that a launcher wants this process to be; `None` if it is to have all ranks itself, or to start them.
fn launched(arguments: &Arguments) -> Result<Option<Environment>> {
    let names = |transport| arguments.wishes().is_some_and(|wishes| wishes.name(transport));
    let in_one_process = names(Transport::Threads) || names(Transport::Peer);
    if in_one_process && !names(Transport::Procs) && !names(Transport::Nccl) {
        return Ok(None);
    }
    let environment = processes::launched("or use --backend threads")?;
    // A launcher that started one process leaves it to this one what its ranks are.
    Ok(environment.filter(|environment| environment.world_size > 1 || names(Transport::Procs)))
}

/// Becomes the rank that a launcher wants this process to be. Only rank 0 reports.
fn take_part(
    environment: &Environment,
    arguments: &Arguments,
    settings: &Settings,
    backends: &[Backend],
) -> Result<Verdict> {
    let ranks = Procs::join(ProcsConfig::from(environment), DEADLINE)?;
    let measurements = match backends.iter().any(|backend| backend.transport == Transport::Nccl) {
        true => with_device(ranks, environment.local_rank, settings, backends)?,
        false => measure_with_progress(&mut { ranks }, &Device::Cpu, settings, backends)?,
    };
    if environment.rank > 0 {
        return Ok(Verdict::Passed);
    }
    if arguments.measure_for_report.is_some() {
        print_json(&measurements)?;
        return Ok(Verdict::Passed);
    }
    report(arguments, settings, backends, measurements)
}

/// All ranks as threads of this process.
fn with_threads(settings: &Settings, backends: &[Backend]) -> Result<Vec<Measurement>> {
    let ranks = launch(settings.ep_size, DEADLINE, |mut ranks| {
        measure_with_progress(&mut ranks, &Device::Cpu, settings, backends)
    })?;
    of_rank_0(ranks)
}

/// All ranks as threads of this process, with a CUDA device each.
#[cfg(feature = "nccl")]
fn with_devices(settings: &Settings, backends: &[Backend]) -> Result<Vec<Measurement>> {
    let ranks = launch(settings.ep_size, DEADLINE, |threads| {
        let device = Device::new_cuda(threads.rank())?;
        let mut ranks = Nccl::over_threads(threads, &device)?;
        measure_with_progress(&mut ranks, &device, settings, backends)
    })?;
    of_rank_0(ranks)
}

/// The rank that a launcher made of this process, with the CUDA device of its number on this machine.
#[cfg(feature = "nccl")]
fn with_device(ranks: Procs, local_rank: usize, settings: &Settings, backends: &[Backend]) -> Result<Vec<Measurement>> {
    let device = Device::new_cuda(local_rank)?;
    let mut ranks = Nccl::over_procs(ranks, &device)?;
    measure_with_progress(&mut ranks, &device, settings, backends)
}

/// All ranks as threads of this process, with a CUDA device each that reaches the memory of the others.
#[cfg(feature = "cuda")]
fn with_peers(settings: &Settings, backends: &[Backend]) -> Result<Vec<Measurement>> {
    let ranks = launch(settings.ep_size, DEADLINE, |threads| {
        let device = Device::new_cuda(threads.rank())?;
        let mut ranks = Peer::over_threads(threads, &device)?;
        measure_with_progress(&mut ranks, &device, settings, backends)
    })?;
    of_rank_0(ranks)
}

#[cfg(not(feature = "nccl"))]
fn with_devices(_: &Settings, _: &[Backend]) -> Result<Vec<Measurement>> {
    bail!("expected a program built with --features nccl")
}

#[cfg(not(feature = "nccl"))]
fn with_device(_: Procs, _: usize, _: &Settings, _: &[Backend]) -> Result<Vec<Measurement>> {
    bail!("expected a program built with --features nccl")
}

#[cfg(not(feature = "cuda"))]
fn with_peers(_: &Settings, _: &[Backend]) -> Result<Vec<Measurement>> {
    bail!("expected a program built with --features cuda")
}

/// What all ranks measured, which is the same on each.
fn of_rank_0(ranks: Vec<Result<Result<Vec<Measurement>>, String>>) -> Result<Vec<Measurement>> {
    let measurements = ranks.into_iter().map(|rank| rank.map_err(|panic| anyhow!(panic))?);
    measurements.collect::<Result<Vec<_>>>()?.into_iter().next().context("no rank")
}

/// All ranks as processes of this program.
fn with_processes(settings: &Settings, backends: &[Backend]) -> Result<Vec<Measurement>> {
    let stdout = processes::stdout_of(settings.ep_size, &Arguments::for_ranks(backends))?;
    serde_json::from_slice(&stdout).context("rank 0 did not print what it measured")
}

/// One rank's part; rank 0 shows where it is.
fn measure_with_progress(
    communicator: &mut dyn Communicator,
    device: &Device,
    settings: &Settings,
    backends: &[Backend],
) -> Result<Vec<Measurement>> {
    if communicator.rank() > 0 {
        return measure(communicator, device, settings, backends, &|_, _| ());
    }
    let bar = progress::bar(backends.len() * settings.local_batch_sizes.len());
    let measurements = measure(communicator, device, settings, backends, &|title, done| {
        bar.set_position(done as u64);
        bar.set_message(title);
    });
    bar.finish_and_clear();
    measurements
}

fn report(
    arguments: &Arguments,
    settings: &Settings,
    backends: &[Backend],
    measurements: Vec<Measurement>,
) -> Result<Verdict> {
    let report = Report::new(settings, backends, arguments.iter_stats, measurements);
    if let Some(file) = &arguments.output_file {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(file, json + "\n")
            .with_context(|| format!("cannot write {}; choose another --output-file", file.display()))?;
    }
    if let Some(file) = &arguments.html {
        html::write(file, &report)?;
    }
    match arguments.output {
        OutputFormat::Json => print_json(&report)?,
        OutputFormat::Table => print(report.text(arguments.iter_stats))?,
    }
    Ok(if report.passed() { Verdict::Passed } else { Verdict::Failed })
}
