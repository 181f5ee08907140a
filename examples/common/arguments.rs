//! Command lines.

use std::ffi::OsString;

/// The arguments with dashes for the underscores in names of flags, `--ep-size` for `--ep_size`; values stay as they are.
pub(crate) fn with_dashes(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut only_values = false;
    let dashed = |argument: OsString| {
        only_values |= argument == "--";
        match argument.to_str() {
            Some(text) if text.starts_with("--") && !only_values => dashed_name(text).into(),
            _ => argument,
        }
    };
    arguments.into_iter().map(dashed).collect()
}

fn dashed_name(argument: &str) -> String {
    match argument.split_once('=') {
        Some((name, value)) => format!("{}={value}", name.replace('_', "-")),
        None => argument.replace('_', "-"),
    }
}
