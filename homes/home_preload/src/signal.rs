//! sigaction and its elder relatives.

use crate::real::{Real, fail};
use home_user::process::signals;
use libc::{c_int, sighandler_t};
use std::mem::zeroed;

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
            install(sig, handler, libc::SA_RESTART)
        }
    )*};
}
bsd!(signal bsd_signal ssignal);

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
