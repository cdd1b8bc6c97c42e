//! The files that guest RAM is mapped from, found through `/proc/self`: user space says only where it has mapped
//! them.
#![expect(
    unsafe_code,
    reason = "fstat and fcntl on descriptors that are looked through"
)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use x86emu::env::RamRange;

/// Guest RAM in a file.
pub struct File {
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Offset of the first byte in the file.
    pub offset: u64,
    fd: OwnedFd,
}

impl File {
    /// The descriptor.
    pub fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

/// What was found so far.
#[derive(Default)]
pub struct Files {
    known: Vec<Result<File, RamRange>>,
}

/// Memslots that are remembered.
const MAX_FILES: usize = 16;

impl Files {
    /// The file of some RAM; `None` if it is no shared mapping of one.
    pub fn of(&mut self, ram: &RamRange) -> Option<&File> {
        let same = |k: &Result<File, RamRange>| match k {
            Ok(f) => f.gpa == ram.gpa,
            Err(r) => r.gpa == ram.gpa,
        };
        let n = match self.known.iter().position(same) {
            Some(n) => n,
            None if self.known.len() < MAX_FILES => {
                self.known.push(find(ram).ok_or(*ram));
                self.known.len() - 1
            }
            None => return None,
        };
        self.known[n].as_ref().ok()
    }
}

/// Looks for the mapping at the start of `ram`, and a descriptor of its file.
fn find(ram: &RamRange) -> Option<File> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let (size, offset, device, inode) = maps.lines().find_map(|line| mapping(line, ram.host))?;
    let mut found = None;
    for entry in std::fs::read_dir("/proc/self/fd").ok()?.flatten() {
        let Some(n) = entry
            .file_name()
            .to_str()
            .and_then(|s| s.parse::<i32>().ok())
        else {
            continue;
        };
        // Faults of guest RAM may go to user space, which must see all of them.
        if std::fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("anon_inode:[userfaultfd]"))
        {
            return None;
        }
        // SAFETY: fstat writes to its buffer only, and fails for a descriptor that is gone.
        unsafe {
            let mut st: libc::stat = std::mem::zeroed();
            let same = found.is_none()
                && libc::fstat(n, &mut st) == 0
                && st.st_ino == inode
                && (libc::major(st.st_dev), libc::minor(st.st_dev)) == device
                && libc::fcntl(n, libc::F_GETFL) & libc::O_ACCMODE == libc::O_RDWR;
            if !same {
                continue;
            }
            let fd = libc::fcntl(n, libc::F_DUPFD_CLOEXEC, 3);
            if fd >= 0 {
                found = Some(File {
                    gpa: ram.gpa,
                    size: size.min(ram.size),
                    offset,
                    fd: OwnedFd::from_raw_fd(fd),
                });
            }
        }
    }
    found
}

/// Size, file offset, device and inode of the shared, writable mapping that this line is about, from `host` on.
fn mapping(line: &str, host: u64) -> Option<(u64, u64, (u32, u32), u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (start, end) = (hex(start)?, hex(end)?);
    if !(start..end).contains(&host)
        || !fields.next()?.starts_with("rw-s") && !line.contains(" rwxs ")
    {
        return None;
    }
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = (hex(major)? as u32, hex(minor)? as u32);
    let inode = fields.next()?.parse().ok().filter(|&n| n != 0)?;
    Some((end - host, offset + (host - start), device, inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let line = "7f0000000000-7f0000200000 rw-s 00100000 00:01 4242    /memfd:ram (deleted)";
        let found = Some((0x1ff000, 0x101000, (0, 1), 4242));
        assert_eq!(mapping(line, 0x7f00_0000_1000), found);
        assert_eq!(mapping(line, 0x7f00_0020_0000), None);
        assert_eq!(
            mapping(&line.replace("rw-s", "rw-p"), 0x7f00_0000_1000),
            None
        );
        assert_eq!(mapping(&line.replace("4242", "0"), 0x7f00_0000_1000), None);
        assert_eq!(mapping("", 0), None);
    }
}
