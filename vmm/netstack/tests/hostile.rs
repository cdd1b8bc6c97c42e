//! Frames that no honest guest sends.

mod guest;

use std::net::{SocketAddrV4, TcpListener};

use guest::{GATEWAY, GUEST, Guest, MAC};
use netstack::{Config, Offload, PartialChecksum, Stack};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn settle(stack: &mut Stack) {
    stack.process().unwrap();
    stack.to_guest(|_| true);
}

/// Settings under which no frame can make the host send anything outside.
fn shut() -> Config {
    Config {
        outbound: false,
        ..guest::config()
    }
}

#[test]
fn garbage_is_dropped() {
    let mut stack = Stack::new(shut()).unwrap();
    let mut random = Random(1);
    for _ in 0..1000 {
        let len = random.below(200);
        let frame: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        stack.from_guest(&frame, Offload::default());
        settle(&mut stack);
    }
    assert_eq!(stack.flow_counts(), (0, 0));
}

fn plausible(random: &mut Random) -> Vec<u8> {
    let mut frame = vec![0u8; 14];
    let dst = if random.below(2) == 0 {
        [0xff; 6]
    } else {
        Config::default().gateway_mac
    };
    frame[0..6].copy_from_slice(&dst);
    frame[6..12].copy_from_slice(&MAC);
    if random.below(10) == 0 {
        frame[12..14].copy_from_slice(&[8, 6]);
        frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0]);
        frame.extend((0..21).map(|_| random.next() as u8));
    } else {
        frame[12..14].copy_from_slice(&[8, 0]);
        let len = random.below(400);
        let mut packet = vec![0u8; 20];
        packet[0] = if random.below(8) == 0 {
            random.next() as u8
        } else {
            0x45
        };
        let total = if random.below(8) == 0 {
            random.next() as u16
        } else {
            20 + len as u16
        };
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        if random.below(4) == 0 {
            packet[6] = random.next() as u8;
            packet[7] = random.next() as u8;
        }
        packet[8] = 64;
        packet[9] = [1, 6, 17, 17, 47][random.below(5)];
        packet[12..16].copy_from_slice(&GUEST.octets());
        let targets = [
            GATEWAY.octets(),
            [10, 0, 2, 3],
            [255; 4],
            [10, 0, 2, 255],
            [127, 0, 0, 1],
            [0; 4],
        ];
        packet[16..20].copy_from_slice(&targets[random.below(targets.len())]);
        let mut payload: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        if random.below(2) == 0 && len >= 20 {
            // Something like a DHCP, DNS or TCP header.
            let port = [67u16, 53, 80][random.below(3)];
            payload[2..4].copy_from_slice(&port.to_be_bytes());
            payload[4..6].copy_from_slice(&(len as u16).to_be_bytes());
            payload[12] = 0x50 | payload[12] & 0xf;
            if len >= 8 + 244 {
                payload[8] = 1;
                payload[9] = 1;
                payload[10] = 6;
                payload[8 + 236..8 + 240].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
                payload[8 + 240..8 + 243].copy_from_slice(&[53, 1, 1 + random.below(8) as u8]);
            }
        }
        packet.extend_from_slice(&payload);
        frame.extend_from_slice(&packet);
    }
    frame
}

#[test]
fn damaged_packets_are_harmless() {
    let mut stack = Stack::new(shut()).unwrap();
    let mut random = Random(2);
    // Offloaded checksums let everything through to the parsers.
    let offload = Offload {
        checksum: Some(PartialChecksum {
            start: 65535,
            offset: 65535,
        }),
        gso_size: 1,
        header_len: 65535,
    };
    for _ in 0..50_000 {
        let frame = plausible(&mut random);
        stack.from_guest(&frame, offload);
        let cut = random.below(frame.len());
        stack.from_guest(&frame[..cut], offload);
        settle(&mut stack);
    }
}

#[test]
fn segments_with_random_fields_leave_a_connection_consistent() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut random = Random(3);
    for _ in 0..20 {
        let mut guest = Guest::new(guest::config());
        let handle = guest.tcp_connect(SocketAddrV4::new(GATEWAY, port));
        guest.run_until("the connection", |guest| {
            guest.tcp(handle).can_send().then_some(())
        });
        guest.tcp(handle).send_slice(&[1; 3000]).unwrap();
        let mut template = None;
        guest.run_until("a segment to copy", |guest| {
            let now = smoltcp::time::Instant::from_secs(1);
            guest.iface.poll(now, &mut guest.wire, &mut guest.sockets);
            template = guest.wire.tx.front().cloned();
            template.is_some().then_some(())
        });
        let template = template.unwrap();
        let offload = Offload {
            checksum: Some(PartialChecksum {
                start: 34,
                offset: 16,
            }),
            ..Offload::default()
        };
        let stack = guest.stack();
        for _ in 0..2000 {
            let mut frame = template.clone();
            let jitter = |random: &mut Random, bytes: &mut [u8]| {
                let old = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                let near = (random.below(8192) as u32).wrapping_sub(4096);
                let new = if random.below(4) == 0 {
                    random.next() as u32
                } else {
                    old.wrapping_add(near)
                };
                bytes.copy_from_slice(&new.to_be_bytes());
            };
            jitter(&mut random, &mut frame[38..42]);
            if random.below(2) == 0 {
                jitter(&mut random, &mut frame[42..46]);
            }
            // Resets end the game too early; keep them rare.
            frame[47] = random.next() as u8 & if random.below(500) == 0 { 0xff } else { !4 };
            frame[48] = random.next() as u8;
            frame[49] = random.next() as u8;
            stack.from_guest(&frame, offload);
            settle(stack);
        }
    }
}

#[test]
fn a_flood_that_nobody_reads_stays_bounded() {
    let mut stack = Stack::new(shut()).unwrap();
    let mut random = Random(4);
    let offload = Offload {
        checksum: Some(PartialChecksum {
            start: 0,
            offset: 0,
        }),
        ..Offload::default()
    };
    for _ in 0..100_000 {
        stack.from_guest(&plausible(&mut random), offload);
    }
    stack.process().unwrap();
    let mut frames = 0;
    stack.to_guest(|_| {
        frames += 1;
        true
    });
    assert!(frames <= 600, "{frames}");
}
