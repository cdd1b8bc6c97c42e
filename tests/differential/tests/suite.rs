//! A fixed selection of the campaign, and all regressions.

use differential::campaign::{self, Failure, Forms};
use differential::case::host_components;
use differential::random::Random;
use differential::sequence::Pool;
use differential::suite::Suite;
use differential::text;
use std::time::{Duration, Instant};

fn report(failures: &[Failure]) {
    for f in failures.iter().take(10) {
        let d = &f.difference;
        eprintln!(
            "{}: {} differs from {}: {}\n  {}",
            f.name, d.who, d.from, d.what, f.line
        );
    }
    assert!(failures.is_empty(), "{} cases differ", failures.len());
}

/// Rounds over all forms, at most for the time given.
fn forms(bits: u32, rounds: u32) -> Forms {
    let mut suite = Suite::new();
    let mut forms = Forms::new(bits);
    let start = Instant::now();
    for n in 0..rounds {
        // Each round has a seed of its own: what was run does not depend on how fast it was.
        forms.round(&mut suite, &mut Random(u64::from(n) * 1000 + 7), None);
        if start.elapsed() > Duration::from_secs(20) {
            eprintln!("slow machine: {} of {rounds} rounds", n + 1);
            break;
        }
    }
    println!(
        "{bits} bits: {} of {} forms covered, {} compared with the host CPU, {} cases",
        forms.covered(),
        forms.known(),
        forms.covered_natively(),
        forms.cases
    );
    forms
}

#[test]
fn forms_of_64_bit_mode() {
    let forms = forms(64, 6);
    assert!(
        forms.covered() > 1000,
        "the generator covers what every host has"
    );
    report(&forms.failures.into_values().collect::<Vec<_>>());
}

#[test]
fn forms_of_compatibility_mode() {
    let forms = forms(32, 4);
    assert!(forms.covered() > 800);
    report(&forms.failures.into_values().collect::<Vec<_>>());
}

fn sequences(bits: u32, count: u32) {
    let mut suite = Suite::new();
    let pool = Pool::new(bits);
    let start = Instant::now();
    let mut failures = Vec::new();
    let mut r = Random(0x5eed);
    for n in 0..count {
        let (_, failure) = campaign::sequence(&mut suite, &mut r, &pool, bits);
        failures.extend(failure);
        if start.elapsed() > Duration::from_secs(20) || failures.len() > 10 {
            eprintln!("{} of {count} sequences", n + 1);
            break;
        }
    }
    report(&failures);
}

#[test]
fn sequences_in_64_bit_mode() {
    sequences(64, 6000);
}

#[test]
fn sequences_in_compatibility_mode() {
    sequences(32, 4000);
}

fn amd() -> bool {
    std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Auth")
}

#[test]
fn regressions() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let mut suite = Suite::new();
    let mut wrong = Vec::new();
    let mut count = 0;
    for file in std::fs::read_dir(&dir).expect("regressions/ is part of the crate") {
        let path = file.expect("a directory entry").path();
        let all = std::fs::read_to_string(&path).expect("a text file");
        for (n, line) in all.lines().enumerate() {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let place = format!("{}:{}", path.display(), n + 1);
            let (case, expected) = text::read(line).unwrap_or_else(|e| panic!("{place}: {e}"));
            count += 1;
            let run = campaign::replay(&mut suite, &case);
            let got = text::outcome(&run.reference);
            // Vector state is made for the components that the host has, and vendors differ.
            let comparable = host_components() == 0xe7 && (!path.ends_with("amd.txt") || amd());
            if let Some(d) = run.difference {
                wrong.push(format!(
                    "{place}: {} differs from {}: {}",
                    d.who, d.from, d.what
                ));
            } else if comparable && got != expected {
                wrong.push(format!("{place}: expected {expected}\n  got {got}"));
            }
        }
    }
    println!("{count} regressions");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
