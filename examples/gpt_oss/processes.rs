//! Ranks as processes.

use crate::arguments::{Arguments, LaunchName};
use crate::common::processes;
use anyhow::Result;
use candle_moe::checkpoint::Checkpoint;
use candle_moe::ep::{Communicator, Deadlines, Environment, Procs, ProcsConfig};
use candle_moe::models::gpt_oss::{self, Config, MoeOptions};
use std::path::Path;
use std::time::Duration;

/// For the rendezvous, and for reading a checkpoint that another rank may have read already.
const WARM_UP: Duration = Duration::from_secs(600);

/// The rank that a launcher wants this process to be; `None` if it is to have all ranks itself, or to start them.
pub(crate) fn launched(arguments: &Arguments) -> Result<Option<Environment>> {
    if arguments.launch == Some(LaunchName::Threads) {
        return Ok(None);
    }
    let environment = processes::launched("or use --launch threads")?;
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
