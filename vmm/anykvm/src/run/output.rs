//! The guest's output on its way to standard output and standard error.

use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use crate::error::Error;

/// Moves what the guest writes to one of the process's streams.
#[derive(Debug)]
pub struct Output(JoinHandle<()>);

impl Output {
    /// Starts moving. Returns the descriptor that the guest's device writes to. `on_gone` is called
    /// if nobody reads the stream any more (`anykvm run | head -1`).
    ///
    /// # Errors
    /// If the host is out of descriptors or threads.
    pub fn start(
        to: impl Write + Send + 'static,
        on_gone: impl FnOnce() + Send + 'static,
    ) -> Result<(OwnedFd, Self), Error> {
        let failed = |e: io::Error| Error::new(format!("cannot pass the guest's output on: {e}"));
        let (from, device) = io::pipe().map_err(failed)?;
        let thread = std::thread::Builder::new()
            .name("output".into())
            .spawn(move || {
                if copy(from, to).is_err() {
                    on_gone();
                }
            })
            .map_err(failed)?;
        Ok((device.into(), Self(thread)))
    }

    /// Waits until all is written. The device's end must be closed, or this does not return.
    pub fn finish(self) {
        let _ = self.0.join();
    }
}

/// `Err` only if the reader is gone. Flushes after each piece: a prompt has no line end.
fn copy(mut from: PipeReader, mut to: impl Write) -> Result<(), ()> {
    let mut buffer = [0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                let written = to.write_all(&buffer[..length]).and_then(|()| to.flush());
                match written {
                    Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Err(()),
                    Err(e) => log::error!("cannot write the guest's output: {e}"),
                    Ok(()) => {}
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::sync::mpsc::channel;

    #[test]
    fn all_is_written_before_the_end() {
        let (mut read_back, to) = io::pipe().unwrap();
        let (device, output) = Output::start(to, || {}).unwrap();
        File::from(device).write_all(&[7; 5000]).unwrap();
        output.finish();
        let mut bytes = Vec::new();
        read_back.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [7; 5000]);
    }

    #[test]
    fn a_reader_that_left_is_told() {
        let (read_back, to) = io::pipe().unwrap();
        drop(read_back);
        let (gone, told) = channel();
        let (device, output) = Output::start(to, move || gone.send(()).unwrap()).unwrap();
        File::from(device).write_all(b"x").unwrap();
        told.recv().unwrap();
        output.finish();
    }
}
