//! The long form of the tests: `e2e kernels` boots real kernels and prints a table.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use e2e::kernels::{KERNELS, Kernel};
use e2e::trial::{Passed, trial};

#[derive(Parser)]
#[command(name = "e2e", about = "Whole runs of anykvm")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot Debian's kernels, and use disk, network, clock and processors in them
    Kernels(KernelArgs),
}

#[derive(Args)]
struct KernelArgs {
    /// How many times in a row
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Numbers of virtual CPUs to boot with
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    cpus: Vec<u32>,
    /// Only kernels of these names
    #[arg(long)]
    only: Vec<String>,
    /// Ask the archive for newer versions
    #[arg(long)]
    refresh: bool,
}

fn main() -> ExitCode {
    let Command::Kernels(args) = Cli::parse().command;
    if let Some(name) = args.only.iter().find(|n| e2e::kernels::find(n).is_none()) {
        let names: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
        eprintln!(
            "e2e: no kernel is called '{name}'; there are {}",
            names.join(", ")
        );
        return ExitCode::from(2);
    }
    println!(
        "{:<13} {:<45} {:>4}  {:>6}  {:<24} kernel says",
        "kernel", "package", "CPUs", "passed", "to the shell, seconds"
    );
    let chosen = KERNELS
        .iter()
        .filter(|kernel| args.only.is_empty() || args.only.iter().any(|n| n == kernel.name));
    let mut failed = false;
    for kernel in chosen {
        failed |= !all_pass(kernel, &args);
    }
    match failed {
        false => ExitCode::SUCCESS,
        true => ExitCode::FAILURE,
    }
}

fn all_pass(kernel: &Kernel, args: &KernelArgs) -> bool {
    let files = match kernel.files(args.refresh) {
        Ok(files) => files,
        Err(error) => {
            println!("{:<13} not to be had: {error}", kernel.name);
            return false;
        }
    };
    let mut all = true;
    for &cpus in &args.cpus {
        print!("{:<13} {:<45} {cpus:>4}  ", kernel.name, files.version);
        let _ = std::io::stdout().flush();
        let mut errors = Vec::new();
        let mut passed: Vec<Passed> = Vec::new();
        for _ in 0..args.rounds {
            match trial(&files, cpus) {
                Ok(good) => passed.push(good),
                Err(error) => errors.push(error),
            }
        }
        let boots: Vec<Duration> = passed.iter().map(|good| good.boot).collect();
        println!(
            "{:>6}  {:<24} {}",
            format!("{}/{}", passed.len(), args.rounds),
            boots
                .iter()
                .map(|boot| format!("{:.2}", boot.as_secs_f64()))
                .collect::<Vec<_>>()
                .join(" "),
            passed.first().map_or("", |good| good.uname.as_str()),
        );
        for error in &errors {
            println!("    {error}");
        }
        all &= errors.is_empty();
    }
    all
}
