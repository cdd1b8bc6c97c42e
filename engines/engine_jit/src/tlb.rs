//! The software TLBs, the jump caches and the code-page TLB of one vCPU.
//!
//! They are filled and flushed here, and the TLBs by emitted code too (`refill`). Records of what was
//! filled make a flush cost what it undoes.

use crate::code_writes::CodeWrites;
use crate::context::Context;
use crate::far::Far;
use crate::heat::Heat;
use crate::layout::{
    GROUP_SHIFT, JUMP_ENTRIES, JUMP2_ENTRIES, JumpEntry, TLB_ENTRIES, TLB_GROUPS, TLB_KERNEL,
    TLB_KERNEL_AC, TLB_USER, TlbEntry, jump_index, jump2_index, tlb_index,
};
use crate::refill::Structures;
use crate::shadow::Shadow;
use crate::window::Windows;
use x86emu::env::Flush;
use x86emu::paging::Mapping;

/// Entries of the code-page TLB.
const CODE_ENTRIES: usize = 1024;

/// Where a linear code page lies in guest-physical memory.
#[derive(Clone, Copy, Debug)]
struct CodeEntry {
    /// Linear page with bit 0 set for user mode and bit 1 always; 0 when empty.
    key: u64,
    /// Guest-physical page, bit 0: global.
    gpa: u64,
}

impl CodeEntry {
    /// Matches nothing, and is in the list of what was filled.
    const GONE: CodeEntry = CodeEntry { key: 4, gpa: 0 };
}

/// See the module's description.
#[repr(C)]
pub struct Caches {
    /// The software TLBs; see [`crate::layout::TLB_USER`] and its siblings.
    pub tlb: [[TlbEntry; TLB_ENTRIES]; 3],
    /// The jump caches, one beside each TLB; each holds code for one context at a time.
    pub jumps: [[JumpEntry; JUMP_ENTRIES]; 3],
    /// The second level of the jump caches, with another hash: what fell out of the first to another address
    /// of the same index is found here by emitted code.
    pub jumps2: [[JumpEntry; JUMP2_ENTRIES]; 3],
    /// The stacks of return addresses, flushed with the jump caches.
    pub shadow: Shadow,
    /// The context of the user's jump cache, and the family of the supervisor's.
    jump_ctx: [u32; 2],
    code: [CodeEntry; CODE_ENTRIES],
    /// Writes to pages that hold code.
    pub code_writes: CodeWrites,
    /// Indices of entries of `code` filled since they were last empty.
    code_filled: Vec<u16>,
    /// Groups of TLB entries filled since they were last empty, a bit each, per TLB: not global.
    pub filled: [[u64; TLB_GROUPS / 64]; 3],
    /// The same for global ones.
    pub filled_global: [[u64; TLB_GROUPS / 64]; 3],
    /// What emitted code fills the TLBs from.
    pub structures: Structures,
    /// What the host's MMU maps.
    pub windows: Windows,
    /// Which address spaces should have windows.
    pub heat: Heat,
    /// How code with windows jumps.
    pub far: Far,
    jumps_filled: [Vec<u16>; 3],
    jumps2_filled: [Vec<u16>; 3],
    /// One bit per hash of a page of 2 MiB, and of 1 GiB, that was cached since the last full flush.
    large: [[u64; 8]; 2],
    /// The user's, the supervisor's jump cache has entries for code that is not global.
    local_code: [bool; 2],
    /// One bit per hash of a linear page that has jump-cache entries.
    jump_pages: [u64; 16],
    /// TLB flushes since start, for statistics.
    pub flushes: u64,
    /// Jump-cache flushes since start, for statistics.
    pub jump_flushes: u64,
    /// Changes of a jump cache's context since start, for statistics.
    pub switches: u64,
}

/// Place of a large page in the filter. Pages of 4 MiB count as two of 2 MiB.
fn large_hash(gva: u64, page_bits: u8) -> (usize, u64) {
    let n = gva >> if page_bits > 22 { 30 } else { 21 };
    let h = (n ^ n >> 9) as usize & 511;
    (h / 64, 1 << (h % 64))
}

fn page_hash(gva: u64) -> (usize, u64) {
    let h = ((gva >> 12) ^ (gva >> 22)) as usize & 1023;
    (h / 64, 1 << (h % 64))
}

impl Caches {
    /// Initializes memory that was just allocated and zeroed.
    ///
    /// # Safety
    /// `this` is valid for writes, and nothing else refers to it.
    #[expect(unsafe_code, reason = "too large to be built on the stack and moved")]
    pub unsafe fn init(this: *mut Caches, shadow: Shadow, lost: u64) {
        // SAFETY: the caller's promise. The vectors are written before a reference is made; all
        // other fields are integers, valid as zero.
        unsafe {
            (&raw mut (*this).code_filled).write(Vec::new());
            (&raw mut (*this).jumps_filled).write(Default::default());
            (&raw mut (*this).jumps2_filled).write(Default::default());
            (&raw mut (*this).shadow).write(shadow);
            (&raw mut (*this).windows).write(Windows::default());
            (&raw mut (*this).heat).write(Heat::default());
            Far::init(&raw mut (*this).far, lost);
            for which in 0..3 {
                (*this).tlb[which][0] = TlbEntry::invalid(0);
                (*this).jumps[which][0] = JumpEntry::empty(0);
                (*this).jumps2[which][0] = JumpEntry::empty(0);
            }
            (*this).jump_ctx = [u32::MAX; 2];
            (*this).code_writes.reset();
        }
    }

    /// The entry that a linear address would use.
    pub fn entry(&self, which: usize, gva: u64) -> &TlbEntry {
        &self.tlb[which][tlb_index(gva)]
    }

    /// Enters a translation. `writable`: writes need no further notice.
    pub fn fill(&mut self, which: usize, gva: u64, mapping: &Mapping, host: u64, writable: bool) {
        let (gpa, global) = (mapping.gpa, mapping.global);
        let page = gva & !0xfff;
        let i = tlb_index(gva);
        let invalid = TlbEntry::invalid(i);
        let e = &mut self.tlb[which][i];
        let keep_write = e.read == page && e.host == host;
        let write = match (writable, keep_write) {
            (true, _) => page,
            (false, true) => e.write,
            (false, false) => invalid.write,
        };
        if !keep_write {
            let record = if global {
                &mut self.filled_global[which]
            } else {
                &mut self.filled[which]
            };
            record[i >> GROUP_SHIFT >> 6] |= 1 << (i >> GROUP_SHIFT & 63);
        }
        *e = TlbEntry {
            read: page,
            write,
            host,
            gpa: gpa & !0xfff | u64::from(global),
        };
        self.note_large(gva, mapping.page_bits);
    }

    /// Enters the code for a linear address.
    pub fn fill_jump(&mut self, ctx: Context, pc: u64, host: u64) {
        let u = ctx.tlb();
        if ctx.windows() {
            self.far.fill(pc, host);
        } else {
            let i = jump_index(pc);
            if self.jumps[u][i].host == 0 {
                self.jumps_filled[u].push(i as u16);
            }
            self.jumps[u][i] = JumpEntry { pc, host };
        }
        let i = jump2_index(pc);
        if self.jumps2[u][i].host == 0 {
            self.jumps2_filled[u].push(i as u16);
        }
        self.jumps2[u][i] = JumpEntry { pc, host };
        self.note_jump_page(pc);
    }

    /// The indirect entry of the code for a linear address, if it is known.
    pub fn jump(&self, ctx: Context, pc: u64) -> Option<u64> {
        let u = ctx.tlb();
        if ctx.windows()
            && let Some(host) = self.far.jump(pc)
        {
            return Some(host);
        }
        [
            &self.jumps[u][jump_index(pc)],
            &self.jumps2[u][jump2_index(pc)],
        ]
        .into_iter()
        .find(|e| e.pc == pc && e.host != 0)
        .map(|e| e.host)
    }

    /// Jump-cache entries depend on the page of `gva`.
    pub fn note_jump_page(&mut self, gva: u64) {
        let (w, b) = page_hash(gva);
        self.jump_pages[w] |= b;
    }

    /// The guest-physical page of a linear code page, if it is known.
    pub fn code_page(&self, user: bool, gva: u64) -> Option<u64> {
        let key = gva & !0xfff | 2 | u64::from(user);
        let e = &self.code[(gva >> 12) as usize & (CODE_ENTRIES - 1)];
        (e.key == key).then_some(e.gpa & !0xfff)
    }

    /// Remembers where a linear code page lies.
    pub fn fill_code(&mut self, user: bool, gva: u64, mapping: &Mapping) {
        let i = (gva >> 12) as usize & (CODE_ENTRIES - 1);
        if self.code[i].key == 0 {
            self.code_filled.push(i as u16);
        }
        self.code[i] = CodeEntry {
            key: gva & !0xfff | 2 | u64::from(user),
            gpa: mapping.gpa & !0xfff | u64::from(mapping.global),
        };
        self.local_code[usize::from(!user)] |= !mapping.global;
        self.note_large(gva, mapping.page_bits);
    }

    fn note_large(&mut self, gva: u64, page_bits: u8) {
        if page_bits > 12 {
            let (w, b) = large_hash(gva, page_bits);
            self.large[usize::from(page_bits > 22)][w] |= b;
        }
    }

    /// A page larger than 4 KiB that covers `gva` may be cached.
    fn covered_by_large(&self, gva: u64) -> bool {
        [21, 30].into_iter().enumerate().any(|(i, bits)| {
            let (w, b) = large_hash(gva, bits);
            self.large[i][w] & b != 0
        })
    }

    /// Carries out a flush. Only the current PCID is cached, so the PCID of a request is not looked at.
    pub fn flush(&mut self, what: Flush) {
        match what {
            Flush::All => {
                self.structures.flush_ram();
                self.flush_data(true);
                self.flush_code();
            }
            Flush::NonGlobal | Flush::Pcid(_) => self.flush_non_global(),
            Flush::Page(gva) | Flush::PcidPage(_, gva) => self.flush_page(gva),
        }
    }

    /// Guest-physical addresses mean other memory, or the state was replaced: drops everything.
    pub fn flush_memory(&mut self) {
        self.flush(Flush::All);
        self.windows.forget_memory();
    }

    /// Drops what a MOV CR3 drops.
    pub fn flush_non_global(&mut self) {
        self.flush_data(false);
        self.flush_jumps(TLB_USER);
        self.local_code[0] = false;
        if self.local_code[1] {
            self.flush_jumps(TLB_KERNEL);
            self.flush_jumps(TLB_KERNEL_AC);
            self.local_code[1] = false;
        }
        let code = &mut self.code;
        self.code_filled.retain(|&i| {
            let e = &mut code[usize::from(i)];
            if e.gpa & 1 == 0 {
                e.key = 0;
            }
            e.key != 0
        });
    }

    fn flush_data(&mut self, global: bool) {
        self.flushes += 1;
        self.windows.flush();
        self.structures.flush();
        self.code_writes.flush();
        for which in 0..3 {
            let tlb = &mut self.tlb[which];
            let mut empty = |record: &mut [u64]| {
                for (w, bits) in record.iter_mut().enumerate() {
                    let mut left = std::mem::take(bits);
                    while left != 0 {
                        let group = w * 64 + left.trailing_zeros() as usize;
                        left &= left - 1;
                        let first = group << GROUP_SHIFT;
                        let entries = &mut tlb[first..first + (1 << GROUP_SHIFT)];
                        for (i, e) in entries.iter_mut().enumerate() {
                            // An entry may have been replaced by a global one since.
                            if global || e.gpa & 1 == 0 {
                                *e = TlbEntry::invalid(first + i);
                            }
                        }
                    }
                }
            };
            empty(&mut self.filled[which]);
            if global {
                empty(&mut self.filled_global[which]);
            }
        }
        if global {
            self.large = [[0; 8]; 2];
        }
    }

    /// Code of context `ctx` is about to run. The jump caches of the supervisor serve one family of
    /// contexts at a time, as STAC and CLAC go from one to the other in emitted code.
    pub fn enter_context(&mut self, ctx: Context) {
        self.shadow.select(ctx.user(), ctx.windows());
        if ctx.user() {
            if self.jump_ctx[0] != ctx.0 {
                self.switches += 1;
                self.flush_jumps(TLB_USER);
                self.jump_ctx[0] = ctx.0;
            }
        } else if self.jump_ctx[1] != ctx.family().0 {
            self.switches += 1;
            self.flush_jumps(TLB_KERNEL);
            self.flush_jumps(TLB_KERNEL_AC);
            self.jump_ctx[1] = ctx.family().0;
        }
    }

    fn flush_jumps(&mut self, u: usize) {
        for &i in &self.jumps_filled[u] {
            self.jumps[u][usize::from(i)] = JumpEntry::empty(usize::from(i));
        }
        self.jumps_filled[u].clear();
        for &i in &self.jumps2_filled[u] {
            self.jumps2[u][usize::from(i)] = JumpEntry::empty(usize::from(i));
        }
        self.jumps2_filled[u].clear();
        if u == TLB_USER {
            self.far.flush();
        }
        self.shadow.reset(u == TLB_USER);
    }

    /// Drops the jump caches and the code-page TLB.
    pub fn flush_code(&mut self) {
        self.jump_flushes += 1;
        self.code_writes.flush();
        for u in 0..3 {
            self.flush_jumps(u);
        }
        for i in self.code_filled.drain(..) {
            self.code[usize::from(i)].key = 0;
        }
        self.local_code = [false; 2];
        self.jump_pages = [0; 16];
    }

    fn flush_page(&mut self, gva: u64) {
        self.structures.flush();
        if self.covered_by_large(gva) {
            // The page may be part of a larger one, of which other 4 KiB pieces are cached.
            self.flush_data(true);
            self.flush_code();
            return;
        }
        let i = tlb_index(gva);
        self.code_writes.flush_page(gva);
        self.windows.flush_page(gva);
        for which in 0..3 {
            let e = &mut self.tlb[which][i];
            if e.read == gva & !0xfff || e.write == gva & !0xfff {
                *e = TlbEntry::invalid(i);
            }
        }
        let (w, b) = page_hash(gva);
        if self.jump_pages[w] & b != 0 {
            self.flush_code();
        } else {
            let e = &mut self.code[(gva >> 12) as usize & (CODE_ENTRIES - 1)];
            if e.key & 2 != 0 && e.key & !0xfff == gva & !0xfff {
                *e = CodeEntry::GONE;
            }
        }
    }

    /// Makes writes to a guest-physical page take the slow path again.
    pub fn unwrite(&mut self, gpa: u64) {
        self.unwrite_range(gpa & !0xfff, 4096);
    }

    /// Makes writes to a guest-physical range take the slow path again.
    pub fn unwrite_range(&mut self, gpa: u64, len: u64) {
        self.code_writes.flush();
        self.windows.unwrite(gpa, len);
        for which in TLB_USER..3 {
            for w in 0..TLB_GROUPS / 64 {
                let mut left = self.filled[which][w] | self.filled_global[which][w];
                while left != 0 {
                    let first = (w * 64 + left.trailing_zeros() as usize) << GROUP_SHIFT;
                    left &= left - 1;
                    for i in first..first + (1 << GROUP_SHIFT) {
                        let e = &mut self.tlb[which][i];
                        if (e.gpa & !0xfff).wrapping_sub(gpa) < len {
                            e.write = TlbEntry::invalid(i).write;
                        }
                    }
                }
            }
        }
    }
}
