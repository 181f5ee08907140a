//! What only a CUDA device can show: sizes around the kernels' thresholds, repeats, graphs, memory that runs out. Everything
//! else runs on all devices in the tests of the rooms.

use crate::block::{self, Layer};
use crate::devices::{self, RouteEverywhere, assert_same_order, assert_same_routing, line, to_host};
use crate::oracle::{self, FLOATS, Random};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DevicePtr, result, sys};
use candle_core::{CudaDevice, DType, Device, Storage, Tensor, Var};
use candle_moe::block::MoeBlock;
use candle_moe::ep::{Solo, Step};
use candle_moe::order::{ExpertOrder, NO_EXPERT, OrderOptions, RoutedOrder};
use candle_moe::perfect_router::{Hotspot, Imbalance, PerfectRouterKey, PerfectRouterStore, Plan};
use candle_moe::routing::{ExpertGroups, Router, RoutingMethod};
use half::bf16;
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
    let around = [64, 127, 128, 255, 256, 257, 511, 512, 513, 1024, 2112, 4224, 8448].into_iter();
    (0..=34).chain(around.flat_map(|n| [n - 1, n, n + 1]))
}

#[test]
fn any_number_of_tokens_is_routed_and_ordered() {
    let Some(device) = devices::cuda() else { return };
    let random = &mut Random(42);
    let renormalize = |top_k| router(RoutingMethod::Renormalize, top_k);
    for (num_experts, router, most) in [
        (128, renormalize(4), 9000),
        (32, renormalize(4), 300),
        (60, renormalize(6), 1100),
        (200, renormalize(3), 300),
        (256, renormalize(8), 600),
        (500, renormalize(8), 300),
        (600, renormalize(12), 1030),
        (256, deepseek(8), 1030),
    ] {
        let all: Vec<f32> = random.units(most * num_experts, 5.0);
        let all = oracle::floats(&all, &[most, num_experts], DType::BF16).0;
        let on_device = all.to_device(device).unwrap();
        for num_tokens in token_counts().filter(|n| *n <= most) {
            let context = format!("{num_tokens} tokens of {num_experts} experts");
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

#[test]
fn any_number_of_given_slots_is_ordered() {
    if devices::cuda().is_none() {
        return;
    }
    let random = &mut Random(47);
    for (num_experts, most) in [(8, 300_000), (256, 70_000), (1000, 20_000), (5000, 9000)] {
        let ids: Vec<u32> = (0..most)
            .map(|_| if random.below(20) == 0 { NO_EXPERT } else { random.below(num_experts) as u32 })
            .collect();
        for around in [32, 64, 512, 1024, 2048, 4096, 8192, 16384, 65_024, 135_168, 299_990] {
            for num_slots in [around - 1, around, around + 1, around + 7].into_iter().filter(|n| *n <= most) {
                let ids = Tensor::from_slice(&ids[..num_slots], (num_slots, 1), &Device::Cpu).unwrap();
                devices::order(&ids, num_experts, 0..num_experts);
                devices::order(&ids, num_experts, num_experts / 3..num_experts / 2);
            }
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
fn the_same_input_gives_the_same_bits_a_hundred_times() {
    let Some(device) = devices::cuda() else { return };
    let random = &mut Random(44);
    let logits = Tensor::from_vec(random.units(500 * 256, 6.0), (500, 256), device).unwrap();
    for router in [deepseek(8), router(RoutingMethod::Renormalize, 8), router(RoutingMethod::Default, 8)] {
        for num_tokens in [20, 200, 500] {
            let logits = logits.narrow(0, 0, num_tokens).unwrap();
            let options = OrderOptions { tile_rows: Some(64), ..Default::default() };
            let bits = || {
                let RoutedOrder { routing, order, tiles } = RoutedOrder::new(&router, &logits, &options).unwrap();
                let tiles = tiles.unwrap();
                let ids = routing.topk_ids.flatten_all().unwrap();
                let numbers = [&ids, &order.sorted_slots, &order.slot_rank, &order.expert_offsets, &tiles.tile_experts]
                    .map(|tensor| to_host(tensor).to_vec1::<u32>().unwrap());
                (oracle::bits_of(&to_host(&routing.topk_weights)), numbers)
            };
            let first = bits();
            (0..100).for_each(|_| assert!(bits() == first, "{} with {num_tokens} tokens", router.method()));
        }
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
    let (store, plan) = (PerfectRouterStore::new(), Plan::new(256, 8, 8, 3).unwrap());
    let plan = plan.with_groups(ExpertGroups { num_groups: 8, topk_group: 4 }).unwrap();
    let key = PerfectRouterKey { plan, dtype: DType::F32 };
    store.reserve(&key, 1024, device).unwrap();
    let before = store.statistics();
    let router = deepseek(8);
    let route = |num_tokens| {
        let logits = store.logits(&key, num_tokens, device).unwrap();
        (address(&logits), RoutedOrder::new(&router, &logits, &OrderOptions::default()).unwrap())
    };
    let (first_address, _) = route(1);
    for num_tokens in [1, 64, 1000] {
        let (graph, (address, routed)) = captured(device, || route(num_tokens));
        assert_eq!(address, first_address);
        for _ in 0..3 {
            graph.launch().unwrap();
        }
        let planned = key.plan.topk_ids(0, num_tokens).unwrap();
        let ids = to_host(&routed.routing.topk_ids).to_vec2::<u32>().unwrap();
        for (token, mut ids) in ids.into_iter().enumerate() {
            let mut planned = planned[token * 8..][..8].to_vec();
            ids.sort_unstable();
            planned.sort_unstable();
            assert_eq!(ids, planned, "token {token} of {num_tokens}");
        }
    }
    let after = store.statistics();
    assert_eq!((after.entries, after.rows, after.misses), (before.entries, before.rows, 0));
}

#[test]
fn a_captured_graph_of_a_whole_block_follows_its_inputs_and_counts() {
    on_lasting_thread(replay_blocks);
}

fn replay_blocks() {
    let Some(device) = devices::cuda() else { return };
    for (dtype, num_shared, perfect) in
        [(DType::F32, 0, false), (DType::F32, 2, false), (DType::F32, 1, true), (DType::BF16, 1, false)]
    {
        let layer = Layer::new(60, 8, dtype);
        let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 3), 1, 0).router_dtype(DType::F32);
        let mut builder = builder.statistics(true).perfect_router(perfect);
        if num_shared > 0 {
            builder = builder.shared_experts(block::shared_experts(61, num_shared, dtype));
        }
        let cpu = builder.build().unwrap();
        let cuda = cpu.to_device(device).unwrap();
        for num_tokens in [1, 7, 40] {
            replay_block(device, &cpu, &cuda, num_tokens, dtype);
        }
    }
}

fn replay_block(device: &Device, cpu: &MoeBlock, cuda: &MoeBlock, num_tokens: usize, dtype: DType) {
    let input = block::hidden_states(62, num_tokens, dtype).to_device(device).unwrap();
    let num_valid_tokens = Tensor::new(&[num_tokens as u32], device).unwrap();
    let forward = || {
        let mut solo = Solo::new();
        let step = Step::agree(&mut solo, num_tokens).unwrap().with_valid_tokens(&num_valid_tokens);
        cuda.forward(&input, &mut solo, &step).unwrap()
    };
    // The first use loads kernels and, of perfect routing, plans.
    forward();
    let (graph, output) = captured(device, forward);
    cuda.reset_load().unwrap();
    cpu.reset_load().unwrap();
    for (seed, num_valid) in [(63, num_tokens), (64, num_tokens / 2), (65, 0), (66, num_tokens)] {
        let hidden = block::hidden_states(seed, num_tokens, dtype);
        match dtype {
            DType::BF16 => overwrite(&input, &hidden.flatten_all().unwrap().to_vec1::<bf16>().unwrap()),
            _ => overwrite(&input, &hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap()),
        }
        overwrite(&num_valid_tokens, &[num_valid as u32]);
        graph.launch().unwrap();
        let mut solo = Solo::new();
        let num_valid_there = Tensor::new(num_valid as u32, &Device::Cpu).unwrap();
        let step = Step::agree(&mut solo, num_tokens).unwrap().with_valid_tokens(&num_valid_there);
        let expected = cpu.forward(&hidden, &mut solo, &step).unwrap();
        let perfect = cpu.is_perfect();
        let context = format!("{dtype:?}, perfect {perfect}, {num_valid} of {num_tokens} tokens");
        block::assert_close(&output, &expected, &context);
        assert_eq!(cuda.load().unwrap(), cpu.load().unwrap(), "{context}");
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
    router(RoutingMethod::Renormalize, 8).route(&logits_of_one_row(device, 1 << 40)).unwrap_err();
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
#[ignore = "writes half a billion slots"]
fn slots_and_logits_beyond_32_bits_do_not_wrap() {
    let Some(device) = devices::cuda() else { return };
    // 2^33 logits, all of one row; 2^29 slots.
    let (num_tokens, num_experts, top_k) = (1usize << 26, 128, 8);
    let row: Vec<f32> = Random(48).units(num_experts, 5.0);
    let row = Tensor::from_vec(row, (1, num_experts), &Device::Cpu).unwrap();
    let router = router(RoutingMethod::Renormalize, top_k);
    let expected = router.route(&row).unwrap().topk_ids.to_vec2::<u32>().unwrap().concat();
    let logits = row.to_device(device).unwrap().broadcast_as((num_tokens, num_experts)).unwrap();
    let routed = RoutedOrder::new(&router, &logits, &OrderOptions::default()).unwrap();
    let counts = to_host(&routed.order.expert_counts).to_vec1::<u32>().unwrap();
    let chosen = |expert: usize| expected.contains(&(expert as u32));
    assert!(counts.iter().enumerate().all(|(e, &count)| count as usize == if chosen(e) { num_tokens } else { 0 }));
    for token in [0, 1, num_tokens / 2, num_tokens - 1] {
        let ids = to_host(&routed.routing.topk_ids.narrow(0, token, 1).unwrap());
        assert_eq!(ids.to_vec2::<u32>().unwrap().concat(), expected);
    }
    let offsets = to_host(&routed.order.expert_offsets).to_vec1::<u32>().unwrap();
    for &expert in &expected {
        let k = expected.iter().position(|id| *id == expert).unwrap();
        for nth in [0, 1, num_tokens - 1] {
            let place = offsets[expert as usize] as usize + nth;
            let slot = to_host(&routed.order.sorted_slots.narrow(0, place, 1).unwrap()).to_vec1::<u32>().unwrap()[0];
            assert_eq!(slot as usize, nth * top_k + k);
        }
    }
}
