//! Several vCPUs: atomics, memory order, shootdowns.

use conformance::asm::*;
use conformance::layout::*;
use conformance::tables::*;
use conformance::{Engine, Machine, asm, each};
use iced_x86::code_asm::*;

/// Runs `program` on `n` vCPUs; RDI is the number.
fn all(m: &Machine, n: u64, program: impl FnOnce(&mut CodeAssembler)) -> Vec<Vec<u32>> {
    m.load(SECOND, 64, program);
    let vcpus = (0..n)
        .map(|id| {
            let v = m.long(id, SECOND);
            let mut r = v.regs();
            r.rdi = id;
            v.set_regs(&r);
            v
        })
        .collect();
    m.finish_all(vcpus)
}

#[test]
fn locked_counters() {
    each(|engine| {
        for n in [2, 4] {
            let m = Machine::new(engine);
            let rounds = engine.rounds(20_000);
            all(&m, n, |a| {
                asm!(a; mov(esi, rounds););
                let top = here(a);
                asm!(a;
                    lock.inc(qword_ptr(DATA));
                    mov(eax, 3);
                    lock.xadd(qword_ptr(DATA + 64), rax);
                    mov(rax, qword_ptr(DATA + 128));
                );
                let retry = here(a);
                asm!(a;
                    lea(rcx, ptr(rax + 5));
                    lock.cmpxchg(qword_ptr(DATA + 128), rcx);
                    jne(retry);
                    mov(rax, qword_ptr(DATA + 192));
                    mov(rdx, qword_ptr(DATA + 200));
                );
                let retry = here(a);
                asm!(a;
                    lea(rbx, ptr(rax + 1));
                    lea(rcx, ptr(rdx + 2));
                    lock.cmpxchg16b(xmmword_ptr(DATA + 192));
                    jne(retry);
                    // Across two cache lines, and across two pages.
                    lock.add(dword_ptr(DATA + 256 + 62), 1);
                    lock.add(dword_ptr(DATA + 0xffe), 1);
                    // Bits that belong to this vCPU.
                    lock.btc(qword_ptr(DATA + 512), rdi);
                    dec(esi);
                    jnz(top);
                );
                end(a);
            });
            let total = n * u64::from(rounds);
            assert_eq!(m.memory.u64(DATA), total);
            assert_eq!(m.memory.u64(DATA + 64), 3 * total);
            assert_eq!(m.memory.u64(DATA + 128), 5 * total);
            assert_eq!(m.memory.u64(DATA + 192), total);
            assert_eq!(m.memory.u64(DATA + 200), 2 * total);
            assert_eq!(u64::from(m.memory.u32(DATA + 256 + 62)), total);
            assert_eq!(u64::from(m.memory.u32(DATA + 0xffe)), total);
            let bits = if rounds % 2 == 1 { (1 << n) - 1 } else { 0 };
            assert_eq!(m.memory.u64(DATA + 512), bits);
        }
    });
}

#[test]
fn peterson_and_xchg_locks() {
    each(|engine| {
        for fence in [true, false] {
            let m = Machine::new(engine);
            let rounds = engine.rounds(5_000);
            let (flags, turn, counter) = (DATA, DATA + 128, DATA + 256);
            all(&m, 2, |a| {
                asm!(a; mov(esi, rounds); mov(r8, flags); mov(r9, rdi); xor(r9, 1););
                let top = here(a);
                asm!(a; mov(dword_ptr(r8 + rdi * 8), 1););
                if fence {
                    asm!(a; mov(dword_ptr(turn), r9d); mfence(););
                } else {
                    asm!(a; mov(eax, r9d); xchg(dword_ptr(turn), eax););
                }
                let mut enter = a.create_label();
                let wait = here(a);
                asm!(a;
                    pause();
                    cmp(dword_ptr(r8 + r9 * 8), 0);
                    je(enter);
                    cmp(dword_ptr(turn), r9d);
                    je(wait);
                    set_label(&mut enter);
                    mov(rax, qword_ptr(counter));
                    inc(rax);
                    mov(qword_ptr(counter), rax);
                    mov(dword_ptr(r8 + rdi * 8), 0);
                    dec(esi);
                    jnz(top);
                );
                end(a);
            });
            assert_eq!(
                m.memory.u64(counter),
                2 * u64::from(rounds),
                "fence {fence}"
            );
        }
    });
}

/// Both vCPUs write their own and read the other's, in rounds that start together. How often both
/// read 0.
fn store_buffer(engine: Engine, fence: bool) -> (u32, u32) {
    let m = Machine::new(engine);
    let rounds = engine.rounds(20_000);
    let (sync, x, out) = (DATA, DATA + 128, DATA + 0x1000);
    let got = all(&m, 2, |a| {
        asm!(a; xor(esi, esi); xor(ebp, ebp); mov(r9, rdi); xor(r9, 1); mov(r8, x); mov(r10, out););
        let top = here(a);
        // A barrier; the last of both clears.
        asm!(a;
            mov(eax, 1);
            lock.xadd(dword_ptr(sync), eax);
            lea(ecx, ptr(rsi + rsi * 2));
            add(ecx, ecx); // 6 increments a round: three barriers of two.
            add(ecx, 2);
        );
        let wait = here(a);
        asm!(a; cmp(dword_ptr(sync), ecx); jb(wait););
        asm!(a;
            mov(r11d, edi);
            shl(r11d, 7);
            mov(eax, r9d);
            shl(eax, 7);
            mov(dword_ptr(r8 + r11), 1);
        );
        if fence {
            asm!(a; mfence(););
        }
        asm!(a;
            mov(eax, dword_ptr(r8 + rax));
            mov(dword_ptr(r10 + r11), eax);
            lock.inc(dword_ptr(sync));
            add(ecx, 2);
        );
        let wait = here(a);
        asm!(a; cmp(dword_ptr(sync), ecx); jb(wait););
        let mut some = a.create_label();
        asm!(a;
            mov(eax, dword_ptr(out));
            or(eax, dword_ptr(out + 128));
            jnz(some);
            inc(ebp);
            set_label(&mut some);
            mov(dword_ptr(r8 + r11), 0);
            lock.inc(dword_ptr(sync));
            add(ecx, 2);
        );
        let wait = here(a);
        asm!(a; cmp(dword_ptr(sync), ecx); jb(wait); inc(esi); cmp(esi, rounds); jne(top); mov(eax, ebp););
        report(a);
        end(a);
    });
    assert_eq!(got[0], got[1]);
    (got[0][0], rounds)
}

#[test]
fn store_buffers() {
    each(|engine| {
        let (both, rounds) = store_buffer(engine, true);
        assert_eq!(both, 0, "forbidden with MFENCE, in {rounds} rounds");
        let (both, rounds) = store_buffer(engine, false);
        eprintln!("{engine:?}: both read 0 in {both} of {rounds} rounds without MFENCE (allowed)");
    });
}

#[test]
fn message_passing() {
    // Data and flag, written and read in order: TSO forbids the flag without its data.
    each(|engine| {
        let m = Machine::new(engine);
        let rounds = engine.rounds(50_000);
        let (data, flag) = (DATA, DATA + 0x1040);
        let got = all(&m, 2, |a| {
            let mut reader = a.create_label();
            let mut good = a.create_label();
            asm!(a; xor(ebp, ebp); mov(esi, 1); test(edi, edi); jnz(reader););
            let top = here(a);
            asm!(a; mov(dword_ptr(data), esi); mov(dword_ptr(flag), esi); inc(esi); cmp(esi, rounds + 1); jne(top););
            end(a);
            a.set_label(&mut reader).unwrap();
            asm!(a;
                mov(eax, dword_ptr(flag));
                mov(ecx, dword_ptr(data));
                cmp(ecx, eax);
                jae(good);
                inc(ebp);
                set_label(&mut good);
                cmp(eax, rounds);
                jne(reader);
                mov(eax, ebp);
            );
            report(a);
            end(a);
        });
        assert_eq!(got[1], [0]);
    });
}

#[test]
fn spin_locks_with_more_vcpus_than_processors() {
    each(|engine| {
        let m = Machine::new(engine);
        let n = 6;
        let rounds = engine.rounds(500);
        let (lock, counter) = (DATA, DATA + 64);
        all(&m, n, |a| {
            asm!(a; mov(esi, rounds););
            let top = here(a);
            let mut got = a.create_label();
            let mut spin = a.create_label();
            let mut take = a.create_label();
            asm!(a;
                nop();
                set_label(&mut take);
                mov(eax, 1);
                xchg(dword_ptr(lock), eax);
                test(eax, eax);
                jz(got);
                set_label(&mut spin);
                pause();
                cmp(dword_ptr(lock), 0);
                jne(spin);
                jmp(take);
                set_label(&mut got);
                mov(rax, qword_ptr(counter));
                add(rax, 1);
                mov(qword_ptr(counter), rax);
                mov(dword_ptr(lock), 0);
                dec(esi);
                jnz(top);
            );
            end(a);
        });
        assert_eq!(m.memory.u64(counter), n * u64::from(rounds));
    });
}

#[test]
fn shootdown_by_interrupt() {
    // vCPU 0 replaces a page and interrupts vCPU 1, which flushes and answers; from then on vCPU 1
    // must see the new page, in data and in code.
    each(|engine| {
        for code in [false, true] {
            let m = Machine::with_irqchip(engine);
            let t = m.tables(Paging::Long);
            m.fill(&t, Paging::Long);
            let apic = 0xfee0_0000u64;
            t.map(apic, apic, P | W);
            let va = 0x4000_0000u64;
            let pages = [DATA + 0x1000, DATA + 0x2000];
            for (i, pa) in pages.into_iter().enumerate() {
                m.memory.write(pa, &[0xb8, i as u8 + 1, 0, 0, 0, 0xc3]);
            }
            let pte = t.map(va, pages[0], P | W | A | D);
            let (answer, expect, ready) = (DATA, DATA + 64, DATA + 128);
            let rounds = engine.rounds(400);
            let flush = 0x1_8000;
            m.load(flush, 64, |a| {
                asm!(a;
                    push(rax);
                    push(rbx);
                    mov(rbx, va);
                    invlpg(ptr(rbx));
                    mov(eax, apic as u32);
                    mov(dword_ptr(rax + 0xb0), 0);
                    lock.inc(dword_ptr(answer));
                    pop(rbx);
                    pop(rax);
                    iretq();
                );
            });
            m.set_gate(0xf0, flush, 0, 0);
            m.load(ENTRY, 64, |a| {
                asm!(a;
                    mov(ebx, apic as u32);
                    mov(dword_ptr(rbx + 0xf0), 0x1ff);
                    xor(esi, esi);
                );
                let wait = here(a);
                asm!(a; pause(); cmp(dword_ptr(ready), 1); jne(wait););
                let top = here(a);
                asm!(a;
                    mov(eax, esi);
                    not(eax);
                    and(eax, 1);
                    shl(eax, 12);
                    lea(eax, ptr(rax + (pages[0] as i32 + 0x63)));
                    mov(qword_ptr(pte), rax);
                    mov(dword_ptr(rbx + 0x310), 0x0100_0000);
                    mov(dword_ptr(rbx + 0x300), 0x40f0);
                    inc(esi);
                );
                let wait = here(a);
                asm!(a;
                    pause();
                    cmp(dword_ptr(answer), esi);
                    jne(wait);
                    mov(eax, esi);
                    and(eax, 1);
                    inc(eax);
                    mov(dword_ptr(expect), eax);
                );
                // Some time for vCPU 1 to look.
                asm!(a; mov(ecx, 200););
                let spin = here(a);
                asm!(a; dec(ecx); jnz(spin); mov(dword_ptr(expect), 0); cmp(esi, rounds); jne(top); mov(dword_ptr(ready), 2););
                end(a);
            });
            m.load(SECOND, 64, |a| {
                asm!(a;
                    mov(ebx, apic as u32);
                    mov(dword_ptr(rbx + 0xf0), 0x1ff);
                    mov(r8, va);
                    xor(ebp, ebp);
                    sti();
                    mov(dword_ptr(ready), 1);
                );
                let top = here(a);
                let mut good = a.create_label();
                asm!(a; mov(ecx, dword_ptr(expect)););
                if code {
                    asm!(a; call(r8););
                } else {
                    asm!(a; mov(eax, dword_ptr(r8 + 1)););
                }
                // Wrong only if the expectation stood before and after.
                asm!(a;
                    cmp(eax, ecx);
                    je(good);
                    test(ecx, ecx);
                    jz(good);
                    cmp(dword_ptr(expect), ecx);
                    jne(good);
                    inc(ebp);
                    set_label(&mut good);
                    cmp(dword_ptr(ready), 2);
                    jne(top);
                    mov(eax, ebp);
                );
                report(a);
                end(a);
            });
            let got = m.finish_all(vec![m.long(0, ENTRY), m.long(1, SECOND)]);
            assert_eq!(got[1], [0], "code {code}");
        }
    });
}

#[test]
fn trampoline() {
    // INIT and start-up IPIs; the other vCPU goes from real mode to long mode by itself.
    each(|engine| {
        let m = Machine::with_irqchip(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        let apic = 0xfee0_0000u64;
        t.map(apic, apic, P | W);
        let ready = DATA;
        m.load(REAL, 16, |a| {
            // A GDTR and far jumps, hand-made: the code runs at CS = 0x100.
            asm!(a;
                cli();
                mov(ax, cs);
                mov(ds, ax);
                db(&[0x66, 0x0f, 0x01, 0x16, 0x80, 0x00]); // lgdt [0x80]
                mov(eax, cr0);
                or(al, 1);
                mov(cr0, eax);
                db(&[0x66, 0xea]);
                dd(&[(REAL + 0x100) as u32]);
                dw(&[CODE32]);
            );
        });
        m.memory.write(REAL + 0x80, &GDT_LIMIT.to_le_bytes());
        m.memory.write(REAL + 0x82, &(GDT as u32).to_le_bytes());
        m.load(REAL + 0x100, 32, |a| {
            asm!(a; mov(ax, u32::from(KDATA)); mov(ds, eax); mov(ss, eax););
            set_cr(a, cr4, 0x620);
            set_cr(a, cr3, t.root);
            wrmsr(a, 0xc000_0080, 0xd00);
            set_cr(a, cr0, 0x8001_0033);
            asm!(a; db(&[0xea]); dd(&[SECOND as u32]); dw(&[CODE]););
        });
        m.load(SECOND, 64, |a| {
            asm!(a;
                mov(esp, AP_STACKS as u32 + 0x2000);
                mov(ebx, apic as u32);
                mov(eax, dword_ptr(rbx + 0x20));
                shr(eax, 24);
            );
            report(a);
            asm!(a; mov(eax, 1); mov(r15, 0x1234_5678_9abcu64); lock.xadd(qword_ptr(ready), rax););
            end(a);
        });
        m.load(ENTRY, 64, |a| {
            asm!(a;
                mov(ebx, apic as u32);
                mov(dword_ptr(rbx + 0x310), 0x0100_0000);
                mov(dword_ptr(rbx + 0x300), 0x4500);
                mov(dword_ptr(rbx + 0x300), (0x4600 | (REAL >> 12)) as i32);
                mov(dword_ptr(rbx + 0x300), (0x4600 | (REAL >> 12)) as i32);
            );
            let wait = here(a);
            asm!(a; pause(); cmp(qword_ptr(ready), 0); je(wait););
            end(a);
        });
        let bsp = m.long(0, ENTRY);
        let ap = m.vm.create_vcpu(1);
        let got = m.finish_all(vec![bsp, ap]);
        assert_eq!(got, [vec![], vec![1]]);
    });
}
