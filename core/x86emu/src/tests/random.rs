//! A small deterministic generator, and random instructions and states made with it.

use crate::state::*;
use iced_x86::{Code, Instruction, OpCodeOperandKind, OpKind, Register, RoundingControl};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = self.next() as u8;
        }
    }
    /// Integers near where arithmetic is interesting.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => self.below(256),
            4 => (1u64 << self.below(64)).wrapping_sub(1),
            5 => self.next() as u32 as u64,
            _ => self.next(),
        }
    }
    /// One of the given registers' n-th successors.
    pub fn register(&mut self, base: Register, numbers: &[u8]) -> Register {
        let n = self.pick(numbers) as usize;
        Register::values().nth(base as usize + n).unwrap()
    }

    /// General-purpose registers and vector state. `wild`: unmasked exceptions too.
    pub fn state(&mut self, cpu: &mut CpuState, wild: bool) {
        for n in 0..16 {
            if n != gpr::RSP {
                cpu.gpr[n] = self.value();
            }
        }
        cpu.rflags = cpu.rflags & !0x8d5 | self.next() & 0x8d5;
        cpu.reset_fpu();
        let area = &mut cpu.xsave.0;
        self.fill(&mut area[32..416]);
        let floats = self.one_in(2);
        for n in 0..8 {
            area[42 + 16 * n..48 + 16 * n].fill(0);
            if floats {
                // Ordinary numbers instead of mostly invalid ones.
                area[39 + 16 * n] |= 0x80;
                let sign = (self.below(2) as u16) << 15;
                let exponent = (0x3fff - 20 + self.below(40) as u16) | sign;
                area[40 + 16 * n..42 + 16 * n].copy_from_slice(&exponent.to_le_bytes());
            }
        }
        for (component, len) in [(2, 256), (5, 64), (6, 512), (7, 1024)] {
            let (offset, size) = crate::interp::vector::layout(component);
            if size == len {
                self.fill(&mut area[offset..offset + size]);
            }
        }
        let control: u16 = 0x37f & !((self.below(4) as u16) << 10) | (self.below(4) as u16) << 10;
        let control = if wild && self.one_in(4) {
            control & !(self.next() as u16 & 0x3f)
        } else {
            control
        };
        area[0..2].copy_from_slice(&control.to_le_bytes());
        // No pending exceptions, any TOP and condition codes.
        area[2..4].copy_from_slice(&(self.next() as u16 & 0x7f00).to_le_bytes());
        area[4] = self.pick(&[0xff, 0, 0x80, self.0 as u8]);
        let mut mxcsr = 0x1f80 | (self.below(4) as u32) << 13;
        if wild && self.one_in(4) {
            mxcsr &= !(self.next() as u32 & 0x1f80);
        }
        area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        area[512] = host_components();
    }

    /// A random instruction of `code`; `memory`: with its memory operand at `[rbx + rsi * scale +
    /// disp]`. RSP, RBX and RSI are not used otherwise. `None`: it has no such form.
    pub fn instruction(&mut self, code: Code, memory: bool, bits: u32) -> Option<Instruction> {
        use OpCodeOperandKind as K;
        let mut insn = Instruction::default();
        insn.set_code(code);
        let op = code.op_code();
        let long = bits == 64;
        let gprs: &[u8] = if long {
            &[0, 1, 2, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        } else {
            &[0, 1, 2, 5, 7]
        };
        // AL CL DL, AH CH DH BH, BPL DIL R8B…
        let bytes: &[u8] = if long {
            &[0, 1, 2, 4, 5, 6, 9, 11, 12, 13, 19]
        } else {
            &[0, 1, 2, 4, 5, 6]
        };
        let evex = op.encoding() == iced_x86::EncodingKind::EVEX;
        let vectors: &[u8] = match (long, evex) {
            (false, _) => &[0, 1, 2, 3, 4, 5, 6, 7],
            (true, false) => &[0, 1, 5, 7, 8, 11, 15],
            (true, true) => &[0, 1, 7, 8, 15, 16, 20, 31],
        };
        let low = &[0, 1, 2, 3, 4, 5, 6, 7];
        let mut used_memory = false;
        let mut immediates = 0;
        for n in 0..op.op_count() {
            let (or_memory, register) = match op.op_kind(n) {
                K::mem => (true, None),
                K::r8_or_mem => (true, Some(self.register(Register::AL, bytes))),
                K::r16_or_mem => (true, Some(self.register(Register::AX, gprs))),
                K::r32_or_mem => (true, Some(self.register(Register::EAX, gprs))),
                K::r64_or_mem => (true, Some(self.register(Register::RAX, gprs))),
                K::xmm_or_mem => (true, Some(self.register(Register::XMM0, vectors))),
                K::ymm_or_mem => (true, Some(self.register(Register::YMM0, vectors))),
                K::zmm_or_mem => (true, Some(self.register(Register::ZMM0, vectors))),
                K::mm_or_mem => (true, Some(self.register(Register::MM0, low))),
                K::k_or_mem => (true, Some(self.register(Register::K0, low))),
                K::r8_reg | K::r8_opcode => (false, Some(self.register(Register::AL, bytes))),
                K::r16_reg | K::r16_rm | K::r16_opcode => {
                    (false, Some(self.register(Register::AX, gprs)))
                }
                K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                    (false, Some(self.register(Register::EAX, gprs)))
                }
                K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                    (false, Some(self.register(Register::RAX, gprs)))
                }
                K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                    (false, Some(self.register(Register::XMM0, vectors)))
                }
                K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                    (false, Some(self.register(Register::YMM0, vectors)))
                }
                K::zmm_reg | K::zmm_rm | K::zmm_vvvv => {
                    (false, Some(self.register(Register::ZMM0, vectors)))
                }
                K::mm_reg | K::mm_rm => (false, Some(self.register(Register::MM0, low))),
                K::k_reg | K::k_rm | K::k_vvvv => (false, Some(self.register(Register::K0, low))),
                K::al => (false, Some(Register::AL)),
                K::cl => (false, Some(Register::CL)),
                K::ax => (false, Some(Register::AX)),
                K::eax => (false, Some(Register::EAX)),
                K::rax => (false, Some(Register::RAX)),
                K::st0 => (false, Some(Register::ST0)),
                K::sti_opcode => (false, Some(self.register(Register::ST0, low))),
                K::imm8 | K::imm4_m2z if immediates == 0 => {
                    immediates += 1;
                    insn.set_op_kind(n, OpKind::Immediate8);
                    let limit = if op.op_kind(n) == K::imm8 { 256 } else { 4 };
                    insn.set_immediate8(self.below(limit) as u8);
                    continue;
                }
                K::imm8_const_1 => {
                    insn.set_op_kind(n, OpKind::Immediate8);
                    insn.set_immediate8(1);
                    continue;
                }
                K::imm8 => {
                    insn.set_op_kind(n, OpKind::Immediate8_2nd);
                    insn.set_immediate8_2nd(self.next() as u8);
                    continue;
                }
                K::imm16 => {
                    insn.set_op_kind(n, OpKind::Immediate16);
                    insn.set_immediate16(self.value() as u16);
                    continue;
                }
                K::imm32 => {
                    insn.set_op_kind(n, OpKind::Immediate32);
                    insn.set_immediate32(self.value() as u32);
                    continue;
                }
                K::imm64 => {
                    insn.set_op_kind(n, OpKind::Immediate64);
                    insn.set_immediate64(self.value());
                    continue;
                }
                kind @ (K::imm8sex16 | K::imm8sex32 | K::imm8sex64) => {
                    insn.set_op_kind(
                        n,
                        match kind {
                            K::imm8sex16 => OpKind::Immediate8to16,
                            K::imm8sex32 => OpKind::Immediate8to32,
                            _ => OpKind::Immediate8to64,
                        },
                    );
                    insn.set_immediate8(self.next() as u8);
                    continue;
                }
                K::imm32sex64 => {
                    insn.set_op_kind(n, OpKind::Immediate32to64);
                    insn.set_immediate32(self.value() as u32);
                    continue;
                }
                _ => return None,
            };
            if or_memory && (memory || register.is_none()) {
                used_memory = true;
                insn.set_op_kind(n, OpKind::Memory);
                let (base, index) = match bits {
                    64 => (Register::RBX, Register::RSI),
                    32 => (Register::EBX, Register::ESI),
                    _ => (Register::BX, Register::SI),
                };
                insn.set_memory_base(base);
                if self.one_in(2) {
                    insn.set_memory_index(index);
                    if bits != 16 {
                        insn.set_memory_index_scale(1 << self.below(4));
                    }
                }
                insn.set_memory_displ_size(bits / 8);
                insn.set_memory_displacement64(self.below(0x100));
            } else {
                insn.set_op_kind(n, OpKind::Register);
                insn.set_op_register(n, register?);
            }
        }
        if used_memory != memory {
            return None;
        }
        if op.can_use_op_mask_register() && (op.require_op_mask_register() || self.one_in(2)) {
            insn.set_op_mask(self.register(Register::K1, &[0, 1, 2, 3, 4, 5, 6]));
            let stores = memory && insn.op0_kind() == OpKind::Memory;
            if op.can_use_zeroing_masking() && !stores && self.one_in(2) {
                insn.set_zeroing_masking(true);
            }
        }
        if memory && op.can_broadcast() && self.one_in(2) {
            insn.set_is_broadcast(true);
        }
        if !memory && op.can_use_rounding_control() && self.one_in(3) {
            insn.set_rounding_control(self.pick(&[
                RoundingControl::RoundDown,
                RoundingControl::RoundUp,
                RoundingControl::RoundTowardZero,
            ]));
        }
        if memory && op.can_use_lock_prefix() && insn.op0_kind() == OpKind::Memory && self.one_in(2)
        {
            insn.set_has_lock_prefix(true);
        }
        Some(insn)
    }
}

/// The XSAVE components that the host and the tests use.
pub fn host_components() -> u8 {
    [2, 5, 6, 7]
        .into_iter()
        .filter(|&n| crate::interp::vector::layout(n).1 != 0)
        .fold(3, |bits, n| bits | 1 << n)
}
