//! Instructions taken apart byte by byte, and put together again with other operands.
//!
//! The guest's arithmetic runs on the host CPU, so an instruction is never lifted to an operation:
//! its prefixes, opcode and immediates are kept as they are, and only the fields that name registers
//! and memory change. That covers every extension whose encoding follows the legacy, VEX or EVEX
//! scheme, also ones that this code has never heard of.
//!
//! Sources may be 16-, 32- or 64-bit code; what is emitted is always 64-bit code.
//! (Intel SDM, "Instruction Format"; AVX-512: "EVEX Instruction Prefix".)

use crate::state::CodeSize;
use iced_x86::{Instruction, MandatoryPrefix, OpCodeOperandKind};

/// The longest instruction that [`Encoding::emit`] writes.
pub const MAX_LEN: usize = 16;

/// Which scheme extends the opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Legacy prefixes and REX.
    Legacy,
    /// Two- or three-byte VEX.
    Vex,
    /// EVEX.
    Evex,
}

/// An encoded field that names a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// ModRM.reg.
    Reg,
    /// ModRM.rm with mod 3, or the low bits of the opcode.
    Rm,
    /// VEX.vvvv or EVEX.vvvv.
    Vvvv,
}

/// A memory operand of emitted code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostMem {
    /// `[base + index]`
    BaseIndex(u8, u8),
    /// `[base + index + disp]`
    BaseIndexDisp(u8, u8, i32),
    /// `[base + disp]`
    BaseDisp(u8, i32),
    /// `gs:[disp]`, absolute.
    Gs(i32),
}

/// One instruction, taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Encoding {
    form: Form,
    lock: bool,
    opsize: bool,
    /// An address-size prefix of an instruction whose memory operand is implied.
    addrsize: bool,
    rep: u8,
    /// 0: one byte, 1: 0F, 2: 0F38, 3: 0F3A; EVEX also 5 and 6.
    map: u8,
    opcode: u8,
    w: bool,
    /// A REX prefix was there, so byte registers 4-7 are SPL, BPL, SIL, DIL.
    rex: bool,
    /// VEX/EVEX payload that is carried over: L/LL, pp; EVEX also z, b, aaa.
    pp: u8,
    ll: u8,
    z: bool,
    bcst: bool,
    aaa: u8,
    has_modrm: bool,
    opcode_reg: bool,
    reg: u8,
    vvvv: u8,
    rm: Rm,
    imm: [u8; 8],
    imm_len: u8,
    high_byte: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rm {
    None,
    Reg(u8),
    /// The guest's own memory operand: it must be replaced before emission.
    GuestMem,
    Host(HostMem),
}

/// One bit per opcode of the one-byte map: a ModRM byte follows.
const MODRM_ONE_BYTE: [u32; 8] = [
    0x0f0f_0f0f, // 00-1f
    0x0f0f_0f0f, // 20-3f
    0x0000_0000, // 40-5f
    0x0000_0a0c, // 60-7f: 62 63 69 6b
    0x0000_ffff, // 80-9f
    0x0000_0000, // a0-bf
    0xff0f_00f3, // c0-df: c0 c1 c4-c7 d0-d3 d8-df
    0xc0c0_0000, // e0-ff: f6 f7 fe ff
];

/// The same for the 0F map.
const MODRM_0F: [u32; 8] = [
    0xffff_a00f, // 00-1f: 00-03 0d 0f 10-1f
    0x0000_ff0f, // 20-3f: 20-23 28-2f
    0xffff_ffff, // 40-5f
    0xff7f_ffff, // 60-7f: all but 77
    0xffff_0000, // 80-9f
    0xffff_f8f8, // a0-bf: all but a0-a2 a8-aa
    0xffff_00ff, // c0-df: all but c8-cf
    0xffff_ffff, // e0-ff
];

fn has_modrm_0f(op: u8) -> bool {
    MODRM_0F[usize::from(op >> 5)] & (1 << (op & 31)) != 0
}

/// Where operand `n` of `insn` is encoded, if it is a general-purpose register named by a field.
pub fn gpr_field(insn: &Instruction, n: u32) -> Option<Field> {
    use OpCodeOperandKind as K;
    let reg = insn.try_op_register(n).ok()?;
    if !reg.is_gpr() {
        return None;
    }
    match insn.op_code().try_op_kind(n).ok()? {
        K::r8_reg
        | K::r16_reg
        | K::r16_reg_mem
        | K::r32_reg
        | K::r32_reg_mem
        | K::r64_reg
        | K::r64_reg_mem => Some(Field::Reg),
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r32_or_mem_mpx
        | K::r64_or_mem
        | K::r64_or_mem_mpx
        | K::r16_rm
        | K::r32_rm
        | K::r64_rm
        | K::r8_opcode
        | K::r16_opcode
        | K::r32_opcode
        | K::r64_opcode => Some(Field::Rm),
        K::r32_vvvv | K::r64_vvvv => Some(Field::Vvvv),
        _ => None,
    }
}

impl Encoding {
    /// Takes apart `bytes`, which iced decoded as `insn` in `mode`. `None` if the encoding follows no
    /// scheme known here (far pointers, MVEX…).
    pub fn parse(bytes: &[u8], insn: &Instruction, mode: CodeSize) -> Option<Self> {
        let bytes = bytes.get(..insn.len())?;
        let mut e = Encoding {
            form: Form::Legacy,
            lock: false,
            opsize: false,
            addrsize: false,
            rep: 0,
            map: 0,
            opcode: 0,
            w: false,
            rex: false,
            pp: 0,
            ll: 0,
            z: false,
            bcst: false,
            aaa: 0,
            has_modrm: false,
            opcode_reg: false,
            reg: 0,
            vvvv: 0,
            rm: Rm::None,
            imm: [0; 8],
            imm_len: 0,
            high_byte: false,
        };
        let mut at = 0;
        let mut addr67 = false;
        let mut rex = 0u8;
        loop {
            match *bytes.get(at)? {
                0x66 => e.opsize = true,
                0x67 => addr67 = true,
                0xf0 => e.lock = true,
                b @ (0xf2 | 0xf3) => e.rep = b,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                b @ 0x40..=0x4f if mode == CodeSize::Bits64 => {
                    rex = b;
                    at += 1;
                    // A REX that is not last before the opcode is ignored.
                    if matches!(
                        *bytes.get(at)?,
                        0x66 | 0x67
                            | 0xf0
                            | 0xf2
                            | 0xf3
                            | 0x26
                            | 0x2e
                            | 0x36
                            | 0x3e
                            | 0x64
                            | 0x65
                            | 0x40..=0x4f
                    ) {
                        rex = 0;
                        continue;
                    }
                    break;
                }
                _ => break,
            }
            at += 1;
        }
        let addr16 = match mode {
            CodeSize::Bits16 => !addr67,
            CodeSize::Bits32 => addr67,
            CodeSize::Bits64 => false,
        };
        let (mut r, mut b) = (rex & 4 != 0, rex & 1 != 0);
        let (mut r2, mut x2) = (false, false);
        e.rex = rex != 0;
        e.w = rex & 8 != 0;
        let first = *bytes.get(at)?;
        let second = bytes.get(at + 1).copied().unwrap_or(0);
        let is_vex = |b: u8| mode == CodeSize::Bits64 || b & 0xc0 == 0xc0;
        match first {
            // XOP: no CPU that AnyKVM runs on has it.
            0x8f if second & 31 >= 8 => return None,
            0xc5 if is_vex(second) => {
                e.form = Form::Vex;
                e.map = 1;
                r = second & 0x80 == 0;
                e.vvvv = !(second >> 3) & 15;
                e.ll = (second >> 2) & 1;
                e.pp = second & 3;
                e.opcode = *bytes.get(at + 2)?;
                at += 3;
            }
            0xc4 if is_vex(second) => {
                e.form = Form::Vex;
                let p = *bytes.get(at + 2)?;
                r = second & 0x80 == 0;
                b = second & 0x20 == 0;
                e.map = second & 31;
                e.w = p & 0x80 != 0;
                e.vvvv = !(p >> 3) & 15;
                e.ll = (p >> 2) & 1;
                e.pp = p & 3;
                e.opcode = *bytes.get(at + 3)?;
                at += 4;
            }
            0x62 if is_vex(second) => {
                e.form = Form::Evex;
                let (p1, p2) = (*bytes.get(at + 2)?, *bytes.get(at + 3)?);
                r = second & 0x80 == 0;
                x2 = second & 0x40 == 0;
                b = second & 0x20 == 0;
                r2 = second & 0x10 == 0;
                e.map = second & 7;
                e.w = p1 & 0x80 != 0;
                e.vvvv = !(p1 >> 3) & 15;
                e.pp = p1 & 3;
                e.z = p2 & 0x80 != 0;
                e.ll = (p2 >> 5) & 3;
                e.bcst = p2 & 0x10 != 0;
                if p2 & 8 == 0 {
                    e.vvvv |= 16;
                }
                e.aaa = p2 & 7;
                e.opcode = *bytes.get(at + 4)?;
                at += 5;
            }
            0x0f => {
                match second {
                    0x38 | 0x3a => {
                        e.map = if second == 0x38 { 2 } else { 3 };
                        e.opcode = *bytes.get(at + 2)?;
                        at += 3;
                    }
                    op => {
                        e.map = 1;
                        e.opcode = op;
                        at += 2;
                    }
                }
                if e.map == 1 && !has_modrm_0f(e.opcode) {
                    e.opcode_reg = matches!(e.opcode, 0xc8..=0xcf);
                } else {
                    e.has_modrm = true;
                }
            }
            op => {
                e.opcode = op;
                at += 1;
                e.has_modrm = MODRM_ONE_BYTE[usize::from(op >> 5)] & (1 << (op & 31)) != 0;
                e.opcode_reg = matches!(op, 0x50..=0x5f | 0x91..=0x97 | 0xb0..=0xbf)
                    || op == 0x90 && b
                    || mode != CodeSize::Bits64 && matches!(op, 0x40..=0x4f);
            }
        }
        if e.form != Form::Legacy {
            e.has_modrm = !(e.form == Form::Vex && e.map == 1 && e.opcode == 0x77);
        } else if mode == CodeSize::Bits16 {
            let op = insn.op_code();
            match (op.mandatory_prefix(), op.operand_size()) {
                (MandatoryPrefix::None, _) => e.opsize = !e.opsize,
                // POPCNT, LZCNT, TZCNT, CRC32: 66 still chooses the operand size.
                (MandatoryPrefix::PF3 | MandatoryPrefix::PF2, 16) => e.opsize = true,
                (MandatoryPrefix::PF3 | MandatoryPrefix::PF2, 32) => e.opsize = false,
                _ => {}
            }
        }
        if e.has_modrm {
            let modrm = *bytes.get(at)?;
            at += 1;
            e.reg = (modrm >> 3) & 7 | u8::from(r) << 3 | u8::from(r2) << 4;
            let rm = modrm & 7;
            let md = modrm >> 6;
            // MOV to and from control and debug registers ignores mod.
            if md == 3 || e.form == Form::Legacy && e.map == 1 && matches!(e.opcode, 0x20..=0x23) {
                e.rm = Rm::Reg(rm | u8::from(b) << 3 | u8::from(x2) << 4);
            } else {
                e.rm = Rm::GuestMem;
                if addr16 {
                    at += match (md, rm) {
                        (0, 6) | (2, _) => 2,
                        (1, _) => 1,
                        _ => 0,
                    };
                } else {
                    let mut base = rm;
                    if rm == 4 {
                        base = *bytes.get(at)? & 7;
                        at += 1;
                    }
                    at += match md {
                        0 if base == 5 => 4,
                        1 => 1,
                        2 => 4,
                        _ => 0,
                    };
                }
            }
        } else if e.opcode_reg {
            e.rm = Rm::Reg(e.opcode & 7 | u8::from(b) << 3);
            if e.map == 0 && matches!(e.opcode, 0x40..=0x4f) {
                // INC and DEC of 32-bit code: their opcodes are REX in 64-bit code.
                e.reg = u8::from(e.opcode >= 0x48);
                e.opcode = 0xff;
                e.opcode_reg = false;
                e.has_modrm = true;
            }
        } else if e.form == Form::Legacy && e.map == 0 && matches!(e.opcode, 0xa0..=0xa3) {
            // MOV moffs: the same as the ModRM form with AL or eAX.
            e.opcode = [0x8a, 0x8b, 0x88, 0x89][usize::from(e.opcode - 0xa0)];
            e.has_modrm = true;
            e.rm = Rm::GuestMem;
            at = bytes.len();
        }
        e.addrsize = addr67 && !e.has_memory();
        let imm = bytes.get(at..)?;
        e.imm.get_mut(..imm.len())?.copy_from_slice(imm);
        e.imm_len = imm.len() as u8;
        if mode != CodeSize::Bits64 && e.form != Form::Legacy {
            e.drop_what_32_bit_code_ignores(insn);
        }
        e.high_byte = (0..insn.op_count()).any(|i| {
            use iced_x86::Register as R;
            matches!(insn.try_op_register(i), Ok(R::AH | R::CH | R::DH | R::BH))
        });
        Some(e)
    }

    /// Outside 64-bit mode there are eight registers, and the bits of VEX and EVEX that would name
    /// more are ignored, as is W where only 64-bit code has the wide form.
    fn drop_what_32_bit_code_ignores(&mut self, insn: &Instruction) {
        use OpCodeOperandKind as K;
        let op = insn.op_code();
        self.reg &= 7;
        self.vvvv &= 7;
        if let Rm::Reg(n) = &mut self.rm {
            *n &= 7;
        }
        if op.is_wig32() {
            self.w = false;
        }
        let names_register = (0..op.op_count()).any(|n| {
            matches!(
                op.try_op_kind(n),
                Ok(K::xmm_is4 | K::ymm_is4 | K::xmm_is5 | K::ymm_is5)
            )
        });
        if names_register {
            self.imm[0] &= 0x7f;
        }
    }

    /// The scheme of the encoding.
    pub fn form(&self) -> Form {
        self.form
    }

    /// The instruction has a memory operand in ModRM.
    pub fn has_memory(&self) -> bool {
        matches!(self.rm, Rm::GuestMem | Rm::Host(_))
    }

    /// One of AH, CH, DH, BH is named, so no REX prefix may be added.
    pub fn names_high_byte(&self) -> bool {
        self.high_byte
    }

    /// Bytes of immediates, which end the instruction.
    pub fn immediate_len(&self) -> u8 {
        self.imm_len
    }

    /// The register number in a field (0-31).
    pub fn register(&self, field: Field) -> Option<u8> {
        match field {
            Field::Reg => self.has_modrm.then_some(self.reg),
            Field::Rm => match self.rm {
                Rm::Reg(n) => Some(n),
                _ => None,
            },
            Field::Vvvv => (self.form != Form::Legacy).then_some(self.vvvv),
        }
    }

    /// Puts another general-purpose register (0-15) into a field.
    pub fn set_register(&mut self, field: Field, n: u8) {
        // Byte registers 4-7 keep their meaning only as long as REX stays.
        match field {
            Field::Reg => self.reg = n,
            Field::Rm => self.rm = Rm::Reg(n),
            Field::Vvvv => self.vvvv = n,
        }
    }

    /// Replaces the memory operand, or a register operand in ModRM.rm, by `mem`.
    pub fn set_memory(&mut self, mem: HostMem) {
        if self.opcode_reg {
            return;
        }
        self.rm = Rm::Host(mem);
    }

    /// An operand was an opcode-embedded register, which cannot become memory.
    pub fn rm_in_opcode(&self) -> bool {
        self.opcode_reg
    }

    /// Removes a LOCK prefix.
    pub fn clear_lock(&mut self) {
        self.lock = false;
    }

    /// Bytes of a displacement. EVEX scales those of one byte.
    fn displacement_len(&self, disp: i32) -> usize {
        let short = self.form != Form::Evex && i8::try_from(disp).is_ok();
        if short { 1 } else { 4 }
    }

    /// Writes the instruction as 64-bit code and returns its length. `None` if it cannot be
    /// encoded: a memory operand was not replaced, or AH-DH would need REX.
    pub fn emit(&self, out: &mut [u8; MAX_LEN]) -> Option<usize> {
        let mut n = 0;
        let mut put = |b: u8| -> Option<()> {
            *out.get_mut(n)? = b;
            n += 1;
            Some(())
        };
        let (mut x, b, rm_low, b2) = match self.rm {
            Rm::None => (false, false, 0, false),
            Rm::Reg(r) => (false, r & 8 != 0, r & 7, r & 16 != 0),
            Rm::GuestMem => return None,
            Rm::Host(HostMem::BaseIndex(base, index) | HostMem::BaseIndexDisp(base, index, _)) => {
                (index & 8 != 0, base & 8 != 0, 4, false)
            }
            Rm::Host(HostMem::BaseDisp(base, _)) => (false, base & 8 != 0, base & 7, false),
            Rm::Host(HostMem::Gs(_)) => (false, false, 4, false),
        };
        if matches!(self.rm, Rm::Host(HostMem::Gs(_))) {
            put(0x65)?;
        }
        let r = self.reg & 8 != 0;
        match self.form {
            Form::Legacy => {
                if self.lock {
                    put(0xf0)?;
                }
                if self.opsize {
                    put(0x66)?;
                }
                if self.addrsize {
                    put(0x67)?;
                }
                if self.rep != 0 {
                    put(self.rep)?;
                }
                let rex = u8::from(self.w) << 3 | u8::from(r) << 2 | u8::from(x) << 1 | u8::from(b);
                if rex != 0 || self.rex {
                    if self.high_byte {
                        return None;
                    }
                    put(0x40 | rex)?;
                }
                match self.map {
                    0 => {}
                    1 => put(0x0f)?,
                    2 => {
                        put(0x0f)?;
                        put(0x38)?;
                    }
                    _ => {
                        put(0x0f)?;
                        put(0x3a)?;
                    }
                }
                if self.opcode_reg {
                    put(self.opcode & !7 | rm_low)?;
                } else {
                    put(self.opcode)?;
                }
            }
            Form::Vex => {
                let p = !self.vvvv & 15;
                let p = p << 3 | self.ll << 2 | self.pp;
                if self.map == 1 && !self.w && !x && !b {
                    put(0xc5)?;
                    put(u8::from(!r) << 7 | p)?;
                } else {
                    put(0xc4)?;
                    put(u8::from(!r) << 7 | u8::from(!x) << 6 | u8::from(!b) << 5 | self.map)?;
                    put(u8::from(self.w) << 7 | p)?;
                }
                put(self.opcode)?;
            }
            Form::Evex => {
                x |= b2;
                put(0x62)?;
                put(u8::from(!r) << 7
                    | u8::from(!x) << 6
                    | u8::from(!b) << 5
                    | u8::from(self.reg & 16 == 0) << 4
                    | self.map)?;
                put(u8::from(self.w) << 7 | (!self.vvvv & 15) << 3 | 4 | self.pp)?;
                put(u8::from(self.z) << 7
                    | self.ll << 5
                    | u8::from(self.bcst) << 4
                    | u8::from(self.vvvv & 16 == 0) << 3
                    | self.aaa)?;
                put(self.opcode)?;
            }
        }
        if self.has_modrm {
            let reg = (self.reg & 7) << 3;
            match self.rm {
                Rm::None | Rm::GuestMem => return None,
                Rm::Reg(_) => put(0xc0 | reg | rm_low)?,
                Rm::Host(HostMem::BaseIndex(base, index)) => {
                    // A base of RBP or R13 needs a displacement: give it a zero one.
                    let disp8 = base & 7 == 5;
                    put(u8::from(disp8) << 6 | reg | 4)?;
                    put((index & 7) << 3 | base & 7)?;
                    if disp8 {
                        put(0)?;
                    }
                }
                Rm::Host(HostMem::BaseDisp(_, disp)) => {
                    let len = self.displacement_len(disp);
                    put(if len == 1 { 0x40 } else { 0x80 } | reg | rm_low)?;
                    if rm_low == 4 {
                        put(0x24)?;
                    }
                    for b in disp.to_le_bytes().into_iter().take(len) {
                        put(b)?;
                    }
                }
                Rm::Host(HostMem::BaseIndexDisp(base, index, disp)) => {
                    let len = self.displacement_len(disp);
                    put(if len == 1 { 0x40 } else { 0x80 } | reg | 4)?;
                    put((index & 7) << 3 | base & 7)?;
                    for b in disp.to_le_bytes().into_iter().take(len) {
                        put(b)?;
                    }
                }
                Rm::Host(HostMem::Gs(disp)) => {
                    put(reg | 4)?;
                    put(0x25)?;
                    for b in disp.to_le_bytes() {
                        put(b)?;
                    }
                }
            }
        }
        for i in 0..usize::from(self.imm_len) {
            put(self.imm[i])?;
        }
        Some(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions, Encoder};
    use std::vec::Vec;

    /// Every form that iced can encode: parse and emit must give back an instruction that iced
    /// decodes to the same operands.
    #[test]
    fn emits_what_it_parsed() {
        let mut checked = 0;
        for code in Code::values() {
            let op = code.op_code();
            let xop = op.encoding() == iced_x86::EncodingKind::XOP;
            if !op.mode64() || !op.is_instruction() || xop {
                continue;
            }
            for bytes in samples(code) {
                let insn = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                if insn.code() != code {
                    continue;
                }
                let Some(mut e) = Encoding::parse(&bytes, &insn, CodeSize::Bits64) else {
                    panic!("{code:?} {bytes:02x?} does not parse");
                };
                let mem = e.has_memory();
                if mem {
                    e.set_memory(HostMem::BaseIndex(15, 14));
                }
                let mut out = [0; MAX_LEN];
                let Some(n) = e.emit(&mut out) else {
                    assert!(e.names_high_byte(), "{code:?} {bytes:02x?}");
                    continue;
                };
                let back = Decoder::new(64, &out[..n], DecoderOptions::NONE).decode();
                assert_eq!(back.code(), code, "{bytes:02x?} -> {:02x?}", &out[..n]);
                assert_eq!(back.op_count(), insn.op_count());
                for i in 0..insn.op_count() {
                    assert_eq!(back.op_kind(i), insn.op_kind(i), "{code:?}");
                    assert_eq!(back.op_register(i), insn.op_register(i), "{code:?}");
                }
                if mem && back.memory_base() != iced_x86::Register::None {
                    assert_eq!(back.memory_base(), iced_x86::Register::R15, "{code:?}");
                }
                checked += 1;
            }
        }
        assert!(checked > 3000, "only {checked} forms checked");
    }

    /// VEX.B, the top bits of VEX.vvvv and of the immediate that names a register, and VEX.W of
    /// BEXTR mean nothing in 32-bit code.
    #[test]
    fn drops_what_32_bit_code_ignores() {
        let cases: [(&[u8], &[u8]); 3] = [
            (
                &[0xc4, 0xe2, 0x80, 0xf7, 0xc3],
                &[0xc4, 0xe2, 0x40, 0xf7, 0xc3],
            ),
            (
                &[0xc4, 0xc2, 0x78, 0xf7, 0xc3],
                &[0xc4, 0xe2, 0x78, 0xf7, 0xc3],
            ),
            (
                &[0xc4, 0xe3, 0x71, 0x4a, 0xc2, 0xb0],
                &[0xc4, 0xe3, 0x71, 0x4a, 0xc2, 0x30],
            ),
        ];
        for (bytes, expected) in cases {
            let insn = Decoder::new(32, bytes, DecoderOptions::NONE).decode();
            let e = Encoding::parse(bytes, &insn, CodeSize::Bits32).unwrap();
            let mut out = [0; MAX_LEN];
            let n = e.emit(&mut out).unwrap();
            assert_eq!(&out[..n], expected, "{bytes:02x?}");
        }
    }

    /// Encodings of `code` with register and with memory operands, by trying ModRM bytes.
    fn samples(code: Code) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for mem in [false, true] {
            let mut insn = Instruction::default();
            insn.set_code(code);
            if build(&mut insn, code, mem).is_none() {
                continue;
            }
            let mut enc = Encoder::new(64);
            if enc.encode(&insn, 0x1000).is_ok() {
                all.push(enc.take_buffer());
            }
        }
        all
    }

    fn build(insn: &mut Instruction, code: Code, mem: bool) -> Option<()> {
        use OpCodeOperandKind as K;
        use iced_x86::{OpKind, Register as R};
        let op = code.op_code();
        let mut used_mem = false;
        for i in 0..op.op_count() {
            let kind = op.op_kind(i);
            let pick = |base: R, n: u32| R::values().nth(base as usize + n as usize);
            let n = 1 + i * 2;
            let (or_mem, reg) = match kind {
                K::r8_or_mem => (true, pick(R::AL, n)),
                K::r16_or_mem => (true, pick(R::AX, n)),
                K::r32_or_mem => (true, pick(R::EAX, n + 8)),
                K::r64_or_mem => (true, pick(R::RAX, n + 8)),
                K::xmm_or_mem => (true, pick(R::XMM0, n + 8)),
                K::ymm_or_mem => (true, pick(R::YMM0, n + 8)),
                K::zmm_or_mem => (true, pick(R::ZMM0, n + 16)),
                K::mm_or_mem => (true, pick(R::MM0, n)),
                K::k_or_mem => (true, pick(R::K0, n)),
                K::r8_reg | K::r8_opcode => (false, pick(R::AL, n)),
                K::r16_reg | K::r16_rm | K::r16_opcode => (false, pick(R::AX, n)),
                K::r32_reg | K::r32_rm | K::r32_opcode => (false, pick(R::EAX, n)),
                K::r64_reg | K::r64_rm | K::r64_opcode => (false, pick(R::RAX, n + 8)),
                K::r32_vvvv => (false, pick(R::EAX, n + 8)),
                K::r64_vvvv => (false, pick(R::RAX, n)),
                K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => (false, pick(R::XMM0, n)),
                K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => (false, pick(R::YMM0, n)),
                K::zmm_reg | K::zmm_rm | K::zmm_vvvv => (false, pick(R::ZMM0, n)),
                K::mm_reg | K::mm_rm => (false, pick(R::MM0, n)),
                K::k_reg | K::k_rm | K::k_vvvv => (false, pick(R::K0, n)),
                K::al => (false, Some(R::AL)),
                K::cl => (false, Some(R::CL)),
                K::ax => (false, Some(R::AX)),
                K::eax => (false, Some(R::EAX)),
                K::rax => (false, Some(R::RAX)),
                K::mem => (true, None),
                K::imm8 | K::imm8_const_1 | K::imm4_m2z => {
                    insn.set_op_kind(i, OpKind::Immediate8);
                    insn.set_immediate8(1);
                    continue;
                }
                K::imm16 => {
                    insn.set_op_kind(i, OpKind::Immediate16);
                    insn.set_immediate16(0x1234);
                    continue;
                }
                K::imm32 => {
                    insn.set_op_kind(i, OpKind::Immediate32);
                    insn.set_immediate32(0x1234_5678);
                    continue;
                }
                K::imm8sex32 => {
                    insn.set_op_kind(i, OpKind::Immediate8to32);
                    insn.set_immediate8(1);
                    continue;
                }
                K::imm8sex64 => {
                    insn.set_op_kind(i, OpKind::Immediate8to64);
                    insn.set_immediate8(1);
                    continue;
                }
                K::imm32sex64 => {
                    insn.set_op_kind(i, OpKind::Immediate32to64);
                    insn.set_immediate32(0x1234_5678);
                    continue;
                }
                _ => return None,
            };
            if or_mem && (mem || reg.is_none()) {
                used_mem = true;
                insn.set_op_kind(i, OpKind::Memory);
                insn.set_memory_base(R::RBX);
                insn.set_memory_index(R::RSI);
                insn.set_memory_index_scale(4);
                insn.set_memory_displ_size(8);
                insn.set_memory_displacement64(0x1000);
            } else {
                insn.set_op_kind(i, OpKind::Register);
                insn.set_op_register(i, reg?);
            }
        }
        (used_mem == mem).then_some(())
    }
}
