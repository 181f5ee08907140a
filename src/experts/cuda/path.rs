//! Which kernels take a call, and how they are launched.

use super::super::weights::{ExpertWeights, Values};
use super::super::{ExpertProjection, Experts};
use super::HOME_BYTES;
use super::fragments::{BAND_ROWS, Format, UNIT_COLUMNS};
use crate::cuda::{Binary, Launch, Properties};
use candle_core::DType;

/// Places of a tile of `cuda/experts/general.cu`, and output features of a block.
const GENERAL_TILE_ROWS: usize = 16;
const GENERAL_BAND: usize = 32;
const GENERAL_THREADS: u32 = 256;
/// Of `cuda/experts/resident.cuh`: pieces that a warp has room for, items of a group whose sums have room, warps of a group
/// that multiply and groups of a block, at most.
const RESIDENT_SLOTS: usize = 3;
const RESIDENT_SUMS: usize = 2;
const RESIDENT_MAX_WARPS: usize = 16;
const RESIDENT_MAX_GROUPS: usize = 2;
/// Warps of a block whose tokens are one block of 8, or two.
const MAX_WARPS: [usize; 2] = [32, 17];
/// Shared memory that its kernels have beside that of the launch.
const RESIDENT_STATIC_SHARED: usize = 2048;
/// Slots per expert up to which tokens wait in shared memory for the weights, in tiles of 8 places.
const FEW_SLOTS: usize = 6;
/// Slots per expert up to which tiles are the smaller ones of `cuda/experts/tiled.cuh`.
const SOME_SLOTS: usize = 80;
/// Of `cuda/experts/tiled.cuh`: rows of a matrix that an item has, and threads of a block.
const TILED_FEATURES: usize = 192;
const TILED_THREADS: u32 = 512;
/// Of `cuda/experts/gather.cu`: threads and places of a block.
const GATHER_THREADS: u32 = 256;
const GATHER_ROWS: usize = 8;
/// Of `cuda/experts/projection.cuh`: numbers by which all blocks meet.
const MEETING: usize = 2;

/// The kernels of a call, both projections'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// `cuda/experts/general.cu`: everything.
    General,
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
    /// The fastest that takes `num_slots` slots of hidden states in `dtype`.
    pub(super) fn choose(experts: &Experts, num_slots: usize, dtype: DType, device: Properties) -> Self {
        let weights = [experts.gate_up.weights(), experts.down.weights()];
        let fits = |path: &Self| weights.iter().all(|weights| path.takes(weights, num_slots, dtype, device));
        let per_expert = num_slots.div_ceil(experts.num_experts().max(1));
        // A kernel for the whole layer takes both projections in one format.
        let fits =
            |path: &Self| fits(path) && (!matches!(path, Self::Tiled(_)) || format_of_both(experts, dtype).is_some());
        let (few, more) = (Self::Resident { blocks: 1 }, Self::Resident { blocks: 2 });
        let tiled = Self::Tiled(if per_expert <= SOME_SLOTS { TileSize::Few } else { TileSize::Many });
        let by_speed: &[Self] = if per_expert <= FEW_SLOTS { &[few] } else { &[tiled, more, few] };
        by_speed.iter().copied().find(fits).unwrap_or(Self::General)
    }

    /// Where its kernels are.
    pub(super) fn binary(self) -> Binary {
        match self {
            Self::General => Binary::Experts,
            Self::Resident { .. } => Binary::ExpertsResident,
            Self::Tiled(_) => Binary::ExpertsTiled,
        }
    }

    /// Places of a tile.
    pub(super) fn tile_rows(self) -> usize {
        match self {
            Self::General => GENERAL_TILE_ROWS,
            Self::Resident { blocks } => 8 * blocks,
            Self::Tiled(size) => size.places(),
        }
    }

    fn takes(self, weights: &ExpertWeights, num_slots: usize, dtype: DType, device: Properties) -> bool {
        let max_tiles = (num_slots / self.tile_rows()).saturating_add(weights.num_experts());
        let max_items = max_tiles.saturating_mul(weights.out_features() / BAND_ROWS);
        match (self, fragments(weights, dtype)) {
            (Self::General, _) => true,
            (_, None) => false,
            (Self::Resident { blocks }, Some(format)) => {
                u32::try_from(max_items).is_ok() && Resident::new(format, &[weights], blocks, device).is_some()
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

    /// The kernel for a projection over `max_tiles` tiles.
    pub(super) fn kernel(
        self,
        kind: &str,
        weights: &ExpertWeights,
        max_tiles: usize,
        dtype: DType,
        device: Properties,
    ) -> Kernel {
        if let (Self::Resident { blocks }, Some(format)) = (self, fragments(weights, dtype))
            && let Some(resident) = Resident::new(format, &[weights], blocks, device)
        {
            let name = format!("resident_{kind}_{}_{}_{blocks}", weights_name(format, dtype), dtype.as_str());
            return resident.kernel(name, max_tiles * weights.out_features() / BAND_ROWS, device);
        }
        let features = weights.out_features() / if kind == "gate_up" { 2 } else { 1 };
        let name = format!("{kind}_{}_{}", general_format(weights), dtype.as_str());
        Kernel { name, launch: general_launch(max_tiles, features), warps: 0, token_features: 0 }
    }

    /// One kernel for both projections, where there is one, which gives rows in `rows`; the other kernels give f32.
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
            Self::Resident { blocks: 1 } if device.has_clusters => {
                let weights = [experts.gate_up.weights(), experts.down.weights()];
                let weights_name = weights_name(format, dtype);
                if weights_name == "mxfp4_wide" || (weights_name, dtype) == ("mxfp4", DType::F16) {
                    return None;
                }
                let resident = Resident::new(format, &weights, 1, device)?;
                let name = format!("resident_layer_{weights_name}_{}_1", dtype.as_str());
                let mut kernel = resident.kernel(name, max_tiles * weights[1].out_features() / BAND_ROWS, device);
                // Blocks wait for each other, so one to a multiprocessor.
                kernel.launch.blocks = kernel.launch.blocks.min(device.num_multiprocessors);
                kernel.launch.cooperative = true;
                Some(kernel)
            }
            Self::Tiled(size) => {
                let places = size.places();
                let name = format!("tiled_{places}_{}_{}_{}", format.name(), dtype.as_str(), rows.as_str());
                let row_blocks =
                    |projection: &ExpertProjection| projection.weights().out_features().div_ceil(TILED_FEATURES);
                let max_items = max_tiles.saturating_mul(row_blocks(&experts.gate_up) + row_blocks(&experts.down));
                let blocks = device.num_multiprocessors.min(max_items);
                let launch = Launch::new(blocks, TILED_THREADS, size.shared(format));
                let launch = Launch { starts_early: true, cooperative: true, ..launch };
                Some(Kernel { name, launch, warps: 0, token_features: 0 })
            }
            _ => None,
        }
    }

    /// The kernel that brings hidden states into the order in which the layer kernel takes them, where it does not take them as
    /// they are.
    pub(super) fn gather_kernel(self, max_tiles: usize) -> Option<Kernel> {
        let Self::Tiled(size) = self else { return None };
        let places = size.places();
        let blocks = max_tiles.saturating_mul(places / GATHER_ROWS);
        let launch = Launch { starts_early: true, ..Launch::new(blocks, GATHER_THREADS, 0) };
        Some(Kernel { name: format!("gather_{places}"), launch, warps: 0, token_features: 0 })
    }

    /// The dtype of rows on their way to sums in `sums`: whether the kernels round them, as who adds them up may.
    pub(super) fn rows_dtype(self, dtype: DType, sums: DType, hidden_size: usize) -> DType {
        let is_narrow = matches!(self, Self::Tiled(_)) && (dtype, sums) == (DType::BF16, DType::BF16);
        if is_narrow && hidden_size.is_multiple_of(HOME_BYTES / size_of::<u16>()) { DType::BF16 } else { DType::F32 }
    }

    /// How many numbers the blocks of its layer kernel tell each other.
    pub(super) fn num_signals(self, max_tiles: usize) -> usize {
        if matches!(self, Self::Tiled(_)) { MEETING + 2 * max_tiles } else { MEETING }
    }
}

/// The format of both projections, if it is the same.
fn format_of_both(experts: &Experts, dtype: DType) -> Option<Format> {
    let format = fragments(experts.gate_up.weights(), dtype)?;
    fragments(experts.down.weights(), dtype).filter(|down| *down == format)
}

/// A kernel and how it is launched.
pub(super) struct Kernel {
    pub(super) name: String,
    pub(super) launch: Launch,
    /// Of `cuda/experts/resident.cuh`: warps of a group that multiply, and features that a token has room for.
    pub(super) warps: usize,
    pub(super) token_features: usize,
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
#[derive(Debug, Clone, Copy)]
struct Resident {
    /// Of a group, that multiply.
    warps: usize,
    groups: usize,
    token_features: usize,
    shared: usize,
}

impl Resident {
    /// For all of `weights`: as many warps as share the units of the longest row best, in as many groups as have room.
    fn new(format: Format, weights: &[&ExpertWeights], blocks: usize, device: Properties) -> Option<Self> {
        let token_features = weights.iter().map(|weights| weights.in_features()).max()?;
        // A group has a band of its own.
        let min_bands = weights.iter().map(|weights| weights.out_features() / BAND_ROWS).min()?;
        let units = token_features / UNIT_COLUMNS;
        let tokens = 8 * blocks * (token_features + 8) * size_of::<u16>();
        let (values, scales) = format.unit_bytes();
        let piece = (values + scales) * if scales > 0 { 3 } else { 1 };
        let of_warp = RESIDENT_SUMS * blocks * 512 + RESIDENT_SLOTS * piece;
        let max_shared = device.max_shared.saturating_sub(RESIDENT_STATIC_SHARED);
        let fits = |warps: usize, groups: usize| tokens + groups * warps * of_warp <= max_shared;
        // Units that each step of the slowest warp brings forward.
        let at_once = |warps: usize| units as f64 / units.div_ceil(warps) as f64;
        let fitting = (1..=RESIDENT_MAX_WARPS.min(units)).filter(|&warps| fits(warps, 1));
        let warps = fitting.reduce(|best, warps| if at_once(warps) > at_once(best) { warps } else { best })?;
        let has_room = |groups: &usize| fits(warps, *groups) && groups * (warps + 1) <= MAX_WARPS[blocks - 1];
        let groups = (1..=RESIDENT_MAX_GROUPS.min(min_bands)).rev().find(has_room)?;
        Some(Self { warps, groups, token_features, shared: tokens + groups * warps * of_warp })
    }

    fn kernel(self, name: String, max_items: usize, device: Properties) -> Kernel {
        let warps = self.groups * (self.warps + 1);
        let per_multiprocessor = (device.max_shared / self.shared).clamp(1, (MAX_WARPS[0] / warps).max(1));
        let blocks = (device.num_multiprocessors * per_multiprocessor).min(max_items).max(1);
        let launch = Launch { starts_early: true, ..Launch::new(blocks, 32 * warps as u32, self.shared) };
        Kernel { name, launch, warps: self.warps, token_features: self.token_features }
    }
}
