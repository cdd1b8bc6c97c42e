//! ioeventfd: guest writes that only signal an event.

use crate::host::Event;
use alloc::sync::Arc;
use alloc::vec::Vec;
use kvm_abi::{Errno, ioeventfd_flag, kvm_ioeventfd};

/// Most ioeventfds of a VM. KVM leaves that to the limit of open files.
const MAX: usize = 1 << 20;

/// Which bus an address is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bus {
    /// I/O ports.
    Pio,
    /// Guest-physical addresses.
    Mmio,
    /// Virtio notifications of s390 (KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY): may be registered as in KVM; no
    /// guest of this architecture gets there.
    Ccw,
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
    /// What a `kvm_ioeventfd` asks for; [`IoEvents::register`] checks the rest.
    ///
    /// # Errors
    /// EINVAL for unknown flags of a registration, and for a value without a size.
    pub fn from_abi(io: &kvm_ioeventfd) -> Result<Self, Errno> {
        let has = |flag: u32| io.flags & flag != 0;
        let assign = !has(ioeventfd_flag::DEASSIGN);
        let datamatch = has(ioeventfd_flag::DATAMATCH);
        if assign && (io.flags & !ioeventfd_flag::VALID != 0 || (io.len == 0 && datamatch)) {
            return Err(Errno::EINVAL);
        }
        let bus = if has(ioeventfd_flag::PIO) {
            Bus::Pio
        } else if has(ioeventfd_flag::VIRTIO_CCW_NOTIFY) {
            Bus::Ccw
        } else {
            Bus::Mmio
        };
        // The guest's data are as wide as its access; bits of the value beyond that can never match.
        let data = datamatch.then_some(io.datamatch);
        Ok(Match {
            bus,
            addr: io.addr,
            len: io.len,
            data,
        })
    }

    fn key(&self) -> (Bus, u64) {
        (self.bus, self.addr)
    }

    fn hits(&self, bus: Bus, addr: u64, data: &[u8]) -> bool {
        if self.bus != bus || self.addr != addr {
            return false;
        }
        if self.len != 0 && self.len as usize != data.len() {
            return false;
        }
        match self.data {
            None => true,
            Some(value) => {
                let mut bytes = [0; 8];
                match bytes.get_mut(..data.len()) {
                    Some(low) => low.copy_from_slice(data),
                    None => return false,
                }
                value == u64::from_le_bytes(bytes)
            }
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
    /// By bus and address.
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
        if self.at(what.bus, what.addr).any(|(m, _)| m.collides(&what)) {
            return Err(Errno::EEXIST);
        }
        if self.list.len() >= MAX {
            return Err(Errno::ENOSPC);
        }
        self.list.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
        let end = self.list.partition_point(|(m, _)| m.key() <= what.key());
        self.list.insert(end, (what, event));
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
        self.list.remove(index);
        Ok(())
    }

    /// The event that a write signals, if any.
    pub fn find(&self, bus: Bus, addr: u64, data: &[u8]) -> Option<&Arc<dyn Event>> {
        self.at(bus, addr)
            .find(|(m, _)| m.hits(bus, addr, data))
            .map(|(_, e)| e)
    }

    /// Those at an address, in the order of their registration.
    fn at(&self, bus: Bus, addr: u64) -> impl Iterator<Item = &(Match, Arc<dyn Event>)> {
        let start = self.list.partition_point(|(m, _)| m.key() < (bus, addr));
        self.list[start..]
            .iter()
            .take_while(move |(m, _)| m.key() == (bus, addr))
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
    fn many_at_once() {
        let mut t = IoEvents::default();
        for i in 0..1500u64 {
            // Not in the order of the addresses, on two buses.
            let mut what = mmio(0x1000 + (i * 7 % 500) * 4, 4, Some(i));
            what.bus = if i % 2 == 0 { Bus::Pio } else { Bus::Mmio };
            t.register(what, Arc::new(Id(i))).unwrap();
        }
        for i in 0..1500u64 {
            let bus = if i % 2 == 0 { Bus::Pio } else { Bus::Mmio };
            let found = t.find(bus, 0x1000 + (i * 7 % 500) * 4, &(i as u32).to_le_bytes());
            assert_eq!(found.map(|e| e.id()), Some(i));
        }
    }

    #[test]
    fn from_user_space() {
        let io = |len, flags| kvm_ioeventfd {
            datamatch: 7,
            addr: 0x70,
            len,
            flags,
            ..Default::default()
        };
        let of = |len, flags| Match::from_abi(&io(len, flags));
        assert_eq!(of(4, 0), Ok(mmio(0x70, 4, None)));
        assert_eq!(of(4, 1), Ok(mmio(0x70, 4, Some(7))));
        assert_eq!(of(2, 2).map(|m| m.bus), Ok(Bus::Pio));
        assert_eq!(of(2, 8).map(|m| m.bus), Ok(Bus::Ccw));
        assert_eq!(of(0, 1), Err(Errno::EINVAL));
        assert_eq!(of(4, 16), Err(Errno::EINVAL));
        // KVM_IOEVENTFD_FLAG_DEASSIGN looks for what is there, whatever else is said.
        assert_eq!(of(4, 4 | 16), Ok(mmio(0x70, 4, None)));
    }

    #[test]
    fn values_wider_than_the_access_never_match() {
        let mut t = IoEvents::default();
        t.register(mmio(0, 1, Some(0x107)), Arc::new(Id(1)))
            .unwrap();
        assert!(t.find(Bus::Mmio, 0, &[7]).is_none());
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
