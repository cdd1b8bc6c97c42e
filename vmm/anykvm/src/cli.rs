//! The command line: what `anykvm` accepts, and the help that teaches it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::options::{DiskSpec, MemorySize};

/// Virtual machines for every x86-64 Linux machine.
#[derive(Debug, Parser)]
#[command(
    name = "anykvm",
    version,
    about = "Virtual machines on every x86-64 Linux machine: no VT-x, no AMD-V, no root needed",
    after_help = "\
Examples:
  anykvm run                        boot Debian's kernel to a root shell; leave with 'exit'
  anykvm run -- uname -a            run one command in a fresh virtual machine
  anykvm exec -- qemu-system-x86_64 -accel kvm ...
                                    run another VMM, unmodified, where there is no KVM
  anykvm check                      say what this machine offers and which engine is used
  anykvm fetch                      download the default guest now, to be offline later

'anykvm run --help' explains kernels, disks, networks and the keys of the terminal.",
    disable_help_subcommand = true
)]
pub struct Cli {
    /// How much to tell on standard error about what is going on
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        default_value = "warn",
        ignore_case = true,
        help_heading = "Global options"
    )]
    pub log: LogLevel,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a virtual machine and connect it to this terminal
    Run(Box<RunArgs>),
    /// Run a program that needs /dev/kvm, such as QEMU, with AnyKVM in its place
    Exec(ExecArgs),
    /// Say what this machine offers and which engine will be used
    Check(CheckArgs),
    /// Measure how fast guests are here, beside the host and QEMU's TCG; under a minute
    Bench(BenchArgs),
    /// Download and prepare the default guest, so that 'run' works offline
    Fetch(FetchArgs),
}

/// `anykvm run`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  anykvm run                                    the default guest: a root shell with a scratch
                                                disk on /mnt and network
  anykvm run -- sh -c 'wget -qO- http://example.org | head'
                                                a command; its output and exit code come back
  anykvm run --cpus 2 --memory 2G               a larger machine
  anykvm run --publish 8080:80 -- httpd -f -p 80
                                                port 8080 of this machine leads to the guest's 80
  anykvm run --disk data.qcow2 --disk iso.img,ro
                                                two disks: /dev/vda, and /dev/vdb read-only
  anykvm run --kernel bzImage --initrd initrd.img --append 'console=ttyS0'
                                                your own kernel

Keys while the guest runs (as in QEMU):
  Ctrl-A x        stop the virtual machine at once and quit
  Ctrl-A h        show these keys
  Ctrl-A Ctrl-A   send Ctrl-A to the guest

Exit codes:
  with a COMMAND or the default guest's shell: the exit code it ended with
  otherwise: 0 when the guest powered off
  2    the command line is wrong
  125  AnyKVM could not start the machine, or the machine crashed
  128+N  AnyKVM was ended by signal N (143 for SIGTERM); also when a COMMAND was")]
pub struct RunArgs {
    /// Linux kernel to boot: a bzImage (vmlinuz), an ELF vmlinux or a PVH kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk for --kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// Text for the kernel's command line (for the default guest: added to AnyKVM's own)
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub append: String,

    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value = "1", value_parser = cpus)]
    pub cpus: u32,

    /// Memory of the guest: a number with M or G (without a letter: MiB)
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: MemorySize,

    /// Disk image or block device, in order /dev/vda, /dev/vdb...; ',,' stands for a comma in FILE
    #[arg(long = "disk", value_name = "FILE[,ro][,format=raw|qcow2]")]
    pub disks: Vec<DiskSpec>,

    /// Network of the guest
    #[arg(long, value_name = "KIND", default_value = "user")]
    pub net: Net,

    /// Lead a port of this machine to the guest's, e.g. 8080:80, 127.0.0.1:5353:53/udp
    #[arg(long = "publish", value_name = "[ADDR:]HOST:GUEST[/udp]")]
    pub publish: Vec<netstack::Forward>,

    /// What executes the guest's instructions
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    pub engine: Engine,

    /// Which device of the guest is connected to this terminal
    #[arg(long, value_name = "DEVICE", default_value = "serial")]
    pub console: Console,

    /// Command to run in the default guest, with its arguments
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "kernel")]
    pub command: Vec<OsString>,
}

/// A number that may be too large for a machine but is one: what is too large is said with the
/// machine's limit.
fn cpus(text: &str) -> Result<u32, String> {
    match text.parse::<u64>() {
        Ok(number) => Ok(u32::try_from(number).unwrap_or(u32::MAX)),
        Err(_) => Err("write a number, e.g. 2".into()),
    }
}

/// `anykvm exec`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  anykvm exec -- qemu-system-x86_64 -accel kvm -M q35 -cpu host -m 1G -nographic -hda disk.img
  anykvm exec --engine jit -- my-vmm    AnyKVM's translator even if the machine has a real /dev/kvm

The program sees a /dev/kvm that serves KVM's interface, inside its own process: no root, no kernel
module, no change to the program. It must be an x86-64 program that uses the GNU C library; what it
starts is served as well. The exit code is the program's.

Exit codes of AnyKVM itself:
  2    the command line is wrong
  125  AnyKVM could not start
  126  the program cannot be run or cannot be served (a static or a set-user-ID program)
  127  there is no such program")]
pub struct ExecArgs {
    /// What executes the guest's instructions
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    pub engine: ExecEngine,

    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub command: Vec<OsString>,
}

/// `anykvm exec --engine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExecEngine {
    /// The hardware's if this machine has VT-x or AMD-V that you may use, else jit
    Auto,
    /// AnyKVM's own translator: works everywhere
    Jit,
    /// AnyKVM's interpreter: very slow, to look for mistakes
    Interp,
    /// The /dev/kvm of this machine, whoever serves it
    Kvm,
}

/// `anykvm check`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Exit codes:
  0  this machine can run virtual machines with AnyKVM
  1  it cannot; the text says what is missing")]
pub struct CheckArgs {
    /// Print the findings as JSON, for scripts
    #[arg(long)]
    pub json: bool,
}

/// `anykvm bench`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Small workloads run on this machine itself, in a guest of AnyKVM, and in QEMU's TCG if qemu-system-x86_64
is installed: the same program each time. Times are medians of five.

Exit codes:
  0  all ran and computed the same
  1  a result differed
  125  a machine did not run")]
pub struct BenchArgs {
    /// Print every time as JSON, for scripts
    #[arg(long)]
    pub json: bool,

    /// What executes the guest's instructions
    #[arg(long, value_name = "ENGINE", default_value = "jit")]
    pub engine: Engine,

    /// Be the workloads, on the host or as a guest's first process
    #[arg(long, hide = true)]
    pub guest: bool,
}

/// `anykvm fetch`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The guest is Debian's kernel (linux-image-cloud-amd64) and busybox-static, taken from the archive
that this machine's apt is configured for, with apt's checks of signatures and checksums. Nothing
is installed and no root is needed: it goes to $XDG_CACHE_HOME/anykvm (~/.cache/anykvm).")]
pub struct FetchArgs {
    /// Ask the archive for newer versions even if a guest is already there
    #[arg(long)]
    pub refresh: bool,

    /// Also write the guest's vmlinuz, initrd and cmdline to DIR, to boot it with another program
    #[arg(long, value_name = "DIR")]
    pub export: Option<PathBuf>,
}

/// `--engine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// The hardware's if this machine has VT-x or AMD-V that you may use, else jit
    Auto,
    /// AnyKVM's own translator: works everywhere
    Jit,
    /// The /dev/kvm of this machine, whoever serves it
    Kvm,
}

/// `--net`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Net {
    /// Built in: outgoing connections and --publish, no root needed
    User,
    /// The program passt, if it is installed
    Passt,
    /// No network card
    None,
}

/// `--console`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Console {
    /// The first serial port, ttyS0
    Serial,
    /// A virtio console, hvc0: faster, but there only once its driver is loaded
    Virtio,
}

/// `--log`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Nothing
    Off,
    /// What went wrong
    Error,
    /// What may be wrong
    Warn,
    /// What is being done
    Info,
    /// What helps to find a mistake in AnyKVM
    Debug,
    /// Everything
    Trace,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::Off,
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn arguments_after_the_dashes_are_the_guests() {
        let cli = Cli::try_parse_from(["anykvm", "run", "--cpus", "2", "--", "ls", "--help", "-x"])
            .unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run");
        };
        assert_eq!(run.cpus, 2);
        assert_eq!(run.command, ["ls", "--help", "-x"]);
    }
}
