//! The example `bench_moe` as a user runs it.

use crate::checkpoint::Folder;
use crate::examples_perfect_router::elements;
use crate::program::{assert_rejected, json_of, keys, run, run_unread, stdout_of, text};
use serde_json::{Value, json};

const BENCH: &str = "bench_moe";
/// Arguments that make the benchmark short.
const SHORT: [&str; 8] = ["--profile", "tiny", "--num-tokens", "1,5", "--iters", "3", "--seconds", "0"];

fn short<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SHORT[..], more].concat()
}

#[test]
fn help_names_every_flag() {
    let bench = [
        "device",
        "shape",
        "method",
        "profile",
        "num-tokens",
        "ep-size",
        "dtype",
        "weights",
        "iters",
        "seconds",
        "seed",
        "threads",
        "schedule",
        "skew",
        "only",
        "plot",
        "html",
        "output",
    ];
    let help = stdout_of(BENCH, &["--help"]);
    for flag in bench {
        assert!(help.contains(&format!("--{flag} ")), "--{flag} is missing in\n{help}");
    }
    assert!(help.contains("meaningless"), "{help}");
}

#[test]
fn without_arguments_it_measures_every_profile() {
    let table = stdout_of(BENCH, &[]);
    let words = [
        "MoE on the CPU",
        "tiny",
        "gpt-oss-20b",
        "qwen3-30b-a3b",
        "layer",
        "plan",
        "perfect",
        "Copy bandwidth",
        "meaningless",
    ];
    for words in words {
        assert!(table.contains(words), "{words:?} is missing in\n{table}");
    }
    assert!(!table.contains("NaN"), "{table}");
}

#[test]
fn the_page_is_whole_and_draws_every_part() {
    let folder = Folder::new();
    let file = folder.path().join("report.html");
    let all = ["tiny, routing", "tiny, order", "tiny, plan", "tiny, layer"];
    for (only, charts) in [(&[][..], &all[..]), (&["--only", "layer"], &all[3..]), (&["--only", "plan"], &all[2..3])] {
        let report = json_of(BENCH, &[&short(&["--output", "json", "--html", file.to_str().unwrap()]), only].concat());
        let page = std::fs::read_to_string(&file).unwrap();
        let elements = elements(&page);
        let count = |name: &str| elements.iter().filter(|element| *element == name).count();
        assert_eq!((count("svg"), count("h2"), count("table")), (charts.len(), charts.len(), charts.len()));
        assert_eq!((count("h1"), count("script"), count("link"), count("img")), (1, 0, 0, 0));
        for chart in charts {
            assert!(page.contains(&format!("<h2>{chart}</h2>")), "{chart} in {page}");
        }
        for wrong in ["http", "NaN", "inf"] {
            assert!(!page.contains(wrong), "{wrong} in {page}");
        }
        let rows = report["rows"].as_array().unwrap();
        assert_eq!(count("tr"), rows.len() + charts.len(), "a row for each measurement, and the headings");
        // A line and its floor for each routing of a part.
        assert_eq!(count("polyline"), 2 * rows.len() / 2);
        assert!(page.contains("meaningless"));
    }
    let output = run(BENCH, &short(&["--html", "/nowhere/at/all/report.html"]));
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    assert!(text(&output.stderr).contains("cannot write /nowhere/at/all/report.html; choose another --html"));
}

#[test]
fn bench_moe_reports_every_row_in_json() {
    let report = json_of(BENCH, &short(&["--output", "json"]));
    let metadata = &report["metadata"];
    assert_eq!(metadata["bench"], "bench_moe");
    assert_eq!(metadata["crate_version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&metadata["dtype"], &metadata["weights"]), (&json!("f32"), &json!("mxfp4")));
    assert!(metadata["threads"].as_u64() > Some(0) && metadata["copy_gb_per_s"].as_f64() > Some(0.0), "{metadata}");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * (3 * 2 + 1), "token counts x (parts x routings + plan)");
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert!(number("min_us") <= number("p10_us") && number("p10_us") <= number("median_us"), "{row}");
        assert!(number("median_us") <= number("p90_us") && number("p90_us") <= number("max_us"), "{row}");
        assert_eq!(number("iterations"), 3.0);
        for key in ["bytes", "gb_per_s", "copy_gb_per_s", "copy_ratio", "floor_us", "distinct_experts"] {
            assert!(number(key) > 0.0, "{key} in {row}");
        }
        let is_layer = row["part"] == "layer";
        assert_eq!(row["flops"].is_f64() && row["gflop_per_s"].is_f64(), is_layer, "{row}");
        assert_eq!(row["lines"]["experts_us"].is_f64(), is_layer, "{row}");
    }
    let touched = |routing: &str, num_tokens: u64| {
        let found = rows.iter().find(|row| row["routing"] == routing && row["num_tokens"] == num_tokens);
        found.map(|row| row["distinct_experts"].as_f64().unwrap())
    };
    assert_eq!([touched("random", 1), touched("perfect", 1), touched("perfect", 5)], [Some(4.0), Some(4.0), Some(8.0)]);
}

#[test]
fn json_has_these_keys_and_types() {
    let report = json_of(BENCH, &short(&["--output", "json", "--only", "layer,order"]));
    assert_eq!(
        // Not every system names its processor.
        keys(&report["metadata"]).replace("cpu_model null", "cpu_model string"),
        "bench string, copy_gb_per_s number, cpu_model string, crate_version string, device string, dtype string, \
         ep_size number, iters number, read_gb_per_s number, schedule string, seconds number, seed number, threads number, \
         weights string"
    );
    let timed = "bytes number, copy_gb_per_s number, copy_ratio number, distinct_experts number, floor_us number";
    let times = "max_us number, mean_us number, median_us number, min_us number, num_tokens number, p10_us number, \
                 p90_us number, part string, profile string, routing string, stdev_us number";
    for row in report["rows"].as_array().unwrap() {
        let expected = match row["part"].as_str().unwrap() {
            "layer" => format!(
                "{timed}, flops number, gb_per_s number, gflop_per_s number, iterations number, lines object, {times}"
            ),
            _ => format!("{timed}, flops null, gb_per_s number, gflop_per_s null, iterations number, {times}"),
        };
        assert_eq!(keys(row), expected);
        if row["part"] == "layer" {
            let expected = "combine_us number, experts_us number, gate_and_routing_us number, order_us number";
            assert_eq!(keys(&row["lines"]), expected);
        }
    }
}

#[test]
fn bench_moe_measures_what_it_is_asked_for() {
    let parts = |report: &Value| {
        let rows = report["rows"].as_array().unwrap().clone();
        rows.into_iter().map(|row| row["part"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let report = json_of(BENCH, &short(&["--output", "json", "--only", "order,routing", "--threads", "1"]));
    assert_eq!(parts(&report), ["routing", "routing", "order", "order"].repeat(2));
    assert_eq!(report["metadata"]["threads"], 1);
    let report = json_of(
        BENCH,
        &short(&["--output", "json", "--only", "layer", "--ep_size", "2", "--dtype", "bf16", "--weights", "bf16"]),
    );
    assert_eq!(parts(&report), ["layer"].repeat(4));
    // Two senders with one token each: the global-slot schedule keeps their experts apart, the other makes them overlap.
    assert_eq!(report["rows"][1]["distinct_experts"], 8.0);
    let report = json_of(
        BENCH,
        &short(&["--output", "json", "--only", "layer", "--ep-size", "2", "--schedule", "rank-rotated"]),
    );
    assert_eq!(report["rows"][1]["distinct_experts"], 5.0);
    assert_eq!(report["metadata"]["schedule"], "rank-rotated");
    let table = stdout_of(BENCH, &SHORT);
    for words in ["median us", "of copy", "Copy bandwidth", "One token, tiny", "meaningless"] {
        assert!(table.contains(words), "{words:?} is missing in\n{table}");
    }
}

#[test]
fn bench_moe_says_what_is_wrong_with_its_arguments() {
    assert_rejected(BENCH, &["--ep-size", "9"], &["ep_size is 9", "num_experts, which is 8", "at most 8"]);
    assert_rejected(BENCH, &["--schedule", "random"], &["random", "global-slot"]);
    assert_rejected(BENCH, &["--num-tokens", "1,0"], &["num-tokens"]);
    assert_rejected(BENCH, &["--num-tokens", "1000000000000"], &["GB of memory", "fewer --num-tokens"]);
    assert_rejected(BENCH, &["--seconds", "-1"], &["seconds"]);
    assert_rejected(BENCH, &["--seconds", "soon"], &["soon", "expected a number of seconds"]);
    assert_rejected(BENCH, &["--threads", "0"], &["threads"]);
    assert_rejected(BENCH, &["--profile", "huge"], &["huge", "gpt-oss-20b"]);
    assert_rejected(BENCH, &["--only", "gate"], &["gate", "routing"]);
}

#[test]
fn nobody_reading_is_no_error() {
    let output = run_unread(BENCH, &short(&[]));
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}

#[test]
fn what_belongs_to_the_other_device_is_refused() {
    assert_rejected(BENCH, &["--device", "tpu"], &["expected cpu, cuda or cuda:N"]);
    assert_rejected(BENCH, &["--device", "cuda:x"], &["expected cpu, cuda or cuda:N"]);
    assert_rejected(BENCH, &["--shape", "8x2"], &["--device cuda"]);
    assert_rejected(BENCH, &["--only", "routed-order"], &["--device cuda"]);
    assert_rejected(BENCH, &["--plot", "layers.svg"], &["--device cuda"]);
    assert_rejected(BENCH, &["--ep-size", "1,8"], &["--device cuda"]);
    assert_rejected(BENCH, &["--skew", "1"], &["--device cuda"]);
    assert_rejected(BENCH, &["--skew", "-1"], &["--skew", "not negative"]);
    assert_rejected(BENCH, &["--device", "cuda", "--shape", "8x9"], &["top_k is 9, expected 1 to 8"]);
    assert_rejected(BENCH, &["--device", "cuda", "--shape", "8"], &["EXPERTSxTOP_K"]);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_the_feature_a_cuda_device_is_refused() {
    assert_rejected(BENCH, &["--device", "cuda"], &["--features cuda"]);
}

#[cfg(feature = "cuda")]
#[test]
fn bench_moe_measures_routing_and_order_on_cuda() {
    if crate::devices::cuda().is_none() {
        return;
    }
    let short = ["--device", "cuda", "--shape", "32x4,60x4", "--num-tokens", "1,70", "--iters", "3", "--seconds", "0"];
    let report = json_of(BENCH, &[&short[..], &["--output", "json"]].concat());
    let metadata = &report["metadata"];
    assert_eq!((&metadata["device"], &metadata["dtype"]), (&json!("cuda:0"), &json!("bf16")));
    assert!(metadata["copy_gb_per_s"].as_f64() > Some(0.0), "{metadata}");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * 2 * 3, "shapes x token counts x parts");
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(row["part"], ["routing", "order", "routed-order"][i % 3], "{row}");
        assert_eq!(row["num_experts"], [32, 60][i / 6], "{row}");
        assert_eq!(row["num_tokens"], [1, 70][i / 3 % 2], "{row}");
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert!(number("p10_us") <= number("median_us") && number("median_us") <= number("p90_us"), "{row}");
        assert!(number("bytes") > 0.0 && number("floor_us") > 0.0, "{row}");
        assert_eq!(row["candle"].is_object(), i % 3 == 0, "Candle composes the routing, {row}");
    }
    assert_eq!(
        (&metadata["matmul_tflop_per_s"], &report["layers"]),
        (&Value::Null, &json!([])),
        "shapes have no layers"
    );
    let table = stdout_of(BENCH, &[&short[..], &["--method", "Llama4", "--only", "routed-order"]].concat());
    assert!(table.contains("Llama4") && table.contains("Copy bandwidth") && !table.contains("NaN"), "{table}");
}

#[cfg(feature = "cuda")]
#[test]
fn arguments_of_layers_on_cuda_must_fit_each_other() {
    let rejected = |args: &[&str], words: &[&str]| {
        assert_rejected(BENCH, &[&["--device", "cuda"], args].concat(), words);
    };
    rejected(&["--only", "plan"], &["--only plan is measured on the CPU only", "layer"]);
    rejected(&["--only", "order", "--profile", "tiny"], &["for layers", "--shape"]);
    rejected(&["--shape", "32x4", "--ep-size", "8"], &["for layers", "--only layer"]);
    rejected(&["--shape", "32x4", "--plot", "layers.svg"], &["for layers"]);
    rejected(&["--only", "layer", "--shape", "32x4"], &["for routing and order", "--profile"]);
    rejected(&["--only", "layer", "--method", "Llama4"], &["for routing and order", "--profile"]);
    rejected(&["--profile", "tiny", "--ep-size", "1,3"], &["profile tiny has 8 experts", "--ep-size"]);
}

#[cfg(feature = "cuda")]
#[test]
fn a_layer_too_large_for_the_device_is_refused() {
    if crate::devices::cuda().is_some() {
        let huge = ["--device", "cuda", "--profile", "tiny", "--num-tokens", "1000000000000"];
        assert_rejected(BENCH, &huge, &["GB are free", "fewer --num-tokens"]);
    }
}

/// Stdout of a run on CUDA; the emulated driver says what it lacks.
#[cfg(feature = "cuda")]
fn layers_on_cuda(args: &[&str]) -> String {
    let short = ["--device", "cuda", "--profile", "tiny", "--num-tokens", "1", "--iters", "3", "--seconds", "0"];
    let output = run(BENCH, &[&short[..], args].concat());
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    assert!(stderr.lines().all(|line| line.ends_with("is not emulated")), "{args:?}: {stderr}");
    text(&output.stdout)
}

#[cfg(feature = "cuda")]
#[test]
fn bench_moe_measures_layers_on_cuda() {
    if crate::devices::cuda().is_none() {
        return;
    }
    let plot = std::env::temp_dir().join(format!("bench_moe_{}.svg", std::process::id()));
    let stdout = layers_on_cuda(&["--ep-size", "2", "--output", "json", "--plot", plot.to_str().unwrap()]);
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(report["rows"], json!([]), "{report}");
    let rate = &report["metadata"]["matmul_tflop_per_s"];
    assert!(rate.is_null() || rate.as_f64() > Some(0.0), "{rate}");
    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2, "random and perfect routing");
    for (row, routing) in layers.iter().zip(["random", "perfect"]) {
        assert_eq!(
            (&row["part"], &row["profile"], &row["routing"]),
            (&json!("layer"), &json!("tiny"), &json!(routing))
        );
        assert_eq!((&row["ep_size"], &row["num_tokens"], &row["weights"]), (&json!(2), &json!(1), &json!("mxfp4")));
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert!(number("p10_us") <= number("median_us") && number("median_us") <= number("p90_us"), "{row}");
        for key in ["routed_order_us", "experts_us", "floor_us", "floor_ratio", "bytes", "flops", "num_layers"] {
            assert!(number(key) > 0.0, "{key} in {row}");
        }
        // Two tokens, one of each rank, with four slots each, on two ranks.
        assert_eq!(number("mean_slots"), 4.0, "{row}");
        assert!((4.0..=8.0).contains(&number("slots")), "the busiest rank, {row}");
        assert!((2.0..=4.0).contains(&number("distinct_experts")), "{row}");
    }
    assert_eq!(layers[1]["slots"], 4.0, "perfect routing leaves no rank busier");
    let drawing = std::fs::read_to_string(&plot).unwrap();
    std::fs::remove_file(&plot).unwrap();
    assert!(drawing.starts_with("<svg") && drawing.contains("busiest of 2 ranks"), "{drawing}");
    assert!(!drawing.contains("NaN") && !drawing.contains("inf"), "{drawing}");
    let table = layers_on_cuda(&["--ep-size", "8", "--weights", "bf16", "--skew", "2"]);
    for words in ["routing + order us", "random / perfect", "bf16 weights", "meaningless", "without the gate"] {
        assert!(table.contains(words), "{words:?} is missing in\n{table}");
    }
    assert!(!table.contains("NaN"), "{table}");
}
