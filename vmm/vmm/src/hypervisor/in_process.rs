//! The software engine inside this process: the crate `home_user`, whose calls are those of
//! kvm-ioctls.
#![expect(unsafe_code, reason = "reads the vCPU's run area")]

use std::ptr;

use home_user::{EngineKind, Errno, NoDatamatch};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msi,
    kvm_pit_config, kvm_regs, kvm_run, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, IoEventAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Exit, Result, failed, run_area};

/// Names the request in an error.
fn asked<T>(request: &'static str, result: std::result::Result<T, Errno>) -> Result<T> {
    result.map_err(|e| failed(request, e.0))
}

/// The engine.
pub struct System(home_user::System);

impl System {
    pub(super) fn open() -> Result<Self> {
        asked(
            "opening the jit engine",
            home_user::System::new(EngineKind::Jit),
        )
        .map(Self)
    }

    pub(super) fn create_vm(&self) -> Result<Vm> {
        asked("KVM_CREATE_VM", self.0.create_vm()).map(Vm)
    }

    pub(super) fn supported_cpuid(&self) -> Result<CpuId> {
        asked(
            "KVM_GET_SUPPORTED_CPUID",
            self.0.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        )
    }

    pub(super) fn check_extension(&self, cap: Cap) -> i32 {
        self.0.check_extension_int(cap as u32)
    }
}

/// A VM of the engine.
pub struct Vm(home_user::Vm);

impl Vm {
    pub(super) fn set_tss_address(&self, gpa: u32) -> Result<()> {
        asked("KVM_SET_TSS_ADDR", self.0.set_tss_address(gpa as usize))
    }

    pub(super) fn set_identity_map_address(&self, gpa: u64) -> Result<()> {
        asked(
            "KVM_SET_IDENTITY_MAP_ADDR",
            self.0.set_identity_map_address(gpa),
        )
    }

    pub(super) fn create_irq_chip(&self) -> Result<()> {
        asked("KVM_CREATE_IRQCHIP", self.0.create_irq_chip())
    }

    pub(super) fn create_pit2(&self, config: kvm_pit_config) -> Result<()> {
        asked("KVM_CREATE_PIT2", self.0.create_pit2(config))
    }

    pub(super) unsafe fn set_user_memory_region(
        &self,
        region: kvm_userspace_memory_region,
    ) -> Result<()> {
        // SAFETY: the caller promises that the mapping is the guest's and outlives the VM.
        asked("KVM_SET_USER_MEMORY_REGION", unsafe {
            self.0.set_user_memory_region(region)
        })
    }

    pub(super) fn create_vcpu(&self, id: u32) -> Result<Vcpu> {
        let mut vcpu = asked("KVM_CREATE_VCPU", self.0.create_vcpu(u64::from(id))).map(Box::new)?;
        let run = ptr::from_mut(vcpu.get_kvm_run());
        Ok(Vcpu { vcpu, run })
    }

    pub(super) fn register_ioevent(&self, event: &EventFd, addr: &IoEventAddress) -> Result<()> {
        asked(
            "KVM_IOEVENTFD",
            self.0.register_ioevent(event, &address(addr), NoDatamatch),
        )
    }

    pub(super) fn unregister_ioevent(&self, event: &EventFd, addr: &IoEventAddress) -> Result<()> {
        asked(
            "KVM_IOEVENTFD",
            self.0
                .unregister_ioevent(event, &address(addr), NoDatamatch),
        )
    }

    pub(super) fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        asked("KVM_IRQFD", self.0.register_irqfd(event, gsi))
    }

    pub(super) fn set_irq_line(&self, gsi: u32, active: bool) -> Result<()> {
        asked("KVM_IRQ_LINE", self.0.set_irq_line(gsi, active))
    }

    pub(super) fn signal_msi(&self, msi: kvm_msi) -> Result<()> {
        asked("KVM_SIGNAL_MSI", self.0.signal_msi(msi)).map(drop)
    }
}

fn address(addr: &IoEventAddress) -> home_user::IoEventAddress {
    match *addr {
        IoEventAddress::Pio(port) => home_user::IoEventAddress::Pio(port),
        IoEventAddress::Mmio(gpa) => home_user::IoEventAddress::Mmio(gpa),
    }
}

/// A vCPU of the engine.
pub struct Vcpu {
    vcpu: Box<home_user::Vcpu>,
    run: *mut kvm_run,
}

// SAFETY: the raw pointer is the run area that `vcpu` maps and owns, so it moves with it.
unsafe impl Send for Vcpu {}

impl Vcpu {
    pub(super) fn run(&mut self) -> Result<Exit<'_>> {
        match self.vcpu.run().map(drop) {
            Ok(()) => {}
            Err(Errno::EINTR | Errno::EAGAIN) => return Ok(Exit::Intr),
            Err(e) => return Err(failed("KVM_RUN", e.0)),
        }
        // SAFETY: the run area stays mapped while `self` is borrowed, the exit borrows `self`, and
        // the engine has just described an exit in it.
        Ok(unsafe { run_area::decode(self.run) })
    }

    pub(super) fn kicker(&self) -> Kicker {
        Kicker(self.vcpu.kicker())
    }
}

macro_rules! get {
    ($($name:ident -> $ty:ty, $ioctl:literal;)*) => { impl Vcpu { $(
        pub(super) fn $name(&self) -> Result<$ty> {
            asked($ioctl, self.vcpu.$name())
        }
    )* } };
}

macro_rules! set {
    ($($name:ident($ty:ty), $ioctl:literal;)*) => { impl Vcpu { $(
        pub(super) fn $name(&self, value: &$ty) -> Result<()> {
            asked($ioctl, self.vcpu.$name(value).map(drop))
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

/// Makes a vCPU of the engine return.
#[derive(Clone)]
pub struct Kicker(home_user::Kicker);

impl Kicker {
    pub(super) fn kick(&self) {
        self.0.kick();
    }
}
