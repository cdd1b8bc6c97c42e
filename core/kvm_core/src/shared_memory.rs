//! Memory that the core shares with user space: rings that one side fills and the other empties, and
//! counters.
//!
//! User space may write anything at any time. So a value is read once, checked, and what was read is used.
#![expect(
    unsafe_code,
    reason = "the memory is shared with user space, which may write at any time"
)]

use crate::sync::Mutex;
use alloc::sync::Arc;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use kvm_abi::Errno;

/// Memory of the home's that user space maps, too.
///
/// # Safety
/// [`Self::base`] always gives the same page-aligned address, and [`Self::size`] bytes there stay mapped,
/// readable and writable, as long as the object exists; nobody borrows them.
pub unsafe trait SharedMemory: Send + Sync {
    /// Where it starts.
    fn base(&self) -> NonNull<u8>;
    /// Bytes.
    fn size(&self) -> usize;
}

/// Shared memory, accessed field by field.
pub(crate) struct Window {
    memory: Arc<dyn SharedMemory>,
    size: usize,
}

impl Window {
    /// The first `size` bytes of `memory`.
    ///
    /// # Errors
    /// EINVAL when there are not that many.
    pub fn new(memory: Arc<dyn SharedMemory>, size: usize) -> Result<Self, Errno> {
        if memory.size() < size || !memory.base().addr().get().is_multiple_of(4096) {
            return Err(Errno::EINVAL);
        }
        Ok(Window { memory, size })
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.size),
            "shared memory accessed out of bounds"
        );
        // SAFETY: within the memory, just checked.
        unsafe { self.memory.base().as_ptr().add(offset) }
    }

    fn atomic(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "misaligned field");
        // SAFETY: in bounds by `at`, aligned because the base is, mapped as long as `self`; user space's
        // accesses are outside of the language's memory model, as those of another process.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// Reads a field that says what else there is to read.
    pub fn load(&self, offset: usize) -> u32 {
        self.atomic(offset).load(Ordering::Acquire)
    }

    /// Writes a field that says what else there is to read.
    pub fn store(&self, offset: usize, value: u32) {
        self.atomic(offset).store(value, Ordering::Release);
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
}

/// Counters that may come to lie in shared memory.
pub(crate) struct Counters<const N: usize> {
    own: [AtomicU64; N],
    /// Where they are instead; in `memory` then.
    shared: AtomicPtr<AtomicU64>,
    memory: Mutex<Option<Arc<dyn SharedMemory>>>,
}

impl<const N: usize> Default for Counters<N> {
    fn default() -> Self {
        Counters {
            own: [const { AtomicU64::new(0) }; N],
            shared: AtomicPtr::new(core::ptr::null_mut()),
            memory: Mutex::new(None),
        }
    }
}

impl<const N: usize> Counters<N> {
    /// A counter.
    pub fn get(&self, index: usize) -> &AtomicU64 {
        let own = &self.own[index];
        let shared = self.shared.load(Ordering::Acquire);
        if shared.is_null() {
            return own;
        }
        // SAFETY: `share` has checked that N counters are there; `memory` is never replaced.
        unsafe { &*shared.add(index) }
    }

    /// Moves the counters to byte `offset` of `memory`, for good. What is counted meanwhile by a load and a
    /// store may get lost.
    ///
    /// # Errors
    /// EEXIST when they are in shared memory already, EINVAL when that is too small or misaligned.
    pub fn share(&self, memory: Arc<dyn SharedMemory>, offset: usize) -> Result<(), Errno> {
        let mut place = self.memory.lock();
        if place.is_some() {
            return Err(Errno::EEXIST);
        }
        let window = Window::new(memory, offset.saturating_add(N * 8))?;
        if !offset.is_multiple_of(8) {
            return Err(Errno::EINVAL);
        }
        let at = window.at(offset, N * 8).cast::<AtomicU64>();
        *place = Some(window.memory);
        self.shared.store(at, Ordering::Release);
        for (i, own) in self.own.iter().enumerate() {
            let counted = own.swap(0, Ordering::AcqRel);
            self.get(i).fetch_add(counted, Ordering::AcqRel);
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use alloc::boxed::Box;
    use core::cell::UnsafeCell;

    #[repr(align(4096))]
    #[expect(dead_code, reason = "reached through raw pointers only")]
    struct Page(UnsafeCell<[u8; 4096]>);

    /// Shared memory for tests.
    pub struct Pages(Box<[Page]>);

    // SAFETY: accessed through raw pointers by volatile and atomic accesses only.
    unsafe impl Send for Pages {}
    // SAFETY: as above.
    unsafe impl Sync for Pages {}

    // SAFETY: a boxed slice of aligned pages stays where it is.
    unsafe impl SharedMemory for Pages {
        fn base(&self) -> NonNull<u8> {
            NonNull::from(&*self.0).cast()
        }
        fn size(&self) -> usize {
            self.0.len() * 4096
        }
    }

    impl Pages {
        pub fn new(pages: usize) -> Arc<Self> {
            let page = || Page(UnsafeCell::new([0; 4096]));
            Arc::new(Pages((0..pages).map(|_| page()).collect()))
        }

        /// User space's view.
        pub fn window(self: &Arc<Self>) -> Window {
            Window::new(self.clone(), self.size()).unwrap()
        }
    }

    #[test]
    fn counters_move_once() {
        let counters = Counters::<3>::default();
        counters.get(2).store(7, Ordering::Relaxed);
        let pages = Pages::new(1);
        assert_eq!(counters.share(pages.clone(), 4080), Err(Errno::EINVAL));
        assert_eq!(counters.share(pages.clone(), 4), Err(Errno::EINVAL));
        counters.share(pages.clone(), 4072).unwrap();
        assert_eq!(counters.share(pages.clone(), 0), Err(Errno::EEXIST));
        assert_eq!(pages.window().load(4088), 7);
        counters.get(2).fetch_add(1, Ordering::Relaxed);
        assert_eq!(pages.window().load(4088), 8);
        drop(pages);
        assert_eq!(counters.get(2).load(Ordering::Relaxed), 8);
    }

    #[test]
    fn too_small_is_refused() {
        assert_eq!(
            Window::new(Pages::new(1), 4097).map(|_| ()),
            Err(Errno::EINVAL)
        );
        assert!(Window::new(Pages::new(2), 4097).is_ok());
    }

    #[test]
    #[should_panic(expected = "out of bounds")]
    fn bounds() {
        Pages::new(1).window().load(4096);
    }
}
