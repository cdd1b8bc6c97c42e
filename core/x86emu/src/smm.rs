//! System-management mode: what an SMI saves and RSM restores.
//!
//! The state-save area has KVM's layout: AMD's 64-bit one (AMD APM volume 2, "System-Management Mode",
//! revision 20064h) for processors with long mode, the 32-bit one of revision 20000h for others. Where the
//! manuals leave bytes to the processor, one holds the interrupt shadow, as in KVM.

use crate::bits::*;
use crate::control;
use crate::env::{Env, Exit, Flush, Stop};
use crate::state::{CpuState, DescriptorTable, Segment, sreg};

/// Bytes of the state-save area.
pub const AREA_SIZE: usize = 512;
/// Where it begins, counted from SMBASE.
pub const AREA_OFFSET: u64 = 0xfe00;
/// Where an SMI handler begins, counted from SMBASE.
const ENTRY: u64 = 0x8000;

const REVISION_64: u32 = 0x2_0064;
const REVISION_32: u32 = 0x2_0000;

/// The state-save area.
pub type Area = [u8; AREA_SIZE];

/// Offsets in the 64-bit area.
mod at64 {
    /// ES, CS, SS, DS, FS, GS; each selector, attributes, limit, base.
    pub const SEGMENTS: usize = 0x00;
    pub const GDTR: usize = 0x60;
    pub const LDTR: usize = 0x70;
    pub const IDTR: usize = 0x80;
    pub const TR: usize = 0x90;
    pub const SHADOW: usize = 0xcb;
    pub const EFER: usize = 0xd0;
    pub const REVISION: usize = 0xfc;
    pub const SMBASE: usize = 0x100;
    pub const CR4: usize = 0x148;
    pub const CR3: usize = 0x150;
    pub const CR0: usize = 0x158;
    pub const DR7: usize = 0x160;
    pub const DR6: usize = 0x168;
    pub const RFLAGS: usize = 0x170;
    pub const RIP: usize = 0x178;
    /// R15 first, RAX last.
    pub const RAX: usize = 0x1f8;
}

/// Offsets in the 32-bit area.
mod at32 {
    pub const SMBASE: usize = 0xf8;
    pub const REVISION: usize = 0xfc;
    pub const CR4: usize = 0x114;
    pub const SHADOW: usize = 0x11a;
    /// DS, FS, GS; each attributes, limit, base.
    pub const UPPER_SEGMENTS: usize = 0x12c;
    pub const IDTR: usize = 0x154;
    pub const TR: usize = 0x15c;
    pub const GDTR: usize = 0x170;
    pub const LDTR: usize = 0x178;
    /// ES, CS, SS.
    pub const LOWER_SEGMENTS: usize = 0x184;
    pub const SELECTORS: usize = 0x1a8;
    pub const LDTR_SELECTOR: usize = 0x1c0;
    pub const TR_SELECTOR: usize = 0x1c4;
    pub const DR7: usize = 0x1c8;
    pub const DR6: usize = 0x1cc;
    pub const GPRS: usize = 0x1d0;
    pub const EIP: usize = 0x1f0;
    pub const EFLAGS: usize = 0x1f4;
    pub const CR3: usize = 0x1f8;
    pub const CR0: usize = 0x1fc;

    /// Attributes, limit and base of a segment register by number.
    pub const fn segment(n: usize) -> usize {
        if n < 3 {
            LOWER_SEGMENTS + n * 12
        } else {
            UPPER_SEGMENTS + (n - 3) * 12
        }
    }
}

fn put<const N: usize>(area: &mut Area, at: usize, bytes: [u8; N]) {
    area[at..at + N].copy_from_slice(&bytes);
}

fn take<const N: usize>(area: &Area, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&area[at..at + N]);
    bytes
}

fn u16_at(area: &Area, at: usize) -> u16 {
    u16::from_le_bytes(take(area, at))
}

fn u32_at(area: &Area, at: usize) -> u32 {
    u32::from_le_bytes(take(area, at))
}

fn u64_at(area: &Area, at: usize) -> u64 {
    u64::from_le_bytes(take(area, at))
}

/// The state-save area of an SMI that arrives now. `long`: the processor has long mode.
pub fn save(cpu: &CpuState, smbase: u32, long: bool) -> Area {
    let mut area = [0; AREA_SIZE];
    if long {
        save_64(cpu, smbase, &mut area);
    } else {
        save_32(cpu, smbase, &mut area);
    }
    area
}

/// Access rights as saved: a register that holds no segment is not present.
fn attributes(s: &Segment) -> u16 {
    if s.unusable { s.attr & !0x80 } else { s.attr }
}

fn save_64(cpu: &CpuState, smbase: u32, area: &mut Area) {
    let segments = (0..).step_by(16).map(|at| at64::SEGMENTS + at);
    let system = [(at64::LDTR, &cpu.ldtr), (at64::TR, &cpu.tr)];
    for (at, s) in segments.zip(&cpu.seg).chain(system) {
        put(area, at, s.selector.to_le_bytes());
        put(area, at + 2, attributes(s).to_le_bytes());
        put(area, at + 4, s.limit.to_le_bytes());
        put(area, at + 8, s.base.to_le_bytes());
    }
    for (at, table) in [(at64::GDTR, cpu.gdtr), (at64::IDTR, cpu.idtr)] {
        put(area, at + 4, u32::from(table.limit).to_le_bytes());
        put(area, at + 8, table.base.to_le_bytes());
    }
    area[at64::SHADOW] = cpu.shadow;
    put(area, at64::REVISION, REVISION_64.to_le_bytes());
    put(area, at64::SMBASE, smbase.to_le_bytes());
    for (at, value) in [
        (at64::EFER, cpu.efer),
        (at64::CR4, cpu.cr4),
        (at64::CR3, cpu.cr3),
        (at64::CR0, cpu.cr0),
        (at64::DR7, cpu.dr7),
        (at64::DR6, cpu.dr6),
        (at64::RFLAGS, cpu.rflags),
        (at64::RIP, cpu.rip),
    ] {
        put(area, at, value.to_le_bytes());
    }
    for (n, value) in cpu.gpr.iter().enumerate() {
        put(area, at64::RAX - n * 8, value.to_le_bytes());
    }
}

fn save_32(cpu: &CpuState, smbase: u32, area: &mut Area) {
    let mut segment = |at: usize, selector_at: usize, s: &Segment| {
        put(area, selector_at, u32::from(s.selector).to_le_bytes());
        put(area, at, (u32::from(attributes(s)) << 8).to_le_bytes());
        put(area, at + 4, s.limit.to_le_bytes());
        put(area, at + 8, (s.base as u32).to_le_bytes());
    };
    for (n, s) in cpu.seg.iter().enumerate() {
        segment(at32::segment(n), at32::SELECTORS + n * 4, s);
    }
    segment(at32::LDTR, at32::LDTR_SELECTOR, &cpu.ldtr);
    segment(at32::TR, at32::TR_SELECTOR, &cpu.tr);
    for (at, table) in [(at32::GDTR, cpu.gdtr), (at32::IDTR, cpu.idtr)] {
        put(area, at, u32::from(table.limit).to_le_bytes());
        put(area, at + 4, (table.base as u32).to_le_bytes());
    }
    area[at32::SHADOW] = cpu.shadow;
    put(area, at32::REVISION, REVISION_32.to_le_bytes());
    put(area, at32::SMBASE, smbase.to_le_bytes());
    for (at, value) in [
        (at32::CR4, cpu.cr4),
        (at32::DR7, cpu.dr7),
        (at32::DR6, cpu.dr6),
        (at32::EIP, cpu.rip),
        (at32::EFLAGS, cpu.rflags),
        (at32::CR3, cpu.cr3),
        (at32::CR0, cpu.cr0),
    ] {
        put(area, at, (value as u32).to_le_bytes());
    }
    for (n, value) in cpu.gpr.iter().take(8).enumerate() {
        put(area, at32::GPRS + n * 4, (*value as u32).to_le_bytes());
    }
}

/// The registers at the start of an SMI handler. NMIs are blocked; the caller keeps in mind whether they
/// were before. Translations are the caller's to drop.
pub fn enter(cpu: &mut CpuState, smbase: u32) {
    cpu.smm = true;
    cpu.nmi_blocked = true;
    cpu.shadow = 0;
    cpu.rflags = 2;
    cpu.rip = ENTRY;
    cpu.cr0 &= !(CR0_PE | CR0_EM | CR0_TS | CR0_PG);
    cpu.cr4 = 0;
    cpu.efer = 0;
    cpu.idtr = DescriptorTable::default();
    cpu.dr7 = 0x400;
    cpu.cpl = 0;
    let flat = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0,
        // Present, granular, read and write data.
        attr: 0x8093,
        unusable: false,
    };
    cpu.seg = [flat; 6];
    cpu.seg[sreg::CS].base = smbase.into();
    cpu.seg[sreg::CS].selector = (smbase >> 4) as u16;
}

/// RSM with the state-save area at hand: leaves SMM and gives SMBASE from now on. Whether NMIs stay
/// blocked is the caller's to say.
///
/// # Errors
/// [`Exit::Shutdown`] for control registers that no processor could be in; the state is as before.
pub fn resume<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    area: &Area,
    long: bool,
) -> Result<u32, Stop> {
    let mut new = cpu.clone();
    let smbase = if long {
        load_64(&mut new, area)
    } else {
        load_32(&mut new, area)
    };
    new.rflags = new.rflags & ALL_FLAGS | 2;
    new.dr6 = new.dr6 & 0xe00f | 0xffff_0ff0;
    new.dr7 = new.dr7 & 0xffff_2bff | 0x400;
    new.cr0 |= CR0_ET;
    new.smm = false;
    check_control(&mut new, env)?;
    new.cpl = if new.cr0 & CR0_PE == 0 {
        0
    } else if new.rflags & VM != 0 {
        3
    } else {
        new.seg[sreg::SS].dpl()
    };
    *cpu = new;
    env.flush(Flush::All);
    Ok(smbase)
}

/// The rules that MOV to CR0, CR3, CR4 and EFER would have applied on the way.
fn check_control<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E) -> Result<(), Stop> {
    const CR0_DEFINED: u64 = CR0_PE
        | CR0_MP
        | CR0_EM
        | CR0_TS
        | CR0_ET
        | CR0_NE
        | CR0_WP
        | CR0_AM
        | CR0_NW
        | CR0_CD
        | CR0_PG;
    let features = *env.features();
    let paging = cpu.cr0 & CR0_PG != 0;
    cpu.efer &= !EFER_LMA;
    if paging && cpu.efer & EFER_LME != 0 {
        cpu.efer |= EFER_LMA;
    }
    let long = cpu.efer & EFER_LMA != 0;
    let bad = cpu.cr0 & !CR0_DEFINED != 0
        || paging && cpu.cr0 & CR0_PE == 0
        || cpu.cr0 & CR0_NW != 0 && cpu.cr0 & CR0_CD == 0
        || cpu.cr4 & !features.cr4_allowed != 0
        || cpu.efer & !(features.efer_allowed | EFER_LMA) != 0
        || long && cpu.cr4 & CR4_PAE == 0
        || !long && cpu.cr4 & CR4_PCIDE != 0;
    if bad {
        return Err(Stop::Exit(Exit::Shutdown));
    }
    if paging && !long && cpu.cr4 & CR4_PAE != 0 {
        cpu.pdptrs = control::load_pdptrs(env, cpu.cr3).map_err(|_| Stop::Exit(Exit::Shutdown))?;
    }
    Ok(())
}

fn load_64(cpu: &mut CpuState, area: &Area) -> u32 {
    let segment = |at: usize| {
        let attr = u16_at(area, at + 2) & 0xf0ff;
        Segment {
            selector: u16_at(area, at),
            attr,
            limit: u32_at(area, at + 4),
            base: u64_at(area, at + 8),
            unusable: attr & 0x80 == 0,
        }
    };
    for (n, s) in cpu.seg.iter_mut().enumerate() {
        *s = segment(at64::SEGMENTS + n * 16);
    }
    cpu.ldtr = segment(at64::LDTR);
    cpu.tr = segment(at64::TR);
    let table = |at: usize| DescriptorTable {
        limit: u32_at(area, at + 4) as u16,
        base: u64_at(area, at + 8),
    };
    cpu.gdtr = table(at64::GDTR);
    cpu.idtr = table(at64::IDTR);
    cpu.shadow = area[at64::SHADOW] & 3;
    cpu.efer = u64_at(area, at64::EFER);
    cpu.cr4 = u64_at(area, at64::CR4);
    cpu.cr3 = u64_at(area, at64::CR3);
    cpu.cr0 = u64_at(area, at64::CR0);
    cpu.dr7 = u64_at(area, at64::DR7);
    cpu.dr6 = u64_at(area, at64::DR6);
    cpu.rflags = u64_at(area, at64::RFLAGS);
    cpu.rip = u64_at(area, at64::RIP);
    for (n, value) in cpu.gpr.iter_mut().enumerate() {
        *value = u64_at(area, at64::RAX - n * 8);
    }
    u32_at(area, at64::SMBASE)
}

fn load_32(cpu: &mut CpuState, area: &Area) -> u32 {
    let segment = |at: usize, selector_at: usize| {
        let attr = (u32_at(area, at) >> 8) as u16 & 0xf0ff;
        Segment {
            selector: u32_at(area, selector_at) as u16,
            attr,
            limit: u32_at(area, at + 4),
            base: u32_at(area, at + 8).into(),
            unusable: attr & 0x80 == 0,
        }
    };
    for (n, s) in cpu.seg.iter_mut().enumerate() {
        *s = segment(at32::segment(n), at32::SELECTORS + n * 4);
    }
    cpu.ldtr = segment(at32::LDTR, at32::LDTR_SELECTOR);
    cpu.tr = segment(at32::TR, at32::TR_SELECTOR);
    let table = |at: usize| DescriptorTable {
        limit: u32_at(area, at) as u16,
        base: u32_at(area, at + 4).into(),
    };
    cpu.gdtr = table(at32::GDTR);
    cpu.idtr = table(at32::IDTR);
    cpu.shadow = area[at32::SHADOW] & 3;
    cpu.efer = 0;
    cpu.cr4 = u32_at(area, at32::CR4).into();
    cpu.cr3 = u32_at(area, at32::CR3).into();
    cpu.cr0 = u32_at(area, at32::CR0).into();
    cpu.dr7 = u32_at(area, at32::DR7).into();
    cpu.dr6 = u32_at(area, at32::DR6).into();
    cpu.rflags = u32_at(area, at32::EFLAGS).into();
    cpu.rip = u32_at(area, at32::EIP).into();
    for (n, value) in cpu.gpr.iter_mut().take(8).enumerate() {
        *value = u32_at(area, at32::GPRS + n * 4).into();
    }
    u32_at(area, at32::SMBASE)
}
