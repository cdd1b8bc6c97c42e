//! Runs one test: as it is on the machine's `/dev/kvm`, or under `anykvm exec`.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The exit code that says that a test does not apply (kselftest.h).
const SKIP: i32 = 4;
/// How much of a test's output is looked at.
const MAX_OUTPUT: u64 = 1 << 20;

/// What executes the guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// The translator, under `anykvm exec`
    Jit,
    /// The interpreter, under `anykvm exec`
    Interp,
    /// The machine's own /dev/kvm
    Kvm,
}

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It passed.
    Pass,
    /// It says that it does not apply here.
    Skip,
    /// It failed, or died of a signal.
    Fail,
    /// It did not end in time.
    Timeout,
    /// It was not built.
    Missing,
}

impl Outcome {
    /// As the table has it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Skip => "skip",
            Self::Fail => "FAIL",
            Self::Timeout => "TIMEOUT",
            Self::Missing => "MISSING",
        }
    }
}

/// What came of a test.
#[derive(Debug, Clone)]
pub struct Ran {
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub time: Duration,
    /// What it says about that: why it skipped or failed.
    pub says: String,
    /// All that it wrote.
    pub output: String,
}

/// Runs the test `program` with `arguments`, for at most `limit`.
#[must_use]
pub fn run(program: &Path, arguments: &[&str], engine: Engine, limit: Duration) -> Ran {
    // Not within the test's time, should it need to be built.
    if engine != Engine::Kvm {
        e2e::program::anykvm();
    }
    let start = Instant::now();
    let ended = |outcome, says: String, output| Ran {
        outcome,
        time: start.elapsed(),
        says,
        output,
    };
    if !program.exists() {
        return ended(
            Outcome::Missing,
            "it does not build".to_owned(),
            String::new(),
        );
    }
    let mut command = match engine {
        Engine::Kvm => Command::new(program),
        Engine::Jit | Engine::Interp => {
            let mut command = Command::new(e2e::program::anykvm());
            command.args(["exec", "--engine"]);
            command.arg(if engine == Engine::Jit {
                "jit"
            } else {
                "interp"
            });
            command.arg("--").arg(program);
            command
        }
    };
    let spawned = tempfile::tempfile().and_then(|output| {
        let child = command
            .args(arguments)
            .current_dir(program.parent().unwrap_or(Path::new("/")))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            .process_group(0)
            .spawn()?;
        Ok((output, child))
    });
    let (mut output, mut child) = match spawned {
        Ok(spawned) => spawned,
        Err(error) => {
            return ended(
                Outcome::Fail,
                format!("cannot start it: {error}"),
                String::new(),
            );
        }
    };
    let status = wait(&mut child, limit);
    let text = read(&mut output);
    match status {
        None => ended(
            Outcome::Timeout,
            format!(
                "no end in {} s; last: {}",
                limit.as_secs(),
                last_line(&text)
            ),
            text,
        ),
        Some(status) => match (status.code(), status.signal()) {
            (Some(0), _) => ended(Outcome::Pass, partly_skipped(&text), text),
            (Some(SKIP), _) => ended(Outcome::Skip, skip_reason(&text), text),
            (_, Some(signal)) => {
                let name = Signal::try_from(signal).map_or("a signal", Signal::as_str);
                ended(
                    Outcome::Fail,
                    format!("{name}; last: {}", last_line(&text)),
                    text,
                )
            }
            _ => ended(Outcome::Fail, failure(&text), text),
        },
    }
}

/// Waits for the child and ends its process group: tests leave children of their own behind.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => break None,
        }
    };
    if let Ok(group) = i32::try_from(child.id()) {
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    let _ = child.wait();
    status
}

fn read(output: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = output.rewind();
    let _ = output.take(MAX_OUTPUT).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn last_line(text: &str) -> &str {
    text.lines()
        .map(str::trim)
        .rfind(|line| !line.is_empty())
        .unwrap_or("(it wrote nothing)")
}

fn skip_reason(text: &str) -> String {
    text.lines()
        .find_map(|line| line.split_once("SKIP"))
        .map_or_else(
            || last_line(text).to_owned(),
            |(_, reason)| reason.trim_start_matches([' ', '-', ':']).to_owned(),
        )
}

/// Of a test in parts: how many of them do not apply.
fn partly_skipped(text: &str) -> String {
    let skipped: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("ok ") && line.contains("# SKIP"))
        .collect();
    match skipped.first() {
        None => String::new(),
        Some(first) => format!(
            "{} of its parts skipped: {}",
            skipped.len(),
            first
                .split_once("SKIP")
                .map_or("", |(_, reason)| reason.trim())
        ),
    }
}

/// The place, the condition and the message of a failed assertion.
fn failure(text: &str) -> String {
    let mut lines = text.lines();
    if lines.any(|line| line.contains("Test Assertion Failure")) {
        let place = lines.next().unwrap_or_default().trim();
        let message: Vec<&str> = lines
            .map(str::trim)
            .skip_while(|line| !line.starts_with("pid="))
            .skip(1)
            .skip_while(|line| {
                line.split_once('\t')
                    .is_some_and(|(number, _)| number.parse::<u32>().is_ok())
                    || line.starts_with("(stack trace")
            })
            .take(2)
            .collect();
        return format!("{place}: {}", message.join(" "));
    }
    text.lines()
        .find(|line| {
            line.starts_with("not ok") || line.contains("Expected") || line.starts_with("anykvm:")
        })
        .unwrap_or_else(|| last_line(text))
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_failed() {
        let text = "start\n==== Test Assertion Failure ====\n  x86_64/smm_test.c:12: a == b\n  pid=1 tid=1 \
            errno=22 - Invalid argument\n     1\t0x1: main at smm_test.c:12\n  (stack trace empty)\n  \
            KVM_X failed\n";
        assert_eq!(failure(text), "x86_64/smm_test.c:12: a == b: KVM_X failed");
        assert_eq!(failure("a\nnot ok 1 thing\nb\n"), "not ok 1 thing");
        assert_eq!(failure("a\n\nb\n"), "b");
    }

    #[test]
    fn says_why_it_skipped() {
        assert_eq!(
            skip_reason("1..0 # SKIP - Requirement not met: x\n"),
            "Requirement not met: x"
        );
        assert_eq!(
            partly_skipped("ok 1 a\nok 2 b # SKIP c\n"),
            "1 of its parts skipped: c"
        );
    }

    #[test]
    fn ends_what_does_not_end() {
        let ran = run(
            Path::new("/bin/sleep"),
            &["1000"],
            Engine::Kvm,
            Duration::from_millis(50),
        );
        assert_eq!(ran.outcome, Outcome::Timeout);
        let ran = run(
            Path::new("/bin/sh"),
            &["-c", "echo '1..0 # SKIP - why'; exit 4"],
            Engine::Kvm,
            Duration::from_secs(10),
        );
        assert_eq!((ran.outcome, ran.says.as_str()), (Outcome::Skip, "why"));
    }
}
