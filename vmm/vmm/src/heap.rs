//! How the C library keeps memory that was freed.

/// Has allocations of 1 MiB and more go back to the system when they are freed, and grow without a copy. By default,
/// glibc learns from the first that is freed (a kernel, an initial file system) to keep all that are smaller.
pub fn return_large_allocations() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "calls mallopt")]
    // SAFETY: sets a parameter of the allocator; what it returns says no more than that it is unknown.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}
