//! Consecutive accesses through one register, which the translator checks together: at every place around
//! a page end they do what they do elsewhere.

use conformance::asm::*;
use conformance::layout::*;
use conformance::{Machine, asm, each};
use iced_x86::code_asm::*;

/// A page end in the middle of RAM that nothing else uses.
const EDGE: u32 = 0x300_0000;

#[test]
fn a_frame_across_a_page_end() {
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(4);
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(ebp, rounds); xor(r11d, r11d););
            let round = here(a);
            asm!(a; mov(r8d, EDGE - 160););
            let top = here(a);
            let (mut body, mut over) = (a.create_label(), a.create_label());
            asm!(a;
                mov(r9, rsp);
                mov(rsp, r8);
                // Something else than the last time lies there.
                mov(qword_ptr(rsp - 8), 0x55);
                call(body);
                mov(rsp, r9);
                add(r11d, eax);
                // Unaligned places too.
                add(r8d, 3);
                cmp(r8d, EDGE + 160);
                jb(top);
                dec(ebp);
                jne(round);
                jmp(over);
                set_label(&mut body);
                mov(ebx, 3);
                mov(r12d, 5);
                mov(r13d, 7);
                mov(r15d, 11);
                push(rbx);
                push(r12);
                push(r13);
                push(0x1234);
                sub(rsp, 0x28);
                mov(dword_ptr(rsp + 8), 0x7fff_ffff);
                add(dword_ptr(rsp + 8), 1);
                // Carry and overflow must get past the accesses.
                mov(qword_ptr(rsp + 0x10), r13);
                movups(xmm0, ptr(rsp + 0x11));
                movups(ptr(rsp - 0x18), xmm0);
                seto(byte_ptr(rsp + 0x1c));
                movzx(eax, byte_ptr(rsp + 0x1c));
                lea(r13, ptr(rsp + 0x28));
                mov(rbx, ptr(r13));
                mov(ptr(r13 + 0x18), rbx);
                mov(rbx, ptr(r13 + 0x18));
                mov(ptr(r13 + 0x18), r8);
                add(eax, ebx);
                xor(dword_ptr(rsp + 0x20), r15d);
                and(dword_ptr(rsp + 0x20), 0);
                or(dword_ptr(rsp + 0x20), r15d);
                add(eax, dword_ptr(rsp + 0x20));
                lea(rsp, ptr(rsp + 0x28));
                pop(rcx);
                pop(r13);
                pop(r12);
                pop(rbx);
                add(eax, r13d);
                add(eax, ecx);
                // Over the return address, and back.
                mov(rdx, ptr(rsp));
                mov(qword_ptr(rsp), 0);
                mov(qword_ptr(rsp), rdx);
                ret();
                set_label(&mut over);
                mov(eax, r11d);
            );
            report(a);
            asm!(a; mov(eax, r12d););
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        // OF, what PUSH stored twice, R15, R13.
        let each_time = 1 + 0x1234 + 11 + 7 + 0x1234u32;
        let times = (320u32).div_ceil(3) * rounds;
        assert_eq!(m.finish(&mut v), [each_time.wrapping_mul(times), 5]);
    });
}

#[test]
fn the_size_of_a_frame_is_patched() {
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(40);
        m.load(ENTRY, 64, |a| {
            let (mut body, mut over) = (a.create_label(), a.create_label());
            let mut size = a.create_label();
            asm!(a; xor(edi, edi); mov(esi, rounds););
            let top = here(a);
            asm!(a;
                // SUB RSP, imm8: 8, 16, 24, 32 by turns.
                mov(eax, esi);
                and(eax, 3);
                lea(eax, ptr(rax * 8 + 8));
                lea(rdx, ptr(size));
                mov(byte_ptr(rdx - 1), al);
                mov(ecx, eax);
                call(body);
                add(edi, eax);
                dec(esi);
                jne(top);
                jmp(over);
                set_label(&mut body);
                push(rbp);
                mov(rbp, rsp);
                push(rbx);
                push(0);
                mov(qword_ptr(rsp), 0);
                sub(rsp, 8);
                set_label(&mut size);
                mov(dword_ptr(rsp), 1);
                mov(dword_ptr(rsp + 4), 2);
                mov(rax, rbp);
                sub(rax, rsp);
                lea(rsp, ptr(rbp - 8));
                pop(rbx);
                pop(rbp);
                ret();
                set_label(&mut over);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let sum: u32 = (1..=rounds).map(|n| 16 + 8 + (n & 3) * 8).sum();
        assert_eq!(m.finish(&mut v), [sum]);
    });
}
