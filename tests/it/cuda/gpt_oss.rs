//! GPT-OSS with a device for each rank: the logits and the load of one device, and a device that stops is named.

use super::nccl::stall;
use super::ranks::{are_emulated, one_at_a_time, there_are};
use crate::devices::{cuda, line};
use crate::gpt_oss::{max_distance, options, prompt, tiny_folder, whole_prompt};
use candle_core::{DType, Device};
use candle_moe::block::Load;
use candle_moe::checkpoint::Checkpoint;
use candle_moe::ep::{Communicator, Deadlines, Nccl, Reduction, Strategy, launch};
use candle_moe::models::gpt_oss::{Cache, Config, Logits, Model, MoeOptions, serve};
use std::time::{Duration, Instant};

const PATIENT: Deadlines = Deadlines { warm_up: Duration::from_secs(60), serving: Duration::from_secs(30) };

/// The first ids of the goldens' prompt.
fn ids(num_tokens: usize) -> Vec<u32> {
    prompt(&crate::gpt_oss::goldens())[..num_tokens].to_vec()
}

fn alone<T>(options: &MoeOptions, body: impl Fn(&mut Model) -> T) -> T {
    let options = MoeOptions { ep_size: 1, strategy: None, device: Device::new_cuda(0).unwrap(), ..options.clone() };
    body(&mut Model::load(tiny_folder(), &options, &|_, _| ()).unwrap())
}

/// What rank 0 makes of the model, and how the ranks that serve end; `before` is called by each of those before it does.
fn among_devices<T: Send>(
    options: &MoeOptions,
    deadlines: Deadlines,
    first: impl Fn(&mut Model) -> T + Sync,
    before: impl Fn(usize) + Sync,
) -> (T, Vec<candle_core::Result<()>>) {
    let config = Config::from_file(format!("{}/config.json", tiny_folder())).unwrap();
    let ranks = launch(options.ep_size, deadlines, |threads| {
        let rank = threads.rank();
        let device = Device::new_cuda(rank).unwrap();
        let mut ranks = Nccl::over_threads(threads, &device).unwrap();
        let options = MoeOptions { device, ..options.clone() };
        if rank == 0 {
            let mut model = Model::join(tiny_folder(), &options, Box::new(ranks), &|_, _| ()).unwrap();
            return Ok(first(&mut model));
        }
        before(rank);
        let checkpoint = Checkpoint::open(tiny_folder()).unwrap();
        Err(serve(&checkpoint, &config, &options, &mut ranks, &|| ()))
    });
    let mut ranks = ranks.unwrap().into_iter().map(Result::unwrap);
    let Some(Ok(first)) = ranks.next() else { panic!("no rank 0") };
    (first, ranks.map(|rank| rank.map(drop).unwrap_err()).collect())
}

/// What rank 0 makes of the model, where all goes well.
fn served<T: Send>(options: &MoeOptions, first: impl Fn(&mut Model) -> T + Sync) -> T {
    let (first, others) = among_devices(options, PATIENT, first, |_| ());
    others.into_iter().for_each(Result::unwrap);
    first
}

#[test]
fn logits_of_several_devices_are_those_of_one() {
    let _turn = one_at_a_time();
    if cuda().is_none() || !there_are(2) {
        return;
    }
    let ids = ids(9);
    for dtype in [DType::F32, DType::BF16] {
        let alone = alone(&options(dtype, 1, Reduction::SlotOrder), |model| whole_prompt(model, &ids));
        for (ep_size, strategy) in
            [(2, None), (2, Some(Strategy::Exchange)), (3, Some(Strategy::Exchange)), (4, Some(Strategy::Gather))]
        {
            if !there_are(ep_size) {
                continue;
            }
            for reduction in Reduction::ALL {
                let options = MoeOptions { strategy, ..options(dtype, ep_size, reduction) };
                let logits = served(&options, |model| whole_prompt(model, &ids));
                let (distance, context) = (max_distance(&logits, &alone), format!("{options:?}"));
                match (reduction, dtype) {
                    (Reduction::SlotOrder, _) => {
                        let same = logits.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "{distance} away: {context}");
                    }
                    (_, DType::F32) => assert!(distance < 1e-3, "{distance} away: {context}"),
                    _ => assert!(distance < 0.5, "{distance} away: {context}"),
                }
            }
        }
    }
}

/// Loads of a prompt of each length with two tokens behind it, and then the logits of learned routing.
fn balanced_then_learned(model: &mut Model, ids: &[u32]) -> (Vec<Vec<Load>>, Vec<f32>) {
    model.moe_mut().set_perfect_router(true).unwrap();
    let load = |length: usize| {
        model.moe().reset_load().unwrap();
        let mut cache = Cache::new(model.config());
        model.forward(&ids[..length], &mut cache, Logits::Last).unwrap();
        for _ in 0..2 {
            model.forward(&ids[..1], &mut cache, Logits::Last).unwrap();
        }
        model.moe().load_per_layer().unwrap()
    };
    let loads = [1, 2, 5].map(load).to_vec();
    model.moe_mut().set_perfect_router(false).unwrap();
    (loads, whole_prompt(model, ids))
}

#[test]
fn perfect_routing_of_devices_is_that_of_the_host_and_can_be_switched_off() {
    let _turn = one_at_a_time();
    if cuda().is_none() || !there_are(2) {
        return;
    }
    let ids = ids(5);
    for (ep_size, strategy) in [(2, Strategy::Gather), (2, Strategy::Exchange), (3, Strategy::Gather)] {
        if !there_are(ep_size) {
            continue;
        }
        let options = MoeOptions { strategy: Some(strategy), ..options(DType::F32, ep_size, Reduction::SlotOrder) };
        let learned = alone(&options, |model| whole_prompt(model, &ids));
        let (loads, logits) = served(&options, |model| balanced_then_learned(model, &ids));
        let mut host = Model::load(tiny_folder(), &options, &|_, _| ()).unwrap();
        assert_eq!(loads, balanced_then_learned(&mut host, &ids).0, "{options:?}");
        assert_eq!(logits, learned, "{options:?}");
    }
}

#[test]
fn a_device_that_stops_in_the_middle_of_a_step_is_an_error_of_every_rank_in_time() {
    let _turn = one_at_a_time();
    if cuda().is_none() || !there_are(2) || !are_emulated() {
        return;
    }
    let deadlines = Deadlines { serving: Duration::from_secs(3), ..PATIENT };
    let options = options(DType::F32, 2, Reduction::SlotOrder);
    let first = |model: &mut Model| {
        let began = Instant::now();
        let mut cache = Cache::new(model.config());
        let error = line(model.forward(&[1, 2, 3], &mut cache, Logits::Last).unwrap_err());
        let again = line(model.forward(&[1], &mut cache, Logits::Last).unwrap_err());
        (error, again, began.elapsed())
    };
    let ((error, again, took), others) = among_devices(&options, deadlines, first, |_| assert!(stall()));
    assert!(took < deadlines.serving + Duration::from_secs(2), "{took:?}: {error}");
    let other = line(others.into_iter().next().unwrap().unwrap_err());
    for error in [&error, &again, &other] {
        // The stand-in keeps rank 0 in its call, so rank 1, at the next one, may be the first whose patience ends.
        let named = error.contains("did not end") || error.contains("no call from ranks [0] within 3s");
        assert!(named && error.contains("layer 0"), "{error}");
    }
}
