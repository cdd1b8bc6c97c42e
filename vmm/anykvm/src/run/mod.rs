//! `anykvm run`: from what the user asked for to a running machine, and from its end to an exit
//! code.

mod control;
mod input;
mod output;
mod plan;

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm::boot::{Blob, Payload};
use vmm::channel::ByteChannel;
use vmm::machine::{Machine, MachineConfig, MachineHandle, Outcome};

use crate::check::{self, facts::Facts};
use crate::cli::{Console, RunArgs};
use crate::error::{EXIT_FAILED, Error, IoContext};
use crate::guest::initramfs::{Start, Streams};
use crate::guest::{Cache, Guest};
use crate::progress::Progress;
use crate::terminal::{self, Input, Key, RawMode};
use control::Reports;
use input::{AtEnd, Gate};
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
    let session = Session::start(args, &plan, guest, &end)?;
    session.run(&end)
}

/// Ends the run from other threads: signals, keys, a reader that left.
#[derive(Default)]
struct End {
    machine: Mutex<Option<MachineHandle>>,
    /// Signal that asked for the end; 0: none.
    signal: AtomicI32,
}

impl End {
    fn machine(&self) -> MutexGuard<'_, Option<MachineHandle>> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine that is to be stopped from now on. Stops it at once if a signal came before.
    fn controls(&self, handle: MachineHandle) {
        if self.signal.load(Ordering::SeqCst) != 0 {
            handle.stop();
        }
        *self.machine() = Some(handle);
    }

    fn by_signal(&self, signal: i32) {
        let code = 128 + signal;
        self.signal.store(signal, Ordering::SeqCst);
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

/// All that a run needs beside the machine, which a reset builds again.
struct Session {
    config: MachineConfig,
    outputs: Vec<Output>,
    reports: Option<JoinHandle<Reports>>,
    raw_mode: Option<RawMode>,
    default_guest: bool,
    command: bool,
}

impl Session {
    fn start(
        args: &RunArgs,
        plan: &plan::Plan,
        guest: Option<Guest>,
        end: &Arc<End>,
    ) -> Result<Self, Error> {
        let input = Input::of_process();
        let on_terminal = input == Input::Terminal && io::stdout().is_terminal();
        let default_guest = guest.is_some();
        let command = !args.command.is_empty();
        let gate = Arc::new(Gate::default());
        gate.open();

        let on_key = {
            let end = Arc::clone(end);
            move |key| match key {
                Key::Quit => end.by_user(),
                Key::Help => eprint!("\r\n{}", terminal::KEYS),
            }
        };
        let at_end = if default_guest {
            AtEnd::CtrlD
        } else {
            AtEnd::Silence
        };
        let on_gone = {
            let end = Arc::clone(end);
            move || end.by_user()
        };
        let (console_out, output) = Output::start(io::stdout(), on_gone)?;
        let raw_mode = (input == Input::Terminal)
            .then(RawMode::start)
            .transpose()?;
        let console_in = input::start(input, gate, at_end, on_key)?;
        let _ = on_terminal;

        let config = MachineConfig {
            engine: match plan.engine.engine {
                check::Engine::Jit => vmm::hypervisor::Engine::Jit,
                check::Engine::Kvm => vmm::hypervisor::Engine::Kvm,
            },
            payload: payload(args, plan, guest),
            cpus: args.cpus,
            memory: args.memory.bytes(),
            serial: channel(console_in, Some(console_out)),
        };
        Ok(Self {
            config,
            outputs: vec![output],
            reports: None,
            raw_mode,
            default_guest,
            command,
        })
    }

    fn run(mut self, end: &End) -> Result<u8, Error> {
        let outcome = loop {
            let machine = Machine::build(&self.config).map_err(machine_error)?;
            end.controls(machine.handle());
            let outcome = machine.run().map_err(machine_error)?;
            log::info!("the run ended: {outcome:?}");
            if !matches!(outcome, Outcome::Reset) || self.command {
                break outcome;
            }
        };
        // The devices' ends of the pipes go with the configuration; then the rest is written.
        drop(self.config);
        self.outputs.drain(..).for_each(Output::finish);
        drop(self.raw_mode.take());
        let reports = match self.reports.take() {
            Some(thread) => thread.join().unwrap_or_default(),
            None => Reports::default(),
        };
        let signal = end.signal.load(Ordering::SeqCst);
        if signal != 0 {
            return Ok(u8::try_from(128 + signal).unwrap_or(EXIT_FAILED));
        }
        exit_code(&outcome, &reports, self.default_guest, self.command)
    }
}

/// What the end of a machine means for whoever started it.
fn exit_code(
    outcome: &Outcome,
    reports: &Reports,
    default_guest: bool,
    command: bool,
) -> Result<u8, Error> {
    if let Some(failure) = &reports.failure {
        return Err(Error::new(format!(
            "the guest could not start the command: {failure}"
        )));
    }
    match (outcome, reports.exit_code) {
        (Outcome::Crashed(crash), _) => {
            for line in crash.registers.lines() {
                log::info!("{line}");
            }
            Err(Error::new(crash.to_string()).hint("'--log info' shows the registers"))
        }
        (Outcome::PowerOff, Some(code)) => Ok(code),
        (Outcome::Stopped, _) => Ok(if command { EXIT_QUIT } else { 0 }),
        (Outcome::PowerOff, None) if command => {
            Err(Error::new("the guest powered off before the command ended"))
        }
        (Outcome::Reset, _) if default_guest => {
            Err(Error::new("the guest restarted before the command ended"))
        }
        (Outcome::PowerOff | Outcome::Reset, _) => Ok(0),
    }
}

fn payload(args: &RunArgs, plan: &plan::Plan, guest: Option<Guest>) -> Payload {
    let bytes = |name: &str, bytes: Vec<u8>| Blob::Bytes {
        name: name.to_owned(),
        bytes: bytes.into(),
    };
    let Some(guest) = guest else {
        return Payload {
            // Without --kernel there is a default guest.
            kernel: Blob::Path(args.kernel.clone().unwrap_or_default()),
            initrd: args.initrd.iter().cloned().map(Blob::Path).collect(),
            cmdline: args.append.clone(),
        };
    };
    let start = Start {
        console: console_device(args.console).to_owned(),
        term: term(),
        command: args.command.clone(),
        ..Start::default()
    };
    Payload {
        kernel: bytes(&guest.kernel_package, guest.kernel),
        initrd: vec![
            bytes("the default guest's file system", guest.initramfs),
            bytes("the start's settings", start.archive()),
        ],
        cmdline: cmdline(&args.append, plan.engine.engine),
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
        // There is no keyboard controller to look for behind the reset line.
        "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd",
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

fn channel(input: Option<OwnedFd>, output: Option<OwnedFd>) -> ByteChannel {
    ByteChannel {
        input: input.map(Arc::new),
        output: output.map(Arc::new),
    }
}

/// The machine's own message, with what to do where that is known.
fn machine_error(error: vmm::machine::Error) -> Error {
    let text = error.to_string();
    let hint = match &error {
        vmm::machine::Error::Boot(vmm::boot::Error::Format { .. }) => {
            Some("--kernel takes a bzImage (vmlinuz) or an ELF kernel for x86")
        }
        vmm::machine::Error::Boot(
            vmm::boot::Error::Truncated { .. } | vmm::boot::Error::Empty { .. },
        ) => Some("get the file again"),
        _ => None,
    };
    // The operating system's "(os error N)" may be anywhere in it.
    let text = text
        .split(" (os error ")
        .enumerate()
        .fold(String::new(), |text, (index, part)| {
            match part.split_once(')') {
                Some((_, rest)) if index > 0 => text + rest,
                _ => text + part,
            }
        });
    let error = Error::new(text);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}
