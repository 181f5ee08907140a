//! The rooms on CUDA against the same rooms on the CPU, bit for bit where the contract says so. Without a device every test
//! says that it was skipped.

use crate::oracle::{self, FLOATS, MODELS, Random};
use crate::routing::{RECIPES, View, check, logit, view};
use candle_core::{DType, Device, Tensor, Var};
use candle_moe::routing::{NO_EXPERT, Router, Routing, RoutingMethod};

/// The first CUDA device; says so where there is none.
fn device(test: &str) -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let reason = error.to_string();
            eprintln!("SKIPPED {test}: no CUDA device ({})", reason.lines().next().unwrap_or_default());
            None
        }
    }
}

fn router(method: RoutingMethod, top_k: usize, bias: Option<&[f32]>) -> Router {
    let router = Router::new(method, top_k).unwrap();
    match bias {
        Some(bias) => router.with_selection_bias(&Tensor::new(bias, &Device::Cpu).unwrap()).unwrap(),
        None => router,
    }
}

fn on_host(routing: &Routing) -> Routing {
    Routing {
        topk_ids: routing.topk_ids.to_device(&Device::Cpu).unwrap(),
        topk_weights: routing.topk_weights.to_device(&Device::Cpu).unwrap(),
    }
}

/// The same ids, and weights that differ by the rounding of sums only.
#[track_caller]
fn same(found: &Routing, expected: &Routing, context: &str) {
    let (found, ids) = (on_host(found), expected.topk_ids.to_vec2::<u32>().unwrap());
    let found_ids = found.topk_ids.to_vec2::<u32>().unwrap();
    for (token, (found, expected)) in found_ids.iter().zip(&ids).enumerate() {
        assert_eq!(found, expected, "{context}: token {token}");
    }
    assert_eq!(found_ids.len(), ids.len());
    let weights = |routing: &Routing| oracle::rows_of(&routing.topk_weights).concat();
    for (slot, (found, expected)) in weights(&found).into_iter().zip(weights(expected)).enumerate() {
        let close = (found - expected).abs() <= 4.0 * f32::EPSILON * expected.abs() + 1e-38;
        assert!(close, "{context}: slot {slot} has {found}, not {expected}");
    }
}

#[test]
fn routing_gives_the_ids_of_the_cpu_for_any_bits_and_views() {
    let Some(device) = device("routing_gives_the_ids_of_the_cpu_for_any_bits_and_views") else { return };
    let random = &mut Random(41);
    let small = (1..=12).flat_map(|num_experts| (1..=num_experts).map(move |top_k| (num_experts, top_k)));
    let wide = [(1000, 33), (1024, 32), (1025, 8), (2048, 100), (4096, 1), (96, 6), (513, 513), (33, 32)];
    for (num_experts, top_k) in MODELS.into_iter().chain(small).chain(wide) {
        for recipe in 0..RECIPES {
            let num_tokens = [1, 7, 40][random.below(3)];
            let dtype = FLOATS[random.below(3)];
            let kind = [View::Plain, View::Transposed, View::Narrowed, View::NarrowedTransposed, View::BroadcastRow];
            let kind = kind[random.below(kind.len())];
            let rows: Vec<Vec<f32>> = (0..num_tokens)
                .map(|_| (0..num_experts).map(|_| logit(random, if recipe == 0 { 3 } else { recipe })).collect())
                .collect();
            let (logits, held) = view(&rows, num_experts, dtype, kind);
            let on_device = logits.to_device(&device).unwrap();
            for method in oracle::methods().chain(oracle::grouped_methods(num_experts, top_k)) {
                let bias_recipe = [0, 0, 1, 3][random.below(4)];
                let bias: Vec<f32> = (0..num_experts).map(|_| logit(random, bias_recipe) / 8.0).collect();
                let bias = (method.takes_selection_bias() && random.below(2) == 0).then_some(bias.as_slice());
                let router = router(method, top_k, bias);
                let expected = router.route(&logits).unwrap();
                let found = router.route(&on_device).unwrap();
                let context =
                    format!("{method}, {num_experts} experts, top-{top_k}, {dtype:?}, {kind:?}, recipe {recipe}");
                same(&found, &expected, &context);
                check(&on_host(&found), method, bias, &held, top_k);
            }
        }
    }
}

#[test]
fn routing_of_any_number_of_tokens() {
    let Some(device) = device("routing_of_any_number_of_tokens") else { return };
    let random = &mut Random(42);
    let (num_experts, top_k) = (128, 4);
    let all: Vec<f32> = random.units(9000 * num_experts, 5.0);
    let all = oracle::floats(&all, &[9000, num_experts], DType::BF16).0;
    let on_device = all.to_device(&device).unwrap();
    let router = router(RoutingMethod::Renormalize, top_k, None);
    let expected = router.route(&all).unwrap();
    for num_tokens in
        (0..=70).chain([127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8192, 9000])
    {
        let found = router.route(&on_device.narrow(0, 0, num_tokens).unwrap()).unwrap();
        assert_eq!(found.topk_ids.dims(), [num_tokens, top_k]);
        let expected = Routing {
            topk_ids: expected.topk_ids.narrow(0, 0, num_tokens).unwrap(),
            topk_weights: expected.topk_weights.narrow(0, 0, num_tokens).unwrap(),
        };
        if num_tokens > 0 {
            same(&found, &expected, &format!("{num_tokens} tokens"));
        }
    }
}

#[test]
fn padding_is_counted_on_the_device() {
    let Some(device) = device("padding_is_counted_on_the_device") else { return };
    let random = &mut Random(43);
    for (num_experts, top_k) in [(24, 3), (256, 8), (1200, 5)] {
        let logits = oracle::floats(&random.units(40 * num_experts, 5.0), &[40, num_experts], DType::F16).0;
        let on_device = logits.to_device(&device).unwrap();
        for method in oracle::methods().chain(oracle::grouped_methods(num_experts, top_k)) {
            let router = router(method, top_k, None);
            for num_valid in [0u32, 1, 17, 40, 41, u32::MAX] {
                let expected = router.route_padded(&logits, &Tensor::new(num_valid, &Device::Cpu).unwrap()).unwrap();
                let on = Tensor::new(&[7u32, num_valid, 9], &device).unwrap().narrow(0, 1, 1).unwrap();
                let found = router.route_padded(&on_device, &on).unwrap();
                same(&found, &expected, &format!("{method}, {num_valid} valid"));
                let ids = found.topk_ids.to_vec2::<u32>().unwrap();
                assert!(ids[num_valid.min(40) as usize..].iter().flatten().all(|id| *id == NO_EXPERT));
            }
            let elsewhere = router.route_padded(&on_device, &Tensor::new(3u32, &Device::Cpu).unwrap());
            let error = elsewhere.unwrap_err().to_string();
            assert!(error.contains("num_valid_tokens is on") && error.contains("as router_logits"), "{error}");
        }
    }
}

#[test]
fn the_same_input_gives_the_same_bits_a_hundred_times() {
    let Some(device) = device("the_same_input_gives_the_same_bits_a_hundred_times") else { return };
    let random = &mut Random(44);
    let logits = Tensor::from_vec(random.units(500 * 256, 6.0), (500, 256), &device).unwrap();
    for method in oracle::methods().chain(oracle::grouped_methods(256, 8)) {
        let router = router(method, 8, None);
        let first = router.route(&logits).unwrap();
        for _ in 0..100 {
            let again = router.route(&logits).unwrap();
            assert_eq!(oracle::bits_of(&on_host(&again).topk_weights), oracle::bits_of(&on_host(&first).topk_weights));
            assert_eq!(again.topk_ids.to_vec2::<u32>().unwrap(), first.topk_ids.to_vec2::<u32>().unwrap());
        }
    }
}

#[test]
fn the_gradient_is_that_of_the_cpu() {
    let Some(device) = device("the_gradient_is_that_of_the_cpu") else { return };
    let random = &mut Random(45);
    let logits = random.units(5 * 64, 3.0);
    let factors = Tensor::from_vec(random.units(5 * 6, 1.0), (5, 6), &Device::Cpu).unwrap();
    for method in oracle::methods().chain(oracle::grouped_methods(64, 6)) {
        let gradient = |device: &Device| {
            let logits = Var::from_vec(logits.clone(), (5, 64), device).unwrap();
            let weights = router(method, 6, None).route(&logits).unwrap().topk_weights;
            let loss = (weights * factors.to_device(device).unwrap()).unwrap().sum_all().unwrap();
            oracle::rows_of(&loss.backward().unwrap().get(&logits).unwrap().to_device(&Device::Cpu).unwrap()).concat()
        };
        let (found, expected) = (gradient(&device), gradient(&Device::Cpu));
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{method}");
        assert!(expected.iter().any(|g| *g != 0.0));
    }
}

#[test]
fn bad_input_is_refused_as_on_the_cpu_and_the_device_still_works() {
    let Some(device) = device("bad_input_is_refused_as_on_the_cpu_and_the_device_still_works") else { return };
    let zeros = |shape: &[usize], dtype, device: &Device| Tensor::zeros(shape, dtype, device).unwrap();
    let plain = |error: candle_core::Error| error.to_string().lines().next().unwrap_or_default().to_string();
    for (method, top_k, shape, dtype) in [
        (RoutingMethod::Renormalize, 9, &[2, 8][..], DType::F32),
        (RoutingMethod::Renormalize, 1, &[2, 0], DType::F32),
        (RoutingMethod::Renormalize, 1, &[8], DType::F32),
        (RoutingMethod::Renormalize, 1, &[2, 8], DType::U32),
        (oracle::grouped_methods(12, 2)[0], 2, &[2, 7], DType::F32),
    ] {
        let router = router(method, top_k, None);
        let on = |device: &Device| plain(router.route(&zeros(shape, dtype, device)).unwrap_err());
        assert_eq!(on(&device), on(&Device::Cpu));
    }
    // More experts than the general kernel has shared memory for.
    let many = router(RoutingMethod::Renormalize, 2, None).route(&zeros(&[1, 100_000], DType::F32, &device));
    let error = many.unwrap_err().to_string();
    assert!(error.contains("num_experts 100000") && error.contains("shared memory"), "{error}");
    let logits = Tensor::new(&[[0f32, 2., 1.]], &device).unwrap();
    let routing = router(RoutingMethod::Renormalize, 2, None).route(&logits).unwrap();
    assert_eq!(routing.topk_ids.to_vec2::<u32>().unwrap(), [[1, 2]]);
}
