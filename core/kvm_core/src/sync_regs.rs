//! Registers in `kvm_run` (KVM_CAP_SYNC_REGS): user space takes and changes a vCPU's state without further
//! calls.

use crate::vcpu::Vcpu;
use core::mem::offset_of;
use kvm_abi::run::{self, sync};
use kvm_abi::{Errno, kvm_regs, kvm_sregs, kvm_sync_regs, kvm_vcpu_events};
use zerocopy::{FromBytes, IntoBytes};

const REGS: usize = run::SYNC_REGS + offset_of!(kvm_sync_regs, regs);
const SREGS: usize = run::SYNC_REGS + offset_of!(kvm_sync_regs, sregs);
const EVENTS: usize = run::SYNC_REGS + offset_of!(kvm_sync_regs, events);

impl Vcpu {
    /// Takes over what user space has changed.
    ///
    /// # Errors
    /// EINVAL for sets of registers that there are not, and for what KVM_SET_SREGS and KVM_SET_VCPU_EVENTS
    /// refuse; the sets before that one are taken.
    pub(crate) fn take_sync_regs(&mut self) -> Result<(), Errno> {
        let page = &self.env.run;
        let (valid, dirty) = (page.u64(run::VALID_REGS), page.u64(run::DIRTY_REGS));
        if (valid | dirty) & !sync::ALL != 0 {
            return Err(Errno::EINVAL);
        }
        let mut left = dirty;
        let mut done = |vcpu: &Vcpu, bit: u64| {
            left &= !bit;
            vcpu.env.run.set_u64(run::DIRTY_REGS, left);
        };
        if dirty & sync::REGS != 0 {
            let regs: kvm_regs = self.synced(REGS);
            self.set_regs(&regs);
            done(self, sync::REGS);
        }
        if dirty & sync::SREGS != 0 {
            let sregs: kvm_sregs = self.synced(SREGS);
            self.set_sregs(&sregs)?;
            done(self, sync::SREGS);
        }
        if dirty & sync::EVENTS != 0 {
            let events: kvm_vcpu_events = self.synced(EVENTS);
            self.set_vcpu_events(&events)?;
            done(self, sync::EVENTS);
        }
        Ok(())
    }

    /// Shows user space what it wants to see after every run.
    pub(crate) fn put_sync_regs(&mut self) {
        let valid = self.env.run.u64(run::VALID_REGS);
        if valid & sync::REGS != 0 {
            self.env.run.write(REGS, self.regs().as_bytes());
        }
        if valid & sync::SREGS != 0 {
            self.env.run.write(SREGS, self.sregs().as_bytes());
        }
        if valid & sync::EVENTS != 0 {
            let events = self.vcpu_events();
            self.env.run.write(EVENTS, events.as_bytes());
        }
    }

    fn synced<T: FromBytes + IntoBytes>(&self, at: usize) -> T {
        let mut value = T::new_zeroed();
        self.env.run.read(at, value.as_mut_bytes());
        value
    }
}
