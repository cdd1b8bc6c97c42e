//! Which QEMU runs, and how: with TCG, with the machine's own KVM, or with KVM that AnyKVM serves.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::{BOOT, QEMU_BOOKWORM, QEMU_SID};
use crate::error::{Result, wrong};

const INSTALLED: &str = "/usr/bin/qemu-system-x86_64";

/// A QEMU that can be started.
#[derive(Debug, Clone)]
pub struct Emulator {
    /// What the table calls it.
    pub version: String,
    /// The program with the arguments that it always has.
    program: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    /// UEFI firmware: code and variables.
    pub ovmf: (PathBuf, PathBuf),
}

/// Who executes the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accel {
    /// QEMU itself.
    Tcg,
    /// The machine's own `/dev/kvm`.
    HostKvm,
    /// AnyKVM, with an engine of this name.
    AnyKvm(String),
}

impl Emulator {
    /// The QEMU called `name`: `debian`, the installed one or Debian 12's; `newest`, the one of
    /// Debian's sid; else the path of a program.
    ///
    /// # Errors
    /// If it is not to be had.
    pub fn find(name: &str) -> Result<Self> {
        let mut emulator = match name {
            "debian" if Path::new(INSTALLED).exists() => Self::program(INSTALLED.into())?,
            "debian" => Self::unpacked(&QEMU_BOOKWORM.unpacked()?)?,
            "newest" => Self::unpacked(&QEMU_SID.unpacked()?)?,
            path => Self::program(path.into())?,
        };
        let output = emulator.command(&Accel::Tcg).arg("-version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let Some(version) = text
            .split_once("version ")
            .and_then(|(_, rest)| rest.split_whitespace().next())
        else {
            return wrong(format!(
                "'{name}' does not say its version: {text}{}",
                String::from_utf8_lossy(&output.stderr)
            ));
        };
        emulator.version = version.to_owned();
        Ok(emulator)
    }

    fn program(path: PathBuf) -> Result<Self> {
        Ok(Self {
            version: String::new(),
            program: vec![path.into()],
            environment: Vec::new(),
            ovmf: ovmf(&BOOT.unpacked()?),
        })
    }

    /// A program of another suite runs with that suite's loader and libraries.
    fn unpacked(root: &Path) -> Result<Self> {
        let triplet = "x86_64-linux-gnu";
        let folders = [
            root.join("usr/lib").join(triplet),
            root.join("lib").join(triplet),
        ];
        let Some(loader) = folders
            .iter()
            .map(|folder| folder.join("ld-linux-x86-64.so.2"))
            .find(|path| path.exists())
        else {
            return wrong(format!("no dynamic loader below {}", root.display()));
        };
        let libraries = format!("{}:{}", folders[0].display(), folders[1].display());
        let mut program: Vec<OsString> = vec![
            loader.into(),
            "--library-path".into(),
            libraries.into(),
            root.join("usr/bin/qemu-system-x86_64").into(),
        ];
        for data in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            program.extend(["-L".into(), root.join(data).into()]);
        }
        let own = root.join("usr/share/OVMF").exists();
        Ok(Self {
            version: String::new(),
            program,
            environment: vec![("QEMU_MODULE_DIR", folders[0].join("qemu").into())],
            ovmf: match own {
                true => ovmf(root),
                false => ovmf(&BOOT.unpacked()?),
            },
        })
    }

    /// The start of its command line.
    pub fn command(&self, accel: &Accel) -> Command {
        let mut command;
        match accel {
            Accel::AnyKvm(engine) => {
                command = Command::new(e2e::program::anykvm());
                command
                    .args(["exec", "--engine", engine, "--"])
                    .args(&self.program);
            }
            Accel::Tcg | Accel::HostKvm => {
                command = Command::new(&self.program[0]);
                command.args(&self.program[1..]);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

fn ovmf(root: &Path) -> (PathBuf, PathBuf) {
    let folder = root.join("usr/share/OVMF");
    (
        folder.join("OVMF_CODE_4M.fd"),
        folder.join("OVMF_VARS_4M.fd"),
    )
}
