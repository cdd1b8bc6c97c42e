//! Devices that QEMU models, each with its driver in Debian's kernel.

use std::time::{Duration, Instant};

use e2e::trial;
use serde_json::json;

use super::Case;
use crate::disk::{NOISE, with_noise};
use crate::error::{Error, Result, ensure, wrong};
use crate::guest::Kernel;
use crate::vm::{Machine, Run, Vm};

const NETWORK: &str = "-netdev user,id=net -device";

pub(super) fn cases() -> Vec<Case> {
    let disk = |name: &str, kind: &'static str, modules: &'static [&'static str], cpus: u32| {
        let device = name.rsplit('/').next().unwrap_or_default().to_owned();
        Case::new(format!("device/{name}"), move |run| {
            disk(run, &device, kind, modules, cpus).map(|()| None)
        })
    };
    let network = |name: &'static str, arguments: &'static str| {
        Case::new(format!("device/{name}"), move |run| {
            network(run, arguments).map(|()| None)
        })
    };
    let mut cases = vec![
        disk("virtio-blk", "q35:vda", &["virtio_pci", "virtio_blk"], 2),
        disk("ide", "pc:sda", &["ata_piix", "sd_mod"], 1),
        disk("ahci", "q35:sda", &["ahci", "sd_mod"], 2),
        disk("nvme", "q35:nvme0n1", &["nvme"], 2),
        disk("usb", "q35:sda", &["xhci_pci", "usb_storage", "sd_mod"], 1),
        network(
            "virtio-net",
            "q35 virtio-net-pci virtio_pci virtio_net af_packet",
        ),
        network(
            "virtio-net-mmio",
            "microvm virtio-net-device virtio_mmio virtio_net af_packet",
        ),
        network("e1000", "pc e1000 e1000 af_packet"),
        Case::of("device/virtio-rng", rng),
        Case::of("device/keyboard", keyboard),
        Case::of("device/vga", vga),
    ];
    for machine in ["q35", "pc"] {
        for irqchip in ["on", "split", "off"] {
            cases.push(
                Case::new(format!("device/irqchip-{irqchip}/{machine}"), move |run| {
                    // Without the kernel's APICs QEMU 7.2 never forgets a startup IPI, and a second
                    // CPU does nothing but take it.
                    let cpus = if irqchip == "off" { 1 } else { 2 };
                    let mut machine = Machine::new(machine)
                        .kernel(Kernel::Generic)
                        .smp(cpus.to_string())
                        .load(&["virtio_pci", "virtio_net", "af_packet"])
                        .with(NETWORK)
                        .with("virtio-net-pci,netdev=net");
                    machine.accel = format!(",kernel-irqchip={irqchip}");
                    let mut vm = match Vm::boot(run, &machine) {
                        // Since QEMU 11.
                        Err(Error::Wrong(why)) if why.contains("not support userspace APIC") => {
                            eprintln!("QEMU {} cannot do that", run.emulator.version);
                            return Ok(None);
                        }
                        started => started?,
                    };
                    trial::network(&mut vm.session)?;
                    vm.works(cpus)?;
                    vm.power_off().map(|()| None)
                })
                .kvm_only(),
            );
        }
    }
    cases
}

fn disk(run: &Run, device: &str, place: &str, modules: &[&'static str], cpus: u32) -> Result {
    let (machine, name) = place.split_once(':').unwrap_or((place, ""));
    let bus = match device {
        "virtio-blk" => "-device virtio-blk-pci,drive=disk",
        "ide" | "ahci" => "-device ide-hd,drive=disk",
        "nvme" => "-device nvme,drive=disk,serial=1",
        _ => "-device qemu-xhci -device usb-storage,drive=disk",
    };
    let machine = Machine::new(machine)
        .kernel(Kernel::Generic)
        .smp(cpus.to_string())
        .load(modules)
        .with("-drive if=none,id=disk,format=raw,file={dir}/noise")
        .with(bus);
    let mut vm = Vm::prepared(run, &machine, |directory| {
        with_noise(directory, "noise").map(|_| ())
    })?;
    vm.ready(run)?;
    // USB devices and disks appear some time after their driver.
    vm.command(&format!(
        "for i in $(seq 100); do [ -b /dev/{name} ] && break; sleep 0.1; done"
    ))?;
    let written = trial::use_disk(&mut vm.session, name, NOISE)?;
    vm.works(cpus)?;
    let path = vm.file("noise");
    vm.command("sync")?;
    vm.qmp.execute("stop", json!({}))?;
    let content = std::fs::read(path)?;
    let piece = &content[content.len() / 2..][..1 << 20];
    ensure(trial::digest(piece) == written, || {
        "what the guest wrote is not on the disk".into()
    })?;
    vm.qmp.execute("cont", json!({}))?;
    vm.power_off()
}

fn network(run: &Run, words: &'static str) -> Result {
    let words: Vec<&'static str> = words.split(' ').collect();
    let machine = Machine::new(words[0])
        .kernel(Kernel::Generic)
        .load(&words[2..])
        .with(NETWORK)
        .with(&format!("{},netdev=net", words[1]));
    let mut vm = Vm::boot(run, &machine)?;
    trial::network(&mut vm.session)?;
    vm.works(1)?;
    vm.power_off()
}

fn rng(run: &Run) -> Result {
    let machine = Machine::new("q35")
        .kernel(Kernel::Generic)
        .load(&["virtio_pci", "virtio_rng"])
        .with("-device virtio-rng-pci");
    let mut vm = Vm::boot(run, &machine)?;
    let bytes =
        vm.command("dd if=/dev/hwrng bs=4096 count=4 iflag=fullblock 2>/dev/null | gzip | wc -c")?;
    ensure(bytes.parse().is_ok_and(|bytes: u32| bytes > 16_000), || {
        format!("16384 random bytes compress to {bytes}")
    })?;
    vm.works(1)?;
    vm.power_off()
}

/// A key that the monitor presses arrives through USB.
fn keyboard(run: &Run) -> Result {
    let machine = Machine::new("q35")
        .kernel(Kernel::Generic)
        .load(&["xhci_pci", "usbhid", "hid_generic", "evdev"])
        .with("-device qemu-xhci -device usb-kbd");
    let mut vm = Vm::boot(run, &machine)?;
    let found = vm.command(
        "for i in $(seq 100); do grep -q 'QEMU USB Keyboard' /proc/bus/input/devices && break; sleep 0.1; done; \
         grep -A 4 'QEMU USB Keyboard' /proc/bus/input/devices | grep -o 'event[0-9]*'",
    )?;
    vm.session.type_in(&format!(
        "dd if=/dev/input/{found} bs=24 count=6 2>/dev/null | od -A n -t u2 -w24 -v; echo 'keys' 'came'\n"
    ))?;
    std::thread::sleep(Duration::from_millis(1000));
    for key in ["a", "q"] {
        vm.qmp.human(&format!("sendkey {key}"))?;
        std::thread::sleep(Duration::from_millis(300));
    }
    let said = vm.session.expect("keys came", Duration::from_secs(20))?;
    // Columns 8 to 11 of an event: type, code, value (Linux, "Input event codes"); 30 is A.
    ensure(
        said.lines().any(|line| {
            line.split_whitespace().collect::<Vec<_>>().get(8..11) == Some(&["1", "30", "1"])
        }),
        || format!("no key A in the events: {said}"),
    )?;
    vm.works(1)?;
    vm.power_off()
}

/// A picture, as QEMU saves it.
struct Picture {
    width: usize,
    pixels: Vec<u8>,
}

impl Picture {
    fn of(vm: &mut Vm) -> Result<Self> {
        let path = vm.file("screen.ppm");
        vm.qmp.execute(
            "screendump",
            json!({ "filename": path.display().to_string() }),
        )?;
        let bytes = std::fs::read(path)?;
        // "P6 WIDTH HEIGHT 255", each followed by one white space.
        let mut words = bytes.splitn(5, |byte| byte.is_ascii_whitespace());
        let mut number = || {
            std::str::from_utf8(words.next()?)
                .ok()?
                .parse::<usize>()
                .ok()
        };
        number();
        let (width, height) = (number().unwrap_or(0), number().unwrap_or(0));
        number();
        let pixels = words.next().unwrap_or_default().to_vec();
        ensure(
            width * height > 0 && pixels.len() == width * height * 3,
            || "the picture is no PPM file".into(),
        )?;
        Ok(Self { width, pixels })
    }

    fn lit(&self) -> usize {
        self.pixels
            .chunks_exact(3)
            .filter(|pixel| pixel.iter().any(|&value| value > 60))
            .count()
    }
}

/// Text appears on a linear frame buffer, whose changes QEMU finds by the dirty log.
fn vga(run: &Run) -> Result {
    let machine = Machine::new("q35")
        .kernel(Kernel::Generic)
        .with("-vga std")
        .append("vga=0x317");
    let mut vm = Vm::boot(run, &machine)?;
    vm.command("echo -e '\\033[2J\\033[H\\033[?25l' >/dev/tty1; sleep 0.3")?;
    let empty = Picture::of(&mut vm)?;
    ensure(empty.width == 1024, || {
        format!("the picture is {} wide", empty.width)
    })?;
    let mut before = empty.lit();
    for line in 1..=4 {
        vm.command("seq -s ' ' 1 40 >/dev/tty1")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let lit = Picture::of(&mut vm)?.lit();
            if lit > before + 200 {
                before = lit;
                break;
            }
            if Instant::now() > deadline {
                return wrong(format!(
                    "line {line} of text does not appear: {lit} bright pixels, {before} before"
                ));
            }
        }
    }
    vm.works(1)?;
    vm.power_off()?;
    // Text mode and the firmware's own screen.
    let machine = Machine::new("pc").with("-vga std");
    let mut vm = Vm::boot(run, &machine)?;
    let lit = Picture::of(&mut vm)?.lit();
    ensure(lit > 200, || {
        format!("the text screen has {lit} bright pixels")
    })?;
    vm.power_off()
        .map_err(|e| Error::Wrong(format!("text mode: {e}")))
}
