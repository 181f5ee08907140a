//! Tables, JSON and exit codes.

use anyhow::Result;
use comfy_table::{Cell, CellAlignment, LineStyle, Row, Table, TableStyle};
use serde::Serialize;
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

/// `--output`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Table,
    /// For programs: one pretty-printed value, nothing else on stdout.
    Json,
}

/// Whether what the program checks came out right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Exit code 0.
    Passed,
    /// Exit code 1.
    Failed,
}

/// Arguments that are well formed one by one and make no sense together: exit code 2, as clap's own errors.
///
/// The text names the values and says what to do next.
#[derive(Debug)]
pub(crate) struct BadArguments(pub(crate) String);

impl Display for BadArguments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadArguments {}

/// The text of a library error without the backtrace that `RUST_BACKTRACE=1` adds, for errors of the user's own making.
pub(crate) fn plain(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => plain(inner),
        other => other.to_string(),
    }
}

/// Ends `main`: reports an error on stderr and chooses the exit code.
pub(crate) fn finish(outcome: Result<Verdict>) -> ExitCode {
    let error = match outcome {
        Ok(Verdict::Passed) => return ExitCode::SUCCESS,
        Ok(Verdict::Failed) => return ExitCode::from(1),
        Err(error) => error,
    };
    // Nobody may be listening there either.
    let _ = writeln!(io::stderr(), "error: {error:#}");
    if !error.is::<BadArguments>() {
        return ExitCode::from(1);
    }
    let _ = writeln!(io::stderr(), "\nFor more information, try '--help'.");
    ExitCode::from(2)
}

/// Writes `text` and a line end to stdout. A reader that has gone away is no error: it has seen what it wanted.
pub(crate) fn print(text: impl Display) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes `value` to stdout as pretty JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    print(serde_json::to_string_pretty(value)?)
}

/// A column of a [`table`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum Column<'a> {
    /// Left-aligned.
    Text(&'a str),
    /// Right-aligned.
    Number(&'a str),
}

/// An empty table in the style of all examples: a header, a line, right-aligned numbers.
pub(crate) fn table<'a>(columns: impl IntoIterator<Item = Column<'a>>) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
    let (names, alignments): (Vec<_>, Vec<_>) = columns
        .into_iter()
        .map(|column| match column {
            Column::Text(name) => (name, CellAlignment::Left),
            Column::Number(name) => (name, CellAlignment::Right),
        })
        .unzip();
    table.set_header(names);
    for (column, alignment) in table.column_iter_mut().zip(alignments) {
        column.set_cell_alignment(alignment);
    }
    table
}

/// A row of a [`table`].
pub(crate) fn row<T: Display>(cells: impl IntoIterator<Item = T>) -> Row {
    Row::from(cells.into_iter().map(Cell::new).collect::<Vec<_>>())
}

/// At most `max` items joined by spaces, each as wide as `width`, and how many were left out.
pub(crate) fn joined<T: Display>(items: &[T], max: usize, width: usize) -> String {
    let shown: Vec<_> = items.iter().take(max).map(|item| format!("{item:>width$}")).collect();
    match items.len().saturating_sub(max) {
        0 => shown.join(" "),
        hidden => format!("{} ... {hidden} more", shown.join(" ")),
    }
}

/// Three significant digits at least, as many as it takes for the whole part.
pub(crate) fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
