//! Experts against a float64 oracle that rounds where the contract says: the activation once, to the dtype of the hidden states.
//!
//! The bound of every comparison is worked out with the value ([`oracle::Bounded`]): float32 accumulation of `n` products may
//! be off by `(n + 2) * 2^-24` of the sum of magnitudes. Where that cannot reach over a rounding boundary, the rounded
//! activation must be the very same number, so a missing or an extra rounding shows.

use crate::devices;
use crate::oracle::{self, Bounded, FLOATS, Matrix, Random};
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_moe::experts::{
    Activation, ExpertProjection, ExpertWeights, Experts, FP8_BLOCK, GateUpRows, Linear, fp8_row_scales, weighted_sum,
};
use candle_moe::order::{ExpertOrder, NO_EXPERT, NO_SLOT};
use proptest::prelude::*;
use std::ops::RangeInclusive;

#[derive(Clone, Debug)]
enum Format {
    Dense(DType),
    /// With scale bytes from this band.
    Mxfp4(RangeInclusive<u8>),
    Fp8,
}

/// Weights of `num_experts` matrices, and what they mean.
fn weights(
    random: &mut Random,
    format: &Format,
    (num_experts, out_features, in_features): (usize, usize, usize),
) -> (ExpertWeights, Vec<Vec<Vec<f64>>>) {
    let len = num_experts * out_features * in_features;
    let (weights, flat): (_, Vec<f64>) = match format {
        Format::Dense(dtype) => {
            let values = random.units(len, 0.5);
            let (tensor, held) = oracle::floats(&values, &[num_experts, out_features, in_features], *dtype);
            (ExpertWeights::dense(tensor), held.into_iter().map(f64::from).collect())
        }
        Format::Mxfp4(band) => {
            let blocks: Vec<u8> = (0..len / 2).map(|_| random.next() as u8).collect();
            let width = usize::from(band.end() - band.start()) + 1;
            let scales: Vec<u8> = (0..len / 32).map(|_| band.start() + random.below(width) as u8).collect();
            let values = decode(&blocks, &scales);
            let shape = (num_experts, out_features, in_features / 32);
            let scales = Tensor::from_vec(scales, shape, &Device::Cpu).unwrap();
            let blocks = Tensor::from_vec(blocks, (shape.0, shape.1, shape.2, 16), &Device::Cpu).unwrap();
            (ExpertWeights::mxfp4(blocks, scales), values)
        }
        Format::Fp8 => {
            let bits: Vec<u8> = (0..len).map(|_| fp8_finite(random)).collect();
            let scales = random.units(num_experts * out_features * in_features.div_ceil(FP8_BLOCK), 0.01);
            let values = decode_fp8(&bits, &scales, in_features);
            let shape = [num_experts, out_features, in_features];
            (ExpertWeights::fp8(fp8_values(&bits, &shape), fp8_scales(scales, &shape)), values)
        }
    };
    let matrix = |e: usize| {
        let row = |o: usize| flat[(e * out_features + o) * in_features..][..in_features].to_vec();
        (0..out_features).map(row).collect()
    };
    (weights.unwrap(), (0..num_experts).map(matrix).collect())
}

/// As published: low nibble first, 32 values to a scale byte.
fn decode(blocks: &[u8], scales: &[u8]) -> Vec<f64> {
    let nibbles = blocks.iter().flat_map(|byte| [byte & 15, byte >> 4]);
    let value = |(i, nibble): (usize, u8)| {
        let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(nibble & 7)];
        let signed = if nibble & 8 == 0 { magnitude } else { -magnitude };
        signed * 2f64.powi(i32::from(scales[i / 32]) - 127)
    };
    nibbles.enumerate().map(value).collect()
}

fn fp8_finite(random: &mut Random) -> u8 {
    random.below(127) as u8 | (random.below(2) as u8) << 7
}

fn fp8_values(bits: &[u8], shape: &[usize]) -> Tensor {
    Tensor::from_raw_buffer(bits, DType::F8E4M3, shape, &Device::Cpu).unwrap()
}

/// For values of `shape`.
fn fp8_scales(scales: Vec<f32>, shape: &[usize; 3]) -> Tensor {
    Tensor::from_vec(scales, (shape[0], shape[1], shape[2].div_ceil(FP8_BLOCK)), &Device::Cpu).unwrap()
}

/// E4M3 without infinities: 4 bits of exponent with a bias of 7, 3 of mantissa, subnormals.
fn e4m3(bits: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f64::from(bits & 7) / 8.0);
    let magnitude = if exponent == 0 { mantissa / 64.0 } else { (1.0 + mantissa) * 2f64.powi(exponent - 7) };
    if bits >> 7 == 0 { magnitude } else { -magnitude }
}

/// 128 columns to a scale, every product rounded to float32.
fn decode_fp8(bits: &[u8], scales: &[f32], in_features: usize) -> Vec<f64> {
    let num_blocks = in_features.div_ceil(FP8_BLOCK);
    let scale = |i: usize| f64::from(scales[i / in_features * num_blocks + i % in_features / FP8_BLOCK]);
    bits.iter().enumerate().map(|(i, &bits)| f64::from((e4m3(bits) * scale(i)) as f32)).collect()
}

/// A projection and the matrices that it stands for.
fn projection(
    random: &mut Random,
    format: &Format,
    shape: (usize, usize, usize),
    bias: Option<DType>,
) -> (ExpertProjection, Vec<Matrix>) {
    let (weights, values) = weights(random, format, shape);
    let (tensor, held) = match bias {
        Some(dtype) => {
            let (tensor, held) = oracle::floats(&random.units(shape.0 * shape.1, 2.0), &[shape.0, shape.1], dtype);
            (Some(tensor), held)
        }
        None => (None, vec![0.0; shape.0 * shape.1]),
    };
    let bias = |e: usize| held[e * shape.1..][..shape.1].iter().map(|&b| b.into()).collect();
    let matrices = values.into_iter().enumerate().map(|(e, rows)| Matrix { rows, bias: bias(e) }).collect();
    (ExpertProjection::new(weights, tensor).unwrap(), matrices)
}

#[derive(Clone, Debug)]
struct Case {
    num_experts: usize,
    hidden_size: usize,
    intermediate_size: usize,
    gate_up: Format,
    down: Format,
    bias: Option<DType>,
    rows: GateUpRows,
    activation: Activation,
}

struct Model {
    experts: Experts,
    gate_up: Vec<Matrix>,
    down: Vec<Matrix>,
    case: Case,
}

impl Model {
    fn new(random: &mut Random, case: Case) -> Self {
        let (e, h, i) = (case.num_experts, case.hidden_size, case.intermediate_size);
        let (first, gate_up) = projection(random, &case.gate_up, (e, 2 * i, h), case.bias);
        let (second, down) = projection(random, &case.down, (e, h, i), case.bias);
        let experts = Experts::new(first, second, case.rows, case.activation).unwrap();
        assert_eq!((experts.num_experts(), experts.hidden_size(), experts.intermediate_size()), (e, h, i));
        Self { experts, gate_up, down, case }
    }

    /// Compares every row of the order, on every device; returns how far off the CPU's worst was, in parts of its bound.
    fn check(&self, hidden: &Tensor, order: &ExpertOrder) -> f64 {
        if let Some(device) = devices::cuda() {
            let (experts, there) = (self.experts.to_device(device).unwrap(), devices::order_to(device, order));
            let rows = devices::to_host(&experts.forward(&hidden.to_device(device).unwrap(), &there).unwrap());
            let num_slots = order.num_tokens() * order.top_k();
            assert_eq!(rows.dims(), [num_slots, self.case.hidden_size]);
            let offsets = order.expert_offsets.to_vec1::<u32>().unwrap();
            let num_rows = offsets[offsets.len() - 1] as usize;
            let rest = rows.narrow(0, num_rows, num_slots - num_rows).unwrap().flatten_all().unwrap();
            assert!(rest.to_vec1::<f32>().unwrap().iter().all(|&value| value == 0.0), "rows behind the last place");
            self.check_rows(&rows.narrow(0, 0, num_rows).unwrap(), hidden, order);
            check_weighted(&experts, &hidden.to_device(device).unwrap(), &there);
        }
        check_weighted(&self.experts, hidden, order);
        self.check_rows(&self.experts.forward(hidden, order).unwrap(), hidden, order)
    }

    fn check_rows(&self, rows: &Tensor, hidden: &Tensor, order: &ExpertOrder) -> f64 {
        assert_eq!(rows.dtype(), DType::F32);
        let tokens = oracle::rows_of(hidden);
        let offsets = order.expert_offsets.to_vec1::<u32>().unwrap();
        let slots = order.sorted_slots.to_vec1::<u32>().unwrap();
        let num_rows = offsets[offsets.len() - 1] as usize;
        assert_eq!(rows.dims(), [num_rows, self.case.hidden_size]);
        let rows = if num_rows > 0 { oracle::rows_of(rows) } else { Vec::new() };
        let mut worst = 0f64;
        for (place, row) in rows.iter().enumerate() {
            let expert = offsets[1..].iter().filter(|&&end| end as usize <= place).count();
            let token = slots[place] as usize / order.top_k();
            let expected = oracle::expert(
                &self.gate_up[expert],
                &self.down[expert],
                self.case.rows,
                self.case.activation,
                &tokens[token],
                hidden.dtype(),
            );
            for (j, (&found, Bounded { value, error })) in row.iter().zip(expected).enumerate() {
                if !value.is_finite() {
                    assert!(!found.is_finite(), "place {place} feature {j}: {found}, not {value}: {:?}", self.case);
                    continue;
                }
                let off = (f64::from(found) - value).abs();
                assert!(off <= error, "place {place} feature {j}: {found}, not {value} +- {error}: {:?}", self.case);
                worst = worst.max(off / error);
            }
        }
        worst
    }
}

/// In one go come the bits of the rows and of their sum one after the other, rounded once; only in large tiles on CUDA bfloat16
/// rows are rounded before they are added up. The same bits come again.
fn check_weighted(experts: &Experts, hidden: &Tensor, order: &ExpertOrder) {
    let (num_tokens, top_k, dtype) = (order.num_tokens(), order.top_k(), hidden.dtype());
    let weights = Random(num_tokens as u64).units(num_tokens * top_k, 1.0);
    let weights = Tensor::from_vec(weights, (num_tokens, top_k), hidden.device()).unwrap();
    let rows = experts.forward(hidden, order).unwrap();
    let values = |sums: &Tensor| -> Vec<f32> {
        devices::to_host(sums).to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let expected = weighted_sum(&rows, &weights, order).unwrap();
    let sizes = values(&weighted_sum(&rows.abs().unwrap(), &weights.abs().unwrap(), order).unwrap());
    let tile_rows = experts.tile_rows(num_tokens, top_k, dtype, hidden.device()).unwrap();
    let tiles = tile_rows.map(|tile_rows| order.tile_map(tile_rows).unwrap());
    let mut before = Vec::new();
    for (tiles, dtype) in [(tiles.as_ref(), DType::F32), (None, dtype), (tiles.as_ref(), dtype)] {
        let found = experts.forward_weighted(hidden, &weights, order, tiles, dtype).unwrap();
        assert_eq!((found.dtype(), found.dims()), (dtype, &[num_tokens, experts.hidden_size()][..]));
        let (found, expected) = (values(&found), values(&devices::to_host(&expected).to_dtype(dtype).unwrap()));
        let is_narrow = (hidden.dtype(), dtype) == (DType::BF16, DType::BF16);
        let rounds_rows = is_narrow && matches!(tile_rows, Some(96 | 160));
        for ((&found, &expected), size) in found.iter().zip(&expected).zip(&sizes) {
            // Half a last place of each row, 2^-8 of it at most, and a whole one of the sum, whose roundings may differ.
            let near = rounds_rows && (found - expected).abs() <= size / 256.0 + expected.abs() / 128.0;
            // A NaN is any.
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(same || near, "in one go, {dtype:?}: {found}, not {expected}");
        }
        let bits: Vec<u32> = found.iter().map(|value| value.to_bits()).collect();
        let filled = vec![7f32; num_tokens * experts.hidden_size()];
        let room = Tensor::from_vec(filled, (num_tokens, experts.hidden_size()), &Device::Cpu).unwrap();
        let room = room.to_dtype(dtype).unwrap().to_device(hidden.device()).unwrap();
        experts.forward_weighted_to(hidden, &weights, order, tiles, &room).unwrap();
        let there: Vec<u32> = values(&room).iter().map(|value| value.to_bits()).collect();
        assert!(there == bits, "to memory that is there, {dtype:?}: other bits");
        assert!(before.is_empty() || before == bits, "in one go, {dtype:?}: other bits than before");
        if dtype != DType::F32 {
            before = bits;
        }
    }
}

/// What a layer makes of `hidden` on every device, brought to the host.
fn linear_everywhere(linear: &Linear, hidden: &Tensor) -> Vec<Tensor> {
    let there = devices::cuda().map(|device| {
        let (linear, hidden) = (linear.to_device(device).unwrap(), hidden.to_device(device).unwrap());
        devices::to_host(&linear.forward(&hidden).unwrap())
    });
    std::iter::once(linear.forward(hidden).unwrap()).chain(there).collect()
}

fn order_of(ids: Vec<u32>, top_k: usize, num_experts: usize) -> ExpertOrder {
    let ids = Tensor::from_vec(ids.clone(), (ids.len() / top_k, top_k), &Device::Cpu).unwrap();
    ExpertOrder::new(&ids, num_experts, 0..num_experts).unwrap()
}

fn hidden_states(random: &mut Random, num_tokens: usize, hidden_size: usize, scale: f32, dtype: DType) -> Tensor {
    oracle::floats(&random.units(num_tokens * hidden_size, scale), &[num_tokens, hidden_size], dtype).0
}

const REALISTIC: RangeInclusive<u8> = 116..=127;

fn case() -> impl Strategy<Value = Case> {
    let dtypes = || prop::sample::select(FLOATS.to_vec());
    let dense = move || dtypes().prop_map(Format::Dense);
    let format = move || prop_oneof![Just(Format::Mxfp4(REALISTIC)), dense(), Just(Format::Fp8)];
    let size = |format: &Format, most: usize| match format {
        Format::Mxfp4(_) => (1..=most.div_ceil(32)).prop_map(|n| 32 * n).boxed(),
        Format::Fp8 => (1..=3 * most).boxed(),
        Format::Dense(_) => (1..=most).boxed(),
    };
    let gated = prop::sample::select(vec![
        (GateUpRows::Interleaved, Activation::GPT_OSS),
        (GateUpRows::Concatenated, Activation::GPT_OSS),
        (GateUpRows::Interleaved, Activation::Silu),
        (GateUpRows::Concatenated, Activation::Silu),
        (GateUpRows::Interleaved, Activation::SwigluOss { alpha: -0.5, limit: 0.75 }),
    ]);
    let formats = (format(), format());
    (1usize..6, formats, prop::option::of(dtypes()), gated).prop_flat_map(
        move |(num_experts, (gate_up, down), bias, (rows, activation))| {
            (size(&gate_up, 70), size(&down, 45), Just(gate_up), Just(down)).prop_map(
                move |(hidden_size, intermediate_size, gate_up, down)| Case {
                    num_experts,
                    hidden_size,
                    intermediate_size,
                    gate_up,
                    down,
                    bias,
                    rows,
                    activation,
                },
            )
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(250) })]

    #[test]
    fn experts_of_every_format_equal_the_oracle(
        case in case(),
        num_tokens in 0usize..12,
        dtype in prop::sample::select(FLOATS.to_vec()),
        scale in prop::sample::select(vec![0.1f32, 1.0, 30.0]),
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let top_k = 1 + random.below(case.num_experts);
        let (num_experts, hidden_size) = (case.num_experts, case.hidden_size);
        let model = Model::new(&mut random, case);
        let ids = (0..num_tokens).flat_map(|_| random.distinct(num_experts, top_k)).collect::<Vec<_>>();
        let ids: Vec<u32> = ids.into_iter().map(|id| if random.below(8) == 0 { NO_EXPERT } else { id }).collect();
        let order = order_of(ids, top_k, num_experts);
        model.check(&hidden_states(&mut random, num_tokens, hidden_size, scale, dtype), &order);
    }
}

fn gpt_oss(num_experts: usize, hidden_size: usize, intermediate_size: usize) -> Case {
    Case {
        num_experts,
        hidden_size,
        intermediate_size,
        gate_up: Format::Mxfp4(REALISTIC),
        down: Format::Mxfp4(REALISTIC),
        bias: Some(DType::BF16),
        rows: GateUpRows::Interleaved,
        activation: Activation::GPT_OSS,
    }
}

#[test]
fn groups_of_more_than_256_rows_and_waves_of_more_than_1024_are_whole() {
    let mut random = Random(21);
    let dense = Format::Dense(DType::F32);
    for case in [gpt_oss(7, 32, 32), Case { gate_up: dense.clone(), down: dense, ..gpt_oss(7, 33, 5) }] {
        let model = Model::new(&mut random, case);
        // Expert 0 has none, 1 has one, 2 just a group, 3 one more than a group, 4 none, 5 more than a wave, 6 few.
        for counts in
            [[0, 1, 256, 257, 0, 1100, 3], [0, 0, 0, 2000, 0, 0, 0], [255, 1, 256, 512, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0]]
        {
            let mut ids: Vec<u32> = (0..7u32).flat_map(|e| std::iter::repeat_n(e, counts[e as usize])).collect();
            for i in (1..ids.len()).rev() {
                ids.swap(i, random.below(i + 1));
            }
            let hidden = hidden_states(&mut random, ids.len(), model.case.hidden_size, 1.0, DType::BF16);
            model.check(&hidden, &order_of(ids, 1, 7));
        }
    }
}

/// Places of three experts: up to 6 slots for each expert, up to 80, and more.
const COUNTS: [[usize; 3]; 10] = [
    [1, 0, 0],
    [0, 8, 9],
    [0, 0, 18],
    [96, 1, 33],
    [32, 97, 64],
    [160, 1, 81],
    [0, 321, 16],
    [48, 64, 145],
    [80, 30, 144],
    [112, 17, 128],
];

/// Sizes that tensor cores take, in every format, with as many tokens as each of their kernels is for.
#[test]
fn tensor_cores_take_any_number_of_tokens() {
    let mut random = Random(54);
    let (oss, silu) = ((GateUpRows::Interleaved, Activation::GPT_OSS), (GateUpRows::Concatenated, Activation::Silu));
    let small = &[(64, 128, oss), (192, 64, silu)][..];
    // Rows of more than one item and of no whole number of items, and five chunks of columns.
    let large = &[(320, 256, oss)][..];
    let mxfp4 = Format::Mxfp4;
    for (format, dtypes, shapes) in [
        (mxfp4(REALISTIC), &[DType::BF16, DType::F16, DType::F32][..], small),
        (mxfp4(REALISTIC), &[DType::BF16], large),
        // The least scales, and such as bfloat16 weights cannot be multiplied by.
        (mxfp4(0..=1), &[DType::BF16], small),
        (mxfp4(124..=131), &[DType::BF16], small),
        (Format::Dense(DType::BF16), &[DType::BF16, DType::F16], small),
        (Format::Dense(DType::F16), &[DType::F16], small),
    ] {
        for &(hidden_size, intermediate_size, (rows, activation)) in shapes {
            let (gate_up, down) = (format.clone(), format.clone());
            let case = Case { gate_up, down, rows, activation, ..gpt_oss(3, hidden_size, intermediate_size) };
            let model = Model::new(&mut random, case);
            for &dtype in dtypes {
                // Each kernel at the edges of its tiles, and every width of the large ones.
                for counts in COUNTS {
                    let mut ids: Vec<u32> =
                        (0..3u32).flat_map(|e| std::iter::repeat_n(e, counts[e as usize])).collect();
                    for i in (1..ids.len()).rev() {
                        ids.swap(i, random.below(i + 1));
                    }
                    let hidden = hidden_states(&mut random, ids.len(), hidden_size, 1.0, dtype);
                    model.check(&hidden, &order_of(ids, 1, 3));
                }
            }
        }
    }
}

/// Slots so few that on CUDA each is worked on by itself, in MXFP4: chunks of all lengths.
#[test]
fn a_token_by_itself_equals_the_oracle() {
    let mut random = Random(57);
    let silu = Case { rows: GateUpRows::Concatenated, activation: Activation::Silu, bias: None, ..gpt_oss(5, 64, 320) };
    // The last one goes round every ring, and has more chunks than are added up at once.
    for case in [gpt_oss(5, 128, 64), gpt_oss(5, 64, 192), silu, gpt_oss(5, 1088, 1600)] {
        let model = Model::new(&mut random, case);
        let token = hidden_states(&mut random, 1, model.case.hidden_size, 1.0, DType::BF16);
        for ids in [vec![4, 0, 3, 1], vec![2, NO_EXPERT, 2, 2, 0, NO_EXPERT], vec![NO_EXPERT; 4]] {
            let top_k = ids.len();
            model.check(&token, &order_of(ids, top_k, 5));
        }
        let ids = Tensor::from_vec(random.distinct(15, 6), (1, 6), &Device::Cpu).unwrap();
        for first in [0, 3, 10] {
            model.check(&token, &ExpertOrder::new(&ids, 15, first..first + 5).unwrap());
        }
    }
}

/// Every scale, and tokens of all sizes.
#[test]
fn a_token_by_itself_may_be_any() {
    let mut random = Random(58);
    let oss = gpt_oss(5, 128, 64);
    let wide = || Format::Mxfp4(0..=207);
    for (case, most) in [
        (Case { rows: GateUpRows::Concatenated, ..gpt_oss(5, 320, 256) }, 1e30),
        (Case { activation: Activation::Silu, ..gpt_oss(5, 64, 128) }, 1e9),
        (Case { gate_up: wide(), down: Format::Mxfp4(0..=1), ..oss.clone() }, 1e9),
        (Case { gate_up: Format::Mxfp4(124..=131), down: wide(), ..oss }, 1e30),
    ] {
        let model = Model::new(&mut random, case);
        let hidden_size = model.case.hidden_size;
        for (ids, top_k) in
            [(vec![3; 16], 1), ((0..4).flat_map(|_| random.distinct(5, 4)).collect(), 4), (random.distinct(5, 5), 5)]
        {
            for scale in [1.0, 1e-30, 30.0, 1e6] {
                let hidden = hidden_states(&mut random, ids.len() / top_k, hidden_size, scale, DType::BF16);
                model.check(&hidden, &order_of(ids.clone(), top_k, 5));
            }
        }
        // A feature that dwarfs the others, none at all, and some that are no number.
        for (value, others) in [(most, 1.0), (0.0, 0.0), (f32::NAN, 1.0), (f32::INFINITY, 1.0), (-1e-38, 0.0)] {
            let mut token = random.units(hidden_size, others);
            token[random.below(hidden_size)] = value;
            let hidden = oracle::floats(&token, &[1, hidden_size], DType::BF16).0;
            model.check(&hidden, &order_of(random.distinct(5, 4), 4, 5));
        }
    }
}

/// A layer as Hugging Face transformers computes it in bfloat16, or with `round` the identity the exact one: every operation
/// rounds, but the products of a matrix are added up exactly.
fn bfloat16_layer(model: &Model, x: &[f32], ids: &[u32], weights: &[f32], round: impl Fn(f64) -> f64) -> Vec<f64> {
    let Activation::SwigluOss { alpha, limit } = model.case.activation else { panic!("the activation of GPT-OSS") };
    let multiply = |matrix: &Matrix, x: &[f64]| -> Vec<f64> {
        let dot = |row: &Vec<f64>| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        matrix.rows.iter().zip(&matrix.bias).map(|(row, bias)| round(dot(row) + bias)).collect()
    };
    let mut sums = vec![0.0; model.case.hidden_size];
    let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    for (&id, &weight) in ids.iter().zip(weights) {
        let both = multiply(&model.gate_up[id as usize], &x);
        let activate = |pair: &[f64]| {
            let (gate, up) = (pair[0].min(limit.into()), pair[1].clamp(-f64::from(limit), limit.into()));
            let glu = round(gate * round(oracle::sigmoid(round(gate * f64::from(alpha)))));
            round(round(up + 1.0) * glu)
        };
        let h: Vec<f64> = both.chunks(2).map(activate).collect();
        for (sum, y) in sums.iter_mut().zip(multiply(&model.down[id as usize], &h)) {
            *sum = round(*sum + round(y * f64::from(weight)));
        }
    }
    sums
}

/// Over random inputs, such as reach the clamps, and weights that are all 0, for tokens that every kernel is for.
#[test]
fn errors_are_no_larger_than_those_of_the_bfloat16_reference() {
    let mut random = Random(57);
    let (num_experts, top_k, hidden_size) = (3, 2, 192);
    let to_bf16 = |value: f64| oracle::round(value, DType::BF16);
    for (band, scale) in [(REALISTIC, 1.0), (118..=124, 16.0), (0..=0, 1.0), (110..=128, 0.25)] {
        let format = Format::Mxfp4(band);
        let case = Case { gate_up: format.clone(), down: format, ..gpt_oss(num_experts, hidden_size, 128) };
        let model = Model::new(&mut random, case);
        for num_tokens in [1, 9, 60, 150] {
            let hidden = hidden_states(&mut random, num_tokens, hidden_size, scale, DType::BF16);
            let ids: Vec<u32> = (0..num_tokens).flat_map(|_| random.distinct(num_experts, top_k)).collect();
            let weights: Vec<f32> = random.units(num_tokens * top_k, 0.5).iter().map(|w| w + 0.5).collect();
            let order = order_of(ids.clone(), top_k, num_experts);
            let topk_weights = Tensor::from_vec(weights.clone(), (num_tokens, top_k), &Device::Cpu).unwrap();
            let layer = |round: &dyn Fn(f64) -> f64| -> Vec<f64> {
                let tokens = oracle::rows_of(&hidden).into_iter().zip(ids.chunks(top_k)).zip(weights.chunks(top_k));
                tokens.flat_map(|((x, ids), weights)| bfloat16_layer(&model, &x, ids, weights, round)).collect()
            };
            let exact = layer(&|value| value);
            let error = |values: &[f64]| values.iter().zip(&exact).map(|(v, e)| (v - e).powi(2)).sum::<f64>().sqrt();
            let of_reference = error(&layer(&to_bf16));
            for device in devices::all() {
                let there = |tensor: &Tensor| tensor.to_device(&device).unwrap();
                let experts = model.experts.to_device(&device).unwrap();
                let order = devices::order_to(&device, &order);
                let sums = experts.forward_weighted(&there(&hidden), &there(&topk_weights), &order, None, DType::BF16);
                let sums = devices::to_host(&sums.unwrap()).to_dtype(DType::F32).unwrap();
                let sums: Vec<f64> = oracle::rows_of(&sums).into_iter().flatten().map(f64::from).collect();
                let of_sums = error(&sums);
                assert!(
                    of_sums <= of_reference,
                    "{device:?}, {num_tokens} tokens: {of_sums}, reference {of_reference}"
                );
            }
        }
    }
}

/// Tiles that are not those of the order are made anew, and rows may begin anywhere.
#[test]
fn tiles_of_another_order_and_rows_at_any_address_do_no_harm() {
    let mut random = Random(58);
    let model = Model::new(&mut random, gpt_oss(3, 64, 64));
    let hidden = hidden_states(&mut random, 30, 64, 1.0, DType::BF16);
    let orders = [order_of(vec![0; 30], 1, 3), order_of((0..30).map(|i| i % 3).collect(), 1, 3)];
    let weights = Tensor::ones((30, 1), DType::F32, &Device::Cpu).unwrap();
    for device in devices::all() {
        let (experts, hidden) = (model.experts.to_device(&device).unwrap(), hidden.to_device(&device).unwrap());
        let weights = weights.to_device(&device).unwrap();
        let orders = orders.each_ref().map(|order| devices::order_to(&device, order));
        let tile_rows = experts.tile_rows(30, 1, DType::BF16, &device).unwrap().unwrap_or(16);
        let [own, others] = orders.each_ref().map(|order| order.tile_map(tile_rows).unwrap());
        assert!(own.is_of(&orders[0].clone()) && !others.is_of(&orders[0]));
        let sums = |tiles| {
            let sums = experts.forward_weighted(&hidden, &weights, &orders[0], Some(tiles), DType::F32).unwrap();
            devices::to_host(&sums).to_vec2::<f32>().unwrap()
        };
        assert_eq!(sums(&own), sums(&others), "{device:?}");

        let rows = experts.forward(&hidden, &orders[0]).unwrap();
        let flat = Tensor::cat(&[&Tensor::zeros(1, DType::F32, &device).unwrap(), &rows.flatten_all().unwrap()], 0);
        let shifted = flat.unwrap().narrow(0, 1, 30 * 64).unwrap().reshape((30, 64)).unwrap();
        let sum = |rows: &Tensor| devices::to_host(&weighted_sum(rows, &weights, &orders[0]).unwrap());
        assert_eq!(sum(&shifted).to_vec2::<f32>().unwrap(), sum(&rows).to_vec2::<f32>().unwrap(), "{device:?}");
    }
}

/// What the benchmark's numbers are about: few tokens wait for the weights, many go in tiles.
#[test]
fn the_kernels_follow_the_number_of_tokens() {
    let Some(device) = devices::cuda() else { return };
    let model = Model::new(&mut Random(55), gpt_oss(4, 64, 64));
    let experts = model.experts.to_device(device).unwrap();
    let tile_rows = |num_tokens, dtype| experts.tile_rows(num_tokens, 4, dtype, device).unwrap();
    assert_eq!([1, 6].map(|num_tokens| tile_rows(num_tokens, DType::BF16)), [Some(8); 2]);
    assert_eq!([7, 9].map(|num_tokens| tile_rows(num_tokens, DType::BF16)), [Some(16); 2]);
    let many = [10, 80, 81, 8192].map(|num_tokens| tile_rows(num_tokens, DType::BF16));
    // Of compute capability 9.0, and others.
    assert!(many == [96, 96, 160, 160].map(Some) || many == [Some(16); 4], "{many:?}");
    // Float32 goes through the general kernels.
    assert_eq!([1, 7].map(|num_tokens| tile_rows(num_tokens, DType::F32)), [Some(16); 2]);
    assert_eq!(model.experts.tile_rows(1, 4, DType::BF16, &Device::Cpu).unwrap(), None);
}

#[test]
fn all_tokens_to_one_expert_of_many() {
    let mut random = Random(22);
    let model = Model::new(&mut random, gpt_oss(8, 64, 96));
    let hidden = hidden_states(&mut random, 40, 64, 1.0, DType::BF16);
    for expert in [0, 5, 7] {
        model.check(&hidden, &order_of(vec![expert; 40], 1, 8));
    }
}

#[test]
fn only_the_local_experts_work_and_they_are_counted_from_the_start_of_the_range() {
    let mut random = Random(23);
    let model = Model::new(&mut random, gpt_oss(3, 32, 64));
    let hidden = hidden_states(&mut random, 30, 32, 1.0, DType::F16);
    let ids: Vec<u32> = (0..30).flat_map(|_| random.distinct(9, 4)).collect();
    let ids = Tensor::from_vec(ids, (30, 4), &Device::Cpu).unwrap();
    for start in [0, 4, 6] {
        model.check(&hidden, &ExpertOrder::new(&ids, 9, start..start + 3).unwrap());
    }
}

#[test]
fn hidden_states_may_be_a_view() {
    let mut random = Random(24);
    let model = Model::new(&mut random, gpt_oss(4, 32, 32));
    let wide = hidden_states(&mut random, 40, 20, 1.0, DType::BF16);
    let view = wide.t().unwrap().narrow(1, 5, 32).unwrap().narrow(0, 2, 11).unwrap();
    assert!(!view.is_contiguous());
    model.check(&view, &order_of((0..11).flat_map(|_| random.distinct(4, 2)).collect(), 2, 4));
}

#[test]
fn weights_may_be_views() {
    let mut random = Random(25);
    let case =
        Case { gate_up: Format::Dense(DType::F32), down: Format::Dense(DType::F32), bias: None, ..gpt_oss(2, 5, 3) };
    let values = random.units(4 * 9 * 9, 1.0);
    let base = Tensor::from_vec(values, (4, 9, 9), &Device::Cpu).unwrap();
    // As third-party copies hold them: [E, in, out].
    let gate_up = base.i((1..3, 2..7, 1..7)).unwrap().transpose(1, 2).unwrap();
    let down = base.i((2..4, 3..6, 4..9)).unwrap().transpose(1, 2).unwrap();
    let matrices = |t: &Tensor| -> Vec<Matrix> {
        let wide = |row: Vec<f32>| row.into_iter().map(f64::from).collect::<Vec<_>>();
        let matrix =
            |rows: Vec<Vec<f32>>| Matrix { bias: vec![0.0; rows.len()], rows: rows.into_iter().map(wide).collect() };
        t.to_vec3::<f32>().unwrap().into_iter().map(matrix).collect()
    };
    let (first, second) = (matrices(&gate_up), matrices(&down));
    let projection = |t| ExpertProjection::new(ExpertWeights::dense(t).unwrap(), None).unwrap();
    let experts = Experts::new(projection(gate_up), projection(down), case.rows, case.activation).unwrap();
    let model = Model { experts, gate_up: first, down: second, case };
    model.check(&hidden_states(&mut random, 6, 5, 1.0, DType::F32), &order_of(vec![0, 1, 1, 0, 1, 0], 1, 2));
}

// ---------------------------------------------------------------------------------------------
// MXFP4

#[test]
fn every_nibble_at_every_place_and_every_scale_decodes_exactly() {
    // One row per scale byte; a hidden state that is 1 at one place picks one value, so nothing rounds.
    let mut random = Random(31);
    let blocks: Vec<u8> = (0..255 * 16).map(|_| random.next() as u8).collect();
    let scales: Vec<u8> = (0..255).collect();
    let exact = decode(&blocks, &scales);
    let tensor = |values: Vec<u8>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let weights = ExpertWeights::mxfp4(tensor(blocks, &[1, 255, 1, 16]), tensor(scales, &[1, 255, 1])).unwrap();
    assert_eq!((weights.num_experts(), weights.out_features(), weights.in_features()), (1, 255, 32));
    assert_eq!(weights.bytes_per_expert(), 255 * 17);
    let projection = ExpertProjection::new(weights, None).unwrap();
    let one_hot = Tensor::eye(32, DType::F32, &Device::Cpu).unwrap();
    let found = linear_everywhere(&Linear::from_projection(projection).unwrap(), &one_hot);
    for (i, row) in found.iter().flat_map(|found| oracle::rows_of(found).into_iter().enumerate()) {
        for (scale, &found) in row.iter().enumerate() {
            let expected = exact[scale * 32 + i];
            // 2^128 and more is beyond float32; infinity times the zeros beside it is NaN.
            if scale < 253 {
                assert_eq!(f64::from(found), expected, "place {i} scale {scale}");
            } else if f64::from(expected as f32).is_finite() {
                assert!(found.is_nan() || f64::from(found) == expected, "place {i} scale {scale}");
            }
        }
    }
}

#[test]
fn mxfp4_scales_of_all_magnitudes_stay_within_the_bound() {
    // 2^-127 to 2^80: block sums of utterly different sizes, clamps everywhere.
    let mut random = Random(32);
    let case = Case { gate_up: Format::Mxfp4(0..=207), ..gpt_oss(4, 96, 64) };
    let model = Model::new(&mut random, case);
    for dtype in FLOATS {
        let hidden = hidden_states(&mut random, 25, 96, 1.0, dtype);
        model.check(&hidden, &order_of((0..25).flat_map(|_| random.distinct(4, 2)).collect(), 2, 4));
    }
}

#[test]
fn the_scale_byte_255_is_refused_with_its_place() {
    let blocks = Tensor::zeros((3, 4, 2, 16), DType::U8, &Device::Cpu).unwrap();
    for place in [0, 1, 7, 8, 23] {
        let mut scales = vec![254u8; 24];
        scales[place] = 255;
        let scales = Tensor::from_vec(scales, (3, 4, 2), &Device::Cpu).unwrap();
        let error = ExpertWeights::mxfp4(blocks.clone(), scales).unwrap_err().to_string();
        let (expert, row, block) = (place / 8, place / 2 % 4, place % 2);
        for word in [&format!("expert {expert}, row {row}, block {block}"), "255", "at most 254"] {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
}

/// MXFP4 weights, and the very same numbers in `dtype`.
fn twins(random: &mut Random, (e, o, i): (usize, usize, usize), dtype: DType) -> [ExpertProjection; 2] {
    let (mxfp4, values) = weights(random, &Format::Mxfp4(REALISTIC), (e, o, i));
    let exact: Vec<f64> = values.into_iter().flatten().flatten().collect();
    let (tensor, held) = oracle::floats(&exact.iter().map(|&v| v as f32).collect::<Vec<_>>(), &[e, o, i], dtype);
    assert!(held.iter().zip(&exact).all(|(&held, &exact)| f64::from(held) == exact));
    let bias = Tensor::from_vec(random.units(e * o, 2.0), (e, o), &Device::Cpu).unwrap();
    [mxfp4, ExpertWeights::dense(tensor).unwrap()].map(|w| ExpertProjection::new(w, Some(bias.clone())).unwrap())
}

#[test]
fn mxfp4_weights_and_a_dense_copy_give_the_same_bits() {
    let mut random = Random(34);
    for copy in FLOATS {
        for (hidden_size, intermediate_size) in [(32, 32), (96, 64), (160, 224)] {
            let [gate_up, gate_up_copy] = twins(&mut random, (3, 2 * intermediate_size, hidden_size), copy);
            let [down, down_copy] = twins(&mut random, (3, hidden_size, intermediate_size), copy);
            let experts = |first, second| Experts::new(first, second, GateUpRows::Interleaved, Activation::GPT_OSS);
            let [packed, dense] = [experts(gate_up, down), experts(gate_up_copy, down_copy)].map(Result::unwrap);
            for (num_tokens, dtype) in (1..=70).zip([DType::F32, DType::BF16].into_iter().cycle()) {
                let hidden = hidden_states(&mut random, num_tokens, hidden_size, 1.0, dtype);
                let order = order_of((0..num_tokens).flat_map(|_| random.distinct(3, 2)).collect(), 2, 3);
                let bits = |experts: &Experts| oracle::bits_of(&experts.forward(&hidden, &order).unwrap());
                assert_eq!(bits(&packed), bits(&dense), "{num_tokens} tokens in {dtype:?}, weights in {copy:?}");
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// FP8

#[test]
fn every_fp8_value_at_every_place_decodes_exactly() {
    // 254 rows that start with another value each, 299 columns; a hidden state that is 1 at one place picks one value.
    let finite: Vec<u8> = (0..=255u8).filter(|bits| bits & 0x7f != 0x7f).collect();
    assert_eq!(finite.len(), 254);
    let bits: Vec<u8> = (0..254).flat_map(|row| (0..299).map(move |i| (row + i) % 254)).map(|i| finite[i]).collect();
    let mut random = Random(35);
    let mut scales = random.units(254 * 3, 1.0);
    for (scale, extreme) in
        scales.iter_mut().zip([2f32.powi(119), -2f32.powi(119), 1e-45, f32::MIN_POSITIVE, 0.0, -1.0])
    {
        *scale = extreme;
    }
    let exact = decode_fp8(&bits, &scales, 299);
    let shape = [1, 254, 299];
    let weights = ExpertWeights::fp8(fp8_values(&bits, &shape), fp8_scales(scales, &shape)).unwrap();
    assert_eq!((weights.num_experts(), weights.out_features(), weights.in_features()), (1, 254, 299));
    assert_eq!(weights.bytes_per_expert(), 254 * 299 + 4 * 254 * 3);
    let linear = Linear::from_projection(ExpertProjection::new(weights, None).unwrap()).unwrap();
    let products = oracle::rows_of(&linear.forward(&Tensor::eye(299, DType::F32, &Device::Cpu).unwrap()).unwrap());
    for (i, row) in products.iter().enumerate() {
        for (o, &found) in row.iter().enumerate() {
            assert_eq!(f64::from(found), exact[o * 299 + i], "row {o}, column {i}");
        }
    }
}

#[test]
fn fp8_weights_and_a_dense_copy_give_the_same_bits() {
    let mut random = Random(36);
    let shape = (1, 37, 301);
    let (fp8, values) = weights(&mut random, &Format::Fp8, shape);
    let values: Vec<f32> = values.into_iter().flatten().flatten().map(|v| v as f32).collect();
    let copy = ExpertWeights::dense(Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    let [fp8, copy] = [fp8, copy.unwrap()]
        .map(|weights| Linear::from_projection(ExpertProjection::new(weights, None).unwrap()).unwrap());
    for (num_tokens, dtype) in (1..=70).zip(FLOATS.into_iter().cycle()) {
        let hidden = hidden_states(&mut random, num_tokens, 301, 1.0, dtype);
        let bits = |linear: &Linear| oracle::bits_of(&linear.forward(&hidden).unwrap());
        assert_eq!(bits(&fp8), bits(&copy), "{num_tokens} tokens in {dtype:?}");
    }
}

#[test]
fn fp8_weights_and_scales_may_be_views() {
    let mut random = Random(37);
    // Rows 2 and 3 of 5, in memory that has the columns first.
    let bits: Vec<u8> = (0..200 * 5).map(|_| fp8_finite(&mut random)).collect();
    let cut = |t: Tensor| t.transpose(1, 2).unwrap().narrow(1, 2, 2).unwrap();
    let values = cut(fp8_values(&bits, &[1, 200, 5]));
    let scales = cut(Tensor::from_vec(random.units(2 * 5, 1.0), (1, 2, 5), &Device::Cpu).unwrap());
    let rows = [2, 3].map(|row| (0..200).map(|i| bits[i * 5 + row]).collect::<Vec<_>>()).concat();
    let exact = decode_fp8(&rows, &scales.flatten_all().unwrap().to_vec1::<f32>().unwrap(), 200);
    let projection = ExpertProjection::new(ExpertWeights::fp8(values, scales).unwrap(), None).unwrap();
    let one_hot = Tensor::eye(200, DType::F32, &Device::Cpu).unwrap();
    let found = linear_everywhere(&Linear::from_projection(projection).unwrap(), &one_hot);
    for (i, row) in found.iter().flat_map(|found| oracle::rows_of(found).into_iter().enumerate()) {
        assert_eq!([f64::from(row[0]), f64::from(row[1])], [exact[i], exact[200 + i]], "column {i}");
    }
}

#[test]
fn published_fp8_scales_repeat_for_128_rows_each() {
    for (num_experts, out_features, num_blocks) in
        [(1, 1, 1), (2, 128, 3), (3, 129, 2), (2, 300, 1), (0, 5, 2), (2, 0, 2)]
    {
        let row_blocks = usize::div_ceil(out_features, 128);
        let numbers: Vec<f32> = (0..num_experts * row_blocks * num_blocks).map(|i| i as f32).collect();
        let published = Tensor::from_vec(numbers, (num_experts, row_blocks, num_blocks), &Device::Cpu).unwrap();
        let scales = fp8_row_scales(&published, out_features).unwrap();
        assert_eq!(scales.dims(), [num_experts, out_features, num_blocks]);
        if scales.elem_count() == 0 {
            continue;
        }
        let (published, scales) = (published.to_vec3::<f32>().unwrap(), scales.to_vec3::<f32>().unwrap());
        for (published, scales) in published.iter().zip(&scales) {
            scales.iter().enumerate().for_each(|(row, scales)| assert_eq!(scales, &published[row / 128], "row {row}"));
        }
    }
    // A view whose memory has another order.
    let view = Tensor::new(&[[[1f32, 2.], [3., 4.]]], &Device::Cpu).unwrap().t().unwrap();
    let scales = fp8_row_scales(&view, 130).unwrap().to_vec3::<f32>().unwrap();
    assert_eq!((&scales[0][127][..], &scales[0][128][..]), (&[1., 3.][..], &[2., 4.][..]));
}

#[test]
fn fp8_values_and_scales_that_are_no_numbers_are_refused_with_their_place() {
    let shape = [3, 4, 130];
    let refused = |bits: &[u8], scales: &[f32], words: [&str; 2]| {
        let weights = ExpertWeights::fp8(fp8_values(bits, &shape), fp8_scales(scales.to_vec(), &shape));
        let error = weights.unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in {error:?}"));
    };
    let (bits, scales) = (vec![0x7eu8; 3 * 4 * 130], vec![2f32.powi(119); 3 * 4 * 2]);
    assert!(ExpertWeights::fp8(fp8_values(&bits, &shape), fp8_scales(scales.clone(), &shape)).is_ok());
    for (index, nan) in [(0, 0x7f), (131, 0xff), (1559, 0x7f)] {
        let mut bits = bits.clone();
        bits[index] = nan;
        let place = format!("value of expert {}, row {}, column {}", index / 520, index / 130 % 4, index % 130);
        refused(&bits, &scales, [&place, "NaN"]);
    }
    for (index, bad) in [(0, f32::NAN), (3, f32::INFINITY), (9, f32::NEG_INFINITY), (23, 2f32.powi(119).next_up())] {
        let mut scales = scales.clone();
        scales[index] = bad;
        let place = format!("scale of expert {}, row {}, block {}", index / 8, index / 2 % 4, index % 2);
        refused(&bits, &scales, [&place, "2^119"]);
    }
}

// ---------------------------------------------------------------------------------------------
// Numerics by hand

/// One feature in, one expert: gate and up are the biases.
fn activated(activation: Activation, gate: f32, up: f32, dtype: DType) -> f32 {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let bias = Tensor::new(&[[gate, up]], &Device::Cpu).unwrap();
    let first = ExpertProjection::new(ExpertWeights::dense(zeros(&[1, 2, 1])).unwrap(), Some(bias)).unwrap();
    let ones = zeros(&[1, 1, 1]).ones_like().unwrap();
    let second = ExpertProjection::new(ExpertWeights::dense(ones).unwrap(), None).unwrap();
    let experts = Experts::new(first, second, GateUpRows::Interleaved, activation).unwrap();
    let hidden = zeros(&[1, 1]).to_dtype(dtype).unwrap();
    experts.forward(&hidden, &order_of(vec![0], 1, 1)).unwrap().to_vec2::<f32>().unwrap()[0][0]
}

#[test]
fn clamps_come_after_the_bias_and_the_gate_has_no_lower_clamp() {
    let oss = |gate: f64, up: f64| gate * oracle::sigmoid(1.702 * gate) * (up + 1.0);
    for (gate, up, expected) in [
        (100.0, 0.0, oss(7.0, 0.0)),
        (7.5, 100.0, oss(7.0, 7.0)),
        (1.0, -100.0, oss(1.0, -7.0)),
        (-9.0, 2.0, oss(-9.0, 2.0)),
        (-1e30, 2.0, 0.0),
        (f32::NEG_INFINITY, 7.0, f64::NAN),
        (0.5, -1.0, 0.0),
    ] {
        let found = f64::from(activated(Activation::GPT_OSS, gate, up, DType::F32));
        if expected.is_nan() {
            // -inf * sigmoid(-inf): no number is right, but it must not be a big one.
            assert!(found.is_nan() || found == 0.0, "{found}");
        } else {
            assert!((found - expected).abs() <= 4e-6 * expected.abs() + 1e-30, "({gate}, {up}): {found} {expected}");
        }
    }
    let silu = f64::from(activated(Activation::Silu, 100.0, -50.0, DType::F32));
    assert!((silu + 5000.0).abs() < 1e-2, "{silu}: Silu has no clamp");
    assert_eq!(activated(Activation::Silu, -1000.0, 1.0, DType::F32), 0.0);
}

#[test]
fn the_activation_is_rounded_once_to_the_dtype_of_the_hidden_states() {
    for (gate, up) in [(1.2345678, 0.7654321), (3.3333, -0.1), (0.01, 5.5)] {
        let exact = f64::from(activated(Activation::GPT_OSS, gate, up, DType::F32));
        for dtype in [DType::BF16, DType::F16] {
            assert_eq!(f64::from(activated(Activation::GPT_OSS, gate, up, dtype)), oracle::round(exact, dtype));
        }
        assert_ne!(exact, oracle::round(exact, DType::BF16), "a test that tells nothing");
    }
}

#[test]
fn nan_comes_out_as_nan_and_stays_with_its_token() {
    for activation in [Activation::GPT_OSS, Activation::Silu] {
        assert!(activated(activation, f32::NAN, 1.0, DType::F32).is_nan());
        assert!(activated(activation, 1.0, f32::NAN, DType::F32).is_nan());
    }
    let mut random = Random(33);
    let model = Model::new(&mut random, gpt_oss(2, 32, 32));
    for bad in [f32::NAN, f32::INFINITY] {
        let clean = random.units(9 * 32, 1.0);
        let mut spoilt = clean.clone();
        spoilt[4 * 32 + 17] = bad;
        let run = |values: Vec<f32>| {
            let hidden = Tensor::from_vec(values, (9, 32), &Device::Cpu).unwrap();
            model.experts.forward(&hidden, &order_of(vec![0; 9], 1, 2)).unwrap().to_vec2::<f32>().unwrap()
        };
        let (clean, spoilt) = (run(clean), run(spoilt));
        for token in (0..9).filter(|&token| token != 4) {
            assert_eq!(clean[token], spoilt[token], "token {token} was spoilt by token 4");
        }
        assert!(!bad.is_nan() || spoilt[4].iter().all(|v| v.is_nan()), "NaN was lost");
    }
}

#[test]
fn experts_without_an_inner_feature_give_their_bias() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let first = ExpertProjection::new(ExpertWeights::dense(zeros(&[2, 0, 3])).unwrap(), None).unwrap();
    let bias = Tensor::new(&[[1f32, 2., 3.], [4., 5., 6.]], &Device::Cpu).unwrap();
    let second = ExpertProjection::new(ExpertWeights::dense(zeros(&[2, 3, 0])).unwrap(), Some(bias)).unwrap();
    let experts = Experts::new(first, second, GateUpRows::Concatenated, Activation::Silu).unwrap();
    let rows = experts.forward(&zeros(&[2, 3]), &order_of(vec![1, 0], 1, 2)).unwrap();
    assert_eq!(rows.to_vec2::<f32>().unwrap(), [[1., 2., 3.], [4., 5., 6.]]);
}

#[test]
fn a_linear_layer_without_an_input_feature_gives_its_bias() {
    let weight = Tensor::zeros((1, 3, 0), DType::F32, &Device::Cpu).unwrap();
    let bias = Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu).unwrap();
    let linear = ExpertProjection::new(ExpertWeights::dense(weight).unwrap(), Some(bias)).unwrap();
    let hidden = Tensor::zeros((2, 0), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(
        Linear::from_projection(linear).unwrap().forward(&hidden).unwrap().to_vec2::<f32>().unwrap(),
        [[1., 2., 3.], [1., 2., 3.]]
    );
}

// ---------------------------------------------------------------------------------------------
// The linear layer

#[test]
fn the_linear_layer_equals_the_oracle_with_one_rounding() {
    let mut random = Random(41);
    // And such as make tensor cores take small tiles and large ones, whole and not.
    let of_tensor_cores = [(1, 128, 2880), (17, 40, 96), (1100, 120, 64), (2100, 29, 32)];
    for (num_tokens, out_features, in_features) in
        [(0, 8, 32), (1, 1, 1), (3, 17, 45), (300, 5, 64), (520, 3, 33)].into_iter().chain(of_tensor_cores)
    {
        for dtype in FLOATS {
            for format in [Format::Dense(dtype), Format::Dense(DType::F32), Format::Mxfp4(REALISTIC), Format::Fp8] {
                if matches!(format, Format::Mxfp4(_)) && in_features % 32 != 0 {
                    continue;
                }
                let (projection, matrices) =
                    projection(&mut random, &format, (1, out_features, in_features), Some(DType::F32));
                let projection = Linear::from_projection(projection).unwrap();
                let hidden = hidden_states(&mut random, num_tokens, in_features, 1.0, dtype);
                for found in linear_everywhere(&projection, &hidden) {
                    assert_eq!((found.dtype(), found.dims()), (dtype, &[num_tokens, out_features][..]));
                    let rows = if num_tokens > 0 { oracle::rows_of(&found) } else { Vec::new() };
                    for (x, row) in oracle::rows_of(&hidden).iter().zip(rows) {
                        let x: Vec<_> = x.iter().map(|&x| Bounded { value: x.into(), error: 0.0 }).collect();
                        for (expected, found) in matrices[0].apply(&x).into_iter().zip(row) {
                            let Bounded { value, error } = oracle::rounded(expected, dtype);
                            let error = if dtype == DType::F32 { expected.error + error } else { error };
                            assert!((f64::from(found) - value).abs() <= error, "{found}, not {value} +- {error}");
                        }
                    }
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Batch invariance

#[test]
fn a_row_of_a_linear_layer_has_the_same_bits_in_every_batch() {
    let mut random = Random(43);
    for (out_features, in_features) in [(128, 224), (24, 96), (31, 45)] {
        for dtype in FLOATS {
            let (projection, _) =
                projection(&mut random, &Format::Dense(dtype), (1, out_features, in_features), Some(DType::F32));
            let linear = Linear::from_projection(projection).unwrap();
            let hidden = hidden_states(&mut random, 2500, in_features, 1.0, dtype);
            let whole = linear_everywhere(&linear, &hidden);
            for (first, count) in [(0, 1), (5, 16), (100, 33), (700, 700), (2499, 1)] {
                let some = linear_everywhere(&linear, &hidden.narrow(0, first, count).unwrap());
                for (whole, some) in whole.iter().zip(&some) {
                    let of_whole = whole.narrow(0, first, count).unwrap();
                    assert_eq!(oracle::bits_of(some), oracle::bits_of(&of_whole), "{count} rows from {first}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_whatever_else_is_in_the_batch() {
    let mut random = Random(51);
    let dense = |dtype| Case { gate_up: Format::Dense(dtype), down: Format::Dense(dtype), ..gpt_oss(5, 45, 37) };
    let fp8 = Case { gate_up: Format::Fp8, down: Format::Fp8, ..gpt_oss(5, 173, 37) };
    for case in [gpt_oss(5, 64, 96), dense(DType::F32), dense(DType::BF16), dense(DType::F16), fp8] {
        for dtype in FLOATS {
            let model = Model::new(&mut random, case.clone());
            let num_tokens = 290;
            let hidden = hidden_states(&mut random, num_tokens, case.hidden_size, 1.0, dtype);
            // Expert 0 gets more than a group.
            let ids: Vec<u32> = (0..num_tokens).flat_map(|_| [0, 1 + random.below(4) as u32]).collect();
            let rows_of_tokens = |tokens: &[usize]| -> Vec<Vec<u32>> {
                let index: Vec<u32> = tokens.iter().map(|&t| t as u32).collect();
                let hidden = hidden.index_select(&Tensor::new(index, &Device::Cpu).unwrap(), 0).unwrap();
                let order = order_of(tokens.iter().flat_map(|&t| ids[2 * t..2 * t + 2].to_vec()).collect(), 2, 5);
                let rows = model.experts.forward(&hidden, &order).unwrap().to_vec2::<f32>().unwrap();
                let rank = order.slot_rank.to_vec1::<u32>().unwrap();
                rank.iter().map(|&place| rows[place as usize].iter().map(|v| v.to_bits()).collect()).collect()
            };
            let everyone: Vec<usize> = (0..num_tokens).collect();
            let all = rows_of_tokens(&everyone);
            assert_eq!(all, rows_of_tokens(&everyone), "another run, other bits");
            let mut subsets: Vec<Vec<usize>> = vec![vec![0], vec![289], vec![256], (250..290).collect()];
            subsets
                .extend((2..8).map(|size| random.distinct(num_tokens, size).into_iter().map(|t| t as usize).collect()));
            for tokens in subsets {
                for (i, row) in rows_of_tokens(&tokens).into_iter().enumerate() {
                    assert_eq!(row, all[2 * tokens[i / 2] + i % 2], "token {} of {tokens:?}", tokens[i / 2]);
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The weighted sum

#[test]
fn memory_for_sums_must_fit() {
    let mut random = Random(59);
    let model = Model::new(&mut random, gpt_oss(3, 64, 64));
    let order = order_of(vec![0, 2], 1, 3);
    let hidden = hidden_states(&mut random, 2, 64, 1.0, DType::BF16);
    for device in devices::all() {
        let experts = model.experts.to_device(&device).unwrap();
        let (order, hidden) = (devices::order_to(&device, &order), hidden.to_device(&device).unwrap());
        let weights = Tensor::ones((2, 1), DType::F32, &Device::Cpu).unwrap().to_device(&device).unwrap();
        let room =
            |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap().to_device(&device).unwrap();
        let refused =
            |sums: &Tensor| experts.forward_weighted_to(&hidden, &weights, &order, None, sums).unwrap_err().to_string();
        assert!(refused(&room(&[3, 64], DType::BF16)).contains("[2, 64]"));
        assert!(refused(&room(&[64, 2], DType::BF16).t().unwrap()).contains("side by side"));
        assert!(refused(&room(&[2, 64], DType::F16)).contains("sums has dtype F16"));
        let odd = room(&[129], DType::BF16).narrow(0, 1, 128).unwrap().reshape((2, 64)).unwrap();
        if device.is_cuda() {
            assert!(refused(&odd).contains("multiple of 16"));
            assert!(refused(&Tensor::zeros((2, 64), DType::BF16, &Device::Cpu).unwrap()).contains("where hidden is"));
        } else {
            experts.forward_weighted_to(&hidden, &weights, &order, None, &odd).unwrap();
        }
    }
}

#[test]
fn the_weighted_sum_adds_in_slot_order_and_skips_slots_outside_the_order() {
    let mut random = Random(61);
    for (num_tokens, top_k, hidden_size, local) in
        [(0, 2, 4, 0..8), (1, 1, 1, 0..8), (70, 4, 33, 0..8), (70, 4, 5, 3..6), (9, 3, 7, 2..2)]
    {
        let ids: Vec<u32> = (0..num_tokens).flat_map(|_| random.distinct(8, top_k)).collect();
        let ids: Vec<u32> = ids.into_iter().map(|id| if random.below(6) == 0 { NO_EXPERT } else { id }).collect();
        let ids = Tensor::from_vec(ids, (num_tokens, top_k), &Device::Cpu).unwrap();
        let order = ExpertOrder::new(&ids, 8, local).unwrap();
        let rank = order.slot_rank.to_vec1::<u32>().unwrap();
        let num_rows = rank.iter().filter(|&&place| place != NO_SLOT).count();
        let rows = random.units(num_rows * hidden_size, 1e3);
        let weights = random.units(num_tokens * top_k, 1.0);
        let mut expected = vec![0f32; num_tokens * hidden_size];
        for (slot, &place) in rank.iter().enumerate().filter(|(_, place)| **place != NO_SLOT) {
            for j in 0..hidden_size {
                expected[slot / top_k * hidden_size + j] += weights[slot] * rows[place as usize * hidden_size + j];
            }
        }
        let rows = Tensor::from_vec(rows, (num_rows, hidden_size), &Device::Cpu).unwrap();
        let weights = Tensor::from_vec(weights, (num_tokens, top_k), &Device::Cpu).unwrap();
        let there = devices::cuda().map(|device| {
            // A row for every slot, as the experts give them there.
            let rest = Tensor::full(f32::NAN, (num_tokens * top_k - num_rows, hidden_size), &Device::Cpu).unwrap();
            let rows = Tensor::cat(&[&rows, &rest], 0).unwrap().to_device(device).unwrap();
            let (weights, order) = (weights.to_device(device).unwrap(), devices::order_to(device, &order));
            devices::to_host(&weighted_sum(&rows, &weights, &order).unwrap())
        });
        for sum in std::iter::once(weighted_sum(&rows, &weights, &order).unwrap()).chain(there) {
            assert_eq!((sum.dtype(), sum.dims()), (DType::F32, &[num_tokens, hidden_size][..]));
            assert_eq!(oracle::bits_of(&sum), expected.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        }
    }
}

#[test]
fn the_bytes_of_an_expert_are_those_of_the_published_model() {
    // gpt-oss: 12.44 MB of 4-bit values, 0.78 MB of scales, and the biases, which are kept in f32.
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::U8, &Device::Cpu).unwrap();
    let projection = |rows: usize| {
        let weights = ExpertWeights::mxfp4(zeros(&[1, rows, 90, 16]), zeros(&[1, rows, 90])).unwrap();
        ExpertProjection::new(weights, Some(Tensor::zeros((1, rows), DType::BF16, &Device::Cpu).unwrap())).unwrap()
    };
    let experts =
        Experts::new(projection(5760), projection(2880), GateUpRows::Interleaved, Activation::GPT_OSS).unwrap();
    assert_eq!(experts.bytes_per_expert(), 12_441_600 + 777_600 + 4 * 8640);
}

/// A row may be off by a whole 2^-8 of itself when it is rounded to bfloat16, just above a power of two; so that some are, there
/// are many rows, of so many tokens that tiles round them.
#[test]
fn rows_that_are_rounded_stay_within_the_bound() {
    for seed in 0..12 {
        let mut random = Random(seed);
        let model = Model::new(&mut random, Case { bias: Some(DType::F32), ..gpt_oss(2, 64, 64) });
        let ids: Vec<u32> = (0..24).flat_map(|_| random.distinct(2, 2)).collect();
        let ids = ids.into_iter().map(|id| if random.below(8) == 0 { NO_EXPERT } else { id }).collect();
        model.check(&hidden_states(&mut random, 24, 64, 1.0, DType::BF16), &order_of(ids, 2, 2));
    }
}
