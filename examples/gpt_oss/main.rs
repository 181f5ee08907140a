//! Generates with a GPT-OSS checkpoint through expert-parallel MoE blocks, and shows who did how much work under learned
//! and under perfect routing.

#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "each example uses its part")]
mod common;

mod arguments;
mod dump;
mod processes;
mod report;
mod run;
mod text;

use anyhow::Result;
use arguments::{Arguments, LaunchName, Plan};
use candle_moe::ep::{Communicator, Environment};
use candle_moe::models::gpt_oss::{Config, Model, MoeOptions};
use clap::Parser;
use common::progress;
use common::report::{BadArguments, Verdict, finish};
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
    let plan = arguments.plan(&config, &text, launched.as_ref().map(|environment| environment.world_size))?;
    match (launched, arguments.launch) {
        (Some(environment), _) => take_part(&environment, arguments, &config, &text, &plan),
        (None, Some(LaunchName::Procs)) => {
            common::processes::run(plan.options.ep_size)?;
            Ok(Verdict::Passed)
        }
        (None, _) => generate(None, arguments, &config, &text, &plan),
    }
}

/// Becomes the rank that a launcher wants this process to be. Only rank 0 reports.
fn take_part(
    environment: &Environment,
    arguments: &Arguments,
    config: &Config,
    text: &Text,
    plan: &Plan,
) -> Result<Verdict> {
    let mut ranks = processes::join(environment, &plan.options)?;
    if ranks.rank() == 0 {
        return generate(Some(Box::new(ranks)), arguments, config, text, plan);
    }
    processes::serve(&arguments.model, config, &plan.options, &mut ranks)?;
    Ok(Verdict::Passed)
}

/// Rank 0: with the other processes of `ranks`, or with threads.
fn generate(
    ranks: Option<Box<dyn Communicator>>,
    arguments: &Arguments,
    config: &Config,
    text: &Text,
    plan: &Plan,
) -> Result<Verdict> {
    let started = Instant::now();
    let launch = if ranks.is_some() { LaunchName::Procs } else { LaunchName::Threads };
    let mut model = load(arguments, &plan.options, ranks)?;
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
        (Some(learned), Some(num_physical)) => Some(run_placed(arguments, plan, learned, num_physical)?),
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

/// The model as rank 0 of `ranks`, or with ranks that are threads.
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
fn run_placed(arguments: &Arguments, plan: &Plan, learned: &Generation, num_physical: usize) -> Result<Vec<Placed>> {
    let layers = learned.rebalanced(plan.options.ep_size, num_physical)?;
    let placements = layers.iter().map(|layer| layer.placement.clone()).collect();
    let options = MoeOptions { placements: Some(placements), perfect_router: false, ..plan.options.clone() };
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
