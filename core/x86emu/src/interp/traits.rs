//! What the interpreter needs to know about an opcode, worked out once per opcode and kept.

use crate::env::{Features, Stop};
use core::sync::atomic::{AtomicU16, Ordering};
use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register,
};

/// Who executes an opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Class {
    /// Nobody: #UD.
    Undefined = 0,
    /// The host CPU.
    Native = 1,
    /// This module, by hand.
    Hand = 2,
    /// The system side.
    System = 3,
}

/// Facts about an opcode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traits(u16);

const CLASS: u16 = 3;
const READS: u16 = 1 << 2;
const WRITES: u16 = 1 << 3;
/// x87 state is used.
const X87: u16 = 1 << 4;
/// MMX registers are used.
const MMX: u16 = 1 << 5;
/// XMM registers are used by a legacy encoding.
const SSE: u16 = 1 << 6;
/// A VEX encoding on vector registers.
const AVX: u16 = 1 << 7;
/// EVEX, or opmask registers.
const AVX512: u16 = 1 << 8;
/// VEX or EVEX: protected mode only.
const VEX: u16 = 1 << 9;
/// The features must be looked up in the guest's CPUID.
const GATED: u16 = 1 << 10;
/// Some operand is a vector-indexed address.
const VSIB: u16 = 1 << 11;
const KNOWN: u16 = 1 << 15;

impl Traits {
    pub(crate) fn class(self) -> Class {
        match self.0 & CLASS {
            1 => Class::Native,
            2 => Class::Hand,
            3 => Class::System,
            _ => Class::Undefined,
        }
    }
    pub(crate) fn reads(self) -> bool {
        self.0 & READS != 0
    }
    pub(crate) fn writes(self) -> bool {
        self.0 & WRITES != 0
    }
    pub(crate) fn x87(self) -> bool {
        self.0 & X87 != 0
    }
    pub(crate) fn mmx(self) -> bool {
        self.0 & MMX != 0
    }
    pub(crate) fn sse(self) -> bool {
        self.0 & SSE != 0
    }
    pub(crate) fn avx(self) -> bool {
        self.0 & AVX != 0
    }
    pub(crate) fn avx512(self) -> bool {
        self.0 & AVX512 != 0
    }
    pub(crate) fn vex(self) -> bool {
        self.0 & VEX != 0
    }
    pub(crate) fn gated(self) -> bool {
        self.0 & GATED != 0
    }
    pub(crate) fn vsib(self) -> bool {
        self.0 & VSIB != 0
    }
    /// Any of the x87, SSE, AVX, AVX-512 state is used.
    pub(crate) fn vector_state(self) -> bool {
        self.0 & (X87 | MMX | SSE | AVX | AVX512) != 0
    }
}

const CODES: usize = 8192;
static KNOWN_TRAITS: [AtomicU16; CODES] = [const { AtomicU16::new(0) }; CODES];

/// The traits of an instruction's opcode.
#[inline]
pub(crate) fn of(insn: &Instruction) -> Traits {
    let slot = KNOWN_TRAITS.get(insn.code() as usize);
    if let Some(slot) = slot {
        let bits = slot.load(Ordering::Relaxed);
        if bits & KNOWN != 0 {
            return Traits(bits);
        }
    }
    let bits = work_out(insn) | KNOWN;
    if let Some(slot) = slot {
        slot.store(bits, Ordering::Relaxed);
    }
    Traits(bits)
}

#[cold]
fn work_out(insn: &Instruction) -> u16 {
    let code = insn.code();
    let class = class_of(code);
    let mut bits = class as u16;
    // An opmask makes accesses conditional; the opcode's own access is wanted.
    let mut plain = *insn;
    plain.set_op_mask(Register::None);
    let memory = code.op_code().op_kinds().iter().position(|k| {
        use iced_x86::OpCodeOperandKind as K;
        matches!(
            k,
            K::mem
                | K::mem_mpx
                | K::mem_mib
                | K::mem_offs
                | K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r32_or_mem_mpx
                | K::r64_or_mem
                | K::r64_or_mem_mpx
                | K::mm_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem
                | K::zmm_or_mem
                | K::bnd_or_mem_mpx
                | K::k_or_mem
                | K::sibmem
                | K::mem_vsib32x
                | K::mem_vsib64x
                | K::mem_vsib32y
                | K::mem_vsib64y
                | K::mem_vsib32z
                | K::mem_vsib64z
        )
    });
    if let Some(n) = memory {
        // With two equal registers iced sees that XOR and SUB read nothing.
        plain.set_op_kind(n as u32, OpKind::Memory);
        plain.set_memory_base(Register::RAX);
        let mut factory = InstructionInfoFactory::new();
        let (r, w) = match factory.info(&plain).op_access(n as u32) {
            OpAccess::Read | OpAccess::CondRead => (true, false),
            OpAccess::Write | OpAccess::CondWrite => (false, true),
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
            OpAccess::None | OpAccess::NoMemAccess => (false, false),
        };
        bits |= if r { READS } else { 0 } | if w { WRITES } else { 0 };
    }
    if insn.is_vsib() {
        bits |= VSIB;
    }
    bits | units(insn) | if gated(code) { GATED } else { 0 }
}

/// Which register files an opcode uses. Register operands decide, so that POPCNT or BMI do not
/// count as SSE or AVX.
fn units(insn: &Instruction) -> u16 {
    use iced_x86::OpCodeOperandKind as K;
    let code = insn.code();
    let op = code.op_code();
    let (mut mm, mut xmm, mut k) = (false, false, false);
    for kind in op.op_kinds() {
        match kind {
            K::mm_reg | K::mm_rm | K::mm_or_mem => mm = true,
            K::k_reg | K::kp1_reg | K::k_rm | K::k_vvvv | K::k_or_mem => k = true,
            K::xmm_reg
            | K::xmm_rm
            | K::xmm_vvvv
            | K::xmmp3_vvvv
            | K::xmm_is4
            | K::xmm_is5
            | K::xmm_or_mem
            | K::ymm_reg
            | K::ymm_rm
            | K::ymm_vvvv
            | K::ymm_is4
            | K::ymm_is5
            | K::ymm_or_mem
            | K::zmm_reg
            | K::zmm_rm
            | K::zmm_vvvv
            | K::zmmp3_vvvv
            | K::zmm_or_mem => xmm = true,
            _ => {}
        }
    }
    if matches!(
        code.mnemonic(),
        Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Vzeroupper
            | Mnemonic::Vzeroall
    ) {
        xmm = true;
    }
    if matches!(code.mnemonic(), Mnemonic::Emms | Mnemonic::Femms) {
        mm = true;
    }
    let mut bits = 0;
    match code.encoding() {
        EncodingKind::Legacy | EncodingKind::D3NOW => {
            if xmm {
                bits |= SSE;
            }
        }
        EncodingKind::VEX | EncodingKind::XOP => {
            bits |= VEX;
            if k {
                bits |= AVX512;
            } else if xmm {
                bits |= AVX;
            }
        }
        _ => bits |= VEX | AVX512,
    }
    if mm {
        bits |= MMX;
    }
    let x87 = code.cpuid_features().iter().any(|f| {
        matches!(
            f,
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
        )
    });
    if x87 || code.mnemonic() == Mnemonic::Wait {
        bits |= X87;
    }
    bits
}

/// Instructions of the first processors that the host executes.
fn base_native(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Adc | Add
            | And
            | Bsf
            | Bsr
            | Bswap
            | Bt
            | Btc
            | Btr
            | Bts
            | Cbw
            | Cdq
            | Cdqe
            | Clc
            | Cmc
            | Cmp
            | Cmpxchg
            | Cqo
            | Cwd
            | Cwde
            | Dec
            | Div
            | Idiv
            | Imul
            | Inc
            | Lahf
            | Mul
            | Neg
            | Not
            | Or
            | Rcl
            | Rcr
            | Rol
            | Ror
            | Sahf
            | Sal
            | Sar
            | Sbb
            | Seta
            | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
            | Shl
            | Shld
            | Shr
            | Shrd
            | Stc
            | Sub
            | Test
            | Xadd
            | Xchg
            | Xor
    )
}

/// Instructions that [`super`] executes by hand. Far and segment-register forms are sorted out when
/// they are dispatched.
fn by_hand(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Mov | Movzx
            | Movsx
            | Movsxd
            | Lea
            | Push
            | Pop
            | Pusha
            | Pushad
            | Popa
            | Popad
            | Enter
            | Leave
            | Call
            | Ret
            | Jmp
            | Loop
            | Loope
            | Loopne
            | Jcxz
            | Jecxz
            | Jrcxz
            | Movsb
            | Movsw
            | Movsd
            | Movsq
            | Stosb
            | Stosw
            | Stosd
            | Stosq
            | Lodsb
            | Lodsw
            | Lodsd
            | Lodsq
            | Scasb
            | Scasw
            | Scasd
            | Scasq
            | Cmpsb
            | Cmpsw
            | Cmpsd
            | Cmpsq
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | In
            | Out
            | Xlatb
            | Cpuid
            | Nop
            | Reservednop
            | Pause
            | Endbr32
            | Endbr64
            | Rdsspd
            | Rdsspq
            | Prefetch
            | Prefetchw
            | Prefetchwt1
            | Prefetchnta
            | Prefetcht0
            | Prefetcht1
            | Prefetcht2
            | Prefetchit0
            | Prefetchit1
            | Lfence
            | Mfence
            | Sfence
            | Serialize
            | Clflush
            | Clflushopt
            | Clwb
            | Cldemote
            | Clzero
            | Movdir64b
            | Cld
            | Std
            | Aaa
            | Aas
            | Aad
            | Aam
            | Daa
            | Das
            | Bound
            | Salc
            | Fxsave
            | Fxsave64
            | Fxrstor
            | Fxrstor64
            | Xsave
            | Xsave64
            | Xsaveopt
            | Xsaveopt64
            | Xsavec
            | Xsavec64
            | Xsaves
            | Xsaves64
            | Xrstor
            | Xrstor64
            | Xrstors
            | Xrstors64
            | Maskmovq
            | Maskmovdqu
            | Vmaskmovdqu
            | Vgatherdpd
            | Vgatherdps
            | Vgatherqpd
            | Vgatherqps
            | Vpgatherdd
            | Vpgatherdq
            | Vpgatherqd
            | Vpgatherqq
            | Vscatterdpd
            | Vscatterdps
            | Vscatterqpd
            | Vscatterqps
            | Vpscatterdd
            | Vpscatterdq
            | Vpscatterqd
            | Vpscatterqq
    )
}

/// Extensions whose instructions compute on registers and at most one memory operand, and nothing
/// else: what the host may execute.
fn pure(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        FPU | FPU287
            | FPU387
            | CMOV
            | MMX
            | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | SSE4A
            | AES
            | PCLMULQDQ
            | SHA
            | GFNI
            | VAES
            | VPCLMULQDQ
            | ADX
            | BMI1
            | BMI2
            | LZCNT
            | POPCNT
            | MOVBE
            | MOVDIRI
            | F16C
            | FMA
            | AVX
            | AVX2
            | AVX_VNNI
            | AVX_IFMA
            | AVX_NE_CONVERT
            | AVX_VNNI_INT8
            | AVX_VNNI_INT16
            | SHA512
            | SM3
            | SM4
            | AVX512F
            | AVX512CD
            | AVX512DQ
            | AVX512BW
            | AVX512VL
            | AVX512_BF16
            | AVX512_BITALG
            | AVX512_IFMA
            | AVX512_VBMI
            | AVX512_VBMI2
            | AVX512_VNNI
            | AVX512_VP2INTERSECT
            | AVX512_VPOPCNTDQ
            | AVX512_FP16
            | RDRAND
            | RDSEED
            | CX8
            | CMPXCHG16B
    )
}

fn base(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | INTEL8086_ONLY
    )
}

fn class_of(code: Code) -> Class {
    if code == Code::INVALID {
        return Class::Undefined;
    }
    let m = code.mnemonic();
    if matches!(m, Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2) {
        return Class::Undefined;
    }
    if by_hand(m) || code.flow_control() == FlowControl::ConditionalBranch {
        return Class::Hand;
    }
    if m == Mnemonic::Wait {
        return Class::Native;
    }
    let features = code.cpuid_features();
    if code.flow_control() != FlowControl::Next || code.is_privileged() {
        return Class::System;
    }
    if !features.is_empty() && features.iter().all(|&f| pure(f) || base(f)) {
        if features.iter().all(|&f| base(f)) && !base_native(m) {
            return Class::System;
        }
        return Class::Native;
    }
    Class::System
}

/// Whether the guest's CPUID has to be asked.
fn gated(code: Code) -> bool {
    code.cpuid_features().iter().any(|&f| {
        !base(f)
            && !matches!(
                f,
                CpuidFeature::FPU
                    | CpuidFeature::FPU287
                    | CpuidFeature::FPU387
                    | CpuidFeature::MULTIBYTENOP
                    | CpuidFeature::PAUSE
                    | CpuidFeature::CPUID
            )
    })
}

/// #UD for instructions of extensions that the guest's CPUID hides.
///
/// Where hiding an extension changes an instruction's meaning instead of removing it (LZCNT, TZCNT,
/// ENDBR, hint NOPs) the instruction stays.
pub(crate) fn check_features(features: &Features, code: Code) -> Result<(), Stop> {
    use CpuidFeature::*;
    let f = features;
    for &feature in code.cpuid_features() {
        let (word, bit) = match feature {
            CX8 => (f.leaf1_edx, 8),
            CMOV => (f.leaf1_edx, 15),
            CLFSH => (f.leaf1_edx, 19),
            MMX => (f.leaf1_edx, 23),
            FXSR => (f.leaf1_edx, 24),
            SSE => (f.leaf1_edx, 25),
            SSE2 => (f.leaf1_edx, 26),
            SSE3 => (f.leaf1_ecx, 0),
            PCLMULQDQ => (f.leaf1_ecx, 1),
            SSSE3 => (f.leaf1_ecx, 9),
            FMA => (f.leaf1_ecx, 12),
            CMPXCHG16B => (f.leaf1_ecx, 13),
            SSE4_1 => (f.leaf1_ecx, 19),
            SSE4_2 => (f.leaf1_ecx, 20),
            MOVBE => (f.leaf1_ecx, 22),
            POPCNT => (f.leaf1_ecx, 23),
            AES => (f.leaf1_ecx, 25),
            XSAVE => (f.leaf1_ecx, 26),
            AVX => (f.leaf1_ecx, 28),
            F16C => (f.leaf1_ecx, 29),
            RDRAND => (f.leaf1_ecx, 30),
            BMI1 if code.mnemonic() != Mnemonic::Tzcnt => (f.leaf7_ebx, 3),
            AVX2 => (f.leaf7_ebx, 5),
            BMI2 => (f.leaf7_ebx, 8),
            AVX512F => (f.leaf7_ebx, 16),
            AVX512DQ => (f.leaf7_ebx, 17),
            RDSEED => (f.leaf7_ebx, 18),
            ADX => (f.leaf7_ebx, 19),
            AVX512_IFMA => (f.leaf7_ebx, 21),
            CLFLUSHOPT => (f.leaf7_ebx, 23),
            CLWB => (f.leaf7_ebx, 24),
            AVX512CD => (f.leaf7_ebx, 28),
            SHA => (f.leaf7_ebx, 29),
            AVX512BW => (f.leaf7_ebx, 30),
            AVX512VL => (f.leaf7_ebx, 31),
            AVX512_VBMI => (f.leaf7_ecx, 1),
            AVX512_VBMI2 => (f.leaf7_ecx, 6),
            GFNI => (f.leaf7_ecx, 8),
            VAES => (f.leaf7_ecx, 9),
            VPCLMULQDQ => (f.leaf7_ecx, 10),
            AVX512_VNNI => (f.leaf7_ecx, 11),
            AVX512_BITALG => (f.leaf7_ecx, 12),
            AVX512_VPOPCNTDQ => (f.leaf7_ecx, 14),
            MOVDIRI => (f.leaf7_ecx, 27),
            MOVDIR64B => (f.leaf7_ecx, 28),
            AVX512_VP2INTERSECT => (f.leaf7_edx, 8),
            SERIALIZE => (f.leaf7_edx, 14),
            AVX512_FP16 => (f.leaf7_edx, 23),
            SSE4A => (f.ext1_ecx, 6),
            _ => continue,
        };
        if word & (1 << bit) == 0 {
            return Err(Stop::ud());
        }
    }
    Ok(())
}

/// Whether the instruction has an explicit memory operand.
#[inline]
pub(crate) fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory)
}
