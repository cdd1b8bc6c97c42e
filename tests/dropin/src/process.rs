//! What a process can see of itself, and what it does with children.

use crate::kvm::errno;
use libc::c_int;
use std::time::{Duration, Instant};

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).map_or(0, Iterator::count)
}

/// Open descriptors.
pub fn descriptors() -> usize {
    entries("/proc/self/fd")
}

/// Threads.
pub fn threads() -> usize {
    entries("/proc/self/task")
}

/// Mappings.
pub fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").map_or(0, |text| text.lines().count())
}

/// KiB of memory in use.
pub fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next())
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not within ten seconds.
pub fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "waited in vain: {what}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `work` in a child of fork.
///
/// # Panics
/// If the child does not end as it should.
pub fn in_child(work: impl FnOnce()) {
    // SAFETY: the child does what the case tests, and ends without running anything of the parent's.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: error {}", errno());
    if child == 0 {
        work();
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }
    assert_eq!(status_of(child), 0, "the child failed");
}

/// How a child ended, as waitpid says it.
pub fn status_of(child: c_int) -> c_int {
    let mut status = 0;
    // SAFETY: the status outlives the call.
    while unsafe { libc::waitpid(child, &mut status, 0) } < 0 {
        assert_eq!(errno(), libc::EINTR, "waitpid: error {}", errno());
    }
    status
}
