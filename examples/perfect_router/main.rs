//! Shows the plan of the perfect router: who gets what, how balanced it is, and that routing follows it.
//!
//! ```text
//! cargo run --release --example perfect_router -- --num-experts 256 --top-k 8 --ep-size 8 --num-tokens 128 \
//!     --method DeepSeekV3 --html plan.html
//! ```
//!
//! The check routes the planned logits with the routing method in f32, f16 and bf16 and compares the chosen experts, as
//! sets, with the plan, and the plan with what it promises; the program ends with exit code 1 if something differs.

// Each example uses its part of what they share.
mod arguments;
mod check;
#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;
mod html;
mod report;
mod senders;

use anyhow::Result;
use arguments::Arguments;
use clap::Parser;
use common::report::{OutputFormat, Verdict, finish, print, print_json};
use report::Report;
use std::process::ExitCode;

fn main() -> ExitCode {
    finish(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<Verdict> {
    let senders = arguments.senders()?;
    let report = Report::new(arguments, &senders)?;
    if let Some(file) = &arguments.html {
        html::write(file, &report, &senders)?;
    }
    match arguments.output {
        OutputFormat::Json => print_json(&report)?,
        OutputFormat::Table => print(report.text())?,
    }
    Ok(if report.check.passed { Verdict::Passed } else { Verdict::Failed })
}
