//! Ends runs that take too long: a guest that hangs is a failed test, not a hanging suite.
#![expect(unsafe_code, reason = "signals end runs of a real /dev/kvm")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

/// What to do with a vCPU that is late.
pub enum Kick {
    /// In process.
    User(home_user::Kicker),
    /// A thread in KVM_RUN.
    Thread(libc::pthread_t),
}

struct Entry {
    kick: Kick,
    deadline: Instant,
    done: Arc<AtomicBool>,
}

static ENTRIES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
static START: Once = Once::new();

/// A run that is watched until this is dropped.
pub struct Watch(Arc<AtomicBool>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
        // From here on nothing signals this thread any more.
        ENTRIES
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|e| !e.done.load(Ordering::Acquire));
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// Kicks from `after` now on.
pub fn watch(kick: Kick, after: Duration) -> Watch {
    START.call_once(|| {
        // SAFETY: a handler that does nothing; without SA_RESTART, KVM_RUN returns.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(libc::SIGUSR2, &action, std::ptr::null_mut());
        }
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(Duration::from_millis(50));
                let entries = ENTRIES.lock().unwrap_or_else(PoisonError::into_inner);
                for e in entries.iter().filter(|e| e.deadline < Instant::now()) {
                    match &e.kick {
                        Kick::User(kicker) => kicker.kick(),
                        Kick::Thread(thread) => {
                            // SAFETY: its thread removes the entry before it ends.
                            unsafe { libc::pthread_kill(*thread, libc::SIGUSR2) };
                        }
                    }
                }
            }
        });
    });
    let done = Arc::new(AtomicBool::new(false));
    ENTRIES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(Entry {
            kick,
            deadline: Instant::now() + after,
            done: done.clone(),
        });
    Watch(done)
}

/// A kick for the present thread.
pub fn this_thread() -> Kick {
    // SAFETY: no arguments.
    Kick::Thread(unsafe { libc::pthread_self() })
}
