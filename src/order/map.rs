//! Which physical experts hold each expert.

use super::{NO_EXPERT, OP};
use crate::copied::Copied;
use crate::host::with_slice;
use candle_core::{Device, Result, Tensor, bail};
use std::sync::Arc;

/// A placement with replicas: each of `num_experts` experts that routing knows is held by one or more physical experts.
///
/// Token `t` goes to replica `(t + turn) mod replicas` of its expert, the replicas in ascending order of their physical ids:
/// tokens spread evenly, and the same token always takes the same replica. `turn` (0 unless set) lets ranks that have one
/// token each begin with different replicas.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_moe::order::{ExpertMap, ExpertOrder};
/// // Expert 1 is held twice, by the physical experts 0 and 2; expert 0 by the physical expert 1.
/// let map = ExpertMap::new(2, &[1, 0, 1])?;
/// let topk_ids = Tensor::new(&[[1u32], [1], [0]], &Device::Cpu)?;
/// let order = ExpertOrder::with_map(&topk_ids, &map, 0..3)?;
/// assert_eq!(order.expert_counts.to_vec1::<u32>()?, [1, 1, 1]);
/// assert_eq!(order.sorted_slots.to_vec1::<u32>()?, [0, 2, 1]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ExpertMap {
    num_physical: usize,
    pub(super) turn: u32,
    /// `[num_experts + 1]`: where the replicas of each expert begin.
    pub(super) replica_offsets: Arc<Copied<u32>>,
    /// `[num_physical]`: physical ids by expert.
    pub(super) replicas: Arc<Copied<u32>>,
}

impl ExpertMap {
    /// The placement in which physical expert `p` holds expert `physical_to_expert[p]`.
    ///
    /// # Errors
    /// An expert that is not below `num_experts`, an expert without a physical one, more than `u32::MAX` physical experts.
    pub fn new(num_experts: usize, physical_to_expert: &[usize]) -> Result<Self> {
        let num_physical = physical_to_expert.len();
        if num_physical > u32::MAX as usize {
            bail!("{OP}: the map has {num_physical} physical experts, expected at most {}", u32::MAX)
        }
        if num_experts > num_physical {
            bail!("{OP}: num_experts is {num_experts}, expected at most the {num_physical} physical experts of the map")
        }
        let mut replica_offsets = vec![0u32; num_experts + 1];
        for (physical, &expert) in physical_to_expert.iter().enumerate() {
            if expert >= num_experts {
                bail!("{OP}: physical expert {physical} holds expert {expert}, expected less than {num_experts}")
            }
            replica_offsets[expert + 1] += 1;
        }
        if let Some(expert) = replica_offsets[1..].iter().position(|&replicas| replicas == 0) {
            bail!("{OP}: no physical expert holds expert {expert}")
        }
        for expert in 0..num_experts {
            replica_offsets[expert + 1] += replica_offsets[expert];
        }
        let mut next = replica_offsets.clone();
        let mut replicas = vec![0; num_physical];
        for (physical, &expert) in physical_to_expert.iter().enumerate() {
            replicas[next[expert] as usize] = physical as u32;
            next[expert] += 1;
        }
        Ok(Self {
            num_physical,
            turn: 0,
            replica_offsets: Arc::new(Copied::new(replica_offsets)),
            replicas: Arc::new(Copied::new(replicas)),
        })
    }

    /// The same placement, token `t` going to replica `(t + turn) mod replicas`.
    pub fn with_turn(self, turn: u32) -> Self {
        Self { turn, ..self }
    }

    /// Experts that routing knows.
    pub fn num_experts(&self) -> usize {
        self.replica_offsets.values().len() - 1
    }

    /// Physical experts, replicas included.
    pub fn num_physical(&self) -> usize {
        self.num_physical
    }

    /// The physical experts that hold `expert`, ascending.
    ///
    /// # Errors
    /// `expert` is not below [`num_experts`](Self::num_experts).
    pub fn replicas(&self, expert: usize) -> Result<&[u32]> {
        match self.replica_offsets.values().get(expert..expert.saturating_add(2)) {
            Some(&[first, end]) => Ok(&self.replicas.values()[first as usize..end as usize]),
            _ => bail!("{OP}: expert is {expert}, expected less than {}", self.num_experts()),
        }
    }

    /// The physical experts that the slots of `topk_ids` go to, u32 `[num_tokens, top_k]` like it; [`NO_EXPERT`] stays.
    ///
    /// Ordering them is [`ExpertOrder::with_map`](super::ExpertOrder::with_map); this is for who sends slots before they are
    /// ordered.
    ///
    /// # Errors
    /// Another rank or dtype, an id out of range, ids that are not on the CPU.
    pub fn physical_ids(&self, topk_ids: &Tensor) -> Result<Tensor> {
        let &[_, top_k] = topk_ids.dims() else {
            bail!("{OP}: topk_ids has shape {:?}, expected [num_tokens, top_k]", topk_ids.shape())
        };
        let num_experts = self.num_experts();
        let physical = |(slot, &id): (usize, &u32)| match id {
            NO_EXPERT => Ok(NO_EXPERT),
            id if (id as usize) < num_experts => Ok(self.physical(slot / top_k, id as usize) as u32),
            id => bail!("{OP}: slot {slot} has expert id {id}, expected less than num_experts, which is {num_experts}"),
        };
        let ids = with_slice(topk_ids, OP, "topk_ids", |ids: &[u32]| {
            ids.iter().enumerate().map(physical).collect::<Result<Vec<_>>>()
        })?;
        Tensor::from_vec(ids, topk_ids.shape(), &Device::Cpu)
    }

    /// The physical expert of a token's expert, which is below `num_experts`.
    pub(super) fn physical(&self, token: usize, expert: usize) -> usize {
        let offsets = self.replica_offsets.values();
        let replicas = &self.replicas.values()[offsets[expert] as usize..offsets[expert + 1] as usize];
        let count = replicas.len();
        replicas[(token % count + self.turn as usize % count) % count] as usize
    }
}
