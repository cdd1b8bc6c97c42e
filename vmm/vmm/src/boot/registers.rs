//! State of the first vCPU at the kernel's entry: registers, GDT, page tables.

use kvm_bindings::{kvm_regs, kvm_segment};

use super::{Entry, Error, Target};
use crate::hypervisor::{self, Vcpu};
use crate::layout::{GDT, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PTE_PRESENT_WRITE: u64 = 3;
const PDE_LARGE: u64 = 1 << 7;
/// RFLAGS with nothing but the bit that is always one; interrupts are off.
const RFLAGS: u64 = 2;

const CODE64: u64 = 0x00af_9b00_0000_ffff;
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TSS: u64 = 0x0000_8b00_0000_ffff;
/// Linux's boot protocol wants code at selector 0x10 and data at 0x18.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

fn gdt(entry: Entry) -> [u64; 5] {
    let code = match entry {
        Entry::Linux64(_) => CODE64,
        Entry::Linux32(_) | Entry::Pvh(_) => CODE32,
    };
    [0, 0, code, DATA, TSS]
}

/// The segment register that loading `selector` with `descriptor` gives.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |n: u32| ((descriptor >> n) & 1) as u8;
    let limit = ((descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000)) as u32;
    let granular = bit(55);
    kvm_segment {
        base: ((descriptor >> 16) & 0xff_ffff) | ((descriptor >> 32) & 0xff00_0000),
        limit: if granular != 0 {
            (limit << 12) | 0xfff
        } else {
            limit
        },
        selector,
        type_: ((descriptor >> 40) & 0xf) as u8,
        s: bit(44),
        dpl: ((descriptor >> 45) & 3) as u8,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: granular,
        unusable: 0,
        padding: 0,
    }
}

/// Writes the GDT and, for a 64-bit entry, page tables that map the first 4 GiB one to one.
pub(super) fn write_tables(target: &Target<'_>, entry: Entry) -> Result<(), Error> {
    let bytes: Vec<u8> = gdt(entry).iter().flat_map(|d| d.to_le_bytes()).collect();
    target.write(GDT, &bytes)?;
    if !matches!(entry, Entry::Linux64(_)) {
        return Ok(());
    }
    let pdpt = PAGE_TABLES + 0x1000;
    let directories = PAGE_TABLES + 0x2000;
    target.write(PAGE_TABLES, &(pdpt | PTE_PRESENT_WRITE).to_le_bytes())?;
    let mut pages = Vec::with_capacity(4 * 4096);
    for gib in 0..4u64 {
        let directory = directories + gib * 0x1000;
        target.write(
            pdpt + gib * 8,
            &(directory | PTE_PRESENT_WRITE).to_le_bytes(),
        )?;
        for page in 0..512u64 {
            let address = (gib << 30) | (page << 21);
            pages.extend_from_slice(&(address | PTE_PRESENT_WRITE | PDE_LARGE).to_le_bytes());
        }
    }
    target.write(directories, &pages)
}

/// Puts the first vCPU at the kernel's entry.
///
/// # Errors
/// What the engine answers.
pub fn set_registers(vcpu: &Vcpu, entry: Entry) -> hypervisor::Result<()> {
    let gdt = gdt(entry);
    let mut sregs = vcpu.get_sregs()?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&gdt) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE_SELECTOR, gdt[2]);
    let data = segment(DATA_SELECTOR, gdt[3]);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS_SELECTOR, gdt[4]);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    let mut regs = kvm_regs {
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry {
        Entry::Linux64(rip) => {
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsi = ZERO_PAGE;
        }
        Entry::Linux32(eip) => {
            regs.rip = eip.into();
            regs.rsi = ZERO_PAGE;
        }
        Entry::Pvh(eip) => {
            regs.rip = eip.into();
            regs.rbx = PVH_START_INFO;
        }
    }
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)
}
