//! Dot products of weight rows with tokens, the inner loop of every product of this crate.
//!
//! ```text
//! out[row, token] = sum over i of weight[row, i] * token[i]
//! ```
//!
//! Values go through in chunks of 32, the MXFP4 block; each lane of an accumulator sums its own elements of every chunk,
//! and the lanes are added at the end. Why it looks the way it does:
//!
//! 1. MXFP4 is decoded by table permutations in registers: the bytes of a block, widened to 32-bit lanes, index a table of
//!    16 values (AVX-512), or of 8 magnitudes with the sign moved in by a shift (AVX2). Nothing is stored.
//! 2. Inside a chunk the even elements come first, then the odd ones ([`element`]): low nibbles are even and high nibbles
//!    odd, low halves of 32-bit words are even and high halves odd, so nibbles and bf16 need no shuffle. Every format has
//!    this order, so weights that mean the same numbers give the same bits.
//! 3. The block scale multiplies the weights: a power of two, so it is exact (up to scale byte 252), and is paid once for all tokens of a tile.
//! 4. FP8 values (E4M3) become float16 by moving their bits: sign to sign, exponent and mantissa to the same, which is 2^-8
//!    of the value, subnormals included. The 2^8 goes with the scale, exactly, so a weight rounds once. The low bytes of
//!    16-bit words are even and the high ones odd.
//! 5. A tile is a few rows by a few tokens, as many as the registers hold: each weight is decoded once for all its tokens,
//!    each token value loaded once for all its rows.
//! 6. Every token sees the same operations in the same order whatever the tile it falls in, so its result does not depend
//!    on the batch, to the bit.
//!
//! The instruction set is chosen at run time; the bodies are [`avx512`], [`avx2`] and [`portable`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::FP8_BLOCK;
use half::{bf16, f16};
use std::ops::Range;

/// Values that go through together, the MXFP4 block.
const CHUNK: usize = 32;

/// 32 values of a token, in the order of [`element`].
type Chunk = [f32; CHUNK];

/// The element of a chunk that a lane holds: 0, 2, 4, ..., 30, 1, 3, ..., 31.
#[inline(always)]
const fn element(lane: usize) -> usize {
    lane % (CHUNK / 2) * 2 + lane / (CHUNK / 2)
}

/// The values of the MXFP4 nibbles.
const MXFP4_TABLE: [f32; 16] = [0., 0.5, 1., 1.5, 2., 3., 4., 6., -0., -0.5, -1., -1.5, -2., -3., -4., -6.];

/// `2^(scale - 127)` for every scale byte; the last, which stands for NaN, never gets here.
static MXFP4_SCALES: [f32; 256] = {
    let mut scales = [0.0; 256];
    let mut byte = 1;
    scales[0] = f32::from_bits(1 << 22); // 2^-127 is subnormal
    while byte < 256 {
        scales[byte] = f32::from_bits((byte as u32) << 23);
        byte += 1;
    }
    scales
};

/// The value of every E4M3 byte; 0x7f and 0xff, which stand for NaN, never get here.
static FP8_VALUES: [f32; 256] = {
    let per_f32 = f32::from_bits((127 + 120) << 23); // the biases of the exponents are 127 and 7
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        let bits = byte as u32;
        values[byte] = f32::from_bits((bits & 0x80) << 24 | (bits & 0x7f) << 20) * per_f32;
        byte += 1;
    }
    values
};

/// An instruction set: how many rows and tokens a tile has, and how it is computed.
trait Body: Copy + Sync {
    /// Most rows of a tile, 1 or 2.
    const ROWS: usize;
    /// Most tokens of a tile, 1, 2 or 4.
    const TOKENS: usize;

    /// The products of rows `row..row + R` with `N` tokens, whose chunks stand side by side.
    fn tile<const R: usize, const N: usize>(self, rows: &Rows<'_>, row: usize, chunks: &[Chunk]) -> [[f32; N]; R];
}

/// Runs an expression with the [`Body`] for this machine.
macro_rules! with_body {
    (|$body:ident| $run:expr) => {{
        #[cfg(target_arch = "x86_64")]
        if let Some($body) = avx512::Avx512::detect() {
            return $run;
        }
        #[cfg(target_arch = "x86_64")]
        if let Some($body) = avx2::Avx2::detect() {
            return $run;
        }
        let $body = portable::Portable;
        $run
    }};
}

/// Tokens packed for [`dot_rows`]: tile by tile, chunk by chunk, the tokens of the tile side by side; tails are zero.
pub(super) struct PackedTokens {
    chunks: Vec<Chunk>,
    num_tokens: usize,
    num_features: usize,
}

impl PackedTokens {
    /// Packs `value(token, feature)`.
    pub(super) fn pack(num_features: usize, num_tokens: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        Self::pack_tiles(tile_tokens(), num_features, num_tokens, value)
    }

    fn pack_tiles(
        tile_tokens: usize,
        num_features: usize,
        num_tokens: usize,
        value: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let num_chunks = num_features.div_ceil(CHUNK);
        let mut chunks = Vec::with_capacity(num_chunks * num_tokens);
        for tile in tiles(num_tokens, tile_tokens) {
            for chunk in 0..num_chunks {
                for token in tile.clone() {
                    let at = |i: usize| if i < num_features { value(token, i) } else { 0.0 };
                    chunks.push(std::array::from_fn(|lane| at(chunk * CHUNK + element(lane))));
                }
            }
        }
        Self { chunks, num_tokens, num_features }
    }

    pub(super) fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}

fn tile_tokens() -> usize {
    fn of<B: Body>(_: B) -> usize {
        B::TOKENS
    }
    with_body!(|body| of(body))
}

/// The tokens of each tile: widths are powers of two, the largest first.
fn tiles(num_tokens: usize, tile_tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = num_tokens - first;
        let width = if left >= tile_tokens { tile_tokens } else { left.checked_ilog2().map_or(0, |log| 1 << log) };
        first += width;
        (width > 0).then(|| first - width..first)
    })
}

/// Rows of weights, one after the other.
#[derive(Clone, Copy)]
pub(super) enum WeightRows<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    Mxfp4 { blocks: &'a [u8], scales: &'a [u8] },
    Fp8 { values: &'a [u8], scales: &'a [f32] },
}

impl WeightRows<'_> {
    /// The rows of a range; `num_features` values each.
    pub(super) fn slice(self, rows: Range<usize>, num_features: usize) -> Self {
        let values = rows.start * num_features..rows.end * num_features;
        match self {
            Self::F32(w) => Self::F32(&w[values]),
            Self::Bf16(w) => Self::Bf16(&w[values]),
            Self::F16(w) => Self::F16(&w[values]),
            Self::Mxfp4 { blocks, scales } => Self::Mxfp4 {
                blocks: &blocks[values.start / 2..values.end / 2],
                scales: &scales[values.start / CHUNK..values.end / CHUNK],
            },
            Self::Fp8 { values: all, scales } => {
                let num_blocks = num_features.div_ceil(FP8_BLOCK);
                Self::Fp8 { values: &all[values], scales: &scales[rows.start * num_blocks..rows.end * num_blocks] }
            }
        }
    }
}

/// Weight rows of `num_features` values.
struct Rows<'a> {
    weights: WeightRows<'a>,
    num_features: usize,
}

impl Rows<'_> {
    fn values<'w, W: Copy + Default>(&self, weights: &'w [W], row: usize) -> DenseRow<'w, W> {
        let (chunks, rest) = weights[row * self.num_features..][..self.num_features].as_chunks();
        let mut tail = [W::default(); CHUNK];
        tail[..rest.len()].copy_from_slice(rest);
        DenseRow { chunks, tail }
    }

    fn blocks<'w>(&self, blocks: &'w [u8], scales: &'w [u8], row: usize) -> Mxfp4Row<'w> {
        let num_blocks = self.num_features / CHUNK;
        let (blocks, _) = blocks[row * num_blocks * 16..][..num_blocks * 16].as_chunks();
        Mxfp4Row { blocks, scales: &scales[row * num_blocks..][..num_blocks] }
    }

    fn fp8<'w>(&self, values: &'w [u8], scales: &'w [f32], row: usize) -> Fp8Row<'w> {
        let num_blocks = self.num_features.div_ceil(FP8_BLOCK);
        Fp8Row { values: self.values(values, row), scales: &scales[row * num_blocks..][..num_blocks] }
    }
}

/// A row with a value to an element: whole chunks, and what is left, filled up with zeros.
struct DenseRow<'a, W> {
    chunks: &'a [[W; CHUNK]],
    tail: [W; CHUNK],
}

impl<W> DenseRow<'_, W> {
    /// Chunk `c`; a reference, so that registers are filled from the weights themselves.
    #[inline(always)]
    fn chunk(&self, c: usize) -> &[W; CHUNK] {
        self.chunks.get(c).unwrap_or(&self.tail)
    }
}

/// A row of MXFP4 blocks and their scales.
struct Mxfp4Row<'a> {
    blocks: &'a [[u8; 16]],
    scales: &'a [u8],
}

/// A row of E4M3 values and the scales of their blocks.
struct Fp8Row<'a> {
    values: DenseRow<'a, u8>,
    scales: &'a [f32],
}

impl Fp8Row<'_> {
    /// The scale of chunk `c`.
    #[inline(always)]
    fn scale(&self, c: usize) -> f32 {
        self.scales[c / (FP8_BLOCK / CHUNK)]
    }
}

/// `out[row * num_tokens + token]` = the dot product of each weight row with each token.
///
/// `out` says how many rows there are.
pub(super) fn dot_rows(weights: WeightRows<'_>, tokens: &PackedTokens, out: &mut [f32]) {
    let rows = Rows { weights, num_features: tokens.num_features };
    with_body!(|body| walk(body, &rows, tokens, out))
}

/// Computes `out` tile by tile.
fn walk<B: Body>(body: B, rows: &Rows<'_>, tokens: &PackedTokens, out: &mut [f32]) {
    if tokens.num_tokens == 0 {
        return;
    }
    let num_chunks = tokens.num_features.div_ceil(CHUNK);
    let num_rows = out.len() / tokens.num_tokens;
    for tile in tiles(tokens.num_tokens, B::TOKENS) {
        let chunks = &tokens.chunks[tile.start * num_chunks..tile.end * num_chunks];
        for row in (0..num_rows).step_by(B::ROWS) {
            let mut store = |row: usize, products: &[f32]| {
                out[row * tokens.num_tokens + tile.start..][..products.len()].copy_from_slice(products);
            };
            macro_rules! tile {
                ($rows:literal, $width:literal) => {{
                    let products = body.tile::<$rows, $width>(rows, row, chunks);
                    (row..).zip(&products).for_each(|(row, products)| store(row, products));
                }};
            }
            match (B::ROWS.min(num_rows - row), tile.len()) {
                (1, 1) => tile!(1, 1),
                (1, 2) => tile!(1, 2),
                (1, _) => tile!(1, 4),
                (_, 1) => tile!(2, 1),
                (_, 2) => tile!(2, 2),
                (_, _) => tile!(2, 4),
            }
        }
    }
}

#[cfg(test)]
mod tests;
