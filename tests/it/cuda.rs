//! What only a CUDA device can show: sizes around the kernels' thresholds, repeats, graphs, memory that runs out. Everything
//! else runs on all devices in the tests of the rooms.

mod blocks;
mod faults;
#[cfg(feature = "nccl")]
mod gpt_oss;
mod large;
#[cfg(feature = "nccl")]
mod nccl;
mod peer;
mod ranks;
mod sharded;

use crate::devices::{self, RouteEverywhere, assert_same_order, assert_same_routing, line, to_host};
use crate::oracle::{self, FLOATS, Random};
use crate::routing::{RECIPES, View, logit, view};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DevicePtr, result, sys};
use candle_core::{CudaDevice, DType, Device, Storage, Tensor, Var};
use candle_moe::order::{ExpertMap, ExpertOrder, NO_EXPERT, OrderOptions, RoutedOrder};
use candle_moe::perfect_router::{Hotspot, Imbalance, PerfectRouterKey, PerfectRouterStore, Plan};
use candle_moe::routing::{ExpertGroups, Router, RoutingMethod};
use half::{bf16, f16};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{LazyLock, Mutex, mpsc};
use std::thread;

fn router(method: RoutingMethod, top_k: usize) -> Router {
    Router::new(method, top_k).unwrap()
}

fn deepseek(top_k: usize) -> Router {
    let groups = ExpertGroups { num_groups: 8, topk_group: 4 };
    router(RoutingMethod::DeepSeekV3 { groups, routed_scaling_factor: 2.5 }, top_k)
}

/// Token counts around every threshold of the launches: warps of a block, one launch and two, a warp for each token and
/// several tokens per warp, chunks of 32 tokens for each multiprocessor.
fn token_counts() -> impl Iterator<Item = usize> {
    let around = [64, 127, 128, 255, 256, 257, 511, 512, 513, 1024, 2048, 2112, 4224, 8448].into_iter();
    (0..=34).chain(around.flat_map(|n| [n - 1, n, n + 1]))
}

#[test]
fn any_number_of_tokens_is_routed_and_ordered() {
    let Some(device) = devices::cuda() else { return };
    let random = &mut Random(42);
    let renormalize = |top_k| router(RoutingMethod::Renormalize, top_k);
    for (num_experts, router, most, dtype) in [
        (128, renormalize(4), 9000, DType::BF16),
        (32, renormalize(4), 300, DType::BF16),
        (60, renormalize(6), 1100, DType::BF16),
        (200, renormalize(3), 300, DType::BF16),
        (256, renormalize(8), 600, DType::BF16),
        (500, renormalize(8), 300, DType::BF16),
        (600, renormalize(12), 1030, DType::BF16),
        (256, deepseek(8), 2100, DType::BF16),
        (128, router(RoutingMethod::MiniMax2, 8), 1100, DType::BF16),
        (128, renormalize(8), 2100, DType::F32),
        (384, renormalize(8), 2100, DType::F32),
    ] {
        let all: Vec<f32> = random.units(most * num_experts, 5.0);
        let all = oracle::floats(&all, &[most, num_experts], dtype).0;
        let on_device = all.to_device(device).unwrap();
        for num_tokens in token_counts().filter(|n| *n <= most) {
            let context = format!("{num_tokens} tokens of {num_experts} experts, {dtype:?}");
            let first = |tensor: &Tensor| tensor.narrow(0, 0, num_tokens).unwrap();
            let options = OrderOptions { tile_rows: Some(16), ..Default::default() };
            let expected = RoutedOrder::new(&router, &first(&all), &options).unwrap();
            let found = RoutedOrder::new(&router, &first(&on_device), &options).unwrap();
            assert_same_routing(
                &router.route(&first(&on_device)).unwrap(),
                &expected.routing,
                router.method(),
                &context,
            );
            assert_same_routing(&found.routing, &expected.routing, router.method(), &context);
            assert_same_order(&found.order, &expected.order, &context);
            let (found, expected) = (found.tiles.unwrap(), expected.tiles.unwrap());
            let values = |tensor: &Tensor| to_host(tensor).to_vec1::<u32>().unwrap();
            assert_eq!(values(&found.tile_experts), values(&expected.tile_experts), "{context}");
            assert_eq!(values(&found.tile_starts), values(&expected.tile_starts), "{context}");
        }
    }
}

/// With and without a bias, as many tokens as each kernel of several widths takes, in rows with and without ties.
#[test]
fn rows_of_every_width_are_routed_and_ordered() {
    if devices::cuda().is_none() {
        return;
    }
    let random = &mut Random(48);
    let groups = ExpertGroups { num_groups: 4, topk_group: 2 };
    let grouped = RoutingMethod::DeepSeekV3 { groups, routed_scaling_factor: 1.5 };
    let scaled = RoutingMethod::DeepSeekV4 { routed_scaling_factor: 1.5 };
    for num_experts in [8, 33, 64, 100, 128, 129, 160, 192, 256, 288, 384, 512, 513] {
        let bias = Tensor::from_vec(random.units(num_experts, 0.1), num_experts, &Device::Cpu).unwrap();
        for (method, dtype, top_k) in [
            (RoutingMethod::Renormalize, DType::F32, 3),
            (RoutingMethod::SigmoidRenorm, DType::F32, 8),
            (RoutingMethod::Renormalize, DType::BF16, 4),
            (RoutingMethod::Llama4, DType::F16, 8),
            (RoutingMethod::MiniMax2, DType::BF16, 6),
            (RoutingMethod::MiniMax2, DType::F32, 8),
            (scaled, DType::F16, 7),
            (grouped, DType::BF16, 4),
        ] {
            if method == grouped && num_experts % groups.num_groups > 0 {
                continue;
            }
            let plain = router(method, top_k);
            let biased = method.takes_selection_bias().then(|| plain.clone().with_selection_bias(&bias).unwrap());
            // Some rows of few different logits, some that are all the same.
            let most = 2100;
            let mut values = random.units(most * num_experts, 5.0);
            for (token, row) in values.chunks_mut(num_experts).enumerate() {
                match token % 7 {
                    0 => row.iter_mut().for_each(|logit| *logit = logit.round()),
                    1 => row.fill(-1.25),
                    _ => {}
                }
            }
            let logits = oracle::floats(&values, &[most, num_experts], dtype).0;
            for router in [Some(plain), biased].into_iter().flatten() {
                for num_tokens in [1, 15, 300, 1030, most] {
                    let context = format!("{method}, {num_tokens} tokens of {num_experts} experts, {dtype:?}");
                    let logits = logits.narrow(0, 0, num_tokens).unwrap();
                    router.route_everywhere(&logits).unwrap();
                    devices::routed(&router, &logits, &OrderOptions::default(), &context);
                }
            }
        }
    }
}

/// Each kernel of routing and of routing with order, on rows of all that bits can be, in views that bait.
#[test]
fn views_of_any_bits_are_routed_by_every_kernel() {
    if devices::cuda().is_none() {
        return;
    }
    use RoutingMethod::{DeepSeekV3, DeepSeekV4, Default, Llama4, MiniMax2, Renormalize, SigmoidRenorm};
    let random = &mut Random(50);
    let groups = ExpertGroups { num_groups: 4, topk_group: 2 };
    let grouped = DeepSeekV3 { groups, routed_scaling_factor: 2.5 };
    for (num_experts, top_k, method, dtype) in [
        (64, 4, Renormalize, DType::BF16),
        (100, 8, Renormalize, DType::F16),
        (200, 4, Renormalize, DType::BF16),
        (256, 8, Renormalize, DType::BF16),
        (384, 8, Llama4, DType::F16),
        (100, 8, Renormalize, DType::F32),
        (256, 8, SigmoidRenorm, DType::F32),
        (384, 8, Renormalize, DType::F32),
        (128, 4, grouped, DType::BF16),
        (256, 8, grouped, DType::F32),
        (500, 8, DeepSeekV4 { routed_scaling_factor: 1.5 }, DType::BF16),
        (600, 12, Renormalize, DType::BF16),
        (300, 9, MiniMax2, DType::F32),
        (512, 22, Default, DType::F16),
    ] {
        let router = router(method, top_k);
        let rows: Vec<Vec<f32>> =
            (0..2100).map(|token| (0..num_experts).map(|_| logit(random, (3 + token) % RECIPES)).collect()).collect();
        for num_tokens in [20, 300, 1030, 2100] {
            for kind in [View::Narrowed, View::NarrowedTransposed, View::BroadcastRow] {
                let (logits, _) = view(&rows[..num_tokens], num_experts, dtype, kind);
                let context = format!("{method}, {num_tokens} tokens of {num_experts} experts, {dtype:?}, {kind:?}");
                router.route_everywhere(&logits).unwrap();
                devices::routed(&router, &logits, &OrderOptions::default(), &context);
            }
        }
    }
}

#[test]
fn any_number_of_given_slots_is_ordered() {
    if devices::cuda().is_none() {
        return;
    }
    // Around the thresholds of one launch, of words, and of several chunks for a block of the second launch.
    let around = [16, 32, 64, 512, 1024, 2048, 4096, 8192, 16384, 21_120, 29_990, 33_792, 65_024, 135_168, 299_990];
    for (num_experts, most) in [(8, 300_000), (256, 140_000), (1000, 20_000), (5000, 30_000)] {
        order_slots_around(&around, num_experts, most);
    }
}

/// Each kernel that orders slots once or twice.
#[test]
fn few_and_many_given_slots_are_ordered() {
    if devices::cuda().is_some() {
        order_slots_around(&[16, 500, 3000], 8, 4000);
        order_slots_around(&[3000], 5000, 4000);
    }
}

/// A few slots more and less than each of `around`, up to `most`.
fn order_slots_around(around: &[usize], num_experts: usize, most: usize) {
    let random = &mut Random(47);
    let id = |random: &mut Random| match random.below(20) {
        0 => NO_EXPERT,
        _ => random.below(num_experts) as u32,
    };
    let ids: Vec<u32> = (0..most).map(|_| id(random)).collect();
    for around in around {
        for num_slots in [around - 1, *around, around + 1, around + 7].into_iter().filter(|n| *n <= most) {
            let ids = Tensor::from_slice(&ids[..num_slots], (num_slots, 1), &Device::Cpu).unwrap();
            devices::order(&ids, num_experts, 0..num_experts);
            devices::order(&ids, num_experts, num_experts / 3..num_experts / 2);
        }
    }
}

#[test]
fn padding_is_counted_on_the_device() {
    if devices::cuda().is_none() {
        return;
    }
    let random = &mut Random(43);
    for (num_experts, top_k) in [(24, 3), (256, 8), (1200, 5)] {
        let logits = oracle::floats(&random.units(40 * num_experts, 5.0), &[40, num_experts], DType::F16).0;
        for method in oracle::methods().chain(oracle::grouped_methods(num_experts, top_k)) {
            let router = router(method, top_k);
            for num_valid in [0u32, 1, 17, 40, 41, u32::MAX] {
                // A view into more numbers.
                let num_valid_tokens =
                    Tensor::new(&[7u32, num_valid, 9], &Device::Cpu).unwrap().narrow(0, 1, 1).unwrap();
                let padded = router.route_padded_everywhere(&logits, &num_valid_tokens).unwrap();
                let ids = padded.topk_ids.to_vec2::<u32>().unwrap();
                assert!(ids[num_valid.min(40) as usize..].iter().flatten().all(|id| *id == NO_EXPERT));
                let options = OrderOptions { num_valid_tokens: Some(num_valid_tokens), ..Default::default() };
                devices::routed(&router, &logits, &options, &format!("{method}, {num_valid} valid"));
            }
        }
    }
}

#[test]
fn a_captured_graph_gives_the_same_bits_a_hundred_times() {
    on_lasting_thread(replay_a_hundred_times);
}

fn replay_a_hundred_times() {
    let Some(device) = devices::cuda() else { return };
    let random = &mut Random(44);
    for dtype in [DType::F32, DType::BF16] {
        let logits = oracle::floats(&random.units(2100 * 256, 6.0), &[2100, 256], dtype).0.to_device(device).unwrap();
        for (router, num_tokens) in [
            (deepseek(8), 1),
            (deepseek(8), 20),
            (deepseek(8), 200),
            (deepseek(8), 700),
            (deepseek(8), 2100),
            (router(RoutingMethod::Renormalize, 8), 20),
            (router(RoutingMethod::Renormalize, 8), 300),
            (router(RoutingMethod::Default, 8), 200),
        ] {
            let logits = logits.narrow(0, 0, num_tokens).unwrap();
            let options = OrderOptions { tile_rows: Some(64), ..Default::default() };
            let route = || outputs(RoutedOrder::new(&router, &logits, &options).unwrap());
            let first = route().map(|tensor| bits(&tensor));
            let (graph, outputs) = captured(device, route);
            // What a graph allocates is there from its first launch on.
            graph.launch().unwrap();
            for replay in 0..100 {
                outputs.iter().for_each(|tensor| overwrite(tensor, &vec![0xAAAA_AAAAu32; tensor.elem_count()]));
                graph.launch().unwrap();
                let context = format!("{}, {num_tokens} tokens, {dtype:?}, replay {replay}", router.method());
                for (part, (found, expected)) in outputs.iter().map(bits).zip(&first).enumerate() {
                    assert!(found == *expected, "{context}: output {part}");
                }
            }
        }
    }
}

/// Everything that a routed order is made of.
fn outputs(routed: RoutedOrder) -> [Tensor; 8] {
    let RoutedOrder { routing, order, tiles } = routed;
    let tiles = tiles.unwrap();
    let ExpertOrder { expert_counts, expert_offsets, sorted_slots, slot_rank, .. } = order;
    let (ids, weights) = (routing.topk_ids, routing.topk_weights);
    [ids, weights, expert_counts, expert_offsets, sorted_slots, slot_rank, tiles.tile_experts, tiles.tile_starts]
}

/// The elements of a u32 tensor, or the bits of a float32 one.
fn bits(tensor: &Tensor) -> Vec<u32> {
    let tensor = to_host(&tensor.flatten_all().unwrap());
    match tensor.dtype() {
        DType::U32 => tensor.to_vec1().unwrap(),
        _ => oracle::bits_of(&tensor),
    }
}

#[test]
fn the_gradient_is_that_of_the_cpu() {
    let Some(device) = devices::cuda() else { return };
    let random = &mut Random(45);
    for (num_experts, top_k, dtype) in
        [(64, 6, DType::F32), (64, 6, DType::BF16), (48, 40, DType::F16), (4, 2, DType::F32)]
    {
        let (num_tokens, is_odd) = (9, |token: usize| token % 4 == 3);
        let mut logits = random.units(num_tokens * num_experts, 3.0);
        // Some rows hold what has no gradient.
        for (i, l) in logits.iter_mut().enumerate().filter(|(i, _)| is_odd(i % num_tokens)) {
            *l = [f32::NEG_INFINITY, f32::NAN, f32::INFINITY][i % 3];
        }
        let shape = (num_experts, num_tokens);
        let factors =
            Tensor::from_vec(random.units(num_tokens * top_k, 1.0), (num_tokens, top_k), &Device::Cpu).unwrap();
        for method in oracle::methods().chain(oracle::grouped_methods(num_experts, top_k)) {
            let gradient = |device: &Device, in_one_step: bool, padded: bool| {
                let logits =
                    Var::from_tensor(&Tensor::from_slice(&logits, shape, device).unwrap().to_dtype(dtype).unwrap());
                let logits = logits.unwrap();
                let num_valid_tokens = padded.then(|| Tensor::new(5u32, device).unwrap());
                let (router, view) = (router(method, top_k), logits.t().unwrap());
                let weights = match (in_one_step, &num_valid_tokens) {
                    (true, _) => {
                        let options = OrderOptions { num_valid_tokens, ..Default::default() };
                        RoutedOrder::new(&router, &view, &options).unwrap().routing
                    }
                    (false, Some(num_valid)) => router.route_padded(&view, num_valid).unwrap(),
                    (false, None) => router.route(&view).unwrap(),
                };
                let loss = (weights.topk_weights * factors.to_device(device).unwrap()).unwrap().sum_all().unwrap();
                let gradient = to_host(loss.backward().unwrap().get(&logits).unwrap());
                assert_eq!((gradient.dims2().unwrap(), gradient.dtype()), (shape, dtype));
                oracle::rows_of(&gradient).concat()
            };
            for padded in [false, true] {
                let expected = gradient(&Device::Cpu, false, padded);
                assert!(method.routed_scaling_factor() == 0.0 || expected.iter().any(|g| *g != 0.0), "{method}");
                for in_one_step in [false, true] {
                    let found = gradient(device, in_one_step, padded);
                    let close = |a: f32, b: f32| (a - b).abs() < 1e-5 + 0.01 * b.abs() * f32::from(dtype != DType::F32);
                    for (i, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
                        assert!(close(found, expected), "{method}, {dtype:?}: {found} at {i}, not {expected}");
                    }
                }
            }
        }
    }
}

#[test]
fn perfect_logits_have_the_bits_of_the_cpu() {
    let Some(device) = devices::cuda() else { return };
    let groups = |num_groups, topk_group| ExpertGroups { num_groups, topk_group };
    let flat =
        |num_experts, top_k, ep_size| (0..ep_size).map(move |r| Plan::new(num_experts, top_k, ep_size, r).unwrap());
    let mut plans: Vec<Plan> = Vec::new();
    for (num_experts, top_k, ep_size) in
        [(8, 2, 4), (1, 1, 1), (7, 7, 3), (60, 4, 8), (256, 8, 8), (257, 33, 2), (10, 9, 4), (896, 16, 5)]
    {
        plans.extend(flat(num_experts, top_k, ep_size));
    }
    for ep_size in [1, 3, 8, 16] {
        plans.extend(flat(256, 8, ep_size).map(|plan| plan.with_groups(groups(8, 4)).unwrap()));
        plans.extend(flat(48, 5, ep_size).map(|plan| plan.with_groups(groups(6, 2)).unwrap()));
    }
    for hotspot in [Hotspot::Rank(1), Hotspot::Expert(5)] {
        let imbalance = Imbalance { hotspot, fraction: 0.3, seed: 9 };
        plans.extend(flat(64, 6, 4).map(|plan| plan.with_imbalance(imbalance).unwrap()));
    }
    for (i, plan) in plans.into_iter().enumerate() {
        let key = PerfectRouterKey { plan, dtype: FLOATS[i % 3] };
        let (store, period) = (PerfectRouterStore::new(), key.plan.period());
        for (first, num_tokens) in [(0, 0), (0, 1), (0, 40), (3, 500), (period - 1, 3)] {
            // Beyond this the same formula takes long on the host.
            if first + num_tokens > 5000 {
                continue;
            }
            let found = store.logits_from(&key, first, num_tokens, device).unwrap();
            let expected = store.logits_from(&key, first, num_tokens, &Device::Cpu).unwrap();
            assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()));
            assert_eq!(oracle::rows_of(&to_host(&found)), oracle::rows_of(&expected), "{key:?} from {first}");
        }
    }
}

fn cuda_device(device: &Device) -> &CudaDevice {
    match device {
        Device::Cuda(device) => device,
        _ => panic!("not a CUDA device"),
    }
}

fn address(tensor: &Tensor) -> u64 {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { panic!("not on a CUDA device") };
    let stream = storage.device().cuda_stream();
    let bytes = (layout.start_offset() * storage.dtype().size_in_bytes()) as u64;
    bytes
        + match storage.dtype() {
            DType::U32 => storage.as_cuda_slice::<u32>().unwrap().device_ptr(&stream).0,
            DType::F16 => storage.as_cuda_slice::<f16>().unwrap().device_ptr(&stream).0,
            DType::BF16 => storage.as_cuda_slice::<bf16>().unwrap().device_ptr(&stream).0,
            _ => storage.as_cuda_slice::<f32>().unwrap().device_ptr(&stream).0,
        }
}

/// Overwrites a tensor that is contiguous, in place, as a server does between two replays.
fn overwrite<T>(tensor: &Tensor, values: &[T]) {
    assert!(tensor.is_contiguous() && tensor.elem_count() == values.len());
    tensor.device().synchronize().unwrap();
    // SAFETY: the tensor has as many elements of this size, side by side, and nothing on the device uses them now.
    unsafe { result::memcpy_htod_sync(address(tensor), values) }.unwrap();
}

/// Captures what `f` puts on the device's stream; the graph and what `f` returned.
fn captured<T>(device: &Device, f: impl FnOnce() -> T) -> (CudaGraph, T) {
    let stream = cuda_device(device).cuda_stream();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let result = f();
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    (stream.end_capture(flags).unwrap().unwrap(), result)
}

/// Runs `f` on a thread that never ends, and waits for it. A driver was seen to crash when a thread that had captured ended
/// while other threads worked.
fn on_lasting_thread(f: impl FnOnce() + Send + 'static) {
    type Work = Box<dyn FnOnce() + Send>;
    static WORK: LazyLock<Mutex<mpsc::Sender<Work>>> = LazyLock::new(|| {
        let (sender, receiver) = mpsc::channel::<Work>();
        thread::spawn(move || receiver.into_iter().for_each(|work| work()));
        Mutex::new(sender)
    });
    let (done, result) = mpsc::channel();
    let work: Work = Box::new(move || drop(done.send(panic::catch_unwind(AssertUnwindSafe(f)))));
    WORK.lock().unwrap().send(work).unwrap();
    if let Err(panicked) = result.recv().unwrap() {
        panic::resume_unwind(panicked);
    }
}

#[test]
fn a_captured_graph_routes_whatever_its_inputs_hold() {
    on_lasting_thread(replay_routing);
}

fn replay_routing() {
    let Some(device) = devices::cuda() else { return };
    let random = &mut Random(46);
    for num_tokens in [1, 40, 200, 700] {
        let num_experts = 256;
        let logits = Tensor::zeros((num_tokens, num_experts), DType::F32, device).unwrap();
        let num_valid_tokens = Tensor::zeros(1, DType::U32, device).unwrap();
        let bias = Tensor::from_vec(random.units(num_experts, 0.1), num_experts, &Device::Cpu).unwrap();
        let router = deepseek(8).with_selection_bias(&bias).unwrap();
        let options = OrderOptions { num_valid_tokens: Some(num_valid_tokens.clone()), ..Default::default() };
        // The first use loads kernels and uploads the bias.
        RoutedOrder::new(&router, &logits, &options).unwrap();
        let (graph, routed) = captured(device, || RoutedOrder::new(&router, &logits, &options).unwrap());
        for num_valid in [num_tokens, num_tokens / 2, 0, num_tokens] {
            let values = random.units(num_tokens * num_experts, 4.0);
            overwrite(&logits, &values);
            overwrite(&num_valid_tokens, &[num_valid as u32]);
            graph.launch().unwrap();
            let logits = Tensor::from_vec(values, (num_tokens, num_experts), &Device::Cpu).unwrap();
            let num_valid_tokens = Some(Tensor::new(num_valid as u32, &Device::Cpu).unwrap());
            let options = OrderOptions { num_valid_tokens, ..Default::default() };
            let expected = RoutedOrder::new(&router, &logits, &options).unwrap();
            let context = format!("{num_valid} of {num_tokens} tokens");
            assert_same_routing(&routed.routing, &expected.routing, router.method(), &context);
            assert_same_order(&routed.order, &expected.order, &context);
        }
    }
}

#[test]
fn a_captured_graph_replays_perfect_routing_from_a_reserved_address() {
    on_lasting_thread(replay_perfect_routing);
}

fn replay_perfect_routing() {
    let Some(device) = devices::cuda() else { return };
    let flat = Plan::new(256, 8, 8, 3).unwrap();
    let grouped = flat.clone().with_groups(ExpertGroups { num_groups: 8, topk_group: 4 }).unwrap();
    for (plan, router) in [(flat, router(RoutingMethod::Renormalize, 8)), (grouped, deepseek(8))] {
        for dtype in FLOATS {
            replay_plan(device, &PerfectRouterKey { plan: plan.clone(), dtype }, &router);
        }
    }
}

/// Captures what routes a plan's logits, and launches it before and after the store has grown past what was reserved.
fn replay_plan(device: &Device, key: &PerfectRouterKey, router: &Router) {
    let store = PerfectRouterStore::new();
    store.reserve(key, 520, device).unwrap();
    let before = store.statistics();
    let route = |num_tokens| {
        let logits = store.logits(key, num_tokens, device).unwrap();
        (address(&logits), RoutedOrder::new(router, &logits, &OrderOptions::default()).unwrap().routing)
    };
    let graphs = [1, 64, 500].map(|num_tokens| {
        // The first use of a shape loads its kernels.
        let (first_address, _) = route(num_tokens);
        let (graph, (address, routing)) = captured(device, || route(num_tokens));
        assert_eq!(address, first_address);
        // What a graph allocates is there from its first launch on.
        graph.launch().unwrap();
        (graph, routing)
    });
    let after = store.statistics();
    assert_eq!((after.entries, after.rows, after.misses), (before.entries, before.rows, 0));
    let launch_all = |what: &str| {
        for (graph, routing) in &graphs {
            overwrite(&routing.topk_ids, &vec![NO_EXPERT; routing.topk_ids.elem_count()]);
            graph.launch().unwrap();
            assert_planned(&routing.topk_ids, &key.plan, &format!("{key:?} {what}"));
        }
    };
    launch_all("as reserved");
    store.logits(key, 521, device).unwrap();
    assert_eq!(store.statistics().bytes, before.bytes + store.statistics().rows * (before.bytes / before.rows));
    // What would get the memory of the old buffer if it were free.
    let others = [(); 4].map(|()| Tensor::ones((before.rows, 256), key.dtype, device).unwrap());
    launch_all("after growth");
    drop(others);
}

/// The same experts for every token as the plan says, in any order.
#[track_caller]
fn assert_planned(topk_ids: &Tensor, plan: &Plan, context: &str) {
    let (num_tokens, top_k) = topk_ids.dims2().unwrap();
    let planned = plan.topk_ids(0, num_tokens).unwrap();
    let ids = to_host(topk_ids).to_vec2::<u32>().unwrap();
    for (token, (mut ids, planned)) in ids.into_iter().zip(planned.chunks(top_k)).enumerate() {
        let mut planned = planned.to_vec();
        ids.sort_unstable();
        planned.sort_unstable();
        assert_eq!(ids, planned, "{context}: token {token} of {num_tokens}");
    }
}

#[test]
fn bad_input_is_refused_as_on_the_cpu_and_the_device_still_works() {
    let Some(device) = devices::cuda() else { return };
    let zeros = |shape: &[usize], dtype, device: &Device| Tensor::zeros(shape, dtype, device).unwrap();
    let with_groups = oracle::grouped_methods(12, 2)[0];
    for (method, top_k, shape, dtype) in [
        (RoutingMethod::Renormalize, 9, &[2, 8][..], DType::F32),
        (RoutingMethod::Renormalize, 1, &[2, 0], DType::F32),
        (RoutingMethod::Renormalize, 1, &[8], DType::F32),
        (RoutingMethod::Renormalize, 1, &[2, 8], DType::U32),
        (with_groups, 2, &[2, 7], DType::F32),
    ] {
        let router = router(method, top_k);
        let alone = |device: &Device| line(router.route(&zeros(shape, dtype, device)).unwrap_err());
        assert_eq!(alone(device), alone(&Device::Cpu));
        let options = OrderOptions::default();
        let ordered =
            |device: &Device| line(RoutedOrder::new(&router, &zeros(shape, dtype, device), &options).unwrap_err());
        assert_eq!(ordered(device), ordered(&Device::Cpu));
    }
    let router = router(RoutingMethod::Renormalize, 2);
    // More experts than a block has shared memory for.
    let error = line(router.route(&zeros(&[1, 100_000], DType::F32, device)).unwrap_err());
    assert!(error.contains("num_experts 100000") && error.contains("shared memory"), "{error}");
    let ids = zeros(&[3, 1], DType::U32, device);
    let error = line(ExpertOrder::new(&ids, 100_000, 0..100_000).unwrap_err());
    assert!(error.contains("num_local_experts 100000") && error.contains("shared memory"), "{error}");
    // More tiles than kernels count.
    let options = OrderOptions { tile_rows: Some(1), ..Default::default() };
    let many = logits_of_one_row(device, (u32::MAX as usize - 1) / 2);
    let error = line(RoutedOrder::new(&router, &many, &options).unwrap_err());
    assert!(error.contains("tiles") && error.contains("tile_rows"), "{error}");
    // Tensors on different devices.
    let logits = zeros(&[4, 8], DType::F32, device);
    let here = Tensor::new(3u32, &Device::Cpu).unwrap();
    let error = line(router.route_padded(&logits, &here).unwrap_err());
    assert!(error.contains("num_valid_tokens is on Cpu") && error.contains("as router_logits"), "{error}");
    let options = OrderOptions { num_valid_tokens: Some(here), ..Default::default() };
    assert_eq!(line(RoutedOrder::new(&router, &logits, &options).unwrap_err()), error);
    // An id that is no expert is skipped.
    let ids = Tensor::new(&[[1u32, 9], [NO_EXPERT, 0]], device).unwrap();
    let order = ExpertOrder::new(&ids, 8, 0..8).unwrap();
    assert_eq!(to_host(&order.sorted_slots).to_vec1::<u32>().unwrap()[..2], [3, 0]);
    assert_works(device);
}

#[test]
fn memory_that_is_not_there_is_a_clear_error_and_the_store_goes_on() {
    let Some(device) = devices::cuda() else { return };
    let store = PerfectRouterStore::new();
    let key = PerfectRouterKey { plan: Plan::new(1024, 8, 8, 0).unwrap(), dtype: DType::F32 };
    let small = store.logits(&key, 4, device).unwrap();
    let before = store.statistics();
    for num_tokens in [1usize << 30, usize::MAX / 4096, usize::MAX] {
        let error = line(store.logits(&key, num_tokens, device).unwrap_err());
        assert!(error.contains("perfect-router store"), "{error}");
    }
    let error = line(store.reserve(&key, 1 << 30, device).unwrap_err());
    assert!(error.contains("cannot allocate 4398046511104 bytes"), "{error}");
    assert_eq!(store.statistics(), before);
    assert_eq!(address(&store.logits(&key, 4, device).unwrap()), address(&small));
    // Outputs that do not fit.
    let router = router(RoutingMethod::Renormalize, 8);
    let error = line(router.route(&logits_of_one_row(device, 1 << 40)).unwrap_err());
    assert!(error.contains("topk-routing: cannot allocate 35184372088832 bytes"), "{error}");
    assert_works(device);
}

/// `[num_tokens, 8]`, all of one row.
fn logits_of_one_row(device: &Device, num_tokens: usize) -> Tensor {
    Tensor::zeros((1, 8), DType::F32, device).unwrap().broadcast_as((num_tokens, 8)).unwrap()
}

fn assert_works(device: &Device) {
    let logits = Tensor::new(&[[0f32, 2., 1.]], device).unwrap();
    let routing = router(RoutingMethod::Renormalize, 2).route(&logits).unwrap();
    assert_eq!(to_host(&routing.topk_ids).to_vec2::<u32>().unwrap(), [[1, 2]]);
}

#[test]
fn planned_logits_are_of_the_device_that_asks_and_not_of_another_for_the_same_place() {
    if devices::cuda().is_none() {
        return;
    }
    let store = PerfectRouterStore::new();
    let key = PerfectRouterKey { plan: Plan::new(8, 2, 4, 0).unwrap(), dtype: DType::F32 };
    let both = [0, 0].map(|ordinal| Device::new_cuda(ordinal).unwrap());
    for num_tokens in [3, 100, 4] {
        for device in &both {
            assert!(store.logits(&key, num_tokens, device).unwrap().device().same_device(device));
        }
    }
    let statistics = store.statistics();
    assert_eq!((statistics.entries, statistics.misses, statistics.hits), (2, 4, 2));
}

#[test]
fn two_devices_are_told_apart_and_a_router_serves_both() {
    let Some(first) = devices::cuda() else { return };
    let second = match Device::new_cuda(1) {
        Ok(second) => second,
        Err(_) => return devices::say("SKIPPED on two CUDA devices: there is one"),
    };
    let random = &mut Random(51);
    let logits = Tensor::from_vec(random.units(300 * 12, 4.0), (300, 12), &Device::Cpu).unwrap();
    let bias = Tensor::from_vec(random.units(12, 0.1), 12, &Device::Cpu).unwrap();
    let router = router(RoutingMethod::MiniMax2, 3).with_selection_bias(&bias).unwrap();
    let count = Tensor::new(3u32, &second).unwrap();
    let error = line(router.route_padded(&logits.to_device(first).unwrap(), &count).unwrap_err());
    assert!(error.contains("num_valid_tokens is on Cuda") && error.contains("as router_logits"), "{error}");
    let held: Vec<usize> = (0..12).chain([3, 3, 7]).collect();
    let options = OrderOptions { map: Some(ExpertMap::new(12, &held).unwrap()), ..Default::default() };
    let expected = RoutedOrder::new(&router, &logits, &options).unwrap();
    for device in [first, &second, first, &second] {
        let found = RoutedOrder::new(&router, &logits.to_device(device).unwrap(), &options).unwrap();
        assert_eq!(found.routing.topk_ids.device().location(), device.location());
        assert_same_routing(&found.routing, &expected.routing, router.method(), "on two devices");
        assert_same_order(&found.order, &expected.order, "on two devices");
    }
}
