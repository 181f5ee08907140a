//! The cache of perfect logits.

use super::Plan;
use crate::host::{checked_product, try_filled};
use candle_core::{DType, Device, DeviceLocation, Result, Tensor, bail};
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

pub(super) const OP: &str = "perfect-router store";

/// The logit of a planned expert, and of every other.
///
/// Exact in f16 and bf16; the sigmoids (0.99995 and 0.00005) and the softmax values stay apart too, so that every routing
/// method selects the plan.
const PLANNED: f32 = 10.0;
const OTHERS: f32 = -10.0;

/// Rows of a new buffer, so that single tokens do not grow it one by one.
const MIN_ROWS: usize = 16;

/// What the logits depend on. Not the number of tokens: row `t` is the same however many rows are asked for.
///
/// Plans are equal when their parameters are: `num_experts`, `top_k`, `ep_size` and `ep_rank`, groups that are a limit, a
/// hot spot of some tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PerfectRouterKey {
    /// The plan.
    pub plan: Plan,
    /// The dtype of the logits: f32, f16 or bf16.
    pub dtype: DType,
}

/// A snapshot of what a store holds and how it was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreStatistics {
    /// Buffers, one per key and [`Device`], of which there can be several for one device of the machine.
    pub entries: usize,
    /// Rows of all buffers.
    pub rows: usize,
    /// Bytes of all buffers, those on CUDA that were outgrown too.
    pub bytes: usize,
    /// Requests that an existing buffer served.
    pub hits: u64,
    /// Requests that built or grew a buffer.
    pub misses: u64,
}

/// Perfect logits by key, shared by all layers and threads.
///
/// One growing buffer per key and device serves every request as a narrowed view of its first rows: no copy and, once
/// [reserved](Self::reserve), no allocation and a stable address. Growth builds a new buffer and leaves views of the old
/// one alive and unchanged. On CUDA the old one itself stays too, until [`clear`](Self::clear): a captured graph knows
/// its address only. Buffers at least double, as long as there is memory, so all old ones together take no more than the
/// newest.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_moe::perfect_router::{PerfectRouterKey, PerfectRouterStore, Plan};
/// let store = PerfectRouterStore::new();
/// let key = PerfectRouterKey { plan: Plan::new(8, 2, 4, 0)?, dtype: DType::F32 };
/// store.reserve(&key, 1024, &Device::Cpu)?;
/// let logits = store.logits(&key, 3, &Device::Cpu)?;
/// assert_eq!(logits.dims(), [3, 8]);
/// assert_eq!(store.statistics().hits, 1);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct PerfectRouterStore {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// One for each [`Device`] of the place: what is made with one does not meet what is made with another of the same place.
    buffers: HashMap<(PerfectRouterKey, DeviceLocation), Vec<Tensor>>,
    /// Buffers on CUDA that were outgrown: graphs may read them, and kernels of other threads, whose streams do not wait
    /// for the one on which they would be freed.
    outgrown: Vec<Tensor>,
    hits: u64,
    misses: u64,
}

impl PerfectRouterStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// The store of the process.
    pub fn global() -> &'static Self {
        static GLOBAL: LazyLock<PerfectRouterStore> = LazyLock::new(PerfectRouterStore::new);
        &GLOBAL
    }

    /// The logits of the first `num_tokens` tokens, `[num_tokens, num_experts]` in the key's dtype: a view.
    ///
    /// # Errors
    /// Another dtype than f32, f16 and bf16, or a size that does not fit memory.
    pub fn logits(&self, key: &PerfectRouterKey, num_tokens: usize, device: &Device) -> Result<Tensor> {
        self.logits_from(key, 0, num_tokens, device)
    }

    /// The logits of `num_tokens` tokens from `first_token` on, which may lie anywhere: the plan repeats.
    ///
    /// A sequence that is decoded step by step continues its plan this way; with `first_token = 0` the address of the
    /// view stays the same, as a CUDA graph needs.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn logits_from(
        &self,
        key: &PerfectRouterKey,
        first_token: usize,
        num_tokens: usize,
        device: &Device,
    ) -> Result<Tensor> {
        let first = first_token % key.plan.period();
        let Some(rows) = first.checked_add(num_tokens) else {
            bail!("{OP}: num_tokens is {num_tokens}, expected at most {}", usize::MAX - first)
        };
        let mut state = self.lock();
        let (buffer, grown) = state.buffer(key, rows, device)?;
        if grown {
            state.misses += 1
        } else {
            state.hits += 1
        }
        drop(state);
        buffer.narrow(0, first, num_tokens)
    }

    /// Makes room for `max_num_tokens` rows, so that no later request up to that size allocates or moves the buffer.
    ///
    /// Requests that start at another token than 0 need [`Plan::period`] rows more. Not counted as a request.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn reserve(&self, key: &PerfectRouterKey, max_num_tokens: usize, device: &Device) -> Result<()> {
        self.lock().buffer(key, max_num_tokens, device).map(|_| ())
    }

    /// What the store holds and how it was used since it was made or cleared.
    pub fn statistics(&self) -> StoreStatistics {
        let state = self.lock();
        let bytes = |buffer: &Tensor| buffer.elem_count() * buffer.dtype().size_in_bytes();
        StoreStatistics {
            entries: state.buffers.values().flatten().count(),
            rows: state.buffers.values().flatten().map(|buffer| buffer.dims()[0]).sum(),
            bytes: state.buffers.values().flatten().chain(&state.outgrown).map(bytes).sum(),
            hits: state.hits,
            misses: state.misses,
        }
    }

    /// Forgets every buffer and the statistics. Views that are still alive stay valid.
    ///
    /// A graph that was captured with a view must not be launched any more, and what other threads have put on their
    /// streams must be done.
    pub fn clear(&self) {
        *self.lock() = State::default();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that can panic, so a poisoned lock is still good.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The buffer of `key` with at least `rows` rows, and whether it had to be built or grown.
    fn buffer(&mut self, key: &PerfectRouterKey, rows: usize, device: &Device) -> Result<(Tensor, bool)> {
        let buffers = self.buffers.entry((key.clone(), device.location())).or_default();
        let held = buffers.iter_mut().find(|buffer| buffer.device().same_device(device));
        if let Some(buffer) = held.as_deref().filter(|buffer| buffer.dims()[0] >= rows) {
            return Ok((buffer.clone(), false));
        }
        let twice = held.as_deref().map_or(MIN_ROWS, |buffer| buffer.dims()[0].saturating_mul(2));
        // Doubling is a convenience: what was asked for is enough.
        let buffer = generate(key, rows.max(twice), device).or_else(|_| generate(key, rows, device))?;
        match held {
            Some(held) => {
                let outgrown = std::mem::replace(held, buffer.clone());
                self.outgrown.extend(Some(outgrown).filter(|buffer| buffer.device().is_cuda()));
            }
            None => buffers.push(buffer.clone()),
        }
        Ok((buffer, true))
    }
}

fn generate(key: &PerfectRouterKey, rows: usize, device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        let both = [PLANNED, OTHERS];
        return match key.dtype {
            DType::F32 => super::cuda::generate::<f32>(&key.plan, rows, device, both.map(f32::to_bits)),
            DType::F16 => {
                super::cuda::generate::<f16>(&key.plan, rows, device, both.map(|v| f16::from_f32(v).to_bits().into()))
            }
            DType::BF16 => {
                super::cuda::generate::<bf16>(&key.plan, rows, device, both.map(|v| bf16::from_f32(v).to_bits().into()))
            }
            dtype => bail!("{OP}: dtype is {dtype:?}, expected f32, f16 or bf16"),
        };
    }
    match key.dtype {
        DType::F32 => generate_as::<f32>(&key.plan, rows, device),
        DType::F16 => generate_as::<f16>(&key.plan, rows, device),
        DType::BF16 => generate_as::<bf16>(&key.plan, rows, device),
        dtype => bail!("{OP}: dtype is {dtype:?}, expected f32, f16 or bf16"),
    }
}

fn generate_as<L: candle_core::WithDType>(plan: &Plan, rows: usize, device: &Device) -> Result<Tensor> {
    let num_experts = plan.num_experts();
    let len = checked_product(OP, ("num_tokens", rows), ("num_experts", num_experts))?;
    let mut logits = try_filled(OP, L::from_f64(OTHERS.into()), len)?;
    let topk_ids = plan.topk_ids(0, rows)?;
    for (row, ids) in logits.chunks_exact_mut(num_experts).zip(topk_ids.chunks_exact(plan.top_k())) {
        ids.iter().for_each(|&expert| row[expert as usize] = L::from_f64(PLANNED.into()));
    }
    Tensor::from_vec(logits, (rows, num_experts), device)
}
