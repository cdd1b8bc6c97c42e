//! ELF kernels: vmlinux by its entry point, or anything with a PVH entry note.
//!
//! The reader is bounded and checks every offset, because the file may be anything; it takes
//! the layout of the structures from linux-loader.

use linux_loader::loader::elf::start_info::hvm_start_info;

use super::{Entry, Error, Kernel, Target};

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit entry point of the PVH boot protocol.
const PHYS32_ENTRY: u32 = 18;

/// The memory that a kernel may use for its bss and early page tables beyond its segments.
const SLACK: u64 = 1 << 20;

/// Whether `image` is an ELF file.
pub(super) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

/// A program header, of either class.
struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_size: u64,
    mem_size: u64,
}

/// Loads the ELF file `image`.
pub(super) fn load(target: &Target<'_>, image: &[u8]) -> Result<Kernel, Error> {
    let file = File { image, target };
    let wide = match (file.u8(4)?, file.u8(5)?) {
        (1, 1) => false,
        (2, 1) => true,
        (1 | 2, _) => return Err(target.format("it is an ELF file of another byte order")),
        _ => return Err(target.format("its ELF header makes no sense")),
    };
    match (wide, file.u16(18)?) {
        (true, EM_X86_64) | (false, EM_386) => {}
        _ => return Err(target.format("it is an ELF file for another architecture")),
    }
    if !matches!(file.u16(16)?, ET_EXEC | ET_DYN) {
        return Err(target.format("it is an ELF object, not a linked kernel"));
    }
    let (entry, table, entry_size, count) = if wide {
        (file.u64(24)?, file.u64(32)?, 56, file.u16(56)?)
    } else {
        (
            u64::from(file.u32(24)?),
            u64::from(file.u32(28)?),
            32,
            file.u16(44)?,
        )
    };

    let mut pvh = None;
    let (mut start, mut end) = (u64::MAX, 0u64);
    for index in 0..u64::from(count) {
        let at = table.saturating_add(index * entry_size);
        let segment = file.segment(at, wide)?;
        match segment.kind {
            PT_LOAD if segment.mem_size > 0 => {
                let bytes = file.bytes(segment.offset, segment.file_size)?;
                let segment_end = segment
                    .paddr
                    .saturating_add(segment.mem_size.max(segment.file_size));
                target.check_range(segment.paddr, segment_end)?;
                target.write(segment.paddr, bytes)?;
                start = start.min(segment.paddr);
                end = end.max(segment_end);
            }
            PT_NOTE if pvh.is_none() => {
                pvh = phys32_entry(file.bytes(segment.offset, segment.file_size)?);
            }
            _ => {}
        }
    }
    if end == 0 {
        return Err(target.format("it has nothing to load"));
    }
    let within = |address: u64| (start..end).contains(&address);
    let entry = match pvh {
        Some(address) if within(u64::from(address)) => Entry::Pvh(address),
        Some(_) => return Err(target.format("its PVH entry point is outside the kernel")),
        None if !within(entry) => {
            return Err(target.format("its entry point is outside the kernel"));
        }
        None if wide => Entry::Linux64(entry),
        None => Entry::Linux32(
            u32::try_from(entry).map_err(|_| target.format("its entry point is above 4 GiB"))?,
        ),
    };
    Ok(Kernel {
        entry,
        start,
        end: end.saturating_add(SLACK),
        initrd_max: 0x7fff_ffff,
        cmdline_max: 2047,
        setup_header: None,
    })
}

/// Finds the PVH entry point in a note segment.
fn phys32_entry(mut notes: &[u8]) -> Option<u32> {
    let word = |bytes: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    loop {
        let name_size = word(notes, 0)? as usize;
        let desc_size = word(notes, 4)? as usize;
        let kind = word(notes, 8)?;
        let desc_at = 12usize.checked_add(name_size.checked_next_multiple_of(4)?)?;
        if kind == PHYS32_ENTRY && notes.get(12..12 + 4)? == b"Xen\0" && desc_size >= 4 {
            return word(notes, desc_at);
        }
        let next = desc_at.checked_add(desc_size.checked_next_multiple_of(4)?)?;
        notes = notes.get(next..)?;
    }
}

/// A bounded view of the file.
struct File<'a> {
    image: &'a [u8],
    target: &'a Target<'a>,
}

impl File<'_> {
    fn bytes(&self, at: u64, len: u64) -> Result<&[u8], Error> {
        let end = at.saturating_add(len);
        usize::try_from(at)
            .ok()
            .zip(usize::try_from(end).ok())
            .and_then(|(at, end)| self.image.get(at..end))
            .ok_or_else(|| self.target.truncated(self.image.len(), end))
    }

    fn array<const N: usize>(&self, at: u64) -> Result<[u8; N], Error> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(at, N as u64)?);
        Ok(array)
    }

    fn u8(&self, at: u64) -> Result<u8, Error> {
        self.array::<1>(at).map(|[byte]| byte)
    }

    fn u16(&self, at: u64) -> Result<u16, Error> {
        self.array(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: u64) -> Result<u32, Error> {
        self.array(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: u64) -> Result<u64, Error> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn segment(&self, at: u64, wide: bool) -> Result<Segment, Error> {
        let field = |offset: u64| at.saturating_add(offset);
        let kind = self.u32(at)?;
        Ok(if wide {
            Segment {
                kind,
                offset: self.u64(field(8))?,
                paddr: self.u64(field(24))?,
                file_size: self.u64(field(32))?,
                mem_size: self.u64(field(40))?,
            }
        } else {
            Segment {
                kind,
                offset: self.u32(field(4))?.into(),
                paddr: self.u32(field(12))?.into(),
                file_size: self.u32(field(16))?.into(),
                mem_size: self.u32(field(20))?.into(),
            }
        })
    }
}

/// The start info structure of PVH has the size that this module's sibling writes.
const _: () = assert!(size_of::<hvm_start_info>() == 56);
