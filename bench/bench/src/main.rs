//! Benchmarks: AnyKVM beside QEMU's TCG and the host. `docs/performance.md` says what each means.
//!
//! The main path: [`setup`] finds the programs, builds the guest program and takes the kernel;
//! [`machine`] starts one machine and reads what its guest says; each command runs machines in turn,
//! round by round, so that a busy moment of the host hits all alike, and prints a table.

mod boot;
mod cli;
mod cpio;
mod facts;
mod machine;
mod memory;
mod prompt;
mod setup;
mod statistics;
mod table;
mod user;

use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

use cli::{Cli, Command};
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

fn run(cli: &Cli) -> Result<bool> {
    let setup = Setup::new(&cli.options)?;
    let facts = facts::gather(&setup);
    println!("{}", facts::text(&facts));
    let commands = match cli.command {
        Command::All => vec![
            Command::Boot,
            Command::User,
            Command::Prompt,
            Command::Memory,
        ],
        one => vec![one],
    };
    let mut results = serde_json::Map::new();
    let mut good = true;
    for command in commands {
        println!();
        let outcome = match command {
            Command::Boot => boot::run(&setup)?,
            Command::User => user::run(&setup)?,
            Command::Prompt => prompt::run(&setup)?,
            Command::Memory | Command::All => memory::run(&setup)?,
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
