//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE.

use super::address::{read_gpr, size_mask, stack_size, write_gpr, write_number};
use super::{Flow, Step};
use crate::env::{Env, Stop};
use crate::state::{gpr, sreg};
use iced_x86::{Code, OpKind, Register};

impl<E: Env + ?Sized> Step<'_, E> {
    /// The stack pointer at the stack's width, moved by `delta`.
    #[inline]
    fn stack_at(&self, delta: i64) -> u64 {
        let mask = size_mask(stack_size(self.cpu, self.mode));
        self.cpu.gpr[gpr::RSP].wrapping_add_signed(delta) & mask
    }

    #[inline]
    pub(super) fn set_stack(&mut self, value: u64) {
        let size = stack_size(self.cpu, self.mode);
        write_number(self.cpu, gpr::RSP, size, value);
    }

    /// Pushes `size` bytes.
    #[inline]
    pub(super) fn push(&mut self, size: usize, value: u64) -> Result<(), Stop> {
        let at = self.stack_at(-(size as i64));
        self.store(sreg::SS, at, size, value)?;
        self.set_stack(at);
        Ok(())
    }

    /// Reads `size` bytes at `delta` above the stack pointer.
    #[inline]
    pub(super) fn stack_read(&mut self, delta: i64, size: usize) -> Result<u64, Stop> {
        let at = self.stack_at(delta);
        self.load(sreg::SS, at, size)
    }

    /// Adds to the stack pointer.
    #[inline]
    pub(super) fn stack_release(&mut self, bytes: u64) {
        let at = self.stack_at(bytes as i64);
        self.set_stack(at);
    }

    /// PUSH of registers, memory, immediates and segment registers.
    pub(super) fn push_insn(&mut self) -> Result<Flow, Stop> {
        let size = self.stack_operand_size();
        let value = match self.insn.op0_kind() {
            OpKind::Register => {
                let reg = self.insn.op0_register();
                if reg.is_segment_register() {
                    let selector = self.cpu.seg[super::address::segment_index(reg)].selector;
                    if size == 4 && !self.env.features().amd {
                        // Only the low 16 bits are written; the slot's upper half stays.
                        let at = self.stack_at(-4);
                        self.address(sreg::SS, at, 4, true)?;
                        self.store(sreg::SS, at, 2, u64::from(selector))?;
                        self.set_stack(at);
                        return Ok(Flow::Next);
                    }
                    u64::from(selector)
                } else {
                    read_gpr(self.cpu, reg)
                }
            }
            _ => self.read_operand(0)?,
        };
        self.push(size, value)?;
        Ok(Flow::Next)
    }

    /// The operand size of PUSH and POP: by iced, how far the stack pointer moves.
    #[inline]
    fn stack_operand_size(&self) -> usize {
        self.insn.stack_pointer_increment().unsigned_abs() as usize & 15
    }

    /// POP into a general-purpose register or memory.
    pub(super) fn pop_insn(&mut self) -> Result<Flow, Stop> {
        let size = self.stack_operand_size();
        let value = self.stack_read(0, size)?;
        if self.insn.op0_kind() == OpKind::Register {
            self.stack_release(size as u64);
            // POP RSP: the popped value wins over the increment.
            write_gpr(self.cpu, self.insn.op0_register(), value);
            return Ok(Flow::Next);
        }
        // An address based on RSP is computed with its value after the pop.
        let before = self.cpu.gpr[gpr::RSP];
        self.stack_release(size as u64);
        if let Err(stop) = self.write_operand(0, value) {
            self.cpu.gpr[gpr::RSP] = before;
            return Err(stop);
        }
        Ok(Flow::Next)
    }

    /// PUSHA and PUSHAD.
    pub(super) fn pusha(&mut self) -> Result<Flow, Stop> {
        let size: usize = if self.insn.code() == Code::Pushaw {
            2
        } else {
            4
        };
        // The whole frame must be writable before any of it is written.
        for n in 1..=8i64 {
            let at = self.stack_at(-n * size as i64);
            let address = self.address(sreg::SS, at, size, true)?;
            self.probe_write(address, size)?;
        }
        let regs = self.cpu.gpr;
        let before = self.cpu.gpr[gpr::RSP];
        for value in regs.iter().take(8) {
            if let Err(stop) = self.push(size, *value) {
                self.cpu.gpr[gpr::RSP] = before;
                return Err(stop);
            }
        }
        Ok(Flow::Next)
    }

    /// POPA and POPAD.
    pub(super) fn popa(&mut self) -> Result<Flow, Stop> {
        let size: usize = if self.insn.code() == Code::Popaw {
            2
        } else {
            4
        };
        let mut values = [0; 8];
        for (n, value) in values.iter_mut().enumerate() {
            *value = self.stack_read((n * size) as i64, size)?;
        }
        self.stack_release(8 * size as u64);
        for (n, value) in values.iter().enumerate() {
            let number = 7 - n;
            if number != gpr::RSP {
                write_number(self.cpu, number, size, *value);
            }
        }
        Ok(Flow::Next)
    }

    /// ENTER.
    pub(super) fn enter(&mut self) -> Result<Flow, Stop> {
        let size: usize = match self.insn.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let locals = u64::from(self.insn.immediate16());
        let level = i64::from(self.insn.immediate8_2nd() & 31);
        let width = stack_size(self.cpu, self.mode);
        let before = (self.cpu.gpr[gpr::RSP], self.cpu.gpr[gpr::RBP]);
        let result = self.enter_frame(size, width, level, locals);
        if result.is_err() {
            (self.cpu.gpr[gpr::RSP], self.cpu.gpr[gpr::RBP]) = before;
        }
        result
    }

    fn enter_frame(
        &mut self,
        size: usize,
        width: usize,
        level: i64,
        locals: u64,
    ) -> Result<Flow, Stop> {
        let step = size as i64;
        let old_frame = self.cpu.gpr[gpr::RBP];
        self.push(size, old_frame)?;
        let frame = self.cpu.gpr[gpr::RSP];
        for n in 1..level {
            let at = old_frame.wrapping_sub((n * step) as u64) & size_mask(width);
            let value = self.load(sreg::SS, at, size)?;
            self.push(size, value)?;
        }
        if level > 0 {
            self.push(size, frame)?;
        }
        let top = self.stack_at(-(locals as i64));
        // The stack below must be writable too, or the instruction faults here.
        let address = self.address(sreg::SS, top, size, true)?;
        self.probe_write(address, size)?;
        write_number(self.cpu, gpr::RBP, size, frame);
        self.set_stack(top);
        Ok(Flow::Next)
    }

    /// LEAVE.
    pub(super) fn leave(&mut self) -> Result<Flow, Stop> {
        let size: usize = match self.insn.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        };
        let width = stack_size(self.cpu, self.mode);
        let frame = self.cpu.gpr[gpr::RBP] & size_mask(width);
        let value = self.load(sreg::SS, frame, size)?;
        self.set_stack(frame.wrapping_add(size as u64) & size_mask(width));
        write_number(self.cpu, gpr::RBP, size, value);
        Ok(Flow::Next)
    }

    /// Raises the fault that a write of `len` bytes would raise.
    pub(crate) fn probe_write(&mut self, address: u64, len: usize) -> Result<(), Stop> {
        let access = crate::paging::Access::write(self.cpu);
        self.env.translate(self.cpu, address, access)?;
        let last = address.wrapping_add(len.max(1) as u64 - 1);
        if last >> 12 != address >> 12 {
            self.env.translate(self.cpu, last & !0xfff, access)?;
        }
        Ok(())
    }

    /// The register that holds a count or pointer of the given width.
    #[inline]
    pub(crate) fn sized(&self, number: usize, size: usize) -> u64 {
        self.cpu.gpr[number & 15] & size_mask(size)
    }

    /// XLAT: AL = [rBX + AL].
    pub(super) fn xlat(&mut self) -> Result<Flow, Stop> {
        let size = match self.insn.memory_base() {
            Register::BX => 2,
            Register::EBX => 4,
            _ => 8,
        };
        let seg = super::address::segment_index(self.insn.memory_segment());
        let al = self.cpu.gpr[gpr::RAX] & 0xff;
        let offset = self.cpu.gpr[gpr::RBX].wrapping_add(al) & size_mask(size);
        let value = self.load(seg, offset, 1)?;
        write_number(self.cpu, gpr::RAX, 1, value);
        Ok(Flow::Next)
    }
}
