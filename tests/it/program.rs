//! Runs the example programs as a user does.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// Runs example `name`, which `cargo test` builds, with `args`.
pub(crate) fn run(name: &str, args: &[&str]) -> Output {
    command(name).args(args).output().unwrap_or_else(|error| panic!("{}: {error}", path(name).display()))
}

/// Runs it with a stdout that nobody reads.
pub(crate) fn run_unread(name: &str, args: &[&str]) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = command(name).args(args).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    child.wait_with_output().unwrap()
}

/// Starts it with more environment variables.
pub(crate) fn start(name: &str, args: &[&str], variables: &[(&str, &str)]) -> Child {
    let mut command = command(name);
    command.args(args).envs(variables.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap_or_else(|error| panic!("{}: {error}", path(name).display()))
}

/// Stdout of a run that must succeed.
pub(crate) fn stdout_of(name: &str, args: &[&str]) -> String {
    let output = run(name, args);
    assert_eq!(output.status.code(), Some(0), "{name} {args:?}: {}", text(&output.stderr));
    // Not a terminal: no progress, and no other noise.
    assert_eq!(text(&output.stderr), "", "{name} {args:?}");
    text(&output.stdout)
}

/// Stdout of a run that must succeed, which must be one JSON value and nothing else.
pub(crate) fn json_of(name: &str, args: &[&str]) -> serde_json::Value {
    let stdout = stdout_of(name, args);
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{name} {args:?}: {error}\n{stdout}"))
}

/// Asserts exit code 2, nothing on stdout, and that stderr contains all of `words`.
pub(crate) fn assert_rejected(name: &str, args: &[&str], words: &[&str]) {
    let output = run(name, args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{name} {args:?}: {stderr}");
    assert_eq!(text(&output.stdout), "", "{name} {args:?}");
    for word in words {
        assert!(stderr.contains(word), "{name} {args:?}: {word:?} is missing in {stderr}");
    }
}

/// The keys of a JSON object in alphabetical order, each with the type of its value.
pub(crate) fn keys(object: &Value) -> String {
    let mut keys: Vec<_> = object
        .as_object()
        .unwrap_or_else(|| panic!("not an object: {object}"))
        .iter()
        .map(|(key, value)| {
            let kind = match value {
                Value::Null => "null",
                Value::Bool(_) => "bool",
                Value::Number(_) => "number",
                Value::String(_) => "string",
                Value::Array(_) => "array",
                Value::Object(_) => "object",
            };
            format!("{key} {kind}")
        })
        .collect();
    keys.sort();
    keys.join(", ")
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn command(name: &str) -> Command {
    let mut command = Command::new(path(name));
    command.env("RUST_BACKTRACE", "1").env_remove("ENABLE_PERFECT_ROUTER").stdin(Stdio::null());
    command
}

/// `target/PROFILE/examples/name`, seen from the test binary in `target/PROFILE/deps`.
fn path(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(|deps| deps.parent()).expect("the test binary is in target/PROFILE/deps");
    let path = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    let advice = "build it with `cargo build --examples` in the same profile, as `cargo test` without `--test` does";
    assert!(path.is_file(), "{} is missing: {advice}", path.display());
    assert!(!is_stale(&path), "{} is older than its sources: {advice}", path.display());
    path
}

/// Whether a source that cargo noted for the program is newer than it.
fn is_stale(program: &Path) -> bool {
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    let sources = std::fs::read_to_string(program.with_extension("d")).unwrap_or_default();
    let mut sources = sources.split_whitespace().skip(1).map(|source| modified(Path::new(source)));
    sources.any(|source| source > modified(program))
}
