//! One machine of one run: started, read line by line, ended.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nix::time::ClockId;
use nix::unistd::Pid;
use serde_json::Value;

use crate::Result;
use crate::setup::{COMMAND_LINE, Setup};

/// What runs the guest program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The host itself.
    Native,
    /// AnyKVM.
    AnyKvm,
    /// QEMU with a PC, its -accel kvm served by AnyKVM.
    Qemu,
    /// QEMU with its smallest machine, its -accel kvm served by AnyKVM.
    QemuMicrovm,
    /// QEMU's TCG with a PC.
    Tcg,
    /// QEMU's TCG with its smallest machine. On a busy host its guest sometimes cannot calibrate
    /// its clock and then hangs, so only short benchmarks use it.
    Microvm,
}

impl Kind {
    /// The name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::AnyKvm => "anykvm",
            Self::Qemu => "qemu+anykvm",
            Self::QemuMicrovm => "qemu-microvm+anykvm",
            Self::Tcg => "tcg",
            Self::Microvm => "tcg-microvm",
        }
    }

    /// Whether it is QEMU: what fails there is told, but is no failure of the benchmark.
    pub fn is_tcg(self) -> bool {
        matches!(self, Self::Tcg | Self::Microvm)
    }

    /// Those of `kinds` that take part.
    pub fn available(setup: &Setup, kinds: &[Self]) -> Vec<Self> {
        let available = |kind: &Self| match kind {
            Self::Native => setup.native(),
            Self::AnyKvm => setup.anykvm.is_some(),
            Self::Qemu | Self::QemuMicrovm => setup.anykvm.is_some() && setup.qemu.is_some(),
            Self::Tcg | Self::Microvm => setup.qemu.is_some(),
        };
        kinds.iter().copied().filter(available).collect()
    }

    /// The command that starts the guest program with its arguments in `initrd`, and for the host
    /// in `arguments`. The guest's RAM has "guest-ram" in the name of its mappings.
    pub fn command(self, setup: &Setup, initrd: &Path, arguments: &str) -> Command {
        let missing = Path::new("missing");
        let memory = format!("{}M", setup.memory());
        let cpus = setup.cpus.to_string();
        match self {
            Self::Native => {
                let mut command = Command::new(&setup.guest);
                command.args(arguments.split_whitespace());
                command
            }
            Self::AnyKvm => {
                let mut command = Command::new(setup.anykvm.as_deref().unwrap_or(missing));
                command
                    .args(["run", "--net", "none", "--engine", &setup.options.engine])
                    .args(["--memory", &memory, "--cpus", &cpus])
                    .args(["--append", COMMAND_LINE, "--kernel"])
                    .arg(&setup.kernel)
                    .arg("--initrd")
                    .arg(initrd);
                command
            }
            Self::Tcg | Self::Microvm | Self::Qemu | Self::QemuMicrovm => {
                // Without a clock chip Debian's kernel waits a second for one.
                let machine = match self {
                    Self::Microvm | Self::QemuMicrovm => "microvm,rtc=on,memory-backend=ram",
                    _ => "q35,memory-backend=ram",
                };
                let ram = format!("memory-backend-memfd,id=ram,size={memory},share=on");
                let qemu = setup.qemu.as_deref().unwrap_or(missing);
                let mut command = if self.is_tcg() {
                    let mut command = Command::new(qemu);
                    command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
                    command
                } else {
                    let mut command = Command::new(setup.anykvm.as_deref().unwrap_or(missing));
                    command
                        .args(["exec", "--engine", &setup.options.engine, "--"])
                        .arg(qemu)
                        .args(["-accel", "kvm", "-cpu", "host"]);
                    command
                };
                command
                    .args(["-M", machine])
                    .args(["-object", &ram, "-m", &memory, "-smp", &cpus])
                    .args(["-nodefaults", "-no-user-config", "-display", "none"])
                    .args(["-serial", "stdio", "-monitor", "none", "-no-reboot"])
                    .args(["-append", COMMAND_LINE, "-kernel"])
                    .arg(&setup.kernel)
                    .arg("-initrd")
                    .arg(initrd);
                command
            }
        }
    }
}

/// A line that a machine printed.
struct Line {
    at: Instant,
    text: String,
}

/// A record of the guest program.
pub struct Record {
    /// When its line was complete.
    pub at: Instant,
    /// Its content.
    pub value: Value,
}

impl Record {
    /// What kind of record it is.
    pub fn kind(&self) -> &str {
        self.value["record"].as_str().unwrap_or_default()
    }
}

/// Why there are no more records.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The machine ended.
    Ended,
    /// Nothing came in time.
    Silence,
}

/// A machine that runs. Dropping it kills it.
pub struct Machine {
    child: Child,
    /// When it was started.
    pub start: Instant,
    lines: Receiver<Line>,
    last: Vec<String>,
}

impl Machine {
    /// Starts `command` with nothing to read.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn start(mut command: Command) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let start = Instant::now();
        let mut child = command
            .spawn()
            .map_err(|e| format!("cannot run {}: {e}", command.get_program().display()))?;
        let (sender, lines) = channel();
        if let Some(out) = child.stdout.take() {
            read(out, sender.clone());
        }
        if let Some(error) = child.stderr.take() {
            read(error, sender);
        }
        Ok(Self {
            child,
            start,
            lines,
            last: Vec::new(),
        })
    }

    /// The next record, if one comes within `limit`.
    ///
    /// # Errors
    /// If none does.
    pub fn record(&mut self, limit: Duration) -> std::result::Result<Record, End> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => return Err(End::Silence),
                Err(RecvTimeoutError::Disconnected) => return Err(End::Ended),
            };
            // A message of the kernel, or a terminal's control sequence, may be in front.
            let json = line.text.split_once("@bench ").map(|(_, json)| json);
            if let Some(Ok(value)) = json.map(serde_json::from_str) {
                return Ok(Record { at: line.at, value });
            }
            if !line.text.trim().is_empty() {
                self.last.push(line.text.trim().to_owned());
                if self.last.len() > 4 {
                    self.last.remove(0);
                }
            }
        }
    }

    /// The next record of a kind; others are passed over.
    ///
    /// # Errors
    /// One line that says what happened instead.
    pub fn wait_for(&mut self, kind: &str, limit: Duration) -> Result<Record> {
        loop {
            match self.record(limit) {
                Ok(record) if record.kind() == kind => return Ok(record),
                Ok(_) => {}
                Err(end) => return Err(self.describe(&end)),
            }
        }
    }

    /// What happened, with the last lines that are not records.
    pub fn describe(&mut self, end: &End) -> String {
        let what = match (end, self.ended_within(Duration::from_secs(2))) {
            (End::Silence, _) => "it said nothing for too long".to_owned(),
            (End::Ended, Some(Some(0)) | None) => "it ended too early".to_owned(),
            (End::Ended, Some(Some(code))) => format!("it ended with exit code {code}"),
            (End::Ended, Some(None)) => "it was killed".to_owned(),
        };
        match self.last.is_empty() {
            true => what,
            false => format!("{what}; its last words: {}", self.last.join(" | ")),
        }
    }

    /// CPU time of the process so far, all threads.
    pub fn cpu_time(&self) -> Option<Duration> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).ok()?);
        let clock = ClockId::pid_cpu_clock_id(pid).ok()?;
        Some(clock.now().ok()?.into())
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end: the exit code, or `None` in it after a signal.
    pub fn ended_within(&mut self, limit: Duration) -> Option<Option<i32>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status.code());
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(from: impl Read + Send + 'static, to: Sender<Line>) {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let line = Line {
                at: Instant::now(),
                text: String::from_utf8_lossy(&bytes).into_owned(),
            };
            if to.send(line).is_err() {
                return;
            }
            bytes.clear();
        }
    });
}
