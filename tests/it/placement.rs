//! Placements against what must hold for any of them, and against the best there is where that can be tried out.

use crate::oracle::Random;
use candle_core::{Device, Tensor};
use candle_moe::ep::{Placement, Rebalancing};
use candle_moe::order::ExpertOrder;
use proptest::prelude::*;

/// Loads as uneven as those of real models, and worse: a few experts with most of the slots, or none.
fn loads() -> impl Strategy<Value = Vec<u64>> {
    let load = prop_oneof![4 => 0u64..1000, 1 => 1000u64..20_000, 1 => Just(0)];
    prop::collection::vec(load, 1..80)
}

proptest! {
    #[test]
    fn every_expert_is_somewhere_no_rank_has_it_twice_and_no_load_is_lost(
        slots in loads(), ep_size in 1usize..17, extra in 0usize..40
    ) {
        let num_experts = slots.len();
        let num_physical = (num_experts + extra).min(num_experts * ep_size);
        if ep_size > num_physical {
            prop_assert!(Placement::balanced(&slots, ep_size, num_physical).is_err());
            return Ok(());
        }
        let placement = Placement::balanced(&slots, ep_size, num_physical).unwrap();
        prop_assert_eq!(&placement, &Placement::balanced(&slots, ep_size, num_physical).unwrap());
        prop_assert_eq!(placement.physical_to_expert().len(), num_physical);
        let map = placement.map().unwrap();
        let mut sizes = Vec::new();
        for rank in 0..ep_size {
            let held = &placement.physical_to_expert()[placement.local(rank).unwrap()];
            prop_assert!(held.is_sorted_by(|a, b| a < b), "rank {}: {:?}", rank, held);
            sizes.push(held.len());
        }
        prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
        prop_assert!((0..num_experts).all(|expert| !map.replicas(expert).unwrap().is_empty()));
        let (sum, all) = (placement.rank_loads(&slots).unwrap().iter().sum::<f64>(), slots.iter().sum::<u64>() as f64);
        prop_assert!((sum - all).abs() <= 1e-9 * all);
        prop_assert!(placement.imbalance(&slots).unwrap() >= 1.0 - 1e-9);
        if num_physical == num_experts {
            let contiguous = Placement::contiguous(num_experts, ep_size).unwrap();
            prop_assert!(placement.imbalance(&slots).unwrap() <= contiguous.imbalance(&slots).unwrap());
        }
    }
}

/// Ranks that hold any experts, every expert somewhere.
fn any_placement(num_experts: usize, ep_size: usize) -> impl Strategy<Value = Placement> {
    let held = prop::collection::vec(prop::collection::vec(0..num_experts, 1..6), ep_size);
    let homes = prop::collection::vec(0..ep_size, num_experts);
    (held, homes).prop_map(move |(mut ranks, homes)| {
        homes.into_iter().enumerate().for_each(|(expert, rank)| ranks[rank].push(expert));
        Placement::explicit(num_experts, &ranks).unwrap()
    })
}

/// Loads, where their experts are, and how many there are to be.
fn rebalancings() -> impl Strategy<Value = (Vec<u64>, Placement, usize)> {
    (loads(), 1usize..9).prop_flat_map(|(slots, ep_size)| {
        let num_experts = slots.len();
        let fewest = num_experts.max(ep_size);
        let num_physical = fewest..=(num_experts * ep_size).min(fewest + 40);
        let any = any_placement(num_experts, ep_size);
        let now = match Placement::contiguous(num_experts, ep_size) {
            Ok(contiguous) => prop_oneof![any, Just(contiguous)].boxed(),
            Err(_) => any.boxed(),
        };
        (Just(slots), now, num_physical)
    })
}

proptest! {
    #[test]
    fn rebalancing_is_never_worse_than_what_may_stay((slots, now, num_physical) in rebalancings()) {
        let rebalancing = now.rebalanced(&slots, num_physical).unwrap();
        prop_assert_eq!(&rebalancing, &now.rebalanced(&slots, num_physical).unwrap());
        let Rebalancing { placement, imbalance_before, imbalance_after } = rebalancing;
        prop_assert_eq!(imbalance_before, now.imbalance(&slots).unwrap());
        prop_assert_eq!(imbalance_after, placement.imbalance(&slots).unwrap());
        let balanced = Placement::balanced(&slots, now.ep_size(), num_physical).unwrap();
        let size = |placement: &Placement, rank| placement.local(rank).unwrap().len();
        let may_stay = (0..now.ep_size()).all(|rank| size(&now, rank) <= size(&balanced, rank));
        prop_assert!(!may_stay || imbalance_after <= imbalance_before, "{} to {}", imbalance_before, imbalance_after);
        let is_better = balanced.imbalance(&slots).unwrap() < imbalance_before;
        let expected = if is_better || !may_stay { balanced } else { now };
        prop_assert_eq!(placement, expected, "moved where it helps or must be, and only there");
    }
}

#[test]
fn loads_at_their_limits_are_placed_like_others() {
    let of_each = |load: fn(usize) -> u64| (0..12).map(load).collect::<Vec<_>>();
    let one_hot = of_each(|expert| if expert == 7 { 1 << 40 } else { 0 });
    let huge_and_tiny = of_each(|expert| if expert % 5 == 0 { u64::MAX } else { 1 });
    for slots in [vec![0; 12], one_hot.clone(), vec![u64::MAX; 12], huge_and_tiny] {
        for (ep_size, num_physical) in [(1, 12), (4, 12), (4, 16), (5, 13), (4, 48), (16, 16), (12, 144)] {
            let placement = Placement::balanced(&slots, ep_size, num_physical).unwrap();
            let what = format!("{slots:?} over {ep_size} ranks: {placement}");
            let map = placement.map().unwrap();
            assert_eq!(placement.num_physical(), num_physical, "{what}");
            assert!((0..12).all(|expert| !map.replicas(expert).unwrap().is_empty()), "{what}");
            let ranks: Vec<_> = (0..ep_size).map(|rank| placement.experts_of(rank).unwrap()).collect();
            assert!(ranks.iter().all(|held| held.is_sorted_by(|a, b| a < b)), "{what}");
            let sizes = || ranks.iter().map(|held| held.len());
            assert!(sizes().max().unwrap() - sizes().min().unwrap() <= 1, "{what}");
            let loads = placement.rank_loads(&slots).unwrap();
            let imbalance = placement.imbalance(&slots).unwrap();
            assert!(loads.iter().all(|load| load.is_finite()), "{loads:?}: {what}");
            assert!((1.0 - 1e-9..=ep_size as f64 + 1e-9).contains(&imbalance), "{imbalance}: {what}");
        }
    }
    // Every replica goes to the one expert that is asked for, until all ranks have it.
    for (num_physical, replicas) in [(12, 1), (13, 2), (14, 3), (15, 4), (20, 4)] {
        let placement = Placement::balanced(&one_hot, 4, num_physical).unwrap();
        assert_eq!(placement.map().unwrap().replicas(7).unwrap().len(), replicas);
        assert_eq!(placement.imbalance(&one_hot).unwrap(), 4.0 / replicas as f64);
    }
    let now = Placement::contiguous(12, 4).unwrap();
    let stays = Rebalancing { placement: now.clone(), imbalance_before: 1.0, imbalance_after: 1.0 };
    assert_eq!(now.rebalanced(&[0; 12], 16).unwrap(), stays, "no load is no reason to move");
    assert!(now.rebalanced(&[1; 11], 16).unwrap_err().to_string().contains("11 experts, expected 12"));
    assert!(now.rebalanced(&[1; 12], 11).unwrap_err().to_string().contains("num_physical is 11, expected 12 to 48"));
}

/// The least load of the busiest rank among all placements that hold every expert, and none twice on a rank. A rank's
/// experts are the bits of a number.
fn least_with_replicas(slots: &[u64], sizes: &[usize], ranks: &mut Vec<usize>) -> f64 {
    let Some((&size, rest)) = sizes.split_first() else {
        let replicas = |expert: usize| ranks.iter().filter(|held| **held >> expert & 1 == 1).count();
        let counts: Vec<_> = (0..slots.len()).map(replicas).collect();
        if counts.contains(&0) {
            return f64::INFINITY;
        }
        let load = |held: &usize| {
            let experts = (0..slots.len()).filter(|expert| held >> expert & 1 == 1);
            experts.map(|expert| slots[expert] as f64 / counts[expert] as f64).sum::<f64>()
        };
        return ranks.iter().map(load).fold(0.0, f64::max);
    };
    let mut best = f64::INFINITY;
    for held in (0..1usize << slots.len()).filter(|held| held.count_ones() as usize == size) {
        ranks.push(held);
        best = best.min(least_with_replicas(slots, rest, ranks));
        ranks.pop();
    }
    best
}

#[test]
fn with_replicas_the_busiest_rank_is_near_the_least_there_can_be() {
    let mut random = Random(74);
    let (mut sum, mut worst, mut runs) = (0.0, 1.0f64, 0);
    for (num_experts, ep_size) in [(3, 2), (4, 2), (5, 2), (6, 2), (3, 3), (4, 3), (5, 3)] {
        for extra in 1..=(num_experts * (ep_size - 1)).min(4) {
            for _ in 0..20 {
                // Some experts are asked for much more often.
                let load = |random: &mut Random| {
                    let bits = 3 * (1 + random.below(4));
                    1 + random.below(1 << bits) as u64
                };
                let slots: Vec<u64> = (0..num_experts).map(|_| load(&mut random)).collect();
                let placement = Placement::balanced(&slots, ep_size, num_experts + extra).unwrap();
                let sizes: Vec<_> = (0..ep_size).map(|rank| placement.local(rank).unwrap().len()).collect();
                let best = least_with_replicas(&slots, &sizes, &mut Vec::new());
                let most = placement.rank_loads(&slots).unwrap().into_iter().fold(0.0, f64::max);
                let ratio = most / best;
                assert!(ratio >= 1.0 - 1e-9, "better than the best: {most}, {best}");
                (sum, worst, runs) = (sum + ratio, worst.max(ratio), runs + 1);
            }
        }
    }
    let mean = sum / f64::from(runs);
    assert!(worst <= 1.2 && mean <= 1.01, "worst {worst}, mean {mean}");
}

/// The least load that the busiest rank can have, by trying all placements without replicas.
fn least(slots: &[u64], sizes: &mut [usize], loads: &mut [u64], best: &mut u64) {
    let Some((&load, rest)) = slots.split_first() else {
        *best = (*best).min(*loads.iter().max().unwrap());
        return;
    };
    for rank in 0..sizes.len() {
        if sizes[rank] > 0 && loads[rank] + load < *best {
            sizes[rank] -= 1;
            loads[rank] += load;
            least(rest, sizes, loads, best);
            sizes[rank] += 1;
            loads[rank] -= load;
        }
    }
}

#[test]
fn without_replicas_the_busiest_rank_is_near_the_least_there_can_be() {
    let mut random = Random(71);
    let (mut sum, mut worst, mut runs) = (0.0, 1.0f64, 0);
    for num_experts in [4, 6, 8, 9] {
        for ep_size in [2, 3, 4] {
            for _ in 0..40 {
                let slots: Vec<u64> = (0..num_experts).map(|_| 1 + random.below(1000) as u64).collect();
                let mut sizes: Vec<usize> =
                    (0..ep_size).map(|rank| (num_experts + ep_size - 1 - rank) / ep_size).collect();
                let mut best = u64::MAX;
                least(&slots, &mut sizes, &mut vec![0; ep_size], &mut best);
                let placement = Placement::balanced(&slots, ep_size, num_experts).unwrap();
                let most = placement.rank_loads(&slots).unwrap().into_iter().fold(0.0, f64::max);
                let ratio = most / best as f64;
                assert!(ratio >= 1.0 - 1e-12, "better than the best: {most}, {best}");
                (sum, worst, runs) = (sum + ratio, worst.max(ratio), runs + 1);
            }
        }
    }
    let mean = sum / f64::from(runs);
    assert!(worst <= 1.15 && mean <= 1.01, "worst {worst}, mean {mean}");
}

#[test]
fn replicas_even_out_what_one_expert_makes_uneven() {
    // Half of all slots go to one of 32 experts.
    let slots: Vec<u64> = (0..32).map(|expert| if expert == 5 { 3100 } else { 100 }).collect();
    let imbalance = |num_physical| Placement::balanced(&slots, 8, num_physical).unwrap().imbalance(&slots).unwrap();
    let contiguous = Placement::contiguous(32, 8).unwrap().imbalance(&slots).unwrap();
    assert!((contiguous - 3400.0 / 775.0).abs() < 1e-9);
    // Alone it keeps its rank busy; shared by eight ranks there is almost nothing left.
    assert!((imbalance(32) - contiguous).abs() < 1e-9);
    assert!(imbalance(40) < 1.05, "{}", imbalance(40));
}

/// What the order counts for each rank is what the placement expected of the same ids.
#[test]
fn ranks_get_the_slots_that_the_placement_expects() {
    let mut random = Random(72);
    let (num_tokens, top_k, num_experts, ep_size, num_physical) = (4096, 4, 24, 4, 32);
    // Low experts are asked for more often.
    let token = |random: &mut Random| -> Vec<u32> {
        let mut ids = Vec::new();
        while ids.len() < top_k {
            let id = random.below(num_experts).min(random.below(num_experts)) as u32;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    };
    let ids: Vec<u32> = (0..num_tokens).flat_map(|_| token(&mut random)).collect();
    let mut slots = vec![0u64; num_experts];
    ids.iter().for_each(|&id| slots[id as usize] += 1);
    let placement = Placement::balanced(&slots, ep_size, num_physical).unwrap();
    let before = Placement::contiguous(num_experts, ep_size).unwrap().imbalance(&slots).unwrap();
    let after = placement.imbalance(&slots).unwrap();
    assert!(before > 1.5 && after < 1.02, "{before} to {after}");

    let ids = Tensor::from_vec(ids, (num_tokens, top_k), &Device::Cpu).unwrap();
    let order = ExpertOrder::with_map(&ids, &placement.map().unwrap(), 0..num_physical).unwrap();
    let counts = order.expert_counts.to_vec1::<u32>().unwrap();
    for (rank, expected) in placement.rank_loads(&slots).unwrap().into_iter().enumerate() {
        let found: u32 = counts[placement.local(rank).unwrap()].iter().sum();
        // Replicas are dealt by the token's number, so by chance not quite evenly.
        assert!((f64::from(found) - expected).abs() <= 0.03 * expected, "rank {rank}: {found}, expected {expected}");
    }
}

#[test]
fn explicit_placements_are_taken_as_they_are_and_read_well() {
    let ranks = [vec![3, 3], vec![0, 1, 2, 4], vec![5, 0]];
    let placement = Placement::explicit(6, &ranks).unwrap();
    assert_eq!((placement.num_experts(), placement.num_physical(), placement.ep_size()), (6, 8, 3));
    for (rank, experts) in ranks.iter().enumerate() {
        assert_eq!(placement.experts_of(rank).unwrap(), experts);
        assert!(placement.local(rank).unwrap().all(|physical| placement.owner(physical).unwrap() == rank));
    }
    assert_eq!(placement.to_string(), "3 3 | 0..3 4 | 5 0");
    assert_eq!(placement.rank_loads(&[4, 1, 1, 8, 1, 1]).unwrap(), [8.0, 5.0, 3.0]);
    assert!(!placement.is_contiguous());
    assert!(Placement::explicit(4, &[[0, 1], [2, 3]]).unwrap().is_contiguous());
    // In order, but cut elsewhere.
    assert!(!Placement::explicit(4, &[vec![0], vec![1, 2, 3]]).unwrap().is_contiguous());
    assert!(!Placement::explicit(2, &[[0], [1], [0]]).unwrap().is_contiguous());
}

/// A plan is even over the ranks of a contiguous placement; what stands in for its experts is even over these ranks too.
#[test]
fn what_stands_in_for_planned_experts_is_on_the_planned_rank() {
    let mut random = Random(73);
    for (num_experts, ep_size) in [(8, 1), (8, 3), (7, 7), (24, 5)] {
        let contiguous = Placement::contiguous(num_experts, ep_size).unwrap();
        let slots: Vec<u64> = (0..num_experts).map(|_| random.below(1000) as u64).collect();
        let extra = random.below(num_experts * (ep_size - 1) + 1);
        let placement = Placement::balanced(&slots, ep_size, num_experts + extra).unwrap();
        let planned: Vec<u32> = (0..num_experts as u32).collect();
        let planned = Tensor::from_vec(planned, (num_experts, 1), &Device::Cpu).unwrap();
        let found = placement.standing_in(&planned).unwrap().flatten_all().unwrap().to_vec1::<u32>().unwrap();
        for (expert, &physical) in found.iter().enumerate() {
            assert_eq!(placement.owner(physical as usize).unwrap(), contiguous.owner(expert).unwrap());
        }
        // Ranks have as many experts as the plan thinks, or more: no two planned ones share one.
        assert!(found.is_sorted_by(|a, b| a < b), "{found:?}");
    }
}

#[test]
fn what_cannot_be_placed_is_refused_by_name() {
    let error = |result: candle_core::Result<Placement>| result.unwrap_err().to_string();
    assert!(error(Placement::contiguous(4, 0)).contains("ep_size is 0, expected 1 to 4"));
    assert!(error(Placement::contiguous(4, 5)).contains("ep_size is 5, expected 1 to 4"));
    assert!(error(Placement::balanced(&[1; 4], 2, 3)).contains("num_physical is 3, expected 4 to 8"));
    assert!(error(Placement::balanced(&[1; 4], 2, 9)).contains("num_physical is 9, expected 4 to 8"));
    assert!(error(Placement::balanced(&[], 1, 0)).contains("ep_size is 1, expected 1 to 0"));
    let placement = Placement::contiguous(4, 2).unwrap();
    assert!(placement.local(2).unwrap_err().to_string().contains("rank is 2, expected less than ep_size = 2"));
    assert!(placement.rank_loads(&[1; 3]).unwrap_err().to_string().contains("3 experts, expected 4"));
    assert_eq!(placement.imbalance(&[0; 4]).unwrap(), 1.0);
}
