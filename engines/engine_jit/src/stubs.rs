//! The hand-written code at the start of the arena: entry into translated code, and the ways out of
//! it into Rust.

use crate::asm::{Asm, Mem, Size, at, cc, reg};
use crate::code_writes::{CODE_WRITES, CodeWrite};
use crate::context::Context;
use crate::flags;
use crate::layout::{
    BOUNCE_HALF, JUMP_ENTRIES, JUMP2_ENTRIES, JUMP2_HASH, JUMP2_SHIFT, TLB_ENTRIES, TLB_KERNEL,
    TLB_KERNEL_AC, TLB_USER, gpr_slot, jumps_base, jumps2_base, off, tlb_base,
};
use crate::translate::meta;
use std::mem::offset_of;

/// The host register that holds the guest's RSP while translated code runs. The guest's R8, R10 and R11 live in
/// memory, as compilers use them least; all others are where the guest has them.
pub const GUEST_RSP: u8 = reg::R8;
/// First scratch register: addresses, then page offsets.
pub const T: u8 = reg::R10;
/// Second scratch register: TLB index, then the host page.
pub const I: u8 = reg::R11;

/// The host register of a guest register, or `None` if it lives in memory.
pub fn host(guest: u8) -> Option<u8> {
    match guest {
        reg::RSP => Some(GUEST_RSP),
        GUEST_RSP | T | I => None,
        _ => Some(guest),
    }
}

/// Registers that are where the guest has them.
fn same() -> impl Iterator<Item = u8> {
    (0..16).filter(|&r| host(r) == Some(r))
}

/// Functions that stubs call: `(vcpu memory, address of inline data) -> where to continue, or 0`.
pub type Helper = extern "sysv64" fn(*mut crate::layout::VcpuMem, *const u8) -> u64;

/// The helpers, in the order of the stubs.
#[derive(Clone, Copy)]
pub struct Helpers {
    /// A direct jump within a page to code that has not been linked yet.
    pub link: Helper,
    /// A jump to the linear address in T that the jump cache does not know.
    pub jump: Helper,
    /// A memory access that the TLB does not know.
    pub memory: Helper,
    /// An instruction that the interpreter executes.
    pub interpret: Helper,
    /// The attention flag was up at a poll.
    pub poll: Helper,
    /// A block that was invalidated.
    pub dead: Helper,
    /// A host fault in translated code.
    pub fault: Helper,
    /// A write touched what translations were made from.
    pub wrote: Helper,
}

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// `extern "sysv64" fn(continue at)`: runs translated code until a helper returns 0.
    pub enter: u64,
    /// See [`Helpers`]; the ones reached by `call` have inline data behind the call.
    pub link: u64,
    /// The same with live flags in EFLAGS.
    pub link_flags: u64,
    /// The same for a return that has landed; T is the linear address.
    pub land: u64,
    /// Reached by `jmp`.
    pub jump: u64,
    /// The same with `VcpuMem::branch` set.
    pub jump_from: u64,
    /// Reached by `jmp`, by TLB, with `VcpuMem::branch` set: looks the linear address in T up in the
    /// second-level jump cache; else goes on to `jump_from`.
    pub level2: [u64; 3],
    /// The same for a direct branch, which sets `VcpuMem::branch` to 0.
    pub level2_direct: [u64; 3],
    /// The same with the branch word in I.
    pub level2_branch: [u64; 3],
    /// `jmp`, by TLB: a return that has landed elsewhere than at its call's landing place. T holds its
    /// target, I its branch word, flags are in memory. Looks whether an outer call is the one that it returns
    /// from.
    pub astray: [u64; 3],
    /// The same without a look at outer calls.
    pub lookup: [u64; 3],
    /// Where a return on an empty stack goes.
    pub empty: u64,
    /// Where it goes on without windows.
    pub empty_plain: u64,
    /// The ways of code with windows.
    pub far: FarStubs,
    /// Reached by `call`, of the stubs in [`crate::miss`].
    pub memory: u64,
    /// By TLB, reached by `call`; see [`crate::miss`].
    pub miss: [Misses; 3],
    /// Reached by `call`.
    pub interpret: u64,
    /// Reached by `call`.
    pub poll: u64,
    /// The same with live flags in EFLAGS.
    pub poll_flags: u64,
    /// The same with RCX in T.
    pub poll_flags_rcx: u64,
    /// Reached by `call`, with the block's page offset behind it.
    pub dead: u64,
    /// The same with live flags in EFLAGS.
    pub dead_flags: u64,
    /// Reached from the signal handler.
    pub fault: u64,
    /// Executes the instruction that faulted again, with all registers as they were.
    pub mended: u64,
    /// `call`, by TLB, access and size class: brings an operand that crosses a page into the bounce
    /// buffer. T holds its linear address. With carry clear, I + T is its host address; with carry
    /// set nothing has changed. Clobbers flags. With the zero flag set, a write crosses no page but may be
    /// to one that holds code; with carry and the zero flag set afterwards, the TLB has been filled.
    pub cross: [[[u64; 4]; 2]; 3],
    /// `call`, by TLB and access: fills the TLB; see [`crate::refill::emit`].
    pub refill: [[u64; 2]; 3],
    /// `call`: completes a write that `cross` has begun; I holds its inline data. Clobbers T and I, no
    /// flags.
    pub commit: u64,
    /// Goes on behind a `commit` that called the helper, with flags from memory.
    pub wrote_back: u64,
    /// `call`: loads the guest's FPU state. Clobbers nothing but T and I.
    pub load_fpu: u64,
}

/// Stubs of [`crate::far`]: for code with windows, whose flags are in EFLAGS.
#[derive(Clone, Copy, Debug, Default)]
pub struct FarStubs {
    /// Goes to the indirect entry in `VcpuMem::ret_addr` with flags from memory.
    pub enter: u64,
    /// `jmp`: [`Stubs::jump`].
    pub leave: u64,
    /// `call`: [`Stubs::land`].
    pub land: u64,
    /// `jmp`: an indirect branch whose target is not in the jump cache; its branch word is in I.
    pub lost: u64,
    /// `jmp`: fills the slot whose offset is in I, and goes to T.
    pub unfilled: u64,
    /// `jmp`: [`Stubs::astray`].
    pub astray: u64,
    /// A return on an empty stack.
    pub empty: u64,
}

/// Stubs of [`crate::miss`] for one TLB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Misses {
    /// By access: what only fills the TLB.
    pub fill: [u64; 2],
    /// By access: of a group.
    pub group: [u64; 2],
    /// By size class: a read that may cross a page.
    pub read: [u64; 4],
    /// By size class: a write with a copy of its instruction behind the call.
    pub write: [u64; 4],
}

/// Emits all stubs. `avx`: the host has AVX enabled.
pub fn emit(a: &mut Asm, helpers: &Helpers, avx: bool) -> Stubs {
    let mut s = Stubs::default();
    let callee_saved = [reg::RBX, reg::RBP, 12, 13, 14, 15];

    // enter(cont)
    s.enter = a.pc();
    for r in callee_saved {
        push(a, r);
    }
    a.alu_imm(Size::Q, 5, reg::RSP, 8);
    a.store(Size::Q, Mem::Gs(off::HOST_RSP), reg::RSP);
    a.store(Size::Q, Mem::Gs(off::CONT), reg::RDI);

    let resume = a.here();
    for r in same() {
        a.load(Size::Q, r, Mem::Gs(gpr_slot(r)));
    }
    a.load(Size::Q, GUEST_RSP, Mem::Gs(gpr_slot(reg::RSP)));
    a.load(Size::Q, T, Mem::Gs(off::T));
    a.load(Size::Q, reg::RSP, Mem::Gs(off::SHADOW_RSP));
    a.jmp_mem(Mem::Gs(off::CONT));

    // The FPU out of line: save, and load again.
    let save_fpu = a.here();
    a.load(Size::D, reg::RAX, Mem::Gs(off::XSAVE_MASK));
    a.mov_imm(reg::RDX, 0);
    a.op_mem(Size::Q, &[0x0f, 0xae], 4, Mem::Gs(off::XSAVE)); // xsave64
    if avx {
        a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    a.bytes(&[0xdb, 0xe3]); // fninit
    a.op_mem(Size::D, &[0x0f, 0xae], 2, Mem::Gs(off::HOST_MXCSR)); // ldmxcsr
    a.store_imm(Size::D, Mem::Gs(off::FPU_LOADED), 0);
    a.store_imm(Size::D, Mem::Gs(off::FPU_RELOAD), 1);
    a.bytes(&[0xc3]);

    s.load_fpu = a.pc();
    let load_fpu = a.here();
    a.mov(T, reg::RAX);
    a.mov(I, reg::RDX);
    a.load(Size::D, reg::RAX, Mem::Gs(off::XSAVE_MASK));
    // mov, not xor: flags are the guest's
    a.mov_imm(reg::RDX, 0);
    a.op_mem(Size::Q, &[0x0f, 0xae], 5, Mem::Gs(off::XSAVE)); // xrstor64
    a.store_imm(Size::D, Mem::Gs(off::FPU_LOADED), 1);
    a.mov(reg::RAX, T);
    a.mov(reg::RDX, I);
    // What code with windows has there where a block starts.
    a.load(Size::Q, I, Mem::Gs(off::WINDOW_PLACES));
    a.bytes(&[0xc3]);

    let leave = a.here();
    a.alu_imm(Size::Q, 0, reg::RSP, 8);
    for r in callee_saved.iter().rev() {
        pop(a, *r);
    }
    a.bytes(&[0xc3]);

    let exit = |a: &mut Asm, helper: Helper, how: Entry| {
        let at = a.pc();
        match how {
            Entry::Call => a.op_mem(Size::D, &[0x8f], 0, Mem::Gs(off::RET_ADDR)),
            Entry::Jump => {}
        }
        for r in same() {
            a.store(Size::Q, Mem::Gs(gpr_slot(r)), r);
        }
        a.store(Size::Q, Mem::Gs(gpr_slot(reg::RSP)), GUEST_RSP);
        a.store(Size::Q, Mem::Gs(off::T), T);
        a.store(Size::Q, Mem::Gs(off::SHADOW_RSP), reg::RSP);
        a.load(Size::Q, reg::RSP, Mem::Gs(off::HOST_RSP));
        a.store_imm(Size::D, Mem::Gs(off::FPU_RELOAD), 0);
        a.cmp_mem_imm8(Size::D, Mem::Gs(off::FPU_LOADED), 0);
        let skip = a.jcc(cc::E);
        a.bytes(&[0xe8, 0, 0, 0, 0]);
        let pos = a.here() - 4;
        a.bind_to(pos, save_fpu);
        a.bind(skip);
        a.load(Size::Q, reg::RDI, Mem::Gs(off::THIS));
        a.load(Size::Q, reg::RSI, Mem::Gs(off::RET_ADDR));
        a.mov_imm(reg::RAX, helper as usize as u64);
        a.bytes(&[0xff, 0xd0]); // call rax
        a.op_reg(Size::Q, &[0x85], reg::RAX, reg::RAX); // test
        let pos = a.jcc(cc::E);
        a.bind_to(pos, leave);
        a.store(Size::Q, Mem::Gs(off::CONT), reg::RAX);
        a.cmp_mem_imm8(Size::D, Mem::Gs(off::FPU_RELOAD), 0);
        let pos = a.jcc(cc::E);
        a.bind_to(pos, resume);
        a.bytes(&[0xe8, 0, 0, 0, 0]);
        let pos = a.here() - 4;
        a.bind_to(pos, load_fpu);
        let pos = a.jmp();
        a.bind_to(pos, resume);
        at
    };
    s.link = exit(a, helpers.link, Entry::Call);
    s.link_flags = a.pc();
    flags::save(a);
    a.jmp_to(s.link);
    s.land = a.pc();
    a.alu_imm(Size::Q, 4, T, -4096);
    a.store(Size::Q, Mem::Gs(off::PC_BASE), T);
    a.jmp_to(s.link);
    s.jump = a.pc();
    a.store_imm(Size::D, Mem::Gs(off::BRANCH), 0);
    s.jump_from = exit(a, helpers.jump, Entry::Jump);
    for which in 0..3 {
        s.level2_branch[which] = a.pc();
        a.store(Size::D, Mem::Gs(off::BRANCH), I);
        s.level2[which] = a.pc();
        lookup_level2(a, which, s.jump_from);
        s.level2_direct[which] = a.pc();
        a.store_imm(Size::D, Mem::Gs(off::BRANCH), 0);
        a.jmp_to(s.level2[which]);
        s.astray[which] = a.pc();
        for i in 0..SEARCH {
            a.op_mem(Size::Q, &[0x3b], T, at(reg::RSP, 16 * i + 8)); // cmp
            a.bytes(&[0x75, 9]); // jne over
            a.bytes(&[0x48, 0x8d, 0xa4, 0x24]); // lea rsp, [rsp + 16 i]
            a.d32(16 * i as u32);
            a.bytes(&[0xc3]);
        }
        s.lookup[which] = a.pc();
        lookup(a, which, s.level2[which]);
    }
    s.empty = a.pc();
    a.jmp_mem(Mem::Gs(off::SHADOW_EMPTY_TO));
    s.empty_plain = a.pc();
    a.load(Size::Q, reg::RSP, Mem::Gs(off::SHADOW_BASE));
    for (bit, which) in [(Context::USER, TLB_USER), (Context::AC, TLB_KERNEL_AC)] {
        a.op_mem(Size::D, &[0xf6], 0, Mem::Gs(off::CTX)); // test byte
        a.bytes(&[bit as u8]);
        a.jcc_to(cc::NE, s.lookup[which]);
    }
    a.jmp_to(s.lookup[TLB_KERNEL]);
    s.memory = exit(a, helpers.memory, Entry::Call);
    s.interpret = exit(a, helpers.interpret, Entry::Call);
    s.poll = exit(a, helpers.poll, Entry::Call);
    s.poll_flags_rcx = a.pc();
    a.mov(reg::RCX, T);
    s.poll_flags = a.pc();
    flags::save(a);
    a.jmp_to(s.poll);
    s.dead = exit(a, helpers.dead, Entry::Call);
    s.dead_flags = a.pc();
    flags::save(a);
    a.jmp_to(s.dead);
    s.fault = exit(a, helpers.fault, Entry::Jump);
    s.mended = a.pc();
    a.op_mem(Size::D, &[0xff], 6, Mem::Gs(off::FAULT_FLAGS)); // push
    a.bytes(&[0x9d]); // popfq
    a.load(Size::Q, T, Mem::Gs(off::FAULT_T));
    a.load(Size::Q, I, Mem::Gs(off::FAULT_I));
    a.jmp_mem(Mem::Gs(off::FAULT_AT));
    let wrote = exit(a, helpers.wrote, Entry::Call);
    s.wrote_back = a.pc();
    flags::restore(a);
    a.jmp_mem(Mem::Gs(off::RET_ADDR));
    for which in 0..3 {
        for write in 0..2 {
            s.refill[which][write] = a.pc();
            crate::refill::emit(a, which, write != 0);
        }
        let code = a.pc();
        code_write(a, which, s.refill[which][1]);
        for write in 0..2 {
            for class in 0..4 {
                s.cross[which][write][class] = a.pc();
                if write != 0 {
                    a.jcc_to(cc::E, code);
                    a.store_imm(Size::Q, Mem::Gs(off::STORE_LINES), 0);
                }
                cross(a, which, write != 0, 8 << class);
            }
        }
    }
    crate::miss::emit(a, &mut s);
    crate::far::emit(a, &mut s);
    s.commit = a.pc();
    commit(a, wrote);
    s
}

/// How many outer calls a return may skip (an exception, a `longjmp`) to be found.
pub const SEARCH: i32 = 20;

/// I = offset of T in a first-level jump cache. `bmi2`: the host has RORX.
pub fn jump_offset(a: &mut Asm, bmi2: bool) {
    if bmi2 {
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
}

/// Jumps to the linear address in T through a jump cache; I holds a branch word.
fn lookup(a: &mut Asm, which: usize, miss: u64) {
    let base = jumps_base(which);
    a.store(Size::D, Mem::Gs(off::BRANCH), I);
    a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
    a.jcc_to(cc::NE, miss);
    jump_offset(a, false);
    a.op_mem(Size::Q, &[0x3b], T, Mem::GsBase(I, base)); // cmp
    a.jcc_to(cc::NE, miss);
    a.op_mem(Size::D, &[0xff], 4, Mem::GsBase(I, base + 8));
}

fn lookup_level2(a: &mut Asm, which: usize, jump: u64) {
    let level2 = jumps2_base(which);
    let level1 = jumps_base(which);
    a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
    a.jcc_to(cc::NE, jump);
    a.op_reg(Size::Q, &[0x69], I, T); // imul
    a.d32(JUMP2_HASH as u32);
    a.shr(I, JUMP2_SHIFT - 4);
    a.alu_imm(Size::D, 4, I, ((JUMP2_ENTRIES - 1) << 4) as i32);
    a.op_mem(Size::Q, &[0x3b], T, Mem::GsBase(I, level2)); // cmp
    a.jcc_to(cc::NE, jump);
    a.store(Size::Q, Mem::Gs(off::CROSS_SPILL), reg::RAX);
    a.load(Size::Q, reg::RAX, Mem::GsBase(I, level2 + 8));
    a.store(Size::Q, Mem::Gs(off::CONT), reg::RAX);
    jump_offset(a, false);
    a.store(Size::Q, Mem::GsBase(I, level1), T);
    a.store(Size::Q, Mem::GsBase(I, level1 + 8), reg::RAX);
    a.load(Size::Q, reg::RAX, Mem::Gs(off::CROSS_SPILL));
    a.store_imm(Size::D, Mem::Gs(off::BRANCH), 0);
    a.jmp_mem(Mem::Gs(off::CONT));
}

/// Looks the page of the write at T up in the code-write TLB, and tries to fill the TLB if it is not there.
fn code_write(a: &mut Asm, which: usize, refill: u64) {
    let spill = Mem::Gs(off::CROSS_SPILL);
    let entry = |field: usize| Mem::GsBase(reg::RAX, off::CODE_WRITES + field as i32);
    a.store(Size::Q, spill, reg::RAX);
    a.mov(reg::RAX, T);
    a.shr(reg::RAX, 12);
    a.alu_imm(Size::D, 4, reg::RAX, CODE_WRITES as i32 - 1);
    a.op_reg(Size::D, &[0xc1], 4, reg::RAX); // shl
    a.bytes(&[size_of::<CodeWrite>().trailing_zeros() as u8]);
    a.mov(I, T);
    a.alu_imm(Size::Q, 4, I, -4096);
    a.alu_imm(Size::Q, 1, I, which as i32);
    a.op_mem(Size::Q, &[0x3b], I, entry(offset_of!(CodeWrite, tag))); // cmp
    let other = a.jcc(cc::NE);
    a.op_mem(Size::Q, &[0x83], 5, entry(offset_of!(CodeWrite, left))); // sub
    a.bytes(&[1]);
    let used_up = a.jcc(cc::B);
    a.store(Size::Q, Mem::Gs(off::STORE_ENTRY), reg::RAX);
    a.load(Size::Q, I, entry(offset_of!(CodeWrite, lines)));
    a.store(Size::Q, Mem::Gs(off::STORE_LINES), I);
    a.load(Size::Q, I, entry(offset_of!(CodeWrite, host)));
    a.alu_imm(Size::D, 4, T, 4095); // clears carry
    a.store(Size::Q, Mem::Gs(off::CROSS_OFFSET), T);
    a.load(Size::Q, reg::RAX, spill);
    a.bytes(&[0xc3]);
    a.bind(other);
    a.bind(used_up);
    a.load(Size::Q, reg::RAX, spill);
    a.call_to(refill);
    let failed = a.jcc(cc::B);
    a.op_reg(Size::D, &[0x31], I, I); // xor: the zero flag
    a.bytes(&[0xf9, 0xc3]); // stc; ret
    a.bind(failed);
    a.op_reg(Size::Q, &[0x85], reg::RSP, reg::RSP); // test: no zero flag
    a.bytes(&[0xf9, 0xc3]); // stc; ret
}

/// `[I + T]` is the operand when I is this far from the bounce buffer and T the page offset.
const BOUNCE_BIAS: i32 = off::BOUNCE + BOUNCE_HALF as i32 - 4096;

fn cross(a: &mut Asm, which: usize, write: bool, bytes: i32) {
    let tlb = tlb_base(which);
    let tag = tlb + if write { 8 } else { 0 };
    let saved = [
        (reg::RAX, off::CROSS_SPILL),
        (reg::RCX, off::CROSS_SPILL + 8),
    ];
    for (r, slot) in saved {
        a.store(Size::Q, Mem::Gs(slot), r);
    }
    a.mov(reg::RAX, T);
    a.alu_imm(Size::Q, 4, reg::RAX, -4096);
    let mut fails = Vec::new();
    for host in [reg::RCX, I] {
        a.mov(I, reg::RAX);
        a.shr(I, 7);
        a.alu_imm(Size::D, 4, I, ((TLB_ENTRIES - 1) << 5) as i32);
        a.op_mem(Size::Q, &[0x3b], reg::RAX, Mem::GsBase(I, tag)); // cmp
        fails.push(a.jcc(cc::NE));
        a.load(Size::Q, host, Mem::GsBase(I, tlb + 16));
        if host == reg::RCX {
            a.alu_imm(Size::Q, 0, reg::RAX, 4096);
        }
    }
    let middle = off::BOUNCE + BOUNCE_HALF as i32;
    for i in (0..bytes).step_by(8) {
        a.load(Size::Q, reg::RAX, at(reg::RCX, 4096 - bytes + i));
        a.store(Size::Q, Mem::Gs(middle - bytes + i), reg::RAX);
        a.load(Size::Q, reg::RAX, at(I, i));
        a.store(Size::Q, Mem::Gs(middle + i), reg::RAX);
    }
    if write {
        a.store(Size::Q, Mem::Gs(off::CROSS_PAGES), reg::RCX);
        a.store(Size::Q, Mem::Gs(off::CROSS_PAGES + 8), I);
    }
    a.alu_imm(Size::D, 4, T, 4095); // clears carry
    if write {
        a.store(Size::Q, Mem::Gs(off::CROSS_OFFSET), T);
    }
    a.load(Size::Q, I, Mem::Gs(off::THIS));
    a.lea(I, at(I, BOUNCE_BIAS));
    for (r, slot) in saved {
        a.load(Size::Q, r, Mem::Gs(slot));
    }
    a.bytes(&[0xc3]);
    for f in fails {
        a.bind(f);
    }
    for (r, slot) in saved {
        a.load(Size::Q, r, Mem::Gs(slot));
    }
    a.bytes(&[0xf9, 0xc3]); // stc; ret
}

fn commit(a: &mut Asm, wrote: u64) {
    let saved = [
        (reg::RCX, off::CROSS_SPILL),
        (reg::RSI, off::CROSS_SPILL + 8),
        (reg::RDI, off::CROSS_SPILL + 16),
    ];
    for (r, slot) in saved {
        a.store(Size::Q, Mem::Gs(slot), r);
    }
    a.load(Size::Q, T, Mem::Gs(off::CROSS_OFFSET));
    a.load(Size::Q, reg::RCX, Mem::Gs(off::STORE_LINES));
    let bounced = a.jrcxz();
    let code = a.jmp();
    a.bind8(bounced);
    // I = size, without touching flags.
    a.store(Size::D, Mem::Gs(off::STORE_META), I);
    a.load(
        Size::B,
        I,
        Mem::Gs(off::STORE_META + meta::SIZE_SHIFT as i32 / 8),
    );
    a.load(Size::Q, reg::RSI, Mem::Gs(off::THIS));
    a.lea(
        reg::RSI,
        Mem::Sib(Some(reg::RSI), Some((T, 0)), BOUNCE_BIAS),
    );
    a.load(Size::Q, reg::RDI, Mem::Gs(off::CROSS_PAGES));
    a.lea(reg::RDI, Mem::Sib(Some(reg::RDI), Some((T, 0)), 0));
    // RCX = 4096 - T, without touching flags.
    a.mov(reg::RCX, T);
    a.op_reg(Size::Q, &[0xf7], 2, reg::RCX); // not
    a.lea(reg::RCX, at(reg::RCX, 4097));
    a.bytes(&[0xf3, 0xa4]); // rep movsb
    a.load(Size::Q, reg::RDI, Mem::Gs(off::CROSS_PAGES + 8));
    a.lea(reg::RCX, Mem::Sib(Some(I), Some((T, 0)), -4096));
    a.bytes(&[0xf3, 0xa4]);
    for (r, slot) in saved {
        a.load(Size::Q, r, Mem::Gs(slot));
    }
    a.bytes(&[0xc3]);

    // The page holds code. RSI: flags as LAHF and SETO leave them in AX.
    a.bind(code);
    let swap = [0x48, 0x87, 0xf0]; // xchg rax, rsi
    a.mov(reg::RSI, reg::RAX);
    a.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    a.bytes(&swap);
    a.store(Size::D, Mem::Gs(off::STORE_META), I);
    // The write before the look at the lines: XCHG is locked.
    a.op_mem(Size::Q, &[0x87], reg::RDI, Mem::Gs(off::CROSS_PAGES));
    a.load(Size::Q, reg::RCX, at(reg::RCX, 0));
    a.shr(I, meta::SIZE_SHIFT as u8);
    a.lea(reg::RDI, Mem::Sib(Some(I), Some((T, 0)), -1));
    a.shr(reg::RDI, 6);
    a.shr(T, 6);
    let mut hits = Vec::new();
    for line in [T, reg::RDI] {
        a.op_reg(Size::Q, &[0x0f, 0xa3], line, reg::RCX); // bt
        hits.push(a.jcc(cc::B));
    }
    a.bytes(&swap);
    a.bytes(&[0x04, 0x7f, 0x9e]); // add al, 127; sahf
    a.mov(reg::RAX, reg::RSI);
    for (r, slot) in saved {
        a.load(Size::Q, r, Mem::Gs(slot));
    }
    a.bytes(&[0xc3]);
    for h in hits {
        a.bind(h);
    }
    a.op_mem(Size::D, &[0xf7], 0, Mem::Gs(off::STORE_META)); // test
    a.d32(meta::HOST_FLAGS);
    let in_memory = a.jcc(cc::E);
    a.store(Size::W, Mem::Gs(off::FLAGS), reg::RSI);
    a.bind(in_memory);
    for (r, slot) in saved {
        a.load(Size::Q, r, Mem::Gs(slot));
    }
    a.jmp_to(wrote);
}

enum Entry {
    Call,
    Jump,
}

fn push(a: &mut Asm, r: u8) {
    if r >= 8 {
        a.bytes(&[0x41]);
    }
    a.bytes(&[0x50 | r & 7]);
}

fn pop(a: &mut Asm, r: u8) {
    if r >= 8 {
        a.bytes(&[0x41]);
    }
    a.bytes(&[0x58 | r & 7]);
}
