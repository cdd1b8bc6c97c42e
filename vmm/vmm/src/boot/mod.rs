//! Loading a kernel and describing the machine to it.
//!
//! Three ways in: Linux's 64-bit boot protocol (bzImage, and vmlinux without a PVH note),
//! Linux's 32-bit boot protocol (i386 bzImage), and PVH (ELF with a `PHYS32_ENTRY` note).

mod bzimage;
mod elf;
mod memory_map;
mod pvh;
mod registers;
mod zero_page;

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::layout::{ACPI_TABLES, CMDLINE, CMDLINE_MAX, HIGH_RAM_START, PCI_HOLE_START};
use crate::memory::GuestMem;
pub use registers::set_registers;

/// Largest kernel or initrd file that is read.
const MAX_IMAGE: u64 = 2 << 30;

/// Bytes for the guest: a file, or what the caller has in memory.
#[derive(Clone, Debug)]
pub enum Blob {
    /// A file.
    Path(PathBuf),
    /// Bytes, with a name for error messages.
    Bytes {
        /// What to call them.
        name: String,
        /// The bytes.
        bytes: Arc<[u8]>,
    },
}

impl Blob {
    /// The name for error messages.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Bytes { name, .. } => name.clone(),
        }
    }

    fn read(&self) -> Result<Arc<[u8]>, Error> {
        match self {
            Self::Bytes { bytes, .. } => Ok(Arc::clone(bytes)),
            Self::Path(path) => {
                let fail = |source| Error::Read {
                    name: self.name(),
                    source,
                };
                // The size that the file system tells may be 0 (a pipe), or not hold any more.
                let mut bytes = Vec::new();
                let file = std::fs::File::open(path).map_err(fail)?;
                let length = file.metadata().map_err(fail)?.len();
                if length <= MAX_IMAGE {
                    file.take(MAX_IMAGE + 1)
                        .read_to_end(&mut bytes)
                        .map_err(fail)?;
                }
                if length.max(bytes.len() as u64) > MAX_IMAGE {
                    return Err(Error::TooBig { name: self.name() });
                }
                Ok(bytes.into())
            }
        }
    }
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct Payload {
    /// bzImage, vmlinux or any ELF with a PVH entry.
    pub kernel: Blob,
    /// Initial RAM disks; several are concatenated, as Linux's boot loaders do.
    pub initrd: Vec<Blob>,
    /// Kernel command line, without NUL.
    pub cmdline: String,
}

/// A payload cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {name}: {source}")]
    Read {
        /// The file.
        name: String,
        /// What the host answered.
        source: std::io::Error,
    },
    /// The file is absurdly large.
    #[error("{name} is larger than 2 GiB: not a kernel or initrd")]
    TooBig {
        /// The file.
        name: String,
    },
    /// The file is empty.
    #[error("{name} is empty")]
    Empty {
        /// The file.
        name: String,
    },
    /// Not a format that can be booted.
    #[error("{name} is not a kernel that can be booted: {why}")]
    Format {
        /// The file.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The file ends early.
    #[error("{name} is cut short: {have} bytes of at least {need}")]
    Truncated {
        /// The file.
        name: String,
        /// Bytes there are.
        have: u64,
        /// Bytes there should be.
        need: u64,
    },
    /// The command line is too long for the kernel.
    #[error("the kernel command line has {have} bytes, more than the {max} that the kernel takes")]
    CmdlineTooLong {
        /// Bytes given.
        have: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The command line contains a NUL.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// Kernel or initrd do not fit.
    #[error("{name} does not fit into the guest's memory: give the guest at least {need_mib} MiB")]
    NoRoom {
        /// What does not fit.
        name: String,
        /// Guest memory that would do, in MiB.
        need_mib: u64,
    },
}

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode at this address, boot parameters in RSI.
    Linux64(u64),
    /// 32-bit protected mode at this address, boot parameters in ESI.
    Linux32(u32),
    /// 32-bit protected mode at this address, PVH start info in EBX.
    Pvh(u32),
}

/// A kernel in guest memory.
struct Kernel {
    entry: Entry,
    /// Guest-physical range that the kernel needs until it manages its own memory.
    start: u64,
    end: u64,
    /// Highest address that the initrd's last byte may have.
    initrd_max: u64,
    /// Longest command line, without NUL.
    cmdline_max: usize,
    /// Setup header for the zero page, from offset 0x1f1.
    setup_header: Option<Vec<u8>>,
}

/// Where the initrd is: address and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Initrd {
    addr: u64,
    len: u64,
}

/// Loads `payload` into `mem` of `size` bytes and writes everything that it expects to find.
/// The ACPI tables are loaded by someone else, at [`ACPI_TABLES`].
///
/// # Errors
/// When the kernel or the initrd cannot be read, make no sense or do not fit.
pub fn load(mem: &GuestMem, size: u64, payload: &Payload) -> Result<Entry, Error> {
    let name = payload.kernel.name();
    let image = payload.kernel.read()?;
    if image.is_empty() {
        return Err(Error::Empty { name });
    }
    let low_end = size.min(PCI_HOLE_START);
    let target = Target {
        mem,
        low_end,
        name: &name,
    };
    let kernel = if elf::is_elf(&image) {
        elf::load(&target, &image)?
    } else {
        bzimage::load(&target, &image)?
    };

    let cmdline = payload.cmdline.as_bytes();
    let max = kernel.cmdline_max.min(CMDLINE_MAX - 1);
    if cmdline.len() > max {
        return Err(Error::CmdlineTooLong {
            have: cmdline.len(),
            max,
        });
    }
    if cmdline.contains(&0) {
        return Err(Error::CmdlineNul);
    }
    target.write(CMDLINE, cmdline)?;
    target.write(CMDLINE + cmdline.len() as u64, &[0])?;

    let initrd = load_initrd(&target, &payload.initrd, &kernel)?;
    match kernel.entry {
        Entry::Pvh(_) => pvh::write(&target, size, initrd, ACPI_TABLES)?,
        Entry::Linux64(_) | Entry::Linux32(_) => {
            zero_page::write(&target, size, &kernel, initrd, ACPI_TABLES)?;
        }
    }
    registers::write_tables(&target, kernel.entry)?;
    Ok(kernel.entry)
}

/// Guest memory to load into, and the name to use in errors.
struct Target<'a> {
    mem: &'a GuestMem,
    low_end: u64,
    name: &'a str,
}

impl Target<'_> {
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Error> {
        self.mem
            .write_slice(bytes, GuestAddress(addr))
            .map_err(|_| self.no_room(addr.saturating_add(bytes.len() as u64)))
    }

    fn no_room(&self, end: u64) -> Error {
        Error::NoRoom {
            name: self.name.to_owned(),
            need_mib: (end >> 20).saturating_add(1),
        }
    }

    fn format(&self, why: &'static str) -> Error {
        Error::Format {
            name: self.name.to_owned(),
            why,
        }
    }

    fn truncated(&self, have: usize, need: u64) -> Error {
        Error::Truncated {
            name: self.name.to_owned(),
            have: have as u64,
            need,
        }
    }

    /// Checks that `start..end` is extended memory below the PCI hole.
    fn check_range(&self, start: u64, end: u64) -> Result<(), Error> {
        if start < HIGH_RAM_START || end < start {
            return Err(self.format("it asks for a load address that no kernel can have"));
        }
        if end > self.low_end {
            Err(self.no_room(end))
        } else {
            Ok(())
        }
    }
}

/// Places the initrd as high as the kernel allows, so that it is out of the way of the
/// kernel's decompressor.
fn load_initrd(target: &Target<'_>, blobs: &[Blob], kernel: &Kernel) -> Result<Initrd, Error> {
    let mut images = Vec::with_capacity(blobs.len());
    let mut len = 0u64;
    for blob in blobs {
        let bytes = blob.read()?;
        if bytes.is_empty() {
            return Err(Error::Empty { name: blob.name() });
        }
        // Concatenated archives start at multiples of four bytes.
        len = len.next_multiple_of(4).saturating_add(bytes.len() as u64);
        images.push(bytes);
    }
    if len == 0 {
        return Ok(Initrd::default());
    }
    let name = blobs.iter().map(Blob::name).collect::<Vec<_>>().join(", ");
    let target = Target {
        name: &name,
        ..*target
    };
    let top = target.low_end.min(kernel.initrd_max.saturating_add(1));
    let addr = top.saturating_sub(len) & !0xfff;
    if addr < kernel.end {
        return Err(target.no_room(kernel.end.saturating_add(len)));
    }
    let mut at = addr;
    for bytes in images {
        at = at.next_multiple_of(4);
        target.write(at, &bytes)?;
        at += bytes.len() as u64;
    }
    log::debug!(
        "kernel {:#x}..{:#x}, initrd {addr:#x}..{at:#x}",
        kernel.start,
        kernel.end
    );
    Ok(Initrd { addr, len })
}

#[cfg(test)]
mod tests;
