//! The default guest: Debian's kernel and busybox, from Debian's archive, cached and checked.
//!
//! The cache directory holds
//! - `lock`: one process prepares at a time; those that only read share it;
//! - `store/NAME-DIGEST`: files that never change, named by the start of their SHA-256;
//! - `guest.json`: the manifest, which names the store's files with their whole SHA-256. It is
//!   replaced in one step, last, so that whatever interrupts the preparation, the cache holds either
//!   the old guest or the new one.
//!
//! The packages are kept in the store too: a newer AnyKVM with another `/init` makes its initial
//! file system from them without a network.

pub mod apt;
pub mod cpio;
pub mod deb;
pub mod initramfs;
pub mod modules;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, IoContext};
use crate::progress::Progress;

/// Kernel packages to look for, the first that the archive has: Debian's, then Ubuntu's.
const KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];
const USERLAND: &str = "busybox-static";

/// A cached file with its checksum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Cached {
    /// Name in the store.
    file: String,
    /// SHA-256 in lower-case hexadecimal digits.
    sha256: String,
}

/// A package that the guest is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Source {
    package: String,
    version: String,
    deb: Cached,
}

/// What `guest.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    /// Digest of what AnyKVM itself puts in: another one means that the files must be made anew.
    recipe: String,
    kernel_source: Source,
    userland_source: Source,
    kernel: Cached,
    initramfs: Cached,
}

/// The default guest, ready to boot: checked and in memory.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel, a bzImage.
    pub kernel: Vec<u8>,
    /// The part of the initial file system that is the same for every start.
    pub initramfs: Vec<u8>,
    /// E.g. "linux-image-6.1.0-56-cloud-amd64 6.1.192-2".
    pub kernel_package: String,
    /// E.g. "busybox-static 1:1.35.0-4".
    pub userland_package: String,
}

/// The cache directory.
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// The user's cache: `$XDG_CACHE_HOME/anykvm`, or `~/.cache/anykvm`.
    ///
    /// # Errors
    /// If neither variable says where, or the directory cannot be made.
    pub fn of_user() -> Result<Self, Error> {
        // The XDG base directory specification ignores paths that are not absolute.
        let variable = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let base = variable("XDG_CACHE_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".cache")))
            .ok_or_else(|| {
                Error::new("there is no place for the default guest: HOME is not set")
                    .hint("set HOME or XDG_CACHE_HOME to a directory you can write")
            })?;
        Self::at(base.join("anykvm"))
    }

    /// A cache in `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn at(directory: PathBuf) -> Result<Self, Error> {
        fs::create_dir_all(directory.join("store")).map_err(|e| {
            Error::new(format!(
                "cannot write the cache directory {}: {}",
                directory.display(),
                crate::error::reason(&e)
            ))
            .hint("set XDG_CACHE_HOME to a directory you can write")
        })?;
        Ok(Self { directory })
    }

    /// Gives the default guest, from the cache if it is there and whole, else prepares it.
    ///
    /// # Errors
    /// If it has to be fetched and cannot be, or the cache cannot be written.
    pub fn guest(&self, progress: &Progress) -> Result<Guest, Error> {
        {
            let _shared = self.lock(FlockArg::LockShared, progress)?;
            if let Some(guest) = self.ready() {
                return Ok(guest);
            }
        }
        self.prepare(false, progress)
    }

    /// Makes the guest ready and fetches what is missing; with `refresh`, asks the archive for
    /// newer packages.
    ///
    /// # Errors
    /// As [`Cache::guest`].
    pub fn prepare(&self, refresh: bool, progress: &Progress) -> Result<Guest, Error> {
        let _exclusive = self.lock(FlockArg::LockExclusive, progress)?;
        // Another process may have prepared it while this one waited.
        if !refresh && let Some(guest) = self.ready() {
            return Ok(guest);
        }
        let sources = match self.sources_in_store().filter(|_| !refresh) {
            Some(sources) => sources,
            None => self.fetch(progress)?,
        };
        progress.step("Preparing the guest");
        let manifest = self.build(sources)?;
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| Error::new(format!("cannot write the manifest: {e}")))?;
        self.write(&self.manifest_path(), &text)?;
        self.remove_unused(&manifest);
        progress.done();
        self.load(&manifest)
    }

    fn manifest_path(&self) -> PathBuf {
        self.directory.join("guest.json")
    }

    fn stored(&self, cached: &Cached) -> PathBuf {
        self.directory.join("store").join(&cached.file)
    }

    /// Locks the cache against other processes. The lock ends with the value.
    fn lock(&self, kind: FlockArg, progress: &Progress) -> Result<Flock<File>, Error> {
        let path = self.directory.join("lock");
        let doing = || format!("cannot lock the cache {}", path.display());
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|e| {
                Error::new(format!("{}: {}", doing(), crate::error::reason(&e)))
                    .hint("set XDG_CACHE_HOME to a directory you can write")
            })?;
        let at_once = match kind {
            FlockArg::LockShared => FlockArg::LockSharedNonblock,
            _ => FlockArg::LockExclusiveNonblock,
        };
        let file = match Flock::lock(file, at_once) {
            Ok(lock) => return Ok(lock),
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
            Err((_, e)) => return Err(Error::new(format!("{}: {}", doing(), e.desc()))),
        };
        progress.step("Waiting for another anykvm that prepares the guest");
        Flock::lock(file, kind).map_err(|(_, e)| Error::new(format!("{}: {}", doing(), e.desc())))
    }

    /// The guest of the manifest, if all of it is there, whole, and of this version's recipe.
    fn ready(&self) -> Option<Guest> {
        let manifest = self.manifest()?;
        if manifest.recipe != recipe() {
            log::info!("the cached guest was made by another version of anykvm");
            return None;
        }
        self.load(&manifest)
            .inspect_err(|e| log::warn!("the cached guest is damaged and will be made anew: {e}"))
            .ok()
    }

    fn manifest(&self) -> Option<Manifest> {
        let text = fs::read(self.manifest_path()).ok()?;
        serde_json::from_slice(&text)
            .inspect_err(|e| log::warn!("the cache's manifest is damaged: {e}"))
            .ok()
    }

    /// Packages that are in the store and whole.
    fn sources_in_store(&self) -> Option<[Source; 2]> {
        let manifest = self.manifest()?;
        let sources = [manifest.kernel_source, manifest.userland_source];
        sources
            .iter()
            .all(|s| self.read_checked(&s.deb).is_ok())
            .then_some(sources)
    }

    fn load(&self, manifest: &Manifest) -> Result<Guest, Error> {
        let named = |s: &Source| format!("{} {}", s.package, s.version);
        Ok(Guest {
            kernel: self.read_checked(&manifest.kernel)?,
            initramfs: self.read_checked(&manifest.initramfs)?,
            kernel_package: named(&manifest.kernel_source),
            userland_package: named(&manifest.userland_source),
        })
    }

    /// Reads a file of the store and compares its checksum.
    fn read_checked(&self, cached: &Cached) -> Result<Vec<u8>, Error> {
        let path = self.stored(cached);
        let mut content = Vec::new();
        File::open(&path)
            .and_then(|mut file| file.read_to_end(&mut content))
            .doing(format_args!("cannot read {}", path.display()))?;
        if hex_sha256(&content) == cached.sha256 {
            Ok(content)
        } else {
            Err(Error::new(format!(
                "{} has a wrong checksum",
                path.display()
            )))
        }
    }

    /// Downloads the packages into the store.
    fn fetch(&self, progress: &Progress) -> Result<[Source; 2], Error> {
        let work = tempfile::Builder::new()
            .prefix("fetch-")
            .tempdir_in(&self.directory)
            .doing(format_args!(
                "cannot write the cache {}",
                self.directory.display()
            ))?;
        let apt = apt::Apt::new(work.path())?;
        let complaint = progress
            .percent("Asking Debian's archive for package lists", |report| {
                apt.update(report)
            })?;
        let missing = |name: &str| {
            let why = match &complaint {
                Some(text) => format!(" (apt says: {text})"),
                None => String::new(),
            };
            Error::new(format!(
                "the archives that apt is configured for do not offer {name}{why}"
            ))
            .hint(format!(
                "check the network and /etc/apt/sources.list, or {}",
                apt::WITHOUT_APT
            ))
        };
        let kernel = self.find_kernel(&apt)?.ok_or_else(|| missing(KERNELS[0]))?;
        let userland = apt.show(USERLAND)?.ok_or_else(|| missing(USERLAND))?;
        let get = |package: &apt::Package| -> Result<Source, Error> {
            let what = format!(
                "Downloading {} ({:.1} MB)",
                package.name,
                package.size as f64 / 1e6
            );
            let deb = progress.percent(&what, |report| apt.download(package, report))?;
            let content = fs::read(&deb).doing(format_args!("cannot read {}", deb.display()))?;
            let sha256 = hex_sha256(&content);
            if sha256 != package.sha256 {
                return Err(Error::new(format!(
                    "the download of {} does not have the archive's checksum",
                    package.name
                ))
                .hint("try again; if it stays so, something between here and the archive changes files"));
            }
            Ok(Source {
                package: package.name.clone(),
                version: package.version.clone(),
                deb: self.store(&format!("{}.deb", package.name), &content)?,
            })
        };
        Ok([get(&kernel)?, get(&userland)?])
    }

    /// The package with the image: the one that the name without a version depends on.
    fn find_kernel(&self, apt: &apt::Apt) -> Result<Option<apt::Package>, Error> {
        for name in KERNELS {
            let Some(mut package) = apt.show(name)? else {
                continue;
            };
            // Ubuntu has more than one step to the image.
            for _ in 0..4 {
                let next = package
                    .depends
                    .iter()
                    .find(|name| name.starts_with("linux-image-"));
                let Some(next) = next else {
                    return Ok(Some(package));
                };
                match apt.show(next)? {
                    Some(found) => package = found,
                    None => break,
                }
            }
        }
        Ok(None)
    }

    /// Makes the guest's files from the packages.
    fn build(&self, [kernel_source, userland_source]: [Source; 2]) -> Result<Manifest, Error> {
        let kernel_files = deb::files(&self.stored(&kernel_source.deb), |name| {
            name.starts_with("boot/vmlinuz-") || modules::name_of(name).is_some()
        })?;
        let userland_files = deb::files(&self.stored(&userland_source.deb), |name| {
            name.ends_with("bin/busybox")
        })?;
        let lacks = |source: &Source, what: &str| {
            Error::new(format!(
                "the package {} {} holds no {what}",
                source.package, source.version
            ))
            .hint(apt::WITHOUT_APT)
        };
        let kernel = kernel_files
            .iter()
            .find(|(name, _)| name.starts_with("boot/vmlinuz-"))
            .map(|(_, content)| content)
            .ok_or_else(|| lacks(&kernel_source, "kernel"))?;
        let busybox = userland_files
            .values()
            .next()
            .ok_or_else(|| lacks(&userland_source, "busybox"))?;
        let initramfs = initramfs::base(busybox, &needed_modules(&kernel_files)?);
        Ok(Manifest {
            recipe: recipe(),
            kernel: self.store("vmlinuz", kernel)?,
            initramfs: self.store("initramfs", &initramfs)?,
            kernel_source,
            userland_source,
        })
    }

    /// Puts a file into the store.
    fn store(&self, name: &str, content: &[u8]) -> Result<Cached, Error> {
        let sha256 = hex_sha256(content);
        let cached = Cached {
            file: format!("{}-{name}", &sha256[..16]),
            sha256,
        };
        if self.read_checked(&cached).is_err() {
            self.write(&self.stored(&cached), content)?;
        }
        Ok(cached)
    }

    /// Writes a file in one step: whoever looks sees all of it or nothing.
    fn write(&self, path: &Path, content: &[u8]) -> Result<(), Error> {
        let doing = || format!("cannot write {}", path.display());
        let mut file = tempfile::NamedTempFile::new_in(&self.directory).doing(doing())?;
        file.write_all(content).doing(doing())?;
        file.as_file().sync_all().doing(doing())?;
        file.persist(path).map_err(|e| e.error).doing(doing())?;
        Ok(())
    }

    /// Removes what an older guest or an interrupted preparation left. Failures do no harm.
    fn remove_unused(&self, manifest: &Manifest) {
        let used = [
            &manifest.kernel,
            &manifest.initramfs,
            &manifest.kernel_source.deb,
            &manifest.userland_source.deb,
        ];
        for entry in fs::read_dir(self.directory.join("store"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if !used.iter().any(|cached| *cached.file == *entry.file_name()) {
                let _ = fs::remove_file(entry.path());
            }
        }
        for entry in fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("fetch-") {
                let _ = fs::remove_dir_all(entry.path());
            } else if name.to_string_lossy().starts_with(".tmp") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// The modules of the kernel's package that the guest loads, in order.
fn needed_modules(files: &BTreeMap<String, Vec<u8>>) -> Result<Vec<initramfs::Module>, Error> {
    let by_name: BTreeMap<String, &String> = files
        .keys()
        .filter_map(|path| Some((modules::name_of(path)?, path)))
        .collect();
    let mut contents: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut depends = BTreeMap::new();
    let mut open: Vec<String> = modules::WANTED.iter().map(ToString::to_string).collect();
    while let Some(name) = open.pop() {
        let Some(&path) = by_name.get(&name) else {
            log::debug!("the kernel's package has no module {name}: taken as built in");
            continue;
        };
        if depends.contains_key(&name) {
            continue;
        }
        let content = files.get(path).cloned().unwrap_or_default();
        let content = deb::decompress_module(path, content)?;
        let needed = modules::dependencies(&name, &content)?;
        open.extend(needed.iter().cloned());
        contents.insert(name.clone(), content);
        depends.insert(name, needed);
    }
    Ok(modules::load_order(modules::WANTED, &depends)
        .into_iter()
        .filter_map(|name| {
            Some(initramfs::Module {
                content: contents.remove(&name)?,
                file: format!("{name}.ko"),
            })
        })
        .collect())
}

/// Digest of what decides the initial file system beside the packages.
fn recipe() -> String {
    let mut digest = Sha256::new();
    // Raised when the code that makes the archive changes what it makes.
    digest.update(b"layout 1\0");
    for text in initramfs::OWN_TEXTS {
        digest.update(text);
        digest.update(b"\0");
    }
    for module in modules::WANTED {
        digest.update(module);
        digest.update(b"\0");
    }
    hex(&digest.finalize())
}

fn hex_sha256(content: &[u8]) -> String {
    hex(&Sha256::digest(content))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
