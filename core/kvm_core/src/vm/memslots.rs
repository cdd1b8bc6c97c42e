//! A VM's memslots, and which of their pages are dirty: logs and rings.

use super::Vm;
use crate::dirty_ring;
use crate::engine::Engine;
use crate::memory::Memory;
use crate::stats::VmCounter;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use guestmem::{Change, MemView, PAGE_SIZE, Region, RegionError};
use kvm_abi::Errno;

/// Fewest pages for KVM_SET_NR_MMU_PAGES (KVM_MIN_ALLOC_MMU_PAGES).
const MIN_MMU_PAGES: u32 = 64;

impl Vm {
    /// The address space that a slot number names in its upper half: 0, or 1 for SMM.
    ///
    /// # Errors
    /// EINVAL for any other.
    fn space(&self, slot: u32) -> Result<&Memory, Errno> {
        match slot >> 16 {
            0 => Ok(&self.memory),
            1 => Ok(&self.smram),
            _ => Err(Errno::EINVAL),
        }
    }

    /// KVM_SET_USER_MEMORY_REGION. The memory of the region must stay mapped until the slot is deleted
    /// or the VM is gone; see `home_user` for who promises that.
    ///
    /// # Errors
    /// EINVAL, EEXIST, ENOMEM.
    pub fn set_memory_region(&self, region: &Region) -> Result<(), Errno> {
        let _serial = self.slots.lock();
        let all_set = self.dirty_log_all_set.load(Ordering::Relaxed);
        let space = self.space(region.slot)?;
        let (view, change) = space
            .view()
            .with_region(region, self.max_gpa, all_set)
            .map_err(|e| match e {
                RegionError::Invalid => Errno::EINVAL,
                RegionError::Overlap => Errno::EEXIST,
                RegionError::OutOfMemory => Errno::ENOMEM,
            })?;
        if change != Change::None {
            space.replace(view);
            self.drop_pointers(|engine| engine.memory_changed());
        }
        Ok(())
    }

    /// The memslots now, but for those that only vCPUs in SMM have.
    pub fn memory_view(&self) -> Arc<MemView> {
        self.memory.view()
    }

    /// The memslots now of the address space that `slot` is in.
    ///
    /// # Errors
    /// EINVAL for an address space that there is not.
    pub fn memory_view_of(&self, slot: u32) -> Result<Arc<MemView>, Errno> {
        Ok(self.space(slot)?.view())
    }

    /// Makes the vCPUs drop host pointers.
    fn drop_pointers(&self, how: impl FnOnce(&dyn Engine)) {
        self.stats.count(VmCounter::RemoteTlbFlushRequests);
        how(&*self.engine);
        self.stats.count(VmCounter::RemoteTlbFlush);
    }

    /// Pages that are dirty are in logs, not in rings, and a slot can have such a number.
    fn check_dirty_log(&self, slot: u32) -> Result<(), Errno> {
        if self.dirty_ring_bytes() != 0 {
            return Err(Errno::ENXIO);
        }
        if slot & 0xffff >= guestmem::MAX_SLOTS {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// KVM_GET_DIRTY_LOG: one bit per page of the slot.
    ///
    /// # Errors
    /// ENXIO with dirty rings, EINVAL for a number that no slot can have, ENOENT when the slot does not exist
    /// or is not logged, ENOMEM.
    pub fn get_dirty_log(&self, slot: u32) -> Result<Vec<u64>, Errno> {
        self.check_dirty_log(slot)?;
        let _serial = self.slots.lock();
        let view = self.memory_view_of(slot)?;
        let slot = view.slot(slot).ok_or(Errno::ENOENT)?;
        let log = slot.dirty.as_ref().ok_or(Errno::ENOENT)?;
        let clear = !self.manual_dirty_log.load(Ordering::Relaxed);
        let mut bitmap = Vec::new();
        if !log.fetch(&mut bitmap, clear) {
            return Err(Errno::ENOMEM);
        }
        if clear && bitmap.iter().any(|&w| w != 0) {
            self.drop_pointers(|engine| engine.write_protect(slot.gpa, slot.size));
        }
        Ok(bitmap)
    }

    /// KVM_CLEAR_DIRTY_LOG: clears the bits set in `bitmap` for `pages` pages from `first_page` on.
    ///
    /// # Errors
    /// ENXIO with dirty rings, EINVAL, ENOENT.
    pub fn clear_dirty_log(
        &self,
        slot: u32,
        first_page: u64,
        pages: u64,
        bitmap: &[u64],
    ) -> Result<(), Errno> {
        self.check_dirty_log(slot)?;
        if !first_page.is_multiple_of(64) {
            return Err(Errno::EINVAL);
        }
        let _serial = self.slots.lock();
        let view = self.memory_view_of(slot)?;
        let slot = view.slot(slot).ok_or(Errno::ENOENT)?;
        let log = slot.dirty.as_ref().ok_or(Errno::ENOENT)?;
        let end = first_page.checked_add(pages).ok_or(Errno::EINVAL)?;
        if end > log.pages() || (!pages.is_multiple_of(64) && end < log.pages()) {
            return Err(Errno::EINVAL);
        }
        if log.clear(first_page, pages, bitmap) {
            let (gpa, len) = (slot.gpa + first_page * PAGE_SIZE, pages * PAGE_SIZE);
            self.drop_pointers(|engine| engine.write_protect(gpa, len));
        }
        Ok(())
    }

    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: bit 0 makes KVM_GET_DIRTY_LOG leave the bits alone, bit 1
    /// starts logs all dirty.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_manual_dirty_log(&self, flags: u64) -> Result<(), Errno> {
        if flags & !3 != 0 || flags == 2 {
            return Err(Errno::EINVAL);
        }
        self.manual_dirty_log
            .store(flags & 1 != 0, Ordering::Relaxed);
        self.dirty_log_all_set
            .store(flags & 2 != 0, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_ENABLE_CAP of KVM_CAP_DIRTY_LOG_RING: each vCPU made from now on has a ring of `bytes` bytes
    /// instead of the slots' dirty logs.
    ///
    /// # Errors
    /// EINVAL for a bad size, a second time, or when there are vCPUs already; E2BIG.
    pub fn enable_dirty_ring(&self, bytes: u64) -> Result<(), Errno> {
        let bytes = dirty_ring::check_size(bytes)?;
        let _creation = self.creation.lock();
        if self.dirty_ring_bytes() != 0 || !self.vcpus().is_empty() {
            return Err(Errno::EINVAL);
        }
        self.dirty_ring_bytes.store(bytes, Ordering::Release);
        Ok(())
    }

    /// Bytes of each vCPU's dirty ring; 0 when the VM has none.
    pub fn dirty_ring_bytes(&self) -> u32 {
        self.dirty_ring_bytes.load(Ordering::Acquire)
    }

    /// KVM_RESET_DIRTY_RINGS: takes back what user space has harvested; how many entries.
    ///
    /// # Errors
    /// EINVAL without dirty rings.
    pub fn reset_dirty_rings(&self) -> Result<u32, Errno> {
        if self.dirty_ring_bytes() == 0 {
            return Err(Errno::EINVAL);
        }
        let _serial = self.slots.lock();
        let (view, smram) = (self.memory.view(), self.smram.view());
        // Slots that had an entry, with the first and the last page.
        let mut spans: Vec<(u32, u64, u64)> = Vec::new();
        let mut count: u32 = 0;
        for vcpu in self.vcpus().iter() {
            let Some(ring) = vcpu.dirty_ring() else {
                continue;
            };
            let taken = ring.take_back(|entry| {
                let view = if entry.slot >> 16 == 0 { &view } else { &smram };
                let Some(slot) = view.slot(entry.slot) else {
                    return;
                };
                if !slot
                    .dirty
                    .as_ref()
                    .is_some_and(|log| log.unmark(entry.page))
                {
                    return;
                }
                if let Some(span) = spans.iter_mut().rev().find(|span| span.0 == entry.slot) {
                    span.1 = span.1.min(entry.page);
                    span.2 = span.2.max(entry.page);
                } else if spans.try_reserve(1).is_ok() {
                    spans.push((entry.slot, entry.page, entry.page));
                } else {
                    let gpa = slot.gpa + entry.page * PAGE_SIZE;
                    self.drop_pointers(|engine| engine.write_protect(gpa, PAGE_SIZE));
                }
            });
            count = count.saturating_add(taken);
        }
        for (id, first, last) in spans {
            let view = if id >> 16 == 0 { &view } else { &smram };
            if let Some(slot) = view.slot(id) {
                let (gpa, len) = (slot.gpa + first * PAGE_SIZE, (last - first + 1) * PAGE_SIZE);
                self.drop_pointers(|engine| engine.write_protect(gpa, len));
            }
        }
        Ok(count)
    }

    /// KVM_SET_NR_MMU_PAGES: how much shadow paging may take. Nothing here is limited by it.
    ///
    /// # Errors
    /// EINVAL for fewer than 64.
    pub fn set_mmu_pages(&self, pages: u64) -> Result<(), Errno> {
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        if pages < MIN_MMU_PAGES {
            return Err(Errno::EINVAL);
        }
        self.mmu_pages.store(pages, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_GET_NR_MMU_PAGES.
    pub fn mmu_pages(&self) -> u32 {
        self.mmu_pages.load(Ordering::Relaxed)
    }
}
