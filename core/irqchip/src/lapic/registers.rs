//! Register offsets and fields of the local APIC, and its 256-bit registers.

pub(crate) const ID: u32 = 0x20;
pub(crate) const VERSION: u32 = 0x30;
pub(crate) const TPR: u32 = 0x80;
pub(crate) const ARB: u32 = 0x90;
pub(crate) const PPR: u32 = 0xa0;
pub(crate) const EOI: u32 = 0xb0;
pub(crate) const LDR: u32 = 0xd0;
pub(crate) const DFR: u32 = 0xe0;
pub(crate) const SVR: u32 = 0xf0;
pub(crate) const ISR: u32 = 0x100;
pub(crate) const TMR: u32 = 0x180;
pub(crate) const IRR: u32 = 0x200;
pub(crate) const ESR: u32 = 0x280;
pub(crate) const LVT_CMCI: u32 = 0x2f0;
pub(crate) const ICR: u32 = 0x300;
pub(crate) const ICR2: u32 = 0x310;
pub(crate) const LVT_TIMER: u32 = 0x320;
pub(crate) const LVT_THERMAL: u32 = 0x330;
pub(crate) const LVT_PMC: u32 = 0x340;
pub(crate) const LVT_LINT0: u32 = 0x350;
pub(crate) const LVT_LINT1: u32 = 0x360;
pub(crate) const LVT_ERROR: u32 = 0x370;
pub(crate) const TIMER_INITIAL: u32 = 0x380;
pub(crate) const TIMER_CURRENT: u32 = 0x390;
pub(crate) const TIMER_DIVIDE: u32 = 0x3e0;
pub(crate) const SELF_IPI: u32 = 0x3f0;

pub(crate) const SVR_ENABLED: u32 = 1 << 8;
pub(crate) const SVR_DIRECTED_EOI: u32 = 1 << 12;
pub(crate) const VERSION_DIRECTED_EOI: u32 = 1 << 24;

pub(crate) const LVT_MASKED: u32 = 1 << 16;
pub(crate) const LVT_LEVEL: u32 = 1 << 15;
const LVT_BASE: u32 = LVT_MASKED | 1 << 12 | 0xff;
const LVT_MODE: u32 = 7 << 8;
const LVT_PIN: u32 = LVT_BASE | LVT_MODE | 1 << 13 | 1 << 14 | LVT_LEVEL;

pub(crate) const ICR_BUSY: u32 = 1 << 12;
/// Reserved in an x2APIC ICR: bits 31:20, 17:16 and 13.
pub(crate) const X2APIC_ICR_RESERVED: u64 = 0xfff3_2000;

pub(crate) const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
pub(crate) const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;

/// The writable bits of an LVT entry other than the timer's mode.
pub(crate) fn lvt_mask(offset: u32) -> Option<u32> {
    Some(match offset {
        LVT_TIMER | LVT_ERROR => LVT_BASE,
        LVT_THERMAL | LVT_PMC | LVT_CMCI => LVT_BASE | LVT_MODE,
        LVT_LINT0 | LVT_LINT1 => LVT_PIN,
        _ => return None,
    })
}

/// IRR, ISR or TMR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VectorSet(pub(crate) [u32; 8]);

impl VectorSet {
    fn word(&mut self, vector: u8) -> &mut u32 {
        &mut self.0[usize::from(vector >> 5)]
    }

    pub(crate) fn set(&mut self, vector: u8) {
        *self.word(vector) |= 1 << (vector & 31);
    }

    pub(crate) fn clear(&mut self, vector: u8) {
        *self.word(vector) &= !(1 << (vector & 31));
    }

    pub(crate) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & 1 << (vector & 31) != 0
    }

    pub(crate) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some((word as u32 * 32 + self.0[word].ilog2()) as u8)
    }
}
