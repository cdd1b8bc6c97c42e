//! `anykvm run -- COMMAND` in the default guest: exit codes, arguments, streams, disks, ports, and
//! the way without a network.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use e2e::program::{Ended, anykvm, end, run};
use e2e::session::Session;
use e2e::trial::noise;
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(180);

/// Whether there is a default guest. Says loudly if not.
fn guest() -> bool {
    static GUEST: OnceLock<bool> = OnceLock::new();
    *GUEST.get_or_init(|| {
        let mut command = Command::new(anykvm());
        let ended = end(command.arg("fetch"), Duration::from_secs(600));
        if ended.code != 0 {
            println!("SKIPPED: there is no default guest: {}", ended.stderr);
        }
        ended.code == 0
    })
}

fn in_guest(options: &[&str], command: &[&str]) -> Ended {
    let mut run = run();
    run.args(options).arg("--").args(command);
    end(&mut run, LIMIT)
}

#[test]
fn exit_codes_and_arguments() {
    if !guest() {
        return;
    }
    for code in [0, 1, 255] {
        let ended = in_guest(&[], &["sh", "-c", &format!("exit {code}")]);
        assert_eq!((ended.code, ended.stderr.as_str()), (code, ""));
    }
    let odd = [
        "two words",
        "",
        "'single' \"double\"",
        "a\nb\n",
        "$HOME `id` \\ *",
        "grüße 你好",
        "-n",
        " ",
    ];
    let expected: String = odd.iter().map(|argument| format!("[{argument}]")).collect();
    let ended = in_guest(&[], &[&["printf", "[%s]"], &odd[..]].concat());
    assert_eq!(
        (ended.code, String::from_utf8_lossy(&ended.stdout).as_ref()),
        (0, expected.as_str())
    );
    let ended = in_guest(&[], &["no-such-program"]);
    assert_eq!(ended.code, 127, "{ended:?}");
    assert!(ended.stderr.contains("not found"), "{ended:?}");
    // Killed in the guest: as shells tell it.
    let ended = in_guest(&[], &["sh", "-c", "kill -9 $$"]);
    assert_eq!(ended.code, 137, "{ended:?}");
}

#[test]
fn streams_are_apart_and_whole() {
    if !guest() {
        return;
    }
    let ended = in_guest(&[], &["sh", "-c", "echo out; echo err >&2; printf last"]);
    assert_eq!(
        (ended.code, ended.stdout.as_slice(), ended.stderr.as_str()),
        (0, b"out\nlast".as_slice(), "err\n")
    );
    // 10 MB in and out, every byte value in it.
    let content = noise(3, 10 << 20);
    let mut child = run()
        .args(["--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let sent = content.clone();
    let writer = std::thread::spawn(move || input.write_all(&sent));
    let mut got = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut got).unwrap();
    writer.join().unwrap().unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(got.len(), content.len());
    assert!(got == content, "10 MB came back changed");
}

#[test]
fn signals_end_the_run() {
    if !guest() {
        return;
    }
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let mut guest =
            Session::start(run().args(["--", "sh", "-c", "echo up; sleep 100"])).unwrap();
        guest.expect("up", LIMIT).unwrap();
        guest.signal(signal);
        assert_eq!(guest.end(Duration::from_secs(20)).unwrap(), Some(code));
    }
}

#[test]
fn what_was_synced_survives_a_kill() {
    if !guest() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw.img");
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(16 << 20).unwrap();
    let qcow2 = directory.path().join("image.qcow2");
    std::fs::write(&qcow2, empty_qcow2(16 << 20)).unwrap();
    for disk in [raw, qcow2] {
        let name = disk.to_str().unwrap();
        let mut guest = Session::start(run().args(["--disk", name]).args([
            "--",
            "sh",
            "-c",
            "mke2fs /dev/vda >/dev/null && mount /dev/vda /mnt && seq 100000 >/mnt/file && sync && \
             echo synced; sleep 100",
        ]))
        .unwrap();
        guest.expect("synced", LIMIT).unwrap();
        guest.signal(Signal::SIGKILL);
        assert_eq!(guest.end(Duration::from_secs(20)).unwrap(), None);
        let ended = in_guest(
            &["--disk", name],
            &["sh", "-c", "mount /dev/vda /mnt && cat /mnt/file"],
        );
        let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
        assert_eq!(ended.code, 0, "{name}: {}", ended.stderr);
        assert!(
            ended.stdout == expected.as_bytes(),
            "{name}: the file is another"
        );
    }
}

/// An empty qcow2 image, version 3 (QEMU's specification of the format): header, reference counts of
/// its four clusters, empty map.
fn empty_qcow2(size: u64) -> Vec<u8> {
    const CLUSTER: usize = 1 << 16;
    let mut image = vec![0; CLUSTER * 4];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &16u32.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + cluster * 2, &1u16.to_be_bytes());
    }
    image
}

#[test]
fn a_disk_belongs_to_one_run() {
    if !guest() {
        return;
    }
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let name = disk.path().to_str().unwrap();
    let mut first =
        Session::start(run().args(["--disk", name, "--", "sh", "-c", "echo up; sleep 100"]))
            .unwrap();
    first.expect("up", LIMIT).unwrap();
    let second = in_guest(&["--disk", name], &["true"]);
    assert_eq!(second.code, 125, "{second:?}");
    second.one_clear_line("disk in use");
    assert!(second.stderr.contains("in use"), "{second:?}");
    drop(first);
    assert_eq!(in_guest(&["--disk", name], &["true"]).code, 0);
}

#[test]
fn a_published_port_leads_to_the_guest() {
    if !guest() {
        return;
    }
    // A free port of the host's choice.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut guest = Session::start(run().args(["--publish", &format!("{port}:80")]).args([
        "--",
        "sh",
        "-c",
        "mkdir /www && seq 200000 >/www/file && httpd -p 80 -h /www && echo up; sleep 100",
    ]))
    .unwrap();
    guest.expect("up", LIMIT).unwrap();
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    for _ in 0..5 {
        let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
        connection
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        connection.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 200") || head.starts_with("HTTP/1.0 200"),
            "{head}"
        );
        assert!(
            body == expected,
            "{} bytes of {}",
            body.len(),
            expected.len()
        );
    }
    let second = in_guest(&["--publish", &format!("{port}:80")], &["true"]);
    assert_eq!(second.code, 125, "{second:?}");
    second.one_clear_line("port in use");
}

#[test]
fn many_processes_and_no_memory_are_the_guests_problem() {
    if !guest() {
        return;
    }
    // A fork bomb: the guest's limits and its shell's patience end it, the host does not notice.
    let ended = in_guest(
        &["--memory", "256M"],
        &[
            "sh",
            "-c",
            "ulimit -p 300; bomb() { bomb | bomb & }; (bomb) 2>/dev/null; sleep 3; echo alive",
        ],
    );
    assert!(
        ended.stdout == b"alive\n" || ended.code != 0,
        "{:?}",
        ended.code
    );
    // Memory: the guest's kernel kills what takes it all.
    let ended = in_guest(
        &["--memory", "128M"],
        &["sh", "-c", "x=x; while :; do x=$x$x$x$x; done; echo alive"],
    );
    assert!(ended.code != 0 && !ended.stopped, "{ended:?}");
}

#[test]
fn a_kernel_that_panics_is_told() {
    if !guest() {
        return;
    }
    let ended = in_guest(
        &[],
        &[
            "sh",
            "-c",
            "echo before; sync; echo c >/proc/sysrq-trigger; sleep 50",
        ],
    );
    assert_eq!((ended.code, ended.stopped), (125, false), "{ended:?}");
    assert_eq!(ended.stdout, b"before\n");
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(last.starts_with("anykvm: the guest "), "{ended:?}");
    // Before there is an init: the same.
    let ended = in_guest(&["--append", "rdinit=/nowhere init=/nowhere"], &["true"]);
    assert_eq!((ended.code, ended.stopped), (125, false), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(last.starts_with("anykvm: the guest"), "{ended:?}");
}

#[test]
fn the_second_run_needs_no_network() {
    if !guest() {
        return;
    }
    // An apt that cannot reach anything, and says so if it is asked at all.
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("apt.conf");
    std::fs::write(
        &config,
        "Acquire::http::Proxy \"http://127.0.0.1:9/\";\nAcquire::https::Proxy \"http://127.0.0.1:9/\";\n",
    )
    .unwrap();
    let mut command = run();
    command
        .env("APT_CONFIG", &config)
        .args(["--", "echo", "offline"]);
    let ended = end(&mut command, LIMIT);
    assert_eq!(
        (ended.code, ended.stdout.as_slice(), ended.stderr.as_str()),
        (0, b"offline\n".as_slice(), "")
    );
    // The first run without one says what is the matter, in its last line.
    let mut command = run();
    command
        .env("APT_CONFIG", &config)
        .env("XDG_CACHE_HOME", directory.path())
        .args(["--", "true"]);
    let ended = end(&mut command, LIMIT);
    assert_eq!(ended.code, 125, "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("anykvm: ") && last.contains("--kernel"),
        "{ended:?}"
    );
}

/// What is in `directory`.
fn leftovers(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

#[test]
fn nothing_is_left_behind() {
    if !guest() {
        return;
    }
    let temporary = tempfile::tempdir().unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut guest = Session::start(run().env("TMPDIR", temporary.path()).args([
            "--",
            "sh",
            "-c",
            "df /mnt | grep -q /dev/vda && echo up; sleep 100",
        ]))
        .unwrap();
        guest.expect("up", LIMIT).unwrap();
        let start = Instant::now();
        guest.signal(signal);
        guest.end(Duration::from_secs(20)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(10));
        assert!(
            leftovers(temporary.path()).is_empty(),
            "{signal}: {:?}",
            leftovers(temporary.path())
        );
    }
}
