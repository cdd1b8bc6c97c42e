//! What emitted code reaches through `gs`: one block of memory per vCPU.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use x86defs::rflags;
use x86emu::state::CpuState;

/// Entries of each software TLB; a power of two.
pub const TLB_ENTRIES: usize = 1 << 15;
/// log2 of the TLB entries that share a bit in the record of what was filled.
pub const GROUP_SHIFT: usize = 3;
/// Groups of entries of each TLB.
pub const TLB_GROUPS: usize = TLB_ENTRIES >> GROUP_SHIFT;
/// Entries of each jump cache; a power of two.
pub const JUMP_ENTRIES: usize = 1 << 14;

/// Entries of each second-level jump cache; a power of two.
pub const JUMP2_ENTRIES: usize = 1 << 16;
/// Multiplier of the second level's hash.
pub const JUMP2_HASH: i32 = 0x5bd1_e995;
/// Bits of the product below the index.
pub const JUMP2_SHIFT: u8 = 32;

/// Which of the three software TLBs a context uses.
///
/// One per set of permissions, so that a change of CPL or RFLAGS.AC needs no flush.
pub const TLB_USER: usize = 0;
/// Supervisor accesses with SMAP in force.
pub const TLB_KERNEL: usize = 1;
/// Supervisor accesses to user pages allowed (RFLAGS.AC, or no SMAP).
pub const TLB_KERNEL_AC: usize = 2;

/// One translation of the software TLB.
///
/// A tag is the linear address of the page. An invalid entry carries a page-aligned tag that maps to
/// another index, so that no address can match it; all zero is invalid everywhere but at index 0.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TlbEntry {
    /// Page that may be read.
    pub read: u64,
    /// Page that may be written without further notice.
    pub write: u64,
    /// Host address of the page.
    pub host: u64,
    /// Guest-physical address of the page, bit 0: global.
    pub gpa: u64,
}

/// One entry of the jump cache: a linear address and the code for it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct JumpEntry {
    /// Linear address of the target; one of another index when empty: 0, and 4096 at index 0.
    pub pc: u64,
    /// Indirect entry point of its translation.
    pub host: u64,
}

/// Half of [`Bounce`]: the longest operand.
pub const BOUNCE_HALF: usize = 64;

/// A buffer for operands that cross a page, aligned so that they are as (mis)aligned as in the guest.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Bounce(pub [u8; 2 * BOUNCE_HALF]);

/// What a host fault in translated code was.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Fault {
    /// Scratch register T.
    pub t: u64,
    /// Scratch register I.
    pub i: u64,
    /// EFLAGS.
    pub flags: u64,
    /// CR2.
    pub address: u64,
    /// Exception number.
    pub vector: u64,
    /// Error code.
    pub code: u64,
}

/// Everything that emitted code addresses. `gs` points at it while guest code runs.
#[repr(C, align(4096))]
pub struct VcpuMem {
    /// Architectural state. While translated code runs, general registers live in host registers
    /// (see `translate`), RIP is `pc_base` plus the place in the code, and the arithmetic flags of
    /// `rflags` are zero: they are in EFLAGS or in `flags`.
    pub cpu: CpuState,
    /// Nonzero, [`crate::far::ATTENTION_UP`]: leave translated code at the next poll.
    pub attention: AtomicU32,
    /// Nonzero: an interrupt waits for RFLAGS.IF.
    pub irq_window: u32,
    /// Arithmetic flags as LAHF and SETO leave them in AX.
    pub flags: u32,
    /// The guest's x87/SSE/AVX state is in the host's registers.
    pub fpu_loaded: u32,
    /// Set by the exit stub when it saved the FPU; what it loads again before it continues.
    pub fpu_reload: u32,
    /// MXCSR for host code.
    pub host_mxcsr: u32,
    /// XSAVE mask.
    pub xsave_mask: u32,
    /// Context of the running code.
    pub ctx: u32,
    /// Linear address of the page that the running block lies in.
    pub pc_base: u64,
    /// Return address of the last call to a stub: where its inline data is.
    pub ret_addr: u64,
    /// Scratch register T at the last exit; loaded again on entry.
    pub t: u64,
    /// Where to continue.
    pub cont: u64,
    /// Host stack pointer inside the entry stub.
    pub host_rsp: u64,
    /// Host pc of a fault in translated code, zero when none.
    pub fault_pc: u64,
    /// Scratch registers, EFLAGS, CR2, and exception number and error code at that fault.
    pub fault: Fault,
    /// Where to go on after a fault that was mended.
    pub fault_at: u64,
    /// [`crate::far::JUMP_MASK`], or 0 while the attention flag is up.
    pub jump_mask: AtomicU64,
    /// What is added to a linear address to get its host address, plus [`crate::window::SHIFT`], by kind of window.
    pub window_places: [u64; 2],
    /// This block's own address.
    pub this: u64,
    /// The flags of guest pages, [`crate::world::CodeMap`].
    pub code_map: u64,
    /// The running `run::Runner`, valid while `run` is on the stack.
    pub runner: u64,
    /// The indirect branch that led to the dispatcher, see [`branch_word`]; zero if it was direct.
    pub branch: u32,
    /// A native REP MOVS or STOS is under way, 0 when none: see [`repeat`].
    pub repeat: u32,
    /// Spill slots of emitted code.
    pub spill: [u64; 4],
    /// Spill slots of the page-crossing stubs.
    pub cross_spill: [u64; 3],
    /// Offset in its first page of the operand in `bounce`.
    pub cross_offset: u64,
    /// Host addresses of the two pages of a page-crossing write.
    pub cross_pages: [u64; 2],
    /// Where the lines of the page in a write to code are kept; zero for a page-crossing write.
    pub store_lines: u64,
    /// Which entry of the code-write TLB that write used, as a byte offset.
    pub store_entry: u64,
    /// The write's inline data.
    pub store_meta: u32,
    /// An operand that crosses a page: the end of the first page, then the start of the second.
    pub bounce: Bounce,
    /// Translation caches.
    pub caches: crate::tlb::Caches,
}

macro_rules! offsets {
    ($($name:ident = $($field:tt).+;)*) => {
        /// `gs` displacements of the fields.
        pub mod off {
            #![allow(missing_docs)]
            use super::*;
            $(pub const $name: i32 = offset_of!(VcpuMem, $($field).+) as i32;)*
        }
    };
}

offsets! {
    BRANCH = branch;
    GPR = cpu.gpr;
    RFLAGS = cpu.rflags;
    SEG = cpu.seg;
    XSAVE = cpu.xsave;
    TSC_OFFSET = cpu.tsc_offset;
    TSC_AUX = cpu.tsc_aux;
    KERNEL_GS_BASE = cpu.kernel_gs_base;
    ATTENTION = attention;
    IRQ_WINDOW = irq_window;
    FLAGS = flags;
    FPU_LOADED = fpu_loaded;
    FPU_RELOAD = fpu_reload;
    HOST_MXCSR = host_mxcsr;
    XSAVE_MASK = xsave_mask;
    CTX = ctx;
    PC_BASE = pc_base;
    RET_ADDR = ret_addr;
    T = t;
    CONT = cont;
    HOST_RSP = host_rsp;
    FAULT_T = fault.t;
    FAULT_I = fault.i;
    FAULT_FLAGS = fault.flags;
    FAULT_AT = fault_at;
    JUMP_MASK = jump_mask;
    WINDOW_PLACES = window_places;
    THIS = this;
    CODE_MAP = code_map;
    SPILL = spill;
    REPEAT = repeat;
    CROSS_SPILL = cross_spill;
    CROSS_OFFSET = cross_offset;
    CROSS_PAGES = cross_pages;
    STORE_LINES = store_lines;
    STORE_ENTRY = store_entry;
    STORE_META = store_meta;
    CODE_WRITES = caches.code_writes.entries;
    BOUNCE = bounce;
    TLB = caches.tlb;
    JUMPS = caches.jumps;
    JUMPS2 = caches.jumps2;
    SHADOW_RSP = caches.shadow.rsp;
    SHADOW_BASE = caches.shadow.base;
    SHADOW_LIMIT = caches.shadow.limit;
    SHADOW_EMPTY_TO = caches.shadow.empty_to;
}

/// Bits of [`VcpuMem::repeat`]. While it runs, RSI and RDI are host addresses, RCX counts what is left in the
/// page, T is the guest's RDI at its end, and `spill[2]` the guest's RSI there.
pub mod repeat {
    /// Always set.
    pub const ON: u32 = 1;
    /// MOVS: RSI moves too.
    pub const SOURCE: u32 = 2;
    /// There are more pages: `spill[0]` counts what is left behind this one.
    pub const PAGES: u32 = 4;
    /// log2 of the element's size, from this bit on.
    pub const SHIFT: u32 = 3;
}

/// `gs` displacement of a general register's slot.
pub fn gpr_slot(n: u8) -> i32 {
    off::GPR + 8 * i32::from(n)
}

/// `gs` displacement of a segment's base.
pub fn seg_base(n: usize) -> i32 {
    off::SEG
        + (n * size_of::<x86emu::state::Segment>()) as i32
        + offset_of!(x86emu::state::Segment, base) as i32
}

/// `gs` displacement of a segment's limit.
pub fn seg_limit(n: usize) -> i32 {
    off::SEG
        + (n * size_of::<x86emu::state::Segment>()) as i32
        + offset_of!(x86emu::state::Segment, limit) as i32
}

/// `gs` displacement of a segment's selector.
pub fn seg_selector(n: usize) -> i32 {
    off::SEG
        + (n * size_of::<x86emu::state::Segment>()) as i32
        + offset_of!(x86emu::state::Segment, selector) as i32
}

/// `gs` displacement of a TLB.
pub fn tlb_base(which: usize) -> i32 {
    off::TLB + (which * size_of::<[TlbEntry; TLB_ENTRIES]>()) as i32
}

/// `gs` displacement of a jump cache; there is one beside each TLB.
pub fn jumps_base(which: usize) -> i32 {
    off::JUMPS + (which * size_of::<[JumpEntry; JUMP_ENTRIES]>()) as i32
}

/// What is added to a move of RSP so that it is positive.
const BRANCH_BIAS: i32 = 16;

/// An indirect branch at page offset `offset` that has added `moved` (-8 to 65,543) to RSP, in a word that
/// is not zero.
pub fn branch_word(offset: u16, moved: i32) -> u32 {
    u32::from(offset & 0xfff) | ((moved + BRANCH_BIAS) as u32) << 12
}

/// Set in a [`far_branch_word`] only.
const FAR_BRANCH: u32 = 1 << 31;

/// An indirect branch at page offset `offset` of page number `page` of code with windows that has added `moved`, -8, 0 or
/// 8, to RSP.
pub fn far_branch_word(offset: u16, moved: i32, page: u16) -> u32 {
    let moved = ((moved / 8 + 1) as u32 & 3) << 28;
    FAR_BRANCH | moved | u32::from(page) << 12 | u32::from(offset & 0xfff)
}

/// Page offset, move of RSP and number of the page from a [`far_branch_word`], if it is one.
pub fn far_branch_of(word: u32) -> Option<(u32, i32, u16)> {
    let moved = ((word >> 28 & 3) as i32 - 1) * 8;
    (word & FAR_BRANCH != 0).then_some((word & 0xfff, moved, (word >> 12) as u16))
}

/// Page offset and move of RSP from a [`branch_word`].
pub fn branch_of(word: u32) -> (u32, i32) {
    (word & 0xfff, (word >> 12) as i32 - BRANCH_BIAS)
}

/// Index of a linear address in a TLB.
pub fn tlb_index(gva: u64) -> usize {
    (gva >> 12) as usize & (TLB_ENTRIES - 1)
}

/// Index of a linear address in a jump cache; emitted code computes the same.
pub fn jump_index(pc: u64) -> usize {
    (pc ^ pc.rotate_right(12)) as usize & (JUMP_ENTRIES - 1)
}

/// Index of a linear address in a second-level jump cache; emitted code computes the same.
pub fn jump2_index(pc: u64) -> usize {
    (pc.wrapping_mul(JUMP2_HASH as u64) >> JUMP2_SHIFT) as usize & (JUMP2_ENTRIES - 1)
}

/// `gs` displacement of a second-level jump cache.
pub fn jumps2_base(which: usize) -> i32 {
    off::JUMPS2 + (which * size_of::<[JumpEntry; JUMP2_ENTRIES]>()) as i32
}

impl TlbEntry {
    /// An entry that matches nothing, for index `i`.
    pub fn invalid(i: usize) -> Self {
        let tag = if i == 0 { 1 << 12 } else { 0 };
        TlbEntry {
            read: tag,
            write: tag,
            host: 0,
            gpa: 0,
        }
    }
}

impl JumpEntry {
    /// An empty entry, for index `i`.
    pub fn empty(i: usize) -> Self {
        JumpEntry {
            pc: if i == 0 { 1 << 12 } else { 0 },
            host: 0,
        }
    }
}

impl VcpuMem {
    /// After a host fault in a native REP MOVS or STOS: the guest's registers, as they are before the element
    /// that faulted.
    pub fn undo_repeat(&mut self) {
        use x86emu::state::gpr::{RCX, RDI, RSI};
        let word = std::mem::take(&mut self.repeat);
        if word == 0 {
            return;
        }
        let gpr = &mut self.cpu.gpr;
        let left = gpr[RCX] << (word >> repeat::SHIFT & 3);
        gpr[RDI] = self.t.wrapping_sub(left);
        if word & repeat::SOURCE != 0 {
            gpr[RSI] = self.spill[2].wrapping_sub(left);
        }
        if word & repeat::PAGES != 0 {
            gpr[RCX] = gpr[RCX].wrapping_add(self.spill[0]);
        }
    }

    /// RFLAGS with the arithmetic flags put back in.
    pub fn compose_flags(&mut self) {
        let f = u64::from(self.flags);
        self.cpu.rflags = self.cpu.rflags & !ARITH | (f >> 8) & 0xd5 | (f & 1) << 11;
    }

    /// Moves the arithmetic flags out of RFLAGS, as translated code expects them. RF goes: it holds for one
    /// instruction, and only instruction breakpoints, which are never armed here, look at it.
    pub fn split_flags(&mut self) {
        let f = self.cpu.rflags;
        self.flags = ((f & 0xd5) << 8 | (f >> 11) & 1) as u32;
        self.cpu.rflags = f & !ARITH & !rflags::RF | 2;
    }

    /// Raises the attention flag.
    pub fn raise_attention(&self) {
        self.attention
            .store(crate::far::ATTENTION_UP, Ordering::SeqCst);
        self.jump_mask.store(0, Ordering::SeqCst);
    }

    /// Lets jumps look into the jump cache again after the attention flag was lowered.
    pub fn settle(&self) {
        self.jump_mask
            .store(crate::far::JUMP_MASK, Ordering::SeqCst);
        // Whoever raises the flag writes it before the mask: either it is seen here, or the mask is cleared later.
        if self.attention.load(Ordering::SeqCst) != 0 {
            self.jump_mask.store(0, Ordering::SeqCst);
        }
    }

    /// The attention flag is raised.
    pub fn attention(&self) -> bool {
        self.attention.load(Ordering::Acquire) != 0
    }
}

/// CF, PF, AF, ZF, SF, OF.
pub use x86defs::rflags::STATUS as ARITH;
