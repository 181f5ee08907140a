//! Routing against the float64 oracle, and the mistakes of other systems by name.

use crate::devices::RouteEverywhere;
use crate::oracle::{self, FLOATS, MODELS, Random};
use candle_core::{DType, Device, Tensor, Var};
use candle_moe::routing::{ExpertGroups, NO_EXPERT, Router, Routing, RoutingMethod};
use half::{bf16, f16};
use proptest::prelude::*;

const NANS: [u32; 6] = [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xffff_ffff, 0x7fff_ffff, 0xff80_0001];

/// Rows of logits, made the way `recipe` says.
pub(crate) fn logit(random: &mut Random, recipe: usize) -> f32 {
    let tied = [0.0, -0.0, 1.0, 1.0, -1.0, 2.5];
    let special = [
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::from_bits(NANS[random.below(NANS.len())]),
        f32::MAX,
        f32::MIN,
        f32::from_bits(random.below(1 << 23) as u32),
        -f32::from_bits(random.below(1 << 23) as u32),
        -0.0,
        -1000.0,
        100.0,
    ];
    match recipe {
        0 => random.unit() * 8.0,
        1 => tied[random.below(tied.len())],
        2 => special[random.below(special.len())],
        3 if random.below(4) == 0 => special[random.below(special.len())],
        3 => random.unit() * 20.0,
        4 => f32::from_bits(random.next() as u32),
        5 => f32::from_bits(NANS[random.below(NANS.len())]),
        6 => f32::NEG_INFINITY,
        7 => [f32::NEG_INFINITY, f32::NAN, -1e30][random.below(3)],
        8 => -60.0 - 60.0 * (random.unit() + 1.0),
        _ => 0.25,
    }
}
pub(crate) const RECIPES: usize = 10;

#[derive(Clone, Copy, Debug)]
pub(crate) enum View {
    Plain,
    Transposed,
    Narrowed,
    NarrowedTransposed,
    BroadcastRow,
}

/// A tensor of the rows as a view of more than them, and the float32 values that it holds.
pub(crate) fn view(rows: &[Vec<f32>], num_experts: usize, dtype: DType, view: View) -> (Tensor, Vec<Vec<f32>>) {
    let num_tokens = rows.len();
    // Would win every choice if it were read.
    let bait = 60_000.0;
    let at = |t: usize, e: usize| rows.get(t).and_then(|row| row.get(e)).copied().unwrap_or(bait);
    let table = |height: usize, width: usize, value: &dyn Fn(usize, usize) -> f32| {
        let values: Vec<f32> = (0..height * width).map(|i| value(i / width, i % width)).collect();
        oracle::floats(&values, &[height, width], dtype).0
    };
    let tensor = match view {
        View::Plain => table(num_tokens, num_experts, &at),
        View::Transposed => table(num_experts, num_tokens, &|e, t| at(t, e)).t().unwrap(),
        View::Narrowed => {
            let wide = table(num_tokens + 3, num_experts + 5, &|t, e| at(t.wrapping_sub(2), e.wrapping_sub(3)));
            wide.narrow(0, 2, num_tokens).unwrap().narrow(1, 3, num_experts).unwrap()
        }
        View::NarrowedTransposed => {
            let wide = table(num_experts + 2, num_tokens + 2, &|e, t| at(t.wrapping_sub(1), e.wrapping_sub(2)));
            wide.t().unwrap().narrow(0, 1, num_tokens).unwrap().narrow(1, 2, num_experts).unwrap()
        }
        View::BroadcastRow => table(1, num_experts, &|_, e| at(0, e)).broadcast_as((num_tokens, num_experts)).unwrap(),
    };
    let held = |row: &Vec<f32>| oracle::floats(row, &[num_experts], dtype).1;
    let held = match view {
        View::BroadcastRow => rows.iter().map(|_| held(&rows[0])).collect(),
        _ => rows.iter().map(held).collect(),
    };
    (tensor, held)
}

fn wide(row: &[f32]) -> Vec<f64> {
    row.iter().map(|&l| l.into()).collect()
}

/// What is wrong with the choice of `ids` by float32 scores, as far as float32 can tell: the order holds within its
/// rounding, and exactly between experts (or groups) that were given the same numbers.
fn misplaced(
    scores: &[f64],
    input: &impl Fn(usize) -> (f32, f32),
    groups: ExpertGroups,
    ids: &[u32],
) -> Option<String> {
    let tolerance = |score: f64| 1e-6 * score.abs().max(1.0);
    let same = |a: usize, b: usize| {
        let equal = |a: f32, b: f32| a == b || (a.is_nan() && b.is_nan());
        let ((logit_a, bias_a), (logit_b, bias_b)) = (input(a), input(b));
        (equal(logit_a, logit_b) && equal(bias_a, bias_b)) || (scores[a].is_nan() && scores[b].is_nan())
    };
    let better = |a: usize, b: usize| match same(a, b) {
        true => a < b,
        false => scores[b].is_nan() || scores[a] > scores[b] + tolerance(scores[b]),
    };

    let group_scores = oracle::group_scores(scores, groups.num_groups);
    let size = scores.len() / groups.num_groups;
    let near_sum = |a: f64, b: f64| (a - b).abs() <= 2.0 * tolerance(a).max(tolerance(b));
    let surely_better = |a: usize, b: usize| {
        let (of_a, of_b) = (group_scores[a], group_scores[b]);
        let members = |group: usize| group * size..(group + 1) * size;
        match members(a).zip(members(b)).all(|(a, b)| same(a, b)) || (of_a.is_nan() && of_b.is_nan()) {
            true => a < b,
            false => of_b.is_nan() || (of_a > of_b && !near_sum(of_a, of_b)),
        }
    };
    let all_groups = 0..groups.num_groups;
    let others = |group: usize, f: &dyn Fn(usize) -> bool| all_groups.clone().filter(|&g| g != group && f(g)).count();
    let may_be_kept = |group: usize| others(group, &|g| surely_better(g, group)) < groups.topk_group;
    let must_be_kept = |group: usize| others(group, &|g| !surely_better(group, g)) < groups.topk_group;

    let mut used: Vec<usize> = ids.iter().map(|&id| id as usize / size).collect();
    used.sort_unstable();
    used.dedup();
    if used.len() > groups.topk_group {
        return Some(format!("{} groups", used.len()));
    }
    if let Some(group) = used.iter().find(|&&group| !may_be_kept(group)) {
        return Some(format!("group {group} of {group_scores:?}"));
    }
    let pairs = ids.windows(2).map(|pair| (pair[0] as usize, pair[1] as usize));
    let last = ids[ids.len() - 1] as usize;
    let unchosen = (0..scores.len()).filter(|&e| !ids.contains(&(e as u32)) && must_be_kept(e / size));
    let mut pairs = pairs.chain(unchosen.map(|e| (last, e)));
    pairs.find(|&(first, second)| better(second, first)).map(|(first, second)| format!("{first} before {second}"))
}

/// Everything that the contract says about one row.
fn check_row(method: RoutingMethod, bias: Option<&[f32]>, row: &[f32], ids: &[u32], weights: &[f32]) {
    let context = || {
        let mut text = format!("{method} ids {ids:?} weights {weights:?} of {row:?} with bias {bias:?}");
        text.truncate(4000);
        text
    };
    let logits = wide(row);
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), ids.len(), "an expert twice: {}", context());
    assert!(sorted.iter().all(|&id| (id as usize) < row.len()), "an id beyond the end: {}", context());

    match oracle::scores(method, &logits, bias) {
        Some(scores) => {
            // What decides that two experts are the same to the contract, not only to rounding.
            let input = |e: usize| (row[e], bias.map_or(0.0, |bias| bias[e]));
            let mistake = misplaced(&scores, &input, method.groups(), ids);
            assert!(mistake.is_none(), "{}: {}", mistake.unwrap_or_default(), context());
        }
        None => {
            assert_eq!(ids, oracle::choose(&logits, ids.len()), "{}", context());
            assert!(weights.is_sorted_by(|a, b| *a >= b - 1e-7), "weights rise: {}", context());
        }
    }

    assert!(weights.iter().all(|w| w.is_finite() && *w >= 0.0), "{}", context());
    for (k, expected) in oracle::weights(method, &logits, ids).into_iter().enumerate() {
        let tolerance = 1e-6 * f64::from(method.routed_scaling_factor().max(1.0));
        assert!(
            (f64::from(weights[k]) - expected).abs() <= tolerance,
            "weight {k} should be {expected}: {}",
            context()
        );
    }
    let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
    // The float32 sum that the weights are divided by rounds as often as it has terms.
    let tolerance = |terms: usize| ((terms + 2) as f64 * 2f64.powi(-24)).max(1e-6);
    match method {
        RoutingMethod::Renormalize | RoutingMethod::RenormalizeNaive | RoutingMethod::SigmoidRenorm => {
            assert!((sum - 1.0).abs() <= tolerance(ids.len()), "the sum is {sum}: {}", context());
        }
        RoutingMethod::DeepSeekV4 { routed_scaling_factor: factor } => {
            let error = (sum - f64::from(factor)).abs();
            assert!(error <= f64::from(factor) * tolerance(ids.len()), "the sum is {sum}: {}", context());
        }
        RoutingMethod::DeepSeekV3 { routed_scaling_factor: factor, .. } => {
            assert!(sum <= f64::from(factor) * (1.0 + tolerance(ids.len())), "the sum is {sum}: {}", context());
        }
        RoutingMethod::Default | RoutingMethod::MiniMax2 => {
            assert!(sum <= 1.0 + tolerance(row.len()), "the sum is {sum}: {}", context());
        }
        _ => {}
    }
}

pub(crate) fn check(routing: &Routing, method: RoutingMethod, bias: Option<&[f32]>, rows: &[Vec<f32>], top_k: usize) {
    assert_eq!(routing.topk_ids.dtype(), DType::U32);
    assert_eq!(routing.topk_weights.dtype(), DType::F32);
    assert_eq!(routing.topk_ids.dims(), [rows.len(), top_k]);
    assert_eq!(routing.topk_weights.dims(), [rows.len(), top_k]);
    let ids = routing.topk_ids.to_vec2::<u32>().unwrap();
    let weights = routing.topk_weights.to_vec2::<f32>().unwrap();
    for ((row, ids), weights) in rows.iter().zip(&ids).zip(&weights) {
        check_row(method, bias, row, ids, weights);
    }
}

fn router(method: RoutingMethod, top_k: usize, bias: Option<&[f32]>) -> Router {
    let router = Router::new(method, top_k).unwrap();
    match bias {
        Some(bias) => router.with_selection_bias(&Tensor::new(bias, &Device::Cpu).unwrap()).unwrap(),
        None => router,
    }
}

/// Routes one float32 row.
fn route(method: RoutingMethod, top_k: usize, row: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let logits = Tensor::new(row, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let routing = router(method, top_k, None).route_everywhere(&logits).unwrap();
    check(&routing, method, None, &[row.to_vec()], top_k);
    let ids = routing.topk_ids.flatten_all().unwrap().to_vec1().unwrap();
    (ids, routing.topk_weights.flatten_all().unwrap().to_vec1().unwrap())
}

fn geometry() -> impl Strategy<Value = (usize, usize)> {
    let any = (1usize..=1024, 0.0..1.0f64).prop_map(|(num_experts, part)| {
        let most = num_experts.min(40);
        (num_experts, 1 + (part * most as f64) as usize)
    });
    let small = (1usize..=12).prop_flat_map(|num_experts| (Just(num_experts), 1..=num_experts));
    prop_oneof![2 => any, 2 => small, 3 => prop::sample::select(MODELS.to_vec())]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn every_method_equals_the_oracle_on_any_bits_and_views(
        (num_experts, top_k) in geometry(),
        num_tokens in 0usize..=9,
        dtype in prop::sample::select(FLOATS.to_vec()),
        kind in prop::sample::select(vec![
            View::Plain, View::Transposed, View::Narrowed, View::NarrowedTransposed, View::BroadcastRow,
        ]),
        with_bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let rows: Vec<Vec<f32>> = (0..num_tokens)
            .map(|_| {
                let recipe = random.below(RECIPES);
                (0..num_experts).map(|_| logit(&mut random, recipe)).collect()
            })
            .collect();
        let kind = if num_tokens == 0 { View::Plain } else { kind };
        let (logits, rows) = view(&rows, num_experts, dtype, kind);
        for method in oracle::methods().chain(oracle::grouped_methods(num_experts, top_k)) {
            let bias_recipe = [0, 0, 1, 3][random.below(4)];
            let bias: Vec<f32> = (0..num_experts).map(|_| logit(&mut random, bias_recipe) / 8.0).collect();
            let bias = (method.takes_selection_bias() && with_bias).then_some(bias.as_slice());
            let router = router(method, top_k, bias);
            let routing = router.route_everywhere(&logits).unwrap();
            check(&routing, method, bias, &rows, top_k);
            let plain = router.without_selection_bias().route_everywhere(&logits).unwrap();
            check(&plain, method, None, &rows, top_k);
        }
    }
}

#[test]
fn every_half_bit_pattern_is_ranked() {
    // All 65536 values of f16 and of bf16 in rows of 1024: NaN payloads, subnormals, both zeros.
    for top_k in [1, 33] {
        let halves: Vec<u16> = (0..=u16::MAX).map(|i| i.wrapping_mul(40_503)).collect();
        let as_f16: Vec<f16> = halves.iter().map(|&bits| f16::from_bits(bits)).collect();
        let as_bf16: Vec<bf16> = halves.iter().map(|&bits| bf16::from_bits(bits)).collect();
        let rows = |values: Vec<f32>| values.chunks(1024).map(<[f32]>::to_vec).collect::<Vec<_>>();
        for method in oracle::methods() {
            let routing = router(method, top_k, None)
                .route_everywhere(&Tensor::from_vec(as_f16.clone(), (64, 1024), &Device::Cpu).unwrap())
                .unwrap();
            check(&routing, method, None, &rows(as_f16.iter().map(|v| v.to_f32()).collect()), top_k);
            let routing = router(method, top_k, None)
                .route_everywhere(&Tensor::from_vec(as_bf16.clone(), (64, 1024), &Device::Cpu).unwrap())
                .unwrap();
            check(&routing, method, None, &rows(as_bf16.iter().map(|v| v.to_f32()).collect()), top_k);
        }
    }
}

#[test]
fn every_model_in_the_wild_and_every_top_k_routes_exactly() {
    let mut random = Random(5);
    let every_top_k = (1..=60).map(|top_k| (60, top_k));
    for (num_experts, top_k) in MODELS.into_iter().chain(every_top_k) {
        let row: Vec<f32> = (0..num_experts).map(|_| random.unit() * 4.0).collect();
        for method in oracle::methods().chain(oracle::grouped_methods(num_experts, top_k)) {
            route(method, top_k, &row);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Known mistakes of other systems

#[test]
fn a_row_of_minus_infinity_or_nan_does_not_yield_the_same_expert_twice() {
    for value in [f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::MIN] {
        for (num_experts, top_k) in [(60, 4), (8, 8), (3, 2), (100, 40)] {
            for method in oracle::methods() {
                let (ids, weights) = route(method, top_k, &vec![value; num_experts]);
                assert_eq!(ids, (0..top_k as u32).collect::<Vec<_>>());
                assert!(weights.iter().all(|w| *w == weights[0]));
            }
        }
    }
}

#[test]
fn an_expert_count_padded_to_a_power_of_two_does_not_yield_an_id_beyond_the_end() {
    // 60 experts in 64 lanes: with every logit at -inf, or below any padding value, lanes 60 to 63 would win.
    for value in [f32::NEG_INFINITY, f32::MIN, f32::NAN, -1e9] {
        let mut row = vec![value; 60];
        row[59] = -5.0;
        for method in oracle::methods() {
            let (ids, _) = route(method, 4, &row);
            assert_eq!(ids, [59, 0, 1, 2]);
        }
    }
}

#[test]
fn one_nan_does_not_turn_the_row_into_nan() {
    for method in oracle::methods() {
        let (ids, weights) = route(method, 3, &[1.0, f32::NAN, 2.0, 0.5]);
        assert_eq!(ids, [2, 0, 3]);
        assert!(weights.iter().all(|w| *w > 0.0));
        let (ids, weights) = route(method, 4, &[1.0, f32::NAN, 2.0, 0.5]);
        assert_eq!(ids, [2, 0, 3, 1]);
        assert!(weights[..3].iter().all(|w| *w > 0.0));
        assert_eq!(weights[3], 0.0);
    }
}

#[test]
fn nan_ranks_below_minus_infinity() {
    for method in oracle::methods() {
        assert_eq!(route(method, 3, &[f32::NAN, f32::NEG_INFINITY, -f32::NAN, -7.0]).0, [3, 1, 0]);
    }
}

#[test]
fn a_chosen_minus_infinity_has_no_weight_beside_a_very_negative_number() {
    // Its sigmoid vanishes in float32, but it is still better than -inf and NaN.
    for best in [-50.0, -90.0, -110.0, -1000.0, f32::MIN] {
        for void in [f32::NEG_INFINITY, f32::NAN] {
            let (_, weights) = route(RoutingMethod::SigmoidRenorm, 2, &[void, best, void]);
            assert_eq!(weights, [1.0, 0.0], "{best} beside {void}");
        }
    }
}

#[test]
fn several_plus_infinities_share_the_weight() {
    let row = [f32::INFINITY, 3.0, f32::INFINITY, f32::NAN, f32::INFINITY];
    for method in [RoutingMethod::Renormalize, RoutingMethod::RenormalizeNaive, RoutingMethod::Default] {
        let (ids, weights) = route(method, 4, &row);
        assert_eq!(ids, [0, 2, 4, 1]);
        assert!(weights[..3].iter().all(|w| (w - 1.0 / 3.0).abs() < 1e-6));
        assert_eq!(weights[3], 0.0);
    }
    // Default divides by all of them, chosen or not.
    assert!(route(RoutingMethod::Default, 2, &row).1.iter().all(|w| (w - 1.0 / 3.0).abs() < 1e-6));
}

#[test]
fn minus_zero_does_not_lose_to_plus_zero() {
    for method in oracle::methods() {
        assert_eq!(route(method, 2, &[-1.0, -0.0, 0.0, -0.0]).0, [1, 2]);
    }
}

#[test]
fn equal_top_values_are_two_experts_and_the_lower_id_comes_first() {
    for method in oracle::methods() {
        for top_k in [2, 3, 33] {
            let mut row = vec![0.0; 40];
            (row[7], row[31]) = (2.0, 2.0);
            let (ids, weights) = route(method, top_k, &row);
            assert_eq!(ids[..2], [7, 31]);
            assert_eq!(weights[0], weights[1]);
        }
    }
}

#[test]
fn a_tie_at_the_edge_of_the_choice_goes_to_the_lower_ids() {
    for method in oracle::methods() {
        for top_k in [5, 32, 33, 50] {
            let (ids, _) = route(method, top_k, &[1.5; 64]);
            assert_eq!(ids, (0..top_k as u32).collect::<Vec<_>>());
        }
    }
}

#[test]
fn experts_beyond_256_of_512_are_not_lost_at_top_10() {
    let mut row: Vec<f32> = (0..512).map(|e| -(e as f32)).collect();
    (256..266).for_each(|e| row[e] = 100.0 - e as f32 / 8.0);
    for method in oracle::methods().filter(|m| !m.takes_selection_bias()) {
        assert_eq!(route(method, 10, &row).0, (256..266).collect::<Vec<_>>());
    }
}

#[test]
fn a_negative_bias_with_fewer_than_32_experts_does_not_select_a_padding_lane() {
    for num_experts in [1, 7, 20, 31] {
        let bias = vec![-3.0; num_experts];
        let rows = vec![(0..num_experts).map(|e| e as f32 / 8.0 - 20.0).collect::<Vec<_>>()];
        for top_k in [1, num_experts] {
            let router = router(RoutingMethod::MiniMax2, top_k, Some(&bias));
            let routing = router.route_everywhere(&Tensor::new(rows.clone(), &Device::Cpu).unwrap()).unwrap();
            check(&routing, RoutingMethod::MiniMax2, Some(&bias), &rows, top_k);
        }
    }
}

#[test]
fn the_selection_bias_never_enters_the_weights() {
    let (row, bias) = ([2.0f32, 0.0, -1.0, 1.0], [0.0f32, 50.0, 100.0, 0.0]);
    let routing = router(RoutingMethod::MiniMax2, 2, Some(&bias))
        .route_everywhere(&Tensor::new(&[row], &Device::Cpu).unwrap())
        .unwrap();
    assert_eq!(routing.topk_ids.to_vec2::<u32>().unwrap(), [[2, 1]]);
    let (a, b) = (oracle::sigmoid(-1.0), oracle::sigmoid(0.0));
    let weights = routing.topk_weights.to_vec2::<f32>().unwrap();
    assert!((f64::from(weights[0][0]) - a / (a + b)).abs() < 1e-6);
    assert!((f64::from(weights[0][1]) - b / (a + b)).abs() < 1e-6);
}

#[test]
fn top_k_above_8_does_not_overrun() {
    let row: Vec<f32> = (0..1024).map(|e| ((e * 389) % 1024) as f32 / 64.0).collect();
    for top_k in [9, 16, 17, 31, 32, 33, 64, 65, 512, 1023, 1024] {
        for method in oracle::methods() {
            route(method, top_k, &row);
        }
    }
}

/// The grouped method with a factor of 1.
fn grouped(num_groups: usize, topk_group: usize) -> RoutingMethod {
    RoutingMethod::DeepSeekV3 { groups: ExpertGroups { num_groups, topk_group }, routed_scaling_factor: 1.0 }
}

#[test]
fn two_equal_top_values_in_a_group_count_twice_in_its_score() {
    // Group 0 has 0.88 twice, group 1 0.95 and 0.5: 1.76 against 1.45.
    let row = [2.0, 2.0, -9.0, 3.0, 0.0, -9.0];
    assert_eq!(route(grouped(2, 1), 2, &row).0, [0, 1]);
}

#[test]
fn topk_group_below_4_is_not_ignored() {
    // Experts 4g and 4g + 1 are the best of group g, and later groups are better.
    let mut row = vec![-20.0f32; 32];
    (0..8).for_each(|g| (row[4 * g], row[4 * g + 1]) = (1.0 + g as f32 / 8.0, 1.0 + g as f32 / 8.0));
    for topk_group in 1..=8 {
        let (ids, _) = route(grouped(8, topk_group), 4, &row);
        let mut used: Vec<_> = ids.iter().map(|id| id / 4).collect();
        used.dedup();
        assert!(used.len() <= topk_group && used.iter().all(|&g| g as usize >= 8 - topk_group), "{ids:?}");
    }
    assert_eq!(route(grouped(8, 1), 4, &row).0, [28, 29, 30, 31]);
}

#[test]
fn an_expert_of_a_group_that_was_not_kept_is_never_chosen() {
    // The best expert of all stands in a group whose second best is poor; kept groups have to give away poor experts, whose
    // scores are negative with the bias: below the zero that a mask would have put into the other groups.
    let bias = [0.0f32, -2.0, -0.5, -0.5, -0.5, -0.5];
    let row = [20.0f32, -20.0, 4.0, 4.0, -4.0, -4.0];
    for top_k in 1..=2 {
        let router = router(grouped(3, 1), top_k, Some(&bias));
        let routing = router.route_everywhere(&Tensor::new(&[row], &Device::Cpu).unwrap()).unwrap();
        check(&routing, router.method(), Some(&bias), &[row.to_vec()], top_k);
        assert_eq!(routing.topk_ids.to_vec2::<u32>().unwrap()[0], [2, 3][..top_k]);
    }
    // All scores of both kept groups are negative.
    let bias = [-3.0f32; 6];
    let router = router(grouped(3, 2), 4, Some(&bias));
    let routing = router.route_everywhere(&Tensor::new(&[row], &Device::Cpu).unwrap()).unwrap();
    check(&routing, router.method(), Some(&bias), &[row.to_vec()], 4);
    assert_eq!(routing.topk_ids.to_vec2::<u32>().unwrap(), [[0, 2, 3, 1]]);
}

#[test]
fn nan_does_not_decide_a_group() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    // A group of one number and NaN has the score of the number; a group of NaN is last, after -inf.
    assert_eq!(route(grouped(3, 1), 2, &[nan, 3.0, 0.0, -3.0, nan, nan]).0, [1, 0]);
    assert_eq!(route(grouped(3, 2), 3, &[nan, nan, -inf, -inf, nan, 1.0]).0, [5, 2, 3]);
    assert_eq!(route(grouped(3, 3), 6, &[nan, nan, -inf, -inf, nan, 1.0]).0, [5, 2, 3, 0, 1, 4]);
    assert_eq!(route(grouped(2, 1), 2, &[nan; 4]).0, [0, 1]);
    // inf - inf is no number: such a group is last, though its best expert is the best of all.
    let bias = [inf, -inf, 0.0, 0.0];
    let router = router(grouped(2, 1), 2, Some(&bias));
    let routing = router.route_everywhere(&Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap()).unwrap();
    assert_eq!(routing.topk_ids.to_vec2::<u32>().unwrap(), [[2, 3]]);
}

#[test]
fn a_tie_of_groups_goes_to_the_lower_group() {
    for (num_groups, topk_group) in [(2, 1), (4, 2), (8, 3), (16, 5), (32, 7)] {
        let size = 32 / num_groups;
        let top_k = topk_group * size;
        let (ids, _) = route(grouped(num_groups, topk_group), top_k, &[0.5; 32]);
        assert_eq!(ids, (0..top_k as u32).collect::<Vec<_>>());
    }
}

#[test]
fn softplus_does_not_overflow_for_large_logits() {
    let method = RoutingMethod::DeepSeekV4 { routed_scaling_factor: 1.0 };
    for (row, expected) in [
        ([100.0, 400.0, -1.0], [1, 0, 2]),
        ([1e30, 1e38, 3e38], [2, 1, 0]),
        ([f32::MAX, 0.0, f32::MAX], [0, 2, 1]),
        ([f32::MIN, 1e5, 90.0], [1, 2, 0]),
    ] {
        assert_eq!(route(method, 3, &row).0, expected);
    }
    // sqrt(100) and sqrt(400), by hand.
    let (_, weights) = route(method, 2, &[100.0, 400.0, -1.0]);
    assert!((weights[0] - 2.0 / 3.0).abs() < 1e-6 && (weights[1] - 1.0 / 3.0).abs() < 1e-6, "{weights:?}");
    // Far below 0 the roots vanish in float32, but not their shares: e^(-300 / 2) to e^(-302 / 2).
    let (_, weights) = route(method, 2, &[-302.0, -300.0, f32::NEG_INFINITY]);
    assert_eq!(weights.len(), 2);
    let routing = route(method, 3, &[-302.0, -300.0, f32::NEG_INFINITY]);
    let share = oracle::sigmoid(1.0) as f32;
    let of_300 = routing.1[routing.0.iter().position(|&id| id == 1).unwrap()];
    assert!((of_300 - share).abs() < 1e-6, "{routing:?}");
}

#[test]
fn padding_rows_go_to_no_expert_and_change_no_other_row() {
    let mut random = Random(21);
    for dtype in FLOATS {
        let logits = oracle::floats(&random.units(40 * 24, 5.0), &[40, 24], dtype).0;
        for method in oracle::methods().chain(oracle::grouped_methods(24, 3)) {
            let router = router(method, 3, None);
            let all = router.route_everywhere(&logits).unwrap();
            for num_valid in [0u32, 1, 17, 39, 40, 41, u32::MAX] {
                let num_valid_tokens = Tensor::new(num_valid, &Device::Cpu).unwrap();
                let padded = router.route_padded_everywhere(&logits, &num_valid_tokens).unwrap();
                let valid = (num_valid as usize).min(40);
                let ids = padded.topk_ids.to_vec2::<u32>().unwrap();
                assert_eq!(ids[..valid], all.topk_ids.to_vec2::<u32>().unwrap()[..valid]);
                assert!(ids[valid..].iter().flatten().all(|&id| id == NO_EXPERT));
                let weights = oracle::rows_of(&padded.topk_weights);
                assert_eq!(weights[..valid], oracle::rows_of(&all.topk_weights)[..valid]);
                assert!(weights[valid..].iter().flatten().all(|&weight| weight == 0.0));
            }
        }
    }
}

#[test]
fn padding_rows_have_no_gradient() {
    let logits = Var::new(&[[1f32, 2., 3.], [3., 1., 2.], [0., 1., 0.]], &Device::Cpu).unwrap();
    for method in oracle::methods() {
        let router = router(method, 2, None);
        let loss = |routing: Routing| {
            let factors = Tensor::new(&[[1f32, -2.]], &Device::Cpu).unwrap();
            routing.topk_weights.broadcast_mul(&factors).unwrap().sum_all().unwrap()
        };
        let gradient = |loss: Tensor| oracle::rows_of(loss.backward().unwrap().get(&logits).unwrap());
        let whole = gradient(loss(router.route(&logits).unwrap()));
        let num_valid_tokens = Tensor::new(&[2u32], &Device::Cpu).unwrap();
        let padded = gradient(loss(router.route_padded(&logits, &num_valid_tokens).unwrap()));
        assert_eq!(padded[..2], whole[..2], "{method}");
        assert_eq!(padded[2], [0.0; 3]);
        assert!(whole[2].iter().any(|g| *g != 0.0));
    }
}

#[test]
#[ignore = "reads four billion logits, which takes half a minute"]
fn num_tokens_times_num_experts_beyond_32_bits_does_not_wrap() {
    // 2^32 + 2^10 logits in a view of one row; the last rows must be as right as the first.
    let (num_tokens, num_experts) = ((1 << 22) + 1, 1024);
    let mut row = vec![0f32; num_experts];
    row[777] = 1.0;
    let logits = Tensor::new(row.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let ids = |num_tokens: usize| {
        let logits = logits.broadcast_as((num_tokens, num_experts)).unwrap();
        router(RoutingMethod::Renormalize, 1, None).route_everywhere(&logits).unwrap().topk_ids
    };
    let all = ids(num_tokens);
    assert_eq!(all.dims(), [num_tokens, 1]);
    for token in [0, 1 << 21, num_tokens - 2, num_tokens - 1] {
        assert_eq!(all.narrow(0, token, 1).unwrap().to_vec2::<u32>().unwrap(), [[777]]);
    }
}

#[test]
fn logits_that_round_to_one_softmax_value_are_still_told_apart() {
    let row = [-60.0f32, 100.0, -50.0, -70.0];
    for method in oracle::methods().filter(|m| !m.takes_selection_bias()) {
        assert_eq!(route(method, 3, &row).0, [1, 2, 0]);
    }
    let row = [40.0f32, 60.0, 50.0];
    for method in [RoutingMethod::Llama4, RoutingMethod::SigmoidRenorm] {
        assert_eq!(route(method, 3, &row).0, [1, 2, 0]);
    }
}

#[test]
fn the_same_input_gives_the_same_bits_again_and_in_any_batch() {
    let mut random = Random(3);
    let rows: Vec<Vec<f32>> = (0..300).map(|_| random.units(128, 6.0)).collect();
    for method in oracle::methods() {
        let router = router(method, 8, None);
        let all = router.route_everywhere(&Tensor::new(rows.clone(), &Device::Cpu).unwrap()).unwrap();
        let again = router.route_everywhere(&Tensor::new(rows.clone(), &Device::Cpu).unwrap()).unwrap();
        assert_eq!(oracle::bits_of(&all.topk_weights), oracle::bits_of(&again.topk_weights));
        for token in [0, 150, 299] {
            let alone =
                router.route_everywhere(&Tensor::new(vec![rows[token].clone()], &Device::Cpu).unwrap()).unwrap();
            let here = all.topk_weights.narrow(0, token, 1).unwrap();
            assert_eq!(oracle::bits_of(&alone.topk_weights), oracle::bits_of(&here));
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Gradient

/// The gradient of `sum of factors * weights` with respect to the logits.
fn gradient(router: &Router, logits: &Tensor, factors: &[f32]) -> (Tensor, Vec<Vec<u32>>) {
    let logits = Var::from_tensor(logits).unwrap();
    let routing = router.route_everywhere(&logits).unwrap();
    let factors = Tensor::from_vec(factors.to_vec(), routing.topk_weights.shape(), &Device::Cpu).unwrap();
    let loss = (routing.topk_weights * factors).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    (grads.get(&logits).unwrap().clone(), routing.topk_ids.to_vec2().unwrap())
}

#[test]
fn the_gradient_equals_finite_differences() {
    let mut random = Random(11);
    for (num_experts, top_k) in [(1, 1), (5, 1), (5, 5), (8, 2), (60, 4), (64, 40)] {
        for method in oracle::methods().chain(oracle::grouped_methods(num_experts, top_k)) {
            for scale in [1.0, 6.0] {
                let num_tokens = 3;
                let logits = random.units(num_tokens * num_experts, scale);
                let factors = random.units(num_tokens * top_k, 1.0);
                let bias = random.units(num_experts, 0.5);
                let bias = method.takes_selection_bias().then_some(bias.as_slice());
                let tensor = Tensor::from_vec(logits.clone(), (num_tokens, num_experts), &Device::Cpu).unwrap();
                let (gradient, ids) = gradient(&router(method, top_k, bias), &tensor, &factors);
                assert_eq!(gradient.dtype(), DType::F32);
                let gradient = gradient.to_vec2::<f32>().unwrap();
                for token in 0..num_tokens {
                    let row = wide(&logits[token * num_experts..][..num_experts]);
                    let loss = |row: &[f64]| -> f64 {
                        let weights = oracle::weights(method, row, &ids[token]);
                        weights.iter().zip(&factors[token * top_k..]).map(|(w, f)| w * f64::from(*f)).sum()
                    };
                    for e in 0..num_experts {
                        let moved = |by: f64| {
                            let mut row = row.clone();
                            row[e] += by;
                            loss(&row)
                        };
                        let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                        let found = f64::from(gradient[token][e]);
                        assert!((found - expected).abs() < 2e-6, "{method} {token} {e}: {found} {expected}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_gradient_of_very_negative_logits_is_that_of_their_weights() {
    // Their sigmoids vanish in float32, but not their shares.
    let logits = Tensor::new(&[[-200f32, -201., -202.]], &Device::Cpu).unwrap();
    let (gradient, _) = gradient(&router(RoutingMethod::SigmoidRenorm, 2, None), &logits, &[1.0, 0.0]);
    let share = oracle::sigmoid(1.0);
    let expected = share * (1.0 - share);
    let gradient = gradient.to_vec2::<f32>().unwrap();
    assert!((f64::from(gradient[0][0]) - expected).abs() < 1e-6, "{gradient:?}");
    assert!((f64::from(gradient[0][1]) + expected).abs() < 1e-6, "{gradient:?}");
    assert_eq!(gradient[0][2], 0.0);
}

#[test]
fn the_gradient_has_the_dtype_and_shape_of_the_logits_and_honours_views() {
    let mut random = Random(12);
    let values = random.units(6 * 9, 3.0);
    for dtype in FLOATS {
        let base = oracle::floats(&values, &[6, 9], dtype).0;
        for method in oracle::methods() {
            let router = router(method, 3, None);
            let factors = random.units(9 * 3, 1.0);
            let base = Var::from_tensor(&base).unwrap();
            let grad_through = |logits: &Tensor| {
                let routing = router.route_everywhere(logits).unwrap();
                let factors = Tensor::from_vec(factors.clone(), (9, 3), &Device::Cpu).unwrap();
                let loss = (routing.topk_weights * factors).unwrap().sum_all().unwrap();
                loss.backward().unwrap().get(&base).unwrap().clone()
            };
            let viewed = grad_through(&base.t().unwrap());
            let copied = grad_through(&base.t().unwrap().contiguous().unwrap());
            assert_eq!(viewed.dtype(), dtype);
            assert_eq!(viewed.dims(), [6, 9]);
            assert_eq!(oracle::bits_of(&viewed), oracle::bits_of(&copied));
            assert!(oracle::rows_of(&viewed).concat().iter().any(|g| *g != 0.0));
        }
    }
}

#[test]
fn the_gradient_of_degenerate_rows_is_finite_and_zero_where_nothing_can_move() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let rows = [
        [nan, nan, nan, nan],
        [-inf, -inf, -inf, -inf],
        [-inf, nan, -inf, nan],
        [inf, inf, 1.0, 0.0],
        [inf, nan, -inf, 0.0],
        [1.0, nan, -inf, nan],
        [0.0, -inf, nan, 2.0],
        [f32::MAX, f32::MIN, 0.0, f32::MAX],
        [-1000.0, -1001.0, -2000.0, f32::MIN],
    ];
    let logits = Tensor::new(&rows, &Device::Cpu).unwrap();
    for method in oracle::methods() {
        for top_k in [1, 3] {
            let factors = Random(1).units(rows.len() * top_k, 1.0);
            let (gradient, _) = gradient(&router(method, top_k, None), &logits, &factors);
            let gradient = gradient.to_vec2::<f32>().unwrap();
            for (row, gradient) in rows.iter().zip(&gradient) {
                assert!(gradient.iter().all(|g| g.is_finite()), "{method} {row:?} {gradient:?}");
            }
            for row in &gradient[..5] {
                assert!(row.iter().all(|g| *g == 0.0), "{method} {gradient:?}");
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Names and errors

#[test]
fn names_parse_whatever_their_case_and_separators() {
    for method in RoutingMethod::ALL {
        let name = method.name();
        let lower = name.to_lowercase();
        let kebab: String = name
            .char_indices()
            .map(|(i, c)| if i > 0 && c.is_uppercase() { format!("-{c}") } else { c.to_string() })
            .collect();
        for spelling in [name, &lower, &name.to_uppercase(), &kebab, &kebab.replace('-', "_")] {
            assert_eq!(spelling.parse::<RoutingMethod>().unwrap(), method, "{spelling}");
        }
        assert!(method.to_string().starts_with(name));
    }
    for wrong in ["", "Renormalise", "renorm", "Default ", "default2", "-"] {
        let error = wrong.parse::<RoutingMethod>().unwrap_err().to_string();
        assert!(error.contains(&format!("{wrong:?}")), "{error}");
        RoutingMethod::ALL.iter().for_each(|method| assert!(error.contains(method.name()), "{error}"));
    }
}

#[test]
fn methods_with_parameters_are_read_back_as_they_are_printed() {
    let random = &mut Random(4);
    for _ in 0..200 {
        let groups = ExpertGroups { num_groups: random.below(1000), topk_group: random.below(1000) };
        let routed_scaling_factor = random.unit() * 10.0;
        for method in [
            RoutingMethod::DeepSeekV3 { groups, routed_scaling_factor },
            RoutingMethod::DeepSeekV4 { routed_scaling_factor },
        ] {
            assert_eq!(method.to_string().parse::<RoutingMethod>().unwrap(), method);
        }
    }
    for method in RoutingMethod::ALL {
        assert_eq!(method.to_string().parse::<RoutingMethod>().unwrap(), method);
    }
    let method: RoutingMethod = "deepseek_v3: topk_group = 2, num_groups = 4".parse().unwrap();
    assert_eq!(method.groups(), ExpertGroups { num_groups: 4, topk_group: 2 });
    assert_eq!(method.routed_scaling_factor(), 2.5);
}

#[test]
fn zero_tokens_give_empty_outputs() {
    for dtype in FLOATS {
        for method in oracle::methods() {
            let logits = Tensor::zeros((0, 8), dtype, &Device::Cpu).unwrap();
            let routing = router(method, 2, None).route_everywhere(&logits).unwrap();
            assert_eq!(routing.topk_ids.dims(), [0, 2]);
            assert_eq!(routing.topk_weights.dims(), [0, 2]);
            assert_eq!(routing.topk_ids.dtype(), DType::U32);
        }
    }
}

#[track_caller]
fn refused<T>(result: candle_core::Result<T>, words: &[&str]) {
    let error = result.err().expect("should be refused").to_string();
    words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in {error:?}"));
}

#[test]
fn errors_name_op_argument_value_and_limit() {
    let router = |top_k| Router::new(RoutingMethod::Renormalize, top_k).unwrap();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    refused(Router::new(RoutingMethod::Default, 0), &["topk-routing", "top_k is 0", "at least 1"]);
    refused(
        router(9).route_everywhere(&zeros(&[2, 8], DType::F32)),
        &["topk-routing", "top_k is 9", "num_experts", "8"],
    );
    refused(
        router(1).route_everywhere(&zeros(&[2, 0], DType::F32)),
        &["topk-routing", "top_k is 1", "num_experts", "0"],
    );
    for shape in [&[][..], &[8], &[1, 2, 8]] {
        let expected = &["topk-routing", "router_logits", &format!("{shape:?}"), "[num_tokens, num_experts]"];
        refused(router(1).route_everywhere(&zeros(shape, DType::F32)), expected);
    }
    for dtype in [DType::U8, DType::U32, DType::I64, DType::F64] {
        let expected = &["topk-routing", "router_logits", &format!("{dtype:?}"), "f32, f16 or bf16"];
        refused(router(1).route_everywhere(&zeros(&[2, 8], dtype)), expected);
    }
    for method in oracle::methods().filter(|m| !m.takes_selection_bias()) {
        let with_bias = Router::new(method, 1).unwrap().with_selection_bias(&zeros(&[8], DType::F32));
        refused(with_bias, &["topk-routing", method.name(), "selection bias"]);
    }
    let biased = |bias: &Tensor| Router::new(RoutingMethod::MiniMax2, 1).unwrap().with_selection_bias(bias);
    refused(biased(&zeros(&[8], DType::I64)), &["topk-routing", "selection bias", "I64", "f32, f16 or bf16"]);
    refused(biased(&zeros(&[1, 8], DType::F32)), &["topk-routing", "selection bias", "[1, 8]", "[num_experts]"]);
    let mismatched = biased(&zeros(&[7], DType::F32)).unwrap().route_everywhere(&zeros(&[2, 8], DType::F32));
    refused(mismatched, &["topk-routing", "selection bias", "7", "num_experts", "8"]);
}

#[test]
fn the_selection_bias_may_be_a_half_float_or_a_view() {
    let values: Vec<f32> = (0..16).map(|i| if i % 4 == 1 { 8.0 } else { -0.5 }).collect();
    for dtype in FLOATS {
        // Column 1 of [4, 4] holds the eights; row 0 holds one eight.
        let table = oracle::floats(&values, &[4, 4], dtype).0;
        let bias = table.t().unwrap().narrow(1, 2, 1).unwrap().squeeze(1).unwrap();
        let router = Router::new(RoutingMethod::MiniMax2, 1).unwrap().with_selection_bias(&bias).unwrap();
        let routing = router.route_everywhere(&Tensor::zeros((1, 4), dtype, &Device::Cpu).unwrap()).unwrap();
        assert_eq!(routing.topk_ids.to_vec2::<u32>().unwrap(), [[1]]);
    }
}

#[test]
fn a_signalling_nan_beside_an_infinity_is_no_number() {
    for bits in [0xff80_0001, 0x7f80_0001, 0x7fbf_ffff, 0x7fc0_0000] {
        let nan = f32::from_bits(bits);
        for row in
            [[f32::INFINITY, 4.25, nan], [nan, 4.25, f32::INFINITY], [4.25, nan, 0.0], [nan, f32::NEG_INFINITY, nan]]
        {
            for method in oracle::methods() {
                route(method, 3, &row);
            }
        }
    }
}
