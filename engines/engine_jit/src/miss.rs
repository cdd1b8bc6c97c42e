//! Stubs for accesses that the probe of a TLB has not let through.
//!
//! Behind its block, each access has little more than a call of one of these. Before the call stand two words: the
//! [`meta`] word of the access, and the distance to where an interpreted instruction goes on, or of a group the
//! bytes that it spans. A stub returns with carry clear where the probe is to be tried again; that is also how
//! [`crate::stubs::Helpers::memory`], to which it goes if nothing else helps, comes back. With carry set it says that
//! the code behind has the access.

use crate::asm::{Asm, Mem, Size, at, cc, reg};
use crate::code_writes::{CODE_WRITES, CodeWrite};
use crate::layout::{off, tlb_base};
use crate::stubs::{I, Stubs, T};
use crate::translate::meta;
use std::mem::offset_of;

/// Distance from a return address back to the [`meta`] word.
pub const META: usize = 13;
/// The same to the second word.
pub const SECOND: usize = 9;

/// What a stub does beside filling the TLB.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// Nothing: what crosses a page goes to the helper.
    Fill,
    /// A read of this size class that crosses a page goes through the bounce buffer; with carry set, the operand is
    /// at I + T.
    Read(usize),
    /// A write of this size class that crosses a page, or to a page that may hold code, works on a copy: with carry
    /// set, of the operand at I + T.
    Write(usize),
    /// With carry set, another block has this group of accesses: it crosses a page or writes to one that holds
    /// code.
    Group,
}

/// Emits the stubs, with those for refills and page crossings in place.
pub fn emit(a: &mut Asm, s: &mut Stubs) {
    for which in 0..3 {
        for write in [false, true] {
            let w = usize::from(write);
            s.miss[which].fill[w] = stub(a, s, which, write, How::Fill);
            s.miss[which].group[w] = stub(a, s, which, write, How::Group);
        }
        for class in 0..4 {
            s.miss[which].read[class] = stub(a, s, which, false, How::Read(class));
            s.miss[which].write[class] = stub(a, s, which, true, How::Write(class));
        }
    }
}

fn stub(a: &mut Asm, s: &Stubs, which: usize, write: bool, how: How) -> u64 {
    let at_pc = a.pc();
    let w = usize::from(write);
    let tag = tlb_base(which) + if write { 8 } else { 0 };
    a.op_mem(Size::Q, &[0x03], T, Mem::GsBase(I, tag)); // add: T is the address again
    a.load(Size::Q, I, at(reg::RSP, 0));
    if how == How::Group {
        a.load(Size::D, I, at(I, -(SECOND as i32)));
    } else {
        let size = meta::SIZE_SHIFT as i32 / 8 - META as i32;
        a.load(Size::B, I, at(I, size));
    }
    a.lea(I, Mem::Sib(Some(T), Some((I, 0)), -1));
    a.op_reg(Size::Q, &[0x31], T, I); // xor
    a.shr(I, 12);
    let mut slow = Vec::new();
    if let How::Write(class) = how {
        a.call_to(s.cross[which][1][class]);
        a.bytes(&[0x72, 2]); // jc over
        a.bytes(&[0xf9, 0xc3]); // stc; ret
        slow.push(a.jcc(cc::NE));
        a.bytes(&[0xf8, 0xc3]); // clc; ret
    } else {
        let crosses = a.jcc(cc::NE);
        let known = (write && how == How::Group).then(|| code_write(a, which));
        a.call_to(s.refill[which][w]);
        slow.push(a.jcc(cc::B));
        a.bytes(&[0xc3]);
        match how {
            How::Read(class) => {
                a.bind(crosses);
                a.call_to(s.cross[which][0][class]);
                slow.push(a.jcc(cc::B));
                a.bytes(&[0xf9, 0xc3]); // stc; ret
            }
            How::Group => {
                a.bind(crosses);
                if let Some(known) = known {
                    a.bind(known);
                }
                a.bytes(&[0xf9, 0xc3]); // stc; ret
            }
            How::Fill | How::Write(_) => slow.push(crosses),
        }
    }
    for jump in slow {
        a.bind(jump);
    }
    a.jmp_to(s.memory);
    at_pc
}

/// Looks the page of the write at T up in the code-write TLB; the jump taken if it is there. Clobbers I.
fn code_write(a: &mut Asm, which: usize) -> usize {
    let spill = Mem::Gs(off::CROSS_SPILL);
    a.store(Size::Q, spill, reg::RAX);
    a.mov(reg::RAX, T);
    a.alu_imm(Size::Q, 4, reg::RAX, -4096);
    a.alu_imm(Size::Q, 1, reg::RAX, which as i32);
    a.mov(I, T);
    a.shr(I, 12);
    a.alu_imm(Size::D, 4, I, CODE_WRITES as i32 - 1);
    a.op_reg(Size::D, &[0xc1], 4, I); // shl
    a.bytes(&[size_of::<CodeWrite>().trailing_zeros() as u8]);
    let tag = off::CODE_WRITES + offset_of!(CodeWrite, tag) as i32;
    a.op_mem(Size::Q, &[0x3b], reg::RAX, Mem::GsBase(I, tag)); // cmp
    a.load(Size::Q, reg::RAX, spill);
    a.jcc(cc::E)
}
