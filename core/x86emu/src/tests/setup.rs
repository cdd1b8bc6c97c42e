//! vCPUs in the processor's modes, ready to run code at 0x1000.

use super::fake::Fake;
use super::native::Native;
use crate::state::*;
use std::boxed::Box;

/// RAM in bytes.
pub const RAM: usize = 4 << 20;

/// RAM and the host CPU.
pub fn machine() -> Fake {
    let mut env = Fake::new(RAM);
    env.native = Some(Box::new(Native::new().unwrap()));
    env
}

/// Where the page tables of [`long_mode`] lie.
pub const TABLES: u64 = 0x10_0000;

/// A vCPU in 64-bit mode at CPL 3 or 0: linear 0-2 MiB and -2 MiB..0 map to the first 2 MiB of RAM by
/// 4 KiB pages (page tables at [`TABLES`]); 0x4000_0000 maps MMIO at 0xd000_0000.
pub fn long_mode(env: &mut Fake, cpl: u8) -> CpuState {
    let mut cpu = CpuState {
        cpl,
        efer: 0xd01,
        cr0: 0x8005_0033,
        cr4: 0x4_06a0,
        cr3: TABLES,
        xcr0: 0xe7,
        rip: 0x1000,
        ..CpuState::default()
    };
    let flat = |kind: u16, dpl: u8| Segment {
        base: 0,
        limit: !0,
        selector: u16::from(dpl) | if kind & 8 != 0 { 0x30 } else { 0x28 },
        attr: kind | 0x90 | u16::from(dpl) << 5 | 0xc000,
        unusable: false,
    };
    cpu.seg = [flat(3, cpl); 6];
    cpu.seg[sreg::CS] = flat(0xb, cpl);
    cpu.seg[sreg::CS].attr = cpu.seg[sreg::CS].attr & !0x4000 | 0x2000;
    cpu.gpr[gpr::RSP] = 0x8_0000;
    let [pml4, pdpt, pd, pt] = [0, 1, 2, 3].map(|n| TABLES + n * 0x1000);
    env.w64(pml4, pdpt | 7);
    env.w64(pml4 + 511 * 8, pdpt | 7);
    env.w64(pdpt, pd | 7);
    env.w64(pdpt + 511 * 8, pd | 7);
    env.w64(pdpt + 8, 0xd000_0000 & !0x3fff_ffff | 0x87);
    env.w64(pd, pt | 7);
    env.w64(pd + 511 * 8, pt | 7);
    for n in 0..512 {
        env.w64(pt + n * 8, n << 12 | 7);
    }
    cpu
}

/// The page-table entry of a linear address below 2 MiB in [`long_mode`].
pub fn pte(linear: u64) -> u64 {
    TABLES + 0x3000 + (linear >> 12) * 8
}

/// A vCPU with flat segments outside 64-bit mode: real mode for 16 bits, protected mode without
/// paging for 32 bits.
pub fn flat_mode(bits: CodeSize, cpl: u8) -> CpuState {
    let mut cpu = CpuState {
        cpl,
        cr0: if bits == CodeSize::Bits16 { 0x10 } else { 0x33 },
        cr4: 0x4_0600,
        xcr0: 0xe7,
        rip: 0x1000,
        ..CpuState::default()
    };
    let wide = bits == CodeSize::Bits32;
    for (n, segment) in cpu.seg.iter_mut().enumerate() {
        *segment = Segment {
            base: 0,
            limit: if wide { !0 } else { 0xffff },
            selector: if wide { 0x10 } else { 0 },
            attr: if n == sreg::CS { 0x9b } else { 0x93 }
                | u16::from(cpl) << 5
                | if wide { 0xc000 } else { 0 },
            unusable: false,
        };
    }
    cpu.gpr[gpr::RSP] = 0x8000;
    cpu
}
