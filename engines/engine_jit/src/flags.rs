//! Moving the guest's arithmetic flags between EFLAGS and memory.

use crate::asm::{Asm, Mem, Size, reg};
use crate::layout::off;
use crate::stubs::T;

/// EFLAGS to memory. Keeps EFLAGS; clobbers T.
pub fn save(a: &mut Asm) {
    a.mov(T, reg::RAX);
    a.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    a.store(Size::W, Mem::Gs(off::FLAGS), reg::RAX);
    a.mov(reg::RAX, T);
}

/// The carry flag to memory, where [`save`] puts it. Clobbers nothing.
pub fn save_carry(a: &mut Asm) {
    a.op_mem(Size::D, &[0x0f, 0x92], 0, Mem::Gs(off::FLAGS + 1)); // setc
}

/// The carry flag from memory, where it is lost, as are the other arithmetic flags. One byte is loaded, as one
/// may have been stored: a wider load would have to wait.
pub fn restore_carry(a: &mut Asm) {
    a.op_mem(Size::D, &[0xd0], 1, Mem::Gs(off::FLAGS + 1)); // ror
}

/// Memory to EFLAGS. Clobbers T.
pub fn restore(a: &mut Asm) {
    a.mov(T, reg::RAX);
    a.load(Size::W, reg::RAX, Mem::Gs(off::FLAGS));
    load(a);
    a.mov(reg::RAX, T);
}

/// Memory to EFLAGS, with T and I in use.
pub fn restore_keeping_scratch(a: &mut Asm) {
    a.store(Size::Q, Mem::Gs(off::SPILL), reg::RAX);
    a.load(Size::W, reg::RAX, Mem::Gs(off::FLAGS));
    load(a);
    a.load(Size::Q, reg::RAX, Mem::Gs(off::SPILL));
}

/// RAX, as it was loaded from memory, to EFLAGS.
pub fn load(a: &mut Asm) {
    // OF comes back by adding 0x7f to 0 or 1; SAHF leaves OF alone.
    a.bytes(&[0x04, 0x7f, 0x9e]);
}
