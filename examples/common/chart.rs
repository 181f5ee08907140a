//! Lines over numbers of tokens, both axes logarithmic, in SVG.

use super::page::escaped;
use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 12.0;
/// For names of lines.
const RIGHT: f64 = 230.0;

/// Colours that stay apart for colour-blind eyes (after Tol), on light and on dark paper.
pub(crate) const COLOURS: [&str; 8] =
    ["#4477aa", "#ee6677", "#228833", "#aa3377", "#66aacc", "#bb9922", "#888888", "#cc7744"];

/// A value for one number of tokens, and what it spreads over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub(crate) num_tokens: usize,
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// One line. Points that are not positive are left out.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) colour: usize,
    pub(crate) is_dashed: bool,
    pub(crate) points: Vec<Point>,
}

/// Maps values to places.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    /// Wide enough for all points.
    fn new(points: &[Point]) -> Self {
        let around = |values: &mut dyn Iterator<Item = f64>| {
            let (least, most) =
                values.fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(value), most.max(value)));
            if least > most { (0.5, 2.0) } else { (least / 1.1, most * 1.1) }
        };
        Self {
            x: around(&mut points.iter().map(|point| point.num_tokens as f64)),
            y: around(&mut points.iter().flat_map(|point| [point.low, point.high])),
        }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + WIDTH * place(value, self.x)
    }

    fn y(&self, value: f64) -> f64 {
        TOP + HEIGHT * (1.0 - place(value, self.y))
    }

    /// Of 1, 2 and 5 times the powers of ten, those within, or every power where they are many.
    fn marks(&self) -> Vec<f64> {
        let within = |mantissas: &[f64]| -> Vec<f64> {
            let powers = -6..=12;
            let marks = powers.flat_map(|power| mantissas.iter().map(move |mantissa| mantissa * 10f64.powi(power)));
            marks.filter(|mark| (self.y.0..=self.y.1).contains(mark)).collect()
        };
        let all = within(&[1.0, 2.0, 5.0]);
        if all.len() > 8 { within(&[1.0]) } else { all }
    }
}

/// Where `value` lies on a logarithmic axis, 0 to 1.
fn place(value: f64, (least, most): (f64, f64)) -> f64 {
    (value / least).ln() / (most / least).ln()
}

/// What stands at the axes, and for those who do not see them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Labels<'a> {
    pub(crate) tokens: &'a str,
    pub(crate) unit: &'a str,
    pub(crate) drawing: &'a str,
}

/// Draws `lines`, whose names and the labels are plain text.
pub(crate) fn draw(lines: &[Line], labels: Labels) -> String {
    let lines: Vec<_> = lines.iter().map(positive).filter(|line| !line.points.is_empty()).collect();
    let points: Vec<_> = lines.iter().flat_map(|line| line.points.iter().copied()).collect();
    let axes = Axes::new(&points);
    let (width, height) = (LEFT + WIDTH + RIGHT, TOP + (HEIGHT + 40.0).max(20.0 * (lines.len() as f64 + 1.0)));
    let label = escaped(labels.drawing);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\" aria-label=\"{label}\">\n"
    );
    draw_axes(&mut svg, &axes, &points, labels);
    for (i, line) in lines.iter().enumerate() {
        draw_line(&mut svg, &axes, line);
        draw_name(&mut svg, i, line);
    }
    svg.push_str("</svg>\n");
    svg
}

fn positive(line: &Line) -> Line {
    let points = line.points.iter().copied().filter(|point| point.low > 0.0).collect();
    Line { points, ..line.clone() }
}

fn draw_axes(svg: &mut String, axes: &Axes, points: &[Point], labels: Labels) {
    let (tokens, unit) = (escaped(labels.tokens), escaped(labels.unit));
    let (left, right, bottom) = (LEFT, LEFT + WIDTH, TOP + HEIGHT);
    for mark in axes.marks() {
        let y = axes.y(mark);
        let _ = writeln!(
            svg,
            "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"faint end\" x=\"{:.1}\" y=\"{:.1}\">{mark}</text>",
            left - 6.0,
            y + 4.0
        );
    }
    let mut sizes: Vec<_> = points.iter().map(|point| point.num_tokens).collect();
    sizes.sort_unstable();
    sizes.dedup();
    // Twelve names find room.
    for size in sizes.iter().step_by(sizes.len().div_ceil(12).max(1)) {
        let x = axes.x(*size as f64);
        let _ = writeln!(svg, "<text class=\"faint middle\" x=\"{x:.1}\" y=\"{:.1}\">{size}</text>", bottom + 18.0);
    }
    let _ = writeln!(
        svg,
        "<text class=\"faint middle\" x=\"{:.1}\" y=\"{:.1}\">{tokens}</text>\
         <text class=\"faint\" x=\"0\" y=\"{TOP}\">{unit}</text>",
        (left + right) / 2.0,
        bottom + 36.0
    );
}

/// The values, and the area that they spread over.
fn draw_line(svg: &mut String, axes: &Axes, line: &Line) {
    let corner = |point: &Point, value: f64| format!("{:.1},{:.1}", axes.x(point.num_tokens as f64), axes.y(value));
    let join = |corners: Vec<String>| corners.join(" ");
    let values = join(line.points.iter().map(|point| corner(point, point.value)).collect());
    let above = line.points.iter().map(|point| corner(point, point.high));
    let below = line.points.iter().rev().map(|point| corner(point, point.low));
    let area = join(above.chain(below).collect());
    let colour = COLOURS[line.colour % COLOURS.len()];
    let dashes = if line.is_dashed { " stroke-dasharray=\"6 4\"" } else { "" };
    let _ = writeln!(
        svg,
        "<polygon points=\"{area}\" fill=\"{colour}\" fill-opacity=\"0.15\"/>\
         <polyline points=\"{values}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>"
    );
    for point in &line.points {
        let _ = writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"><title>{}, {} tokens: {:.2}</title></circle>",
            axes.x(point.num_tokens as f64),
            axes.y(point.value),
            escaped(&line.name),
            point.num_tokens,
            point.value
        );
    }
}

fn draw_name(svg: &mut String, i: usize, line: &Line) {
    let (x, y) = (LEFT + WIDTH + 16.0, TOP + 14.0 + 20.0 * i as f64);
    let dashes = if line.is_dashed { " stroke-dasharray=\"6 4\"" } else { "" };
    let (end, middle, text) = (x + 24.0, y - 4.0, x + 30.0);
    let (colour, name) = (COLOURS[line.colour % COLOURS.len()], escaped(&line.name));
    let _ = writeln!(
        svg,
        "<line x1=\"{x}\" x2=\"{end}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>\
         <text x=\"{text}\" y=\"{y}\">{name}</text>"
    );
}
