//! Whether the host lets guest memory be touched.
//!
//! User space may unmap or shrink what a memslot points at while the slot exists; KVM then ends KVM_RUN
//! with EFAULT. Memory is touched here before it is used: by one instruction at an address that the home
//! knows, so that its fault handler (a signal handler in a process, the exception table in a kernel)
//! can tell such a fault from a mistake and let the probe return `false`.
#![expect(unsafe_code, reason = "touches memory that may not be there")]

/// Reads the byte in RDI. Its first instruction is the one that may fault.
#[unsafe(naked)]
unsafe extern "sysv64" fn read(at: *const u8) -> u32 {
    core::arch::naked_asm!("movzx ecx, byte ptr [rdi]", "xor eax, eax", "ret")
}

/// Writes the byte in RDI without changing it. Its first instruction is the one that may fault.
#[unsafe(naked)]
unsafe extern "sysv64" fn write(at: *mut u8) -> u32 {
    core::arch::naked_asm!("lock or byte ptr [rdi], 0", "xor eax, eax", "ret")
}

/// Copies RCX bytes from RSI to RDI. Its first instruction is the one that may fault.
#[unsafe(naked)]
unsafe extern "sysv64" fn copy(to: *mut u8, from: *const u8, unused: usize, len: usize) -> u32 {
    core::arch::naked_asm!("rep movsb", "xor eax, eax", "ret")
}

/// Copies `len` bytes, either end of which may turn out not to be there; `false` then, with some of
/// the bytes copied.
///
/// # Safety
/// No Rust reference may exist to what `to` points at, and what lies there must be the caller's of an ioctl
/// to lose: its arguments. The home's fault handler must be in place.
pub unsafe fn try_copy(to: *mut u8, from: *const u8, len: usize) -> bool {
    // SAFETY: the function follows the calling convention; a fault makes it return non-zero.
    unsafe { copy(to, from, 0, len) == 0 }
}

/// Whether the host page at `at` can be read, and if `for_write` written.
///
/// # Safety
/// `at` must point into what a memslot calls guest memory, mapped or not, and the home's fault handler
/// must be in place.
pub unsafe fn accessible(at: *mut u8, for_write: bool) -> bool {
    // SAFETY: the functions follow the calling convention and change nothing but RAX and RCX. If the
    // access faults, the home continues behind the call with a non-zero result (see `is_probe`).
    let fault = unsafe { if for_write { write(at) } else { read(at) } };
    fault == 0
}

/// Whether a fault at this instruction pointer is a probe's. Then the home puts 1 into RAX and returns
/// to the caller: pops RIP from the stack.
pub fn is_probe(rip: u64) -> bool {
    [
        read as *const () as u64,
        write as *const () as u64,
        copy as *const () as u64,
    ]
    .contains(&rip)
}
