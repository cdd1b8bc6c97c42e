//! The ioctls of a vCPU.

use super::system::{cpuid_in, cpuid_out, get_msrs, msrs_in};
use super::{Answer, VcpuFile, behind, caps, get, get_list, no_argument, put};
use crate::vcpu::Vcpu;
use core::mem::offset_of;
use kvm_abi::ioctl::*;
use kvm_abi::{
    Errno, KVM_MAX_CPUID_ENTRIES, kvm_device_attr, kvm_enable_cap, kvm_nested_state, kvm_xsave,
    list_head,
};

/// Answers an ioctl on a vCPU's descriptor; KVM_RUN too.
///
/// # Errors
/// KVM's, for each call; EINVAL for what is none.
pub fn call(vcpu: &mut Vcpu, file: &dyn VcpuFile, cmd: u32, arg: u64) -> Answer {
    match cmd {
        KVM_RUN => {
            no_argument(arg)?;
            vcpu.run()?;
        }
        KVM_GET_REGS => return put(file, arg, &vcpu.regs()),
        KVM_SET_REGS => vcpu.set_regs(&get(file, arg)?),
        KVM_GET_SREGS => return put(file, arg, &vcpu.sregs()),
        KVM_SET_SREGS => vcpu.set_sregs(&get(file, arg)?)?,
        KVM_GET_SREGS2 => return put(file, arg, &vcpu.sregs2()),
        KVM_SET_SREGS2 => vcpu.set_sregs2(&get(file, arg)?)?,
        KVM_GET_FPU => return put(file, arg, &vcpu.fpu()),
        KVM_SET_FPU => vcpu.set_fpu(&get(file, arg)?),
        KVM_GET_XSAVE | KVM_GET_XSAVE2 => return put(file, arg, &vcpu.xsave()),
        KVM_SET_XSAVE => {
            let area: kvm_xsave = get(file, arg)?;
            vcpu.set_xsave(&area)?;
        }
        KVM_GET_XCRS => return put(file, arg, &vcpu.xcrs()),
        KVM_SET_XCRS => vcpu.set_xcrs(&get(file, arg)?)?,
        KVM_GET_MSRS => return get_msrs(file, arg, |entries| vcpu.msrs(entries)),
        KVM_SET_MSRS => return Ok(vcpu.set_msrs(&msrs_in(file, arg)?) as u64),
        KVM_SET_CPUID2 => vcpu.set_cpuid(&cpuid_in(file, arg)?)?,
        KVM_SET_CPUID => {
            let head: list_head = get(file, arg)?;
            if head.n as usize > KVM_MAX_CPUID_ENTRIES {
                return Err(Errno::E2BIG);
            }
            vcpu.set_cpuid1(&get_list(file, behind(arg, 8)?, head.n as usize)?)?;
        }
        KVM_GET_CPUID2 => return cpuid_out(file, arg, &vcpu.cpuid()),
        KVM_GET_LAPIC => return put(file, arg, &vcpu.lapic()?),
        KVM_SET_LAPIC => vcpu.set_lapic(&get(file, arg)?)?,
        KVM_INTERRUPT => vcpu.interrupt(get(file, arg)?)?,
        KVM_NMI => vcpu.nmi(),
        KVM_SMI => vcpu.smi(),
        KVM_X86_SETUP_MCE => vcpu.setup_mce(get(file, arg)?)?,
        KVM_X86_SET_MCE => vcpu.set_mce(&get(file, arg)?)?,
        KVM_HAS_DEVICE_ATTR => {
            let a: kvm_device_attr = get(file, arg)?;
            vcpu.has_device_attr(a.group, a.attr)?;
        }
        KVM_GET_DEVICE_ATTR => {
            let a: kvm_device_attr = get(file, arg)?;
            return put(file, a.addr, &vcpu.device_attr(a.group, a.attr)?);
        }
        KVM_SET_DEVICE_ATTR => {
            let a: kvm_device_attr = get(file, arg)?;
            vcpu.has_device_attr(a.group, a.attr)?;
            vcpu.set_device_attr(a.group, a.attr, get(file, a.addr)?)?;
        }
        KVM_GET_MP_STATE => return put(file, arg, &vcpu.mp_state()),
        KVM_SET_MP_STATE => vcpu.set_mp_state(&get(file, arg)?)?,
        KVM_GET_VCPU_EVENTS => return put(file, arg, &vcpu.vcpu_events()),
        KVM_SET_VCPU_EVENTS => vcpu.set_vcpu_events(&get(file, arg)?)?,
        KVM_GET_DEBUGREGS => return put(file, arg, &vcpu.debug_regs()),
        KVM_SET_DEBUGREGS => vcpu.set_debug_regs(&get(file, arg)?)?,
        KVM_SET_GUEST_DEBUG => vcpu.set_guest_debug(&get(file, arg)?)?,
        KVM_TRANSLATE => {
            let asked: kvm_abi::kvm_translation = get(file, arg)?;
            return put(file, arg, &vcpu.translate(asked.linear_address));
        }
        KVM_GET_TSC_KHZ => return Ok(vcpu.tsc_khz().into()),
        KVM_SET_TSC_KHZ => match u32::try_from(arg) {
            // 0 asks for the default where there is TSC scaling, of which there is none.
            Ok(0) | Err(_) => return Err(Errno::EINVAL),
            Ok(khz) => vcpu.set_tsc_khz(khz)?,
        },
        KVM_KVMCLOCK_CTRL => vcpu.kvmclock_ctrl()?,
        KVM_GET_NESTED_STATE => return get_nested_state(vcpu, file, arg),
        KVM_SET_NESTED_STATE => vcpu.set_nested_state(&get(file, arg)?)?,
        KVM_GET_STATS_FD => return file.stats_fd(),
        KVM_SET_SIGNAL_MASK => signal_mask(file, arg)?,
        KVM_PRE_FAULT_MEMORY => {
            let mut range: kvm_abi::kvm_pre_fault_memory = get(file, arg)?;
            let result = vcpu.pre_fault(&mut range);
            put(file, arg, &range)?;
            result?;
        }
        KVM_SET_VAPIC_ADDR => {
            // 0: no shadow of the task priority in guest memory, which is how it always is here.
            let addr: u64 = get(file, arg)?;
            vcpu.lapic()?;
            no_argument(addr)?;
        }
        KVM_ENABLE_CAP => {
            let c: kvm_enable_cap = get(file, arg)?;
            return caps::enable_on_vcpu(vcpu, &c);
        }
        _ => return Err(Errno::EINVAL),
    }
    Ok(0)
}

/// KVM_GET_NESTED_STATE: E2BIG with the size that is needed where the caller has less room.
fn get_nested_state(vcpu: &Vcpu, file: &dyn VcpuFile, arg: u64) -> Answer {
    let room: u32 = get(file, behind(arg, offset_of!(kvm_nested_state, size))?)?;
    let state = vcpu.nested_state();
    if room < state.size {
        put(
            file,
            behind(arg, offset_of!(kvm_nested_state, size))?,
            &state.size,
        )?;
        return Err(Errno::E2BIG);
    }
    put(file, arg, &state)
}

/// `kvm_signal_mask`: a length, and that many bytes; a null pointer for none.
fn signal_mask(file: &dyn VcpuFile, arg: u64) -> Result<(), Errno> {
    if arg == 0 {
        return file.set_signal_mask(None);
    }
    let len: u32 = get(file, arg)?;
    if len as usize != size_of::<u64>() {
        return Err(Errno::EINVAL);
    }
    file.set_signal_mask(Some(get(file, behind(arg, 4)?)?))
}
