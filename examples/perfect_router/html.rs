//! The report as a web page of its own: no scripts, nothing from outside, drawn in SVG.

use crate::report::{NOTE, Report};
use crate::senders::Sender;
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::Path;

/// What is drawn before the page says "more".
const MAX_SENDERS: usize = 64;
const MAX_SLOTS: usize = 64;
const MAX_CELLS: usize = 2048;
const MAX_BARS: usize = 1024;
const MAX_POINTS: usize = 512;
const MAX_LINES: usize = 16;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fcfcfb; --faint: #8b8d91; --line: #d9dadc; --bar: #3b6fb6; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --paper: #17191c; --faint: #8f9297; --line: #3a3d42; --bar: #7fb0f0; --bad: #ff8a80; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { text-align: left; color: var(--faint); }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; }
.note { border-left: 4px solid var(--bad); padding-left: 1rem; } .more { color: var(--faint); } .failed { color: var(--bad); font-weight: bold; }
.drawing { overflow-x: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--ink); } svg .faint { fill: var(--faint); }
svg .cell text { fill: #14161a; text-anchor: middle; } svg .bar { fill: var(--bar); } svg .axis { stroke: var(--line); } svg .mean, svg .bound { stroke: var(--bad); stroke-dasharray: 5 4; fill: none; }
";

/// Colours that stay apart for colour-blind eyes (after Okabe and Ito, and Tol); receivers beyond them begin anew.
const COLOURS: [&str; 12] = [
    "#88ccee", "#e69f00", "#44bb99", "#f0e442", "#ee8866", "#bbcc33", "#cc79a7", "#77aadd", "#d9d9d9", "#ffaabb",
    "#99ddaa", "#ddcc77",
];

/// Writes the page.
pub(crate) fn write(file: &Path, report: &Report, senders: &[Sender]) -> Result<()> {
    let page = page(report, senders)?;
    std::fs::write(file, page).with_context(|| format!("cannot write {}; choose another --html", file.display()))
}

fn page(report: &Report, senders: &[Sender]) -> Result<String> {
    let shown: Vec<_> = senders.iter().filter(|sender| report.ep_ranks.contains(&sender.rank)).collect();
    let mut out = String::new();
    write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>Perfect router: {} experts, {} ranks</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>Who gets what under the perfect router</h1>\n<p>{}</p>\n<p class=\"note\">{NOTE}</p>\n<p>{}</p>\n",
        report.num_experts,
        report.ep_size,
        escaped(&report.headline()),
        escaped(&report.promise()),
    )?;
    receivers(&mut out, report, &shown)?;
    bars(&mut out, "Slots per rank", "rank", &report.balance.all_senders.per_rank.counts, &|rank| {
        format!("rank {rank}")
    })?;
    bars(&mut out, "Slots per expert", "expert", &report.balance.all_senders.per_expert.counts, &|expert| {
        format!("expert {expert} of rank {}", senders[0].plan.receiver(expert as u32))
    })?;
    balance_over_tokens(&mut out, report, &shown)?;
    numbers(&mut out, report)?;
    checks(&mut out, report)?;
    out.push_str("</body>\n</html>\n");
    Ok(out)
}

/// A row for each sender, a cell for each slot.
fn receivers(out: &mut String, report: &Report, shown: &[&Sender]) -> Result<()> {
    const SIZE: usize = 22;
    const GAP: usize = 5;
    const LEFT: usize = 74;
    let rows = shown.len().min(MAX_SENDERS);
    let slots = (report.num_tokens * report.top_k).min(MAX_SLOTS).min(MAX_CELLS / rows.max(1));
    // Whole tokens stand a little apart.
    let x = |slot: usize| LEFT + slot * SIZE + slot / report.top_k * GAP;
    let (width, height) = (x(slots) + SIZE, 24 + rows * SIZE + 6);
    write!(
        out,
        "<h2>Receiver of each slot</h2>\n<p>A row for each sender, a column for each slot, tokens a little apart; the number \
         is the receiving rank.</p>\n<div class=\"drawing\"><svg width=\"{width}\" height=\"{height}\" role=\"img\" \
         aria-label=\"The receiving rank of the first {slots} slots of {rows} senders\">\n"
    )?;
    for token in 0..slots.div_ceil(report.top_k) {
        writeln!(out, "<text class=\"faint\" x=\"{}\" y=\"14\">token {token}</text>", x(token * report.top_k))?;
    }
    for (i, sender) in shown.iter().take(rows).enumerate() {
        let y = 24 + i * SIZE;
        writeln!(out, "<text x=\"0\" y=\"{}\">sender {}</text>", y + 15, sender.rank)?;
        for (slot, &receiver) in sender.receivers.iter().take(slots).enumerate() {
            writeln!(
                out,
                "<g class=\"cell\"><title>sender {}, slot {slot}: expert {} of rank {receiver}</title>\
                 <rect x=\"{}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{}\"/><text x=\"{}\" y=\"{}\">{receiver}</text></g>",
                sender.rank,
                sender.topk_ids[slot],
                x(slot),
                SIZE - 2,
                SIZE - 2,
                COLOURS[receiver % COLOURS.len()],
                x(slot) + SIZE / 2 - 1,
                y + 14,
            )?;
        }
    }
    out.push_str("</svg></div>\n");
    more(out, report.num_tokens * report.top_k - slots, "slots of each sender")?;
    more(out, shown.len() - rows, "senders")
}

/// A bar for each count, and their mean.
fn bars(out: &mut String, title: &str, what: &str, counts: &[usize], name: &dyn Fn(usize) -> String) -> Result<()> {
    const HEIGHT: f64 = 160.0;
    let shown = &counts[..counts.len().min(MAX_BARS)];
    let most = counts.iter().copied().max().unwrap_or(0).max(1) as f64;
    let mean = counts.iter().sum::<usize>() as f64 / counts.len().max(1) as f64;
    let step = (960 / shown.len().max(1)).clamp(2, 48);
    let (width, y) = (40 + shown.len() * step, |count: f64| 10.0 + HEIGHT * (1.0 - count / most));
    write!(
        out,
        "<h2>{title}</h2>\n<p>Over all senders; the dashed line is the mean, {mean:.1}.</p>\n<div class=\"drawing\">\
         <svg width=\"{width}\" height=\"{}\" role=\"img\" aria-label=\"{title}: {} to {} slots for each {what}\">\n\
         <text class=\"faint\" x=\"0\" y=\"18\">{}</text><text class=\"faint\" x=\"0\" y=\"{}\">0</text>\n",
        HEIGHT + 30.0,
        counts.iter().min().unwrap_or(&0),
        counts.iter().max().unwrap_or(&0),
        counts.iter().max().unwrap_or(&0),
        HEIGHT + 10.0,
    )?;
    for (i, &count) in shown.iter().enumerate() {
        writeln!(
            out,
            "<rect class=\"bar\" x=\"{}\" y=\"{:.1}\" width=\"{}\" height=\"{:.1}\"><title>{}: {count} slots</title></rect>",
            40 + i * step,
            y(count as f64),
            (step - 1).min(40),
            HEIGHT * count as f64 / most,
            name(i),
        )?;
        // Names where there is room for them.
        if step >= 24 {
            writeln!(out, "<text class=\"faint\" x=\"{}\" y=\"{}\">{i}</text>", 40 + i * step, HEIGHT + 24.0)?;
        }
    }
    writeln!(
        out,
        "<line class=\"mean\" x1=\"40\" x2=\"{width}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/>\n</svg></div>",
        y(mean)
    )?;
    more(out, counts.len() - shown.len(), &format!("{what}s"))
}

/// How far apart the ranks are after each token, a line for each sender.
fn balance_over_tokens(out: &mut String, report: &Report, shown: &[&Sender]) -> Result<()> {
    const HEIGHT: f64 = 160.0;
    const WIDTH: f64 = 960.0;
    let points = report.num_tokens.min(MAX_POINTS);
    let drawn = &shown[..shown.len().min(MAX_LINES)];
    let bound = report.bound.as_ref().map(|bound| bound.max_minus_min);
    let most = drawn.iter().flat_map(|sender| sender.spreads.iter().take(points)).copied().max().unwrap_or(0);
    let top = most.max(bound.unwrap_or(0)).max(1) as f64;
    let x = |token: usize| 40.0 + WIDTH * token as f64 / points.max(1) as f64;
    let y = |spread: usize| 10.0 + HEIGHT * (1.0 - spread as f64 / top);
    write!(
        out,
        "<h2>Balance over tokens</h2>\n<p>The difference between the fullest and the emptiest rank that a sender loads, after \
         1 to {points} tokens{}.</p>\n<div class=\"drawing\"><svg width=\"{}\" height=\"{}\" role=\"img\" \
         aria-label=\"Largest difference between two ranks after each of {points} tokens: at most {most}\">\n\
         <text class=\"faint\" x=\"0\" y=\"18\">{top}</text><text class=\"faint\" x=\"0\" y=\"{}\">0</text>\n\
         <line class=\"axis\" x1=\"40\" x2=\"{}\" y1=\"{2}\" y2=\"{2}\"/>\n",
        match bound {
            Some(bound) => format!("; the dashed line is the bound of a plan from its beginning, {bound}"),
            None => String::new(),
        },
        WIDTH + 60.0,
        HEIGHT + 10.0,
        HEIGHT + 10.0,
        WIDTH + 40.0,
    )?;
    for (i, sender) in drawn.iter().enumerate() {
        let corners: String = sender
            .spreads
            .iter()
            .take(points)
            .enumerate()
            .map(|(token, &spread)| format!("{:.1},{:.1} {:.1},{:.1} ", x(token), y(spread), x(token + 1), y(spread)))
            .collect();
        writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"><title>sender {}</title></polyline>",
            corners.trim_end(),
            COLOURS[i % COLOURS.len()],
            sender.rank
        )?;
    }
    if let Some(bound) = bound {
        writeln!(
            out,
            "<line class=\"bound\" x1=\"40\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/>",
            WIDTH + 40.0,
            y(bound)
        )?;
    }
    out.push_str("</svg></div>\n");
    more(out, report.num_tokens - points, "tokens")?;
    more(out, shown.len() - drawn.len(), "senders")
}

fn numbers(out: &mut String, report: &Report) -> Result<()> {
    out.push_str(
        "<h2>Balance in numbers</h2>\n<table>\n<caption>Slots of each rank and of each expert</caption>\n<thead><tr>\
         <th scope=\"col\">sent by</th><th scope=\"col\">to</th><th scope=\"col\">min</th><th scope=\"col\">max</th>\
         <th scope=\"col\">max - min</th></tr></thead>\n<tbody>\n",
    );
    let all = std::iter::once((format!("all {} ranks", report.ep_size), &report.balance.all_senders));
    let each = report.balance.per_sender.iter().map(|(rank, load)| (format!("rank {rank}"), load));
    for (sender, load) in all.chain(each).take(MAX_SENDERS + 1) {
        for (to, spread) in [("ranks", &load.per_rank), ("experts", &load.per_expert)] {
            writeln!(
                out,
                "<tr><th scope=\"row\">{sender}</th><td>{to}</td><td class=\"number\">{}</td><td class=\"number\">{}</td>\
                 <td class=\"number\">{}</td></tr>",
                spread.min, spread.max, spread.max_minus_min
            )?;
        }
    }
    out.push_str("</tbody>\n</table>\n");
    more(out, report.balance.per_sender.len().saturating_sub(MAX_SENDERS), "senders")
}

fn checks(out: &mut String, report: &Report) -> Result<()> {
    out.push_str("<h2>Checks</h2>\n<ul>\n");
    for (good, text) in report.check.lines() {
        let word = if good { "ok" } else { "<span class=\"failed\">FAILED</span>" };
        writeln!(out, "<li>{word}: {}</li>", escaped(&text))?;
    }
    out.push_str("</ul>\n");
    Ok(())
}

fn more(out: &mut String, hidden: usize, what: &str) -> Result<()> {
    if hidden > 0 {
        writeln!(out, "<p class=\"more\">{hidden} more {what} not drawn; --output json has all.</p>")?;
    }
    Ok(())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
