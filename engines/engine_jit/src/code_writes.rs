//! Where emitted code may write to pages that hold code: a small TLB of its own.
//!
//! A write that finds its page here is done by a copy of the instruction behind the block. Afterwards it
//! looks at the page's lines, which are shared by all vCPUs: only if a translation depends on what was
//! written, a helper is called ([`crate::cache::Cache::changed`]).

use crate::layout::{TLB_KERNEL, TLB_USER};

/// Entries; a power of two.
pub const CODE_WRITES: usize = 64;

/// Writes to a page without translations after which it is taken for data.
const PATIENCE: u64 = 256;
/// Writes to a page with translations after which that is looked at again.
const REVIEW: u64 = 1 << 16;

/// One page.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CodeWrite {
    /// Linear page, with the software TLB it belongs to in the low bits.
    pub tag: u64,
    /// Host address of the page.
    pub host: u64,
    /// Address of its word of lines.
    pub lines: u64,
    /// Writes left until the helper is asked again.
    pub left: u64,
}

const EMPTY: CodeWrite = CodeWrite {
    tag: u64::MAX,
    host: 0,
    lines: 0,
    left: 0,
};

/// The entries of one vCPU.
#[derive(Debug)]
#[repr(C)]
pub struct CodeWrites {
    /// What emitted code looks at.
    pub entries: [CodeWrite; CODE_WRITES],
    gpa: [u64; CODE_WRITES],
    used: bool,
}

fn index(gva: u64) -> usize {
    (gva >> 12) as usize & (CODE_WRITES - 1)
}

impl CodeWrites {
    /// Drops everything.
    pub fn flush(&mut self) {
        if self.used {
            self.reset();
        }
    }

    /// Puts every entry to empty.
    pub fn reset(&mut self) {
        self.entries = [EMPTY; CODE_WRITES];
        self.used = false;
    }

    /// Drops the page of a linear address.
    pub fn flush_page(&mut self, gva: u64) {
        self.entries[index(gva)] = EMPTY;
    }

    /// The page of `gva` is known, and had no translations for as long as [`PATIENCE`] allows.
    pub fn exhausted(&self, which: usize, gva: u64) -> bool {
        let e = &self.entries[index(gva)];
        e.tag == gva & !0xfff | which as u64 && e.left > REVIEW
    }

    /// Enters a page. `code`: translations depend on it.
    pub fn fill(&mut self, which: usize, gva: u64, gpa: u64, host: u64, lines: u64, code: bool) {
        debug_assert!((TLB_USER..=TLB_KERNEL + 1).contains(&which));
        let i = index(gva);
        self.entries[i] = CodeWrite {
            tag: gva & !0xfff | which as u64,
            host,
            lines,
            left: if code { REVIEW } else { PATIENCE },
        };
        self.gpa[i] = gpa & !0xfff;
        self.used = true;
    }

    /// Guest-physical page of the entry at byte offset `at`.
    pub fn gpa(&self, at: u64) -> u64 {
        self.gpa[at as usize / size_of::<CodeWrite>() % CODE_WRITES]
    }
}
