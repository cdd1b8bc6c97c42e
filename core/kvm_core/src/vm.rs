//! A virtual machine: memslots, vCPUs, irqchip, ioeventfds, clock.

mod memslots;

use crate::chipset::{self, Addressing, Chipset, IoapicVectors, Vcpus};
use crate::clock::KvmClock;
use crate::coalesced::Coalesced;
use crate::cpuid;
use crate::dirty_ring::DirtyRing;
use crate::engine::{Engine, EngineError};
use crate::host::{Event, Host, Timer};
use crate::ioeventfd::{Bus, IoEvents, Match};
use crate::memory::Memory;
use crate::run_page::RunPage;
use crate::settings::Settings;
use crate::shared_memory::SharedMemory;
use crate::stats::VmStats;
use crate::sync::Mutex;
use crate::vcpu::{Vcpu, VcpuShared};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use irqchip::{
    IrqSource, LapicConfig, Msi, Pit, PitChannelState, PitState, Route, RouteTarget, RoutingTable,
};
use kvm_abi::{
    Errno, KVM_MSI_VALID_DEVID, cap, clock, irq_routing, irqchip as chip_id, kvm_clock_data,
    kvm_coalesced_mmio_zone, kvm_irq_routing_entry, kvm_msi, kvm_pic_state, kvm_pit_channel_state,
    kvm_pit_state, kvm_pit_state2, x2apic_api,
};

/// Most pins that KVM_CAP_SPLIT_IRQCHIP reserves: user space may have several I/O APICs, or large ones.
const MAX_RESERVED_PINS: u64 = irqchip::MAX_ROUTES as u64;
/// KVM_PIT_SPEAKER_DUMMY
const PIT_SPEAKER_DUMMY: u32 = 1;

/// Which interrupt controllers are in the kernel.
mod irqchip_mode {
    pub const NONE: u8 = 0;
    /// The local APICs (KVM_CAP_SPLIT_IRQCHIP).
    pub const SPLIT: u8 = 1;
    /// All (KVM_CREATE_IRQCHIP).
    pub const KERNEL: u8 = 2;
}

/// What TSC writes are compared with, so that vCPUs whose TSCs are set to the same value one after
/// the other end up synchronized.
#[derive(Clone, Copy, Default)]
pub(crate) struct TscWrite {
    pub(crate) valid: bool,
    /// User space has written one, and not only the making of a vCPU.
    pub(crate) by_user: bool,
    pub(crate) host_tsc: u64,
    pub(crate) value: u64,
    pub(crate) offset: u64,
}

/// The state of one irqchip (KVM_GET_IRQCHIP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChipState {
    /// An 8259.
    Pic(kvm_pic_state),
    /// The I/O APIC.
    Ioapic(kvm_abi::kvm_ioapic_state),
}

/// A virtual machine.
pub struct Vm {
    pub(crate) host: Arc<dyn Host>,
    pub(crate) engine: Box<dyn Engine>,
    /// Serializes the making of vCPUs and what must come before the first.
    creation: Mutex<()>,
    /// Serializes changes of memslots.
    slots: Mutex<()>,
    pub(crate) memory: Memory,
    /// The memory of vCPUs in SMM: address space 1.
    pub(crate) smram: Memory,
    pub(crate) settings: Settings,
    vcpus: Mutex<Arc<Vcpus>>,
    chipset: Mutex<Option<Chipset>>,
    ioapic_vectors: Arc<IoapicVectors>,
    /// One of [`irqchip_mode`].
    irqchip_mode: AtomicU8,
    /// Bits of [`kvm_abi::x2apic_api`].
    x2apic_api: AtomicU32,
    boot_vcpu: AtomicU32,
    /// What KVM_CAP_MAX_VCPU_ID was set to; 0: nothing yet.
    max_vcpu_ids: AtomicU32,
    /// Bytes of a dirty ring; 0: the VM has dirty logs.
    dirty_ring_bytes: AtomicU32,
    /// What a local APIC's timer counts.
    apic_bus_cycle_ns: AtomicU32,
    /// What KVM_SET_NR_MMU_PAGES was last given.
    mmu_pages: AtomicU32,
    coalesced: Mutex<Coalesced>,
    pub(crate) stats: VmStats,
    pit_in_kernel: AtomicBool,
    ioevents: Mutex<IoEvents>,
    clock: Mutex<KvmClock>,
    pub(crate) tsc: Mutex<TscWrite>,
    max_gpa: u64,
    cr4_supported: u64,
    manual_dirty_log: AtomicBool,
    dirty_log_all_set: AtomicBool,
}

impl Vm {
    /// KVM_CREATE_VM.
    pub fn new(host: Arc<dyn Host>, engine: Box<dyn Engine>) -> Arc<Vm> {
        let table = cpuid::Cpuid::new(&cpuid::supported(&*host)).unwrap_or_default();
        let cr4_supported = table.features(cpuid::supported_xcr0(&*host)).cr4_allowed;
        let clock = KvmClock::new(host.tsc(), host.tsc_khz());
        Arc::new(Vm {
            host,
            engine,
            creation: Mutex::new(()),
            slots: Mutex::new(()),
            memory: Memory::default(),
            smram: Memory::default(),
            settings: Settings::default(),
            vcpus: Mutex::new(Arc::new(Vec::new())),
            chipset: Mutex::new(None),
            ioapic_vectors: Arc::default(),
            irqchip_mode: AtomicU8::new(irqchip_mode::NONE),
            x2apic_api: AtomicU32::new(0),
            boot_vcpu: AtomicU32::new(0),
            max_vcpu_ids: AtomicU32::new(0),
            dirty_ring_bytes: AtomicU32::new(0),
            apic_bus_cycle_ns: AtomicU32::new(1),
            mmu_pages: AtomicU32::new(0),
            coalesced: Mutex::default(),
            stats: VmStats::default(),
            pit_in_kernel: AtomicBool::new(false),
            ioevents: Mutex::new(IoEvents::default()),
            clock: Mutex::new(clock),
            tsc: Mutex::new(TscWrite::default()),
            max_gpa: 1 << table.phys_bits(),
            cr4_supported,
            manual_dirty_log: AtomicBool::new(false),
            dirty_log_all_set: AtomicBool::new(false),
        })
    }

    /// The home.
    pub fn host(&self) -> &Arc<dyn Host> {
        &self.host
    }

    /// The CR4 bits that guests can have.
    pub(crate) fn cr4_supported(&self) -> u64 {
        self.cr4_supported
    }

    /// The vCPUs there are now.
    pub(crate) fn vcpus(&self) -> Arc<Vcpus> {
        self.vcpus.lock().clone()
    }

    /// The local APICs at least are in the kernel.
    pub fn irqchip_in_kernel(&self) -> bool {
        self.irqchip_mode.load(Ordering::Acquire) != irqchip_mode::NONE
    }

    /// 8259 and I/O APIC are in the kernel, too (KVM_CREATE_IRQCHIP).
    pub fn pic_in_kernel(&self) -> bool {
        self.irqchip_mode.load(Ordering::Acquire) == irqchip_mode::KERNEL
    }

    /// Whether KVM_IRQFD may be assigned, with KVM_IRQFD_FLAG_RESAMPLE or without.
    pub fn irqfd_allowed(&self, resample: bool) -> bool {
        if resample {
            self.pic_in_kernel()
        } else {
            self.irqchip_in_kernel()
        }
    }

    // vCPUs.

    /// KVM_CREATE_VCPU.
    ///
    /// # Errors
    /// EINVAL (id or number out of range), EEXIST, ENOMEM.
    pub fn create_vcpu(self: &Arc<Self>, id: u32, run: RunPage) -> Result<Vcpu, Errno> {
        self.create_vcpu_with_ring(id, run, None)
    }

    /// [`Self::create_vcpu`] with memory for the dirty ring, [`Self::dirty_ring_bytes`] of it.
    ///
    /// # Errors
    /// As [`Self::create_vcpu`]; EINVAL, too, when the VM has dirty rings and there is no memory for this one.
    pub fn create_vcpu_with_ring(
        self: &Arc<Self>,
        id: u32,
        run: RunPage,
        ring: Option<Arc<dyn SharedMemory>>,
    ) -> Result<Vcpu, Errno> {
        let _creation = self.creation.lock();
        // The first vCPU settles how high ids may be.
        let ids = match self.max_vcpu_ids.load(Ordering::Relaxed) {
            0 => cap::MAX_VCPU_ID,
            ids => ids,
        };
        self.max_vcpu_ids.store(ids, Ordering::Relaxed);
        let list = self.vcpus();
        if id >= ids || list.len() >= cap::MAX_VCPUS as usize {
            return Err(Errno::EINVAL);
        }
        if list.iter().any(|v| v.id() == id) {
            return Err(Errno::EEXIST);
        }
        let dirty_ring = match (self.dirty_ring_bytes(), ring) {
            (0, _) => None,
            (_, None) => return Err(Errno::EINVAL),
            (bytes, Some(memory)) => Some(DirtyRing::new(memory, bytes)?),
        };
        let engine = self.engine.create_vcpu(id).map_err(|e| match e {
            EngineError::OutOfMemory => Errno::ENOMEM,
            EngineError::Unsupported(what) => {
                log::error!("cannot create a vCPU: this host lacks {what}");
                Errno::EOPNOTSUPP
            }
        })?;
        let waiter = self.host.waiter().ok_or(Errno::ENOMEM)?;
        let native = self.host.native_cpu().ok_or(Errno::ENOMEM)?;
        let bsp = id == self.boot_vcpu.load(Ordering::Relaxed);
        let lapic = self.irqchip_in_kernel().then(|| {
            let mut config = LapicConfig::new(id, bsp);
            config.max_phys_addr = self.max_gpa.trailing_zeros() as u8;
            config.bus_cycle_ns = self.apic_bus_cycle_ns.load(Ordering::Relaxed);
            config
        });
        let shared = Arc::new(VcpuShared::new(
            id,
            bsp,
            lapic,
            engine.kicker(),
            waiter,
            dirty_ring,
        ));
        let kicked = shared.clone();
        let timer = self
            .host
            .timer(Box::new(move || kicked.kick()))
            .ok_or(Errno::ENOMEM)?;
        let mut copy = Vec::new();
        copy.try_reserve_exact(list.len() + 1)
            .map_err(|_| Errno::ENOMEM)?;
        copy.extend(list.iter().cloned());
        copy.push(shared.clone());
        *self.vcpus.lock() = Arc::new(copy);
        Ok(Vcpu::new(
            self.clone(),
            shared,
            list.len(),
            engine,
            timer,
            native,
            run,
        ))
    }

    /// KVM_SET_BOOT_CPU_ID: the vCPU that is the bootstrap processor.
    ///
    /// # Errors
    /// EBUSY when there are vCPUs already, EINVAL for an id that is too high.
    pub fn set_boot_vcpu(&self, id: u64) -> Result<(), Errno> {
        let _creation = self.creation.lock();
        if !self.vcpus().is_empty() {
            return Err(Errno::EBUSY);
        }
        // The limit itself is allowed, as in KVM: then there is no bootstrap processor.
        let limit = match self.max_vcpu_ids.load(Ordering::Relaxed) {
            0 => cap::MAX_VCPU_ID,
            ids => ids,
        };
        if id > u64::from(limit) {
            return Err(Errno::EINVAL);
        }
        self.boot_vcpu.store(id as u32, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_ENABLE_CAP of KVM_CAP_MAX_VCPU_ID: ids of vCPUs will be below `ids`.
    ///
    /// # Errors
    /// EINVAL for more than there can be, for fewer than the bootstrap processor needs, and when it was set to
    /// something else or there is a vCPU already.
    pub fn set_max_vcpu_ids(&self, ids: u64) -> Result<(), Errno> {
        if ids > u64::from(cap::MAX_VCPU_ID) {
            return Err(Errno::EINVAL);
        }
        let _creation = self.creation.lock();
        if u64::from(self.boot_vcpu.load(Ordering::Relaxed)) > ids {
            return Err(Errno::EINVAL);
        }
        match self.max_vcpu_ids.load(Ordering::Relaxed) {
            now if u64::from(now) == ids => Ok(()),
            0 => {
                self.max_vcpu_ids.store(ids as u32, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(Errno::EINVAL),
        }
    }

    // Interrupts.

    fn with_chipset<R>(&self, f: impl FnOnce(&mut Chipset, &Vcpus) -> R) -> Result<R, Errno> {
        let vcpus = self.vcpus();
        let mut guard = self.chipset.lock();
        let chipset = guard.as_mut().ok_or(Errno::ENXIO)?;
        Ok(f(chipset, &vcpus))
    }

    /// [`Self::with_chipset`] where 8259 and I/O APIC are in the kernel.
    fn with_chips<R>(&self, f: impl FnOnce(&mut Chipset, &Vcpus) -> R) -> Result<R, Errno> {
        if !self.pic_in_kernel() {
            return Err(Errno::ENXIO);
        }
        self.with_chipset(f)
    }

    /// KVM_CREATE_IRQCHIP.
    ///
    /// # Errors
    /// EEXIST, EINVAL when there are vCPUs already, ENOMEM.
    pub fn create_irqchip(self: &Arc<Self>) -> Result<(), Errno> {
        let _creation = self.creation.lock();
        if self.irqchip_in_kernel() {
            return Err(Errno::EEXIST);
        }
        if !self.vcpus().is_empty() {
            return Err(Errno::EINVAL);
        }
        let chipset = Chipset::new(self.chipset_timer()?, self.ioapic_vectors.clone())?;
        self.put_chipset(chipset, irqchip_mode::KERNEL);
        Ok(())
    }

    /// KVM_ENABLE_CAP of KVM_CAP_SPLIT_IRQCHIP: the local APICs alone. `pins`: as many GSIs, from 0 on, are
    /// pins of user space's I/O APIC; the ends of their level-triggered interrupts are KVM_EXIT_IOAPIC_EOI.
    ///
    /// # Errors
    /// EINVAL for more pins than an I/O APIC has, EEXIST when there is an irqchip or a vCPU already, ENOMEM.
    pub fn enable_split_irqchip(self: &Arc<Self>, pins: u64) -> Result<(), Errno> {
        if pins > MAX_RESERVED_PINS {
            return Err(Errno::EINVAL);
        }
        let _creation = self.creation.lock();
        if self.irqchip_in_kernel() || !self.vcpus().is_empty() {
            return Err(Errno::EEXIST);
        }
        let timer = self.chipset_timer()?;
        let chipset = Chipset::split(timer, self.ioapic_vectors.clone(), pins as u32);
        self.put_chipset(chipset, irqchip_mode::SPLIT);
        Ok(())
    }

    fn chipset_timer(self: &Arc<Self>) -> Result<Box<dyn Timer>, Errno> {
        let weak = Arc::downgrade(self);
        let tick = move || {
            if let Some(vm) = weak.upgrade() {
                vm.chipset_tick();
            }
        };
        self.host.timer(Box::new(tick)).ok_or(Errno::ENOMEM)
    }

    fn put_chipset(&self, mut chipset: Chipset, mode: u8) {
        let mut place = self.chipset.lock();
        chipset.addressing = self.addressing();
        *place = Some(chipset);
        self.irqchip_mode.store(mode, Ordering::Release);
    }

    /// KVM_ENABLE_CAP of KVM_CAP_X2APIC_API.
    ///
    /// # Errors
    /// EINVAL for unknown flags.
    pub fn enable_x2apic_api(&self, flags: u64) -> Result<(), Errno> {
        if flags & !x2apic_api::VALID != 0 {
            return Err(Errno::EINVAL);
        }
        let mut chipset = self.chipset.lock();
        self.x2apic_api.fetch_or(flags as u32, Ordering::AcqRel);
        if let Some(chipset) = chipset.as_mut() {
            chipset.addressing = self.addressing();
        }
        Ok(())
    }

    /// The length of a bus cycle in nanoseconds, as KVM_CHECK_EXTENSION on the VM tells it.
    pub fn apic_bus_cycle(&self) -> u32 {
        self.apic_bus_cycle_ns.load(Ordering::Relaxed)
    }

    /// KVM_CAP_X86_APIC_BUS_CYCLES_NS: the length of a bus cycle, which local APIC timers count.
    ///
    /// # Errors
    /// EINVAL for 0, for a length whose longest time would not fit, and when there are vCPUs already; ENXIO
    /// without an irqchip.
    pub fn set_apic_bus_cycle(&self, ns: u64) -> Result<(), Errno> {
        /// The largest count times the largest divisor.
        const MAX_CYCLES: u64 = u32::MAX as u64 * 128;
        let ns = u32::try_from(ns).map_err(|_| Errno::EINVAL)?;
        if ns == 0 || MAX_CYCLES.checked_mul(ns.into()).is_none() {
            return Err(Errno::EINVAL);
        }
        if !self.irqchip_in_kernel() {
            return Err(Errno::ENXIO);
        }
        if !self.vcpus().is_empty() {
            return Err(Errno::EINVAL);
        }
        self.apic_bus_cycle_ns.store(ns, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_X2APIC_API_USE_32BIT_IDS is on.
    pub(crate) fn wide_apic_ids(&self) -> bool {
        self.addressing().wide
    }

    fn addressing(&self) -> Addressing {
        let flags = u64::from(self.x2apic_api.load(Ordering::Acquire));
        let mut addressing = Addressing {
            wide: flags & x2apic_api::USE_32BIT_IDS != 0,
            ..Default::default()
        };
        addressing.policy.strict_x2apic_broadcast =
            flags & x2apic_api::DISABLE_BROADCAST_QUIRK != 0;
        addressing
    }

    /// KVM_CREATE_PIT2.
    ///
    /// # Errors
    /// ENOENT without an 8259, EEXIST.
    pub fn create_pit(&self, flags: u32) -> Result<(), Errno> {
        self.with_chips(|c, _| {
            if c.pit.is_some() {
                return Err(Errno::EEXIST);
            }
            c.pit = Some((Pit::new(), flags & PIT_SPEAKER_DUMMY != 0));
            Ok(())
        })
        .map_err(|_| Errno::ENOENT)??;
        self.pit_in_kernel.store(true, Ordering::Release);
        Ok(())
    }

    /// The chipset's timer fired.
    pub fn chipset_tick(&self) {
        let now = self.host.now_ns();
        let _ = self.with_chipset(|c, vcpus| c.tick(vcpus, now));
    }

    /// KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS; the status it returns.
    ///
    /// # Errors
    /// ENXIO without an irqchip.
    pub fn set_irq_line(&self, gsi: u32, level: bool) -> Result<i32, Errno> {
        self.with_chipset(|c, vcpus| c.set_gsi(vcpus, IrqSource::Userspace, gsi, level))
    }

    /// An irqfd was signalled: an edge, or with `resample` the raising of a level.
    pub fn irqfd(&self, gsi: u32, resample: bool) {
        let _ = self.with_chipset(|c, vcpus| {
            if resample {
                c.set_gsi(vcpus, IrqSource::IrqfdResample, gsi, true);
            } else {
                c.set_gsi(vcpus, IrqSource::Userspace, gsi, true);
                c.set_gsi(vcpus, IrqSource::Userspace, gsi, false);
            }
        });
    }

    /// Registers the resample event of an irqfd.
    ///
    /// # Errors
    /// ENXIO without an irqchip, ENOMEM, ENOSPC.
    pub fn add_resampler(&self, gsi: u32, event: Arc<dyn Event>) -> Result<(), Errno> {
        self.with_chipset(|c, _| c.add_resampler(gsi, event))?
    }

    /// Unregisters it.
    pub fn remove_resampler(&self, gsi: u32, event_id: u64) {
        let _ = self.with_chipset(|c, vcpus| c.remove_resampler(vcpus, gsi, event_id));
    }

    /// KVM_SIGNAL_MSI: how many vCPUs took it.
    ///
    /// # Errors
    /// EINVAL without an irqchip or for unknown flags; EPERM for an address that 32-bit APIC ids rule out.
    pub fn signal_msi(&self, msi: &kvm_msi) -> Result<i32, Errno> {
        if !self.irqchip_in_kernel() || msi.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let msi = Msi {
            address: u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo),
            data: msi.data,
        };
        let addressing = self.addressing();
        if !msi.is_valid(addressing.wide) {
            return Err(Errno::EPERM);
        }
        Ok(chipset::deliver_msi(&self.vcpus(), msi, addressing) as i32)
    }

    /// KVM_SET_GSI_ROUTING.
    ///
    /// # Errors
    /// EINVAL, without an irqchip, too; ENOMEM.
    pub fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), Errno> {
        if !self.irqchip_in_kernel() || entries.len() > irqchip::MAX_ROUTES {
            return Err(Errno::EINVAL);
        }
        let (chips, wide) = (self.pic_in_kernel(), self.wide_apic_ids());
        let mut routes = Vec::new();
        routes
            .try_reserve_exact(entries.len())
            .map_err(|_| Errno::ENOMEM)?;
        for entry in entries {
            routes.push(Route {
                gsi: entry.gsi,
                target: route_target(entry, chips, wide)?,
            });
        }
        let table = RoutingTable::new(&routes).map_err(|e| match e {
            irqchip::RouteError::NoMemory => Errno::ENOMEM,
            _ => Errno::EINVAL,
        })?;
        self.with_chipset(|c, _| c.set_routing(table))
    }

    /// KVM_GET_IRQCHIP.
    ///
    /// # Errors
    /// ENXIO without an irqchip, EINVAL for an unknown chip.
    pub fn get_irqchip(&self, id: u32) -> Result<ChipState, Errno> {
        self.with_chips(|c, _| match id {
            chip_id::PIC_MASTER => Ok(ChipState::Pic(pic_to_abi(&c.pic.state()[0]))),
            chip_id::PIC_SLAVE => Ok(ChipState::Pic(pic_to_abi(&c.pic.state()[1]))),
            chip_id::IOAPIC => {
                let s = c.ioapic.state();
                Ok(ChipState::Ioapic(kvm_abi::kvm_ioapic_state {
                    base_address: s.base_address,
                    ioregsel: s.ioregsel,
                    id: s.id,
                    irr: s.irr,
                    pad: 0,
                    redirtbl: s.redirtbl,
                }))
            }
            _ => Err(Errno::EINVAL),
        })?
    }

    /// KVM_SET_IRQCHIP.
    ///
    /// # Errors
    /// ENXIO without an irqchip, EINVAL for an unknown chip.
    pub fn set_irqchip(&self, id: u32, state: &ChipState) -> Result<(), Errno> {
        self.with_chips(|c, vcpus| {
            match (id, state) {
                (chip_id::PIC_MASTER, ChipState::Pic(s)) => c.pic.set_master(&pic_from_abi(s)),
                (chip_id::PIC_SLAVE, ChipState::Pic(s)) => c.pic.set_slave(&pic_from_abi(s)),
                (chip_id::IOAPIC, ChipState::Ioapic(s)) => {
                    let state = irqchip::IoapicState {
                        base_address: s.base_address,
                        ioregsel: s.ioregsel,
                        id: s.id,
                        irr: s.irr,
                        redirtbl: s.redirtbl,
                    };
                    c.set_ioapic(vcpus, &state);
                }
                _ => return Err(Errno::EINVAL),
            }
            c.pic_changed(vcpus);
            Ok(())
        })?
    }

    /// KVM_GET_PIT2.
    ///
    /// # Errors
    /// ENXIO without a PIT.
    pub fn get_pit(&self) -> Result<kvm_pit_state2, Errno> {
        self.with_chipset(|c, _| {
            let state = c.pit.as_ref().ok_or(Errno::ENXIO)?.0.state();
            Ok(kvm_pit_state2 {
                channels: state.channels.map(|s| kvm_pit_channel_state {
                    count: s.count,
                    latched_count: s.latched_count,
                    count_latched: s.count_latched,
                    status_latched: s.status_latched,
                    status: s.status,
                    read_state: s.read_state,
                    write_state: s.write_state,
                    write_latch: s.write_latch,
                    rw_mode: s.rw_mode,
                    mode: s.mode,
                    bcd: s.bcd,
                    gate: s.gate,
                    count_load_time: s.count_load_time,
                }),
                flags: state.flags,
                reserved: [0; 9],
            })
        })?
    }

    /// KVM_SET_PIT2.
    ///
    /// # Errors
    /// ENXIO without a PIT.
    pub fn set_pit(&self, state: &kvm_pit_state2) -> Result<(), Errno> {
        let now = self.host.now_ns();
        self.with_chipset(|c, _| {
            let pit = &mut c.pit.as_mut().ok_or(Errno::ENXIO)?.0;
            let state = PitState {
                channels: state.channels.map(|s| PitChannelState {
                    count: s.count,
                    latched_count: s.latched_count,
                    count_latched: s.count_latched,
                    status_latched: s.status_latched,
                    status: s.status,
                    read_state: s.read_state,
                    write_state: s.write_state,
                    write_latch: s.write_latch,
                    rw_mode: s.rw_mode,
                    mode: s.mode,
                    bcd: s.bcd,
                    gate: s.gate,
                    count_load_time: s.count_load_time,
                }),
                flags: state.flags,
            };
            pit.set_state(&state, now);
            c.arm(now);
            Ok(())
        })?
    }

    /// KVM_SET_PIT: the channels alone.
    ///
    /// # Errors
    /// ENXIO without a PIT.
    pub fn set_pit_channels(&self, state: &kvm_pit_state) -> Result<(), Errno> {
        let flags = self.get_pit()?.flags;
        self.set_pit(&kvm_pit_state2 {
            channels: state.channels,
            flags,
            ..Default::default()
        })
    }

    /// KVM_GET_PIT.
    ///
    /// # Errors
    /// ENXIO without a PIT.
    pub fn get_pit_channels(&self) -> Result<kvm_pit_state, Errno> {
        let channels = self.get_pit()?.channels;
        Ok(kvm_pit_state { channels })
    }

    /// KVM_REINJECT_CONTROL.
    ///
    /// # Errors
    /// ENXIO without a PIT.
    pub fn set_pit_reinject(&self, reinject: bool) -> Result<(), Errno> {
        self.with_chipset(|c, _| {
            let pit = c.pit.as_mut().ok_or(Errno::ENXIO)?;
            pit.0.set_reinject(reinject);
            Ok(())
        })?
    }

    /// Completes an interrupt of the vCPU `index` at the IOAPIC. `true`: that is user space's, and is to hear
    /// of it.
    pub(crate) fn eoi(&self, eoi: irqchip::EndOfInterrupt, index: usize) -> bool {
        if !self.ioapic_has(eoi.vector) {
            return false;
        }
        let now = self.host.now_ns();
        self.with_chipset(|c, vcpus| {
            if c.is_split() {
                return c.user_ioapic_hears(vcpus, index, eoi.vector);
            }
            c.eoi(vcpus, eoi, now);
            false
        })
        .unwrap_or(false)
    }

    /// Whether a pin of the IOAPIC is programmed with the vector.
    pub(crate) fn ioapic_has(&self, vector: u8) -> bool {
        self.ioapic_vectors.contains(vector)
    }

    /// The vector of the PIC's interrupt acknowledge cycle, if its output is high.
    pub(crate) fn pic_ack(&self) -> Option<u8> {
        let now = self.host.now_ns();
        self.with_chipset(|c, vcpus| {
            c.pic.output().then(|| {
                let vector = c.pic.ack();
                c.pic_acked(vcpus, now);
                vector
            })
        })
        .ok()
        .flatten()
    }

    /// The PIC's output.
    pub(crate) fn pic_output(&self) -> bool {
        self.pic_in_kernel() && self.with_chipset(|c, _| c.pic.output()).unwrap_or(false)
    }

    // Device accesses by vCPUs.

    /// A port read by the guest; `false` when no in-kernel device owns the port.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        if !self.owns_port(port) {
            return false;
        }
        let now = self.host.now_ns();
        self.with_chipset(|c, _| {
            if is_pic_port(port) {
                data.fill(0);
                if let [byte] = data {
                    *byte = c.pic.port_read(port);
                }
                return true;
            }
            match &mut c.pit {
                Some((pit, speaker)) if port != irqchip::pit::SPEAKER_PORT || *speaker => {
                    data.fill(0);
                    if let Some(byte) = data.first_mut() {
                        *byte = pit.port_read(port, now);
                    }
                    true
                }
                _ => false,
            }
        })
        .unwrap_or(false)
    }

    /// A port write by the guest; `false` when no in-kernel device or ioeventfd takes it.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> bool {
        if self.owns_port(port) {
            let now = self.host.now_ns();
            let done = self.with_chipset(|c, vcpus| {
                if is_pic_port(port) {
                    if let [byte] = *data {
                        c.pic.port_write(port, byte);
                        c.pic_acked(vcpus, now);
                        c.pic_changed(vcpus);
                    }
                    return true;
                }
                match &mut c.pit {
                    Some((pit, speaker)) if port != irqchip::pit::SPEAKER_PORT || *speaker => {
                        if let Some(&byte) = data.first()
                            && pit.port_write(port, byte, now)
                        {
                            c.arm(now);
                        }
                        true
                    }
                    _ => false,
                }
            });
            if done == Ok(true) {
                return true;
            }
        }
        self.signal_ioevent(Bus::Pio, u64::from(port), data)
    }

    fn owns_port(&self, port: u16) -> bool {
        (is_pic_port(port) && self.pic_in_kernel())
            || ((irqchip::pit::PORTS.contains(&port) || port == irqchip::pit::SPEAKER_PORT)
                && self.pit_in_kernel.load(Ordering::Acquire))
    }

    /// A read of guest-physical space that is not RAM and not the reader's LAPIC; `false` when no
    /// in-kernel device is there.
    pub(crate) fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        if !self.is_ioapic(gpa) {
            return false;
        }
        self.with_chipset(|c, _| {
            let value = c.ioapic.mmio_read(gpa - x86defs::apic::IOAPIC_BASE);
            data.fill(0);
            let bytes = value.to_le_bytes();
            let n = data.len().min(4);
            data[..n].copy_from_slice(&bytes[..n]);
        })
        .is_ok()
    }

    /// The write that belongs to [`Self::mmio_read`].
    pub(crate) fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        if self.is_ioapic(gpa) {
            let mut bytes = [0; 4];
            let n = data.len().min(4);
            bytes[..n].copy_from_slice(&data[..n]);
            let value = u32::from_le_bytes(bytes);
            let offset = gpa - x86defs::apic::IOAPIC_BASE;
            return self
                .with_chipset(|c, vcpus| c.ioapic_write(vcpus, offset, value))
                .is_ok();
        }
        self.signal_ioevent(Bus::Mmio, gpa, data)
    }

    fn is_ioapic(&self, gpa: u64) -> bool {
        use x86defs::apic::{IOAPIC_BASE, IOAPIC_SIZE};
        gpa.wrapping_sub(IOAPIC_BASE) < IOAPIC_SIZE && self.pic_in_kernel()
    }

    // ioeventfd.

    fn signal_ioevent(&self, bus: Bus, addr: u64, data: &[u8]) -> bool {
        let event = self.ioevents.lock().find(bus, addr, data).cloned();
        if let Some(event) = &event {
            event.signal();
        }
        event.is_some() || self.coalesced.lock().write(bus, addr, data)
    }

    // Coalesced writes.

    /// Gives the VM the page that all vCPU mappings show at [`kvm_abi::run::COALESCED_OFFSET`]. Until then
    /// no write is coalesced.
    ///
    /// # Errors
    /// EEXIST, EINVAL.
    pub fn set_coalesced_ring(&self, memory: Arc<dyn SharedMemory>) -> Result<(), Errno> {
        self.coalesced.lock().set_ring(memory)
    }

    /// KVM_REGISTER_COALESCED_MMIO.
    ///
    /// # Errors
    /// EINVAL, ENOSPC, ENOMEM.
    pub fn register_coalesced(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        self.coalesced.lock().register(zone)
    }

    /// KVM_UNREGISTER_COALESCED_MMIO.
    ///
    /// # Errors
    /// EINVAL.
    pub fn unregister_coalesced(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        self.coalesced.lock().unregister(zone)
    }

    /// KVM_IOEVENTFD.
    ///
    /// # Errors
    /// See [`IoEvents::register`].
    pub fn register_ioevent(&self, what: Match, event: Arc<dyn Event>) -> Result<(), Errno> {
        self.ioevents.lock().register(what, event)
    }

    /// KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    /// ENOENT.
    pub fn unregister_ioevent(&self, what: Match, event_id: u64) -> Result<(), Errno> {
        self.ioevents.lock().unregister(what, event_id)
    }

    // Time.

    /// The clock's present parameters.
    pub(crate) fn kvmclock(&self) -> KvmClock {
        *self.clock.lock()
    }

    /// KVM_GET_CLOCK.
    pub fn get_clock(&self) -> kvm_clock_data {
        let tsc = self.host.tsc();
        kvm_clock_data {
            clock: self.clock.lock().ns(tsc),
            flags: clock::TSC_STABLE | clock::REALTIME | clock::HOST_TSC,
            realtime: self.host.realtime_ns(),
            host_tsc: tsc,
            ..Default::default()
        }
    }

    /// KVM_SET_CLOCK.
    ///
    /// # Errors
    /// EINVAL for unknown flags.
    pub fn set_clock(&self, data: &kvm_clock_data) -> Result<(), Errno> {
        if data.flags & !(clock::REALTIME | clock::TSC_STABLE | clock::HOST_TSC) != 0 {
            return Err(Errno::EINVAL);
        }
        let mut ns = data.clock;
        if data.flags & clock::REALTIME != 0 {
            ns = ns.saturating_add(self.host.realtime_ns().saturating_sub(data.realtime));
        }
        self.clock.lock().set(ns, self.host.tsc());
        for vcpu in self.vcpus().iter() {
            vcpu.request_clock_update();
        }
        Ok(())
    }

    /// Makes every vCPU leave guest mode and return EINTR from its present or next run.
    pub fn kick_all(&self) {
        for vcpu in self.vcpus().iter() {
            vcpu.user_kick();
        }
    }
}

fn is_pic_port(port: u16) -> bool {
    matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
}

/// What a route of user space's means. `chips`: 8259 and I/O APIC are in the kernel; `wide`: APIC ids of MSIs
/// have 32 bits.
fn route_target(
    entry: &kvm_irq_routing_entry,
    chips: bool,
    wide: bool,
) -> Result<RouteTarget, Errno> {
    let known = match entry.type_ {
        irq_routing::MSI => KVM_MSI_VALID_DEVID,
        _ => 0,
    };
    if entry.flags & !known != 0 {
        return Err(Errno::EINVAL);
    }
    match entry.type_ {
        irq_routing::IRQCHIP if chips => {
            let chip = entry.u[0] as u32;
            let pin = u8::try_from(entry.u[0] >> 32).map_err(|_| Errno::EINVAL)?;
            match chip {
                chip_id::PIC_MASTER if pin < 8 => Ok(RouteTarget::Pic(pin)),
                chip_id::PIC_SLAVE if pin < 8 => Ok(RouteTarget::Pic(pin + 8)),
                chip_id::IOAPIC => Ok(RouteTarget::Ioapic(pin)),
                _ => Err(Errno::EINVAL),
            }
        }
        irq_routing::MSI => {
            let msi = Msi {
                address: entry.u[0],
                data: entry.u[1] as u32,
            };
            if !msi.is_valid(wide) {
                return Err(Errno::EINVAL);
            }
            Ok(RouteTarget::Msi(msi))
        }
        // As in KVM for a guest that has not turned its SynIC on: it leads nowhere.
        irq_routing::HV_SINT => Ok(RouteTarget::HypervSint {
            vcpu: entry.u[0] as u32,
            sint: (entry.u[0] >> 32) as u32,
        }),
        _ => Err(Errno::EINVAL),
    }
}

macro_rules! convert_pic {
    ($from:expr => $to:ident) => {{
        let s = $from;
        $to {
            last_irr: s.last_irr,
            irr: s.irr,
            imr: s.imr,
            isr: s.isr,
            priority_add: s.priority_add,
            irq_base: s.irq_base,
            read_reg_select: s.read_reg_select,
            poll: s.poll,
            special_mask: s.special_mask,
            init_state: s.init_state,
            auto_eoi: s.auto_eoi,
            rotate_on_auto_eoi: s.rotate_on_auto_eoi,
            special_fully_nested_mode: s.special_fully_nested_mode,
            init4: s.init4,
            elcr: s.elcr,
            elcr_mask: s.elcr_mask,
        }
    }};
}

use irqchip::PicState;

fn pic_to_abi(s: &PicState) -> kvm_pic_state {
    convert_pic!(s => kvm_pic_state)
}

fn pic_from_abi(s: &kvm_pic_state) -> PicState {
    convert_pic!(s => PicState)
}
