//! KVM_CHECK_EXTENSION and KVM_ENABLE_CAP.

use super::Answer;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use kvm_abi::{Errno, cap, kvm_enable_cap};

/// KVM_CHECK_EXTENSION on `/dev/kvm`, or on a VM.
pub(super) fn check(_vm: Option<&Vm>, capability: u64) -> u64 {
    let value = u32::try_from(capability).map_or(0, cap::value);
    u64::try_from(value).unwrap_or(0)
}

/// KVM_ENABLE_CAP on a VM.
///
/// # Errors
/// EINVAL for what cannot be enabled.
pub(super) fn enable_on_vm(vm: &Vm, c: &kvm_enable_cap) -> Answer {
    if c.flags != 0 {
        return Err(Errno::EINVAL);
    }
    match c.cap {
        cap::nr::MANUAL_DIRTY_LOG_PROTECT2 => vm.set_manual_dirty_log(c.args[0])?,
        _ => return Err(Errno::EINVAL),
    }
    Ok(0)
}

/// KVM_ENABLE_CAP on a vCPU.
///
/// # Errors
/// EINVAL for what cannot be enabled.
pub(super) fn enable_on_vcpu(_vcpu: &mut Vcpu, _c: &kvm_enable_cap) -> Answer {
    Err(Errno::EINVAL)
}
