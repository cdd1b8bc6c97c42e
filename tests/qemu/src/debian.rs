//! Debian's packages unpacked into the cache: with all that they depend on, so that a program of a
//! suite newer than the host runs with its own libraries, or alone, for their data.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::archive::{self, Doing, cache};

use crate::error::{Result, wrong};

/// Raised when what is kept changes.
const FORMAT: &str = "1";
/// Shared with the crate `e2e`: package lists are some ten MB.
const CACHE: &str = "anykvm-e2e";

/// What to unpack.
#[derive(Debug, Clone, Copy)]
pub struct Tree {
    /// Name in the cache.
    pub name: &'static str,
    /// Suites to look in, the first of which names the package lists' place.
    pub suites: &'static [&'static str],
    /// The packages.
    pub packages: &'static [&'static str],
    /// Whether to add what they depend on.
    pub with_dependencies: bool,
}

/// The directory that is kept under `name`; `make` fills it if it is not there.
///
/// # Errors
/// If it cannot be made.
pub fn kept(name: &str, make: impl FnOnce(&Path) -> Result) -> Result<PathBuf> {
    let cache = cache(CACHE)?;
    let lock =
        fs::File::create(cache.join(format!("{name}.lock"))).doing("cannot write the cache")?;
    lock.lock().doing("cannot lock the cache")?;
    let directory = cache.join(format!("{name}-{FORMAT}"));
    if !directory.exists() {
        let temporary = tempfile::tempdir_in(&cache).doing("cannot write the cache")?;
        make(temporary.path())?;
        fs::rename(temporary.keep(), &directory).doing("cannot write the cache")?;
    }
    Ok(directory)
}

impl Tree {
    /// The directory with the files, from the cache or from the archive.
    ///
    /// # Errors
    /// If the archive does not help.
    pub fn unpacked(&self) -> Result<PathBuf> {
        kept(self.name, |directory| self.fetch(directory))
    }

    fn fetch(&self, root: &Path) -> Result {
        eprintln!(
            "qemu_e2e: fetching {} from Debian's {}",
            self.packages.join(", "),
            self.suites[0]
        );
        let state = cache(CACHE)?.join(format!("apt-amd64-{}", self.suites[0]));
        let lock =
            fs::File::create(state.with_extension("lock")).doing("cannot write the cache")?;
        lock.lock().doing("cannot lock the cache")?;
        let apt = archive::apt(&state, self.suites, "amd64")?;
        let complaint = apt.update(|_| {})?;
        let debs = tempfile::tempdir().doing("cannot write a temporary directory")?;
        fs::create_dir(debs.path().join("partial"))?;
        let mut command = Command::new("apt-get");
        command
            .arg("-c")
            .arg(state.join("apt.conf"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C")
            .current_dir(debs.path());
        match self.with_dependencies {
            true => command
                .args([
                    "-qy",
                    "-o",
                    "Debug::NoLocking=true",
                    "--no-install-recommends",
                    "--download-only",
                ])
                .arg("-o")
                .arg(format!("Dir::Cache::archives={}/", debs.path().display()))
                .arg("install"),
            false => command.args(["-q", "download"]),
        };
        let output = command
            .args(self.packages)
            .output()
            .doing("cannot start apt-get")?;
        if !output.status.success() {
            return wrong(format!(
                "apt-get does not give {}: {} {}",
                self.packages.join(", "),
                String::from_utf8_lossy(&output.stderr).trim(),
                complaint.unwrap_or_default()
            ));
        }
        for entry in fs::read_dir(debs.path())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                let status = Command::new("dpkg-deb")
                    .arg("--extract")
                    .arg(&path)
                    .arg(root)
                    .status()
                    .doing("cannot start dpkg-deb")?;
                if !status.success() {
                    return wrong(format!("cannot unpack {}", path.display()));
                }
            }
        }
        Ok(())
    }
}

/// Firmware and boot loaders of Debian 12.
pub const BOOT: Tree = Tree {
    name: "boot-bookworm",
    suites: &["bookworm"],
    packages: &[
        "ovmf",
        "systemd-boot-efi",
        "syslinux",
        "syslinux-common",
        "mtools",
    ],
    with_dependencies: false,
};

/// QEMU of Debian 12 with its libraries.
pub const QEMU_BOOKWORM: Tree = Tree {
    name: "qemu-bookworm",
    suites: &["bookworm"],
    packages: &["qemu-system-x86"],
    with_dependencies: true,
};

/// The newest QEMU and firmware that Debian has.
pub const QEMU_SID: Tree = Tree {
    name: "qemu-sid",
    suites: &["sid"],
    packages: &["qemu-system-x86", "ovmf"],
    with_dependencies: true,
};
