//! Every body against sums in float64, and a token's bits against the batch it is in.

use super::*;

fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// The formats with `num_rows` rows, and what they mean in float64.
fn check<B: Body>(body: B) {
    for (num_features, num_rows) in [(32, 1), (64, 3), (96, 2), (2880, 5), (33, 4), (1, 2), (45, 3), (0, 2)] {
        let values = numbers(num_features as u64 + 1, num_rows * num_features);
        let as_bf16: Vec<_> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let as_f16: Vec<_> = values.iter().map(|&v| f16::from_f32(v)).collect();
        let widen = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let exact_bf16: Vec<_> = as_bf16.iter().map(|v| v.to_f64()).collect();
        let exact_f16: Vec<_> = as_f16.iter().map(|v| v.to_f64()).collect();
        check_format(body, WeightRows::F32(&values), &widen(&values), num_features, num_rows);
        check_format(body, WeightRows::Bf16(&as_bf16), &exact_bf16, num_features, num_rows);
        check_format(body, WeightRows::F16(&as_f16), &exact_f16, num_features, num_rows);
        if num_features % CHUNK == 0 {
            let bytes = |seed, len| numbers(seed, len).iter().map(|v| ((v + 1.0) * 127.9) as u8).collect::<Vec<_>>();
            let blocks = bytes(7, num_rows * num_features / 2);
            let scales: Vec<_> = bytes(8, num_rows * num_features / CHUNK).iter().map(|b| 110 + b % 20).collect();
            let exact: Vec<_> = (0..num_rows * num_features)
                .map(|i| {
                    let nibble = blocks[i / 2] >> (i % 2 * 4) & 15;
                    f64::from(MXFP4_TABLE[usize::from(nibble)]) * 2f64.powi(i32::from(scales[i / CHUNK]) - 127)
                })
                .collect();
            let weights = WeightRows::Mxfp4 { blocks: &blocks, scales: &scales };
            check_format(body, weights, &exact, num_features, num_rows);
        }
    }
}

fn check_format<B: Body>(body: B, weights: WeightRows<'_>, exact: &[f64], num_features: usize, num_rows: usize) {
    let order = match weights {
        WeightRows::Mxfp4 { .. } => ElementOrder::EvenOdd,
        _ => ElementOrder::Natural,
    };
    let tokens = numbers(99, 9 * num_features);
    let rows = Rows { weights, num_features };
    let run = |range: Range<usize>| {
        let packed = PackedTokens::pack_tiles(B::TOKENS, order, num_features, range.len(), |t, i| {
            tokens[(range.start + t) * num_features + i]
        });
        let mut out = vec![f32::NAN; num_rows * range.len()];
        walk(body, &rows, &packed, &mut out);
        out
    };
    let alone: Vec<_> = (0..9).map(|t| run(t..t + 1)).collect();
    for num_tokens in 1..=9 {
        let out = run(0..num_tokens);
        for (i, product) in out.iter().enumerate() {
            let (row, token) = (i / num_tokens, i % num_tokens);
            assert_eq!(product.to_bits(), alone[token][row].to_bits(), "row {row}, token {token} of {num_tokens}");
            let (w, x) = (&exact[row * num_features..], &tokens[token * num_features..]);
            let terms = || w.iter().zip(x).take(num_features).map(|(w, x)| w * f64::from(*x));
            let error = (f64::from(*product) - terms().sum::<f64>()).abs();
            let bound = terms().map(f64::abs).sum::<f64>() * 1e-6 + 1e-30;
            assert!(error <= bound, "row {row}, token {token}: {error} above {bound}");
        }
    }
    assert!(run(0..0).is_empty());
}

#[test]
fn portable_is_exact_and_batch_invariant() {
    check(portable::Portable);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn avx2_is_exact_and_batch_invariant() {
    match avx2::Avx2::detect() {
        Some(body) => check(body),
        None => eprintln!("skipped: this machine has no AVX2"),
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn avx512_is_exact_and_batch_invariant() {
    match avx512::Avx512::detect() {
        Some(body) => check(body),
        None => eprintln!("skipped: this machine has no AVX-512"),
    }
}

#[test]
fn scales_are_powers_of_two() {
    for (byte, &scale) in MXFP4_SCALES.iter().enumerate().take(255) {
        assert_eq!(f64::from(scale), 2f64.powi(byte as i32 - 127));
    }
}
