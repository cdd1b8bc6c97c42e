//! Memslots, changed by the host while vCPUs run.

use conformance::asm::*;
use conformance::backend::Exit;
use conformance::layout::*;
use conformance::memory::Memory;
use conformance::tables::*;
use conformance::{Machine, asm, each};
use iced_x86::code_asm::*;

/// Where the slots of these tests are: outside of slot 0.
const GPA: u64 = 0x1000_0000;
const READ_ONLY: u32 = 2;
const LOG_DIRTY: u32 = 1;

#[test]
fn create_move_delete_and_read_only() {
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        for i in 0..8 {
            t.map(GPA + 4096 * i, GPA + 4096 * i, P | W);
        }
        let extra = Memory::new(0x8000);
        extra.set_u32(0, 0x1111);
        extra.set_u32(0x1000, 0x2222);
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(ebx, GPA as u32); mov(edx, 0x77););
            // Nothing; RAM; other RAM; elsewhere; read-only; nothing.
            for _ in 0..6 {
                asm!(a; mov(eax, dword_ptr(rbx)););
                report(a);
                asm!(a; mov(dword_ptr(rbx + 8), edx););
                asm!(a; mov(eax, dword_ptr(rbx + 0x2000)););
                report(a);
                host(a);
            }
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        v.answer = 0xabcd;
        let mut step = 0;
        let mut mmio = vec![];
        let got = m.finish_with(&mut v, |_, exit| {
            if !matches!(exit, Exit::Out(PORT_HOST, _)) {
                return mmio.push((step, exit));
            }
            step += 1;
            match step {
                1 => m.vm.set_slot(1, GPA, &extra, 0, 0x1000, 0),
                2 => {
                    assert_eq!(extra.u32(8), 0x77);
                    m.vm.set_slot(1, GPA, &extra, 0, 0, 0);
                    m.vm.set_slot(1, GPA, &extra, 0x1000, 0x1000, 0);
                }
                3 => {
                    assert_eq!(extra.u32(0x1008), 0x77);
                    // Moved: the same memory at another address.
                    m.vm.set_slot(1, GPA + 0x2000, &extra, 0x1000, 0x1000, 0);
                }
                4 => {
                    m.vm.set_slot(1, GPA, &extra, 0, 0, 0);
                    extra.set_u32(8, 0);
                    m.vm.set_slot(1, GPA, &extra, 0, 0x1000, READ_ONLY);
                }
                5 => m.vm.set_slot(1, GPA, &extra, 0, 0, 0),
                _ => {}
            }
        });
        assert_eq!(
            got,
            [
                0xabcd, 0xabcd, 0x1111, 0xabcd, 0x2222, 0xabcd, 0xabcd, 0x2222, 0x1111, 0xabcd,
                0xabcd, 0xabcd
            ]
        );
        assert_eq!(extra.u32(8), 0, "a write to a read-only slot");
        let read = |step, at| (step, Exit::MmioRead(GPA + at, 4));
        let write = |step| (step, Exit::MmioWrite(GPA + 8, 4, 0x77));
        assert_eq!(
            mmio,
            [
                read(0, 0),
                write(0),
                read(0, 0x2000),
                read(1, 0x2000),
                read(2, 0x2000),
                read(3, 0),
                write(3),
                write(4),
                read(4, 0x2000),
                read(5, 0),
                write(5),
                read(5, 0x2000),
            ]
        );
        // The VM goes before its memory.
        drop(v);
        drop(m);
    });
}

#[test]
fn code_in_slots_that_are_replaced() {
    each(|engine| {
        for paging in [false, true] {
            let m = Machine::new(engine);
            if paging {
                let t = m.tables(Paging::Long);
                m.fill(&t, Paging::Long);
                t.map(GPA, GPA, P | W);
            }
            let extra = Memory::new(0x8000);
            for i in 0..8u64 {
                extra.write(4096 * i, &[0xb8, i as u8, 0, 0, 0, 0xc3]);
            }
            m.vm.set_slot(1, GPA, &extra, 0, 0x1000, 0);
            m.load(ENTRY, if paging { 64 } else { 32 }, |a| {
                for _ in 0..8 {
                    if paging {
                        asm!(a; mov(ebx, GPA as u32); call(rbx););
                    } else {
                        asm!(a; mov(ebx, GPA as u32); call(ebx););
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
            let mut n = 0;
            let got = m.finish_with(&mut v, |_, _| {
                n += 1;
                if n < 8 {
                    m.vm.set_slot(1, GPA, &extra, 0, 0, 0);
                    m.vm.set_slot(1, GPA, &extra, 4096 * n, 0x1000, 0);
                }
            });
            assert_eq!(got, (0..8).collect::<Vec<u32>>());
            drop(v);
            drop(m);
        }
    });
}

#[test]
fn dirty_log_of_a_writing_guest() {
    // The log says which pages have changed since it was fetched: a copy that follows it ends equal.
    each(|engine| {
        let m = Machine::new(engine);
        let t = m.tables(Paging::Long);
        m.fill(&t, Paging::Long);
        let pages = 16u64;
        for i in 0..pages {
            t.map(GPA + 4096 * i, GPA + 4096 * i, P | W);
        }
        let extra = Memory::new(4096 * pages);
        m.vm.set_slot(1, GPA, &extra, 0, 4096 * pages, LOG_DIRTY);
        let rounds = engine.rounds(200_000);
        let stop = DATA;
        m.load(ENTRY, 64, |a| {
            asm!(a; mov(r8d, GPA as u32); mov(esi, 1); mov(ecx, rounds););
            let top = here(a);
            asm!(a;
                imul_3(eax, esi, 0x343fd);
                add(eax, 0x269ec3);
                mov(esi, eax);
                shr(eax, 12);
                and(eax, 0xfff8);
                inc(qword_ptr(r8 + rax));
                dec(ecx);
                jnz(top);
                mov(qword_ptr(stop), 1);
            );
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let mut copy = vec![0u8; (4096 * pages) as usize];
        let mut fetch = || {
            for page in m.vm.dirty_pages(1, 4096 * pages) {
                let at = (4096 * page) as usize;
                copy[at..at + 4096].copy_from_slice(&extra.read(4096 * page, 4096));
            }
        };
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| m.finish(&mut v));
            while m.memory.u64(stop) == 0 && !guest.is_finished() {
                fetch();
                std::thread::yield_now();
            }
            guest.join().expect("the guest");
        });
        fetch();
        assert!(
            copy == extra.read(0, (4096 * pages) as usize),
            "the copy missed a write"
        );
        assert_eq!(m.vm.dirty_pages(1, 4096 * pages), []);
        drop(v);
        drop(m);
    });
}

#[test]
fn two_machines_at_once() {
    each(|engine| {
        let rounds = engine.rounds(20_000);
        std::thread::scope(|scope| {
            for n in 1..=2u32 {
                scope.spawn(move || {
                    let m = Machine::new(engine);
                    m.load(ENTRY, 64, |a| {
                        asm!(a; mov(ecx, rounds); xor(eax, eax););
                        let top = here(a);
                        asm!(a; add(dword_ptr(DATA), n); add(eax, dword_ptr(DATA)); dec(ecx); jnz(top););
                        report(a);
                        end(a);
                    });
                    let mut v = m.long(0, ENTRY);
                    let want = (1..=rounds).fold(0u32, |s, i| s.wrapping_add(i * n));
                    assert_eq!(m.finish(&mut v), [want]);
                });
            }
        });
    });
}
