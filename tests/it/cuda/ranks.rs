//! Ranks with a CUDA device each, whatever carries their rows: results are those of the host, and faults have names.
//!
//! Devices 0 and up, as many as there are; emulated ones with `CANDLE_MOE_EMULATOR_DEVICES=4`.

use crate::collectives::Call;
use crate::devices::{say, to_host};
use crate::ep::Random;
use crate::faults::accused;
use candle_core::cuda_backend::cudarc::driver::CudaContext;
use candle_core::{DType, Device, Tensor};
#[cfg(feature = "nccl")]
use candle_moe::ep::Nccl;
use candle_moe::ep::{
    AbortHandle, Communicator, Deadlines, EpError, EpErrorKind, Faulty, Health, Injection, Peer, Schedule, Threads,
    launch,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A rank that is a thread with a device.
pub(super) trait DeviceRank: Communicator + Sized {
    fn over(threads: Threads, device: &Device) -> Result<Self, EpError>;
    fn device(&self) -> &Device;
    fn rebuilt(self) -> Result<Self, EpError>;
    /// Whether sums are in rank order.
    const ADDS_IN_ORDER: bool;
}

macro_rules! device_rank {
    ($type:ty, $adds_in_order:literal) => {
        impl DeviceRank for $type {
            fn over(threads: Threads, device: &Device) -> Result<Self, EpError> {
                Self::over_threads(threads, device)
            }
            fn device(&self) -> &Device {
                self.device()
            }
            fn rebuilt(self) -> Result<Self, EpError> {
                self.rebuild()
            }
            const ADDS_IN_ORDER: bool = $adds_in_order;
        }
    };
}

#[cfg(feature = "nccl")]
device_rank!(Nccl, false);
device_rank!(Peer, true);

/// The tests that hold for every kind of rank.
macro_rules! tests_of {
    ($rank:ty) => {
        $crate::cuda::ranks::tests_of! { $rank:
            random_collectives_of_devices_are_those_of_the_naive_computation
            every_dtype_and_count_is_carried_as_on_the_host
            many_calls_are_enqueued_before_one_settle
            another_call_and_another_shape_are_named_before_anything_moves
            rows_of_the_host_or_of_another_handle_are_refused
            a_rank_that_never_comes_is_named_at_the_deadline
            a_rank_that_returns_early_is_named_at_once
            the_abort_handle_wakes_everybody_from_any_thread
            injected_faults_of_devices_are_named_and_survived
        }
    };
    ($rank:ty: $($name:ident)*) => {
        $(#[test]
        fn $name() {
            $crate::cuda::ranks::$name::<$rank>();
        })*
    };
}
pub(super) use tests_of;

pub(super) const PATIENT: Deadlines =
    Deadlines { warm_up: Duration::from_secs(60), serving: Duration::from_millis(400) };
/// What a fault may take beyond the deadline.
pub(super) const SLACK: Duration = Duration::from_millis(500);

/// Communicators that share devices must not run at the same time.
pub(super) fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn num_devices() -> usize {
    CudaContext::device_count().map_or(0, |count| count as usize)
}

pub(super) fn are_emulated() -> bool {
    CudaContext::new(0).unwrap().name().unwrap().contains("emulator")
}

/// Whether there are that many devices; says so where not.
pub(super) fn there_are(devices: usize) -> bool {
    let found = num_devices();
    if found < devices {
        say(&format!("SKIPPED on CUDA: {devices} devices are needed, there are {found}"));
    }
    found >= devices
}

/// Group sizes that the devices allow, from 2.
pub(super) fn world_sizes() -> std::ops::RangeInclusive<usize> {
    2..=num_devices().min(4)
}

/// Runs `body` on every rank, each a thread with the device of its number; no rank may panic.
pub(super) fn on_devices<R: DeviceRank, T: Send>(world_size: usize, body: impl Fn(R) -> T + Sync) -> Vec<T> {
    let ranks = launch(world_size, PATIENT, |threads| {
        let device = Device::new_cuda(threads.rank()).unwrap();
        body(R::over(threads, &device).unwrap())
    });
    ranks.unwrap().into_iter().map(Result::unwrap).collect()
}

/// Takes tensors of the host to the device and back, so that what tests a group of the host tests one of devices.
pub(super) struct ThroughDevice<R>(pub(super) R);

impl<R: DeviceRank> ThroughDevice<R> {
    /// In the middle of a larger tensor, and not contiguous.
    fn there(&self, tensor: &Tensor) -> Tensor {
        let device = self.0.device();
        if tensor.rank() < 2 || tensor.elem_count() == 0 {
            return tensor.to_device(device).unwrap();
        }
        let padded = tensor.pad_with_zeros(0, 2, 1).unwrap().transpose(0, 1).unwrap().contiguous().unwrap();
        let there = padded.to_device(device).unwrap().transpose(0, 1).unwrap();
        there.narrow(0, 2, tensor.dims()[0]).unwrap()
    }

    fn back(&mut self, tensor: Result<Tensor, EpError>) -> Result<Tensor, EpError> {
        let tensor = tensor?;
        assert!(tensor.is_contiguous() && tensor.device().same_device(self.0.device()));
        self.0.settle()?;
        Ok(to_host(&tensor))
    }
}

impl<R: DeviceRank> Communicator for ThroughDevice<R> {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn world_size(&self) -> usize {
        self.0.world_size()
    }
    fn set_label(&mut self, label: &str) {
        self.0.set_label(label);
    }
    fn deadline(&self) -> Duration {
        self.0.deadline()
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.0.set_deadline(deadline);
    }
    fn deadlines(&self) -> Deadlines {
        self.0.deadlines()
    }
    fn start_serving(&mut self) {
        self.0.start_serving();
    }
    fn all_gather(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let result = self.0.all_gather(&self.there(rows), counts);
        self.back(result)
    }
    fn reduce_scatter(&mut self, rows: &Tensor, counts: &[usize]) -> Result<Tensor, EpError> {
        let result = self.0.reduce_scatter(&self.there(rows), counts);
        self.back(result)
    }
    fn all_to_all(&mut self, rows: &Tensor, send_counts: &[usize]) -> Result<(Tensor, Vec<usize>), EpError> {
        let (rows, counts) = self.0.all_to_all(&self.there(rows), send_counts)?;
        Ok((self.back(Ok(rows))?, counts))
    }
    fn all_reduce(&mut self, values: &Tensor) -> Result<Tensor, EpError> {
        let result = self.0.all_reduce(&self.there(values));
        self.back(result)
    }
    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, EpError> {
        self.0.all_gather_bytes(bytes)
    }
    fn barrier(&mut self) -> Result<(), EpError> {
        self.0.barrier()
    }
    fn settle(&mut self) -> Result<(), EpError> {
        self.0.settle()
    }
    fn abort_handle(&self) -> AbortHandle {
        self.0.abort_handle()
    }
    fn health(&self) -> Health {
        self.0.health()
    }
}

/// Small whole numbers, whose sums are the same in any order and dtype.
fn numbers(seed: u64, num_rows: usize, dtype: DType) -> Tensor {
    let mut random = Random(seed + 1);
    let values: Vec<u32> = (0..num_rows * 5).map(|_| (random.next() % 17) as u32).collect();
    Tensor::from_vec(values, (num_rows, 5), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

#[track_caller]
fn assert_same(found: &Tensor, expected: &Tensor, context: &str) {
    assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()), "{context}");
    let values =
        |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    assert_eq!(values(found), values(expected), "{context}");
}

pub(super) fn random_collectives_of_devices_are_those_of_the_naive_computation<R: DeviceRank>() {
    let _turn = one_at_a_time();
    for world_size in world_sizes() {
        // The order of a sum of more than two shows in its last bits, and is the library's.
        let is_exact = world_size == 2 || R::ADDS_IN_ORDER || are_emulated();
        on_devices::<R, _>(world_size, |ranks| {
            let rank = ranks.rank();
            let mut ranks = ThroughDevice(ranks);
            for seed in 0..60 {
                let call = Call::new(seed, world_size);
                ranks.set_label(&format!("call {seed}"));
                let outcome = call.make(&mut ranks).unwrap();
                if is_exact || !call.is_sum() {
                    assert_eq!(outcome, call.expected(rank), "rank {rank} of {world_size}, call {seed}");
                }
            }
        });
    }
    there_are(2);
}

pub(super) fn every_dtype_and_count_is_carried_as_on_the_host<R: DeviceRank>() {
    let _turn = one_at_a_time();
    for world_size in 1..=num_devices().min(4) {
        let host: Vec<_> =
            Threads::group(world_size, PATIENT).unwrap().into_iter().map(|r| Mutex::new(Some(r))).collect();
        on_devices::<R, _>(world_size, |ranks| {
            let rank = ranks.rank();
            let mut ranks = ThroughDevice(ranks);
            let mut host = host[rank].lock().unwrap().take().unwrap();
            let mut common = Random(11);
            let mut own = Random(50 + rank as u64);
            for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16, DType::U8, DType::U32, DType::I64] {
                for run in 0..5 {
                    let context = format!("rank {rank} of {world_size}, {dtype:?}, run {run}");
                    let counts: Vec<usize> = match run {
                        0 => vec![0; world_size],
                        1 => vec![3; world_size],
                        _ => (0..world_size).map(|_| common.count()).collect(),
                    };
                    let total = counts.iter().sum();
                    let seed = own.next() % 1000;
                    let mine = numbers(seed, counts[rank], dtype);
                    let found = ranks.all_gather(&mine, &counts).unwrap();
                    assert_same(&found, &host.all_gather(&mine, &counts).unwrap(), &context);
                    let send_counts: Vec<usize> = (0..world_size).map(|_| own.count()).collect();
                    let routed = numbers(seed, send_counts.iter().sum(), dtype);
                    let (found, found_counts) = ranks.all_to_all(&routed, &send_counts).unwrap();
                    let (expected, expected_counts) = host.all_to_all(&routed, &send_counts).unwrap();
                    assert_same(&found, &expected, &context);
                    assert_eq!(found_counts, expected_counts, "{context}");
                    if dtype.is_float() {
                        let all = numbers(seed, total, dtype);
                        let found = ranks.reduce_scatter(&all, &counts).unwrap();
                        assert_same(&found, &host.reduce_scatter(&all, &counts).unwrap(), &context);
                        assert_same(&ranks.all_reduce(&all).unwrap(), &host.all_reduce(&all).unwrap(), &context);
                    }
                }
            }
            let scalar = Tensor::new(rank as f32, &Device::Cpu).unwrap();
            assert_same(&ranks.all_reduce(&scalar).unwrap(), &host.all_reduce(&scalar).unwrap(), "a scalar");
        });
    }
}

pub(super) fn many_calls_are_enqueued_before_one_settle<R: DeviceRank>() {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    on_devices::<R, _>(2, |mut ranks| {
        let mut values = Tensor::ones((64, 32), DType::F32, ranks.device()).unwrap();
        for _ in 0..20 {
            values = ranks.all_reduce(&values).unwrap();
        }
        ranks.settle().unwrap();
        let values = to_host(&values).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|&value| value == (1 << 20) as f32));
        assert!(ranks.health().next_step >= 20);
        assert_eq!(ranks.generation(), 0);
    });
}

/// The group is built anew, and is right.
pub(super) fn anew<R: DeviceRank>(ranks: R) {
    let (rank, world_size) = (ranks.rank(), ranks.world_size());
    let mut ranks = ThroughDevice(ranks.rebuilt().unwrap());
    assert_eq!(ranks.generation(), 1);
    for seed in 200..206 {
        let call = Call::new(seed, world_size);
        let outcome = call.make(&mut ranks).unwrap();
        assert!(call.is_sum() || outcome == call.expected(rank), "rank {rank}, call {seed}");
    }
}

/// Has every rank make one right call and then do `body`, gives what came of that and how long it took, and has those that
/// still have a handle build the group anew.
pub(super) fn fault<R: DeviceRank>(
    world_size: usize,
    body: impl Fn(&mut R) -> Result<(), EpError> + Sync,
) -> Vec<(Result<(), EpError>, Duration)> {
    on_devices::<R, _>(world_size, |mut ranks| {
        let ones = Tensor::ones((2, 3), DType::F32, ranks.device()).unwrap();
        ranks.all_reduce(&ones).unwrap();
        ranks.settle().unwrap();
        // Else one rank may break the group while another settles.
        ranks.barrier().unwrap();
        ranks.start_serving();
        ranks.set_label("layer 3");
        let began = Instant::now();
        let outcome = body(&mut ranks);
        let took = began.elapsed();
        assert!(took < PATIENT.serving + SLACK, "{took:?}: {outcome:?}");
        if outcome.is_err() {
            let again = ranks.barrier().unwrap_err();
            assert!(matches!(again.kind, EpErrorKind::Poisoned { .. }), "{again}");
        }
        anew(ranks);
        (outcome, took)
    })
}

pub(super) fn gather<R: DeviceRank>(ranks: &mut R, rows: usize, counts: &[usize]) -> Result<(), EpError> {
    let rows = Tensor::ones((rows, 4), DType::F32, ranks.device()).unwrap();
    ranks.all_gather(&rows, counts)?;
    ranks.settle()
}

pub(super) fn another_call_and_another_shape_are_named_before_anything_moves<R: DeviceRank>() {
    let _turn = one_at_a_time();
    for world_size in world_sizes() {
        let counts = vec![1; world_size];
        let outcomes = fault::<R>(world_size, |ranks| match ranks.rank() {
            1 => ranks.barrier(),
            _ => gather(ranks, 1, &counts),
        });
        for (outcome, _) in outcomes {
            let error = outcome.unwrap_err();
            assert!(matches!(error.kind, EpErrorKind::Desync { rank: 1, .. }), "{error}");
            assert_eq!(error.label, "layer 3", "{error}");
        }
        let outcomes = fault::<R>(world_size, |ranks| {
            let width = if ranks.rank() == 1 { 5 } else { 4 };
            let rows = Tensor::ones((1, width), DType::F32, ranks.device()).unwrap();
            ranks.all_gather(&rows, &counts).map(drop)
        });
        for (outcome, _) in outcomes {
            let text = outcome.unwrap_err().to_string();
            assert!(text.contains("rows of shape [5]") && text.contains("rank 1 made another call"), "{text}");
        }
    }
    there_are(2);
}

pub(super) fn rows_of_the_host_or_of_another_handle_are_refused<R: DeviceRank>() {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    for expected in
        ["rows is on Cpu, it must be on Cuda { gpu_id: 1 }", "rows is on another Device of Cuda { gpu_id: 1 }"]
    {
        let outcomes = fault::<R>(2, |ranks| {
            let other = match (ranks.rank(), expected.contains("Cpu")) {
                (0, _) => ranks.device().clone(),
                (_, true) => Device::Cpu,
                (rank, false) => Device::new_cuda(rank).unwrap(),
            };
            ranks.all_gather(&Tensor::ones((1, 4), DType::F32, &other).unwrap(), &[1, 1]).map(drop)
        });
        let [Err(first), Err(second)] = [&outcomes[0].0, &outcomes[1].0] else { panic!("{outcomes:?}") };
        assert!(matches!(&second.kind, EpErrorKind::BadArgument(what) if what.contains(expected)), "{second}");
        assert!(matches!(first.kind, EpErrorKind::Aborted { by: Some(1), .. }), "{first}");
    }
}

pub(super) fn a_rank_that_never_comes_is_named_at_the_deadline<R: DeviceRank>() {
    let _turn = one_at_a_time();
    for world_size in world_sizes() {
        let counts = vec![1; world_size];
        let outcomes = fault::<R>(world_size, |ranks| match ranks.rank() {
            1 => {
                std::thread::sleep(PATIENT.serving + SLACK / 2);
                ranks.barrier()
            }
            _ => gather(ranks, 1, &counts),
        });
        for (outcome, _) in outcomes {
            let error = outcome.unwrap_err();
            assert_eq!(error.kind, EpErrorKind::Timeout { missing: vec![1], deadline: PATIENT.serving });
        }
    }
    there_are(2);
}

pub(super) fn a_rank_that_returns_early_is_named_at_once<R: DeviceRank>() {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    for panics in [false, true] {
        let noticed = Barrier::new(2);
        let outcomes = launch(2, PATIENT, |threads| {
            let lobby = threads.lobby();
            let device = Device::new_cuda(threads.rank()).unwrap();
            let mut ranks = R::over(threads, &device).unwrap();
            let rank = ranks.rank();
            gather(&mut ranks, 1, &[1, 1]).unwrap();
            if rank == 1 {
                let end = catch_unwind(AssertUnwindSafe(move || {
                    let _ranks = ranks;
                    assert!(!panics, "on purpose");
                }));
                assert_eq!(end.is_err(), panics);
                noticed.wait();
                let threads = lobby.join(rank, 1).unwrap();
                let mut ranks = R::over(threads, &device).unwrap();
                return gather(&mut ranks, 1, &[1, 1]);
            }
            let began = Instant::now();
            let error = gather(&mut ranks, 1, &[1, 1]).unwrap_err();
            assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
            let expected = match panics {
                true => EpErrorKind::RankPanicked { rank: 1 },
                false => EpErrorKind::RankLeft { rank: 1 },
            };
            noticed.wait();
            assert_eq!(error.kind, expected);
            gather(&mut ranks.rebuilt().unwrap(), 1, &[1, 1])
        });
        for outcome in outcomes.unwrap() {
            outcome.unwrap().unwrap();
        }
    }
}

pub(super) fn the_abort_handle_wakes_everybody_from_any_thread<R: DeviceRank>() {
    let _turn = one_at_a_time();
    for world_size in world_sizes() {
        let counts = vec![1; world_size];
        let outcomes = fault::<R>(world_size, |ranks| match ranks.rank() {
            1 => {
                let handle = ranks.abort_handle();
                std::thread::spawn(move || handle.abort("enough")).join().unwrap();
                ranks.barrier()
            }
            _ => gather(ranks, 1, &counts),
        });
        for (outcome, took) in outcomes {
            let error = outcome.unwrap_err();
            assert!(
                matches!(&error.kind, EpErrorKind::Aborted { by: Some(1), reason } if reason == "enough"),
                "{error}"
            );
            assert!(took < SLACK, "{took:?}");
        }
    }
    there_are(2);
}

pub(super) fn injected_faults_of_devices_are_named_and_survived<R: DeviceRank>() {
    let _turn = one_at_a_time();
    if !there_are(2) {
        return;
    }
    let counts = [2, 1];
    for injection in [Injection::Silence, Injection::Death, Injection::WrongShape, Injection::Skip, Injection::Double] {
        let errors = launch(2, PATIENT, |threads| {
            let (rank, lobby) = (threads.rank(), threads.lobby());
            let device = Device::new_cuda(rank).unwrap();
            let ranks = R::over(threads, &device).unwrap();
            let schedule = if rank == 1 { Schedule::new().at(1, injection) } else { Schedule::new() };
            let mut ranks = Faulty::new(ranks, |_| schedule.clone());
            ranks.start_serving();
            let rows = Tensor::ones((counts[rank], 4), DType::F32, &device).unwrap();
            let error = (0..4).find_map(|step| {
                ranks.set_label(&format!("layer {step}"));
                ranks.all_gather(&rows, &counts).and_then(|_| ranks.settle()).err()
            });
            let mut again = match ranks.into_inner() {
                Some(survivor) => survivor.rebuilt().unwrap(),
                None => R::over(lobby.join(rank, 1).unwrap(), &device).unwrap(),
            };
            again.all_gather(&rows, &counts).unwrap();
            again.settle().unwrap();
            error
        });
        let mut errors = errors.unwrap().into_iter().map(Result::unwrap);
        let error = errors.next().unwrap().unwrap_or_else(|| panic!("{injection:?}: rank 0 did not notice"));
        assert!(accused(&error.kind).contains(&1), "{injection:?}: {error}");
    }
}
