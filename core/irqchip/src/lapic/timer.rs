//! The local APIC timer (SDM, "APIC Timer").

use super::registers::*;
use super::{Lapic, Lvt, Now};

/// Shortest period of a periodic timer, KVM's `min_timer_period_us`, in nanoseconds.
const MIN_PERIOD_NS: u64 = 200_000;

/// When the timer expires, in the clock it was programmed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// Monotonic nanoseconds.
    Ns(u64),
    /// Guest TSC.
    Tsc(u64),
}

impl Deadline {
    /// The deadline in monotonic nanoseconds, rounded up, for a guest TSC of `tsc_khz`.
    pub fn to_ns(self, now: Now, tsc_khz: u32) -> u64 {
        match self {
            Self::Ns(ns) => ns,
            Self::Tsc(tsc) => {
                let khz = u64::from(tsc_khz.max(1));
                let cycles = tsc.saturating_sub(now.tsc);
                let ns = (cycles / khz)
                    .saturating_mul(1_000_000)
                    .saturating_add((cycles % khz * 1_000_000).div_ceil(khz));
                now.ns.saturating_add(ns)
            }
        }
    }
}

/// Bits 18:17 of the timer's LVT entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl Mode {
    fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// What the registers do not hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Timer {
    pub(super) mode: Mode,
    /// The next expiry of the counting modes.
    target_ns: Option<u64>,
    /// What one run of the counter takes; zero when it is stopped.
    period_ns: u64,
    /// IA32_TSC_DEADLINE; zero when disarmed.
    tsc_deadline: u64,
}

impl Lapic {
    /// Divisor of the bus clock, 1 to 128.
    fn timer_divisor(&self) -> u64 {
        let dcr = self.reg(TIMER_DIVIDE);
        let exponent = (dcr & 3 | dcr >> 1 & 4) + 1;
        1 << (exponent & 7)
    }

    fn ns_per_count(&self) -> u64 {
        u64::from(self.config.bus_cycle_ns.max(1)) * self.timer_divisor()
    }

    fn counts_to_ns(&self, counts: u32) -> u64 {
        u64::from(counts).saturating_mul(self.ns_per_count())
    }

    /// Follows a write of the timer's LVT entry. A change to or from TSC-deadline mode disarms.
    pub(super) fn update_timer_mode(&mut self) {
        let mode = Mode::from_lvt(self.reg(LVT_TIMER));
        let old = core::mem::replace(&mut self.timer.mode, mode);
        if (old == Mode::TscDeadline) != (mode == Mode::TscDeadline) {
            self.timer = Timer {
                mode,
                ..Timer::default()
            };
            self.set_reg(TIMER_INITIAL, 0);
        }
    }

    pub(super) fn stop_timer(&mut self) {
        self.timer = Timer {
            mode: self.timer.mode,
            ..Timer::default()
        };
    }

    fn period_of(&self, initial: u32) -> u64 {
        let period = self.counts_to_ns(initial);
        if self.timer.mode == Mode::Periodic && period != 0 {
            period.max(MIN_PERIOD_NS)
        } else {
            period
        }
    }

    /// A write of the initial count (re)starts the timer, except in TSC-deadline mode.
    pub(super) fn write_initial_count(&mut self, initial: u32, now: Now) {
        if self.timer.mode == Mode::TscDeadline {
            return;
        }
        self.set_reg(TIMER_INITIAL, initial);
        self.start_counting(None, now);
    }

    /// Counts down from `current`, or from the initial count.
    pub(super) fn start_counting(&mut self, current: Option<u32>, now: Now) {
        self.timer.target_ns = None;
        self.timer.period_ns = 0;
        if !matches!(self.timer.mode, Mode::OneShot | Mode::Periodic) {
            return;
        }
        let period = self.period_of(self.reg(TIMER_INITIAL));
        if period == 0 {
            return;
        }
        let first = match current {
            None => period,
            Some(0) if self.timer.mode == Mode::Periodic => period,
            // A one-shot that had run out fires at once: whether its interrupt was still to be
            // latched when the state was saved is not in the state.
            Some(count) => self.counts_to_ns(count).min(period),
        };
        self.timer.period_ns = period;
        self.timer.target_ns = Some(now.ns.saturating_add(first));
    }

    /// A write of the divide configuration rescales what is left of the current run.
    pub(super) fn write_divide(&mut self, value: u32, now: Now) {
        let old = self.timer_divisor();
        self.set_reg(TIMER_DIVIDE, value & 0xb);
        let new = self.timer_divisor();
        let Some(target) = self.timer.target_ns else {
            return;
        };
        if old == new {
            return;
        }
        self.timer.period_ns = self.period_of(self.reg(TIMER_INITIAL));
        let left = target.saturating_sub(now.ns);
        let left = (left / old)
            .saturating_mul(new)
            .saturating_add(left % old * new / old);
        self.timer.target_ns = Some(now.ns.saturating_add(left));
    }

    /// The current count, zero in TSC-deadline mode.
    pub(super) fn current_count(&self, now: Now) -> u32 {
        let Some(target) = self.timer.target_ns else {
            return 0;
        };
        if self.timer.period_ns == 0 || self.reg(TIMER_INITIAL) == 0 {
            return 0;
        }
        let left = target.saturating_sub(now.ns);
        // A whole period left is the initial count itself.
        let left = if left > self.timer.period_ns {
            left % self.timer.period_ns
        } else {
            left
        };
        u32::try_from(left / self.ns_per_count()).unwrap_or(u32::MAX)
    }

    /// Reads IA32_TSC_DEADLINE: zero once it has fired, or in another timer mode.
    pub fn tsc_deadline(&self) -> u64 {
        if self.is_enabled() && self.timer.mode == Mode::TscDeadline {
            self.timer.tsc_deadline
        } else {
            0
        }
    }

    /// Writes IA32_TSC_DEADLINE: arms the timer, or disarms it with zero. Ignored in another
    /// timer mode (SDM, "TSC-Deadline Mode").
    pub fn set_tsc_deadline(&mut self, deadline: u64) {
        if self.is_enabled() && self.timer.mode == Mode::TscDeadline {
            self.timer.tsc_deadline = deadline;
        }
    }

    /// When to call [`Lapic::expire`] next. The timer runs, and KVM's does, even while its LVT
    /// entry is masked.
    pub fn next_deadline(&self) -> Option<Deadline> {
        if !self.is_enabled() {
            return None;
        }
        match self.timer.mode {
            Mode::TscDeadline => {
                let tsc = self.timer.tsc_deadline;
                (tsc != 0).then_some(Deadline::Tsc(tsc))
            }
            _ => self.timer.target_ns.map(Deadline::Ns),
        }
    }

    /// Delivers the timer interrupt if its deadline has passed; periods missed are coalesced.
    /// Returns whether a vector became pending.
    pub fn expire(&mut self, now: Now) -> bool {
        match self.next_deadline() {
            Some(Deadline::Ns(target)) if target <= now.ns => {
                self.timer.target_ns = match self.timer.mode {
                    Mode::Periodic if self.timer.period_ns != 0 => {
                        let missed = (now.ns - target) / self.timer.period_ns;
                        let advance = self
                            .timer
                            .period_ns
                            .saturating_mul(missed.saturating_add(1));
                        target.checked_add(advance)
                    }
                    _ => None,
                };
            }
            Some(Deadline::Tsc(tsc)) if tsc <= now.tsc => self.timer.tsc_deadline = 0,
            _ => return false,
        }
        self.deliver_lvt(Lvt::Timer) == super::Accepted::Pending
    }
}
