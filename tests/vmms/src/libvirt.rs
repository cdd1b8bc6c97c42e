//! libvirt, as an ordinary user (`qemu:///session`): `docs/libvirt.md` is what this does.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::archive::Doing;
use e2e::session::Session;
use nix::sys::signal::Signal;
use qemu_e2e::error::{Result, ensure, wrong};
use qemu_e2e::guest::Kernel;
use tempfile::TempDir;

use crate::Outcome;
use crate::terminal::on_terminal;

const LIBVIRTD: &str = "/usr/sbin/libvirtd";
const VIRSH: &str = "/usr/bin/virsh";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const PACKAGES: [&str; 4] = [
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "qemu-system-x86",
];
/// The ordinary user when we are root: nobody.
const NOBODY: u32 = 65534;
const DOMAIN: &str = "demo";
const BOOT: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(60);

/// How libvirt gets to AnyKVM.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// What the table calls it.
    pub name: &'static str,
    /// The domain's emulator is a script that starts QEMU under `anykvm exec`; else it is QEMU itself, which
    /// inherits the drop-in from libvirtd.
    wrapper: bool,
    cpu: &'static str,
}

/// Those that are tried.
pub const WAYS: [Way; 2] = [
    Way {
        name: "wrapper as emulator",
        wrapper: true,
        cpu: "host-passthrough",
    },
    Way {
        name: "stock emulator under a libvirtd under anykvm exec",
        wrapper: false,
        cpu: "host-model",
    },
];

/// Installs libvirt if that is possible and needed.
fn install() -> std::result::Result<(), Outcome> {
    if [LIBVIRTD, VIRSH, QEMU]
        .iter()
        .all(|path| Path::new(path).exists())
    {
        return Ok(());
    }
    let all = PACKAGES.join(" ");
    if !nix::unistd::geteuid().is_root() {
        return Err(Outcome::Skipped(format!(
            "libvirt is not here (on Debian: apt-get install --no-install-recommends {all})"
        )));
    }
    eprintln!("vmms_e2e: installing {all}");
    let apt = |arguments: &[&str]| {
        Command::new("apt-get")
            .args(["-qq", "-o", "DPkg::Lock::Timeout=120"])
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output()
    };
    let _ = apt(&["update"]);
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(PACKAGES);
    match apt(&arguments) {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(Outcome::Skipped(format!(
            "apt-get does not install {all}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
        Err(error) => Err(Outcome::Skipped(format!("cannot start apt-get: {error}"))),
    }
}

/// A user's libvirt. It ends with the value.
struct Libvirt {
    home: TempDir,
    anykvm: PathBuf,
    daemon: Option<Child>,
}

impl Libvirt {
    /// A home directory with what the user needs, which another user's folders might hide.
    fn new() -> Result<Self> {
        let home = tempfile::Builder::new()
            .prefix("anykvm-libvirt")
            .tempdir_in("/tmp")?;
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755))?;
        let built = e2e::program::anykvm();
        let folder = built.parent().unwrap_or(Path::new("."));
        let library = "libanykvm_preload.so";
        let anykvm = home.path().join("anykvm");
        fs::copy(built, &anykvm)?;
        fs::copy(folder.join(library), home.path().join(library)).doing(format_args!(
            "{library} is not built (cargo build --release -p home_preload)"
        ))?;
        let files = Kernel::Cloud.files()?;
        for (from, name) in [(files.kernel, "vmlinuz"), (files.initrd, "initrd")] {
            fs::copy(from, home.path().join(name))?;
        }
        fs::create_dir(home.path().join("run"))?;
        fs::set_permissions(home.path().join("run"), fs::Permissions::from_mode(0o700))?;
        if nix::unistd::geteuid().is_root() {
            let all = ["", "run", "vmlinuz", "initrd", "anykvm", library];
            for name in all {
                chown(home.path().join(name), Some(NOBODY), Some(NOBODY))?;
            }
        }
        Ok(Self {
            home,
            anykvm,
            daemon: None,
        })
    }

    /// Makes a command one of the user's.
    fn own(&self, command: &mut Command) {
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.home.path())
            .env("XDG_RUNTIME_DIR", self.home.path().join("run"))
            .env("LC_ALL", "C")
            .env("TERM", "dumb")
            .current_dir(self.home.path())
            .stdin(Stdio::null());
        if nix::unistd::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
    }

    fn start(&mut self, engine: &str) -> Result {
        let log = fs::File::create(self.home.path().join("libvirtd.log"))?;
        let mut command = Command::new(&self.anykvm);
        command.args(["exec", "--engine", engine, "--", LIBVIRTD]);
        self.own(&mut command);
        let child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        self.daemon = Some(child);
        let socket = self.home.path().join("run/libvirt/libvirt-sock");
        let start = Instant::now();
        while !socket.exists() {
            if start.elapsed() > ANSWER {
                return wrong(format!("libvirtd does not come up: {}", self.log()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.home.path().join("libvirtd.log")).unwrap_or_default()
    }

    fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(VIRSH);
        command
            .args(["-q", "-c", "qemu:///session"])
            .args(arguments);
        self.own(&mut command);
        let output = command.output()?;
        if !output.status.success() {
            return wrong(format!(
                "virsh {}: {} {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim(),
                self.log()
            ));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// `virsh` with these arguments, which connects to the domain's console.
    fn console(&self, arguments: &[&str]) -> Result<Session> {
        let mut words: Vec<OsString> = vec![VIRSH.into(), "-c".into(), "qemu:///session".into()];
        words.extend(arguments.iter().map(OsString::from));
        let mut command = on_terminal(&words);
        self.own(&mut command);
        let mut session = Session::start(&mut command)?;
        session.expect("Escape character", ANSWER)?;
        session.expect("\n", ANSWER)?;
        // virsh discards what was typed before it made its terminal raw.
        std::thread::sleep(Duration::from_millis(300));
        Ok(session)
    }

    fn state(&self, wanted: &str) -> Result {
        let state = self.virsh(&["domstate", DOMAIN])?;
        ensure(state == wanted, || {
            format!("the domain is '{state}' and not '{wanted}'")
        })
    }

    /// Writes the domain's description, and the wrapper where one is wanted; the emulator.
    fn describe(&self, way: Way, engine: &str) -> Result<String> {
        let home = self.home.path().display();
        let emulator = match way.wrapper {
            true => {
                let wrapper = self.home.path().join("qemu-anykvm");
                let script = format!(
                    "#!/bin/sh\nexec {home}/anykvm exec --engine {engine} -- {QEMU} \"$@\"\n"
                );
                fs::write(&wrapper, script)?;
                fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
                wrapper.display().to_string()
            }
            false => QEMU.to_owned(),
        };
        let text = format!(
            "<domain type='kvm'>
  <name>{DOMAIN}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{home}/vmlinuz</kernel>
    <initrd>{home}/initrd</initrd>
    <cmdline>console=ttyS0</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='{}'/>
  <devices>
    <emulator>{emulator}</emulator>
    <serial type='pty'/>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
",
            way.cpu
        );
        fs::write(self.home.path().join("domain.xml"), text)?;
        Ok(emulator)
    }

    /// That it is the drop-in which serves QEMU.
    fn served(&self) -> Result {
        let kvm = self.virsh(&["qemu-monitor-command", "--hmp", DOMAIN, "info kvm"])?;
        ensure(kvm.contains("enabled"), || kvm.clone())?;
        let pid = self
            .home
            .path()
            .join(format!("run/libvirt/qemu/run/{DOMAIN}.pid"));
        let pid = fs::read_to_string(pid)?;
        let maps = fs::read_to_string(format!("/proc/{}/maps", pid.trim()))?;
        ensure(maps.contains("libanykvm_preload"), || {
            "QEMU runs without the drop-in".to_owned()
        })
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        let Some(mut daemon) = self.daemon.take() else {
            return;
        };
        let _ = self.virsh(&["destroy", DOMAIN]);
        e2e::program::send(&daemon, Signal::SIGTERM);
        let start = Instant::now();
        while let Ok(None) = daemon.try_wait() {
            if start.elapsed() > Duration::from_secs(10) {
                let _ = daemon.kill();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Way {
    /// A domain's life; the steps that were taken.
    ///
    /// # Errors
    /// [`Outcome::Skipped`] where libvirt is not to be had; what goes wrong.
    pub fn run(&self, engine: &str) -> std::result::Result<Vec<&'static str>, Outcome> {
        install()?;
        Ok(self.life(engine)?)
    }

    fn life(&self, engine: &str) -> Result<Vec<&'static str>> {
        let mut libvirt = Libvirt::new()?;
        let emulator = libvirt.describe(*self, engine)?;
        libvirt.start(engine)?;
        let mut steps = Vec::new();

        let found = libvirt.virsh(&["capabilities"])?;
        ensure(found.contains("<domain type='kvm'/>"), || {
            format!("'virsh capabilities' has no domains of type kvm: {found}")
        })?;
        let arguments = ["--virttype", "kvm", "--machine", "q35", "--emulatorbin"];
        let found =
            libvirt.virsh(&[&["domcapabilities"], &arguments[..], &[&emulator]].concat())?;
        for part in ["<domain>kvm</domain>", "'host-passthrough' supported='yes'"] {
            ensure(found.contains(part), || {
                format!("'virsh domcapabilities' does not say {part}: {found}")
            })?;
        }
        steps.push("capabilities");

        libvirt.virsh(&["define", "domain.xml"])?;
        let mut guest = libvirt.console(&["start", "--console", DOMAIN])?;
        guest.expect("the shell is ready", BOOT)?;
        libvirt.served()?;
        let cpus = guest.command("grep -c ^processor /proc/cpuinfo; here=yes", ANSWER)?;
        ensure(cpus.ends_with('2'), || {
            format!("2 CPUs expected, the guest has {cpus}")
        })?;
        steps.push("start");

        libvirt.virsh(&["suspend", DOMAIN])?;
        libvirt.state("paused")?;
        guest.skip();
        guest.type_in("echo $((6 * 7))th\n")?;
        let early = guest.expect("42th", Duration::from_secs(1));
        ensure(early.is_err(), || "a paused guest answers".to_owned())?;
        steps.push("suspend");
        libvirt.virsh(&["resume", DOMAIN])?;
        libvirt.state("running")?;
        guest.expect("42th", ANSWER)?;
        steps.push("resume");

        libvirt.virsh(&["save", DOMAIN, "demo.save"])?;
        libvirt.state("shut off")?;
        steps.push("save");
        libvirt.virsh(&["restore", "demo.save"])?;
        let mut guest = libvirt.console(&["console", DOMAIN])?;
        let alive = "test $here = yes && seq 20000 | sha256sum >/dev/null";
        guest.command(alive, ANSWER)?;
        steps.push("restore");

        libvirt.virsh(&["managedsave", DOMAIN])?;
        libvirt.state("shut off")?;
        libvirt.virsh(&["start", DOMAIN])?;
        let mut guest = libvirt.console(&["console", DOMAIN])?;
        guest.command(alive, ANSWER)?;
        steps.push("managed save");

        libvirt.virsh(&["reset", DOMAIN])?;
        guest.expect("the shell is ready", BOOT)?;
        guest.command("test -z \"$here\"", ANSWER)?;
        steps.push("reset");

        libvirt.virsh(&["destroy", DOMAIN])?;
        libvirt.state("shut off")?;
        libvirt.virsh(&["undefine", DOMAIN])?;
        steps.push("destroy");
        Ok(steps)
    }
}
