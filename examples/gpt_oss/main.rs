//! Generates with a GPT-OSS checkpoint through expert-parallel MoE blocks, and shows who did how much work under learned
//! and under perfect routing.

#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "each example uses its part")]
mod common;

mod arguments;
mod dump;
mod report;
mod run;
mod text;

use anyhow::Result;
use arguments::{Arguments, Plan};
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
    finish(generate(&Arguments::parse()))
}

fn generate(arguments: &Arguments) -> Result<Verdict> {
    let config = read_config(arguments)?;
    let text = Text::for_model(&arguments.model, &config)?;
    let plan = arguments.plan(&config, &text)?;

    let started = Instant::now();
    let mut model = load(arguments, &plan.options)?;
    let load_seconds = started.elapsed().as_secs_f64();

    let expert_bytes = model.moe().expert_bytes();

    let main = Generation::run(&mut model, &plan, arguments.dump.as_deref())?;
    let comparison = match arguments.no_comparison {
        true => None,
        false => Some(main.repeat(&mut model, &plan, !main.perfect_router)?),
    };
    let strategy = model.moe().strategy(0).map_or_else(String::new, |choice| choice.strategy().to_string());
    drop(model);
    let learned = [Some(&main), comparison.as_ref()].into_iter().flatten().find(|run| !run.perfect_router);
    let placed = match (learned, arguments.physical_experts) {
        (Some(learned), Some(num_physical)) => Some(run_placed(arguments, &plan, learned, num_physical)?),
        _ => None,
    };
    let report = Report {
        arguments,
        plan: &plan,
        config: &config,
        text: &text,
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

fn load(arguments: &Arguments, options: &MoeOptions) -> Result<Model> {
    let bar = progress::bar(0);
    let model = Model::load(&arguments.model, options, &|done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message("reading the checkpoint");
    });
    bar.finish_and_clear();
    Ok(model?)
}

/// What the learned run would have been with its experts placed by its load.
fn run_placed(arguments: &Arguments, plan: &Plan, learned: &Generation, num_physical: usize) -> Result<Vec<Placed>> {
    let placements = learned.placements(plan.options.ep_size, num_physical)?;
    let options = MoeOptions { placements: Some(placements.clone()), perfect_router: false, ..plan.options.clone() };
    let again = learned.repeat(&mut load(arguments, &options)?, plan, false)?;
    Placed::layers(learned, &placements, &again)
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
