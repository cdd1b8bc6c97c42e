//! `bench programs`: Debian's own programs. This module gets them: packages of Debian 12 through apt with a
//! private state, as any user, unpacked into the cache; only what runs is kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::archive;

use crate::setup::Setup;
use crate::{Outcome, Result, user};

/// Raised when what is kept changes.
const FORMAT: &str = "1";
/// Every host, of whatever release, measures the same binaries.
const SUITE: &str = "bookworm";
const PACKAGES: [&str; 10] = [
    "busybox-static",
    "coreutils",
    "cpp-12",
    "mawk",
    "openssl",
    "perl-base",
    "python3.11-minimal",
    "sqlite3",
    "xz-utils",
    "zstd",
];
/// What is kept of all packages: in directories of programs only these, of the rest the libraries.
const KEPT: [&str; 10] = [
    "bin/busybox",
    "usr/bin/mawk",
    "usr/bin/openssl",
    "usr/bin/perl",
    "usr/bin/python3.11",
    "usr/bin/sort",
    "usr/bin/sqlite3",
    "usr/bin/xz",
    "usr/bin/zstd",
    "usr/lib/gcc/x86_64-linux-gnu/12/cc1",
];
const LIBRARIES: [&str; 5] = [
    "lib/x86_64-linux-gnu",
    "lib64",
    "usr/lib/python3.11",
    "usr/lib/x86_64-linux-gnu",
    "usr/share/perl",
];
/// Character sets.
const NOT_NEEDED: &str = "usr/lib/x86_64-linux-gnu/gconv";

/// Compares the programs on all machines.
///
/// # Errors
/// If they cannot be had or run.
pub fn run(setup: &Setup) -> Result<Outcome> {
    user::programs(setup, &root()?)
}

/// The root file system with the programs, from the cache or from the archive.
///
/// # Errors
/// If the archive does not help, or the cache cannot be written.
pub fn root() -> Result<PathBuf> {
    let cache = archive::cache("anykvm-bench").map_err(|e| e.to_string())?;
    let doing = |e: std::io::Error| format!("cannot write the cache {}: {e}", cache.display());
    let lock = fs::File::create(cache.join("lock")).map_err(doing)?;
    lock.lock().map_err(doing)?;
    let kept = cache.join(format!("programs-{SUITE}-{FORMAT}"));
    if kept.exists() {
        return Ok(kept);
    }
    eprintln!("programs: fetching Debian's packages, about 40 MB, once");
    let temporary = tempfile::tempdir_in(&cache).map_err(doing)?;
    let (debs, all, new) = (
        temporary.path().join("debs"),
        temporary.path().join("all"),
        temporary.path().join("new"),
    );
    for directory in [&debs.join("partial"), &all, &new] {
        fs::create_dir_all(directory).map_err(doing)?;
    }
    download(&cache.join("apt"), &debs)?;
    for entry in fs::read_dir(&debs).map_err(doing)? {
        let path = entry.map_err(doing)?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            succeed(
                Command::new("dpkg-deb")
                    .arg("--extract")
                    .arg(&path)
                    .arg(&all),
            )?;
        }
    }
    for name in KEPT.iter().chain(&LIBRARIES) {
        let to = new.join(name);
        let missing = |e| format!("Debian's packages have no /{name}: {e}");
        if !all.join(name).exists() && LIBRARIES.contains(name) {
            continue;
        }
        fs::create_dir_all(to.parent().unwrap_or(&new)).map_err(doing)?;
        fs::rename(all.join(name), &to).map_err(missing)?;
    }
    // It is not there if the packages are newer.
    let _ = fs::remove_dir_all(new.join(NOT_NEEDED));
    fs::rename(&new, &kept).map_err(doing)?;
    Ok(kept)
}

/// Downloads the packages and all that they depend on.
fn download(state: &Path, debs: &Path) -> Result<()> {
    let apt = archive::apt(state, &[SUITE], "amd64").map_err(|e| e.to_string())?;
    let complaint = apt.update(|_| {}).map_err(|e| e.to_string())?;
    let result = succeed(
        Command::new("apt-get")
            .arg("-c")
            .arg(state.join("apt.conf"))
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-qy", "-o", "Debug::NoLocking=true"])
            .arg("-o")
            .arg(format!("Dir::Cache::archives={}/", debs.display()))
            .args(["--no-install-recommends", "--download-only", "install"])
            .args(PACKAGES),
    );
    result.map_err(|why| format!("{why} {}", complaint.unwrap_or_default()))
}

/// Runs a program that must succeed.
fn succeed(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let output = command
        .output()
        .map_err(|e| format!("cannot run {program}: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{program} failed: {}",
            String::from_utf8_lossy(&output.stderr)
                .trim()
                .replace('\n', "; ")
        )),
    }
}
