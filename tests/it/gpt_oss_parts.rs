//! The parts of GPT-OSS that the goldens do not reach: configurations, sampling, the other layouts of checkpoints, and
//! checkpoints with something wrong.

use crate::checkpoint::Folder;
use crate::gpt_oss::{goldens, max_distance, options, prompt, tiny_folder, whole_prompt};
use candle_core::{DType, Device, Tensor};
use candle_moe::block::MoeBlock;
use candle_moe::checkpoint::Checkpoint;
use candle_moe::ep::{Placement, Reduction, Strategy, Topology};
use candle_moe::experts::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, Linear};
use candle_moe::models::gpt_oss::{Config, Decoder, Model, MoeOptions, Sampler, SamplingConfig, load_moe_block};
use candle_moe::routing::{Router, RoutingMethod};
use serde_json::{Value, json};
use std::collections::HashMap;

fn published() -> Value {
    serde_json::from_str(&std::fs::read_to_string(format!("{}/config.json", tiny_folder())).unwrap()).unwrap()
}

fn parsed(change: impl FnOnce(&mut Value)) -> candle_core::Result<Config> {
    let mut config = published();
    change(&mut config);
    Config::from_json(&config.to_string())
}

#[test]
fn older_and_newer_spellings_of_the_configuration_mean_the_same() {
    let base = parsed(|_| ()).unwrap();
    let newer = parsed(|c| {
        let mut rope = c["rope_scaling"].take();
        rope["rope_theta"] = c["rope_theta"].take();
        c["rope_parameters"] = rope;
        c["eos_token_id"] = json!([511, 510]);
        c["swiglu_alpha"] = json!(1.5);
        let object = c.as_object_mut().unwrap();
        for key in ["rope_scaling", "rope_theta", "num_experts_per_tok", "layer_types"] {
            object.remove(key);
        }
    })
    .unwrap();
    assert_eq!(newer.rope, base.rope);
    assert_eq!((base.top_k, newer.top_k), (4, 4));
    assert_eq!(newer.sliding_layers, base.sliding_layers);
    assert_eq!((base.eos_token_ids, newer.eos_token_ids), (vec![511], vec![511, 510]));
    assert_eq!((base.swiglu_alpha, newer.swiglu_alpha), (1.702, 1.5));
}

/// What `original/config.json` says of the tiny model.
fn original_config() -> Value {
    json!({
        "num_hidden_layers": 4,
        "num_experts": 8,
        "experts_per_token": 4,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 192,
        "swiglu_limit": 7.0,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 16,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    })
}

#[test]
fn the_spelling_of_the_original_folder_means_the_same() {
    let published = parsed(|c| c["eos_token_id"] = Value::Null).unwrap();
    let original = Config::from_json(&original_config().to_string()).unwrap();
    let text = |config: &Config| format!("{config:?}").replace("quant_method: Some(\"mxfp4\")", "quant_method: None");
    assert_eq!(text(&original), text(&published));
    let changed = |change: fn(&mut Value)| {
        let mut config = original_config();
        change(&mut config);
        Config::from_json(&config.to_string())
    };
    let other = changed(|c| {
        c["rope_ntk_alpha"] = json!(2.0);
        c["rope_ntk_beta"] = json!(8.0);
        c["rope_scaling_factor"] = json!(4.0);
        c["initial_context_length"] = json!(100);
    });
    let rope = other.unwrap().rope;
    assert_eq!((rope.beta_slow, rope.beta_fast, rope.factor), (2.0, 8.0, 4.0));
    assert_eq!((rope.original_max_position_embeddings, rope.truncate), (100, false));
    for (vocab_size, eos) in [(200_002, vec![]), (200_003, vec![200_002]), (201_088, vec![200_002])] {
        let mut config = original_config();
        config["vocab_size"] = json!(vocab_size);
        assert_eq!(Config::from_json(&config.to_string()).unwrap().eos_token_ids, eos, "vocabulary of {vocab_size}");
    }
    let error = changed(|c| _ = c.as_object_mut().unwrap().remove("num_experts")).unwrap_err().to_string();
    assert!(error.contains("num_local_experts") && error.contains("num_experts"), "{error}");
    let error = changed(|c| c["rope_scaling_factor"] = json!(0.5)).unwrap_err().to_string();
    assert!(error.contains("rope factor is 0.5"), "{error}");
}

#[test]
fn every_mistake_in_a_configuration_is_named() {
    for (field, value, message) in [
        ("hidden_size", json!(0), "hidden_size is 0"),
        ("vocab_size", json!(1u64 << 60), "vocab_size"),
        ("num_hidden_layers", json!(1u64 << 60), "num_hidden_layers"),
        ("num_hidden_layers", json!(5), "layer_types has 4 entries, expected 5"),
        ("num_experts_per_tok", json!(9), "num_experts_per_tok is 9, expected at most 8"),
        ("num_key_value_heads", json!(3), "num_attention_heads is 4, expected a multiple of num_key_value_heads"),
        ("head_dim", json!(33), "head_dim is 33"),
        ("layer_types", json!(["a", "b", "c", "d"]), "layer type \"a\""),
        ("attention_bias", json!(false), "attention_bias"),
        ("tie_word_embeddings", json!(true), "tie_word_embeddings"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps is -1"),
        ("swiglu_limit", json!(0.0), "swiglu_limit is 0"),
        ("rope_theta", json!(0.5), "rope_theta"),
        ("sliding_window", json!(0), "sliding_window is 0"),
        ("hidden_size", json!("big"), "invalid type"),
        ("hidden_size", json!(-4), "invalid value"),
        ("quantization_config", json!({"quant_method": "awq"}), "quant_method is \"awq\", expected mxfp4"),
    ] {
        let error = parsed(|c| c[field] = value).unwrap_err().to_string();
        assert!(error.contains(message), "{field}: {error:?} does not say {message:?}");
    }
    for (field, value, message) in [
        ("rope_type", json!("linear"), "rope_type is \"linear\""),
        ("factor", json!(0.0), "factor is 0"),
        ("beta_fast", json!(0.5), "beta_fast is 0.5"),
        ("original_max_position_embeddings", json!(0), "original_max_position_embeddings is 0"),
    ] {
        let error = parsed(|c| c["rope_scaling"][field] = value).unwrap_err().to_string();
        assert!(error.contains(message), "{field}: {error:?} does not say {message:?}");
    }
    let missing = parsed(|c| _ = c.as_object_mut().unwrap().remove("vocab_size")).unwrap_err().to_string();
    assert!(missing.contains("vocab_size"), "{missing}");
    assert!(Config::from_json("").is_err());
}

fn sampler(temperature: f64, top_p: f64, seed: u64) -> Sampler {
    Sampler::new(SamplingConfig { temperature, top_p, seed }).unwrap()
}

#[test]
fn greedy_takes_the_best_token_and_the_lower_id_of_a_tie() {
    let mut greedy = Sampler::new(SamplingConfig::GREEDY).unwrap();
    assert_eq!(greedy.sample(&[1.0, 3.0, f32::NAN, 3.0]).unwrap(), 1);
    assert_eq!(greedy.sample(&[f32::NAN, f32::NEG_INFINITY, -5.0]).unwrap(), 2);
    assert_eq!(sampler(1.0, 1.0, 0).sample(&[0.0, f32::INFINITY, 1.0]).unwrap(), 1);
    for nothing in [&[][..], &[f32::NAN, f32::NEG_INFINITY]] {
        assert!(greedy.sample(nothing).is_err());
    }
}

#[test]
fn samples_follow_the_softmax() {
    let logits = [0.0, 1.0, 2.0, f32::NAN];
    for temperature in [0.5, 1.0, 2.0] {
        let weights = [0.0, 1.0, 2.0].map(|l: f64| (l / temperature).exp());
        let mut sampler = sampler(temperature, 1.0, 42);
        let mut counts = [0usize; 4];
        let samples = 20_000;
        (0..samples).for_each(|_| counts[sampler.sample(&logits).unwrap() as usize] += 1);
        assert_eq!(counts[3], 0, "NaN is never chosen");
        for (count, weight) in counts.iter().zip(weights) {
            let (found, expected) = (*count as f64 / samples as f64, weight / weights.iter().sum::<f64>());
            assert!((found - expected).abs() < 0.02, "temperature {temperature}: {found}, expected {expected}");
        }
    }
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_it() {
    // Probabilities 0.5, 0.3, 0.2.
    let logits = [0.5f32.ln(), 0.2f32.ln(), 0.3f32.ln()];
    let chosen = |top_p: f64| {
        let mut sampler = sampler(1.0, top_p, 7);
        let mut ids: Vec<_> = (0..500).map(|_| sampler.sample(&logits).unwrap()).collect();
        ids.sort();
        ids.dedup();
        ids
    };
    assert_eq!(chosen(1e-9), [0]);
    assert_eq!(chosen(0.49), [0]);
    assert_eq!(chosen(0.6), [0, 2]);
    assert_eq!(chosen(0.79), [0, 2]);
    assert_eq!(chosen(0.9), [0, 1, 2]);
}

#[test]
fn a_seed_repeats_and_another_does_not() {
    let logits = vec![0.0; 100];
    let draw = |seed| {
        let mut sampler = sampler(1.0, 0.9, seed);
        (0..50).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn bad_sampling_arguments_are_named() {
    for (temperature, top_p, name) in [
        (-1.0, 1.0, "temperature"),
        (f64::NAN, 1.0, "temperature"),
        (f64::INFINITY, 1.0, "temperature"),
        (1.0, 0.0, "top_p"),
        (1.0, 1.1, "top_p"),
        (1.0, f64::NAN, "top_p"),
    ] {
        let error = Sampler::new(SamplingConfig { temperature, top_p, seed: 0 }).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

type Tensors = HashMap<String, Tensor>;

fn tiny() -> Tensors {
    let load =
        |shard| candle_core::safetensors::load(format!("{}/{shard}.safetensors", tiny_folder()), &Device::Cpu).unwrap();
    ["model-00001-of-00002", "model-00002-of-00002"].into_iter().flat_map(load).collect()
}

/// A model in one of its layouts.
#[derive(Clone)]
pub(crate) struct Stored {
    config: Value,
    tensors: Tensors,
}

impl Stored {
    fn published() -> Self {
        Self { config: published(), tensors: tiny() }
    }

    /// As in the folder `original/` of the published repositories.
    pub(crate) fn original() -> Self {
        let mut left = tiny();
        let mut take = |name: String| left.remove(&name).unwrap();
        let mut tensors = Tensors::new();
        for (from, to) in [
            ("model.embed_tokens.weight", "embedding.weight"),
            ("model.norm.weight", "norm.scale"),
            ("lm_head.weight", "unembedding.weight"),
        ] {
            tensors.insert(to.into(), take(from.into()));
        }
        for layer in 0..4 {
            for (from, to) in [
                ("input_layernorm.weight", "attn.norm.scale"),
                ("self_attn.sinks", "attn.sinks"),
                ("self_attn.o_proj.weight", "attn.out.weight"),
                ("self_attn.o_proj.bias", "attn.out.bias"),
                ("post_attention_layernorm.weight", "mlp.norm.scale"),
                ("mlp.router.weight", "mlp.gate.weight"),
                ("mlp.router.bias", "mlp.gate.bias"),
                ("mlp.experts.gate_up_proj_blocks", "mlp.mlp1_weight.blocks"),
                ("mlp.experts.gate_up_proj_scales", "mlp.mlp1_weight.scales"),
                ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
                ("mlp.experts.down_proj_blocks", "mlp.mlp2_weight.blocks"),
                ("mlp.experts.down_proj_scales", "mlp.mlp2_weight.scales"),
                ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
            ] {
                tensors.insert(format!("block.{layer}.{to}"), take(format!("model.layers.{layer}.{from}")));
            }
            for part in ["weight", "bias"] {
                let parts = ["q", "k", "v"].map(|p| take(format!("model.layers.{layer}.self_attn.{p}_proj.{part}")));
                tensors.insert(format!("block.{layer}.attn.qkv.{part}"), Tensor::cat(&parts, 0).unwrap());
            }
        }
        assert!(left.is_empty(), "{left:?}");
        Self { config: original_config(), tensors }
    }

    /// As third parties publish it in `dtype`: decoded, transposed, gate and up still interleaved.
    pub(crate) fn decoded(dtype: DType) -> Self {
        let mut config = published();
        config.as_object_mut().unwrap().remove("quantization_config");
        let mut tensors = tiny();
        let names: Vec<_> = tensors.keys().filter_map(|name| name.strip_suffix("_blocks").map(String::from)).collect();
        assert_eq!(names.len(), 2 * 4);
        for name in names {
            let mut take = |suffix: &str| tensors.remove(&format!("{name}_{suffix}")).unwrap();
            let exact = decode(&take("blocks"), &take("scales"));
            let stored = exact.to_dtype(dtype).unwrap();
            let back = stored.to_dtype(DType::F32).unwrap();
            assert_eq!(flat(&back), flat(&exact), "{name} is not exact in {dtype:?}");
            tensors.insert(name, stored.transpose(1, 2).unwrap().contiguous().unwrap());
        }
        Self { config, tensors }
    }

    /// In a folder of `shards` files, with an index where there are several.
    pub(crate) fn write(&self, shards: usize) -> Folder {
        let folder = Folder::new();
        let write = |name: &str, json: &Value| std::fs::write(folder.path().join(name), json.to_string()).unwrap();
        write("config.json", &self.config);
        if shards == 1 {
            candle_core::safetensors::save(&self.tensors, folder.path().join("model.safetensors")).unwrap();
            return folder;
        }
        let mut names: Vec<_> = self.tensors.keys().collect();
        names.sort();
        let mut weight_map = serde_json::Map::new();
        for (shard, names) in names.chunks(names.len().div_ceil(shards)).enumerate() {
            let file = format!("model--{:05}-of-{shards:05}.safetensors", shard + 1);
            let part: Tensors = names.iter().map(|&name| (name.clone(), self.tensors[name].clone())).collect();
            candle_core::safetensors::save(&part, folder.path().join(&file)).unwrap();
            weight_map.extend(names.iter().map(|&name| (name.clone(), Value::from(file.clone()))));
        }
        write("model.safetensors.index.json", &json!({ "weight_map": weight_map }));
        folder
    }

    /// Why it cannot be loaded.
    fn error(&self) -> String {
        let options = options(DType::F32, 2, Reduction::SlotOrder);
        let outcome = Model::load(self.write(1).path(), &options, &|_, _| ());
        outcome.map(|_| ()).unwrap_err().to_string()
    }

    /// Why it cannot be loaded with this tensor changed or taken away.
    fn error_with(&self, name: &str, change: impl FnOnce(&Tensor) -> Option<Tensor>) -> String {
        let mut changed = self.clone();
        let tensor = changed.tensors.remove(name).unwrap();
        changed.tensors.extend(change(&tensor).map(|tensor| (name.to_string(), tensor)));
        changed.error()
    }
}

/// f32 `[num_experts, out_features, in_features]` of MXFP4 blocks and scales.
fn decode(blocks: &Tensor, scales: &Tensor) -> Tensor {
    const TABLE: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let &[num_experts, rows, num_blocks, 16] = blocks.dims() else { panic!("{:?}", blocks.shape()) };
    let bytes = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let (blocks, scales) = (bytes(blocks), bytes(scales));
    let value = |nibble: u8, scale: u8| {
        let sign = if nibble & 8 == 0 { 1.0 } else { -1.0 };
        sign * TABLE[usize::from(nibble & 7)] * 2f32.powi(i32::from(scale) - 127)
    };
    let pair = |(i, byte): (usize, &u8)| [byte & 15, byte >> 4].map(|nibble| value(nibble, scales[i / 16]));
    let values: Vec<f32> = blocks.iter().enumerate().flat_map(pair).collect();
    Tensor::from_vec(values, (num_experts, rows, 32 * num_blocks), &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn logits(folder: &std::path::Path, dtype: DType, ep_size: usize) -> Vec<f32> {
    let options = options(dtype, ep_size, Reduction::SlotOrder);
    whole_prompt(&mut Model::load(folder, &options, &|_, _| ()).unwrap(), &prompt(&goldens()))
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn the_original_layout_gives_the_published_logits_to_the_bit() {
    let stored = Stored::original();
    for shards in [1, 2] {
        let folder = stored.write(shards);
        for (dtype, ep_size) in [(DType::F32, 1), (DType::F32, 2), (DType::F32, 3), (DType::BF16, 2)] {
            let expected = logits(tiny_folder().as_ref(), dtype, 1);
            let found = logits(folder.path(), dtype, ep_size);
            let distance = max_distance(&found, &expected);
            assert!(same_bits(&found, &expected), "{shards} files, {dtype:?}, ep_size {ep_size}: {distance} away");
        }
    }
}

#[test]
fn the_bf16_layout_gives_the_published_logits_to_the_bit() {
    let expected = logits(tiny_folder().as_ref(), DType::F32, 1);
    let first = logits(Stored::decoded(DType::BF16).write(1).path(), DType::F32, 1);
    assert!(same_bits(&first, &expected), "{} away", max_distance(&first, &expected));
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let folder = Stored::decoded(dtype).write(2);
        for ep_size in [1, 2, 3] {
            assert!(same_bits(&logits(folder.path(), DType::F32, ep_size), &first), "{dtype:?}, ep_size {ep_size}");
        }
    }
}

#[test]
fn a_rank_reads_only_its_own_experts_in_every_layout() {
    for (stored, is_expert) in [
        (Stored::published(), ".experts."),
        (Stored::original(), ".mlp.mlp"),
        (Stored::decoded(DType::BF16), ".experts."),
    ] {
        let (folder, config) = (stored.write(2), Config::from_json(&stored.config.to_string()).unwrap());
        for (ep_size, ep_rank) in [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)] {
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let options = options(DType::F32, ep_size, Reduction::SlotOrder);
            load_moe_block(&checkpoint, &config, 1, &options, ep_rank).unwrap();
            let experts = Topology::new(8, ep_size, ep_rank).unwrap().local_experts();
            for name in checkpoint.names().filter(|name| name.contains(is_expert)) {
                let bytes = checkpoint.info(name).unwrap().bytes / 8;
                let expected = match name.contains(".1.") {
                    true => vec![experts.start as u64 * bytes..experts.end as u64 * bytes],
                    false => Vec::new(),
                };
                assert_eq!(checkpoint.ranges_read(name), expected, "{name}, rank {ep_rank} of {ep_size}");
            }
        }
    }
}

#[test]
fn experts_may_be_placed_anywhere_in_every_layout() {
    // One placement for each layer; ranks of other sizes, experts out of order, replicas.
    let placements: Vec<Placement> = [
        [vec![7, 0, 1], vec![2, 3, 4, 5, 6], vec![0]],
        [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7, 3]],
        [vec![5], vec![4, 0, 6, 7, 5], vec![3, 1, 2]],
        [vec![0, 1, 2, 3, 4, 5, 6, 7], vec![1, 2], vec![7, 5]],
    ]
    .iter()
    .map(|ranks| Placement::explicit(8, ranks).unwrap())
    .collect();
    for stored in [Stored::published(), Stored::original(), Stored::decoded(DType::BF16)] {
        let folder = stored.write(2);
        let expected = logits(folder.path(), DType::F32, 1);
        for strategy in [Strategy::Gather, Strategy::Exchange] {
            let options = options(DType::F32, 3, Reduction::SlotOrder);
            let options = MoeOptions { placements: Some(placements.clone()), strategy: Some(strategy), ..options };
            let mut model = Model::load(folder.path(), &options, &|_, _| ()).unwrap();
            assert_eq!(model.moe().strategy(3).unwrap().strategy(), strategy);
            let found = whole_prompt(&mut model, &prompt(&goldens()));
            assert!(same_bits(&found, &expected), "{strategy}: {} away", max_distance(&found, &expected));
        }
    }
    let folder = Stored::published().write(1);
    let error = |placements: Vec<Placement>, ep_size: usize| {
        let options = MoeOptions { placements: Some(placements), ..options(DType::F32, ep_size, Reduction::SlotOrder) };
        Model::load(folder.path(), &options, &|_, _| ()).unwrap_err().to_string()
    };
    let three = error(placements[..3].to_vec(), 3);
    assert!(three.contains("placements has 3 layers") && three.contains("MoE layer 3"), "{three}");
    let other = error(placements, 2);
    assert!(other.contains("placements[0] is of 8 experts on 3 ranks") && other.contains("ep_size = 2"), "{other}");
}

#[test]
fn a_model_reads_every_byte_once_in_every_layout() {
    for stored in [Stored::published(), Stored::original(), Stored::decoded(DType::BF16)] {
        let folder = stored.write(1);
        let config = Config::from_json(&stored.config.to_string()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        Decoder::load(&checkpoint, &config, DType::F32, &Device::Cpu).unwrap();
        let dense = |name: &&str| !["experts", "router", "mlp.gate", "mlp.mlp"].iter().any(|part| name.contains(part));
        let expected = checkpoint.names().filter(dense).map(|name| checkpoint.info(name).unwrap().bytes).sum::<u64>();
        assert_eq!(checkpoint.bytes_read(), expected);
        for (layer, ep_rank) in (0..4).flat_map(|layer| [0, 1, 2].map(|ep_rank| (layer, ep_rank))) {
            let options = options(DType::F32, 3, Reduction::SlotOrder);
            load_moe_block(&checkpoint, &config, layer, &options, ep_rank).unwrap();
        }
        assert_eq!(checkpoint.bytes_read(), checkpoint.total_bytes());
    }
}

/// Sizes that MXFP4 cannot have and that are no multiples of anything, against a layer that is put together by hand.
#[test]
fn the_bf16_layout_is_transposed_for_any_sizes() {
    let (experts, hidden_size, intermediate_size) = (3, 71, 45);
    let mut config = published();
    config["num_hidden_layers"] = json!(1);
    config["num_local_experts"] = json!(experts);
    config["num_experts_per_tok"] = json!(2);
    config["hidden_size"] = json!(hidden_size);
    config["intermediate_size"] = json!(intermediate_size);
    config["layer_types"] = Value::Null;
    let config = Config::from_json(&config.to_string()).unwrap();
    let prefix = "model.layers.0.mlp";
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let random = |shape: &[usize]| Tensor::randn(0f32, 0.3, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let tensors: Tensors = [
            ("router.weight", random(&[experts, hidden_size])),
            ("router.bias", random(&[experts])),
            ("experts.gate_up_proj", random(&[experts, hidden_size, 2 * intermediate_size])),
            ("experts.gate_up_proj_bias", random(&[experts, 2 * intermediate_size])),
            ("experts.down_proj", random(&[experts, intermediate_size, hidden_size])),
            ("experts.down_proj_bias", random(&[experts, hidden_size])),
        ]
        .map(|(name, tensor)| (format!("{prefix}.{name}"), tensor))
        .into();
        let folder = Folder::new();
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let options = options(DType::F32, 1, Reduction::SlotOrder);
        let loaded = load_moe_block(&checkpoint, &config, 0, &options, 0).unwrap();
        let tensor = |name: &str| tensors[&format!("{prefix}.{name}")].clone();
        let projection = |name: &str| {
            let weights = tensor(&format!("experts.{name}")).transpose(1, 2).unwrap();
            let bias = tensor(&format!("experts.{name}_bias"));
            ExpertProjection::new(ExpertWeights::dense(weights).unwrap(), Some(bias)).unwrap()
        };
        let activation = Activation::SwigluOss { alpha: 1.702, limit: 7.0 };
        let (gate_up, down) = (projection("gate_up_proj"), projection("down_proj"));
        let by_hand = MoeBlock::builder(
            Linear::new(tensor("router.weight"), Some(tensor("router.bias"))).unwrap(),
            Router::new(RoutingMethod::Renormalize, 2).unwrap(),
            Experts::new(gate_up, down, GateUpRows::Interleaved, activation).unwrap(),
        );
        let by_hand = by_hand.build().unwrap();
        let hidden = Tensor::randn(0f32, 1.0, (7, hidden_size), &Device::Cpu).unwrap();
        let [found, expected] = [&loaded, &by_hand].map(|block| flat(&block.forward_alone(&hidden).unwrap()));
        assert!(same_bits(&found, &expected), "{dtype:?}: {} away", max_distance(&found, &expected));
    }
}

#[test]
fn a_checkpoint_with_something_wrong_names_file_tensor_found_and_expected() {
    let stored = Stored::published();
    let blocks = "model.layers.2.mlp.experts.down_proj_blocks";
    let error = stored.error_with(blocks, |_| None);
    assert!(error.contains(blocks) && error.contains("model.layers.0.mlp.experts.down_proj_blocks"), "{error}");
    let error = stored.error_with(blocks, |t| Some(t.narrow(1, 0, 127).unwrap()));
    assert!(error.contains("model.safetensors") && error.contains(blocks), "{error}");
    assert!(error.contains("[8, 127, 6, 16]") && error.contains("[8, 128, 6, 16]"), "{error}");
    let error = stored.error_with(blocks, |t| Some(t.to_dtype(DType::U32).unwrap()));
    assert!(error.contains(blocks) && error.contains("u32") && error.contains("u8"), "{error}");
    let scales = "model.layers.1.mlp.experts.gate_up_proj_scales";
    let error = stored.error_with(scales, |t| Some(t.ones_like().unwrap().affine(255.0, 0.0).unwrap()));
    assert!(error.contains("model.layers.1.mlp") && error.contains("255"), "{error}");
    for dense in ["lm_head.weight", "model.norm.weight", "model.layers.3.self_attn.sinks"] {
        assert!(stored.error_with(dense, |_| None).contains(dense));
    }
}

#[test]
fn a_tensor_that_is_missing_is_named_as_its_layout_names_it() {
    for (stored, layer) in [(Stored::original(), "block.2."), (Stored::decoded(DType::BF16), "model.layers.2.")] {
        let of_layer = stored.tensors.keys().filter(|name| name.starts_with(layer));
        let outside = stored.tensors.keys().filter(|name| !name.contains(".mlp.") && !name.contains(".attn."));
        let names: Vec<_> = of_layer.chain(outside).collect();
        assert!(names.len() > 15, "{names:?}");
        for name in names {
            let error = stored.error_with(name, |_| None);
            assert!(error.contains(&format!("no tensor {name}")), "{name}: {error}");
        }
    }
}

#[test]
fn a_tensor_that_is_wrong_is_named_as_its_layout_names_it() {
    let (original, decoded) = (Stored::original(), Stored::decoded(DType::BF16));
    let as_u32 = |t: &Tensor| Some(t.to_dtype(DType::U32).unwrap());
    let narrow = |t: &Tensor| Some(t.narrow(t.rank() - 1, 0, t.dims()[t.rank() - 1] - 1).unwrap());
    for (stored, name, found, expected) in [
        (&original, "block.1.attn.qkv.weight", "[256, 127]", "[256, 128]"),
        (&original, "block.1.attn.qkv.bias", "[255]", "[256]"),
        (&original, "block.3.mlp.mlp1_weight.blocks", "[8, 384, 4, 15]", "[8, 384, 4, 16]"),
        (&original, "block.3.mlp.mlp2_weight.scales", "[8, 128, 5]", "[8, 128, 6]"),
        (&original, "unembedding.weight", "[512, 127]", "[512, 128]"),
        (&decoded, "model.layers.1.mlp.experts.gate_up_proj", "[8, 128, 383]", "[8, 128, 384]"),
        (&decoded, "model.layers.1.mlp.experts.down_proj", "[8, 192, 127]", "[8, 192, 128]"),
        (&decoded, "model.layers.1.mlp.experts.down_proj_bias", "[8, 127]", "[8, 128]"),
    ] {
        let error = stored.error_with(name, narrow);
        for word in ["model.safetensors", name, found, expected] {
            assert!(error.contains(word), "{name}: {error} does not say {word}");
        }
        let error = stored.error_with(name, as_u32);
        assert!(error.contains(name) && error.contains("u32"), "{name}: {error}");
    }
    // Not transposed, as the rows of other projections are.
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let error = decoded.error_with(name, |t| Some(t.transpose(1, 2).unwrap().contiguous().unwrap()));
    assert!(error.contains(name) && error.contains("[8, 384, 128]"), "{error}");
    let scales = "block.1.mlp.mlp1_weight.scales";
    let error = original.error_with(scales, |t| Some(t.ones_like().unwrap().affine(255.0, 0.0).unwrap()));
    assert!(error.contains("model.safetensors") && error.contains(scales) && error.contains("255"), "{error}");
}

#[test]
fn tensors_of_two_layouts_or_of_none_are_refused() {
    let all = [Stored::published(), Stored::original(), Stored::decoded(DType::BF16)];
    let refused = |stored: &Stored, words: &[&str]| {
        let error = stored.error();
        for word in ["published", "original", "bf16", "mlp1_weight.blocks", "gate_up_proj_blocks"].iter().chain(words) {
            assert!(error.contains(word), "{error} does not say {word}");
        }
    };
    for (a, b) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
        let mut mixed = all[a].clone();
        mixed.tensors.extend(all[b].tensors.clone());
        refused(&mixed, &["belong to different layouts"]);
        // Each layer in a layout of its own, and nothing twice.
        let of_layer = |name: &String| name.contains(".2.");
        let mut mixed = all[a].clone();
        mixed.tensors.retain(|name, _| !of_layer(name));
        mixed.tensors.extend(all[b].tensors.clone().into_iter().filter(|(name, _)| of_layer(name)));
        refused(&mixed, &["belong to different layouts"]);
    }
    let mut none = all[0].clone();
    none.tensors.retain(|name, _| !name.contains(".experts."));
    refused(&none, &["no expert tensors of a known layout"]);
    none.tensors = Tensors::from([("w".into(), Tensor::new(1f32, &Device::Cpu).unwrap())]);
    refused(&none, &["no expert tensors of a known layout"]);
}

#[test]
fn a_folder_that_is_no_model_is_an_error() {
    let folder = Folder::new();
    let load = |folder: &Folder| {
        Model::load(folder.path(), &MoeOptions::default(), &|_, _| ()).map(|_| ()).unwrap_err().to_string()
    };
    assert!(load(&folder).contains("config.json"));
    std::fs::copy(format!("{}/config.json", tiny_folder()), folder.path().join("config.json")).unwrap();
    assert!(load(&folder).contains("no .safetensors file"));
}
