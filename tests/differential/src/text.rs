//! Cases as lines of text, for `regressions/*.txt`: bytes and state in, state out.

use crate::case::{Case, Outcome};
use std::fmt::Write;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

fn unhex(s: &str) -> Option<Vec<u8>> {
    if !s.len().is_multiple_of(2) || !s.is_ascii() {
        return None;
    }
    (0..s.len() / 2)
        .map(|n| u8::from_str_radix(&s[2 * n..2 * n + 2], 16).ok())
        .collect()
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The part of a line after `=>`: registers and what became of memory and vector state.
pub fn outcome(o: &Outcome) -> String {
    let mut s = format!(
        "vector={} error={:x} cr2={:x} rip={:x} flags={:x}",
        o.vector,
        o.error & !1,
        o.cr2,
        o.regs.rip,
        o.regs.rflags & crate::case::FLAGS
    );
    for (name, v) in NAMES.iter().zip(o.regs.gpr) {
        if v != 0 {
            let _ = write!(s, " {name}={v:x}");
        }
    }
    let _ = write!(
        s,
        " memory={:016x} xmm={:016x}",
        hash(&o.memory),
        hash(&o.regs.xsave.0[160..416])
    );
    s
}

/// A case as a line, without its end.
pub fn write(case: &Case) -> String {
    let mut s = format!(
        "{} code={} at={:x} flags={:x}",
        case.bits,
        hex(&case.code),
        case.at,
        case.rflags
    );
    for (name, v) in NAMES.iter().zip(case.gpr) {
        if v != 0 {
            let _ = write!(s, " {name}={v:x}");
        }
    }
    for (name, v) in [
        ("fs", case.fs_base),
        ("gs", case.gs_base),
        ("memory", case.memory),
        ("vector", case.vector),
    ] {
        if v != 0 {
            let _ = write!(s, " {name}={v:x}");
        }
    }
    for (at, bytes) in &case.patches {
        let _ = write!(s, " patch={at:x}:{}", hex(bytes));
    }
    for (n, bytes) in &case.vectors {
        let _ = write!(s, " zmm={n:x}:{}", hex(bytes));
    }
    s
}

/// Reads a line back: the case, and what is behind `=>`.
///
/// # Errors
/// Says which word cannot be read.
pub fn read(line: &str) -> Result<(Case, &str), String> {
    let (start, end) = line.split_once("=>").ok_or("no =>")?;
    let mut words = start.split_whitespace();
    let bits = match words.next() {
        Some("64") => 64,
        Some("32") => 32,
        other => return Err(format!("mode {other:?}")),
    };
    let mut case = Case::new(bits);
    case.gpr = [0; 16];
    for word in words {
        let bad = || format!("cannot read {word}");
        let (key, value) = word.split_once('=').ok_or_else(bad)?;
        let number = || u64::from_str_radix(value, 16).map_err(|_| bad());
        let pair = || {
            let (n, bytes) = value.split_once(':').ok_or_else(bad)?;
            Ok::<_, String>((
                u64::from_str_radix(n, 16).map_err(|_| bad())?,
                unhex(bytes).ok_or_else(bad)?,
            ))
        };
        match key {
            "code" => case.code = unhex(value).ok_or_else(bad)?,
            "at" => case.at = number()?,
            "flags" => case.rflags = number()?,
            "fs" => case.fs_base = number()?,
            "gs" => case.gs_base = number()?,
            "memory" => case.memory = number()?,
            "vector" => case.vector = number()?,
            "patch" => case.patches.push(pair()?),
            "zmm" => {
                let (n, bytes) = pair()?;
                case.vectors.push((n as u8, bytes));
            }
            _ => {
                let n = NAMES.iter().position(|r| *r == key).ok_or_else(bad)?;
                case.gpr[n] = number()?;
            }
        }
    }
    Ok((case, end.trim()))
}
