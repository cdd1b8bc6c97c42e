//! Code that changes: by itself, through other mappings, by other vCPUs, by the host.

use conformance::asm::*;
use conformance::layout::*;
use conformance::tables::*;
use conformance::watchdog::Kick;
use conformance::{Machine, asm, each, each_but_kvm};
use iced_x86::code_asm::*;

/// Why some tests do not run on a PVM.
const PVM_CODE: &str = "PVM's emulator gives up when another vCPU changes the code";

/// `mov eax, value; ret`
fn function(value: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(value.to_le_bytes());
    code.push(0xc3);
    code
}

#[test]
fn patching_the_next_instruction() {
    // The processor that stores sees its change at the next branch at the latest, and all there are see
    // it even without.
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(2000);
        m.load(ENTRY, 64, |a| {
            let mut patched = a.create_label();
            asm!(a; xor(edi, edi); xor(esi, esi););
            let top = here(a);
            asm!(a;
                lea(rbx, ptr(patched));
                mov(dword_ptr(rbx + 1), esi);
                jmp(patched);
                set_label(&mut patched);
                mov(eax, 0x7fff_ffff);
                add(edi, eax);
                inc(esi);
                cmp(esi, rounds);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            // Without a branch, over two instructions of the same line.
            let mut next = a.create_label();
            asm!(a;
                lea(rbx, ptr(next));
                mov(ecx, 0x90909090u32);
                mov(eax, 1);
                mov(dword_ptr(rbx), ecx);
                set_label(&mut next);
                // ADD EAX, 5 and the first byte of INC RAX become NOPs; the rest is INC EAX.
                db(&[0x83, 0xc0, 0x05, 0x48, 0xff, 0xc0]);
            );
            report(a);
            end(a);
        });
        let want = (0..rounds).fold(0u32, |s, i| s.wrapping_add(i));
        let mut v = m.long(0, ENTRY);
        let got = m.finish(&mut v);
        assert_eq!(got, [want, 2]);
    });
}

#[test]
fn patching_a_loop_around() {
    // A block that changes an instruction behind and one before the store, each round.
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(3000);
        m.load(ENTRY, 64, |a| {
            let (mut before, mut behind) = (a.create_label(), a.create_label());
            asm!(a; xor(edi, edi); xor(esi, esi););
            asm!(a;
                set_label(&mut before);
                add(edi, 0x100);
                lea(rbx, ptr(behind));
                lea(rdx, ptr(before));
                mov(eax, esi);
                and(eax, 0x7f);
                mov(byte_ptr(rbx + 2), al);
                lea(ecx, ptr(rsi + 0x101));
                mov(dword_ptr(rdx + 2), ecx);
                mov(ecx, ecx);
                set_label(&mut behind);
                db(&[0x83, 0xc7, 0x55]); // add edi, imm8
                inc(esi);
                cmp(esi, rounds);
                jne(before);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let mut want = 0u32;
        let mut imm = 0x100;
        for i in 0..rounds {
            want = want.wrapping_add(imm).wrapping_add(i & 0x7f);
            imm = i + 0x101;
        }
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [want]);
    });
}

#[test]
fn an_instruction_that_overwrites_itself() {
    each(|engine| {
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            // REP STOSB over itself and on: the iterations go on as they began.
            let mut target = a.create_label();
            asm!(a;
                lea(rdi, ptr(target));
                mov(ecx, 4);
                mov(al, 0x90);
                set_label(&mut target);
                rep.stosb();
                nop();
                nop();
                mov(eax, ecx);
            );
            report(a);
            asm!(a; lea(rbx, ptr(target)); mov(eax, dword_ptr(rbx)););
            report(a);
            // A store that makes INT3 of its own first byte is done all the same.
            let mut own = a.create_label();
            asm!(a;
                lea(rbx, ptr(own));
                set_label(&mut own);
                mov(byte_ptr(rbx), 0xcc);
                movzx(eax, byte_ptr(rbx));
            );
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [0, 0x9090_9090, 0xcc]);
    });
}

/// Writes a function of varying length and calls it, again and again, as a JIT compiler does.
#[test]
fn write_and_execute_ten_thousand_times() {
    each(|engine| {
        for paging in [false, true] {
            let m = Machine::new(engine);
            let rounds = engine.rounds(10_000);
            if paging {
                m.load(ENTRY, 64, |a| {
                    asm!(a; xor(edi, edi); mov(esi, 1););
                    let top = here(a);
                    asm!(a;
                        // The place moves through 60 KiB, the imm changes.
                        imul_3(eax, esi, 0x1d3);
                        and(eax, 0xffff);
                        add(eax, DATA as u32);
                        mov(rbx, rax);
                        mov(byte_ptr(rbx), 0xb8);
                        mov(dword_ptr(rbx + 1), esi);
                        mov(word_ptr(rbx + 5), 0xc0ff); // inc eax
                        mov(byte_ptr(rbx + 7), 0xc3);
                        call(rbx);
                        rol(edi, 5);
                        xor(edi, eax);
                        inc(esi);
                        cmp(esi, rounds + 1);
                        jne(top);
                        mov(eax, edi);
                    );
                    report(a);
                    end(a);
                });
            } else {
                m.load(ENTRY, 32, |a| {
                    asm!(a; xor(edi, edi); mov(esi, 1););
                    let top = here(a);
                    asm!(a;
                        imul_3(eax, esi, 0x1d3);
                        and(eax, 0xffff);
                        add(eax, DATA as u32);
                        mov(ebx, eax);
                        mov(byte_ptr(ebx), 0xb8);
                        mov(dword_ptr(ebx + 1), esi);
                        mov(word_ptr(ebx + 5), 0xc0ff);
                        mov(byte_ptr(ebx + 7), 0xc3);
                        call(ebx);
                        rol(edi, 5);
                        xor(edi, eax);
                        inc(esi);
                        cmp(esi, rounds + 1);
                        jne(top);
                        mov(eax, edi);
                    );
                    report(a);
                    end(a);
                });
            }
            let want = (1..=rounds).fold(0u32, |s, i| s.rotate_left(5) ^ (i + 1));
            let mut v = if paging {
                m.long(0, ENTRY)
            } else {
                m.protected(None)
            };
            assert_eq!(m.finish(&mut v), [want], "paging {paging}");
        }
    });
}

#[test]
fn user_code_that_writes_and_executes() {
    each_but_kvm("PVM refuses CPUID in user mode", |engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        // Written at one address, executed at another, as engines with W^X do.
        for i in 0..4 {
            t.map(0x4000_0000 + 4096 * i, DATA + 4096 * i, P | W | U | NX);
            t.map(0x5000_0000 + 4096 * i, DATA + 4096 * i, P | U);
        }
        let rounds = engine.rounds(3000);
        m.load(ENTRY, 64, |a| {
            call_user(a, SECOND, USER_STACK, 0x3002);
            end(a);
        });
        m.load(SECOND, 64, |a| {
            asm!(a; xor(edi, edi); mov(esi, 1););
            let top = here(a);
            asm!(a;
                imul_3(r8d, esi, 0x1d3);
                and(r8d, 0x3fef);
                mov(rbx, 0x4000_0000u64);
                mov(r9, 0x5000_0000u64);
                add(rbx, r8);
                add(r9, r8);
                mov(byte_ptr(rbx), 0xb8);
                mov(dword_ptr(rbx + 1), esi);
                mov(byte_ptr(rbx + 5), 0xc3);
                xor(eax, eax);
                push(rbx);
                cpuid();
                pop(rbx);
                call(r9);
                rol(edi, 5);
                xor(edi, eax);
                inc(esi);
                cmp(esi, rounds + 1);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            asm!(a; int(0x80););
        });
        let want = (1..=rounds).fold(0u32, |s, i| s.rotate_left(5) ^ i);
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [want]);
    });
}

#[test]
fn code_beside_data() {
    // A counter in the same line, in the same page, and two pages of code that write to each other.
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(20_000);
        m.load(ENTRY, 64, |a| {
            let mut counter = a.create_label();
            let mut far = a.create_label();
            let mut start = a.create_label();
            asm!(a;
                jmp(start);
                set_label(&mut counter);
                dq(&[0]);
                set_label(&mut start);
                mov(ecx, rounds);
            );
            let top = here(a);
            asm!(a;
                inc(qword_ptr(counter));
                add(qword_ptr(far), 2);
                dec(ecx);
                jnz(top);
                mov(rax, qword_ptr(counter));
            );
            report(a);
            asm!(a; mov(rax, qword_ptr(far)););
            report(a);
            end(a);
            asm!(a; db(&[0xcc; 300]); set_label(&mut far); dq(&[0]););
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [rounds, 2 * rounds]);
    });
}

#[test]
fn code_moved_by_strings() {
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(1000);
        for i in 0..8u64 {
            m.memory
                .write(DATA + 0x2000 + 64 * i, &function(i as u32 + 1));
        }
        m.load(ENTRY, 64, |a| {
            asm!(a; xor(r8d, r8d); xor(r9d, r9d););
            let top = here(a);
            asm!(a;
                mov(esi, r8d);
                and(esi, 7);
                shl(esi, 6);
                add(esi, (DATA + 0x2000) as u32);
                mov(edi, DATA as u32 + 0xffc); // Across the end of a page.
                mov(ecx, 6);
                rep.movsb();
                mov(ebx, DATA as u32 + 0xffc);
                call(rbx);
                add(r9d, eax);
                // And with MOVSQ and MOVUPS to a second place.
                sub(rsi, 6);
                mov(edi, DATA as u32 + 0x800);
                movsq();
                mov(ebx, DATA as u32 + 0x800);
                call(rbx);
                imul_3(r9d, r9d, 3);
                add(r9d, eax);
                movups(xmm0, xmmword_ptr(rsi - 8));
                movups(xmmword_ptr(rbx + 0x3f9), xmm0);
                add(rbx, 0x3f9);
                call(rbx);
                add(r9d, eax);
                inc(r8d);
                cmp(r8d, rounds);
                jne(top);
                mov(eax, r9d);
            );
            report(a);
            end(a);
        });
        let want = (0..rounds).fold(0u32, |s, i| {
            let f = i % 8 + 1;
            s.wrapping_add(f).wrapping_mul(3).wrapping_add(2 * f)
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [want]);
    });
}

#[test]
fn code_that_the_host_changes() {
    // As a disk's DMA does: in memory, behind the vCPU's back, then an exit, as if by its interrupt.
    each(|engine| {
        for paging in [false, true] {
            let m = Machine::new(engine);
            m.memory.write(DATA, &function(1));
            m.memory.write(DATA + 0x2ffd, &function(1));
            m.load(ENTRY, if paging { 64 } else { 32 }, |a| {
                for _ in 0..10 {
                    if paging {
                        asm!(a; mov(ebx, DATA as u32); call(rbx););
                        report(a);
                        asm!(a; mov(ebx, (DATA + 0x2ffd) as u32); call(rbx););
                    } else {
                        asm!(a; mov(ebx, DATA as u32); call(ebx););
                        report(a);
                        asm!(a; mov(ebx, (DATA + 0x2ffd) as u32); call(ebx););
                    }
                    report(a);
                    host(a);
                }
                end(a);
            });
            let mut v = if paging {
                m.long(0, ENTRY)
            } else {
                m.protected(None)
            };
            let mut n = 1;
            let got = m.finish_with(&mut v, |v, _| {
                n += 1;
                // With paging, an engine may hold code until a flush, or until user space stops the
                // vCPU as a debugger does: docs/translator.md.
                if paging && let Kick::User(kicker) = v.kick() {
                    kicker.kick();
                }
                m.memory.write(DATA, &function(n));
                m.memory.write(DATA + 0x2ffd, &function(n));
            });
            let want: Vec<u32> = (1..=10).flat_map(|n| [n, n]).collect();
            assert_eq!(got, want, "paging {paging}");
        }
    });
}

#[test]
fn another_vcpu_patches_a_loop_with_int3() {
    // Linux' protocol: a breakpoint over the first byte, everybody synchronizes, the rest of the
    // bytes, everybody, the first byte.
    each_but_kvm(PVM_CODE, |engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(100);
        let (flag, stop, hits, seen) = (DATA, DATA + 64, DATA + 128, DATA + 192);
        let patched = SECOND + 0x800;
        // Either `add edi, 1` or `add edi, 2`, six bytes both; then count and return.
        let code = |n: u8| [0x81, 0xc7, n, 0, 0, 0];
        m.memory.write(patched, &code(1));
        m.memory.write(patched + 6, &[0xc3]);
        // INT3: goes on behind the instruction.
        m.load(0x1_8000, 64, |a| {
            asm!(a;
                lock.inc(qword_ptr(hits));
                mov(qword_ptr(rsp), (patched + 6) as i32);
                iretq();
            );
        });
        m.set_gate(3, 0x1_8000, 0, 0);
        // vCPU 1 runs the code until told to stop.
        m.load(SECOND, 64, |a| {
            asm!(a; mov(r8, patched); mov(r9d, 0););
            let top = here(a);
            asm!(a; xor(edi, edi); call(r8););
            let mut good = a.create_label();
            asm!(a;
                cmp(edi, 2);
                jbe(good);
                inc(r9d); // Torn.
                set_label(&mut good);
                mov(rcx, qword_ptr(flag));
                cmp(rcx, qword_ptr(seen));
            );
            let mut same = a.create_label();
            asm!(a;
                je(same);
                push(rcx);
                xor(eax, eax);
                cpuid();
                pop(rcx);
                mov(qword_ptr(seen), rcx);
                // After the third step the code is the new one.
                set_label(&mut same);
                cmp(qword_ptr(stop), 0);
                je(top);
                mov(eax, r9d);
            );
            report(a);
            asm!(a; xor(edi, edi); call(r8); mov(eax, edi););
            report(a);
            end(a);
        });
        m.load(ENTRY, 64, |a| {
            let sync = |a: &mut CodeAssembler| {
                asm!(a; inc(qword_ptr(flag)); mov(rax, qword_ptr(flag)););
                let wait = here(a);
                asm!(a; pause(); cmp(qword_ptr(seen), rax); jne(wait););
            };
            asm!(a; mov(r8d, 0););
            let top = here(a);
            asm!(a; mov(byte_ptr(patched), 0xcc););
            sync(a);
            asm!(a; mov(eax, r8d); not(eax); and(eax, 1); inc(eax); mov(dword_ptr(patched + 2), eax););
            sync(a);
            asm!(a; mov(byte_ptr(patched), 0x81););
            sync(a);
            asm!(a; inc(r8d); cmp(r8d, rounds); jne(top); mov(qword_ptr(stop), 1););
            end(a);
        });
        let vcpus = vec![m.long(0, ENTRY), m.long(1, SECOND)];
        let got = m.finish_all(vcpus);
        assert_eq!(got[1], [0, if rounds % 2 == 1 { 2 } else { 1 }]);
    });
}

#[test]
fn another_vcpu_writes_functions_that_this_one_calls() {
    // A mailbox: written by one, called by the other after a serializing instruction.
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(200);
        let turn = DATA;
        let code = DATA + 0x1000;
        m.memory.write(code, &function(0));
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(esi, 1););
            let top = here(a);
            asm!(a; mov(dword_ptr(code + 1), esi); mov(dword_ptr(turn), 1););
            let wait = here(a);
            asm!(a; pause(); cmp(dword_ptr(turn), 0); jne(wait);
                inc(esi); cmp(esi, rounds + 1); jne(top); mov(dword_ptr(turn), 2););
            end(a);
        });
        m.load(SECOND, 64, |a| {
            let mut over = a.create_label();
            asm!(a; xor(edi, edi); mov(r8, code););
            let top = here(a);
            asm!(a;
                pause();
                mov(ecx, dword_ptr(turn));
                cmp(ecx, 2);
                je(over);
                test(ecx, ecx);
                jz(top);
                xor(eax, eax);
                cpuid();
                call(r8);
                rol(edi, 3);
                add(edi, eax);
                mov(dword_ptr(turn), 0);
                jmp(top);
                set_label(&mut over);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let want = (1..=rounds).fold(0u32, |s, i| s.rotate_left(3).wrapping_add(i));
        let got = m.finish_all(vec![m.long(0, ENTRY), m.long(1, SECOND)]);
        assert_eq!(got[1], [want]);
    });
}

#[test]
fn the_same_bytes_in_every_mode_size() {
    // B8 imm: 16 bits, 32 bits, and with a prefix, at one physical address in three modes.
    each(|engine| {
        let m = Machine::new(engine);
        m.memory
            .write(SECOND, &[0xb8, 0x11, 0x22, 0x33, 0xc0, 0xcb, 0xcb]);
        // 16-bit: mov ax, 0x2211; xor eax... 33 C0 = xor ax, ax: so AX = 0; 32-bit: mov eax, C0332211.
        m.set_descriptor(FREE, descriptor(SECOND as u32, 0xffff, 0x9b, 0));
        m.load(REAL, 32, |a| {
            for selector in [CODE32, FREE, CODE32, FREE] {
                asm!(a; mov(eax, 0x7777_7777););
                if selector == FREE {
                    // With a frame of 16-bit words.
                    asm!(a; db(&[0x66, 0x9a]); dw(&[0, selector]););
                } else {
                    asm!(a; db(&[0x9a]); dd(&[SECOND as u32]); dw(&[selector]););
                }
                report(a);
            }
            end(a);
        });
        let mut v = m.protected(None);
        v.set_regs(&kvm_bindings::kvm_regs {
            rip: REAL,
            ..v.regs()
        });
        let want = [0xc033_2211, 0x7777_0000];
        assert_eq!(m.finish(&mut v), [want, want].concat());
    });
}

#[test]
fn immediates_of_every_size() {
    // Constants of running code change, whole, in part, and together with what is around them.
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(3000);
        let (code, cell) = (DATA + 0x40, DATA + 0x3000);
        m.load(code, 64, |a| {
            asm!(a;
                mov(eax, 0x11223344u32);            // +1, 4 bytes
                mov(rdx, 0x1122334455667788u64);    // +7, 8 bytes
                add(rax, rdx);
                imul_3(eax, eax, 0x1234567);        // +20: 69 c0, at +22
                mov(word_ptr(cell), 0x5555);
                add(byte_ptr(cell), 0x11);
                adc(eax, dword_ptr(cell));
                db(&[0xc1, 0xe0, 0x03]);            // shl eax, 3
                adc(eax, 0);
                ret();
            );
        });
        let find = |bytes: &[u8]| {
            let page = m.memory.read(code, 128);
            let at = page.windows(bytes.len()).position(|w| w == bytes);
            code + at.expect("the code has these bytes") as u64
        };
        let (imm64, imul) = (find(&[0x88, 0x77]), find(&[0x67, 0x45, 0x23, 0x01]));
        let (word, byte) = (find(&[0x55, 0x55, 0x80]), find(&[0x11, 0x13, 0x04]));
        let shift = find(&[0xc1, 0xe0, 0x03]) + 2;
        m.load(ENTRY, 64, |a| {
            asm!(a; xor(edi, edi); xor(esi, esi); mov(rbx, code););
            let top = here(a);
            asm!(a;
                imul_3(ecx, esi, 0x9e37_79b1u32 as i32);
                mov(dword_ptr(code + 1), ecx);
                mov(byte_ptr(imm64 + 2), cl);
                mov(dword_ptr(imm64 + 3), esi);
                mov(word_ptr(imul + 1), cx);
                // The end of one instruction's and the start of another's opcode, which stays.
                mov(r8d, dword_ptr(word));
                mov(r8w, si);
                mov(dword_ptr(word), r8d);
                mov(byte_ptr(byte), cl);
                and(ecx, 3);
                mov(byte_ptr(shift), cl);
                call(rbx);
                rol(edi, 5);
                xor(edi, eax);
                inc(esi);
                cmp(esi, rounds);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let mut sum = 0u32;
        for i in 0..rounds {
            let c = i.wrapping_mul(0x9e37_79b1);
            let mut wide = 0x1122_3344_5566_7788u64.to_le_bytes();
            wide[2] = c as u8;
            wide[3..7].copy_from_slice(&i.to_le_bytes());
            let mut factor = 0x0123_4567u32.to_le_bytes();
            factor[1..3].copy_from_slice(&(c as u16).to_le_bytes());
            let a = u64::from(c).wrapping_add(u64::from_le_bytes(wide)) as u32;
            let a = a.wrapping_mul(u32::from_le_bytes(factor));
            let (low, carry) = (i as u16 as u8).overflowing_add(c as u8);
            let value = u32::from(i as u16) & 0xff00 | u32::from(low);
            let (s, c1) = a.overflowing_add(value);
            let (s, c2) = s.overflowing_add(carry.into());
            let count = c & 3;
            let carry = if count == 0 {
                c1 || c2
            } else {
                s >> (32 - count) & 1 != 0
            };
            let a = (s << count).wrapping_add(carry.into());
            sum = sum.rotate_left(5) ^ a;
        }
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [sum]);
    });
}

#[test]
fn stores_to_code_keep_flags_and_vectors() {
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(2000);
        let code = DATA + 0x1000;
        m.memory.write(code, &function(1));
        m.load(ENTRY, 64, |a| {
            let count = |a: &mut CodeAssembler| asm!(a; movzx(eax, al); add(edi, eax););
            asm!(a; xor(edi, edi); xor(esi, esi); mov(rbx, code); mov(r13, code););
            asm!(a; mov(eax, 0x100); movd(xmm1, eax););
            let top = here(a);
            // Flags from before a store into a function, and into its page.
            asm!(a; movd(xmm3, esi); cmp(esi, 1000); mov(dword_ptr(r13 + 1), esi); setb(al););
            count(a);
            asm!(a; cmp(esi, 1500); mov(dword_ptr(rbx + 0x800), esi); seta(al););
            count(a);
            // Flags from the store itself.
            asm!(a; add(dword_ptr(rbx + 0x804), 0x4000_0000); setc(al););
            count(a);
            asm!(a; sub(byte_ptr(r13 + 1), 3); setc(al););
            count(a);
            asm!(a;
                call(rbx);
                add(edi, eax);
                // A vector store over the function and behind it takes 1 from its constant.
                movups(xmm0, xmmword_ptr(rbx));
                psubd(xmm0, xmm1);
                movups(xmmword_ptr(rbx), xmm0);
                movd(eax, xmm3);
                add(edi, eax);
                call(rbx);
                add(edi, eax);
                inc(esi);
                cmp(esi, rounds);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let want = (0..rounds).fold(0u32, |sum, i| {
            let flags = u32::from(i < 1000)
                + u32::from(i > 1500)
                + u32::from(i % 4 == 3)
                + u32::from(i & 0xff < 3);
            let value = i & !0xff | (i.wrapping_sub(3) & 0xff);
            let less = value.wrapping_sub(1) & 0xff_ffff;
            [flags, value, i, less]
                .into_iter()
                .fold(sum, u32::wrapping_add)
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [want]);
    });
}

#[test]
fn a_store_across_the_end_of_a_page_of_code() {
    // Eight bytes change the end of one function and the start of the next, in another page.
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(2000);
        let (first, second) = (DATA + 0xffa, DATA + 0x1000);
        m.memory.write(first, &function(1));
        m.memory.write(second, &function(2));
        m.load(ENTRY, 64, |a| {
            asm!(a; xor(edi, edi); xor(esi, esi); mov(rbx, first); mov(rbp, second););
            let top = here(a);
            asm!(a;
                // Two bytes of a constant, RET, MOV EAX, and the other constant.
                movzx(ecx, sil);
                mov(rax, rcx);
                shl(rax, 32);
                or(rax, rcx);
                mov(edx, 0xb8c3_0000u32);
                or(rax, rdx);
                mov(qword_ptr(rbx + 3), rax);
                call(rbx);
                rol(edi, 3);
                add(edi, eax);
                call(rbp);
                rol(edi, 3);
                add(edi, eax);
                inc(esi);
                cmp(esi, rounds);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let want = (0..rounds).fold(0u32, |s, i| {
            let byte = i & 0xff;
            let s = s.rotate_left(3).wrapping_add(1 | byte << 16);
            s.rotate_left(3).wrapping_add(byte)
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [want]);
    });
}

#[test]
fn a_page_of_code_becomes_data_and_code_again() {
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(40);
        let code = DATA + 0x1000;
        m.memory.write(code, &function(7));
        m.load(ENTRY, 64, |a| {
            asm!(a; xor(edi, edi); xor(esi, esi); mov(rbx, code););
            let top = here(a);
            // Data all over the page, often, then a function again.
            asm!(a; mov(ecx, 0x3ff););
            let fill = here(a);
            asm!(a;
                lea(eax, ptr(rsi + rcx));
                mov(dword_ptr(rbx + rcx * 4), eax);
                dec(ecx);
                jns(fill);
                mov(eax, dword_ptr(rbx + 0x123 * 4));
                add(edi, eax);
                mov(byte_ptr(rbx), 0xb8);
                mov(dword_ptr(rbx + 1), esi);
                mov(byte_ptr(rbx + 5), 0xc3);
                call(rbx);
                rol(edi, 3);
                add(edi, eax);
                inc(esi);
                cmp(esi, rounds);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let want = (0..rounds).fold(0u32, |s, i| {
            s.wrapping_add(i + 0x123).rotate_left(3).wrapping_add(i)
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [want]);
    });
}

#[test]
fn another_vcpu_patches_a_constant_of_a_loop() {
    // The constant lies in one aligned word: whoever runs it sees old or new, and new at last.
    each_but_kvm(PVM_CODE, |engine| {
        let m = Machine::new(engine);
        let last = engine.rounds(20_000);
        let (code, ready) = (DATA + 0x1007, DATA);
        m.memory.write(code, &function(0));
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(esi, 1););
            let wait = here(a);
            asm!(a; pause(); cmp(dword_ptr(ready), 0); je(wait););
            let top = here(a);
            asm!(a; mov(dword_ptr(code + 1), esi); inc(esi); cmp(esi, last + 1); jne(top););
            end(a);
        });
        m.load(SECOND, 64, |a| {
            let mut back = a.create_label();
            asm!(a; xor(edi, edi); mov(r8, code););
            let top = here(a);
            asm!(a;
                call(r8);
                mov(dword_ptr(ready), 1);
                cmp(eax, edi);
                jb(back);
                mov(edi, eax);
                cmp(eax, last);
                jne(top);
                set_label(&mut back);
                nop();
            );
            report(a);
            end(a);
        });
        let got = m.finish_all(vec![m.long(0, ENTRY), m.long(1, SECOND)]);
        assert_eq!(got[1], [last]);
    });
}
