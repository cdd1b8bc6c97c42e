//! From decoded instructions to the system side: everything that touches segments, control
//! registers, privilege or tasks.

use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpKind, Register};

use crate::bits::*;
use crate::control;
use crate::env::{Env, Exit, ForeignHypercall, Stop};
use crate::interp::address::{effective_address, read_gpr, write_gpr};
use crate::mem;
use crate::paging::Access;
use crate::segment;
use crate::stack::Stack;
use crate::state::{CodeSize, CpuState, DescriptorTable, gpr, shadow, sreg};
use crate::transfer;

/// RIP of the next instruction.
fn next_rip(cpu: &CpuState, insn: &Instruction) -> u64 {
    let next = cpu.rip.wrapping_add(insn.len() as u64);
    if cpu.code_size() == CodeSize::Bits64 {
        next
    } else {
        next & 0xffff_ffff
    }
}

/// Executes `insn`, whose first byte is at RIP, if it is a system instruction; `None` if not.
///
/// On success RIP is set, and [`CpuState::shadow`] where the instruction casts one (the caller has
/// cleared the old shadow and RFLAGS.RF). HLT retires too, although it comes as
/// `Err(Stop::Exit(Exit::Hlt))`.
pub fn system_step<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Option<Result<(), Stop>> {
    let next = next_rip(cpu, insn);
    if let Some(result) = transfers(cpu, env, insn, next) {
        return Some(result);
    }
    let result = registers(cpu, env, insn)
        .or_else(|| segments(cpu, env, insn))
        .or_else(|| flags(cpu, env, insn))
        .or_else(|| tables(cpu, env, insn))
        .or_else(|| processor(cpu, env, insn))?;
    Some(match result {
        Ok(()) => {
            cpu.rip = next;
            Ok(())
        }
        Err(Stop::Exit(Exit::Hlt)) => {
            cpu.rip = next;
            cpu.shadow = 0;
            Err(Stop::Exit(Exit::Hlt))
        }
        Err(stop) => Err(stop),
    })
}

/// Reads the whole memory operand.
fn read_memory<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    insn: &Instruction,
    data: &mut [u8],
) -> Result<(), Stop> {
    let (seg, offset) = effective_address(cpu, insn);
    let access = Access::read(cpu);
    let linear = segment::linearize(cpu, seg, offset, data.len(), access)?;
    mem::read_linear(cpu, env, linear, data, access)
}

fn write_memory<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    insn: &Instruction,
    data: &[u8],
) -> Result<(), Stop> {
    let (seg, offset) = effective_address(cpu, insn);
    let access = Access::write(cpu);
    let linear = segment::linearize(cpu, seg, offset, data.len(), access)?;
    mem::write_linear(cpu, env, linear, data, access)
}

/// A 16-bit register or memory operand.
fn read_word<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    insn: &Instruction,
    operand: u32,
) -> Result<u16, Stop> {
    if insn.op_kind(operand) == OpKind::Register {
        return Ok(read_gpr(cpu, insn.op_register(operand)) as u16);
    }
    let mut bytes = [0; 2];
    read_memory(cpu, env, insn, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

/// Writes operand 0: a register at its size, or 16 bits of memory.
fn write_word<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
    value: u64,
) -> Result<(), Stop> {
    if insn.op0_kind() == OpKind::Register {
        write_gpr(cpu, insn.op0_register(), value);
        return Ok(());
    }
    write_memory(cpu, env, insn, &value.to_le_bytes()[..2])
}

/// A far pointer in memory: offset, selector, size of the offset.
fn far_pointer<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Result<(u64, u16, usize), Stop> {
    let size = match insn.memory_size() {
        MemorySize::SegPtr16 => 2,
        MemorySize::SegPtr32 => 4,
        MemorySize::SegPtr64 => 8,
        _ => return Err(Stop::ud()),
    };
    let mut bytes = [0; 10];
    read_memory(cpu, env, insn, &mut bytes[..size + 2])?;
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&bytes[..size]);
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    Ok((u64::from_le_bytes(offset), selector, size))
}

/// The target of a far CALL or JMP.
fn far_target<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Result<(u64, u16, usize), Stop> {
    match insn.op0_kind() {
        OpKind::FarBranch16 => Ok((
            u64::from(insn.far_branch16()),
            insn.far_branch_selector(),
            2,
        )),
        OpKind::FarBranch32 => Ok((
            u64::from(insn.far_branch32()),
            insn.far_branch_selector(),
            4,
        )),
        _ => far_pointer(cpu, env, insn),
    }
}

/// Instructions that set RIP themselves.
fn transfers<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
    next: u64,
) -> Option<Result<(), Stop>> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Call if insn.is_call_far() || insn.is_call_far_indirect() => far_target(cpu, env, insn)
            .and_then(|(offset, selector, size)| {
                transfer::far_call(cpu, env, selector, offset, size, next)
            }),
        M::Jmp if insn.is_jmp_far() || insn.is_jmp_far_indirect() => far_target(cpu, env, insn)
            .and_then(|(offset, selector, size)| {
                transfer::far_jump(cpu, env, selector, offset, size, next)
            }),
        M::Retf => {
            let size = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            let params = if insn.op_count() > 0 {
                insn.immediate16()
            } else {
                0
            };
            transfer::far_return(cpu, env, size, params)
        }
        M::Iret => transfer::iret(cpu, env, 2, next),
        M::Iretd => transfer::iret(cpu, env, 4, next),
        M::Rsm if cpu.smm => env.rsm(cpu),
        M::Iretq => transfer::iret(cpu, env, 8, next),
        M::Int => transfer::int_n(cpu, env, insn.immediate8(), next),
        M::Int3 => transfer::int3(cpu, env, next),
        M::Int1 => transfer::int1(cpu, env, next),
        M::Into if cpu.rflags & OF != 0 => transfer::into(cpu, env, next),
        M::Into => {
            cpu.rip = next;
            Ok(())
        }
        M::Syscall => transfer::syscall(cpu, env, next),
        M::Sysret => transfer::sysret(cpu, env, 4),
        M::Sysretq => transfer::sysret(cpu, env, 8),
        M::Sysenter => transfer::sysenter(cpu, env),
        M::Sysexit => transfer::sysexit(cpu, env, 4),
        M::Sysexitq => transfer::sysexit(cpu, env, 8),
        _ => return None,
    })
}

/// MOV to and from control, debug and segment registers.
fn registers<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Option<Result<(), Stop>> {
    if insn.mnemonic() != Mnemonic::Mov {
        return None;
    }
    let (to, from) = (insn.op0_register(), insn.op1_register());
    let number = |register: Register| register.number() as u32;
    Some(if to.is_cr() {
        control::write_cr(cpu, env, number(to), read_gpr(cpu, from))
    } else if from.is_cr() {
        control::read_cr(cpu, env, number(from)).map(|value| write_gpr(cpu, to, value))
    } else if to.is_dr() {
        control::write_dr(cpu, number(to), read_gpr(cpu, from))
    } else if from.is_dr() {
        control::read_dr(cpu, number(from)).map(|value| write_gpr(cpu, to, value))
    } else if to.is_segment_register() {
        read_word(cpu, env, insn, 1)
            .and_then(|selector| load_segment(cpu, env, to.number(), selector))
    } else if from.is_segment_register() {
        let selector = cpu.seg[from.number().min(5)].selector;
        write_word(cpu, env, insn, u64::from(selector))
    } else if to.is_tr() || from.is_tr() {
        Err(Stop::ud())
    } else {
        return None;
    })
}

/// MOV and POP to a segment register; SS casts a shadow.
fn load_segment<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    register: usize,
    selector: u16,
) -> Result<(), Stop> {
    if register == sreg::CS {
        return Err(Stop::ud());
    }
    segment::load(cpu, env, register, selector)?;
    if register == sreg::SS {
        cpu.shadow = shadow::MOV_SS;
    }
    Ok(())
}

fn pop_segment<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Result<(), Stop> {
    let size = insn.stack_pointer_increment().unsigned_abs() as usize & 15;
    let mut stack = Stack::current(cpu);
    let mut item = [0];
    stack.peek(cpu, env, 0, &mut item, size.clamp(2, 8))?;
    // The new SP belongs to the old stack segment's size.
    stack.release(size as u64);
    load_segment(cpu, env, insn.op0_register().number(), item[0] as u16)?;
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

fn set_zf(cpu: &mut CpuState, set: bool) {
    cpu.rflags = if set {
        cpu.rflags | ZF
    } else {
        cpu.rflags & !ZF
    };
}

/// LAR, LSL: the destination changes only when ZF is set.
fn descriptor_query(cpu: &mut CpuState, insn: &Instruction, value: Option<u32>) {
    if let Some(value) = value {
        write_gpr(cpu, insn.op0_register(), u64::from(value));
    }
    set_zf(cpu, value.is_some());
}

fn arpl<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, insn: &Instruction) -> Result<(), Stop> {
    if !cpu.protected() || cpu.v86() {
        return Err(Stop::ud());
    }
    let to = read_word(cpu, env, insn, 0)?;
    let from = read_gpr(cpu, insn.op1_register()) as u16;
    let adjust = to & 3 < from & 3;
    if adjust {
        write_word(cpu, env, insn, u64::from(to & !3 | from & 3))?;
    }
    set_zf(cpu, adjust);
    Ok(())
}

/// Loads and queries of segments.
fn segments<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Option<Result<(), Stop>> {
    use Mnemonic as M;
    let far_load = |cpu: &mut CpuState, env: &mut E, register: usize| {
        let (offset, selector, _) = far_pointer(cpu, env, insn)?;
        segment::load(cpu, env, register, selector)?;
        write_gpr(cpu, insn.op0_register(), offset);
        Ok(())
    };
    Some(match insn.mnemonic() {
        M::Pop if insn.op0_register().is_segment_register() => pop_segment(cpu, env, insn),
        M::Lds => far_load(cpu, env, sreg::DS),
        M::Les => far_load(cpu, env, sreg::ES),
        M::Lss => far_load(cpu, env, sreg::SS),
        M::Lfs => far_load(cpu, env, sreg::FS),
        M::Lgs => far_load(cpu, env, sreg::GS),
        M::Lldt | M::Ltr => {
            if !cpu.protected() || cpu.v86() {
                return Some(Err(Stop::ud()));
            }
            control::require_cpl0(cpu)
                .and_then(|()| read_word(cpu, env, insn, 0))
                .and_then(|selector| {
                    if insn.mnemonic() == M::Lldt {
                        segment::lldt(cpu, env, selector)
                    } else {
                        segment::ltr(cpu, env, selector)
                    }
                })
        }
        M::Sldt | M::Str => {
            if !cpu.protected() || cpu.v86() {
                return Some(Err(Stop::ud()));
            }
            let selector = if insn.mnemonic() == M::Sldt {
                cpu.ldtr.selector
            } else {
                cpu.tr.selector
            };
            control::check_umip(cpu).and_then(|()| write_word(cpu, env, insn, u64::from(selector)))
        }
        M::Lar | M::Lsl | M::Verr | M::Verw if !cpu.protected() || cpu.v86() => Err(Stop::ud()),
        M::Lar => read_word(cpu, env, insn, 1)
            .and_then(|selector| segment::lar(cpu, env, selector))
            .map(|value| descriptor_query(cpu, insn, value)),
        M::Lsl => read_word(cpu, env, insn, 1)
            .and_then(|selector| segment::lsl(cpu, env, selector))
            .map(|value| descriptor_query(cpu, insn, value)),
        M::Verr | M::Verw => read_word(cpu, env, insn, 0)
            .and_then(|selector| segment::verify(cpu, env, selector, insn.mnemonic() == M::Verw))
            .map(|ok| set_zf(cpu, ok)),
        M::Arpl => arpl(cpu, env, insn),
        M::Swapgs => control::swapgs(cpu),
        M::Rdfsbase | M::Rdgsbase => control::check_fsgsbase(cpu).map(|()| {
            let index = if insn.mnemonic() == M::Rdfsbase {
                sreg::FS
            } else {
                sreg::GS
            };
            write_gpr(cpu, insn.op0_register(), cpu.seg[index].base);
        }),
        M::Wrfsbase => {
            control::write_segment_base(cpu, sreg::FS, read_gpr(cpu, insn.op0_register()))
        }
        M::Wrgsbase => {
            control::write_segment_base(cpu, sreg::GS, read_gpr(cpu, insn.op0_register()))
        }
        _ => return None,
    })
}

fn pushf<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, size: usize) -> Result<(), Stop> {
    let image = control::pushf_image(cpu, size)?;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, env, &[image], size)?;
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

fn popf<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, size: usize) -> Result<(), Stop> {
    // #GP of IOPL-sensitive POPF comes before any stack access.
    control::pushf_image(cpu, size)?;
    let mut stack = Stack::current(cpu);
    let mut image = [0];
    stack.peek(cpu, env, 0, &mut image, size)?;
    cpu.rflags = control::popf_flags(cpu, image[0], size)?;
    stack.release(size as u64);
    cpu.gpr[gpr::RSP] = stack.pointer;
    Ok(())
}

/// STAC and CLAC.
fn set_ac<E: Env + ?Sized>(cpu: &mut CpuState, env: &E, set: bool) -> Result<(), Stop> {
    if cpu.cpl != 0 || env.features().leaf7_ebx & (1 << 20) == 0 {
        return Err(Stop::ud());
    }
    cpu.rflags = if set {
        cpu.rflags | AC
    } else {
        cpu.rflags & !AC
    };
    Ok(())
}

/// Instructions on RFLAGS.
fn flags<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Option<Result<(), Stop>> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Pushf => pushf(cpu, env, 2),
        M::Pushfd => pushf(cpu, env, 4),
        M::Pushfq => pushf(cpu, env, 8),
        M::Popf => popf(cpu, env, 2),
        M::Popfd => popf(cpu, env, 4),
        M::Popfq => popf(cpu, env, 8),
        M::Cli => control::cli(cpu),
        M::Sti => control::sti(cpu).map(|shadowed| {
            if shadowed {
                cpu.shadow = shadow::STI;
            }
        }),
        M::Stac => set_ac(cpu, env, true),
        M::Clac => set_ac(cpu, env, false),
        _ => return None,
    })
}

/// LGDT and LIDT: the operand.
fn table_operand<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Result<DescriptorTable, Stop> {
    control::require_cpl0(cpu)?;
    let wide = cpu.code_size() == CodeSize::Bits64;
    let mut bytes = [0; 10];
    read_memory(cpu, env, insn, &mut bytes[..if wide { 10 } else { 6 }])?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = [0; 8];
    base.copy_from_slice(&bytes[2..]);
    let mut base = u64::from_le_bytes(base);
    if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0x00ff_ffff;
    }
    if wide && !crate::paging::canonical(cpu, base) {
        return Err(Stop::gp(0));
    }
    Ok(DescriptorTable { base, limit })
}

fn store_table<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    insn: &Instruction,
    table: DescriptorTable,
) -> Result<(), Stop> {
    control::check_umip(cpu)?;
    let wide = cpu.code_size() == CodeSize::Bits64;
    let mut base = table.base;
    if matches!(insn.code(), Code::Sgdt_m1632_16 | Code::Sidt_m1632_16) {
        base &= 0x00ff_ffff;
    }
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&base.to_le_bytes());
    write_memory(cpu, env, insn, &bytes[..if wide { 10 } else { 6 }])
}

/// The linear address of a memory operand that is named but not accessed.
fn named_address(cpu: &CpuState, insn: &Instruction) -> u64 {
    let (seg, offset) = effective_address(cpu, insn);
    let base = cpu.seg[seg.min(5)].base;
    if cpu.code_size() != CodeSize::Bits64 {
        base.wrapping_add(offset) & 0xffff_ffff
    } else if seg >= sreg::FS {
        base.wrapping_add(offset)
    } else {
        offset
    }
}

fn invpcid<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Result<(), Stop> {
    if env.features().leaf7_ebx & (1 << 10) == 0 || !cpu.protected() {
        return Err(Stop::ud());
    }
    control::require_cpl0(cpu)?;
    let mut bytes = [0; 16];
    read_memory(cpu, env, insn, &mut bytes)?;
    let wide = u128::from_le_bytes(bytes);
    let descriptor = [wide as u64, (wide >> 64) as u64];
    let kind = read_gpr(cpu, insn.op0_register());
    control::invpcid(cpu, env, kind, descriptor)
}

/// CLFLUSH and its relatives: the address must be readable, nothing else happens.
fn cache_line<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Result<(), Stop> {
    let (seg, offset) = effective_address(cpu, insn);
    // Readable or execute-only code is as good here.
    let access = Access::read(cpu);
    let linear = segment::linearize(cpu, seg, offset, 1, access)?;
    env.translate(cpu, linear, access).map(|_| ())
}

/// Descriptor tables, translation caches, machine status.
fn tables<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Option<Result<(), Stop>> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Lgdt => table_operand(cpu, env, insn).map(|table| cpu.gdtr = table),
        M::Lidt => table_operand(cpu, env, insn).map(|table| cpu.idtr = table),
        M::Sgdt => store_table(cpu, env, insn, cpu.gdtr),
        M::Sidt => store_table(cpu, env, insn, cpu.idtr),
        M::Smsw => control::check_umip(cpu).and_then(|()| write_word(cpu, env, insn, cpu.cr0)),
        M::Lmsw => control::require_cpl0(cpu)
            .and_then(|()| read_word(cpu, env, insn, 0))
            .and_then(|value| control::lmsw(cpu, env, value)),
        M::Clts => control::clts(cpu),
        M::Invlpg => control::invlpg(cpu, env, named_address(cpu, insn)),
        M::Invpcid => invpcid(cpu, env, insn),
        M::Clflush | M::Clflushopt | M::Clwb => cache_line(cpu, env, insn),
        M::Cldemote => Ok(()),
        M::Invd | M::Wbinvd | M::Wbnoinvd => control::require_cpl0(cpu),
        _ => return None,
    })
}

/// EDX:EAX.
fn set_edx_eax(cpu: &mut CpuState, value: u64) {
    cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.gpr[gpr::RDX] = value >> 32;
}

fn edx_eax(cpu: &CpuState) -> u64 {
    (cpu.gpr[gpr::RDX] << 32) | (cpu.gpr[gpr::RAX] & 0xffff_ffff)
}

fn cpuid<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E) {
    let (leaf, subleaf) = (cpu.gpr[gpr::RAX] as u32, cpu.gpr[gpr::RCX] as u32);
    let [eax, ebx, ecx, edx] = env.cpuid(cpu, leaf, subleaf);
    cpu.gpr[gpr::RAX] = u64::from(eax);
    cpu.gpr[gpr::RBX] = u64::from(ebx);
    cpu.gpr[gpr::RCX] = u64::from(ecx);
    cpu.gpr[gpr::RDX] = u64::from(edx);
}

/// CPUID.01H:ECX: MONITOR and MWAIT.
const MONITOR: u32 = 1 << 3;

/// VMCALL and VMMCALL.
fn hypercall<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Result<(), Stop> {
    let features = env.features();
    let (own, opcode) = if features.amd {
        (Mnemonic::Vmmcall, [0x0f, 0x01, 0xd9])
    } else {
        (Mnemonic::Vmcall, [0x0f, 0x01, 0xc1])
    };
    if insn.mnemonic() != own {
        match features.foreign_hypercall {
            ForeignHypercall::Serve => {}
            ForeignHypercall::Undefined => return Err(Stop::ud()),
            ForeignHypercall::Patch => {
                // Prefixes stay.
                let offset = next_rip(cpu, insn).wrapping_sub(opcode.len() as u64);
                let linear = if cpu.code_size() == CodeSize::Bits64 {
                    offset
                } else {
                    cpu.seg[sreg::CS].base.wrapping_add(offset) & 0xffff_ffff
                };
                mem::write_linear(cpu, env, linear, &opcode, Access::write(cpu))?;
            }
        }
    }
    env.hypercall(cpu)
}

/// Model-specific registers, identification, time, idling, hypercalls; and what this CPU lacks.
fn processor<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    insn: &Instruction,
) -> Option<Result<(), Stop>> {
    use Mnemonic as M;
    let index = cpu.gpr[gpr::RCX] as u32;
    Some(match insn.mnemonic() {
        M::Cpuid => {
            if cpu.cpl != 0 && !cpu.smm && env.features().cpuid_faulting {
                return Some(Err(Stop::gp(0)));
            }
            cpuid(cpu, env);
            Ok(())
        }
        M::Rdmsr => control::require_cpl0(cpu)
            .and_then(|()| env.rdmsr(cpu, index))
            .map(|value| set_edx_eax(cpu, value)),
        M::Wrmsr => control::require_cpl0(cpu).and_then(|()| env.wrmsr(cpu, index, edx_eax(cpu))),
        M::Rdtsc => control::rdtsc(cpu, env).map(|value| set_edx_eax(cpu, value)),
        M::Rdtscp => {
            if env.features().ext1_edx & (1 << 27) == 0 {
                return Some(Err(Stop::ud()));
            }
            control::rdtsc(cpu, env).map(|value| {
                set_edx_eax(cpu, value);
                cpu.gpr[gpr::RCX] = cpu.tsc_aux & 0xffff_ffff;
            })
        }
        M::Rdpid => {
            if env.features().leaf7_ecx & (1 << 22) == 0 {
                return Some(Err(Stop::ud()));
            }
            write_gpr(cpu, insn.op0_register(), cpu.tsc_aux & 0xffff_ffff);
            Ok(())
        }
        M::Rdpmc => control::rdpmc(),
        M::Xgetbv => control::xgetbv(cpu, index).map(|value| set_edx_eax(cpu, value)),
        M::Xsetbv => control::xsetbv(cpu, env, index, edx_eax(cpu)),
        M::Hlt => control::require_cpl0(cpu).and(Err(Stop::Exit(Exit::Hlt))),
        M::Vmcall | M::Vmmcall => hypercall(cpu, env, insn),
        M::Monitor | M::Mwait
            if env.features().strict_monitor && env.features().leaf1_ecx & MONITOR == 0 =>
        {
            Err(Stop::ud())
        }
        // Waiting is allowed to end at any time, so it ends at once.
        M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx if cpu.cpl == 0 => Ok(()),
        M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx => Err(Stop::ud()),
        M::Rsm
        | M::Vmlaunch
        | M::Vmresume
        | M::Vmxoff
        | M::Vmxon
        | M::Vmptrld
        | M::Vmptrst
        | M::Vmclear
        | M::Vmread
        | M::Vmwrite
        | M::Vmfunc
        | M::Invept
        | M::Invvpid
        | M::Vmrun
        | M::Vmload
        | M::Vmsave
        | M::Stgi
        | M::Clgi
        | M::Skinit
        | M::Invlpga
        | M::Invlpgb
        | M::Tlbsync
        | M::Getsec
        | M::Encls
        | M::Enclu
        | M::Enclv
        | M::Pconfig => Err(Stop::ud()),
        _ => return None,
    })
}
