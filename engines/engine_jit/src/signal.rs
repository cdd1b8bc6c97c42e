//! Host faults in translated code, and the `gs` base.
//!
//! Instructions that are copied fault on the host as they would in the guest (#DE, #GP for
//! alignment, #XM, #MF). The handler only sends the thread to the fault stub; the interpreter then
//! executes the instruction again and raises the guest's exception.
#![expect(unsafe_code, reason = "signal handlers and the gs base")]

use crate::layout::{Fault, VcpuMem};
use std::cell::Cell;
use std::ops::Range;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

#[derive(Clone, Copy)]
struct Current {
    start: u64,
    end: u64,
    vm: *mut VcpuMem,
    stub: u64,
}

thread_local! {
    static CURRENT: Cell<Current> =
        const { Cell::new(Current { start: 0, end: 0, vm: std::ptr::null_mut(), stub: 0 }) };
    static GS: Cell<u64> = const { Cell::new(0) };
}

static mut OLD: [libc::sigaction; 4] = [const { unsafe_zeroed() }; 4];

const fn unsafe_zeroed() -> libc::sigaction {
    // SAFETY: all-zero is a valid sigaction (SIG_DFL, no flags).
    unsafe { std::mem::zeroed() }
}

/// While it lives, faults in `code` on this thread go to the fault stub.
pub struct Translated(Current);

impl Translated {
    /// Declares that this thread runs translated code.
    pub fn new(code: Range<u64>, vm: *mut VcpuMem, stub: u64) -> Self {
        install_handlers();
        let now = Current {
            start: code.start,
            end: code.end,
            vm,
            stub,
        };
        Translated(CURRENT.replace(now))
    }
}

impl Drop for Translated {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Puts the handlers in place, once. A program whose own handlers should stay the outermost calls this
/// before it installs them.
pub fn install_handlers() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
}

fn install() {
    for (i, &sig) in SIGNALS.iter().enumerate() {
        // SAFETY: the handler has the signature that SA_SIGINFO asks for; `OLD` is written once,
        // before the handler that reads it is in place for this signal.
        unsafe {
            let mut act = unsafe_zeroed();
            act.sa_sigaction = handler as *const () as usize;
            act.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // A signal stack may have room for one frame only: nothing but a fault comes on top.
            libc::sigfillset(&mut act.sa_mask);
            for fault in SIGNALS {
                libc::sigdelset(&mut act.sa_mask, fault);
            }
            libc::sigaction(sig, std::ptr::null(), &raw mut OLD[i]);
            libc::sigaction(sig, &act, std::ptr::null_mut());
        }
    }
}

/// The seccomp mode of the thread that made the first virtual machine, plus 1.
static SECCOMP: AtomicI32 = AtomicI32::new(0);

fn seccomp_mode() -> i32 {
    // SAFETY: asks, and changes nothing.
    unsafe { libc::prctl(libc::PR_GET_SECCOMP) }
}

/// Notes what system calls threads may make when virtual machines are made.
pub fn note_filter() {
    let mode = seccomp_mode() + 1;
    let _ = SECCOMP.compare_exchange(0, mode, Ordering::Relaxed, Ordering::Relaxed);
}

/// This thread may make the system calls that windows need: it got no filter of its own since then.
pub fn unfiltered() -> bool {
    seccomp_mode() < SECCOMP.load(Ordering::Relaxed)
}

/// A host fault on this thread would come to the handler: it is still in place, and the signal is not blocked.
pub fn faults_arrive() -> bool {
    // SAFETY: both calls only write to their buffers.
    unsafe {
        let mut now = unsafe_zeroed();
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut now) == 0
            && now.sa_sigaction == handler as *const () as usize
            && libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut blocked) == 0
            && libc::sigismember(&raw const blocked, libc::SIGSEGV) == 0
    }
}

extern "C" fn handler(sig: libc::c_int, info: *mut libc::siginfo_t, ctx: *mut libc::c_void) {
    let current = CURRENT.get();
    // SAFETY: the kernel passes a valid ucontext; `vm` is valid while `Translated` lives.
    unsafe {
        let uc = ctx.cast::<libc::ucontext_t>();
        let rip = &mut (*uc).uc_mcontext.gregs[libc::REG_RIP as usize];
        let pc = *rip as u64;
        if pc >= current.start && pc < current.end {
            *rip = current.stub as i64;
            let reg = |n: libc::c_int| (&(*uc).uc_mcontext.gregs)[n as usize] as u64;
            (*current.vm).fault_pc = pc;
            (*current.vm).fault = Fault {
                t: reg(libc::REG_R10),
                i: reg(libc::REG_R11),
                flags: reg(libc::REG_EFL),
                address: reg(libc::REG_CR2),
                vector: reg(libc::REG_TRAPNO),
                code: reg(libc::REG_ERR),
            };
            return;
        }
        chain(sig, info, ctx);
    }
}

/// Passes a signal on to whoever had it before.
///
/// # Safety
/// Called from the handler with its arguments.
unsafe fn chain(sig: libc::c_int, info: *mut libc::siginfo_t, ctx: *mut libc::c_void) {
    let Some(i) = SIGNALS.iter().position(|&s| s == sig) else {
        return;
    };
    // SAFETY: `OLD` was written before this handler was installed; the old handler is called as its
    // flags say, or the default action is put back, so that the instruction faults again.
    unsafe {
        let old = OLD[i];
        match old.sa_sigaction {
            libc::SIG_DFL => {
                libc::signal(sig, libc::SIG_DFL);
            }
            libc::SIG_IGN => {
                libc::signal(sig, libc::SIG_DFL);
            }
            f if old.sa_flags & libc::SA_SIGINFO != 0 => {
                let f: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(f);
                f(sig, info, ctx);
            }
            f => {
                let f: extern "C" fn(libc::c_int) = std::mem::transmute(f);
                f(sig);
            }
        }
    }
}

/// Points this thread's `gs` at the vCPU's memory. glibc and Rust leave `gs` free on x86-64.
pub fn set_gs(base: u64) {
    const ARCH_SET_GS: libc::c_int = 0x1001;
    if GS.get() == base {
        return;
    }
    // SAFETY: sets a register that nothing else in the process uses; the thread's own.
    unsafe {
        libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base);
    }
    GS.set(base);
}
