//! Real programs, Debian's own binaries: each started several times with the same input, timed from
//! `fork` to the end of the process, its output reduced to a checksum.
//!
//! In a guest the programs are the initial file system's. On the host they are below `--root`, which
//! becomes the root directory in a user namespace; where the host forbids that, the loader below the
//! root starts them with its own libraries.

mod input;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::random::mix;
use crate::suite::{self, Class, ENOUGH, Options, Size};
use crate::sys::{self, Clock};

/// One program and how it is run, in a directory of its own.
struct Program {
    name: &'static str,
    class: Class,
    about: &'static str,
    /// Its file below the root, then arguments.
    command: &'static [&'static str],
    /// The file that it reads on standard input.
    input: Option<&'static str>,
    /// Writes its input files.
    prepare: fn(&Root, &Path, Size) -> std::io::Result<()>,
}

const CC1: &str = "/usr/lib/gcc/x86_64-linux-gnu/12/cc1";
const PYTHON: &str = "/usr/bin/python3.11";
const PERL: &str = "/usr/bin/perl";
const SQLITE: &str = "/usr/bin/sqlite3";
const ZSTD: &str = "/usr/bin/zstd";
const XZ: &str = "/usr/bin/xz";
const SORT: &str = "/usr/bin/sort";
const BUSYBOX: &str = "/bin/busybox";
const AWK: &str = "/usr/bin/mawk";
const OPENSSL: &str = "/usr/bin/openssl";

/// Programs without a loader.
const STATIC: [&str; 1] = [BUSYBOX];

/// 2^2203 - 1, a prime, in hexadecimal digits.
const PRIME: &str = match std::str::from_utf8(&PRIME_DIGITS) {
    Ok(digits) => digits,
    Err(_) => "",
};
const PRIME_DIGITS: [u8; 551] = {
    let mut digits = [b'F'; 551];
    digits[0] = b'7';
    digits
};

const PROGRAMS: [Program; 13] = [
    Program {
        name: "cc1",
        class: Class::Programs,
        about: "gcc 12 compiles a C file with -O2",
        // The compiler's own memory limits would depend on the machine's RAM.
        command: &[
            CC1,
            "-quiet",
            "-fpreprocessed",
            "-O2",
            "--param=ggc-min-expand=100",
            "--param=ggc-min-heapsize=131072",
            "source.i",
            "-o",
            "-",
        ],
        input: None,
        prepare: |_, at, size| fs::write(at.join("source.i"), input::c_source(size.of(45))),
    },
    Program {
        name: "python3",
        class: Class::Programs,
        about: "objects, dictionaries, strings, generators, big integers",
        command: &[PYTHON, "-S", "-E", "work.py"],
        input: None,
        prepare: |_, at, size| {
            fs::write(at.join("python.size"), size.of(250).to_string())?;
            fs::write(at.join("work.py"), include_str!("programs/work.py"))
        },
    },
    Program {
        name: "perl",
        class: Class::Programs,
        about: "regular expressions, hashes, sorting",
        command: &[PERL, "work.pl"],
        input: Some("text"),
        prepare: |_, at, size| {
            fs::write(at.join("text"), input::text(size.bytes(2_000_000)))?;
            fs::write(at.join("work.pl"), include_str!("programs/work.pl"))
        },
    },
    Program {
        name: "awk",
        class: Class::Programs,
        about: "mawk: sums by key, fields, substitution",
        command: &[AWK, "-f", "work.awk"],
        input: Some("text"),
        prepare: |_, at, size| {
            fs::write(at.join("text"), input::text(size.bytes(6_000_000)))?;
            fs::write(at.join("work.awk"), include_str!("programs/work.awk"))
        },
    },
    Program {
        name: "busybox_sh",
        class: Class::Programs,
        about: "busybox sh: arithmetic, functions, strings",
        command: &[BUSYBOX, "sh", "work.sh"],
        input: None,
        prepare: |_, at, size| {
            fs::write(at.join("sh.size"), format!("{}\n", size.of(3000)))?;
            fs::write(at.join("work.sh"), include_str!("programs/work.sh"))
        },
    },
    Program {
        name: "sqlite3",
        class: Class::Programs,
        about: "inserts, indexes, joins, aggregates",
        command: &[SQLITE, "-batch", "-init", "work.sql", ":memory:", ".exit"],
        input: None,
        prepare: |_, at, size| {
            let rows = size.of(90_000);
            fs::write(
                at.join("sql.size"),
                format!("INSERT INTO size VALUES ({rows});\n"),
            )?;
            fs::write(at.join("work.sql"), include_str!("programs/work.sql"))
        },
    },
    Program {
        name: "sort",
        class: Class::Programs,
        about: "sorts lines by two keys",
        command: &[SORT, "--parallel=1", "-S", "64M", "-k2,2", "-k1,1r", "text"],
        input: None,
        prepare: |_, at, size| fs::write(at.join("text"), input::text(size.bytes(20_000_000))),
    },
    Program {
        name: "zstd",
        class: Class::Programs,
        about: "compresses at level 6",
        command: &[ZSTD, "--single-thread", "-q", "-6", "-c", "data"],
        input: None,
        prepare: |_, at, size| fs::write(at.join("data"), input::binary(size.bytes(16_000_000))),
    },
    Program {
        name: "xz",
        class: Class::Programs,
        about: "compresses at level 3",
        command: &[XZ, "-T1", "-3", "-c", "data"],
        input: None,
        prepare: |_, at, size| fs::write(at.join("data"), input::binary(size.bytes(1_200_000))),
    },
    Program {
        name: "unxz",
        class: Class::Programs,
        about: "the way back",
        command: &[XZ, "-T1", "-d", "-c", "data.xz"],
        input: None,
        prepare: |root, at, size| {
            let data = at.join("data");
            fs::write(&data, input::binary(size.bytes(16_000_000)))?;
            let mut packer = root.command(&[XZ, "-T1", "-0", "-c", "data"], at);
            let out = packer.stdout(File::create(at.join("data.xz"))?).status()?;
            fs::remove_file(data)?;
            match out.success() {
                true => Ok(()),
                false => Err(std::io::Error::other(format!("xz: {out}"))),
            }
        },
    },
    Program {
        name: "sh_commands",
        class: Class::Processes,
        about: "busybox sh starts many short programs",
        command: &[BUSYBOX, "sh", "commands.sh"],
        input: None,
        prepare: |_, at, size| {
            fs::write(at.join("commands.size"), format!("{}\n", size.of(120)))?;
            fs::write(at.join("commands.sh"), include_str!("programs/commands.sh"))
        },
    },
    Program {
        name: "openssl_prime",
        class: Class::OpenSsl,
        about: "shows that 2^2203-1 is prime: modular powers",
        command: &[OPENSSL, "prime", "-hex", PRIME],
        input: None,
        prepare: |_, _, _| Ok(()),
    },
    Program {
        name: "openssl_hash",
        class: Class::OpenSsl,
        about: "SHA-512 of a file",
        command: &[OPENSSL, "dgst", "-sha512", "data"],
        input: None,
        prepare: |_, at, size| fs::write(at.join("data"), input::binary(size.bytes(150_000_000))),
    },
];

/// Where the programs are.
struct Root {
    /// What stands before the path of each; empty where the root directory is theirs.
    prefix: PathBuf,
}

impl Root {
    /// The programs below `directory`: as this process's own root directory if the host permits.
    /// Also the directory to work in.
    fn enter(directory: &Path) -> Result<(Self, PathBuf), String> {
        let prefix = match sys::enter_root(directory) {
            Ok(()) => PathBuf::new(),
            Err(why) => {
                eprintln!(
                    "bench_guest: no user namespace here ({why}): the programs run with their own \
                     loader and libraries instead of in a root directory of their own"
                );
                directory.to_owned()
            }
        };
        let work = match prefix.as_os_str().is_empty() {
            true => PathBuf::from("/tmp/work"),
            false => format!("/dev/shm/anykvm-programs-{}", std::process::id()).into(),
        };
        Ok((Self { prefix }, work))
    }

    /// A program with its arguments in the directory `at`, in an environment that is the same
    /// everywhere.
    fn command(&self, words: &[&str], at: &Path) -> Command {
        let below = |path: &str| {
            let mut full = self.prefix.clone().into_os_string();
            full.push(path);
            full
        };
        let mut command = if self.prefix.as_os_str().is_empty() || STATIC.contains(&words[0]) {
            Command::new(below(words[0]))
        } else {
            let mut libraries = below("/lib/x86_64-linux-gnu");
            libraries.push(":");
            libraries.push(below("/usr/lib/x86_64-linux-gnu"));
            let mut command = Command::new(below("/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"));
            command
                .arg("--library-path")
                .arg(libraries)
                .arg(below(words[0]));
            command
        };
        command
            .args(&words[1..])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", "/nonexistent")
            .env("LC_ALL", "C")
            .env("ROOT", &self.prefix)
            .env("PERL_HASH_SEED", "0")
            .env("PYTHONHASHSEED", "0")
            .env("PYTHONHOME", below("/usr"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("OPENSSL_CONF", "/dev/null")
            .current_dir(at)
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        command
    }
}

/// Prints what there is.
pub fn list() {
    for program in &PROGRAMS {
        println!(
            "{:<16} {:<10} {}",
            program.name,
            program.class.name(),
            program.about
        );
    }
}

/// Runs the programs that `options` names; `root` has them on a host.
///
/// # Errors
/// If a name is not known, or there is no place for the inputs.
pub fn run(options: &Options, root: Option<&Path>) -> Result<(), String> {
    for name in &options.only {
        if !PROGRAMS.iter().any(|p| p.is_named(name)) {
            return Err(format!("there is no program or class '{name}'"));
        }
    }
    let (root, work) = match root {
        Some(directory) => Root::enter(directory)?,
        None => (
            Root {
                prefix: PathBuf::new(),
            },
            PathBuf::from("/tmp/work"),
        ),
    };
    suite::clock_record("start");
    for program in &PROGRAMS {
        if options.only.is_empty() || options.only.iter().any(|name| program.is_named(name)) {
            let result = fs::create_dir_all(&work)
                .map_err(|e| format!("cannot make {}: {e}", work.display()))
                .and_then(|()| program.measure(&root, &work, options));
            if let Err(why) = result {
                suite::outcome((program.name, program.class.name()), "failed", &why);
            }
            // What stays behind is in memory and goes with the machine.
            let _ = fs::remove_dir_all(&work);
        }
    }
    suite::clock_record("end");
    Ok(())
}

impl Program {
    fn is_named(&self, name: &str) -> bool {
        self.name == name || self.class.name() == name
    }

    fn measure(&self, root: &Root, work: &Path, options: &Options) -> Result<(), String> {
        (self.prepare)(root, work, options.size()).map_err(|e| format!("its input: {e}"))?;
        let (first, checksum) = self.once(root, work)?;
        let mut times = Vec::new();
        let mut total = 0;
        for _ in 0..options.repetitions {
            let (time, sum) = self.once(root, work)?;
            if sum != checksum {
                return Err("two runs had different output".into());
            }
            times.push(time);
            total += time;
            if total > ENOUGH {
                break;
            }
        }
        suite::result(
            (self.name, self.class.name()),
            checksum,
            Some(first),
            &times,
        );
        Ok(())
    }

    /// One run: its time, and the checksum of its output.
    fn once(&self, root: &Root, work: &Path) -> Result<(u64, u64), String> {
        let out = work.join("output");
        let failed = |e: std::io::Error| format!("{}: {e}", self.command[0]);
        let mut command = root.command(self.command, work);
        command.stdout(File::create(&out).map_err(failed)?);
        let errors = work.join("errors");
        command.stderr(File::create(&errors).map_err(failed)?);
        if let Some(input) = self.input {
            command.stdin(File::open(work.join(input)).map_err(failed)?);
        }
        let start = sys::now(Clock::Monotonic);
        let status = command.status().map_err(failed)?;
        let time = sys::now(Clock::Monotonic).saturating_sub(start);
        if !status.success() {
            let text = fs::read(&errors).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            return Err(format!("{status}: {}", text.lines().next().unwrap_or("")));
        }
        Ok((time, checksum(&fs::read(&out).map_err(failed)?)))
    }
}

/// Of a program's output.
fn checksum(bytes: &[u8]) -> u64 {
    let sum = bytes.chunks(8).fold(0, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(sum, u64::from_le_bytes(word))
    });
    mix(sum, bytes.len() as u64)
}
