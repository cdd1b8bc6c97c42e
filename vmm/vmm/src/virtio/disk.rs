//! Disk images: raw files and block devices directly, qcow2 through the crate imago.
#![expect(
    unsafe_code,
    reason = "calls preadv, pwritev, fallocate, fdatasync and fcntl"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate,
    StorageOpenOptions,
};
use vm_memory::{Bytes, VolatileSlice};

/// Bytes per sector of the virtio protocol.
pub const SECTOR: u64 = 512;
/// Most pieces per `preadv` or `pwritev`.
const MAX_IOVECS: usize = 512;
/// Size of the buffer between qcow2 and guest memory.
const BOUNCE: usize = 1 << 20;

/// Format of a disk image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskFormat {
    /// By looking at the file.
    #[default]
    Auto,
    /// The file's bytes are the disk's.
    Raw,
    /// QEMU's format, with its backing file if it names one.
    Qcow2,
}

/// A disk of the guest.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Image file or block device.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Whether the guest must not write.
    pub read_only: bool,
    /// Serial number that the guest sees (20 bytes at most).
    pub serial: String,
    /// The image, opened and locked by the caller, who so keeps it over resets of the machine;
    /// `None` to open and lock `path`.
    pub file: Option<Arc<File>>,
}

impl DiskConfig {
    /// A writable disk in the format that the file has.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: DiskFormat::Auto,
            read_only: false,
            serial: String::new(),
            file: None,
        }
    }
}

/// A disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open the disk {path}: {source}")]
    Open {
        /// The file.
        path: String,
        /// What the host answered.
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("the disk {path} is neither a file nor a block device")]
    Kind {
        /// The file.
        path: String,
    },
    /// Another process has it.
    #[error("the disk {path} is in use by another process: stop that one or use a copy")]
    InUse {
        /// The file.
        path: String,
    },
    /// Not a usable image.
    #[error("the disk {path} is not a good qcow2 image: {source}")]
    Qcow2 {
        /// The file.
        path: String,
        /// What imago says.
        source: io::Error,
    },
    /// The image refers to another file, and nobody said that this is wanted.
    #[error(
        "the disk {path} is a qcow2 image that refers to another file: name it *.qcow2 or say that its format is qcow2"
    )]
    Refers {
        /// The file.
        path: String,
    },
    /// The image has no sectors.
    #[error("the disk {path} is empty")]
    Empty {
        /// The file.
        path: String,
    },
}

/// An open disk image. Its lock is held as long as it lives.
pub struct DiskImage {
    /// Holds the lock; for raw images, also the data.
    file: File,
    content: Content,
    size: u64,
    read_only: bool,
}

enum Content {
    Raw,
    Qcow2 {
        image: Box<FormatAccess<imago::file::File>>,
        bounce: Vec<u8>,
    },
}

impl DiskImage {
    /// Opens and locks the image.
    ///
    /// # Errors
    /// When it cannot be opened, is in use or makes no sense.
    pub fn open(config: &DiskConfig) -> Result<Self, Error> {
        let path = || config.path.display().to_string();
        let open = |source| Error::Open {
            path: path(),
            source,
        };
        let mut file = match &config.file {
            Some(file) => file.try_clone().map_err(open)?,
            None => OpenOptions::new()
                .read(true)
                .write(!config.read_only)
                .open(&config.path)
                .map_err(open)?,
        };
        let kind = file.metadata().map_err(open)?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(Error::Kind { path: path() });
        }
        if config.file.is_none() {
            lock(&file, config.read_only).map_err(|source| match source.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied => {
                    Error::InUse { path: path() }
                }
                _ => open(source),
            })?;
        }
        let (content, bytes) = if is_qcow2(&file, config).map_err(open)? {
            let image = open_qcow2(&file, config)?;
            let size = image.size();
            (
                Content::Qcow2 {
                    image: Box::new(image),
                    bounce: Vec::new(),
                },
                size,
            )
        } else {
            let size = file.seek(SeekFrom::End(0)).map_err(open)?;
            (Content::Raw, size)
        };
        let size = bytes - bytes % SECTOR;
        if size == 0 {
            return Err(Error::Empty { path: path() });
        }
        Ok(Self {
            file,
            content,
            size,
            read_only: config.read_only,
        })
    }

    /// Bytes of the disk, a multiple of [`SECTOR`].
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether writing is forbidden.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    fn check(&self, offset: u64, len: u64, write: bool) -> io::Result<()> {
        if write && self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the disk",
            )),
        }
    }

    /// Reads from `offset` into `slices`.
    ///
    /// # Errors
    /// Beyond the end, or what the host answers.
    pub fn read_at(&mut self, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.check(offset, total(slices), false)?;
        match &mut self.content {
            Content::Raw => vectored(&self.file, slices, offset, Direction::Read),
            Content::Qcow2 { image, bounce } => {
                pieces(bounce, slices, offset, |buffer, slice, at| {
                    image.read(&mut *buffer, at)?;
                    slice.write_slice(buffer, 0).map_err(io::Error::other)
                })
            }
        }
    }

    /// Writes `slices` at `offset`.
    ///
    /// # Errors
    /// Beyond the end, when read-only, or what the host answers.
    pub fn write_at(&mut self, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.check(offset, total(slices), true)?;
        match &mut self.content {
            Content::Raw => vectored(&self.file, slices, offset, Direction::Write),
            Content::Qcow2 { image, bounce } => {
                pieces(bounce, slices, offset, |buffer, slice, at| {
                    slice.read_slice(buffer, 0).map_err(io::Error::other)?;
                    image.write(&*buffer, at)
                })
            }
        }
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// What the host answers; nothing is certain then.
    pub fn flush(&mut self) -> io::Result<()> {
        match &self.content {
            Content::Raw => self.file.sync_data(),
            Content::Qcow2 { image, .. } => {
                image.flush()?;
                image.sync()
            }
        }
    }

    /// Tells the host that the content of a range is not needed; it may read as anything.
    ///
    /// # Errors
    /// Beyond the end or when read-only. A host that cannot discard is no error.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len, true)?;
        match &mut self.content {
            Content::Raw => match punch_hole(&self.file, offset, len) {
                Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
                other => other,
            },
            // Imago leaves alone what is not aligned to clusters.
            Content::Qcow2 { image, .. } => match image.discard_to_any(offset, len) {
                Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
                other => other,
            },
        }
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// Beyond the end, when read-only, or what the host answers.
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len, true)?;
        match &mut self.content {
            Content::Raw => match punch_hole(&self.file, offset, len) {
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                    write_zero_bytes(&self.file, offset, len)
                }
                other => other,
            },
            Content::Qcow2 { image, .. } => image.write_zeroes(offset, len),
        }
    }
}

/// Whether to open the image as qcow2.
fn is_qcow2(file: &File, config: &DiskConfig) -> io::Result<bool> {
    match config.format {
        DiskFormat::Raw => Ok(false),
        DiskFormat::Qcow2 => Ok(true),
        DiskFormat::Auto => {
            let mut magic = [0; 4];
            let n = file.read_at(&mut magic, 0)?;
            Ok(n == 4 && magic == *b"QFI\xfb")
        }
    }
}

/// Opens a qcow2 image. Other files that its header names are opened only if the user said in
/// some way that this is a qcow2 image: a guest can write such a header onto a raw disk, and
/// would get at any file of the host at the next start.
fn open_qcow2(file: &File, config: &DiskConfig) -> Result<FormatAccess<imago::file::File>, Error> {
    let path = || config.path.display().to_string();
    let bad = |source| Error::Qcow2 {
        path: path(),
        source,
    };
    check_qcow2_header(file).map_err(bad)?;
    let trusted = config.format == DiskFormat::Qcow2 || has_extension(&config.path, "qcow2");
    let options = StorageOpenOptions::new()
        .filename(&config.path)
        .write(!config.read_only);
    let storage =
        imago::file::File::from_open_file(file.try_clone().map_err(bad)?, options).map_err(bad)?;
    let builder = Qcow2::<imago::file::File>::builder(storage).write(!config.read_only);
    if trusted {
        return builder
            .open(PermissiveImplicitOpenGate::default())
            .map(FormatAccess::new)
            .map_err(bad);
    }
    let image = builder
        .open(DenyImplicitOpenGate::default())
        .map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => Error::Refers { path: path() },
            _ => bad(e),
        })?;
    Ok(FormatAccess::new(image))
}

/// Checks that the tables that a qcow2 header names lie in the file and are of sensible sizes,
/// because imago takes the header at its word. See "qcow2", "Header", in QEMU's documentation.
fn check_qcow2_header(file: &File) -> io::Result<()> {
    let bad = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    let mut header = [0u8; 72];
    file.read_exact_at(&mut header, 0)?;
    let u32_at = |at: usize| {
        header[at..at + 4]
            .iter()
            .fold(0, |v, &b| (v << 8) | u64::from(b))
    };
    let u64_at = |at: usize| (u32_at(at) << 32) | u32_at(at + 4);
    let len = file.metadata()?.len();
    let (version, cluster_bits) = (u32_at(4), u32_at(20));
    if !(2..=3).contains(&version) {
        return bad("its version is neither 2 nor 3");
    }
    if !(9..=21).contains(&cluster_bits) {
        return bad("its cluster size makes no sense");
    }
    let cluster = 1u64 << cluster_bits;
    let within = |offset: u64, size: u64| {
        offset >= cluster
            && offset.is_multiple_of(cluster)
            && offset
                .checked_add(size)
                .is_some_and(|end| end <= len.next_multiple_of(cluster))
    };
    let (size, l1_entries, refcount_clusters) = (u64_at(24), u32_at(36), u32_at(56));
    if l1_entries > 4 << 20 || !within(u64_at(40), l1_entries * 8) {
        return bad("its L1 table is not in the file");
    }
    if l1_entries
        .saturating_mul(cluster / 8)
        .saturating_mul(cluster)
        < size
    {
        return bad("its L1 table is too small for its size");
    }
    if refcount_clusters > 1 << 16 || !within(u64_at(48), refcount_clusters * cluster) {
        return bad("its refcount table is not in the file");
    }
    // The header has a refcount in every image. Where it has none, imago would put the refcount
    // block onto the header, not see it there, and look for a place for ever.
    let mut first = [0u8; 8];
    if refcount_clusters > 0 {
        file.read_exact_at(&mut first, u64_at(48))?;
    }
    if u64::from_be_bytes(first) & !0x1ff == 0 {
        return bad("its refcount table does not count the header");
    }
    Ok(())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// Locks the whole file for this open file description, as QEMU and others do.
fn lock(file: &File, shared: bool) -> io::Result<()> {
    // SAFETY: an all-zero flock is a valid one.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if shared { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the descriptor is open and `lock` is a live flock.
    let n = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn total(slices: &[VolatileSlice<'_>]) -> u64 {
    slices
        .iter()
        .fold(0, |sum: u64, s| sum.saturating_add(s.len() as u64))
}

/// Runs `each` for pieces of `slices` that fit the buffer.
fn pieces(
    bounce: &mut Vec<u8>,
    slices: &[VolatileSlice<'_>],
    mut offset: u64,
    mut each: impl FnMut(&mut Vec<u8>, &VolatileSlice<'_>, u64) -> io::Result<()>,
) -> io::Result<()> {
    for slice in slices {
        let mut done = 0;
        while done < slice.len() {
            let len = (slice.len() - done).min(BOUNCE);
            let piece = slice.subslice(done, len).map_err(io::Error::other)?;
            bounce.resize(len, 0);
            each(bounce, &piece, offset)?;
            done += len;
            offset += len as u64;
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// `preadv` or `pwritev` straight between the file and guest memory, until all is done.
fn vectored(
    file: &File,
    slices: &[VolatileSlice<'_>],
    mut offset: u64,
    direction: Direction,
) -> io::Result<()> {
    let guards: Vec<_> = slices
        .iter()
        .map(|s| (s.ptr_guard_mut(), s.len()))
        .collect();
    let mut iovecs: Vec<libc::iovec> = guards
        .iter()
        .map(|(guard, len)| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: *len,
        })
        .collect();
    let mut rest = iovecs.as_mut_slice();
    while !rest.is_empty() {
        let count = rest.len().min(MAX_IOVECS) as libc::c_int;
        let at = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: the pieces lie in guest memory, which the guards keep mapped, and `count` of
        // them are in `rest`. That the guest may change the bytes meanwhile is its own affair.
        let n = unsafe {
            match direction {
                Direction::Read => libc::preadv(file.as_raw_fd(), rest.as_ptr(), count, at),
                Direction::Write => libc::pwritev(file.as_raw_fd(), rest.as_ptr(), count, at),
            }
        };
        let n = match usize::try_from(n) {
            Ok(0) if rest.iter().take(MAX_IOVECS).all(|v| v.iov_len == 0) => 0,
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
        };
        offset += n as u64;
        rest = advance(rest, n);
    }
    Ok(())
}

/// Drops the first `n` bytes, and empty pieces at the front.
fn advance(mut iovecs: &mut [libc::iovec], mut n: usize) -> &mut [libc::iovec] {
    while let Some(first) = iovecs.first_mut() {
        if n < first.iov_len {
            // SAFETY: `n` is within the piece.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(n).cast() };
            first.iov_len -= n;
            break;
        }
        n -= first.iov_len;
        iovecs = &mut iovecs[1..];
    }
    iovecs
}

fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(at), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if len == 0 {
        return Ok(());
    }
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open; no memory is involved.
    let n = unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) };
    if n == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => io::ErrorKind::Unsupported.into(),
        _ => error,
    })
}

fn write_zero_bytes(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeroes = vec![0; BOUNCE];
    while len > 0 {
        let n = len.min(BOUNCE as u64) as usize;
        file.write_all_at(&zeroes[..n], offset)?;
        offset += n as u64;
        len -= n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
