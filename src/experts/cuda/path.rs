//! Which kernels take a call, and how they are launched.

use super::super::weights::{ExpertWeights, Values};
use super::super::{ExpertProjection, Experts};
use super::HOME_BYTES;
use super::fragments::{BAND_ROWS, Format, UNIT_COLUMNS};
use super::single;
use crate::cuda::{Binary, Launch, Properties};
use crate::order::Batch;
use candle_core::DType;

/// Places of a tile of `cuda/experts/general.cu`, and output features of a block.
const GENERAL_TILE_ROWS: usize = 16;
const GENERAL_BAND: usize = 32;
const GENERAL_THREADS: u32 = 256;
/// Of `cuda/experts/resident.cuh`: warps of a block that multiply, parts of a band, bands whose parts have room until they are
/// added up, rooms for the tokens of a tile, at most.
const RESIDENT_MAX_WARPS: usize = 18;
const RESIDENT_MAX_PARTS: usize = 4;
const RESIDENT_SUM_ROOMS: usize = 10;
const RESIDENT_MAX_ROOMS: usize = 2;
/// Fewer warps than these are no faster than `cuda/experts/general.cu`.
const RESIDENT_MIN_WARPS: usize = 4;
/// Bytes of a part's values, about: enough for a warp to come to speed, few enough for the last ones to end together.
const PART_BYTES: usize = 7680;
/// Bytes of a lane's sums.
const SUM_BYTES: usize = 16;
/// Shared memory that its kernels have beside that of the launch.
const RESIDENT_STATIC_SHARED: usize = 5120;
/// Slots per expert up to which tokens wait in shared memory for the weights, in tiles of 8 places.
const FEW_SLOTS: usize = 6;
/// Slots per expert up to which they do so in tiles of 16 places.
const MORE_SLOTS: usize = 9;
/// Slots per expert up to which tiles are the smaller ones of `cuda/experts/tiled.cuh`.
const SOME_SLOTS: usize = 80;
/// Of `cuda/experts/tiled.cuh`: rows of a matrix that an item has, and threads of a block.
const TILED_FEATURES: usize = 192;
const TILED_THREADS: u32 = 512;
/// Of `cuda/experts/gather.cu`: threads and places of a block.
const GATHER_THREADS: u32 = 256;
const GATHER_ROWS: usize = 8;
/// Of `cuda/experts/projection.cuh`: numbers of a tile by which blocks tell each other how far they are.
const SIGNALS: usize = 2;

/// The kernels of a call, both projections'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// `cuda/experts/general.cu`: everything.
    General,
    /// `cuda/experts/single.cu`: a token, or few slots, in MXFP4.
    Single,
    /// `cuda/experts/resident.cuh`: few tokens for each expert, in tiles of 8 times `blocks` places.
    Resident { blocks: usize },
    /// `cuda/experts/tiled.cuh`: many tokens, on compute capability 9.0.
    Tiled(TileSize),
}

/// The sizes of `cuda/experts/tiled.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TileSize {
    Few,
    Many,
}

impl TileSize {
    /// Places of a tile.
    fn places(self) -> usize {
        match self {
            Self::Few => 96,
            Self::Many => 160,
        }
    }

    /// Bytes of shared memory of a block.
    fn shared(self, format: Format) -> usize {
        match (self, format) {
            (Self::Few, Format::Mxfp4 { .. }) => 208_896,
            (Self::Few, Format::Bf16 | Format::F16) => 222_208,
            (Self::Many, Format::Mxfp4 { .. }) => 221_184,
            (Self::Many, Format::Bf16 | Format::F16) => 230_400,
        }
    }
}

impl Path {
    /// The fastest that takes `num_slots` slots, a part of `batch`, of hidden states in `dtype`.
    pub(super) fn choose(experts: &Experts, num_slots: usize, batch: Batch, dtype: DType, device: Properties) -> Self {
        let fits = |path: &Self| path.takes(experts, num_slots, batch, dtype, device);
        let per_expert = batch.slots_per_expert();
        let (few, more) = (Self::Resident { blocks: 1 }, Self::Resident { blocks: 2 });
        let tiled = Self::Tiled(if per_expert <= SOME_SLOTS { TileSize::Few } else { TileSize::Many });
        let by_speed: &[Self] = if per_expert <= FEW_SLOTS {
            &[Self::Single, few]
        } else if per_expert <= MORE_SLOTS {
            &[more, tiled, few]
        } else {
            &[tiled, more, few]
        };
        by_speed.iter().copied().find(fits).unwrap_or(Self::General)
    }

    /// Where its kernels are.
    pub(super) fn binary(self) -> Binary {
        match self {
            Self::General => Binary::Experts,
            Self::Single => Binary::ExpertsSingle,
            Self::Resident { .. } => Binary::ExpertsResident,
            Self::Tiled(_) => Binary::ExpertsTiled,
        }
    }

    /// Places of a tile.
    pub(super) fn tile_rows(self) -> usize {
        match self {
            Self::General => GENERAL_TILE_ROWS,
            // Tiles of one place take the order 0.7 us longer.
            Self::Single => 8,
            Self::Resident { blocks } => 8 * blocks,
            Self::Tiled(size) => size.places(),
        }
    }

    fn takes(self, experts: &Experts, num_slots: usize, batch: Batch, dtype: DType, device: Properties) -> bool {
        let max_tiles = (num_slots / self.tile_rows()).saturating_add(experts.num_experts());
        let widest = experts.gate_up.weights().out_features().max(experts.down.weights().out_features());
        let max_items = max_tiles.saturating_mul(2 * widest / BAND_ROWS);
        match (self, format_of_both(experts, dtype)) {
            (Self::General, _) => true,
            (_, None) => false,
            (Self::Single, Some(format)) => {
                matches!(format, Format::Mxfp4 { .. })
                    && dtype == DType::BF16
                    && single::fits(experts, num_slots, batch, device)
            }
            (Self::Resident { blocks }, Some(format)) => {
                u32::try_from(max_items).is_ok() && Resident::new(format, experts, blocks, device).is_some()
            }
            (Self::Tiled(size), Some(format)) => {
                let is_exact = match format {
                    Format::Mxfp4 { has_small_scales } => has_small_scales && dtype == DType::BF16,
                    Format::Bf16 | Format::F16 => true,
                };
                device.is_hopper && is_exact && size.shared(format) <= device.max_shared
            }
        }
    }

    /// The general kernel for a projection over `max_tiles` tiles.
    pub(super) fn general_kernel(kind: &str, weights: &ExpertWeights, max_tiles: usize, dtype: DType) -> Kernel {
        let features = weights.out_features() / if kind == "gate_up" { 2 } else { 1 };
        let name = format!("{kind}_{}_{}", general_format(weights), dtype.as_str());
        Kernel { name, launch: general_launch(max_tiles, features), shape: None }
    }

    /// The kernel for both projections, which gives rows in `rows`, where it is not the general ones.
    pub(super) fn layer_kernel(
        self,
        experts: &Experts,
        max_tiles: usize,
        dtype: DType,
        rows: DType,
        device: Properties,
    ) -> Option<Kernel> {
        let format = format_of_both(experts, dtype)?;
        match self {
            Self::General | Self::Single => None,
            Self::Resident { blocks } => {
                let name = format!("resident_{}_{}_{blocks}", weights_name(format, dtype), dtype.as_str());
                Some(Resident::new(format, experts, blocks, device)?.kernel(name, experts, max_tiles, device))
            }
            Self::Tiled(size) => {
                let places = size.places();
                let name = format!("tiled_{places}_{}_{}_{}", format.name(), dtype.as_str(), rows.as_str());
                let row_blocks =
                    |projection: &ExpertProjection| projection.weights().out_features().div_ceil(TILED_FEATURES);
                let max_items = max_tiles.saturating_mul(row_blocks(&experts.gate_up) + row_blocks(&experts.down));
                let launch = layer_launch(max_items, TILED_THREADS, size.shared(format), device);
                Some(Kernel { name, launch, shape: None })
            }
        }
    }

    /// The kernel that brings hidden states into the order in which the layer kernel takes them, where it does not take them as
    /// they are.
    pub(super) fn gather_kernel(self, max_tiles: usize) -> Option<Kernel> {
        let Self::Tiled(size) = self else { return None };
        let places = size.places();
        let blocks = max_tiles.saturating_mul(places / GATHER_ROWS);
        let launch = Launch { starts_early: true, ..Launch::new(blocks, GATHER_THREADS, 0) };
        Some(Kernel { name: format!("gather_{places}"), launch, shape: None })
    }

    /// The dtype of rows on their way to sums in `sums`: whether the kernels round them, as who adds them up may.
    pub(super) fn rows_dtype(self, dtype: DType, sums: DType, hidden_size: usize) -> DType {
        let is_narrow = matches!(self, Self::Tiled(_)) && (dtype, sums) == (DType::BF16, DType::BF16);
        if is_narrow && hidden_size.is_multiple_of(HOME_BYTES / size_of::<u16>()) { DType::BF16 } else { DType::F32 }
    }

    /// How many numbers the blocks of its layer kernel tell each other.
    pub(super) fn num_signals(self, max_tiles: usize) -> usize {
        match self {
            Self::General | Self::Single => 0,
            Self::Resident { .. } | Self::Tiled(_) => SIGNALS * max_tiles,
        }
    }
}

/// The launch of a kernel for both projections. Its blocks wait for each other, so all of them must be there: one to a
/// multiprocessor.
fn layer_launch(max_items: usize, threads: u32, shared: usize, device: Properties) -> Launch {
    let blocks = device.num_multiprocessors.min(max_items).max(1);
    Launch { starts_early: true, cooperative: true, ..Launch::new(blocks, threads, shared) }
}

/// The format of both projections, if it is the same; scales count as small if those of both are.
fn format_of_both(experts: &Experts, dtype: DType) -> Option<Format> {
    let gate_up = fragments(experts.gate_up.weights(), dtype)?;
    let down = fragments(experts.down.weights(), dtype)?;
    match (gate_up, down) {
        (Format::Mxfp4 { has_small_scales: first }, Format::Mxfp4 { has_small_scales: second }) => {
            Some(Format::Mxfp4 { has_small_scales: first && second })
        }
        _ => (gate_up == down).then_some(gate_up),
    }
}

/// A kernel and how it is launched.
pub(super) struct Kernel {
    pub(super) name: String,
    pub(super) launch: Launch,
    /// Of the blocks of `cuda/experts/resident.cuh`.
    pub(super) shape: Option<Resident>,
}

/// The format in the names of kernels; scales that cannot be multiplied into bfloat16 weights have kernels of their own.
fn weights_name(format: Format, dtype: DType) -> &'static str {
    match format {
        Format::Mxfp4 { has_small_scales: false } if dtype == DType::BF16 => "mxfp4_wide",
        _ => format.name(),
    }
}

/// The launch of the general kernels.
pub(super) fn general_launch(max_tiles: usize, out_features: usize) -> Launch {
    Launch::new(max_tiles.saturating_mul(out_features.div_ceil(GENERAL_BAND)), GENERAL_THREADS, 0)
}

/// How weights are held, in the names of the general kernels.
pub(super) fn general_format(weights: &ExpertWeights) -> String {
    match &weights.values {
        Values::Dense(weight) => weight.dtype().as_str().into(),
        Values::Mxfp4 { .. } => "mxfp4".into(),
        Values::Fp8 { .. } => "fp8".into(),
        Values::Fragments(fragments) => format!("{}_fragments", fragments.format.name()),
    }
}

/// The format of weights in fragment order that tensor cores multiply by hidden states in `dtype`.
fn fragments(weights: &ExpertWeights, dtype: DType) -> Option<Format> {
    let Values::Fragments(fragments) = &weights.values else { return None };
    match (fragments.format, dtype) {
        (Format::Mxfp4 { .. }, DType::BF16 | DType::F16) | (Format::Bf16, DType::BF16) | (Format::F16, DType::F16) => {
            Some(fragments.format)
        }
        _ => None,
    }
}

/// The shape of a block of `cuda/experts/resident.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resident {
    /// Of a band, of `gate_up` and of `down`.
    pub(super) parts: [usize; 2],
    /// For the tokens of a tile.
    pub(super) rooms: usize,
    /// That a token has room for.
    pub(super) token_features: usize,
    /// That multiply.
    warps: usize,
    shared: usize,
}

impl Resident {
    /// As many warps and rooms as fit.
    fn new(format: Format, experts: &Experts, blocks: usize, device: Properties) -> Option<Self> {
        let features = [experts.hidden_size(), experts.intermediate_size()];
        if features.contains(&0) {
            return None;
        }
        let token_features = features[0].max(features[1]);
        let (values, scales) = format.unit_bytes();
        let parts =
            features.map(|features| (features / UNIT_COLUMNS * values / PART_BYTES).clamp(1, RESIDENT_MAX_PARTS));
        let room = 8 * blocks * (token_features + 8) * size_of::<u16>();
        let sums = RESIDENT_SUM_ROOMS * RESIDENT_MAX_PARTS * blocks * 32 * SUM_BYTES;
        // Units of a piece, and pieces that a warp has room for.
        let (units, slots) = if scales > 0 { (5, 2) } else { (1, 3) };
        let of_warp = slots * units * (values + scales);
        let max_shared = device.max_shared.saturating_sub(RESIDENT_STATIC_SHARED);
        let warps = |rooms: usize| (max_shared.saturating_sub(rooms * room + sums) / of_warp).min(RESIDENT_MAX_WARPS);
        let rooms = if warps(RESIDENT_MAX_ROOMS) == RESIDENT_MAX_WARPS { RESIDENT_MAX_ROOMS } else { 1 };
        let warps = warps(rooms);
        let shared = rooms * room + sums + warps * of_warp;
        (warps >= RESIDENT_MIN_WARPS).then_some(Self { parts, rooms, token_features, warps, shared })
    }

    fn kernel(self, name: String, experts: &Experts, max_tiles: usize, device: Properties) -> Kernel {
        let bands = (experts.gate_up.weights().out_features() + experts.down.weights().out_features()) / BAND_ROWS;
        let launch = layer_launch(max_tiles.saturating_mul(bands), 32 * (self.warps as u32 + 1), self.shared, device);
        Kernel { name, launch, shape: Some(self) }
    }
}
