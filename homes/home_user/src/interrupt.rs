//! Signals and KVM_RUN.
//!
//! With `/dev/kvm`, any signal that a thread takes ends its KVM_RUN with EINTR. Here the guest runs as the
//! thread's own code: a signal runs its handler and guest code goes on. A handler that wants the vCPU
//! back says so, with [`Kicker::kick`](crate::Kicker::kick) or, not knowing which vCPU that is, with
//! [`interrupt_current`]. A stand-in for `/dev/kvm` wraps the program's handlers with it, and gets KVM's
//! rule for them all.
//!
//! Between `immediate_exit` and entering the guest there is no gap: a kick that comes before the run
//! ends it at once.
#![expect(
    unsafe_code,
    reason = "a signal handler reads what its own thread wrote"
)]

use kvm_core::vcpu::VcpuShared;
use std::cell::Cell;
use std::ptr;

thread_local! {
    /// The vCPU that this thread is running. Constant initializer and no destructor, so that a handler
    /// may read it.
    static CURRENT: Cell<*const VcpuShared> = const { Cell::new(ptr::null()) };
}

/// While it lives, this thread runs the vCPU.
pub struct Running<'a> {
    before: *const VcpuShared,
    _shared: &'a VcpuShared,
}

impl<'a> Running<'a> {
    pub fn new(shared: &'a VcpuShared) -> Self {
        Running {
            before: CURRENT.replace(shared),
            _shared: shared,
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}

/// Makes the [`Vcpu::run`](crate::Vcpu::run) that this thread is in return EINTR. `false`: it is in
/// none. For signal handlers: it takes no lock, allocates nothing and keeps `errno`.
pub fn interrupt_current() -> bool {
    let shared = CURRENT.get();
    if shared.is_null() {
        return false;
    }
    // SAFETY: `Running` keeps the vCPU borrowed while the pointer is set, and the handler runs on the
    // thread that set it. The location of errno is the thread's own.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        (*shared).user_kick();
        *errno = before;
    }
    true
}
