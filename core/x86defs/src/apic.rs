//! Local APIC register offsets and IA32_APIC_BASE ("Advanced Programmable Interrupt Controller").

/// Default physical base of the local APIC page.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// Default physical base of the I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Size of the I/O APIC's register window as KVM decodes it.
pub const IOAPIC_SIZE: u64 = 0x100;

/// IA32_APIC_BASE: this is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: globally enabled.
pub const BASE_ENABLE: u64 = 1 << 11;

pub const REG_ID: u32 = 0x20;
pub const REG_VERSION: u32 = 0x30;
pub const REG_TPR: u32 = 0x80;
pub const REG_PPR: u32 = 0xa0;
pub const REG_EOI: u32 = 0xb0;
pub const REG_LDR: u32 = 0xd0;
pub const REG_DFR: u32 = 0xe0;
pub const REG_SPIV: u32 = 0xf0;
pub const REG_ISR: u32 = 0x100;
pub const REG_TMR: u32 = 0x180;
pub const REG_IRR: u32 = 0x200;
pub const REG_ESR: u32 = 0x280;
pub const REG_LVT_CMCI: u32 = 0x2f0;
pub const REG_ICR: u32 = 0x300;
pub const REG_ICR2: u32 = 0x310;
pub const REG_LVT_TIMER: u32 = 0x320;
pub const REG_LVT_THERMAL: u32 = 0x330;
pub const REG_LVT_PC: u32 = 0x340;
pub const REG_LVT0: u32 = 0x350;
pub const REG_LVT1: u32 = 0x360;
pub const REG_LVT_ERROR: u32 = 0x370;
pub const REG_TIMER_INITIAL: u32 = 0x380;
pub const REG_TIMER_CURRENT: u32 = 0x390;
pub const REG_TIMER_DIVIDE: u32 = 0x3e0;
pub const REG_SELF_IPI: u32 = 0x3f0;
