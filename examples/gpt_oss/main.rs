//! Generates with a GPT-OSS checkpoint through expert-parallel MoE blocks, and shows who did how much work under learned
//! and under perfect routing.

#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "each example uses its part")]
mod common;

mod arguments;
mod devices;
mod dump;
mod processes;
mod report;
mod run;
mod text;

use anyhow::Result;
use arguments::{Arguments, LaunchName, Plan};
use candle_core::Device;
use candle_moe::checkpoint::Checkpoint;
use candle_moe::ep::{Communicator, Environment};
use candle_moe::models::gpt_oss::{self, Config, Model, MoeOptions};
use clap::Parser;
use common::progress;
use common::report::{BadArguments, Verdict, finish};
use devices::{Place, Rank};
use report::{Placed, Report};
use run::Generation;
use std::process::ExitCode;
use std::time::Instant;
use text::Text;

fn main() -> ExitCode {
    finish(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<Verdict> {
    let launched = processes::launched(arguments)?;
    let config = read_config(arguments)?;
    let text = Text::for_model(&arguments.model, &config)?;
    let plan = arguments.plan(&config, &text, launched.as_ref())?;
    let task = Task { arguments, config: &config, text: &text, plan: &plan };
    match (launched, arguments.launch) {
        (Some(environment), _) => task.take_part(&environment),
        (None, Some(LaunchName::Procs)) => {
            common::processes::run(plan.options.ep_size)?;
            Ok(Verdict::Passed)
        }
        (None, _) if arguments.device != Place::Cpu && plan.options.ep_size > 1 => task.with_devices(),
        (None, _) => task.generate(&arguments.device.open(0)?, LaunchName::Threads, None),
    }
}

/// What is to be generated, and with which model.
#[derive(Clone, Copy)]
struct Task<'a> {
    arguments: &'a Arguments,
    config: &'a Config,
    text: &'a Text,
    plan: &'a Plan,
}

impl Task<'_> {
    /// Becomes the rank that a launcher wants this process to be. Only rank 0 reports.
    fn take_part(self, environment: &Environment) -> Result<Verdict> {
        let device = self.arguments.device.open(environment.local_rank)?;
        let rank = Rank::of_procs(processes::join(environment, self.plan.deadlines())?, device)?;
        if rank.communicator.rank() == 0 {
            return self.generate(&rank.device, LaunchName::Procs, Some(rank.communicator));
        }
        self.serve(rank)?;
        Ok(Verdict::Passed)
    }

    /// All ranks are threads of this process, with a device each.
    fn with_devices(self) -> Result<Verdict> {
        let first = |rank: Rank| self.generate(&rank.device, LaunchName::Threads, Some(rank.communicator));
        let (place, ep_size) = (self.arguments.device, self.plan.options.ep_size);
        devices::with_threads((place, self.plan.options.strategy), ep_size, self.plan.deadlines(), first, |rank| {
            self.serve(rank)
        })
    }

    /// The life of a rank other than 0.
    fn serve(self, Rank { mut communicator, device }: Rank) -> Result<()> {
        let checkpoint = Checkpoint::open(&self.arguments.model)?;
        let options = self.plan.options_on(&device);
        Ok(gpt_oss::serve(&checkpoint, self.config, &options, communicator.as_mut(), &|| ())?)
    }

    /// Rank 0 on `device`: of `ranks`, where the others serve, or with threads on the same device.
    fn generate(self, device: &Device, launch: LaunchName, ranks: Option<Box<dyn Communicator>>) -> Result<Verdict> {
        let Self { arguments, config, text, plan } = self;
        let started = Instant::now();
        let options = plan.options_on(device);
        let mut model = load(arguments, &options, ranks)?;
        let load_seconds = started.elapsed().as_secs_f64();

        let expert_bytes = model.moe().expert_bytes();

        let main = Generation::run(&mut model, plan, arguments.dump.as_deref())?;
        let comparison = match arguments.no_comparison {
            true => None,
            false => Some(main.repeat(&mut model, plan, !main.perfect_router)?),
        };
        let strategy = model.moe().strategy(0).map_or_else(String::new, |choice| choice.strategy().to_string());
        drop(model);
        let learned = [Some(&main), comparison.as_ref()].into_iter().flatten().find(|run| !run.perfect_router);
        let placed = match (learned, arguments.physical_experts) {
            (Some(learned), Some(num_physical)) => Some(run_placed(arguments, &options, plan, learned, num_physical)?),
            _ => None,
        };
        let report = Report {
            arguments,
            launch,
            plan,
            config,
            text,
            load_seconds,
            expert_bytes,
            strategy,
            main,
            comparison,
            placed,
        };
        report.print()?;
        Ok(Verdict::Passed)
    }
}

/// The model as rank 0 of `ranks`, or with ranks that are threads of the host.
fn load(arguments: &Arguments, options: &MoeOptions, ranks: Option<Box<dyn Communicator>>) -> Result<Model> {
    let bar = progress::bar(0);
    let progress = |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message("reading the checkpoint");
    };
    let model = match ranks {
        Some(ranks) => Model::join(&arguments.model, options, ranks, &progress),
        None => Model::load(&arguments.model, options, &progress),
    };
    bar.finish_and_clear();
    Ok(model?)
}

/// What the learned run would have been with its experts placed by its load.
fn run_placed(
    arguments: &Arguments,
    options: &MoeOptions,
    plan: &Plan,
    learned: &Generation,
    num_physical: usize,
) -> Result<Vec<Placed>> {
    let layers = learned.rebalanced(options.ep_size, num_physical)?;
    let placements = layers.iter().map(|layer| layer.placement.clone()).collect();
    let options = MoeOptions { placements: Some(placements), perfect_router: false, ..options.clone() };
    let again = learned.repeat(&mut load(arguments, &options, None)?, plan, false)?;
    Ok(Placed::layers(layers, &again))
}

fn read_config(arguments: &Arguments) -> Result<Config> {
    let file = arguments.model.join("config.json");
    if !file.is_file() {
        let model = arguments.model.display();
        let advice = "expected a folder with config.json and safetensors files; give one with --model DIR";
        return Err(BadArguments(format!("--model {model}: no config.json there; {advice}")).into());
    }
    Ok(Config::from_file(file)?)
}
