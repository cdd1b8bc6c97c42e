//! Guest RAM.
//!
//! RAM is one memfd, mapped shared, so that other processes can map it later and so that
//! pages cost nothing until they are touched.
#![expect(unsafe_code, reason = "creates a memfd")]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::layout::{FOUR_GIB, PCI_HOLE_START};

/// Guest memory as the VMM's devices see it.
pub type GuestMem = GuestMemoryMmap<()>;

/// Smallest RAM that any supported kernel starts in.
const MIN_MEMORY: u64 = 16 << 20;
/// Largest RAM: what 46 physical address bits hold, well below what the PCI windows need.
const MAX_MEMORY: u64 = 32 << 40;

/// Guest RAM cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too little to boot anything.
    #[error("{} of guest memory is too little: give at least {}", Size(*.0), Size(MIN_MEMORY))]
    TooSmall(u64),
    /// Not a whole number of pages.
    #[error("guest memory of {0} bytes is not a multiple of 4096")]
    Unaligned(u64),
    /// More than the machine, or its container, has.
    #[error("the guest asks for {} of memory but this machine has {}: ask for less", Size(*asked), Size(*limit))]
    TooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes that the machine has.
        limit: u64,
    },
    /// The host refused.
    #[error("cannot map {} of guest memory: {source}", Size(*size))]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the host answered.
        source: std::io::Error,
    },
}

/// Prints a number of bytes for people.
struct Size(u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 >= 1 << 30 && self.0.is_multiple_of(1 << 30) {
            write!(f, "{} GiB", self.0 >> 30)
        } else {
            write!(f, "{} MiB", self.0 >> 20)
        }
    }
}

/// Makes `size` bytes of guest RAM.
///
/// # Errors
/// When the size makes no sense or the host does not have it.
pub fn create(size: u64) -> Result<Arc<GuestMem>, Error> {
    check(size, host_memory())?;
    let map = |source| Error::Map { size, source };
    // SAFETY: the name is a NUL-terminated string; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(map(std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just created and belongs to nobody else.
    let file = Arc::new(unsafe { File::from_raw_fd(fd) });
    file.set_len(size).map_err(map)?;
    let mut regions = Vec::new();
    for (start, offset, len) in pieces(size) {
        let region = MmapRegion::build(
            Some(FileOffset::from_arc(Arc::clone(&file), offset)),
            usize::try_from(len).map_err(|_| Error::TooLarge {
                asked: size,
                limit: MAX_MEMORY,
            })?,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|e| map(std::io::Error::other(e)))?;
        let region = GuestRegionMmap::new(region, GuestAddress(start)).ok_or(Error::TooLarge {
            asked: size,
            limit: MAX_MEMORY,
        })?;
        regions.push(region);
    }
    GuestMem::from_regions(regions)
        .map(Arc::new)
        .map_err(|e| map(std::io::Error::other(e)))
}

/// The pieces of `size` bytes of RAM: (guest address, offset, bytes).
pub fn pieces(size: u64) -> Vec<(u64, u64, u64)> {
    let low = size.min(PCI_HOLE_START);
    let mut pieces = vec![(0, 0, low)];
    if size > low {
        pieces.push((FOUR_GIB, low, size - low));
    }
    pieces
}

fn check(size: u64, limit: Option<u64>) -> Result<(), Error> {
    if size < MIN_MEMORY {
        return Err(Error::TooSmall(size));
    }
    if !size.is_multiple_of(4096) {
        return Err(Error::Unaligned(size));
    }
    let limit = limit.unwrap_or(MAX_MEMORY).min(MAX_MEMORY);
    if size > limit {
        return Err(Error::TooLarge { asked: size, limit });
    }
    Ok(())
}

/// Bytes of RAM and swap that this process can have: the machine's or its cgroup's.
fn host_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace()
            .nth(1)?
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    let machine = field("MemTotal:")?.saturating_add(field("SwapTotal:").unwrap_or(0));
    Some(cgroup_memory().map_or(machine, |limit| limit.min(machine)))
}

/// The memory limit of this process's cgroup (version 2), if it has one.
fn cgroup_memory() -> Option<u64> {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = cgroups.lines().find_map(|l| l.strip_prefix("0::/"))?;
    let file = std::path::Path::new("/sys/fs/cgroup")
        .join(path)
        .join("memory.max");
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn ram_skips_the_pci_hole() {
        assert_eq!(pieces(1 << 30), [(0, 0, 1 << 30)]);
        assert_eq!(
            pieces(4 << 30),
            [(0, 0, PCI_HOLE_START), (FOUR_GIB, PCI_HOLE_START, 1 << 30)]
        );
    }

    #[test]
    fn ram_is_readable_and_zero() {
        let mem = create(64 << 20).unwrap();
        assert_eq!(mem.num_regions(), 1);
        assert_eq!(mem.read_obj::<u64>(GuestAddress(0x10_0000)).unwrap(), 0);
        mem.write_obj(7u64, GuestAddress(8)).unwrap();
        assert_eq!(mem.read_obj::<u64>(GuestAddress(8)).unwrap(), 7);
    }

    #[test]
    fn nonsense_sizes_are_refused() {
        assert!(matches!(check(0, None), Err(Error::TooSmall(0))));
        assert!(matches!(
            check((64 << 20) + 1, None),
            Err(Error::Unaligned(_))
        ));
        let error = check(64 << 30, Some(8 << 30)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the guest asks for 64 GiB of memory but this machine has 8 GiB: ask for less"
        );
        assert!(matches!(check(!4095, None), Err(Error::TooLarge { .. })));
    }
}
