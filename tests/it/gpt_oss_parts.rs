//! The parts of GPT-OSS that the goldens do not reach: configurations, sampling, checkpoints with something wrong.

use crate::checkpoint::Folder;
use crate::gpt_oss::TINY;
use candle_core::{DType, Device, Tensor};
use candle_moe::models::gpt_oss::{Config, Model, MoeOptions, Sampler, SamplingConfig};
use serde_json::{Value, json};
use std::collections::HashMap;

fn published() -> Value {
    serde_json::from_str(&std::fs::read_to_string(format!("{TINY}/config.json")).unwrap()).unwrap()
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

/// The tiny checkpoint as one file, with one tensor changed or taken away.
fn changed(name: &str, change: impl FnOnce(&Tensor) -> Option<Tensor>) -> String {
    let folder = Folder::new();
    std::fs::copy(format!("{TINY}/config.json"), folder.path().join("config.json")).unwrap();
    let mut tensors = HashMap::new();
    for shard in ["model-00001-of-00002", "model-00002-of-00002"] {
        tensors.extend(candle_core::safetensors::load(format!("{TINY}/{shard}.safetensors"), &Device::Cpu).unwrap());
    }
    let tensor = tensors.remove(name).unwrap();
    tensors.extend(change(&tensor).map(|tensor| (name.to_string(), tensor)));
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let outcome = Model::load(folder.path(), &MoeOptions { ep_size: 2, ..Default::default() }, &|_, _| ());
    outcome.map(|_| ()).map_err(|error| error.to_string()).unwrap_err()
}

#[test]
fn a_checkpoint_with_something_wrong_names_file_tensor_found_and_expected() {
    let blocks = "model.layers.2.mlp.experts.down_proj_blocks";
    let error = changed(blocks, |_| None);
    assert!(error.contains(blocks) && error.contains("model.layers.0.mlp.experts.down_proj_blocks"), "{error}");
    let error = changed(blocks, |t| Some(t.narrow(1, 0, 127).unwrap()));
    assert!(error.contains("model.safetensors") && error.contains(blocks), "{error}");
    assert!(error.contains("[8, 127, 6, 16]") && error.contains("[8, 128, 6, 16]"), "{error}");
    let error = changed(blocks, |t| Some(t.to_dtype(DType::U32).unwrap()));
    assert!(error.contains(blocks) && error.contains("u32") && error.contains("u8"), "{error}");
    let scales = "model.layers.1.mlp.experts.gate_up_proj_scales";
    let error = changed(scales, |t| Some(t.ones_like().unwrap().affine(255.0, 0.0).unwrap()));
    assert!(error.contains("model.layers.1.mlp") && error.contains("255"), "{error}");
    for dense in ["lm_head.weight", "model.norm.weight", "model.layers.3.self_attn.sinks"] {
        assert!(changed(dense, |_| None).contains(dense));
    }
}

#[test]
fn a_folder_that_is_no_model_is_an_error() {
    let folder = Folder::new();
    let load = |folder: &Folder| {
        Model::load(folder.path(), &MoeOptions::default(), &|_, _| ()).map(|_| ()).unwrap_err().to_string()
    };
    assert!(load(&folder).contains("config.json"));
    std::fs::copy(format!("{TINY}/config.json"), folder.path().join("config.json")).unwrap();
    assert!(load(&folder).contains("no .safetensors file"));
}
