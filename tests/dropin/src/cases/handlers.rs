//! Signals with handlers: KVM_RUN ends with EINTR, and then the handler runs.

use crate::kvm::{
    self, COUNT, DOWN_OUT, EXIT_INTR, EXIT_IO, OUT_HLT, SPIN, Vcpu, Vm, close, errno, ioctl,
};
use crate::process::{status_of, wait_for};
use crate::signal::{
    Target, action_of, blocked, catch, escape, handle, mask, pending, set_action, take, value_of,
};
use libc::{c_int, c_void, siginfo_t};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// How often handlers have run.
static HANDLED: AtomicU32 = AtomicU32::new(0);
/// The vCPU's descriptor, for handlers.
static VCPU: AtomicI32 = AtomicI32::new(-1);
/// What handlers have seen.
static SEEN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    HANDLED.fetch_add(1, SeqCst);
}

fn handled() -> u32 {
    HANDLED.load(SeqCst)
}

/// A guest that never ends, and its vCPU.
fn spinning() -> (Vm, Vcpu) {
    let vm = Vm::new(COUNT);
    let vcpu = vm.vcpu(0);
    VCPU.store(vcpu.fd, SeqCst);
    (vm, vcpu)
}

/// The plain case, for handlers installed before and after the VM was made.
pub fn signal_ends_run() {
    handle(libc::SIGUSR1, count, 0, &[]);
    let (vm, vcpu) = spinning();
    handle(libc::SIGUSR2, count, 0, &[]);
    for n in 1..=20 {
        let signal = if n % 2 == 0 {
            libc::SIGUSR1
        } else {
            libc::SIGUSR2
        };
        let sender = Target::me().send_later(signal, n % 7);
        assert_eq!(vcpu.run(), -libc::EINTR);
        assert_eq!(vcpu.reason(), EXIT_INTR);
        sender.join().expect("the sender");
        assert_eq!(u64::from(handled()), n, "once each");
        assert!(!blocked(signal) && !pending(signal));
    }
    assert!(vm.counter() > 0);
    // One that came before the run does not end it.
    Target::me().send(libc::SIGUSR1);
    assert_eq!(handled(), 21);
    let counted = vm.counter();
    let sender = Target::me().send_later(libc::SIGUSR1, 20);
    assert_eq!(vcpu.run(), -libc::EINTR);
    assert!(vm.counter() > counted);
    sender.join().expect("the sender");
    vcpu.close();
    // HLT that waits for an interrupt.
    let vm = Vm::new(&[0xf4]);
    assert_eq!(ioctl(vm.fd, kvm::CREATE_IRQCHIP, 0), 0);
    let vcpu = vm.vcpu(0);
    for n in 0..5 {
        let before = handled();
        let sender = Target::me().send_later(libc::SIGUSR1, 5 + n);
        assert_eq!(vcpu.run(), -libc::EINTR);
        assert_eq!(handled(), before + 1);
        sender.join().expect("the sender");
    }
    vcpu.close();
}

extern "C" fn look(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let vcpu = VCPU.load(SeqCst);
    let mut regs = kvm_bindings::kvm_regs::default();
    kvm::call(vcpu, kvm::GET_REGS, &mut regs);
    SEEN.store(regs.rip as usize, SeqCst);
    // A handler may do anything with KVM: run the vCPU, make another VM.
    kvm::call(vcpu, kvm::SET_REGS, &mut regs);
    let other = Vm::new(OUT_HLT);
    let own = other.vcpu(0);
    assert_eq!(own.run(), 0);
    own.close();
    HANDLED.fetch_add(1, SeqCst);
}

/// The handler may call the vCPU's ioctls: KVM_RUN has returned.
pub fn handler_uses_vcpu() {
    handle(libc::SIGUSR1, look, 0, &[]);
    let (_vm, vcpu) = spinning();
    for n in 1..=20 {
        let sender = Target::me().send_later(libc::SIGUSR1, n % 5);
        assert_eq!(vcpu.run(), -libc::EINTR);
        sender.join().expect("the sender");
        assert_eq!(u64::from(handled()), n);
        let rip = SEEN.load(SeqCst);
        assert!((0x1000..0x1007).contains(&rip), "{rip:#x}");
    }
    vcpu.close();
}

static mut STACK: usize = 0;
static READY: AtomicBool = AtomicBool::new(false);

extern "C" fn jump(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    HANDLED.fetch_add(1, SeqCst);
    mask(libc::SIG_UNBLOCK, &[libc::SIGUSR1]);
    // SAFETY: only signalled below `catch`, from functions that hold nothing.
    unsafe { escape(&raw const STACK) }
}

extern "C" fn run_for_ever() {
    READY.store(true, SeqCst);
    loop {
        ioctl(VCPU.load(SeqCst), kvm::RUN, 0);
    }
}

/// The handler may jump out (siglongjmp), again and again; nothing stays locked or referenced.
pub fn handler_jumps_out() {
    handle(libc::SIGUSR1, jump, 0, &[]);
    let threads = crate::process::threads();
    let (vm, vcpu) = spinning();
    for n in 1..=50 {
        READY.store(false, SeqCst);
        let me = Target::me();
        let sender = std::thread::spawn(move || {
            wait_for("the run", || READY.load(SeqCst));
            std::thread::sleep(Duration::from_micros(n * 50));
            me.send(libc::SIGUSR1);
        });
        // SAFETY: `run_for_ever` has no destructors.
        assert!(unsafe { catch(run_for_ever, &raw mut STACK) });
        sender.join().expect("the sender");
        assert_eq!(u64::from(handled()), n);
        assert!((0x1000..0x1007).contains(&vcpu.regs().rip));
    }
    vcpu.close();
    drop(vm);
    wait_for("the VM's end", || crate::process::threads() == threads);
}

/// SA_RESTART does not restart KVM_RUN.
pub fn restart_is_no_restart() {
    handle(libc::SIGUSR1, count, libc::SA_RESTART, &[]);
    let (_vm, vcpu) = spinning();
    let sender = Target::me().send_later(libc::SIGUSR1, 10);
    assert_eq!(vcpu.run(), -libc::EINTR);
    sender.join().expect("the sender");
    assert_eq!(
        action_of(libc::SIGUSR1).sa_flags & libc::SA_RESTART,
        libc::SA_RESTART
    );
    vcpu.close();
}

/// SA_RESETHAND: once.
pub fn reset_hand() {
    let (_vm, vcpu) = spinning();
    for inside in [false, true] {
        handle(libc::SIGUSR1, count, libc::SA_RESETHAND, &[]);
        assert_eq!(
            action_of(libc::SIGUSR1).sa_sigaction,
            count as *const () as usize
        );
        let before = handled();
        if inside {
            let sender = Target::me().send_later(libc::SIGUSR1, 10);
            assert_eq!(vcpu.run(), -libc::EINTR);
            sender.join().expect("the sender");
        } else {
            Target::me().send(libc::SIGUSR1);
        }
        assert_eq!(handled(), before + 1);
        assert_eq!(action_of(libc::SIGUSR1).sa_sigaction, libc::SIG_DFL);
    }
    // SAFETY: the child is killed by its own signal.
    let child = unsafe { libc::fork() };
    if child == 0 {
        Target::me().send(libc::SIGUSR1);
        std::process::exit(0);
    }
    assert_eq!(libc::WTERMSIG(status_of(child)), libc::SIGUSR1);
    vcpu.close();
}

extern "C" fn again(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let depth = HANDLED.fetch_add(1, SeqCst) + 1;
    SEEN.fetch_max(usize::from(blocked(signal)), SeqCst);
    if !depth.is_multiple_of(3) {
        Target::me().send(signal);
        assert!(handled() > depth, "nested");
    }
}

/// SA_NODEFER: a handler within itself.
pub fn no_defer() {
    let (_vm, vcpu) = spinning();
    handle(libc::SIGUSR1, again, libc::SA_NODEFER, &[]);
    Target::me().send(libc::SIGUSR1);
    assert_eq!((handled(), SEEN.load(SeqCst)), (3, 0));
    let sender = Target::me().send_later(libc::SIGUSR1, 10);
    assert_eq!(vcpu.run(), -libc::EINTR);
    sender.join().expect("the sender");
    assert_eq!((handled(), SEEN.load(SeqCst)), (6, 0));
    vcpu.close();
}

extern "C" fn see_mask(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let seen = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP, libc::SIGTERM]
        .iter()
        .fold(0, |seen, &s| seen << 1 | usize::from(blocked(s)));
    SEEN.store(seen, SeqCst);
}

/// In a handler the signal and its mask are blocked, behind it they are not.
pub fn mask_in_handler() {
    let (_vm, vcpu) = spinning();
    handle(libc::SIGUSR1, see_mask, 0, &[libc::SIGUSR2]);
    mask(libc::SIG_BLOCK, &[libc::SIGHUP]);
    for _ in 0..3 {
        SEEN.store(0, SeqCst);
        let sender = Target::me().send_later(libc::SIGUSR1, 5);
        assert_eq!(vcpu.run(), -libc::EINTR);
        sender.join().expect("the sender");
        assert_eq!(SEEN.load(SeqCst), 0b1110);
        let after = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP].map(blocked);
        assert_eq!(after, [false, false, true]);
    }
    let action = action_of(libc::SIGUSR1);
    assert_eq!(action.sa_sigaction, see_mask as *const () as usize);
    assert_eq!(action.sa_flags & !0x0400_0000, libc::SA_SIGINFO);
    // SAFETY: a set that the C library has filled.
    let in_mask = |s| unsafe { libc::sigismember(&action.sa_mask, s) };
    assert_eq!([libc::SIGUSR1, libc::SIGUSR2].map(in_mask), [0, 1]);
    vcpu.close();
}

static ORDER: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];

extern "C" fn note(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    let n = HANDLED.fetch_add(1, SeqCst) as usize;
    // SAFETY: the kernel passes a valid siginfo.
    ORDER[n % 64].store(value_of(unsafe { &*info }), SeqCst);
    stop_next_run();
}

/// Real-time signals arrive all, with what they carry, and in order.
pub fn realtime_queues() {
    let (_vm, vcpu) = spinning();
    RUN.store(vcpu.run as usize, SeqCst);
    let signal = libc::SIGRTMIN() + 3;
    let me = Target::me();
    let mut disorder = 0;
    for flags in [0, libc::SA_NODEFER] {
        handle(signal, note, flags, &[]);
        for round in 0..50 {
            let first = handled();
            let sender = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(round * 100));
                for n in 0..10 {
                    me.queue(signal, 1000 + n);
                }
            });
            loop {
                // Before the look at what has come, so that the last one cannot be missed.
                vcpu.set_immediate_exit(0);
                if handled() >= first + 10 {
                    break;
                }
                assert_eq!(vcpu.run(), -libc::EINTR);
            }
            sender.join().expect("the sender");
            let mut values: Vec<_> = (0..10)
                .map(|n| ORDER[(first as usize + n) % 64].load(SeqCst))
                .collect();
            // With SA_NODEFER handlers interrupt each other and finish in whatever order.
            disorder += u32::from(flags == 0 && !values.is_sorted());
            values.sort_unstable();
            assert!(values.into_iter().eq(1000..1010), "round {round}");
        }
    }
    // One that is queued in the instant in which another is put off can come before it.
    println!("out of order: {disorder} of 50");
    assert!(disorder < 5, "{disorder} of 50 out of order");
    vcpu.close();
}

/// Interval timers, of the process and of the thread.
pub fn timers() {
    let (vm, vcpu) = spinning();
    handle(libc::SIGALRM, count, 0, &[]);
    let interval = libc::timeval {
        tv_sec: 0,
        tv_usec: 3000,
    };
    let every = libc::itimerval {
        it_interval: interval,
        it_value: interval,
    };
    // SAFETY: zeroed structures are valid, and all outlive the calls.
    unsafe {
        libc::setitimer(libc::ITIMER_REAL, &every, std::ptr::null_mut());
        let mut counted = vm.counter();
        for _ in 0..50 {
            assert_eq!(vcpu.run(), -libc::EINTR);
            assert!(vm.counter() >= counted);
            counted = vm.counter();
        }
        libc::setitimer(libc::ITIMER_REAL, &std::mem::zeroed(), std::ptr::null_mut());
        assert!(handled() >= 50);
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGRTMIN();
        event.sigev_notify_thread_id = libc::gettid();
        event.sigev_value.sival_ptr = 77 as *mut c_void;
        handle(libc::SIGRTMIN(), note, 0, &[]);
        HANDLED.store(0, SeqCst);
        let mut timer = std::mem::zeroed();
        let made = libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer);
        assert_eq!(made, 0, "timer_create: {}", errno());
        let interval = libc::timespec {
            tv_sec: 0,
            tv_nsec: 2_000_000,
        };
        let every = libc::itimerspec {
            it_interval: interval,
            it_value: interval,
        };
        libc::timer_settime(timer, 0, &every, std::ptr::null_mut());
        while handled() < 50 {
            assert_eq!(vcpu.run(), -libc::EINTR);
        }
        libc::timer_delete(timer);
        assert!(ORDER[..50].iter().all(|v| v.load(SeqCst) == 77));
    }
    vcpu.close();
}

thread_local! {
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Opens, closes, asks and runs.
extern "C" fn meddle(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    HANDLED.fetch_add(1, SeqCst);
    // SAFETY: the location is the thread's own; the path ends with a zero byte.
    unsafe {
        let before = errno();
        let fd = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        let copy = libc::dup(VCPU.load(SeqCst));
        if !BUSY.replace(true) {
            let mut regs = kvm_bindings::kvm_regs::default();
            let result = ioctl(copy, kvm::GET_REGS, &raw mut regs as u64);
            assert_eq!(result, 0);
            BUSY.set(false);
        }
        libc::close(copy);
        libc::close(fd);
        *libc::__errno_location() = before;
    }
}

/// Signals at any moment, with a handler that makes the same calls as the code that it interrupts.
pub fn storm() {
    handle(libc::SIGUSR1, meddle, libc::SA_RESTART, &[]);
    handle(
        libc::SIGUSR2,
        meddle,
        libc::SA_RESTART | libc::SA_NODEFER,
        &[],
    );
    let (_vm, vcpu) = spinning();
    let me = Target::me();
    let over = std::sync::Arc::new(AtomicBool::new(false));
    let stop = over.clone();
    let sender = std::thread::spawn(move || {
        let mut n = 0u64;
        while !stop.load(SeqCst) {
            n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            me.send(if n >> 40 & 1 == 0 {
                libc::SIGUSR1
            } else {
                libc::SIGUSR2
            });
            std::thread::sleep(Duration::from_nanos(n >> 33 & 0x1_ffff));
        }
    });
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed() < Duration::from_secs(4) {
        rounds += 1;
        match rounds % 6 {
            0 => assert!([0, -libc::EINTR].contains(&vcpu.run())),
            1 => drop(vcpu.regs()),
            2 => {
                // SAFETY: a descriptor of this case's own.
                close(unsafe { libc::dup(vcpu.fd) });
            }
            3 => handle(libc::SIGUSR1, meddle, libc::SA_RESTART, &[]),
            4 => close(kvm::open()),
            _ if rounds % 60 == 5 => {
                let other = Vm::new(OUT_HLT);
                let own = other.vcpu(0);
                let result = own.run();
                assert!([0, -libc::EINTR].contains(&result), "{result}");
                own.close();
            }
            _ if rounds % 90 == 11 => crate::process::in_child(|| {}),
            _ => {}
        }
    }
    over.store(true, SeqCst);
    sender.join().expect("the sender");
    println!("{rounds} rounds, {} signals", handled());
    assert!(handled() > 100);
    assert!(!blocked(libc::SIGUSR1) && !blocked(libc::SIGUSR2));
    vcpu.close();
}

/// Where the vCPU's mapping is, for handlers that stop it.
static RUN: AtomicUsize = AtomicUsize::new(0);

fn stop_next_run() {
    let run = RUN.load(SeqCst);
    if run != 0 {
        let vcpu = Vcpu {
            fd: -1,
            run: run as *mut _,
        };
        vcpu.set_immediate_exit(1);
    }
}

extern "C" fn set_immediate_exit(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    HANDLED.fetch_add(1, SeqCst);
    stop_next_run();
}

/// How VMMs stop a vCPU without a race: the handler sets immediate_exit.
pub fn handler_calls_back() {
    let vm = Vm::new(DOWN_OUT);
    let vcpu = vm.vcpu(0);
    RUN.store(vcpu.run as usize, SeqCst);
    handle(libc::SIGUSR1, set_immediate_exit, 0, &[]);
    for n in 0..200 {
        vm.set_counter(u32::MAX);
        vcpu.reset();
        let me = Target::me();
        let sender = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(n * 5));
            me.send(libc::SIGUSR1);
        });
        assert_eq!(vcpu.run(), -libc::EINTR);
        sender.join().expect("the sender");
        assert_eq!(u64::from(handled()), n + 1);
        // The completion of nothing: still no guest code.
        assert_eq!(vcpu.run(), -libc::EINTR);
        vcpu.set_immediate_exit(0);
    }
    vm.set_counter(1);
    assert_eq!(vcpu.run(), 0);
    assert_eq!(vcpu.reason(), EXIT_IO);
    vcpu.close();
}

extern "C" fn count_plain(_: c_int) {
    HANDLED.fetch_add(1, SeqCst);
}

/// signal() and siginterrupt().
pub fn bsd_signal() {
    unsafe extern "C" {
        fn siginterrupt(signal: c_int, interrupt: c_int) -> c_int;
        fn sigset(signal: c_int, handler: usize) -> usize;
    }
    let (_vm, vcpu) = spinning();
    let handler = count_plain as *const () as usize;
    // SAFETY: the handler has the right type.
    unsafe {
        assert_eq!(libc::signal(libc::SIGUSR1, handler), libc::SIG_DFL);
        assert_eq!(libc::signal(libc::SIGUSR1, handler), handler);
    }
    assert_ne!(action_of(libc::SIGUSR1).sa_flags & libc::SA_RESTART, 0);
    let sender = Target::me().send_later(libc::SIGUSR1, 5);
    assert_eq!(vcpu.run(), -libc::EINTR);
    sender.join().expect("the sender");
    assert_eq!(handled(), 1);
    // SAFETY: as above.
    unsafe {
        assert_eq!(siginterrupt(libc::SIGUSR1, 1), 0);
        assert_eq!(action_of(libc::SIGUSR1).sa_flags & libc::SA_RESTART, 0);
        assert_eq!(action_of(libc::SIGUSR1).sa_sigaction, handler);
        assert_eq!(sigset(libc::SIGUSR2, handler), libc::SIG_DFL);
        assert_eq!(sigset(libc::SIGUSR2, handler), handler);
    }
    for signal in [libc::SIGUSR1, libc::SIGUSR2] {
        let before = handled();
        let sender = Target::me().send_later(signal, 5);
        assert_eq!(vcpu.run(), -libc::EINTR);
        sender.join().expect("the sender");
        assert_eq!(handled(), before + 1);
    }
    vcpu.close();
}

static PAGE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn make_accessible(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo; the page is the case's.
    unsafe {
        let page = PAGE.load(SeqCst);
        assert_eq!((*info).si_addr() as usize & !0xfff, page);
        SEEN.store(
            usize::from(blocked(libc::SIGSEGV)) << 1 | usize::from(blocked(libc::SIGUSR2)),
            SeqCst,
        );
        assert_eq!(
            libc::mprotect(
                page as *mut c_void,
                4096,
                libc::PROT_READ | libc::PROT_WRITE
            ),
            0
        );
    }
    HANDLED.fetch_add(1, SeqCst);
}

/// The program's own handlers of faults work, whenever they were installed.
pub fn faults() {
    let page = kvm::map_anonymous(4096);
    PAGE.store(page as usize, SeqCst);
    let touch = || {
        // SAFETY: the page is this case's, and the handler makes it accessible.
        unsafe {
            libc::mprotect(page.cast(), 4096, libc::PROT_NONE);
            page.write_volatile(1);
        }
    };
    handle(libc::SIGSEGV, make_accessible, 0, &[libc::SIGUSR2]);
    touch();
    assert_eq!((handled(), SEEN.load(SeqCst)), (1, 3));
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    assert_eq!(vcpu.run(), 0);
    touch();
    assert_eq!((handled(), SEEN.load(SeqCst)), (2, 3));
    assert_eq!(
        action_of(libc::SIGSEGV).sa_sigaction,
        make_accessible as *const () as usize
    );
    handle(libc::SIGSEGV, make_accessible, libc::SA_NODEFER, &[]);
    touch();
    assert_eq!((handled(), SEEN.load(SeqCst)), (3, 0));
    assert!(!blocked(libc::SIGSEGV) && !blocked(libc::SIGUSR2));
    // Sent, not raised.
    handle(libc::SIGFPE, count, 0, &[]);
    Target::me().send(libc::SIGFPE);
    assert_eq!(handled(), 4);
    set_action(libc::SIGFPE, libc::SIG_IGN, 0, &[]);
    Target::me().send(libc::SIGFPE);
    // The engine still works.
    let vm = Vm::new(SPIN);
    let other = vm.vcpu(0);
    handle(libc::SIGUSR1, count, 0, &[]);
    let sender = Target::me().send_later(libc::SIGUSR1, 5);
    assert_eq!(other.run(), -libc::EINTR);
    sender.join().expect("the sender");
    other.close();
    vcpu.close();
}

/// A fault that nobody handles ends the program, and so does a signal of that number.
pub fn unhandled_fault() {
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    assert_eq!(vcpu.run(), 0);
    for signal in [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGILL,
        libc::SIGTERM,
    ] {
        for raised in [true, false] {
            // SAFETY: the child is killed by its own signal.
            let child = unsafe { libc::fork() };
            if child == 0 {
                set_action(signal, libc::SIG_DFL, 0, &[]);
                if raised && signal == libc::SIGSEGV {
                    let page = kvm::map_anonymous(4096);
                    // SAFETY: what follows is meant to fault.
                    unsafe {
                        libc::mprotect(page.cast(), 4096, libc::PROT_NONE);
                        page.write_volatile(1);
                    }
                }
                Target::me().send(signal);
                std::process::exit(0);
            }
            assert_eq!(libc::WTERMSIG(status_of(child)), signal);
        }
    }
    assert!(take(libc::SIGCHLD).is_none());
    vcpu.close();
}
