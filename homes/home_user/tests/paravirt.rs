//! KVM's paravirtual interfaces as a 64-bit guest uses them: PV EOI, steal time, the hypercalls.

mod machine;

use home_user::{EngineKind, Errno, Vcpu};
use iced_x86::code_asm::*;
use kvm_bindings::{Msrs, kvm_msr_entry};
use machine::{ENTRY, Machine, each, expect_out};
use std::time::{Duration, Instant};

const APIC: u64 = 0xfee0_0000;
const STEAL_TIME: u32 = 0x4b56_4d03;
const PV_EOI: u32 = 0x4b56_4d04;
const KICK_CPU: u32 = 5;
const SEND_IPI: u32 = 10;
const SCHED_YIELD: u32 = 11;

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u32) {
    a.mov(ecx, index).unwrap();
    a.mov(eax, value).unwrap();
    a.xor(edx, edx).unwrap();
    a.wrmsr().unwrap();
}

/// In-service bit of `vector` in a saved local APIC.
fn in_service(v: &Vcpu, vector: u8) -> bool {
    let regs = v.get_lapic().unwrap().regs;
    let at = 0x100 + usize::from(vector / 32) * 0x10 + usize::from(vector % 32 / 8);
    regs[at] as u8 & 1 << (vector % 8) != 0
}

/// A machine whose vCPU 0 handles vectors 0x50 and 0x60 at 0x3000 and 0x3800.
fn with_handlers(
    engine: EngineKind,
    main: impl Fn(&mut CodeAssembler),
    low: impl Fn(&mut CodeAssembler),
    high: impl Fn(&mut CodeAssembler),
) -> (Machine, Vcpu) {
    let m = Machine::new(engine, true);
    m.load(ENTRY, 64, main);
    m.load(0x3000, 64, low);
    m.load(0x3800, 64, high);
    let v = m.vcpu(0);
    m.long_mode(&v);
    m.set_idt(&v, 0x50, 0x3000);
    m.set_idt(&v, 0x60, 0x3800);
    (m, v)
}

fn self_ipi(a: &mut CodeAssembler, vector: u32) {
    a.mov(dword_ptr(rbx + 0x300), 0x4_4000 | vector).unwrap();
}

fn start(a: &mut CodeAssembler) {
    a.mov(rbx, APIC).unwrap();
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff).unwrap();
    wrmsr(a, PV_EOI, 0x4000 | 1);
    a.sti().unwrap();
}

#[test]
fn pv_eoi_is_offered_and_taken() {
    each(|engine| {
        let (m, mut v) = with_handlers(
            engine,
            |a| {
                start(a);
                self_ipi(a, 0x50);
                a.nop().unwrap();
                a.nop().unwrap();
                a.out(0x10, al).unwrap();
                self_ipi(a, 0x50);
                a.nop().unwrap();
                a.nop().unwrap();
                a.out(0x11, al).unwrap();
            },
            |a| {
                // What Linux does: no EOI where the bit was set.
                let mut done = a.create_label();
                a.inc(dword_ptr(0x4100)).unwrap();
                a.btr(dword_ptr(0x4000), 0).unwrap();
                a.jc(done).unwrap();
                a.inc(dword_ptr(0x4104)).unwrap();
                a.mov(dword_ptr(rbx + 0xb0), 0).unwrap();
                a.set_label(&mut done).unwrap();
                a.iretq().unwrap();
            },
            |a| a.iretq().unwrap(),
        );
        expect_out(&mut v, 0x10);
        assert!(!in_service(&v, 0x50), "the cleared bit ends the interrupt");
        expect_out(&mut v, 0x11);
        assert_eq!(m.memory.u32(0x4100), 2);
        assert_eq!(m.memory.u32(0x4104), 0, "no EOI was written");
        assert_eq!(m.memory.u32(0x4000), 0);
    });
}

#[test]
fn pv_eoi_is_withdrawn_at_an_exit() {
    each(|engine| {
        let (m, mut v) = with_handlers(
            engine,
            |a| {
                start(a);
                self_ipi(a, 0x50);
                a.nop().unwrap();
                a.out(0x12, al).unwrap();
            },
            |a| {
                a.out(0x10, al).unwrap();
                a.out(0x11, al).unwrap();
                a.mov(dword_ptr(rbx + 0xb0), 0).unwrap();
                a.iretq().unwrap();
            },
            |a| a.iretq().unwrap(),
        );
        expect_out(&mut v, 0x10);
        assert_eq!(
            m.memory.u32(0x4000),
            0,
            "withdrawn: user space sees no offer"
        );
        assert!(in_service(&v, 0x50));
        expect_out(&mut v, 0x11);
        expect_out(&mut v, 0x12);
        assert!(!in_service(&v, 0x50));
    });
}

#[test]
fn pv_eoi_of_a_nested_interrupt() {
    each(|engine| {
        let take = |a: &mut CodeAssembler, counter: u64| {
            let mut done = a.create_label();
            a.btr(dword_ptr(0x4000), 0).unwrap();
            a.jc(done).unwrap();
            a.inc(dword_ptr(counter)).unwrap();
            a.mov(dword_ptr(rbx + 0xb0), 0).unwrap();
            a.set_label(&mut done).unwrap();
        };
        let (m, mut v) = with_handlers(
            engine,
            |a| {
                start(a);
                self_ipi(a, 0x50);
                a.nop().unwrap();
                a.out(0x10, al).unwrap();
            },
            |a| {
                a.sti().unwrap();
                self_ipi(a, 0x60);
                a.nop().unwrap();
                take(a, 0x4104);
                a.iretq().unwrap();
            },
            |a| {
                a.inc(dword_ptr(0x4100)).unwrap();
                take(a, 0x4108);
                a.iretq().unwrap();
            },
        );
        expect_out(&mut v, 0x10);
        assert_eq!(m.memory.u32(0x4100), 1);
        assert_eq!(m.memory.u32(0x4108), 0, "the inner one ended by the bit");
        assert_eq!(m.memory.u32(0x4104), 1, "the outer one by an EOI");
        assert!(!in_service(&v, 0x50) && !in_service(&v, 0x60));
    });
}

#[test]
fn pv_eoi_is_not_offered_where_the_ioapic_must_know() {
    each(|engine| {
        let (m, mut v) = with_handlers(
            engine,
            |a| {
                // Pin 20: vector 0x50, level-triggered, to APIC 0.
                a.mov(rdi, 0xfec0_0000u64).unwrap();
                a.mov(dword_ptr(rdi), 0x10 + 2 * 20).unwrap();
                a.mov(dword_ptr(rdi + 0x10), 0x8050).unwrap();
                start(a);
                a.out(0x10, al).unwrap();
                a.nop().unwrap();
                a.out(0x11, al).unwrap();
            },
            |a| {
                a.mov(eax, dword_ptr(0x4000)).unwrap();
                a.mov(dword_ptr(0x4100), eax).unwrap();
                a.inc(dword_ptr(0x4104)).unwrap();
                a.mov(dword_ptr(rbx + 0xb0), 0).unwrap();
                a.iretq().unwrap();
            },
            |a| a.iretq().unwrap(),
        );
        expect_out(&mut v, 0x10);
        m.vm.set_irq_line(20, true).unwrap();
        m.vm.set_irq_line(20, false).unwrap();
        expect_out(&mut v, 0x11);
        assert_eq!((m.memory.u32(0x4100), m.memory.u32(0x4104)), (0, 1));
    });
}

#[test]
fn steal_time_counts_waiting_for_a_cpu() {
    each(|engine| {
        let m = Machine::new(engine, true);
        m.load(ENTRY, 64, |a| {
            let (mut spin, mut again) = (a.create_label(), a.create_label());
            wrmsr(a, STEAL_TIME, 0x4000 | 1);
            a.mov(rbx, APIC).unwrap();
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff).unwrap();
            a.set_label(&mut again).unwrap();
            a.mov(ecx, 100_000).unwrap();
            a.set_label(&mut spin).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(spin).unwrap();
            a.movzx(eax, byte_ptr(0x4010)).unwrap();
            a.out(0x10, al).unwrap();
            a.jmp(again).unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        // Twice as many busy threads as CPUs: this one must wait.
        let cpus = std::thread::available_parallelism().unwrap().get();
        let end = Instant::now() + Duration::from_secs(20);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            use std::sync::atomic::Ordering::Relaxed;
            for _ in 0..2 * cpus {
                s.spawn(|| {
                    while !stop.load(Relaxed) && Instant::now() < end {
                        std::hint::spin_loop();
                    }
                });
            }
            loop {
                assert_eq!(expect_out(&mut v, 0x10), [0], "not preempted while it runs");
                assert_eq!(m.memory.u8(0x4010), 1, "preempted while user space has it");
                assert_eq!(m.memory.u32(0x4008) % 2, 0, "an even version");
                if m.memory.u64(0x4000) > 20_000_000 {
                    break;
                }
                assert!(Instant::now() < end, "nothing stolen");
            }
            stop.store(true, Relaxed);
        });
        assert!(m.memory.u32(0x4008) >= 2);
    });
}

#[test]
fn a_tlb_flush_is_left_for_a_vcpu_that_does_not_run() {
    each(|engine| {
        let m = Machine::new(engine, true);
        m.load(ENTRY, 64, |a| {
            wrmsr(a, STEAL_TIME, 0x4000 | 1);
            a.mov(rbx, 0x20_0000u64 - 0x1000).unwrap();
            a.mov(eax, dword_ptr(rbx)).unwrap();
            a.out(0x10, eax).unwrap();
            a.mov(eax, dword_ptr(rbx)).unwrap();
            a.out(0x11, eax).unwrap();
        });
        m.memory.write(0x1f_f000, &1u32.to_le_bytes());
        m.memory.write(0x7000, &2u32.to_le_bytes());
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        // The last page of the first 2 MiB by a page table of its own.
        m.memory.write(0x10_2000, &0x10_4007u64.to_le_bytes());
        for i in 0..512u64 {
            m.memory
                .write(0x10_4000 + i * 8, &(i << 12 | 7).to_le_bytes());
        }
        assert_eq!(expect_out(&mut v, 0x10), 1u32.to_le_bytes());
        m.memory.write(0x10_4ff8, &0x7007u64.to_le_bytes());
        assert_eq!(m.memory.u8(0x4010), 1);
        m.memory.write(0x4010, &[3]);
        assert_eq!(expect_out(&mut v, 0x11), 2u32.to_le_bytes());
    });
}

/// vCPU 0 at [`ENTRY`] and vCPU 1 at 0x2000, both in 64-bit mode with their local APIC on; vCPU 1 on a
/// thread of its own until `main` is through.
fn two(
    engine: EngineKind,
    first: impl Fn(&mut CodeAssembler),
    second: impl Fn(&mut CodeAssembler),
    main: impl FnOnce(&Machine, &mut Vcpu),
) {
    let m = Machine::new(engine, true);
    m.load(ENTRY, 64, first);
    m.load(0x2000, 64, second);
    m.load(0x3000, 64, |a| {
        a.lock().inc(dword_ptr(0x4200)).unwrap();
        a.mov(dword_ptr(rbx + 0xb0), 0).unwrap();
        a.iretq().unwrap();
    });
    let mut v0 = m.vcpu(0);
    m.long_mode(&v0);
    m.set_idt(&v0, 0x50, 0x3000);
    let mut v1 = m.vcpu(1);
    m.long_mode(&v1);
    m.set_idt(&v1, 0x50, 0x3000);
    v1.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: 0 })
        .unwrap();
    let mut regs = v1.get_regs().unwrap();
    (regs.rip, regs.rsp, regs.rflags) = (0x2000, 0x9000, 2);
    v1.set_regs(&regs).unwrap();
    let kicker = v1.kicker();
    std::thread::scope(|s| {
        s.spawn(move || {
            while let Err(e) = v1.run() {
                match e {
                    Errno::EAGAIN => {}
                    Errno::EINTR => break,
                    e => panic!("{e}"),
                }
            }
        });
        main(&m, &mut v0);
        kicker.kick();
    });
}

fn enable_apic(a: &mut CodeAssembler) {
    a.mov(rbx, APIC).unwrap();
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff).unwrap();
}

#[test]
fn kick_cpu_ends_a_halt_without_an_interrupt() {
    each(|engine| {
        two(
            engine,
            |a| {
                let mut wait = a.create_label();
                enable_apic(a);
                a.out(0x10, al).unwrap();
                a.mov(eax, KICK_CPU).unwrap();
                a.xor(ebx, ebx).unwrap();
                a.mov(ecx, 1).unwrap();
                a.vmcall().unwrap();
                a.mov(dword_ptr(0x4108), eax).unwrap();
                a.set_label(&mut wait).unwrap();
                a.pause().unwrap();
                a.cmp(dword_ptr(0x4104), 1).unwrap();
                a.jne(wait).unwrap();
                a.out(0x11, al).unwrap();
            },
            |a| {
                let mut forever = a.create_label();
                enable_apic(a);
                a.mov(dword_ptr(0x4100), 1).unwrap();
                a.hlt().unwrap(); // interrupts off
                a.mov(dword_ptr(0x4104), 1).unwrap();
                a.set_label(&mut forever).unwrap();
                a.hlt().unwrap();
                a.jmp(forever).unwrap();
            },
            |m, v| {
                expect_out(v, 0x10);
                while m.memory.u32(0x4100) == 0 {
                    std::thread::yield_now();
                }
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!(m.memory.u32(0x4104), 0, "asleep");
                expect_out(v, 0x11);
                assert_eq!(m.memory.u32(0x4108), 0);
            },
        );
    });
}

#[test]
fn send_ipi_reaches_a_set_of_vcpus() {
    each(|engine| {
        two(
            engine,
            |a| {
                let mut wait = a.create_label();
                enable_apic(a);
                a.sti().unwrap();
                a.out(0x10, al).unwrap();
                a.push(rbx).unwrap();
                a.mov(eax, SEND_IPI).unwrap();
                a.mov(ebx, 0b111).unwrap(); // APIC ids 0 to 2
                a.xor(ecx, ecx).unwrap();
                a.xor(edx, edx).unwrap();
                a.mov(esi, 0x50).unwrap(); // fixed
                a.vmcall().unwrap();
                a.pop(rbx).unwrap();
                a.mov(dword_ptr(0x4108), eax).unwrap();
                a.set_label(&mut wait).unwrap();
                a.cmp(dword_ptr(0x4200), 2).unwrap();
                a.jne(wait).unwrap();
                // A delivery mode that there is not: SMI.
                a.push(rbx).unwrap();
                a.mov(eax, SEND_IPI).unwrap();
                a.mov(ebx, 1).unwrap();
                a.mov(esi, 0x250).unwrap();
                a.vmcall().unwrap();
                a.pop(rbx).unwrap();
                a.mov(dword_ptr(0x410c), eax).unwrap();
                a.mov(eax, SCHED_YIELD).unwrap();
                a.xor(ebx, ebx).unwrap();
                a.vmcall().unwrap();
                a.mov(dword_ptr(0x4110), eax).unwrap();
                a.mov(eax, 99).unwrap();
                a.vmcall().unwrap();
                a.mov(dword_ptr(0x4114), eax).unwrap();
                a.out(0x11, al).unwrap();
            },
            |a| {
                let mut forever = a.create_label();
                enable_apic(a);
                a.mov(dword_ptr(0x4100), 1).unwrap();
                a.sti().unwrap();
                a.set_label(&mut forever).unwrap();
                a.hlt().unwrap();
                a.jmp(forever).unwrap();
            },
            |m, v| {
                expect_out(v, 0x10);
                while m.memory.u32(0x4100) == 0 {
                    std::thread::yield_now();
                }
                expect_out(v, 0x11);
                assert_eq!(m.memory.u32(0x4108), 2, "two vCPUs took it");
                assert_eq!(m.memory.u32(0x410c) as i32, -22, "EINVAL");
                assert_eq!(m.memory.u32(0x4110), 0);
                assert_eq!(m.memory.u32(0x4114) as i32, -1000, "ENOSYS");
            },
        );
    });
}

#[test]
fn msrs_are_checked() {
    let m = Machine::new(EngineKind::Interp, true);
    let v = m.vcpu(0);
    let set = |index: u32, data: u64| {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        v.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap() == 1
    };
    assert!(set(STEAL_TIME, 0x4001));
    assert!(!set(STEAL_TIME, 0x4021), "64-byte alignment");
    assert!(set(PV_EOI, 0x4001));
    assert!(!set(PV_EOI, 0x4003), "4-byte alignment");
    let cpuid = m.system.get_supported_cpuid(256).unwrap();
    let features = cpuid.as_slice().iter().find(|e| e.function == 0x4000_0001);
    let features = features.unwrap().eax;
    for (bit, name) in [
        (4, "asynchronous page faults, of which none is ever needed"),
        (5, "steal time"),
        (6, "PV EOI"),
        (7, "PV unhalt"),
        (9, "PV TLB flush"),
    ] {
        assert_ne!(features & 1 << bit, 0, "{name}");
    }
}
