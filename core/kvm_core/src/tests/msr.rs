//! MSR accesses that user space answers, and MSRs that follow the VM's settings.

use super::fake::{Cpu, out, vm, with_code};
use crate::Vm;
use crate::msr_filter::MsrFilter;
use kvm_abi::run::{self, msr_reason, reason};
use kvm_abi::{
    Errno, kvm_cpuid_entry2, kvm_msr_entry, kvm_msr_filter, kvm_msr_filter_range, quirk,
};
use std::sync::Arc;
use std::vec::Vec;

const UNKNOWN: u32 = 0x474f_4f00;
const STAR: u32 = 0xc000_0081;
const PAT: u32 = 0x277;
const PLATFORM_INFO: u32 = 0xce;

fn imm(opcode: u8, value: u32) -> Vec<u8> {
    let mut code = Vec::from([0x66, opcode]);
    code.extend(value.to_le_bytes());
    code
}

/// RDMSR, then EAX to port 1.
fn rdmsr(index: u32) -> Vec<u8> {
    [imm(0xb9, index), Vec::from([0x0f, 0x32, 0x66, 0xe7, 1])].concat()
}

/// WRMSR of EDX:EAX, then a byte to port 2.
fn wrmsr(index: u32, high: u32, low: u32) -> Vec<u8> {
    let insn = Vec::from([0x0f, 0x30]);
    [
        imm(0xb9, index),
        imm(0xba, high),
        imm(0xb8, low),
        insn,
        out(2),
    ]
    .concat()
}

/// #GP asks at port 9 and then ends the guest.
fn machine(vm: &Arc<Vm>, code: &[Vec<u8>]) -> Cpu {
    let (_, memory) = with_code(vm, 16, &code.concat());
    memory.write(13 * 4, &[0, 0x20, 0, 0]);
    memory.write(0x2000, &out(9));
    let mut cpu = Cpu::new(vm, 0);
    cpu.start(0x1000);
    let mut regs = cpu.vcpu.regs();
    regs.rsp = 0x8000;
    cpu.vcpu.set_regs(&regs);
    cpu
}

fn io(cpu: &mut Cpu) -> (u16, u32) {
    assert_eq!(cpu.run(), reason::IO);
    (cpu.port(), cpu.page.load(run::PIO_OFFSET))
}

/// Reason, index and data of an MSR exit.
fn exit(cpu: &Cpu) -> (u32, u32, u64) {
    let mut data = [0; 8];
    cpu.page.read(run::EXIT + 16, &mut data);
    (
        cpu.page.load(run::EXIT + 8),
        cpu.page.load(run::EXIT + 12),
        u64::from_ne_bytes(data),
    )
}

fn answer(cpu: &Cpu, error: u8, data: u64) {
    cpu.page.write(run::EXIT, &[error]);
    cpu.page.write(run::EXIT + 16, &data.to_ne_bytes());
}

fn filter(flags: u32, base: u32, bits: u8) -> MsrFilter {
    let mut f = kvm_msr_filter::default();
    f.ranges[0] = kvm_msr_filter_range {
        flags,
        nmsrs: 8,
        base,
        ..Default::default()
    };
    MsrFilter::new(&f, |_, out| {
        out.fill(bits);
        Ok(())
    })
    .unwrap()
}

#[test]
fn nobody_asked_means_gp() {
    let vm = vm();
    vm.set_msr_filter(filter(1, STAR, 0));
    let mut cpu = machine(&vm, &[rdmsr(STAR)]);
    assert_eq!(io(&mut cpu).0, 9);
    assert_eq!(vm.set_msr_exits(8), Err(Errno::EINVAL));
    assert_eq!(vm.set_msr_exits(1 << 32), Err(Errno::EINVAL));
    vm.set_msr_exits(u64::from(msr_reason::UNKNOWN | msr_reason::INVAL))
        .unwrap();
    cpu.start(0x1000);
    assert_eq!(io(&mut cpu).0, 9, "not for the filter");
}

#[test]
fn user_space_answers() {
    let vm = vm();
    vm.set_msr_exits(msr_reason::VALID.into()).unwrap();
    let code = [
        rdmsr(UNKNOWN),
        wrmsr(UNKNOWN, 0x12, 0x3456),
        wrmsr(PAT, 0, 2),
        wrmsr(0x801, 0, 0),
        rdmsr(UNKNOWN),
    ];
    let mut cpu = machine(&vm, &code);
    assert_eq!(cpu.run(), reason::X86_RDMSR);
    assert_eq!(exit(&cpu), (msr_reason::UNKNOWN, UNKNOWN, 0));
    answer(&cpu, 0, 0xaaaa_bbbb_cccc_dddd);
    assert_eq!(io(&mut cpu), (1, 0xcccc_dddd));
    assert_eq!(cpu.vcpu.regs().rdx, 0xaaaa_bbbb);
    assert_eq!(cpu.run(), reason::X86_WRMSR);
    assert_eq!(exit(&cpu), (msr_reason::UNKNOWN, UNKNOWN, 0x12_0000_3456));
    assert_eq!(io(&mut cpu).0, 2);
    // A memory type that there is not.
    assert_eq!(cpu.run(), reason::X86_WRMSR);
    assert_eq!(exit(&cpu), (msr_reason::INVAL, PAT, 2));
    assert_eq!(io(&mut cpu).0, 2);
    assert_eq!(cpu.run(), reason::X86_WRMSR, "no x2APIC here");
    assert_eq!(exit(&cpu).0, msr_reason::INVAL);
    assert_eq!(io(&mut cpu).0, 2);
    assert_eq!(cpu.run(), reason::X86_RDMSR);
    answer(&cpu, 1, 5);
    assert_eq!(io(&mut cpu).0, 9, "refused");
}

#[test]
fn the_filter_comes_first_and_can_change() {
    let vm = vm();
    vm.set_msr_exits(msr_reason::FILTER.into()).unwrap();
    vm.set_msr_filter(filter(1, STAR & !7, !2));
    let code = [wrmsr(STAR, 7, 8), rdmsr(STAR), rdmsr(STAR), rdmsr(UNKNOWN)];
    let mut cpu = machine(&vm, &code);
    assert_eq!(io(&mut cpu).0, 2, "writes are allowed");
    assert_eq!(cpu.run(), reason::X86_RDMSR);
    assert_eq!(exit(&cpu), (msr_reason::FILTER, STAR, 0));
    answer(&cpu, 0, 99);
    assert_eq!(io(&mut cpu), (1, 99));
    vm.set_msr_filter(filter(1, STAR & !7, 0xff));
    assert_eq!(io(&mut cpu), (1, 8));
    assert_eq!(io(&mut cpu).0, 9, "unknown ones were not asked for");
}

#[test]
fn moving_the_vcpu_voids_the_access() {
    let vm = vm();
    vm.set_msr_exits(msr_reason::VALID.into()).unwrap();
    let mut cpu = machine(&vm, &[rdmsr(UNKNOWN)]);
    assert_eq!(cpu.run(), reason::X86_RDMSR);
    let mut regs = cpu.vcpu.regs();
    regs.rip = 0x2000;
    cpu.vcpu.set_regs(&regs);
    assert_eq!(io(&mut cpu).0, 9);
}

#[test]
fn the_x2apic_is_not_filtered() {
    let vm = vm();
    vm.create_irqchip().unwrap();
    vm.set_msr_exits(msr_reason::VALID.into()).unwrap();
    vm.set_msr_filter(filter(3, 0x800, 0));
    let mut cpu = machine(&vm, &[rdmsr(0x803)]);
    let mut s = cpu.vcpu.sregs();
    s.apic_base |= 0xc00;
    cpu.vcpu.set_sregs(&s).unwrap();
    let (port, version) = io(&mut cpu);
    assert_eq!((port, version & 0xff), (1, 0x14));
}

fn get(cpu: &mut Cpu, index: u32) -> Option<u64> {
    let mut entry = [kvm_msr_entry {
        index,
        ..Default::default()
    }];
    (cpu.vcpu.msrs(&mut entry) == 1).then_some(entry[0].data)
}

fn set(cpu: &mut Cpu, index: u32, data: u64) -> bool {
    let entry = [kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }];
    cpu.vcpu.set_msrs(&entry) == 1
}

#[test]
fn platform_info_can_be_hidden() {
    let vm = vm();
    let mut cpu = machine(&vm, &[rdmsr(PLATFORM_INFO), rdmsr(PLATFORM_INFO)]);
    let old = get(&mut cpu, PLATFORM_INFO).unwrap();
    assert_eq!(old, 1 << 31, "CPUID faulting");
    assert!(set(&mut cpu, PLATFORM_INFO, old | 0xff00));
    assert_eq!(io(&mut cpu), (1, 0x8000_ff00));
    vm.set_platform_info(false);
    assert_eq!(io(&mut cpu).0, 9);
    assert_eq!(get(&mut cpu, PLATFORM_INFO), Some(0x8000_ff00));
}

#[test]
fn cpuid_faulting_depends_on_platform_info() {
    const FEATURES: u32 = 0x140;
    let vm = vm();
    let mut cpu = machine(&vm, &[]);
    assert!(set(&mut cpu, FEATURES, 1));
    assert!(cpu.vcpu.env.features.cpuid_faulting);
    assert!(!set(&mut cpu, PLATFORM_INFO, 0), "it is on");
    assert!(!set(&mut cpu, FEATURES, 2));
    assert!(set(&mut cpu, FEATURES, 0));
    assert!(set(&mut cpu, PLATFORM_INFO, 0));
    assert!(!set(&mut cpu, FEATURES, 1));
    assert!(!cpu.vcpu.env.features.cpuid_faulting);
}

#[test]
fn kvms_own_msrs_follow_cpuid_where_enforced() {
    let vm = vm();
    let mut cpu = machine(&vm, &[]);
    let own = [
        0x11,
        0x12,
        0x4b56_4d00,
        0x4b56_4d01,
        0x4b56_4d02,
        0x4b56_4d03,
        0x4b56_4d04,
    ];
    for index in own {
        assert_eq!(get(&mut cpu, index), Some(0), "{index:#x}");
    }
    cpu.vcpu.enforce_pv_cpuid(true);
    for index in own {
        assert_eq!(get(&mut cpu, index), None, "{index:#x}");
        assert!(!set(&mut cpu, index, 0), "{index:#x}");
    }
    let signature = kvm_cpuid_entry2 {
        function: 0x4000_0000,
        ebx: 0x4b4d_564b,
        ecx: 0x564b_4d56,
        edx: 0x4d,
        ..Default::default()
    };
    let features = kvm_cpuid_entry2 {
        function: 0x4000_0001,
        eax: 1 << 3 | 1 << 5,
        ..Default::default()
    };
    cpu.vcpu.set_cpuid(&[features]).unwrap();
    assert_eq!(get(&mut cpu, 0x4b56_4d01), None, "not KVM's leaf");
    cpu.vcpu.set_cpuid(&[signature, features]).unwrap();
    assert_eq!(get(&mut cpu, 0x4b56_4d01), Some(0));
    assert_eq!(get(&mut cpu, 0x4b56_4d03), Some(0));
    assert_eq!(get(&mut cpu, 0x12), None);
    assert!(!cpu.vcpu.env.pv_offered(1 << 7));
}

#[test]
fn misc_enable_hides_monitor_only_without_its_quirk() {
    const MISC_ENABLE: u32 = 0x1a0;
    let vm = vm();
    let mut cpu = machine(&vm, &[]);
    let leaf1 = kvm_cpuid_entry2 {
        function: 1,
        ecx: 1 << 3,
        ..Default::default()
    };
    cpu.vcpu.set_cpuid(&[leaf1]).unwrap();
    let monitor = |cpu: &Cpu| cpu.vcpu.env.features.leaf1_ecx & 8 != 0;
    assert!(set(&mut cpu, MISC_ENABLE, 0));
    assert!(monitor(&cpu));
    vm.disable_quirks2(quirk::MISC_ENABLE_NO_MWAIT).unwrap();
    assert!(set(&mut cpu, MISC_ENABLE, 0));
    assert!(!monitor(&cpu));
    assert!(set(&mut cpu, MISC_ENABLE, 1 << 18));
    assert!(monitor(&cpu));
    assert_eq!(vm.disable_quirks2(1 << 7), Err(Errno::EINVAL));
}

#[test]
fn port_7e_is_passed_before_user_space_hears_of_it() {
    let vm = vm();
    let mut cpu = machine(&vm, &[out(0x7e), out(0x7e), out(3)]);
    assert_eq!(io(&mut cpu).0, 0x7e);
    assert_eq!(cpu.vcpu.regs().rip, 0x1002);
    vm.disable_quirks(quirk::OUT_7E_INC_RIP);
    assert_eq!(io(&mut cpu).0, 0x7e);
    assert_eq!(cpu.vcpu.regs().rip, 0x1002);
    assert_eq!(io(&mut cpu).0, 3);
}

#[test]
fn the_guest_cannot_change_what_misc_enable_says_is_missing() {
    const MISC_ENABLE: u32 = 0x1a0;
    let vm = vm();
    let code = [
        wrmsr(MISC_ENABLE, 0, 0x1881),
        rdmsr(MISC_ENABLE),
        wrmsr(MISC_ENABLE, 0, 1),
    ];
    let mut cpu = machine(&vm, &code);
    assert_eq!(io(&mut cpu).0, 2);
    assert_eq!(io(&mut cpu), (1, 0x1801));
    assert_eq!(io(&mut cpu).0, 9);
    assert!(set(&mut cpu, MISC_ENABLE, 1));
}
