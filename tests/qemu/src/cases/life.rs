//! Reset, power, sleep, pause, snapshots.

use std::time::Duration;

use serde_json::json;

use super::Case;
use crate::disk::empty_qcow2;
use crate::error::{Result, ensure};
use crate::guest::Kernel;
use crate::vm::{Machine, Run, Vm};

const SOON: Duration = Duration::from_secs(60);

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::of("life/poweroff", |run| {
            let mut vm = Vm::boot(run, &Machine::new("q35").smp("2"))?;
            vm.session.type_in("poweroff -f\n")?;
            let why = vm.qmp.event("SHUTDOWN", SOON)?;
            ensure(why["reason"] == "guest-shutdown", || {
                format!("QEMU ends because of {why}")
            })?;
            vm.ends()
        }),
        Case::of("life/power-button", power_button),
        Case::of("life/stop-cont", stop_cont),
        Case::of("life/savevm", savevm),
    ];
    for machine in ["microvm", "q35", "pc"] {
        cases.push(Case::new(format!("life/reset/{machine}"), move |run| {
            reset(run, machine).map(|()| None)
        }));
    }
    for machine in ["q35", "pc"] {
        cases.push(Case::new(format!("life/s3/{machine}"), move |run| {
            sleep(run, machine).map(|()| None)
        }));
    }
    cases
}

/// From outside, and twice from inside.
fn reset(run: &Run, machine: &str) -> Result {
    let machine = match machine {
        // It has nothing to reset with; QEMU's manual says to ask for a triple fault.
        "microvm" => Machine::new(machine).append("reboot=t"),
        _ => Machine::new(machine),
    };
    let machine = machine.smp("2");
    let mut vm = Vm::boot(run, &machine)?;
    vm.command("echo here >/tmp/here")?;
    vm.qmp.execute("system_reset", json!({}))?;
    vm.ready(run)?;
    vm.command("test ! -e /tmp/here")?;
    vm.works(2)?;
    for _ in 0..2 {
        vm.session.type_in("reboot -f\n")?;
        vm.ready(run)?;
    }
    vm.works(2)?;
    vm.power_off()
}

fn power_button(run: &Run) -> Result {
    let machine = Machine::new("q35")
        .kernel(Kernel::Generic)
        .load(&["button", "evdev"]);
    let mut vm = Vm::boot(run, &machine)?;
    let found = vm.command(
        "grep -A 4 'Name=\"Power Button\"' /proc/bus/input/devices | grep -o 'event[0-9]*'",
    )?;
    vm.session.type_in(&format!(
        "dd if=/dev/input/{found} bs=24 count=1 >/dev/null 2>&1 && echo 'button' 'pressed'\n"
    ))?;
    std::thread::sleep(Duration::from_millis(500));
    vm.qmp.execute("system_powerdown", json!({}))?;
    vm.session.expect("button pressed", SOON)?;
    vm.works(1)?;
    vm.power_off()
}

/// Suspend to RAM: the firmware leads back to the kernel. On `q35` the registers for sleep and power
/// are gone after that, with TCG too; so there it sleeps once.
fn sleep(run: &Run, machine: &str) -> Result {
    let machine = Machine::new(machine).kernel(Kernel::Generic).smp("2");
    let mut vm = Vm::boot(run, &machine)?;
    let rounds = if machine.machine == "pc" { 2 } else { 1 };
    for round in ["one", "two"].into_iter().take(rounds) {
        vm.command(&format!("echo {round} >/tmp/round"))?;
        vm.session
            .type_in("echo mem >/sys/power/state; echo 'awake' 'again'\n")?;
        vm.qmp.event("SUSPEND", SOON)?;
        std::thread::sleep(Duration::from_millis(300));
        vm.qmp.execute("system_wakeup", json!({}))?;
        vm.qmp.event("WAKEUP", SOON)?;
        vm.session.expect("awake again", SOON)?;
        let kept = vm.command("cat /tmp/round")?;
        ensure(kept == round, || format!("the file holds '{kept}'"))?;
        vm.works(2)?;
    }
    match rounds {
        1 => vm.quit(),
        _ => vm.power_off(),
    }
}

fn stop_cont(run: &Run) -> Result {
    let mut vm = Vm::boot(run, &Machine::new("q35").smp("2"))?;
    for cpu in 0..2 {
        vm.session.type_in(&format!(
            "taskset -c {cpu} sh -c 'while [ ! -e /tmp/stop ]; do true; done' </dev/null &\n"
        ))?;
    }
    for _ in 0..3 {
        vm.command("true")?;
        vm.qmp.execute("stop", json!({}))?;
        let before = vm.qmp.human("info registers -a")?;
        std::thread::sleep(Duration::from_millis(300));
        let after = vm.qmp.human("info registers -a")?;
        ensure(before == after && before.contains("RIP="), || {
            format!("a stopped guest goes on: {before} {after}")
        })?;
        vm.qmp.execute("cont", json!({}))?;
        std::thread::sleep(Duration::from_millis(300));
        let running = vm.qmp.human("info registers -a")?;
        ensure(running != before, || "the guest does not go on".to_owned())?;
    }
    vm.command("touch /tmp/stop")?;
    vm.works(2)?;
    vm.power_off()
}

/// A snapshot in a qcow2 disk, loaded by the same and by another process.
fn savevm(run: &Run) -> Result {
    let machine = Machine::new("q35")
        .smp("2")
        .with("-drive if=virtio,format=qcow2,file={dir}/disk.qcow2");
    let mut vm = Vm::prepared(run, &machine, |directory| {
        empty_qcow2(&directory.join("disk.qcow2"), 1 << 30)
    })?;
    vm.ready(run)?;
    vm.command(
        "echo before >/tmp/when; dd if=/dev/urandom of=/tmp/noise bs=1M count=16 2>/dev/null; \
         sha256sum /tmp/noise >/tmp/sum",
    )?;
    said_nothing(&vm.qmp.human("savevm one")?)?;
    vm.command("echo after >/tmp/when; rm /tmp/noise")?;
    for _ in 0..2 {
        said_nothing(&vm.qmp.human("loadvm one")?)?;
        let when = vm.command("cat /tmp/when; sha256sum -c /tmp/sum")?;
        ensure(when.starts_with("before"), || {
            format!("after loadvm the file says '{when}'")
        })?;
        vm.command("echo after >/tmp/when")?;
    }
    vm.works(2)?;
    vm.qmp.execute("stop", json!({}))?;
    let disk = vm.file("disk.qcow2");
    let copy = tempfile::NamedTempFile::new()?;
    let copy_path = copy.path().to_owned();
    vm.quit_keeping(|| std::fs::copy(&disk, &copy_path).map(|_| ()))?;
    let machine = machine.with("-loadvm one");
    let mut vm = Vm::prepared(run, &machine, |directory| {
        std::fs::copy(&copy_path, directory.join("disk.qcow2"))?;
        Ok(())
    })?;
    let when = vm.command("cat /tmp/when; sha256sum -c /tmp/sum")?;
    ensure(when.starts_with("before"), || {
        format!("with -loadvm the file says '{when}'")
    })?;
    vm.works(2)?;
    vm.power_off()
}

fn said_nothing(text: &str) -> Result {
    ensure(text.trim().is_empty(), || text.trim().to_owned())
}
