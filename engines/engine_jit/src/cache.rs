//! The code cache: translations by guest-physical address and context, and the pages they came from.

use crate::arena::Arena;
use crate::perf::Log;
use crate::stubs::Stubs;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A hash for small integer keys.
#[derive(Default)]
pub struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }
    fn write_u64(&mut self, n: u64) {
        let x = (self.0.rotate_left(26) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = x ^ x >> 32;
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<IntHasher>>;

/// One translation.
#[derive(Debug)]
pub struct Block {
    /// Guest-physical address of the first instruction.
    pub phys: u64,
    /// Context it was made for.
    pub ctx: u32,
    /// Entry for jumps that carry the linear address in T and the flags in memory.
    pub indirect: u64,
    /// Entry for linked jumps: flags in EFLAGS if `live_in`.
    pub direct: u64,
    /// Entry for linked jumps from code that has the FPU loaded.
    pub direct_fpu: u64,
    /// End of its code.
    pub end: u64,
    /// It reads flags that it has not written.
    pub live_in: bool,
    /// It needs the guest's FPU state loaded.
    pub fpu: bool,
    /// Which 64-byte lines of the page it depends on.
    pub lines: u64,
    /// Page number and lines of the second page, for an instruction that crosses the page end. Such a
    /// block is reached only through the jump cache.
    pub second: Option<(u64, u64)>,
    /// Its code was overwritten with an exit.
    pub dead: bool,
    /// Host offset from `indirect` and guest page offset of each instruction.
    pub map: Box<[(u32, u16)]>,
}

/// A guest page that translations came from.
#[derive(Debug)]
struct CodePage {
    /// Lines that `bytes` holds.
    lines: u64,
    /// The bytes as they were translated.
    bytes: Box<[u8; 4096]>,
    blocks: Vec<u32>,
}

/// All translations of a virtual machine.
pub struct Cache {
    /// Where the code lies.
    pub arena: Arena,
    /// Fixed code at its start.
    pub stubs: Stubs,
    stubs_end: usize,
    blocks: Vec<Block>,
    map: Map<(u64, u32), u32>,
    pages: Map<u64, CodePage>,
    /// Counts invalidations; a vCPU that sees it change must not go back into the block it left.
    epoch: Arc<AtomicU64>,
    /// Blocks translated since start.
    pub translated: u64,
    /// For profilers.
    pub perf: Option<Box<Log>>,
}

/// Lines of a page that `[start, start + len)` touches.
pub fn lines_of(start: usize, len: usize) -> u64 {
    let first = start / 64;
    let last = (start + len.max(1) - 1).min(4095) / 64;
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

impl Cache {
    /// An empty cache whose arena already holds `stubs`.
    pub fn new(arena: Arena, stubs: Stubs, epoch: Arc<AtomicU64>) -> Self {
        let stubs_end = arena.used();
        let perf = Log::from_environment(&stubs, arena.next());
        Cache {
            arena,
            stubs,
            stubs_end,
            blocks: Vec::new(),
            map: Map::default(),
            pages: Map::default(),
            epoch,
            translated: 0,
            perf,
        }
    }

    /// A live translation.
    pub fn find(&self, phys: u64, ctx: u32) -> Option<&Block> {
        self.map
            .get(&(phys, ctx))
            .and_then(|&i| self.blocks.get(i as usize))
    }

    /// The block whose code contains host address `pc`.
    pub fn block_at(&self, pc: u64) -> Option<&Block> {
        let i = self
            .blocks
            .partition_point(|b| b.indirect <= pc)
            .checked_sub(1)?;
        let b = &self.blocks[i];
        (pc < b.end).then_some(b)
    }

    /// Bytes and lines of a page that translations depend on.
    pub fn page_lines(&self, gfn: u64) -> u64 {
        self.pages.get(&gfn).map_or(0, |p| p.lines)
    }

    /// Enters a translation made from `page`, the bytes of its guest page, and `second`, the start of
    /// the next one where it reaches there.
    pub fn insert(&mut self, block: Block, page: &[u8], second: &[u8]) {
        self.translated += 1;
        let i = self.blocks.len() as u32;
        self.cover(block.phys >> 12, block.lines, page, i);
        if let Some((gfn, lines)) = block.second {
            self.cover(gfn, lines, second, i);
        }
        self.map.insert((block.phys, block.ctx), i);
        self.blocks.push(block);
    }

    fn cover(&mut self, gfn: u64, lines: u64, bytes: &[u8], block: u32) {
        let p = self.pages.entry(gfn).or_insert_with(|| CodePage {
            lines: 0,
            bytes: Box::new([0; 4096]),
            blocks: Vec::new(),
        });
        for line in (0..64).filter(|line| lines & (1 << line) != 0) {
            if let Some(from) = bytes.get(line * 64..line * 64 + 64) {
                p.bytes[line * 64..][..64].copy_from_slice(from);
            }
        }
        p.lines |= lines;
        p.blocks.push(block);
    }

    /// Lines whose bytes, as `read` copies them by number, differ from what was translated.
    pub fn stale_lines(&self, gfn: u64, mut read: impl FnMut(usize, &mut [u8; 64])) -> u64 {
        let Some(p) = self.pages.get(&gfn) else {
            return 0;
        };
        let (mut stale, mut left) = (0, p.lines);
        let mut now = [0; 64];
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            left &= left - 1;
            read(line, &mut now);
            if p.bytes[line * 64..][..64] != now {
                stale |= 1 << line;
            }
        }
        stale
    }

    /// Kills every translation of the page that depends on one of `lines`. Other vCPUs may be executing
    /// them; they leave at the next entry. False if the arena is full: then everything must go.
    pub fn kill(&mut self, gfn: u64, lines: u64) -> bool {
        let Some(p) = self.pages.get_mut(&gfn) else {
            return true;
        };
        if p.lines & lines == 0 {
            return true;
        }
        self.epoch.fetch_add(1, Ordering::AcqRel);
        let mut room = true;
        let mut left = 0;
        let mut keep = Vec::new();
        for i in std::mem::take(&mut p.blocks) {
            let b = &mut self.blocks[i as usize];
            let on_page = match b.second {
                Some((second, lines)) if second == gfn => lines,
                _ => b.lines,
            };
            if b.dead {
                continue;
            }
            if on_page & lines == 0 {
                left |= on_page;
                keep.push(i);
                continue;
            }
            b.dead = true;
            if self.map.get(&(b.phys, b.ctx)) == Some(&i) {
                self.map.remove(&(b.phys, b.ctx));
            }
            room &= bury(&mut self.arena, &self.stubs, b);
        }
        p.blocks = keep;
        p.lines = left;
        if left == 0 {
            self.pages.remove(&gfn);
        }
        room
    }

    /// Whether a page holds translations.
    pub fn has_code(&self, gfn: u64) -> bool {
        self.pages.contains_key(&gfn)
    }

    /// Drops everything. No vCPU may be in translated code, nor come back to a place in it.
    pub fn clear(&mut self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.blocks.clear();
        self.map.clear();
        self.pages.clear();
        self.arena.truncate(self.stubs_end);
    }

    /// Redirects the linked entry `at` of a dead block to the block that took its place, whose indirect
    /// entry is `indirect`.
    pub fn heal(&mut self, at: u64, indirect: u64) {
        let Some(old) = self.block_at(at).filter(|b| b.dead) else {
            return;
        };
        let (phys, live_in) = (old.phys, old.live_in);
        let fpu_entry = at == old.direct_fpu && old.direct != old.direct_fpu;
        let Some(new) = self.block_at(indirect) else {
            return;
        };
        // Who linked to the old block has the flags in EFLAGS only if that one wanted them.
        let wrong_flags = new.live_in && !live_in;
        if new.dead || wrong_flags || new.phys != phys || new.indirect != indirect {
            return;
        }
        let to = if fpu_entry {
            new.direct_fpu
        } else {
            new.direct
        };
        self.arena.patch_word(at, &jump(at, to));
    }

    /// Guest page numbers that hold translations.
    pub fn gfns(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }
}

/// `jmp to`, at `at`.
fn jump(at: u64, to: u64) -> [u8; 5] {
    let d = (to.wrapping_sub(at + 5) as u32).to_le_bytes();
    [0xe9, d[0], d[1], d[2], d[3]]
}

/// Turns a block's entries into jumps to exits. Each entry is one instruction of five bytes or more that
/// starts an aligned word, so one store does it while other vCPUs execute there. False if there
/// is no room for the exits.
fn bury(arena: &mut Arena, stubs: &Stubs, b: &Block) -> bool {
    // T has the linear address here.
    arena.patch_word(b.indirect, &jump(b.indirect, stubs.jump));
    let second = (b.direct_fpu != b.direct).then_some(b.direct_fpu);
    for at in [Some(b.direct), second].into_iter().flatten() {
        let mut a = crate::asm::Asm::new(arena.next());
        if b.live_in {
            crate::flags::save(&mut a);
        }
        a.call_to(stubs.dead);
        a.d32((b.phys & 0xfff) as u32);
        a.bytes(&at.to_le_bytes());
        let Some(exit) = arena.push(&a.buf) else {
            return false;
        };
        arena.patch_word(at, &jump(at, exit));
    }
    true
}
