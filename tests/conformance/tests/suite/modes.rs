//! Changes of mode, tasks, gates, system calls.

use conformance::asm::*;
use conformance::layout::*;
use conformance::machine::assemble;
use conformance::tables::*;
use conformance::{Machine, asm, each};
use iced_x86::code_asm::*;

/// A far jump to a 16:32 pointer, in 32-bit code.
fn jump_far(a: &mut CodeAssembler, selector: u16, offset: u64) {
    if a.bitness() == 16 {
        asm!(a; db(&[0x66]););
    }
    asm!(a; db(&[0xea]); dd(&[offset as u32]); dw(&[selector]););
}

fn load_segments(a: &mut CodeAssembler, selector: u16) {
    if a.bitness() == 16 {
        asm!(a; mov(ax, u32::from(selector)); mov(ds, ax); mov(es, ax); mov(ss, ax););
    } else {
        asm!(a; mov(eax, u32::from(selector)); mov(ds, eax); mov(es, eax); mov(ss, eax););
    }
}

#[test]
fn through_all_modes_and_back() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        let pae = m.more_tables(Paging::Pae);
        m.fill(&pae, Paging::Pae);
        let report16 = |a: &mut CodeAssembler, n: u32| {
            asm!(a; mov(eax, n); out(u32::from(PORT_REPORT), eax););
        };
        m.memory.write(REAL + 0x700, &GDT_LIMIT.to_le_bytes());
        m.memory.write(REAL + 0x702, &(GDT as u32).to_le_bytes());
        // Twice around, counted in EDI.
        m.load(REAL, 16, |a| {
            asm!(a; xor(edi, edi););
            jump_near(a, REAL + 0x40);
        });
        m.load(REAL + 0x40, 16, |a| {
            report16(a, 1);
            asm!(a; xor(ax, ax); mov(ds, ax); mov(ss, ax); mov(sp, 0x7000););
            asm!(a; db(&[0x66, 0x0f, 0x01, 0x16]); dw(&[(REAL + 0x700) as u16]););
            asm!(a; mov(eax, cr0); or(al, 1); mov(cr0, eax););
            // Still 16 bits, protected.
            jump_far(a, CODE16, REAL + 0x100);
        });
        m.load(REAL + 0x100, 16, |a| {
            load_segments(a, DATA16);
            report16(a, 2);
            jump_far(a, CODE32, REAL + 0x180);
        });
        m.load(REAL + 0x180, 32, |a| {
            load_segments(a, KDATA);
            asm!(a; mov(esp, STACK as u32););
            report_value(a, 3);
            set_cr(a, cr3, pae.root);
            set_cr(a, cr4, 0x620);
            set_cr(a, cr0, 0x8001_0033);
            asm!(a; mov(eax, dword_ptr(0x40_0000)););
            report_value(a, 4);
            set_cr(a, cr0, 0x1_0033);
            set_cr(a, cr3, t.root);
            wrmsr(a, 0xc000_0080, 0x900);
            set_cr(a, cr0, 0x8001_0033);
            // Compatibility mode.
            asm!(a; mov(ecx, 0xc000_0080u32); rdmsr(););
            report(a);
            jump_far(a, CODE, ENTRY);
        });
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(rax, 0x1_0000_0005u64); mov(r8, rax); shr(rax, 32); add(eax, 4););
            report(a);
            // To compatibility mode and back, by far returns.
            let mut back = a.create_label();
            asm!(a;
                lea(rax, ptr(back));
                push(i32::from(CODE32));
                push(SECOND as i32);
                db(&[0x48, 0xcb]);
                set_label(&mut back);
                mov(rax, r8);
            );
            report(a);
            asm!(a; push(i32::from(CODE32)); push((SECOND + 0x100) as i32); db(&[0x48, 0xcb]););
        });
        m.load(SECOND, 32, |a| {
            // 40h is INC EAX here, and the high half of a register is not seen.
            asm!(a; push(eax); mov(eax, 6); dec(eax); inc(eax););
            report(a);
            asm!(a; pop(eax); push(u32::from(CODE)); push(eax); retf(););
        });
        m.load(SECOND + 0x100, 32, |a| {
            set_cr(a, cr0, 0x1_0033);
            wrmsr(a, 0xc000_0080, 0);
            set_cr(a, cr4, 0);
            report_value(a, 7);
            jump_far(a, CODE16, REAL + 0x400);
        });
        m.load(REAL + 0x400, 16, |a| {
            load_segments(a, DATA16);
            asm!(a; mov(eax, cr0); and(al, 0xfe); mov(cr0, eax););
            asm!(a; db(&[0xea]); dw(&[(REAL + 0x440) as u16, 0]););
        });
        m.load(REAL + 0x440, 16, |a| {
            report16(a, 8);
            asm!(a; inc(edi); cmp(edi, 2););
            let mut done = a.create_label();
            asm!(a; je(done););
            jump_near(a, REAL + 0x40);
            asm!(a; set_label(&mut done); out(u32::from(PORT_END), al););
        });
        let mut v = m.real();
        let once = [1, 2, 3, 4, 0xd00, 5, 6, 5, 7, 8];
        let got = m.finish(&mut v);
        assert_eq!(got, [once, once].concat());
    });
}

fn jump_near(a: &mut CodeAssembler, to: u64) {
    asm!(a; jmp(to););
}

#[test]
fn unreal_mode() {
    each(|engine| {
        let m = Machine::new(engine);
        m.memory.write(REAL + 0x700, &GDT_LIMIT.to_le_bytes());
        m.memory.write(REAL + 0x702, &(GDT as u32).to_le_bytes());
        m.memory.set_u32(0x20_0000, 0x4321);
        m.set_real_vector(13, (REAL + 0x300) as u16);
        m.load(REAL, 16, |a| {
            asm!(a;
                xor(ax, ax); mov(ds, ax); mov(ss, ax);
                mov(ebx, 0x20_0000);
                mov(eax, dword_ptr(ebx)); // Beyond the limit: vector 13.
                db(&[0x66, 0x0f, 0x01, 0x16]); dw(&[(REAL + 0x700) as u16]);
                mov(eax, cr0); or(al, 1); mov(cr0, eax);
                mov(cx, u32::from(KDATA)); mov(ds, cx);
                and(al, 0xfe); mov(cr0, eax);
                xor(ax, ax); mov(ds, ax); // The limit stays.
                mov(eax, dword_ptr(ebx));
            );
            report(a);
            end(a);
        });
        m.load(REAL + 0x300, 16, |a| {
            asm!(a; mov(eax, 13););
            report(a);
            // MOV EAX, [EBX] has four bytes: 67 66 8B 03.
            asm!(a; mov(bp, sp); add(word_ptr(bp + 0), 4); iret(););
        });
        let mut v = m.real();
        assert_eq!(m.finish(&mut v), [13, 0x4321]);
    });
}

#[test]
fn virtual_8086() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Legacy);
        m.fill(&t, Paging::Legacy);
        // The V86 program is at 0x80000: user pages.
        m.memory.write(TSS, &[0; 0x68]);
        m.memory.write(TSS + 4, &(RSP0 as u32).to_le_bytes());
        m.memory.write(TSS + 8, &u32::from(KDATA).to_le_bytes());
        m.memory.write(TSS + 0x66, &0x68u16.to_le_bytes());
        m.load(ENTRY, 32, |a| {
            for s in [0x8000u32, 0x8100, 0x8200, 0x8300] {
                asm!(a; push(s);); // GS, FS, DS, ES
            }
            asm!(a;
                push(0x9000); // SS
                push(0xff0); // SP
                push(0x2_0002); // VM, IOPL 0
                push(0x8000); // CS
                push(0x10); // IP
                iretd();
            );
        });
        m.memory.write(
            SECOND + 0x10,
            &assemble(0x10, 16, |a| {
                asm!(a;
                    mov(ax, ds);
                    mov(word_ptr(0x500), ax); // DS is 8200: linear 82500
                    mov(ax, es);
                    mov(word_ptr(0x502).ss(), ax); // 90502
                    push(0x1234);
                    nop();
                    cli(); // #GP: IOPL 0
                );
            }),
        );
        // #GP of V86 mode: report the frame and end.
        m.load(0x1_8000, 32, |a| {
            for offset in [0, 4, 8, 12, 16, 20, 24, 28, 32, 36] {
                asm!(a; mov(eax, dword_ptr(esp + offset)););
                report(a);
            }
            asm!(a; mov(ax, ds); movzx(eax, ax););
            report(a);
            end(a);
        });
        m.memory
            .set_u64(IDT32 + 8 * 13, gate(CODE32, 0x1_8000, 0x8e, 0));
        let mut v = m.protected(Some(Paging::Legacy));
        let got = m.finish(&mut v);
        let ip = got[1];
        assert_eq!(m.memory.read(SECOND + u64::from(ip), 1), [0xfa]);
        assert_eq!(got[0], 0);
        assert_eq!(
            got[2..],
            [
                0x8000, 0x3_0002, 0xfee, 0x9000, 0x8300, 0x8200, 0x8100, 0x8000, 0
            ]
        );
        assert_eq!(m.memory.u32(0x8_2500) & 0xffff, 0x8200);
        assert_eq!(m.memory.u32(0x9_0500) >> 16, 0x8300);
    });
}

#[test]
fn system_calls() {
    each(|engine| {
        let m = Machine::new(engine);
        let handler = 0x1_8000;
        m.load(ENTRY, 64, |a| {
            wrmsr(a, 0xc000_0081, 0x0023_0008_0000_0000);
            wrmsr(a, 0xc000_0082, handler);
            wrmsr(a, 0xc000_0083, handler + 0x100);
            wrmsr(a, 0xc000_0084, 0x400); // DF
            call_user(a, SECOND, USER_STACK, 0x3402);
            // Without SCE it is an invalid instruction.
            wrmsr(a, 0xc000_0080, 0xd00);
            attempt(a, |a| asm!(a; syscall(); ));
            end(a);
        });
        m.load(SECOND, 64, |a| {
            asm!(a; mov(eax, 1); syscall(););
            report(a);
            asm!(a; mov(ax, cs); movzx(eax, ax););
            report(a);
            asm!(a; mov(ax, ss); movzx(eax, ax););
            report(a);
            asm!(a; pushfq(); pop(rax););
            report(a);
            attempt(a, |a| asm!(a; db(&[0x48, 0x0f, 0x07]); )); // SYSRET at CPL 3
            asm!(a; int(0x80););
        });
        m.load(handler, 64, |a| {
            asm!(a; add(eax, 0x10); mov(rdx, rcx););
            report(a);
            asm!(a; mov(ax, cs); movzx(eax, ax););
            report(a);
            asm!(a; pushfq(); pop(rax););
            report(a);
            asm!(a; mov(rax, r11););
            report(a);
            asm!(a; mov(rcx, rdx); mov(eax, 0x99); sysretq(););
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(
            m.finish(&mut v),
            [0x11, 8, 0x3006, 0x3402, 0x99, 0x33, 0x2b, 0x3402]
        );
        assert_eq!(m.vectors(), [(13, 0), (6, 0)]);
    });
}

#[test]
fn sysenter_in_32_bits() {
    each(|engine| {
        let m = Machine::new(engine);
        let handler = 0x1_8000;
        // SYSEXIT takes what is 16 and 24 above: not used afterwards, but by selectors.
        m.load(ENTRY, 32, |a| {
            attempt(a, |a| asm!(a; sysenter(); )); // MSR 174h is 0.
            wrmsr(a, 0x174, u64::from(CODE32));
            wrmsr(a, 0x175, STACK - 0x200);
            wrmsr(a, 0x176, handler);
            asm!(a; mov(eax, 5); sysenter(););
        });
        m.load(handler, 32, |a| {
            report(a);
            asm!(a; mov(ax, cs); movzx(eax, ax););
            report(a);
            asm!(a; mov(eax, esp););
            report(a);
            asm!(a; mov(edx, SECOND as u32); mov(ecx, USER_STACK as u32); sysexit(););
        });
        m.load(SECOND, 32, |a| {
            attempt(a, |a| asm!(a; cli(); ));
            end(a);
        });
        // The handler needs a 32-bit TSS for its stack.
        m.memory.write(TSS, &[0; 0x68]);
        m.memory.write(TSS + 4, &(RSP0 as u32).to_le_bytes());
        m.memory.write(TSS + 8, &u32::from(KDATA).to_le_bytes());
        // OUT at CPL 3 needs a bitmap that allows everything.
        m.memory.write(TSS + 0x66, &0x68u16.to_le_bytes());
        m.set_descriptor(TR, descriptor(TSS as u32, 0x88, 0x8b, 0));
        let mut v = m.protected(None);
        let mut s = v.sregs();
        s.tr.limit = 0x88 + 0x20;
        v.set_sregs(&s);
        m.memory.write(TSS + 0x68, &[0; 0x30]);
        let got = m.finish(&mut v);
        assert_eq!(got, [5, CODE32.into(), (STACK - 0x200) as u32]);
        let f = m.faults();
        // The last: what SYSEXIT made up cannot be returned to.
        let error = u64::from(CODE32 + 16);
        assert_eq!(m.vectors(), [(13, 0), (13, 0), (13, error)]);
        assert_eq!(f[1].cs, u64::from(CODE32 + 16) | 3);
        assert_eq!(
            (f[1].ss, f[1].rsp),
            (u64::from(CODE32 + 24) | 3, USER_STACK)
        );
    });
}

#[test]
fn tasks() {
    each(|engine| {
        let m = Machine::new(engine);
        let (one, two) = (FREE, FREE + 8);
        for (i, s) in [one, two].into_iter().enumerate() {
            let at = TSS32 + 0x100 * i as u64;
            m.memory.write(at, &[0; 0x100]);
            m.set_descriptor(s, descriptor(at as u32, 0x67, 0x89, 0));
            let field = |offset: u64, value: u32| m.memory.set_u32(at + offset, value);
            field(0x20, if i == 0 { 0 } else { SECOND as u32 }); // EIP
            field(0x24, 2);
            field(0x38, AP_STACKS as u32 + 0x2000); // ESP
            field(0x28, 0x55); // EAX
            for offset in [0x48, 0x50, 0x54, 0x58, 0x5c] {
                field(offset, KDATA.into());
            }
            field(0x4c, CODE32.into());
        }
        // A task gate for vector 0x40, and one in the GDT.
        m.memory.set_u64(IDT32 + 8 * 0x40, gate(two, 0, 0x85, 0));
        m.set_descriptor(FREE + 16, gate(two, 0, 0x85, 0));
        m.load(ENTRY, 32, |a| {
            asm!(a; mov(ax, u32::from(one)); ltr(ax); mov(eax, 1); mov(ebx, 0xbbbb););
            // Call, through the gate too, and interrupt.
            for selector in [two, FREE + 16] {
                asm!(a; db(&[0x9a]); dd(&[0]); dw(&[selector]););
                report(a);
            }
            asm!(a; int(0x40););
            asm!(a; mov(eax, ebx););
            report(a);
            asm!(a; mov(eax, cr0); and(eax, 8););
            report(a);
            // The busy one cannot be called.
            attempt(a, |a| asm!(a; db(&[0x9a]); dd(&[0]); dw(&[one]); ));
            end(a);
        });
        m.load(SECOND, 32, |a| {
            let top = here(a);
            report(a);
            asm!(a; pushfd(); pop(eax); and(eax, 0x4000);); // NT
            report(a);
            asm!(a; str(eax););
            report(a);
            asm!(a; clts(); mov(eax, 0x66); iretd(); jmp(top););
        });
        let mut v = m.protected(None);
        let got = m.finish(&mut v);
        let each = |first: u32| [first, 0x4000, u32::from(two)];
        let mut want = each(0x55).to_vec();
        want.push(1);
        want.extend(each(0x66));
        want.push(1);
        want.extend(each(0x66));
        want.extend([0xbbbb, 8]);
        assert_eq!(got, want);
        assert_eq!(m.vectors(), [(13, one.into())]);
        assert_eq!(
            m.memory.u32(TSS32 + 0x100) & 0xffff,
            u32::from(one),
            "the link"
        );
    });
}

#[test]
fn double_fault_task() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Legacy);
        m.fill(&t, Paging::Legacy);
        let (one, two) = (FREE, FREE + 8);
        for s in [one, two] {
            let at = TSS32 + if s == one { 0 } else { 0x100 };
            m.memory.write(at, &[0; 0x100]);
            m.set_descriptor(s, descriptor(at as u32, 0x67, 0x89, 0));
        }
        let at = TSS32 + 0x100;
        for (offset, value) in [
            (0x1c, t.root as u32),
            (0x20, SECOND as u32),
            (0x24, 2),
            (0x38, AP_STACKS as u32 + 0x2000),
            (0x4c, CODE32.into()),
            (0x48, KDATA.into()),
            (0x50, KDATA.into()),
            (0x54, KDATA.into()),
        ] {
            m.memory.set_u32(at + offset, value);
        }
        m.memory.set_u64(IDT32 + 8 * 8, gate(two, 0, 0x85, 0));
        m.load(ENTRY, 32, |a| {
            // A stack that is not there: the page fault cannot be delivered.
            asm!(a; mov(ax, u32::from(one)); ltr(ax); mov(esp, 0x5000_0000); push(eax););
        });
        m.load(SECOND, 32, |a| {
            asm!(a; pop(eax););
            report(a);
            asm!(a; mov(eax, esp););
            report(a);
            asm!(a; mov(eax, cr2););
            report(a);
            end(a);
        });
        let mut v = m.protected(Some(Paging::Legacy));
        let got = m.finish(&mut v);
        assert_eq!(got[..2], [0, AP_STACKS as u32 + 0x2000]);
        // Which word of the frame faults first is the processor's affair.
        assert!((0x4fff_fff0..0x5000_0000).contains(&got[2]), "{got:x?}");
        // What the old task was doing stands in its segment.
        assert_eq!(m.memory.u32(TSS32 + 0x38), 0x5000_0000);
    });
}

#[test]
fn call_gates() {
    each(|engine| {
        // 32 bits, with parameters, from user code to the kernel.
        let m = Machine::new(engine);
        m.memory.write(TSS, &[0; 0x68]);
        m.memory.write(TSS + 4, &(RSP0 as u32).to_le_bytes());
        m.memory.write(TSS + 8, &u32::from(KDATA).to_le_bytes());
        m.memory.write(TSS + 0x66, &0x68u16.to_le_bytes());
        let handler = 0x1_8000;
        m.set_descriptor(FREE, gate(CODE32, handler, 0xec, 2));
        m.set_descriptor(FREE + 8, gate(CODE32, handler, 0x8c, 0));
        m.load(ENTRY, 32, |a| {
            asm!(a;
                push(u32::from(USER_DATA));
                push(USER_STACK as u32);
                push(0x3002);
                push(u32::from(USER_CODE32));
                push(SECOND as u32);
                iretd();
            );
        });
        m.load(SECOND, 32, |a| {
            asm!(a; mov(eax, u32::from(USER_DATA)); mov(ds, eax); mov(es, eax););
            asm!(a; push(0x111); push(0x222); db(&[0x9a]); dd(&[0]); dw(&[FREE | 3]););
            asm!(a; mov(eax, esp););
            report(a);
            attempt(a, |a| asm!(a; db(&[0x9a]); dd(&[0]); dw(&[FREE + 8]); ));
            attempt(a, |a| asm!(a; db(&[0x9a]); dd(&[0]); dw(&[CODE32]); ));
            end(a);
        });
        m.load(handler, 32, |a| {
            for offset in [8, 12, 20] {
                asm!(a; mov(eax, dword_ptr(esp + offset)););
                report(a);
            }
            asm!(a; mov(eax, esp););
            report(a);
            asm!(a; mov(ax, cs); movzx(eax, ax););
            report(a);
            asm!(a; retf_1(8););
        });
        let mut v = m.protected(None);
        assert_eq!(
            m.finish(&mut v),
            [
                0x222,
                0x111,
                USER_DATA.into(),
                RSP0 as u32 - 24,
                CODE32.into(),
                USER_STACK as u32
            ]
        );
        assert_eq!(m.vectors(), [(13, (FREE + 8).into()), (13, CODE32.into())]);
    });
}
