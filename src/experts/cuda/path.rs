//! Which kernels take a call, and how they are launched.

use super::super::Experts;
use super::super::weights::{ExpertWeights, Values};
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
/// Bands of an item.
const RESIDENT_BANDS: usize = 1;
/// Slots per expert up to which tiles of 8 places are few enough, and those of 16.
const FEW_SLOTS: usize = 4;

/// The kernels of a call, both projections'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// `cuda/experts/general.cu`: everything.
    General,
    /// `cuda/experts/resident.cuh`: few tokens for each expert, in tiles of 8 times `blocks` places.
    Resident { blocks: usize },
}

impl Path {
    /// The fastest that takes `num_slots` slots of hidden states in `dtype`.
    pub(super) fn choose(experts: &Experts, num_slots: usize, dtype: DType, device: Properties) -> Self {
        let weights = [experts.gate_up.weights(), experts.down.weights()];
        let fits = |path: &Self| weights.iter().all(|weights| path.takes(weights, dtype, device));
        let per_expert = num_slots.div_ceil(experts.num_experts().max(1));
        let few = Self::Resident { blocks: 1 };
        let more = Self::Resident { blocks: 2 };
        let wanted = if per_expert <= FEW_SLOTS { [few, more] } else { [more, few] };
        wanted.into_iter().find(fits).unwrap_or(Self::General)
    }

    /// Where its kernels are.
    pub(super) fn binary(self) -> Binary {
        match self {
            Self::General => Binary::Experts,
            Self::Resident { .. } => Binary::ExpertsResident,
        }
    }

    /// Places of a tile.
    pub(super) fn tile_rows(self) -> usize {
        match self {
            Self::General => GENERAL_TILE_ROWS,
            Self::Resident { blocks } => 8 * blocks,
        }
    }

    fn takes(self, weights: &ExpertWeights, dtype: DType, device: Properties) -> bool {
        match self {
            Self::General => true,
            Self::Resident { blocks } => fragments(weights, dtype)
                .is_some_and(|format| Resident::new(format, weights.in_features(), blocks, device).is_some()),
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
            && let Some(resident) = Resident::new(format, weights.in_features(), blocks, device)
        {
            let (weights_name, dtype) = (weights_name(format, dtype), dtype.as_str());
            let name = format!("resident_{kind}_{weights_name}_{dtype}_{blocks}x{RESIDENT_BANDS}");
            let launch = resident.launch(max_tiles * weights.out_features() / BAND_ROWS, device);
            return Kernel { name, launch, warps: resident.warps };
        }
        let features = weights.out_features() / if kind == "gate_up" { 2 } else { 1 };
        let name = format!("{kind}_{}_{}", general_format(weights), dtype.as_str());
        Kernel { name, launch: general_launch(max_tiles, features), warps: 0 }
    }
}

/// A kernel and how it is launched.
pub(super) struct Kernel {
    pub(super) name: String,
    pub(super) launch: Launch,
    /// Warps of a group that multiply, of `cuda/experts/resident.cuh`.
    pub(super) warps: usize,
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
    shared: usize,
}

impl Resident {
    /// As many warps as share the units of a row best, in as many groups as have room.
    fn new(format: Format, in_features: usize, blocks: usize, device: Properties) -> Option<Self> {
        let units = in_features / UNIT_COLUMNS;
        let tokens = 8 * blocks * (in_features + 8) * size_of::<u16>();
        let (values, scales) = format.unit_bytes();
        let piece = (values + scales) * if scales > 0 { 3 } else { 1 };
        let of_warp = RESIDENT_SUMS * blocks * 512 + RESIDENT_SLOTS * piece;
        let fits = |warps: usize, groups: usize| tokens + groups * warps * of_warp <= device.max_shared;
        // Units that each step of the slowest warp brings forward.
        let at_once = |warps: usize| units as f64 / units.div_ceil(warps) as f64;
        let fitting = (1..=RESIDENT_MAX_WARPS.min(units)).filter(|&warps| fits(warps, 1));
        let warps = fitting.reduce(|best, warps| if at_once(warps) > at_once(best) { warps } else { best })?;
        let has_room = |groups: &usize| fits(warps, *groups) && groups * (warps + 1) <= MAX_WARPS[blocks - 1];
        let groups = (1..=RESIDENT_MAX_GROUPS).rev().find(has_room).unwrap_or(1);
        Some(Self { warps, groups, shared: tokens + groups * warps * of_warp })
    }

    fn launch(self, max_items: usize, device: Properties) -> Launch {
        let warps = self.groups * (self.warps + 1);
        let per_multiprocessor = (device.max_shared / self.shared).clamp(1, (MAX_WARPS[0] / warps).max(1));
        let blocks = (device.num_multiprocessors * per_multiprocessor).min(max_items).max(1);
        let launch = Launch::new(blocks, 32 * warps as u32, self.shared);
        Launch { starts_early: true, ..launch }
    }
}
