//! Feeds a fuzz target with a seeded generator for a while, and then compares what the process holds with what it
//! held before: `soak TARGET SECONDS [SEED]`.

use fuzz_smoke::TARGETS;
use fuzz_smoke::input::Random;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).map_or(0, Iterator::count)
}

/// Descriptors, threads, mappings, KiB of memory.
fn holdings() -> [usize; 4] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    });
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    [
        entries("/proc/self/fd"),
        entries("/proc/self/task"),
        maps.lines().count(),
        resident.unwrap_or(0),
    ]
}

/// What must not grow, and by how much it may all the same: caches of the allocator.
const SLACK: [usize; 4] = [0, 0, 64, 64 << 10];
/// How long one input may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let target = arguments
        .first()
        .and_then(|name| TARGETS.iter().find(|t| t.name == name));
    let seconds = arguments.get(1).and_then(|s| s.parse().ok());
    let (Some(target), Some(seconds)) = (target, seconds) else {
        eprintln!("usage: soak TARGET SECONDS [SEED]; 'seeds' lists the targets");
        return ExitCode::from(2);
    };
    let seed = arguments.get(2).and_then(|s| s.parse().ok());
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        std::process::abort();
    }));
    // Somebody must say so when an input does not end.
    let (alive, watched) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        while watched.recv_timeout(PATIENCE).is_ok() {}
        eprintln!("soak: an input hangs");
        std::process::abort();
    });
    let mut random = Random(seed.unwrap_or(0x1234_5678_9abc_def1));
    let seeds = (target.seeds)();
    let start = Instant::now();
    let (mut inputs, mut before) = (0u64, None);
    while start.elapsed() < Duration::from_secs(seconds) {
        let seed = &seeds[random.below(seeds.len())];
        let data = match inputs % 4 {
            0 => {
                let len = random.below(2000);
                random.bytes(len)
            }
            _ => random.mutated(seed),
        };
        (target.run)(&data);
        inputs += 1;
        let _ = alive.send(());
        // Warm: the allocator and the engine have what they keep.
        if before.is_none() && start.elapsed().as_secs() >= seconds / 4 {
            before = Some(holdings());
        }
    }
    std::thread::sleep(Duration::from_millis(500));
    let (before, after) = (before.unwrap_or_default(), holdings());
    println!("{}: {inputs} inputs in {seconds} s", target.name);
    let names = ["descriptors", "threads", "mappings", "KiB resident"];
    let mut grown = false;
    for (n, name) in names.iter().enumerate() {
        let more = after[n] > before[n] + SLACK[n];
        println!(
            "{name}: {}, then {}{}",
            before[n],
            after[n],
            if more { ": LEAK" } else { "" }
        );
        grown |= more;
    }
    // Not through the end of main, where the watcher would wake.
    std::process::exit(i32::from(grown))
}
