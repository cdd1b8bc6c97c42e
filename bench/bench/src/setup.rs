//! What the benchmarks need: the programs, the kernel, the guest program.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::cli::{Column, Options};
use crate::{Result, cpio};

/// The kernel's command line, the same in every machine. `reboot=t panic=-1` end a guest that
/// panics at once.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet mitigations=off reboot=t panic=-1";

/// All that was found.
pub struct Setup {
    /// As given.
    pub options: Options,
    /// The anykvm program, if it takes part.
    pub anykvm: Option<PathBuf>,
    /// The QEMU program, if it takes part.
    pub qemu: Option<PathBuf>,
    /// The kernel of both.
    pub kernel: PathBuf,
    /// The guest program, static.
    pub guest: PathBuf,
    guest_bytes: Vec<u8>,
    /// Memory of the guests unless the user says how much, in MiB.
    pub default_memory: u32,
    /// CPUs of the guests.
    pub cpus: u32,
    /// Files of this run.
    pub work: TempDir,
}

impl Setup {
    /// Finds programs and kernel and builds the guest program. Says which machine is left out.
    ///
    /// # Errors
    /// If there is no kernel, or the guest program cannot be built.
    pub fn new(options: &Options) -> Result<Self> {
        let wanted = |column| options.machines.is_empty() || options.machines.contains(&column);
        let work = tempfile::Builder::new()
            .prefix("anykvm-bench-")
            .tempdir()
            .map_err(|e| format!("cannot make a temporary directory: {e}"))?;
        let anykvm = find_anykvm(options)?;
        let kernel = match (&options.kernel, &anykvm) {
            (Some(kernel), _) => kernel.clone(),
            (None, Some(anykvm)) => default_kernel(anykvm, work.path())?,
            (None, None) => return Err("there is no kernel: build anykvm, whose 'fetch' gets Debian's (cargo build --release -p anykvm), or give --kernel FILE".into()),
        };
        if let Err(e) = std::fs::File::open(&kernel) {
            return Err(format!("cannot read the kernel {}: {e}", kernel.display()));
        }
        let anykvm = anykvm.filter(|_| wanted(Column::Anykvm));
        if anykvm.is_none() && wanted(Column::Anykvm) {
            eprintln!(
                "bench: anykvm is not built, so its column is empty: cargo build --release -p anykvm"
            );
        }
        let qemu = match wanted(Column::Tcg) {
            true => find_qemu(&options.qemu),
            false => None,
        };
        let guest = build_guest()?;
        let guest_bytes =
            std::fs::read(&guest).map_err(|e| format!("cannot read {}: {e}", guest.display()))?;
        Ok(Self {
            options: options.clone(),
            anykvm,
            qemu,
            kernel,
            guest,
            guest_bytes,
            default_memory: 512,
            cpus: 1,
            work,
        })
    }

    /// Whether the host itself takes part.
    pub fn native(&self) -> bool {
        let machines = &self.options.machines;
        machines.is_empty() || machines.contains(&Column::Native)
    }

    /// Memory of the guests, in MiB.
    pub fn memory(&self) -> u32 {
        self.options.memory.unwrap_or(self.default_memory)
    }

    /// Writes kernel and initial file system to `--export`'s directory, if it is given; whether it was.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn export(&self, initrd: &Path) -> Result<bool> {
        let Some(directory) = &self.options.export else {
            return Ok(false);
        };
        let doing = |e| format!("cannot write to {}: {e}", directory.display());
        std::fs::create_dir_all(directory).map_err(doing)?;
        std::fs::copy(&self.kernel, directory.join("vmlinuz")).map_err(doing)?;
        std::fs::copy(initrd, directory.join("initrd")).map_err(doing)?;
        println!(
            "written: {0}/vmlinuz and {0}/initrd; run them with --append \"{COMMAND_LINE}\"",
            directory.display()
        );
        Ok(true)
    }

    /// How many rounds to run.
    pub fn rounds(&self, default: u32) -> u32 {
        let default = if self.options.quick { 1 } else { default };
        self.options.rounds.unwrap_or(default)
    }

    /// Writes an initial file system whose `/init` gets `arguments`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn initrd(&self, name: &str, arguments: &str) -> Result<PathBuf> {
        let path = self.work.path().join(name);
        self.write(&path, cpio::archive(&self.guest_bytes, arguments))?;
        Ok(path)
    }

    /// The same, with the files below `tree`.
    ///
    /// # Errors
    /// If they cannot be read, or it cannot be written.
    pub fn initrd_with(&self, name: &str, arguments: &str, tree: &Path) -> Result<PathBuf> {
        let path = self.work.path().join(name);
        // The kernel unpacks one archive after the other.
        let mut bytes = cpio::tree(tree)?;
        bytes.extend(cpio::archive(&self.guest_bytes, arguments));
        self.write(&path, bytes)?;
        Ok(path)
    }

    fn write(&self, path: &Path, bytes: Vec<u8>) -> Result<()> {
        std::fs::write(path, bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))
    }
}

/// Whether `program --version` can be run.
fn runs(program: &OsStr) -> bool {
    Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success())
}

fn find_anykvm(options: &Options) -> Result<Option<PathBuf>> {
    if let Some(given) = &options.anykvm {
        return match runs(given.as_os_str()) {
            true => Ok(Some(given.clone())),
            false => Err(format!("cannot run {}", given.display())),
        };
    }
    let beside = std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name("anykvm"));
    Ok(beside
        .into_iter()
        .chain(["anykvm".into()])
        .find(|program| runs(program.as_os_str())))
}

fn find_qemu(program: &Path) -> Option<PathBuf> {
    if runs(program.as_os_str()) {
        return Some(program.to_owned());
    }
    eprintln!(
        "bench: {} is not there, so its column is empty; on Debian: apt-get install qemu-system-x86",
        program.display()
    );
    None
}

/// The default guest's kernel, from the cache or from the archive.
fn default_kernel(anykvm: &Path, work: &Path) -> Result<PathBuf> {
    let directory = work.join("default-guest");
    let output = Command::new(anykvm)
        .arg("fetch")
        .arg("--export")
        .arg(&directory)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run {}: {e}", anykvm.display()))?;
    if !output.status.success() {
        return Err(format!(
            "'anykvm fetch' did not give a kernel: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    Ok(directory.join("vmlinuz"))
}

/// Builds the guest program, without shared libraries, into a directory of its own: other flags
/// would make cargo build everything else anew.
fn build_guest() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let own = std::env::current_exe().map_err(|e| format!("own path: {e}"))?;
    let directory = own.ancestors().nth(2).unwrap_or(root).join("bench-guest");
    let status = Command::new(cargo)
        .current_dir(root)
        .args(["build", "--quiet", "--release", "--package", "bench_guest"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&directory)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-Ctarget-feature=+crt-static\x1f-Cstrip=symbols",
        )
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("cannot run cargo to build the guest program: {e}"))?;
    match status.success() {
        true => Ok(directory.join(TARGET).join("release/bench_guest")),
        false => Err("the guest program could not be built: see above".into()),
    }
}
