//! A report as a web page of its own: no scripts, nothing from outside.

use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::Path;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fcfcfb; --faint: #74777c; --line: #d9dadc; --bar: #3b6fb6; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --paper: #17191c; --faint: #9b9ea3; --line: #3a3d42; --bar: #7fb0f0; --bad: #ff8a80; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.drawing, .numbers { overflow-x: auto; } .more { color: var(--faint); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { text-align: left; color: var(--faint); }
th, td { text-align: right; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td.text { text-align: left; }
.note { border-left: 4px solid var(--bad); padding-left: 1rem; } .failed { color: var(--bad); font-weight: bold; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); } svg .faint { fill: var(--faint); }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; } svg .axis { stroke: var(--line); } svg .bar { fill: var(--bar); }
svg .cell text { fill: #14161a; text-anchor: middle; }
svg .mean, svg .bound { stroke: var(--bad); stroke-dasharray: 5 4; fill: none; }
";

/// A page that grows. What is called a text is escaped here; what is called markup is not.
#[derive(Debug)]
pub(crate) struct Page {
    markup: String,
}

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cells<'a> {
    Text(&'a str),
    Number(&'a str),
}

impl Page {
    pub(crate) fn new(title: &str, heading: &str) -> Self {
        let (title, heading) = (escaped(title), escaped(heading));
        let markup = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<h1>{heading}</h1>\n"
        );
        Self { markup }
    }

    /// A paragraph for each line.
    pub(crate) fn paragraphs(&mut self, text: &str) {
        for line in text.lines().filter(|line| !line.is_empty()) {
            let _ = writeln!(self.markup, "<p>{}</p>", escaped(line));
        }
    }

    pub(crate) fn note(&mut self, text: &str) {
        let _ = writeln!(self.markup, "<p class=\"note\">{}</p>", escaped(text));
    }

    pub(crate) fn heading(&mut self, text: &str) {
        let _ = writeln!(self.markup, "<h2>{}</h2>", escaped(text));
    }

    /// Anything.
    pub(crate) fn push(&mut self, markup: &str) {
        self.markup.push_str(markup);
    }

    /// An SVG element, which may be wider than the page.
    pub(crate) fn drawing(&mut self, markup: &str) {
        let _ = writeln!(self.markup, "<div class=\"drawing\">{markup}</div>");
    }

    /// Rows of texts, the first of which names its row.
    pub(crate) fn table(&mut self, caption: &str, columns: &[Cells], rows: impl IntoIterator<Item = Vec<String>>) {
        let out = &mut self.markup;
        let _ = write!(out, "<div class=\"numbers\"><table>\n<caption>{}</caption>\n<thead><tr>", escaped(caption));
        for Cells::Text(name) | Cells::Number(name) in columns {
            let _ = write!(out, "<th scope=\"col\">{}</th>", escaped(name));
        }
        out.push_str("</tr></thead>\n<tbody>\n");
        for row in rows {
            out.push_str("<tr>");
            for (i, (cell, column)) in row.iter().zip(columns).enumerate() {
                let cell = escaped(cell);
                let _ = match (i, column) {
                    (0, _) => write!(out, "<th scope=\"row\">{cell}</th>"),
                    (_, Cells::Text(_)) => write!(out, "<td class=\"text\">{cell}</td>"),
                    (_, Cells::Number(_)) => write!(out, "<td>{cell}</td>"),
                };
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody>\n</table></div>\n");
    }

    /// Says that something was left out, if something was.
    pub(crate) fn more(&mut self, hidden: usize, what: &str) {
        if hidden > 0 {
            let what = escaped(what);
            let _ =
                writeln!(self.markup, "<p class=\"more\">{hidden} more {what} not drawn; --output json has all.</p>");
        }
    }

    pub(crate) fn markup(self) -> String {
        self.markup + "</body>\n</html>\n"
    }

    /// Writes the page where `--html` says.
    pub(crate) fn write(self, file: &Path) -> Result<()> {
        std::fs::write(file, self.markup())
            .with_context(|| format!("cannot write {}; choose another --html", file.display()))
    }
}

/// `text` as it may stand in an element and in an attribute.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
