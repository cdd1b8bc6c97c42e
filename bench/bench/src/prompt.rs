//! `bench prompt`: what a user of the default guest waits for.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::setup::Setup;
use crate::statistics::{least, median};
use crate::{Outcome, Result, table};

const LIMIT: Duration = Duration::from_secs(300);
/// The end of the default guest's prompt. Its shell may ask the terminal something after it.
const PROMPT: &[u8] = b":~# ";

/// Times the default guest: prepared for the first time, with a command, to its prompt.
///
/// # Errors
/// If `anykvm` is not built.
pub fn run(setup: &Setup) -> Result<Outcome> {
    let anykvm = setup
        .anykvm
        .as_deref()
        .ok_or("this measures anykvm, which is not built: cargo build --release -p anykvm")?;
    let rounds = setup.rounds(5);
    let mut rows = Vec::new();
    let mut results = serde_json::Map::new();
    let mut failures = Vec::new();
    let mut add = |key: &str, what: &str, times: Vec<f64>| {
        let show = |time: Option<f64>| time.map_or("-".into(), |t| format!("{t:.2}"));
        rows.push(vec![what.into(), show(median(&times)), show(least(&times))]);
        results.insert(
            key.into(),
            json!({ "s": times, "median_s": median(&times) }),
        );
    };
    let mut note = |time: Result<f64>, into: &mut Vec<f64>| match time {
        Ok(time) => into.push(time),
        Err(why) => {
            eprintln!("prompt: {why}");
            failures.push(why);
        }
    };

    // A quick look does not download.
    if !setup.options.quick {
        let empty = setup.work.path().join("empty-cache");
        std::fs::create_dir_all(&empty)
            .map_err(|e| format!("cannot make {}: {e}", empty.display()))?;
        eprintln!("prompt: the first run, with a download");
        let mut first = Vec::new();
        note(command(setup, anykvm, Some(&empty)), &mut first);
        add(
            "first_command",
            "run -- true, first: downloads the guest",
            first,
        );
    }
    // The default guest may be prepared by the first of these, which is left out.
    note(command(setup, anykvm, None), &mut Vec::new());
    let (mut commands, mut prompts) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        eprintln!("prompt: round {round} of {rounds}");
        note(command(setup, anykvm, None), &mut commands);
        note(prompt(setup, anykvm), &mut prompts);
    }
    add("command", "run -- true, later", commands);
    add("prompt", "run, to the prompt", prompts);
    println!("The default guest, of {rounds} (s)");
    print!("{}", table::text(&["what", "median", "least"], &rows));
    for failure in &failures {
        println!("{failure}");
    }
    Ok(Outcome {
        good: failures.is_empty(),
        json: results.into(),
    })
}

fn anykvm_run(setup: &Setup, anykvm: &Path) -> Command {
    let memory = format!("{}M", setup.memory());
    let mut command = Command::new(anykvm);
    command.args([
        "run",
        "--engine",
        &setup.options.engine,
        "--memory",
        &memory,
    ]);
    command
}

/// Seconds of `anykvm run -- true`.
fn command(setup: &Setup, anykvm: &Path, cache: Option<&Path>) -> Result<f64> {
    let mut command = anykvm_run(setup, anykvm);
    command.args(["--", "true"]).stdin(Stdio::null());
    if let Some(cache) = cache {
        command.env("XDG_CACHE_HOME", cache);
    }
    let start = Instant::now();
    let output = command
        .output()
        .map_err(|e| format!("cannot run {}: {e}", anykvm.display()))?;
    match output.status.success() {
        true => Ok(start.elapsed().as_secs_f64()),
        false => Err(format!(
            "'anykvm run -- true' failed: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
                .trim()
                .lines()
                .last()
                .unwrap_or_default()
        )),
    }
}

/// Seconds to the prompt of the default guest's shell.
fn prompt(setup: &Setup, anykvm: &Path) -> Result<f64> {
    let start = Instant::now();
    let mut child = anykvm_run(setup, anykvm)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("cannot run {}: {e}", anykvm.display()))?;
    let (sender, prompt) = mpsc::channel();
    let reader = child.stdout.take().map(|mut out| {
        std::thread::spawn(move || {
            let mut seen = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = out.read(&mut buffer) {
                seen.extend_from_slice(&buffer[..length]);
                if seen.windows(PROMPT.len()).any(|part| part == PROMPT) {
                    // The receiver takes the first and may be gone for another.
                    let _ = sender.send(Instant::now());
                }
            }
        })
    });
    let result = prompt
        .recv_timeout(LIMIT)
        .map(|at| (at - start).as_secs_f64())
        .map_err(|_| "the default guest's prompt did not come".to_owned());
    if let Some(mut input) = child.stdin.take() {
        // If it has ended, that is seen below.
        let _ = input.write_all(b"exit\n");
        drop(input);
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    if let Some(reader) = reader {
        let _ = reader.join();
    }
    result
}
