//! The MoE layers: read for one rank, and run by all ranks: threads of a process, processes, or devices of either.

use super::Config;
use super::layout::{ExpertRole, LayerRole};
use super::weights::Weights;
use crate::block::{Load, MoeBlock, MoeOutput};
use crate::checkpoint::Checkpoint;
use crate::ep::{Choice, Communicator, Step, Threads};
use crate::experts::{Activation, Experts, GateUpRows, MXFP4_BLOCK};
use crate::models::MoeOptions;
use crate::routing::{Router, RoutingMethod};
use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;
use std::fmt;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

const OP: &str = "gpt-oss moe";

/// What stands where the MoE layers of a [`Decoder`](super::Decoder) would.
pub trait MoeLayers {
    /// A forward pass of `num_tokens` tokens begins; the first stands at position `first_token` of its sequence.
    ///
    /// # Errors
    /// Whatever keeps the layers from running.
    fn begin(&mut self, first_token: usize, num_tokens: usize) -> Result<()>;

    /// The MoE layer number `layer`: `hidden [num_tokens, hidden_size]` to the same shape and dtype.
    ///
    /// # Errors
    /// Whatever went wrong in the layer.
    fn forward(&mut self, layer: usize, hidden: &Tensor) -> Result<Tensor>;

    /// The forward pass ends: all of its work has been given to the device, and what comes of it is about to be used.
    ///
    /// # Errors
    /// Work of the layers that did not end.
    fn end(&mut self) -> Result<()>;
}

/// Reads the MoE layer `layer` for rank `ep_rank`: the gate, and the bytes of this rank's experts only.
///
/// It is read on the host and then brought to `options.device`; the host's copy is gone when this returns.
///
/// # Errors
/// Tensors of two layouts or of none; missing or unfit tensors; sizes that MXFP4 cannot have.
pub fn load_moe_block(
    checkpoint: &Checkpoint,
    config: &Config,
    layer: usize,
    options: &MoeOptions,
    ep_rank: usize,
) -> Result<MoeBlock> {
    RankSource { checkpoint, config, options, ep_rank }.read(layer)?.to_device(&options.device)
}

/// Where a rank's layers come from.
#[derive(Clone, Copy)]
struct RankSource<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Config,
    options: &'a MoeOptions,
    ep_rank: usize,
}

impl RankSource<'_> {
    /// A layer, on the host.
    fn read(self, layer: usize) -> Result<MoeBlock> {
        let Self { checkpoint, config, options, ep_rank } = self;
        config.validate()?;
        let weights = Weights::new(checkpoint, config, &Device::Cpu)?;
        let (hidden_size, intermediate_size) = (config.hidden_size, config.intermediate_size);
        for (name, size) in [("hidden_size", hidden_size), ("intermediate_size", intermediate_size)] {
            if weights.is_mxfp4() && !size.is_multiple_of(MXFP4_BLOCK) {
                bail!("{OP}: {name} is {size}, expected a multiple of {MXFP4_BLOCK} for MXFP4 weights")
            }
        }
        let placement = options.placement(layer, config.num_experts, ep_rank)?;
        let held = placement.experts_of(ep_rank)?;
        let projection = |role: ExpertRole, out_features: usize, in_features: usize| {
            weights.experts(layer, role, held, out_features, in_features)
        };
        let activation = Activation::SwigluOss { alpha: config.swiglu_alpha as f32, limit: config.swiglu_limit as f32 };
        let experts = Experts::new(
            projection(ExpertRole::GateUp, 2 * intermediate_size, hidden_size)?,
            projection(ExpertRole::Down, hidden_size, intermediate_size)?,
            GateUpRows::Interleaved,
            activation,
        )?;
        let gate = weights.linear(layer, LayerRole::Gate, config.num_experts, hidden_size)?;
        let router = Router::new(RoutingMethod::Renormalize, config.top_k)?;
        MoeBlock::builder(gate, router, experts)
            .label(format!("layer {layer}"))
            .placement(placement, ep_rank)
            .strategy(options.strategy)
            .reduction(options.reduction)
            .perfect_router(options.perfect_router)
            .statistics(true)
            .build()
    }

    /// All layers. Where they go to another device, a layer is read while the one before it is on its way there: two layers
    /// are on the host at most, and nothing else of them on the device than what stays.
    fn load(self, progress: &(dyn Fn() + Sync)) -> Result<Vec<MoeBlock>> {
        let (num_layers, device) = (self.config.num_layers, &self.options.device);
        let read = move |layer| self.read(layer);
        let bring = |block: Result<MoeBlock>| {
            let block = block?.to_device(device)?;
            progress();
            Ok(block)
        };
        if device.is_cpu() {
            return (0..num_layers).map(read).map(bring).collect();
        }
        std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(0);
            scope.spawn(move || (0..num_layers).map(read).all(|block| sender.send(block).is_ok()));
            receiver.into_iter().map(bring).collect()
        })
    }
}

/// The MoE layers of all ranks.
///
/// The caller's thread is rank 0 and holds the sequence; every other rank is a thread of its own, or whoever
/// [serves](serve), and takes part in each step with zero tokens of its own.
pub struct ShardedMoe {
    home: Vec<MoeBlock>,
    communicator: Box<dyn Communicator>,
    step: Option<Step>,
    others: Others,
}

/// How the other ranks hear what to do.
#[derive(Debug)]
enum Others {
    Threads(Vec<Worker>),
    /// They [serve], and hear it through the communicator.
    Serving,
}

#[derive(Debug)]
struct Worker {
    commands: Sender<Command>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Clone, Copy)]
enum Command {
    Step,
    PerfectRouter(bool),
    End,
}

impl Command {
    const CODES: [Self; 4] = [Self::Step, Self::PerfectRouter(false), Self::PerfectRouter(true), Self::End];

    fn code(self) -> u8 {
        match self {
            Self::Step => 0,
            Self::PerfectRouter(enabled) => 1 + u8::from(enabled),
            Self::End => 3,
        }
    }

    /// Tells all ranks, which [hear](Self::hear) it.
    fn tell(self, communicator: &mut dyn Communicator) -> Result<()> {
        communicator.set_label("command");
        communicator.all_gather_bytes(&[self.code()])?;
        Ok(())
    }

    /// Waits for what rank 0 tells, for as long as it has nothing to tell.
    fn hear(communicator: &mut dyn Communicator) -> Result<Self> {
        communicator.set_label("command");
        let deadline = communicator.deadline();
        communicator.set_deadline(Duration::MAX);
        let told = communicator.all_gather_bytes(&[])?;
        communicator.set_deadline(deadline);
        match told.first().map(Vec::as_slice) {
            Some(&[code]) if usize::from(code) < Self::CODES.len() => Ok(Self::CODES[usize::from(code)]),
            other => bail!("{OP}: rank 0 told {other:?}, expected a command; run the same program on all ranks"),
        }
    }
}

impl ShardedMoe {
    /// Reads every rank's experts, several ranks at a time and layer by layer, starts the ranks, and lets them
    /// [agree](MoeBlock::agree). `progress` hears of every layer of every rank, from any thread.
    ///
    /// # Errors
    /// As [`load_moe_block`] and [`MoeBlock::agree`]; more ranks than experts; several ranks on CUDA, which
    /// [join](Self::join) and [serve] with a device each.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &Config,
        options: &MoeOptions,
        progress: &(dyn Fn() + Sync),
    ) -> Result<Self> {
        options.placement(0, config.num_experts, 0)?;
        if options.ep_size > 1 && !options.device.is_cpu() {
            bail!(
                "{OP}: ep_size is {} on {:?}, expected 1: give each rank a device and a communicator for it, join as rank 0 and serve \
                 as the others",
                options.ep_size,
                options.device.location()
            )
        }
        let load = |ep_rank| RankSource { checkpoint, config, options, ep_rank }.load(progress);
        // One rank is loaded by the thread that will run it, on whose stream its weights then come.
        let ranks: Vec<_> = match options.ep_size {
            1 => vec![load(0)?],
            ep_size => (0..ep_size).into_par_iter().map(load).collect::<Result<_>>()?,
        };
        let mut ranks = ranks.into_iter().zip(Threads::group(options.ep_size, options.deadline)?);
        let Some((home, communicator)) = ranks.next() else { bail!("{OP}: ep_size is 0, expected at least 1") };
        let empty = Tensor::zeros((0, config.hidden_size), options.dtype, &Device::Cpu)?;
        let mut workers = Vec::new();
        for (blocks, communicator) in ranks {
            let (commands, receiver) = channel();
            let empty = empty.clone();
            let thread = std::thread::Builder::new()
                .name(format!("rank {}", communicator.rank()))
                .spawn(move || work(blocks, communicator, &empty, &receiver))?;
            workers.push(Worker { commands, thread });
        }
        let mut sharded =
            Self { home, communicator: Box::new(communicator), step: None, others: Others::Threads(workers) };
        agree(&sharded.home, sharded.communicator.as_mut())?;
        Ok(sharded)
    }

    /// Reads the experts of rank 0 and becomes it, where every other rank of `communicator` [serves](serve). Returns when all
    /// have read theirs and [agree](MoeBlock::agree); from then on [`Deadlines::serving`](crate::ep::Deadlines::serving) counts.
    /// `progress` hears of every layer.
    ///
    /// # Errors
    /// As [`load_moe_block`] and [`MoeBlock::agree`]; a communicator of another rank or size; failures of other ranks.
    pub fn join(
        checkpoint: &Checkpoint,
        config: &Config,
        options: &MoeOptions,
        mut communicator: Box<dyn Communicator>,
        progress: &(dyn Fn() + Sync),
    ) -> Result<Self> {
        if communicator.rank() != 0 {
            bail!("{OP}: join as rank {}, expected rank 0; the others serve", communicator.rank())
        }
        let home = read_and_meet(checkpoint, config, options, communicator.as_mut(), progress)?;
        Ok(Self { home, communicator, step: None, others: Others::Serving })
    }

    /// Switches every rank between learned and balanced routing. **Balanced routing makes the output meaningless.**
    ///
    /// # Errors
    /// None for balanced routing among threads of the host; otherwise a failed group.
    pub fn set_perfect_router(&mut self, enabled: bool) -> Result<()> {
        self.home.iter_mut().try_for_each(|block| block.set_perfect_router(enabled))?;
        self.command(Command::PerfectRouter(enabled))
    }

    /// The layer, with what it computed on the way.
    ///
    /// # Errors
    /// As [`MoeBlock::forward`]; no step has [begun](MoeLayers::begin).
    pub fn forward_traced(&mut self, layer: usize, hidden: &Tensor) -> Result<MoeOutput> {
        let Some(step) = &self.step else { bail!("{OP}: forward before begin") };
        let Some(block) = self.home.get(layer) else {
            bail!("{OP}: layer is {layer}, expected less than {}", self.home.len())
        };
        block.forward_traced(hidden, self.communicator.as_mut(), step)
    }

    /// How the ranks of a layer share its work, and why; `None` if there is no such layer.
    pub fn strategy(&self, layer: usize) -> Option<&Choice> {
        self.home.get(layer).map(MoeBlock::strategy)
    }

    /// Bytes of the experts' weights, over all layers and ranks, biases included.
    pub fn expert_bytes(&self) -> usize {
        let of_layer = |block: &MoeBlock| block.placement().num_physical() * block.experts().bytes_per_expert();
        self.home.iter().map(of_layer).sum()
    }

    /// The load of every layer, over all ranks, since the start or [`reset_load`](Self::reset_load).
    ///
    /// # Errors
    /// A device that cannot be read.
    pub fn load_per_layer(&self) -> Result<Vec<Load>> {
        self.home.iter().map(MoeBlock::load).collect()
    }

    /// Starts counting anew.
    ///
    /// # Errors
    /// A device that cannot be written.
    pub fn reset_load(&self) -> Result<()> {
        self.home.iter().try_for_each(MoeBlock::reset_load)
    }

    /// Gives up: every rank's current and later calls fail with `reason`.
    pub fn abort(&self, reason: &str) {
        self.communicator.abort_handle().abort(reason);
    }

    fn command(&mut self, command: Command) -> Result<()> {
        match &self.others {
            Others::Threads(workers) => {
                for worker in workers {
                    // A rank that is gone is found by the next collective, which names it.
                    let _ = worker.commands.send(command);
                }
                Ok(())
            }
            Others::Serving => command.tell(self.communicator.as_mut()),
        }
    }
}

impl MoeLayers for ShardedMoe {
    fn begin(&mut self, first_token: usize, num_tokens: usize) -> Result<()> {
        self.command(Command::Step)?;
        self.communicator.set_label("step");
        self.step = Some(Step::agree(self.communicator.as_mut(), num_tokens)?.starting_at(first_token));
        Ok(())
    }

    fn forward(&mut self, layer: usize, hidden: &Tensor) -> Result<Tensor> {
        self.forward_traced(layer, hidden).map(|output| output.hidden)
    }

    /// Waits until the step has really happened where ranks are devices, whose work is given up when it does not end in time.
    fn end(&mut self) -> Result<()> {
        Ok(self.communicator.settle()?)
    }
}

impl Drop for ShardedMoe {
    fn drop(&mut self) {
        // In a group that has failed nobody waits for a command.
        let _ = self.command(Command::End);
        let Others::Threads(workers) = &mut self.others else { return };
        let workers = std::mem::take(workers);
        self.abort("the model was dropped");
        for Worker { commands, thread } in workers {
            drop(commands);
            // A panic of that thread was reported to the group when it happened.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for ShardedMoe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardedMoe")
            .field("home", &self.home)
            .field("health", &self.communicator.health())
            .field("step", &self.step)
            .field("others", &self.others)
            .finish()
    }
}

/// The life of a rank other than 0 that is a process, or a thread with a device of its own: reads this rank's experts, takes
/// part in the steps of the [`ShardedMoe`] that rank 0 [joined](ShardedMoe::join), and returns when that one is dropped.
/// `progress` hears of every layer.
///
/// # Errors
/// As [`load_moe_block`] and [`MoeBlock::agree`]; a communicator of another rank or size; failures of other ranks.
pub fn serve(
    checkpoint: &Checkpoint,
    config: &Config,
    options: &MoeOptions,
    communicator: &mut dyn Communicator,
    progress: &(dyn Fn() + Sync),
) -> Result<()> {
    if communicator.rank() == 0 {
        bail!("{OP}: serve as rank 0, expected another; rank 0 joins")
    }
    let mut blocks = read_and_meet(checkpoint, config, options, communicator, progress)?;
    // Candle allocates nothing for no elements on CUDA.
    let empty = Tensor::zeros((1, config.hidden_size), options.dtype, &options.device)?.narrow(0, 0, 0)?;
    loop {
        match Command::hear(communicator)? {
            Command::End => return Ok(()),
            command => obey(command, &mut blocks, communicator, &empty)?,
        }
    }
}

/// Reads the experts of this rank of a group that joins and serves, and waits until all have, with the same settings.
fn read_and_meet(
    checkpoint: &Checkpoint,
    config: &Config,
    options: &MoeOptions,
    communicator: &mut dyn Communicator,
    progress: &(dyn Fn() + Sync),
) -> Result<Vec<MoeBlock>> {
    let world_size = communicator.world_size();
    if world_size != options.ep_size {
        bail!("{OP}: the communicator has {world_size} ranks, expected ep_size = {}", options.ep_size)
    }
    let blocks = RankSource { checkpoint, config, options, ep_rank: communicator.rank() }.load(progress)?;
    agree(&blocks, communicator)?;
    communicator.barrier()?;
    communicator.start_serving();
    Ok(blocks)
}

/// The ranks compare their settings.
fn agree(blocks: &[MoeBlock], communicator: &mut dyn Communicator) -> Result<()> {
    communicator.set_label("start");
    MoeBlock::agree(blocks, communicator)
}

/// The life of a rank other than 0. Errors end it; the group hears of them.
fn work(mut blocks: Vec<MoeBlock>, mut communicator: Threads, empty: &Tensor, commands: &Receiver<Command>) {
    if let Err(error) = agree(&blocks, &mut communicator) {
        tracing::debug!(rank = communicator.rank(), %error, "rank ends at the start");
        return;
    }
    while let Ok(command) = commands.recv() {
        if let Err(error) = obey(command, &mut blocks, &mut communicator, empty) {
            tracing::debug!(rank = communicator.rank(), %error, "rank ends");
            return;
        }
    }
}

/// What a rank other than 0 does at a command. After the last one comes nothing.
fn obey(command: Command, blocks: &mut [MoeBlock], communicator: &mut dyn Communicator, empty: &Tensor) -> Result<()> {
    match command {
        Command::PerfectRouter(enabled) => blocks.iter_mut().try_for_each(|block| block.set_perfect_router(enabled)),
        Command::Step => run_step(blocks, communicator, empty),
        Command::End => Ok(()),
    }
}

fn run_step(blocks: &[MoeBlock], communicator: &mut dyn Communicator, empty: &Tensor) -> Result<()> {
    communicator.set_label("step");
    let step = Step::agree(communicator, 0)?;
    blocks.iter().try_for_each(|block| block.forward(empty, communicator, &step).map(drop))?;
    // Before this rank waits for the next command, for which there is no deadline.
    Ok(communicator.settle()?)
}
