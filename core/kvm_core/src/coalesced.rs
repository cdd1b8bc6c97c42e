//! Coalesced MMIO and PIO: guest writes that user space need not see at once.
//!
//! A write inside of a registered zone goes to a ring that all vCPU mappings of the VM show
//! (`kvm_coalesced_mmio_ring`), and the vCPU goes on. User space empties the ring when it next has a
//! reason to look. With no room left, or a ring that user space has made nonsense of, the write is an
//! exit as any other; so it is while the VM has no ring yet.

use crate::ioeventfd::Bus;
use crate::shared_memory::{SharedMemory, Window};
use alloc::sync::Arc;
use alloc::vec::Vec;
use kvm_abi::{Errno, kvm_coalesced_mmio, kvm_coalesced_mmio_zone};
use zerocopy::IntoBytes;

/// Bytes of the ring: one page.
pub const RING_SIZE: usize = 4096;
/// KVM_COALESCED_MMIO_MAX: entries of the ring, one of which always stays free.
pub const RING_ENTRIES: u32 = ((RING_SIZE - ENTRIES) / ENTRY) as u32;
/// Most zones of a bus (KVM's NR_IOBUS_DEVS).
const MAX_ZONES: usize = 1000;

const FIRST: usize = 0;
const LAST: usize = 4;
const ENTRIES: usize = 8;
const ENTRY: usize = size_of::<kvm_coalesced_mmio>();

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Zone {
    bus: Bus,
    addr: u64,
    size: u32,
}

impl Zone {
    fn from_abi(zone: &kvm_coalesced_mmio_zone) -> Result<Self, Errno> {
        let bus = match zone.pio {
            0 => Bus::Mmio,
            1 => Bus::Pio,
            _ => return Err(Errno::EINVAL),
        };
        Ok(Zone {
            bus,
            addr: zone.addr,
            size: zone.size,
        })
    }

    /// Whether all of `addr..addr + len` is inside.
    fn contains(&self, bus: Bus, addr: u64, len: u64) -> bool {
        let Some(offset) = addr.checked_sub(self.addr) else {
            return false;
        };
        self.bus == bus
            && addr.checked_add(len).is_some()
            && offset
                .checked_add(len)
                .is_some_and(|end| end <= u64::from(self.size))
    }
}

/// The zones of a VM and its ring.
#[derive(Default)]
pub(crate) struct Coalesced {
    ring: Option<Window>,
    zones: Vec<Zone>,
}

impl Coalesced {
    /// Gives the VM its ring.
    ///
    /// # Errors
    /// EEXIST when it has one, EINVAL when it is not [`RING_SIZE`] bytes long.
    pub fn set_ring(&mut self, memory: Arc<dyn SharedMemory>) -> Result<(), Errno> {
        if self.ring.is_some() {
            return Err(Errno::EEXIST);
        }
        self.ring = Some(Window::new(memory, RING_SIZE)?);
        Ok(())
    }

    /// KVM_REGISTER_COALESCED_MMIO.
    ///
    /// # Errors
    /// EINVAL, ENOSPC, ENOMEM.
    pub fn register(&mut self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        let zone = Zone::from_abi(zone)?;
        if self.zones.iter().filter(|z| z.bus == zone.bus).count() >= MAX_ZONES {
            return Err(Errno::ENOSPC);
        }
        self.zones.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
        self.zones.push(zone);
        Ok(())
    }

    /// KVM_UNREGISTER_COALESCED_MMIO: every zone that holds all of `zone` is gone.
    ///
    /// # Errors
    /// EINVAL.
    pub fn unregister(&mut self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        let gone = Zone::from_abi(zone)?;
        self.zones
            .retain(|z| !z.contains(gone.bus, gone.addr, u64::from(gone.size)));
        Ok(())
    }

    /// Puts a write of at most 8 bytes into the ring. `false`: user space must see it now.
    pub fn write(&self, bus: Bus, addr: u64, data: &[u8]) -> bool {
        let Some(ring) = &self.ring else {
            return false;
        };
        if data.len() > 8
            || !self
                .zones
                .iter()
                .any(|z| z.contains(bus, addr, data.len() as u64))
        {
            return false;
        }
        let last = ring.load(LAST);
        if last >= RING_ENTRIES {
            return false;
        }
        let next = (last + 1) % RING_ENTRIES;
        if next == ring.load(FIRST) {
            return false;
        }
        let mut entry = kvm_coalesced_mmio {
            phys_addr: addr,
            len: data.len() as u32,
            pio: u32::from(bus == Bus::Pio),
            ..Default::default()
        };
        entry.data[..data.len()].copy_from_slice(data);
        ring.write(ENTRIES + last as usize * ENTRY, entry.as_bytes());
        ring.store(LAST, next);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared_memory::tests::Pages;
    use zerocopy::FromBytes;

    fn zone(addr: u64, size: u32, pio: u32) -> kvm_coalesced_mmio_zone {
        kvm_coalesced_mmio_zone { addr, size, pio }
    }

    fn with_zone() -> (Coalesced, Arc<Pages>) {
        let pages = Pages::new(1);
        let mut c = Coalesced::default();
        c.set_ring(pages.clone()).unwrap();
        c.register(&zone(0x1000, 0x10, 0)).unwrap();
        (c, pages)
    }

    #[test]
    fn geometry_is_the_kernels() {
        assert_eq!((ENTRY, RING_ENTRIES), (24, 170));
    }

    #[test]
    fn writes_in_order_until_full() {
        let (c, pages) = with_zone();
        let user = pages.window();
        for i in 0..RING_ENTRIES - 1 {
            assert!(c.write(Bus::Mmio, 0x1004, &i.to_le_bytes()), "{i}");
        }
        assert!(!c.write(Bus::Mmio, 0x1004, &[1]), "one entry stays free");
        assert_eq!(user.load(LAST), 169);
        let mut bytes = [0; 24];
        user.read(ENTRIES + 7 * ENTRY, &mut bytes);
        let entry = kvm_coalesced_mmio::read_from_bytes(&bytes).unwrap();
        assert_eq!((entry.phys_addr, entry.len, entry.pio), (0x1004, 4, 0));
        assert_eq!(entry.data, [7, 0, 0, 0, 0, 0, 0, 0]);
        user.store(FIRST, 3);
        assert!(c.write(Bus::Mmio, 0x1004, &[1]));
        assert_eq!(user.load(LAST), 0);
    }

    #[test]
    fn only_what_lies_inside() {
        let (mut c, _pages) = with_zone();
        assert!(c.write(Bus::Mmio, 0x100f, &[1]));
        assert!(!c.write(Bus::Mmio, 0x100f, &[1, 2]));
        assert!(!c.write(Bus::Mmio, 0xfff, &[1]));
        assert!(!c.write(Bus::Pio, 0x1000, &[1]));
        c.register(&zone(0x80, 1, 1)).unwrap();
        assert!(c.write(Bus::Pio, 0x80, &[1]));
        c.register(&zone(u64::MAX - 3, 8, 0)).unwrap();
        assert!(!c.write(Bus::Mmio, u64::MAX - 3, &[0; 8]), "wraps");
    }

    #[test]
    fn registration() {
        let mut c = Coalesced::default();
        c.register(&zone(0, 1, 0)).unwrap();
        assert!(!c.write(Bus::Mmio, 0, &[1]), "no ring yet");
        let pages = Pages::new(1);
        c.set_ring(pages.clone()).unwrap();
        assert!(c.write(Bus::Mmio, 0, &[1]));
        let (mut c, _pages) = with_zone();
        assert_eq!(c.set_ring(Pages::new(1)), Err(Errno::EEXIST));
        assert_eq!(c.register(&zone(0, 1, 2)), Err(Errno::EINVAL));
        assert_eq!(c.unregister(&zone(0, 1, 2)), Err(Errno::EINVAL));
        // Larger than the zone, or on the other bus: stays.
        c.unregister(&zone(0x1000, 0x20, 0)).unwrap();
        c.unregister(&zone(0x1000, 0x10, 1)).unwrap();
        assert!(c.write(Bus::Mmio, 0x1000, &[1]));
        c.unregister(&zone(0x1004, 4, 0)).unwrap();
        assert!(!c.write(Bus::Mmio, 0x1000, &[1]));
        for i in 0..MAX_ZONES as u64 {
            c.register(&zone(i, 1, 1)).unwrap();
        }
        assert_eq!(c.register(&zone(0, 1, 1)), Err(Errno::ENOSPC));
        c.register(&zone(0, 1, 0)).unwrap();
    }

    #[test]
    fn a_ring_made_nonsense_of_is_full() {
        let (c, pages) = with_zone();
        let user = pages.window();
        for last in [RING_ENTRIES, u32::MAX, 1 << 31] {
            for first in [0, 1, RING_ENTRIES, u32::MAX] {
                user.store(FIRST, first);
                user.store(LAST, last);
                assert!(!c.write(Bus::Mmio, 0x1000, &[1]));
            }
        }
        user.store(LAST, 5);
        user.store(FIRST, u32::MAX);
        c.write(Bus::Mmio, 0x1000, &[1]);
    }
}
