//! The ioctls of a device that KVM_CREATE_DEVICE made. x86 has one kind: VFIO's, which is told the files
//! of devices that are passed through. What KVM does with them (non-coherent DMA) has no meaning for an
//! engine that never lets the guest choose memory types, so it is told, and no more.

use super::{Answer, Caller, get};
use crate::sync::Mutex;
use alloc::vec::Vec;
use kvm_abi::ioctl::*;
use kvm_abi::{Errno, device, kvm_device_attr};

/// Most files that a device is told of.
const MAX_FILES: usize = 1024;

/// A VFIO device.
#[derive(Default)]
pub struct Vfio {
    files: Mutex<Vec<u128>>,
}

/// A device's descriptor.
pub trait DeviceFile: Caller {
    /// The device.
    fn vfio(&self) -> &Vfio;

    /// What identifies the VFIO group or device behind a descriptor of the caller's.
    ///
    /// # Errors
    /// EBADF; EINVAL when it is none of VFIO's.
    fn vfio_file(&self, fd: i32) -> Result<u128, Errno>;
}

/// Answers an ioctl on a device's descriptor.
///
/// # Errors
/// KVM's, for each call; ENOTTY for what is none.
pub fn call(file: &dyn DeviceFile, cmd: u32, arg: u64) -> Answer {
    match cmd {
        KVM_HAS_DEVICE_ATTR => known(&get(file, arg)?).map(|()| 0),
        // VFIO's has nothing to be read.
        KVM_GET_DEVICE_ATTR => Err(Errno::EPERM),
        KVM_SET_DEVICE_ATTR => {
            let a: kvm_device_attr = get(file, arg)?;
            known(&a)?;
            let id = file.vfio_file(get(file, a.addr)?)?;
            let mut files = file.vfio().files.lock();
            let at = files.iter().position(|&f| f == id);
            match (a.attr, at) {
                (device::VFIO_FILE_ADD, Some(_)) => return Err(Errno::EEXIST),
                (device::VFIO_FILE_ADD, None) => {
                    if files.len() >= MAX_FILES || files.try_reserve(1).is_err() {
                        return Err(Errno::ENOMEM);
                    }
                    files.push(id);
                }
                (_, Some(at)) => {
                    files.swap_remove(at);
                }
                (_, None) => return Err(Errno::ENOENT),
            }
            Ok(0)
        }
        _ => Err(Errno::ENOTTY),
    }
}

fn known(a: &kvm_device_attr) -> Result<(), Errno> {
    match (a.group, a.attr) {
        (device::VFIO_FILE, device::VFIO_FILE_ADD | device::VFIO_FILE_DEL) => Ok(()),
        _ => Err(Errno::ENXIO),
    }
}
