//! Runs the cases and prints a table.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use qemu_e2e::cases::{Case, all};
use qemu_e2e::emulator::{Accel, Emulator};
use qemu_e2e::vm::Run;
use serde_json::json;

/// Runs Debian's QEMU over AnyKVM and looks whether its guests work
#[derive(Parser)]
#[command(name = "qemu_e2e")]
struct Cli {
    /// Cases: a name, or the start of names, such as 'boot/q35' or 'migration'. `*` is any part.
    cases: Vec<String>,
    /// 'debian': the installed one or Debian 12's; 'newest': the one of Debian's sid; or a path
    #[arg(long, value_delimiter = ',', default_value = "debian")]
    qemu: Vec<String>,
    /// QEMU's accelerator
    #[arg(long, value_enum, default_value = "kvm")]
    accel: AccelName,
    /// AnyKVM's engine ('jit', 'interp'), or 'host': the machine's own /dev/kvm
    #[arg(long, default_value = "jit")]
    engine: String,
    /// Prints the names of the cases
    #[arg(long)]
    list: bool,
    /// Writes the results to this file as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Leaves out these cases
    #[arg(long)]
    skip: Vec<String>,
    /// From power-on to the guest's shell at most, in seconds
    #[arg(long, default_value_t = 120)]
    limit: u64,
    /// Further words for the guest kernel's command line
    #[arg(long, default_value = "")]
    append: String,
}

#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum AccelName {
    Kvm,
    Tcg,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let cases: Vec<Case> = all()
        .into_iter()
        .filter(|case| cli.cases.is_empty() || chosen(&case.name, &cli.cases))
        .filter(|case| !chosen(&case.name, &cli.skip))
        .collect();
    if cases.is_empty() {
        eprintln!("qemu_e2e: no case is called so; --list prints their names");
        return ExitCode::from(2);
    }
    if cli.list {
        for case in &cases {
            println!("{}", case.name);
        }
        return ExitCode::SUCCESS;
    }
    let mut rows = Vec::new();
    let mut failed = 0;
    for name in &cli.qemu {
        let run = match run(&cli, name) {
            Ok(run) => run,
            Err(error) => {
                eprintln!("qemu_e2e: {error}");
                return ExitCode::FAILURE;
            }
        };
        let accel = match &run.accel {
            Accel::Tcg => "TCG".to_owned(),
            Accel::HostKvm => "the machine's KVM".to_owned(),
            Accel::AnyKvm(engine) => format!("AnyKVM {engine}"),
        };
        println!("QEMU {}, {accel}", run.emulator.version);
        println!("{:<38} {:>6} {:>8} {:>8}", "case", "", "shell/s", "whole/s");
        for case in &cases {
            if case.kvm_only && run.accel == Accel::Tcg {
                continue;
            }
            print!("{:<38} ", case.name);
            let _ = std::io::stdout().flush();
            let start = Instant::now();
            let result = case.run(&run);
            let whole = start.elapsed().as_secs_f64();
            let shell = match &result {
                Ok(found) => found.map(|time: Duration| time.as_secs_f64()),
                Err(_) => None,
            };
            let word = if result.is_ok() { "passed" } else { "FAILED" };
            let shown = shell.map_or(String::new(), |seconds| format!("{seconds:.2}"));
            println!("{word:>6} {shown:>8} {whole:>8.2}");
            let error = result.err().map(|error| error.to_string());
            if let Some(error) = &error {
                failed += 1;
                println!("    {error}");
            }
            rows.push(json!({
                "case": case.name, "qemu": run.emulator.version, "accel": accel,
                "passed": error.is_none(), "shell_seconds": shell, "seconds": whole, "error": error,
            }));
        }
    }
    println!("{} of {} passed", rows.len() - failed, rows.len());
    if let Some(path) = &cli.json
        && let Err(error) = std::fs::write(path, serde_json::Value::from(rows).to_string())
    {
        eprintln!("qemu_e2e: cannot write {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn run(cli: &Cli, qemu: &str) -> qemu_e2e::error::Result<Run> {
    Ok(Run {
        emulator: Emulator::find(qemu)?,
        accel: match (cli.accel, cli.engine.as_str()) {
            (AccelName::Tcg, _) => Accel::Tcg,
            (AccelName::Kvm, "host") => Accel::HostKvm,
            (AccelName::Kvm, engine) => Accel::AnyKvm(engine.to_owned()),
        },
        boot_limit: Duration::from_secs(cli.limit),
        append: cli.append.clone(),
    })
}

/// Whether one of the patterns is `name` or a beginning of it that ends at a `/`.
fn chosen(name: &str, patterns: &[String]) -> bool {
    patterns.iter().any(|pattern| {
        let mut words = name.split('/');
        pattern.split('/').all(|word| {
            words
                .next()
                .is_some_and(|found| word == "*" || word == found)
        })
    })
}
