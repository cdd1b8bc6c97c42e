//! A vCPU: what other threads see of it, and what its own thread owns.

use crate::dirty_ring::DirtyRing;
use crate::engine::{EngineVcpu, Kick};
use crate::env::VcpuEnv;
use crate::host::{Timer, Waiter};
use crate::run_page::RunPage;
use crate::stats::VcpuStats;
use crate::sync::Mutex;
use crate::vm::Vm;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use irqchip::{Lapic, LapicConfig};
use x86emu::env::HostCpu;

/// Requests: what other threads want from a vCPU. Each is a bit, set with [`VcpuShared::request`] and
/// taken by the vCPU's thread.
pub(crate) mod request {
    /// NMIs are queued.
    pub const NMI: u32 = 1 << 0;
    /// An INIT arrived.
    pub const INIT: u32 = 1 << 1;
    /// A start-up IPI arrived; its vector is beside.
    pub const SIPI: u32 = 1 << 2;
    /// The kvmclock page is out of date.
    pub const CLOCK: u32 = 1 << 3;
    /// Leave HLT without an interrupt (KVM_HC_KICK_CPU).
    pub const UNHALT: u32 = 1 << 4;
    /// Return EINTR to user space once.
    pub const USER: u32 = 1 << 5;
    /// An SMI arrived.
    pub const SMI: u32 = 1 << 6;
}

/// The part of a vCPU that is shared with other threads.
pub struct VcpuShared {
    id: u32,
    lapic: Option<Mutex<Lapic>>,
    requests: AtomicU32,
    nmis: AtomicU8,
    sipi_vector: AtomicU8,
    kick: Arc<dyn Kick>,
    waiter: Arc<dyn Waiter>,
    bsp: bool,
    dirty_ring: Option<DirtyRing>,
    pub(crate) stats: VcpuStats,
}

impl VcpuShared {
    pub(crate) fn new(
        id: u32,
        bsp: bool,
        lapic: Option<LapicConfig>,
        kick: Arc<dyn Kick>,
        waiter: Arc<dyn Waiter>,
        dirty_ring: Option<DirtyRing>,
    ) -> Self {
        VcpuShared {
            id,
            bsp,
            lapic: lapic.map(|config| Mutex::new(Lapic::new(config))),
            dirty_ring,
            stats: VcpuStats::default(),
            requests: AtomicU32::new(0),
            nmis: AtomicU8::new(0),
            sipi_vector: AtomicU8::new(0),
            kick,
            waiter,
        }
    }

    /// The id given to KVM_CREATE_VCPU, which is the APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The bootstrap processor (KVM_SET_BOOT_CPU_ID).
    pub(crate) fn is_bsp(&self) -> bool {
        self.bsp
    }

    /// The dirty ring, if the VM's vCPUs have some.
    pub(crate) fn dirty_ring(&self) -> Option<&DirtyRing> {
        self.dirty_ring.as_ref()
    }

    /// The local APIC, if it is in the kernel.
    pub(crate) fn lapic(&self) -> Option<&Mutex<Lapic>> {
        self.lapic.as_ref()
    }

    pub(crate) fn waiter(&self) -> &dyn Waiter {
        &*self.waiter
    }

    /// Makes the vCPU leave guest mode to look at its state again; a sleeping one stays asleep.
    pub(crate) fn kick(&self) {
        self.kick.kick();
    }

    /// Makes the vCPU look at its state again, awake or asleep.
    pub(crate) fn notify(&self) {
        self.kick.kick();
        self.waiter.wake();
    }

    fn request(&self, bit: u32) {
        self.requests.fetch_or(bit, Ordering::AcqRel);
        self.notify();
    }

    /// Takes the requests in `mask`.
    pub(crate) fn take_requests(&self, mask: u32) -> u32 {
        if self.requests.load(Ordering::Acquire) & mask == 0 {
            return 0;
        }
        self.requests.fetch_and(!mask, Ordering::AcqRel) & mask
    }

    /// Whether any request in `mask` is pending.
    pub(crate) fn has_requests(&self, mask: u32) -> bool {
        self.requests.load(Ordering::Acquire) & mask != 0
    }

    pub(crate) fn queue_nmi(&self) {
        let _ = self
            .nmis
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| {
                Some(n.saturating_add(1))
            });
        self.request(request::NMI);
    }

    pub(crate) fn take_nmis(&self) -> u8 {
        self.nmis.swap(0, Ordering::AcqRel)
    }

    pub(crate) fn queue_smi(&self) {
        self.request(request::SMI);
    }

    pub(crate) fn queue_init(&self) {
        // An INIT drops a start-up IPI that came before it.
        self.requests.fetch_and(!request::SIPI, Ordering::AcqRel);
        self.request(request::INIT);
    }

    pub(crate) fn queue_sipi(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::Release);
        self.request(request::SIPI);
    }

    pub(crate) fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::Acquire)
    }

    pub(crate) fn set_sipi_vector(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::Release);
    }

    pub(crate) fn unhalt(&self) {
        self.request(request::UNHALT);
    }

    pub(crate) fn request_clock_update(&self) {
        self.request(request::CLOCK);
    }

    /// Makes the present or next [`Vcpu::run`] return EINTR, once. Callable from any thread and from
    /// signal handlers.
    pub fn user_kick(&self) {
        self.request(request::USER);
    }

    /// Takes back what [`Self::user_kick`] asked for, if no run has seen it.
    pub fn cancel_user_kick(&self) {
        self.take_requests(request::USER);
    }
}

/// A vCPU, as its own thread has it.
pub struct Vcpu {
    pub(crate) engine: Box<dyn EngineVcpu>,
    pub(crate) env: VcpuEnv,
}

impl Vcpu {
    pub(crate) fn new(
        vm: Arc<Vm>,
        shared: Arc<VcpuShared>,
        index: usize,
        engine: Box<dyn EngineVcpu>,
        timer: Box<dyn Timer>,
        native: Box<dyn HostCpu + Send>,
        run: RunPage,
    ) -> Self {
        let mut vcpu = Vcpu {
            engine,
            env: VcpuEnv::new(vm, shared, index, timer, native, run),
        };
        vcpu.env.init_tsc(vcpu.engine.cpu());
        vcpu.publish();
        vcpu
    }

    /// What other threads may do to this vCPU.
    pub fn shared(&self) -> &Arc<VcpuShared> {
        &self.env.shared
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.env.vm
    }
}
