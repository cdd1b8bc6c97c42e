//! The files of `/sys/module/kvm*/parameters`.

use crate::real::fail;
use home_user::process::parameters::{PREFIX, value};
use libc::{c_char, c_int};

/// The longest path that is looked at.
const LONGEST: usize = 80;

/// What follows [`PREFIX`] in `path`, if that is how it begins.
fn rest(path: *const c_char, buffer: &mut [u8; LONGEST]) -> Option<&str> {
    if path.is_null() {
        return None;
    }
    let mut len = 0;
    loop {
        // SAFETY: a path is a string that ends with a zero byte; it has not ended before.
        let byte = unsafe { *path.add(len) } as u8;
        if PREFIX.get(len).is_some_and(|&wanted| wanted != byte) {
            return None;
        }
        if byte == 0 {
            break;
        }
        *buffer.get_mut(len)? = byte;
        len += 1;
    }
    std::str::from_utf8(buffer.get(PREFIX.len()..len)?).ok()
}

/// Opens such a file. `None`: `path` is another.
pub fn open(path: *const c_char, flags: c_int) -> Option<c_int> {
    let mut buffer = [0; LONGEST];
    let rest = rest(path, &mut buffer)?;
    if !matches!(rest.as_bytes().first(), Some(b'/' | b'_')) {
        return None;
    }
    let Some(value) = value(rest) else {
        return Some(fail(libc::ENOENT));
    };
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        return Some(fail(libc::EACCES));
    }
    let mut text = value.to_owned();
    text.push('\n');
    let on_exec = match flags & libc::O_CLOEXEC {
        0 => 0,
        _ => libc::MFD_CLOEXEC,
    };
    // SAFETY: makes a descriptor and writes a buffer that outlives the call to its beginning.
    unsafe {
        let fd = libc::memfd_create(c"parameter".as_ptr(), on_exec);
        if fd >= 0 {
            libc::pwrite(fd, text.as_ptr().cast(), text.len(), 0);
        }
        Some(fd)
    }
}
