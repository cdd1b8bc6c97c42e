//! `anykvm exec`: runs a program that expects `/dev/kvm` with AnyKVM in front of it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::check::{self, facts::Facts};
use crate::cli::{self, ExecArgs};
use crate::error::{Error, reason};

/// The library's file.
const LIBRARY: &str = "libanykvm_preload.so";
/// Exit codes of shells: the program exists but cannot be run; it does not exist.
const NOT_RUNNABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Becomes the program; returns only when that fails.
///
/// # Errors
/// The program does not exist, cannot be run, or cannot be served.
pub fn exec(args: &ExecArgs) -> Result<u8, Error> {
    let (program, arguments) = args
        .command
        .split_first()
        .ok_or_else(|| Error::usage("no program given"))?;
    let mut command = Command::new(program);
    command.args(arguments);
    let path = find(program)?;
    if !host_serves(args.engine)? {
        suits(&path)?;
        let mut preload = library()?.into_os_string();
        if preload.as_bytes().iter().any(|b| b" :".contains(b)) {
            let place = preload.display();
            return Err(
                Error::new(format!("the loader cannot find a library at '{place}'"))
                    .hint("put AnyKVM where no folder's name has a space or a colon"),
            );
        }
        if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|p| !p.is_empty()) {
            preload.push(":");
            preload.push(others);
        }
        let engine = match args.engine {
            cli::ExecEngine::Interp => "interp",
            _ => "jit",
        };
        command
            .env("LD_PRELOAD", preload)
            .env("ANYKVM_ENGINE", engine)
            .env("ANYKVM_LOG", log::max_level().as_str().to_lowercase());
    }
    let error = command.exec();
    Err(not_runnable(&path, &reason(&error)))
}

/// Whether the machine's own `/dev/kvm` is used, with nothing in front of it.
fn host_serves(engine: cli::ExecEngine) -> Result<bool, Error> {
    let wanted = match engine {
        cli::ExecEngine::Jit | cli::ExecEngine::Interp => return Ok(false),
        cli::ExecEngine::Auto => cli::Engine::Auto,
        cli::ExecEngine::Kvm => cli::Engine::Kvm,
    };
    let choice = check::choose(wanted, &Facts::gather())?;
    log::info!("{}", choice.reason);
    Ok(choice.engine == check::Engine::Kvm)
}

/// The library that goes in front of the program: beside this command, or where packages put it.
fn library() -> Result<PathBuf, Error> {
    if let Some(path) = std::env::var_os("ANYKVM_PRELOAD") {
        return Ok(path.into());
    }
    let me = std::env::current_exe()
        .map_err(|e| Error::new(format!("cannot find myself: {}", reason(&e))))?;
    let directory = me.parent().unwrap_or(Path::new("/"));
    let places = [
        directory.join(LIBRARY),
        // `cargo test` leaves programs one level below.
        directory.join("..").join(LIBRARY),
        directory.join("../lib/anykvm").join(LIBRARY),
    ];
    let found = places.iter().find(|p| p.exists());
    found.cloned().ok_or_else(|| {
        Error::new(format!("{LIBRARY} is not beside {}", me.display())).hint(
            "build it with 'cargo build --release -p home_preload', or name it in ANYKVM_PRELOAD",
        )
    })
}

/// The program's file, as execvp would find it.
fn find(program: &OsStr) -> Result<PathBuf, Error> {
    let missing = || {
        Error::new(format!("{}: no such program", program.display()))
            .with_code(NOT_FOUND)
            .hint("is it installed, and in PATH?")
    };
    if program.as_bytes().contains(&b'/') {
        let path = PathBuf::from(program);
        return if path.exists() {
            Ok(path)
        } else {
            Err(missing())
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(missing)
}

fn not_runnable(path: &Path, why: &str) -> Error {
    Error::new(format!("cannot run {}: {why}", path.display())).with_code(NOT_RUNNABLE)
}

/// What keeps a library from being loaded before a program.
fn suits(path: &Path) -> Result<(), Error> {
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;
    let mut file = std::fs::File::open(path).map_err(|e| not_runnable(path, &reason(&e)))?;
    let mode = file.metadata().map_or(0, |m| m.mode());
    const SET_ID: u32 = 0o6000;
    if mode & SET_ID != 0 {
        return Err(not_runnable(path, "it is set-user-ID")
            .hint("no library can be loaded before such a program; run a copy without that bit"));
    }
    let mut head = Vec::new();
    // Program headers follow the header at once in every file that linkers make.
    let _ = file.by_ref().take(64 << 10).read_to_end(&mut head);
    match Loader::of(&head) {
        Loader::Gnu | Loader::NotElf => Ok(()),
        // The loader itself, with a program as its argument: it loads what is asked for before it.
        Loader::Static if path.file_name().is_some_and(|name| name == LOADER) => Ok(()),
        Loader::Static => Err(not_runnable(path, "it is statically linked").hint(
            "AnyKVM reaches programs through the C library, which this one brings itself; \
             use a dynamically linked build of it",
        )),
        Loader::Other(name) => Err(not_runnable(path, &format!("its loader is {name}"))
            .hint("only programs for x86-64 with the GNU C library can be served")),
    }
}

/// The GNU C library's loader for x86-64.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Who loads a program.
#[derive(Debug, PartialEq, Eq)]
enum Loader {
    /// The GNU C library's, for x86-64.
    Gnu,
    /// Nobody.
    Static,
    /// Another one.
    Other(String),
    /// A script, or something else that the kernel may know.
    NotElf,
}

impl Loader {
    fn of(head: &[u8]) -> Self {
        const X86_64: u64 = 62;
        const PT_INTERP: u64 = 3;
        let number = |at: usize, len: usize| -> Option<u64> {
            let mut bytes = [0; 8];
            bytes[..len].copy_from_slice(head.get(at..at.checked_add(len)?)?);
            Some(u64::from_le_bytes(bytes))
        };
        if !head.starts_with(b"\x7fELF") {
            return Loader::NotElf;
        }
        if head.get(4) != Some(&2) || number(18, 2) != Some(X86_64) {
            return Loader::Other("another architecture's".into());
        }
        let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
        let (Some(table), Some(size), Some(count)) = (table, size, count) else {
            return Loader::NotElf;
        };
        for i in 0..count {
            let Some(at) = table
                .checked_add(i * size)
                .and_then(|at| usize::try_from(at).ok())
                .filter(|&at| at < head.len())
            else {
                return Loader::NotElf;
            };
            if number(at, 4) != Some(PT_INTERP) {
                continue;
            }
            let start = number(at + 8, 8).and_then(|n| usize::try_from(n).ok());
            let len = number(at + 32, 8).and_then(|n| usize::try_from(n).ok());
            let name = start
                .zip(len)
                .and_then(|(start, len)| head.get(start..start.checked_add(len)?));
            let name = String::from_utf8_lossy(name.unwrap_or_default());
            let name = name.trim_end_matches('\0');
            return if name
                .rsplit_once('/')
                .is_some_and(|(_, file)| file == LOADER)
            {
                Loader::Gnu
            } else {
                Loader::Other(name.to_owned())
            };
        }
        Loader::Static
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(machine: u8, interp: Option<&str>) -> Vec<u8> {
        let mut head = vec![0; 256];
        head[..5].copy_from_slice(b"\x7fELF\x02");
        head[18] = machine;
        head[32] = 64;
        head[54] = 56;
        head[56] = 1;
        head[64] = 1;
        if let Some(name) = interp {
            head[64] = 3;
            head[72] = 160;
            head[96] = name.len() as u8 + 1;
            head[160..160 + name.len()].copy_from_slice(name.as_bytes());
        }
        head
    }

    #[test]
    fn loaders_are_told_apart() {
        let gnu = elf(62, Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(Loader::of(&gnu), Loader::Gnu);
        assert_eq!(Loader::of(&elf(62, None)), Loader::Static);
        let musl = elf(62, Some("/lib/ld-musl-x86_64.so.1"));
        assert_eq!(
            Loader::of(&musl),
            Loader::Other("/lib/ld-musl-x86_64.so.1".into())
        );
        assert!(matches!(Loader::of(&elf(3, None)), Loader::Other(_)));
        assert_eq!(Loader::of(b"#!/bin/sh\n"), Loader::NotElf);
        for cut in 0..gnu.len() {
            // Whatever a file is cut down to, there is an answer.
            let _ = Loader::of(&gnu[..cut]);
        }
    }
}
