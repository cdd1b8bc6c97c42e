//! Boots a kernel with COM1 on the terminal:
//! `boot [--engine jit|kvm] [--cpus N] [--memory MIB] [--disk FILE]... KERNEL [INITRD [CMDLINE]]`.

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use vmm::boot::{Blob, Payload};
use vmm::channel::ByteChannel;
use vmm::hypervisor::Engine;
use vmm::machine::{Machine, MachineConfig, Outcome};
use vmm::virtio::disk::DiskConfig;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let (mut engine, mut cpus, mut memory) = (Engine::Kvm, 1, 512u64);
    let mut rest = Vec::new();
    let mut disks = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "--engine" if value()? == "jit" => engine = Engine::Jit,
            "--engine" => {}
            "--cpus" => cpus = value()?.parse()?,
            "--disk" => disks.push(DiskConfig::new(value()?)),
            "--memory" => memory = value()?.parse()?,
            _ => rest.push(arg),
        }
    }
    let mut rest = rest.into_iter();
    let kernel = rest.next().ok_or("which kernel?")?;
    let payload = Payload {
        kernel: Blob::Path(kernel.into()),
        initrd: rest
            .next()
            .filter(|i| !i.is_empty())
            .map(|i| Blob::Path(i.into()))
            .into_iter()
            .collect(),
        cmdline: rest
            .next()
            .unwrap_or_else(|| "console=ttyS0 earlyprintk=ttyS0".into()),
    };
    let config = MachineConfig {
        cpus,
        memory: memory << 20,
        disks,
        serial: ByteChannel {
            input: Some(Arc::new(io::stdin().as_fd().try_clone_to_owned()?)),
            output: Some(Arc::new(io::stdout().as_fd().try_clone_to_owned()?)),
        },
        ..MachineConfig::new(engine, payload)
    };
    loop {
        match Machine::build(&config)?.run()? {
            Outcome::PowerOff | Outcome::Stopped => return Ok(ExitCode::SUCCESS),
            Outcome::Reset => eprintln!("boot: the guest resets"),
            Outcome::Crashed(crash) => {
                eprintln!("{}\nboot: {crash}", crash.registers);
                return Ok(ExitCode::FAILURE);
            }
        }
    }
}
