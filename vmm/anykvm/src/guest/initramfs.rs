//! The default guest's file system: one part that is the same for every start and is cached, and a
//! small second part that says what this start is about. The kernel unpacks both, one after the
//! other. Neither is compressed: the guest would have to decompress it, on a CPU that may be
//! software, and copying a few MiB is faster.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use super::cpio::Archive;

const INIT: &[u8] = include_bytes!("init.sh");
const DHCP_SCRIPT: &[u8] = include_bytes!("udhcpc.script");
const PROFILE: &[u8] = include_bytes!("profile.sh");

/// The texts of AnyKVM's own that go into the cached part: it is made anew when one changes.
pub const OWN_TEXTS: [&[u8]; 3] = [INIT, DHCP_SCRIPT, PROFILE];

/// A kernel module by its file's name in the guest, e.g. `virtio.ko`.
pub struct Module {
    /// File name.
    pub file: String,
    /// The ELF file, not compressed.
    pub content: Vec<u8>,
}

/// The part that is the same for every start: busybox, the modules in load order, `/init`.
pub fn base(busybox: &[u8], modules: &[Module]) -> Vec<u8> {
    let mut archive = Archive::new();
    for directory in [
        "anykvm",
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "mnt",
        "proc",
        "run",
        "sys",
        "usr",
        "usr/bin",
        "usr/sbin",
        "var",
        "var/log",
    ] {
        archive.directory(directory, 0o755);
    }
    archive.directory("root", 0o700);
    archive.directory("tmp", 0o1777);
    archive.symlink("sbin", "bin");
    archive.symlink("var/run", "../run");
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.character_device("dev/null", 0o666, (1, 3));
    archive.file("bin/busybox", 0o755, busybox);
    for applet in applets(busybox) {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    let mut order = String::new();
    for module in modules {
        archive.file(
            &format!("lib/modules/{}", module.file),
            0o644,
            &module.content,
        );
        order.push_str(&module.file);
        order.push('\n');
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file(
        "etc/hosts",
        0o644,
        b"127.0.0.1 localhost anykvm\n::1 localhost\n",
    );
    archive.file("etc/profile", 0o644, PROFILE);
    archive.file("etc/udhcpc.script", 0o755, DHCP_SCRIPT);
    archive.file("init", 0o755, INIT);
    archive.finish()
}

/// The names of the programs in a busybox binary, from its table of zero-terminated names, sorted,
/// with `[` first. Empty if the table is not where it is known to be; `/init` then asks busybox.
fn applets(busybox: &[u8]) -> Vec<&str> {
    const START: &[u8] = b"\0[\0[[\0";
    let Some(start) = busybox.windows(START.len()).position(|w| w == START) else {
        return Vec::new();
    };
    let names: Vec<&str> = busybox[start + 1..]
        .split(|&byte| byte == 0)
        .take_while(|name| !name.is_empty())
        .take(1000)
        .map_while(|name| std::str::from_utf8(name).ok())
        .collect();
    let plausible = names.is_sorted()
        && names.contains(&"sh")
        && names.iter().all(|name| {
            name.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-.[".contains(&b))
        });
    if plausible {
        names
            .into_iter()
            .filter(|name| *name != "busybox")
            .collect()
    } else {
        Vec::new()
    }
}

/// Where a command's streams are in the guest: device paths, or `port:NAME` for a virtio port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Streams {
    /// Standard input.
    pub input: String,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub error: String,
}

/// What one start of the default guest is about.
#[derive(Debug, Clone, Default)]
pub struct Start {
    /// Device of the console, e.g. `/dev/ttyS0`.
    pub console: String,
    /// Where the guest reports `ready`, `exit N` and `failed TEXT`, as in [`Streams`].
    pub control: Option<String>,
    /// The block device of the scratch disk.
    pub scratch: Option<String>,
    /// Whether there is a network card to configure by DHCP.
    pub network: bool,
    /// The value of `TERM`.
    pub term: String,
    /// The terminal's rows and columns.
    pub size: Option<(u16, u16)>,
    /// The command and its arguments; empty: an interactive shell.
    pub command: Vec<OsString>,
    /// The command's streams; `None`: the console.
    pub streams: Option<Streams>,
}

impl Start {
    /// The part of the initial file system for this start.
    pub fn archive(&self) -> Vec<u8> {
        let mut archive = Archive::new();
        archive.directory("anykvm", 0o755);
        archive.file("anykvm/config", 0o644, &self.config());
        if !self.command.is_empty() {
            archive.file("anykvm/command", 0o644, &self.command_script());
        }
        archive.finish()
    }

    fn config(&self) -> Vec<u8> {
        let streams = self.streams.as_ref();
        let (rows, columns) = self
            .size
            .map_or_else(Default::default, |(r, c)| (r.to_string(), c.to_string()));
        let variables: [(&str, &str); 12] = [
            ("HOST_NAME", "anykvm"),
            ("TERM_NAME", &self.term),
            ("CONSOLE", &self.console),
            ("CONTROL", self.control.as_deref().unwrap_or_default()),
            ("SCRATCH", self.scratch.as_deref().unwrap_or_default()),
            ("NET", if self.network { "dhcp" } else { "" }),
            ("ROWS", &rows),
            ("COLS", &columns),
            ("COMMAND", if self.command.is_empty() { "" } else { "1" }),
            ("IN", streams.map_or("", |s| &s.input)),
            ("OUT", streams.map_or("", |s| &s.output)),
            ("ERR", streams.map_or("", |s| &s.error)),
        ];
        let mut text = Vec::new();
        for (name, value) in variables {
            text.extend_from_slice(name.as_bytes());
            text.push(b'=');
            quote(value.as_bytes(), &mut text);
            text.push(b'\n');
        }
        text
    }

    /// A script that becomes the command, with its arguments byte by byte.
    fn command_script(&self) -> Vec<u8> {
        let mut script = b"exec".to_vec();
        for argument in &self.command {
            script.push(b' ');
            quote(argument.as_bytes(), &mut script);
        }
        script.push(b'\n');
        script
    }
}

/// Quotes `text` for the shell: between single quotes every byte stands for itself.
fn quote(text: &[u8], out: &mut Vec<u8>) {
    out.push(b'\'');
    for &byte in text {
        if byte == b'\'' {
            out.extend_from_slice(b"'\\''");
        } else {
            out.push(byte);
        }
    }
    out.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;
    use std::process::Command;

    #[test]
    fn a_shell_gets_every_byte_of_the_arguments() {
        let all: Vec<u8> = (1..=255).collect();
        let arguments = [
            b"printf".to_vec(),
            b"%s|".to_vec(),
            all.clone(),
            Vec::new(),
            b"a b\n\n".to_vec(),
            b"$HOME `id` \\ \"'".to_vec(),
            b"-n".to_vec(),
        ];
        let start = Start {
            command: arguments.iter().cloned().map(OsString::from_vec).collect(),
            ..Start::default()
        };
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("command");
        std::fs::write(&script, start.command_script()).unwrap();
        let expected: Vec<u8> = arguments[2..]
            .iter()
            .flat_map(|a| a.iter().copied().chain([b'|']))
            .collect();
        let mut shells = vec![Command::new("sh")];
        match Command::new("busybox").arg("true").status() {
            Ok(_) => {
                shells.push(Command::new("busybox"));
                shells[1].arg("sh");
            }
            Err(_) => println!("skipped for the guest's own shell: busybox is not installed here"),
        }
        for shell in &mut shells {
            let output = shell.arg(&script).output().unwrap();
            assert_eq!(output.stdout, expected, "{shell:?}");
        }
    }

    #[test]
    fn the_config_is_read_back_by_a_shell() {
        let start = Start {
            console: "/dev/ttyS0".into(),
            term: "xterm'; reboot #".into(),
            network: true,
            size: Some((24, 80)),
            ..Start::default()
        };
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config");
        std::fs::write(&config, start.config()).unwrap();
        let output = Command::new("sh")
            .args([
                "-c",
                ". \"$1\"; echo \"$TERM_NAME/$CONSOLE/$NET/$ROWS/$OUT\"",
                "sh",
            ])
            .arg(&config)
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "xterm'; reboot #//dev/ttyS0/dhcp/24/\n"
        );
    }

    #[test]
    fn finds_busyboxes_names() {
        let binary = b"\x7fELF junk\0\0[\0[[\0ar\0busybox\0sh\0zcat\0\0more";
        assert_eq!(applets(binary), ["[", "[[", "ar", "sh", "zcat"]);
        assert!(applets(b"\0[\0[[\0sh\0ar\0\0").is_empty(), "not sorted");
        assert!(applets(b"nothing").is_empty());
    }

    #[test]
    fn the_scripts_have_no_syntax_errors() {
        for text in OWN_TEXTS {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), text).unwrap();
            let status = Command::new("sh")
                .arg("-n")
                .arg(file.path())
                .status()
                .unwrap();
            assert!(status.success());
        }
    }
}
