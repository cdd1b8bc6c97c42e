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
        self.held = self.held_before;
        self.restore_flags(op.live_before | op.reads, false);
        self.settle_stack(op.off);
        if self.ctx.windows() {
            self.placed(crate::window::HIGH);
        }
        self.scratch.kept = true;
        let code = cond as u8 - ConditionCode::o as u8;
        let inside = self.linkable(target);
        if inside && target <= i64::from(op.off) {
            // A loop: one jump that is taken, and the poll in its way.
            let leave = self.a.jcc8(code ^ 1);
            let flags = self.flags;
            self.jump_direct(target, op.live_target, true);
            self.flags = flags;
            self.a.bind8(leave);
            return;
        }
        self.a.align_link(2);
        let jump = self.a.jcc(code);
        if inside && target > i64::from(op.off) {
            self.cold.push(Cold::Link {
                site: jump,
                target: target as u16,
                save: op.live_target != 0,
                fpu: self.block.fpu,
                apart: 0,
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
    pub(super) fn linkable(&self, target: i64) -> bool {
        (0..4096).contains(&target) && !self.block.crossing.contains(&(target as u16))
    }

    /// Jumps to a page offset; outside the page, through the jump cache.
    pub(super) fn jump_direct(&mut self, target: i64, live: u32, backwards: bool) {
        if !self.linkable(target) {
            if self.ctx.windows() {
                return self.jump_far(target, live, backwards);
            }
            self.save_flags(live);
            self.load_linear(T, target);
            self.jump_t(0);
            return;
        }
        self.restore_flags(live, false);
        if self.ctx.windows() {
            self.placed(crate::window::HIGH);
        }
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
            apart: 0,
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

    /// Where the linear address of the page is.
    pub(super) fn page_base(&self) -> Mem {
        if self.ctx.windows() {
            crate::far::page(self.ask.page)
        } else {
            Mem::Gs(off::PC_BASE)
        }
    }

    /// Linear address of a page offset into `dst`. Keeps flags.
    pub(super) fn load_linear(&mut self, dst: u8, offset: i64) {
        let base = self.page_base();
        self.a.load(Size::Q, dst, base);
        if self.long() {
            self.a.lea(dst, at(dst, offset as i32));
        } else {
            self.a.lea32(dst, at(dst, offset as i32));
        }
    }

    /// Jumps to the linear address in T; live flags are in memory.
    ///
    /// `branch`: the branch word of an indirect branch, for the case that the target is not canonical,
    /// or 0.
    pub(super) fn jump_t(&mut self, branch: u32) {
        if self.ctx.segmented() {
            // The target must be checked against the segment, which the jump cache knows nothing of.
            self.a.jmp_to(self.stubs.jump);
            return;
        }
        let jumps = self.probe_jump(4);
        self.cold.push(Cold::Lost {
            jumps,
            branch,
            lands: None,
        });
    }

    /// Looks T up in the jump cache and jumps (`4`) or calls (`2`); the jumps taken if it cannot.
    fn probe_jump(&mut self, how: u8) -> [usize; 2] {
        let base = jumps_base(self.ctx.tlb());
        let a = &mut self.a;
        a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
        let polled = a.jcc(cc::NE);
        crate::stubs::jump_offset(a, self.bmi2);
        a.op_mem(Size::Q, &[0x3b], T, Mem::GsBase(I, base)); // cmp
        let missed = a.jcc(cc::NE);
        a.op_mem(Size::D, &[0xff], how, Mem::GsBase(I, base + 8));
        [polled, missed]
    }

    /// `push T`
    pub(super) fn push_t(&mut self) {
        self.a.bytes(&[0x41, 0x50 | T & 7]);
    }

    /// Pushes the host address at offset `lands` of this code. Clobbers I.
    pub(super) fn push_landing(&mut self, lands: usize) {
        let rel = lands as i64 - (self.a.here() as i64 + 7);
        self.a.bytes(&[0x4c, 0x8d, 0x05 | (I & 7) << 3]); // lea I, [rip + rel]
        self.a.d32(rel as i32 as u32);
        self.a.bytes(&[0x41, 0x50 | I & 7]);
    }

    /// Puts T, where the guest will return to, on the stack of return addresses. Clobbers EFLAGS.
    fn expect_return(&mut self) {
        self.a
            .op_mem(Size::Q, &[0x3b], reg::RSP, Mem::Gs(off::SHADOW_LIMIT)); // cmp
        let jump = self.a.jcc(cc::B);
        let resume = self.a.here();
        self.push_t();
        self.cold.push(Cold::Full { jump, resume });
    }

    /// Behind a host call: where the guest's return from this call lands, with its target in T and its
    /// branch word in I. One instruction compares, the code behind the call follows if it is linked.
    fn landing(&mut self, op: &Op) {
        let next = usize::from(op.off) + op.insn.len();
        let which = self.ctx.tlb();
        if next > 4096 - MAX_LEN {
            // The code behind the call may reach into another page: the jump cache's business.
            self.a.lea(reg::RSP, at(reg::RSP, 8));
            self.a.jmp_to(self.stubs.lookup[which]);
            return;
        }
        self.a.op_mem(Size::Q, &[0x3b], T, at(reg::RSP, 0)); // cmp
        self.a.lea(reg::RSP, at(reg::RSP, 8));
        self.a.jcc_to(cc::NE, self.stubs.astray[which]);
        self.a.align_link(1);
        let site = self.a.jmp();
        self.cold.push(Cold::Land {
            site,
            target: next as u16,
        });
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
        if self.ctx.windows() {
            return self.call_far(op, target);
        }
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.push_return(op, &mut misses);
        let backwards = target <= i64::from(op.off);
        if !self.ctx.pairs_calls() {
            self.jump_direct(target, op.live_target, backwards);
        } else if self.linkable(target) {
            self.call_near(op, target as u16, backwards);
        } else {
            self.save_flags(op.live_target);
            self.expect_return();
            self.load_linear(T, target);
            let jumps = self.probe_jump(2);
            let lands = Some(self.a.here());
            self.cold.push(Cold::Lost {
                jumps,
                branch: 0,
                lands,
            });
            self.landing(op);
        }
        // The interpreter leaves the block by itself.
        self.resume_miss(misses, op);
    }

    /// Calls a page offset of this page; T is where it will return to.
    fn call_near(&mut self, op: &Op, target: u16, backwards: bool) {
        // EFLAGS is free: what is live has been saved before the probe.
        let poll = backwards.then(|| {
            self.a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
            self.a.jcc(cc::NE)
        });
        self.expect_return();
        self.restore_flags(op.live_target, false);
        self.a.align_link(1);
        self.a.bytes(&[0xe8, 0, 0, 0, 0]);
        let site = self.a.here() - 4;
        let lands = self.a.here();
        self.cold.push(Cold::Link {
            site,
            target,
            save: op.live_target != 0,
            fpu: self.block.fpu,
            apart: 0,
        });
        if let Some(jump) = poll {
            self.cold.push(Cold::CallPoll {
                jump,
                target,
                lands,
            });
        }
        self.landing(op);
    }

    /// The branch target of an indirect jump or call into T.
    pub(super) fn load_target(&mut self, op: &Op, misses: &mut Vec<PendingMiss>) {
        let insn = &op.insn;
        let (size, n) = self.branch_size();
        if insn.op0_kind() == OpKind::Memory
            && let Some(kind) = self.window(op)
        {
            let from = self.window_operand(insn, kind);
            self.a.load(size, T, from);
            self.scratch.forget();
            return;
        }
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
        if self.ctx.windows() {
            return self.jump_indirect_far(op);
        }
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.load_target(op, &mut misses);
        self.jump_t(branch_word(op.off, 0));
        self.resume_miss(misses, op);
    }

    pub(super) fn call_indirect(&mut self, op: &Op) {
        if self.ctx.windows() {
            return self.call_indirect_far(op);
        }
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.load_target(op, &mut misses);
        self.a.store(Size::Q, Mem::Gs(off::SPILL), T);
        self.push_return(op, &mut misses);
        let branch = branch_word(op.off, -self.branch_size().1);
        if self.ctx.pairs_calls() {
            self.expect_return();
            self.a.load(Size::Q, T, Mem::Gs(off::SPILL));
            let jumps = self.probe_jump(2);
            let lands = Some(self.a.here());
            self.cold.push(Cold::Lost {
                jumps,
                branch,
                lands,
            });
            self.landing(op);
        } else {
            self.a.load(Size::Q, T, Mem::Gs(off::SPILL));
            self.jump_t(branch);
        }
        self.resume_miss(misses, op);
    }

    /// The end of the return at page offset `offset` that has added `moved` to RSP; T is its target.
    pub(super) fn leave_block(&mut self, offset: u16, moved: i32) {
        let branch = if self.ctx.windows() {
            crate::layout::far_branch_word(offset, moved, self.ask.page)
        } else {
            branch_word(offset, moved)
        };
        if self.ctx.pairs_calls() {
            self.a.mov_imm(I, u64::from(branch));
            self.a.bytes(&[0xc3]);
        } else {
            self.jump_t(branch);
        }
    }

    pub(super) fn ret(&mut self, op: &Op, release: u16) {
        if self.ctx.windows() && release != 0 {
            // Its branch word says no more than that it is a return.
            return self.interpret(op);
        }
        self.settle_probed(op);
        let (size, n) = self.branch_size();
        if self.window(op).is_none() {
            self.save_flags(op.live_before);
        }
        let mut miss = None;
        if let Some(place) = self.in_group(0) {
            self.a.load(size, T, at(I, place));
        } else if self.window(op).is_some() {
            let kind = self.stack_window(op);
            let from = self.through(window::Base::Gpr(4), 0, kind);
            self.a.load(size, T, from);
            self.scratch.forget();
        } else {
            let retry = self.a.here();
            self.stack_address(0, n);
            miss = Some(self.probe(n as usize, false, retry, op));
            self.a.load(size, T, Mem::Sib(Some(I), Some((T, 0)), 0));
        }
        if self.ctx.windows() {
            // Loads T, which a return keeps in memory meanwhile.
            self.settle_flags(op.live_before);
        }
        let moved = n + i32::from(release);
        self.move_stack(moved);
        self.leave_block(op.off, moved);
        self.resume_miss(miss, op);
    }
}
