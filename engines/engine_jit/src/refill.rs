//! Filling the software TLBs without leaving emitted code: a cache of paging structures, as processors have
//! one (Intel SDM, "Caching Translation Information"), and the stubs that read a guest's page-table
//! entry through it.
//!
//! The first access to a region of 2 MiB goes through the walk in Rust, which enters the region here. Then
//! a stub fills the TLB for any page of the region whose entry has all the bits that the access needs,
//! accessed and dirty among them. Everything else (faults, MMIO, pages with code, pages that are
//! logged) takes the way through Rust again.

use crate::asm::{Asm, Mem, Size, cc, reg};
use crate::layout::{
    GROUP_SHIFT, TLB_ENTRIES, TLB_KERNEL, TLB_KERNEL_AC, TLB_USER, VcpuMem, off, tlb_base,
};
use crate::stubs::{I, T};
use crate::world::{CODE_MAP_PAGES, PAGE_CODE, PAGE_WRITTEN};
use std::mem::offset_of;
use x86defs::{cr0, cr4, efer};
use x86emu::env::RamRange;
use x86emu::paging::Mapping;
use x86emu::paging::entry::{A, ADDR, D, G, NX, P, RW, US};
use x86emu::state::CpuState;

/// Regions per TLB; a power of two.
pub const REGIONS: usize = 256;
/// log2 of a region's size.
const REGION_SHIFT: u32 = 21;

/// What is known of 2 MiB of linear addresses.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub struct Region {
    /// First linear address, bit 0 set; 0: empty.
    tag: u64,
    /// Host address of the page table; 0: the region is one large page.
    table: u64,
    /// The entry of a large page, with the rights of all levels, in the format of a 4 KiB page's.
    large: u64,
    /// Bits of an entry that decide whether it can be read, and what they must be.
    read: [u64; 2],
    /// The same for a write.
    write: [u64; 2],
}

/// Guest RAM that is contiguous on the host.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Ram {
    /// First guest-physical address.
    gpa: u64,
    /// Bytes that may be read.
    readable: u64,
    /// Bytes that may be written with nobody to tell: all or none.
    writable: u64,
    /// Host address less guest-physical address.
    delta: u64,
}

/// What the stubs look up. All zero is empty.
#[repr(C)]
pub struct Structures {
    regions: [[Region; REGIONS]; 3],
    ram: [Ram; 2],
    /// Bit 8 if CR4.PGE was set when the regions were entered.
    global: u64,
    /// One bit per region in use.
    used: [[u64; REGIONS / 64]; 3],
    next_ram: usize,
    /// Fills by the stubs.
    pub refills: u64,
}

impl Structures {
    /// Drops the regions: any INVLPG and any load of CR3 does.
    pub fn flush(&mut self) {
        for (regions, used) in self.regions.iter_mut().zip(&mut self.used) {
            for (w, bits) in used.iter_mut().enumerate() {
                while *bits != 0 {
                    regions[w * 64 + bits.trailing_zeros() as usize].tag = 0;
                    *bits &= *bits - 1;
                }
            }
        }
    }

    /// Drops what is known of guest RAM too.
    pub fn flush_ram(&mut self) {
        self.flush();
        self.ram = [Ram::default(); 2];
    }

    /// RAM that contains `gpa` is known.
    pub fn knows_ram(&self, gpa: u64) -> bool {
        self.ram
            .iter()
            .any(|r| gpa.wrapping_sub(r.gpa) < r.readable)
    }

    /// Enters RAM.
    pub fn add_ram(&mut self, ram: RamRange) {
        // Emitted code looks up the flags of every page that it lets be written.
        let end = (CODE_MAP_PAGES as u64) << 12;
        let size = ram.size.min(end.saturating_sub(ram.gpa));
        self.ram[self.next_ram & 1] = Ram {
            gpa: ram.gpa,
            readable: size,
            writable: if ram.quiet { size } else { 0 },
            delta: ram.host.wrapping_sub(ram.gpa),
        };
        self.next_ram += 1;
    }

    /// Enters the region of `gva`, which `m` is the translation of. `table`: host address of the page
    /// table with its entry, for a page of 4 KiB.
    pub fn add(
        &mut self,
        which: usize,
        cpu: &CpuState,
        phys_bits: u8,
        gva: u64,
        m: &Mapping,
        table: Option<u64>,
    ) {
        let Some(leaf) = m.from else { return };
        let mut region = Region {
            tag: gva >> REGION_SHIFT << REGION_SHIFT | 1,
            ..Region::default()
        };
        let (user, writable);
        match (m.page_bits, table) {
            (12, Some(table)) => {
                region.table = table;
                (user, writable) = (leaf.user, leaf.writable);
            }
            (21 | 30, _) => {
                let bit = |set: bool, bit: u64| if set { bit } else { 0 };
                region.large = m.gpa & ADDR & !((1 << REGION_SHIFT) - 1)
                    | P
                    | A
                    | bit(m.writable, RW)
                    | bit(m.user, US)
                    | bit(m.dirty, D)
                    | bit(m.global, G);
                (user, writable) = (true, true);
            }
            _ => return,
        }
        let mut mask = P | A | ADDR & !((1u64 << phys_bits.clamp(32, 52)) - 1);
        if cpu.efer & efer::NX == 0 {
            mask |= NX;
        }
        let mut want = P | A;
        match which {
            TLB_USER if !user => return,
            TLB_USER => {
                mask |= US;
                want |= US;
            }
            TLB_KERNEL if user => mask |= US,
            TLB_KERNEL | TLB_KERNEL_AC => {}
            _ => return,
        }
        region.read = [mask, want];
        region.write = if which != TLB_USER && cpu.cr0 & cr0::WP == 0 {
            [mask | D, want | D]
        } else if writable {
            [mask | RW | D, want | RW | D]
        } else {
            // What no entry has.
            [0, 1]
        };
        self.global = if cpu.cr4 & cr4::PGE != 0 { G } else { 0 };
        let i = (gva >> REGION_SHIFT) as usize & (REGIONS - 1);
        self.regions[which][i] = region;
        self.used[which][i / 64] |= 1 << (i % 64);
    }
}

const fn structures(field: usize) -> i32 {
    offset_of!(VcpuMem, caches.structures) as i32 + field as i32
}

/// Emits the stub that fills a TLB for the linear address in T. Carry clear: done; carry set: not, and nothing
/// has changed. Clobbers flags and I.
pub fn emit(a: &mut Asm, which: usize, write: bool) {
    let saved = [
        (reg::RAX, off::CROSS_SPILL),
        (reg::RCX, off::CROSS_SPILL + 8),
        (reg::RDX, off::CROSS_SPILL + 16),
    ];
    for (r, slot) in saved {
        a.store(Size::Q, Mem::Gs(slot), r);
    }
    let mut fails = Vec::new();
    let region = structures(offset_of!(Structures, regions))
        + (which * size_of::<[Region; REGIONS]>()) as i32;
    let of = |field: usize| Mem::GsBase(I, region + field as i32);
    a.mov(reg::RCX, T);
    a.alu_imm(Size::Q, 4, reg::RCX, -(1 << REGION_SHIFT));
    a.alu_imm(Size::Q, 1, reg::RCX, 1);
    a.mov(I, T);
    a.shr(I, (REGION_SHIFT - 6) as u8);
    a.alu_imm(Size::D, 4, I, ((REGIONS - 1) << 6) as i32);
    a.op_mem(Size::Q, &[0x3b], reg::RCX, of(offset_of!(Region, tag))); // cmp
    fails.push(a.jcc(cc::NE));
    // RAX = the entry
    a.mov(reg::RCX, T);
    a.shr(reg::RCX, 12);
    a.alu_imm(Size::D, 4, reg::RCX, 511);
    a.load(Size::Q, reg::RAX, of(offset_of!(Region, table)));
    a.op_reg(Size::Q, &[0x85], reg::RAX, reg::RAX); // test
    let large = a.jcc(cc::E);
    a.load(
        Size::Q,
        reg::RAX,
        Mem::Sib(Some(reg::RAX), Some((reg::RCX, 3)), 0),
    );
    let have = a.jmp();
    a.bind(large);
    a.op_reg(Size::D, &[0xc1], 4, reg::RCX); // shl
    a.bytes(&[12]);
    a.op_mem(Size::Q, &[0x03], reg::RCX, of(offset_of!(Region, large))); // add
    a.mov(reg::RAX, reg::RCX);
    a.bind(have);
    let rights = if write {
        offset_of!(Region, write)
    } else {
        offset_of!(Region, read)
    };
    a.mov(reg::RDX, reg::RAX);
    a.op_mem(Size::Q, &[0x23], reg::RDX, of(rights)); // and
    a.op_mem(Size::Q, &[0x3b], reg::RDX, of(rights + 8)); // cmp
    fails.push(a.jcc(cc::NE));
    // RDX = guest-physical page, RCX = host page
    a.mov_imm(reg::RDX, ADDR);
    a.op_reg(Size::Q, &[0x21], reg::RAX, reg::RDX); // and
    let mut found = None;
    for n in 0..2 {
        let ram = |field: usize| {
            let at = offset_of!(Structures, ram) + n * size_of::<Ram>() + field;
            Mem::Gs(structures(at))
        };
        let length = if write {
            offset_of!(Ram, writable)
        } else {
            offset_of!(Ram, readable)
        };
        a.mov(reg::RCX, reg::RDX);
        a.op_mem(Size::Q, &[0x2b], reg::RCX, ram(offset_of!(Ram, gpa))); // sub
        a.op_mem(Size::Q, &[0x3b], reg::RCX, ram(length)); // cmp
        let outside = a.jcc(cc::AE);
        a.mov(reg::RCX, reg::RDX);
        a.op_mem(Size::Q, &[0x03], reg::RCX, ram(offset_of!(Ram, delta))); // add
        if n == 0 {
            found = Some(a.jmp());
            a.bind(outside);
        } else {
            fails.push(outside);
        }
    }
    if let Some(found) = found {
        a.bind(found);
    }
    if write {
        // Marked before the check, so that a translation made meanwhile sees it.
        a.load(Size::Q, I, Mem::Gs(off::CODE_MAP));
        a.shr(reg::RDX, 12);
        let flags = Mem::Sib(Some(I), Some((reg::RDX, 0)), 0);
        let test = |a: &mut Asm, bit: u8| {
            a.op_mem(Size::D, &[0xf6], 0, flags);
            a.bytes(&[bit]);
        };
        test(a, PAGE_CODE);
        fails.push(a.jcc(cc::NE));
        test(a, PAGE_WRITTEN);
        let marked = a.jcc(cc::NE);
        a.bytes(&[0xf0]); // lock or
        a.op_mem(Size::D, &[0x80], 1, flags);
        a.bytes(&[PAGE_WRITTEN]);
        a.bind(marked);
        test(a, PAGE_CODE);
        fails.push(a.jcc(cc::NE));
        a.op_reg(Size::Q, &[0xc1], 4, reg::RDX); // shl
        a.bytes(&[12]);
    }
    // RDX = guest-physical page and global bit, RAX = linear page
    a.op_mem(
        Size::Q,
        &[0x23],
        reg::RAX,
        Mem::Gs(structures(offset_of!(Structures, global))),
    ); // and
    a.shr(reg::RAX, 8);
    a.op_reg(Size::Q, &[0x09], reg::RAX, reg::RDX); // or
    a.mov(reg::RAX, T);
    a.alu_imm(Size::Q, 4, reg::RAX, -4096);
    a.mov(I, T);
    a.shr(I, 7);
    a.alu_imm(Size::D, 4, I, ((TLB_ENTRIES - 1) << 5) as i32);
    let tlb = tlb_base(which);
    let mut kept = None;
    if write {
        a.store(Size::Q, Mem::GsBase(I, tlb + 8), reg::RAX);
    } else {
        a.op_mem(Size::Q, &[0x3b], reg::RAX, Mem::GsBase(I, tlb)); // cmp
        let new = a.jcc(cc::NE);
        a.op_mem(Size::Q, &[0x3b], reg::RCX, Mem::GsBase(I, tlb + 16)); // cmp
        kept = Some(a.jcc(cc::E));
        a.bind(new);
        // A page of another index: it cannot match here.
        a.alu_imm(Size::Q, 6, reg::RAX, 4096);
        a.store(Size::Q, Mem::GsBase(I, tlb + 8), reg::RAX);
        a.alu_imm(Size::Q, 6, reg::RAX, 4096);
    }
    a.store(Size::Q, Mem::GsBase(I, tlb), reg::RAX);
    a.store(Size::Q, Mem::GsBase(I, tlb + 16), reg::RCX);
    a.store(Size::Q, Mem::GsBase(I, tlb + 24), reg::RDX);
    a.shr(I, 5 + GROUP_SHIFT as u8);
    a.bytes(&[0xf6, 0xc2, 1]); // test dl, 1
    let global = a.jcc(cc::NE);
    let filled = size_of_val(&[0u64; crate::layout::TLB_GROUPS / 64]) * which;
    let local = offset_of!(VcpuMem, caches.filled) + filled;
    a.op_mem(Size::Q, &[0x0f, 0xab], I, Mem::Gs(local as i32)); // bts
    let done = a.jmp();
    a.bind(global);
    let global = offset_of!(VcpuMem, caches.filled_global) + filled;
    a.op_mem(Size::Q, &[0x0f, 0xab], I, Mem::Gs(global as i32)); // bts
    a.bind(done);
    if let Some(kept) = kept {
        a.bind(kept);
    }
    a.op_mem(
        Size::Q,
        &[0xff],
        0,
        Mem::Gs(structures(offset_of!(Structures, refills))),
    ); // inc
    for (r, slot) in saved {
        a.load(Size::Q, r, Mem::Gs(slot));
    }
    a.bytes(&[0xf8, 0xc3]); // clc; ret
    for f in fails {
        a.bind(f);
    }
    for (r, slot) in saved {
        a.load(Size::Q, r, Mem::Gs(slot));
    }
    a.bytes(&[0xf9, 0xc3]); // stc; ret
}
