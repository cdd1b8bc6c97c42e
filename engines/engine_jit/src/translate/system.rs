//! Flags as a whole, STI, STAC and CLAC, RDTSC, and what is left to the interpreter.

use super::*;

impl Tx<'_> {
    /// Calls the `interpret` stub for the instruction that the data word is about. The word stands behind the
    /// call, then the instruction's bytes, and their number, which is zero if they are no instruction.
    pub(super) fn call_interpreter(&mut self, meta: u32) {
        self.a.call_to(self.stubs.interpret);
        self.a.d32(meta);
        let offset = meta & 0xfff;
        let op = self.block.ops.iter().find(|o| u32::from(o.off) == offset);
        let (bytes, len) = op
            .filter(|o| !o.insn.is_invalid())
            .map_or(([0; 15], 0), |o| (o.bytes, o.insn.len() as u8));
        self.a.bytes(&bytes);
        self.a.bytes(&[len]);
        self.page_word();
    }

    /// Calls the interpreter for one instruction.
    pub(super) fn interpret(&mut self, op: &Op) {
        let live = op.live_before | op.live_after | op.reads;
        self.save_flags(live);
        let meta = self.meta(op);
        self.call_interpreter(meta);
        // The helper continues here if the block goes on.
        self.flags = Flags::Memory;
    }

    pub(super) fn sti(&mut self, op: &Op) {
        // With an interrupt waiting, the interpreter keeps the shadow and the window opens behind it.
        let live = op.live_before;
        if live == 0 {
            self.a.cmp_mem_imm8(Size::D, Mem::Gs(off::IRQ_WINDOW), 0);
            let jump = self.a.jcc(cc::NE);
            self.a.store_imm(Size::B, Mem::Gs(off::RFLAGS + 1), 2);
            let (meta, resume) = (self.meta(op), self.a.here());
            self.cold.push(Cold::Interpret {
                jump,
                meta,
                resume,
                reload: false,
                save: false,
            });
        } else {
            self.a.mov(T, reg::RCX);
            self.a.load(Size::D, reg::RCX, Mem::Gs(off::IRQ_WINDOW));
            let none = self.a.jrcxz();
            self.a.mov(reg::RCX, T);
            let jump = self.a.jmp();
            self.a.bind8(none);
            self.a.mov(reg::RCX, T);
            self.a.store_imm(Size::B, Mem::Gs(off::RFLAGS + 1), 2);
            let (meta, resume) = (self.meta(op), self.a.here());
            let host = self.flags == Flags::Host;
            self.cold.push(Cold::Interpret {
                jump,
                meta,
                resume,
                reload: host,
                save: host,
            });
        }
    }

    /// STAC and CLAC: the code behind them belongs to another context, and is another block.
    pub(super) fn set_ac(&mut self, op: &Op, set: bool) {
        self.a
            .store_imm(Size::B, Mem::Gs(off::RFLAGS + 2), if set { 4 } else { 0 });
        let ctx = self.ctx.with_ac(set);
        self.a.store_imm(Size::D, Mem::Gs(off::CTX), ctx.0 as i32);
        let next = i64::from(op.off) + op.insn.len() as i64;
        let leaving = self.ctx;
        self.ctx = ctx;
        self.jump_direct(next, op.live_target, false);
        self.ctx = leaving;
    }

    /// Computes a zero-extended value into the host's place for guest register `r`. Keeps flags.
    pub(super) fn zero_extended(&mut self, r: Register, load: impl FnOnce(&mut Self, u8)) {
        let guest = number(r);
        match host(guest) {
            Some(h) if !r.is_gpr16() => load(self, h),
            dst => {
                load(self, T);
                match dst {
                    Some(h) => self.a.op_reg(Size::W, &[0x89], T, h),
                    None if r.is_gpr16() => self.a.store(Size::W, Mem::Gs(gpr_slot(guest)), T),
                    None => self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), T),
                }
            }
        }
    }

    pub(super) fn pushf(&mut self, op: &Op) {
        self.save_flags(ARITH);
        let retry = self.a.here();
        self.stack_address(-8, 8);
        let miss = self.probe(8, true, retry, op);
        self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
        flags::restore_keeping_scratch(&mut self.a);
        self.a.bytes(&[0x9c, 0x41, 0x58 | T & 7]); // pushfq; pop T
        self.a.alu_imm(Size::D, 4, T, crate::layout::ARITH as i32);
        self.a.op_mem(Size::Q, &[0x0b], T, Mem::Gs(off::RFLAGS)); // or
        self.a.store(Size::Q, at(I, 0), T);
        self.move_stack(-8);
        self.resume_miss([miss], op);
    }

    pub(super) fn popf(&mut self, op: &Op) {
        // Whatever was live is replaced.
        self.flags = Flags::Memory;
        let retry = self.a.here();
        self.a.mov(T, GUEST_RSP);
        let miss = self.probe(8, false, retry, op);
        self.a.load(Size::Q, T, Mem::Sib(Some(I), Some((T, 0)), 0));
        // Anything but IF and the arithmetic flags is left to the interpreter, as is IF with an
        // interrupt waiting for it.
        self.a.mov(I, T);
        self.a.op_mem(Size::Q, &[0x33], I, Mem::Gs(off::RFLAGS)); // xor
        let others = !(crate::layout::ARITH as i32 | 0x200 | 2);
        self.a.alu_imm(Size::Q, 4, I, others);
        let other = self.a.jcc(cc::NE);
        self.a.mov(I, T);
        self.a.shr(I, 8);
        self.a.alu_imm(Size::D, 4, I, 2);
        let off_ = self.a.jcc(cc::E);
        self.a.cmp_mem_imm8(Size::D, Mem::Gs(off::IRQ_WINDOW), 0);
        let window = self.a.jcc(cc::NE);
        self.a.bind(off_);
        self.a.store(Size::B, Mem::Gs(off::RFLAGS + 1), I);
        self.a.mov(I, T);
        self.a.shr(I, 11);
        self.a.alu_imm(Size::D, 4, I, 1);
        self.a.op_reg(Size::D, &[0xc1], 4, T); // shl
        self.a.bytes(&[8]);
        self.a.alu_imm(Size::D, 4, T, 0xd500);
        self.a.op_reg(Size::D, &[0x09], I, T); // or
        self.a.store(Size::W, Mem::Gs(off::FLAGS), T);
        self.move_stack(8);
        let (meta, resume) = (self.meta(op), self.a.here());
        for jump in [other, window] {
            self.cold.push(Cold::Interpret {
                jump,
                meta,
                resume,
                reload: false,
                save: false,
            });
        }
        self.resume_miss([miss], op);
    }

    pub(super) fn rdtsc(&mut self, op: &Op, aux: bool) {
        self.save_flags(op.live_before);
        self.a.bytes(if aux {
            &[0x0f, 0x01, 0xf9]
        } else {
            &[0x0f, 0x31]
        });
        self.a.op_reg(Size::Q, &[0xc1], 4, reg::RDX); // shl
        self.a.bytes(&[32]);
        self.a.op_reg(Size::Q, &[0x09], reg::RDX, reg::RAX); // or
        self.a
            .op_mem(Size::Q, &[0x03], reg::RAX, Mem::Gs(off::TSC_OFFSET)); // add
        self.a.mov(reg::RDX, reg::RAX);
        self.a.shr(reg::RDX, 32);
        self.a.mov32(reg::RAX, reg::RAX);
        if aux {
            self.a.load(Size::D, reg::RCX, Mem::Gs(off::TSC_AUX));
        }
    }
}
