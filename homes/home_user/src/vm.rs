//! A virtual machine, with the methods of kvm-ioctls' `VmFd`.
#![expect(unsafe_code, reason = "memslots make the caller's memory the guest's")]

use crate::abi;
use crate::events::{EventFdEvent, duplicate, event_id};
use crate::host::UserHost;
use crate::vcpu::Vcpu;
use guestmem::Region;
use kvm_abi::{Errno, cap};
use kvm_bindings::{
    KvmIrqRouting, kvm_clock_data, kvm_enable_cap, kvm_irqchip, kvm_msi, kvm_pit_config,
    kvm_pit_state2, kvm_userspace_memory_region,
};
use kvm_core::engine::Engine;
use kvm_core::ioeventfd::{Bus, Match};
use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Where an ioeventfd listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEventAddress {
    /// An I/O port.
    Pio(u64),
    /// A guest-physical address.
    Mmio(u64),
}

/// Any value, of any size, signals the event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoDatamatch;

impl From<NoDatamatch> for u64 {
    fn from(_: NoDatamatch) -> u64 {
        0
    }
}

/// The eventfds of all VMs' irqfds: each belongs to one of them, as in KVM.
static CLAIMED: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

/// An eventfd that is an irqfd's.
struct Claim(u64);

impl Claim {
    fn new(id: u64) -> Result<Self, Errno> {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        if claimed.insert(id) {
            Ok(Claim(id))
        } else {
            Err(Errno::EBUSY)
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        claimed.remove(&self.0);
    }
}

struct Irqfd {
    gsi: u32,
    eventfd: Claim,
    key: u64,
    /// The resample event's id.
    resample: Option<u64>,
}

/// A virtual machine.
pub struct Vm {
    core: Arc<kvm_core::Vm>,
    host: Arc<UserHost>,
    irqfds: Mutex<Vec<Irqfd>>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").finish_non_exhaustive()
    }
}

fn ioevent<T: Into<u64>>(addr: &IoEventAddress, datamatch: T) -> Match {
    // As in kvm-ioctls, the size of the type is the size of the access; none, for NoDatamatch.
    let len = size_of::<T>();
    let (bus, addr) = match *addr {
        IoEventAddress::Pio(addr) => (Bus::Pio, addr),
        IoEventAddress::Mmio(addr) => (Bus::Mmio, addr),
    };
    Match {
        bus,
        addr,
        len: len as u32,
        data: (len != 0).then(|| datamatch.into()),
    }
}

impl Vm {
    pub(crate) fn new(host: Arc<UserHost>, engine: Box<dyn Engine>) -> Self {
        Vm {
            core: kvm_core::Vm::new(host.clone(), engine),
            host,
            irqfds: Mutex::new(Vec::new()),
        }
    }

    pub(crate) fn core(&self) -> &Arc<kvm_core::Vm> {
        &self.core
    }

    /// Calls `callback` on the VM's thread whenever `fd` is readable, as long as the VM lives.
    pub(crate) fn on_readable(
        &self,
        fd: std::os::fd::OwnedFd,
        callback: Box<dyn Fn() + Send + Sync>,
    ) -> Result<(), Errno> {
        self.host.events.add_descriptor(fd, callback).map(drop)
    }

    /// KVM_CHECK_EXTENSION on the VM.
    pub fn check_extension_int(&self, capability: u32) -> i32 {
        use cap::nr;
        match capability {
            // What needs memory shared through descriptors; these objects have none.
            nr::COALESCED_MMIO
            | nr::COALESCED_PIO
            | nr::DIRTY_LOG_RING
            | nr::DIRTY_LOG_RING_ACQ_REL
            | nr::BINARY_STATS_FD => 0,
            _ => cap::value(capability),
        }
    }

    /// KVM_ENABLE_CAP.
    ///
    /// # Errors
    /// EINVAL for what cannot be enabled.
    pub fn enable_cap(&self, c: &kvm_enable_cap) -> Result<(), Errno> {
        match c.cap {
            cap::nr::MANUAL_DIRTY_LOG_PROTECT2 if c.flags == 0 => {
                self.core.set_manual_dirty_log(c.args[0])
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// KVM_SET_USER_MEMORY_REGION.
    ///
    /// # Errors
    /// EINVAL, EEXIST, ENOMEM.
    ///
    /// # Safety
    /// The memory must stay mapped, readable and (unless the slot is read-only) writable until the
    /// slot is deleted or the VM and its vCPUs are gone, and the process must expect the guest to
    /// change it at any time.
    pub unsafe fn set_user_memory_region(
        &self,
        region: kvm_userspace_memory_region,
    ) -> Result<(), Errno> {
        self.core.set_memory_region(&Region {
            slot: region.slot,
            flags: region.flags,
            gpa: region.guest_phys_addr,
            size: region.memory_size,
            hva: region.userspace_addr,
        })
    }

    /// KVM_SET_TSS_ADDR: nothing here needs guest memory for a task state segment.
    ///
    /// # Errors
    /// EINVAL for an address above 4 GiB - 3 pages.
    pub fn set_tss_address(&self, offset: usize) -> Result<(), Errno> {
        if offset as u64 > (1 << 32) - 3 * guestmem::PAGE_SIZE {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// KVM_SET_IDENTITY_MAP_ADDR: nothing here needs an identity map.
    ///
    /// # Errors
    /// EINVAL when there are vCPUs already.
    pub fn set_identity_map_address(&self, _address: u64) -> Result<(), Errno> {
        Ok(())
    }

    /// KVM_CREATE_IRQCHIP.
    ///
    /// # Errors
    /// EEXIST, EINVAL when there are vCPUs already.
    pub fn create_irq_chip(&self) -> Result<(), Errno> {
        self.core.create_irqchip()
    }

    /// KVM_CREATE_PIT2.
    ///
    /// # Errors
    /// ENOENT without an irqchip, EEXIST, EINVAL.
    pub fn create_pit2(&self, config: kvm_pit_config) -> Result<(), Errno> {
        self.core.create_pit(config.flags)
    }

    /// KVM_GET_IRQCHIP.
    ///
    /// # Errors
    /// ENXIO without an irqchip, EINVAL.
    pub fn get_irqchip(&self, irqchip: &mut kvm_irqchip) -> Result<(), Errno> {
        let state = self.core.get_irqchip(irqchip.chip_id)?;
        *irqchip = abi::irqchip_out(irqchip.chip_id, &state);
        Ok(())
    }

    /// KVM_SET_IRQCHIP.
    ///
    /// # Errors
    /// ENXIO without an irqchip, EINVAL.
    pub fn set_irqchip(&self, irqchip: &kvm_irqchip) -> Result<(), Errno> {
        self.core
            .set_irqchip(irqchip.chip_id, &abi::irqchip_into(irqchip))
    }

    /// KVM_GET_PIT2.
    ///
    /// # Errors
    /// ENXIO without a PIT.
    pub fn get_pit2(&self) -> Result<kvm_pit_state2, Errno> {
        Ok(abi::out(&self.core.get_pit()?))
    }

    /// KVM_SET_PIT2.
    ///
    /// # Errors
    /// ENXIO without a PIT.
    pub fn set_pit2(&self, state: &kvm_pit_state2) -> Result<(), Errno> {
        self.core.set_pit(&abi::into(state))
    }

    /// KVM_GET_CLOCK.
    ///
    /// # Errors
    /// None; the signature is kvm-ioctls'.
    pub fn get_clock(&self) -> Result<kvm_clock_data, Errno> {
        Ok(abi::out(&self.core.get_clock()))
    }

    /// KVM_SET_CLOCK.
    ///
    /// # Errors
    /// EINVAL for unknown flags.
    pub fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Errno> {
        self.core.set_clock(&abi::into(clock))
    }

    /// KVM_SIGNAL_MSI: how many vCPUs took the message.
    ///
    /// # Errors
    /// EINVAL without an irqchip.
    pub fn signal_msi(&self, msi: kvm_msi) -> Result<i32, Errno> {
        self.core.signal_msi(&abi::into(&msi))
    }

    /// KVM_SET_GSI_ROUTING.
    ///
    /// # Errors
    /// EINVAL, ENXIO without an irqchip.
    pub fn set_gsi_routing(&self, routing: &KvmIrqRouting) -> Result<(), Errno> {
        let entries: Vec<_> = routing.as_slice().iter().map(abi::route_into).collect();
        self.core.set_gsi_routing(&entries)
    }

    /// KVM_IRQ_LINE.
    ///
    /// # Errors
    /// ENXIO without an irqchip.
    pub fn set_irq_line(&self, irq: u32, active: bool) -> Result<(), Errno> {
        self.core.set_irq_line(irq, active).map(drop)
    }

    /// KVM_IOEVENTFD. `datamatch`: [`NoDatamatch`], or a value whose type's size is the access size.
    ///
    /// # Errors
    /// EEXIST, EINVAL, ENOSPC, EBADF.
    pub fn register_ioevent<T: Into<u64>>(
        &self,
        fd: &impl AsRawFd,
        addr: &IoEventAddress,
        datamatch: T,
    ) -> Result<(), Errno> {
        let event = Arc::new(EventFdEvent::new(fd)?);
        self.core.register_ioevent(ioevent(addr, datamatch), event)
    }

    /// KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    /// ENOENT.
    pub fn unregister_ioevent<T: Into<u64>>(
        &self,
        fd: &impl AsRawFd,
        addr: &IoEventAddress,
        datamatch: T,
    ) -> Result<(), Errno> {
        self.core
            .unregister_ioevent(ioevent(addr, datamatch), event_id(fd.as_raw_fd()))
    }

    /// KVM_IRQFD: signalling `fd` gives an edge on `gsi`.
    ///
    /// # Errors
    /// EINVAL without an irqchip, EBUSY when the descriptor is registered already.
    pub fn register_irqfd(&self, fd: &impl AsRawFd, gsi: u32) -> Result<(), Errno> {
        self.add_irqfd(fd, None::<&std::fs::File>, gsi)
    }

    /// KVM_IRQFD with KVM_IRQFD_FLAG_RESAMPLE: signalling `fd` raises `gsi`; when the guest
    /// acknowledges it, it is lowered and `resample` is signalled.
    ///
    /// # Errors
    /// As [`Self::register_irqfd`].
    pub fn register_irqfd_with_resample(
        &self,
        fd: &impl AsRawFd,
        resample: &impl AsRawFd,
        gsi: u32,
    ) -> Result<(), Errno> {
        self.add_irqfd(fd, Some(resample), gsi)
    }

    fn add_irqfd(
        &self,
        fd: &impl AsRawFd,
        resample: Option<&impl AsRawFd>,
        gsi: u32,
    ) -> Result<(), Errno> {
        if !self.core.irqfd_allowed(resample.is_some()) {
            return Err(Errno::EINVAL);
        }
        let id = event_id(fd.as_raw_fd());
        let mut irqfds = self.irqfds.lock().unwrap_or_else(PoisonError::into_inner);
        let eventfd = Claim::new(id)?;
        let own = duplicate(fd)?;
        let resample = match resample {
            None => None,
            Some(fd) => {
                self.core
                    .add_resampler(gsi, Arc::new(EventFdEvent::new(fd)?))?;
                Some(event_id(fd.as_raw_fd()))
            }
        };
        let vm = Arc::downgrade(&self.core);
        let level = resample.is_some();
        let key = self.host.events.add_eventfd(
            own,
            Box::new(move || {
                if let Some(vm) = vm.upgrade() {
                    vm.irqfd(gsi, level);
                }
            }),
        )?;
        irqfds.push(Irqfd {
            gsi,
            eventfd,
            key,
            resample,
        });
        Ok(())
    }

    /// KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    /// None, as in KVM.
    pub fn unregister_irqfd(&self, fd: &impl AsRawFd, gsi: u32) -> Result<(), Errno> {
        let id = event_id(fd.as_raw_fd());
        let mut irqfds = self.irqfds.lock().unwrap_or_else(PoisonError::into_inner);
        irqfds.retain(|irqfd| {
            if irqfd.eventfd.0 != id || irqfd.gsi != gsi {
                return true;
            }
            self.host.events.remove(irqfd.key);
            if let Some(event) = irqfd.resample {
                self.core.remove_resampler(gsi, event);
            }
            false
        });
        Ok(())
    }

    /// KVM_GET_DIRTY_LOG: one bit per page, `memory_size` bytes of the slot.
    ///
    /// # Errors
    /// ENOENT.
    pub fn get_dirty_log(&self, slot: u32, memory_size: usize) -> Result<Vec<u64>, Errno> {
        let mut bitmap = self.core.get_dirty_log(slot)?;
        bitmap.truncate(memory_size.div_ceil(4096).div_ceil(64));
        Ok(bitmap)
    }

    /// KVM_CLEAR_DIRTY_LOG.
    ///
    /// # Errors
    /// ENOENT, EINVAL.
    pub fn clear_dirty_log(
        &self,
        slot: u32,
        first_page: u64,
        num_pages: u32,
        bitmap: &[u64],
    ) -> Result<(), Errno> {
        self.core
            .clear_dirty_log(slot, first_page, u64::from(num_pages), bitmap)
    }

    /// KVM_CREATE_VCPU.
    ///
    /// # Errors
    /// EEXIST, EINVAL, ENOMEM.
    pub fn create_vcpu(&self, id: u64) -> Result<Vcpu, Errno> {
        let id = u32::try_from(id).map_err(|_| Errno::EINVAL)?;
        Vcpu::new(&self.core, id)
    }
}
