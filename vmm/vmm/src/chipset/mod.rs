//! The devices of a PC that are not on the PCI bus, and who answers which port.
//!
//! Ports that nothing answers read as ones and swallow writes. The interrupt controllers,
//! the 8254 timer and port 0x61 are in the engine, as with KVM.

pub mod pm;
pub mod rtc;
pub mod serial;

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::channel::ByteChannel;
use crate::hypervisor::Vm;
use crate::layout::{GPE0, GPE0_LEN, PM_TIMER, PM1A_EVT, RESET_PORT, SERIAL_PORT};
use crate::machine::{Outcome, Stop};
use pm::{PmDevice, PmEvent};
use rtc::Rtc;
use serial::SerialPort;

/// Everything behind the ports, except PCI configuration.
pub struct Chipset {
    serial: SerialPort,
    rtc: Mutex<Rtc>,
    i8042: Mutex<I8042Device<ResetLine>>,
    pm: Mutex<PmDevice>,
    stop: Arc<Stop>,
}

/// The reset output of the keyboard controller.
struct ResetLine(Arc<Stop>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.finish(Outcome::Reset);
        Ok(())
    }
}

impl Chipset {
    /// Powers on; the serial port talks to `console`, interrupts go to `vm` (none in tests).
    ///
    /// # Errors
    /// When the host has no more event descriptors or threads.
    pub fn new(
        vm: Option<&Arc<Vm>>,
        stop: &Arc<Stop>,
        console: &ByteChannel,
    ) -> std::io::Result<Self> {
        Ok(Self {
            serial: SerialPort::new(vm, stop, console)?,
            rtc: Mutex::new(Rtc::default()),
            i8042: Mutex::new(I8042Device::new(ResetLine(Arc::clone(stop)))),
            pm: Mutex::new(PmDevice::new(vm.cloned())),
            stop: Arc::clone(stop),
        })
    }

    /// The guest reads `data.len()` (1, 2 or 4) bytes at `port`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        if let Some(offset) = pm_offset(port) {
            lock(&self.pm).read(offset, data);
            return;
        }
        for (offset, byte) in (0u16..).zip(data) {
            *byte = self.read_byte(port.wrapping_add(offset));
        }
    }

    /// The guest writes `data` (1, 2 or 4 bytes) at `port`.
    pub fn write(&self, port: u16, data: &[u8]) {
        if let Some(offset) = pm_offset(port) {
            let event = lock(&self.pm).write(offset, data);
            if let Some(PmEvent::PowerOff) = event {
                self.stop.finish(Outcome::PowerOff);
            }
            return;
        }
        for (offset, &byte) in (0u16..).zip(data) {
            self.write_byte(port.wrapping_add(offset), byte);
        }
    }

    /// Presses the power button: an ACPI guest shuts itself down.
    pub fn press_power_button(&self) {
        lock(&self.pm).press_power_button();
    }

    fn read_byte(&self, port: u16) -> u8 {
        match port {
            SERIAL_PORT..=0x3ff => self.serial.read((port - SERIAL_PORT) as u8),
            0x60 | 0x64 => lock(&self.i8042).read((port - 0x60) as u8),
            0x70 | 0x71 => lock(&self.rtc).read(port),
            RESET_PORT => 0,
            _ => 0xff,
        }
    }

    fn write_byte(&self, port: u16, value: u8) {
        match port {
            SERIAL_PORT..=0x3ff => self.serial.write((port - SERIAL_PORT) as u8, value),
            0x60 | 0x64 => {
                let Ok(()) = lock(&self.i8042).write((port - 0x60) as u8, value);
            }
            0x70 | 0x71 => lock(&self.rtc).write(port, value),
            // Bit 2 starts the reset; the others choose how thorough it is.
            RESET_PORT if value & 4 != 0 => self.stop.finish(Outcome::Reset),
            _ => {}
        }
    }
}

fn pm_offset(port: u16) -> Option<u16> {
    let end = PM_TIMER + 4;
    (PM1A_EVT..end)
        .contains(&port)
        .then(|| port - PM1A_EVT)
        .or_else(|| {
            (GPE0..GPE0 + GPE0_LEN)
                .contains(&port)
                .then(|| port - PM1A_EVT)
        })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
