//! AVX2: a chunk is four registers, a tile one row by two tokens (8 accumulators of 16 registers).

use super::{Body, CHUNK, Chunk, MXFP4_SCALES, MXFP4_TABLE, Rows, WeightRows};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::array::from_fn;

/// Proof that this machine has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let all =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

impl Body for Avx2 {
    const ROWS: usize = 1;
    const TOKENS: usize = 2;

    fn tile<const R: usize, const N: usize>(self, rows: &Rows<'_>, row: usize, chunks: &[Chunk]) -> [[f32; N]; R] {
        // SAFETY: an `Avx2` exists only where `detect` found the features that `row_products` is compiled for.
        from_fn(|r| unsafe { row_products(rows, row + r, chunks) })
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn row_products<const N: usize>(rows: &Rows<'_>, row: usize, chunks: &[Chunk]) -> [f32; N] {
    match rows.weights {
        WeightRows::F32(w) => {
            let row = rows.values(w, row);
            multiply(chunks, |c| even_odd(load(row.chunk(c))))
        }
        WeightRows::Bf16(w) => {
            let row = rows.values(w, row);
            let odd = _mm256_set1_epi32(i32::from(u16::MAX) << 16);
            multiply(chunks, |c| {
                let [first, second] = load_pairs(row.chunk(c));
                let even = [first, second].map(|pairs| _mm256_slli_epi32(pairs, 16));
                let odd = [first, second].map(|pairs| _mm256_and_si256(pairs, odd));
                [even[0], even[1], odd[0], odd[1]].map(|bits| _mm256_castsi256_ps(bits))
            })
        }
        WeightRows::F16(w) => {
            let row = rows.values(w, row);
            multiply(chunks, |c| even_odd(quarters(row.chunk(c)).map(|quarter| _mm256_cvtph_ps(quarter))))
        }
        WeightRows::Mxfp4 { blocks, scales } => {
            let row = rows.blocks(blocks, scales, row);
            let (magnitudes, _) = MXFP4_TABLE.as_chunks();
            let magnitudes = load8(&magnitudes[0]);
            let sign = _mm256_set1_epi32(i32::MIN);
            multiply(chunks, |c| {
                let bytes = load_bytes(&row.blocks[c]);
                let bytes = [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))];
                let scale = _mm256_set1_ps(MXFP4_SCALES[usize::from(row.scales[c])]);
                from_fn(|i| {
                    let nibbles = if i < 2 { bytes[i] } else { _mm256_srli_epi32(bytes[i - 2], 4) };
                    // The permutation reads the low three bits of each lane; bit 3 becomes the sign.
                    let magnitude = _mm256_permutevar8x32_ps(magnitudes, nibbles);
                    let negative = _mm256_and_si256(_mm256_slli_epi32(nibbles, 28), sign);
                    _mm256_mul_ps(_mm256_xor_ps(magnitude, _mm256_castsi256_ps(negative)), scale)
                })
            })
        }
        WeightRows::Fp8 { values, scales } => {
            let row = rows.fp8(values, scales, row);
            multiply(chunks, |c| {
                let [even, odd] = fp8_as_f16(row.values.chunk(c));
                let scale = _mm256_set1_ps(row.scale(c) * FP8_PER_F16);
                let quarters = [
                    _mm256_castsi256_si128(even),
                    _mm256_extracti128_si256::<1>(even),
                    _mm256_castsi256_si128(odd),
                    _mm256_extracti128_si256::<1>(odd),
                ];
                quarters.map(|quarter| _mm256_mul_ps(_mm256_cvtph_ps(quarter), scale))
            })
        }
    }
}

/// Sums the chunks of a row, given by `weights(chunk)`, times those of `N` tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<const N: usize>(chunks: &[Chunk], weights: impl Fn(usize) -> [__m256; 4]) -> [f32; N] {
    let mut sums = [[_mm256_setzero_ps(); 4]; N];
    for (c, tokens) in chunks.chunks_exact(N).enumerate() {
        let weights = weights(c);
        for n in 0..N {
            let token = load(&tokens[n]);
            for i in 0..4 {
                sums[n][i] = _mm256_fmadd_ps(weights[i], token[i], sums[n][i]);
            }
        }
    }
    sums.map(|[a, b, c, d]| {
        let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
        let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
    })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(chunk: &[f32; CHUNK]) -> [__m256; 4] {
    let (quarters, _) = chunk.as_chunks();
    from_fn(|i| load8(&quarters[i]))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load8(values: &[f32; 8]) -> __m256 {
    // SAFETY: the array has the 8 floats that the unaligned load reads.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_bytes(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array has the 16 bytes that the unaligned load reads.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// What an E4M3 value is to its [`fp8_as_f16`].
pub(super) const FP8_PER_F16: f32 = 256.0;

/// The even values of a chunk and the odd ones as float16, 2^-8 of what they are.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn fp8_as_f16(chunk: &[u8; CHUNK]) -> [__m256i; 2] {
    // SAFETY: the array has the 32 bytes that the unaligned load reads.
    let pairs = unsafe { _mm256_loadu_si256(chunk.as_ptr().cast()) };
    // A value in the high byte, shifted down by one with its sign: the copy of the sign in bit 14 goes, and so do the bits
    // of the other value below the mantissa.
    let places = _mm256_set1_epi16(0xbf80u16 as i16);
    [_mm256_slli_epi16(pairs, 8), pairs].map(|high| _mm256_and_si256(_mm256_srai_epi16(high, 1), places))
}

/// 16 lanes of two values each, the even one in the low half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_pairs(chunk: &[bf16; CHUNK]) -> [__m256i; 2] {
    let (halves, _) = chunk.as_chunks::<16>();
    // SAFETY: each array has the 32 bytes that the unaligned load reads.
    from_fn(|i| unsafe { _mm256_loadu_si256(halves[i].as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn quarters(chunk: &[f16; CHUNK]) -> [__m128i; 4] {
    let (quarters, _) = chunk.as_chunks::<8>();
    // SAFETY: each array has the 8 numbers that the unaligned load reads.
    from_fn(|i| unsafe { _mm_loadu_si128(quarters[i].as_ptr().cast()) })
}

/// The even elements of a chunk, and the odd ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn even_odd([a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
    let even = [_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b10_00_10_00>(c, d)];
    let odd = [_mm256_shuffle_ps::<0b11_01_11_01>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(c, d)];
    [even[0], even[1], odd[0], odd[1]].map(|mixed| in_order(mixed))
}

/// The shuffles work inside each half of a register and leave pairs as a, b, a, b: now a, a, b, b.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn in_order(mixed: __m256) -> __m256 {
    _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(mixed)))
}
