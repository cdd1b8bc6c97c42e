//! What does not take long.

use vmms_e2e::{Outcome, alioth, kvm_ioctls, libkrun, libvirt};

fn pass<T>(what: &str, result: Result<T, Outcome>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(Outcome::Skipped(why)) => {
            println!("SKIPPED: {what}: {why}");
            None
        }
        Err(Outcome::Failed(error)) => panic!("{what}: {error}"),
    }
}

#[test]
fn the_tests_of_kvm_ioctls() {
    for version in kvm_ioctls::VERSIONS {
        let Some(source) = pass("kvm-ioctls", kvm_ioctls::source(version)) else {
            continue;
        };
        let Some(results) = pass("kvm-ioctls", source.test("jit")) else {
            continue;
        };
        println!(
            "kvm-ioctls {}: {} passed",
            source.version,
            results.passed.len()
        );
        assert!(
            results.failed.is_empty() && results.passed.len() >= 60,
            "kvm-ioctls {}: {:?} failed: {}",
            source.version,
            results.failed,
            results.output
        );
    }
}

#[test]
fn alioth_boots_linux() {
    if !alioth::built() {
        println!(
            "SKIPPED: alioth takes minutes to build; `cargo run --release -p vmms_e2e -- alioth` does it"
        );
        return;
    }
    for machine in alioth::MACHINES {
        if let Some(time) = pass(machine.name, machine.boot("jit")) {
            println!(
                "alioth, {}: {:.1} s to the shell",
                machine.name,
                time.as_secs_f64()
            );
        }
    }
}

#[test]
fn libkrun_runs_a_program() {
    if !libkrun::built() {
        println!(
            "SKIPPED: libkrun takes minutes to build; `cargo run --release -p vmms_e2e -- libkrun` does it"
        );
        return;
    }
    for cpus in libkrun::CPUS {
        if let Some(time) = pass("libkrun", libkrun::run(cpus, "jit")) {
            println!("libkrun, {cpus} CPUs: {:.1} s", time.as_secs_f64());
        }
    }
}

#[test]
fn libvirt_drives_qemu() {
    let way = libvirt::WAYS[0];
    if let Some(steps) = pass("libvirt", way.run("jit")) {
        println!("libvirt, {}: {}", way.name, steps.join(", "));
    }
}
