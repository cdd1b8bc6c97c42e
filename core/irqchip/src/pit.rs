//! The 8254 interval timer and the speaker port 0x61, with KVM's re-injection of missed ticks.

mod channel;

use channel::{Channel, counts_in};

/// Input clock in Hz.
pub const FREQUENCY: u64 = 1_193_182;
/// Ports of the PIT proper.
pub const PORTS: core::ops::RangeInclusive<u16> = 0x40..=0x43;
/// The speaker port (`KVM_PIT_SPEAKER_DUMMY`).
pub const SPEAKER_PORT: u16 = 0x61;
/// `KVM_PIT_FLAGS_HPET_LEGACY`: channel 0 is disconnected.
pub const FLAG_HPET_LEGACY: u32 = 1;
/// `KVM_PIT_FLAGS_SPEAKER_DATA_ON`.
pub const FLAG_SPEAKER_DATA_ON: u32 = 2;

const NS_PER_SEC: u64 = 1_000_000_000;
/// Shortest period of channel 0's interrupt, 200 µs in counts: KVM's `min_timer_period_us`.
const MIN_PERIOD: u64 = 239;

/// `a * b / c`, with `b` and `c` below 2^31 so that only the quotient can saturate. (The kernel
/// has no 128-bit division.)
fn mul_div(a: u64, b: u64, c: u64) -> u64 {
    (a / c).saturating_mul(b).saturating_add(a % c * b / c)
}

/// The nanosecond by which `counts` input clocks have certainly passed.
fn ns_of(counts: u64) -> u64 {
    mul_div(counts, NS_PER_SEC, FREQUENCY).saturating_add(1)
}

/// The fields of `struct kvm_pit_channel_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the uapi structure")]
pub struct PitChannelState {
    pub count: u32,
    pub latched_count: u16,
    pub count_latched: u8,
    pub status_latched: u8,
    pub status: u8,
    pub read_state: u8,
    pub write_state: u8,
    pub write_latch: u8,
    pub rw_mode: u8,
    pub mode: u8,
    pub bcd: u8,
    pub gate: u8,
    pub count_load_time: i64,
}

/// The fields of `struct kvm_pit_state2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the uapi structure")]
pub struct PitState {
    pub channels: [PitChannelState; 3],
    pub flags: u32,
}

/// The timer. `now_ns` is monotonic; the PIT assumes nothing about its origin.
#[derive(Clone, Debug)]
pub struct Pit {
    channels: [Channel; 3],
    flags: u32,
    /// Whether channel 0's interrupt runs: a count has been loaded.
    armed: bool,
    /// Expiries of channel 0 since its count was loaded.
    ticks: u64,
    reinject: bool,
    /// Ticks the guest has not acknowledged, the one under way included.
    pending: u32,
    /// The guest acknowledged the last tick, so that the next may be given.
    acked: bool,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// The reset state: every counter loaded with 65536 and in no mode yet; ticks are re-injected,
    /// as `KVM_CREATE_PIT2` has it.
    pub fn new() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            flags: 0,
            armed: false,
            ticks: 0,
            reinject: true,
            pending: 0,
            acked: true,
        }
    }

    /// A byte read of port 0x40-0x43 or 0x61; others read as all ones.
    pub fn port_read(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            0x40..=0x42 => match self.channels.get_mut(usize::from(port & 3)) {
                Some(channel) => channel.read(now_ns),
                None => 0xff,
            },
            // The control word cannot be read; KVM leaves the data zero.
            0x43 => 0,
            SPEAKER_PORT => self.read_speaker(now_ns),
            _ => 0xff,
        }
    }

    /// A byte write to port 0x40-0x43 or 0x61; others are ignored. Returns whether
    /// [`Pit::next_irq_deadline_ns`] may have changed.
    pub fn port_write(&mut self, port: u16, value: u8, now_ns: u64) -> bool {
        match port {
            0x40..=0x42 => self.write_counter(usize::from(port & 3), value, now_ns),
            0x43 => self.write_control(value, now_ns),
            SPEAKER_PORT => {
                self.flags &= !FLAG_SPEAKER_DATA_ON;
                self.flags |= u32::from(value) & FLAG_SPEAKER_DATA_ON;
                self.channels[2].set_gate(value & 1 != 0, now_ns);
                false
            }
            _ => false,
        }
    }

    fn read_speaker(&self, now_ns: u64) -> u8 {
        let speaker = &self.channels[2];
        // Bit 4 toggles with DRAM refresh, about every 15 µs.
        let refresh = (now_ns >> 14) as u8 & 1;
        speaker.regs.gate & 1
            | (self.flags & FLAG_SPEAKER_DATA_ON) as u8
            | refresh << 4
            | u8::from(speaker.output(now_ns)) << 5
    }

    fn write_counter(&mut self, index: usize, value: u8, now_ns: u64) -> bool {
        let Some(channel) = self.channels.get_mut(index) else {
            return false;
        };
        let Some(count) = channel.write(value) else {
            return false;
        };
        // The gate of channel 0 is tied high and never gives mode 1 its trigger; KVM starts at
        // the load instead.
        channel.load(count, index == 0, now_ns);
        if index == 0 {
            self.start_irq();
        }
        index == 0
    }

    fn write_control(&mut self, value: u8, now_ns: u64) -> bool {
        let index = usize::from(value >> 6);
        if index == 3 {
            for (i, channel) in self.channels.iter_mut().enumerate() {
                if value & (2 << i) == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    channel.latch_count(now_ns);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(now_ns);
                }
            }
            return false;
        }
        if let Some(channel) = self.channels.get_mut(index) {
            if value & 0x30 == 0 {
                channel.latch_count(now_ns);
                return false;
            }
            channel.control(value, now_ns);
        }
        if index == 0 {
            self.armed = false;
        }
        index == 0
    }

    fn start_irq(&mut self) {
        self.armed = true;
        self.ticks = 0;
        self.reset_reinjection();
    }

    fn reset_reinjection(&mut self) {
        self.pending = 0;
        self.acked = true;
    }

    /// Counts between interrupts of channel 0 and whether it is periodic; `None` if it gives none.
    fn irq_period(&self) -> Option<(u64, bool)> {
        if !self.armed || self.flags & FLAG_HPET_LEGACY != 0 {
            return None;
        }
        let count = self.channels[0].initial();
        match self.channels[0].regs.mode {
            0 | 1 | 4 => (self.ticks == 0).then_some((count, false)),
            2 | 3 => Some((count.max(MIN_PERIOD), true)),
            _ => None,
        }
    }

    fn loaded_ns(&self) -> u64 {
        u64::try_from(self.channels[0].regs.count_load_time).unwrap_or(0)
    }

    /// When to call [`Pit::expire`] next.
    pub fn next_irq_deadline_ns(&self) -> Option<u64> {
        let (period, _) = self.irq_period()?;
        let counts = period.saturating_mul(self.ticks.saturating_add(1));
        Some(self.loaded_ns().saturating_add(ns_of(counts)))
    }

    /// Accounts for the expiries up to `now_ns`; returns how many pulses to give the GSI of IRQ 0
    /// now, 0 or 1. With re-injection, further ones follow by [`Pit::ack`]; without, ticks that
    /// were missed are lost.
    pub fn expire(&mut self, now_ns: u64) -> u32 {
        let Some((period, periodic)) = self.irq_period() else {
            return 0;
        };
        let elapsed = counts_in(now_ns.saturating_sub(self.loaded_ns())) / period;
        let total = if periodic { elapsed } else { elapsed.min(1) };
        let new = total.saturating_sub(self.ticks);
        if new == 0 {
            return 0;
        }
        self.ticks = total;
        if !self.reinject {
            return 1;
        }
        let new = u32::try_from(new).unwrap_or(u32::MAX);
        self.pending = self.pending.saturating_add(new).min(i32::MAX as u32);
        core::mem::take(&mut self.acked).into()
    }

    /// The guest acknowledged IRQ 0 (EOI at the PIC or IOAPIC). True if a missed tick is to be
    /// given now: pulse the GSI again.
    pub fn ack(&mut self) -> bool {
        if !self.reinject {
            return false;
        }
        self.pending = self.pending.saturating_sub(1);
        self.acked = self.pending == 0;
        !self.acked
    }

    /// IRQ 0 was unmasked at the PIC or IOAPIC: ticks missed while masked are forgotten.
    pub fn unmasked(&mut self) {
        self.reset_reinjection();
    }

    /// `KVM_REINJECT_CONTROL`: whether missed ticks are given later.
    pub fn set_reinject(&mut self, reinject: bool) {
        if reinject && !self.reinject {
            self.reset_reinjection();
        }
        self.reinject = reinject;
    }

    /// The state for `KVM_GET_PIT2`.
    pub fn state(&self) -> PitState {
        PitState {
            channels: self.channels.map(|channel| channel.regs),
            flags: self.flags,
        }
    }

    /// Restores a state (`KVM_SET_PIT2`); as in KVM, channel 0 starts its period anew at `now_ns`.
    pub fn set_state(&mut self, state: &PitState, now_ns: u64) {
        self.channels = state.channels.map(|regs| Channel::restore(&regs, now_ns));
        self.flags = state.flags & (FLAG_HPET_LEGACY | FLAG_SPEAKER_DATA_ON);
        self.channels[0].restart(now_ns);
        self.start_irq();
    }
}
