//! Bad arguments everywhere: an error that names the argument, never a panic.

use crate::oracle;
use candle_core::{DType, Device, Tensor};
use candle_moe::block::MoeBlock;
use candle_moe::ep::{
    AbortHandle, Communicator, EpError, Health, Placement, Problem, Reduction, Sharing, Solo, Step, Strategy, Threads,
    Topology, combine, dispatch, launch,
};
use candle_moe::experts::{
    Activation, ExpertProjection, ExpertWeights, Experts, GateUpRows, Linear, fp8_row_scales, weighted_sum,
};
use candle_moe::order::{ExpertOrder, NO_EXPERT};
use candle_moe::perfect_router::{PerfectRouterKey, PerfectRouterStore, Plan};
use candle_moe::routing::{ExpertGroups, Router, Routing, RoutingMethod};
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

const MAX: usize = usize::MAX;

#[track_caller]
fn survives<T, E>(call: impl FnOnce() -> std::result::Result<T, E>) -> std::result::Result<T, E> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| panic!("the call panicked"))
}

/// The call must fail, and every one of the words, one of which is the argument, must stand in the error.
#[track_caller]
fn refuses<T, E: ToString>(words: &[&str], call: impl FnOnce() -> std::result::Result<T, E>) {
    match survives(call) {
        Ok(_) => panic!("accepted, expected an error with {words:?}"),
        Err(error) => {
            let error = error.to_string();
            words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in {error:?}"));
        }
    }
}

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

fn f32s(shape: &[usize]) -> Tensor {
    zeros(shape, DType::F32)
}

fn dense(shape: &[usize]) -> ExpertWeights {
    ExpertWeights::dense(f32s(shape)).unwrap()
}

fn plain(shape: &[usize]) -> ExpertProjection {
    ExpertProjection::new(dense(shape), None).unwrap()
}

fn experts(num_experts: usize, hidden_size: usize, intermediate_size: usize) -> Experts {
    Experts::new(
        plain(&[num_experts, 2 * intermediate_size, hidden_size]),
        plain(&[num_experts, hidden_size, intermediate_size]),
        GateUpRows::Interleaved,
        Activation::GPT_OSS,
    )
    .unwrap()
}

fn order(ids: &[u32], top_k: usize, num_experts: usize) -> ExpertOrder {
    let ids = Tensor::from_vec(ids.to_vec(), (ids.len() / top_k, top_k), &Device::Cpu).unwrap();
    ExpertOrder::new(&ids, num_experts, 0..num_experts).unwrap()
}

const NOT_FLOATS: [DType; 4] = [DType::U8, DType::U32, DType::I64, DType::F64];
const NOT_MATRICES: [&[usize]; 4] = [&[], &[8], &[0], &[1, 2, 8]];

// ---------------------------------------------------------------------------------------------
// Routing

#[test]
fn routers() {
    refuses(&["top_k", "0"], || Router::new(RoutingMethod::Llama4, 0));
    for method in oracle::methods() {
        for top_k in [1, 8, 9, MAX, u32::MAX as usize] {
            let router = survives(|| Router::new(method, top_k)).unwrap();
            for dtype in NOT_FLOATS {
                refuses(&["router_logits", &format!("{dtype:?}")], || router.route(&zeros(&[2, 8], dtype)));
            }
            for shape in NOT_MATRICES {
                refuses(&["router_logits", &format!("{shape:?}")], || router.route(&f32s(shape)));
            }
            for shape in [[0, 0], [3, 0], [MAX, 0]] {
                refuses(&["top_k", "num_experts", "0"], || router.route(&f32s(&shape)));
            }
            if top_k > 8 {
                refuses(&["top_k", &top_k.to_string(), "num_experts", "8"], || router.route(&f32s(&[2, 8])));
                refuses(&["top_k", &top_k.to_string(), "num_experts", "8"], || router.route(&f32s(&[0, 8])));
            }
        }
        let router = Router::new(method, 4).unwrap();
        refuses(&["num_experts", &MAX.to_string()], || router.route(&f32s(&[0, MAX])));
        // Views of one row that stand for more tokens than there is memory, or than 64 bits count.
        for num_tokens in [1 << 50, 1 << 60, 1 << 61, 1 << 62, MAX] {
            if let Ok(view) = f32s(&[1, 8]).broadcast_as((num_tokens, 8)) {
                refuses(&["topk-routing"], || router.route(&view));
            }
        }
    }
}

#[test]
fn selection_biases() {
    let router = |method| Router::new(method, 2).unwrap();
    for method in oracle::methods() {
        for shape in NOT_MATRICES {
            for dtype in NOT_FLOATS {
                refuses(&["bias"], || router(method).with_selection_bias(&zeros(shape, dtype)));
            }
        }
        if !method.takes_selection_bias() {
            refuses(&["bias", method.name()], || router(method).with_selection_bias(&f32s(&[8])));
        }
    }
    for len in [0, 7, 9] {
        let router = router(RoutingMethod::MiniMax2).with_selection_bias(&f32s(&[len])).unwrap();
        refuses(&["bias", "num_experts", "8"], || router.route(&f32s(&[2, 8])));
    }
    let wild = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, -0.0, 0.0, -f32::NAN];
    let router = router(RoutingMethod::MiniMax2).with_selection_bias(&Tensor::new(&wild, &Device::Cpu).unwrap());
    let router = router.unwrap();
    let routing = survives(|| router.route(&Tensor::new(&[wild, [1.0; 8]], &Device::Cpu).unwrap())).unwrap();
    let weights = routing.topk_weights.to_vec2::<f32>().unwrap().concat();
    assert!(weights.iter().all(|w| w.is_finite() && *w >= 0.0), "{weights:?}");
}

#[test]
fn method_names() {
    for name in ["", " ", "\0", "renormalize ", "ÄÖ", &"x".repeat(100_000)] {
        refuses(&["routing method", "MiniMax2"], || name.parse::<RoutingMethod>());
    }
    for (name, words) in [
        ("Renormalize:", ["Renormalize", "parameter=value"]),
        ("Renormalize:num_groups=2", ["num_groups", "the name alone"]),
        ("DeepSeekV3:num_groups", ["num_groups", "parameter=value"]),
        ("DeepSeekV3:num_groups=-1", ["-1", "whole number"]),
        ("DeepSeekV3:n_group=1", ["n_group", "topk_group"]),
        ("DeepSeekV3:num_groups=4,,", ["\"\"", "parameter=value"]),
        ("DeepSeekV4:routed_scaling_factor=x", ["\"x\"", "a number"]),
        ("DeepSeekV4:num_groups=1", ["num_groups", "routed_scaling_factor"]),
    ] {
        refuses(&["routing method", words[0], words[1]], || name.parse::<RoutingMethod>());
    }
}

#[test]
fn groups_and_factors() {
    let method = |num_groups, topk_group, routed_scaling_factor| RoutingMethod::DeepSeekV3 {
        groups: ExpertGroups { num_groups, topk_group },
        routed_scaling_factor,
    };
    for factor in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, -f32::MIN_POSITIVE] {
        refuses(&["topk-routing", "routed_scaling_factor"], || Router::new(method(2, 1, factor), 2));
        let v4 = RoutingMethod::DeepSeekV4 { routed_scaling_factor: factor };
        refuses(&["topk-routing", "routed_scaling_factor"], || Router::new(v4, 2));
    }
    for (num_groups, topk_group, top_k, words) in [
        (0, 1, 2, ["num_groups is 0", "num_experts, which is 8"]),
        (3, 1, 2, ["num_groups is 3", "num_experts, which is 8"]),
        (16, 1, 2, ["num_groups is 16", "num_experts, which is 8"]),
        (MAX, MAX, 2, ["num_groups", "num_experts, which is 8"]),
        (4, 0, 2, ["topk_group is 0", "num_groups, which is 4"]),
        (4, 5, 2, ["topk_group is 5", "num_groups, which is 4"]),
        (4, 1, 3, ["top_k is 3", "2 experts of 1 groups of 2"]),
    ] {
        let router = survives(|| Router::new(method(num_groups, topk_group, 1.0), top_k)).unwrap();
        for num_tokens in [0, 2] {
            refuses(&["topk-routing", words[0], words[1]], || router.route(&f32s(&[num_tokens, 8])));
        }
    }
}

#[test]
fn numbers_of_valid_tokens() {
    let router = Router::new(RoutingMethod::Renormalize, 2).unwrap();
    for bad in [zeros(&[2], DType::U32), zeros(&[0], DType::U32), zeros(&[], DType::I64), f32s(&[1])] {
        refuses(&["topk-routing", "num_valid_tokens", "one element of u32"], || {
            router.route_padded(&f32s(&[2, 8]), &bad)
        });
    }
    for shape in [&[][..], &[1], &[1, 1, 1]] {
        let all = Tensor::full(u32::MAX, shape, &Device::Cpu).unwrap();
        for num_tokens in [0, 3] {
            survives(|| router.route_padded(&f32s(&[num_tokens, 8]), &all)).unwrap();
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Expert order

#[test]
fn expert_orders() {
    let ids = zeros(&[2, 4], DType::U32);
    for dtype in [DType::U8, DType::I64, DType::F32, DType::F64] {
        refuses(&["topk_ids", &format!("{dtype:?}")], || ExpertOrder::new(&zeros(&[2, 4], dtype), 8, 0..8));
    }
    for shape in NOT_MATRICES {
        refuses(&["topk_ids", &format!("{shape:?}")], || ExpertOrder::new(&zeros(shape, DType::U32), 8, 0..8));
    }
    #[allow(clippy::reversed_empty_ranges)]
    for local in [0..9, 9..9, 5..2, MAX..MAX, MAX..0, 8..MAX, 0..MAX] {
        refuses(&["local_experts", &format!("{local:?}")], || ExpertOrder::new(&ids, 8, local.clone()));
    }
    refuses(&["num_experts", &MAX.to_string()], || ExpertOrder::new(&ids, MAX, 0..8));
    refuses(&["num_experts", "0"], || ExpertOrder::new(&ids, 0, 0..0));
    refuses(&["expert id 8", "num_experts"], || {
        ExpertOrder::new(&Tensor::new(&[[8u32]], &Device::Cpu).unwrap(), 8, 0..8)
    });
    for shape in [[0, 0], [0, 4], [4, 0], [MAX, 0], [0, MAX]] {
        let order = survives(|| ExpertOrder::new(&zeros(&shape, DType::U32), 8, 0..8)).unwrap();
        for tile_rows in [1, MAX] {
            survives(|| order.tile_map(tile_rows)).unwrap();
        }
    }
    for num_tokens in [1 << 31, 1 << 50, 1 << 62, MAX] {
        if let Ok(view) = zeros(&[1, 4], DType::U32).broadcast_as((num_tokens, 4)) {
            refuses(&["expert-order", "slots"], || ExpertOrder::new(&view, 8, 0..8));
        }
    }
    refuses(&["tile_rows", "0"], || order(&[0, 1], 1, 8).tile_map(0));
}

// ---------------------------------------------------------------------------------------------
// Perfect router

#[test]
fn plans_with_groups_of_any_size() {
    let plan = |num_experts, top_k, ep_size| Plan::new(num_experts, top_k, ep_size, 0).unwrap();
    let sizes = [0, 1, 2, 3, 8, 9, 256, 1 << 20, 1 << 31, u32::MAX as usize, MAX];
    for num_groups in sizes {
        for topk_group in sizes {
            let groups = ExpertGroups { num_groups, topk_group };
            for (num_experts, top_k, ep_size) in
                [(8, 2, 4), (9, 3, 2), (1 << 31, 1, 1), (1 << 20, 4, 1024), (1 << 20, 1, 1 << 17), (3, 3, 3)]
            {
                if let Ok(plan) = survives(|| plan(num_experts, top_k, ep_size).with_groups(groups)) {
                    assert_eq!(survives(|| plan.topk_ids(MAX, 2)).unwrap().len(), 2 * top_k);
                }
            }
        }
    }
    let groups = |num_groups, topk_group| ExpertGroups { num_groups, topk_group };
    refuses(&["perfect-router", "num_groups is 512", "256"], || plan(512, 1, 2).with_groups(groups(512, 5)));
    refuses(&["perfect-router", "num_groups times ep_size is 131072"], || {
        plan(1 << 17, 1, 1 << 16).with_groups(groups(2, 1))
    });
    for (num_groups, topk_group, ep_size) in [(256, 128, 256), (256, 255, 1), (2, 1, 1 << 15), (64, 32, 1000)] {
        survives(|| plan(1 << 16, 9, ep_size).with_groups(groups(num_groups, topk_group))).unwrap();
    }
}

#[test]
fn plans_and_their_store() {
    let sizes = [0, 1, 2, 3, 8, 9, u32::MAX as usize, u32::MAX as usize + 1, MAX - 1, MAX];
    let mut accepted = Vec::new();
    for num_experts in sizes {
        for top_k in sizes {
            for ep_size in sizes {
                for ep_rank in sizes {
                    let valid = ep_size > 0
                        && num_experts > 0
                        && num_experts <= u32::MAX as usize
                        && ep_size <= num_experts
                        && ep_rank < ep_size
                        && (1..=num_experts).contains(&top_k);
                    if valid {
                        accepted.push(survives(|| Plan::new(num_experts, top_k, ep_size, ep_rank)).unwrap());
                    } else {
                        refuses(&["perfect-router", "is "], || Plan::new(num_experts, top_k, ep_size, ep_rank));
                    }
                }
            }
        }
    }
    let store = PerfectRouterStore::new();
    for plan in accepted {
        assert!(plan.period() >= 1);
        refuses(&["perfect-router"], || plan.topk_ids(0, MAX));
        if plan.top_k() < 10 {
            for token in sizes {
                let ids = survives(|| plan.topk_ids(token, 2)).unwrap();
                assert!(ids.iter().all(|&id| (id as usize) < plan.num_experts() && plan.receiver(id) < plan.ep_size()));
            }
        }
        let key = PerfectRouterKey { plan, dtype: DType::F16 };
        let num_tokens = 1 << 50;
        refuses(&["perfect-router store"], || store.logits(&key, num_tokens, &Device::Cpu));
        refuses(&["perfect-router store"], || store.reserve(&key, MAX, &Device::Cpu));
        refuses(&["perfect-router store"], || store.logits_from(&key, MAX, MAX, &Device::Cpu));
        for dtype in NOT_FLOATS {
            let key = PerfectRouterKey { dtype, ..key.clone() };
            refuses(&["dtype", &format!("{dtype:?}")], || store.logits(&key, 1, &Device::Cpu));
            refuses(&["dtype", &format!("{dtype:?}")], || store.reserve(&key, 1, &Device::Cpu));
        }
    }
    assert_eq!(store.statistics().entries, 0);
}

// ---------------------------------------------------------------------------------------------
// Experts

#[test]
fn expert_weights() {
    for shape in [&[][..], &[4], &[4, 4], &[0], &[1, 2, 3, 4]] {
        refuses(&["weights", &format!("{shape:?}")], || ExpertWeights::dense(f32s(shape)));
    }
    for dtype in NOT_FLOATS {
        refuses(&["weights", &format!("{dtype:?}")], || ExpertWeights::dense(zeros(&[2, 3, 4], dtype)));
    }
    let bytes = |shape: &[usize]| zeros(shape, DType::U8);
    for shape in [&[][..], &[16], &[2, 3, 16], &[2, 3, 4, 15], &[2, 3, 4, 0], &[2, 3, 4, 16, 1]] {
        refuses(&["blocks", &format!("{shape:?}")], || ExpertWeights::mxfp4(bytes(shape), bytes(&[2, 3, 4])));
    }
    for shape in [&[][..], &[2, 3], &[2, 3, 5], &[2, 3, 4, 1], &[0, 3, 4]] {
        let weights = || ExpertWeights::mxfp4(bytes(&[2, 3, 4, 16]), bytes(shape));
        refuses(&["scales", &format!("{shape:?}"), "[2, 3, 4]"], weights);
    }
    for dtype in [DType::U32, DType::I64, DType::F32] {
        let words = &["mxfp4", &format!("{dtype:?}"), "u8"];
        refuses(words, || ExpertWeights::mxfp4(zeros(&[2, 3, 4, 16], dtype), bytes(&[2, 3, 4])));
        refuses(words, || ExpertWeights::mxfp4(bytes(&[2, 3, 4, 16]), zeros(&[2, 3, 4], dtype)));
    }
    for shape in [[0, 0, 0], [0, 3, 4], [2, 0, 4], [2, 3, 0], [MAX, 0, 1], [0, MAX, MAX]] {
        let weights = survives(|| ExpertWeights::dense(f32s(&shape))).unwrap();
        assert_eq!(weights.num_experts(), shape[0]);
        assert_eq!(weights.bytes_per_expert(), 0);
        let blocks = [shape[0], shape[1], shape[2].min(9), 16];
        survives(|| ExpertWeights::mxfp4(bytes(&blocks), bytes(&blocks[..3]))).unwrap();
    }
    // 32 columns to a block are more than 64 bits count.
    refuses(&["blocks"], || ExpertWeights::mxfp4(bytes(&[0, 1, MAX / 16, 16]), bytes(&[0, 1, MAX / 16])));
}

#[test]
fn fp8_weights() {
    let fp8s = |shape: &[usize]| zeros(shape, DType::F8E4M3);
    for shape in [&[][..], &[4], &[4, 4], &[1, 2, 3, 4]] {
        refuses(&["fp8", "values", &format!("{shape:?}")], || ExpertWeights::fp8(fp8s(shape), f32s(&[2, 3, 2])));
        refuses(&["scale_inv", &format!("{shape:?}"), "256"], || fp8_row_scales(&f32s(shape), 256));
    }
    for shape in [&[][..], &[2, 3], &[2, 3, 1], &[2, 3, 3], &[2, 3, 2, 1], &[0, 3, 2]] {
        let weights = || ExpertWeights::fp8(fp8s(&[2, 3, 129]), f32s(shape));
        refuses(&["scales", &format!("{shape:?}"), "[2, 3, 2]"], weights);
    }
    for dtype in [DType::U8, DType::I64, DType::BF16, DType::F64] {
        let words = &["fp8", &format!("{dtype:?}"), "F8E4M3"];
        // Bits as u8 are values.
        if dtype != DType::U8 {
            refuses(words, || ExpertWeights::fp8(zeros(&[2, 3, 4], dtype), f32s(&[2, 3, 1])));
        }
        refuses(words, || ExpertWeights::fp8(fp8s(&[2, 3, 4]), zeros(&[2, 3, 1], dtype)));
        refuses(&["scale_inv", &format!("{dtype:?}")], || fp8_row_scales(&zeros(&[2, 1, 3], dtype), 4));
    }
    for out_features in [0, 1, 256, 385, MAX] {
        let words = &["scale_inv", "[2, 3, 4]", &out_features.to_string()];
        refuses(words, || fp8_row_scales(&f32s(&[2, 3, 4]), out_features));
    }
    for shape in [[0, 0, 0], [0, 3, 4], [2, 0, 4], [2, 3, 0], [MAX, 0, 1], [0, 1, MAX]] {
        let scales = [shape[0], shape[1], shape[2].div_ceil(128)];
        let weights = survives(|| ExpertWeights::fp8(fp8s(&shape), f32s(&scales))).unwrap();
        assert_eq!((weights.num_experts(), weights.bytes_per_expert()), (shape[0], 0));
        let published = [shape[0], shape[1].div_ceil(128), scales[2]];
        assert_eq!(survives(|| fp8_row_scales(&f32s(&published), shape[1])).unwrap().dims(), scales);
    }
    refuses(&["num_local_experts", "out_features"], || fp8_row_scales(&f32s(&[1 << 60, 1, 0]), 128));
}

#[test]
fn projections_and_linear_layers() {
    for shape in [&[][..], &[3], &[2, 4], &[1, 3], &[2, 3, 1], &[0, 3]] {
        refuses(&["bias", &format!("{shape:?}"), "[2, 3]"], || {
            ExpertProjection::new(dense(&[2, 3, 4]), Some(f32s(shape)))
        });
    }
    for dtype in NOT_FLOATS {
        refuses(&["bias", &format!("{dtype:?}")], || {
            ExpertProjection::new(dense(&[2, 3, 4]), Some(zeros(&[2, 3], dtype)))
        });
        refuses(&["hidden", &format!("{dtype:?}")], || linear(&[1, 3, 4]).forward(&zeros(&[5, 4], dtype)));
    }
    for shape in [&[][..], &[4], &[5, 3], &[5, 0], &[1, 5, 4]] {
        refuses(&["hidden", &format!("{shape:?}")], || linear(&[1, 3, 4]).forward(&f32s(shape)));
    }
    for experts in [0, 2] {
        refuses(&["expected 1", &format!("{experts} experts")], || Linear::from_projection(plain(&[experts, 3, 4])));
    }
    for (weight, hidden) in [([1, 0, 4], [5, 4]), ([1, 3, 0], [5, 0]), ([1, 0, 0], [5, 0]), ([1, 3, 4], [0, 4])] {
        let out = survives(|| linear(&weight).forward(&f32s(&hidden))).unwrap();
        assert_eq!(out.dims(), [hidden[0], weight[1]]);
    }
    // Sizes that only empty tensors have.
    refuses(&["experts"], || linear(&[1, 8, 0]).forward(&f32s(&[1 << 60, 0])));
    refuses(&["experts"], || linear(&[1, MAX, 0]).forward(&f32s(&[2, 0])));
    refuses(&["experts"], || linear(&[1, 1 << 61, 0]).forward(&f32s(&[1, 0])));
    for width in [1 << 56, 1 << 62, MAX] {
        assert_eq!(survives(|| linear(&[1, 0, width]).forward(&f32s(&[0, width]))).unwrap().dims(), [0, 0]);
        assert_eq!(survives(|| linear(&[1, width, 0]).forward(&f32s(&[0, 0]))).unwrap().dims(), [0, width]);
    }
}

#[test]
fn experts_and_their_forward_pass() {
    let build = |first: &[usize], second: &[usize], activation| {
        Experts::new(plain(first), plain(second), GateUpRows::Interleaved, activation)
    };
    let oss = Activation::GPT_OSS;
    refuses(&["gate_up", "down", "2", "3"], || build(&[2, 8, 5], &[3, 5, 4], oss));
    refuses(&["gate_up", "down", "9", "4"], || build(&[2, 9, 5], &[2, 5, 4], oss));
    refuses(&["gate_up", "down", "5", "6"], || build(&[2, 8, 5], &[2, 6, 4], oss));
    refuses(&["gate_up", "down"], || build(&[0, MAX - 1, 1], &[0, 1, MAX], oss));
    for (alpha, limit) in
        [(f32::NAN, 7.0), (f32::INFINITY, 7.0), (1.7, 0.0), (1.7, -1.0), (1.7, f32::NAN), (1.7, f32::NEG_INFINITY)]
    {
        refuses(&["alpha", "limit"], || build(&[2, 8, 5], &[2, 5, 4], Activation::SwigluOss { alpha, limit }));
    }
    survives(|| build(&[2, 8, 5], &[2, 5, 4], Activation::SwigluOss { alpha: 0.0, limit: f32::INFINITY })).unwrap();

    let layer = experts(2, 5, 4);
    let good = order(&[0, 1, NO_EXPERT, 0, 1, 1], 2, 2);
    for shape in [&[][..], &[5], &[2, 5], &[3, 4], &[3, 0], &[0, 5], &[1, 3, 5]] {
        refuses(&["hidden", &format!("{shape:?}"), "[3, 5]"], || layer.forward(&f32s(shape), &good));
    }
    for dtype in NOT_FLOATS {
        refuses(&["hidden", &format!("{dtype:?}")], || layer.forward(&zeros(&[3, 5], dtype), &good));
    }
    refuses(&["order", "3 local experts", "expected 2"], || layer.forward(&f32s(&[3, 5]), &order(&[0, 1, 2], 1, 3)));
    let none = ExpertOrder::new(&zeros(&[3, 1], DType::U32), 2, 0..0).unwrap();
    refuses(&["order", "0 local experts"], || layer.forward(&f32s(&[3, 5]), &none));

    for (num_experts, hidden_size, intermediate_size) in [(0, 5, 4), (0, 0, 0), (2, 0, 4), (2, 5, 0), (2, 0, 0)] {
        let layer = experts(num_experts, hidden_size, intermediate_size);
        survives(|| Ok::<_, ()>(layer.bytes_per_expert())).unwrap();
        let ids = if num_experts == 0 { [NO_EXPERT; 3] } else { [0, 1, 1] };
        let order = order(&ids, 1, num_experts);
        let rows = survives(|| layer.forward(&f32s(&[3, hidden_size]), &order)).unwrap();
        assert_eq!(rows.dims(), [if num_experts == 0 { 0 } else { 3 }, hidden_size]);
        let sum = survives(|| weighted_sum(&rows, &f32s(&[3, 1]), &order)).unwrap();
        assert_eq!(sum.dims(), [3, hidden_size]);
    }
    // More inner features than memory, all of them without a weight.
    for intermediate_size in [1 << 60, 1 << 62] {
        let layer = build(&[1, 2 * intermediate_size, 0], &[1, 0, intermediate_size], oss).unwrap();
        refuses(&["experts"], || layer.forward(&f32s(&[1, 0]), &order(&[0], 1, 1)));
    }
}

#[test]
fn weighted_sums() {
    let order = order(&[0, 1, NO_EXPERT, 0], 2, 2);
    for shape in [&[][..], &[4], &[2, 1], &[2, 3], &[3, 2], &[0, 2], &[1, 2, 2]] {
        let words = &["topk_weights", &format!("{shape:?}"), "[2, 2]"];
        refuses(words, || weighted_sum(&f32s(&[3, 5]), &f32s(shape), &order));
    }
    for shape in [&[][..], &[3], &[2, 5], &[4, 5], &[0, 5], &[1, 3, 5]] {
        refuses(&["rows"], || weighted_sum(&f32s(shape), &f32s(&[2, 2]), &order));
    }
    for dtype in [DType::F16, DType::BF16, DType::F64, DType::U8] {
        refuses(&["rows", &format!("{dtype:?}")], || weighted_sum(&zeros(&[3, 5], dtype), &f32s(&[2, 2]), &order));
        refuses(&["topk_weights", &format!("{dtype:?}")], || {
            weighted_sum(&f32s(&[3, 5]), &zeros(&[2, 2], dtype), &order)
        });
    }
    let none = ExpertOrder::new(&zeros(&[1 << 40, 0], DType::U32), 2, 0..2).unwrap();
    refuses(&["experts"], || weighted_sum(&f32s(&[0, 1 << 40]), &f32s(&[1 << 40, 0]), &none));
}

// ---------------------------------------------------------------------------------------------
// Expert parallelism

#[test]
fn topologies() {
    let sizes = [0, 1, 2, 3, 7, 8, MAX - 1, MAX];
    for num_experts in sizes {
        for ep_size in sizes {
            for ep_rank in sizes {
                if ep_size == 0 || ep_size > num_experts || ep_rank >= ep_size {
                    refuses(&["topology", "ep_"], || Topology::new(num_experts, ep_size, ep_rank));
                    continue;
                }
                let topology = survives(|| Topology::new(num_experts, ep_size, ep_rank)).unwrap();
                let local = topology.local_experts();
                assert!(!local.is_empty() && local.end <= num_experts);
                assert_eq!(topology.owner(local.start).unwrap(), ep_rank);
                assert_eq!(topology.owner(local.end - 1).unwrap(), ep_rank);
                refuses(&["rank", &ep_size.to_string()], || topology.experts_of(ep_size));
                refuses(&["expert", &num_experts.to_string()], || topology.owner(num_experts));
            }
        }
    }
}

#[test]
fn groups_and_collectives() {
    for world_size in [0, 1025, MAX] {
        refuses(&["world_size", &world_size.to_string()], || Threads::group(world_size, Duration::ZERO));
        refuses(&["world_size", &world_size.to_string()], || launch(world_size, Duration::MAX, |_| ()));
    }
    fn refused<T: Debug>(words: &[&str], call: impl FnOnce(&mut Solo) -> std::result::Result<T, EpError>) {
        refuses(words, || call(&mut Solo::new()));
    }
    for counts in [&[][..], &[1, 1], &[MAX, 1]] {
        refused(&["counts"], |solo| solo.all_gather(&f32s(&[1, 2]), counts));
        refused(&["counts"], |solo| solo.reduce_scatter(&f32s(&[1, 2]), counts));
        refused(&["counts"], |solo| solo.all_to_all(&f32s(&[1, 2]), counts));
    }
    for count in [0, 2, MAX] {
        refused(&["rows", "1"], |solo| solo.all_gather(&f32s(&[1, 2]), &[count]));
        refused(&["rows", "1"], |solo| solo.reduce_scatter(&f32s(&[1, 2]), &[count]));
        refused(&["rows", "1"], |solo| solo.all_to_all(&f32s(&[1, 2]), &[count]));
    }
    refused(&["rows", "scalar"], |solo| solo.all_gather(&f32s(&[]), &[1]));
    refused(&["rows", "scalar"], |solo| solo.reduce_scatter(&f32s(&[]), &[1]));
    refused(&["rows", "scalar"], |solo| solo.all_to_all(&f32s(&[]), &[1]));
    refused(&["rows", "u8"], |solo| solo.reduce_scatter(&zeros(&[1, 2], DType::U8), &[1]));
    refused(&["values", "u32"], |solo| solo.all_reduce(&zeros(&[1, 2], DType::U32)));
    for shape in [&[MAX, 0][..], &[0, MAX], &[0]] {
        let rows = f32s(shape);
        let gathered = survives(|| Solo::new().all_gather(&rows, &[shape[0]])).unwrap();
        assert_eq!(gathered.dims(), shape);
    }
}

#[test]
fn steps() {
    let totals = launch(2, Duration::from_secs(20), |mut ranks| {
        let announced = [MAX, 1][ranks.rank()];
        survives(|| Step::agree(&mut ranks, announced)).map_err(|error| error.to_string())
    });
    for total in totals.unwrap() {
        refuses(&["rank 1", "1 tokens"], || total.unwrap());
    }
    for num_tokens in [0, MAX] {
        let step = survives(|| Step::agree(&mut Solo::new(), num_tokens)).unwrap().starting_at(MAX);
        assert_eq!((step.num_tokens(), step.first_token()), (num_tokens, MAX));
    }
}

fn routing(ids: &[&[u32]]) -> Routing {
    let top_k = ids.first().map_or(0, |row| row.len());
    let topk_ids = Tensor::from_vec(ids.concat(), (ids.len(), top_k), &Device::Cpu).unwrap();
    Routing { topk_ids, topk_weights: f32s(&[ids.len(), top_k]) }
}

#[test]
fn placements() {
    refuses(&["placement", "ep_size is 0"], || Placement::explicit(2, &[] as &[Vec<usize>]));
    refuses(&["rank 1", "no experts"], || Placement::explicit(2, &[vec![0, 1], vec![]]));
    refuses(&["rank 1", "expert 2", "less than 2"], || Placement::explicit(2, &[vec![0, 1], vec![2]]));
    refuses(&["rank 0", &MAX.to_string()], || Placement::explicit(2, &[[MAX]]));
    refuses(&["expert 1"], || Placement::explicit(2, &[[0], [0]]));
    let placement = Placement::explicit(2, &[vec![0, 1], vec![1]]).unwrap();
    for rank in [2, MAX] {
        refuses(&["rank", "ep_size = 2"], || placement.local(rank));
        refuses(&["rank", "ep_size = 2"], || placement.experts_of(rank));
    }
    for physical in [3, MAX] {
        refuses(&["physical expert", "less than 3"], || placement.owner(physical));
    }
    let map = placement.map().unwrap();
    refuses(&["topk_ids", "F32"], || map.physical_ids(&f32s(&[1, 1])));
    refuses(&["topk_ids", "[1]"], || map.physical_ids(&zeros(&[1], DType::U32)));
    refuses(&["slot 1", "2"], || map.physical_ids(&routing(&[&[0, 2]]).topk_ids));
    refuses(&["planned_ids", "2"], || placement.standing_in(&routing(&[&[0, 2]]).topk_ids));
    refuses(&["planned_ids", "F32"], || placement.standing_in(&f32s(&[1, 1])));
    for shape in [&[0, 0][..], &[0, 4], &[3, 0]] {
        assert_eq!(survives(|| map.physical_ids(&zeros(shape, DType::U32))).unwrap().dims(), shape);
    }
}

#[test]
fn choices() {
    for ep_size in [0, 1, 2, MAX] {
        for top_k in [0, 1, MAX] {
            for replicated_tokens in [false, true] {
                let problem =
                    Problem { ep_size, top_k, reduction: Reduction::SlotOrder, replicated_tokens, peer_access: false };
                for strategy in Strategy::ALL {
                    let traffic = problem.traffic(strategy);
                    assert!(traffic.dispatched_rows.is_finite() && traffic.combined_rows.is_finite());
                    let _ = survives(|| problem.choose(Some(strategy)));
                }
                match ep_size {
                    0 => refuses(&["ep_size is 0"], || problem.choose(None)),
                    _ => assert!(!survives(|| problem.choose(None)).unwrap().to_string().is_empty()),
                }
            }
        }
    }
}

#[test]
fn dispatch_and_combine() {
    let step = Step::agree(&mut Solo::new(), 2).unwrap();
    let good = routing(&[&[0, 1], &[1, 0]]);
    let placement = Placement::contiguous(2, 1).unwrap();
    for strategy in Strategy::ALL {
        for reduction in Reduction::ALL {
            let sharing = Sharing { strategy, reduction, placement: &placement };
            let run = |hidden: &Tensor, routing: &Routing| {
                survives(|| dispatch(&mut Solo::new(), &step, &sharing, hidden, routing))
            };
            for shape in [&[][..], &[3, 4], &[0, 4], &[1, 2, 4]] {
                refuses(&["hidden", "2 rows"], || run(&f32s(shape), &good));
            }
            let hidden = f32s(&[2, 4]);
            let with = |topk_ids: Tensor, topk_weights: Tensor| Routing { topk_ids, topk_weights };
            let (ids, weights) = (&good.topk_ids, &good.topk_weights);
            refuses(&["topk_ids", "2 rows"], || run(&hidden, &routing(&[&[0, 1]])));
            refuses(&["topk_weights", "2 rows"], || run(&hidden, &with(ids.clone(), f32s(&[1, 2]))));
            refuses(&["topk_weights", "[2, 3]"], || run(&hidden, &with(ids.clone(), f32s(&[2, 3]))));
            refuses(&["topk_ids", "F32"], || run(&hidden, &with(f32s(&[2, 2]), weights.clone())));
            refuses(&["topk_ids", "[4]"], || run(&hidden, &with(zeros(&[4], DType::U32), weights.clone())));
            refuses(&["topk_weights", "U32"], || run(&hidden, &with(ids.clone(), zeros(&[2, 2], DType::U32))));

            if strategy == Strategy::Peer {
                refuses(&["peer"], || run(&hidden, &good));
                continue;
            }
            let dispatched = run(&hidden, &good).unwrap();
            let order_of = |routing: &Routing| ExpertOrder::new(&routing.topk_ids, 2, 0..2).unwrap();
            let run =
                |rows: &Tensor, order: &ExpertOrder| survives(|| combine(&mut Solo::new(), &dispatched, rows, order));
            assert_eq!(run(&f32s(&[4, 4]), &order_of(&good)).unwrap().dims(), [2, 4]);
            for shape in [&[][..], &[4], &[3, 4], &[0, 4], &[5, 4], &[1, 4, 4]] {
                refuses(&["rows"], || run(&f32s(shape), &order_of(&good)));
            }
            refuses(&["rows", "F64"], || run(&zeros(&[4, 4], DType::F64), &order_of(&good)));
            refuses(&["order"], || run(&f32s(&[2, 4]), &order_of(&routing(&[&[0, 1]]))));
            refuses(&["order"], || run(&f32s(&[4, 4]), &order_of(&routing(&[&[0], &[1], &[0], &[1]]))));
        }
    }
    // Ids are judged by who sends them, or by the order.
    let of = |strategy| Sharing { strategy, reduction: Reduction::SlotOrder, placement: &placement };
    let bad = routing(&[&[0, 2], &[1, 0]]);
    for strategy in [Strategy::Replicated, Strategy::Gather, Strategy::Exchange] {
        refuses(&["physical expert", "2"], || dispatch(&mut Solo::new(), &step, &of(strategy), &f32s(&[2, 4]), &bad));
    }
    // Groups that do not fit.
    let wide = Placement::contiguous(2, 2).unwrap();
    let wide = Sharing { placement: &wide, ..of(Strategy::Gather) };
    refuses(&["1 ranks", "2"], || dispatch(&mut Solo::new(), &step, &wide, &f32s(&[2, 4]), &good));
    let outcomes = launch(2, Duration::from_secs(20), |mut ranks| {
        let solo = Sharing { strategy: Strategy::Solo, ..wide };
        let alone = dispatch(&mut ranks, &step, &wide, &f32s(&[2, 4]), &good).unwrap_err().to_string();
        let step = Step::agree(&mut ranks, 2).unwrap();
        let solo = dispatch(&mut ranks, &step, &solo, &f32s(&[2, 4]), &good).unwrap_err().to_string();
        let own = ranks.rank();
        let step = Step::agree(&mut ranks, own).unwrap();
        let uneven = Sharing { strategy: Strategy::Replicated, ..wide };
        let routing = Routing { topk_ids: zeros(&[own, 1], DType::U32), topk_weights: f32s(&[own, 1]) };
        [alone, solo, dispatch(&mut ranks, &step, &uneven, &f32s(&[own, 4]), &routing).unwrap_err().to_string()]
    });
    for errors in outcomes.unwrap() {
        let [alone, solo, uneven] = errors.unwrap();
        assert!(alone.contains("step has 1 ranks"), "{alone}");
        assert!(solo.contains("solo") && solo.contains("2 ranks"), "{solo}");
        assert!(uneven.contains("token_counts is [0, 1]"), "{uneven}");
    }
}

// ---------------------------------------------------------------------------------------------
// The block

fn linear(shape: &[usize]) -> Linear {
    Linear::from_projection(plain(shape)).unwrap()
}

fn gate(num_experts: usize, hidden_size: usize) -> Linear {
    Linear::new(f32s(&[num_experts, hidden_size]), None).unwrap()
}

fn router(top_k: usize) -> Router {
    Router::new(RoutingMethod::Renormalize, top_k).unwrap()
}

#[test]
fn gates() {
    for shape in [&[][..], &[4], &[1, 2, 4]] {
        refuses(&["weight", &format!("{shape:?}")], || Linear::new(f32s(shape), None));
    }
    for dtype in NOT_FLOATS {
        refuses(&["weight", &format!("{dtype:?}")], || Linear::new(zeros(&[3, 4], dtype), None));
        refuses(&["bias", &format!("{dtype:?}")], || Linear::new(f32s(&[3, 4]), Some(zeros(&[3], dtype))));
    }
    for shape in [&[][..], &[4], &[1, 3], &[0]] {
        refuses(&["bias"], || Linear::new(f32s(&[3, 4]), Some(f32s(shape))));
    }
    for shape in [&[][..], &[4], &[2, 3], &[1, 2, 4]] {
        refuses(&["hidden", &format!("{shape:?}")], || gate(3, 4).forward(&f32s(shape)));
    }
}

#[test]
fn blocks() {
    let build = |gate, router, experts, ep_size, ep_rank, perfect| {
        MoeBlock::builder(gate, router, experts).shard(ep_size, ep_rank).perfect_router(perfect).build()
    };
    for perfect in [false, true] {
        refuses(&["ep_size", "0"], || build(gate(8, 4), router(2), experts(8, 4, 3), 0, 0, perfect));
        refuses(&["ep_size", "9"], || build(gate(8, 4), router(2), experts(8, 4, 3), 9, 0, perfect));
        refuses(&["ep_size"], || build(gate(8, 4), router(2), experts(8, 4, 3), MAX, 0, perfect));
        refuses(&["ep_rank", "2"], || build(gate(8, 4), router(2), experts(4, 4, 3), 2, 2, perfect));
        refuses(&["ep_rank"], || build(gate(8, 4), router(2), experts(4, 4, 3), 2, MAX, perfect));
        refuses(&["ep_size"], || build(gate(0, 4), router(2), experts(0, 4, 3), 1, 0, perfect));
        refuses(&["7 experts", "0..8"], || build(gate(8, 4), router(2), experts(7, 4, 3), 1, 0, perfect));
        refuses(&["8 experts", "0..4"], || build(gate(8, 4), router(2), experts(8, 4, 3), 2, 0, perfect));
        refuses(&["hidden_size 5", "4"], || build(gate(8, 5), router(2), experts(8, 4, 3), 1, 0, perfect));
        refuses(&["top_k is 9", "8"], || build(gate(8, 4), router(9), experts(8, 4, 3), 1, 0, perfect));
        refuses(&["top_k"], || build(gate(8, 4), router(MAX), experts(8, 4, 3), 1, 0, perfect));
        let biased = Router::new(RoutingMethod::MiniMax2, 2).unwrap().with_selection_bias(&f32s(&[7])).unwrap();
        refuses(&["bias", "7", "8"], || {
            let block = build(gate(8, 4), biased.clone(), experts(8, 4, 3), 1, 0, false)?;
            block.forward_alone(&f32s(&[2, 4]))
        });

        for (hidden_size, intermediate_size) in [(0, 3), (4, 0), (0, 0)] {
            let experts = experts(8, hidden_size, intermediate_size);
            let block = build(gate(8, hidden_size), router(2), experts, 1, 0, perfect).unwrap();
            for num_tokens in [0, 3] {
                let out = survives(|| block.forward_alone(&f32s(&[num_tokens, hidden_size]))).unwrap();
                assert_eq!(out.dims(), [num_tokens, hidden_size]);
            }
            if hidden_size == 0 {
                refuses(&["experts"], || block.forward_alone(&f32s(&[1 << 60, 0])));
            }
        }

        let block = build(gate(8, 4), router(2), experts(8, 4, 3), 1, 0, perfect).unwrap();
        for shape in [&[][..], &[4], &[2, 5], &[2, 0], &[1, 2, 4]] {
            refuses(&["hidden", &format!("{shape:?}")], || block.forward_alone(&f32s(shape)));
        }
        for dtype in NOT_FLOATS {
            refuses(&["hidden", &format!("{dtype:?}")], || block.forward_alone(&zeros(&[2, 4], dtype)));
        }
        let other_step = Step::agree(&mut Solo::new(), 3).unwrap();
        refuses(&["hidden", "[2, 4]", "[3]"], || block.forward(&f32s(&[2, 4]), &mut Solo::new(), &other_step));
        let far = Step::agree(&mut Solo::new(), 2).unwrap().starting_at(MAX);
        assert_eq!(survives(|| block.forward(&f32s(&[2, 4]), &mut Solo::new(), &far)).unwrap().dims(), [2, 4]);
        refuses(&["statistics"], || block.load());
    }
}

/// A group whose other ranks send expert ids that do not exist.
struct Corrupt(Solo, u32);

impl Corrupt {
    fn corrupt(&self, received: Tensor) -> Tensor {
        match received.dtype() {
            DType::U32 => Tensor::full(self.1, received.shape(), &Device::Cpu).unwrap(),
            _ => received,
        }
    }
}

impl Communicator for Corrupt {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn world_size(&self) -> usize {
        self.0.world_size()
    }
    fn set_label(&mut self, label: &str) {
        self.0.set_label(label);
    }
    fn deadline(&self) -> Duration {
        self.0.deadline()
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.0.set_deadline(deadline);
    }
    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> std::result::Result<Tensor, EpError> {
        let gathered = self.0.all_gather(rows, counts)?;
        Ok(self.corrupt(gathered))
    }
    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> std::result::Result<Tensor, EpError> {
        self.0.reduce_scatter(rows, counts)
    }
    fn all_to_all(&mut self, rows: &Tensor, counts: &[usize]) -> std::result::Result<(Tensor, Vec<usize>), EpError> {
        let (received, counts) = self.0.all_to_all(rows, counts)?;
        Ok((self.corrupt(received), counts))
    }
    fn all_reduce(&mut self, values: &Tensor) -> std::result::Result<Tensor, EpError> {
        self.0.all_reduce(values)
    }
    fn all_gather_bytes(&mut self, bytes: &[u8]) -> std::result::Result<Vec<Vec<u8>>, EpError> {
        self.0.all_gather_bytes(bytes)
    }
    fn barrier(&mut self) -> std::result::Result<(), EpError> {
        self.0.barrier()
    }
    fn abort_handle(&self) -> AbortHandle {
        self.0.abort_handle()
    }
    fn health(&self) -> Health {
        self.0.health()
    }
}

#[test]
fn expert_ids_that_other_ranks_made_up() {
    for strategy in [Strategy::Gather, Strategy::Exchange] {
        for (id, statistics) in [(8, false), (8, true), (NO_EXPERT - 1, true), (NO_EXPERT, true)] {
            let builder = MoeBlock::builder(gate(8, 4), router(2), experts(8, 4, 3));
            let block = builder.strategy(strategy).statistics(statistics).build().unwrap();
            let mut ranks = Corrupt(Solo::new(), id);
            let step = Step::agree(&mut ranks, 2).unwrap();
            let outcome = survives(|| block.forward(&f32s(&[2, 4]), &mut ranks, &step));
            assert!(outcome.is_err(), "{strategy}: a made-up id {id} went through");
            if statistics {
                assert_eq!(block.load().unwrap().slots_per_expert, [0; 8], "a failed call was counted");
            }
        }
    }
}
