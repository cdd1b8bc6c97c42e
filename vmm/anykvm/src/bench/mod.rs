//! `anykvm bench`: a first look at how fast guests are here. This very program runs small workloads on
//! the host, as the first process of a guest of its own, and of QEMU's TCG where there is one.
//!
//! The guest is the default guest's kernel with an initial file system that holds this program as
//! `/init` and the libraries that it is linked with.

pub mod workloads;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cli::{BenchArgs, Engine};
use crate::error::{Error, IoContext};
use crate::guest::Cache;
use crate::guest::cpio::Archive;
use crate::progress::Progress;

/// A machine that says nothing for so long is stuck.
const SILENCE: Duration = Duration::from_secs(60);
/// What follows `--` is for the first process; what has a `=` and is not the kernel's is in its environment.
const COMMAND_LINE: &str = "console=ttyS0 quiet mitigations=off reboot=t panic=-1 LD_LIBRARY_PATH=/libraries -- bench --guest";
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
const QEMU: &str = "qemu-system-x86_64";

/// What one machine did.
#[derive(Default)]
struct Figures {
    /// From the start of the process to the first line of the guest.
    boot: f64,
    /// By workload, in milliseconds.
    times: BTreeMap<String, Vec<f64>>,
    checksums: BTreeMap<String, String>,
}

/// Runs the workloads on all machines and prints the table; the exit code.
///
/// # Errors
/// If the guest cannot be made or does not run.
pub fn run(args: &BenchArgs) -> Result<u8, Error> {
    let progress = Progress::new();
    let guest = Cache::of_user()?.guest(&progress)?;
    let work = tempfile::tempdir().doing("cannot make a temporary directory")?;
    let own = std::env::current_exe().doing("cannot find this program")?;
    let (kernel, initrd) = (work.path().join("vmlinuz"), work.path().join("initrd"));
    std::fs::write(&kernel, &guest.kernel).doing("cannot write a temporary file")?;
    std::fs::write(&initrd, archive(&own)?).doing("cannot write a temporary file")?;

    let mut native = Command::new(&own);
    native.args(["bench", "--guest"]);
    let mut machines = vec![
        ("native", native),
        ("anykvm", anykvm(&own, args, &kernel, &initrd)),
    ];
    let qemu = has_qemu();
    if qemu {
        machines.push(("qemu tcg", tcg(&kernel, &initrd)));
    }
    let mut all = Vec::new();
    for (name, command) in machines {
        progress.step(&format!("Running the workloads: {name}"));
        match measure(command) {
            Ok(figures) => all.push((name, figures)),
            // What QEMU cannot do is told, and no failure.
            Err(why) if name == "qemu tcg" => eprintln!("anykvm: QEMU is left out: {why}"),
            Err(why) => return Err(Error::new(format!("{name}: {why}"))),
        }
    }
    progress.done();
    let wrong = differing(&all);
    let text = match args.json {
        true => json_text(&all, &wrong),
        false => {
            table(&all)
                + if qemu {
                    ""
                } else {
                    "QEMU is not installed here, so it is not compared with: any QEMU does (Debian: qemu-system-x86)\n"
                }
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            return Err(Error::new(format!("cannot write to standard output: {e}")));
        }
        _ => {}
    }
    match wrong.as_slice() {
        [] => Ok(0),
        wrong => Err(
            Error::new(format!("different results: {}", wrong.join(", ")))
                .hint("this is a mistake in AnyKVM or QEMU, please report it")
                .with_code(1),
        ),
    }
}

/// The guest's part: the first process of a machine runs the workloads and switches it off.
pub fn guest() {
    workloads::run();
    if std::process::id() == 1 {
        // If the machine has no switch, process 1 ends and the kernel's panic ends the machine.
        let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    }
}

fn anykvm(own: &Path, args: &BenchArgs, kernel: &Path, initrd: &Path) -> Command {
    let engine = match args.engine {
        Engine::Auto => "auto",
        Engine::Jit => "jit",
        Engine::Kvm => "kvm",
    };
    let mut command = Command::new(own);
    command
        .args(["run", "--net", "none", "--memory", "512M", "--engine"])
        .arg(engine)
        .arg("--kernel")
        .arg(kernel)
        .arg("--initrd")
        .arg(initrd)
        .args(["--append", COMMAND_LINE]);
    command
}

fn tcg(kernel: &Path, initrd: &Path) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args(["-accel", "tcg", "-cpu", "max", "-M", "q35", "-m", "512M"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args([
            "-serial",
            "stdio",
            "-monitor",
            "none",
            "-no-reboot",
            "-kernel",
        ])
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", COMMAND_LINE]);
    command
}

fn has_qemu() -> bool {
    let output = Command::new(QEMU)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    output.is_ok_and(|output| output.status.success())
}

/// The initial file system: this program, and what it is linked with.
fn archive(own: &Path) -> Result<Vec<u8>, Error> {
    let read =
        |path: &Path| std::fs::read(path).doing(format_args!("cannot read {}", path.display()));
    let mut archive = Archive::new();
    for directory in ["dev", "lib64", "libraries"] {
        archive.directory(directory, 0o755);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, &read(own)?);
    // A static program has neither.
    let output = Command::new(LOADER).arg("--list").arg(own).output();
    if let Ok(output) = output
        && output.status.success()
    {
        archive.file(
            LOADER.trim_start_matches('/'),
            0o755,
            &read(Path::new(LOADER))?,
        );
        for (name, path) in libraries(&String::from_utf8_lossy(&output.stdout)) {
            archive.file(&format!("libraries/{name}"), 0o755, &read(&path)?);
        }
    }
    Ok(archive.finish())
}

/// Names and files of what the loader lists: `NAME => FILE (ADDRESS)`.
fn libraries(list: &str) -> Vec<(&str, PathBuf)> {
    list.lines()
        .filter_map(|line| {
            let (name, rest) = line.trim().split_once(" => ")?;
            let (path, _) = rest.rsplit_once(" (")?;
            // The loader itself is listed with its whole path.
            (!name.contains('/')).then(|| (name, PathBuf::from(path)))
        })
        .collect()
}

/// A machine that is killed when it is no longer needed.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn measure(mut command: Command) -> Result<Figures, String> {
    let start = Instant::now();
    let mut running = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map(Running)
        .map_err(|e| format!("cannot start: {}", crate::error::reason(&e)))?;
    let lines = lines(&mut running.0);
    let mut figures = Figures::default();
    let mut last = String::from("it printed nothing");
    loop {
        let Ok(line) = lines.recv_timeout(SILENCE) else {
            return Err(format!("the workloads did not come to an end: {last}"));
        };
        // A message of the kernel or a terminal's control sequence may be in front.
        let Some((_, record)) = line.split_once("@bench ") else {
            if !line.trim().is_empty() {
                last = line;
            }
            continue;
        };
        match record.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["start"] => figures.boot = start.elapsed().as_secs_f64() * 1e3,
            ["end"] => return Ok(figures),
            [name, time, checksum] => {
                let time = time.parse::<f64>().unwrap_or(f64::NAN) / 1e6;
                figures
                    .times
                    .entry((*name).to_owned())
                    .or_default()
                    .push(time);
                figures
                    .checksums
                    .insert((*name).to_owned(), (*checksum).to_owned());
            }
            _ => {}
        }
    }
}

/// The lines of both streams, as they come.
fn lines(child: &mut Child) -> Receiver<String> {
    let (sender, receiver) = channel();
    let streams: [Option<Box<dyn std::io::Read + Send>>; 2] = [
        child.stdout.take().map(|stream| Box::new(stream) as _),
        child.stderr.take().map(|stream| Box::new(stream) as _),
    ];
    for stream in streams.into_iter().flatten() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    return;
                }
            }
        });
    }
    receiver
}

/// The workloads whose result is not the host's.
fn differing(all: &[(&str, Figures)]) -> Vec<String> {
    let Some((_, first)) = all.first() else {
        return Vec::new();
    };
    let mut wrong = Vec::new();
    for (name, figures) in all {
        for (workload, checksum) in &first.checksums {
            if figures.checksums.get(workload) != Some(checksum) {
                wrong.push(format!("{workload} in {name}"));
            }
        }
    }
    wrong
}

impl Figures {
    /// The median time of a workload.
    fn median(&self, workload: &str) -> Option<f64> {
        let mut times = self.times.get(workload)?.clone();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied()
    }
}

fn table(all: &[(&str, Figures)]) -> String {
    let mut text = format!("{:<10}", "");
    for (name, _) in all {
        let _ = write!(text, "{name:>12}");
        if *name != "native" {
            let _ = write!(text, "{:>10}", "x native");
        }
    }
    text.push('\n');
    let mut logarithms = vec![0.0; all.len()];
    for (workload, about, _) in workloads::ALL {
        let _ = write!(text, "{workload:<10}");
        let native = all
            .first()
            .and_then(|(_, figures)| figures.median(workload));
        for (column, (name, figures)) in all.iter().enumerate() {
            let (Some(time), Some(native)) = (figures.median(workload), native) else {
                continue;
            };
            let _ = write!(text, "{time:>9.1} ms");
            if *name != "native" {
                let _ = write!(text, "{:>9.2}x", time / native);
            }
            logarithms[column] += (time / native).ln();
        }
        let _ = writeln!(text, "  {about}");
    }
    let _ = write!(text, "{:<10}{:>12}", "mean", "");
    for sum in logarithms.iter().skip(1) {
        let mean = (sum / workloads::ALL.len() as f64).exp();
        let _ = write!(text, "{:>12}{mean:>9.2}x", "");
    }
    let _ = write!(text, "\n{:<10}{:>12}", "boot", "");
    for (_, figures) in all.iter().skip(1) {
        let _ = write!(text, "{:>9.0} ms{:>10}", figures.boot, "");
    }
    text + "  from the start to the guest's first process\n"
}

fn json_text(all: &[(&str, Figures)], wrong: &[String]) -> String {
    let machines: serde_json::Map<String, serde_json::Value> = all
        .iter()
        .map(|(name, figures)| {
            let medians: BTreeMap<&str, Option<f64>> = workloads::ALL
                .iter()
                .map(|(workload, ..)| (*workload, figures.median(workload)))
                .collect();
            let value = json!({ "boot_ms": figures.boot, "ms": figures.times, "median_ms": medians, "checksums": figures.checksums });
            ((*name).to_owned(), value)
        })
        .collect();
    format!(
        "{:#}\n",
        json!({ "machines": machines, "different": wrong })
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(checksum: &str) -> Figures {
        Figures {
            boot: 900.0,
            times: workloads::ALL
                .iter()
                .map(|w| (w.0.to_owned(), vec![3.0, 1.0, 2.0]))
                .collect(),
            checksums: BTreeMap::from([("integer".to_owned(), checksum.to_owned())]),
        }
    }

    #[test]
    fn reads_the_loaders_list() {
        let list = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\t/lib64/ld.so => /lib/ld.so (0x3)\n";
        assert_eq!(
            libraries(list),
            [("libc.so.6", PathBuf::from("/lib/x/libc.so.6"))]
        );
    }

    #[test]
    fn a_wrong_result_is_named() {
        let all = [("native", figures("1")), ("anykvm", figures("2"))];
        assert_eq!(differing(&all), ["integer in anykvm"]);
        assert!(table(&all).contains("1.00x"));
        assert!(json_text(&all, &[]).contains("\"integer\": 2.0"));
    }
}
