//! Hardware breakpoints of a debugger, and signals that end a run.
#![expect(unsafe_code, reason = "signal handlers")]

mod machine;

use home_user::{Errno, VcpuExit, interrupt_current};
use iced_x86::code_asm::*;
use kvm_bindings::kvm_guest_debug;
use machine::{ENTRY, Machine, each, expect_out};
use std::time::Duration;

const ENABLE: u32 = 1;
const SINGLESTEP: u32 = 2;
const USE_HW_BP: u32 = 0x2_0000;

#[test]
fn hardware_breakpoints_leave_the_guests_registers_alone() {
    each(|engine| {
        let m = Machine::new(engine, false);
        let mut at = 0;
        let mut a = CodeAssembler::new(64).unwrap();
        a.mov(rax, 0x1234u64).unwrap();
        a.mov(dr0, rax).unwrap();
        a.mov(rax, dr0).unwrap();
        a.mov(qword_ptr(0x4000), rax).unwrap();
        a.mov(rax, dr7).unwrap();
        a.mov(qword_ptr(0x4008), rax).unwrap();
        let head = a.assemble(ENTRY).unwrap().len() as u64;
        a.nop().unwrap();
        a.mov(dword_ptr(0x5004), 5).unwrap();
        a.mov(ebx, dword_ptr(0x5004)).unwrap();
        a.out(0x10, al).unwrap();
        m.memory.write(ENTRY, &a.assemble(ENTRY).unwrap());
        at += ENTRY + head;
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        let mut debug = kvm_guest_debug {
            control: ENABLE | USE_HW_BP,
            ..Default::default()
        };
        debug.arch.debugreg[0] = at; // execution
        debug.arch.debugreg[1] = 0x5004; // 4 bytes, writes
        debug.arch.debugreg[7] = 1 | 4 | 0b1101 << 20;
        v.set_guest_debug(&debug).unwrap();
        match v.run().unwrap() {
            VcpuExit::Debug(d) => {
                assert_eq!((d.exception, d.pc, d.dr6 & 0xf), (1, at, 1));
                assert_eq!(d.dr7 & 0xff, 5);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(m.memory.u64(0x4000), 0x1234);
        assert_eq!(m.memory.u64(0x4008), 0x400);
        let regs = v.get_debug_regs().unwrap();
        assert_eq!((regs.db[0], regs.db[1], regs.dr7), (0x1234, 0, 0x400));
        // Over the instruction, then to the write.
        debug.control = ENABLE | SINGLESTEP;
        v.set_guest_debug(&debug).unwrap();
        assert!(matches!(v.run().unwrap(), VcpuExit::Debug(d) if d.pc == at + 1));
        debug.control = ENABLE | USE_HW_BP;
        v.set_guest_debug(&debug).unwrap();
        match v.run().unwrap() {
            VcpuExit::Debug(d) => assert_eq!(d.dr6 & 0xf, 2),
            other => panic!("{other:?}"),
        }
        assert_eq!(m.memory.u32(0x5004), 5, "a trap: the write has happened");
        expect_out(&mut v, 0x10);
        // Off: no more exits.
        debug.control = 0;
        v.set_guest_debug(&debug).unwrap();
        let mut regs = v.get_regs().unwrap();
        regs.rip = at;
        v.set_regs(&regs).unwrap();
        expect_out(&mut v, 0x10);
    });
}

extern "C" fn on_signal(_: libc::c_int) {
    interrupt_current();
}

#[test]
fn a_signal_handler_ends_the_run_of_its_thread() {
    // SAFETY: the handler does what handlers may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
    each(|engine| {
        for halted in [false, true] {
            let m = Machine::new(engine, true);
            m.load(ENTRY, 64, |a| {
                let mut forever = a.create_label();
                a.out(0x10, al).unwrap();
                a.set_label(&mut forever).unwrap();
                if halted {
                    a.hlt().unwrap();
                }
                a.jmp(forever).unwrap();
            });
            let mut v = m.vcpu(0);
            m.long_mode(&v);
            expect_out(&mut v, 0x10);
            assert!(!interrupt_current(), "outside of a run");
            // SAFETY: the thread outlives the one that signals it.
            let me = unsafe { libc::pthread_self() };
            std::thread::scope(|s| {
                s.spawn(move || {
                    std::thread::sleep(Duration::from_millis(30));
                    // SAFETY: as above.
                    unsafe { libc::pthread_kill(me, libc::SIGUSR1) };
                });
                assert_eq!(v.run().unwrap_err(), Errno::EINTR);
            });
        }
    });
}
