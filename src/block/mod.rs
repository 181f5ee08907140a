//! The sharded MoE block that ties the rooms together.
//!
//! ```text
//! hidden states -> gate -> router logits -> (perfect router) -> routing -> dispatch -> order -> experts -> combine -> sum
//!        \------------------------------- shared experts -----------------------------------------------------------/
//! ```
//!
//! On CUDA the rooms follow each other on the device (`on_device.rs`).

mod agreement;
mod counter;
#[cfg(feature = "cuda")]
mod cuda;
mod on_device;

use crate::ep::{
    Choice, Communicator, Dispatched, Placement, Problem, Reduction, Sharing, Solo, Step, Strategy, combine, dispatch,
    reason,
};
use crate::experts::{Experts, Linear};
use crate::order::{ExpertMap, ExpertOrder, NO_EXPERT};
use crate::perfect_router::{PerfectRouterConfig, PerfectRouterKey, PerfectRouterStore, Plan};
use crate::routing::{Router, Routing};
use candle_core::{DType, Device, Result, Tensor, bail};
use counter::Counter;

const OP: &str = "moe block";

/// A mixture-of-experts layer of which this rank holds its own experts.
///
/// All ranks together give the result of one rank that holds every expert: within rounding, and with
/// [`Reduction::SlotOrder`] (the default) bit for bit, whatever the [`Placement`] and the [`Strategy`].
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_moe::block::MoeBlock;
/// use candle_moe::experts::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, Linear};
/// use candle_moe::routing::{Router, RoutingMethod};
///
/// let (num_experts, hidden_size, intermediate_size) = (8, 32, 48);
/// let random = |shape: (usize, usize, usize)| Tensor::randn(0f32, 0.1, shape, &Device::Cpu);
/// let gate_up = ExpertWeights::dense(random((num_experts, 2 * intermediate_size, hidden_size))?)?;
/// let down = ExpertWeights::dense(random((num_experts, hidden_size, intermediate_size))?)?;
/// let experts = Experts::new(
///     ExpertProjection::new(gate_up, None)?,
///     ExpertProjection::new(down, None)?,
///     GateUpRows::Concatenated,
///     Activation::Silu,
/// )?;
/// let gate = Linear::new(random((1, num_experts, hidden_size))?.squeeze(0)?, None)?;
/// let router = Router::new(RoutingMethod::Renormalize, 2)?;
/// let block = MoeBlock::builder(gate, router, experts).build()?;
///
/// let hidden = random((1, 5, hidden_size))?.squeeze(0)?;
/// assert_eq!(block.forward_alone(&hidden)?.dims(), [5, hidden_size]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct MoeBlock {
    label: Option<String>,
    gate: Linear,
    router: Router,
    experts: Experts,
    /// Every token of this rank goes to all of them.
    shared_experts: Option<Experts>,
    /// The dtype in which the gate computes its logits; that of the hidden states without it.
    router_dtype: Option<DType>,
    placement: Placement,
    /// Which physical experts hold each expert; `None` where each is the physical expert of its own number.
    map: Option<ExpertMap>,
    ep_rank: usize,
    reduction: Reduction,
    choice: Choice,
    perfect_config: PerfectRouterConfig,
    /// The plan that this rank follows while its routing is perfect.
    perfect: Option<Plan>,
    load: Option<Counter>,
}

/// Puts a [`MoeBlock`] together.
#[derive(Debug)]
#[must_use]
pub struct MoeBlockBuilder {
    label: Option<String>,
    gate: Linear,
    router: Router,
    experts: Experts,
    shared_experts: Option<Experts>,
    router_dtype: Option<DType>,
    shards: Shards,
    ep_rank: usize,
    reduction: Reduction,
    strategy: Option<Strategy>,
    replicated_tokens: bool,
    peer_access: bool,
    perfect_router: bool,
    perfect_config: PerfectRouterConfig,
    statistics: bool,
}

/// How the experts are cut up.
#[derive(Debug)]
enum Shards {
    /// In order, as evenly as can be, for as many ranks.
    Contiguous(usize),
    Placed(Placement),
}

impl MoeBlockBuilder {
    /// What the block is called, such as `layer 3`, among the blocks that use one communicator, the same on every rank.
    ///
    /// [`MoeBlock::forward`] gives it to the communicator as the [label](Communicator::set_label): it stands in errors, and tells a
    /// block that a rank has left out from the next one of the same shape. Without it the caller sets labels.
    pub fn label(self, label: impl Into<String>) -> Self {
        Self { label: Some(label.into()), ..self }
    }

    /// The group's size and this rank; one rank when not called. `experts` then holds this rank's
    /// [`local_experts`](crate::ep::Topology::local_experts) only.
    pub fn shard(self, ep_size: usize, ep_rank: usize) -> Self {
        Self { shards: Shards::Contiguous(ep_size), ep_rank, ..self }
    }

    /// Any placement instead, with replicas, and this rank. `experts` then holds this rank's
    /// [`experts_of`](Placement::experts_of), in this order. Any but a contiguous one is for the CPU.
    ///
    /// Slots go to replicas in turn, whatever the strategy: by the number of their token among the tokens of all ranks, counted
    /// from where the [`Step`] stands, so that a sequence that is decoded token by token takes turns too.
    pub fn placement(self, placement: Placement, ep_rank: usize) -> Self {
        Self { shards: Shards::Placed(placement), ep_rank, ..self }
    }

    /// How tokens and results travel, instead of what [`Problem::choose`] finds best; `None` leaves it to that.
    pub fn strategy(self, strategy: impl Into<Option<Strategy>>) -> Self {
        Self { strategy: strategy.into(), ..self }
    }

    /// Says that every rank holds all tokens, in the same order and with as much padding, instead of tokens of its own. Only
    /// then [`Strategy::Replicated`] is possible, and it is what is chosen.
    ///
    /// With it the ranks are one sender to the perfect router, and each [`Step`] must stand at the same token on every rank. That
    /// the tokens are the same is not checked beyond their number: ranks that hold others get results of neither.
    pub fn replicated_tokens(self, replicated: bool) -> Self {
        Self { replicated_tokens: replicated, ..self }
    }

    /// Says that the ranks are `Peer`s, so that [`Strategy::Peer`] is possible, and chosen unless every rank holds all tokens.
    pub fn peer_access(self, peer_access: bool) -> Self {
        Self { peer_access, ..self }
    }

    /// Experts that every token goes to, each with weight 1, beside those it is routed to. Every rank holds all of them and
    /// works on its own tokens. Their sum is added in float32, before the one rounding.
    pub fn shared_experts(self, shared_experts: Experts) -> Self {
        Self { shared_experts: Some(shared_experts), ..self }
    }

    /// The dtype of the router logits, f32, bf16 or f16: the gate rounds to it. That of the hidden states when not called, as in
    /// GPT-OSS; DeepSeek-V3 wants f32.
    pub fn router_dtype(self, dtype: DType) -> Self {
        Self { router_dtype: Some(dtype), ..self }
    }

    /// How results are summed; `SlotOrder` when not called.
    pub fn reduction(self, reduction: Reduction) -> Self {
        Self { reduction, ..self }
    }

    /// Replaces the gate's logits by balanced ones. **For measuring: the output is then meaningless.** The gate is still
    /// computed, so that timings stay real, and nothing learned is modified.
    pub fn perfect_router(self, enabled: bool) -> Self {
        Self { perfect_router: enabled, ..self }
    }

    /// How perfect routing deals out the slots, now or when it is [switched on](MoeBlock::set_perfect_router) later.
    pub fn perfect_router_config(self, config: PerfectRouterConfig) -> Self {
        Self { perfect_config: config, ..self }
    }

    /// Counts the slots of every expert; see [`MoeBlock::load`]. With [`Strategy::Exchange`], where no rank sees all slots,
    /// that costs an all-gather of `num_physical` counts for each forward pass.
    pub fn statistics(self, enabled: bool) -> Self {
        Self { statistics: enabled, ..self }
    }

    /// # Errors
    /// Sizes that do not fit each other; parts on different devices; a placement that is not contiguous on CUDA; a strategy that is
    /// not possible; a hot spot that the perfect router cannot have.
    pub fn build(self) -> Result<MoeBlock> {
        let num_experts = self.gate.out_features();
        self.check_devices()?;
        let Self { ep_rank, reduction, .. } = self;
        let placement = match self.shards {
            Shards::Contiguous(ep_size) => Placement::contiguous(num_experts, ep_size)?,
            Shards::Placed(placement) => placement,
        };
        if placement.num_experts() != num_experts {
            bail!(
                "{OP}: the placement is of {} experts, expected those of the gate, {num_experts}",
                placement.num_experts()
            )
        }
        if ep_rank >= placement.ep_size() {
            bail!("{OP}: ep_rank is {ep_rank}, expected less than ep_size, which is {}", placement.ep_size())
        }
        let local = placement.local(ep_rank)?;
        if self.experts.num_experts() != local.len() {
            bail!(
                "{OP}: {} experts given, expected those of rank {ep_rank} of {}: {local:?} of {}",
                self.experts.num_experts(),
                placement.ep_size(),
                placement.num_physical()
            )
        }
        if self.gate.in_features() != self.experts.hidden_size() {
            bail!(
                "{OP}: the gate has hidden_size {}, expected that of the experts, {}",
                self.gate.in_features(),
                self.experts.hidden_size()
            )
        }
        if let Some(shared) = self.shared_experts.as_ref().filter(|s| s.hidden_size() != self.experts.hidden_size()) {
            bail!(
                "{OP}: the shared experts have hidden_size {}, expected that of the experts, {}",
                shared.hidden_size(),
                self.experts.hidden_size()
            )
        }
        if let Some(dtype) = self.router_dtype.filter(|dtype| !matches!(dtype, DType::F32 | DType::BF16 | DType::F16)) {
            bail!("{OP}: router_dtype is {dtype:?}, expected f32, bf16 or f16")
        }
        let top_k = self.router.top_k();
        if top_k > num_experts {
            bail!("{OP}: top_k is {top_k}, expected at most num_experts, which is {num_experts}")
        }
        self.router.method().groups().check(OP, num_experts, top_k)?;
        let problem = Problem {
            ep_size: placement.ep_size(),
            top_k,
            reduction,
            replicated_tokens: self.replicated_tokens,
            // Whether the ranks are such shows when they come.
            peer_access: self.peer_access || self.strategy == Some(Strategy::Peer),
        };
        let mut block = MoeBlock {
            choice: problem.choose(self.strategy)?,
            perfect_config: self.perfect_config,
            perfect: None,
            load: self.statistics.then(|| Counter::new(placement.num_physical(), self.experts.device())).transpose()?,
            label: self.label,
            gate: self.gate,
            router: self.router,
            experts: self.experts,
            shared_experts: self.shared_experts,
            router_dtype: self.router_dtype,
            map: if placement.is_contiguous() { None } else { Some(placement.map()?) },
            placement,
            ep_rank,
            reduction,
        };
        if block.perfect_config.imbalance.is_some() {
            // A hot spot that cannot be is refused now, not when it is switched on.
            block.plan()?;
        }
        block.set_perfect_router(self.perfect_router)?;
        Ok(block)
    }

    fn check_devices(&self) -> Result<()> {
        let expected = self.experts.device();
        let shared = self.shared_experts.as_ref().map(|shared| ("the shared experts are", shared.device()));
        for (part, device) in [("the gate is", self.gate.device())].into_iter().chain(shared) {
            check_same_device(part, device, expected)?;
        }
        match &self.shards {
            Shards::Placed(placement) if !placement.is_contiguous() && !expected.is_cpu() => {
                bail!("{OP}: the placement is {placement} on {:?}, expected a contiguous one", expected.location())
            }
            _ => Ok(()),
        }
    }
}

/// Two devices of one location are two: each has a stream of its own.
fn check_same_device(part: &str, device: &Device, expected: &Device) -> Result<()> {
    if !device.same_device(expected) {
        bail!("{OP}: {part} on {:?}, expected the device of the experts, {:?}", device.location(), expected.location())
    }
    Ok(())
}

/// What a forward pass computed on the way; for this rank's own tokens.
#[derive(Debug, Clone)]
pub struct MoeOutput {
    /// `[num_tokens, hidden_size]` in the dtype of the input.
    pub hidden: Tensor,
    /// `[num_tokens, num_experts]` in the dtype of the input or the [router's](MoeBlockBuilder::router_dtype): what the gate
    /// computed, also under perfect routing.
    pub router_logits: Tensor,
    /// The routing that was used.
    pub routing: Routing,
}

/// Slots per expert and per rank since the block was built or [`MoeBlock::reset_load`] was called.
///
/// Counted is what was worked on: the slots of a replica belong to its expert and its rank, and those of a perfect plan, where
/// there is a placement, to the experts that [stand in](Placement::standing_in) for the planned ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// `[num_experts]`
    pub slots_per_expert: Vec<u64>,
    /// `[ep_size]`
    pub slots_per_rank: Vec<u64>,
}

impl MoeBlock {
    /// A block of one rank with all experts, unless the builder is told otherwise. `gate` is
    /// `[num_experts, hidden_size]`.
    pub fn builder(gate: Linear, router: Router, experts: Experts) -> MoeBlockBuilder {
        MoeBlockBuilder {
            label: None,
            gate,
            router,
            experts,
            shared_experts: None,
            router_dtype: None,
            shards: Shards::Contiguous(1),
            ep_rank: 0,
            reduction: Reduction::default(),
            strategy: None,
            replicated_tokens: false,
            peer_access: false,
            perfect_router: false,
            perfect_config: PerfectRouterConfig::default(),
            statistics: false,
        }
    }

    /// What it was [called](MoeBlockBuilder::label).
    pub fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }

    /// Who holds which experts.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// This rank.
    pub fn ep_rank(&self) -> usize {
        self.ep_rank
    }

    /// How tokens and results travel, and why.
    pub fn strategy(&self) -> &Choice {
        &self.choice
    }

    /// Whether the output is meaningless.
    pub fn is_perfect(&self) -> bool {
        self.perfect.is_some()
    }

    /// Switches between learned and balanced routing; see [`MoeBlockBuilder::perfect_router`].
    ///
    /// # Errors
    /// More groups and ranks than can be planned for.
    pub fn set_perfect_router(&mut self, enabled: bool) -> Result<()> {
        self.perfect = if enabled { Some(self.plan()?) } else { None };
        Ok(())
    }

    fn plan(&self) -> Result<Plan> {
        let (placement, config) = (&self.placement, &self.perfect_config);
        let (sender, _) = config.schedule.start(self.sender(), &[]);
        let plan = Plan::new(placement.num_experts(), self.router.top_k(), placement.ep_size(), sender)?
            .with_groups(self.router.method().groups())?;
        match config.imbalance {
            Some(imbalance) => plan.with_imbalance(imbalance),
            None => Ok(plan),
        }
    }

    /// The same on `device`, with a load of 0. It can be used from any thread, at once.
    ///
    /// # Errors
    /// A placement that is not contiguous on another device than the CPU; what copying tensors there may fail with.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        if !device.is_cpu() && self.map.is_some() {
            bail!("{OP}: the placement is {} on {:?}, expected a contiguous one", self.placement, device.location())
        }
        let block = Self {
            label: self.label.clone(),
            gate: self.gate.to_device(device)?,
            router: self.router.clone(),
            experts: self.experts.to_device(device)?,
            shared_experts: self.shared_experts.as_ref().map(|shared| shared.to_device(device)).transpose()?,
            router_dtype: self.router_dtype,
            placement: self.placement.clone(),
            map: self.map.clone(),
            ep_rank: self.ep_rank,
            reduction: self.reduction,
            choice: self.choice.clone(),
            perfect_config: self.perfect_config,
            perfect: self.perfect.clone(),
            load: self.load.as_ref().map(|_| Counter::new(self.placement.num_physical(), device)).transpose()?,
        };
        // Other threads, whose streams do not wait for this one's, may be the next to use it.
        device.synchronize()?;
        Ok(block)
    }

    /// Where the weights are, and hidden states must be.
    pub fn device(&self) -> &Device {
        self.experts.device()
    }

    /// This rank's experts.
    pub fn experts(&self) -> &Experts {
        &self.experts
    }

    /// The experts that every token goes to.
    pub fn shared_experts(&self) -> Option<&Experts> {
        self.shared_experts.as_ref()
    }

    /// The layer for `hidden [num_tokens, hidden_size]` in f32, bf16 or f16, where `num_tokens` is this rank's count in
    /// `step`. A collective: every rank of the group calls it, with zero tokens if it has none. Give blocks of one communicator
    /// [labels](MoeBlockBuilder::label), or set the communicator's before each: without, a block that a rank has left out cannot
    /// be told from the next one of the same shape.
    ///
    /// On CUDA nothing waits for the device and nothing is copied to the host (but with [`Strategy::Exchange`], for the counts of
    /// what goes where), so that a CUDA graph can capture it after a
    /// first call of as many tokens on the same thread, whose workspace it uses; the graph is good as long as that thread and
    /// the block live. Planned logits stay where they are as long as the [store](PerfectRouterStore) does not grow, which
    /// [`reserve`](PerfectRouterStore::reserve) sees to. Hidden states that are not contiguous are copied first.
    ///
    /// # Errors
    /// Shapes, dtypes or a device that do not fit, or a fault of the group. An error before or between collectives aborts the group,
    /// so that no other rank waits.
    pub fn forward(&self, hidden: &Tensor, communicator: &mut dyn Communicator, step: &Step) -> Result<Tensor> {
        self.forward_traced(hidden, communicator, step).map(|output| output.hidden)
    }

    /// As [`forward`](Self::forward), and keeps what was computed on the way.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_traced(
        &self,
        hidden: &Tensor,
        communicator: &mut dyn Communicator,
        step: &Step,
    ) -> Result<MoeOutput> {
        if let Some(label) = &self.label {
            communicator.set_label(label);
        }
        let output = self.try_forward(hidden, communicator, step);
        if let Err(error) = &output {
            communicator.abort_handle().abort(&reason(error));
        }
        output
    }

    /// [`forward`](Self::forward) of a block of one rank.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); the block has more ranks than one.
    pub fn forward_alone(&self, hidden: &Tensor) -> Result<Tensor> {
        let mut solo = Solo::new();
        let step = Step::agree(&mut solo, hidden.dims().first().copied().unwrap_or(0))?;
        self.forward(hidden, &mut solo, &step)
    }

    /// What the experts and ranks had to do, over all ranks.
    ///
    /// On CUDA slots are counted on the device, in replays of a graph too; this waits for the calling thread's part of them.
    ///
    /// # Errors
    /// The block was built without [`statistics`](MoeBlockBuilder::statistics); a device that cannot be read.
    pub fn load(&self) -> Result<Load> {
        let Some(load) = &self.load else { bail!("{OP}: load was asked for, expected a block built with statistics") };
        let slots = load.slots()?;
        let mut slots_per_expert = vec![0; self.placement.num_experts()];
        for (&expert, slots) in self.placement.physical_to_expert().iter().zip(&slots) {
            slots_per_expert[expert] += slots;
        }
        let of_rank = |rank| Ok(slots[self.placement.local(rank)?].iter().sum());
        let slots_per_rank = (0..self.placement.ep_size()).map(of_rank).collect::<Result<_>>()?;
        Ok(Load { slots_per_expert, slots_per_rank })
    }

    /// Starts counting anew.
    ///
    /// # Errors
    /// A device that cannot be written.
    pub fn reset_load(&self) -> Result<()> {
        self.load.as_ref().map_or(Ok(()), Counter::reset)
    }

    fn try_forward(&self, hidden: &Tensor, communicator: &mut dyn Communicator, step: &Step) -> Result<MoeOutput> {
        self.check_group(communicator, step, hidden)?;
        if !self.device().is_cpu() {
            return self.forward_on_device(hidden, communicator, step);
        }
        let router_logits = match self.router_dtype {
            Some(dtype) => self.gate.forward(&hidden.to_dtype(dtype)?)?,
            None => self.gate.forward(hidden)?,
        };
        let routing = self.route(&router_logits, step)?;
        let sharing =
            Sharing { strategy: self.choice.strategy(), reduction: self.reduction, placement: &self.placement };
        let dispatched = dispatch(communicator, step, &sharing, hidden, &self.placed(&routing, step)?)?;
        let local = self.placement.local(self.ep_rank)?;
        let order = ExpertOrder::new(dispatched.topk_ids(), self.placement.num_physical(), local)?;
        let rows = self.experts.forward(dispatched.hidden(), &order)?;
        let mut sum = combine(communicator, &dispatched, &rows, &order)?;
        if let Some(shared) = &self.shared_experts {
            sum = (sum + everyone_to(shared, hidden, &routing.topk_ids, hidden.dims()[0])?)?;
        }
        // Not before: the order has checked the ids of the other ranks, and a failed call leaves no trace.
        if let Some(load) = &self.load {
            self.count(load, communicator, &dispatched, &order)?;
        }
        Ok(MoeOutput { hidden: sum.to_dtype(hidden.dtype())?, router_logits, routing })
    }

    /// The routing with the physical experts that its slots go to, replicas in turn. What a plan chose are places on ranks, not
    /// experts.
    fn placed(&self, routing: &Routing, step: &Step) -> Result<Routing> {
        let Some(map) = &self.map else { return Ok(routing.clone()) };
        let topk_ids = match self.is_perfect() {
            true => self.placement.standing_in(&routing.topk_ids)?,
            false => {
                let before: usize = step.token_counts().iter().take(self.sender()).sum();
                // Which turn a token beyond 2^32 takes does not matter, as long as it is the same.
                let turn = step.first_token().wrapping_add(before) as u32;
                map.clone().with_turn(turn).physical_ids(&routing.topk_ids)?
            }
        };
        Ok(Routing { topk_ids, topk_weights: routing.topk_weights.clone() })
    }

    /// Whose tokens this rank's are: its own, or those that every rank holds.
    fn sender(&self) -> usize {
        match self.choice.strategy() {
            Strategy::Replicated => 0,
            _ => self.ep_rank,
        }
    }

    /// Counts the slots of all ranks.
    fn count(
        &self,
        load: &Counter,
        communicator: &mut dyn Communicator,
        dispatched: &Dispatched,
        order: &ExpertOrder,
    ) -> Result<()> {
        if self.choice.strategy() != Strategy::Exchange {
            return load.count_ids(dispatched.topk_ids());
        }
        load.count_experts(&self.counts_of_ranks(communicator, order)?)
    }

    /// The slots of all physical experts, of which each rank knows those of its own.
    fn counts_of_ranks(&self, communicator: &mut dyn Communicator, order: &ExpertOrder) -> Result<Tensor> {
        let len_of_rank = |rank| Ok(self.placement.local(rank)?.len());
        let lens = (0..self.placement.ep_size()).map(len_of_rank).collect::<Result<Vec<_>>>()?;
        Ok(communicator.all_gather(&order.expert_counts, &lens)?)
    }

    /// The routing of this rank's tokens.
    fn route(&self, router_logits: &Tensor, step: &Step) -> Result<Routing> {
        let (router, logits) = self.logits_in_use(router_logits, step)?;
        match step.num_valid_tokens() {
            Some(num_valid_tokens) => router.route_padded(&logits, num_valid_tokens),
            None => router.route(&logits),
        }
    }

    /// What is routed, and by which router: the gate's logits, or those of the perfect router.
    fn logits_in_use(&self, router_logits: &Tensor, step: &Step) -> Result<(Router, Tensor)> {
        let Some(plan) = &self.perfect else { return Ok((self.router.clone(), router_logits.clone())) };
        let (_, before) = self.perfect_config.schedule.start(self.sender(), step.token_counts());
        let key = PerfectRouterKey { plan: plan.clone(), dtype: router_logits.dtype() };
        let planned = PerfectRouterStore::global().logits_from(
            &key,
            step.first_token().saturating_add(before),
            router_logits.dims()[0],
            router_logits.device(),
        )?;
        Ok((self.router.without_selection_bias(), planned))
    }

    fn check_group(&self, communicator: &dyn Communicator, step: &Step, hidden: &Tensor) -> Result<()> {
        let group = (communicator.world_size(), communicator.rank());
        let own = (self.placement.ep_size(), self.ep_rank);
        if group != own {
            bail!("{OP}: the communicator is rank {} of {}, expected rank {} of {}", group.1, group.0, own.1, own.0)
        }
        check_same_device("hidden is", hidden.device(), self.device())?;
        match (step.token_counts().get(own.1), hidden.dims()) {
            (Some(&count), &[num_tokens, _]) if count == num_tokens && step.token_counts().len() == own.0 => Ok(()),
            _ => bail!(
                "{OP}: hidden has shape {:?}, expected [num_tokens, {}] with the num_tokens of rank {} in {:?}",
                hidden.shape(),
                self.experts.hidden_size(),
                own.1,
                step.token_counts()
            ),
        }
    }
}

/// The sum of what all `experts` make of each token, f32 `[num_tokens, hidden_size]`; 0 for tokens that `topk_ids` shows to
/// be padding. All ranks together have `num_tokens` tokens.
fn everyone_to(experts: &Experts, hidden: &Tensor, topk_ids: &Tensor, num_tokens: usize) -> Result<Tensor> {
    let num_experts = experts.num_experts();
    let Routing { topk_ids, topk_weights } = everyone(topk_ids, num_experts)?;
    let order = ExpertOrder::new(&topk_ids, num_experts, 0..num_experts)?
        .among(num_tokens.saturating_mul(num_experts), num_experts);
    experts.forward_weighted(hidden, &topk_weights, &order, None, DType::F32)
}

/// The routing of every token to `num_experts` experts, each with weight 1, and of padding to none.
fn everyone(topk_ids: &Tensor, num_experts: usize) -> Result<Routing> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = topk_ids.device() {
        return cuda::everyone(topk_ids, num_experts, device);
    }
    let (num_tokens, top_k) = topk_ids.dims2()?;
    let ids = crate::host::with_slice(topk_ids, OP, "topk_ids", |topk_ids: &[u32]| {
        let everyone = 0..num_experts as u32;
        let of_token = |first: u32| everyone.clone().map(move |e| if first == NO_EXPERT { NO_EXPERT } else { e });
        Ok(topk_ids.chunks(top_k).flat_map(|ids| of_token(ids[0])).collect::<Vec<_>>())
    })?;
    Ok(Routing {
        topk_ids: Tensor::from_vec(ids, (num_tokens, num_experts), &Device::Cpu)?,
        topk_weights: Tensor::ones((num_tokens, num_experts), DType::F32, &Device::Cpu)?,
    })
}
