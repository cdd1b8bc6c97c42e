//! Ready-made machines for the system-side tests.

use super::fake::Fake;
use crate::bits::*;
use crate::env::Stop;
use crate::state::{CpuState, Segment, gpr, sreg};
use crate::system::system_step;

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const TSS_B: u64 = 0x4000;
pub const TABLES: u64 = 0x10000;
pub const CODE: u64 = 0x8000;
pub const STACK: u64 = 0x9000;
pub const KERNEL_STACK: u64 = 0xa000;
pub const USER_STACK: u64 = 0xb000;

pub const CS64: u16 = 0x08;
pub const DS0: u16 = 0x10;
pub const UCS32: u16 = 0x1b;
pub const UDS: u16 = 0x23;
pub const UCS64: u16 = 0x2b;
pub const TR: u16 = 0x30;
pub const CS32: u16 = 0x40;
pub const CS16: u16 = 0x48;
pub const DS16: u16 = 0x50;
pub const TR_B: u16 = 0x58;
pub const GATE: u16 = 0x60;
pub const LDT: u16 = 0x70;
pub const CONFORMING: u16 = 0x80;
pub const ABSENT_DATA: u16 = 0x88;
pub const EXPAND_DOWN: u16 = 0x90;
pub const READ_ONLY: u16 = 0x98;
pub const EXEC_ONLY: u16 = 0xa0;
pub const ABSENT_CODE: u16 = 0xa8;
pub const UNACCESSED: u16 = 0xb0;
const GDT_LIMIT: u16 = 0xbf;

/// A system-segment descriptor.
pub fn system_descriptor(base: u64, limit: u32, kind: u8, dpl: u8) -> u64 {
    u64::from(limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(kind | dpl << 5 | 0x80) << 40
        | u64::from(limit >> 16) << 48
        | (base & 0xff00_0000) << 32
}

/// A call, interrupt or task gate; `low` is the count or IST byte.
pub fn gate(selector: u16, offset: u32, kind: u8, dpl: u8, low: u8) -> u64 {
    u64::from(offset & 0xffff)
        | u64::from(selector) << 16
        | u64::from(low) << 32
        | u64::from(kind | dpl << 5 | 0x80) << 40
        | u64::from(offset >> 16) << 48
}

fn write_gdt(env: &mut Fake, tss_kind: u8) {
    for (selector, raw) in [
        (CS64, 0x00af_9b00_0000_ffffu64),
        (DS0, 0x00cf_9300_0000_ffff),
        (UCS32, 0x00cf_fb00_0000_ffff),
        (UDS, 0x00cf_f300_0000_ffff),
        (UCS64, 0x00af_fb00_0000_ffff),
        (TR, system_descriptor(TSS, 0x67 + 0x21, tss_kind, 0)),
        (CS32, 0x00cf_9b00_0000_ffff),
        (CS16, 0x0000_9b00_0000_ffff),
        (DS16, 0x0000_9300_0000_ffff),
        (TR_B, system_descriptor(TSS_B, 0x67, 9, 0)),
        (LDT, system_descriptor(0x5000, 0xff, 2, 0)),
        (CONFORMING, 0x00cf_9f00_0000_ffff),
        (ABSENT_DATA, 0x00cf_7300_0000_ffff),
        (EXPAND_DOWN, 0x0040_9700_0000_0fff),
        (READ_ONLY, 0x00cf_9100_0000_ffff),
        (EXEC_ONLY, 0x00cf_9900_0000_ffff),
        (ABSENT_CODE, 0x00cf_1b00_0000_ffff),
        (UNACCESSED, 0x00cf_9200_0000_ffff),
    ] {
        env.w64(GDT + u64::from(selector & !7), raw);
    }
}

pub fn segment(env: &mut Fake, selector: u16) -> Segment {
    let raw = env.r64(GDT + u64::from(selector & !7));
    crate::segment::Descriptor {
        raw,
        upper: 0,
        address: 0,
    }
    .segment(selector)
}

fn base_cpu(env: &mut Fake, cs: u16) -> CpuState {
    let mut cpu = CpuState::default();
    cpu.gdtr.base = GDT;
    cpu.gdtr.limit = GDT_LIMIT;
    cpu.idtr.base = IDT;
    cpu.idtr.limit = 0xfff;
    for index in 0..6 {
        cpu.seg[index] = segment(env, DS0);
    }
    cpu.seg[sreg::CS] = segment(env, cs);
    cpu.tr = segment(env, TR);
    cpu.ldtr.unusable = true;
    cpu.rip = CODE;
    cpu.gpr[gpr::RSP] = STACK;
    cpu
}

/// 64-bit mode at CPL 0, 1 GiB mapped to itself for everyone.
pub fn long_mode() -> (CpuState, Fake) {
    let mut env = Fake::new(1 << 20);
    write_gdt(&mut env, 11);
    env.w64(TABLES, (TABLES + 0x1000) | 0x27);
    env.w64(TABLES + 0x1000, 0xe7);
    env.w64(TSS + 4, KERNEL_STACK);
    env.w64(TSS + 0x24, 0xc000);
    let mut cpu = base_cpu(&mut env, CS64);
    cpu.cr0 = CR0_PE | CR0_PG | CR0_WP | CR0_ET | CR0_NE;
    cpu.cr4 = CR4_PAE;
    cpu.cr3 = TABLES;
    cpu.efer = EFER_LME | EFER_LMA | EFER_SCE | EFER_NXE;
    (cpu, env)
}

/// 32-bit protected mode at CPL 0 without paging.
pub fn protected() -> (CpuState, Fake) {
    let mut env = Fake::new(1 << 20);
    write_gdt(&mut env, 11);
    env.w32(TSS + 4, KERNEL_STACK as u32);
    env.w32(TSS + 8, u32::from(DS0));
    let mut cpu = base_cpu(&mut env, CS32);
    cpu.cr0 = CR0_PE | CR0_ET;
    (cpu, env)
}

/// Real mode with CS = 0x0100, SS = 0.
pub fn real() -> (CpuState, Fake) {
    let env = Fake::new(1 << 20);
    let mut cpu = CpuState::default();
    cpu.seg[sreg::CS].base = 0x1000;
    cpu.seg[sreg::CS].selector = 0x100;
    cpu.idtr.limit = 0x3ff;
    cpu.rip = 0x20;
    cpu.gpr[gpr::RSP] = 0x800;
    (cpu, env)
}

/// Virtual-8086 mode under the protected machine.
pub fn v86() -> (CpuState, Fake) {
    let (mut cpu, env) = protected();
    cpu.rflags |= VM;
    cpu.cpl = 3;
    for index in 0..6 {
        cpu.seg[index] = crate::segment::v86_segment(0x100 + index as u16);
    }
    cpu.rip = 0x20;
    cpu.gpr[gpr::RSP] = 0x800;
    (cpu, env)
}

/// Moves a machine to CPL 3.
pub fn to_user(cpu: &mut CpuState, env: &mut Fake, cs: u16) {
    cpu.seg[sreg::CS] = segment(env, cs);
    for index in [sreg::ES, sreg::SS, sreg::DS, sreg::FS, sreg::GS] {
        cpu.seg[index] = segment(env, UDS);
    }
    cpu.cpl = 3;
    cpu.gpr[gpr::RSP] = USER_STACK;
}

/// Decodes `bytes` in the current mode and gives them to the system side.
pub fn exec(cpu: &mut CpuState, env: &mut Fake, bytes: &[u8]) -> Result<(), Stop> {
    let bits = cpu.code_size() as u32;
    let mut decoder = iced_x86::Decoder::with_ip(bits, bytes, cpu.rip, 0);
    let insn = decoder.decode();
    assert!(!insn.is_invalid(), "test bytes decode: {bytes:02x?}");
    system_step(cpu, env, &insn).expect("a system instruction")
}

/// The parts of the state that a failed instruction must leave alone.
pub fn visible(cpu: &CpuState) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        (cpu.gpr, cpu.rip, cpu.rflags, cpu.seg, cpu.ldtr, cpu.tr),
        (cpu.gdtr, cpu.idtr, cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer),
        (
            cpu.cpl,
            cpu.shadow,
            cpu.nmi_blocked,
            cpu.dr,
            cpu.dr6,
            cpu.dr7,
        ),
    )
}
