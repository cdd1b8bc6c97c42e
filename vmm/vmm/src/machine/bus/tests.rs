use std::sync::Arc;

use super::*;
use crate::channel::ByteChannel;
use crate::machine::Stop;

/// Pokes every port with random accesses, and memory that is not RAM: nothing may panic or
/// hang, and whatever the guest does, only the end of the run comes of it.
#[test]
fn random_pokes_leave_the_board_whole() {
    let stop = Arc::new(Stop::default());
    let chipset = Chipset::new(None, &stop, &ByteChannel::default()).unwrap();
    let bus = Bus {
        chipset,
        pci: PciBus::default(),
    };
    let mut state = 0x0123_4567_89ab_cdefu64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let interesting = [0x3f8, 0x60, 0x70, 0x600, 0x620, 0xcf8, 0xfff8u16];
    for _ in 0..400_000 {
        let random = next();
        let size = [1u8, 2, 4][next() as usize % 3];
        let port = match random % 4 {
            0 => (random >> 8) as u16,
            _ => interesting[(random >> 8) as usize % interesting.len()]
                .wrapping_add((random >> 24) as u16 % 16),
        };
        let bytes = next().to_le_bytes();
        let mut buffer = bytes;
        let count = 1 + next() as usize % 2;
        let len = usize::from(size) * count;
        match next() % 4 {
            0 => bus.port_read(port, size, &mut buffer[..len]),
            1 => bus.port_write(port, size, &bytes[..len]),
            2 => bus.mmio_read(next() >> (next() % 64), &mut buffer[..len]),
            _ => bus.mmio_write(next() >> (next() % 64), &bytes[..len]),
        }
    }
    assert!(stop.requested(), "with so many pokes, one was a reset");
}

#[test]
fn absent_ports_read_as_ones() {
    let stop = Arc::new(Stop::default());
    let chipset = Chipset::new(None, &stop, &ByteChannel::default()).unwrap();
    let bus = Bus {
        chipset,
        pci: PciBus::default(),
    };
    let mut data = [0; 4];
    for port in [0u16, 0x80, 0x1f0, 0x2f8, 0x500, 0xfffe, 0xffff] {
        for len in [1usize, 2, 4] {
            data.fill(0);
            bus.port_read(port, len as u8, &mut data[..len]);
            assert!(data[..len].iter().all(|&b| b == 0xff), "port {port:#x}");
        }
    }
    bus.port_write(0x80, 1, &[0x55]);
    assert!(!stop.requested());
    bus.port_write(0xcf9, 1, &[2]);
    assert!(!stop.requested());
    bus.port_write(0xcf9, 1, &[6]);
    assert!(stop.requested());
}
