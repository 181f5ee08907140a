//! What takes much memory or time, and runs where it is asked for; the bodies run on few rows everywhere.

use super::{bits, order_slots_around, router};
use crate::devices::{self, assert_same_routing, to_host};
use crate::oracle::{self, Random};
use candle_core::{DType, Device, Tensor, Var};
use candle_moe::experts::{Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows};
use candle_moe::order::{ExpertOrder, OrderOptions, RoutedOrder};
use candle_moe::perfect_router::{PerfectRouterKey, PerfectRouterStore, Plan};
use candle_moe::routing::RoutingMethod;

/// As many experts as leave `place` a single group of threads, and more slots than 16 bits count.
#[test]
#[ignore = "takes long where kernels are emulated"]
fn any_number_of_given_slots_of_8000_experts_is_ordered() {
    if devices::cuda().is_some() {
        order_slots_around(&[16, 1024, 65_536, 135_168, 199_990], 8000, 200_000);
    }
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

const NUM_LAST: usize = 300;

/// Rows of zeros, and [`NUM_LAST`] of random numbers after them; the last ones on the host too.
fn zeros_and_random_rows(device: &Device, num_zeros: usize, num_experts: usize) -> (Tensor, Tensor) {
    let last = Random(52).units(NUM_LAST * num_experts, 5.0);
    let last = oracle::floats(&last, &[NUM_LAST, num_experts], DType::BF16).0;
    let all = Tensor::zeros((num_zeros + NUM_LAST, num_experts), DType::BF16, device).unwrap();
    all.slice_set(&last.to_device(device).unwrap(), 0, num_zeros).unwrap();
    (all, last)
}

/// By each kind of kernel, in the whole batch and in a view that starts where it does.
fn check_last_rows(num_zeros: usize) {
    let Some(device) = devices::cuda() else { return };
    let (all, last) = zeros_and_random_rows(device, num_zeros, 128);
    for (method, top_k) in [
        (RoutingMethod::Renormalize, 8),
        (RoutingMethod::Default, 8),
        (RoutingMethod::MiniMax2, 8),
        (RoutingMethod::Renormalize, 40),
    ] {
        let router = router(method, top_k);
        let expected = router.route(&last).unwrap();
        let mut routing = router.route(&all).unwrap();
        let zeros = routing.topk_ids.narrow(0, num_zeros - 1, 1).unwrap();
        assert_eq!(to_host(&zeros).to_vec2::<u32>().unwrap(), [(0..top_k as u32).collect::<Vec<_>>()]);
        routing.topk_ids = routing.topk_ids.narrow(0, num_zeros, NUM_LAST).unwrap();
        routing.topk_weights = routing.topk_weights.narrow(0, num_zeros, NUM_LAST).unwrap();
        assert_same_routing(&routing, &expected, method, "the last rows");
        let view = all.narrow(0, num_zeros, NUM_LAST).unwrap();
        assert_same_routing(&router.route(&view).unwrap(), &expected, method, "a view of the last rows");
    }
}

#[test]
fn the_last_rows_are_routed_as_the_first() {
    check_last_rows(1000);
}

#[test]
#[ignore = "takes 10 GB of device memory"]
fn the_last_rows_of_two_billion_logits_are_routed_as_the_first() {
    check_last_rows(1 << 24);
}

/// The gradient of the last rows is that of the same rows alone.
fn check_last_gradients(num_zeros: usize) {
    let Some(device) = devices::cuda() else { return };
    let (all, last) = zeros_and_random_rows(device, num_zeros, 128);
    let factors = Tensor::from_vec(Random(53).units(8, 1.0), (1, 8), device).unwrap();
    let router = router(RoutingMethod::Renormalize, 8);
    let gradient = |logits: Tensor, first: usize| {
        let logits = Var::from_tensor(&logits).unwrap();
        let weights = router.route(&logits).unwrap().topk_weights;
        let loss = weights.broadcast_mul(&factors).unwrap().sum_all().unwrap();
        let gradient = loss.backward().unwrap().remove(&logits).unwrap();
        oracle::bits_of(&to_host(&gradient.narrow(0, first, NUM_LAST).unwrap().contiguous().unwrap()))
    };
    let expected = gradient(last.to_device(device).unwrap(), 0);
    assert!(expected.iter().any(|bits| bits << 1 != 0));
    assert!(gradient(all, num_zeros) == expected);
}

#[test]
fn the_last_rows_have_the_gradient_of_the_first() {
    check_last_gradients(1000);
}

#[test]
#[ignore = "takes 20 GB of device memory"]
fn the_last_rows_of_two_billion_logits_have_the_gradient_of_the_first() {
    check_last_gradients(1 << 24);
}

#[test]
#[ignore = "takes 4 GB of device memory"]
fn the_last_rows_of_two_billion_perfect_logits_are_those_of_the_plan() {
    let Some(device) = devices::cuda() else { return };
    let key = PerfectRouterKey { plan: Plan::new(128, 8, 8, 3).unwrap(), dtype: DType::BF16 };
    let (store, num_tokens) = (PerfectRouterStore::new(), (1 << 24) + 8);
    let found = store.logits(&key, num_tokens, device).unwrap().narrow(0, num_tokens - 8, 8).unwrap();
    let expected = store.logits_from(&key, num_tokens - 8, 8, &Device::Cpu).unwrap();
    assert_eq!(oracle::rows_of(&to_host(&found)), oracle::rows_of(&expected));
}

/// Float32 numbers whose bits go up from `first` in steps, as logits of an expert each, or beside a logit of 0.
fn compare_floats(device: &Device, first: u32, step: u32, num_tokens: usize) {
    let number = |i: usize| f32::from_bits(first.wrapping_add(step.wrapping_mul(i as u32)));
    let alone: Vec<f32> = (0..num_tokens).map(number).collect();
    let beside_zero: Vec<f32> = alone.iter().flat_map(|&number| [number, 0.0]).collect();
    // Sigmoid, root of softplus, and exp of the difference to the greatest.
    for (method, top_k) in [
        (RoutingMethod::Llama4, 1),
        (RoutingMethod::DeepSeekV4 { routed_scaling_factor: 1.0 }, 2),
        (RoutingMethod::Renormalize, 2),
    ] {
        let values = if top_k == 1 { &alone } else { &beside_zero };
        let logits = Tensor::from_slice(values, (num_tokens, top_k), &Device::Cpu).unwrap();
        let router = router(method, top_k);
        let expected = router.route(&logits).unwrap();
        let found = router.route(&logits.to_device(device).unwrap()).unwrap();
        let context = format!("{method}, floats from {first:#010x} in steps of {step}");
        assert!(bits(&found.topk_ids) == bits(&expected.topk_ids), "{context}: ids");
        assert!(bits(&found.topk_weights) == bits(&expected.topk_weights), "{context}: weights");
    }
}

#[test]
fn a_65537th_of_all_floats_have_the_scores_of_the_cpu() {
    if let Some(device) = devices::cuda() {
        compare_floats(device, 0, (1 << 16) + 1, 1 << 16);
    }
}

/// All magnitudes from 2^-31 to 2^9, outside of which scores are constant, zero, or the logits' own roots; and a 64th of the
/// other floats.
#[test]
#[ignore = "routes two billion logits"]
fn all_floats_between_powers_of_two_have_the_scores_of_the_cpu() {
    let Some(device) = devices::cuda() else { return };
    for batch in 0..256u32 {
        match batch % 128 {
            0x30..=0x43 => compare_floats(device, batch << 24, 1, 1 << 24),
            _ => compare_floats(device, batch << 24, 64, 1 << 18),
        }
    }
}

/// Kernels whose blocks wait for each other, launched by several threads at once, each with as many tokens as another kernel is
/// for: each gets the bits that it gets alone.
fn check_side_by_side(num_experts: usize, features: usize, repeats: usize) {
    let Some(device) = devices::cuda() else { return };
    let mut random = Random(63);
    let mut projection = |out_features: usize| {
        let shape = (num_experts, out_features, features / 32);
        let len = num_experts * out_features * features / 32;
        let blocks: Vec<u8> = (0..len * 2).flat_map(|_| random.next().to_le_bytes()).collect();
        let scales: Vec<u8> = (0..len).map(|_| 118 + random.below(6) as u8).collect();
        let blocks = Tensor::from_vec(blocks, (shape.0, shape.1, shape.2, 16), &Device::Cpu).unwrap();
        let scales = Tensor::from_vec(scales, shape, &Device::Cpu).unwrap();
        ExpertProjection::new(ExpertWeights::mxfp4(blocks, scales).unwrap(), None).unwrap()
    };
    let (gate_up, down) = (projection(2 * features), projection(features));
    let experts = Experts::new(gate_up, down, GateUpRows::Interleaved, Activation::GPT_OSS).unwrap();
    let experts = experts.to_device(device).unwrap();
    let experts = &experts;
    let call = |num_tokens: usize| {
        let mut random = Random(num_tokens as u64);
        let ids: Vec<u32> = (0..num_tokens).flat_map(|_| random.distinct(num_experts, 2)).collect();
        let ids = Tensor::from_vec(ids, (num_tokens, 2), device).unwrap();
        let order = ExpertOrder::new(&ids, num_experts, 0..num_experts).unwrap();
        let weights = Tensor::full(0.5f32, (num_tokens, 2), device).unwrap();
        let hidden = random.units(num_tokens * features, 1.0);
        let hidden = oracle::floats(&hidden, &[num_tokens, features], DType::BF16).0.to_device(device).unwrap();
        move || {
            let sums = experts.forward_weighted(&hidden, &weights, &order, None, DType::BF16).unwrap();
            bits(&to_host(&sums).to_dtype(DType::F32).unwrap())
        }
    };
    let num_tokens = [2, 10 * num_experts, 60 * num_experts];
    let expected = num_tokens.map(|num_tokens| call(num_tokens)());
    std::thread::scope(|scope| {
        for (num_tokens, expected) in num_tokens.into_iter().zip(&expected) {
            scope.spawn(move || {
                let forward = call(num_tokens);
                (0..repeats).for_each(|i| assert!(&forward() == expected, "{num_tokens} tokens, call {i}: other bits"));
            });
        }
    });
}

#[test]
fn experts_in_several_threads_do_not_disturb_each_other() {
    check_side_by_side(3, 64, 2);
}

#[test]
#[ignore = "fills the device, again and again"]
fn experts_of_the_size_of_gpt_oss_in_several_threads_do_not_disturb_each_other() {
    check_side_by_side(8, 2880, 100);
}
