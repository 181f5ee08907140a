//! The perfect router: its schedule against the formula, its logits against the routing op, its store against its promises.

use crate::oracle::{self, FLOATS, MODELS, Random};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use candle_moe::perfect_router::{PerfectRouterKey, PerfectRouterStore, Schedule, StoreStatistics};
use candle_moe::routing::{Router, RoutingMethod};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn key(num_experts: usize, top_k: usize, ep_size: usize, ep_rank: usize, dtype: DType) -> PerfectRouterKey {
    PerfectRouterKey { schedule: Schedule::new(num_experts, top_k, ep_size, ep_rank).unwrap(), dtype }
}

/// (num_experts, top_k, ep_size) with `ep_size` a divisor of `num_experts`.
fn geometry() -> impl Strategy<Value = (usize, usize, usize)> {
    let wild = prop::sample::select(MODELS.to_vec());
    let any = (1usize..=512).prop_flat_map(|num_experts| (Just(num_experts), 1..=num_experts.min(40)));
    prop_oneof![wild, any].prop_flat_map(|(num_experts, top_k)| {
        let divisors: Vec<usize> = (1..=num_experts).filter(|d| num_experts % d == 0).collect();
        (Just(num_experts), Just(top_k), prop::sample::select(divisors))
    })
}

/// Routing must select, per token as a set, the experts of the formula.
fn check_routed(logits: &Tensor, method: RoutingMethod, key: &PerfectRouterKey, first_token: usize) {
    let plan = &key.schedule;
    let ids = Router::new(method, plan.top_k()).unwrap().route(logits).unwrap().topk_ids.to_vec2::<u32>().unwrap();
    for (t, ids) in ids.into_iter().enumerate() {
        let chosen: BTreeSet<usize> = ids.into_iter().map(|id| id as usize).collect();
        let slots = (0..plan.top_k()).map(|k| (first_token + t) * plan.top_k() + k);
        let planned: BTreeSet<usize> =
            slots.map(|i| oracle::planned(plan.num_experts(), plan.ep_size(), plan.ep_rank(), i).1).collect();
        assert_eq!(planned.len(), plan.top_k());
        assert_eq!(chosen, planned, "{method} {key:?} token {}", first_token + t);
    }
}

#[test]
fn the_worked_example_comes_out() {
    let tokens = |rank| {
        let schedule = Schedule::new(8, 2, 4, rank).unwrap();
        (0..4).map(|t| schedule.experts(t).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    assert_eq!(tokens(0), [[0, 2], [4, 6], [1, 3], [5, 7]]);
    assert_eq!(tokens(1), [[2, 4], [6, 1], [3, 5], [7, 0]]);
}

#[test]
fn routing_the_logits_selects_the_experts_of_the_formula() {
    // The acceptance test of the original.
    for num_tokens in [1, 3, 8] {
        for ep_rank in [0, 1, 3] {
            let key = key(8, 2, 4, ep_rank, DType::F32);
            let logits = PerfectRouterStore::new().logits(&key, num_tokens, &Device::Cpu).unwrap();
            assert_eq!(logits.dims(), [num_tokens, 8]);
            check_routed(&logits, RoutingMethod::Renormalize, &key, 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) })]

    #[test]
    fn every_geometry_method_and_dtype_selects_the_plan(
        (num_experts, top_k, ep_size) in geometry(),
        num_tokens in 0usize..20,
        first_token in prop_oneof![Just(0usize), 0usize..5000],
        dtype in prop::sample::select(FLOATS.to_vec()),
        rank in 0.0..1.0f64,
    ) {
        let rank = (rank * ep_size as f64) as usize;
        let key = key(num_experts, top_k, ep_size, rank, dtype);
        let logits = PerfectRouterStore::new().logits_from(&key, first_token, num_tokens, &Device::Cpu).unwrap();
        prop_assert_eq!(logits.dims(), [num_tokens, num_experts]);
        prop_assert_eq!(logits.dtype(), dtype);
        for method in oracle::methods() {
            check_routed(&logits, method, &key, first_token);
        }
    }

    #[test]
    fn the_schedule_equals_the_formula_and_any_window_of_slots_is_balanced(
        (num_experts, top_k, ep_size) in geometry(),
        start in prop_oneof![0usize..3000, Just(usize::MAX / 64)],
        len in 0usize..1500,
        rank in 0.0..1.0f64,
    ) {
        let rank = (rank * ep_size as f64) as usize;
        let schedule = Schedule::new(num_experts, top_k, ep_size, rank).unwrap();
        let (mut per_receiver, mut per_expert) = (vec![0usize; ep_size], vec![0usize; num_experts]);
        for slot in start..start + len {
            let (receiver, expert) = oracle::planned(num_experts, ep_size, rank, slot);
            prop_assert_eq!((schedule.receiver(slot), schedule.expert(slot)), (receiver, expert));
            per_receiver[receiver] += 1;
            per_expert[expert] += 1;
        }
        let spread = |counts: &[usize]| counts.iter().max().unwrap() - counts.iter().min().unwrap();
        prop_assert!(spread(&per_receiver) <= 1, "{:?}", per_receiver);
        prop_assert!(spread(&per_expert) <= 1, "{:?}", per_expert);
        for token in [start / top_k, start / top_k + 1] {
            let slots: Vec<usize> = (token * top_k..(token + 1) * top_k).map(|i| schedule.expert(i)).collect();
            let experts: Vec<usize> = schedule.experts(token).collect();
            prop_assert_eq!(experts.iter().collect::<BTreeSet<_>>().len(), top_k, "an expert twice in a token");
            prop_assert_eq!(&experts, &slots);
            prop_assert_eq!(&experts, &schedule.experts(token + schedule.period()).collect::<Vec<_>>());
        }
        prop_assert_eq!(schedule.period() * top_k % num_experts, 0);
    }

    #[test]
    fn senders_hit_different_receivers_at_every_step(
        (num_experts, top_k, ep_size) in geometry(),
        step in 0usize..100_000,
    ) {
        let receivers: BTreeSet<usize> = (0..ep_size)
            .map(|rank| Schedule::new(num_experts, top_k, ep_size, rank).unwrap().receiver(step))
            .collect();
        prop_assert_eq!(receivers.len(), ep_size, "not a Latin square");
    }
}

#[test]
fn the_last_token_number_of_all_does_not_overflow() {
    let schedule = Schedule::new(6, 4, 3, 2).unwrap();
    let experts: Vec<usize> = schedule.experts(usize::MAX).collect();
    let expected: Vec<usize> = (0..4)
        .map(|k| {
            let i = (usize::MAX as u128 * 4 + k) % 6;
            oracle::planned(6, 3, 2, i as usize).1
        })
        .collect();
    assert_eq!(experts, expected);
    assert_eq!(schedule.receiver(usize::MAX), ((usize::MAX as u128 + 2) % 3) as usize);
    let store = PerfectRouterStore::new();
    let key = PerfectRouterKey { schedule, dtype: DType::F32 };
    let logits = store.logits_from(&key, usize::MAX - 1, 3, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
    for (t, row) in logits.iter().enumerate() {
        let token = (usize::MAX as u128 - 1 + t as u128) % schedule.period() as u128;
        let planned: BTreeSet<usize> = schedule.experts(token as usize).collect();
        let high: BTreeSet<usize> = (0..6).filter(|&e| row[e] > 0.0).collect();
        assert_eq!(high, planned);
    }
}

#[test]
fn schedule_errors_name_the_values() {
    #[track_caller]
    fn refused(args: (usize, usize, usize, usize), words: &[&str]) {
        let error = Schedule::new(args.0, args.1, args.2, args.3).unwrap_err().to_string();
        for word in words.iter().chain(&["perfect-router"]) {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
    refused((8, 2, 0, 0), &["ep_size is 0"]);
    refused((8, 2, 3, 0), &["num_experts is 8", "ep_size, which is 3"]);
    refused((0, 1, 1, 0), &["num_experts is 0"]);
    refused((4, 2, 8, 0), &["num_experts is 4", "8"]);
    refused((8, 2, 4, 4), &["ep_rank is 4", "ep_size, which is 4"]);
    refused((8, 9, 4, 0), &["top_k is 9", "num_experts, which is 8"]);
    refused((8, 0, 4, 0), &["top_k is 0"]);
    refused((usize::MAX, 1, 1, 0), &["num_experts is", &usize::MAX.to_string()]);
}

// ---------------------------------------------------------------------------------------------
// The store

/// Where the first value of a tensor lies.
fn address(tensor: &Tensor) -> usize {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    let first = match storage {
        CpuStorage::F32(values) => values.as_ptr() as usize,
        CpuStorage::F16(values) => values.as_ptr() as usize,
        CpuStorage::BF16(values) => values.as_ptr() as usize,
        _ => panic!("not a logit dtype"),
    };
    first + layout.start_offset() * tensor.dtype().size_in_bytes()
}

#[test]
fn requests_of_any_size_are_views_of_one_buffer() {
    let store = PerfectRouterStore::new();
    for dtype in FLOATS {
        let key = key(8, 2, 4, 1, dtype);
        store.reserve(&key, 100, &Device::Cpu).unwrap();
        let first = store.logits(&key, 100, &Device::Cpu).unwrap();
        for num_tokens in [1, 3, 99, 100] {
            let view = store.logits(&key, num_tokens, &Device::Cpu).unwrap();
            assert!(view.is_contiguous());
            assert_eq!(address(&view), address(&first), "a copy");
        }
        let row = 8 * dtype.size_in_bytes();
        let later = store.logits_from(&key, 3, 5, &Device::Cpu).unwrap();
        assert_eq!(address(&later), address(&first) + 3 * row, "a copy");
    }
}

#[test]
fn a_reserved_address_does_not_change() {
    let store = PerfectRouterStore::new();
    let key = key(32, 4, 8, 3, DType::BF16);
    store.reserve(&key, 4096, &Device::Cpu).unwrap();
    let address_of = |num_tokens| address(&store.logits(&key, num_tokens, &Device::Cpu).unwrap());
    let fixed = address_of(1);
    for num_tokens in [4096, 17, 4095, 1, 2048] {
        assert_eq!(address_of(num_tokens), fixed);
    }
    let rows = store.statistics().rows;
    store.reserve(&key, 10, &Device::Cpu).unwrap();
    assert_eq!(address_of(4096), fixed, "a smaller reservation moved the buffer");
    assert_eq!(store.statistics().rows, rows);
    assert_eq!(store.statistics().misses, 0);
}

#[test]
fn growth_leaves_old_views_intact() {
    let store = PerfectRouterStore::new();
    let key = key(60, 4, 6, 5, DType::F32);
    let mut views = Vec::new();
    for num_tokens in [1, 2, 40, 41, 500, 3000] {
        views.push(store.logits(&key, num_tokens, &Device::Cpu).unwrap());
    }
    let last = views[views.len() - 1].to_vec2::<f32>().unwrap();
    for view in &views {
        assert_eq!(view.to_vec2::<f32>().unwrap(), last[..view.dims()[0]], "row t depends on how many were asked for");
    }
    store.clear();
    assert_eq!(store.statistics(), StoreStatistics::default());
    assert_eq!(views[2].to_vec2::<f32>().unwrap(), last[..40]);
}

#[test]
fn statistics_are_exact() {
    let store = PerfectRouterStore::new();
    let (a, b) = (key(8, 2, 4, 0, DType::F32), key(8, 2, 4, 0, DType::F16));
    let c = key(16, 1, 2, 1, DType::BF16);
    let ask = |key, num_tokens| drop(store.logits(key, num_tokens, &Device::Cpu).unwrap());
    let is = |entries, rows, bytes, hits, misses| {
        assert_eq!(store.statistics(), StoreStatistics { entries, rows, bytes, hits, misses });
    };
    is(0, 0, 0, 0, 0);
    store.reserve(&a, 100, &Device::Cpu).unwrap();
    is(1, 100, 100 * 8 * 4, 0, 0);
    ask(&a, 100);
    ask(&a, 1);
    is(1, 100, 100 * 8 * 4, 2, 0);
    store.reserve(&b, 64, &Device::Cpu).unwrap();
    store.reserve(&c, 32, &Device::Cpu).unwrap();
    is(3, 196, 100 * 8 * 4 + 64 * 8 * 2 + 32 * 16 * 2, 2, 0);
    ask(&b, 0);
    is(3, 196, 100 * 8 * 4 + 64 * 8 * 2 + 32 * 16 * 2, 3, 0);
    ask(&c, 33);
    let grown = store.statistics();
    assert_eq!((grown.entries, grown.hits, grown.misses), (3, 3, 1));
    assert!(grown.rows >= 164 + 33);
    ask(&c, 33);
    assert_eq!(store.statistics(), StoreStatistics { hits: 4, ..grown });
    // A refused request is neither.
    store.logits(&a, usize::MAX, &Device::Cpu).unwrap_err();
    assert_eq!(store.statistics(), StoreStatistics { hits: 4, ..grown });
    store.clear();
    is(0, 0, 0, 0, 0);
}

#[test]
fn senders_and_dtypes_do_not_share_a_buffer() {
    let store = PerfectRouterStore::new();
    for rank in 0..4 {
        for dtype in FLOATS {
            let key = key(8, 2, 4, rank, dtype);
            let logits = store.logits(&key, 5, &Device::Cpu).unwrap();
            assert_eq!(logits.dtype(), dtype);
            check_routed(&logits, RoutingMethod::Renormalize, &key, 0);
        }
    }
    assert_eq!(store.statistics().entries, 12);
}

#[test]
fn a_later_first_token_continues_the_longer_request() {
    let store = PerfectRouterStore::new();
    for (num_experts, top_k, ep_size) in [(8, 2, 4), (60, 4, 6), (12, 5, 3), (16, 1, 16), (7, 7, 1)] {
        let key = key(num_experts, top_k, ep_size, ep_size - 1, DType::F16);
        let all = oracle::rows_of(&store.logits(&key, 200, &Device::Cpu).unwrap());
        for first in [0, 1, 2, 7, 60, 150] {
            for num_tokens in [0, 1, 50] {
                let tail = store.logits_from(&key, first, num_tokens, &Device::Cpu).unwrap();
                assert_eq!(tail.dims(), [num_tokens, num_experts]);
                if num_tokens > 0 {
                    assert_eq!(oracle::rows_of(&tail), all[first..first + num_tokens]);
                }
            }
        }
    }
}

#[test]
fn threads_that_ask_for_different_sizes_at_once_get_the_right_rows() {
    let store = PerfectRouterStore::new();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let store = &store;
            scope.spawn(move || {
                let mut random = Random(thread);
                for _ in 0..40 {
                    let key = key(8, 2, 4, random.below(4), FLOATS[random.below(3)]);
                    let (first, num_tokens) = (random.below(30), 1 + random.below(700));
                    let logits = store.logits_from(&key, first, num_tokens, &Device::Cpu).unwrap();
                    assert_eq!(logits.dims(), [num_tokens, 8]);
                    check_routed(&logits, RoutingMethod::Renormalize, &key, first);
                    if random.below(20) == 0 {
                        store.clear();
                    }
                }
            });
        }
    });
}

#[test]
fn requests_are_counted_once_each_by_many_threads() {
    let store = PerfectRouterStore::new();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            let ask = move |i| store.logits(&key(8, 2, 4, thread, DType::F32), i, &Device::Cpu).unwrap();
            scope.spawn(move || (1..100).for_each(|i| drop(ask(i))));
        }
    });
    let statistics = store.statistics();
    assert_eq!((statistics.entries, statistics.hits + statistics.misses), (4, 4 * 99));
    assert!(statistics.misses <= 4 * 8, "growth is not geometric: {statistics:?}");
}

#[test]
fn a_huge_size_is_an_error_and_not_an_abort() {
    let store = PerfectRouterStore::new();
    let key = key(8, 2, 4, 0, DType::F32);
    let small = store.logits(&key, 4, &Device::Cpu).unwrap();
    let before = store.statistics();
    for num_tokens in [usize::MAX, usize::MAX / 8, usize::MAX / 32, 1 << 50] {
        for first in [0, 3] {
            let error = store.logits_from(&key, first, num_tokens, &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains("perfect-router store"), "{error}");
        }
        store.reserve(&key, num_tokens, &Device::Cpu).unwrap_err();
    }
    assert_eq!(store.statistics(), before);
    assert_eq!(address(&store.logits(&key, 4, &Device::Cpu).unwrap()), address(&small));
}

#[test]
fn a_dtype_that_is_no_logit_dtype_is_named() {
    let store = PerfectRouterStore::new();
    for dtype in [DType::U8, DType::U32, DType::I64, DType::F64] {
        let error = store.logits(&key(8, 2, 4, 0, dtype), 1, &Device::Cpu).unwrap_err().to_string();
        for word in ["perfect-router store", &format!("{dtype:?}"), "f32, f16 or bf16"] {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
    assert_eq!(store.statistics(), StoreStatistics::default());
}
