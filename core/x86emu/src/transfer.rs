//! Far transfers: CALL, JMP, RET and IRET between segments, privilege levels, tasks and modes, the
//! system-call instructions, and the software-interrupt front ends.

use crate::bits::*;
use crate::control;
use crate::env::{Env, Stop};
use crate::event::{self, Event, Kind};
use crate::mem;
use crate::paging::{self, Access};
use crate::segment::{self, Descriptor, kind, null_segment, selector_error};
use crate::stack::{MAX_ITEMS, Stack};
use crate::state::{CodeSize, CpuState, Segment, gpr, sreg};
use crate::task::{self, Reason};

/// The bits of an operand of `size` bytes.
fn mask(size: usize) -> u64 {
    match size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// #GP(0) unless `rip` can be fetched from in code segment `cs`.
fn check_rip(cpu: &CpuState, cs: &Segment, rip: u64) -> Result<(), Stop> {
    let valid = if cpu.long_mode() && cs.long() {
        paging::canonical(cpu, rip)
    } else {
        rip <= u64::from(cs.limit)
    };
    if valid { Ok(()) } else { Err(Stop::gp(0)) }
}

/// L and D together are reserved in long mode.
fn check_code_bits(cpu: &CpuState, descriptor: &Descriptor, error: u32) -> Result<(), Stop> {
    if cpu.long_mode() && descriptor.long() && descriptor.db() {
        return Err(Stop::gp(error));
    }
    Ok(())
}

/// The CS contents of a far transfer in real or virtual-8086 mode.
fn real_code(cpu: &CpuState, selector: u16) -> Segment {
    if cpu.v86() {
        segment::v86_segment(selector)
    } else {
        segment::real_segment(&cpu.seg[sreg::CS], selector)
    }
}

fn unprotected(cpu: &CpuState) -> bool {
    !cpu.protected() || cpu.v86()
}

/// A direct far JMP or CALL to a code segment: no change of privilege.
fn direct<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    mut descriptor: Descriptor,
    rip: u64,
) -> Result<Segment, Stop> {
    let error = selector_error(selector);
    let rpl = (selector & 3) as u8;
    let allowed = if descriptor.conforming() {
        descriptor.dpl() <= cpu.cpl
    } else {
        rpl <= cpu.cpl && descriptor.dpl() == cpu.cpl
    };
    if !descriptor.is_code() || !allowed {
        return Err(Stop::gp(error));
    }
    check_code_bits(cpu, &descriptor, error)?;
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    let cs = descriptor.segment((selector & 0xfffc) | u16::from(cpu.cpl));
    check_rip(cpu, &cs, rip)?;
    segment::set_accessed(cpu, env, &mut descriptor)?;
    Ok(descriptor.segment(cs.selector))
}

/// Privilege and presence of a call gate, task gate or TSS that a selector names.
fn check_gate(cpu: &CpuState, selector: u16, descriptor: &Descriptor) -> Result<(), Stop> {
    let error = selector_error(selector);
    if descriptor.dpl() < cpu.cpl || (selector & 3) as u8 > descriptor.dpl() {
        return Err(Stop::gp(error));
    }
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    Ok(())
}

/// Where a call gate leads.
struct GateTarget {
    cs: Segment,
    rip: u64,
    /// Operand size of the frame.
    size: usize,
    cpl: u8,
    params: usize,
}

fn call_gate<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    mut gate: Descriptor,
    call: bool,
) -> Result<GateTarget, Stop> {
    check_gate(cpu, selector, &gate)?;
    let long = cpu.long_mode();
    segment::read_upper(cpu, env, selector, &mut gate, Stop::gp)?;
    let target = gate.gate_selector();
    if segment::is_null(target) {
        return Err(Stop::gp(0));
    }
    let mut code = segment::read_descriptor(cpu, env, target, Stop::gp)?;
    let error = selector_error(target);
    let reachable = code.is_code() && code.dpl() <= cpu.cpl;
    let same_only = !call && !code.conforming() && code.dpl() != cpu.cpl;
    if !reachable || same_only || long && (!code.long() || code.db()) {
        return Err(Stop::gp(error));
    }
    if !code.present() {
        return Err(Stop::np(error));
    }
    let cpl = if code.conforming() {
        cpu.cpl
    } else {
        code.dpl()
    };
    let wide = gate.kind() & 8 != 0;
    let (size, rip) = match (long, wide) {
        (true, _) => (8, gate.gate_offset()),
        (false, true) => (4, gate.gate_offset()),
        (false, false) => (2, gate.gate_offset() & 0xffff),
    };
    let cs = code.segment((target & 0xfffc) | u16::from(cpl));
    check_rip(cpu, &cs, rip)?;
    segment::set_accessed(cpu, env, &mut code)?;
    Ok(GateTarget {
        cs: code.segment(cs.selector),
        rip,
        size,
        cpl,
        params: if long {
            0
        } else {
            (gate.raw >> 32) as usize & 0x1f
        },
    })
}

/// A far JMP or CALL that turns out to be a task switch, if it is one.
fn task_switch<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    selector: u16,
    descriptor: &Descriptor,
    reason: Reason,
    next_rip: u64,
) -> Result<(), Stop> {
    let allowed = [kind::TASK_GATE, kind::TSS16, kind::TSS32];
    if cpu.long_mode() || !descriptor.is_system(&allowed) {
        return Err(Stop::gp(selector_error(selector)));
    }
    check_gate(cpu, selector, descriptor)?;
    let selector = if descriptor.kind() == kind::TASK_GATE {
        descriptor.gate_selector()
    } else {
        selector
    };
    let request = task::Request {
        selector,
        reason,
        next_rip,
        error: None,
    };
    task::switch(cpu, env, request)
}

/// Whether a descriptor is a call gate in the current mode.
fn is_call_gate(cpu: &CpuState, descriptor: &Descriptor) -> bool {
    descriptor.is_system(&[kind::CALL_GATE32])
        || !cpu.long_mode() && descriptor.is_system(&[kind::CALL_GATE16])
}

/// Far JMP with an operand size of `size` bytes; `next_rip` is saved if it switches tasks.
pub fn far_jump<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    selector: u16,
    offset: u64,
    size: usize,
    next_rip: u64,
) -> Result<(), Stop> {
    let mut rip = offset & mask(size);
    let cs = if unprotected(cpu) {
        let cs = real_code(cpu, selector);
        check_rip(cpu, &cs, rip)?;
        cs
    } else {
        if segment::is_null(selector) {
            return Err(Stop::gp(0));
        }
        let descriptor = segment::read_descriptor(cpu, env, selector, Stop::gp)?;
        if descriptor.is_user() {
            direct(cpu, env, selector, descriptor, rip)?
        } else if is_call_gate(cpu, &descriptor) {
            let target = call_gate(cpu, env, selector, descriptor, false)?;
            rip = target.rip;
            target.cs
        } else {
            return task_switch(cpu, env, selector, &descriptor, Reason::Jump, next_rip);
        }
    };
    cpu.seg[sreg::CS] = cs;
    cpu.rip = rip;
    Ok(())
}

/// Far CALL with an operand size of `size` bytes; `next_rip` is the return address.
pub fn far_call<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    selector: u16,
    offset: u64,
    size: usize,
    next_rip: u64,
) -> Result<(), Stop> {
    let rip = offset & mask(size);
    let link = [u64::from(cpu.seg[sreg::CS].selector), next_rip];
    let mut stack = Stack::current(cpu);
    if unprotected(cpu) {
        let cs = real_code(cpu, selector);
        check_rip(cpu, &cs, rip)?;
        stack.push(cpu, env, &link, size)?;
        cpu.gpr[gpr::RSP] = stack.pointer;
        cpu.seg[sreg::CS] = cs;
        cpu.rip = rip;
        return Ok(());
    }
    if segment::is_null(selector) {
        return Err(Stop::gp(0));
    }
    let descriptor = segment::read_descriptor(cpu, env, selector, Stop::gp)?;
    if descriptor.is_user() {
        let cs = direct(cpu, env, selector, descriptor, rip)?;
        stack.push(cpu, env, &link, size)?;
        cpu.gpr[gpr::RSP] = stack.pointer;
        cpu.seg[sreg::CS] = cs;
        cpu.rip = rip;
        return Ok(());
    }
    if !is_call_gate(cpu, &descriptor) {
        return task_switch(cpu, env, selector, &descriptor, Reason::Call, next_rip);
    }
    let target = call_gate(cpu, env, selector, descriptor, true)?;
    if target.cpl == cpu.cpl {
        // A 64-bit gate leads to 64-bit code, whose stack is flat, from compatibility mode too.
        stack.flat = cpu.long_mode();
        stack.push(cpu, env, &link, target.size)?;
    } else {
        let mut frame = [0; MAX_ITEMS];
        frame[0] = u64::from(cpu.seg[sreg::SS].selector);
        frame[1] = cpu.gpr[gpr::RSP];
        let end = 2 + target.params.min(31);
        stack.peek(cpu, env, 0, &mut frame[2..end], target.size)?;
        frame[2..end].reverse();
        frame[end..end + 2].copy_from_slice(&link);
        stack = event::inner_stack(cpu, env, target.cpl)?;
        stack.push(cpu, env, &frame[..end + 2], target.size)?;
        cpu.seg[sreg::SS] = stack.segment;
        cpu.cpl = target.cpl;
    }
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.seg[sreg::CS] = target.cs;
    cpu.rip = target.rip;
    Ok(())
}

/// Checks the code segment that RET or IRET return to.
fn return_code<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    rip: u64,
) -> Result<Segment, Stop> {
    if segment::is_null(selector) {
        return Err(Stop::gp(0));
    }
    let mut descriptor = segment::read_descriptor(cpu, env, selector, Stop::gp)?;
    let error = selector_error(selector);
    let rpl = (selector & 3) as u8;
    let allowed = if descriptor.conforming() {
        descriptor.dpl() <= rpl
    } else {
        descriptor.dpl() == rpl
    };
    if !descriptor.is_code() || rpl < cpu.cpl || !allowed {
        return Err(Stop::gp(error));
    }
    check_code_bits(cpu, &descriptor, error)?;
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    check_rip(cpu, &descriptor.segment(selector), rip)?;
    segment::set_accessed(cpu, env, &mut descriptor)?;
    Ok(descriptor.segment(selector))
}

/// Checks the stack segment that an outer return (or any 64-bit IRET) loads.
fn return_stack<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
    cs: &Segment,
) -> Result<Segment, Stop> {
    let rpl = (cs.selector & 3) as u8;
    if segment::is_null(selector) {
        let allowed = cpu.long_mode() && cs.long() && rpl != 3 && (selector & 3) as u8 == rpl;
        return if allowed {
            Ok(null_segment(selector, rpl))
        } else {
            Err(Stop::gp(0))
        };
    }
    segment::stack_segment(cpu, env, selector, rpl, Stop::gp)
}

/// Takes data segments away that the outer level may not use.
fn drop_inner_segments(cpu: &mut CpuState) {
    for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
        let segment = &mut cpu.seg[index];
        let conforming = segment.attr & 0x1c == 0x1c;
        if !segment.unusable && !conforming && segment.dpl() < cpu.cpl {
            segment.selector = 0;
            segment.attr = 0;
            segment.unusable = true;
        }
    }
}

/// Commits a return to another privilege level (or a 64-bit IRET to the same).
fn commit_outer(cpu: &mut CpuState, cs: Segment, rip: u64, ss: Segment, pointer: u64) {
    let cpl = (cs.selector & 3) as u8;
    let mut stack = Stack {
        segment: ss,
        pointer: cpu.gpr[gpr::RSP],
        flat: cpu.long_mode() && cs.long(),
        cpl,
        error: 0,
    };
    stack.set(pointer);
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.seg[sreg::CS] = cs;
    cpu.seg[sreg::SS] = ss;
    cpu.rip = rip;
    if cpl != cpu.cpl {
        cpu.cpl = cpl;
        drop_inner_segments(cpu);
    }
}

/// Far RET with an operand size of `size` bytes, releasing `params` more bytes.
pub fn far_return<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    size: usize,
    params: u16,
) -> Result<(), Stop> {
    let mut stack = Stack::current(cpu);
    let mut frame = [0; 2];
    stack.peek(cpu, env, 0, &mut frame, size)?;
    let [rip, selector] = frame;
    let selector = selector as u16;
    let released = 2 * size as u64 + u64::from(params);
    if unprotected(cpu) {
        let cs = real_code(cpu, selector);
        check_rip(cpu, &cs, rip)?;
        stack.release(released);
        cpu.gpr[gpr::RSP] = stack.pointer;
        cpu.seg[sreg::CS] = cs;
        cpu.rip = rip;
        return Ok(());
    }
    let cs = return_code(cpu, env, selector, rip)?;
    if (selector & 3) as u8 == cpu.cpl {
        stack.release(released);
        cpu.gpr[gpr::RSP] = stack.pointer;
        cpu.seg[sreg::CS] = cs;
        cpu.rip = rip;
        return Ok(());
    }
    let mut outer = [0; 2];
    stack.peek(cpu, env, released, &mut outer, size)?;
    let [pointer, ss] = outer;
    let ss = return_stack(cpu, env, ss as u16, &cs)?;
    let pointer = pointer.wrapping_add(u64::from(params));
    commit_outer(cpu, cs, rip, ss, pointer);
    Ok(())
}

/// RFLAGS after a protected-mode IRET pops `image`.
fn iret_flags(cpu: &CpuState, image: u64, size: usize) -> u64 {
    let mut mask = ARITH | TF | DF | NT;
    if size > 2 {
        mask |= RF | AC | ID;
    }
    if u64::from(cpu.cpl) <= (cpu.rflags & IOPL) >> 12 {
        mask |= IF;
    }
    if cpu.cpl == 0 {
        mask |= IOPL;
        if size > 2 {
            mask |= VIF | VIP;
        }
    }
    (cpu.rflags & !mask) | (image & mask) | 2
}

/// IRET, IRETD and IRETQ, in every mode; `next_rip` is saved if it returns from a nested task.
pub fn iret<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    size: usize,
    next_rip: u64,
) -> Result<(), Stop> {
    if unprotected(cpu) {
        iret_real(cpu, env, size)?;
    } else if cpu.rflags & NT != 0 {
        return_from_task(cpu, env, next_rip)?;
    } else if cpu.code_size() == CodeSize::Bits64 {
        iret_64(cpu, env, size)?;
    } else {
        iret_protected(cpu, env, size)?;
    }
    cpu.nmi_blocked = false;
    Ok(())
}

fn iret_real<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, size: usize) -> Result<(), Stop> {
    let mut stack = Stack::current(cpu);
    let mut frame = [0; 3];
    // #GP of IOPL-sensitive IRET comes before any stack access.
    control::pushf_image(cpu, size)?;
    stack.peek(cpu, env, 0, &mut frame, size)?;
    let [rip, selector, image] = frame;
    let cs = real_code(cpu, selector as u16);
    check_rip(cpu, &cs, rip)?;
    let mut flags = control::popf_flags(cpu, image, size)?;
    if size > 2 {
        flags |= image & RF;
    }
    stack.release(3 * size as u64);
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.seg[sreg::CS] = cs;
    cpu.rip = rip;
    cpu.rflags = flags;
    Ok(())
}

fn return_from_task<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    next_rip: u64,
) -> Result<(), Stop> {
    if cpu.long_mode() {
        return Err(Stop::gp(0));
    }
    let link = mem::read_int(cpu, env, cpu.tr.base, 2, Access::SYSTEM_READ)?;
    let request = task::Request {
        selector: link as u16,
        reason: Reason::Iret,
        next_rip,
        error: None,
    };
    task::switch(cpu, env, request)
}

fn iret_64<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, size: usize) -> Result<(), Stop> {
    let stack = Stack::current(cpu);
    let mut frame = [0; 5];
    stack.peek(cpu, env, 0, &mut frame, size)?;
    let [rip, selector, image, pointer, ss] = frame;
    let cs = return_code(cpu, env, selector as u16, rip)?;
    let ss = return_stack(cpu, env, ss as u16, &cs)?;
    let flags = iret_flags(cpu, image, size);
    commit_outer(cpu, cs, rip, ss, pointer);
    cpu.rflags = flags;
    Ok(())
}

fn iret_protected<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    size: usize,
) -> Result<(), Stop> {
    let mut stack = Stack::current(cpu);
    let mut frame = [0; 3];
    stack.peek(cpu, env, 0, &mut frame, size)?;
    let [rip, selector, image] = frame;
    let selector = selector as u16;
    let used = 3 * size as u64;
    if image & VM != 0 && cpu.cpl == 0 && size == 4 && !cpu.long_mode() {
        let mut outer = [0; 6];
        stack.peek(cpu, env, used, &mut outer, size)?;
        return enter_v86(cpu, rip, selector, image, outer);
    }
    let cs = return_code(cpu, env, selector, rip)?;
    let flags = iret_flags(cpu, image, size);
    if (selector & 3) as u8 == cpu.cpl {
        stack.release(used);
        cpu.gpr[gpr::RSP] = stack.pointer;
        cpu.seg[sreg::CS] = cs;
        cpu.rip = rip;
    } else {
        let mut outer = [0; 2];
        stack.peek(cpu, env, used, &mut outer, size)?;
        let [pointer, ss] = outer;
        let ss = return_stack(cpu, env, ss as u16, &cs)?;
        commit_outer(cpu, cs, rip, ss, pointer);
    }
    cpu.rflags = flags;
    Ok(())
}

fn enter_v86(
    cpu: &mut CpuState,
    rip: u64,
    cs: u16,
    image: u64,
    outer: [u64; 6],
) -> Result<(), Stop> {
    let [pointer, ss, es, ds, fs, gs] = outer;
    if rip > 0xffff {
        return Err(Stop::gp(0));
    }
    for (index, selector) in [es, u64::from(cs), ss, ds, fs, gs].into_iter().enumerate() {
        cpu.seg[index] = segment::v86_segment(selector as u16);
    }
    cpu.gpr[gpr::RSP] = pointer;
    cpu.rip = rip;
    cpu.rflags = (image & ALL_FLAGS) | 2;
    cpu.cpl = 3;
    Ok(())
}

/// A flat code segment as SYSCALL and its relatives load it.
fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        attr: if long { 0xa09b } else { 0xc09b } | u16::from(dpl) << 5,
        unusable: false,
    }
}

/// The flat data segment that goes with [`flat_code`].
fn flat_data(selector: u16, dpl: u8) -> Segment {
    Segment {
        attr: 0xc093 | u16::from(dpl) << 5,
        ..flat_code(selector, dpl, false)
    }
}

/// SYSCALL.
pub fn syscall<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    next_rip: u64,
) -> Result<(), Stop> {
    let wide = cpu.code_size() == CodeSize::Bits64;
    if cpu.efer & EFER_SCE == 0 || unprotected(cpu) || !wide && !env.features().amd {
        return Err(Stop::ud());
    }
    let long = cpu.long_mode();
    let selector = (cpu.star >> 32) as u16 & 0xfffc;
    cpu.gpr[gpr::RCX] = next_rip;
    if long {
        cpu.gpr[11] = cpu.rflags & !RF;
        cpu.rip = if wide { cpu.lstar } else { cpu.cstar };
        cpu.rflags = (cpu.rflags & !(cpu.fmask | RF | VM)) | 2;
    } else {
        cpu.rip = cpu.star & 0xffff_ffff;
        cpu.rflags &= !(VM | IF | RF);
    }
    cpu.seg[sreg::CS] = flat_code(selector, 0, long);
    cpu.seg[sreg::SS] = flat_data(selector.wrapping_add(8), 0);
    cpu.cpl = 0;
    Ok(())
}

/// SYSRET with an operand size of `size` bytes.
pub fn sysret<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, size: usize) -> Result<(), Stop> {
    let wide = cpu.code_size() == CodeSize::Bits64;
    let amd = env.features().amd;
    if cpu.efer & EFER_SCE == 0 || unprotected(cpu) || !wide && !amd {
        return Err(Stop::ud());
    }
    control::require_cpl0(cpu)?;
    let rip = cpu.gpr[gpr::RCX];
    let base = (cpu.star >> 48) as u16;
    let to_64 = size == 8 && wide;
    // AMD's faults at the first fetch instead.
    if to_64 && !amd && !paging::canonical(cpu, rip) {
        return Err(Stop::gp(0));
    }
    let cs = if to_64 { base.wrapping_add(16) } else { base } | 3;
    cpu.seg[sreg::CS] = flat_code(cs, 3, to_64);
    cpu.seg[sreg::SS] = flat_data(base.wrapping_add(8) | 3, 3);
    cpu.rip = if to_64 { rip } else { rip & 0xffff_ffff };
    if cpu.long_mode() {
        cpu.rflags = (cpu.gpr[11] & 0x3c_7fd7) | 2;
    } else {
        cpu.rflags |= IF;
    }
    cpu.cpl = 3;
    Ok(())
}

/// SYSENTER.
pub fn sysenter<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E) -> Result<(), Stop> {
    let long = cpu.long_mode();
    if long && env.features().amd {
        return Err(Stop::ud());
    }
    let selector = cpu.sysenter_cs as u16 & 0xfffc;
    if !cpu.protected() || selector == 0 {
        return Err(Stop::gp(0));
    }
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rflags &= !(VM | IF | RF);
    cpu.seg[sreg::CS] = flat_code(selector, 0, long);
    cpu.seg[sreg::SS] = flat_data(selector.wrapping_add(8), 0);
    cpu.gpr[gpr::RSP] = cpu.sysenter_esp & mask;
    cpu.rip = cpu.sysenter_eip & mask;
    cpu.cpl = 0;
    Ok(())
}

/// SYSEXIT with an operand size of `size` bytes.
pub fn sysexit<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, size: usize) -> Result<(), Stop> {
    if cpu.long_mode() && env.features().amd {
        // AMD's processors look at the privilege level first.
        return Err(if cpu.cpl != 0 {
            Stop::gp(0)
        } else {
            Stop::ud()
        });
    }
    let base = cpu.sysenter_cs as u16 & 0xfffc;
    if !cpu.protected() || cpu.cpl != 0 || base == 0 {
        return Err(Stop::gp(0));
    }
    let to_64 = size == 8 && cpu.long_mode();
    let (rip, pointer) = (cpu.gpr[gpr::RDX], cpu.gpr[gpr::RCX]);
    if to_64 && !(paging::canonical(cpu, rip) && paging::canonical(cpu, pointer)) {
        return Err(Stop::gp(0));
    }
    let (code, mask) = if to_64 {
        (base.wrapping_add(32), u64::MAX)
    } else {
        (base.wrapping_add(16), 0xffff_ffff)
    };
    cpu.seg[sreg::CS] = flat_code(code | 3, 3, to_64);
    cpu.seg[sreg::SS] = flat_data(code.wrapping_add(8) | 3, 3);
    cpu.rip = rip & mask;
    cpu.gpr[gpr::RSP] = pointer & mask;
    cpu.cpl = 3;
    Ok(())
}

fn software_event(vector: u8, kind: Kind, next_rip: u64) -> Event {
    Event {
        vector,
        kind,
        error: None,
        payload: 0,
        next_rip,
    }
}

/// INT n.
pub fn int_n<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    vector: u8,
    next_rip: u64,
) -> Result<(), Stop> {
    if cpu.v86() {
        if cpu.cr4 & CR4_VME != 0 && redirected(cpu, env, vector)? {
            let entry = mem::read_int(cpu, env, u64::from(vector) * 4, 4, Access::read(cpu))?;
            return event::real_interrupt(cpu, env, entry, next_rip);
        }
        if cpu.rflags & IOPL != IOPL {
            return Err(Stop::gp(0));
        }
    }
    event::deliver_instruction(
        cpu,
        env,
        software_event(vector, Kind::SoftwareInt, next_rip),
    )
}

/// Whether the software interrupt redirection bitmap sends a vector to the virtual-8086 program's own
/// handler.
fn redirected<E: Env + ?Sized>(cpu: &CpuState, env: &mut E, vector: u8) -> Result<bool, Stop> {
    if cpu.tr.unusable || cpu.tr.attr & 8 == 0 || cpu.tr.limit < 103 {
        return Err(Stop::gp(0));
    }
    let field = cpu.tr.base.wrapping_add(102);
    let io_map = mem::read_int(cpu, env, field, 2, Access::SYSTEM_READ)?;
    // The 32 bytes below the I/O permission bitmap.
    let Some(offset) = (io_map + u64::from(vector / 8)).checked_sub(32) else {
        return Err(Stop::gp(0));
    };
    if offset > u64::from(cpu.tr.limit) {
        return Err(Stop::gp(0));
    }
    let address = cpu.tr.base.wrapping_add(offset);
    let bits = mem::read_int(cpu, env, address, 1, Access::SYSTEM_READ)?;
    Ok(bits & (1 << (vector & 7)) == 0)
}

/// INT3.
pub fn int3<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, next_rip: u64) -> Result<(), Stop> {
    event::deliver_instruction(
        cpu,
        env,
        software_event(3, Kind::SoftwareException, next_rip),
    )
}

/// INT1.
pub fn int1<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, next_rip: u64) -> Result<(), Stop> {
    event::deliver_instruction(cpu, env, software_event(1, Kind::PrivSoftware, next_rip))
}

/// INTO with OF set; without it INTO does nothing.
pub fn into<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, next_rip: u64) -> Result<(), Stop> {
    event::deliver_instruction(
        cpu,
        env,
        software_event(4, Kind::SoftwareException, next_rip),
    )
}
