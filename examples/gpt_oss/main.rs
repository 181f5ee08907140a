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
use arguments::Arguments;
use candle_moe::models::gpt_oss::{Config, Model};
use clap::Parser;
use common::progress;
use common::report::{BadArguments, Verdict, finish};
use report::Report;
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
    let bar = progress::bar(0);
    let model = Model::load(&arguments.model, &plan.options, &|done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message("reading the checkpoint");
    });
    bar.finish_and_clear();
    let mut model = model?;
    let load_seconds = started.elapsed().as_secs_f64();

    let expert_bytes = model.moe().expert_bytes();

    let main = Generation::run(&mut model, &plan, arguments.dump.as_deref())?;
    let comparison = match arguments.no_comparison {
        true => None,
        false => Some(main.repeat_with_other_routing(&mut model, &plan)?),
    };
    let report =
        Report { arguments, plan: &plan, config: &config, text: &text, load_seconds, expert_bytes, main, comparison };
    report.print()?;
    Ok(Verdict::Passed)
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
