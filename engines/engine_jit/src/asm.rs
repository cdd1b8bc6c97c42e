//! A small assembler for the glue around copied guest instructions.
//!
//! Guest instructions are re-emitted by [`x86emu::encoding`]; this emits address computations, TLB
//! probes, jumps and calls. It covers the forms the translator uses and no more.

/// A host register number (ModRM encoding).
pub type Reg = u8;

/// Host registers by name.
pub mod reg {
    #![allow(missing_docs)]
    use super::Reg;
    pub const RAX: Reg = 0;
    pub const RCX: Reg = 1;
    pub const RDX: Reg = 2;
    pub const RBX: Reg = 3;
    pub const RSP: Reg = 4;
    pub const RBP: Reg = 5;
    pub const RSI: Reg = 6;
    pub const RDI: Reg = 7;
    pub const R8: Reg = 8;
    pub const R10: Reg = 10;
    pub const R11: Reg = 11;
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub enum Mem {
    /// `gs:[disp]`
    Gs(i32),
    /// `gs:[base + disp]`
    GsBase(Reg, i32),
    /// `gs:[index * 8 + disp]`
    GsIndex(Reg, i32),
    /// `[base + index * (1 << scale) + disp]`
    Sib(Option<Reg>, Option<(Reg, u8)>, i32),
}

/// `[base + disp]`
pub fn at(base: Reg, disp: i32) -> Mem {
    Mem::Sib(Some(base), None, disp)
}

/// Condition codes, as in Jcc's low opcode bits.
pub mod cc {
    #![allow(missing_docs)]
    pub const B: u8 = 2;
    pub const AE: u8 = 3;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const A: u8 = 7;
}

/// Operand sizes of [`Asm::op`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// 8 bits.
    B,
    /// 16 bits.
    W,
    /// 32 bits.
    D,
    /// 64 bits.
    Q,
}

/// Code under construction for a known address.
pub struct Asm {
    /// The bytes so far.
    pub buf: Vec<u8>,
    /// Where `buf[0]` will execute.
    pub base: u64,
}

impl Asm {
    /// Starts code that will execute at `base`.
    pub fn new(base: u64) -> Self {
        Asm {
            buf: Vec::with_capacity(1024),
            base,
        }
    }

    /// Offset of the next byte.
    pub fn here(&self) -> usize {
        self.buf.len()
    }

    /// Address of the next byte.
    pub fn pc(&self) -> u64 {
        self.base + self.buf.len() as u64
    }

    /// Raw bytes.
    pub fn bytes(&mut self, b: &[u8]) {
        self.buf.extend_from_slice(b);
    }

    /// A little-endian 32-bit word.
    pub fn d32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }

    fn modrm_mem(&mut self, reg: Reg, mem: Mem) {
        let r = (reg & 7) << 3;
        match mem {
            Mem::Gs(disp) => {
                self.bytes(&[r | 4, 0x25]);
                self.d32(disp as u32);
            }
            Mem::GsBase(base, disp) => {
                self.buf.push(0x80 | r | base & 7);
                if base & 7 == 4 {
                    self.buf.push(0x24);
                }
                self.d32(disp as u32);
            }
            Mem::GsIndex(index, disp) => {
                self.bytes(&[r | 4, 0xc5 | (index & 7) << 3]);
                self.d32(disp as u32);
            }
            Mem::Sib(base, index, disp) => {
                let small = i8::try_from(disp).ok();
                let (md, no_base) = match (base, small) {
                    (None, _) => (0, true),
                    (Some(b), Some(0)) if b & 7 != 5 => (0, false),
                    (Some(_), Some(_)) => (0x40, false),
                    (Some(_), None) => (0x80, false),
                };
                let base_low = base.map_or(5, |b| b & 7);
                if let Some((i, scale)) = index {
                    debug_assert!(i != 4);
                    self.bytes(&[md | r | 4, scale << 6 | (i & 7) << 3 | base_low]);
                } else if no_base || base_low == 4 {
                    self.bytes(&[md | r | 4, 0x20 | base_low]);
                } else {
                    self.buf.push(md | r | base_low);
                }
                match md {
                    0 if no_base => self.d32(disp as u32),
                    0x40 => self.buf.push(disp as u8),
                    0x80 => self.d32(disp as u32),
                    _ => {}
                }
            }
        }
    }

    fn prefix(&mut self, size: Size, reg: Reg, mem: Mem, byte_reg: bool) {
        let (x, b) = match mem {
            Mem::Gs(_) => (0, 0),
            Mem::GsBase(base, _) => (0, base >> 3),
            Mem::GsIndex(index, _) => (index >> 3, 0),
            Mem::Sib(base, index, _) => {
                (index.map_or(0, |(i, _)| i >> 3), base.map_or(0, |b| b >> 3))
            }
        };
        if matches!(mem, Mem::Gs(_) | Mem::GsBase(..) | Mem::GsIndex(..)) {
            self.buf.push(0x65);
        }
        if size == Size::W {
            self.buf.push(0x66);
        }
        let rex = u8::from(size == Size::Q) << 3 | (reg >> 3) << 2 | x << 1 | b;
        if rex != 0 || byte_reg && reg >= 4 {
            self.buf.push(0x40 | rex);
        }
    }

    /// `opcode reg, mem` or `opcode mem, reg`.
    pub fn op_mem(&mut self, size: Size, opcode: &[u8], reg: Reg, mem: Mem) {
        self.prefix(size, reg, mem, size == Size::B);
        self.bytes(opcode);
        self.modrm_mem(reg, mem);
    }

    /// `opcode rm, reg` (both registers).
    pub fn op_reg(&mut self, size: Size, opcode: &[u8], reg: Reg, rm: Reg) {
        if size == Size::W {
            self.buf.push(0x66);
        }
        let rex = u8::from(size == Size::Q) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0 || size == Size::B && (reg >= 4 || rm >= 4) {
            self.buf.push(0x40 | rex);
        }
        self.bytes(opcode);
        self.buf.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// `mov dst, src` (64-bit).
    pub fn mov(&mut self, dst: Reg, src: Reg) {
        if dst != src {
            self.op_reg(Size::Q, &[0x89], src, dst);
        }
    }

    /// `mov dst, src` (32-bit, zero-extends).
    pub fn mov32(&mut self, dst: Reg, src: Reg) {
        self.op_reg(Size::D, &[0x89], src, dst);
    }

    /// Load.
    pub fn load(&mut self, size: Size, dst: Reg, mem: Mem) {
        match size {
            Size::B => self.op_mem(Size::D, &[0x0f, 0xb6], dst, mem),
            Size::W => self.op_mem(Size::D, &[0x0f, 0xb7], dst, mem),
            _ => self.op_mem(size, &[0x8b], dst, mem),
        }
    }

    /// Store.
    pub fn store(&mut self, size: Size, mem: Mem, src: Reg) {
        let op = if size == Size::B { 0x88 } else { 0x89 };
        self.op_mem(size, &[op], src, mem);
    }

    /// Store of an immediate (sign-extended for 64 bits).
    pub fn store_imm(&mut self, size: Size, mem: Mem, imm: i32) {
        match size {
            Size::B => {
                self.op_mem(Size::D, &[0xc6], 0, mem);
                self.buf.push(imm as u8);
            }
            Size::W => {
                self.op_mem(Size::W, &[0xc7], 0, mem);
                self.bytes(&(imm as u16).to_le_bytes());
            }
            _ => {
                self.op_mem(size, &[0xc7], 0, mem);
                self.d32(imm as u32);
            }
        }
    }

    /// `lea dst, mem` (64-bit).
    pub fn lea(&mut self, dst: Reg, mem: Mem) {
        self.op_mem(Size::Q, &[0x8d], dst, mem);
    }

    /// `lea dst, mem` (32-bit result).
    pub fn lea32(&mut self, dst: Reg, mem: Mem) {
        self.op_mem(Size::D, &[0x8d], dst, mem);
    }

    /// `mov dst, imm` in the shortest form.
    pub fn mov_imm(&mut self, dst: Reg, imm: u64) {
        if let Ok(v) = u32::try_from(imm) {
            if dst >= 8 {
                self.buf.push(0x41);
            }
            self.buf.push(0xb8 | dst & 7);
            self.d32(v);
        } else if let Ok(v) = i32::try_from(imm as i64) {
            self.bytes(&[0x48 | dst >> 3, 0xc7, 0xc0 | dst & 7]);
            self.d32(v as u32);
        } else {
            self.bytes(&[0x48 | dst >> 3, 0xb8 | dst & 7]);
            self.bytes(&imm.to_le_bytes());
        }
    }

    /// Group-1 ALU operation `/n` with an immediate on a register. 0 add, 1 or, 4 and, 5 sub,
    /// 6 xor, 7 cmp.
    pub fn alu_imm(&mut self, size: Size, n: u8, rm: Reg, imm: i32) {
        if let Ok(v) = i8::try_from(imm) {
            self.op_reg(size, &[0x83], n, rm);
            self.buf.push(v as u8);
        } else {
            self.op_reg(size, &[0x81], n, rm);
            self.d32(imm as u32);
        }
    }

    /// `cmp size [mem], imm8`
    pub fn cmp_mem_imm8(&mut self, size: Size, mem: Mem, imm: i8) {
        let op = if size == Size::B { 0x80 } else { 0x83 };
        self.op_mem(if size == Size::B { Size::D } else { size }, &[op], 7, mem);
        self.buf.push(imm as u8);
    }

    /// `rorx dst, src, count` (BMI2; no flags).
    pub fn rorx(&mut self, dst: Reg, src: Reg, count: u8) {
        let b = u8::from(src < 8) << 5;
        let r = u8::from(dst < 8) << 7;
        self.bytes(&[
            0xc4,
            r | 0x40 | b | 3,
            0xfb,
            0xf0,
            0xc0 | (dst & 7) << 3 | src & 7,
            count,
        ]);
    }

    /// `pext dst, src, gs:[mask]` (BMI2; no flags): the bits of `src` at the places of the mask's ones.
    pub fn pext(&mut self, dst: Reg, src: Reg, mask: i32) {
        let r = u8::from(dst < 8) << 7;
        self.bytes(&[
            0x65,
            0xc4,
            r | 0x60 | 2,
            0x80 | (!src & 15) << 3 | 2,
            0xf5,
            (dst & 7) << 3 | 4,
            0x25,
        ]);
        self.d32(mask as u32);
    }

    /// `shr reg, count`
    pub fn shr(&mut self, reg: Reg, count: u8) {
        self.op_reg(Size::Q, &[0xc1], 5, reg);
        self.buf.push(count);
    }

    /// `jcc rel32`, to be bound later; returns the position of the displacement.
    pub fn jcc(&mut self, cc: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | cc, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// `shrx dst, src, count` (BMI2; no flags).
    pub fn shrx(&mut self, dst: Reg, src: Reg, count: Reg) {
        let r = u8::from(dst < 8) << 7;
        let b = u8::from(src < 8) << 5;
        self.bytes(&[
            0xc4,
            r | 0x40 | b | 2,
            0x80 | (!count & 15) << 3 | 3,
            0xf7,
            0xc0 | (dst & 7) << 3 | src & 7,
        ]);
    }

    /// `jcc rel8`, to be bound later with [`Asm::bind8`].
    pub fn jcc8(&mut self, cc: u8) -> usize {
        self.bytes(&[0x70 | cc, 0]);
        self.here() - 1
    }

    /// `jrcxz rel8`, to be bound later with [`Asm::bind8`].
    pub fn jrcxz(&mut self) -> usize {
        self.bytes(&[0xe3, 0]);
        self.here() - 1
    }

    /// `jmp rel32`, to be bound later.
    pub fn jmp(&mut self) -> usize {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        self.here() - 4
    }

    /// Pads so that a rel32 behind `opcode` more bytes lies in one cache line: then it can be
    /// patched while other vCPUs execute it.
    pub fn align_link(&mut self, opcode: u64) {
        while (self.pc() + opcode) % 64 > 60 {
            self.buf.push(0x90);
        }
    }

    /// Binds a rel32 to here.
    pub fn bind(&mut self, pos: usize) {
        let rel = (self.here() - pos - 4) as u32;
        self.buf[pos..pos + 4].copy_from_slice(&rel.to_le_bytes());
    }

    /// Binds a rel32 to an earlier or later offset of this code.
    pub fn bind_to(&mut self, pos: usize, target: usize) {
        let rel = (target as i64 - pos as i64 - 4) as i32;
        self.buf[pos..pos + 4].copy_from_slice(&rel.to_le_bytes());
    }

    /// Binds a rel32 to an absolute address within 2 GiB.
    pub fn bind_abs(&mut self, pos: usize, target: u64) {
        let rel = target.wrapping_sub(self.base + pos as u64 + 4) as u32;
        self.buf[pos..pos + 4].copy_from_slice(&rel.to_le_bytes());
    }

    /// Binds a rel8 to here.
    pub fn bind8(&mut self, pos: usize) {
        let rel = self.here() - pos - 1;
        debug_assert!(rel < 128);
        self.buf[pos] = rel as u8;
    }

    /// `jmp` to an absolute address within 2 GiB.
    pub fn jmp_to(&mut self, target: u64) {
        let rel = target.wrapping_sub(self.pc() + 5) as u32;
        self.buf.push(0xe9);
        self.d32(rel);
    }

    /// `jcc` to an absolute address within 2 GiB.
    pub fn jcc_to(&mut self, cc: u8, target: u64) {
        let rel = target.wrapping_sub(self.pc() + 6) as u32;
        self.bytes(&[0x0f, 0x80 | cc]);
        self.d32(rel);
    }

    /// `call` of an absolute address within 2 GiB.
    pub fn call_to(&mut self, target: u64) {
        let rel = target.wrapping_sub(self.pc() + 5) as u32;
        self.buf.push(0xe8);
        self.d32(rel);
    }

    /// `jmp [mem]`
    pub fn jmp_mem(&mut self, mem: Mem) {
        self.op_mem(Size::D, &[0xff], 4, mem);
    }
}
