//! KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR and KVM_SET_DEVICE_ATTR where there is no device: on vCPUs
//! (KVM_CAP_VCPU_ATTRIBUTES) and on `/dev/kvm` (KVM_CAP_SYS_ATTRIBUTES).

use crate::cpuid::supported_xcr0;
use crate::host::Host;
use crate::vcpu::Vcpu;
use crate::vm::TscWrite;
use kvm_abi::{Errno, attr};

/// An attribute of `/dev/kvm`: KVM_X86_XCOMP_GUEST_SUPP, the XSAVE components that guests can have.
///
/// # Errors
/// ENXIO for a group or an attribute that there is not.
pub fn system_attr(host: &dyn Host, group: u32, number: u64) -> Result<u64, Errno> {
    match (group, number) {
        (0, attr::X86_XCOMP_GUEST_SUPP) => Ok(supported_xcr0(host)),
        _ => Err(Errno::ENXIO),
    }
}

impl Vcpu {
    /// KVM_HAS_DEVICE_ATTR.
    ///
    /// # Errors
    /// ENXIO.
    pub fn has_device_attr(&self, group: u32, number: u64) -> Result<(), Errno> {
        match (group, number) {
            (attr::VCPU_TSC_CTRL, attr::VCPU_TSC_OFFSET) => Ok(()),
            _ => Err(Errno::ENXIO),
        }
    }

    /// KVM_GET_DEVICE_ATTR.
    ///
    /// # Errors
    /// ENXIO.
    pub fn device_attr(&self, group: u32, number: u64) -> Result<u64, Errno> {
        self.has_device_attr(group, number)?;
        Ok(self.engine.cpu_ref().tsc_offset)
    }

    /// KVM_SET_DEVICE_ATTR. IA32_TSC_ADJUST stays: the guest does not see who moved its TSC.
    ///
    /// # Errors
    /// ENXIO.
    pub fn set_device_attr(&mut self, group: u32, number: u64, value: u64) -> Result<(), Errno> {
        self.has_device_attr(group, number)?;
        let now = self.env.vm.host.tsc();
        *self.env.vm.tsc.lock() = TscWrite {
            by_user: true,
            valid: true,
            host_tsc: now,
            value: now.wrapping_add(value),
            offset: value,
        };
        self.env.set_tsc_offset(self.engine.cpu(), value);
        self.engine.state_changed();
        Ok(())
    }
}
