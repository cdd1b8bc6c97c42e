use crate::*;
use std::vec::Vec;

const USER: IrqSource = IrqSource::Userspace;

fn write(ioapic: &mut Ioapic, reg: u32, value: u32) -> Vec<(u8, u8)> {
    let mut sent = Vec::new();
    ioapic.mmio_write(0, reg, |_, _| {});
    ioapic.mmio_write(0x10, value, |pin, message| sent.push((pin, message.vector)));
    sent
}

fn read(ioapic: &mut Ioapic, reg: u32) -> u32 {
    ioapic.mmio_write(0, reg, |_, _| {});
    ioapic.mmio_read(0x10)
}

fn program(ioapic: &mut Ioapic, pin: u8, low: u32) -> Vec<(u8, u8)> {
    write(ioapic, 0x10 + 2 * u32::from(pin), low)
}

fn eoi(ioapic: &mut Ioapic, vector: u8) -> Vec<u8> {
    let mut sent = Vec::new();
    ioapic.eoi(vector, |pin, _| sent.push(pin));
    sent
}

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;

#[test]
fn registers() {
    let mut ioapic = Ioapic::new();
    assert_eq!(read(&mut ioapic, 1), 0x0017_0011);
    write(&mut ioapic, 0, 0xff00_0000);
    assert_eq!(read(&mut ioapic, 0), 0x0f00_0000);
    assert_eq!(read(&mut ioapic, 2), 0x0f00_0000);
    assert_eq!(read(&mut ioapic, 0x10), MASKED);
    write(&mut ioapic, 0x3f, 0x0500_0000);
    assert_eq!(read(&mut ioapic, 0x3f), 0x0500_0000);
    assert_eq!(read(&mut ioapic, 0x40), u32::MAX);
    assert_eq!(read(&mut ioapic, 5), u32::MAX);
    // Remote IRR and delivery status cannot be written.
    program(&mut ioapic, 3, u32::MAX);
    assert_eq!(read(&mut ioapic, 0x16), !(1 << 12 | 1 << 14));
    assert_eq!(Ioapic::with_eoi_register().mmio_read(0), 0);
}

#[test]
fn edge_pin() {
    let mut ioapic = Ioapic::new();
    assert_eq!(ioapic.set_irq(4, USER, true), PinOutcome::Held, "masked");
    ioapic.set_irq(4, USER, false);
    write(&mut ioapic, 0x19, 0x0300_0000);
    assert!(
        program(&mut ioapic, 4, 0x0951).is_empty(),
        "a masked edge is lost"
    );
    let message = ioapic.set_irq(4, USER, true).message().unwrap();
    assert_eq!(
        message,
        ApicMessage {
            dest: 3,
            dest_mode: DestMode::Logical,
            delivery_mode: DeliveryMode::LowestPriority,
            vector: 0x51,
            trigger: Trigger::Edge,
            level: true,
            shorthand: Shorthand::None,
            redirect_hint: false,
        }
    );
    assert_eq!(ioapic.set_irq(4, USER, true), PinOutcome::Coalesced);
    assert_eq!(ioapic.set_irq(4, USER, false), PinOutcome::Lowered);
    assert!(eoi(&mut ioapic, 0x51).is_empty());
    assert!(ioapic.set_irq(4, USER, true).message().is_some());
}

#[test]
fn level_pin_is_sent_again_on_eoi_while_high() {
    let mut ioapic = Ioapic::new();
    program(&mut ioapic, 10, LEVEL | 0x61);
    assert!(ioapic.set_irq(10, USER, true).message().is_some());
    assert_eq!(
        read(&mut ioapic, 0x24),
        LEVEL | 1 << 14 | 0x61,
        "remote IRR"
    );
    assert_eq!(ioapic.set_irq(10, USER, true), PinOutcome::Held);
    assert_eq!(ioapic.pins_with_vector(0x61), 1 << 10);
    assert!(eoi(&mut ioapic, 0x62).is_empty());
    assert_eq!(eoi(&mut ioapic, 0x61), [10]);
    ioapic.set_irq(10, USER, false);
    assert!(eoi(&mut ioapic, 0x61).is_empty());
    assert_eq!(read(&mut ioapic, 0x24), LEVEL | 0x61);
    // High while masked: sent when unmasked.
    program(&mut ioapic, 10, MASKED | LEVEL | 0x61);
    ioapic.set_irq(10, USER, true);
    assert_eq!(program(&mut ioapic, 10, LEVEL | 0x61), [(10, 0x61)]);
    // A switch to edge and back clears remote IRR.
    program(&mut ioapic, 10, MASKED | 0x61);
    assert_eq!(program(&mut ioapic, 10, LEVEL | 0x61), [(10, 0x61)]);
}

#[test]
fn sources_share_a_line() {
    let mut ioapic = Ioapic::new();
    program(&mut ioapic, 9, LEVEL | 0x41);
    ioapic.set_irq(9, USER, true);
    ioapic.set_irq(9, IrqSource::IrqfdResample, true);
    assert_eq!(ioapic.set_irq(9, USER, false), PinOutcome::Held);
    assert_eq!(eoi(&mut ioapic, 0x41), [9]);
    assert_eq!(
        ioapic.set_irq(9, IrqSource::IrqfdResample, false),
        PinOutcome::Lowered
    );
    assert!(eoi(&mut ioapic, 0x41).is_empty());
}

#[test]
fn unaccepted_level_interrupt_may_try_again() {
    let mut ioapic = Ioapic::new();
    program(&mut ioapic, 9, LEVEL | 0x41);
    assert!(ioapic.set_irq(9, USER, true).message().is_some());
    ioapic.not_accepted(9);
    assert!(ioapic.set_irq(9, USER, true).message().is_some());
}

#[test]
fn an_eoi_storm_is_slowed_down() {
    let mut ioapic = Ioapic::new();
    program(&mut ioapic, 11, LEVEL | 0x41);
    ioapic.set_irq(11, USER, true);
    let mut sent = 0;
    while !eoi(&mut ioapic, 0x41).is_empty() {
        sent += 1;
    }
    assert_eq!((sent, ioapic.deferred()), (9_999, 1 << 11));
    let mut pins = Vec::new();
    ioapic.retry_deferred(|pin, _| pins.push(pin));
    assert_eq!((pins, ioapic.deferred()), ([11].into(), 0));
}

#[test]
fn eoi_register() {
    let mut ioapic = Ioapic::with_eoi_register();
    assert_eq!(read(&mut ioapic, 1), 0x0017_0020);
    program(&mut ioapic, 3, LEVEL | 0x41);
    ioapic.set_irq(3, USER, true);
    let mut sent = 0;
    ioapic.mmio_write(0x40, 0x41, |_, _| sent += 1);
    assert_eq!(sent, 1);
}

#[test]
fn state_round_trip() {
    let mut ioapic = Ioapic::new();
    program(&mut ioapic, 1, 0x31);
    program(&mut ioapic, 2, LEVEL | 0x32);
    ioapic.set_irq(1, USER, true);
    ioapic.set_irq(2, USER, true);
    ioapic.set_irq(7, USER, true);
    let state = ioapic.state();
    assert_eq!(
        state.irr,
        1 << 2 | 1 << 7,
        "a delivered edge is not pending"
    );
    let mut other = Ioapic::new();
    let mut sent = Vec::new();
    other.set_state(&state, |pin, _| sent.push(pin));
    assert!(sent.is_empty(), "remote IRR came along");
    assert_eq!(other.state(), state);
    assert_eq!(eoi(&mut other, 0x32), [2]);
}
