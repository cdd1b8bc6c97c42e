//! Control and debug registers, privileged instructions, flags, port permissions.

use super::machine::*;
use crate::bits::*;
use crate::control::{io_allowed, popf_flags, pushf_image, write_cr};
use crate::env::{Exception, Exit, Flush, Stop};
use crate::state::{gpr, shadow, sreg};

#[test]
fn cr0_rules() {
    let (mut cpu, mut env) = protected();
    for bad in [1 << 32, CR0_PG, CR0_PE | CR0_NW] {
        assert_eq!(
            write_cr(&mut cpu, &mut env, 0, bad),
            Err(Stop::gp(0)),
            "{bad:#x}"
        );
    }
    write_cr(&mut cpu, &mut env, 0, CR0_PE | CR0_PG | 0xff00).unwrap();
    assert_eq!(cpu.cr0, CR0_PE | CR0_PG | CR0_ET);
    assert_eq!(env.flushes, [Flush::All]);
    assert_eq!(write_cr(&mut cpu, &mut env, 1, 0), Err(Stop::ud()));
    cpu.cpl = 3;
    assert_eq!(write_cr(&mut cpu, &mut env, 0, 1), Err(Stop::gp(0)));
}

#[test]
fn long_mode_activation() {
    let (mut cpu, mut env) = protected();
    cpu.efer = EFER_LME;
    let on = CR0_PE | CR0_PG;
    assert_eq!(
        write_cr(&mut cpu, &mut env, 0, on),
        Err(Stop::gp(0)),
        "no PAE"
    );
    write_cr(&mut cpu, &mut env, 4, CR4_PAE).unwrap();
    cpu.seg[sreg::CS] = segment(&mut env, CS64);
    assert_eq!(
        write_cr(&mut cpu, &mut env, 0, on),
        Err(Stop::gp(0)),
        "CS.L"
    );
    cpu.seg[sreg::CS] = segment(&mut env, CS32);
    write_cr(&mut cpu, &mut env, 0, on).unwrap();
    assert!(cpu.long_mode());
    assert_eq!(
        write_cr(&mut cpu, &mut env, 4, 0),
        Err(Stop::gp(0)),
        "PAE stays"
    );
    assert_eq!(
        write_cr(&mut cpu, &mut env, 4, CR4_PAE | CR4_LA57),
        Err(Stop::gp(0))
    );
    write_cr(&mut cpu, &mut env, 0, CR0_PE).unwrap();
    assert!(!cpu.long_mode() && cpu.efer & EFER_LME != 0);
}

#[test]
fn pdptes_are_loaded_and_checked() {
    let (mut cpu, mut env) = protected();
    cpu.cr4 = CR4_PAE;
    cpu.cr3 = 0x6020;
    env.w64(0x6020, 0x7001);
    env.w64(0x6028, 0x8003);
    let on = CR0_PE | CR0_PG;
    assert_eq!(
        write_cr(&mut cpu, &mut env, 0, on),
        Err(Stop::gp(0)),
        "reserved bit"
    );
    assert_eq!(cpu.cr0 & CR0_PG, 0);
    env.w64(0x6028, 0x8002);
    write_cr(&mut cpu, &mut env, 0, on).unwrap();
    assert_eq!(cpu.pdptrs, [0x7001, 0x8002, 0, 0]);
    env.w64(0x6040, 0x9001);
    write_cr(&mut cpu, &mut env, 3, 0x6040).unwrap();
    assert_eq!(cpu.pdptrs[0], 0x9001);
    env.w64(0x6060, 1 << 46 | 1);
    assert_eq!(write_cr(&mut cpu, &mut env, 3, 0x6060), Err(Stop::gp(0)));
    assert_eq!(cpu.cr3, 0x6040);
}

#[test]
fn cr3_and_pcid() {
    let (mut cpu, mut env) = long_mode();
    write_cr(&mut cpu, &mut env, 3, 0x5018).unwrap();
    assert_eq!((cpu.cr3, env.flushes.pop()), (0x5018, Some(Flush::Pcid(0))));
    assert_eq!(write_cr(&mut cpu, &mut env, 3, 1 << 63), Err(Stop::gp(0)));
    assert_eq!(write_cr(&mut cpu, &mut env, 3, 1 << 46), Err(Stop::gp(0)));
    let pcid = CR4_PAE | CR4_PCIDE;
    assert_eq!(
        write_cr(&mut cpu, &mut env, 4, pcid),
        Err(Stop::gp(0)),
        "CR3 low bits"
    );
    write_cr(&mut cpu, &mut env, 3, 0x5000).unwrap();
    write_cr(&mut cpu, &mut env, 4, pcid).unwrap();
    env.flushes.clear();
    write_cr(&mut cpu, &mut env, 3, 0x5007).unwrap();
    write_cr(&mut cpu, &mut env, 3, 1 << 63 | 0x6008).unwrap();
    assert_eq!(
        (cpu.cr3, env.flushes.as_slice()),
        (0x6008, &[Flush::Pcid(7)][..])
    );
    let off = CR0_PE | CR0_ET;
    assert_eq!(
        write_cr(&mut cpu, &mut env, 0, off),
        Err(Stop::gp(0)),
        "PCIDE needs paging"
    );
}

#[test]
fn cr4_cr8_and_moves() {
    let (mut cpu, mut env) = long_mode();
    assert_eq!(write_cr(&mut cpu, &mut env, 4, 1 << 40), Err(Stop::gp(0)));
    write_cr(&mut cpu, &mut env, 4, CR4_PAE | CR4_PGE).unwrap();
    assert_eq!(env.flushes, [Flush::All]);
    assert_eq!(write_cr(&mut cpu, &mut env, 8, 16), Err(Stop::gp(0)));
    cpu.gpr[0] = 7;
    exec(&mut cpu, &mut env, &[0x44, 0x0f, 0x22, 0xc0]).unwrap(); // mov cr8, rax
    assert_eq!((env.cr8, cpu.rip), (7, CODE + 4));
    exec(&mut cpu, &mut env, &[0x0f, 0x20, 0xe3]).unwrap(); // mov rbx, cr4
    assert_eq!(cpu.gpr[3], CR4_PAE | CR4_PGE);
}

#[test]
fn debug_registers() {
    let (mut cpu, mut env) = long_mode();
    cpu.gpr[0] = 1 << 32;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x23, 0xf8]),
        Err(Stop::gp(0))
    ); // mov dr7, rax
    cpu.gpr[0] = 0x2000;
    exec(&mut cpu, &mut env, &[0x0f, 0x23, 0xf8]).unwrap();
    assert_eq!(cpu.dr7, 0x2400);
    let detect = Err(Stop::Exception(Exception {
        vector: 1,
        error: None,
        payload: 1 << 13,
    }));
    assert_eq!(exec(&mut cpu, &mut env, &[0x0f, 0x21, 0xc3]), detect); // mov rbx, dr0
    cpu.dr7 = 0x400;
    exec(&mut cpu, &mut env, &[0x0f, 0x21, 0xe3]).unwrap(); // mov rbx, dr4
    assert_eq!(cpu.gpr[3], 0xffff_0ff0);
    cpu.cr4 |= CR4_DE;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x21, 0xe3]),
        Err(Stop::ud())
    );
    cpu.cpl = 3;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x21, 0xc3]),
        Err(Stop::gp(0))
    );
}

#[test]
fn tables_and_umip() {
    let (mut cpu, mut env) = long_mode();
    env.w16(0x100, 0x1ff);
    env.w64(0x102, 0xffff_8000_0000_1000);
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0x14, 0x25, 0, 1, 0, 0]).unwrap(); // lgdt [0x100]
    assert_eq!(
        (cpu.gdtr.base, cpu.gdtr.limit),
        (0xffff_8000_0000_1000, 0x1ff)
    );
    env.w64(0x102, 0x0f00_0000_0000_0000);
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x01, 0x1c, 0x25, 0, 1, 0, 0]),
        Err(Stop::gp(0))
    );
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0x04, 0x25, 0, 2, 0, 0]).unwrap(); // sgdt [0x200]
    assert_eq!(
        (env.r16(0x200), env.r64(0x202)),
        (0x1ff, 0xffff_8000_0000_1000)
    );
    cpu.cpl = 3;
    cpu.cr4 |= CR4_UMIP;
    for bytes in [
        &[0x0f, 0x01, 0x04, 0x25, 0, 2, 0, 0][..], // sgdt
        &[0x0f, 0x01, 0x0c, 0x25, 0, 2, 0, 0],     // sidt
        &[0x0f, 0x00, 0xc0],                       // sldt eax
        &[0x0f, 0x00, 0xc8],                       // str eax
        &[0x0f, 0x01, 0xe0],                       // smsw eax
    ] {
        assert_eq!(
            exec(&mut cpu, &mut env, bytes),
            Err(Stop::gp(0)),
            "{bytes:02x?}"
        );
    }
    // 16-bit operand size: a 24-bit base.
    let (mut cpu, mut env) = real();
    env.w16(0x100, 0x27);
    env.w32(0x102, 0xff12_3456);
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0x16, 0, 1]).unwrap();
    assert_eq!(cpu.gdtr.base, 0x12_3456);
    exec(&mut cpu, &mut env, &[0x66, 0x0f, 0x01, 0x16, 0, 1]).unwrap();
    assert_eq!(cpu.gdtr.base, 0xff12_3456);
}

#[test]
fn machine_status_word() {
    let (mut cpu, mut env) = real();
    cpu.gpr[0] = 0xffff_000e;
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xf0]).unwrap(); // lmsw ax
    assert_eq!(cpu.cr0 & 0xf, 0xe);
    cpu.gpr[0] = 1;
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xf0]).unwrap();
    cpu.gpr[0] = 0;
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xf0]).unwrap();
    assert_eq!(cpu.cr0 & 0xf, 1, "LMSW cannot leave protected mode");
    cpu.cr0 |= CR0_TS;
    exec(&mut cpu, &mut env, &[0x0f, 0x06]).unwrap();
    assert_eq!(cpu.cr0 & CR0_TS, 0);
}

#[test]
fn privileged_at_cpl_3() {
    for bytes in [
        &[0xf4][..],                           // hlt
        &[0x0f, 0x30],                         // wrmsr
        &[0x0f, 0x32],                         // rdmsr
        &[0x0f, 0x06],                         // clts
        &[0x0f, 0x08],                         // invd
        &[0x0f, 0x09],                         // wbinvd
        &[0x0f, 0x01, 0xf8],                   // swapgs
        &[0x0f, 0x01, 0x3c, 0x25, 0, 0, 0, 0], // invlpg
        &[0x0f, 0x01, 0xf0],                   // lmsw
        &[0x0f, 0x20, 0xc0],                   // mov rax, cr0
        &[0xfa],                               // cli
        &[0xfb],                               // sti
        &[0x0f, 0x33],                         // rdpmc
    ] {
        let (mut cpu, mut env) = long_mode();
        to_user(&mut cpu, &mut env, UCS64);
        let before = visible(&cpu);
        assert_eq!(
            exec(&mut cpu, &mut env, bytes),
            Err(Stop::gp(0)),
            "{bytes:02x?}"
        );
        assert_eq!(visible(&cpu), before);
    }
}

#[test]
fn undefined_instructions() {
    for bytes in [
        &[0x0f, 0xaa][..],         // rsm
        &[0x0f, 0x01, 0xc2],       // vmlaunch
        &[0x0f, 0x01, 0xd8],       // vmrun
        &[0x0f, 0x01, 0xd0],       // xgetbv without OSXSAVE
        &[0xf3, 0x0f, 0xae, 0xc0], // rdfsbase without CR4.FSGSBASE
    ] {
        let (mut cpu, mut env) = long_mode();
        assert_eq!(
            exec(&mut cpu, &mut env, bytes),
            Err(Stop::ud()),
            "{bytes:02x?}"
        );
    }
}

#[test]
fn interrupt_flag() {
    let (mut cpu, mut env) = long_mode();
    exec(&mut cpu, &mut env, &[0xfb]).unwrap();
    assert_eq!((cpu.rflags & IF, cpu.shadow), (IF, shadow::STI));
    cpu.shadow = 0;
    exec(&mut cpu, &mut env, &[0xfb]).unwrap();
    assert_eq!(cpu.shadow, 0, "IF was set already");
    exec(&mut cpu, &mut env, &[0xfa]).unwrap();
    assert_eq!(cpu.rflags & IF, 0);
    // PVI at CPL 3.
    let (mut cpu, mut env) = protected();
    to_user(&mut cpu, &mut env, UCS32);
    cpu.cr4 |= CR4_PVI;
    exec(&mut cpu, &mut env, &[0xfb]).unwrap();
    assert_eq!(cpu.rflags & (IF | VIF), VIF);
    cpu.rflags |= VIP;
    assert_eq!(exec(&mut cpu, &mut env, &[0xfb]), Err(Stop::gp(0)));
    exec(&mut cpu, &mut env, &[0xfa]).unwrap();
    assert_eq!(cpu.rflags & VIF, 0);
}

#[test]
fn pushf_and_popf() {
    let (mut cpu, mut env) = long_mode();
    cpu.rflags = RF | IF | 2;
    exec(&mut cpu, &mut env, &[0x9c]).unwrap();
    assert_eq!((env.r64(STACK - 8), cpu.gpr[gpr::RSP]), (IF | 2, STACK - 8));
    env.w64(STACK - 8, u64::MAX);
    exec(&mut cpu, &mut env, &[0x9d]).unwrap();
    assert_eq!(cpu.rflags, ALL_FLAGS & !(RF | VM | VIF | VIP) | 2);
    // CPL 3, IOPL 0: IF and IOPL stay.
    cpu.rflags = 2;
    cpu.cpl = 3;
    assert_eq!(popf_flags(&cpu, u64::MAX, 8).unwrap() & (IF | IOPL), 0);
    cpu.rflags |= IOPL;
    assert_eq!(popf_flags(&cpu, IF, 8).unwrap(), IF | IOPL | 2);
    // 16-bit POPF leaves the upper half.
    cpu.rflags = AC | 2;
    assert_eq!(popf_flags(&cpu, 0, 2).unwrap(), AC | 2);
    // V86 mode.
    let (mut cpu, _) = v86();
    assert_eq!(pushf_image(&cpu, 2), Err(Stop::gp(0)));
    cpu.cr4 |= CR4_VME;
    cpu.rflags |= VIF;
    assert_eq!(pushf_image(&cpu, 2).unwrap() & 0xffff, IF | IOPL | 2);
    assert_eq!(popf_flags(&cpu, 0, 2).unwrap() & (VIF | VM), VM);
    assert_eq!(popf_flags(&cpu, TF, 2), Err(Stop::gp(0)));
    cpu.rflags |= VIP;
    assert_eq!(popf_flags(&cpu, IF, 2), Err(Stop::gp(0)));
}

#[test]
fn msrs_and_cpuid() {
    let (mut cpu, mut env) = long_mode();
    cpu.gpr[gpr::RCX] = 0x1b;
    cpu.gpr[gpr::RAX] = 0xffff_ffff_1111_1111;
    cpu.gpr[gpr::RDX] = 0x2222_2222;
    exec(&mut cpu, &mut env, &[0x0f, 0x30]).unwrap();
    assert_eq!(env.msrs[&0x1b], 0x2222_2222_1111_1111);
    exec(&mut cpu, &mut env, &[0x0f, 0x32]).unwrap();
    assert_eq!(
        (cpu.gpr[gpr::RAX], cpu.gpr[gpr::RDX]),
        (0x1111_1111, 0x2222_2222)
    );
    cpu.gpr[gpr::RCX] = 0xdead;
    let before = cpu.rip;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x30]),
        Err(Stop::Exit(Exit::UserSpace))
    );
    assert_eq!(cpu.rip, before);
    cpu.gpr[gpr::RAX] = 5;
    exec(&mut cpu, &mut env, &[0x0f, 0xa2]).unwrap();
    assert_eq!((cpu.gpr[gpr::RAX], cpu.gpr[gpr::RBX]), (5, 0xdead));
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xc1]).unwrap(); // vmcall
    assert_eq!(env.hypercalls, 1);
}

#[test]
fn time() {
    let (mut cpu, mut env) = long_mode();
    env.tsc = 0x1_0000_0002;
    cpu.tsc_aux = 9;
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xf9]).unwrap(); // rdtscp
    assert_eq!((cpu.gpr[0], cpu.gpr[2], cpu.gpr[1]), (2, 1, 9));
    cpu.cr4 |= CR4_TSD;
    cpu.cpl = 3;
    assert_eq!(exec(&mut cpu, &mut env, &[0x0f, 0x31]), Err(Stop::gp(0)));
    exec(&mut cpu, &mut env, &[0xf3, 0x0f, 0xc7, 0xf8]).unwrap(); // rdpid rax
    assert_eq!(cpu.gpr[0], 9);
}

#[test]
fn extended_control_register() {
    let (mut cpu, mut env) = long_mode();
    cpu.cr4 |= CR4_OSXSAVE;
    cpu.gpr[gpr::RCX] = 0;
    cpu.gpr[gpr::RDX] = 0;
    for (value, ok) in [
        (7, true),
        (3, true),
        (1, true),
        (0, false),
        (2, false),
        (5, false),
        (0x27, false),
        (0xe7, true),
        (0xe3, false),
        (0x207, false),
    ] {
        cpu.gpr[gpr::RAX] = value;
        assert_eq!(
            exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xd1]).is_ok(),
            ok,
            "{value:#x}"
        );
    }
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xd0]).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0xe7);
    cpu.gpr[gpr::RCX] = 2;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xd0]),
        Err(Stop::gp(0))
    );
}

#[test]
fn segment_bases() {
    let (mut cpu, mut env) = long_mode();
    cpu.cr4 |= CR4_FSGSBASE;
    cpu.gpr[0] = 0x7fff_0000_0000;
    exec(&mut cpu, &mut env, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]).unwrap(); // wrfsbase rax
    assert_eq!(cpu.seg[sreg::FS].base, 0x7fff_0000_0000);
    exec(&mut cpu, &mut env, &[0xf3, 0x48, 0x0f, 0xae, 0xc3]).unwrap(); // rdfsbase rbx
    assert_eq!(cpu.gpr[3], 0x7fff_0000_0000);
    cpu.gpr[0] = 1 << 47;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0xf3, 0x48, 0x0f, 0xae, 0xd8]),
        Err(Stop::gp(0))
    );
    cpu.kernel_gs_base = 0x1234;
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xf8]).unwrap();
    assert_eq!((cpu.seg[sreg::GS].base, cpu.kernel_gs_base), (0x1234, 0));
}

#[test]
fn halting_retires() {
    let (mut cpu, mut env) = long_mode();
    cpu.shadow = shadow::STI;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0xf4]),
        Err(Stop::Exit(Exit::Hlt))
    );
    assert_eq!((cpu.rip, cpu.shadow), (CODE + 1, 0));
}

#[test]
fn invalidations() {
    let (mut cpu, mut env) = long_mode();
    cpu.cr4 |= CR4_PCIDE;
    cpu.gpr[0] = 0xffff_8000_1234_5678;
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0x38]).unwrap(); // invlpg [rax]
    assert_eq!(env.flushes.pop(), Some(Flush::Page(0xffff_8000_1234_5678)));
    cpu.gpr[0] = 1 << 47;
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0x38]).unwrap();
    assert!(env.flushes.is_empty());
    env.w64(0x100, 5);
    env.w64(0x108, 0x4000);
    for (kind, want) in [
        (0, Some(Flush::PcidPage(5, 0x4000))),
        (1, Some(Flush::Pcid(5))),
        (2, Some(Flush::All)),
        (3, Some(Flush::NonGlobal)),
        (4, None),
    ] {
        cpu.gpr[0] = kind;
        let bytes = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0, 1, 0, 0]; // invpcid rax, [0x100]
        assert_eq!(exec(&mut cpu, &mut env, &bytes).is_ok(), want.is_some());
        assert_eq!(env.flushes.pop(), want);
    }
    env.w64(0x100, 0x1000);
    cpu.gpr[0] = 2;
    let bytes = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0, 1, 0, 0];
    assert_eq!(exec(&mut cpu, &mut env, &bytes), Err(Stop::gp(0)));
}

#[test]
fn port_permissions() {
    let (mut cpu, mut env) = protected();
    assert_eq!(io_allowed(&cpu, &mut env, 0x80, 1), Ok(()));
    to_user(&mut cpu, &mut env, UCS32);
    env.w16(TSS + 102, 0x68);
    // The bitmap covers ports 0-0xff; port 9 is closed. The byte behind it must exist, too.
    env.write(TSS + 0x68, &[0; 0x21]);
    env.write(TSS + 0x68 + 1, &[2]);
    assert_eq!(io_allowed(&cpu, &mut env, 0x08, 1), Ok(()));
    assert_eq!(io_allowed(&cpu, &mut env, 0x09, 1), Err(Stop::gp(0)));
    assert_eq!(io_allowed(&cpu, &mut env, 0x06, 4), Err(Stop::gp(0)));
    assert_eq!(io_allowed(&cpu, &mut env, 0x05, 4), Ok(()));
    assert_eq!(io_allowed(&cpu, &mut env, 0xff, 1), Ok(()));
    assert_eq!(io_allowed(&cpu, &mut env, 0x108, 1), Err(Stop::gp(0)));
    cpu.rflags |= IOPL;
    assert_eq!(io_allowed(&cpu, &mut env, 0x09, 1), Ok(()));
    cpu.rflags |= VM;
    assert_eq!(
        io_allowed(&cpu, &mut env, 0x09, 1),
        Err(Stop::gp(0)),
        "V86 ignores IOPL"
    );
}

#[test]
fn smap_flag_instructions() {
    let (mut cpu, mut env) = long_mode();
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xcb]).unwrap(); // stac
    assert_eq!(cpu.rflags & AC, AC);
    exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xca]).unwrap(); // clac
    assert_eq!(cpu.rflags & AC, 0);
    cpu.cpl = 3;
    assert_eq!(
        exec(&mut cpu, &mut env, &[0x0f, 0x01, 0xcb]),
        Err(Stop::ud())
    );
}
