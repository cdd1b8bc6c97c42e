//! What a kernel has to do to pass: boot to a shell, run commands there, use disk, network, clock
//! and all processors, complain about nothing, and power off.

use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant, SystemTime};

use sha2::{Digest, Sha256};

use crate::kernels::Files;
use crate::program;
use crate::session::{Error, Session};

/// From the start of the program to the shell, and longest answer. A loaded CI machine is slow.
const BOOT: Duration = Duration::from_secs(180);
const ANSWER: Duration = Duration::from_secs(60);
const DISK: u64 = 16 << 20;
const PIECE: usize = 1 << 20;

/// A passed trial.
#[derive(Debug, Clone)]
pub struct Passed {
    /// `uname -rm`.
    pub uname: String,
    /// From the start of the program to the shell.
    pub boot: Duration,
    /// All of it.
    pub whole: Duration,
}

/// Boots `files` with `cpus` processors and tries everything out.
///
/// # Errors
/// What does not work first.
pub fn trial(files: &Files, cpus: u32) -> Result<Passed, Error> {
    let start = Instant::now();
    let mut disk = tempfile::NamedTempFile::new()?;
    disk.write_all(&noise(1, DISK as usize))?;
    let mut guest = Session::start(
        program::run()
            .args([
                "--memory",
                "512M",
                "--append",
                "console=ttyS0 quiet panic=-1",
            ])
            .args(["--cpus", &cpus.to_string()])
            .arg("--kernel")
            .arg(&files.kernel)
            .arg("--initrd")
            .arg(&files.initrd)
            .arg("--disk")
            .arg(disk.path()),
    )?;
    let said = guest.expect("e2e: the shell is ready", BOOT)?;
    let boot = start.elapsed();
    if said.contains("cannot load") || said.contains("Kernel panic") {
        return Err(Error::Wrong(said));
    }
    // Takes the shell's greeting with it.
    guest.command("true", ANSWER)?;
    let uname = guest.command("uname -rm", ANSWER)?;
    let count = guest.command("grep -c '^processor' /proc/cpuinfo", ANSWER)?;
    wrong_unless(count == cpus.to_string(), || {
        format!("{cpus} CPUs were asked for, the guest sees {}", count)
    })?;
    clock(&mut guest)?;
    load(&mut guest, cpus)?;
    let written = use_disk(&mut guest, "vda", DISK)?;
    network(&mut guest)?;
    let complaints = guest.command(
        "dmesg | grep -E 'BUG|WARNING|Call Trace|Oops|stall|lockup|nstable|protection fault|segfault|traps:|I/O error|nobody cared|timed out|Firmware Bug|Spurious' || true",
        ANSWER,
    )?;
    wrong_unless(complaints.is_empty(), || {
        format!("the kernel complains: {}", complaints)
    })?;
    guest.type_in("poweroff -f\n")?;
    let code = guest.end(ANSWER)?;
    wrong_unless(code == Some(0), || {
        format!(
            "the exit code after poweroff is {code:?}: {}",
            guest.output()
        )
    })?;
    let mut piece = vec![0; PIECE];
    disk.seek(SeekFrom::Start(DISK / 2))?;
    disk.read_exact(&mut piece)?;
    wrong_unless(digest(&piece) == written, || {
        "what the guest wrote to the disk is not there".into()
    })?;
    Ok(Passed {
        uname,
        boot,
        whole: start.elapsed(),
    })
}

fn wrong_unless(right: bool, why: impl FnOnce() -> String) -> Result<(), Error> {
    match right {
        true => Ok(()),
        false => Err(Error::Wrong(why())),
    }
}

/// The guest's time of day is the host's, and a second is a second.
fn clock(guest: &mut Session) -> Result<(), Error> {
    let date = guest.command("date +%s", ANSWER)?;
    let host = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let date: u64 = date.parse().unwrap_or(0);
    wrong_unless(date.abs_diff(host) <= 2, || {
        format!("the guest's clock says {date}, the host's {host}")
    })?;
    let begin = Instant::now();
    let uptime = guest.command("cat /proc/uptime; sleep 2; cat /proc/uptime", ANSWER)?;
    let host = begin.elapsed().as_secs_f64();
    let mut times = uptime
        .lines()
        .filter_map(|line| line.split(' ').next()?.parse::<f64>().ok());
    let (from, to) = (times.next().unwrap_or(0.0), times.next().unwrap_or(0.0));
    let slept = to - from;
    // The host's time has the shell's in it, and other tests may run beside.
    wrong_unless(
        (1.95..host + 0.1).contains(&slept) && (1.95..4.5).contains(&host),
        || format!("'sleep 2' took {slept:.2} s by the guest's clock, {host:.2} s by the host's"),
    )
}

/// Processes and pipes on all processors, with a result that shows whether they computed right.
///
/// # Errors
/// If they did not.
pub fn load(guest: &mut Session, cpus: u32) -> Result<(), Error> {
    let jobs = cpus * 2;
    let sums = guest.command(
        &format!(
            "for job in $(seq {jobs}); do (for turn in 1 2 3; do \
             seq 20000 | gzip | gzip -d | sha256sum; done) & done; wait"
        ),
        BOOT,
    )?;
    let text: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    let right = digest(text.as_bytes());
    let found = sums.lines().filter(|line| line.starts_with(&right)).count();
    wrong_unless(found == jobs as usize * 3, || {
        format!("{found} of {} checksums are right: {sums}", jobs * 3)
    })
}

/// Reads [`noise`] of seed 1 and `size` bytes that the host put on the guest's disk `device`, and
/// writes a MiB at 8 MiB; returns the checksum of what was written.
///
/// # Errors
/// If something else is read.
pub fn use_disk(guest: &mut Session, device: &str, size: u64) -> Result<String, Error> {
    let sum = guest.command(
        &format!("dd if=/dev/{device} bs=1M 2>/dev/null | sha256sum"),
        ANSWER,
    )?;
    wrong_unless(sum.starts_with(&digest(&noise(1, size as usize))), || {
        format!("the disk reads wrong: {sum}")
    })?;
    let sum = guest.command(
        &format!(
            "dd if=/dev/urandom of=/tmp/noise bs=1M count=1 2>/dev/null && dd if=/tmp/noise \
             of=/dev/{device} bs=1M seek=8 conv=fsync 2>/dev/null && sha256sum </tmp/noise"
        ),
        ANSWER,
    )?;
    Ok(sum.split(' ').next().unwrap_or_default().to_owned())
}

/// DHCP, an echo from the gateway, and a transfer from a server on the host.
///
/// # Errors
/// What does not work first.
pub fn network(guest: &mut Session) -> Result<(), Error> {
    guest.command(
        "ip link set lo up; ip link set eth0 up; udhcpc -i eth0 -f -n -q -t 5 -T 2 -s /etc/udhcpc.script >/dev/null 2>&1",
        ANSWER,
    )?;
    guest.command("ping -c 2 -W 5 10.0.2.2 >/dev/null", ANSWER)?;
    let content = noise(2, 3 << 20);
    let sum = digest(&content);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || -> std::io::Result<()> {
        let (mut connection, _) = listener.accept()?;
        let _ = connection.read(&mut [0; 4096])?;
        let length = content.len();
        write!(
            connection,
            "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n"
        )?;
        connection.write_all(&content)
    });
    let got = guest.command(
        &format!("wget -q -O - http://10.0.2.2:{port}/ | sha256sum"),
        ANSWER,
    )?;
    wrong_unless(got.starts_with(&sum), || {
        format!("the transfer came out as {got}")
    })
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The SHA-256 of `bytes` as the guest's sha256sum prints it.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
