//! Linux's boot parameters ("zero page") and `setup_data`.

use super::bzimage::SETUP_HEADER;
use super::{Error, Initrd, Kernel, Target, memory_map};
use crate::layout::{CMDLINE, SETUP_DATA, ZERO_PAGE};

const ACPI_RSDP: usize = 0x70;
const E820_ENTRIES: usize = 0x1e8;
const VID_MODE: usize = 0x1fa;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMDLINE_PTR: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const SETUP_DATA_PTR: usize = 0x250;
const E820_TABLE: usize = 0x2d0;

const LOADED_HIGH: u8 = 1;
/// "No registered boot loader".
const LOADER_UNDEFINED: u8 = 0xff;
const VID_NORMAL: u16 = 0xffff;
/// `SETUP_RNG_SEED`: entropy, so that the guest need not wait for its own.
const SETUP_RNG_SEED: u32 = 9;
const SEED_LEN: usize = 32;

/// Writes the zero page of a guest with `size` bytes of RAM, and the `setup_data` chain.
pub(super) fn write(
    target: &Target<'_>,
    size: u64,
    kernel: &Kernel,
    initrd: Initrd,
    rsdp: u64,
) -> Result<(), Error> {
    let mut seed = [0u8; SEED_LEN];
    let seeded = crate::entropy::fill(&mut seed).is_ok();
    if seeded {
        let mut data = Vec::with_capacity(16 + SEED_LEN);
        data.extend_from_slice(&0u64.to_le_bytes());
        data.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
        data.extend_from_slice(&(SEED_LEN as u32).to_le_bytes());
        data.extend_from_slice(&seed);
        target.write(SETUP_DATA, &data)?;
    }
    let mut page = build(size, kernel, initrd, rsdp);
    if seeded {
        put(&mut page, SETUP_DATA_PTR, &SETUP_DATA.to_le_bytes());
    }
    target.write(ZERO_PAGE, &page)
}

fn put(page: &mut [u8; 4096], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

pub(super) fn build(size: u64, kernel: &Kernel, initrd: Initrd, rsdp: u64) -> [u8; 4096] {
    let mut page = [0u8; 4096];
    match &kernel.setup_header {
        Some(header) => put(&mut page, SETUP_HEADER, header),
        None => {
            // vmlinux has no header; these are what the kernel checks or uses.
            put(&mut page, BOOT_FLAG, &[0x55, 0xaa]);
            put(&mut page, MAGIC, b"HdrS");
            put(&mut page, VERSION, &0x20fu16.to_le_bytes());
            put(&mut page, KERNEL_ALIGNMENT, &0x100_0000u32.to_le_bytes());
            page[LOADFLAGS] = LOADED_HIGH;
        }
    }
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED;
    put(&mut page, VID_MODE, &VID_NORMAL.to_le_bytes());
    put(&mut page, ACPI_RSDP, &rsdp.to_le_bytes());
    // Both fit: the initrd lies below 3 GiB.
    put(
        &mut page,
        RAMDISK_IMAGE,
        &(initrd.addr as u32).to_le_bytes(),
    );
    put(&mut page, RAMDISK_SIZE, &(initrd.len as u32).to_le_bytes());
    put(&mut page, CMDLINE_PTR, &(CMDLINE as u32).to_le_bytes());
    // Whatever chain the file names is not in guest memory.
    put(&mut page, SETUP_DATA_PTR, &0u64.to_le_bytes());
    let map = memory_map::build(size);
    page[E820_ENTRIES] = map.len() as u8;
    for (index, range) in map.iter().enumerate() {
        let at = E820_TABLE + index * 20;
        put(&mut page, at, &range.start.to_le_bytes());
        put(&mut page, at + 8, &range.len.to_le_bytes());
        put(&mut page, at + 16, &(range.kind as u32).to_le_bytes());
    }
    page
}
