//! A part of `e2e kernels` that fits into a run of all tests: each kernel once.

use e2e::kernels::find;
use e2e::trial::trial;

fn passes(name: &str, cpus: u32) {
    let kernel = find(name).unwrap();
    let files = match kernel.files(false) {
        Ok(files) => files,
        Err(error) => {
            println!("SKIPPED: {} is not to be had: {error}", kernel.about);
            return;
        }
    };
    match trial(&files, cpus) {
        Ok(passed) => println!(
            "{} with {cpus} CPUs: shell after {:.1} s, all after {:.1} s",
            files.version,
            passed.boot.as_secs_f64(),
            passed.whole.as_secs_f64()
        ),
        Err(error) => panic!("{} with {cpus} CPUs: {error}", files.version),
    }
}

#[test]
fn cloud_one_cpu() {
    passes("cloud", 1);
}

#[test]
fn cloud_two_cpus() {
    passes("cloud", 2);
}

#[test]
fn generic_two_cpus() {
    passes("generic", 2);
}

#[test]
fn newest_two_cpus() {
    passes("newest-cloud", 2);
}

#[test]
fn pae_two_cpus() {
    passes("686-pae", 2);
}
