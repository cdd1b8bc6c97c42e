//! What the user asked for, checked before anything is started or downloaded.

use std::os::unix::fs::FileTypeExt;

use vmm::virtio::disk::DiskConfig;

use crate::check::facts::Facts;
use crate::check::{Choice, choose, size};
use crate::cli::{Net, RunArgs};
use crate::disk;
use crate::error::{Error, reason};
use crate::options::MemorySize;

/// The least memory in which the default guest starts.
const LEAST_FOR_DEFAULT_GUEST: u64 = 128 << 20;

/// A run that can be tried.
#[derive(Debug)]
pub struct Plan {
    /// The engine and why.
    pub engine: Choice,
    /// The user's disks.
    pub disks: Vec<DiskConfig>,
}

/// Checks `args` against this machine.
///
/// # Errors
/// What is wrong first.
pub fn check(args: &RunArgs, facts: &Facts) -> Result<Plan, Error> {
    check_cpus(args.cpus)?;
    check_memory(args.memory, args.kernel.is_none(), facts)?;
    check_net(args)?;
    for (what, path) in [("kernel", &args.kernel), ("initrd", &args.initrd)] {
        let Some(path) = path else { continue };
        let file = std::fs::File::open(path).and_then(|file| file.metadata());
        let problem = match file {
            Ok(status) if status.is_dir() => "it is a directory".to_owned(),
            Ok(status) if status.file_type().is_char_device() => "it is a device".to_owned(),
            Ok(_) => continue,
            Err(e) => reason(&e),
        };
        return Err(Error::new(format!(
            "cannot read the {what} {}: {problem}",
            path.display()
        ))
        .hint("name a file you can read, or leave --kernel out for the default guest"));
    }
    let engine = choose(args.engine, facts)?;
    let disks = args
        .disks
        .iter()
        .map(disk::check)
        .collect::<Result<_, _>>()?;
    Ok(Plan { engine, disks })
}

fn check_cpus(cpus: u32) -> Result<(), Error> {
    let most = vmm::machine::MAX_CPUS;
    if (1..=most).contains(&cpus) {
        return Ok(());
    }
    Err(Error::usage(format!("a machine has 1 to {most} CPUs, not {cpus}")).hint("change --cpus"))
}

fn check_memory(memory: MemorySize, default_guest: bool, facts: &Facts) -> Result<(), Error> {
    let (limit, of_what) = facts.memory.limit();
    if memory.bytes() > limit {
        return Err(Error::usage(format!(
            "the guest cannot have {memory} of memory: {} is all that {of_what}",
            size(limit)
        ))
        .hint("give less with --memory"));
    }
    if default_guest && memory.bytes() < LEAST_FOR_DEFAULT_GUEST {
        return Err(Error::usage(format!(
            "the default guest does not start in {memory} of memory"
        ))
        .hint("give at least 128M with --memory"));
    }
    if memory.bytes() > facts.memory.available {
        log::warn!(
            "the guest has {memory} of memory, and only {} are available now",
            size(facts.memory.available)
        );
    }
    Ok(())
}

fn check_net(args: &RunArgs) -> Result<(), Error> {
    if args.net == Net::None && !args.publish.is_empty() {
        return Err(
            Error::usage("--publish needs a network, and --net none leaves it out")
                .hint("drop one of the two"),
        );
    }
    for (index, publish) in args.publish.iter().enumerate() {
        let place = |f: &netstack::Forward| (f.proto, f.host_addr, f.host_port);
        let taken = |other: &netstack::Forward| place(other) == place(publish);
        if publish.host_port != 0 && args.publish[..index].iter().any(taken) {
            return Err(Error::usage(format!(
                "the port {} of this machine is published twice",
                publish.host_port
            ))
            .hint("give each --publish a port of its own"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn message(options: &[&str]) -> String {
        let cli = Cli::try_parse_from(["anykvm", "run"].iter().chain(options)).unwrap();
        let Command::Run(args) = cli.command else {
            panic!("not run");
        };
        let mut facts = Facts::default();
        facts.memory.total = 4 << 30;
        facts.memory.available = 4 << 30;
        check(&args, &facts).map_or_else(|e| e.to_string(), |_| String::new())
    }

    #[test]
    fn what_cannot_be_is_told() {
        for (options, part) in [
            (&["--cpus", "0"][..], "1 to 254 CPUs, not 0"),
            (&["--cpus", "10000"], "not 10000"),
            (
                &["--memory", "5G"],
                "5G of memory: 4.0 GiB is all that this machine has",
            ),
            (&["--memory", "64M"], "at least 128M"),
            (&["--kernel", "/nonexistent"], "no such file"),
            (&["--kernel", "/"], "directory"),
            (&["--kernel", "/dev/zero"], "a device"),
            (&["--disk", "/nonexistent"], "does not exist"),
            (&["--net", "none", "--publish", "1:2"], "--publish needs"),
            (&["--publish", "1:2", "--publish", "1:3"], "twice"),
            (&["--engine", "kvm"], "cannot use /dev/kvm"),
        ] {
            let message = message(options);
            assert!(message.contains(part), "{options:?}: {message}");
        }
        for options in [&[][..], &["--publish", "1:2", "--publish", "1:2/udp"]] {
            assert_eq!(message(options), "");
        }
    }
}
