//! Guest pages that translations came from.

use std::sync::atomic::{AtomicU64, Ordering};

/// A guest page that translations came from.
#[derive(Debug)]
pub struct CodePage {
    /// Lines that translations depend on. Emitted code that has written to the page looks here, so its address
    /// holds until the whole cache is emptied.
    pub lines: Box<AtomicU64>,
    /// Which lines `bytes` has.
    held: u64,
    /// Lines as they were translated, in order.
    bytes: Vec<[u8; 64]>,
    /// How many lines before each are held.
    position: [u8; 64],
    /// Live translations, each with the lines that it depends on, [`fold`]ed.
    pub blocks: Vec<(u32, u32)>,
    /// Lines that the translation in the making depends on.
    pub watched: u64,
    /// Writes by the interpreter since it was last taken for data.
    pub interpreted: u32,
}

/// Lines in half the bits, which tells most of those that differ apart.
pub fn fold(lines: u64) -> u32 {
    (lines | lines >> 32) as u32
}

/// Lines that room is made for at once.
const STEP: usize = 4;

impl Default for CodePage {
    fn default() -> Self {
        CodePage {
            lines: Box::default(),
            held: 0,
            bytes: Vec::new(),
            position: [0; 64],
            blocks: Vec::new(),
            watched: 0,
            interpreted: 0,
        }
    }
}

impl CodePage {
    /// Lines that translations depend on.
    pub fn lines(&self) -> u64 {
        self.lines.load(Ordering::Relaxed)
    }

    /// Lines that translations depend on and whose bytes are known.
    pub fn known(&self) -> u64 {
        self.lines() & self.held
    }

    fn position(&self, line: usize) -> usize {
        self.position[line & 63].into()
    }

    /// Makes room for the bytes of `lines`.
    pub fn hold(&mut self, lines: u64) {
        let mut new = lines & !self.held;
        if new == 0 {
            return;
        }
        let len = self.bytes.len() + new.count_ones() as usize;
        if len > self.bytes.capacity() {
            let room = len.next_multiple_of(STEP) - self.bytes.len();
            self.bytes.reserve_exact(room);
        }
        while new != 0 {
            let line = new.trailing_zeros() as usize;
            self.bytes.insert(self.position(line), [0; 64]);
            self.held |= 1 << line;
            for position in &mut self.position[line + 1..] {
                *position += 1;
            }
            new &= new - 1;
        }
    }

    /// The bytes of a line that is held.
    pub fn line(&mut self, line: usize) -> Option<&mut [u8; 64]> {
        let at = self.position(line);
        (self.held >> line & 1 != 0).then(|| self.bytes.get_mut(at))?
    }

    /// `len` bytes from `offset` on, all in lines that are held.
    pub fn bytes(&self, offset: usize, len: usize) -> Option<&[u8]> {
        let lines = crate::cache::lines_of(offset, len);
        if lines & !self.held != 0 || offset + len > 4096 {
            return None;
        }
        let start = self.position(offset / 64) * 64 + offset % 64;
        self.bytes.as_flattened().get(start..start + len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_held_in_order() {
        let mut page = CodePage::default();
        for lines in [1 << 9, 1 << 8 | 1 << 63, 1 << 9, 1] {
            page.hold(lines);
        }
        for line in [0, 8, 9, 63] {
            page.line(line).unwrap().fill(line as u8);
        }
        assert!(page.line(1).is_none() && page.line(62).is_none());
        assert_eq!(page.bytes(9 * 64 - 1, 2), Some(&[8, 9][..]));
        assert_eq!(page.bytes(4095, 1), Some(&[63][..]));
        assert_eq!(page.bytes(63, 2), None);
        assert_eq!(page.bytes(4095, 2), None);
        assert_eq!(page.bytes.len(), 4);
    }
}
