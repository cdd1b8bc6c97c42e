//! PUSH, POP, LEAVE and the stack pointer.

use super::*;

/// The most pushes or pops that share a probe.
const MAX_RUN: usize = 8;

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

    /// How many instructions at the start of `ops` push or pop registers one after another; pops may end with
    /// a return. At most [`MAX_RUN`].
    pub(super) fn stack_run(&self, ops: &[Op]) -> usize {
        if !self.long() {
            return 0;
        }
        let plain = |o: &Op| {
            let whole = Self::stack_size(&o.insn).0 == Size::Q;
            let register = o.insn.op0_kind() == OpKind::Register;
            let rsp = register && o.insn.op0_register() == Register::RSP;
            whole
                && !rsp
                && (register || o.kind == Kind::Push && o.insn.op0_kind() != OpKind::Memory)
        };
        let first = ops.first().map(|o| o.kind);
        let count = |kind: Kind| {
            let same = |o: &&Op| o.kind == kind && plain(o);
            ops.iter().take(MAX_RUN).take_while(same).count()
        };
        match first {
            Some(Kind::Push) => count(Kind::Push),
            Some(Kind::Pop) => {
                let pops = count(Kind::Pop);
                let returns = matches!(ops.get(pops).map(|o| o.kind), Some(Kind::Ret(_)));
                pops + usize::from(returns && pops > 0 && pops < MAX_RUN)
            }
            _ => 0,
        }
    }

    /// Pushes or pops of a [`Tx::stack_run`] with one probe. Nothing has changed if it fails: then they are
    /// done one by one, behind the block.
    pub(super) fn stack_group(&mut self, ops: &[Op]) {
        let (Some(first), Some(last)) = (ops.first(), ops.last()) else {
            return;
        };
        let write = first.kind == Kind::Push;
        let bytes = 8 * ops.len() as i32;
        self.save_flags(first.live_before);
        let flags = self.flags;
        let retry = self.a.here();
        self.a.lea(T, at(GUEST_RSP, if write { -bytes } else { 0 }));
        let jump = self.probe(bytes as usize, write, retry, first).jump;
        self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
        let mut moved = if write { -bytes } else { bytes };
        for (i, op) in ops.iter().enumerate() {
            let i = i as i32;
            let place = at(I, if write { bytes - 8 - 8 * i } else { 8 * i });
            let slot =
                (op.insn.op0_kind() == OpKind::Register).then(|| number(op.insn.op0_register()));
            match (op.kind, slot.map(|n| (host(n), n))) {
                (Kind::Ret(release), _) => {
                    self.a.load(Size::Q, T, place);
                    moved += i32::from(release);
                }
                (Kind::Push, Some((Some(h), _))) => self.a.store(Size::Q, place, h),
                (Kind::Push, Some((None, n))) => {
                    self.a.load(Size::Q, T, Mem::Gs(gpr_slot(n)));
                    self.a.store(Size::Q, place, T);
                }
                (Kind::Push, None) => {
                    let imm = op.insn.immediate(0) as i32;
                    self.a.store_imm(Size::Q, place, imm);
                }
                (_, Some((Some(h), _))) => self.a.load(Size::Q, h, place),
                (_, Some((None, n))) => {
                    self.a.load(Size::Q, T, place);
                    self.a.store(Size::Q, Mem::Gs(gpr_slot(n)), T);
                }
                (_, None) => {}
            }
        }
        self.move_stack(moved);
        if let Kind::Ret(release) = last.kind {
            self.leave_block(last.off, 8 + i32::from(release));
        }
        self.cold.push(Cold::OneByOne {
            jump,
            offset: first.off,
            count: ops.len(),
            flags,
            resume: self.a.here(),
        });
    }

    pub(super) fn push(&mut self, op: &Op) {
        let insn = &op.insn;
        let (size, n) = Self::stack_size(insn);
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

    pub(super) fn pop(&mut self, op: &Op) {
        let (size, n) = Self::stack_size(&op.insn);
        self.save_flags(op.live_before);
        let retry = self.a.here();
        self.stack_address(0, n);
        let miss = self.probe(n as usize, false, retry, op);
        let guest = number(op.insn.op0_register());
        let from = Mem::Sib(Some(I), Some((T, 0)), 0);
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
                self.a.load(size, T, from);
                self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), T);
                self.move_stack(n);
            }
        }
        self.resume_miss([miss], op);
    }

    pub(super) fn leave(&mut self, op: &Op) {
        let (size, n) = self.branch_size();
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
