use crate::pit::*;

const SECOND: u64 = 1_000_000_000;

/// The nanosecond at which `counts` clocks have passed.
fn clocks(counts: u64) -> u64 {
    (u128::from(counts) * u128::from(SECOND)).div_ceil(u128::from(FREQUENCY)) as u64
}

fn program(pit: &mut Pit, channel: u8, mode: u8, count: u16, now: u64) {
    let port = 0x40 + u16::from(channel);
    pit.port_write(0x43, channel << 6 | 0x30 | mode << 1, now);
    pit.port_write(port, count as u8, now);
    pit.port_write(port, (count >> 8) as u8, now);
}

fn latched(pit: &mut Pit, channel: u8, now: u64) -> u16 {
    pit.port_write(0x43, channel << 6, now);
    let port = 0x40 + u16::from(channel);
    let low = pit.port_read(port, now + SECOND);
    u16::from_le_bytes([low, pit.port_read(port, now + SECOND)])
}

fn out2(pit: &mut Pit, now: u64) -> bool {
    pit.port_read(SPEAKER_PORT, now) & 0x20 != 0
}

#[test]
fn rate_generator_interrupts_periodically() {
    let mut pit = Pit::new();
    assert_eq!(pit.next_irq_deadline_ns(), None);
    pit.set_reinject(false);
    program(&mut pit, 0, 2, 11932, 5000);
    for tick in 1..100 {
        let deadline = pit.next_irq_deadline_ns().unwrap();
        assert!(
            deadline.abs_diff(5000 + clocks(11932 * tick)) <= 1,
            "no drift"
        );
        assert_eq!(pit.expire(deadline - 2), 0);
        assert_eq!(pit.expire(deadline), 1);
    }
    assert_eq!(pit.expire(50 * SECOND), 1, "missed ticks are lost");
    assert!(pit.next_irq_deadline_ns().unwrap() > 50 * SECOND);
    // The control word stops it until a count is written.
    pit.port_write(0x43, 0x34, 50 * SECOND);
    assert_eq!(pit.next_irq_deadline_ns(), None);
}

#[test]
fn missed_ticks_are_reinjected_on_acknowledge() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 11932, 0);
    assert_eq!(pit.expire(clocks(11932 * 3)), 1);
    assert!(pit.ack());
    assert!(pit.ack());
    assert!(!pit.ack());
    assert!(!pit.ack());
    assert_eq!(pit.expire(clocks(11932 * 4)), 1);
    assert_eq!(
        pit.expire(clocks(11932 * 5)),
        0,
        "the guest has not seen the last one"
    );
    assert!(pit.ack());
    pit.expire(clocks(11932 * 9));
    pit.unmasked();
    assert_eq!(pit.expire(clocks(11932 * 10)), 1);
    assert!(!pit.ack());
}

#[test]
fn interrupt_on_terminal_count_fires_once() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 0, 1000, 0);
    let deadline = pit.next_irq_deadline_ns().unwrap();
    assert!(deadline.abs_diff(clocks(1000)) <= 1);
    assert_eq!(pit.expire(deadline), 1);
    assert_eq!(pit.next_irq_deadline_ns(), None);
    assert_eq!(pit.expire(deadline * 10), 0);
    // A zero count is 65536.
    program(&mut pit, 0, 0, 0, 0);
    assert!(pit.next_irq_deadline_ns().unwrap().abs_diff(clocks(65536)) <= 1);
}

#[test]
fn short_periods_are_stretched() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 2, 0);
    assert!(pit.next_irq_deadline_ns().unwrap() >= 200_000);
}

#[test]
fn counts_read_back() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1000, 0);
    assert_eq!(latched(&mut pit, 0, 0), 1000);
    assert_eq!(latched(&mut pit, 0, clocks(300)), 700);
    assert_eq!(latched(&mut pit, 0, clocks(1999)), 1);
    assert_eq!(latched(&mut pit, 0, clocks(2000)), 1000);
    program(&mut pit, 0, 3, 1000, 0);
    assert_eq!(latched(&mut pit, 0, clocks(300)), 400, "by two");
    assert_eq!(latched(&mut pit, 0, clocks(600)), 800);
    program(&mut pit, 0, 0, 1000, 0);
    assert_eq!(latched(&mut pit, 0, clocks(1001)), 0xffff, "wraps");
    // Unlatched, byte by byte.
    program(&mut pit, 0, 2, 0x1234, 0);
    assert_eq!(
        (pit.port_read(0x40, 0), pit.port_read(0x40, 0)),
        (0x34, 0x12)
    );
    // Only one byte.
    pit.port_write(0x43, 0x14, 0);
    pit.port_write(0x40, 0x80, 0);
    assert_eq!(
        (pit.port_read(0x40, 0), pit.port_read(0x40, 0)),
        (0x80, 0x80)
    );
    pit.port_write(0x43, 0x24, 0);
    pit.port_write(0x40, 0x80, 0);
    assert_eq!(
        (pit.port_read(0x40, 0), pit.port_read(0x40, 0)),
        (0x80, 0x80)
    );
    assert_eq!(pit.state().channels[0].count, 0x8000);
}

#[test]
fn read_back_command() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1000, 0);
    program(&mut pit, 1, 3, 100, 0);
    // Status and count of channels 0 and 1.
    pit.port_write(0x43, 0xc6, clocks(10));
    assert_eq!(pit.port_read(0x40, 0), 0x80 | 0x30 | 2 << 1);
    assert_eq!(
        (pit.port_read(0x40, 0), pit.port_read(0x40, 0)),
        (0xde, 0x03)
    );
    assert_eq!(pit.port_read(0x41, 0), 0x80 | 0x30 | 3 << 1);
    assert_eq!((pit.port_read(0x41, 0), pit.port_read(0x41, 0)), (80, 0));
    // A second latch does not replace the first.
    pit.port_write(0x43, 0x00, clocks(20));
    pit.port_write(0x43, 0x00, clocks(30));
    assert_eq!(pit.port_read(0x40, 0), (1000 - 20u16) as u8);
    assert_eq!(pit.port_read(0x43, 0), 0);
}

#[test]
fn bcd_counting() {
    let mut pit = Pit::new();
    pit.port_write(0x43, 0x35, 0);
    pit.port_write(0x40, 0x00, 0);
    pit.port_write(0x40, 0x10, 0);
    assert_eq!(pit.state().channels[0].count, 1000);
    assert_eq!(latched(&mut pit, 0, clocks(1)), 0x0999);
    pit.port_write(0x43, 0x31, 0);
    pit.port_write(0x40, 0x00, 0);
    pit.port_write(0x40, 0x00, 0);
    assert_eq!(pit.state().channels[0].count, 10_000);
    assert_eq!(latched(&mut pit, 0, clocks(10_001)), 0x9999);
}

#[test]
fn speaker_port_and_the_gate_of_channel_2() {
    let mut pit = Pit::new();
    pit.port_write(SPEAKER_PORT, 0x03, 0);
    assert_eq!(pit.port_read(SPEAKER_PORT, 0) & 3, 3);
    assert_eq!(pit.port_read(SPEAKER_PORT, 0) & 0x10, 0);
    assert_eq!(pit.port_read(SPEAKER_PORT, 1 << 14) & 0x10, 0x10, "refresh");
    // As Linux calibrates its TSC.
    program(&mut pit, 2, 0, 5000, 0);
    assert!(!out2(&mut pit, clocks(4999)));
    assert!(out2(&mut pit, clocks(5000)));
    // The gate stops the count.
    program(&mut pit, 2, 0, 5000, 0);
    pit.port_write(SPEAKER_PORT, 0, clocks(1000));
    assert_eq!(latched(&mut pit, 2, clocks(3000)), 4000);
    pit.port_write(SPEAKER_PORT, 1, clocks(3000));
    assert_eq!(latched(&mut pit, 2, clocks(4000)), 3000);
    assert!(out2(&mut pit, clocks(7001)));
}

#[test]
fn square_wave_and_rate_outputs() {
    let mut pit = Pit::new();
    pit.port_write(SPEAKER_PORT, 1, 0);
    program(&mut pit, 2, 3, 1001, 0);
    assert!(out2(&mut pit, clocks(500)), "high for (n + 1) / 2");
    assert!(!out2(&mut pit, clocks(501)));
    assert!(out2(&mut pit, clocks(1001)));
    pit.port_write(SPEAKER_PORT, 0, clocks(1600));
    assert!(out2(&mut pit, clocks(1600)), "a low gate forces it high");
    pit.port_write(SPEAKER_PORT, 1, clocks(2000));
    assert_eq!(latched(&mut pit, 2, clocks(2000)), 1001);
    program(&mut pit, 2, 2, 1000, 0);
    assert!(out2(&mut pit, clocks(998)));
    assert!(!out2(&mut pit, clocks(999)));
    assert!(out2(&mut pit, clocks(1000)));
}

#[test]
fn triggered_modes() {
    let mut pit = Pit::new();
    program(&mut pit, 2, 1, 1000, 0);
    assert!(out2(&mut pit, clocks(5)), "waits for its trigger");
    pit.port_write(SPEAKER_PORT, 1, clocks(10));
    assert!(!out2(&mut pit, clocks(11)));
    assert!(!out2(&mut pit, clocks(1008)));
    assert!(out2(&mut pit, clocks(1011)));
    pit.port_write(SPEAKER_PORT, 0, clocks(2000));
    pit.port_write(SPEAKER_PORT, 1, clocks(3000));
    assert!(!out2(&mut pit, clocks(3500)), "triggered again");
    for (mode, start) in [(4, 0), (5, 100)] {
        pit.port_write(SPEAKER_PORT, u8::from(mode == 4), 0);
        program(&mut pit, 2, mode, 1000, 0);
        pit.port_write(SPEAKER_PORT, 1, clocks(start));
        assert!(out2(&mut pit, clocks(start + 998)));
        assert!(
            !out2(&mut pit, clocks(start + 1000) + 420),
            "strobe in mode {mode}"
        );
        assert!(out2(&mut pit, clocks(start + 1002)));
    }
}

#[test]
fn state_round_trip_and_hpet_legacy() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 11932, 0);
    pit.port_write(SPEAKER_PORT, 3, 0);
    let mut state = pit.state();
    assert_eq!(state.flags, FLAG_SPEAKER_DATA_ON);
    let mut other = Pit::new();
    other.set_state(&state, SECOND);
    assert!(
        other
            .next_irq_deadline_ns()
            .unwrap()
            .abs_diff(SECOND + clocks(11932))
            <= 1
    );
    assert_eq!(other.state().channels[2], state.channels[2]);
    state.flags |= FLAG_HPET_LEGACY;
    other.set_state(&state, SECOND);
    assert_eq!(other.next_irq_deadline_ns(), None);
    assert_eq!(other.state().flags, FLAG_HPET_LEGACY | FLAG_SPEAKER_DATA_ON);
}
