//! Running a case everywhere, and what counts as a difference.

use crate::case::{ARITH, Case, FAILED, FLAGS, Outcome, TIMEOUT, component, host_components};
use crate::guest::{Translator, interpret};
use crate::host::Host;
use crate::layout::{REGIONS, USER};
use crate::machine::Machine;
use std::fmt::Write;

/// The three executors.
pub struct Suite {
    /// The guest's RAM and environment.
    pub machine: Machine,
    /// The host CPU; `None` where it cannot be used.
    pub host: Option<Host>,
    /// The translator.
    pub translator: Translator,
}

/// What is compared of a case.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Run it on the host CPU.
    pub native: bool,
    /// RFLAGS bits to ignore: undefined ones.
    pub undefined: u64,
    /// Compare memory.
    pub memory: bool,
    /// Compare values at all; not just where it ends.
    pub values: bool,
    /// Compare CR2, memory and x87 state with the host after a fault.
    pub fault: bool,
    /// Run it a second time in the translator, with what the first time has left in its caches.
    pub twice: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Rules {
            native: true,
            undefined: 0,
            memory: true,
            values: true,
            fault: true,
            twice: true,
        }
    }
}

/// A difference between two executors.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Who differs, e.g. `translator`.
    pub who: &'static str,
    /// From whom.
    pub from: &'static str,
    /// What differs.
    pub what: String,
}

/// How a case ended where it was run first.
pub struct Run {
    /// The first executor's outcome.
    pub reference: Outcome,
    /// The first difference.
    pub difference: Option<Difference>,
}

impl Default for Suite {
    fn default() -> Self {
        Self::new()
    }
}

impl Suite {
    /// Starts all of them.
    pub fn new() -> Self {
        let machine = Machine::new();
        let host = Host::new(&machine);
        if host.is_none() {
            eprintln!(
                "differential: the host does not let user mode set FS and GS bases: no native runs"
            );
        }
        Suite {
            host,
            translator: Translator::new(),
            machine,
        }
    }

    /// Runs a case and compares.
    pub fn run(&mut self, case: &Case, rules: Rules) -> Run {
        let start = &case.start();
        let interpreted = interpret(&mut self.machine, start);
        if interpreted.vector == TIMEOUT {
            return Run {
                reference: interpreted,
                difference: None,
            };
        }
        let mut difference = None;
        let mut note = |who, from, what: Option<String>| {
            if let (None, Some(what)) = (&difference, what) {
                difference = Some(Difference { who, from, what });
            }
        };
        let native = match &mut self.host {
            Some(host) if rules.native => Some(host.run(&mut self.machine, start)),
            _ => None,
        };
        if let Some(native) = &native {
            note(
                "interpreter",
                "host",
                compare(&interpreted, native, rules, true, false),
            );
        } else if interpreted.vector == FAILED {
            note(
                "interpreter",
                "sense",
                Some(format!("ends at {:#x}", interpreted.regs.rip)),
            );
        }
        let cold = self.translator.run(&mut self.machine, start, true);
        note(
            "translator",
            "interpreter",
            compare(&cold, &interpreted, rules, false, true),
        );
        if rules.twice {
            // Code that was changed behind the translator's back needs the flush.
            let code = crate::layout::CODE.pages.len() * 4096;
            let fresh = start.memory[..code] != cold.memory[..code];
            let warm = self.translator.run(&mut self.machine, start, fresh);
            note(
                "translator, second time",
                "interpreter",
                compare(&warm, &interpreted, rules, false, true),
            );
        }
        Run {
            reference: native.unwrap_or(interpreted),
            difference,
        }
    }
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Linear address of an offset into user memory.
pub fn linear(offset: u64) -> u64 {
    REGIONS
        .iter()
        .find(|r| (r.gpa..r.gpa + r.pages.len() as u64 * 4096).contains(&(USER + offset)))
        .map_or(0, |r| r.linear + USER + offset - r.gpa)
}

/// `native`: `b` is the host, whose page faults say less. `translated`: arithmetic flags that were
/// dead at a fault are not kept.
fn compare(
    a: &Outcome,
    b: &Outcome,
    rules: Rules,
    native: bool,
    translated: bool,
) -> Option<String> {
    let mut s = String::new();
    let soft = |v| matches!(v, 12..=14 | 17);
    if !rules.fault && native && (soft(a.vector) || soft(b.vector)) {
        return None;
    }
    // The host's absent pages are not the guest's.
    let ignore_error = if native && a.vector == 14 { 1 } else { 0 };
    if a.vector != b.vector || a.error & !ignore_error != b.error & !ignore_error {
        let _ = write!(
            s,
            "vector {} error {:#x} cr2 {:#x} rip {:#x} != {} {:#x} {:#x} {:#x}; ",
            a.vector, a.error, a.cr2, a.regs.rip, b.vector, b.error, b.cr2, b.regs.rip
        );
        return Some(s);
    }
    let all = rules.fault || a.vector == 3;
    if a.cr2 != b.cr2 && all {
        let _ = write!(s, "cr2 {:#x} != {:#x}; ", a.cr2, b.cr2);
    }
    if a.regs.rip != b.regs.rip {
        let _ = write!(s, "rip {:#x} != {:#x}; ", a.regs.rip, b.regs.rip);
    }
    if a.cs != b.cs {
        let _ = write!(s, "cs {:#x} != {:#x}; ", a.cs, b.cs);
    }
    if !rules.values {
        return (!s.is_empty()).then_some(s);
    }
    let mut flags = FLAGS & !rules.undefined;
    if translated && !matches!(a.vector, 1 | 3) {
        flags &= !ARITH;
    }
    if (a.regs.rflags ^ b.regs.rflags) & flags != 0 {
        let _ = write!(
            s,
            "flags {:#x} != {:#x}; ",
            a.regs.rflags & flags,
            b.regs.rflags & flags
        );
    }
    for (n, name) in NAMES.iter().enumerate() {
        if a.regs.gpr[n] != b.regs.gpr[n] {
            let _ = write!(s, "{name} {:#x} != {:#x}; ", a.regs.gpr[n], b.regs.gpr[n]);
        }
    }
    if a.regs.fs_base != b.regs.fs_base || a.regs.gs_base != b.regs.gs_base {
        let _ = write!(
            s,
            "fs/gs base {:#x} {:#x} != {:#x} {:#x}; ",
            a.regs.fs_base, a.regs.gs_base, b.regs.fs_base, b.regs.gs_base
        );
    }
    if all {
        vectors(&mut s, a, b);
    }
    if all && (rules.memory || !native) && a.memory != b.memory {
        let n = a
            .memory
            .iter()
            .zip(&b.memory)
            .position(|(x, y)| x != y)
            .unwrap_or(0);
        let end = (n + 16).min(a.memory.len());
        let _ = write!(
            s,
            "memory at {:#x}: {:02x?} != {:02x?}; ",
            linear(n as u64),
            &a.memory[n..end],
            &b.memory[n..end]
        );
    }
    (!s.is_empty()).then_some(s)
}

fn vectors(s: &mut String, a: &Outcome, b: &Outcome) {
    let (x, y) = (&a.regs.xsave.0, &b.regs.xsave.0);
    if x[..] == y[..] {
        return;
    }
    let mut part = |name: String, at: usize, len: usize| {
        if x[at..at + len] != y[at..at + len] {
            let _ = write!(
                s,
                "{name} {:02x?} != {:02x?}; ",
                &x[at..at + len],
                &y[at..at + len]
            );
        }
    };
    part("fcw".into(), 0, 2);
    part("fsw".into(), 2, 2);
    part("ftw".into(), 4, 1);
    part("mxcsr".into(), 24, 4);
    for n in 0..8 {
        part(format!("st{n}"), 32 + 16 * n, 10);
    }
    for n in 0..16 {
        part(format!("xmm{n}"), 160 + 16 * n, 16);
    }
    for (c, name, size) in [
        (2, "ymmh", 16),
        (5, "k", 8),
        (6, "zmmh", 32),
        (7, "zmm16+", 64),
    ] {
        if host_components() & (1 << c) == 0 {
            continue;
        }
        let (offset, len) = component(c);
        for n in 0..len / size {
            part(format!("{name}{n}"), offset + n * size, size);
        }
    }
}
