//! KVM's ioctls, as numbers and addresses: what a process's system call or the kernel module's file
//! operations hand over.
//!
//! Each kind of descriptor has a function: [`system`](system::call) for `/dev/kvm`, [`vm`](vm::call),
//! [`vcpu`](vcpu::call), [`device`](device::call). Arguments are copied once from the caller's memory, checked, and the copy is used.
//! What a descriptor is, and whose memory an address means, the home says through the traits here.

mod caps;
pub mod device;
pub mod system;
pub mod vcpu;
pub mod vm;

use crate::host::{Event, Host};
use crate::vm::Vm;
use alloc::sync::Arc;
use alloc::vec::Vec;
use kvm_abi::{Errno, kvm_irqfd};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// What an ioctl returns: a number that is not negative, or an error.
pub type Answer = Result<u64, Errno>;

/// The memory of whoever makes a call.
pub trait Caller {
    /// Copies from the caller's memory.
    ///
    /// # Errors
    /// EFAULT when any byte cannot be read.
    fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), Errno>;

    /// Copies to the caller's memory.
    ///
    /// # Errors
    /// EFAULT when any byte cannot be written; bytes before it may have been.
    fn write(&self, addr: u64, data: &[u8]) -> Result<(), Errno>;
}

/// An open `/dev/kvm`.
pub trait SystemFile: Caller {
    /// The home.
    fn host(&self) -> &dyn Host;

    /// Makes a VM and a descriptor for it.
    ///
    /// # Errors
    /// ENOMEM, EMFILE, EOPNOTSUPP.
    fn create_vm(&self) -> Answer;
}

/// A VM's descriptor.
pub trait VmFile: Caller {
    /// The VM.
    fn vm(&self) -> &Arc<Vm>;

    /// Makes a vCPU, its `kvm_run` mapping and a descriptor for it.
    ///
    /// # Errors
    /// As [`Vm::create_vcpu`]; EMFILE.
    fn create_vcpu(&self, id: u32) -> Answer;

    /// The eventfd behind a descriptor.
    ///
    /// # Errors
    /// EBADF; EINVAL when it is not an eventfd.
    fn event(&self, fd: i32) -> Result<Arc<dyn Event>, Errno>;

    /// KVM_IRQFD without KVM_IRQFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    /// EBADF, EINVAL, EBUSY, ENOMEM.
    fn assign_irqfd(&self, irqfd: &kvm_irqfd) -> Result<(), Errno>;

    /// KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    /// EBADF, EINVAL.
    fn deassign_irqfd(&self, irqfd: &kvm_irqfd) -> Result<(), Errno>;

    /// Makes a VFIO device and a descriptor for it.
    ///
    /// # Errors
    /// EBUSY when the VM has one; EMFILE, ENOMEM.
    fn create_vfio(&self) -> Answer;

    /// A descriptor that reads binary statistics (KVM_GET_STATS_FD).
    ///
    /// # Errors
    /// EMFILE, ENOMEM.
    fn stats_fd(&self) -> Answer;
}

/// A vCPU's descriptor.
pub trait VcpuFile: Caller {
    /// KVM_SET_SIGNAL_MASK: the mask while KVM_RUN runs, a bit per signal; `None`: the thread's own.
    ///
    /// # Errors
    /// EOPNOTSUPP where the home has no signals.
    fn set_signal_mask(&self, mask: Option<u64>) -> Result<(), Errno>;

    /// A descriptor that reads binary statistics (KVM_GET_STATS_FD).
    ///
    /// # Errors
    /// EMFILE, ENOMEM.
    fn stats_fd(&self) -> Answer;
}

/// Copies a struct from the caller.
fn get<T: FromZeros + FromBytes + IntoBytes, C: Caller + ?Sized>(
    caller: &C,
    addr: u64,
) -> Result<T, Errno> {
    let mut value = T::new_zeroed();
    caller.read(addr, value.as_mut_bytes())?;
    Ok(value)
}

/// Copies a struct to the caller.
fn put<T: IntoBytes + Immutable, C: Caller + ?Sized>(caller: &C, addr: u64, value: &T) -> Answer {
    caller.write(addr, value.as_bytes())?;
    Ok(0)
}

/// Copies `n` structs from the caller; the caller has checked `n`.
fn get_list<T: FromZeros + FromBytes + IntoBytes + Clone, C: Caller + ?Sized>(
    caller: &C,
    addr: u64,
    n: usize,
) -> Result<Vec<T>, Errno> {
    let mut list = Vec::new();
    list.try_reserve_exact(n).map_err(|_| Errno::ENOMEM)?;
    list.resize(n, T::new_zeroed());
    caller.read(addr, list.as_mut_bytes())?;
    Ok(list)
}

/// The address `offset` bytes behind `addr`.
fn behind(addr: u64, offset: usize) -> Result<u64, Errno> {
    addr.checked_add(offset as u64).ok_or(Errno::EFAULT)
}

/// For calls whose argument must be 0.
fn no_argument(arg: u64) -> Result<(), Errno> {
    if arg == 0 { Ok(()) } else { Err(Errno::EINVAL) }
}
