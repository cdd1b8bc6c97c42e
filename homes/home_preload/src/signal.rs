//! sigaction and its elder relatives.

use crate::real::{Real, fail, real};
use home_user::process::{self, signals};
use libc::{c_int, sighandler_t};
use std::mem::zeroed;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};

static REAL: Real = Real::new(c"sigaction");

/// sigaction, knowing where the C library's is.
///
/// # Safety
/// As sigaction.
unsafe fn program(sig: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int {
    // SAFETY: the address is that of the C library's sigaction, which has this type.
    unsafe {
        signals::set_real_sigaction(std::mem::transmute::<usize, signals::RealSigaction>(
            REAL.address(),
        ));
        signals::program_sigaction(sig, new, old)
    }
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sigaction(
    sig: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: the program's arguments.
    unsafe { program(sig, new, old) }
}

/// Installs a bare handler; the one before.
fn install(sig: c_int, handler: sighandler_t, flags: c_int) -> sighandler_t {
    // SAFETY: zeroed is a valid sigaction; both structures outlive the call.
    unsafe {
        let (mut new, mut old): (libc::sigaction, libc::sigaction) = (zeroed(), zeroed());
        new.sa_sigaction = handler;
        new.sa_flags = flags;
        if handler == libc::SIG_ERR || program(sig, &new, &mut old) != 0 {
            fail(libc::EINVAL);
            return libc::SIG_ERR;
        }
        old.sa_sigaction
    }
}

macro_rules! bsd {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(sig: c_int, handler: sighandler_t) -> sighandler_t {
            let bit = 1u64.checked_shl(sig.wrapping_sub(1) as u32).unwrap_or(0);
            let interrupts = INTERRUPTS.load(Ordering::Relaxed) & bit != 0;
            install(sig, handler, if interrupts { 0 } else { libc::SA_RESTART })
        }
    )*};
}
bsd!(signal bsd_signal ssignal);

/// Signals for which siginterrupt has asked that they interrupt, a bit each.
static INTERRUPTS: AtomicU64 = AtomicU64::new(0);

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn siginterrupt(sig: c_int, interrupt: c_int) -> c_int {
    // SAFETY: zeroed is a valid sigaction, and it outlives the calls.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        if program(sig, null(), &mut action) != 0 {
            return -1;
        }
        let bit = 1u64.checked_shl(sig.wrapping_sub(1) as u32).unwrap_or(0);
        if interrupt != 0 {
            INTERRUPTS.fetch_or(bit, Ordering::Relaxed);
            action.sa_flags &= !libc::SA_RESTART;
        } else {
            INTERRUPTS.fetch_and(!bit, Ordering::Relaxed);
            action.sa_flags |= libc::SA_RESTART;
        }
        program(sig, &action, null_mut())
    }
}

/// System V's: installs a handler and unblocks the signal, or blocks it (SIG_HOLD).
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sigset(sig: c_int, handler: sighandler_t) -> sighandler_t {
    const SIG_HOLD: sighandler_t = 2;
    // SAFETY: everything outlives the calls.
    unsafe {
        let (mut set, mut before) = (zeroed(), zeroed());
        libc::sigemptyset(&mut set);
        if libc::sigaddset(&mut set, sig) != 0 {
            return libc::SIG_ERR;
        }
        let mut old: libc::sigaction = zeroed();
        if handler == SIG_HOLD {
            if program(sig, null(), &mut old) != 0 {
                return libc::SIG_ERR;
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut before);
        } else {
            old.sa_sigaction = install(sig, handler, 0);
            if old.sa_sigaction == libc::SIG_ERR {
                return libc::SIG_ERR;
            }
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, &mut before);
        }
        if libc::sigismember(&before, sig) == 1 {
            return SIG_HOLD;
        }
        old.sa_sigaction
    }
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sigignore(sig: c_int) -> c_int {
    if install(sig, libc::SIG_IGN, 0) == libc::SIG_ERR {
        return -1;
    }
    0
}

macro_rules! system_v {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(sig: c_int, handler: sighandler_t) -> sighandler_t {
            install(sig, handler, libc::SA_RESETHAND | libc::SA_NODEFER)
        }
    )*};
}
system_v!(sysv_signal __sysv_signal);

extern "C" fn nothing(_: *mut libc::c_void) -> *mut libc::c_void {
    std::ptr::null_mut()
}

/// The C library installs its handler when somebody is first cancelled: a thread that does nothing, here, so
/// that ours can be put before it.
fn prepare_cancellation() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        if signals::catch_cancellation() {
            return;
        }
        let mut thread: libc::pthread_t = 0;
        // SAFETY: the handle is written before the call returns.
        let made = unsafe {
            libc::pthread_create(&mut thread, std::ptr::null(), nothing, std::ptr::null_mut())
        };
        if made != 0 {
            return;
        }
        let _: c_int = real!(pthread_cancel(thread): fn(libc::pthread_t) -> c_int);
        // SAFETY: the handle is valid until here.
        unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
        signals::catch_cancellation();
    });
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn pthread_cancel(thread: libc::pthread_t) -> c_int {
    static CANCEL: Real = Real::new(c"pthread_cancel");
    if process::in_use() {
        prepare_cancellation();
    }
    match CANCEL.address() {
        0 => libc::ESRCH,
        address => {
            // SAFETY: the address is that of the C library's function, which may unwind when the thread is this.
            unsafe {
                let cancel: unsafe extern "C-unwind" fn(libc::pthread_t) -> c_int =
                    std::mem::transmute(address);
                cancel(thread)
            }
        }
    }
}
