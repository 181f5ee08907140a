//! Every body against sums in float64, a token's bits against the batch it is in, and the formats against each other.

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
    for (num_features, num_rows) in [(32, 1), (64, 3), (96, 2), (2880, 5), (33, 4), (1, 2), (45, 3), (300, 3), (0, 2)] {
        let values = numbers(num_features as u64 + 1, num_rows * num_features);
        let as_bf16: Vec<_> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let as_f16: Vec<_> = values.iter().map(|&v| f16::from_f32(v)).collect();
        let widen = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let exact_bf16: Vec<_> = as_bf16.iter().map(|v| v.to_f64()).collect();
        let exact_f16: Vec<_> = as_f16.iter().map(|v| v.to_f64()).collect();
        check_format(body, WeightRows::F32(&values), &widen(&values), num_features, num_rows);
        check_format(body, WeightRows::Bf16(&as_bf16), &exact_bf16, num_features, num_rows);
        check_format(body, WeightRows::F16(&as_f16), &exact_f16, num_features, num_rows);
        let (bits, scales, exact) = fp8(num_rows, num_features);
        check_format(body, WeightRows::Fp8 { values: &bits, scales: &scales }, &exact, num_features, num_rows);
        if num_features % CHUNK == 0 {
            let (blocks, scales, exact) = mxfp4(num_rows * num_features);
            let weights = WeightRows::Mxfp4 { blocks: &blocks, scales: &scales };
            check_format(body, weights, &exact, num_features, num_rows);
        }
    }
    check_every_fp8_value(body);
    check_that_formats_agree(body);
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    numbers(seed, len).iter().map(|v| ((v + 1.0) * 128.0) as u8).collect()
}

/// Blocks and scales of `len` values, and what they mean.
fn mxfp4(len: usize) -> (Vec<u8>, Vec<u8>, Vec<f64>) {
    let blocks = bytes(7, len / 2);
    let scales: Vec<_> = bytes(8, len / CHUNK).iter().map(|b| 110 + b % 20).collect();
    let value = |i: usize| {
        let nibble = blocks[i / 2] >> (i % 2 * 4) & 15;
        f64::from(MXFP4_TABLE[usize::from(nibble)]) * 2f64.powi(i32::from(scales[i / CHUNK]) - 127)
    };
    let exact = (0..len).map(value).collect();
    (blocks, scales, exact)
}

/// The value of a finite E4M3 byte.
fn e4m3(bits: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if bits < 0x80 { magnitude } else { -magnitude }
}

/// Values and scales of rows, and what they mean: every product rounded to float32.
fn fp8(num_rows: usize, num_features: usize) -> (Vec<u8>, Vec<f32>, Vec<f64>) {
    let num_blocks = num_features.div_ceil(FP8_BLOCK);
    let bits: Vec<_> =
        bytes(9, num_rows * num_features).iter().map(|b| if b & 0x7f == 0x7f { 0 } else { *b }).collect();
    let scales: Vec<_> = numbers(10, num_rows * num_blocks).iter().map(|scale| scale * 1e-3).collect();
    let value = |(i, &bits): (usize, &u8)| {
        let scale = scales[i / num_features * num_blocks + i % num_features / FP8_BLOCK];
        f64::from((e4m3(bits) * f64::from(scale)) as f32)
    };
    let exact = bits.iter().enumerate().map(value).collect();
    (bits, scales, exact)
}

/// One row per scale holds all 254 values; a token that is 1 at one place picks one of them.
fn check_every_fp8_value<B: Body>(body: B) {
    let finite: Vec<u8> = (0..=255u8).filter(|bits| bits & 0x7f != 0x7f).collect();
    assert_eq!(finite.len(), 254);
    let scales = [1.0, -0.3, 1.2345e-7, f32::MIN_POSITIVE, 1e-44, 2f32.powi(119), -2f32.powi(119), 0.0];
    let values: Vec<_> = scales.iter().flat_map(|_| finite.clone()).collect();
    let row_scales: Vec<_> = scales.iter().flat_map(|&scale| [scale; 2]).collect();
    let one_hot: Vec<_> = (0..254 * 254).map(|i| f32::from(i % 255 == 0)).collect();
    let weights = WeightRows::Fp8 { values: &values, scales: &row_scales };
    let found = products(body, weights, &one_hot, 254, 254, scales.len());
    for (i, &found) in found.iter().enumerate() {
        let (scale, bits) = (scales[i / 254], finite[i % 254]);
        assert_eq!(found, (e4m3(bits) * f64::from(scale)) as f32, "{bits:#x} times {scale}");
    }
}

/// The same numbers in every format that can hold them: the same bits.
fn check_that_formats_agree<B: Body>(body: B) {
    for (num_features, num_rows, num_tokens) in [(32, 1, 1), (96, 3, 2), (2880, 2, 7), (64, 5, 70)] {
        let (blocks, scales, exact) = mxfp4(num_rows * num_features);
        let as_f32: Vec<_> = exact.iter().map(|&v| v as f32).collect();
        let as_bf16: Vec<_> = exact.iter().map(|&v| bf16::from_f64(v)).collect();
        let as_f16: Vec<_> = exact.iter().map(|&v| f16::from_f64(v)).collect();
        assert!((0..exact.len()).all(|i| as_bf16[i].to_f64() == exact[i] && as_f16[i].to_f64() == exact[i]));
        let tokens = numbers(17, num_tokens * num_features);
        let bits = |weights| {
            let products = products(body, weights, &tokens, num_tokens, num_features, num_rows);
            products.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        // A weight of FP8 is a float32 product, which float32 holds.
        let (e4m3, fp8_scales, fp8_exact) = fp8(num_rows, num_features);
        let fp8_as_f32: Vec<_> = fp8_exact.iter().map(|&v| v as f32).collect();
        let fp8 = bits(WeightRows::Fp8 { values: &e4m3, scales: &fp8_scales });
        assert_eq!(bits(WeightRows::F32(&fp8_as_f32)), fp8, "FP8, {num_features} features");
        let expected = bits(WeightRows::Mxfp4 { blocks: &blocks, scales: &scales });
        assert_eq!(bits(WeightRows::F32(&as_f32)), expected, "f32, {num_features} features");
        assert_eq!(bits(WeightRows::Bf16(&as_bf16)), expected, "bf16, {num_features} features");
        assert_eq!(bits(WeightRows::F16(&as_f16)), expected, "f16, {num_features} features");
    }
}

fn products<B: Body>(
    body: B,
    weights: WeightRows<'_>,
    tokens: &[f32],
    num_tokens: usize,
    num_features: usize,
    num_rows: usize,
) -> Vec<f32> {
    let value = |t: usize, i: usize| tokens[t * num_features + i];
    let packed = PackedTokens::pack_tiles(B::TOKENS, num_features, num_tokens, value);
    let mut out = vec![f32::NAN; num_rows * num_tokens];
    walk(body, &Rows { weights, num_features }, &packed, &mut out);
    out
}

fn check_format<B: Body>(body: B, weights: WeightRows<'_>, exact: &[f64], num_features: usize, num_rows: usize) {
    let tokens = numbers(99, 9 * num_features);
    let run = |range: Range<usize>| {
        products(body, weights, &tokens[range.start * num_features..], range.len(), num_features, num_rows)
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
fn portable_is_exact_batch_invariant_and_the_same_for_every_format() {
    check(portable::Portable);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn avx2_is_exact_batch_invariant_and_the_same_for_every_format() {
    match avx2::Avx2::detect() {
        Some(body) => check(body),
        None => eprintln!("skipped: this machine has no AVX2"),
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn avx512_is_exact_batch_invariant_and_the_same_for_every_format() {
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
