//! Where windows lie: several vCPUs at once, each with address spaces of its own, and instructions that access memory anywhere.

use super::windows::*;
use conformance::asm::*;
use conformance::layout::*;
use conformance::tables::*;
use conformance::{Machine, asm, each};
use iced_x86::code_asm::*;
use std::sync::atomic::AtomicU64;

/// An address space for user code that has `pages`.
fn space<'a>(m: &'a Machine, next: &'a AtomicU64, pages: &[(u64, u64)]) -> PageTables<'a> {
    let t = PageTables::new(&m.memory, Paging::Long, next);
    m.fill(&t, Paging::Long);
    make_room(m, &t);
    map_stack(&t);
    for &(va, pa) in pages {
        t.map(va, pa, USER);
    }
    t
}

/// Accesses of `rbx`, `r8` and `rdx`, which are [`simulate`]d; `rcx` is 1.
fn accesses() -> Vec<fn(&mut CodeAssembler)> {
    vec![
        |a| asm!(a; add(qword_ptr(rbx + 8), 1);),
        |a| asm!(a; add(qword_ptr(r8 + 16), 1);),
        |a| asm!(a; mov(r10, qword_ptr(r8 + 16)); add(qword_ptr(rbx + 24), r10);),
        |a| asm!(a; inc(qword_ptr(rbx + rcx * 8 + 32)); ),
        |a| asm!(a; mov(r10, 3u64); add(qword_ptr(r8 + rcx * 8 + 40), r10);),
        |a| asm!(a; mov(rax, qword_ptr(rdx + 8)); add(qword_ptr(rbx + 56), rax); add(qword_ptr(rdx + 64), rax);),
        |a| asm!(a; call(qword_ptr(rbx + 0x100));),
    ]
}

fn simulate(pages: &mut [[u64; 9]; 3], i: usize, j: usize) -> u32 {
    pages[i][1] += 1;
    pages[i][2] += 1;
    pages[i][3] += pages[i][2];
    pages[i][5] += 1;
    pages[i][6] += 3;
    let sum = pages[j][1];
    pages[i][7] += sum;
    pages[j][8] += sum;
    i as u32 + 1
}

#[test]
fn one_instruction_all_over() {
    // Non-canonical, and such that checks of them may look at what others are checked with.
    let wild = [
        LOW + (1 << 57),
        HIGH + (1 << 57),
        PIE + (1 << 58),
        LOW + (1 << 58),
        PIE | 1 << 63,
        LOW | 1 << 47,
        HIGH + (3 << 57),
        LOW + (7 << 61),
    ];
    each(|engine| {
        let m = Machine::new(engine);
        let t = address_space(&m);
        let vas = [LOW, PIE, HIGH];
        for (i, &va) in vas.iter().enumerate() {
            t.map(va, frame(i as u64), USER);
            t.map(va + 4096, frame(8 + i as u64), USER);
            m.memory.set_u64(frame(i as u64) + 0x100, va + 4096);
            m.load_at(frame(8 + i as u64), va + 4096, 64, |a| {
                asm!(a; add(edi, i as i32 + 1); ret(););
            });
        }
        let mut pages = [[0; 9]; 3];
        let (mut order, mut sum) = (vec![], 0);
        for n in 0..60 {
            let i = [0, 2, 1, 0, 1, 2][n % 6];
            order.push((i, (i + n) % 3));
        }
        let mut table: Vec<u64> = vec![];
        for (n, &(i, j)) in order.iter().enumerate() {
            if n == 40 {
                table.extend(wild.iter().flat_map(|&w| [w, w]));
            }
            table.extend([vas[i], vas[j]]);
            sum += simulate(&mut pages, i, j);
        }
        for (n, &p) in table.iter().enumerate() {
            m.memory.set_u64(RESULTS + 8 * n as u64, p);
        }
        user(&m, |a| {
            asm!(a; mov(rsi, RESULTS); mov(ebp, table.len() as u32 / 2); xor(edi, edi););
            let top = here(a);
            asm!(a; mov(rbx, qword_ptr(rsi)); mov(rdx, qword_ptr(rsi + 8)); mov(r8, rbx); mov(ecx, 1););
            for access in accesses() {
                attempt(a, access);
            }
            asm!(a; add(rsi, 16); dec(ebp); jnz(top); mov(eax, edi););
            report(a);
        });
        assert_eq!(run(&m, |_| ()), [sum]);
        for (i, page) in pages.iter().enumerate() {
            for (k, &want) in page.iter().enumerate() {
                let got = m.memory.u64(frame(i as u64) + 8 * k as u64);
                assert_eq!(got, want, "page {i}, {k}");
            }
        }
        assert_eq!(m.vectors(), vec![(13, 0); wild.len() * accesses().len()]);
    });
}

#[test]
fn many_vcpus_each_with_its_own() {
    // All call the same pages of code, and start with different ones, so that each runs what another has
    // translated. Whatever they write is theirs.
    const VCPUS: u64 = 12;
    each(|engine| {
        let m = Machine::new(engine);
        address_space(&m);
        let next = AtomicU64::new(MORE_TABLES);
        let code = |n: u64| PIE + 0x10_0000 + 4096 * n;
        let spaces: Vec<_> = (0..VCPUS)
            .map(|v| {
                let mut pages = vec![];
                for (j, va) in [LOW, PIE, HIGH].into_iter().enumerate() {
                    pages.push((va, frame(3 * v + j as u64)));
                }
                for n in 0..VCPUS {
                    pages.push((code(n), frame(50 + n)));
                }
                space(&m, &next, &pages)
            })
            .collect();
        for n in 0..VCPUS {
            m.load_at(frame(50 + n), code(n), 64, |a| {
                asm!(a;
                    add(qword_ptr(rbx), n as i32 + 1);
                    mov(rax, qword_ptr(rbx));
                    inc(qword_ptr(rdx + rcx * 8));
                    add(qword_ptr(rbp + 8), rax);
                    dec(r12);
                );
                let mut back = a.create_label();
                asm!(a; jz(back); call(code((n + 1) % VCPUS)); set_label(&mut back); ret(););
            });
        }
        let rounds = engine.rounds(3000);
        m.load(SECOND, 64, |a| {
            asm!(a; mov(rbx, LOW); mov(rdx, HIGH); mov(rbp, PIE); xor(ecx, ecx); mov(edi, rounds););
            let top = here(a);
            asm!(a; mov(r12, VCPUS); call(r13); dec(edi); jnz(top); mov(eax, dword_ptr(rbx)););
            report(a);
            end(a);
        });
        let vcpus = (0..VCPUS).map(|v| {
            let vcpu = user_vcpu(&m, v, spaces[v as usize].root, SECOND);
            let mut r = vcpu.regs();
            r.r13 = code(v);
            r.rsp = USER_STACK - 256 * v;
            vcpu.set_regs(&r);
            vcpu
        });
        let sum = u64::from(rounds) * VCPUS * (VCPUS + 1) / 2;
        let got = m.finish_all(vcpus.collect());
        assert_eq!(got, vec![vec![sum as u32]; VCPUS as usize]);
        for v in 0..VCPUS {
            assert_eq!(m.memory.u64(frame(3 * v)), sum, "vCPU {v}");
            let calls = u64::from(rounds) * VCPUS;
            assert_eq!(m.memory.u64(frame(3 * v + 2)), calls, "vCPU {v}");
        }
    });
}

#[test]
fn no_room_for_another() {
    // Two vCPUs that use the whole upper half of the user's addresses: more than there is on the host for both.
    each(|engine| {
        let m = Machine::new(engine);
        address_space(&m);
        let next = AtomicU64::new(MORE_TABLES);
        let spaces: Vec<_> = (0..2)
            .map(|v| {
                let t = space(&m, &next, &[(LOW, frame(2 * v)), (PIE, frame(2 * v + 1))]);
                let tables = m.memory.u64(t.entry(PIE, 4));
                for i in 128..256 {
                    let at = t.root + 8 * i;
                    if m.memory.u64(at) == 0 {
                        m.memory.set_u64(at, tables);
                    }
                }
                t
            })
            .collect();
        let rounds = engine.rounds(2000);
        // Everything but the program's own and the stack's.
        let first = (PIE & ((1 << 39) - 1)) + (1 << 46);
        m.load(SECOND, 64, |a| {
            asm!(a; mov(rsi, 1u64 << 39); mov(ebp, rounds); mov(rdx, LOW););
            let top = here(a);
            asm!(a; mov(rbx, first); mov(ecx, 127););
            let inner = here(a);
            asm!(a;
                inc(qword_ptr(rbx));
                inc(qword_ptr(rdx));
                add(rbx, rsi);
                dec(ecx);
                jnz(inner);
                dec(ebp);
                jnz(top);
            );
            end(a);
        });
        let vcpus = (0..2).map(|v| user_vcpu(&m, v, spaces[v as usize].root, SECOND));
        m.finish_all(vcpus.collect());
        for n in 0..4 {
            assert_eq!(m.memory.u64(frame(n)), 127 * u64::from(rounds), "{n}");
        }
    });
}

#[test]
fn ends_of_units() {
    // Windows consist of parts of 1 TiB, which end in the middle between multiples of it.
    each(|engine| {
        for end in [
            0x80_0000_0000u64,
            0x5680_0000_0000,
            0x7e80_0000_0000,
            0x7f80_0000_0000,
        ] {
            let m = Machine::new(engine);
            let t = address_space(&m);
            let rounds = engine.rounds(50);
            t.map(end - 4096, frame(0), USER);
            t.map(end, frame(1), USER);
            t.map(end + 0x7ff_f000, frame(2), USER);
            // Code before the end that counts behind it.
            t.map(end - 0x3000, frame(3), USER);
            m.load_at(frame(3), end - 0x3000, 64, |a| {
                for (next, to) in [(7i32, 0x3000 + 64), (14, 0x3000 - 64)] {
                    // inc qword ptr [rip + ...]
                    let mut code = vec![0x48, 0xff, 0x05];
                    code.extend_from_slice(&(to - next).to_le_bytes());
                    a.db(&code).expect("bytes");
                }
                asm!(a; ret(););
            });
            user(&m, |a| {
                asm!(a; mov(ebp, rounds); xor(esi, esi); mov(r9, end - 0x3000););
                let top = here(a);
                asm!(a;
                    mov(rbx, end - 16);
                    mov(r8, end + 16);
                    inc(qword_ptr(rbx));
                    inc(qword_ptr(rbx + 24));
                    inc(qword_ptr(rbx + 12)); // both pages
                    inc(qword_ptr(r8));
                    inc(qword_ptr(r8 - 40));
                    inc(qword_ptr(rbx + 0x7ff_f010));
                    call(r9);
                );
                attempt(a, |a| asm!(a; inc(qword_ptr(rbx + 0x1010)); ));
                attempt(a, |a| asm!(a; inc(qword_ptr(rbx - 0x0800_0000)); ));
                asm!(a; dec(ebp); jnz(top););
            });
            let mut faults = vec![];
            for _ in 0..rounds {
                faults.extend([(6, end + 0x1000), (6, end - 16 - 0x0800_0000)]);
            }
            run(&m, |_| ());
            let n = u64::from(rounds);
            for at in [end - 16, end + 8, end + 16, end - 24, end - 64, end + 64] {
                let page = u64::from(at >= end);
                let got = m.memory.u64(frame(page) + (at & 0xfff));
                assert_eq!(got, n, "{at:#x}");
            }
            assert_eq!(m.memory.u64(frame(2)), n, "{end:#x}");
            assert_eq!(m.page_faults(), faults, "{end:#x}");
        }
    });
}

#[test]
fn places_that_move() {
    // Each of two vCPUs, while both run, begins to use what lies on the host where the other one's windows are likely to be.
    each(|engine| {
        let m = Machine::new(engine);
        address_space(&m);
        let next = AtomicU64::new(MORE_TABLES);
        let (tables, shared) = (0x6_0000_0000u64, 0x6_0000_1000u64);
        let spaces: Vec<_> = (0..2)
            .map(|v| {
                let pages = [LOW, PIE, HIGH].into_iter().enumerate();
                let mut pages: Vec<_> =
                    pages.map(|(j, va)| (va, frame(4 * v + j as u64))).collect();
                pages.push((shared, frame(20)));
                let t = space(&m, &next, &pages);
                t.map(tables, t.root, USER);
                t
            })
            .collect();
        let rounds = engine.rounds(3000);
        let mut programs = vec![];
        for (v, t) in spaces.iter().enumerate() {
            let program = SECOND + 0x1000 * v as u64;
            // 1 TiB further up or down each time.
            let step: i64 = [-2, 2][v];
            let entry = m.memory.u64(t.entry(PIE, 4));
            m.load(program, 64, |a| {
                asm!(a; mov(rbx, LOW); mov(rdx, HIGH); mov(rbp, PIE); mov(r8, tables); mov(r9, shared); mov(r12d, 20););
                let again = here(a);
                asm!(a; mov(ecx, rounds););
                let top = here(a);
                asm!(a;
                    inc(qword_ptr(rbx));
                    mov(rax, qword_ptr(rbp));
                    inc(rax);
                    mov(qword_ptr(rbp), rax);
                    inc(qword_ptr(rdx));
                    dec(ecx);
                    jnz(top);
                    lock.inc(qword_ptr(r9));
                );
                // The other one, too.
                asm!(a; mov(rsi, 21u64); sub(rsi, r12); add(rsi, rsi););
                let wait = here(a);
                asm!(a; pause(); cmp(qword_ptr(r9), rsi); jb(wait););
                asm!(a;
                    mov(r10, step << 40);
                    add(rbp, r10);
                    mov(rax, rbp);
                    shr(rax, 39);
                    mov(r11, entry);
                    mov(qword_ptr(r8 + rax * 8), r11);
                    dec(r12);
                    jnz(again);
                    mov(eax, dword_ptr(rbx));
                );
                report(a);
                end(a);
            });
            programs.push(program);
        }
        let vcpus = (0..2).map(|v| user_vcpu(&m, v, spaces[v as usize].root, programs[v as usize]));
        let want = 20 * rounds;
        assert_eq!(m.finish_all(vcpus.collect()), [[want], [want]]);
        for (v, j) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            assert_eq!(
                m.memory.u64(frame(4 * v + j)),
                u64::from(want),
                "vCPU {v}, {j}"
            );
        }
    });
}
