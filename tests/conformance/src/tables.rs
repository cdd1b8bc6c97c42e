//! Descriptor tables and page tables, written by the host.

use crate::layout::{DATA, GDT, MORE_TABLES, MORE_TABLES_END, TABLES};
use crate::memory::Memory;
use std::sync::atomic::{AtomicU64, Ordering};

/// 64-bit code.
pub const CODE: u16 = 0x08;
/// Data, flat.
pub const KDATA: u16 = 0x10;
/// 32-bit code, flat.
pub const CODE32: u16 = 0x18;
/// 32-bit user code, flat.
pub const USER_CODE32: u16 = 0x20 | 3;
/// User data, flat.
pub const USER_DATA: u16 = 0x28 | 3;
/// 64-bit user code.
pub const USER_CODE: u16 = 0x30 | 3;
/// 16-bit code, base 0, 64 KiB.
pub const CODE16: u16 = 0x38;
/// The 64-bit (two entries) or 32-bit TSS.
pub const TR: u16 = 0x40;
/// 16-bit data, base 0, 64 KiB.
pub const DATA16: u16 = 0x50;
/// From here on free for tests.
pub const FREE: u16 = 0x58;
/// The last byte of the table.
pub const GDT_LIMIT: u16 = 0xff;

/// What [`crate::Machine`] writes there at first.
pub const DESCRIPTORS: [u64; 11] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x0000_9b00_0000_ffff,
    0,
    0,
    0x0000_9300_0000_ffff,
];

/// A segment descriptor.
pub fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    u64::from(limit & 0xffff)
        | u64::from(base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | u64::from(flags) << 52
        | u64::from(base >> 24) << 56
}

/// The low half of a 64-bit gate, or a 32-bit gate.
pub fn gate(selector: u16, offset: u64, access: u8, ist_or_count: u8) -> u64 {
    offset & 0xffff
        | u64::from(selector) << 16
        | u64::from(ist_or_count) << 32
        | u64::from(access) << 40
        | (offset >> 16 & 0xffff) << 48
}

/// Writes a descriptor of the GDT.
pub fn set_descriptor(memory: &Memory, selector: u16, value: u64) {
    memory.set_u64(GDT + u64::from(selector & !7), value);
}

/// Present.
pub const P: u64 = 1;
/// Writable.
pub const W: u64 = 2;
/// User.
pub const U: u64 = 4;
/// Accessed.
pub const A: u64 = 0x20;
/// Dirty.
pub const D: u64 = 0x40;
/// A large page.
pub const PS: u64 = 0x80;
/// Global.
pub const G: u64 = 0x100;
/// No execution.
pub const NX: u64 = 1 << 63;

/// Which page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// Four levels.
    Long,
    /// Three levels.
    Pae,
    /// Two levels of 32-bit entries.
    Legacy,
}

/// Page tables under construction. Tables come from [`TABLES`].
pub struct PageTables<'a> {
    memory: &'a Memory,
    paging: Paging,
    /// What CR3 is to hold.
    pub root: u64,
    next: &'a AtomicU64,
}

impl<'a> PageTables<'a> {
    /// An empty address space; `next` is where the next table goes.
    pub fn new(memory: &'a Memory, paging: Paging, next: &'a AtomicU64) -> Self {
        let mut t = PageTables {
            memory,
            paging,
            root: 0,
            next,
        };
        t.root = t.table();
        t
    }

    /// The address space that is at `root`.
    pub fn at(memory: &'a Memory, paging: Paging, root: u64, next: &'a AtomicU64) -> Self {
        PageTables {
            memory,
            paging,
            root,
            next,
        }
    }

    fn table(&self) -> u64 {
        let at = self.next.fetch_add(4096, Ordering::Relaxed);
        let room = [TABLES..DATA, MORE_TABLES..MORE_TABLES_END];
        assert!(
            room.iter().any(|r| r.contains(&at)),
            "no room for page tables"
        );
        at
    }

    fn get(&self, at: u64) -> u64 {
        match self.paging {
            Paging::Legacy => u64::from(self.memory.u32(at)),
            _ => self.memory.u64(at),
        }
    }

    fn set(&self, at: u64, value: u64) {
        match self.paging {
            Paging::Legacy => self.memory.set_u32(at, value as u32),
            _ => self.memory.set_u64(at, value),
        }
    }

    /// Levels, bits of an index, bytes of an entry.
    fn shape(&self) -> (u32, u32, u64) {
        match self.paging {
            Paging::Long => (4, 9, 8),
            Paging::Pae => (3, 9, 8),
            Paging::Legacy => (2, 10, 4),
        }
    }

    /// The address of the entry for `va` in its table of `level` (1: page table), making tables above
    /// that allow everything.
    pub fn entry(&self, va: u64, level: u32) -> u64 {
        let (levels, bits, size) = self.shape();
        let mut table = self.root;
        let mut l = levels;
        loop {
            let index = va >> (12 + bits * (l - 1)) & ((1 << bits) - 1);
            let at = table + index * size;
            if l == level {
                return at;
            }
            let mut e = self.get(at);
            if e & P == 0 {
                // The entries of PAE's first table have no permissions.
                let flags = if self.paging == Paging::Pae && l == 3 {
                    P
                } else {
                    P | W | U
                };
                e = self.table() | flags;
                self.set(at, e);
            }
            assert_eq!(e & PS, 0, "a large page is in the way at {va:#x}");
            table = e & 0x000f_ffff_ffff_f000;
            l -= 1;
        }
    }

    /// Maps a page of 4 KiB.
    pub fn map(&self, va: u64, pa: u64, flags: u64) -> u64 {
        let at = self.entry(va, 1);
        self.set(at, pa | flags);
        at
    }

    /// Maps a page of `level` 2 or 3.
    pub fn map_large(&self, level: u32, va: u64, pa: u64, flags: u64) -> u64 {
        let at = self.entry(va, level);
        self.set(at, pa | flags | PS);
        at
    }

    /// Maps what is at `va..va + size` to itself in pages of 4 KiB.
    pub fn identity(&self, va: u64, size: u64, flags: u64) {
        for at in (va..va + size).step_by(4096) {
            self.map(at, at, flags);
        }
    }
}
