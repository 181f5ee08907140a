//! Ranks as processes: the same results as threads, and what is said of ranks that are killed, stopped, late, missing or wrong.

use crate::collectives::{Call, Outcome};
use crate::devices::line;
use crate::faults::{accused, assert_named};
use crate::faulty_layers::{Case, Way};
use candle_core::{DType, Device, Tensor};
use candle_moe::ep::{
    Collective, Communicator, Deadlines, Environment, EpError, EpErrorKind, Overrides, Procs, ProcsConfig, launch,
};
use proptest::prelude::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const PATIENT: Duration = Duration::from_secs(20);
/// What a fault may take beyond the deadline.
const SLACK: Duration = Duration::from_millis(500);

/// A port that nobody uses, below those that the system hands out for connections.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add((std::process::id() % 100) as u16 * 97);
        let port = 20_000 + offset % 12_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn config(rank: usize, world_size: usize, port: u16) -> ProcsConfig {
    ProcsConfig { rank, world_size, address: "127.0.0.1".into(), port, generation: 0 }
}

/// Runs `body` on threads that know each other as processes would.
pub(crate) fn on_procs<T: Send>(
    world_size: usize,
    deadlines: impl Into<Deadlines>,
    body: impl Fn(Procs) -> T + Sync,
) -> Vec<T> {
    let (port, deadlines) = (free_port(), deadlines.into());
    let join = |rank| body(Procs::join(config(rank, world_size, port), deadlines).unwrap());
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || join(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

// ---------------------------------------------------------------------------------------------
// The same as threads

/// Collectives of a rank of any kind: floats of all widths, where the order of sums shows.
fn outcomes(ranks: &mut dyn Communicator, seed: u64, num_calls: u64) -> Vec<(Outcome, Vec<u8>)> {
    let (rank, world_size) = (ranks.rank(), ranks.world_size());
    (0..num_calls)
        .map(|number| {
            ranks.set_label(&format!("call {number}"));
            let call = Call::new(seed + number, world_size);
            let outcome = call.make(ranks).unwrap();
            assert_eq!(outcome, call.expected(rank));
            let dtype = [DType::BF16, DType::F16, DType::F64, DType::F32][(seed + number) as usize % 4];
            let values = (0..7).map(|i| (seed as f32 + i as f32).sin() * 10f32.powi(rank as i32 + i));
            let values = Tensor::from_iter(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let sum = ranks.all_reduce(&values).unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
            (outcome, sum.into_iter().flat_map(f64::to_le_bytes).collect())
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn procs_and_threads_give_the_same_bits(seed in 0u64..1 << 40, world_size in 1usize..6) {
        let threads = launch(world_size, PATIENT, |mut ranks| outcomes(&mut ranks, seed, 10)).unwrap();
        let procs = on_procs(world_size, PATIENT, |mut ranks| outcomes(&mut ranks, seed, 10));
        prop_assert_eq!(threads.into_iter().map(Result::unwrap).collect::<Vec<_>>(), procs);
    }
}

#[test]
fn every_dtype_and_rank_travels_between_processes() {
    let dtypes = [
        DType::U8,
        DType::U32,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::BF16,
        DType::F16,
        DType::F32,
        DType::F64,
        DType::F8E4M3,
    ];
    on_procs(3, PATIENT, |mut ranks| {
        let rank = ranks.rank();
        let counts = [2, 0, 1];
        for dtype in dtypes {
            for row in [&[][..], &[2], &[2, 3], &[0], &[2, 0], &[usize::MAX, 0]] {
                let of = |rank: usize, num_rows: usize| {
                    let shape = [&[num_rows], row].concat();
                    if shape.contains(&0) {
                        return Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
                    }
                    let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
                    (zeros + (rank + 1) as f64).unwrap().to_dtype(dtype).unwrap()
                };
                let all = ranks.all_gather(&of(rank, counts[rank]), &counts).unwrap();
                assert_eq!((all.dtype(), all.dims()[0]), (dtype, 3));
                let (received, from) = ranks.all_to_all(&all, &[0, 1, 2]).unwrap();
                assert_eq!(from, vec![rank; 3]);
                assert_eq!((received.dtype(), received.dims().len()), (dtype, 1 + row.len()));
                if all.elem_count() > 0 {
                    let expected = Tensor::cat(&[of(0, 2), of(2, 1)], 0).unwrap();
                    assert_eq!(plain(&all), plain(&expected));
                    let parts = vec![expected.narrow(0, rank.saturating_sub(1), rank).unwrap(); 3];
                    if rank > 0 {
                        assert_eq!(plain(&received), plain(&Tensor::cat(&parts, 0).unwrap()));
                    }
                }
            }
        }
        let transposed = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().reshape((3, 4)).unwrap().t().unwrap();
        let view = transposed.narrow(0, 1, 3).unwrap();
        let sum = ranks.all_reduce(&view).unwrap();
        assert_eq!(plain(&sum), plain(&(view * 3.).unwrap()));
    });
}

fn plain(tensor: &Tensor) -> Vec<f32> {
    // From F8E4M3 to F64, Candle 0.11 never returns.
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Larger than what the kernel keeps for a reader: everybody writes at once and nobody waits for ever.
#[test]
fn large_payloads_cross() {
    on_procs(3, PATIENT, |mut ranks| {
        let mine = Tensor::full(ranks.rank() as f32, (1 << 10, 1 << 12), &Device::Cpu).unwrap();
        let all = ranks.all_gather(&mine, &[1 << 10; 3]).unwrap();
        for rank in 0..3 {
            let part = all.narrow(0, rank << 10, 1 << 10).unwrap().flatten_all().unwrap();
            let (low, high) = (part.min(0).unwrap(), part.max(0).unwrap());
            assert_eq!((low.to_scalar::<f32>().unwrap(), high.to_scalar::<f32>().unwrap()), (rank as f32, rank as f32));
        }
    });
}

/// The last collective is over for a rank as soon as it returns: leaving then disturbs nobody.
#[test]
fn an_orderly_end_of_processes_disturbs_nobody() {
    for round in 0..30 {
        on_procs(4, PATIENT, |mut ranks| {
            let call = Call::new(round, 4);
            assert_eq!(call.make(&mut ranks).unwrap(), call.expected(ranks.rank()));
            ranks.barrier().unwrap();
        });
    }
}

// ---------------------------------------------------------------------------------------------
// The same errors as threads

/// The errors of all ranks for `body`, of threads and of processes, which must be of one kind and place.
fn same_errors(
    world_size: usize,
    deadline: Duration,
    body: impl Fn(&mut dyn Communicator) -> Result<(), EpError> + Sync,
) -> Vec<EpError> {
    let first_error = |ranks: &mut dyn Communicator| {
        let start = Instant::now();
        ranks.set_label("layer 3");
        let error = body(ranks).expect_err("a fault");
        assert!(start.elapsed() < deadline + SLACK, "{error}");
        let later = ranks.barrier().unwrap_err();
        assert!(matches!(later.kind, EpErrorKind::Poisoned { .. }), "{later}");
        assert!(ranks.health().cause.is_some());
        error
    };
    let threads = launch(world_size, deadline, |mut ranks| first_error(&mut ranks)).unwrap();
    let procs = on_procs(world_size, deadline, |mut ranks| first_error(&mut ranks));
    let threads: Vec<_> = threads.into_iter().map(Result::unwrap).collect();
    assert_eq!(threads, procs);
    procs
}

fn ones(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn a_rank_that_is_out_of_step_is_named_as_among_threads() {
    for error in same_errors(4, PATIENT, |ranks| {
        ranks.barrier()?;
        if ranks.rank() != 2 {
            ranks.all_gather(&ones((1, 2)), &[1; 4])?;
        }
        ranks.reduce_scatter(&ones((4, 2)), &[1; 4]).map(drop)
    }) {
        assert!(matches!(error.kind, EpErrorKind::Desync { rank: 2, .. }), "{error}");
        assert_eq!((error.step, error.label.as_str()), (1, "layer 3"));
    }
    for error in same_errors(3, PATIENT, |ranks| {
        let width = if ranks.rank() == 1 { 5 } else { 4 };
        ranks.all_gather(&ones((1, width)), &[1; 3]).map(drop)
    }) {
        assert!(matches!(error.kind, EpErrorKind::Desync { rank: 1, .. }), "{error}");
    }
}

#[test]
fn bad_arguments_and_aborts_are_heard_by_all_processes() {
    let errors = same_errors(3, PATIENT, |ranks| match ranks.rank() {
        1 => ranks.all_gather(&ones((3, 2)), &[1; 3]).map(drop),
        _ => ranks.all_gather(&ones((1, 2)), &[1; 3]).map(drop),
    });
    assert!(matches!(errors[1].kind, EpErrorKind::BadArgument(_)));
    assert!(matches!(errors[0].kind, EpErrorKind::Aborted { by: Some(1), .. }));
    for error in same_errors(3, PATIENT, |ranks| {
        if ranks.rank() == 2 {
            thread::sleep(Duration::from_millis(50));
            ranks.abort_handle().abort("shutting down");
        }
        ranks.barrier()
    }) {
        let aborted = EpErrorKind::Aborted { by: Some(2), reason: "shutting down".into() };
        assert_eq!(error.kind, aborted);
    }
}

#[test]
fn a_process_that_is_late_is_named_at_the_deadline() {
    let deadline = Duration::from_millis(300);
    for error in same_errors(3, deadline, |ranks| {
        ranks.barrier()?;
        if ranks.rank() == 1 {
            while ranks.health().cause.is_none() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        ranks.all_reduce(&ones(2)).map(drop)
    }) {
        assert_eq!(error.kind, EpErrorKind::Timeout { missing: vec![1], deadline });
        assert_eq!((error.op, error.step), (Collective::AllReduce, 1));
    }
}

#[test]
fn a_process_that_leaves_or_panics_is_named() {
    let errors = on_procs(3, PATIENT, |mut ranks| {
        ranks.barrier().unwrap();
        if ranks.rank() == 1 { None } else { Some(ranks.barrier().unwrap_err()) }
    });
    for error in errors.into_iter().flatten() {
        assert_eq!((error.kind, error.step), (EpErrorKind::RankLeft { rank: 1 }, 1));
    }
    let errors = on_procs(3, PATIENT, |mut ranks| {
        let rank = ranks.rank();
        ranks.barrier().unwrap();
        if rank > 0 {
            return Some(ranks.barrier().unwrap_err());
        }
        let panic = thread::spawn(move || {
            let _ranks = ranks;
            panic!("on purpose");
        });
        assert!(panic.join().is_err());
        None
    });
    for error in errors.into_iter().flatten() {
        assert_eq!(error.kind, EpErrorKind::RankPanicked { rank: 0 });
    }
}

#[test]
fn processes_rebuild_as_the_next_generation() {
    on_procs(3, PATIENT, |mut ranks| {
        for generation in 0..4 {
            assert_eq!((ranks.generation(), ranks.config().generation), (generation, generation));
            let call = Call::new(generation, 3);
            assert_eq!(call.make(&mut ranks).unwrap(), call.expected(ranks.rank()));
            if ranks.rank() == generation as usize % 3 {
                ranks.abort_handle().abort("again");
            }
            ranks.barrier().unwrap_err();
            ranks = ranks.rebuild().unwrap();
        }
    });
}

// ---------------------------------------------------------------------------------------------
// Rendezvous

/// Lets ranks with these configurations join at the same time, each `late` milliseconds after the start.
fn join_all(configs: &[(ProcsConfig, u64)], deadline: Duration) -> Vec<Result<(), EpError>> {
    thread::scope(|scope| {
        let join = |(config, late): &(ProcsConfig, u64)| {
            let (config, late) = (config.clone(), Duration::from_millis(*late));
            scope.spawn(move || {
                thread::sleep(late);
                let start = Instant::now();
                let result = Procs::join(config, deadline).and_then(|mut ranks| ranks.barrier());
                assert!(start.elapsed() < deadline + SLACK, "{result:?}");
                result.inspect_err(|error| {
                    assert_eq!((error.op, error.step), (Collective::Rendezvous, 0), "{error}");
                    assert!(error.to_string().starts_with(&format!("rank {}: rendezvous", error.rank)), "{error}");
                })
            })
        };
        let ranks: Vec<_> = configs.iter().map(join).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn a_late_rank_is_waited_for_whichever_it_is() {
    for late in 0..3 {
        let port = free_port();
        let configs: Vec<_> = (0..3).map(|rank| (config(rank, 3, port), u64::from(rank == late) * 300)).collect();
        for result in join_all(&configs, PATIENT) {
            result.unwrap();
        }
    }
}

#[test]
fn missing_ranks_are_listed_by_everybody() {
    let port = free_port();
    let deadline = Duration::from_millis(500);
    let configs: Vec<_> = [0, 2, 4].into_iter().map(|rank| (config(rank, 5, port), 0)).collect();
    for result in join_all(&configs, deadline) {
        let error = result.unwrap_err();
        assert_eq!(error.kind, EpErrorKind::Timeout { missing: vec![1, 3], deadline });
    }
    // Rank 0 itself: nobody else knows who is missing.
    let port = free_port();
    for result in join_all(&[(config(1, 3, port), 0), (config(2, 3, port), 0)], deadline) {
        let error = result.unwrap_err();
        let EpErrorKind::Unreachable(what) = &error.kind else { panic!("{error}") };
        assert!(what.contains("rank 0") && what.contains(&port.to_string()), "{what}");
    }
    // One that comes when the others have given up.
    let port = free_port();
    let late = deadline.as_millis() as u64 + 300;
    let results = join_all(&[(config(0, 2, port), 0), (config(1, 2, port), late)], deadline);
    assert_eq!(results[0].clone().unwrap_err().kind, EpErrorKind::Timeout { missing: vec![1], deadline });
    assert!(matches!(results[1].clone().unwrap_err().kind, EpErrorKind::Unreachable(_)));
}

/// All ranks get an error at once; returns their kinds.
fn refused(configs: &[(ProcsConfig, u64)]) -> Vec<EpErrorKind> {
    let start = Instant::now();
    let results = join_all(configs, Duration::from_secs(4));
    assert!(start.elapsed() < Duration::from_secs(3), "not at once");
    results.into_iter().map(|result| result.unwrap_err().kind).collect()
}

#[test]
fn a_rank_that_is_there_twice_is_named_by_everybody() {
    let port = free_port();
    let configs =
        [(config(0, 4, port), 0), (config(1, 4, port), 0), (config(2, 4, port), 0), (config(2, 4, port), 200)];
    assert_eq!(refused(&configs), vec![EpErrorKind::DuplicateRank { rank: 2 }; 4]);
    // A second rank 0 finds the place taken.
    let port = free_port();
    let results = join_all(&[(config(0, 2, port), 0), (config(0, 2, port), 100), (config(1, 2, port), 300)], PATIENT);
    let EpErrorKind::Unreachable(what) = results[1].clone().unwrap_err().kind else { panic!("{:?}", results[1]) };
    assert!(what.contains("cannot listen"), "{what}");
    assert_eq!((results[0].clone(), results[2].clone()), (Ok(()), Ok(())));
}

#[test]
fn a_rank_of_another_group_is_named_by_everybody() {
    let port = free_port();
    let mismatch = |rank, field: &str, expected: &str, found: &str| EpErrorKind::Mismatch {
        rank,
        expected: format!("{field} {expected}"),
        found: format!("{field} {found}"),
    };
    let configs = [(config(0, 3, port), 0), (config(1, 3, port), 0), (config(2, 4, port), 200)];
    assert_eq!(refused(&configs), vec![mismatch(2, "world_size", "3", "4"); 3]);

    // The group is of an older generation than a rank.
    let port = free_port();
    let newer = ProcsConfig { generation: 5, ..config(2, 3, port) };
    let configs = [(config(0, 3, port), 0), (config(1, 3, port), 0), (newer, 200)];
    assert_eq!(refused(&configs), vec![EpErrorKind::OldGeneration { generation: 0, current: 5 }; 3]);

    // A straggler of an old generation is refused, and disturbs nobody.
    let port = free_port();
    let new = |rank| ProcsConfig { generation: 5, ..config(rank, 3, port) };
    let configs = [(new(0), 0), (new(1), 0), (config(2, 3, port), 100), (new(2), 300)];
    let mut results = join_all(&configs, PATIENT);
    let straggler = results.remove(2).unwrap_err();
    assert_eq!(straggler.kind, EpErrorKind::OldGeneration { generation: 0, current: 5 });
    assert_eq!(results, [Ok(()), Ok(()), Ok(())]);
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    for (config, word) in [
        (config(0, 0, 1), "world_size is 0"),
        (config(0, 65, 1), "world_size is 65"),
        (config(2, 2, 1), "rank is 2"),
        (config(0, 2, 0), "port is 0"),
    ] {
        let error = Procs::join(config, PATIENT).unwrap_err();
        assert!(matches!(&error.kind, EpErrorKind::BadArgument(what) if what.contains(word)), "{error}");
    }
    let mut alone = Procs::join(config(0, 1, 0), PATIENT).unwrap();
    assert_eq!(Call::new(3, 1).make(&mut alone).unwrap(), Call::new(3, 1).expected(0));
    let nowhere = ProcsConfig { address: "no.such.host.invalid".into(), ..config(1, 2, free_port()) };
    let error = Procs::join(nowhere, Duration::from_millis(200)).unwrap_err();
    assert!(matches!(&error.kind, EpErrorKind::Unreachable(what) if what.contains("no.such.host")), "{error}");
}

// ---------------------------------------------------------------------------------------------
// Strangers

fn frame(header: &str, payload_len: u64, payload: &[u8]) -> Vec<u8> {
    let len = (header.len() as u32).to_le_bytes();
    [b"cMoE", &len[..], &payload_len.to_le_bytes(), header.as_bytes(), payload].concat()
}

fn hello(rank: usize, version: &str) -> Vec<u8> {
    hello_of(rank, 2, version)
}

fn hello_of(rank: usize, world_size: usize, version: &str) -> Vec<u8> {
    let hello = format!(r#"{{"rank":{rank},"world_size":{world_size},"version":"{version}","port":1,"token":0}}"#);
    frame(&format!(r#"{{"generation":0,"message":{{"Hello":{hello}}}}}"#), 0, &[])
}

fn connect(port: u16) -> TcpStream {
    let start = Instant::now();
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(error) => assert!(start.elapsed() < PATIENT, "{error}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Reads until rank 0 has said this.
fn hear(stream: &mut TcpStream, word: &str) {
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains(word) {
        let mut bytes = [0; 512];
        let len = stream.read(&mut bytes).unwrap();
        assert!(len > 0, "no {word} in {}", String::from_utf8_lossy(&said));
        said.extend(&bytes[..len]);
    }
}

#[test]
fn strangers_at_the_door_cost_nothing() {
    let port = free_port();
    let strangers: Vec<Vec<u8>> = vec![
        vec![],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 1000],
        [b"cMoE", &[0xff; 12][..]].concat(),
        frame("{}", u64::MAX, &[]),
        frame(r#"{"generation":0,"message":{"Leave":{"panicked":false}}}"#, 0, &[]),
        frame(&"[".repeat(60_000), 0, &[]),
        hello(1, "x")[..40].to_vec(),
    ];
    let results = thread::scope(|scope| {
        let first = scope.spawn(|| Procs::join(config(0, 2, port), PATIENT).and_then(|mut ranks| ranks.barrier()));
        let open: Vec<_> = strangers
            .iter()
            .map(|bytes| {
                let mut stream = connect(port);
                stream.write_all(bytes).unwrap();
                stream
            })
            .collect();
        let second = Procs::join(config(1, 2, port), PATIENT).and_then(|mut ranks| ranks.barrier());
        drop(open);
        [first.join().unwrap(), second]
    });
    assert_eq!(results, [Ok(()), Ok(())]);
}

#[test]
fn another_version_is_named_on_both_sides() {
    let port = free_port();
    let (error, answer) = thread::scope(|scope| {
        let first = scope.spawn(|| Procs::join(config(0, 2, port), PATIENT).unwrap_err());
        let mut stream = connect(port);
        stream.write_all(&hello(1, "0.0.7")).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        (first.join().unwrap(), String::from_utf8_lossy(&answer).into_owned())
    });
    let text = error.to_string();
    let version = env!("CARGO_PKG_VERSION");
    assert!(text.contains("rank 1") && text.contains("0.0.7") && text.contains(version), "{text}");
    assert!(answer.contains("0.0.7") && answer.contains(version), "{answer}");
}

#[test]
fn a_rank_that_dies_during_the_rendezvous_is_named_by_everybody() {
    let port = free_port();
    let step = |rank| Procs::join(config(rank, 3, port), PATIENT).and_then(|mut ranks| ranks.barrier()).unwrap_err();
    let start = Instant::now();
    let errors = thread::scope(|scope| {
        let ranks = [0, 1].map(|rank| scope.spawn(move || step(rank)));
        let mut stream = connect(port);
        stream.write_all(&hello_of(2, 3, env!("CARGO_PKG_VERSION"))).unwrap();
        hear(&mut stream, "Welcome");
        drop(stream);
        ranks.map(|rank| rank.join().unwrap())
    });
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    for error in errors {
        assert!(matches!(error.kind, EpErrorKind::RankLost { rank: 2, .. }), "{error}");
        assert_eq!(error.op, Collective::Rendezvous);
    }
}

/// The header of the next message.
fn heard(stream: &mut TcpStream) -> serde_json::Value {
    let mut prefix = [0; 16];
    stream.read_exact(&mut prefix).unwrap();
    let mut header = vec![0; u32::from_le_bytes(prefix[4..8].try_into().unwrap()) as usize];
    stream.read_exact(&mut header).unwrap();
    serde_json::from_slice(&header).unwrap()
}

/// Becomes rank 2 of 3; returns its connections to ranks 0 and 1.
fn third_member(port: u16) -> [TcpStream; 2] {
    let version = env!("CARGO_PKG_VERSION");
    let mut first = connect(port);
    first.write_all(&hello_of(2, 3, version)).unwrap();
    let welcome = loop {
        let message = heard(&mut first)["message"].take();
        if message["Welcome"].is_object() {
            break message["Welcome"].clone();
        }
    };
    let mut second = TcpStream::connect(welcome["addresses"][1].as_str().unwrap()).unwrap();
    let token = format!(r#""token":{}"#, welcome["token"]);
    let with_token = String::from_utf8(hello_of(2, 3, version)[16..].to_vec()).unwrap().replace(r#""token":0"#, &token);
    second.write_all(&frame(&with_token, 0, &[])).unwrap();
    first.write_all(&frame(r#"{"generation":0,"message":"Ready"}"#, 0, &[])).unwrap();
    hear(&mut first, "Begin");
    [first, second]
}

/// A rank stops after its posts of two calls have reached one of the others, and one post the other: that one waits for it,
/// and is itself waited for. Whoever gives up first, both blame the one that has stopped.
#[test]
fn a_rank_that_waits_itself_is_not_blamed() {
    let barrier = |step: u64| {
        let call = r#""op":"Barrier","label":"","dtype":null,"shape":[],"counts":[],"num_rows":0"#;
        frame(&format!(r#"{{"generation":0,"message":{{"Call":{{"step":{step},{call}}}}}}}"#), 0, &[])
    };
    for deadlines in [[300, 350], [350, 300], [300, 300], [300, 1500]].map(|ms| ms.map(Duration::from_millis)) {
        let port = free_port();
        let serve = |rank: usize| {
            let mut ranks = Procs::join(config(rank, 3, port), PATIENT).unwrap();
            ranks.set_deadline(deadlines[rank]);
            let start = Instant::now();
            let error = (0..3).find_map(|_| ranks.barrier().err()).unwrap();
            assert!(start.elapsed() < deadlines[rank] + SLACK, "{:?}", start.elapsed());
            (error, ranks)
        };
        thread::scope(|scope| {
            let ranks = [0, 1].map(|rank| scope.spawn(move || serve(rank)));
            let [mut first, mut second] = third_member(port);
            first.write_all(&[barrier(0), barrier(1)].concat()).unwrap();
            second.write_all(&barrier(0)).unwrap();
            // Not before its post of the second call is there.
            thread::sleep(Duration::from_millis(20));
            first.write_all(&barrier(2)).unwrap();
            let ended = ranks.map(|rank| rank.join().unwrap());
            for (error, _) in &ended {
                assert!(matches!(error.kind, EpErrorKind::Timeout { .. }), "{error}");
                assert_eq!(accused(&error.kind), [2], "{error}");
            }
            assert_eq!((ended[0].0.step, ended[1].0.step), (2, 1));
        });
    }
}

/// A member that does not keep to the rules is lost, by name, and what it announces is not reserved.
#[test]
fn a_hostile_member_is_lost() {
    let call = |fields: &str| format!(r#"{{"generation":0,"message":{{"Call":{{{fields}}}}}}}"#);
    let all_gather = |step: u64, shape: &str, counts: &str, num_rows: &str| {
        call(&format!(
            r#""op":"AllGather","step":{step},"label":"","dtype":"f32","shape":{shape},"counts":{counts},"num_rows":{num_rows}"#
        ))
    };
    let of_op = |op: &str, dtype: &str| {
        call(&format!(r#""op":"{op}","step":0,"label":"","dtype":{dtype},"shape":[2],"counts":[],"num_rows":1"#))
    };
    for (bytes, word) in [
        (b"nonsense, and then some more".to_vec(), "expected"),
        (frame("{}", 0, &[]), "header that is none"),
        (frame(&all_gather(0, "[2]", "[1,1]", "1"), 7, &[0; 7]), "announced 7 bytes"),
        (frame(&all_gather(0, "[2]", "[1,1]", "1"), 1 << 40, &[]), "the limit is"),
        (frame(&all_gather(0, "[1073741824]", "[1,1]", "1"), 1 << 32, &[0; 64]), "without a farewell"),
        (frame(&all_gather(0, "[4294967296,4294967296]", "[1,1]", "4294967296"), 8, &[0; 8]), "no memory holds"),
        (frame(&all_gather(0, "[2]", "[1,9]", "1"), 8, &[0; 8]), "counts [1, 9]"),
        (frame(&all_gather(7, "[2]", "[1,1]", "1"), 8, &[0; 8]), "step 7"),
        (frame(&of_op("Barrier", r#""f32""#), 8, &[0; 8]), "barrier with dtype"),
        (frame(&of_op("AllReduce", "null"), 8, &[0; 8]), "all_reduce with dtype"),
        (frame(&of_op("AllReduce", r#""f4""#), 8, &[0; 8]), "does not travel"),
        (frame(&of_op("Rendezvous", r#""f32""#), 8, &[0; 8]), "rendezvous with dtype"),
        (frame(r#"{"generation":3,"message":{"Leave":{"panicked":false}}}"#, 0, &[]), "generation 3 to generation 0"),
        (hello(1, env!("CARGO_PKG_VERSION")), "belongs to a rendezvous"),
    ] {
        let port = free_port();
        let error = thread::scope(|scope| {
            let first = scope.spawn(|| {
                let mut ranks = Procs::join(config(0, 2, port), PATIENT).unwrap();
                ranks.all_gather(&ones((1, 2)), &[1, 1]).unwrap_err()
            });
            let mut stream = connect(port);
            stream.write_all(&hello(1, env!("CARGO_PKG_VERSION"))).unwrap();
            stream.write_all(&frame(r#"{"generation":0,"message":"Ready"}"#, 0, &[])).unwrap();
            hear(&mut stream, "Begin");
            stream.write_all(&bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            first.join().unwrap()
        });
        let EpErrorKind::RankLost { rank: 1, reason } = &error.kind else { panic!("{word}: {error}") };
        assert!(reason.contains(word), "{word}: {reason}");
        assert_eq!((error.op, error.step), (Collective::AllGather, 0));
    }
}

// ---------------------------------------------------------------------------------------------
// Real processes, killed and stopped

pub(crate) const SERVING: Duration = Duration::from_millis(600);
pub(crate) const CHECKED_STEPS: u64 = 5;

/// Ranks that are struck.
pub(crate) struct Kind {
    /// What a rank is: an ignored test that says `ready`, `error` and `done`.
    pub(crate) test: &'static str,
    /// How many there are, by seed.
    pub(crate) world_size: fn(u64) -> usize,
    /// Groups at once.
    pub(crate) groups: usize,
}

const ON_THE_HOST: Kind =
    Kind { test: "procs::rank_as_a_process", world_size: |seed| 2 + (seed % 3) as usize, groups: 3 };

fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()
}

/// Says something to the test that started this process, in a line of its own and with the time.
pub(crate) fn say(what: &str) {
    eprintln!("@{} {what}", now_us());
}

/// The rank that this process was started as, and its number on the machine.
pub(crate) fn joined() -> Option<(usize, Procs)> {
    let environment = Environment::detect(&Overrides::default()).unwrap()?;
    let serving = Duration::from_millis(std::env::var("TEST_SERVING_MS").ok()?.parse().unwrap());
    let deadlines = Deadlines { warm_up: PATIENT, serving };
    Some((environment.local_rank, Procs::join(ProcsConfig::from(&environment), deadlines).unwrap()))
}

/// Says what went wrong in a step, and what was the cause of it.
pub(crate) fn say_error(ranks: &dyn Communicator, error: candle_core::Error) {
    let cause = ranks.health().cause.unwrap();
    say(&format!("error {}", serde_json::to_string(&(line(error), cause)).unwrap()));
}

/// Not a test: a rank that a test below starts as a process of its own. It steps until something fails, then meets the
/// others anew and makes a few more steps.
#[test]
#[ignore = "run by the tests that start ranks as processes"]
fn rank_as_a_process() {
    let Some((_, mut ranks)) = joined() else { return };
    let cases: Vec<Case> = Way::all(ranks.world_size()..ranks.world_size() + 1).map(Way::faultless).collect();
    if ranks.generation() == 0 {
        ranks.barrier().unwrap();
        ranks.start_serving();
        say("ready");
        let error = (0..).find_map(|step| make_step(&mut ranks, &cases, step).err()).unwrap();
        say_error(&ranks, error);
        ranks = ranks.rebuild().unwrap();
    }
    ranks.barrier().unwrap();
    ranks.start_serving();
    ranks.set_deadline(PATIENT);
    (0..CHECKED_STEPS).for_each(|step| make_step(&mut ranks, &cases, step).unwrap());
    say(&format!("done in generation {}", ranks.generation()));
}

/// Collectives of any kind, and a forward step by every strategy and reduction; all of it must be right.
fn make_step(ranks: &mut Procs, cases: &[Case], step: u64) -> candle_core::Result<()> {
    ranks.set_label(&format!("step {step}"));
    let call = Call::new(step, ranks.world_size());
    assert_eq!(call.make(ranks)?, call.expected(ranks.rank()));
    // Long enough on the way to be interrupted there.
    let (rank, world_size) = (ranks.rank(), ranks.world_size());
    let mine = Tensor::full(rank as f32, (64, 1 << 10), &Device::Cpu).unwrap();
    let sum = ranks.all_reduce(&mine)?.max_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(sum, (world_size * (world_size - 1) / 2) as f32);
    cases.iter().try_for_each(|case| case.step(ranks, step as usize))
}

/// A rank that is a process, and what it says. It is killed when this is dropped.
struct Rank {
    child: Child,
    said: Receiver<(u128, String)>,
}

impl Rank {
    fn start(test: &str, (rank, world_size): (usize, usize), port: u16, generation: u64, serving: Duration) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", world_size.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .env("TORCHELASTIC_RESTART_COUNT", generation.to_string())
            .env("TEST_SERVING_MS", serving.as_millis().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (sender, said) = channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let said = line.strip_prefix('@').and_then(|line| line.split_once(' '));
                let (time, what) = match said {
                    Some((time, what)) => (time.parse().unwrap(), what.to_string()),
                    None => (0, line),
                };
                if sender.send((time, what)).is_err() {
                    return;
                }
            }
        });
        Self { child, said }
    }

    /// The next thing it says, which must begin with `beginning`, and when it said it.
    fn hear(&self, beginning: &str) -> (u128, String) {
        let mut noise = String::new();
        loop {
            match self.said.recv_timeout(PATIENT) {
                Ok((0, line)) => noise += &(line + "\n"),
                Ok((time, what)) => {
                    let rest = what.strip_prefix(beginning);
                    return (time, rest.unwrap_or_else(|| panic!("{what}, not {beginning}\n{noise}")).to_string());
                }
                Err(error) => panic!("no {beginning}: {error}\n{noise}"),
            }
        }
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    fn end(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Blow {
    Kill,
    /// It is killed once the others have given up.
    Stop,
    /// It goes on once the others have given up.
    Pause,
}

/// What a process says of its first error, and of that of its group: when, and what.
fn hear_error(process: &Rank, rank: usize) -> (u128, EpError) {
    let (time, error) = process.hear("error ");
    let (text, cause): (String, EpError) = serde_json::from_str(&error).unwrap();
    assert!(text.starts_with(&format!("rank {rank}: ")) && text.contains("(step "), "{text}");
    assert_named(&cause);
    (time, cause)
}

/// Strikes one of several ranks in the middle of a step; returns how long the others took to hear of it, and where.
fn strike(kind: &Kind, seed: u64, blow: Blow) -> Vec<(Duration, String)> {
    let world_size = (kind.world_size)(seed);
    let victim = (seed / 3) as usize % world_size;
    let port = free_port();
    let serving = if blow == Blow::Kill { PATIENT } else { SERVING };
    let start = |rank, generation| Rank::start(kind.test, (rank, world_size), port, generation, serving);
    let mut ranks: Vec<_> = (0..world_size).map(|rank| start(rank, 0)).collect();
    ranks.iter().for_each(|rank| drop(rank.hear("ready")));
    thread::sleep(Duration::from_micros(1000 + seed * 1234 % 20_000));
    let struck = now_us();
    ranks[victim].signal(if blow == Blow::Kill { "-KILL" } else { "-STOP" });
    let mut times = Vec::new();
    for (rank, process) in ranks.iter().enumerate().filter(|(rank, _)| *rank != victim) {
        let (time, error) = hear_error(process, rank);
        assert_eq!(accused(&error.kind), [victim], "{error}");
        match blow {
            Blow::Kill => assert!(matches!(error.kind, EpErrorKind::RankLost { .. }), "{error}"),
            _ => assert!(matches!(error.kind, EpErrorKind::Timeout { .. }), "{error}"),
        }
        times.push((Duration::from_micros(time.saturating_sub(struck) as u64), error.label));
    }
    if blow == Blow::Pause {
        ranks[victim].signal("-CONT");
        hear_error(&ranks[victim], victim);
    } else {
        ranks[victim] = start(victim, 1);
    }
    for rank in ranks {
        assert_eq!(rank.hear("done").1, " in generation 1");
        assert!(rank.end().success());
    }
    times
}

/// Strikes twenty times, a few at a time; the longest that a survivor took.
pub(crate) fn strike_often(kind: &Kind, blow: impl Fn(u64) -> Blow + Sync, name: &str, limit: Duration) {
    let next = std::sync::atomic::AtomicU64::new(0);
    let mut times: Vec<(Duration, String)> = thread::scope(|scope| {
        let group = || {
            let mut times = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= 20 {
                    return times;
                }
                times.extend(strike(kind, seed, blow(seed)));
            }
        };
        let groups: Vec<_> = (0..kind.groups).map(|_| scope.spawn(group)).collect();
        groups.into_iter().flat_map(|group| group.join().unwrap()).collect()
    });
    times.sort();
    let (median, longest) = (times[times.len() / 2].0, times[times.len() - 1].0);
    let in_layers = times.iter().filter(|(_, label)| label.starts_with("layer")).count();
    let survivors = format!("{} survivors, {in_layers} of them in a layer", times.len());
    println!("{name}: {survivors}, heard of it within {median:?} (median), {longest:?} (longest)");
    assert!(longest < limit, "{longest:?}");
}

#[test]
fn processes_that_are_killed_are_named_within_a_second_and_replaced() {
    strike_often(&ON_THE_HOST, |_| Blow::Kill, "killed", Duration::from_secs(1));
}

#[test]
fn processes_that_are_stopped_are_named_at_the_deadline_and_replaced_or_return() {
    let blow = |seed| if seed % 2 == 0 { Blow::Stop } else { Blow::Pause };
    strike_often(&ON_THE_HOST, blow, "stopped", SERVING + SLACK);
}
