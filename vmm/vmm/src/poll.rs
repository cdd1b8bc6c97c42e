//! `poll`, `read` and `write` on raw descriptors.
#![expect(unsafe_code, reason = "calls poll, read and write")]

use std::io;
use std::os::fd::RawFd;

/// Ready to read (or at its end, or broken).
pub(crate) const READ: i16 = libc::POLLIN;
/// Ready to write (or broken).
pub(crate) const WRITE: i16 = libc::POLLOUT;

/// Waits until one of `fds` is ready for its events, at most `timeout_ms`. Returns the events
/// of each, 0 for none; errors and hang-ups count as ready.
pub(crate) fn wait(fds: &[(RawFd, i16)], timeout_ms: Option<i32>) -> io::Result<Vec<i16>> {
    let mut set: Vec<libc::pollfd> = fds
        .iter()
        .map(|&(fd, events)| libc::pollfd {
            fd,
            events,
            revents: 0,
        })
        .collect();
    // SAFETY: `set` is a live array of as many entries as its length says.
    let n = unsafe {
        libc::poll(
            set.as_mut_ptr(),
            set.len() as libc::nfds_t,
            timeout_ms.unwrap_or(-1),
        )
    };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(set.iter().map(|p| p.revents).collect())
    }
}

/// `read(2)`.
pub(crate) fn read(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length are those of a live, writable slice.
    let n = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// `write(2)`.
pub(crate) fn write(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: pointer and length are those of a live slice.
    let n = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
