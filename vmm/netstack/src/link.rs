//! The guest's Ethernet link: addresses on it, and frames built for it.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr,
};

use crate::checksum;
use crate::config::Config;
use crate::frame::{Frame, Offload, Outbox, PartialChecksum};
use crate::poller::Poller;

pub(crate) const ETHERNET_HEADER: usize = 14;
pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const UDP_HEADER: usize = 8;

/// Addresses remembered of the guest's side. A guest has one, or a few if it runs containers or guests of its own.
const MAX_NEIGHBORS: usize = 64;

/// Everything that the protocols share: settings, time, host descriptors, and the way to the guest.
pub(crate) struct Link {
    pub(crate) config: Config,
    pub(crate) poller: Poller,
    pub(crate) out: Outbox,
    pub(crate) now: Instant,
    neighbors: HashMap<Ipv4Addr, EthernetAddress>,
    random: RandomState,
    ident: u16,
}

impl Link {
    pub(crate) fn new(config: Config, poller: Poller) -> Self {
        Self {
            config,
            poller,
            out: Outbox::new(),
            now: Instant::now(),
            neighbors: HashMap::new(),
            random: RandomState::new(),
            ident: 0,
        }
    }

    fn mac(&self) -> EthernetAddress {
        EthernetAddress(self.config.gateway_mac)
    }

    /// Whether frames to `mac` are for the stack.
    pub(crate) fn accepts(&self, mac: EthernetAddress) -> bool {
        mac == self.mac() || mac.is_broadcast()
    }

    /// A number that the guest cannot foresee.
    pub(crate) fn random(&mut self) -> u32 {
        self.ident = self.ident.wrapping_add(1);
        self.random.hash_one((self.ident, self.now)) as u32
    }

    /// Notes the Ethernet address behind one of the guest's IPv4 addresses.
    pub(crate) fn learn(&mut self, ip: Ipv4Addr, mac: EthernetAddress) {
        let own = ip == self.config.gateway_ip || ip == self.config.dns_ip;
        if own || !mac.is_unicast() || !self.config.is_local_host(ip) {
            return;
        }
        if self.neighbors.len() >= MAX_NEIGHBORS && !self.neighbors.contains_key(&ip) {
            let guest = self.config.guest_ip;
            self.neighbors.retain(|&known, _| known == guest);
        }
        self.neighbors.insert(ip, mac);
    }

    pub(crate) fn arp_input(&mut self, payload: &[u8]) {
        let Ok(packet) = ArpPacket::new_checked(payload) else {
            return;
        };
        let Ok(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpRepr::parse(&packet)
        else {
            return;
        };
        self.learn(source_protocol_addr, source_hardware_addr);
        let ours = target_protocol_addr == self.config.gateway_ip
            || target_protocol_addr == self.config.dns_ip;
        // An announcement of one of our addresses is not a question.
        if operation == ArpOperation::Request
            && ours
            && source_protocol_addr != target_protocol_addr
        {
            self.send_arp(
                ArpOperation::Reply,
                target_protocol_addr,
                source_hardware_addr,
                source_protocol_addr,
            );
        }
    }

    /// Asks for the Ethernet address behind `ip`.
    pub(crate) fn send_arp_request(&mut self, ip: Ipv4Addr) {
        let gateway = self.config.gateway_ip;
        self.send_arp(
            ArpOperation::Request,
            gateway,
            EthernetAddress::BROADCAST,
            ip,
        );
    }

    fn send_arp(
        &mut self,
        operation: ArpOperation,
        own_ip: Ipv4Addr,
        target_mac: EthernetAddress,
        target_ip: Ipv4Addr,
    ) {
        let repr = ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr: self.mac(),
            source_protocol_addr: own_ip,
            target_hardware_addr: match operation {
                ArpOperation::Request => EthernetAddress([0; 6]),
                _ => target_mac,
            },
            target_protocol_addr: target_ip,
        };
        let Some(mut data) = self.out.buffer(ETHERNET_HEADER + repr.buffer_len()) else {
            return;
        };
        self.emit_ethernet(&mut data, target_mac, EthernetProtocol::Arp);
        repr.emit(&mut ArpPacket::new_unchecked(&mut data[ETHERNET_HEADER..]));
        self.out.push(Frame {
            data,
            offload: Offload::default(),
        });
    }

    fn emit_ethernet(&self, data: &mut [u8], dst: EthernetAddress, ethertype: EthernetProtocol) {
        let repr = EthernetRepr {
            src_addr: self.mac(),
            dst_addr: dst,
            ethertype,
        };
        repr.emit(&mut EthernetFrame::new_unchecked(data));
    }

    /// The Ethernet address for a packet to `dst`; asks the guest if it is not known.
    fn resolve(&mut self, dst: Ipv4Addr) -> Option<EthernetAddress> {
        if dst.is_broadcast() {
            return Some(EthernetAddress::BROADCAST);
        }
        let known = self.neighbors.get(&dst).copied();
        if known.is_none() {
            self.send_arp_request(dst);
        }
        known
    }

    /// Sends an IPv4 packet, in fragments if it must be. A packet to an unknown neighbor is lost, as is one that finds
    /// the queue full.
    pub(crate) fn send_ipv4(
        &mut self,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        protocol: IpProtocol,
        payload: &[u8],
    ) {
        let max = self.config.mtu - IPV4_HEADER;
        if payload.len() + IPV4_HEADER > usize::from(u16::MAX) {
            return;
        }
        let Some(mac) = self.resolve(dst) else {
            return;
        };
        self.ident = self.ident.wrapping_add(1);
        let ident = self.ident;
        if payload.len() <= max {
            self.send_fragment(mac, (src, dst), protocol, payload, (ident, 0, false));
            return;
        }
        let step = max & !7;
        let mut offset = 0;
        for part in payload.chunks(step) {
            let more = offset + part.len() < payload.len();
            self.send_fragment(mac, (src, dst), protocol, part, (ident, offset, more));
            offset += part.len();
        }
    }

    fn send_fragment(
        &mut self,
        mac: EthernetAddress,
        (src, dst): (Ipv4Addr, Ipv4Addr),
        protocol: IpProtocol,
        payload: &[u8],
        (ident, offset, more): (u16, usize, bool),
    ) {
        let len = ETHERNET_HEADER + IPV4_HEADER + payload.len();
        let Some(mut data) = self.out.buffer(len) else {
            return;
        };
        self.emit_headers(&mut data, mac, src, dst, protocol);
        if more || offset != 0 {
            let mut packet = Ipv4Packet::new_unchecked(&mut data[ETHERNET_HEADER..]);
            packet.set_ident(ident);
            packet.clear_flags();
            packet.set_more_frags(more);
            packet.set_frag_offset(offset as u16);
            packet.fill_checksum();
        }
        data[ETHERNET_HEADER + IPV4_HEADER..].copy_from_slice(payload);
        self.out.push(Frame {
            data,
            offload: Offload::default(),
        });
    }

    fn emit_headers(
        &self,
        data: &mut [u8],
        mac: EthernetAddress,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        protocol: IpProtocol,
    ) {
        self.emit_ethernet(data, mac, EthernetProtocol::Ipv4);
        let repr = Ipv4Repr {
            src_addr: src,
            dst_addr: dst,
            next_header: protocol,
            payload_len: data.len() - ETHERNET_HEADER - IPV4_HEADER,
            hop_limit: 64,
        };
        let mut packet = Ipv4Packet::new_unchecked(&mut data[ETHERNET_HEADER..]);
        repr.emit(&mut packet, &ChecksumCapabilities::default());
    }

    /// Sends a TCP segment of `len` bytes that `write` fills, checksum excepted. With a `gso_size` the guest gets it as
    /// a frame of many segments with `tcp_header` bytes of TCP header. Returns whether it was queued.
    pub(crate) fn send_tcp(
        &mut self,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        len: usize,
        gso: Option<(u16, usize)>,
        write: impl FnOnce(&mut [u8]),
    ) -> bool {
        const CHECKSUM_OFFSET: usize = 16;
        let Some(mac) = self.resolve(dst) else {
            return false;
        };
        let start = ETHERNET_HEADER + IPV4_HEADER;
        let Some(mut data) = self.out.buffer(start + len) else {
            return false;
        };
        self.emit_headers(&mut data, mac, src, dst, IpProtocol::Tcp);
        let segment = &mut data[start..];
        write(segment);
        segment[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 2].fill(0);
        let pseudo = checksum::pseudo_header(src, dst, IpProtocol::Tcp.into(), len);
        let mut offload = Offload::default();
        let field = if self.config.offloads.checksum {
            offload.checksum = Some(PartialChecksum {
                start: start as u16,
                offset: CHECKSUM_OFFSET as u16,
            });
            pseudo
        } else {
            !checksum::combine(&[pseudo, checksum::sum(segment)])
        };
        segment[CHECKSUM_OFFSET..CHECKSUM_OFFSET + 2].copy_from_slice(&field.to_be_bytes());
        if let Some((gso_size, tcp_header)) = gso {
            offload.gso_size = gso_size;
            offload.header_len = (start + tcp_header) as u16;
        }
        self.out.push(Frame { data, offload });
        true
    }

    /// Sends a UDP datagram.
    pub(crate) fn send_udp(&mut self, src: SocketAddrV4, dst: SocketAddrV4, payload: &[u8]) {
        let len = UDP_HEADER + payload.len();
        if len + IPV4_HEADER > usize::from(u16::MAX) {
            return;
        }
        let mut datagram = vec![0; len];
        datagram[0..2].copy_from_slice(&src.port().to_be_bytes());
        datagram[2..4].copy_from_slice(&dst.port().to_be_bytes());
        datagram[4..6].copy_from_slice(&(len as u16).to_be_bytes());
        datagram[UDP_HEADER..].copy_from_slice(payload);
        let pseudo = checksum::pseudo_header(*src.ip(), *dst.ip(), IpProtocol::Udp.into(), len);
        // A sum of zero is sent as all ones: zero means "no checksum".
        let sum = match !checksum::combine(&[pseudo, checksum::sum(&datagram)]) {
            0 => 0xffff,
            sum => sum,
        };
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        self.send_ipv4(*src.ip(), *dst.ip(), IpProtocol::Udp, &datagram);
    }

    /// Tells the guest that its packet from `src` to `dst`, with these first bytes of payload, did not arrive.
    pub(crate) fn send_unreachable(
        &mut self,
        reason: Icmpv4DstUnreachable,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        protocol: IpProtocol,
        first: [u8; 8],
    ) {
        let repr = Icmpv4Repr::DstUnreachable {
            reason,
            header: Ipv4Repr {
                src_addr: src,
                dst_addr: dst,
                next_header: protocol,
                payload_len: first.len(),
                hop_limit: 64,
            },
            data: &first,
        };
        self.send_icmp(self.config.gateway_ip, src, &repr);
    }

    pub(crate) fn send_icmp(&mut self, src: Ipv4Addr, dst: Ipv4Addr, repr: &Icmpv4Repr<'_>) {
        let mut message = vec![0; repr.buffer_len()];
        repr.emit(
            &mut Icmpv4Packet::new_unchecked(&mut message[..]),
            &ChecksumCapabilities::default(),
        );
        self.send_ipv4(src, dst, IpProtocol::Icmp, &message);
    }

    /// Where on the host's side a connection to `dst` goes, or `None` if the guest may not go there.
    pub(crate) fn host_address(&self, dst: Ipv4Addr) -> Option<Ipv4Addr> {
        if !self.config.outbound {
            return None;
        }
        if dst == self.config.gateway_ip {
            return self.config.host_loopback.then_some(Ipv4Addr::LOCALHOST);
        }
        let routable = !self.config.is_local(dst)
            && !dst.is_loopback()
            && !dst.is_multicast()
            && dst.octets()[0] != 0
            && dst.octets()[0] < 240;
        routable.then_some(dst)
    }

    /// The address that the guest sees for a host-side peer. Peers that it could not answer by their own address
    /// appear as the gateway.
    pub(crate) fn guest_view(&self, peer: std::net::IpAddr) -> Ipv4Addr {
        match peer.to_canonical() {
            std::net::IpAddr::V4(ip)
                if !ip.is_loopback() && !ip.is_unspecified() && !self.config.is_local(ip) =>
            {
                ip
            }
            _ => self.config.gateway_ip,
        }
    }
}

/// The first eight bytes of a UDP or TCP packet, as an ICMP error quotes them.
pub(crate) fn quoted_ports(src_port: u16, dst_port: u16, rest: [u8; 4]) -> [u8; 8] {
    let mut first = [0; 8];
    first[0..2].copy_from_slice(&src_port.to_be_bytes());
    first[2..4].copy_from_slice(&dst_port.to_be_bytes());
    first[4..8].copy_from_slice(&rest);
    first
}
