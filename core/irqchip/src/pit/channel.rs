//! One counter of the 8254.

use super::{FREQUENCY, NS_PER_SEC, PitChannelState, mul_div};

const LSB: u8 = 1;
const MSB: u8 = 2;
const WORD0: u8 = 3;
const WORD1: u8 = 4;

/// Load time of a counter in mode 1 or 5 that waits for its trigger.
const UNTRIGGERED: i64 = i64::MIN;

/// Whole input clocks in `ns`.
pub(super) fn counts_in(ns: u64) -> u64 {
    mul_div(ns, FREQUENCY, NS_PER_SEC)
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Channel {
    pub(super) regs: PitChannelState,
    /// When a low gate stopped the counter.
    stopped_ns: Option<u64>,
}

impl Channel {
    pub(super) fn new(gate: bool) -> Self {
        let regs = PitChannelState {
            mode: 0xff,
            gate: gate.into(),
            count: 0x10000,
            ..Default::default()
        };
        Self {
            regs,
            stopped_ns: None,
        }
    }

    pub(super) fn restore(regs: &PitChannelState, now_ns: u64) -> Self {
        let mut channel = Self {
            regs: *regs,
            stopped_ns: None,
        };
        if regs.gate == 0 && !channel.is_triggered() {
            channel.stopped_ns = Some(now_ns);
        }
        channel
    }

    /// Modes 1 and 5 start at a rising gate; in the others the gate enables counting.
    fn is_triggered(&self) -> bool {
        matches!(self.regs.mode, 1 | 5)
    }

    pub(super) fn elapsed(&self, now_ns: u64) -> u64 {
        match self.regs.count_load_time {
            UNTRIGGERED => u64::MAX / 4,
            loaded => {
                let now_ns = self.stopped_ns.unwrap_or(now_ns);
                counts_in(now_ns.saturating_sub(u64::try_from(loaded).unwrap_or(0)))
            }
        }
    }

    /// The initial count, 1 to 65536: zero stands for the largest.
    pub(super) fn initial(&self) -> u64 {
        match self.regs.count {
            0 => self.modulus(),
            count => count.min(0x10000).into(),
        }
    }

    /// Counts after which the counting element comes round.
    fn modulus(&self) -> u64 {
        if self.regs.bcd != 0 { 10_000 } else { 0x10000 }
    }

    fn current(&self, now_ns: u64) -> u16 {
        let (initial, elapsed) = (self.initial(), self.elapsed(now_ns));
        let count = match self.regs.mode {
            2 => initial - elapsed % initial,
            // Counts down by two.
            3 => initial - elapsed.wrapping_mul(2) % initial,
            _ => {
                let modulus = self.modulus();
                (initial % modulus + modulus - elapsed % modulus) % modulus
            }
        };
        if self.regs.bcd != 0 {
            to_bcd(count)
        } else {
            count as u16
        }
    }

    /// The OUT pin.
    pub(super) fn output(&self, now_ns: u64) -> bool {
        let (initial, elapsed) = (self.initial(), self.elapsed(now_ns));
        match self.regs.mode {
            0 | 1 => elapsed >= initial,
            2 | 3 if self.stopped_ns.is_some() => true,
            // Low for the last count of each period.
            2 => elapsed % initial != initial - 1,
            3 => elapsed % initial < initial.div_ceil(2),
            // A strobe, low for one count.
            _ => elapsed != initial,
        }
    }

    /// Loads a count and starts counting, in modes 1 and 5 only if `trigger`.
    pub(super) fn load(&mut self, value: u16, trigger: bool, now_ns: u64) {
        let count = if self.regs.bcd != 0 {
            from_bcd(value)
        } else {
            value.into()
        };
        self.regs.count = if count == 0 {
            self.modulus() as u32
        } else {
            count
        };
        if trigger || !self.is_triggered() {
            self.restart(now_ns);
        }
    }

    pub(super) fn restart(&mut self, now_ns: u64) {
        self.regs.count_load_time = i64::try_from(now_ns).unwrap_or(i64::MAX);
        self.stopped_ns = self.stopped_ns.map(|_| now_ns);
    }

    pub(super) fn set_gate(&mut self, gate: bool, now_ns: u64) {
        let was = self.regs.gate != 0;
        self.regs.gate = gate.into();
        if was == gate {
            return;
        }
        if !gate {
            self.stopped_ns = (!self.is_triggered()).then_some(now_ns);
            return;
        }
        let stopped = self.stopped_ns.take();
        match self.regs.mode {
            1 | 2 | 3 | 5 => self.restart(now_ns),
            _ => {
                let pause = now_ns.saturating_sub(stopped.unwrap_or(now_ns));
                let pause = i64::try_from(pause).unwrap_or(i64::MAX);
                self.regs.count_load_time = self.regs.count_load_time.saturating_add(pause);
            }
        }
    }

    pub(super) fn latch_count(&mut self, now_ns: u64) {
        if self.regs.count_latched == 0 {
            self.regs.latched_count = self.current(now_ns);
            self.regs.count_latched = self.regs.rw_mode;
        }
    }

    pub(super) fn latch_status(&mut self, now_ns: u64) {
        if self.regs.status_latched == 0 {
            self.regs.status = u8::from(self.output(now_ns)) << 7
                | (self.regs.rw_mode & 3) << 4
                | (self.regs.mode & 7) << 1
                | self.regs.bcd & 1;
            self.regs.status_latched = 1;
        }
    }

    pub(super) fn read(&mut self, now_ns: u64) -> u8 {
        if self.regs.status_latched != 0 {
            self.regs.status_latched = 0;
            return self.regs.status;
        }
        if self.regs.count_latched != 0 {
            let [low, high] = self.regs.latched_count.to_le_bytes();
            let (byte, next) = match self.regs.count_latched {
                WORD0 => (low, MSB),
                MSB => (high, 0),
                _ => (low, 0),
            };
            self.regs.count_latched = next;
            return byte;
        }
        let [low, high] = self.current(now_ns).to_le_bytes();
        match self.regs.read_state {
            WORD0 => {
                self.regs.read_state = WORD1;
                low
            }
            WORD1 => {
                self.regs.read_state = WORD0;
                high
            }
            MSB => high,
            _ => low,
        }
    }

    /// Takes a byte written to the counter; the whole count once it is complete.
    pub(super) fn write(&mut self, value: u8) -> Option<u16> {
        match self.regs.write_state {
            LSB => Some(value.into()),
            MSB => Some(u16::from(value) << 8),
            WORD0 => {
                self.regs.write_latch = value;
                self.regs.write_state = WORD1;
                None
            }
            WORD1 => {
                self.regs.write_state = WORD0;
                Some(u16::from_le_bytes([self.regs.write_latch, value]))
            }
            _ => None,
        }
    }

    /// A control word that selects access and mode. With an output that needs a trigger, the
    /// counter waits for it.
    pub(super) fn control(&mut self, value: u8, now_ns: u64) {
        let access = value >> 4 & 3;
        let regs = &mut self.regs;
        regs.rw_mode = access;
        regs.read_state = access;
        regs.write_state = access;
        regs.count_latched = 0;
        regs.status_latched = 0;
        regs.mode = value >> 1 & 7;
        if regs.mode > 5 {
            regs.mode -= 4;
        }
        regs.bcd = value & 1;
        if self.is_triggered() {
            self.regs.count_load_time = UNTRIGGERED;
            self.stopped_ns = None;
        } else {
            if self.regs.gate == 0 {
                self.stopped_ns = Some(now_ns);
            }
            // OUT takes its initial level at once, before the count is written.
            self.restart(now_ns);
        }
    }
}

fn to_bcd(count: u64) -> u16 {
    let digit = |unit: u64| (count / unit % 10) as u16;
    digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)
}

fn from_bcd(value: u16) -> u32 {
    let digit = |shift: u16| u32::from(value >> shift & 0xf);
    digit(12) * 1000 + digit(8) * 100 + digit(4) * 10 + digit(0)
}
