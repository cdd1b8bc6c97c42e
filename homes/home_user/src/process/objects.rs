//! What is behind the descriptors: `/dev/kvm`, VMs, vCPUs.

use super::files::{self, KvmFile};
use super::shared::{self, CoalescedPage, SharedPages};
use super::signals::{self, RunMask};
use super::stats::StatsFile;
use super::{engine, memory, table};
use crate::events::{EventFdEvent, borrow, duplicate};
use crate::host::Bare;
use crate::interrupt::Running;
use crate::system::System;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use kvm_abi::ioctl::KVM_RUN;
use kvm_abi::{Errno, irqfd_flag, kvm_irqfd, run};
use kvm_core::host::{Event, Host};
use kvm_core::ioctl::device::{DeviceFile, Vfio};
use kvm_core::ioctl::{self, Answer, Caller, SystemFile, VcpuFile, VmFile};
use kvm_core::shared_memory::SharedMemory;
use kvm_core::stats::StatsImage;
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// A KVM object.
pub enum Object {
    /// `/dev/kvm`.
    System,
    /// A VM.
    Vm(VmObject),
    /// A vCPU.
    Vcpu(Box<VcpuObject>),
    /// A VFIO device.
    Vfio(VfioObject),
}

impl Object {
    /// Answers an ioctl.
    pub fn ioctl(&self, cmd: u32, arg: u64) -> Answer {
        match self {
            Object::System => ioctl::system::call(&SystemObject, cmd, arg),
            Object::Vm(vm) => ioctl::vm::call(vm, cmd, arg),
            Object::Vcpu(vcpu) => vcpu.ioctl(cmd, arg),
            Object::Vfio(device) => ioctl::device::call(device, cmd, arg),
        }
    }

    /// Whether the program may map the descriptor like that.
    pub fn allows_mapping(&self, len: usize, prot: i32, flags: i32, offset: usize) -> bool {
        !matches!(self, Object::Vcpu(_)) || shared::allows_mapping(len, prot, flags, offset)
    }

    /// The program has mapped the descriptor.
    pub fn mapped(&self, addr: usize, len: usize, offset: usize) {
        if let Object::Vcpu(vcpu) = self {
            vcpu.vm.coalesced.show_in(addr, len, offset);
        }
    }
}

macro_rules! own_memory {
    ($($name:ty)*) => {
        $(impl Caller for $name {
            fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), Errno> {
                memory::read(addr, out)
            }
            fn write(&self, addr: u64, data: &[u8]) -> Result<(), Errno> {
                memory::write(addr, data)
            }
        })*
    };
}
own_memory!(SystemObject VmObject VcpuObject VfioObject);

struct SystemObject;

impl SystemFile for SystemObject {
    fn host(&self) -> &dyn Host {
        &Bare
    }

    fn create_vm(&self) -> Answer {
        // The threads that a VM needs are not the program's: they take none of its signals.
        let mask = signals::block_all();
        let vm = System::new(engine()).and_then(|system| system.create_vm());
        signals::restore_mask(mask);
        let vm = vm?;
        let (coalesced, pages) = CoalescedPage::new()?;
        vm.core().set_coalesced_ring(Arc::new(pages))?;
        let vm = Arc::new(VmState {
            vm,
            coalesced,
            stats: StatsFile::default(),
            vfio: Mutex::default(),
        });
        let file = KvmFile::new(files::VM, 0)?;
        let fd = table::publish(file, Object::Vm(VmObject(vm.clone())))?;
        if let Some(watcher) = table::watcher() {
            vm.vm.on_readable(watcher, Box::new(table::collect))?;
        }
        Ok(fd.into_raw_fd() as u64)
    }
}

/// What a VM and its vCPUs share.
struct VmState {
    vm: Vm,
    coalesced: CoalescedPage,
    stats: StatsFile,
    vfio: Mutex<Weak<Vfio>>,
}

/// A VM.
pub struct VmObject(Arc<VmState>);

/// Held while the program's descriptors are looked at. That opens files for moments, and a program that closes
/// a descriptor while another thread of it gives its number to us must not make us take one of those for it.
fn looking_at_descriptors() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A duplicate of the eventfd with this number, which stays what it is.
fn eventfd(fd: u32) -> Result<OwnedFd, Errno> {
    let own = duplicate(&borrow(fd as RawFd)?)?;
    EventFdEvent::checked(&own)?;
    Ok(own)
}

impl VmFile for VmObject {
    fn vm(&self) -> &Arc<kvm_core::Vm> {
        self.0.vm.core()
    }

    fn create_vcpu(&self, id: u32) -> Answer {
        let core = self.0.vm.core();
        let ring_size = core.dirty_ring_bytes() as usize;
        let size = match ring_size {
            0 => run::MMAP_SIZE,
            bytes => run::DIRTY_RING_OFFSET + bytes,
        };
        let file = KvmFile::new(files::VCPU, size)?;
        let ring: Option<Arc<dyn SharedMemory>> = match ring_size {
            0 => None,
            bytes => Some(Arc::new(SharedPages::map(
                &file.own,
                run::DIRTY_RING_OFFSET,
                bytes,
            )?)),
        };
        let vcpu = Vcpu::on_file(core, id, &file.own, ring)?;
        let object = VcpuObject {
            vcpu,
            vm: self.0.clone(),
            stats: StatsFile::default(),
            signal_mask: Mutex::new(None),
        };
        let fd = table::publish(file, Object::Vcpu(Box::new(object)))?;
        Ok(fd.into_raw_fd() as u64)
    }

    fn event(&self, fd: i32) -> Result<Arc<dyn Event>, Errno> {
        let _alone = looking_at_descriptors();
        let own = duplicate(&borrow(fd)?)?;
        Ok(Arc::new(EventFdEvent::checked(&own)?))
    }

    fn assign_irqfd(&self, irqfd: &kvm_irqfd) -> Result<(), Errno> {
        let _alone = looking_at_descriptors();
        let fd = eventfd(irqfd.fd)?;
        if irqfd.flags & irqfd_flag::RESAMPLE != 0 {
            let resample = eventfd(irqfd.resamplefd)?;
            self.0
                .vm
                .register_irqfd_with_resample(&fd, &resample, irqfd.gsi)
        } else {
            self.0.vm.register_irqfd(&fd, irqfd.gsi)
        }
    }

    fn deassign_irqfd(&self, irqfd: &kvm_irqfd) -> Result<(), Errno> {
        let _alone = looking_at_descriptors();
        let fd = eventfd(irqfd.fd)?;
        self.0.vm.unregister_irqfd(&fd, irqfd.gsi)
    }

    fn create_vfio(&self) -> Answer {
        let mut last = self.0.vfio.lock().unwrap_or_else(PoisonError::into_inner);
        if last.strong_count() != 0 {
            return Err(Errno::EBUSY);
        }
        let device = Arc::new(Vfio::default());
        *last = Arc::downgrade(&device);
        let object = VfioObject {
            device,
            _vm: self.0.clone(),
        };
        let fd = table::publish(KvmFile::new(files::VFIO, 0)?, Object::Vfio(object))?;
        Ok(fd.into_raw_fd() as u64)
    }

    fn stats_fd(&self) -> Answer {
        let image = StatsImage::of_vm(self.0.vm.core(), std::process::id());
        self.0.stats.open(&image)
    }
}

/// A VFIO device.
pub struct VfioObject {
    device: Arc<Vfio>,
    /// A device keeps its VM.
    _vm: Arc<VmState>,
}

impl DeviceFile for VfioObject {
    fn vfio(&self) -> &Vfio {
        &self.device
    }

    fn vfio_file(&self, fd: i32) -> Result<u128, Errno> {
        files::vfio(fd)
    }
}

/// A vCPU.
pub struct VcpuObject {
    vcpu: Vcpu,
    /// A vCPU keeps its VM.
    vm: Arc<VmState>,
    stats: StatsFile,
    signal_mask: Mutex<Option<u64>>,
}

impl VcpuObject {
    fn ioctl(&self, cmd: u32, arg: u64) -> Answer {
        let mut core = self.vcpu.core();
        if cmd != KVM_RUN {
            return ioctl::vcpu::call(&mut core, self, cmd, arg);
        }
        let wanted = *self
            .signal_mask
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let running = Running::new(self.vcpu.shared());
        let mask = RunMask::enter(wanted);
        let answer = ioctl::vcpu::call(&mut core, self, cmd, arg);
        drop(running);
        if mask.deferred() {
            // The exit came first: the signal must not end the next run too.
            self.vcpu.shared().cancel_user_kick();
        }
        drop(core);
        mask.leave();
        answer
    }
}

impl VcpuFile for VcpuObject {
    fn set_signal_mask(&self, mask: Option<u64>) -> Result<(), Errno> {
        if let Some(mask) = mask {
            signals::catch_unmasked(mask);
        }
        *self
            .signal_mask
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = mask;
        Ok(())
    }

    fn stats_fd(&self) -> Answer {
        let image = StatsImage::of_vcpu(self.vcpu.shared_arc(), std::process::id());
        self.stats.open(&image)
    }
}
