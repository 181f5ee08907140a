//! The example `bench_moe` as a user runs it.

use crate::program::{assert_rejected, json_of, run_unread, stdout_of, text};
use serde_json::{Value, json};

const BENCH: &str = "bench_moe";
/// Arguments that make the benchmark short.
const SHORT: [&str; 8] = ["--profile", "tiny", "--num-tokens", "1,5", "--iters", "3", "--seconds", "0"];

fn short(more: &[&'static str]) -> Vec<&'static str> {
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
        "only",
        "output",
    ];
    let help = stdout_of(BENCH, &["--help"]);
    for flag in bench {
        assert!(help.contains(&format!("--{flag} ")), "--{flag} is missing in\n{help}");
    }
    assert!(help.contains("meaningless"), "{help}");
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
    assert_rejected(BENCH, &["--device", "cuda", "--only", "layer"], &["measured on the CPU only"]);
    assert_rejected(BENCH, &["--device", "cuda", "--profile", "tiny"], &["--shape"]);
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
    let table = stdout_of(BENCH, &[&short[..], &["--method", "Llama4", "--only", "routed-order"]].concat());
    assert!(table.contains("Llama4") && table.contains("Copy bandwidth") && !table.contains("NaN"), "{table}");
}
