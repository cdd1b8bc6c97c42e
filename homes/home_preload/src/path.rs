//! `/dev/kvm` for open, stat and access.

use crate::real::{fail, real};
use crate::{parameters, settings};
use home_user::process::{self, Kind};
use libc::{c_char, c_int, c_uint, c_void, mode_t};
use std::ffi::CStr;

/// KVM's device number: misc, 232.
const DEVICE: (u32, u32) = (10, 232);
/// What stat calls its inode: it need only be the same every time.
const INODE: u64 = 0x616e_796b;

fn is_kvm(path: *const c_char) -> bool {
    if path.is_null() {
        return false;
    }
    // SAFETY: a path is a string that ends with a zero byte, of at least as many bytes as are equal so far.
    unsafe {
        for (i, &byte) in c"/dev/kvm".to_bytes_with_nul().iter().enumerate() {
            if *path.add(i) as u8 != byte {
                return false;
            }
        }
    }
    true
}

/// Opens `/dev/kvm`.
fn open_kvm(flags: c_int) -> c_int {
    settings::apply();
    if flags & libc::O_DIRECTORY != 0 {
        return fail(libc::ENOTDIR);
    }
    if flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL {
        return fail(libc::EEXIST);
    }
    match process::open(flags & libc::O_CLOEXEC != 0) {
        Ok(fd) => fd,
        Err(e) => fail(e.0),
    }
}

macro_rules! opens {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
            if is_kvm(path) {
                return open_kvm(flags);
            }
            if let Some(fd) = parameters::open(path, flags) {
                return fd;
            }
            real!($name(path, flags, mode): fn(*const c_char, c_int, mode_t) -> c_int)
        }
    )*};
}
opens!(open open64);

macro_rules! opens_at {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            dir: c_int,
            path: *const c_char,
            flags: c_int,
            mode: mode_t,
        ) -> c_int {
            if is_kvm(path) {
                return open_kvm(flags);
            }
            if let Some(fd) = parameters::open(path, flags) {
                return fd;
            }
            real!($name(dir, path, flags, mode): fn(c_int, *const c_char, c_int, mode_t) -> c_int)
        }
    )*};
}
opens_at!(openat openat64);

// What a fortified program calls when it gives no mode.
macro_rules! fortified {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char, flags: c_int) -> c_int {
            if is_kvm(path) {
                return open_kvm(flags);
            }
            if let Some(fd) = parameters::open(path, flags) {
                return fd;
            }
            real!($name(path, flags): fn(*const c_char, c_int) -> c_int)
        }
    )*};
}
fortified!(__open_2 __open64_2);

macro_rules! fortified_at {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
            if is_kvm(path) {
                return open_kvm(flags);
            }
            if let Some(fd) = parameters::open(path, flags) {
                return fd;
            }
            real!($name(dir, path, flags): fn(c_int, *const c_char, c_int) -> c_int)
        }
    )*};
}
fortified_at!(__openat_2 __openat64_2);

/// access(2) for `/dev/kvm`: readable and writable, not executable.
fn access_kvm(mode: c_int) -> c_int {
    if mode & libc::X_OK != 0 {
        return fail(libc::EACCES);
    }
    0
}

macro_rules! accesses {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char, mode: c_int) -> c_int {
            if is_kvm(path) {
                return access_kvm(mode);
            }
            real!($name(path, mode): fn(*const c_char, c_int) -> c_int)
        }
    )*};
}
accesses!(access eaccess euidaccess);

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn faccessat(
    dir: c_int,
    path: *const c_char,
    mode: c_int,
    flags: c_int,
) -> c_int {
    if is_kvm(path) {
        return access_kvm(mode);
    }
    real!(faccessat(dir, path, mode, flags): fn(c_int, *const c_char, c_int, c_int) -> c_int)
}

/// Makes `stat` that of the device.
fn describe(stat: &mut libc::stat) {
    stat.st_ino = INODE;
    stat.st_nlink = 1;
    stat.st_mode = libc::S_IFCHR | 0o666;
    stat.st_uid = 0;
    stat.st_gid = 0;
    stat.st_rdev = libc::makedev(DEVICE.0, DEVICE.1);
    stat.st_size = 0;
    stat.st_blksize = 4096;
    stat.st_blocks = 0;
}

/// stat(2) for `/dev/kvm`: times and device are the directory's.
fn stat_kvm(out: *mut libc::stat) -> c_int {
    if out.is_null() {
        return fail(libc::EFAULT);
    }
    // SAFETY: the program's structure, which must be valid for stat. The system call, so as not to meet
    // ourselves.
    unsafe {
        let dev: &CStr = c"/dev";
        if libc::syscall(libc::SYS_stat, dev.as_ptr(), out) != 0 {
            if *libc::__errno_location() == libc::EFAULT {
                return -1;
            }
            out.write_bytes(0, 1);
        }
        describe(&mut *out);
    }
    0
}

// On x86-64 `struct stat` and `struct stat64` are one.
macro_rules! stats {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char, out: *mut libc::stat) -> c_int {
            if is_kvm(path) {
                return stat_kvm(out);
            }
            real!($name(path, out): fn(*const c_char, *mut libc::stat) -> c_int)
        }
    )*};
}
stats!(stat stat64 lstat lstat64);

// Of programs built for a C library before 2.33.
macro_rules! old_stats {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            version: c_int,
            path: *const c_char,
            out: *mut libc::stat,
        ) -> c_int {
            if is_kvm(path) {
                return stat_kvm(out);
            }
            real!($name(version, path, out): fn(c_int, *const c_char, *mut libc::stat) -> c_int)
        }
    )*};
}
old_stats!(__xstat __xstat64 __lxstat __lxstat64);

macro_rules! stats_at {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            dir: c_int,
            path: *const c_char,
            out: *mut libc::stat,
            flags: c_int,
        ) -> c_int {
            if is_kvm(path) {
                return stat_kvm(out);
            }
            let result =
                real!($name(dir, path, out, flags): fn(c_int, *const c_char, *mut libc::stat, c_int) -> c_int);
            if result == 0 && flags & libc::AT_EMPTY_PATH != 0 {
                correct(dir, out);
            }
            result
        }
    )*};
}
stats_at!(fstatat fstatat64);

macro_rules! fstats {
    ($($name:ident)*) => {$(
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(fd: c_int, out: *mut libc::stat) -> c_int {
            let result = real!($name(fd, out): fn(c_int, *mut libc::stat) -> c_int);
            if result == 0 {
                correct(fd, out);
            }
            result
        }
    )*};
}
fstats!(fstat fstat64);

/// After fstat of a descriptor: one of `/dev/kvm` is the device.
fn correct(fd: c_int, out: *mut libc::stat) {
    if process::in_use() && process::kind(fd) == Some(Kind::System) {
        // SAFETY: the C library has just filled the structure.
        describe(unsafe { &mut *out });
    }
}

/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn statx(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    out: *mut c_void,
) -> c_int {
    let kvm = is_kvm(path);
    let path = if kvm { c"/dev".as_ptr() } else { path };
    let result = real!(statx(dir, path, flags, mask, out): fn(c_int, *const c_char, c_int, c_uint, *mut c_void) -> c_int);
    let kvm = kvm
        || (result == 0
            && flags & libc::AT_EMPTY_PATH != 0
            && process::in_use()
            && process::kind(dir) == Some(Kind::System));
    if result == 0 && kvm {
        // SAFETY: the C library has just filled the structure.
        let out = unsafe { &mut *out.cast::<libc::statx>() };
        out.stx_nlink = 1;
        out.stx_uid = 0;
        out.stx_gid = 0;
        out.stx_mode = (libc::S_IFCHR | 0o666) as u16;
        out.stx_ino = INODE;
        out.stx_size = 0;
        out.stx_blocks = 0;
        out.stx_rdev_major = DEVICE.0;
        out.stx_rdev_minor = DEVICE.1;
    }
    result
}
