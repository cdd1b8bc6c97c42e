//! libkrun (crate `libkrun`) runs a program of a folder in a virtual machine, with the kernel that Debian has
//! for it (package `libkrunfw5`).

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::archive::{Doing, cache};
use e2e::session::Session;
use qemu_e2e::debian::Tree;
use qemu_e2e::error::ensure;
use qemu_e2e::guest::Kernel;

use crate::Outcome;
use crate::terminal::on_terminal;

const VERSION: &str = "1.19.7";
const ANSWER: Duration = Duration::from_secs(120);
const KERNEL: Tree = Tree {
    name: "libkrunfw-sid",
    suites: &["sid"],
    packages: &["libkrunfw5"],
    with_dependencies: false,
};

/// A program that uses the library: CPUs, the root folder, then the command for the guest's shell.
const LAUNCHER: &str = r#"use std::ffi::CString;
use std::ptr::null;
fn main() {
    let words: Vec<CString> = std::env::args().skip(1).map(|a| CString::new(a).unwrap()).collect();
    let path = CString::new("PATH=/bin").unwrap();
    let dash = CString::new("-c").unwrap();
    let shell = CString::new("/bin/sh").unwrap();
    // SAFETY: libkrun's calls; the strings and arrays outlive them.
    unsafe {
        let vm = krun::krun_create_ctx();
        assert!(vm >= 0);
        let vm = vm as u32;
        assert_eq!(krun::krun_set_vm_config(vm, words[0].to_str().unwrap().parse().unwrap(), 512), 0);
        assert_eq!(krun::krun_set_root(vm, words[1].as_ptr()), 0);
        let arguments = [dash.as_ptr(), words[2].as_ptr(), null()];
        let environment = [path.as_ptr(), null()];
        assert_eq!(krun::krun_set_exec(vm, shell.as_ptr(), arguments.as_ptr(), environment.as_ptr()), 0);
        std::process::exit(krun::krun_start_enter(vm));
    }
}
"#;

/// How many CPUs are tried.
pub const CPUS: [u32; 2] = [1, 2];

fn place() -> Result<PathBuf, Outcome> {
    Ok(cache("anykvm-libkrun")?.join(format!("launch-{VERSION}")))
}

fn executable(place: &Path) -> PathBuf {
    place.join("target/release/launch")
}

/// Whether it has been built already; that takes minutes.
#[must_use]
pub fn built() -> bool {
    place().is_ok_and(|place| executable(&place).exists())
}

fn program() -> Result<PathBuf, Outcome> {
    let place = place()?;
    if !built() {
        eprintln!("vmms_e2e: building libkrun {VERSION}, which takes minutes");
        fs::create_dir_all(place.join("src")).doing("cannot write the cache")?;
        fs::write(place.join("src/main.rs"), LAUNCHER).doing("cannot write the cache")?;
        let manifest = format!(
            "[package]\nname = \"launch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n[workspace]\n\
             [dependencies]\nlibkrun = \"={VERSION}\"\n"
        );
        fs::write(place.join("Cargo.toml"), manifest).doing("cannot write the cache")?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .args(["build", "--quiet", "--release", "--target-dir", "target"])
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS")
            .current_dir(&place)
            .stdin(Stdio::null())
            .output()
            .doing("cannot start cargo")?;
        if !output.status.success() {
            return Err(Outcome::Skipped(format!(
                "cargo does not build libkrun {VERSION}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
    }
    Ok(executable(&place))
}

/// Runs commands in a machine with `cpus` CPUs; how long all of it took.
///
/// # Errors
/// [`Outcome::Skipped`] if libkrun is not to be had; if something is wrong.
pub fn run(cpus: u32, engine: &str) -> Result<Duration, Outcome> {
    let program = program()?;
    let kernel = KERNEL
        .unpacked()
        .map_err(|error| Outcome::Skipped(error.to_string()))?;
    let files = Kernel::Cloud.files()?;
    let root = tempfile::tempdir()?;
    for folder in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir(root.path().join(folder))?;
    }
    let busybox = root.path().join("bin/busybox");
    fs::copy(files.kernel.with_file_name("busybox"), &busybox)?;
    fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755))?;
    for applet in [
        "cat",
        "cp",
        "grep",
        "nproc",
        "seq",
        "sh",
        "sha256sum",
        "uname",
    ] {
        symlink("busybox", root.path().join("bin").join(applet))?;
    }
    let command = "uname -s; echo cpus=$(nproc); cp /bin/busybox /tmp/copy; \
        sha256sum </tmp/copy; seq 100000 | sha256sum; echo done=$((6 * 7))";
    let words = [
        e2e::program::anykvm().into(),
        "exec".into(),
        "--engine".into(),
        engine.into(),
        "--".into(),
        program.into(),
        cpus.to_string().into(),
        root.path().into(),
        command.into(),
    ];
    let start = Instant::now();
    let mut machine = on_terminal(&words);
    machine.env("LD_LIBRARY_PATH", kernel.join("usr/lib/x86_64-linux-gnu"));
    let mut session = Session::start(&mut machine)?;
    let told = session.expect("done=42", ANSWER)?;
    let code = session.end(ANSWER)?;
    let time = start.elapsed();
    ensure(code == Some(0), || format!("libkrun ends with {code:?}"))?;
    let expected = [
        "Linux",
        &format!("cpus={cpus}"),
        // What `seq 100000` has on any machine.
        "b2bc7d3f8b652d2ec96865b68ad8f80e22cca174abe1aed7889e242a747d590f",
    ];
    for part in expected {
        ensure(told.contains(part), || format!("no '{part}' in: {told}"))?;
    }
    let copied = fs::read(root.path().join("tmp/copy"))?;
    ensure(copied == fs::read(&busybox)?, || {
        "the guest's copy of a file of the host's differs".to_owned()
    })?;
    Ok(time)
}
