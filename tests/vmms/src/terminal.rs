//! Programs that insist on a terminal.

use std::ffi::OsString;
use std::process::Command;

/// `program` with its arguments on a terminal of its own, whose other end is on pipes.
pub fn on_terminal(program: &[OsString]) -> Command {
    let words: Vec<String> = program
        .iter()
        .map(|word| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''")))
        .collect();
    let mut command = Command::new("script");
    command
        .args(["--quiet", "--return", "--command"])
        .arg(format!("exec {}", words.join(" ")))
        .arg("/dev/null");
    command
}
