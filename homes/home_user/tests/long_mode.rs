//! Small 64-bit guests: local APIC timer, IPIs, INIT and SIPI, kvmclock, CPUID, FPU.

mod machine;

use home_user::{Errno, VcpuExit};
use iced_x86::code_asm::*;
use kvm_bindings::{Msrs, kvm_msr_entry};
use machine::{ENTRY, Machine, each, expect_out};
use std::time::{Duration, Instant};

const APIC: u64 = 0xfee0_0000;

#[test]
fn apic_timer_wakes_hlt_and_ends_loops() {
    each(|engine| {
        let m = Machine::new(engine, true);
        m.load(ENTRY, 64, |a| {
            let (mut again, mut spin) = (a.create_label(), a.create_label());
            a.mov(rbx, APIC).unwrap();
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff).unwrap();
            a.mov(dword_ptr(rbx + 0x3e0), 0xb).unwrap(); // divide by 1
            a.mov(dword_ptr(rbx + 0x320), 0x2_0040).unwrap(); // periodic, vector 0x40
            a.mov(dword_ptr(rbx + 0x380), 1_000_000).unwrap(); // 1 ms
            a.sti().unwrap();
            a.set_label(&mut again).unwrap();
            a.hlt().unwrap();
            a.cmp(dword_ptr(0x4000), 3).unwrap();
            a.jb(again).unwrap();
            // Now without HLT: the timer must break into running code.
            a.set_label(&mut spin).unwrap();
            a.cmp(dword_ptr(0x4000), 6).unwrap();
            a.jb(spin).unwrap();
            a.out(0x99, al).unwrap();
        });
        m.load(0x3000, 64, |a| {
            a.inc(dword_ptr(0x4000)).unwrap();
            a.mov(dword_ptr(rbx + 0xb0), 0).unwrap();
            a.iretq().unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        m.set_idt(&v, 0x40, 0x3000);
        let start = Instant::now();
        expect_out(&mut v, 0x99);
        assert!(m.memory.u32(0x4000) >= 6);
        assert!(start.elapsed() >= Duration::from_millis(5));
        assert!(start.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn init_and_sipi_start_a_second_vcpu() {
    each(|engine| {
        let m = Machine::new(engine, true);
        m.load(ENTRY, 64, |a| {
            let mut wait = a.create_label();
            a.mov(rbx, APIC).unwrap();
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff).unwrap();
            a.mov(dword_ptr(rbx + 0x310), 1 << 24).unwrap();
            a.mov(dword_ptr(rbx + 0x300), 0x4500).unwrap(); // INIT
            a.mov(dword_ptr(rbx + 0x300), 0x4606).unwrap(); // SIPI, page 6
            a.set_label(&mut wait).unwrap();
            a.pause().unwrap();
            a.cmp(dword_ptr(0x4000), 0x1234).unwrap();
            a.jne(wait).unwrap();
            a.out(0x99, al).unwrap();
        });
        m.load(0x6000, 16, |a| {
            a.xor(ax, ax).unwrap();
            a.mov(ds, ax).unwrap();
            a.mov(dword_ptr(0x4000), 0x1234).unwrap();
            a.hlt().unwrap();
        });
        let mut v0 = m.vcpu(0);
        m.long_mode(&v0);
        let mut v1 = m.vcpu(1);
        assert_eq!(v1.get_mp_state().unwrap().mp_state, 1);
        let kicker = v1.kicker();
        std::thread::scope(|s| {
            let ap = s.spawn(move || {
                let mut again = 0;
                loop {
                    match v1.run() {
                        Err(Errno::EAGAIN) => again += 1,
                        Err(Errno::EINTR) => break,
                        other => panic!("{other:?}"),
                    }
                }
                (again, v1.get_sregs().unwrap(), v1.get_mp_state().unwrap())
            });
            expect_out(&mut v0, 0x99);
            std::thread::sleep(Duration::from_millis(20));
            kicker.kick();
            let (again, sregs, state) = ap.join().unwrap();
            assert!(again >= 1);
            assert_eq!((sregs.cs.selector, sregs.cs.base), (0x600, 0x6000));
            assert_eq!(state.mp_state, 3);
        });
    });
}

#[test]
fn ipi_between_vcpus() {
    each(|engine| {
        let m = Machine::new(engine, true);
        // vCPU 1 is set up by user space and waits in HLT for vector 0x50.
        m.load(ENTRY, 64, |a| {
            a.mov(rbx, APIC).unwrap();
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff).unwrap();
            a.mov(dword_ptr(rbx + 0x310), 1 << 24).unwrap();
            a.out(0x10, al).unwrap();
            a.mov(dword_ptr(rbx + 0x300), 0x4050).unwrap();
            a.out(0x11, al).unwrap();
        });
        m.load(0x2000, 64, |a| {
            let mut again = a.create_label();
            a.mov(rbx, APIC).unwrap();
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff).unwrap();
            a.sti().unwrap();
            a.set_label(&mut again).unwrap();
            a.hlt().unwrap();
            a.jmp(again).unwrap();
        });
        m.load(0x3000, 64, |a| {
            a.out(0x55, al).unwrap();
        });
        let mut v0 = m.vcpu(0);
        let mut v1 = m.vcpu(1);
        for v in [&v0, &v1] {
            m.long_mode(v);
            m.set_idt(v, 0x50, 0x3000);
        }
        v1.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: 0 })
            .unwrap();
        let mut regs = v0.get_regs().unwrap();
        regs.rip = 0x2000;
        v1.set_regs(&regs).unwrap();
        expect_out(&mut v0, 0x10);
        std::thread::scope(|s| {
            let other = s.spawn(move || expect_out(&mut v1, 0x55));
            std::thread::sleep(Duration::from_millis(20));
            expect_out(&mut v0, 0x11);
            other.join().unwrap();
        });
    });
}

#[test]
fn kvmclock_advances_with_the_tsc() {
    each(|engine| {
        let m = Machine::new(engine, true);
        m.load(ENTRY, 64, |a| {
            a.mov(ecx, 0x4b56_4d01).unwrap();
            a.mov(eax, 0x7001).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
            a.rdtsc().unwrap();
            a.mov(dword_ptr(0x5000), eax).unwrap();
            a.mov(dword_ptr(0x5004), edx).unwrap();
            a.out(0x10, al).unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        expect_out(&mut v, 0x10);
        let version = m.memory.u32(0x7000);
        assert!(version != 0 && version.is_multiple_of(2));
        let tsc_then = m.memory.u64(0x7008);
        let ns_then = m.memory.u64(0x7010);
        let mul = u128::from(m.memory.u32(0x7018));
        let shift = m.memory.u8(0x701c) as i8;
        assert_eq!(m.memory.u8(0x701d) & 1, 1);
        let ticks = u128::from(m.memory.u64(0x5000).wrapping_sub(tsc_then));
        let ticks = if shift < 0 {
            ticks >> -shift
        } else {
            ticks << shift
        };
        let guest_ns = ns_then + ((ticks * mul) >> 32) as u64;
        let host_ns = m.vm.get_clock().unwrap().clock;
        assert!(guest_ns <= host_ns);
        assert!(host_ns - guest_ns < 1_000_000_000, "{guest_ns} {host_ns}");
    });
}

#[test]
fn page_fault_reaches_the_handler() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 64, |a| {
            a.mov(rax, qword_ptr(0x7f_ffff_0000u64)).unwrap();
        });
        m.load(0x3000, 64, |a| {
            a.mov(rax, cr2).unwrap();
            a.shr(rax, 16).unwrap();
            a.out(0x10, eax).unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        m.set_idt(&v, 14, 0x3000);
        assert_eq!(expect_out(&mut v, 0x10), 0x7f_ffffu32.to_le_bytes());
    });
}

#[test]
fn sse_runs_and_shows_in_the_fpu_state() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 64, |a| {
            a.mov(eax, 21).unwrap();
            a.cvtsi2sd(xmm1, eax).unwrap();
            a.addsd(xmm1, xmm1).unwrap();
            a.cvttsd2si(eax, xmm1).unwrap();
            a.out(0x10, al).unwrap();
            a.cvttsd2si(eax, xmm1).unwrap();
            a.out(0x10, al).unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        assert_eq!(expect_out(&mut v, 0x10), [42]);
        let mut fpu = v.get_fpu().unwrap();
        assert_eq!(fpu.xmm[1][..8], 42f64.to_le_bytes());
        fpu.xmm[1][..8].copy_from_slice(&17f64.to_le_bytes());
        v.set_fpu(&fpu).unwrap();
        assert_eq!(expect_out(&mut v, 0x10), [17]);
        let xsave = v.get_xsave().unwrap();
        v.set_xsave(&xsave).unwrap();
        assert_eq!(v.get_fpu().unwrap().xmm[1], fpu.xmm[1]);
    });
}

#[test]
fn cpuid_and_unknown_msrs() {
    each(|engine| {
        let m = Machine::new(engine, true);
        m.load(ENTRY, 64, |a| {
            a.mov(eax, 0x4000_0000).unwrap();
            a.cpuid().unwrap();
            a.mov(eax, ebx).unwrap();
            a.out(0x10, eax).unwrap();
            a.mov(ecx, 0x1234_5678).unwrap();
            a.rdmsr().unwrap();
            a.out(0x11, eax).unwrap();
        });
        m.load(0x3000, 64, |a| {
            a.out(0x13, al).unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        m.set_idt(&v, 13, 0x3000);
        assert_eq!(expect_out(&mut v, 0x10), *b"KVMK");
        expect_out(&mut v, 0x13);
        let list = m.system.get_msr_index_list().unwrap();
        let entries: Vec<_> = list
            .as_slice()
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        // Everything in the list can be read and written back.
        let mut msrs = Msrs::from_entries(&entries).unwrap();
        assert_eq!(v.get_msrs(&mut msrs).unwrap(), entries.len());
        assert_eq!(v.set_msrs(&msrs).unwrap(), entries.len());
    });
}

#[test]
fn state_round_trips() {
    each(|engine| {
        let m = Machine::new(engine, true);
        let v = m.vcpu(0);
        m.long_mode(&v);
        let sregs = v.get_sregs().unwrap();
        v.set_sregs(&sregs).unwrap();
        assert_eq!(v.get_sregs().unwrap(), sregs);
        let lapic = v.get_lapic().unwrap();
        v.set_lapic(&lapic).unwrap();
        assert_eq!(v.get_lapic().unwrap().regs, lapic.regs);
        let events = v.get_vcpu_events().unwrap();
        v.set_vcpu_events(&events).unwrap();
        let xcrs = v.get_xcrs().unwrap();
        v.set_xcrs(&xcrs).unwrap();
        let debug = v.get_debug_regs().unwrap();
        v.set_debug_regs(&debug).unwrap();
        for chip_id in 0..3 {
            let mut chip = kvm_bindings::kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            m.vm.get_irqchip(&mut chip).unwrap();
            m.vm.set_irqchip(&chip).unwrap();
        }
        let pit = m.vm.get_pit2().unwrap();
        m.vm.set_pit2(&pit).unwrap();
        let t = v.translate_gva(0x1234).unwrap();
        assert_eq!((t.valid, t.physical_address), (1, 0x1234));
        let mut s = sregs;
        s.cr4 |= 1 << 13;
        assert_eq!(v.set_sregs(&s), Err(Errno::EINVAL));
    });
}

#[test]
fn shutdown_in_long_mode() {
    each(|engine| {
        let m = Machine::new(engine, true);
        m.load(ENTRY, 64, |a| {
            a.ud2().unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        assert!(matches!(v.run().unwrap(), VcpuExit::Shutdown));
    });
}
