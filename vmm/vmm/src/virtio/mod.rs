//! Virtio devices over PCI, modern only. See "Virtual I/O Device (VIRTIO)", version 1.2.
//!
//! A device is a front end, which the vCPUs reach through the transport, and a worker: a
//! thread that owns the queues and the host's end while the driver is running.

pub mod block;
pub mod console;
pub mod disk;
mod guest_io;
pub mod net;
pub mod rng;
pub mod transport;
mod worker;

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMem;
use transport::Interrupt;

/// `VIRTIO_F_VERSION_1`.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_RING_F_INDIRECT_DESC`.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Features of the rings that every device here offers.
pub const RING_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// A device's front end.
pub trait VirtioDevice: Send {
    /// Device type number of the specification.
    fn device_type(&self) -> u16;
    /// PCI class code, 24 bits.
    fn pci_class(&self) -> u32;
    /// Largest size of each queue; a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// Features offered, with those of the rings.
    fn features(&self) -> u64;
    /// The guest reads the device-specific configuration; what is not there reads as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The guest writes the device-specific configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready: start serving the queues.
    ///
    /// # Errors
    /// When the host has no threads or descriptors; the device then needs a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;
    /// Stop serving; the device can be activated again.
    fn reset(&mut self);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<GuestMem>,
    /// Features that the driver accepted.
    pub features: u64,
    /// The queues by number; `None` for those that the driver did not enable.
    pub queues: Vec<Option<ActiveQueue>>,
    /// How to interrupt the driver.
    pub interrupt: Arc<Interrupt>,
}

/// A queue that the driver has set up.
pub struct ActiveQueue {
    /// The rings.
    pub queue: Queue,
    /// Signalled when the driver makes buffers available.
    pub event: EventFd,
}

/// A chain of descriptors in guest memory.
pub(crate) type Chain<'a> = virtio_queue::DescriptorChain<&'a GuestMemoryMmap<()>>;

/// The queues of an active device, as its worker sees them.
pub(crate) struct Queues {
    pub memory: Arc<GuestMem>,
    pub features: u64,
    queues: Vec<Option<ActiveQueue>>,
    interrupt: Arc<Interrupt>,
}

impl Queues {
    fn new(activation: Activation) -> Self {
        let Activation {
            memory,
            features,
            queues,
            interrupt,
        } = activation;
        Self {
            memory,
            features,
            queues,
            interrupt,
        }
    }

    /// Whether the driver has made buffers available in queue `index`.
    pub fn has_buffers(&self, index: usize) -> bool {
        let Some(Some(active)) = self.queues.get(index) else {
            return false;
        };
        active
            .queue
            .avail_idx(&*self.memory, std::sync::atomic::Ordering::Acquire)
            .is_ok_and(|idx| idx.0 != active.queue.next_avail())
    }

    /// Takes the next chain of queue `index` and gives it to `serve`, which returns how many
    /// bytes it wrote. False if there is none.
    pub fn serve_one(
        &mut self,
        index: usize,
        serve: impl FnOnce(&GuestMem, Chain<'_>) -> u32,
    ) -> bool {
        let Some(Some(active)) = self.queues.get_mut(index) else {
            return false;
        };
        let memory = Arc::clone(&self.memory);
        let Some(chain) = active.queue.pop_descriptor_chain(&*memory) else {
            return false;
        };
        let head = chain.head_index();
        let written = serve(&memory, chain);
        if let Err(e) = active.queue.add_used(&*memory, head, written) {
            log::debug!("virtio queue {index}: {e}");
        }
        true
    }

    /// Interrupts the driver if it wants to know what queue `index` has used.
    pub fn notify(&mut self, index: usize) {
        let Some(Some(active)) = self.queues.get_mut(index) else {
            return;
        };
        match active.queue.needs_notification(&*self.memory) {
            Ok(true) => self.interrupt.queue(index),
            Ok(false) => {}
            Err(e) => log::debug!("virtio queue {index}: {e}"),
        }
    }

    /// Asks the driver to notify queue `index` again. True if buffers came in the meantime.
    pub fn enable_notification(&mut self, index: usize) -> bool {
        let Some(Some(active)) = self.queues.get_mut(index) else {
            return false;
        };
        active
            .queue
            .enable_notification(&*self.memory)
            .unwrap_or(false)
    }

    /// Tells the driver not to notify queue `index` while it is being served anyway.
    pub fn disable_notification(&mut self, index: usize) {
        if let Some(Some(active)) = self.queues.get_mut(index) {
            let _ = active.queue.disable_notification(&*self.memory);
        }
    }

    /// Serves all chains of queue `index`, and those that come meanwhile; at most a few rings
    /// full at a time, so that a driver that never stops cannot keep the thread from quitting.
    pub fn serve_all(&mut self, index: usize, mut serve: impl FnMut(&GuestMem, Chain<'_>) -> u32) {
        for _ in 0..16 {
            self.disable_notification(index);
            let mut served = 0u32;
            while served < 1024 && self.serve_one(index, &mut serve) {
                self.notify(index);
                served += 1;
            }
            if !self.enable_notification(index) {
                return;
            }
        }
        // Come back for the rest.
        if let Some(Some(active)) = self.queues.get(index) {
            let _ = active.event.write(1);
        }
    }
}

/// Copies from `config` at `offset`; what is not there reads as 0.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    for (byte, at) in data.iter_mut().zip(0u64..) {
        let at = usize::try_from(offset.saturating_add(at)).unwrap_or(usize::MAX);
        *byte = config.get(at).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests;
