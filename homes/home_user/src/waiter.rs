//! Where a halted vCPU sleeps: a futex.
#![expect(unsafe_code, reason = "the futex system call has no safe wrapper")]

use kvm_core::host::{Waiter, Wake};
use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

const IDLE: u32 = 0;
/// Somebody has called `wake` since the last wait ended.
const WOKEN: u32 = 1;
const SLEEPING: u32 = 2;

/// A futex word.
#[derive(Default)]
pub struct Futex(AtomicU32);

/// `CLOCK_MONOTONIC` nanoseconds as a timespec.
pub fn timespec(ns: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    }
}

/// Lets this thread's sleeps end on time instead of up to 50 µs late: they end with the guest's timer
/// interrupts.
fn wake_on_time() {
    thread_local! {
        static DONE: Cell<bool> = const { Cell::new(false) };
    }
    if !DONE.replace(true) {
        // SAFETY: changes a number of the calling thread's.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    }
}

impl Waiter for Futex {
    fn wait(&self, deadline_ns: Option<u64>) -> Wake {
        if self
            .0
            .compare_exchange(IDLE, SLEEPING, Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            self.0.store(IDLE, Ordering::Release);
            return Wake::Woken;
        }
        if deadline_ns.is_some() {
            wake_on_time();
        }
        let timeout = deadline_ns.map(timespec);
        let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
        loop {
            // SAFETY: the word and the timespec outlive the call. With the BITSET operation the
            // timeout is absolute, in CLOCK_MONOTONIC.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.0.as_ptr(),
                    libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
                    SLEEPING,
                    timeout,
                    ptr::null::<u32>(),
                    libc::FUTEX_BITSET_MATCH_ANY,
                )
            };
            let error = if result == 0 {
                0
            } else {
                std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
            };
            let wake = match error {
                libc::ETIMEDOUT => Wake::Deadline,
                libc::EINTR => Wake::Signal,
                _ => Wake::Woken,
            };
            if wake == Wake::Woken && self.0.load(Ordering::Acquire) == SLEEPING {
                continue; // spurious
            }
            if self.0.swap(IDLE, Ordering::AcqRel) == WOKEN {
                return Wake::Woken;
            }
            return wake;
        }
    }

    fn wake(&self) {
        if self.0.swap(WOKEN, Ordering::AcqRel) == SLEEPING {
            // SAFETY: waking the waiters of a word that is alive has no other effect.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.0.as_ptr(),
                    libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                    1,
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::monotonic_ns;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn wake_before_wait_is_remembered_once() {
        let f = Futex::default();
        f.wake();
        f.wake();
        assert_eq!(f.wait(None), Wake::Woken);
        let start = monotonic_ns();
        assert_eq!(f.wait(Some(start + 5_000_000)), Wake::Deadline);
        assert!(monotonic_ns() >= start + 5_000_000);
    }

    #[test]
    fn wakes_a_sleeper() {
        let f = Arc::new(Futex::default());
        let other = f.clone();
        let t = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            other.wake();
        });
        assert_eq!(f.wait(None), Wake::Woken);
        t.join().unwrap();
    }
}
