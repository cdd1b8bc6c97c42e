//! The guest's network card on one end of the cable, the network stack on the other.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use netstack::passt::PasstConfig;
use netstack::{Handle, Offload};
use vmm::virtio::net::{NetBackend, NetConfig};

use crate::cli::{Net, RunArgs};
use crate::error::{Error, one_line_of};

/// A network for the guest, and what has to live as long.
pub struct Network {
    /// The card to plug in.
    pub card: NetConfig,
    /// Where passt has its socket.
    _directory: Option<tempfile::TempDir>,
}

/// Starts the network that `args` asks for, if any.
///
/// # Errors
/// If a published port is taken, or passt cannot be started.
pub fn start(args: &RunArgs) -> Result<Option<Network>, Error> {
    let (handle, directory) = match args.net {
        Net::None => return Ok(None),
        Net::User => (user(args)?, None),
        Net::Passt => {
            let (handle, directory) = passt(args)?;
            (handle, Some(directory))
        }
    };
    for (forward, address) in handle.forwards() {
        if forward.host_port == 0 {
            eprintln!(
                "anykvm: {address} leads to the guest's port {}",
                forward.guest_port
            );
        }
    }
    Ok(Some(Network {
        card: NetConfig::new(Arc::new(Mutex::new(Cable(handle)))),
        _directory: directory,
    }))
}

fn user(args: &RunArgs) -> Result<Handle, Error> {
    let config = netstack::Config {
        forwards: args.publish.clone(),
        hostname: Some("anykvm".into()),
        ..netstack::Config::default()
    };
    netstack::spawn(config).map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => {
            Error::new(format!("cannot publish a port: {}", one_line_of(&e)))
                .hint("choose another port of this machine with --publish")
        }
        io::ErrorKind::PermissionDenied => {
            Error::new(format!("cannot publish a port: {}", one_line_of(&e)))
                .hint("ports below 1024 need root; choose a higher one with --publish")
        }
        _ => Error::new(format!("cannot start the network: {}", one_line_of(&e)))
            .hint("'--net none' starts the guest without one"),
    })
}

fn passt(args: &RunArgs) -> Result<(Handle, tempfile::TempDir), Error> {
    let failed = |e: io::Error| Error::new(format!("cannot use passt: {}", one_line_of(&e)));
    let directory = tempfile::tempdir().map_err(failed)?;
    if nix::unistd::geteuid().is_root() {
        // Started by root, passt becomes this user before it makes its socket.
        const NOBODY: u32 = 65534;
        std::os::unix::fs::chown(directory.path(), Some(NOBODY), Some(NOBODY)).map_err(failed)?;
    }
    let config = PasstConfig {
        forwards: args.publish.clone(),
        ..PasstConfig::new(directory.path().join("socket"))
    };
    let handle = netstack::passt::spawn(&config)
        .map_err(|e| failed(e).hint("'--net user' needs nothing installed"))?;
    Ok((handle, directory))
}

/// Joins the stack's queues to the card.
struct Cable(Handle);

impl NetBackend for Cable {
    fn send(&mut self, frame: &[u8]) {
        if let Err(e) = self.0.send(frame, Offload::default()) {
            log::debug!("a frame from the guest was dropped: {e}");
        }
    }

    fn recv(&mut self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            let frame = match self.0.recv() {
                Some(frame) => frame,
                None => {
                    self.0.clear_event();
                    // One that came before the event was cleared would wait for the next.
                    self.0.recv()?
                }
            };
            let length = frame.data.len();
            if let Some(room) = buffer.get_mut(..length) {
                room.copy_from_slice(&frame.data);
                self.0.recycle(frame);
                return Some(length);
            }
            log::debug!("a frame of {length} bytes for the guest was dropped");
        }
    }

    fn event_fd(&self) -> RawFd {
        self.0.event_fd().as_raw_fd()
    }
}
