//! Near branches: JMP, Jcc, LOOP, JCXZ, CALL, RET.

use super::address::size_mask;
use super::{Flow, Step};
use crate::bits::*;
use crate::env::{Env, Stop};
use crate::paging;
use crate::state::{CodeSize, gpr, sreg};
use iced_x86::{Code, ConditionCode, Mnemonic, OpKind};

/// Whether a condition holds for these flags.
#[inline]
pub(crate) fn condition(cc: ConditionCode, flags: u64) -> bool {
    const PF: u64 = 1 << 2;
    const SF: u64 = 1 << 7;
    let less = (flags & SF != 0) != (flags & OF != 0);
    match cc {
        ConditionCode::None => true,
        ConditionCode::o => flags & OF != 0,
        ConditionCode::no => flags & OF == 0,
        ConditionCode::b => flags & CF != 0,
        ConditionCode::ae => flags & CF == 0,
        ConditionCode::e => flags & ZF != 0,
        ConditionCode::ne => flags & ZF == 0,
        ConditionCode::be => flags & (CF | ZF) != 0,
        ConditionCode::a => flags & (CF | ZF) == 0,
        ConditionCode::s => flags & SF != 0,
        ConditionCode::ns => flags & SF == 0,
        ConditionCode::p => flags & PF != 0,
        ConditionCode::np => flags & PF == 0,
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || flags & ZF != 0,
        ConditionCode::g => !less && flags & ZF == 0,
    }
}

impl<E: Env + ?Sized> Step<'_, E> {
    /// Checks a near target and makes it the next RIP.
    #[inline]
    fn go(&mut self, target: u64) -> Result<Flow, Stop> {
        self.check_target(target)?;
        self.cpu.rip = target;
        Ok(Flow::Jumped)
    }

    #[inline]
    fn check_target(&self, target: u64) -> Result<(), Stop> {
        let bad = if self.mode == CodeSize::Bits64 {
            !paging::canonical(self.cpu, target)
        } else {
            target > u64::from(self.cpu.seg[sreg::CS].limit)
        };
        if bad { Err(Stop::gp(0)) } else { Ok(()) }
    }

    /// The operand size of the near branch in bytes.
    #[inline]
    fn branch_size(&self) -> usize {
        match self.insn.op0_kind() {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            OpKind::NearBranch64 => 8,
            OpKind::Register | OpKind::Memory => self.operand_size(0),
            _ => 8,
        }
    }

    #[inline]
    fn branch_target(&mut self) -> Result<u64, Stop> {
        match self.insn.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                Ok(self.insn.near_branch_target())
            }
            _ => self.read_operand(0),
        }
    }

    /// Near JMP.
    pub(super) fn jmp(&mut self) -> Result<Flow, Stop> {
        let target = self.branch_target()?;
        self.go(target)
    }

    /// Jcc.
    pub(super) fn jcc(&mut self) -> Result<Flow, Stop> {
        if condition(self.insn.condition_code(), self.cpu.rflags) {
            self.go(self.insn.near_branch_target())
        } else {
            Ok(Flow::Next)
        }
    }

    /// LOOP, LOOPE, LOOPNE.
    pub(super) fn loop_(&mut self) -> Result<Flow, Stop> {
        let size = match self.insn.code() {
            Code::Loop_rel8_16_CX
            | Code::Loop_rel8_32_CX
            | Code::Loope_rel8_16_CX
            | Code::Loope_rel8_32_CX
            | Code::Loopne_rel8_16_CX
            | Code::Loopne_rel8_32_CX => 2,
            Code::Loop_rel8_16_RCX
            | Code::Loop_rel8_64_RCX
            | Code::Loope_rel8_16_RCX
            | Code::Loope_rel8_64_RCX
            | Code::Loopne_rel8_16_RCX
            | Code::Loopne_rel8_64_RCX => 8,
            _ => 4,
        };
        let count = self.cpu.gpr[gpr::RCX].wrapping_sub(1) & size_mask(size);
        let zf = self.cpu.rflags & ZF != 0;
        let taken = count != 0
            && match self.insn.mnemonic() {
                Mnemonic::Loope => zf,
                Mnemonic::Loopne => !zf,
                _ => true,
            };
        let target = self.insn.near_branch_target();
        if taken {
            self.check_target(target)?;
        }
        super::address::write_number(self.cpu, gpr::RCX, size, count);
        if taken {
            self.cpu.rip = target;
            return Ok(Flow::Jumped);
        }
        Ok(Flow::Next)
    }

    /// JCXZ, JECXZ, JRCXZ.
    pub(super) fn jcxz(&mut self) -> Result<Flow, Stop> {
        let size = match self.insn.mnemonic() {
            Mnemonic::Jcxz => 2,
            Mnemonic::Jecxz => 4,
            _ => 8,
        };
        if self.cpu.gpr[gpr::RCX] & size_mask(size) == 0 {
            self.go(self.insn.near_branch_target())
        } else {
            Ok(Flow::Next)
        }
    }

    /// Near CALL.
    pub(super) fn call(&mut self) -> Result<Flow, Stop> {
        let size = self.branch_size();
        let target = self.branch_target()?;
        self.check_target(target)?;
        self.push(size, self.next_rip())?;
        self.cpu.rip = target;
        Ok(Flow::Jumped)
    }

    /// Near RET.
    pub(super) fn ret(&mut self) -> Result<Flow, Stop> {
        let size = match self.insn.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let target = self.stack_read(0, size)?;
        self.check_target(target)?;
        let release = if self.insn.op_count() > 0 {
            u64::from(self.insn.immediate16())
        } else {
            0
        };
        self.stack_release(size as u64 + release);
        self.cpu.rip = target;
        Ok(Flow::Jumped)
    }
}
