//! The core's [`Host`] on Linux.
#![expect(unsafe_code, reason = "time, CPUID and XGETBV")]

use crate::events::EventLoop;
use crate::native::Native;
use crate::waiter::Futex;
use kvm_abi::Errno;
use kvm_core::host::{Host, RunDelay, Timer, Waiter};
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x86emu::env::HostCpu;

/// How long the TSC is compared with the clock to learn its frequency.
const CALIBRATION: Duration = Duration::from_millis(20);

/// The home of one VM.
pub struct UserHost {
    pub events: Arc<EventLoop>,
    xcr0: u64,
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut ts = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}

fn rdtsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux lets processes use it unless they ask otherwise.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// TSC and clock, read as close together as can be had.
fn sample() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..16 {
        let before = rdtsc();
        let ns = monotonic_ns();
        let after = rdtsc();
        let width = after.wrapping_sub(before);
        if width < best.0 {
            best = (width, before + width / 2, ns);
        }
    }
    (best.1, best.2)
}

/// The host TSC's frequency in kHz, measured once per process.
pub fn tsc_khz() -> u32 {
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (tsc0, ns0) = sample();
        std::thread::sleep(CALIBRATION);
        let (tsc1, ns1) = sample();
        let ticks = u128::from(tsc1.wrapping_sub(tsc0));
        let khz = ticks * 1_000_000 / u128::from((ns1 - ns0).max(1));
        u32::try_from(khz).unwrap_or(u32::MAX).max(1)
    })
}

/// How long this thread has waited for a CPU: the second number of its `schedstat`.
fn run_delay() -> Option<RunDelay> {
    thread_local! {
        static STAT: RefCell<Option<(u64, File)>> = const { RefCell::new(None) };
    }
    STAT.with_borrow_mut(|stat| {
        if stat.is_none() {
            // SAFETY: gettid has no preconditions.
            let thread = unsafe { libc::gettid() } as u64;
            let file = File::open(format!("/proc/self/task/{thread}/schedstat")).ok()?;
            *stat = Some((thread, file));
        }
        let (thread, file) = stat.as_ref()?;
        let mut text = [0; 96];
        let n = file.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(&text[..n]).ok()?;
        Some(RunDelay {
            thread: *thread,
            ns: text.split_ascii_whitespace().nth(1)?.parse().ok()?,
        })
    })
}

fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The host's XCR0, 0 without OSXSAVE.
pub fn host_xcr0() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    if cpuid(1, 0)[2] & OSXSAVE == 0 {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE is set, and XGETBV with ECX = 0 only reads.
    unsafe {
        core::arch::asm!(
            "xgetbv",
            in("ecx") 0,
            out("eax") low,
            out("edx") high,
            options(nomem, nostack, preserves_flags)
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

impl UserHost {
    /// Starts the event thread of a VM.
    pub fn new() -> Result<Self, Errno> {
        kvm_core::sync::set_yield_hook(std::thread::yield_now);
        Ok(UserHost {
            events: Arc::new(EventLoop::new()?),
            xcr0: host_xcr0(),
        })
    }
}

/// The part of a home that needs no VM: what KVM_GET_SUPPORTED_CPUID asks.
pub struct Bare;

macro_rules! facts {
    ($xcr0:expr) => {
        fn now_ns(&self) -> u64 {
            monotonic_ns()
        }
        fn realtime_ns(&self) -> u64 {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_nanos() as u64)
        }
        fn tsc(&self) -> u64 {
            rdtsc()
        }
        fn tsc_khz(&self) -> u32 {
            tsc_khz()
        }
        fn run_delay(&self) -> Option<RunDelay> {
            run_delay()
        }
        fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
            cpuid(leaf, subleaf)
        }
        fn xcr0(&self) -> u64 {
            let f: fn(&Self) -> u64 = $xcr0;
            f(self)
        }
        fn native_cpu(&self) -> Option<Box<dyn HostCpu + Send>> {
            match Native::new() {
                Ok(native) => Some(Box::new(native)),
                Err(e) => {
                    log::error!("no executable memory for single instructions: {e}");
                    None
                }
            }
        }
    };
}

impl Host for UserHost {
    facts!(|host| host.xcr0);

    fn waiter(&self) -> Option<Arc<dyn Waiter>> {
        Some(Arc::new(Futex::default()))
    }

    fn timer(&self, expired: Box<dyn Fn() + Send + Sync>) -> Option<Box<dyn Timer>> {
        match self.events.timer(expired) {
            Ok(timer) => Some(Box::new(timer)),
            Err(e) => {
                log::error!("cannot make a timer: {e}");
                None
            }
        }
    }
}

impl Host for Bare {
    facts!(|_| host_xcr0());

    fn waiter(&self) -> Option<Arc<dyn Waiter>> {
        None
    }

    fn timer(&self, _expired: Box<dyn Fn() + Send + Sync>) -> Option<Box<dyn Timer>> {
        None
    }
}
