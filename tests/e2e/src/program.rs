//! Finds, and if need be builds, the command that is tested.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The command `anykvm`, built with optimizations: `$ANYKVM` if that is set, else this workspace's.
///
/// # Panics
/// If it cannot be built.
pub fn anykvm() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| match std::env::var_os("ANYKVM") {
        Some(path) => path.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    // This executable is target/PROFILE/e2e or target/PROFILE/deps/NAME-HASH.
    let executable = std::env::current_exe().unwrap_or_default();
    let target = executable
        .ancestors()
        .find(|directory| directory.join(".rustc_info.json").exists())
        .map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
            Path::to_owned,
        );
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--quiet", "--package", "anykvm"])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status();
    assert!(
        built.as_ref().is_ok_and(|status| status.success()),
        "cannot build anykvm: {built:?}"
    );
    target.join("release/anykvm")
}

/// A machine to start, with nothing on its standard input.
pub fn run() -> Command {
    let mut command = Command::new(anykvm());
    command.arg("run").stdin(std::process::Stdio::null());
    command
}
