//! Hardware task switches.

use super::fake::Fake;
use super::machine::*;
use crate::bits::*;
use crate::env::{Exception, Stop};
use crate::event::{Event, deliver};
use crate::state::{CpuState, gpr, sreg};
use crate::task::{Reason, Request, switch};

/// Two 32-bit tasks at CPL 0: the running one (TR) and a prepared one (TR_B).
fn tasks() -> (CpuState, Fake) {
    let (mut cpu, mut env) = protected();
    env.w32(TSS_B + 0x20, 0x7000);
    env.w32(TSS_B + 0x24, (IF | 2) as u32);
    for i in 0..8 {
        env.w32(TSS_B + 0x28 + 4 * i, 0x100 * (i as u32 + 1));
    }
    env.w32(TSS_B + 0x38, 0xd000);
    for (i, selector) in [DS0, CS32, DS0, DS0, 0, UDS].into_iter().enumerate() {
        env.w32(TSS_B + 0x48 + 4 * i as u64, u32::from(selector));
    }
    cpu.gpr = std::array::from_fn(|i| 0x1000_0000 + i as u64);
    cpu.gpr[gpr::RSP] = STACK;
    (cpu, env)
}

fn kind_of(env: &mut Fake, selector: u16) -> u8 {
    (env.r64(GDT + u64::from(selector)) >> 40) as u8 & 0xf
}

#[test]
fn call_nests_and_iret_returns() {
    let (mut cpu, mut env) = tasks();
    exec(&mut cpu, &mut env, &[0x9a, 0, 0, 0, 0, TR_B as u8, 0]).unwrap();
    assert_eq!((cpu.rip, cpu.rflags), (0x7000, IF | NT | 2));
    assert_eq!((cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDI]), (0x100, 0x800));
    assert_eq!((cpu.gpr[gpr::RSP], cpu.tr.selector), (0xd000, TR_B));
    assert_eq!(
        (cpu.seg[sreg::GS].selector, cpu.seg[sreg::FS].unusable),
        (UDS, true)
    );
    assert!(cpu.cr0 & CR0_TS != 0);
    assert_eq!(env.r16(TSS_B), TR, "back link");
    assert_eq!((kind_of(&mut env, TR), kind_of(&mut env, TR_B)), (11, 11));
    assert_eq!(env.r32(TSS + 0x20), CODE as u32 + 7);
    assert_eq!(env.r32(TSS + 0x28), 0x1000_0000);
    assert_eq!(env.r32(TSS + 0x4c), u32::from(CS32));
    // IRET with NT goes back and leaves NT clear in the task it left.
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.tr.selector), (CODE + 7, TR));
    assert_eq!(cpu.gpr[gpr::RDI], 0x1000_0007);
    assert_eq!((kind_of(&mut env, TR), kind_of(&mut env, TR_B)), (11, 9));
    assert_eq!(env.r32(TSS_B + 0x24), (IF | 2) as u32);
    assert_eq!(env.r32(TSS_B + 0x20), 0x7001);
}

#[test]
fn jump_swaps_busy_bits() {
    let (mut cpu, mut env) = tasks();
    exec(&mut cpu, &mut env, &[0xea, 0, 0, 0, 0, TR_B as u8, 0]).unwrap();
    assert_eq!(cpu.rflags, IF | 2);
    assert_eq!((kind_of(&mut env, TR), kind_of(&mut env, TR_B)), (9, 11));
    assert_eq!(env.r16(TSS_B), 0);
}

#[test]
fn checks_leave_the_old_task_alone() {
    let (mut cpu, mut env) = tasks();
    let mut attempt = |env: &mut Fake, reason, selector| {
        let before = visible(&cpu);
        let request = Request {
            selector,
            reason,
            next_rip: 0,
            error: None,
        };
        let result = switch(&mut cpu, env, request);
        assert_eq!(visible(&cpu), before);
        result
    };
    let b = u32::from(TR_B);
    assert_eq!(
        attempt(&mut env, Reason::Jump, TR),
        Err(Stop::gp(u32::from(TR))),
        "busy"
    );
    assert_eq!(
        attempt(&mut env, Reason::Iret, TR_B),
        Err(Stop::ts(b)),
        "not busy"
    );
    assert_eq!(
        attempt(&mut env, Reason::Call, DS0),
        Err(Stop::gp(u32::from(DS0)))
    );
    assert_eq!(attempt(&mut env, Reason::Call, 0), Err(Stop::gp(0)));
    assert_eq!(
        attempt(&mut env, Reason::Call, TR_B | 4),
        Err(Stop::gp(b | 4))
    );
    let at = GDT + u64::from(TR_B);
    env.w64(at, system_descriptor(TSS_B, 0x66, 9, 0));
    assert_eq!(
        attempt(&mut env, Reason::Call, TR_B),
        Err(Stop::ts(b)),
        "too small"
    );
    env.w64(at, system_descriptor(TSS_B, 0x67, 9, 0) & !(1 << 47));
    assert_eq!(attempt(&mut env, Reason::Call, TR_B), Err(Stop::np(b)));
}

#[test]
fn bad_segments_fault_in_the_new_task() {
    for (slot, selector, want) in [
        (1, DS0, Stop::ts(u32::from(DS0))),
        (1, 0, Stop::ts(0)),
        (1, ABSENT_CODE, Stop::np(u32::from(ABSENT_CODE))),
        (2, UDS, Stop::ts(u32::from(UDS & !3))),
        (2, 0, Stop::ts(0)),
        (3, EXEC_ONLY, Stop::ts(u32::from(EXEC_ONLY))),
        (3, ABSENT_DATA, Stop::np(u32::from(ABSENT_DATA))),
    ] {
        let (mut cpu, mut env) = tasks();
        env.w32(TSS_B + 0x48 + 4 * slot, u32::from(selector));
        let result = exec(&mut cpu, &mut env, &[0x9a, 0, 0, 0, 0, TR_B as u8, 0]);
        assert_eq!(result, Err(want), "slot {slot} = {selector:#x}");
        assert_eq!((cpu.tr.selector, cpu.rip), (TR_B, 0x7000));
    }
    let (mut cpu, mut env) = tasks();
    env.w32(TSS_B + 0x60, u32::from(DS0));
    let result = exec(&mut cpu, &mut env, &[0x9a, 0, 0, 0, 0, TR_B as u8, 0]);
    assert_eq!(result, Err(Stop::ts(u32::from(DS0))), "LDT");
}

#[test]
fn task_gate_for_an_exception_pushes_the_error_code() {
    let (mut cpu, mut env) = tasks();
    env.w64(IDT + 13 * 8, gate(TR_B, 0, 5, 0, 0));
    let event = Event::from(Exception {
        vector: 13,
        error: Some(0x1234),
        payload: 0,
    });
    deliver(&mut cpu, &mut env, event).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (0x7000, 0xd000 - 4));
    assert_eq!(env.r32(0xd000 - 4), 0x1234);
    assert_eq!(env.r32(TSS + 0x20), CODE as u32);
    assert_eq!(
        u64::from(env.r32(TSS + 0x24)) & RF,
        RF & u64::from(env.r32(TSS + 0x24))
    );
    assert!(cpu.rflags & NT != 0);
}

#[test]
fn task_gate_by_call_and_privilege() {
    let (mut cpu, mut env) = tasks();
    env.w64(GDT + u64::from(GATE), gate(TR_B, 0, 5, 3, 0));
    to_user(&mut cpu, &mut env, UCS32);
    // The TSS itself is out of reach, the gate is not.
    let direct = exec(&mut cpu, &mut env, &[0x9a, 0, 0, 0, 0, TR_B as u8, 0]);
    assert_eq!(direct, Err(Stop::gp(u32::from(TR_B))));
    exec(&mut cpu, &mut env, &[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0]).unwrap();
    assert_eq!((cpu.cpl, cpu.rip), (0, 0x7000));
}

#[test]
fn trap_bit_raises_debug() {
    let (mut cpu, mut env) = tasks();
    env.w16(TSS_B + 0x64, 1);
    let result = exec(&mut cpu, &mut env, &[0xea, 0, 0, 0, 0, TR_B as u8, 0]);
    assert!(matches!(
        result,
        Err(Stop::Exception(Exception {
            vector: 1,
            payload: 0x8000,
            ..
        }))
    ));
    assert_eq!(cpu.rip, 0x7000);
}

#[test]
fn sixteen_bit_tasks() {
    let (mut cpu, mut env) = tasks();
    env.w64(GDT + u64::from(TR_B), system_descriptor(TSS_B, 0x2b, 1, 0));
    env.w64(GDT + u64::from(TR), system_descriptor(TSS, 0x2b, 3, 0));
    cpu.tr = segment(&mut env, TR);
    env.write(TSS_B, &[0; 0x68]);
    env.w16(TSS_B + 0x0e, 0x6000);
    env.w16(TSS_B + 0x10, 2);
    env.w16(TSS_B + 0x12, 0xaaaa);
    env.w16(TSS_B + 0x1a, 0xd000);
    for (i, selector) in [DS0, CS16, DS16, DS0].into_iter().enumerate() {
        env.w16(TSS_B + 0x22 + 2 * i as u64, selector);
    }
    exec(&mut cpu, &mut env, &[0x9a, 0, 0, 0, 0, TR_B as u8, 0]).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RAX] & 0xffff), (0x6000, 0xaaaa));
    assert_eq!(env.r16(TSS + 0x0e), CODE as u16 + 7);
    assert_eq!(env.r16(TSS + 0x24), CS32);
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.seg[sreg::CS].selector), (CODE + 7, CS32));
}

#[test]
fn into_a_v86_task() {
    let (mut cpu, mut env) = tasks();
    env.w32(TSS_B + 0x24, (VM | 2) as u32);
    exec(&mut cpu, &mut env, &[0xea, 0, 0, 0, 0, TR_B as u8, 0]).unwrap();
    assert!(cpu.v86());
    assert_eq!((cpu.cpl, cpu.seg[sreg::CS].base), (3, u64::from(CS32) << 4));
}

#[test]
fn no_task_switches_in_long_mode() {
    let (mut cpu, mut env) = long_mode();
    env.w16(0x104, TR_B);
    assert_eq!(
        exec(&mut cpu, &mut env, &[0xff, 0x2c, 0x25, 0, 1, 0, 0]),
        Err(Stop::gp(u32::from(TR_B)))
    );
}
