//! A vCPU's state in another vCPU, and the calls that carry it.

use super::fake::{Cpu, out, vm, with_code};
use crate::Vm;
use crate::cpuid::supported;
use crate::msr::INDEX_LIST;
use kvm_abi::{
    Errno, attr, kvm_cpuid_entry, kvm_cpuid_entry2, kvm_mp_state, kvm_msr_entry, mp_state,
};
use std::sync::Arc;
use std::vec::Vec;

fn machine(code: &[u8]) -> (Arc<Vm>, Cpu) {
    let vm = vm();
    vm.create_irqchip().unwrap();
    with_code(&vm, 16, code);
    let mut cpu = Cpu::new(&vm, 0);
    cpu.vcpu.set_cpuid(&supported(&**vm.host())).unwrap();
    cpu.start(0x1000);
    (vm, cpu)
}

fn msrs(cpu: &mut Cpu) -> Vec<kvm_msr_entry> {
    let mut list: Vec<_> = INDEX_LIST
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let n = cpu.vcpu.msrs(&mut list);
    assert_eq!(
        n,
        list.len(),
        "{:#x} cannot be read",
        list[n.min(list.len() - 1)].index
    );
    list
}

/// A value other than after RESET that each MSR takes.
fn other_value(index: u32, old: u64) -> u64 {
    match index {
        0x277 => 0x0606_0606_0606_0606,
        0x2ff => 0xc06,
        0x200..=0x20f if index & 1 == 0 => 0x1_0000_0006,
        0x200..=0x20f => 0x1_0000_0800,
        0x250 | 0x258 | 0x259 | 0x268..=0x26f => 0x0606_0606_0606_0606,
        0x48 => 1,
        0x10 => 0x1234_5678_9abc,
        0x3b => 0x777,
        0x11 | 0x4b56_4d00 => 0x3000,
        0x12 | 0x4b56_4d01 => 0x3001,
        0x4b56_4d03 => 0x3041,
        0x4b56_4d04 => 0x3081,
        0x4b56_4d05 => 0,
        // Not served, the x2APIC's mode, CPUID faulting.
        0x4b56_4d02 | 0x1b | 0x140 => old,
        0x6e0 => 0,
        0xc000_0080 => old | 1,
        0x17b => old,
        0xce => old | 0xff00,
        0xc001_0015 => 1 << 24 | 1 << 18,
        0xc000_0103 | 0x174 => 0x5a,
        // 32 bits on AMD's processors.
        0x175 | 0x176 => 0x1234_5000,
        0xc000_0084 => 0x4700,
        0x9e => 0x7_0000,
        0x8b => 0x77_0000_0000,
        0x10a => 0x2b,
        _ => 0x7f00_1234_5000,
    }
}

#[test]
fn every_register_survives() {
    let (_, mut cpu) = machine(&out(1));
    let before = msrs(&mut cpu);
    for entry in &before {
        let value = kvm_msr_entry {
            data: other_value(entry.index, entry.data),
            ..*entry
        };
        assert_eq!(cpu.vcpu.set_msrs(&[value]), 1, "{:#x}", entry.index);
    }
    let changed = msrs(&mut cpu);
    for (new, old) in changed.iter().zip(&before) {
        assert_eq!(
            new.data,
            other_value(new.index, old.data),
            "{:#x}",
            new.index
        );
    }
    let mut regs = cpu.vcpu.regs();
    regs.rbx = 0x1122_3344;
    cpu.vcpu.set_regs(&regs);
    let mut d = cpu.vcpu.debug_regs();
    d.db = [1, 2, 3, 4];
    d.dr7 = 0x455;
    cpu.vcpu.set_debug_regs(&d).unwrap();
    let mut fpu = cpu.vcpu.fpu();
    fpu.xmm[3] = [7; 16];
    fpu.fcw = 0x27f;
    cpu.vcpu.set_fpu(&fpu);
    let mut e = cpu.vcpu.vcpu_events();
    e.nmi.pending = 1;
    e.nmi.masked = 1;
    e.interrupt.shadow = 2;
    e.interrupt.injected = 1;
    e.interrupt.nr = 0x44;
    cpu.vcpu.set_vcpu_events(&e).unwrap();
    let mut apic = cpu.vcpu.lapic().unwrap();
    apic.regs[0xf1] = 1;
    apic.regs[0x380..0x384].copy_from_slice(&0x10_0000u32.to_le_bytes());
    apic.regs[0x390..0x394].copy_from_slice(&0x8_0000u32.to_le_bytes());
    apic.regs[0x320..0x324].copy_from_slice(&[0x50, 0, 2, 0]);
    apic.regs[0x210] = 1;
    cpu.vcpu.set_lapic(&apic).unwrap();

    let (_, mut twin) = machine(&out(1));
    twin.vcpu.set_sregs(&cpu.vcpu.sregs()).unwrap();
    twin.vcpu.set_regs(&cpu.vcpu.regs());
    twin.vcpu.set_xcrs(&cpu.vcpu.xcrs()).unwrap();
    twin.vcpu.set_xsave(&cpu.vcpu.xsave()).unwrap();
    twin.vcpu.set_debug_regs(&cpu.vcpu.debug_regs()).unwrap();
    twin.vcpu.set_lapic(&cpu.vcpu.lapic().unwrap()).unwrap();
    let list = msrs(&mut cpu);
    assert_eq!(twin.vcpu.set_msrs(&list), list.len());
    let state = cpu.vcpu.mp_state();
    twin.vcpu.set_mp_state(&state).unwrap();
    let events = cpu.vcpu.vcpu_events();
    twin.vcpu.set_vcpu_events(&events).unwrap();

    assert_eq!(twin.vcpu.regs(), cpu.vcpu.regs());
    assert_eq!(twin.vcpu.sregs(), cpu.vcpu.sregs());
    assert_eq!(twin.vcpu.sregs2(), cpu.vcpu.sregs2());
    assert_eq!(twin.vcpu.debug_regs(), cpu.vcpu.debug_regs());
    assert_eq!(twin.vcpu.xcrs(), cpu.vcpu.xcrs());
    assert_eq!(twin.vcpu.fpu(), cpu.vcpu.fpu());
    assert_eq!(twin.vcpu.xsave(), cpu.vcpu.xsave());
    assert_eq!(twin.vcpu.lapic(), cpu.vcpu.lapic());
    assert_eq!(twin.vcpu.vcpu_events(), cpu.vcpu.vcpu_events());
    for (a, b) in msrs(&mut twin).iter().zip(&list) {
        assert_eq!(a, b);
    }
    // The timer goes on, too.
    assert_eq!(
        twin.vcpu.env.timer_deadline(),
        cpu.vcpu.env.timer_deadline()
    );
    assert!(twin.vcpu.env.timer_deadline().is_some());
}

#[test]
fn halted_stays_halted() {
    let (_, mut cpu) = machine(&[0xf4]);
    cpu.vcpu.run().unwrap_err();
    let state = cpu.vcpu.mp_state();
    assert_eq!(state.mp_state, mp_state::HALTED);
    let (_, mut twin) = machine(&out(1));
    twin.vcpu.set_mp_state(&state).unwrap();
    assert_eq!(twin.vcpu.run(), Err(Errno::EINTR));
    let runnable = kvm_mp_state::default();
    twin.vcpu.set_mp_state(&runnable).unwrap();
    twin.run();
    assert_eq!(twin.port(), 1);
}

#[test]
fn sregs2_carries_pdptrs() {
    let (_, mut cpu) = machine(&out(1));
    let mut s = cpu.vcpu.sregs2();
    assert_eq!(s.flags, 0);
    s.flags = 2;
    assert_eq!(cpu.vcpu.set_sregs2(&s), Err(Errno::EINVAL));
    s.flags = 1;
    assert_eq!(cpu.vcpu.set_sregs2(&s), Err(Errno::EINVAL), "no PAE paging");
    s.cr0 |= 0x8000_0001;
    s.cr4 |= 1 << 5;
    s.pdptrs = [0x1001, 0x2001, 0, 0x4001];
    cpu.vcpu.set_sregs2(&s).unwrap();
    let back = cpu.vcpu.sregs2();
    assert_eq!((back.flags, back.pdptrs), (1, s.pdptrs));
    // Without them they are as they were: memory has others, and nobody loads them.
    s.flags = 0;
    cpu.vcpu.set_sregs2(&s).unwrap();
    assert_eq!(cpu.vcpu.sregs2().pdptrs, back.pdptrs);
}

#[test]
fn cr4_before_cpuid_is_the_hosts() {
    let vm = vm();
    let mut cpu = Cpu::new(&vm, 0);
    let mut s = cpu.vcpu.sregs();
    s.cr4 = vm.cr4_supported();
    assert_ne!(s.cr4 & 1 << 20, 0, "SMEP");
    cpu.vcpu.set_sregs(&s).unwrap();
    s.cr4 |= 1 << 13;
    assert_eq!(cpu.vcpu.set_sregs(&s), Err(Errno::EINVAL), "VMXE");
    let leaf = kvm_cpuid_entry2::default();
    cpu.vcpu.set_cpuid(&[leaf]).unwrap();
    s.cr4 = 1 << 20;
    assert_eq!(cpu.vcpu.set_sregs(&s), Err(Errno::EINVAL));
}

#[test]
fn cpuid_is_settled_by_the_first_run() {
    let (vm, mut cpu) = machine(&[out(1), out(2)].concat());
    let mut table = supported(&**vm.host());
    cpu.run();
    assert_eq!(cpu.vcpu.set_cpuid(&table), Ok(()), "the same");
    let now = cpu.vcpu.cpuid();
    assert_eq!(
        cpu.vcpu.set_cpuid(&now),
        Ok(()),
        "with the bits of the moment"
    );
    table[3].ebx ^= 1;
    assert_eq!(cpu.vcpu.set_cpuid(&table), Err(Errno::EINVAL));
    table[3].ebx ^= 1;
    table.pop();
    assert_eq!(cpu.vcpu.set_cpuid(&table), Err(Errno::EINVAL));
}

#[test]
fn the_first_version_of_cpuid_has_no_subleaves() {
    let vm = vm();
    let mut cpu = Cpu::new(&vm, 0);
    let entries = [kvm_cpuid_entry {
        function: 7,
        ebx: 0x20,
        ..Default::default()
    }];
    cpu.vcpu.set_cpuid1(&entries).unwrap();
    let back = cpu.vcpu.cpuid();
    assert_eq!((back.len(), back[0].index, back[0].flags), (1, 0, 0));
    assert_eq!(cpu.vcpu.env.cpuid.regs(7, 5)[1], 0x20);
    let many = [kvm_cpuid_entry::default(); 257];
    assert_eq!(cpu.vcpu.set_cpuid1(&many), Err(Errno::E2BIG));
}

#[test]
fn the_tsc_can_be_moved_but_not_scaled() {
    let (vm, mut cpu) = machine(&out(1));
    let khz = vm.default_tsc_khz();
    assert_eq!(cpu.vcpu.tsc_khz(), khz);
    assert_eq!(cpu.vcpu.set_tsc_khz(khz / 2), Err(Errno::EINVAL));
    assert_eq!(cpu.vcpu.set_tsc_khz(khz + 1), Ok(()));
    assert_eq!(cpu.vcpu.tsc_khz(), khz + 1);
    assert_eq!(cpu.vcpu.set_tsc_khz(0), Ok(()));
    assert_eq!(cpu.vcpu.tsc_khz(), khz);
    assert_eq!(
        vm.set_default_tsc_khz(khz + 1),
        Err(Errno::EINVAL),
        "too late"
    );
    let fresh = super::fake::vm();
    assert_eq!(fresh.set_default_tsc_khz(khz * 2), Err(Errno::EINVAL));
    fresh.set_default_tsc_khz(khz + 2).unwrap();
    assert_eq!(Cpu::new(&fresh, 0).vcpu.tsc_khz(), khz + 2);

    let (group, offset) = (attr::VCPU_TSC_CTRL, attr::VCPU_TSC_OFFSET);
    assert_eq!(cpu.vcpu.has_device_attr(group, offset), Ok(()));
    assert_eq!(cpu.vcpu.has_device_attr(1, offset), Err(Errno::ENXIO));
    assert_eq!(cpu.vcpu.device_attr(group, 1), Err(Errno::ENXIO));
    assert_eq!(cpu.vcpu.set_device_attr(group, 1, 0), Err(Errno::ENXIO));
    let read = |cpu: &mut Cpu| msrs(cpu).iter().find(|m| m.index == 0x10).unwrap().data;
    let (tsc, old) = (read(&mut cpu), cpu.vcpu.device_attr(group, offset).unwrap());
    let moved = old.wrapping_add(1 << 40);
    cpu.vcpu.set_device_attr(group, offset, moved).unwrap();
    assert_eq!(cpu.vcpu.device_attr(group, offset), Ok(moved));
    assert_eq!(read(&mut cpu), tsc.wrapping_add(1 << 40));
    let adjust = msrs(&mut cpu)
        .iter()
        .find(|m| m.index == 0x3b)
        .unwrap()
        .data;
    assert_eq!(adjust, 0, "the guest did not do it");
}

#[test]
fn a_paused_guest_hears_of_it_if_it_has_a_clock() {
    let (_, mut cpu) = machine(&out(1));
    assert_eq!(cpu.vcpu.kvmclock_ctrl(), Err(Errno::EINVAL));
    let clock = kvm_msr_entry {
        index: 0x4b56_4d01,
        data: 0x3001,
        ..Default::default()
    };
    assert_eq!(cpu.vcpu.set_msrs(&[clock]), 1);
    assert_eq!(cpu.vcpu.kvmclock_ctrl(), Ok(()));
}

#[test]
fn hlt_in_the_guest_hides_the_way_to_wake_it() {
    let vm = vm();
    vm.disable_exits(2).unwrap();
    let mut cpu = Cpu::new(&vm, 0);
    let signature = kvm_cpuid_entry2 {
        function: 0x4000_0000,
        ebx: 0x4b4d_564b,
        ecx: 0x564b_4d56,
        edx: 0x4d,
        ..Default::default()
    };
    let features = kvm_cpuid_entry2 {
        function: 0x4000_0001,
        eax: 1 << 7 | 1 << 3,
        ..Default::default()
    };
    cpu.vcpu.set_cpuid(&[signature, features]).unwrap();
    assert_eq!(cpu.vcpu.cpuid()[1].eax, 1 << 3);
    cpu.vcpu.set_cpuid(&[features]).unwrap();
    assert_eq!(cpu.vcpu.cpuid()[0], features, "somebody else's leaf");
}
