//! Calls and returns that do not pair, or whose circumstances change in between.

use conformance::asm::*;
use conformance::layout::*;
use conformance::machine::CR0;
use conformance::tables::*;
use conformance::{Machine, asm, each};
use iced_x86::code_asm::*;

/// Where tests map pages of their own: outside of what is mapped by default.
const VA: u64 = 0x4000_0000;
/// A large stack, growing down.
const DEEP: u64 = 0x300_0000;

#[test]
fn returns_that_go_elsewhere() {
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(300);
        m.load(ENTRY, 64, |a| {
            asm!(a; xor(edi, edi); mov(esi, rounds););
            let top = here(a);
            // Without a call.
            let mut on = a.create_label();
            asm!(a;
                lea(rax, ptr(on));
                push(rax);
                ret();
                ud2();
                set_label(&mut on);
                inc(edi);
            );
            // A retpoline.
            let (mut inner, mut target, mut pause) =
                (a.create_label(), a.create_label(), a.create_label());
            asm!(a;
                lea(rax, ptr(target));
                call(inner);
                set_label(&mut pause);
                pause();
                jmp(pause);
                set_label(&mut inner);
                mov(qword_ptr(rsp), rax);
                ret();
                ud2();
                set_label(&mut target);
                add(edi, 0x10);
            );
            // A call to find out where one is.
            let mut next = a.create_label();
            asm!(a; call(next); set_label(&mut next); pop(rax); lea(rbx, ptr(next)); sub(rax, rbx););
            asm!(a; add(edi, eax););
            // A return past three callers, and one that skips a byte behind its call.
            let (mut f, mut g, mut h, mut skip, mut done) = (
                a.create_label(),
                a.create_label(),
                a.create_label(),
                a.create_label(),
                a.create_label(),
            );
            asm!(a;
                mov(rbp, rsp);
                call(f);
                add(edi, 0x100);
                call(skip);
                db(&[0x0f]);
                add(edi, 0x1000);
                jmp(done);
                set_label(&mut f);
                call(g);
                ud2();
                set_label(&mut g);
                call(h);
                ud2();
                set_label(&mut h);
                lea(rsp, ptr(rbp - 8));
                ret();
                set_label(&mut skip);
                inc(qword_ptr(rsp));
                ret();
                set_label(&mut done);
                dec(esi);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            asm!(a; mov(eax, esp););
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(
            m.finish(&mut v),
            [0x1111u32.wrapping_mul(rounds), STACK as u32]
        );
    });
}

#[test]
fn returns_that_go_elsewhere_in_32_bit_code() {
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(300);
        m.load(ENTRY, 32, |a| {
            asm!(a; xor(edi, edi); mov(esi, rounds););
            let top = here(a);
            let (mut f, mut g, mut next, mut done) = (
                a.create_label(),
                a.create_label(),
                a.create_label(),
                a.create_label(),
            );
            asm!(a;
                call(next);
                set_label(&mut next);
                pop(eax);
                mov(ebp, esp);
                push(0x11);
                call(f);
                add(edi, 1);
                call(g);
                jmp(done);
                set_label(&mut f);
                mov(edx, dword_ptr(esp + 4));
                add(edi, edx);
                ret_1(4);
                set_label(&mut g);
                push(dword_ptr(esp));
                ret();
                set_label(&mut done);
                add(edi, ebp);
                sub(edi, esp);
                lea(esp, ptr(ebp));
                dec(esi);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let mut v = m.protected(None);
        // `g` leaves its own return address on the stack; its second return is the jump.
        assert_eq!(m.finish(&mut v), [0x16u32.wrapping_mul(rounds)]);
    });
}

#[test]
fn deep_recursion_and_two_stacks() {
    each(|engine| {
        let m = Machine::new(engine);
        let depth = engine.rounds(50_000);
        m.load(ENTRY, 64, |a| {
            let (mut f, mut leaf, mut over) =
                (a.create_label(), a.create_label(), a.create_label());
            asm!(a;
                mov(rsp, DEEP);
                mov(ecx, depth);
                xor(eax, eax);
                call(f);
                jmp(over);
                set_label(&mut f);
                dec(ecx);
                je(leaf);
                call(f);
                add(eax, 3);
                set_label(&mut leaf);
                inc(eax);
                ret();
                set_label(&mut over);
                nop();
            );
            report(a);
            // Two coroutines that switch stacks in a function that each calls.
            let (mut other, mut switch, mut again, mut deeper) = (
                a.create_label(),
                a.create_label(),
                a.create_label(),
                a.create_label(),
            );
            asm!(a;
                mov(rbx, DEEP - 0x20_0000);
                lea(rax, ptr(other));
                mov(qword_ptr(rbx), rax);
                xor(edi, edi);
                mov(esi, 100);
                set_label(&mut again);
                inc(edi);
                call(switch);
                dec(esi);
                jne(again);
                mov(eax, edi);
            );
            report(a);
            end(a);
            asm!(a;
                set_label(&mut other);
                add(edi, 0x100);
                call(deeper);
                jmp(other);
                set_label(&mut deeper);
                call(switch);
                ret();
                set_label(&mut switch);
                xchg(rsp, rbx);
                ret();
            );
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [(depth - 1) * 4 + 1, 100 * 0x101]);
    });
}

#[test]
fn flags_cross_calls_and_returns() {
    each(|engine| {
        let m = Machine::new(engine);
        let far = ENTRY + 0x2345;
        m.load(ENTRY, 64, |a| {
            let (mut near, mut end_) = (a.create_label(), a.create_label());
            for to in 0..3 {
                asm!(a; mov(ebx, 5); mov(rdx, far); xor(eax, eax); stc(););
                match to {
                    0 => a.call(near).unwrap(),
                    1 => a.call(far).unwrap(),
                    _ => a.call(rdx).unwrap(),
                }
                asm!(a; adc(eax, 0x100); seto(cl); movzx(ecx, cl); shl(ecx, 16); or(eax, ecx););
                report(a);
            }
            asm!(a;
                jmp(end_);
                set_label(&mut near);
                adc(ebx, 1);
                mov(eax, ebx);
                mov(ecx, 0x7fff_ffff);
                add(ecx, ecx);
                cmp(ebx, 8);
                ret();
                set_label(&mut end_);
                nop();
            );
            end(a);
        });
        m.load(far, 64, |a| {
            asm!(a; adc(ebx, 1); mov(eax, ebx); cmp(ebx, 8); ret(););
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [0x108, 0x108, 0x108]);
    });
}

#[test]
fn calls_at_the_end_of_a_page() {
    each(|engine| {
        for distance in 0..6u64 {
            let m = Machine::new(engine);
            let at = ENTRY + 0x2000 - 5 + distance - 3;
            m.load(ENTRY, 64, |a| {
                asm!(a; xor(ebx, ebx); mov(ecx, 50); jmp(at););
            });
            let top = at;
            m.load(at, 64, |a| {
                asm!(a; call(SECOND); add(eax, ebx); mov(ebx, eax); dec(ecx); jne(top); mov(eax, ebx););
                report(a);
                end(a);
            });
            m.load(SECOND, 64, |a| asm!(a; mov(eax, 7); ret();));
            let mut v = m.long(0, ENTRY);
            assert_eq!(m.finish(&mut v), [350], "{distance}");
        }
    });
}

#[test]
fn the_page_of_the_caller_changes() {
    each(|engine| {
        for again in [false, true] {
            let m = Machine::new(engine);
            let t = m.tables(Paging::Long);
            m.fill(&t, Paging::Long);
            let (one, two) = (DATA, DATA + 0x1000);
            let pte = t.map(VA, one, P | W | A | D);
            for (page, value) in [(one, 1), (two, 2)] {
                m.load_at(page, VA, 64, |a| {
                    if again {
                        // What this empties must not hide the page from the next one.
                        asm!(a; mov(rdx, VA); invlpg(ptr(rdx)););
                    }
                    asm!(a; call(SECOND););
                    report_value(a, value);
                    asm!(a; jmp(qword_ptr(DATA + 0x2000)););
                });
            }
            m.load(SECOND, 64, |a| {
                asm!(a;
                    mov(rbx, pte);
                    xor(qword_ptr(rbx), (one ^ two) as i32);
                    mov(rdx, VA);
                    invlpg(ptr(rdx));
                    ret();
                );
            });
            m.load(ENTRY, 64, |a| {
                for _ in 0..3 {
                    let mut back = a.create_label();
                    asm!(a;
                        lea(rax, ptr(back));
                        mov(qword_ptr(DATA + 0x2000), rax);
                        mov(rax, VA);
                        jmp(rax);
                        set_label(&mut back);
                        nop();
                    );
                }
                end(a);
            });
            let mut v = m.long(0, ENTRY);
            assert_eq!(m.finish(&mut v), [2, 1, 2], "{again}");
        }
    });
}

#[test]
fn the_code_behind_the_call_changes() {
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(300);
        m.load(ENTRY, 64, |a| {
            let (mut f, mut behind, mut done) =
                (a.create_label(), a.create_label(), a.create_label());
            asm!(a; xor(edi, edi); mov(esi, rounds););
            let top = here(a);
            asm!(a;
                call(f);
                set_label(&mut behind);
                mov(eax, 0x7fff_ffff);
                add(edi, eax);
                dec(esi);
                jne(top);
                jmp(done);
                set_label(&mut f);
                lea(rbx, ptr(behind));
                mov(dword_ptr(rbx + 1), esi);
                // The call itself too, with what it is.
                mov(al, byte_ptr(rbx - 5));
                mov(byte_ptr(rbx - 5), al);
                ret();
                set_label(&mut done);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [rounds * (rounds + 1) / 2]);
    });
}

#[test]
fn the_mode_changes_in_the_callee() {
    each(|engine| {
        let m = Machine::new(engine);
        m.memory.write(DATA, &[1, 2, 3, 4, 5, 6, 7, 8]);
        m.load(ENTRY, 64, |a| {
            let (mut set, mut clear, mut f, mut over) = (
                a.create_label(),
                a.create_label(),
                a.create_label(),
                a.create_label(),
            );
            asm!(a; xor(eax, eax); xor(ebp, ebp); jmp(over);
                set_label(&mut set);
                std();
                ret();
                set_label(&mut clear);
                cld();
                ret();
                set_label(&mut f);
                test(ebp, 1);
                je(clear);
                jmp(set);
                set_label(&mut over);
                nop();
            );
            let top = here(a);
            asm!(a; mov(rsi, DATA + 4); call(f); lodsb(); lodsb(););
            report(a);
            asm!(a; inc(ebp); cmp(ebp, 4); jne(top); cld(););
            // The task-switched flag: the same instruction faults behind the call.
            let (mut ts, mut done) = (a.create_label(), a.create_label());
            or_cr(a, cr4, 0x200);
            asm!(a; mov(ebp, 2););
            let top = here(a);
            asm!(a; call(ts););
            attempt(a, |a| asm!(a; movd(xmm0, ebp); ));
            asm!(a; dec(ebp); jne(top); jmp(done);
                set_label(&mut ts);
                cmp(ebp, 1);
            );
            let mut plain = a.create_label();
            asm!(a; jne(plain););
            set_cr(a, cr0, CR0 | PG_TS);
            asm!(a; set_label(&mut plain); ret(); set_label(&mut done); nop(););
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [6, 4, 6, 4]);
        assert_eq!(m.vectors(), [(7, 0)]);
    });
}

/// CR0.PG and CR0.TS.
const PG_TS: u64 = 1 << 31 | 8;

#[test]
fn user_code_returns_into_the_kernel() {
    // User code pushes the address behind a call of the kernel's, and returns there: at its own privilege.
    each(|engine| {
        let m = Machine::new(engine);
        // Where user code may read and execute.
        let (kernel, data) = (SECOND + 0x1000, SECOND + 0x2000);
        m.load(kernel, 64, |a| {
            let (mut f, mut behind, mut user) =
                (a.create_label(), a.create_label(), a.create_label());
            asm!(a;
                lea(rax, ptr(behind));
                mov(qword_ptr(data), rax);
                mov(ebx, 3);
            );
            let top = here(a);
            asm!(a;
                call(f);
                set_label(&mut behind);
                mov(ecx, cs);
                test(ecx, 3);
                jne(user);
                mov(eax, dword_ptr(data + 8));
            );
            report(a);
            asm!(a; dec(ebx); jne(top););
            end(a);
            asm!(a;
                set_label(&mut user);
                mov(dword_ptr(data + 8), ecx);
                int(0x80);
                set_label(&mut f);
                mov(r12, rsp););
            call_user(a, SECOND, USER_STACK, 2);
            asm!(a; mov(rsp, r12); ret(););
        });
        m.load(SECOND, 64, |a| {
            asm!(a; push(qword_ptr(data)); ret(););
        });
        let mut v = m.long(0, kernel);
        assert_eq!(m.finish(&mut v), [u32::from(USER_CODE); 3]);
    });
}

#[test]
fn a_return_to_no_address() {
    // The fault is the return's, which has moved nothing.
    each(|engine| {
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            let mut f = a.create_label();
            let mut over = a.create_label();
            asm!(a; jmp(over); set_label(&mut f); mov(rax, 0x8000_0000_0000_0000u64););
            asm!(a; mov(qword_ptr(rsp), rax); mov(rbx, rsp););
            attempt(a, |a| asm!(a; ret(); ));
            asm!(a; sub(rbx, rsp); mov(eax, ebx););
            report(a);
            attempt(a, |a| asm!(a; ret_1(0x20); ));
            asm!(a; lea(rsp, ptr(rsp + 8)););
            end(a);
            asm!(a; set_label(&mut over); call(f););
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [0]);
        assert_eq!(m.vectors(), [(13, 0), (13, 0)]);
    });
}

#[test]
fn pushes_and_pops_over_pages() {
    // Runs of pushes and pops that cross pages, and ones that fault in the middle: what was done before
    // stays done.
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        // Two pages, in another order than their memory; nothing around them.
        for i in 0..2 {
            t.map(VA + 0x1000 * i, DATA + 0x1000 * (1 - i), P | W | U | A | D);
        }
        let out = SECOND + 0x2000;
        m.load(ENTRY, 64, |a| {
            call_user(a, SECOND, VA + 0x1018, 2);
            for i in 0..12 {
                asm!(a; mov(eax, dword_ptr(out + 4 * i)););
                report(a);
            }
            end(a);
        });
        m.load(SECOND, 64, |a| {
            let mut f = a.create_label();
            let mut over = a.create_label();
            asm!(a; mov(eax, 1); mov(ebx, 2); mov(r13d, 3); mov(r14d, 4); mov(ebp, 5); mov(r12, out););
            let store = |a: &mut CodeAssembler| {
                asm!(a; mov(dword_ptr(r12), eax); add(r12, 4););
            };
            for _ in 0..2 {
                // Across the page and back, with a return at the end.
                asm!(a; call(f););
                store(a);
                asm!(a; lea(eax, ptr(rsp - (VA as i32))););
                store(a);
                asm!(a; mov(eax, 1););
            }
            asm!(a; jmp(over);
                set_label(&mut f);
                push(rax);
                push(rbx);
                push(r13);
                push(0x66);
                push(r14);
                mov(ebx, 0);
                mov(r13d, 0);
                mov(r14d, 0);
                pop(rax);
                pop(r14);
                pop(r13);
                pop(rbx);
                pop(rcx);
                ret();
                set_label(&mut over);
                xchg(eax, r14d);
            );
            store(a);
            asm!(a; mov(eax, ebx); shl(eax, 8); or(eax, r13d););
            store(a);
            // The third of these has no page.
            asm!(a; mov(rsp, VA + 0x10););
            attempt(a, |a| asm!(a; push(rax); push(rbx); push(r13); push(rcx); ));
            asm!(a; lea(eax, ptr(rsp - (VA as i32))););
            store(a);
            asm!(a; mov(eax, dword_ptr(VA)););
            store(a);
            // Neither has the second of these.
            asm!(a; mov(rsp, VA + 0x1ff8); mov(ebx, 0x99););
            asm!(a; mov(dword_ptr(rsp), 0x42););
            attempt(a, |a| asm!(a; pop(rbx); pop(r13); ret(); ));
            asm!(a; mov(eax, ebx););
            store(a);
            asm!(a; mov(eax, r13d););
            store(a);
            asm!(a; lea(eax, ptr(rsp - (VA as i32))););
            store(a);
            asm!(a; int(0x80););
        });
        let mut v = m.long(0, ENTRY);
        let got = m.finish(&mut v);
        assert_eq!(
            got,
            [
                4, 0x1018, 0x66, 0x1018, 0x66, 0x203, 0, 2, 0x42, 3, 0x2000, 0
            ]
        );
        let faults: Vec<_> = m.faults().iter().map(|f| (f.cr2, f.rsp)).collect();
        assert_eq!(faults, [(VA - 8, VA), (VA + 0x2000, VA + 0x2000)]);
    });
}
