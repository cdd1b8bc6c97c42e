//! Instructions without an encoding in 64-bit mode: decimal adjustment, BOUND, SALC.

use super::address::write_number;
use super::traits::Traits;
use super::{Flow, Step};
use crate::bits::*;
use crate::env::{Env, Exception, NativeRegs, Stop};
use crate::state::gpr;
use iced_x86::Mnemonic;

const AF: u64 = 1 << 4;

impl<E: Env + ?Sized> Step<'_, E> {
    pub(super) fn legacy(&mut self, traits: Traits) -> Result<Flow, Stop> {
        use Mnemonic as M;
        match self.insn.mnemonic() {
            M::Aaa => self.aaa(true)?,
            M::Aas => self.aaa(false)?,
            M::Daa => self.daa(true)?,
            M::Das => self.daa(false)?,
            M::Aam => self.aam()?,
            M::Aad => self.aad()?,
            M::Bound => self.bound()?,
            M::Salc => {
                let value = if self.cpu.rflags & CF != 0 { 0xff } else { 0 };
                write_number(self.cpu, gpr::RAX, 1, value);
            }
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => return self.maskmov(),
            M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64 => return self.save_restore(),
            _ if traits.vsib() && traits.writes() => return self.scatter(),
            _ if traits.vsib() => return self.gather(),
            _ => return Err(Stop::ud()),
        }
        Ok(Flow::Next)
    }

    /// SF, ZF and PF of a byte result, computed by the host.
    fn byte_flags(&mut self, value: u64) -> Result<u64, Stop> {
        let mut regs = NativeRegs::default();
        regs.gpr[gpr::RAX] = value;
        self.run_native(&[0x84, 0xc0], &mut regs, false)?; // test al, al
        Ok(regs.rflags & !(CF | OF | AF))
    }

    /// AAA and AAS.
    fn aaa(&mut self, add: bool) -> Result<(), Stop> {
        let ax = self.cpu.gpr[gpr::RAX] & 0xffff;
        let adjust = ax & 0xf > 9 || self.cpu.rflags & AF != 0;
        let mut result = ax;
        if adjust {
            result = if add {
                ax.wrapping_add(0x106)
            } else {
                ax.wrapping_sub(6).wrapping_sub(0x100)
            };
        }
        let mut flags = self.byte_flags(result & 0xff)?;
        if adjust {
            flags |= CF | AF;
        }
        write_number(self.cpu, gpr::RAX, 2, result & 0xff0f);
        self.set_arith(flags);
        Ok(())
    }

    /// DAA and DAS.
    fn daa(&mut self, add: bool) -> Result<(), Stop> {
        let old = self.cpu.gpr[gpr::RAX] & 0xff;
        let old_cf = self.cpu.rflags & CF != 0;
        let mut al = old;
        let mut extra = 0;
        let step = |al: u64, by: u64| {
            if add {
                al.wrapping_add(by)
            } else {
                al.wrapping_sub(by)
            }
        };
        if old & 0xf > 9 || self.cpu.rflags & AF != 0 {
            if old_cf || !add && old < 6 || add && old > 0xf9 {
                extra |= CF;
            }
            al = step(al, 6);
            extra |= AF;
        }
        if old > 0x99 || old_cf {
            al = step(al, 0x60);
            extra |= CF;
        } else if add {
            extra &= !CF;
        }
        let flags = self.byte_flags(al & 0xff)? | extra;
        write_number(self.cpu, gpr::RAX, 1, al);
        self.set_arith(flags);
        Ok(())
    }

    /// AAM; #DE for base 0.
    fn aam(&mut self) -> Result<(), Stop> {
        let base = u64::from(self.insn.immediate8());
        let al = self.cpu.gpr[gpr::RAX] & 0xff;
        let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
            return Err(Stop::de());
        };
        let flags = self.byte_flags(low)?;
        write_number(self.cpu, gpr::RAX, 2, high << 8 | low);
        self.set_arith(flags);
        Ok(())
    }

    /// AAD.
    fn aad(&mut self) -> Result<(), Stop> {
        let base = u64::from(self.insn.immediate8());
        let ax = self.cpu.gpr[gpr::RAX];
        let al = (ax & 0xff).wrapping_add((ax >> 8 & 0xff).wrapping_mul(base)) & 0xff;
        let flags = self.byte_flags(al)?;
        write_number(self.cpu, gpr::RAX, 2, al);
        self.set_arith(flags);
        Ok(())
    }

    /// BOUND: #BR if the index is outside the two bounds in memory.
    fn bound(&mut self) -> Result<(), Stop> {
        let size = self.insn.op0_register().size().clamp(2, 4);
        let address = self.operand_address(2 * size, false)?;
        let mut bytes = [0; 8];
        self.read_at(address, &mut bytes[..2 * size])?;
        let both = u64::from_le_bytes(bytes);
        let spare = 64 - 8 * size as u32;
        let signed = |v: u64| (v << spare) as i64 >> spare;
        let index = signed(super::address::read_gpr(self.cpu, self.insn.op0_register()));
        if index < signed(both) || index > signed(both >> (8 * size)) {
            return Err(Stop::Exception(Exception {
                vector: 5,
                error: None,
                payload: 0,
            }));
        }
        Ok(())
    }
}
