//! The guest's output on its way to standard output and standard error.

use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use crate::error::{Error, reason};

/// Moves what the guest writes to one of the process's streams.
#[derive(Debug)]
pub struct Output(JoinHandle<Option<Error>>);

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
        let failed =
            |e: io::Error| Error::new(format!("cannot pass the guest's output on: {}", reason(&e)));
        let (from, device) = io::pipe().map_err(failed)?;
        let thread = std::thread::Builder::new()
            .name("output".into())
            .spawn(move || {
                let (mut lost, mut gone) = (None, false);
                copy(from, to, &mut lost, &mut gone);
                if gone {
                    on_gone();
                }
                lost
            })
            .map_err(failed)?;
        Ok((device.into(), Self(thread)))
    }

    /// Waits until all is written. The device's end must be closed, or this does not return. Returns
    /// why some of it could not be written.
    pub fn finish(self) -> Option<Error> {
        self.0.join().unwrap_or_default()
    }
}

/// Returns when either end is closed: `gone` if it is the reader's. What cannot be written is dropped,
/// so that the guest does not wait for it; `lost` is the first reason. Flushes after each piece: a prompt
/// has no line end.
fn copy(mut from: PipeReader, mut to: impl Write, lost: &mut Option<Error>, gone: &mut bool) {
    let mut buffer = [0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let written = to.write_all(&buffer[..length]).and_then(|()| to.flush());
                match written {
                    Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                        *gone = true;
                        return;
                    }
                    Err(e) if lost.is_none() => {
                        *lost = Some(Error::new(format!(
                            "cannot write the guest's output: {}",
                            reason(&e)
                        )));
                    }
                    Err(_) | Ok(()) => {}
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
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
        assert_eq!(output.finish(), None);
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
        assert_eq!(output.finish(), None);
    }
    #[test]
    fn output_that_finds_no_room_is_told() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (device, output) = Output::start(full, || {}).unwrap();
        File::from(device).write_all(b"x").unwrap();
        let lost = output.finish().unwrap().to_string();
        assert_eq!(
            lost,
            "cannot write the guest's output: no space left on device"
        );
    }
}
