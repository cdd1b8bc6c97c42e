//! The benchmark workloads as one static program: natively on the host, or as `/init` of a guest,
//! so that every machine runs the same instructions.
//!
//! Arguments come from the command line, or for process 1 from `/bench.args`, so that the kernel's
//! command line is the same for every benchmark:
//! - `boot`: say that the guest is there, and power off;
//! - `idle`: say so, and sleep until the machine is stopped;
//! - `user [--only A,B] [--reps N] [--divide N]`: run the workloads;
//! - `list`: name them;
//! - `programs [--root DIR] [...]`: the same for real programs, which DIR has on a host;
//! - `list-programs`: name those;
//! - `smp [...]`: run workloads on two CPUs beside one;
//! - `list-smp`: name those;
//! - `nothing`: end at once (what the workload `exec` executes).
//!
//! Results are lines `@bench {JSON}` on standard output; everything else there is the kernel's.

mod calls;
mod codegen;
mod crypto;
mod float;
mod integer;
mod kernel;
mod memory;
mod programs;
mod random;
mod simd;
mod smp;
mod suite;
mod sys;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let guest = std::process::id() == 1;
    let arguments: Vec<String> = if guest {
        // The host measures until this line: nothing comes before it.
        suite::record(&format!(
            r#"{{"record":"init","uptime_ns":{}}}"#,
            sys::now(sys::Clock::SinceBoot)
        ));
        sys::prepare_guest();
        let text = std::fs::read_to_string("/bench.args").unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    } else {
        std::env::args().skip(1).collect()
    };
    let result = run(&arguments, guest);
    if let Err(why) = &result {
        eprintln!("bench_guest: {why}");
    }
    if guest {
        sys::power_off();
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(arguments: &[String], guest: bool) -> Result<(), String> {
    let mut words = arguments.iter().map(String::as_str);
    match words.next() {
        Some("boot" | "nothing") => Ok(()),
        Some("idle") => loop {
            std::thread::sleep(std::time::Duration::from_secs(3600));
        },
        Some("list") => {
            for workload in suite::all() {
                println!(
                    "{:<16} {:<10} {}",
                    workload.name,
                    workload.class.name(),
                    workload.about
                );
            }
            Ok(())
        }
        Some("list-programs") => {
            programs::list();
            Ok(())
        }
        Some("list-smp") => {
            smp::list();
            Ok(())
        }
        Some("smp") => smp::run(&options(words)?.0, guest),
        Some("user") => suite::run(&options(words)?.0),
        Some("programs") => {
            let (options, root) = options(words)?;
            programs::run(&options, root.as_deref())
        }
        _ => Err(
            "the first argument must be boot, idle, list, list-programs, list-smp, nothing, programs, smp or user"
                .into(),
        ),
    }
}

fn options<'a>(
    mut words: impl Iterator<Item = &'a str>,
) -> Result<(suite::Options, Option<PathBuf>), String> {
    let mut options = suite::Options::default();
    let mut root = None;
    while let Some(word) = words.next() {
        let value = words.next().ok_or(format!("{word} needs a value"))?;
        let number = || match value.parse::<u32>() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(format!("{word} needs a number from 1")),
        };
        match word {
            "--only" => options.only = value.split(',').map(str::to_owned).collect(),
            "--reps" => options.repetitions = number()?,
            "--divide" => options.divisor = number()?,
            "--root" => root = Some(value.into()),
            _ => return Err(format!("'{word}' is not known")),
        }
    }
    Ok((options, root))
}
