//! Runs the Linux kernel's KVM selftests over AnyKVM and says which results were not expected.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser;
use selftests::catalog::{self, Expected};
use selftests::report::{self, Record};
use selftests::run::{Engine, run};
use selftests::source::{self, Built, SOURCES};

/// Run the Linux kernel's KVM selftests over AnyKVM
#[derive(Parser)]
#[command(name = "selftests")]
struct Cli {
    /// Sources to take them from: 6.1, newest [default: both]
    #[arg(long, value_delimiter = ',')]
    source: Vec<String>,
    /// Only tests of these names
    #[arg(long, value_delimiter = ',', num_args = 1..)]
    only: Vec<String>,
    /// What executes the guests
    #[arg(long, value_enum, default_value = "jit")]
    engine: Engine,
    /// How many tests at a time
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Seconds that a test may take [default: as the test needs]
    #[arg(long)]
    timeout: Option<u64>,
    /// Write the results to this file, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Print the table of docs/conformance.md at the end
    #[arg(long)]
    markdown: bool,
    /// Print what a test wrote whose result was not expected
    #[arg(long, short)]
    verbose: bool,
    /// Ask the archive for newer sources
    #[arg(long)]
    refresh: bool,
}

fn main() -> ExitCode {
    match all(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("selftests: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether every result was expected.
fn all(cli: &Cli) -> Result<bool, anykvm::Error> {
    let mut sources = Vec::new();
    for name in &cli.source {
        sources.push(source::find(name).ok_or_else(|| {
            let known: Vec<_> = SOURCES.iter().map(|source| source.name).collect();
            anykvm::Error::new(format!(
                "no source is called '{name}'; there are {}",
                known.join(", ")
            ))
        })?);
    }
    if sources.is_empty() {
        sources.extend(SOURCES);
    }
    let mut records = Vec::new();
    let mut known = Vec::new();
    for source in sources {
        let built = source.built(cli.refresh)?;
        let wanted = |test: &&String| {
            cli.only.is_empty()
                || cli
                    .only
                    .iter()
                    .any(|name| name == *test || name == catalog::base_name(test))
        };
        let tests: Vec<&String> = built.tests.iter().filter(wanted).collect();
        known.extend(tests.iter().map(|test| test.to_string()));
        records.extend(of_source(cli, &built, &tests));
    }
    if let Some(name) = cli.only.iter().find(|name| {
        !known
            .iter()
            .any(|test| test == *name || catalog::base_name(test) == name.as_str())
    }) {
        return Err(anykvm::Error::new(format!("no test is called '{name}'")));
    }
    if let Some(path) = &cli.json {
        let text = serde_json::to_string_pretty(&records).unwrap_or_default();
        std::fs::write(path, text).map_err(|error| {
            anykvm::Error::new(format!("cannot write {}: {error}", path.display()))
        })?;
    }
    if cli.markdown {
        println!("\n{}", report::markdown(&records));
    }
    Ok(records.iter().all(|record| record.expected))
}

fn of_source(cli: &Cli, built: &Built, tests: &[&String]) -> Vec<Record> {
    println!(
        "Linux {}\n  {:<42} {:<8} {:>7}",
        built.version, "test", "result", "seconds"
    );
    let next = AtomicUsize::new(0);
    let records = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..cli.jobs.clamp(1, tests.len().max(1)) {
            scope.spawn(|| {
                while let Some(test) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let record = one(cli, built, test);
                    println!("{}", record.line());
                    if cli.verbose && !record.expected {
                        print!("{}", record.output);
                    }
                    if let Ok(mut records) = records.lock() {
                        records.push(record);
                    }
                }
            });
        }
    });
    let records = records.into_inner().unwrap_or_default();
    println!("Linux {}: {}\n", built.version, report::summary(&records));
    records
}

fn one(cli: &Cli, built: &Built, test: &str) -> Record {
    let name = catalog::base_name(test);
    let expected = catalog::expected(&built.version, name);
    let limit = cli
        .timeout
        .map_or_else(|| catalog::limit(name), Duration::from_secs);
    let ran = match expected {
        Expected::NotRun(_) => None,
        _ => Some(run(
            &built.directory.join(test),
            catalog::arguments(name),
            cli.engine,
            limit,
        )),
    };
    Record::new(&built.version, test, expected, ran)
}
