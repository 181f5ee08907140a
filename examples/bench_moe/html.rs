//! The report as a web page of its own: a chart and a table for each thing that was measured.

use crate::common::chart::{self, Labels, Line, Point};
use crate::common::page::{Cells, Page};
use crate::common::report::digits;
use anyhow::Result;
use std::path::Path;

/// One measurement; times in microseconds.
#[derive(Debug, Clone)]
pub(crate) struct Timed {
    /// The chart that it belongs to.
    pub(crate) chart: String,
    /// Its line in that chart.
    pub(crate) line: String,
    pub(crate) num_tokens: usize,
    pub(crate) median_us: f64,
    pub(crate) p10_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) floor_us: f64,
}

/// Writes the page.
///
/// `text` is what the table output says around its tables, a paragraph a line.
pub(crate) fn write(file: &Path, text: &str, measurements: &[Timed]) -> Result<()> {
    let mut page = Page::new("MoE layers", "Routing, expert order and MoE layers");
    page.paragraphs(text);
    let mut charts: Vec<&str> = Vec::new();
    for measurement in measurements {
        if !charts.contains(&measurement.chart.as_str()) {
            charts.push(&measurement.chart);
        }
    }
    for chart in charts {
        let of_chart: Vec<_> = measurements.iter().filter(|measurement| measurement.chart == chart).collect();
        section(&mut page, chart, &of_chart);
    }
    page.write(file)
}

fn section(page: &mut Page, title: &str, measurements: &[&Timed]) {
    page.heading(title);
    page.paragraphs("Microseconds: median, and the tenth to the ninetieth percentile; the floors are dashed.");
    let lines = lines(measurements);
    let label = format!("{title}: microseconds against tokens, {} lines", lines.len());
    page.drawing(&chart::draw(&lines, Labels { tokens: "tokens of a rank", unit: "us", drawing: &label }));
    let columns = [
        Cells::Text("line"),
        Cells::Number("tokens"),
        Cells::Number("median"),
        Cells::Number("p10"),
        Cells::Number("p90"),
        Cells::Number("floor"),
        Cells::Number("floor / median"),
    ];
    let rows = measurements.iter().map(|measurement| {
        let Timed { line, num_tokens, median_us, p10_us, p90_us, floor_us, .. } = measurement;
        let times = [*median_us, *p10_us, *p90_us, *floor_us].map(digits);
        let names = [line.clone(), num_tokens.to_string()];
        names.into_iter().chain(times).chain([format!("{:.2}", floor_us / median_us)]).collect()
    });
    page.table(title, &columns, rows);
}

/// A line for each name, and its floor beside it.
fn lines(measurements: &[&Timed]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let mut add = |name: String, is_dashed: bool, point: Point| match lines.iter_mut().find(|line| line.name == name) {
        Some(line) => line.points.push(point),
        None => lines.push(Line { colour: lines.len() / 2, name, is_dashed, points: vec![point] }),
    };
    for measurement in measurements {
        let &&Timed { num_tokens, median_us, p10_us, p90_us, floor_us, ref line, .. } = measurement;
        add(line.clone(), false, Point { num_tokens, value: median_us, low: p10_us, high: p90_us });
        let floor = Point { num_tokens, value: floor_us, low: floor_us, high: floor_us };
        add(format!("{line}, floor"), true, floor);
    }
    lines
}
