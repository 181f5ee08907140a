//! A drawing of what layers take: a chart per profile and number of ranks, both axes logarithmic.

use super::report::{LayerRow, Report};
use crate::workload::Choice;
use std::fmt::Write;

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 340.0;
const COLUMNS: usize = 2;
/// Around the axes of a chart: left, right, top, bottom.
const MARGINS: [f64; 4] = [64.0, 20.0, 40.0, 48.0];
const HEAD: f64 = 64.0;
const STYLE: &str = "text{font:12px sans-serif;fill:#333}.title{font-size:14px;font-weight:bold}.grid{stroke:#e2e2e2}\
    .line{fill:none;stroke-width:2}.floor{stroke-dasharray:5 4;stroke-width:1.5}";

/// A line of a chart: its name, color, whether it is dashed, and which value of a row it shows.
type Series = (&'static str, &'static str, &'static str, Choice, fn(&LayerRow) -> f64);

const SERIES: [Series; 4] = [
    ("random", "#c2410c", "line", Choice::Random, |row| row.median_us),
    ("perfect", "#1d4ed8", "line", Choice::Perfect, |row| row.median_us),
    ("floor of random", "#fb923c", "line floor", Choice::Random, |row| row.floor_us),
    ("floor of perfect", "#93c5fd", "line floor", Choice::Perfect, |row| row.floor_us),
];

/// The drawing.
pub(super) fn svg(report: &Report) -> String {
    let charts: Vec<_> = report.layers.chunk_by(|a, b| (a.profile, a.ep_size) == (b.profile, b.ep_size)).collect();
    let columns = charts.len().clamp(1, COLUMNS);
    let (width, height) = (columns as f64 * WIDTH, HEAD + charts.len().div_ceil(columns) as f64 * HEIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">\n\
         <style>{STYLE}</style>\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text class=\"title\" x=\"16\" y=\"24\">Time of a layer without its gate, {}</text>\n{}",
        escaped(&report.metadata.device_name),
        legend()
    );
    for (i, rows) in charts.iter().enumerate() {
        let (x, y) = ((i % columns) as f64 * WIDTH, HEAD + (i / columns) as f64 * HEIGHT);
        let _ = writeln!(svg, "<g transform=\"translate({x} {y})\">\n{}</g>", Chart::new(rows).svg());
    }
    svg + "</svg>\n"
}

fn legend() -> String {
    let (mut svg, mut x) = (String::new(), 16.0);
    for (name, color, class, ..) in SERIES {
        let _ = write!(svg, "<path class=\"{class}\" stroke=\"{color}\" d=\"M{x} 44h24\"/>");
        let _ = writeln!(svg, "<text x=\"{}\" y=\"48\">{name}</text>", x + 30.0);
        x += 44.0 + 6.5 * name.len() as f64;
    }
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// A chart of the rows of one profile.
struct Chart<'a> {
    rows: &'a [LayerRow],
    /// Smallest and largest of what the axes show, in powers of two and of ten.
    tokens: [f64; 2],
    decades: [f64; 2],
}

impl<'a> Chart<'a> {
    fn new(rows: &'a [LayerRow]) -> Self {
        let tokens = range(rows.iter().map(|row| (row.num_tokens as f64).log2()));
        let times = range(rows.iter().flat_map(|row| [row.median_us.log10(), row.floor_us.log10()]));
        let decades = [times[0].floor(), times[1].ceil()];
        // Axes have a length.
        let wide = |[low, high]: [f64; 2]| [low, if high > low { high } else { low + 1.0 }];
        Self { rows, tokens: wide(tokens), decades: wide(decades) }
    }

    fn x(&self, tokens: f64) -> f64 {
        let [left, right, ..] = MARGINS;
        left + share(self.tokens, tokens.log2()) * (WIDTH - left - right)
    }

    fn y(&self, us: f64) -> f64 {
        let [.., top, bottom] = MARGINS;
        HEIGHT - bottom - share(self.decades, us.log10()) * (HEIGHT - top - bottom)
    }

    fn svg(&self) -> String {
        let LayerRow { profile, ep_size, weights, .. } = &self.rows[0];
        let ranks = if *ep_size == 1 { String::new() } else { format!(", busiest of {ep_size} ranks") };
        let mut svg =
            format!("<text class=\"title\" x=\"{}\" y=\"24\">{profile}, {weights}{ranks}</text>\n", MARGINS[0]);
        svg += &self.axes();
        for (_, color, class, choice, value) in SERIES {
            let of_series = self.rows.iter().filter(|row| row.routing == choice.name());
            let points = of_series.map(|row| format!("{:.1},{:.1}", self.x(row.num_tokens as f64), self.y(value(row))));
            let points = points.collect::<Vec<_>>().join(" ");
            let _ = writeln!(svg, "<polyline class=\"{class}\" stroke=\"{color}\" points=\"{points}\"/>");
        }
        svg
    }

    fn axes(&self) -> String {
        let [left, right, top, bottom] = MARGINS;
        let (end, base) = (WIDTH - right, HEIGHT - bottom);
        let mut svg = String::new();
        for power in self.tokens[0].ceil() as i32..=self.tokens[1].floor() as i32 {
            let (x, tokens) = (self.x(2f64.powi(power)), 1u64 << power);
            let _ = writeln!(svg, "<path class=\"grid\" d=\"M{x:.1} {top}V{base}\"/>");
            if power % 2 == 0 || self.tokens[1] - self.tokens[0] < 8.0 {
                let _ =
                    writeln!(svg, "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{tokens}</text>", base + 18.0);
            }
        }
        for power in self.decades[0] as i32..=self.decades[1] as i32 {
            let us = 10f64.powi(power);
            let y = self.y(us);
            let _ = writeln!(svg, "<path class=\"grid\" d=\"M{left} {y:.1}H{end}\"/>");
            let _ = writeln!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{us} us</text>", left - 6.0, y + 4.0);
        }
        let middle = (left + end) / 2.0;
        let _ = writeln!(svg, "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">tokens</text>", base + 36.0);
        svg
    }
}

fn range(values: impl Iterator<Item = f64>) -> [f64; 2] {
    values.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], value| [low.min(value), high.max(value)])
}

/// Where `value` lies between both.
fn share([low, high]: [f64; 2], value: f64) -> f64 {
    (value - low) / (high - low)
}
