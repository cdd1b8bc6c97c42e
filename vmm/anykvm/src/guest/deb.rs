//! Takes files out of a Debian package: an `ar` archive whose member `data.tar.*` holds the file
//! tree (deb(5)).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use crate::error::{Error, IoContext};

/// The largest single file taken out of a package, so that a broken archive cannot fill memory.
const MAX_FILE: u64 = 256 << 20;

/// The files of a package that `wanted` asks for, by name without the leading `./`.
///
/// # Errors
/// If the package cannot be read, is not a Debian package, or is compressed in a way that is not
/// known here.
pub fn files(
    package: &Path,
    mut wanted: impl FnMut(&str) -> bool,
) -> Result<BTreeMap<String, Vec<u8>>, Error> {
    let doing = || format!("cannot unpack the package {}", package.display());
    let file = File::open(package).doing(doing())?;
    let mut archive = ar::Archive::new(BufReader::with_capacity(1 << 16, file));
    while let Some(member) = archive.next_entry() {
        let member = member.doing(doing())?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let Some(kind) = name.strip_prefix("data.tar") else {
            continue;
        };
        let tree = decompressor(kind.trim_end_matches('/'), member).doing(doing())?;
        return from_tar(tree, &mut wanted).doing(doing());
    }
    Err(Error::new(format!("{}: it holds no data.tar", doing())))
}

/// A reader of what `stream`, compressed as the file name's ending `kind` says, holds.
fn decompressor<'a>(kind: &str, stream: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match kind {
        "" => Box::new(stream),
        ".xz" => Box::new(lzma_rust2::XzReader::new(stream, true)),
        ".gz" => Box::new(flate2::read::GzDecoder::new(stream)),
        ".zst" => Box::new(
            ruzstd::decoding::StreamingDecoder::new(stream)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?,
        ),
        other => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("its compression '{other}' is not known"),
            ));
        }
    })
}

/// Decompresses a kernel module, which is plain or compressed by the ending of its `name`.
///
/// # Errors
/// If the content is not what the ending says.
pub fn decompress_module(name: &str, content: Vec<u8>) -> Result<Vec<u8>, Error> {
    let kind = name.rsplit_once(".ko").map_or("", |(_, kind)| kind);
    if kind.is_empty() {
        return Ok(content);
    }
    let doing = || format!("cannot decompress the kernel module {name}");
    let mut plain = Vec::new();
    decompressor(kind, content.as_slice())
        .and_then(|stream| stream.take(MAX_FILE).read_to_end(&mut plain))
        .doing(doing())?;
    Ok(plain)
}

fn from_tar(
    tree: impl Read,
    wanted: &mut impl FnMut(&str) -> bool,
) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(BufReader::with_capacity(1 << 18, tree)).entries()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path()?.to_string_lossy().into_owned();
        let name = path.strip_prefix("./").unwrap_or(&path).to_owned();
        if !wanted(&name) {
            continue;
        }
        if entry.size() > MAX_FILE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("its file {name} is too large"),
            ));
        }
        let mut content = Vec::new();
        entry.take(MAX_FILE).read_to_end(&mut content)?;
        files.insert(name, content);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A package as `dpkg-deb` would write it, with an uncompressed tree.
    fn package(files: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let mut tree = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tree.append_data(&mut header, format!("./{name}"), *content)
                .unwrap();
        }
        let tree = tree.into_inner().unwrap();
        let mut deb = tempfile::NamedTempFile::new().unwrap();
        let mut archive = ar::Builder::new(deb.as_file_mut());
        for (name, content) in [
            ("debian-binary", b"2.0\n".as_slice()),
            ("control.tar", b""),
            ("data.tar", &tree),
        ] {
            let header = ar::Header::new(name.into(), content.len() as u64);
            archive.append(&header, content).unwrap();
        }
        deb.flush().unwrap();
        deb
    }

    #[test]
    fn takes_what_is_wanted() {
        let deb = package(&[("boot/vmlinuz-1", b"kernel"), ("usr/doc", b"text")]);
        let files = files(deb.path(), |name| name.starts_with("boot/")).unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!(files["boot/vmlinuz-1"], b"kernel");
    }

    #[test]
    fn a_cut_package_is_an_error_not_a_panic() {
        let deb = package(&[("boot/vmlinuz-1", &[7; 5000])]);
        let whole = std::fs::read(deb.path()).unwrap();
        for length in (0..whole.len() - 1024).step_by(97) {
            let mut cut = tempfile::NamedTempFile::new().unwrap();
            cut.write_all(&whole[..length]).unwrap();
            let result = files(cut.path(), |_| true);
            assert!(
                result.as_ref().is_err() || result.as_ref().is_ok_and(BTreeMap::is_empty),
                "{length}"
            );
        }
    }
}
