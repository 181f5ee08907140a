//! The example `perfect_router` as a user runs it.

use crate::checkpoint::Folder;
use crate::program::{assert_rejected, json_of, run, run_unread, stdout_of, text};
use candle_moe::routing::RoutingMethod;
use serde_json::{Value, json};

const NAME: &str = "perfect_router";

#[test]
fn help_names_every_flag() {
    let help = stdout_of(NAME, &["--help"]);
    for flag in [
        "num-experts",
        "top-k",
        "ep-size",
        "ep-rank",
        "num-tokens",
        "method",
        "schedule",
        "hot-rank",
        "hot-expert",
        "hot-fraction",
        "seed",
        "output",
        "html",
    ] {
        assert!(help.contains(&format!("--{flag} ")), "--{flag} is missing in\n{help}");
    }
    assert!(help.contains("meaningless"), "{help}");
}

#[test]
fn without_arguments_it_shows_the_worked_example() {
    let table = stdout_of(NAME, &[]);
    for words in ["who gets what", "receiver at each step", "balance", "max - min", "check: ok", "meaningless"] {
        assert!(table.to_lowercase().contains(words), "{words:?} is missing in\n{table}");
    }
    let report = json_of(NAME, &["--output", "json"]);
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
    assert_eq!(report["bound"], json!({"round": 2, "max_minus_min": 1, "is_smallest": true}));
    assert_eq!(report["balance"]["largest_max_minus_min"], 1);
    let check = &report["check"];
    for kept in ["passed", "tokens_are_valid", "formula", "latin_square", "balanced_per_sender"] {
        assert_eq!(check[kept], true, "{kept}");
    }
    assert_eq!(check["routing"].as_array().unwrap().len(), 3);
    let parameters = json!({"num_experts": 8, "top_k": 2, "ep_size": 4, "ep_ranks": [0, 1, 2, 3], "num_tokens": 4,
                            "method": "Renormalize", "schedule": "rank-rotated", "imbalance": null,
                            "groups": {"num_groups": 1, "topk_group": 1}});
    for (key, value) in parameters.as_object().unwrap() {
        assert_eq!(&report[key], value, "{key}");
    }
}

#[test]
fn it_takes_underscores_and_one_rank() {
    let dashed = ["--num-experts", "12", "--top-k", "5", "--ep-size", "3", "--ep-rank", "2", "--num-tokens", "7"];
    let underscored = dashed.map(|arg| match arg.strip_prefix("--") {
        Some(flag) => format!("--{}", flag.replace('-', "_")),
        None => arg.to_string(),
    });
    let json = ["--output", "json", "--method", "sigmoid-renorm", "--schedule", "rank_rotated"];
    let report = json_of(NAME, &[&dashed[..], &json].concat());
    let same = underscored.iter().map(String::as_str).chain(json).collect::<Vec<_>>();
    assert_eq!(report, json_of(NAME, &same));
    assert_eq!(report["topk_ids"].as_object().unwrap().keys().collect::<Vec<_>>(), ["2"]);
    assert_eq!(report["topk_ids"]["2"].as_array().unwrap().len(), 7);
    assert_eq!(report["method"], "SigmoidRenorm");
}

#[test]
fn every_method_and_schedule_passes_the_check_and_tables_are_short() {
    for method in RoutingMethod::ALL {
        for schedule in ["rank-rotated", "global-slot"] {
            let args = ["--num-experts", "64", "--top-k", "6", "--ep-size", "8", "--num-tokens", "300"];
            let method = method.to_string();
            let table = stdout_of(NAME, &[&args[..], &["--schedule", schedule, "--method", &method]].concat());
            assert!(table.contains("Check: ok") && table.contains("more rows not shown"), "{table}");
            assert!(table.contains(&method), "{table}");
            assert!(table.lines().count() < 160, "{table}");
        }
    }
    let report = json_of(NAME, &["--num-tokens", "300", "--output", "json"]);
    assert_eq!(report["topk_ids"]["3"].as_array().unwrap().len(), 300);
    assert_eq!(json_of(NAME, &["--num-tokens", "0", "--output", "json"])["check"]["passed"], true);
    // The published groups need 8 groups of 8 experts.
    assert_eq!(json_of(NAME, &["--method", "DeepSeekV3", "--output", "json"])["groups"]["num_groups"], 8);
}

fn deepseek(more: &[&str]) -> Value {
    let args =
        ["--num-experts", "256", "--top-k", "8", "--num-tokens", "128", "--method", "DeepSeekV3", "--output", "json"];
    json_of(NAME, &[&args[..], more].concat())
}

#[test]
fn deepseek_v3_is_as_balanced_as_it_can_be() {
    for (ep_size, max_minus_min) in [("8", 2), ("16", 1)] {
        let report = deepseek(&["--ep-size", ep_size]);
        assert_eq!(report["bound"], json!({"round": 2, "max_minus_min": max_minus_min, "is_smallest": true}));
        assert_eq!(report["balance"]["largest_max_minus_min"], max_minus_min);
        assert_eq!(report["balance"]["per_sender"]["3"]["per_rank"]["max_minus_min"], 0);
        assert_eq!(report["check"]["latin_square"], true);
        assert_eq!(report["check"]["formula"], Value::Null);
    }
}

#[test]
fn the_global_schedule_touches_more_experts_with_the_first_tokens() {
    let touched = |schedule| {
        let args = ["--num-experts", "256", "--top-k", "8", "--ep-size", "8", "--num-tokens", "1", "--output", "json"];
        json_of(NAME, &[&args[..], &["--schedule", schedule]].concat())["experts_of_first_tokens"].clone()
    };
    assert_eq!((touched("rank-rotated"), touched("global-slot")), (json!(15), json!(64)));
}

#[test]
fn ranks_of_different_lengths_are_even_where_they_can_be() {
    let args = ["--num-experts", "10", "--ep-size", "4", "--num-tokens", "40"];
    let table = stdout_of(NAME, &args);
    assert!(table.contains("4 ranks with 3 or 2 experts each") && table.contains("Check: ok"), "{table}");
    let report = json_of(NAME, &[&args[..], &["--output", "json"]].concat());
    assert_eq!(report["balance"]["all_senders"]["per_rank"]["counts"], json!([80, 80, 80, 80]));
    // All experts of every token: in proportion.
    let table = stdout_of(NAME, &["--num-experts", "5", "--ep-size", "2", "--top-k", "5"]);
    assert!(table.contains("in proportion to their experts") && table.contains("Check: ok"), "{table}");
}

#[test]
fn a_hot_spot_is_shown_beside_what_was_expected() {
    let args = ["--num-experts", "64", "--ep-size", "8", "--num-tokens", "1000", "--output", "json"];
    for (hot, index, expected) in [("rank", 3, 0.25 + 0.75 / 8.0), ("expert", 9, 0.25 / 2.0 + 0.75 / 64.0)] {
        let (flag, index_text) = (format!("--hot-{hot}"), index.to_string());
        let more = [&flag[..], &index_text, "--hot-fraction", "0.25", "--seed", "7"];
        let report = json_of(NAME, &[&args[..], &more].concat());
        let place = &report["imbalance"];
        assert_eq!((&place["hot"], &place["index"], &place["seed"]), (&json!(hot), &json!(index), &json!(7)));
        let number = |key: &str| place[key].as_f64().unwrap();
        assert!((number("expected") - expected).abs() < 1e-6, "{place}");
        assert!((number("measured") - expected).abs() < 0.02, "{place}");
        assert_eq!((&report["bound"], &report["check"]["passed"]), (&Value::Null, &json!(true)));
    }
    let table = stdout_of(NAME, &["--hot-rank", "1", "--num-tokens", "100"]);
    assert!(table.contains("Hot rank 1: 50 % of the tokens (seed 0)"), "{table}");
}

#[test]
fn it_says_what_is_wrong_with_its_arguments() {
    assert_rejected(NAME, &["--ep-size", "9"], &["ep_size is 9", "num_experts, which is 8", "--num-experts 9 or more"]);
    assert_rejected(NAME, &["--ep-size", "0"], &["ep_size is 0", "--ep-size 1 or more"]);
    assert_rejected(NAME, &["--num-experts", "0"], &["num_experts is 0", "--num-experts 4 or more"]);
    assert_rejected(NAME, &["--ep-rank", "4"], &["ep_rank is 4", "--ep-rank from 0 to 3"]);
    assert_rejected(NAME, &["--ep-rank", "first"], &["first", "all"]);
    assert_rejected(NAME, &["--top-k", "9"], &["top_k is 9", "--top-k from 1 to 8"]);
    assert_rejected(
        NAME,
        &["--num-tokens", "18446744073709551615"],
        &["num_tokens is 18446744073709551615", "fewer tokens"],
    );
    assert_rejected(NAME, &["--num-tokens", "-1"], &["num-tokens"]);
    assert_rejected(NAME, &["--method", "best"], &["\"best\"", "Renormalize", "DeepSeekV4"]);
    assert_rejected(NAME, &["--method", "DeepSeekV3:groups=2"], &["\"groups\"", "num_groups"]);
    let groups = ["--num-experts", "12", "--method", "DeepSeekV3"];
    assert_rejected(NAME, &groups, &["num_groups is 8", "num_experts, which is 12", "DeepSeekV3:num_groups=6"]);
    let few = ["--method", "DeepSeekV3:num_groups=8,topk_group=1"];
    assert_rejected(NAME, &few, &["top_k is 2", "1 experts of 1 groups of 1", "choose other groups"]);
    assert_rejected(NAME, &["--schedule", "other"], &["\"other\"", "rank-rotated", "global-slot"]);
    assert_rejected(NAME, &["--hot-rank", "4"], &["hot rank is 4", "--hot-rank below --ep-size"]);
    assert_rejected(NAME, &["--hot-expert", "8"], &["hot expert is 8", "--hot-expert below --num-experts"]);
    assert_rejected(NAME, &["--hot-rank", "0", "--hot-fraction", "1.5"], &["fraction is 1.5", "from 0 to 1"]);
    assert_rejected(NAME, &["--hot-rank", "0", "--hot-expert", "0"], &["--hot-rank", "--hot-expert"]);
    assert_rejected(NAME, &["--hot-fraction", "0.5"], &["without a hot spot", "--hot-rank N or --hot-expert N"]);
    assert_rejected(NAME, &["--output", "xml"], &["xml", "table", "json"]);
}

#[test]
fn nobody_reading_is_no_error() {
    let output = run_unread(NAME, &["--num-tokens", "5000", "--output", "json"]);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}

// ---------------------------------------------------------------------------------------------
// The page

/// The names of the elements in document order, after checking that every tag is closed in order.
pub(crate) fn elements(page: &str) -> Vec<String> {
    let (mut open, mut all) = (Vec::new(), Vec::new());
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("a document type");
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap().to_string();
        assert!(tag.matches('"').count().is_multiple_of(2), "quotes in <{tag}>");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "at </{tag}>");
        } else {
            all.push(name.clone());
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "{open:?} stay open");
    all
}

fn page(args: &[&str]) -> (String, Value) {
    let folder = Folder::new();
    let file = folder.path().join("plan.html");
    let more = ["--output", "json", "--html", file.to_str().unwrap()];
    let report = json_of(NAME, &[args, &more].concat());
    (std::fs::read_to_string(file).unwrap(), report)
}

#[test]
fn the_page_is_whole_and_says_what_the_report_says() {
    for args in [
        &[][..],
        &["--num-experts", "256", "--top-k", "8", "--ep-size", "16", "--num-tokens", "64", "--method", "DeepSeekV3"],
        &["--schedule", "global-slot", "--num-experts", "10", "--ep-size", "3", "--ep-rank", "1"],
        &["--hot-rank", "2", "--num-tokens", "50"],
        &["--num-tokens", "0"],
    ] {
        let (page, report) = page(args);
        let elements = elements(&page);
        let count = |name: &str| elements.iter().filter(|element| *element == name).count();
        assert_eq!((count("svg"), count("h1"), count("table"), count("caption")), (4, 1, 1, 1));
        assert_eq!((count("script"), count("link"), count("img")), (0, 0, 0));
        assert!(!page.contains("http"), "something from outside");
        assert_eq!(page.matches("role=\"img\" aria-label=\"").count(), 4);
        assert!(
            page.contains("lang=\"en\"") && page.contains("prefers-color-scheme: dark") && page.contains("meaningless")
        );
        assert!(page.contains(report["method"].as_str().unwrap()));
        let ranks = &report["balance"]["all_senders"]["per_rank"];
        for (rank, count) in ranks["counts"].as_array().unwrap().iter().enumerate() {
            assert!(page.contains(&format!("<title>rank {rank}: {count} slots</title>")), "rank {rank}");
        }
        let row = format!("<td>{}</td><td>{}</td>", ranks["max"], ranks["max_minus_min"]);
        assert!(page.contains(&row), "{row}");
        let drawn = count("g");
        let slots =
            report["topk_ids"].as_object().unwrap().values().map(|t| t.as_array().unwrap().len()).sum::<usize>();
        assert!(drawn == slots * report["top_k"].as_u64().unwrap() as usize || page.contains("not drawn"), "{drawn}");
        assert!(!page.contains("FAILED"));
    }
}

#[test]
fn a_large_page_stays_small() {
    let (page, _) = page(&["--num-experts", "256", "--top-k", "8", "--ep-size", "64", "--num-tokens", "3000"]);
    elements(&page);
    assert!(page.len() < 1 << 20, "{} bytes", page.len());
    assert!(page.contains("slots of each sender not drawn") && page.contains("more tokens not drawn"));
}

#[test]
fn a_page_that_cannot_be_written_is_a_clear_error() {
    let output = run(NAME, &["--html", "/nowhere/at/all/plan.html"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("/nowhere/at/all/plan.html") && stderr.contains("choose another --html"), "{stderr}");
}
