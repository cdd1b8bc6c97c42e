use crate::pic::LineOutcome;
use crate::*;

const USER: IrqSource = IrqSource::Userspace;

/// As a PC's firmware sets it up, with vectors 0x08 and 0x70 and nothing masked.
fn pc() -> Pic {
    pc_with(0x01, 0x01)
}

fn pc_with(icw4_master: u8, icw4_slave: u8) -> Pic {
    let mut pic = Pic::new();
    for value in [
        (0x20, 0x11),
        (0x21, 0x08),
        (0x21, 0x04),
        (0x21, icw4_master),
    ] {
        pic.port_write(value.0, value.1);
    }
    for value in [(0xa0, 0x11), (0xa1, 0x70), (0xa1, 0x02), (0xa1, icw4_slave)] {
        pic.port_write(value.0, value.1);
    }
    pic.take_acked();
    pic
}

fn pulse(pic: &mut Pic, line: u8) {
    pic.set_irq(line, USER, true);
    pic.set_irq(line, USER, false);
}

#[test]
fn edge_request_and_specific_registers() {
    let mut pic = pc();
    assert!(!pic.output());
    assert_eq!(pic.set_irq(3, USER, true), LineOutcome::Delivered);
    assert_eq!(
        pic.set_irq(3, USER, true),
        LineOutcome::Delivered,
        "no new edge"
    );
    pic.set_irq(3, USER, false);
    assert_eq!(pic.set_irq(3, USER, true), LineOutcome::Coalesced);
    assert!(pic.output());
    assert_eq!(pic.port_read(0x20), 8, "IRR");
    assert_eq!(pic.ack(), 0x0b);
    assert!(!pic.output());
    pic.port_write(0x20, 0x0b);
    assert_eq!(pic.port_read(0x20), 8, "ISR");
    pic.port_write(0x20, 0x20);
    assert_eq!(pic.port_read(0x20), 0);
    assert_eq!(pic.take_acked(), 8);
    assert_eq!(pic.take_acked(), 0);
}

#[test]
fn priorities_nest() {
    let mut pic = pc();
    pulse(&mut pic, 4);
    assert_eq!(pic.ack(), 0x0c);
    pulse(&mut pic, 5);
    assert!(!pic.output());
    pulse(&mut pic, 1);
    assert!(pic.output());
    assert_eq!(pic.ack(), 0x09);
    pic.port_write(0x20, 0x20);
    assert!(!pic.output());
    pic.port_write(0x20, 0x20);
    assert_eq!(pic.ack(), 0x0d);
}

#[test]
fn masks() {
    let mut pic = pc();
    pic.port_write(0x21, 0xfe);
    assert_eq!(pic.port_read(0x21), 0xfe);
    assert_eq!(pic.masked(), 0x00fe);
    assert_eq!(pic.set_irq(3, USER, true), LineOutcome::Masked);
    assert!(!pic.output());
    pic.port_write(0x21, 0);
    assert!(pic.output());
}

#[test]
fn cascade() {
    let mut pic = pc();
    pulse(&mut pic, 12);
    assert!(pic.output());
    assert_eq!(pic.ack(), 0x74);
    pulse(&mut pic, 14);
    assert!(!pic.output(), "lower at the slave");
    pulse(&mut pic, 8);
    assert!(!pic.output(), "the master's line 2 is in service");
    pic.port_write(0xa0, 0x20);
    assert_eq!(pic.take_acked(), 1 << 12);
    pic.port_write(0x20, 0x20);
    assert_eq!(pic.take_acked(), 1 << 2);
    assert_eq!(pic.ack(), 0x70);
    pic.port_write(0xa0, 0x20);
    pic.port_write(0x20, 0x20);
    assert_eq!(pic.ack(), 0x76);
}

#[test]
fn special_fully_nested_mode_lets_the_slave_interrupt_itself() {
    let mut pic = pc_with(0x11, 0x01);
    pulse(&mut pic, 12);
    assert_eq!(pic.ack(), 0x74);
    pulse(&mut pic, 8);
    assert!(pic.output());
    assert_eq!(pic.ack(), 0x70);
}

#[test]
fn spurious_interrupts() {
    let mut pic = pc();
    assert_eq!(pic.ack(), 0x0f);
    pic.port_write(0x20, 0x0b);
    assert_eq!(pic.port_read(0x20), 0, "not in service");
    // A level request of the slave goes away before its INTA.
    pic.port_write(0x4d1, 0x08);
    pic.set_irq(11, USER, true);
    pic.set_irq(11, USER, false);
    assert_eq!(pic.ack(), 0x77);
    assert_eq!(pic.port_read(0x20), 4, "the master does not know");
}

#[test]
fn level_triggered_lines() {
    let mut pic = pc();
    pic.port_write(0x4d0, 0xff);
    pic.port_write(0x4d1, 0xff);
    assert_eq!((pic.port_read(0x4d0), pic.port_read(0x4d1)), (0xf8, 0xde));
    pic.set_irq(10, USER, true);
    assert_eq!(pic.ack(), 0x72);
    pic.port_write(0xa0, 0x20);
    pic.port_write(0x20, 0x20);
    assert!(pic.output(), "still high");
    pic.set_irq(10, IrqSource::IrqfdResample, true);
    pic.set_irq(10, USER, false);
    assert_eq!(pic.ack(), 0x72, "another source holds it");
    pic.set_irq(10, IrqSource::IrqfdResample, false);
    pic.port_write(0xa0, 0x20);
    pic.port_write(0x20, 0x20);
    assert!(!pic.output());
}

#[test]
fn automatic_eoi_and_rotation() {
    let mut pic = pc_with(0x03, 0x01);
    pulse(&mut pic, 3);
    pic.ack();
    assert_eq!(pic.take_acked(), 8);
    pic.port_write(0x20, 0x80);
    pulse(&mut pic, 3);
    pic.ack();
    // Line 3 is now the lowest.
    pulse(&mut pic, 3);
    pulse(&mut pic, 5);
    assert_eq!(pic.ack(), 0x0d);
}

#[test]
fn rotation_and_specific_eoi() {
    let mut pic = pc();
    pic.port_write(0x20, 0xc4);
    pulse(&mut pic, 0);
    pulse(&mut pic, 5);
    assert_eq!(
        pic.ack(),
        0x0d,
        "5 is the highest after 4 became the lowest"
    );
    pic.port_write(0x20, 0xa0);
    assert_eq!(pic.take_acked(), 1 << 5);
    pulse(&mut pic, 5);
    assert_eq!(pic.ack(), 0x08);
    pic.port_write(0x20, 0x60);
    assert_eq!(pic.take_acked(), 1);
    assert_eq!(pic.ack(), 0x0d);
}

#[test]
fn special_mask_mode() {
    let mut pic = pc();
    pulse(&mut pic, 1);
    pic.ack();
    pulse(&mut pic, 6);
    assert!(!pic.output());
    pic.port_write(0x21, 0x02);
    assert!(!pic.output());
    pic.port_write(0x20, 0x68);
    assert!(pic.output(), "lower lines too, but for the masked one");
    pic.port_write(0x20, 0x48);
    assert!(!pic.output());
}

#[test]
fn poll() {
    let mut pic = pc();
    pic.port_write(0x20, 0x0c);
    assert_eq!(pic.port_read(0x20), 7);
    pulse(&mut pic, 5);
    pic.port_write(0x20, 0x0c);
    assert_eq!(pic.port_read(0x20), 0x85);
    assert!(!pic.output());
    pic.port_write(0x20, 0x0b);
    assert_eq!(pic.port_read(0x20), 0x20, "in service");
}

#[test]
fn initialisation_clears_requests_of_edge_lines() {
    let mut pic = pc();
    pic.port_write(0x4d0, 0x20);
    pic.port_write(0x21, 0xff);
    pic.set_irq(1, USER, true);
    pic.set_irq(5, USER, true);
    pic.port_write(0x20, 0x11);
    assert_eq!(pic.take_acked(), 2);
    assert_eq!(pic.port_read(0x20), 0x20);
    assert_eq!(pic.state()[0].imr, 0);
}

#[test]
fn state_round_trip() {
    let mut pic = pc();
    pulse(&mut pic, 4);
    pulse(&mut pic, 12);
    let [master, slave] = pic.state();
    let mut other = Pic::new();
    other.set_slave(&slave);
    other.set_master(&master);
    assert_eq!(other.state(), [master, slave]);
    assert_eq!(other.ack(), 0x74);
    assert_eq!(Pic::new().ack(), 7, "uninitialised");
}
