//! The 82093AA I/O APIC as KVM models it: 24 pins, version 0x11, remote IRR, re-injection on EOI.

use crate::message::{
    ApicMessage, DeliveryMode, DestMode, IrqSource, LineLevel, Shorthand, Trigger,
};

/// Number of pins.
pub const PINS: usize = 24;
/// `IOAPIC_DEFAULT_BASE_ADDRESS`.
pub const DEFAULT_BASE: u64 = 0xfec0_0000;
/// Size in bytes of the MMIO window.
pub const MMIO_SIZE: u64 = 0x100;

const REG_SELECT: u64 = 0x00;
const REG_WINDOW: u64 = 0x10;
const REG_EOI: u64 = 0x40;

const VECTOR: u64 = 0xff;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL_TRIGGERED: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;

/// After so many EOIs in a row that found the line still high, re-injection is deferred: a guest
/// without a handler would otherwise do nothing but take this interrupt.
const EOI_STORM: u32 = 10_000;

/// What raising or lowering a pin did. KVM reports it through `KVM_IRQ_LINE_STATUS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinOutcome {
    /// The line went, or stayed, low (status 1).
    Lowered,
    /// The previous edge has not been delivered (status 0).
    Coalesced,
    /// Masked, or a level interrupt awaits its EOI (status -1).
    Held,
    /// To be delivered; the status is how many APICs accept it.
    Send(ApicMessage),
}

impl PinOutcome {
    /// The message to deliver, if any.
    pub fn message(self) -> Option<ApicMessage> {
        match self {
            Self::Send(message) => Some(message),
            _ => None,
        }
    }
}

/// The fields of `struct kvm_ioapic_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the uapi structure")]
pub struct IoapicState {
    pub base_address: u64,
    pub ioregsel: u32,
    pub id: u32,
    pub irr: u32,
    pub redirtbl: [u64; PINS],
}

/// One I/O APIC.
#[derive(Clone, Debug)]
pub struct Ioapic {
    base: u64,
    select: u8,
    id: u8,
    eoi_register: bool,
    /// Pins that are high (level) or have seen a rising edge and not fallen since.
    irr: u32,
    /// Edge pins in `irr` whose message has been sent.
    delivered: u32,
    deferred: u32,
    redirection: [u64; PINS],
    lines: [LineLevel; PINS],
    eoi_streak: [u32; PINS],
}

impl Default for Ioapic {
    fn default() -> Self {
        Self::new()
    }
}

impl Ioapic {
    /// The reset state: all pins masked.
    pub fn new() -> Self {
        Self {
            base: DEFAULT_BASE,
            select: 0,
            id: 0,
            eoi_register: false,
            irr: 0,
            delivered: 0,
            deferred: 0,
            redirection: [MASKED; PINS],
            lines: [LineLevel::default(); PINS],
            eoi_streak: [0; PINS],
        }
    }

    /// Version 0x20 with the EOI register at offset 0x40, which KVM's own IOAPIC lacks.
    pub fn with_eoi_register() -> Self {
        Self {
            eoi_register: true,
            ..Self::new()
        }
    }

    /// Where the MMIO window lies.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Sets one source's level of `pin`; pins beyond 23 are ignored.
    pub fn set_irq(&mut self, pin: u8, source: IrqSource, level: bool) -> PinOutcome {
        let Some(line) = self.lines.get_mut(usize::from(pin)) else {
            return PinOutcome::Held;
        };
        let level = line.set(source, level);
        self.set_line(pin, level)
    }

    fn set_line(&mut self, pin: u8, level: bool) -> PinOutcome {
        let bit = 1u32 << pin;
        if !level {
            self.irr &= !bit;
            self.deferred &= !bit;
            return PinOutcome::Lowered;
        }
        let was_high = self.irr & bit != 0;
        self.irr |= bit;
        if self.entry(pin) & LEVEL_TRIGGERED == 0 {
            // Raised again while high: an edge is owed to whoever restores this state.
            self.delivered &= !bit;
            if was_high {
                return PinOutcome::Coalesced;
            }
        }
        match self.service(pin) {
            Some(message) => PinOutcome::Send(message),
            None => PinOutcome::Held,
        }
    }

    fn entry(&self, pin: u8) -> u64 {
        self.redirection
            .get(usize::from(pin))
            .copied()
            .unwrap_or(MASKED)
    }

    /// Sends the pin's message unless it is masked or its level interrupt awaits an EOI.
    fn service(&mut self, pin: u8) -> Option<ApicMessage> {
        let entry = self.redirection.get_mut(usize::from(pin))?;
        let level = *entry & LEVEL_TRIGGERED != 0;
        if *entry & MASKED != 0 || level && *entry & REMOTE_IRR != 0 {
            return None;
        }
        if level {
            *entry |= REMOTE_IRR;
        } else {
            self.delivered |= 1 << pin;
        }
        Some(decode(*entry))
    }

    /// Tells that no local APIC accepted the message `pin` just sent. A level interrupt is then
    /// not in service anywhere, so the pin may send again when the line is next looked at.
    pub fn not_accepted(&mut self, pin: u8) {
        if let Some(entry) = self.redirection.get_mut(usize::from(pin)) {
            *entry &= !REMOTE_IRR;
        }
    }

    /// The message `pin` would send now, whatever its mask; for interrupt remapping caches.
    pub fn pin_message(&self, pin: u8) -> Option<ApicMessage> {
        self.redirection
            .get(usize::from(pin))
            .map(|entry| decode(*entry))
    }

    /// Whether `pin` is masked (KVM's mask notifiers; pins that do not exist are).
    pub fn is_masked(&self, pin: u8) -> bool {
        self.entry(pin) & MASKED != 0
    }

    /// Mask of the pins whose redirection entry holds `vector`: those an EOI of it concerns.
    pub fn pins_with_vector(&self, vector: u8) -> u32 {
        self.redirection
            .iter()
            .enumerate()
            .filter(|(_, entry)| **entry & VECTOR == u64::from(vector))
            .fold(0, |mask, (pin, _)| mask | 1 << pin)
    }

    /// EOI at one pin, after its acknowledge listeners ran: clears remote IRR and sends the
    /// interrupt again if the line is still high. Call it only for level-triggered EOIs whose
    /// broadcast is not suppressed.
    pub fn eoi_pin(&mut self, pin: u8) -> Option<ApicMessage> {
        let entry = self.redirection.get_mut(usize::from(pin))?;
        if *entry & LEVEL_TRIGGERED == 0 {
            return None;
        }
        *entry &= !REMOTE_IRR;
        let streak = self.eoi_streak.get_mut(usize::from(pin))?;
        if *entry & MASKED != 0 || self.irr & (1 << pin) == 0 {
            *streak = 0;
            return None;
        }
        *streak += 1;
        if *streak >= EOI_STORM {
            *streak = 0;
            self.deferred |= 1 << pin;
            return None;
        }
        self.service(pin)
    }

    /// EOI of `vector` at every pin that holds it, for callers without acknowledge listeners.
    pub fn eoi(&mut self, vector: u8, mut send: impl FnMut(u8, ApicMessage)) {
        let pins = self.pins_with_vector(vector);
        for pin in (0..PINS as u8).filter(|pin| pins & (1 << pin) != 0) {
            if let Some(message) = self.eoi_pin(pin) {
                send(pin, message);
            }
        }
    }

    /// Mask of pins whose re-injection was put off because the guest keeps completing them with
    /// the line high. When non-zero, call [`Ioapic::retry_deferred`] about 10 ms later.
    pub fn deferred(&self) -> u32 {
        self.deferred
    }

    /// Sends the interrupts put off, if their lines are still high.
    pub fn retry_deferred(&mut self, send: impl FnMut(u8, ApicMessage)) {
        let pins = core::mem::take(&mut self.deferred) & self.irr;
        self.service_all(pins, send);
    }

    fn service_all(&mut self, pins: u32, mut send: impl FnMut(u8, ApicMessage)) {
        for pin in (0..PINS as u8).filter(|pin| pins & (1 << pin) != 0) {
            if let Some(message) = self.service(pin) {
                send(pin, message);
            }
        }
    }

    /// Reads the register at `offset` in the window; the caller truncates to the access size.
    pub fn mmio_read(&self, offset: u64) -> u32 {
        match offset & (MMIO_SIZE - 1) {
            REG_SELECT => self.select.into(),
            REG_WINDOW => self.read_window(),
            _ => 0,
        }
    }

    fn read_window(&self) -> u32 {
        match self.select {
            1 => (PINS as u32 - 1) << 16 | if self.eoi_register { 0x20 } else { 0x11 },
            0 | 2 => u32::from(self.id) << 24,
            reg => match self
                .redirection
                .get(usize::from(reg.wrapping_sub(0x10) >> 1))
            {
                Some(entry) if reg >= 0x10 => (entry >> (32 * (reg & 1))) as u32,
                _ => u32::MAX,
            },
        }
    }

    /// Writes the register at `offset` in the window; `value` is zero-extended from the access
    /// size. Unmasking a level pin whose line is high sends at once. A message is given to `send`
    /// with its pin. The EOI register may send several.
    ///
    /// Returns the pin whose redirection entry changed, for mask listeners and caches.
    pub fn mmio_write(
        &mut self,
        offset: u64,
        value: u32,
        mut send: impl FnMut(u8, ApicMessage),
    ) -> Option<u8> {
        match offset & (MMIO_SIZE - 1) {
            REG_SELECT => self.select = value as u8,
            REG_WINDOW => return self.write_window(value, send),
            REG_EOI if self.eoi_register => self.eoi(value as u8, &mut send),
            _ => {}
        }
        None
    }

    fn write_window(&mut self, value: u32, mut send: impl FnMut(u8, ApicMessage)) -> Option<u8> {
        let reg = self.select;
        if reg == 0 {
            self.id = (value >> 24) as u8 & 0xf;
        }
        let pin = reg.checked_sub(0x10)? >> 1;
        let entry = self.redirection.get_mut(usize::from(pin))?;
        let shift = 32 * (reg & 1);
        let written = *entry & !(0xffff_ffff << shift) | u64::from(value) << shift;
        *entry = written & !READ_ONLY | *entry & READ_ONLY;
        // Guests without an EOI register to write clear remote IRR by a switch to edge and back.
        if *entry & LEVEL_TRIGGERED == 0 {
            *entry &= !REMOTE_IRR;
        } else if self.irr & (1 << pin) != 0
            && let Some(message) = self.service(pin)
        {
            send(pin, message);
        }
        Some(pin)
    }

    /// The state for `KVM_GET_IRQCHIP`.
    pub fn state(&self) -> IoapicState {
        IoapicState {
            base_address: self.base,
            ioregsel: self.select.into(),
            id: self.id.into(),
            // A delivered edge must not be delivered again by the restoring side.
            irr: self.irr & !self.delivered,
            redirtbl: self.redirection,
        }
    }

    /// Restores a state (`KVM_SET_IRQCHIP`) and sends what was pending in it.
    pub fn set_state(&mut self, state: &IoapicState, mut send: impl FnMut(u8, ApicMessage)) {
        self.base = state.base_address;
        self.select = state.ioregsel as u8;
        self.id = state.id as u8 & 0xf;
        self.redirection = state.redirtbl;
        self.irr = 0;
        self.delivered = 0;
        self.deferred = 0;
        self.eoi_streak = [0; PINS];
        for pin in (0..PINS as u8).filter(|pin| state.irr & (1 << pin) != 0) {
            if let Some(message) = self.set_line(pin, true).message() {
                send(pin, message);
            }
        }
    }
}

fn decode(entry: u64) -> ApicMessage {
    ApicMessage {
        dest: (entry >> 56) as u32,
        dest_mode: if entry & (1 << 11) != 0 {
            DestMode::Logical
        } else {
            DestMode::Physical
        },
        delivery_mode: DeliveryMode::from_bits((entry >> 8) as u8),
        vector: entry as u8,
        trigger: if entry & LEVEL_TRIGGERED != 0 {
            Trigger::Level
        } else {
            Trigger::Edge
        },
        level: true,
        shorthand: Shorthand::None,
        redirect_hint: false,
    }
}
