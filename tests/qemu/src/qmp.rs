//! A client of the QEMU Machine Protocol: commands and events as lines of JSON on a UNIX socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Error, Result, wrong};

/// The longest time for an answer to a command.
const ANSWER: Duration = Duration::from_secs(60);

/// A connection to one QEMU.
pub struct Qmp {
    stream: UnixStream,
    lines: Receiver<Value>,
    /// Events that came while something else was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects to the socket at `path`, which QEMU makes soon after its start; `alive` says whether
    /// it is still worth waiting.
    ///
    /// # Errors
    /// If nobody answers there.
    pub fn connect(path: &Path, limit: Duration, mut alive: impl FnMut() -> bool) -> Result<Self> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() > deadline || !alive() => {
                    return wrong(format!("QEMU's monitor does not answer: {e}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let (sender, lines) = channel();
        let reader = BufReader::new(stream.try_clone()?);
        std::thread::spawn(move || {
            for line in reader.lines().map_while(std::result::Result::ok) {
                let Ok(value) = serde_json::from_str(&line) else {
                    continue;
                };
                if sender.send(value).is_err() {
                    return;
                }
            }
        });
        let mut qmp = Self {
            stream,
            lines,
            events: Vec::new(),
        };
        qmp.next(Instant::now() + limit, "greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn next(&mut self, deadline: Instant, what: &str) -> Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.lines.recv_timeout(left).map_err(|e| {
            Error::Wrong(match e {
                RecvTimeoutError::Timeout => format!("QEMU's monitor does not give its {what}"),
                RecvTimeoutError::Disconnected => {
                    format!("QEMU ended or closed its monitor before its {what}")
                }
            })
        })
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// If QEMU refuses it or does not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut text = json!({ "execute": command, "arguments": arguments }).to_string();
        text.push('\n');
        self.stream.write_all(text.as_bytes())?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let mut value = self.next(deadline, &format!("answer to {command}"))?;
            if value.get("event").is_some() {
                self.events.push(value);
            } else if let Some(error) = value.get("error") {
                return wrong(format!("{command}: {}", error["desc"]));
            } else if let Some(answer) = value.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    /// Runs a line of the human monitor and gives what it prints.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn human(&mut self, line: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().replace('\r', ""))
    }

    /// Waits for the event `name`, also one that came before, and gives its data.
    ///
    /// # Errors
    /// If it does not come.
    pub fn event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at)["data"].take());
            }
            let value = self.next(deadline, &format!("event {name}"))?;
            self.events.push(value);
        }
    }

    /// Forgets the events so far.
    pub fn forget(&mut self) {
        self.events.clear();
        while let Ok(value) = self.lines.try_recv() {
            let _ = value;
        }
    }

    /// Asks `query` until `done` likes the answer.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn until(
        &mut self,
        query: &str,
        limit: Duration,
        mut done: impl FnMut(&Value) -> Result<bool>,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let value = self.execute(query, json!({}))?;
            if done(&value)? {
                return Ok(value);
            }
            if Instant::now() > deadline {
                return wrong(format!("{query} still says {value}"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
