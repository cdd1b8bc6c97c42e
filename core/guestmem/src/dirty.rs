//! The dirty bitmap of a memslot (KVM_MEM_LOG_DIRTY_PAGES).

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

/// One bit per page, set by whoever writes to guest memory on the guest's behalf.
#[derive(Debug)]
pub struct DirtyLog {
    words: Box<[AtomicU64]>,
    /// Pages that have been used since the slot was made; `None`: the slot is older than its log.
    used: Option<Box<[AtomicU64]>>,
    pages: u64,
}

fn bitmap(pages: u64) -> Option<Box<[AtomicU64]>> {
    let count = usize::try_from(pages.div_ceil(64)).ok()?;
    let mut words = Vec::new();
    words.try_reserve_exact(count).ok()?;
    words.resize_with(count, || AtomicU64::new(0));
    Some(words.into_boxed_slice())
}

impl DirtyLog {
    /// A log for `pages` pages, all clean (or all dirty, as KVM_DIRTY_LOG_INITIALLY_SET wants it).
    /// `None`: no memory.
    pub fn new(pages: u64, all_dirty: bool) -> Option<Self> {
        let log = DirtyLog {
            words: bitmap(pages)?,
            used: None,
            pages,
        };
        if all_dirty {
            for (i, word) in log.words.iter().enumerate() {
                word.store(log.valid(i), Ordering::Relaxed);
            }
        }
        Some(log)
    }

    /// The log of a slot that is logged from its beginning: a page's first use marks it dirty whatever the
    /// use, as with KVM, which maps a page writable at once and takes it for dirty then.
    /// `None`: no memory.
    pub fn of_new_slot(pages: u64, all_dirty: bool) -> Option<Self> {
        Some(DirtyLog {
            used: Some(bitmap(pages)?),
            ..Self::new(pages, all_dirty)?
        })
    }

    fn valid(&self, word: usize) -> u64 {
        match self.pages - (word as u64 * 64) {
            0..64 => (1 << (self.pages % 64)) - 1,
            _ => u64::MAX,
        }
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Number of 64-bit words that [`Self::fetch`] gives.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// Marks `page` (counted from the start of the slot); pages beyond the slot are ignored. `true`: it
    /// was clean.
    pub fn mark(&self, page: u64) -> bool {
        let Some(word) = self.words.get((page / 64) as usize) else {
            return false;
        };
        let bit = 1 << (page % 64);
        // A plain load first: most writes hit pages that are dirty already, and an atomic
        // read-modify-write would bounce the cache line between vCPUs.
        if word.load(Ordering::Relaxed) & bit != 0
            || word.fetch_or(bit, Ordering::AcqRel) & bit != 0
        {
            return false;
        }
        if let Some(used) = self.used.as_ref().and_then(|u| u.get((page / 64) as usize)) {
            used.fetch_or(bit, Ordering::Relaxed);
        }
        true
    }

    /// Marks the pages that `len` bytes at byte `offset` touch and that nobody has used before; `newly` as
    /// in [`Self::mark_range`].
    pub fn use_range(&self, offset: u64, len: u64, mut newly: impl FnMut(u64)) {
        let Some(used) = &self.used else {
            return;
        };
        let last = offset.saturating_add(len.saturating_sub(1)) / crate::PAGE_SIZE;
        for page in offset / crate::PAGE_SIZE..=last.min(self.pages) {
            let bit = 1 << (page % 64);
            if used
                .get((page / 64) as usize)
                .is_some_and(|word| word.load(Ordering::Relaxed) & bit == 0)
                && self.mark(page)
            {
                newly(page);
            }
        }
    }

    /// Marks the pages that `len` bytes at byte `offset` touch; `newly` gets those that were clean.
    pub fn mark_range(&self, offset: u64, len: u64, mut newly: impl FnMut(u64)) {
        if len == 0 {
            return;
        }
        let last = offset.saturating_add(len - 1) / crate::PAGE_SIZE;
        for page in offset / crate::PAGE_SIZE..=last.min(self.pages) {
            if self.mark(page) {
                newly(page);
            }
        }
    }

    /// Makes `page` clean again; `true`: it was dirty.
    pub fn unmark(&self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        self.words
            .get((page / 64) as usize)
            .is_some_and(|word| word.fetch_and(!bit, Ordering::AcqRel) & bit != 0)
    }

    /// Appends the bitmap to `out`; with `clear`, every bit that is given out is cleared. `false`: no
    /// memory, and nothing was cleared.
    pub fn fetch(&self, out: &mut Vec<u64>, clear: bool) -> bool {
        if out.try_reserve(self.words.len()).is_err() {
            return false;
        }
        out.extend(self.words.iter().map(|word| {
            if clear {
                word.swap(0, Ordering::AcqRel)
            } else {
                word.load(Ordering::Acquire)
            }
        }));
        true
    }

    /// Clears the bits that are set in `bitmap`, whose bit 0 stands for page `first`
    /// (KVM_CLEAR_DIRTY_LOG; `first` is a multiple of 64). Pages past `count` are left alone. `true`: some
    /// bit was set.
    pub fn clear(&self, first: u64, count: u64, bitmap: &[u64]) -> bool {
        let start = (first / 64) as usize;
        let mut any = false;
        for (i, &mask) in bitmap.iter().enumerate() {
            let done = i as u64 * 64;
            if done >= count {
                break;
            }
            let mask = match count - done {
                n @ 0..64 => mask & ((1 << n) - 1),
                _ => mask,
            };
            if mask != 0
                && let Some(word) = self.words.get(start + i)
            {
                any |= word.fetch_and(!mask, Ordering::AcqRel) & mask != 0;
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn mark_fetch_clear() {
        let log = DirtyLog::new(130, false).unwrap();
        assert!(log.mark(0) && !log.mark(0));
        log.mark(129);
        assert!(!log.mark(500));
        log.mark(3);
        let mut newly = Vec::new();
        log.mark_range(4096 * 3 + 4000, 200, |page| newly.push(page));
        assert_eq!(newly, [4]);
        let mut out = Vec::new();
        assert!(log.fetch(&mut out, true));
        assert_eq!(out, vec![0b11001, 0, 2]);
        out.clear();
        assert!(log.fetch(&mut out, true));
        assert_eq!(out, vec![0, 0, 0]);
        log.mark(64);
        assert!(log.unmark(64) && !log.unmark(64) && !log.unmark(500));
    }

    #[test]
    fn first_use_is_dirty_in_a_new_slot() {
        let log = DirtyLog::of_new_slot(100, false).unwrap();
        let mut newly = Vec::new();
        log.use_range(4096 * 70 + 4000, 200, |page| newly.push(page));
        assert!(log.mark(3));
        let mut out = Vec::new();
        assert!(log.fetch(&mut out, true));
        assert_eq!(out, [1 << 3, 0b11 << 6]);
        log.use_range(4096 * 70, 8192, |page| newly.push(page));
        log.use_range(4096 * 3, 4096, |page| newly.push(page));
        assert_eq!(newly, [70, 71]);
        let older = DirtyLog::new(100, false).unwrap();
        older.use_range(0, 4096, |_| panic!("older than its log"));
    }

    #[test]
    fn initially_set_covers_only_the_slot() {
        let log = DirtyLog::new(65, true).unwrap();
        let mut out = Vec::new();
        log.fetch(&mut out, false);
        assert_eq!(out, vec![u64::MAX, 1]);
        assert!(log.clear(0, 3, &[u64::MAX]) && !log.clear(0, 3, &[7]));
        out.clear();
        log.fetch(&mut out, false);
        assert_eq!(out, vec![u64::MAX << 3, 1]);
        let log = DirtyLog::new(64, true).unwrap();
        out.clear();
        log.fetch(&mut out, false);
        assert_eq!(out, vec![u64::MAX]);
    }
}
