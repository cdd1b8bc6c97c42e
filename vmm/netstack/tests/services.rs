//! The network's own services as a guest sees them: ARP, DHCP, echo, DNS, UDP.

mod guest;

use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use guest::{DNS, GATEWAY, GUEST, Guest, MAC, Port};
use netstack::{Config, Forward, Offload, Resolvers, Stack};
use smoltcp::socket::{dhcpv4, icmp, udp};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    Icmpv4Packet, Icmpv4Repr, IpAddress,
};

#[test]
fn dhcp_leases_the_address() {
    let config = Config {
        hostname: Some("testvm".into()),
        mtu: 9000,
        ..guest::config()
    };
    let stack = Stack::new(config).unwrap();
    let mut guest = Guest::unconfigured(Port::Core(Box::new(stack)), 9000, false);
    let mut socket = dhcpv4::Socket::new();
    socket.set_outgoing_options(&[]);
    let buffer: &'static mut [u8] = Box::leak(Box::new([0u8; 1024]));
    socket.set_receive_packet_buffer(buffer);
    let handle = guest.sockets.add(socket);
    let lease = guest.run_until("a lease", |guest| {
        let socket = guest.sockets.get_mut::<dhcpv4::Socket>(handle);
        match socket.poll()? {
            dhcpv4::Event::Configured(config) => {
                let packet = config.packet.unwrap();
                let options: Vec<(u8, Vec<u8>)> = packet
                    .options()
                    .map(|o| (o.kind, o.data.to_vec()))
                    .collect();
                Some((
                    config.address,
                    config.router,
                    config.dns_servers.to_vec(),
                    config.server.address,
                    options,
                ))
            }
            dhcpv4::Event::Deconfigured => None,
        }
    });
    assert_eq!(lease.0.address(), GUEST);
    assert_eq!(lease.0.prefix_len(), 24);
    assert_eq!(lease.1, Some(GATEWAY));
    assert_eq!(lease.2, [DNS]);
    assert_eq!(lease.3, GATEWAY);
    assert!(lease.4.contains(&(12, b"testvm".to_vec())));
    assert!(lease.4.contains(&(26, 9000u16.to_be_bytes().to_vec())));
}

fn arp_request(target: std::net::Ipv4Addr) -> Vec<u8> {
    let mut bytes = vec![0; 42];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    frame.set_src_addr(EthernetAddress(MAC));
    frame.set_dst_addr(EthernetAddress::BROADCAST);
    frame.set_ethertype(EthernetProtocol::Arp);
    ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(MAC),
        source_protocol_addr: GUEST,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    }
    .emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
    bytes
}

#[test]
fn arp_answers_for_its_own_addresses_only() {
    let mut stack = Stack::new(guest::config()).unwrap();
    for (target, answered) in [
        (GATEWAY, true),
        (DNS, true),
        (GUEST, false),
        ([10, 0, 2, 99].into(), false),
    ] {
        stack.from_guest(&arp_request(target), Offload::default());
        let mut replies = Vec::new();
        stack.to_guest(|frame| {
            replies.push(frame.data.clone());
            true
        });
        assert_eq!(!replies.is_empty(), answered, "{target}");
        if let Some(reply) = replies.first() {
            let packet = ArpPacket::new_checked(&reply[14..]).unwrap();
            assert_eq!(packet.operation(), ArpOperation::Reply);
            assert_eq!(packet.source_protocol_addr(), target.octets());
            assert_eq!(packet.source_hardware_addr(), Config::default().gateway_mac);
        }
    }
}

#[test]
fn the_gateway_answers_echo_requests() {
    let mut guest = Guest::new(guest::config());
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    let handle = guest.sockets.add(icmp::Socket::new(buffer(), buffer()));
    let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
    socket.bind(icmp::Endpoint::Ident(0x22b)).unwrap();
    for target in [GATEWAY, DNS] {
        let request = Icmpv4Repr::EchoRequest {
            ident: 0x22b,
            seq_no: 3,
            data: b"are you there",
        };
        let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
        let bytes = socket
            .send(request.buffer_len(), IpAddress::Ipv4(target))
            .unwrap();
        request.emit(
            &mut Icmpv4Packet::new_unchecked(bytes),
            &smoltcp::phy::ChecksumCapabilities::default(),
        );
        guest.run_until("an echo reply", |guest| {
            let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
            let (bytes, from) = socket.recv().ok()?;
            assert_eq!(from, IpAddress::Ipv4(target));
            let packet = Icmpv4Packet::new_checked(bytes).unwrap();
            assert_eq!(packet.data(), b"are you there");
            Some(())
        });
    }
}

/// A UDP server that sends every datagram back, until one says "stop".
fn udp_echo() -> (SocketAddrV4, std::thread::JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let SocketAddr::V4(addr) = socket.local_addr().unwrap() else {
        unreachable!()
    };
    let thread = std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok((n, peer)) = socket.recv_from(&mut buffer) {
            if &buffer[..n] == b"stop" {
                break;
            }
            socket.send_to(&buffer[..n], peer).unwrap();
        }
    });
    (SocketAddrV4::new(GATEWAY, addr.port()), thread)
}

#[test]
fn udp_reaches_the_host_and_comes_back() {
    let (server, thread) = udp_echo();
    let mut guest = Guest::new(guest::config());
    let handle = guest.udp_socket(5000);
    for len in [0, 1, 512, 1472] {
        let data = guest::pattern(len);
        guest.udp_send(handle, server, &data);
        assert_eq!(guest.udp_recv(handle), (data, server));
    }
    assert_eq!(guest.stack().flow_counts(), (0, 1));
    guest.udp_send(handle, server, b"stop");
    guest.run_for(Duration::from_millis(20));
    thread.join().unwrap();
}

#[test]
fn large_datagrams_cross_in_fragments() {
    let (server, thread) = udp_echo();
    // The guest's own stack does not fragment, so it has a link with large packets; its frames are cut up on the way.
    let stack = Stack::new(guest::config()).unwrap();
    let mut guest = Guest::unconfigured(Port::Core(Box::new(stack)), 9000, false);
    guest.configure(GUEST);
    let handle = guest.udp_socket(5000);
    let data = guest::pattern(5000);
    guest.udp_send(handle, server, &data);
    // Collect the answer's fragments by hand: they must be in order and fit the link.
    let mut payload = Vec::new();
    guest.run_until("all fragments", |guest| {
        while let Some(frame) = guest.wire.rx.pop_front() {
            if frame[12..14] == [8, 0] && frame[23] == 17 {
                assert!(frame.len() <= 1514);
                let offset = usize::from(u16::from_be_bytes([frame[20], frame[21]]) & 0x1fff) * 8;
                assert_eq!(offset, payload.len());
                payload.extend_from_slice(&frame[34..]);
            } else {
                guest.wire.rx.push_back(frame);
                break;
            }
        }
        (payload.len() >= 5008).then_some(())
    });
    assert_eq!(payload[8..], data[..]);

    // The same the other way round: send the reply's fragments back as if the guest had made them.
    let mut fragments = Vec::new();
    let whole = {
        let mut header = payload[..8].to_vec();
        header[0..2].copy_from_slice(&5000u16.to_be_bytes());
        header[2..4].copy_from_slice(&server.port().to_be_bytes());
        header[6..8].fill(0);
        [header, b"x".repeat(5000)].concat()
    };
    for (index, part) in whole.chunks(1480).enumerate() {
        let mut frame = vec![0; 34 + part.len()];
        frame[0..6].copy_from_slice(&Config::default().gateway_mac);
        frame[6..12].copy_from_slice(&MAC);
        frame[12..14].copy_from_slice(&[8, 0]);
        let mut packet = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
        packet.set_version(4);
        packet.set_header_len(20);
        packet.set_total_len(20 + part.len() as u16);
        packet.set_ident(77);
        packet.clear_flags();
        packet.set_more_frags((index + 1) * 1480 < whole.len());
        packet.set_frag_offset((index * 1480) as u16);
        packet.set_hop_limit(64);
        packet.set_next_header(smoltcp::wire::IpProtocol::Udp);
        packet.set_src_addr(GUEST);
        packet.set_dst_addr(GATEWAY);
        packet.fill_checksum();
        packet.payload_mut().copy_from_slice(part);
        fragments.push(frame);
    }
    fragments.reverse();
    for frame in fragments {
        guest.stack().from_guest(&frame, Offload::default());
    }
    let mut answered = 0;
    guest.run_until("the echo of the fragments", |guest| {
        guest.wire.rx.retain(|frame| {
            let ours = frame[12..14] == [8, 0] && frame[23] == 17;
            if ours {
                answered += frame[34..].iter().filter(|&&b| b == b'x').count();
            }
            !ours
        });
        (answered >= 4990).then_some(())
    });
    guest.udp_send(handle, server, b"stop");
    guest.run_for(Duration::from_millis(20));
    thread.join().unwrap();
}

#[test]
fn a_closed_udp_port_is_reported() {
    let closed = {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        SocketAddrV4::new(GATEWAY, socket.local_addr().unwrap().port())
    };
    let mut guest = Guest::new(guest::config());
    let handle = guest.udp_socket(5001);
    guest.udp_send(handle, closed, b"anyone?");
    guest.run_until("an ICMP error", |guest| {
        let error = guest.wire.rx.iter().find(|frame| {
            frame[12..14] == [8, 0] && frame[23] == 1 && frame[34] == 3 && frame[35] == 3
        })?;
        // The quoted ports name the flow.
        assert_eq!(error[34 + 8 + 20..][..2], 5001u16.to_be_bytes());
        assert_eq!(error[34 + 8 + 22..][..2], closed.port().to_be_bytes());
        Some(())
    });
}

#[test]
fn idle_udp_flows_are_closed() {
    let (server, thread) = udp_echo();
    let config = Config {
        udp_idle: Duration::from_millis(200),
        max_udp: 4,
        ..guest::config()
    };
    let mut guest = Guest::new(config);
    for port in 6000..6010 {
        let handle = guest.udp_socket(port);
        guest.udp_send(handle, server, b"hi");
        assert_eq!(guest.udp_recv(handle).0, b"hi");
        assert!(guest.stack().flow_counts().1 <= 4);
    }
    guest.run_until("the flows to expire", |guest| {
        (guest.stack().flow_counts().1 == 0).then_some(())
    });
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .send_to(b"stop", ("127.0.0.1", server.port()))
        .unwrap();
    thread.join().unwrap();
}

#[test]
fn udp_forwards_lead_to_the_guest() {
    let config = Config {
        forwards: vec!["0:7777/udp".parse::<Forward>().unwrap()],
        ..guest::config()
    };
    let mut guest = Guest::new(config);
    let host_side = guest.stack().forwards()[0].1;
    let handle = guest.udp_socket(7777);
    let clients: Vec<UdpSocket> = (0..3)
        .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
        .collect();
    // Lets the stack learn the guest's Ethernet address first.
    guest
        .stack()
        .from_guest(&arp_request(GATEWAY), Offload::default());
    for (i, client) in clients.iter().enumerate() {
        client
            .send_to(format!("question {i}").as_bytes(), host_side)
            .unwrap();
        let (data, peer) = guest.udp_recv(handle);
        assert_eq!(data, format!("question {i}").as_bytes());
        assert_eq!(*peer.ip(), GATEWAY);
        guest.udp_send(handle, peer, format!("answer {i}").as_bytes());
        guest.run_for(Duration::from_millis(10));
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut buffer = [0; 100];
        let (n, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], format!("answer {i}").as_bytes());
        assert_eq!(from, host_side);
    }
}

const QUERY: &[u8] =
    b"\xab\xcd\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04host\x04test\x00\x00\x01\x00\x01";

fn ask(guest: &mut Guest, query: &[u8]) -> Vec<u8> {
    let handle = guest.udp_socket(5353);
    let server = SocketAddrV4::new(DNS, 53);
    guest.udp_send(handle, server, query);
    let (answer, from) = guest.udp_recv(handle);
    assert_eq!(from, server);
    guest.sockets.get_mut::<udp::Socket>(handle).close();
    guest.sockets.remove(handle);
    answer
}

#[test]
fn dns_queries_go_to_the_resolver() {
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = resolver.local_addr().unwrap();
    let refusing = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let thread = std::thread::spawn(move || {
        let mut buffer = [0; 512];
        let (n, peer) = resolver.recv_from(&mut buffer).unwrap();
        // A forged answer with another identifier must be ignored.
        let mut forged = buffer[..n].to_vec();
        forged[0] ^= 1;
        forged[2] |= 0x80;
        resolver.send_to(&forged, peer).unwrap();
        let mut answer = buffer[..n].to_vec();
        answer[2] |= 0x80;
        answer[7] = 1;
        answer.extend_from_slice(b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\xc0\0\x02\x63");
        resolver.send_to(&answer, peer).unwrap();
    });
    // The first resolver refuses, so the second one is asked.
    let config = Config {
        resolvers: Resolvers::Fixed(vec![refusing, addr]),
        ..guest::config()
    };
    let mut guest = Guest::new(config);
    let answer = ask(&mut guest, QUERY);
    assert_eq!(answer[..2], QUERY[..2]);
    assert!(answer.ends_with(&[192, 0, 2, 99]));
    thread.join().unwrap();
}

#[test]
fn dns_without_resolvers_fails_at_once() {
    let mut guest = Guest::new(guest::config());
    let answer = ask(&mut guest, QUERY);
    assert_eq!(answer[..2], QUERY[..2]);
    assert_eq!(answer[3] & 0xf, 2);
}

#[test]
fn dns_answers_names_of_the_hosts_file() {
    let path = std::env::temp_dir().join(format!("netstack-hosts-{}", std::process::id()));
    std::fs::write(&path, "192.0.2.44 host.test\n").unwrap();
    let config = Config {
        hosts_file: Some(path.clone()),
        ..guest::config()
    };
    let mut guest = Guest::new(config);
    let answer = ask(&mut guest, QUERY);
    std::fs::remove_file(path).unwrap();
    assert_eq!(answer[3] & 0xf, 0);
    assert!(answer.ends_with(&[192, 0, 2, 44]));
}
