//! An external [passt](https://passt.top) as back end, over its UNIX stream socket.
//!
//! Each frame on the socket follows its length as four bytes, most significant first. passt has no offloads: the
//! virtual network card must finish checksums and segments before it sends ([`Handle::send`] drops other frames).
//! passt copies the host's own addresses to the guest, IPv6 included.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::config::{Forward, Proto};
use crate::driver::{Handle, MAX_FRAME, Shared};
use crate::frame::{Frame, Offload};

const LENGTH: usize = 4;
/// Bytes that may wait to be written before frames are left in the queue.
const WRITE_MARK: usize = 256 * 1024;
const START_LIMIT: Duration = Duration::from_secs(5);

/// Connects to a passt that listens on `socket`.
///
/// # Errors
/// The socket cannot be reached, or no thread or descriptor is left.
pub fn connect(socket: &Path) -> io::Result<Handle> {
    let stream = UnixStream::connect(socket).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("passt at {}: {error}", socket.display()),
        )
    })?;
    run(stream, None)
}

/// How to start passt.
#[derive(Clone, Debug)]
pub struct PasstConfig {
    /// The program; found in `PATH` if it has no slash.
    pub program: PathBuf,
    /// Where passt is to make its socket, which must not exist yet.
    pub socket: PathBuf,
    /// Host ports that lead to the guest; host port 0 is not possible.
    pub forwards: Vec<Forward>,
    /// Further arguments.
    pub args: Vec<String>,
}

impl PasstConfig {
    /// passt from `PATH` without forwards.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            program: PathBuf::from("passt"),
            socket: socket.into(),
            forwards: Vec::new(),
            args: Vec::new(),
        }
    }

    fn arguments(&self) -> Vec<String> {
        let mut args: Vec<String> = ["--foreground", "--quiet", "--one-off", "--socket"]
            .map(String::from)
            .to_vec();
        args.push(self.socket.display().to_string());
        for forward in &self.forwards {
            args.push(match forward.proto {
                Proto::Tcp => "--tcp-ports".into(),
                Proto::Udp => "--udp-ports".into(),
            });
            args.push(format!(
                "{}/{}:{}",
                forward.host_addr, forward.host_port, forward.guest_port
            ));
        }
        args.extend(self.args.iter().cloned());
        args
    }
}

/// Starts passt and connects to it. It ends when the [`Handle`] is dropped.
///
/// # Errors
/// passt is not installed, ends at once, or does not open its socket. The message is one line for the user.
pub fn spawn(config: &PasstConfig) -> io::Result<Handle> {
    let program = config.program.display();
    let mut child = Command::new(&config.program)
        .args(config.arguments())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot start {program}: {error}; install passt or use the built-in user network"),
            )
        })?;
    let last_words = Arc::new(Mutex::new(String::new()));
    let log = match child.stderr.take() {
        Some(stderr) => Some(follow_log(stderr, Arc::clone(&last_words))?),
        None => None,
    };
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let error = match UnixStream::connect(&config.socket) {
            Ok(stream) => return run(stream, Some(child)),
            Err(error) => error,
        };
        if let Some(status) = child.try_wait()? {
            // The log ends with the process; a panic of its thread would only lose the words.
            let _ = log.map(JoinHandle::join);
            let words = last_words.lock().unwrap_or_else(PoisonError::into_inner);
            return Err(io::Error::other(format!(
                "{program} ended with {status}: {words}"
            )));
        }
        if Instant::now() >= deadline {
            // Nothing more can be done about a process that cannot be ended.
            let _ = child.kill();
            let _ = child.wait();
            let socket = config.socket.display();
            return Err(io::Error::new(
                error.kind(),
                format!("{program} did not open {socket}: {error}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Passes passt's messages on to the log and keeps the last one, until passt ends.
fn follow_log(stderr: ChildStderr, last: Arc<Mutex<String>>) -> io::Result<JoinHandle<()>> {
    const MAX_LINE: u64 = 1024;
    std::thread::Builder::new()
        .name("net-passt-log".into())
        .spawn(move || {
            let mut reader = BufReader::new(stderr);
            let mut line = Vec::new();
            loop {
                line.clear();
                match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
                let text = String::from_utf8_lossy(&line).trim().to_owned();
                // passt complains about hosts without a system log with every message.
                if text.is_empty() || text.ends_with("bytes to syslog") {
                    continue;
                }
                log::info!("passt: {text}");
                *last.lock().unwrap_or_else(PoisonError::into_inner) = text;
            }
        })
}

fn run(stream: UnixStream, child: Option<Child>) -> io::Result<Handle> {
    stream.set_nonblocking(true)?;
    let shared = Shared::new()?;
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (theirs, their_wake) = (Arc::clone(&shared), Arc::clone(&wake));
    let mut pump = Pump::new(stream);
    let thread = std::thread::Builder::new()
        .name("net-passt".into())
        .spawn(move || {
            if let Err(error) = pump.run(&theirs, &their_wake) {
                log::error!("passt connection ended: {error}");
            }
            theirs.die();
            drop(pump);
            if let Some(mut child) = child {
                // It ends with its connection; make sure and collect it.
                let _ = child.kill();
                let _ = child.wait();
            }
        })?;
    let kick = move || {
        let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
    };
    Ok(Handle::new(shared, Box::new(kick), thread, Vec::new()))
}

struct Pump {
    stream: UnixStream,
    /// Read but not delivered; starts at a length.
    input: Vec<u8>,
    /// Framed but not written, from `written` on.
    output: Vec<u8>,
    written: usize,
    batch: VecDeque<Frame>,
}

impl Pump {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            batch: VecDeque::new(),
        }
    }

    fn run(&mut self, shared: &Shared, wake: &impl std::os::fd::AsFd) -> io::Result<()> {
        let mut chunk = vec![0; 128 * 1024];
        while !shared.stopping() {
            if self.output.len() - self.written < WRITE_MARK {
                shared.take_batch(&mut self.batch);
                for frame in &self.batch {
                    append(&mut self.output, frame);
                }
                shared.recycle_batch(&mut self.batch);
            }
            self.write()?;
            self.deliver(shared)?;
            let stalled = self.input_has_frame() && !shared.has_room();
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !stalled);
            flags.set(PollFlags::OUT, self.written < self.output.len());
            let mut fds = [
                PollFd::new(&self.stream, flags),
                PollFd::new(wake, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let (socket, woken) = (fds[0].revents(), fds[1].revents());
            if woken.contains(PollFlags::IN) {
                let _ = rustix::io::read(wake, &mut [0u8; 8]);
            }
            if socket.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && !stalled {
                match self.stream.read(&mut chunk) {
                    Ok(0) => return Err(io::Error::other("passt closed its socket")),
                    Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                    Err(error) if is_transient(&error) => {}
                    Err(error) => return Err(error),
                }
            } else if socket.intersects(PollFlags::HUP | PollFlags::ERR) {
                return Err(io::Error::other("passt closed its socket"));
            }
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(())
    }

    /// The first frame of `bytes` and what follows it, if the frame is complete.
    fn split(bytes: &[u8]) -> io::Result<Option<(&[u8], &[u8])>> {
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::other(format!(
                "passt announced a frame of {length} bytes"
            )));
        }
        Ok(rest.split_at_checked(length))
    }

    fn input_has_frame(&self) -> bool {
        matches!(Self::split(&self.input), Ok(Some(_)))
    }

    fn deliver(&mut self, shared: &Shared) -> io::Result<()> {
        let mut result = Ok(());
        let mut used = 0;
        shared.deliver(|push| {
            loop {
                match Self::split(&self.input[used..]) {
                    Ok(Some((frame, _))) => {
                        if !push(frame, Offload::default()) {
                            return;
                        }
                        used += LENGTH + frame.len();
                    }
                    Ok(None) => return,
                    Err(error) => {
                        result = Err(error);
                        return;
                    }
                }
            }
        });
        self.input.drain(..used);
        result
    }
}

fn append(output: &mut Vec<u8>, frame: &Frame) {
    if frame.offload != Offload::default() {
        return;
    }
    output.extend_from_slice(&(frame.data.len() as u32).to_be_bytes());
    output.extend_from_slice(&frame.data);
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_for_frame(handle: &Handle) -> Frame {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(frame) = handle.recv() {
                return frame;
            }
            assert!(Instant::now() < deadline, "no frame");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn frames_cross_in_both_directions() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let handle = run(ours, None).unwrap();
        handle.send(&[7; 60], Offload::default()).unwrap();
        let mut received = [0; 64];
        theirs.read_exact(&mut received).unwrap();
        assert_eq!(received[..4], [0, 0, 0, 60]);
        assert_eq!(received[4..], [7; 60]);

        // In pieces, and two at a time.
        theirs.write_all(&[0, 0]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        theirs.write_all(&[0, 3, 1, 2, 3, 0, 0, 0, 1, 9]).unwrap();
        assert_eq!(wait_for_frame(&handle).data, [1, 2, 3]);
        assert_eq!(wait_for_frame(&handle).data, [9]);

        drop(theirs);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !handle.is_closed() {
            assert!(Instant::now() < deadline, "the end went unnoticed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_slow_guest_stalls_the_socket() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let handle = run(ours, None).unwrap();
        let writer = std::thread::spawn(move || {
            for i in 0..5000u32 {
                theirs.write_all(&4u32.to_be_bytes()).unwrap();
                theirs.write_all(&i.to_be_bytes()).unwrap();
            }
            theirs
        });
        for i in 0..5000u32 {
            let frame = wait_for_frame(&handle);
            assert_eq!(frame.data, i.to_be_bytes());
            handle.recycle(frame);
        }
        drop(writer.join().unwrap());
    }

    #[test]
    fn an_absurd_length_ends_the_connection() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let handle = run(ours, None).unwrap();
        theirs.write_all(&[0xff; 8]).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !handle.is_closed() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(
            handle.send(&[0; 60], Offload::default()),
            Err(SendError::Closed)
        );
    }

    use crate::driver::SendError;

    #[test]
    fn a_program_that_ends_is_quoted() {
        let mut config = PasstConfig::new("/nonexistent/passt.sock");
        config.program = PathBuf::from("ls");
        let error = spawn(&config).unwrap_err().to_string();
        assert!(
            error.contains("ended with") && error.contains("ls"),
            "{error}"
        );
        assert!(!error.contains('\n'));
    }

    #[test]
    fn a_missing_program_is_explained() {
        let mut config = PasstConfig::new("/nonexistent/passt.sock");
        config.program = PathBuf::from("/nonexistent/passt");
        let error = spawn(&config).unwrap_err().to_string();
        assert!(error.contains("install passt"), "{error}");
        config.forwards = vec!["127.0.0.1:8080:80".parse().unwrap()];
        assert!(
            config
                .arguments()
                .windows(2)
                .any(|w| w == ["--tcp-ports", "127.0.0.1/8080:80"])
        );
    }
}
