//! Who answers a port or an address.

use crate::chipset::Chipset;

/// The machine's port and memory-mapped I/O space.
pub(super) struct Bus {
    pub chipset: Chipset,
}

impl Bus {
    /// Serves an IN, or an INS with several elements of `size` bytes.
    pub fn port_read(&self, port: u16, size: u8, data: &mut [u8]) {
        for element in data.chunks_mut(usize::from(size.max(1))) {
            self.chipset.read(port, element);
        }
    }

    /// Serves an OUT, or an OUTS with several elements of `size` bytes.
    pub fn port_write(&self, port: u16, size: u8, data: &[u8]) {
        for element in data.chunks(usize::from(size.max(1))) {
            self.chipset.write(port, element);
        }
    }

    /// Serves a load from memory that is not RAM.
    pub fn mmio_read(&self, _addr: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// Serves a store to memory that is not RAM.
    pub fn mmio_write(&self, _addr: u64, _data: &[u8]) {}
}
