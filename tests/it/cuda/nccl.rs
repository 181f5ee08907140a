//! Ranks with a CUDA device each, whose rows NCCL carries: results are those of the host, and faults have names.
//!
//! Devices 0 and up, as many as there are; emulated ones with `CANDLE_MOE_EMULATOR_DEVICES=4`.

use super::ranks::{
    PATIENT, SLACK, ThroughDevice, anew, are_emulated, fault, gather, one_at_a_time, tests_of, there_are, world_sizes,
};
use crate::collectives::Call;
use crate::faults::accused;
use crate::procs::on_procs;
use candle_core::{DType, Device, Tensor};
use candle_moe::ep::{Collective, Communicator, EpErrorKind, Nccl, launch};
use std::ffi::{c_char, c_int, c_void};
use std::process::Command;
use std::time::{Duration, Instant};

tests_of!(Nccl);

// ---------------------------------------------------------------------------------------------
// Results

#[test]
fn ranks_that_are_processes_have_devices_too() {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    on_procs(2, PATIENT, |procs| {
        let rank = procs.rank();
        let device = Device::new_cuda(rank).unwrap();
        let mut ranks = ThroughDevice(Nccl::over_procs(procs, &device).unwrap());
        for seed in 100..140 {
            let call = Call::new(seed, 2);
            assert_eq!(call.make(&mut ranks).unwrap(), call.expected(rank));
        }
        let mut ranks = ThroughDevice(ranks.0.rebuild().unwrap());
        assert_eq!(ranks.generation(), 1);
        let call = Call::new(140, 2);
        assert_eq!(call.make(&mut ranks).unwrap(), call.expected(rank));
    });
}

#[test]
fn a_rank_with_a_device_among_ranks_of_the_host_is_refused_at_the_start() {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    let errors = on_procs(3, PATIENT, |mut procs| {
        let rank = procs.rank();
        let rows = Tensor::ones((1, 4), DType::F32, &Device::Cpu).unwrap();
        if rank < 2 {
            // What starts a rank with a device is a call to the others.
            procs.all_gather_bytes(&[]).unwrap();
            return procs.all_gather(&rows, &[1, 1, 1]).unwrap_err();
        }
        let error = Nccl::over_procs(procs, &Device::new_cuda(0).unwrap()).map(drop).unwrap_err();
        assert_eq!(error.op, Collective::Rendezvous);
        error
    });
    assert!(matches!(errors[2].kind, EpErrorKind::Library(_)), "{}", errors[2]);
    for error in &errors[..2] {
        assert!(accused(&error.kind).contains(&2), "{error}");
    }
}

#[test]
fn processes_hear_of_work_that_does_not_end() {
    let _turn = one_at_a_time();
    if !there_are(2) || !are_emulated() {
        return;
    }
    on_procs(2, PATIENT, |procs| {
        let rank = procs.rank();
        let device = Device::new_cuda(rank).unwrap();
        let mut ranks = Nccl::over_procs(procs, &device).unwrap();
        ranks.start_serving();
        assert!(rank == 0 || stall());
        let began = Instant::now();
        let outcome = gather(&mut ranks, 1, &[1, 1]).and_then(|()| {
            std::thread::sleep(SLACK / 5);
            ranks.barrier()
        });
        assert!(began.elapsed() < PATIENT.serving + SLACK, "{:?}", began.elapsed());
        let expected = EpErrorKind::Unfinished { op: Collective::AllGather, step: 3, deadline: PATIENT.serving };
        assert_eq!(outcome.unwrap_err().kind, expected);
        anew(ranks);
    });
}

// ---------------------------------------------------------------------------------------------
// Faults

// ---------------------------------------------------------------------------------------------
// Devices that do not come to their work; only emulated ones can be told to

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Has the device forget the next call of this thread; false where it is none that can.
pub(super) fn stall() -> bool {
    /// At once, and only what is loaded already.
    const RTLD_NOW_NOLOAD: c_int = 2 | 4;
    // SAFETY: the names end with a zero; a group was built, so the library is there, and stays.
    let found = unsafe {
        let library = dlopen(c"libnccl.so.2".as_ptr(), RTLD_NOW_NOLOAD);
        if library.is_null() { library } else { dlsym(library, c"emulator_nccl_stall".as_ptr()) }
    };
    if found.is_null() {
        return false;
    }
    // SAFETY: the emulated library declares it like this.
    let stall: extern "C" fn(c_int) = unsafe { std::mem::transmute(found) };
    stall(1);
    true
}

#[test]
fn work_that_does_not_end_is_named_with_its_call_and_the_group_goes_on_anew() {
    let _turn = one_at_a_time();
    if !there_are(2) || !are_emulated() {
        return;
    }
    for world_size in world_sizes() {
        let counts = vec![1; world_size];
        let outcomes = fault::<Nccl>(world_size, |ranks| {
            assert!(ranks.rank() != 1 || stall());
            gather(ranks, 1, &counts)?;
            // Else this rank would run out of patience first, or as soon.
            std::thread::sleep(SLACK / 5);
            ranks.barrier()
        });
        for (outcome, _) in outcomes {
            let expected = EpErrorKind::Unfinished { op: Collective::AllGather, step: 6, deadline: PATIENT.serving };
            assert_eq!(outcome.unwrap_err().kind, expected);
        }
    }
}

#[test]
fn an_abort_ends_work_that_is_under_way() {
    let _turn = one_at_a_time();
    if !there_are(2) || !are_emulated() {
        return;
    }
    let outcomes = fault::<Nccl>(2, |ranks| {
        if ranks.rank() == 0 {
            return gather(ranks, 1, &[1, 1]);
        }
        assert!(stall());
        gather(ranks, 1, &[1, 1])?;
        std::thread::sleep(Duration::from_millis(50));
        ranks.abort_handle().abort("no more");
        ranks.barrier()
    });
    for (outcome, took) in outcomes {
        let error = outcome.unwrap_err();
        assert!(matches!(&error.kind, EpErrorKind::Aborted { by: Some(1), .. }), "{error}");
        assert!(took < PATIENT.serving, "{took:?}");
    }
}

#[test]
fn a_panic_ends_the_work_of_the_others() {
    let _turn = one_at_a_time();
    if !there_are(2) || !are_emulated() {
        return;
    }
    let outcomes = launch(2, PATIENT, |threads| {
        let device = Device::new_cuda(threads.rank()).unwrap();
        let mut ranks = Nccl::over_threads(threads, &device).unwrap();
        let rank = ranks.rank();
        ranks.start_serving();
        if rank == 1 {
            assert!(stall());
        }
        let began = Instant::now();
        let outcome = gather(&mut ranks, 1, &[1, 1]);
        assert!(rank != 1, "on purpose");
        (outcome.unwrap_err(), began.elapsed())
    });
    let outcomes = outcomes.unwrap();
    let (error, took) = outcomes[0].as_ref().unwrap();
    assert_eq!(error.kind, EpErrorKind::RankPanicked { rank: 1 });
    assert!(*took < SLACK, "{took:?}");
    assert!(outcomes[1].as_ref().unwrap_err().contains("on purpose"));
}

// ---------------------------------------------------------------------------------------------
// Start

#[test]
fn ranks_that_share_a_device_or_have_none_hear_so_at_the_start() {
    let _turn = one_at_a_time();
    if !there_are(1) {
        return;
    }
    let start = |device: fn(usize) -> Device| {
        let errors = launch(2, PATIENT, |threads| {
            let device = device(threads.rank());
            Nccl::over_threads(threads, &device).map(drop).unwrap_err()
        });
        errors.unwrap().into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    for error in start(|_| Device::new_cuda(0).unwrap()) {
        assert_eq!(error.op, Collective::Rendezvous);
        let EpErrorKind::Library(what) = &error.kind else { panic!("{error}") };
        assert!(what.starts_with("ranks 0 and 1 both have CUDA device 0 of "), "{what}");
    }
    let errors = start(|rank| if rank == 0 { Device::Cpu } else { Device::new_cuda(0).unwrap() });
    let expected = "device is Cpu, it must be a CUDA device".to_string();
    assert_eq!(errors[0].kind, EpErrorKind::BadArgument(expected));
    assert!(matches!(errors[1].kind, EpErrorKind::Aborted { by: Some(0), .. }), "{}", errors[1]);
}

#[test]
fn a_library_that_is_too_old_is_named_by_every_rank() {
    if !there_are(2) || !are_emulated() {
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cuda::nccl::ranks_of_an_old_library", "--ignored", "--nocapture"])
        .env("CANDLE_MOE_EMULATOR_NCCL_VERSION", "21703")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for rank in 0..2 {
        let expected = format!(
            "rank {rank}: rendezvous (step 0, generation 0): rank 0 found NCCL 2.17.3, it must be 2.18.0 or newer"
        );
        assert!(text.contains(&expected), "{text}");
    }
}

#[test]
#[ignore = "a part of another test, which starts it with another library"]
fn ranks_of_an_old_library() {
    let errors = launch(2, PATIENT, |threads| {
        let device = Device::new_cuda(threads.rank()).unwrap();
        Nccl::over_threads(threads, &device).map(drop).unwrap_err()
    });
    for error in errors.unwrap() {
        println!("{}", error.unwrap());
    }
}
