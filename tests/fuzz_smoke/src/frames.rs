//! The user-mode network: frames that no honest guest sends, and resolvers that lie.

use crate::input::Input;
use netstack::{Config, Offload, PartialChecksum, Resolvers, Stack};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GUEST: [u8; 4] = [10, 0, 2, 15];
const GATEWAY: [u8; 4] = [10, 0, 2, 2];
const DNS: [u8; 4] = [10, 0, 2, 3];

/// Each frame begins with what it is and its length.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let options = input.u8();
    // A resolver that answers with what the input says; nothing leaves this host.
    let resolver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("no socket for a resolver");
    resolver
        .set_nonblocking(true)
        .expect("a non-blocking socket");
    let servers: Vec<SocketAddr> = resolver.local_addr().into_iter().collect();
    let config = Config {
        resolvers: Resolvers::Fixed(servers),
        hosts_file: None,
        outbound: options & 1 != 0,
        host_loopback: false,
        max_tcp: 8,
        max_udp: 8,
        mtu: if options & 2 != 0 { 65_000 } else { 1500 },
        ..Config::default()
    };
    let mut stack = Stack::new(config).expect("a network stack");
    let mut frames = 0;
    while !input.is_empty() && frames < 200 {
        frames += 1;
        let frame = frame(&mut input);
        stack.from_guest(&frame, offload(&mut input));
        if input.u8() & 3 == 0 {
            settle(&mut stack);
            answer(&resolver, &mut input);
        }
    }
    settle(&mut stack);
    let _ = stack.next_timeout();
    let (tcp, udp) = stack.flow_counts();
    assert!(tcp <= 8 && udp <= 8, "{tcp} TCP and {udp} UDP flows");
}

fn settle(stack: &mut Stack) {
    stack.process().expect("the network stack ended");
    stack.to_guest(|frame| {
        assert!(frame.data.len() >= 14);
        true
    });
}

fn answer(resolver: &UdpSocket, input: &mut Input<'_>) {
    let mut query = [0; 1500];
    let Ok((len, from)) = resolver.recv_from(&mut query) else {
        return;
    };
    let mut reply = query[..len].to_vec();
    if let Some(flags) = reply.get_mut(2) {
        *flags |= 0x80;
    }
    let more = input.below(100);
    reply.extend_from_slice(input.bytes(more));
    input.disturb(&mut reply);
    let _ = resolver.send_to(&reply, from);
}

fn offload(input: &mut Input<'_>) -> Offload {
    match input.below(4) {
        0 => Offload::default(),
        // Lets everything through to the parsers.
        1 | 2 => Offload {
            checksum: Some(PartialChecksum {
                start: 34,
                offset: 16,
            }),
            ..Offload::default()
        },
        _ => Offload {
            checksum: input.flag().then(|| PartialChecksum {
                start: input.value() as _,
                offset: input.value() as _,
            }),
            gso_size: input.value() as _,
            header_len: input.value() as _,
        },
    }
}

fn frame(input: &mut Input<'_>) -> Vec<u8> {
    let kind = input.u8();
    let len = usize::from(input.u8()) << (kind >> 6 & 3);
    if kind & 15 == 0 {
        return input.bytes(len).to_vec();
    }
    let mut frame = vec![0xff; 6];
    if kind & 0x10 == 0 {
        frame.copy_from_slice(&Config::default().gateway_mac);
    }
    frame.extend_from_slice(&MAC);
    if kind & 15 == 1 {
        frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1 + (kind >> 5 & 1)]);
        frame.extend_from_slice(&MAC);
        frame.extend_from_slice(&GUEST);
        frame.extend_from_slice(input.bytes(len));
        return frame;
    }
    frame.extend_from_slice(&[8, 0]);
    let payload = transport(kind & 15, input, len);
    let total = (20 + payload.1.len()) as u16;
    let mut header = vec![0x45, 0];
    header.extend_from_slice(&total.to_be_bytes());
    header.extend_from_slice(&[0, 1, 0, 0, 64, payload.0, 0, 0]);
    header.extend_from_slice(&GUEST);
    let target = match input.below(8) {
        0 => input.array(),
        n => [
            GATEWAY,
            DNS,
            DNS,
            GATEWAY,
            [255; 4],
            [127, 0, 0, 1],
            [10, 0, 2, 255],
        ][n - 1],
    };
    header.extend_from_slice(&target);
    match input.below(8) {
        0 => input.disturb(&mut header),
        // Fragments.
        1 => header[6..8].copy_from_slice(&(input.u16() & 0x3f0f).to_be_bytes()),
        _ => {}
    }
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&header);
    frame.extend_from_slice(&payload.1);
    frame
}

/// Protocol number and packet.
fn transport(kind: u8, input: &mut Input<'_>, len: usize) -> (u8, Vec<u8>) {
    let port = |n: u16| n.to_be_bytes();
    let udp = |to: u16, body: &[u8]| {
        let mut packet = port(68).to_vec();
        packet.extend_from_slice(&port(to));
        packet.extend_from_slice(&((8 + body.len()) as u16).to_be_bytes());
        packet.extend_from_slice(&[0, 0]);
        packet.extend_from_slice(body);
        (17, packet)
    };
    match kind {
        2 | 3 => {
            // DHCP.
            let mut body = vec![0; 240];
            body[..4].copy_from_slice(&[1, 1, 6, 0]);
            body[28..34].copy_from_slice(&MAC);
            body[236..240].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
            if kind == 3 {
                input.disturb(&mut body);
            }
            body.extend_from_slice(input.bytes(len));
            udp(67, &body)
        }
        4 | 5 => {
            // DNS: a header with one question.
            let mut body = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            if kind == 5 {
                input.disturb(&mut body);
            }
            body.extend_from_slice(input.bytes(len));
            udp(53, &body)
        }
        6 => {
            let to = input.u16();
            udp(to, input.bytes(len))
        }
        7..=10 => {
            // TCP: ports and numbers that repeat, so that segments meet connections.
            let mut packet = port(40_000 + u16::from(input.u8() & 3)).to_vec();
            packet.extend_from_slice(&port([53, 80, 1, 9][input.below(4)]));
            packet.extend_from_slice(&u32::from(input.u8()).to_be_bytes());
            packet.extend_from_slice(&input.u32().to_be_bytes());
            packet.extend_from_slice(&[0x50, input.u8() & 0x3f]);
            packet.extend_from_slice(&input.u16().to_be_bytes());
            packet.extend_from_slice(&[0; 4]);
            if kind == 10 {
                input.disturb(&mut packet);
            }
            packet.extend_from_slice(input.bytes(len));
            (6, packet)
        }
        11 => (1, [&[8, 0, 0, 0], input.bytes(len)].concat()),
        12 => (17, input.bytes(len).to_vec()),
        _ => (input.u8(), input.bytes(len).to_vec()),
    }
}

fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// ARP, DHCP, DNS, TCP and echo as honest guests send them.
pub fn seeds() -> Vec<Vec<u8>> {
    let arp = [1, 20, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2, 0, 0, 0];
    let dhcp = [2, 12, 53, 1, 1, 55, 3, 1, 3, 6, 61, 1, 0, 255, 5, 7, 1, 0];
    let dns = [
        4, 17, 7, b'e', b'x', b'a', b'm', b'p', b'l', b'e', 3, b'o', b'r', b'g', 0, 0, 1, 0, 1, 2,
        7, 1, 0,
    ];
    let syn = [
        7, 4, 0, 1, 1, 0, 0, 0, 0, 2, 0, 64, 2, 4, 5, 0xb4, 1, 7, 1, 0,
    ];
    let ack = [
        7, 4, 0, 1, 2, 1, 0, 0, 0, 0x18, 0, 64, 1, 2, 3, 4, 1, 7, 1, 0,
    ];
    let echo = [11, 8, 0, 1, 0, 2, 1, 2, 3, 4, 1, 7, 1, 0];
    let mut all = Vec::new();
    for options in 0..4 {
        for part in [&arp[..], &dhcp, &dns, &syn, &ack, &echo] {
            all.push([&[options], part].concat());
        }
        all.push(
            [
                &[options],
                &arp[..],
                &dhcp,
                &dns,
                &dns,
                &syn,
                &ack,
                &ack,
                &echo,
            ]
            .concat(),
        );
    }
    all
}
