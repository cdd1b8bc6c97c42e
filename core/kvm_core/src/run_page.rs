//! The `kvm_run` mapping, shared with user space.
#![expect(
    unsafe_code,
    reason = "the mapping is shared with user space, which may write at any time"
)]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, Ordering};
use kvm_abi::run;

/// A vCPU's `kvm_run` mapping ([`run::MMAP_SIZE`] bytes), accessed field by field.
#[derive(Debug)]
pub struct RunPage(NonNull<u8>);

// SAFETY: the mapping outlives the page (see `new`), and all accesses are volatile or atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Wraps a mapping.
    ///
    /// # Safety
    /// `base` must be 4096-byte aligned and point at [`run::MMAP_SIZE`] readable and writable bytes
    /// that stay mapped as long as the value exists and that nobody borrows.
    pub unsafe fn new(base: NonNull<u8>) -> Self {
        RunPage(base)
    }

    /// Where the mapping starts.
    pub fn base(&self) -> NonNull<u8> {
        self.0
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset + len <= run::MMAP_SIZE,
            "kvm_run field out of bounds"
        );
        // SAFETY: within the mapping, just checked.
        unsafe { self.0.as_ptr().add(offset) }
    }

    /// Reads bytes.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        // SAFETY: `at` checks the bounds.
        unsafe { guestmem::copy_from_guest(self.at(offset, out.len()), out) }
    }

    /// Writes bytes.
    pub fn write(&self, offset: usize, data: &[u8]) {
        // SAFETY: `at` checks the bounds.
        unsafe { guestmem::copy_to_guest(self.at(offset, data.len()), data) }
    }

    /// Reads a byte.
    pub fn u8(&self, offset: usize) -> u8 {
        let mut b = [0];
        self.read(offset, &mut b);
        b[0]
    }

    /// Reads a 64-bit field.
    pub fn u64(&self, offset: usize) -> u64 {
        let mut b = [0; 8];
        self.read(offset, &mut b);
        u64::from_ne_bytes(b)
    }

    /// Writes a 32-bit field.
    pub fn set_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_ne_bytes());
    }

    /// Writes a 64-bit field.
    pub fn set_u64(&self, offset: usize, value: u64) {
        self.write(offset, &value.to_ne_bytes());
    }

    /// `kvm_run::immediate_exit`, which signal handlers set.
    pub fn immediate_exit(&self) -> bool {
        let p = self.at(run::IMMEDIATE_EXIT, 1);
        // SAFETY: in bounds, and a byte is always aligned.
        unsafe { AtomicU8::from_ptr(p) }.load(Ordering::Acquire) != 0
    }

    /// Sets `kvm_run::exit_reason`.
    pub fn set_reason(&self, reason: u32) {
        self.set_u32(run::EXIT_REASON, reason);
    }
}
