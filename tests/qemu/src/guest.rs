//! The guests: Debian's cloud and generic kernels with busybox and every driver that a case may
//! ask for on the kernel's command line.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anykvm::guest::cpio::Archive;
use anykvm::guest::{deb, modules};
use e2e::archive::{self, Doing, cache};

use crate::debian::kept;
use crate::error::{Error, Result};

const INIT: &[u8] = include_bytes!("init.sh");

/// Drivers that can be asked for. Those that a kernel has built in are not in its package.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "af_packet",
    "e1000",
    "ata_piix",
    "ahci",
    "sd_mod",
    "nvme",
    "xhci_pci",
    "usb_storage",
    "usbhid",
    "hid_generic",
    "evdev",
    "button",
    "psmouse",
];

/// Folders of the kernel's tree in which those and what they need are.
const FOLDERS: &[&str] = &[
    "/drivers/virtio/",
    "/drivers/block/virtio_blk",
    "/drivers/net/virtio_net",
    "/drivers/net/net_failover",
    "/net/core/failover",
    "/net/packet/",
    "/hw_random/",
    "/intel/e1000/",
    "/drivers/ata/",
    "/drivers/scsi/s",
    "/drivers/nvme/host/",
    "/drivers/nvme/common/",
    "/drivers/usb/host/xhci",
    "/drivers/usb/core/",
    "/drivers/usb/common/",
    "/drivers/usb/storage/usb-storage",
    "/drivers/hid/hid",
    "/drivers/hid/usbhid/",
    "/drivers/input/",
    "/drivers/acpi/button",
    "/kernel/block/",
    "/kernel/lib/",
    "/kernel/crypto/",
    "/arch/x86/crypto/crc",
];

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's for virtual machines.
    Cloud,
    /// Debian 12's for all machines.
    Generic,
}

/// A kernel that can be booted.
#[derive(Debug, Clone)]
pub struct Files {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: PathBuf,
}

impl Kernel {
    fn name(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Generic => "generic",
        }
    }

    /// Its files, from the cache or from the archive.
    ///
    /// # Errors
    /// If the archive does not help.
    pub fn files(self) -> Result<Files> {
        let directory = kept(&format!("qemu-guest-{}", self.name()), |directory| {
            self.fetch(directory)
        })?;
        let archive = initramfs(&directory)?;
        let initrd = directory.join("initrd");
        // Another process may be booting it: replaced in one step.
        if fs::read(&initrd).ok().as_deref() != Some(&archive) {
            let new = tempfile::NamedTempFile::new_in(&directory)?;
            fs::write(new.path(), &archive)?;
            new.persist(&initrd).map_err(|e| e.error)?;
        }
        Ok(Files {
            kernel: directory.join("vmlinuz"),
            initrd,
        })
    }

    fn fetch(self, directory: &Path) -> Result {
        eprintln!("qemu_e2e: fetching Debian's {} kernel", self.name());
        let suites = &["bookworm", "bookworm-security"];
        let state = cache("anykvm-e2e")?.join("apt-amd64-bookworm-security");
        let lock = fs::File::create(state.with_extension("lock"))?;
        lock.lock()?;
        let apt = archive::apt(&state, suites, "amd64")?;
        let complaint = apt.update(|_| {})?;
        let package = |name: &str| {
            apt.show(name)?.ok_or_else(|| {
                anykvm::Error::new(format!(
                    "the archive has no {name} {}",
                    complaint.as_deref().unwrap_or_default()
                ))
            })
        };
        let mut image = package(match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Generic => "linux-image-amd64",
        })?;
        if let Some(real) = image.depends.iter().find(|n| n.starts_with("linux-image-")) {
            image = package(real)?;
        }
        let path = apt.download(&image, |_| {})?;
        let mut files = deb::files(&path, |name| {
            name.starts_with("boot/vmlinuz-") || FOLDERS.iter().any(|folder| name.contains(folder))
        })?;
        let _ = fs::remove_file(path);
        let vmlinuz = files
            .keys()
            .find(|name| name.starts_with("boot/vmlinuz-"))
            .cloned()
            .and_then(|name| files.remove(&name))
            .ok_or_else(|| Error::Wrong(format!("{} holds no kernel", image.name)))?;
        fs::write(directory.join("vmlinuz"), vmlinuz)?;
        let busybox = deb::files(
            &apt.download(&package("busybox-static")?, |_| {})?,
            |name| name.ends_with("bin/busybox"),
        )?;
        let busybox = busybox
            .into_values()
            .next()
            .ok_or_else(|| Error::Wrong("busybox-static holds no busybox".into()))?;
        fs::write(directory.join("busybox"), busybox)?;
        fs::create_dir(directory.join("modules"))?;
        save_modules(&files, &directory.join("modules"))
    }
}

/// Writes the modules, decompressed, and for each that can be asked for the order to load in.
fn save_modules(files: &BTreeMap<String, Vec<u8>>, directory: &Path) -> Result {
    let by_name: BTreeMap<String, (&String, &Vec<u8>)> = files
        .iter()
        .filter_map(|(path, content)| Some((modules::name_of(path)?, (path, content))))
        .collect();
    let mut depends = BTreeMap::new();
    let mut open: Vec<String> = MODULES.iter().map(ToString::to_string).collect();
    while let Some(name) = open.pop() {
        let Some((path, content)) = by_name.get(&name) else {
            continue;
        };
        if depends.contains_key(&name) {
            continue;
        }
        let content = deb::decompress_module(path, content.to_vec())?;
        let needed = modules::dependencies(&name, &content)?;
        open.extend(needed.iter().cloned());
        fs::write(directory.join(format!("{name}.ko")), content)?;
        depends.insert(name, needed);
    }
    for name in MODULES {
        let order: String = modules::load_order(&[name], &depends)
            .into_iter()
            .map(|name| format!("{name}.ko\n"))
            .collect();
        fs::write(directory.join(format!("{name}.order")), order)?;
    }
    Ok(())
}

/// busybox, the drivers and `/init`.
fn initramfs(kept: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "mnt",
        "proc",
        "sys",
        "tmp",
    ] {
        archive.directory(directory, 0o755);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    let busybox = fs::read(kept.join("busybox")).doing("cannot read the cache")?;
    archive.file("bin/busybox", 0o755, &busybox);
    for applet in [
        "cat",
        "chvt",
        "cmp",
        "cp",
        "date",
        "dd",
        "dmesg",
        "echo",
        "free",
        "grep",
        "gzip",
        "head",
        "hexdump",
        "insmod",
        "ip",
        "kill",
        "ls",
        "mkdir",
        "mount",
        "od",
        "ping",
        "poweroff",
        "reboot",
        "rm",
        "sed",
        "seq",
        "setsid",
        "sh",
        "sha256sum",
        "sleep",
        "stty",
        "sync",
        "tail",
        "taskset",
        "timeout",
        "tr",
        "true",
        "udhcpc",
        "umount",
        "uname",
        "wc",
        "wget",
    ] {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    let mut paths: Vec<PathBuf> = fs::read_dir(kept.join("modules"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("lib/modules/{name}"), 0o644, &fs::read(&path)?);
    }
    archive.file(
        "etc/udhcpc.script",
        0o755,
        b"#!/bin/sh\n[ \"$1\" = bound ] || exit 0\nip addr replace $ip/$mask dev $interface\n\
          ip route replace default via $router\n",
    );
    archive.file("init", 0o755, INIT);
    Ok(archive.finish())
}
