//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Benchmarks of AnyKVM beside QEMU's TCG and the host.
#[derive(Debug, Parser)]
#[command(
    name = "bench",
    about = "Benchmarks of AnyKVM beside QEMU's TCG and the host; docs/performance.md explains them",
    disable_help_subcommand = true,
    after_help = "\
Exit codes:
  0  all ran, and all machines computed the same
  1  something could not run, or computed something else; the text says what"
)]
pub struct Cli {
    /// What to measure
    #[command(subcommand)]
    pub command: Command,
    /// How
    #[command(flatten)]
    pub options: Options,
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Time from power-on to /init, with the same kernel and initial file system
    Boot,
    /// The workloads: natively, in AnyKVM, in QEMU TCG
    User,
    /// Real programs of Debian 12 (a compiler, interpreters, compressors ...): the same three machines
    Programs,
    /// What two CPUs compute in the time of one: the same three machines
    Smp,
    /// Time of 'anykvm run -- true' and to the prompt of the default guest
    Prompt,
    /// Memory of the process beside the guest's RAM
    Memory,
    /// What leaving guest code costs a VMM: exits, wake-ups, events; here and on this machine's /dev/kvm
    Exits,
    /// Hottest translated code of the workloads of --only, guest and host instructions side by side; needs perf
    Hot,
    /// QEMU with AnyKVM for its /dev/kvm beside the same QEMU with TCG: boot and workloads
    Qemu,
    /// The VMM of 'exits'
    #[command(hide = true)]
    ExitsChild,
    /// All of these
    All,
}

impl Command {
    /// The name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::User => "user",
            Self::Programs => "programs",
            Self::Smp => "smp",
            Self::Prompt => "prompt",
            Self::Memory => "memory",
            Self::Exits => "exits",
            Self::Hot => "hot",
            Self::Qemu => "qemu",
            Self::ExitsChild => "exits-child",
            Self::All => "all",
        }
    }
}

/// How to measure.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Rounds; in each, every machine has its turn [default: 3 for 'user', 'programs', 'smp', 5 for the others]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,

    /// A quarter of the work, once: for a first look, not for a result
    #[arg(long, global = true)]
    pub quick: bool,

    /// Only these workloads or classes
    #[arg(long, global = true, value_name = "NAME,...", value_delimiter = ',')]
    pub only: Vec<String>,

    /// Only these machines
    #[arg(long, global = true, value_name = "MACHINE,...", value_delimiter = ',')]
    pub machines: Vec<Column>,

    /// Kernel for both virtual machines [default: the default guest's, as 'anykvm fetch' gets it]
    #[arg(long, global = true, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Engine of AnyKVM: auto, jit or kvm
    #[arg(long, global = true, value_name = "ENGINE", default_value = "jit")]
    pub engine: String,

    /// The anykvm program [default: beside this program, else in PATH]
    #[arg(long, global = true, value_name = "FILE")]
    pub anykvm: Option<PathBuf>,

    /// The QEMU program
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "qemu-system-x86_64"
    )]
    pub qemu: PathBuf,

    /// Memory of the guests, in MiB [default: 512; 1024 for 'programs']
    #[arg(long, global = true, value_name = "MIB", value_parser = clap::value_parser!(u32).range(64..))]
    pub memory: Option<u32>,

    /// Only write vmlinuz and initrd of 'user', 'programs' or 'smp' to DIR, for a profiler's run
    #[arg(long, global = true, value_name = "DIR")]
    pub export: Option<PathBuf>,

    /// Also write everything measured to FILE
    #[arg(long, global = true, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// A column of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Column {
    /// The host itself
    Native,
    /// AnyKVM
    Anykvm,
    /// QEMU's translator
    Tcg,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
