//! Writing guest programs.

use crate::layout;
use iced_x86::code_asm::*;

/// Instructions, one after another: `asm!(a; mov(eax, 1); lock.inc(dword_ptr(rbx)); ...)`.
#[macro_export]
macro_rules! asm {
    ($a:ident;) => {{}};
    ($a:ident; $p:ident . $q:ident . $m:ident ( $($x:expr),* $(,)? ) ; $($rest:tt)*) => {{
        $a.$p().$q().$m($($x),*).unwrap();
        $crate::asm!($a; $($rest)*)
    }};
    ($a:ident; $p:ident . $m:ident ( $($x:expr),* $(,)? ) ; $($rest:tt)*) => {{
        $a.$p().$m($($x),*).unwrap();
        $crate::asm!($a; $($rest)*)
    }};
    ($a:ident; $m:ident ( $($x:expr),* $(,)? ) ; $($rest:tt)*) => {{
        $a.$m($($x),*).unwrap();
        $crate::asm!($a; $($rest)*)
    }};
}

/// Places a label here.
pub fn here(a: &mut CodeAssembler) -> CodeLabel {
    let mut l = a.create_label();
    a.set_label(&mut l).unwrap();
    l
}

/// Reports EAX.
pub fn report(a: &mut CodeAssembler) {
    asm!(a; out(u32::from(layout::PORT_REPORT), eax););
}

/// Reports a constant.
pub fn report_value(a: &mut CodeAssembler, value: u32) {
    asm!(a; mov(eax, value););
    report(a);
}

/// The program is done.
pub fn end(a: &mut CodeAssembler) {
    asm!(a; out(u32::from(layout::PORT_END), al););
}

/// Something that may raise an exception: the handler records it and goes on behind. Uses R15, in
/// 32-bit code EBP.
pub fn attempt(a: &mut CodeAssembler, f: impl FnOnce(&mut CodeAssembler)) {
    let mut next = a.create_label();
    if a.bitness() == 64 {
        asm!(a; lea(r15, ptr(next)););
    } else {
        // A call leaves the address of a jump to the end.
        let mut on = a.create_label();
        asm!(a; call(on); jmp(next); set_label(&mut on); pop(ebp););
    }
    f(a);
    a.set_label(&mut next).unwrap();
    if a.bitness() == 64 {
        asm!(a; mov(r15d, 0););
    } else {
        asm!(a; mov(ebp, 0););
    }
}

/// Loads a 64-bit constant and moves it to a control register.
pub fn set_cr(a: &mut CodeAssembler, cr: AsmRegisterCr, value: u64) {
    if a.bitness() == 64 {
        asm!(a; mov(rax, value); mov(cr, rax););
    } else {
        asm!(a; mov(eax, value as u32); mov(cr, eax););
    }
}

/// Sets bits of a control register.
pub fn or_cr(a: &mut CodeAssembler, cr: AsmRegisterCr, bits: u32) {
    if a.bitness() == 64 {
        asm!(a; mov(rax, cr); mov(ecx, bits); or(rax, rcx); mov(cr, rax););
    } else {
        asm!(a; mov(eax, cr); or(eax, bits); mov(cr, eax););
    }
}

/// Clears bits of a control register.
pub fn clear_cr(a: &mut CodeAssembler, cr: AsmRegisterCr, bits: u32) {
    if a.bitness() == 64 {
        asm!(a; mov(rax, cr); mov(ecx, bits); not(rcx); and(rax, rcx); mov(cr, rax););
    } else {
        asm!(a; mov(eax, cr); and(eax, !bits); mov(cr, eax););
    }
}

/// WRMSR.
pub fn wrmsr(a: &mut CodeAssembler, msr: u32, value: u64) {
    asm!(a;
        mov(ecx, msr);
        mov(eax, value as u32);
        mov(edx, (value >> 32) as u32);
        wrmsr();
    );
}

/// Calls 64-bit user code at `entry` with its stack at `stack`; it comes back with INT 0x80. RAX and RCX
/// are lost.
pub fn call_user(a: &mut CodeAssembler, entry: u64, stack: u64, flags: u32) {
    let mut back = a.create_label();
    asm!(a;
        lea(rax, ptr(back));
        mov(qword_ptr(layout::USER_RETURN), rax);
        mov(eax, u32::from(crate::tables::USER_DATA));
        push(rax);
        mov(rax, stack);
        push(rax);
        push(flags as i32);
        push(i32::from(crate::tables::USER_CODE));
        mov(rax, entry);
        push(rax);
        iretq();
        set_label(&mut back);
        nop();
    );
}

/// Lets the host act.
pub fn host(a: &mut CodeAssembler) {
    asm!(a; out(u32::from(layout::PORT_HOST), al););
}
