use super::fake::Fake;
use super::machine::{self, exec, visible};
use crate::bits::*;
use crate::env::{Exit, Flush, ForeignHypercall, Stop};
use crate::smm::{self, AREA_SIZE};
use crate::state::{CpuState, gpr, sreg};

const SMBASE: u32 = 0x3_0000;

fn round_trip(cpu: &CpuState, env: &mut Fake, long: bool) -> CpuState {
    let area = smm::save(cpu, SMBASE, long);
    let mut inside = cpu.clone();
    smm::enter(&mut inside, SMBASE);
    inside.gpr[..if long { 16 } else { 8 }].fill(0xdead);
    assert!(inside.smm && inside.nmi_blocked && !inside.protected());
    env.flushes.clear();
    assert_eq!(smm::resume(&mut inside, env, &area, long), Ok(SMBASE));
    assert_eq!(env.flushes, [Flush::All]);
    assert!(!inside.smm);
    inside.nmi_blocked = cpu.nmi_blocked;
    inside
}

#[test]
fn long_mode_survives() {
    let (mut cpu, mut env) = machine::long_mode();
    for (n, value) in cpu.gpr.iter_mut().enumerate() {
        *value = 0x1111_2222_3333_0000 + n as u64;
    }
    cpu.rflags = 0x246;
    cpu.dr7 = 0x401;
    cpu.shadow = 1;
    cpu.ldtr = crate::segment::null_segment(0, 0);
    cpu.seg[sreg::GS].base = 0xffff_8880_0000_0000;
    cpu.idtr.base = 0xffff_ffff_8000_0000;
    let after = round_trip(&cpu, &mut env, true);
    assert!(visible(&after) == visible(&cpu));
}

#[test]
fn user_mode_and_null_segments_survive() {
    let (mut cpu, mut env) = machine::long_mode();
    machine::to_user(&mut cpu, &mut env, machine::UCS64);
    cpu.seg[sreg::DS] = crate::segment::null_segment(3, 0);
    cpu.ldtr = crate::segment::null_segment(0, 0);
    let after = round_trip(&cpu, &mut env, true);
    assert_eq!(after.cpl, 3);
    assert!(after.seg[sreg::DS].unusable && after.ldtr.unusable);
    assert_eq!(after.seg[sreg::DS].selector, 3);
}

#[test]
fn protected_and_real_mode_survive_in_the_32_bit_area() {
    for (mut cpu, mut env) in [machine::protected(), machine::real(), machine::v86()] {
        cpu.gpr[gpr::RDI] = 0x8765_4321;
        cpu.efer = 0;
        cpu.ldtr = crate::segment::null_segment(0, 0);
        let after = round_trip(&cpu, &mut env, false);
        assert_eq!(visible(&after), visible(&cpu));
    }
}

#[test]
fn the_areas_are_where_the_manual_says() {
    let (mut cpu, _) = machine::long_mode();
    cpu.rip = 0x1234;
    cpu.gpr[gpr::RAX] = 0xaaaa;
    cpu.gpr[15] = 0xffff;
    let area = smm::save(&cpu, SMBASE, true);
    let word = |area: &[u8; AREA_SIZE], at: usize| {
        let at = at - 0xfe00;
        u32::from_le_bytes(area[at..at + 4].try_into().unwrap())
    };
    assert_eq!(word(&area, 0xfefc), 0x2_0064);
    assert_eq!(word(&area, 0xff00), SMBASE);
    assert_eq!(word(&area, 0xff78), 0x1234);
    assert_eq!(word(&area, 0xfff8), 0xaaaa);
    assert_eq!(word(&area, 0xff80), 0xffff);
    assert_eq!(word(&area, 0xfed0), cpu.efer as u32);
    assert_eq!(word(&area, 0xff58), cpu.cr0 as u32);
    let (mut cpu, _) = machine::protected();
    cpu.rip = 0x1234;
    cpu.gpr[gpr::RAX] = 0xaaaa;
    let area = smm::save(&cpu, SMBASE, false);
    assert_eq!(word(&area, 0xfefc), 0x2_0000);
    assert_eq!(word(&area, 0xfef8), SMBASE);
    assert_eq!(word(&area, 0xfff0), 0x1234);
    assert_eq!(word(&area, 0xffd0), 0xaaaa);
    assert_eq!(word(&area, 0xfffc), cpu.cr0 as u32);
    assert_eq!(word(&area, 0xffac), u32::from(machine::CS32));
    assert_eq!(word(&area, 0xff90), 0xc09b << 8, "CS attributes");
}

#[test]
fn impossible_control_registers_shut_down() {
    let (cpu, mut env) = machine::long_mode();
    let good = smm::save(&cpu, SMBASE, true);
    for (at, byte) in [
        (0x158 + 3, 0u8), // no paging but PCIDE below
        (0x148, 0),       // long mode without PAE
        (0x158, 0),       // paging without protection
        (0x150 - 2, 0xff),
    ] {
        let mut area = good;
        area[at] = byte;
        if at == 0x158 + 3 {
            area[0x148 + 2] |= 2;
        }
        let mut inside = cpu.clone();
        smm::enter(&mut inside, SMBASE);
        let before = visible(&inside);
        let result = smm::resume(&mut inside, &mut env, &area, true);
        assert_eq!(result, Err(Stop::Exit(Exit::Shutdown)), "{at:#x}");
        assert!(visible(&inside) == before && inside.smm);
    }
}

#[test]
fn rsm_outside_smm_is_undefined() {
    let (mut cpu, mut env) = machine::long_mode();
    assert_eq!(exec(&mut cpu, &mut env, &[0x0f, 0xaa]), Err(Stop::ud()));
}

#[test]
fn foreign_hypercalls() {
    let vmcall = [0x0f, 0x01, 0xc1];
    let vmmcall = [0x0f, 0x01, 0xd9];
    for (amd, own, foreign) in [(false, vmcall, vmmcall), (true, vmmcall, vmcall)] {
        let (mut cpu, mut env) = machine::long_mode();
        env.features.amd = amd;
        let code = cpu.rip;
        env.write(code, &foreign);
        exec(&mut cpu, &mut env, &foreign).unwrap();
        assert_eq!(env.hypercalls, 1);
        cpu.rip = code;
        env.features.foreign_hypercall = ForeignHypercall::Undefined;
        assert_eq!(exec(&mut cpu, &mut env, &foreign), Err(Stop::ud()));
        env.features.foreign_hypercall = ForeignHypercall::Patch;
        exec(&mut cpu, &mut env, &foreign).unwrap();
        assert_eq!((env.hypercalls, cpu.rip), (2, code + 3));
        assert_eq!(
            env.r32(code) & 0xff_ffff,
            u32::from_le_bytes([own[0], own[1], own[2], 0])
        );
    }
}

#[test]
fn features_that_user_space_restricts() {
    let (mut cpu, mut env) = machine::long_mode();
    let cpuid = [0x0f, 0xa2];
    env.features.cpuid_faulting = true;
    exec(&mut cpu, &mut env, &cpuid).unwrap();
    machine::to_user(&mut cpu, &mut env, machine::UCS64);
    assert_eq!(exec(&mut cpu, &mut env, &cpuid), Err(Stop::gp(0)));
    env.features.cpuid_faulting = false;
    exec(&mut cpu, &mut env, &cpuid).unwrap();

    let (mut cpu, mut env) = machine::long_mode();
    env.features.leaf1_ecx &= !(1 << 3);
    let mwait = [0x0f, 0x01, 0xc9];
    exec(&mut cpu, &mut env, &mwait).unwrap();
    env.features.strict_monitor = true;
    assert_eq!(exec(&mut cpu, &mut env, &mwait), Err(Stop::ud()));
    assert_ne!(cpu.cr0 & CR0_PE, 0);
}
