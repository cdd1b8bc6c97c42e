//! What user space has chosen for a VM with KVM_ENABLE_CAP, and the VM's TSC frequency.

use crate::msr_filter::MsrFilter;
use crate::sync::Mutex;
use crate::vm::Vm;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use kvm_abi::run::msr_reason;
use kvm_abi::{Errno, disable_exits, quirk};

/// The settings of one VM. Each is a word of its own: nobody reads two of them together.
#[derive(Default)]
pub(crate) struct Settings {
    disabled_quirks: AtomicU64,
    disabled_exits: AtomicU64,
    msr_exits: AtomicU32,
    exception_payload: AtomicBool,
    triple_fault_event: AtomicBool,
    exit_on_emulation_failure: AtomicBool,
    hide_platform_info: AtomicBool,
    /// 0: the host's.
    tsc_khz: AtomicU32,
    filtered: AtomicBool,
    msr_filter: Mutex<Option<Arc<MsrFilter>>>,
}

impl Settings {
    /// A quirk is in force: nobody has disabled it.
    pub fn quirk(&self, bit: u64) -> bool {
        self.disabled_quirks.load(Ordering::Relaxed) & bit == 0
    }

    /// HLT stays in the kernel even without an in-kernel local APIC.
    pub fn hlt_in_guest(&self) -> bool {
        self.disabled_exits.load(Ordering::Relaxed) & disable_exits::HLT != 0
    }

    /// For which reasons MSR accesses go to user space.
    pub fn msr_exits(&self) -> u32 {
        self.msr_exits.load(Ordering::Relaxed)
    }

    /// KVM_CAP_EXCEPTION_PAYLOAD is enabled.
    pub fn exception_payload(&self) -> bool {
        self.exception_payload.load(Ordering::Relaxed)
    }

    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT is enabled.
    pub fn triple_fault_event(&self) -> bool {
        self.triple_fault_event.load(Ordering::Relaxed)
    }

    /// KVM_CAP_EXIT_ON_EMULATION_FAILURE is enabled.
    pub fn exit_on_emulation_failure(&self) -> bool {
        self.exit_on_emulation_failure.load(Ordering::Relaxed)
    }

    /// Guests may not read MSR_PLATFORM_INFO.
    pub fn hide_platform_info(&self) -> bool {
        self.hide_platform_info.load(Ordering::Relaxed)
    }

    /// The filter, if there is one.
    pub fn msr_filter(&self) -> Option<Arc<MsrFilter>> {
        if !self.filtered.load(Ordering::Acquire) {
            return None;
        }
        self.msr_filter.lock().clone()
    }
}

/// How far a TSC frequency may be from the host's and still count as the same, in parts per million.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Whether a vCPU can have a TSC at `khz` on a host whose TSC runs at `host`. Nothing is scaled.
pub(crate) fn tsc_khz_served(khz: u32, host: u32) -> bool {
    let tolerance = u64::from(host) * TSC_TOLERANCE_PPM / 1_000_000;
    u64::from(host.abs_diff(khz)) <= tolerance
}

impl Vm {
    /// KVM_CAP_DISABLE_QUIRKS: the set of quirks that are off; unknown ones mean nothing.
    pub fn disable_quirks(&self, bits: u64) {
        let s = &self.settings;
        s.disabled_quirks.store(bits, Ordering::Relaxed);
    }

    /// KVM_CAP_DISABLE_QUIRKS2: the same.
    ///
    /// # Errors
    /// EINVAL for unknown quirks.
    pub fn disable_quirks2(&self, bits: u64) -> Result<(), Errno> {
        if bits & !quirk::VALID != 0 {
            return Err(Errno::EINVAL);
        }
        self.disable_quirks(bits);
        Ok(())
    }

    /// KVM_CAP_X86_DISABLE_EXITS. Exits once disabled stay so.
    ///
    /// # Errors
    /// EINVAL for unknown exits, and when there are vCPUs already.
    pub fn disable_exits(&self, bits: u64) -> Result<(), Errno> {
        if bits & !disable_exits::VALID != 0 || !self.vcpus().is_empty() {
            return Err(Errno::EINVAL);
        }
        let s = &self.settings;
        s.disabled_exits.fetch_or(bits, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_X86_USER_SPACE_MSR: for which reasons MSR accesses go to user space.
    ///
    /// # Errors
    /// EINVAL for unknown reasons.
    pub fn set_msr_exits(&self, reasons: u64) -> Result<(), Errno> {
        let reasons = u32::try_from(reasons).map_err(|_| Errno::EINVAL)?;
        if reasons & !msr_reason::VALID != 0 {
            return Err(Errno::EINVAL);
        }
        self.settings.msr_exits.store(reasons, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_X86_SET_MSR_FILTER; see [`MsrFilter::new`].
    pub fn set_msr_filter(&self, filter: MsrFilter) {
        let s = &self.settings;
        *s.msr_filter.lock() = Some(Arc::new(filter));
        s.filtered.store(true, Ordering::Release);
    }

    /// KVM_CAP_EXCEPTION_PAYLOAD.
    pub fn set_exception_payload(&self, on: bool) {
        let s = &self.settings;
        s.exception_payload.store(on, Ordering::Relaxed);
    }

    /// KVM_CAP_X86_TRIPLE_FAULT_EVENT.
    pub fn set_triple_fault_event(&self, on: bool) {
        let s = &self.settings;
        s.triple_fault_event.store(on, Ordering::Relaxed);
    }

    /// KVM_CAP_EXIT_ON_EMULATION_FAILURE.
    ///
    /// # Errors
    /// EINVAL for anything but 0 and 1.
    pub fn set_exit_on_emulation_failure(&self, on: u64) -> Result<(), Errno> {
        if on > 1 {
            return Err(Errno::EINVAL);
        }
        let s = &self.settings;
        s.exit_on_emulation_failure
            .store(on != 0, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_CAP_MSR_PLATFORM_INFO: whether guests may read MSR_PLATFORM_INFO.
    pub fn set_platform_info(&self, on: bool) {
        let s = &self.settings;
        s.hide_platform_info.store(!on, Ordering::Relaxed);
    }

    /// KVM_GET_TSC_KHZ on the VM: what new vCPUs start with.
    pub fn default_tsc_khz(&self) -> u32 {
        match self.settings.tsc_khz.load(Ordering::Relaxed) {
            0 => self.host.tsc_khz(),
            khz => khz,
        }
    }

    /// KVM_SET_TSC_KHZ on the VM (KVM_CAP_VM_TSC_CONTROL). 0 means the host's.
    ///
    /// # Errors
    /// EINVAL when there are vCPUs already, and for frequencies that the host's TSC does not have: nothing
    /// scales it.
    pub fn set_default_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        if khz != 0 && !tsc_khz_served(khz, self.host.tsc_khz()) || !self.vcpus().is_empty() {
            return Err(Errno::EINVAL);
        }
        self.settings.tsc_khz.store(khz, Ordering::Relaxed);
        Ok(())
    }
}
