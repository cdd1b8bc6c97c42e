//! NAT of the guest's UDP flows, one connected host socket each, and datagrams that come in by port forwards.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use smoltcp::wire::{Icmpv4DstUnreachable, IpProtocol, UdpPacket};

use crate::checksum;
use crate::link::{Link, UDP_HEADER, quoted_ports};
use crate::poller::{Event, Source, udp_connect};
use crate::slab::{Key, Slab};

/// Datagrams taken from one socket before others have their turn.
const BATCH: usize = 64;
/// Idle flows are looked for no more often than this.
const SWEEP: Duration = Duration::from_secs(1);

type Pair = (SocketAddrV4, SocketAddrV4);

enum Via {
    /// The guest began the flow: a host socket of its own.
    Own(UdpSocket),
    /// A host-side peer began it: the forward's socket, towards that peer.
    Forward(Key, SocketAddr),
}

struct Flow {
    guest: SocketAddrV4,
    remote: SocketAddrV4,
    via: Via,
    last: Instant,
}

pub(crate) struct Udp {
    flows: Slab<Flow>,
    by_pair: HashMap<Pair, Key>,
    by_peer: HashMap<(Key, SocketAddr), Key>,
    next_sweep: Instant,
    buffer: Vec<u8>,
}

/// A datagram from the guest, checked.
pub(crate) struct Datagram<'a> {
    pub(crate) src: SocketAddrV4,
    pub(crate) dst: SocketAddrV4,
    pub(crate) data: &'a [u8],
}

/// Checks a UDP datagram from the guest; `verify` if its checksum is complete.
pub(crate) fn parse(
    src: Ipv4Addr,
    dst: Ipv4Addr,
    payload: &[u8],
    verify: bool,
) -> Option<Datagram<'_>> {
    let packet = UdpPacket::new_checked(payload).ok()?;
    let len = usize::from(packet.len());
    if packet.dst_port() == 0 || len < UDP_HEADER {
        return None;
    }
    if verify && packet.checksum() != 0 {
        let pseudo = checksum::pseudo_header(src, dst, IpProtocol::Udp.into(), len);
        if checksum::combine(&[pseudo, checksum::sum(payload.get(..len)?)]) != 0xffff {
            return None;
        }
    }
    Some(Datagram {
        src: SocketAddrV4::new(src, packet.src_port()),
        dst: SocketAddrV4::new(dst, packet.dst_port()),
        data: packet.payload(),
    })
}

impl Udp {
    pub(crate) fn new(limit: usize, now: Instant) -> Self {
        Self {
            flows: Slab::new(limit.max(1)),
            by_pair: HashMap::new(),
            by_peer: HashMap::new(),
            next_sweep: now,
            buffer: vec![0; 65536],
        }
    }

    /// Number of flows.
    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    /// Sends a datagram of the guest on its way. `forward` finds the socket of a port forward.
    pub(crate) fn input<'s>(
        &mut self,
        link: &mut Link,
        datagram: &Datagram<'_>,
        forward: impl FnOnce(Key) -> Option<&'s UdpSocket>,
    ) {
        let pair = (datagram.src, datagram.dst);
        let known = self.by_pair.get(&pair).copied();
        let key = match known {
            Some(key) => key,
            None => {
                let Some(host) = link.host_address(*datagram.dst.ip()) else {
                    return self.reject(link, datagram, Icmpv4DstUnreachable::NetProhibited);
                };
                match self.open(link, pair, SocketAddr::from((host, datagram.dst.port()))) {
                    Ok(key) => key,
                    Err(error) => {
                        log::debug!("UDP {} to {}: {error}", datagram.src, datagram.dst);
                        return self.reject(link, datagram, reason(&error));
                    }
                }
            }
        };
        let now = link.now;
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        flow.last = now;
        let sent = match &flow.via {
            Via::Own(socket) => socket.send(datagram.data),
            Via::Forward(key, peer) => match forward(*key) {
                Some(socket) => socket.send_to(datagram.data, *peer),
                None => return,
            },
        };
        match sent {
            Ok(_) => {}
            // A full socket buffer loses datagrams, as any router may.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => self.reject(link, datagram, reason(&error)),
        }
    }

    fn reject(&self, link: &mut Link, datagram: &Datagram<'_>, reason: Icmpv4DstUnreachable) {
        let (src, dst) = (datagram.src, datagram.dst);
        let len = (UDP_HEADER + datagram.data.len()) as u16;
        unreachable(link, src, dst, len, reason);
    }

    fn open(&mut self, link: &mut Link, pair: Pair, target: SocketAddr) -> io::Result<Key> {
        let socket = udp_connect(target)?;
        self.make_room();
        let (guest, remote) = pair;
        let last = link.now;
        let mut watched = Ok(());
        let key = self.flows.insert_with(|key| {
            watched = link.poller.watch_input(&socket, Source::Udp, key);
            watched.is_ok().then_some(Flow {
                guest,
                remote,
                via: Via::Own(socket),
                last,
            })
        });
        watched?;
        let key = key.ok_or_else(|| io::Error::other("too many flows"))?;
        self.by_pair.insert(pair, key);
        Ok(key)
    }

    fn make_room(&mut self) {
        if !self.flows.is_full() {
            return;
        }
        let oldest = self
            .flows
            .iter()
            .min_by_key(|(_, flow)| flow.last)
            .map(|(key, _)| key);
        if let Some(key) = oldest {
            self.close(key);
        }
    }

    fn close(&mut self, key: Key) {
        if let Some(flow) = self.flows.remove(key) {
            self.by_pair.remove(&(flow.guest, flow.remote));
            if let Via::Forward(forward, peer) = flow.via {
                self.by_peer.remove(&(forward, peer));
            }
        }
    }

    /// A flow's own socket has datagrams or an error.
    pub(crate) fn event(&mut self, link: &mut Link, event: Event) {
        let Some(flow) = self.flows.get_mut(event.key) else {
            return;
        };
        let Via::Own(socket) = &flow.via else {
            return;
        };
        for _ in 0..BATCH {
            match socket.recv(&mut self.buffer) {
                Ok(n) => {
                    flow.last = link.now;
                    link.send_udp(flow.remote, flow.guest, &self.buffer[..n]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    unreachable(
                        link,
                        flow.guest,
                        flow.remote,
                        UDP_HEADER as u16,
                        reason(&error),
                    );
                    return;
                }
            }
        }
    }

    /// A forward's socket has datagrams for `guest`.
    pub(crate) fn forward_event(
        &mut self,
        link: &mut Link,
        forward: Key,
        socket: &UdpSocket,
        guest: SocketAddrV4,
    ) {
        for _ in 0..BATCH {
            let Ok((n, peer)) = socket.recv_from(&mut self.buffer) else {
                return;
            };
            let key = match self.by_peer.get(&(forward, peer)) {
                Some(&key) => Some(key),
                None => self.open_forward(link, forward, peer, guest),
            };
            let Some(flow) = key.and_then(|key| self.flows.get_mut(key)) else {
                continue;
            };
            flow.last = link.now;
            link.send_udp(flow.remote, guest, &self.buffer[..n]);
        }
    }

    fn open_forward(
        &mut self,
        link: &mut Link,
        forward: Key,
        peer: SocketAddr,
        guest: SocketAddrV4,
    ) -> Option<Key> {
        self.make_room();
        let mut remote = SocketAddrV4::new(link.guest_view(peer.ip()), peer.port());
        let mut tries = 0;
        while self.by_pair.contains_key(&(guest, remote)) {
            if tries == 64 {
                return None;
            }
            tries += 1;
            remote.set_port(link.random() as u16 | 0x8000);
        }
        let last = link.now;
        let key = self.flows.insert_with(|_| {
            Some(Flow {
                guest,
                remote,
                via: Via::Forward(forward, peer),
                last,
            })
        })?;
        self.by_pair.insert((guest, remote), key);
        self.by_peer.insert((forward, peer), key);
        Some(key)
    }

    /// When [`Udp::timers`] is next due.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        (self.flows.len() > 0).then_some(self.next_sweep)
    }

    /// Closes idle flows.
    pub(crate) fn timers(&mut self, link: &Link) {
        if link.now < self.next_sweep {
            return;
        }
        let idle = link.config.udp_idle;
        let (now, mut next) = (link.now, link.now + idle);
        let mut stale = Vec::new();
        for (key, flow) in self.flows.iter() {
            let end = flow.last + idle;
            if end <= now {
                stale.push(key);
            } else {
                next = next.min(end);
            }
        }
        for key in stale {
            self.close(key);
        }
        self.next_sweep = next.max(now + SWEEP.min(idle));
    }
}

fn reason(error: &io::Error) -> Icmpv4DstUnreachable {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Icmpv4DstUnreachable::PortUnreachable,
        io::ErrorKind::NetworkUnreachable => Icmpv4DstUnreachable::NetUnreachable,
        _ => Icmpv4DstUnreachable::HostUnreachable,
    }
}

fn unreachable(
    link: &mut Link,
    src: SocketAddrV4,
    dst: SocketAddrV4,
    len: u16,
    reason: Icmpv4DstUnreachable,
) {
    let [hi, lo] = len.to_be_bytes();
    let first = quoted_ports(src.port(), dst.port(), [hi, lo, 0, 0]);
    link.send_unreachable(reason, *src.ip(), *dst.ip(), IpProtocol::Udp, first);
}
