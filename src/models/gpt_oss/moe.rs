//! The MoE layers: read for one rank, and run by all ranks of a process.

use super::Config;
use super::layout::{ExpertRole, LayerRole};
use super::weights::Weights;
use crate::block::{Load, MoeBlock, MoeOutput, check_ranks};
use crate::checkpoint::Checkpoint;
use crate::ep::{Choice, Communicator, Step, Threads};
use crate::experts::{Activation, Experts, GateUpRows, MXFP4_BLOCK};
use crate::models::MoeOptions;
use crate::routing::{Router, RoutingMethod};
use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::JoinHandle;

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
}

/// Reads the MoE layer `layer` for rank `ep_rank`: the gate, and the bytes of this rank's experts only.
///
/// It is read on the host and then brought to `options.device`; the host's copy is gone when this returns.
///
/// # Errors
/// Tensors of two layouts or of none; missing or unfit tensors; sizes that MXFP4 cannot have; several ranks on CUDA.
pub fn load_moe_block(
    checkpoint: &Checkpoint,
    config: &Config,
    layer: usize,
    options: &MoeOptions,
    ep_rank: usize,
) -> Result<MoeBlock> {
    check_ranks(&options.device, options.ep_size)?;
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

/// The MoE layers of all ranks of one process.
///
/// The caller's thread is rank 0 and holds the sequence; every other rank is a thread of its own, which takes part in each
/// step with zero tokens of its own.
#[derive(Debug)]
pub struct ShardedMoe {
    home: Vec<MoeBlock>,
    communicator: Threads,
    step: Option<Step>,
    workers: Vec<Worker>,
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
}

impl ShardedMoe {
    /// Reads every rank's experts, several ranks at a time and layer by layer, starts the ranks, and lets them
    /// [agree](MoeBlock::agree). `progress` hears of every layer of every rank, from any thread.
    ///
    /// # Errors
    /// As [`load_moe_block`] and [`MoeBlock::agree`]; more ranks than experts.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &Config,
        options: &MoeOptions,
        progress: &(dyn Fn() + Sync),
    ) -> Result<Self> {
        options.placement(0, config.num_experts, 0)?;
        check_ranks(&options.device, options.ep_size)?;
        let load = |ep_rank| RankSource { checkpoint, config, options, ep_rank }.load(progress);
        // One rank is loaded by the thread that will run it, on whose stream its weights then come.
        let ranks: Vec<_> = match options.ep_size {
            1 => vec![load(0)?],
            ep_size => (0..ep_size).into_par_iter().map(load).collect::<Result<_>>()?,
        };
        let mut ranks = ranks.into_iter().zip(Threads::group(options.ep_size, options.deadline)?);
        let Some((home, communicator)) = ranks.next() else { bail!("{OP}: ep_size is 0, expected at least 1") };
        let empty = Tensor::zeros((0, config.hidden_size), options.dtype, &Device::Cpu)?;
        let mut sharded = Self { home, communicator, step: None, workers: Vec::new() };
        for (blocks, communicator) in ranks {
            let (commands, receiver) = channel();
            let empty = empty.clone();
            let thread = std::thread::Builder::new()
                .name(format!("rank {}", communicator.rank()))
                .spawn(move || work(blocks, communicator, &empty, &receiver))?;
            sharded.workers.push(Worker { commands, thread });
        }
        agree(&sharded.home, &mut sharded.communicator)?;
        Ok(sharded)
    }

    /// Switches every rank between learned and balanced routing. **Balanced routing makes the output meaningless.**
    ///
    /// # Errors
    /// None for balanced routing.
    pub fn set_perfect_router(&mut self, enabled: bool) -> Result<()> {
        self.home.iter_mut().try_for_each(|block| block.set_perfect_router(enabled))?;
        self.command(Command::PerfectRouter(enabled));
        Ok(())
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
        self.communicator.set_label(&label(layer));
        block.forward_traced(hidden, &mut self.communicator, step)
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

    /// A rank that is gone is found by the next collective, which names it.
    fn command(&self, command: Command) {
        for worker in &self.workers {
            let _ = worker.commands.send(command);
        }
    }
}

impl MoeLayers for ShardedMoe {
    fn begin(&mut self, first_token: usize, num_tokens: usize) -> Result<()> {
        self.command(Command::Step);
        self.communicator.set_label("step");
        self.step = Some(Step::agree(&mut self.communicator, num_tokens)?.starting_at(first_token));
        Ok(())
    }

    fn forward(&mut self, layer: usize, hidden: &Tensor) -> Result<Tensor> {
        self.forward_traced(layer, hidden).map(|output| output.hidden)
    }
}

impl Drop for ShardedMoe {
    fn drop(&mut self) {
        self.abort("the model was dropped");
        for Worker { commands, thread } in self.workers.drain(..) {
            drop(commands);
            // A panic of that thread was reported to the group when it happened.
            let _ = thread.join();
        }
    }
}

fn label(layer: usize) -> String {
    format!("layer {layer}")
}

fn agree(blocks: &[MoeBlock], communicator: &mut Threads) -> Result<()> {
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
        let outcome = match command {
            Command::PerfectRouter(enabled) => {
                blocks.iter_mut().try_for_each(|block| block.set_perfect_router(enabled))
            }
            Command::Step => run_step(&blocks, &mut communicator, empty),
        };
        if let Err(error) = outcome {
            tracing::debug!(rank = communicator.rank(), %error, "rank ends");
            return;
        }
    }
}

fn run_step(blocks: &[MoeBlock], communicator: &mut Threads, empty: &Tensor) -> Result<()> {
    communicator.set_label("step");
    let step = Step::agree(communicator, 0)?;
    for (layer, block) in blocks.iter().enumerate() {
        communicator.set_label(&label(layer));
        block.forward(empty, communicator, &step)?;
    }
    Ok(())
}
