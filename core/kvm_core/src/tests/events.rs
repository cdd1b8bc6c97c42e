//! Machine checks, exceptions, shutdown, instructions that nobody can execute.

use super::fake::{Cpu, out, vm, with_code};
use crate::Vm;
use crate::cpuid::Vendor;
use crate::msr::Msrs;
use kvm_abi::run::{self, reason};
use kvm_abi::{Errno, disable_exits, kvm_msr_entry, kvm_x86_mce, vcpuevent};
use std::sync::Arc;
use std::vec::Vec;

/// Handlers for #DB, #UD, #PF and #MC that ask at ports 0x81, 0x86, 0x8e and 0x92.
fn machine(vm: &Arc<Vm>, code: &[u8]) -> Cpu {
    let (_, memory) = with_code(vm, 16, code);
    for vector in [1u8, 6, 14, 18] {
        let at = 0x2000 + u16::from(vector) * 16;
        let [low, high] = at.to_le_bytes();
        memory.write(usize::from(vector) * 4, &[low, high, 0, 0]);
        memory.write(at.into(), &[out(0x80 | vector), Vec::from([0xcf])].concat());
    }
    let mut cpu = Cpu::new(vm, 0);
    cpu.start(0x1000);
    let mut regs = cpu.vcpu.regs();
    regs.rsp = 0x8000;
    cpu.vcpu.set_regs(&regs);
    cpu
}

fn io(cpu: &mut Cpu) -> u16 {
    assert_eq!(cpu.run(), reason::IO);
    cpu.port()
}

/// An uncorrected error that the guest must know of.
fn fatal() -> kvm_x86_mce {
    kvm_x86_mce {
        status: 1 << 63 | 1 << 61 | 1 << 57,
        addr: 0x5000,
        mcg_status: 4,
        bank: 2,
        ..Default::default()
    }
}

#[test]
fn a_machine_check_reaches_the_guest() {
    let vm = vm();
    let mut cpu = machine(&vm, &[out(1), out(2)].concat());
    assert_eq!(cpu.vcpu.setup_mce(0), Err(Errno::EINVAL));
    assert_eq!(cpu.vcpu.setup_mce(33), Err(Errno::EINVAL));
    assert_eq!(cpu.vcpu.setup_mce(10 | 1 << 27), Err(Errno::EINVAL), "LMCE");
    cpu.vcpu.setup_mce(10 | 1 << 8).unwrap();
    let mut s = cpu.vcpu.sregs();
    s.cr4 |= 1 << 6;
    cpu.vcpu.set_sregs(&s).unwrap();
    assert_eq!(
        cpu.vcpu.set_mce(&kvm_x86_mce::default()),
        Err(Errno::EINVAL)
    );
    cpu.vcpu.set_mce(&fatal()).unwrap();
    assert_eq!(io(&mut cpu), 0x92);
    let mut status = [kvm_msr_entry {
        index: 0x400 + 2 * 4 + 1,
        ..Default::default()
    }];
    cpu.vcpu.msrs(&mut status);
    assert_eq!(status[0].data, fatal().status);
    assert_eq!(io(&mut cpu), 1);
    // Another while the first is in progress.
    cpu.vcpu.set_mce(&fatal()).unwrap();
    assert_eq!(cpu.run(), reason::SHUTDOWN);
}

#[test]
fn a_machine_check_without_cr4_mce_shuts_down() {
    let vm = vm();
    let mut cpu = machine(&vm, &out(1));
    cpu.vcpu.setup_mce(10).unwrap();
    cpu.vcpu.set_mce(&fatal()).unwrap();
    assert_eq!(cpu.run(), reason::SHUTDOWN);
    assert_eq!(io(&mut cpu), 1, "once");
}

#[test]
fn corrected_errors_interrupt_through_their_lvt() {
    const CMCI_P: u64 = 1 << 10;
    let vm = vm();
    vm.create_irqchip().unwrap();
    let mut cpu = machine(&vm, &out(1));
    let cap = 10 | 1 << 8 | CMCI_P;
    cpu.vcpu.env.msrs = Msrs::new(Vendor::Amd);
    assert_eq!(cpu.vcpu.setup_mce(cap), Err(Errno::EINVAL));
    cpu.vcpu.env.msrs = Msrs::new(Vendor::Intel);
    cpu.vcpu.setup_mce(cap).unwrap();
    let mut apic = cpu.vcpu.lapic().unwrap();
    assert_eq!(apic.regs[0x32], 6, "a seventh LVT entry");
    apic.regs[0xf1] = 1;
    apic.regs[0x2f0..0x2f4].copy_from_slice(&[0xa9, 0, 0, 0]);
    cpu.vcpu.set_lapic(&apic).unwrap();
    let enable = kvm_msr_entry {
        index: 0x280 + 7,
        data: 1 << 30,
        ..Default::default()
    };
    assert_eq!(cpu.vcpu.set_msrs(&[enable]), 1);
    let ucna = kvm_x86_mce {
        status: 1 << 63 | 1 << 61 | 0x90,
        bank: 7,
        ..Default::default()
    };
    cpu.vcpu.set_mce(&ucna).unwrap();
    let irr = cpu.vcpu.lapic().unwrap().regs[0x200 + 0x50 + 1];
    assert_eq!(irr, 1 << (0xa9 - 0xa8));
}

#[test]
fn triple_faults_are_events_where_enabled() {
    let vm = vm();
    let mut cpu = machine(&vm, &[out(1), out(2)].concat());
    let mut e = cpu.vcpu.vcpu_events();
    assert_eq!(e.flags & vcpuevent::VALID_TRIPLE_FAULT, 0);
    e.flags |= vcpuevent::VALID_TRIPLE_FAULT;
    assert_eq!(cpu.vcpu.set_vcpu_events(&e), Err(Errno::EINVAL));
    vm.set_triple_fault_event(true);
    e.triple_fault.pending = 1;
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    let e = cpu.vcpu.vcpu_events();
    assert_ne!(e.flags & vcpuevent::VALID_TRIPLE_FAULT, 0);
    assert_eq!(e.triple_fault.pending, 1);
    cpu.page.write(run::IMMEDIATE_EXIT, &[1]);
    cpu.vcpu.run().unwrap_err();
    assert_eq!(cpu.vcpu.vcpu_events().triple_fault.pending, 1);
    cpu.page.write(run::IMMEDIATE_EXIT, &[0]);
    assert_eq!(cpu.run(), reason::SHUTDOWN);
    assert_eq!(cpu.vcpu.vcpu_events().triple_fault.pending, 0);
}

#[test]
fn pending_exceptions_come_with_their_payload() {
    let vm = vm();
    let mut cpu = machine(&vm, &[out(1), out(2)].concat());
    let mut e = cpu.vcpu.vcpu_events();
    e.exception.pending = 1;
    e.exception.nr = 14;
    e.exception_has_payload = 1;
    e.exception_payload = 0x1234_5000;
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    assert_eq!(
        cpu.vcpu.vcpu_events().exception,
        Default::default(),
        "not a flag of its own"
    );
    e.flags |= vcpuevent::VALID_PAYLOAD;
    assert_eq!(cpu.vcpu.set_vcpu_events(&e), Err(Errno::EINVAL));
    vm.set_exception_payload(true);
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    let back = cpu.vcpu.vcpu_events();
    assert_eq!((back.exception.pending, back.exception.injected), (1, 0));
    assert_eq!(
        (back.exception_has_payload, back.exception_payload),
        (1, 0x1234_5000)
    );
    assert_ne!(back.flags & vcpuevent::VALID_PAYLOAD, 0);
    assert_eq!(cpu.vcpu.sregs().cr2, 0, "not yet");
    assert_eq!(io(&mut cpu), 0x8e);
    assert_eq!(cpu.vcpu.sregs().cr2, 0x1234_5000);
    // KVM_SET_REGS takes away what is pending and leaves what is injected.
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    cpu.vcpu.set_regs(&cpu.vcpu.regs());
    assert_eq!(cpu.vcpu.vcpu_events().exception.pending, 0);
    e.exception.injected = 1;
    e.exception.pending = 0;
    e.exception.nr = 1;
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    let mut d = cpu.vcpu.debug_regs();
    d.dr6 = 0xffff_0ff1;
    cpu.vcpu.set_debug_regs(&d).unwrap();
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    cpu.vcpu.set_regs(&cpu.vcpu.regs());
    let back = cpu.vcpu.vcpu_events();
    assert_eq!(
        (back.exception.injected, back.exception_has_payload),
        (1, 0)
    );
    assert_eq!(io(&mut cpu), 0x81);
    assert_eq!(
        cpu.vcpu.debug_regs().dr6,
        0xffff_0ff1,
        "an injected #DB has its cause there"
    );
    e.exception.nr = 2;
    assert_eq!(cpu.vcpu.set_vcpu_events(&e), Err(Errno::EINVAL));
    e.exception.nr = 32;
    assert_eq!(cpu.vcpu.set_vcpu_events(&e), Err(Errno::EINVAL));
}

/// Far jump to memory that is not there.
const AWAY: [u8; 5] = [0xea, 0, 0, 0, 0xf0];

#[test]
fn emulation_failures() {
    let vm = vm();
    let mut cpu = machine(&vm, &AWAY);
    assert_eq!(vm.set_exit_on_emulation_failure(2), Err(Errno::EINVAL));
    assert_eq!(cpu.run(), reason::INTERNAL_ERROR);
    assert_eq!(cpu.page.load(run::EXIT), run::internal::EMULATION);
    assert_eq!(
        cpu.page.load(run::EXIT + 4),
        1,
        "flags only: no bytes to show"
    );
    assert_eq!(cpu.page.load(run::EXIT + 8), 0);
    assert_eq!(io(&mut cpu), 0x86, "whoever goes on regardless gets #UD");
    cpu.start(0x1000);
    vm.set_exit_on_emulation_failure(1).unwrap();
    assert_eq!(cpu.run(), reason::INTERNAL_ERROR);
    assert_eq!(cpu.run(), reason::INTERNAL_ERROR);
}

#[test]
fn the_bytes_of_an_instruction_are_shown() {
    let vm = vm();
    // RSM whose state is in no memory.
    let mut cpu = machine(&vm, &[0x0f, 0xaa, 0x11, 0x22]);
    let mut e = cpu.vcpu.vcpu_events();
    e.smi.smm = 1;
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    let (mut region, memory) = super::fake::slot_memory(16);
    memory.write(0x1000, &[0x0f, 0xaa, 0x11, 0x22]);
    region.slot = 1 << 16;
    vm.set_memory_region(&region).unwrap();
    assert_eq!(cpu.run(), reason::INTERNAL_ERROR);
    assert_eq!(cpu.page.load(run::EXIT + 4), 3);
    assert_eq!(
        cpu.page.load(run::EXIT + 8),
        run::EMULATION_FLAG_BYTES as u32
    );
    let mut bytes = [0; 16];
    cpu.page.read(run::EXIT + 16, &mut bytes);
    assert_eq!(bytes[..5], [15, 0x0f, 0xaa, 0x11, 0x22]);
}

#[test]
fn hlt_can_stay_in_the_guest() {
    let vm = vm();
    assert_eq!(vm.disable_exits(16), Err(Errno::EINVAL));
    let code = [Vec::from([0xfb, 0xf4]), out(1)].concat();
    let mut cpu = machine(&vm, &code);
    assert_eq!(cpu.run(), reason::HLT);
    assert_eq!(vm.disable_exits(disable_exits::HLT), Err(Errno::EINVAL));
    let vm = super::fake::vm();
    vm.disable_exits(disable_exits::HLT).unwrap();
    let mut cpu = machine(&vm, &code);
    assert_eq!(cpu.vcpu.run(), Err(Errno::EINTR), "asleep until a signal");
    cpu.page.write(run::REQUEST_INTERRUPT_WINDOW, &[1]);
    assert_eq!(cpu.run(), reason::IRQ_WINDOW_OPEN);
    cpu.page.write(run::REQUEST_INTERRUPT_WINDOW, &[0]);
    cpu.vcpu.interrupt(6).unwrap();
    assert_eq!(io(&mut cpu), 0x86);
}
