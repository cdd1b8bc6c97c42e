//! Machines, firmware, processors, and where the kernel comes from: `boot/MACHINE/FIRMWARE/CPU/
//! CPUS/SOURCE`.

use super::{Case, Found};
use crate::disk::bootable;
use crate::error::Result;
use crate::guest::Kernel;
use crate::vm::{Machine, Run, Vm, kernel_line};

/// A row of the matrix.
#[derive(Debug, Clone, Copy)]
struct Row {
    machine: &'static str,
    firmware: &'static str,
    cpu: &'static str,
    cpus: u32,
    source: &'static str,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (machine, firmware) in [
        ("microvm", "seabios"),
        ("microvm", "qboot"),
        ("q35", "seabios"),
        ("q35", "ovmf"),
        ("pc", "seabios"),
        ("pc", "ovmf"),
    ] {
        for cpu in ["host", "max", "qemu64", named_model()] {
            for cpus in [1, 2] {
                for source in ["kernel", "disk"] {
                    let row = Row {
                        machine,
                        firmware,
                        cpu,
                        cpus,
                        source,
                    };
                    // A microvm starts the kernel that QEMU loads; without ACPI tables nothing
                    // tells the kernel of a second CPU.
                    if machine == "microvm" && source == "disk" || firmware == "qboot" && cpus > 1 {
                        continue;
                    }
                    let name = format!("boot/{machine}/{firmware}/{cpu}/{cpus}/{source}");
                    let case = Case::new(name, move |run| boot(run, row));
                    cases.push(match cpu {
                        "host" => case.kvm_only(),
                        _ => case,
                    });
                }
            }
        }
    }
    cases.push(Case::new("boot/q35/seabios/max/2/generic", |run| {
        let machine = Machine::new("q35").kernel(Kernel::Generic).smp("2");
        let mut vm = Vm::start(run, &machine)?;
        let took = vm.ready(run)?;
        vm.works(2)?;
        vm.power_off()?;
        Ok(Some(took))
    }));
    cases
}

/// A model of QEMU's that is near to this machine's processor.
fn named_model() -> &'static str {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match text.contains("AuthenticAMD") {
        true => "EPYC",
        false => "Skylake-Client",
    }
}

fn boot(run: &Run, row: Row) -> Result<Found> {
    let mut machine = Machine::new(row.machine).smp(row.cpus.to_string());
    machine.cpu = row.cpu.into();
    if row.firmware == "qboot" {
        machine.machine += ",acpi=off";
    }
    if row.source == "disk" {
        let line = kernel_line(&[], " nokaslr");
        let disk = bootable(&line)?;
        machine.kernel = None;
        // Not all through the same driver of the firmware.
        let device = match (row.machine, row.firmware) {
            ("pc", "seabios") => "ide-hd",
            _ => "virtio-blk-pci",
        };
        machine = machine
            .with("-device")
            .with(&format!("{device},drive=boot,bootindex=0"))
            .with("-drive");
        machine.arguments.push(format!(
            "if=none,id=boot,format=raw,snapshot=on,file={}",
            disk.display()
        ));
    }
    let (code, variables) = run.emulator.ovmf.clone();
    if row.firmware == "ovmf" {
        // Debian 12's OVMF makes page tables for all that the processor can address, with 2 MiB pages:
        // for 48 bits they take a GiB.
        if matches!(row.cpu, "host" | "max") {
            machine.cpu += ",host-phys-bits-limit=40";
        }
        machine = machine.with("-drive");
        machine.arguments.push(format!(
            "if=pflash,format=raw,readonly=on,file={}",
            code.display()
        ));
        machine = machine.with("-drive if=pflash,format=raw,file={dir}/variables.fd");
    }
    let mut vm = Vm::prepared(run, &machine, |directory| {
        if row.firmware == "ovmf" {
            std::fs::copy(&variables, directory.join("variables.fd"))?;
        }
        Ok(())
    })?;
    let took = vm.ready(run)?;
    vm.works(row.cpus)?;
    if row.firmware == "ovmf" {
        vm.command("test -d /sys/firmware/efi")?;
    }
    match row.firmware {
        // It has no ACPI to power off with.
        "qboot" => vm.quit()?,
        _ => vm.power_off()?,
    }
    Ok(Some(took))
}
