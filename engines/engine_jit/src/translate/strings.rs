//! String instructions and bit strings.

use super::*;

impl Tx<'_> {
    /// MOVS, STOS, LODS. A repeated one runs natively if all of it lies in one page at each side;
    /// otherwise the interpreter takes it page by page.
    pub(super) fn strings(&mut self, op: &Op, s: Strings) {
        let size = 1usize << s.shift;
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        let mut slow = Vec::new();
        let fits = |x: &mut Self, slow: &mut Vec<usize>| {
            if s.rep {
                // offset + count * size <= 4096, with RSI borrowed for the sum
                x.a.store(Size::Q, Mem::Gs(off::SPILL + 24), reg::RSI);
                x.a.lea(reg::RSI, Mem::Sib(Some(T), Some((reg::RCX, s.shift)), 0));
                x.a.alu_imm(Size::Q, 7, reg::RSI, 4096);
                x.a.load(Size::Q, reg::RSI, Mem::Gs(off::SPILL + 24));
                slow.push(x.a.jcc(cc::A));
            }
            x.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
        };
        if s.rep {
            // Keeps the sums below from wrapping.
            self.a.alu_imm(Size::Q, 7, reg::RCX, 4096);
            slow.push(self.a.jcc(cc::A));
        }
        let probed = if s.rep { 1 } else { size };
        if s.source {
            let retry = self.a.here();
            self.a.mov(T, reg::RSI);
            misses.push(self.probe(probed, false, retry, op));
            fits(self, &mut slow);
            if s.destination {
                self.a.store(Size::Q, Mem::Gs(off::SPILL + 8), I);
            }
        }
        if s.destination {
            let retry = self.a.here();
            self.a.mov(T, reg::RDI);
            misses.push(self.probe(probed, true, retry, op));
            fits(self, &mut slow);
        }
        let width = [Size::B, Size::W, Size::D, Size::Q][usize::from(s.shift)];
        if s.rep {
            self.a
                .lea(T, Mem::Sib(Some(reg::RDI), Some((reg::RCX, s.shift)), 0));
            if s.source {
                self.a.lea(
                    reg::RSI,
                    Mem::Sib(Some(reg::RSI), Some((reg::RCX, s.shift)), 0),
                );
                self.a.store(Size::Q, Mem::Gs(off::SPILL + 16), reg::RSI);
                self.a.load(Size::Q, reg::RSI, Mem::Gs(off::SPILL + 8));
            }
            self.a.mov(reg::RDI, I);
            self.a.bytes(&[0xf3]);
            match width {
                Size::W => self.a.bytes(&[0x66]),
                Size::Q => self.a.bytes(&[0x48]),
                _ => {}
            }
            let opcode = if s.source { 0xa4 } else { 0xaa };
            self.a.bytes(&[opcode | u8::from(s.shift != 0)]);
            self.a.mov(reg::RDI, T);
            if s.source {
                self.a.load(Size::Q, reg::RSI, Mem::Gs(off::SPILL + 16));
            }
        } else {
            let step = size as i32;
            match (s.source, s.destination) {
                (true, true) => {
                    self.a.load(Size::Q, T, Mem::Gs(off::SPILL + 8));
                    self.a.load(width, T, at(T, 0));
                    self.a.store(width, at(I, 0), T);
                }
                (false, true) => self.a.store(width, at(I, 0), reg::RAX),
                _ => match width {
                    Size::B => self.a.op_mem(Size::B, &[0x8a], reg::RAX, at(I, 0)),
                    _ => self.a.op_mem(width, &[0x8b], reg::RAX, at(I, 0)),
                },
            }
            if s.source {
                self.a.lea(reg::RSI, at(reg::RSI, step));
            }
            if s.destination {
                self.a.lea(reg::RDI, at(reg::RDI, step));
            }
        }
        let (meta, resume) = (self.meta(op), self.a.here());
        let reload = self.flags == Flags::Host && op.live_after != 0;
        for jump in slow {
            self.cold.push(Cold::Interpret {
                jump,
                meta,
                resume,
                reload,
                save: false,
            });
        }
        self.resume_miss(misses, op);
    }

    /// A bit string in memory: the bit number reaches beyond the operand at the address.
    pub(super) fn bit_string(&mut self, op: &Op) {
        let insn = &op.insn;
        let Some(mut enc) = op.enc else {
            return self.interpret(op);
        };
        let size = insn.memory_size().size();
        let guest = number(insn.op1_register());
        self.save_flags(op.live_before);
        let retry = self.a.here();
        // The address first, as it may use both scratch registers.
        self.address(insn, size);
        let from = match host(guest) {
            Some(h) => h,
            None => {
                self.a.load(Size::Q, I, Mem::Gs(gpr_slot(guest)));
                I
            }
        };
        if size == 8 {
            self.a.mov(I, from);
        } else {
            self.a.op_reg(Size::Q, &[0x63], I, from); // movsxd
        }
        let shift = if size == 8 { 6 } else { 5 };
        self.a.op_reg(Size::Q, &[0xc1], 7, I); // sar
        self.a.bytes(&[shift]);
        if self.long() {
            self.a.lea(T, Mem::Sib(Some(T), Some((I, shift - 3)), 0));
        } else {
            self.a.lea32(T, Mem::Sib(Some(T), Some((I, shift - 3)), 0));
        }
        let write = insn.mnemonic() != iced_x86::Mnemonic::Bt;
        let miss = self.probe(size, write, retry, op);
        self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
        match host(guest) {
            Some(h) => self.a.mov(T, h),
            None => self.a.load(Size::Q, T, Mem::Gs(gpr_slot(guest))),
        }
        self.a.alu_imm(Size::D, 4, T, size as i32 * 8 - 1);
        if op.live_after & !op.kills != 0 {
            self.restore_flags(op.live_before, true);
        }
        enc.set_register(Field::Reg, T);
        enc.set_memory(HostMem::BaseDisp(I, 0));
        self.emit(op, &enc);
        self.flags = Flags::Host;
        self.resume_miss([miss], op);
    }
}
