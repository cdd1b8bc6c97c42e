//! `anykvm run`: from what the user asked for to a running machine, and from its end to an exit
//! code.

mod control;
mod input;
mod net;
mod output;
mod plan;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm::boot::{Blob, Payload};
use vmm::channel::ByteChannel;
use vmm::machine::{CONTROL_PORT, Machine, MachineConfig, MachineHandle, Outcome};
use vmm::virtio::console::ConsolePort;
use vmm::virtio::disk::{DiskConfig, DiskFormat};

use crate::check::{self, facts::Facts};
use crate::cli::{Console, RunArgs};
use crate::error::{EXIT_FAILED, Error, IoContext, one_line_of, reason};
use crate::guest::initramfs::{Start, Streams};
use crate::guest::{Cache, Guest};
use crate::progress::Progress;
use crate::scratch;
use crate::terminal::{self, Input, Key, RawMode};
use control::Reports;
use input::{AtEnd, Gate};
use net::Network;
use output::Output;

/// How long a machine that was told to stop may take before the process ends without it.
const STOP_TIME: Duration = Duration::from_secs(3);
/// The exit code if the user quits a COMMAND by key, as if by Ctrl-C.
const EXIT_QUIT: u8 = 130;

/// Runs a virtual machine until it ends; returns the process's exit code.
///
/// # Errors
/// If the machine cannot be started, or its end is a failure.
pub fn run(args: &RunArgs) -> Result<u8, Error> {
    let end = Arc::new(End::default());
    let on_signal = Arc::clone(&end);
    terminal::on_signals(move |signal| on_signal.by_signal(signal))?;

    let plan = plan::check(args, &Facts::gather())?;
    log::info!("engine: {:?}: {}", plan.engine.engine, plan.engine.reason);
    let guest = match args.kernel {
        Some(_) => None,
        None => Some(Cache::of_user()?.guest(&Progress::new())?),
    };
    let network = net::start(args)?;
    Session::start(args, plan, guest, network, &end)?.run(&end)
}

/// Ends the run from other threads: signals, keys, a reader that left.
#[derive(Default)]
struct End {
    machine: Mutex<Option<MachineHandle>>,
    /// The end was asked for: a machine that a reset builds must not run either.
    asked: AtomicBool,
    /// Signal that asked for the end; 0: none.
    signal: AtomicI32,
}

impl End {
    fn machine(&self) -> MutexGuard<'_, Option<MachineHandle>> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine that is to be stopped from now on. Stops it at once if that was asked before.
    fn controls(&self, handle: MachineHandle) {
        let mut machine = self.machine();
        if self.asked.load(Ordering::SeqCst) {
            handle.stop();
        }
        *machine = Some(handle);
    }

    fn by_signal(&self, signal: i32) {
        let code = 128 + signal;
        self.signal.store(signal, Ordering::SeqCst);
        self.asked.store(true, Ordering::SeqCst);
        match &*self.machine() {
            // Nothing is running: nothing can be lost.
            None => process::exit(code),
            Some(handle) => handle.stop(),
        }
        let _ = std::thread::Builder::new()
            .name("stop".into())
            .spawn(move || {
                std::thread::sleep(STOP_TIME);
                terminal::restore();
                process::exit(code);
            });
    }

    fn by_user(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Some(handle) = &*self.machine() {
            handle.stop();
        }
        let _ = std::thread::Builder::new().name("stop".into()).spawn(|| {
            std::thread::sleep(STOP_TIME);
            terminal::restore();
            process::exit(i32::from(EXIT_QUIT));
        });
    }
}

/// Names of the virtio ports that carry a command's streams.
const STDIN_PORT: &str = "org.anykvm.stdin";
const STDOUT_PORT: &str = "org.anykvm.stdout";
const STDERR_PORT: &str = "org.anykvm.stderr";

/// Who talks to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wiring {
    /// The guest's console is on this process's standard input and output. So it is for a shell,
    /// for the user's own kernel, and for a command that was started from a terminal.
    Console,
    /// A command's three streams are this process's, each by a port of its own.
    Streams,
}

/// All that a run needs beside the machine, which a reset builds again.
struct Session {
    config: MachineConfig,
    outputs: Vec<Output>,
    /// The guest's reports, if it is the default guest.
    reports: Option<JoinHandle<Reports>>,
    gate: Arc<Gate>,
    command: bool,
    raw_mode: Option<RawMode>,
    /// What the machine uses by way of the configuration.
    _scratch: Option<File>,
    _network: Option<Network>,
}

impl Session {
    fn start(
        args: &RunArgs,
        plan: plan::Plan,
        guest: Option<Guest>,
        network: Option<Network>,
        end: &Arc<End>,
    ) -> Result<Self, Error> {
        let default_guest = guest.is_some();
        let command = !args.command.is_empty();
        let input = Input::of_process();
        let on_terminal = input == Input::Terminal && io::stdout().is_terminal();
        let wiring = match command && !on_terminal {
            true => Wiring::Streams,
            false => Wiring::Console,
        };

        let engine = match plan.engine.engine {
            check::Engine::Jit => vmm::hypervisor::Engine::Jit,
            check::Engine::Kvm => vmm::hypervisor::Engine::Kvm,
        };
        let mut disks = plan.disks;
        let mut scratch = None;
        if default_guest && disks.is_empty() {
            let file = scratch::create()?;
            disks.push(DiskConfig {
                format: DiskFormat::Raw,
                serial: "scratch".into(),
                // The file has no name of its own.
                ..DiskConfig::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
            });
            scratch = Some(file);
        }
        let payload = match guest {
            None => Payload {
                // Without --kernel there is a default guest.
                kernel: Blob::Path(args.kernel.clone().unwrap_or_default()),
                initrd: args.initrd.iter().cloned().map(Blob::Path).collect(),
                cmdline: args.append.clone(),
            },
            Some(guest) => {
                let start = Start {
                    console: console_device(args.console).to_owned(),
                    control: Some(format!("port:{CONTROL_PORT}")),
                    scratch: scratch.is_some().then(|| "/dev/vda".to_owned()),
                    network: network.is_some(),
                    term: term(),
                    size: on_terminal.then(terminal::size).flatten(),
                    command: args.command.clone(),
                    streams: (wiring == Wiring::Streams).then(streams),
                };
                default_payload(guest, &start, &args.append, plan.engine.engine)
            }
        };

        let mut session = Self {
            config: MachineConfig {
                cpus: args.cpus,
                memory: args.memory.bytes(),
                disks,
                nets: network.iter().map(|network| network.card.clone()).collect(),
                ..MachineConfig::new(engine, payload)
            },
            outputs: Vec::new(),
            reports: None,
            gate: Arc::default(),
            command,
            raw_mode: None,
            _scratch: scratch,
            _network: network,
        };
        if default_guest {
            session.connect_control()?;
        } else {
            session.gate.open();
        }
        match wiring {
            Wiring::Console => session.connect_console(args.console, input, default_guest, end)?,
            Wiring::Streams => session.connect_streams(input, end)?,
        }
        Ok(session)
    }

    fn connect_control(&mut self) -> Result<(), Error> {
        let failed = |e: io::Error| Error::new(format!("cannot talk to the guest: {}", reason(&e)));
        let (from, device) = io::pipe().map_err(failed)?;
        self.reports = Some(control::start(from, Arc::clone(&self.gate)).map_err(failed)?);
        self.config.control = Some(ByteChannel::output_only(device.into()));
        Ok(())
    }

    /// A channel for the guest's output to one of this process's streams.
    fn output(
        &mut self,
        to: impl Write + Send + 'static,
        end: &Arc<End>,
    ) -> Result<OwnedFd, Error> {
        let end = Arc::clone(end);
        let (device, output) = Output::start(to, move || end.by_user())?;
        self.outputs.push(output);
        Ok(device)
    }

    fn connect_console(
        &mut self,
        console: Console,
        input: Input,
        default_guest: bool,
        end: &Arc<End>,
    ) -> Result<(), Error> {
        let out = self.output(io::stdout(), end)?;
        if input == Input::Terminal {
            self.raw_mode = Some(RawMode::start()?);
        }
        let on_key = {
            let end = Arc::clone(end);
            move |key| match key {
                Key::Quit => end.by_user(),
                Key::Help => eprint!("\r\n{}", terminal::KEYS),
            }
        };
        let at_end = match default_guest {
            true => AtEnd::CtrlD,
            false => AtEnd::Silence,
        };
        let channel = ByteChannel {
            input: input::start(input, Arc::clone(&self.gate), at_end, on_key)?.map(Arc::new),
            output: Some(Arc::new(out)),
        };
        match console {
            Console::Serial => self.config.serial = channel,
            Console::Virtio => {
                self.config.console = Some(channel);
                // What the kernel says before that console is there, or in a panic.
                let out = self.output(io::stderr(), end)?;
                self.config.serial = ByteChannel::output_only(out);
            }
        }
        Ok(())
    }

    fn connect_streams(&mut self, input: Input, end: &Arc<End>) -> Result<(), Error> {
        // A terminal is read line by line here, and its keys are its own.
        let input = match input {
            Input::Terminal => Input::Stream,
            other => other,
        };
        let input = match input::start(input, Arc::clone(&self.gate), AtEnd::Silence, |_| {})? {
            Some(input) => input,
            // What reads as ended, or a command that reads its input would wait without end.
            None => File::open("/dev/null")
                .doing("cannot open /dev/null")?
                .into(),
        };
        let out = self.output(io::stdout(), end)?;
        let error = self.output(io::stderr(), end)?;
        let messages = self.output(io::stderr(), end)?;
        self.config.serial = ByteChannel::output_only(messages);
        let ports = [
            (
                STDIN_PORT,
                ByteChannel {
                    input: Some(Arc::new(input)),
                    output: None,
                },
            ),
            (STDOUT_PORT, ByteChannel::output_only(out)),
            (STDERR_PORT, ByteChannel::output_only(error)),
        ];
        self.config.ports = ports
            .map(|(name, channel)| ConsolePort {
                name: Some(name.to_owned()),
                channel,
            })
            .into();
        Ok(())
    }

    fn run(mut self, end: &End) -> Result<u8, Error> {
        let outcome = loop {
            let machine = Machine::build(&self.config).map_err(|e| machine_error(&e))?;
            end.controls(machine.handle());
            let outcome = machine.run().map_err(|e| machine_error(&e))?;
            log::info!("the run ended: {outcome:?}");
            // A default guest that restarts before its shell is there has panicked, and would do so
            // again and again.
            let again = !self.command && self.gate.is_open() && !end.asked.load(Ordering::SeqCst);
            if !matches!(outcome, Outcome::Reset) || !again {
                break outcome;
            }
        };
        // The devices' ends of the pipes go with the configuration; then the rest is written.
        drop(self.config);
        // Every output is finished, also behind one that lost something.
        let lost = self
            .outputs
            .drain(..)
            .fold(None, |lost, output| Output::finish(output).or(lost));
        drop(self.raw_mode.take());
        let reports = self
            .reports
            .take()
            .map(|thread| thread.join().unwrap_or_default());
        let signal = end.signal.load(Ordering::SeqCst);
        if signal != 0 {
            return Ok(u8::try_from(128 + signal).unwrap_or(EXIT_FAILED));
        }
        // The guest's own end may have come first.
        let outcome = match outcome {
            Outcome::Reset if end.asked.load(Ordering::SeqCst) => Outcome::Stopped,
            other => other,
        };
        let code = exit_code(&outcome, reports.as_ref(), self.command)?;
        match lost {
            // A success without its output is none.
            Some(error) if code == 0 => Err(error),
            _ => Ok(code),
        }
    }
}

/// What the end of a machine means for whoever started it.
///
/// `reports` is there for the default guest.
fn exit_code(outcome: &Outcome, reports: Option<&Reports>, command: bool) -> Result<u8, Error> {
    let code = reports.and_then(|reports| reports.exit_code);
    if let Some(failure) = reports.and_then(|reports| reports.failure.as_deref()) {
        return Err(Error::new(format!(
            "the guest could not start the command: {failure}"
        )));
    }
    match outcome {
        Outcome::Crashed(crash) => {
            for line in crash.registers.lines() {
                log::info!("{line}");
            }
            Err(Error::new(crash.to_string()).hint("'--log info' shows the registers"))
        }
        Outcome::Stopped => Ok(if command { EXIT_QUIT } else { 0 }),
        Outcome::PowerOff => match (code, reports) {
            (Some(code), _) => Ok(code),
            (None, Some(_)) if command => {
                Err(Error::new("the guest powered off before the command ended"))
            }
            _ => Ok(0),
        },
        Outcome::Reset => match reports {
            Some(reports) if !reports.ready => Err(Error::new(
                "the guest's kernel gave up before the guest was ready",
            )
            .hint("'--append loglevel=7' shows its messages")),
            Some(_) => Err(Error::new("the guest restarted before the command ended")),
            None => Ok(0),
        },
    }
}

fn streams() -> Streams {
    let port = |name| format!("port:{name}");
    Streams {
        input: port(STDIN_PORT),
        output: port(STDOUT_PORT),
        error: port(STDERR_PORT),
    }
}

fn default_payload(guest: Guest, start: &Start, append: &str, engine: check::Engine) -> Payload {
    let bytes = |name: &str, bytes: Vec<u8>| Blob::Bytes {
        name: name.to_owned(),
        bytes: bytes.into(),
    };
    Payload {
        kernel: bytes(&guest.kernel_package, guest.kernel),
        initrd: vec![
            bytes("the default guest's file system", guest.initramfs),
            bytes("the start's settings", start.archive()),
        ],
        cmdline: cmdline(append, engine),
    }
}

/// Writes the default guest as files that other programs can boot: `vmlinuz`, `initrd` (with a
/// serial console and DHCP) and `cmdline`.
///
/// # Errors
/// If the directory cannot be written.
pub fn export(guest: &Guest, directory: &Path) -> Result<(), Error> {
    let start = Start {
        console: console_device(Console::Serial).to_owned(),
        network: true,
        term: term(),
        ..Start::default()
    };
    let initrd = [guest.initramfs.as_slice(), &start.archive()].concat();
    let cmdline = cmdline("", check::Engine::Kvm) + "\n";
    std::fs::create_dir_all(directory).doing(format_args!(
        "cannot make the directory {}",
        directory.display()
    ))?;
    for (name, content) in [
        ("vmlinuz", guest.kernel.as_slice()),
        ("initrd", &initrd),
        ("cmdline", cmdline.as_bytes()),
    ] {
        let path = directory.join(name);
        std::fs::write(&path, content).doing(format_args!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn console_device(console: Console) -> &'static str {
    match console {
        Console::Serial => "/dev/ttyS0",
        Console::Virtio => "/dev/hvc0",
    }
}

/// The kernel's command line for the default guest.
fn cmdline(append: &str, engine: check::Engine) -> String {
    let mut words = vec![
        "console=ttyS0",
        // Only a panic is shown; '--append loglevel=7' shows all.
        "quiet loglevel=0 panic=-1",
        // What takes time at start and finds nothing here.
        "cryptomgr.notests audit=0 rcupdate.rcu_expedited=1",
    ];
    if engine == check::Engine::Jit {
        // These keep the processor from guessing ahead in the guest's own code. Translated code
        // does not run as the guest's compiler laid it out, so that they protect nothing and cost
        // time.
        words.push("mitigations=off");
    }
    if !append.is_empty() {
        words.push(append);
    }
    words.join(" ")
}

/// The host terminal's type, if it is a name that a guest can use.
fn term() -> String {
    std::env::var_os("TERM")
        .and_then(|term| OsString::into_string(term).ok())
        .filter(|term| !term.is_empty())
        .unwrap_or_else(|| "vt100".into())
}

/// The machine's own message, with what to do where that is known.
fn machine_error(error: &vmm::machine::Error) -> Error {
    let hint = match error {
        vmm::machine::Error::Boot(vmm::boot::Error::Format { .. }) => {
            Some("--kernel takes a bzImage (vmlinuz) or an ELF kernel for x86")
        }
        vmm::machine::Error::Boot(
            vmm::boot::Error::Truncated { .. } | vmm::boot::Error::Empty { .. },
        ) => Some("get the file again"),
        _ => None,
    };
    let error = Error::new(one_line_of(error));
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}
