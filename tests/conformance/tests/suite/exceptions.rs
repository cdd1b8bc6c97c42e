//! Exceptions: vectors, error codes, priorities, double and triple faults, debug.

use conformance::asm::*;
use conformance::layout::*;
use conformance::tables::*;
use conformance::{Machine, asm, each};
use iced_x86::code_asm::*;

const TF: i32 = 0x100;

#[test]
fn vectors_and_error_codes() {
    each(|engine| {
        let m = Machine::new(engine);
        m.set_gate(3, STUBS + 16 * 3, 3, 0);
        // A descriptor that is not present, and a gate that is not.
        m.set_descriptor(FREE, descriptor(0, 0xfffff, 0x13, 0xc));
        m.memory
            .set_u64(IDT + 16 * 0x90, gate(CODE, STUBS, 0x0e, 0));
        m.load(ENTRY, 64, |a| {
            attempt(a, |a| asm!(a; xor(edx, edx); xor(ecx, ecx); div(ecx); ));
            attempt(a, |a| asm!(a; mov(eax, i32::MIN as u32); mov(edx, -1); mov(ecx, -1); idiv(ecx); ));
            attempt(a, |a| asm!(a; int3(); ));
            attempt(a, |a| asm!(a; db(&[0xcd, 3]); ));
            attempt(a, |a| asm!(a; ud2(); ));
            attempt(a, |a| asm!(a; db(&[0x06]); )); // PUSH ES
            attempt(a, |a| asm!(a; mov(eax, u32::from(FREE)); mov(ds, eax); ));
            attempt(a, |a| asm!(a; mov(eax, u32::from(FREE)); mov(ss, eax); ));
            attempt(a, |a| asm!(a; mov(eax, 0x1000); mov(ds, eax); ));
            attempt(a, |a| asm!(a; mov(eax, u32::from(CODE32)); mov(ss, eax); ));
            attempt(a, |a| asm!(a; mov(eax, 0x14); mov(ds, eax); )); // LDT: none
            attempt(a, |a| asm!(a; int(0x90); ));
            attempt(a, |a| asm!(a; mov(ecx, 0x1234_5678); rdmsr(); ));
            attempt(a, |a| asm!(a; mov(ecx, 0x1234_5678); wrmsr(); ));
            // A null selector for CS.
            attempt(a, |a| asm!(a; push(0); push(0x10); iretq(); ));
            // x87 with TS: #NM.
            or_cr(a, cr0, 8);
            attempt(a, |a| asm!(a; fld1(); ));
            attempt(a, |a| asm!(a; addps(xmm0, xmm1); ));
            asm!(a; clts(););
            or_cr(a, cr0, 4); // EM
            attempt(a, |a| asm!(a; addps(xmm0, xmm1); ));
            attempt(a, |a| asm!(a; fld1(); ));
            clear_cr(a, cr0, 4);
            clear_cr(a, cr4, 0x200);
            attempt(a, |a| asm!(a; addps(xmm0, xmm1); ));
            or_cr(a, cr4, 0x200);
            // #MF: unmasked division by zero, at the next x87 instruction.
            asm!(a;
                fninit();
                mov(word_ptr(DATA), 0x037b);
                fldcw(word_ptr(DATA));
                fld1();
                fldz();
                fdivp(st1, st0);
            );
            attempt(a, |a| asm!(a; db(&[0x9b]); ));
            asm!(a; fninit(););
            // #XM, and without OSXMMEXCPT #UD.
            asm!(a; mov(dword_ptr(DATA), 0x1d80); ldmxcsr(dword_ptr(DATA)); xorps(xmm0, xmm0); mov(eax, 1); cvtsi2ss(xmm1, eax););
            attempt(a, |a| asm!(a; divss(xmm1, xmm0); ));
            clear_cr(a, cr4, 0x400);
            attempt(a, |a| asm!(a; divss(xmm1, xmm0); ));
            or_cr(a, cr4, 0x400);
            asm!(a; mov(dword_ptr(DATA), 0x1f80); ldmxcsr(dword_ptr(DATA)););
            // Alignment of SSE operands.
            attempt(a, |a| asm!(a; movaps(xmm0, xmmword_ptr(DATA + 4)); ));
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        m.finish(&mut v);
        let faults = m.vectors();
        let want: Vec<(u64, u64)> = vec![
            (0, 0),
            (0, 0),
            (3, 0),
            (3, 0),
            (6, 0),
            (6, 0),
            (11, FREE.into()),
            (12, FREE.into()),
            (13, 0x1000),
            (13, CODE32.into()),
            (13, 0x14),
            (11, 0x90 << 3 | 2),
            (13, 0),
            (13, 0),
        ];
        assert_eq!(faults[..want.len()], want, "{faults:x?}");
        assert_eq!(faults[want.len()], (13, 0));
        let rest: Vec<u64> = faults[want.len() + 1..].iter().map(|f| f.0).collect();
        assert_eq!(rest, [7, 7, 6, 7, 6, 16, 19, 6, 13]);
    });
}

#[test]
fn in_user_mode() {
    each(|engine| {
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            or_cr(a, cr0, 1 << 18); // AM
            call_user(a, SECOND, USER_STACK, 0x4_0002); // AC
            end(a);
        });
        m.load(SECOND, 64, |a| {
            attempt(a, |a| asm!(a; hlt(); ));
            attempt(a, |a| asm!(a; cli(); ));
            attempt(a, |a| asm!(a; mov(rax, cr0); ));
            attempt(a, |a| asm!(a; in_(al, 0x60); ));
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(SECOND + 0x801)); ));
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(SECOND + 0x800)); ));
            attempt(a, |a| asm!(a; int(0x20); )); // DPL 0
            attempt(a, |a| asm!(a; db(&[0xf1]); )); // INT1 ignores the DPL.
            attempt(a, |a| asm!(a; mov(eax, u32::from(KDATA)); mov(ds, eax); ));
            attempt(a, |a| asm!(a; invlpg(byte_ptr(rax)); ));
            attempt(a, |a| asm!(a; rdmsr(); ));
            attempt(a, |a| asm!(a; wbinvd(); ));
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(ENTRY)); ));
            // Misaligned and not mapped: the page fault goes first only if... the alignment does.
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(0x5000_0001u64)); ));
            attempt(a, |a| asm!(a; push(0); popfq(); )); // AC away, IOPL 0: no fault.
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(SECOND + 0x801)); ));
            asm!(a; int(0x80););
        });
        let mut v = m.long(0, ENTRY);
        m.finish(&mut v);
        let got = m.vectors();
        let want: Vec<(u64, u64)> = vec![
            (13, 0),
            (13, 0),
            (13, 0),
            (13, 0),
            (17, 0),
            (13, 0x20 << 3 | 2),
            (1, 0),
            (13, KDATA.into()),
            (13, 0),
            (13, 0),
            (13, 0),
            (14, 5),
            (17, 0),
        ];
        // What comes first of #AC and #PF differs between processors: AMD and Intel check alignment
        // by linear address before the walk.
        assert_eq!(got, want);
        assert!(
            m.faults()
                .iter()
                .all(|f| f.ss == u64::from(USER_DATA) && f.cs == u64::from(USER_CODE))
        );
    });
}

#[test]
fn double_and_triple_faults() {
    each(|engine| {
        // #PF while delivering #PF: the stack of its interrupt stack table entry is not mapped.
        let m = Machine::new(engine);
        m.memory.write(TSS + 0x24, &0x5000_0000u64.to_le_bytes());
        m.set_gate(14, STUBS + 16 * 14, 0, 1);
        m.set_gate(8, STUBS + 16 * 8, 0, 2);
        m.load(ENTRY, 64, |a| {
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(0x6000_0000u64)); ));
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        m.finish(&mut v);
        assert_eq!(m.vectors(), [(8, 0)]);
        let fault = m.faults()[0];
        assert_eq!(fault.rsp, STACK);
        // Which word of the frame faults first is the processor's affair.
        assert!(
            (0x5000_0000 - 48..0x5000_0000).contains(&fault.cr2),
            "{fault:x?}"
        );
        drop(v);

        // #GP (no gate) for #DE: double fault. #GP for a benign #BP: a plain #GP.
        let m = Machine::new(engine);
        m.memory.set_u64(IDT, 0);
        m.memory.set_u64(IDT + 16 * 3, 0);
        m.load(ENTRY, 64, |a| {
            attempt(a, |a| asm!(a; xor(ecx, ecx); div(ecx); ));
            attempt(a, |a| asm!(a; int3(); ));
            attempt(a, |a| asm!(a; int(0); ));
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        m.finish(&mut v);
        let got = m.vectors();
        assert_eq!(got[0], (8, 0));
        assert_eq!(
            got[1..]
                .iter()
                .map(|f| f.0 == 13 || f.0 == 11)
                .collect::<Vec<_>>(),
            [true; 2]
        );
        drop(v);

        // And without a way to deliver the double fault, shutdown.
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(qword_ptr(DATA), 0); mov(qword_ptr(DATA + 8), 0); lidt(ptr(DATA)); ud2(););
        });
        let mut v = m.long(0, ENTRY);
        m.expect_shutdown(&mut v);
    });
}

#[test]
fn single_step() {
    each(|engine| {
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            let mut next = a.create_label();
            let mut over = a.create_label();
            asm!(a;
                lea(rsi, ptr(DATA));
                lea(rdi, ptr(DATA + 64));
                mov(ecx, 3);
                pushfq();
                or(dword_ptr(rsp), TF);
                popfq(); // The trap comes after the next instruction.
                nop();
                rep.movsb(); // After each iteration.
                mov(eax, u32::from(KDATA));
                mov(ss, eax); // No trap here,
                nop(); // but here.
                jmp(next);
                nop();
                set_label(&mut next);
                cpuid();
                syscall(); // Cleared by the flag mask; the trap comes by RFLAGS after it.
                set_label(&mut over);
                nop();
            );
            report_value(a, 1);
            end(a);
        });
        m.load(SECOND, 64, |a| {
            report_value(a, 2);
            end(a);
        });
        // #DB: records RIP and goes on.
        m.load(0x1_8000, 64, |a| {
            asm!(a;
                push(rax);
                push(rbx);
                mov(rbx, qword_ptr(DATA + 0x800));
                mov(rax, qword_ptr(rsp + 16));
                mov(qword_ptr(rbx * 8 + (DATA + 0x808) as i32), rax);
                inc(qword_ptr(DATA + 0x800));
                mov(rax, dr6);
                or(qword_ptr(DATA + 0x700), rax);
                pop(rbx);
                pop(rax);
                iretq();
            );
        });
        m.set_gate(1, 0x1_8000, 0, 0);
        let mut v = m.long(0, ENTRY);
        v.set_msrs(&[
            (0xc000_0081, 0x0023_0008_0000_0000),
            (0xc000_0082, SECOND),
            (0xc000_0084, 0x4_7700),
        ]);
        assert_eq!(m.finish(&mut v), [2]);
        let n = m.memory.u64(DATA + 0x800);
        let at: Vec<u64> = (0..n).map(|i| m.memory.u64(DATA + 0x808 + 8 * i)).collect();
        // Find the instructions by their bytes.
        let code = m.memory.read(ENTRY, 0x80);
        let rep = ENTRY
            + code
                .windows(2)
                .position(|w| w == [0xf3, 0xa4])
                .expect("rep movsb") as u64;
        let mov_ss = ENTRY
            + code
                .windows(2)
                .position(|w| w == [0x8e, 0xd0])
                .expect("mov ss") as u64;
        let cpuid = ENTRY
            + code
                .windows(2)
                .position(|w| w == [0x0f, 0xa2])
                .expect("cpuid") as u64;
        let want = [rep, rep, rep, rep + 2, mov_ss, mov_ss + 3, cpuid, cpuid + 2];
        assert_eq!(at, want, "{at:x?} {want:x?}");
        assert_ne!(m.memory.u64(DATA + 0x700) & 0x4000, 0, "DR6.BS");
    });
}

#[test]
fn breakpoints() {
    each(|engine| {
        let m = Machine::new(engine);
        m.load(SECOND, 64, |a| {
            asm!(a; nop(); nop(); ret(););
        });
        m.load(ENTRY, 64, |a| {
            // 0: execution at SECOND + 1; 1: writes of 4 bytes; 2: reads and writes of 8 bytes.
            asm!(a;
                mov(eax, SECOND as u32 + 1);
                mov(dr0, rax);
                mov(eax, DATA as u32 + 4);
                mov(dr1, rax);
                mov(eax, DATA as u32 + 16);
                mov(dr2, rax);
                // G0 to G2; breakpoint 1: writes, 4 bytes; 2: all, 8 bytes.
                mov(eax, (1 << 1 | 1 << 3 | 1 << 5 | 0x400 | 0b1101 << 20 | 0b1011 << 24));
                mov(dr7, rax);
            );
            for write in [
                DATA + 3,
                DATA + 7,
                DATA + 8,
                DATA + 16,
                DATA + 23,
                DATA + 24,
            ] {
                asm!(a; mov(byte_ptr(write), 1););
            }
            for read in [DATA + 4, DATA + 20] {
                asm!(a; mov(al, byte_ptr(read)););
            }
            asm!(a; mov(rax, qword_ptr(DATA + 12)); mov(eax, SECOND as u32); call(rax););
            asm!(a; mov(eax, 0x400); mov(dr7, rax); mov(byte_ptr(DATA + 4), 2););
            report_value(a, 9);
            end(a);
        });
        m.load(0x1_8000, 64, |a| {
            asm!(a; push(rax); mov(rax, dr6); and(eax, 0xf););
            report(a);
            asm!(a;
                mov(eax, 0xffff_0ff0u32);
                mov(dr6, rax);
                pop(rax);
                or(dword_ptr(rsp + 16), 0x1_0000); // RF
                iretq();
            );
        });
        m.set_gate(1, 0x1_8000, 0, 0);
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [2, 4, 4, 4, 4, 1, 9]);
    });
}

#[test]
fn shadows_of_mov_ss_and_sti() {
    each(|engine| {
        // A pending interrupt comes after the instruction behind STI, not before; MOV SS holds it too.
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            asm!(a; xor(ebx, ebx););
            host(a); // An interrupt is asked for here.
            asm!(a;
                sti();
                inc(ebx);
                inc(ebx);
                mov(eax, ebx);
            );
            report(a);
            end(a);
        });
        m.load(0x1_8000, 64, |a| {
            asm!(a; push(rax); mov(eax, ebx); add(eax, 0x100););
            report(a);
            asm!(a; pop(rax); iretq(););
        });
        m.set_gate(0x55, 0x1_8000, 0, 0);
        let mut v = m.long(0, ENTRY);
        let mut asked = false;
        let got = m.finish_with(&mut v, |v, exit| match exit {
            conformance::Exit::IrqWindow => {
                v.kvm_run().request_interrupt_window = 0;
                v.interrupt(0x55);
            }
            _ => {
                v.kvm_run().request_interrupt_window = 1;
                asked = true;
            }
        });
        assert!(asked);
        assert_eq!(got, [0x101, 2]);
    });
}

#[test]
fn interrupt_stack_tables_and_nesting() {
    each(|engine| {
        let m = Machine::new(engine);
        m.set_gate(6, STUBS + 16 * 6, 0, 1);
        m.set_gate(13, STUBS + 16 * 13, 0, 2);
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(rsp, STACK - 0x13);); // Misaligned: the frame is aligned.
            attempt(a, |a| asm!(a; ud2(); ));
            attempt(
                a,
                |a| asm!(a; mov(rax, 0x8000_0000_0000_0000u64); mov(rax, qword_ptr(rax)); ),
            );
            attempt(a, |a| asm!(a; int3(); ));
            asm!(a; mov(rax, rsp););
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [STACK as u32 - 0x13]);
        assert_eq!(m.vectors(), [(6, 0), (13, 0), (3, 0)]);
        assert!(m.faults().iter().all(|f| f.rsp == STACK - 0x13));
        // The frames are where they should be: five words below the tops.
        assert_eq!(m.memory.u64(IST1 - 16), STACK - 0x13);
        assert_eq!(m.memory.u64(IST2 - 16), STACK - 0x13);
        assert_eq!(m.memory.u64(((STACK - 0x13) & !15) - 16), STACK - 0x13);
    });
}
