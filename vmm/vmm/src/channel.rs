//! Byte channels between the guest's consoles and the host.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::poll;

/// The host's end of a console: descriptors to read from and to write to. They may be the
/// same (a socket), a terminal, pipes or files. `None` means no input, or output thrown away.
#[derive(Clone, Debug, Default)]
pub struct ByteChannel {
    /// What the guest gets to read. At its end the guest just gets nothing more.
    pub input: Option<Arc<OwnedFd>>,
    /// Where the guest's bytes go.
    pub output: Option<Arc<OwnedFd>>,
}

impl ByteChannel {
    /// A channel over one descriptor for both ways, such as a socket.
    #[must_use]
    pub fn duplex(fd: OwnedFd) -> Self {
        let fd = Arc::new(fd);
        Self {
            input: Some(Arc::clone(&fd)),
            output: Some(fd),
        }
    }

    /// A channel that only takes the guest's output.
    #[must_use]
    pub fn output_only(fd: OwnedFd) -> Self {
        Self {
            input: None,
            output: Some(Arc::new(fd)),
        }
    }

    pub(crate) fn input_fd(&self) -> Option<RawFd> {
        self.input.as_ref().map(|fd| fd.as_raw_fd())
    }

    /// Writes all of `bytes`, waiting while the host's end is full; gives up when `cancelled`
    /// says so. A host's end that is gone swallows the bytes.
    pub(crate) fn write_all(&self, mut bytes: &[u8], cancelled: &dyn Fn() -> bool) {
        let Some(output) = &self.output else { return };
        let fd = output.as_raw_fd();
        while !bytes.is_empty() {
            // Only short writes after POLLOUT, so that a full pipe cannot block the thread.
            let chunk = &bytes[..bytes.len().min(4096)];
            match poll::wait(&[(fd, poll::WRITE)], Some(100)) {
                Ok(ready) if ready[0] != 0 => match poll::write(fd, chunk) {
                    Ok(n) => bytes = &bytes[n..],
                    Err(e)
                        if matches!(
                            e.kind(),
                            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                        ) => {}
                    Err(_) => return,
                },
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
            if cancelled() {
                return;
            }
        }
    }
}
