//! MOV, MOVZX, MOVSX, LEA: data movement of general-purpose registers.

use super::address::{effective_address, write_gpr};
use super::{Flow, Step, moves_segment};
use crate::env::{Env, Stop};
use iced_x86::{Mnemonic, OpKind, Register};

/// Whether a register operand is a control, debug or test register.
fn special(reg: Register) -> bool {
    reg.is_cr() || reg.is_dr() || reg.is_tr()
}

impl<E: Env + ?Sized> Step<'_, E> {
    /// MOV, MOVZX, MOVSX, MOVSXD.
    #[inline]
    pub(super) fn mov(&mut self) -> Result<Flow, Stop> {
        let insn = self.insn;
        if moves_segment(insn.code())
            || insn.op0_kind() == OpKind::Register && special(insn.op0_register())
            || insn.op1_kind() == OpKind::Register && special(insn.op1_register())
        {
            return self.system();
        }
        let mut value = self.read_operand(1)?;
        if matches!(insn.mnemonic(), Mnemonic::Movsx | Mnemonic::Movsxd) {
            let spare = 64u32.saturating_sub(8 * self.operand_size(1) as u32) & 63;
            value = ((value << spare) as i64 >> spare) as u64;
        }
        self.write_operand(0, value)?;
        Ok(Flow::Next)
    }

    /// LEA.
    pub(super) fn lea(&mut self) -> Result<Flow, Stop> {
        let (_, offset) = effective_address(self.cpu, self.insn);
        write_gpr(self.cpu, self.insn.op0_register(), offset);
        Ok(Flow::Next)
    }
}
