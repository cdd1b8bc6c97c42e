//! User code in 64-bit mode: what it reads, writes and takes exceptions for, all over the address space.
//!
//! The translator has the host's MMU map the guest's user pages, once they are worth it. With
//! `ANYKVM_WINDOWS=always` in the environment it does so at once.

use conformance::asm::*;
use conformance::backend::Vcpu;
use conformance::layout::*;
use conformance::tables::*;
use conformance::{Exit, Machine, asm, each};
use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;

/// Where programs lie that are not position-independent.
pub(crate) const LOW: u64 = 0x40_0000;
/// Where Linux puts position-independent programs.
pub(crate) const PIE: u64 = 0x5555_5555_4000;
/// Where stacks and libraries are.
pub(crate) const HIGH: u64 = 0x7fff_f000_0000;
/// User pages that are mapped to themselves, for results.
pub(crate) const RESULTS: u64 = 0x9_0000;
/// Frames for the pages of tests.
const FRAMES: u64 = DATA;
pub(crate) const USER: u64 = P | W | U;
pub(crate) const ALL: u64 = USER | A | D;
/// IOPL 3: user code may report.
pub(crate) const FLAGS: u32 = 0x3002;
/// The arithmetic flags.
const ARITH: u64 = 0x8d5;
const HANDLER: u64 = 0x1_8000;
/// The top of user code's stack, where processes have it.
pub(crate) const HIGH_STACK: u64 = 0x7ffd_0000_4000;
/// Its memory.
const STACK_FRAMES: u64 = 48 << 20;

pub(crate) fn frame(n: u64) -> u64 {
    FRAMES + 4096 * n
}

pub(crate) fn address_space(m: &Machine) -> PageTables<'_> {
    let t = m.tables(Paging::Long);
    m.fill(&t, Paging::Long);
    make_room(m, &t);
    map_stack(&t);
    t
}

pub(crate) fn map_stack(t: &PageTables<'_>) {
    for i in 0..4 {
        t.map(HIGH_STACK - 4096 * (i + 1), STACK_FRAMES + 4096 * i, ALL);
    }
}

/// Small pages can be mapped at [`LOW`].
pub(crate) fn make_room(m: &Machine, t: &PageTables<'_>) {
    m.memory.set_u64(t.entry(LOW, 2), 0);
}

/// A kernel that runs the user code once.
pub(crate) fn user(m: &Machine, program: impl FnOnce(&mut CodeAssembler)) {
    m.load(ENTRY, 64, |a| {
        call_user(a, SECOND, HIGH_STACK, FLAGS);
        end(a);
    });
    m.load(SECOND, 64, |a| {
        program(a);
        asm!(a; int(0x80););
    });
}

/// A vCPU in user code from the start.
pub(crate) fn user_vcpu(m: &Machine, id: u64, root: u64, rip: u64) -> Vcpu {
    let v = m.long(id, rip);
    let mut s = v.sregs();
    s.cr3 = root;
    for (segment, selector) in [(&mut s.cs, USER_CODE), (&mut s.ss, USER_DATA)] {
        segment.selector = selector;
        segment.dpl = 3;
    }
    v.set_sregs(&s);
    let mut r = v.regs();
    r.rflags = FLAGS.into();
    v.set_regs(&r);
    v
}

/// Page faults are recorded, the host may act, and the instruction is executed again.
fn mend_faults(m: &Machine) {
    m.load(HANDLER, 64, |a| {
        asm!(a;
            push(rax);
            push(rcx);
            mov(rcx, qword_ptr(LOG));
            inc(qword_ptr(LOG));
            shl(rcx, 6);
            mov(qword_ptr(rcx + LOG_FIRST as i32), 14);
        );
        for i in 0..6 {
            asm!(a;
                mov(rax, qword_ptr(rsp + 16 + 8 * i));
                mov(qword_ptr(rcx + LOG_FIRST as i32 + 8 + 8 * i), rax);
            );
        }
        asm!(a;
            mov(rax, cr2);
            mov(qword_ptr(rcx + LOG_FIRST as i32 + 56), rax);
        );
        host(a);
        asm!(a; invlpg(byte_ptr(rax)); pop(rcx); pop(rax); add(rsp, 8); iretq(););
    });
    m.set_gate(14, HANDLER, 0, 0);
}

/// Runs to the end; at each fault, and where the program asks for it, `act` changes things.
pub(crate) fn run(m: &Machine, mut act: impl FnMut(u64)) -> Vec<u32> {
    let mut v = m.long(0, ENTRY);
    let mut n = 0;
    m.finish_with(&mut v, |_, exit| {
        assert!(matches!(exit, Exit::Out(PORT_HOST, _)), "{exit:?}");
        act(n);
        n += 1;
    })
}

#[test]
fn all_over_the_address_space() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = address_space(&m);
        for (i, va) in [LOW, PIE, HIGH].into_iter().enumerate() {
            t.map(va, frame(2 * i as u64), USER);
            t.map(va + 4096, frame(2 * i as u64 + 1), USER);
        }
        user(&m, |a| {
            for va in [LOW, PIE, HIGH] {
                asm!(a;
                    mov(rbx, va);
                    lea(eax, ptr(rbx + 0x1234));
                    mov(qword_ptr(rbx + 8), rax);
                    add(qword_ptr(rbx + 8), rax);
                    mov(rcx, 4096u64 / 8);
                    neg(rcx);
                    mov(qword_ptr(rbx + rcx * 8 + 0x2008), rax);
                    mov(eax, dword_ptr(rbx + 8));
                );
                report(a);
            }
            // One instruction, pointers to both ends.
            asm!(a; mov(rbx, LOW); mov(rdx, HIGH); mov(ecx, 100); xor(esi, esi););
            let top = here(a);
            asm!(a;
                add(qword_ptr(rbx + 16), 3);
                mov(rax, qword_ptr(rbx + 16));
                add(rsi, rax);
                xchg(rbx, rdx);
                dec(ecx);
                jnz(top);
                mov(eax, esi);
            );
            report(a);
            // And stacks.
            let mut f = a.create_label();
            let mut over = a.create_label();
            asm!(a;
                jmp(over);
                set_label(&mut f);
                push(rbp);
                mov(rbp, rsp);
                push(rcx);
                add(esi, dword_ptr(rbp - 8));
                leave();
                ret();
                set_label(&mut over);
                mov(rdi, rsp);
                mov(rsp, LOW + 0x1f00);
                mov(rdx, HIGH + 0x1f00);
                mov(ecx, 60);
                xor(esi, esi);
            );
            let top = here(a);
            asm!(a;
                call(f);
                push(rcx);
                pop(r14);
                add(rsi, r14);
                xchg(rsp, rdx);
                dec(ecx);
                jnz(top);
                mov(rsp, rdi);
                mov(eax, esi);
            );
            report(a);
        });
        let got = run(&m, |_| ());
        let twice = |va: u64| (va as u32).wrapping_add(0x1234).wrapping_mul(2);
        let want = [
            twice(LOW),
            twice(PIE),
            twice(HIGH),
            2 * 3 * 1275,
            2 * 60 * 61 / 2,
        ];
        assert_eq!(got, want, "{got:x?}");
        for (i, va) in [LOW, PIE, HIGH].into_iter().enumerate() {
            let at = frame(2 * i as u64 + 1) + 8;
            assert_eq!(m.memory.u64(at), u64::from(va as u32 + 0x1234));
        }
        assert_eq!(m.memory.u64(frame(0) + 16), 150);
        assert_eq!(m.memory.u64(frame(4) + 16), 150);
    });
}

/// An access: its name, and what makes it of `[rbx + disp]`.
type Make = fn(&mut CodeAssembler, i32);

/// Whether it is a write, and its size.
const ACCESSES: [(bool, u64, Make); 8] = [
    (false, 8, |a, d| asm!(a; mov(rax, qword_ptr(rbx + d)); )),
    (true, 8, |a, d| asm!(a; mov(qword_ptr(rbx + d), rax); )),
    (true, 4, |a, d| asm!(a; add(dword_ptr(rbx + d), eax); )),
    (false, 4, |a, d| asm!(a; mov(r14d, dword_ptr(rbx + d)); )),
    (true, 8, |a, d| asm!(a; mov(qword_ptr(rbx + d), r13); )),
    (
        false,
        16,
        |a, d| asm!(a; movups(xmm1, xmmword_ptr(rbx + d)); ),
    ),
    (
        true,
        8,
        |a, d| asm!(a; lock.xadd(qword_ptr(rbx + d), rax); ),
    ),
    (true, 1, |a, d| asm!(a; mov(byte_ptr(rbx + rsi + d), al); )),
];

#[test]
fn wild_pointers() {
    // Base, displacement.
    let places: [(u64, i32); 30] = [
        (0, 0),
        (0, 8),
        (0, -8),
        (0x1_0000, 0),
        (8, -16),
        (0x100_0000_0000, 0),
        (0x100_0000_0000 - 8, 8),
        (0x100_0000_0000 - 4, 0),
        (0x3fff_ffff_ffff, 0),
        (0x3fff_ffff_fff8, 0),
        (0x3fff_ffff_ff00, 0x108),
        (0x4000_0000_0000, -8),
        (0x4000_0000_0000, 8),
        (0x4fff_ffff_fff0, 0x18),
        (0x4fff_ffff_fff0, 8),
        (0x5000_0000_0000, -8),
        (0x5000_0000_0000, 8),
        (0x5000_0000_1000, 0),
        (0x6000_0000_0000, -0x8_0000),
        (0x7fff_ffff_f000, 0),
        (0x7fff_ffff_fffc, 0),
        (0x7fff_ffff_0000, 0x1_0000),
        (0x8000_0000_0000, 0),
        (0x8000_0000_0000, -0x20),
        (0xffff_7fff_ffff_ffff, 0),
        (0xffff_8000_0000_0000, 0),
        (0xffff_8000_0000_0000, -8),
        (0xffff_ffff_8000_0000, 0x10),
        (0x0001_5555_5555_5000, 0),
        (HIGH + 0x1000, 0x7ff_f000),
    ];
    // These are the user's.
    let mapped = [0x4000_0000_0000u64, 0x5000_0000_0000];
    let supervisor = 0x6000_0000_0000u64 - 0x8_0000;
    each(|engine| {
        let m = Machine::new(engine);
        let t = address_space(&m);
        for (i, va) in mapped.into_iter().enumerate() {
            t.map(va, frame(i as u64), USER);
        }
        t.map(supervisor, frame(8), P | W);
        const ROUNDS: usize = 3;
        let mut a = CodeAssembler::new(64).expect("64 bits");
        let mut at = vec![];
        for (write, size, make) in ACCESSES {
            let _ = (write, size);
            asm!(a; mov(ecx, ROUNDS as u32););
            let top = here(&mut a);
            for (i, &(base, disp)) in places.iter().enumerate() {
                let mut label = a.create_label();
                asm!(a; mov(rbx, base); xor(esi, esi); xor(edi, edi); xor(eax, eax););
                attempt(&mut a, |a| {
                    if i % 2 == 0 {
                        asm!(a; stc(););
                    } else {
                        asm!(a; clc(););
                    }
                    a.set_label(&mut label).expect("a new label");
                    make(a, disp);
                });
                // The flag is live, but where the instruction has written it.
                asm!(a; adc(edi, 0););
                at.push(label);
            }
            asm!(a; dec(ecx); jnz(top););
            host(&mut a);
        }
        asm!(a; int(0x80););
        let code = a
            .assemble_options(SECOND, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)
            .expect("a program that can be encoded");
        assert!(code.inner.code_buffer.len() < 0x1_0000);
        m.memory.write(SECOND, &code.inner.code_buffer);
        m.load(ENTRY, 64, |a| {
            call_user(a, SECOND, HIGH_STACK, FLAGS);
            end(a);
        });
        let mut n = 0;
        run(&m, |_| {
            let (write, size, _) = ACCESSES[n];
            let mut want = vec![];
            for (i, &(base, disp)) in places.iter().enumerate() {
                let first = base.wrapping_add(disp as i64 as u64);
                let last = first.wrapping_add(size - 1);
                let canonical = |x: u64| ((x as i64) << 16 >> 16) as u64 == x;
                let error = u64::from(write) << 1 | 4;
                let label = &at[n * places.len() + i];
                let rip = code.label_ip(label).expect("a label");
                let fault = if !canonical(first) || !canonical(last) {
                    (13, 0, None)
                } else if mapped.contains(&(first & !0xfff)) && first >> 12 == last >> 12 {
                    continue;
                } else if first >> 12 == supervisor >> 12 || first < MEMORY {
                    (14, error | 1, Some(first))
                } else {
                    (14, error, Some(first))
                };
                want.push((fault, rip, i % 2 == 0));
            }
            let faults = m.faults();
            assert_eq!(faults.len(), ROUNDS * want.len(), "access {n}: {faults:x?}");
            for (f, ((vector, error, address), rip, carry)) in
                faults.iter().zip(want.iter().cycle().cloned())
            {
                assert_eq!((f.vector, f.error), (vector, error), "access {n}: {f:x?}");
                assert_eq!(f.rip, rip, "access {n}: {f:x?}");
                if let Some(address) = address {
                    assert_eq!(f.cr2, address, "access {n}: {f:x?}");
                }
                // XADD and ADD write the flag, so it is not live there.
                if !matches!(n, 2 | 6) {
                    assert_eq!(f.rflags & 1 != 0, carry, "access {n}: {f:x?}");
                }
            }
            m.memory.set_u64(LOG, 0);
            n += 1;
        });
        assert_eq!(n, ACCESSES.len());
    });
}

#[test]
fn flags_at_faults() {
    // The page is absent; the handler maps it, and the flags are still what they were.
    type Access = (bool, fn(&mut CodeAssembler));
    let accesses: [Access; 12] = [
        (false, |a| asm!(a; mov(rdx, qword_ptr(rbx + 8)); )),
        (true, |a| asm!(a; mov(qword_ptr(rbx + 8), rdx); )),
        (false, |a| asm!(a; mov(r13, qword_ptr(rbx + 8)); )),
        (true, |a| asm!(a; mov(qword_ptr(rbx + 8), r14); )),
        (true, |a| asm!(a; push(rdx); )),
        (true, |a| asm!(a; push(r15); )),
        (false, |a| asm!(a; pop(rdx); )),
        (false, |a| asm!(a; pop(r15); )),
        (true, |a| {
            let mut next = a.create_label();
            asm!(a; call(next); nop(); set_label(&mut next););
        }),
        (false, |a| asm!(a; movups(xmm2, xmmword_ptr(rbx + 8)); )),
        (true, |a| asm!(a; movups(xmmword_ptr(rbx + 8), xmm2); )),
        (true, |a| asm!(a; not(qword_ptr(rbx + 8)); )),
    ];
    each(|engine| {
        for high in [true, false] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            mend_faults(&m);
            let base = if high { HIGH } else { LOW };
            let va = |i: usize| base + 4096 * i as u64;
            let ptes: Vec<u64> = (0..2 * accesses.len())
                .map(|i| t.map(va(i), 0, 0))
                .collect();
            user(&m, |a| {
                asm!(a; mov(rbp, rsp););
                for i in 0..2 * accesses.len() {
                    let (_, make) = accesses[i / 2];
                    asm!(a; mov(rbx, va(i)); lea(rsp, qword_ptr(rbx + 0x800)););
                    if i % 2 == 0 {
                        asm!(a; mov(eax, 0x7fff_ffff); add(eax, 1);); // OF, SF, AF, PF
                    } else {
                        asm!(a; xor(eax, eax); sub(eax, 1);); // CF, SF, AF, PF
                    }
                    make(a);
                    asm!(a; mov(rsp, rbp); lahf(); seto(al); movzx(eax, ax););
                    report(a);
                }
            });
            let mut next = 0;
            let got = run(&m, |_| {
                m.memory.set_u64(ptes[next], frame(next as u64) | USER);
                next += 1;
            });
            let faults = m.faults();
            assert_eq!(faults.len(), 2 * accesses.len());
            for (i, f) in faults.iter().enumerate() {
                let (write, _) = accesses[i / 2];
                let flags = if i % 2 == 0 { 0x894 } else { 0x95 };
                assert_eq!(f.error, 4 | u64::from(write) << 1, "{i}: {f:x?}");
                assert_eq!(f.cr2 & !0xfff, va(i), "{i}: {f:x?}");
                assert_eq!(f.rflags & ARITH, flags, "{i}, high {high}: {f:x?}");
                let lahf_image = (flags as u32 & 0xd5) | 2;
                assert_eq!(got[i], lahf_image << 8 | (flags as u32 >> 11 & 1), "{i}");
                assert_ne!(m.memory.u64(ptes[i]) & A, 0);
                assert_eq!(m.memory.u64(ptes[i]) & D != 0, write, "{i}");
            }
        }
    });
}

#[test]
fn carry_through_faults() {
    each(|engine| {
        for va in [LOW, PIE, HIGH] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            mend_faults(&m);
            let ptes: Vec<u64> = (0..4).map(|i| t.map(va + 4096 * i, 0, 0)).collect();
            user(&m, |a| {
                asm!(a; mov(rbx, va); mov(eax, 5););
                asm!(a; stc(); mov(qword_ptr(rbx), rax); adc(rax, 1););
                report(a); // 7
                asm!(a; stc(); adc(qword_ptr(rbx + 0x1000), rax); mov(rax, qword_ptr(rbx + 0x1000)););
                report(a); // 8
                asm!(a; stc(); mov(r14, rbx); adc(rax, qword_ptr(r14 + 0x2000)););
                report(a); // 9
                asm!(a; mov(r13d, 1); mov(r15d, 2); cmp(r13, r15); sbb(qword_ptr(rbx + r15 * 8 + 0x3000), r13););
                asm!(a; mov(rax, qword_ptr(rbx + 0x3010)););
                report(a); // -2
            });
            let got = run(&m, |n| {
                m.memory.set_u64(ptes[n as usize], frame(n) | USER);
            });
            assert_eq!(got, [7, 8, 9, -2i32 as u32]);
            let carry: Vec<u64> = m.faults().iter().map(|f| f.rflags & 1).collect();
            assert_eq!(carry, [1; 4]);
            assert_eq!(
                m.page_faults(),
                [
                    (6, va),
                    (6, va + 0x1000),
                    (4, va + 0x2000),
                    (6, va + 0x3010)
                ]
            );
        }
    });
}

#[test]
fn accessed_and_dirty() {
    each(|engine| {
        for (va, level) in [(LOW, 1), (HIGH, 1), (PIE & !0x1f_ffff, 2)] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            mend_faults(&m);
            let pte = match level {
                1 => t.map(va, frame(0), USER),
                _ => t.map_large(2, va, 0x200_0000, USER),
            };
            // The neighbour was accessed before, and may be mapped with it.
            let beside = (level == 1).then(|| t.map(va + 4096, frame(1), USER | A));
            let bits = |at: u64| m.memory.u64(at) & (A | D);
            user(&m, |a| {
                asm!(a; mov(rbx, va););
                for _ in 0..2 {
                    asm!(a; mov(eax, dword_ptr(rbx)););
                    host(a);
                    asm!(a; mov(dword_ptr(rbx + 4), eax););
                    host(a);
                }
                if beside.is_some() {
                    asm!(a; mov(eax, dword_ptr(rbx + 0x1000)););
                    host(a);
                    asm!(a; inc(dword_ptr(rbx + 0x1000)););
                    host(a);
                }
                // Read-only: then the handler allows it.
                asm!(a; lea(rdx, qword_ptr(rbx + 0x2000)); mov(eax, dword_ptr(rdx)); mov(dword_ptr(rdx), 7););
            });
            let third = (level == 1).then(|| t.map(va + 8192, frame(2), P | U));
            let mut seen = vec![];
            run(&m, |n| {
                seen.push(bits(pte));
                if let Some(beside) = beside
                    && n >= 4
                {
                    seen.push(bits(beside));
                }
                if n == 1 {
                    // No flush: the processor may go on without setting them.
                    m.memory.set_u64(pte, m.memory.u64(pte) & !D);
                    m.memory.set_u64(pte, m.memory.u64(pte) | D);
                }
                if n == 6
                    && let Some(third) = third
                {
                    assert_eq!(bits(third), A);
                    m.memory.set_u64(third, frame(2) | USER | A);
                }
            });
            assert_eq!(seen[..4], [A, A | D, A | D, A | D]);
            if let Some(third) = third {
                assert_eq!(seen[4..8], [A | D, A, A | D, A | D]);
                assert_eq!(m.page_faults(), [(7, va + 0x2000)]);
                assert_eq!(bits(third), A | D);
                assert_eq!(m.memory.u32(frame(2)), 7);
            }
        }
    });
}

/// How the kernel makes changes known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    Invlpg,
    Cr3,
    Pge,
    /// PCID in use.
    Pcid,
}

fn flush(a: &mut CodeAssembler, how: Flush, va: u64) {
    match how {
        Flush::Invlpg => asm!(a; mov(rax, va); invlpg(byte_ptr(rax)); ),
        Flush::Cr3 | Flush::Pcid => asm!(a; mov(rax, cr3); mov(cr3, rax); ),
        Flush::Pge => asm!(a; mov(rax, cr4); xor(eax, 0x80); mov(cr4, rax); ),
    }
}

#[test]
fn remapped_and_unmapped() {
    each(|engine| {
        for how in [Flush::Invlpg, Flush::Cr3, Flush::Pge, Flush::Pcid] {
            for va in [LOW, HIGH] {
                let m = Machine::new(engine);
                let t = address_space(&m);
                for n in 0..4 {
                    m.memory.set_u64(frame(n), 100 + n);
                    m.memory.set_u64(frame(n) + 8, 0);
                }
                let pte = t.map(va, frame(0), ALL);
                t.map(va + 4096, frame(1), ALL);
                let rounds = 24u64;
                // Frames 0, 2, 3, none, ...
                let entry = |i: u64| match i % 4 {
                    0 => frame(0) | ALL,
                    1 => frame(2) | USER,
                    2 => frame(3) | P | U | A,
                    _ => frame(3) | ALL & !P,
                };
                m.load(ENTRY, 64, |a| {
                    if how == Flush::Pcid {
                        or_cr(a, cr4, 1 << 17);
                    }
                    for i in 0..rounds {
                        asm!(a; mov(rax, entry(i)); mov(qword_ptr(pte), rax););
                        flush(a, how, va);
                        call_user(a, SECOND, HIGH_STACK, FLAGS);
                    }
                    end(a);
                });
                m.load(SECOND, 64, |a| {
                    asm!(a; mov(rbx, va); xor(esi, esi); mov(ecx, 20););
                    let top = here(a);
                    asm!(a; add(rsi, qword_ptr(rbx + 0x1000)); dec(ecx); jnz(top); xor(eax, eax););
                    attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx)); ));
                    report(a);
                    attempt(a, |a| asm!(a; inc(qword_ptr(rbx + 8)); ));
                    asm!(a; mov(eax, esi););
                    report(a);
                    asm!(a; int(0x80););
                });
                let got = run(&m, |_| ());
                let want: Vec<u32> = (0..rounds)
                    .flat_map(|i| [[100, 102, 103, 0][i as usize % 4], 20 * 101])
                    .collect();
                assert_eq!(got, want, "{how:?} at {va:#x}");
                let faults: Vec<(u64, u64)> = (0..rounds / 4)
                    .flat_map(|_| [(7, va + 8), (4, va), (6, va + 8)])
                    .collect();
                assert_eq!(m.page_faults(), faults, "{how:?} at {va:#x}");
                let counts: Vec<u64> = (0..4).map(|n| m.memory.u64(frame(n) + 8)).collect();
                assert_eq!(counts, [rounds / 4, 0, rounds / 4, 0], "{how:?} at {va:#x}");
            }
        }
    });
}

#[test]
fn changed_before_the_flush() {
    // An entry is changed, its neighbour is mapped before the flush, and then comes the flush.
    each(|engine| {
        for change in 0..2 {
            let m = Machine::new(engine);
            let t = address_space(&m);
            let first = t.map(HIGH, 0, 0);
            let second = t.map(HIGH + 4096, frame(1), ALL);
            m.memory.set_u64(frame(1), 1);
            m.memory.set_u64(frame(7), 7);
            let changed = [frame(1) | P | U | A, frame(7) | ALL][change];
            t.map(HIGH + 0x5000, frame(5), ALL);
            m.load(ENTRY, 64, |a| {
                // An engine may guess at first where an instruction's operand lies.
                for _ in 0..4 {
                    for va in [HIGH + 0x5000, HIGH + 0x1000] {
                        asm!(a; mov(rbx, va););
                        call_user(a, SECOND, HIGH_STACK, FLAGS);
                    }
                }
                asm!(a;
                    mov(rax, changed);
                    mov(qword_ptr(second), rax);
                    mov(rax, frame(0) | ALL);
                    mov(qword_ptr(first), rax);
                    mov(rbx, HIGH);
                );
                call_user(a, SECOND, HIGH_STACK, FLAGS);
                asm!(a; mov(rbx, HIGH + 0x1000); invlpg(byte_ptr(rbx)););
                call_user(a, SECOND, HIGH_STACK, FLAGS);
                end(a);
            });
            m.load(SECOND, 64, |a| {
                attempt(a, |a| asm!(a; inc(qword_ptr(rbx)); ));
                asm!(a; int(0x80););
            });
            run(&m, |_| ());
            let want: &[(u64, u64)] = [&[(7, HIGH + 4096)][..], &[]][change];
            assert_eq!(m.page_faults(), want, "change {change}");
            assert_eq!(m.memory.u64(frame(0)), 1);
            assert_eq!(m.memory.u64(frame(1)), 5);
            assert_eq!(m.memory.u64(frame(7)), 7 + change as u64);
        }
    });
}

#[test]
fn upper_levels_and_large_pages() {
    each(|engine| {
        for how in [Flush::Invlpg, Flush::Cr3, Flush::Pge] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            let va = HIGH;
            let (large, other) = (0x200_0000u64, 0x220_0000u64);
            for (at, value) in [
                (large, 1),
                (large + 0x5000, 2),
                (other, 3),
                (other + 0x5000, 4),
                (frame(5), 5),
            ] {
                m.memory.set_u64(at, value);
            }
            t.map(va, large, ALL);
            t.map(va + 0x5000, frame(5), ALL);
            let pde = t.entry(va, 2);
            let pdpte = t.entry(va, 3);
            let table = m.memory.u64(pde);
            let directory = m.memory.u64(pdpte);
            let steps = [
                (pde, large | ALL | PS),
                (pde, table | A),
                (pde, other | ALL | PS),
                (pde, other | P | U | A | PS),
                (pde, table & !U),
                (pde, table & !W),
                (pde, 0),
                (pde, table),
                (pdpte, directory & !U),
                (pdpte, directory & !W),
                (pdpte, 0),
                (pdpte, directory),
            ];
            let want = [
                vec![1, 2],
                vec![1, 5],
                vec![3, 4],
                vec![3, 4],
                vec![0, 0],
                vec![1, 5],
                vec![0, 0],
                vec![1, 5],
                vec![0, 0],
                vec![1, 5],
                vec![0, 0],
                vec![1, 5],
            ];
            let (far, near) = (va + 0x5000, va);
            let errors: [&[(u64, u64)]; 12] = [
                &[],
                &[],
                &[],
                &[(7, far + 8)],
                &[(5, near), (5, far), (7, far + 8)],
                &[(7, far + 8)],
                &[(4, near), (4, far), (6, far + 8)],
                &[],
                &[(5, near), (5, far), (7, far + 8)],
                &[(7, far + 8)],
                &[(4, near), (4, far), (6, far + 8)],
                &[],
            ];
            m.load(ENTRY, 64, |a| {
                for (at, value) in steps {
                    asm!(a; mov(rax, value); mov(qword_ptr(at), rax););
                    flush(a, how, near);
                    if how == Flush::Invlpg {
                        flush(a, how, far);
                    }
                    call_user(a, SECOND, HIGH_STACK, FLAGS);
                }
                end(a);
            });
            m.load(SECOND, 64, |a| {
                asm!(a; mov(rbx, va); xor(eax, eax););
                attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx)); ));
                report(a);
                asm!(a; xor(eax, eax););
                attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx + 0x5000)); ));
                report(a);
                attempt(a, |a| asm!(a; mov(dword_ptr(rbx + 0x5008), eax); ));
                asm!(a; int(0x80););
            });
            assert_eq!(run(&m, |_| ()), want.concat(), "{how:?}");
            assert_eq!(m.page_faults(), errors.concat(), "{how:?}");
            assert_eq!(m.memory.u64(large + 0x5008), 2);
            assert_eq!(m.memory.u64(other + 0x5008), 4);
            assert_eq!(m.memory.u64(frame(5) + 8), 5);
        }
    });
}

#[test]
fn code_in_writable_pages() {
    each(|engine| {
        for va in [LOW, PIE, HIGH] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            t.map(va, frame(0), USER);
            let rounds = engine.rounds(600);
            user(&m, |a| {
                // mov eax, value; ret
                asm!(a;
                    mov(rbx, va);
                    mov(rdi, rsp);
                    xor(esi, esi);
                    xor(ebp, ebp);
                    mov(byte_ptr(rbx), 0xb8);
                    mov(byte_ptr(rbx + 5), 0xc3);
                    // From here on the page is written, and is no code yet.
                    mov(dword_ptr(rbx + 0x800), 1);
                );
                let top = here(a);
                asm!(a;
                    mov(dword_ptr(rbx + 1), esi);
                    call(rbx);
                    add(ebp, eax);
                    inc(dword_ptr(rbx + 0x800));
                    // And by the stack.
                    lea(rsp, qword_ptr(rbx + 0x20));
                    mov(rdx, 0x00c3_0000_0007_b866u64 >> 8);
                    push(rdx);
                    mov(rsp, rdi);
                    lea(rdx, qword_ptr(rbx + 0x18));
                    call(rdx);
                    add(ebp, eax);
                    inc(esi);
                    cmp(esi, rounds);
                    jne(top);
                    mov(eax, ebp);
                );
                report(a);
                asm!(a; mov(eax, dword_ptr(rbx + 0x800)););
                report(a);
            });
            let sum = rounds * (rounds - 1) / 2 + 7 * rounds;
            assert_eq!(run(&m, |_| ()), [sum, rounds + 1], "{va:#x}");
        }
    });
}

#[test]
fn crossing_into_an_absent_page() {
    type Access = (bool, fn(&mut CodeAssembler));
    let accesses: [Access; 8] = [
        (false, |a| asm!(a; mov(rax, qword_ptr(rbx - 3)); )),
        (true, |a| asm!(a; mov(qword_ptr(rbx - 3), rax); )),
        (true, |a| asm!(a; add(qword_ptr(rbx - 5), rax); )),
        (true, |a| asm!(a; lock.add(dword_ptr(rbx - 2), eax); )),
        (false, |a| asm!(a; movups(xmm0, xmmword_ptr(rbx - 8)); )),
        (true, |a| asm!(a; movups(xmmword_ptr(rbx - 15), xmm0); )),
        (true, |a| asm!(a; mov(qword_ptr(rbx - 1), r15); )),
        (true, |a| asm!(a; lea(rsp, qword_ptr(rbx + 4)); push(rax); )),
    ];
    each(|engine| {
        for va in [LOW, HIGH] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            mend_faults(&m);
            let pages = |i: usize| (va + 0x2000 * i as u64, 2 * i as u64);
            let ptes: Vec<u64> = (0..accesses.len())
                .map(|i| {
                    let (va, n) = pages(i);
                    m.memory.write(frame(n), &[0x11; 8192]);
                    t.map(va, frame(n), USER);
                    t.map(va + 4096, 0, 0)
                })
                .collect();
            user(&m, |a| {
                asm!(a; mov(rbp, rsp););
                for (i, (_, make)) in accesses.iter().enumerate() {
                    asm!(a;
                        mov(rbx, pages(i).0 + 4096);
                        mov(rax, 0x2222_2222_2222_2222u64);
                        movq(xmm0, rax);
                        movlhps(xmm0, xmm0);
                        mov(r15, rax);
                    );
                    make(a);
                    asm!(a; mov(rsp, rbp););
                    if i == 0 {
                        report(a);
                    }
                }
            });
            let got = run(&m, |n| {
                let (_, f) = pages(n as usize);
                // Nothing has been written yet.
                assert_eq!(m.memory.read(frame(f) + 4096 - 16, 32), [0x11; 32], "{n}");
                m.memory.set_u64(ptes[n as usize], frame(f + 1) | USER);
            });
            assert_eq!(got, [0x1111_1111]);
            let want: Vec<(u64, u64)> = accesses
                .iter()
                .enumerate()
                .map(|(i, &(write, _))| (4 | u64::from(write) << 1, pages(i).0 + 4096))
                .collect();
            assert_eq!(m.page_faults(), want);
            for (i, size, before, value) in [
                (1, 8, 3, 0x22),
                (2, 8, 5, 0x33),
                (3, 4, 2, 0x33),
                (5, 16, 15, 0x22),
                (6, 8, 1, 0x22),
                (7, 8, 4, 0x22),
            ] {
                let at = frame(2 * i + 1) - before;
                let mut want = vec![value; size];
                want.push(0x11);
                want.insert(0, 0x11);
                assert_eq!(m.memory.read(at - 1, size + 2), want, "{i}");
            }
        }
    });
}

#[test]
fn stacks_that_grow() {
    each(|engine| {
        for va in [LOW, HIGH] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            mend_faults(&m);
            let pages = 10u64;
            let ptes: Vec<u64> = (0..pages).map(|i| t.map(va + 4096 * i, 0, 0)).collect();
            let at = |i: u64| va + 4096 * i;
            user(&m, |a| {
                let mut f = a.create_label();
                let mut over = a.create_label();
                asm!(a;
                    jmp(over);
                    set_label(&mut f);
                    inc(esi);
                    ret();
                    set_label(&mut over);
                    mov(rdi, rsp);
                    xor(esi, esi);
                    mov(eax, 3);
                    mov(rsp, at(1)); // The end of page 0.
                    push(rax);
                    pop(r13);
                    mov(rsp, at(2));
                    call(f); // Page 1.
                    mov(rsp, at(2) + 8);
                    push(7); // Page 2.
                    push(r13); // And page 1.
                    pop(r14);
                    pop(r15); // 7
                    lea(eax, ptr(r14 + r15)); // 10
                );
                report(a);
                // Absent when they are read.
                asm!(a;
                    mov(rsp, at(3) + 16);
                    pop(rax); // Zero.
                    mov(rbp, at(4) + 16);
                    leave();
                    mov(rax, rsp);
                    mov(rbx, at(4) + 24);
                    sub(rax, rbx);
                    add(eax, ebp);
                );
                report(a); // 0
                asm!(a;
                    mov(rsp, at(6) - 4);
                    push(rsp); // Page 5.
                    pop(rax);
                    mov(rbx, at(6) - 4);
                    sub(rax, rbx);
                    mov(rsp, at(7) + 4);
                    push(r14); // Pages 6 and 7.
                    pop(rbx);
                    add(eax, ebx);
                );
                report(a); // 3
                asm!(a;
                    // PUSH and POP of memory, and RET with a count, at absent pages.
                    mov(rsp, at(8) + 0x100);
                    push(qword_ptr(rsp - 0x80));
                    mov(rbx, at(9) + 8);
                    pop(qword_ptr(rbx));
                    mov(rsp, rdi);
                    mov(eax, esi);
                );
                report(a); // 1
            });
            let mut order = vec![];
            let got = run(&m, |_| {
                let f = m.faults();
                let page = (f.last().expect("a fault").cr2 - va) / 4096;
                order.push((page, f.last().expect("a fault").error));
                m.memory.set_u64(ptes[page as usize], frame(page) | USER);
            });
            assert_eq!(got, [10, 0, 3, 1], "{va:#x}");
            assert_eq!(order[..6], [(0, 6), (1, 6), (2, 6), (3, 4), (4, 4), (5, 6)]);
            // Which half of a push that crosses pages faults first is not said.
            let mut crossing = order[6..8].to_vec();
            crossing.sort_unstable();
            assert_eq!(crossing, [(6, 6), (7, 6)]);
            // The read of PUSH comes first.
            assert_eq!(order[8..], [(8, 4), (9, 6)]);
        }
    });
}

#[test]
fn stack_pointers_that_wander() {
    // Block by block, by constants, without a look at what lies there: below and above where stacks are, beyond
    // the user's half, around to its start. Then an access, a push, a call or a return.
    each(|engine| {
        let end = 0x8000_0000_0000u64;
        // If nobody looked, this would be reached: what is 2^46 above where the host has it.
        let secret = vec![0x5au8; 1 << 20];
        let in_secret = secret.as_ptr() as u64 + (1 << 19) + (1 << 46);
        let starts = [
            (in_secret & !7, 0),
            (0x4000_0000_0000, -0x7000),
            (0x4000_0000_0000, 0x7000),
            (end - 0x4000, 0x6ff8),
            (end - 0x4000, -0x6ff8),
            (0x1_0000, -0x6000),
        ];
        for (start, step) in starts {
            let m = Machine::new(engine);
            let _ = address_space(&m);
            user(&m, |a| {
                asm!(a; mov(rdi, rsp););
                for what in 0..6 {
                    asm!(a; mov(rsp, start); mov(ecx, 600););
                    let mut skip = a.create_label();
                    let top = here(a);
                    // Two exits on the way, neither of which touches the stack.
                    asm!(a;
                        sub(ecx, 1);
                        js(skip);
                        lea(rsp, ptr(rsp + step / 2));
                        test(ecx, 7);
                        je(skip);
                        set_label(&mut skip);
                        add(rsp, step / 2);
                        test(ecx, ecx);
                        jg(top);
                    );
                    attempt(a, |a| match what {
                        0 => asm!(a; mov(eax, dword_ptr(rsp + 8)); ),
                        1 => asm!(a; push(rbx); ),
                        2 => asm!(a; pop(rbx); ),
                        3 => asm!(a; ret(); ),
                        4 => asm!(a; mov(dword_ptr(rsp - 0x7_0000), eax); ),
                        _ => asm!(a; call(rdi); ),
                    });
                    asm!(a; mov(rax, rsp); mov(rbx, start); sub(rax, rbx););
                    report(a);
                }
                asm!(a; mov(rsp, rdi););
            });
            let mut v = m.long(0, ENTRY);
            let got = m.finish(&mut v);
            assert_eq!(got, [(600 * step) as u32; 6], "{start:#x} {step}");
            let at = start.wrapping_add_signed(i64::from(600 * step));
            let canonical = |va: u64| (va as i64) << 16 >> 16 == va as i64;
            let touched = [at + 8, at - 8, at, at, at - 0x7_0000, at - 8];
            let expected: Vec<u64> = touched
                .iter()
                .map(|&va| if canonical(va) { 14 } else { 12 })
                .collect();
            let faults = m.faults();
            let seen: Vec<u64> = faults.iter().map(|f| f.vector).collect();
            assert_eq!(seen, expected, "{start:#x} {step}");
            for (f, va) in faults.iter().zip(touched) {
                assert!(f.vector != 14 || f.cr2 == va, "{:#x} {va:#x}", f.cr2);
            }
        }
    });
}

#[test]
fn segments_and_rip() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = address_space(&m);
        // Code and data beside each other, at both ends.
        for (i, va) in [LOW, HIGH].into_iter().enumerate() {
            let n = 4 * i as u64;
            t.map(va, frame(n), USER);
            t.map(va + 4096, frame(n + 1), USER);
            m.load_at(frame(n), va, 64, |a| {
                let mut number = a.create_label();
                let mut slot = a.create_label();
                asm!(a;
                    add(qword_ptr(number), 5);
                    mov(rax, qword_ptr(number));
                    lea(rdx, qword_ptr(slot));
                    mov(qword_ptr(rdx), r15);
                    add(qword_ptr(slot), r15);
                    add(rax, qword_ptr(rdx));
                    ret();
                );
                // Into the next page.
                a.dq(&[0; 0x1100 / 8]).expect("data");
                asm!(a;
                    set_label(&mut number);
                    dq(&[0]);
                    set_label(&mut slot);
                    dq(&[0]);
                );
            });
            m.memory.set_u64(frame(n + 1), 0x100 + i as u64);
            m.memory.set_u64(frame(n + 1) + 8, 0x1000);
        }
        m.load(ENTRY, 64, |a| {
            for (msr_fs, msr_gs) in [(HIGH, LOW), (LOW, HIGH)] {
                wrmsr(a, 0xc000_0100, msr_fs + 0x1000);
                wrmsr(a, 0xc000_0101, msr_gs + 0x1008);
                call_user(a, SECOND, HIGH_STACK, FLAGS);
            }
            end(a);
        });
        m.load(SECOND, 64, |a| {
            asm!(a;
                xor(ebx, ebx);
                mov(ebp, 2);
                mov(r13d, 1);
                mov(rax, qword_ptr(rbx).fs());
                add(rax, qword_ptr(8).fs());
                add(rax, qword_ptr(-8).gs());
                add(rax, qword_ptr(r13 * 8 - 8).gs());
                add(rax, qword_ptr(rbp * 4).fs());
                add(qword_ptr(rbx + 0x20).fs(), rax);
                lock.inc(qword_ptr(r13 + 0x1f).fs());
            );
            report(a);
            for va in [LOW, HIGH] {
                asm!(a; mov(r15d, 0x77); mov(rcx, va); call(rcx););
                report(a);
            }
            asm!(a; int(0x80););
        });
        let got = run(&m, |_| ());
        let sum = 0x100 + 0x101 + 3 * 0x1000;
        let (once, twice) = (5 + 2 * 0x77, 10 + 2 * 0x77);
        assert_eq!(got, [sum, once, once, sum, twice, twice], "{got:x?}");
        for n in [1, 5] {
            assert_eq!(m.memory.u64(frame(n) + 0x20), u64::from(sum) + 1);
        }
    });
}

#[test]
fn registers_that_live_in_memory() {
    each(|engine| {
        for va in [LOW, PIE, HIGH] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            let pages = 4;
            for i in 0..pages {
                t.map(va + 4096 * i, frame(i), USER);
            }
            let out = RESULTS;
            user(&m, |a| {
                asm!(a;
                    mov(r13, va);
                    mov(r14d, 2);
                    mov(r15d, 0x1000);
                    mov(qword_ptr(r13), r14);
                    mov(qword_ptr(r13 + r14 * 8), r13);
                    mov(qword_ptr(r13 + r15 + 8), r15);
                    mov(r14, qword_ptr(r13 + r14 * 8)); // va
                    add(r14, qword_ptr(r14 + r15 + 8)); // va + 0x1000
                    mov(qword_ptr(out), r14);
                    add(r14, 8);
                    mov(rax, qword_ptr(r14)); // 0x1000
                    add(qword_ptr(r14), r15); // 0x2000
                    sub(r14, -8);
                    mov(qword_ptr(r14), rax);
                    lea(r14, qword_ptr(r14 - 8));
                    mov(r15, qword_ptr(r14)); // 0x2000
                    mov(qword_ptr(out + 8), r15);
                    xchg(qword_ptr(r13), r15); // 2
                    mov(qword_ptr(out + 16), r15);
                    lock.xadd(qword_ptr(r13), r15); // 0x2002, 0x2000
                    mov(qword_ptr(out + 24), r15);
                    mov(eax, 0x2002);
                    lock.cmpxchg(qword_ptr(r13), r14);
                    setz(byte_ptr(r13 + 0x40));
                    movzx(r15d, byte_ptr(r13 + 0x40));
                    mov(qword_ptr(out + 32), r15);
                    mov(rax, r13);
                    mov(r15d, 9);
                    cmpxchg(qword_ptr(rax + 16), r15); // [va + 16] was va
                    setz(byte_ptr(rax + 0x41));
                    mov(r15, qword_ptr(r13 + 16));
                    mov(qword_ptr(out + 40), r15);
                    // A base that changes by what it points to.
                    mov(rbx, r13);
                    mov(qword_ptr(rbx + 0x800), rbx);
                    mov(rbx, qword_ptr(rbx + 0x800));
                    mov(qword_ptr(rbx + 0x808), 0x55);
                    mov(rdx, rbx);
                    lea(rcx, qword_ptr(rbx + 0x2000));
                    xchg(rcx, rbx);
                    mov(qword_ptr(rbx), 0x66);
                    mov(qword_ptr(rcx + 0x810), 0x77);
                    mov(eax, 3);
                    mov(rsi, rbx);
                    mul(qword_ptr(rbx)); // RDX and RAX
                    add(rax, qword_ptr(rbx));
                    mov(qword_ptr(out + 48), rax);
                    mov(rbx, rcx);
                    add(rbx, 0x10);
                    imul_2(rdi, qword_ptr(rbx + 0x7f8));
                    mov(rdi, qword_ptr(rbx + 0x7f8));
                    add(ebx, 0); // Cuts what is above.
                    mov(qword_ptr(out + 56), rbx);
                    mov(rbx, rcx);
                    mov(bl, 8);
                    mov(qword_ptr(rbx + 0x800), rdi);
                    xor(ebx, ebx);
                    mov(qword_ptr(r13 + rbx + 0x3ff8), r15);
                    // 32-bit addresses.
                    mov(r14d, RESULTS as u32);
                    mov(qword_ptr(r14d + 64), r13);
                    pushfq();
                    pop(qword_ptr(r14 + 72));
                    push(r13);
                    pop(qword_ptr(r14 + 80));
                    push(qword_ptr(r13));
                    pop(r13);
                    mov(qword_ptr(out + 88), r13);
                );
            });
            run(&m, |_| ());
            let got: Vec<u64> = (0..12).map(|i| m.memory.u64(out + 8 * i)).collect();
            let want = [
                va + 0x1000,
                0x2000,
                2,
                0x2000,
                1,
                9,
                0x66 * 4,
                u64::from((va + 0x10) as u32),
                va,
                got[9],
                va,
                va + 0x1008,
            ];
            assert_eq!(got, want, "{got:x?}");
            let at = |offset: u64| m.memory.u64(frame(0) + offset);
            assert_eq!(
                [at(0), at(16), at(0x800), at(0x808), at(0x810)],
                [va + 0x1008, 9, va, 0x55, 0x77]
            );
            assert_eq!(at(0x40), 0x101);
            assert_eq!([at(0x1008), at(0x1010), at(0x2000)], [0x2000, 0x1000, 0x66]);
            assert_eq!(at(0x3ff8), 9);
        }
    });
}

#[test]
fn vectors() {
    each(|engine| {
        for va in [LOW, HIGH] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            mend_faults(&m);
            let ptes: Vec<u64> = (0..6).map(|i| t.map(va + 4096 * i, 0, 0)).collect();
            let mut v = m.long(0, ENTRY);
            let avx = v.has(1, 0, 2, 28);
            m.load(ENTRY, 64, |a| {
                if avx {
                    or_cr(a, cr4, 1 << 18);
                    asm!(a; xor(ecx, ecx); xor(edx, edx); mov(eax, 7); xsetbv(););
                }
                call_user(a, SECOND, HIGH_STACK, FLAGS);
                end(a);
            });
            m.load(SECOND, 64, |a| {
                asm!(a;
                    mov(rbx, va);
                    mov(rax, 0x0102_0304_0506_0708u64);
                    movq(xmm3, rax);
                    movlhps(xmm3, xmm3);
                    // Faults with vector registers in use.
                    mov(rcx, qword_ptr(rbx));
                    movaps(xmmword_ptr(rbx + 0x10), xmm3);
                    mov(qword_ptr(rbx + 0x1000), rax);
                    movups(xmmword_ptr(rbx + 0x1ff9), xmm3);
                    movups(xmm5, xmmword_ptr(rbx + 0x1ff8));
                    movaps(xmmword_ptr(rbx + 0x20), xmm5);
                );
                attempt(a, |a| asm!(a; movaps(xmm3, xmmword_ptr(rbx + 0x28)); ));
                attempt(a, |a| asm!(a; movaps(xmmword_ptr(rbx + 0x24), xmm3); ));
                attempt(
                    a,
                    |a| asm!(a; stc(); addps(xmm3, xmmword_ptr(rbx + 0x2001)); ),
                );
                asm!(a; movups(xmmword_ptr(rbx + 0x30), xmm3););
                if avx {
                    asm!(a;
                        vbroadcastsd(ymm4, qword_ptr(rbx + 0x10));
                        vmovaps(ymmword_ptr(rbx + 0x3000), ymm4);
                        vmovups(ymmword_ptr(rbx + 0x4ff0), ymm4);
                        vpaddq(ymm4, ymm4, ymmword_ptr(rbx + 0x3000));
                        vmovups(ymmword_ptr(rbx + 0x40), ymm4);
                        // Nothing is written where the mask says so, whatever is there.
                        vpxor(xmm6, xmm6, xmm6);
                        vmaskmovps(ymmword_ptr(rbx + 0x8_0000), ymm6, ymm4);
                    );
                    attempt(a, |a| asm!(a; vmovaps(ymm4, ymmword_ptr(rbx + 0x10)); ));
                    attempt(a, |a| asm!(a; vmovaps(ymmword_ptr(rbx + 0x30), ymm4); ));
                    asm!(a; vzeroupper(););
                }
                asm!(a; int(0x80););
            });
            m.finish_with(&mut v, |_, exit| {
                assert!(matches!(exit, Exit::Out(PORT_HOST, _)), "{exit:?}");
                let page = (m.faults().last().expect("a fault").cr2 - va) / 4096;
                m.memory.set_u64(ptes[page as usize], frame(page) | USER);
            });
            let x = 0x0102_0304_0506_0708u64;
            let at = |offset: u64| m.memory.u64(frame(0) + offset);
            assert_eq!([at(0x10), at(0x18)], [x; 2]);
            assert_eq!(
                m.memory.read(frame(1) + 0xff9, 16),
                [x.to_le_bytes(); 2].concat()
            );
            assert_eq!([at(0x20), at(0x28)], [x << 8, x.rotate_left(8)]);
            assert_eq!([at(0x30), at(0x38)], [x; 2]);
            let got: Vec<u64> = m.faults().iter().map(|f| f.vector).collect();
            let mut want = vec![14, 14, 14, 13, 13, 13];
            if avx {
                want.extend([14, 14, 14, 13, 13]);
                assert_eq!([0, 8, 16, 24].map(|i| at(0x40 + i)), [x * 2; 4]);
                assert_eq!(
                    m.memory.read(frame(4) + 0xff0, 32),
                    [x.to_le_bytes(); 4].concat()
                );
            }
            assert_eq!(got, want);
        }
    });
}

#[test]
fn address_spaces_that_alternate() {
    each(|engine| {
        for pcid in [false, true] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            let u = m.more_tables(Paging::Long);
            m.fill(&u, Paging::Long);
            make_room(&m, &u);
            map_stack(&u);
            for (i, t) in [&t, &u].into_iter().enumerate() {
                for (j, va) in [LOW, HIGH].into_iter().enumerate() {
                    let n = 2 * i as u64 + j as u64;
                    t.map(va, frame(n), USER);
                    m.memory.set_u64(frame(n), 10 * (n + 1));
                }
            }
            // Only the first has this one.
            t.map(PIE, frame(9), USER);
            let rounds = 40;
            let (one, two) = if pcid {
                (t.root | 1, u.root | 2)
            } else {
                (t.root, u.root)
            };
            m.load(ENTRY, 64, |a| {
                if pcid {
                    or_cr(a, cr4, 1 << 17);
                }
                for i in 0..rounds {
                    // With PCIDs, without a flush after the first rounds.
                    let keep = if pcid && i >= 2 { 1 << 63 } else { 0 };
                    set_cr(a, cr3, [one, two][i as usize & 1] | keep);
                    call_user(a, SECOND, HIGH_STACK, FLAGS);
                }
                set_cr(a, cr3, t.root);
                end(a);
            });
            m.load(SECOND, 64, |a| {
                asm!(a; mov(rbx, LOW); mov(rdx, HIGH); mov(rbp, PIE); mov(ecx, 10););
                let top = here(a);
                asm!(a;
                    inc(qword_ptr(rbx));
                    mov(rax, qword_ptr(rdx));
                    inc(rax);
                    mov(qword_ptr(rdx), rax);
                    dec(ecx);
                    jnz(top);
                );
                attempt(a, |a| asm!(a; inc(qword_ptr(rbp)); ));
                asm!(a; int(0x80););
            });
            run(&m, |_| ());
            let each_one = 10 * u64::from(rounds as u32) / 2;
            let got: Vec<u64> = (0..4).map(|n| m.memory.u64(frame(n))).collect();
            let want: Vec<u64> = (1..=4).map(|n| 10 * n + each_one).collect();
            assert_eq!(got, want, "pcid {pcid}");
            assert_eq!(m.memory.u64(frame(9)), rounds as u64 / 2);
            assert_eq!(m.page_faults(), vec![(6, PIE); rounds as usize / 2]);
        }
    });
}

#[test]
fn vcpus_with_address_spaces_of_their_own() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = address_space(&m);
        let u = m.more_tables(Paging::Long);
        m.fill(&u, Paging::Long);
        make_room(&m, &u);
        map_stack(&u);
        for (i, t) in [&t, &u].into_iter().enumerate() {
            for (j, va) in [LOW, HIGH].into_iter().enumerate() {
                t.map(va, frame(2 * i as u64 + j as u64), USER);
            }
            // And one that they share.
            t.map(PIE, frame(8), USER);
        }
        let rounds = engine.rounds(100_000);
        m.load(SECOND, 64, |a| {
            asm!(a; mov(rbx, LOW); mov(rdx, HIGH); mov(rbp, PIE); mov(ecx, rounds); xor(edi, edi););
            let top = here(a);
            asm!(a;
                inc(qword_ptr(rbx));
                mov(rax, qword_ptr(rbx));
                add(rax, 1);
                mov(qword_ptr(rdx + 8), rax);
                lock.inc(qword_ptr(rbp));
                mov(rsi, qword_ptr(rdx + 8));
                sub(rsi, rax);
                or(rdi, rsi);
                dec(ecx);
                jnz(top);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let vcpus = [(0, t.root), (1, u.root)].map(|(id, root)| user_vcpu(&m, id, root, SECOND));
        let got = m.finish_all(vcpus.into());
        assert_eq!(got, [[0], [0]]);
        let n = u64::from(rounds);
        for (at, want) in [(0, n), (2, n), (8, 2 * n)] {
            assert_eq!(m.memory.u64(frame(at)), want, "frame {at}");
        }
        assert_eq!(m.memory.u64(frame(1) + 8), n + 1);
        assert_eq!(m.memory.u64(frame(3) + 8), n + 1);
    });
}

#[test]
fn slots_change_under_user_code() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = address_space(&m);
        let (gpa, size) = (0x800_0000u64, 0x1_0000u64);
        // A second slot shows parts of the same memory.
        let (one, two) = (0x300_0000u64, 0x310_0000u64);
        m.vm.set_slot(1, gpa, &m.memory, one, size, 0);
        t.map(HIGH, gpa, USER);
        t.map(HIGH + 4096, gpa + 4096, ALL);
        m.memory.set_u64(one, 10);
        m.memory.set_u64(two, 20);
        user(&m, |a| {
            asm!(a; mov(rbx, HIGH););
            for _ in 0..5 {
                asm!(a; mov(ecx, 30););
                let top = here(a);
                asm!(a; inc(qword_ptr(rbx)); mov(eax, dword_ptr(rbx)); mov(dword_ptr(rbx + 0x1008), eax); dec(ecx); jnz(top););
                report(a);
                host(a);
            }
        });
        const LOG_DIRTY: u32 = 1;
        let mut dirty = vec![];
        let got = run(&m, |n| match n {
            0 => {
                m.vm.set_slot(1, gpa, &m.memory, one, 0, 0);
                m.vm.set_slot(1, gpa, &m.memory, two, size, 0);
            }
            1 => m.vm.set_slot(1, gpa, &m.memory, two, size, LOG_DIRTY),
            2 => {
                dirty.push(m.vm.dirty_pages(1, size));
                dirty.push(m.vm.dirty_pages(1, size));
            }
            3 => {
                dirty.push(m.vm.dirty_pages(1, size));
                m.vm.set_slot(1, gpa, &m.memory, two, size, 0);
            }
            _ => {}
        });
        assert_eq!(got, [40, 50, 80, 110, 140]);
        assert_eq!(m.memory.u64(one), 40);
        assert_eq!(m.memory.u64(two), 140);
        assert_eq!(m.memory.u64(two + 0x1008), 140);
        assert_eq!(dirty, [vec![0, 1], vec![], vec![0, 1]]);
    });
}

#[test]
fn code_pages_replaced() {
    // Code jumps to another page, which is replaced; flags are live all the way.
    each(|engine| {
        for how in [Flush::Invlpg, Flush::Cr3] {
            for va in [LOW, HIGH] {
                let m = Machine::new(engine);
                let t = address_space(&m);
                t.map(va, frame(0), USER);
                let pte = t.map(va + 4096, frame(1), USER);
                m.load_at(frame(0), va, 64, |a| {
                    asm!(a; stc(); jc(va + 4096); ud2(););
                });
                for n in 1..4u64 {
                    m.load_at(frame(n), va + 4096, 64, |a| {
                        asm!(a; adc(eax, n as i32); stc(); jmp(va + 0x800););
                    });
                }
                m.load_at(frame(0) + 0x800, va + 0x800, 64, |a| {
                    asm!(a; adc(eax, 0); ret(););
                });
                let rounds = 12u64;
                m.load(ENTRY, 64, |a| {
                    for i in 0..rounds {
                        asm!(a; mov(rax, frame(1 + i % 3) | USER); mov(qword_ptr(pte), rax););
                        flush(a, how, va + 4096);
                        call_user(a, SECOND, HIGH_STACK, FLAGS);
                    }
                    end(a);
                });
                m.load(SECOND, 64, |a| {
                    asm!(a; mov(rbx, va); xor(eax, eax); mov(ecx, 10););
                    let top = here(a);
                    asm!(a; call(rbx); dec(ecx); jnz(top););
                    report(a);
                    asm!(a; int(0x80););
                });
                let want: Vec<u32> = (0..rounds).map(|i| 10 * (1 + i as u32 % 3 + 2)).collect();
                assert_eq!(run(&m, |_| ()), want, "{how:?} at {va:#x}");
            }
        }
    });
}

#[test]
fn code_at_several_addresses() {
    // One page of code, with another neighbour at each of its addresses.
    each(|engine| {
        let m = Machine::new(engine);
        let t = address_space(&m);
        let places = [LOW, PIE, HIGH];
        for (i, va) in places.into_iter().enumerate() {
            t.map(va, frame(0), USER);
            t.map(va + 4096, frame(1 + i as u64), USER);
            m.load_at(frame(1 + i as u64), va + 4096, 64, |a| {
                asm!(a; lea(eax, ptr(rax + 10 * (i as i32 + 1))); ret(););
            });
        }
        m.load_at(frame(0), HIGH, 64, |a| {
            let mut start = a.create_label();
            asm!(a;
                set_label(&mut start);
                lea(rdx, qword_ptr(start));
                sub(rdx, rbx); // 0
                add(rsi, rdx);
                cmp(rdx, 1); // Carry
                call(HIGH + 4096);
                adc(eax, 0);
                jmp(HIGH + 4096);
            );
        });
        user(&m, |a| {
            asm!(a; xor(eax, eax); xor(esi, esi); mov(ecx, 50););
            let top = here(a);
            for va in [LOW, HIGH, HIGH, PIE, LOW] {
                asm!(a; mov(rbx, va); call(rbx););
            }
            asm!(a; dec(ecx); jnz(top););
            report(a);
            asm!(a; mov(eax, esi););
            report(a);
        });
        let sum: u32 = [10, 30, 30, 20, 10].iter().map(|n| 2 * n + 1).sum();
        assert_eq!(run(&m, |_| ()), [50 * sum, 0]);
    });
}

#[test]
fn shootdown_of_user_pages() {
    // vCPU 0 replaces a page and interrupts vCPU 1, which is in user code; its kernel flushes and answers. From then
    // on it must see the new page, also where it was about to use the old one.
    each(|engine| {
        for va in [LOW, HIGH] {
            let m = Machine::with_irqchip(engine);
            let t = address_space(&m);
            let apic = 0xfee0_0000u64;
            t.map(apic, apic, P | W);
            for n in 0..2 {
                m.memory.set_u64(frame(n), n + 1);
            }
            let pte = t.map(va, frame(0), ALL);
            let (answer, expect, ready) = (RESULTS, RESULTS + 64, RESULTS + 128);
            let rounds = engine.rounds(100);
            m.load(HANDLER, 64, |a| {
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
            m.set_gate(0xf0, HANDLER, 0, 0);
            m.load(ENTRY, 64, |a| {
                asm!(a; mov(ebx, apic as u32); mov(dword_ptr(rbx + 0xf0), 0x1ff); xor(esi, esi););
                let wait = here(a);
                asm!(a; pause(); cmp(dword_ptr(ready), 1); jne(wait););
                let top = here(a);
                asm!(a;
                    mov(eax, esi);
                    not(eax);
                    and(eax, 1);
                    shl(eax, 12);
                    lea(eax, ptr(rax + (frame(0) | ALL) as i32));
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
                    // Sometimes the next change comes while the page is looked up.
                    imul_3(ecx, esi, 37);
                    and(ecx, 1023);
                    inc(ecx);
                );
                let spin = here(a);
                asm!(a; dec(ecx); jnz(spin); mov(dword_ptr(expect), 0); cmp(esi, rounds); jne(top); mov(dword_ptr(ready), 2););
                end(a);
            });
            m.load(SECOND, 64, |a| {
                asm!(a; mov(r8, va); xor(ebp, ebp); mov(dword_ptr(ready), 1););
                let top = here(a);
                let mut good = a.create_label();
                asm!(a;
                    mov(ecx, dword_ptr(expect));
                    mov(eax, dword_ptr(r8));
                    mov(dword_ptr(r8 + 8), eax);
                    // Wrong only if the expectation stood before and after.
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
            let kernel = HANDLER + 0x1000;
            m.load(kernel, 64, |a| {
                asm!(a; mov(ebx, apic as u32); mov(dword_ptr(rbx + 0xf0), 0x1ff););
                call_user(a, SECOND, HIGH_STACK, FLAGS | 0x200);
            });
            let got = m.finish_all(vec![m.long(0, ENTRY), m.long(1, kernel)]);
            assert_eq!(got[1], [0], "{va:#x}");
        }
    });
}
