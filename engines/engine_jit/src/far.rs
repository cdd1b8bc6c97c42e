//! How hot user code, which has windows, jumps: with the flags in EFLAGS wherever it goes.
//!
//! A direct jump or call out of its page goes through a *slot* of the vCPU's, a word that holds the host address of
//! the target, or of the exit behind the block that looks the target up. Slots are filled by a stub from the jump
//! cache, and emptied with it; so they need no check. That holds as long as a page of code lies at one
//! linear address only, which is kept for each page of code that has been entered: where a second one shows up, everything is
//! emptied.
//!
//! Indirect jumps look into a jump cache of their own, with an index and a comparison that leave the flags alone.
//! So nothing needs to be saved, and there is no poll: whoever raises the attention flag clears the mask
//! that makes the index, and index 0 never matches; jumps backwards through slots add the flag to
//! the slot's address, and find the words of a second array.

use crate::asm::{Asm, Mem, Size, at, cc, reg};
use crate::flags;
use crate::layout::{JUMP2_ENTRIES, JUMP2_HASH, JUMP2_SHIFT, TLB_USER, VcpuMem, jumps2_base, off};
use crate::stubs::{I, SEARCH, Stubs, T};
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Slots of a virtual machine; a power of two.
pub const SLOTS: usize = 1 << 19;
/// What the attention flag is when it is up: the distance from a slot to its word in the second array.
pub const ATTENTION_UP: u32 = (SLOTS * 8) as u32;
/// Entries of the jump cache; a power of two.
const JUMPS: usize = 1 << 14;
/// The bits of an address that make the index.
pub const JUMP_MASK: u64 = (JUMPS as u64 - 1) << 2;
/// Entries hold what added to this and the address makes zero: no address whose index is not 0 matches an entry that
/// is all zero.
const BIAS: u64 = 1 << 16;
/// Rust had to find this many targets: slots may lead to dead blocks.
const STRAYS: u32 = 64;
/// Pages of code that a virtual machine has numbers for.
pub const PAGES: usize = 1 << 16;
/// Pages that showed up at a second linear address before an address space goes without windows.
const ALIASES: u32 = 64;

/// Where a page of code lies.
#[derive(Clone, Copy)]
#[repr(C)]
struct Page {
    /// Its linear address; 0: not entered since the last flush.
    linear: u64,
    /// Where the windows have that.
    host: u64,
}

/// See the module's description.
#[repr(C)]
pub struct Far {
    /// Where each leads. Other vCPUs enter the exits of code that they have translated, before it can be reached.
    slots: [AtomicU64; SLOTS],
    /// Exits that poll, as far as slots are in use.
    polls: [AtomicU64; SLOTS],
    /// Where a slot leads that is not filled.
    exits: [AtomicU64; SLOTS],
    /// Slots that were filled since they were last empty, `filled_bytes / 4` of them.
    filled: [u32; SLOTS],
    filled_bytes: u64,
    /// The jump cache: what [`tag`] makes of addresses, and the code for them.
    tags: [u64; JUMPS],
    hosts: [u64; JUMPS],
    jumps_filled: Vec<u16>,
    /// Slots whose exits are known here, and the clearing of the code cache since which they are.
    known: (AtomicUsize, u64),
    /// The vCPU has or had windows, and wants to know of slots that others add.
    listens: AtomicBool,
    strays: u32,
    /// Invalidations of code when slots were last emptied for them.
    epoch: u64,
    /// Pages of code by number.
    pages: [Page; PAGES],
    /// Those that are not 0.
    entered: Vec<u16>,
    /// Pages that were entered at two addresses.
    aliases: u32,
    /// Flushes since start.
    pub flushes: u64,
}

/// What came of entering a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entered {
    /// Its linear address is known.
    Known,
    /// It lies at another address too: everything must be flushed.
    Elsewhere,
    /// The same, once too often.
    TooOften,
}

fn index(pc: u64) -> usize {
    (pc & JUMP_MASK) as usize >> 2
}

fn tag(pc: u64) -> u64 {
    0u64.wrapping_sub(pc).wrapping_sub(BIAS)
}

impl Far {
    /// Initializes memory that was just allocated and zeroed. `lost`: where a jump goes that must not match.
    ///
    /// # Safety
    /// `this` is valid for writes, and nothing else refers to it.
    #[expect(unsafe_code, reason = "too large to be built on the stack and moved")]
    pub unsafe fn init(this: *mut Far, lost: u64) {
        // SAFETY: the caller's promise; all other fields are integers, valid as zero.
        unsafe {
            (&raw mut (*this).jumps_filled).write(Vec::new());
            (&raw mut (*this).entered).write(Vec::new());
            (*this).tags[0] = 1;
            (*this).hosts[0] = lost;
        }
    }

    /// Empties slots and jump cache.
    pub fn flush(&mut self) {
        self.empty_slots();
        for &i in &self.jumps_filled {
            self.tags[usize::from(i)] = 0;
            self.hosts[usize::from(i)] = 0;
        }
        self.jumps_filled.clear();
        for n in self.entered.drain(..) {
            self.pages[usize::from(n)].linear = 0;
        }
        self.flushes += 1;
    }

    fn empty_slots(&mut self) {
        let count = self.filled_bytes as usize / 4;
        for &n in self.filled.iter().take(count) {
            let n = n as usize % SLOTS;
            self.slots[n].store(self.exits[n].load(Relaxed), Relaxed);
        }
        self.filled_bytes = 0;
        self.strays = 0;
    }

    /// Enters the code for a linear address.
    pub fn fill(&mut self, pc: u64, host: u64) {
        let i = index(pc);
        if i != 0 {
            if self.hosts[i] == 0 {
                self.jumps_filled.push(i as u16);
            }
            self.tags[i] = tag(pc);
            self.hosts[i] = host;
        }
    }

    /// The code for a linear address, if it is known.
    pub fn jump(&self, pc: u64) -> Option<u64> {
        let (i, host) = (index(pc), self.hosts[index(pc)]);
        (self.tags[i] == tag(pc) && i != 0 && host != 0).then_some(host)
    }

    /// Page number `n` of code has been entered, at linear address `linear`.
    pub fn entered(&self, n: u16, linear: u64) -> bool {
        self.pages[usize::from(n)].linear == linear
    }

    /// Page number `n` of code is about to be entered, at linear address `linear`, which is not 0, and whose place in a window is
    /// `host`.
    pub fn enter_page(&mut self, n: u16, linear: u64, host: u64) -> Entered {
        let page = &mut self.pages[usize::from(n)];
        if page.linear == linear {
            return Entered::Known;
        }
        if page.linear == 0 {
            *page = Page { linear, host };
            self.entered.push(n);
            return Entered::Known;
        }
        self.aliases += 1;
        if self.aliases < ALIASES {
            return Entered::Elsewhere;
        }
        self.aliases = 0;
        Entered::TooOften
    }

    /// Linear address of a page of code that was entered.
    pub fn page(&self, n: u16) -> u64 {
        self.pages[usize::from(n)].linear
    }

    /// A target had to be found in Rust, after `epoch` invalidations of code. Only if there were any since
    /// slots were last empty can they lead to dead blocks.
    pub fn stray(&mut self, epoch: u64) {
        if epoch == self.epoch {
            return;
        }
        self.strays += 1;
        if self.strays >= STRAYS {
            self.empty_slots();
            self.epoch = epoch;
        }
    }

    /// A slot was given to code whose exit is at `exit`, which polls too.
    pub fn add(&self, slot: usize, exit: u64) {
        // SAFETY: a reference is valid.
        #[expect(unsafe_code, reason = "shared with what is told to others")]
        unsafe {
            Far::enter(self, slot, exit);
        }
    }

    /// The same, by the vCPU that has translated the code, to one that may be running. The caller has the code cache.
    ///
    /// # Safety
    /// As for [`Self::enter`].
    #[expect(
        unsafe_code,
        reason = "the owner may be running, and change other fields"
    )]
    pub unsafe fn tell(this: *const Far, slot: usize, exit: u64) {
        // SAFETY: the caller's promise.
        unsafe {
            if (*this).listens.load(Relaxed) {
                Far::enter(this, slot, exit);
            }
        }
    }

    /// # Safety
    /// `this` is valid for as long as this takes; its owner touches `slots`, `polls`, `exits`, `known.0` and `listens` atomically
    /// only.
    #[expect(
        unsafe_code,
        reason = "the owner may be running, and change other fields"
    )]
    unsafe fn enter(this: *const Far, slot: usize, exit: u64) {
        if slot >= SLOTS {
            return;
        }
        // SAFETY: the caller's promise; references are made to atomic fields only.
        unsafe {
            for field in [
                &raw const (*this).slots,
                &raw const (*this).polls,
                &raw const (*this).exits,
            ] {
                (*field.cast::<AtomicU64>().add(slot)).store(exit, Relaxed);
            }
            (*this).known.0.store(slot + 1, Relaxed);
        }
    }

    /// The slots of all code, `exits` by number, after the cache was cleared `clears` times.
    pub fn learn(&mut self, exits: &[u64], clears: u64) {
        self.listens.store(true, Relaxed);
        if self.known.1 != clears {
            self.known = (AtomicUsize::new(0), clears);
        }
        let known = self.known.0.load(Relaxed);
        for (slot, &exit) in exits.iter().enumerate().skip(known) {
            self.add(slot, exit);
        }
    }
}

const fn far(field: usize) -> i32 {
    offset_of!(VcpuMem, caches.far) as i32 + field as i32
}

/// Bytes before what slots lead to: the load of I, which whoever comes through a slot has there.
pub const ENTRY: usize = 9;

/// The operand of a jump through a slot; `back`: by way of T, which holds the attention flag.
pub fn slot(n: u32, back: bool) -> Mem {
    let at = far(offset_of!(Far, slots)) + 8 * n as i32;
    if back {
        Mem::GsBase(T, at)
    } else {
        Mem::Gs(at)
    }
}

/// Where the linear address of a page of code is.
pub fn page(n: u16) -> Mem {
    Mem::Gs(page_at(n, offset_of!(Page, linear)))
}

/// Where its host address is.
pub fn page_host(n: u16) -> Mem {
    Mem::Gs(page_at(n, offset_of!(Page, host)))
}

fn page_at(n: u16, field: usize) -> i32 {
    far(offset_of!(Far, pages) + field) + size_of::<Page>() as i32 * i32::from(n)
}

/// Where RCX is kept over comparisons: in the red zone of the host's stack, as processors rename such memory, so
/// that nothing waits for RCX.
pub const RCX: Mem = Mem::Sib(Some(reg::RSP), None, -16);
/// The same after a pop.
pub const RCX_POPPED: Mem = Mem::Sib(Some(reg::RSP), None, -24);

/// Looks T up in the jump cache and jumps (`4`) or calls (`2`). Keeps flags; clobbers I. Returns the
/// jump that is taken if it is not there, with RCX in [`RCX`].
pub fn jump(a: &mut Asm, how: u8) -> usize {
    let word = |field: usize| Mem::GsIndex(I, far(field));
    a.pext(I, T, off::JUMP_MASK);
    a.store(Size::Q, RCX, reg::RCX);
    a.load(Size::Q, reg::RCX, word(offset_of!(Far, tags)));
    a.lea(
        reg::RCX,
        Mem::Sib(Some(reg::RCX), Some((T, 0)), BIAS as i32),
    );
    let hit = a.jrcxz();
    let miss = a.jmp();
    a.bind8(hit);
    a.load(Size::Q, reg::RCX, RCX);
    a.op_mem(Size::D, &[0xff], how, word(offset_of!(Far, hosts)));
    miss
}

fn save_flags(a: &mut Asm) {
    a.store(Size::Q, Mem::Gs(off::CROSS_SPILL), reg::RAX);
    a.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    a.store(Size::W, Mem::Gs(off::FLAGS), reg::RAX);
}

fn restore_flags(a: &mut Asm) {
    a.load(Size::W, reg::RAX, Mem::Gs(off::FLAGS));
    flags::load(a);
    a.load(Size::Q, reg::RAX, Mem::Gs(off::CROSS_SPILL));
}

/// RAX = offset of T in the second-level jump cache.
fn level2(a: &mut Asm) {
    a.op_reg(Size::Q, &[0x69], reg::RAX, T); // imul
    a.d32(JUMP2_HASH as u32);
    a.shr(reg::RAX, JUMP2_SHIFT - 4);
    a.alu_imm(Size::D, 4, reg::RAX, ((JUMP2_ENTRIES - 1) << 4) as i32);
}

/// Emits the stubs; those of `s` that they lead to are there.
pub fn emit(a: &mut Asm, s: &mut Stubs) {
    let second = jumps2_base(TLB_USER);
    s.far.enter = a.pc();
    flags::restore_keeping_scratch(a);
    a.jmp_mem(Mem::Gs(off::RET_ADDR));

    s.far.leave = a.pc();
    save_flags(a);
    a.load(Size::Q, reg::RAX, Mem::Gs(off::CROSS_SPILL));
    a.jmp_to(s.jump);

    s.far.land = a.pc();
    save_flags(a);
    a.load(Size::Q, reg::RAX, Mem::Gs(off::CROSS_SPILL));
    a.jmp_to(s.land);

    // An indirect jump, its branch word in I.
    s.far.lost = a.pc();
    save_flags(a);
    a.store(Size::D, Mem::Gs(off::BRANCH), I);
    let mut fails = Vec::new();
    a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
    fails.push(a.jcc(cc::NE));
    level2(a);
    a.op_mem(Size::Q, &[0x3b], T, Mem::GsBase(reg::RAX, second)); // cmp
    fails.push(a.jcc(cc::NE));
    a.load(Size::Q, reg::RAX, Mem::GsBase(reg::RAX, second + 8));
    a.store(Size::Q, Mem::Gs(off::CONT), reg::RAX);
    a.mov(I, T);
    a.alu_imm(Size::D, 4, I, JUMP_MASK as i32);
    let first = a.jcc(cc::E);
    // The index is what stands above the mask's lowest bits.
    let word = |field: usize| Mem::GsBase(I, far(field));
    a.op_reg(Size::D, &[0xc1], 4, I); // shl
    a.bytes(&[1]);
    a.store(Size::Q, word(offset_of!(Far, hosts)), reg::RAX);
    a.mov(reg::RAX, T);
    a.op_reg(Size::Q, &[0xf7], 3, reg::RAX); // neg
    a.alu_imm(Size::Q, 5, reg::RAX, BIAS as i32);
    a.store(Size::Q, word(offset_of!(Far, tags)), reg::RAX);
    a.bind(first);
    a.store_imm(Size::D, Mem::Gs(off::BRANCH), 0);
    restore_flags(a);
    a.jmp_mem(Mem::Gs(off::CONT));
    for f in fails {
        a.bind(f);
    }
    a.load(Size::Q, reg::RAX, Mem::Gs(off::CROSS_SPILL));
    a.jmp_to(s.jump_from);

    // A slot that is not filled, its offset in I.
    s.far.unfilled = a.pc();
    save_flags(a);
    a.store(Size::Q, Mem::Gs(off::CROSS_SPILL + 8), reg::RCX);
    let mut fails = Vec::new();
    a.cmp_mem_imm8(Size::D, Mem::Gs(off::ATTENTION), 0);
    fails.push(a.jcc(cc::NE));
    level2(a);
    a.op_mem(Size::Q, &[0x3b], T, Mem::GsBase(reg::RAX, second)); // cmp
    fails.push(a.jcc(cc::NE));
    a.load(Size::Q, reg::RCX, Mem::GsBase(reg::RAX, second + 8));
    let word = |field: usize| Mem::Gs(far(field));
    a.load(Size::Q, reg::RAX, word(offset_of!(Far, filled_bytes)));
    a.alu_imm(Size::Q, 7, reg::RAX, 4 * SLOTS as i32);
    let full = a.jcc(cc::AE);
    a.alu_imm(Size::Q, 0, reg::RCX, ENTRY as i32);
    a.store(
        Size::Q,
        Mem::GsBase(I, far(offset_of!(Far, slots))),
        reg::RCX,
    );
    a.shr(I, 3);
    a.store(
        Size::D,
        Mem::GsBase(reg::RAX, far(offset_of!(Far, filled))),
        I,
    );
    a.alu_imm(Size::Q, 0, reg::RAX, 4);
    a.store(Size::Q, word(offset_of!(Far, filled_bytes)), reg::RAX);
    a.alu_imm(Size::Q, 5, reg::RCX, ENTRY as i32);
    a.bind(full);
    a.store(Size::Q, Mem::Gs(off::CONT), reg::RCX);
    restore_flags(a);
    a.load(Size::Q, reg::RCX, Mem::Gs(off::CROSS_SPILL + 8));
    a.jmp_mem(Mem::Gs(off::CONT));
    for f in fails {
        a.bind(f);
    }
    a.load(Size::Q, reg::RAX, Mem::Gs(off::CROSS_SPILL));
    a.load(Size::Q, reg::RCX, Mem::Gs(off::CROSS_SPILL + 8));
    a.jmp_to(s.jump);

    // A return that has landed elsewhere than it goes to: T, its branch word in I.
    s.far.astray = a.pc();
    a.load(Size::Q, reg::RCX, RCX_POPPED);
    save_flags(a);
    a.op_reg(Size::Q, &[0xf7], 2, T); // not
    let mut found = Vec::new();
    for i in 0..SEARCH {
        a.op_mem(Size::Q, &[0x3b], T, at(reg::RSP, 16 * i + 8)); // cmp
        a.bytes(&[0x75, 13]); // jne over
        a.bytes(&[0x48, 0x8d, 0xa4, 0x24]); // lea rsp, [rsp + 16 i]
        a.d32(16 * i as u32);
        found.push(a.jmp());
    }
    a.op_reg(Size::Q, &[0xf7], 2, T);
    restore_flags(a);
    a.jmp_to(s.far.lost);
    for f in found {
        a.bind(f);
    }
    a.op_reg(Size::Q, &[0xf7], 2, T);
    restore_flags(a);
    a.bytes(&[0xc3]);

    s.far.empty = a.pc();
    a.load(Size::Q, reg::RSP, Mem::Gs(off::SHADOW_BASE));
    a.jmp_to(s.far.lost);
}
