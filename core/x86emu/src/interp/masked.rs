//! Memory accesses under a mask: which elements an AVX or AVX-512 instruction really touches, and
//! the byte-masked stores MASKMOVQ and MASKMOVDQU.

use super::address::{segment_index, size_mask};
use super::{Flow, Step, vector};
use crate::env::{Env, Stop};
use crate::state::gpr;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Compress stores and expand loads access the selected elements packed together.
pub(super) fn packed(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Vcompressps
            | Mnemonic::Vcompresspd
            | Mnemonic::Vpcompressb
            | Mnemonic::Vpcompressw
            | Mnemonic::Vpcompressd
            | Mnemonic::Vpcompressq
            | Mnemonic::Vexpandps
            | Mnemonic::Vexpandpd
            | Mnemonic::Vpexpandb
            | Mnemonic::Vpexpandw
            | Mnemonic::Vpexpandd
            | Mnemonic::Vpexpandq
    )
}

/// Stores that need all of the operand to be writable, whatever the mask (exception type E6NF).
pub(super) fn extracts(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Vextractf32x4
            | Vextractf32x8
            | Vextractf64x2
            | Vextractf64x4
            | Vextracti32x4
            | Vextracti32x8
            | Vextracti64x2
            | Vextracti64x4
    )
}

/// The memory operand is repeated over the vector.
fn broadcasts(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Vbroadcastss
            | Vbroadcastsd
            | Vpbroadcastb
            | Vpbroadcastw
            | Vpbroadcastd
            | Vpbroadcastq
            | Vbroadcastf32x2
            | Vbroadcastf32x4
            | Vbroadcastf32x8
            | Vbroadcastf64x2
            | Vbroadcastf64x4
            | Vbroadcasti32x2
            | Vbroadcasti32x4
            | Vbroadcasti32x8
            | Vbroadcasti64x2
            | Vbroadcasti64x4
    )
}

/// EVEX instructions whose mask applies to the result only: they mix the elements of the memory
/// operand, or use it as a whole (exception types E4NF, E5NF, E6NF).
pub(super) fn unconditional(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let m = insn.mnemonic();
    let shift = matches!(
        m,
        Vpsllw | Vpslld | Vpsllq | Vpsrlw | Vpsrld | Vpsrlq | Vpsraw | Vpsrad | Vpsraq
    );
    if shift {
        // Shifts by an immediate treat the operand element by element; else it is the count.
        return insn.op_kind(insn.op_count().saturating_sub(1)) == OpKind::Memory;
    }
    matches!(
        m,
        Vunpcklps
            | Vunpcklpd
            | Vunpckhps
            | Vunpckhpd
            | Vpunpcklbw
            | Vpunpcklwd
            | Vpunpckldq
            | Vpunpcklqdq
            | Vpunpckhbw
            | Vpunpckhwd
            | Vpunpckhdq
            | Vpunpckhqdq
            | Vpacksswb
            | Vpackssdw
            | Vpackuswb
            | Vpackusdw
            | Vmovddup
            | Vmovshdup
            | Vmovsldup
            | Vshufps
            | Vshufpd
            | Vshuff32x4
            | Vshuff64x2
            | Vshufi32x4
            | Vshufi64x2
            | Vpshufb
            | Vpshufd
            | Vpshufhw
            | Vpshuflw
            | Vpalignr
            | Valignd
            | Valignq
            | Vpermb
            | Vpermw
            | Vpermd
            | Vpermq
            | Vpermps
            | Vpermpd
            | Vpermi2b
            | Vpermi2w
            | Vpermi2d
            | Vpermi2q
            | Vpermi2ps
            | Vpermi2pd
            | Vpermt2b
            | Vpermt2w
            | Vpermt2d
            | Vpermt2q
            | Vpermt2ps
            | Vpermt2pd
            | Vpermilps
            | Vpermilpd
            | Vpmultishiftqb
            | Vpconflictd
            | Vpconflictq
            | Vdbpsadbw
            | Vinsertf32x4
            | Vinsertf32x8
            | Vinsertf64x2
            | Vinsertf64x4
            | Vinserti32x4
            | Vinserti32x8
            | Vinserti64x2
            | Vinserti64x4
            | Vgf2p8affineqb
            | Vgf2p8affineinvqb
            | Vcvtne2ps2bf16
            | Vpmaddubsw
            | Vpmaddwd
    )
}

/// Bytes of the memory operand that one mask bit governs, where that is not its element type:
/// products of neighbouring elements.
fn masked_element(m: Mnemonic) -> Option<usize> {
    use Mnemonic::*;
    match m {
        Vpdpbusd | Vpdpbusds | Vpdpwssd | Vpdpwssds | Vdpbf16ps => Some(4),
        Vpmuldq | Vpmuludq => Some(8),
        _ => None,
    }
}

/// Conversions of 32-bit elements to 64 bits: a broadcast fills half a vector of them.
fn widens(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Vcvtps2pd | Vcvtdq2pd | Vcvtudq2pd | Vcvtps2qq | Vcvtps2uqq | Vcvttps2qq | Vcvttps2uqq
    )
}

/// Bytes of the vectors that an instruction with an embedded broadcast works on.
fn vector_size(insn: &Instruction) -> usize {
    use iced_x86::OpCodeOperandKind as K;
    let op = insn.op_code();
    op.op_kinds()
        .iter()
        .map(|kind| match kind {
            K::xmm_or_mem | K::xmm_reg | K::xmm_vvvv => 16,
            K::ymm_or_mem | K::ymm_reg | K::ymm_vvvv => 32,
            K::zmm_or_mem | K::zmm_reg | K::zmm_vvvv => 64,
            _ => 0,
        })
        .max()
        .unwrap_or(0)
}

impl<E: Env + ?Sized> Step<'_, E> {
    /// Element size in bytes of the memory operand and the bit mask of elements accessed.
    pub(super) fn selected_elements(&self, size: usize) -> (usize, u64) {
        let insn = self.insn;
        let area = &self.cpu.xsave;
        let element = if insn.is_broadcast() {
            size
        } else {
            let natural = insn.memory_size().element_size();
            masked_element(insn.mnemonic())
                .unwrap_or(natural)
                .clamp(1, size.max(1))
        };
        let count = (size / element).clamp(1, 64) as u32;
        let all = u64::MAX >> (64 - count);
        if insn.op_mask() == Register::None {
            // VMASKMOV: the sign bits of the vector in VEX.vvvv.
            let mask = match (insn.op0_kind(), insn.op1_register(), insn.op2_kind()) {
                (OpKind::Memory, mask, _) | (_, mask, OpKind::Memory) => mask,
                _ => return (element, all),
            };
            let value = vector::zmm(area, mask.number());
            let selected = (0..count as usize)
                .filter(|n| value[n * element + element - 1] & 0x80 != 0)
                .fold(0, |bits, n| bits | 1 << n);
            return (element, selected);
        }
        let mask = vector::opmask(area, insn.op_mask().number());
        if insn.is_broadcast() {
            // Which elements of the vector there are decides whether the one access happens.
            let lane = if widens(insn.mnemonic()) { 8 } else { size };
            let lanes = (vector_size(insn) / lane.max(1)).clamp(1, 64) as u32;
            let any = mask & (u64::MAX >> (64 - lanes)) != 0;
            return (element, u64::from(any));
        }
        if broadcasts(insn.mnemonic()) {
            // Element n goes to lanes n, n + count, n + 2 * count…
            let lanes = (insn.op0_register().size() / element).clamp(1, 64) as u32;
            let live = mask & (u64::MAX >> (64 - lanes));
            let folded = (0..64 / count).fold(0, |bits, n| bits | live >> (n * count));
            return (element, folded & all);
        }
        if packed(insn.mnemonic()) {
            let n = (mask & all).count_ones();
            return (element, if n == 0 { 0 } else { u64::MAX >> (64 - n) });
        }
        (element, mask & all)
    }

    /// MASKMOVQ, MASKMOVDQU, VMASKMOVDQU: bytes to [rDI] where the mask's bytes have their top bit.
    pub(super) fn maskmov(&mut self) -> Result<Flow, Stop> {
        let insn = self.insn;
        let width = match insn.op0_kind() {
            OpKind::MemorySegDI => 2,
            OpKind::MemorySegEDI => 4,
            _ => 8,
        };
        let area = &self.cpu.xsave;
        let (data, mask, len) = if insn.mnemonic() == Mnemonic::Maskmovq {
            let (mut data, mut mask) = ([0; 64], [0; 64]);
            let of = |r: Register| vector::mmx(area, r.number()).to_le_bytes();
            data[..8].copy_from_slice(&of(insn.op1_register()));
            mask[..8].copy_from_slice(&of(insn.op2_register()));
            (data, mask, 8)
        } else {
            let data = vector::zmm(area, insn.op1_register().number());
            let mask = vector::zmm(area, insn.op2_register().number());
            (data, mask, 16)
        };
        let seg = segment_index(insn.memory_segment());
        let start = self.sized(gpr::RDI, width);
        let at = |n: usize| start.wrapping_add(n as u64) & size_mask(width);
        let chosen = |n: &usize| mask[*n] & 0x80 != 0;
        // All bytes must be writable before the first is written.
        for n in (0..len).filter(chosen) {
            let address = self.address(seg, at(n), 1, true)?;
            self.probe_write(address, 1)?;
        }
        for n in (0..len).filter(chosen) {
            let address = self.address(seg, at(n), 1, true)?;
            self.write_at(address, &data[n..=n])?;
        }
        if insn.mnemonic() == Mnemonic::Maskmovq {
            self.enter_mmx();
        }
        Ok(Flow::Next)
    }

    /// What every MMX instruction does to the x87 state: TOP = 0, all registers valid.
    pub(super) fn enter_mmx(&mut self) {
        let bytes = vector::live_mut(&mut self.cpu.xsave, vector::component::X87);
        let top = usize::from(bytes[3] >> 3 & 7);
        bytes[3] &= !0x38;
        bytes[4] = 0xff;
        // The area orders the registers by stack position, which has just changed.
        let mut old = [0; 128];
        old.copy_from_slice(&bytes[32..160]);
        for n in 0..8usize {
            let from = 16 * (n.wrapping_sub(top) & 7);
            bytes[32 + 16 * n..48 + 16 * n].copy_from_slice(&old[from..from + 16]);
        }
    }
}
