//! What became of a run.

use std::fmt;

use kvm_bindings::{kvm_regs, kvm_sregs};

/// How a run ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset: build the machine again to go on.
    Reset,
    /// The host asked for the end (`MachineHandle::stop`).
    Stopped,
    /// The guest cannot go on.
    Crashed(Box<Crash>),
}

/// Why a guest cannot go on. `Display` gives one line; `registers` holds the rest.
#[derive(Clone, Debug)]
pub struct Crash {
    /// The vCPU that found out.
    pub vcpu: u32,
    /// What happened.
    pub reason: CrashReason,
    /// Register dump of that vCPU, several lines; empty if it could not be had.
    pub registers: String,
    /// Where that vCPU was.
    pub rip: Option<u64>,
}

/// What happened to a guest that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CrashReason {
    /// An exception that could not be delivered, three times over.
    TripleFault,
    /// The guest reported a crash itself.
    Reported,
    /// The engine gave up: `KVM_INTERNAL_ERROR_*` and details.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Details, by suberror.
        data: Vec<u64>,
    },
    /// The engine would not enter the guest.
    FailEntry(u64),
    /// The engine failed with an error of the host.
    Engine(String),
    /// An exit that makes no sense here.
    UnexpectedExit(String),
    /// The VMM's own thread died, which is a bug.
    Panicked,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            CrashReason::TripleFault => f.write_str("the guest crashed: triple fault")?,
            CrashReason::Reported => f.write_str("the guest reported that it crashed")?,
            CrashReason::InternalError { suberror: 1, data } => {
                f.write_str("the guest ran an instruction that cannot be emulated")?;
                if let Some(bytes) = instruction_bytes(data) {
                    write!(f, " ({bytes})")?;
                }
            }
            CrashReason::InternalError { suberror: 3, .. } => {
                f.write_str(
                    "the guest crashed: an exception whose handler or stack is not in memory",
                )?;
            }
            CrashReason::InternalError { suberror, .. } => {
                write!(f, "the engine gave up with internal error {suberror}")?;
            }
            CrashReason::FailEntry(reason) => {
                write!(f, "the engine cannot enter the guest (reason {reason:#x})")?;
            }
            CrashReason::Engine(error) => write!(f, "the engine failed: {error}")?,
            CrashReason::UnexpectedExit(exit) => {
                write!(f, "the engine made an exit that was not asked for: {exit}")?;
            }
            CrashReason::Panicked => {
                f.write_str("a thread of the virtual machine monitor died; this is a bug in it")?;
            }
        }
        write!(f, ", on vCPU {}", self.vcpu)?;
        match self.rip {
            Some(rip) => write!(f, " at rip {rip:#x}"),
            None => Ok(()),
        }
    }
}

/// The instruction bytes that `KVM_INTERNAL_ERROR_EMULATION` may carry: flags with bit 0,
/// then their number and the bytes.
fn instruction_bytes(data: &[u64]) -> Option<String> {
    let (&flags, rest) = data.split_first()?;
    if flags & 1 == 0 {
        return None;
    }
    let bytes: Vec<u8> = rest.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (&count, bytes) = bytes.split_first()?;
    let bytes = bytes.get(..usize::from(count).min(15))?;
    Some(
        bytes
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect::<Vec<_>>()
            .join(" "),
    )
}

/// Formats a vCPU's registers over several lines.
pub(super) fn dump(regs: &kvm_regs, sregs: &kvm_sregs) -> String {
    let kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = regs;
    let mut text = format!(
        "rip {rip:016x} rflags {rflags:08x}\n\
         rax {rax:016x} rbx {rbx:016x} rcx {rcx:016x} rdx {rdx:016x}\n\
         rsi {rsi:016x} rdi {rdi:016x} rbp {rbp:016x} rsp {rsp:016x}\n\
         r8  {r8:016x} r9  {r9:016x} r10 {r10:016x} r11 {r11:016x}\n\
         r12 {r12:016x} r13 {r13:016x} r14 {r14:016x} r15 {r15:016x}\n"
    );
    for (name, s) in [
        ("cs", &sregs.cs),
        ("ss", &sregs.ss),
        ("ds", &sregs.ds),
        ("es", &sregs.es),
        ("fs", &sregs.fs),
        ("gs", &sregs.gs),
        ("tr", &sregs.tr),
        ("ldt", &sregs.ldt),
    ] {
        text += &format!(
            "{name:3} {:04x} base {:016x} limit {:08x} type {:x} s {} dpl {} p {} l {} db {} g {}\n",
            s.selector, s.base, s.limit, s.type_, s.s, s.dpl, s.present, s.l, s.db, s.g
        );
    }
    text + &format!(
        "gdt {:016x}/{:04x} idt {:016x}/{:04x}\n\
         cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} cr8 {:x} efer {:x}",
        sregs.gdt.base,
        sregs.gdt.limit,
        sregs.idt.base,
        sregs.idt.limit,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.cr8,
        sregs.efer
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_reads_as_one_line() {
        let crash = |reason| Crash {
            vcpu: 1,
            reason,
            registers: String::new(),
            rip: Some(0x10),
        };
        assert_eq!(
            crash(CrashReason::TripleFault).to_string(),
            "the guest crashed: triple fault, on vCPU 1 at rip 0x10"
        );
        let word = u64::from_le_bytes([2, 0x0f, 0x0b, 0, 0, 0, 0, 0]);
        let reason = CrashReason::InternalError {
            suberror: 1,
            data: vec![1, word],
        };
        assert_eq!(
            crash(reason).to_string(),
            "the guest ran an instruction that cannot be emulated (0f 0b), on vCPU 1 at rip 0x10"
        );
        let odd = CrashReason::InternalError {
            suberror: 1,
            data: vec![1, u64::MAX],
        };
        assert!(!crash(odd).to_string().contains('\n'));
    }
}
