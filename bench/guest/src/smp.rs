//! How much more two CPUs compute than one: a workload once alone, then twice side by side, in turn
//! and in the same machine.
//!
//! The two copies are processes, or threads of one process. In a guest each is bound to a CPU of its
//! own; natively the host's scheduler places them, as it places the threads of virtual CPUs. A copy
//! that has nothing to do sleeps, so that its CPU is idle.
#![expect(unsafe_code, reason = "memory and a barrier shared by processes")]

use std::cell::UnsafeCell;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::random::mix;
use crate::suite::{self, ENOUGH, Options, Size, Task};
use crate::sys::{self, Clock};

/// How many CPUs compute at once.
const COPIES: usize = 2;
/// Repetitions of which the times can be kept.
const MOST_REPETITIONS: usize = 64;
/// A workload that takes longer is ended, in seconds.
const LIMIT: u32 = 180;

/// What the copies have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Nothing: two processes.
    Processes,
    /// The address space: two threads that compute for themselves.
    Threads,
    /// Data too: two threads that change the same words.
    Shared,
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Self::Processes => "processes",
            Self::Threads => "threads",
            Self::Shared => "shared",
        }
    }
}

/// Prepares a copy; each repetition of it does the same amount of work.
type Prepare = fn(Size) -> Result<Task, String>;

struct Workload {
    name: &'static str,
    class: Class,
    about: &'static str,
    prepare: Prepare,
}

/// Workloads of `user` that are run as processes, and as threads under another name.
const PROCESSES: [&str; 8] = [
    "quicksort",
    "sha256",
    "lz",
    "trees",
    "interpreter",
    "virtual",
    "matmul",
    "nbody",
];
const THREADS: [(&str, &str); 4] = [
    ("sha256", "sha256_threads"),
    ("trees", "trees_threads"),
    ("interpreter", "interpreter_threads"),
    ("nbody", "nbody_threads"),
];
const SHARED: [(&str, &str, Prepare); 2] = [
    (
        "shared_queue",
        "takes small pieces of work by an atomic counter, writes results side by side",
        shared_queue,
    ),
    (
        "shared_mutex",
        "changes a table behind a mutex between pieces of work",
        shared_mutex,
    ),
];

fn all() -> Vec<Workload> {
    let suite = suite::all();
    let find = |name: &str| suite.iter().find(|w| w.name == name);
    let processes = PROCESSES.into_iter().filter_map(|name| {
        let base = find(name)?;
        Some(Workload {
            name,
            class: Class::Processes,
            about: base.about,
            prepare: base.prepare,
        })
    });
    let threads = THREADS.into_iter().filter_map(|(base, name)| {
        let base = find(base)?;
        Some(Workload {
            name,
            class: Class::Threads,
            about: base.about,
            prepare: base.prepare,
        })
    });
    let shared = SHARED.map(|(name, about, prepare)| Workload {
        name,
        class: Class::Shared,
        about,
        prepare,
    });
    processes.chain(threads).chain(shared).collect()
}

/// Names the workloads.
pub fn list() {
    for workload in all() {
        println!(
            "{:<20} {:<10} {}",
            workload.name,
            workload.class.name(),
            workload.about
        );
    }
}

/// Runs the workloads that `options` names. `bind`: each copy on a CPU of its own.
///
/// # Errors
/// If a name is not known, there are not enough CPUs, or no process can be made.
pub fn run(options: &Options, bind: bool) -> Result<(), String> {
    let all = all();
    let has = |w: &Workload, name: &String| w.name == name || w.class.name() == name;
    for name in &options.only {
        if !all.iter().any(|w| has(w, name)) {
            return Err(format!("there is no workload or class '{name}'"));
        }
    }
    if std::thread::available_parallelism().map_or(1, usize::from) < COPIES {
        return Err(format!("smp needs {COPIES} CPUs"));
    }
    suite::clock_record("start");
    for workload in &all {
        if options.only.is_empty() || options.only.iter().any(|name| has(workload, name)) {
            let board = Board::new()?;
            let how = How {
                workload,
                options,
                bind,
                board,
            };
            match how.run()? {
                None => how.report(),
                Some(why) => how.failed(&why),
            }
        }
    }
    suite::clock_record("end");
    Ok(())
}

/// What one copy did at one time: nanoseconds of the clock, and the checksum.
#[derive(Default)]
struct Slot {
    start: AtomicU64,
    end: AtomicU64,
    sum: AtomicU64,
}

/// A repetition.
#[derive(Default)]
struct Repetition {
    alone: Slot,
    together: [Slot; COPIES],
}

impl Repetition {
    fn alone(&self) -> u64 {
        let [start, end] = [&self.alone.start, &self.alone.end].map(load);
        end.saturating_sub(start)
    }

    /// From the first copy's start to the last one's end.
    fn together(&self) -> u64 {
        let start = self.together.iter().map(|slot| load(&slot.start)).min();
        let end = self.together.iter().map(|slot| load(&slot.end)).max();
        end.unwrap_or(0).saturating_sub(start.unwrap_or(0))
    }
}

fn load(value: &AtomicU64) -> u64 {
    value.load(Ordering::SeqCst)
}

/// What the copies share, in memory of all their processes.
struct Board {
    barrier: UnsafeCell<libc::pthread_barrier_t>,
    lined_up: AtomicU64,
    repetitions: [Repetition; MOST_REPETITIONS],
}

// SAFETY: the barrier is made for several threads; the rest is atomic.
unsafe impl Sync for Board {}

impl Board {
    /// It is never unmapped: there are few, and they are small.
    fn new() -> Result<&'static Self, String> {
        // SAFETY: makes a new mapping and changes none.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<Self>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(format!("mmap: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: the mapping is as large, aligned to a page and zero, which is a value of every
        // field, and it stays.
        let board = unsafe { &*memory.cast::<Self>() };
        let mut attributes = std::mem::MaybeUninit::uninit();
        // SAFETY: each call gets what it is to initialize, or what was initialized before it.
        let result = unsafe {
            libc::pthread_barrierattr_init(attributes.as_mut_ptr())
                | libc::pthread_barrierattr_setpshared(
                    attributes.as_mut_ptr(),
                    libc::PTHREAD_PROCESS_SHARED,
                )
                | libc::pthread_barrier_init(
                    board.barrier.get(),
                    attributes.as_ptr(),
                    COPIES as u32,
                )
        };
        match result {
            0 => Ok(board),
            _ => Err("there can be no barrier for processes".into()),
        }
    }

    /// Sleeps until all copies are here.
    fn meet(&self) {
        // SAFETY: the barrier is initialized and never destroyed.
        unsafe { libc::pthread_barrier_wait(self.barrier.get()) };
    }

    /// Waits, without sleep, until all copies have come here so many times: they go on within the
    /// time of a cache line's way.
    fn line_up(&self, times: usize) {
        self.lined_up.fetch_add(1, Ordering::SeqCst);
        while load(&self.lined_up) < (times * COPIES) as u64 {
            std::hint::spin_loop();
        }
    }
}

/// A workload, and how it is run.
#[derive(Clone, Copy)]
struct How<'a> {
    workload: &'a Workload,
    options: &'a Options,
    bind: bool,
    board: &'static Board,
}

impl How<'_> {
    /// Runs both copies; says how they failed.
    fn run(self) -> Result<Option<String>, String> {
        if self.workload.class == Class::Processes {
            let copies = [0, 1].map(|me| move || self.copy(me));
            return sys::in_children(copies);
        }
        sys::in_child(|| {
            std::thread::scope(|scope| {
                scope.spawn(|| self.copy(1));
                self.copy(0);
            });
        })
    }

    fn copy(&self, me: usize) {
        sys::end_after(LIMIT);
        if self.bind
            && let Err(why) = sys::bind_to_cpu(me)
        {
            eprintln!("bench_guest: no CPU {me}: {why}");
            std::process::exit(3);
        }
        let mut task = match (self.workload.prepare)(self.options.size()) {
            Ok(task) => task,
            Err(why) => {
                eprintln!("bench_guest: {why}");
                std::process::exit(3);
            }
        };
        let mut timed = |slot: &Slot| {
            slot.start
                .store(sys::now(Clock::Monotonic), Ordering::SeqCst);
            let sum = task();
            slot.end.store(sys::now(Clock::Monotonic), Ordering::SeqCst);
            slot.sum.store(sum, Ordering::SeqCst);
        };
        // On each CPU once before it counts: a translator translates, caches fill.
        self.board.meet();
        timed(&Slot::default());
        for (number, repetition) in self.repetitions().enumerate() {
            self.board.meet();
            // All copies read the same: what earlier repetitions wrote.
            if self.repetitions().map(Repetition::alone).sum::<u64>() > ENOUGH / 2 {
                break;
            }
            self.board.meet();
            if me == number % COPIES {
                timed(&repetition.alone);
            }
            self.board.meet();
            self.board.line_up(number + 1);
            timed(&repetition.together[me]);
        }
    }

    /// Those that may have been run.
    fn repetitions(&self) -> impl Iterator<Item = &'static Repetition> {
        let count = self.options.repetitions as usize;
        self.board.repetitions.iter().take(count)
    }

    fn report(&self) {
        let done: Vec<&Repetition> = self.repetitions().filter(|r| r.alone() > 0).collect();
        let sum = done.first().map_or(0, |first| load(&first.alone.sum));
        let right = |repetition: &&Repetition| {
            let both = repetition.together.iter().map(|slot| load(&slot.sum));
            load(&repetition.alone.sum) == sum
                && both.fold(0, u64::wrapping_add) == sum.wrapping_mul(COPIES as u64)
        };
        if !done.iter().all(right) {
            return self.failed("two repetitions computed different results");
        }
        let list = |time: fn(&Repetition) -> u64| {
            let times: Vec<String> = done.iter().map(|r| time(r).to_string()).collect();
            times.join(",")
        };
        suite::record(&format!(
            r#"{{"record":"result","name":"{}","class":"{}","checksum":"{sum:016x}","alone_ns":[{}],"together_ns":[{}]}}"#,
            self.workload.name,
            self.workload.class.name(),
            list(Repetition::alone),
            list(Repetition::together)
        ));
    }

    fn failed(&self, why: &str) {
        suite::outcome(
            (self.workload.name, self.workload.class.name()),
            "failed",
            why,
        );
    }
}

/// A piece of work without memory: so many steps from `seed`.
#[inline(never)]
fn piece(seed: u64, steps: u64) -> u64 {
    (0..steps).fold(seed, mix)
}

/// Each run adds its pieces to those to be done, then does pieces until none is left, be they its own
/// or the other copy's: the sum of all runs' checksums is that of their pieces.
fn shared_queue(size: Size) -> Result<Task, String> {
    const RESULTS: usize = 1024;
    static ADDED: AtomicU64 = AtomicU64::new(0);
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    static DONE: [AtomicU64; RESULTS] = [const { AtomicU64::new(0) }; RESULTS];
    let pieces = u64::from(size.of(400_000));
    Ok(Box::new(move || {
        ADDED.fetch_add(pieces, Ordering::SeqCst);
        let mut sum = 0u64;
        let mut taken = TAKEN.load(Ordering::SeqCst);
        loop {
            if taken >= ADDED.load(Ordering::SeqCst) {
                return sum;
            }
            if let Err(now) =
                TAKEN.compare_exchange_weak(taken, taken + 1, Ordering::SeqCst, Ordering::SeqCst)
            {
                taken = now;
                continue;
            }
            let number = taken % pieces;
            let result = piece(number, 128);
            DONE[number as usize % RESULTS].fetch_xor(result, Ordering::Relaxed);
            sum = sum.wrapping_add(result);
            taken = TAKEN.load(Ordering::SeqCst);
        }
    }))
}

fn shared_mutex(size: Size) -> Result<Task, String> {
    static TABLE: Mutex<[u64; 256]> = Mutex::new([0; 256]);
    let pieces = u64::from(size.of(150_000));
    Ok(Box::new(move || {
        let mut sum = 0u64;
        for number in 0..pieces {
            let result = piece(number, 512);
            let mut table = TABLE.lock().map_err(|_| ()).unwrap_or_else(|()| {
                eprintln!("bench_guest: the other thread failed");
                std::process::exit(3)
            });
            for at in 0..4 {
                let entry = &mut table[(result >> (at * 8)) as usize & 0xff];
                *entry = entry.wrapping_add(result);
            }
            drop(table);
            sum = sum.wrapping_add(result);
        }
        sum
    }))
}
