//! Who answers a port or an address.

use crate::chipset::Chipset;
use crate::layout::RESET_PORT;
use crate::pci::{CONFIG_ADDRESS, PciBus};

/// The machine's port and memory-mapped I/O space.
pub(super) struct Bus {
    pub chipset: Chipset,
    pub pci: PciBus,
}

impl Bus {
    /// Serves an IN, or an INS with several elements of `size` bytes.
    pub fn port_read(&self, port: u16, size: u8, data: &mut [u8]) {
        for element in data.chunks_mut(usize::from(size.max(1))) {
            if is_pci(port, element.len()) {
                self.pci.port_read(port, element);
            } else {
                self.chipset.read(port, element);
            }
        }
    }

    /// Serves an OUT, or an OUTS with several elements of `size` bytes.
    pub fn port_write(&self, port: u16, size: u8, data: &[u8]) {
        for element in data.chunks(usize::from(size.max(1))) {
            if is_pci(port, element.len()) {
                self.pci.port_write(port, element);
            } else {
                self.chipset.write(port, element);
            }
        }
    }

    /// Serves a load from memory that is not RAM. What nobody answers reads as ones.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        if !self.pci.mmio_read(addr, data) {
            data.fill(0xff);
        }
    }

    /// Serves a store to memory that is not RAM.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.pci.mmio_write(addr, data);
    }
}

/// Whether the PCI host bridge answers; the reset register hides among its ports, for bytes.
fn is_pci(port: u16, len: usize) -> bool {
    (CONFIG_ADDRESS..CONFIG_ADDRESS + 8).contains(&port) && !(port == RESET_PORT && len == 1)
}

#[cfg(test)]
mod tests;
