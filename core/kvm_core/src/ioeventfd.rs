//! ioeventfd: guest writes that only signal an event.

use crate::host::Event;
use alloc::sync::Arc;
use alloc::vec::Vec;
use kvm_abi::Errno;

/// Most ioeventfds of a VM (KVM's NR_IOBUS_DEVS).
const MAX: usize = 1000;

/// Which bus an address is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// I/O ports.
    Pio,
    /// Guest-physical addresses.
    Mmio,
}

/// What a write must look like to match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// The bus.
    pub bus: Bus,
    /// Port or guest-physical address.
    pub addr: u64,
    /// Access size: 1, 2, 4 or 8; 0 for any.
    pub len: u32,
    /// The value, if it matters.
    pub data: Option<u64>,
}

impl Match {
    fn hits(&self, bus: Bus, addr: u64, data: &[u8]) -> bool {
        if self.bus != bus || self.addr != addr {
            return false;
        }
        if self.len != 0 && self.len as usize != data.len() {
            return false;
        }
        match self.data {
            None => true,
            Some(value) => value.to_le_bytes().get(..data.len()) == Some(data),
        }
    }

    fn collides(&self, other: &Match) -> bool {
        self.bus == other.bus
            && self.addr == other.addr
            && (self.len == 0 || other.len == 0 || self.len == other.len)
            && (self.data.is_none() || other.data.is_none() || self.data == other.data)
    }
}

/// The ioeventfds of a VM.
#[derive(Default)]
pub struct IoEvents {
    list: Vec<(Match, Arc<dyn Event>)>,
}

impl IoEvents {
    /// KVM_IOEVENTFD.
    ///
    /// # Errors
    /// EINVAL (length, wrapping address, data match without length), EEXIST, ENOSPC, ENOMEM.
    pub fn register(&mut self, what: Match, event: Arc<dyn Event>) -> Result<(), Errno> {
        if !matches!(what.len, 0 | 1 | 2 | 4 | 8)
            || what.addr.checked_add(u64::from(what.len)).is_none()
            || (what.len == 0 && what.data.is_some())
        {
            return Err(Errno::EINVAL);
        }
        if self.list.iter().any(|(m, _)| m.collides(&what)) {
            return Err(Errno::EEXIST);
        }
        if self.list.len() >= MAX {
            return Err(Errno::ENOSPC);
        }
        self.list.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
        self.list.push((what, event));
        Ok(())
    }

    /// KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN.
    ///
    /// # Errors
    /// ENOENT.
    pub fn unregister(&mut self, what: Match, event_id: u64) -> Result<(), Errno> {
        let index = self
            .list
            .iter()
            .position(|(m, e)| *m == what && e.id() == event_id)
            .ok_or(Errno::ENOENT)?;
        self.list.swap_remove(index);
        Ok(())
    }

    /// The event that a write signals, if any.
    pub fn find(&self, bus: Bus, addr: u64, data: &[u8]) -> Option<&Arc<dyn Event>> {
        self.list
            .iter()
            .find(|(m, _)| m.hits(bus, addr, data))
            .map(|(_, e)| e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Id(u64);
    impl Event for Id {
        fn signal(&self) {}
        fn id(&self) -> u64 {
            self.0
        }
    }
    fn mmio(addr: u64, len: u32, data: Option<u64>) -> Match {
        Match {
            bus: Bus::Mmio,
            addr,
            len,
            data,
        }
    }

    #[test]
    fn matching() {
        let mut t = IoEvents::default();
        t.register(mmio(0x1000, 4, Some(7)), Arc::new(Id(1)))
            .unwrap();
        t.register(mmio(0x1000, 4, Some(8)), Arc::new(Id(2)))
            .unwrap();
        t.register(mmio(0x2000, 0, None), Arc::new(Id(3))).unwrap();
        let id = |addr, data: &[u8]| t.find(Bus::Mmio, addr, data).map(|e| e.id());
        assert_eq!(id(0x1000, &[7, 0, 0, 0]), Some(1));
        assert_eq!(id(0x1000, &[8, 0, 0, 0]), Some(2));
        assert_eq!(id(0x1000, &[9, 0, 0, 0]), None);
        assert_eq!(id(0x1000, &[7, 0]), None);
        assert_eq!(id(0x2000, &[1]), Some(3));
        assert_eq!(id(0x2000, &[1; 8]), Some(3));
        assert!(t.find(Bus::Pio, 0x2000, &[1]).is_none());
    }

    #[test]
    fn registration() {
        let mut t = IoEvents::default();
        let e = || Arc::new(Id(1));
        assert_eq!(t.register(mmio(0, 3, None), e()), Err(Errno::EINVAL));
        assert_eq!(t.register(mmio(u64::MAX, 8, None), e()), Err(Errno::EINVAL));
        assert_eq!(t.register(mmio(0, 0, Some(1)), e()), Err(Errno::EINVAL));
        t.register(mmio(0, 4, None), e()).unwrap();
        assert_eq!(t.register(mmio(0, 4, Some(1)), e()), Err(Errno::EEXIST));
        assert_eq!(t.unregister(mmio(0, 4, None), 2), Err(Errno::ENOENT));
        assert_eq!(t.unregister(mmio(0, 4, None), 1), Ok(()));
    }
}
