//! Guest memory as the host sees it.
#![expect(unsafe_code, reason = "guest memory is a mapping")]

use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;

/// A memfd, mapped.
pub struct Memory {
    base: *mut u8,
    size: u64,
    _file: OwnedFd,
}

// SAFETY: plain memory, accessed with volatile operations only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory of `size` bytes.
    pub fn new(size: u64) -> Self {
        // SAFETY: a new mapping of a new file, whose descriptor stays open: the engine looks for it.
        let (p, fd) = unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0 && libc::ftruncate(fd, size as i64) == 0);
            let p = libc::mmap(
                ptr::null_mut(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd,
                0,
            );
            (p, OwnedFd::from_raw_fd(fd))
        };
        assert_ne!(p, libc::MAP_FAILED, "no memory for a guest");
        Memory {
            base: p.cast(),
            size,
            _file: fd,
        }
    }

    /// Where it is in this process.
    pub fn hva(&self) -> u64 {
        self.base as u64
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes bytes.
    pub fn write(&self, at: u64, data: &[u8]) {
        assert!(at + data.len() as u64 <= self.size);
        for (i, b) in data.iter().enumerate() {
            // SAFETY: in bounds.
            unsafe { self.base.add(at as usize + i).write_volatile(*b) };
        }
    }

    /// Reads bytes.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        assert!(at + len as u64 <= self.size);
        (0..len)
            // SAFETY: in bounds.
            .map(|i| unsafe { self.base.add(at as usize + i).read_volatile() })
            .collect()
    }

    /// Writes a quadword, in one piece.
    pub fn set_u64(&self, at: u64, value: u64) {
        assert!(at + 8 <= self.size && at.is_multiple_of(8));
        // SAFETY: in bounds and aligned.
        unsafe {
            self.base
                .add(at as usize)
                .cast::<u64>()
                .write_volatile(value)
        };
    }

    /// Writes a doubleword.
    pub fn set_u32(&self, at: u64, value: u32) {
        self.write(at, &value.to_le_bytes());
    }

    /// Reads a quadword, in one piece.
    pub fn u64(&self, at: u64) -> u64 {
        assert!(at + 8 <= self.size && at.is_multiple_of(8));
        // SAFETY: in bounds and aligned.
        unsafe { self.base.add(at as usize).cast::<u64>().read_volatile() }
    }

    /// Reads a doubleword.
    pub fn u32(&self, at: u64) -> u32 {
        let b = self.read(at, 4);
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: whoever uses it holds it alive (see `Machine`).
        unsafe { libc::munmap(self.base.cast(), self.size as usize) };
    }
}
