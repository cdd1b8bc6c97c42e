//! The list of workloads, and how one is run: in a process of its own, several times, each time
//! with a checksum of what it computed.

use std::io::Write;

use crate::sys::{self, Clock};
use crate::{calls, codegen, crypto, float, integer, kernel, memory, simd, text};

/// What a workload loads, the rows of the results' summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Integer programs.
    Integer,
    /// Calls, returns and jumps that are hard to predict.
    Calls,
    /// Floating point, scalar and vectors.
    Float,
    /// Instructions for cryptography, and big integers.
    Crypto,
    /// Bandwidth and latency of memory.
    Memory,
    /// System calls, page faults, processes.
    Kernel,
    /// Code that the program itself writes.
    Generated,
    /// Real programs that compute with integers.
    Programs,
    /// Real programs that start others.
    Processes,
    /// Real cryptography.
    OpenSsl,
}

impl Class {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Calls => "calls",
            Self::Float => "float",
            Self::Crypto => "crypto",
            Self::Memory => "memory",
            Self::Kernel => "kernel",
            Self::Generated => "generated",
            Self::Programs => "programs",
            Self::Processes => "processes",
            Self::OpenSsl => "openssl",
        }
    }
}

/// How much a workload does: the whole, or one part of `divisor`.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    divisor: u32,
}

impl Size {
    /// `whole` divided, at least 1.
    pub fn of(self, whole: u32) -> u32 {
        (whole / self.divisor).max(1)
    }

    /// `whole` bytes divided.
    pub fn bytes(self, whole: u32) -> usize {
        self.of(whole) as usize
    }
}

/// One repetition; returns the checksum of what it computed, the same each time.
pub type Task = Box<dyn FnMut() -> u64>;

/// A workload.
pub struct Workload {
    /// Name in results.
    pub name: &'static str,
    /// What it loads.
    pub class: Class,
    /// What it does, in a few words.
    pub about: &'static str,
    /// Prepares the input, which is not timed. `Err` says what the CPU or the kernel lacks.
    pub prepare: fn(Size) -> Result<Task, String>,
}

/// All workloads, class by class.
pub fn all() -> Vec<Workload> {
    let mut all = Vec::new();
    for part in [
        &integer::WORKLOADS[..],
        &text::WORKLOADS,
        &calls::WORKLOADS,
        &float::WORKLOADS,
        &simd::WORKLOADS,
        &crypto::WORKLOADS,
        &memory::WORKLOADS,
        &kernel::WORKLOADS,
        &codegen::WORKLOADS,
    ] {
        for &(name, class, about, prepare) in part {
            all.push(Workload {
                name,
                class,
                about,
                prepare,
            });
        }
    }
    all
}

/// A row of a module's table: the fields of [`Workload`].
pub type Row = (
    &'static str,
    Class,
    &'static str,
    fn(Size) -> Result<Task, String>,
);

/// What to run.
pub struct Options {
    /// Names or classes; empty: all.
    pub only: Vec<String>,
    /// Repetitions of each workload.
    pub repetitions: u32,
    /// See [`Size`].
    pub divisor: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            only: Vec::new(),
            repetitions: 5,
            divisor: 1,
        }
    }
}

impl Options {
    /// How much a workload does.
    pub fn size(&self) -> Size {
        Size {
            divisor: self.divisor,
        }
    }
}

/// A workload that has had this time is not repeated again, in nanoseconds.
pub const ENOUGH: u64 = 8_000_000_000;
/// A workload that takes longer is ended, in seconds.
const LIMIT: u32 = 180;

/// Prints a record for the host. One write: the kernel's own messages do not get inside.
pub fn record(json: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody is there to tell if the console is gone.
    let _ = out.write_all(format!("@bench {json}\n").as_bytes());
    let _ = out.flush();
}

/// Runs the workloads that `options` names, each in a process of its own: one that an engine's
/// mistake kills is reported, and the others still run.
///
/// # Errors
/// If a name is not known, or no process can be made.
pub fn run(options: &Options) -> Result<(), String> {
    let all = all();
    for name in &options.only {
        if !all.iter().any(|w| w.name == name || w.class.name() == name) {
            return Err(format!("there is no workload or class '{name}'"));
        }
    }
    clock_record("start");
    for workload in &all {
        let wanted = |name: &String| workload.name == name || workload.class.name() == name;
        if options.only.is_empty() || options.only.iter().any(wanted) {
            let failed = sys::in_child(|| {
                sys::end_after(LIMIT);
                measure(workload, options);
            })?;
            if let Some(why) = failed {
                outcome((workload.name, workload.class.name()), "failed", &why);
            }
        }
    }
    clock_record("end");
    Ok(())
}

/// Says what the clocks show, at the `start` and the `end`.
pub fn clock_record(kind: &str) {
    record(&format!(
        r#"{{"record":"{kind}","monotonic_ns":{},"realtime_ns":{}}}"#,
        sys::now(Clock::Monotonic),
        sys::now(Clock::Realtime)
    ));
}

/// Reports a workload that is `missing` or has `failed`.
pub fn outcome((name, class): (&str, &str), kind: &str, why: &str) {
    record(&format!(
        r#"{{"record":"{kind}","name":"{name}","class":"{class}","why":"{}"}}"#,
        why.replace(['"', '\\'], "'").escape_default()
    ));
}

/// Reports the times of a workload in nanoseconds, that of the first run apart if it stands for itself.
pub fn result((name, class): (&str, &str), checksum: u64, first: Option<u64>, times: &[u64]) {
    let times: Vec<String> = times.iter().map(u64::to_string).collect();
    let first = first.map_or(String::new(), |time| format!(r#""first_ns":{time},"#));
    record(&format!(
        r#"{{"record":"result","name":"{name}","class":"{class}","checksum":"{checksum:016x}",{first}"ns":[{}]}}"#,
        times.join(",")
    ));
}

fn measure(workload: &Workload, options: &Options) {
    let name = (workload.name, workload.class.name());
    let mut task = match (workload.prepare)(options.size()) {
        Ok(task) => task,
        Err(why) => return outcome(name, "missing", &why),
    };
    let mut times = Vec::new();
    let mut checksum = None;
    for _ in 0..options.repetitions {
        let start = sys::now(Clock::Monotonic);
        let sum = task();
        let time = sys::now(Clock::Monotonic).saturating_sub(start);
        if checksum.is_some_and(|first| first != sum) {
            return outcome(name, "failed", "two repetitions computed different results");
        }
        checksum = Some(sum);
        times.push(time);
        if times.iter().sum::<u64>() > ENOUGH {
            break;
        }
    }
    result(name, checksum.unwrap_or_default(), None, &times);
}
