//! `perfect_router` and `bench_moe`, run as programs.

use crate::program::{assert_rejected, json_of, run_unread, stdout_of, text};
use serde_json::{Value, json};

const ROUTER: &str = "perfect_router";
const BENCH: &str = "bench_moe";
/// Arguments that make the benchmark short.
const SHORT: [&str; 8] = ["--profile", "tiny", "--num-tokens", "1,5", "--iters", "3", "--seconds", "0"];

fn short(more: &[&'static str]) -> Vec<&'static str> {
    [&SHORT[..], more].concat()
}

#[test]
fn help_names_every_flag() {
    let router = ["num-experts", "top-k", "ep-size", "ep-rank", "num-tokens", "method", "schedule", "output"];
    let bench = [
        "profile",
        "num-tokens",
        "ep-size",
        "dtype",
        "weights",
        "iters",
        "seconds",
        "seed",
        "threads",
        "only",
        "output",
    ];
    for (name, flags) in [(ROUTER, &router[..]), (BENCH, &bench)] {
        let help = stdout_of(name, &["--help"]);
        for flag in flags {
            assert!(help.contains(&format!("--{flag} ")), "{name}: --{flag} is missing in\n{help}");
        }
        assert!(help.contains("meaningless"), "{help}");
    }
}

#[test]
fn perfect_router_without_arguments_shows_the_worked_example() {
    let table = stdout_of(ROUTER, &[]);
    for words in ["who gets what", "receiver at each step", "balance", "max - min", "check: ok", "meaningless"] {
        assert!(table.to_lowercase().contains(words), "{words:?} is missing in\n{table}");
    }
    let report = json_of(ROUTER, &["--output", "json"]);
    assert_eq!(
        report["topk_ids"],
        json!({
            "0": [[0, 2], [4, 6], [1, 3], [5, 7]],
            "1": [[2, 4], [6, 1], [3, 5], [7, 0]],
            "2": [[4, 6], [1, 3], [5, 7], [0, 2]],
            "3": [[6, 1], [3, 5], [7, 0], [2, 4]],
        })
    );
    assert_eq!(report["receivers"]["1"], json!([1, 2, 3, 0, 1, 2, 3, 0]));
    assert_eq!(report["balance"]["all_senders"]["per_rank"]["counts"], json!([8, 8, 8, 8]));
    assert_eq!(report["balance"]["all_senders"]["per_expert"]["max_minus_min"], 0);
    assert_eq!(report["check"]["passed"], true);
    assert_eq!(report["check"]["routing"].as_array().unwrap().len(), 3);
    let parameters = json!({"num_experts": 8, "top_k": 2, "ep_size": 4, "ep_ranks": [0, 1, 2, 3], "num_tokens": 4,
                            "method": "Renormalize", "schedule": "rank-rotated"});
    for (key, value) in parameters.as_object().unwrap() {
        assert_eq!(&report[key], value, "{key}");
    }
}

#[test]
fn perfect_router_takes_underscores_and_one_rank() {
    let dashed = ["--num-experts", "12", "--top-k", "5", "--ep-size", "3", "--ep-rank", "2", "--num-tokens", "7"];
    let underscored = dashed.map(|arg| match arg.strip_prefix("--") {
        Some(flag) => format!("--{}", flag.replace('-', "_")),
        None => arg.to_string(),
    });
    let json = ["--output", "json", "--method", "sigmoid-renorm", "--schedule", "rank_rotated"];
    let report = json_of(ROUTER, &[&dashed[..], &json].concat());
    let same = underscored.iter().map(String::as_str).chain(json).collect::<Vec<_>>();
    assert_eq!(report, json_of(ROUTER, &same));
    assert_eq!(report["topk_ids"].as_object().unwrap().keys().collect::<Vec<_>>(), ["2"]);
    assert_eq!(report["topk_ids"]["2"].as_array().unwrap().len(), 7);
    assert_eq!(report["method"], "SigmoidRenorm");
}

#[test]
fn perfect_router_checks_every_method_and_shortens_tables_only() {
    for method in candle_moe::routing::RoutingMethod::ALL {
        let args = ["--num-experts", "64", "--top-k", "6", "--ep-size", "8", "--num-tokens", "300", "--method"];
        let table = stdout_of(ROUTER, &[&args[..], &[method.name()]].concat());
        assert!(table.contains("Check: ok") && table.contains("more rows not shown"), "{table}");
        assert!(table.lines().count() < 150, "{table}");
    }
    let report = json_of(ROUTER, &["--num-tokens", "300", "--output", "json"]);
    assert_eq!(report["topk_ids"]["3"].as_array().unwrap().len(), 300);
    assert_eq!(json_of(ROUTER, &["--num-tokens", "0", "--output", "json"])["check"]["passed"], true);
}

#[test]
fn perfect_router_says_what_is_wrong_with_its_arguments() {
    assert_rejected(
        ROUTER,
        &["--ep-size", "3"],
        &["num_experts is 8", "ep_size, which is 3", "--num-experts 6 or 9", "--ep-size 2"],
    );
    assert_rejected(ROUTER, &["--ep-size", "0"], &["ep_size is 0", "--ep-size 1 or more"]);
    assert_rejected(ROUTER, &["--num-experts", "0"], &["num_experts is 0", "--num-experts 4"]);
    assert_rejected(ROUTER, &["--ep-rank", "4"], &["ep_rank is 4", "--ep-rank from 0 to 3"]);
    assert_rejected(ROUTER, &["--ep-rank", "first"], &["first", "all"]);
    assert_rejected(ROUTER, &["--top-k", "9"], &["top_k is 9", "--top-k from 1 to 8"]);
    assert_rejected(
        ROUTER,
        &["--num-tokens", "18446744073709551615"],
        &["num_tokens is 18446744073709551615", "fewer tokens"],
    );
    assert_rejected(ROUTER, &["--num-tokens", "-1"], &["num-tokens"]);
    assert_rejected(ROUTER, &["--method", "best"], &["\"best\"", "Renormalize"]);
    assert_rejected(ROUTER, &["--schedule", "other"], &["other", "rank-rotated"]);
    assert_rejected(ROUTER, &["--output", "xml"], &["xml", "table", "json"]);
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
    for (name, args) in [(ROUTER, vec!["--num-tokens", "5000", "--output", "json"]), (BENCH, short(&[]))] {
        let output = run_unread(name, &args);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{name}");
    }
}
