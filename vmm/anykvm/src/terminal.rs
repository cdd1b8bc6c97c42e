//! The user's terminal: raw while the guest has it, and back as it was on every way out.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::termios::{self, SetArg, Termios};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};

use crate::error::{Error, reason};

/// The keys, for `Ctrl-A h` and for whoever starts a machine.
pub const KEYS: &str = "\
Ctrl-A x       stop the virtual machine and quit\r\n\
Ctrl-A h       show these keys\r\n\
Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

const CTRL_A: u8 = 1;

/// The terminal's settings before it was made raw. It is there for all: the normal end, a panic and
/// the signals' thread restore from it, whichever comes first.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

fn saved() -> MutexGuard<'static, Option<Termios>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the terminal is raw now, so that a line needs `\r\n`.
pub fn is_raw() -> bool {
    saved().is_some()
}

/// Makes the terminal as it was. Does nothing if it is.
pub fn restore() {
    if let Some(settings) = saved().take() {
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &settings);
    }
}

/// The rows and columns of the terminal that standard input is.
pub fn size() -> Option<(u16, u16)> {
    let (columns, rows) = terminal_size::terminal_size_of(io::stdin())?;
    Some((rows.0, columns.0))
}

fn make_raw() -> nix::Result<()> {
    let mut saved = saved();
    if saved.is_some() {
        return Ok(());
    }
    let before = termios::tcgetattr(io::stdin())?;
    let mut raw = before.clone();
    termios::cfmakeraw(&mut raw);
    termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
    *saved = Some(before);
    Ok(())
}

/// While it lives and standard input is a terminal, that is in raw mode.
pub struct RawMode(());

impl RawMode {
    /// Starts raw mode; does nothing if standard input is no terminal.
    ///
    /// # Errors
    /// If the terminal refuses.
    pub fn start() -> Result<Self, Error> {
        if io::stdin().is_terminal() {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
            make_raw().map_err(|e| {
                Error::new(format!("cannot take over the terminal: {}", e.desc()))
                    .hint("start with '</dev/null' if the guest needs no input")
            })?;
        }
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Starts a thread that restores the terminal when the process is told to end, calls `stop` with the
/// signal's number, and does what job control asks for (`SIGTSTP`, `SIGCONT`).
///
/// # Errors
/// If the signals cannot be taken over.
pub fn on_signals(stop: impl Fn(i32) + Send + 'static) -> Result<(), Error> {
    let failed = |e: io::Error| Error::new(format!("cannot take over signals: {}", reason(&e)));
    let mut signals =
        signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT])
            .map_err(failed)?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut raw_when_stopped = false;
            for signal in signals.forever() {
                match signal {
                    SIGTSTP => {
                        raw_when_stopped = is_raw();
                        restore();
                        let _ = signal_hook::low_level::emulate_default_handler(SIGTSTP);
                    }
                    SIGCONT => {
                        if std::mem::take(&mut raw_when_stopped) {
                            let _ = make_raw();
                        }
                    }
                    signal => {
                        restore();
                        stop(signal);
                    }
                }
            }
        })
        .map(drop)
        .map_err(failed)
}

/// What a key of AnyKVM's own asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// Stop the machine and quit.
    Quit,
    /// Show the keys.
    Help,
}

/// Finds AnyKVM's keys among what is typed.
#[derive(Debug, Default)]
pub struct Keys {
    after_ctrl_a: bool,
}

impl Keys {
    /// Takes `typed`, appends what is the guest's to `guest`, and returns AnyKVM's keys in order.
    pub fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Key> {
        let mut keys = Vec::new();
        for &byte in typed {
            if !std::mem::take(&mut self.after_ctrl_a) {
                if byte == CTRL_A {
                    self.after_ctrl_a = true;
                } else {
                    guest.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => keys.push(Key::Quit),
                CTRL_A => guest.push(CTRL_A),
                _ => keys.push(Key::Help),
            }
        }
        keys
    }
}

/// What standard input is, which decides what its end means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// A terminal: raw mode and keys.
    Terminal,
    /// A pipe, socket or file: its bytes go to the guest, and its end is told.
    Stream,
    /// Closed or `/dev/null`: the guest gets nothing.
    Nothing,
}

impl Input {
    /// What this process was started with.
    pub fn of_process() -> Self {
        use nix::sys::stat::{SFlag, fstat};
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Self::Terminal;
        }
        let Ok(status) = fstat(stdin.as_fd()) else {
            return Self::Nothing;
        };
        match SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT {
            SFlag::S_IFIFO | SFlag::S_IFREG | SFlag::S_IFSOCK => Self::Stream,
            // A Rust program whose standard input was closed finds /dev/null there.
            _ => Self::Nothing,
        }
    }
}

/// Reads standard input until it ends, past interruptions. `each` returns whether to go on.
pub fn read_input(mut each: impl FnMut(&[u8]) -> bool) {
    let mut buffer = [0; 4096];
    let mut stdin = io::stdin().lock();
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if !each(&buffer[..length]) {
                    return;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                log::info!("standard input ended: {e}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Key>) {
        let (mut filter, mut guest, mut keys) = (Keys::default(), Vec::new(), Vec::new());
        for piece in pieces {
            keys.extend(filter.filter(piece, &mut guest));
        }
        (guest, keys)
    }

    #[test]
    fn keys_are_found_and_the_rest_is_the_guests() {
        assert_eq!(filter(&[b"ls\r"]), (b"ls\r".to_vec(), vec![]));
        assert_eq!(filter(&[b"a\x01xb"]), (b"ab".to_vec(), vec![Key::Quit]));
        assert_eq!(filter(&[b"a\x01", b"x"]), (b"a".to_vec(), vec![Key::Quit]));
        assert_eq!(filter(&[b"\x01\x01x"]), (b"\x01x".to_vec(), vec![]));
        assert_eq!(filter(&[b"\x01h"]), (vec![], vec![Key::Help]));
        assert_eq!(filter(&[b"\x01?q"]), (b"q".to_vec(), vec![Key::Help]));
    }
}
