//! Signals of a program that believes in `/dev/kvm`.
//!
//! KVM ends KVM_RUN with EINTR when a signal is pending, and the program's handler runs when the system
//! call has returned. Here guest code runs on the thread itself, so a signal would interrupt the engine
//! in the middle. Once a process has a VM, each of the program's handlers is therefore behind a
//! trampoline. On a thread that is in KVM_RUN it sends the signal to the thread once more, blocked this
//! time, and kicks the vCPU; when KVM_RUN is over the signal is unblocked and the handler runs, outside of
//! any lock and free to do what it likes, a jump out of it included. The same goes for everything else
//! that this library does for the program ([`serve`]): its locks are never held below a handler.
//!
//! Until `/dev/kvm` is opened nothing is changed. Faults (SIGSEGV, SIGBUS, SIGFPE, SIGILL) are the engine's first,
//! then the program's.
#![expect(
    unsafe_code,
    reason = "signal handlers; everything here is async-signal-safe"
)]

use crate::interrupt::interrupt_current;
use crate::native;
use std::cell::Cell;
use std::mem::{transmute_copy, zeroed};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// sigaction(2), not ours.
pub type RealSigaction =
    unsafe extern "C" fn(i32, *const libc::sigaction, *mut libc::sigaction) -> i32;

/// Signals are 1 to 64.
const LAST: i32 = 64;
/// What the C library uses itself.
const INTERNAL: [i32; 2] = [32, 33];

/// A program's action for one signal.
struct Action {
    handler: AtomicUsize,
    flags: AtomicI32,
    mask: AtomicU64,
}

static ACTIONS: [Action; LAST as usize + 1] = [const {
    Action {
        handler: AtomicUsize::new(libc::SIG_DFL),
        flags: AtomicI32::new(0),
        mask: AtomicU64::new(0),
    }
}; LAST as usize + 1];
/// Trampolines are being put in place.
static ACTIVATING: AtomicBool = AtomicBool::new(false);
/// Trampolines are in place.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// Held while an action changes, here and in the kernel.
static CHANGING: Mutex<()> = Mutex::new(());
/// The real sigaction, a function.
static REAL: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Our own code is installing handlers: the program's table is not meant.
    static BYPASS: Cell<bool> = const { Cell::new(false) };
    /// The signal that cancelled the thread while it was in KVM_RUN.
    static CANCELLED: Cell<Option<libc::siginfo_t>> = const { Cell::new(None) };
    /// Signals that were put off on this thread, a bit each.
    static DEFERRED: Cell<u64> = const { Cell::new(0) };
    /// How deep this thread is in this library.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// From here to [`leave`] the program's handlers do not run on this thread.
pub(super) fn enter() {
    DEPTH.set(DEPTH.get() + 1);
}

/// Ends what [`enter`] began: signals that were put off arrive. Their handlers may jump away, so the thread must
/// hold nothing any more.
pub(super) fn leave() {
    let depth = DEPTH.get() - 1;
    if depth != 0 {
        DEPTH.set(depth);
        return;
    }
    loop {
        let deferred = DEFERRED.replace(0);
        // A signal up to here is put off and seen by the next round; one after it is handled at once.
        DEPTH.set(0);
        if deferred != 0 {
            set_mask(libc::SIG_UNBLOCK, deferred);
        }
        if DEFERRED.get() == 0 {
            return;
        }
    }
}

/// Runs `work` for the program, whose handlers wait until it is done, as they do for a system call.
pub(super) fn serve<T>(work: impl FnOnce() -> T) -> T {
    enter();
    let value = work();
    leave();
    value
}

/// A signal set's bit.
fn bit(sig: i32) -> u64 {
    1 << (sig - 1)
}

/// Says where the real sigaction is, for homes that stand in front of it.
pub fn set_real_sigaction(real: RealSigaction) {
    REAL.store(real as usize, Ordering::Release);
}

fn real(sig: i32, new: *const libc::sigaction, old: *mut libc::sigaction) -> i32 {
    let f = REAL.load(Ordering::Acquire);
    if f == 0 {
        // SAFETY: the arguments are sigaction's.
        return unsafe { libc::sigaction(sig, new, old) };
    }
    // SAFETY: `set_real_sigaction` stored a function of this type.
    unsafe { std::mem::transmute::<usize, RealSigaction>(f)(sig, new, old) }
}

/// Puts fault handlers and trampolines in place, once per process.
pub(crate) fn activate() {
    static ONCE: Once = Once::new();
    if ACTIVE.load(Ordering::Acquire) {
        return;
    }
    // A handler on this thread must not meet a table that is half filled.
    let mask = block_all();
    ONCE.call_once(|| {
        ACTIVATING.store(true, Ordering::SeqCst);
        BYPASS.set(true);
        native::install();
        engine_jit::install_handlers();
        BYPASS.set(false);
        for sig in 1..=LAST {
            if is_fault(sig) || INTERNAL.contains(&sig) {
                continue;
            }
            // SAFETY: zeroed is a valid sigaction, and the call fills it.
            let mut old: libc::sigaction = unsafe { zeroed() };
            if real(sig, ptr::null(), &mut old) != 0 {
                continue;
            }
            remember(sig, &old);
            if is_function(old.sa_sigaction) {
                real(sig, &wrapped(&old), ptr::null_mut());
            }
        }
        ACTIVE.store(true, Ordering::SeqCst);
    });
    restore_mask(mask);
}

fn is_fault(sig: i32) -> bool {
    native::SIGNALS.contains(&sig)
}

fn is_function(handler: usize) -> bool {
    handler != libc::SIG_DFL && handler != libc::SIG_IGN
}

fn remember(sig: i32, action: &libc::sigaction) {
    let slot = &ACTIONS[sig as usize];
    slot.flags.store(action.sa_flags, Ordering::Relaxed);
    slot.mask
        .store(first_word(&action.sa_mask), Ordering::Relaxed);
    slot.handler.store(action.sa_sigaction, Ordering::Release);
}

fn first_word(mask: &libc::sigset_t) -> u64 {
    // SAFETY: the set is 128 bytes, its first 64 bits are the signals that there are.
    unsafe { transmute_copy(mask) }
}

fn set_of(word: u64) -> libc::sigset_t {
    // SAFETY: any bits are a valid set; the first word is the one in use.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        ptr::from_mut(&mut set).cast::<u64>().write(word);
        set
    }
}

/// The action with the trampoline for its handler.
fn wrapped(action: &libc::sigaction) -> libc::sigaction {
    let mut own = *action;
    own.sa_sigaction = trampoline as *const () as usize;
    // One signal at a time is sent again, or they would change their order.
    own.sa_flags = own.sa_flags & !(libc::SA_RESETHAND | libc::SA_NODEFER) | libc::SA_SIGINFO;
    own
}

fn action_of(handler: usize, flags: i32, mask: u64) -> libc::sigaction {
    // SAFETY: zeroed is a valid sigaction.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    action.sa_mask = set_of(mask);
    action
}

/// sigaction(2) as the program sees it.
///
/// # Safety
/// As sigaction: the pointers are null or valid.
pub unsafe fn program_sigaction(
    sig: i32,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> i32 {
    if BYPASS.get() || !(1..=LAST).contains(&sig) {
        return real(sig, new, old);
    }
    if !ACTIVE.load(Ordering::SeqCst) {
        let result = real(sig, new, old);
        if result != 0 || new.is_null() || !ACTIVATING.load(Ordering::SeqCst) {
            return result;
        }
        // The table is being filled at this moment, and may or may not have got the action.
        while !ACTIVE.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        return serve(|| change(sig, new, ptr::null_mut()));
    }
    serve(|| change(sig, new, old))
}

/// sigaction(2), in the table.
fn change(sig: i32, new: *const libc::sigaction, old: *mut libc::sigaction) -> i32 {
    let _alone = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    // Where the program's action is kept: handler, flags, mask.
    let (handler, flags, mask) = match native::SIGNALS.iter().position(|&s| s == sig) {
        Some(i) => {
            let p = &native::PREVIOUS[i];
            (&p.0, &p.1, &p.2)
        }
        None => {
            let a = &ACTIONS[sig as usize];
            (&a.handler, &a.flags, &a.mask)
        }
    };
    let set = |action: &libc::sigaction| {
        flags.store(action.sa_flags, Ordering::Relaxed);
        mask.store(first_word(&action.sa_mask), Ordering::Relaxed);
        handler.store(action.sa_sigaction, Ordering::Release);
    };
    let before = action_of(
        handler.load(Ordering::Acquire),
        flags.load(Ordering::Relaxed),
        mask.load(Ordering::Relaxed),
    );
    // SAFETY: the caller promises that the pointer is null or valid.
    if let Some(new) = unsafe { new.as_ref() } {
        let ours = new.sa_sigaction == trampoline as *const () as usize;
        let installed = if is_fault(sig) {
            set(new);
            0
        } else if ours {
            // What a function of the C library's that we do not stand in front of has read in the kernel.
            real(sig, new, ptr::null_mut())
        } else if is_function(new.sa_sigaction) {
            // The table first: a signal may come at once.
            set(new);
            let installed = real(sig, &wrapped(new), ptr::null_mut());
            if installed != 0 {
                set(&before);
            }
            installed
        } else {
            let installed = real(sig, new, ptr::null_mut());
            if installed == 0 {
                set(new);
            }
            installed
        };
        if installed != 0 {
            return installed;
        }
    }
    // SAFETY: as above.
    if let Some(old) = unsafe { old.as_mut() } {
        *old = before;
    }
    0
}

/// What the kernel calls in place of the program's handlers.
extern "C" fn trampoline(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if DEPTH.get() != 0 {
        interrupt_current();
        defer(sig, info, context);
        return;
    }
    let slot = &ACTIONS[sig as usize];
    let handler = slot.handler.load(Ordering::Acquire);
    if handler == libc::SIG_IGN {
        return;
    }
    if handler == libc::SIG_DFL {
        // A signal that only KVM_SET_SIGNAL_MASK lets through, elsewhere: what it does by default.
        real(sig, &action_of(libc::SIG_DFL, 0, 0), ptr::null_mut());
        resend(sig, info);
        return;
    }
    let flags = slot.flags.load(Ordering::Relaxed);
    if flags & libc::SA_RESETHAND != 0 {
        slot.handler.store(libc::SIG_DFL, Ordering::Release);
        real(sig, &action_of(libc::SIG_DFL, 0, 0), ptr::null_mut());
    }
    if flags & libc::SA_NODEFER != 0 && slot.mask.load(Ordering::Relaxed) & bit(sig) == 0 {
        set_mask(libc::SIG_UNBLOCK, bit(sig));
    }
    // SAFETY: the program installed the handler for this signal. One without SA_SIGINFO ignores the second
    // and third argument, which are in registers.
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
        unsafe { std::mem::transmute(handler) };
    handler(sig, info, context);
}

/// The C library's signal of pthread_cancel.
const CANCEL: i32 = 32;

/// `struct sigaction` as the kernel has it.
#[repr(C)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Puts a trampoline before the C library's handler of pthread_cancel, once that is installed: a thread in
/// KVM_RUN must leave the engine before it ends. True when it is in place.
pub fn catch_cancellation() -> bool {
    let mut action = KernelAction {
        handler: 0,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    let trampoline = cancel_trampoline as *const () as usize;
    // SAFETY: the system call itself, as the C library's function refuses this signal; the structures are
    // the kernel's and outlive the calls.
    unsafe {
        let null = ptr::null_mut::<KernelAction>();
        if libc::syscall(libc::SYS_rt_sigaction, CANCEL, null, &raw mut action, 8) != 0
            || !is_function(action.handler)
        {
            return false;
        }
        if action.handler == trampoline {
            return true;
        }
        ACTIONS[CANCEL as usize]
            .handler
            .store(action.handler, Ordering::Release);
        action.handler = trampoline;
        libc::syscall(libc::SYS_rt_sigaction, CANCEL, &raw const action, null, 8) == 0
    }
}

/// Ends this thread if it was cancelled in KVM_RUN, which is over now. Nothing of the caller's may be left to
/// be dropped: the C library unwinds the stack.
pub fn end_if_cancelled() {
    let Some(mut info) = CANCELLED.take() else {
        return;
    };
    // SAFETY: zeroed is a valid context; who is cancelled asynchronously is so wherever it says.
    let mut context: libc::ucontext_t = unsafe { zeroed() };
    cancel(CANCEL, &mut info, (&raw mut context).cast());
}

/// What the kernel calls in place of the C library's handler.
extern "C-unwind" fn cancel_trampoline(
    sig: i32,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    if interrupt_current() {
        // SAFETY: the kernel passes a valid one.
        CANCELLED.set(Some(unsafe { *info }));
    } else {
        cancel(sig, info, context);
    }
}

/// The C library's handler, which unwinds the stack.
fn cancel(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let handler = ACTIONS[CANCEL as usize].handler.load(Ordering::Acquire);
    // SAFETY: it is the handler that the C library had installed, of this type.
    unsafe {
        let handler: extern "C-unwind" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
            std::mem::transmute(handler);
        handler(sig, info, context);
    }
}

/// Sends the signal to this thread again.
fn resend(sig: i32, info: *mut libc::siginfo_t) {
    // SAFETY: `info` is what the kernel handed to the handler; a thread may send itself any siginfo. The
    // location of errno is the thread's own.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            libc::getpid(),
            libc::gettid(),
            sig,
            info,
        );
        *errno = before;
    }
}

/// How many real-time signals that came behind one can be put behind it again.
const BEHIND: usize = 16;

/// Puts a signal off until the library has done its work.
fn defer(sig: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    set_mask(libc::SIG_BLOCK, bit(sig));
    if sig > INTERNAL[1] {
        resend_first(sig, info);
    } else {
        resend(sig, info);
    }
    DEFERRED.set(DEFERRED.get() | bit(sig));
    // SAFETY: the kernel passes a valid context; the mask in it is the thread's when the handler returns.
    unsafe {
        let mask = &raw mut (*context.cast::<libc::ucontext_t>()).uc_sigmask;
        let mask = mask.cast::<u64>();
        mask.write_unaligned(mask.read_unaligned() | bit(sig));
    }
}

/// Sends a real-time signal to this thread again, before those that have come meanwhile.
#[inline(never)]
fn resend_first(sig: i32, info: *mut libc::siginfo_t) {
    // SAFETY: zeroed is a valid siginfo.
    let mut behind: [libc::siginfo_t; BEHIND] = unsafe { zeroed() };
    let mut count = 0;
    while count < BEHIND && take_pending(sig, &mut behind[count]) {
        count += 1;
    }
    resend(sig, info);
    for info in &mut behind[..count] {
        resend(sig, info);
    }
}

/// Takes a blocked signal out of its queue.
fn take_pending(sig: i32, info: &mut libc::siginfo_t) -> bool {
    let set = bit(sig);
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: set, info and time outlive the call. The location of errno is the thread's own.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        let taken = libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const set,
            ptr::from_mut(info),
            &raw const now,
            8,
        );
        *errno = before;
        taken == libc::c_long::from(sig)
    }
}

fn set_mask(how: i32, word: u64) -> u64 {
    let mut before = set_of(0);
    // SAFETY: both sets outlive the call. The system call itself: the C library's function would take
    // its own signals out of the set.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, how, &word, &raw mut before, 8);
    }
    first_word(&before)
}

/// Blocks every signal of the program's on this thread: all but those of faults and of the C library, which waits
/// until each thread has taken its own (setuid). Gives the mask to [`restore_mask`].
pub(crate) fn block_all() -> u64 {
    let others = native::SIGNALS.iter().chain(&INTERNAL);
    set_mask(
        libc::SIG_SETMASK,
        !others.fold(0, |set, &sig| set | bit(sig)),
    )
}

/// Undoes [`block_all`].
pub(crate) fn restore_mask(mask: u64) {
    set_mask(libc::SIG_SETMASK, mask);
}

/// KVM_RUN's signal mask while it lives.
pub(crate) struct RunMask {
    /// The thread's own, where KVM_SET_SIGNAL_MASK has set another.
    outer: Option<u64>,
}

impl RunMask {
    /// Sets the mask of KVM_SET_SIGNAL_MASK, if there is one. The thread must count as running a vCPU already.
    pub fn enter(mask: Option<u64>) -> Self {
        let Some(mask) = mask else {
            // What came before the thread counted as running a vCPU.
            if DEFERRED.get() != 0 {
                interrupt_current();
            }
            return RunMask { outer: None };
        };
        // Signals that have been put off already are blocked for that reason only, and come again if this
        // mask lets them through.
        let deferred = DEFERRED.get();
        let outer = set_mask(libc::SIG_SETMASK, mask);
        RunMask {
            outer: Some(outer & !deferred),
        }
    }

    /// Whether signals were put off.
    pub fn deferred(&self) -> bool {
        DEFERRED.get() != 0
    }

    /// Back to the thread's own mask, but for signals that were put off: they arrive when the library is
    /// left, unless they are blocked outside of KVM_RUN.
    pub fn leave(self) {
        if let Some(outer) = self.outer {
            let deferred = DEFERRED.get();
            set_mask(libc::SIG_SETMASK, outer | deferred);
            DEFERRED.set(DEFERRED.get() & !outer);
        }
    }
}

/// KVM_SET_SIGNAL_MASK: signals that it lets through must end KVM_RUN even if they have no handler, so they
/// get the trampoline.
pub(crate) fn catch_unmasked(mask: u64) {
    for sig in 1..=LAST {
        let skip = is_fault(sig)
            || INTERNAL.contains(&sig)
            || mask & bit(sig) != 0
            || matches!(
                sig,
                libc::SIGKILL
                    | libc::SIGSTOP
                    | libc::SIGTSTP
                    | libc::SIGTTIN
                    | libc::SIGTTOU
                    | libc::SIGCONT
                    | libc::SIGCHLD
                    | libc::SIGURG
                    | libc::SIGWINCH
            );
        if !skip && ACTIONS[sig as usize].handler.load(Ordering::Acquire) == libc::SIG_DFL {
            real(
                sig,
                &wrapped(&action_of(libc::SIG_DFL, 0, 0)),
                ptr::null_mut(),
            );
        }
    }
}

thread_local! {
    /// Held over a fork, so that the child finds the actions whole.
    static FORKING: Cell<Option<MutexGuard<'static, ()>>> = const { Cell::new(None) };
}

/// Takes the lock of the actions for the time of a fork.
pub(super) fn before_fork() {
    FORKING.set(Some(
        CHANGING.lock().unwrap_or_else(PoisonError::into_inner),
    ));
}

/// Releases it.
pub(super) fn after_fork() {
    drop(FORKING.take());
}
