//! Decoding: which instructions make a block, what kind each is, and which flags are live.

use crate::context::{Context, Fpu};
use crate::liveness;
use iced_x86::{
    Code, ConditionCode, Decoder, DecoderError, DecoderOptions, EncodingKind, FlowControl,
    Instruction, Mnemonic, OpKind, Register, RflagsBits,
};
use x86emu::encoding::Encoding;
use x86emu::state::CodeSize;

/// Arithmetic flags, in iced's bits.
pub const ARITH: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// The longest block, in instructions.
const MAX_OPS: usize = 64;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Copied, with operands replaced.
    Native,
    /// LEA: an address computation without an access.
    Lea,
    /// Nothing to do.
    Nop,
    /// PUSH of a register, an immediate or a memory operand.
    Push,
    /// POP to a register.
    Pop,
    /// LEAVE.
    Leave,
    /// Conditional jump: condition, page offset of the target (which may lie outside the page).
    Jcc(ConditionCode, i64),
    /// Direct jump.
    Jmp(i64),
    /// Direct call.
    Call(i64),
    /// Jump to a register or memory operand.
    JmpIndirect,
    /// Call of a register or memory operand.
    CallIndirect,
    /// Near return; bytes to release beside the return address.
    Ret(u16),
    /// CLI, with flags in a state where a store does it.
    Cli,
    /// STI, the same.
    Sti,
    /// STAC (true) or CLAC, which change the context.
    SetAc(bool),
    /// BT, BTS, BTR, BTC of a bit string in memory with the bit number in a register.
    BitString,
    /// SWAPGS.
    Swapgs,
    /// PUSHFQ.
    Pushf,
    /// POPFQ, as long as it changes IF and arithmetic flags only.
    Popf,
    /// MOV of a segment register to a general register: its index.
    MovFromSeg(u8),
    /// MOVS, STOS or LODS, with or without REP, in 64-bit mode with DF clear.
    Strings(Strings),
    /// RDFSBASE (4) or RDGSBASE (5).
    ReadBase(u8),
    /// RDTSC, or RDTSCP (true).
    Rdtsc(bool),
    /// Left to the interpreter.
    Interpret,
}

/// A string instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strings {
    /// Reads from RSI.
    pub source: bool,
    /// Writes to RDI.
    pub destination: bool,
    /// log2 of the element size.
    pub shift: u8,
    /// REP prefix.
    pub rep: bool,
}

/// One instruction of a block.
#[derive(Clone, Debug)]
pub struct Op {
    /// As iced decoded it, with IP = offset in the page.
    pub insn: Instruction,
    /// Offset in the page.
    pub off: u16,
    /// Its bytes taken apart, for [`Kind::Native`].
    pub enc: Option<Encoding>,
    /// How it is translated.
    pub kind: Kind,
    /// Flags it reads.
    pub reads: u32,
    /// Flags it may change.
    pub modifies: u32,
    /// Flags it always changes.
    pub kills: u32,
    /// Flags live after it.
    pub live_after: u32,
    /// Flags live before it.
    pub live_before: u32,
    /// Flags live at the taken target of a conditional jump, or the target of a direct jump.
    pub live_target: u32,
    /// It uses x87, MMX, SSE, AVX or mask registers.
    pub fpu: bool,
    /// Its bytes, where it is no invalid one.
    pub bytes: [u8; 15],
}

/// A decoded block.
#[derive(Debug)]
pub struct Decoded {
    /// Its instructions.
    pub ops: Vec<Op>,
    /// Offset behind the last one.
    pub end: u16,
    /// It ends because control leaves it with the last instruction.
    pub closed: bool,
    /// It is followed by an instruction that crosses the page end.
    pub before_crossing: bool,
    /// Lines of the page it depends on.
    pub lines: u64,
    /// Page offsets of what it depends on beside its own instructions: starts and ends.
    pub peeked: Vec<(u16, u16)>,
    /// Flags live on entry.
    pub live_in: u32,
    /// It uses the FPU.
    pub fpu: bool,
    /// Offsets in the page that it jumps to and where an instruction reaches into the next page: those are reached
    /// through the jump cache only.
    pub crossing: Vec<u16>,
    /// It has what a group of another block could not do: each access has a probe of its own.
    pub apart: bool,
    /// Writes have a copy behind the block, for page crossings and pages that hold code.
    pub copies: bool,
}

impl Decoded {
    /// Shortens it to the first `n` instructions of a group.
    pub fn keep_apart(&mut self, n: usize) {
        if let Some(next) = self.ops.get(n) {
            self.end = next.off;
            self.closed = false;
            self.before_crossing = false;
            self.ops.truncate(n);
        }
        self.apart = true;
        self.copies = true;
    }
}

/// iced's bitness.
pub fn bits(ctx: Context) -> u32 {
    match ctx.code_size() {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    }
}

/// Bytes of the next page that an instruction can reach into.
pub const BEYOND: usize = 14;

/// Decodes the block at offset `start` of `page`.
///
/// `page` is one guest page, or one and [`BEYOND`] bytes of the next: then the block is the one
/// instruction at `start`, which crosses the page end. `None`: such an instruction is at `start`, and
/// the bytes of the next page are needed.
pub fn decode(page: &[u8], start: usize, ctx: Context) -> Option<Decoded> {
    let mut ops = Vec::with_capacity(MAX_OPS);
    let mut end = start;
    let mut closed = false;
    let mut before_crossing = false;
    let mut decoder = Decoder::with_ip(
        bits(ctx),
        &page[start..],
        start as u64,
        DecoderOptions::NONE,
    );
    while ops.len() < MAX_OPS && end < 4096 {
        let insn = decoder.decode();
        if insn.is_invalid() {
            if decoder.last_error() == DecoderError::NoMoreBytes && page.len() == 4096 {
                if ops.is_empty() {
                    return None;
                }
                before_crossing = true;
                break;
            }
            ops.push(op(insn, end as u16, None, Kind::Interpret, false));
            closed = true;
            break;
        }
        let bytes = &page[end..end + insn.len()];
        let next = op_of(&insn, bytes, end as u16, ctx);
        end += insn.len();
        let ends = match next.kind {
            Kind::Jmp(_)
            | Kind::Call(_)
            | Kind::JmpIndirect
            | Kind::CallIndirect
            | Kind::Ret(_)
            | Kind::SetAc(_) => true,
            Kind::Interpret => insn.flow_control() != FlowControl::Next,
            _ => false,
        };
        ops.push(next);
        if ends {
            closed = true;
            break;
        }
        if page.len() > 4096 {
            break;
        }
    }
    // The shadow of STI covers one instruction. Polls come after the branch they belong to, so any
    // instruction of the block may follow, but not the jump out of the page that ends an open block.
    if let Some(last) = ops.last_mut().filter(|o| o.kind == Kind::Sti) {
        last.kind = Kind::Interpret;
    }
    let mut seen = liveness::Seen {
        lines: crate::cache::lines_of(start, end.clamp(start + 1, 4096) - start),
        ranges: Vec::new(),
        crossing: Vec::new(),
    };
    let live_in = liveness::backwards(&mut ops, page, ctx, end, closed, &mut seen);
    let fpu = ops.iter().any(|o| o.fpu && o.kind == Kind::Native);
    Some(Decoded {
        ops,
        end: end as u16,
        closed,
        before_crossing,
        lines: seen.lines,
        peeked: seen.ranges,
        live_in,
        fpu,
        crossing: seen.crossing,
        apart: false,
        copies: false,
    })
}

#[inline]
fn op(insn: Instruction, off: u16, enc: Option<Encoding>, kind: Kind, fpu: bool) -> Op {
    let (reads, modifies) = match kind {
        // Whatever pushes or replaces RFLAGS as a whole.
        Kind::Strings(_) => (0, 0),
        Kind::Pushf => (ARITH, 0),
        Kind::Popf => (0, ARITH),
        Kind::Interpret
            if insn.flow_control() != FlowControl::Next
                || matches!(
                    insn.mnemonic(),
                    Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq
                ) =>
        {
            (ARITH, ARITH)
        }
        _ => (insn.rflags_read() & ARITH, insn.rflags_modified() & ARITH),
    };
    let kills = if kind == Kind::Interpret || may_leave_flags(&insn) {
        0
    } else {
        modifies
    };
    Op {
        insn,
        off,
        enc,
        kind,
        reads,
        modifies,
        kills,
        live_after: 0,
        live_before: 0,
        live_target: 0,
        fpu,
        bytes: [0; 15],
    }
}

/// Shifts and rotates leave all flags alone when their count is zero.
fn may_leave_flags(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let shift = matches!(
        insn.mnemonic(),
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if !shift {
        return insn.has_rep_prefix() || insn.has_repne_prefix();
    }
    let last = insn.op_count() - 1;
    match insn.op_kind(last) {
        OpKind::Immediate8 => insn.immediate8() & 31 == 0,
        _ => true,
    }
}

/// Page offset and length of an immediate that is an operand of arithmetic and nothing else: how the
/// instruction is translated does not depend on it.
pub fn immediate(op: &Op) -> Option<(u16, u8)> {
    use Mnemonic as M;
    let plain = op.kind == Kind::Native
        && matches!(
            op.insn.mnemonic(),
            M::Mov
                | M::Add
                | M::Or
                | M::Adc
                | M::Sbb
                | M::And
                | M::Sub
                | M::Xor
                | M::Cmp
                | M::Test
                | M::Imul
        );
    let len = op.enc.filter(|_| plain)?.immediate_len();
    // It is the last part of an instruction.
    let end = op.off + op.insn.len() as u16;
    (len != 0 && end <= 4096).then_some((end - u16::from(len), len))
}

/// Classifies an instruction and looks up its flags.
#[inline]
pub fn op_of(insn: &Instruction, bytes: &[u8], off: u16, ctx: Context) -> Op {
    let (kind, enc, fpu) = classify(insn, bytes, ctx);
    let mut o = op(*insn, off, enc, kind, fpu);
    if let Some(to) = o.bytes.get_mut(..bytes.len()) {
        to.copy_from_slice(bytes);
    }
    o
}

/// The instruction has an operand-size prefix in 64-bit code and no REX.W that overrules it.
fn narrowed(bytes: &[u8], ctx: Context) -> bool {
    let (mut narrow, mut wide) = (false, false);
    for b in bytes {
        match b {
            // Only the last REX counts, if no other prefix follows.
            0x40..=0x4f => wide = b & 8 != 0,
            0x66 => (narrow, wide) = (true, false),
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67 | 0xf0 | 0xf2 | 0xf3 => wide = false,
            _ => break,
        }
    }
    ctx.code_size() == CodeSize::Bits64 && narrow && !wide
}

fn is_native_branch_size(insn: &Instruction, bytes: &[u8], ctx: Context) -> bool {
    // Operand-size prefixes on branches truncate RIP: rare, and vendors differ.
    if narrowed(bytes, ctx) {
        return false;
    }
    let wide = match ctx.code_size() {
        CodeSize::Bits64 => matches!(
            insn.op0_kind(),
            OpKind::NearBranch64 | OpKind::Register | OpKind::Memory
        ),
        CodeSize::Bits32 => matches!(
            insn.op0_kind(),
            OpKind::NearBranch32 | OpKind::Register | OpKind::Memory
        ),
        CodeSize::Bits16 => matches!(
            insn.op0_kind(),
            OpKind::NearBranch16 | OpKind::Register | OpKind::Memory
        ),
    };
    let code = insn.code();
    let narrow = matches!(code, Code::Jmp_rm16 | Code::Call_rm16);
    let narrow_ok = narrow == (ctx.code_size() == CodeSize::Bits16);
    wide && (narrow_ok || matches!(insn.op0_kind(), OpKind::NearBranch16))
        && !matches!(
            code,
            Code::Jmp_m1616
                | Code::Call_m1616
                | Code::Jmp_m1632
                | Code::Call_m1632
                | Code::Jmp_m1664
                | Code::Call_m1664
        )
}

/// Page offset of a direct branch's target.
fn near_target(insn: &Instruction, mode: CodeSize) -> i64 {
    let t = insn.near_branch_target();
    match mode {
        CodeSize::Bits64 => t as i64,
        CodeSize::Bits32 => i64::from(t as u32 as i32),
        CodeSize::Bits16 => i64::from(t as u16 as i16),
    }
}

fn classify(insn: &Instruction, bytes: &[u8], ctx: Context) -> (Kind, Option<Encoding>, bool) {
    use Mnemonic as M;
    let interpret = (Kind::Interpret, None, false);
    let mode = ctx.code_size();
    if ctx.interpret_only() {
        return interpret;
    }
    let long = mode == CodeSize::Bits64;
    if insn.flow_control() != FlowControl::Next && !ctx.stack() {
        return interpret;
    }
    let indirect = matches!(
        insn.flow_control(),
        FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return
    );
    let near = || (0..4096).contains(&near_target(insn, mode));
    if ctx.segmented() && insn.flow_control() != FlowControl::Next && (indirect || !near()) {
        // Where the branch leads must be checked against CS.
        return interpret;
    }
    let target = || near_target(insn, mode);
    match insn.flow_control() {
        FlowControl::ConditionalBranch => {
            let cc = insn.condition_code();
            let plain = insn.is_jcc_short_or_near() && is_native_branch_size(insn, bytes, ctx);
            if plain && cc != ConditionCode::None {
                return (Kind::Jcc(cc, target()), None, false);
            }
            return interpret;
        }
        FlowControl::UnconditionalBranch if insn.is_jmp_short_or_near() => {
            if is_native_branch_size(insn, bytes, ctx) {
                return (Kind::Jmp(target()), None, false);
            }
            return interpret;
        }
        FlowControl::Call if insn.is_call_near() => {
            if is_native_branch_size(insn, bytes, ctx) && ctx.stack() {
                return (Kind::Call(target()), None, false);
            }
            return interpret;
        }
        FlowControl::IndirectBranch if insn.is_jmp_near_indirect() => {
            if is_native_branch_size(insn, bytes, ctx) && address_ok(insn, ctx) {
                return (Kind::JmpIndirect, None, false);
            }
            return interpret;
        }
        FlowControl::IndirectCall if insn.is_call_near_indirect() => {
            if is_native_branch_size(insn, bytes, ctx) && ctx.stack() && address_ok(insn, ctx) {
                return (Kind::CallIndirect, None, false);
            }
            return interpret;
        }
        FlowControl::Return => {
            let near = match insn.code() {
                Code::Retnq | Code::Retnq_imm16 => long,
                Code::Retnd | Code::Retnd_imm16 => mode == CodeSize::Bits32,
                Code::Retnw | Code::Retnw_imm16 => mode == CodeSize::Bits16,
                _ => false,
            };
            if near && ctx.stack() && !narrowed(bytes, ctx) {
                let imm = if insn.op_count() == 1 {
                    insn.immediate16()
                } else {
                    0
                };
                return (Kind::Ret(imm), None, false);
            }
            return interpret;
        }
        FlowControl::Next => {}
        _ => return interpret,
    }
    match insn.mnemonic() {
        M::Cli if ctx.simple_if() => return (Kind::Cli, None, false),
        M::Swapgs if long && !ctx.user() => return (Kind::Swapgs, None, false),
        M::Pushfq if long && ctx.simple_if() => return (Kind::Pushf, None, false),
        M::Popfq if long && ctx.simple_if() => return (Kind::Popf, None, false),
        M::Rdtsc if ctx.tsc() => return (Kind::Rdtsc(false), None, false),
        M::Rdtscp if ctx.tsc() => return (Kind::Rdtsc(true), None, false),
        M::Mov
            if insn.op1_register().is_segment_register() && insn.op0_kind() == OpKind::Register =>
        {
            let n = insn.op1_register() as u32 - Register::ES as u32;
            return (Kind::MovFromSeg(n as u8), None, false);
        }
        M::Rdfsbase if long && ctx.fsgsbase() => return (Kind::ReadBase(4), None, false),
        M::Rdgsbase if long && ctx.fsgsbase() => return (Kind::ReadBase(5), None, false),
        M::Stac if ctx.simple_ac() => return (Kind::SetAc(true), None, false),
        M::Clac if ctx.simple_ac() => return (Kind::SetAc(false), None, false),
        M::Sti if ctx.simple_if() => return (Kind::Sti, None, false),
        M::Nop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Cldemote => {
            return (Kind::Nop, None, false);
        }
        // The vendors differ about 0F 0D with a register, and about the size of a 16-bit MOVSXD.
        M::Reservednop if insn.op0_kind() == OpKind::Register => return interpret,
        M::Reservednop => return (Kind::Nop, None, false),
        M::Movsxd if narrowed(bytes, ctx) => return interpret,
        M::Cld if ctx.df_clear() => return (Kind::Nop, None, false),
        M::Push if ctx.stack() => {
            let ok = match insn.code() {
                Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm32 | Code::Pushq_imm8 => long,
                Code::Push_r32 | Code::Push_rm32 | Code::Pushd_imm32 | Code::Pushd_imm8 => !long,
                Code::Push_r16 | Code::Push_rm16 | Code::Push_imm16 | Code::Pushw_imm8 => !long,
                _ => false,
            };
            return if ok && address_ok(insn, ctx) {
                (Kind::Push, None, false)
            } else {
                interpret
            };
        }
        M::Pop if ctx.stack() => {
            let register = insn.op0_kind() == OpKind::Register;
            let ok = match insn.code() {
                Code::Pop_r64 | Code::Pop_rm64 => long && register,
                Code::Pop_r32 | Code::Pop_rm32 => {
                    !long && register && insn.op0_register() != Register::ESP
                }
                Code::Pop_r16 | Code::Pop_rm16 => {
                    !long && register && insn.op0_register() != Register::SP
                }
                _ => false,
            };
            return if ok {
                (Kind::Pop, None, false)
            } else {
                interpret
            };
        }
        M::Leave if ctx.flat() && ctx.wide_stack() => {
            let ok = matches!(
                (insn.code(), long),
                (Code::Leaveq, true) | (Code::Leaved, false)
            );
            return if ok {
                (Kind::Leave, None, false)
            } else {
                interpret
            };
        }
        M::Lea => {
            return if address_ok(insn, ctx) {
                (Kind::Lea, None, false)
            } else {
                interpret
            };
        }
        _ => {}
    }
    if long
        && ctx.df_clear()
        && let Some(s) = strings(insn)
    {
        return (Kind::Strings(s), None, false);
    }
    if matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && insn.op0_kind() == OpKind::Memory
        && insn.op1_kind() == OpKind::Register
        && matches!(insn.memory_size().size(), 4 | 8)
        && !ctx.segmented()
        && insn.memory_segment() != Register::CS
        && address_ok(insn, ctx)
    {
        let enc = Encoding::parse(bytes, insn, mode);
        return if enc.is_some() {
            (Kind::BitString, enc, false)
        } else {
            interpret
        };
    }
    native(insn, bytes, ctx).map_or(interpret, |(enc, fpu)| (Kind::Native, Some(enc), fpu))
}

/// MOVS, STOS and LODS with 64-bit addresses and no segment that has a base.
fn strings(insn: &Instruction) -> Option<Strings> {
    let (source, destination, shift) = match insn.code() {
        Code::Movsb_m8_m8 => (true, true, 0),
        Code::Movsw_m16_m16 => (true, true, 1),
        Code::Movsd_m32_m32 => (true, true, 2),
        Code::Movsq_m64_m64 => (true, true, 3),
        Code::Stosb_m8_AL => (false, true, 0),
        Code::Stosw_m16_AX => (false, true, 1),
        Code::Stosd_m32_EAX => (false, true, 2),
        Code::Stosq_m64_RAX => (false, true, 3),
        Code::Lodsb_AL_m8 => (true, false, 0),
        Code::Lodsw_AX_m16 => (true, false, 1),
        Code::Lodsd_EAX_m32 => (true, false, 2),
        Code::Lodsq_RAX_m64 => (true, false, 3),
        _ => return None,
    };
    let wide = (0..insn.op_count())
        .all(|i| !matches!(insn.op_kind(i), OpKind::MemorySegESI | OpKind::MemoryESEDI));
    let based = source && matches!(insn.memory_segment(), Register::FS | Register::GS);
    let rep = insn.has_rep_prefix() || insn.has_repne_prefix();
    // REP LODS is no one's loop; the interpreter has it.
    let ok = wide && !based && !insn.has_lock_prefix() && (!rep || destination);
    ok.then_some(Strings {
        source,
        destination,
        shift,
        rep,
    })
}

/// The memory operand's address can be computed by emitted code.
fn address_ok(insn: &Instruction, ctx: Context) -> bool {
    let mem = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    if !mem {
        return true;
    }
    if insn.memory_base() == Register::EIP || insn.is_vsib() {
        return false;
    }
    if ctx.code_size() == CodeSize::Bits64 {
        return true;
    }
    match insn.memory_segment() {
        Register::FS => ctx.fs_flat() && ctx.stack(),
        Register::GS => ctx.gs_flat() && ctx.stack(),
        // CS can be read; that it is not written is checked where writes are known.
        _ => ctx.stack(),
    }
}

/// Instructions that are copied; the encoding and whether they use the FPU.
fn native(insn: &Instruction, bytes: &[u8], ctx: Context) -> Option<(Encoding, bool)> {
    use Mnemonic as M;
    if insn.is_privileged()
        || insn.is_stack_instruction()
        || insn.is_vsib()
        || insn.is_save_restore_instruction()
    {
        return None;
    }
    match insn.mnemonic() {
        M::Cpuid
        | M::Rdtsc
        | M::Rdtscp
        | M::Rdpmc
        | M::Xgetbv
        | M::Rdpid
        | M::Rdfsbase
        | M::Rdgsbase
        | M::Wrfsbase
        | M::Wrgsbase
        | M::Sgdt
        | M::Sidt
        | M::Sldt
        | M::Str
        | M::Smsw
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Fnsave
        | M::Fsave
        | M::Frstor
        | M::Fnstenv
        | M::Fstenv
        | M::Fldenv
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Maskmovq
        | M::Vmcall
        | M::Vmmcall
        | M::Monitor
        | M::Monitorx
        | M::Mwait
        | M::Mwaitx
        | M::Clzero
        | M::Movdir64b
        | M::Movdiri
        | M::Enqcmd
        | M::Enqcmds
        | M::Invlpgb
        | M::Tlbsync
        | M::Rdpkru
        | M::Wrpkru
        | M::Xbegin
        | M::Xabort
        | M::Xend
        | M::Xtest
        | M::Getsec
        | M::Into
        | M::Bound
        | M::In
        | M::Out
        | M::Cli
        | M::Sti
        | M::Clac
        | M::Stac
        | M::Std
        | M::Cld
        | M::Xlatb
        | M::Salc
        | M::Daa
        | M::Das
        | M::Aaa
        | M::Aas
        | M::Aam
        | M::Aad
        | M::Arpl
        | M::Lds
        | M::Les
        | M::Lss
        | M::Lfs
        | M::Lgs
        | M::Umonitor
        | M::Umwait
        | M::Tpause
        | M::Serialize
        | M::Ptwrite
        | M::Rdsspd
        | M::Rdsspq
        | M::Incsspd
        | M::Incsspq
        | M::Rdpru
        | M::Skinit
        | M::Xsetbv
        | M::Senduipi
        | M::Clui
        | M::Stui
        | M::Testui
        | M::Uiret
        | M::Encls
        | M::Enclu
        | M::Enclv
        | M::Hlt
        | M::Enter
        | M::Xstore
        | M::Fnsetpm
        | M::Fndisi
        | M::Fneni
        | M::Fnop => return None,
        // The register form addresses a bit string that reaches beyond the operand.
        M::Bt | M::Bts | M::Btr | M::Btc
            if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register =>
        {
            return None;
        }
        _ => {}
    }
    // WAIT reports what is pending in the FPU state.
    let mut fpu = insn.mnemonic() == Mnemonic::Wait;
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let r = insn.op_register(i);
                if r.is_segment_register()
                    || r.is_cr()
                    || r.is_dr()
                    || r.is_tr()
                    || r.is_bnd()
                    || r.is_tmm()
                {
                    return None;
                }
                fpu |= r.is_vector_register() || r.is_mm() || r.is_st() || r.is_k();
            }
            OpKind::Memory => {}
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {}
            _ => return None,
        }
    }
    let enc = Encoding::parse(bytes, insn, ctx.code_size())?;
    let mem = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    if mem != enc.has_memory() || mem && (!address_ok(insn, ctx) || access_size(insn) == 0) {
        return None;
    }
    // A LOCK prefix on anything but a memory destination is #UD.
    if insn.has_lock_prefix() && !mem {
        return None;
    }
    let feature = Fpu::needed_by(insn);
    fpu |= feature != Fpu::None;
    if fpu {
        let level = if feature == Fpu::None {
            Fpu::Sse
        } else {
            feature
        };
        if level > ctx.fpu() {
            return None;
        }
    }
    if insn.encoding() != EncodingKind::Legacy && ctx.fpu() < Fpu::Avx && fpu {
        return None;
    }
    Some((enc, fpu))
}

/// Bytes that the memory operand covers, 0 if it is not known.
pub fn access_size(insn: &Instruction) -> usize {
    let size = insn.memory_size();
    if matches!(
        insn.mnemonic(),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb
    ) {
        return 1;
    }
    if insn.is_broadcast() {
        size.element_size()
    } else {
        size.size()
    }
}
