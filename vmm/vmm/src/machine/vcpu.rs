//! A vCPU's thread: run, look at the exit, decide.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_msr_entry,
};

use super::bus::Bus;
use super::outcome::{Crash, CrashReason, Outcome, dump};
use super::stop::Stop;
use crate::cpuid::Template;
use crate::hypervisor::{self, Exit, Vcpu, Vm};

/// `IA32_MTRR_DEF_TYPE`.
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back: without it Linux leaves PAT off.
const MTRR_ENABLED_WRITE_BACK: u64 = 0x806;
/// `IA32_MISC_ENABLE`.
const MISC_ENABLE: u32 = 0x1a0;
/// Fast strings; no branch trace store, no event-based sampling.
const FAST_STRINGS: u64 = 0x1801;
/// AMD's `HWCR`.
const HWCR: u32 = 0xc001_0015;
/// The TSC counts at the P0 frequency: without it Linux complains about the firmware.
const TSC_AT_P0: u64 = 1 << 24;
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
/// LINT0 takes the 8259 (ExtINT), LINT1 is NMI, as firmware sets them up.
const DELIVERY_EXTINT: u8 = 7;
const DELIVERY_NMI: u8 = 4;

/// Creates vCPU `id` as firmware would leave it.
pub(super) fn create(vm: &Vm, id: u32, cpuid: &Template) -> hypervisor::Result<Vcpu> {
    let vcpu = vm.create_vcpu(id)?;
    if let Some(cpuid) = cpuid.for_vcpu(id) {
        vcpu.set_cpuid2(&cpuid)?;
    }
    // One by one: an older KVM may not know the last.
    for (index, data) in [
        (MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        (MISC_ENABLE, FAST_STRINGS),
        (HWCR, TSC_AT_P0),
    ] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            vcpu.set_msrs(&msrs)?;
        }
    }
    let mut lapic = vcpu.get_lapic()?;
    for (register, mode) in [
        (LAPIC_LVT_LINT0, DELIVERY_EXTINT),
        (LAPIC_LVT_LINT1, DELIVERY_NMI),
    ] {
        // Bits 8 to 10 of the LVT entry; bit 16, in the third byte, masks it.
        let byte = &mut lapic.regs[register + 1];
        *byte = (*byte & !7i8) | mode as i8;
        if mode == DELIVERY_NMI || id == 0 {
            lapic.regs[register + 2] &= !1i8;
        }
    }
    vcpu.set_lapic(&lapic)?;
    Ok(vcpu)
}

/// Runs `vcpu` until the machine stops.
pub(super) fn run(id: u32, mut vcpu: Vcpu, bus: &Bus, stop: &Arc<Stop>) {
    vcpu.bind_thread();
    let result = catch_unwind(AssertUnwindSafe(|| {
        while !stop.requested() {
            if let Some(outcome) = step(id, &mut vcpu, bus) {
                stop.finish(outcome);
            }
        }
    }));
    if result.is_err() {
        stop.finish(crashed(id, &vcpu, CrashReason::Panicked));
    }
}

/// Runs to the next exit and serves it. `Some` if that was the last one.
fn step(id: u32, vcpu: &mut Vcpu, bus: &Bus) -> Option<Outcome> {
    let reason = match vcpu.run() {
        Ok(Exit::IoIn { port, size, data }) => {
            bus.port_read(port, size, data);
            return None;
        }
        Ok(Exit::IoOut { port, size, data }) => {
            bus.port_write(port, size, data);
            return None;
        }
        Ok(Exit::MmioRead { addr, data }) => {
            bus.mmio_read(addr, data);
            return None;
        }
        Ok(Exit::MmioWrite { addr, data }) => {
            bus.mmio_write(addr, data);
            return None;
        }
        Ok(Exit::Intr) => return None,
        Ok(Exit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN)) => return Some(Outcome::PowerOff),
        Ok(Exit::SystemEvent(KVM_SYSTEM_EVENT_RESET)) => return Some(Outcome::Reset),
        Ok(Exit::SystemEvent(KVM_SYSTEM_EVENT_CRASH)) => CrashReason::Reported,
        Ok(Exit::Shutdown) => CrashReason::TripleFault,
        Ok(Exit::InternalError { suberror, data }) => CrashReason::InternalError { suberror, data },
        Ok(Exit::FailEntry(reason)) => CrashReason::FailEntry(reason),
        Ok(exit @ (Exit::Hlt | Exit::Debug | Exit::SystemEvent(_) | Exit::Unknown(_))) => {
            CrashReason::UnexpectedExit(format!("{exit:?}"))
        }
        Err(e) => CrashReason::Engine(e.to_string()),
    };
    Some(crashed(id, vcpu, reason))
}

fn crashed(id: u32, vcpu: &Vcpu, reason: CrashReason) -> Outcome {
    let regs = vcpu.get_regs().ok();
    let sregs = vcpu.get_sregs().ok();
    let registers = match (&regs, &sregs) {
        (Some(regs), Some(sregs)) => dump(regs, sregs),
        _ => String::new(),
    };
    let crash = Crash {
        vcpu: id,
        reason,
        registers,
        rip: regs.map(|r| r.rip),
    };
    log::debug!("{crash}\n{}", crash.registers);
    Outcome::Crashed(Box::new(crash))
}
