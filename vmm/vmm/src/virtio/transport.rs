//! Virtio over PCI: the modern transport. See "Virtio Over PCI Bus" in the specification.
//!
//! One 64-bit BAR holds, a page each, the common configuration, the interrupt status, the
//! device configuration, the notification area, the MSI-X table and its pending bits. A
//! notification goes to the queue's eventfd without an exit to the VMM where the engine can;
//! otherwise the exit lands in [`PciDevice::bar_write`], which does the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, F_EVENT_IDX, F_VERSION_1, VirtioDevice, read_config_bytes};
use crate::hypervisor::{IoEventAddress, Vm};
use crate::memory::GuestMem;
use crate::pci::config::{Bar, ConfigSpace, Identity};
use crate::pci::intx::{self, Lines};
use crate::pci::msix::Msix;
use crate::pci::{PciDevice, Placement};

/// Bytes of the BAR.
pub const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STRIDE: u32 = 4;

const VENDOR: u16 = 0x1af4;
const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
const FAILED: u8 = 0x80;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
const NO_VECTOR: u16 = 0xffff;

/// How a device interrupts its driver: an MSI-X message per queue, or INTA# with a status.
pub struct Interrupt {
    msix: Arc<Msix>,
    lines: Arc<Lines>,
    slot: u8,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Interrupt {
    fn new(msix: Arc<Msix>, lines: Arc<Lines>, slot: u8, queues: usize) -> Self {
        Self {
            msix,
            lines,
            slot,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// The device has used buffers of queue `index`.
    pub fn queue(&self, index: usize) {
        let vector = self
            .queue_vectors
            .get(index)
            .map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst));
        self.raise(vector, ISR_QUEUE);
    }

    /// The device configuration has changed.
    pub fn config(&self) {
        self.raise(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
    }

    fn raise(&self, vector: u16, cause: u8) {
        if self.msix.enabled() {
            if vector != NO_VECTOR {
                self.msix.trigger(vector);
            }
        } else {
            self.isr.fetch_or(cause, Ordering::SeqCst);
            self.lines.set(self.slot, true);
        }
    }

    /// Reads and clears the interrupt status, which also lowers INTA#.
    fn take_status(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::SeqCst);
        self.lines.set(self.slot, false);
        isr
    }

    fn reset(&self) {
        self.take_status();
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
    }
}

/// What the driver has written about a queue.
#[derive(Clone, Copy, Default)]
struct QueueSetup {
    size: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    msix_capability: usize,
    window_capability: usize,
    msix: Arc<Msix>,
    interrupt: Arc<Interrupt>,
    memory: Arc<GuestMem>,
    vm: Option<Arc<Vm>>,
    events: Vec<EventFd>,
    /// Where the queues' eventfds are registered with the engine.
    doorbells: Option<Bar>,
    feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    status: u8,
    active: bool,
}

impl VirtioPci {
    /// Puts `device` at `placement`. Without `vm` (in tests) nothing is interrupted.
    ///
    /// # Errors
    /// When the host is out of event descriptors.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        placement: Placement,
        memory: Arc<GuestMem>,
        vm: Option<Arc<Vm>>,
        lines: &Arc<Lines>,
    ) -> std::io::Result<Self> {
        let kind = device.device_type();
        let queue_count = device.queue_sizes().len();
        let mut config = ConfigSpace::new(Identity {
            id: (VENDOR, 0x1040 + kind),
            subsystem: (VENDOR, 0x40 + kind),
            class: device.pci_class(),
            revision: 1,
        })
        .with_bar(placement.bar, BAR_SIZE)
        .with_interrupt_pin(intx::gsi(placement.slot) as u8);
        let capability = |kind, offset: u64, extra: &[u8]| {
            let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
            body.extend_from_slice(&(offset as u32).to_le_bytes());
            body.extend_from_slice(&(PAGE as u32).to_le_bytes());
            body.extend_from_slice(extra);
            body
        };
        config.add_capability(CAP_VENDOR, &capability(CFG_COMMON, COMMON, &[]));
        config.add_capability(CAP_VENDOR, &capability(CFG_ISR, ISR, &[]));
        config.add_capability(CAP_VENDOR, &capability(CFG_DEVICE, DEVICE, &[]));
        let stride = NOTIFY_STRIDE.to_le_bytes();
        config.add_capability(CAP_VENDOR, &capability(CFG_NOTIFY, NOTIFY, &stride));
        // A window for drivers that cannot reach the BAR; the driver sets BAR, offset, length.
        let window = config.add_capability(CAP_VENDOR, &capability(CFG_PCI, 0, &[0; 4]));
        for at in [window + 4].into_iter().chain(window + 8..window + 16) {
            config.set_writable(at, 0xff);
        }
        // A vector per queue and one for configuration changes.
        let vectors = queue_count as u16 + 1;
        let mut body = (vectors - 1).to_le_bytes().to_vec();
        body.extend_from_slice(&(MSIX_TABLE as u32).to_le_bytes());
        body.extend_from_slice(&(MSIX_PENDING as u32).to_le_bytes());
        let msix_capability = config.add_capability(CAP_MSIX, &body);
        config.set_writable(msix_capability + 3, 0xc0);

        let msix = Arc::new(Msix::new(vm.clone(), vectors));
        let interrupt = Interrupt::new(
            Arc::clone(&msix),
            Arc::clone(lines),
            placement.slot,
            queue_count,
        );
        let mut transport = Self {
            events: (0..queue_count)
                .map(|_| EventFd::new(EFD_NONBLOCK))
                .collect::<std::io::Result<_>>()?,
            device,
            config,
            msix_capability,
            window_capability: window,
            msix,
            interrupt: Arc::new(interrupt),
            memory,
            vm,
            doorbells: None,
            feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Vec::new(),
            status: 0,
            active: false,
        };
        transport.reset();
        Ok(transport)
    }

    fn reset(&mut self) {
        self.device.reset();
        self.interrupt.reset();
        self.queues = self
            .device
            .queue_sizes()
            .iter()
            .map(|&size| QueueSetup {
                size,
                ..Default::default()
            })
            .collect();
        self.feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.status = 0;
        self.active = false;
        for event in &self.events {
            let _ = event.read();
        }
    }

    fn set_status(&mut self, status: u8) {
        if status == 0 {
            self.reset();
            return;
        }
        let known = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
        // A driver can only add bits; NEEDS_RESET is the device's.
        let mut status = (self.status & (known | NEEDS_RESET)) | (status & known);
        let new = status & !self.status;
        if new & FEATURES_OK != 0 {
            let unknown = self.driver_features & !self.device.features();
            if unknown != 0 || self.driver_features & F_VERSION_1 == 0 {
                status &= !FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 && status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.status = status;
        if new & DRIVER_OK != 0 && status & DRIVER_OK != 0 && !self.active {
            self.active = true;
            if let Err(e) = self.activate() {
                log::warn!("virtio device {}: {e}", self.device.device_type());
                self.status |= NEEDS_RESET;
                self.interrupt.config();
            }
        }
    }

    fn activate(&mut self) -> std::io::Result<()> {
        let mut queues = Vec::with_capacity(self.queues.len());
        for ((setup, event), &max_size) in self
            .queues
            .iter()
            .zip(&self.events)
            .zip(self.device.queue_sizes())
        {
            if !setup.enabled {
                queues.push(None);
                continue;
            }
            let queue = Queue::try_from(QueueState {
                max_size,
                next_avail: 0,
                next_used: 0,
                event_idx_enabled: self.driver_features & F_EVENT_IDX != 0,
                size: setup.size,
                ready: true,
                desc_table: setup.descriptors,
                avail_ring: setup.available,
                used_ring: setup.used,
            })
            .map_err(|e| {
                std::io::Error::other(format!("the driver set up a queue wrongly: {e}"))
            })?;
            if !queue.is_valid(&*self.memory) {
                return Err(std::io::Error::other(
                    "the driver put a queue outside its memory",
                ));
            }
            let event = event.try_clone()?;
            // The driver may have notified before the device was ready.
            event.write(1)?;
            queues.push(Some(ActiveQueue { queue, event }));
        }
        self.device.activate(Activation {
            memory: Arc::clone(&self.memory),
            features: self.driver_features,
            queues,
            interrupt: Arc::clone(&self.interrupt),
        })
    }

    fn selected(&self) -> QueueSetup {
        self.queues
            .get(usize::from(self.queue_select))
            .copied()
            .unwrap_or_default()
    }

    /// Changes the selected queue, which is only allowed before the driver runs.
    fn set_up(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        if self.status & DRIVER_OK != 0 {
            return;
        }
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && !queue.enabled
        {
            change(queue);
        }
    }

    /// The common configuration structure as it reads now.
    fn common(&self) -> [u8; 0x40] {
        let mut bytes = [0; 0x40];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let features = |word: u64, select: u32| match select {
            0 => word as u32,
            1 => (word >> 32) as u32,
            _ => 0,
        };
        let queue = self.selected();
        let vector = |vector: &AtomicU16| vector.load(Ordering::SeqCst);
        let queue_vector = self
            .interrupt
            .queue_vectors
            .get(usize::from(self.queue_select))
            .map_or(NO_VECTOR, vector);
        put(0x00, &self.feature_select.to_le_bytes());
        put(
            0x04,
            &features(self.device.features(), self.feature_select).to_le_bytes(),
        );
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &features(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &vector(&self.interrupt.config_vector).to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status, 0]); // the generation: no configuration here tears
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x18, &queue.size.to_le_bytes());
        put(0x1a, &queue_vector.to_le_bytes());
        put(0x1c, &u16::from(queue.enabled).to_le_bytes());
        put(0x1e, &self.queue_select.to_le_bytes()); // notify_off
        put(0x20, &queue.descriptors.to_le_bytes());
        put(0x28, &queue.available.to_le_bytes());
        put(0x30, &queue.used.to_le_bytes());
        bytes
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut word = [0; 8];
        let Some(bytes) = word.get_mut(..data.len()) else {
            return;
        };
        bytes.copy_from_slice(data);
        let value = u64::from_le_bytes(word);
        let low = value as u32;
        let half = value as u16;
        // Replaces the low, the high or both halves of an address.
        let merge = |old: u64, high: bool| match (data.len(), high) {
            (8, false) => value,
            (_, false) => (old & !0xffff_ffff) | u64::from(low),
            (_, true) => (old & 0xffff_ffff) | u64::from(low) << 32,
        };
        match (offset, data.len()) {
            (0x00, 4) => self.feature_select = low,
            (0x08, 4) => self.driver_feature_select = low,
            (0x0c, 4) if self.status & FEATURES_OK == 0 => {
                let shift = match self.driver_feature_select {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let keep = self.driver_features & !(0xffff_ffffu64 << shift);
                self.driver_features = keep | u64::from(low) << shift;
            }
            (0x10, 2) => self.set_vector(None, half),
            (0x14, 1) => self.set_status(value as u8),
            (0x16, 2) => self.queue_select = half,
            (0x18, 2) => {
                let max = self
                    .device
                    .queue_sizes()
                    .get(usize::from(self.queue_select))
                    .copied();
                if half.is_power_of_two() && max.is_some_and(|max| half <= max) {
                    self.set_up(|queue| queue.size = half);
                }
            }
            (0x1a, 2) => self.set_vector(Some(usize::from(self.queue_select)), half),
            (0x1c, 2) if half == 1 => self.set_up(|queue| queue.enabled = true),
            (0x20, 4 | 8) => self.set_up(|q| q.descriptors = merge(q.descriptors, false)),
            (0x24, 4) => self.set_up(|q| q.descriptors = merge(q.descriptors, true)),
            (0x28, 4 | 8) => self.set_up(|q| q.available = merge(q.available, false)),
            (0x2c, 4) => self.set_up(|q| q.available = merge(q.available, true)),
            (0x30, 4 | 8) => self.set_up(|q| q.used = merge(q.used, false)),
            (0x34, 4) => self.set_up(|q| q.used = merge(q.used, true)),
            _ => {}
        }
    }

    fn set_vector(&mut self, queue: Option<usize>, vector: u16) {
        // A vector that does not exist reads back as none, so the driver can tell.
        let vector = if vector < self.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        };
        let slot = match queue {
            None => Some(&self.interrupt.config_vector),
            Some(index) => self.interrupt.queue_vectors.get(index),
        };
        if let Some(slot) = slot {
            slot.store(vector, Ordering::SeqCst);
        }
    }

    fn notify(&self, offset: u64) {
        if let Some(event) = self
            .events
            .get((offset / u64::from(NOTIFY_STRIDE)) as usize)
        {
            let _ = event.write(1);
        }
    }

    /// Registers the queues' eventfds where the BAR is now.
    fn move_doorbells(&mut self) {
        let bar = self.config.enabled_bar();
        if bar == self.doorbells {
            return;
        }
        let Some(vm) = &self.vm else { return };
        let address = |bar: Bar, index: usize| {
            let offset = NOTIFY + index as u64 * u64::from(NOTIFY_STRIDE);
            Some(IoEventAddress::Mmio(bar.start.checked_add(offset)?))
        };
        for (index, event) in self.events.iter().enumerate() {
            if let Some(old) = self.doorbells.and_then(|bar| address(bar, index))
                && let Err(e) = vm.unregister_ioevent(event, &old)
            {
                log::debug!("virtio doorbell: {e}");
            }
            // If the engine refuses, the access becomes an exit, which works too.
            if let Some(new) = bar.and_then(|bar| address(bar, index))
                && let Err(e) = vm.register_ioevent(event, &new)
            {
                log::debug!("virtio doorbell: {e}");
            }
        }
        self.doorbells = bar;
    }

    /// BAR offset and length that the window capability selects.
    fn window(&self) -> Option<(u64, usize)> {
        let at = self.window_capability;
        let offset = u64::from(self.config.dword(at + 8));
        let len = self.config.dword(at + 12);
        let fits = offset
            .checked_add(u64::from(len))
            .is_some_and(|end| end <= BAR_SIZE);
        (self.config.byte(at + 4) == 0 && matches!(len, 1 | 2 | 4) && fits)
            .then_some((offset, len as usize))
    }
}

impl PciDevice for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        let raised = self.interrupt.lines.raised(self.interrupt.slot);
        self.config.set_interrupt_status(raised);
        self.config.read(offset, data);
        let window_data = self.window_capability + 16;
        if (window_data..window_data + 4).contains(&offset)
            && let Some((at, len)) = self.window()
        {
            let mut value = [0; 4];
            self.bar_read(0, at, &mut value[..len]);
            for (byte, at) in data.iter_mut().zip(offset - window_data..) {
                *byte = value.get(at).copied().unwrap_or(0);
            }
        }
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let control = self.msix_capability + 2;
        if offset < control + 2 && offset + data.len() > control {
            let value = [self.config.byte(control), self.config.byte(control + 1)];
            self.msix.set_control(u16::from_le_bytes(value));
        }
        let window_data = self.window_capability + 16;
        if offset == window_data
            && let Some((at, len)) = self.window()
            && let Some(value) = data.get(..len)
        {
            self.bar_write(0, at, value);
        }
        self.move_doorbells();
    }

    fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => read_config_bytes(&self.common(), within, data),
            ISR => {
                data.fill(0);
                if within == 0
                    && let Some(first) = data.first_mut()
                {
                    *first = self.interrupt.take_status();
                }
            }
            DEVICE => self.device.read_config(within, data),
            MSIX_TABLE => self.msix.table_read(within, data),
            MSIX_PENDING => self.msix.pending_read(within, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.write_common(within, data),
            DEVICE => self.device.write_config(within, data),
            NOTIFY => self.notify(within),
            MSIX_TABLE => self.msix.table_write(within, data),
            _ => {}
        }
    }

    fn shutdown(&mut self) {
        self.device.reset();
    }
}

#[cfg(test)]
mod tests;
