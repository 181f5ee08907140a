//! Expert order against a naive sort.

use crate::devices;
use crate::oracle::{self, MODELS, Random};
use candle_core::{Device, Tensor};
use candle_moe::order::{ExpertMap, ExpertOrder, NO_EXPERT, NO_SLOT, OrderOptions};
use candle_moe::routing::{Router, RoutingMethod};
use proptest::prelude::*;
use std::ops::Range;

fn vector(tensor: &Tensor) -> Vec<u32> {
    assert!(tensor.is_contiguous());
    tensor.to_vec1().unwrap()
}

fn check(topk_ids: &Tensor, num_experts: usize, local: Range<usize>) -> ExpertOrder {
    let order = devices::order(topk_ids, num_experts, local.clone());
    let ids: Vec<u32> = topk_ids.flatten_all().unwrap().to_vec1().unwrap();
    let sorted = oracle::order(&ids, &local);

    let counts: Vec<u32> =
        local.clone().map(|e| sorted.iter().filter(|(expert, _)| *expert == e).count() as u32).collect();
    assert_eq!(vector(&order.expert_counts), counts);
    let offsets: Vec<u32> = (0..=counts.len()).map(|e| counts[..e].iter().sum()).collect();
    assert_eq!(vector(&order.expert_offsets), offsets);

    let mut sorted_slots: Vec<u32> = sorted.iter().map(|(_, slot)| *slot as u32).collect();
    let mut slot_rank = vec![NO_SLOT; ids.len()];
    sorted_slots.iter().enumerate().for_each(|(place, &slot)| slot_rank[slot as usize] = place as u32);
    sorted_slots.resize(ids.len(), NO_SLOT);
    assert_eq!(vector(&order.sorted_slots), sorted_slots);
    assert_eq!(vector(&order.slot_rank), slot_rank);

    assert_eq!((order.num_tokens(), order.top_k()), topk_ids.dims2().unwrap());
    assert_eq!(order.local_experts(), local);
    order
}

/// Every place in exactly one tile, tiles in order, each inside its expert, the room fixed by the shapes alone.
fn check_tiles(order: &ExpertOrder, tile_rows: usize) {
    let tiles = order.tile_map(tile_rows).unwrap();
    if let Some(device) = devices::cuda() {
        let there = devices::order_to(device, order);
        let there = there.tile_map(tile_rows).unwrap();
        let on_host = |tensor: &Tensor| vector(&devices::to_host(tensor));
        assert_eq!(on_host(&there.tile_experts), vector(&tiles.tile_experts));
        assert_eq!(on_host(&there.tile_starts), vector(&tiles.tile_starts));
    }
    let (experts, starts) = (vector(&tiles.tile_experts), vector(&tiles.tile_starts));
    assert_eq!(experts.len(), starts.len());
    let num_slots = order.num_tokens() * order.top_k();
    let room = num_slots / tile_rows + order.local_experts().len().min(num_slots);
    assert_eq!(experts.len(), room, "the room is said to follow from the shapes");
    let offsets = vector(&order.expert_offsets);
    let mut place = 0;
    let mut used = 0;
    for (&expert, &start) in experts.iter().zip(&starts) {
        if expert == NO_EXPERT {
            assert_eq!(start, NO_SLOT);
            continue;
        }
        assert_eq!(used, experts.iter().position(|&e| e == NO_EXPERT).unwrap_or(room).min(used), "a gap");
        used += 1;
        assert_eq!(start, place, "a place is skipped or covered twice");
        let (first, end) = (offsets[expert as usize], offsets[expert as usize + 1]);
        assert!(start >= first && start < end, "a tile outside its expert");
        assert_eq!((start - first) as usize % tile_rows, 0, "a partial tile that is not the last of its expert");
        place = (end as usize).min((start as usize).saturating_add(tile_rows)) as u32;
    }
    assert_eq!(place, offsets[offsets.len() - 1], "places after the last tile");
}

fn random_ids(random: &mut Random, num_slots: usize, num_experts: usize, padding: usize) -> Vec<u32> {
    // Skewed: the lower half of the experts gets most.
    let id = |random: &mut Random| {
        let most = if random.below(3) > 0 { num_experts.div_ceil(2) } else { num_experts };
        random.below(most) as u32
    };
    (0..num_slots).map(|_| if random.below(100) < padding { NO_EXPERT } else { id(random) }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn the_order_equals_a_naive_sort_and_tiles_cover_it_once(
        num_tokens in 0usize..60,
        top_k in 1usize..12,
        num_experts in 1usize..200,
        bounds in (0.0..1.0f64, 0.0..1.0f64),
        padding in prop::sample::select(vec![0usize, 20, 100]),
        tile_rows in 1usize..=128,
        transposed in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let ids = random_ids(&mut Random(seed), num_tokens * top_k, num_experts, padding);
        let ids = if transposed && num_tokens > 0 {
            Tensor::from_vec(ids, (top_k, num_tokens), &Device::Cpu).unwrap().t().unwrap()
        } else {
            Tensor::from_vec(ids, (num_tokens, top_k), &Device::Cpu).unwrap()
        };
        let at = |part: f64| (part * (num_experts + 1) as f64) as usize;
        let (a, b) = (at(bounds.0), at(bounds.1));
        for local in [0..num_experts, a.min(b)..a.max(b), a..a] {
            let order = check(&ids, num_experts, local);
            check_tiles(&order, tile_rows);
        }
    }
}

#[test]
fn more_than_8192_slots_are_sorted() {
    let mut random = Random(2);
    for (num_tokens, top_k, num_experts) in [(8192, 1, 32), (8193, 1, 8), (8192, 4, 32), (3000, 8, 384), (70_000, 1, 2)]
    {
        let ids = random_ids(&mut random, num_tokens * top_k, num_experts, 3);
        let ids = Tensor::from_vec(ids, (num_tokens, top_k), &Device::Cpu).unwrap();
        let order = check(&ids, num_experts, 0..num_experts);
        let again = check(&ids, num_experts, 0..num_experts);
        assert_eq!(vector(&order.sorted_slots), vector(&again.sorted_slots));
        [1, 8, 64, 100_000].into_iter().for_each(|tile_rows| check_tiles(&order, tile_rows));
    }
}

#[test]
fn ids_that_start_inside_their_buffer_are_ordered() {
    for num_tokens in [4, 10, 700, 5000] {
        let ids = random_ids(&mut Random(7), num_tokens * 2, 40, 5);
        let ids = Tensor::from_vec(ids, (num_tokens, 2), &Device::Cpu).unwrap();
        check(&ids.narrow(0, 3, num_tokens - 3).unwrap(), 40, 0..40);
        check(&ids.narrow(1, 1, 1).unwrap(), 40, 10..30);
    }
}

#[test]
fn every_tile_height_covers_experts_of_every_size_around_it() {
    // Experts with 0 to 130 slots each: every count just below, at and above a multiple of every tile height.
    let ids: Vec<u32> = (0..=130u32).flat_map(|e| std::iter::repeat_n(e, e as usize)).collect();
    let len = ids.len();
    let order = check(&Tensor::from_vec(ids, (len, 1), &Device::Cpu).unwrap(), 131, 0..131);
    (1..=128).for_each(|tile_rows| check_tiles(&order, tile_rows));
    [usize::MAX, u32::MAX as usize, u32::MAX as usize + 1].into_iter().for_each(|rows| check_tiles(&order, rows));
}

#[test]
fn the_room_of_a_tile_map_suffices_in_the_worst_case() {
    // One slot more than full tiles for as many experts as possible.
    for tile_rows in [1, 2, 7, 64] {
        let ids: Vec<u32> = (0..20u32).flat_map(|e| std::iter::repeat_n(e, tile_rows + 1)).collect();
        let len = ids.len();
        let order = check(&Tensor::from_vec(ids, (len, 1), &Device::Cpu).unwrap(), 20, 0..20);
        check_tiles(&order, tile_rows);
    }
}

#[test]
fn tokens_without_slots_and_batches_without_tokens_are_fine() {
    for shape in [(0, 4), (0, 1), (5, 0), (0, 0)] {
        let order = check(&Tensor::zeros(shape, candle_core::DType::U32, &Device::Cpu).unwrap(), 8, 2..6);
        check_tiles(&order, 16);
    }
}

#[test]
fn padding_slots_are_skipped_and_never_counted() {
    let ids = Tensor::new(&[[NO_EXPERT, NO_EXPERT], [1, 0], [NO_EXPERT, 1]], &Device::Cpu).unwrap();
    let order = check(&ids, 2, 0..2);
    assert_eq!(vector(&order.sorted_slots), [3, 2, 5, NO_SLOT, NO_SLOT, NO_SLOT]);
    assert_eq!(vector(&order.slot_rank), [NO_SLOT, NO_SLOT, 1, 0, NO_SLOT, 2]);
}

#[test]
fn an_id_beyond_the_experts_is_named_and_not_skipped() {
    for (id, num_experts) in [(8, 8), (u32::MAX - 1, 8), (0, 0)] {
        let ids = Tensor::new(&[[id]], &Device::Cpu).unwrap();
        let error = ExpertOrder::new(&ids, num_experts, 0..0).unwrap_err().to_string();
        for word in ["expert-order", "slot 0", &id.to_string(), &format!("num_experts, which is {num_experts}")] {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
}

/// The expert that a map sends a slot to, by the words of its documentation.
fn physical(physical_to_expert: &[usize], turn: usize, token: usize, expert: usize) -> usize {
    let replicas: Vec<usize> = (0..physical_to_expert.len()).filter(|&p| physical_to_expert[p] == expert).collect();
    replicas[(token + turn) % replicas.len()]
}

#[test]
fn a_map_sends_tokens_to_replicas_in_turn() {
    let random = &mut Random(5);
    for (num_experts, num_physical) in [(1, 1), (1, 7), (8, 8), (8, 12), (60, 64), (256, 288)] {
        // Every expert once, the rest at random, and shuffled.
        let mut held: Vec<usize> = (0..num_experts).collect();
        (num_experts..num_physical).for_each(|_| held.push(random.below(num_experts)));
        (1..num_physical).rev().for_each(|i| held.swap(i, random.below(i + 1)));
        for (num_tokens, top_k, turn) in [(0, 2, 0), (1, 1, 3), (50, 3, 0), (700, 8, u32::MAX)] {
            let map = ExpertMap::new(num_experts, &held).unwrap().with_turn(turn);
            assert_eq!((map.num_experts(), map.num_physical()), (num_experts, num_physical));
            let ids = random_ids(random, num_tokens * top_k, num_experts, 10);
            let renamed: Vec<u32> = ids
                .iter()
                .enumerate()
                .map(|(slot, &id)| match id {
                    NO_EXPERT => NO_EXPERT,
                    id => physical(&held, turn as usize, slot / top_k, id as usize) as u32,
                })
                .collect();
            let tensor = |ids| Tensor::from_vec(ids, (num_tokens, top_k), &Device::Cpu).unwrap();
            let (ids, renamed) = (tensor(ids), tensor(renamed));
            let physical_ids = map.physical_ids(&ids).unwrap();
            assert_eq!(physical_ids.to_vec2::<u32>().unwrap(), renamed.to_vec2::<u32>().unwrap());
            for local in [0..num_physical, num_physical / 3..num_physical / 2 + 1, 0..0] {
                let found = devices::mapped(&ids, &map, local.clone());
                devices::assert_same_order(&found, &check(&renamed, num_physical, local), "renamed");
            }
        }
        for expert in 0..num_experts {
            let replicas = ExpertMap::new(num_experts, &held).unwrap().replicas(expert).unwrap().to_vec();
            assert!(replicas.is_sorted() && replicas.iter().all(|&p| held[p as usize] == expert));
            assert_eq!(replicas.len(), held.iter().filter(|&&e| e == expert).count());
        }
    }
}

#[test]
fn a_map_that_is_none_is_refused() {
    let refused = |result: candle_core::Result<ExpertMap>, words: &[&str]| {
        let error = result.unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in {error:?}"));
    };
    refused(ExpertMap::new(2, &[0, 2, 1]), &["expert-order", "physical expert 1", "expert 2", "less than 2"]);
    refused(ExpertMap::new(3, &[0, 1, 1]), &["expert-order", "no physical expert holds expert 2"]);
    refused(ExpertMap::new(3, &[0, 1]), &["expert-order", "num_experts is 3", "2 physical experts"]);
    assert_eq!(ExpertMap::new(0, &[]).unwrap().num_experts(), 0);
    let map = ExpertMap::new(2, &[0, 1, 1]).unwrap();
    assert!(map.replicas(2).unwrap_err().to_string().contains("expert is 2"));
    let ids = Tensor::new(&[[0u32]], &Device::Cpu).unwrap();
    let error = ExpertOrder::with_map(&ids, &map, 0..4).unwrap_err().to_string();
    assert!(error.contains("local_experts is 0..4") && error.contains("0..3"), "{error}");
    let router = Router::new(RoutingMethod::Renormalize, 1).unwrap();
    let options = OrderOptions { map: Some(map), ..Default::default() };
    let logits = Tensor::zeros((1, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
    let error = candle_moe::order::RoutedOrder::new(&router, &logits, &options).unwrap_err().to_string();
    assert!(error.contains("the map is of 2 experts") && error.contains("3"), "{error}");
}

#[test]
fn routing_and_order_in_one_step_equal_the_separate_steps() {
    let random = &mut Random(6);
    let wide = [(1, 1), (5, 5), (33, 32), (1000, 31), (1024, 4), (1025, 3), (64, 40)];
    for (num_experts, top_k) in MODELS.into_iter().chain(wide) {
        for method in oracle::methods().chain(oracle::grouped_methods(num_experts, top_k)) {
            let num_tokens = [0, 1, 2, 15, 31, 33, 129, 300][random.below(8)];
            let dtype = oracle::FLOATS[random.below(3)];
            let logits = random.units(num_tokens * num_experts, 4.0);
            let logits = oracle::floats(&logits, &[num_tokens, num_experts], dtype).0;
            let held: Vec<usize> = (0..num_experts + 3).map(|p| p * 5 % num_experts).collect();
            let map = match random.below(2) {
                // Multiples of 5 reach all experts where 5 does not divide them.
                0 if !num_experts.is_multiple_of(5) => Some(ExpertMap::new(num_experts, &held).unwrap()),
                _ => None,
            };
            let num_physical = map.as_ref().map_or(num_experts, ExpertMap::num_physical);
            let start = random.below(num_physical + 1);
            let options = OrderOptions {
                local_experts: [None, Some(start..num_physical), Some(0..start)][random.below(3)].clone(),
                map,
                tile_rows: [None, Some(1), Some(16), Some(128), Some(usize::MAX)][random.below(5)],
                num_valid_tokens: (random.below(2) == 0)
                    .then(|| Tensor::new(random.below(num_tokens + 2) as u32, &Device::Cpu).unwrap()),
            };
            let router = Router::new(method, top_k).unwrap();
            let context = format!("{method}, {num_tokens} tokens of {num_experts} experts, top-{top_k}, {options:?}");
            let routed = devices::routed(&router, &logits, &options, &context);
            match (&routed.tiles, options.tile_rows) {
                (Some(tiles), Some(tile_rows)) => {
                    let alone = routed.order.tile_map(tile_rows).unwrap();
                    assert_eq!(vector(&tiles.tile_experts), vector(&alone.tile_experts), "{context}");
                    assert_eq!(vector(&tiles.tile_starts), vector(&alone.tile_starts), "{context}");
                }
                (tiles, tile_rows) => assert!(tiles.is_none() && tile_rows.is_none(), "{context}"),
            }
        }
    }
}
