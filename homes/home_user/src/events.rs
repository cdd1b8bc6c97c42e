//! The VM's event thread: irqfds and timers, with one epoll.
#![expect(
    unsafe_code,
    reason = "epoll, eventfd and timerfd have no safe wrappers in std"
)]

use crate::waiter::timespec;
use kvm_abi::Errno;
use kvm_core::host::{Event, Timer};
use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What runs when a descriptor becomes readable.
type Callback = Box<dyn Fn() + Send + Sync>;

struct Source {
    fd: OwnedFd,
    callback: Callback,
    /// The 8 bytes of an eventfd or timerfd are taken before the callback; what else there may be to read
    /// is the callback's.
    counter: bool,
}

struct Inner {
    epoll: OwnedFd,
    stop: OwnedFd,
    sources: Mutex<HashMap<u64, Arc<Source>>>,
    next: AtomicU64,
}

thread_local! {
    /// This thread is an event thread.
    static SERVING: Cell<bool> = const { Cell::new(false) };
}

/// Key of the stop event.
const STOP: u64 = 0;

/// The last OS error as a KVM error number.
pub fn last_errno() -> Errno {
    Errno(
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EINVAL),
    )
}

/// What a system call that makes a descriptor returned.
///
/// # Errors
/// What the system call says.
pub fn owned(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: a system call has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Duplicates a descriptor of the caller's, so that it lives as long as its registration.
pub fn duplicate(fd: &impl AsRawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the caller's value owns the descriptor for the duration of the call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    fd.try_clone_to_owned()
        .map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EBADF)))
}

/// Tells eventfds apart: duplicates of one descriptor are the same event.
pub fn event_id(fd: RawFd) -> u64 {
    let number = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|l| l.strip_prefix("eventfd-id:"))?;
            line.trim().parse::<u64>().ok()
        });
    // Kernels before 5.2 have no such line; the number of the descriptor must do there.
    number.unwrap_or(1 << 32 | fd as u64)
}

/// A descriptor of the caller's by its number.
///
/// # Errors
/// EBADF.
pub fn borrow(fd: RawFd) -> Result<BorrowedFd<'static>, Errno> {
    // SAFETY: asks for a flag of whatever the number means.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(Errno(libc::EBADF));
    }
    // SAFETY: open now. If the caller closes it meanwhile, calls on it fail.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// An eventfd that the guest's writes signal.
pub struct EventFdEvent {
    fd: File,
    id: u64,
}

impl EventFdEvent {
    /// An event on a duplicate of `fd`.
    pub fn new(fd: &impl AsRawFd) -> Result<Self, Errno> {
        let id = event_id(fd.as_raw_fd());
        Ok(EventFdEvent {
            fd: File::from(duplicate(fd)?),
            id,
        })
    }
}

impl EventFdEvent {
    /// An event on a duplicate of `fd`, which the caller says is an eventfd.
    ///
    /// # Errors
    /// EINVAL when it is none.
    pub fn checked(fd: &impl AsRawFd) -> Result<Self, Errno> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        if link.is_ok_and(|l| l.as_os_str() != "anon_inode:[eventfd]") {
            return Err(Errno::EINVAL);
        }
        Self::new(fd)
    }
}

impl Event for EventFdEvent {
    fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live buffer to a descriptor that `self` owns. A full counter
        // (EAGAIN) means that the event is signalled already.
        unsafe {
            libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len());
        }
    }
    fn id(&self) -> u64 {
        self.id
    }
}

/// The thread and what it watches.
pub struct EventLoop {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

impl Inner {
    fn sources(&self) -> MutexGuard<'_, HashMap<u64, Arc<Source>>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, fd: RawFd, key: u64) -> Result<(), Errno> {
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: key,
        };
        // SAFETY: both descriptors are open and the event outlives the call.
        let result =
            unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
        if result < 0 {
            return Err(last_errno());
        }
        Ok(())
    }

    fn add(&self, fd: OwnedFd, callback: Callback, counter: bool) -> Result<u64, Errno> {
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let raw = fd.as_raw_fd();
        let source = Source {
            fd,
            callback,
            counter,
        };
        self.sources().insert(key, Arc::new(source));
        if let Err(e) = self.watch(raw, key) {
            self.sources().remove(&key);
            return Err(e);
        }
        Ok(key)
    }

    fn remove(&self, key: u64) {
        let source = self.sources().remove(&key);
        if let Some(source) = source {
            // SAFETY: both descriptors are open.
            unsafe {
                libc::epoll_ctl(
                    self.epoll.as_raw_fd(),
                    libc::EPOLL_CTL_DEL,
                    source.fd.as_raw_fd(),
                    std::ptr::null_mut(),
                );
            }
        }
    }

    fn serve(&self) {
        SERVING.set(true);
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 32];
        loop {
            // SAFETY: the buffer is as long as stated.
            let n = unsafe {
                libc::epoll_wait(
                    self.epoll.as_raw_fd(),
                    events.as_mut_ptr(),
                    events.len() as i32,
                    -1,
                )
            };
            if n < 0 {
                if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                log::error!("the event thread stops: {}", io::Error::last_os_error());
                return;
            }
            for event in &events[..n as usize] {
                let key = event.u64;
                if key == STOP {
                    return;
                }
                let Some(source) = self.sources().get(&key).cloned() else {
                    continue;
                };
                if !source.counter {
                    (source.callback)();
                    continue;
                }
                let mut count = [0; 8];
                // SAFETY: reads into a live buffer from a descriptor that `source` owns; eventfds
                // and timerfds give 8 bytes.
                let got = unsafe {
                    libc::read(
                        source.fd.as_raw_fd(),
                        count.as_mut_ptr().cast(),
                        count.len(),
                    )
                };
                if got == 8 {
                    (source.callback)();
                }
            }
        }
    }
}

/// Asks the scheduler for short slices for this thread. It runs for microseconds at a time, and busy
/// vCPUs wait for what it brings; with the slices of everyone else it would get its turn after theirs
/// (since Linux 6.12; before, nothing changes).
fn run_soon() {
    /// `struct sched_attr`, its first version.
    #[repr(C)]
    #[derive(Default)]
    struct SchedAttr {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    /// The shortest slice there is.
    const SLICE_NS: u64 = 100_000;
    let mut attr = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: the structure is as large as stated and outlives the calls, which concern this thread.
    unsafe {
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) == 0
            && attr.policy == libc::SCHED_OTHER as u32
        {
            attr.runtime = SLICE_NS;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0);
        }
    }
}

impl EventLoop {
    /// Starts the thread.
    ///
    /// # Errors
    /// Whatever the system calls say.
    pub fn new() -> Result<Self, Errno> {
        // SAFETY: makes a new descriptor.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: makes a new descriptor.
        let stop = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        let inner = Arc::new(Inner {
            epoll,
            stop,
            sources: Mutex::new(HashMap::new()),
            next: AtomicU64::new(STOP + 1),
        });
        inner.watch(inner.stop.as_raw_fd(), STOP)?;
        let served = inner.clone();
        let thread = std::thread::Builder::new()
            .name("anykvm-events".into())
            .spawn(move || {
                run_soon();
                served.serve();
            })
            .map_err(|_| Errno::EAGAIN)?;
        Ok(EventLoop {
            inner,
            thread: Some(thread),
        })
    }

    /// Calls `callback` whenever the eventfd `fd` is signalled; a key to stop that with.
    pub fn add_eventfd(&self, fd: OwnedFd, callback: Callback) -> Result<u64, Errno> {
        self.inner.add(fd, callback, true)
    }

    /// Calls `callback` as long as there is something to read from `fd`.
    pub fn add_descriptor(&self, fd: OwnedFd, callback: Callback) -> Result<u64, Errno> {
        self.inner.add(fd, callback, false)
    }

    /// Stops watching.
    pub fn remove(&self, key: u64) {
        self.inner.remove(key);
    }

    /// Makes a timer.
    pub fn timer(&self, callback: Callback) -> Result<LoopTimer, Errno> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: makes a new descriptor.
        let fd = owned(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
        let own = fd.try_clone().map_err(|_| Errno::ENOMEM)?;
        let key = self.inner.add(fd, callback, true)?;
        Ok(LoopTimer {
            fd: own,
            inner: self.inner.clone(),
            key,
        })
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from a live buffer to an eventfd.
        unsafe {
            libc::write(self.inner.stop.as_raw_fd(), one.as_ptr().cast(), one.len());
        }
        if let Some(thread) = self.thread.take() {
            // The last reference to a VM may be dropped by a callback, on its own thread or on another VM's.
            // That one must not wait either: the two could wait for each other.
            if !SERVING.get() {
                let _ = thread.join();
            }
        }
    }
}

/// A timerfd.
pub struct LoopTimer {
    fd: OwnedFd,
    inner: Arc<Inner>,
    key: u64,
}

impl Timer for LoopTimer {
    fn set(&self, deadline_ns: Option<u64>) {
        let spec = libc::itimerspec {
            it_interval: timespec(0),
            // Zero would disarm; a deadline in the past fires at once.
            it_value: timespec(deadline_ns.map_or(0, |ns| ns.max(1))),
        };
        // SAFETY: the descriptor is a timerfd and the structure outlives the call.
        unsafe {
            libc::timerfd_settime(
                self.fd.as_raw_fd(),
                libc::TFD_TIMER_ABSTIME,
                &spec,
                std::ptr::null_mut(),
            );
        }
    }
}

impl Drop for LoopTimer {
    fn drop(&mut self) {
        self.inner.remove(self.key);
    }
}
