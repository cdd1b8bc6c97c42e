//! `bench hot`: the hottest blocks of a workload, the guest's instructions beside the emitted ones, with
//! `perf`'s samples. The engine writes down each block that it makes (`ANYKVM_JIT_BLOCKS`).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
use serde_json::json;

use crate::machine::Kind;
use crate::setup::Setup;
use crate::{Outcome, Result, user};

/// Blocks shown.
const SHOWN: usize = 12;

/// What was emitted at one place: a stub, or a block with the guest's code.
struct Code {
    name: String,
    length: u64,
    guest: Option<Guest>,
}

/// The guest's side of a block, and the code.
struct Guest {
    linear: u64,
    bits: u32,
    bytes: Vec<u8>,
    /// Offsets of each instruction: emitted, guest.
    map: Vec<(u64, u64)>,
    code: Vec<u8>,
}

/// Runs the workloads of `--only` under `perf record` and shows where the time went.
///
/// # Errors
/// If there is no `perf`, or it may not sample, or the workload does not run.
pub fn run(setup: &Setup) -> Result<Outcome> {
    if setup.options.only.is_empty() {
        return Err("say which workload: --only NAME".into());
    }
    if setup.anykvm.is_none() {
        return Err("anykvm is needed: build it with cargo build --release -p anykvm, and leave it in --machines".into());
    }
    let initrd = user::initrd(setup)?;
    let (data, table) = (
        setup.work.path().join("perf.data"),
        setup.work.path().join("blocks"),
    );
    let machine = Kind::AnyKvm.command(setup, &initrd, "");
    eprintln!("hot: {} under perf", setup.options.only.join(","));
    let output = Command::new("perf")
        .args(["record", "-q", "-e", "cpu-clock", "-F", "1999", "-o"])
        .arg(&data)
        .arg("--")
        .arg(machine.get_program())
        .args(machine.get_args())
        .env("ANYKVM_JIT_BLOCKS", &table)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run perf: {e}; on Debian: apt-get install linux-perf"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !text.contains(r#""record":"result""#) {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rfind(|line| !line.trim().is_empty());
        return Err(format!(
            "the workload gave no result under perf: {}; where sampling is not allowed, sysctl kernel.perf_event_paranoid=2 or less allows it",
            last.unwrap_or("the guest said nothing")
        ));
    }
    let codes = read_table(&table)?;
    let samples = samples(&data)?;
    Ok(show(&codes, &samples))
}

/// The addresses that were sampled, with how often.
fn samples(data: &Path) -> Result<HashMap<u64, u64>> {
    let output = Command::new("perf")
        .args(["script", "-F", "ip", "-i"])
        .arg(data)
        .output()
        .map_err(|e| format!("cannot run perf: {e}"))?;
    let mut samples = HashMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if let Ok(address) = u64::from_str_radix(first, 16) {
            *samples.entry(address).or_default() += 1;
        }
    }
    Ok(samples)
}

/// All code by address. Code that was later overwritten is left out.
fn read_table(path: &Path) -> Result<BTreeMap<u64, Code>> {
    let file = std::fs::File::open(path)
        .map_err(|e| format!("the engine wrote no table of its blocks ({e}): is --engine jit?"))?;
    let mut codes: BTreeMap<u64, Code> = BTreeMap::new();
    for line in BufReader::new(file).lines().map_while(std::io::Result::ok) {
        // The last line may be cut short.
        let Some((start, code)) = parse(&line) else {
            continue;
        };
        let covered: Vec<u64> = codes
            .range(..start + code.length)
            .rev()
            .take_while(|(at, old)| **at + old.length > start)
            .map(|(at, _)| *at)
            .collect();
        for at in covered {
            codes.remove(&at);
        }
        codes.insert(start, code);
    }
    Ok(codes)
}

/// A line of the table: `start length name [bits guest map code]`.
fn parse(line: &str) -> Option<(u64, Code)> {
    let mut words = line.split(' ');
    let mut hex = || u64::from_str_radix(words.next()?, 16).ok();
    let (start, length) = (hex()?, hex()?);
    let name = words.next()?.to_owned();
    let guest = match words.next() {
        None => None,
        Some(bits) => Some(Guest {
            linear: u64::from_str_radix(name.split(':').nth(2)?.strip_prefix("0x")?, 16).ok()?,
            bits: bits.parse().ok()?,
            bytes: bytes(words.next()?)?,
            map: words.next()?.split(',').filter_map(pair).collect(),
            code: bytes(words.next()?)?,
        }),
    };
    Some((
        start,
        Code {
            name,
            length,
            guest,
        },
    ))
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok())
        .collect()
}

fn pair(text: &str) -> Option<(u64, u64)> {
    let (host, guest) = text.split_once(':')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(host)?, number(guest)?))
}

fn show(codes: &BTreeMap<u64, Code>, samples: &HashMap<u64, u64>) -> Outcome {
    let all: u64 = samples.values().sum();
    let mut by_code: HashMap<u64, u64> = HashMap::new();
    for (address, count) in samples {
        if let Some((start, code)) = codes.range(..=address).next_back()
            && address - start < code.length
        {
            *by_code.entry(*start).or_default() += count;
        }
    }
    let part = |count: u64| 1e2 * count as f64 / all.max(1) as f64;
    let sum = |wanted: &dyn Fn(&Code) -> bool| -> u64 {
        by_code
            .iter()
            .filter(|(at, _)| wanted(&codes[at]))
            .map(|(_, n)| n)
            .sum()
    };
    let user = sum(&|code| code.name.starts_with("guest:user"));
    let kernel = sum(&|code| code.name.starts_with("guest:kernel"));
    let stubs = sum(&|code| code.guest.is_none());
    println!(
        "{all} samples: translated user code {:.1} %, kernel code {:.1} %, stubs {:.1} %, the rest (helpers, host kernel) {:.1} %",
        part(user),
        part(kernel),
        part(stubs),
        part(all - user - kernel - stubs)
    );
    let named = registers(codes, &by_code);
    let of_user: Vec<String> = (8..16)
        .zip(named)
        .map(|(n, share)| format!("r{n} {:.1} %", 1e2 * share))
        .collect();
    println!("instructions of user code that name {}", of_user.join(", "));
    let mut order: Vec<(u64, u64)> = by_code.into_iter().map(|(at, n)| (n, at)).collect();
    order.sort_unstable_by(|a, b| b.cmp(a));
    let mut hottest = Vec::new();
    for &(count, at) in order.iter().take(SHOWN) {
        let code = &codes[&at];
        println!("\n{:5.1} %  {count:6}  {}", part(count), code.name);
        if let Some(guest) = &code.guest {
            print!("{}", listing(at, guest, samples));
        }
        hottest.push(json!({ "name": code.name, "samples": count, "host": format!("{at:#x}") }));
    }
    Outcome {
        json: json!({
            "samples": all, "r8_to_r15": named, "user": user, "kernel": kernel, "stubs": stubs, "hottest": hottest,
        }),
        good: all > 0,
    }
}

/// Which share of the user's instructions name R8 to R15, taking each as often executed as its block has samples for it.
fn registers(codes: &BTreeMap<u64, Code>, by_code: &HashMap<u64, u64>) -> [f64; 8] {
    let (mut named, mut all) = ([0.0; 8], 0.0);
    for (at, &count) in by_code {
        let code = &codes[at];
        let Some(guest) = code
            .guest
            .as_ref()
            .filter(|_| code.name.starts_with("guest:user"))
        else {
            continue;
        };
        let decode =
            || Decoder::with_ip(guest.bits, &guest.bytes, guest.linear, DecoderOptions::NONE);
        let weight = count as f64 / decode().iter().count().max(1) as f64;
        all += count as f64;
        for instruction in &mut decode() {
            let operands = (0..instruction.op_count()).map(|i| instruction.op_register(i));
            let address = [instruction.memory_base(), instruction.memory_index()];
            let used: HashSet<usize> = operands
                .chain(address)
                .filter(|r| r.is_gpr())
                .map(|r| r.full_register().number())
                .collect();
            for n in used {
                if let Some(share) = n.checked_sub(8).and_then(|n| named.get_mut(n)) {
                    *share += weight;
                }
            }
        }
    }
    named.map(|n| if all > 0.0 { n / all } else { 0.0 })
}

/// Each guest instruction with what it became; in front of each emitted one its samples.
fn listing(start: u64, guest: &Guest, samples: &HashMap<u64, u64>) -> String {
    let mut formatter = GasFormatter::new();
    let mut format = |instruction: &iced_x86::Instruction| {
        let mut text = String::new();
        formatter.format(instruction, &mut text);
        text
    };
    let mut sources: HashMap<u64, String> = HashMap::new();
    for instruction in
        &mut Decoder::with_ip(guest.bits, &guest.bytes, guest.linear, DecoderOptions::NONE)
    {
        sources.insert(
            instruction.ip().wrapping_sub(guest.linear),
            format!("{:#x}: {}", instruction.ip(), format(&instruction)),
        );
    }
    let mut text = String::new();
    let mut left = guest.map.iter().peekable();
    for instruction in &mut Decoder::with_ip(64, &guest.code, start, DecoderOptions::NONE) {
        let offset = instruction.ip() - start;
        while let Some((_, source)) = left.next_if(|(host, _)| *host <= offset) {
            if let Some(source) = sources.get(source) {
                let _ = writeln!(text, "  {source}");
            }
        }
        let count = samples.get(&instruction.ip()).copied();
        let count = count.map_or(String::new(), |count| count.to_string());
        let _ = writeln!(
            text,
            "    {count:>6}  {:#x}: {}",
            offset,
            format(&instruction)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_listed_with_its_source() {
        let line = "7000 2 guest:user:0x400ff0:phys:0x1ff0 64 90c3 0:0,1:1, 90cc";
        let (start, code) = parse(line).unwrap();
        let text = listing(start, &code.guest.unwrap(), &HashMap::from([(0x7000, 5)]));
        assert_eq!(
            text,
            "  0x400ff0: nop\n         5  0x0: nop\n  0x400ff1: ret\n            0x1: int3\n"
        );
        assert!(parse("7000 20 stub:enter").unwrap().1.guest.is_none());
        assert!(parse("7000 2 guest:user:0x40").is_some_and(|(_, code)| code.guest.is_none()));
        assert!(parse("7000").is_none());
    }

    #[test]
    fn registers_are_counted_by_samples() {
        // inc r8; mov r9, [r8 + r9]; nop; nop
        let line = "7000 4 guest:user:0x400ff0:phys:0x1ff0 64 49ffc04f8b0c089090 0:0, 90";
        let (start, code) = parse(line).unwrap();
        let codes = BTreeMap::from([(start, code)]);
        let named = registers(&codes, &HashMap::from([(start, 8)]));
        assert_eq!(named[..3], [0.5, 0.25, 0.0]);
    }

    #[test]
    fn later_code_replaces_what_it_covers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            "1000 10 stub:a\n1010 10 stub:b\n1008 10 stub:c\n",
        )
        .unwrap();
        let codes = read_table(file.path()).unwrap();
        let names: Vec<&str> = codes.values().map(|code| code.name.as_str()).collect();
        assert_eq!(names, ["stub:c"]);
    }
}
