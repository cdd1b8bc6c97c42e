//! Small real-mode guests: ports, MMIO, HLT, interrupts, NMI, shutdown, kicks.

mod machine;

use home_user::{Errno, VcpuExit};
use iced_x86::code_asm::*;
use machine::{ENTRY, Machine, each, expect_out};
use std::time::{Duration, Instant};

#[test]
fn ports_and_halt_without_irqchip() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 16, |a| {
            a.mov(al, 0x42).unwrap();
            a.mov(dx, 0x3f8).unwrap();
            a.out(dx, al).unwrap();
            a.in_(ax, 0x60).unwrap();
            a.add(ax, 1).unwrap();
            a.out(0x80, ax).unwrap();
            a.hlt().unwrap();
            a.out(0x81, al).unwrap();
        });
        let mut v = m.vcpu(0);
        assert_eq!(expect_out(&mut v, 0x3f8), [0x42]);
        match v.run().unwrap() {
            VcpuExit::IoIn(0x60, data) => data.copy_from_slice(&[0x33, 0x12]),
            other => panic!("{other:?}"),
        }
        assert_eq!(expect_out(&mut v, 0x80), [0x34, 0x12]);
        assert!(matches!(v.run().unwrap(), VcpuExit::Hlt));
        // HLT has retired: running again goes on behind it.
        assert_eq!(expect_out(&mut v, 0x81), [0x34]);
    });
}

#[test]
fn string_io() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.memory.write(0x2000, b"hello");
        m.load(ENTRY, 16, |a| {
            a.mov(si, 0x2000).unwrap();
            a.mov(cx, 5).unwrap();
            a.mov(dx, 0x3f8).unwrap();
            a.rep().outsb().unwrap();
            a.mov(di, 0x3000).unwrap();
            a.mov(cx, 4).unwrap();
            a.rep().insb().unwrap();
            a.hlt().unwrap();
        });
        let mut v = m.vcpu(0);
        let mut sent = Vec::new();
        let mut given = 0;
        loop {
            match v.run().unwrap() {
                VcpuExit::IoOut(0x3f8, data) => sent.extend_from_slice(data),
                VcpuExit::IoIn(0x3f8, data) => {
                    for b in data {
                        given += 1;
                        *b = given;
                    }
                }
                VcpuExit::Hlt => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(sent, b"hello");
        assert_eq!(m.memory.u32(0x3000), 0x0403_0201);
    });
}

#[test]
fn mmio_completes_by_executing_again() {
    each(|engine| {
        let m = Machine::new(engine, false);
        // DS = 0xffff with a large offset reaches beyond the slot only by its base, so set one.
        m.load(ENTRY, 16, |a| {
            a.mov(eax, dword_ptr(0x10)).unwrap();
            a.add(dword_ptr(0x20), eax).unwrap();
            a.mov(dword_ptr(0x4000).cs(), eax).unwrap();
            a.hlt().unwrap();
        });
        let mut v = m.vcpu(0);
        let mut s = v.get_sregs().unwrap();
        s.ds.base = 0x4000_0000;
        v.set_sregs(&s).unwrap();
        match v.run().unwrap() {
            VcpuExit::MmioRead(0x4000_0010, data) => data.copy_from_slice(&5u32.to_le_bytes()),
            other => panic!("{other:?}"),
        }
        // Read, modify, write: two exits, and the read is asked for once only.
        match v.run().unwrap() {
            VcpuExit::MmioRead(0x4000_0020, data) => data.copy_from_slice(&7u32.to_le_bytes()),
            other => panic!("{other:?}"),
        }
        match v.run().unwrap() {
            VcpuExit::MmioWrite(0x4000_0020, data) => assert_eq!(data, 12u32.to_le_bytes()),
            other => panic!("{other:?}"),
        }
        assert!(matches!(v.run().unwrap(), VcpuExit::Hlt));
        assert_eq!(m.memory.u32(0x4000), 5);
    });
}

#[test]
fn immediate_exit_finishes_the_access_first() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 16, |a| {
            a.in_(al, 0x10).unwrap();
            a.out(0x11, al).unwrap();
        });
        let mut v = m.vcpu(0);
        match v.run().unwrap() {
            VcpuExit::IoIn(0x10, data) => data[0] = 9,
            other => panic!("{other:?}"),
        }
        v.set_kvm_immediate_exit(1);
        assert_eq!(v.run().unwrap_err(), Errno::EINTR);
        let regs = v.get_regs().unwrap();
        assert_eq!((regs.rip, regs.rax as u8), (ENTRY + 2, 9));
        assert_eq!(v.run().unwrap_err(), Errno::EINTR);
        v.set_kvm_immediate_exit(0);
        assert_eq!(expect_out(&mut v, 0x11), [9]);
    });
}

#[test]
fn a_kick_ends_a_loop_once() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 16, |a| {
            let mut top = a.create_label();
            a.set_label(&mut top).unwrap();
            a.inc(ax).unwrap();
            a.jmp(top).unwrap();
        });
        let mut v = m.vcpu(0);
        let kicker = v.kicker();
        let t = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            kicker.kick();
        });
        assert_eq!(v.run().unwrap_err(), Errno::EINTR);
        t.join().unwrap();
        // A kick that comes before counts for the next run.
        v.kicker().kick();
        assert_eq!(v.run().unwrap_err(), Errno::EINTR);
        let kicker = v.kicker();
        let start = Instant::now();
        let t = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            kicker.kick();
        });
        assert_eq!(v.run().unwrap_err(), Errno::EINTR);
        assert!(start.elapsed() >= Duration::from_millis(15));
        t.join().unwrap();
    });
}

#[test]
fn triple_fault_is_a_shutdown() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 16, |a| {
            a.ud2().unwrap();
        });
        let mut v = m.vcpu(0);
        let mut s = v.get_sregs().unwrap();
        s.idt.limit = 0;
        v.set_sregs(&s).unwrap();
        assert!(matches!(v.run().unwrap(), VcpuExit::Shutdown));
    });
}

/// Points a real-mode vector at a handler.
fn set_ivt(m: &Machine, vector: u8, handler: u16) {
    let at = u64::from(vector) * 4;
    m.memory.write(at, &u32::from(handler).to_le_bytes());
}

#[test]
fn pit_interrupt_wakes_hlt() {
    each(|engine| {
        let m = Machine::new(engine, true);
        set_ivt(&m, 0x20, 0x3000);
        m.load(ENTRY, 16, |a| {
            let mut again = a.create_label();
            // 8259: vectors from 0x20, only IRQ 0 unmasked.
            for (port, value) in [
                (0x20, 0x11),
                (0x21, 0x20),
                (0x21, 4),
                (0x21, 1),
                (0x21, 0xfe),
            ] {
                a.mov(al, value).unwrap();
                a.out(port, al).unwrap();
            }
            // 8254: channel 0, mode 2, 1193 clocks: 1 ms.
            a.mov(al, 0x34).unwrap();
            a.out(0x43, al).unwrap();
            a.mov(al, 1193 & 0xff).unwrap();
            a.out(0x40, al).unwrap();
            a.mov(al, 1193 >> 8).unwrap();
            a.out(0x40, al).unwrap();
            a.sti().unwrap();
            a.set_label(&mut again).unwrap();
            a.hlt().unwrap();
            a.cmp(byte_ptr(0x4000), 5).unwrap();
            a.jb(again).unwrap();
            a.out(0x99, al).unwrap();
        });
        m.load(0x3000, 16, |a| {
            a.inc(byte_ptr(0x4000)).unwrap();
            a.mov(al, 0x20).unwrap();
            a.out(0x20, al).unwrap();
            a.iret().unwrap();
        });
        let mut v = m.vcpu(0);
        let start = Instant::now();
        expect_out(&mut v, 0x99);
        // One more may come between the comparison and the OUT.
        assert!(m.memory.u8(0x4000) >= 5);
        assert!(start.elapsed() >= Duration::from_millis(4));
        assert!(start.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn interrupt_window_and_user_space_irqchip() {
    each(|engine| {
        let m = Machine::new(engine, false);
        set_ivt(&m, 0x55, 0x3000);
        m.load(ENTRY, 16, |a| {
            a.cli().unwrap();
            a.out(0x10, al).unwrap();
            a.sti().unwrap();
            a.nop().unwrap();
            a.nop().unwrap();
            a.out(0x11, al).unwrap();
        });
        m.load(0x3000, 16, |a| {
            a.out(0x55, al).unwrap();
            a.iret().unwrap();
        });
        let mut v = m.vcpu(0);
        expect_out(&mut v, 0x10);
        assert_eq!(v.get_kvm_run().ready_for_interrupt_injection, 0);
        v.set_kvm_request_interrupt_window(1);
        assert!(matches!(v.run().unwrap(), VcpuExit::IrqWindowOpen));
        assert_eq!(v.get_kvm_run().ready_for_interrupt_injection, 1);
        assert_eq!(v.get_kvm_run().if_flag, 1);
        v.interrupt(0x55).unwrap();
        assert_eq!(v.interrupt(0x56).unwrap_err(), Errno::EEXIST);
        v.set_kvm_request_interrupt_window(0);
        expect_out(&mut v, 0x55);
        expect_out(&mut v, 0x11);
    });
}

#[test]
fn nmi_is_delivered_and_masked_until_iret() {
    each(|engine| {
        let m = Machine::new(engine, true);
        set_ivt(&m, 2, 0x3000);
        m.load(ENTRY, 16, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            a.nop().unwrap();
            a.out(0x10, al).unwrap();
            a.jmp(again).unwrap();
        });
        m.load(0x3000, 16, |a| {
            a.out(0x11, al).unwrap();
            a.inc(byte_ptr(0x4000)).unwrap();
            a.iret().unwrap();
        });
        let mut v = m.vcpu(0);
        v.nmi().unwrap();
        expect_out(&mut v, 0x11);
        assert_eq!(v.get_vcpu_events().unwrap().nmi.masked, 1);
        // A second one waits for the handler's end.
        v.nmi().unwrap();
        expect_out(&mut v, 0x11);
        assert_eq!(m.memory.u8(0x4000), 1);
        expect_out(&mut v, 0x10);
        assert_eq!(m.memory.u8(0x4000), 2);
        // It wakes a halted vCPU, whatever RFLAGS.IF says.
        v.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: 3 })
            .unwrap();
        v.nmi().unwrap();
        expect_out(&mut v, 0x11);
    });
}

#[test]
fn dirty_log() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 16, |a| {
            for _ in 0..2 {
                a.mov(byte_ptr(0x5000), 1).unwrap();
                a.mov(word_ptr(0x7fff), 1).unwrap();
                a.out(0x10, al).unwrap();
            }
        });
        let mut v = m.vcpu(0);
        assert_eq!(m.vm.get_dirty_log(0, machine::MEMORY), Err(Errno::ENOENT));
        m.set_slot(1);
        expect_out(&mut v, 0x10);
        let log = m.vm.get_dirty_log(0, machine::MEMORY).unwrap();
        assert_eq!(log.len(), machine::MEMORY / 4096 / 64);
        assert_eq!(log[0], 1 << 5 | 1 << 7 | 1 << 8);
        assert!(log[1..].iter().all(|&w| w == 0));
        // Fetching clears, and the next writes are logged again.
        assert_eq!(m.vm.get_dirty_log(0, machine::MEMORY).unwrap()[0], 0);
        expect_out(&mut v, 0x10);
        let log = m.vm.get_dirty_log(0, machine::MEMORY).unwrap();
        assert_eq!(log[0], 1 << 5 | 1 << 7 | 1 << 8);
    });
}

#[test]
fn ioeventfd_and_irqfd() {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::FromRawFd;
    each(|engine| {
        let m = Machine::new(engine, true);
        set_ivt(&m, 0x25, 0x3000);
        m.load(ENTRY, 16, |a| {
            let mut again = a.create_label();
            for (port, value) in [
                (0x20, 0x11),
                (0x21, 0x20),
                (0x21, 4),
                (0x21, 1),
                (0x21, 0xdf),
            ] {
                a.mov(al, value).unwrap();
                a.out(port, al).unwrap();
            }
            a.mov(ax, 7).unwrap();
            a.out(0x70, ax).unwrap();
            a.mov(ax, 8).unwrap();
            a.out(0x70, ax).unwrap();
            a.sti().unwrap();
            a.set_label(&mut again).unwrap();
            a.hlt().unwrap();
            a.jmp(again).unwrap();
        });
        m.load(0x3000, 16, |a| {
            a.out(0x11, al).unwrap();
            a.iret().unwrap();
        });
        #[expect(unsafe_code, reason = "eventfd has no wrapper in std")]
        let eventfd = || {
            // SAFETY: a new descriptor that nobody else owns.
            unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) }
        };
        let (mut kick, mut irq) = (eventfd(), eventfd());
        let addr = home_user::IoEventAddress::Pio(0x70);
        m.vm.register_ioevent(&kick, &addr, 7u16).unwrap();
        m.vm.register_irqfd(&irq, 5).unwrap();
        assert_eq!(m.vm.register_irqfd(&irq, 5), Err(Errno::EBUSY));
        let mut v = m.vcpu(0);
        // The write of 7 was taken by the event, that of 8 comes out.
        assert_eq!(expect_out(&mut v, 0x70), [8, 0]);
        let mut count = [0; 8];
        kick.read_exact(&mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
        irq.write_all(&1u64.to_ne_bytes()).unwrap();
        expect_out(&mut v, 0x11);
        m.vm.unregister_ioevent(&kick, &addr, 7u16).unwrap();
        m.vm.unregister_irqfd(&irq, 5).unwrap();
    });
}

#[test]
fn resampling_irqfd_follows_the_eoi() {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::FromRawFd;
    each(|engine| {
        let m = Machine::new(engine, true);
        set_ivt(&m, 0x25, 0x3000);
        m.load(ENTRY, 16, |a| {
            let mut again = a.create_label();
            for (port, value) in [
                (0x20, 0x11),
                (0x21, 0x20),
                (0x21, 4),
                (0x21, 1),
                (0x21, 0xdf),
            ] {
                a.mov(al, value).unwrap();
                a.out(port, al).unwrap();
            }
            // Line 5 is level-triggered.
            a.mov(dx, 0x4d0).unwrap();
            a.mov(al, 0x20).unwrap();
            a.out(dx, al).unwrap();
            a.out(0x10, al).unwrap();
            a.sti().unwrap();
            a.set_label(&mut again).unwrap();
            a.hlt().unwrap();
            a.jmp(again).unwrap();
        });
        m.load(0x3000, 16, |a| {
            a.out(0x11, al).unwrap();
            a.mov(al, 0x20).unwrap();
            a.out(0x20, al).unwrap();
            a.out(0x12, al).unwrap();
            a.iret().unwrap();
        });
        #[expect(unsafe_code, reason = "eventfd has no wrapper in std")]
        let eventfd = || {
            // SAFETY: a new descriptor that nobody else owns.
            unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) }
        };
        let (mut irq, mut resample) = (eventfd(), eventfd());
        m.vm.register_irqfd_with_resample(&irq, &resample, 5)
            .unwrap();
        let mut v = m.vcpu(0);
        // Not before: the PIC's initialization acknowledges what is pending.
        expect_out(&mut v, 0x10);
        let mut count = [0; 8];
        for _ in 0..3 {
            irq.write_all(&1u64.to_ne_bytes()).unwrap();
            expect_out(&mut v, 0x11);
            assert!(resample.read(&mut count).is_err(), "not acknowledged yet");
            expect_out(&mut v, 0x12);
            assert_eq!(resample.read(&mut count).unwrap(), 8);
        }
        m.vm.unregister_irqfd(&irq, 5).unwrap();
    });
}

#[test]
fn single_step_and_breakpoint_for_a_debugger() {
    use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_SW_BP};
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 16, |a| {
            a.nop().unwrap();
            a.inc(ax).unwrap();
            a.int3().unwrap();
        });
        let mut v = m.vcpu(0);
        let mut debug = kvm_bindings::kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
            ..Default::default()
        };
        v.set_guest_debug(&debug).unwrap();
        for pc in [ENTRY + 1, ENTRY + 2] {
            match v.run().unwrap() {
                VcpuExit::Debug(d) => assert_eq!((d.exception, d.pc), (1, pc)),
                other => panic!("{other:?}"),
            }
        }
        debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
        v.set_guest_debug(&debug).unwrap();
        match v.run().unwrap() {
            VcpuExit::Debug(d) => assert_eq!((d.exception, d.pc), (3, ENTRY + 2)),
            other => panic!("{other:?}"),
        }
    });
}
