//! The software engine inside this process, behind the same calls as `/dev/kvm`.
//!
//! The types are uninhabited until the engine's crate offers them: opening says so, and
//! nothing else can be reached.

use kvm_bindings::{
    CpuId, Msrs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msi, kvm_pit_config, kvm_regs,
    kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, IoEventAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Engine, Error, Exit, Result};

/// The engine.
pub enum System {}

impl System {
    pub(super) fn open() -> Result<Self> {
        Err(Error::Unavailable(Engine::Jit))
    }

    pub(super) fn create_vm(&self) -> Result<Vm> {
        match *self {}
    }

    pub(super) fn supported_cpuid(&self) -> Result<CpuId> {
        match *self {}
    }

    pub(super) fn check_extension(&self, _: Cap) -> i32 {
        match *self {}
    }
}

/// A VM of the engine.
pub enum Vm {}

macro_rules! vm_calls {
    ($($name:ident($($ty:ty),*);)*) => { impl Vm { $(
        pub(super) fn $name(&self, $(_: $ty),*) -> Result<()> {
            match *self {}
        }
    )* } };
}

vm_calls! {
    set_tss_address(u32);
    set_identity_map_address(u64);
    create_irq_chip();
    create_pit2(kvm_pit_config);
    register_ioevent(&EventFd, &IoEventAddress);
    unregister_ioevent(&EventFd, &IoEventAddress);
    register_irqfd(&EventFd, u32);
    set_irq_line(u32, bool);
    signal_msi(kvm_msi);
}

impl Vm {
    #[expect(unsafe_code, reason = "hands a host mapping to the guest")]
    pub(super) unsafe fn set_user_memory_region(
        &self,
        _: kvm_userspace_memory_region,
    ) -> Result<()> {
        match *self {}
    }

    pub(super) fn create_vcpu(&self, _: u32) -> Result<Vcpu> {
        match *self {}
    }
}

/// A vCPU of the engine.
pub enum Vcpu {}

macro_rules! vcpu_calls {
    ($($name:ident($($ty:ty),*) -> $ret:ty;)*) => { impl Vcpu { $(
        pub(super) fn $name(&self, $(_: $ty),*) -> Result<$ret> {
            match *self {}
        }
    )* } };
}

vcpu_calls! {
    get_regs() -> kvm_regs;
    get_sregs() -> kvm_sregs;
    get_fpu() -> kvm_fpu;
    get_lapic() -> kvm_lapic_state;
    get_mp_state() -> kvm_mp_state;
    get_vcpu_events() -> kvm_vcpu_events;
    set_regs(&kvm_regs) -> ();
    set_sregs(&kvm_sregs) -> ();
    set_fpu(&kvm_fpu) -> ();
    set_lapic(&kvm_lapic_state) -> ();
    set_cpuid2(&CpuId) -> ();
    set_msrs(&Msrs) -> ();
}

impl Vcpu {
    pub(super) fn run(&mut self) -> Result<Exit<'_>> {
        match *self {}
    }

    pub(super) fn kicker(&self) -> Kicker {
        Kicker
    }
}

/// Makes a vCPU of the engine return.
#[derive(Clone)]
pub struct Kicker;

impl Kicker {
    pub(super) fn kick(&self) {}
}
