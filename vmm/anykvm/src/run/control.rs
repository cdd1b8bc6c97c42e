//! What the default guest's `/init` reports: lines on a channel of its own.

use std::io::{BufRead, BufReader, PipeReader, Read};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::input::Gate;

/// Longest report; the guest may send anything.
const MAX_LINE: u64 = 4096;

/// What was reported in the course of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reports {
    /// `/init` got as far as starting the shell or command.
    pub ready: bool,
    /// How that ended.
    pub exit_code: Option<u8>,
    /// Why it could not be started.
    pub failure: Option<String>,
}

impl Reports {
    fn take(&mut self, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "ready" => self.ready = true,
            "exit" => self.exit_code = rest.parse().ok().or(self.exit_code),
            "failed" => self.failure = Some(rest.to_owned()),
            _ => log::warn!(
                "the guest reports something unknown: {}",
                line.escape_debug()
            ),
        }
    }
}

/// Reads reports until the channel's other end is closed, and opens the gate at `ready`.
pub fn start(channel: PipeReader, gate: Arc<Gate>) -> std::io::Result<JoinHandle<Reports>> {
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            let mut reports = Reports::default();
            let mut channel = BufReader::new(channel);
            loop {
                let mut line = Vec::new();
                match channel.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return reports,
                    Ok(_) => {}
                }
                let line = String::from_utf8_lossy(&line);
                log::debug!("the guest reports: {}", line.trim().escape_debug());
                reports.take(line.trim());
                if reports.ready {
                    gate.open();
                }
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn reports_are_read_past_nonsense() {
        let (channel, mut guest) = std::io::pipe().unwrap();
        let thread = start(channel, Arc::default()).unwrap();
        guest
            .write_all(b"ready\r\n\xff\xfe\nexit 300\nexit 3\n")
            .unwrap();
        guest.write_all(&[b'x'; 10_000]).unwrap();
        guest.write_all(b"\nfailed no device").unwrap();
        drop(guest);
        let reports = thread.join().unwrap();
        assert_eq!(
            reports,
            Reports {
                ready: true,
                exit_code: Some(3),
                failure: Some("no device".into())
            }
        );
    }
}
