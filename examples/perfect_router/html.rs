//! The report as a web page of its own: no scripts, nothing from outside, drawn in SVG.

use crate::common::page::{Cells, Page, escaped};
use crate::report::{NOTE, Report};
use crate::senders::Sender;
use anyhow::Result;
use std::fmt::Write;
use std::path::Path;

/// What is drawn before the page says "more".
const MAX_SENDERS: usize = 64;
const MAX_SLOTS: usize = 64;
const MAX_CELLS: usize = 2048;
const MAX_BARS: usize = 1024;
const MAX_POINTS: usize = 512;
const MAX_LINES: usize = 16;

/// Colours that stay apart for colour-blind eyes (after Okabe and Ito, and Tol); receivers beyond them begin anew.
const COLOURS: [&str; 12] = [
    "#88ccee", "#e69f00", "#44bb99", "#f0e442", "#ee8866", "#bbcc33", "#cc79a7", "#77aadd", "#d9d9d9", "#ffaabb",
    "#99ddaa", "#ddcc77",
];

/// Writes the page.
pub(crate) fn write(file: &Path, report: &Report, senders: &[Sender]) -> Result<()> {
    page(report, senders)?.write(file)
}

fn page(report: &Report, senders: &[Sender]) -> Result<Page> {
    let shown: Vec<_> = senders.iter().filter(|sender| report.ep_ranks.contains(&sender.rank)).collect();
    let title = format!("Perfect router: {} experts, {} ranks", report.num_experts, report.ep_size);
    let mut page = Page::new(&title, "Who gets what under the perfect router");
    page.paragraphs(&report.headline());
    page.note(NOTE);
    page.paragraphs(&report.promise());
    receivers(&mut page, report, &shown)?;
    bars(&mut page, "Slots per rank", "rank", &report.balance.all_senders.per_rank.counts, &|rank| {
        format!("rank {rank}")
    })?;
    bars(&mut page, "Slots per expert", "expert", &report.balance.all_senders.per_expert.counts, &|expert| {
        format!("expert {expert} of rank {}", senders[0].plan.receiver(expert as u32))
    })?;
    balance_over_tokens(&mut page, report, &shown)?;
    numbers(&mut page, report);
    checks(&mut page, report)?;
    Ok(page)
}

/// A row for each sender, a cell for each slot.
fn receivers(page: &mut Page, report: &Report, shown: &[&Sender]) -> Result<()> {
    const SIZE: usize = 22;
    const GAP: usize = 5;
    const LEFT: usize = 74;
    let rows = shown.len().min(MAX_SENDERS);
    let slots = (report.num_tokens * report.top_k).min(MAX_SLOTS).min(MAX_CELLS / rows.max(1));
    // Whole tokens stand a little apart.
    let x = |slot: usize| LEFT + slot * SIZE + slot / report.top_k * GAP;
    let (width, height) = (x(slots) + SIZE, 24 + rows * SIZE + 6);
    page.heading("Receiver of each slot");
    page.paragraphs(
        "A row for each sender, a column for each slot, tokens a little apart; the number is the receiving rank.",
    );
    let mut out = String::new();
    writeln!(
        out,
        "<svg width=\"{width}\" height=\"{height}\" role=\"img\" \
         aria-label=\"The receiving rank of the first {slots} slots of {rows} senders\">"
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
    out.push_str("</svg>");
    page.drawing(&out);
    page.more(report.num_tokens * report.top_k - slots, "slots of each sender");
    page.more(shown.len() - rows, "senders");
    Ok(())
}

/// A bar for each count, and their mean.
fn bars(page: &mut Page, title: &str, what: &str, counts: &[usize], name: &dyn Fn(usize) -> String) -> Result<()> {
    const HEIGHT: f64 = 160.0;
    let shown = &counts[..counts.len().min(MAX_BARS)];
    let most = counts.iter().copied().max().unwrap_or(0).max(1) as f64;
    let mean = counts.iter().sum::<usize>() as f64 / counts.len().max(1) as f64;
    let step = (960 / shown.len().max(1)).clamp(2, 48);
    let (width, y) = (40 + shown.len() * step, |count: f64| 10.0 + HEIGHT * (1.0 - count / most));
    page.heading(title);
    page.paragraphs(&format!("Over all senders; the dashed line is the mean, {mean:.1}."));
    let mut out = String::new();
    write!(
        out,
        "<svg width=\"{width}\" height=\"{}\" role=\"img\" aria-label=\"{title}: {} to {} slots for each {what}\">\n\
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
    writeln!(out, "<line class=\"mean\" x1=\"40\" x2=\"{width}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/>\n</svg>", y(mean))?;
    page.drawing(&out);
    page.more(counts.len() - shown.len(), &format!("{what}s"));
    Ok(())
}

/// How far apart the ranks are after each token, a line for each sender.
fn balance_over_tokens(page: &mut Page, report: &Report, shown: &[&Sender]) -> Result<()> {
    const HEIGHT: f64 = 160.0;
    const WIDTH: f64 = 960.0;
    let points = report.num_tokens.min(MAX_POINTS);
    let drawn = &shown[..shown.len().min(MAX_LINES)];
    let bound = report.bound.as_ref().map(|bound| bound.max_minus_min);
    let most = drawn.iter().flat_map(|sender| sender.spreads.iter().take(points)).copied().max().unwrap_or(0);
    let top = most.max(bound.unwrap_or(0)).max(1) as f64;
    let x = |token: usize| 40.0 + WIDTH * token as f64 / points.max(1) as f64;
    let y = |spread: usize| 10.0 + HEIGHT * (1.0 - spread as f64 / top);
    let of_bound = match bound {
        Some(bound) => format!("; the dashed line is the bound of a plan from its beginning, {bound}"),
        None => String::new(),
    };
    page.heading("Balance over tokens");
    page.paragraphs(&format!(
        "The difference between the fullest and the emptiest rank that a sender loads, after 1 to {points} tokens{of_bound}."
    ));
    let mut out = format!(
        "<svg width=\"{}\" height=\"{}\" role=\"img\" \
         aria-label=\"Largest difference between two ranks after each of {points} tokens: at most {most}\">\n\
         <text class=\"faint\" x=\"0\" y=\"18\">{top}</text><text class=\"faint\" x=\"0\" y=\"{}\">0</text>\n\
         <line class=\"axis\" x1=\"40\" x2=\"{}\" y1=\"{2}\" y2=\"{2}\"/>\n",
        WIDTH + 60.0,
        HEIGHT + 30.0,
        HEIGHT + 10.0,
        WIDTH + 40.0,
    );
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
    out.push_str("</svg>");
    page.drawing(&out);
    page.more(report.num_tokens - points, "tokens");
    page.more(shown.len() - drawn.len(), "senders");
    Ok(())
}

fn numbers(page: &mut Page, report: &Report) {
    let all = std::iter::once((format!("all {} ranks", report.ep_size), &report.balance.all_senders));
    let each = report.balance.per_sender.iter().map(|(rank, load)| (format!("rank {rank}"), load));
    let rows = all.chain(each).take(MAX_SENDERS + 1).flat_map(|(sender, load)| {
        [("ranks", &load.per_rank), ("experts", &load.per_expert)].map(|(to, spread)| {
            let numbers = [spread.min.to_string(), spread.max.to_string(), spread.max_minus_min.to_string()];
            [sender.clone(), to.to_string()].into_iter().chain(numbers).collect()
        })
    });
    let columns = [
        Cells::Text("sent by"),
        Cells::Text("to"),
        Cells::Number("min"),
        Cells::Number("max"),
        Cells::Number("max - min"),
    ];
    page.heading("Balance in numbers");
    page.table("Slots of each rank and of each expert", &columns, rows);
    page.more(report.balance.per_sender.len().saturating_sub(MAX_SENDERS), "senders");
}

fn checks(page: &mut Page, report: &Report) -> Result<()> {
    let mut out = String::from("<ul>\n");
    for (good, text) in report.check.lines() {
        let word = if good { "ok" } else { "<span class=\"failed\">FAILED</span>" };
        writeln!(out, "<li>{word}: {}</li>", escaped(&text))?;
    }
    out.push_str("</ul>\n");
    page.heading("Checks");
    page.push(&out);
    Ok(())
}
