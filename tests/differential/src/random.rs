//! A small deterministic generator of interesting numbers.

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }
    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// One of `from`.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// Integers near where arithmetic is interesting.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(3).wrapping_sub(1),
            1 => self.pick(&[
                0x7f,
                0x80,
                0x7fff,
                0x8000,
                0x7fff_ffff,
                0x8000_0000,
                1 << 63,
                i64::MAX as u64,
            ]),
            2 => 1 << self.below(64),
            3 => self.below(256),
            4 => (1u64 << self.below(64)).wrapping_sub(1),
            5 => self.bits() as u32 as u64,
            _ => self.bits(),
        }
    }
    /// Bits of a 32-bit float: ordinary, tiny, huge, special.
    pub fn f32_bits(&mut self) -> u32 {
        match self.below(8) {
            0 => self.pick(&[
                0,
                0x8000_0000,
                0x7f80_0000,
                0xff80_0000,
                0x7fc0_0000,
                0x7fa0_0001,
                1,
                0x7f7f_ffff,
            ]),
            1 => self.bits() as u32,
            2 => (self.below(1000) as f32 - 500.0).to_bits(),
            _ => (((self.bits() as i32) as f32) / 65536.0).to_bits(),
        }
    }
    /// Bits of a 64-bit float.
    pub fn f64_bits(&mut self) -> u64 {
        match self.below(8) {
            0 => self.pick(&[
                0,
                1 << 63,
                0x7ff0 << 48,
                0xfff0 << 48,
                0x7ff8 << 48,
                (0x7ff4 << 48) | 1,
                1,
                0x7fef_ffff_ffff_ffff,
            ]),
            1 => self.bits(),
            2 => (self.below(1000) as f64 - 500.0).to_bits(),
            _ => ((self.bits() as i64) as f64 / 4294967296.0).to_bits(),
        }
    }
}
