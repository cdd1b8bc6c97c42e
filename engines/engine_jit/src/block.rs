//! Translations, as they are made and as they are kept.
//!
//! There are tens of thousands of them, and what is rarely looked at decides how much memory they take: the
//! bytes of [`Notes`] hold it, packed.

use crate::translate::OFFSET;

/// An immediate of the guest's that was copied to host code as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imm {
    /// Page offset of the guest's.
    pub off: u16,
    /// Bytes.
    pub len: u8,
    /// Offset of the copy from the block's indirect entry.
    pub host: u32,
}

/// A translation that has just been made.
#[derive(Debug)]
pub struct Translation {
    /// Guest-physical address of the first instruction.
    pub phys: u64,
    /// Page offset behind the last instruction, at most the page's end.
    pub stop: u16,
    /// Context it was made for.
    pub ctx: u32,
    /// Entry for jumps that carry the linear address in T and the flags in memory.
    pub indirect: u64,
    /// Offset from it of the entry for linked jumps: flags in EFLAGS if `live_in`.
    pub direct: u16,
    /// The same for linked jumps from code that has the FPU loaded.
    pub direct_fpu: u16,
    /// Bytes of code.
    pub len: u32,
    /// It reads flags that it has not written.
    pub live_in: bool,
    /// It needs the guest's FPU state loaded.
    pub fpu: bool,
    /// Which 64-byte lines of the page it depends on.
    pub lines: u64,
    /// Page number and lines of the second page, for an instruction that crosses the page end. Such a
    /// block is reached only through the jump cache.
    pub second: Option<(u64, u64)>,
    /// Host offset from `indirect` of each instruction, and its page offset with [`crate::translate::HOST_FLAGS`] and
    /// its sibling.
    pub map: Vec<(u32, u16)>,
    /// Immediates that can be changed in place.
    pub imms: Vec<Imm>,
    /// Page offsets of what it depends on beside its own instructions: starts and ends.
    pub peeked: Vec<(u16, u16)>,
}

/// A translation in the cache.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// See [`Translation::phys`].
    pub phys: u64,
    /// See [`Translation::indirect`].
    pub indirect: u64,
    /// See [`Translation::lines`].
    pub lines: u64,
    /// See [`Translation::ctx`].
    pub ctx: u32,
    len: u32,
    notes: u32,
    /// The first of the jumps that are linked to it.
    pub(crate) links: u32,
    /// See [`Translation::stop`].
    pub stop: u16,
    direct: u16,
    direct_fpu: u16,
    flags: u8,
}

const LIVE_IN: u8 = 1;
const FPU: u8 = 2;
const SECOND: u8 = 4;
const DEAD: u8 = 8;

impl Block {
    /// Entry for linked jumps: flags in EFLAGS if `live_in`.
    pub fn direct(&self) -> u64 {
        self.indirect + u64::from(self.direct)
    }

    /// Entry for linked jumps from code that has the FPU loaded.
    pub fn direct_fpu(&self) -> u64 {
        self.indirect + u64::from(self.direct_fpu)
    }

    /// End of its code.
    pub fn end(&self) -> u64 {
        self.indirect + u64::from(self.len)
    }

    /// It reads flags that it has not written.
    pub fn live_in(&self) -> bool {
        self.flags & LIVE_IN != 0
    }

    /// It needs the guest's FPU state loaded.
    pub fn fpu(&self) -> bool {
        self.flags & FPU != 0
    }

    /// Its code was overwritten with an exit.
    pub fn dead(&self) -> bool {
        self.flags & DEAD != 0
    }

    /// Notes that [`Self::dead`] holds from here on.
    pub fn die(&mut self) {
        self.flags |= DEAD;
    }
}

/// What is kept of each block beside [`Block`], one behind the other: the second page, immediates, peeked
/// ranges, the map.
#[derive(Debug, Default)]
pub struct Notes(Vec<u8>);

/// Reads the notes of one block.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (first, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *first
    }

    fn skip(&mut self, bytes: usize) {
        self.0 = self.0.get(bytes..).unwrap_or_default();
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// Seven bits a byte, the low ones first.
    #[inline]
    fn number(&mut self) -> u32 {
        if let [b, rest @ ..] = self.0
            && *b < 0x80
        {
            self.0 = rest;
            return (*b).into();
        }
        let mut n = 0;
        for shift in (0..32).step_by(7) {
            let [b] = self.take();
            n |= u32::from(b & 0x7f) << shift;
            if b < 0x80 {
                break;
            }
        }
        n
    }
}

/// Numbers near zero, of either sign, as small ones.
fn fold(d: i32) -> u32 {
    (d << 1 ^ d >> 31) as u32
}

fn unfold(n: u32) -> i32 {
    (n >> 1) as i32 ^ -((n & 1) as i32)
}

/// A word of [`Translation::map`] with its flags at the other end: words that follow each other differ little.
fn small(word: u16) -> i32 {
    i32::from(word & OFFSET) << 2 | i32::from(word >> 14)
}

impl Notes {
    fn number(&mut self, mut n: u32) {
        while n >= 0x80 {
            self.0.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.0.push(n as u8);
    }

    /// Keeps a translation.
    pub fn add(&mut self, t: &Translation) -> Block {
        let notes = self.0.len() as u32;
        if let Some((gfn, lines)) = t.second {
            self.0.extend_from_slice(&gfn.to_le_bytes());
            self.0.extend_from_slice(&lines.to_le_bytes());
        }
        // An immediate that is not noted is one that cannot be changed in place.
        let noted = |i: &&Imm| i.len.is_power_of_two() && i.host <= u16::MAX.into();
        self.number(t.imms.iter().filter(noted).count() as u32);
        for i in t.imms.iter().filter(noted) {
            let word = i.off & 0xfff | (i.len.trailing_zeros() as u16) << 12;
            self.0.extend_from_slice(&word.to_le_bytes());
            self.0.extend_from_slice(&(i.host as u16).to_le_bytes());
        }
        self.number(t.peeked.len() as u32);
        for &(start, end) in &t.peeked {
            self.0.extend_from_slice(&start.to_le_bytes());
            self.0.extend_from_slice(&end.to_le_bytes());
        }
        self.number(t.map.len() as u32);
        let (mut host, mut guest) = (0, small((t.phys & 0xfff) as u16));
        for &(h, g) in &t.map {
            self.number(h.wrapping_sub(host));
            self.number(fold(small(g) - guest));
            (host, guest) = (h, small(g));
        }
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        Block {
            phys: t.phys,
            indirect: t.indirect,
            lines: t.lines,
            ctx: t.ctx,
            len: t.len,
            notes,
            links: 0,
            stop: t.stop,
            direct: t.direct,
            direct_fpu: t.direct_fpu,
            flags: flag(t.live_in, LIVE_IN) | flag(t.fpu, FPU) | flag(t.second.is_some(), SECOND),
        }
    }

    fn read(&self, b: &Block) -> Reader<'_> {
        Reader(self.0.get(b.notes as usize..).unwrap_or_default())
    }

    /// See [`Translation::second`].
    pub fn second(&self, b: &Block) -> Option<(u64, u64)> {
        let mut r = self.read(b);
        (b.flags & SECOND != 0).then(|| (r.long(), r.long()))
    }

    /// The lines of a page that a block depends on.
    pub fn lines(&self, b: &Block, gfn: u64) -> u64 {
        let own = if b.phys >> 12 == gfn { b.lines } else { 0 };
        let second = self.second(b).filter(|s| s.0 == gfn);
        own | second.map_or(0, |s| s.1)
    }

    /// See [`Translation::imms`].
    #[inline]
    pub fn imms(&self, b: &Block) -> impl Iterator<Item = Imm> {
        let mut r = self.read(b);
        if b.flags & SECOND != 0 {
            r.skip(16);
        }
        (0..r.number()).map(move |_| {
            let word = r.word();
            Imm {
                off: word & 0xfff,
                len: 1 << (word >> 12),
                host: r.word().into(),
            }
        })
    }

    fn behind_imms(&self, b: &Block) -> Reader<'_> {
        let mut r = self.read(b);
        if b.flags & SECOND != 0 {
            r.skip(16);
        }
        let pairs = r.number() as usize;
        r.skip(4 * pairs);
        r
    }

    /// See [`Translation::peeked`].
    #[inline]
    pub fn peeked(&self, b: &Block) -> impl Iterator<Item = (u16, u16)> {
        let mut r = self.behind_imms(b);
        (0..r.number()).map(move |_| (r.word(), r.word()))
    }

    /// The word of [`Translation::map`] that the code at host address `pc` belongs to.
    pub fn instruction(&self, b: &Block, pc: u64) -> Option<u16> {
        let at = u32::try_from(pc.checked_sub(b.indirect)?).ok()?;
        let mut r = self.behind_imms(b);
        let pairs = r.number() as usize;
        r.skip(4 * pairs);
        let (mut host, mut guest) = (0u32, small((b.phys & 0xfff) as u16));
        let mut found = None;
        for _ in 0..r.number() {
            host = host.wrapping_add(r.number());
            guest += unfold(r.number());
            if host > at {
                break;
            }
            found = Some((guest >> 2) as u16 & OFFSET | (guest as u16 & 3) << 14);
        }
        found
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_come_back() {
        let imm = |off, len, host| Imm { off, len, host };
        let mut t = Translation {
            phys: 0x5ff0,
            stop: 0x1000,
            ctx: 7,
            indirect: 0x10_0000,
            direct: 0x18,
            direct_fpu: 0x30,
            len: 0x1_0000,
            live_in: true,
            fpu: false,
            lines: 1 << 63,
            second: Some((9, 1)),
            map: vec![(0x18, 0xff0), (0x200, 0x8ff3), (0x5000, 0xff1)],
            imms: vec![imm(0xff1, 4, 0x20), imm(0xff5, 1, 0x1_0000)],
            peeked: vec![(0xf00, 0xf10), (0, 3)],
        };
        let mut notes = Notes::default();
        let first = notes.add(&t);
        (t.second, t.imms) = (None, Vec::new());
        let second = notes.add(&t);
        assert_eq!(notes.second(&first), Some((9, 1)));
        assert_eq!(notes.second(&second), None);
        assert!(notes.imms(&first).eq([imm(0xff1, 4, 0x20)]));
        assert_eq!(notes.imms(&second).count(), 0);
        for b in [first, second] {
            assert!(notes.peeked(&b).eq(t.peeked.iter().copied()));
            let at = |offset: u64| notes.instruction(&b, b.indirect + offset);
            assert_eq!(
                [at(0x17), at(0x18), at(0x1ff)],
                [None, Some(0xff0), Some(0xff0)]
            );
            assert_eq!([at(0x4fff), at(0x9000)], [Some(0x8ff3), Some(0xff1)]);
            assert!(b.live_in() && !b.fpu() && !b.dead());
            assert_eq!((b.direct(), b.end()), (0x10_0018, 0x11_0000));
        }
    }
}
