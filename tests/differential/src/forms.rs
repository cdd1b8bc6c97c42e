//! One instruction of a given form, with random operands and a state that makes sense for it.

use crate::case::{ARITH, Case, component, host_components, vector_state};
use crate::layout::*;
use crate::random::Random;
use crate::suite::Rules;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, FlowControl, Instruction, Mnemonic,
    OpCodeOperandKind, OpKind, Register, RoundingControl,
};

/// Why a form takes no part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Excluded {
    /// The decoder knows no such form in this mode.
    Mode,
    /// It needs CPL 0, and is #GP here; it runs as that.
    Privileged,
    /// Not an instruction: data directives and the like.
    NotCode,
    /// The generator makes no operands for it.
    Operands,
}

/// The forms that the decoder's tables know for a mode.
pub fn all(bits: u32) -> Vec<Code> {
    Code::values()
        .filter(|c| excluded(*c, bits).is_none())
        .collect()
}

fn excluded(code: Code, bits: u32) -> Option<Excluded> {
    let op = code.op_code();
    if !op.is_instruction() || code == Code::INVALID || code.mnemonic() == Mnemonic::INVALID {
        return Some(Excluded::NotCode);
    }
    let mode = if bits == 64 { op.mode64() } else { op.mode32() };
    if !mode {
        return Some(Excluded::Mode);
    }
    // Forms of decoders for other processors, which the options in use do not decode.
    if op.decoder_option() != DecoderOptions::NONE {
        return Some(Excluded::NotCode);
    }
    if matches!(op.encoding(), iced_x86::EncodingKind::MVEX) {
        return Some(Excluded::NotCode);
    }
    None
}

/// Whether and how a form can be compared with the host.
pub fn rules(insn: &Instruction) -> Rules {
    use Mnemonic as M;
    let mut rules = Rules {
        undefined: undefined(insn),
        ..Rules::default()
    };
    let mmx = |n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_mm();
    // The host's microcode touches the operands of these in its own order, and AMD's processors change
    // the x87 tags before an MMX instruction faults.
    rules.fault = !(insn.is_save_restore_instruction()
        || matches!(
            insn.mnemonic(),
            M::Fnsave
                | M::Fsave
                | M::Frstor
                | M::Fnstenv
                | M::Fstenv
                | M::Fldenv
                | M::Maskmovdqu
                | M::Vmaskmovdqu
                | M::Maskmovq
                | M::Wait
        )
        || insn.is_call_far_indirect()
        || insn.is_vsib()
        || insn.is_jmp_far_indirect()
        || matches!(insn.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsq)
        || matches!(insn.code(), Code::Cmpsd_m32_m32)
        || (0..insn.op_count()).any(mmx));
    if insn.is_call_near_indirect() {
        // The translator has pushed the return address before it finds that the target is bad.
        rules.fault = false;
    }
    if insn.code() == Code::Movsxd_r16_rm16 {
        // AMD's processors read four bytes.
        rules.fault = false;
    }
    if insn.is_save_restore_instruction() {
        // Which components count as in use is the processor's choice.
        rules.memory = false;
    }
    if matches!(insn.mnemonic(), M::Pushf | M::Pushfd | M::Pushfq) {
        // Alignment of flag images is not checked here.
        rules.fault = false;
    }
    match insn.mnemonic() {
        // They would call the kernel, or the kernel emulates them or has its own tables.
        M::Syscall | M::Sysenter | M::Int | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
            rules.native = false
        }
        // A hypervisor below the host may see them first, and does as it likes.
        M::Clgi
        | M::Stgi
        | M::Invlpga
        | M::Skinit
        | M::Vmrun
        | M::Vmload
        | M::Vmsave
        | M::Vmgexit
        | M::Vmcall
        | M::Vmmcall
        | M::Monitorx
        | M::Mwaitx
        | M::Monitor
        | M::Mwait
        | M::Pvalidate
        | M::Rmpadjust
        | M::Rmpupdate
        | M::Rmpquery
        | M::Psmash
        | M::Int1 => rules.native = false,
        // What they read is the host's own business.
        M::Lsl | M::Lar | M::Verr | M::Verw | M::Cpuid | M::Rdpid | M::Xgetbv => {
            rules.native = false
        }
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Rdpmc | M::Rdpru => {
            rules.native = false;
            rules.values = false;
        }
        _ => {}
    }
    rules
}

/// RFLAGS bits that are undefined after `insn`.
pub fn undefined(insn: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let u = insn.rflags_undefined();
    let mut bits = 0;
    for (b, flag) in [
        (B::CF, 0),
        (B::PF, 2),
        (B::AF, 4),
        (B::ZF, 6),
        (B::SF, 7),
        (B::OF, 11),
    ] {
        if u & b != 0 {
            bits |= 1 << flag;
        }
    }
    if matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
        // For counts other than 1, also where the rotation comes out as none.
        bits |= 1 << 11;
    }
    bits
}

/// A data address for `size` bytes: mostly good, now and then misaligned, across pages or faulting.
fn target(r: &mut Random, size: u64, bits: u32, low: bool) -> u64 {
    let size = size.max(1);
    let base = DATA.linear;
    match r.below(32) {
        // Across the border of two good pages.
        0..=2 => base + PAGE - r.below(size + 1),
        // Across or at a border to: read-only, absent, supervisor.
        3 => base + 2 * PAGE - r.below(size + 1),
        4 => base + 4 * PAGE - r.below(size + 1),
        5 => base + 5 * PAGE - r.below(size + 1),
        6 => base + 6 * PAGE - r.below(size + 1),
        7 => base + 7 * PAGE - r.below(size + 1),
        8 => base + 2 * PAGE + r.below(PAGE - size),
        9 if bits == 64 && !low => r.pick(&[0x8000_0000_0000, 0xffff_7fff_ffff_0000, 1 << 63]),
        9 => 0x10,
        10 | 11 => STACK.linear + r.below(4 * PAGE - size),
        12..=14 if bits == 64 && !low => HIGH.linear + r.below(2 * PAGE - size),
        15 => CODE.linear + 0x2000 + r.below(PAGE),
        16..=19 => base + r.below(PAGE - size),
        20 => base + 3 * PAGE + r.below(PAGE - size),
        _ => base + (r.below(2 * PAGE - size) & !63),
    }
}

const GPR: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

fn nth(base: Register, n: u8) -> Register {
    base + u32::from(n)
}

/// Registers that point at data and keep doing so, for operands inside longer code.
#[derive(Clone, Debug, Default)]
pub struct Pointers(pub Vec<(u8, u64)>);

/// One memory operand through a pointer, with the displacement that its value asks for.
fn memory_through(
    r: &mut Random,
    insn: &mut Instruction,
    case: &Case,
    pointers: &Pointers,
    size: u64,
) {
    let long = case.bits == 64;
    let first = if long { Register::RAX } else { Register::EAX };
    let (base, value) = pointers.0[r.below(pointers.0.len() as u64) as usize];
    let size = size.max(1);
    let goal = match r.below(16) {
        0 => DATA.linear + PAGE - r.below(size + 1),
        1 | 2 if value > 1 << 32 => HIGH.linear + r.below(2 * PAGE - size),
        3 => STACK.linear + r.below(PAGE - size),
        4 if r.one_in(4) => target(r, size, case.bits, true),
        5..=8 => DATA.linear + r.below(PAGE - size),
        9 => DATA.linear + 3 * PAGE + r.below(PAGE - size),
        _ => DATA.linear + (r.below(2 * PAGE - size) & !63),
    };
    let goal = if value > 1 << 32 {
        HIGH.linear + goal % (2 * PAGE - 64)
    } else {
        goal
    };
    let mut at = value;
    insn.set_memory_base(nth(first, base));
    if value < 1 << 32 && r.one_in(3) {
        let (index, v) = pointers.0[r.below(pointers.0.len() as u64) as usize];
        if v < 1 << 28 && index != 4 {
            let scale = r.below(4) as u32;
            insn.set_memory_index(nth(first, index));
            insn.set_memory_index_scale(1 << scale);
            at = at.wrapping_add(v << scale);
        }
    } else if long && value < 1 << 32 && r.one_in(8) {
        insn.set_memory_base(Register::RIP);
        insn.set_memory_displacement64(goal);
        insn.set_memory_displ_size(8);
        return;
    }
    let disp = goal.wrapping_sub(at);
    insn.set_memory_displacement64(if long { disp } else { disp & 0xffff_ffff });
    insn.set_memory_displ_size(match disp as i64 {
        0 => 0,
        -128..128 => 1,
        _ => {
            if long {
                8
            } else {
                4
            }
        }
    });
}

/// One memory operand, chosen and solved for the registers it names.
fn memory(r: &mut Random, insn: &mut Instruction, case: &mut Case, size: u64, rip: u64) {
    let long = case.bits == 64;
    let count = if long { 16 } else { 8 };
    let wide = if long { !r.one_in(8) } else { false };
    let segment = match r.below(10) {
        0 => Some((Register::FS, case.fs_base)),
        1 => Some((Register::GS, case.gs_base)),
        _ => None,
    };
    if let Some((s, _)) = segment {
        insn.set_segment_prefix(s);
    }
    let goal = target(r, size, case.bits, !wide).wrapping_sub(segment.map_or(0, |s| s.1));
    let first = if wide { Register::RAX } else { Register::EAX };
    let kind = r.below(10);
    let disp_size = |v: i64| {
        if v == 0 {
            0
        } else if (-128..128).contains(&v) {
            1
        } else {
            8
        }
    };
    // RIP-relative or absolute, where it reaches.
    if kind == 0 && long && segment.is_none() && goal < 1 << 31 {
        insn.set_memory_base(if wide { Register::RIP } else { Register::EIP });
        insn.set_memory_displacement64(goal);
        insn.set_memory_displ_size(if wide { 8 } else { 4 });
        let _ = rip;
        return;
    }
    if kind == 1 && (goal as i32 as i64 as u64 == goal || !long) {
        insn.set_memory_displacement64(if long { goal } else { goal & 0xffff_ffff });
        insn.set_memory_displ_size(if long { 8 } else { 4 });
        return;
    }
    if !long && kind == 2 {
        // 16-bit addressing reaches nothing mapped: a fault, but the same one.
        insn.set_memory_base(r.pick(&[Register::BX, Register::BP]));
        insn.set_memory_index(r.pick(&[Register::SI, Register::DI, Register::None]));
        insn.set_memory_displacement64(r.below(128));
        insn.set_memory_displ_size(1);
        return;
    }
    let base = r.pick(&GPR[..count]);
    let mut index = r.pick(&GPR[..count]);
    let disp: i64 = match r.below(5) {
        0 | 1 => 0,
        2 | 3 => r.below(256) as i64 - 128,
        _ => i64::from(r.bits() as i32 >> r.below(20)),
    };
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    // A 32-bit address ignores the upper halves.
    let upper = |r: &mut Random| {
        if wide || !long {
            0
        } else {
            r.bits() & !0xffff_ffff
        }
    };
    let with_index = r.one_in(2) && index != 4 && index != base;
    let scale = r.below(4) as u32;
    insn.set_memory_displacement64(
        disp as u64 & if wide || !long { u64::MAX } else { 0xffff_ffff },
    );
    if !long {
        insn.set_memory_displacement64(disp as u64 & 0xffff_ffff);
    }
    insn.set_memory_displ_size(match disp_size(disp) {
        8 if !wide => 4,
        n => n,
    });
    if with_index {
        insn.set_memory_index(nth(first, index));
        insn.set_memory_index_scale(1 << scale);
        let v = match r.below(3) {
            0 => r.below(64),
            1 => (r.below(64) as i64 - 32) as u64,
            _ => r.value(),
        };
        case.gpr[usize::from(index)] = v & mask | upper(r);
        insn.set_memory_base(nth(first, base));
        let v = goal
            .wrapping_sub(disp as u64)
            .wrapping_sub((v & mask) << scale);
        case.gpr[usize::from(base)] = v & mask | upper(r);
        return;
    }
    if r.one_in(6) && index != 4 {
        // Index alone: what the scale allows.
        insn.set_memory_index(nth(first, index));
        insn.set_memory_index_scale(1 << scale);
        insn.set_memory_displ_size(if wide { 8 } else { 4 });
        let v = goal.wrapping_sub(disp as u64) & mask;
        case.gpr[usize::from(index)] = (v >> scale) | upper(r);
        return;
    }
    index = base;
    insn.set_memory_base(nth(first, index));
    case.gpr[usize::from(base)] = goal.wrapping_sub(disp as u64) & mask | upper(r);
}

/// A vector-indexed memory operand, with an index vector of small numbers most of the time.
fn vsib(
    r: &mut Random,
    insn: &mut Instruction,
    case: &mut Case,
    first: Register,
    wide_index: bool,
    evex: bool,
) {
    let long = case.bits == 64;
    let n = r.below(if !long {
        8
    } else if evex {
        32
    } else {
        16
    }) as u8;
    insn.set_memory_index(nth(first, n));
    insn.set_memory_index_scale(1 << r.below(4));
    let base = r.pick(&GPR[..if long { 16 } else { 8 }]);
    insn.set_memory_base(nth(if long { Register::RAX } else { Register::EAX }, base));
    insn.set_memory_displacement64(0);
    let goal = match r.below(6) {
        0 => DATA.linear + r.below(7 * PAGE),
        1 if long => HIGH.linear + r.below(PAGE),
        _ => DATA.linear + 0x800,
    };
    case.gpr[usize::from(base)] = goal;
    if r.one_in(8) {
        return;
    }
    let step = if wide_index { 8 } else { 4 };
    let reach = r.pick(&[16, 64, 256, 1024, 4096]);
    let mut bytes = Vec::with_capacity(64);
    while bytes.len() < 64 {
        let v =
            (r.below(reach) as i64 - if r.one_in(4) { reach as i64 / 2 } else { 0 }).to_le_bytes();
        bytes.extend_from_slice(&v[..step]);
    }
    case.vectors.push((n, bytes));
}

/// A random state for one instruction.
pub fn state(r: &mut Random, bits: u32) -> Case {
    let mut case = Case::new(bits);
    case.memory = r.bits();
    case.vector = r.bits();
    case.at = match r.below(4) {
        // Across a page.
        0 => CODE.linear + PAGE - r.below(16),
        _ => CODE.linear + 0x100 + r.below(0x1e00),
    };
    for n in 0..16 {
        if n != 4 {
            case.gpr[n] = if r.one_in(3) {
                DATA.linear + r.below(0x2000)
            } else {
                r.value()
            };
        }
        if bits == 32 {
            case.gpr[n] &= 0xffff_ffff;
        }
    }
    if bits == 32 {
        // Not reachable, and kept.
        for n in 8..16 {
            case.gpr[n] = 0;
        }
    }
    case.gpr[4] = match r.below(8) {
        0 => STACK.linear + 2 * PAGE + r.below(16),
        1 => STACK.linear + r.below(4 * PAGE),
        _ => STACK.linear + 0x1000 + (r.below(0x1000) & !7),
    };
    case.rflags = r.bits() & ARITH;
    if r.one_in(4) {
        case.rflags |= 1 << 10;
    }
    if r.one_in(64) {
        case.rflags |= 1 << 18;
    }
    if bits == 64 {
        case.fs_base = r.pick(&[
            0,
            DATA.linear,
            HIGH.linear,
            0x1234_5000,
            0xffff_ffff_ff80_0000,
        ]);
        case.gs_base = r.pick(&[0, DATA.linear + 0x40, STACK.linear, 0x7fff_0000_0000]);
    }
    case
}

/// Registers, memory operand, immediates of one form. `None`: the generator has none for it.
pub fn operands(
    r: &mut Random,
    code: Code,
    case: &mut Case,
    pointers: Option<&Pointers>,
) -> Option<Instruction> {
    use OpCodeOperandKind as K;
    let long = case.bits == 64;
    let mut insn = Instruction::default();
    insn.set_code(code);
    let op = code.op_code();
    let count = if long { 16u64 } else { 8 };
    let evex = op.encoding() == iced_x86::EncodingKind::EVEX;
    let vectors = if !long {
        8
    } else if evex {
        32
    } else {
        16
    };
    let gpr = |r: &mut Random, base: Register| Some(nth(base, r.below(count) as u8));
    let byte = |r: &mut Random| {
        let n = r.below(if long { 20 } else { 8 }) as u8;
        Some(nth(Register::AL, n))
    };
    let vector = |r: &mut Random, base: Register| Some(nth(base, r.below(vectors) as u8));
    let mut memory_at = None;
    let mut immediates = 0;
    for n in 0..op.op_count() {
        let (or_memory, register) = match op.op_kind(n) {
            K::mem => (true, None),
            K::r8_or_mem => (true, byte(r)),
            K::r16_or_mem => (true, gpr(r, Register::AX)),
            K::r32_or_mem => (true, gpr(r, Register::EAX)),
            K::r64_or_mem => (true, gpr(r, Register::RAX)),
            K::xmm_or_mem => (true, vector(r, Register::XMM0)),
            K::ymm_or_mem => (true, vector(r, Register::YMM0)),
            K::zmm_or_mem => (true, vector(r, Register::ZMM0)),
            K::mm_or_mem => (true, Some(nth(Register::MM0, r.below(8) as u8))),
            K::k_or_mem => (true, Some(nth(Register::K0, r.below(8) as u8))),
            K::r8_reg | K::r8_opcode => (false, byte(r)),
            K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                (false, gpr(r, Register::AX))
            }
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv | K::r32_reg_mem => {
                (false, gpr(r, Register::EAX))
            }
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv | K::r64_reg_mem => {
                (false, gpr(r, Register::RAX))
            }
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => (false, vector(r, Register::XMM0)),
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => (false, vector(r, Register::YMM0)),
            K::zmm_reg | K::zmm_rm | K::zmm_vvvv => (false, vector(r, Register::ZMM0)),
            K::mm_reg | K::mm_rm => (false, Some(nth(Register::MM0, r.below(8) as u8))),
            K::k_reg | K::k_rm | K::k_vvvv => (false, Some(nth(Register::K0, r.below(8) as u8))),
            K::kp1_reg => (false, Some(nth(Register::K0, r.below(8) as u8))),
            K::seg_reg => {
                let load = n == 0;
                let s = if load {
                    r.pick(&[0u8, 3, 4, 5])
                } else {
                    r.below(6) as u8
                };
                (false, Some(nth(Register::ES, s)))
            }
            K::cr_reg => (
                false,
                Some(r.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4])),
            ),
            K::dr_reg => (false, Some(r.pick(&[Register::DR0, Register::DR7]))),
            K::al => (false, Some(Register::AL)),
            K::cl => (false, Some(Register::CL)),
            K::ax => (false, Some(Register::AX)),
            K::dx => (false, Some(Register::DX)),
            K::eax => (false, Some(Register::EAX)),
            K::rax => (false, Some(Register::RAX)),
            K::es => (false, Some(Register::ES)),
            K::cs => (false, Some(Register::CS)),
            K::ss => (false, Some(Register::SS)),
            K::ds => (false, Some(Register::DS)),
            K::fs => (false, Some(Register::FS)),
            K::gs => (false, Some(Register::GS)),
            K::st0 => (false, Some(Register::ST0)),
            K::sti_opcode => (false, Some(nth(Register::ST0, r.below(8) as u8))),
            K::mem_vsib32x
            | K::mem_vsib32y
            | K::mem_vsib32z
            | K::mem_vsib64x
            | K::mem_vsib64y
            | K::mem_vsib64z => {
                insn.set_op_kind(n, OpKind::Memory);
                let (first, wide) = match op.op_kind(n) {
                    K::mem_vsib32x => (Register::XMM0, false),
                    K::mem_vsib32y => (Register::YMM0, false),
                    K::mem_vsib32z => (Register::ZMM0, false),
                    K::mem_vsib64x => (Register::XMM0, true),
                    K::mem_vsib64y => (Register::YMM0, true),
                    _ => (Register::ZMM0, true),
                };
                vsib(r, &mut insn, case, first, wide, evex);
                continue;
            }
            K::imm8 | K::imm4_m2z if immediates == 0 => {
                immediates += 1;
                insn.set_op_kind(n, OpKind::Immediate8);
                insn.set_immediate8(r.below(if op.op_kind(n) == K::imm8 { 256 } else { 4 }) as u8);
                if code == Code::Int_imm8 {
                    insn.set_immediate8(r.pick(&[3, 4, 0x80, 0x20]));
                }
                continue;
            }
            K::imm8_const_1 => {
                insn.set_op_kind(n, OpKind::Immediate8);
                insn.set_immediate8(1);
                continue;
            }
            K::imm8 => {
                insn.set_op_kind(n, OpKind::Immediate8_2nd);
                insn.set_immediate8_2nd(r.bits() as u8);
                continue;
            }
            K::imm16 => {
                immediates += 1;
                insn.set_op_kind(n, OpKind::Immediate16);
                let small = matches!(code.mnemonic(), Mnemonic::Enter | Mnemonic::Retf);
                insn.set_immediate16(if small {
                    r.below(64) as u16
                } else {
                    r.value() as u16
                });
                continue;
            }
            K::imm32 => {
                insn.set_op_kind(n, OpKind::Immediate32);
                insn.set_immediate32(r.value() as u32);
                continue;
            }
            K::imm64 => {
                insn.set_op_kind(n, OpKind::Immediate64);
                insn.set_immediate64(r.value());
                continue;
            }
            kind @ (K::imm8sex16 | K::imm8sex32 | K::imm8sex64) => {
                insn.set_op_kind(
                    n,
                    match kind {
                        K::imm8sex16 => OpKind::Immediate8to16,
                        K::imm8sex32 => OpKind::Immediate8to32,
                        _ => OpKind::Immediate8to64,
                    },
                );
                insn.set_immediate8(r.bits() as u8);
                continue;
            }
            K::imm32sex64 => {
                insn.set_op_kind(n, OpKind::Immediate32to64);
                insn.set_immediate32(r.value() as u32);
                continue;
            }
            kind @ (K::br16_1
            | K::br16_2
            | K::br32_1
            | K::br32_4
            | K::br64_1
            | K::br64_4
            | K::xbegin_2
            | K::xbegin_4) => {
                let near = matches!(kind, K::br16_1 | K::br32_1 | K::br64_1);
                let to = if near {
                    case.at + 24 + r.below(60)
                } else {
                    match r.below(5) {
                        0 => DATA.linear + r.below(0x8000),
                        1 => 0x10_0000,
                        _ => CODE.linear + r.below(0x4000),
                    }
                };
                match kind {
                    K::br16_1 | K::br16_2 => {
                        insn.set_op_kind(n, OpKind::NearBranch16);
                        insn.set_near_branch16(to as u16);
                    }
                    K::br32_1 | K::br32_4 => {
                        insn.set_op_kind(n, OpKind::NearBranch32);
                        insn.set_near_branch32(to as u32);
                    }
                    K::xbegin_2 | K::xbegin_4 if !long => {
                        insn.set_op_kind(n, OpKind::NearBranch32);
                        insn.set_near_branch32(to as u32);
                    }
                    _ => {
                        insn.set_op_kind(n, OpKind::NearBranch64);
                        insn.set_near_branch64(to);
                    }
                }
                continue;
            }
            kind @ (K::farbr2_2 | K::farbr4_2) => {
                insn.set_far_branch_selector(r.pick(&[CS32, CS32, CS64, DS, 0, 0x10]));
                if kind == K::farbr2_2 {
                    insn.set_op_kind(n, OpKind::FarBranch16);
                    insn.set_far_branch16(0x1000);
                } else {
                    insn.set_op_kind(n, OpKind::FarBranch32);
                    insn.set_far_branch32((CODE.linear + 0x1234) as u32);
                }
                continue;
            }
            K::mem_offs => {
                insn.set_op_kind(n, OpKind::Memory);
                let low = !long || r.one_in(4);
                let goal = target(r, 8, case.bits, low);
                insn.set_memory_displacement64(goal);
                insn.set_memory_displ_size(if low { 4 } else { 8 });
                continue;
            }
            kind @ (K::seg_rSI | K::es_rDI | K::seg_rDI | K::seg_rBX_al) => {
                let size = r.below(3);
                let pick = |k: [OpKind; 3]| {
                    if long {
                        k[usize::from(size != 0)]
                    } else {
                        k[1 + usize::from(size == 0)]
                    }
                };
                insn.set_op_kind(
                    n,
                    match kind {
                        K::seg_rSI => pick([
                            OpKind::MemorySegESI,
                            OpKind::MemorySegRSI,
                            OpKind::MemorySegSI,
                        ]),
                        K::es_rDI => {
                            pick([OpKind::MemoryESEDI, OpKind::MemoryESRDI, OpKind::MemoryESDI])
                        }
                        K::seg_rDI => pick([
                            OpKind::MemorySegEDI,
                            OpKind::MemorySegRDI,
                            OpKind::MemorySegDI,
                        ]),
                        _ => OpKind::Memory,
                    },
                );
                // One address size for all operands of the instruction.
                if !long {
                    let k = match kind {
                        K::seg_rSI => OpKind::MemorySegESI,
                        K::es_rDI => OpKind::MemoryESEDI,
                        K::seg_rDI => OpKind::MemorySegEDI,
                        _ => OpKind::Memory,
                    };
                    insn.set_op_kind(n, k);
                } else {
                    let k = match (kind, case.memory & 7) {
                        (K::seg_rSI, 0) => OpKind::MemorySegESI,
                        (K::seg_rSI, _) => OpKind::MemorySegRSI,
                        (K::es_rDI, 0) => OpKind::MemoryESEDI,
                        (K::es_rDI, _) => OpKind::MemoryESRDI,
                        (K::seg_rDI, 0) => OpKind::MemorySegEDI,
                        (K::seg_rDI, _) => OpKind::MemorySegRDI,
                        _ => OpKind::Memory,
                    };
                    insn.set_op_kind(n, k);
                }
                let low = case.memory & 7 == 0 && long;
                let junk = if low { r.bits() & !0xffff_ffff } else { 0 };
                match kind {
                    K::seg_rSI => case.gpr[6] = target(r, 8, case.bits, low) | junk,
                    K::es_rDI | K::seg_rDI => case.gpr[7] = target(r, 16, case.bits, low) | junk,
                    _ => {
                        insn.set_memory_base(if !long || low {
                            Register::EBX
                        } else {
                            Register::RBX
                        });
                        insn.set_memory_index(Register::AL);
                        case.gpr[3] = target(r, 1, case.bits, low) | junk;
                    }
                }
                if op.can_use_rep_prefix() || op.can_use_repne_prefix() {
                    if r.one_in(2) {
                        if r.one_in(2) && op.can_use_repne_prefix() {
                            insn.set_has_repne_prefix(true);
                        } else {
                            insn.set_has_rep_prefix(true);
                        }
                    }
                    case.gpr[1] = match r.below(6) {
                        0 => 0,
                        1 => r.below(0x1000),
                        2 => r.bits() & 0xffff_ffff,
                        _ => r.below(20),
                    };
                }
                if n == 0 && r.one_in(4) && matches!(kind, K::seg_rSI) {
                    insn.set_segment_prefix(Register::FS);
                }
                continue;
            }
            _ => return None,
        };
        if or_memory && (register.is_none() || r.one_in(2)) {
            insn.set_op_kind(n, OpKind::Memory);
            memory_at = Some(n);
        } else {
            insn.set_op_kind(n, OpKind::Register);
            insn.set_op_register(n, register?);
        }
    }
    if op.can_use_op_mask_register() && (op.require_op_mask_register() || r.one_in(2)) {
        insn.set_op_mask(nth(Register::K1, r.below(7) as u8));
        let stores = memory_at == Some(0);
        if op.can_use_zeroing_masking() && !stores && r.one_in(2) {
            insn.set_zeroing_masking(true);
        }
    }
    if memory_at.is_some() && op.can_broadcast() && r.one_in(3) {
        insn.set_is_broadcast(true);
    }
    if memory_at.is_none() && r.one_in(3) {
        if op.can_use_rounding_control() {
            insn.set_rounding_control(r.pick(&[
                RoundingControl::RoundToNearest,
                RoundingControl::RoundDown,
                RoundingControl::RoundUp,
                RoundingControl::RoundTowardZero,
            ]));
        } else if op.can_suppress_all_exceptions() {
            insn.set_suppress_all_exceptions(true);
        }
    }
    if memory_at == Some(0) && op.can_use_lock_prefix() && r.one_in(3) {
        insn.set_has_lock_prefix(true);
    }
    if memory_at.is_some() {
        let size = insn.memory_size();
        let bytes = if insn.is_broadcast() {
            size.element_size()
        } else {
            size.size()
        };
        match pointers {
            Some(p) => memory_through(r, &mut insn, case, p, bytes as u64),
            None => {
                let at = case.at;
                memory(r, &mut insn, case, bytes as u64, at);
            }
        }
    }
    if pointers.is_none() {
        adjust(r, &insn, case);
    }
    Some(insn)
}

/// States that some instructions need to do something interesting.
fn adjust(r: &mut Random, insn: &Instruction, case: &mut Case) {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Div | M::Idiv if r.one_in(2) => {
            case.gpr[2] = r.pick(&[0, u64::MAX, r.clone().below(100)]);
        }
        M::Jrcxz | M::Jecxz | M::Jcxz | M::Loop | M::Loope | M::Loopne => {
            case.gpr[1] = r.pick(&[0, 1, 2, 1 << 32, 0xffff_0000_0001, u64::MAX]);
        }
        M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b if r.one_in(2) => {
            // Half of the time what is compared is equal.
            let regs = case.regs();
            let mut probe = vec![0; USER_SIZE as usize];
            case.fill(&mut probe);
            if let Some(at) = memory_offset(insn, &regs.gpr, case) {
                let at = at as usize;
                if at + 16 <= probe.len() {
                    let word = |n: usize| {
                        u64::from_le_bytes(probe[n..n + 8].try_into().unwrap_or_default())
                    };
                    match insn.mnemonic() {
                        M::Cmpxchg16b => {
                            case.gpr[0] = word(at);
                            case.gpr[2] = word(at + 8);
                        }
                        M::Cmpxchg8b => {
                            case.gpr[0] = word(at) & 0xffff_ffff;
                            case.gpr[2] = word(at) >> 32;
                        }
                        _ => case.gpr[0] = word(at),
                    }
                }
            }
        }
        M::Ret | M::Retf | M::Iret | M::Iretd | M::Iretq => {
            frame(r, insn, case);
        }
        M::Jmp | M::Call => {
            let to = CODE.linear + r.below(0x3f00);
            if insn.op0_kind() == OpKind::Register {
                let reg = insn.op0_register();
                if reg.is_gpr() && !r.one_in(6) {
                    case.gpr[reg.full_register().number() % 16] = to;
                }
            } else if insn.op0_kind() == OpKind::Memory {
                let gpr = case.gpr;
                if let Some(at) = memory_offset(insn, &gpr, case) {
                    let mut bytes = to.to_le_bytes().to_vec();
                    let width = match insn.code() {
                        Code::Jmp_m1616 | Code::Call_m1616 => 2,
                        Code::Jmp_m1632 | Code::Call_m1632 => 4,
                        _ => 8,
                    };
                    if insn.is_jmp_far_indirect() || insn.is_call_far_indirect() {
                        bytes.truncate(width);
                        bytes.extend(r.pick(&[CS64, CS64, CS32, DS, 0, 0x10, 0x53]).to_le_bytes());
                    }
                    if at + bytes.len() as u64 <= USER_SIZE && at > 0x4000 && !r.one_in(6) {
                        case.patches.push((at, bytes));
                    }
                }
            }
        }
        M::Mov | M::Lar | M::Lsl | M::Verr | M::Verw | M::Lfs | M::Lgs | M::Lss => {
            let selectors = [0, 0, 3, DS, CS64, CS32, KERNEL_CS, 0x18, 0x53, 0x7b, 0xff];
            let source = if insn.op_count() > 1 { 1 } else { 0 };
            let segment = insn.op0_register().is_segment_register() || insn.mnemonic() != M::Mov;
            if segment {
                let s = r.pick(&selectors);
                match insn.op_kind(source) {
                    OpKind::Register if insn.op_register(source).is_gpr() => {
                        let n = insn.op_register(source).full_register().number() % 16;
                        case.gpr[n] = case.gpr[n] & !0xffff | u64::from(s);
                    }
                    OpKind::Memory => {
                        let gpr = case.gpr;
                        if let Some(at) = memory_offset(insn, &gpr, case) {
                            let skip = match insn.mnemonic() {
                                M::Lfs | M::Lgs | M::Lss => insn.op0_register().size() as u64,
                                _ => 0,
                            };
                            if at + skip + 2 <= USER_SIZE && at > 0x4000 {
                                case.patches.push((at + skip, s.to_le_bytes().to_vec()));
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
        M::Popf | M::Popfd | M::Popfq => {
            let sp = case.gpr[4].wrapping_sub(STACK.linear);
            if sp + 8 <= 4 * PAGE {
                // No single-step, which the host's kernel handles in its own way.
                let flags = (r.bits() & 0x24_7ed7 | 2).to_le_bytes();
                case.patches.push((STACK.gpa - USER + sp, flags.to_vec()));
            }
        }
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xrstor
        | M::Xrstor64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Fxsave
        | M::Fxsave64 => {
            let gpr = case.gpr;
            if let Some(at) = memory_offset(insn, &gpr, case)
                && at & 63 == 0
                && at > 0x4000
                && at + 2700 < USER_SIZE
            {
                let size = (2..8)
                    .filter(|n| host_components() & (1 << n) != 0)
                    .map(|n| {
                        let (o, s) = component(n);
                        o + s
                    });
                let size = size.max().unwrap_or(576);
                let mut image = vector_state(r.bits()).0[..size].to_vec();
                if r.one_in(2) {
                    image[512] &= r.bits() as u8;
                }
                if r.one_in(16) {
                    image[512 + r.below(64) as usize] = r.bits() as u8;
                }
                case.patches.push((at, image));
            }
            if r.one_in(2) {
                case.gpr[0] |= 7;
            }
        }
        _ => {}
    }
}

/// A return frame on the stack.
fn frame(r: &mut Random, insn: &Instruction, case: &mut Case) {
    let sp = case.gpr[4].wrapping_sub(STACK.linear);
    let size = match insn.code() {
        Code::Retnw | Code::Retnw_imm16 | Code::Retfw | Code::Retfw_imm16 | Code::Iretw => 2,
        Code::Retnd | Code::Retnd_imm16 | Code::Retfd | Code::Retfd_imm16 | Code::Iretd => 4,
        _ => 8,
    };
    let mut bytes = Vec::new();
    let cs = if case.bits == 64 { CS64 } else { CS32 };
    let words = [
        CODE.linear + r.below(0x3f00),
        u64::from(r.pick(&[cs, cs, cs, CS32, 0, DS, 0x10, 0x53])),
        r.bits() & 0x24_7ed7 | 2,
        STACK.linear + 0x1000 + (r.below(0x1000) & !7),
        u64::from(r.pick(&[DS, DS, DS, 0, CS64, 0x18])),
    ];
    let words = if matches!(insn.mnemonic(), Mnemonic::Retf) {
        [words[0], words[1], words[3], words[4], 0]
    } else {
        words
    };
    for w in words {
        bytes.extend_from_slice(&w.to_le_bytes()[..size]);
    }
    if !r.one_in(6) && sp + bytes.len() as u64 <= 4 * PAGE {
        case.patches.push((STACK.gpa - USER + sp, bytes));
    }
}

/// Offset into user memory of the memory operand.
pub fn memory_offset(insn: &Instruction, gpr: &[u64; 16], case: &Case) -> Option<u64> {
    let address = address(insn, gpr, case)?;
    REGIONS
        .iter()
        .find(|g| (g.linear..g.linear + g.pages.len() as u64 * PAGE).contains(&address))
        .map(|g| address - g.linear + g.gpa - USER)
}

/// Linear address of the memory operand.
pub fn address(insn: &Instruction, gpr: &[u64; 16], case: &Case) -> Option<u64> {
    let reg = |n: Register| {
        if n == Register::None || n == Register::RIP || n == Register::EIP {
            return 0;
        }
        let v = gpr[n.full_register().number() % 16];
        if n.is_gpr32() { v & 0xffff_ffff } else { v }
    };
    if insn.memory_index().is_vector_register() {
        return None;
    }
    let narrow = insn.memory_base().is_gpr32() || insn.memory_index().is_gpr32();
    let mut a = reg(insn.memory_base())
        .wrapping_add(reg(insn.memory_index()).wrapping_mul(u64::from(insn.memory_index_scale())))
        .wrapping_add(insn.memory_displacement64());
    if narrow {
        a &= 0xffff_ffff;
    }
    let base = match insn.segment_prefix() {
        Register::FS => case.fs_base,
        Register::GS => case.gs_base,
        _ => 0,
    };
    Some(a.wrapping_add(base))
}

/// Encodes at the case's address. `None`: there is no such encoding.
pub fn encode(insn: &Instruction, bits: u32, at: u64) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(bits);
    encoder.encode(insn, at).ok()?;
    Some(encoder.take_buffer())
}

/// A case of one form, with what it decodes to. `None`: not this time (no encoding), or never.
pub fn make(r: &mut Random, code: Code, bits: u32) -> Option<(Case, Instruction)> {
    let mut case = state(r, bits);
    let insn = operands(r, code, &mut case, None)?;
    let mut bytes = encode(&insn, bits, case.at)?;
    // AMD's processors let REPNE turn LOOPE around.
    let loops = matches!(
        code.mnemonic(),
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne
    );
    if r.one_in(12) && !loops {
        // A prefix that means nothing here, or something.
        let p = r.pick(&[
            0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x40, 0x48, 0x26,
        ]);
        if !(bits == 32 && matches!(p, 0x40 | 0x48)) {
            bytes.insert(0, p);
        }
    }
    let mut decoded = Instruction::default();
    let mut padded = bytes.clone();
    padded.resize(16, 0xcc);
    Decoder::with_ip(bits, &padded, case.at, DecoderOptions::NONE).decode_out(&mut decoded);
    case.code = bytes;
    if case.at + 16 > CODE.linear + 0x4000 {
        return None;
    }
    if code
        .op_code()
        .op_kinds()
        .contains(&OpCodeOperandKind::seg_reg)
        || far(&insn)
        || compresses(code)
        || matches!(
            code.mnemonic(),
            Mnemonic::Pop | Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq
        )
    {
        // RFLAGS.AC is not looked at in transfers and segment loads, and what the processor does for
        // compressed operands follows no rule.
        case.rflags &= !(1 << 18);
    }
    Some((case, decoded))
}

fn compresses(code: Code) -> bool {
    let name = format!("{:?}", code.mnemonic());
    name.contains("compress") || name.contains("expand")
}

fn far(insn: &Instruction) -> bool {
    use Mnemonic as M;
    insn.is_call_far_indirect()
        || insn.is_jmp_far_indirect()
        || matches!(
            insn.mnemonic(),
            M::Retf | M::Iret | M::Iretd | M::Iretq | M::Lfs | M::Lgs | M::Lss
        )
}

/// AMD's processors want the offset canonical too, not only the sum with the FS or GS base.
pub fn odd_offset(insn: &Instruction, case: &Case) -> bool {
    let base = match insn.segment_prefix() {
        Register::FS => case.fs_base,
        Register::GS => case.gs_base,
        _ => return false,
    };
    let strings = (0..insn.op_count())
        .any(|n| matches!(insn.op_kind(n), OpKind::MemorySegRSI | OpKind::MemorySegRDI));
    let offset = if strings {
        Some(case.gpr[6])
    } else {
        address(insn, &case.gpr, case).map(|a| a.wrapping_sub(base))
    };
    offset.is_some_and(|o| (o as i64) << 16 >> 16 != o as i64)
}

/// Forms that end in the host's kernel or in a spin: never run natively even inside other code.
pub fn leaves_user_mode(insn: &Instruction) -> bool {
    matches!(insn.flow_control(), FlowControl::Interrupt) && insn.mnemonic() != Mnemonic::Int3
        || matches!(insn.mnemonic(), Mnemonic::Syscall | Mnemonic::Sysenter)
}

/// The CPUID features that a form needs, in words.
pub fn features(code: Code) -> String {
    let list: Vec<String> = code
        .cpuid_features()
        .iter()
        .map(|f: &CpuidFeature| format!("{f:?}"))
        .collect();
    list.join("+")
}
