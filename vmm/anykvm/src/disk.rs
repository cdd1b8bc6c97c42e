//! The user's disks: looked at before the machine starts, so that a wrong name, a wrong format or
//! an image that another machine uses is told in words and nothing is lost.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::error::{Error, reason};
use crate::options::{DiskFormat, DiskSpec};

/// A disk that was found usable. It keeps the image locked while it lives.
#[derive(Debug)]
pub struct Disk {
    /// What the user asked for.
    pub spec: DiskSpec,
    /// Given or found out.
    pub format: DiskFormat,
    _locked: File,
}

/// QEMU's image locks (QEMU, "Image locking"): one byte per permission at 100 that its holder uses,
/// one at 200 that its holder denies others. The same bytes are used here, so that neither program
/// opens what the other writes.
mod lock_bytes {
    pub const USED: i64 = 100;
    pub const DENIED: i64 = 200;
    pub const END: i64 = 300;
    pub const CONSISTENT_READ: i64 = 0;
    pub const WRITE: i64 = 1;
}

/// Opens and locks a disk.
///
/// # Errors
/// If it is missing, may not be used, is in use, or is not what the user says it is.
pub fn open(spec: &DiskSpec) -> Result<Disk, Error> {
    let name = spec.path.display();
    let file = open_file(spec)?;
    lock(&file, spec)?;
    let format = match (spec.format, qcow2(&file)) {
        (Some(DiskFormat::Qcow2), None) => {
            return Err(Error::new(format!("the disk {name} is not a qcow2 image"))
                .hint("leave ',format=qcow2' out, or check which file you mean"));
        }
        // What a guest writes to a raw disk may look like a qcow2 image that names any file of the
        // host as its base. Nothing but the user's word makes such an image be followed.
        (None, Some(Qcow2 { refers: true })) => {
            return Err(Error::new(format!(
                "the disk {name} is a qcow2 image that takes data from another file"
            ))
            .hint("if you made it so, say ',format=qcow2'"));
        }
        (Some(format), _) => format,
        (None, Some(_)) => DiskFormat::Qcow2,
        (None, None) => DiskFormat::Raw,
    };
    if format == DiskFormat::Raw {
        check_raw(&file, spec)?;
    }
    Ok(Disk {
        spec: spec.clone(),
        format,
        _locked: file,
    })
}

fn open_file(spec: &DiskSpec) -> Result<File, Error> {
    let name = spec.path.display();
    let cannot = |e: &io::Error| Error::new(format!("cannot open the disk {name}: {}", reason(e)));
    let kind = std::fs::metadata(&spec.path)
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::new(format!("the disk {name} does not exist"))
                .hint(format!("'truncate -s 10G {name}' makes an empty one")),
            _ => cannot(&e),
        })?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::new(format!(
            "the disk {name} is neither a file nor a block device"
        )));
    }
    let mut options = File::options();
    options.read(true).write(!spec.read_only);
    if kind.is_block_device() && !spec.read_only {
        // For a block device, Linux takes O_EXCL as "not while it is mounted".
        options.custom_flags(nix::libc::O_EXCL);
    }
    options
        .open(&spec.path)
        .map_err(|e| match e.raw_os_error() {
            Some(nix::libc::EACCES | nix::libc::EROFS | nix::libc::EPERM) if !spec.read_only => {
                cannot(&e).hint(format!("to use it read-only, write '{name},ro'"))
            }
            Some(nix::libc::EBUSY) => in_use(&spec.path),
            Some(nix::libc::ETXTBSY) => in_use(&spec.path),
            _ => cannot(&e),
        })
}

fn in_use(path: &Path) -> Error {
    Error::new(format!("the disk {} is in use", path.display())).hint(
        "stop the virtual machine or unmount the file system that uses it, or open it read-only in both with ',ro'",
    )
}

/// Takes QEMU's locks by open file description: they end with the file, however the process ends.
fn lock(file: &File, spec: &DiskSpec) -> Result<(), Error> {
    use lock_bytes::{CONSISTENT_READ, DENIED, END, USED, WRITE};
    let locked = if spec.read_only {
        // Others may read too; nobody may write, and nobody is writing.
        set_lock(file, nix::libc::F_RDLCK, USED + CONSISTENT_READ, 1)
            .and_then(|()| set_lock(file, nix::libc::F_RDLCK, DENIED + WRITE, 1))
            .and_then(|()| is_free(file, USED + WRITE))
    } else {
        set_lock(file, nix::libc::F_WRLCK, USED, END - USED)
    };
    match locked {
        Ok(()) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(in_use(&spec.path)),
        Err(e) => {
            // Some network file systems have no locks; QEMU goes on there as well.
            log::warn!("cannot lock the disk {}: {}", spec.path.display(), e.desc());
            Ok(())
        }
    }
}

fn range(kind: i32, start: i64, length: i64) -> nix::libc::flock {
    nix::libc::flock {
        l_type: kind as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

fn set_lock(file: &File, kind: i32, start: i64, length: i64) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, start, length))).map(drop)
}

/// Whether no other holder has locked a byte.
fn is_free(file: &File, start: i64) -> nix::Result<()> {
    let mut asked = range(nix::libc::F_WRLCK, start, 1);
    // A read-only file cannot take a write lock, but may ask for one's conflicts.
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked))?;
    if i32::from(asked.l_type) == nix::libc::F_UNLCK {
        Ok(())
    } else {
        Err(Errno::EAGAIN)
    }
}

/// What matters here of a qcow2 header (QEMU, "qcow2 image file format").
struct Qcow2 {
    /// It takes data from another file: a backing file, or an external data file.
    refers: bool,
}

fn qcow2(file: &File) -> Option<Qcow2> {
    let mut header = [0; 104];
    let mut length = 0;
    while length < header.len() {
        match file.read_at(&mut header[length..], length as u64) {
            Ok(0) | Err(_) => break,
            Ok(more) => length += more,
        }
    }
    let header = &header[..length];
    if header.get(..4)? != b"QFI\xfb" {
        return None;
    }
    let backing_file = header.get(8..16)?.iter().any(|&byte| byte != 0);
    let version = header.get(7).copied().unwrap_or_default();
    let external_data = version >= 3 && header.get(79).is_some_and(|bits| bits & 4 != 0);
    Some(Qcow2 {
        refers: backing_file || external_data,
    })
}

fn check_raw(file: &File, spec: &DiskSpec) -> Result<(), Error> {
    use std::io::{Seek, SeekFrom};
    let name = spec.path.display();
    let mut file = file;
    let size = file.seek(SeekFrom::End(0)).map_err(|e| {
        Error::new(format!(
            "cannot tell the size of the disk {name}: {}",
            reason(&e)
        ))
    })?;
    if size == 0 {
        return Err(Error::new(format!("the disk {name} is empty"))
            .hint(format!("'truncate -s 10G {name}' gives it a size")));
    }
    if size % 512 != 0 {
        return Err(Error::new(format!(
            "the disk {name} has {size} bytes, which is not a whole number of 512-byte sectors"
        ))
        .hint(format!(
            "check that it is a disk image; 'truncate -s %512 {name}' fills the last sector with zeros"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn spec(path: &Path) -> DiskSpec {
        DiskSpec {
            path: path.to_owned(),
            read_only: false,
            format: None,
        }
    }

    fn image(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// A version 3 header of an empty image.
    fn header() -> Vec<u8> {
        let mut header = vec![0; 512];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        header
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(&[0; 1024]);
        let writable = spec(file.path());
        let read_only = DiskSpec {
            read_only: true,
            ..writable.clone()
        };
        let writer = open(&writable).unwrap();
        for other in [&writable, &read_only] {
            let message = open(other).unwrap_err().to_string();
            assert!(message.contains("is in use"), "{message}");
        }
        drop(writer);
        let readers = [open(&read_only).unwrap(), open(&read_only).unwrap()];
        assert!(open(&writable).is_err());
        drop(readers);
        assert!(open(&writable).is_ok());
    }

    #[test]
    fn formats_are_found_out_but_references_are_not_followed_unasked() {
        assert_eq!(
            open(&spec(image(&[0; 512]).path())).unwrap().format,
            DiskFormat::Raw
        );
        let plain = image(&header());
        assert_eq!(open(&spec(plain.path())).unwrap().format, DiskFormat::Qcow2);
        for byte in [15, 79] {
            let mut bytes = header();
            bytes[byte] = 4;
            let referring = image(&bytes);
            assert!(open(&spec(referring.path())).is_err());
            let said = DiskSpec {
                format: Some(DiskFormat::Qcow2),
                ..spec(referring.path())
            };
            assert!(open(&said).is_ok());
            let raw = DiskSpec {
                format: Some(DiskFormat::Raw),
                ..spec(referring.path())
            };
            assert_eq!(open(&raw).unwrap().format, DiskFormat::Raw);
        }
        let not = DiskSpec {
            format: Some(DiskFormat::Qcow2),
            ..spec(image(&[0; 512]).path())
        };
        assert!(open(&not).is_err());
    }

    #[test]
    fn unusable_disks_are_told() {
        let (empty, odd) = (image(&[]), image(&[0; 700]));
        for (path, part) in [
            (Path::new("/nonexistent/disk.img"), "does not exist"),
            (Path::new("/dev"), "neither a file"),
            (Path::new("/dev/null"), "neither a file"),
            (empty.path(), "is empty"),
            (odd.path(), "700 bytes"),
        ] {
            let message = open(&spec(path)).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
