//! Operands of instructions that are executed by hand: registers, immediates, memory.

use super::Step;
use super::address::{effective_address, gpr_name, read_gpr, write_gpr};
use crate::env::{Env, Stop};
use crate::mem;
use crate::paging::Access;
use iced_x86::OpKind;

impl<E: Env + ?Sized> Step<'_, E> {
    /// Bytes of operand `n`: a register's, else the memory operand's.
    #[inline]
    pub(crate) fn operand_size(&self, n: u32) -> usize {
        if self.insn.op_kind(n) == OpKind::Register {
            self.insn.op_register(n).size()
        } else {
            self.insn.memory_size().size()
        }
    }

    /// Reads an integer operand of up to 8 bytes. Immediates come sign-extended.
    #[inline]
    pub(crate) fn read_operand(&mut self, n: u32) -> Result<u64, Stop> {
        match self.insn.op_kind(n) {
            OpKind::Register => Ok(read_gpr(self.cpu, self.insn.op_register(n))),
            OpKind::Memory => {
                let size = self.insn.memory_size().size();
                let (seg, offset) = effective_address(self.cpu, self.insn);
                self.load(seg, offset, size)
            }
            _ => self.insn.try_immediate(n).map_err(|_| Stop::ud()),
        }
    }

    /// Writes an integer operand of up to 8 bytes.
    #[inline]
    pub(crate) fn write_operand(&mut self, n: u32, value: u64) -> Result<(), Stop> {
        match self.insn.op_kind(n) {
            OpKind::Register => {
                let reg = self.insn.op_register(n);
                if gpr_name(reg).is_none() {
                    return Err(Stop::ud());
                }
                write_gpr(self.cpu, reg, value);
                Ok(())
            }
            OpKind::Memory => {
                let size = self.insn.memory_size().size();
                let (seg, offset) = effective_address(self.cpu, self.insn);
                self.store(seg, offset, size, value)
            }
            _ => Err(Stop::ud()),
        }
    }

    /// Reads 1-8 bytes at a segment offset.
    #[inline]
    pub(crate) fn load(&mut self, seg: usize, offset: u64, size: usize) -> Result<u64, Stop> {
        let address = self.address(seg, offset, size, false)?;
        self.watch(address, size, false);
        let access = Access::read(self.cpu);
        mem::read_int(self.cpu, self.env, address, size, access)
    }

    /// Writes 1-8 bytes at a segment offset.
    #[inline]
    pub(crate) fn store(
        &mut self,
        seg: usize,
        offset: u64,
        size: usize,
        value: u64,
    ) -> Result<(), Stop> {
        let address = self.address(seg, offset, size, true)?;
        let access = Access::write(self.cpu);
        mem::write_int(self.cpu, self.env, address, value, size, access)?;
        self.watch(address, size, true);
        Ok(())
    }

    /// Reads bytes at a linear address that was checked before.
    pub(crate) fn read_at(&mut self, address: u64, data: &mut [u8]) -> Result<(), Stop> {
        self.watch(address, data.len(), false);
        let access = Access::read(self.cpu);
        mem::read_linear(self.cpu, self.env, address, data, access)
    }

    /// Writes bytes at a linear address that was checked before.
    pub(crate) fn write_at(&mut self, address: u64, data: &[u8]) -> Result<(), Stop> {
        let access = Access::write(self.cpu);
        mem::write_linear(self.cpu, self.env, address, data, access)?;
        self.watch(address, data.len(), true);
        Ok(())
    }

    /// Remembers a data breakpoint hit.
    #[inline]
    pub(crate) fn watch(&mut self, address: u64, len: usize, write: bool) {
        if self.cpu.dr7 & 0xff != 0 {
            self.hits |= super::debug::data_hits(self.cpu, address, len, write);
        }
    }
}
