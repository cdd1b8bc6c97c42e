//! Registers by their iced names, effective addresses, the stack's width and alignment checks.

use super::Step;
use crate::bits::*;
use crate::env::{Env, Stop};
use crate::paging::Access;
use crate::segment;
use crate::state::{CodeSize, CpuState, sreg};
use iced_x86::{Instruction, Register};

/// A general-purpose register as an operand names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GprName {
    /// 0-15.
    pub(crate) number: usize,
    /// Bytes: 1, 2, 4 or 8.
    pub(crate) size: usize,
    /// AH, CH, DH or BH.
    pub(crate) high: bool,
}

/// Takes a general-purpose register's name apart.
#[inline]
pub(crate) fn gpr_name(reg: Register) -> Option<GprName> {
    let r = reg as usize;
    let name = |number, size, high| Some(GprName { number, size, high });
    if r >= Register::RAX as usize {
        if r <= Register::R15 as usize {
            return name(r - Register::RAX as usize, 8, false);
        }
        None
    } else if r >= Register::EAX as usize {
        name(r - Register::EAX as usize, 4, false)
    } else if r >= Register::AX as usize {
        name(r - Register::AX as usize, 2, false)
    } else if r >= Register::AL as usize {
        match r - Register::AL as usize {
            n @ 0..=3 => name(n, 1, false),
            n @ 4..=7 => name(n - 4, 1, true),
            n => name(n - 4, 1, false),
        }
    } else {
        None
    }
}

/// The bits of an operand of `size` bytes.
#[inline]
pub(crate) fn size_mask(size: usize) -> u64 {
    if size >= 8 {
        u64::MAX
    } else {
        (1 << (size * 8)) - 1
    }
}

/// Reads a general-purpose register, zero-extended; 0 for any other register.
#[inline]
pub(crate) fn read_gpr(cpu: &CpuState, reg: Register) -> u64 {
    let Some(name) = gpr_name(reg) else { return 0 };
    let value = cpu.gpr[name.number & 15];
    if name.high {
        (value >> 8) & 0xff
    } else {
        value & size_mask(name.size)
    }
}

/// Writes register `number` with an operand of `size` bytes: 1 and 2 merge, 4 zero-extends.
#[inline]
pub(crate) fn write_number(cpu: &mut CpuState, number: usize, size: usize, value: u64) {
    let slot = &mut cpu.gpr[number & 15];
    *slot = match size {
        8 => value,
        4 => value & 0xffff_ffff,
        _ => *slot & !size_mask(size) | value & size_mask(size),
    };
}

/// Writes a general-purpose register; nothing happens for any other register.
#[inline]
pub(crate) fn write_gpr(cpu: &mut CpuState, reg: Register, value: u64) {
    let Some(name) = gpr_name(reg) else { return };
    if name.high {
        let slot = &mut cpu.gpr[name.number & 15];
        *slot = *slot & !0xff00 | (value & 0xff) << 8;
    } else {
        write_number(cpu, name.number, name.size, value);
    }
}

/// The index into [`CpuState::seg`] of a segment register; DS for anything else.
#[inline]
pub(crate) fn segment_index(reg: Register) -> usize {
    match reg {
        Register::ES => sreg::ES,
        Register::CS => sreg::CS,
        Register::SS => sreg::SS,
        Register::FS => sreg::FS,
        Register::GS => sreg::GS,
        _ => sreg::DS,
    }
}

/// Bytes of the address size of the explicit memory operand.
#[inline]
pub(crate) fn address_size(insn: &Instruction) -> usize {
    let base = insn.memory_base();
    if base == Register::RIP {
        return 8;
    }
    if base == Register::EIP {
        return 4;
    }
    if let Some(name) = gpr_name(base) {
        return name.size;
    }
    if let Some(name) = gpr_name(insn.memory_index()) {
        return name.size;
    }
    match insn.memory_displ_size() {
        2 => 2,
        4 => 4,
        _ => 8,
    }
}

/// Segment index and offset of the explicit memory operand, without a vector index.
#[inline]
pub(crate) fn effective_address(cpu: &CpuState, insn: &Instruction) -> (usize, u64) {
    let base = insn.memory_base();
    let mut seg = segment_index(insn.memory_segment());
    if seg < sreg::FS && insn.has_segment_prefix() && cpu.code_size() == CodeSize::Bits64 {
        // ES, CS, SS and DS prefixes mean nothing in 64-bit mode.
        seg = match gpr_name(base) {
            Some(name) if matches!(name.number, 4 | 5) => sreg::SS,
            _ => sreg::DS,
        };
    }
    let mut offset = insn.memory_displacement64();
    let mut size = 0;
    if base == Register::RIP {
        // The displacement is already relative to the instruction.
        return (seg, offset);
    }
    if let Some(name) = gpr_name(base) {
        offset = offset.wrapping_add(cpu.gpr[name.number & 15]);
        size = name.size;
    }
    if let Some(name) = gpr_name(insn.memory_index()) {
        let index = cpu.gpr[name.number & 15] & size_mask(name.size);
        offset = offset.wrapping_add(index.wrapping_mul(u64::from(insn.memory_index_scale())));
        size = name.size;
    }
    if size == 0 {
        size = address_size(insn);
    }
    (seg, offset & size_mask(size))
}

/// The width of the stack pointer in bytes: 8 in 64-bit mode, else by SS.B.
#[inline]
pub(crate) fn stack_size(cpu: &CpuState, mode: CodeSize) -> usize {
    if mode == CodeSize::Bits64 {
        8
    } else if cpu.seg[sreg::SS].db() {
        4
    } else {
        2
    }
}

impl<E: Env + ?Sized> Step<'_, E> {
    /// The linear address of the explicit memory operand of `len` bytes.
    #[inline]
    pub(crate) fn operand_address(&mut self, len: usize, write: bool) -> Result<u64, Stop> {
        let (seg, offset) = effective_address(self.cpu, self.insn);
        self.address(seg, offset, len, write)
    }

    /// The linear address of an access, all segment and alignment checks done.
    #[inline]
    pub(crate) fn address(
        &mut self,
        seg: usize,
        offset: u64,
        len: usize,
        write: bool,
    ) -> Result<u64, Stop> {
        let access = if write {
            Access::write(self.cpu)
        } else {
            Access::read(self.cpu)
        };
        let address = segment::linearize(self.cpu, seg, offset, len, access)?;
        if self.cpu.rflags & AC != 0 && self.cpu.cpl == 3 && self.cpu.cr0 & CR0_AM != 0 {
            self.check_alignment(address, len)?;
        }
        Ok(address)
    }

    #[cold]
    fn check_alignment(&self, address: u64, len: usize) -> Result<(), Stop> {
        use iced_x86::Mnemonic as M;
        // Accesses under a vector's mask are not checked.
        let masked = matches!(
            self.insn.mnemonic(),
            M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq
        );
        if self.insn.is_vsib() || masked || super::masked::packed(self.insn.mnemonic()) {
            return Ok(());
        }
        let align = match len {
            2 | 4 | 8 | 16 => len as u64,
            32 | 64 => 16,
            10 => 8,
            // The environments of FLDENV, FNSAVE and their siblings.
            28 | 108 => 4,
            14 | 94 => 2,
            _ => 1,
        };
        if address & (align - 1) != 0 {
            return Err(Stop::ac());
        }
        Ok(())
    }
}
