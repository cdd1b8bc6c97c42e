//! String instructions and bit strings.

use super::*;
use crate::layout::repeat;

impl Tx<'_> {
    /// MOVS, STOS, LODS. A repeated one runs natively if all of it lies in one page at each side, otherwise
    /// page by page behind the block.
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
            self.repeat(s, 0);
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
        if !slow.is_empty() {
            self.cold.push(Cold::Pages {
                jumps: slow,
                offset: op.off,
                strings: s,
                flags: self.flags,
                resume: self.a.here(),
            });
        }
        self.resume_miss(misses, op);
    }

    /// REP MOVS or STOS of RCX elements that lie in one page at each side: the destination's host address
    /// is in I, the source's in a spill slot. Clobbers T.
    ///
    /// `pages`: [`repeat::PAGES`] if the count of what is left for other pages is in the first spill slot.
    fn repeat(&mut self, s: Strings, pages: u32) {
        let a = &mut self.a;
        let source = if s.source { repeat::SOURCE } else { 0 };
        let word = repeat::ON | source | pages | u32::from(s.shift) << repeat::SHIFT;
        let moved = |r: u8| Mem::Sib(Some(r), Some((reg::RCX, s.shift)), 0);
        a.lea(T, moved(reg::RDI));
        if s.source {
            a.lea(reg::RSI, moved(reg::RSI));
            a.store(Size::Q, Mem::Gs(off::SPILL + 16), reg::RSI);
            a.load(Size::Q, reg::RSI, Mem::Gs(off::SPILL + 8));
        }
        a.store_imm(Size::D, Mem::Gs(off::REPEAT), word as i32);
        a.mov(reg::RDI, I);
        a.bytes(&[0xf3]);
        match s.shift {
            1 => a.bytes(&[0x66]),
            3 => a.bytes(&[0x48]),
            _ => {}
        }
        let opcode = if s.source { 0xa4 } else { 0xaa };
        a.bytes(&[opcode | u8::from(s.shift != 0)]);
        a.mov(reg::RDI, T);
        a.store_imm(Size::D, Mem::Gs(off::REPEAT), 0);
        if s.source {
            a.load(Size::Q, reg::RSI, Mem::Gs(off::SPILL + 16));
        }
    }

    /// Behind the block: a repeated string instruction at page offset `offset`, page by page. It can be
    /// interrupted between them, as on a processor: what is left is in the registers.
    pub(super) fn pages(&mut self, offset: u16, s: Strings, resume: usize) {
        let block = self.block;
        let Some(index) = block.ops.iter().position(|o| o.off == offset) else {
            return;
        };
        let op = &block.ops[index];
        let reload = self.flags == Flags::Host && op.live_after != 0;
        let top = self.a.here();
        self.map.push((top as u32, offset));
        let mut misses = Vec::new();
        if s.source {
            let retry = self.a.here();
            self.a.mov(T, reg::RSI);
            misses.push(self.probe(1, false, retry, op));
            self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
            self.a.store(Size::Q, Mem::Gs(off::SPILL + 8), I);
        }
        let retry = self.a.here();
        self.a.mov(T, reg::RDI);
        misses.push(self.probe(1, true, retry, op));
        self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
        // T = elements up to the end of a page, at most RCX.
        let left = |a: &mut Asm, to: u8, from: u8| {
            a.mov(to, from);
            a.op_reg(Size::Q, &[0xf7], 2, to); // not
            a.alu_imm(Size::D, 4, to, 4095);
            a.alu_imm(Size::D, 0, to, 1);
            if s.shift != 0 {
                a.shr(to, s.shift);
            }
        };
        let spill = Mem::Gs(off::SPILL);
        let a = &mut self.a;
        left(a, T, reg::RDI);
        if s.source {
            a.store(Size::Q, spill, reg::RAX);
            left(a, reg::RAX, reg::RSI);
            a.op_reg(Size::Q, &[0x39], T, reg::RAX); // cmp rax, t
            a.op_reg(Size::Q, &[0x0f, 0x42], T, reg::RAX); // cmovb t, rax
            a.load(Size::Q, reg::RAX, spill);
        }
        a.op_reg(Size::Q, &[0x39], T, reg::RCX); // cmp rcx, t
        a.op_reg(Size::Q, &[0x0f, 0x42], T, reg::RCX); // cmovb t, rcx
        a.op_reg(Size::Q, &[0x85], T, T); // test
        // None: an element crosses a page.
        let none = a.jcc(cc::E);
        a.store(Size::Q, spill, reg::RCX);
        a.op_mem(Size::Q, &[0x29], T, spill); // sub
        a.mov(reg::RCX, T);
        self.repeat(s, repeat::PAGES);
        self.a.load(Size::Q, reg::RCX, spill);
        self.a.op_reg(Size::Q, &[0x85], reg::RCX, reg::RCX); // test
        let done = self.a.jcc(cc::E);
        self.a.bind_to(done, resume);
        self.a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
        let more = self.a.jcc(cc::E);
        self.a.bind_to(more, top);
        let jump = self.a.jmp();
        self.cold.push(Cold::Poll {
            jump,
            target: offset,
            save: false,
            restore_rcx: false,
        });
        let meta = self.meta(op);
        self.cold.push(Cold::Interpret {
            jump: none,
            meta,
            resume,
            reload,
            save: false,
        });
        for miss in misses {
            self.cold.push(Cold::Miss {
                miss,
                op: index,
                resume,
                reload,
            });
        }
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
