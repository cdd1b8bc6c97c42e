//! Debian's kernels, from the archive that the host's apt knows, in private apt states; cached in
//! `$XDG_CACHE_HOME/anykvm-e2e`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anykvm::Error;
use anykvm::guest::apt::{Apt, Package};
use anykvm::guest::cpio::Archive;
use anykvm::guest::{deb, modules};

use crate::archive::{self, Doing};

/// Drivers that a generic kernel has as modules; what it has built in is not in its package.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "af_packet",
];
const INIT: &[u8] = include_bytes!("init.sh");
/// Raised when what is kept of a package changes.
const CACHE_FORMAT: &str = "1";

/// A kernel to test.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    /// What the table calls it.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// Suites to look in: the newest version of all is taken.
    suites: &'static [&'static str],
    package: &'static str,
    /// Debian's name of the architecture.
    architecture: &'static str,
}

/// All of them.
pub const KERNELS: &[Kernel] = &[
    Kernel {
        name: "cloud",
        about: "Debian 12's cloud kernel",
        suites: &["bookworm", "bookworm-security"],
        package: "linux-image-cloud-amd64",
        architecture: "amd64",
    },
    Kernel {
        name: "generic",
        about: "Debian 12's generic kernel",
        suites: &["bookworm", "bookworm-security"],
        package: "linux-image-amd64",
        architecture: "amd64",
    },
    Kernel {
        name: "686-pae",
        about: "Debian 12's 32-bit kernel with PAE",
        suites: &["bookworm", "bookworm-security"],
        package: "linux-image-686-pae",
        architecture: "i386",
    },
    Kernel {
        name: "686",
        about: "Debian 12's 32-bit kernel without PAE",
        suites: &["bookworm", "bookworm-security"],
        package: "linux-image-686",
        architecture: "i386",
    },
    Kernel {
        name: "trixie",
        about: "Debian 13's generic kernel",
        suites: &["trixie"],
        package: "linux-image-amd64",
        architecture: "amd64",
    },
    Kernel {
        name: "newest",
        about: "the newest generic kernel of the archive",
        suites: &["sid"],
        package: "linux-image-amd64",
        architecture: "amd64",
    },
    Kernel {
        name: "newest-cloud",
        about: "the newest cloud kernel of the archive",
        suites: &["sid"],
        package: "linux-image-cloud-amd64",
        architecture: "amd64",
    },
];

/// A kernel that can be booted.
#[derive(Debug, Clone)]
pub struct Files {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initial file system: busybox and the drivers. Ends in a shell on the serial port.
    pub initrd: PathBuf,
    /// The package and its version.
    pub version: String,
}

/// The kernel called `name`.
pub fn find(name: &str) -> Option<&'static Kernel> {
    KERNELS.iter().find(|kernel| kernel.name == name)
}

impl Kernel {
    /// The kernel's files, from the cache if they are there, else from the archive; with `refresh`,
    /// from the archive.
    ///
    /// # Errors
    /// If they are not there and the archive does not help.
    pub fn files(&self, refresh: bool) -> Result<Files, Error> {
        let cache = archive::cache("anykvm-e2e")?;
        let lock = fs::File::create(cache.join(format!("{}.lock", self.name)))
            .doing("cannot write the cache")?;
        lock.lock().doing("cannot lock the cache")?;
        let directory = cache.join(format!("{}-{CACHE_FORMAT}", self.name));
        if refresh || !directory.join("version").exists() {
            self.fetch(&cache, &directory)?;
        }
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read(&path).doing(format_args!("cannot read {}", path.display()))
        };
        let initrd = directory.join("initrd");
        let archive = initramfs(&read("busybox")?, &directory.join("modules"))?;
        // Another process may be booting it: replaced in one step.
        if fs::read(&initrd).ok().as_deref() != Some(&archive) {
            let new = directory.join("initrd.new");
            fs::write(&new, &archive)
                .and_then(|()| fs::rename(&new, &initrd))
                .doing("cannot write the cache")?;
        }
        Ok(Files {
            kernel: directory.join("vmlinuz"),
            initrd,
            version: String::from_utf8_lossy(&read("version")?).into_owned(),
        })
    }

    fn fetch(&self, cache: &Path, directory: &Path) -> Result<(), Error> {
        eprintln!("e2e: fetching {}", self.about);
        // One state for all kernels of an architecture and suite: they share the lists.
        let state = cache.join(format!("apt-{}-{}", self.architecture, self.suites[0]));
        let lock =
            fs::File::create(state.with_extension("lock")).doing("cannot write the cache")?;
        lock.lock().doing("cannot lock the cache")?;
        let apt = archive::apt(&state, self.suites, self.architecture)?;
        let complaint = apt.update(|_| {})?;
        let of_archive = |name: &str| -> Result<Package, Error> {
            apt.show(name)?.ok_or_else(|| {
                Error::new(format!(
                    "the archive has no {name} for {}: {}",
                    self.architecture,
                    complaint.as_deref().unwrap_or("apt does not say why")
                ))
            })
        };
        let mut image = of_archive(self.package)?;
        if let Some(real) = image
            .depends
            .iter()
            .find(|name| name.starts_with("linux-image-"))
        {
            image = of_archive(real)?;
        }
        let busybox = of_archive("busybox-static")?;

        let temporary = tempfile::tempdir_in(cache).doing("cannot write the cache")?;
        let write = |name: &str, content: &[u8]| {
            fs::write(temporary.path().join(name), content).doing("cannot write the cache")
        };
        let mut files = image_files(&apt, &image)?;
        // Since Linux 7 the kernel and its modules have packages of their own.
        for name in &image.depends {
            if name.starts_with("linux-binary-") || name.starts_with("linux-modules-") {
                files.extend(image_files(&apt, &of_archive(name)?)?);
            }
        }
        let vmlinuz = files
            .keys()
            .find(|name| name.starts_with("boot/vmlinuz-") || name.ends_with("/vmlinuz"))
            .cloned()
            .and_then(|name| files.remove(&name))
            .ok_or_else(|| Error::new(format!("{} holds no kernel", image.name)))?;
        write("vmlinuz", &vmlinuz)?;
        let package = apt.download(&busybox, |_| {})?;
        let userland = deb::files(&package, |name| name.ends_with("bin/busybox"))?;
        let program = userland
            .values()
            .next()
            .ok_or_else(|| Error::new("busybox-static holds no busybox"))?;
        write("busybox", program)?;
        fs::create_dir(temporary.path().join("modules")).doing("cannot write the cache")?;
        for (index, (name, content)) in in_load_order(&files)?.into_iter().enumerate() {
            write(&format!("modules/{index:02}-{name}.ko"), &content)?;
        }
        write(
            "version",
            format!("{} {}", image.name, image.version).as_bytes(),
        )?;
        let _ = fs::remove_dir_all(directory);
        fs::rename(temporary.keep(), directory).doing("cannot write the cache")
    }
}

/// The kernel and the modules that may be needed from a package.
fn image_files(apt: &Apt, image: &Package) -> Result<BTreeMap<String, Vec<u8>>, Error> {
    let package = apt.download(image, |_| {})?;
    let files = deb::files(&package, |name| {
        name.starts_with("boot/vmlinuz-")
            || name.ends_with("/vmlinuz")
            || name.contains("/virtio")
            || name.contains("/kernel/drivers/char/hw_random/")
            || name.contains("/failover.ko")
            || name.contains("/net_failover.ko")
            || name.contains("/af_packet.ko")
    });
    let _ = fs::remove_file(package);
    files
}

/// The wanted modules and what they need, decompressed.
fn in_load_order(files: &BTreeMap<String, Vec<u8>>) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let by_name: BTreeMap<String, (&String, &Vec<u8>)> = files
        .iter()
        .filter_map(|(path, content)| Some((modules::name_of(path)?, (path, content))))
        .collect();
    let mut contents = BTreeMap::new();
    let mut depends = BTreeMap::new();
    let mut open: Vec<String> = MODULES.iter().map(ToString::to_string).collect();
    while let Some(name) = open.pop() {
        let Some((path, content)) = by_name.get(&name) else {
            continue;
        };
        if depends.contains_key(&name) {
            continue;
        }
        let content = deb::decompress_module(path, content.to_vec())?;
        let needed = modules::dependencies(&name, &content)?;
        open.extend(needed.iter().cloned());
        contents.insert(name.clone(), content);
        depends.insert(name, needed);
    }
    Ok(modules::load_order(MODULES, &depends)
        .into_iter()
        .filter_map(|name| contents.remove(&name).map(|content| (name, content)))
        .collect())
}

/// busybox, the drivers and `/init`.
fn initramfs(busybox: &[u8], modules: &Path) -> Result<Vec<u8>, Error> {
    let mut archive = Archive::new();
    for directory in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "mnt",
        "proc",
        "sys",
        "tmp",
    ] {
        archive.directory(directory, 0o755);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("bin/busybox", 0o755, busybox);
    for applet in [
        "sh",
        "mount",
        "umount",
        "insmod",
        "stty",
        "setsid",
        "echo",
        "cat",
        "uname",
        "grep",
        "date",
        "sleep",
        "dd",
        "sha256sum",
        "ip",
        "udhcpc",
        "ping",
        "wget",
        "dmesg",
        "poweroff",
        "reboot",
        "head",
        "seq",
        "wc",
        "ls",
        "free",
        "true",
        "kill",
        "httpd",
        "tr",
        "gzip",
        "taskset",
    ] {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    let mut names: Vec<PathBuf> = fs::read_dir(modules)
        .doing("cannot read the cache")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    names.sort();
    let mut order = String::new();
    for path in names {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let content = fs::read(&path).doing("cannot read the cache")?;
        archive.file(&format!("lib/modules/{name}"), 0o644, &content);
        order += &format!("{name}\n");
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    archive.file(
        "etc/udhcpc.script",
        0o755,
        b"#!/bin/sh\n[ \"$1\" = bound ] || exit 0\nip addr replace $ip/$mask dev $interface\n\
          ip route replace default via $router\n\
          for server in $dns; do echo nameserver $server; done >/etc/resolv.conf\n",
    );
    archive.file("init", 0o755, INIT);
    Ok(archive.finish())
}
