//! The ioctls of `/dev/kvm`.

use super::{Answer, Caller, SystemFile, behind, caps, get, get_list, no_argument, put};
use crate::attr::system_attr;
use crate::{cpuid, mce, msr};
use kvm_abi::ioctl::*;
use kvm_abi::{
    Errno, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, kvm_cpuid_entry2,
    kvm_device_attr, kvm_msr_entry, list_head, run,
};
use zerocopy::IntoBytes;

/// Answers an ioctl on `/dev/kvm`.
///
/// # Errors
/// KVM's, for each call; EINVAL for what is none.
pub fn call(file: &dyn SystemFile, cmd: u32, arg: u64) -> Answer {
    match cmd {
        KVM_GET_API_VERSION => {
            no_argument(arg)?;
            Ok(KVM_API_VERSION.into())
        }
        KVM_CREATE_VM => {
            // Machine types: x86 has only the default one (and SEV's).
            no_argument(arg)?;
            file.create_vm()
        }
        KVM_CHECK_EXTENSION => Ok(caps::check(None, arg)),
        KVM_GET_VCPU_MMAP_SIZE => {
            no_argument(arg)?;
            Ok(run::MMAP_SIZE as u64)
        }
        KVM_GET_MSR_INDEX_LIST => msr_list(file, arg, msr::INDEX_LIST),
        KVM_GET_MSR_FEATURE_INDEX_LIST => msr_list(file, arg, msr::FEATURE_LIST),
        KVM_GET_SUPPORTED_CPUID => cpuid_out(file, arg, &cpuid::supported(file.host())),
        KVM_GET_EMULATED_CPUID => cpuid_out(file, arg, &cpuid::emulated()),
        KVM_GET_MSRS => {
            let vendor = cpuid::vendor(file.host().cpuid(0, 0));
            get_msrs(file, arg, |entries| {
                let mut done = 0;
                for entry in entries {
                    let Some(value) = msr::feature(entry.index, vendor) else {
                        break;
                    };
                    entry.data = value;
                    done += 1;
                }
                done
            })
        }
        KVM_X86_GET_MCE_CAP_SUPPORTED => {
            let vendor = cpuid::vendor(file.host().cpuid(0, 0));
            put(file, arg, &mce::supported(vendor))
        }
        KVM_HAS_DEVICE_ATTR => {
            let a: kvm_device_attr = get(file, arg)?;
            system_attr(file.host(), a.group, a.attr).map(|_| 0)
        }
        KVM_GET_DEVICE_ATTR => {
            let a: kvm_device_attr = get(file, arg)?;
            put(file, a.addr, &system_attr(file.host(), a.group, a.attr)?)
        }
        _ => Err(Errno::EINVAL),
    }
}

/// KVM_GET_MSR_INDEX_LIST: the number is always told, the list only where it fits.
fn msr_list<C: Caller + ?Sized>(caller: &C, arg: u64, list: &[u32]) -> Answer {
    let room: u32 = get(caller, arg)?;
    put(caller, arg, &(list.len() as u32))?;
    if (room as usize) < list.len() {
        return Err(Errno::E2BIG);
    }
    caller.write(behind(arg, 4)?, list.as_bytes())?;
    Ok(0)
}

/// A `kvm_cpuid2` for the caller.
pub(super) fn cpuid_out<C: Caller + ?Sized>(
    caller: &C,
    arg: u64,
    entries: &[kvm_cpuid_entry2],
) -> Answer {
    let mut head: list_head = get(caller, arg)?;
    if (head.n as usize) < entries.len() {
        return Err(Errno::E2BIG);
    }
    head.n = entries.len() as u32;
    caller.write(behind(arg, 8)?, entries.as_bytes())?;
    put(caller, arg, &head)
}

/// The `kvm_cpuid2` of a caller.
pub(super) fn cpuid_in<C: Caller + ?Sized>(
    caller: &C,
    arg: u64,
) -> Result<alloc::vec::Vec<kvm_cpuid_entry2>, Errno> {
    let head: list_head = get(caller, arg)?;
    if head.n as usize > KVM_MAX_CPUID_ENTRIES {
        return Err(Errno::E2BIG);
    }
    get_list(caller, behind(arg, 8)?, head.n as usize)
}

/// KVM_GET_MSRS: `read` fills entries and says how many.
pub(super) fn get_msrs<C: Caller + ?Sized>(
    caller: &C,
    arg: u64,
    read: impl FnOnce(&mut [kvm_msr_entry]) -> usize,
) -> Answer {
    let mut entries = msrs_in(caller, arg)?;
    let done = read(&mut entries);
    caller.write(behind(arg, 8)?, entries.as_bytes())?;
    Ok(done as u64)
}

/// The `kvm_msrs` of a caller.
pub(super) fn msrs_in<C: Caller + ?Sized>(
    caller: &C,
    arg: u64,
) -> Result<alloc::vec::Vec<kvm_msr_entry>, Errno> {
    let head: list_head = get(caller, arg)?;
    if head.n as usize >= KVM_MAX_MSR_ENTRIES {
        return Err(Errno::E2BIG);
    }
    get_list(caller, behind(arg, 8)?, head.n as usize)
}
