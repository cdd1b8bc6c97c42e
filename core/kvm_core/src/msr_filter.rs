//! MSR accesses that user space wants to see or to forbid: KVM_X86_SET_MSR_FILTER and
//! KVM_CAP_X86_USER_SPACE_MSR.

use crate::env::VcpuEnv;
use crate::inflight::{Op, Pending};
use crate::msr::Fault;
use alloc::vec::Vec;
use kvm_abi::run::{self, msr_reason, reason};
use kvm_abi::{Errno, kvm_msr_filter, msr_filter as abi};
use x86defs::msr;
use x86emu::env::{Exit, Stop};
use x86emu::state::CpuState;

/// Which MSRs a VM's guest may access.
#[derive(Clone, Debug)]
pub struct MsrFilter {
    default_allow: bool,
    ranges: Vec<Range>,
}

#[derive(Clone, Debug)]
struct Range {
    flags: u32,
    base: u32,
    count: u32,
    /// One bit per MSR: allowed.
    bitmap: Vec<u8>,
}

impl MsrFilter {
    /// The filter of a KVM_X86_SET_MSR_FILTER. `read` copies a bitmap from user space.
    ///
    /// # Errors
    /// EINVAL for unknown flags, bitmaps that are too large, and a filter that forbids everything; what
    /// `read` returns; ENOMEM.
    pub fn new(
        filter: &kvm_msr_filter,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), Errno>,
    ) -> Result<Self, Errno> {
        let default_allow = filter.flags & abi::DEFAULT_DENY == 0;
        let empty = filter.ranges.iter().all(|r| r.nmsrs == 0);
        if filter.flags & !abi::DEFAULT_DENY != 0 || empty && !default_allow {
            return Err(Errno::EINVAL);
        }
        let mut ranges = Vec::new();
        ranges
            .try_reserve_exact(filter.ranges.len())
            .map_err(|_| Errno::ENOMEM)?;
        for r in filter.ranges.iter().filter(|r| r.nmsrs != 0) {
            let bytes = (r.nmsrs as usize).div_ceil(64) * 8;
            if r.flags & !(abi::READ | abi::WRITE) != 0 || r.flags == 0 || bytes > abi::MAX_BITMAP {
                return Err(Errno::EINVAL);
            }
            let mut bitmap = Vec::new();
            bitmap.try_reserve_exact(bytes).map_err(|_| Errno::ENOMEM)?;
            bitmap.resize(bytes, 0);
            read(r.bitmap, &mut bitmap)?;
            ranges.push(Range {
                flags: r.flags,
                base: r.base,
                count: r.nmsrs,
                bitmap,
            });
        }
        Ok(MsrFilter {
            default_allow,
            ranges,
        })
    }

    /// Whether an access ([`abi::READ`] or [`abi::WRITE`]) to an MSR is allowed. The first range that
    /// covers it decides.
    pub fn allows(&self, index: u32, access: u32) -> bool {
        for r in self.ranges.iter().filter(|r| r.flags & access != 0) {
            let at = index.wrapping_sub(r.base);
            if index >= r.base && at < r.count {
                let byte = r.bitmap.get(at as usize / 8).copied().unwrap_or(0);
                return byte >> (at % 8) & 1 != 0;
            }
        }
        self.default_allow
    }
}

impl VcpuEnv {
    fn msr_allowed(&self, index: u32, access: u32) -> bool {
        // The x2APIC's registers are the interrupt controller's, whatever a filter says.
        if (msr::X2APIC_BASE..=msr::X2APIC_END).contains(&index) {
            return true;
        }
        let filter = self.vm.settings.msr_filter();
        filter.is_none_or(|filter| filter.allows(index, access))
    }

    /// RDMSR by the guest.
    pub fn guest_rdmsr(&mut self, cpu: &CpuState, index: u32) -> Result<u64, Stop> {
        let op = Op::Rdmsr(index);
        if let Some(answer) = self.recall_msr(op) {
            return answer;
        }
        let why = if !self.msr_allowed(index, abi::READ) {
            msr_reason::FILTER
        } else {
            match self.get_msr(cpu, index, false) {
                Ok(value) => return Ok(value),
                Err(fault) => fault.reason(),
            }
        };
        log::debug!("vcpu {}: RDMSR {index:#x} refused", self.shared.id());
        Err(self.refuse_msr(op, why, 0))
    }

    /// WRMSR by the guest.
    pub fn guest_wrmsr(&mut self, cpu: &mut CpuState, index: u32, value: u64) -> Result<(), Stop> {
        let op = Op::Wrmsr(index);
        if let Some(answer) = self.recall_msr(op) {
            return answer.map(|_| ());
        }
        let why = if !self.msr_allowed(index, abi::WRITE) {
            msr_reason::FILTER
        } else {
            match self.set_msr(cpu, index, value, false) {
                Ok(()) => return Ok(()),
                Err(fault) => fault.reason(),
            }
        };
        let vcpu = self.shared.id();
        log::debug!("vcpu {vcpu}: WRMSR {index:#x} refused");
        Err(self.refuse_msr(op, why, value))
    }

    fn recall_msr(&mut self, op: Op) -> Option<Result<u64, Stop>> {
        if self.inflight.next() == Some(Op::MsrFault) {
            return Some(Err(Stop::gp(0)));
        }
        let bytes = self.inflight.recall(op, 8)?;
        Some(Ok(u64::from_le_bytes(bytes)))
    }

    /// An access that cannot be: user space's if it asked for that, else #GP.
    fn refuse_msr(&mut self, op: Op, why: u32, value: u64) -> Stop {
        if self.vm.settings.msr_exits() & why == 0 {
            return Stop::gp(0);
        }
        self.inflight.pending = Some(Pending {
            op,
            len: 8,
            count: 1,
            linear_rip: 0,
        });
        let page = &self.run;
        let (exit, index) = match op {
            Op::Wrmsr(index) => (reason::X86_WRMSR, index),
            Op::Rdmsr(index) => (reason::X86_RDMSR, index),
            _ => return Stop::gp(0),
        };
        page.set_reason(exit);
        page.set_u64(run::EXIT, 0);
        page.set_u32(run::EXIT + 8, why);
        page.set_u32(run::EXIT + 12, index);
        page.set_u64(run::EXIT + 16, value);
        Stop::Exit(Exit::UserSpace)
    }

    /// User space's answer to an MSR access.
    pub fn take_msr_answer(&mut self, op: Op) -> bool {
        let failed = self.run.u8(run::EXIT) != 0;
        let value = self.run.u64(run::EXIT + 16);
        let op = if failed { Op::MsrFault } else { op };
        self.inflight.record(op, &value.to_le_bytes())
    }
}

impl Fault {
    fn reason(self) -> u32 {
        match self {
            Fault::Unknown => msr_reason::UNKNOWN,
            Fault::Invalid => msr_reason::INVAL,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_abi::kvm_msr_filter_range;

    fn filter(flags: u32, ranges: &[(u32, u32, u32)]) -> kvm_msr_filter {
        let mut f = kvm_msr_filter {
            flags,
            ..Default::default()
        };
        for (r, &(flags, base, nmsrs)) in f.ranges.iter_mut().zip(ranges) {
            *r = kvm_msr_filter_range {
                flags,
                nmsrs,
                base,
                ..Default::default()
            };
        }
        f
    }

    fn make(f: &kvm_msr_filter, byte: u8) -> Result<MsrFilter, Errno> {
        MsrFilter::new(f, |_, out| {
            out.fill(byte);
            Ok(())
        })
    }

    #[test]
    fn the_first_range_that_covers_an_msr_decides() {
        let both = abi::READ | abi::WRITE;
        let f = filter(0, &[(abi::READ, 0x100, 8), (both, 0x100, 16)]);
        let f = make(&f, 0xaa).unwrap();
        assert!(!f.allows(0x100, abi::READ));
        assert!(f.allows(0x101, abi::READ));
        assert!(!f.allows(0x100, abi::WRITE));
        assert!(!f.allows(0x108, abi::READ), "the second range");
        assert!(f.allows(0x110, abi::READ), "none: allowed by default");
        let f = make(&filter(1, &[(both, 0x100, 8)]), 0xff).unwrap();
        assert!(f.allows(0x107, both));
        assert!(!f.allows(0x108, both));
        assert!(!f.allows(0xff, both));
    }

    #[test]
    fn refusals() {
        let einval = |f: &kvm_msr_filter| make(f, 0).unwrap_err();
        assert_eq!(einval(&filter(2, &[])), Errno::EINVAL);
        assert_eq!(einval(&filter(1, &[])), Errno::EINVAL, "forbids everything");
        assert_eq!(einval(&filter(0, &[(4, 0, 1)])), Errno::EINVAL);
        assert_eq!(einval(&filter(0, &[(0, 0, 1)])), Errno::EINVAL);
        let most = abi::MAX_BITMAP as u32 * 8;
        assert_eq!(einval(&filter(0, &[(1, 0, most + 1)])), Errno::EINVAL);
        assert_eq!(einval(&filter(0, &[(1, 0, u32::MAX)])), Errno::EINVAL);
        assert!(make(&filter(0, &[(1, 0, most)]), 0).is_ok());
        assert!(make(&filter(0, &[(7, 0, 0)]), 0).is_ok(), "not a range");
        let fails = MsrFilter::new(&filter(0, &[(1, 0, 1)]), |_, _| Err(Errno::EFAULT));
        assert_eq!(fails.unwrap_err(), Errno::EFAULT);
    }
}
