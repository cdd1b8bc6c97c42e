//! System calls that the standard library does not offer, for the runner itself.
#![expect(unsafe_code, reason = "system calls")]

use std::ffi::{CStr, CString};
use std::path::Path;

/// What a clock counts.
#[derive(Debug, Clone, Copy)]
pub enum Clock {
    /// Time that only goes forward.
    Monotonic,
    /// Time of day.
    Realtime,
    /// Time since the machine was switched on.
    SinceBoot,
}

/// Nanoseconds of `clock`.
pub fn now(clock: Clock) -> u64 {
    let id = match clock {
        Clock::Monotonic => libc::CLOCK_MONOTONIC,
        Clock::Realtime => libc::CLOCK_REALTIME,
        Clock::SinceBoot => libc::CLOCK_BOOTTIME,
    };
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a timespec to write to.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000
        + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Runs `work` in a child process; returns how it failed, `None` if it did not.
///
/// # Errors
/// If there can be no child.
pub fn in_child(work: impl FnOnce()) -> Result<Option<String>, String> {
    in_children([work])
}

/// Runs each of `works` in a child process of its own, at the same time; returns how the first of
/// them failed, which ends the others, `None` if none did. There must be no other children.
///
/// # Errors
/// If there can be no child.
pub fn in_children<const N: usize>(works: [impl FnOnce(); N]) -> Result<Option<String>, String> {
    let mut children = Vec::with_capacity(N);
    for work in works {
        // SAFETY: this program has one thread, so the child may do whatever the parent may.
        match unsafe { libc::fork() } {
            -1 => {
                let why = format!("fork: {}", std::io::Error::last_os_error());
                end(&children);
                return Err(why);
            }
            0 => {
                work();
                std::process::exit(0)
            }
            child => children.push(child),
        }
    }
    let mut first = None;
    while !children.is_empty() {
        let mut status = 0;
        // SAFETY: `status` is an int to write to.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended == -1 {
            return Ok(first.or(Some("its process was lost".into())));
        }
        children.retain(|&child| child != ended);
        if let Some(why) = failure(status)
            && first.is_none()
        {
            first = Some(why);
            end(&children);
        }
    }
    Ok(first)
}

fn end(children: &[i32]) {
    for &child in children {
        // SAFETY: changes no memory; the child has not been waited for, so the number is its own.
        unsafe { libc::kill(child, libc::SIGKILL) };
    }
}

/// How a process with this status failed.
fn failure(status: i32) -> Option<String> {
    if libc::WIFSIGNALED(status) {
        Some(match libc::WTERMSIG(status) {
            libc::SIGALRM => "took too long".into(),
            signal => format!("ended by signal {signal}"),
        })
    } else if libc::WEXITSTATUS(status) != 0 {
        Some(format!("ended with code {}", libc::WEXITSTATUS(status)))
    } else {
        None
    }
}

/// Binds this thread to one CPU.
///
/// # Errors
/// If there is no such CPU.
pub fn bind_to_cpu(cpu: usize) -> std::io::Result<()> {
    // SAFETY: all zeros is an empty set of CPUs.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
    };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Ends this process after so many seconds.
pub fn end_after(seconds: u32) {
    // SAFETY: changes no memory.
    unsafe { libc::alarm(seconds) };
}

/// Mounts what the workloads use.
pub fn prepare_guest() {
    for (kind, directory) in [
        (c"devtmpfs", c"/dev"),
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"tmpfs", c"/tmp"),
        (c"tmpfs", c"/dev/shm"),
    ] {
        mount(kind, directory);
    }
}

/// Makes `directory` this process's root directory, with an empty `/tmp` in memory and the host's
/// `/dev`, in a user namespace of its own: needs no privilege. This process must have one thread.
///
/// # Errors
/// What the host refuses; then nothing has changed that matters here.
pub fn enter_root(directory: &Path) -> std::io::Result<()> {
    let check = |result: i32| match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    let path = |name: &str| {
        let full = directory.join(name);
        std::fs::create_dir_all(&full)?;
        CString::new(full.into_os_string().into_encoded_bytes()).map_err(std::io::Error::other)
    };
    let (root, tmp, dev) = (path("")?, path("tmp")?, path("dev")?);
    // SAFETY: neither has arguments in memory.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    // SAFETY: the process has one thread.
    check(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) })?;
    // Without this a group cannot be mapped (user_namespaces(7)).
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    // SAFETY: all are strings that live long enough.
    unsafe {
        check(libc::mount(
            c"/dev".as_ptr(),
            dev.as_ptr(),
            std::ptr::null(),
            libc::MS_BIND | libc::MS_REC,
            std::ptr::null(),
        ))?;
        check(libc::mount(
            c"tmpfs".as_ptr(),
            tmp.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            std::ptr::null(),
        ))?;
        check(libc::chroot(root.as_ptr()))?;
    }
    std::env::set_current_dir("/")
}

fn mount(kind: &CStr, directory: &CStr) {
    // SAFETY: all are strings that live long enough.
    let result = unsafe {
        libc::mkdir(directory.as_ptr(), 0o755);
        libc::mount(
            kind.as_ptr(),
            directory.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if result != 0 {
        eprintln!(
            "bench_guest: cannot mount {directory:?}: {}",
            std::io::Error::last_os_error()
        );
    }
}

/// Switches the machine off.
pub fn power_off() {
    // SAFETY: changes no memory of this process.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    // A machine without a switch: process 1 must not end, or the kernel panics.
    loop {
        std::thread::sleep(std::time::Duration::from_secs(3600));
    }
}
