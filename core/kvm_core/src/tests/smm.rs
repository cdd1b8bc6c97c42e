//! System-management mode.

use super::fake::{Cpu, out, slot_memory, vm, with_code};
use crate::Vm;
use crate::shared_memory::Window;
use guestmem::Region;
use guestmem::flags::LOG_DIRTY_PAGES;
use kvm_abi::run::{self, reason};
use kvm_abi::{Errno, kvm_mp_state, kvm_msr_entry, mp_state, vcpuevent};
use std::sync::Arc;
use std::vec::Vec;

/// Where SMBASE is after RESET.
const SMBASE: u64 = 0x3_0000;
const SMM_SLOT: u32 = 1 << 16;

struct Machine {
    vm: Arc<Vm>,
    ordinary: Region,
    smram: Region,
    memory: Window,
    smm: Window,
}

/// 256 KiB of memory with `code` at 0x1000; in SMM 64 KiB at SMBASE, with `handler`.
fn machine(code: &[u8], handler: &[u8]) -> Machine {
    let vm = vm();
    let (ordinary, memory) = with_code(&vm, 64, code);
    let (mut smram, smm) = slot_memory(16);
    smram.slot = SMM_SLOT;
    smram.gpa = SMBASE;
    vm.set_memory_region(&smram).unwrap();
    smm.write(0x8000, handler);
    Machine {
        vm,
        ordinary,
        smram,
        memory,
        smm,
    }
}

/// mov al, 0xfe; out 0xe, al; rsm
fn handler() -> Vec<u8> {
    [Vec::from([0xb0, 0xfe]), out(0xe), Vec::from([0x0f, 0xaa])].concat()
}

fn io(cpu: &mut Cpu) -> u16 {
    assert_eq!(cpu.run(), reason::IO);
    cpu.port()
}

fn flags(cpu: &Cpu) -> u16 {
    let mut bytes = [0; 2];
    cpu.page.read(run::FLAGS, &mut bytes);
    u16::from_ne_bytes(bytes)
}

fn msr(cpu: &mut Cpu, index: u32) -> u64 {
    let mut entry = [kvm_msr_entry {
        index,
        ..Default::default()
    }];
    assert_eq!(cpu.vcpu.msrs(&mut entry), 1);
    entry[0].data
}

fn set_msr(cpu: &mut Cpu, index: u32, data: u64) {
    let entry = [kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }];
    assert_eq!(cpu.vcpu.set_msrs(&entry), 1);
}

const MSR_SMBASE: u32 = 0x9e;
const MSR_SMI_COUNT: u32 = 0x34;

#[test]
fn an_smi_is_taken_and_left() {
    let m = machine(&[out(1), out(2), out(3)].concat(), &handler());
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    let mut regs = cpu.vcpu.regs();
    regs.rax = 0x1234_5611;
    cpu.vcpu.set_regs(&regs);
    assert_eq!((io(&mut cpu), flags(&cpu)), (1, 0));
    cpu.vcpu.smi();
    assert_eq!((io(&mut cpu), flags(&cpu)), (0xe, run::FLAG_SMM));
    let inside = cpu.vcpu.regs();
    assert_eq!(
        (inside.rip, inside.rflags, inside.rax),
        (0x8002, 2, 0x1234_56fe)
    );
    let s = cpu.vcpu.sregs();
    assert_eq!(
        (s.cs.base, s.cs.selector, s.cs.limit),
        (SMBASE, 0x3000, u32::MAX)
    );
    assert_eq!((s.ds.base, s.ds.limit, s.idt.limit), (0, u32::MAX, 0));
    let e = cpu.vcpu.vcpu_events();
    assert_eq!((e.smi.smm, e.smi.pending, e.nmi.masked), (1, 0, 1));
    // The state is in SMM's memory and not in the other.
    assert_eq!(m.smm.load(0xfff0), 0x1002, "EIP");
    assert_eq!(m.smm.load(0xfefc), 0x2_0000, "revision");
    assert_eq!(m.memory.load(SMBASE as usize + 0xfff0), 0);
    assert_eq!(io(&mut cpu), 2);
    assert_eq!(flags(&cpu), 0);
    let after = cpu.vcpu.regs();
    assert_eq!((after.rax, after.rip), (0x1234_5611, 0x1002));
    assert_eq!(cpu.vcpu.vcpu_events().nmi.masked, 0);
    assert_eq!(msr(&mut cpu, MSR_SMI_COUNT), 1);
    assert_eq!(io(&mut cpu), 3);
}

#[test]
fn the_handler_moves_smbase() {
    let m = machine(&[out(1), out(2)].concat(), &handler());
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    assert_eq!(msr(&mut cpu, MSR_SMBASE), SMBASE);
    cpu.vcpu.smi();
    assert_eq!(io(&mut cpu), 0xe);
    m.smm.store(0xfef8, 0x2_8000);
    assert_eq!(io(&mut cpu), 1);
    assert_eq!(msr(&mut cpu, MSR_SMBASE), 0x2_8000);
    // There, 0x8000 further on, is SMM's memory, too.
    m.smm.write(0, &out(7));
    cpu.vcpu.smi();
    assert_eq!(io(&mut cpu), 7);
    assert_eq!(cpu.vcpu.sregs().cs.base, 0x2_8000);
}

#[test]
fn a_second_smi_waits_and_an_init_is_latched() {
    let m = machine(&[out(1), out(2)].concat(), &handler());
    m.vm.create_irqchip().unwrap();
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    cpu.vcpu.smi();
    assert_eq!(io(&mut cpu), 0xe);
    cpu.vcpu.smi();
    assert_eq!(cpu.vcpu.vcpu_events().smi.pending, 1);
    assert_eq!(io(&mut cpu), 0xe, "again, between two instructions");
    assert_eq!(m.smm.load(0xfff0), 0x1000);
    cpu.vcpu.shared().queue_init();
    cpu.vcpu.shared().queue_sipi(5);
    let e = cpu.vcpu.vcpu_events();
    assert_eq!((e.smi.latched_init, e.smi.smm), (1, 1));
    assert_eq!(cpu.vcpu.regs().rip, 0x8002);
    let mut state = kvm_mp_state::default();
    for waiting in [mp_state::INIT_RECEIVED, mp_state::SIPI_RECEIVED] {
        state.mp_state = waiting;
        assert_eq!(cpu.vcpu.set_mp_state(&state), Err(Errno::EINVAL));
    }
    // RSM; then the INIT, and the reset vector is not memory here.
    assert_eq!(cpu.run(), reason::INTERNAL_ERROR);
    let (regs, sregs) = (cpu.vcpu.regs(), cpu.vcpu.sregs());
    assert_eq!((regs.rip, sregs.cs.base), (0xfff0, 0xffff_0000));
    assert_eq!(cpu.vcpu.vcpu_events().smi.latched_init, 0);
    assert_eq!(msr(&mut cpu, MSR_SMI_COUNT), 0);
}

#[test]
fn an_smi_wakes_a_halted_vcpu() {
    let m = machine(&[Vec::from([0xf4]), out(2)].concat(), &handler());
    m.vm.create_irqchip().unwrap();
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    assert_eq!(cpu.vcpu.run(), Err(Errno::EINTR), "halted");
    cpu.vcpu.smi();
    assert_eq!(io(&mut cpu), 0xe);
    assert_eq!(io(&mut cpu), 2, "behind the HLT");
}

#[test]
fn nmis_wait_for_the_end() {
    let m = machine(&[out(1), out(2)].concat(), &handler());
    m.memory.write(2 * 4, &[0, 0x20, 0, 0]);
    m.memory.write(0x2000, &out(9));
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    let mut regs = cpu.vcpu.regs();
    regs.rsp = 0x8000;
    cpu.vcpu.set_regs(&regs);
    cpu.vcpu.smi();
    assert_eq!(io(&mut cpu), 0xe);
    cpu.vcpu.nmi();
    assert_eq!(io(&mut cpu), 9, "after RSM, before anything else");
    assert_eq!(cpu.vcpu.vcpu_events().nmi.masked, 1);
    // In an NMI handler, an SMI leaves NMIs blocked behind it.
    cpu.vcpu.smi();
    assert_eq!(io(&mut cpu), 0xe);
    assert_eq!(cpu.vcpu.vcpu_events().smi.smm_inside_nmi, 1);
    cpu.page.write(run::IMMEDIATE_EXIT, &[1]);
    m.memory.write(0x2002, &out(0xa));
    cpu.vcpu.run().unwrap_err();
    cpu.page.write(run::IMMEDIATE_EXIT, &[0]);
    assert_eq!(io(&mut cpu), 0xa);
    assert_eq!(cpu.vcpu.vcpu_events().nmi.masked, 1);
}

#[test]
fn smm_goes_on_in_another_vm() {
    let m = machine(&[out(1), out(2)].concat(), &handler());
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    cpu.vcpu.smi();
    assert_eq!(io(&mut cpu), 0xe);
    // The OUT must be over.
    cpu.page.write(run::IMMEDIATE_EXIT, &[1]);
    assert_eq!(cpu.vcpu.run(), Err(Errno::EINTR));
    let other = vm();
    other.set_memory_region(&m.ordinary).unwrap();
    other.set_memory_region(&m.smram).unwrap();
    let mut twin = Cpu::new(&other, 0);
    twin.vcpu.set_sregs(&cpu.vcpu.sregs()).unwrap();
    twin.vcpu.set_regs(&cpu.vcpu.regs());
    let events = cpu.vcpu.vcpu_events();
    assert_eq!(events.smi.smm, 1);
    twin.vcpu.set_vcpu_events(&events).unwrap();
    let base = msr(&mut cpu, MSR_SMBASE);
    set_msr(&mut twin, MSR_SMBASE, base);
    assert_eq!(io(&mut twin), 1);
    assert_eq!(flags(&twin), 0);
}

#[test]
fn events_without_the_flag_leave_smm_alone() {
    let m = machine(&out(1), &handler());
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    let mut e = cpu.vcpu.vcpu_events();
    e.smi.pending = 1;
    e.flags &= !vcpuevent::VALID_SMM;
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    assert_eq!(cpu.vcpu.vcpu_events().smi.pending, 0);
    e.flags |= vcpuevent::VALID_SMM;
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    assert_eq!(io(&mut cpu), 0xe);
}

#[test]
fn address_spaces() {
    let m = machine(&out(1), &handler());
    let mut bad = m.smram;
    bad.slot = 2 << 16;
    assert_eq!(m.vm.set_memory_region(&bad), Err(Errno::EINVAL));
    assert_eq!(m.vm.get_dirty_log(2 << 16), Err(Errno::EINVAL));
    bad.slot = SMM_SLOT | 1;
    assert_eq!(m.vm.set_memory_region(&bad), Err(Errno::EEXIST));
    bad.slot = SMM_SLOT | 32764;
    bad.gpa = 0x100_0000;
    assert_eq!(m.vm.set_memory_region(&bad), Err(Errno::EINVAL));
    let mut logged = m.smram;
    logged.flags = LOG_DIRTY_PAGES;
    m.vm.set_memory_region(&logged).unwrap();
    assert_eq!(m.vm.get_dirty_log(0), Err(Errno::ENOENT));
    assert_eq!(m.vm.get_dirty_log(SMM_SLOT), Ok(Vec::from([0])));
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    cpu.vcpu.smi();
    assert_eq!(io(&mut cpu), 0xe);
    assert_eq!(m.vm.get_dirty_log(SMM_SLOT), Ok(Vec::from([1 << 15])));
    assert_eq!(m.vm.get_dirty_log(SMM_SLOT), Ok(Vec::from([0])));
}

#[test]
fn the_local_apic_brings_smis() {
    let m = machine(&[out(1), out(2)].concat(), &handler());
    m.vm.create_irqchip().unwrap();
    let mut cpu = Cpu::new(&m.vm, 0);
    cpu.start(0x1000);
    let shared = cpu.vcpu.shared().clone();
    let accepted = {
        let mut lapic = shared.lapic().unwrap().lock();
        lapic.accept(irqchip::DeliveryMode::Smi, 0, irqchip::Trigger::Edge, true)
    };
    shared.accepted(accepted);
    assert_eq!(io(&mut cpu), 0xe);
}
