//! Page tables of the guest that windows are mapped from.
#![expect(unsafe_code, reason = "reads page tables in guest RAM")]

use super::Memory;
use std::sync::atomic::{AtomicU64, Ordering};
use x86emu::paging::entry::{A, ADDR, D, P, RW, US};

/// What one page table maps: 2 MiB.
pub const REGION: u64 = 1 << 21;

/// What is mapped of 2 MiB of linear addresses.
pub struct Table {
    /// First linear address.
    pub base: u64,
    /// Where that lies on the host.
    host: u64,
    /// The entries above, from CR3 on: where each lies on the host, and what it was.
    pub path: [(*const AtomicU64, u64); 3],
    /// The page table on the host; null if the last entry of the path maps a large page.
    pub entries: *const AtomicU64,
    /// The table as it was when it was last looked at.
    pub seen: Box<[u64; 512]>,
    /// Pages that are mapped.
    pub mapped: [u64; 8],
    /// Those among them that may be written.
    pub written: [u64; 8],
}

pub fn read(p: *const AtomicU64) -> u64 {
    // SAFETY: `p` is the address of an entry in guest RAM; see `Table`.
    unsafe { (*p).load(Ordering::Relaxed) }
}

pub fn bit(set: &[u64; 8], i: usize) -> bool {
    set[i / 64] & 1 << (i % 64) != 0
}

pub fn put(set: &mut [u64; 8], i: usize, value: bool) {
    let mask = 1 << (i % 64);
    if value {
        set[i / 64] |= mask;
    } else {
        set[i / 64] &= !mask;
    }
}

impl Table {
    pub fn path_holds(&self) -> bool {
        // Accessed and dirty bits of upper levels say nothing.
        self.path
            .iter()
            .all(|&(p, was)| (read(p) ^ was) & !(A | D) == 0)
    }

    pub fn entry(&self, i: usize) -> u64 {
        if self.entries.is_null() {
            // A page of 2 MiB, as if a table had its parts.
            let large = read(self.path[2].0);
            return large & !(REGION - 1) & ADDR | large & (P | RW | US | A | D) | (i as u64) << 12;
        }
        // SAFETY: `i` is below 512, and the page holds as many entries.
        read(unsafe { self.entries.add(i) })
    }

    /// What of an entry allows: to be mapped, to be written.
    pub fn rights(&self, entry: u64) -> (bool, bool) {
        let writable = self.path.iter().all(|e| e.1 & RW != 0);
        let need = P | US | A;
        let ok = entry & need == need;
        (ok, ok && writable && entry & (RW | D) == RW | D)
    }

    /// The entry of a mapped page still allows what is mapped; else the page is taken for unmapped.
    pub fn holds(&mut self, i: usize) -> bool {
        let (now, was) = (self.entry(i), self.seen[i]);
        if now == was {
            return true;
        }
        self.seen[i] = now;
        let (readable, writable) = self.rights(now);
        let same = was & ADDR == now & ADDR;
        let holds = readable && same && (writable || !bit(&self.written, i));
        if !holds {
            put(&mut self.mapped, i, false);
            put(&mut self.written, i, false);
        }
        holds
    }

    /// The host address of one of its pages.
    pub fn host(&self, i: usize) -> u64 {
        self.host + (i as u64) * 4096
    }

    /// The table for a linear address, which must be mapped, with page-map level 4 at `root`. The caller says where it lies on the host.
    pub fn new(memory: &mut dyn Memory, root: u64, gva: u64, host: u64) -> Option<Table> {
        let mut path = [(std::ptr::null(), 0); 3];
        let mut next = root;
        for (level, step) in path.iter_mut().enumerate() {
            let index = (gva >> (39 - 9 * level)) as usize & 511;
            // SAFETY: within the page.
            let at = unsafe { memory.page(next)?.cast::<AtomicU64>().add(index) };
            let entry = read(at);
            let large = entry & 1 << 7 != 0;
            if entry & (P | US) != P | US || large && level < 2 {
                return None;
            }
            *step = (at, entry);
            next = entry & ADDR;
        }
        let entries = if path[2].1 & 1 << 7 != 0 {
            std::ptr::null()
        } else {
            memory.page(next)?.cast()
        };
        let mut table = Table {
            base: gva & !(REGION - 1),
            host,
            path,
            entries,
            seen: Box::new([0; 512]),
            mapped: [0; 8],
            written: [0; 8],
        };
        for i in 0..512 {
            table.seen[i] = table.entry(i);
        }
        Some(table)
    }
}
