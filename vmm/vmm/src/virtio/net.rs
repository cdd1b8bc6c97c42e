//! Network device. See "Network Device" in the specification.

use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::guest_io::Buffers;
use super::worker::{Handler, Quit, Worker};
use super::{Activation, Queues, RING_FEATURES, VirtioDevice, read_config_bytes};

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
const LINK_UP: u16 = 1;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// Largest Ethernet frame either way: no segmentation offload, but room for large MTUs.
pub const MAX_FRAME: usize = 65_536 + 14;

/// The other end of the guest's network cable.
pub trait NetBackend: Send {
    /// Takes an Ethernet frame (without FCS) from the guest. Must not block; a frame that
    /// cannot be taken is dropped, as a network does.
    fn send(&mut self, frame: &[u8]);
    /// The next frame for the guest into `buffer` (of [`MAX_FRAME`] bytes), and its length;
    /// `None` if there is none now.
    fn recv(&mut self, buffer: &mut [u8]) -> Option<usize>;
    /// A descriptor that polls readable while `recv` has a frame. `recv` that returns `None`
    /// must leave it unreadable until the next frame comes.
    fn event_fd(&self) -> RawFd;
}

/// A back end that survives resets of the machine.
pub type SharedBackend = Arc<Mutex<dyn NetBackend>>;

/// A network card of the guest.
#[derive(Clone)]
pub struct NetConfig {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// Who is at the other end.
    pub backend: SharedBackend,
}

impl NetConfig {
    /// A card with the usual address of a first card.
    #[must_use]
    pub fn new(backend: SharedBackend) -> Self {
        Self {
            mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
            backend,
        }
    }
}

/// The device.
pub struct Net {
    worker: Worker<Port>,
    config: [u8; 8],
}

impl Net {
    /// A card as `config` says.
    #[must_use]
    pub fn new(config: &NetConfig) -> Self {
        let mut bytes = [0; 8];
        bytes[..6].copy_from_slice(&config.mac);
        bytes[6..].copy_from_slice(&LINK_UP.to_le_bytes());
        let port = Port {
            backend: Arc::clone(&config.backend),
            frame: vec![0; HEADER + MAX_FRAME],
            waiting: None,
        };
        Self {
            worker: Worker::new(port),
            config: bytes,
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        1
    }

    fn pci_class(&self) -> u32 {
        0x02_0000
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_MAC | F_STATUS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker.start(activation)
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

struct Port {
    backend: SharedBackend,
    /// Header and frame on their way.
    frame: Vec<u8>,
    /// Bytes of a frame for the guest, in `frame`, that no buffer was there for.
    waiting: Option<usize>,
}

impl Port {
    fn receive(&mut self, queues: &mut Queues) {
        let mut used = false;
        // Some rings full at a time; what is left keeps the descriptor readable.
        for _ in 0..1024 {
            let len = match self.waiting.take() {
                Some(len) => len,
                None => {
                    let mut backend = self.backend.lock().unwrap_or_else(PoisonError::into_inner);
                    match backend.recv(&mut self.frame[HEADER..]) {
                        Some(len) => HEADER + len.min(MAX_FRAME),
                        None => break,
                    }
                }
            };
            // All zeroes but the number of buffers, which is one.
            self.frame[..HEADER].fill(0);
            self.frame[HEADER - 2] = 1;
            let bytes = &self.frame[..len];
            let served = queues.serve_one(RX, |memory, chain| {
                let fits = |b: &Buffers<'_>| b.writable.len() >= bytes.len();
                match Buffers::new(memory, chain).filter(fits) {
                    Some(buffers) => buffers.writable.write(bytes) as u32,
                    // Too small a buffer loses the frame.
                    None => 0,
                }
            });
            if !served {
                self.waiting = Some(len);
                break;
            }
            used = true;
        }
        if used {
            queues.notify(RX);
        }
    }

    fn transmit(&mut self, queues: &mut Queues) {
        let mut backend = self.backend.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = vec![0; HEADER + MAX_FRAME];
        queues.serve_all(TX, |memory, chain| {
            if let Some(buffers) = Buffers::new(memory, chain)
                && buffers.readable.len() <= buffer.len()
            {
                let len = buffers.readable.read(&mut buffer);
                if let Some(frame) = buffer[..len].get(HEADER..)
                    && !frame.is_empty()
                {
                    backend.send(frame);
                }
            }
            0
        });
    }
}

impl Handler for Port {
    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn queue(&mut self, index: usize, queues: &mut Queues, _: &Quit) {
        if index == TX {
            self.transmit(queues);
        }
        // Sending often brings an answer at once; and RX buffers may be what was missing.
        self.receive(queues);
    }

    fn sources(&self, _: &Queues) -> Vec<RawFd> {
        // While a frame waits for a buffer, the host's end has to wait, too.
        if self.waiting.is_some() {
            return Vec::new();
        }
        vec![
            self.backend
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .event_fd(),
        ]
    }

    fn source(&mut self, _: RawFd, queues: &mut Queues, _: &Quit) {
        self.receive(queues);
    }
}
