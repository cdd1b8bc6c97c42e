//! The context of a translation: everything beside the bytes that its meaning depends on.

use crate::layout::{TLB_KERNEL, TLB_KERNEL_AC, TLB_USER};
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic};
use x86defs::{cr0, cr4, efer, rflags};
use x86emu::state::{CodeSize, CpuState, Segment, sreg};

/// Which vector state may be used without a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fpu {
    /// None: CR0.EM or CR0.TS is set, or CR4.OSFXSR is clear.
    None,
    /// x87, MMX and SSE.
    Sse,
    /// AVX too.
    Avx,
    /// AVX-512 too.
    Avx512,
}

impl Fpu {
    /// What an instruction needs; `None` for those without FPU state.
    pub fn needed_by(insn: &Instruction) -> Fpu {
        match insn.encoding() {
            EncodingKind::EVEX => Fpu::Avx512,
            EncodingKind::VEX | EncodingKind::XOP | EncodingKind::MVEX => {
                let gpr = insn.cpuid_features().iter().any(|f| {
                    matches!(
                        f,
                        CpuidFeature::BMI1 | CpuidFeature::BMI2 | CpuidFeature::TBM
                    )
                });
                let mask = insn.cpuid_features().iter().any(|f| {
                    matches!(
                        f,
                        CpuidFeature::AVX512F | CpuidFeature::AVX512BW | CpuidFeature::AVX512DQ
                    )
                });
                match (gpr, mask) {
                    (true, _) => Fpu::None,
                    (_, true) => Fpu::Avx512,
                    _ => Fpu::Avx,
                }
            }
            _ => {
                use CpuidFeature as F;
                use Mnemonic as M;
                if matches!(
                    insn.mnemonic(),
                    M::Lfence
                        | M::Mfence
                        | M::Sfence
                        | M::Pause
                        | M::Movnti
                        | M::Crc32
                        | M::Clflush
                ) {
                    // SSE by name only: no FPU state, no #NM.
                    return Fpu::None;
                }
                let fpu = insn.cpuid_features().iter().any(|f| {
                    matches!(
                        f,
                        F::FPU
                            | F::FPU287
                            | F::FPU387
                            | F::MMX
                            | F::SSE
                            | F::SSE2
                            | F::SSE3
                            | F::SSSE3
                            | F::SSE4_1
                            | F::SSE4_2
                            | F::SSE4A
                            | F::AES
                            | F::PCLMULQDQ
                            | F::SHA
                            | F::GFNI
                    )
                });
                if fpu { Fpu::Sse } else { Fpu::None }
            }
        }
    }
}

/// A context, as a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Context(pub u32);

const SIZE: u32 = 3;
const USER: u32 = 1 << 2;
const FLAT: u32 = 1 << 3;
const FS_FLAT: u32 = 1 << 4;
const GS_FLAT: u32 = 1 << 5;
const SS32: u32 = 1 << 6;
const AC: u32 = 1 << 7;
const FPU_SHIFT: u32 = 8;
const DF: u32 = 1 << 10;
const SIMPLE_IF: u32 = 1 << 11;
const INTERPRET: u32 = 1 << 12;
const SIMPLE_AC: u32 = 1 << 13;
const SMAP: u32 = 1 << 14;
const TSC: u32 = 1 << 15;
const FSGSBASE: u32 = 1 << 16;
const SEGMENTED: u32 = 1 << 17;
/// System-management mode, where the same addresses may hold other code.
const SMM: u32 = 1 << 18;
/// How many instructions a block is made of that another could not do in the common way.
const APART: u32 = 0x7f << 24;
/// The address space has windows; see [`crate::window`].
const WINDOWS: u32 = 1 << 19;
/// It uses the low one too.
const LOW: u32 = 1 << 20;
/// Its stacks lie elsewhere than in the high one.
const ODD_STACK: u32 = 1 << 21;

fn flat(s: &Segment) -> bool {
    // Present, base 0, 4 GiB, and for data: expand-up and writable or readable code.
    !s.unusable && s.present() && s.base == 0 && s.limit == u32::MAX && s.attr & 0x10 != 0
}

fn flat_data(s: &Segment) -> bool {
    flat(s) && s.attr & 8 == 0 && s.attr & 4 == 0 && s.attr & 2 != 0
}

/// Data that may be written, and grows up: base and limit are all there is to check.
fn normal(s: &Segment) -> bool {
    !s.unusable && s.present() && s.attr & 0x1e == 0x12
}

/// Code that may be read; in real-address mode CS may hold a data type.
fn readable_code(s: &Segment) -> bool {
    !s.unusable && s.present() && (s.attr & 0x1a == 0x1a || s.attr & 0x1e == 0x12)
}

fn flat_limit(s: &Segment) -> bool {
    !s.unusable && s.present() && s.limit == u32::MAX && s.attr & 0x1e == 0x12
}

impl Context {
    /// The bit that says CPL 3; in the low byte, as stubs test it.
    pub const USER: u32 = USER;
    /// The bit that says that supervisor accesses to user pages are allowed; in the low byte.
    pub const AC: u32 = AC;

    /// The context that `cpu` is in now.
    pub fn of(cpu: &CpuState) -> Context {
        let size = cpu.code_size();
        let mut k = match size {
            CodeSize::Bits16 => 0,
            CodeSize::Bits32 => 1,
            CodeSize::Bits64 => 2,
        };
        if cpu.cpl == 3 {
            k |= USER;
        }
        if size == CodeSize::Bits64 {
            k |= FLAT | FS_FLAT | GS_FLAT | SS32;
        } else {
            let s = &cpu.seg;
            let all = flat(&s[sreg::CS])
                && s[sreg::CS].attr & 2 != 0
                && flat_data(&s[sreg::SS])
                && flat_data(&s[sreg::DS])
                && flat_data(&s[sreg::ES]);
            if all {
                k |= FLAT;
            } else if normal(&s[sreg::SS])
                && normal(&s[sreg::DS])
                && normal(&s[sreg::ES])
                && readable_code(&s[sreg::CS])
            {
                k |= SEGMENTED;
            }
            let usable = if all { flat_limit } else { normal };
            if usable(&s[sreg::FS]) {
                k |= FS_FLAT;
            }
            if usable(&s[sreg::GS]) {
                k |= GS_FLAT;
            }
            if s[sreg::SS].db() {
                k |= SS32;
            }
        }
        let smap = cpu.cr4 & cr4::SMAP != 0;
        if cpu.rflags & rflags::AC != 0 || !smap {
            k |= AC;
        }
        let fpu = if cpu.cr0 & (cr0::EM | cr0::TS) != 0 || cpu.cr4 & cr4::OSFXSR == 0 {
            Fpu::None
        } else if cpu.cr4 & cr4::OSXSAVE == 0 || cpu.xcr0 & 6 != 6 {
            Fpu::Sse
        } else if cpu.xcr0 & 0xe0 != 0xe0 {
            Fpu::Avx
        } else {
            Fpu::Avx512
        };
        k |= (fpu as u32) << FPU_SHIFT;
        if cpu.rflags & rflags::DF != 0 {
            k |= DF;
        }
        // IF alone in bits 8-15 of RFLAGS, and no privilege question about changing it.
        if cpu.rflags & 0xfd00 & !0x800 == 0 && cpu.cpl == 0 && !cpu.v86() {
            k |= SIMPLE_IF;
        }
        // AC alone in bits 16-23, for the same reason.
        if cpu.rflags & 0xfb_0000 == 0 && cpu.cpl == 0 && size == CodeSize::Bits64 {
            k |= SIMPLE_AC;
        }
        if smap {
            k |= SMAP;
        }
        if cpu.cr4 & cr4::FSGSBASE != 0 {
            k |= FSGSBASE;
        }
        if cpu.cpl == 0 || cpu.cr4 & cr4::TSD == 0 {
            k |= TSC;
        }
        let alignment = cpu.cpl == 3 && cpu.cr0 & cr0::AM != 0 && cpu.rflags & rflags::AC != 0;
        if alignment {
            k |= INTERPRET;
        }
        if cpu.smm {
            k |= SMM;
        }
        Context(k)
    }

    /// How the code decodes.
    pub fn code_size(self) -> CodeSize {
        match self.0 & SIZE {
            0 => CodeSize::Bits16,
            1 => CodeSize::Bits32,
            _ => CodeSize::Bits64,
        }
    }
    /// CPL 3.
    pub fn user(self) -> bool {
        self.0 & USER != 0
    }
    /// CS, SS, DS and ES have base 0 and no limits that matter.
    pub fn flat(self) -> bool {
        self.0 & FLAT != 0
    }
    /// FS has a base only, or, where segmented, base and limit.
    pub fn fs_flat(self) -> bool {
        self.0 & FS_FLAT != 0
    }
    /// GS has a base only, or, where segmented, base and limit.
    pub fn gs_flat(self) -> bool {
        self.0 & GS_FLAT != 0
    }
    /// Segments have bases and limits, which emitted code adds and checks.
    pub fn segmented(self) -> bool {
        self.0 & SEGMENTED != 0
    }
    /// Stack accesses can be translated.
    pub fn stack(self) -> bool {
        self.flat() || self.segmented()
    }
    /// The stack pointer is ESP or RSP, not SP.
    pub fn wide_stack(self) -> bool {
        self.0 & SS32 != 0
    }
    /// What FPU state may be used.
    pub fn fpu(self) -> Fpu {
        match (self.0 >> FPU_SHIFT) & 3 {
            0 => Fpu::None,
            1 => Fpu::Sse,
            2 => Fpu::Avx,
            _ => Fpu::Avx512,
        }
    }
    /// RFLAGS.DF is clear.
    pub fn df_clear(self) -> bool {
        self.0 & DF == 0
    }
    /// CLI and STI change nothing but bit 9, and are allowed.
    pub fn simple_if(self) -> bool {
        self.0 & SIMPLE_IF != 0
    }
    /// STAC and CLAC change nothing but bit 18, and are allowed.
    pub fn simple_ac(self) -> bool {
        self.0 & SIMPLE_AC != 0
    }
    /// RDTSC is allowed.
    pub fn tsc(self) -> bool {
        self.0 & TSC != 0
    }
    /// RDFSBASE and its siblings are enabled.
    pub fn fsgsbase(self) -> bool {
        self.0 & FSGSBASE != 0
    }
    /// The context after STAC (`set`) or CLAC.
    pub fn with_ac(self, set: bool) -> Context {
        if set || self.0 & SMAP == 0 {
            Context(self.0 | AC)
        } else {
            Context(self.0 & !AC)
        }
    }
    /// The context without what STAC and CLAC change: code that such instructions connect.
    pub fn family(self) -> Context {
        Context(self.0 & !AC)
    }
    /// Calls and returns are paired with the host's. Not where a return must be checked against CS, and not
    /// in the code between STAC and CLAC: its callers belong to the other context of the family.
    pub fn pairs_calls(self) -> bool {
        let between = !self.user() && self.0 & SMAP != 0 && self.0 & AC != 0;
        !self.segmented() && self.code_size() != CodeSize::Bits16 && !between
    }
    /// The context, as a key, of a block of the next `n` (1 to 64) instructions alone; see
    /// [`crate::frontend::Decoded::apart`].
    pub fn with_apart(self, n: u32) -> Context {
        Context(self.0 & !APART | n << APART.trailing_zeros() & APART)
    }
    /// The context without that, and how many instructions, or 0.
    pub fn split_apart(self) -> (Context, usize) {
        let n = (self.0 & APART) >> APART.trailing_zeros();
        (Context(self.0 & !APART), n as usize)
    }
    /// Accesses may go through windows, if the address space has any.
    pub fn windowable(self, cpu: &CpuState) -> bool {
        let other = cr4::LA57 | cr4::PKE;
        // Without NXE, bit 63 of an entry is reserved; see `window`, which looks at other bits only.
        self.user()
            && self.code_size() == CodeSize::Bits64
            && !cpu.smm
            && cpu.cr4 & other == 0
            && cpu.efer & efer::NX != 0
    }
    /// The context with windows; `low`: of both kinds; `odd_stack`: RSP may be anything.
    pub fn with_windows(self, low: bool, odd_stack: bool) -> Context {
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        Context(self.0 | WINDOWS | flag(low, LOW) | flag(odd_stack, ODD_STACK))
    }
    /// The context without windows.
    pub fn without_windows(self) -> Context {
        Context(self.0 & !(WINDOWS | LOW | ODD_STACK))
    }
    /// With windows: RSP is in the high one, or near, wherever a block starts.
    pub fn stack_in_window(self) -> bool {
        self.0 & (WINDOWS | ODD_STACK) == WINDOWS
    }
    /// Accesses go through windows.
    pub fn windows(self) -> bool {
        self.0 & WINDOWS != 0
    }
    /// Windows of both kinds are in use.
    pub fn low_window(self) -> bool {
        self.0 & LOW != 0
    }
    /// Nothing is translated.
    pub fn interpret_only(self) -> bool {
        self.0 & INTERPRET != 0
    }
    /// The software TLB that data accesses use.
    pub fn tlb(self) -> usize {
        if self.user() {
            TLB_USER
        } else if self.0 & AC != 0 {
            TLB_KERNEL_AC
        } else {
            TLB_KERNEL
        }
    }
}
