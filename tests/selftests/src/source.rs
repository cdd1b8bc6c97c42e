//! The selftests' source, from Debian's archive, and what is built of it; cached in
//! `$XDG_CACHE_HOME/anykvm-selftests`. Nothing of it is in the repository.

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anykvm::Error;
use anykvm::guest::deb;
use e2e::archive::{self, Doing};

/// Raised when what is kept of a source, or how it is built, changes.
const CACHE_FORMAT: &str = "1";
/// What the build needs of the source tree.
const NEEDED: &[&str] = &[
    "Makefile", "Kbuild", "tools", "include", "arch/x86", "scripts", "usr",
];
/// Where the tests are in the source tree.
const TESTS: &str = "tools/testing/selftests/kvm";

/// A kernel source that Debian has.
#[derive(Debug)]
pub struct Source {
    /// What the command line calls it.
    pub name: &'static str,
    /// Suites to look in: the newest version of all is taken.
    suites: &'static [&'static str],
    /// The package, or one that depends on it.
    package: &'static str,
    /// Compiler flags for what the release does not build without.
    flags: &'static str,
}

/// All of them.
pub const SOURCES: &[Source] = &[
    Source {
        name: "6.1",
        suites: &["bookworm", "bookworm-security"],
        package: "linux-source-6.1",
        // 6.1's stable releases got fixes of the tests whose macros have another name there, and an
        // outdated linux/stddef.h that is found first.
        flags: "-DTEST_ASSERT_EQ=ASSERT_EQ -include ../../../../usr/include/linux/stddef.h",
    },
    Source {
        name: "newest",
        suites: &["sid"],
        package: "linux-source",
        flags: "",
    },
];

/// The source called `name`.
#[must_use]
pub fn find(name: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|source| source.name == name)
}

/// A source that has been built.
#[derive(Debug, Clone)]
pub struct Built {
    /// The version of Linux, as `7.2.13`.
    pub version: String,
    /// Where the tests are.
    pub directory: PathBuf,
    /// The tests that the kernel's makefile names, relative to the directory, in its order.
    pub tests: Vec<String>,
}

impl Source {
    /// The tests, from the cache if they are there, else from the archive; with `refresh`, from the
    /// archive.
    ///
    /// # Errors
    /// If the archive does not help, or they cannot be built.
    pub fn built(&self, refresh: bool) -> Result<Built, Error> {
        let cache = archive::cache("anykvm-selftests")?;
        let lock = fs::File::create(cache.join(format!("{}.lock", self.name)))
            .doing("cannot write the cache")?;
        lock.lock().doing("cannot lock the cache")?;
        let directory = cache.join(format!("{}-{CACHE_FORMAT}", self.name));
        let version = directory.join("version");
        if refresh || !version.exists() {
            tools()?;
            let temporary = tempfile::tempdir_in(&cache).doing("cannot write the cache")?;
            let found = self.fetch(&cache, temporary.path())?;
            let _ = fs::remove_dir_all(&directory);
            // Where it stays, as the build writes down where it was made.
            fs::rename(temporary.keep(), &directory).doing("cannot write the cache")?;
            self.build(&directory)?;
            fs::write(&version, found).doing("cannot write the cache")?;
        }
        let tests = directory.join(TESTS);
        Ok(Built {
            version: fs::read_to_string(&version).doing("cannot read the cache")?,
            tests: names(&tests)?,
            directory: tests,
        })
    }

    /// Unpacks the source in `into`; its version.
    fn fetch(&self, cache: &Path, into: &Path) -> Result<String, Error> {
        eprintln!(
            "selftests: fetching the source of Linux ({}) from Debian",
            self.name
        );
        let state = cache.join(format!("apt-{}", self.suites[0]));
        let apt = archive::apt(&state, self.suites, "amd64")?;
        let complaint = apt.update(|_| {})?;
        let of_archive = |name: &str| {
            apt.show(name)?.ok_or_else(|| {
                Error::new(format!(
                    "the archive has no {name}: {}",
                    complaint.as_deref().unwrap_or("apt does not say why")
                ))
                .hint("check the network and try again")
            })
        };
        let mut package = of_archive(self.package)?;
        if let Some(real) = package
            .depends
            .iter()
            .find(|name| name.starts_with("linux-source-"))
            .cloned()
        {
            package = of_archive(&real)?;
        }
        let downloaded = apt.download(&package, |_| {})?;
        let files = deb::files(&downloaded, |name| name.ends_with(".tar.xz"))?;
        let _ = fs::remove_file(&downloaded);
        let tree = files
            .into_values()
            .max_by_key(Vec::len)
            .ok_or_else(|| Error::new(format!("{} holds no source", package.name)))?;
        eprintln!("selftests: unpacking {} {}", package.name, package.version);
        unpack(&tree, into).doing(format_args!("cannot unpack {}", package.name))?;
        let upstream = package.version.split('-').next().unwrap_or_default();
        Ok(upstream.to_owned())
    }

    fn build(&self, directory: &Path) -> Result<(), Error> {
        eprintln!("selftests: building the tests of Linux ({})", self.name);
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let log = directory.join("build.log");
        let run = |directory: &Path, arguments: &[&str]| {
            let file = fs::File::options()
                .create(true)
                .append(true)
                .open(&log)
                .doing("cannot write the cache")?;
            let errors = file.try_clone().doing("cannot write the cache")?;
            let status = Command::new("make")
                .arg(format!("-j{jobs}"))
                .args(arguments)
                .current_dir(directory)
                .env_remove("MAKEFLAGS")
                .env("LC_ALL", "C")
                .stdin(Stdio::null())
                .stdout(file)
                .stderr(errors)
                .status()
                .doing("cannot start make")?;
            match status.success() {
                true => Ok(()),
                false => Err(Error::new(format!(
                    "make does not build the tests of Linux ({}): see {}",
                    self.name,
                    log.display()
                ))),
            }
        };
        run(directory, &["ARCH=x86_64", "headers"])?;
        let flags = format!("EXTRA_CFLAGS={}", self.flags);
        // A test that does not build is missing then, and counts as failed: the others can run.
        if run(&directory.join(TESTS), &["ARCH=x86_64", "-k", &flags]).is_err() {
            eprintln!("selftests: some do not build: see {}", log.display());
        }
        Ok(())
    }
}

/// The names that the kernel's makefile gives to the tests.
fn names(directory: &Path) -> Result<Vec<String>, Error> {
    let output = Command::new("make")
        .args(["-s", "ARCH=x86_64"])
        .arg("--eval=names-of-tests: ; @echo $(TEST_GEN_PROGS) $(TEST_PROGS)")
        .arg("names-of-tests")
        .current_dir(directory)
        .env_remove("MAKEFLAGS")
        .output()
        .doing("cannot start make")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let prefix = format!("{}/", directory.display());
    let names: Vec<String> = text
        .split_whitespace()
        .map(|name| name.strip_prefix(&prefix).unwrap_or(name).to_owned())
        .collect();
    match names.is_empty() {
        false => Ok(names),
        true => Err(Error::new(format!(
            "make does not name the tests in {}",
            directory.display()
        ))),
    }
}

/// Checks that there are make and a C compiler.
fn tools() -> Result<(), Error> {
    for (program, package) in [("make", "make"), ("gcc", "gcc libc6-dev")] {
        let found = Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if found.is_err() {
            return Err(Error::new(format!(
                "the selftests are built with {program}, which is missing"
            ))
            .hint(format!("install it (on Debian: apt-get install {package})")));
        }
    }
    Ok(())
}

/// Unpacks what is needed of the source tree, without the folder it is in.
fn unpack(tree: &[u8], into: &Path) -> std::io::Result<()> {
    let plain = BufReader::with_capacity(1 << 20, lzma_rust2::XzReader::new(tree, true));
    let mut archive = tar::Archive::new(plain);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path: PathBuf = entry.path()?.components().skip(1).collect();
        if !NEEDED.iter().any(|needed| path.starts_with(needed)) {
            continue;
        }
        let target = into.join(&path);
        // Names with `..` do not get out of it: tar has no such in a source of Debian's.
        if path
            .components()
            .any(|part| !matches!(part, std::path::Component::Normal(_)))
        {
            continue;
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        entry.unpack(&target)?;
    }
    Ok(())
}
