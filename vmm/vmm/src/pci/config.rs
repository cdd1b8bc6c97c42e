//! A function's configuration header: registers, which of their bits the guest can write,
//! one 64-bit memory BAR, and a list of capabilities.

/// Bytes of conventional configuration space.
pub const SIZE: usize = 256;

const VENDOR: usize = 0x00;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const COMMAND_INTX_DISABLE: u8 = 1 << 2; // in the second byte
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR_64BIT: u8 = 0b100;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor and device.
    pub id: (u16, u16),
    /// Subsystem vendor and device.
    pub subsystem: (u16, u16),
    /// Class, subclass, programming interface in the low 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// The memory BAR, while the guest has memory decoding on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// BAR number.
    pub index: usize,
    /// Guest-physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// The header.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// Bits that the guest can write.
    writable: [u8; SIZE],
    bar_size: u64,
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A header with no BAR and no capabilities.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        config.put(VENDOR, &identity.id.0.to_le_bytes());
        config.put(VENDOR + 2, &identity.id.1.to_le_bytes());
        config.put(SUBSYSTEM, &identity.subsystem.0.to_le_bytes());
        config.put(SUBSYSTEM + 2, &identity.subsystem.1.to_le_bytes());
        config.put(
            REVISION,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        config.writable[INTERRUPT_LINE] = 0xff;
        config
    }

    /// The header of the host bridge.
    #[must_use]
    pub fn host_bridge() -> Self {
        // Red Hat's generic PCIe host bridge.
        Self::new(Identity {
            id: (0x1b36, 0x0008),
            subsystem: (0x1af4, 0x1100),
            class: 0x06_0000,
            revision: 0,
        })
    }

    /// Adds a 64-bit memory BAR 0 of `size` bytes (a power of two, 16 at least) at `start`.
    #[must_use]
    pub fn with_bar(mut self, start: u64, size: u64) -> Self {
        self.bar_size = size;
        self.put(BAR0, &(start | u64::from(BAR_64BIT)).to_le_bytes());
        let mask = (!(size - 1)).to_le_bytes();
        self.writable[BAR0..BAR0 + 8].copy_from_slice(&mask);
        self.writable[COMMAND] |= COMMAND_MEMORY | COMMAND_BUS_MASTER;
        self
    }

    /// Gives the function pin INTA# and tells the guest's software its `gsi`.
    #[must_use]
    pub fn with_interrupt_pin(mut self, gsi: u8) -> Self {
        self.bytes[INTERRUPT_PIN] = 1;
        self.bytes[INTERRUPT_LINE] = gsi;
        self.writable[COMMAND + 1] |= COMMAND_INTX_DISABLE;
        self
    }

    /// Adds a capability: `id`, then (after the link) `body`. Returns its offset. The space
    /// for capabilities is the caller's to keep.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        debug_assert!(at + 2 + body.len() <= SIZE);
        self.bytes[self.last_link] = at as u8;
        self.bytes[at] = id;
        self.put(at + 2, body);
        self.last_link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        at
    }

    /// Makes bits of the byte at `offset` writable for the guest.
    pub fn set_writable(&mut self, offset: usize, bits: u8) {
        self.writable[offset] |= bits;
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The guest reads. Beyond the header there are ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes; bits that are not writable stay.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (&value, at) in data.iter().zip(offset..) {
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
    }

    /// A byte of the header.
    #[must_use]
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    /// Little-endian dword of the header.
    #[must_use]
    pub fn dword(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The memory BAR, if there is one and the guest has memory decoding on.
    #[must_use]
    pub fn enabled_bar(&self) -> Option<Bar> {
        if self.bar_size == 0 || self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return None;
        }
        let start = u64::from(self.dword(BAR0)) | u64::from(self.dword(BAR0 + 4)) << 32;
        Some(Bar {
            index: 0,
            start: start & !(self.bar_size - 1),
            size: self.bar_size,
        })
    }

    /// Whether the guest lets the function raise INTA#.
    #[must_use]
    pub fn intx_allowed(&self) -> bool {
        self.bytes[COMMAND + 1] & COMMAND_INTX_DISABLE == 0
    }

    /// Shows whether INTA# is raised.
    pub fn set_interrupt_status(&mut self, raised: bool) {
        self.bytes[STATUS] &= !STATUS_INTERRUPT;
        if raised {
            self.bytes[STATUS] |= STATUS_INTERRUPT;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ConfigSpace {
        ConfigSpace::new(Identity {
            id: (0x1af4, 0x1042),
            subsystem: (0x1af4, 2),
            class: 0x01_0000,
            revision: 1,
        })
        .with_bar(0xc000_0000, 0x8000)
        .with_interrupt_pin(17)
    }

    #[test]
    fn identity_reads_back_and_cannot_be_written() {
        let mut config = config();
        config.write(0, &[0; 16]);
        assert_eq!(config.dword(0), 0x1042_1af4);
        assert_eq!(config.dword(8), 0x0100_0001);
        assert_eq!(config.dword(0x2c), 0x0002_1af4);
    }

    #[test]
    fn bars_can_be_sized_moved_and_switched() {
        let mut config = config();
        assert_eq!(config.enabled_bar(), None);
        config.write(COMMAND, &[0xff, 0xff]);
        let at = |start| {
            Some(Bar {
                index: 0,
                start,
                size: 0x8000,
            })
        };
        assert_eq!(config.enabled_bar(), at(0xc000_0000));
        config.write(BAR0, &[0xff; 8]);
        assert_eq!(
            (config.dword(BAR0), config.dword(BAR0 + 4)),
            (0xffff_8004, 0xffff_ffff)
        );
        config.write(BAR0, &0x9_1234_8000u64.to_le_bytes());
        assert_eq!(config.enabled_bar(), at(0x9_1234_8000));
        assert_eq!(config.dword(0x18), 0, "no other BAR");
        assert!(!config.intx_allowed());
    }

    #[test]
    fn capabilities_are_linked() {
        let mut config = config();
        let first = config.add_capability(9, &[1; 14]);
        let second = config.add_capability(0x11, &[2; 10]);
        assert_eq!(config.byte(CAPABILITIES), first as u8);
        assert_eq!(
            (config.byte(first), config.byte(first + 1)),
            (9, second as u8)
        );
        assert_eq!((config.byte(second), config.byte(second + 1)), (0x11, 0));
        assert_ne!(config.byte(STATUS) & STATUS_CAPABILITIES, 0);
    }
}
