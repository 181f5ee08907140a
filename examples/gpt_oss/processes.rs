//! Ranks as processes.

use crate::arguments::{Arguments, LaunchName};
use crate::common::processes;
use anyhow::Result;
use candle_moe::ep::{Deadlines, Environment, Procs, ProcsConfig};

/// The rank that a launcher wants this process to be; `None` if it is to have all ranks itself, or to start them.
pub(crate) fn launched(arguments: &Arguments) -> Result<Option<Environment>> {
    if arguments.launch == Some(LaunchName::Threads) {
        return Ok(None);
    }
    let environment = processes::launched("or use --launch threads")?;
    // A launcher that started one process leaves it to this one what its ranks are.
    Ok(environment.filter(|environment| environment.world_size > 1 || arguments.launch.is_some()))
}

pub(crate) fn join(environment: &Environment, deadlines: Deadlines) -> Result<Procs> {
    Ok(Procs::join(ProcsConfig::from(environment), deadlines)?)
}
