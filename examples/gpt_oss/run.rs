//! One generation, and the same one under the other routing.

use crate::arguments::Plan;
use crate::common::progress;
use crate::dump::dump_prompt;
use anyhow::Result;
use candle_moe::block::Load;
use candle_moe::ep::{Placement, Rebalancing};
use candle_moe::models::gpt_oss::{Cache, Logits, Model, Sampler};
use std::path::Path;
use std::time::Instant;

pub(crate) struct Generation {
    pub(crate) perfect_router: bool,
    pub(crate) generated_ids: Vec<u32>,
    pub(crate) prompt_seconds: f64,
    /// Forward passes of single tokens, and how long they took together.
    pub(crate) decode_steps: usize,
    pub(crate) decode_seconds: f64,
    /// Of prompt and generation, per layer.
    pub(crate) load: Vec<Load>,
}

impl Generation {
    pub(crate) fn run(model: &mut Model, plan: &Plan, dump: Option<&Path>) -> Result<Self> {
        let mut sampler = Sampler::new(plan.sampling)?;
        let mut choose = |logits: &[f32], _step: usize| sampler.sample(logits);
        Self::with(model, plan, plan.options.perfect_router, dump, &mut choose)
    }

    /// The same tokens in the same steps, so that loads and times can be compared.
    pub(crate) fn repeat(&self, model: &mut Model, plan: &Plan, perfect_router: bool) -> Result<Self> {
        model.moe_mut().set_perfect_router(perfect_router)?;
        let mut choose = |_: &[f32], step: usize| Ok(self.generated_ids[step]);
        let plan = Plan {
            max_new_tokens: self.generated_ids.len(),
            options: plan.options.clone(),
            prompt_ids: plan.prompt_ids.clone(),
            // The first run has stopped where it had to.
            eos_token_ids: Vec::new(),
            ..*plan
        };
        Self::with(model, &plan, perfect_router, None, &mut choose)
    }

    /// Where up to `num_physical` experts a layer should be, for its load.
    pub(crate) fn rebalanced(&self, ep_size: usize, num_physical: usize) -> candle_core::Result<Vec<Rebalancing>> {
        let of_layer = |Load { slots_per_expert, .. }: &Load| {
            Placement::contiguous(slots_per_expert.len(), ep_size)?.rebalanced(slots_per_expert, num_physical)
        };
        self.load.iter().map(of_layer).collect()
    }

    fn with(
        model: &mut Model,
        plan: &Plan,
        perfect_router: bool,
        dump: Option<&Path>,
        choose: &mut dyn FnMut(&[f32], usize) -> candle_core::Result<u32>,
    ) -> Result<Self> {
        model.moe().reset_load()?;
        let mut cache = Cache::new(model.config());
        let started = Instant::now();
        let bar = progress::bar(plan.prompt_ids.len());
        bar.set_message("prompt");
        let mut logits = match dump {
            Some(file) => dump_prompt(model, &plan.prompt_ids, &mut cache, file)?,
            None => model.prompt(&plan.prompt_ids, &mut cache, &mut |done| bar.set_position(done as u64))?,
        };
        bar.finish_and_clear();
        let prompt_seconds = started.elapsed().as_secs_f64();

        let bar = progress::bar(plan.max_new_tokens);
        bar.set_message("generation");
        let started = Instant::now();
        let mut generated_ids = Vec::new();
        let mut decode_steps = 0;
        while generated_ids.len() < plan.max_new_tokens {
            let id = choose(&logits, generated_ids.len())?;
            generated_ids.push(id);
            bar.inc(1);
            if plan.eos_token_ids.contains(&id) || generated_ids.len() == plan.max_new_tokens {
                break;
            }
            logits = model.forward(&[id], &mut cache, Logits::Last)?.flatten_all()?.to_vec1()?;
            decode_steps += 1;
        }
        bar.finish_and_clear();
        Ok(Self {
            perfect_router,
            generated_ids,
            prompt_seconds,
            decode_steps,
            decode_seconds: started.elapsed().as_secs_f64(),
            load: model.moe().load_per_layer()?,
        })
    }
}
