//! A running QEMU: its monitor and the guest's console.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use e2e::session::Session;
use serde_json::json;
use tempfile::TempDir;

use crate::emulator::{Accel, Emulator};
use crate::error::{Result, ensure, wrong};
use crate::guest::Kernel;
use crate::qmp::Qmp;

/// What the kernel complains with.
const COMPLAINTS: &str = "BUG|WARNING|Call Trace|Oops|stall|lockup|protection fault|segfault|traps:|\
    I/O error|nobody cared|timed out|Spurious";
/// Longest answer of a guest.
pub const ANSWER: Duration = Duration::from_secs(60);

/// With what all cases of a run are run.
#[derive(Debug, Clone)]
pub struct Run {
    /// The QEMU.
    pub emulator: Emulator,
    /// Who executes the guest.
    pub accel: Accel,
    /// From power-on to the shell at most.
    pub boot_limit: Duration,
    /// Further words for the guest kernel's command line.
    pub append: String,
}

/// A machine to start.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Value of `-machine`.
    pub machine: String,
    /// Value of `-cpu`.
    pub cpu: String,
    /// Value of `-smp`.
    pub smp: String,
    /// Value of `-m`.
    pub memory: String,
    /// Properties of the accelerator, as `,NAME=VALUE`.
    pub accel: String,
    /// The kernel that QEMU loads, if it does.
    pub kernel: Option<Kernel>,
    /// Drivers that the guest loads.
    pub load: Vec<&'static str>,
    /// Words for the kernel's command line.
    pub append: String,
    /// All other arguments.
    pub arguments: Vec<String>,
}

impl Machine {
    /// A machine of type `machine` with Debian's cloud kernel, one CPU and 256 MiB.
    pub fn new(machine: &str) -> Self {
        Self {
            machine: machine.into(),
            cpu: "max".into(),
            smp: "1".into(),
            memory: "256M".into(),
            accel: String::new(),
            kernel: Some(Kernel::Cloud),
            load: Vec::new(),
            append: String::new(),
            arguments: Vec::new(),
        }
    }

    /// With `kernel`.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// With so many CPUs.
    pub fn smp(mut self, smp: impl Into<String>) -> Self {
        self.smp = smp.into();
        self
    }

    /// With `memory`.
    pub fn memory(mut self, memory: &str) -> Self {
        self.memory = memory.into();
        self
    }

    /// With drivers in the guest.
    pub fn load(mut self, modules: &[&'static str]) -> Self {
        self.load.extend(modules);
        self
    }

    /// With words for the kernel.
    pub fn append(mut self, words: &str) -> Self {
        self.append += &format!(" {words}");
        self
    }

    /// With arguments: `text` is split at spaces.
    pub fn with(mut self, text: &str) -> Self {
        self.arguments
            .extend(text.split_whitespace().map(str::to_owned));
        self
    }

    /// With one argument that may have spaces.
    pub fn argument(mut self, text: &str) -> Self {
        self.arguments.push(text.to_owned());
        self
    }
}

/// The command line of the guest's kernel.
pub fn kernel_line(load: &[&str], append: &str) -> String {
    format!(
        "console=ttyS0 quiet panic=-1 load={}{append}",
        load.join(",")
    )
}

/// A running machine. It is killed with the value.
pub struct Vm {
    /// The guest's console.
    pub session: Session,
    /// QEMU's monitor.
    pub qmp: Qmp,
    directory: TempDir,
    started: Instant,
}

impl Vm {
    /// Starts `machine`; `{dir}` in its arguments is the directory of the machine's files, which
    /// `prepare` may fill.
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn prepared(
        run: &Run,
        machine: &Machine,
        prepare: impl FnOnce(&Path) -> Result,
    ) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        prepare(directory.path())?;
        let place = directory.path().display().to_string();
        let socket = directory.path().join("qmp");
        let accel = match run.accel {
            Accel::Tcg => "tcg",
            Accel::HostKvm | Accel::AnyKvm(_) => "kvm",
        };
        let mut command = run.emulator.command(&run.accel);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-chardev", "stdio,id=console,signal=off"])
            .args(["-serial", "chardev:console"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(["-accel", &format!("{accel}{}", machine.accel)])
            .args(["-machine", &machine.machine])
            .args(["-cpu", &machine.cpu])
            .args(["-smp", &machine.smp])
            .args(["-m", &machine.memory]);
        if let Some(kernel) = machine.kernel {
            let files = kernel.files()?;
            let append = format!("{} {}", machine.append, run.append);
            command
                .arg("-kernel")
                .arg(files.kernel)
                .arg("-initrd")
                .arg(files.initrd)
                .arg("-append")
                .arg(kernel_line(&machine.load, &append));
        }
        command.args(
            machine
                .arguments
                .iter()
                .map(|argument| argument.replace("{dir}", &place)),
        );
        if std::env::var_os("QEMU_E2E_SHOW").is_some() {
            eprintln!("{command:?}");
        }
        let started = Instant::now();
        let mut session = Session::start(&mut command)?;
        let connected = Qmp::connect(&socket, Duration::from_secs(30), || session.running());
        let qmp = match connected {
            Ok(qmp) => qmp,
            Err(error) => {
                let _ = session.end(Duration::from_secs(1));
                return wrong(format!("{error}: {}", session.output().trim()));
            }
        };
        Ok(Self {
            session,
            qmp,
            directory,
            started,
        })
    }

    /// Starts `machine`.
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn start(run: &Run, machine: &Machine) -> Result<Self> {
        Self::prepared(run, machine, |_| Ok(()))
    }

    /// Starts `machine` and waits for the guest's shell.
    ///
    /// # Errors
    /// If it does not come.
    pub fn boot(run: &Run, machine: &Machine) -> Result<Self> {
        let mut vm = Self::start(run, machine)?;
        vm.ready(run)?;
        Ok(vm)
    }

    /// Waits for the guest's shell; gives the time from QEMU's start until then.
    ///
    /// # Errors
    /// If it does not come.
    pub fn ready(&mut self, run: &Run) -> Result<Duration> {
        let said = self
            .session
            .expect("qemu_e2e: the shell is ready", run.boot_limit)?;
        let took = self.started.elapsed();
        ensure(
            !said.contains("cannot load") && !said.contains("Kernel panic"),
            || said.clone(),
        )?;
        // Takes the shell's greeting with it.
        self.command("true")?;
        Ok(took)
    }

    /// Runs a command in the guest and gives what it prints.
    ///
    /// # Errors
    /// If it fails or does not end.
    pub fn command(&mut self, command: &str) -> Result<String> {
        let said = self.session.command(command, ANSWER)?;
        // The shell tells of its jobs' ends between.
        let lines = said
            .lines()
            .filter(|line| !(line.starts_with('[') && line.contains("+  Done ")))
            .filter(|line| !(line.starts_with('[') && line.contains("-  Done ")));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    /// The guest has `cpus` processors that compute right, and nothing to complain about.
    ///
    /// # Errors
    /// If not.
    pub fn works(&mut self, cpus: u32) -> Result {
        let count = self.command("grep -c '^processor' /proc/cpuinfo")?;
        ensure(count == cpus.to_string(), || {
            format!("the guest sees {count} processors, not {cpus}")
        })?;
        let sums = self.command(&format!(
            "for cpu in $(seq 0 {}); do (taskset -c $cpu seq 20000 | gzip | gzip -d | sha256sum) & done; wait",
            cpus - 1
        ))?;
        let text: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
        let right = e2e::trial::digest(text.as_bytes());
        let found = sums.lines().filter(|line| line.starts_with(&right)).count();
        ensure(found == cpus as usize, || {
            format!("{found} of {cpus} checksums are right: {sums}")
        })?;
        // Advice about the host's processor is no complaint about the machine.
        let complaints = self.command(&format!(
            "dmesg | grep -E '{COMPLAINTS}' | grep -v hw-vuln || true"
        ))?;
        ensure(complaints.is_empty(), || {
            format!("the kernel complains: {complaints}")
        })
    }

    /// Powers off from inside; QEMU ends without an error.
    ///
    /// # Errors
    /// If it does not end so.
    pub fn power_off(mut self) -> Result {
        self.session.type_in("poweroff -f\n")?;
        self.ends()
    }

    /// Waits for QEMU's end.
    ///
    /// # Errors
    /// If it does not end, or with an error.
    pub fn ends(mut self) -> Result {
        let code = self.session.end(Duration::from_secs(60))?;
        ensure(code == Some(0), || {
            format!("QEMU ends with {code:?}: {}", self.session.output())
        })
    }

    /// Ends QEMU from outside, without an error.
    ///
    /// # Errors
    /// If it does not end so.
    pub fn quit(mut self) -> Result {
        self.qmp.execute("quit", json!({}))?;
        self.ends()
    }

    /// As [`Vm::quit`]; before the machine's files are gone, `save` is called.
    ///
    /// # Errors
    /// If QEMU does not end, or `save` fails.
    pub fn quit_keeping(mut self, save: impl FnOnce() -> std::io::Result<()>) -> Result {
        self.qmp.execute("quit", json!({}))?;
        let code = self.session.end(Duration::from_secs(60))?;
        ensure(code == Some(0), || {
            format!("QEMU ends with {code:?}: {}", self.session.output())
        })?;
        Ok(save()?)
    }

    /// A file of this machine.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::env::var_os("QEMU_E2E_SHOW").is_some() {
            eprintln!("{}", self.session.output());
        }
    }
}
