//! The structures of the PVH boot protocol: start info, modules, memory map.

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::{Error, Initrd, Target, memory_map};
use crate::layout::{CMDLINE, PVH_START_INFO};

const MAGIC: u32 = 0x336e_c578;

/// Writes the start info for a guest with `size` bytes of RAM.
pub(super) fn write(
    target: &Target<'_>,
    size: u64,
    initrd: Initrd,
    rsdp: u64,
) -> Result<(), Error> {
    let modules_at = PVH_START_INFO + size_of::<hvm_start_info>() as u64;
    let map_at = modules_at + size_of::<hvm_modlist_entry>() as u64;
    let map = memory_map::build(size);
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.len > 0),
        modlist_paddr: if initrd.len > 0 { modules_at } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: map_at,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    target.write(PVH_START_INFO, info.as_slice())?;
    let module = hvm_modlist_entry {
        paddr: initrd.addr,
        size: initrd.len,
        ..Default::default()
    };
    target.write(modules_at, module.as_slice())?;
    let mut at = map_at;
    for range in map {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: range.kind as u32,
            ..Default::default()
        };
        target.write(at, entry.as_slice())?;
        at += entry.as_slice().len() as u64;
    }
    Ok(())
}
