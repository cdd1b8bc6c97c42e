//! The small workloads, the same code on the host and in the guest.

use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

/// A workload: its name, what it does, and one repetition, which returns a checksum.
type Workload = (&'static str, &'static str, fn() -> u64);

/// All, in the order in which they run.
pub const ALL: [Workload; 6] = [
    ("integer", "sieve, sums and shifts", integer),
    ("calls", "recursion and calls through a table", calls),
    ("float", "product of matrices", float),
    ("memory", "copies, and jumps through 32 MiB", memory),
    ("text", "sorting and searching words", text),
    ("syscalls", "the smallest system call", syscalls),
];

/// Repetitions of each.
const REPETITIONS: u32 = 5;

/// Runs all; a line for each repetition goes to standard output at once: `@bench NAME NANOSECONDS CHECKSUM`.
pub fn run() {
    tell("@bench start");
    for (name, _, work) in ALL {
        for _ in 0..REPETITIONS {
            let start = Instant::now();
            let checksum = work();
            let time = start.elapsed().as_nanos();
            tell(&format!("@bench {name} {time} {checksum:x}"));
        }
    }
    tell("@bench end");
}

fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody is there to tell if the reader is gone.
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}

/// Marsaglia's xorshift.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn integer() -> u64 {
    const LIMIT: usize = 4_000_000;
    let mut composite = vec![false; LIMIT];
    let mut sum = 0u64;
    for n in 2..LIMIT {
        if !composite[n] {
            sum = (sum.rotate_left(5) ^ n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            for multiple in (n * 2..LIMIT).step_by(n) {
                composite[multiple] = true;
            }
        }
    }
    sum
}

fn calls() -> u64 {
    #[inline(never)]
    fn fibonacci(n: u32) -> u64 {
        if n < 2 {
            return u64::from(n);
        }
        fibonacci(black_box(n) - 1) + fibonacci(n - 2)
    }
    const STEPS: [fn(u64) -> u64; 4] = [
        |n| n.wrapping_mul(3) + 1,
        |n| n ^ n >> 3,
        |n| n.rotate_left(7),
        |n| n.wrapping_sub(11),
    ];
    let mut state = 1;
    for _ in 0..3_000_000 {
        state = black_box(STEPS)[(state & 3) as usize](state);
    }
    state ^ fibonacci(31)
}

fn float() -> u64 {
    const SIZE: usize = 256;
    let value = |n: usize| (n * 7 % 31) as f64 / 31.0;
    let a: Vec<f64> = (0..SIZE * SIZE).map(value).collect();
    let b: Vec<f64> = (0..SIZE * SIZE).map(|n| value(n + 5)).collect();
    let mut c = vec![0.0; SIZE * SIZE];
    for _ in 0..4 {
        for i in 0..SIZE {
            for k in 0..SIZE {
                let factor = a[i * SIZE + k];
                for j in 0..SIZE {
                    c[i * SIZE + j] += factor * b[k * SIZE + j];
                }
            }
        }
    }
    c.iter()
        .fold(0, |sum: u64, x| sum.rotate_left(1) ^ x.to_bits())
}

fn memory() -> u64 {
    const WORDS: usize = 4 << 20;
    let mut random = 0x5eed;
    let mut words: Vec<u64> = (0..WORDS).map(|_| next(&mut random)).collect();
    let mut at = 0;
    for _ in 0..500_000 {
        at = (words[at] ^ at as u64) as usize % WORDS;
        words[at] = words[at].wrapping_add(1);
    }
    let copy = black_box(words.clone());
    words.copy_from_slice(&copy);
    words[at] ^ copy[WORDS - 1]
}

fn text() -> u64 {
    let mut random = 0x7e57;
    let mut words: Vec<String> = (0..60_000)
        .map(|_| format!("word{:x}", next(&mut random) >> 44))
        .collect();
    words.sort();
    words.dedup();
    let joined = words.join(" ");
    let found =
        joined.matches("ab").count() + joined.split('c').filter(|part| part.len() > 9).count();
    (found + words.len()) as u64
}

fn syscalls() -> u64 {
    let first = nix::unistd::getppid();
    (0..200_000)
        .filter(|_| nix::unistd::getppid() == first)
        .count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_computes_the_same_again() {
        for (name, _, work) in ALL {
            assert_eq!(work(), work(), "{name}");
        }
    }
}
