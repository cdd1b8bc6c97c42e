//! The long-running mode: `cargo run -p differential --release -- --seconds 600 --seed N`.

use differential::campaign::{self, Failure, Forms};
use differential::case::Case;
use differential::random::Random;
use differential::sequence::Pool;
use differential::suite::Suite;
use iced_x86::{Decoder, DecoderOptions};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: differential [--seconds N] [--seed N] [--bits 64|32] [--only FORM] \
[--forms | --sequences] [--list]
       differential --case 'LINE'
Runs random instructions and sequences on the host CPU, in the interpreter and in the translator, and
compares. --case: runs one line of regressions/*.txt (what follows => may be missing), and prints it with
its outcome. --list: the forms that were not covered, with the reason.";

struct Options {
    seconds: u64,
    seed: u64,
    bits: u32,
    only: Option<String>,
    forms: bool,
    sequences: bool,
    list: bool,
    case: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut o = Options {
        seconds: 10,
        seed: 1,
        bits: 64,
        only: None,
        forms: true,
        sequences: true,
        list: false,
        case: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(a) = args.next() {
        let mut value = || args.next().ok_or(format!("{a} needs a value"));
        let number = |v: String| v.parse::<u64>().map_err(|_| format!("{v} is not a number"));
        match a.as_str() {
            "--seconds" => o.seconds = number(value()?)?,
            "--seed" => o.seed = number(value()?)?,
            "--bits" => {
                o.bits = match value()?.as_str() {
                    "64" => 64,
                    "32" => 32,
                    v => return Err(format!("--bits is 64 or 32, not {v}")),
                }
            }
            "--only" => (o.only, o.sequences) = (Some(value()?), false),
            "--forms" => o.sequences = false,
            "--sequences" => o.forms = false,
            "--case" => o.case = Some(value()?),
            "--list" => o.list = true,
            _ => return Err(format!("unknown option {a}\n{USAGE}")),
        }
    }
    Ok(o)
}

fn disassemble(case: &Case) {
    let mut d = Decoder::with_ip(case.bits, &case.code, case.at, DecoderOptions::NONE);
    while d.can_decode() {
        let at = d.position();
        let i = d.decode();
        if !matches!(case.code[at], 0x90 | 0xcc) {
            println!("    {:x}: {i}", i.ip());
        }
    }
}

fn show(f: &Failure) {
    let d = &f.difference;
    println!("{}: {} differs from {}: {}", f.name, d.who, d.from, d.what);
    disassemble(&f.case);
    println!("  {}", f.line);
}

fn one(suite: &mut Suite, line: &str) -> ExitCode {
    let start = line.split("=>").next().unwrap_or_default();
    match differential::text::read(&format!("{start} =>")) {
        Ok((case, _)) => {
            let run = campaign::replay(suite, &case);
            println!(
                "{} => {}",
                differential::text::write(&case),
                differential::text::outcome(&run.reference)
            );
            if let Some(d) = run.difference {
                eprintln!("{} differs from {}: {}", d.who, d.from, d.what);
                return ExitCode::FAILURE;
            }
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("differential: {e}");
            ExitCode::from(2)
        }
    }
}

fn main() -> ExitCode {
    let o = match options() {
        Ok(o) => o,
        Err(e) => {
            eprintln!("differential: {e}");
            return ExitCode::from(2);
        }
    };
    let mut suite = Suite::new();
    if let Some(line) = &o.case {
        return one(&mut suite, line);
    }
    let mut r = Random(o.seed);
    let start = Instant::now();
    let mut forms = Forms::new(o.bits);
    let pool = Pool::new(o.bits);
    let (mut sequences, mut complete, mut failures) = (0u64, 0u64, Vec::new());
    while start.elapsed() < Duration::from_secs(o.seconds) {
        if o.forms {
            forms.round(&mut suite, &mut r, o.only.as_deref());
        }
        for _ in 0..if o.sequences { 2000 } else { 0 } {
            let (vector, failure) = campaign::sequence(&mut suite, &mut r, &pool, o.bits);
            sequences += 1;
            complete += u64::from(vector == 3);
            if let Some(f) = failure {
                show(&f);
                failures.push(f);
            }
        }
        if failures.len() > 20 {
            println!("more than 20 sequences differ: stopping");
            break;
        }
    }
    for f in forms.failures.values() {
        show(f);
    }
    let uncovered = forms.uncovered();
    if o.list {
        for (code, reason) in &uncovered {
            println!(
                "{code:?} [{}]: {reason}",
                differential::forms::features(*code)
            );
        }
    }
    if o.forms {
        println!(
            "forms: {} of {} covered ({} compared with the host CPU), {} cases, {} forms differ",
            forms.covered(),
            forms.known(),
            forms.covered_natively(),
            forms.cases,
            forms.failures.len()
        );
        let mut reasons = BTreeMap::new();
        for (_, reason) in uncovered {
            *reasons.entry(reason).or_insert(0) += 1;
        }
        for (reason, n) in reasons {
            println!("  {n} not covered: {reason}");
        }
    }
    if o.sequences {
        println!(
            "sequences: {sequences}, {complete} of them to the end, {} differ",
            failures.len()
        );
    }
    ExitCode::from(u8::from(!forms.failures.is_empty() || !failures.is_empty()))
}
