//! The user's disks: looked at before anything is started or downloaded, so that a wrong name, a
//! wrong format or an image that another machine uses is told in words and nothing is lost.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use vmm::virtio::disk::{DiskConfig, DiskFormat as Format, DiskImage};

use crate::error::{Error, one_line_of, reason};
use crate::options::{DiskFormat, DiskSpec};

/// Finds out whether a disk can be used and how.
///
/// # Errors
/// If it is missing, may not be used, is in use, or is not what the user says it is.
pub fn check(spec: &DiskSpec) -> Result<DiskConfig, Error> {
    let name = spec.path.display();
    let file = open_file(spec)?;
    let format = match (spec.format, qcow2(&file)) {
        (Some(DiskFormat::Qcow2), None) => {
            return Err(Error::new(format!("the disk {name} is not a qcow2 image"))
                .hint("leave ',format=qcow2' out, or check which file you mean"));
        }
        // What a guest writes to a raw disk may look like a qcow2 image that names any file of the
        // host as its base. Nothing but the user's word makes such an image be followed.
        (None, Some(Qcow2 { refers: true })) if !has_extension(&spec.path) => {
            return Err(Error::new(format!(
                "the disk {name} is a qcow2 image that takes data from another file"
            ))
            .hint("if you made it so, say ',format=qcow2' or name it *.qcow2"));
        }
        (Some(DiskFormat::Raw), _) | (None, None) => Format::Raw,
        (Some(DiskFormat::Qcow2), _) => Format::Qcow2,
        (None, Some(_)) => Format::Auto,
    };
    if format == Format::Raw {
        check_raw(&file, spec)?;
    }
    if spec.read_only && is_written_by_qemu(&file) {
        return Err(in_use(&spec.path));
    }
    // The machine opens the file itself; a block device would be busy with this one.
    drop(file);
    let config = DiskConfig {
        format,
        read_only: spec.read_only,
        ..DiskConfig::new(&spec.path)
    };
    // Locks and reads the image for a moment, to tell now what the machine would tell later.
    match DiskImage::open(&config) {
        Ok(_) => Ok(config),
        Err(vmm::virtio::disk::Error::InUse { .. }) => Err(in_use(&spec.path)),
        Err(e) => Err(Error::new(one_line_of(&e))),
    }
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

/// A reader's lock does not meet the one by which QEMU says that it writes to an image: a shared
/// lock on byte 101 (QEMU, "Image locking").
fn is_written_by_qemu(file: &File) -> bool {
    let mut asked = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: 101,
        l_len: 1,
        l_pid: 0,
    };
    // Asks who would be in the way of a lock that this file, open for reading, could not have.
    // Another reader is too, but it locks the whole file, from its start.
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked)).is_ok()
        && i32::from(asked.l_type) != nix::libc::F_UNLCK
        && asked.l_start > 0
}

/// A guest cannot change its disk's name, so that the name is the user's word.
fn has_extension(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("qcow2"))
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
    fn a_disk_that_is_open_elsewhere_is_in_use() {
        let file = image(&[0; 1024]);
        let writable = spec(file.path());
        let read_only = DiskSpec {
            read_only: true,
            ..writable.clone()
        };
        let writer = DiskImage::open(&check(&writable).unwrap()).unwrap();
        for other in [&writable, &read_only] {
            let message = check(other).unwrap_err().to_string();
            assert!(message.contains("is in use"), "{message}");
        }
        drop(writer);
        let _reader = DiskImage::open(&check(&read_only).unwrap()).unwrap();
        assert!(check(&read_only).is_ok());
        assert!(check(&writable).is_err());
    }

    #[test]
    fn formats_are_found_out_but_references_are_not_followed_unasked() {
        let raw = image(&[0; 512]);
        assert_eq!(check(&spec(raw.path())).unwrap().format, Format::Raw);
        let said = DiskSpec {
            format: Some(DiskFormat::Qcow2),
            ..spec(raw.path())
        };
        assert!(
            check(&said)
                .unwrap_err()
                .to_string()
                .contains("not a qcow2")
        );
        for byte in [15, 79] {
            let mut bytes = header();
            bytes[byte] = 4;
            let referring = image(&bytes);
            let message = check(&spec(referring.path())).unwrap_err().to_string();
            assert!(
                message.contains("takes data from another file"),
                "{message}"
            );
            let said = DiskSpec {
                format: Some(DiskFormat::Raw),
                ..spec(referring.path())
            };
            assert_eq!(check(&said).unwrap().format, Format::Raw);
        }
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
            let message = check(&spec(path)).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
