//! Whole blocks in captured graphs.

use super::{captured, on_lasting_thread, overwrite};
use crate::block::{self, Layer};
use crate::devices;
use crate::gpt_oss::tiny_folder;
use crate::oracle::{self, Random};
use candle_core::{DType, Device, Tensor};
use candle_moe::block::MoeBlock;
use candle_moe::checkpoint::Checkpoint;
use candle_moe::ep::{Solo, Step};
use candle_moe::models::gpt_oss::{Config, MoeOptions, load_moe_block};
use candle_moe::routing::RoutingMethod;
use half::bf16;

#[test]
fn a_captured_graph_of_a_whole_block_follows_its_inputs_and_counts() {
    on_lasting_thread(replay_blocks);
}

fn replay_blocks() {
    let Some(device) = devices::cuda() else { return };
    for (dtype, num_shared, perfect) in
        [(DType::F32, 0, false), (DType::F32, 2, false), (DType::F32, 1, true), (DType::BF16, 1, false)]
    {
        let layer = Layer::new(60, 8, dtype);
        let builder = layer.shard(layer.router(RoutingMethod::Renormalize, 3), 1, 0).router_dtype(DType::F32);
        let mut builder = builder.statistics(true).perfect_router(perfect);
        if num_shared > 0 {
            builder = builder.shared_experts(block::shared_experts(61, num_shared, dtype));
        }
        let cpu = builder.build().unwrap();
        let cuda = cpu.to_device(device).unwrap();
        for num_tokens in [1, 7, 40] {
            replay_block(device, &cpu, &cuda, num_tokens, dtype);
        }
    }
    // Sizes that tensor cores take.
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
    for (dtype, perfect_router) in [(DType::BF16, true), (DType::F32, false)] {
        let options = MoeOptions { perfect_router, ..Default::default() };
        let cpu = load_moe_block(&checkpoint, &config, 0, &options, 0).unwrap();
        let cuda =
            load_moe_block(&checkpoint, &config, 0, &MoeOptions { device: device.clone(), ..options }, 0).unwrap();
        for num_tokens in [1, 40, 200] {
            replay_block(device, &cpu, &cuda, num_tokens, dtype);
        }
    }
}

fn hidden_states(block: &MoeBlock, seed: u64, num_tokens: usize, dtype: DType) -> Tensor {
    let shape = [num_tokens, block.experts().hidden_size()];
    oracle::floats(&Random(seed).units(shape.iter().product(), 1.5), &shape, dtype).0
}

fn replay_block(device: &Device, cpu: &MoeBlock, cuda: &MoeBlock, num_tokens: usize, dtype: DType) {
    let input = hidden_states(cpu, 62, num_tokens, dtype).to_device(device).unwrap();
    let num_valid_tokens = Tensor::new(&[num_tokens as u32], device).unwrap();
    let forward = || {
        let mut solo = Solo::new();
        let step = Step::agree(&mut solo, num_tokens).unwrap().with_valid_tokens(&num_valid_tokens);
        cuda.forward(&input, &mut solo, &step).unwrap()
    };
    // The first use loads kernels and, of perfect routing, plans.
    let output = forward().zeros_like().unwrap();
    // Nothing that a graph allocates outlives it: compute-sanitizer's memcheck goes on to believe in what the host frees then, and
    // objects to the next graph with other sizes at its address.
    let (graph, ()) = captured(device, || output.slice_set(&forward(), 0, 0).unwrap());
    cuda.reset_load().unwrap();
    cpu.reset_load().unwrap();
    for (seed, num_valid) in [(63, num_tokens), (64, num_tokens / 2), (65, 0), (66, num_tokens)] {
        let hidden = hidden_states(cpu, seed, num_tokens, dtype);
        match dtype {
            DType::BF16 => overwrite(&input, &hidden.flatten_all().unwrap().to_vec1::<bf16>().unwrap()),
            _ => overwrite(&input, &hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap()),
        }
        overwrite(&num_valid_tokens, &[num_valid as u32]);
        graph.launch().unwrap();
        let mut solo = Solo::new();
        let num_valid_there = Tensor::new(num_valid as u32, &Device::Cpu).unwrap();
        let step = Step::agree(&mut solo, num_tokens).unwrap().with_valid_tokens(&num_valid_there);
        let expected = cpu.forward(&hidden, &mut solo, &step).unwrap();
        let perfect = cpu.is_perfect();
        let context = format!("{dtype:?}, perfect {perfect}, {num_valid} of {num_tokens} tokens");
        block::assert_close(&output, &expected, &context);
        assert_eq!(cuda.load().unwrap(), cpu.load().unwrap(), "{context}");
    }
}
