//! Guests that break themselves or attack the machine: the process stays whole and says in one line
//! what happened.

use std::time::Duration;

use e2e::program::{Ended, end};
use e2e::small;

/// A guest that neither ends nor halts is told to end after this.
const SHORT: Duration = Duration::from_secs(3);
const LONG: Duration = Duration::from_secs(60);
const SEEDS: std::ops::Range<u64> = 1..9;

/// The ways in which a guest that does anything at all may end.
fn is_whole(seed: u64, ended: &Ended) {
    match ended.code {
        0 => assert_eq!(ended.stderr, "", "seed {seed}"),
        125 => {
            ended.one_clear_line(&format!("seed {seed}"));
            assert!(ended.stderr.contains("the guest "), "{ended:?}");
        }
        143 => {
            assert!(ended.stopped, "seed {seed}: {ended:?}");
            assert_eq!(ended.stderr, "", "seed {seed}");
        }
        _ => panic!("seed {seed}: {ended:?}"),
    }
}

#[test]
fn a_triple_fault_is_told() {
    let guest = small::kernel(&small::triple_fault());
    let ended = end(&mut small::run(&guest), LONG);
    assert_eq!(ended.code, 125, "{ended:?}");
    assert_eq!(ended.stdout, b"before the fault");
    ended.one_clear_line("triple fault");
    assert!(ended.stderr.contains("triple fault"), "{ended:?}");
}

#[test]
fn garbage_as_a_kernel() {
    for seed in SEEDS {
        let guest = small::kernel(&small::garbage(seed));
        is_whole(seed, &end(&mut small::run(&guest), SHORT));
    }
}

#[test]
fn garbage_that_goes_on_after_exceptions() {
    let mut through = 0;
    for seed in SEEDS {
        let guest = small::kernel(&small::garbage_with_handlers(seed, 3000));
        let ended = end(&mut small::run(&guest), SHORT);
        through += u32::from(ended.stdout.ends_with(b"through"));
        is_whole(seed, &ended);
    }
    println!("{through} of the guests came through");
}

#[test]
fn nonsense_to_ports() {
    for seed in SEEDS {
        let guest = small::kernel(&small::random_ports(seed, 30_000));
        let ended = end(&mut small::run(&guest), LONG);
        assert!(!ended.stopped, "seed {seed} does not end: {ended:?}");
        is_whole(seed, &ended);
    }
}

#[test]
fn nonsense_to_devices_in_memory() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    for seed in SEEDS {
        let guest = small::kernel(&small::random_mmio(seed, 30_000));
        let mut command = small::run(&guest);
        command.arg("--disk").arg(disk.path());
        let ended = end(&mut command, LONG);
        assert!(!ended.stopped, "seed {seed} does not end: {ended:?}");
        is_whole(seed, &ended);
    }
}
