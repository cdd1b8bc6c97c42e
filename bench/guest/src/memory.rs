//! Bandwidth and latency of memory.

use std::hint::black_box;

use crate::random::{Random, mix};
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 5] = [
    ("memcpy", Class::Memory, "copies 4 MiB", memcpy),
    ("memset", Class::Memory, "fills 4 MiB", memset),
    ("triad", Class::Memory, "a = b + s*c over 24 MiB", triad),
    (
        "chase",
        Class::Memory,
        "follows random pointers in 16 MiB",
        chase,
    ),
    (
        "random",
        Class::Memory,
        "changes random words of 64 MiB",
        random_access,
    ),
];

fn memcpy(size: Size) -> Result<Task, String> {
    let mut random = Random::new(11);
    let source: Vec<u64> = (0..1 << 19).map(|_| random.next()).collect();
    let mut target = vec![0; source.len()];
    let rounds = size.of(250);
    Ok(Box::new(move || {
        for _ in 0..rounds {
            black_box(&mut target).copy_from_slice(black_box(&source));
        }
        target.iter().fold(0, |sum, &x| mix(sum, x))
    }))
}

fn memset(size: Size) -> Result<Task, String> {
    let mut target = vec![0u8; 4 << 20];
    let rounds = size.of(600);
    Ok(Box::new(move || {
        for round in 0..rounds {
            black_box(&mut target).fill(round as u8);
        }
        mix(mix(1, target[0].into()), target[target.len() - 1].into())
    }))
}

fn triad(size: Size) -> Result<Task, String> {
    let b: Vec<f64> = (0u32..1 << 20).map(f64::from).collect();
    let c: Vec<f64> = b.iter().rev().copied().collect();
    let mut a = vec![0.0; b.len()];
    let rounds = size.of(60);
    Ok(Box::new(move || {
        for _ in 0..rounds {
            for ((a, b), c) in a.iter_mut().zip(black_box(&b)).zip(&c) {
                *a = b + 3.0 * c;
            }
        }
        a.iter().fold(0, |sum, x| mix(sum, x.to_bits()))
    }))
}

fn chase(size: Size) -> Result<Task, String> {
    let mut next: Vec<u32> = (0..4 << 20).collect();
    // Sattolo's shuffle: one cycle through all.
    let mut random = Random::new(12);
    for i in (1..next.len()).rev() {
        next.swap(i, random.below(i as u64) as usize);
    }
    let steps = size.of(700_000);
    Ok(Box::new(move || {
        u64::from((0..steps).fold(0, |at: u32, _| next[at as usize]))
    }))
}

fn random_access(size: Size) -> Result<Task, String> {
    let mut table = vec![0u64; 8 << 20];
    let steps = size.of(3_000_000);
    Ok(Box::new(move || {
        let mut random = Random::new(13);
        let mask = table.len() as u64 - 1;
        // Done twice, an exclusive or leaves the table as it was.
        let mut sum = 0;
        for step in 0..steps {
            if step == steps / 2 {
                random = Random::new(13);
            }
            let x = random.next();
            let word = &mut table[(x & mask) as usize];
            *word ^= x;
            sum = mix(sum, *word);
        }
        sum
    }))
}
