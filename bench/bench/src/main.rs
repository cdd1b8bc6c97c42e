//! Benchmarks: AnyKVM beside QEMU's TCG and the host. `docs/performance.md` says what each means.
//!
//! The main path: [`setup`] finds the programs, builds the guest program and takes the kernel;
//! [`machine`] starts one machine and reads what its guest says; each command runs machines in turn,
//! round by round, so that a busy moment of the host hits all alike, and prints a table.

mod boot;
mod cli;
mod cpio;
mod exits;
mod facts;
mod hot;
mod machine;
mod memory;
mod others;
mod programs;
mod prompt;
mod setup;
mod smp;
mod statistics;
mod table;
mod user;

use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

use cli::{Cli, Command};
use machine::Kind;
use setup::Setup;

/// What went wrong, in one line, with what to do.
type Result<T> = std::result::Result<T, String>;

/// What a command found.
struct Outcome {
    json: Value,
    /// Nothing was wrong: no machine failed, no result differed.
    good: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// QEMU with AnyKVM for its /dev/kvm beside the same QEMU with TCG: boot and workloads.
fn qemu(setup: &Setup) -> Result<Outcome> {
    let boot = boot::run(
        setup,
        &[Kind::Qemu, Kind::QemuMicrovm, Kind::Tcg, Kind::Microvm],
    )?;
    println!();
    let user = user::run(setup, Kind::Qemu)?;
    Ok(Outcome {
        good: boot.good && user.good,
        json: json!({ "boot": boot.json, "user": user.json }),
    })
}

fn run(cli: &Cli) -> Result<bool> {
    if cli.command == Command::ExitsChild {
        return exits::child().map(|()| true);
    }
    let mut setup = Setup::new(&cli.options)?;
    let facts = facts::gather(&setup);
    println!("{}", facts::text(&facts));
    let commands = match cli.command {
        Command::All => vec![
            Command::Boot,
            Command::User,
            Command::Programs,
            Command::Smp,
            Command::Prompt,
            Command::Memory,
            Command::Exits,
            Command::Qemu,
        ],
        one => vec![one],
    };
    let mut results = serde_json::Map::new();
    let mut good = true;
    for command in commands {
        println!();
        // Programs, their initial file system and their files are all in memory.
        setup.default_memory = if matches!(command, Command::Programs | Command::Hot) {
            1024
        } else {
            512
        };
        setup.cpus = if command == Command::Smp {
            smp::CPUS
        } else {
            1
        };
        let outcome = match command {
            Command::Boot => boot::run(&setup, &[Kind::AnyKvm, Kind::Tcg, Kind::Microvm])?,
            Command::User => user::run(&setup, Kind::AnyKvm)?,
            Command::Hot => hot::run(&setup)?,
            Command::Programs => programs::run(&setup)?,
            Command::Smp => smp::run(&setup)?,
            Command::Qemu => qemu(&setup)?,
            Command::Exits => exits::run(&setup)?,
            Command::Prompt => prompt::run(&setup)?,
            Command::Memory | Command::All | Command::ExitsChild => memory::run(&setup)?,
        };
        good &= outcome.good;
        results.insert(command.name().into(), outcome.json);
    }
    if let Some(path) = &cli.options.json {
        let text = format!("{:#}\n", json!({ "facts": facts, "results": results }));
        std::fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    }
    Ok(good)
}
