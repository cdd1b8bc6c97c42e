//! Disks for guests: one that BIOS and UEFI boot from, an empty qcow2, noise.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::trial::noise;

use crate::debian::{BOOT, kept};
use crate::error::{Result, wrong};
use crate::guest::Kernel;

/// Bytes of a disk with noise.
pub const NOISE: u64 = 16 << 20;
const BOOT_DISK: u64 = 64 << 20;

/// A disk with [`noise`] of seed 1 in `directory`.
///
/// # Errors
/// If it cannot be written.
pub fn with_noise(directory: &Path, name: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    fs::write(&path, noise(1, NOISE as usize))?;
    Ok(path)
}

/// A FAT file system without a partition table that boots Debian's cloud kernel: from a BIOS with
/// SYSLINUX, from UEFI with systemd-boot. The guest's command line is `append`.
///
/// # Errors
/// If a package is not to be had or the disk cannot be made.
pub fn bootable(append: &str) -> Result<PathBuf> {
    let directory = kept("qemu-boot-disk", |directory| {
        make(&directory.join("disk.img"), append)
    })?;
    Ok(directory.join("disk.img"))
}

fn make(path: &Path, append: &str) -> Result {
    let packages = BOOT.unpacked()?;
    let guest = Kernel::Cloud.files()?;
    let image = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    image.set_len(BOOT_DISK)?;
    fatfs::format_volume(&image, fatfs::FormatVolumeOptions::new())?;
    {
        let volume = fatfs::FileSystem::new(&image, fatfs::FsOptions::new())?;
        let root = volume.root_dir();
        for directory in ["EFI", "EFI/BOOT", "loader", "loader/entries"] {
            root.create_dir(directory)?;
        }
        let write = |name: &str, content: &[u8]| -> std::io::Result<()> {
            let mut file = root.create_file(name)?;
            file.write_all(content)?;
            file.flush()
        };
        write("VMLINUZ", &fs::read(guest.kernel)?)?;
        write("INITRD", &fs::read(guest.initrd)?)?;
        write(
            "syslinux.cfg",
            format!(
                "SERIAL 0\nDEFAULT linux\nPROMPT 0\nLABEL linux\nKERNEL VMLINUZ\nINITRD INITRD\n\
                 APPEND {append}\n"
            )
            .as_bytes(),
        )?;
        write(
            "EFI/BOOT/BOOTX64.EFI",
            &fs::read(packages.join("usr/lib/systemd/boot/efi/systemd-bootx64.efi"))?,
        )?;
        write("loader/loader.conf", b"timeout 0\n")?;
        write(
            "loader/entries/linux.conf",
            format!("title linux\nlinux /VMLINUZ\ninitrd /INITRD\noptions {append}\n").as_bytes(),
        )?;
    }
    drop(image);
    let tools = packages.join("usr/bin");
    let path_variable = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(tools.join("syslinux"))
        .arg("--install")
        .arg(path)
        .env("PATH", format!("{}:{path_variable}", tools.display()))
        .output()?;
    match output.status.success() {
        true => Ok(()),
        false => wrong(format!(
            "syslinux does not install: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// Writes an empty disk in QEMU's format, version 2 (QEMU documentation, "Qcow2 image format").
///
/// # Errors
/// If it cannot be written.
pub fn empty_qcow2(path: &Path, size: u64) -> Result {
    const CLUSTER_BITS: u32 = 16;
    const CLUSTER: u64 = 1 << CLUSTER_BITS;
    // Clusters: header, refcount table, refcount block, L1 table.
    let mut image = vec![0; 4 * CLUSTER as usize];
    let l1_entries = u32::try_from(size.div_ceil(CLUSTER * (CLUSTER / 8))).unwrap_or(u32::MAX);
    let mut header = Vec::new();
    header.extend(b"QFI\xfb");
    header.extend(2u32.to_be_bytes());
    // No backing file.
    header.extend([0; 12]);
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(size.to_be_bytes());
    // Not encrypted.
    header.extend(0u32.to_be_bytes());
    header.extend(l1_entries.to_be_bytes());
    header.extend((3 * CLUSTER).to_be_bytes());
    header.extend(CLUSTER.to_be_bytes());
    header.extend(1u32.to_be_bytes());
    // No snapshots.
    header.extend([0; 12]);
    image[..header.len()].copy_from_slice(&header);
    let table = CLUSTER as usize;
    image[table..table + 8].copy_from_slice(&(2 * CLUSTER).to_be_bytes());
    for cluster in 0..4 {
        let at = 2 * CLUSTER as usize + cluster * 2;
        image[at..at + 2].copy_from_slice(&1u16.to_be_bytes());
    }
    fs::write(path, image)?;
    Ok(())
}
