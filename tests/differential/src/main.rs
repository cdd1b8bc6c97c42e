//! The long-running mode: `cargo run -p differential --release -- --seconds 600 --seed N`.

use differential::forms;
use differential::random::Random;
use differential::suite::{Rules, Suite};
use std::time::{Duration, Instant};

fn main() {
    let mut args = std::env::args().skip(1);
    let (mut seconds, mut seed, mut only, mut bits) = (10u64, 1u64, None, 64u32);
    while let Some(a) = args.next() {
        let mut next = || args.next().unwrap_or_default();
        match a.as_str() {
            "--seconds" => seconds = next().parse().unwrap_or(10),
            "--seed" => seed = next().parse().unwrap_or(1),
            "--only" => only = Some(next()),
            "--bits" => bits = next().parse().unwrap_or(64),
            other => {
                eprintln!("differential: unknown option {other}");
                std::process::exit(2);
            }
        }
    }
    let mut suite = Suite::new();
    let mut r = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let list = forms::all(bits);
    let (mut cases, mut bad) = (0u64, std::collections::BTreeMap::<String, (u32, String)>::new());
    while Instant::now() < end {
        for &code in &list {
            if let Some(o) = &only && !format!("{code:?}").contains(o.as_str()) {
                continue;
            }
            let Some((case, insn)) = forms::make(&mut r, code, bits) else { continue };
            let rules = if bits == 64 { forms::rules(&insn) } else { Rules { native: false, ..forms::rules(&insn) } };
            cases += 1;
            if std::env::var_os("TRACE").is_some() {
                eprintln!("{code:?} {insn} {:02x?}", case.code);
            }
            let run = suite.run(&case, rules);
            if let Some(d) = run.difference {
                let e = bad.entry(format!("{code:?} {}", d.who)).or_insert((0, String::new()));
                e.0 += 1;
                if e.0 == 1 {
                    e.1 = format!("{insn} [{:02x?}] {} != {}: {}", case.code, d.who, d.from, d.what);
                }
            }
        }
    }
    println!("{} forms, {cases} cases, {} forms differ", list.len(), bad.len());
    for (k, (n, text)) in &bad {
        println!("{n:4} {k}: {text}");
    }
}
