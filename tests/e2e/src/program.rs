//! The command that is tested: builds it if need be, runs it to its end.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The command `anykvm`, built with optimizations: `$ANYKVM` if that is set, else this workspace's, with the
/// library for `anykvm exec` beside it.
///
/// # Panics
/// If it cannot be built.
pub fn anykvm() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| match std::env::var_os("ANYKVM") {
        Some(path) => path.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    // This executable is target/PROFILE/e2e or target/PROFILE/deps/NAME-HASH.
    let executable = std::env::current_exe().unwrap_or_default();
    let target = executable
        .ancestors()
        .find(|directory| directory.join(".rustc_info.json").exists())
        .map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
            Path::to_owned,
        );
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--quiet"])
        .args(["--package", "anykvm", "--package", "home_preload"])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status();
    assert!(
        built.as_ref().is_ok_and(|status| status.success()),
        "cannot build anykvm: {built:?}"
    );
    target.join("release/anykvm")
}

/// A machine to start, with nothing on its standard input.
pub fn run() -> Command {
    let mut command = Command::new(anykvm());
    command.arg("run").stdin(Stdio::null());
    command
}

/// How a run ended and what it said.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Exit code, or 128 + the signal that killed it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
    /// It did not end by itself and was told to (SIGTERM).
    pub stopped: bool,
}

impl Ended {
    /// Checks that there is one line on standard error that a newcomer understands.
    ///
    /// # Panics
    /// If not.
    pub fn one_clear_line(&self, context: &str) {
        let text = &self.stderr;
        let clear = text.starts_with("anykvm: ")
            && text.lines().count() == 1
            && ![
                "os error",
                "panicked",
                "RUST_BACKTRACE",
                "mistake",
                "Error {",
            ]
            .iter()
            .any(|word| text.contains(word));
        assert!(clear, "{context}: {self:?}");
    }
}

/// Runs `command` until it ends. After `limit` it gets SIGTERM.
///
/// # Panics
/// If it cannot be started, or does not end within 20 seconds of SIGTERM.
pub fn end(command: &mut Command, limit: Duration) -> Ended {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("anykvm starts");
    let read = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut bytes);
            }
            bytes
        })
    };
    let stdout = read(child.stdout.take().map(|s| Box::new(s) as _));
    let stderr = read(child.stderr.take().map(|s| Box::new(s) as _));
    let start = Instant::now();
    let mut stopped = false;
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        let late = start.elapsed().saturating_sub(limit);
        if !late.is_zero() && !stopped {
            stopped = true;
            send(&child, Signal::SIGTERM);
        }
        if late > Duration::from_secs(20) {
            let _ = child.kill();
            panic!("{command:?} does not end on SIGTERM");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ended {
        code: status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        stdout: stdout.join().unwrap_or_default(),
        stderr: String::from_utf8_lossy(&stderr.join().unwrap_or_default()).into_owned(),
        stopped,
    }
}

/// Sends a signal to a child.
pub fn send(child: &Child, signal: Signal) {
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}
