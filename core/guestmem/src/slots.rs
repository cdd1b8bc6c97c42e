//! Memslots and the rules of KVM_SET_USER_MEMORY_REGION.

use crate::{DirtyLog, PAGE_SIZE};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Bits of `kvm_userspace_memory_region::flags`.
pub mod flags {
    /// KVM_MEM_LOG_DIRTY_PAGES
    pub const LOG_DIRTY_PAGES: u32 = 1;
    /// KVM_MEM_READONLY
    pub const READONLY: u32 = 2;
}

/// Highest slot number plus one, as KVM_CAP_NR_MEMSLOTS reports it. The upper half of a number is the address
/// space, which whoever has several of these views minds.
pub const MAX_SLOTS: u32 = 32764;
const MAX_PAGES: u64 = (1 << 31) - 1;
/// User-space addresses end here on x86-64 with four-level paging.
const USER_END: u64 = (1 << 47) - PAGE_SIZE;

/// One memslot.
#[derive(Clone, Debug)]
pub struct MemSlot {
    /// Slot number.
    pub id: u32,
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes, a multiple of 4096, never 0.
    pub size: u64,
    /// Host address of the first byte.
    pub hva: u64,
    /// Bits of [`flags`].
    pub flags: u32,
    /// The dirty bitmap, when logging is on.
    pub dirty: Option<Arc<DirtyLog>>,
}

impl MemSlot {
    /// Guest writes go to MMIO instead of memory.
    pub fn read_only(&self) -> bool {
        self.flags & flags::READONLY != 0
    }
    fn contains(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.gpa) < self.size
    }
}

/// `kvm_userspace_memory_region`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Slot number.
    pub slot: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes; 0 deletes the slot.
    pub size: u64,
    /// Host address of the memory.
    pub hva: u64,
}

/// Why a region was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionError {
    /// EINVAL: misaligned, out of range, unknown flags, a change that KVM does not allow.
    Invalid,
    /// EEXIST: it would overlap another slot.
    Overlap,
    /// ENOMEM
    OutOfMemory,
}

/// What an accepted region changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// A new slot.
    Create,
    /// The slot is gone.
    Delete,
    /// The slot has another guest-physical address.
    Move,
    /// Dirty logging was switched on or off.
    Flags,
}

/// Remembers where the last lookup ended. One per reader.
#[derive(Debug, Default)]
pub struct SlotHint(AtomicUsize);

/// An immutable snapshot of all memslots.
#[derive(Clone, Debug, Default)]
pub struct MemView {
    slots: Vec<MemSlot>,
}

impl MemView {
    /// All slots, by ascending guest-physical address.
    pub fn slots(&self) -> &[MemSlot] {
        &self.slots
    }

    /// The slot numbered `id`.
    pub fn slot(&self, id: u32) -> Option<&MemSlot> {
        self.slots.iter().find(|s| s.id == id)
    }

    /// The slot that holds `gpa`.
    pub fn find(&self, gpa: u64, hint: &SlotHint) -> Option<&MemSlot> {
        let last = hint.0.load(Ordering::Relaxed);
        if let Some(slot) = self.slots.get(last)
            && slot.contains(gpa)
        {
            return Some(slot);
        }
        let index = self
            .slots
            .partition_point(|s| s.gpa <= gpa)
            .checked_sub(1)?;
        let slot = &self.slots[index];
        if !slot.contains(gpa) {
            return None;
        }
        hint.0.store(index, Ordering::Relaxed);
        Some(slot)
    }

    /// A host pointer to `len` bytes at `gpa`, if one slot holds them all and, for `write`, is
    /// writable; `write` marks them dirty, and so does the first use of a page of a slot that is logged from
    /// its beginning.
    pub fn host_ptr(&self, gpa: u64, len: usize, write: bool, hint: &SlotHint) -> Option<*mut u8> {
        self.host_ptr_telling(gpa, len, write, hint, |_, _| {})
    }

    /// [`Self::host_ptr`]; `newly` gets each page that this makes dirty: slot and page within it.
    pub fn host_ptr_telling(
        &self,
        gpa: u64,
        len: usize,
        write: bool,
        hint: &SlotHint,
        mut newly: impl FnMut(u32, u64),
    ) -> Option<*mut u8> {
        let slot = self.find(gpa, hint)?;
        let offset = gpa - slot.gpa;
        if slot.size - offset < len as u64 || (write && slot.read_only()) {
            return None;
        }
        if let Some(log) = &slot.dirty {
            let newly = |page| newly(slot.id, page);
            match write {
                true => log.mark_range(offset, len as u64, newly),
                false => log.use_range(offset, len as u64, newly),
            }
        }
        Some(core::ptr::with_exposed_provenance_mut(
            (slot.hva + offset) as usize,
        ))
    }

    /// The snapshot after KVM_SET_USER_MEMORY_REGION of `region`. `max_gpa` is the first
    /// guest-physical address that no slot may reach; `log_all_set` starts dirty logs all dirty.
    ///
    /// # Errors
    /// As the ioctl; see [`RegionError`].
    pub fn with_region(
        &self,
        region: &Region,
        max_gpa: u64,
        log_all_set: bool,
    ) -> Result<(MemView, Change), RegionError> {
        use RegionError::Invalid;
        if region.flags & !(flags::LOG_DIRTY_PAGES | flags::READONLY) != 0
            || !(region.size | region.gpa | region.hva).is_multiple_of(PAGE_SIZE)
            || region.slot & 0xffff >= MAX_SLOTS
            || region.size / PAGE_SIZE > MAX_PAGES
        {
            return Err(Invalid);
        }
        let gpa_end = region.gpa.checked_add(region.size).ok_or(Invalid)?;
        let hva_end = region.hva.checked_add(region.size).ok_or(Invalid)?;
        if hva_end > USER_END {
            return Err(Invalid);
        }
        let old = self.slots.iter().position(|s| s.id == region.slot);
        if region.size == 0 {
            let index = old.ok_or(Invalid)?;
            let mut view = self.copy(0)?;
            view.slots.remove(index);
            return Ok((view, Change::Delete));
        }
        if gpa_end > max_gpa {
            return Err(Invalid);
        }
        let old_slot = old.map(|i| &self.slots[i]);
        let change = match old_slot {
            None => Change::Create,
            Some(slot) => {
                if slot.hva != region.hva
                    || slot.size != region.size
                    || (slot.flags ^ region.flags) & flags::READONLY != 0
                {
                    return Err(Invalid);
                }
                if slot.gpa != region.gpa {
                    Change::Move
                } else if slot.flags != region.flags {
                    Change::Flags
                } else {
                    return Ok((self.copy(0)?, Change::None));
                }
            }
        };
        // Slots are sorted and do not overlap each other: only those that begin before the region's end
        // and not before the last one in front of it can.
        let before = self.slots.partition_point(|s| s.gpa < gpa_end);
        if self.slots[..before]
            .iter()
            .rev()
            .take_while(|s| s.id == region.slot || s.gpa + s.size > region.gpa)
            .any(|s| s.id != region.slot)
        {
            return Err(RegionError::Overlap);
        }
        let dirty = if region.flags & flags::LOG_DIRTY_PAGES == 0 {
            None
        } else if let Some(log) = old_slot.and_then(|s| s.dirty.clone()) {
            Some(log)
        } else {
            let make = match change {
                Change::Create => DirtyLog::of_new_slot,
                _ => DirtyLog::new,
            };
            Some(Arc::new(
                make(region.size / PAGE_SIZE, log_all_set).ok_or(RegionError::OutOfMemory)?,
            ))
        };
        let mut view = self.copy(1)?;
        if let Some(index) = old {
            view.slots.remove(index);
        }
        let at = view.slots.partition_point(|s| s.gpa < region.gpa);
        view.slots.insert(
            at,
            MemSlot {
                id: region.slot,
                gpa: region.gpa,
                size: region.size,
                hva: region.hva,
                flags: region.flags,
                dirty,
            },
        );
        Ok((view, change))
    }

    fn copy(&self, extra: usize) -> Result<MemView, RegionError> {
        let mut slots = Vec::new();
        slots
            .try_reserve_exact(self.slots.len() + extra)
            .map_err(|_| RegionError::OutOfMemory)?;
        slots.extend(self.slots.iter().cloned());
        Ok(MemView { slots })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = 1 << 46;

    fn region(slot: u32, gpa: u64, pages: u64) -> Region {
        Region {
            slot,
            flags: 0,
            gpa,
            size: pages * PAGE_SIZE,
            hva: 0x7000_0000_0000 + gpa,
        }
    }
    fn set(view: &mut MemView, r: &Region) -> Result<Change, RegionError> {
        let (new, change) = view.with_region(r, MAX, false)?;
        *view = new;
        Ok(change)
    }

    #[test]
    fn create_find_move_delete() {
        let mut v = MemView::default();
        assert_eq!(set(&mut v, &region(1, 0x10000, 16)), Ok(Change::Create));
        assert_eq!(set(&mut v, &region(0, 0, 16)), Ok(Change::Create));
        let hint = SlotHint::default();
        assert_eq!(v.find(0xffff, &hint).map(|s| s.id), Some(0));
        assert_eq!(v.find(0x10000, &hint).map(|s| s.id), Some(1));
        assert_eq!(v.find(0x1ffff, &hint).map(|s| s.id), Some(1));
        assert!(v.find(0x20000, &hint).is_none());
        assert!(v.host_ptr(0x1fffc, 8, false, &hint).is_none());
        assert!(v.host_ptr(0x1fff8, 8, true, &hint).is_some());
        assert_eq!(set(&mut v, &region(1, 0x10000, 16)), Ok(Change::None));
        let mut moved = region(1, 0x40000, 16);
        moved.hva = 0x7000_0001_0000;
        assert_eq!(set(&mut v, &moved), Ok(Change::Move));
        assert_eq!(set(&mut v, &region(1, 0, 0)), Ok(Change::Delete));
        assert_eq!(set(&mut v, &region(1, 0, 0)), Err(RegionError::Invalid));
    }

    #[test]
    fn refusals() {
        let mut v = MemView::default();
        set(&mut v, &region(0, 0x10000, 16)).unwrap();
        let bad = |f: fn(&mut Region)| {
            let mut r = region(3, 0x100_0000, 16);
            f(&mut r);
            v.with_region(&r, MAX, false).map(|_| ()).unwrap_err()
        };
        assert_eq!(bad(|r| r.gpa += 1), RegionError::Invalid);
        assert_eq!(bad(|r| r.size += 1), RegionError::Invalid);
        assert_eq!(bad(|r| r.hva += 1), RegionError::Invalid);
        assert_eq!(bad(|r| r.flags = 4), RegionError::Invalid);
        assert_eq!(bad(|r| r.slot = MAX_SLOTS), RegionError::Invalid);
        assert_eq!(bad(|r| r.gpa = !0xfff), RegionError::Invalid);
        assert_eq!(bad(|r| r.gpa = MAX - 0x1000), RegionError::Invalid);
        assert_eq!(bad(|r| r.hva = 1 << 63), RegionError::Invalid);
        assert_eq!(bad(|r| r.gpa = 0x1f000), RegionError::Overlap);
        assert_eq!(bad(|r| r.gpa = 0x1000), RegionError::Overlap);
        assert_eq!(bad(|r| r.gpa = 0x10000), RegionError::Overlap);
        let covers = |r: &mut Region| (r.gpa, r.size) = (0, 0x10_0000);
        assert_eq!(bad(covers), RegionError::Overlap);
        let inside = |r: &mut Region| (r.gpa, r.size) = (0x12000, 0x1000);
        assert_eq!(bad(inside), RegionError::Overlap);
        // Right behind and right in front of it there is room.
        let mut around = v.clone();
        assert_eq!(set(&mut around, &region(1, 0x20000, 1)), Ok(Change::Create));
        assert_eq!(set(&mut around, &region(2, 0xf000, 1)), Ok(Change::Create));
        // A slot may move over its own old place.
        let mut moved = region(0, 0x11000, 16);
        moved.hva = 0x7000_0001_0000;
        assert_eq!(set(&mut around, &moved), Err(RegionError::Overlap));
        moved.gpa = 0x10_8000;
        assert_eq!(set(&mut around, &moved), Ok(Change::Move));
        moved.gpa = 0x10_0000;
        assert_eq!(set(&mut around, &moved), Ok(Change::Move));
        // The size, the memory and the read-only flag of a slot stay.
        let mut r = region(0, 0x10000, 8);
        assert_eq!(set(&mut v, &r), Err(RegionError::Invalid));
        r.size = 16 * PAGE_SIZE;
        r.flags = flags::READONLY;
        assert_eq!(set(&mut v, &r), Err(RegionError::Invalid));
    }

    #[test]
    fn dirty_log_is_shared_between_snapshots() {
        let mut v = MemView::default();
        let mut r = region(0, 0, 4);
        set(&mut v, &r).unwrap();
        r.flags = flags::LOG_DIRTY_PAGES;
        assert_eq!(set(&mut v, &r), Ok(Change::Flags));
        let old = v.clone();
        set(&mut v, &region(1, 0x10000, 1)).unwrap();
        let hint = SlotHint::default();
        old.host_ptr(0x1000, 1, true, &hint).unwrap();
        old.host_ptr(0x2000, 1, false, &hint).unwrap();
        let mut out = Vec::new();
        v.slot(0)
            .unwrap()
            .dirty
            .as_ref()
            .unwrap()
            .fetch(&mut out, true);
        assert_eq!(out, [2]);
    }

    #[test]
    fn read_only_slots_refuse_writes() {
        let mut v = MemView::default();
        let mut r = region(0, 0, 4);
        r.flags = flags::READONLY;
        set(&mut v, &r).unwrap();
        let hint = SlotHint::default();
        assert!(v.host_ptr(0, 4, true, &hint).is_none());
        assert!(v.host_ptr(0, 4, false, &hint).is_some());
    }
}
