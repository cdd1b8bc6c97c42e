//! From decoded guest instructions to host code.
//!
//! Register map while translated code runs: the guest's registers live in the host registers of the same
//! name, but for its RSP in R8; its R8, R10 and R11 live in memory. R10 (T) and R11 (I) are scratch. `gs` points at
//! [`crate::layout::VcpuMem`]; the host's RSP stays a host stack.
//!
//! Flags: EFLAGS holds the guest's arithmetic flags, or `VcpuMem::flags` does; which of the two is
//! tracked here per point in the code ([`Flags`]). A TLB probe clobbers EFLAGS, so live flags are saved
//! once before the first probe and restored before the next instruction that needs them.
//!
//! Nothing of the guest's state changes before the last point where an instruction can fault, so
//! that the interpreter can execute it again from the start.

mod branch;
mod cold;
mod far;
mod group;
mod memory;
mod stack;
mod strings;
mod system;
mod window;

use crate::asm::{Asm, Mem, Size, at, cc, reg};
use crate::block::Imm;
use crate::context::Context;
use crate::flags;
use crate::frontend::{ARITH, Decoded, Kind, Op, Strings, access_size, immediate};
use crate::layout::{
    TLB_ENTRIES, branch_word, gpr_slot, jumps_base, off, seg_base, seg_limit, seg_selector,
    tlb_base,
};
use crate::stubs::{GUEST_RSP, I, Stubs, T, host};
use iced_x86::{
    ConditionCode, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    OpAccess, OpKind, Register,
};
use x86emu::encoding::{Encoding, Field, HostMem, MAX_LEN, gpr_field};
use x86emu::state::CodeSize;

use cold::{Bounce, Cold, PendingMiss};

/// Finished code and what the cache must know of it.
#[derive(Debug)]
pub struct Code {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Offset of the entry for linked jumps.
    pub direct: usize,
    /// Offset of the entry for linked jumps with the FPU loaded.
    pub direct_fpu: usize,
    /// Host offset of each instruction, and its page offset with [`HOST_FLAGS`].
    pub map: Vec<(u32, u16)>,
    /// Immediates that were copied as they are.
    pub imms: Vec<Imm>,
    /// Jumps through slots, from [`Ask::far`] on: slot, and offset of the exit.
    pub fars: Vec<(u32, usize)>,
}

/// What the translator asks about code with windows.
pub struct Ask<'a> {
    /// How the accesses of an instruction go.
    pub site: &'a dyn Fn(&Op) -> Site,
    /// The first slot that is free; see [`crate::far`].
    pub far: u32,
    /// The number of the page of code.
    pub page: u16,
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
    /// Behind the access, the guest's flags are in EFLAGS.
    pub const HOST_FLAGS: u32 = 1 << 20;
    /// A write without a copy: where it crosses a page or writes to one that holds code, its block is made again.
    pub const AGAIN: u32 = 1 << 21;
    /// It is a group of accesses, which has a block of its own for whatever its probe does not let through.
    pub const GROUP: u32 = 1 << 22;
    /// Size of the access in bytes.
    pub const SIZE_SHIFT: u32 = 24;
}

/// Inline data behind a call of the `link` stubs: a word of these, and a half-word.
pub mod link {
    /// Page offset of the target: low 12 bits. The block has the FPU loaded.
    pub const FPU: u32 = 1 << 12;
    /// It is made by a return that has landed, to the indirect entry.
    pub const LANDS: u32 = 1 << 13;
    /// Of how many instructions a block of their own is wanted, 7 bits; 0: an ordinary block.
    pub const APART_SHIFT: u32 = 14;
    /// How far before the return address the jump's displacement lies, divided by 65,536; the rest is in the
    /// half-word.
    pub const DISTANCE_SHIFT: u32 = 21;
}

/// Page offset in a word of [`Code::map`], up to 4096.
pub const OFFSET: u16 = 0x1fff;
/// Bit of such a word: the guest's live flags are in EFLAGS, unless the instruction cannot fault on the host.
pub const HOST_FLAGS: u16 = 0x8000;

/// Bit of such a word: RSI holds the operand's address, and its own value is in the last spill slot.
pub const BORROWED: u16 = 0x4000;

/// How the accesses of an instruction go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Site {
    /// Through a TLB.
    Probe,
    /// Through this window.
    Window(usize),
}

/// Carry alone, as sums of several words pass it on.
const CARRY: u32 = iced_x86::RflagsBits::CF;

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flags {
    Host,
    Memory,
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
    imms: Vec<Imm>,
    /// Jumps taken when an address lies beyond its segment's limit.
    beyond: Vec<usize>,
    /// The group of accesses that is being emitted.
    group: Option<group::Group>,
    /// Instructions whose immediates are built into others.
    fixed: Vec<u16>,
    ask: &'a Ask<'a>,
    fars: Vec<(u32, usize)>,
    fars_used: u32,
    /// What the scratch registers hold for windows.
    scratch: window::Scratch,
    /// Guest registers that live in memory whose values T and I hold too, and held before this instruction.
    held: [Option<u8>; 2],
    held_before: [Option<u8>; 2],
}

/// Translates `block` to code that will execute at `base`.
pub fn translate<'a>(
    block: &'a Decoded,
    ctx: Context,
    stubs: &'a Stubs,
    base: u64,
    bmi2: bool,
    ask: &'a Ask<'a>,
) -> Code {
    let mut x = Tx {
        a: Asm::new(base),
        ctx,
        stubs,
        block,
        cold: Vec::with_capacity(16),
        flags: Flags::Host,
        info: InstructionInfoFactory::new(),
        bmi2,
        map: Vec::with_capacity(2 * block.ops.len()),
        imms: Vec::new(),
        beyond: Vec::new(),
        group: None,
        fixed: Vec::new(),
        ask,
        fars: Vec::new(),
        fars_used: 0,
        scratch: window::Scratch::default(),
        held: [None; 2],
        held_before: [None; 2],
    };
    // Indirect entry: T is the linear address, the flags are in memory. With windows see `enter_far`.
    if ctx.windows() {
        let off = block.ops.first().map_or(0, |o| o.off);
        x.enter_far(off);
    } else {
        x.a.alu_imm(Size::Q, 4, T, -4096);
        x.a.store(Size::Q, Mem::Gs(off::PC_BASE), T);
    }
    if block.live_in != 0 && !ctx.windows() {
        flags::restore(&mut x.a);
    }
    let direct = if ctx.windows() { x.a.here() } else { x.entry() };
    let direct_fpu = if block.fpu {
        x.check_fpu();
        if ctx.windows() { x.a.here() } else { x.entry() }
    } else {
        direct
    };
    x.start_scratch();
    let mut next = 0;
    while let Some(op) = block.ops.get(next) {
        if let Some(plan) = x.plan(next) {
            next = x.emit_group(next, &plan);
            continue;
        }
        if let Some(end) = x.stack_run(next) {
            x.emit_stack_run(next..end);
            next = end;
            continue;
        }
        x.mark(op);
        x.scratch.kept = false;
        x.op(op);
        x.after_window(op);
        next += 1;
    }
    if !block.closed {
        let live = block.ops.last().map_or(ARITH, |o| o.live_after);
        x.settle_stack(block.end);
        if block.before_crossing && ctx.windows() {
            x.jump_far(i64::from(block.end), live, false);
        } else if block.before_crossing {
            // Both pages must be looked up: that is the jump cache's business.
            x.save_flags(live);
            x.load_linear(T, i64::from(block.end));
            x.jump_t(0);
        } else {
            x.jump_direct(i64::from(block.end), live, false);
        }
    }
    x.emit_cold();
    Code {
        bytes: x.a.buf,
        direct,
        direct_fpu,
        map: x.map,
        imms: x.imms,
        fars: x.fars,
    }
}

fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

impl Tx<'_> {
    fn long(&self) -> bool {
        self.ctx.code_size() == CodeSize::Bits64
    }

    /// An entry for linked jumps: one instruction that can be overwritten with a call in one store, also
    /// while other vCPUs execute here. Behind the call there will be the block's page offset.
    fn entry(&mut self) -> usize {
        const NOPS: [&[u8]; 8] = [
            &[],
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x40, 0],
            &[0x0f, 0x1f, 0x44, 0, 0],
            &[0x66, 0x0f, 0x1f, 0x44, 0, 0],
            &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
        ];
        self.a.bytes(NOPS[self.a.pc().wrapping_neg() as usize % 8]);
        let at = self.a.here();
        let offset = self.block.ops.first().map_or(0, |o| o.off).to_le_bytes();
        self.a
            .bytes(&[0x0f, 0x1f, 0x84, 0, 0, offset[0], offset[1], 0]);
        at
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
        if self.flags == Flags::Host && live == CARRY {
            flags::save_carry(&mut self.a);
        } else if self.flags == Flags::Host && live != 0 {
            flags::save(&mut self.a);
            self.scratch.forget();
            self.held = [None; 2];
        }
        if live != 0 {
            self.flags = Flags::Memory;
        }
    }

    /// Brings live flags into EFLAGS.
    fn restore_flags(&mut self, live: u32, keep_scratch: bool) {
        if self.flags == Flags::Memory && live != 0 {
            if live == CARRY {
                flags::restore_carry(&mut self.a);
            } else if keep_scratch {
                flags::restore_keeping_scratch(&mut self.a);
            } else {
                flags::restore(&mut self.a);
                self.scratch.forget();
                self.held = [None; 2];
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
        self.held_before = std::mem::take(&mut self.held);
        match op.kind {
            Kind::Nop => self.scratch.kept = true,
            Kind::Native => self.native(op),
            Kind::Lea => self.lea(op),
            Kind::Push => self.push(op),
            Kind::Pop => self.pop(op),
            Kind::Leave => self.leave(op),
            Kind::Jcc(cond, target) => self.jcc(op, cond, target),
            Kind::Jmp(target) => {
                self.settle_stack(op.off);
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
                self.zero_extended(op.insn.op0_register(), |x, dst| {
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
                self.zero_extended(op.insn.op0_register(), |x, dst| x.a.load(size, dst, from));
            }
            Kind::Strings(s) => self.strings(op, s),
            Kind::Pushf => self.pushf(op),
            Kind::Popf => self.popf(op),
            Kind::Rdtsc(aux) => self.rdtsc(op, aux),
            Kind::BitString => self.bit_string(op),
            Kind::Interpret => self.interpret(op),
        }
    }
}
