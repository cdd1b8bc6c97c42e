//! The seam between the VMM and whatever runs the virtual machine.
//!
//! The VMM reaches a VM only through KVM's interface. Which implementation answers is
//! chosen at run time: [`Engine::Kvm`] is a `/dev/kvm` of the host, [`Engine::Jit`] is
//! AnyKVM's own software engine inside this process. Both speak `kvm_bindings` types, so
//! everything above this module is the same for both.

mod in_process;
mod kvm;
mod run_area;

use std::fmt;

use kvm_bindings::{
    CpuId, Msrs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msi, kvm_pit_config, kvm_regs,
    kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
pub use kvm_ioctls::{Cap, IoEventAddress};
use vmm_sys_util::eventfd::EventFd;

/// Which implementation of KVM's interface runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// AnyKVM's software engine, inside this process.
    Jit,
    /// The host's `/dev/kvm`.
    Kvm,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Engine::Jit => "jit",
            Engine::Kvm => "kvm",
        })
    }
}

/// A request to the engine failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {0} (try --engine jit, which needs no /dev/kvm)")]
    Open(std::io::Error),
    /// The engine is not part of this build.
    #[error("the {0} engine is not available in this build")]
    Unavailable(Engine),
    /// An ioctl, or its in-process twin, returned an error.
    #[error("{request} failed: {source}")]
    Request {
        /// Name of the request, as KVM's API documentation spells it.
        request: &'static str,
        /// What the engine answered.
        source: std::io::Error,
    },
}

/// Result of a request to the engine.
pub type Result<T> = std::result::Result<T, Error>;

/// Wraps an errno of a request named `request`.
fn failed(request: &'static str, errno: i32) -> Error {
    Error::Request {
        request,
        source: std::io::Error::from_raw_os_error(errno),
    }
}

/// Why [`Vcpu::run`] came back. Buffers point into the vCPU's run area: fill the ones of
/// the reads before the next `run`.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port. `data` holds one or more elements of `size` bytes
    /// (several for a string instruction).
    IoIn {
        /// First port.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        size: u8,
        /// Where the answer goes.
        data: &'a mut [u8],
    },
    /// The guest writes a port; `data` as for [`Exit::IoIn`].
    IoOut {
        /// First port.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        size: u8,
        /// What the guest wrote.
        data: &'a [u8],
    },
    /// The guest reads guest-physical memory that no memslot backs.
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// Where the answer goes (1 to 8 bytes).
        data: &'a mut [u8],
    },
    /// The guest writes guest-physical memory that no memslot backs.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// What the guest wrote (1 to 8 bytes).
        data: &'a [u8],
    },
    /// HLT with no in-kernel irqchip to wait in.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// The guest asked for a reset, a shutdown or reported a crash by a paravirtual way.
    SystemEvent(u32),
    /// The run was interrupted by a kick; nothing happened.
    Intr,
    /// A debug exception or breakpoint that the VMM asked to see.
    Debug,
    /// The engine cannot go on.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Words that describe the error; what they are depends on `suberror`.
        data: Vec<u64>,
    },
    /// The engine refused to enter the guest.
    FailEntry(u64),
    /// An exit that this VMM did not ask for; the exit reason's number.
    Unknown(u32),
}

macro_rules! each {
    ($self:expr, $inner:ident => $body:expr) => {
        match $self {
            Self::Kvm($inner) => $body,
            Self::InProcess($inner) => $body,
        }
    };
}

/// An open engine: `/dev/kvm` or its twin.
pub enum Hypervisor {
    /// The host's `/dev/kvm`.
    Kvm(kvm::System),
    /// The engine in this process.
    InProcess(in_process::System),
}

impl Hypervisor {
    /// Opens `engine`.
    ///
    /// # Errors
    /// When there is no such engine on this machine or in this build.
    pub fn open(engine: Engine) -> Result<Self> {
        Ok(match engine {
            Engine::Kvm => Self::Kvm(kvm::System::open()?),
            Engine::Jit => Self::InProcess(in_process::System::open()?),
        })
    }

    /// `KVM_CREATE_VM`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn create_vm(&self) -> Result<Vm> {
        Ok(match self {
            Self::Kvm(s) => Vm::Kvm(s.create_vm()?),
            Self::InProcess(s) => Vm::InProcess(s.create_vm()?),
        })
    }

    /// `KVM_GET_SUPPORTED_CPUID`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn supported_cpuid(&self) -> Result<CpuId> {
        each!(self, s => s.supported_cpuid())
    }

    /// `KVM_CHECK_EXTENSION` on the system.
    #[must_use]
    pub fn check_extension(&self, cap: Cap) -> i32 {
        each!(self, s => s.check_extension(cap))
    }
}

/// A virtual machine. Shared by the vCPU and device threads.
pub enum Vm {
    /// Of the host's `/dev/kvm`.
    Kvm(kvm::Vm),
    /// Of the engine in this process.
    InProcess(in_process::Vm),
}

impl Vm {
    /// `KVM_SET_TSS_ADDR`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn set_tss_address(&self, gpa: u32) -> Result<()> {
        each!(self, vm => vm.set_tss_address(gpa))
    }

    /// `KVM_SET_IDENTITY_MAP_ADDR`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn set_identity_map_address(&self, gpa: u64) -> Result<()> {
        each!(self, vm => vm.set_identity_map_address(gpa))
    }

    /// `KVM_CREATE_IRQCHIP`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn create_irq_chip(&self) -> Result<()> {
        each!(self, vm => vm.create_irq_chip())
    }

    /// `KVM_CREATE_PIT2`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn create_pit2(&self, config: kvm_pit_config) -> Result<()> {
        each!(self, vm => vm.create_pit2(config))
    }

    /// `KVM_SET_USER_MEMORY_REGION`.
    ///
    /// # Safety
    /// `userspace_addr` must be a mapping of `memory_size` bytes that nothing but volatile
    /// accesses touch and that lives as long as the VM.
    ///
    /// # Errors
    /// What the engine answers.
    #[expect(unsafe_code, reason = "hands a host mapping to the guest")]
    pub unsafe fn set_user_memory_region(&self, region: kvm_userspace_memory_region) -> Result<()> {
        // SAFETY: the caller's promise is passed on.
        each!(self, vm => unsafe { vm.set_user_memory_region(region) })
    }

    /// `KVM_CREATE_VCPU`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu> {
        Ok(match self {
            Self::Kvm(vm) => Vcpu::Kvm(vm.create_vcpu(id)?),
            Self::InProcess(vm) => Vcpu::InProcess(vm.create_vcpu(id)?),
        })
    }

    /// `KVM_IOEVENTFD`: any write to `addr` signals `event` instead of leaving the guest.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn register_ioevent(&self, event: &EventFd, addr: &IoEventAddress) -> Result<()> {
        each!(self, vm => vm.register_ioevent(event, addr))
    }

    /// Undoes [`Vm::register_ioevent`].
    ///
    /// # Errors
    /// What the engine answers.
    pub fn unregister_ioevent(&self, event: &EventFd, addr: &IoEventAddress) -> Result<()> {
        each!(self, vm => vm.unregister_ioevent(event, addr))
    }

    /// `KVM_IRQFD`: a write to `event` raises `gsi`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        each!(self, vm => vm.register_irqfd(event, gsi))
    }

    /// `KVM_IRQ_LINE`.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()> {
        each!(self, vm => vm.set_irq_line(gsi, active))
    }

    /// `KVM_SIGNAL_MSI`: delivers one message-signalled interrupt.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn signal_msi(&self, msi: kvm_msi) -> Result<()> {
        each!(self, vm => vm.signal_msi(msi))
    }
}

/// A virtual CPU. It belongs to the thread that calls [`Vcpu::run`] first.
pub enum Vcpu {
    /// Of the host's `/dev/kvm`.
    Kvm(kvm::Vcpu),
    /// Of the engine in this process.
    InProcess(in_process::Vcpu),
}

macro_rules! vcpu_get {
    ($($name:ident -> $ty:ty, $ioctl:literal;)*) => { $(
        #[doc = concat!("`", $ioctl, "`.\n\n# Errors\nWhat the engine answers.")]
        pub fn $name(&self) -> Result<$ty> {
            each!(self, v => v.$name())
        }
    )* };
}

macro_rules! vcpu_set {
    ($($name:ident($ty:ty), $ioctl:literal;)*) => { $(
        #[doc = concat!("`", $ioctl, "`.\n\n# Errors\nWhat the engine answers.")]
        pub fn $name(&self, value: &$ty) -> Result<()> {
            each!(self, v => v.$name(value))
        }
    )* };
}

impl Vcpu {
    vcpu_get! {
        get_regs -> kvm_regs, "KVM_GET_REGS";
        get_sregs -> kvm_sregs, "KVM_GET_SREGS";
        get_fpu -> kvm_fpu, "KVM_GET_FPU";
        get_lapic -> kvm_lapic_state, "KVM_GET_LAPIC";
        get_mp_state -> kvm_mp_state, "KVM_GET_MP_STATE";
        get_vcpu_events -> kvm_vcpu_events, "KVM_GET_VCPU_EVENTS";
    }
    vcpu_set! {
        set_regs(kvm_regs), "KVM_SET_REGS";
        set_sregs(kvm_sregs), "KVM_SET_SREGS";
        set_fpu(kvm_fpu), "KVM_SET_FPU";
        set_lapic(kvm_lapic_state), "KVM_SET_LAPIC";
        set_cpuid2(CpuId), "KVM_SET_CPUID2";
        set_msrs(Msrs), "KVM_SET_MSRS";
    }

    /// `KVM_RUN`: runs the guest until something needs the VMM.
    ///
    /// # Errors
    /// What the engine answers; a kick is no error but [`Exit::Intr`].
    pub fn run(&mut self) -> Result<Exit<'_>> {
        each!(self, v => v.run())
    }

    /// Ties the vCPU to the calling thread, so that its [`Kicker`] reaches it. [`Vcpu::run`]
    /// does so too; a thread that checks a flag before `run` calls this before the check.
    pub fn bind_thread(&mut self) {
        match self {
            Self::Kvm(v) => v.bind_thread(),
            Self::InProcess(_) => {}
        }
    }

    /// The handle by which another thread makes [`Vcpu::run`] return.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        match self {
            Self::Kvm(v) => Kicker::Kvm(v.kicker()),
            Self::InProcess(v) => Kicker::InProcess(v.kicker()),
        }
    }
}

/// Makes a vCPU's [`Vcpu::run`] return [`Exit::Intr`] soon, from any thread.
#[derive(Clone)]
pub enum Kicker {
    /// By a signal to the vCPU's thread.
    Kvm(kvm::Kicker),
    /// By the engine's own flag.
    InProcess(in_process::Kicker),
}

impl Kicker {
    /// Kicks. Without effect on a vCPU that has not started or has ended.
    pub fn kick(&self) {
        each!(self, k => k.kick());
    }
}
