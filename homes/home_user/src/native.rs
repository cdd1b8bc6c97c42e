//! Single guest instructions on the host CPU, from a process: the home's [`HostCpu`], and that of the
//! interpreter's tests, which include this file; it must therefore not use the rest of this crate.
//!
//! Each instruction gets a stub in executable memory that loads the registers, executes it and stores
//! them again; stubs are found by the instruction's bytes, so a program's few distinct encodings are
//! written once. The memory is a memfd mapped twice, never writable and executable at one address.
//!
//! A fault inside a stub arrives as a signal. The handler recognises the address, puts the trap number
//! into RAX and continues at the stub's second exit, which restores the host's registers.
#![expect(
    unsafe_code,
    reason = "generates and calls machine code and handles its signals"
)]

use std::boxed::Box;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::vec;
use x86emu::env::{HostCpu, NativeRegs};
use x86emu::state::XsaveArea;

/// Executable bytes per [`Native`].
const REGION: usize = 1 << 20;
/// No stub is longer.
const STUB_MAX: usize = 384;
const SLOTS: usize = 4096;
/// Most vCPUs of a process.
const MAX_REGIONS: usize = 4096;
/// Start addresses of executable regions, for the signal handler.
static REGIONS: [AtomicUsize; MAX_REGIONS] = [const { AtomicUsize::new(0) }; MAX_REGIONS];
const MARK: u32 = 0x80;

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// x87, SSE, AVX, AVX-512.
const SERVED: u64 = 0xe7;

#[derive(Clone, Copy)]
struct Slot {
    key: u128,
    offset: u32,
}

/// Executes single instructions on the host CPU.
pub struct Native {
    write: *mut u8,
    exec: *const u8,
    used: usize,
    slots: Box<[Slot]>,
    /// XCR0 components that are loaded and saved.
    mask: u64,
    region: usize,
}

// SAFETY: the mappings belong to this value alone and are not bound to a thread.
unsafe impl Send for Native {}

type Stub = unsafe extern "sysv64" fn(*mut NativeRegs, *mut XsaveArea, u64) -> u64;

/// Bytes of code under construction.
struct Asm {
    buf: [u8; STUB_MAX],
    len: usize,
}

impl Asm {
    fn put(&mut self, bytes: &[u8]) {
        self.buf[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// `mov r, [rdi + 8 * r]` or the store.
    fn gpr(&mut self, opcode: u8, r: u8) {
        self.put(&[0x48 | (r >> 3) << 2, opcode, 0x47 | (r & 7) << 3, r * 8]);
    }

    /// Restores the host's FPU control state and callee-saved registers, returns RAX.
    fn leave(&mut self, fpu: u64) {
        if fpu & X87 != 0 {
            self.put(&[0xdb, 0xe3]); // fninit
            self.put(&[0xd9, 0x6c, 0x24, 4]); // fldcw [rsp+4]
        }
        if fpu != 0 {
            self.put(&[0x0f, 0xae, 0x14, 0x24]); // ldmxcsr [rsp]
            if fpu & AVX != 0 {
                self.put(&[0xc5, 0xf8, 0x77]); // vzeroupper
            }
        }
        self.put(&[0x48, 0x83, 0xc4, 32]); // add rsp, 32
        self.put(&[0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5b, 0x5d]);
        self.put(&[0xc3]);
    }
}

fn build(insn: &[u8], components: u64) -> Asm {
    let fpu = components != 0;
    let mut a = Asm {
        buf: [0; STUB_MAX],
        len: 0,
    };
    a.put(&[0x55, 0x53, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
    a.put(&[0x56, 0x52]); // push rsi; push rdx
    a.put(&[0x48, 0x83, 0xec, 16]); // sub rsp, 16
    if fpu {
        a.put(&[0x0f, 0xae, 0x1c, 0x24]); // stmxcsr [rsp]
    }
    if components & X87 != 0 {
        a.put(&[0xd9, 0x7c, 0x24, 4]); // fnstcw [rsp+4]
    }
    a.put(&[0x48, 0x8d, 0x0d]); // lea rcx, [fault exit]
    let lea = a.len;
    a.put(&[0; 4]);
    a.put(&[0x51, 0x57]); // push rcx; push rdi
    if fpu {
        a.put(&[0x89, 0xd0, 0x48, 0xc1, 0xea, 32]); // mov eax, edx; shr rdx, 32
        a.put(&[0x48, 0x0f, 0xae, 0x2e]); // xrstor64 [rsi]
    }
    a.put(&[0xff, 0xb7, 128, 0, 0, 0, 0x9d]); // push [rdi+128]; popfq
    for r in [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 7] {
        a.gpr(0x8b, r);
    }
    a.put(insn);
    a.put(&[0x57]); // push rdi
    a.put(&[0x48, 0x8b, 0x7c, 0x24, 8]); // mov rdi, [rsp+8]
    for r in [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15] {
        a.gpr(0x89, r);
    }
    a.put(&[0x8f, 0x47, 56]); // pop [rdi+56]
    a.put(&[0x9c, 0x8f, 0x87, 128, 0, 0, 0]); // pushfq; pop [rdi+128]
    a.put(&[0x48, 0x83, 0xc4, 16]); // add rsp, 16
    if fpu {
        a.put(&[0x48, 0x8b, 0x74, 0x24, 24]); // mov rsi, [rsp+24]
        a.put(&[0x48, 0x8b, 0x44, 0x24, 16]); // mov rax, [rsp+16]
        a.put(&[0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 32]); // mov rdx, rax; shr rdx, 32
        a.put(&[0x48, 0x0f, 0xae, 0x26]); // xsave64 [rsi]
    }
    a.put(&[0x31, 0xc0]); // xor eax, eax
    a.leave(components);
    let exit = a.len;
    a.put(&[0x48, 0x83, 0xc4, 16]); // add rsp, 16
    if fpu {
        // An unmasked SIMD exception leaves its flag in MXCSR.
        a.put(&[0x3c, 19 | MARK as u8, 0x75, 9]); // cmp al, 19; jne +9
        a.put(&[0x48, 0x8b, 0x74, 0x24, 24]); // mov rsi, [rsp+24]
        a.put(&[0x0f, 0xae, 0x5e, 24]); // stmxcsr [rsi+24]
    }
    a.leave(components);
    let rel = (exit - lea - 4) as u32;
    a.buf[lea..lea + 4].copy_from_slice(&rel.to_le_bytes());
    a
}

/// At most 15 bytes as a number. By loads of fixed sizes: a copy of `len` bytes that is then read as a
/// whole would wait for the stores to arrive in the cache.
fn packed(insn: &[u8]) -> u128 {
    let len = insn.len().min(15);
    let shift = 8 * len as u32;
    if let (Some(head), Some(tail)) = (insn.first_chunk::<8>(), insn.last_chunk::<8>()) {
        let tail = u128::from(u64::from_le_bytes(*tail)) << (shift - 64);
        return u128::from(u64::from_le_bytes(*head)) | tail;
    }
    if let (Some(head), Some(tail)) = (insn.first_chunk::<4>(), insn.last_chunk::<4>()) {
        let tail = u128::from(u32::from_le_bytes(*tail)) << (shift - 32);
        return u128::from(u32::from_le_bytes(*head)) | tail;
    }
    insn.iter()
        .rev()
        .fold(0, |key, &byte| key << 8 | u128::from(byte))
}

/// The XSAVE components that an instruction can reach. Loading and saving less is most of the cost
/// of a vector instruction.
fn components(insn: &[u8]) -> u64 {
    let mut prefixed = false;
    let mut rest = insn.iter().copied().peekable();
    while let Some(b @ (0x66 | 0xf2 | 0xf3 | 0xf0 | 0x67 | 0x65 | 0x40..=0x4f)) =
        rest.peek().copied()
    {
        prefixed |= matches!(b, 0x66 | 0xf2 | 0xf3);
        rest.next();
    }
    match (rest.next(), rest.next()) {
        (Some(0xc4 | 0xc5 | 0x62), _) => !X87,
        // FXSAVE, XSAVE and their relatives.
        (Some(0x0f), Some(0xae | 0xc7)) => !0,
        (Some(0x0f), Some(op)) => {
            // MMX registers are x87 registers.
            let mmx = match op {
                0x2a | 0x2c | 0x2d | 0xd6 => true,
                0x38 | 0x3a | 0x60..=0x7f | 0xc4 | 0xc5 | 0xd0..=0xff => !prefixed,
                _ => false,
            };
            if mmx { X87 | SSE } else { SSE }
        }
        _ => X87 | SSE,
    }
}

extern "C" fn on_fault(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a valid context to a handler with SA_SIGINFO.
    let gregs = unsafe { &mut (*context).uc_mcontext.gregs };
    let rip = gregs[libc::REG_RIP as usize] as usize;
    let ours = REGIONS.iter().any(|r| {
        let start = r.load(Ordering::Relaxed);
        start != 0 && rip.wrapping_sub(start) < REGION
    });
    if ours {
        let rsp = gregs[libc::REG_RSP as usize] as usize;
        // SAFETY: instructions in stubs do not touch RSP, and while one can fault the stack holds
        // the register pointer and above it the address of the fault exit.
        let exit = unsafe { *((rsp + 8) as *const usize) };
        let vector = gregs[libc::REG_TRAPNO as usize] as u32 & 0x1f;
        gregs[libc::REG_RAX as usize] = i64::from(vector | MARK);
        gregs[libc::REG_RIP as usize] = exit as i64;
        return;
    }
    if guestmem::probe::is_probe(rip as u64) {
        let rsp = gregs[libc::REG_RSP as usize];
        // SAFETY: a probe faults at its first instruction, with its return address on the stack.
        gregs[libc::REG_RIP as usize] = unsafe { *(rsp as *const i64) };
        gregs[libc::REG_RSP as usize] = rsp + 8;
        gregs[libc::REG_RAX as usize] = 1;
        return;
    }
    chain(sig, info, context.cast());
}

/// Passes a signal that no stub raised on to the handler that was there before.
fn chain(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(previous) = SIGNALS.iter().position(|&s| s == sig).map(|i| &PREVIOUS[i]) else {
        return;
    };
    let handler = previous.0.load(Ordering::Acquire);
    // SAFETY: the kernel passes a valid siginfo.
    let sent = unsafe { (*info).si_code } <= 0;
    if handler == libc::SIG_IGN && sent {
        return;
    }
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        default_action(sig, sent);
        return;
    }
    // What the kernel does for a handler with these flags.
    let flags = previous.1.load(Ordering::Relaxed);
    if flags & libc::SA_RESETHAND != 0 {
        previous.0.store(libc::SIG_DFL, Ordering::Release);
    }
    let mut mask = previous.2.load(Ordering::Relaxed);
    if flags & libc::SA_NODEFER == 0 {
        mask |= 1 << (sig - 1);
    }
    // SAFETY: the kernel passes a valid context. The first word of its mask is the one in use.
    let before = unsafe {
        (&raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask)
            .cast::<u64>()
            .read_unaligned()
    };
    set_mask(before | mask);
    // SAFETY: the handler was installed for this signal. One without SA_SIGINFO ignores the second and
    // third argument, which are in registers.
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
        unsafe { core::mem::transmute(handler) };
    handler(sig, info, context);
}

/// Sets the thread's signal mask; the kernel restores it when the handler returns.
fn set_mask(set: u64) {
    // SAFETY: the set outlives the call.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const set,
            core::ptr::null_mut::<u64>(),
            8,
        );
    }
}

/// The default action, when the instruction is executed again; a signal that was `sent` is sent again.
fn default_action(sig: i32, sent: bool) {
    // The kernel's structure: handler, flags, restorer, mask.
    let default = [0u64; 4];
    // SAFETY: the structure outlives the call. The system calls themselves, because what stands in front
    // of the C library's functions keeps our handler in place.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            sig,
            default.as_ptr(),
            core::ptr::null_mut::<u64>(),
            8,
        );
        if sent {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), sig);
        }
    }
}

/// The signals whose handler is [`on_fault`] once [`install`] has run.
pub const SIGNALS: [i32; 4] = [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS];
/// The program's handlers, in the order of [`SIGNALS`], with their flags and the first word of their mask.
pub static PREVIOUS: [(AtomicUsize, AtomicI32, AtomicU64); 4] =
    [const { (AtomicUsize::new(0), AtomicI32::new(0), AtomicU64::new(0)) }; 4];

/// Puts the fault handlers in place, once.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (sig, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
            let mut old = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: the structures are initialised and the handler has the SA_SIGINFO signature. What
            // was there is known before the handler that passes on to it is in place.
            unsafe {
                libc::sigaction(sig, core::ptr::null(), old.as_mut_ptr());
                let old = old.assume_init();
                previous.1.store(old.sa_flags, Ordering::Relaxed);
                previous
                    .2
                    .store(core::mem::transmute_copy(&old.sa_mask), Ordering::Relaxed);
                previous.0.store(old.sa_sigaction, Ordering::Release);
                let mut action: libc::sigaction = core::mem::zeroed();
                action.sa_sigaction = on_fault as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                // A signal stack may have room for one frame only: nothing but a fault comes on top.
                libc::sigfillset(&mut action.sa_mask);
                for fault in SIGNALS {
                    libc::sigdelset(&mut action.sa_mask, fault);
                }
                libc::sigaction(sig, &action, core::ptr::null_mut());
            }
        }
    });
}

impl Native {
    /// Maps the code memory and installs the signal handlers.
    ///
    /// # Errors
    /// What the system calls say; `StorageFull` when the process has too many already.
    pub fn new() -> io::Result<Self> {
        install();
        let (write, exec) = map_code()?;
        let region = REGIONS.iter().position(|r| {
            r.compare_exchange(0, exec as usize, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        });
        let native = Native {
            write,
            exec,
            used: 0,
            slots: vec![Slot { key: 0, offset: 0 }; SLOTS].into_boxed_slice(),
            mask: host_xcr0() & SERVED,
            region: region.unwrap_or(MAX_REGIONS),
        };
        region.ok_or(io::ErrorKind::StorageFull)?;
        Ok(native)
    }

    fn stub(&mut self, insn: &[u8], components: u64) -> Stub {
        let fpu = components != 0;
        let kind = insn.len() as u8 | u8::from(fpu) << 7;
        let key = packed(insn) | u128::from(kind) << 120;
        let folded = (key as u64) ^ (key >> 64) as u64;
        let slot = (folded.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52) as usize % SLOTS;
        let found = self.slots[slot];
        let offset = if found.key == key {
            found.offset as usize
        } else {
            if self.used + STUB_MAX > REGION {
                self.used = 0;
                self.slots.fill(Slot { key: 0, offset: 0 });
            }
            let code = build(insn, components);
            let offset = self.used;
            // SAFETY: `offset + code.len` stays inside the writable mapping (checked above).
            unsafe {
                core::ptr::copy_nonoverlapping(code.buf.as_ptr(), self.write.add(offset), code.len);
            }
            self.used += (code.len + 15) & !15;
            self.slots[slot] = Slot {
                key,
                offset: offset as u32,
            };
            offset
        };
        // SAFETY: the address holds a complete stub of this signature.
        unsafe { core::mem::transmute::<*const u8, Stub>(self.exec.add(offset)) }
    }
}

/// The host's XCR0; without XSAVE, what FXSAVE knows.
fn host_xcr0() -> u64 {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return X87 | SSE;
    }
    let (low, high): (u32, u32);
    // SAFETY: the operating system has enabled XSAVE, and XGETBV with ECX = 0 only reads.
    unsafe {
        core::arch::asm!(
            "xgetbv",
            in("ecx") 0,
            out("eax") low,
            out("edx") high,
            options(nomem, nostack, preserves_flags)
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Maps [`REGION`] bytes twice, writable and executable.
fn map_code() -> io::Result<(*mut u8, *const u8)> {
    // SAFETY: plain system calls on a descriptor made here; the results are checked.
    unsafe {
        let fd = libc::memfd_create(c"anykvm-native".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let map = |prot| libc::mmap(core::ptr::null_mut(), REGION, prot, libc::MAP_SHARED, fd, 0);
        let result;
        if libc::ftruncate(fd, REGION as libc::off_t) == 0 {
            let write = map(libc::PROT_READ | libc::PROT_WRITE);
            let exec = map(libc::PROT_READ | libc::PROT_EXEC);
            if write == libc::MAP_FAILED || exec == libc::MAP_FAILED {
                result = Err(io::Error::last_os_error());
                for mapping in [write, exec] {
                    if mapping != libc::MAP_FAILED {
                        libc::munmap(mapping, REGION);
                    }
                }
            } else {
                result = Ok((write.cast::<u8>(), exec.cast::<u8>().cast_const()));
            }
        } else {
            result = Err(io::Error::last_os_error());
        }
        libc::close(fd);
        result
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if let Some(region) = REGIONS.get(self.region) {
            region.store(0, Ordering::SeqCst);
        }
        // SAFETY: both mappings were made by `new` and no stub runs any more.
        unsafe {
            libc::munmap(self.write.cast(), REGION);
            libc::munmap(self.exec.cast_mut().cast(), REGION);
        }
    }
}

impl HostCpu for Native {
    fn native(
        &mut self,
        insn: &[u8],
        regs: &mut NativeRegs,
        fpu: Option<&mut XsaveArea>,
    ) -> Result<(), u8> {
        if insn.len() > 15 {
            return Err(6);
        }
        let mask = match &fpu {
            Some(_) => self.mask & components(insn),
            None => 0,
        };
        let stub = self.stub(insn, mask);
        regs.rflags = regs.rflags & 0x8d5 | 2;
        let area = fpu.map_or(core::ptr::null_mut(), core::ptr::from_mut);
        // SAFETY: the stub keeps the host's registers and stack; the instruction in it obeys the
        // contract of `HostCpu::native`.
        let result = unsafe { stub(regs, area, mask) };
        regs.rflags &= 0x8d5;
        match result as u32 {
            0 => Ok(()),
            v => Err((v & 0x1f) as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::packed;

    #[test]
    fn packed_is_the_bytes_in_order() {
        let bytes: [u8; 15] = std::array::from_fn(|i| 0xf0 | i as u8);
        for len in 0..=15 {
            let mut wide = [0; 16];
            wide[..len].copy_from_slice(&bytes[..len]);
            assert_eq!(packed(&bytes[..len]), u128::from_le_bytes(wide), "{len}");
        }
    }
}
