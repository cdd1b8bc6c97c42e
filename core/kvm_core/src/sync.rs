//! A mutual-exclusion lock for `no_std`: spins briefly, then gives the CPU away.
//!
//! Critical sections in the core are short (a register access, a table lookup) and never block, so
//! a waiter seldom gets past the spin. When the owner was preempted, spinning on a machine with few
//! CPUs would only keep it from finishing; so the home installs how to yield.
#![expect(unsafe_code, reason = "a lock hands out references to what it guards")]

use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

static YIELD: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
const SPINS: u32 = 64;

/// Installs what a thread calls when a lock stays taken, `sched_yield` for instance.
pub fn set_yield_hook(hook: fn()) {
    YIELD.store(hook as *mut (), Ordering::Release);
}

/// Gives the CPU to another thread, as far as the home can.
pub fn yield_now() {
    let hook = YIELD.load(Ordering::Acquire);
    if hook.is_null() {
        spin_loop();
    } else {
        // SAFETY: only `set_yield_hook` stores non-null values, and it stores a `fn()`.
        let hook = unsafe { core::mem::transmute::<*mut (), fn()>(hook) };
        hook();
    }
}

/// A mutex. Not recursive. See docs/locking.md for the order in which the core takes its locks.
#[derive(Default)]
pub struct Mutex<T> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: access to the value is exclusive while the lock is held.
unsafe impl<T: Send> Send for Mutex<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Mutex<T> {}

/// The right to use the value; gives it back when dropped.
pub struct MutexGuard<'a, T> {
    lock: &'a Mutex<T>,
    // A guard must be released by the thread that took it.
    _not_send: core::marker::PhantomData<*const ()>,
}

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Mutex {
            locked: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let mut spins = 0;
        while self
            .locked
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            spins += 1;
            if spins < SPINS {
                spin_loop();
            } else {
                yield_now();
            }
        }
        MutexGuard {
            lock: self,
            _not_send: core::marker::PhantomData,
        }
    }

    /// The value, given exclusive access to the lock itself.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard exists, so this thread holds the lock.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; the guard is borrowed mutably.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.locked.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::sync::Arc;

    #[test]
    fn excludes() {
        set_yield_hook(std::thread::yield_now);
        let counter = Arc::new(Mutex::new(0u64));
        let threads: std::vec::Vec<_> = (0..4)
            .map(|_| {
                let counter = counter.clone();
                std::thread::spawn(move || {
                    for _ in 0..20_000 {
                        *counter.lock() += 1;
                    }
                })
            })
            .collect();
        for t in threads {
            t.join().unwrap();
        }
        assert_eq!(*counter.lock(), 80_000);
    }
}
