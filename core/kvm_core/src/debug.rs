//! Guest debugging (KVM_SET_GUEST_DEBUG): single steps, software and hardware breakpoints for a debugger
//! outside of the guest.
//!
//! The debugger's hardware breakpoints take the place of the guest's while guest code runs, with
//! general detection on: when the guest reaches for a debug register, its own are put back for that
//! one instruction.

use crate::env::linear_rip;
use crate::run::Next;
use crate::vcpu::Vcpu;
use kvm_abi::run::{self, reason};
use kvm_abi::{Errno, guestdbg, kvm_guest_debug};
use x86defs::{dr, vector};
use x86emu::env::{Exception, Exit};

/// DR7.GD: MOV to and from debug registers is #DB.
const DR7_GD: u64 = 1 << 13;
/// DR6.BD: it was such an access.
const DR6_BD: u64 = 1 << 13;
const BOTH_STEP: u32 = guestdbg::ENABLE | guestdbg::SINGLESTEP;
const BOTH_HW: u32 = guestdbg::ENABLE | guestdbg::USE_HW_BP;

/// DR0-DR3 and DR7.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Breakpoints {
    address: [u64; 4],
    dr7: u64,
    /// The debugger wants to see the guest's accesses to debug registers.
    guards: bool,
}

impl Vcpu {
    /// KVM_SET_GUEST_DEBUG.
    ///
    /// # Errors
    /// EINVAL for unknown controls; EBUSY when an exception is pending that the injected one would
    /// replace.
    pub fn set_guest_debug(&mut self, debug: &kvm_guest_debug) -> Result<(), Errno> {
        if debug.control & !guestdbg::VALID != 0 {
            return Err(Errno::EINVAL);
        }
        let inject = match debug.control & (guestdbg::INJECT_DB | guestdbg::INJECT_BP) {
            0 => None,
            guestdbg::INJECT_DB => Some(vector::DB),
            _ => Some(vector::BP),
        };
        if let Some(vector) = inject {
            if self.env.events.exception.is_some() {
                return Err(Errno::EBUSY);
            }
            self.env.events.exception = Some(Exception {
                vector,
                error: None,
                payload: 0,
            });
            self.env.events.exception_pending = true;
        }
        let mut control = debug.control & !(guestdbg::INJECT_DB | guestdbg::INJECT_BP);
        if control & guestdbg::ENABLE == 0 {
            control = 0;
        }
        self.env.guest_debug = control;
        let regs = &debug.arch.debugreg;
        self.env.breakpoints = Breakpoints {
            address: [regs[0], regs[1], regs[2], regs[3]],
            dr7: regs[7] & 0xffff_ffff | dr::DR7_FIXED | DR7_GD,
            guards: regs[7] & DR7_GD != 0,
        };
        self.engine.state_changed();
        Ok(())
    }

    /// Guest code under a debugger, and what its exit means.
    pub(crate) fn debugged_turn(&mut self, irq_window: bool) -> Result<Next, Errno> {
        let breakpoints = self.env.guest_debug & BOTH_HW == BOTH_HW;
        if breakpoints {
            self.swap_breakpoints();
        }
        let exit = if self.env.guest_debug & BOTH_STEP == BOTH_STEP {
            self.traced_step()
        } else {
            self.engine.run(&mut self.env, irq_window)
        };
        if breakpoints {
            self.swap_breakpoints();
        }
        let guards = self.env.breakpoints.guards || self.engine.cpu_ref().dr7 & DR7_GD != 0;
        match exit {
            Exit::Debug(e) if breakpoints && !guards && e.payload & DR6_BD != 0 => {
                let exit = if self.env.guest_debug & BOTH_STEP == BOTH_STEP {
                    Some(self.traced_step())
                } else {
                    self.engine.step(&mut self.env)
                };
                exit.map_or(Ok(Next::Turn), |exit| self.decide(exit))
            }
            exit => self.decide(exit),
        }
    }

    /// Exchanges the guest's breakpoints with the debugger's.
    fn swap_breakpoints(&mut self) {
        let mine = &mut self.env.breakpoints;
        let cpu = self.engine.cpu();
        core::mem::swap(&mut cpu.dr, &mut mine.address);
        core::mem::swap(&mut cpu.dr7, &mut mine.dr7);
    }

    /// One instruction for the debugger.
    fn traced_step(&mut self) -> Exit {
        match self.engine.step(&mut self.env) {
            None => Exit::Debug(Exception {
                vector: vector::DB,
                error: None,
                payload: dr::DR6_BS,
            }),
            Some(exit) => exit,
        }
    }

    /// Fills `kvm_run` for the debugger.
    pub(crate) fn debug_exit(&mut self, exception: &Exception) {
        let cpu = self.engine.cpu_ref();
        let page = &self.env.run;
        page.set_reason(reason::DEBUG);
        page.set_u32(run::EXIT, u32::from(exception.vector));
        page.set_u32(run::EXIT + 4, 0);
        page.set_u64(run::EXIT + 8, linear_rip(cpu));
        let dr6 = if exception.vector == vector::DB {
            dr::DR6_FIXED | exception.payload
        } else {
            cpu.dr6
        };
        let dr7 = if self.env.guest_debug & BOTH_HW == BOTH_HW {
            self.env.breakpoints.dr7 & !DR7_GD
        } else {
            cpu.dr7
        };
        page.set_u64(run::EXIT + 16, dr6);
        page.set_u64(run::EXIT + 24, dr7);
    }
}
