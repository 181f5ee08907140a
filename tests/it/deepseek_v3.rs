//! DeepSeek-V3's MoE layer: against the goldens of another implementation, on one rank and several; FP8 weights against the
//! numbers that they stand for; and checkpoints with something wrong.

use crate::checkpoint::Folder;
use crate::devices;
use crate::gpt_oss::data_folder;
use crate::oracle::{self, FLOATS, Random};
use candle_core::{DType, Device, Tensor};
use candle_moe::block::{MoeBlock, MoeOutput};
use candle_moe::checkpoint::Checkpoint;
use candle_moe::ep::{Communicator, Reduction, Step, Topology, launch};
use candle_moe::models::MoeOptions;
use candle_moe::models::deepseek_v3::{Config, load_moe_block};
use candle_moe::routing::ExpertGroups;
use float8::F8E4M3;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Duration;

const LAYER: usize = 3;
const PATIENT: Duration = Duration::from_secs(20);

/// The tiny checkpoint.
fn tiny_folder() -> String {
    data_folder("tiny-deepseek-v3")
}

type Tensors = HashMap<String, Tensor>;

fn goldens() -> Tensors {
    candle_core::safetensors::load(format!("{}/goldens.safetensors", tiny_folder()), &Device::Cpu).unwrap()
}

fn published() -> Value {
    serde_json::from_str(&std::fs::read_to_string(format!("{}/config.json", tiny_folder())).unwrap()).unwrap()
}

fn tiny() -> Tensors {
    candle_core::safetensors::load(format!("{}/model.safetensors", tiny_folder()), &Device::Cpu).unwrap()
}

fn options(ep_size: usize, reduction: Reduction) -> MoeOptions {
    MoeOptions { ep_size, reduction, ..Default::default() }
}

/// A folder with a configuration and one file of tensors.
fn written(config: &Value, tensors: &Tensors) -> (Folder, Config) {
    let folder = Folder::new();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(tensors, folder.path().join("model.safetensors")).unwrap();
    let config = Config::from_file(folder.path().join("config.json")).unwrap();
    (folder, config)
}

fn load(folder: &std::path::Path, config: &Config, options: &MoeOptions, rank: usize) -> candle_core::Result<MoeBlock> {
    load_moe_block(&Checkpoint::open(folder)?, config, LAYER, options, rank)
}

/// The layer over `ep_size` ranks, whose tokens are consecutive parts of `hidden`, one of them empty where there are more
/// than two.
fn sharded(folder: &std::path::Path, config: &Config, options: &MoeOptions, hidden: &Tensor) -> Vec<MoeOutput> {
    let ep_size = options.ep_size;
    let mut counts = vec![hidden.dims()[0] / ep_size; ep_size];
    if ep_size > 2 {
        counts[1] = 0;
    }
    counts[0] += hidden.dims()[0] - counts.iter().sum::<usize>();
    let on_rank = |mut ranks: candle_moe::ep::Threads| {
        let rank = ranks.rank();
        let block = load(folder, config, options, rank).unwrap();
        let own = hidden.narrow(0, counts[..rank].iter().sum(), counts[rank]).unwrap();
        let own = own.to_device(&options.device).unwrap();
        let step = Step::agree(&mut ranks, counts[rank]).unwrap();
        block.forward_traced(&own, &mut ranks, &step).unwrap()
    };
    launch(ep_size, PATIENT, on_rank).unwrap().into_iter().map(|rank| rank.unwrap()).collect()
}

fn rows(outputs: &[MoeOutput], part: impl Fn(&MoeOutput) -> Tensor) -> Vec<Vec<f32>> {
    outputs.iter().flat_map(|output| oracle::rows_of(&part(output))).collect()
}

#[test]
fn the_layer_equals_the_goldens_for_every_number_of_ranks() {
    let goldens = goldens();
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let golden_ids = goldens["topk_ids"].to_vec2::<i64>().unwrap();
    let golden_weights = oracle::rows_of(&goldens["topk_weights"]);
    let golden_output = oracle::rows_of(&goldens["output"]);
    let largest = golden_output.iter().flatten().fold(0f32, |largest, v| largest.max(v.abs()));
    let mut first: Option<Vec<Vec<f32>>> = None;
    let on_cuda = devices::cuda().map(|device| (1, device.clone()));
    for (ep_size, device) in [1, 2, 4, 3].map(|ep_size| (ep_size, Device::Cpu)).into_iter().chain(on_cuda) {
        for reduction in [Reduction::SlotOrder, Reduction::RankPartial] {
            let options = MoeOptions { device: device.clone(), ..options(ep_size, reduction) };
            let outputs = sharded(tiny_folder().as_ref(), &config, &options, &goldens["input"]);
            let ids: Vec<Vec<u32>> =
                outputs.iter().flat_map(|o| o.routing.topk_ids.to_vec2::<u32>().unwrap()).collect();
            let weights = rows(&outputs, |output| output.routing.topk_weights.clone());
            for (token, (ids, weights)) in ids.iter().zip(&weights).enumerate() {
                let mut found: Vec<_> = ids.iter().zip(weights).map(|(&id, &weight)| (id, weight)).collect();
                let golden = golden_ids[token].iter().zip(&golden_weights[token]);
                let mut expected: Vec<_> = golden.map(|(&id, &weight)| (id as u32, weight)).collect();
                found.sort_by_key(|(id, _)| *id);
                expected.sort_by_key(|(id, _)| *id);
                for ((id, weight), (golden_id, golden_weight)) in found.into_iter().zip(expected) {
                    assert_eq!(id, golden_id, "token {token}");
                    assert!((weight - golden_weight).abs() <= 1e-5, "token {token}: {weight}, not {golden_weight}");
                }
            }
            let output = rows(&outputs, |output| output.hidden.clone());
            assert_eq!((ids.len(), output.len()), (33, 33));
            let close = |(found, golden): (&f32, &f32)| (found - golden).abs() <= 1e-4 * largest;
            assert!(output.iter().flatten().zip(golden_output.iter().flatten()).all(close), "{ep_size} ranks");
            let logits = rows(&outputs, |output| output.router_logits.clone());
            for (found, golden) in
                logits.iter().flatten().zip(oracle::rows_of(&goldens["router_logits"]).iter().flatten())
            {
                assert!((found - golden).abs() <= 1e-4, "router logit {found}, not {golden}");
            }
            if reduction == Reduction::SlotOrder && device.is_cpu() {
                assert_eq!(first.get_or_insert_with(|| output.clone()), &output, "not the bits of one rank");
            }
        }
    }
}

#[test]
fn a_rank_reads_its_own_experts_the_gate_and_the_shared_experts() {
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let expert = 3 * 64 * 128 * 4;
    let shared_and_gate = expert + (32 * 128 + 32) * 4;
    for (ep_size, rank) in [(1, 0), (2, 1), (3, 0), (3, 2), (32, 31)] {
        let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
        load_moe_block(&checkpoint, &config, LAYER, &options(ep_size, Reduction::SlotOrder), rank).unwrap();
        let local = Topology::new(32, ep_size, rank).unwrap().local_experts();
        assert_eq!(checkpoint.bytes_read(), (local.len() * expert + shared_and_gate) as u64);
        for other in (0..32).filter(|e| !local.contains(e)) {
            let name = format!("model.layers.3.mlp.experts.{other}.down_proj.weight");
            assert!(checkpoint.ranges_read(&name).is_empty(), "{name} was read");
        }
    }
}

#[test]
fn perfect_routing_balances_the_ranks_that_own_the_groups() {
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let hidden = goldens()["input"].narrow(0, 0, 32).unwrap();
    for ep_size in [1, 2, 4, 8] {
        let options = MoeOptions { perfect_router: true, ..options(ep_size, Reduction::SlotOrder) };
        let loads = launch(ep_size, PATIENT, |mut ranks| {
            let rank = ranks.rank();
            let block = load(tiny_folder().as_ref(), &config, &options, rank).unwrap();
            assert!(block.is_perfect());
            let own = if rank == 0 { 32 } else { 0 };
            let step = Step::agree(&mut ranks, own).unwrap();
            block.forward(&hidden.narrow(0, 0, own).unwrap(), &mut ranks, &step).unwrap();
            block.load().unwrap().slots_per_rank
        });
        for load in loads.unwrap() {
            assert_eq!(load.unwrap(), vec![32 * 4 / ep_size as u64; ep_size]);
        }
    }
}

#[test]
fn weights_may_be_stored_in_any_float_dtype() {
    let config = published();
    let hidden = &goldens()["input"];
    for dtype in FLOATS {
        let stored: Tensors = tiny().into_iter().map(|(name, t)| (name, t.to_dtype(dtype).unwrap())).collect();
        let rounded: Tensors = stored.iter().map(|(n, t)| (n.clone(), t.to_dtype(DType::F32).unwrap())).collect();
        let forward = |tensors: &Tensors| {
            let (folder, config) = written(&config, tensors);
            let block = load(folder.path(), &config, &options(1, Reduction::SlotOrder), 0).unwrap();
            oracle::rows_of(&block.forward_alone(hidden).unwrap())
        };
        let (found, expected) = (forward(&stored), forward(&rounded));
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * (1.0 + b.abs());
        assert!(found.iter().flatten().zip(expected.iter().flatten()).all(close), "{dtype:?}");
    }
}

// ---------------------------------------------------------------------------------------------
// FP8

/// A layer with FP8 experts as published, and the same layer with the float32 numbers that they stand for.
struct Fp8 {
    config: Value,
    stored: Tensors,
    decoded: Tensors,
}

impl Fp8 {
    fn random(hidden_size: usize, intermediate_size: usize, num_experts: usize, num_shared: usize) -> Self {
        let mut random = Random(77);
        let mut config = published();
        for (key, value) in [
            ("hidden_size", hidden_size),
            ("moe_intermediate_size", intermediate_size),
            ("n_routed_experts", num_experts),
            ("n_shared_experts", num_shared),
        ] {
            config[key] = json!(value);
        }
        config["quantization_config"] = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]});
        let prefix = format!("model.layers.{LAYER}.mlp");
        let gate = random.units(num_experts * hidden_size, 0.3);
        let bias = random.units(num_experts, 0.2);
        let mut stored = Tensors::from([
            (
                format!("{prefix}.gate.weight"),
                Tensor::from_vec(gate, (num_experts, hidden_size), &Device::Cpu).unwrap(),
            ),
            (
                format!("{prefix}.gate.e_score_correction_bias"),
                Tensor::from_vec(bias, num_experts, &Device::Cpu).unwrap(),
            ),
        ]);
        let mut decoded = stored.clone();
        let mut add = |stem: String, rows: usize, columns: usize| {
            let (blocks_down, blocks_across) = (rows.div_ceil(128), columns.div_ceil(128));
            let scales: Vec<f32> = (0..blocks_down * blocks_across).map(|_| 2e-4 * (1.5 + random.unit())).collect();
            let values: Vec<F8E4M3> = (0..rows * columns)
                .map(|_| match (random.next() & 0xff) as u8 {
                    // The bytes of NaN.
                    byte if byte & 0x7f == 0x7f => F8E4M3::from_bits(byte & 0x80),
                    byte => F8E4M3::from_bits(byte),
                })
                .collect();
            let scale = |i: usize| scales[i / columns / 128 * blocks_across + i % columns / 128];
            let numbers: Vec<f32> = values.iter().enumerate().map(|(i, value)| value.to_f32() * scale(i)).collect();
            decoded.insert(stem.clone(), Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap());
            stored.insert(stem.clone(), Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap());
            let scales = Tensor::from_vec(scales, (blocks_down, blocks_across), &Device::Cpu).unwrap();
            stored.insert(format!("{stem}_scale_inv"), scales);
        };
        let mut expert = |name: String, width: usize| {
            add(format!("{prefix}.{name}.gate_proj.weight"), width, hidden_size);
            add(format!("{prefix}.{name}.up_proj.weight"), width, hidden_size);
            add(format!("{prefix}.{name}.down_proj.weight"), hidden_size, width);
        };
        (0..num_experts).for_each(|e| expert(format!("experts.{e}"), intermediate_size));
        if num_shared > 0 {
            expert("shared_experts".into(), num_shared * intermediate_size);
        }
        Self { config, stored, decoded }
    }
}

#[test]
fn fp8_weights_give_what_their_numbers_give() {
    // Sizes that blocks of 128 divide or not, and chunks of 32 neither.
    for (hidden_size, intermediate_size, num_shared) in [(128, 64, 1), (320, 192, 2), (200, 130, 0), (45, 7, 1)] {
        let layer = Fp8::random(hidden_size, intermediate_size, 8, num_shared);
        let hidden = Random(5).units(6 * hidden_size, 1.0);
        for dtype in [DType::F32, DType::BF16] {
            let hidden = oracle::floats(&hidden, &[6, hidden_size], dtype).0;
            let (stored, config) = written(&layer.config, &layer.stored);
            let (decoded, _) = written(&layer.config, &layer.decoded);
            let alone = |folder: &Folder| {
                let outputs = sharded(folder.path(), &config, &options(1, Reduction::SlotOrder), &hidden);
                rows(&outputs, |output| output.hidden.clone())
            };
            let (found, expected) = (alone(&stored), alone(&decoded));
            assert_eq!(found, expected, "{hidden_size} x {intermediate_size}: not the bits of the decoded numbers");
            for ep_size in [2, 3] {
                let outputs = sharded(stored.path(), &config, &options(ep_size, Reduction::SlotOrder), &hidden);
                assert_eq!(rows(&outputs, |output| output.hidden.clone()), found, "{ep_size} ranks");
            }
        }
    }
}

#[test]
fn fp8_weights_stay_in_8_bits() {
    let layer = Fp8::random(256, 128, 8, 1);
    let (folder, config) = written(&layer.config, &layer.stored);
    let block = load(folder.path(), &config, &options(1, Reduction::SlotOrder), 0).unwrap();
    // A scale of 4 bytes for every 128 values of a row.
    assert_eq!(block.experts().bytes_per_expert(), 3 * 256 * 128 * (128 + 4) / 128);
    assert_eq!(block.shared_experts().unwrap().bytes_per_expert(), 3 * 256 * 128 * (128 + 4) / 128);
}

// ---------------------------------------------------------------------------------------------
// Something wrong

#[track_caller]
fn refused<T>(result: candle_core::Result<T>, words: &[&str]) {
    let error = result.err().expect("should be refused").to_string();
    words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in {error:?}"));
}

#[test]
fn a_checkpoint_with_something_wrong_names_tensor_found_and_expected() {
    let layer = Fp8::random(128, 64, 8, 1);
    let attempt = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = layer.stored.clone();
        change(&mut tensors);
        let (folder, config) = written(&layer.config, &tensors);
        load(folder.path(), &config, &options(2, Reduction::SlotOrder), 1)
    };
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let prefix = "model.layers.3.mlp";
    attempt(&|_| ()).unwrap();
    for name in [
        "gate.weight",
        "gate.e_score_correction_bias",
        "experts.5.up_proj.weight",
        "experts.7.down_proj.weight",
        "experts.4.gate_proj.weight_scale_inv",
        "shared_experts.up_proj.weight",
    ] {
        let name = format!("{prefix}.{name}");
        refused(attempt(&|tensors| drop(tensors.remove(&name))), &["no tensor", &name]);
    }
    // The experts of the other rank are not looked at.
    attempt(&|tensors| drop(tensors.remove(&format!("{prefix}.experts.0.up_proj.weight")))).unwrap();
    let put = |name: &str, tensor: Tensor| {
        let name = format!("{prefix}.{name}");
        attempt(&move |tensors| drop(tensors.insert(name.clone(), tensor.clone())))
    };
    refused(put("experts.6.up_proj.weight", zeros(&[64, 128], DType::BF16)), &["experts.6.up_proj", "f8e4m3"]);
    refused(put("experts.4.gate_proj.weight", zeros(&[64, 128], DType::U8)), &["experts.4.gate_proj", "U8", "f8e4m3"]);
    refused(put("gate.weight", zeros(&[8, 127], DType::F32)), &["gate.weight", "[8, 127]", "[8, 128]"]);
    refused(put("gate.e_score_correction_bias", zeros(&[7], DType::F32)), &["e_score_correction_bias", "[7]", "[8]"]);
    refused(
        put("experts.4.down_proj.weight_scale_inv", zeros(&[1, 2], DType::F32)),
        &["experts.4.down_proj.weight_scale_inv", "[1, 2]", "[1, 1]"],
    );
    refused(put("shared_experts.down_proj.weight", zeros(&[128, 65], DType::F32)), &["shared_experts", "[128, 65]"]);
    let nan = Tensor::full(f32::NAN, (1, 1), &Device::Cpu).unwrap();
    refused(
        put("experts.4.down_proj.weight_scale_inv", nan),
        &["experts.4.down_proj.weight_scale_inv", "NaN", "finite"],
    );
    let nan = Tensor::from_vec(vec![F8E4M3::from_bits(0x7f); 64 * 128], (64, 128), &Device::Cpu).unwrap();
    refused(put("experts.4.up_proj.weight", nan), &["experts.4.gate_proj.weight", "NaN", "expert 0, row 64"]);
}

#[test]
fn a_layer_without_experts_and_a_rank_that_does_not_exist_are_refused() {
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
    let load = |layer, ep_size, rank| {
        load_moe_block(&checkpoint, &config, layer, &options(ep_size, Reduction::SlotOrder), rank)
    };
    for layer in [0, 2, 4, usize::MAX] {
        refused(load(layer, 1, 0), &["layer is", &layer.to_string(), "3 to 3"]);
    }
    refused(load(3, 0, 0), &["ep_size is 0"]);
    refused(load(3, 33, 0), &["ep_size is 33", "32"]);
    refused(load(3, 4, 4), &["ep_rank is 4"]);
}

#[test]
fn a_configuration_that_describes_another_model_names_field_found_and_expected() {
    let parsed = |key: &str, value: Value| {
        let mut config = published();
        config[key] = value;
        Config::from_json(&config.to_string())
    };
    assert_eq!(parsed("n_shared_experts", Value::Null).unwrap().num_shared_experts, 0);
    let mut kimi = published();
    (kimi["n_group"], kimi["topk_group"]) = (json!(1), json!(1));
    assert_eq!(Config::from_json(&kimi.to_string()).unwrap().groups, ExpertGroups::ONE);
    refused(parsed("n_group", json!(1)), &["topk_group is 2", "num_groups, which is 1"]);
    for (key, value, words) in [
        ("hidden_size", json!(0), ["hidden_size is 0", "1 to"]),
        ("first_k_dense_replace", json!(4), ["first_k_dense_replace is 4", "4 layers"]),
        ("n_routed_experts", json!(1u64 << 40), ["n_routed_experts is", "1 to"]),
        ("num_experts_per_tok", json!(33), ["num_experts_per_tok is 33", "32"]),
        ("n_group", json!(5), ["num_groups is 5", "32"]),
        ("topk_group", json!(0), ["topk_group is 0", "4"]),
        ("n_shared_experts", json!(1u64 << 40), ["n_shared_experts is", "at most"]),
        ("routed_scaling_factor", json!(-1.0), ["routed_scaling_factor is -1", "above 0"]),
        ("norm_topk_prob", json!(false), ["norm_topk_prob is false", "true"]),
        ("scoring_func", json!("softmax"), ["scoring_func is \"softmax\"", "sigmoid"]),
        ("topk_method", json!("greedy"), ["topk_method is \"greedy\"", "noaux_tc"]),
        ("hidden_act", json!("gelu"), ["hidden_act is \"gelu\"", "silu"]),
        ("moe_layer_freq", json!(2), ["moe_layer_freq is 2", "1"]),
        ("quantization_config", json!({"quant_method": "awq"}), ["quant_method is \"awq\"", "fp8"]),
        (
            "quantization_config",
            json!({"quant_method": "fp8", "weight_block_size": [64, 64]}),
            ["weight_block_size is [64, 64]", "[128, 128]"],
        ),
    ] {
        refused(parsed(key, value), &["deepseek-v3 config", words[0], words[1]]);
    }
    refused(Config::from_json("{}"), &["deepseek-v3 config", "missing field"]);
    refused(Config::from_file("/nowhere/config.json"), &["/nowhere/config.json"]);
}
