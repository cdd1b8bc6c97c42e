//! The host's `/dev/kvm`, through kvm-ioctls.
//!
//! A kick is a signal whose handler sets `immediate_exit` in the run area of the vCPU that
//! the thread owns. So a signal that arrives just before `KVM_RUN` still ends it: the
//! handler has set the flag by then, and `KVM_RUN` returns `EINTR` at once.
#![expect(
    unsafe_code,
    reason = "reads the vCPU's run area and installs the kick's signal handler"
)]

use std::cell::Cell;
use std::ptr;
use std::sync::{Arc, Mutex, Once, PoisonError};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msi,
    kvm_pit_config, kvm_regs, kvm_run, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{Error, Exit, Result, failed, run_area};

/// An open `/dev/kvm`.
pub struct System(Kvm);

impl System {
    pub(super) fn open() -> Result<Self> {
        Kvm::new()
            .map(Self)
            .map_err(|e| Error::Open(std::io::Error::from_raw_os_error(e.errno())))
    }

    pub(super) fn create_vm(&self) -> Result<Vm> {
        self.0
            .create_vm()
            .map(Vm)
            .map_err(|e| failed("KVM_CREATE_VM", e.errno()))
    }

    pub(super) fn supported_cpuid(&self) -> Result<CpuId> {
        self.0
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| failed("KVM_GET_SUPPORTED_CPUID", e.errno()))
    }

    pub(super) fn check_extension(&self, cap: Cap) -> i32 {
        self.0.check_extension_int(cap)
    }
}

/// A VM file descriptor.
pub struct Vm(VmFd);

impl Vm {
    pub(super) fn set_tss_address(&self, gpa: u32) -> Result<()> {
        self.0
            .set_tss_address(gpa as usize)
            .map_err(|e| failed("KVM_SET_TSS_ADDR", e.errno()))
    }

    pub(super) fn set_identity_map_address(&self, gpa: u64) -> Result<()> {
        self.0
            .set_identity_map_address(gpa)
            .map_err(|e| failed("KVM_SET_IDENTITY_MAP_ADDR", e.errno()))
    }

    pub(super) fn create_irq_chip(&self) -> Result<()> {
        self.0
            .create_irq_chip()
            .map_err(|e| failed("KVM_CREATE_IRQCHIP", e.errno()))
    }

    pub(super) fn create_pit2(&self, config: kvm_pit_config) -> Result<()> {
        self.0
            .create_pit2(config)
            .map_err(|e| failed("KVM_CREATE_PIT2", e.errno()))
    }

    pub(super) unsafe fn set_user_memory_region(
        &self,
        region: kvm_userspace_memory_region,
    ) -> Result<()> {
        // SAFETY: the caller promises that the mapping is the guest's and outlives the VM.
        unsafe { self.0.set_user_memory_region(region) }
            .map_err(|e| failed("KVM_SET_USER_MEMORY_REGION", e.errno()))
    }

    pub(super) fn create_vcpu(&self, id: u32) -> Result<Vcpu> {
        let mut fd = self
            .0
            .create_vcpu(u64::from(id))
            .map_err(|e| failed("KVM_CREATE_VCPU", e.errno()))?;
        let run = ptr::from_mut(fd.get_kvm_run());
        Ok(Vcpu {
            fd,
            run,
            bound: false,
            thread: Arc::new(Mutex::new(None)),
        })
    }

    pub(super) fn register_ioevent(&self, event: &EventFd, addr: &IoEventAddress) -> Result<()> {
        self.0
            .register_ioevent(event, addr, NoDatamatch)
            .map_err(|e| failed("KVM_IOEVENTFD", e.errno()))
    }

    pub(super) fn unregister_ioevent(&self, event: &EventFd, addr: &IoEventAddress) -> Result<()> {
        self.0
            .unregister_ioevent(event, addr, NoDatamatch)
            .map_err(|e| failed("KVM_IOEVENTFD", e.errno()))
    }

    pub(super) fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.0
            .register_irqfd(event, gsi)
            .map_err(|e| failed("KVM_IRQFD", e.errno()))
    }

    pub(super) fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()> {
        self.0
            .set_irq_line(gsi, active)
            .map_err(|e| failed("KVM_IRQ_LINE", e.errno()))
    }

    pub(super) fn signal_msi(&self, msi: kvm_msi) -> Result<()> {
        // 0 means that the guest blocked the message, which is the guest's business.
        self.0
            .signal_msi(msi)
            .map(drop)
            .map_err(|e| failed("KVM_SIGNAL_MSI", e.errno()))
    }
}

thread_local! {
    /// Run area of the vCPU that this thread runs; read by the kick's signal handler.
    static RUN_AREA: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let run = RUN_AREA.get();
    if !run.is_null() {
        // SAFETY: the pointer is set by the owner of the mapping on this very thread and
        // cleared before the mapping goes (`Vcpu::drop`), and the handler runs on this thread.
        unsafe { ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
    }
}

/// The kick's signal: a real-time one, which no library uses by convention.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

fn install_kick_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid one; it gets a handler that only writes a
        // byte, and no SA_RESTART, so that KVM_RUN returns.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as *const () as usize;
            libc::sigaction(kick_signal(), &action, ptr::null_mut());
        }
    });
}

/// A vCPU file descriptor with its run area.
pub struct Vcpu {
    fd: VcpuFd,
    run: *mut kvm_run,
    bound: bool,
    thread: Arc<Mutex<Option<libc::pthread_t>>>,
}

// SAFETY: the raw pointer is the run area that `fd` maps and owns, so it moves with it.
unsafe impl Send for Vcpu {}

impl Vcpu {
    pub(super) fn bind_thread(&mut self) {
        if self.bound {
            return;
        }
        install_kick_handler();
        RUN_AREA.set(self.run);
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        self.bound = true;
    }

    pub(super) fn kicker(&self) -> Kicker {
        Kicker(Arc::clone(&self.thread))
    }

    pub(super) fn run(&mut self) -> Result<Exit<'_>> {
        self.bind_thread();
        if let Err(e) = self.fd.run().map(drop) {
            return match e.errno() {
                libc::EINTR | libc::EAGAIN => {
                    self.fd.set_kvm_immediate_exit(0);
                    Ok(Exit::Intr)
                }
                errno => Err(failed("KVM_RUN", errno)),
            };
        }
        // SAFETY: the run area stays mapped while `self` is borrowed, the exit borrows `self`, and
        // KVM has just described an exit in it.
        Ok(unsafe { run_area::decode(self.run) })
    }
}

macro_rules! get {
    ($($name:ident -> $ty:ty, $ioctl:literal;)*) => { impl Vcpu { $(
        pub(super) fn $name(&self) -> Result<$ty> {
            self.fd.$name().map_err(|e| failed($ioctl, e.errno()))
        }
    )* } };
}

macro_rules! set {
    ($($name:ident($ty:ty), $ioctl:literal;)*) => { impl Vcpu { $(
        pub(super) fn $name(&self, value: &$ty) -> Result<()> {
            self.fd.$name(value).map(drop).map_err(|e| failed($ioctl, e.errno()))
        }
    )* } };
}

get! {
    get_regs -> kvm_regs, "KVM_GET_REGS";
    get_sregs -> kvm_sregs, "KVM_GET_SREGS";
    get_fpu -> kvm_fpu, "KVM_GET_FPU";
    get_lapic -> kvm_lapic_state, "KVM_GET_LAPIC";
    get_mp_state -> kvm_mp_state, "KVM_GET_MP_STATE";
    get_vcpu_events -> kvm_vcpu_events, "KVM_GET_VCPU_EVENTS";
}
set! {
    set_regs(kvm_regs), "KVM_SET_REGS";
    set_sregs(kvm_sregs), "KVM_SET_SREGS";
    set_fpu(kvm_fpu), "KVM_SET_FPU";
    set_lapic(kvm_lapic_state), "KVM_SET_LAPIC";
    set_cpuid2(CpuId), "KVM_SET_CPUID2";
    set_msrs(Msrs), "KVM_SET_MSRS";
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if RUN_AREA.get() == self.run {
            RUN_AREA.set(ptr::null_mut());
        }
    }
}

/// Signals the vCPU's thread.
#[derive(Clone)]
pub struct Kicker(Arc<Mutex<Option<libc::pthread_t>>>);

impl Kicker {
    pub(super) fn kick(&self) {
        let thread = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = *thread {
            // SAFETY: the entry is removed, under this lock, before its thread ends.
            unsafe { libc::pthread_kill(thread, kick_signal()) };
        }
    }
}
