//! Downloads packages from the archive that the host's apt is configured for, without root and
//! without touching the host's apt: the sources, keys and proxies are the host's, the lists and
//! downloads are private. apt itself checks signatures and checksums.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, IoContext};

/// What to do when apt is of no help.
pub const WITHOUT_APT: &str = "use --kernel and --initrd with files of your own";

/// A private apt state below one directory.
pub struct Apt {
    directory: PathBuf,
    config: PathBuf,
}

/// A package as the archive describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Packages it depends on: the first of each group of alternatives.
    pub depends: Vec<String>,
    /// Bytes to download.
    pub size: u64,
    /// SHA-256 of the package, in lower-case hexadecimal digits.
    pub sha256: String,
}

impl Apt {
    /// Creates the private state in `directory`.
    ///
    /// # Errors
    /// If the directory cannot be written.
    pub fn new(directory: &Path) -> Result<Self, Error> {
        Self::with_settings(directory, "")
    }

    /// As [`Apt::new`], with further settings, as in `apt.conf`: other sources, another architecture.
    ///
    /// # Errors
    /// If the directory cannot be written.
    pub fn with_settings(directory: &Path, settings: &str) -> Result<Self, Error> {
        let apt = Self {
            directory: directory.to_owned(),
            config: directory.join("apt.conf"),
        };
        let create = |path: &Path| {
            std::fs::create_dir_all(path).doing(format_args!(
                "cannot create the directory {}",
                path.display()
            ))
        };
        create(&directory.join("lists/partial"))?;
        create(&directory.join("archives/partial"))?;
        let write = |path: &Path, text: &str| {
            std::fs::write(path, text).doing(format_args!("cannot write {}", path.display()))
        };
        // No package is installed here, so that what the host has does not matter.
        write(&directory.join("status"), "")?;
        write(&apt.config, &(apt.configuration()? + settings))?;
        Ok(apt)
    }

    /// Settings read after the host's own. The hooks cleared here are for the host's state (and
    /// need root); the last lines leave out indexes that are not needed.
    fn configuration(&self) -> Result<String, Error> {
        let directory = self
            .directory
            .to_str()
            .filter(|d| !d.contains(['"', '\n']))
            .ok_or_else(|| {
                Error::new(format!(
                    "apt cannot work in the directory {}",
                    self.directory.display()
                ))
                .hint("set XDG_CACHE_HOME to a directory with a plain name")
            })?;
        let mut text = String::new();
        for hook in [
            "APT::Update::Pre-Invoke",
            "APT::Update::Post-Invoke",
            "APT::Update::Post-Invoke-Success",
            "DPkg::Post-Invoke",
        ] {
            let _ = writeln!(text, "#clear {hook};");
        }
        for (key, value) in [
            ("Dir::State", ""),
            ("Dir::State::lists", "lists/"),
            ("Dir::State::status", "status"),
            ("Dir::State::extended_states", "extended_states"),
            ("Dir::Cache", ""),
            ("Dir::Cache::archives", "archives/"),
            ("Dir::Log", "log/"),
        ] {
            let _ = writeln!(text, "{key} \"{directory}/{value}\";");
        }
        // As root, apt would download as the user _apt, who cannot write below a home directory.
        text.push_str(
            "Dir::Cache::pkgcache \"\";\n\
             Dir::Cache::srcpkgcache \"\";\n\
             APT::Sandbox::User \"root\";\n\
             APT::Get::List-Cleanup \"false\";\n\
             Acquire::Retries \"2\";\n\
             Acquire::http::Timeout \"30\";\n\
             Acquire::https::Timeout \"30\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled \"false\";\n\
             Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
             Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled \"false\";\n\
             Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled \"false\";\n\
             Acquire::IndexTargets::deb::DEP-11-icons-hidpi::DefaultEnabled \"false\";\n\
             Acquire::IndexTargets::deb::CNF::DefaultEnabled \"false\";\n",
        );
        Ok(text)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(&self.config)
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .current_dir(self.directory.join("archives"));
        command
    }

    /// Fetches the archive's package lists. `progress` gets per cent.
    ///
    /// A source that does not answer is no failure by itself (a third party's may be broken for
    /// years); its message is returned, to be told if a package is then not found.
    ///
    /// # Errors
    /// If there is no apt.
    pub fn update(&self, progress: impl FnMut(f64)) -> Result<Option<String>, Error> {
        self.run(
            self.command("apt-get")
                .args(["-q", "update", "-o", "APT::Status-Fd=1"]),
            progress,
        )
    }

    /// Asks the lists about a package's newest version. `None`: the archive does not have it.
    ///
    /// # Errors
    /// If there is no apt.
    pub fn show(&self, package: &str) -> Result<Option<Package>, Error> {
        let output = self
            .command("apt-cache")
            .args(["show", "--no-all-versions", package])
            .output()
            .map_err(|e| no_apt(&e))?;
        Ok(parse_show(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Downloads a package and returns where it is. `progress` gets per cent.
    ///
    /// # Errors
    /// If the download fails or what came does not have the archive's checksum.
    pub fn download(&self, package: &Package, progress: impl FnMut(f64)) -> Result<PathBuf, Error> {
        let archives = self.directory.join("archives");
        let deb_of_package = || -> Option<PathBuf> {
            let prefix = format!("{}_", package.name);
            std::fs::read_dir(&archives)
                .ok()?
                .filter_map(Result::ok)
                .filter(|e| {
                    let name = e.file_name();
                    let name = name.to_string_lossy();
                    name.starts_with(&prefix) && name.ends_with(".deb")
                })
                .map(|e| e.path())
                .next()
        };
        // One from an interrupted run may be cut short, or of another version.
        while let Some(old) = deb_of_package() {
            std::fs::remove_file(&old)
                .doing(format_args!("cannot remove the old {}", old.display()))?;
        }
        let complaint = self.run(
            self.command("apt-get")
                .args(["-q", "download", "-o", "APT::Status-Fd=1"])
                .arg(format!("{}={}", package.name, package.version)),
            progress,
        )?;
        deb_of_package().ok_or_else(|| {
            Error::new(format!(
                "the download of {} failed: {}",
                package.name,
                complaint.as_deref().unwrap_or("apt does not say why")
            ))
            .hint(format!("check the network and try again, or {WITHOUT_APT}"))
        })
    }

    /// Runs apt, passes its progress on, and returns its first complaint.
    fn run(
        &self,
        command: &mut Command,
        mut progress: impl FnMut(f64),
    ) -> Result<Option<String>, Error> {
        log::debug!("running {command:?}");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| no_apt(&e))?;
        let stderr = child.stderr.take();
        let complaints = std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(mut stderr) = stderr {
                let mut bytes = Vec::new();
                let _ = stderr.by_ref().take(1 << 20).read_to_end(&mut bytes);
                let _ = std::io::copy(&mut stderr, &mut std::io::sink());
                text = String::from_utf8_lossy(&bytes).into_owned();
            }
            text
        });
        if let Some(stdout) = child.stdout.take() {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line);
                log::trace!("apt: {line}");
                if let Some(percent) = status_percent(&line) {
                    progress(percent);
                }
            }
        }
        let status = child.wait().doing("cannot wait for apt")?;
        let complaints = complaints.join().unwrap_or_default();
        for line in complaints.lines() {
            log::info!("apt: {line}");
        }
        Ok(first_complaint(&complaints)
            .or_else(|| (!status.success()).then(|| format!("apt ended with {status}"))))
    }
}

/// `dlstatus:INDEX:PERCENT:TEXT`, as apt writes to its status file descriptor.
fn status_percent(line: &str) -> Option<f64> {
    line.strip_prefix("dlstatus:")?
        .split(':')
        .nth(1)?
        .parse()
        .ok()
}

/// The first line that apt marks as an error, else the first warning.
fn first_complaint(text: &str) -> Option<String> {
    ["E: ", "W: "].iter().find_map(|mark| {
        text.lines()
            .find_map(|line| line.strip_prefix(mark))
            .map(|line| line.trim().to_owned())
    })
}

fn no_apt(error: &std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        Error::new(
            "the default guest comes from Debian's archive, and there is no apt here to fetch it",
        )
        .hint(WITHOUT_APT)
    } else {
        Error::new(format!("cannot start apt: {error}")).hint(WITHOUT_APT)
    }
}

/// Reads the first paragraph that `apt-cache show` prints.
fn parse_show(text: &str) -> Option<Package> {
    let field = |name: &str| {
        text.lines()
            .take_while(|line| !line.is_empty())
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    let depends = field("Depends")
        .unwrap_or_default()
        .split(',')
        .filter_map(|group| group.split('|').next())
        .filter_map(|alternative| alternative.split_whitespace().next())
        .map(|name| name.split(':').next().unwrap_or(name).to_owned())
        .collect();
    Some(Package {
        name: field("Package")?.to_owned(),
        version: field("Version")?.to_owned(),
        depends,
        size: field("Size")?.parse().ok()?,
        sha256: field("SHA256")?.to_ascii_lowercase(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_description() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
            Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), a:any | b\nSize: 1504\n\
            SHA256: 00BE21\n\nPackage: other\nVersion: 1\n";
        let package = parse_show(text).unwrap();
        assert_eq!(package.version, "6.1.192-2");
        assert_eq!(package.depends, ["linux-image-6.1.0-56-cloud-amd64", "a"]);
        assert_eq!((package.size, package.sha256.as_str()), (1504, "00be21"));
        assert_eq!(parse_show(""), None);
        assert_eq!(parse_show("N: Unable to locate package x\n"), None);
    }

    #[test]
    fn reads_progress_and_complaints() {
        assert_eq!(
            status_percent("dlstatus:1:42.5:Retrieving file 1 of 1"),
            Some(42.5)
        );
        assert_eq!(status_percent("Get:1 somewhere"), None);
        let text = "W: slow\nE: Failed to fetch x  404\nE: second\n";
        assert_eq!(
            first_complaint(text).as_deref(),
            Some("Failed to fetch x  404")
        );
        assert_eq!(first_complaint("W: slow\n").as_deref(), Some("slow"));
        assert_eq!(first_complaint("N: note\n"), None);
    }
}
