//! `gpt_oss`, run as a program.

use crate::checkpoint::Folder;
use crate::gpt_oss::{goldens, prompt, tiny_folder};
use crate::gpt_oss_parts::Stored;
use crate::procs::free_port;
use crate::program::{assert_rejected, json_of, keys, run, run_unread, start, stdout_of, text};
use candle_core::{DType, Device};
use serde_json::Value;

const NAME: &str = "gpt_oss";

fn list(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect()
}

fn spread(slots: &[u64]) -> u64 {
    slots.iter().max().unwrap() - slots.iter().min().unwrap()
}

fn golden_ids() -> String {
    prompt(&goldens()).iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn help_names_every_flag() {
    let help = stdout_of(NAME, &["--help"]);
    for flag in [
        "model",
        "device",
        "dtype",
        "ep-size",
        "launch",
        "reduction",
        "strategy",
        "perfect-router",
        "prompt",
        "input-ids",
        "input-ids-file",
        "max-new-tokens",
        "temperature",
        "top-p",
        "seed",
        "dump",
        "no-comparison",
        "physical-experts",
        "output",
    ] {
        assert!(help.contains(&format!("--{flag}")), "--{flag} is missing in\n{help}");
    }
}

#[test]
fn without_arguments_it_generates_and_compares_learned_with_perfect() {
    let table = stdout_of(NAME, &[]);
    for words in ["4 layers, 8 experts, top-4", "generated ids", "token ids only", "learned", "perfect", "meaningless"]
    {
        assert!(table.contains(words), "{words:?} is missing in\n{table}");
    }
    let perfect = table.lines().find(|line| line.starts_with(" max / mean")).unwrap();
    assert!(perfect.contains("1.000"), "{perfect}");
    let readme = include_str!("../../README.md");
    for line in table.lines().filter(|line| line.contains("routing   prompt tokens") || line.contains("4 layers")) {
        let line = line.split(';').next().unwrap();
        assert!(readme.contains(line.trim_end()), "the README shows another output than {line:?}");
    }
}

#[test]
fn json_has_these_keys_and_types() {
    let report = json_of(NAME, &["--output", "json", "--ep-size", "2", "--physical-experts", "9"]);
    assert_eq!(
        keys(&report),
        "comparison object, device string, dtype string, ep_size number, generated_ids array, launch string, load array, model string, \
         perfect_router bool, placement array, prompt_ids array, reduction string, strategy string, text null, timing object, \
         warning null"
    );
    let timing = "decode_seconds number, decode_steps number, decode_tokens_per_second number";
    let prompt = "prompt_seconds number, prompt_tokens_per_second number";
    assert_eq!(keys(&report["comparison"]), "load array, perfect_router bool, timing object");
    assert_eq!(keys(&report["comparison"]["timing"]), format!("{timing}, {prompt}"));
    let reading = "expert_bytes number, expert_gb_per_second number, load_seconds number";
    assert_eq!(keys(&report["timing"]), format!("{timing}, {reading}, {prompt}"));
    for load in [&report["load"], &report["comparison"]["load"]] {
        assert_eq!(load.as_array().unwrap().len(), 4);
        for layer in load.as_array().unwrap() {
            let expected = "layer number, max_minus_min_per_rank number, slots_per_expert array, slots_per_rank array";
            assert_eq!(keys(layer), expected);
        }
    }
    assert_eq!(report["placement"].as_array().unwrap().len(), 4);
    for layer in report["placement"].as_array().unwrap() {
        assert_eq!(
            keys(layer),
            "imbalance_after number, imbalance_before number, imbalance_expected number, layer number, \
             physical_to_expert array, slots_per_rank array"
        );
    }
    let alone = json_of(NAME, &["--output", "json", "--perfect-router", "--no-comparison"]);
    assert!(alone["warning"].is_string() && alone["comparison"].is_null() && alone["placement"].is_null(), "{alone}");
}

#[test]
fn json_carries_the_goldens_greedy_tokens_for_every_number_of_ranks() {
    let expected = goldens()["f32.greedy_ids"].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    let expected: Vec<u64> = expected.into_iter().map(u64::from).collect();
    for ep_size in ["1", "2", "3", "4", "8"] {
        let ids = golden_ids();
        let report = json_of(NAME, &["--input-ids", &ids, "--ep-size", ep_size, "--output", "json"]);
        assert_eq!(list(&report["generated_ids"]), expected);
        assert_eq!(report["text"], Value::Null);
        assert_eq!(report["ep_size"].to_string(), ep_size);
        assert_eq!(report["perfect_router"], false);
        assert!(report["timing"]["decode_seconds"].as_f64().unwrap() > 0.0);
        assert_eq!(report["load"].as_array().unwrap().len(), 4);
        for layer in report["load"].as_array().unwrap() {
            // 45 tokens of the prompt and 23 that were fed back, four slots each.
            assert_eq!(list(&layer["slots_per_rank"]).iter().sum::<u64>(), 4 * (45 + 23));
            assert_eq!(list(&layer["slots_per_expert"]).len(), 8);
        }
        assert_eq!(report["comparison"]["perfect_router"], true);
    }
}

#[test]
fn ranks_as_processes_generate_what_threads_do() {
    let ids = golden_ids();
    for ep_size in ["1", "3", "4"] {
        let report = |launch| {
            let args = ["--launch", launch, "--input-ids", &ids, "--ep-size", ep_size, "--output", "json"];
            let mut report = json_of(NAME, &args);
            assert_eq!(report["launch"], launch);
            report["launch"] = Value::Null;
            report["timing"] = Value::Null;
            report["comparison"]["timing"] = Value::Null;
            report
        };
        let threads = report("threads");
        assert_eq!(list(&threads["generated_ids"]).len(), 24);
        assert_eq!(report("procs"), threads);
    }
}

/// As torchrun would start them.
fn start_rank(rank: usize, world_size: usize, port: u16, args: &[&str]) -> std::process::Child {
    let (rank, world_size, port) = (rank.to_string(), world_size.to_string(), port.to_string());
    let variables = [
        ("RANK", rank.as_str()),
        ("LOCAL_RANK", rank.as_str()),
        ("WORLD_SIZE", world_size.as_str()),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port.as_str()),
    ];
    start(NAME, args, &variables)
}

#[test]
fn ranks_of_a_launcher_join_and_rank_0_reports() {
    let port = free_port();
    let ranks: Vec<_> = (0..3).map(|rank| start_rank(rank, 3, port, &["--output", "json"])).collect();
    let outputs: Vec<_> = ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect();
    for (rank, output) in outputs.iter().enumerate() {
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
        assert_eq!(output.stdout.is_empty(), rank > 0);
    }
    let report: Value = serde_json::from_slice(&outputs[0].stdout).unwrap();
    assert_eq!((&report["ep_size"], &report["launch"]), (&Value::from(3), &Value::from("procs")));
    let threads = json_of(NAME, &["--ep-size", "3", "--output", "json"]);
    assert_eq!(report["generated_ids"], threads["generated_ids"]);

    let output = start_rank(0, 3, port, &["--ep-size", "2"]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--ep-size 2: expected 3"), "{}", text(&output.stderr));
    let output = start_rank(0, 3, port, &["--physical-experts", "12"]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--physical-experts: expected ranks that are threads"));
    let output = start(NAME, &[], &[("RANK", "1")]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("WORLD_SIZE is not set"), "{}", text(&output.stderr));
    // Explicit configuration wins.
    let output = start(NAME, &["--launch", "threads"], &[("RANK", "1")]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
}

/// torchrun's agent listens at `MASTER_PORT` itself, and says so.
#[test]
fn ranks_of_torchrun_leave_its_port_to_its_agent() {
    let agent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = agent.local_addr().unwrap().port().to_string();
    let start = |rank| {
        let mut variables =
            [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")].to_vec();
        variables.extend([("MASTER_PORT", port.as_str()), ("TORCHELASTIC_USE_AGENT_STORE", "True")]);
        start(NAME, &["--output", "json"], &variables)
    };
    let outputs = ["0", "1"].map(start).map(|rank| rank.wait_with_output().unwrap());
    for output in &outputs {
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
    }
    let report: Value = serde_json::from_slice(&outputs[0].stdout).unwrap();
    assert_eq!((&report["ep_size"], &report["launch"]), (&Value::from(2), &Value::from("procs")));
}

#[test]
fn ranks_of_other_settings_are_named_at_the_start() {
    for (odd, words) in [
        (&["--reduction", "rank-partial"], "fingerprint: rank 2 has layer 0 reduction rank-partial"),
        (&["--strategy", "exchange"], "fingerprint: rank 2 has layer 0 strategy exchange"),
    ] {
        let port = free_port();
        let args = |rank| if rank == 2 { &odd[..] } else { &[] };
        let ranks: Vec<_> = (0..3).map(|rank| start_rank(rank, 3, port, args(rank))).collect();
        for rank in ranks {
            let output = rank.wait_with_output().unwrap();
            let stderr = text(&output.stderr);
            assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""), "{stderr}");
            assert!(stderr.contains(words), "{stderr}");
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_rank_that_dies_is_named_with_its_exit_status() {
    // Long enough that no rank has ended when one is killed.
    let args = ["--launch", "procs", "--ep-size", "3", "--max-new-tokens", "100000"];
    let program = start(NAME, &args, &[]);
    let children = format!("/proc/{0}/task/{0}/children", program.id());
    let started = std::time::Instant::now();
    let victim = loop {
        let children = std::fs::read_to_string(&children).unwrap();
        match children.split_whitespace().nth(2) {
            Some(child) => break child.to_string(),
            None => assert!(started.elapsed().as_secs() < 20, "no third rank"),
        }
    };
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(std::process::Command::new("kill").args(["-KILL", &victim]).status().unwrap().success());
    let killed = std::time::Instant::now();
    let output = program.wait_with_output().unwrap();
    assert!(killed.elapsed().as_secs() < 3, "{:?}", killed.elapsed());
    let stderr = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""), "{stderr}");
    assert!(stderr.contains("rank 2 ended with signal: 9"), "{stderr}");
    assert!(stderr.contains("lost rank 2"), "the ranks that live name it too: {stderr}");
}

/// Whether there are that many CUDA devices for a program to find; says so where not.
#[cfg(feature = "nccl")]
fn there_are(devices: usize) -> bool {
    let found = candle_core::cuda_backend::cudarc::driver::CudaContext::device_count().unwrap_or(0) as usize;
    if found < devices {
        crate::devices::say(&format!("SKIPPED on CUDA: {devices} devices are needed, there are {found}"));
    }
    found >= devices
}

#[cfg(feature = "nccl")]
#[test]
fn ranks_that_are_devices_generate_what_one_does_bit_for_bit() {
    if !there_are(2) {
        return;
    }
    let folder = Folder::new();
    let generate = |name: &str, more: &[&str]| {
        let file = folder.path().join(name);
        let (file_name, ids) = (file.to_str().unwrap(), golden_ids());
        let args = ["--device", "cuda", "--input-ids", &ids, "--max-new-tokens", "4", "--no-comparison"];
        let report = json_of(NAME, &[&args[..], &["--dump", file_name, "--output", "json"], more].concat());
        assert_eq!((&report["device"], &report["launch"]), (&Value::from("cuda"), &Value::from("threads")));
        (report, std::fs::read(file).unwrap())
    };
    let (alone, dump) = generate("alone", &[]);
    let expected = goldens()["f32.greedy_ids"].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    let generated: Vec<_> = expected.into_iter().take(4).map(u64::from).collect();
    assert_eq!(list(&alone["generated_ids"]), generated);
    for (ep_size, more) in [
        (2, &["--ep-size", "2"][..]),
        (4, &["--ep-size", "4", "--launch", "threads"]),
        (3, &["--ep-size", "3", "--strategy", "exchange"]),
        (2, &["--ep-size", "2", "--strategy", "peer"]),
        (3, &["--ep-size", "3", "--strategy", "peer", "--reduction", "rank-partial"]),
        (2, &["--ep-size", "2", "--reduction", "rank-partial"]),
    ] {
        if !there_are(ep_size) {
            continue;
        }
        let (report, of_ranks) = generate(&ep_size.to_string(), more);
        assert_eq!(list(&report["generated_ids"]), generated, "{more:?}");
        assert_eq!(report["ep_size"], ep_size);
        let asked = more.iter().find(|word| ["exchange", "peer"].contains(word));
        assert_eq!(report["strategy"], *asked.unwrap_or(&"gather"));
        if report["reduction"] == "slot-order" {
            assert!(of_ranks == dump, "{more:?}: the dump has other bits than that of one device");
        }
        let layers = |report: &Value| report["load"].as_array().unwrap().clone();
        for (layer, alone) in layers(&report).iter().zip(layers(&alone)) {
            assert_eq!(layer["slots_per_expert"], alone["slots_per_expert"], "{more:?}");
            assert_eq!(list(&layer["slots_per_rank"]).len(), ep_size);
        }
    }
}

#[cfg(feature = "nccl")]
#[test]
fn learned_and_perfect_routing_of_devices_are_compared() {
    if !there_are(2) {
        return;
    }
    let args = ["--ep-size", "2", "--input-ids", "1,2,3", "--max-new-tokens", "2"];
    let report = |more: &[&str]| json_of(NAME, &[&args[..], &["--output", "json"], more].concat());
    let (devices, host) = (report(&["--device", "cuda"]), report(&[]));
    assert_eq!(devices["generated_ids"], host["generated_ids"]);
    assert_eq!(devices["comparison"]["load"], host["comparison"]["load"]);
    let table = stdout_of(NAME, &[&args[..], &["--device", "cuda", "--perfect-router"]].concat());
    for words in ["cuda f32, 2 ranks, gather strategy", "WARNING: perfect routing", "1.000"] {
        assert!(table.contains(words), "{words:?} is missing in\n{table}");
    }
}

#[cfg(feature = "nccl")]
#[test]
fn ranks_that_cannot_have_a_device_each_are_refused_in_words() {
    if !there_are(2) {
        return;
    }
    for (args, words) in [
        (&["--device", "cuda", "--strategy", "gather"][..], &["--strategy", "auto or solo", "one rank"][..]),
        (&["--device", "cuda", "--ep-size", "2", "--strategy", "solo"], &["--strategy", "solo", "ep_size is 2"]),
        (&["--device", "cuda", "--ep-size", "2", "--physical-experts", "9"], &["--physical-experts", "--device cpu"]),
        (&["--ep-size", "2", "--strategy", "peer"], &["--strategy", "reach each other's memory"]),
        (
            &["--device", "cuda", "--ep-size", "2", "--strategy", "peer", "--launch", "procs"],
            &["--strategy", "reach each"],
        ),
        (&["--device", "cuda:0", "--ep-size", "2"], &["--device cuda:0", "each of 2 ranks", "--ep-size 1"]),
        (&["--device", "cuda:1", "--ep-size", "2", "--launch", "procs"], &["--device cuda:1", "each of 2 ranks"]),
    ] {
        assert_rejected(NAME, args, words);
    }
    if !there_are(8) {
        for launch in ["threads", "procs"] {
            let args = ["--device", "cuda", "--ep-size", "8", "--launch", launch];
            assert_rejected(NAME, &args, &["--ep-size 8", "CUDA devices", "choose fewer"]);
        }
        let output = start_rank(7, 8, free_port(), &["--device", "cuda"]).wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(2), ""), "{stderr}");
        assert!(stderr.contains("rank 7 of its machine") && stderr.contains("--device cuda:N"), "{stderr}");
    }
    // Each process has said which device it wants.
    let port = free_port();
    let ranks = [0, 1].map(|rank| start_rank(rank, 2, port, &["--device", "cuda:1"]));
    for rank in ranks {
        let output = rank.wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.contains("ranks 0 and 1 both have CUDA device 1"), "{stderr}");
    }
}

#[cfg(feature = "nccl")]
#[test]
fn a_library_that_cannot_be_loaded_is_named_before_the_weights_are_read() {
    if !there_are(2) {
        return;
    }
    // Weights that would be an error too, and a file of the library's name in front of it.
    let folder = Folder::new();
    std::fs::copy(format!("{}/config.json", tiny_folder()), folder.path().join("config.json")).unwrap();
    std::fs::write(folder.path().join("libnccl.so.2"), "no library").unwrap();
    let model = folder.path().to_str().unwrap();
    let libraries = format!("{model}:{}", std::env::var("LD_LIBRARY_PATH").unwrap_or_default());
    for launch in ["threads", "procs"] {
        let args = ["--model", model, "--device", "cuda", "--ep-size", "2", "--launch", launch];
        let output = start(NAME, &args, &[("LD_LIBRARY_PATH", &libraries)]).wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.contains("libnccl.so.2 cannot be loaded, NCCL 2.18.0 or newer is needed"), "{stderr}");
        assert!(!stderr.contains("safetensors"), "{stderr}");
    }
}

#[cfg(all(feature = "cuda", not(feature = "nccl")))]
#[test]
fn several_ranks_on_cuda_need_the_feature() {
    for more in [&[][..], &["--launch", "procs"]] {
        let args = [&["--device", "cuda", "--ep-size", "2"][..], more].concat();
        assert_rejected(NAME, &args, &["--ep-size 2", "without NCCL", "--features nccl", "--device cpu"]);
    }
}

#[test]
fn perfect_routing_is_balanced_in_every_layer_and_warns() {
    for (ids, new_tokens) in [("1", "1"), ("5,6,7", "1"), ("1,2,3,4,5,6,7,8,9", "24")] {
        for ep_size in ["1", "2", "3", "4", "8"] {
            let args = ["--perfect-router", "--input-ids", ids, "--ep-size", ep_size, "--max-new-tokens", new_tokens];
            let report = json_of(NAME, &[&args[..], &["--output", "json"]].concat());
            assert_eq!(report["perfect_router"], true);
            assert!(report["warning"].as_str().unwrap().contains("meaningless"));
            for layer in report["load"].as_array().unwrap() {
                assert!(spread(&list(&layer["slots_per_rank"])) <= 1, "{layer}");
            }
        }
    }
    assert!(stdout_of(NAME, &["--perfect-router"]).contains("WARNING: perfect routing"));
}

#[test]
fn experts_are_placed_by_the_load_of_the_run() {
    let arguments = ["--ep-size", "3", "--physical-experts", "12"];
    let report = json_of(NAME, &[&arguments[..], &["--output", "json"]].concat());
    let layers = report["placement"].as_array().unwrap();
    assert_eq!(layers.len(), 4);
    for (layer, load) in layers.iter().zip(report["load"].as_array().unwrap()) {
        let number = |name: &str| layer[name].as_f64().unwrap();
        let imbalance = |ranks: &Value| {
            let ranks = list(ranks);
            *ranks.iter().max().unwrap() as f64 * 3.0 / ranks.iter().sum::<u64>() as f64
        };
        let (before, after) = (number("imbalance_before"), number("imbalance_after"));
        assert!((before - imbalance(&load["slots_per_rank"])).abs() < 1e-9, "{layer}");
        assert!((after - imbalance(&layer["slots_per_rank"])).abs() < 1e-9, "{layer}");
        // 3, 3 and 2 experts cannot be even. Replicas are dealt by the token's number, so by chance not quite evenly.
        let expected = number("imbalance_expected");
        assert!((1.0..1.1).contains(&expected) && before > 1.1, "{before} to {expected}");
        assert!((after - expected).abs() < 0.1, "{after}, expected {expected}");
        // All slots of the first run were there in the second.
        assert_eq!(
            list(&layer["slots_per_rank"]).iter().sum::<u64>(),
            list(&load["slots_per_rank"]).iter().sum::<u64>()
        );
        assert_eq!(list(&layer["physical_to_expert"]).len(), 12);
    }
    // Perfect routing is not what experts are placed by: the learned run beside it is.
    let heading = "with up to 12 physical experts placed by this load\n";
    assert!(stdout_of(NAME, &[&arguments[..], &["--perfect-router"]].concat()).contains(heading));
    let table = stdout_of(NAME, &arguments);
    let (_, table) = table.split_once(heading).unwrap();
    for column in ["as it is", "expected", "placed", "physical experts", "experts of each rank"] {
        assert!(table.lines().next().unwrap().contains(column), "{column} in {table}");
    }
    // The same load as that of the run above, before and after, layer by layer.
    for (layer, line) in layers.iter().zip(table.lines().skip(2)) {
        let cells: Vec<_> = line.split_whitespace().collect();
        let names = ["imbalance_before", "imbalance_expected", "imbalance_after"];
        let expected = names.map(|name| format!("{:.3}", layer[name].as_f64().unwrap()));
        assert_eq!(cells[1..4], expected, "{line}");
        assert_eq!(cells[4], "12", "{line}");
        assert_eq!(line.matches('|').count(), 2, "three ranks in {line}");
    }
    assert_eq!(json_of(NAME, &["--output", "json"])["placement"], Value::Null);
}

#[test]
fn every_strategy_generates_the_same_tokens_among_threads_and_processes() {
    let of = |launch: &str, ep_size: &str, strategy: &str| {
        let args = ["--launch", launch, "--ep-size", ep_size, "--strategy", strategy, "--no-comparison"];
        let report = json_of(NAME, &[&args[..], &["--output", "json"]].concat());
        (report["strategy"].as_str().unwrap().to_string(), list(&report["generated_ids"]))
    };
    let expected = of("threads", "1", "auto").1;
    for (ep_size, strategy, name) in [
        ("1", "auto", "solo"),
        ("1", "replicated", "replicated"),
        ("4", "auto", "gather"),
        ("5", "auto", "exchange"),
        ("4", "exchange", "exchange"),
        ("5", "gather", "gather"),
    ] {
        for launch in ["threads", "procs"] {
            let found = of(launch, ep_size, strategy);
            assert_eq!(found, (name.to_string(), expected.clone()), "{ep_size} {launch}, {strategy}");
        }
    }
}

#[test]
fn the_dump_holds_what_the_goldens_hold() {
    let folder = Folder::new();
    let file = folder.path().join("dump.safetensors");
    let ids = golden_ids();
    stdout_of(NAME, &["--input-ids", &ids, "--max-new-tokens", "1", "--dump", file.to_str().unwrap()]);
    let dump = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let goldens = goldens();
    assert_eq!(dump.len(), 1 + 4 * 5);
    for (name, found) in &dump {
        let expected = &goldens[&format!("f32.{name}")];
        assert_eq!(found.dims(), expected.dims(), "{name}");
        let is_ids = name.ends_with("topk_ids");
        assert_eq!(found.dtype(), if is_ids { DType::I64 } else { DType::F32 }, "{name}");
        if !is_ids && !name.ends_with("topk_weights") {
            let difference = (found - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            let largest = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference <= 1e-3 * largest, "{name}: {difference} of {largest}");
        }
    }
}

#[test]
fn other_layouts_generate_the_same_tokens() {
    let ids = golden_ids();
    let generated = |model: &str| {
        let report = json_of(NAME, &["--model", model, "--input-ids", &ids, "--ep-size", "3", "--output", "json"]);
        list(&report["generated_ids"])
    };
    let expected = generated(&tiny_folder());
    assert_eq!(expected.len(), 24);
    for stored in [Stored::original(), Stored::decoded(DType::BF16)] {
        for shards in [1, 2] {
            assert_eq!(generated(stored.write(shards).path().to_str().unwrap()), expected);
        }
    }
}

#[test]
fn sampling_repeats_with_its_seed() {
    let generate = |seed| {
        let args = ["--temperature", "1.5", "--top-p", "0.9", "--seed", seed, "--no-comparison", "--output", "json"];
        let report = json_of(NAME, &args);
        assert_eq!(report["comparison"], Value::Null);
        list(&report["generated_ids"])
    };
    assert_eq!(generate("1"), generate("1"));
    assert_ne!(generate("1"), generate("2"));
}

#[test]
fn token_ids_come_from_a_file_too() {
    let folder = Folder::new();
    let file = folder.path().join("ids.txt");
    std::fs::write(&file, "1, 2\n3\t4\n").unwrap();
    let file = file.to_str().unwrap();
    let report = json_of(NAME, &["--input-ids-file", file, "--dtype", "bf16", "--output", "json"]);
    assert_eq!(list(&report["prompt_ids"]), [1, 2, 3, 4]);
    std::fs::write(file, "1, two").unwrap();
    assert_rejected(NAME, &["--input-ids-file", file], &["\"two\"", "1,2,3"]);
}

#[test]
fn text_goes_through_the_tokenizer_of_the_folder() {
    let folder = Folder::new();
    for entry in std::fs::read_dir(tiny_folder()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let vocabulary: serde_json::Map<_, _> = (0..512).map(|id| (format!("w{id}"), Value::from(id))).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": { "type": "Whitespace" },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "w0" },
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let model = folder.path().to_str().unwrap();
    let report = json_of(NAME, &["--model", model, "--prompt", "w7 w8 w9", "--output", "json"]);
    assert_eq!(list(&report["prompt_ids"]), [7, 8, 9]);
    let words: Vec<_> = list(&report["generated_ids"]).iter().map(|id| format!("w{id}")).collect();
    assert_eq!(report["text"], words.join(" "));
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let output = run(NAME, &["--model", model]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("tokenizer.json"));
}

#[test]
fn bad_arguments_say_what_to_do() {
    for (args, words) in [
        (&["--ep-size", "0"][..], &["--ep-size 0", "1 to 8"][..]),
        (&["--ep-size", "9"], &["--ep-size 9", "1 to 8"]),
        (&["--strategy", "replicated"], &["--strategy", "replicated", "each rank holds its own", "leave it out"]),
        (&["--strategy", "solo"], &["--strategy", "solo", "ep_size is 4"]),
        (&["--strategy", "pigeon"], &["gather", "exchange", "peer"]),
        (&["--launch", "mpi"], &["--launch", "threads", "procs"]),
        (&["--launch", "procs", "--ep-size", "9"], &["--ep-size 9", "1 to 8"]),
        (&["--launch", "procs", "--input-ids", "512"], &["512"]),
        (&["--launch", "procs", "--strategy", "replicated"], &["--strategy", "replicated", "leave it out"]),
        (&["--launch", "procs", "--physical-experts", "12"], &["--physical-experts", "--launch threads"]),
        (&["--physical-experts", "7"], &["--physical-experts 7", "8 to 32", "4 ranks"]),
        (&["--ep-size", "2", "--physical-experts", "17"], &["--physical-experts 17", "8 to 16"]),
        (
            &["--physical-experts", "8", "--perfect-router", "--no-comparison"],
            &["--physical-experts", "--no-comparison"],
        ),
        (&["--device", if cfg!(feature = "cuda") { "cuda:99" } else { "cuda" }], &["--device cuda", "--device cpu"]),
        (&["--device", "tpu"], &["cpu, cuda or cuda:N"]),
        (&["--dtype", "f64"], &["f32", "bf16"]),
        (&["--model", "/no/such/folder"], &["/no/such/folder", "--model DIR"]),
        (&["--prompt", "hello"], &["tokenizer.json", "--input-ids"]),
        (&["--input-ids", "512"], &["512"]),
        (&["--input-ids", "a"], &["--input-ids"]),
        (&["--input-ids", "1", "--prompt", "x"], &["cannot be used with"]),
        (&["--input-ids-file", "/no/such/file"], &["/no/such/file"]),
        (&["--temperature", "-1"], &["temperature is -1"]),
        (&["--top-p", "2"], &["top_p is 2"]),
        (&["--max-new-tokens", "131072"], &["131072", "--max-new-tokens"]),
        (&["--max-new-tokens", "many"], &["--max-new-tokens", "many"]),
        (&["--reduction", "other"], &["--reduction", "slot-order"]),
        (&["--seed", "-1"], &["--seed"]),
        (&["--output", "xml"], &["xml", "table", "json"]),
        (&["--dump"], &["--dump"]),
        (&["--nonsense"], &["--nonsense", "--help"]),
    ] {
        assert_rejected(NAME, args, words);
    }
}

#[test]
fn a_broken_checkpoint_is_a_failure_and_not_a_bad_argument() {
    let folder = Folder::new();
    std::fs::copy(format!("{}/config.json", tiny_folder()), folder.path().join("config.json")).unwrap();
    let output = run(NAME, &["--model", folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("model.safetensors"), "{}", text(&output.stderr));
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let output = run_unread(NAME, &[]);
    assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
}
