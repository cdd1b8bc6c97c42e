//! bzImage: Linux's x86 boot protocol, 64-bit and 32-bit entry.

use super::{Entry, Error, Kernel, Target};
use crate::layout::HIGH_RAM_START;

/// Offset of the setup header in the file and in the zero page.
pub(super) const SETUP_HEADER: usize = 0x1f1;
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
const JUMP_DISTANCE: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const INITRD_ADDR_MAX: usize = 0x22c;
const RELOCATABLE: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry is, from the start of the protected-mode code.
const ENTRY64: u64 = 0x200;
/// The first boot protocol with `init_size` and `pref_address`; Linux 2.6.31 of 2009.
const OLDEST: u16 = 0x20a;

/// Loads the bzImage `image`.
pub(super) fn load(target: &Target<'_>, image: &[u8]) -> Result<Kernel, Error> {
    let Some(header) = image.get(..0x270) else {
        // A file too short to tell is called cut short only if it looks like a boot sector.
        return Err(match image.get(BOOT_FLAG..BOOT_FLAG + 2) {
            Some([0x55, 0xaa]) => target.truncated(image.len(), 0x270),
            _ => target.format("neither a bzImage nor an ELF file"),
        });
    };
    if header[MAGIC..MAGIC + 4] != *b"HdrS" {
        return Err(target.format(describe(image)));
    }
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if u16_at(VERSION) < OLDEST {
        return Err(target.format("its boot protocol is older than 2.10 (Linux 2.6.31)"));
    }
    if header[LOADFLAGS] & LOADED_HIGH == 0 {
        return Err(target.format("it is a zImage, which loads below 1 MiB"));
    }
    let setup_sects = match header[SETUP_SECTS] {
        0 => 4,
        n => usize::from(n),
    };
    let setup_len = (setup_sects + 1) * 512;
    let code_len = u64::from(u32_at(SYSSIZE)) * 16;
    let need = setup_len as u64 + code_len;
    let code = usize::try_from(need)
        .ok()
        .and_then(|end| image.get(setup_len..end));
    let Some(code) = code else {
        return Err(target.truncated(image.len(), need));
    };

    let init_size = u64::from(u32_at(INIT_SIZE)).max(code_len);
    let preferred = u64_at(PREF_ADDRESS);
    let mut start = preferred;
    if header[RELOCATABLE] != 0
        && target
            .check_range(start, start.saturating_add(init_size))
            .is_err()
    {
        start = HIGH_RAM_START.next_multiple_of(u64::from(u32_at(0x230)).max(1));
    }
    let end = start.saturating_add(init_size);
    target.check_range(start, end)?;
    target.write(start, code)?;

    let entry32 = u32::try_from(start)
        .map_err(|_| target.format("it asks for a load address that no kernel can have"))?;
    let entry = if u16_at(XLOADFLAGS) & XLF_KERNEL_64 != 0 {
        if code.len() as u64 <= ENTRY64 {
            return Err(target.truncated(image.len(), setup_len as u64 + ENTRY64 + 1));
        }
        Entry::Linux64(start + ENTRY64)
    } else {
        Entry::Linux32(entry32)
    };
    let header_end = (MAGIC + usize::from(header[JUMP_DISTANCE])).min(header.len());
    let mut setup_header = header[SETUP_HEADER..header_end.max(INIT_SIZE + 4)].to_vec();
    // code32_start: tells the kernel where it was put.
    setup_header[0x214 - SETUP_HEADER..0x218 - SETUP_HEADER]
        .copy_from_slice(&entry32.to_le_bytes());
    Ok(Kernel {
        entry,
        start,
        end,
        initrd_max: u64::from(u32_at(INITRD_ADDR_MAX)),
        cmdline_max: usize::try_from(u32_at(CMDLINE_SIZE)).unwrap_or(usize::MAX),
        setup_header: Some(setup_header),
    })
}

/// Names what the file is instead, when that is easy to see.
fn describe(image: &[u8]) -> &'static str {
    match image {
        [0x1f, 0x8b, ..] => "it is a gzip file: unpack it first",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is an xz file: unpack it first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is a zstd file: unpack it first",
        [b'0', b'7', b'0', b'7', ..] => "it is a cpio archive, perhaps the initrd",
        [b'Q', b'F', b'I', 0xfb, ..] => "it is a qcow2 disk image",
        [b'!', b'<', b'a', b'r', ..] => "it is a package, not the kernel inside it",
        _ => "neither a bzImage nor an ELF file",
    }
}
