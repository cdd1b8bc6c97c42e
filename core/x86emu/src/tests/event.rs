//! Event delivery: 64-bit, protected, virtual-8086 and real mode; double and triple faults.

use super::fake::Fake;
use super::machine::*;
use crate::bits::*;
use crate::env::{Exception, Exit, Stop};
use crate::event::{Event, Kind, deliver};
use crate::state::{CpuState, gpr, shadow, sreg};

const HANDLER: u64 = 0x7000;

fn gate64(env: &mut Fake, vector: u8, kind: u8, dpl: u8, ist: u8) {
    let at = IDT + u64::from(vector) * 16;
    env.w64(at, gate(CS64, HANDLER as u32, kind, dpl, ist));
    env.w64(at + 8, 0);
}

fn gate32(env: &mut Fake, vector: u8, kind: u8, dpl: u8) {
    env.w64(
        IDT + u64::from(vector) * 8,
        gate(CS32, HANDLER as u32, kind, dpl, 0),
    );
}

fn page_fault(address: u64) -> Event {
    Event::from(Exception {
        vector: 14,
        error: Some(2),
        payload: address,
    })
}

fn fault(vector: u8, error: Option<u32>) -> Event {
    Event::from(Exception {
        vector,
        error,
        payload: 0,
    })
}

#[test]
fn long_same_privilege_with_error_code() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 14, 14, 0, 0);
    cpu.rflags = IF | TF | NT | AC | 2;
    cpu.gpr[gpr::RSP] = STACK + 8;
    deliver(&mut cpu, &mut env, page_fault(0x1234)).unwrap();
    assert_eq!((cpu.rip, cpu.cr2), (HANDLER, 0x1234));
    assert_eq!(
        cpu.gpr[gpr::RSP],
        STACK - 48,
        "aligned to 16 before the push"
    );
    assert_eq!(cpu.rflags, AC | 2);
    assert_eq!(env.r64(STACK - 48), 2, "error code");
    assert_eq!(env.r64(STACK - 40), CODE);
    assert_eq!(env.r64(STACK - 32), u64::from(CS64));
    assert_eq!(
        env.r64(STACK - 24),
        IF | TF | NT | AC | RF | 2,
        "faults set RF"
    );
    assert_eq!(env.r64(STACK - 16), STACK + 8);
    assert_eq!(env.r64(STACK - 8), u64::from(DS0));
    assert_eq!(cpu.seg[sreg::SS].selector, DS0);
    assert_eq!(env.retired, 1);
}

#[test]
fn long_from_user_switches_stacks() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 0x20, 15, 0, 0);
    to_user(&mut cpu, &mut env, UCS64);
    cpu.rflags = IF | 2;
    cpu.shadow = shadow::STI;
    deliver(&mut cpu, &mut env, Event::external(0x20)).unwrap();
    assert_eq!((cpu.cpl, cpu.seg[sreg::CS].selector), (0, CS64));
    assert_eq!(
        (cpu.seg[sreg::SS].selector, cpu.seg[sreg::SS].unusable),
        (0, true)
    );
    assert_eq!(cpu.gpr[gpr::RSP], KERNEL_STACK - 40);
    assert_eq!(cpu.rflags & IF, IF, "trap gate");
    assert_eq!(cpu.shadow, 0);
    assert_eq!(env.r64(KERNEL_STACK - 8), u64::from(UDS));
    assert_eq!(env.r64(KERNEL_STACK - 16), USER_STACK);
    assert_eq!(env.r64(KERNEL_STACK - 24), IF | 2, "interrupts leave RF");
    assert_eq!(env.r64(KERNEL_STACK - 32), u64::from(UCS64));
}

#[test]
fn long_ist_and_nmi() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 2, 14, 0, 1);
    deliver(&mut cpu, &mut env, Event::nmi()).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], 0xc000 - 40);
    assert!(cpu.nmi_blocked);
    assert_eq!(
        cpu.seg[sreg::SS].selector,
        DS0,
        "SS stays without a change of CPL"
    );
}

#[test]
fn software_interrupts_check_the_gate() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 0x80, 14, 0, 0);
    gate64(&mut env, 3, 14, 3, 0);
    to_user(&mut cpu, &mut env, UCS64);
    let before = visible(&cpu);
    assert_eq!(
        exec(&mut cpu, &mut env, &[0xcd, 0x80]),
        Err(Stop::gp(0x80 * 8 + 2))
    );
    assert_eq!(visible(&cpu), before);
    exec(&mut cpu, &mut env, &[0xcc]).unwrap();
    assert_eq!(
        env.r64(KERNEL_STACK - 40),
        CODE + 1,
        "INT3 saves the next RIP"
    );
    // The same gate is open to hardware.
    to_user(&mut cpu, &mut env, UCS64);
    deliver(&mut cpu, &mut env, Event::external(0x80)).unwrap();
}

#[test]
fn int1_ignores_gate_privilege() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 1, 14, 0, 0);
    to_user(&mut cpu, &mut env, UCS64);
    exec(&mut cpu, &mut env, &[0xf1]).unwrap();
    assert_eq!(env.r64(KERNEL_STACK - 40), CODE + 1);
}

#[test]
fn debug_exceptions_update_dr6() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 1, 14, 0, 0);
    cpu.dr6 = 0xffff_0ff3;
    cpu.dr7 = 0x2400;
    let event = Event::from(Exception {
        vector: 1,
        error: None,
        payload: 0x4000,
    });
    deliver(&mut cpu, &mut env, event).unwrap();
    assert_eq!((cpu.dr6, cpu.dr7), (0xffff_4ff0, 0x400));
    env.intercept = true;
    assert!(matches!(
        deliver(&mut cpu, &mut env, event),
        Err(Exit::Debug(_))
    ));
}

/// The error code on top of the current 64-bit stack.
fn top(cpu: &CpuState, env: &mut Fake) -> u64 {
    env.r64(cpu.gpr[gpr::RSP])
}

#[test]
fn faults_of_delivery_in_long_mode() {
    // What is wrong with gate 0x40, and the exception that results for an external interrupt.
    type Break = fn(&mut CpuState, &mut Fake);
    let cases: [(Break, u8, u64); 8] = [
        (|_, env| env.w64(IDT + 0x400, 0), 13, 0x203),
        (|_, env| gate64(env, 0x40, 12, 0, 0), 13, 0x203),
        (
            |_, env| {
                let raw = gate(CS64, 0, 14, 0, 0);
                env.w64(IDT + 0x400, raw & !(1 << 47));
            },
            11,
            0x203,
        ),
        (|_, env| env.w64(IDT + 0x400, gate(0, 0, 14, 0, 0)), 13, 1),
        (
            |_, env| env.w64(IDT + 0x400, gate(CS32, 0, 14, 0, 0)),
            13,
            0x41,
        ),
        (
            |_, env| env.w64(IDT + 0x400, gate(0x1000, 0, 14, 0, 0)),
            13,
            0x1001,
        ),
        (|_, env| env.w64(IDT + 0x408, 0x8000), 13, 1),
        (|cpu, _| cpu.idtr.limit = 0x3ff, 13, 0x203),
    ];
    for (index, (spoil, vector, error)) in cases.into_iter().enumerate() {
        let (mut cpu, mut env) = long_mode();
        gate64(&mut env, 0x40, 14, 0, 0);
        for v in [8, 10, 11, 12, 13, 14] {
            gate64(&mut env, v, 14, 0, 0);
            env.w64(
                IDT + u64::from(v) * 16,
                gate(CS64, 0x100 * u32::from(v), 14, 0, 0),
            );
        }
        spoil(&mut cpu, &mut env);
        deliver(&mut cpu, &mut env, Event::external(0x40)).unwrap();
        assert_eq!(cpu.rip, 0x100 * u64::from(vector), "case {index}");
        assert_eq!(top(&cpu, &mut env), error, "case {index}");
    }
}

#[test]
fn bad_stacks_become_faults_on_the_ist() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 0x20, 14, 0, 0);
    gate64(&mut env, 12, 14, 0, 1);
    env.w64(IDT + 12 * 16, gate(CS64, 0xc00, 14, 0, 1));
    env.w64(TSS + 4, 0x8000_0000_0000);
    to_user(&mut cpu, &mut env, UCS64);
    deliver(&mut cpu, &mut env, Event::external(0x20)).unwrap();
    assert_eq!((cpu.rip, top(&cpu, &mut env)), (0xc00, 1));
}

#[test]
fn double_and_triple_faults() {
    // First, second (by a broken gate), what comes out.
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 8, 14, 0, 0);
    // #GP whose gate is missing: #GP + #NP/#GP = #DF with error code 0.
    deliver(&mut cpu, &mut env, fault(13, Some(0x10))).unwrap();
    assert_eq!((cpu.rip, top(&cpu, &mut env)), (HANDLER, 0));
    assert_eq!(env.r64(cpu.gpr[gpr::RSP] + 8), CODE);
    // #PF whose gate is missing: also #DF.
    cpu.rip = CODE;
    deliver(&mut cpu, &mut env, page_fault(0x99)).unwrap();
    assert_eq!((cpu.rip, cpu.cr2), (HANDLER, 0x99));
    // #UD whose gate is missing: benign, so #GP is delivered in its place.
    gate64(&mut env, 13, 14, 0, 0);
    cpu.rip = CODE;
    deliver(&mut cpu, &mut env, fault(6, None)).unwrap();
    assert_eq!(top(&cpu, &mut env), 6 * 8 + 3);
    // No #DF gate: shutdown.
    env.w64(IDT + 8 * 16, 0);
    cpu.rip = CODE;
    assert_eq!(
        deliver(&mut cpu, &mut env, page_fault(0)),
        Err(Exit::Shutdown)
    );
    assert_eq!(cpu.rip, CODE);
}

#[test]
fn page_fault_on_the_stack() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 13, 14, 0, 0);
    gate64(&mut env, 14, 14, 0, 1);
    gate64(&mut env, 8, 14, 0, 1);
    env.w64(IDT + 14 * 16, gate(CS64, 0xe00, 14, 0, 1));
    cpu.gpr[gpr::RSP] = 0x7fff_0000_0000;
    // Contributory, then #PF: the #PF is delivered.
    deliver(&mut cpu, &mut env, fault(13, Some(0))).unwrap();
    assert_eq!((cpu.rip, cpu.cr2), (0xe00, 0x7ffe_ffff_ffd0));
    assert_eq!(top(&cpu, &mut env), 2, "#PF codes have no EXT bit");
    // #PF, then #PF: #DF.
    gate64(&mut env, 14, 14, 0, 0);
    cpu.gpr[gpr::RSP] = 0x7fff_0000_0000;
    deliver(&mut cpu, &mut env, page_fault(0x55)).unwrap();
    assert_eq!((cpu.rip, cpu.cr2), (HANDLER, 0x7ffe_ffff_ffd0));
    assert_eq!(top(&cpu, &mut env), 0);
}

#[test]
fn protected_same_and_inner() {
    let (mut cpu, mut env) = protected();
    gate32(&mut env, 13, 14, 0);
    cpu.rflags = IF | 2;
    deliver(&mut cpu, &mut env, fault(13, Some(0x18))).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (HANDLER, STACK - 16));
    assert_eq!(env.r32(STACK - 16), 0x18);
    assert_eq!(env.r32(STACK - 12), CODE as u32);
    assert_eq!(env.r32(STACK - 8), u32::from(CS32));
    assert_eq!(env.r32(STACK - 4), (IF | RF | 2) as u32);
    cpu.rip = CODE;
    to_user(&mut cpu, &mut env, UCS32);
    deliver(&mut cpu, &mut env, fault(13, Some(0))).unwrap();
    assert_eq!((cpu.cpl, cpu.gpr[gpr::RSP]), (0, KERNEL_STACK - 24));
    assert_eq!(cpu.seg[sreg::SS].selector, DS0);
    assert_eq!(env.r32(KERNEL_STACK - 4), u32::from(UDS));
    assert_eq!(env.r32(KERNEL_STACK - 8), USER_STACK as u32);
}

#[test]
fn protected_16_bit_gate() {
    let (mut cpu, mut env) = protected();
    gate32(&mut env, 0x21, 7, 0);
    cpu.rflags = IF | 2;
    deliver(&mut cpu, &mut env, Event::external(0x21)).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], STACK - 6);
    assert_eq!(env.r16(STACK - 6), CODE as u16);
    assert_eq!(cpu.rflags, IF | 2);
}

#[test]
fn bad_tss_stack_is_ts() {
    let (mut cpu, mut env) = protected();
    gate32(&mut env, 0x20, 14, 0);
    // #TS itself through a conforming handler, so that it needs no new stack.
    env.w64(IDT + 80, gate(CONFORMING, 0xa00, 14, 0, 0));
    env.w32(TSS + 8, u32::from(UDS));
    to_user(&mut cpu, &mut env, UCS32);
    deliver(&mut cpu, &mut env, Event::external(0x20)).unwrap();
    assert_eq!((cpu.rip, cpu.cpl), (0xa00, 3));
    assert_eq!(env.r32(cpu.gpr[gpr::RSP]), u32::from(UDS & !3) | 1);
}

#[test]
fn v86_interrupt_goes_to_ring_0() {
    let (mut cpu, mut env) = v86();
    gate32(&mut env, 13, 14, 0);
    cpu.rflags |= IF;
    deliver(&mut cpu, &mut env, fault(13, Some(0))).unwrap();
    assert_eq!((cpu.cpl, cpu.rflags & (VM | IF)), (0, 0));
    assert_eq!(cpu.gpr[gpr::RSP], KERNEL_STACK - 40);
    let saved: [u32; 10] = std::array::from_fn(|i| env.r32(KERNEL_STACK - 40 + 4 * i as u64));
    assert_eq!(saved[0..3], [0, 0x20, 0x101]);
    assert_eq!(saved[3], (VM | IF | RF | 2) as u32);
    assert_eq!(saved[4..], [0x800, 0x102, 0x100, 0x103, 0x104, 0x105]);
    assert!(cpu.seg[sreg::DS].unusable && cpu.seg[sreg::GS].unusable);
    assert_eq!(cpu.seg[sreg::SS].selector, DS0);
}

#[test]
fn v86_handler_must_run_in_ring_0() {
    let (mut cpu, mut env) = v86();
    env.w64(IDT + 0x20 * 8, gate(CONFORMING, 0x100, 14, 3, 0));
    gate32(&mut env, 13, 14, 0);
    deliver(&mut cpu, &mut env, Event::external(0x20)).unwrap();
    assert_eq!(env.r32(cpu.gpr[gpr::RSP]), u32::from(CONFORMING) | 1);
}

#[test]
fn real_mode() {
    let (mut cpu, mut env) = real();
    env.w32(0x20 * 4, 0x0200_0300);
    cpu.rflags = IF | TF | 2;
    deliver(&mut cpu, &mut env, Event::external(0x20)).unwrap();
    assert_eq!((cpu.rip, cpu.seg[sreg::CS].base), (0x300, 0x2000));
    assert_eq!(cpu.rflags, 2);
    assert_eq!(
        [env.r16(0x7fa), env.r16(0x7fc), env.r16(0x7fe)],
        [0x20, 0x100, 0x302]
    );
    // A stack that wraps in the middle of the frame.
    cpu.gpr[gpr::RSP] = 4;
    deliver(&mut cpu, &mut env, Event::external(0x20)).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], 0xfffe);
    assert_eq!((env.r16(2), env.r16(0), env.r16(0xfffe)), (2, 0x200, 0x300));
    // The IVT ends before the vector: #GP, whose own vector is there.
    cpu.idtr.limit = 14 * 4 - 1;
    env.w32(13 * 4, 0x0000_0400);
    cpu.gpr[gpr::RSP] = 0x800;
    deliver(&mut cpu, &mut env, Event::external(0x20)).unwrap();
    assert_eq!(
        (cpu.rip, cpu.gpr[gpr::RSP]),
        (0x400, 0x7fa),
        "no error code in real mode"
    );
    cpu.idtr.limit = 0;
    assert_eq!(
        deliver(&mut cpu, &mut env, Event::external(0x20)),
        Err(Exit::Shutdown)
    );
}

#[test]
fn software_kinds_do_not_set_ext() {
    let (mut cpu, mut env) = long_mode();
    gate64(&mut env, 13, 14, 0, 0);
    let event = Event {
        vector: 0x40,
        kind: Kind::SoftwareInt,
        error: None,
        payload: 0,
        next_rip: CODE + 2,
    };
    deliver(&mut cpu, &mut env, event).unwrap();
    assert_eq!(top(&cpu, &mut env), 0x202);
    assert_eq!(
        env.r64(cpu.gpr[gpr::RSP] + 8),
        CODE,
        "the fault is the instruction's"
    );
}
