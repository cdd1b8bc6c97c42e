//! The architectural state of one vCPU.
//!
//! `#[repr(C)]` because the translator addresses the fields from emitted code.

/// Indices into [`CpuState::gpr`], in the encoding order of ModRM.
pub mod gpr {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Indices into [`CpuState::seg`], in the encoding order of the segment-register field.
pub mod sreg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// A segment register with its hidden part, as `kvm_segment` shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes (already scaled by the granularity bit); the last addressable offset.
    pub limit: u32,
    /// The visible selector.
    pub selector: u16,
    /// Access rights: bits 0-3 type, 4 S, 5-6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G
    /// (the layout of bits 8-23 of the descriptor's upper half).
    pub attr: u16,
    /// Set when the register holds no usable segment (a null selector).
    pub unusable: bool,
}

impl Segment {
    /// Descriptor type field (4 bits).
    pub fn kind(&self) -> u8 {
        (self.attr & 0xf) as u8
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.attr >> 5) & 3) as u8
    }
    /// The L bit: a 64-bit code segment.
    pub fn long(&self) -> bool {
        self.attr & (1 << 13) != 0
    }
    /// The D/B bit: default operand size, or stack-pointer size.
    pub fn db(&self) -> bool {
        self.attr & (1 << 14) != 0
    }
    /// The P bit.
    pub fn present(&self) -> bool {
        self.attr & (1 << 7) != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit: the last addressable offset.
    pub limit: u16,
}

/// Bits of [`CpuState::shadow`].
pub mod shadow {
    /// The instruction after STI: maskable interrupts are held back.
    pub const STI: u8 = 1;
    /// The instruction after MOV SS or POP SS: interrupts, NMI and debug traps are held back.
    pub const MOV_SS: u8 = 2;
}

/// Size of [`XsaveArea`] in bytes; the standard format with AVX-512 needs 2688.
pub const XSAVE_SIZE: usize = 4096;

/// The x87/SSE/AVX state in the standard (non-compacted) XSAVE format.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; XSAVE_SIZE]);

/// How the current code segment makes the CPU decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CodeSize {
    /// 16-bit default operand and address size.
    Bits16 = 16,
    /// 32-bit default operand and address size.
    Bits32 = 32,
    /// 64-bit mode.
    Bits64 = 64,
}

/// Everything of a vCPU that instructions can see or change without leaving the CPU core.
///
/// MSRs that the core instructions use live here; all others live in the embedder and are
/// reached through [`crate::env::Env::rdmsr`] and [`crate::env::Env::wrmsr`].
#[derive(Clone)]
#[repr(C, align(64))]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15.
    pub gpr: [u64; 16],
    /// Instruction pointer (offset in CS).
    pub rip: u64,
    /// RFLAGS, with bit 1 always set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub seg: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// Control register 0.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base and PCID.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended control register 0 (XCR0).
    pub xcr0: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// DR0-DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// Interrupt shadow; bits of [`shadow`].
    pub shadow: u8,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
    /// In system-management mode.
    pub smm: bool,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// What RDTSC adds to the host's TSC.
    pub tsc_offset: u64,
    /// PDPTEs loaded by MOV CR3 in PAE mode.
    pub pdptrs: [u64; 4],
    /// x87, SSE, AVX, AVX-512 state.
    pub xsave: XsaveArea,
}

impl Default for CpuState {
    /// The state after RESET (Intel SDM, "Processor State After Reset").
    fn default() -> Self {
        let data = Segment {
            base: 0,
            limit: 0xffff,
            selector: 0,
            attr: 0x93,
            unusable: false,
        };
        let code = Segment {
            base: 0xffff_0000,
            selector: 0xf000,
            attr: 0x9b,
            ..data
        };
        let mut cpu = CpuState {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: 2,
            seg: [data, code, data, data, data, data],
            ldtr: Segment { attr: 0x82, ..data },
            tr: Segment { attr: 0x8b, ..data },
            gdtr: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            idtr: DescriptorTable {
                base: 0,
                limit: 0xffff,
            },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            efer: 0,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            cpl: 0,
            shadow: 0,
            nmi_blocked: false,
            smm: false,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_offset: 0,
            pdptrs: [0; 4],
            xsave: XsaveArea([0; XSAVE_SIZE]),
        };
        cpu.gpr[gpr::RDX] = 0x600;
        cpu.reset_fpu();
        cpu
    }
}

impl CpuState {
    /// Puts the x87 and SSE state to its values after RESET.
    pub fn reset_fpu(&mut self) {
        self.xsave.0 = [0; XSAVE_SIZE];
        self.xsave.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        self.xsave.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    }

    /// CR0.PE is set.
    pub fn protected(&self) -> bool {
        self.cr0 & 1 != 0
    }

    /// EFER.LMA: IA-32e mode is active.
    pub fn long_mode(&self) -> bool {
        self.efer & (1 << 10) != 0
    }

    /// RFLAGS.VM in protected mode.
    pub fn v86(&self) -> bool {
        self.protected() && self.rflags & (1 << 17) != 0
    }

    /// How the current code segment decodes.
    pub fn code_size(&self) -> CodeSize {
        let cs = &self.seg[sreg::CS];
        if self.long_mode() && cs.long() {
            CodeSize::Bits64
        } else if cs.db() && !self.v86() && self.protected() || cs.db() && !self.protected() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }
}
