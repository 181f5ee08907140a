//! GPT-OSS against what Hugging Face transformers computes from the same checkpoint.

use crate::devices::{self, line, to_host};
use candle_core::{DType, Device, Result, Tensor};
use candle_moe::checkpoint::Checkpoint;
use candle_moe::ep::{AbortHandle, Communicator, Deadlines, EpError, Health, Reduction, Threads, launch};
use candle_moe::models::gpt_oss::{
    Cache, Config, Logits, Model, MoeLayers, MoeOptions, Sampler, SamplingConfig, ShardedMoe, load_moe_block, serve,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The tiny checkpoint.
pub(crate) fn tiny_folder() -> String {
    data_folder("tiny-gpt-oss")
}

/// A folder of test data: in the one that CANDLE_MOE_TEST_DATA names, for tests that run without the repository, or in that.
pub(crate) fn data_folder(name: &str) -> String {
    let all = std::env::var("CANDLE_MOE_TEST_DATA");
    format!("{}/{name}", all.as_deref().unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data")))
}

pub(crate) fn goldens() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(format!("{}/goldens.safetensors", tiny_folder()), &Device::Cpu).unwrap()
}

pub(crate) fn prompt(goldens: &HashMap<String, Tensor>) -> Vec<u32> {
    goldens["input_ids"].flatten_all().unwrap().to_dtype(DType::U32).unwrap().to_vec1().unwrap()
}

type Outcome<T> = std::result::Result<T, EpError>;

fn load(options: &MoeOptions) -> Model {
    Model::load(tiny_folder(), options, &|_, _| ()).unwrap()
}

pub(crate) fn options(dtype: DType, ep_size: usize, reduction: Reduction) -> MoeOptions {
    MoeOptions { dtype, ep_size, reduction, ..Default::default() }
}

/// One rank on `device`.
fn on(device: &Device, dtype: DType) -> MoeOptions {
    MoeOptions { dtype, device: device.clone(), ..Default::default() }
}

pub(crate) fn whole_prompt(model: &mut Model, ids: &[u32]) -> Vec<f32> {
    let mut cache = Cache::new(model.config());
    flat(&model.forward(ids, &mut cache, Logits::All).unwrap())
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    to_host(tensor).to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn max_distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn deviation(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
}

/// Keeps what every layer computed.
struct Recorder<'a> {
    moe: &'a mut ShardedMoe,
    topk_ids: Vec<Vec<Vec<u32>>>,
    topk_weights: Vec<Tensor>,
    moe_input: Vec<Tensor>,
    moe_output: Vec<Tensor>,
}

impl MoeLayers for Recorder<'_> {
    fn begin(&mut self, first_token: usize, num_tokens: usize) -> Result<()> {
        self.moe.begin(first_token, num_tokens)
    }

    fn forward(&mut self, layer: usize, hidden: &Tensor) -> Result<Tensor> {
        let output = self.moe.forward_traced(layer, hidden)?;
        self.topk_ids.push(output.routing.topk_ids.to_vec2()?);
        self.topk_weights.push(output.routing.topk_weights);
        self.moe_input.push(hidden.clone());
        self.moe_output.push(output.hidden.clone());
        Ok(output.hidden)
    }

    fn end(&mut self) -> Result<()> {
        self.moe.end()
    }
}

#[test]
fn float32_logits_choices_and_layers_are_those_of_the_reference() {
    devices::with_products().for_each(|device| check_float32(&device));
}

fn check_float32(device: &Device) {
    let goldens = goldens();
    let mut model = load(&on(device, DType::F32));
    let config = model.config().clone();
    let (decoder, moe) = model.parts_mut();
    let mut recorder =
        Recorder { moe, topk_ids: Vec::new(), topk_weights: Vec::new(), moe_input: Vec::new(), moe_output: Vec::new() };
    let mut cache = Cache::new(&config);
    let logits = decoder.forward(&prompt(&goldens), &mut cache, &mut recorder, Logits::All).unwrap();
    let expected = flat(&goldens["f32.logits"]);
    let bound = 2e-3 * deviation(&expected);
    let distance = max_distance(&flat(&logits), &expected);
    assert!(distance <= bound, "logits are {distance} away, expected at most {bound}");
    assert_eq!(recorder.topk_ids.len(), config.num_layers);
    for layer in 0..config.num_layers {
        let golden = |name: &str| &goldens[&format!("f32.layers.{layer}.{name}")];
        let expected = golden("topk_ids").to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
        for (token, (ids, mut expected)) in recorder.topk_ids[layer].iter().zip(expected).enumerate() {
            let mut ids = ids.clone();
            ids.sort();
            expected.sort();
            assert_eq!(ids, expected, "layer {layer}, token {token}");
        }
        for (name, found) in [("moe_input", &recorder.moe_input), ("moe_output", &recorder.moe_output)] {
            let expected = flat(golden(name));
            let distance = max_distance(&flat(&found[layer]), &expected);
            assert!(distance <= 1e-3 * deviation(&expected), "layer {layer}: {name} is {distance} away");
        }
    }
}

#[test]
fn float32_greedy_continuation_is_that_of_the_reference() {
    let goldens = goldens();
    let expected = goldens["f32.greedy_ids"].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    let several = [3, 8].map(|ep_size| options(DType::F32, ep_size, Reduction::SlotOrder));
    for options in devices::with_products().map(|device| on(&device, DType::F32)).chain(several) {
        let mut model = load(&options);
        let mut cache = Cache::new(model.config());
        let mut sampler = Sampler::new(SamplingConfig::GREEDY).unwrap();
        let mut logits = model.prompt(&prompt(&goldens), &mut cache, &mut |_| ()).unwrap();
        let mut generated = Vec::new();
        while generated.len() < expected.len() {
            let id = sampler.sample(&logits).unwrap();
            generated.push(id);
            logits = flat(&model.forward(&[id], &mut cache, Logits::Last).unwrap());
        }
        assert_eq!(generated, expected, "{options:?}");
    }
}

#[test]
fn bfloat16_logits_are_as_near_to_float32_as_those_of_the_reference() {
    devices::with_products().for_each(|device| check_bfloat16(&device));
}

fn check_bfloat16(device: &Device) {
    let goldens = goldens();
    let exact = flat(&goldens["f32.logits"]);
    let reference = flat(&goldens["bf16.logits"]);
    let mut model = load(&on(device, DType::BF16));
    let logits = whole_prompt(&mut model, &prompt(&goldens));
    let root_mean_square = |found: &[f32]| {
        let sum: f32 = found.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum();
        (sum / exact.len() as f32).sqrt()
    };
    let (ours, theirs) = (root_mean_square(&logits), root_mean_square(&reference));
    println!("root mean square: ours {ours}, reference {theirs}");
    assert!(ours <= 2.0 * theirs, "root mean square: {ours}, expected at most twice {theirs}");
    let (ours, theirs) = (max_distance(&logits, &exact), max_distance(&reference, &exact));
    println!("largest: ours {ours}, reference {theirs}");
    assert!(ours <= 2.0 * theirs, "largest: {ours}, expected at most twice {theirs}");
}

#[test]
fn slot_order_logits_are_bit_identical_for_every_number_of_ranks() {
    let ids = prompt(&goldens());
    for dtype in [DType::F32, DType::BF16] {
        let alone = whole_prompt(&mut load(&options(dtype, 1, Reduction::SlotOrder)), &ids);
        for ep_size in [2, 3, 4, 8] {
            let logits = whole_prompt(&mut load(&options(dtype, ep_size, Reduction::SlotOrder)), &ids);
            let same = logits.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{dtype:?}, ep_size {ep_size}: {} away", max_distance(&logits, &alone));
        }
    }
}

#[test]
fn rank_partial_logits_are_the_same_within_rounding_and_repeat_bit_for_bit() {
    let ids = prompt(&goldens());
    let alone = whole_prompt(&mut load(&options(DType::F32, 1, Reduction::SlotOrder)), &ids);
    for ep_size in [1, 2, 3, 4, 8] {
        let mut model = load(&options(DType::F32, ep_size, Reduction::RankPartial));
        let logits = whole_prompt(&mut model, &ids);
        let distance = max_distance(&logits, &alone);
        assert!(distance <= 1e-4 * deviation(&alone), "ep_size {ep_size}: {distance} away");
        assert_eq!(whole_prompt(&mut model, &ids), logits, "ep_size {ep_size}");
    }
}

#[test]
fn a_prompt_in_chunks_gives_the_logits_of_the_whole() {
    devices::with_products().for_each(|device| check_chunks(&device));
}

fn check_chunks(device: &Device) {
    let ids = prompt(&goldens());
    let mut model = load(&on(device, DType::F32));
    let whole = whole_prompt(&mut model, &ids);
    // What stands in for a device takes its time.
    let chunks = if devices::is_emulated(device) { &[16, 44][..] } else { &[1, 2, 7, 15, 16, 17, 31, 44] };
    for &chunk in chunks {
        let mut cache = Cache::new(model.config());
        let mut logits = Vec::new();
        for ids in ids.chunks(chunk) {
            logits.extend(flat(&model.forward(ids, &mut cache, Logits::All).unwrap()));
        }
        let distance = max_distance(&logits, &whole);
        assert!(distance <= 1e-4 * deviation(&whole), "chunks of {chunk}: {distance} away");
        assert_eq!(cache.kept_positions(), [16, 45, 16, 45], "sliding layers keep their window");
    }
}

#[test]
fn perfect_routing_loads_every_rank_within_one_for_every_prompt_length() {
    let ids = prompt(&goldens());
    let several = [2, 4, 8].map(|ep_size| options(DType::F32, ep_size, Reduction::SlotOrder));
    for options in devices::with_products().map(|device| on(&device, DType::F32)).chain(several) {
        let lengths_apart = if devices::is_emulated(&options.device) { 17 } else { 1 };
        let mut model = load(&MoeOptions { perfect_router: true, ..options });
        for length in (1..=ids.len()).step_by(lengths_apart) {
            model.moe().reset_load().unwrap();
            let mut cache = Cache::new(model.config());
            model.forward(&ids[..length], &mut cache, Logits::Last).unwrap();
            assert_balanced(&model, length, 4 * length as u64);
            // Decoding goes on where the prompt ended.
            for step in 1..=3 {
                model.forward(&ids[..1], &mut cache, Logits::Last).unwrap();
                assert_balanced(&model, length, 4 * (length + step) as u64);
            }
        }
    }
}

fn assert_balanced(model: &Model, length: usize, slots: u64) {
    for (layer, load) in model.moe().load_per_layer().unwrap().into_iter().enumerate() {
        let per_rank = load.slots_per_rank;
        let spread = per_rank.iter().max().unwrap() - per_rank.iter().min().unwrap();
        assert!(spread <= 1, "prompt of {length}, layer {layer}: {per_rank:?}");
        assert_eq!(per_rank.iter().sum::<u64>(), slots);
    }
}

#[test]
fn perfect_routing_can_be_switched_off_again() {
    let ids = prompt(&goldens());
    let several = options(DType::F32, 4, Reduction::SlotOrder);
    for options in devices::with_products().map(|device| on(&device, DType::F32)).chain([several]) {
        let mut model = load(&options);
        let learned = whole_prompt(&mut model, &ids);
        model.moe_mut().set_perfect_router(true).unwrap();
        assert!(max_distance(&whole_prompt(&mut model, &ids), &learned) > 0.1 * deviation(&learned));
        model.moe_mut().set_perfect_router(false).unwrap();
        assert_eq!(whole_prompt(&mut model, &ids), learned);
    }
}

#[test]
fn moe_layers_give_the_outputs_of_the_reference_on_every_device() {
    let goldens = goldens();
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
    for device in devices::all() {
        for layer in 0..config.num_layers {
            let golden = |name: &str| &goldens[&format!("f32.layers.{layer}.{name}")];
            let block = load_moe_block(&checkpoint, &config, layer, &on(&device, DType::F32), 0).unwrap();
            assert_eq!(block.device().location(), device.location());
            let input = golden("moe_input").to_device(&device).unwrap();
            let (found, expected) = (flat(&block.forward_alone(&input).unwrap()), flat(golden("moe_output")));
            let distance = max_distance(&found, &expected);
            assert!(distance <= 1e-3 * deviation(&expected), "{device:?}, layer {layer}: {distance} away");
            let slots = block.load().unwrap().slots_per_expert;
            let ids = flat(golden("topk_ids"));
            let counts = (0..8).map(|expert| ids.iter().filter(|&&id| id == expert as f32).count() as u64);
            assert_eq!(slots, counts.collect::<Vec<_>>(), "{device:?}, layer {layer}");
        }
    }
}

#[test]
fn all_layers_are_loaded_in_their_order_on_every_device_and_one_that_is_missing_ends_it() {
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
    let num_layers = config.num_layers;
    for device in devices::all() {
        let options = on(&device, DType::BF16);
        let layers_done = AtomicUsize::new(0);
        let progress = || {
            layers_done.fetch_add(1, Ordering::Relaxed);
        };
        let mut all = ShardedMoe::load(&checkpoint, &config, &options, &progress).unwrap();
        assert_eq!(layers_done.swap(0, Ordering::Relaxed), num_layers);
        let hidden = Tensor::arange(0f32, (3 * config.hidden_size) as f32, &device).unwrap().sin().unwrap();
        let hidden = hidden.reshape((3, config.hidden_size)).unwrap().to_dtype(DType::BF16).unwrap();
        all.begin(0, 3).unwrap();
        for layer in 0..num_layers {
            let alone = load_moe_block(&checkpoint, &config, layer, &options, 0).unwrap();
            let expected = flat(&alone.forward_alone(&hidden).unwrap());
            assert_eq!(flat(&all.forward(layer, &hidden).unwrap()), expected, "{device:?}, layer {layer}");
        }

        let mut longer = config.clone();
        longer.num_layers += 1;
        longer.sliding_layers.push(false);
        let error = line(ShardedMoe::load(&checkpoint, &longer, &options, &progress).unwrap_err());
        assert!(error.contains(&format!("layers.{num_layers}.")), "{device:?}: {error}");
        assert_eq!(layers_done.load(Ordering::Relaxed), num_layers, "{device:?}");
    }
}

#[test]
fn several_threads_on_one_device_are_refused_before_anything_is_read() {
    let Some(device) = devices::cuda() else { return };
    let options = MoeOptions { ep_size: 2, ..on(device, DType::F32) };
    let error = line(Model::load(tiny_folder(), &options, &|_, _| ()).unwrap_err());
    assert!(error.contains("ep_size is 2 on Cuda") && error.contains("expected 1"), "{error}");
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
    assert_eq!(line(ShardedMoe::load(&checkpoint, &config, &options, &|| ()).unwrap_err()), error);
    assert!(checkpoint.names().all(|name| checkpoint.ranges_read(name).is_empty()));
}

/// A rank whose work ends when [`Communicator::settle`] says so, as that of a device does. Keeps count, and fails when it is
/// told to.
struct Settling {
    inner: Threads,
    settled: Arc<AtomicUsize>,
    fails_at: usize,
}

impl Communicator for Settling {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn world_size(&self) -> usize {
        self.inner.world_size()
    }
    fn set_label(&mut self, label: &str) {
        self.inner.set_label(label);
    }
    fn deadline(&self) -> Duration {
        self.inner.deadline()
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.inner.set_deadline(deadline);
    }
    fn deadlines(&self) -> Deadlines {
        self.inner.deadlines()
    }
    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Outcome<Tensor> {
        self.inner.all_gather(rows, counts)
    }
    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Outcome<Tensor> {
        self.inner.reduce_scatter(rows, counts)
    }
    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Outcome<(Tensor, Vec<usize>)> {
        self.inner.all_to_all(rows, send_counts)
    }
    fn all_reduce(&mut self, values: &Tensor) -> Outcome<Tensor> {
        self.inner.all_reduce(values)
    }
    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Outcome<Vec<Vec<u8>>> {
        self.inner.all_gather_bytes(bytes)
    }
    fn barrier(&mut self) -> Outcome<()> {
        self.inner.barrier()
    }
    fn settle(&mut self) -> Outcome<()> {
        if self.settled.fetch_add(1, Ordering::Relaxed) + 1 < self.fails_at {
            return Ok(());
        }
        self.abort_handle().abort("the device stopped");
        self.inner.barrier()
    }
    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
    fn health(&self) -> Health {
        self.inner.health()
    }
}

/// Runs steps, at most four, until one fails: how many went well, and how often each rank has settled.
fn steps_that_settle(fails_at: [usize; 2]) -> (usize, [usize; 2]) {
    let settled = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
    let options = options(DType::F32, 2, Reduction::SlotOrder);
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let ranks = launch(2, Duration::from_secs(60), |inner| {
        let rank = inner.rank();
        let mut ranks = Settling { inner, settled: Arc::clone(&settled[rank]), fails_at: fails_at[rank] };
        if rank == 1 {
            let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
            let outcome = serve(&checkpoint, &config, &options, &mut ranks, &|| ());
            assert_eq!(outcome.is_err(), fails_at != [usize::MAX; 2], "{outcome:?}");
            return 0;
        }
        let mut model = Model::join(tiny_folder(), &options, Box::new(ranks), &|_, _| ()).unwrap();
        let mut cache = Cache::new(model.config());
        (0..4).take_while(|_| model.forward(&[1, 2], &mut cache, Logits::Last).is_ok()).count()
    });
    let went_well = ranks.unwrap().into_iter().next().unwrap().unwrap();
    (went_well, settled.map(|settled| settled.load(Ordering::Relaxed)))
}

#[test]
fn every_rank_settles_once_in_a_step_and_one_that_cannot_ends_it() {
    let never = usize::MAX;
    assert_eq!(steps_that_settle([never; 2]), (4, [4; 2]));
    // The others may hear of it before they settle, or afterwards.
    let (went_well, settled) = steps_that_settle([3, never]);
    assert!(went_well == 2 && settled[0] == 3 && settled[1] >= 2, "{went_well}, {settled:?}");
    let (went_well, settled) = steps_that_settle([never, 3]);
    assert!((2..=3).contains(&went_well) && settled[1] == 3, "{went_well}, {settled:?}");
}

#[test]
fn a_rank_reads_only_its_own_experts() {
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    for (ep_size, ep_rank, experts) in [(8, 5, 5..6), (3, 2, 6..8), (2, 0, 0..4)] {
        let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
        let options = options(DType::F32, ep_size, Reduction::SlotOrder);
        load_moe_block(&checkpoint, &config, 1, &options, ep_rank).unwrap();
        let mut expert_tensors = 0;
        for name in checkpoint.names().filter(|name| name.contains("experts")) {
            let bytes = checkpoint.info(name).unwrap().bytes / 8;
            let expected = match name.starts_with("model.layers.1.") {
                true => vec![experts.start * bytes..experts.end * bytes],
                false => Vec::new(),
            };
            assert_eq!(checkpoint.ranges_read(name), expected, "{name}");
            expert_tensors += 1;
        }
        assert_eq!(expert_tensors, 4 * 6);
    }
}

#[test]
fn bad_arguments_leave_the_model_usable() {
    let mut model = load(&options(DType::F32, 2, Reduction::SlotOrder));
    let mut cache = Cache::new(model.config());
    for ids in [&[][..], &[512], &[1, u32::MAX]] {
        assert!(model.forward(ids, &mut cache, Logits::Last).is_err(), "{ids:?}");
        assert!(model.prompt(ids, &mut cache, &mut |_| ()).is_err(), "{ids:?}");
    }
    assert!(cache.is_empty());
    model.forward(&[1], &mut cache, Logits::Last).unwrap();
    for ep_size in [0, 9, usize::MAX] {
        let error =
            Model::load(tiny_folder(), &options(DType::F32, ep_size, Reduction::SlotOrder), &|_, _| ()).unwrap_err();
        assert!(error.to_string().contains("ep_size"), "{error}");
    }
    let error = Model::load(tiny_folder(), &options(DType::U8, 1, Reduction::SlotOrder), &|_, _| ()).unwrap_err();
    assert!(error.to_string().contains("dtype"), "{error}");
}
