//! Experts on CUDA: the launches of `cuda/experts/`.

pub(super) mod fragments;
mod held;
mod path;
mod single;

use super::weights::Values;
use super::{Activation, ExpertProjection, Experts, GateUpRows, OP};
use crate::cuda::{Binary, Launch, launch, properties, signals, workspace};
use crate::host::checked_product;
use crate::order::{Batch, ExpertOrder, TileMap};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use held::{Fresh, Held, output};
use path::{Kernel, Path, general_format, general_launch};

/// Threads of a block that brings rows home, and bytes of a row that a thread has.
const HOME_THREADS: u32 = 256;
const HOME_BYTES: usize = 16;
/// Of what kernels store at once.
const ROOM_ALIGNMENT: u64 = 16;
/// Tokens of a tile of the general kernel of linear layers.
const LINEAR_ROWS: usize = 16;
/// `kChunk` and `kLinearThreads` of the source, and blocks of small tiles that one wave or a few of them have.
const LINEAR_CHUNK: usize = 32;
const LINEAR_THREADS: u32 = 256;
const LINEAR_FEW: usize = 512;

/// What the kernels are told; `ProjectionArguments` of the source.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Arguments {
    weights: u64,
    scales: u64,
    bias: u64,
    input: u64,
    output: u64,
    sorted_slots: u64,
    expert_offsets: u64,
    tile_experts: u64,
    tile_starts: u64,
    num_rows: u32,
    top_k: u32,
    in_features: u32,
    out_features: u32,
    max_tiles: u32,
    gate_up_rows: u32,
    activation: u32,
    alpha: f32,
    limit: f32,
    parts: u32,
    rooms: u32,
    token_features: u32,
}

/// `LayerArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct LayerArguments {
    gate_up: Arguments,
    down: Arguments,
    signals: u64,
}

impl Kernel {
    /// With the shape of the kernel's blocks, for the first or the second projection.
    fn tell(&self, arguments: Arguments, projection: usize) -> Arguments {
        let Some(shape) = self.shape else { return arguments };
        let [parts, rooms, token_features] =
            [shape.parts[projection], shape.rooms, shape.token_features].map(|number| number as u32);
        Arguments { parts, rooms, token_features, ..arguments }
    }
}

/// `HomeArguments` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct HomeArguments {
    rows: u64,
    topk_weights: u64,
    slot_rank: u64,
    sums: u64,
    num_tokens: u64,
    top_k: u32,
    hidden_size: u32,
}

// SAFETY: plain numbers and device addresses, in the C layout of the kernels' parameters.
unsafe impl DeviceRepr for Arguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for LayerArguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for HomeArguments {}

/// The numbers of a projection on the device.
struct Weights<'a> {
    projection: &'a ExpertProjection,
    values: Held,
    scales: Option<Held>,
    bias: Option<Held>,
}

impl<'a> Weights<'a> {
    fn new(projection: &'a ExpertProjection, device: &CudaDevice) -> Result<Self> {
        let held = |tensor: &Tensor, argument| Held::new(tensor, device, argument);
        let (values, scales) = match &projection.weights.values {
            Values::Dense(weight) => (weight, None),
            Values::Mxfp4 { blocks, scales, .. } => (blocks, Some(scales)),
            Values::Fp8 { values, scales } => (values, Some(scales)),
            Values::Fragments(fragments) => (&fragments.values, fragments.scales.as_ref()),
        };
        Ok(Self {
            projection,
            values: held(values, "weights")?,
            scales: scales.map(|scales| held(scales, "scales")).transpose()?,
            bias: projection.bias.as_ref().map(|bias| held(bias, "bias")).transpose()?,
        })
    }

    fn arguments(&self, out_features: usize) -> Result<Arguments> {
        let address = |held: &Option<Held>| held.as_ref().map_or(Ok(0), Held::address);
        Ok(Arguments {
            weights: self.values.address()?,
            scales: address(&self.scales)?,
            bias: address(&self.bias)?,
            in_features: self.projection.weights.in_features() as u32,
            out_features: out_features as u32,
            ..Arguments::default()
        })
    }
}

/// What the kernels of a call keep between them: hidden states in the order of their tiles, if they do, `[num_slots,
/// intermediate_size]` activated values in the dtype of the hidden states, and `[num_slots, chunks, hidden_size]` parts of rows in
/// float32, if they make such.
#[derive(Clone, Copy, Default)]
struct Between {
    gathered: u64,
    activated: u64,
    parts: u64,
}

/// The order and the tiles of a call, with the kernels that work through them.
struct Call<'a> {
    experts: &'a Experts,
    device: &'a CudaDevice,
    path: Path,
    dtype: DType,
    top_k: usize,
    num_slots: usize,
    max_tiles: usize,
    hidden: Held,
    sorted_slots: Held,
    slot_rank: Held,
    expert_offsets: Held,
    tile_experts: Held,
    tile_starts: Held,
}

impl<'a> Call<'a> {
    fn new(
        experts: &'a Experts,
        hidden: &Tensor,
        order: &ExpertOrder,
        tiles: Option<&TileMap>,
        device: &'a CudaDevice,
    ) -> Result<Self> {
        let (dtype, num_slots) = (hidden.dtype(), order.num_tokens() * order.top_k());
        let path = Path::choose(experts, num_slots, order.batch(), dtype, properties(device)?);
        let tiles = match tiles {
            Some(tiles) if tiles.tile_rows() == path.tile_rows() && tiles.is_of(order) => tiles.clone(),
            _ => order.tile_map(path.tile_rows())?,
        };
        let held = |tensor: &Tensor, argument| Held::new(tensor, device, argument);
        Ok(Self {
            experts,
            device,
            path,
            dtype,
            top_k: order.top_k(),
            num_slots,
            max_tiles: tiles.tile_experts.elem_count(),
            hidden: held(hidden, "hidden")?.aligned()?,
            sorted_slots: held(&order.sorted_slots, "the order")?,
            slot_rank: held(&order.slot_rank, "the order")?,
            expert_offsets: held(&order.expert_offsets, "the order")?,
            tile_experts: held(&tiles.tile_experts, "the order")?,
            tile_starts: held(&tiles.tile_starts, "the order")?,
        })
    }

    /// Whether there is nothing to multiply.
    fn is_empty(&self) -> bool {
        self.max_tiles == 0 || self.experts.hidden_size() == 0
    }

    fn of_order(&self, arguments: Arguments) -> Result<Arguments> {
        Ok(Arguments {
            sorted_slots: self.sorted_slots.address()?,
            expert_offsets: self.expert_offsets.address()?,
            tile_experts: self.tile_experts.address()?,
            tile_starts: self.tile_starts.address()?,
            num_rows: self.num_slots as u32,
            max_tiles: self.max_tiles as u32,
            top_k: self.top_k as u32,
            ..arguments
        })
    }

    /// Puts `rows`, `[num_slots, hidden_size]` in `rows_dtype`, on the stream, and on the way what `between` has room for.
    fn project(&self, between: Between, rows: u64, rows_dtype: DType) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        if self.path == Path::Single {
            return self.single_rows(between.parts, rows);
        }
        let experts = self.experts;
        let weights = (Weights::new(&experts.gate_up, self.device)?, Weights::new(&experts.down, self.device)?);
        let mut gate_up = self.gate_up(&weights.0, between.activated)?;
        let down = self.down(&weights.1, between.activated, rows)?;
        let device = properties(self.device)?;
        if let Some(kernel) = self.path.gather_kernel(self.max_tiles) {
            let gather = Arguments { output: between.gathered, ..gate_up };
            // SAFETY: `Arguments` is the kernel's parameter; `gathered` has a row for each place, and the rest is as below.
            unsafe { launch(self.device, Binary::ExpertsGather, &kernel.name, kernel.launch, gather)? };
            gate_up.input = between.gathered;
        }
        if let Some(kernel) = self.path.layer_kernel(experts, self.max_tiles, self.dtype, rows_dtype, device) {
            let signals = signals(self.device, OP, self.path.num_signals(self.max_tiles))?;
            let arguments = LayerArguments { gate_up: kernel.tell(gate_up, 0), down: kernel.tell(down, 1), signals };
            // SAFETY: `LayerArguments` is the kernel's parameter, and the rest is as below.
            return unsafe { launch(self.device, self.path.binary(), &kernel.name, kernel.launch, arguments) };
        }
        for (kind, projection, arguments) in [("gate_up", &experts.gate_up, gate_up), ("down", &experts.down, down)] {
            if arguments.out_features == 0 {
                continue;
            }
            let kernel = Path::general_kernel(kind, &projection.weights, self.max_tiles, self.dtype);
            // SAFETY: `Arguments` is the kernel's parameter; `Experts::new` has checked that the weights fit the features, the
            // order's tiles name its places, input and output have a row for each of them, and what is freed is freed in the
            // stream's order. Kernels that start early wait for what they read.
            unsafe { launch(self.device, self.path.binary(), &kernel.name, kernel.launch, arguments)? };
        }
        Ok(())
    }

    /// Puts the sums of all slots of a token in `dtype`, weighted by those of `home`, on the stream, and what is before them.
    fn bring_home(&self, home: &Home<'_>, between: Between, rows: u64, dtype: DType, sums: u64) -> Result<()> {
        if self.path == Path::Single && !self.is_empty() {
            return self.single_sums(home, between.parts, dtype, sums);
        }
        let rows_dtype = self.path.rows_dtype(self.dtype, dtype, self.experts.hidden_size());
        self.project(between, rows, rows_dtype)?;
        home.put(rows_dtype, rows, dtype, sums, !self.is_empty())
    }

    fn gate_up(&self, weights: &Weights<'_>, activated: u64) -> Result<Arguments> {
        let (activation, alpha, limit) = match self.experts.activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::SwigluOss { alpha, limit } => (1, alpha, limit),
        };
        Ok(Arguments {
            input: self.hidden.address()?,
            output: activated,
            gate_up_rows: u32::from(self.experts.gate_up_rows == GateUpRows::Interleaved),
            activation,
            alpha,
            limit,
            ..self.of_order(weights.arguments(self.experts.intermediate_size())?)?
        })
    }

    fn down(&self, weights: &Weights<'_>, activated: u64, rows: u64) -> Result<Arguments> {
        let arguments = self.of_order(weights.arguments(self.experts.hidden_size())?)?;
        Ok(Arguments { input: activated, output: rows, ..arguments })
    }

    /// Bytes of a row for each slot, of `features` in `dtype`.
    fn bytes_of_rows(&self, features: usize, dtype: DType) -> Result<usize> {
        checked_product(OP, ("num_slots", self.num_slots), ("bytes of a row", features * dtype.size_in_bytes()))
    }

    /// Memory for [`Call::project`], and for rows in `rows_dtype` if it is one.
    fn workspace(&self, rows_dtype: Option<DType>) -> Result<(Between, u64)> {
        if self.is_empty() {
            return Ok((Between::default(), 0));
        }
        let (hidden_size, intermediate_size) = (self.experts.hidden_size(), self.experts.intermediate_size());
        if self.path == Path::Single {
            let parts = self.bytes_of_rows(single::chunks(self.experts) * hidden_size, DType::F32)?;
            let [parts] = workspace(self.device, OP, [parts])?;
            return Ok((Between { parts, ..Between::default() }, 0));
        }
        let activated = self.bytes_of_rows(intermediate_size, self.dtype)?;
        let gathers = self.path.gather_kernel(self.max_tiles).is_some();
        let gathered = if gathers { self.bytes_of_rows(hidden_size, self.dtype)? } else { 0 };
        // A tile's rows come when nothing of its hidden states is needed any more.
        let in_place = gathers && rows_dtype == Some(self.dtype);
        let rows = match rows_dtype {
            Some(dtype) if !in_place => self.bytes_of_rows(hidden_size, dtype)?,
            _ => 0,
        };
        let [activated, gathered, rows] = workspace(self.device, OP, [activated, gathered, rows])?;
        Ok((Between { activated, gathered, parts: 0 }, if in_place { gathered } else { rows }))
    }
}

/// Rows of a tile for that many slots.
pub(super) fn tile_rows(experts: &Experts, num_slots: usize, dtype: DType, device: &CudaDevice) -> Result<usize> {
    let batch = Batch { num_slots, num_experts: experts.num_experts() };
    Ok(Path::choose(experts, num_slots, batch, dtype, properties(device)?).tile_rows())
}

/// The dtype of rows on their way to sums in `sums`.
pub(super) fn rows_dtype(
    experts: &Experts,
    order: &ExpertOrder,
    dtype: DType,
    sums: DType,
    device: &CudaDevice,
) -> Result<DType> {
    let num_slots = order.num_tokens() * order.top_k();
    let path = Path::choose(experts, num_slots, order.batch(), dtype, properties(device)?);
    Ok(path.rows_dtype(dtype, sums, experts.hidden_size()))
}

pub(super) fn forward(experts: &Experts, hidden: &Tensor, order: &ExpertOrder, device: &CudaDevice) -> Result<Tensor> {
    let call = Call::new(experts, hidden, order, None, device)?;
    // Places behind the last one in use stay 0.
    output(DType::F32, device, (call.num_slots, experts.hidden_size()), Fresh::Zero, |rows| {
        if call.is_empty() {
            return Ok(());
        }
        let (between, _) = call.workspace(None)?;
        call.project(between, rows, DType::F32)
    })
}

pub(super) fn forward_weighted(
    experts: &Experts,
    hidden: &Tensor,
    topk_weights: &Tensor,
    order: &ExpertOrder,
    tiles: Option<&TileMap>,
    dtype: DType,
    device: &CudaDevice,
) -> Result<Tensor> {
    let call = Call::new(experts, hidden, order, tiles, device)?;
    let home = Home::new(topk_weights, order, experts.hidden_size(), device)?;
    let rows_dtype = call.path.rows_dtype(call.dtype, dtype, experts.hidden_size());
    let (between, rows) = call.workspace(Some(rows_dtype))?;
    home.sums(dtype, |sums| call.bring_home(&home, between, rows, dtype, sums))
}

/// As [`forward`], to the memory of `rows`, in their dtype.
pub(super) fn forward_to(experts: &Experts, hidden: &Tensor, order: &ExpertOrder, rows: &Tensor) -> Result<()> {
    let device = hidden.device().as_cuda_device()?;
    let call = Call::new(experts, hidden, order, None, device)?;
    let (between, _) = call.workspace(None)?;
    call.project(between, room(rows, call.num_slots, experts.hidden_size(), device)?.address()?, rows.dtype())
}

/// As [`forward_weighted`], to the memory of `sums`, in their dtype.
pub(super) fn forward_weighted_to(
    experts: &Experts,
    hidden: &Tensor,
    topk_weights: &Tensor,
    order: &ExpertOrder,
    tiles: Option<&TileMap>,
    sums: &Tensor,
    device: &CudaDevice,
) -> Result<()> {
    let call = Call::new(experts, hidden, order, tiles, device)?;
    let home = Home::new(topk_weights, order, experts.hidden_size(), device)?;
    let rows_dtype = call.path.rows_dtype(call.dtype, sums.dtype(), experts.hidden_size());
    let (between, rows) = call.workspace(Some(rows_dtype))?;
    let room = room(sums, order.num_tokens(), experts.hidden_size(), device)?;
    call.bring_home(&home, between, rows, sums.dtype(), room.address()?)
}

/// Memory for sums, as it is.
pub(super) fn room_for_sums(shape: (usize, usize), dtype: DType, device: &CudaDevice) -> Result<Tensor> {
    output(dtype, device, shape, Fresh::Undefined, |_| Ok(()))
}

/// Memory of somebody else's for that many rows.
fn room(tensor: &Tensor, num_rows: usize, hidden_size: usize, device: &CudaDevice) -> Result<Held> {
    if tensor.dims() != [num_rows, hidden_size] || !tensor.is_contiguous() {
        bail!("{OP}: there is room for {:?}, expected [{num_rows}, {hidden_size}] side by side", tensor.shape())
    }
    let held = Held::new(tensor, device, "room")?;
    if !held.address()?.is_multiple_of(ROOM_ALIGNMENT) {
        bail!("{OP}: there is room from {:#x} on, expected a multiple of {ROOM_ALIGNMENT}", held.address()?)
    }
    Ok(held)
}

pub(super) fn linear(projection: &ExpertProjection, hidden: &Tensor, device: &CudaDevice) -> Result<Tensor> {
    let (dtype, num_tokens) = (hidden.dtype(), hidden.dims()[0]);
    let out_features = projection.weights.out_features();
    let Ok(num_rows) = u32::try_from(num_tokens) else {
        bail!("{OP}: num_tokens is {num_tokens}, expected at most {}", u32::MAX)
    };
    let (hidden, weights) = (Held::new(hidden, device, "hidden")?.aligned()?, Weights::new(projection, device)?);
    output(dtype, device, (num_tokens, out_features), Fresh::Undefined, |address| {
        if num_tokens == 0 || out_features == 0 {
            return Ok(());
        }
        let arguments =
            Arguments { input: hidden.address()?, output: address, num_rows, ..weights.arguments(out_features)? };
        if let Some((name, how)) = linear_kernel(&weights, dtype, num_tokens, out_features)? {
            // SAFETY: as below, and the columns are whole chunks that begin at multiples of 16 bytes.
            return unsafe { launch(device, Binary::ExpertsLinear, &name, how, arguments) };
        }
        let how = general_launch(num_tokens.div_ceil(LINEAR_ROWS), out_features);
        let name = format!("linear_{}_{}", general_format(&projection.weights), dtype.as_str());
        // SAFETY: `Arguments` is the kernel's parameter; `hidden` has `num_rows` rows of `in_features`, the output as many of
        // `out_features`.
        unsafe { launch(device, Binary::Experts, &name, how, arguments) }
    })
}

/// The kernel of tensor cores for a linear layer, where there is one.
fn linear_kernel(
    weights: &Weights<'_>,
    dtype: DType,
    num_tokens: usize,
    out_features: usize,
) -> Result<Option<(String, Launch)>> {
    let is_plain = matches!(&weights.projection.weights.values, Values::Dense(weight) if weight.dtype() == dtype);
    let is_whole = weights.projection.weights.in_features().is_multiple_of(LINEAR_CHUNK);
    if !is_plain || !is_whole || dtype == DType::F32 || !weights.values.address()?.is_multiple_of(16) {
        return Ok(None);
    }
    let blocks = |tokens: usize, features: usize| {
        num_tokens.div_ceil(16 * tokens).saturating_mul(out_features.div_ceil(8 * features))
    };
    // Tiles of 16 tokens and 8 features. Few tokens take small ones: to keep many blocks busy.
    let (tokens, features) = match () {
        () if blocks(1, 1) <= LINEAR_FEW || num_tokens <= 16 => (1, 1),
        () if out_features <= 32 => (2, 4),
        () => (2, 8),
    };
    let shared = LINEAR_THREADS as usize * tokens * features * 4 * size_of::<f32>();
    let how = Launch { starts_early: true, ..Launch::new(blocks(tokens, features), LINEAR_THREADS, shared) };
    Ok(Some((format!("linear_{}_{tokens}x{features}", dtype.as_str()), how)))
}

pub(super) fn weighted_sum(
    rows: &Tensor,
    topk_weights: &Tensor,
    order: &ExpertOrder,
    device: &CudaDevice,
) -> Result<Tensor> {
    let &[num_rows, hidden_size] = rows.dims() else {
        bail!("{OP}: rows has shape {:?}, expected [num_rows, hidden_size]", rows.shape())
    };
    let num_slots = order.num_tokens() * order.top_k();
    if num_rows != num_slots {
        bail!("{OP}: rows has {num_rows} rows, expected the {num_slots} slots of the order on CUDA")
    }
    let rows = Held::new(rows, device, "rows")?.aligned()?;
    if rows.dtype() != DType::F32 {
        bail!("{OP}: rows has dtype {:?}, expected F32", rows.dtype())
    }
    let home = Home::new(topk_weights, order, hidden_size, device)?;
    home.sums(DType::F32, |sums| home.put(DType::F32, rows.address()?, DType::F32, sums, false))
}

/// The way home of rows.
struct Home<'a> {
    device: &'a CudaDevice,
    num_tokens: usize,
    top_k: usize,
    hidden_size: usize,
    topk_weights: Held,
    slot_rank: Held,
}

impl<'a> Home<'a> {
    fn new(topk_weights: &Tensor, order: &ExpertOrder, hidden_size: usize, device: &'a CudaDevice) -> Result<Self> {
        if topk_weights.dtype() != DType::F32 {
            bail!("{OP}: topk_weights has dtype {:?}, expected F32", topk_weights.dtype())
        }
        Ok(Self {
            device,
            num_tokens: order.num_tokens(),
            top_k: order.top_k(),
            hidden_size,
            topk_weights: Held::new(topk_weights, device, "topk_weights")?,
            slot_rank: Held::new(&order.slot_rank, device, "the order")?,
        })
    }

    /// The weighted sums in `dtype` that `put` puts on the stream, to the address that it is told.
    fn sums(&self, dtype: DType, put: impl FnOnce(u64) -> Result<()>) -> Result<Tensor> {
        checked_product(OP, ("num_tokens", self.num_tokens), ("hidden_size", self.hidden_size))?;
        output(dtype, self.device, (self.num_tokens, self.hidden_size), Fresh::Undefined, |sums| {
            if self.num_tokens * self.hidden_size == 0 {
                return Ok(());
            }
            put(sums)
        })
    }

    /// Puts the sums of the rows that lie at `rows` to `sums`. `starts_early` says that the last kernel on the stream is one of
    /// experts, which lets no other begin before the order is written.
    fn put(&self, rows_dtype: DType, rows: u64, dtype: DType, sums: u64, starts_early: bool) -> Result<()> {
        let len = self.num_tokens * self.hidden_size;
        if len == 0 {
            return Ok(());
        }
        let arguments = HomeArguments {
            rows,
            topk_weights: self.topk_weights.address()?,
            slot_rank: self.slot_rank.address()?,
            sums,
            num_tokens: self.num_tokens as u64,
            top_k: self.top_k as u32,
            hidden_size: self.hidden_size as u32,
        };
        let width = HOME_BYTES / rows_dtype.size_in_bytes();
        let width = if self.hidden_size.is_multiple_of(width) { width } else { 1 };
        let how = Launch::new((len / width).div_ceil(HOME_THREADS as usize), HOME_THREADS, 0);
        let how = Launch { starts_early, ..how };
        let name = format!("home_{}_{}_{width}", rows_dtype.as_str(), dtype.as_str());
        // SAFETY: `HomeArguments` is the kernel's parameter; ranks of the order are below its slots, which the rows have
        // a row for, the sums have `len` elements, and the kernel waits for the one in front of it.
        unsafe { launch(self.device, Binary::ExpertsHome, &name, how, arguments) }
    }
}
