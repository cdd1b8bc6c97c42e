//! The accesses of the instruction in flight that somebody had to answer.
//!
//! An instruction whose access user space must answer does not retire: it is executed again when
//! the answer is there. Accesses that it made before were answered already and must not happen
//! twice. So every access outside RAM is remembered with its answer, in order, and executing the
//! instruction again plays them back.

use alloc::vec::Vec;

/// An instruction with more accesses than that (XSAVE to MMIO makes 512) is not served.
const MAX_ACCESSES: usize = 1024;

/// What an access does, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// IN from a port.
    In(u16),
    /// OUT to a port.
    Out(u16),
    /// A read at a guest-physical address.
    Read(u64),
    /// A write at a guest-physical address.
    Write(u64),
    /// RDMSR.
    Rdmsr(u32),
    /// WRMSR.
    Wrmsr(u32),
    /// An MSR access that user space has refused: #GP.
    MsrFault,
}

impl Op {
    /// Whether user space gives data back.
    pub fn reads(self) -> bool {
        matches!(self, Op::In(_) | Op::Read(_) | Op::Rdmsr(_))
    }
}

#[derive(Clone, Copy, Debug)]
struct Access {
    op: Op,
    len: u8,
    data: [u8; 8],
}

/// The access that user space is asked to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// What and where.
    pub op: Op,
    /// Bytes, at most 8.
    pub len: u8,
    /// How many elements of `len` bytes: more than one only for INS.
    pub count: u16,
    /// CS base + RIP of the instruction: if user space moves it elsewhere, the access is void.
    pub linear_rip: u64,
}

/// Elements that INS has read from a port.
#[derive(Debug)]
struct Input {
    port: u16,
    size: usize,
    data: Vec<u8>,
}

/// The accesses of the instruction in flight.
#[derive(Debug, Default)]
pub struct InFlight {
    done: Vec<Access>,
    cursor: usize,
    /// What INS has read, for one execution of it.
    input: Option<Input>,
    /// Asked of user space, not answered yet.
    pub pending: Option<Pending>,
}

impl InFlight {
    /// The instruction has made no access yet.
    pub fn is_empty(&self) -> bool {
        self.done.is_empty() && self.input.is_none()
    }

    /// What the next access was, if it was made before.
    pub fn next(&self) -> Option<Op> {
        self.done.get(self.cursor).map(|access| access.op)
    }

    /// The next access was made before: its data.
    pub fn recall(&mut self, op: Op, len: usize) -> Option<[u8; 8]> {
        let access = self.done.get(self.cursor)?;
        if access.op == op && usize::from(access.len) == len {
            self.cursor += 1;
            return Some(access.data);
        }
        // The instruction takes another course than the first time; what it did then is history.
        self.done.truncate(self.cursor);
        None
    }

    /// Remembers an access that has been made. `false`: too many, or no memory.
    #[must_use]
    pub fn record(&mut self, op: Op, data: &[u8]) -> bool {
        if self.done.len() >= MAX_ACCESSES || self.done.try_reserve(1).is_err() {
            return false;
        }
        let mut bytes = [0; 8];
        let len = data.len().min(8);
        bytes[..len].copy_from_slice(&data[..len]);
        self.done.push(Access {
            op,
            len: len as u8,
            data: bytes,
        });
        self.cursor = self.done.len();
        true
    }

    /// Remembers what INS has read from `port`; `fill` writes it. `false`: no memory.
    #[must_use]
    pub fn record_input(
        &mut self,
        port: u16,
        size: usize,
        count: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        let bytes = size * count;
        let mut data = Vec::new();
        if data.try_reserve_exact(bytes).is_err() {
            return false;
        }
        data.resize(bytes, 0);
        fill(&mut data);
        self.input = Some(Input { port, size, data });
        true
    }

    /// INS has read already: fills `data` and says how many elements there are. More than there is room
    /// for are lost, as the instruction has changed its mind about how many it wants.
    pub fn recall_input(&mut self, port: u16, size: usize, data: &mut [u8]) -> Option<usize> {
        let input = self.input.as_ref()?;
        if input.port != port || input.size != size {
            self.input = None;
            return None;
        }
        let n = (data.len() / size).min(input.data.len() / size);
        data[..n * size].copy_from_slice(&input.data[..n * size]);
        Some(n)
    }

    /// The instruction is about to be executed again.
    pub fn rewind(&mut self) {
        self.cursor = 0;
    }

    /// The instruction is history.
    pub fn clear(&mut self) {
        self.done.clear();
        self.cursor = 0;
        self.input = None;
        self.pending = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plays_back_in_order() {
        let mut f = InFlight::default();
        assert!(f.recall(Op::Read(0x10), 4).is_none());
        assert!(f.record(Op::Read(0x10), &[1, 2, 3, 4]));
        assert!(f.record(Op::Write(0x20), &[9]));
        f.rewind();
        assert_eq!(f.recall(Op::Read(0x10), 4).unwrap()[..4], [1, 2, 3, 4]);
        assert!(f.recall(Op::Write(0x20), 1).is_some());
        assert!(f.recall(Op::In(1), 1).is_none());
        f.clear();
        f.rewind();
        assert!(f.recall(Op::Read(0x10), 4).is_none());
    }

    #[test]
    fn another_course_forgets_the_rest() {
        let mut f = InFlight::default();
        assert!(f.record(Op::In(1), &[1]));
        assert!(f.record(Op::In(2), &[2]));
        f.rewind();
        assert!(f.recall(Op::In(3), 1).is_none());
        assert!(f.record(Op::In(3), &[3]));
        f.rewind();
        assert_eq!(f.recall(Op::In(3), 1).unwrap()[0], 3);
        assert!(f.recall(Op::In(2), 1).is_none());
    }

    #[test]
    fn input_of_a_string() {
        let mut f = InFlight::default();
        let mut data = [0; 8];
        assert!(f.recall_input(0x80, 2, &mut data).is_none());
        assert!(f.record_input(0x80, 2, 3, |d| d.copy_from_slice(&[1, 2, 3, 4, 5, 6])));
        assert_eq!(f.recall_input(0x80, 2, &mut data), Some(3));
        assert_eq!(data, [1, 2, 3, 4, 5, 6, 0, 0]);
        assert_eq!(f.recall_input(0x80, 2, &mut data[..2]), Some(1));
        assert_eq!(f.recall_input(0x80, 1, &mut data), None);
        assert!(f.record_input(0x80, 2, 1, |_| {}));
        f.clear();
        assert_eq!(f.recall_input(0x80, 2, &mut data), None);
    }

    #[test]
    fn bounded() {
        let mut f = InFlight::default();
        for i in 0..MAX_ACCESSES as u64 {
            assert!(f.record(Op::Write(i), &[0; 8]));
        }
        assert!(!f.record(Op::Write(0), &[0]));
    }
}
