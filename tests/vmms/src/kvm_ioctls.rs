//! The tests of the crate `kvm-ioctls`, as its authors publish them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use e2e::archive::{Doing, cache};
use qemu_e2e::error::{Result, wrong};

use crate::Outcome;

/// The versions whose tests are run: the one that this workspace uses, and the newest.
pub const VERSIONS: [&str; 2] = ["=0.24.0", "*"];

/// Examples in the documentation that begin with a VM of type KVM_X86_SW_PROTECTED_VM, which KVM has only
/// when it was built for tests of guest_memfd.
const PROTECTED: [&str; 3] = [
    "VmFd::create_guest_memfd",
    "VmFd::set_memory_attributes",
    "VmFd::set_user_memory_region2",
];

/// The source of a version, ready to be built.
#[derive(Debug)]
pub struct Source {
    /// As `0.24.0`.
    pub version: String,
    directory: PathBuf,
    target: PathBuf,
}

/// What came of its tests.
#[derive(Debug, Default)]
pub struct Results {
    /// Those that passed.
    pub passed: Vec<String>,
    /// Those that failed.
    pub failed: Vec<String>,
    /// Those that the authors leave out (they need SEV).
    pub ignored: Vec<String>,
    /// Those that failed as they must: see the source.
    pub not_served: Vec<String>,
    /// All that was printed.
    pub output: String,
}

fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("RUSTFLAGS")
        .env("CARGO_TERM_COLOR", "never")
        .stdin(Stdio::null());
    command
}

/// The source of the newest version that `requirement` allows.
///
/// # Errors
/// [`Outcome::Skipped`] when the crate registry does not give it and it is not in the cache.
pub fn source(requirement: &str) -> std::result::Result<Source, Outcome> {
    let cache = cache("anykvm-kvm-ioctls")?;
    let name = requirement.strip_prefix('=').unwrap_or("newest");
    // A crate that depends on it makes cargo fetch it.
    let asking = cache.join(format!("ask-{name}"));
    fs::create_dir_all(asking.join("src")).doing("cannot write the cache")?;
    fs::write(asking.join("src/lib.rs"), "").doing("cannot write the cache")?;
    let manifest = format!(
        "[package]\nname = \"ask\"\nversion = \"0.0.0\"\nedition = \"2021\"\n[workspace]\n\
         [dependencies]\nkvm-ioctls = \"{requirement}\"\n"
    );
    fs::write(asking.join("Cargo.toml"), manifest).doing("cannot write the cache")?;
    let output = cargo()
        .args(["metadata", "--format-version", "1"])
        .current_dir(&asking)
        .output()
        .doing("cannot start cargo")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(Outcome::Skipped(format!(
            "cargo does not give kvm-ioctls {requirement}: {}",
            text.trim()
        )));
    }
    let text = serde_json::from_slice::<serde_json::Value>(&output.stdout)
        .map_err(|error| anykvm::Error::new(format!("cargo metadata: {error}")))?;
    let package = text["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "kvm-ioctls");
    let (Some(version), Some(manifest)) = (
        package.and_then(|package| package["version"].as_str()),
        package.and_then(|package| package["manifest_path"].as_str()),
    ) else {
        return Ok(wrong("cargo metadata does not name kvm-ioctls")?);
    };
    // Its tests need more crates than its users do, and so a lock file of their own.
    let directory = cache.join(format!("kvm-ioctls-{version}"));
    if !directory.exists() {
        let temporary = tempfile::tempdir_in(&cache).doing("cannot write the cache")?;
        copy(
            Path::new(manifest).parent().unwrap_or(Path::new("/")),
            temporary.path(),
        )?;
        fs::rename(temporary.keep(), &directory).doing("cannot write the cache")?;
    }
    Ok(Source {
        version: version.to_owned(),
        directory,
        target: cache.join("target"),
    })
}

fn copy(from: &Path, to: &Path) -> Result {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::write(target, fs::read(entry.path())?)?;
        }
    }
    Ok(())
}

impl Source {
    fn cargo(&self) -> Command {
        let mut command = cargo();
        command
            .arg("test")
            .arg("--target-dir")
            .arg(&self.target)
            .current_dir(&self.directory);
        command
    }

    /// Builds and runs the tests with `engine`.
    ///
    /// # Errors
    /// [`Outcome::Skipped`] when the crates that they need are not to be had; when they do not build.
    pub fn test(&self, engine: &str) -> std::result::Result<Results, Outcome> {
        let fetched = cargo()
            .arg("fetch")
            .current_dir(&self.directory)
            .output()
            .doing("cannot start cargo")?;
        if !fetched.status.success() {
            let text = String::from_utf8_lossy(&fetched.stderr);
            return Err(Outcome::Skipped(format!(
                "cargo does not give what the tests need: {}",
                text.trim()
            )));
        }
        let output = self
            .cargo()
            .args(["--lib", "--no-run", "--message-format=json"])
            .output()
            .doing("cannot start cargo")?;
        let program = String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| message["reason"] == "compiler-artifact")
            .filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
            .next_back();
        let Some(program) = program.filter(|_| output.status.success()) else {
            return Ok(wrong(format!(
                "the tests of kvm-ioctls {} do not build: {}",
                self.version,
                String::from_utf8_lossy(&output.stderr)
            ))?);
        };
        let mut command = Command::new(e2e::program::anykvm());
        command
            .args(["exec", "--engine", engine, "--"])
            .arg(program)
            .current_dir(&self.directory)
            .stdin(Stdio::null());
        Ok(results(&mut command)?)
    }

    /// Builds and runs the examples of the documentation with `engine`.
    ///
    /// # Errors
    /// When they cannot be started.
    pub fn test_documentation(&self, engine: &str) -> Result<Results> {
        let asked = self.cargo();
        let mut command = Command::new(e2e::program::anykvm());
        command
            .args(["exec", "--engine", engine, "--"])
            .arg(asked.get_program())
            .args(asked.get_args())
            .arg("--doc")
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS")
            .current_dir(&self.directory)
            .stdin(Stdio::null());
        results(&mut command)
    }
}

/// Runs Rust's test program and reads what it prints.
fn results(command: &mut Command) -> Result<Results> {
    let output = command.env("RUST_BACKTRACE", "0").output()?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    let mut results = Results::default();
    for line in text.lines() {
        let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|line| line.split_once(" ... "))
        else {
            continue;
        };
        let name = name.to_owned();
        match result.split_whitespace().next().unwrap_or_default() {
            "ok" => results.passed.push(name),
            "ignored" => results.ignored.push(name),
            _ if PROTECTED.iter().any(|p| name.contains(p)) => results.not_served.push(name),
            _ => results.failed.push(name),
        }
    }
    let told = text.lines().any(|line| line.starts_with("test result:"));
    if !told || results.passed.is_empty() {
        return wrong(format!("the tests did not run to their end: {text}"));
    }
    results.output = text;
    Ok(results)
}
