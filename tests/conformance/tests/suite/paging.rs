//! Paging: formats, permissions, accessed and dirty bits, flushes.

use conformance::asm::*;
use conformance::backend::{Engine, Exit};
use conformance::layout::*;
use conformance::machine::{CR0, CR4, PAE, PG, PSE, assemble};
use conformance::tables::*;
use conformance::{Machine, asm, each};
use iced_x86::code_asm::*;

/// Where tests map pages of their own: outside of what is mapped by default.
const VA: u64 = 0x4000_0000;

const WP: u32 = 1 << 16;
const SMEP: u32 = 1 << 20;
const SMAP: u32 = 1 << 21;
const PCIDE: u32 = 1 << 17;
const PGE: u32 = 1 << 7;

/// `mov eax, value; ret`
fn function(value: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(value.to_le_bytes());
    code.push(0xc3);
    code
}

/// What access to a page with `flags` must end with: a page fault's error code or nothing.
#[derive(Clone, Copy)]
struct Rules {
    wp: bool,
    smep: bool,
    smap: bool,
    nxe: bool,
}

impl Rules {
    fn error(&self, flags: u64, user: bool, write: bool, fetch: bool) -> Option<u64> {
        let fetch_bit = u64::from(fetch && (self.nxe || self.smep)) << 4;
        let code = u64::from(write) << 1 | u64::from(user) << 2 | fetch_bit;
        if flags & P == 0 {
            return Some(code);
        }
        let denied = if user {
            flags & U == 0 || write && flags & W == 0 || fetch && flags & NX != 0
        } else {
            fetch && (flags & NX != 0 || self.smep && flags & U != 0)
                || !fetch && self.smap && flags & U != 0
                || write && self.wp && flags & W == 0
        };
        denied.then_some(code | 1)
    }
}

const COMBINATIONS: [u64; 9] = [
    0,
    P,
    P | W,
    P | U,
    P | W | U,
    P | NX,
    P | W | NX,
    P | U | NX,
    P | W | U | NX,
];

/// Reads, writes and executes each page.
fn touch_all(a: &mut CodeAssembler, pages: usize) {
    for i in 0..pages {
        let at = VA + 4096 * i as u64;
        if a.bitness() == 64 {
            asm!(a; mov(rbx, at););
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx + 0x10)); ));
            attempt(a, |a| asm!(a; mov(dword_ptr(rbx + 0x20), eax); ));
            attempt(a, |a| asm!(a; call(rbx); ));
        } else {
            asm!(a; mov(ebx, at as u32););
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(ebx + 0x10)); ));
            attempt(a, |a| asm!(a; mov(dword_ptr(ebx + 0x20), eax); ));
            attempt(a, |a| asm!(a; call(ebx); ));
        }
    }
}

fn expect_all(list: &mut Vec<(u64, u64)>, rules: Rules, pages: &[u64], user: bool) {
    for (i, flags) in pages.iter().enumerate() {
        let at = VA + 4096 * i as u64;
        for (offset, write, fetch) in [(0x10, false, false), (0x20, true, false), (0, false, true)]
        {
            if let Some(e) = rules.error(*flags, user, write, fetch) {
                list.push((e, at + offset));
            }
        }
    }
}

fn permissions(engine: Engine, paging: Paging) {
    let m = Machine::new(engine);
    let pages: Vec<u64> = COMBINATIONS
        .into_iter()
        .filter(|f| paging != Paging::Legacy || f & NX == 0)
        .collect();
    let t = m.tables(paging);
    m.fill(&t, paging);
    for (i, flags) in pages.iter().enumerate() {
        let pa = DATA + 4096 * i as u64;
        t.map(VA + 4096 * i as u64, pa, *flags);
        m.memory.write(pa, &function(1));
    }
    let mut vcpu = match paging {
        Paging::Long => m.long(0, ENTRY),
        _ => m.protected(Some(paging)),
    };
    let smep = vcpu.has(7, 0, 1, 7);
    let smap = vcpu.has(7, 0, 1, 20);
    let mut expected = vec![];
    m.load(ENTRY, if paging == Paging::Long { 64 } else { 32 }, |a| {
        for bits in 0..16 {
            let rules = Rules {
                wp: bits & 1 != 0,
                smep: smep && bits & 2 != 0,
                smap: smap && bits & 4 != 0,
                nxe: paging != Paging::Legacy,
            };
            // AC lets the supervisor at user pages.
            let ac = smap && bits & 8 != 0;
            for (on, cr, bit) in [
                (rules.wp, cr0, WP),
                (rules.smep, cr4, SMEP),
                (rules.smap, cr4, SMAP),
            ] {
                if on {
                    or_cr(a, cr, bit);
                } else {
                    clear_cr(a, cr, bit);
                }
            }
            if ac {
                asm!(a; stac(););
            } else if smap {
                asm!(a; clac(););
            }
            touch_all(a, pages.len());
            let effective = Rules {
                smap: rules.smap && !ac,
                ..rules
            };
            expect_all(&mut expected, effective, &pages, false);
            if bits & 7 == 7 && paging == Paging::Long {
                call_user(a, SECOND, USER_STACK, 2);
                expect_all(&mut expected, rules, &pages, true);
            }
            // The log has a limit, so that each round has its own.
            host(a);
        }
        end(a);
    });
    m.load(SECOND, 64, |a| {
        touch_all(a, pages.len());
        asm!(a; int(0x80););
    });
    let mut got = vec![];
    m.finish_with(&mut vcpu, |_, exit| {
        assert_eq!(exit, Exit::Out(PORT_HOST, 0).clone_kind(&exit));
        got.extend(m.page_faults());
        m.memory.set_u64(LOG, 0);
    });
    assert_eq!(got.len(), expected.len());
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert_eq!(g, e, "number {i} of {paging:?}");
    }
}

/// Exits of the host's port have a value that means nothing.
trait CloneKind {
    fn clone_kind(self, like: &Exit) -> Exit;
}

impl CloneKind for Exit {
    fn clone_kind(self, like: &Exit) -> Exit {
        match (self, like) {
            (Exit::Out(port, _), Exit::Out(_, value)) => Exit::Out(port, *value),
            (other, _) => other,
        }
    }
}

#[test]
fn permissions_four_level() {
    each(|e| permissions(e, Paging::Long));
}

#[test]
fn permissions_pae() {
    each(|e| permissions(e, Paging::Pae));
}

#[test]
fn permissions_32_bit() {
    each(|e| permissions(e, Paging::Legacy));
}

#[test]
fn permissions_of_upper_levels_and() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        // One page table entry allows all; what is above takes a right each time.
        for (i, (level, flags)) in [(2, P | U), (2, P | W), (3, P | W | U | NX), (4, P | U)]
            .into_iter()
            .enumerate()
        {
            let va = (i as u64 + 1) << 39;
            t.map(va, DATA, P | W | U);
            let at = t.entry(va, level);
            let table = m.memory.u64(at) & !0xfff;
            m.memory.set_u64(at, table | flags);
        }
        m.memory.write(DATA, &function(1));
        m.load(ENTRY, 64, |a| {
            call_user(a, SECOND, USER_STACK, 2);
            end(a);
        });
        m.load(SECOND, 64, |a| {
            for i in 1..=4u64 {
                asm!(a; mov(rbx, i << 39););
                attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx + 8)); ));
                attempt(a, |a| asm!(a; mov(dword_ptr(rbx + 8), eax); ));
                attempt(a, |a| asm!(a; call(rbx); ));
            }
            asm!(a; int(0x80););
        });
        let mut v = m.long(0, ENTRY);
        m.finish(&mut v);
        let at = |i: u64| (i << 39) + 8;
        assert_eq!(
            m.page_faults(),
            [
                (7, at(1)),
                (5, at(2)),
                (7, at(2)),
                (0x15, 2 << 39),
                (0x15, 3 << 39),
                (7, at(4)),
            ]
        );
    });
}

/// Reads and writes a page; the host looks at A and D on the way.
fn accessed_dirty(engine: Engine, paging: Paging, level: u32) {
    let m = Machine::new(engine);
    let t = m.tables(paging);
    m.fill(&t, paging);
    // Far from what the kernel uses, so that no table above is shared.
    let va = if paging == Paging::Long { 1 << 40 } else { VA };
    let leaf = if level == 1 {
        t.map(va, DATA, P | W)
    } else if level == 3 {
        t.map_large(3, va, 0, P | W)
    } else {
        t.map_large(2, va, 0x40_0000, P | W)
    };
    let levels = match paging {
        Paging::Long => 4,
        Paging::Pae => 2, // The third has no accessed bit.
        Paging::Legacy => 2,
    };
    let uppers: Vec<u64> = (level + 1..=levels).map(|l| t.entry(va, l)).collect();
    let get = |at: u64| u64::from(m.memory.u32(at));
    let bits = if paging == Paging::Long { 64 } else { 32 };
    m.load(ENTRY, bits, |a| {
        // In a large page, away from its start: the kernel is there in the one of 1 GiB.
        let at = va + if level == 3 { 0x80_0000 } else { 0x40 };
        if bits == 64 {
            asm!(a; mov(rbx, at););
        } else {
            asm!(a; mov(ebx, at as u32););
        }
        host(a);
        if bits == 64 {
            asm!(a; mov(eax, dword_ptr(rbx)););
            host(a);
            asm!(a; mov(dword_ptr(rbx), eax););
            host(a);
            asm!(a; invlpg(ptr(rbx)); mov(eax, dword_ptr(rbx)); mov(dword_ptr(rbx + 4), eax););
        } else {
            asm!(a; mov(eax, dword_ptr(ebx)););
            host(a);
            asm!(a; mov(dword_ptr(ebx), eax););
            host(a);
            asm!(a; invlpg(ptr(ebx)); mov(eax, dword_ptr(ebx)); mov(dword_ptr(ebx + 4), eax););
        }
        host(a);
        end(a);
    });
    let mut v = match paging {
        Paging::Long => m.long(0, ENTRY),
        _ => m.protected(Some(paging)),
    };
    let mut step = 0;
    m.finish_with(&mut v, |_, _| {
        let flags = get(leaf) & (A | D);
        let want = [0, A, A | D, A | D][step];
        assert_eq!(flags, want, "{paging:?} level {level} step {step}");
        for at in &uppers {
            assert_eq!(get(*at) & A, if step == 0 { 0 } else { A }, "step {step}");
            // No dirty bit above the leaf.
            assert_eq!(get(*at) & D, 0);
        }
        if step == 2 {
            // The processor must set it again after INVLPG.
            m.memory.set_u32(leaf, (get(leaf) & !(A | D)) as u32);
        }
        step += 1;
    });
    assert_eq!(step, 4);
}

#[test]
fn accessed_and_dirty_bits() {
    each(|engine| {
        for (paging, level) in [
            (Paging::Long, 1),
            (Paging::Long, 2),
            (Paging::Long, 3),
            (Paging::Pae, 1),
            (Paging::Pae, 2),
            (Paging::Legacy, 1),
            (Paging::Legacy, 2),
        ] {
            accessed_dirty(engine, paging, level);
        }
    });
}

#[test]
fn dirty_bit_after_a_read_of_the_same_page() {
    // The translation that a read leaves behind does not let a write through.
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        let leaves: Vec<u64> = (0..8)
            .map(|i| t.map(VA + 4096 * i, DATA + 4096 * i, P | W))
            .collect();
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(ebx, VA as u32); mov(ecx, 8););
            let mut top = here(a);
            asm!(a; mov(eax, dword_ptr(rbx)); add(rbx, 4096); dec(ecx); jnz(top););
            host(a);
            asm!(a; mov(ebx, VA as u32); mov(ecx, 4););
            top = here(a);
            asm!(a; lock.inc(dword_ptr(rbx)); add(rbx, 8192); dec(ecx); jnz(top););
            host(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let mut step = 0;
        m.finish_with(&mut v, |_, _| {
            for (i, at) in leaves.iter().enumerate() {
                let dirty = step == 1 && i % 2 == 0;
                assert_eq!(m.memory.u64(*at) & D != 0, dirty, "page {i}, step {step}");
            }
            step += 1;
        });
    });
}

#[test]
fn reserved_bits() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        t.map(VA, DATA | 1 << 51, P | W);
        t.map(VA + 0x1000, DATA | 1 << 51, W); // Not present: nothing is reserved.
        t.map_large(2, VA + 0x20_0000, 1 << 13, P | W);
        t.map_large(3, VA + 0x4000_0000, 1 << 20, P | W);
        t.map(VA + 0x2000, DATA, P | W | NX);
        t.map_large(4, 1 << 39, 0, P | W);
        m.load(ENTRY, 64, |a| {
            for at in [VA, VA + 0x1000, VA + 0x20_0000, VA + 0x4000_0000, 1 << 39] {
                asm!(a; mov(rbx, at););
                attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx)); ));
                attempt(a, |a| asm!(a; mov(dword_ptr(rbx), eax); ));
            }
            asm!(a; mov(rbx, VA + 0x2000););
            attempt(a, |a| asm!(a; mov(dword_ptr(rbx), eax); ));
            // Without NXE, NX is reserved.
            asm!(a; mov(ecx, 0xc000_0080u32); rdmsr(); and(eax, !0x800); wrmsr(););
            asm!(a; mov(rax, cr3); mov(cr3, rax););
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx)); ));
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        if v.has(0x8000_0008, 0, 0, 2) && v.has(0x8000_0008, 0, 0, 4) && v.has(0x8000_0008, 0, 0, 5)
        {
            return eprintln!("not run: all 52 physical address bits are there");
        }
        m.finish(&mut v);
        assert_eq!(
            m.page_faults(),
            [
                (9, VA),
                (0xb, VA),
                (0, VA + 0x1000),
                (2, VA + 0x1000),
                (9, VA + 0x20_0000),
                (0xb, VA + 0x20_0000),
                (9, VA + 0x4000_0000),
                (0xb, VA + 0x4000_0000),
                (9, 1 << 39),
                (0xb, 1 << 39),
                (9, VA + 0x2000),
            ]
        );
    });
}

#[test]
fn reserved_bits_pae_and_pse36() {
    each(|engine| {
        // PAE: a reserved bit in the first table makes MOV CR3 fail.
        let m = Machine::new(engine);
        let t = m.tables(Paging::Pae);
        m.fill(&t, Paging::Pae);
        let other = m.more_tables(Paging::Pae);
        m.memory.set_u64(other.root, 0x1000 | P | W);
        t.map_large(2, VA, 0x40_2000, P | W);
        m.load(ENTRY, 32, |a| {
            attempt(a, |a| asm!(a; mov(eax, other.root as u32); mov(cr3, eax); ));
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(VA as u32)); ));
            end(a);
        });
        let mut v = m.protected(Some(Paging::Pae));
        m.finish(&mut v);
        assert_eq!(m.vectors(), [(13, 0), (14, 9)]);

        // 32-bit: without PSE a large page's bit means nothing; bit 21 of a large one is reserved.
        let m = Machine::new(engine);
        let t = m.tables(Paging::Legacy);
        t.identity(0, 0x40_0000, P | W);
        let pt = t.entry(VA, 1) & !0xfff;
        let pde = t.entry(VA, 2);
        m.memory.set_u32(pt, (DATA | P | W) as u32);
        m.memory.set_u32(pde, (pt | P | W | PS) as u32);
        t.map_large(2, VA + 0x40_0000, 1 << 21, P | W);
        // PSE-36: bit 13 is bit 32 of the address, where nothing is.
        t.map_large(2, VA + 0x80_0000, 1 << 13, P | W);
        m.memory.set_u32(DATA, 0x1234);
        m.load(ENTRY, 32, |a| {
            clear_cr(a, cr4, PSE as u32);
            asm!(a; mov(eax, dword_ptr(VA as u32)););
            report(a);
            or_cr(a, cr4, PSE as u32);
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(VA as u32 + 0x40_0000)); ));
            asm!(a; mov(eax, dword_ptr(VA as u32 + 0x80_0010)););
            report(a);
            end(a);
        });
        let mut v = m.protected(Some(Paging::Legacy));
        v.answer = 0x77;
        let mut mmio = vec![];
        let reports = m.finish_with(&mut v, |_, exit| mmio.push(exit));
        assert_eq!(reports, [0x1234, 0x77]);
        assert_eq!(mmio, [Exit::MmioRead(0x1_0000_0010, 4)]);
        assert_eq!(m.page_faults(), [(9, VA + 0x40_0000)]);
    });
}

/// Each way to flush, and whether it flushes global pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    Invlpg,
    Cr3,
    Pge,
    Invpcid(u32),
    PgeThere,
}

fn flush(a: &mut CodeAssembler, how: Flush, at: u64) {
    match how {
        Flush::Invlpg => asm!(a; mov(rbx, at); invlpg(ptr(rbx));),
        Flush::Cr3 => asm!(a; mov(rax, cr3); mov(cr3, rax);),
        Flush::Pge => {
            clear_cr(a, cr4, PGE);
            or_cr(a, cr4, PGE);
        }
        Flush::PgeThere => asm!(a; mov(rax, cr4); xor(rax, PGE as i32); mov(cr4, rax);),
        Flush::Invpcid(kind) => asm!(a;
            mov(rbx, at);
            mov(qword_ptr(DATA + 0xf00), 0);
            mov(qword_ptr(DATA + 0xf08), rbx);
            mov(ebx, kind);
            invpcid(rbx, xmmword_ptr(DATA + 0xf00));
        ),
    }
}

#[test]
fn changes_are_seen_after_every_kind_of_flush() {
    each(|engine| {
        for user in [false, true] {
            for (how, global) in [
                (Flush::Invlpg, 0),
                (Flush::Invlpg, G),
                (Flush::Cr3, 0),
                (Flush::Pge, 0),
                (Flush::Pge, G),
                (Flush::PgeThere, G),
                (Flush::Invpcid(0), 0),
                (Flush::Invpcid(1), 0),
                (Flush::Invpcid(2), G),
                (Flush::Invpcid(3), 0),
            ] {
                let m = Machine::new(engine);
                let t = m.tables(Paging::Long);
                m.fill(&t, Paging::Long);
                let flags = P | W | A | D | global | if user { U } else { 0 };
                // Code of one page and data of another, both replaced.
                let pages = [DATA + 0x1000, DATA + 0x2000, DATA + 0x3000, DATA + 0x4000];
                for (i, pa) in pages.into_iter().enumerate() {
                    m.memory.write(pa, &function(i as u32 + 1));
                }
                let pte = t.map(VA, pages[0], flags);
                t.map(VA + 0x1000, pages[2], flags);
                m.load(ENTRY, 64, |a| {
                    or_cr(a, cr4, PGE);
                    for round in 0..3u64 {
                        let (now, next) = ((round + 1) % 2, 0);
                        if user {
                            call_user(a, SECOND, USER_STACK, 0x3002);
                        } else {
                            asm!(a; mov(eax, SECOND as u32); call(rax););
                        }
                        for (i, slot) in [(now, pte), (2 + now, pte + 8)] {
                            asm!(a;
                                mov(rax, pages[i as usize] | flags);
                                mov(qword_ptr(slot), rax);
                            );
                        }
                        let _: i32 = next;
                        flush(a, how, VA);
                        flush(a, how, VA + 0x1000);
                    }
                    end(a);
                });
                m.load(SECOND, 64, |a| {
                    asm!(a; mov(rbx, VA); call(rbx););
                    report(a);
                    asm!(a; mov(eax, dword_ptr(rbx + 0x1001)););
                    report(a);
                    if user {
                        asm!(a; int(0x80););
                    } else {
                        asm!(a; ret(););
                    }
                });
                let mut v = m.long(0, ENTRY);
                if matches!(how, Flush::Invpcid(_)) && !v.has(7, 0, 1, 10) {
                    continue;
                }
                assert_eq!(m.finish(&mut v), [1, 3, 2, 4, 1, 3], "{how:?} user {user}");
            }
        }
    });
}

#[test]
fn a_new_mapping_needs_no_flush() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        let ptes: Vec<u64> = (0..20).map(|i| t.map(VA + 4096 * i, 0, 0)).collect();
        for i in 0..20u64 {
            m.memory.write(DATA + 4096 * i, &function(100 + i as u32));
        }
        m.load(ENTRY, 64, |a| {
            for i in 0..20u64 {
                asm!(a; mov(rbx, VA + 4096 * i););
                if i % 2 == 0 {
                    attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx)); ));
                } else {
                    attempt(a, |a| asm!(a; call(rbx); ));
                }
                asm!(a;
                    mov(eax, (DATA + 4096 * i + P) as u32);
                    mov(qword_ptr(ptes[i as usize]), rax);
                    call(rbx);
                );
                report(a);
            }
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), (100..120).collect::<Vec<u32>>());
        assert_eq!(m.faults().len(), 20);
    });
}

#[test]
fn invlpg_anywhere_in_a_large_page() {
    each(|engine| {
        for level in [2, 3] {
            let m = Machine::new(engine);
            let t = m.tables(Paging::Long);
            m.fill(&t, Paging::Long);
            let (first, second) = if level == 2 {
                (0x40_0000, 0x60_0000)
            } else {
                (0, 0x4000_0000)
            };
            if level == 3 {
                // A second GiB that shows the same memory.
                m.vm.set_slot(1, 0x4000_0000, &m.memory, 0x80_0000, 0x80_0000, 0);
            }
            let pte = t.map_large(level, VA, first, P | W | A | D);
            // The pages that are read: many, so that many translations are there.
            let offsets: Vec<u64> = (0..16).map(|i| 0x10_0000 + 0x3000 * i).collect();
            for (i, o) in offsets.iter().enumerate() {
                let i = i as u32;
                m.memory.set_u32(first + o, 100 + i);
                let at = if level == 2 {
                    second + o
                } else {
                    0x80_0000 + o
                };
                m.memory.set_u32(at, 200 + i);
            }
            let read = |a: &mut CodeAssembler| {
                for o in &offsets {
                    asm!(a; mov(rbx, VA + o); mov(eax, dword_ptr(rbx)););
                    report(a);
                }
            };
            m.load(ENTRY, 64, |a| {
                read(a);
                asm!(a;
                    mov(rax, second | P | W | A | D | PS);
                    mov(qword_ptr(pte), rax);
                    mov(rbx, VA + 0x12_3456);
                    invlpg(ptr(rbx));
                );
                read(a);
                end(a);
            });
            let mut v = m.long(0, ENTRY);
            let want: Vec<u32> = (100..116).chain(200..216).collect();
            assert_eq!(m.finish(&mut v), want, "level {level}");
        }
    });
}

#[test]
fn splitting_a_large_page() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        let pde = t.map_large(2, VA, 0x40_0000, P | W | A | D);
        let split = m.more_tables(Paging::Long).root;
        for i in 0..512 {
            m.memory.set_u64(
                split + 8 * i,
                (0x40_0000 + 4096 * (511 - i)) | P | W | A | D,
            );
        }
        m.memory.set_u32(0x40_0000, 1);
        m.memory.set_u32(0x40_0000 + 511 * 4096, 2);
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(rbx, VA); mov(eax, dword_ptr(rbx)););
            report(a);
            asm!(a; mov(eax, dword_ptr(rbx + 511 * 4096)););
            report(a);
            asm!(a;
                mov(rax, split | P | W);
                mov(qword_ptr(pde), rax);
                mov(rax, cr3);
                mov(cr3, rax);
                mov(eax, dword_ptr(rbx));
            );
            report(a);
            asm!(a; mov(eax, dword_ptr(rbx + 511 * 4096)););
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [1, 2, 2, 1]);
    });
}

#[test]
fn process_context_identifiers() {
    each(|engine| {
        let m = Machine::new(engine);
        let t1 = m.tables(Paging::Long);
        m.fill(&t1, Paging::Long);
        let t2 = m.more_tables(Paging::Long);
        m.fill(&t2, Paging::Long);
        for i in 0..4u64 {
            m.memory.write(DATA + 0x1000 * i, &function(i as u32 + 1));
        }
        let pte1 = t1.map(VA, DATA, P | W | A | D);
        let pte2 = t2.map(VA, DATA + 0x1000, P | W | A | D);
        let no_flush = 1u64 << 63;
        let see = |a: &mut CodeAssembler| {
            asm!(a; mov(rbx, VA); mov(eax, dword_ptr(rbx + 1)););
            report(a);
            asm!(a; call(rbx););
            report(a);
        };
        m.load(ENTRY, 64, |a| {
            or_cr(a, cr4, PCIDE);
            set_cr(a, cr3, t1.root | 1);
            see(a); // 1
            set_cr(a, cr3, t2.root | 2);
            see(a); // 2
            set_cr(a, cr3, t1.root | 1 | no_flush);
            see(a); // 1
            set_cr(a, cr3, t2.root | 2 | no_flush);
            see(a); // 2
            // A change of the other address space, made known by INVPCID.
            asm!(a;
                mov(rax, (DATA + 0x2000) | P | W | A | D);
                mov(qword_ptr(pte1), rax);
                mov(qword_ptr(DATA + 0xf00), 1);
                mov(rbx, VA);
                mov(qword_ptr(DATA + 0xf08), rbx);
                xor(ecx, ecx);
                invpcid(rcx, xmmword_ptr(DATA + 0xf00));
            );
            set_cr(a, cr3, t1.root | 1 | no_flush);
            see(a); // 3
            // The same by a whole context.
            asm!(a;
                mov(rax, (DATA + 0x3000) | P | W | A | D);
                mov(qword_ptr(pte2), rax);
                mov(qword_ptr(DATA + 0xf00), 2);
                mov(ecx, 1);
                invpcid(rcx, xmmword_ptr(DATA + 0xf00));
            );
            set_cr(a, cr3, t2.root | 2 | no_flush);
            see(a); // 4
            // Changed, and made known by loading CR3 without bit 63.
            asm!(a; mov(rax, DATA | P | W | A | D); mov(qword_ptr(pte1), rax););
            set_cr(a, cr3, t1.root | 1);
            see(a); // 1
            // Bit 63 is not kept.
            asm!(a; mov(rax, cr3); shr(rax, 32););
            report(a);
            // What is wrong with INVPCID's operands.
            asm!(a; mov(qword_ptr(DATA + 0xf00), 0x1001); mov(ecx, 1););
            attempt(a, |a| asm!(a; invpcid(rcx, xmmword_ptr(DATA + 0xf00)); ));
            asm!(a; mov(qword_ptr(DATA + 0xf00), 1); mov(ecx, 4););
            attempt(a, |a| asm!(a; invpcid(rcx, xmmword_ptr(DATA + 0xf00)); ));
            // Turning it on needs PCID 0.
            clear_cr(a, cr4, PCIDE);
            set_cr(a, cr3, t1.root | 8);
            attempt(a, |a| or_cr(a, cr4, PCIDE));
            // Without it bit 63 is reserved.
            attempt(a, |a| set_cr(a, cr3, t1.root | no_flush));
            see(a); // 1
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        if !v.has(1, 0, 2, 17) || !v.has(7, 0, 1, 10) {
            return eprintln!("not run: no PCID here");
        }
        assert_eq!(
            m.finish(&mut v),
            [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 1, 1, 0, 1, 1]
        );
        assert_eq!(m.vectors(), [(13, 0); 4]);
    });
}

#[test]
fn accesses_across_pages() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        // Three pages in reverse order, then nothing.
        for i in 0..3u64 {
            t.map(VA + 4096 * i, DATA + 4096 * (2 - i), P | W);
        }
        // A page that is read-only behind one that is not, and one behind nothing.
        t.map(VA + 0x1_0000, DATA + 0x3000, P | W);
        t.map(VA + 0x1_1000, DATA + 0x4000, P);
        m.memory.write(DATA + 0x3ff8, &[0x11; 8]);
        m.load(ENTRY, 64, |a| {
            asm!(a;
                mov(rbx, VA + 0xffd);
                mov(rax, 0x0807_0605_0403_0201u64);
                mov(qword_ptr(rbx), rax);
                mov(rax, qword_ptr(rbx));
            );
            report(a);
            asm!(a; lock.add(dword_ptr(rbx + 0x1001), 5);); // Page 1 to 2.
            asm!(a; mov(eax, dword_ptr(rbx + 0x1001)););
            report(a);
            asm!(a; mov(rbx, VA + 0x2ffc););
            attempt(a, |a| asm!(a; mov(rax, qword_ptr(rbx)); ));
            attempt(a, |a| asm!(a; mov(qword_ptr(rbx), rax); ));
            attempt(a, |a| asm!(a; movups(xmmword_ptr(rbx), xmm0); ));
            attempt(
                a,
                |a| asm!(a; lea(rbx, ptr(rbx - 8)); movups(xmm0, xmmword_ptr(rbx)); ),
            );
            // The write that fails on its second page has not written the first.
            asm!(a; mov(rbx, VA + 0x1_0ffc); mov(rax, -1i64););
            attempt(a, |a| asm!(a; mov(qword_ptr(rbx), rax); ));
            attempt(a, |a| asm!(a; add(qword_ptr(rbx), rax); ));
            attempt(a, |a| asm!(a; xchg(qword_ptr(rbx), rax); ));
            attempt(a, |a| asm!(a; movups(xmmword_ptr(rbx - 4), xmm0); ));
            // PUSH, and RSP stays.
            asm!(a; mov(rdx, rsp); mov(rsp, VA + 0x1_1004););
            attempt(a, |a| asm!(a; push(rax); ));
            asm!(a; mov(rax, rsp); mov(rsp, rdx););
            report(a);
            asm!(a; mov(eax, dword_ptr(DATA + 0x3ffc)););
            report(a);
            // REP MOVSB stops where the fault is.
            asm!(a;
                mov(esi, (DATA + 0x3000) as u32);
                mov(rdi, VA + 0x2ff0);
                mov(ecx, 100);
            );
            attempt(a, |a| asm!(a; rep.movsb(); ));
            asm!(a; mov(eax, ecx););
            report(a);
            asm!(a; mov(rax, rdi););
            report(a);
            asm!(a; mov(eax, esi););
            report(a);
            // Backwards.
            asm!(a;
                std();
                mov(rdi, VA + 0xf);
                mov(ecx, 30);
            );
            attempt(a, |a| asm!(a; rep.stosb(); ));
            asm!(a; cld(); mov(eax, ecx););
            report(a);
            end(a);
        });
        // RSP is elsewhere at the fault of PUSH: the handler has a stack of its own.
        m.set_gate(14, STUBS + 16 * 14, 0, 1);
        let mut v = m.long(0, ENTRY);
        assert_eq!(
            m.finish(&mut v),
            [
                0x0403_0201,
                5,
                (VA + 0x1_1004) as u32,
                0x1111_1111,
                84,
                (VA + 0x3000) as u32,
                (DATA + 0x3010) as u32,
                14,
            ]
        );
        let second = VA + 0x3000;
        let ro = VA + 0x1_1000;
        assert_eq!(
            m.page_faults(),
            [
                (0, second),
                (2, second),
                (2, second),
                (0, second),
                (3, ro),
                (3, ro),
                (3, ro),
                (3, ro),
                (3, ro),
                (2, second),
                (2, VA - 1),
            ]
        );
        let sources = m.memory.read(DATA + 0xff0, 16);
        assert_eq!(sources, m.memory.read(DATA + 0x3000, 16));
    });
}

#[test]
fn instructions_across_pages() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        // Two adjacent pages of code with an instruction across, from places that are not.
        t.map(VA, DATA, P | W);
        let pte = t.map(VA + 0x1000, DATA + 0x2000, 0);
        let code = [function(0x1234_5678), vec![0xcc]].concat();
        m.memory.write(DATA + 0xffe, &code[..2]);
        m.memory.write(DATA + 0x2000, &code[2..]);
        m.memory.write(DATA + 0x3000, &function(0x78)[2..]);
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(rbx, VA + 0xffe););
            attempt(a, |a| asm!(a; call(rbx); ));
            asm!(a; mov(rax, (DATA + 0x2000) | P); mov(qword_ptr(pte), rax); call(rbx););
            report(a);
            asm!(a;
                mov(rax, (DATA + 0x3000) | P);
                mov(qword_ptr(pte), rax);
                invlpg(ptr(rbx + 0x1000));
                call(rbx);
            );
            report(a);
            asm!(a; mov(rax, (DATA + 0x2000) | P | NX); mov(qword_ptr(pte), rax););
            asm!(a; invlpg(ptr(rbx + 0x1000)););
            attempt(a, |a| asm!(a; call(rbx); ));
            // Modified in its second part.
            asm!(a;
                mov(rax, (DATA + 0x2000) | P);
                mov(qword_ptr(pte), rax);
                invlpg(ptr(rbx + 0x1000));
                mov(byte_ptr(DATA + 0x2000), 0x99);
                xor(eax, eax);
                cpuid();
                mov(rbx, VA + 0xffe);
                call(rbx);
            );
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [0x1234_5678, 0x0000_0078, 0x1234_9978]);
        let faults = m.faults();
        assert_eq!(m.page_faults(), [(0x10, VA + 0x1000), (0x11, VA + 0x1000)]);
        assert!(faults.iter().all(|f| f.rip == VA + 0xffe), "{faults:x?}");
    });
}

#[test]
fn tables_that_map_themselves() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        t.map(VA, DATA, P | W);
        t.map(VA + 0x1000, DATA, P | W);
        m.memory.set_u64(t.root + 8 * 510, t.root | P | W);
        for i in 0..8u64 {
            m.memory.set_u32(DATA + 4096 * i, i as u32);
        }
        let pte = 0xffff_0000_0000_0000u64 | 510 << 39 | (VA >> 12) << 3;
        m.load(ENTRY, 64, |a| {
            for i in 0..8u64 {
                asm!(a;
                    mov(rbx, pte);
                    mov(rax, (DATA + 4096 * i) | P | W);
                    mov(qword_ptr(rbx), rax);
                    mov(rdx, VA);
                    invlpg(ptr(rdx));
                    mov(eax, dword_ptr(rdx));
                );
                report(a);
                // The accessed bit is seen through the same mapping.
                asm!(a; mov(eax, dword_ptr(rbx)); and(eax, 0x60););
                report(a);
                asm!(a; mov(dword_ptr(rdx + 4), eax); mov(eax, dword_ptr(rbx)); and(eax, 0x60););
                report(a);
            }
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let want: Vec<u32> = (0..8).flat_map(|i| [i, 0x20, 0x60]).collect();
        assert_eq!(m.finish(&mut v), want);
    });
}

#[test]
fn aliases() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        t.map(VA, DATA, P | W);
        t.map(VA + 0x5000, DATA, P | W);
        t.map(1 << 40, DATA, P | W);
        m.memory.write(DATA, &function(0));
        let rounds = engine.rounds(2000);
        m.load(ENTRY, 64, |a| {
            // Executed at one address, written through a second and a third.
            asm!(a; mov(esi, 0); xor(edi, edi); mov(r12, VA); mov(r13, VA + 0x5000); mov(r14, 1u64 << 40););
            let top = here(a);
            asm!(a;
                mov(dword_ptr(r13 + 1), esi);
                xor(eax, eax);
                cpuid();
                call(r12);
                add(edi, eax);
                lea(eax, ptr(rsi + 7));
                mov(dword_ptr(r14 + 1), eax);
                xor(eax, eax);
                cpuid();
                call(r12);
                add(edi, eax);
                call(r13);
                add(edi, eax);
                mov(eax, dword_ptr(r12 + 1));
                add(edi, eax);
                inc(esi);
                cmp(esi, rounds);
                jne(top);
                mov(eax, edi);
            );
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let want = (0..rounds).fold(0u32, |s, i| s.wrapping_add(4 * i + 21));
        assert_eq!(m.finish(&mut v), [want]);
    });
}

#[test]
fn addresses_that_are_not_canonical() {
    each(|engine| {
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(rbx, 0x8000_0000_0000u64););
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx)); ));
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx - 2)); ));
            attempt(a, |a| asm!(a; call(rbx); ));
            asm!(a; mov(rdx, rsp); mov(rsp, rbx););
            attempt(a, |a| asm!(a; mov(rax, qword_ptr(rsp)); ));
            attempt(a, |a| asm!(a; pop(rax); ));
            asm!(a; mov(rsp, rdx););
            asm!(a; mov(rbx, 0xffff_8000_0000_0000u64););
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx)); ));
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(rbx - 1)); ));
            end(a);
        });
        for vector in [12, 13] {
            m.set_gate(vector, STUBS + 16 * u64::from(vector), 0, 1);
        }
        let mut v = m.long(0, ENTRY);
        m.finish(&mut v);
        assert_eq!(
            m.vectors(),
            [
                (13, 0),
                (13, 0),
                (13, 0),
                (12, 0),
                (12, 0),
                (14, 0),
                (13, 0)
            ]
        );
    });
}

#[test]
fn paging_off_on_off() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Legacy);
        m.fill(&t, Paging::Legacy);
        // The same address is two places.
        t.map(DATA, DATA + 0x1000, P | W);
        m.memory.write(DATA, &function(1));
        m.memory.write(DATA + 0x1000, &function(2));
        m.load(ENTRY, 32, |a| {
            asm!(a; mov(eax, t.root as u32); mov(cr3, eax););
            for _ in 0..3 {
                asm!(a; mov(ebx, DATA as u32); call(ebx););
                report(a);
                asm!(a; mov(eax, dword_ptr(DATA as u32 + 1)););
                report(a);
                or_cr(a, cr0, PG as u32);
                asm!(a; mov(ebx, DATA as u32); call(ebx););
                report(a);
                asm!(a; mov(eax, dword_ptr(DATA as u32 + 1)););
                report(a);
                clear_cr(a, cr0, PG as u32);
            }
            end(a);
        });
        let mut v = m.protected(None);
        assert_eq!(m.finish(&mut v), [1, 1, 2, 2].repeat(3));
    });
}

#[test]
fn what_control_registers_refuse() {
    each(|engine| {
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            // PG without PE, NW without CD, PAE cleared in long mode, reserved bits.
            attempt(a, |a| set_cr(a, cr0, CR0 | PG | 1 << 29));
            attempt(a, |a| set_cr(a, cr0, (CR0 | PG) & !1));
            attempt(a, |a| set_cr(a, cr0, 1 << 32 | CR0 | PG));
            attempt(a, |a| set_cr(a, cr4, CR4));
            attempt(a, |a| set_cr(a, cr4, CR4 | PAE | 1 << 31));
            // LME while paging.
            attempt(a, |a| wrmsr(a, 0xc000_0080, 0xc01));
            // In 64-bit mode paging stays on.
            attempt(a, |a| set_cr(a, cr0, CR0));
            attempt(a, |a| asm!(a; mov(cr8, rsp); ));
            attempt(a, |a| asm!(a; db(&[0x0f, 0x20, 0xc8]); )); // CR1
            asm!(a; mov(rax, cr0););
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [(CR0 | PG) as u32]);
        let mut want = vec![(13, 0); 8];
        want.push((6, 0));
        assert_eq!(m.vectors(), want);
    });
}

#[test]
fn user_code_without_rights_to_a_page_of_its_own_code() {
    // A page of code that user code and kernel run in turn, and that one of them loses.
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        let pte = t.map(VA, DATA, P | W | U);
        m.memory.write(
            DATA,
            &assemble(VA, 64, |a| {
                asm!(a; mov(eax, 5); test(bl, bl); jz(VA + 0x20); int(0x80););
            }),
        );
        m.memory.write(DATA + 0x20, &[0xc3]);
        m.load(ENTRY, 64, |a| {
            asm!(a; xor(ebx, ebx); mov(rdx, VA); call(rdx););
            report(a);
            asm!(a; mov(bl, 1););
            call_user(a, VA, USER_STACK, 2);
            asm!(a; mov(dword_ptr(pte), (DATA | P | W) as i32); mov(rdx, VA); invlpg(ptr(rdx)););
            asm!(a; xor(ebx, ebx); call(rdx););
            report(a);
            call_user(a, SECOND, USER_STACK, 2);
            end(a);
        });
        m.load(SECOND, 64, |a| {
            asm!(a; mov(bl, 1); mov(rdx, VA););
            attempt(a, |a| asm!(a; call(rdx); ));
            asm!(a; int(0x80););
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [5, 5]);
        assert_eq!(m.page_faults(), [(0x15, VA)]);
    });
}

#[test]
fn strings_over_pages() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        // Four pages, in another order than their memory, and none behind them.
        for (i, page) in [2, 0, 3, 1].into_iter().enumerate() {
            let (va, pa) = (VA + 0x1000 * i as u64, DATA + 0x1000 * page);
            t.map(va, pa, P | W | A | D);
        }
        let source = DATA + 0x8000;
        let bytes: Vec<u8> = (0..0x4000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        m.memory.write(source, &bytes);
        let state = |a: &mut CodeAssembler| {
            asm!(a; mov(eax, ecx););
            report(a);
            asm!(a; mov(rax, rdi); sub(rax, rbx););
            report(a);
        };
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(rbx, VA););
            // Elements that cross pages, at both sides.
            asm!(a; lea(rdi, ptr(rbx + 3)); mov(rsi, source + 6); mov(ecx, 0x600); rep.movsq(););
            state(a);
            asm!(a; lea(rdi, ptr(rbx + 0xff9)); mov(eax, 0x1234_5678); mov(ecx, 0x401); rep.stosd(););
            state(a);
            asm!(a; lea(rdi, ptr(rbx + 0x2fff)); mov(eax, 0x5aa5); mov(ecx, 3); rep.stosw(););
            state(a);
            // Overlapping, forwards: the first bytes repeat.
            asm!(a; lea(rsi, ptr(rbx + 0x1200)); lea(rdi, ptr(rsi + 2)); mov(ecx, 0x1500); rep.movsb(););
            state(a);
            // Into the page that is not there: what was done stays done. Flags are kept.
            asm!(a; lea(rdi, ptr(rbx + 0x1801)); mov(eax, 0x77); mov(ecx, 0x8000); stc(););
            attempt(a, |a| asm!(a; rep.stosb(); ));
            asm!(a; adc(ecx, 0););
            state(a);
            asm!(a; lea(rdi, ptr(rbx + 0x2ffe)); mov(eax, 0x77); mov(ecx, 0x8000););
            attempt(a, |a| asm!(a; rep.stosq(); ));
            state(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let got = m.finish(&mut v);
        let left = 0x8000 - (0x4000 - 0x1801) + 1;
        assert_eq!(
            got,
            [
                0,
                0x3003,
                0,
                0x1ffd,
                0,
                0x3005,
                0,
                0x2702,
                left,
                0x4000,
                0x8000 - 0x200,
                0x3ffe
            ]
        );
        let faults: Vec<u64> = m.faults().iter().map(|f| f.cr2).collect();
        assert_eq!(faults, [VA + 0x4000, VA + 0x4000]);
        let mut want = vec![0; 0x4000];
        want[3..0x3003].copy_from_slice(&bytes[6..0x3006]);
        for i in 0..0x401 {
            want[0xff9 + 4 * i..][..4].copy_from_slice(&0x1234_5678u32.to_le_bytes());
        }
        for i in 0..3 {
            want[0x2fff + 2 * i..][..2].copy_from_slice(&0x5aa5u16.to_le_bytes());
        }
        for i in 0..0x1500 {
            want[0x1202 + i] = want[0x1200 + i];
        }
        want[0x1801..].fill(0x77);
        for i in 0..0x200 {
            want[0x2ffe + 8 * i..][..8].copy_from_slice(&0x77u64.to_le_bytes());
        }
        for (i, page) in [2, 0, 3, 1].into_iter().enumerate() {
            let have = m.memory.read(DATA + 0x1000 * page, 4096);
            assert!(have == want[0x1000 * i..][..0x1000], "page {i}");
        }
    });
}
