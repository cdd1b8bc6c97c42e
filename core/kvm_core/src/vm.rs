//! A virtual machine: memslots, vCPUs, irqchip, ioeventfds, clock.

use crate::chipset::{self, Chipset, IoapicVectors, Vcpus};
use crate::clock::KvmClock;
use crate::cpuid;
use crate::engine::{Engine, EngineError};
use crate::host::{Event, Host};
use crate::ioeventfd::{Bus, IoEvents, Match};
use crate::memory::Memory;
use crate::run_page::RunPage;
use crate::sync::Mutex;
use crate::vcpu::{Vcpu, VcpuShared};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use guestmem::{Change, MemView, PAGE_SIZE, Region, RegionError};
use irqchip::{IrqSource, Msi, Pit, PitChannelState, PitState, Route, RouteTarget, RoutingTable};
use kvm_abi::{
    Errno, cap, clock, irqchip as chip_id, kvm_clock_data, kvm_irq_routing_entry, kvm_msi,
    kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};

/// KVM_PIT_SPEAKER_DUMMY
const PIT_SPEAKER_DUMMY: u32 = 1;
/// KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI
const ROUTING_IRQCHIP: u32 = 1;
const ROUTING_MSI: u32 = 2;

/// What TSC writes are compared with, so that vCPUs whose TSCs are set to the same value one after
/// the other end up synchronized.
#[derive(Clone, Copy, Default)]
pub(crate) struct TscWrite {
    pub(crate) valid: bool,
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
    /// Serializes changes of memslots.
    slots: Mutex<()>,
    pub(crate) memory: Memory,
    vcpus: Mutex<Arc<Vcpus>>,
    chipset: Mutex<Option<Chipset>>,
    ioapic_vectors: Arc<IoapicVectors>,
    irqchip_in_kernel: AtomicBool,
    pit_in_kernel: AtomicBool,
    ioevents: Mutex<IoEvents>,
    clock: Mutex<KvmClock>,
    pub(crate) tsc: Mutex<TscWrite>,
    max_gpa: u64,
    manual_dirty_log: AtomicBool,
    dirty_log_all_set: AtomicBool,
}

impl Vm {
    /// KVM_CREATE_VM.
    pub fn new(host: Arc<dyn Host>, engine: Box<dyn Engine>) -> Arc<Vm> {
        let table = cpuid::Cpuid::new(&cpuid::supported(&*host)).unwrap_or_default();
        let clock = KvmClock::new(host.tsc(), host.tsc_khz());
        Arc::new(Vm {
            host,
            engine,
            slots: Mutex::new(()),
            memory: Memory::default(),
            vcpus: Mutex::new(Arc::new(Vec::new())),
            chipset: Mutex::new(None),
            ioapic_vectors: Arc::default(),
            irqchip_in_kernel: AtomicBool::new(false),
            pit_in_kernel: AtomicBool::new(false),
            ioevents: Mutex::new(IoEvents::default()),
            clock: Mutex::new(clock),
            tsc: Mutex::new(TscWrite::default()),
            max_gpa: 1 << table.phys_bits(),
            manual_dirty_log: AtomicBool::new(false),
            dirty_log_all_set: AtomicBool::new(false),
        })
    }

    /// The home.
    pub fn host(&self) -> &Arc<dyn Host> {
        &self.host
    }

    /// The vCPUs there are now.
    pub(crate) fn vcpus(&self) -> Arc<Vcpus> {
        self.vcpus.lock().clone()
    }

    /// KVM_CREATE_IRQCHIP was called.
    pub fn irqchip_in_kernel(&self) -> bool {
        self.irqchip_in_kernel.load(Ordering::Acquire)
    }

    // Memory.

    /// KVM_SET_USER_MEMORY_REGION. The memory of the region must stay mapped until the slot is deleted
    /// or the VM is gone; see `home_user` for who promises that.
    ///
    /// # Errors
    /// EINVAL, EEXIST, ENOMEM.
    pub fn set_memory_region(&self, region: &Region) -> Result<(), Errno> {
        let _serial = self.slots.lock();
        let all_set = self.dirty_log_all_set.load(Ordering::Relaxed);
        let (view, change) = self
            .memory
            .view()
            .with_region(region, self.max_gpa, all_set)
            .map_err(|e| match e {
                RegionError::Invalid => Errno::EINVAL,
                RegionError::Overlap => Errno::EEXIST,
                RegionError::OutOfMemory => Errno::ENOMEM,
            })?;
        if change != Change::None {
            self.memory.replace(view);
            self.engine.memory_changed();
        }
        Ok(())
    }

    /// The memslots now.
    pub fn memory_view(&self) -> Arc<MemView> {
        self.memory.view()
    }

    /// KVM_GET_DIRTY_LOG: one bit per page of the slot.
    ///
    /// # Errors
    /// ENOENT when the slot does not exist or is not logged, ENOMEM.
    pub fn get_dirty_log(&self, slot: u32) -> Result<Vec<u64>, Errno> {
        let _serial = self.slots.lock();
        let view = self.memory.view();
        let slot = view.slot(slot).ok_or(Errno::ENOENT)?;
        let log = slot.dirty.as_ref().ok_or(Errno::ENOENT)?;
        let clear = !self.manual_dirty_log.load(Ordering::Relaxed);
        let mut bitmap = Vec::new();
        if !log.fetch(&mut bitmap, clear) {
            return Err(Errno::ENOMEM);
        }
        if clear && bitmap.iter().any(|&w| w != 0) {
            self.engine.write_protect(slot.gpa, slot.size);
        }
        Ok(bitmap)
    }

    /// KVM_CLEAR_DIRTY_LOG: clears the bits set in `bitmap` for `pages` pages from `first_page` on.
    ///
    /// # Errors
    /// EINVAL, ENOENT.
    pub fn clear_dirty_log(
        &self,
        slot: u32,
        first_page: u64,
        pages: u64,
        bitmap: &[u64],
    ) -> Result<(), Errno> {
        let _serial = self.slots.lock();
        let view = self.memory.view();
        let slot = view.slot(slot).ok_or(Errno::ENOENT)?;
        let log = slot.dirty.as_ref().ok_or(Errno::ENOENT)?;
        let end = first_page.checked_add(pages).ok_or(Errno::EINVAL)?;
        if !first_page.is_multiple_of(64)
            || end > log.pages()
            || (!pages.is_multiple_of(64) && end < log.pages())
        {
            return Err(Errno::EINVAL);
        }
        log.clear(first_page, pages, bitmap);
        self.engine
            .write_protect(slot.gpa + first_page * PAGE_SIZE, pages * PAGE_SIZE);
        Ok(())
    }

    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: bit 0 makes KVM_GET_DIRTY_LOG leave the bits alone, bit 1
    /// starts logs all dirty.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_manual_dirty_log(&self, flags: u64) -> Result<(), Errno> {
        if flags & !3 != 0 || flags == 2 {
            return Err(Errno::EINVAL);
        }
        self.manual_dirty_log
            .store(flags & 1 != 0, Ordering::Relaxed);
        self.dirty_log_all_set
            .store(flags & 2 != 0, Ordering::Relaxed);
        Ok(())
    }

    // vCPUs.

    /// KVM_CREATE_VCPU.
    ///
    /// # Errors
    /// EINVAL (id or number out of range), EEXIST, ENOMEM.
    pub fn create_vcpu(self: &Arc<Self>, id: u32, run: RunPage) -> Result<Vcpu, Errno> {
        if id >= cap::MAX_VCPU_ID {
            return Err(Errno::EINVAL);
        }
        let engine = self.engine.create_vcpu(id).map_err(|e| match e {
            EngineError::OutOfMemory => Errno::ENOMEM,
            EngineError::Unsupported(what) => {
                log::error!("cannot create a vCPU: this host lacks {what}");
                Errno::EOPNOTSUPP
            }
        })?;
        let waiter = self.host.waiter().ok_or(Errno::ENOMEM)?;
        let native = self.host.native_cpu().ok_or(Errno::ENOMEM)?;
        let shared = Arc::new(VcpuShared::new(
            id,
            self.irqchip_in_kernel(),
            engine.kicker(),
            waiter,
            self.max_gpa.trailing_zeros() as u8,
        ));
        let kicked = shared.clone();
        let timer = self
            .host
            .timer(Box::new(move || kicked.kick()))
            .ok_or(Errno::ENOMEM)?;
        let index = {
            let mut list = self.vcpus.lock();
            if list.len() >= cap::MAX_VCPUS as usize {
                return Err(Errno::EINVAL);
            }
            if list.iter().any(|v| v.id() == id) {
                return Err(Errno::EEXIST);
            }
            let mut copy = Vec::new();
            copy.try_reserve_exact(list.len() + 1)
                .map_err(|_| Errno::ENOMEM)?;
            copy.extend(list.iter().cloned());
            copy.push(shared.clone());
            *list = Arc::new(copy);
            list.len() - 1
        };
        Ok(Vcpu::new(
            self.clone(),
            shared,
            index,
            engine,
            timer,
            native,
            run,
        ))
    }

    // Interrupts.

    fn with_chipset<R>(&self, f: impl FnOnce(&mut Chipset, &Vcpus) -> R) -> Result<R, Errno> {
        let vcpus = self.vcpus();
        let mut guard = self.chipset.lock();
        let chipset = guard.as_mut().ok_or(Errno::ENXIO)?;
        Ok(f(chipset, &vcpus))
    }

    /// KVM_CREATE_IRQCHIP.
    ///
    /// # Errors
    /// EEXIST, EINVAL when there are vCPUs already, ENOMEM.
    pub fn create_irqchip(self: &Arc<Self>) -> Result<(), Errno> {
        if self.irqchip_in_kernel() {
            return Err(Errno::EEXIST);
        }
        if !self.vcpus().is_empty() {
            return Err(Errno::EINVAL);
        }
        let weak = Arc::downgrade(self);
        let timer = self
            .host
            .timer(Box::new(move || {
                if let Some(vm) = weak.upgrade() {
                    vm.chipset_tick();
                }
            }))
            .ok_or(Errno::ENOMEM)?;
        *self.chipset.lock() = Some(Chipset::new(timer, self.ioapic_vectors.clone())?);
        self.irqchip_in_kernel.store(true, Ordering::Release);
        Ok(())
    }

    /// KVM_CREATE_PIT2.
    ///
    /// # Errors
    /// ENOENT without an irqchip, EEXIST, EINVAL for unknown flags.
    pub fn create_pit(&self, flags: u32) -> Result<(), Errno> {
        if flags & !PIT_SPEAKER_DUMMY != 0 {
            return Err(Errno::EINVAL);
        }
        self.with_chipset(|c, _| {
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
    /// EINVAL without an irqchip or for unknown flags.
    pub fn signal_msi(&self, msi: &kvm_msi) -> Result<i32, Errno> {
        if !self.irqchip_in_kernel() || msi.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let msi = Msi {
            address: u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo),
            data: msi.data,
        };
        Ok(chipset::deliver_msi(&self.vcpus(), msi) as i32)
    }

    /// KVM_SET_GSI_ROUTING.
    ///
    /// # Errors
    /// EINVAL, ENOMEM; ENXIO without an irqchip.
    pub fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), Errno> {
        if entries.len() > irqchip::MAX_ROUTES {
            return Err(Errno::EINVAL);
        }
        let mut routes = Vec::new();
        routes
            .try_reserve_exact(entries.len())
            .map_err(|_| Errno::ENOMEM)?;
        for entry in entries {
            routes.push(Route {
                gsi: entry.gsi,
                target: route_target(entry)?,
            });
        }
        let table = RoutingTable::new(&routes).map_err(|e| match e {
            irqchip::RouteError::NoMemory => Errno::ENOMEM,
            _ => Errno::EINVAL,
        })?;
        self.with_chipset(|c, _| c.routing = table)
    }

    /// KVM_GET_IRQCHIP.
    ///
    /// # Errors
    /// ENXIO without an irqchip, EINVAL for an unknown chip.
    pub fn get_irqchip(&self, id: u32) -> Result<ChipState, Errno> {
        self.with_chipset(|c, _| match id {
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
        self.with_chipset(|c, vcpus| {
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

    /// Completes an interrupt at the IOAPIC.
    pub(crate) fn eoi(&self, eoi: irqchip::EndOfInterrupt) {
        if !self.ioapic_has(eoi.vector) {
            return;
        }
        let now = self.host.now_ns();
        let _ = self.with_chipset(|c, vcpus| c.eoi(vcpus, eoi, now));
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
        self.irqchip_in_kernel() && self.with_chipset(|c, _| c.pic.output()).unwrap_or(false)
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
        (is_pic_port(port) && self.irqchip_in_kernel())
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
        gpa.wrapping_sub(IOAPIC_BASE) < IOAPIC_SIZE && self.irqchip_in_kernel()
    }

    // ioeventfd.

    fn signal_ioevent(&self, bus: Bus, addr: u64, data: &[u8]) -> bool {
        let event = self.ioevents.lock().find(bus, addr, data).cloned();
        if let Some(event) = &event {
            event.signal();
        }
        event.is_some()
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

fn route_target(entry: &kvm_irq_routing_entry) -> Result<RouteTarget, Errno> {
    if entry.flags != 0 {
        return Err(Errno::EINVAL);
    }
    match entry.type_ {
        ROUTING_IRQCHIP => {
            let chip = entry.u[0] as u32;
            let pin = u8::try_from(entry.u[0] >> 32).map_err(|_| Errno::EINVAL)?;
            match chip {
                chip_id::PIC_MASTER if pin < 8 => Ok(RouteTarget::Pic(pin)),
                chip_id::PIC_SLAVE if pin < 8 => Ok(RouteTarget::Pic(pin + 8)),
                chip_id::IOAPIC => Ok(RouteTarget::Ioapic(pin)),
                _ => Err(Errno::EINVAL),
            }
        }
        ROUTING_MSI => Ok(RouteTarget::Msi(Msi {
            address: entry.u[0],
            data: entry.u[1] as u32,
        })),
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
