//! The dirty ring of a vCPU (KVM_CAP_DIRTY_LOG_RING): the pages it has made dirty, one after the other, in
//! memory that user space maps.
//!
//! The memslot's bitmap says which pages are in some ring already; a page enters one when its bit is set.
//! KVM_RESET_DIRTY_RINGS takes back the entries that user space has marked as harvested, clears their bits,
//! and makes the next write to each of those pages count again.
//!
//! Guest code makes more pages dirty between two looks at the ring. For that the ring keeps some entries
//! back; what does not fit even there waits in a list of the vCPU's.

use crate::shared_memory::{SharedMemory, Window};
use crate::sync::Mutex;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};
use kvm_abi::{Errno, dirty_gfn, kvm_dirty_gfn};
use zerocopy::{FromBytes, IntoBytes};

/// Most entries (KVM_DIRTY_RING_MAX_ENTRIES).
pub const MAX_ENTRIES: u32 = 65536;
/// Entries that are kept back (KVM_DIRTY_RING_RSVD_ENTRIES): the ring counts as full without them.
pub const RESERVED: u32 = 64;

const ENTRY: usize = size_of::<kvm_dirty_gfn>();

/// Checks the size in bytes that KVM_ENABLE_CAP gives.
///
/// # Errors
/// EINVAL, E2BIG.
pub fn check_size(bytes: u64) -> Result<u32, Errno> {
    if !bytes.is_power_of_two() || bytes < 4096 || bytes < u64::from(RESERVED) * ENTRY as u64 {
        return Err(Errno::EINVAL);
    }
    if bytes > u64::from(MAX_ENTRIES) * ENTRY as u64 {
        return Err(Errno::E2BIG);
    }
    Ok(bytes as u32)
}

/// A page in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirtyPage {
    /// The slot, its address space in bits 31:16.
    pub slot: u32,
    /// The page within the slot.
    pub page: u64,
}

/// One vCPU's ring. The vCPU's thread fills it; whoever resets the VM's rings takes back.
pub(crate) struct DirtyRing {
    memory: Window,
    entries: u32,
    /// How many entries were ever put in, and how many taken back.
    put: AtomicU32,
    taken: AtomicU32,
    waiting: Mutex<Vec<DirtyPage>>,
}

impl DirtyRing {
    /// A ring of `bytes` bytes, which [`check_size`] allows.
    ///
    /// # Errors
    /// EINVAL when `memory` is smaller.
    pub fn new(memory: Arc<dyn SharedMemory>, bytes: u32) -> Result<Self, Errno> {
        Ok(DirtyRing {
            memory: Window::new(memory, bytes as usize)?,
            entries: bytes / ENTRY as u32,
            put: AtomicU32::new(0),
            taken: AtomicU32::new(0),
            waiting: Mutex::new(Vec::new()),
        })
    }

    fn used(&self) -> u32 {
        self.put
            .load(Ordering::Acquire)
            .wrapping_sub(self.taken.load(Ordering::Acquire))
    }

    /// Guest code must not go on before user space has harvested.
    pub fn is_full(&self) -> bool {
        self.used() >= self.entries - RESERVED
    }

    fn offset(&self, index: u32) -> usize {
        (index & (self.entries - 1)) as usize * ENTRY
    }

    /// Puts a page in. `true`: the ring has become full, the vCPU must leave guest code.
    pub fn push(&self, page: DirtyPage) -> bool {
        if self.used() >= self.entries {
            let mut waiting = self.waiting.lock();
            if waiting.try_reserve(1).is_ok() {
                waiting.push(page);
            } else {
                log::error!("out of memory: a dirty page is lost");
            }
            return true;
        }
        self.put_entry(page);
        self.is_full()
    }

    fn put_entry(&self, page: DirtyPage) {
        let index = self.put.load(Ordering::Relaxed);
        let at = self.offset(index);
        let entry = kvm_dirty_gfn {
            flags: 0,
            slot: page.slot,
            offset: page.page,
        };
        self.memory.write(at + 4, &entry.as_bytes()[4..]);
        self.memory.store(at, dirty_gfn::DIRTY);
        self.put.store(index.wrapping_add(1), Ordering::Release);
    }

    /// Puts in what did not fit before. By the vCPU's thread, before it enters guest code.
    pub fn drain(&self) {
        let mut waiting = self.waiting.lock();
        let room = (self.entries - self.used()) as usize;
        let fits = room.min(waiting.len());
        for page in waiting.drain(..fits) {
            self.put_entry(page);
        }
    }

    /// Takes back the harvested entries, oldest first, and gives them to `reset`; how many. One caller at a
    /// time.
    pub fn take_back(&self, mut reset: impl FnMut(DirtyPage)) -> u32 {
        let mut count = 0;
        // As many as there are: user space could go on marking entries for ever.
        for _ in 0..self.used() {
            let index = self.taken.load(Ordering::Relaxed);
            let at = self.offset(index);
            if self.memory.load(at) & dirty_gfn::RESET == 0 {
                break;
            }
            let mut bytes = [0; ENTRY];
            self.memory.read(at, &mut bytes);
            self.memory.store(at, 0);
            self.taken.store(index.wrapping_add(1), Ordering::Release);
            count += 1;
            if let Ok(entry) = kvm_dirty_gfn::read_from_bytes(&bytes) {
                reset(DirtyPage {
                    slot: entry.slot,
                    page: entry.offset,
                });
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared_memory::tests::Pages;

    fn ring() -> (DirtyRing, Window) {
        let pages = Pages::new(1);
        (DirtyRing::new(pages.clone(), 4096).unwrap(), pages.window())
    }
    fn page(page: u64) -> DirtyPage {
        DirtyPage { slot: 3, page }
    }

    #[test]
    fn sizes() {
        assert_eq!(check_size(4096), Ok(4096));
        assert_eq!(check_size(1 << 20), Ok(1 << 20));
        for bad in [0, 2048, 4097, 12288] {
            assert_eq!(check_size(bad), Err(Errno::EINVAL), "{bad}");
        }
        assert_eq!(check_size(1 << 21), Err(Errno::E2BIG));
        assert_eq!(check_size(1 << 63), Err(Errno::E2BIG));
    }

    #[test]
    fn entries_come_and_go_in_order() {
        let (ring, user) = ring();
        assert!(!ring.push(page(7)));
        assert!(!ring.push(page(9)));
        assert_eq!((user.load(0), user.load(4), user.load(8)), (1, 3, 7));
        assert_eq!(user.load(16), 1);
        assert_eq!(ring.take_back(|_| panic!("not harvested")), 0);
        // The second before the first: nothing may be taken.
        user.store(16, 3);
        assert_eq!(ring.take_back(|_| panic!("not harvested")), 0);
        user.store(0, 3);
        let mut taken = Vec::new();
        assert_eq!(ring.take_back(|p| taken.push(p)), 2);
        assert_eq!(taken, [page(7), page(9)]);
        assert_eq!((user.load(0), user.load(16)), (0, 0));
    }

    #[test]
    fn full_but_for_the_reserve_and_then_some() {
        let (ring, user) = ring();
        for i in 0..191 {
            assert!(!ring.push(page(i)), "{i}");
        }
        assert!(ring.push(page(191)) && ring.is_full());
        for i in 192..300 {
            assert!(ring.push(page(i)));
        }
        for i in 0..256 {
            user.store(i * 16, 3);
        }
        let mut taken = Vec::new();
        assert_eq!(ring.take_back(|p| taken.push(p.page)), 256);
        assert!(!ring.is_full());
        ring.drain();
        for i in 0..44 {
            assert_eq!(user.load(i * 16), 1);
            user.store(i * 16, 3);
        }
        assert_eq!(ring.take_back(|p| taken.push(p.page)), 44);
        assert_eq!(taken, (0..300).collect::<Vec<_>>());
    }

    #[test]
    fn user_space_cannot_make_more_of_it() {
        let (ring, user) = ring();
        ring.push(page(1));
        for i in 0..256 {
            user.store(i * 16, 3);
        }
        assert_eq!(ring.take_back(|_| {}), 1);
        assert_eq!(ring.take_back(|_| {}), 0);
        assert!(!ring.is_full());
    }
}
