//! A fuzzer's bytes as a stream of decisions.

use std::time::Duration;

/// Bytes to take numbers from; zeroes when they are used up.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Takes from `data`, front to back.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// At most `len` bytes; fewer at the end.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    /// `N` bytes, with zeroes after the end.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let bytes = self.bytes(N);
        out[..bytes.len()].copy_from_slice(bytes);
        out
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// True or false.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// Less than `n`, which is at most 256.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.u8()) % n.max(1)
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A number of any size that needs few bytes if it is small, a power of two, or next to a
    /// boundary where code goes wrong.
    pub fn value(&mut self) -> u64 {
        match self.u8() {
            n @ 0..=0x3f => u64::from(n),
            n @ 0x40..=0x7f => 1 << (n & 63),
            n @ 0x80..=0x9f => (!0 << ((n & 31) * 2)) | u64::from(self.u8()),
            n @ 0xa0..=0xaf => (1u64 << (4 * (n & 15))).wrapping_sub(u64::from(self.u8())),
            0xb0..=0xbf => u64::from(self.u16()),
            0xc0..=0xcf => u64::from(self.u32()),
            0xd0..=0xdf => u64::from(self.u32()) << 12,
            0xe0..=0xe7 => (1 << 47) - 8 + u64::from(self.u8() & 15),
            0xe8..=0xef => (1 << 32) - 8 + u64::from(self.u8() & 15),
            _ => self.u64(),
        }
    }

    /// Changes some of `bytes`, or all.
    pub fn disturb(&mut self, bytes: &mut [u8]) {
        let changes = self.u8();
        if changes == 0xff {
            let new = self.bytes(bytes.len());
            bytes[..new.len()].copy_from_slice(new);
            return;
        }
        for _ in 0..changes & 15 {
            let at = usize::from(self.u16()) % bytes.len().max(1);
            let value = self.u8();
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
    }
}

/// Runs `work`, and calls `kick` again and again from another thread once `limit` has passed.
pub fn within<R>(limit: Duration, kick: impl Fn() + Send, work: impl FnOnce() -> R) -> R {
    std::thread::scope(|scope| {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            let mut limit = limit;
            while wait.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                kick();
                limit = Duration::from_millis(1);
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// xorshift64*: the deterministic stand-in for a fuzzer.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % n.max(1) as u64) as usize
    }

    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.number() as u8).collect()
    }

    /// `seed` with some bytes changed, taken out or put in.
    pub fn mutated(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..1 + self.below(8) {
            let at = self.below(bytes.len());
            match self.below(5) {
                0 => {
                    let n = self.below(16);
                    let new = self.bytes(n);
                    bytes.splice(at..at, new);
                }
                1 => bytes.truncate(bytes.len().saturating_sub(self.below(8))),
                2 => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = [0, 1, 0x7f, 0x80, 0xff][self.below(5)];
                    }
                }
                3 => {
                    let n = self.below(64);
                    let new = self.bytes(n);
                    bytes.extend(new);
                }
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.below(8);
                    }
                }
            }
        }
        bytes
    }
}
