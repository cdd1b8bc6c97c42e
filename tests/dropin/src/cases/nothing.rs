//! What the library costs a program that has nothing to do with KVM.

use crate::kvm;
use crate::process::{descriptors, threads};
use crate::signal::{action_of, handle};
use libc::{c_int, c_void, siginfo_t};
use std::time::Instant;

extern "C" fn handler(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// What the kernel has for a signal's handler.
fn in_kernel(signal: c_int) -> usize {
    let mut action = [0usize; 4];
    // SAFETY: the structure is as the kernel has it.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            std::ptr::null::<usize>(),
            action.as_mut_ptr(),
            8,
        )
    };
    action[0]
}

/// No thread, no descriptor, no handler.
pub fn nothing_opened() {
    assert_eq!(threads(), 1);
    // Ours are of memory or have no file.
    let ours = || {
        let links = std::fs::read_dir("/proc/self/fd").expect("/proc");
        let targets = links.filter_map(|l| std::fs::read_link(l.ok()?.path()).ok());
        let ours = |t: &std::path::PathBuf| {
            t.starts_with("anon_inode:") || t.to_string_lossy().contains("memfd:")
        };
        targets.filter(ours).count()
    };
    assert_eq!(ours(), 0);
    let fds = descriptors();
    handle(libc::SIGUSR1, handler, 0, &[]);
    assert_eq!(in_kernel(libc::SIGUSR1), handler as *const () as usize);
    for signal in 1..=64 {
        // Rust's own are there from the start; nobody else's.
        if ![
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGPIPE,
            libc::SIGUSR1,
            32,
            33,
        ]
        .contains(&signal)
        {
            // What was ignored by whoever started this still is.
            let action = in_kernel(signal);
            assert!(
                [libc::SIG_DFL, libc::SIG_IGN].contains(&action),
                "signal {signal}: {action:#x}"
            );
        }
    }
    assert_eq!(
        action_of(libc::SIGUSR1).sa_sigaction,
        handler as *const () as usize
    );
    // Looking is not opening.
    // SAFETY: the path ends with a zero byte.
    assert_eq!(unsafe { libc::access(c"/dev/kvm".as_ptr(), libc::R_OK) }, 0);
    assert_eq!((threads(), descriptors(), ours()), (1, fds, 0));
}

fn time(what: &str, mut call: impl FnMut()) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        for _ in 0..2000 {
            call();
        }
        best = best.min(start.elapsed().as_nanos() as f64 / 2000.0);
    }
    println!("{what}: {best:.0} ns");
    best
}

/// Prints what calls cost that are not KVM's, before and after `/dev/kvm` has been opened, beside the bare system
/// call.
pub fn cost() {
    let path = c"/dev/null".as_ptr();
    // SAFETY: everything outlives the calls.
    unsafe {
        let null = libc::open(path, libc::O_RDWR);
        let mut word = 0u32;
        let mut stat: libc::stat = std::mem::zeroed();
        let ioctl = libc::TIOCGPTN;
        for state in ["never opened", "/dev/kvm open"] {
            println!("{state}:");
            time("  open+close", || {
                libc::close(libc::open(path, libc::O_RDWR));
            });
            time("  open+close, system calls", || {
                let fd = libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, libc::O_RDWR);
                libc::syscall(libc::SYS_close, fd);
            });
            time("  ioctl", || {
                libc::ioctl(null, ioctl, &raw mut word);
            });
            time("  ioctl, system call", || {
                libc::syscall(libc::SYS_ioctl, null, ioctl, &raw mut word);
            });
            time("  fstat", || {
                libc::fstat(null, &mut stat);
            });
            time("  fstat, system call", || {
                libc::syscall(libc::SYS_fstat, null, &raw mut stat);
            });
            kvm::open();
        }
    }
}
