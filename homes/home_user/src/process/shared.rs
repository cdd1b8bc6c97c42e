//! Pages that a vCPU's mapping shows beside `kvm_run`: the VM's ring of coalesced writes, a dirty ring.
#![expect(unsafe_code, reason = "maps files")]

use super::files::KvmFile;
use crate::events::last_errno;
use kvm_abi::Errno;
use kvm_core::shared_memory::SharedMemory;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

/// A part of a memfd that cannot shrink, mapped by us.
pub struct SharedPages {
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: plain memory, not bound to a thread; it is accessed through raw pointers only.
unsafe impl Send for SharedPages {}
// SAFETY: as above.
unsafe impl Sync for SharedPages {}

// SAFETY: mapped by `map`, whole pages of a sealed file, until the value is dropped; nothing borrows them.
unsafe impl SharedMemory for SharedPages {
    fn base(&self) -> NonNull<u8> {
        self.base
    }
    fn size(&self) -> usize {
        self.size
    }
}

impl SharedPages {
    /// Maps `size` bytes of `file` from `offset` on; the file must be that long and sealed.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn map(file: &impl AsRawFd, offset: usize, size: usize) -> Result<Self, Errno> {
        let base = map_at(std::ptr::null_mut(), file.as_raw_fd(), offset, size, 0)?;
        Ok(SharedPages { base, size })
    }
}

impl Drop for SharedPages {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nothing uses it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
    }
}

fn map_at(
    at: *mut libc::c_void,
    fd: RawFd,
    offset: usize,
    size: usize,
    flags: i32,
) -> Result<NonNull<u8>, Errno> {
    // SAFETY: a new mapping, or in place of pages whose owner asked for this mapping. The system call
    // itself, past any stand-in for mmap.
    let p = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            at,
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | flags,
            fd,
            offset,
        )
    };
    NonNull::new(p as *mut u8)
        .filter(|_| p != -1)
        .ok_or_else(last_errno)
}

/// Whether a part of a vCPU's file may be mapped like that: of the dirty ring, KVM allows no private copies
/// and no code.
pub fn allows_mapping(len: usize, prot: i32, flags: i32, offset: usize) -> bool {
    let in_ring = offset.saturating_add(len) > kvm_abi::run::DIRTY_RING_OFFSET;
    let private = flags & libc::MAP_TYPE == libc::MAP_PRIVATE;
    !in_ring || (prot & libc::PROT_EXEC == 0 && !private)
}

/// The page of coalesced writes, one for all vCPUs of a VM.
pub struct CoalescedPage {
    file: OwnedFd,
}

/// Its size: a page.
const PAGE: usize = 4096;

impl CoalescedPage {
    /// The page, and our mapping of it.
    ///
    /// # Errors
    /// EMFILE, ENOMEM.
    pub fn new() -> Result<(Self, SharedPages), Errno> {
        let file = KvmFile::new(c"anykvm-coalesced", PAGE)?.own;
        let pages = SharedPages::map(&file, 0, PAGE)?;
        Ok((CoalescedPage { file }, pages))
    }

    /// Puts the page into a mapping that the program has just made of a vCPU's descriptor: `len` bytes at
    /// `addr`, from byte `offset` of the file on.
    pub fn show_in(&self, addr: usize, len: usize, offset: usize) {
        use kvm_abi::run::COALESCED_OFFSET;
        let Some(at) = COALESCED_OFFSET.checked_sub(offset) else {
            return;
        };
        if at.checked_add(PAGE).is_some_and(|end| end <= len) {
            let place = (addr + at) as *mut libc::c_void;
            if let Err(e) = map_at(place, self.file.as_raw_fd(), 0, PAGE, libc::MAP_FIXED) {
                log::error!("cannot show the ring of coalesced writes: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::allows_mapping;
    use kvm_abi::run::DIRTY_RING_OFFSET as RING;
    use libc::{MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE};

    #[test]
    fn the_dirty_ring_is_shared_data() {
        let rw = PROT_READ | PROT_WRITE;
        assert!(allows_mapping(4096, rw, MAP_SHARED, RING));
        assert!(!allows_mapping(4096, rw, MAP_PRIVATE, RING));
        assert!(!allows_mapping(
            4096,
            PROT_READ | PROT_EXEC,
            MAP_SHARED,
            RING
        ));
        assert!(!allows_mapping(RING + 4096, rw, MAP_PRIVATE, 0));
        assert!(allows_mapping(3 * 4096, rw, MAP_PRIVATE, 0));
    }
}
