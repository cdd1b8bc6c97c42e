//! Instructions taken apart and put together again: what comes out must be what went in.

use crate::input::Input;
use crate::programs::programs;
use iced_x86::{Decoder, DecoderOptions, OpKind, Register};
use x86emu::encoding::{Encoding, Field, Form, HostMem, MAX_LEN, gpr_field};
use x86emu::interp;
use x86emu::state::CodeSize;

/// Each instruction in the input, in a mode that it chooses.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let mode = [CodeSize::Bits64, CodeSize::Bits32, CodeSize::Bits16][usize::from(choice) % 3];
    let memory = match choice >> 6 {
        0 => HostMem::BaseIndex(15, 14),
        1 => HostMem::BaseIndex(choice >> 2 & 15, 14),
        2 => HostMem::BaseDisp(choice >> 2 & 15, -0x1234),
        _ => HostMem::Gs(0x5678),
    };
    let mut code = input.rest();
    while !code.is_empty() {
        let len = instruction(code, mode, memory);
        code = &code[len..];
    }
}

/// Checks the instruction at the start of `code`; how many bytes to go on.
fn instruction(code: &[u8], mode: CodeSize, memory: HostMem) -> usize {
    let Ok(insn) = interp::decode(mode, code, 0x1000, false) else {
        return 1;
    };
    let Some(bytes) = code.get(..insn.len()) else {
        return 1;
    };
    let Some(mut encoding) = Encoding::parse(bytes, &insn, mode) else {
        return insn.len();
    };
    for n in 0..insn.op_count() {
        if let Some(field) = gpr_field(&insn, n)
            && let Some(number) = encoding.register(field)
        {
            let named = insn.op_register(n);
            let full = named.full_register().number();
            assert!(
                usize::from(number & 15) == full || encoding.names_high_byte() || high(named),
                "{bytes:02x?}: operand {n} is {named:?}, not {number}"
            );
        }
    }
    let mem = encoding.has_memory();
    // Gathers and scatters are never emitted with a memory operand.
    if insn.is_vsib() {
        return insn.len();
    }
    if mem {
        encoding.set_memory(memory);
    }
    let mut out = [0; MAX_LEN];
    let Some(len) = encoding.emit(&mut out) else {
        return insn.len();
    };
    // Legacy code of other modes changes its meaning, and so its opcode, on purpose.
    if mode == CodeSize::Bits64 || encoding.form() != Form::Legacy {
        same(bytes, &insn, &out[..len], mem);
        // Any register may take the place of another.
        if encoding.register(Field::Reg).is_some() {
            encoding.set_register(Field::Reg, 3);
            let _ = encoding.emit(&mut out);
        }
    }
    insn.len()
}

fn high(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    )
}

/// `out` is the instruction that `bytes` are, but for its memory operand.
fn same(bytes: &[u8], insn: &iced_x86::Instruction, out: &[u8], mem: bool) {
    let back = Decoder::with_ip(64, out, 0x1000, DecoderOptions::NONE).decode();
    let what = || format!("{bytes:02x?} -> {out:02x?}: {insn:?} -> {back:?}");
    // Relative branches and what addresses RIP are never emitted as they are.
    if insn.code() != back.code() {
        assert!(moffs(insn), "{}", what());
        return;
    }
    assert_eq!(insn.op_count(), back.op_count(), "{}", what());
    assert_eq!(back.len(), out.len(), "{}", what());
    for n in 0..insn.op_count() {
        // An address in rDI has the width of the mode; the engines compute it themselves.
        let implied = matches!(
            insn.op_kind(n),
            OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI
        );
        if insn.op_kind(n) == OpKind::Memory && mem || implied {
            continue;
        }
        assert_eq!(insn.op_kind(n), back.op_kind(n), "{}", what());
        assert_eq!(insn.op_register(n), back.op_register(n), "{}", what());
    }
    assert_eq!(insn.has_lock_prefix(), back.has_lock_prefix(), "{}", what());
    assert_eq!(insn.op_mask(), back.op_mask(), "{}", what());
    assert_eq!(insn.zeroing_masking(), back.zeroing_masking(), "{}", what());
    assert_eq!(insn.is_broadcast(), back.is_broadcast(), "{}", what());
    assert_eq!(
        insn.rounding_control(),
        back.rounding_control(),
        "{}",
        what()
    );
}

/// MOV to and from an absolute address becomes the form with ModRM.
fn moffs(insn: &iced_x86::Instruction) -> bool {
    use iced_x86::Code::*;
    matches!(
        insn.code(),
        Mov_AL_moffs8
            | Mov_AX_moffs16
            | Mov_EAX_moffs32
            | Mov_RAX_moffs64
            | Mov_moffs8_AL
            | Mov_moffs16_AX
            | Mov_moffs32_EAX
            | Mov_moffs64_RAX
    )
}

/// Programs in each mode.
pub fn seeds() -> Vec<Vec<u8>> {
    programs()
        .flat_map(|program| {
            [0u8, 1, 2, 0x44, 0x93, 0xc2].map(|choice| {
                let mut seed = vec![choice];
                seed.extend_from_slice(&program);
                seed
            })
        })
        .collect()
}
