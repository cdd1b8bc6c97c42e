//! A guest whose console is on pipes: the test types and reads.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What went wrong with a guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was waited for did not come.
    #[error("no {what} within {seconds} s; the last output was: {tail}")]
    Silence {
        /// What should have come.
        what: String,
        /// How long that was waited for.
        seconds: u64,
        /// The end of what came.
        tail: String,
    },
    /// The program ended instead.
    #[error("{what} did not come before the end ({end}); the last output was: {tail}")]
    Ended {
        /// What should have come.
        what: String,
        /// How the program ended.
        end: String,
        /// The end of what came.
        tail: String,
    },
    /// The program cannot be started or talked to.
    #[error("cannot run anykvm: {0}")]
    Host(#[from] std::io::Error),
    /// The guest answered something that is wrong.
    #[error("{0}")]
    Wrong(String),
}

/// A running program. It is killed with the value.
pub struct Session {
    child: Child,
    input: Option<ChildStdin>,
    output: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    /// Everything before is answered.
    read_to: usize,
    commands: usize,
}

impl Session {
    /// Starts `command` with its streams on pipes; both outputs go into one.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self, Error> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (sender, output) = channel();
        let streams: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|s| Box::new(s) as _),
            child.stderr.take().map(|s| Box::new(s) as _),
        ];
        for mut stream in streams.into_iter().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if sender.send(buffer[..length].to_vec()).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self {
            input: child.stdin.take(),
            child,
            output,
            seen: Vec::new(),
            read_to: 0,
            commands: 0,
        })
    }

    /// Whether the program has not ended.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Takes what has come and gives the length of all output so far.
    pub fn drained(&mut self) -> usize {
        while let Ok(bytes) = self.output.try_recv() {
            self.seen.extend(bytes);
        }
        self.seen.len()
    }

    /// Takes what has come as read.
    pub fn skip(&mut self) {
        self.read_to = self.drained();
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        crate::program::send(&self.child, signal);
    }

    /// All output so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    fn tail(&self) -> String {
        let start = self.seen.len().saturating_sub(1500);
        format!("[{}]", self.seen[start..].escape_ascii())
    }

    /// Waits for `text` in the output after what was read before, and returns what precedes it.
    ///
    /// # Errors
    /// If it does not come within `limit`.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String, Error> {
        let deadline = Instant::now() + limit;
        let mut from = self.read_to;
        loop {
            let found = self.seen[from..]
                .windows(text.len())
                .position(|window| window == text.as_bytes());
            if let Some(at) = found.map(|at| from + at) {
                let before = String::from_utf8_lossy(&self.seen[self.read_to..at]).into_owned();
                self.read_to = at + text.len();
                return Ok(before);
            }
            from = self.read_to.max(self.seen.len().saturating_sub(text.len()));
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::Silence {
                        what: text.to_owned(),
                        seconds: limit.as_secs(),
                        tail: self.tail(),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Ended {
                        what: text.to_owned(),
                        end: format!("{:?}", self.child.wait()?),
                        tail: self.tail(),
                    });
                }
            }
        }
    }

    /// Types `text`.
    ///
    /// # Errors
    /// If nobody reads it.
    pub fn type_in(&mut self, text: &str) -> Result<(), Error> {
        if let Some(input) = &mut self.input {
            input.write_all(text.as_bytes())?;
            input.flush()?;
        }
        Ok(())
    }

    /// Runs a command in the guest's shell, which must not echo what is typed; returns its output, trimmed.
    ///
    /// # Errors
    /// If it fails, or does not end within `limit`.
    pub fn command(&mut self, command: &str, limit: Duration) -> Result<String, Error> {
        self.commands += 1;
        let mark = format!("end-{}", self.commands);
        // The mark is put together by the shell, so that an echo of this line is not taken for it.
        self.type_in(&format!(
            "{command}\necho \"<en\"\"d-{}:$?>\"\n",
            self.commands
        ))?;
        let output = self.expect(&format!("<{mark}:"), limit)?;
        let status = self.expect(">", limit)?;
        if status != "0" {
            return Err(Error::Wrong(format!(
                "'{command}' failed with {status}: {}",
                output.trim()
            )));
        }
        Ok(output.replace('\r', "").trim().to_owned())
    }

    /// Waits for the program's end. `None` as the exit code: it was killed by a signal.
    ///
    /// # Errors
    /// If it does not end within `limit`.
    pub fn end(&mut self, limit: Duration) -> Result<Option<i32>, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::Silence {
                        what: "end of the run".into(),
                        seconds: limit.as_secs(),
                        tail: self.tail(),
                    });
                }
            }
        }
        // Its outputs are closed; the process is about to be gone.
        while Instant::now() < deadline + Duration::from_secs(5) {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(Error::Wrong(
            "the process is still there after it closed its output".into(),
        ))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
