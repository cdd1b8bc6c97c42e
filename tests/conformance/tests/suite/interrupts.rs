//! Interrupt controllers, timers, NMI, clocks.

use conformance::asm::*;
use conformance::layout::*;
use conformance::tables::*;
use conformance::{Engine, Machine, asm, each};
use iced_x86::code_asm::*;

const APIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;

/// A machine with interrupt controllers that are mapped.
fn machine(engine: Engine) -> Machine {
    let m = Machine::with_irqchip(engine);
    let t = m.tables(Paging::Long);
    m.fill(&t, Paging::Long);
    t.map(APIC, APIC, P | W);
    t.map(IOAPIC, IOAPIC, P | W);
    m
}

/// A handler that reports `vector` and counts it in [`DATA`]; with `eoi` it ends the interrupt.
fn handler(m: &Machine, vector: u8, eoi: bool) {
    let at = 0x1_4000 + 0x80 * u64::from(vector & 0x7f);
    m.load(at, 64, |a| {
        asm!(a; push(rax); inc(dword_ptr(DATA)); mov(eax, u32::from(vector)););
        report(a);
        if eoi {
            asm!(a; mov(eax, APIC as u32); mov(dword_ptr(rax + 0xb0), 0););
        }
        asm!(a; pop(rax); iretq(););
    });
    m.set_gate(vector, at, 0, 0);
}

fn write_apic(a: &mut CodeAssembler, register: u32, value: u32) {
    asm!(a; mov(eax, APIC as u32 + register); mov(dword_ptr(rax), value););
}

fn write_ioapic(a: &mut CodeAssembler, register: u32, value: u32) {
    asm!(a; mov(eax, IOAPIC as u32); mov(dword_ptr(rax), register); mov(dword_ptr(rax + 0x10), value););
}

fn enable_apic(a: &mut CodeAssembler) {
    write_apic(a, 0xf0, 0x1ff);
}

/// STI; NOP; CLI: what is pending comes now.
fn window(a: &mut CodeAssembler) {
    asm!(a; sti(); nop(); cli(););
}

/// An IPI to this vCPU itself.
fn self_ipi(a: &mut CodeAssembler, vector: u8) {
    write_apic(a, 0x300, 0x4_4000 | u32::from(vector));
}

#[test]
fn local_apic_priorities_and_task_priority() {
    each(|engine| {
        let m = machine(engine);
        for v in [0x41, 0x52, 0x63] {
            handler(&m, v, true);
        }
        m.load(ENTRY, 64, |a| {
            enable_apic(a);
            for v in [0x41, 0x63, 0x52] {
                self_ipi(a, v);
            }
            window(a); // The highest first, and each other behind it.
            asm!(a; sti(); nop(); nop(); cli(););
            report_value(a, 1);
            asm!(a; mov(eax, 5); mov(cr8, rax););
            for v in [0x41, 0x63, 0x52] {
                self_ipi(a, v);
            }
            asm!(a; sti(); nop(); nop(); cli(););
            report_value(a, 2); // Only 63h came.
            asm!(a; mov(eax, APIC as u32); mov(eax, dword_ptr(rax + 0x80)););
            report(a);
            write_apic(a, 0x80, 0x40);
            asm!(a; sti(); nop(); nop(); cli(););
            report_value(a, 3); // 52h too.
            asm!(a; xor(eax, eax); mov(cr8, rax); sti(); nop(); nop(); cli(););
            report_value(a, 4);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(
            m.finish(&mut v),
            [0x63, 0x52, 0x41, 1, 0x63, 2, 0x50, 0x52, 3, 0x41, 4]
        );
    });
}

#[test]
fn local_apic_timer() {
    each(|engine| {
        let m = machine(engine);
        handler(&m, 0x40, true);
        m.load(ENTRY, 64, |a| {
            enable_apic(a);
            write_apic(a, 0x3e0, 0xb); // Divide by 1.
            // One-shot: wakes HLT once.
            write_apic(a, 0x320, 0x40);
            write_apic(a, 0x380, 1_000_000);
            asm!(a; sti(); hlt(); cli(););
            asm!(a; mov(eax, APIC as u32); mov(eax, dword_ptr(rax + 0x390)););
            report(a);
            // Periodic.
            write_apic(a, 0x320, 0x2_0040);
            write_apic(a, 0x380, 500_000);
            for _ in 0..3 {
                asm!(a; sti(); hlt(); cli(););
            }
            write_apic(a, 0x380, 0);
            write_apic(a, 0x320, 0x1_0040);
            report_value(a, 1);
            // TSC deadline.
            write_apic(a, 0x320, 0x4_0040);
            asm!(a; mfence(); rdtsc(); shl(rdx, 32); or(rax, rdx); mov(rbx, rax); add(rax, 3_000_000););
            asm!(a; mov(rsi, rax); mov(rdx, rax); shr(rdx, 32); mov(ecx, 0x6e0); wrmsr(););
            asm!(a; sti(); hlt(); cli(); rdtsc(); shl(rdx, 32); or(rax, rdx); cmp(rax, rsi); setae(al); movzx(eax, al););
            report(a);
            asm!(a; mov(ecx, 0x6e0); rdmsr(););
            report(a);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        if !v.has(1, 0, 2, 24) {
            return eprintln!("not run: no TSC deadline timer");
        }
        let got = m.finish(&mut v);
        // A period may end once more before the timer is stopped.
        let periodic = got[2..].iter().take_while(|r| **r == 0x40).count();
        assert!((3..=4).contains(&periodic), "{got:x?}");
        assert_eq!(got[..2], [0x40, 0]);
        assert_eq!(got[2 + periodic..], [1, 0x40, 1, 0]);
    });
}

#[test]
fn legacy_controllers() {
    each(|engine| {
        let m = machine(engine);
        for (irq, vector) in [(0, 0x20u8), (3, 0x23), (10, 0x2a)] {
            let _: u8 = irq;
            handler(&m, vector, false);
        }
        m.load(ENTRY, 64, |a| {
            // LVT0 as ExtINT.
            enable_apic(a);
            write_apic(a, 0x350, 0x700);
            for (port, value) in [
                (0x20u32, 0x11u32), (0x21, 0x20), (0x21, 4), (0x21, 1),
                (0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1),
                (0x21, 0xf2), (0xa1, 0xfb),
            ] {
                asm!(a; mov(eax, value); out(port, al););
            }
            host(a); // IRQ 3 and 10 rise; 10 has priority over 3.
            asm!(a; sti(); nop(); cli(););
            asm!(a; mov(al, 0x20); out(0xa0, al); out(0x20, al); sti(); nop(); cli(););
            report_value(a, 1);
            asm!(a; mov(al, 0x20); out(0x20, al););
            // PIT, mode 0: once.
            asm!(a; mov(al, 0x30); out(0x43, al); mov(al, 0xa9); out(0x40, al); mov(al, 4); out(0x40, al););
            asm!(a; sti(); hlt(); cli(); mov(al, 0x20); out(0x20, al););
            // Mode 2: again and again.
            asm!(a; mov(al, 0x34); out(0x43, al); mov(al, 0xa9); out(0x40, al); mov(al, 4); out(0x40, al););
            for _ in 0..3 {
                asm!(a; sti(); hlt(); cli(); mov(al, 0x20); out(0x20, al););
            }
            report_value(a, 2);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let got = m.finish_with(&mut v, |_, _| {
            for irq in [3, 10] {
                m.vm.set_irq_line(irq, true);
                m.vm.set_irq_line(irq, false);
            }
        });
        assert_eq!(got, [0x2a, 0x23, 1, 0x20, 0x20, 0x20, 0x20, 2]);
    });
}

#[test]
fn ioapic_edge_and_level() {
    each(|engine| {
        let m = machine(engine);
        handler(&m, 0x50, true);
        // The level-triggered one: the host lowers the line in its handler, the second time.
        m.load(0x1_3000, 64, |a| {
            asm!(a; push(rax); mov(eax, 0x60););
            report(a);
            host(a);
            asm!(a; mov(eax, APIC as u32); mov(dword_ptr(rax + 0xb0), 0); pop(rax); iretq(););
        });
        m.set_gate(0x60, 0x1_3000, 0, 0);
        m.load(ENTRY, 64, |a| {
            enable_apic(a);
            write_apic(a, 0x350, 0x1_0000); // The 8259 sees the lines too.
            write_ioapic(a, 0x10 + 2 * 5, 0x50);
            write_ioapic(a, 0x11 + 2 * 5, 0);
            write_ioapic(a, 0x10 + 2 * 11, 0x8060);
            write_ioapic(a, 0x11 + 2 * 11, 0);
            host(a); // An edge of 5 and another while the line is up, which is none.
            asm!(a; sti(); nop(); nop(); cli(););
            report_value(a, 1);
            host(a); // 11 goes up.
            asm!(a; sti(); nop(); nop(); nop(); cli(););
            report_value(a, 2);
            write_ioapic(a, 0x10 + 2 * 11, 0x1_8060); // Masked: nothing, and then
            host(a);
            asm!(a; sti(); nop(); nop(); cli(););
            report_value(a, 3);
            write_ioapic(a, 0x10 + 2 * 11, 0x8060); // it comes.
            asm!(a; sti(); nop(); nop(); cli(););
            report_value(a, 4);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let mut step = 0;
        let got = m.finish_with(&mut v, |_, _| {
            step += 1;
            match step {
                1 => {
                    m.vm.set_irq_line(5, true);
                    m.vm.set_irq_line(5, true);
                }
                2 | 5 => m.vm.set_irq_line(11, true),
                4 | 6 => m.vm.set_irq_line(11, false),
                _ => {}
            }
        });
        assert_eq!(got, [0x50, 1, 0x60, 0x60, 2, 3, 0x60, 4]);
    });
}

#[test]
fn interprocessor_interrupts() {
    each(|engine| {
        let m = machine(engine);
        for v in [0x71u8, 0x72, 0x73] {
            let at = 0x1_4000 + 0x80 * u64::from(v & 0x7f);
            m.load(at, 64, |a| {
                asm!(a; push(rax); mov(eax, APIC as u32);
                    mov(dword_ptr(rax + 0xb0), 0);
                    mov(eax, dword_ptr(rax + 0x20)); shr(eax, 24); // Whose counter
                    shl(eax, 6); lock.inc(dword_ptr(rax + (DATA as i32 + 4 * i32::from(v & 3))));
                    pop(rax); iretq(););
            });
            m.set_gate(v, at, 0, 0);
        }
        // NMI: counts at 0.
        m.load(0x1_3000, 64, |a| {
            asm!(a; push(rax); mov(eax, APIC as u32);
                mov(eax, dword_ptr(rax + 0x20)); shr(eax, 24);
                shl(eax, 6); lock.inc(dword_ptr(rax + DATA as i32)); pop(rax); iretq(););
        });
        m.set_gate(2, 0x1_3000, 0, 0);
        let (ready, stop) = (DATA + 0x1000, DATA + 0x1040);
        let expect = |a: &mut CodeAssembler, cpu: u64, which: u64, n: u32| {
            let wait = here(a);
            asm!(a; pause(); cmp(dword_ptr(DATA + 64 * cpu + 4 * which), n); jne(wait););
        };
        m.load(ENTRY, 64, |a| {
            enable_apic(a);
            asm!(a; sti(););
            let wait = here(a);
            asm!(a; pause(); cmp(dword_ptr(ready), 2); jne(wait););
            for round in 1..=20 {
                // To one, physical.
                write_apic(a, 0x310, 0x0200_0000);
                write_apic(a, 0x300, 0x4071);
                expect(a, 2, 1, round);
                // All but this.
                write_apic(a, 0x300, 0xc_4072);
                expect(a, 1, 2, round);
                expect(a, 2, 2, round);
                // All, with this.
                write_apic(a, 0x300, 0x8_4073);
                for cpu in 0..3 {
                    expect(a, cpu, 3, round);
                }
                // Logical, flat: vCPUs 1 and 2.
                write_apic(a, 0x310, 0x0600_0000);
                write_apic(a, 0x300, 0x4871);
                expect(a, 1, 1, round);
                expect(a, 2, 1, round + 1);
                asm!(a; mov(dword_ptr(DATA + 128 + 4), round););
                // NMI.
                write_apic(a, 0x310, 0x0100_0000);
                write_apic(a, 0x300, 0x4400);
                expect(a, 1, 0, round);
            }
            asm!(a; mov(dword_ptr(stop), 1););
            write_apic(a, 0x300, 0xc_4072);
            end(a);
        });
        m.load(SECOND, 64, |a| {
            enable_apic(a);
            write_apic(a, 0xe0, 0xffff_ffff);
            asm!(a; mov(eax, APIC as u32); mov(eax, dword_ptr(rax + 0x20)); shr(eax, 24););
            asm!(a; mov(ecx, eax); mov(eax, 0x0100_0000); shl(eax, cl); mov(ebx, APIC as u32); mov(dword_ptr(rbx + 0xd0), eax););
            asm!(a; lock.inc(dword_ptr(ready)););
            let top = here(a);
            asm!(a; cli(); cmp(dword_ptr(stop), 0););
            let mut over = a.create_label();
            asm!(a; jne(over); sti(); hlt(); jmp(top); set_label(&mut over); nop(););
            end(a);
        });
        let vcpus = vec![m.long(0, ENTRY), m.long(1, SECOND), m.long(2, SECOND)];
        m.finish_all(vcpus);
    });
}

#[test]
fn nmi_blocked_until_iret() {
    each(|engine| {
        let m = machine(engine);
        m.load(0x1_3000, 64, |a| {
            asm!(a; inc(dword_ptr(DATA)); mov(eax, dword_ptr(DATA)););
            report(a);
            host(a); // Two more at the first: one is kept.
            asm!(a; nop(); nop(););
            report_value(a, 0x80);
            asm!(a; iretq(););
        });
        m.set_gate(2, 0x1_3000, 0, 0);
        m.load(ENTRY, 64, |a| {
            host(a);
            asm!(a; nop(););
            report_value(a, 9);
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        let mut step = 0;
        let got = m.finish_with(&mut v, |v, _| {
            step += 1;
            match step {
                1 => v.nmi(),
                2 => {
                    v.nmi();
                    v.nmi();
                }
                _ => {}
            }
        });
        assert_eq!(got, [1, 0x80, 2, 0x80, 9]);
    });
}

#[test]
fn kvmclock() {
    each(|engine| {
        // Each vCPU's time as its page says, never backwards across both.
        let m = Machine::new(engine);
        let rounds = engine.rounds(5_000);
        let last = DATA + 0x100;
        let turn = DATA + 0x180;
        m.load(SECOND, 64, |a| {
            // RDI: number. Its page: DATA + 64 * number.
            asm!(a; mov(r8, rdi); shl(r8, 6); add(r8, DATA as i32);
                lea(rax, ptr(r8 + 1)); xor(edx, edx); mov(ecx, 0x4b56_4d01); wrmsr();
                xor(r12d, r12d); mov(esi, rounds););
            let top = here(a);
            let wait = here2(a);
            let mut good = a.create_label();
            let mut left = a.create_label();
            let mut shifted = a.create_label();
            asm!(a;
                pause();
                cmp(dword_ptr(turn), edi);
                jne(wait);
                mov(r9d, dword_ptr(r8)); // version
                test(r9d, 1);
                jnz(top);
                lfence();
                rdtsc();
                shl(rdx, 32);
                or(rax, rdx);
                sub(rax, qword_ptr(r8 + 8));
                movsx(ecx, byte_ptr(r8 + 28));
                test(ecx, ecx);
                jns(left);
                neg(ecx);
                shr(rax, cl);
                jmp(shifted);
                set_label(&mut left);
                shl(rax, cl);
                set_label(&mut shifted);
                mov(edx, dword_ptr(r8 + 24));
                mul(rdx);
                shrd(rax, rdx, 32);
                add(rax, qword_ptr(r8 + 16));
                cmp(r9d, dword_ptr(r8));
                jne(top);
                cmp(rax, qword_ptr(last));
                jae(good);
                inc(r12d);
                set_label(&mut good);
                mov(qword_ptr(last), rax);
                xor(dword_ptr(turn), 1);
                dec(esi);
                jnz(top);
                mov(eax, r12d);
            );
            report(a);
            asm!(a; mov(rax, qword_ptr(last)); shr(rax, 32););
            report(a);
            end(a);
        });
        let vcpus = (0..2)
            .map(|id| {
                let v = m.long(id, SECOND);
                let mut r = v.regs();
                r.rdi = id;
                v.set_regs(&r);
                v
            })
            .collect();
        let got = m.finish_all(vcpus);
        assert_eq!((got[0][0], got[1][0]), (0, 0), "time went backwards");
        assert_ne!(m.memory.u64(last), 0);
    });
}

/// A label for the same place as one before: a NOP later.
fn here2(a: &mut CodeAssembler) -> CodeLabel {
    asm!(a; nop(););
    here(a)
}
