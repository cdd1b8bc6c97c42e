//! The memfds behind descriptors.
#![expect(unsafe_code, reason = "memfd_create, fstat, seals")]

use crate::events::{last_errno, owned};
use kvm_abi::Errno;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Names of the memfds; `/proc/self/fd` shows them.
pub const SYSTEM: &CStr = c"anykvm";
pub const VM: &CStr = c"anykvm-vm";
pub const VCPU: &CStr = c"anykvm-vcpu";
pub const VFIO: &CStr = c"anykvm-vfio";
pub const STATS: &CStr = c"anykvm-stats";

/// An inode, for as long as it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    dev: u64,
    ino: u64,
}

/// The inode behind a descriptor, if there is one.
pub fn id_of(fd: RawFd) -> Option<FileId> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the system call itself, past any stand-in for fstat; it fills the structure.
    let stat = unsafe {
        if libc::syscall(libc::SYS_fstat, fd, stat.as_mut_ptr()) != 0 {
            return None;
        }
        stat.assume_init()
    };
    Some(FileId {
        dev: stat.st_dev,
        ino: stat.st_ino,
    })
}

/// A memfd and the descriptor of it that the program gets. They are two openings of one file, so that the
/// kernel says when the program's is closed for good.
pub struct KvmFile {
    /// Ours.
    pub own: OwnedFd,
    /// The program's.
    pub given: OwnedFd,
    /// Whether the two are separate openings.
    pub watchable: bool,
    pub id: FileId,
}

/// A memfd of `size` bytes that nobody can resize.
///
/// # Errors
/// EMFILE, ENFILE, ENOMEM.
pub fn sealed(name: &CStr, size: usize) -> Result<OwnedFd, Errno> {
    // SAFETY: makes a new descriptor.
    let own = owned(unsafe {
        libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    })?;
    let fd = own.as_raw_fd();
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: plain calls on a descriptor that is ours.
    unsafe {
        if libc::ftruncate(fd, size as libc::off_t) != 0
            || libc::fcntl(fd, libc::F_ADD_SEALS, seals) != 0
        {
            return Err(last_errno());
        }
    }
    Ok(own)
}

/// Another opening of a file of ours.
///
/// # Errors
/// ENOENT without /proc; EMFILE, ENFILE.
pub fn reopen(file: &OwnedFd, access: i32) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
    // SAFETY: the path ends with a zero byte.
    owned(unsafe {
        libc::syscall(
            libc::SYS_openat,
            libc::AT_FDCWD,
            path.as_ptr(),
            access | libc::O_CLOEXEC,
        )
    } as RawFd)
}

impl KvmFile {
    /// A file of `size` bytes that nobody can resize.
    ///
    /// # Errors
    /// EMFILE, ENFILE, ENOMEM.
    pub fn new(name: &CStr, size: usize) -> Result<Self, Errno> {
        let own = sealed(name, size)?;
        let id = id_of(own.as_raw_fd()).ok_or(Errno::ENOMEM)?;
        let (given, watchable) = match reopen(&own, libc::O_RDWR) {
            Ok(given) => (given, true),
            // No /proc: then nobody will say when the descriptor is closed.
            Err(Errno::ENOENT) => (own.try_clone().map_err(|_| Errno(libc::EMFILE))?, false),
            Err(e) => return Err(e),
        };
        Ok(KvmFile {
            own,
            given,
            watchable,
            id,
        })
    }
}

/// Lets a descriptor survive execve.
pub fn keep_on_exec(fd: &OwnedFd) {
    // SAFETY: changes a flag of a descriptor that is ours.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
}

/// What identifies the VFIO group or device behind a descriptor.
///
/// # Errors
/// EBADF; EINVAL when it is none of VFIO's.
pub fn vfio(fd: RawFd) -> Result<u128, Errno> {
    let id = id_of(fd).ok_or(Errno::EBADF)?;
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|_| Errno::EINVAL)?;
    if !target.starts_with("/dev/vfio") {
        return Err(Errno::EINVAL);
    }
    Ok(u128::from(id.dev) << 64 | u128::from(id.ino))
}

/// What kind of memfd a descriptor is by its name, for those that this process did not make.
pub fn named(fd: RawFd) -> Option<&'static CStr> {
    let target = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    let name = target.to_str()?.strip_prefix("/memfd:")?;
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    [SYSTEM, VM, VCPU, VFIO]
        .into_iter()
        .find(|n| n.to_bytes() == name.as_bytes())
}
