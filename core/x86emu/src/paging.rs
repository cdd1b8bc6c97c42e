//! Guest page walks: no paging, 32-bit, PAE, 4-level and 5-level (Intel SDM, "Paging").
//!
//! This is the translator's TLB-miss path: nothing is allocated, and an entry is only written when
//! its accessed or dirty bit is still clear.
#![expect(
    unsafe_code,
    reason = "page-table entries are read and updated in guest RAM shared with other vCPUs"
)]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::bits::*;
use crate::env::{Exception, Features, PhysMem};
use crate::state::CpuState;

/// What kind of access a translation is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// A write (or read-modify-write).
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// An access at CPL 3 that is not an implicit supervisor access.
    pub user: bool,
    /// An implicit supervisor access (descriptor tables, TSS): RFLAGS.AC does not override SMAP.
    pub implicit: bool,
}

impl Access {
    /// An implicit supervisor read: descriptor tables and TSS.
    pub const SYSTEM_READ: Access = Access {
        write: false,
        fetch: false,
        user: false,
        implicit: true,
    };
    /// An implicit supervisor write: descriptor tables and TSS.
    pub const SYSTEM_WRITE: Access = Access {
        write: true,
        ..Access::SYSTEM_READ
    };

    /// A data read at the current privilege level.
    #[inline]
    pub fn read(cpu: &CpuState) -> Access {
        Access {
            user: cpu.cpl == 3,
            ..Access::default()
        }
    }
    /// A data write at the current privilege level.
    #[inline]
    pub fn write(cpu: &CpuState) -> Access {
        Access {
            write: true,
            ..Access::read(cpu)
        }
    }
    /// An instruction fetch at the current privilege level.
    #[inline]
    pub fn fetch(cpu: &CpuState) -> Access {
        Access {
            fetch: true,
            ..Access::read(cpu)
        }
    }
}

/// A translation and the rights it carries, ANDed over all levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Guest-physical address of the very byte that was asked for.
    pub gpa: u64,
    /// log2 of the page size: 12, 21, 22 or 30.
    pub page_bits: u8,
    /// Writable (for supervisor accesses only while CR0.WP is set).
    pub writable: bool,
    /// Accessible at CPL 3.
    pub user: bool,
    /// Not executable.
    pub nx: bool,
    /// A global page, and CR4.PGE is set.
    pub global: bool,
    /// The leaf's dirty bit is set.
    pub dirty: bool,
    /// The paging structure that this came from, for a cache of paging structures.
    pub from: Option<Leaf>,
}

/// Where a translation's last entry lies, and the rights of the entries above it. Entries of 8 bytes only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Guest-physical address of the entry.
    pub gpa: u64,
    /// All entries above allow writes.
    pub writable: bool,
    /// All entries above allow accesses at CPL 3.
    pub user: bool,
}

/// Bits of a page-table entry (Intel SDM, "4-Level Paging").
pub mod entry {
    /// Present.
    pub const P: u64 = 1;
    /// Writable.
    pub const RW: u64 = 1 << 1;
    /// Accessible at CPL 3.
    pub const US: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty.
    pub const D: u64 = 1 << 6;
    /// A page, not a table.
    pub const PS: u64 = 1 << 7;
    /// Global.
    pub const G: u64 = 1 << 8;
    /// Not executable.
    pub const NX: u64 = 1 << 63;
    /// Guest-physical address of the page or table.
    pub const ADDR: u64 = 0x000f_ffff_ffff_f000;
}

use entry::*;

const ERR_P: u32 = 1;
const ERR_W: u32 = 2;
const ERR_U: u32 = 4;
const ERR_RSVD: u32 = 8;
const ERR_FETCH: u32 = 16;

/// Entries met on the way down, for setting accessed and dirty bits afterwards.
struct Trail {
    slot: [(u64, u64); 5],
    len: usize,
    /// AND of all entries.
    common: u64,
    /// Entries are 4 bytes.
    narrow: bool,
}

impl Trail {
    #[inline]
    fn new() -> Self {
        Trail {
            slot: [(0, 0); 5],
            len: 0,
            common: u64::MAX,
            narrow: false,
        }
    }

    #[inline]
    fn push(&mut self, gpa: u64, entry: u64) {
        if let Some(slot) = self.slot.get_mut(self.len) {
            *slot = (gpa, entry);
            self.len += 1;
        }
        self.common &= entry;
    }

    /// Sets the accessed bits, and the leaf's dirty bit for a write. False: an entry has changed
    /// meanwhile and the walk must start again.
    #[cold]
    fn mark<M: PhysMem + ?Sized>(&self, mem: &mut M, write: bool) -> bool {
        for (i, &(gpa, old)) in self.slot.iter().take(self.len).enumerate() {
            let leaf = i + 1 == self.len;
            let new = old | A | if write && leaf { D } else { 0 };
            if new != old && !exchange(mem, gpa, old, new, self.narrow) {
                return false;
            }
        }
        true
    }
}

/// The entry at `gpa`; page tables outside RAM read as not present.
#[inline]
fn load<M: PhysMem + ?Sized>(mem: &mut M, gpa: u64, narrow: bool) -> u64 {
    let width = if narrow { 4 } else { 8 };
    match mem.host_ptr(gpa, width, false) {
        Some(ptr) if ptr.addr().is_multiple_of(width) => {
            if narrow {
                // SAFETY: host_ptr vouches for 4 readable bytes, shared with others only atomically
                // or by volatile accesses; the alignment was checked.
                u64::from(unsafe { AtomicU32::from_ptr(ptr.cast()) }.load(Ordering::Acquire))
            } else {
                // SAFETY: as above, for 8 bytes.
                unsafe { AtomicU64::from_ptr(ptr.cast()) }.load(Ordering::Acquire)
            }
        }
        _ => 0,
    }
}

/// Replaces an entry if it is still `old`. Read-only memory is left alone, which counts as success.
fn exchange<M: PhysMem + ?Sized>(mem: &mut M, gpa: u64, old: u64, new: u64, narrow: bool) -> bool {
    let width = if narrow { 4 } else { 8 };
    match mem.host_ptr(gpa, width, true) {
        Some(ptr) if ptr.addr().is_multiple_of(width) => {
            if narrow {
                // SAFETY: host_ptr vouches for 4 writable bytes, shared with others only atomically
                // or by volatile accesses; the alignment was checked.
                let entry = unsafe { AtomicU32::from_ptr(ptr.cast()) };
                entry
                    .compare_exchange(old as u32, new as u32, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            } else {
                // SAFETY: as above, for 8 bytes.
                let entry = unsafe { AtomicU64::from_ptr(ptr.cast()) };
                entry
                    .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            }
        }
        _ => true,
    }
}

/// Format rules that come from CPUID.
#[derive(Clone, Copy)]
struct Format {
    phys_bits: u32,
    huge_1g: bool,
    pse36: bool,
    amd: bool,
}

impl Format {
    #[inline]
    fn of(features: &Features) -> Self {
        Format {
            phys_bits: u32::from(features.phys_bits).clamp(32, 52),
            huge_1g: features.ext1_edx & (1 << 26) != 0,
            pse36: features.leaf1_edx & (1 << 17) != 0,
            amd: features.amd,
        }
    }
}

/// Bits `phys_bits..52` set: reserved in every entry.
#[inline]
fn above(phys_bits: u32) -> u64 {
    ((1u64 << 52) - 1) & !((1u64 << phys_bits) - 1)
}

/// Walks down without permission checks. The error is the page-fault code's P and RSVD part.
#[inline]
fn descend<M: PhysMem + ?Sized>(
    cpu: &CpuState,
    format: Format,
    mem: &mut M,
    gva: u64,
    trail: &mut Trail,
) -> Result<Mapping, u32> {
    let mut reserved = above(format.phys_bits);
    let nxe = cpu.efer & EFER_NXE != 0;
    if !nxe {
        reserved |= NX;
    }
    let (mut level, mut table);
    if cpu.efer & EFER_LMA != 0 {
        level = if cpu.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        table = cpu.cr3 & ADDR;
    } else if cpu.cr4 & CR4_PAE != 0 {
        let pdpte = cpu.pdptrs[(gva >> 30) as usize & 3];
        if pdpte & P == 0 {
            return Err(0);
        }
        reserved |= 0x7ff << 52;
        level = 2;
        table = pdpte & ADDR;
    } else {
        return descend_32(cpu, format, mem, gva, trail);
    }
    loop {
        let shift = 12 + 9 * (level - 1);
        let slot = table + ((gva >> shift) & 0x1ff) * 8;
        let entry = load(mem, slot, false);
        if entry & P == 0 {
            return Err(0);
        }
        let mut bad = reserved;
        let mut leaf = level == 1;
        if entry & PS != 0 && level > 1 {
            match level {
                2 => bad |= 0x1f_e000,
                3 if format.huge_1g => bad |= 0x3fff_e000,
                _ => bad |= PS,
            }
            leaf = true;
        } else if level >= 4 && format.amd {
            bad |= G;
        }
        if entry & bad != 0 {
            return Err(ERR_P | ERR_RSVD);
        }
        let above = trail.common;
        // NX is ORed over the levels: keep it inverted in the common AND.
        trail.push(slot, entry ^ NX);
        if leaf {
            let inside = (1u64 << shift) - 1;
            return Ok(Mapping {
                gpa: (entry & ADDR & !inside) | (gva & inside),
                page_bits: shift as u8,
                writable: trail.common & RW != 0,
                user: trail.common & US != 0,
                nx: nxe && trail.common & NX == 0,
                global: entry & G != 0 && cpu.cr4 & CR4_PGE != 0,
                dirty: entry & D != 0,
                from: Some(Leaf {
                    gpa: slot,
                    writable: above & RW != 0,
                    user: above & US != 0,
                }),
            });
        }
        table = entry & ADDR;
        level -= 1;
    }
}

#[cold]
fn descend_32<M: PhysMem + ?Sized>(
    cpu: &CpuState,
    format: Format,
    mem: &mut M,
    gva: u64,
    trail: &mut Trail,
) -> Result<Mapping, u32> {
    trail.narrow = true;
    let gva = gva & 0xffff_ffff;
    let slot = (cpu.cr3 & 0xffff_f000) + (gva >> 22) * 4;
    let pde = load(mem, slot, true);
    if pde & P == 0 {
        return Err(0);
    }
    trail.push(slot, pde);
    let (leaf, gpa, page_bits) = if pde & PS != 0 && cpu.cr4 & CR4_PSE != 0 {
        // PSE-36: bits 13-20 hold address bits 32-39; what the CPU has no address lines for is
        // reserved, and so is bit 21.
        let high_bits = if format.pse36 {
            (format.phys_bits - 32).min(8)
        } else {
            0
        };
        let reserved = (0x3f_e000u64 >> (13 + high_bits)) << (13 + high_bits);
        if pde & reserved != 0 {
            return Err(ERR_P | ERR_RSVD);
        }
        let high = (pde >> 13) & 0xff;
        (
            pde,
            (pde & 0xffc0_0000) | (high << 32) | (gva & 0x3f_ffff),
            22,
        )
    } else {
        let slot = (pde & 0xffff_f000) + ((gva >> 12) & 0x3ff) * 4;
        let pte = load(mem, slot, true);
        if pte & P == 0 {
            return Err(0);
        }
        trail.push(slot, pte);
        (pte, (pte & 0xffff_f000) | (gva & 0xfff), 12)
    };
    Ok(Mapping {
        gpa,
        page_bits,
        writable: trail.common & RW != 0,
        user: trail.common & US != 0,
        nx: false,
        global: leaf & G != 0 && cpu.cr4 & CR4_PGE != 0,
        dirty: leaf & D != 0,
        from: None,
    })
}

/// Whether the rights of `mapping` allow `access` (Intel SDM, "Access Rights").
#[inline]
pub fn permitted(cpu: &CpuState, mapping: &Mapping, access: Access) -> bool {
    if access.user {
        mapping.user && (!access.write || mapping.writable) && (!access.fetch || !mapping.nx)
    } else if access.fetch {
        let smep = mapping.user && cpu.cr4 & CR4_SMEP != 0;
        !(mapping.nx || smep)
    } else {
        let read_only = access.write && !mapping.writable && cpu.cr0 & CR0_WP != 0;
        let smap =
            mapping.user && cpu.cr4 & CR4_SMAP != 0 && (access.implicit || cpu.rflags & AC == 0);
        !read_only && !smap
    }
}

#[cold]
fn fault(cpu: &CpuState, gva: u64, access: Access, code: u32) -> Exception {
    let mut error = code;
    if access.write {
        error |= ERR_W;
    }
    if access.user {
        error |= ERR_U;
    }
    let reports_fetch =
        cpu.cr4 & CR4_SMEP != 0 || (cpu.efer & EFER_NXE != 0 && cpu.cr4 & CR4_PAE != 0);
    if access.fetch && reports_fetch {
        error |= ERR_FETCH;
    }
    Exception {
        vector: 14,
        error: Some(error),
        payload: gva,
    }
}

#[inline]
fn identity(gva: u64) -> Mapping {
    Mapping {
        gpa: gva & 0xffff_ffff,
        page_bits: 30,
        writable: true,
        user: true,
        nx: false,
        global: false,
        dirty: true,
        from: None,
    }
}

/// Translates `gva` for `access`, setting accessed and dirty bits as the processor does.
///
/// That `gva` is canonical is the caller's to check. The error is the #PF to raise, with the address
/// as its payload. Without paging everything maps to itself.
#[inline]
pub fn walk<M: PhysMem + ?Sized>(
    cpu: &CpuState,
    features: &Features,
    mem: &mut M,
    gva: u64,
    access: Access,
) -> Result<Mapping, Exception> {
    if cpu.cr0 & CR0_PG == 0 {
        return Ok(identity(gva));
    }
    loop {
        let mut trail = Trail::new();
        let mut mapping = match descend(cpu, Format::of(features), mem, gva, &mut trail) {
            Ok(mapping) => mapping,
            Err(code) => return Err(fault(cpu, gva, access, code)),
        };
        if !permitted(cpu, &mapping, access) {
            return Err(fault(cpu, gva, access, ERR_P));
        }
        if trail.common & A != 0 && (!access.write || mapping.dirty) {
            return Ok(mapping);
        }
        if !trail.narrow {
            for slot in &mut trail.slot {
                slot.1 ^= NX;
            }
        }
        if trail.mark(mem, access.write) {
            mapping.dirty |= access.write;
            return Ok(mapping);
        }
    }
}

/// Translates `gva` for a debugger: no permission checks, no accessed or dirty bits.
pub fn peek<M: PhysMem + ?Sized>(cpu: &CpuState, mem: &mut M, gva: u64) -> Option<Mapping> {
    if cpu.cr0 & CR0_PG == 0 {
        return Some(identity(gva));
    }
    let format = Format {
        phys_bits: 52,
        huge_1g: true,
        pse36: true,
        amd: false,
    };
    descend(cpu, format, mem, gva, &mut Trail::new()).ok()
}

/// Whether `address` is canonical in the current paging mode.
#[inline]
pub fn canonical(cpu: &CpuState, address: u64) -> bool {
    let spare = if cpu.cr4 & CR4_LA57 != 0 { 7 } else { 16 };
    ((address << spare) as i64 >> spare) as u64 == address
}
