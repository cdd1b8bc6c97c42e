//! Delivery of exceptions, interrupts and software interrupts.
//!
//! Every path reads and checks first, then writes the stack frame as a whole, and commits last: a
//! fault on the way leaves the state as it was, ready for the fault's own delivery.

use crate::bits::*;
use crate::env::{Env, Exception, Exit, Stop};
use crate::mem;
use crate::paging::{self, Access};
use crate::segment::{self, Descriptor, kind, null_segment, selector_error};
use crate::stack::Stack;
use crate::state::{CpuState, Segment, gpr, sreg};
use crate::task;

/// Where an event comes from; decides the EXT bit, privilege checks and the saved RIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A maskable interrupt.
    External,
    /// A non-maskable interrupt.
    Nmi,
    /// A fault, trap or abort the processor found.
    Exception,
    /// INT n.
    SoftwareInt,
    /// INT3 and INTO.
    SoftwareException,
    /// INT1.
    PrivSoftware,
}

impl Kind {
    /// INT n, INT3 and INTO: gate privilege counts, and errors are not external.
    fn checks_privilege(self) -> bool {
        matches!(self, Kind::SoftwareInt | Kind::SoftwareException)
    }
    fn is_instruction(self) -> bool {
        self.checks_privilege() || self == Kind::PrivSoftware
    }
}

/// An event on its way to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// IDT vector.
    pub vector: u8,
    /// Where it comes from.
    pub kind: Kind,
    /// Error code to push.
    pub error: Option<u32>,
    /// CR2 for #PF; bits to set in DR6 for #DB.
    pub payload: u64,
    /// The RIP to save for events that an instruction asks for (INT n, INT3, INTO, INT1); other
    /// events save the current one.
    pub next_rip: u64,
}

impl From<Exception> for Event {
    fn from(exception: Exception) -> Self {
        Event {
            vector: exception.vector,
            kind: Kind::Exception,
            error: exception.error,
            payload: exception.payload,
            next_rip: 0,
        }
    }
}

impl Event {
    /// A maskable interrupt.
    pub fn external(vector: u8) -> Self {
        Event {
            vector,
            kind: Kind::External,
            error: None,
            payload: 0,
            next_rip: 0,
        }
    }
    /// A non-maskable interrupt.
    pub fn nmi() -> Self {
        Event {
            vector: 2,
            kind: Kind::Nmi,
            ..Event::external(2)
        }
    }
}

/// Exceptions that combine to a double fault (Intel SDM, "Interrupt 8—Double Fault Exception").
fn contributory(vector: u8) -> bool {
    matches!(vector, 0 | 10..=13 | 21)
}

fn page_fault(vector: u8) -> bool {
    matches!(vector, 14 | 20)
}

/// Whether the saved RFLAGS image of this exception has RF set: the faults, without #DB (which is a
/// fault only for instruction breakpoints, where RF must stay as it is).
fn is_fault(vector: u8) -> bool {
    !matches!(vector, 1..=4 | 8 | 9 | 15 | 18)
}

/// Delivers an event, and whatever exceptions its delivery raises.
///
/// Errors: [`Exit::Shutdown`] for a triple fault, [`Exit::Debug`] when guest debugging takes the
/// exception, [`Exit::Vectoring`] where user space would be needed, otherwise what the environment stops for.
pub fn deliver<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, event: Event) -> Result<(), Exit> {
    let mut event = event;
    let mut external = !event.kind.checks_privilege();
    loop {
        let second = match deliver_once(cpu, env, &event) {
            Ok(()) => {
                env.retired();
                return Ok(());
            }
            Err(Stop::Exit(Exit::UserSpace)) => return Err(Exit::Vectoring(event.vector)),
            Err(Stop::Exit(exit)) => return Err(exit),
            Err(Stop::Exception(second)) => second,
        };
        let second = with_ext(second, external);
        let first = if event.kind == Kind::Exception {
            event.vector
        } else {
            // Interrupts and software events are benign.
            1
        };
        let severe = contributory(second.vector) || page_fault(second.vector);
        if first == 8 && severe {
            return Err(Exit::Shutdown);
        }
        let double =
            contributory(first) && contributory(second.vector) || page_fault(first) && severe;
        if double {
            if page_fault(second.vector) {
                cpu.cr2 = second.payload;
            }
            event = Event::from(Exception {
                vector: 8,
                error: Some(0),
                payload: 0,
            });
        } else {
            event = Event::from(second);
        }
        external = true;
    }
}

/// Delivers INT n, INT3, INTO or INT1 as part of the instruction: what goes wrong is the
/// instruction's own exception.
pub(crate) fn deliver_instruction<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    event: Event,
) -> Result<(), Stop> {
    deliver_once(cpu, env, &event).map_err(|stop| match stop {
        Stop::Exception(e) => Stop::Exception(with_ext(e, !event.kind.checks_privilege())),
        exit => exit,
    })
}

/// Sets the EXT bit in selector error codes of faults that an external event caused.
fn with_ext(exception: Exception, external: bool) -> Exception {
    match exception {
        Exception {
            vector: 10..=13,
            error: Some(error),
            ..
        } if external => Exception {
            error: Some(error | 1),
            ..exception
        },
        other => other,
    }
}

fn deliver_once<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    event: &Event,
) -> Result<(), Stop> {
    if event.kind == Kind::Exception || event.kind.is_instruction() {
        match event.vector {
            1 | 3 if event.kind != Kind::SoftwareInt => {
                let exception = Exception {
                    vector: event.vector,
                    error: None,
                    payload: event.payload,
                };
                if env.intercepts(cpu, &exception) {
                    return Err(Stop::Exit(Exit::Debug(exception)));
                }
            }
            14 if event.kind == Kind::Exception => cpu.cr2 = event.payload,
            _ => {}
        }
    }
    if cpu.long_mode() {
        deliver_long(cpu, env, event)?;
    } else if cpu.protected() {
        deliver_protected(cpu, env, event)?;
    } else {
        deliver_real(cpu, env, event)?;
    }
    if event.vector == 1 && (event.kind == Kind::Exception || event.kind == Kind::PrivSoftware) {
        // B0-B3 are replaced, the other causes accumulate.
        let sticky = cpu.dr6 & !0xf;
        cpu.dr6 = (sticky | event.payload & 0xe00f | 0xffff_0ff0) & 0xffff_efff;
        cpu.dr7 &= !(1 << 13);
    }
    cpu.shadow = 0;
    if event.kind == Kind::Nmi {
        cpu.nmi_blocked = true;
    }
    Ok(())
}

fn saved_rip(cpu: &CpuState, event: &Event) -> u64 {
    if event.kind.is_instruction() {
        event.next_rip
    } else {
        cpu.rip
    }
}

fn saved_flags(cpu: &CpuState, event: &Event) -> u64 {
    if event.kind == Kind::Exception && is_fault(event.vector) {
        cpu.rflags | RF
    } else {
        cpu.rflags
    }
}

/// The error code that names an IDT entry.
fn idt_error(vector: u8) -> u32 {
    u32::from(vector) * 8 + 2
}

/// Checks the target of a gate and gives its CS contents and the privilege level to run at.
fn gate_target<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    selector: u16,
) -> Result<(Segment, u8), Stop> {
    if segment::is_null(selector) {
        return Err(Stop::gp(0));
    }
    let mut descriptor = segment::read_descriptor(cpu, env, selector, Stop::gp)?;
    let error = selector_error(selector);
    if !descriptor.is_code() || descriptor.dpl() > cpu.cpl {
        return Err(Stop::gp(error));
    }
    if cpu.long_mode() && (!descriptor.long() || descriptor.db()) {
        return Err(Stop::gp(error));
    }
    if !descriptor.present() {
        return Err(Stop::np(error));
    }
    segment::set_accessed(cpu, env, &mut descriptor)?;
    let cpl = if descriptor.conforming() {
        cpu.cpl
    } else {
        descriptor.dpl()
    };
    let selector = (selector & 0xfffc) | u16::from(cpl);
    Ok((descriptor.segment(selector), cpl))
}

fn deliver_long<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    event: &Event,
) -> Result<(), Stop> {
    let error = idt_error(event.vector);
    let offset = u64::from(event.vector) * 16;
    if offset + 15 > u64::from(cpu.idtr.limit) {
        return Err(Stop::gp(error));
    }
    let mut bytes = [0; 16];
    let address = cpu.idtr.base.wrapping_add(offset);
    mem::read_linear(cpu, env, address, &mut bytes, Access::SYSTEM_READ)?;
    let wide = u128::from_le_bytes(bytes);
    let gate = Descriptor {
        raw: wide as u64,
        upper: (wide >> 64) as u64,
        address,
    };
    if !gate.is_system(&[kind::INT_GATE32, kind::TRAP_GATE32]) {
        return Err(Stop::gp(error));
    }
    if event.kind.checks_privilege() && gate.dpl() < cpu.cpl {
        return Err(Stop::gp(error));
    }
    if !gate.present() {
        return Err(Stop::np(error));
    }
    let (cs, cpl) = gate_target(cpu, env, gate.gate_selector())?;
    let rip = gate.gate_offset();
    if !paging::canonical(cpu, rip) {
        return Err(Stop::gp(0));
    }
    let ist = (gate.raw >> 32) as u8 & 7;
    let mut ss = cpu.seg[sreg::SS];
    let mut pointer = cpu.gpr[gpr::RSP];
    if ist != 0 {
        pointer = tss_stack_64(cpu, env, 0x24 + 8 * u32::from(ist - 1))?;
    } else if cpl != cpu.cpl {
        pointer = tss_stack_64(cpu, env, 4 + 8 * u32::from(cpl))?;
    }
    if cpl != cpu.cpl {
        ss = null_segment(u16::from(cpl), cpl);
    }
    let mut stack = Stack {
        segment: ss,
        pointer: pointer & !0xf,
        flat: true,
        cpl,
        error: 0,
    };
    let frame = [
        u64::from(cpu.seg[sreg::SS].selector),
        cpu.gpr[gpr::RSP],
        saved_flags(cpu, event),
        u64::from(cpu.seg[sreg::CS].selector),
        saved_rip(cpu, event),
        u64::from(event.error.unwrap_or(0)),
    ];
    let used = if event.error.is_some() { 6 } else { 5 };
    stack.push(cpu, env, &frame[..used], 8)?;

    cpu.seg[sreg::CS] = cs;
    cpu.seg[sreg::SS] = ss;
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.rip = rip;
    cpu.cpl = cpl;
    clear_flags(cpu, gate.kind() & 1 == 0);
    Ok(())
}

/// What a gate clears: TF, NT, RF, VM, and IF unless it is a trap gate.
fn clear_flags(cpu: &mut CpuState, interrupt_gate: bool) {
    cpu.rflags &= !(TF | NT | RF | VM);
    if interrupt_gate {
        cpu.rflags &= !IF;
    }
}

/// A stack pointer from the 64-bit TSS.
pub(crate) fn tss_stack_64<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    offset: u32,
) -> Result<u64, Stop> {
    if cpu.tr.unusable || offset + 7 > cpu.tr.limit {
        return Err(Stop::ts(selector_error(cpu.tr.selector)));
    }
    let address = cpu.tr.base.wrapping_add(u64::from(offset));
    let pointer = mem::read_int(cpu, env, address, 8, Access::SYSTEM_READ)?;
    if !paging::canonical(cpu, pointer) {
        return Err(Stop::ss(0));
    }
    Ok(pointer)
}

/// The stack for privilege level `cpl` from the TSS, all checks done (Intel SDM, CALL and INT n,
/// "inter-privilege-level").
pub(crate) fn inner_stack<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    cpl: u8,
) -> Result<Stack, Stop> {
    if cpu.long_mode() {
        let pointer = tss_stack_64(cpu, env, 4 + 8 * u32::from(cpl))?;
        return Ok(Stack {
            segment: null_segment(u16::from(cpl), cpl),
            pointer,
            flat: true,
            cpl,
            error: 0,
        });
    }
    let wide = cpu.tr.attr & 8 != 0;
    let (offset, size) = if wide {
        (4 + 8 * u32::from(cpl), 4)
    } else {
        (2 + 4 * u32::from(cpl), 2)
    };
    let last = offset + if wide { 5 } else { 3 };
    if cpu.tr.unusable || last > cpu.tr.limit {
        return Err(Stop::ts(selector_error(cpu.tr.selector)));
    }
    let address = cpu.tr.base.wrapping_add(u64::from(offset)) & 0xffff_ffff;
    let pointer = mem::read_int(cpu, env, address, size, Access::SYSTEM_READ)?;
    let at = address.wrapping_add(size as u64) & 0xffff_ffff;
    let selector = mem::read_int(cpu, env, at, 2, Access::SYSTEM_READ)? as u16;
    if segment::is_null(selector) {
        return Err(Stop::ts(0));
    }
    Ok(Stack {
        segment: segment::stack_segment(cpu, env, selector, cpl, Stop::ts)?,
        pointer,
        flat: false,
        cpl,
        error: selector_error(selector),
    })
}

fn deliver_protected<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    event: &Event,
) -> Result<(), Stop> {
    let error = idt_error(event.vector);
    let offset = u64::from(event.vector) * 8;
    if offset + 7 > u64::from(cpu.idtr.limit) {
        return Err(Stop::gp(error));
    }
    let address = cpu.idtr.base.wrapping_add(offset) & 0xffff_ffff;
    let gate = Descriptor {
        raw: mem::read_int(cpu, env, address, 8, Access::SYSTEM_READ)?,
        upper: 0,
        address,
    };
    if !gate.is_system(&[
        kind::TASK_GATE,
        kind::INT_GATE16,
        kind::TRAP_GATE16,
        kind::INT_GATE32,
        kind::TRAP_GATE32,
    ]) {
        return Err(Stop::gp(error));
    }
    if event.kind.checks_privilege() && gate.dpl() < cpu.cpl {
        return Err(Stop::gp(error));
    }
    if !gate.present() {
        return Err(Stop::np(error));
    }
    if gate.kind() == kind::TASK_GATE {
        let request = task::Request {
            selector: gate.gate_selector(),
            reason: task::Reason::Gate,
            next_rip: saved_rip(cpu, event),
            error: event.error,
        };
        return task::switch(cpu, env, request);
    }
    let (cs, cpl) = gate_target(cpu, env, gate.gate_selector())?;
    let v86 = cpu.v86();
    if v86 && cpl != 0 {
        return Err(Stop::gp(selector_error(gate.gate_selector())));
    }
    let wide = gate.kind() & 8 != 0;
    let size = if wide { 4 } else { 2 };
    let rip = gate.gate_offset() & if wide { 0xffff_ffff } else { 0xffff };
    if !segment::within_limit(&cs, rip, 1) {
        return Err(Stop::gp(0));
    }
    let inner = cpl != cpu.cpl;
    let mut stack = if inner {
        inner_stack(cpu, env, cpl)?
    } else {
        Stack::current(cpu)
    };
    let selector = |index: usize| u64::from(cpu.seg[index].selector);
    let frame = [
        selector(sreg::GS),
        selector(sreg::FS),
        selector(sreg::DS),
        selector(sreg::ES),
        selector(sreg::SS),
        cpu.gpr[gpr::RSP],
        saved_flags(cpu, event),
        selector(sreg::CS),
        saved_rip(cpu, event),
        u64::from(event.error.unwrap_or(0)),
    ];
    let first = match (v86, inner) {
        (true, _) => 0,
        (false, true) => 4,
        (false, false) => 6,
    };
    let end = if event.error.is_some() { 10 } else { 9 };
    stack.push(cpu, env, &frame[first..end], size)?;
    if v86 {
        for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            cpu.seg[index] = null_segment(0, 0);
        }
    }
    cpu.seg[sreg::CS] = cs;
    cpu.seg[sreg::SS] = stack.segment;
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.rip = rip;
    cpu.cpl = cpl;
    clear_flags(cpu, gate.kind() & 1 == 0);
    Ok(())
}

fn deliver_real<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    event: &Event,
) -> Result<(), Stop> {
    let offset = u64::from(event.vector) * 4;
    if offset + 3 > u64::from(cpu.idtr.limit) {
        return Err(Stop::gp(idt_error(event.vector)));
    }
    let address = cpu.idtr.base.wrapping_add(offset) & 0xffff_ffff;
    let entry = mem::read_int(cpu, env, address, 4, Access::SYSTEM_READ)?;
    real_interrupt(cpu, env, entry, saved_rip(cpu, event))
}

/// The stack frame and jump of a real-mode interrupt, also of INT n that virtual-8086 mode
/// redirects; `entry` is the far pointer.
pub(crate) fn real_interrupt<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    entry: u64,
    return_rip: u64,
) -> Result<(), Stop> {
    let mut flags = cpu.rflags;
    let v86 = cpu.v86();
    if v86 && cpu.rflags & IOPL != IOPL {
        flags |= IOPL;
        flags = if cpu.rflags & VIF != 0 {
            flags | IF
        } else {
            flags & !IF
        };
    }
    let mut stack = Stack::current(cpu);
    let frame = [flags, u64::from(cpu.seg[sreg::CS].selector), return_rip];
    stack.push(cpu, env, &frame, 2)?;
    let selector = (entry >> 16) as u16;
    cpu.gpr[gpr::RSP] = stack.pointer;
    cpu.seg[sreg::CS] = if v86 {
        segment::v86_segment(selector)
    } else {
        segment::real_segment(&cpu.seg[sreg::CS], selector)
    };
    cpu.rip = entry & 0xffff;
    if v86 && cpu.rflags & IOPL != IOPL {
        cpu.rflags &= !(TF | RF | NT | VIF);
    } else {
        cpu.rflags &= !(TF | IF | RF | if v86 { NT } else { AC });
    }
    Ok(())
}
