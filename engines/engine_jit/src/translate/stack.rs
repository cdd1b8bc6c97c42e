//! PUSH, POP, LEAVE and the stack pointer.

use super::*;

impl Tx<'_> {
    /// Operand size of PUSH and POP.
    pub(super) fn stack_size(insn: &Instruction) -> (Size, i32) {
        match insn.stack_pointer_increment().abs() {
            2 => (Size::W, 2),
            4 => (Size::D, 4),
            _ => (Size::Q, 8),
        }
    }

    /// Linear address of `size` bytes at the stack pointer plus `disp` into T.
    pub(super) fn stack_address(&mut self, disp: i32, size: i32) {
        if self.long() {
            self.a.lea(T, at(GUEST_RSP, disp));
            return;
        }
        self.a.lea32(T, at(GUEST_RSP, disp));
        if !self.ctx.wide_stack() {
            self.a.op_reg(Size::D, &[0x0f, 0xb7], T, T); // movzx
        }
        if self.ctx.segmented() {
            self.in_segment(2, size as usize);
        }
    }

    /// Adds `disp` to the stack pointer. Clobbers I; keeps flags.
    pub(super) fn move_stack(&mut self, disp: i32) {
        if self.long() {
            self.a.lea(GUEST_RSP, at(GUEST_RSP, disp));
        } else if self.ctx.wide_stack() {
            self.a.lea32(GUEST_RSP, at(GUEST_RSP, disp));
        } else {
            self.a.lea32(I, at(GUEST_RSP, disp));
            self.a.op_reg(Size::W, &[0x89], I, GUEST_RSP);
        }
    }

    pub(super) fn push(&mut self, op: &Op) {
        let insn = &op.insn;
        let (size, n) = Self::stack_size(insn);
        if let Some(place) = self.in_group(-8) {
            return self.push_grouped(op, place);
        }
        if insn.op0_kind() != OpKind::Memory && self.window(op).is_some() {
            return self.push_in_window(op);
        }
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        if insn.op0_kind() == OpKind::Memory {
            let retry = self.a.here();
            self.address(insn, n as usize);
            misses.push(self.probe(n as usize, false, retry, op));
            self.a.load(size, T, Mem::Sib(Some(I), Some((T, 0)), 0));
            self.a.store(Size::Q, Mem::Gs(off::SPILL), T);
        }
        // A retry after the second miss must not load a register that the first part clobbered.
        let retry = self.a.here();
        self.stack_address(-n, n);
        misses.push(self.probe(n as usize, true, retry, op));
        match insn.op0_kind() {
            OpKind::Register => {
                let guest = number(insn.op0_register());
                match host(guest) {
                    Some(h) => self.a.store(size, Mem::Sib(Some(I), Some((T, 0)), 0), h),
                    None => {
                        self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
                        self.a.load(Size::Q, T, Mem::Gs(gpr_slot(guest)));
                        self.a.store(size, at(I, 0), T);
                    }
                }
            }
            OpKind::Memory => {
                self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
                self.a.load(Size::Q, T, Mem::Gs(off::SPILL));
                self.a.store(size, at(I, 0), T);
            }
            _ => {
                let imm = insn.immediate(0) as i32;
                self.a
                    .store_imm(size, Mem::Sib(Some(I), Some((T, 0)), 0), imm);
            }
        }
        self.move_stack(-n);
        self.resume_miss(misses, op);
    }

    /// PUSH of a register or an immediate, to `place` bytes from I.
    fn push_grouped(&mut self, op: &Op, place: i32) {
        let to = at(I, place);
        if op.insn.op0_kind() == OpKind::Register {
            let guest = number(op.insn.op0_register());
            let from = host(guest).unwrap_or(T);
            if from == T {
                self.a.load(Size::Q, T, Mem::Gs(gpr_slot(guest)));
            }
            self.a.store(Size::Q, to, from);
        } else {
            self.a.store_imm(Size::Q, to, op.insn.immediate(0) as i32);
        }
        self.move_stack(-8);
    }

    pub(super) fn pop(&mut self, op: &Op) {
        let n = Self::stack_size(&op.insn).1;
        if let Some(place) = self.in_group(0) {
            let guest = number(op.insn.op0_register());
            let to = host(guest).unwrap_or(T);
            self.a.load(Size::Q, to, at(I, place));
            if to == T {
                self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), T);
            }
            self.move_stack(8);
            return;
        }
        if self.window(op).is_some() {
            return self.pop_in_window(op);
        }
        self.save_flags(op.live_before);
        let retry = self.a.here();
        self.stack_address(0, n);
        let miss = self.probe(n as usize, false, retry, op);
        self.pop_from(op, Mem::Sib(Some(I), Some((T, 0)), 0));
        self.resume_miss([miss], op);
    }

    /// Loads what POP pops from its place on the host. May clobber T.
    pub(super) fn pop_from(&mut self, op: &Op, from: Mem) {
        let (size, n) = Self::stack_size(&op.insn);
        let guest = number(op.insn.op0_register());
        match host(guest) {
            // Part of a register: what is above stays. POP SP is the interpreter's.
            Some(h) if size == Size::W => {
                self.a.op_mem(Size::W, &[0x8b], h, from);
                self.move_stack(n);
            }
            Some(GUEST_RSP) => self.a.load(size, GUEST_RSP, from),
            Some(h) => {
                self.a.load(size, h, from);
                self.move_stack(n);
            }
            None => {
                self.scratch.lose_base();
                self.a.load(size, T, from);
                self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), T);
                self.move_stack(n);
            }
        }
    }

    pub(super) fn leave(&mut self, op: &Op) {
        let (size, n) = self.branch_size();
        if self.window(op).is_some() {
            let kind = self.stack_window(op);
            let from = self.through(window::Base::Gpr(5), 0, kind);
            self.a.load(size, T, from);
            self.a.lea(GUEST_RSP, at(reg::RBP, n));
            self.a.mov(reg::RBP, T);
            self.scratch.lose_base();
            self.scratch.kept = true;
            return;
        }
        self.save_flags(op.live_before);
        let retry = self.a.here();
        if self.long() {
            self.a.mov(T, reg::RBP);
        } else {
            self.a.mov32(T, reg::RBP);
        }
        let miss = self.probe(n as usize, false, retry, op);
        self.a.load(size, T, Mem::Sib(Some(I), Some((T, 0)), 0));
        if self.long() {
            self.a.lea(GUEST_RSP, at(reg::RBP, n));
        } else {
            self.a.lea32(GUEST_RSP, at(reg::RBP, n));
        }
        self.a.mov(reg::RBP, T);
        self.resume_miss([miss], op);
    }
}
