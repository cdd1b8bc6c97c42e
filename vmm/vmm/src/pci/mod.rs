//! The PCI bus: one root bus with the host bridge at 00.0, reached through ports 0xcf8 and
//! 0xcfc and through ECAM. See "PCI Local Bus Specification" and the PCI Express
//! "Enhanced Configuration Access Mechanism".

pub mod config;
pub mod intx;
pub mod msix;

use std::sync::{Arc, Mutex, PoisonError};

use crate::layout::{ECAM_BASE, ECAM_SIZE, PCI_HOLE_START, PCI_WINDOW32_SIZE};
use config::{Bar, ConfigSpace};

/// Device numbers on the bus.
pub const SLOTS: usize = 32;
/// The configuration address register; data follow at +4.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const CONFIG_ENABLE: u32 = 1 << 31;

/// A single-function device on the bus.
pub trait PciDevice: Send {
    /// The device's configuration header.
    fn config(&self) -> &ConfigSpace;
    /// The guest reads configuration space; within the first 256 bytes, not across a dword.
    fn config_read(&mut self, offset: usize, data: &mut [u8]);
    /// The guest writes configuration space, within the same bounds.
    fn config_write(&mut self, offset: usize, data: &[u8]);
    /// The guest reads memory behind the device's BAR number `bar`.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]);
    /// The guest writes memory behind the device's BAR number `bar`.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]);
    /// Stops the device's threads, for the end of the machine.
    fn shutdown(&mut self);
}

/// No place is left on the bus or in its window.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All device numbers are taken.
    #[error("too many devices: the PCI bus has {} slots", SLOTS - 1)]
    NoSlot,
    /// The 32-bit window is full.
    #[error("too many devices: the PCI memory window is full")]
    NoWindow,
}

/// The root bus.
pub struct PciBus {
    inner: Mutex<Inner>,
}

struct Inner {
    address: u32,
    devices: Vec<Box<dyn PciDevice>>,
    next_bar: u64,
}

impl Default for PciBus {
    fn default() -> Self {
        let bridge: Box<dyn PciDevice> = Box::new(HostBridge(ConfigSpace::host_bridge()));
        Self {
            inner: Mutex::new(Inner {
                address: 0,
                devices: vec![bridge],
                next_bar: PCI_HOLE_START,
            }),
        }
    }
}

/// Where a device will be, before it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Device number.
    pub slot: u8,
    /// Guest-physical address of the device's memory BAR.
    pub bar: u64,
}

impl PciBus {
    /// Reserves the next device number and `bar_size` bytes (a power of two) of the window.
    ///
    /// # Errors
    /// When the bus or the window is full.
    pub fn place(&self, bar_size: u64) -> Result<Placement, Error> {
        let mut inner = self.lock();
        if inner.devices.len() >= SLOTS {
            return Err(Error::NoSlot);
        }
        let bar = inner.next_bar.next_multiple_of(bar_size);
        let end = bar.saturating_add(bar_size);
        if end > PCI_HOLE_START + PCI_WINDOW32_SIZE {
            return Err(Error::NoWindow);
        }
        inner.next_bar = end;
        Ok(Placement {
            slot: inner.devices.len() as u8,
            bar,
        })
    }

    /// Plugs the device for which [`PciBus::place`] gave the last placement.
    pub fn plug(&self, device: Box<dyn PciDevice>) {
        self.lock().devices.push(device);
    }

    /// Stops all devices' threads.
    pub fn shutdown(&self) {
        for device in &mut self.lock().devices {
            device.shutdown();
        }
    }

    /// The guest reads a port from 0xcf8 to 0xcff.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let mut inner = self.lock();
        data.fill(0xff);
        if port == CONFIG_ADDRESS && data.len() == 4 {
            data.copy_from_slice(&inner.address.to_le_bytes());
        } else if let Some((slot, offset)) = inner.selected(port, data.len()) {
            inner.config_read(slot, offset, data);
        }
    }

    /// The guest writes a port from 0xcf8 to 0xcff.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        let mut inner = self.lock();
        if port == CONFIG_ADDRESS {
            if let Ok(bytes) = data.try_into() {
                inner.address = u32::from_le_bytes(bytes);
            }
        } else if let Some((slot, offset)) = inner.selected(port, data.len()) {
            inner.config_write(slot, offset, data);
        }
    }

    /// The guest loads from memory that is not RAM. False if nothing of PCI is there.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        let mut inner = self.lock();
        if let Some((slot, offset)) = ecam(addr, data.len()) {
            data.fill(0xff);
            inner.config_read(slot, offset, data);
            return true;
        }
        match inner.find_bar(addr, data.len()) {
            Some((device, bar, offset)) => {
                device.bar_read(bar, offset, data);
                true
            }
            None => false,
        }
    }

    /// The guest stores to memory that is not RAM. False if nothing of PCI is there.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        let mut inner = self.lock();
        if let Some((slot, offset)) = ecam(addr, data.len()) {
            inner.config_write(slot, offset, data);
            return true;
        }
        match inner.find_bar(addr, data.len()) {
            Some((device, bar, offset)) => {
                device.bar_write(bar, offset, data);
                true
            }
            None => false,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Slot and register of an ECAM access on bus 0, function 0; others have nobody.
fn ecam(addr: u64, len: usize) -> Option<(usize, usize)> {
    let offset = addr.checked_sub(ECAM_BASE).filter(|&o| o < ECAM_SIZE)?;
    let function = (offset >> 12) & 7;
    let register = (offset & 0xfff) as usize;
    let slot = if function == 0 {
        (offset >> 15) as usize
    } else {
        SLOTS
    };
    // An 8-byte access is not a configuration access; nobody answers.
    Some((if len <= 4 { slot } else { SLOTS }, register))
}

impl Inner {
    /// Slot and register that the address register and a data port select.
    fn selected(&self, port: u16, len: usize) -> Option<(usize, usize)> {
        let byte = usize::from(port.checked_sub(CONFIG_DATA)?);
        if self.address & CONFIG_ENABLE == 0 || byte + len > 4 {
            return None;
        }
        let bus = (self.address >> 16) & 0xff;
        let function = (self.address >> 8) & 7;
        if bus != 0 || function != 0 {
            return None;
        }
        let slot = ((self.address >> 11) & 0x1f) as usize;
        Some((slot, (self.address & 0xfc) as usize + byte))
    }

    fn config_read(&mut self, slot: usize, offset: usize, data: &mut [u8]) {
        let Some(device) = self.devices.get_mut(slot) else {
            return;
        };
        if offset + data.len() <= config::SIZE {
            device.config_read(offset, data);
        } else {
            // No extended capabilities.
            data.fill(0);
        }
    }

    fn config_write(&mut self, slot: usize, offset: usize, data: &[u8]) {
        if let Some(device) = self.devices.get_mut(slot)
            && offset + data.len() <= config::SIZE
            && offset % 4 + data.len() <= 4
        {
            device.config_write(offset, data);
        }
    }

    fn find_bar(&mut self, addr: u64, len: usize) -> Option<(&mut dyn PciDevice, usize, u64)> {
        for device in &mut self.devices {
            if let Some(Bar { index, start, size }) = device.config().enabled_bar()
                && let Some(offset) = addr.checked_sub(start)
                && offset
                    .checked_add(len as u64)
                    .is_some_and(|end| end <= size)
            {
                return Some((device.as_mut(), index, offset));
            }
        }
        None
    }
}

/// Device 00.0, which is there because guests look for it.
struct HostBridge(ConfigSpace);

impl PciDevice for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }

    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn bar_read(&mut self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&mut self, _: usize, _: u64, _: &[u8]) {}

    fn shutdown(&mut self) {}
}

/// A bus that devices and vCPUs share.
pub type SharedBus = Arc<PciBus>;

#[cfg(test)]
mod tests {
    use super::*;

    fn read32(bus: &PciBus, address: u32) -> u32 {
        bus.port_write(CONFIG_ADDRESS, &address.to_le_bytes());
        let mut data = [0; 4];
        bus.port_read(CONFIG_DATA, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_host_bridge_answers_both_ways_and_nobody_else_does() {
        let bus = PciBus::default();
        let id = read32(&bus, CONFIG_ENABLE);
        assert_ne!(id, u32::MAX);
        let mut data = [0; 4];
        assert!(bus.mmio_read(ECAM_BASE, &mut data));
        assert_eq!(u32::from_le_bytes(data), id);
        assert_eq!(read32(&bus, 0), u32::MAX, "configuration access is off");
        assert_eq!(read32(&bus, CONFIG_ENABLE | 1 << 11), u32::MAX);
        assert_eq!(read32(&bus, CONFIG_ENABLE | 1 << 8), u32::MAX);
        assert_eq!(read32(&bus, CONFIG_ENABLE | 1 << 16), u32::MAX);
        assert_eq!(
            read32(&bus, CONFIG_ENABLE | 8) >> 16,
            0x0600,
            "class: host bridge"
        );
        assert!(bus.mmio_read(ECAM_BASE + 0x100, &mut data));
        assert_eq!(data, [0; 4], "no extended capabilities");
        assert!(!bus.mmio_read(ECAM_BASE + ECAM_SIZE, &mut data));
    }

    #[test]
    fn placements_do_not_overlap_and_end() {
        let bus = PciBus::default();
        let mut end = 0;
        for slot in 1..SLOTS {
            let placement = bus.place(0x8000).unwrap();
            assert_eq!(usize::from(placement.slot), slot);
            assert!(placement.bar >= end && placement.bar.is_multiple_of(0x8000));
            end = placement.bar + 0x8000;
            bus.plug(Box::new(HostBridge(ConfigSpace::host_bridge())));
        }
        assert!(matches!(bus.place(0x8000), Err(Error::NoSlot)));
        let bus = PciBus::default();
        assert!(matches!(bus.place(1 << 40), Err(Error::NoWindow)));
    }
}
