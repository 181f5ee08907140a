//! Routing against a naive float64 oracle, and the mistakes that other systems have made.

use candle_core::{DType, Device, Tensor, Var};
use candle_moe::routing::{Router, Routing, RoutingMethod};
use half::{bf16, f16};
use proptest::prelude::*;

/// The contract, word by word: a row of logits to (ids, weights).
fn oracle(method: RoutingMethod, logits: &[f64], bias: &[f64], top_k: usize) -> (Vec<u32>, Vec<f64>) {
    let sigmoid = |l: f64| 1.0 / (1.0 + (-l).exp());
    let score = |e: usize| match method {
        // The float32 value chooses, so that two scores that round to the same are tied.
        RoutingMethod::MiniMax2 => f64::from(sigmoid(logits[e]) as f32 + bias[e] as f32),
        _ => logits[e],
    };
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    // Stable: ties stay in the order of the ids. -0 equals +0 in comparisons.
    ids.sort_by(|&a, &b| match (score(a).is_nan(), score(b).is_nan()) {
        (true, true) => std::cmp::Ordering::Equal,
        (true, false) => std::cmp::Ordering::Greater,
        (false, true) => std::cmp::Ordering::Less,
        (false, false) => score(b).partial_cmp(&score(a)).unwrap(),
    });
    ids.truncate(top_k);
    let chosen: Vec<f64> = ids.iter().map(|&e| logits[e]).collect();
    let weights = match method {
        RoutingMethod::Default => softmax(logits, &chosen),
        RoutingMethod::Renormalize | RoutingMethod::RenormalizeNaive => softmax(&chosen, &chosen),
        _ => {
            let sigmoids: Vec<f64> = chosen.iter().map(|&l| if l.is_nan() { 0.0 } else { sigmoid(l) }).collect();
            // Sigmoids are float32: below the smallest, they are 0.
            let sigmoids: Vec<f64> = sigmoids.iter().map(|&s| f64::from(s as f32)).collect();
            let sum: f64 = sigmoids.iter().sum();
            match method {
                RoutingMethod::Llama4 => sigmoids,
                RoutingMethod::MiniMax2 => sigmoids.iter().map(|s| s / (sum + 1e-20)).collect(),
                RoutingMethod::SigmoidRenorm if sum == 0.0 => vec![1.0 / top_k as f64; top_k],
                RoutingMethod::SigmoidRenorm => sigmoids.iter().map(|s| s / sum).collect(),
                other => panic!("no oracle for {other}"),
            }
        }
    };
    (ids.into_iter().map(|e| e as u32).collect(), weights)
}

/// Softmax over `all` at `chosen`, with the contract for values that are not finite.
fn softmax(all: &[f64], chosen: &[f64]) -> Vec<f64> {
    let best = all.iter().copied().filter(|l| !l.is_nan()).fold(f64::NEG_INFINITY, f64::max);
    let part = |l: f64| match best {
        f64::NEG_INFINITY => 1.0,
        f64::INFINITY => f64::from(l == f64::INFINITY),
        _ if l.is_nan() => 0.0,
        _ => (l - best).exp(),
    };
    let sum: f64 = all.iter().map(|&l| part(l)).sum();
    chosen.iter().map(|&l| part(l) / sum).collect()
}

/// A value that a router has no right to expect, or a plain one.
fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        12 => (-64i32..64).prop_map(|i| i as f32 / 8.0),
        6 => -30f32..30.0,
        1 => Just(0.0),
        1 => Just(-0.0),
        1 => Just(f32::NAN),
        1 => Just(-f32::NAN),
        1 => Just(f32::from_bits(0x7f80_0001)),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::MAX),
        1 => Just(f32::MIN),
        1 => Just(1e-40),
        1 => Just(-1e-40),
        1 => -200f32..-80.0,
        1 => 80f32..200.0,
    ]
}

fn num_experts() -> impl Strategy<Value = usize> {
    prop_oneof![
        2 => 1..=33usize,
        1 => prop::sample::select(vec![60, 64, 96, 128, 160, 256, 384, 512, 576, 896, 1024]),
        1 => 1..=1024usize,
    ]
}

#[derive(Debug, Clone)]
struct Problem {
    method: RoutingMethod,
    dtype: DType,
    num_experts: usize,
    top_k: usize,
    logits: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Problem {
    fn num_tokens(&self) -> usize {
        self.logits.len() / self.num_experts
    }

    fn tensor(&self) -> Tensor {
        let shape = (self.num_tokens(), self.num_experts);
        Tensor::from_vec(self.logits.clone(), shape, &Device::Cpu).unwrap().to_dtype(self.dtype).unwrap()
    }

    fn router(&self) -> Router {
        let router = Router::new(self.method, self.top_k).unwrap();
        match &self.bias {
            Some(bias) => router.with_selection_bias(&Tensor::new(bias.as_slice(), &Device::Cpu).unwrap()).unwrap(),
            None => router,
        }
    }

    /// The logits as the dtype holds them.
    fn exact(&self) -> Vec<f64> {
        let round = |l: f32| match self.dtype {
            DType::F16 => f16::from_f32(l).to_f64(),
            DType::BF16 => bf16::from_f32(l).to_f64(),
            _ => f64::from(l),
        };
        self.logits.iter().map(|&l| round(l)).collect()
    }

    fn check(&self, routing: &Routing) {
        assert_eq!(routing.topk_ids.dims(), [self.num_tokens(), self.top_k]);
        assert_eq!(routing.topk_weights.dims(), [self.num_tokens(), self.top_k]);
        let ids = routing.topk_ids.to_vec2::<u32>().unwrap();
        let weights = routing.topk_weights.to_vec2::<f32>().unwrap();
        let bias: Vec<f64> = match &self.bias {
            Some(bias) => bias.iter().map(|&b| f64::from(b)).collect(),
            None => vec![0.0; self.num_experts],
        };
        for (token, logits) in self.exact().chunks(self.num_experts).enumerate() {
            let (expected_ids, expected) = oracle(self.method, logits, &bias, self.top_k);
            if ids[token] != expected_ids {
                // The oracle's sigmoid is exact and ours is float32: only scores that are equal up to that may swap.
                assert_eq!(self.method, RoutingMethod::MiniMax2, "token {token}");
                self.check_scores(logits, &bias, &ids[token], &expected_ids);
            } else {
                for (weight, expected) in weights[token].iter().zip(&expected) {
                    let error = (f64::from(*weight) - expected).abs();
                    assert!(error <= 1e-6, "token {token}: weight {weight}, expected {expected}");
                }
            }
            assert!(weights[token].iter().all(|w| w.is_finite() && *w >= 0.0), "token {token}: {:?}", weights[token]);
            if matches!(self.method, RoutingMethod::Renormalize | RoutingMethod::RenormalizeNaive) {
                let sum: f64 = weights[token].iter().map(|&w| f64::from(w)).sum();
                assert!((sum - 1.0).abs() < 1e-6, "token {token}: sum {sum}");
            }
        }
    }

    fn check_scores(&self, logits: &[f64], bias: &[f64], found: &[u32], expected: &[u32]) {
        let score = |&id: &u32| 1.0 / (1.0 + (-logits[id as usize]).exp()) + bias[id as usize];
        let mut distinct = found.to_vec();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), self.top_k);
        for (found, expected) in found.iter().map(score).zip(expected.iter().map(score)) {
            let close = (found - expected).abs() <= 3e-7 * (1.0 + expected.abs());
            assert!(close || found.is_nan() && expected.is_nan(), "score {found}, expected {expected}");
        }
    }
}

fn any_problem() -> impl Strategy<Value = Problem> {
    (prop::sample::select(RoutingMethod::ALL.to_vec()), num_experts(), 0..=4usize, any::<bool>())
        .prop_flat_map(|(method, num_experts, num_tokens, biased)| {
            let bias = prop::collection::vec(-2f32..2.0, num_experts);
            (
                Just((method, num_experts, biased && method.takes_selection_bias())),
                prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
                1..=num_experts.min(48),
                prop::collection::vec(any_logit(), num_tokens * num_experts),
                bias,
            )
        })
        .prop_map(|((method, num_experts, biased), dtype, top_k, logits, bias)| Problem {
            method,
            dtype,
            num_experts,
            top_k,
            logits,
            bias: biased.then_some(bias),
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn agrees_with_the_oracle_for_every_bit_pattern(problem in any_problem()) {
        problem.check(&problem.router().route(&problem.tensor()).unwrap());
    }

    #[test]
    fn views_route_like_their_copies(problem in any_problem(), pad in 0..3usize) {
        let router = problem.router();
        let (num_tokens, num_experts) = (problem.num_tokens(), problem.num_experts);
        // The same matrix inside a larger one, and as a transpose of its transpose.
        let padded = problem.tensor().pad_with_zeros(0, pad, 1).unwrap().pad_with_zeros(1, pad, 2).unwrap();
        let inside = padded.narrow(0, pad, num_tokens).unwrap().narrow(1, pad, num_experts).unwrap();
        problem.check(&router.route(&inside).unwrap());
        if num_tokens > 0 {
            let transposed = problem.tensor().t().unwrap().force_contiguous().unwrap();
            problem.check(&router.route(&transposed.t().unwrap()).unwrap());
        }
    }
}

#[test]
fn broadcast_rows_are_routed_like_copies() {
    let row = Tensor::new(&[[0f32, 3., 1., 2.]], &Device::Cpu).unwrap();
    let router = Router::new(RoutingMethod::Renormalize, 2).unwrap();
    let ids = router.route(&row.broadcast_as((3, 4)).unwrap()).unwrap().topk_ids.to_vec2::<u32>().unwrap();
    assert_eq!(ids, [[1, 3]; 3]);
}

fn route(method: RoutingMethod, top_k: usize, rows: &[Vec<f32>]) -> (Vec<Vec<u32>>, Vec<Vec<f32>>) {
    let logits = Tensor::new(rows.to_vec(), &Device::Cpu).unwrap();
    let routing = Router::new(method, top_k).unwrap().route(&logits).unwrap();
    (routing.topk_ids.to_vec2().unwrap(), routing.topk_weights.to_vec2().unwrap())
}

#[test]
fn a_row_of_nothing_but_bad_values_still_chooses_distinct_experts() {
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        for method in RoutingMethod::ALL {
            let (ids, weights) = route(method, 8, &[vec![bad; 60]]);
            assert_eq!(ids[0], (0..8).collect::<Vec<_>>(), "{method}");
            assert!(weights[0].iter().all(|&w| w == weights[0][0] && w.is_finite()), "{method}: {:?}", weights[0]);
        }
    }
}

#[test]
fn no_id_lies_beyond_an_expert_count_that_is_no_power_of_two() {
    let (ids, _) = route(RoutingMethod::Renormalize, 60, &[vec![f32::NEG_INFINITY; 60], vec![-1e30; 60]]);
    for mut row in ids {
        row.sort();
        assert_eq!(row, (0..60).collect::<Vec<_>>());
    }
}

#[test]
fn one_nan_does_not_spoil_the_row() {
    let mut row = vec![1.0f32; 16];
    row[3] = f32::NAN;
    for method in RoutingMethod::ALL {
        let (ids, weights) = route(method, 4, &[row.clone()]);
        assert_eq!(ids[0], [0, 1, 2, 4], "{method}");
        assert!(weights[0].iter().all(|&w| w > 0.0), "{method}: {:?}", weights[0]);
    }
}

#[test]
fn no_expert_is_lost_at_512_experts_and_top_10() {
    let mut row = vec![0f32; 512];
    (256..266).for_each(|e| row[e] = 10.0 + (e - 256) as f32);
    let (mut ids, _) = route(RoutingMethod::Renormalize, 10, &[row]);
    ids[0].sort();
    assert_eq!(ids[0], (256..266).collect::<Vec<_>>());
}

#[test]
fn a_negative_bias_with_few_experts_selects_real_experts() {
    let logits = Tensor::new(&[[0f32, 1., 2., 3.]], &Device::Cpu).unwrap();
    let bias = Tensor::new(&[-5f32, -5., -5., -5.], &Device::Cpu).unwrap();
    let router = Router::new(RoutingMethod::MiniMax2, 2).unwrap().with_selection_bias(&bias).unwrap();
    let routing = router.route(&logits).unwrap();
    assert_eq!(routing.topk_ids.to_vec2::<u32>().unwrap(), [[3, 2]]);
    let sum: f32 = routing.topk_weights.sum_all().unwrap().to_scalar().unwrap();
    assert!((sum - 1.0).abs() < 1e-6, "the bias is not in the weights: their sum is {sum}");
}

#[test]
fn a_top_k_beyond_eight_and_beyond_thirty_two_is_exact() {
    let row: Vec<f32> = (0..896).map(|e| ((e * 7919) % 896) as f32).collect();
    for top_k in [9, 16, 22, 32, 33, 64, 895, 896] {
        let (ids, _) = route(RoutingMethod::Default, top_k, std::slice::from_ref(&row));
        let values: Vec<f32> = ids[0].iter().map(|&id| row[id as usize]).collect();
        let expected: Vec<f32> = (0..top_k).map(|i| (895 - i) as f32).collect();
        assert_eq!(values, expected, "top_k {top_k}");
    }
}

#[test]
fn the_bias_chooses_and_does_not_weigh() {
    let logits = Tensor::new(&[[0f32, 0., 0., 0.]], &Device::Cpu).unwrap();
    let bias = Tensor::new(&[0f32, 0.5, 0., 0.25], &Device::Cpu).unwrap();
    let router = Router::new(RoutingMethod::MiniMax2, 2).unwrap().with_selection_bias(&bias).unwrap();
    let routing = router.route(&logits).unwrap();
    assert_eq!(routing.topk_ids.to_vec2::<u32>().unwrap(), [[1, 3]]);
    assert_eq!(routing.topk_weights.to_vec2::<f32>().unwrap(), [[0.5, 0.5]]);
    let plain = router.without_selection_bias().route(&logits).unwrap();
    assert_eq!(plain.topk_ids.to_vec2::<u32>().unwrap(), [[0, 1]]);
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let (num_tokens, num_experts, top_k) = (3, 7, 3);
    let values: Vec<f32> = (0..num_tokens * num_experts).map(|i| ((i * 37 % 23) as f32 - 11.0) / 5.0).collect();
    let grad: Vec<f32> = (0..num_tokens * top_k).map(|i| ((i * 29 % 17) as f32 - 8.0) / 7.0).collect();
    let loss = |method, values: &[f64]| -> f64 {
        let rows = values.chunks(num_experts).flat_map(|row| oracle(method, row, &vec![0.0; num_experts], top_k).1);
        rows.zip(&grad).map(|(w, g)| w * f64::from(*g)).sum()
    };
    for method in RoutingMethod::ALL {
        let logits = Tensor::from_vec(values.clone(), (num_tokens, num_experts), &Device::Cpu).unwrap();
        let logits = Var::from_tensor(&logits).unwrap();
        let weights = Router::new(method, top_k).unwrap().route(&logits).unwrap().topk_weights;
        let upstream = Tensor::from_vec(grad.clone(), (num_tokens, top_k), &Device::Cpu).unwrap();
        let grads = (weights * upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let found = grads.get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (i, found) in found.iter().enumerate() {
            // Wide enough that the float32 rounding inside the oracle does not show.
            let step = 1e-3;
            let moved = |by: f64| {
                let mut moved: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
                moved[i] += by;
                loss(method, &moved)
            };
            let expected = (moved(step) - moved(-step)) / (2.0 * step);
            assert!((f64::from(*found) - expected).abs() < 2e-4, "{method}, logit {i}: {found}, expected {expected}");
        }
        assert!(found.iter().any(|g| g.abs() > 1e-2), "{method}: the gradient is not just zero");
    }
}

#[test]
fn gradients_have_the_dtype_of_the_logits_and_are_finite_for_bad_rows() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for method in RoutingMethod::ALL {
            let rows = [
                [f32::NAN; 4],
                [f32::NEG_INFINITY; 4],
                [f32::INFINITY, 0.0, f32::NAN, f32::INFINITY],
                [-300.0, -300.0, -301.0, -302.0],
                [1.0, f32::NAN, f32::NEG_INFINITY, 2.0],
            ];
            let logits = Tensor::new(&rows, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let logits = Var::from_tensor(&logits).unwrap();
            let weights = Router::new(method, 3).unwrap().route(&logits).unwrap().topk_weights;
            let grads = weights.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let found = grads.get(&logits).unwrap();
            assert_eq!(found.dtype(), dtype);
            let found = found.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            assert!(found.iter().flatten().all(|g| g.is_finite()), "{method}: {found:?}");
            assert!(found[..3].iter().flatten().all(|&g| g == 0.0), "{method}: {found:?}");
        }
    }
}

#[test]
fn methods_are_parsed_from_their_names_and_printed_back() {
    for method in RoutingMethod::ALL {
        assert_eq!(method.to_string().parse::<RoutingMethod>().unwrap(), method);
    }
    assert_eq!("renormalize_naive".parse::<RoutingMethod>().unwrap(), RoutingMethod::RenormalizeNaive);
    let error = "softmax".parse::<RoutingMethod>().unwrap_err().to_string();
    for method in RoutingMethod::ALL {
        assert!(error.contains(method.name()), "{error}");
    }
}

#[test]
fn bad_input_is_refused_by_name_value_and_limit() {
    let router = Router::new(RoutingMethod::Renormalize, 3).unwrap();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    for (logits, message) in [
        (zeros(&[4], DType::F32), "router_logits has shape [4], expected [num_tokens, num_experts]"),
        (zeros(&[1, 2, 4], DType::F32), "router_logits has shape [1, 2, 4]"),
        (zeros(&[2, 4], DType::U32), "router_logits has dtype U32, expected f32, f16 or bf16"),
        (zeros(&[2, 4], DType::F64), "router_logits has dtype F64"),
        (zeros(&[2, 2], DType::F32), "top_k is 3, expected at most num_experts, which is 2"),
        (zeros(&[2, 0], DType::F32), "top_k is 3, expected at most num_experts, which is 0"),
    ] {
        let error = router.route(&logits).unwrap_err().to_string();
        assert!(error.contains("topk-routing") && error.contains(message), "{error:?} does not say {message:?}");
    }
    assert!(Router::new(RoutingMethod::Default, 0).unwrap_err().to_string().contains("top_k is 0"));
    let error = router.with_selection_bias(&zeros(&[4], DType::F32)).unwrap_err().to_string();
    assert!(error.contains("Renormalize takes no selection bias"), "{error}");
    let minimax = || Router::new(RoutingMethod::MiniMax2, 1).unwrap();
    assert!(minimax().with_selection_bias(&zeros(&[4], DType::I64)).is_err());
    assert!(minimax().with_selection_bias(&zeros(&[1, 4], DType::F32)).is_err());
    let biased = minimax().with_selection_bias(&zeros(&[5], DType::F32)).unwrap();
    let error = biased.route(&zeros(&[2, 4], DType::F32)).unwrap_err().to_string();
    assert!(error.contains("selection bias has 5 values, expected num_experts, which is 4"), "{error}");
}
