//! Standard input on its way to the guest.
//!
//! Nothing goes out before the gate opens: what is typed or piped while the guest starts would be
//! lost in a serial port that is not open yet. A terminal's keys are looked for all the while.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::error::{Error, reason};
use crate::terminal::{Input, Key, Keys, read_input};

/// Pieces of input that wait for the guest; a terminal's further ones are dropped.
const WAITING_PIECES: usize = 1024;
/// The end of input, as a terminal says it.
const CTRL_D: u8 = 4;

/// Holds input back until the guest is ready for it.
#[derive(Debug, Default)]
pub struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Lets input through from now on.
    pub fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    /// Whether it was opened.
    pub fn is_open(&self) -> bool {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            open = self
                .opened
                .wait(open)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What the end of standard input is for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtEnd {
    /// Nothing: a console stays open.
    Silence,
    /// Ctrl-D, so that a shell on the console ends.
    CtrlD,
}

/// Starts reading standard input. Returns the descriptor that the guest's device reads from, or
/// `None` if there is no input. `on_key` is called for AnyKVM's own keys.
///
/// # Errors
/// If the host is out of descriptors or threads.
pub fn start(
    input: Input,
    gate: Arc<Gate>,
    at_end: AtEnd,
    on_key: impl Fn(Key) + Send + 'static,
) -> Result<Option<OwnedFd>, Error> {
    if input == Input::Nothing {
        return Ok(None);
    }
    let failed = |e: io::Error| Error::new(format!("cannot read standard input: {}", reason(&e)));
    let (device, pipe) = io::pipe().map_err(failed)?;
    let (sender, receiver) = sync_channel(WAITING_PIECES);
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    thread("input")
        .spawn(move || read(input, &sender, on_key))
        .map_err(failed)?;
    thread("input-out")
        .spawn(move || {
            gate.wait();
            write(&receiver, File::from(OwnedFd::from(pipe)), at_end);
        })
        .map_err(failed)?;
    Ok(Some(device.into()))
}

fn read(input: Input, guest: &SyncSender<Vec<u8>>, on_key: impl Fn(Key)) {
    let mut keys = Keys::default();
    read_input(|bytes| {
        if input != Input::Terminal {
            return guest.send(bytes.to_vec()).is_ok();
        }
        let mut typed = Vec::new();
        keys.filter(bytes, &mut typed).into_iter().for_each(&on_key);
        // To wait for the guest here would make the keys wait too.
        if !typed.is_empty() && guest.try_send(typed).is_err() {
            log::warn!("the guest takes no input; some was dropped");
        }
        true
    });
}

fn write(pieces: &Receiver<Vec<u8>>, mut pipe: File, at_end: AtEnd) {
    for piece in pieces {
        if pipe.write_all(&piece).is_err() {
            return;
        }
    }
    if at_end == AtEnd::CtrlD {
        let _ = pipe.write_all(&[CTRL_D]);
    }
}
