//! `bench exits`: what leaving guest code costs a VMM that speaks KVM's ioctls.
//!
//! The same small VMM runs under `anykvm exec` and on this machine's own `/dev/kvm`, if it has one, in turn;
//! the last column is what has been published for hardware virtualization.

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::setup::Setup;
use crate::statistics::median;
use crate::{Outcome, Result, table};

mod guest;
pub use guest::child;

/// What is measured: name in JSON, what it is, what is known of VT-x and AMD-V.
const CASES: [(&str, &str, &str); 9] = [
    (
        "out",
        "OUT, answered by user space",
        "2,528 cycles and more (AMD-V, 2020)",
    ),
    (
        "in",
        "IN, answered by user space",
        "44,826 cycles (nested VT-x)",
    ),
    ("mmio_write", "MMIO write, answered by user space", "-"),
    ("mmio_read", "MMIO read, answered by user space", "-"),
    (
        "ioeventfd",
        "OUT that signals an ioeventfd",
        "13,518 cycles (nested VT-x, in the kernel)",
    ),
    ("cpuid", "CPUID", "1,018-1,110 cycles"),
    ("ioctl", "KVM_GET_MP_STATE, no guest code", "-"),
    ("irqfd", "irqfd to the handler of a busy guest", "-"),
    ("hlt", "irqfd to the handler of a halted guest", "-"),
];

/// Runs the cases here and there in turn.
///
/// # Errors
/// If nothing can be measured.
pub fn run(setup: &Setup) -> Result<Outcome> {
    let rounds = setup.rounds(5);
    let own = std::env::current_exe().map_err(|e| format!("own path: {e}"))?;
    let anykvm: PathBuf = setup
        .anykvm
        .clone()
        .ok_or("anykvm is not built: cargo build --release -p anykvm -p home_preload")?;
    let mut machines = vec![("anykvm", Vec::new())];
    if std::path::Path::new("/dev/kvm").exists() {
        machines.push(("/dev/kvm", Vec::new()));
    }
    let mut failures = Vec::new();
    for round in 1..=rounds {
        for (name, results) in &mut machines {
            eprintln!("exits: round {round} of {rounds}, {name}");
            let mut command = if *name == "anykvm" {
                let mut command = Command::new(&anykvm);
                command
                    .args(["exec", "--engine", &setup.options.engine, "--"])
                    .arg(&own);
                command
            } else {
                Command::new(&own)
            };
            match measure(command.arg("exits-child")) {
                Ok(value) => results.push(value),
                Err(why) => failures.push(format!("{name}: {why}")),
            }
        }
    }
    println!("Exits, median of {rounds} rounds' medians (ns)");
    let mut rows = Vec::new();
    for (key, what, known) in CASES {
        let mut row = vec![what.to_owned()];
        for (_, results) in &machines {
            row.push(shown(middle(results, key)));
        }
        row.push(known.to_owned());
        rows.push(row);
    }
    let mut head = vec!["operation"];
    head.extend(machines.iter().map(|(name, _)| *name));
    head.push("hardware, published");
    print!("{}", table::text(&head, &rows));
    for why in &failures {
        println!("{why}");
    }
    let json = machines
        .iter()
        .map(|(name, results)| ((*name).to_owned(), json!(results)))
        .collect::<serde_json::Map<_, _>>();
    Ok(Outcome {
        good: failures.iter().all(|f| !f.starts_with("anykvm")),
        json: json.into(),
    })
}

fn middle(results: &[Value], key: &str) -> Option<f64> {
    let values: Vec<f64> = results.iter().filter_map(|r| r[key].as_f64()).collect();
    median(&values)
}

fn shown(ns: Option<f64>) -> String {
    ns.map_or_else(|| "-".into(), |ns| format!("{ns:.0}"))
}

/// Runs the small VMM; the numbers it prints.
fn measure(command: &mut Command) -> Result<Value> {
    let output = command.output().map_err(|e| format!("cannot start: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok())
        .ok_or_else(|| {
            let error = String::from_utf8_lossy(&output.stderr);
            format!("no result: {}", error.trim().replace('\n', " | "))
        })
}
