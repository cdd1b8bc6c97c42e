//! A vCPU, with the methods of kvm-ioctls' `VcpuFd`.
#![expect(unsafe_code, reason = "the kvm_run mapping")]

use crate::abi;
use crate::events::last_errno;
use crate::exit::{VcpuExit, decode};
use crate::interrupt::Running;
use kvm_abi::{Errno, run};
use kvm_bindings::{
    CpuId, Msrs, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_run, kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_core::run_page::RunPage;
use kvm_core::shared_memory::SharedMemory;
use kvm_core::vcpu::VcpuShared;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The `kvm_run` mapping.
struct Mapping(NonNull<u8>);

// SAFETY: plain memory; who accesses it when is up to its owners.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new() -> Result<Self, Errno> {
        Self::of(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    fn of(flags: libc::c_int, fd: RawFd) -> Result<Self, Errno> {
        // SAFETY: a new mapping touches nothing that exists.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                run::MMAP_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(last_errno());
        }
        NonNull::new(p.cast()).map(Mapping).ok_or(Errno::ENOMEM)
    }

    fn page(&self) -> RunPage {
        // SAFETY: page-aligned, MMAP_SIZE bytes, mapped until `self` is dropped. `Vcpu` keeps the
        // mapping longer than any page made from it (see the order of its fields).
        unsafe { RunPage::new(self.0) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nothing refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), run::MMAP_SIZE) };
    }
}

/// Makes a vCPU's [`Vcpu::run`] return EINTR once: the present one, or the next. From any thread, and
/// from signal handlers.
#[derive(Clone)]
pub struct Kicker(Arc<VcpuShared>);

impl Kicker {
    /// Kicks.
    pub fn kick(&self) {
        self.0.user_kick();
    }
}

impl std::fmt::Debug for Kicker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kicker(vcpu {})", self.0.id())
    }
}

/// A vCPU.
pub struct Vcpu {
    // Dropped in this order: the core's vCPU uses the mapping.
    core: Mutex<kvm_core::Vcpu>,
    page: RunPage,
    mapping: Mapping,
    shared: Arc<VcpuShared>,
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vcpu({})", self.shared.id())
    }
}

impl Vcpu {
    pub(crate) fn new(vm: &Arc<kvm_core::Vm>, id: u32) -> Result<Self, Errno> {
        Self::with(vm, id, Mapping::new()?, None)
    }

    /// A vCPU whose `kvm_run` is a file of at least [`run::MMAP_SIZE`] bytes that cannot shrink, with the
    /// memory of its dirty ring if the VM has dirty rings.
    pub(crate) fn on_file(
        vm: &Arc<kvm_core::Vm>,
        id: u32,
        file: &impl AsRawFd,
        ring: Option<Arc<dyn SharedMemory>>,
    ) -> Result<Self, Errno> {
        let mapping = Mapping::of(libc::MAP_SHARED, file.as_raw_fd())?;
        Self::with(vm, id, mapping, ring)
    }

    fn with(
        vm: &Arc<kvm_core::Vm>,
        id: u32,
        mapping: Mapping,
        ring: Option<Arc<dyn SharedMemory>>,
    ) -> Result<Self, Errno> {
        let core = vm.create_vcpu_with_ring(id, mapping.page(), ring)?;
        let shared = core.shared().clone();
        Ok(Vcpu {
            core: Mutex::new(core),
            page: mapping.page(),
            mapping,
            shared,
        })
    }

    pub(crate) fn shared(&self) -> &VcpuShared {
        &self.shared
    }

    pub(crate) fn shared_arc(&self) -> &Arc<VcpuShared> {
        &self.shared
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, kvm_core::Vcpu> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// KVM_RUN.
    ///
    /// # Errors
    /// EINTR: kicked, a signal while halted, or `immediate_exit`. EAGAIN: an application processor
    /// waited for its start-up IPI; run again. EFAULT: the memory behind a memslot is not there (any
    /// more); the instruction has not happened.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, Errno> {
        let running = Running::new(&self.shared);
        self.core
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .run()?;
        drop(running);
        // SAFETY: the exit borrows `self`, so nothing runs the vCPU or touches the page meanwhile.
        Ok(unsafe { decode(&self.page) })
    }

    /// The `kvm_run` structure.
    pub fn get_kvm_run(&mut self) -> &mut kvm_run {
        // SAFETY: the mapping is at least as large as the structure, which is made of integers; the
        // borrow keeps the vCPU from running.
        unsafe { self.mapping.0.cast::<kvm_run>().as_mut() }
    }

    /// Sets `kvm_run::immediate_exit`: runs return EINTR at once, after finishing the access that
    /// the last exit asked for.
    pub fn set_kvm_immediate_exit(&mut self, val: u8) {
        self.page.write(run::IMMEDIATE_EXIT, &[val]);
    }

    /// Asks for an exit when the guest can take an interrupt (`request_interrupt_window`).
    pub fn set_kvm_request_interrupt_window(&mut self, val: u8) {
        self.page.write(run::REQUEST_INTERRUPT_WINDOW, &[val]);
    }

    /// The handle that makes this vCPU return.
    pub fn kicker(&self) -> Kicker {
        Kicker(self.shared.clone())
    }

    /// KVM_GET_REGS.
    ///
    /// # Errors
    /// None; here and below a missing list means that the signature is kvm-ioctls'.
    pub fn get_regs(&self) -> Result<kvm_regs, Errno> {
        Ok(abi::out(&self.core().regs()))
    }

    /// KVM_SET_REGS.
    ///
    /// # Errors
    /// None.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), Errno> {
        self.core().set_regs(&abi::into(regs));
        Ok(())
    }

    /// KVM_GET_SREGS.
    ///
    /// # Errors
    /// None.
    pub fn get_sregs(&self) -> Result<kvm_sregs, Errno> {
        Ok(abi::out(&self.core().sregs()))
    }

    /// KVM_SET_SREGS.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Errno> {
        self.core().set_sregs(&abi::into(sregs))
    }

    /// KVM_GET_FPU.
    ///
    /// # Errors
    /// None.
    pub fn get_fpu(&self) -> Result<kvm_fpu, Errno> {
        Ok(abi::out(&self.core().fpu()))
    }

    /// KVM_SET_FPU.
    ///
    /// # Errors
    /// None.
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Errno> {
        self.core().set_fpu(&abi::into(fpu));
        Ok(())
    }

    /// KVM_GET_XSAVE.
    ///
    /// # Errors
    /// None.
    pub fn get_xsave(&self) -> Result<kvm_xsave, Errno> {
        Ok(abi::out(&self.core().xsave()))
    }

    /// KVM_SET_XSAVE.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_xsave(&self, xsave: &kvm_xsave) -> Result<(), Errno> {
        self.core().set_xsave(&abi::into(xsave))
    }

    /// KVM_GET_XCRS.
    ///
    /// # Errors
    /// None.
    pub fn get_xcrs(&self) -> Result<kvm_xcrs, Errno> {
        Ok(abi::out(&self.core().xcrs()))
    }

    /// KVM_SET_XCRS.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Errno> {
        self.core().set_xcrs(&abi::into(xcrs))
    }

    /// KVM_GET_MSRS: how many were read.
    ///
    /// # Errors
    /// None.
    pub fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize, Errno> {
        let mut entries: Vec<_> = msrs.as_slice().iter().map(abi::into).collect();
        let done = self.core().msrs(&mut entries);
        for (out, entry) in msrs.as_mut_slice().iter_mut().zip(&entries) {
            out.data = entry.data;
        }
        Ok(done)
    }

    /// KVM_SET_MSRS: how many were written.
    ///
    /// # Errors
    /// None.
    pub fn set_msrs(&self, msrs: &Msrs) -> Result<usize, Errno> {
        let entries: Vec<_> = msrs.as_slice().iter().map(abi::into).collect();
        Ok(self.core().set_msrs(&entries))
    }

    /// KVM_SET_CPUID2.
    ///
    /// # Errors
    /// EINVAL, E2BIG.
    pub fn set_cpuid2(&self, cpuid: &CpuId) -> Result<(), Errno> {
        let entries: Vec<_> = cpuid.as_slice().iter().map(abi::into).collect();
        self.core().set_cpuid(&entries)
    }

    /// KVM_GET_CPUID2.
    ///
    /// # Errors
    /// E2BIG.
    pub fn get_cpuid2(&self, num_entries: usize) -> Result<CpuId, Errno> {
        let entries: Vec<_> = self.core().cpuid().iter().map(abi::out).collect();
        if entries.len() > num_entries {
            return Err(Errno::E2BIG);
        }
        CpuId::from_entries(&entries).map_err(|_| Errno::E2BIG)
    }

    /// KVM_GET_LAPIC.
    ///
    /// # Errors
    /// EINVAL without an in-kernel local APIC.
    pub fn get_lapic(&self) -> Result<kvm_lapic_state, Errno> {
        Ok(abi::out(&self.core().lapic()?))
    }

    /// KVM_SET_LAPIC.
    ///
    /// # Errors
    /// EINVAL without an in-kernel local APIC.
    pub fn set_lapic(&self, state: &kvm_lapic_state) -> Result<(), Errno> {
        self.core().set_lapic(&abi::into(state))
    }

    /// KVM_GET_MP_STATE.
    ///
    /// # Errors
    /// None.
    pub fn get_mp_state(&self) -> Result<kvm_mp_state, Errno> {
        Ok(abi::out(&self.core().mp_state()))
    }

    /// KVM_SET_MP_STATE.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_mp_state(&self, state: kvm_mp_state) -> Result<(), Errno> {
        self.core().set_mp_state(&abi::into(&state))
    }

    /// KVM_GET_VCPU_EVENTS.
    ///
    /// # Errors
    /// None.
    pub fn get_vcpu_events(&self) -> Result<kvm_vcpu_events, Errno> {
        Ok(abi::out(&self.core().vcpu_events()))
    }

    /// KVM_SET_VCPU_EVENTS.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<(), Errno> {
        self.core().set_vcpu_events(&abi::into(events))
    }

    /// KVM_GET_DEBUGREGS.
    ///
    /// # Errors
    /// None.
    pub fn get_debug_regs(&self) -> Result<kvm_debugregs, Errno> {
        Ok(abi::out(&self.core().debug_regs()))
    }

    /// KVM_SET_DEBUGREGS.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_debug_regs(&self, regs: &kvm_debugregs) -> Result<(), Errno> {
        self.core().set_debug_regs(&abi::into(regs))
    }

    /// KVM_SET_GUEST_DEBUG.
    ///
    /// # Errors
    /// EINVAL, EBUSY.
    pub fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Errno> {
        self.core().set_guest_debug(&abi::into(debug))
    }

    /// KVM_TRANSLATE.
    ///
    /// # Errors
    /// None.
    pub fn translate_gva(&self, gva: u64) -> Result<kvm_translation, Errno> {
        Ok(abi::out(&self.core().translate(gva)))
    }

    /// KVM_INTERRUPT.
    ///
    /// # Errors
    /// ENXIO with an in-kernel irqchip, EEXIST, EINVAL.
    pub fn interrupt(&self, irq: u32) -> Result<(), Errno> {
        self.core().interrupt(irq)
    }

    /// KVM_NMI.
    ///
    /// # Errors
    /// None.
    pub fn nmi(&self) -> Result<(), Errno> {
        self.core().nmi();
        Ok(())
    }

    /// KVM_SMI.
    ///
    /// # Errors
    /// None.
    pub fn smi(&self) -> Result<(), Errno> {
        self.core().smi();
        Ok(())
    }

    /// KVM_GET_TSC_KHZ.
    ///
    /// # Errors
    /// None.
    pub fn get_tsc_khz(&self) -> Result<u32, Errno> {
        Ok(self.core().tsc_khz())
    }

    /// KVM_SET_TSC_KHZ.
    ///
    /// # Errors
    /// EINVAL for any frequency but the host's.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        self.core().set_tsc_khz(khz)
    }

    /// KVM_KVMCLOCK_CTRL.
    ///
    /// # Errors
    /// EINVAL when the guest has no kvmclock.
    pub fn kvmclock_ctrl(&self) -> Result<(), Errno> {
        self.core().kvmclock_ctrl()
    }
}
