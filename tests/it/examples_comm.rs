//! The example `bench_moe_comm` as a user runs it.

use crate::checkpoint::Folder;
use crate::examples_perfect_router::elements;
use crate::procs::free_port;
use crate::program::{assert_rejected, json_of, run, run_unread, start, stdout_of, text};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

/// What the example compares results with.
#[path = "../../examples/bench_moe_comm/check.rs"]
mod check;

const BENCH: &str = "bench_moe_comm";
/// Arguments that make the benchmark short.
const SHORT: [&str; 10] = ["--iters", "3", "--warmup", "1", "-e", "4", "--hidden-size", "64", "--output", "json"];

fn short<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SHORT[..], more].concat()
}

fn results(report: &Value) -> &Vec<Value> {
    report["results"].as_array().unwrap()
}

/// The values of `rank0`, `rank1`, ..., which must be all there is, in this order.
fn by_rank<'a>(row: &'a Value, key: &str) -> Vec<&'a Value> {
    let ranks = row[key].as_object().unwrap_or_else(|| panic!("{key} in {row}"));
    for rank in 0..ranks.len() {
        assert!(ranks.contains_key(&format!("rank{rank}")), "{key}: rank{rank} in {row}");
    }
    (0..ranks.len()).map(|rank| &ranks[&format!("rank{rank}")]).collect()
}

fn counts(row: &Value, key: &str) -> Vec<u64> {
    by_rank(row, key).into_iter().map(|value| value.as_u64().unwrap()).collect()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn help_names_every_flag() {
    let help = stdout_of(BENCH, &["--help"]);
    for flag in [
        "ep-size",
        "backend",
        "profile",
        "hidden-size",
        "top-k",
        "num-experts",
        "dtype",
        "reduction",
        "batch-begin",
        "batch-end",
        "factor",
        "iters",
        "warmup",
        "perfect-router",
        "workload",
        "hot-rank",
        "hot-expert",
        "hot-fraction",
        "zero-rank",
        "seed",
        "iter-stats",
        "no-cuda-graph",
        "output",
        "output-file",
        "html",
    ] {
        assert!(help.contains(&format!("--{flag}")), "--{flag} is missing in\n{help}");
    }
    for words in ["meaningless", "-b, ", "-e, ", "-f, ", "logical", "stay home", "torchrun"] {
        assert!(help.contains(words), "{words:?} is missing in\n{help}");
    }
    for profile in ["gpt_oss", "deepseek_v3", "deepseek_v4_flash", "deepseek_v4_pro", "kimi_k3", "qwen3p8"] {
        assert!(help.contains(profile), "{profile} is missing in\n{help}");
    }
    assert!(!help.contains("measure-for-report"), "{help}");
}

#[test]
fn without_arguments_it_measures_gpt_oss() {
    let table = stdout_of(BENCH, &[]);
    let words = ["gpt_oss, hidden 2880, top-4 of 128 experts, bf16", "4 ranks", "threads-gather", "skew", "Checked"];
    for words in words {
        assert!(table.contains(words), "{words:?} is missing in\n{table}");
    }
    assert!(!table.contains("NaN") && !table.contains("meaningless"), "{table}");
}

#[test]
fn json_has_the_keys_of_the_original_and_more() {
    let report = json_of(BENCH, &short(&["--backend", "threads-exchange", "--ep-size", "3"]));
    let metadata = &report["benchmark_metadata"];
    for (key, value) in [
        ("bench", json!("bench_moe_comm")),
        ("profile", json!("gpt_oss")),
        ("backend", json!("threads-exchange")),
        ("ep_size", json!(3)),
        ("hidden_size", json!(64)),
        ("local_batch_size", json!([1, 2, 4])),
        ("top_k", json!(4)),
        ("dtype", json!("bf16")),
        ("perfect_router", json!(false)),
        ("experts_per_rank", json!(43)),
        ("num_experts_total", json!(128)),
        ("device", json!("cpu")),
        ("cuda_graph", json!(false)),
        ("workload", json!({"name": "balanced-random"})),
        ("reduction", json!("slot-order")),
        ("seed", json!(0)),
        ("iters", json!(3)),
        ("warmup", json!(1)),
    ] {
        assert_eq!(metadata[key], value, "{key}");
    }
    assert!(keys(metadata).contains(&"warning"), "{metadata}");
    assert_eq!(results(&report).len(), 3);
    for (row, tokens) in results(&report).iter().zip([1, 2, 4]) {
        assert_eq!((&row["backend"], &row["local_batch_size"]), (&json!("threads-exchange"), &json!(tokens)));
        for key in ["dispatch_us", "combine_us"] {
            assert!(by_rank(row, key).iter().all(|us| us.as_f64() > Some(0.0)), "{row}");
        }
        for key in [
            "arrival_skew_us",
            "dispatch_wire_gb_per_s",
            "combine_wire_gb_per_s",
            "dispatch_logical_gb_per_s",
            "combine_logical_gb_per_s",
        ] {
            assert!(by_rank(row, key).iter().all(|value| value.as_f64() >= Some(0.0)), "{row}");
        }
        for (wire, logical) in [
            ("dispatch_wire_gb_per_s", "dispatch_logical_gb_per_s"),
            ("combine_wire_gb_per_s", "combine_logical_gb_per_s"),
        ] {
            assert!(row["all_ranks"][wire].as_f64() <= row["all_ranks"][logical].as_f64(), "{row}");
        }
        assert_eq!(counts(row, "num_tokens"), [tokens; 3]);
        let total = |key: &str| counts(row, key).iter().sum::<u64>();
        assert_eq!((total("rows_sent"), total("expert_rows")), (total("rows_received"), 3 * tokens * 4), "{row}");
        assert_eq!(total("combine_rows_sent"), total("combine_rows_received"), "{row}");
        assert!(total("rows_sent") + total("rows_kept") >= 3 * tokens, "a token goes somewhere: {row}");
        assert_eq!(row["rows_even"], Value::Null);
    }
}

#[test]
fn iter_stats_gives_every_time_as_statistics() {
    let report = json_of(BENCH, &short(&["--iter-stats", "--backend", "threads,procs", "--ep-size", "2"]));
    for row in results(&report) {
        for key in ["dispatch_us", "combine_us", "arrival_skew_us"] {
            for time in by_rank(row, key) {
                let mut known = keys(time);
                known.sort_unstable();
                assert_eq!(known, ["max", "mean", "median", "min", "stdev"], "{row}");
                let number = |key: &str| time[key].as_f64().unwrap();
                assert!(number("min") <= number("median") && number("median") <= number("max"), "{time}");
                assert!(number("min") <= number("mean") && number("mean") <= number("max"), "{time}");
            }
        }
        // In every round one of them is the first.
        let least =
            by_rank(row, "arrival_skew_us").iter().map(|time| time["min"].as_f64().unwrap()).fold(1e9, f64::min);
        assert_eq!(least, 0.0, "one rank is the first: {row}");
    }
    let table = stdout_of(BENCH, &["--iters", "3", "-e", "1", "--iter-stats", "--hidden-size", "64"]);
    assert!(table.contains("Every rank") && table.contains("stdev"), "{table}");
}

#[test]
fn every_backend_moves_the_same_tokens() {
    for (ep_size, backends) in
        [("1", &["gather", "exchange", "replicated", "solo"][..]), ("3", &["gather", "exchange", "replicated"])]
    {
        let report = json_of(BENCH, &short(&["--backend", "all", "--ep-size", ep_size, "-b", "4", "--seed", "7"]));
        let names: Vec<_> = results(&report).iter().map(|row| row["backend"].as_str().unwrap()).collect();
        let expected: Vec<_> = ["threads", "procs"]
            .iter()
            .flat_map(|transport| backends.iter().map(move |strategy| format!("{transport}-{strategy}")))
            .collect();
        assert_eq!(names, expected);
        assert_eq!(report["benchmark_metadata"]["backend"], expected.join(","));
        let expert_rows = counts(&results(&report)[0], "expert_rows");
        assert_eq!(expert_rows.iter().sum::<u64>(), 4 * 4 * expert_rows.len() as u64);
        for (i, row) in results(&report).iter().enumerate() {
            assert_eq!(counts(row, "expert_rows"), expert_rows, "{row}");
            // Threads and processes send the same.
            let twin = &results(&report)[i % backends.len()];
            for key in ["rows_sent", "rows_received", "rows_kept", "combine_rows_sent", "combine_rows_received"] {
                assert_eq!(row[key], twin[key], "{key} of {row}");
            }
        }
    }
}

#[test]
fn the_best_strategy_is_chosen_and_reasoned() {
    let table =
        stdout_of(BENCH, &["--iters", "1", "-e", "1", "--hidden-size", "64", "--backend", "threads,threads-gather"]);
    assert!(table.contains("threads-gather, since a token reaches"), "{table}");
    let report = json_of(BENCH, &short(&["--ep-size", "5", "-b", "4"]));
    assert_eq!(report["benchmark_metadata"]["backend"], "threads-exchange");
    let report = json_of(BENCH, &short(&["--ep-size", "1", "-b", "4"]));
    assert_eq!(report["benchmark_metadata"]["backend"], "threads-solo");
}

#[test]
fn perfect_routing_gives_every_rank_as_many_rows() {
    for (ep_size, more) in [
        ("2", &["--backend", "all"][..]),
        ("3", &["--backend", "all", "--num-experts", "10"]),
        ("8", &["--backend", "threads,threads-gather", "--profile", "deepseek_v3"]),
        ("8", &["--backend", "threads", "--top-k", "3"]),
        ("5", &["--backend", "procs", "--top-k", "7", "--reduction", "rank-partial", "--dtype", "f16"]),
    ] {
        let args = [more, &["--perfect-router", "--ep-size", ep_size, "-e", "9", "-f", "3"]].concat();
        let short = ["--iters", "2", "--warmup", "0", "--hidden-size", "64", "--output", "json"];
        let report = json_of(BENCH, &[&short[..], &args].concat());
        assert_eq!(report["benchmark_metadata"]["perfect_router"], true);
        assert!(report["benchmark_metadata"]["warning"].as_str().unwrap().contains("meaningless"));
        for row in results(&report) {
            assert_eq!(row["rows_even"], true, "{row}");
            for key in ["rows_received", "expert_rows"] {
                let rows = counts(row, key);
                let (least, most) = (rows.iter().min().unwrap(), rows.iter().max().unwrap());
                assert!(most - least <= 1, "{args:?}: {key} of {row}");
            }
        }
    }
    let by_variable = start(BENCH, &short(&[]), &[("ENABLE_PERFECT_ROUTER", "1")]).wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&by_variable.stdout).unwrap();
    assert_eq!(report["benchmark_metadata"]["perfect_router"], true);
    let table = stdout_of(BENCH, &["--perfect-router", "--iters", "2", "-e", "2", "--hidden-size", "64"]);
    assert!(table.contains("for measuring") && table.contains("equal within one"), "{table}");
    let table = stdout_of(BENCH, &["--perfect-router", "--iters", "2", "-e", "2", "--workload", "hot-rank"]);
    assert!(table.contains("for measuring") && table.contains("does not promise equal rows"), "{table}");
}

#[test]
fn underscores_are_dashes_in_names_of_flags() {
    let names = ["--ep_size", "2", "--perfect_router", "--no_cuda_graph", "--batch_begin=2", "--batch_end", "4"];
    let sizes = ["--top_k=3", "--num_experts", "6", "--hidden_size", "32", "--workload", "hot-rank", "--hot_rank=1"];
    let others = ["--iter_stats", "--iters", "2", "--warmup", "0", "--profile", "deepseek_v4_pro", "--output", "json"];
    let report = json_of(BENCH, &[&names[..], &sizes, &others].concat());
    let metadata = &report["benchmark_metadata"];
    assert_eq!((&metadata["ep_size"], &metadata["top_k"]), (&json!(2), &json!(3)));
    assert_eq!((&metadata["num_experts_total"], &metadata["hidden_size"]), (&json!(6), &json!(32)));
    assert_eq!((&metadata["perfect_router"], &metadata["workload"]["hot_rank"]), (&json!(true), &json!(1)));
    assert_eq!((&metadata["local_batch_size"], &metadata["cuda_graph"]), (&json!([2, 4]), &json!(false)));
    assert_eq!(metadata["profile"], "deepseek_v4_pro");
}

#[test]
fn workloads_are_as_uneven_as_they_say() {
    let of = |more: &[&str]| {
        let args = ["--iters", "2", "--warmup", "0", "--hidden-size", "32", "--output", "json", "-b", "40", "-e", "40"];
        let report = json_of(BENCH, &[&args[..], more].concat());
        (results(&report)[0].clone(), report["benchmark_metadata"]["workload"].clone())
    };
    let (row, workload) = of(&["--workload", "zero-rank", "--zero-rank", "1"]);
    assert_eq!((counts(&row, "num_tokens"), &workload["zero_rank"]), (vec![40, 0, 40, 40], &json!(1)));
    assert_eq!((counts(&row, "rows_sent")[1], counts(&row, "combine_rows_received")[1]), (0, 0));
    assert!(counts(&row, "expert_rows")[1] > 0, "its experts work: {row}");
    let (row, _) = of(&["--workload", "zero-rank", "--backend", "procs-exchange"]);
    assert_eq!(counts(&row, "num_tokens"), [40, 40, 40, 0]);

    let (row, _) = of(&["--workload", "ragged"]);
    assert_eq!(counts(&row, "num_tokens"), [16, 32, 48, 64]);

    for perfect in [&[][..], &["--perfect-router"]] {
        let hot = ["--workload", "hot-rank", "--hot-rank", "2", "--hot-fraction", "0.75"];
        let (row, workload) = of(&[&hot[..], perfect].concat());
        assert_eq!((&workload["hot_rank"], &workload["hot_fraction"]), (&json!(2), &json!(0.75)));
        let rows = counts(&row, "expert_rows");
        // All slots of three quarters of the tokens, drawn, and a quarter of the others: 0.8125 of 640.
        assert!((460..=580).contains(&rows[2]), "{row}");
        assert_eq!(row["rows_even"], Value::Null);

        let (row, _) =
            of(&[&["--workload", "hot-expert", "--hot-expert", "127", "--hot-fraction", "1"][..], perfect].concat());
        // One slot of every token at least, and a quarter of the others.
        assert!(counts(&row, "expert_rows")[3] >= 160 + 60, "{row}");
    }
    let (row, _) = of(&["--workload", "hot-rank", "--hot-fraction", "1", "--backend", "threads-exchange"]);
    assert_eq!(counts(&row, "expert_rows"), [640, 0, 0, 0]);
    assert_eq!((counts(&row, "rows_received"), counts(&row, "rows_kept")), (vec![120, 0, 0, 0], vec![40, 0, 0, 0]));
}

#[test]
fn the_seed_decides_the_routing() {
    let of = |seed: &str| {
        let report = json_of(BENCH, &short(&["--seed", seed, "-b", "4"]));
        counts(&results(&report)[0], "expert_rows")
    };
    assert_eq!(of("1"), of("1"));
    assert_ne!(of("1"), of("2"));
}

#[test]
fn the_report_goes_into_a_file_too() {
    let folder = Folder::new();
    let file = folder.path().join("report.json");
    let args = ["--iters", "2", "-e", "2", "--backend", "threads,procs", "--output-file", file.to_str().unwrap()];
    let table = stdout_of(BENCH, &args);
    assert!(table.contains("dispatch us"), "{table}");
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!((results(&report).len(), &report["benchmark_metadata"]["ep_size"]), (4, &json!(4)));

    let output = run(BENCH, &short(&["--output-file", "/nowhere/at/all/report.json"]));
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    assert!(text(&output.stderr).contains("cannot write /nowhere/at/all/report.json"));
}

#[test]
fn the_page_is_whole_and_draws_every_backend() {
    let folder = Folder::new();
    let file = folder.path().join("report.html");
    let page = |more: &[&str]| {
        let report = json_of(BENCH, &[&short(&["--html", file.to_str().unwrap()]), more].concat());
        (std::fs::read_to_string(&file).unwrap(), report)
    };
    for (more, backends, sizes) in [
        (&["--backend", "all", "--ep-size", "3"][..], 6, 3),
        // One point for each line.
        (&["--backend", "all", "--ep-size", "1", "-b", "4"], 8, 1),
        (&["--ep-size", "70", "--workload", "hot-rank", "--hot-fraction", "1", "-b", "4"], 1, 1),
    ] {
        let (page, report) = page(more);
        let elements = elements(&page);
        let count = |name: &str| elements.iter().filter(|element| *element == name).count();
        assert_eq!((count("svg"), count("h1"), count("table"), count("caption")), (5, 1, 1, 1));
        assert_eq!((count("script"), count("link"), count("img")), (0, 0, 0));
        assert_eq!(page.matches("role=\"img\" aria-label=\"").count(), 5);
        assert!(page.contains("lang=\"en\"") && page.contains("prefers-color-scheme: dark"));
        for wrong in ["http", "NaN", "inf"] {
            assert!(!page.contains(wrong), "{wrong} in {page}");
        }
        let rows = results(&report);
        assert_eq!(rows.len(), backends * sizes);
        for row in rows {
            assert!(page.contains(&format!("<th scope=\"row\">{}</th>", row["backend"].as_str().unwrap())));
        }
        let ranks = by_rank(&rows[0], "dispatch_us").len();
        assert_eq!(page.contains("more ranks"), ranks > 64);
        let last = format!("rank 0: {} rows", counts(&rows[sizes - 1], "expert_rows")[0]);
        assert!(page.contains(&last), "{last} in {page}");
    }
    let (page, _) = page(&["--perfect-router"]);
    assert!(page.contains("meaningless"));
    let output = run(BENCH, &short(&["--html", "/nowhere/at/all/report.html"]));
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    assert!(text(&output.stderr).contains("cannot write /nowhere/at/all/report.html; choose another --html"));
}

/// As torchrun would start them.
fn start_rank(rank: usize, port: u16, args: &[&str]) -> std::process::Child {
    let (rank, port) = (rank.to_string(), port.to_string());
    let variables = [
        ("RANK", rank.as_str()),
        ("LOCAL_RANK", &rank),
        ("WORLD_SIZE", "3"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", &port),
    ];
    start(BENCH, args, &variables)
}

fn ends_of_ranks(args_of_rank: impl Fn(usize) -> Vec<&'static str>) -> Vec<std::process::Output> {
    let port = free_port();
    let ranks: Vec<_> = (0..3).map(|rank| start_rank(rank, port, &args_of_rank(rank))).collect();
    ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect()
}

#[test]
fn ranks_of_a_launcher_join_and_rank_0_reports() {
    let outputs = ends_of_ranks(|_| short(&["--perfect-router", "--backend", "all"]));
    for (rank, output) in outputs.iter().enumerate() {
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
        assert_eq!(output.stdout.is_empty(), rank > 0);
    }
    let report: Value = serde_json::from_slice(&outputs[0].stdout).unwrap();
    assert_eq!(report["benchmark_metadata"]["backend"], "procs-gather,procs-exchange,procs-replicated");
    assert_eq!(by_rank(&results(&report)[0], "dispatch_us").len(), 3);

    for output in ends_of_ranks(|rank| short(if rank == 1 { &["--seed", "5"] } else { &[] })) {
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""));
        let stderr = text(&output.stderr);
        assert!(stderr.contains("rank 1 has seed 5, expected that of the group, 0"), "{stderr}");
    }

    let rejected = |args: &[&str], words: &str| {
        let output = start_rank(0, free_port(), args).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(words), "{}", text(&output.stderr));
    };
    rejected(&["--ep-size", "2"], "--ep-size 2: expected 3");
    rejected(&["--backend", "threads,procs"], "expected procs or nccl only");
    rejected(&["--backend", "procs,nccl"], "one at a time");
    // mpirun with one process leaves it to that one what its ranks are.
    let open_mpi = ["RANK", "SIZE", "LOCAL_RANK"].map(|name| format!("OMPI_COMM_WORLD_{name}"));
    let variables = [(&*open_mpi[0], "0"), (&open_mpi[1], "1"), (&open_mpi[2], "0"), ("MASTER_ADDR", "127.0.0.1")];
    let port = free_port().to_string();
    let variables = [&variables[..], &[("MASTER_PORT", port.as_str())]].concat();
    let output = start(BENCH, &short(&["--backend", "all", "--ep-size", "2"]), &variables).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    // Explicit configuration wins.
    let output = start_rank(1, free_port(), &short(&["--backend", "threads"])).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn bad_arguments_say_what_to_do() {
    for (args, words) in [
        (&["--ep-size", "0"][..], &["--ep-size 0", "expected 1 to 128"][..]),
        (&["--ep-size", "129"], &["--ep-size 129", "1 to 128"]),
        (&["--ep-size", "2000", "--num-experts", "4000"], &["--ep-size 2000", "at most 1024"]),
        (&["--ep-size", "100", "--backend", "procs"], &["--ep-size 100", "at most 64", "or threads"]),
        (&["--num-experts", "3"], &["--top-k 4", "1 to 3", "--num-experts"]),
        (&["--top-k", "0"], &["--top-k 0"]),
        (&["--hidden-size", "0"], &["--hidden-size 0"]),
        (&["--factor", "1"], &["--factor 1", "at least 2"]),
        (&["-b", "0"], &["--batch-begin 0", "at least 1"]),
        (&["-b", "8", "-e", "4"], &["--batch-end 4", "--batch-begin, which is 8"]),
        (&["--iters", "0"], &["--iters 0"]),
        (&["--iters", "-1"], &["--iters"]),
        (&["--backend", "gather"], &["gather", "threads-gather", "procs-exchange", "all"]),
        (
            &["--backend", "nccl", "--ep-size", "100"],
            if cfg!(feature = "nccl") { &["100 CUDA devices", "choose --ep-size"] } else { &["--features nccl"] },
        ),
        (&["--backend", "threads,,procs"], &["unknown backend \"\""]),
        (&["--backend", "threads-solo"], &["--backend threads-solo", "for one rank", "ep_size is 4"]),
        (&["--profile", "gpt-5"], &["gpt-5", "gpt_oss", "qwen3p8"]),
        (&["--dtype", "f64"], &["f64", "bf16"]),
        (&["--workload", "cold-rank"], &["cold-rank", "hot-rank", "zero-rank"]),
        (&["--hot-rank", "1"], &["--hot-rank", "--workload hot-rank"]),
        (
            &["--workload", "ragged", "--hot-fraction", "1"],
            &["--hot-fraction", "--workload hot-rank or --workload hot-expert"],
        ),
        (&["--workload", "hot-rank", "--hot-rank", "4"], &["--hot-rank 4", "less than 4"]),
        (&["--workload", "hot-expert", "--hot-expert", "128"], &["--hot-expert 128", "less than 128"]),
        (&["--workload", "hot-rank", "--hot-fraction", "1.5"], &["--hot-fraction 1.5", "0 to 1"]),
        (&["--workload", "hot-rank", "--hot-fraction", "NaN"], &["--hot-fraction NaN", "0 to 1"]),
        (&["--workload", "zero-rank", "--ep-size", "1"], &["zero-rank", "at least 2 ranks"]),
        (&["--workload", "zero-rank", "--zero-rank", "9"], &["--zero-rank 9", "less than 4"]),
        (&["-e", "1000000000000", "-f", "1000"], &["GB of memory", "smaller --batch-end"]),
        (&["-b", "18446744073709551615"], &["GB of memory"]),
        (&["more"], &["more"]),
    ] {
        assert_rejected(BENCH, args, words);
    }
}

#[test]
fn nobody_reading_is_no_error() {
    let output = run_unread(BENCH, &["--iters", "1", "-e", "1"]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}

#[test]
fn the_check_finds_what_is_wrong() {
    let hidden = Tensor::new(&[[1f32, -2.0, 3.0], [0.5, 0.25, -1.0]], &Device::Cpu).unwrap();
    let topk_weights = Tensor::new(&[[0.75f32, 0.25], [0.5, 0.125]], &Device::Cpu).unwrap();
    let of = |combined: [[f32; 3]; 2]| {
        check::first_mismatch(&hidden, &topk_weights, &Tensor::new(&combined, &Device::Cpu).unwrap(), 0.0).unwrap()
    };
    let right = [[1.0, -2.0, 3.0], [0.3125, 0.15625, -0.625]];
    assert_eq!(of(right), None);
    for (wrong, words) in [
        ([[1.0, -2.0, 3.00001], right[1]], "token 0, column 2: combine gave 3.00001, expected 3"),
        ([right[0], [0.25, 0.125, -0.5]], "token 1, column 0: combine gave 0.25, expected 0.3125"),
        ([right[1], right[0]], "token 0, column 0"),
        ([right[0], [0.3125, f32::NAN, -0.625]], "token 1, column 1: combine gave NaN"),
    ] {
        let found = of(wrong).unwrap();
        assert!(found.contains(words), "{found}");
    }
    assert!(check::first_mismatch(&hidden, &topk_weights, &hidden.narrow(0, 0, 1).unwrap(), 0.0).is_err());
}

#[cfg(feature = "nccl")]
#[test]
fn ranks_that_are_devices_are_measured_by_every_strategy() {
    let devices = candle_core::cuda_backend::cudarc::driver::CudaContext::device_count().unwrap_or(0);
    if devices < 2 {
        return crate::devices::say("SKIPPED on CUDA: 2 devices are needed");
    }
    let backends = "nccl-gather,nccl-exchange,nccl-replicated";
    let report = json_of(
        BENCH,
        &["--backend", backends, "--ep-size", "2", "--hidden-size", "64", "-b", "3", "-e", "3", "--no-cuda-graph"]
            .into_iter()
            .chain(["--iters", "3", "--warmup", "1", "--perfect-router", "--output", "json"])
            .collect::<Vec<_>>(),
    );
    let metadata = &report["benchmark_metadata"];
    assert_eq!((&metadata["backend"], &metadata["cuda_graph"]), (&json!(backends), &json!(false)));
    assert_ne!(metadata["device"], json!("cpu"));
    let rows = report["results"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["backend"].as_str().unwrap()).collect();
    assert_eq!(names, ["nccl-gather", "nccl-exchange", "nccl-replicated"]);
    for row in rows {
        assert!(row["dispatch_us"]["rank1"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[cfg(feature = "cuda")]
#[test]
fn peers_are_measured_from_graphs_and_without() {
    let devices = candle_core::cuda_backend::cudarc::driver::CudaContext::device_count().unwrap_or(0);
    if devices < 2 {
        return crate::devices::say("SKIPPED on CUDA: 2 devices are needed");
    }
    for (reduction, rest) in [("slot-order", &["--no-cuda-graph"][..]), ("rank-partial", &[])] {
        let arguments = ["--backend", "peer", "--ep-size", "2", "--hidden-size", "64", "-b", "3", "-e", "12"];
        let times = ["--iters", "3", "--warmup", "1", "--output", "json", "--reduction", reduction];
        let report = json_of(BENCH, &[&arguments[..], &times, rest].concat());
        assert_eq!(report["benchmark_metadata"]["backend"], json!("peer"));
        for row in report["results"].as_array().unwrap() {
            let number = |key: &str| row[key]["rank1"].as_f64().unwrap();
            assert!(number("dispatch_us") > 0.0 && number("combine_us") > 0.0, "{row}");
            let tokens = row["local_batch_size"].as_f64().unwrap();
            // A token goes to the other rank at most once, and its results come home once, or once for each slot.
            assert!(number("rows_sent") <= tokens, "{row}");
            let most = if reduction == "slot-order" { 4.0 * tokens } else { tokens };
            assert!(number("combine_rows_sent") <= most, "{row}");
        }
    }
}
