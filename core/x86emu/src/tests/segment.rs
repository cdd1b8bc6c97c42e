//! Segment loads, queries and linear addresses.

use super::machine::*;
use crate::bits::*;
use crate::env::Stop;
use crate::paging::Access;
use crate::segment::{linearize, load};
use crate::state::{shadow, sreg};

const READ: Access = Access {
    write: false,
    fetch: false,
    user: false,
    implicit: false,
};
const WRITE: Access = Access {
    write: true,
    ..READ
};

#[test]
fn data_segment_checks() {
    let (mut cpu, mut env) = protected();
    for (selector, want) in [
        (DS0, Ok(())),
        (UDS, Ok(())),
        (0, Ok(())),
        (3, Ok(())),
        (READ_ONLY, Ok(())),
        (EXEC_ONLY, Err(Stop::gp(u32::from(EXEC_ONLY)))),
        (DS0 | 3, Err(Stop::gp(u32::from(DS0)))),
        (CONFORMING | 3, Ok(())),
        (ABSENT_DATA, Err(Stop::np(u32::from(ABSENT_DATA)))),
        (TR, Err(Stop::gp(u32::from(TR)))),
        (0x1000, Err(Stop::gp(0x1000))),
        (0x000c, Err(Stop::gp(0x000c))),
    ] {
        let before = visible(&cpu);
        let got = load(&mut cpu, &mut env, sreg::DS, selector);
        assert_eq!(got, want, "DS = {selector:#x}");
        if want.is_err() {
            assert_eq!(visible(&cpu), before);
        } else {
            assert_eq!(cpu.seg[sreg::DS].selector, selector);
        }
    }
    assert!(!cpu.seg[sreg::DS].unusable);
    to_user(&mut cpu, &mut env, UCS32);
    assert_eq!(
        load(&mut cpu, &mut env, sreg::ES, DS0),
        Err(Stop::gp(u32::from(DS0)))
    );
}

#[test]
fn stack_segment_checks() {
    let (mut cpu, mut env) = protected();
    for (selector, want) in [
        (DS0, Ok(())),
        (0, Err(Stop::gp(0))),
        (UDS, Err(Stop::gp(u32::from(UDS & !3)))),
        (READ_ONLY, Err(Stop::gp(u32::from(READ_ONLY)))),
        (CS32, Err(Stop::gp(u32::from(CS32)))),
        (ABSENT_DATA & !3, Err(Stop::gp(u32::from(ABSENT_DATA)))),
    ] {
        assert_eq!(
            load(&mut cpu, &mut env, sreg::SS, selector),
            want,
            "SS = {selector:#x}"
        );
    }
    env.w64(GDT + u64::from(ABSENT_DATA), 0x00cf_1300_0000_ffff);
    assert_eq!(
        load(&mut cpu, &mut env, sreg::SS, ABSENT_DATA),
        Err(Stop::ss(u32::from(ABSENT_DATA)))
    );
    let (mut cpu, mut env) = long_mode();
    assert_eq!(load(&mut cpu, &mut env, sreg::SS, 0), Ok(()));
    assert!(cpu.seg[sreg::SS].unusable);
    assert_eq!(load(&mut cpu, &mut env, sreg::SS, 3), Err(Stop::gp(0)));
    to_user(&mut cpu, &mut env, UCS64);
    assert_eq!(load(&mut cpu, &mut env, sreg::SS, 3), Err(Stop::gp(0)));
}

#[test]
fn loads_set_the_accessed_bit() {
    let (mut cpu, mut env) = protected();
    load(&mut cpu, &mut env, sreg::FS, UNACCESSED).unwrap();
    assert_eq!(env.r64(GDT + u64::from(UNACCESSED)) >> 40 & 0xf, 3);
    assert_eq!(cpu.seg[sreg::FS].kind(), 3);
}

#[test]
fn real_and_v86_loads() {
    let (mut cpu, mut env) = real();
    cpu.seg[sreg::DS].limit = 0xffff_ffff;
    load(&mut cpu, &mut env, sreg::DS, 0x1234).unwrap();
    assert_eq!(cpu.seg[sreg::DS].base, 0x12340);
    assert_eq!(cpu.seg[sreg::DS].limit, 0xffff_ffff, "unreal mode survives");
    let (mut cpu, mut env) = v86();
    load(&mut cpu, &mut env, sreg::DS, 0x1234).unwrap();
    assert_eq!(
        (cpu.seg[sreg::DS].base, cpu.seg[sreg::DS].limit),
        (0x12340, 0xffff)
    );
}

#[test]
fn mov_and_pop_sreg() {
    let (mut cpu, mut env) = protected();
    cpu.gpr[0] = u64::from(DS0);
    exec(&mut cpu, &mut env, &[0x8e, 0xd0]).unwrap(); // mov ss, eax
    assert_eq!((cpu.shadow, cpu.rip), (shadow::MOV_SS, CODE + 2));
    assert_eq!(exec(&mut cpu, &mut env, &[0x8e, 0xd8]), Ok(())); // mov ds, eax
    cpu.gpr[3] = u64::MAX;
    exec(&mut cpu, &mut env, &[0x8c, 0xdb]).unwrap(); // mov ebx, ds
    assert_eq!(cpu.gpr[3], u64::from(DS0));
    env.w32(STACK, u32::from(UDS));
    exec(&mut cpu, &mut env, &[0x0f, 0xa1]).unwrap(); // pop fs
    assert_eq!((cpu.seg[sreg::FS].selector, cpu.gpr[4]), (UDS, STACK + 4));
    env.w32(0x100, 0x1234_5678);
    env.w16(0x104, DS0);
    exec(&mut cpu, &mut env, &[0xc5, 0x35, 0, 1, 0, 0]).unwrap(); // lds esi, [0x100]
    assert_eq!((cpu.gpr[6], cpu.seg[sreg::DS].selector), (0x1234_5678, DS0));
}

#[test]
fn lldt_and_ltr() {
    let (mut cpu, mut env) = protected();
    cpu.gpr[0] = u64::from(LDT);
    exec(&mut cpu, &mut env, &[0x0f, 0x00, 0xd0]).unwrap();
    assert_eq!((cpu.ldtr.base, cpu.ldtr.limit), (0x5000, 0xff));
    env.w64(0x5008, 0x00cf_9300_0000_ffff);
    load(&mut cpu, &mut env, sreg::ES, 0x0c).unwrap();
    cpu.gpr[0] = u64::from(DS0);
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x00, 0xd0]),
        Err(Stop::gp(u32::from(DS0)))
    );
    cpu.gpr[0] = u64::from(TR_B);
    exec(&mut cpu, &mut env, &[0x0f, 0x00, 0xd8]).unwrap();
    assert_eq!(cpu.tr.kind(), 11);
    assert_eq!(env.r64(GDT + u64::from(TR_B)) >> 40 & 0xf, 11);
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x00, 0xd8]),
        Err(Stop::gp(u32::from(TR_B))),
        "busy"
    );
    cpu.gpr[0] = 0;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x00, 0xd8]),
        Err(Stop::gp(0))
    );
    cpu.cpl = 3;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x00, 0xd8]),
        Err(Stop::gp(0))
    );
    let (mut cpu, mut env) = real();
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x00, 0xd8]),
        Err(Stop::ud())
    );
}

#[test]
fn long_ltr_reads_sixteen_bytes() {
    let (mut cpu, mut env) = long_mode();
    env.w64(
        GDT + u64::from(TR),
        system_descriptor(0x1234_5000, 0x67, 9, 0),
    );
    env.w64(GDT + u64::from(TR) + 8, 0xffff_8000);
    cpu.gpr[0] = u64::from(TR);
    exec(&mut cpu, &mut env, &[0x0f, 0x00, 0xd8]).unwrap();
    assert_eq!(cpu.tr.base, 0xffff_8000_1234_5000);
}

#[test]
fn lar_lsl_verr_verw() {
    let (mut cpu, mut env) = protected();
    let mut query = |opcode: &[u8], selector: u16| {
        cpu.gpr[0] = u64::from(selector);
        cpu.gpr[1] = 0xdead;
        exec(&mut cpu, &mut env, opcode).unwrap();
        (cpu.rflags & ZF != 0).then_some(cpu.gpr[1])
    };
    let (lar, lsl): (&[u8], &[u8]) = (&[0x0f, 0x02, 0xc8], &[0x0f, 0x03, 0xc8]);
    assert_eq!(query(lar, DS0), Some(0xcf_9300));
    assert_eq!(query(lsl, DS0), Some(0xffff_ffff));
    assert_eq!(query(lsl, TR), Some(0x88));
    assert_eq!(query(lar, DS0 | 3), None);
    assert_eq!(query(lar, 0x1000), None);
    let (verr, verw): (&[u8], &[u8]) = (&[0x0f, 0x00, 0xe0], &[0x0f, 0x00, 0xe8]);
    assert!(query(verr, READ_ONLY).is_some());
    assert!(query(verw, READ_ONLY).is_none());
    assert!(query(verr, EXEC_ONLY).is_none());
    assert!(query(verw, DS0).is_some());
    assert!(query(verr, TR).is_none());
    assert!(query(verr, CONFORMING | 3).is_some());
}

#[test]
fn linear_addresses_outside_64_bit_mode() {
    let (mut cpu, mut env) = protected();
    let ds = sreg::DS;
    assert_eq!(linearize(&cpu, ds, 0xffff_ffff, 4, READ), Ok(0xffff_ffff));
    cpu.seg[ds].limit = 0xfff;
    assert_eq!(linearize(&cpu, ds, 0xffc, 4, READ), Ok(0xffc));
    assert_eq!(linearize(&cpu, ds, 0xffd, 4, READ), Err(Stop::gp(0)));
    cpu.seg[sreg::SS].limit = 0xfff;
    assert_eq!(linearize(&cpu, sreg::SS, 0xffd, 4, READ), Err(Stop::ss(0)));
    cpu.seg[ds] = segment(&mut env, EXPAND_DOWN);
    assert_eq!(linearize(&cpu, ds, 0xfff, 1, READ), Err(Stop::gp(0)));
    assert_eq!(linearize(&cpu, ds, 0x1000, 1, READ), Ok(0x1000));
    cpu.seg[ds].attr &= !(1 << 14);
    assert_eq!(linearize(&cpu, ds, 0xffff, 2, READ), Err(Stop::gp(0)));
    cpu.seg[ds] = segment(&mut env, READ_ONLY);
    assert_eq!(linearize(&cpu, ds, 0, 1, WRITE), Err(Stop::gp(0)));
    assert_eq!(linearize(&cpu, sreg::CS, 0, 1, WRITE), Err(Stop::gp(0)));
    assert_eq!(linearize(&cpu, sreg::CS, 0, 1, READ), Ok(0));
    cpu.seg[ds].unusable = true;
    assert_eq!(linearize(&cpu, ds, 0, 1, READ), Err(Stop::gp(0)));
    cpu.seg[sreg::ES].base = 0xffff_f000;
    assert_eq!(
        linearize(&cpu, sreg::ES, 0x2000, 1, READ),
        Ok(0x1000),
        "wraps"
    );
}

#[test]
fn linear_addresses_in_64_bit_mode() {
    let (mut cpu, _) = long_mode();
    let hole = 0x8000_0000_0000;
    cpu.seg[sreg::DS].base = 0x1000;
    cpu.seg[sreg::FS].base = 0x1000;
    assert_eq!(linearize(&cpu, sreg::DS, 0x10, 1, WRITE), Ok(0x10));
    assert_eq!(linearize(&cpu, sreg::FS, 0x10, 1, WRITE), Ok(0x1010));
    assert_eq!(linearize(&cpu, sreg::DS, hole, 1, READ), Err(Stop::gp(0)));
    assert_eq!(
        linearize(&cpu, sreg::SS, hole - 1, 2, READ),
        Err(Stop::ss(0))
    );
    assert_eq!(linearize(&cpu, sreg::DS, hole - 8, 8, READ), Ok(hole - 8));
    cpu.cr4 |= CR4_LA57;
    assert_eq!(linearize(&cpu, sreg::DS, hole, 1, READ), Ok(hole));
    // Wrapping around the top of the address space is fine.
    assert_eq!(linearize(&cpu, sreg::DS, u64::MAX, 2, READ), Ok(u64::MAX));
}
