//! The guest's TCP connections: demultiplexing, port forwards, turns of service and timers.

mod conn;
mod ring;

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4DstUnreachable, IpAddress, IpProtocol, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use self::conn::{Conn, Next};
use crate::checksum;
use crate::config::Config;
use crate::link::{Link, quoted_ports};
use crate::poller::{Event, Source, tcp_connect};
use crate::slab::{Key, Slab};

/// Connections taken from one listener before others have their turn.
const ACCEPT_BATCH: usize = 16;

/// Both ends as the guest sees them: its own, then the remote one.
type Pair = (SocketAddrV4, SocketAddrV4);

pub(crate) struct Tcp {
    conns: Slab<Conn>,
    by_pair: HashMap<Pair, Key>,
    ready: VecDeque<Key>,
    /// No timer runs out earlier than this.
    next_timer: Option<Instant>,
}

impl Tcp {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            conns: Slab::new(limit),
            by_pair: HashMap::new(),
            ready: VecDeque::new(),
            next_timer: None,
        }
    }

    /// Number of connections.
    pub(crate) fn len(&self) -> usize {
        self.conns.len()
    }

    /// Takes a TCP segment from the guest; `verify` if its checksum is complete. `dns` is where the DNS address leads.
    pub(crate) fn input(
        &mut self,
        link: &mut Link,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        payload: &[u8],
        verify: bool,
        dns: impl FnOnce(&Config, Instant) -> Option<SocketAddr>,
    ) {
        if verify {
            let pseudo = checksum::pseudo_header(src, dst, IpProtocol::Tcp.into(), payload.len());
            if checksum::combine(&[pseudo, checksum::sum(payload)]) != 0xffff {
                return;
            }
        }
        let Ok(packet) = TcpPacket::new_checked(payload) else {
            return;
        };
        let parsed = TcpRepr::parse(
            &packet,
            &IpAddress::Ipv4(src),
            &IpAddress::Ipv4(dst),
            &ChecksumCapabilities::ignored(),
        );
        let Ok(segment) = parsed else {
            return;
        };
        let guest = SocketAddrV4::new(src, segment.src_port);
        let remote = SocketAddrV4::new(dst, segment.dst_port);
        if let Some(&key) = self.by_pair.get(&(guest, remote)) {
            if let Some(conn) = self.conns.get_mut(key) {
                conn.input(&segment, link);
                self.schedule(key);
            }
            return;
        }
        if segment.control == TcpControl::Syn && segment.ack_number.is_none() {
            self.open(link, guest, remote, &segment, dns);
        } else {
            refuse(link, guest, remote, &segment);
        }
    }

    fn open(
        &mut self,
        link: &mut Link,
        guest: SocketAddrV4,
        remote: SocketAddrV4,
        syn: &TcpRepr<'_>,
        dns: impl FnOnce(&Config, Instant) -> Option<SocketAddr>,
    ) {
        let target = if *remote.ip() == link.config.dns_ip {
            (remote.port() == 53 && link.config.outbound)
                .then(|| dns(&link.config, link.now))
                .flatten()
        } else {
            link.host_address(*remote.ip())
                .map(|ip| SocketAddr::from((ip, remote.port())))
        };
        let Some(target) = target else {
            return refuse(link, guest, remote, syn);
        };
        if self.conns.is_full() {
            log::debug!("refusing {guest} to {remote}: too many connections");
            return refuse(link, guest, remote, syn);
        }
        match tcp_connect(target) {
            Ok(socket) => {
                let conn = Conn::from_guest(guest, remote, socket, syn, link);
                if self.add(link, conn).is_none() {
                    refuse(link, guest, remote, syn);
                }
            }
            Err(error) => {
                log::debug!("connecting {guest} to {target}: {error}");
                if !unreachable(link, guest, remote, &error, syn.seq_number.0 as u32) {
                    refuse(link, guest, remote, syn);
                }
            }
        }
    }

    fn add(&mut self, link: &mut Link, conn: Conn) -> Option<Key> {
        let pair = (conn.guest, conn.remote);
        let key = self.conns.insert_with(|key| {
            let watched = link.poller.watch_edges(conn.socket(), Source::Tcp, key);
            watched.is_ok().then_some(conn)
        })?;
        self.by_pair.insert(pair, key);
        self.schedule(key);
        Some(key)
    }

    /// Takes connections that wait on `listener` for `guest`.
    pub(crate) fn accept(&mut self, link: &mut Link, listener: &TcpListener, guest: SocketAddrV4) {
        for _ in 0..ACCEPT_BATCH {
            let Ok((socket, peer)) = listener.accept() else {
                return;
            };
            if let Err(error) = self.accepted(link, socket, peer, guest) {
                log::debug!("forwarding {peer} to {guest}: {error}");
            }
        }
    }

    fn accepted(
        &mut self,
        link: &mut Link,
        socket: TcpStream,
        peer: SocketAddr,
        guest: SocketAddrV4,
    ) -> std::io::Result<()> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let ip = link.guest_view(peer.ip());
        let full = || std::io::Error::other("too many connections");
        // Peers that the guest sees as the gateway may share a port: find one that is free.
        let mut remote = SocketAddrV4::new(ip, peer.port());
        let mut tries = 0;
        while self.by_pair.contains_key(&(guest, remote)) {
            if tries == 64 {
                return Err(full());
            }
            tries += 1;
            remote.set_port(link.random() as u16 | 0x8000);
        }
        let conn = Conn::from_host(guest, remote, socket, link);
        self.add(link, conn).ok_or_else(full)?;
        Ok(())
    }

    /// A connection's host socket changed.
    pub(crate) fn event(&mut self, link: &mut Link, event: Event) {
        let Some(conn) = self.conns.get_mut(event.key) else {
            return;
        };
        if let Err(error) = conn.host_event(event.readable, event.writable, event.failed) {
            let (guest, remote) = (conn.guest, conn.remote);
            log::debug!("connecting {guest} to {remote}: {error}");
            let seq = conn.guest_syn();
            unreachable(link, guest, remote, &error, seq);
            conn.abort(link);
        }
        self.schedule(event.key);
    }

    fn schedule(&mut self, key: Key) {
        if let Some(conn) = self.conns.get_mut(key)
            && !conn.queued
        {
            conn.queued = true;
            self.ready.push_back(key);
        }
    }

    /// Gives every connection with something to do one turn. Returns whether one could use another turn at once.
    pub(crate) fn service(&mut self, link: &mut Link) -> bool {
        for _ in 0..self.ready.len() {
            let Some(key) = self.ready.pop_front() else {
                break;
            };
            let Some(conn) = self.conns.get_mut(key) else {
                continue;
            };
            conn.queued = false;
            match conn.service(link) {
                Next::Idle => {}
                Next::Again => {
                    conn.queued = true;
                    self.ready.push_back(key);
                }
                Next::Closed => {
                    let pair = (conn.guest, conn.remote);
                    self.by_pair.remove(&pair);
                    self.conns.remove(key);
                    continue;
                }
            }
            self.next_timer = earliest(self.next_timer, conn.timer());
        }
        self.busy(link)
    }

    /// Whether [`Tcp::service`] would get anywhere now.
    pub(crate) fn busy(&self, link: &Link) -> bool {
        !self.ready.is_empty() && link.out.has_room()
    }

    /// When [`Tcp::timers`] is next due.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.next_timer
    }

    pub(crate) fn timers(&mut self, link: &mut Link) {
        if self.next_timer.is_none_or(|at| at > link.now) {
            return;
        }
        let mut next = None;
        let mut due = Vec::new();
        for (key, conn) in self.conns.iter_mut() {
            if conn.timer().is_some_and(|at| at <= link.now) {
                conn.timeout(link);
                due.push(key);
            }
            next = earliest(next, conn.timer());
        }
        // Timers run out late rather than every microsecond.
        self.next_timer = next.map(|at| at.max(link.now + Duration::from_millis(1)));
        for key in due {
            self.schedule(key);
        }
    }
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Answers a segment that belongs to no connection with a reset.
fn refuse(link: &mut Link, guest: SocketAddrV4, remote: SocketAddrV4, segment: &TcpRepr<'_>) {
    if segment.control == TcpControl::Rst {
        return;
    }
    let len = segment.payload.len() as u32 + segment.control.len() as u32;
    let end = (segment.seq_number.0 as u32).wrapping_add(len);
    let repr = TcpRepr {
        src_port: remote.port(),
        dst_port: guest.port(),
        control: TcpControl::Rst,
        seq_number: segment.ack_number.unwrap_or(TcpSeqNumber(0)),
        ack_number: match segment.ack_number {
            Some(_) => None,
            None => Some(TcpSeqNumber(end as i32)),
        },
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    conn::emit(link, remote, guest, &repr);
}

/// Tells the guest by ICMP if `error` says that no way leads to `remote`. Returns whether it did.
fn unreachable(
    link: &mut Link,
    guest: SocketAddrV4,
    remote: SocketAddrV4,
    error: &std::io::Error,
    seq: u32,
) -> bool {
    let reason = match error.kind() {
        std::io::ErrorKind::HostUnreachable => Icmpv4DstUnreachable::HostUnreachable,
        std::io::ErrorKind::NetworkUnreachable => Icmpv4DstUnreachable::NetUnreachable,
        _ => return false,
    };
    let first = quoted_ports(guest.port(), remote.port(), seq.to_be_bytes());
    link.send_unreachable(reason, *guest.ip(), *remote.ip(), IpProtocol::Tcp, first);
    true
}

/// Opens the host's side of a forward.
pub(crate) fn listen(addr: IpAddr, port: u16) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind((addr, port))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
