//! A small debugger: the client's side of GDB's remote serial protocol (GDB manual, "GDB Remote
//! Serial Protocol"), as far as the tests need it.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::error::{Error, Result, ensure, wrong};

/// Where RIP is in the answer to `g`: after sixteen general registers.
const RIP: usize = 16;

/// Kinds of breakpoints, with the protocol's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The stub replaces the instruction.
    Software = 0,
    /// A debug register on the instruction.
    Hardware = 1,
    /// A debug register on writes.
    Write = 2,
}

/// A connection to QEMU's stub. The guest stops when it is made.
pub struct Debugger {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Debugger {
    /// Connects to the stub's socket.
    ///
    /// # Errors
    /// If nobody answers.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut debugger = Self {
            stream,
            buffer: Vec::new(),
        };
        // QEMU reports the stop that the connection makes, before the first answer or not at all.
        debugger.send("qSupported:hwbreak+;swbreak+")?;
        while !debugger.receive()?.contains("PacketSize") {}
        debugger.ask("?")?;
        Ok(debugger)
    }

    fn send(&mut self, text: &str) -> Result {
        let sum = text.bytes().fold(0u8, u8::wrapping_add);
        self.stream
            .write_all(format!("${text}#{sum:02x}").as_bytes())?;
        Ok(())
    }

    fn receive(&mut self) -> Result<String> {
        loop {
            let start = self.buffer.iter().position(|&byte| byte == b'$');
            let end = start.and_then(|start| {
                let length = self.buffer[start..].iter().position(|&b| b == b'#')?;
                (self.buffer.len() >= start + length + 3).then_some(start + length)
            });
            if let (Some(start), Some(end)) = (start, end) {
                let text = String::from_utf8_lossy(&self.buffer[start + 1..end]).into_owned();
                self.buffer.drain(..end + 3);
                self.stream.write_all(b"+")?;
                return Ok(text);
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return wrong("the gdb stub closed the connection"),
                Ok(length) => self.buffer.extend(&bytes[..length]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    return wrong("the gdb stub does not answer");
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends a packet and gives the answer.
    ///
    /// # Errors
    /// If none comes.
    pub fn ask(&mut self, text: &str) -> Result<String> {
        self.send(text)?;
        self.receive()
    }

    fn told(&mut self, text: &str) -> Result {
        let answer = self.ask(text)?;
        ensure(answer == "OK", || {
            format!("the gdb stub says '{answer}' to '{text}'")
        })
    }

    /// Sets a breakpoint at `address`; `size` is 1 for code.
    ///
    /// # Errors
    /// If the stub refuses it.
    pub fn set(&mut self, point: Point, address: u64, size: u32) -> Result {
        self.told(&format!("Z{},{address:x},{size}", point as u32))
    }

    /// Removes a breakpoint.
    ///
    /// # Errors
    /// If the stub refuses it.
    pub fn clear(&mut self, point: Point, address: u64, size: u32) -> Result {
        self.told(&format!("z{},{address:x},{size}", point as u32))
    }

    /// Lets the guest run, without waiting.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn go_on(&mut self) -> Result {
        self.send("c")
    }

    /// Waits until the guest stops, and looks at the thread that stopped it from then on.
    ///
    /// # Errors
    /// If it does not, or for another reason than a trap.
    pub fn stopped(&mut self) -> Result<String> {
        let reply = self.receive()?;
        ensure(reply.starts_with("T05"), || {
            format!("the guest stopped with '{reply}', not with a trap")
        })?;
        if let Some(thread) = reply
            .split_once("thread:")
            .and_then(|(_, rest)| rest.split(';').next())
        {
            let thread = thread.to_owned();
            self.told(&format!("Hg{thread}"))?;
            self.told(&format!("Hc{thread}"))?;
        }
        Ok(reply)
    }

    /// Executes one instruction.
    ///
    /// # Errors
    /// If the guest does not stop after it.
    pub fn step(&mut self) -> Result {
        self.send("s")?;
        self.stopped().map(|_| ())
    }

    /// The general registers in the protocol's order, then RIP.
    ///
    /// # Errors
    /// If the stub does not give them.
    pub fn registers(&mut self) -> Result<Vec<u64>> {
        let bytes = from_hex(&self.ask("g")?)?;
        ensure(bytes.len() >= (RIP + 1) * 8, || {
            "the stub gives too few registers".into()
        })?;
        Ok(bytes[..(RIP + 1) * 8]
            .chunks_exact(8)
            .map(|chunk| {
                chunk
                    .iter()
                    .rev()
                    .fold(0, |sum, &b| sum << 8 | u64::from(b))
            })
            .collect())
    }

    /// Where the guest is.
    ///
    /// # Errors
    /// As [`Debugger::registers`].
    pub fn rip(&mut self) -> Result<u64> {
        Ok(self.registers()?[RIP])
    }

    /// Reads guest memory.
    ///
    /// # Errors
    /// If it is not mapped.
    pub fn read(&mut self, address: u64, length: usize) -> Result<Vec<u8>> {
        from_hex(&self.ask(&format!("m{address:x},{length:x}"))?)
    }

    /// Writes guest memory.
    ///
    /// # Errors
    /// If it is not mapped.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.told(&format!("M{address:x},{:x}:{hex}", bytes.len()))
    }

    /// Leaves; the guest goes on.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn detach(mut self) -> Result {
        self.told("D")
    }
}

fn from_hex(text: &str) -> Result<Vec<u8>> {
    (0..text.len() / 2)
        .map(|at| {
            text.get(at * 2..at * 2 + 2)
                .and_then(|digits| u8::from_str_radix(digits, 16).ok())
                .ok_or_else(|| Error::Wrong(format!("the gdb stub answers '{text}'")))
        })
        .collect()
}
