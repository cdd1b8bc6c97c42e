//! The code cache: translations by guest-physical address and context, and the pages they came from.

use crate::arena::Arena;
use crate::block::{Block, Notes, Translation};
use crate::code_page::{CodePage, fold};
use crate::context::Context;
use crate::lookup::Lookup;
use crate::perf::Log;
use crate::stubs::Stubs;
use crate::translate::Site;
use std::collections::{HashMap, HashSet};
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

/// A linked jump to a block.
#[derive(Clone, Copy, Debug)]
struct Link {
    /// Offset in the arena of its displacement.
    site: u32,
    /// The displacement that leads to the exit which links it.
    exit: u32,
    /// The next one to the same block.
    next: u32,
}

const NO_LINK: Link = Link {
    site: 0,
    exit: 0,
    next: 0,
};

/// Writes by the interpreter to a page of code after which it is taken for data.
const PATIENCE: u32 = 256;

/// Bytes of a page that have changed.
struct Changes {
    /// Lines in which any have.
    lines: u64,
    /// One bit per byte, for those lines.
    bytes: [u64; 64],
}

/// All translations of a virtual machine.
pub struct Cache {
    /// Where the code lies.
    pub arena: Arena,
    /// Fixed code at its start.
    pub stubs: Stubs,
    stubs_end: usize,
    blocks: Vec<Block>,
    notes: Notes,
    /// Linked jumps; the first is no jump, but the first that is free.
    links: Vec<Link>,
    /// Live translations by address and context.
    map: Lookup,
    pages: Map<u64, CodePage>,
    /// Counts invalidations; a vCPU that sees it change must not go back into the block it left.
    epoch: Arc<AtomicU64>,
    /// Blocks translated since start.
    pub translated: u64,
    /// For profilers.
    pub perf: Option<Box<Log>>,
    /// Blocks changed in place since start.
    pub patched: u64,
    /// Room for the guest's bytes while they are translated.
    pub pages_read: Vec<u8>,
    doomed: Vec<u32>,
    /// Room for [`Cache::changed`].
    changes: Box<Changes>,
    /// Addresses of blocks whose writes have copies.
    copies: HashSet<u64, BuildHasherDefault<IntHasher>>,
    /// How accesses go that their windows do not suit: by guest-physical address of the instruction and context's
    /// low window.
    sites: Map<(u64, bool), Site>,
    /// Exits of jumps through slots, by slot; see [`crate::far`].
    pub fars: Vec<u64>,
    /// Numbers of pages of code with windows.
    numbers: Map<u64, u16>,
}

/// Sites that are remembered.
const MAX_SITES: usize = 1 << 16;

/// Lines of a page that `[start, start + len)` touches.
pub fn lines_of(start: usize, len: usize) -> u64 {
    let first = start / 64;
    let last = (start + len.max(1) - 1).min(4095) / 64;
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

/// Bits of the bytes `[start, end)` of a page that lie in a line.
fn bytes_in(line: usize, start: usize, end: usize) -> u64 {
    let from = start.max(line * 64) - line * 64;
    let to = end.min(line * 64 + 64).saturating_sub(line * 64);
    if from >= to {
        return 0;
    }
    u64::MAX >> (64 - (to - from)) << from
}

/// Bits of the bytes in which two lines differ.
fn difference(a: &[u8; 64], b: &[u8; 64]) -> u64 {
    let mut bits = 0;
    for (i, (a, b)) in a.chunks_exact(8).zip(b.chunks_exact(8)).enumerate() {
        if a != b {
            for (j, (a, b)) in a.iter().zip(b).enumerate() {
                bits |= u64::from(a != b) << (i * 8 + j);
            }
        }
    }
    bits
}

/// What a change of code means for a block.
#[derive(PartialEq, Eq)]
enum Verdict {
    /// It does not depend on what has changed.
    Keep,
    /// Only immediates have changed.
    Patch,
    Kill,
}

impl Changes {
    fn lines(&self) -> impl Iterator<Item = usize> + use<> {
        let mut left = self.lines;
        std::iter::from_fn(move || {
            let line = (left != 0).then_some(left.trailing_zeros() as usize);
            left &= left.wrapping_sub(1);
            line
        })
    }

    fn any(&self, start: u16, end: u16) -> bool {
        self.lines()
            .any(|l| self.bytes[l] & bytes_in(l, start.into(), end.into()) != 0)
    }

    fn verdict(&self, b: &Block, notes: &Notes, gfn: u64) -> Verdict {
        if b.phys >> 12 != gfn || notes.second(b).is_some_and(|s| s.0 == gfn) {
            return Verdict::Kill;
        }
        if notes.peeked(b).any(|(start, end)| self.any(start, end)) {
            return Verdict::Kill;
        }
        let start = usize::from(b.phys as u16 & 0xfff);
        let mut verdict = Verdict::Keep;
        for line in self.lines() {
            let mut changed = self.bytes[line] & bytes_in(line, start, b.stop.into());
            if changed == 0 {
                continue;
            }
            for i in notes.imms(b) {
                let bits = bytes_in(line, i.off.into(), usize::from(i.off) + usize::from(i.len));
                // A store beyond a line of host code would be seen in parts.
                let at = (b.indirect + u64::from(i.host)) % 64;
                if changed & bits != 0 && at + u64::from(i.len) > 64 {
                    return Verdict::Kill;
                }
                changed &= !bits;
            }
            if changed != 0 {
                return Verdict::Kill;
            }
            verdict = Verdict::Patch;
        }
        verdict
    }
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
            notes: Notes::default(),
            links: vec![NO_LINK],
            map: Lookup::default(),
            pages: Map::default(),
            epoch,
            translated: 0,
            perf,
            patched: 0,
            pages_read: Vec::new(),
            doomed: Vec::new(),
            changes: Box::new(Changes {
                lines: 0,
                bytes: [0; 64],
            }),
            copies: HashSet::default(),
            sites: Map::default(),
            fars: Vec::new(),
            numbers: Map::default(),
        }
    }

    /// A live translation.
    pub fn find(&self, phys: u64, ctx: u32) -> Option<&Block> {
        self.blocks.get(self.find_index(phys, ctx)? as usize)
    }

    fn find_index(&self, phys: u64, ctx: u32) -> Option<u32> {
        self.map.get(hash(phys, ctx), |i| {
            let b = &self.blocks[i as usize];
            (b.phys, b.ctx) == (phys, ctx)
        })
    }

    /// Page number and lines of the second page that a block depends on.
    pub fn second(&self, block: &Block) -> Option<(u64, u64)> {
        self.notes.second(block)
    }

    /// The word of [`crate::block::Translation::map`] for the code at `pc`.
    pub fn instruction_at(&self, pc: u64) -> Option<u16> {
        self.notes.instruction(self.block_at(pc)?, pc)
    }

    /// The number of the block whose code contains host address `pc`.
    pub fn index_at(&self, pc: u64) -> Option<usize> {
        let i = self
            .blocks
            .partition_point(|b| b.indirect <= pc)
            .checked_sub(1)?;
        (pc < self.blocks[i].end()).then_some(i)
    }

    /// The block whose code contains host address `pc`.
    pub fn block_at(&self, pc: u64) -> Option<&Block> {
        self.index_at(pc).map(|i| &self.blocks[i])
    }

    /// Lines of a page that translations depend on.
    pub fn page_lines(&self, gfn: u64) -> u64 {
        self.pages.get(&gfn).map_or(0, CodePage::lines)
    }

    /// Where the lines of a page that translations depend on are kept. The address holds until
    /// [`Cache::clear`].
    pub fn lines_address(&mut self, gfn: u64) -> *const AtomicU64 {
        let page = self.pages.entry(gfn).or_default();
        &raw const *page.lines
    }

    /// Declares that a translation is about to depend on `lines`: from here on whoever writes there
    /// comes to [`Cache::changed`] afterwards, so bytes that are read now are either the last or found to
    /// be stale.
    pub fn watch(&mut self, gfn: u64, lines: u64) {
        let page = self.pages.entry(gfn).or_default();
        page.watched |= lines;
        page.lines.fetch_or(lines, Ordering::SeqCst);
    }

    /// Enters a translation made from `page`, the bytes of its guest page, and `second`, the start of
    /// the next one where it reaches there.
    pub fn insert(&mut self, new: &Translation, page: &[u8], second: &[u8]) -> &Block {
        self.translated += 1;
        self.cover(new.phys >> 12, new.lines, page);
        if let Some((gfn, lines)) = new.second {
            self.cover(gfn, lines, second);
        }
        if let Some(old) = self.find_index(new.phys, new.ctx) {
            // It crosses into another second page.
            self.kill(old);
        }
        let i = self.blocks.len();
        let first = Some((new.phys >> 12, new.lines));
        for (gfn, lines) in [first, new.second].into_iter().flatten() {
            if let Some(p) = self.pages.get_mut(&gfn) {
                p.blocks.push((i as u32, fold(lines)));
                p.watched = 0;
            }
        }
        self.blocks.push(self.notes.add(new));
        self.map.insert(i as u32, |i| {
            let b = &self.blocks[i as usize];
            hash(b.phys, b.ctx)
        });
        &self.blocks[i]
    }

    /// Keeps the bytes of lines that a new translation depends on. Older ones that depend on other
    /// bytes there go.
    fn cover(&mut self, gfn: u64, lines: u64, bytes: &[u8]) {
        self.watch(gfn, lines);
        if let Some(p) = self.pages.get_mut(&gfn) {
            p.hold(lines);
        }
        self.changed(gfn, lines, |line, now| {
            if let Some(from) = bytes.get(line * 64..line * 64 + 64) {
                now.copy_from_slice(from);
            }
        });
    }

    /// Counts a write by the interpreter to a page of code. After many the page's translations go: it has become
    /// a stack, most likely, of which only some lines are written. True if it may be taken for data.
    pub fn interpreted_write(&mut self, gfn: u64) -> bool {
        let Some(p) = self.pages.get_mut(&gfn) else {
            return false;
        };
        p.interpreted += 1;
        if p.interpreted < PATIENCE {
            return false;
        }
        p.interpreted = 0;
        for (i, _) in std::mem::take(&mut p.blocks) {
            self.kill(i);
        }
        self.recount(gfn);
        self.page_lines(gfn) == 0
    }

    /// Nothing that translations of a page depend on has changed: `same` compares known bytes at an offset
    /// with the page as it is now.
    pub fn holds(&self, gfn: u64, same: impl Fn(usize, &[u8]) -> bool) -> bool {
        let Some(p) = self.pages.get(&gfn) else {
            return true;
        };
        let mut left = p.known();
        while left != 0 {
            let first = left.trailing_zeros();
            let count = (left >> first).trailing_ones();
            left &= u64::MAX.checked_shl(first + count).unwrap_or(0);
            let (start, len) = (first as usize * 64, count as usize * 64);
            if !p.bytes(start, len).is_some_and(|known| same(start, known)) {
                return false;
            }
        }
        true
    }

    /// Bytes in `lines` of a page may have changed: `read` copies a line as it is now, by number.
    /// Translations that depend on a byte that is another one now are changed in place, or killed. Other
    /// vCPUs may be executing them; they leave at the next entry.
    pub fn changed(&mut self, gfn: u64, lines: u64, mut read: impl FnMut(usize, &mut [u8; 64])) {
        let Some(p) = self.pages.get_mut(&gfn) else {
            return;
        };
        let changes = &mut *self.changes;
        changes.lines = 0;
        let mut left = p.known() & lines;
        let mut now = [0; 64];
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            left &= left - 1;
            let Some(known) = p.line(line) else {
                break;
            };
            now.copy_from_slice(known);
            read(line, &mut now);
            if *known != now {
                changes.lines |= 1 << line;
                changes.bytes[line] = difference(known, &now);
                *known = now;
            }
        }
        if changes.lines == 0 {
            return;
        }
        let mut doomed = std::mem::take(&mut self.doomed);
        for &(i, lines) in &p.blocks {
            if lines & fold(changes.lines) == 0 {
                continue;
            }
            let Some(b) = self.blocks.get(i as usize) else {
                continue;
            };
            match changes.verdict(b, &self.notes, gfn) {
                Verdict::Keep => {}
                Verdict::Kill => doomed.push(i),
                Verdict::Patch => {
                    self.patched += 1;
                    for imm in self.notes.imms(b) {
                        let (off, len) = (usize::from(imm.off), usize::from(imm.len));
                        let at = b.indirect + u64::from(imm.host);
                        if let Some(bytes) = p.bytes(off, len)
                            && changes.any(imm.off, imm.off + u16::from(imm.len))
                        {
                            self.arena.patch(at, bytes);
                        }
                    }
                }
            }
        }
        doomed.dedup();
        for i in doomed.drain(..) {
            self.kill(i);
        }
        self.doomed = doomed;
    }

    /// The number of a page of code with windows. `None`: there are no more.
    pub fn number(&mut self, gfn: u64) -> Option<u16> {
        let next = self.numbers.len();
        if let Some(&n) = self.numbers.get(&gfn) {
            return Some(n);
        }
        let n = u16::try_from(next).ok()?;
        self.numbers.insert(gfn, n);
        Some(n)
    }

    /// The number of the page of a block with windows.
    pub fn number_of(&self, b: &Block) -> u16 {
        self.numbers.get(&(b.phys >> 12)).copied().unwrap_or(0)
    }

    /// How the accesses of an instruction go, if that was learned.
    pub fn site(&self, phys: u64, low: bool) -> Option<Site> {
        self.sites.get(&(phys, low)).copied()
    }

    /// Remembers how the accesses of an instruction go.
    pub fn learn(&mut self, phys: u64, low: bool, site: Site) {
        if self.sites.len() >= MAX_SITES {
            self.sites.clear();
        }
        self.sites.insert((phys, low), site);
    }

    /// Takes a block out of use.
    pub fn kill(&mut self, i: u32) {
        let b = &mut self.blocks[i as usize];
        if b.dead() {
            return;
        }
        self.epoch.fetch_add(1, Ordering::AcqRel);
        b.die();
        let mut link = std::mem::take(&mut b.links);
        let b = *b;
        self.map.remove(hash(b.phys, b.ctx), i);
        // Each entry is one instruction of five bytes or more that starts an aligned word, so one store
        // does it while other vCPUs execute there.
        if Context(b.ctx).windows() {
            // Its links are all that leads elsewhere.
            let entry = b.indirect + crate::far::ENTRY as u64;
            let dead = to(0xe8, entry, self.stubs.dead_flags);
            self.arena.patch_word(entry, &dead);
        } else {
            // At the first one T has the linear address.
            let lost = to(0xe9, b.indirect, self.stubs.jump);
            self.arena.patch_word(b.indirect, &lost);
            let dead = if b.live_in() {
                self.stubs.dead_flags
            } else {
                self.stubs.dead
            };
            for entry in [b.direct(), b.direct_fpu()] {
                self.arena.patch_word(entry, &to(0xe8, entry, dead));
            }
        }
        // Those that lie in dead blocks too: nobody comes there, but a vCPU that is there still.
        while link != 0 {
            let l = self.links[link as usize];
            let site = self.arena.start() + u64::from(l.site);
            self.arena.patch(site, &l.exit.to_le_bytes());
            let free = std::mem::replace(&mut self.links[0].next, link);
            link = std::mem::replace(&mut self.links[link as usize].next, free);
        }
        let second = self.notes.second(&b).map(|s| s.0);
        for gfn in [Some(b.phys >> 12), second].into_iter().flatten() {
            if let Some(p) = self.pages.get_mut(&gfn) {
                p.blocks.retain(|b| b.0 != i);
                self.recount(gfn);
            }
        }
    }

    /// Counts again which lines of a page are depended on.
    fn recount(&mut self, gfn: u64) {
        let Some(p) = self.pages.get(&gfn) else {
            return;
        };
        let of = |&(i, _): &(u32, u32)| {
            self.blocks
                .get(i as usize)
                .map_or(0, |b| self.notes.lines(b, gfn))
        };
        let lines = p.blocks.iter().map(of).fold(p.watched, |all, l| all | l);
        p.lines.store(lines, Ordering::SeqCst);
    }

    /// A translation by its number, which holds until it is killed.
    pub fn get(&self, index: usize) -> Option<&Block> {
        self.blocks.get(index)
    }

    /// Links the jump of block `source` whose displacement is at `site` to `entry` of the live translation
    /// `(phys, ctx)`. `exit`: where the jump led before.
    pub fn link(&mut self, source: usize, site: u64, exit: u64, entry: u64, to: (u64, u32)) {
        let Some(target) = self.find_index(to.0, to.1) else {
            return;
        };
        if self.blocks[source].dead() {
            return;
        }
        let free = self.links[0].next;
        let link = if free == 0 {
            self.links.push(NO_LINK);
            self.links.len() - 1
        } else {
            self.links[0].next = self.links[free as usize].next;
            free as usize
        };
        self.links[link] = Link {
            site: site.wrapping_sub(self.arena.start()) as u32,
            exit: exit.wrapping_sub(site + 4) as u32,
            next: std::mem::replace(&mut self.blocks[target as usize].links, link as u32),
        };
        let displacement = entry.wrapping_sub(site + 4) as u32;
        self.arena.patch(site, &displacement.to_le_bytes());
    }

    /// The block with code at `pc` is made again when it is next wanted, with a copy of each write, and so is one
    /// that starts with its instruction at page offset `offset`.
    pub fn make_again(&mut self, pc: u64, offset: u16) {
        let Some(i) = self.index_at(pc) else { return };
        let (start, ctx) = (self.blocks[i].phys, self.blocks[i].ctx);
        let instruction = start & !0xfff | u64::from(offset);
        self.copies.extend([start, instruction]);
        self.kill(i as u32);
        if let Some(other) = self.find_index(instruction, ctx) {
            self.kill(other);
        }
    }

    /// The block at an address is one that [`Self::make_again`] was called for.
    pub fn needs_copies(&self, phys: u64) -> bool {
        self.copies.contains(&phys)
    }

    /// Drops everything. No vCPU may be in translated code, nor come back to a place in it (through a jump
    /// cache or a stack of return addresses), nor keep an address of [`Cache::lines_address`].
    pub fn clear(&mut self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.blocks.clear();
        self.notes.clear();
        self.links.truncate(1);
        self.links[0] = NO_LINK;
        self.copies.clear();
        self.map.clear();
        self.pages.clear();
        self.sites.clear();
        self.fars.clear();
        self.numbers.clear();
        self.arena.truncate(self.stubs_end);
    }

    /// Guest page numbers that hold translations, or did.
    pub fn gfns(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }
}

fn hash(phys: u64, ctx: u32) -> u64 {
    let mut h = IntHasher::default();
    h.write_u64(phys);
    h.write_u32(ctx);
    h.finish()
}

/// `jmp` (E9) or `call` (E8) of `target`, at `at`.
fn to(opcode: u8, at: u64, target: u64) -> [u8; 5] {
    let d = (target.wrapping_sub(at + 5) as u32).to_le_bytes();
    [opcode, d[0], d[1], d[2], d[3]]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the arena at an executable address.
    fn code(cache: &Cache, at: u64) -> &[u8] {
        &cache.arena.bytes()[(at - cache.arena.start()) as usize..]
    }

    /// A translation of page offsets `[start, stop)` with an immediate of two bytes at the end, whose
    /// copy is at offset 16, and a look ahead at `peeked`.
    fn insert(cache: &mut Cache, page: &[u8], start: u16, stop: u16, peeked: (u16, u16)) -> u64 {
        let at = cache.arena.push(&[0x90; 32]).unwrap();
        let lines = lines_of(start.into(), usize::from(stop - start))
            | lines_of(peeked.0.into(), usize::from(peeked.1 - peeked.0));
        let imm = crate::block::Imm {
            off: stop - 2,
            len: 2,
            host: 16,
        };
        let block = Translation {
            phys: 0x5000 | u64::from(start),
            stop,
            ctx: 0,
            indirect: at,
            direct: 8,
            direct_fpu: 8,
            len: 32,
            live_in: false,
            fpu: false,
            lines,
            second: None,
            map: Vec::new(),
            imms: vec![imm],
            peeked: vec![peeked],
        };
        cache.insert(&block, page, &[]);
        at
    }

    #[test]
    fn changes_patch_or_kill_what_depends_on_them() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut cache = Cache::new(arena, Stubs::default(), Arc::default());
        let mut page = vec![0u8; 4096];
        let first = insert(&mut cache, &page, 0x10, 0x18, (0x20, 0x22));
        let second = insert(&mut cache, &page, 0x20, 0x28, (0x80, 0x84));
        assert_eq!(cache.page_lines(5), 0b101);
        cache.link(0, first + 24, first + 20, second + 8, (0x5020, 0));
        let linked = (second as u32)
            .wrapping_add(8)
            .wrapping_sub(first as u32 + 28);
        assert_eq!(code(&cache, first + 24)[..4], linked.to_le_bytes());

        let mut change = |cache: &mut Cache, at: usize, value: u8| {
            page[at] = value;
            cache.changed(5, u64::MAX, |line, now| {
                now.copy_from_slice(&page[line * 64..][..64]);
            });
        };
        // Data beside code, and what nobody looks at in a line with code.
        change(&mut cache, 0x18, 1);
        change(&mut cache, 0x84, 1);
        change(&mut cache, 0x800, 1);
        assert_eq!((cache.patched, cache.page_lines(5)), (0, 0b101));
        // An immediate.
        change(&mut cache, 0x26, 0x77);
        assert_eq!(code(&cache, second + 16)[..2], [0x77, 0]);
        assert_eq!((cache.patched, cache.find(0x5010, 0).is_some()), (1, true));
        // What the second has looked ahead at: it dies, and nothing leads to it any more.
        change(&mut cache, 0x80, 1);
        assert!(cache.find(0x5020, 0).is_none() && cache.find(0x5010, 0).is_some());
        assert_eq!(code(&cache, second)[0], 0xe9);
        assert_eq!(code(&cache, second + 8)[0], 0xe8);
        assert_eq!(code(&cache, first + 24)[..4], (-8i32).to_le_bytes());
        assert_eq!(cache.page_lines(5), 0b1);
        // An opcode.
        change(&mut cache, 0x10, 1);
        assert_eq!(
            (cache.page_lines(5), cache.find(0x5010, 0).is_none()),
            (0, true)
        );
    }

    #[test]
    fn lines_being_watched_stay() {
        let arena = Arena::new(1 << 20).unwrap();
        let mut cache = Cache::new(arena, Stubs::default(), Arc::default());
        let page = vec![0u8; 4096];
        insert(&mut cache, &page, 0x10, 0x18, (0x20, 0x22));
        cache.watch(5, 0b1000);
        cache.changed(5, 1, |_, now| now.fill(1));
        assert_eq!(cache.page_lines(5), 0b1000);
    }
}
