//! ioctl, and the end of descriptors.

use crate::real::{fail, real};
use crate::settings;
use home_user::process::{self, signals};
use libc::{c_int, c_uint, c_ulong, c_void, off_t, size_t};

/// The type byte of KVM's ioctls (KVMIO).
const KVMIO: c_ulong = 0xae;

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    if (request >> 8) & 0xff == KVMIO
        && settings::applied()
        && let Some(answer) = process::ioctl(fd, request as u32, arg as u64)
    {
        signals::end_if_cancelled();
        return match answer {
            Ok(value) => value as c_int,
            Err(e) => fail(e.0),
        };
    }
    real!(ioctl(fd, request, arg): fn(c_int, c_ulong, *mut c_void) -> c_int)
}

/// Closes or replaces descriptors with `end`, of which the first is `first`, the last `last`.
fn ending(first: c_int, last: c_int, end: impl FnOnce() -> c_int) -> c_int {
    if !process::in_use() {
        return end();
    }
    let ours = process::closing(first, last);
    let result = end();
    // SAFETY: the location of errno is the thread's own.
    unsafe {
        let errno = *libc::__errno_location();
        process::closed(first, last, ours);
        *libc::__errno_location() = errno;
    }
    result
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    ending(fd, fd, || real!(close(fd): fn(c_int) -> c_int))
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    ending(
        first.try_into().unwrap_or(c_int::MAX),
        last.try_into().unwrap_or(c_int::MAX),
        || real!(close_range(first, last, flags): fn(c_uint, c_uint, c_int) -> c_int),
    )
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closefrom(first: c_int) {
    ending(
        first.max(0),
        c_int::MAX,
        || real!(closefrom(first): fn(c_int) -> c_int),
    );
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    ending(
        new,
        new,
        || real!(dup2(old, new): fn(c_int, c_int) -> c_int),
    )
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    ending(
        new,
        new,
        || real!(dup3(old, new, flags): fn(c_int, c_int, c_int) -> c_int),
    )
}

macro_rules! maps {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            addr: *mut c_void,
            len: size_t,
            protection: c_int,
            flags: c_int,
            fd: c_int,
            offset: off_t,
        ) -> *mut c_void {
            let ours = fd >= 0 && flags & libc::MAP_ANONYMOUS == 0 && process::in_use();
            if ours && !process::may_map(fd, len, protection, flags, offset as usize) {
                fail(libc::EINVAL);
                return libc::MAP_FAILED;
            }
            let p = real!($name(addr, len, protection, flags, fd, offset):
                fn(*mut c_void, size_t, c_int, c_int, c_int, off_t) -> *mut c_void);
            if ours && p != libc::MAP_FAILED && flags & libc::MAP_SHARED != 0 {
                process::mapped(fd, p as usize, len, offset as usize);
            }
            p
        }
    )*};
}
maps!(mmap mmap64);
