//! Plain loops over arrays, in a shape that compilers vectorise.

use super::{Body, CHUNK, Chunk, FP8_VALUES, MXFP4_SCALES, MXFP4_TABLE, Rows, WeightRows, element};
use half::slice::HalfFloatSliceExt;

#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Body for Portable {
    const ROWS: usize = 1;
    const TOKENS: usize = 4;

    fn tile<const R: usize, const N: usize>(self, rows: &Rows<'_>, row: usize, chunks: &[Chunk]) -> [[f32; N]; R] {
        std::array::from_fn(|r| match rows.weights {
            WeightRows::F32(w) => {
                let row = rows.values(w, row + r);
                row_product(chunks, |c| even_odd(row.chunk(c)))
            }
            WeightRows::Bf16(w) => {
                let row = rows.values(w, row + r);
                row_product(chunks, |c| even_odd(row.chunk(c)).map(|v| v.to_f32()))
            }
            WeightRows::F16(w) => {
                let row = rows.values(w, row + r);
                row_product(chunks, |c| {
                    let mut chunk = [0.0; CHUNK];
                    row.chunk(c).convert_to_f32_slice(&mut chunk);
                    even_odd(&chunk)
                })
            }
            WeightRows::Mxfp4 { blocks, scales } => {
                let row = rows.blocks(blocks, scales, row + r);
                row_product(chunks, |c| {
                    let scale = MXFP4_SCALES[usize::from(row.scales[c])];
                    let block = &row.blocks[c];
                    std::array::from_fn(|lane| {
                        let nibble = block[lane % 16] >> (lane / 16 * 4) & 15;
                        MXFP4_TABLE[usize::from(nibble)] * scale
                    })
                })
            }
            WeightRows::Fp8 { values, scales } => {
                let row = rows.fp8(values, scales, row + r);
                row_product(chunks, |c| {
                    let scale = row.scale(c);
                    even_odd(row.values.chunk(c)).map(|value| FP8_VALUES[usize::from(value)] * scale)
                })
            }
        })
    }
}

fn even_odd<W: Copy>(chunk: &[W; CHUNK]) -> [W; CHUNK] {
    std::array::from_fn(|lane| chunk[element(lane)])
}

fn row_product<const N: usize>(chunks: &[Chunk], weights: impl Fn(usize) -> Chunk) -> [f32; N] {
    let mut sums = [[0f32; CHUNK]; N];
    for (c, tokens) in chunks.chunks_exact(N).enumerate() {
        let weights = weights(c);
        for (sums, token) in sums.iter_mut().zip(tokens) {
            for lane in 0..CHUNK {
                sums[lane] += weights[lane] * token[lane];
            }
        }
    }
    sums.map(|mut lanes| {
        let mut width = CHUNK / 2;
        while width > 0 {
            (0..width).for_each(|lane| lanes[lane] += lanes[lane + width]);
            width /= 2;
        }
        lanes[0]
    })
}
