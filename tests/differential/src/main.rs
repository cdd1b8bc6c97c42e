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
            "--sequences" => {}
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
    if std::env::args().any(|a| a == "--sequences") {
        return sequences(&mut suite, &mut r, end, bits);
    }
    let (mut cases, mut bad) = (0u64, std::collections::BTreeMap::<String, (u32, String)>::new());
    while Instant::now() < end {
        for &code in &list {
            if let Some(o) = &only && !format!("{code:?}").contains(o.as_str()) {
                continue;
            }
            let Some((mut case, insn)) = forms::make(&mut r, code, bits) else { continue };
            if std::env::var_os("AC").is_some() {
                case.rflags |= 1 << 18;
            }
            let mut plain = iced_x86::Instruction::default();
            plain.set_code(code);
            if insn.is_invalid() && !forms::rules(&plain).native {
                continue;
            }
            let rules = if bits == 64 { forms::rules(&insn) } else { Rules { native: false, ..forms::rules(&insn) } };
            let odd = forms::odd_offset(&insn, &case);
            let rules = Rules { native: rules.native && !odd, ..rules };
            cases += 1;
            if std::env::var_os("TRACE").is_some() {
                eprintln!("{code:?} {insn} {:02x?}", case.code);
            }
            let run = suite.run(&case, rules);
            if let Some(d) = run.difference {
                let e = bad.entry(format!("{code:?} {}", d.who)).or_insert((0, String::new()));
                e.0 += 1;
                if std::env::var_os("MASKS").is_some() && insn.op_mask() != iced_x86::Register::None && e.0 < 9 {
                    let at = differential::case::component(5).0 + 8 * insn.op_mask().number();
                    println!("{insn} mask {:02x?} at {:x?} {}", &case.start().regs.xsave.0[at..at + 8], forms::address(&insn, &case.gpr, &case), d.what);
                }
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

fn disassemble(case: &differential::case::Case) {
    use iced_x86::{Decoder, DecoderOptions, FastFormatter};
    let mut d = Decoder::with_ip(case.bits, &case.code, case.at, DecoderOptions::NONE);
    let mut f = FastFormatter::new();
    while d.can_decode() {
        let i = d.decode();
        if matches!(case.code[(i.ip() - case.at) as usize], 0x90 | 0xcc) {
            continue;
        }
        let mut s = String::new();
        f.format(&i, &mut s);
        println!("    {:x}: {s}", i.ip());
    }
}

fn sequences(suite: &mut Suite, r: &mut Random, end: Instant, bits: u32) {
    let pool = differential::sequence::Pool::new(bits);
    let (mut n, mut bad, mut complete) = (0u64, 0u64, 0u64);
    while Instant::now() < end && bad < 12 {
        let seed = r.0;
        let case = differential::sequence::make(r, &pool);
        n += 1;
        let rules = Rules { native: bits == 64, ..Rules::default() };
        let run = suite.run(&case, rules);
        complete += u64::from(run.reference.vector == 3);
        if let Some(d) = run.difference {
            bad += 1;
            let (case, d) = differential::minimize::minimize(suite, &case, rules, d);
            println!("seed {seed:#x}: {} != {}: {} (ends with {} at {:#x})", d.who, d.from, d.what, run.reference.vector, run.reference.regs.rip);
            disassemble(&case);
        }
    }
    println!("{n} sequences, {complete} to the end, {bad} differ");
}
