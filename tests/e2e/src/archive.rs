//! Debian's archive, at the addresses that the host's apt knows, through apt with a private state: suites and
//! architectures that the host has not configured, as an ordinary user.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anykvm::Error;
use anykvm::guest::apt::Apt;

/// Where Debian keeps the archive's keys; a host of another kind may have none.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Says what failed.
pub trait Doing<T> {
    /// Names what was being done.
    ///
    /// # Errors
    /// The error, with `what` before it.
    fn doing(self, what: impl std::fmt::Display) -> Result<T, Error>;
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing(self, what: impl std::fmt::Display) -> Result<T, Error> {
        self.map_err(|e| Error::new(format!("{what}: {e}")))
    }
}

/// `$XDG_CACHE_HOME/NAME`, made if it is not there.
///
/// # Errors
/// If there is no place for it.
pub fn cache(name: &str) -> Result<PathBuf, Error> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .ok_or_else(|| Error::new("there is no place for downloads: HOME is not set"))?;
    let directory = base.join(name);
    fs::create_dir_all(&directory).doing(format_args!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// apt with `suites` of Debian's archive instead of the host's sources, and its state in `state`.
///
/// # Errors
/// If the state cannot be written.
pub fn apt(state: &Path, suites: &[&str], architecture: &str) -> Result<Apt, Error> {
    fs::create_dir_all(state).doing("cannot write the cache")?;
    let mut list = String::new();
    let signed = match Path::new(KEYRING).exists() {
        true => format!("[signed-by={KEYRING}] "),
        false => String::new(),
    };
    let (archive, security) = mirrors();
    for suite in suites {
        let site = match suite.ends_with("-security") {
            true => &security,
            false => &archive,
        };
        let Some(site) = site else {
            continue;
        };
        list += &format!("deb {signed}{site} {suite} main\n");
    }
    let path = state.join("sources.list");
    fs::write(&path, list).doing("cannot write the cache")?;
    Apt::with_settings(
        state,
        &format!(
            "Dir::Etc::sourcelist \"{}\";\n\
             Dir::Etc::sourceparts \"/dev/null\";\n\
             Dir::Etc::preferences \"/dev/null\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\n\
             APT::Default-Release \"\";\n\
             APT::Architecture \"{architecture}\";\n\
             #clear APT::Architectures;\n\
             APT::Architectures {{ \"{architecture}\"; }};\n",
            path.display()
        ),
    )
}

/// The addresses of Debian's archive and of its security updates: those that the host's apt uses.
fn mirrors() -> (Option<String>, Option<String>) {
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE)",
            "Created-By: Packages",
        ])
        .output();
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let site = |security: bool| {
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(site, release)| {
                release.ends_with("-security") == security
                    && site.contains(if security { "security" } else { "debian" })
                    && !release.contains('/')
            })
            .map(|(site, _)| site.to_owned())
    };
    (
        site(false),
        // Where the host names no site for security updates, the archive's own kernels do.
        site(true),
    )
}
