//! Signals without handlers, signal masks, and threads that wait for signals.

use crate::kvm::{self, COUNT, DOWN_OUT, EXIT_IO, SET_SIGNAL_MASK, Vcpu, Vm, errno, ioctl};
use crate::process::wait_for;
use crate::signal::{Target, blocked, handle, mask, pending, set_action, set_of, take, value_of};
use libc::{c_int, c_void, siginfo_t};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    HANDLED.fetch_add(1, SeqCst);
}

#[repr(C, packed(4))]
struct SignalMask {
    len: u32,
    set: u64,
}

/// KVM_SET_SIGNAL_MASK: these are blocked, or all but these.
fn set_mask(vcpu: &Vcpu, signals: &[c_int], but: bool) {
    let set = signals.iter().fold(0u64, |set, &s| set | 1 << (s - 1));
    let mut value = SignalMask {
        len: 8,
        set: if but { !set } else { set },
    };
    kvm::call(vcpu.fd, SET_SIGNAL_MASK, &mut value);
}

/// A guest that ends by itself after a while.
fn finite() -> (Vm, Vcpu) {
    let vm = Vm::new(DOWN_OUT);
    let vcpu = vm.vcpu(0);
    vm.set_counter(20_000_000);
    (vm, vcpu)
}

/// Signals that are blocked or ignored, and those that are ignored by default, do not end KVM_RUN.
pub fn blocked_and_ignored() {
    let (_vm, vcpu) = finite();
    handle(libc::SIGUSR1, count, 0, &[]);
    mask(libc::SIG_BLOCK, &[libc::SIGUSR1]);
    set_action(libc::SIGUSR2, libc::SIG_IGN, 0, &[]);
    let me = Target::me();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        for signal in [libc::SIGUSR1, libc::SIGUSR2, libc::SIGCHLD, libc::SIGWINCH] {
            me.send(signal);
        }
    });
    assert_eq!(vcpu.run(), 0);
    assert_eq!(vcpu.reason(), EXIT_IO);
    sender.join().expect("the sender");
    assert!(pending(libc::SIGUSR1) && !pending(libc::SIGUSR2));
    assert_eq!(HANDLED.load(SeqCst), 0);
    mask(libc::SIG_UNBLOCK, &[libc::SIGUSR1]);
    assert_eq!(HANDLED.load(SeqCst), 1);
    // One that is ignored after all.
    handle(libc::SIGUSR2, count, 0, &[]);
    me.send(libc::SIGUSR2);
    set_action(libc::SIGUSR2, libc::SIG_IGN, 0, &[]);
    me.send(libc::SIGUSR2);
    assert_eq!(HANDLED.load(SeqCst), 2);
    vcpu.close();
}

/// QEMU's way of old: a blocked signal that KVM_RUN lets through stays pending, and sigtimedwait takes it.
pub fn signal_mask() {
    let vm = Vm::new(COUNT);
    let vcpu = vm.vcpu(0);
    let signal = libc::SIGRTMIN() + 1;
    let me = Target::me();
    handle(libc::SIGUSR1, count, 0, &[]);
    handle(signal, count, 0, &[]);
    mask(libc::SIG_BLOCK, &[libc::SIGUSR1, signal]);
    set_mask(&vcpu, &[libc::SIGUSR1, signal], true);
    for n in 0..20 {
        let sender = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(n as u64 % 4));
            me.queue(if n % 2 == 0 { libc::SIGUSR1 } else { signal }, n);
        });
        assert_eq!(vcpu.run(), -libc::EINTR);
        let signal = if n % 2 == 0 { libc::SIGUSR1 } else { signal };
        assert!(pending(signal) && blocked(signal));
        // As long as it is pending, runs end at once.
        let counted = vm.counter();
        assert_eq!(vcpu.run(), -libc::EINTR);
        assert_eq!(vm.counter(), counted);
        let info = take(signal).expect("the signal");
        assert_eq!(value_of(&info), n);
        assert!(!pending(signal));
        sender.join().expect("the sender");
    }
    assert_eq!(HANDLED.load(SeqCst), 0);
    // Without the mask it is a blocked signal again.
    assert_eq!(ioctl(vcpu.fd, SET_SIGNAL_MASK, 0), 0);
    me.send(libc::SIGUSR1);
    handle(libc::SIGUSR2, count, 0, &[]);
    let sender = me.send_later(libc::SIGUSR2, 20);
    assert_eq!(vcpu.run(), -libc::EINTR);
    sender.join().expect("the sender");
    assert_eq!(HANDLED.load(SeqCst), 1);
    assert!(take(libc::SIGUSR1).is_some());
    let mut bad = SignalMask { len: 4, set: 0 };
    assert_eq!(
        ioctl(vcpu.fd, SET_SIGNAL_MASK, &raw mut bad as u64),
        -libc::EINVAL
    );
    vcpu.close();
}

/// The same for a signal that has no handler, and would end the process.
pub fn signal_mask_default() {
    let vm = Vm::new(COUNT);
    let vcpu = vm.vcpu(0);
    mask(libc::SIG_BLOCK, &[libc::SIGUSR2]);
    set_mask(&vcpu, &[libc::SIGUSR2], true);
    for n in 0..10 {
        let sender = Target::me().send_later(libc::SIGUSR2, n % 4);
        assert_eq!(vcpu.run(), -libc::EINTR);
        assert!(take(libc::SIGUSR2).is_some());
        sender.join().expect("the sender");
    }
    // Elsewhere it does what it does.
    // SAFETY: the child is killed by its own signal.
    let child = unsafe { libc::fork() };
    if child == 0 {
        mask(libc::SIG_UNBLOCK, &[libc::SIGUSR2]);
        Target::me().send(libc::SIGUSR2);
        std::process::exit(0);
    }
    assert_eq!(
        libc::WTERMSIG(crate::process::status_of(child)),
        libc::SIGUSR2
    );
    vcpu.close();
}

/// A signal that KVM_RUN's mask blocks does not end it, and is handled after it.
pub fn signal_mask_blocks() {
    let (_vm, vcpu) = finite();
    handle(libc::SIGUSR1, count, 0, &[]);
    set_mask(&vcpu, &[libc::SIGUSR1], false);
    let sender = Target::me().send_later(libc::SIGUSR1, 5);
    assert_eq!(vcpu.run(), 0);
    assert_eq!(vcpu.reason(), EXIT_IO);
    sender.join().expect("the sender");
    assert_eq!(HANDLED.load(SeqCst), 1);
    assert!(!blocked(libc::SIGUSR1));
    vcpu.close();
}

/// immediate_exit ends a run before it begins.
pub fn immediate_exit() {
    let vm = Vm::new(COUNT);
    let vcpu = vm.vcpu(0);
    vcpu.set_immediate_exit(1);
    for _ in 0..10 {
        assert_eq!(vcpu.run(), -libc::EINTR);
    }
    assert_eq!(vm.counter(), 0);
    vcpu.close();
}

/// A signalfd in another thread gets the process's signals, and the vCPU is left alone.
pub fn signalfd() {
    mask(libc::SIG_BLOCK, &[libc::SIGUSR1]);
    let (_vm, vcpu) = finite();
    // SAFETY: the set outlives the call.
    let fd = unsafe { libc::signalfd(-1, &set_of(&[libc::SIGUSR1]), libc::SFD_CLOEXEC) };
    assert!(fd >= 0, "signalfd: {}", errno());
    let reader = std::thread::spawn(move || {
        let mut got = 0;
        for _ in 0..20 {
            let mut info = [0u8; 128];
            // SAFETY: the buffer is as long as stated.
            let n = unsafe {
                libc::kill(libc::getpid(), libc::SIGUSR1);
                libc::read(fd, info.as_mut_ptr().cast(), info.len())
            };
            got += usize::from(n == 128);
            std::thread::sleep(Duration::from_millis(1));
        }
        got
    });
    assert_eq!(vcpu.run(), 0);
    assert_eq!(vcpu.reason(), EXIT_IO);
    assert_eq!(reader.join().expect("the reader"), 20);
    vcpu.close();
}

extern "C-unwind" fn sleep_for_ever(_: *mut c_void) -> *mut c_void {
    loop {
        // SAFETY: a cancellation point; there is nothing to clean up here.
        unsafe { libc::pause() };
    }
}

/// Threads that are cancelled beside a running vCPU.
pub fn cancel_elsewhere() {
    unsafe extern "C" {
        fn pthread_create(
            thread: *mut libc::pthread_t,
            attr: *const libc::pthread_attr_t,
            start: extern "C-unwind" fn(*mut c_void) -> *mut c_void,
            arg: *mut c_void,
        ) -> c_int;
        fn pthread_cancel(thread: libc::pthread_t) -> c_int;
    }
    let (_vm, vcpu) = finite();
    handle(libc::SIGUSR1, count, 0, &[]);
    let canceller = std::thread::spawn(|| {
        for _ in 0..20 {
            // SAFETY: the thread is joined.
            unsafe {
                let mut thread = std::mem::zeroed();
                let null = std::ptr::null_mut();
                assert_eq!(
                    pthread_create(&mut thread, null, sleep_for_ever, null.cast()),
                    0
                );
                std::thread::sleep(Duration::from_millis(1));
                assert_eq!(pthread_cancel(thread), 0);
                let mut result = std::ptr::null_mut();
                assert_eq!(libc::pthread_join(thread, &mut result), 0);
                assert_eq!(result as isize, -1, "cancelled");
            }
        }
    });
    assert_eq!(vcpu.run(), 0);
    canceller.join().expect("the canceller");
    // A change of identity interrupts every thread with a signal of the C library's own.
    let running = vcpu;
    let (sender, receiver) = std::sync::mpsc::channel();
    let spin = Vm::new(COUNT);
    let spinning = spin.vcpu(0);
    let thread = std::thread::spawn(move || {
        sender.send(Target::me()).expect("the case waits");
        let spinning = spinning;
        while HANDLED.load(SeqCst) == 0 {
            assert_eq!(spinning.run(), -libc::EINTR);
        }
    });
    let target = receiver.recv().expect("a thread");
    wait_for("it counts", || spin.counter() > 1000);
    // SAFETY: changes nothing.
    unsafe {
        assert_eq!(libc::setuid(libc::getuid()), 0);
    }
    let counted = spin.counter();
    wait_for("it still counts", || spin.counter() > counted + 1000);
    target.send(libc::SIGUSR1);
    thread.join().expect("a thread");
    running.close();
    spinning.close();
}
