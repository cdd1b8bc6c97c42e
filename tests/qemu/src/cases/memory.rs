//! The guest's memory and processors change while it runs.

use std::time::{Duration, Instant};

use serde_json::json;

use super::Case;
use crate::error::{Error, Result, ensure};
use crate::guest::Kernel;
use crate::vm::{Machine, Run, Vm};

const SOON: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::of("memory/balloon", balloon),
        Case::of("memory/hotplug", hotplug),
        Case::of("memory/cpu-hotplug", cpu_hotplug),
    ]
}

/// Total and free memory that the guest sees, in KiB.
fn free(vm: &mut Vm) -> Result<(u64, u64)> {
    let text = vm.command("grep -E '^Mem(Total|Free)' /proc/meminfo")?;
    let mut values = text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1)?.parse().ok());
    Ok((values.next().unwrap_or(0), values.next().unwrap_or(0)))
}

fn until(vm: &mut Vm, mut right: impl FnMut((u64, u64)) -> bool, what: &str) -> Result {
    let deadline = Instant::now() + SOON;
    loop {
        let now = free(vm)?;
        if right(now) {
            return Ok(());
        }
        ensure(Instant::now() < deadline, || {
            format!("{what}: the guest has {now:?} KiB")
        })?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn balloon(run: &Run) -> Result {
    let machine = Machine::new("q35")
        .kernel(Kernel::Generic)
        .memory("512M")
        .load(&["virtio_pci", "virtio_balloon"])
        .with("-device virtio-balloon-pci");
    let mut vm = Vm::boot(run, &machine)?;
    let (total, _) = free(&mut vm)?;
    for _ in 0..2 {
        vm.qmp.execute("balloon", json!({ "value": 320 * MIB }))?;
        vm.qmp.until("query-balloon", SOON, |state| {
            Ok(state["actual"] == 320 * MIB)
        })?;
        until(&mut vm, |(now, _)| now + 180 * 1024 < total, "inflated")?;
        vm.qmp.execute("balloon", json!({ "value": 512 * MIB }))?;
        vm.qmp.until("query-balloon", SOON, |state| {
            Ok(state["actual"] == 512 * MIB)
        })?;
        until(&mut vm, |(now, _)| now + 1024 > total, "deflated")?;
        // Memory that QEMU gave back to the host comes again.
        vm.command(
            "dd if=/dev/urandom of=/tmp/a bs=1M count=160 2>/dev/null; cp /tmp/a /tmp/b; \
             cmp /tmp/a /tmp/b; rm /tmp/a /tmp/b",
        )?;
    }
    vm.works(1)?;
    vm.power_off()
}

fn hotplug(run: &Run) -> Result {
    let machine = Machine::new("q35")
        .memory("256M,slots=2,maxmem=1G")
        .smp("2")
        .append("memhp_default_state=online");
    let mut vm = Vm::boot(run, &machine)?;
    let (total, _) = free(&mut vm)?;
    vm.qmp.execute(
        "object-add",
        json!({ "qom-type": "memory-backend-ram", "id": "backend", "size": 256 * MIB }),
    )?;
    vm.qmp.execute(
        "device_add",
        json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "backend" }),
    )?;
    until(&mut vm, |(now, _)| now >= total + 256 * 1024, "plugged")?;
    vm.command(
        "dd if=/dev/urandom of=/tmp/a bs=1M count=120 2>/dev/null; cp /tmp/a /tmp/b; \
         cmp /tmp/a /tmp/b; rm /tmp/a /tmp/b",
    )?;
    vm.works(2)?;
    vm.power_off()
}

fn cpu_hotplug(run: &Run) -> Result {
    let machine = Machine::new("q35").smp("1,maxcpus=2");
    let mut vm = Vm::boot(run, &machine)?;
    let cpus = vm.qmp.execute("query-hotpluggable-cpus", json!({}))?;
    let mut free = cpus
        .as_array()
        .into_iter()
        .flatten()
        .find(|cpu| cpu.get("qom-path").is_none())
        .cloned()
        .ok_or_else(|| Error::Wrong("QEMU has no place for another CPU".into()))?;
    let mut arguments = free["props"].take();
    arguments["driver"] = free["type"].take();
    arguments["id"] = json!("second");
    vm.qmp.execute("device_add", arguments)?;
    vm.command(
        "for i in $(seq 100); do [ -e /sys/devices/system/cpu/cpu1/online ] && break; sleep 0.1; done; \
         [ \"$(cat /sys/devices/system/cpu/cpu1/online)\" = 1 ] || echo 1 >/sys/devices/system/cpu/cpu1/online",
    )?;
    vm.works(2)?;
    vm.power_off()
}
