//! What users get wrong: one clear line, an exit code that says so, nothing lost.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use e2e::program::{Ended, anykvm, end, run};
use e2e::{kernels, small};

const LIMIT: Duration = Duration::from_secs(30);

fn boots(kernel: &Path) -> Ended {
    let mut run = run();
    run.args([
        "--memory",
        "256M",
        "--net",
        "none",
        "--append",
        "console=ttyS0 panic=-1",
        "--kernel",
    ])
    .arg(kernel);
    end(&mut run, Duration::from_secs(4))
}

#[test]
fn kernels_cut_short() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kernel");
    let whole = small::elf(&small::says_and_powers_off("whole"));
    for length in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..length]).unwrap();
        let ended = boots(&path);
        assert_eq!(ended.code, 125, "{length} bytes: {ended:?}");
        ended.one_clear_line(&format!("{length} bytes"));
    }
    fs::write(&path, &whole).unwrap();
    let ended = boots(&path);
    assert_eq!(
        (ended.code, ended.stdout.as_slice()),
        (0, b"whole".as_slice())
    );

    let files = match kernels::find("cloud").unwrap().files(false) {
        Ok(files) => files,
        Err(error) => return println!("SKIPPED: no real kernel to cut: {error}"),
    };
    let whole = fs::read(files.kernel).unwrap();
    // What the kernel says it needs (Linux boot protocol: setup_sects, syssize); behind that may be a
    // signature that nobody misses.
    let paragraphs = u32::from_le_bytes(whole[0x1f4..0x1f8].try_into().unwrap());
    let needed = (usize::from(whole[0x1f1]) + 1) * 512 + paragraphs as usize * 16;
    assert!(needed <= whole.len());
    for length in [
        1,
        2,
        511,
        512,
        513,
        600,
        1023,
        4096,
        0x4000,
        needed / 2,
        needed - 4096,
        needed - 1,
    ] {
        fs::write(&path, &whole[..length]).unwrap();
        let ended = boots(&path);
        assert_eq!(ended.code, 125, "{length} bytes: {ended:?}");
        ended.one_clear_line(&format!("{length} bytes"));
    }
}

#[test]
fn kernels_with_broken_headers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kernel");
    let whole = small::elf(&small::says_and_halts("x"));
    // Each byte of the headers: it runs, or is told.
    for at in (0..120).filter(|at| at % 3 != 1) {
        let mut broken = whole.clone();
        broken[at] ^= 0xff;
        fs::write(&path, &broken).unwrap();
        let mut run = run();
        run.args(["--memory", "64M", "--net", "none", "--kernel"])
            .arg(&path);
        let ended = end(&mut run, Duration::from_millis(700));
        match ended.code {
            125 => ended.one_clear_line(&format!("byte {at}")),
            143 => assert!(ended.stopped, "byte {at}: {ended:?}"),
            _ => panic!("byte {at}: {ended:?}"),
        }
    }
}

#[test]
fn formats_that_are_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    for (what, content) in [
        ("empty", Vec::new()),
        ("text", b"#!/bin/sh\necho hello\n".repeat(100)),
        ("zeros", vec![0; 1 << 20]),
        ("gzip", [&[0x1f, 0x8b, 8][..], &[7; 5000]].concat()),
        ("an initial file system", b"070701".repeat(1000)),
        ("this host's shell", fs::read("/bin/sh").unwrap()),
        ("a boot sector", [&[0x90; 510][..], &[0x55, 0xaa]].concat()),
    ] {
        fs::write(&path, content).unwrap();
        let ended = boots(&path);
        assert_eq!(ended.code, 125, "{what}: {ended:?}");
        ended.one_clear_line(what);
    }
    // Not a file at all, or one that has no end.
    for path in [
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/",
        "/nonexistent",
    ] {
        let ended = boots(Path::new(path));
        assert_eq!(ended.code, 125, "{path}: {ended:?}");
        ended.one_clear_line(path);
    }
}

#[test]
fn machines_that_cannot_be() {
    let guest = small::kernel(&small::says_and_powers_off("x"));
    for (options, code) in [
        (&["--cpus", "0"][..], 2),
        (&["--cpus", "10000"], 2),
        (&["--cpus", "-1"], 2),
        (&["--memory", "0"], 2),
        (&["--memory", "100000G"], 2),
        (&["--memory", "99999999999999999999G"], 2),
        (&["--memory", "-5"], 2),
        (&["--disk", "/nonexistent/disk"], 125),
        (&["--disk", ""], 2),
        (&["--initrd", "/nonexistent"], 125),
        (&["--publish", "x"], 2),
        (&["--publish", "99999:1"], 2),
        (&["--engine", "magic"], 2),
        (&["--nonsense"], 2),
    ] {
        let mut command = small::run(&guest);
        let ended = end(command.args(options), LIMIT);
        assert_eq!(ended.code, code, "{options:?}: {ended:?}");
        ended.one_clear_line(&format!("{options:?}"));
    }
    // As many CPUs as there may be.
    let mut command = small::run(&guest);
    let ended = end(command.args(["--cpus", "254"]), LIMIT);
    assert_eq!(
        (ended.code, ended.stdout.as_slice()),
        (0, b"x".as_slice()),
        "{ended:?}"
    );
    // A command line and an initrd too large for this machine.
    let long = "x".repeat(100_000);
    let mut command = small::run(&guest);
    let ended = end(command.args(["--append", &long]), LIMIT);
    assert_eq!(ended.code, 125, "{ended:?}");
    ended.one_clear_line("long command line");
    let large = tempfile::NamedTempFile::new().unwrap();
    large.as_file().set_len(64 << 20).unwrap();
    let mut command = small::run(&guest);
    let ended = end(command.arg("--initrd").arg(large.path()), LIMIT);
    assert_eq!(ended.code, 125, "{ended:?}");
    ended.one_clear_line("large initrd");
}

#[test]
fn limits_of_the_process() {
    let guest = small::kernel(&small::says_and_powers_off("x"));
    let program = anykvm().display();
    let path = guest.path().display();
    // Address space, descriptors and locked memory that are too little: told, not a crash.
    for limit in ["-v 100000", "-v 600000", "-n 4", "-n 12"] {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            &format!(
                "ulimit {limit}; exec {program} run --memory 512M --engine jit --kernel {path}"
            ),
        ]);
        let ended = end(command.stdin(Stdio::null()), LIMIT);
        match ended.code {
            0 => assert_eq!(ended.stdout, b"x", "{limit}"),
            2 | 125 => ended.one_clear_line(limit),
            _ => panic!("{limit}: {ended:?}"),
        }
    }
}

#[test]
fn streams_that_are_closed() {
    let guest = small::kernel(&small::says_and_powers_off("x"));
    let program = anykvm().display();
    let path = guest.path().display();
    for (closed, out) in [
        ("<&-", "x"),
        (">&-", ""),
        ("2>&-", "x"),
        ("<&- >&- 2>&-", ""),
        (">/dev/full", ""),
    ] {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            &format!("{program} run --memory 32M --net none --engine jit --kernel {path} {closed}"),
        ]);
        let ended = end(command.stdin(Stdio::null()), LIMIT);
        assert!(
            !ended.stopped && matches!(ended.code, 0 | 125),
            "{closed}: {ended:?}"
        );
        assert_eq!(String::from_utf8_lossy(&ended.stdout), out, "{closed}");
        if !ended.stderr.is_empty() {
            ended.one_clear_line(closed);
        }
    }
}
