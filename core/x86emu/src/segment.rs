//! Segment registers: descriptors, loads with every check, and linear addresses.

use crate::bits::*;
use crate::env::{Env, Stop};
use crate::mem;
use crate::paging::{self, Access};
use crate::state::{CodeSize, CpuState, Segment, sreg};

/// System-descriptor types (Intel SDM, "System-Segment and Gate-Descriptor Types").
pub(crate) mod kind {
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS32: u8 = 9;
    pub const TSS32_BUSY: u8 = 11;
    pub const CALL_GATE32: u8 = 12;
    pub const INT_GATE32: u8 = 14;
    pub const TRAP_GATE32: u8 = 15;
}

/// A descriptor as it lies in the GDT or LDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The 8 bytes every descriptor has.
    pub raw: u64,
    /// The upper 8 bytes of 16-byte system descriptors, once read.
    pub upper: u64,
    /// Where it lies, linear.
    pub address: u64,
}

impl Descriptor {
    /// Type field (4 bits).
    pub fn kind(&self) -> u8 {
        (self.raw >> 40) as u8 & 0xf
    }
    /// Code or data (the S bit).
    pub fn is_user(&self) -> bool {
        self.raw & (1 << 44) != 0
    }
    /// A code segment.
    pub fn is_code(&self) -> bool {
        self.is_user() && self.kind() & 8 != 0
    }
    /// A data segment.
    pub fn is_data(&self) -> bool {
        self.is_user() && self.kind() & 8 == 0
    }
    /// A conforming code segment.
    pub fn conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    /// A writable data segment.
    pub fn writable(&self) -> bool {
        self.is_data() && self.kind() & 2 != 0
    }
    /// A data segment or a readable code segment.
    pub fn readable(&self) -> bool {
        self.is_data() || self.is_code() && self.kind() & 2 != 0
    }
    /// A system descriptor of one of `kinds`.
    pub fn is_system(&self, kinds: &[u8]) -> bool {
        !self.is_user() && kinds.contains(&self.kind())
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }
    /// The P bit.
    pub fn present(&self) -> bool {
        self.raw & (1 << 47) != 0
    }
    /// The L bit.
    pub fn long(&self) -> bool {
        self.raw & (1 << 53) != 0
    }
    /// The D/B bit.
    pub fn db(&self) -> bool {
        self.raw & (1 << 54) != 0
    }
    /// Base address, with the upper half of 16-byte descriptors.
    pub fn base(&self) -> u64 {
        ((self.raw >> 16) & 0xff_ffff)
            | ((self.raw >> 32) & 0xff00_0000)
            | ((self.upper & 0xffff_ffff) << 32)
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff) as u32 | ((self.raw >> 32) & 0xf_0000) as u32;
        if self.raw & (1 << 55) != 0 {
            (limit << 12) | 0xfff
        } else {
            limit
        }
    }
    /// Target selector of a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// Target offset of a gate, with the upper half of 64-bit gates.
    pub fn gate_offset(&self) -> u64 {
        (self.raw & 0xffff) | ((self.raw >> 32) & 0xffff_0000) | ((self.upper & 0xffff_ffff) << 32)
    }
    /// The register contents this descriptor makes.
    pub fn segment(&self, selector: u16) -> Segment {
        Segment {
            base: self.base(),
            limit: self.limit(),
            selector,
            attr: (self.raw >> 40) as u16 & 0xf0ff,
            unusable: false,
        }
    }
}

/// The selector as it appears in error codes.
pub(crate) fn selector_error(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// A null selector (index 0 of the GDT, any RPL).
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// The register contents of a null selector; `dpl` matters for SS in 64-bit mode only.
pub(crate) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        base: 0,
        limit: 0,
        selector,
        attr: u16::from(dpl & 3) << 5,
        unusable: true,
    }
}

/// Linear address of the descriptor of `selector`, if `size` bytes of it lie within the table.
fn descriptor_address(cpu: &CpuState, selector: u16, size: u32) -> Option<u64> {
    let offset = u32::from(selector & 0xfff8);
    let (base, limit) = if selector & 4 == 0 {
        (cpu.gdtr.base, u32::from(cpu.gdtr.limit))
    } else if cpu.ldtr.unusable {
        return None;
    } else {
        (cpu.ldtr.base, cpu.ldtr.limit)
    };
    if offset + size - 1 > limit {
        return None;
    }
    let address = base.wrapping_add(u64::from(offset));
    Some(if cpu.long_mode() {
        address
    } else {
        address & 0xffff_ffff
    })
}

/// Reads the descriptor of a selector that is not null; `fault` makes the exception for a selector
/// beyond its table.
#[inline]
pub fn read_descriptor<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    fault: fn(u32) -> Stop,
) -> Result<Descriptor, Stop> {
    let Some(address) = descriptor_address(cpu, selector, 8) else {
        return Err(fault(selector_error(selector)));
    };
    let raw = mem::read_int(cpu, env, address, 8, Access::SYSTEM_READ)?;
    Ok(Descriptor {
        raw,
        upper: 0,
        address,
    })
}

/// Completes a system descriptor with its upper 8 bytes where long mode makes it 16 bytes long.
pub(crate) fn read_upper<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    descriptor: &mut Descriptor,
    fault: fn(u32) -> Stop,
) -> Result<(), Stop> {
    if !cpu.long_mode() {
        return Ok(());
    }
    let Some(address) = descriptor_address(cpu, selector, 16) else {
        return Err(fault(selector_error(selector)));
    };
    let upper = address.wrapping_add(8);
    descriptor.upper = mem::read_int(cpu, env, upper, 8, Access::SYSTEM_READ)?;
    // The type field of the second half must be 0, so that it is no descriptor of its own.
    if (descriptor.upper >> 40) & 0x1f != 0 {
        return Err(fault(selector_error(selector)));
    }
    Ok(())
}

/// Sets the accessed bit of a code or data descriptor, in memory and in the copy.
#[inline]
pub(crate) fn set_accessed<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    descriptor: &mut Descriptor,
) -> Result<(), Stop> {
    if descriptor.raw & (1 << 40) == 0 {
        mem::update_byte(cpu, env, descriptor.address.wrapping_add(5), 1, 0)?;
        descriptor.raw |= 1 << 40;
    }
    Ok(())
}

/// What a segment register holds after a load in real mode: base and selector change, the rest of the
/// hidden part stays ("unreal mode").
pub(crate) fn real_segment(old: &Segment, selector: u16) -> Segment {
    Segment {
        base: u64::from(selector) << 4,
        selector,
        unusable: false,
        ..*old
    }
}

/// What a segment register holds in virtual-8086 mode.
pub(crate) fn v86_segment(selector: u16) -> Segment {
    Segment {
        base: u64::from(selector) << 4,
        limit: 0xffff,
        selector,
        attr: 0xf3,
        unusable: false,
    }
}

/// Checks a new stack segment for privilege level `cpl`, with `fault` for everything but a segment
/// that is not present, and gives its register contents. `selector` is not null.
pub(crate) fn stack_segment<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    cpl: u8,
    fault: fn(u32) -> Stop,
) -> Result<Segment, Stop> {
    let mut descriptor = read_descriptor(cpu, env, selector, fault)?;
    let error = selector_error(selector);
    if (selector & 3) as u8 != cpl || !descriptor.writable() || descriptor.dpl() != cpl {
        return Err(fault(error));
    }
    if !descriptor.present() {
        return Err(Stop::ss(error));
    }
    set_accessed(cpu, env, &mut descriptor)?;
    Ok(descriptor.segment(selector))
}

/// Checks a selector for DS, ES, FS or GS in protected mode; `fault` as for [`stack_segment`].
pub(crate) fn data_segment<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    cpl: u8,
    fault: fn(u32) -> Stop,
) -> Result<Segment, Stop> {
    if is_null(selector) {
        return Ok(null_segment(selector, 0));
    }
    let mut descriptor = read_descriptor(cpu, env, selector, fault)?;
    let error = selector_error(selector);
    let rpl = (selector & 3) as u8;
    let too_low = rpl > descriptor.dpl() || cpl > descriptor.dpl();
    if !descriptor.readable() || !descriptor.conforming() && too_low {
        return Err(fault(error));
    }
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    set_accessed(cpu, env, &mut descriptor)?;
    Ok(descriptor.segment(selector))
}

/// Checks a selector for MOV, POP or LDS-type loads of `register` (not CS) in any mode and gives the
/// register contents; the caller stores them when the instruction retires.
pub fn prepare<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    register: usize,
    selector: u16,
) -> Result<Segment, Stop> {
    let register = register.min(5);
    if !cpu.protected() {
        return Ok(real_segment(&cpu.seg[register], selector));
    }
    if cpu.v86() {
        return Ok(v86_segment(selector));
    }
    if register != sreg::SS {
        return data_segment(cpu, env, selector, cpu.cpl, Stop::gp);
    }
    if is_null(selector) {
        // 64-bit mode runs without a stack segment below CPL 3.
        if cpu.code_size() == CodeSize::Bits64 && cpu.cpl != 3 && (selector & 3) as u8 == cpu.cpl {
            return Ok(null_segment(selector, cpu.cpl));
        }
        return Err(Stop::gp(0));
    }
    stack_segment(cpu, env, selector, cpu.cpl, Stop::gp)
}

/// Loads a segment register other than CS (MOV, POP, LDS, LES, LSS, LFS, LGS).
pub fn load<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    register: usize,
    selector: u16,
) -> Result<(), Stop> {
    let segment = prepare(cpu, env, register, selector)?;
    cpu.seg[register.min(5)] = segment;
    Ok(())
}

/// LLDT and LTR exist in protected mode at CPL 0.
fn system_load_allowed(cpu: &CpuState) -> Result<(), Stop> {
    if !cpu.protected() || cpu.v86() {
        return Err(Stop::ud());
    }
    if cpu.cpl != 0 {
        return Err(Stop::gp(0));
    }
    Ok(())
}

/// LLDT.
pub fn lldt<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, selector: u16) -> Result<(), Stop> {
    system_load_allowed(cpu)?;
    cpu.ldtr = ldt_segment(cpu, env, selector, Stop::gp)?;
    Ok(())
}

/// The LDTR contents of `selector`, with `fault` for everything but a segment that is not present.
pub(crate) fn ldt_segment<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    fault: fn(u32) -> Stop,
) -> Result<Segment, Stop> {
    if is_null(selector) {
        return Ok(null_segment(selector, 0));
    }
    let error = selector_error(selector);
    if selector & 4 != 0 {
        return Err(fault(error));
    }
    let mut descriptor = read_descriptor(cpu, env, selector, fault)?;
    if !descriptor.is_system(&[kind::LDT]) {
        return Err(fault(error));
    }
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    read_upper(cpu, env, selector, &mut descriptor, fault)?;
    if !paging::canonical(cpu, descriptor.base()) {
        return Err(fault(error));
    }
    Ok(descriptor.segment(selector))
}

/// LTR.
pub fn ltr<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, selector: u16) -> Result<(), Stop> {
    system_load_allowed(cpu)?;
    if is_null(selector) {
        return Err(Stop::gp(0));
    }
    let error = selector_error(selector);
    if selector & 4 != 0 {
        return Err(Stop::gp(error));
    }
    let mut descriptor = read_descriptor(cpu, env, selector, Stop::gp)?;
    let allowed = descriptor.is_system(&[kind::TSS32])
        || !cpu.long_mode() && descriptor.is_system(&[kind::TSS16]);
    if !allowed {
        return Err(Stop::gp(error));
    }
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    read_upper(cpu, env, selector, &mut descriptor, Stop::gp)?;
    if !paging::canonical(cpu, descriptor.base()) {
        return Err(Stop::gp(error));
    }
    mem::update_byte(cpu, env, descriptor.address.wrapping_add(5), 2, 0)?;
    descriptor.raw |= 2 << 40;
    cpu.tr = descriptor.segment(selector);
    Ok(())
}

/// The descriptor that LAR, LSL, VERR or VERW may look at; `None` clears ZF. They exist in protected
/// mode only.
fn visible<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    system: &[u8],
) -> Result<Option<Descriptor>, Stop> {
    if !cpu.protected() || cpu.v86() {
        return Err(Stop::ud());
    }
    if is_null(selector) || descriptor_address(cpu, selector, 8).is_none() {
        return Ok(None);
    }
    let mut descriptor = read_descriptor(cpu, env, selector, Stop::gp)?;
    if !descriptor.is_user() {
        if !system.contains(&descriptor.kind()) {
            return Ok(None);
        }
        if cpu.long_mode() {
            if descriptor_address(cpu, selector, 16).is_none() {
                return Ok(None);
            }
            let at = descriptor.address.wrapping_add(8);
            descriptor.upper = mem::read_int(cpu, env, at, 8, Access::SYSTEM_READ)?;
            if (descriptor.upper >> 40) & 0x1f != 0 {
                return Ok(None);
            }
        }
    }
    let rpl = (selector & 3) as u8;
    if !descriptor.conforming() && (cpu.cpl > descriptor.dpl() || rpl > descriptor.dpl()) {
        return Ok(None);
    }
    Ok(Some(descriptor))
}

/// LAR: the access rights, or `None` for ZF = 0.
pub fn lar<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
) -> Result<Option<u32>, Stop> {
    let system: &[u8] = if cpu.long_mode() {
        &[kind::LDT, kind::TSS32, kind::TSS32_BUSY, kind::CALL_GATE32]
    } else {
        &[
            kind::TSS16,
            kind::LDT,
            kind::TSS16_BUSY,
            kind::CALL_GATE16,
            kind::TASK_GATE,
            kind::TSS32,
            kind::TSS32_BUSY,
            kind::CALL_GATE32,
        ]
    };
    let descriptor = visible(cpu, env, selector, system)?;
    Ok(descriptor.map(|d| (d.raw >> 32) as u32 & 0x00ff_ff00))
}

/// LSL: the limit in bytes, or `None` for ZF = 0.
pub fn lsl<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
) -> Result<Option<u32>, Stop> {
    let system: &[u8] = if cpu.long_mode() {
        &[kind::LDT, kind::TSS32, kind::TSS32_BUSY]
    } else {
        &[
            kind::TSS16,
            kind::LDT,
            kind::TSS16_BUSY,
            kind::TSS32,
            kind::TSS32_BUSY,
        ]
    };
    Ok(visible(cpu, env, selector, system)?.map(|d| d.limit()))
}

/// VERR (`write` false) and VERW: the new ZF.
pub fn verify<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    write: bool,
) -> Result<bool, Stop> {
    let descriptor = visible(cpu, env, selector, &[])?;
    Ok(descriptor.is_some_and(|d| if write { d.writable() } else { d.readable() }))
}

/// Whether `size` bytes at `offset` lie within the limit of a segment outside 64-bit mode.
pub(crate) fn within_limit(segment: &Segment, offset: u64, size: u64) -> bool {
    let last = offset + size.max(1) - 1;
    let limit = u64::from(segment.limit);
    if segment.attr & 0x1c == 0x14 {
        // Expand-down data: valid offsets lie above the limit.
        let top = if segment.db() { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        // A flat 4 GiB segment wraps.
        last <= limit || limit == 0xffff_ffff
    }
}

/// Linear address of `size` bytes at `offset` in a segment outside 64-bit mode; `None` where the
/// limit, the type or a null selector forbids it.
pub(crate) fn linear_in(
    cpu: &CpuState,
    segment: &Segment,
    offset: u64,
    size: usize,
    access: Access,
) -> Option<u64> {
    let offset = offset & 0xffff_ffff;
    if segment.unusable || !within_limit(segment, offset, size as u64) {
        return None;
    }
    if cpu.protected() && !cpu.v86() && !access.fetch {
        let code = segment.attr & 8 != 0;
        let rw = segment.attr & 2 != 0;
        if access.write && (code || !rw) || code && !rw {
            return None;
        }
    }
    Some(segment.base.wrapping_add(offset) & 0xffff_ffff)
}

/// Linear address of `size` bytes at `offset` in the segment register with index `seg`, with limit,
/// type and canonical checks. The offset is already truncated to the address size.
///
/// Errors: #SS(0) through SS, #GP(0) otherwise.
#[inline]
pub fn linearize(
    cpu: &CpuState,
    seg: usize,
    offset: u64,
    size: usize,
    access: Access,
) -> Result<u64, Stop> {
    let seg = seg.min(5);
    if cpu.efer & EFER_LMA != 0 && cpu.seg[sreg::CS].long() {
        let linear = if seg >= sreg::FS {
            offset.wrapping_add(cpu.seg[seg].base)
        } else {
            offset
        };
        let last = linear.wrapping_add(size.saturating_sub(1) as u64);
        if paging::canonical(cpu, linear) && paging::canonical(cpu, last) {
            return Ok(linear);
        }
    } else if let Some(linear) = linear_in(cpu, &cpu.seg[seg], offset, size, access) {
        return Ok(linear);
    }
    Err(if seg == sreg::SS {
        Stop::ss(0)
    } else {
        Stop::gp(0)
    })
}
