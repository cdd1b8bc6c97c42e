//! Far transfers: direct, through gates, returns, IRET in every form, system calls.

use super::fake::Fake;
use super::machine::*;
use crate::bits::*;
use crate::env::Stop;
use crate::segment::null_segment;
use crate::state::{CpuState, gpr, sreg};

const TARGET: u64 = 0x7000;

/// jmp/call ptr16:32.
fn far(opcode: u8, selector: u16, offset: u32) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    bytes
}
use std::{vec, vec::Vec};

const JMP: u8 = 0xea;
const CALL: u8 = 0x9a;

fn push32(cpu: &mut CpuState, env: &mut Fake, items: &[u64]) {
    cpu.gpr[gpr::RSP] -= 4 * items.len() as u64;
    for (i, item) in items.iter().enumerate() {
        env.w32(cpu.gpr[gpr::RSP] + 4 * i as u64, *item as u32);
    }
}

fn push64(cpu: &mut CpuState, env: &mut Fake, items: &[u64]) {
    cpu.gpr[gpr::RSP] -= 8 * items.len() as u64;
    for (i, item) in items.iter().enumerate() {
        env.w64(cpu.gpr[gpr::RSP] + 8 * i as u64, *item);
    }
}

#[test]
fn direct_jump_checks() {
    let gp = |s: u16| Err(Stop::gp(u32::from(s & !3)));
    for (selector, want) in [
        (CS32, Ok(())),
        (CS32 | 1, gp(CS32)),
        (CS16, Ok(())),
        (CONFORMING, Ok(())),
        (CONFORMING | 3, Ok(())),
        (EXEC_ONLY, Ok(())),
        (UCS32, gp(UCS32)),
        (DS0, gp(DS0)),
        (0, Err(Stop::gp(0))),
        (LDT, gp(LDT)),
        (0x2000, gp(0x2000)),
        (ABSENT_CODE, Err(Stop::np(u32::from(ABSENT_CODE)))),
    ] {
        let (mut cpu, mut env) = protected();
        let before = visible(&cpu);
        let got = exec(&mut cpu, &mut env, &far(JMP, selector, TARGET as u32));
        assert_eq!(got, want, "jmp {selector:#x}");
        if want.is_ok() {
            assert_eq!(
                (cpu.rip, cpu.seg[sreg::CS].selector),
                (TARGET, selector & !3)
            );
        } else {
            assert_eq!(visible(&cpu), before);
        }
    }
    let (mut cpu, mut env) = protected();
    assert_eq!(
        exec(&mut cpu, &mut env, &far(JMP, CS16, 0x10000)),
        Err(Stop::gp(0))
    );
}

#[test]
fn direct_call_and_return() {
    let (mut cpu, mut env) = protected();
    exec(&mut cpu, &mut env, &far(CALL, CONFORMING, TARGET as u32)).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], STACK - 8);
    assert_eq!(
        [env.r32(STACK - 8), env.r32(STACK - 4)],
        [CODE as u32 + 7, u32::from(CS32)]
    );
    exec(&mut cpu, &mut env, &[0xca, 0x10, 0x00]).unwrap(); // retf 16
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (CODE + 7, STACK + 16));
    assert_eq!(cpu.seg[sreg::CS].selector, CS32);
}

#[test]
fn real_mode_far() {
    let (mut cpu, mut env) = real();
    exec(&mut cpu, &mut env, &[0x9a, 0x34, 0x12, 0x00, 0x80]).unwrap();
    assert_eq!((cpu.rip, cpu.seg[sreg::CS].base), (0x1234, 0x80000));
    assert_eq!([env.r16(0x7fc), env.r16(0x7fe)], [0x25, 0x100]);
    exec(&mut cpu, &mut env, &[0xcb]).unwrap();
    assert_eq!(
        (cpu.rip, cpu.seg[sreg::CS].selector, cpu.gpr[4]),
        (0x25, 0x100, 0x800)
    );
    // jmp dword far beyond the limit
    let beyond = exec(&mut cpu, &mut env, &[0x66, 0xea, 0, 0, 1, 0, 0, 1]);
    assert_eq!(beyond, Err(Stop::gp(0)));
}

#[test]
fn enter_protected_and_long_mode() {
    // The far jump after CR0.PE goes through the GDT.
    let (mut cpu, mut env) = real();
    let (template, mut other) = protected();
    env.write(GDT, &other.read(GDT, 0x100));
    cpu.gdtr = template.gdtr;
    cpu.cr0 |= CR0_PE;
    exec(&mut cpu, &mut env, &[0x66, 0xea, 0, 0x70, 0, 0, 0x40, 0]).unwrap();
    assert_eq!((cpu.rip, cpu.seg[sreg::CS].db()), (TARGET, true));
}

fn gate_at(env: &mut Fake, raw: u64) {
    env.w64(GDT + u64::from(GATE), raw);
    env.w64(GDT + u64::from(GATE) + 8, 0);
}

#[test]
fn call_gate_to_inner_copies_parameters() {
    for (kind, size) in [(12u8, 4u64), (4, 2)] {
        let (mut cpu, mut env) = protected();
        gate_at(&mut env, gate(CS32, TARGET as u32, kind, 3, 2));
        to_user(&mut cpu, &mut env, UCS32);
        if size == 4 {
            env.w32(USER_STACK, 0x1111);
            env.w32(USER_STACK + 4, 0x2222);
        } else {
            env.w16(USER_STACK, 0x1111);
            env.w16(USER_STACK + 2, 0x2222);
        }
        exec(&mut cpu, &mut env, &far(CALL, GATE | 3, 0x9999)).unwrap();
        assert_eq!(
            (cpu.cpl, cpu.rip, cpu.seg[sreg::CS].selector),
            (0, TARGET, CS32)
        );
        assert_eq!(cpu.gpr[gpr::RSP], KERNEL_STACK - 6 * size);
        let mut item = |i: u64| {
            let at = KERNEL_STACK - 6 * size + i * size;
            if size == 4 {
                env.r32(at)
            } else {
                u32::from(env.r16(at))
            }
        };
        assert_eq!(
            [item(0), item(1), item(2), item(3), item(4), item(5)],
            [
                CODE as u32 + 7,
                u32::from(UCS32),
                0x1111,
                0x2222,
                USER_STACK as u32,
                u32::from(UDS)
            ]
        );
        // And back, releasing the parameters on both stacks.
        let ret: &[u8] = if size == 4 {
            &[0xca, 8, 0]
        } else {
            &[0x66, 0xca, 4, 0]
        };
        exec(&mut cpu, &mut env, ret).unwrap();
        assert_eq!((cpu.cpl, cpu.rip), (3, CODE + 7));
        assert_eq!(cpu.gpr[gpr::RSP], USER_STACK + 2 * size);
        assert_eq!(cpu.seg[sreg::SS].selector, UDS);
    }
}

#[test]
fn call_gate_checks() {
    let (mut cpu, mut env) = protected();
    gate_at(&mut env, gate(CS32, TARGET as u32, 12, 0, 0));
    exec(&mut cpu, &mut env, &far(JMP, GATE, 0)).unwrap();
    assert_eq!(cpu.rip, TARGET);
    to_user(&mut cpu, &mut env, UCS32);
    let bad_gate = Err(Stop::gp(u32::from(GATE)));
    assert_eq!(exec(&mut cpu, &mut env, &far(CALL, GATE | 3, 0)), bad_gate);
    gate_at(&mut env, gate(CS32, TARGET as u32, 12, 3, 0));
    // JMP does not change the privilege level.
    let bad_code = Err(Stop::gp(u32::from(CS32)));
    assert_eq!(exec(&mut cpu, &mut env, &far(JMP, GATE | 3, 0)), bad_code);
    env.w32(TSS + 8, 0);
    assert_eq!(
        exec(&mut cpu, &mut env, &far(CALL, GATE | 3, 0)),
        Err(Stop::ts(0))
    );
    gate_at(&mut env, gate(0, 0, 12, 3, 0));
    assert_eq!(
        exec(&mut cpu, &mut env, &far(CALL, GATE | 3, 0)),
        Err(Stop::gp(0))
    );
    gate_at(&mut env, gate(CS32, 0, 12, 3, 0) & !(1 << 47));
    let absent = Err(Stop::np(u32::from(GATE)));
    assert_eq!(exec(&mut cpu, &mut env, &far(CALL, GATE | 3, 0)), absent);
}

#[test]
fn long_call_gate() {
    let (mut cpu, mut env) = long_mode();
    gate_at(&mut env, gate(CS64, TARGET as u32, 12, 3, 0));
    to_user(&mut cpu, &mut env, UCS64);
    env.w64(0x100, 0);
    env.w32(0x100, 0);
    env.w16(0x104, GATE | 3);
    exec(&mut cpu, &mut env, &[0xff, 0x1c, 0x25, 0, 1, 0, 0]).unwrap(); // call far [0x100]
    assert_eq!((cpu.cpl, cpu.rip), (0, TARGET));
    assert_eq!(cpu.gpr[gpr::RSP], KERNEL_STACK - 32);
    assert_eq!(env.r64(KERNEL_STACK - 32), CODE + 7);
    assert_eq!(env.r64(KERNEL_STACK - 16), USER_STACK);
    assert!(cpu.seg[sreg::SS].unusable);
    exec(&mut cpu, &mut env, &[0x48, 0xcb]).unwrap(); // retfq
    assert_eq!(
        (cpu.cpl, cpu.rip, cpu.gpr[gpr::RSP]),
        (3, CODE + 7, USER_STACK)
    );
    // The upper half must not look like a descriptor.
    env.w64(GDT + u64::from(GATE) + 8, 0x1f << 40);
    assert_eq!(
        exec(&mut cpu, &mut env, &[0xff, 0x1c, 0x25, 0, 1, 0, 0]),
        Err(Stop::gp(u32::from(GATE)))
    );
}

#[test]
fn long_far_return_to_64_bit_code() {
    // What a boot stub does: push CS, push RIP, lretq.
    let (mut cpu, mut env) = long_mode();
    push64(&mut cpu, &mut env, &[TARGET, u64::from(CS64)]);
    exec(&mut cpu, &mut env, &[0x48, 0xcb]).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (TARGET, STACK));
    // To compatibility mode.
    push64(&mut cpu, &mut env, &[TARGET, u64::from(CS32)]);
    exec(&mut cpu, &mut env, &[0x48, 0xcb]).unwrap();
    assert_eq!(cpu.code_size(), crate::state::CodeSize::Bits32);
}

#[test]
fn iret_protected_forms() {
    let (mut cpu, mut env) = protected();
    cpu.nmi_blocked = true;
    push32(
        &mut cpu,
        &mut env,
        &[TARGET, u64::from(CS32), IF | IOPL | AC | 3],
    );
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (TARGET, STACK));
    assert_eq!(cpu.rflags, IF | IOPL | AC | 3);
    assert!(!cpu.nmi_blocked);
    // To CPL 3: kernel data segments go.
    cpu.seg[sreg::ES] = segment(&mut env, UDS);
    let frame = [TARGET, u64::from(UCS32), IF | 2, USER_STACK, u64::from(UDS)];
    push32(&mut cpu, &mut env, &frame);
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert_eq!((cpu.cpl, cpu.gpr[gpr::RSP]), (3, USER_STACK));
    assert!(cpu.seg[sreg::DS].unusable && !cpu.seg[sreg::ES].unusable);
    // At CPL 3 neither IOPL nor IF change.
    cpu.rflags = 2;
    push32(
        &mut cpu,
        &mut env,
        &[TARGET, u64::from(UCS32), IF | IOPL | 3],
    );
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert_eq!(cpu.rflags, 3);
    // Nor is a return inwards possible.
    push32(&mut cpu, &mut env, &[TARGET, u64::from(CS32), 2]);
    let before = visible(&cpu);
    let inward = exec(&mut cpu, &mut env, &[0xcf]);
    assert_eq!(inward, Err(Stop::gp(u32::from(CS32))));
    assert_eq!(visible(&cpu), before);
}

#[test]
fn iret_to_a_16_bit_stack_keeps_the_upper_half() {
    let (mut cpu, mut env) = protected();
    env.w64(GDT + u64::from(GATE), 0x0000_f300_0000_ffff);
    cpu.gpr[gpr::RSP] = 0x1_9000;
    let ss = u64::from(GATE | 3);
    push32(
        &mut cpu,
        &mut env,
        &[TARGET, u64::from(UCS32), 2, 0x2222_b000, ss],
    );
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], 0x1_b000);
}

#[test]
fn iret_to_v86_and_back_in() {
    let (mut cpu, mut env) = protected();
    let frame = [
        0x20,
        0x100,
        VM | IF | 2,
        0x800,
        0x102,
        0x103,
        0x104,
        0x105,
        0x106,
    ];
    push32(&mut cpu, &mut env, &frame);
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert!(cpu.v86());
    assert_eq!((cpu.cpl, cpu.rip, cpu.gpr[gpr::RSP]), (3, 0x20, 0x800));
    assert_eq!(
        cpu.seg.map(|s| s.selector),
        [0x103, 0x100, 0x102, 0x104, 0x105, 0x106]
    );
    assert_eq!(cpu.seg[sreg::GS].base, 0x1060);
    // IOPL-sensitive in V86 mode.
    assert_eq!(exec(&mut cpu, &mut env, &[0xcf]), Err(Stop::gp(0)));
    assert_eq!(exec(&mut cpu, &mut env, &[0xcd, 0x21]), Err(Stop::gp(0)));
    cpu.rflags |= IOPL;
    env.w16(0x1020 + 0x800, 0x30);
    env.w16(0x1020 + 0x802, 0x200);
    env.w16(0x1020 + 0x804, 0x0003);
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert_eq!(
        (cpu.rip, cpu.seg[sreg::CS].base, cpu.gpr[gpr::RSP]),
        (0x30, 0x2000, 0x806)
    );
    assert_eq!(cpu.rflags, VM | IOPL | 3);
}

#[test]
fn vme_redirects_software_interrupts() {
    let (mut cpu, mut env) = v86();
    cpu.cr4 |= CR4_VME;
    cpu.rflags |= VIF;
    // The I/O bitmap at 0x88, the redirection bitmap below it, all zero: redirect.
    env.w16(TSS + 102, 0x88);
    env.w32(0x21 * 4, 0x0300_0040);
    exec(&mut cpu, &mut env, &[0xcd, 0x21]).unwrap();
    assert_eq!((cpu.rip, cpu.seg[sreg::CS].base), (0x40, 0x3000));
    assert_eq!(cpu.rflags & VIF, 0);
    assert_eq!(env.r16(0x1020 + 0x7fe), (IF | IOPL | 2) as u16);
    // A set bit sends it to protected mode, which IOPL forbids.
    env.write(TSS + 0x88 - 32 + 4, &[2]);
    assert_eq!(exec(&mut cpu, &mut env, &[0xcd, 0x21]), Err(Stop::gp(0)));
}

#[test]
fn iret_real_mode() {
    let (mut cpu, mut env) = real();
    env.w16(0x800, 0x1234);
    env.w16(0x802, 0x8000);
    env.w16(0x804, 0x0f03);
    cpu.nmi_blocked = true;
    exec(&mut cpu, &mut env, &[0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.seg[sreg::CS].base), (0x1234, 0x80000));
    assert_eq!((cpu.rflags, cpu.gpr[gpr::RSP]), (0xf03, 0x806));
    assert!(!cpu.nmi_blocked);
}

#[test]
fn iretq_forms() {
    let (mut cpu, mut env) = long_mode();
    cpu.seg[sreg::SS] = null_segment(0, 0);
    let frame = [TARGET, u64::from(CS64), RF | IF | 2, 0x9abc, 0];
    push64(&mut cpu, &mut env, &frame);
    exec(&mut cpu, &mut env, &[0x48, 0xcf]).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP]), (TARGET, 0x9abc));
    assert_eq!(cpu.rflags, RF | IF | 2);
    // To user, 64-bit; FS keeps its base with a null selector.
    cpu.gpr[gpr::RSP] = STACK;
    cpu.seg[sreg::FS] = null_segment(0, 0);
    cpu.seg[sreg::FS].base = 0x7f00_1234_0000;
    let frame = [
        0x40_0000,
        u64::from(UCS64),
        IF | 2,
        0x7fff_ffff_e000,
        u64::from(UDS),
    ];
    push64(&mut cpu, &mut env, &frame);
    exec(&mut cpu, &mut env, &[0x48, 0xcf]).unwrap();
    assert_eq!(
        (cpu.cpl, cpu.rip, cpu.gpr[gpr::RSP]),
        (3, 0x40_0000, 0x7fff_ffff_e000)
    );
    assert_eq!(cpu.seg[sreg::FS].base, 0x7f00_1234_0000);
    // To compatibility mode.
    let (mut cpu, mut env) = long_mode();
    push64(
        &mut cpu,
        &mut env,
        &[TARGET, u64::from(UCS32), 2, USER_STACK, u64::from(UDS)],
    );
    exec(&mut cpu, &mut env, &[0x48, 0xcf]).unwrap();
    assert_eq!(cpu.code_size(), crate::state::CodeSize::Bits32);
}

#[test]
fn iretq_faults_change_nothing() {
    let user_null_ss = [TARGET, u64::from(UCS64), 2, USER_STACK, 0];
    let bad_rip = [1 << 47, u64::from(UCS64), 2, USER_STACK, u64::from(UDS)];
    let bad_ss = [TARGET, u64::from(UCS64), 2, USER_STACK, u64::from(DS0)];
    let null_cs = [TARGET, 0, 2, USER_STACK, u64::from(UDS)];
    for (frame, error) in [
        (user_null_ss, 0),
        (bad_rip, 0),
        (bad_ss, u32::from(DS0)),
        (null_cs, 0),
    ] {
        let (mut cpu, mut env) = long_mode();
        push64(&mut cpu, &mut env, &frame);
        let before = visible(&cpu);
        assert_eq!(
            exec(&mut cpu, &mut env, &[0x48, 0xcf]),
            Err(Stop::gp(error))
        );
        assert_eq!(visible(&cpu), before);
    }
    let (mut cpu, mut env) = long_mode();
    cpu.rflags |= NT;
    assert_eq!(exec(&mut cpu, &mut env, &[0x48, 0xcf]), Err(Stop::gp(0)));
    cpu.rflags &= !NT;
    cpu.gpr[gpr::RSP] = 1 << 47;
    assert_eq!(exec(&mut cpu, &mut env, &[0x48, 0xcf]), Err(Stop::ss(0)));
}

#[test]
fn syscall_and_sysret() {
    let (mut cpu, mut env) = long_mode();
    // STAR: kernel 0x08/0x10, user base 0x1b: SYSRETQ gives 0x2b/0x23.
    cpu.star = 0x001b_0008 << 32;
    cpu.lstar = 0xffff_ffff_8000_0000;
    cpu.fmask = IF | TF;
    to_user(&mut cpu, &mut env, UCS64);
    cpu.rflags = IF | 0x43;
    exec(&mut cpu, &mut env, &[0x0f, 0x05]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl), (0xffff_ffff_8000_0000, 0));
    assert_eq!((cpu.gpr[gpr::RCX], cpu.gpr[11]), (CODE + 2, IF | 0x43));
    assert_eq!((cpu.rflags, cpu.gpr[gpr::RSP]), (0x43, USER_STACK));
    assert_eq!(cpu.seg[sreg::CS].selector, CS64);
    assert_eq!(
        (cpu.seg[sreg::SS].selector, cpu.seg[sreg::SS].limit),
        (DS0, 0xffff_ffff)
    );
    exec(&mut cpu, &mut env, &[0x48, 0x0f, 0x07]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl, cpu.rflags), (CODE + 2, 3, IF | 0x43));
    assert_eq!(
        (cpu.seg[sreg::CS].selector, cpu.seg[sreg::CS].long()),
        (UCS64, true)
    );
    assert_eq!(cpu.seg[sreg::SS].selector, UDS);
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x48, 0x0f, 0x07]),
        Err(Stop::gp(0))
    );
    // 32-bit SYSRET, and a RIP that is not canonical.
    cpu.cpl = 0;
    cpu.gpr[gpr::RCX] = 0x8000_0000_0000;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x48, 0x0f, 0x07]),
        Err(Stop::gp(0))
    );
    exec(&mut cpu, &mut env, &[0x0f, 0x07]).unwrap();
    assert_eq!(
        (cpu.rip, cpu.seg[sreg::CS].selector, cpu.seg[sreg::CS].db()),
        (0, 0x1b, true)
    );
    // Compatibility mode: Intel has no SYSCALL there, AMD uses CSTAR.
    assert_eq!(exec(&mut cpu, &mut env, &[0x0f, 0x05]), Err(Stop::ud()));
    env.features.amd = true;
    cpu.cstar = 0x1234_0000;
    exec(&mut cpu, &mut env, &[0x0f, 0x05]).unwrap();
    assert_eq!(cpu.rip, 0x1234_0000);
    cpu.efer &= !EFER_SCE;
    assert_eq!(exec(&mut cpu, &mut env, &[0x0f, 0x05]), Err(Stop::ud()));
}

#[test]
fn sysenter_and_sysexit() {
    let (mut cpu, mut env) = protected();
    to_user(&mut cpu, &mut env, UCS32);
    assert_eq!(exec(&mut cpu, &mut env, &[0x0f, 0x34]), Err(Stop::gp(0)));
    cpu.sysenter_cs = 0x40;
    cpu.sysenter_esp = KERNEL_STACK;
    cpu.sysenter_eip = TARGET;
    cpu.rflags |= IF;
    exec(&mut cpu, &mut env, &[0x0f, 0x34]).unwrap();
    assert_eq!(
        (cpu.rip, cpu.cpl, cpu.gpr[gpr::RSP]),
        (TARGET, 0, KERNEL_STACK)
    );
    assert_eq!(
        (cpu.seg[sreg::CS].selector, cpu.seg[sreg::SS].selector),
        (0x40, 0x48)
    );
    assert_eq!(cpu.rflags & IF, 0);
    cpu.gpr[gpr::RDX] = CODE;
    cpu.gpr[gpr::RCX] = USER_STACK;
    exec(&mut cpu, &mut env, &[0x0f, 0x35]).unwrap();
    assert_eq!((cpu.rip, cpu.cpl, cpu.gpr[gpr::RSP]), (CODE, 3, USER_STACK));
    assert_eq!(
        (cpu.seg[sreg::CS].selector, cpu.seg[sreg::SS].selector),
        (0x53, 0x5b)
    );
    let (mut cpu, mut env) = long_mode();
    env.features.amd = true;
    assert_eq!(exec(&mut cpu, &mut env, &[0x0f, 0x34]), Err(Stop::ud()));
}

#[test]
fn into_depends_on_of() {
    let (mut cpu, mut env) = protected();
    env.w64(IDT + 32, gate(CS32, TARGET as u32, 14, 0, 0));
    exec(&mut cpu, &mut env, &[0xce]).unwrap();
    assert_eq!(cpu.rip, CODE + 1);
    cpu.rflags |= OF;
    exec(&mut cpu, &mut env, &[0xce]).unwrap();
    assert_eq!((cpu.rip, env.r32(STACK - 12)), (TARGET, CODE as u32 + 2));
}
