//! The smallest initial file system that starts the guest program: a "newc" archive (Linux,
//! "initramfs buffer format").

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::Result;

const LINK: u32 = 0o120_777;
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The archive with `/init` and its arguments in `/bench.args`.
pub fn archive(init: &[u8], arguments: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(init.len() + 4096);
    for directory in ["dev", "proc", "sys", "tmp"] {
        entry(&mut bytes, directory, DIRECTORY, (0, 0), &[]);
    }
    entry(&mut bytes, "dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    entry(&mut bytes, "init", PROGRAM, (0, 0), init);
    entry(
        &mut bytes,
        "bench.args",
        0o100_644,
        (0, 0),
        arguments.as_bytes(),
    );
    entry(&mut bytes, "TRAILER!!!", 0, (0, 0), &[]);
    bytes
}

/// An archive of all directories, files and symbolic links below `root`.
///
/// # Errors
/// If one cannot be read.
pub fn tree(root: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    below(&mut bytes, root, "")?;
    entry(&mut bytes, "TRAILER!!!", 0, (0, 0), &[]);
    Ok(bytes)
}

fn below(bytes: &mut Vec<u8>, root: &Path, directory: &str) -> Result<()> {
    let place = root.join(directory);
    let doing = |e| format!("cannot read {}: {e}", place.display());
    let mut names: Vec<_> = std::fs::read_dir(&place)
        .map_err(doing)?
        .map(|found| Ok(found?.file_name()))
        .collect::<std::io::Result<_>>()
        .map_err(doing)?;
    names.sort();
    for name in names {
        let name = format!("{directory}{}", name.to_string_lossy());
        let path = root.join(&name);
        let facts = path.symlink_metadata().map_err(doing)?;
        let mode = facts.permissions().mode();
        if facts.is_dir() {
            entry(bytes, &name, DIRECTORY, (0, 0), &[]);
            below(bytes, root, &(name + "/"))?;
        } else if facts.is_symlink() {
            let target = std::fs::read_link(&path).map_err(doing)?;
            entry(bytes, &name, LINK, (0, 0), target.as_os_str().as_bytes());
        } else {
            let content = std::fs::read(&path).map_err(doing)?;
            entry(bytes, &name, mode, (0, 0), &content);
        }
    }
    Ok(())
}

fn entry(bytes: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
    bytes.extend_from_slice(b"070701");
    let fields = [
        bytes.len() as u32, // the inode: any number of its own
        mode,
        0,
        0,
        1,
        1,
        content.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    for field in fields {
        bytes.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_hold_the_content() {
        let bytes = archive(b"abcde", "boot");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("init\0\0abcde\0\0\x00070701"), "{text}");
        assert!(text.contains("bench.args\0\0\0\0boot070701"), "{text}");
    }
}
