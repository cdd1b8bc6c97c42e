//! The VMM `alioth` (crate `alioth-cli`) boots Debian's cloud kernel.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::archive::{Doing, cache};
use e2e::session::Session;
use qemu_e2e::error::ensure;
use qemu_e2e::guest::Kernel;

use crate::Outcome;
use crate::terminal::on_terminal;

const VERSION: &str = "0.12.0";
/// From power-on to the guest's shell at most.
const BOOT: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(60);

/// How a machine is started.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// What the table calls it.
    pub name: &'static str,
    cpus: u32,
    disk: bool,
}

/// Those that are tried.
pub const MACHINES: [Machine; 2] = [
    Machine {
        name: "1 vCPU",
        cpus: 1,
        disk: false,
    },
    Machine {
        name: "2 vCPUs, virtio disk",
        cpus: 2,
        disk: true,
    },
];

/// Where the program is once it has been built.
fn place() -> Result<PathBuf, Outcome> {
    Ok(cache("anykvm-alioth")?.join(format!("alioth-{VERSION}")))
}

/// Whether it has been built already; that takes minutes.
#[must_use]
pub fn built() -> bool {
    place().is_ok_and(|place| place.join("bin/alioth").exists())
}

/// The program, built from the crate registry if it is not there.
///
/// # Errors
/// [`Outcome::Skipped`] if it cannot be had.
pub fn program() -> Result<PathBuf, Outcome> {
    let root = place()?;
    if !built() {
        eprintln!("vmms_e2e: building alioth-cli {VERSION}, which takes minutes");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .args(["install", "--quiet", "--locked", "alioth-cli"])
            .args(["--version", VERSION, "--root"])
            .arg(&root)
            .arg("--target-dir")
            .arg(root.with_extension("target"))
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS")
            .stdin(Stdio::null())
            .output()
            .doing("cannot start cargo")?;
        if !output.status.success() {
            return Err(Outcome::Skipped(format!(
                "cargo does not install alioth-cli {VERSION}: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
    }
    Ok(root.join("bin/alioth"))
}

impl Machine {
    /// Boots it, runs commands in it, and lets it power off; the time from power-on to the shell.
    ///
    /// # Errors
    /// If it does not.
    pub fn boot(&self, engine: &str) -> Result<Duration, Outcome> {
        let program = program()?;
        let files = Kernel::Cloud.files()?;
        let disk = tempfile::NamedTempFile::new()?;
        disk.as_file().set_len(8 << 20)?;
        let mut words: Vec<OsString> = vec![e2e::program::anykvm().into()];
        words.extend(["exec", "--engine", engine, "--"].map(OsString::from));
        words.push(program.into());
        words.extend(["--log-spec", "warn", "boot", "--memory"].map(OsString::from));
        words.extend(["size=512M,backend=memfd", "--cpu"].map(OsString::from));
        words.push(format!("count={}", self.cpus).into());
        words.extend(["--kernel".into(), files.kernel.into()]);
        words.extend(["--initramfs".into(), files.initrd.into()]);
        words.push("--cmdline".into());
        if self.disk {
            words.push("console=ttyS0 load=virtio_pci,virtio_blk".into());
            words.push("--blk".into());
            words.push(format!("file,path={},api=mio", disk.path().display()).into());
        } else {
            words.push("console=ttyS0".into());
        }
        let start = Instant::now();
        let mut guest = Session::start(&mut on_terminal(&words))?;
        guest.expect("the shell is ready", BOOT)?;
        let time = start.elapsed();
        let kernel = guest.command("uname -sr", ANSWER)?;
        ensure(kernel.contains("Linux 6."), || format!("uname: {kernel}"))?;
        let cpus = guest.command("grep -c ^processor /proc/cpuinfo", ANSWER)?;
        ensure(cpus.lines().last() == Some(&self.cpus.to_string()), || {
            format!("{} CPUs expected, the guest has {cpus}", self.cpus)
        })?;
        guest.command("seq 20000 | sha256sum | grep -q ^", ANSWER)?;
        if self.disk {
            guest.command(
                "dd if=/dev/urandom of=/tmp/a bs=64k count=64 2>/dev/null && \
                 dd if=/tmp/a of=/dev/vda bs=64k 2>/dev/null && sync && \
                 echo 3 >/proc/sys/vm/drop_caches && \
                 dd if=/dev/vda of=/tmp/b bs=64k count=64 2>/dev/null && cmp /tmp/a /tmp/b",
                ANSWER,
            )?;
        }
        guest.type_in("poweroff -f\n")?;
        let code = guest.end(ANSWER)?;
        ensure(code == Some(0), || {
            format!("alioth ends with {code:?}: {}", guest.output())
        })?;
        Ok(time)
    }
}
