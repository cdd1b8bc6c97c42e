//! Whole runs with guests of a few instructions: the terminal on every way out, input, output, and
//! what becomes of crashes. They run on the engine of this build, or on `/dev/kvm` if it has none.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(60);

/// 32-bit code of a guest that says `text` on the first serial port and goes on with `rest`.
fn says(text: &str, rest: &[u8]) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code.extend(rest);
    code
}

/// Enters ACPI S5, and halts should that not be the end.
const POWER_OFF: [u8; 14] = [
    0x66, 0xba, 0x04, 0x06, // mov dx, 0x604
    0x66, 0xb8, 0x00, 0x34, // mov ax, 0x3400
    0x66, 0xef, // out dx, ax
    0xfa, 0xf4, 0xeb, 0xfd, // cli; hlt; jmp to hlt
];
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
/// An interrupt without an interrupt table: a triple fault, or, on an engine that emulates this
/// code and has no emulation of the interrupt, that engine's error.
const CRASH: [u8; 15] = [
    0xbc, 0x00, 0x00, 0x20, 0x00, // mov esp, 0x200000
    0x6a, 0x00, 0x6a, 0x00, // push 0; push 0
    0x0f, 0x01, 0x1c, 0x24, // lidt [esp]
    0xcd, 0x20, // int 0x20
];
/// Port 0xcf9 := 6.
const RESET: [u8; 11] = [
    0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xfa, 0xf4, 0xeb, 0xfd,
];

/// Sends back what it receives, until a `q`.
fn echoes() -> Vec<u8> {
    let mut code = vec![
        0x66, 0xba, 0xfd, 0x03, // again: mov dx, 0x3fd
        0xec, 0xa8, 0x01, // in al, dx; test al, 1
        0x74, 0xf7, // jz again
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, 0x3c, b'q', // in al, dx; cmp al, 'q'
        0x74, 0x03, // je end
        0xee, // out dx, al
        0xeb, 0xeb, // jmp again
    ];
    code.extend(POWER_OFF);
    says("ready", &code)
}

/// An ELF kernel with a PVH entry to `code`.
fn kernel(code: &[u8]) -> tempfile::NamedTempFile {
    const LOAD: u32 = 0x10_0000;
    let note_at = 52 + 2 * 32;
    let code_at = note_at + 20;
    let mut elf = b"\x7fELF\x01\x01\x01".to_vec();
    elf.resize(16, 0);
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    half(&mut elf, 2);
    half(&mut elf, 3);
    for value in [1, LOAD, 52, 0, 0] {
        word(&mut elf, value);
    }
    for value in [52, 32, 2, 0, 0, 0] {
        half(&mut elf, value);
    }
    let length = code.len() as u32;
    for value in [1, code_at, LOAD, LOAD, length, length + 4096, 7, 4] {
        word(&mut elf, value);
    }
    for value in [4, note_at, 0, 0, 20, 20, 4, 4] {
        word(&mut elf, value);
    }
    for value in [4, 4, 18] {
        word(&mut elf, value);
    }
    elf.extend(b"Xen\0");
    word(&mut elf, LOAD);
    elf.extend(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf).unwrap();
    file
}

fn anykvm(engine: &str, kernel: &tempfile::NamedTempFile) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anykvm"));
    command
        .args([
            "run", "--memory", "32M", "--net", "none", "--engine", engine, "--kernel",
        ])
        .arg(kernel.path());
    command
}

/// The engine to test with; `None`, with a word why, if there is none.
fn engine() -> Option<&'static str> {
    static ENGINE: OnceLock<Option<&str>> = OnceLock::new();
    let found = *ENGINE.get_or_init(|| {
        let guest = kernel(&POWER_OFF);
        ["jit", "kvm"].into_iter().find(|engine| {
            let output = anykvm(engine, &guest)
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let why = String::from_utf8_lossy(&output.stderr);
            let missing = why.contains("not available in this build") || why.contains("/dev/kvm");
            assert!(output.status.success() || missing, "{why}");
            output.status.success()
        })
    });
    if found.is_none() {
        println!("skipped: this build has no engine and this machine no usable /dev/kvm");
    }
    found
}

/// A run on a terminal of the test's own.
struct OnTerminal {
    child: Child,
    master: File,
    slave: OwnedFd,
    before: Termios,
    seen: Vec<u8>,
}

impl OnTerminal {
    fn start(mut command: Command) -> Self {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let master = File::from(pty.master);
        Self {
            child,
            master,
            slave: pty.slave,
            before,
            seen: Vec::new(),
        }
    }

    /// Reads the terminal until `text` is there.
    fn expect(&mut self, text: &str) {
        let start = Instant::now();
        while !self.seen.windows(text.len()).any(|w| w == text.as_bytes()) {
            let mut waiting = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut waiting, 1000u16).unwrap() > 0;
            if !ready && start.elapsed() > LIMIT {
                let _ = self.child.kill();
                panic!("no {text:?} in {}", self.seen.escape_ascii());
            }
            if !ready {
                continue;
            }
            let mut buffer = [0; 256];
            let length = self.master.read(&mut buffer).unwrap();
            self.seen.extend(&buffer[..length]);
        }
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave)
            .unwrap()
            .local_flags
            .contains(LocalFlags::ICANON)
    }

    /// Waits for the end; the terminal must be as it was.
    fn end(mut self) -> i32 {
        let code = wait(&mut self.child);
        assert_eq!(
            tcgetattr(&self.slave).unwrap(),
            self.before,
            "the terminal is not restored"
        );
        code
    }
}

fn wait(child: &mut Child) -> i32 {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().expect("ended by a signal");
        }
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            panic!("the run does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_terminal_is_the_guests_and_then_as_it_was() {
    let Some(engine) = engine() else { return };
    let guest = kernel(&echoes());
    let mut run = OnTerminal::start(anykvm(engine, &guest));
    run.expect("ready");
    assert!(run.is_raw());
    // Ctrl-C and the doubled Ctrl-A are the guest's.
    run.type_in(b"abc\x03\x01\x01d");
    run.expect("abc\x03\x01d");
    run.type_in(b"\x01h");
    run.expect("Ctrl-A x");
    run.type_in(b"q");
    assert_eq!(run.end(), 0);
}

#[test]
fn the_key_to_quit() {
    let Some(engine) = engine() else { return };
    let guest = kernel(&says("ready", &HALT));
    let mut run = OnTerminal::start(anykvm(engine, &guest));
    run.expect("ready");
    run.type_in(b"\x01x");
    assert_eq!(run.end(), 0);
}

#[test]
fn signals_restore_the_terminal() {
    let Some(engine) = engine() else { return };
    let guest = kernel(&says("ready", &HALT));
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        let mut run = OnTerminal::start(anykvm(engine, &guest));
        run.expect("ready");
        assert!(run.is_raw());
        kill(Pid::from_raw(run.child.id() as i32), signal).unwrap();
        assert_eq!(run.end(), 128 + signal as i32);
    }
}

#[test]
fn crashes_are_told_and_restore_the_terminal() {
    let Some(engine) = engine() else { return };
    let guest = kernel(&says("ready", &CRASH));
    let mut run = OnTerminal::start(anykvm(engine, &guest));
    run.expect("on vCPU 0 at rip");
    assert_eq!(run.end(), 125);

    let output = anykvm(engine, &guest)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(output.stdout, b"ready");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("anykvm: the guest "), "{text}");
}

#[test]
fn a_guest_that_resets_starts_again() {
    let Some(engine) = engine() else { return };
    let guest = kernel(&says("[start]", &RESET));
    let mut run = OnTerminal::start(anykvm(engine, &guest));
    run.expect("[start][start][start]");
    run.type_in(b"\x01x");
    assert_eq!(run.end(), 0);
}

#[test]
fn input_from_a_pipe_and_from_nowhere() {
    let Some(engine) = engine() else { return };
    let guest = kernel(&echoes());
    let mut child = anykvm(engine, &guest)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // On a pipe, Ctrl-A is nothing special.
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"\x01x piped q")
        .unwrap();
    assert_eq!(wait(&mut child), 0);
    let mut output = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut output)
        .unwrap();
    assert_eq!(output, "ready\x01x piped ");

    let guest = kernel(&says("hello", &POWER_OFF));
    let output = anykvm(engine, &guest)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), b"hello".as_slice())
    );
    let closed = format!(
        "{:?} run --memory 32M --net none --engine {engine} --kernel {:?} <&-",
        PathBuf::from(env!("CARGO_BIN_EXE_anykvm")),
        guest.path()
    );
    let output = Command::new("sh").args(["-c", &closed]).output().unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), b"hello".as_slice())
    );
}

#[test]
fn ends_when_nobody_reads_any_more() {
    let Some(engine) = engine() else { return };
    // Says "x" without end.
    let guest = kernel(&says("x", &[0xee, 0xeb, 0xfd]));
    let mut child = anykvm(engine, &guest)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"xxxxxxxxxx");
    wait(&mut child);
}

#[test]
fn kernels_that_are_none_are_told() {
    let Some(engine) = engine() else { return };
    let whole = std::fs::read(kernel(&echoes()).path()).unwrap();
    for content in [
        &b""[..],
        b"no kernel at all",
        &[0; 70_000],
        &whole[..20],
        &whole[..60],
        &whole[..140],
    ] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let output = anykvm(engine, &file).stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.starts_with("anykvm: ") && text.contains("; "),
            "{text}"
        );
    }
}
