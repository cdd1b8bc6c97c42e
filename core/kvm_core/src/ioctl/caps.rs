//! KVM_CHECK_EXTENSION and KVM_ENABLE_CAP.

use super::Answer;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use alloc::sync::Arc;
use kvm_abi::{Errno, cap, kvm_enable_cap};

/// KVM_CHECK_EXTENSION on `/dev/kvm`, or on a VM.
pub(super) fn check(vm: Option<&Vm>, capability: u64) -> u64 {
    if let Some(vm) = vm
        && capability == u64::from(cap::nr::X86_APIC_BUS_CYCLES_NS)
    {
        return vm.apic_bus_cycle().into();
    }
    let value = u32::try_from(capability).map_or(0, cap::value);
    u64::try_from(value).unwrap_or(0)
}

/// KVM_ENABLE_CAP on a VM.
///
/// # Errors
/// EINVAL for what cannot be enabled.
pub(super) fn enable_on_vm(vm: &Arc<Vm>, c: &kvm_enable_cap) -> Answer {
    if c.flags != 0 {
        return Err(Errno::EINVAL);
    }
    let on = c.args[0];
    match c.cap {
        cap::nr::MANUAL_DIRTY_LOG_PROTECT2 => vm.set_manual_dirty_log(c.args[0])?,
        cap::nr::DISABLE_QUIRKS => vm.disable_quirks(on),
        cap::nr::DISABLE_QUIRKS2 => vm.disable_quirks2(on)?,
        cap::nr::X86_DISABLE_EXITS => vm.disable_exits(on)?,
        cap::nr::X86_USER_SPACE_MSR => vm.set_msr_exits(on)?,
        cap::nr::EXCEPTION_PAYLOAD => vm.set_exception_payload(on != 0),
        cap::nr::X86_TRIPLE_FAULT_EVENT => vm.set_triple_fault_event(on != 0),
        cap::nr::EXIT_ON_EMULATION_FAILURE => vm.set_exit_on_emulation_failure(on)?,
        cap::nr::MSR_PLATFORM_INFO => vm.set_platform_info(on != 0),
        cap::nr::DIRTY_LOG_RING | cap::nr::DIRTY_LOG_RING_ACQ_REL => {
            vm.enable_dirty_ring(c.args[0])?;
        }
        cap::nr::SPLIT_IRQCHIP => vm.enable_split_irqchip(c.args[0])?,
        cap::nr::X2APIC_API => vm.enable_x2apic_api(c.args[0])?,
        // Halted vCPUs never poll, which is less than any limit allows.
        cap::nr::HALT_POLL => {}
        cap::nr::X86_APIC_BUS_CYCLES_NS => vm.set_apic_bus_cycle(c.args[0])?,
        cap::nr::MAX_VCPU_ID => vm.set_max_vcpu_ids(c.args[0])?,
        _ => return Err(Errno::EINVAL),
    }
    Ok(0)
}

/// KVM_ENABLE_CAP on a vCPU.
///
/// # Errors
/// EINVAL for what cannot be enabled.
pub(super) fn enable_on_vcpu(vcpu: &mut Vcpu, c: &kvm_enable_cap) -> Answer {
    if c.flags != 0 {
        return Err(Errno::EINVAL);
    }
    match c.cap {
        cap::nr::ENFORCE_PV_FEATURE_CPUID => vcpu.enforce_pv_cpuid(c.args[0] != 0),
        _ => return Err(Errno::EINVAL),
    }
    Ok(0)
}
