//! A test case: code, the state it starts from, and the state it ends in.

use crate::layout::{CODE, STACK};
use crate::random::Random;
use std::sync::LazyLock;
use x86emu::state::XsaveArea;

/// RFLAGS bits that are set and compared: the arithmetic flags, DF and AC.
pub const FLAGS: u64 = 0x8d5 | 1 << 10 | 1 << 18;
/// The arithmetic flags.
pub const ARITH: u64 = 0x8d5;

/// General registers and vector state, in or out.
#[derive(Clone)]
pub struct Regs {
    /// RAX-R15.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// x87, SSE, AVX, AVX-512 in the standard format.
    pub xsave: Box<XsaveArea>,
}

/// What a run of a case is compared by.
#[derive(Clone)]
pub struct Outcome {
    /// The registers at the exception that ended it.
    pub regs: Regs,
    /// The exception's vector; 3 for the INT3 behind the code. 256 and up: no exception.
    pub vector: u32,
    /// Error code, 0 without one.
    pub error: u64,
    /// CR2, for #PF.
    pub cr2: u64,
    /// CS at the exception.
    pub cs: u16,
    /// Everything from [`crate::layout::USER`] on.
    pub memory: Vec<u8>,
}

/// [`Outcome::vector`]: the code runs for too long.
pub const TIMEOUT: u32 = 256;
/// [`Outcome::vector`]: the engine gave up.
pub const FAILED: u32 = 257;

/// A test case.
#[derive(Clone, Debug)]
pub struct Case {
    /// 64, or 32 for compatibility mode.
    pub bits: u32,
    /// The code.
    pub code: Vec<u8>,
    /// Its linear address.
    pub at: u64,
    /// Initial general registers.
    pub gpr: [u64; 16],
    /// Initial RFLAGS; bits of [`FLAGS`].
    pub rflags: u64,
    /// Initial FS base.
    pub fs_base: u64,
    /// Initial GS base.
    pub gs_base: u64,
    /// What memory is filled from.
    pub memory: u64,
    /// Bytes put into memory over the filling: offset from [`crate::layout::USER`].
    pub patches: Vec<(u64, Vec<u8>)>,
    /// What the vector state is made from.
    pub vector: u64,
    /// Vector registers with chosen contents: number, 64 bytes.
    pub vectors: Vec<(u8, Vec<u8>)>,
}

/// A case's initial state worked out.
pub struct Start {
    /// 64 or 32.
    pub bits: u32,
    /// Registers.
    pub regs: Regs,
    /// Everything from [`crate::layout::USER`] on.
    pub memory: Vec<u8>,
}

impl Case {
    /// Works out the initial state.
    pub fn start(&self) -> Start {
        let mut memory = vec![0; crate::layout::USER_SIZE as usize];
        self.fill(&mut memory);
        Start {
            bits: self.bits,
            regs: self.regs(),
            memory,
        }
    }

    /// A case with no code yet.
    pub fn new(bits: u32) -> Self {
        let mut gpr = [0; 16];
        gpr[4] = STACK.linear + 0x2000;
        Case {
            bits,
            code: Vec::new(),
            at: CODE.linear + 0x100,
            gpr,
            rflags: 0,
            fs_base: 0,
            gs_base: 0,
            memory: 0,
            patches: Vec::new(),
            vector: 0,
            vectors: Vec::new(),
        }
    }

    /// The registers that the case starts with.
    pub fn regs(&self) -> Regs {
        let mut xsave = vector_state(self.vector);
        for (n, bytes) in &self.vectors {
            set_zmm(&mut xsave, usize::from(*n), bytes);
        }
        Regs {
            gpr: self.gpr,
            rip: self.at,
            rflags: self.rflags & FLAGS | 0x202,
            fs_base: self.fs_base,
            gs_base: self.gs_base,
            xsave,
        }
    }

    /// The memory that the case starts with.
    pub fn fill(&self, memory: &mut [u8]) {
        let code = CODE.pages.len() * 4096;
        memory[..code].fill(0xcc);
        let mut r = Random(self.memory);
        for (n, chunk) in memory[code..].chunks_exact_mut(8).enumerate() {
            let v = match n % 16 {
                0 => r.value(),
                1 => r.f64_bits(),
                2 => u64::from(r.f32_bits()) | u64::from(r.f32_bits()) << 32,
                3 => crate::layout::DATA.linear + r.below(0x3000),
                _ => r.bits(),
            };
            chunk.copy_from_slice(&v.to_le_bytes());
        }
        for (at, bytes) in &self.patches {
            memory[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
        }
        let at = (self.at - CODE.linear) as usize;
        let end = (at + self.code.len()).min(code);
        memory[at..end].copy_from_slice(&self.code[..end - at]);
    }
}

/// Offset and size of an extended XSAVE component below 8.
pub fn component(n: u32) -> (usize, usize) {
    static KNOWN: LazyLock<[(usize, usize); 8]> = LazyLock::new(|| {
        std::array::from_fn(|n| {
            let r = std::arch::x86_64::__cpuid_count(0xd, n as u32);
            (r.ebx as usize, r.eax as usize)
        })
    });
    KNOWN[n as usize]
}

/// The XSAVE components that take part.
pub fn host_components() -> u64 {
    // CPUID is slow under a hypervisor.
    static KNOWN: LazyLock<u64> = LazyLock::new(|| {
        if !std::arch::is_x86_feature_detected!("xsave") {
            return 3;
        }
        let r = std::arch::x86_64::__cpuid_count(0xd, 0);
        u64::from(r.eax) & 0xe7
    });
    *KNOWN
}

/// Random vector state.
pub fn vector_state(seed: u64) -> Box<XsaveArea> {
    let mut r = Random(seed);
    let mut area = Box::new(XsaveArea([0; x86emu::state::XSAVE_SIZE]));
    let components = host_components();
    let a = &mut area.0;
    let floats = r.below(4);
    let lane = |r: &mut Random| match floats {
        0 => r.bits(),
        1 => r.f64_bits(),
        2 => u64::from(r.f32_bits()) | u64::from(r.f32_bits()) << 32,
        _ => match r.below(3) {
            0 => r.value(),
            1 => r.f64_bits(),
            _ => u64::from(r.f32_bits()) | u64::from(r.f32_bits()) << 32,
        },
    };
    for n in 0..8 {
        let (mantissa, exponent) = match r.below(8) {
            0 => (r.bits(), r.bits() as u16),
            1 => (
                r.pick(&[0, 1 << 63, 3 << 62, (1 << 63) | 1, 1]),
                r.pick(&[0, 0x7fff, 0xffff, 0x3fff]),
            ),
            2 => (1 << 63, 0x3fff),
            _ => (
                r.bits() | 1 << 63,
                (0x3fff - 20 + r.below(40) as u16) | ((r.below(2) as u16) << 15),
            ),
        };
        a[32 + 16 * n..40 + 16 * n].copy_from_slice(&mantissa.to_le_bytes());
        a[40 + 16 * n..42 + 16 * n].copy_from_slice(&exponent.to_le_bytes());
    }
    for n in 0..32 {
        let v = lane(&mut r);
        a[160 + 8 * n..168 + 8 * n].copy_from_slice(&v.to_le_bytes());
    }
    for n in [2, 5, 6, 7] {
        if components & (1 << n) == 0 {
            continue;
        }
        let (offset, size) = component(n);
        for chunk in a[offset..offset + size].chunks_exact_mut(8) {
            let v = if n == 5 { r.value() } else { lane(&mut r) };
            chunk.copy_from_slice(&v.to_le_bytes());
        }
    }
    let mut control: u16 = 0x37f & !0xc00 | (r.below(4) as u16) << 10;
    if r.one_in(4) {
        control = control & !0x300 | (r.pick(&[0u16, 2, 3])) << 8;
    }
    let mut mxcsr = 0x1f80 | (r.below(4) as u32) << 13;
    if r.one_in(8) {
        mxcsr |= 0x40;
    }
    if r.one_in(8) {
        mxcsr |= 0x8000;
    }
    if r.one_in(16) {
        control &= !(r.bits() as u16 & 0x3f);
    }
    if r.one_in(16) {
        mxcsr &= !(r.bits() as u32 & 0x1f80);
    }
    a[0..2].copy_from_slice(&control.to_le_bytes());
    // Any TOP and condition codes, no exceptions pending.
    let status = if r.one_in(3) {
        0
    } else {
        r.bits() as u16 & 0x7f00
    };
    a[2..4].copy_from_slice(&status.to_le_bytes());
    a[4] = match r.below(4) {
        0 => 0,
        1 => r.bits() as u8,
        _ => 0xff,
    };
    a[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    // Now and then some of it is in its initial configuration.
    let mut bv = components;
    if r.one_in(4) {
        bv &= r.bits();
    }
    a[512..520].copy_from_slice(&bv.to_le_bytes());
    normalize(&mut area);
    area
}

fn set_zmm(area: &mut XsaveArea, n: usize, bytes: &[u8]) {
    let a = &mut area.0;
    let components = host_components();
    let mut bv = u64::from_le_bytes([
        a[512], a[513], a[514], a[515], a[516], a[517], a[518], a[519],
    ]);
    if n < 16 {
        a[160 + 16 * n..176 + 16 * n].copy_from_slice(&bytes[..16]);
        bv |= 2;
        if components & 4 != 0 {
            let at = component(2).0 + 16 * n;
            a[at..at + 16].copy_from_slice(&bytes[16..32]);
            bv |= 4;
        }
        if components & 0x40 != 0 {
            let at = component(6).0 + 32 * n;
            a[at..at + 32].copy_from_slice(&bytes[32..64]);
            bv |= 0x40;
        }
    } else if components & 0x80 != 0 {
        let at = component(7).0 + 64 * (n - 16);
        a[at..at + 64].copy_from_slice(bytes);
        bv |= 0x80;
    }
    a[512..520].copy_from_slice(&bv.to_le_bytes());
}

/// Components whose XSTATE_BV bit is clear get their initial values, and what is not compared (the
/// x87 instruction and operand pointers, MXCSR_MASK, the header) is zeroed.
pub fn normalize(area: &mut XsaveArea) {
    let a = &mut area.0;
    let bv = a[512];
    if bv & 1 == 0 {
        let [lo, hi] = 0x37fu16.to_le_bytes();
        a[..24].fill(0);
        a[0] = lo;
        a[1] = hi;
        a[32..160].fill(0);
    }
    if bv & 2 == 0 {
        a[160..416].fill(0);
    }
    for n in [2, 5, 6, 7] {
        if bv & (1 << n) == 0 && host_components() & (1 << n) != 0 {
            let (offset, size) = component(n);
            a[offset..offset + size].fill(0);
        }
    }
    a[5..24].fill(0);
    a[28..32].fill(0);
    for n in 0..8 {
        a[42 + 16 * n..48 + 16 * n].fill(0);
    }
    a[416..512].fill(0);
    a[512] = host_components() as u8;
    a[513..576].fill(0);
}
