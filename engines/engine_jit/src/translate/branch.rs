//! Jumps, calls and returns.

use super::*;

impl Tx<'_> {
    /// Operand size of an indirect jump.
    pub(super) fn branch_size(&self) -> (Size, i32) {
        match self.ctx.code_size() {
            CodeSize::Bits64 => (Size::Q, 8),
            CodeSize::Bits32 => (Size::D, 4),
            CodeSize::Bits16 => (Size::W, 2),
        }
    }

    pub(super) fn jcc(&mut self, op: &Op, cond: ConditionCode, target: i64) {
        self.restore_flags(op.live_before | op.reads, false);
        let code = cond as u8 - ConditionCode::o as u8;
        self.a.align_link(2);
        let jump = self.a.jcc(code);
        let inside = self.linkable(target);
        if inside && target > i64::from(op.off) {
            self.cold.push(Cold::Link {
                site: jump,
                target: target as u16,
                save: op.live_target != 0,
                fpu: self.block.fpu,
            });
        } else {
            self.cold.push(Cold::Taken {
                jump,
                target,
                live: op.live_target,
            });
        }
    }

    /// A jump to page offset `target` can be linked.
    fn linkable(&self, target: i64) -> bool {
        (0..4096).contains(&target) && !self.block.crossing.contains(&(target as u16))
    }

    /// Jumps to a page offset; outside the page, through the jump cache.
    pub(super) fn jump_direct(&mut self, target: i64, live: u32, backwards: bool) {
        if !self.linkable(target) {
            self.save_flags(live);
            self.load_linear(T, target);
            self.jump_t(None);
            return;
        }
        self.restore_flags(live, false);
        if backwards {
            self.poll(target as u16, live);
        }
        self.a.align_link(1);
        let site = self.a.jmp();
        self.cold.push(Cold::Link {
            site,
            target: target as u16,
            save: live != 0,
            fpu: self.block.fpu,
        });
    }

    /// Stops at page offset `target` if the attention flag is up. Keeps live flags, which are in EFLAGS.
    pub(super) fn poll(&mut self, target: u16, live: u32) {
        if live == 0 {
            self.a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
            let jump = self.a.jcc(cc::NE);
            self.cold.push(Cold::Poll {
                jump,
                target,
                save: false,
                restore_rcx: false,
            });
        } else {
            self.a.mov(T, reg::RCX);
            self.a.load(Size::D, reg::RCX, Mem::Gs(off::ATTENTION));
            let quiet = self.a.jrcxz();
            let jump = self.a.jmp();
            self.a.bind8(quiet);
            self.a.mov(reg::RCX, T);
            self.cold.push(Cold::Poll {
                jump,
                target,
                save: true,
                restore_rcx: true,
            });
        }
    }

    /// Linear address of a page offset into `dst`. Keeps flags.
    pub(super) fn load_linear(&mut self, dst: u8, offset: i64) {
        self.a.load(Size::Q, dst, Mem::Gs(off::PC_BASE));
        if self.long() {
            self.a.lea(dst, at(dst, offset as i32));
        } else {
            self.a.lea32(dst, at(dst, offset as i32));
        }
    }

    /// Jumps to the linear address in T; live flags are in memory.
    ///
    /// `from`: of an indirect branch, its page offset and what it has added to RSP, for the case that
    /// the target is not canonical.
    pub(super) fn jump_t(&mut self, from: Option<(u16, i32)>) {
        if self.ctx.segmented() {
            // The target must be checked against the segment, which the jump cache knows nothing of.
            self.a.jmp_to(self.stubs.jump);
            return;
        }
        let stub = self.stubs.lookup[self.ctx.tlb()];
        let base = jumps_base(self.ctx.tlb());
        let a = &mut self.a;
        let miss = |a: &mut Asm| {
            if from.is_some() {
                return a.jcc(cc::NE);
            }
            a.jcc_to(cc::NE, stub);
            0
        };
        a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
        let polled = miss(a);
        if self.bmi2 {
            a.rorx(I, T, 12);
        } else {
            a.mov(I, T);
            a.op_reg(Size::Q, &[0xc1], 1, I); // ror
            a.bytes(&[12]);
        }
        a.op_reg(Size::D, &[0x31], T, I); // xor
        a.alu_imm(Size::D, 4, I, (JUMP_ENTRIES - 1) as i32);
        a.op_reg(Size::D, &[0xc1], 4, I); // shl
        a.bytes(&[4]);
        a.op_mem(Size::Q, &[0x3b], T, Mem::GsBase(I, base)); // cmp
        let missed = miss(a);
        a.op_mem(Size::D, &[0xff], 4, Mem::GsBase(I, base + 8));
        if let Some((branch, moved)) = from {
            self.cold.push(Cold::Lost {
                jumps: [polled, missed],
                branch,
                moved,
            });
        }
    }

    /// Pushes the return address; flags are out of the way.
    pub(super) fn push_return(&mut self, op: &Op, misses: &mut Vec<PendingMiss>) {
        let (size, n) = self.branch_size();
        let retry = self.a.here();
        self.stack_address(-n, n);
        misses.push(self.probe(n as usize, true, retry, op));
        self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
        self.load_linear(T, i64::from(op.off) + op.insn.len() as i64);
        if self.ctx.segmented() {
            self.a.op_mem(Size::D, &[0x2b], T, Mem::Gs(seg_base(1))); // sub
        }
        self.a.store(size, at(I, 0), T);
        self.move_stack(-n);
    }

    pub(super) fn call_direct(&mut self, op: &Op, target: i64) {
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.push_return(op, &mut misses);
        self.jump_direct(target, op.live_target, target <= i64::from(op.off));
        // The interpreter leaves the block by itself.
        self.resume_miss(misses, op);
    }

    /// The branch target of an indirect jump or call into T.
    pub(super) fn load_target(&mut self, op: &Op, misses: &mut Vec<PendingMiss>) {
        let insn = &op.insn;
        let (size, n) = self.branch_size();
        if insn.op0_kind() == OpKind::Memory {
            let retry = self.a.here();
            self.address(insn, n as usize);
            misses.push(self.probe(n as usize, false, retry, op));
            self.a.load(size, T, Mem::Sib(Some(I), Some((T, 0)), 0));
            return;
        }
        let guest = number(insn.op0_register());
        match (host(guest), self.long()) {
            (Some(h), true) => self.a.mov(T, h),
            (Some(h), false) => self.a.mov32(T, h),
            (None, _) => self.a.load(size, T, Mem::Gs(gpr_slot(guest))),
        }
    }

    pub(super) fn jump_indirect(&mut self, op: &Op) {
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.load_target(op, &mut misses);
        self.jump_t(Some((op.off, 0)));
        self.resume_miss(misses, op);
    }

    pub(super) fn call_indirect(&mut self, op: &Op) {
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.load_target(op, &mut misses);
        self.a.store(Size::Q, Mem::Gs(off::SPILL), T);
        self.push_return(op, &mut misses);
        self.a.load(Size::Q, T, Mem::Gs(off::SPILL));
        self.jump_t(Some((op.off, -self.branch_size().1)));
        self.resume_miss(misses, op);
    }

    pub(super) fn ret(&mut self, op: &Op, release: u16) {
        let (size, n) = self.branch_size();
        self.save_flags(op.live_before);
        let retry = self.a.here();
        self.stack_address(0, n);
        let miss = self.probe(n as usize, false, retry, op);
        self.a.load(size, T, Mem::Sib(Some(I), Some((T, 0)), 0));
        let moved = n + i32::from(release);
        self.move_stack(moved);
        self.jump_t(Some((op.off, moved)));
        self.resume_miss([miss], op);
    }
}
