//! The report as a web page of its own: no scripts, nothing from outside, drawn in SVG.

use crate::chart::{self, COLOURS, Line, Point};
use crate::common::report::digits;
use crate::common::stats::Summary;
use crate::measurement::{Measurement, Volume};
use crate::report::{Report, gb_per_s};
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::Path;

/// Ranks that are drawn before the page says "more".
const MAX_RANKS: usize = 64;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fcfcfb; --faint: #74777c; --line: #d9dadc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --paper: #17191c; --faint: #9b9ea3; --line: #3a3d42; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.drawing, .numbers { overflow-x: auto; } .more { color: var(--faint); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { text-align: left; color: var(--faint); }
th, td { text-align: right; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); } th:first-child { text-align: left; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); } svg .faint { fill: var(--faint); }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; } svg .axis { stroke: var(--line); }
";

/// Writes the page.
pub(crate) fn write(file: &Path, report: &Report) -> Result<()> {
    std::fs::write(file, page(report))
        .with_context(|| format!("cannot write {}; choose another --html", file.display()))
}

fn page(report: &Report) -> String {
    let heading: String = report.heading().lines().map(|line| format!("<p>{}</p>\n", escaped(line))).collect();
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>Dispatch and combine</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>Dispatch and combine of a MoE layer</h1>\n{heading}"
    );
    let measurements = &report.measurements;
    let us = "Microseconds of the slowest rank of each round: median, and the tenth to the ninetieth percentile.";
    section(&mut out, "Dispatch", us, &lines(measurements, |m| time(&m.slowest_dispatch_us)), "us");
    section(&mut out, "Combine", us, &lines(measurements, |m| time(&m.slowest_combine_us)), "us");
    let wire = "Bytes that go to other ranks, of all ranks together, in the median: 10^9 per second.";
    let dispatch = lines(measurements, |m| rate(m, |volume| volume.dispatch_bytes_sent, &m.slowest_dispatch_us));
    section(&mut out, "Dispatch, bytes on the wire", wire, &dispatch, "GB/s");
    let combine = lines(measurements, |m| rate(m, |volume| volume.combine_bytes_sent, &m.slowest_combine_us));
    section(&mut out, "Combine, bytes on the wire", wire, &combine, "GB/s");
    rows_of_ranks(&mut out, measurements);
    numbers(&mut out, measurements);
    out.push_str("</body>\n</html>\n");
    out
}

fn section(out: &mut String, title: &str, text: &str, lines: &[Line], unit: &str) {
    let label = format!("{title} in {unit} against tokens per rank, a line for each of {} backends", lines.len());
    let drawing = chart::draw(lines, unit, &label);
    let _ = write!(out, "<h2>{title}</h2>\n<p>{text}</p>\n<div class=\"drawing\">{drawing}</div>\n");
}

/// Value, low and high.
type Spread = (f64, f64, f64);

fn time(summary: &Summary) -> Spread {
    (summary.median, summary.p10, summary.p90)
}

fn rate(measurement: &Measurement, of: fn(&Volume) -> usize, times: &Summary) -> Spread {
    let rate = |microseconds| gb_per_s(measurement.total(of), microseconds);
    (rate(times.median), rate(times.p90), rate(times.p10))
}

/// A line for each backend, dashed for processes.
fn lines(measurements: &[Measurement], of: impl Fn(&Measurement) -> Spread) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for measurement in measurements {
        let (value, low, high) = of(measurement);
        let point = Point { local_batch_size: measurement.local_batch_size, value, low, high };
        match lines.iter_mut().find(|line| line.name == measurement.backend) {
            Some(line) => line.points.push(point),
            None => lines.push(Line {
                name: measurement.backend.clone(),
                colour: lines.len(),
                is_dashed: measurement.backend.starts_with("procs"),
                points: vec![point],
            }),
        }
    }
    lines
}

/// What the experts of each rank get with the largest batch; the same for every backend.
fn rows_of_ranks(out: &mut String, measurements: &[Measurement]) {
    const STEP: usize = 28;
    const HEIGHT: f64 = 140.0;
    let Some(measurement) = measurements.iter().max_by_key(|measurement| measurement.local_batch_size) else { return };
    let rows: Vec<_> = measurement.ranks.iter().map(|rank| rank.volume.expert_rows).collect();
    let shown = &rows[..rows.len().min(MAX_RANKS)];
    let most = rows.iter().copied().max().unwrap_or(0);
    let tokens = measurement.local_batch_size;
    let width = 60 + shown.len() * STEP;
    let _ = write!(
        out,
        "<h2>Rows of each rank</h2>\n<p>Slots that the experts of a rank get, with {tokens} tokens per rank.</p>\n\
         <div class=\"drawing\"><svg width=\"{width}\" height=\"{}\" role=\"img\" aria-label=\"Rows of each of {} ranks, {} to \
         {most}\">\n<text class=\"faint end\" x=\"52\" y=\"20\">{most}</text>\
         <text class=\"faint end\" x=\"52\" y=\"{:.1}\">0</text>\n",
        HEIGHT + 30.0,
        rows.len(),
        rows.iter().min().unwrap_or(&0),
        HEIGHT + 10.0
    );
    for (rank, &count) in shown.iter().enumerate() {
        let (x, height) = (60 + rank * STEP, HEIGHT * count as f64 / most.max(1) as f64);
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{:.1}\" width=\"{}\" height=\"{height:.1}\" fill=\"{}\"><title>rank {rank}: {count} rows</title>\
             </rect><text class=\"faint middle\" x=\"{}\" y=\"{:.1}\">{rank}</text>",
            10.0 + HEIGHT - height,
            STEP - 4,
            COLOURS[0],
            x + STEP / 2 - 2,
            HEIGHT + 25.0
        );
    }
    out.push_str("</svg></div>\n");
    if rows.len() > shown.len() {
        let _ = writeln!(out, "<p class=\"more\">{} more ranks; --output json has all.</p>", rows.len() - shown.len());
    }
}

fn numbers(out: &mut String, measurements: &[Measurement]) {
    out.push_str(
        "<h2>Numbers</h2>\n<div class=\"numbers\"><table>\n<caption>Microseconds of the slowest rank of each round, and how late \
         the last rank entered dispatch</caption>\n<thead><tr>",
    );
    for name in ["backend", "tokens per rank", "dispatch", "p10", "p90", "combine", "p10", "p90", "skew"] {
        let _ = write!(out, "<th scope=\"col\">{name}</th>");
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for measurement in measurements {
        let Measurement { slowest_dispatch_us: dispatch, slowest_combine_us: combine, .. } = measurement;
        let _ =
            write!(out, "<tr><th scope=\"row\">{}</th><td>{}</td>", measurement.backend, measurement.local_batch_size);
        for value in [dispatch.median, dispatch.p10, dispatch.p90, combine.median, combine.p10, combine.p90] {
            let _ = write!(out, "<td>{}</td>", digits(value));
        }
        let _ = writeln!(out, "<td>{}</td></tr>", digits(measurement.skew_us()));
    }
    out.push_str("</tbody>\n</table></div>\n");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
