//! The report as a web page of its own: no scripts, nothing from outside, drawn in SVG.

use crate::common::chart::{self, COLOURS, Labels, Line, Point};
use crate::common::page::{Cells, Page};
use crate::common::report::digits;
use crate::common::stats::Summary;
use crate::measurement::{Measurement, Volume};
use crate::report::{Report, gb_per_s};
use anyhow::Result;
use std::fmt::Write;
use std::path::Path;

/// Ranks that are drawn before the page says "more".
const MAX_RANKS: usize = 64;

/// Writes the page.
pub(crate) fn write(file: &Path, report: &Report) -> Result<()> {
    page(report).write(file)
}

fn page(report: &Report) -> Page {
    let mut page = Page::new("Dispatch and combine", "Dispatch and combine of a MoE layer");
    page.paragraphs(&report.heading());
    let measurements = &report.measurements;
    let us = "Microseconds of the slowest rank of each round: median, and the tenth to the ninetieth percentile.";
    section(&mut page, "Dispatch", us, &lines(measurements, |m| time(&m.slowest_dispatch_us)), "us");
    section(&mut page, "Combine", us, &lines(measurements, |m| time(&m.slowest_combine_us)), "us");
    let wire = "Bytes that go to other ranks, of all ranks together, in the median: 10^9 per second.";
    let dispatch = lines(measurements, |m| rate(m, |volume| volume.dispatch_bytes_sent, &m.slowest_dispatch_us));
    section(&mut page, "Dispatch, bytes on the wire", wire, &dispatch, "GB/s");
    let combine = lines(measurements, |m| rate(m, |volume| volume.combine_bytes_sent, &m.slowest_combine_us));
    section(&mut page, "Combine, bytes on the wire", wire, &combine, "GB/s");
    rows_of_ranks(&mut page, measurements);
    numbers(&mut page, measurements);
    page
}

fn section(page: &mut Page, title: &str, text: &str, lines: &[Line], unit: &str) {
    let label = format!("{title} in {unit} against tokens per rank, a line for each of {} backends", lines.len());
    page.heading(title);
    page.paragraphs(text);
    page.drawing(&chart::draw(lines, Labels { tokens: "tokens per rank", unit, drawing: &label }));
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
        let point = Point { num_tokens: measurement.local_batch_size, value, low, high };
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
fn rows_of_ranks(page: &mut Page, measurements: &[Measurement]) {
    const STEP: usize = 28;
    const HEIGHT: f64 = 140.0;
    let Some(measurement) = measurements.iter().max_by_key(|measurement| measurement.local_batch_size) else { return };
    let rows: Vec<_> = measurement.ranks.iter().map(|rank| rank.volume.expert_rows).collect();
    let shown = &rows[..rows.len().min(MAX_RANKS)];
    let most = rows.iter().copied().max().unwrap_or(0);
    let tokens = measurement.local_batch_size;
    let width = 60 + shown.len() * STEP;
    page.heading("Rows of each rank");
    page.paragraphs(&format!("Slots that the experts of a rank get, with {tokens} tokens per rank."));
    let mut svg = format!(
        "<svg width=\"{width}\" height=\"{}\" role=\"img\" aria-label=\"Rows of each of {} ranks, {} to \
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
            svg,
            "<rect x=\"{x}\" y=\"{:.1}\" width=\"{}\" height=\"{height:.1}\" fill=\"{}\"><title>rank {rank}: {count} rows</title>\
             </rect><text class=\"faint middle\" x=\"{}\" y=\"{:.1}\">{rank}</text>",
            10.0 + HEIGHT - height,
            STEP - 4,
            COLOURS[0],
            x + STEP / 2 - 2,
            HEIGHT + 25.0
        );
    }
    svg.push_str("</svg>");
    page.drawing(&svg);
    page.more(rows.len() - shown.len(), "ranks");
}

fn numbers(page: &mut Page, measurements: &[Measurement]) {
    let columns = ["tokens per rank", "dispatch", "p10", "p90", "combine", "p10", "p90", "skew"].map(Cells::Number);
    let columns: Vec<_> = std::iter::once(Cells::Text("backend")).chain(columns).collect();
    let rows = measurements.iter().map(|measurement| {
        let Measurement { slowest_dispatch_us: dispatch, slowest_combine_us: combine, .. } = measurement;
        let times = [dispatch.median, dispatch.p10, dispatch.p90, combine.median, combine.p10, combine.p90];
        let names = [measurement.backend.clone(), measurement.local_batch_size.to_string()];
        names.into_iter().chain(times.into_iter().chain([measurement.skew_us()]).map(digits)).collect()
    });
    page.heading("Numbers");
    let caption = "Microseconds of the slowest rank of each round, and how late the last rank entered dispatch";
    page.table(caption, &columns, rows);
}
