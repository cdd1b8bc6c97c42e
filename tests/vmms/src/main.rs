//! Runs the parts and prints what came of them.

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use vmms_e2e::{Outcome, alioth, kvm_ioctls, libkrun, libvirt};

/// Runs published software that uses KVM over AnyKVM
#[derive(Parser)]
#[command(name = "vmms_e2e")]
struct Cli {
    /// What to run [default: all]
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// AnyKVM's engine ('jit', 'interp')
    #[arg(long, default_value = "jit")]
    engine: String,
}

#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Part {
    /// The tests of the crate kvm-ioctls
    KvmIoctls,
    /// The VMM alioth boots Linux
    Alioth,
    /// libkrun runs a program
    Libkrun,
    /// libvirt drives QEMU
    Libvirt,
}

fn main() -> ExitCode {
    let mut cli = Cli::parse();
    if cli.parts.is_empty() {
        cli.parts = Part::value_variants().to_vec();
    }
    let mut failed = false;
    for part in &cli.parts {
        let passed = match part {
            Part::KvmIoctls => kvm_ioctls(&cli.engine),
            Part::Alioth => each(&alioth::MACHINES, |machine| {
                let name = format!("alioth, {}", machine.name);
                let result = machine.boot(&cli.engine);
                (
                    name,
                    result.map(|time| format!("{:.1} s to the shell", time.as_secs_f64())),
                )
            }),
            Part::Libkrun => each(&libkrun::CPUS, |&cpus| {
                let result = libkrun::run(cpus, &cli.engine);
                (
                    format!("libkrun, CPUs: {cpus}"),
                    result.map(|time| format!("{:.1} s from start to end", time.as_secs_f64())),
                )
            }),
            Part::Libvirt => each(&libvirt::WAYS, |way| {
                let name = format!("libvirt, {}", way.name);
                (name, way.run(&cli.engine).map(|steps| steps.join(", ")))
            }),
        };
        failed |= !passed;
    }
    match failed {
        false => ExitCode::SUCCESS,
        true => ExitCode::FAILURE,
    }
}

/// Whether all pass.
fn each<T>(all: &[T], run: impl Fn(&T) -> (String, Result<String, Outcome>)) -> bool {
    let mut passed = true;
    for one in all {
        let (name, result) = run(one);
        match result {
            Ok(what) => println!("{name}: passed ({what})"),
            Err(Outcome::Skipped(why)) => {
                println!("{name}: SKIPPED: {why}");
                passed = false;
            }
            Err(Outcome::Failed(error)) => {
                println!("{name}: FAILED: {error}");
                passed = false;
            }
        }
    }
    passed
}

fn kvm_ioctls(engine: &str) -> bool {
    each(&kvm_ioctls::VERSIONS, |version| {
        let source = match kvm_ioctls::source(version) {
            Ok(source) => source,
            Err(outcome) => return (format!("kvm-ioctls {version}"), Err(outcome)),
        };
        let name = format!("kvm-ioctls {}", source.version);
        let both = source.test(engine).and_then(|tests| {
            let examples = source.test_documentation(engine)?;
            let failed = [&tests.failed[..], &examples.failed[..]].concat();
            if failed.is_empty() {
                Ok(format!(
                    "{} tests, {} left out by the authors ({}); {} examples, {} need a VM of type \
                     KVM_X86_SW_PROTECTED_VM ({})",
                    tests.passed.len(),
                    tests.ignored.len(),
                    tests.ignored.join(", "),
                    examples.passed.len(),
                    examples.not_served.len(),
                    examples.not_served.join(", ")
                ))
            } else {
                println!("{}{}", tests.output, examples.output);
                let error = anykvm::Error::new(failed.join(", "));
                Err(Outcome::from(error))
            }
        });
        (name, both)
    })
}
