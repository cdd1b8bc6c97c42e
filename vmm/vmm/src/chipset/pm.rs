//! ACPI power management: PM1a, the PM timer and one general-purpose event block.
//!
//! The machine is always in ACPI mode (there is no SMI command port), so `SCI_EN` reads as
//! one. See "ACPI Hardware Specification" in the ACPI specification.

use std::sync::Arc;
use std::time::Instant;

use crate::hypervisor::Vm;
use crate::layout::SCI_GSI;

/// Frequency of the PM timer, in Hz.
const TIMER_HZ: u128 = 3_579_545;
const PWRBTN: u16 = 1 << 8;
const SCI_EN: u16 = 1;
const SLP_EN: u16 = 1 << 13;
const SLP_TYP_SHIFT: u16 = 10;
/// `SLP_TYP` of S5, as `_S5` in the DSDT says.
pub const SLP_TYP_S5: u8 = 5;
/// Events that can be enabled: timer, global lock, power button, sleep button, RTC.
const PM1_EVENTS: u16 = 1 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;

/// What a write asks the machine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PmEvent {
    /// Enter S5.
    PowerOff,
}

/// The registers. Offsets count from `PM1A_EVT`.
pub struct PmDevice {
    vm: Option<Arc<Vm>>,
    start: Instant,
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    sci: bool,
}

impl PmDevice {
    /// Registers at power-on; the SCI goes to `vm`, if there is one.
    #[must_use]
    pub fn new(vm: Option<Arc<Vm>>) -> Self {
        Self {
            vm,
            start: Instant::now(),
            status: 0,
            enable: 0,
            control: SCI_EN,
            gpe_status: 0,
            gpe_enable: 0,
            sci: false,
        }
    }

    /// The timer: 32 bits, as the FADT says.
    fn timer(&self) -> u32 {
        // Truncation is what the counter does.
        (self.start.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000) as u32
    }

    /// The guest reads at `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let timer = self.timer().to_le_bytes();
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = match at {
                0..2 => self.status.to_le_bytes()[usize::from(at)],
                2..4 => self.enable.to_le_bytes()[usize::from(at - 2)],
                4..6 => self.control.to_le_bytes()[usize::from(at - 4)],
                8..12 => timer[usize::from(at - 8)],
                0x20..0x22 => self.gpe_status.to_le_bytes()[usize::from(at - 0x20)],
                0x22..0x24 => self.gpe_enable.to_le_bytes()[usize::from(at - 0x22)],
                _ => 0xff,
            };
        }
    }

    /// The guest writes at `offset`.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Option<PmEvent> {
        let mut control_written = false;
        for (&value, at) in data.iter().zip(offset..) {
            let shift = u32::from(at & 1) * 8;
            let bits = u16::from(value) << shift;
            let keep = !(0xff << shift);
            match at {
                // Status bits are cleared by writing ones.
                0..2 => self.status &= !bits,
                2..4 => self.enable = ((self.enable & keep) | bits) & PM1_EVENTS,
                4..6 => {
                    self.control = (self.control & keep) | bits | SCI_EN;
                    control_written = true;
                }
                0x20..0x22 => self.gpe_status &= !bits,
                0x22..0x24 => self.gpe_enable = (self.gpe_enable & keep) | bits,
                _ => {}
            }
        }
        self.update_sci();
        if !control_written || self.control & SLP_EN == 0 {
            return None;
        }
        self.control &= !SLP_EN; // write-only
        let slp_typ = (self.control >> SLP_TYP_SHIFT) & 7;
        (slp_typ == u16::from(SLP_TYP_S5)).then_some(PmEvent::PowerOff)
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self) {
        self.status |= PWRBTN;
        self.update_sci();
    }

    fn update_sci(&mut self) {
        let level = self.status & self.enable != 0 || self.gpe_status & self.gpe_enable != 0;
        if level == self.sci {
            return;
        }
        self.sci = level;
        if let Some(vm) = &self.vm
            && let Err(e) = vm.set_irq_line(SCI_GSI, level)
        {
            log::warn!("ACPI interrupt: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pm() -> PmDevice {
        PmDevice::new(None)
    }

    fn read16(pm: &PmDevice, offset: u16) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn only_s5_powers_off() {
        let mut pm = pm();
        assert_eq!(read16(&pm, 4), SCI_EN);
        let sleep = |typ: u16| (SLP_EN | typ << SLP_TYP_SHIFT).to_le_bytes();
        assert_eq!(pm.write(4, &sleep(1)), None);
        assert_eq!(pm.write(4, &(5u16 << SLP_TYP_SHIFT).to_le_bytes()), None);
        assert_eq!(pm.write(4, &sleep(5)), Some(PmEvent::PowerOff));
        // By bytes, as ACPICA may do it, too.
        pm.write(4, &[0]);
        assert_eq!(pm.write(5, &[0x34]), Some(PmEvent::PowerOff));
    }

    #[test]
    fn the_power_button_raises_the_sci_until_acknowledged() {
        let mut pm = pm();
        pm.press_power_button();
        assert!(!pm.sci);
        pm.write(2, &PWRBTN.to_le_bytes());
        assert!(pm.sci);
        assert_eq!(read16(&pm, 0), PWRBTN);
        pm.write(0, &PWRBTN.to_le_bytes());
        assert!(!pm.sci);
        assert_eq!(read16(&pm, 0), 0);
    }

    #[test]
    fn the_timer_runs_at_its_frequency() {
        let pm = pm();
        let read = || {
            let mut data = [0; 4];
            pm.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        let first = read();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let ticks = read() - first;
        assert!((71_000..1_800_000).contains(&ticks), "{ticks}");
    }
}
