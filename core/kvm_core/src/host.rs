//! What the core needs from the home that hosts it: time, timers, sleeping and waking, events.

use alloc::boxed::Box;
use alloc::sync::Arc;
use x86emu::env::HostCpu;

/// Why [`Waiter::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Somebody called [`Waiter::wake`] since the last wait began.
    Woken,
    /// The deadline has passed.
    Deadline,
    /// A signal was delivered to the thread: the ioctl ends with EINTR.
    Signal,
}

/// Where one vCPU thread sleeps.
pub trait Waiter: Send + Sync {
    /// Sleeps until [`Self::wake`], `deadline_ns` (in [`Host::now_ns`] time) or a signal. A `wake`
    /// that came before makes it return at once. Called by the vCPU's thread only.
    fn wait(&self, deadline_ns: Option<u64>) -> Wake;
    /// Ends the present or the next [`Self::wait`]. Callable from any thread and from signal handlers.
    fn wake(&self);
}

/// A one-shot timer.
pub trait Timer: Send + Sync {
    /// Arms it for `deadline_ns` in [`Host::now_ns`] time; `None` disarms. The callback may run once
    /// more for a deadline that was replaced.
    fn set(&self, deadline_ns: Option<u64>);
}

/// Something that a device write or an interrupt acknowledgement signals (an eventfd in user space).
pub trait Event: Send + Sync {
    /// Signals it. Must not block.
    fn signal(&self);
    /// Identifies the object behind the event, so that it can be unregistered.
    fn id(&self) -> u64;
}

/// How long a thread has waited for a CPU while it could have run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunDelay {
    /// Identifies the thread.
    pub thread: u64,
    /// Nanoseconds since the thread was made.
    pub ns: u64,
}

/// The home of a VM.
pub trait Host: Send + Sync {
    /// Monotonic nanoseconds since an arbitrary start.
    fn now_ns(&self) -> u64;
    /// Nanoseconds since the Unix epoch.
    fn realtime_ns(&self) -> u64;
    /// The host's time-stamp counter.
    fn tsc(&self) -> u64;
    /// Frequency of [`Self::tsc`] in kHz, never 0.
    fn tsc_khz(&self) -> u32;
    /// How long the calling thread has waited for a CPU; `None` where nobody counts. The core asks at
    /// most every 10 ms.
    fn run_delay(&self) -> Option<RunDelay> {
        None
    }
    /// The host CPU's CPUID: EAX, EBX, ECX, EDX.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// The host's XCR0: the register state that its operating system switches; 0 without XSAVE.
    fn xcr0(&self) -> u64;
    /// A sleeping place for a new vCPU; `None`: out of resources.
    fn waiter(&self) -> Option<Arc<dyn Waiter>>;
    /// A timer that calls `expired` on a thread of the home's; `None`: out of resources.
    fn timer(&self, expired: Box<dyn Fn() + Send + Sync>) -> Option<Box<dyn Timer>>;
    /// The executor of single instructions for one vCPU; used by that vCPU's thread only.
    /// `None`: out of resources.
    fn native_cpu(&self) -> Option<Box<dyn HostCpu + Send>>;
}
