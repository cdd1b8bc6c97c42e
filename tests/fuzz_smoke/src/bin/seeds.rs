//! Writes the seed inputs of a fuzz target: `seeds TARGET DIRECTORY`; names the targets without
//! arguments.

use fuzz_smoke::TARGETS;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, directory] = &arguments[..] else {
        for target in TARGETS {
            println!("{}", target.name);
        }
        return ExitCode::SUCCESS;
    };
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
        eprintln!("seeds: there is no target '{name}'; 'seeds' alone lists them");
        return ExitCode::from(2);
    };
    let directory = Path::new(directory);
    let written = std::fs::create_dir_all(directory).and_then(|()| {
        for (n, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(directory.join(format!("seed-{n:03}")), seed)?;
        }
        Ok(())
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("seeds: cannot write to {}: {e}", directory.display());
            ExitCode::FAILURE
        }
    }
}
