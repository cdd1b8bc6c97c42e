//! Work of the kernel: system calls, page faults, processes, signals.
#![expect(unsafe_code, reason = "system calls are what is measured")]

use std::ffi::CString;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::random::mix;
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 12] = [
    (
        "getppid",
        Class::Kernel,
        "the smallest system call",
        getppid,
    ),
    ("clock", Class::Kernel, "reads the clock by the vDSO", clock),
    (
        "page_fault",
        Class::Kernel,
        "maps, touches and unmaps 16 MiB",
        page_fault,
    ),
    (
        "mmap",
        Class::Kernel,
        "mmap, mprotect and munmap of untouched pages",
        mmap,
    ),
    (
        "fork",
        Class::Kernel,
        "fork and wait, of a process with 32 MiB",
        fork,
    ),
    ("exec", Class::Kernel, "fork, execve and wait", exec),
    (
        "pipe",
        Class::Kernel,
        "a byte to and fro between two processes",
        pipe,
    ),
    (
        "socket",
        Class::Kernel,
        "1 KiB to and fro on a local socket",
        socket,
    ),
    (
        "open_stat",
        Class::Kernel,
        "stat, open, fstat and close of a file",
        open_stat,
    ),
    (
        "file",
        Class::Kernel,
        "writes and reads a file in memory, 4 KiB at a time",
        file,
    ),
    (
        "signal",
        Class::Kernel,
        "a signal to itself, with a handler",
        signal,
    ),
    (
        "yield",
        Class::Kernel,
        "two processes that yield to each other",
        yields,
    ),
];

/// What failed, with the system's reason.
fn failed(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

/// Ends the workload's process: the runner reports it as failed.
fn give_up(what: &str) -> ! {
    eprintln!("bench_guest: {}", failed(what));
    std::process::exit(3)
}

fn getppid(size: Size) -> Result<Task, String> {
    let count = size.of(400_000);
    Ok(Box::new(move || {
        // SAFETY: getppid changes nothing.
        let first = unsafe { libc::getppid() };
        // SAFETY: as above.
        (0..count)
            .map(|_| u64::from(unsafe { libc::getppid() } == first))
            .sum()
    }))
}

fn clock(size: Size) -> Result<Task, String> {
    let count = size.of(2_000_000);
    Ok(Box::new(move || {
        let mut last = 0;
        let mut backwards = 0;
        for _ in 0..count {
            let now = crate::sys::now(crate::sys::Clock::Monotonic);
            backwards += u64::from(now < last);
            last = now;
        }
        backwards
    }))
}

/// New memory of the process; null if there is none.
fn map(length: usize, protection: i32) -> *mut u8 {
    // SAFETY: makes a new mapping and changes none.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        give_up("mmap");
    }
    memory.cast()
}

fn page_fault(size: Size) -> Result<Task, String> {
    const LENGTH: usize = 16 << 20;
    let rounds = size.of(8);
    Ok(Box::new(move || {
        let mut pages = 0;
        for _ in 0..rounds {
            let memory = map(LENGTH, libc::PROT_READ | libc::PROT_WRITE);
            // SAFETY: the mapping is this long and is used here only. Huge pages would leave next
            // to nothing to measure, and only some machines have them.
            unsafe {
                libc::madvise(memory.cast(), LENGTH, libc::MADV_NOHUGEPAGE);
                for page in (0..LENGTH).step_by(4096) {
                    memory.add(page).write_volatile(1);
                    pages += 1;
                }
                libc::munmap(memory.cast(), LENGTH);
            }
        }
        pages
    }))
}

fn mmap(size: Size) -> Result<Task, String> {
    const LENGTH: usize = 64 << 10;
    let rounds = size.of(15_000);
    Ok(Box::new(move || {
        let mut done = 0;
        for _ in 0..rounds {
            let memory = map(LENGTH, libc::PROT_NONE);
            // SAFETY: the mapping is this long and is used here only.
            unsafe {
                let changed = libc::mprotect(memory.cast(), 4096, libc::PROT_READ);
                done += u64::from(changed == 0 && libc::munmap(memory.cast(), LENGTH) == 0);
            }
        }
        done
    }))
}

/// Forks; the child runs `child` and ends with the code that it returns.
fn start(child: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the process has one thread.
    match unsafe { libc::fork() } {
        -1 => give_up("fork"),
        0 => {
            let code = child();
            // SAFETY: ends the process; there is nothing to clean up.
            unsafe { libc::_exit(code) }
        }
        pid => pid,
    }
}

/// Waits for a child; returns its exit code.
fn wait(pid: i32) -> u64 {
    let mut status = 0;
    // SAFETY: `status` is an int to write to.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } != pid {
        give_up("waitpid");
    }
    libc::WEXITSTATUS(status).unsigned_abs().into()
}

fn fork(size: Size) -> Result<Task, String> {
    let memory = vec![1u8; 32 << 20];
    let count = size.of(60);
    Ok(Box::new(move || {
        let code = i32::from(memory[count as usize * 4096]);
        (0..count).map(|_| wait(start(|| code))).sum()
    }))
}

fn exec(size: Size) -> Result<Task, String> {
    let path = std::env::current_exe().map_err(|e| format!("own path: {e}"))?;
    let path = CString::new(path.into_os_string().into_encoded_bytes())
        .map_err(|_| "own path has a zero".to_owned())?;
    let count = size.of(120);
    Ok(Box::new(move || {
        let arguments = [path.as_ptr(), c"nothing".as_ptr(), ptr::null()];
        (0..count)
            .map(|_| {
                wait(start(|| {
                    // SAFETY: strings and a list that ends with null.
                    unsafe { libc::execv(path.as_ptr(), arguments.as_ptr()) };
                    9
                }))
            })
            .sum()
    }))
}

/// Two ends to write to and read from.
fn pair(socket: bool) -> [[i32; 2]; 2] {
    let mut ends = [[0; 2]; 2];
    // SAFETY: each array has room for the two descriptors.
    let result = unsafe {
        if socket {
            let mut both = [0; 2];
            let result = libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, both.as_mut_ptr());
            ends = [[both[0], both[1]], [both[1], both[0]]];
            result
        } else {
            libc::pipe(ends[0].as_mut_ptr()) | libc::pipe(ends[1].as_mut_ptr())
        }
    };
    if result != 0 {
        give_up("pipe");
    }
    ends
}

fn transfer(write: bool, fd: i32, buffer: &mut [u8]) {
    // SAFETY: the buffer is this long.
    let length = unsafe {
        if write {
            libc::write(fd, buffer.as_ptr().cast(), buffer.len())
        } else {
            libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len())
        }
    };
    if usize::try_from(length) != Ok(buffer.len()) {
        give_up("read or write");
    }
}

fn ping_pong(size: Size, socket: bool, length: usize, rounds: u32) -> Task {
    let rounds = size.of(rounds);
    Box::new(move || {
        // Each end is [to read from, to write to]; for sockets both are the same.
        let [there, back] = pair(socket);
        let (mine, theirs) = if socket {
            ([there[0], there[0]], [there[1], there[1]])
        } else {
            ([back[0], there[1]], [there[0], back[1]])
        };
        let child = start(|| {
            let mut buffer = vec![0; length];
            for _ in 0..rounds {
                transfer(false, theirs[0], &mut buffer);
                buffer[0] = buffer[0].wrapping_add(1);
                transfer(true, theirs[1], &mut buffer);
            }
            0
        });
        let mut buffer = vec![0; length];
        for _ in 0..rounds {
            transfer(true, mine[1], &mut buffer);
            transfer(false, mine[0], &mut buffer);
        }
        let mut descriptors = [there, back].concat();
        descriptors.sort_unstable();
        descriptors.dedup();
        for fd in descriptors {
            // SAFETY: the descriptors are this function's own.
            unsafe { libc::close(fd) };
        }
        mix(wait(child), u64::from(buffer[0]))
    })
}

fn pipe(size: Size) -> Result<Task, String> {
    Ok(ping_pong(size, false, 1, 10_000))
}

fn socket(size: Size) -> Result<Task, String> {
    Ok(ping_pong(size, true, 1024, 8_000))
}

/// A new file in a file system in memory.
fn scratch(length: usize) -> Result<(CString, std::fs::File), String> {
    let path = format!("/dev/shm/anykvm-bench-{}", std::process::id());
    std::fs::write(&path, vec![7; length]).map_err(|e| format!("cannot write {path}: {e}"))?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|e| format!("cannot open {path}: {e}"))?;
    let name = CString::new(path).map_err(|e| e.to_string())?;
    Ok((name, file))
}

/// Removes a file at the end of a workload.
struct Remove(CString);

impl Drop for Remove {
    fn drop(&mut self) {
        // SAFETY: a string.
        unsafe { libc::unlink(self.0.as_ptr()) };
    }
}

fn open_stat(size: Size) -> Result<Task, String> {
    let path = Remove(scratch(100)?.0);
    let count = size.of(20_000);
    Ok(Box::new(move || {
        let mut sum = 0;
        for _ in 0..count {
            // SAFETY: all zeros is a `stat`, and the calls get it, a string and a descriptor.
            unsafe {
                let mut info: libc::stat = std::mem::zeroed();
                libc::stat(path.0.as_ptr(), &raw mut info);
                sum += info.st_size.unsigned_abs();
                let fd = libc::open(path.0.as_ptr(), libc::O_RDONLY);
                libc::fstat(fd, &raw mut info);
                sum += info.st_size.unsigned_abs() + u64::from(libc::close(fd) == 0);
            }
        }
        sum
    }))
}

fn file(size: Size) -> Result<Task, String> {
    use std::os::unix::fs::FileExt;
    const LENGTH: u64 = 1 << 20;
    let (path, file) = scratch(LENGTH as usize)?;
    let path = Remove(path);
    let rounds = size.of(80);
    Ok(Box::new(move || {
        let _ = &path;
        let mut sum = 0;
        let mut buffer = [0u8; 4096];
        for round in 0..rounds {
            for at in (0..LENGTH).step_by(4096) {
                let page = [round as u8; 4096];
                if file.write_all_at(&page, at).is_err()
                    || file.read_exact_at(&mut buffer, at).is_err()
                {
                    give_up("file");
                }
                sum += u64::from(buffer[4095]);
            }
        }
        sum
    }))
}

fn signal(size: Size) -> Result<Task, String> {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handler(_: i32) {
        SEEN.fetch_add(1, Ordering::Relaxed);
    }
    let count = size.of(30_000);
    Ok(Box::new(move || {
        let before = SEEN.load(Ordering::Relaxed);
        // SAFETY: the handler only counts.
        unsafe {
            libc::signal(libc::SIGUSR1, handler as *const () as libc::sighandler_t);
            for _ in 0..count {
                libc::raise(libc::SIGUSR1);
            }
        }
        SEEN.load(Ordering::Relaxed) - before
    }))
}

fn yields(size: Size) -> Result<Task, String> {
    let count = size.of(30_000);
    let both = move || {
        for _ in 0..count {
            // SAFETY: changes nothing.
            unsafe { libc::sched_yield() };
        }
        5
    };
    Ok(Box::new(move || {
        // On one CPU, or they would run side by side on a machine with more.
        // A host may refuse that CPU.
        let _ = crate::sys::bind_to_cpu(0);
        let child = start(both);
        both();
        wait(child)
    }))
}
