//! Hardware task switches (Intel SDM, "Task Management").
//!
//! Up to the point where the new task's registers are in place a fault leaves the old task
//! untouched; faults in its segment registers belong to the new task, as on the processor.

use crate::bits::*;
use crate::control;
use crate::env::{Env, Exception, Flush, Stop};
use crate::mem;
use crate::paging::Access;
use crate::segment::{self, kind, null_segment, selector_error};
use crate::stack::Stack;
use crate::state::{CpuState, Segment, gpr, sreg};

/// What asks for the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// JMP to a TSS or task gate.
    Jump,
    /// CALL to a TSS or task gate.
    Call,
    /// IRET with NT set.
    Iret,
    /// An interrupt or exception through a task gate.
    Gate,
}

/// A task switch to make.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Selector of the new TSS.
    pub selector: u16,
    /// What asks for it.
    pub reason: Reason,
    /// EIP to save in the old TSS.
    pub next_rip: u64,
    /// Error code to push on the new task's stack.
    pub error: Option<u32>,
}

/// Bit 15 of DR6: a task switch to a TSS with its T bit set.
const DR6_BT: u64 = 1 << 15;
/// DR7's local enable bits.
const DR7_LOCAL: u64 = 0x155;

/// The dynamic part of a TSS, independent of its format.
struct TaskState {
    cr3: Option<u64>,
    eip: u64,
    eflags: u64,
    gpr: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    sreg: [u16; 6],
    ldt: u16,
    trap: bool,
}

const TSS32_SIZE: usize = 104;
const TSS16_SIZE: usize = 44;

fn field(bytes: &[u8], offset: usize, size: usize) -> u64 {
    let mut value = [0; 8];
    if let Some(source) = bytes.get(offset..offset + size) {
        value[..size].copy_from_slice(source);
    }
    u64::from_le_bytes(value)
}

fn parse_32(bytes: &[u8]) -> TaskState {
    TaskState {
        cr3: Some(field(bytes, 0x1c, 4)),
        eip: field(bytes, 0x20, 4),
        eflags: field(bytes, 0x24, 4),
        gpr: core::array::from_fn(|i| field(bytes, 0x28 + 4 * i, 4)),
        sreg: core::array::from_fn(|i| field(bytes, 0x48 + 4 * i, 2) as u16),
        ldt: field(bytes, 0x60, 2) as u16,
        trap: field(bytes, 0x64, 1) & 1 != 0,
    }
}

fn parse_16(bytes: &[u8]) -> TaskState {
    TaskState {
        cr3: None,
        eip: field(bytes, 0x0e, 2),
        eflags: field(bytes, 0x10, 2),
        gpr: core::array::from_fn(|i| field(bytes, 0x12 + 2 * i, 2) | 0xffff_0000),
        sreg: core::array::from_fn(|i| {
            if i < 4 {
                field(bytes, 0x22 + 2 * i, 2) as u16
            } else {
                0
            }
        }),
        ldt: field(bytes, 0x2a, 2) as u16,
        trap: false,
    }
}

/// Writes the old task's registers to its TSS.
fn save<E: Env + ?Sized>(cpu: &CpuState, env: &mut E, eip: u64, eflags: u64) -> Result<(), Stop> {
    let wide = cpu.tr.attr & 8 != 0;
    let (start, size, width) = if wide { (0x20, 64, 4) } else { (0x0e, 28, 2) };
    if cpu.tr.unusable || (cpu.tr.limit as usize) < start + size - 1 {
        return Err(Stop::ts(selector_error(cpu.tr.selector)));
    }
    let mut bytes = [0u8; 64];
    let registers = [eip, eflags]
        .into_iter()
        .chain(cpu.gpr[..8].iter().copied());
    let selectors = cpu.seg.iter().map(|s| u64::from(s.selector));
    for (slot, value) in bytes[..size]
        .chunks_exact_mut(width)
        .zip(registers.chain(selectors))
    {
        slot.copy_from_slice(&value.to_le_bytes()[..width]);
    }
    let address = cpu.tr.base.wrapping_add(start as u64) & 0xffff_ffff;
    mem::write_linear(cpu, env, address, &bytes[..size], Access::SYSTEM_WRITE)
}

/// Switches tasks. Task switches do not exist in long mode; callers never ask for one there.
///
/// Errors: see the module; also #DB with BT set, raised in the new task after a complete switch to
/// a TSS with the T bit.
pub fn switch<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    request: Request,
) -> Result<(), Stop> {
    let returning = request.reason == Reason::Iret;
    let nesting = matches!(request.reason, Reason::Call | Reason::Gate);
    let fault: fn(u32) -> Stop = if returning { Stop::ts } else { Stop::gp };
    let selector = request.selector;
    let error = selector_error(selector);
    if selector & 4 != 0 || segment::is_null(selector) {
        return Err(fault(error));
    }
    let mut descriptor = segment::read_descriptor(cpu, env, selector, fault)?;
    let wanted: &[u8] = if returning {
        &[kind::TSS16_BUSY, kind::TSS32_BUSY]
    } else {
        &[kind::TSS16, kind::TSS32]
    };
    if !descriptor.is_system(wanted) {
        return Err(fault(error));
    }
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    let wide = descriptor.kind() & 8 != 0;
    let size = if wide { TSS32_SIZE } else { TSS16_SIZE };
    if (descriptor.limit() as usize) < size - 1 {
        return Err(Stop::ts(error));
    }
    let mut bytes = [0; TSS32_SIZE];
    let base = descriptor.base();
    mem::read_linear(cpu, env, base, &mut bytes[..size], Access::SYSTEM_READ)?;
    let state = if wide {
        parse_32(&bytes)
    } else {
        parse_16(&bytes[..TSS16_SIZE])
    };

    let mut old_flags = cpu.rflags;
    if returning {
        old_flags &= !NT;
    }
    let old_tr = cpu.tr.selector;
    save(cpu, env, request.next_rip, old_flags)?;
    if nesting {
        let link = u64::from(old_tr);
        mem::write_int(cpu, env, base, link, 2, Access::SYSTEM_WRITE)?;
    } else if let Ok(old) = segment::read_descriptor(cpu, env, old_tr & !7, Stop::ts) {
        mem::update_byte(cpu, env, old.address.wrapping_add(5), 0, 2)?;
    }
    if !returning {
        mem::update_byte(cpu, env, descriptor.address.wrapping_add(5), 2, 0)?;
        descriptor.raw |= 2 << 40;
    }
    cpu.tr = descriptor.segment(selector);
    enter(cpu, env, &state, nesting)?;
    if let Some(code) = request.error {
        let mut stack = Stack::current(cpu);
        let width = if wide { 4 } else { 2 };
        stack.push(cpu, env, &[u64::from(code)], width)?;
        cpu.gpr[gpr::RSP] = stack.pointer;
    }
    if state.trap {
        return Err(Stop::Exception(Exception {
            vector: 1,
            error: None,
            payload: DR6_BT,
        }));
    }
    Ok(())
}

/// Loads the new task's state.
fn enter<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    state: &TaskState,
    nesting: bool,
) -> Result<(), Stop> {
    cpu.cr0 |= CR0_TS;
    cpu.dr7 &= !DR7_LOCAL;
    cpu.shadow = 0;
    cpu.rip = state.eip;
    cpu.rflags = (state.eflags & ALL_FLAGS) | 2;
    if nesting {
        cpu.rflags |= NT;
    }
    for (register, value) in cpu.gpr.iter_mut().zip(state.gpr) {
        *register = value;
    }
    let v86 = cpu.v86();
    cpu.cpl = if v86 {
        3
    } else {
        (state.sreg[sreg::CS] & 3) as u8
    };
    for (register, &selector) in cpu.seg.iter_mut().zip(&state.sreg) {
        *register = if v86 {
            segment::v86_segment(selector)
        } else {
            null_segment(selector, 0)
        };
    }
    cpu.ldtr = null_segment(state.ldt, 0);
    if let Some(cr3) = state.cr3
        && cpu.cr0 & CR0_PG != 0
    {
        cpu.cr3 = cr3;
        env.flush(Flush::Pcid(control::current_pcid(cpu)));
        if cpu.cr4 & CR4_PAE != 0 {
            cpu.pdptrs = control::load_pdptrs(env, cr3)?;
        }
    }
    cpu.ldtr = segment::ldt_segment(cpu, env, state.ldt, Stop::ts)
        .map_err(|stop| np_as_ts(stop, state.ldt))?;
    if v86 {
        return Ok(());
    }
    cpu.seg[sreg::CS] = code_segment(cpu, env, state.sreg[sreg::CS])?;
    let ss = state.sreg[sreg::SS];
    if segment::is_null(ss) {
        return Err(Stop::ts(selector_error(ss)));
    }
    cpu.seg[sreg::SS] = segment::stack_segment(cpu, env, ss, cpu.cpl, Stop::ts)?;
    for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
        let selector = state.sreg[index];
        cpu.seg[index] = segment::data_segment(cpu, env, selector, cpu.cpl, Stop::ts)?;
    }
    if cpu.rip > u64::from(cpu.seg[sreg::CS].limit) {
        return Err(Stop::gp(0));
    }
    Ok(())
}

/// A new task's LDT that is not present is an invalid TSS.
fn np_as_ts(stop: Stop, selector: u16) -> Stop {
    match stop {
        Stop::Exception(Exception { vector: 11, .. }) => Stop::ts(selector_error(selector)),
        other => other,
    }
}

fn code_segment<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
) -> Result<Segment, Stop> {
    let error = selector_error(selector);
    if segment::is_null(selector) {
        return Err(Stop::ts(error));
    }
    let mut descriptor = segment::read_descriptor(cpu, env, selector, Stop::ts)?;
    let rpl = (selector & 3) as u8;
    let allowed = if descriptor.conforming() {
        descriptor.dpl() <= rpl
    } else {
        descriptor.dpl() == rpl
    };
    if !descriptor.is_code() || !allowed {
        return Err(Stop::ts(error));
    }
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    segment::set_accessed(cpu, env, &mut descriptor)?;
    Ok(descriptor.segment(selector))
}
