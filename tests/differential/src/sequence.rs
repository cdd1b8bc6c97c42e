//! Runs of instructions: straight code, forward branches, loops, calls, stack traffic and stores into
//! the code that follows.

use crate::case::Case;
use crate::forms::{self, Pointers, encode};
use crate::layout::*;
use crate::random::Random;
use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess,
    Register,
};

/// What sequences are made of.
pub struct Pool {
    common: Vec<Code>,
    any: Vec<Code>,
    bits: u32,
}

fn is_common(code: Code) -> bool {
    use Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Mov
            | M::Add
            | M::Sub
            | M::Adc
            | M::Sbb
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Lea
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Imul
            | M::Mul
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Popcnt
            | M::Sete
            | M::Setne
            | M::Setb
            | M::Setg
            | M::Setl
            | M::Seto
            | M::Setp
            | M::Cmove
            | M::Cmovne
            | M::Cmovb
            | M::Cmova
            | M::Cmovg
            | M::Cmovl
            | M::Cmovs
            | M::Cmovo
            | M::Cmovp
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Bswap
            | M::Lahf
            | M::Sahf
            | M::Stc
            | M::Clc
            | M::Cmc
            | M::Movaps
            | M::Movups
            | M::Movd
            | M::Movq
            | M::Addps
            | M::Mulsd
            | M::Addsd
            | M::Pxor
            | M::Paddd
            | M::Ucomisd
            | M::Fld
            | M::Fstp
            | M::Fadd
            | M::Fmul
            | M::Andn
            | M::Rorx
            | M::Shlx
            | M::Mulx
            | M::Adcx
            | M::Adox
            | M::Movbe
            | M::Crc32
    )
}

fn usable(code: Code, bits: u32) -> bool {
    let mut insn = Instruction::default();
    insn.set_code(code);
    let op = code.op_code();
    let rules = forms::rules(&insn);
    code.flow_control() == FlowControl::Next
        && !code.is_stack_instruction()
        && rules.native
        && rules.values
        // Stores of x87 pointers, which are not kept, and of state in no fixed form.
        && rules.memory
        && rules.fault
        && !matches!(
            code.mnemonic(),
            Mnemonic::Fnsave | Mnemonic::Fsave | Mnemonic::Fnstenv | Mnemonic::Fstenv
        )
        && op.cpl3()
        && !insn.is_privileged()
        && !matches!(code.mnemonic(), Mnemonic::Wrfsbase | Mnemonic::Wrgsbase | Mnemonic::Bound | Mnemonic::Into)
        && !(bits == 32 && code.mnemonic() == Mnemonic::Salc)
}

/// Instructions after which the processor leaves flags alone that the manuals call undefined. The
/// translator does not keep those, so that code which looks at them gets something else.
fn keeps_undefined_flags(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Mul
            | M::Imul
            | M::Div
            | M::Idiv
            | M::Bsf
            | M::Bsr
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Shld
            | M::Shrd
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Lzcnt
            | M::Tzcnt
            | M::Bzhi
            | M::Blsi
            | M::Blsr
            | M::Blsmsk
            | M::Bextr
            | M::Andn
    )
}

/// Forms that mostly end a sequence early.
fn rare(code: Code) -> bool {
    let op = code.op_code();
    use iced_x86::OpCodeOperandKind as K;
    op.op_kinds().iter().any(|k| {
        matches!(
            k,
            K::seg_rSI
                | K::es_rDI
                | K::seg_rDI
                | K::seg_rBX_al
                | K::mem_vsib32x
                | K::mem_vsib32y
                | K::mem_vsib32z
                | K::mem_vsib64x
                | K::mem_vsib64y
                | K::mem_vsib64z
                | K::seg_reg
                | K::mem_offs
                | K::cr_reg
                | K::dr_reg
        )
    }) || code.is_save_restore_instruction()
        || matches!(
            code.mnemonic(),
            Mnemonic::Ldmxcsr
                | Mnemonic::Vldmxcsr
                | Mnemonic::Fldenv
                | Mnemonic::Frstor
                | Mnemonic::Fldcw
                | Mnemonic::Div
                | Mnemonic::Idiv
                | Mnemonic::Clzero
                | Mnemonic::Lfs
                | Mnemonic::Lgs
                | Mnemonic::Lss
        )
        || format!("{:?}", op.encoding()).contains("XOP")
        || code.cpuid_features().iter().any(|f| !host_has(*f))
}

/// A guess by name; a wrong one costs a sequence that ends in #UD.
fn host_has(f: iced_x86::CpuidFeature) -> bool {
    use iced_x86::CpuidFeature as F;
    use std::arch::is_x86_feature_detected as has;
    match f {
        F::AVX => has!("avx"),
        F::AVX2 => has!("avx2"),
        F::FMA => has!("fma"),
        F::F16C => has!("f16c"),
        F::BMI1 => has!("bmi1"),
        F::BMI2 => has!("bmi2"),
        F::AVX512F => has!("avx512f"),
        F::AVX512BW => has!("avx512bw"),
        F::AVX512DQ => has!("avx512dq"),
        F::AVX512VL => has!("avx512vl"),
        F::AVX512CD => has!("avx512cd"),
        F::AVX512_IFMA => has!("avx512ifma"),
        F::AVX512_VBMI => has!("avx512vbmi"),
        F::AVX512_VBMI2 => has!("avx512vbmi2"),
        F::AVX512_VNNI => has!("avx512vnni"),
        F::AVX512_BITALG => has!("avx512bitalg"),
        F::AVX512_VPOPCNTDQ => has!("avx512vpopcntdq"),
        F::AES => has!("aes"),
        F::PCLMULQDQ => has!("pclmulqdq"),
        F::SHA => has!("sha"),
        F::GFNI => has!("gfni"),
        F::VAES => has!("vaes"),
        F::VPCLMULQDQ => has!("vpclmulqdq"),
        F::ADX => has!("adx"),
        F::MOVBE => has!("movbe"),
        F::LZCNT => has!("lzcnt"),
        F::POPCNT => has!("popcnt"),
        F::SSE4_1 => has!("sse4.1"),
        F::SSE4_2 => has!("sse4.2"),
        F::SSSE3 => has!("ssse3"),
        F::SSE4A => has!("sse4a"),
        F::INTEL8086
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::MMX
        | F::SSE
        | F::SSE2
        | F::SSE3
        | F::CMOV
        | F::CX8
        | F::CMPXCHG16B
        | F::CLFSH
        | F::MULTIBYTENOP
        | F::PAUSE
        | F::SMM
        | F::FXSR => true,
        _ => false,
    }
}

impl Pool {
    /// The forms for a mode.
    pub fn new(bits: u32) -> Self {
        let any: Vec<Code> = forms::all(bits)
            .into_iter()
            .filter(|c| usable(*c, bits))
            .collect();
        Pool {
            common: any
                .iter()
                .copied()
                .filter(|c| is_common(*c) && !rare(*c))
                .collect(),
            any,
            bits,
        }
    }
}

struct Writer<'a> {
    r: &'a mut Random,
    pool: &'a Pool,
    case: Case,
    pointers: Pointers,
    /// Registers that must keep their values.
    reserved: u32,
    info: InstructionInfoFactory,
    budget: usize,
    vector: bool,
}

/// A random sequence.
pub fn make(r: &mut Random, pool: &Pool) -> Case {
    let bits = pool.bits;
    let mut case = forms::state(r, bits);
    // Alignment checks and backward strings end most sequences at once.
    case.rflags &= !(1 << 18);
    if !r.one_in(16) {
        case.rflags &= !(1 << 10);
    }
    case.gpr[4] = STACK.linear + 0x2000 + (r.below(0x800) & !7);
    if r.one_in(8) {
        case.gpr[4] = STACK.linear + 2 * PAGE + r.below(64);
    }
    if bits == 64 && r.one_in(2) {
        // Where Linux puts stacks.
        case.gpr[4] = HIGH.linear + PAGE + (r.below(0x800) & !7);
    }
    if case.at > CODE.linear + 0x2000 {
        case.at = CODE.linear + 0xf80;
    }
    let count = if bits == 64 { 16 } else { 8 };
    let mut pointers = Pointers::default();
    let mut reserved = 1 << 4;
    while pointers.0.len() < 3 {
        let n = r.below(count) as u8;
        if reserved & (1 << n) != 0 {
            continue;
        }
        reserved |= 1 << n;
        let v = match r.below(6) {
            0 if bits == 64 => HIGH.linear + r.below(PAGE),
            _ => DATA.linear + r.below(2 * PAGE),
        };
        case.gpr[usize::from(n)] = v;
        pointers.0.push((n, v));
    }
    if pointers.0.iter().all(|p| p.1 > 1 << 32) {
        pointers.0[0].1 = DATA.linear;
        case.gpr[usize::from(pointers.0[0].0)] = DATA.linear;
    }
    if r.one_in(3) {
        pointers.0.push((4, case.gpr[4]));
    }
    let vector = r.one_in(2);
    let budget = 5 + r.below(36) as usize;
    let at = case.at;
    let mut w = Writer {
        r,
        pool,
        case,
        pointers,
        reserved,
        info: InstructionInfoFactory::new(),
        budget,
        vector,
    };
    let code = w.block(at, 0);
    let mut case = w.case;
    case.code = code;
    case.code.truncate(0x1800);
    case
}

impl Writer<'_> {
    fn long(&self) -> bool {
        self.pool.bits == 64
    }

    fn enc(&self, insn: Result<Instruction, iced_x86::IcedError>, at: u64) -> Vec<u8> {
        insn.ok()
            .and_then(|i| encode(&i, self.pool.bits, at))
            .unwrap_or_else(|| vec![0x90])
    }

    fn free(&mut self) -> u8 {
        loop {
            let n = self.r.below(if self.long() { 16 } else { 8 }) as u8;
            if self.reserved & (1 << n) == 0 {
                return n;
            }
        }
    }

    fn wide(&self, n: u8) -> Register {
        let first = if self.long() {
            Register::RAX
        } else {
            Register::EAX
        };
        first + u32::from(n)
    }

    /// One instruction that leaves the reserved registers alone.
    fn plain(&mut self, at: u64) -> Vec<u8> {
        for _ in 0..50 {
            let code = if self.r.below(10) < if self.vector { 5 } else { 9 } {
                self.pool.common[self.r.below(self.pool.common.len() as u64) as usize]
            } else {
                self.pool.any[self.r.below(self.pool.any.len() as u64) as usize]
            };
            if rare(code) && !self.r.one_in(40) {
                continue;
            }
            let pointers = self.pointers.clone();
            let saved = self.case.clone();
            let insn = forms::operands(self.r, code, &mut self.case, Some(&pointers));
            // Operand choice must not change the state that earlier code relies on.
            self.case = saved;
            let Some(insn) = insn else { continue };
            let reserved = self.reserved;
            let bad = self.info.info(&insn).used_registers().iter().any(|u| {
                let w = !matches!(
                    u.access(),
                    OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
                );
                let r = u.register();
                w && r.is_gpr() && reserved & (1 << (r.full_register().number() % 16)) != 0
            });
            if bad {
                continue;
            }
            if let Some(mut bytes) = encode(&insn, self.pool.bits, at) {
                if keeps_undefined_flags(&insn) {
                    // The carry may be looked at where it is defined.
                    if forms::undefined(&insn) & 1 == 0 && self.r.one_in(2) {
                        let n = self.free();
                        let cc = if self.r.one_in(2) { 0x92 } else { 0x93 };
                        if n < 4 {
                            bytes.extend([0x0f, cc, 0xc0 | n]);
                        }
                    }
                    bytes.extend([0x3c, self.r.bits() as u8]);
                }
                return bytes;
            }
        }
        vec![0x90]
    }

    /// A block of code for address `at`.
    fn block(&mut self, at: u64, depth: u32) -> Vec<u8> {
        let mut out = Vec::new();
        let items = 1 + self.r.below(if depth == 0 { 60 } else { 8 });
        for _ in 0..items {
            if self.budget == 0 {
                break;
            }
            self.budget -= 1;
            let here = at + out.len() as u64;
            let kind = if depth > 3 { 99 } else { self.r.below(40) };
            let bytes = match kind {
                0..=3 => self.forward(here, depth),
                4 | 5 => self.repeat(here, depth),
                6 | 7 => self.call(here, depth),
                8..=10 => self.push_pop(here, depth),
                11 => self.modify(here),
                12 => self.indirect(here, depth),
                13 => self.far_apart(here),
                _ => self.plain(here),
            };
            out.extend(bytes);
        }
        out
    }

    fn condition(&mut self) -> u8 {
        self.r.below(16) as u8
    }

    /// Jcc over a block.
    fn forward(&mut self, at: u64, depth: u32) -> Vec<u8> {
        let body = self.block(at + 6, depth + 1);
        let cc = self.condition();
        let mut out = Vec::new();
        if body.len() < 128 && self.r.one_in(2) {
            out.extend([0x0f, 0x1f, 0x40, 0x00, 0x70 | cc, body.len() as u8]);
        } else {
            out.extend([0x0f, 0x80 | cc]);
            out.extend((body.len() as u32).to_le_bytes());
        }
        out.extend(body);
        out
    }

    /// A loop of a few rounds.
    fn repeat(&mut self, at: u64, depth: u32) -> Vec<u8> {
        if self.reserved.count_ones() > if self.long() { 12 } else { 5 } {
            return self.plain(at);
        }
        let counter = self.free();
        let reg = self.wide(counter);
        let n = 1 + self.r.below(6) as i32;
        let code = if self.long() {
            Code::Mov_rm64_imm32
        } else {
            Code::Mov_rm32_imm32
        };
        let mut out = self.enc(Instruction::with2(code, reg, n), at);
        self.reserved |= 1 << counter;
        let start = at + out.len() as u64;
        out.extend(self.block(start, depth + 1));
        let dec = if self.long() {
            Code::Dec_rm64
        } else {
            Code::Dec_rm32
        };
        let how = self.r.below(3);
        if how == 0 {
            let add = if self.long() {
                Code::Sub_rm64_imm8
            } else {
                Code::Sub_rm32_imm8
            };
            let b = self.enc(Instruction::with2(add, reg, 1), at + out.len() as u64);
            out.extend(b);
        } else {
            let b = self.enc(Instruction::with1(dec, reg), at + out.len() as u64);
            out.extend(b);
        }
        let end = at + out.len() as u64;
        let back = start.wrapping_sub(end + 6) as i32;
        out.extend([0x0f, 0x85]);
        out.extend(back.to_le_bytes());
        self.reserved &= !(1 << counter);
        out
    }

    /// A call of a function behind a jump, direct or through a register or memory.
    fn call(&mut self, at: u64, depth: u32) -> Vec<u8> {
        let r = self.free();
        let reg = self.wide(r);
        let mut out = Vec::new();
        let (how, is_long) = (self.r.below(3), self.long());
        let mut call = match how {
            0 if is_long => {
                // lea reg, [rip + 5 + its call]; the displacement is filled in below.
                out = self.enc(
                    Instruction::with2(
                        Code::Lea_r64_m,
                        reg,
                        MemoryOperand::with_base_displ_size(Register::RIP, 0, 8),
                    ),
                    0u64.wrapping_sub(7),
                );
                self.enc(Instruction::with1(Code::Call_rm64, reg), 0)
            }
            _ => vec![0xe8, 5, 0, 0, 0],
        };
        let lea = out.len();
        let after = lea + call.len();
        let function = after + 5;
        if lea > 0 {
            let disp = (function - lea) as u32;
            let n = out.len();
            out[n - 4..].copy_from_slice(&disp.to_le_bytes());
        }
        out.append(&mut call);
        let mut body = self.block(at + function as u64, depth + 1);
        if self.r.one_in(6) {
            body.extend([0xf3, 0xc3]);
        } else {
            body.push(0xc3);
        }
        out.push(0xe9);
        out.extend((body.len() as u32).to_le_bytes());
        out.extend(body);
        out
    }

    /// An indirect jump over some bytes that are no code.
    fn indirect(&mut self, _at: u64, _depth: u32) -> Vec<u8> {
        if !self.long() {
            return vec![0xeb, 1, 0xcc];
        }
        let r = self.free();
        let reg = self.wide(r);
        let mut out = self.enc(
            Instruction::with2(
                Code::Lea_r64_m,
                reg,
                MemoryOperand::with_base_displ_size(Register::RIP, 0, 8),
            ),
            0u64.wrapping_sub(7),
        );
        let jump = self.enc(Instruction::with1(Code::Jmp_rm64, reg), 0);
        let gap = self.r.below(20) as usize;
        let n = out.len();
        out[n - 4..].copy_from_slice(&((jump.len() + gap) as u32).to_le_bytes());
        out.extend(jump);
        out.extend(std::iter::repeat_n(0xcc, gap));
        out
    }

    /// Jumps over enough bytes to get into another page now and then.
    fn far_apart(&mut self, at: u64) -> Vec<u8> {
        let gap = if self.r.one_in(4) && at < CODE.linear + 0x2000 {
            0x400
        } else {
            0x40
        };
        let gap = self.r.below(gap) as u32;
        let mut out = vec![0xe9];
        out.extend(gap.to_le_bytes());
        out.extend(std::iter::repeat_n(0xcc, gap as usize));
        out
    }

    /// PUSH, some code, POP to another register.
    fn push_pop(&mut self, at: u64, depth: u32) -> Vec<u8> {
        let long = self.long();
        let mut out = match self.r.below(6) {
            0 => vec![0x6a, self.r.bits() as u8],
            1 => vec![0x9c],
            2 => {
                let (p, v) = self.pointers.0[0];
                let near = v & !0xfff | 0x800;
                let m = MemoryOperand::with_base_displ_size(
                    self.wide(p),
                    near.wrapping_sub(v) as i64,
                    if long { 8 } else { 4 },
                );
                let code = if long {
                    Code::Push_rm64
                } else {
                    Code::Push_rm32
                };
                self.enc(Instruction::with1(code, m), at)
            }
            _ => {
                let n = self.r.below(if long { 16 } else { 8 }) as u8;
                let code = if long { Code::Push_r64 } else { Code::Push_r32 };
                let reg = self.wide(n);
                self.enc(Instruction::with1(code, reg), at)
            }
        };
        if out == [0x90] {
            return out;
        }
        // RSP moves: memory through it would move too.
        let pointers = self.pointers.clone();
        self.pointers.0.retain(|p| p.0 != 4);
        let body = self.block(at + out.len() as u64, depth + 1);
        self.pointers = pointers;
        out.extend(body);
        let n = self.free();
        let code = if long { Code::Pop_r64 } else { Code::Pop_r32 };
        let reg = self.wide(n);
        let b = self.enc(Instruction::with1(code, reg), at);
        out.extend(b);
        out
    }

    /// A store into the immediate of an instruction further on.
    fn modify(&mut self, at: u64) -> Vec<u8> {
        if !self.long() {
            return self.plain(at);
        }
        let n = self.free();
        // mov dword [rip + x], imm32 is 10 bytes
        let mut between = Vec::new();
        for _ in 0..self.r.below(4) {
            let b = self.plain(at + 10 + between.len() as u64);
            between.extend(b);
        }
        let target = self.enc(
            Instruction::with2(
                Code::Mov_r32_imm32,
                Register::EAX + u32::from(n),
                0x1122_3344,
            ),
            at,
        );
        let place = between.len() + target.len() - 4;
        if self.r.one_in(3) {
            // By way of the other mapping of the code, one byte further on.
            let to = at + 11 + place as u64 - CODE.linear + ALIAS.linear;
            let mut out = vec![0xc7, 0x04, 0x25];
            out.extend((to as u32).to_le_bytes());
            out.extend((self.r.bits() as u32).to_le_bytes());
            // A jump, so that the processor has to notice.
            out.extend(between);
            out.extend(target);
            return out;
        }
        let mut out = vec![0xc7, 0x05];
        out.extend((place as u32).to_le_bytes());
        out.extend((self.r.bits() as u32).to_le_bytes());
        out.extend(between);
        out.extend(target);
        out
    }
}
