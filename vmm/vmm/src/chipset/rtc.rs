//! The MC146818 real-time clock and its NVRAM, on ports 0x70 and 0x71.
//!
//! The time is the host's, in UTC, in BCD and 24-hour format. Setting it has no effect:
//! guests get the right time at the next read anyway. There are no interrupts.

use std::time::{SystemTime, UNIX_EPOCH};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where the FADT says that the century is.
pub const CENTURY: u8 = 0x32;

/// 32768 Hz time base, 1024 Hz periodic rate.
const DIVIDER: u8 = 0x26;
const UPDATE_IN_PROGRESS: u8 = 0x80;
/// The update is announced this long before the second, in nanoseconds.
const UPDATE_WINDOW: u32 = 244_000;
const HOURS_24: u8 = 0x02;
const BINARY: u8 = 0x04;
const BATTERY_GOOD: u8 = 0x80;

/// The clock.
pub struct Rtc {
    index: u8,
    status_b: u8,
    nvram: [u8; 128],
}

impl Default for Rtc {
    fn default() -> Self {
        Self {
            index: 0,
            status_b: HOURS_24,
            nvram: [0; 128],
        }
    }
}

impl Rtc {
    /// The guest reads port 0x70 or 0x71.
    pub fn read(&self, port: u16) -> u8 {
        if port == 0x70 {
            // The index is write-only.
            return 0xff;
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        match self.index {
            STATUS_A if now.subsec_nanos() >= 1_000_000_000 - UPDATE_WINDOW => {
                DIVIDER | UPDATE_IN_PROGRESS
            }
            STATUS_A => DIVIDER,
            STATUS_B => self.status_b,
            STATUS_C => 0,
            STATUS_D => BATTERY_GOOD,
            index => match field(index, now.as_secs()) {
                Some(value) if self.status_b & BINARY != 0 => value,
                Some(value) => ((value / 10) << 4) | (value % 10),
                None => self.nvram[usize::from(index & 0x7f)],
            },
        }
    }

    /// The guest writes port 0x70 or 0x71.
    pub fn write(&mut self, port: u16, value: u8) {
        match (port, self.index) {
            // Bit 7 masks NMIs on real hardware.
            (0x70, _) => self.index = value & 0x7f,
            (_, STATUS_B) => self.status_b = HOURS_24 | (value & BINARY),
            (_, index) => self.nvram[usize::from(index & 0x7f)] = value,
        }
    }
}

/// The clock's field `index` at `secs` since 1970.
fn field(index: u8, secs: u64) -> Option<u8> {
    let days = secs / 86_400;
    let (year, month, day) = civil(days);
    let value = match index {
        SECONDS => secs % 60,
        MINUTES => secs / 60 % 60,
        HOURS => secs / 3600 % 24,
        WEEKDAY => (days + 4) % 7 + 1, // 1970 began on a Thursday; Sunday is 1
        DAY => day,
        MONTH => month,
        YEAR => year % 100,
        CENTURY => year / 100 % 100,
        _ => return None,
    };
    u8::try_from(value).ok()
}

/// Year, month and day of a day count since 1970 in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Count from 1 March of year 0, so that leap days end years; 400 years have 146097 days.
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(20_514), (2026, 3, 2));
        let secs = 951_782_400 + 3600 * 23 + 59 * 60 + 58; // 2000-02-29 23:59:58
        let fields = [YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, CENTURY, WEEKDAY];
        let values = fields.map(|f| field(f, secs).unwrap());
        assert_eq!(values, [0, 2, 29, 23, 59, 58, 20, 3]);
    }

    #[test]
    fn time_reads_in_bcd_or_binary() {
        let mut rtc = Rtc::default();
        rtc.write(0x70, CENTURY);
        assert_eq!(rtc.read(0x71), 0x20);
        rtc.write(0x70, STATUS_B);
        rtc.write(0x71, BINARY);
        rtc.write(0x70, CENTURY);
        assert_eq!(rtc.read(0x71), 20);
    }

    #[test]
    fn nvram_keeps_what_is_written() {
        let mut rtc = Rtc::default();
        rtc.write(0x70, 0xc0);
        rtc.write(0x71, 0x5a);
        assert_eq!(rtc.read(0x71), 0x5a);
    }
}
