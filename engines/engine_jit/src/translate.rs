//! From decoded guest instructions to host code.
//!
//! Register map while translated code runs: the guest's RAX-R12 live in the host registers of the same
//! name, its RSP in R13; its R13-R15 live in memory. R14 (T) and R15 (I) are scratch. `gs` points at
//! [`crate::layout::VcpuMem`]; the host's RSP stays a host stack.
//!
//! Flags: EFLAGS holds the guest's arithmetic flags, or `VcpuMem::flags` does; which of the two is
//! tracked here per point in the code ([`Flags`]). A TLB probe clobbers EFLAGS, so live flags are saved
//! once before the first probe and restored before the next instruction that needs them.
//!
//! Nothing of the guest's state changes before the last point where an instruction can fault, so
//! that the interpreter can execute it again from the start.

use crate::asm::{Asm, Mem, Size, at, cc, reg};
use crate::context::Context;
use crate::flags;
use crate::frontend::{ARITH, Decoded, Kind, Op, Strings, access_size};
use crate::layout::{
    JUMP_ENTRIES, TLB_ENTRIES, gpr_slot, jumps_base, off, seg_base, seg_limit, seg_selector,
    tlb_base,
};
use crate::stubs::{GUEST_RSP, I, Stubs, T};
use iced_x86::{
    ConditionCode, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register,
};
use x86emu::encoding::{Encoding, Field, HostMem, MAX_LEN, gpr_field};
use x86emu::state::CodeSize;

/// Finished code and what the cache must know of it.
#[derive(Debug)]
pub struct Code {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Offset of the entry for linked jumps.
    pub direct: usize,
    /// Offset of the entry for linked jumps with the FPU loaded.
    pub direct_fpu: usize,
    /// Host offset and guest page offset of each instruction.
    pub map: Vec<(u32, u16)>,
}

/// Bits of the inline data word behind a call of the `memory` and `interpret` stubs.
pub mod meta {
    /// Page offset of the instruction: low 12 bits; its length: next 4.
    pub const LEN_SHIFT: u32 = 12;
    /// The block has the FPU loaded.
    pub const FPU: u32 = 1 << 16;
    /// The instruction always leaves the block.
    pub const LEAVES: u32 = 1 << 18;
    /// An access that crosses a page can use the bounce buffer.
    pub const BOUNCE: u32 = 1 << 19;
    /// The access is a write.
    pub const WRITE: u32 = 1 << 17;
    /// Size of the access in bytes.
    pub const SIZE_SHIFT: u32 = 24;
}

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flags {
    Host,
    Memory,
}

/// Code that is emitted behind the block, where it does not get in the way.
enum Cold {
    /// A TLB miss: of which probe and instruction, where to go on, whether EFLAGS must be loaded
    /// there.
    Miss {
        miss: PendingMiss,
        op: usize,
        resume: usize,
        reload: bool,
    },
    /// A direct jump that is not linked: the jump's displacement, page offset of the target,
    /// whether EFLAGS must be saved.
    Link {
        site: usize,
        target: u16,
        save: bool,
        fpu: bool,
    },
    /// The attention flag is up: jump to bind, page offset where execution stops.
    Poll {
        jump: usize,
        target: u16,
        save: bool,
        restore_rcx: bool,
    },
    /// An indirect branch whose target is not in the jump cache: jumps to bind, page offset of the
    /// branch, what it has added to RSP.
    Lost {
        jumps: [usize; 2],
        branch: u16,
        moved: i32,
    },
    /// A taken conditional jump backwards or out of the page: jump to bind.
    Taken { jump: usize, target: i64, live: u32 },
    /// Loads the FPU: jump to bind, where to go on.
    Interpret {
        jump: usize,
        meta: u32,
        resume: usize,
        reload: bool,
        save: bool,
    },
}

struct Tx<'a> {
    a: Asm,
    ctx: Context,
    stubs: &'a Stubs,
    block: &'a Decoded,
    cold: Vec<Cold>,
    flags: Flags,
    info: InstructionInfoFactory,
    bmi2: bool,
    map: Vec<(u32, u16)>,
    /// Jumps taken when an address lies beyond its segment's limit.
    beyond: Vec<usize>,
}

/// Translates `block` to code that will execute at `base`.
pub fn translate(block: &Decoded, ctx: Context, stubs: &Stubs, base: u64, bmi2: bool) -> Code {
    let mut x = Tx {
        a: Asm::new(base),
        ctx,
        stubs,
        block,
        cold: Vec::new(),
        flags: Flags::Host,
        info: InstructionInfoFactory::new(),
        bmi2,
        map: Vec::with_capacity(block.ops.len()),
        beyond: Vec::new(),
    };
    // Indirect entry: T is the linear address, the flags are in memory.
    x.a.alu_imm(Size::Q, 4, T, -4096);
    x.a.store(Size::Q, Mem::Gs(off::PC_BASE), T);
    if block.live_in != 0 {
        flags::restore(&mut x.a);
    }
    let direct = x.a.here();
    if block.fpu {
        x.check_fpu();
    }
    let direct_fpu = x.a.here();
    for op in &block.ops {
        x.map.push((x.a.here() as u32, op.off));
        x.op(op);
    }
    if !block.closed {
        let live = block.ops.last().map_or(ARITH, |o| o.live_after);
        if block.before_crossing {
            // Both pages must be looked up: that is the jump cache's business.
            x.save_flags(live);
            x.load_linear(T, i64::from(block.end));
            x.jump_t(None);
        } else {
            x.jump_direct(i64::from(block.end), live, false);
        }
    }
    // A dead block's entries are overwritten with exits of up to 10 bytes each.
    while x.a.here() < direct_fpu + 16 {
        x.a.bytes(&[0xcc]);
    }
    x.emit_cold();
    Code {
        bytes: x.a.buf,
        direct,
        direct_fpu,
        map: x.map,
    }
}

/// The host register of a guest register, or `None` if it lives in memory.
fn host(guest: u8) -> Option<u8> {
    match guest {
        4 => Some(GUEST_RSP),
        0..=12 => Some(guest),
        _ => None,
    }
}

fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

impl Tx<'_> {
    fn long(&self) -> bool {
        self.ctx.code_size() == CodeSize::Bits64
    }

    /// Operand size of PUSH and POP.
    fn stack_size(insn: &Instruction) -> (Size, i32) {
        match insn.stack_pointer_increment().abs() {
            2 => (Size::W, 2),
            4 => (Size::D, 4),
            _ => (Size::Q, 8),
        }
    }

    /// Operand size of an indirect jump.
    fn branch_size(&self) -> (Size, i32) {
        match self.ctx.code_size() {
            CodeSize::Bits64 => (Size::Q, 8),
            CodeSize::Bits32 => (Size::D, 4),
            CodeSize::Bits16 => (Size::W, 2),
        }
    }

    /// Loads the FPU if it is not loaded; keeps live flags.
    fn check_fpu(&mut self) {
        let a = &mut self.a;
        if self.block.live_in == 0 {
            a.cmp_mem_imm8(Size::D, Mem::Gs(off::FPU_LOADED), 0);
            a.bytes(&[0x75, 5]); // jne over the call
            a.call_to(self.stubs.load_fpu);
        } else {
            a.mov(T, reg::RCX);
            a.load(Size::D, reg::RCX, Mem::Gs(off::FPU_LOADED));
            let unloaded = a.jrcxz();
            a.mov(reg::RCX, T);
            a.bytes(&[0xeb, 8]); // jmp over
            a.bind8(unloaded);
            a.mov(reg::RCX, T);
            a.call_to(self.stubs.load_fpu);
        }
    }

    /// Puts live flags out of the way of code that clobbers EFLAGS.
    fn save_flags(&mut self, live: u32) {
        if self.flags == Flags::Host && live != 0 {
            flags::save(&mut self.a);
        }
        if live != 0 {
            self.flags = Flags::Memory;
        }
    }

    /// Brings live flags into EFLAGS.
    fn restore_flags(&mut self, live: u32, keep_scratch: bool) {
        if self.flags == Flags::Memory && live != 0 {
            if keep_scratch {
                flags::restore_keeping_scratch(&mut self.a);
            } else {
                flags::restore(&mut self.a);
            }
        }
        self.flags = Flags::Host;
    }

    fn meta(&self, op: &Op) -> u32 {
        u32::from(op.off)
            | (op.insn.len() as u32) << meta::LEN_SHIFT
            | if self.block.fpu { meta::FPU } else { 0 }
            | if op.insn.flow_control() != FlowControl::Next {
                meta::LEAVES
            } else {
                0
            }
    }

    fn op(&mut self, op: &Op) {
        match op.kind {
            Kind::Nop => {}
            Kind::Native => self.native(op),
            Kind::Lea => self.lea(op),
            Kind::Push => self.push(op),
            Kind::Pop => self.pop(op),
            Kind::Leave => self.leave(op),
            Kind::Jcc(cond, target) => self.jcc(op, cond, target),
            Kind::Jmp(target) => {
                self.jump_direct(target, op.live_target, target <= i64::from(op.off))
            }
            Kind::Call(target) => self.call_direct(op, target),
            Kind::JmpIndirect => self.jump_indirect(op),
            Kind::CallIndirect => self.call_indirect(op),
            Kind::Ret(release) => self.ret(op, release),
            Kind::Cli => self.a.store_imm(Size::B, Mem::Gs(off::RFLAGS + 1), 0),
            Kind::Sti => self.sti(op),
            Kind::SetAc(set) => self.set_ac(op, set),
            Kind::Swapgs => {
                self.a.load(Size::Q, T, Mem::Gs(seg_base(5)));
                self.a.load(Size::Q, I, Mem::Gs(off::KERNEL_GS_BASE));
                self.a.store(Size::Q, Mem::Gs(seg_base(5)), I);
                self.a.store(Size::Q, Mem::Gs(off::KERNEL_GS_BASE), T);
            }
            Kind::MovFromSeg(n) => {
                let from = Mem::Gs(seg_selector(n.into()));
                self.to_register(op.insn.op0_register(), |x, dst| {
                    x.a.load(Size::W, dst, from)
                });
            }
            Kind::ReadBase(n) => {
                let from = Mem::Gs(seg_base(n.into()));
                let size = if op.insn.op0_register().is_gpr32() {
                    Size::D
                } else {
                    Size::Q
                };
                self.to_register(op.insn.op0_register(), |x, dst| x.a.load(size, dst, from));
            }
            Kind::Strings(s) => self.strings(op, s),
            Kind::Pushf => self.pushf(op),
            Kind::Popf => self.popf(op),
            Kind::Rdtsc(aux) => self.rdtsc(op, aux),
            Kind::BitString => self.bit_string(op),
            Kind::Interpret => self.interpret(op),
        }
    }

    /// Calls the interpreter for one instruction.
    fn interpret(&mut self, op: &Op) {
        let live = op.live_before | op.live_after | op.reads;
        self.save_flags(live);
        self.a.call_to(self.stubs.interpret);
        let meta = self.meta(op);
        self.a.d32(meta);
        // The helper continues here if the block goes on.
        self.flags = Flags::Memory;
    }

    fn sti(&mut self, op: &Op) {
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
    fn set_ac(&mut self, op: &Op, set: bool) {
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
    fn to_register(&mut self, r: Register, load: impl FnOnce(&mut Self, u8)) {
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

    /// MOVS, STOS, LODS. A repeated one runs natively if all of it lies in one page at each side;
    /// otherwise the interpreter takes it page by page.
    fn strings(&mut self, op: &Op, s: Strings) {
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

    fn pushf(&mut self, op: &Op) {
        self.save_flags(ARITH);
        let retry = self.a.here();
        self.stack_address(-8, 8);
        let miss = self.probe(8, true, retry, op);
        self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
        flags::restore_keeping_scratch(&mut self.a);
        self.a.bytes(&[0x9c, 0x41, 0x5e]); // pushfq; pop r14
        self.a.alu_imm(Size::D, 4, T, crate::layout::ARITH as i32);
        self.a.op_mem(Size::Q, &[0x0b], T, Mem::Gs(off::RFLAGS)); // or
        self.a.store(Size::Q, at(I, 0), T);
        self.move_stack(-8);
        self.resume_miss([miss], op);
    }

    fn popf(&mut self, op: &Op) {
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

    fn rdtsc(&mut self, op: &Op, aux: bool) {
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

    /// A bit string in memory: the bit number reaches beyond the operand at the address.
    fn bit_string(&mut self, op: &Op) {
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
        self.emit(&enc);
        self.flags = Flags::Host;
        self.resume_miss([miss], op);
    }

    /// Linear address of the memory operand of `size` bytes into T. Clobbers I, and EFLAGS where a
    /// segment counts.
    fn address(&mut self, insn: &Instruction, size: usize) {
        self.address_parts(insn, T);
        let n = (insn.memory_segment() as usize).wrapping_sub(Register::ES as usize);
        if self.ctx.segmented() {
            self.in_segment(n, size);
        } else if n >= 4 {
            let width = if self.long() { Size::Q } else { Size::D };
            self.a.op_mem(width, &[0x03], T, Mem::Gs(seg_base(n)));
        }
    }

    /// Checks the offset in T of `size` bytes against a segment's limit and makes it linear. Beyond the
    /// limit the interpreter raises the exception.
    fn in_segment(&mut self, n: usize, size: usize) {
        self.a.mov32(I, T);
        if size > 1 {
            self.a.alu_imm(Size::D, 0, I, size as i32 - 1);
            let wraps = self.a.jcc(cc::B);
            self.beyond.push(wraps);
        }
        self.a.op_mem(Size::D, &[0x3b], I, Mem::Gs(seg_limit(n))); // cmp
        let beyond = self.a.jcc(cc::A);
        self.beyond.push(beyond);
        self.a.op_mem(Size::D, &[0x03], T, Mem::Gs(seg_base(n))); // add
    }

    /// Effective address of the memory operand into `dst` without touching flags. May use `dst` and
    /// I as intermediates. Returns whether it is a 64-bit address.
    fn address_parts(&mut self, insn: &Instruction, dst: u8) -> bool {
        let (b, x) = (insn.memory_base(), insn.memory_index());
        if b == Register::RIP {
            // iced gives the target relative to the page, as it decoded with IP = page offset.
            let disp = insn.memory_displacement64() as i64 as i32;
            self.a.load(Size::Q, dst, Mem::Gs(off::PC_BASE));
            self.a.lea(dst, at(dst, disp));
            return true;
        }
        let wide = if b != Register::None || x != Register::None {
            b.is_gpr64() || x.is_gpr64()
        } else {
            self.long() && insn.memory_displ_size() != 4 || self.long()
        };
        let disp64 = insn.memory_displacement64();
        if b == Register::None && x == Register::None {
            let v = match (self.long(), insn.memory_displ_size()) {
                (true, _) => disp64,
                (false, 2) => disp64 & 0xffff,
                (false, _) => disp64 & 0xffff_ffff,
            };
            self.a.mov_imm(dst, v);
            return wide;
        }
        let disp = disp64 as i64 as i32;
        let mut part = |r: Register, tmp: u8| -> Option<u8> {
            if r == Register::None {
                return None;
            }
            let n = number(r);
            Some(host(n).unwrap_or_else(|| {
                self.a.load(Size::Q, tmp, Mem::Gs(gpr_slot(n)));
                tmp
            }))
        };
        // `dst` may be a guest register that is also the index: only T and I are free as temporaries.
        let base = part(b, T);
        let index = part(x, I);
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        let mem = Mem::Sib(base, index.map(|i| (i, scale)), disp);
        if wide {
            self.a.lea(dst, mem);
        } else {
            self.a.lea32(dst, mem);
        }
        if b.is_gpr16() || x.is_gpr16() {
            self.a.op_reg(Size::D, &[0x0f, 0xb7], dst, dst); // movzx
        }
        wide
    }

    /// Checks that the `size` bytes at linear address T lie in one page that may be accessed; leaves
    /// the offset in T and the host page in I. The miss is completed by [`Tx::resume_miss`].
    fn probe(&mut self, size: usize, write: bool, retry: usize, op: &Op) -> PendingMiss {
        let base_meta = self.meta(op);
        let a = &mut self.a;
        let tlb = tlb_base(self.ctx.tlb());
        let tag = tlb + if write { 8 } else { 0 };
        if self.bmi2 {
            a.rorx(I, T, 7);
        } else {
            a.mov(I, T);
            a.shr(I, 7);
        }
        a.alu_imm(Size::D, 4, I, ((TLB_ENTRIES - 1) << 5) as i32);
        a.op_mem(Size::Q, &[0x2b], T, Mem::GsBase(I, tag)); // sub
        a.alu_imm(Size::Q, 7, T, 4096 - size as i32);
        let jump = a.jcc(cc::A);
        a.load(Size::Q, I, Mem::GsBase(I, tlb + 16));
        let meta =
            base_meta | if write { meta::WRITE } else { 0 } | (size as u32) << meta::SIZE_SHIFT;
        let access = self.a.here();
        let bounce = if write || size == 1 {
            Bounce::Never
        } else {
            Bounce::Read
        };
        PendingMiss {
            jump,
            tag,
            meta,
            retry,
            access,
            size,
            bounce,
            flags: self.flags,
        }
    }

    /// Completes probes of an instruction whose code ends here.
    fn resume_miss(&mut self, misses: impl IntoIterator<Item = PendingMiss>, op: &Op) {
        let resume = self.a.here();
        let reload = self.flags == Flags::Host && op.live_after != 0;
        let meta = self.meta(op);
        for jump in std::mem::take(&mut self.beyond) {
            self.cold.push(Cold::Interpret {
                jump,
                meta,
                resume,
                reload,
                save: false,
            });
        }
        for m in misses {
            let block = self.block;
            let index = block.ops.iter().position(|o| o.off == op.off).unwrap_or(0);
            self.cold.push(Cold::Miss {
                miss: m,
                op: index,
                resume,
                reload,
            });
        }
    }

    /// Takes the operands of a copied instruction apart. `None` if it must be interpreted.
    fn operands(&mut self, op: &Op) -> Option<Operands> {
        let insn = &op.insn;
        let mut o = Operands {
            enc: op.enc?,
            slots: Vec::new(),
            memory: false,
            write: false,
            needs: if op.modifies != 0 && op.live_after & !op.kills != 0 {
                op.live_before
            } else {
                op.reads
            },
        };
        for i in 0..insn.op_count() {
            let access = self.info.info(insn).op_access(i);
            let writes = !matches!(
                access,
                OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
            );
            if insn.op_kind(i) == OpKind::Memory {
                o.memory = true;
                o.write |= writes;
                continue;
            }
            let Some(field) = gpr_field(insn, i) else {
                continue;
            };
            let r = insn.op_register(i);
            if matches!(r, Register::AH | Register::CH | Register::DH | Register::BH) {
                continue;
            }
            let guest = number(r);
            match host(guest) {
                Some(h) if h == guest => {}
                Some(h) => o.enc.set_register(field, h),
                None => {
                    let reads = access != OpAccess::Write || matches!(r.size(), 1 | 2);
                    if let Some(s) = o.slots.iter_mut().find(|s| s.guest == guest) {
                        s.read |= reads;
                        s.write |= writes;
                        s.fields.push(field);
                    } else {
                        let fields = vec![field];
                        o.slots.push(Slot {
                            guest,
                            read: reads,
                            write: writes,
                            fields,
                        });
                    }
                }
            }
        }
        if o.write && !self.long() && insn.memory_segment() == Register::CS {
            return None;
        }
        let mut tried = o.enc;
        if o.memory {
            tried.set_memory(HostMem::BaseIndex(I, T));
        }
        let room = if o.memory { 1 } else { 2 };
        let fits = o.slots.len() <= room && !enc_fails(&tried, o.memory || !o.slots.is_empty());
        fits.then_some(o)
    }

    fn native(&mut self, op: &Op) {
        let Some(o) = self.operands(op) else {
            return self.interpret(op);
        };
        if o.memory {
            self.save_flags(op.live_before);
            let retry = self.a.here();
            let size = access_size(&op.insn);
            self.address(&op.insn, size);
            let mut miss = self.probe(size, o.write, retry, op);
            if o.write && !whole_bounce(&op.insn) {
                miss.bounce = Bounce::Never;
            } else if o.write {
                miss.bounce = Bounce::Write;
            }
            self.with_memory(op, &o);
            self.resume_miss([miss], op);
            return;
        }
        if o.needs != 0 {
            self.restore_flags(op.live_before, false);
        }
        let mut enc = o.enc;
        if let Some(direct) = in_place(&op.insn, &enc, &o.slots) {
            self.emit(&direct);
        } else {
            for (s, tmp) in o.slots.iter().zip([T, I]) {
                if s.read {
                    self.a.load(Size::Q, tmp, Mem::Gs(gpr_slot(s.guest)));
                }
                for &f in &s.fields {
                    enc.set_register(f, tmp);
                }
            }
            self.emit(&enc);
            for (s, tmp) in o.slots.iter().zip([T, I]) {
                if s.write {
                    self.a.store(Size::Q, Mem::Gs(gpr_slot(s.guest)), tmp);
                }
            }
        }
        if op.modifies != 0 {
            self.flags = Flags::Host;
        }
    }

    /// Emits the instruction with its memory operand at I + T.
    fn with_memory(&mut self, op: &Op, o: &Operands) {
        let mut enc = o.enc;
        if o.needs != 0 {
            self.restore_flags(op.live_before, true);
        }
        if let Some(s) = o.slots.first() {
            self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
            if s.read {
                self.a.load(Size::Q, T, Mem::Gs(gpr_slot(s.guest)));
            }
            for &f in &s.fields {
                enc.set_register(f, T);
            }
            enc.set_memory(HostMem::BaseDisp(I, 0));
            self.emit(&enc);
            if s.write {
                self.a.store(Size::Q, Mem::Gs(gpr_slot(s.guest)), T);
            }
        } else {
            enc.set_memory(HostMem::BaseIndex(I, T));
            self.emit(&enc);
        }
        if op.modifies != 0 {
            self.flags = Flags::Host;
        }
    }

    fn emit(&mut self, enc: &Encoding) {
        let mut out = [0; MAX_LEN];
        // `enc_fails` has tried it.
        let n = enc.emit(&mut out).unwrap_or(0);
        debug_assert!(n != 0);
        self.a.bytes(&out[..n]);
    }

    fn lea(&mut self, op: &Op) {
        let insn = &op.insn;
        let r = insn.op0_register();
        let guest = number(r);
        let dst = host(guest);
        if r.is_gpr16() {
            self.address_parts(insn, T);
            match dst {
                Some(d) => self.a.op_reg(Size::W, &[0x89], T, d),
                None => self.a.store(Size::W, Mem::Gs(gpr_slot(guest)), T),
            }
            return;
        }
        let d = dst.unwrap_or(T);
        let wide = self.address_parts(insn, d);
        if wide && r.is_gpr32() {
            self.a.mov32(d, d);
        }
        if dst.is_none() {
            self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), T);
        }
    }

    /// Linear address of `size` bytes at the stack pointer plus `disp` into T.
    fn stack_address(&mut self, disp: i32, size: i32) {
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
    fn move_stack(&mut self, disp: i32) {
        if self.long() {
            self.a.lea(GUEST_RSP, at(GUEST_RSP, disp));
        } else if self.ctx.wide_stack() {
            self.a.lea32(GUEST_RSP, at(GUEST_RSP, disp));
        } else {
            self.a.lea32(I, at(GUEST_RSP, disp));
            self.a.op_reg(Size::W, &[0x89], I, GUEST_RSP);
        }
    }

    fn push(&mut self, op: &Op) {
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

    fn pop(&mut self, op: &Op) {
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

    fn leave(&mut self, op: &Op) {
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

    fn jcc(&mut self, op: &Op, cond: ConditionCode, target: i64) {
        self.restore_flags(op.live_before | op.reads, false);
        let code = cond as u8 - ConditionCode::o as u8;
        self.a.align_link(2);
        let jump = self.a.jcc(code);
        let inside = (0..4096).contains(&target);
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

    /// Jumps to a page offset; outside the page, through the jump cache.
    fn jump_direct(&mut self, target: i64, live: u32, backwards: bool) {
        if !(0..4096).contains(&target) {
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
    fn poll(&mut self, target: u16, live: u32) {
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
    fn load_linear(&mut self, dst: u8, offset: i64) {
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
    fn jump_t(&mut self, from: Option<(u16, i32)>) {
        let stub = self.stubs.jump;
        if self.ctx.segmented() {
            // The target must be checked against the segment, which the jump cache knows nothing of.
            self.a.jmp_to(stub);
            return;
        }
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
    fn push_return(&mut self, op: &Op, misses: &mut Vec<PendingMiss>) {
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

    fn call_direct(&mut self, op: &Op, target: i64) {
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.push_return(op, &mut misses);
        self.jump_direct(target, op.live_target, target <= i64::from(op.off));
        // The interpreter leaves the block by itself.
        self.resume_miss(misses, op);
    }

    /// The branch target of an indirect jump or call into T.
    fn load_target(&mut self, op: &Op, misses: &mut Vec<PendingMiss>) {
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

    fn jump_indirect(&mut self, op: &Op) {
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.load_target(op, &mut misses);
        self.jump_t(Some((op.off, 0)));
        self.resume_miss(misses, op);
    }

    fn call_indirect(&mut self, op: &Op) {
        self.save_flags(op.live_before);
        let mut misses = Vec::new();
        self.load_target(op, &mut misses);
        self.a.store(Size::Q, Mem::Gs(off::SPILL), T);
        self.push_return(op, &mut misses);
        self.a.load(Size::Q, T, Mem::Gs(off::SPILL));
        self.jump_t(Some((op.off, -self.branch_size().1)));
        self.resume_miss(misses, op);
    }

    fn ret(&mut self, op: &Op, release: u16) {
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

    fn emit_cold(&mut self) {
        // Cold code may add more cold code (a taken branch needs a poll and a link).
        while !self.cold.is_empty() {
            for c in std::mem::take(&mut self.cold) {
                self.emit_one(c);
            }
        }
    }

    /// Behind the block: an access that crosses a page takes the bounce buffer if both pages are in the
    /// TLB; everything else goes to the helper.
    fn emit_miss(&mut self, m: PendingMiss, op: usize, resume: usize, reload: bool) {
        self.a.bind(m.jump);
        self.a.op_mem(Size::Q, &[0x03], T, Mem::GsBase(I, m.tag)); // add: T is the address again
        let mut meta = m.meta;
        if m.bounce != Bounce::Never {
            self.a.lea(I, at(T, m.size as i32 - 1));
            self.a.op_reg(Size::Q, &[0x31], T, I); // xor
            self.a.shr(I, 12);
            let inside = self.a.jcc(cc::E);
            let class = m.size.next_power_of_two().max(8).trailing_zeros() as usize - 3;
            let write = usize::from(m.bounce == Bounce::Write);
            self.a
                .call_to(self.stubs.cross[self.ctx.tlb()][write][class]);
            if m.bounce == Bounce::Read {
                let pos = self.a.jcc(cc::AE);
                self.a.bind_to(pos, m.access);
            } else {
                let fails = self.a.jcc(cc::B);
                let block = self.block;
                if let Some(op) = block.ops.get(op)
                    && let Some(o) = self.operands(op)
                {
                    self.map.push((self.a.here() as u32, op.off));
                    self.flags = m.flags;
                    self.with_memory(op, &o);
                    self.a.mov_imm(I, m.size as u64);
                    self.a.call_to(self.stubs.commit);
                    let pos = self.a.jmp();
                    self.a.bind_to(pos, resume);
                }
                self.a.bind(fails);
            }
            self.a.bind(inside);
            meta |= meta::BOUNCE;
        }
        self.a.call_to(self.stubs.memory);
        self.a.d32(meta);
        let here = self.a.here();
        self.a.d32((m.retry as i64 - here as i64) as i32 as u32);
        if reload {
            flags::restore(&mut self.a);
        }
        let pos = self.a.jmp();
        self.a.bind_to(pos, resume);
    }

    fn emit_one(&mut self, c: Cold) {
        match c {
            Cold::Miss {
                miss,
                op,
                resume,
                reload,
            } => self.emit_miss(miss, op, resume, reload),
            Cold::Interpret {
                jump,
                meta,
                resume,
                reload,
                save,
            } => {
                self.a.bind(jump);
                if save {
                    flags::save(&mut self.a);
                }
                self.a.call_to(self.stubs.interpret);
                self.a.d32(meta);
                if reload {
                    flags::restore(&mut self.a);
                }
                let pos = self.a.jmp();
                self.a.bind_to(pos, resume);
            }
            Cold::Link {
                site,
                target,
                save,
                fpu,
            } => {
                self.a.bind(site);
                if save {
                    flags::save(&mut self.a);
                }
                self.a.call_to(self.stubs.link);
                self.a
                    .d32(u32::from(target) | if fpu { meta::FPU } else { 0 });
                let here = self.a.here();
                self.a.d32((site as i64 - here as i64) as i32 as u32);
            }
            Cold::Poll {
                jump,
                target,
                save,
                restore_rcx,
            } => {
                self.a.bind(jump);
                if restore_rcx {
                    self.a.mov(reg::RCX, T);
                }
                if save {
                    flags::save(&mut self.a);
                }
                self.a.call_to(self.stubs.poll);
                self.a.d32(u32::from(target));
            }
            Cold::Lost {
                jumps,
                branch,
                moved,
            } => {
                for j in jumps {
                    self.a.bind(j);
                }
                let branch = i32::from(branch) | 1 << 16;
                self.a.store_imm(Size::D, Mem::Gs(off::BRANCH), branch);
                self.a.store_imm(Size::D, Mem::Gs(off::BRANCH_MOVED), moved);
                self.a.jmp_to(self.stubs.jump);
            }
            Cold::Taken { jump, target, live } => {
                self.a.bind(jump);
                self.flags = Flags::Host;
                self.jump_direct(target, live, true);
            }
        }
    }
}

/// What becomes of an access that crosses a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bounce {
    /// The interpreter has it.
    Never,
    /// It reads from the bounce buffer.
    Read,
    /// A copy of the instruction works on the bounce buffer, which is written back.
    Write,
}

/// A probe whose miss is not emitted yet.
#[derive(Clone, Copy)]
struct PendingMiss {
    jump: usize,
    tag: i32,
    meta: u32,
    retry: usize,
    /// Where the code behind the probe starts.
    access: usize,
    size: usize,
    bounce: Bounce,
    /// Where the flags are behind the probe.
    flags: Flags,
}

/// A copied instruction's operands.
struct Operands {
    /// The encoding with registers renamed.
    enc: Encoding,
    /// Registers that live in memory.
    slots: Vec<Slot>,
    memory: bool,
    write: bool,
    /// Flags that must be in EFLAGS before it.
    needs: u32,
}

/// A write through the bounce buffer is right: it is no LOCKed one, and writes all its bytes.
fn whole_bounce(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    !insn.has_lock_prefix()
        && !insn.has_op_mask()
        && !matches!(
            insn.mnemonic(),
            M::Xchg | M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq
        )
}

/// A guest register that lives in memory, as an operand.
struct Slot {
    guest: u8,
    read: bool,
    write: bool,
    fields: Vec<Field>,
}

/// The instruction cannot be re-encoded: AH-DH beside an extended register.
fn enc_fails(enc: &Encoding, extended: bool) -> bool {
    if enc.names_high_byte() && extended {
        return true;
    }
    enc.emit(&mut [0; MAX_LEN]).is_none()
}

/// The instruction with its one register that lives in memory used there as a memory operand, where
/// the encoding allows it.
fn in_place(insn: &Instruction, enc: &Encoding, slots: &[Slot]) -> Option<Encoding> {
    use x86emu::encoding::Form;
    let [s] = slots else { return None };
    if s.fields.as_slice() != [Field::Rm] || enc.rm_in_opcode() || enc.form() != Form::Legacy {
        return None;
    }
    use iced_x86::Mnemonic as M;
    let other = match insn.mnemonic() {
        // With a memory operand, the bit may lie beyond it.
        M::Bt | M::Bts | M::Btr | M::Btc => insn.op1_kind() == OpKind::Register,
        // They store less than they put into a register.
        M::Pextrb | M::Pextrw | M::Extractps => true,
        _ => false,
    };
    if other {
        return None;
    }
    let i = (0..insn.op_count()).find(|&i| gpr_field(insn, i) == Some(Field::Rm))?;
    use iced_x86::OpCodeOperandKind as K;
    let size = match insn.op_code().try_op_kind(i).ok()? {
        K::r64_or_mem => 8,
        K::r32_or_mem => 4,
        K::r8_or_mem => 1,
        _ => return None,
    };
    // A 32-bit result clears the upper half of a register, but not of memory.
    if s.write && size == 4 {
        return None;
    }
    let mut e = *enc;
    e.set_memory(HostMem::Gs(gpr_slot(s.guest)));
    Some(e)
}
