//! Signals: handlers, masks, and who sends them.

use crate::kvm::{errno, progress};
use libc::{c_int, pthread_t, siginfo_t, sigset_t};
use std::mem::zeroed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A handler with SA_SIGINFO.
pub type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut libc::c_void);

/// Installs a handler.
pub fn handle(signal: c_int, handler: Handler, flags: c_int, mask: &[c_int]) {
    set_action(signal, handler as usize, flags | libc::SA_SIGINFO, mask);
}

/// sigaction(2) with a handler, SIG_IGN or SIG_DFL.
pub fn set_action(signal: c_int, handler: usize, flags: c_int, mask: &[c_int]) {
    // SAFETY: the structure is whole and outlives the call.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        action.sa_mask = set_of(mask);
        let result = libc::sigaction(signal, &action, std::ptr::null_mut());
        assert_eq!(result, 0, "sigaction: error {}", errno());
    }
}

/// The present action.
pub fn action_of(signal: c_int) -> libc::sigaction {
    // SAFETY: the structure outlives the call.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        let result = libc::sigaction(signal, std::ptr::null(), &mut action);
        assert_eq!(result, 0, "sigaction: error {}", errno());
        action
    }
}

/// A set of signals.
pub fn set_of(signals: &[c_int]) -> sigset_t {
    // SAFETY: the set is initialised first.
    unsafe {
        let mut set = zeroed();
        libc::sigemptyset(&mut set);
        for &signal in signals {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

/// Blocks, unblocks or sets.
pub fn mask(how: c_int, signals: &[c_int]) {
    // SAFETY: the set outlives the call.
    unsafe { libc::pthread_sigmask(how, &set_of(signals), std::ptr::null_mut()) };
}

/// Whether a signal is blocked on this thread.
pub fn blocked(signal: c_int) -> bool {
    // SAFETY: the set outlives the calls.
    unsafe {
        let mut set = zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set);
        libc::sigismember(&set, signal) == 1
    }
}

/// Whether a signal is pending.
pub fn pending(signal: c_int) -> bool {
    // SAFETY: the set outlives the calls.
    unsafe {
        let mut set = zeroed();
        libc::sigpending(&mut set);
        libc::sigismember(&set, signal) == 1
    }
}

/// Takes a pending signal, waiting for it up to a second.
pub fn take(signal: c_int) -> Option<siginfo_t> {
    let second = libc::timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    // SAFETY: everything outlives the call.
    unsafe {
        let mut info = zeroed();
        (libc::sigtimedwait(&set_of(&[signal]), &mut info, &second) == signal).then_some(info)
    }
}

/// A thread that can be sent signals.
#[derive(Clone, Copy)]
pub struct Target(pthread_t);

// SAFETY: a number.
unsafe impl Send for Target {}

impl Target {
    /// This thread.
    pub fn me() -> Self {
        // SAFETY: has no preconditions.
        Target(unsafe { libc::pthread_self() })
    }

    /// pthread_kill.
    pub fn send(self, signal: c_int) {
        // SAFETY: the case keeps the thread alive.
        unsafe { libc::pthread_kill(self.0, signal) };
    }

    /// pthread_sigqueue.
    pub fn queue(self, signal: c_int, value: usize) {
        unsafe extern "C" {
            fn pthread_sigqueue(thread: pthread_t, signal: c_int, value: libc::sigval) -> c_int;
        }
        let value = libc::sigval {
            sival_ptr: value as *mut _,
        };
        // SAFETY: the case keeps the thread alive.
        unsafe { pthread_sigqueue(self.0, signal, value) };
    }

    /// Sends a signal from another thread, a while after the guest runs: one that counts is seen to, any other is
    /// given time.
    pub fn send_later(self, signal: c_int, after_ms: u64) -> JoinHandle<()> {
        let before = progress();
        std::thread::spawn(move || {
            let start = Instant::now();
            while progress() == before && start.elapsed() < Duration::from_millis(300) {
                std::thread::sleep(Duration::from_micros(100));
            }
            std::thread::sleep(Duration::from_millis(after_ms));
            self.send(signal);
        })
    }
}

/// What sigqueue gave a signal to carry.
pub fn value_of(info: &siginfo_t) -> usize {
    // SAFETY: the signal was sent by sigqueue.
    unsafe { info.si_value().sival_ptr as usize }
}

/// Runs `f`, unless it is [`escape`]d from: `true` then. What sigsetjmp and siglongjmp do, which cannot be called
/// from Rust. `saved` is where the stack pointer is kept meanwhile.
#[unsafe(naked)]
pub unsafe extern "C" fn catch(f: extern "C" fn(), saved: *mut usize) -> bool {
    core::arch::naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "mov [rsi], rsp",
        "call rdi",
        "xor eax, eax",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// Goes back to the [`catch`] that has filled `saved`.
#[unsafe(naked)]
pub unsafe extern "C" fn escape(saved: *const usize) -> ! {
    core::arch::naked_asm!(
        "mov rsp, [rdi]",
        "mov eax, 1",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}
