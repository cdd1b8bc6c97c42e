//! Entropy device: random bytes from the host.

use std::io;

use super::worker::{Handler, Quit, Worker};
use super::{Activation, Queues, RING_FEATURES, VirtioDevice, guest_io::Buffers};
use crate::entropy;

/// Most bytes per request; drivers ask for far less.
const MAX_REQUEST: usize = 64 << 10;

/// The device.
pub struct Rng(Worker<Source>);

impl Default for Rng {
    fn default() -> Self {
        Self(Worker::new(Source))
    }
}

struct Source;

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        4
    }

    fn pci_class(&self) -> u32 {
        0x00_ff00
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.0.start(activation)
    }

    fn reset(&mut self) {
        self.0.stop();
    }
}

impl Handler for Source {
    fn name(&self) -> &'static str {
        "virtio-rng"
    }

    fn queue(&mut self, index: usize, queues: &mut Queues, _: &Quit) {
        queues.serve_all(index, |memory, chain| {
            let Some(buffers) = Buffers::new(memory, chain) else {
                return 0;
            };
            let mut bytes = vec![0; buffers.writable.len().min(MAX_REQUEST)];
            match entropy::fill(&mut bytes) {
                Ok(()) => buffers.writable.write(&bytes) as u32,
                Err(e) => {
                    log::warn!("host entropy: {e}");
                    0
                }
            }
        });
    }
}
