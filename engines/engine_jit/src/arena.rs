//! Memory for emitted code: one memfd mapped twice, writable here and executable there, reserved up
//! front, so that nothing is ever writable and executable at one address and no mprotect is needed.
#![expect(unsafe_code, reason = "maps executable memory and writes code into it")]

use kvm_core::engine::EngineError;

#[repr(C, packed)]
struct Packed<T>(T);

/// A region of code memory, handed out from low to high addresses.
#[derive(Debug)]
pub struct Arena {
    rw: *mut u8,
    rx: *mut u8,
    size: usize,
    used: usize,
}

// SAFETY: the mappings belong to the arena alone; access to the writable one needs `&mut`.
unsafe impl Send for Arena {}
// SAFETY: shared references only read addresses and sizes.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `size` bytes (page multiple). Memory is committed as it is used.
    pub fn new(size: usize) -> Result<Self, EngineError> {
        if crate::perf::map_wanted() {
            return Self::anonymous(size);
        }
        // SAFETY: plain system calls; results are checked. The name is a C string literal.
        unsafe {
            let fd = libc::memfd_create(c"anykvm-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(EngineError::OutOfMemory);
            }
            let map = |prot| {
                libc::mmap(
                    std::ptr::null_mut(),
                    size,
                    prot,
                    libc::MAP_SHARED | libc::MAP_NORESERVE,
                    fd,
                    0,
                )
            };
            let ok = libc::ftruncate(fd, size as libc::off_t) == 0;
            let rw = if ok {
                map(libc::PROT_READ | libc::PROT_WRITE)
            } else {
                libc::MAP_FAILED
            };
            let rx = if ok {
                map(libc::PROT_READ | libc::PROT_EXEC)
            } else {
                libc::MAP_FAILED
            };
            libc::close(fd);
            Self::of(rw, rx, size)
        }
    }

    /// The same without a file: `perf` looks for a map of its own only for such memory.
    fn anonymous(size: usize) -> Result<Self, EngineError> {
        // SAFETY: plain system calls; results are checked. An old size of 0 maps the pages of a shared
        // mapping a second time, mremap(2).
        unsafe {
            let rw = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            let mut rx = libc::MAP_FAILED;
            if rw != libc::MAP_FAILED {
                rx = libc::mremap(rw, 0, size, libc::MREMAP_MAYMOVE);
            }
            if rx != libc::MAP_FAILED
                && libc::mprotect(rx, size, libc::PROT_READ | libc::PROT_EXEC) != 0
            {
                libc::munmap(rx, size);
                rx = libc::MAP_FAILED;
            }
            Self::of(rw, rx, size)
        }
    }

    /// Two mappings of the same memory, or what failed.
    fn of(rw: *mut libc::c_void, rx: *mut libc::c_void, size: usize) -> Result<Self, EngineError> {
        let arena = Arena {
            rw: rw.cast(),
            rx: rx.cast(),
            size,
            used: 0,
        };
        if rw == libc::MAP_FAILED || rx == libc::MAP_FAILED {
            return Err(EngineError::Unsupported(
                "the system allows no executable memory (memfd, PROT_EXEC), which the software engine needs",
            ));
        }
        Ok(arena)
    }

    /// Address at which the next allocation will execute.
    pub fn next(&self) -> u64 {
        self.rx as u64 + self.used as u64
    }

    /// First executable address.
    pub fn start(&self) -> u64 {
        self.rx as u64
    }

    /// The code so far, for a disassembler.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `used <= size`; the bytes are initialized, and change only by patches under `&mut`.
        unsafe { std::slice::from_raw_parts(self.rw, self.used) }
    }

    /// Bytes handed out.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Bytes left.
    pub fn left(&self) -> usize {
        self.size - self.used
    }

    /// Appends code, keeping the next allocation 8-byte aligned. `None` when it is full.
    pub fn push(&mut self, code: &[u8]) -> Option<u64> {
        if code.len() + 16 > self.left() {
            return None;
        }
        let at = self.next();
        // SAFETY: `used + len` is within the writable mapping, checked above.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.rw.add(self.used), code.len());
        }
        self.used = (self.used + code.len() + 7) & !7;
        Some(at)
    }

    /// Forgets everything after `used` bytes. No code there may be running.
    pub fn truncate(&mut self, used: usize) {
        self.used = used.min(self.used);
    }

    /// Overwrites code at executable address `at`. One, two, four and eight bytes that lie in one cache line
    /// are written in one store; other changes need every vCPU out of this code.
    pub fn patch(&mut self, at: u64, bytes: &[u8]) {
        let Some(pos) = at.checked_sub(self.rx as u64).map(|p| p as usize) else {
            return;
        };
        if pos
            .checked_add(bytes.len())
            .is_none_or(|end| end > self.used)
        {
            return;
        }
        // SAFETY: `pos + len <= used <= size`. A store of up to eight bytes within a cache line is one access
        // on x86, aligned or not.
        unsafe {
            let p = self.rw.add(pos);
            match *bytes {
                [a] => p.write_volatile(a),
                [a, b] => p
                    .cast::<Packed<u16>>()
                    .write_volatile(Packed(u16::from_le_bytes([a, b]))),
                [a, b, c, d] => p
                    .cast::<Packed<u32>>()
                    .write_volatile(Packed(u32::from_le_bytes([a, b, c, d]))),
                [a, b, c, d, e, f, g, h] => p
                    .cast::<Packed<u64>>()
                    .write_volatile(Packed(u64::from_le_bytes([a, b, c, d, e, f, g, h]))),
                _ => std::ptr::copy_nonoverlapping(bytes.as_ptr(), p, bytes.len()),
            }
        }
    }

    /// Overwrites up to eight bytes that lie in one aligned 8-byte word, in one store.
    pub fn patch_word(&mut self, at: u64, bytes: &[u8]) {
        let Some(pos) = at.checked_sub(self.rx as u64).map(|p| p as usize) else {
            return;
        };
        let word = pos & !7;
        if pos - word + bytes.len() > 8 || word + 8 > self.used {
            return;
        }
        // SAFETY: `word + 8 <= used <= size`, and the word is aligned.
        unsafe {
            let p = self.rw.add(word).cast::<u64>();
            let mut v = p.read().to_le_bytes();
            v[pos - word..][..bytes.len()].copy_from_slice(bytes);
            p.write_volatile(u64::from_le_bytes(v));
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `new` with this size and are used no more.
        unsafe {
            libc::munmap(self.rw.cast(), self.size);
            libc::munmap(self.rx.cast(), self.size);
        }
    }
}
