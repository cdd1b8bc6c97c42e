//! Echo requests of the guest: answered for the stack's own addresses, passed on through ping sockets for others.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};

use crate::link::Link;
use crate::poller::{Event, Source, ping_connect};
use crate::slab::{Key, Slab};

/// Pairs of destination and identifier that can be open at a time.
const MAX_SESSIONS: usize = 64;
const IDLE: Duration = Duration::from_secs(30);

struct Session {
    guest: Ipv4Addr,
    remote: Ipv4Addr,
    ident: u16,
    socket: UdpSocket,
    last: Instant,
}

pub(crate) struct Icmp {
    sessions: Slab<Session>,
    buffer: Vec<u8>,
}

impl Icmp {
    pub(crate) fn new() -> Self {
        Self {
            sessions: Slab::new(MAX_SESSIONS),
            buffer: vec![0; 65536],
        }
    }

    pub(crate) fn input(&mut self, link: &mut Link, src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) {
        let Ok(packet) = Icmpv4Packet::new_checked(payload) else {
            return;
        };
        let parsed = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default());
        let Ok(Icmpv4Repr::EchoRequest {
            ident,
            seq_no,
            data,
        }) = parsed
        else {
            return;
        };
        if dst == link.config.gateway_ip || dst == link.config.dns_ip {
            let reply = Icmpv4Repr::EchoReply {
                ident,
                seq_no,
                data,
            };
            link.send_icmp(dst, src, &reply);
            return;
        }
        let Some(host) = link.host_address(dst) else {
            return;
        };
        if let Err(error) = self.pass_on(link, (src, dst, ident), host, payload) {
            // Most hosts allow ping sockets; where they do not, pings stay unanswered.
            log::debug!("echo to {dst}: {error}");
        }
    }

    fn pass_on(
        &mut self,
        link: &mut Link,
        (guest, remote, ident): (Ipv4Addr, Ipv4Addr, u16),
        host: Ipv4Addr,
        message: &[u8],
    ) -> std::io::Result<()> {
        let wanted = (guest, remote, ident);
        let known = self
            .sessions
            .iter()
            .find(|(_, s)| (s.guest, s.remote, s.ident) == wanted)
            .map(|(key, _)| key);
        let key = match known {
            Some(key) => key,
            None => self.open(link, wanted, host)?,
        };
        if let Some(session) = self.sessions.get_mut(key) {
            session.last = link.now;
            // The host puts in its own identifier and checksum.
            session.socket.send(message)?;
        }
        Ok(())
    }

    fn open(
        &mut self,
        link: &mut Link,
        (guest, remote, ident): (Ipv4Addr, Ipv4Addr, u16),
        host: Ipv4Addr,
    ) -> std::io::Result<Key> {
        let socket = ping_connect(host)?;
        if self.sessions.is_full() {
            let oldest = self.sessions.iter().min_by_key(|(_, s)| s.last);
            if let Some(key) = oldest.map(|(key, _)| key) {
                self.sessions.remove(key);
            }
        }
        let last = link.now;
        let mut watched = Ok(());
        let key = self.sessions.insert_with(|key| {
            watched = link.poller.watch_input(&socket, Source::Ping, key);
            watched.is_ok().then_some(Session {
                guest,
                remote,
                ident,
                socket,
                last,
            })
        });
        watched?;
        key.ok_or_else(|| std::io::Error::other("too many echo sessions"))
    }

    /// A ping socket has replies.
    pub(crate) fn event(&mut self, link: &mut Link, event: Event) {
        let Some(session) = self.sessions.get_mut(event.key) else {
            return;
        };
        while let Ok(n) = session.socket.recv(&mut self.buffer) {
            let Ok(packet) = Icmpv4Packet::new_checked(&self.buffer[..n]) else {
                continue;
            };
            let parsed = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::ignored());
            if let Ok(Icmpv4Repr::EchoReply { seq_no, data, .. }) = parsed {
                session.last = link.now;
                let ident = session.ident;
                let reply = Icmpv4Repr::EchoReply {
                    ident,
                    seq_no,
                    data,
                };
                link.send_icmp(session.remote, session.guest, &reply);
            }
        }
    }

    /// When [`Icmp::timers`] is next due.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.sessions.iter().map(|(_, s)| s.last + IDLE).min()
    }

    /// Closes idle sessions.
    pub(crate) fn timers(&mut self, link: &Link) {
        let stale: Vec<Key> = self
            .sessions
            .iter()
            .filter(|(_, s)| s.last + IDLE <= link.now)
            .map(|(key, _)| key)
            .collect();
        for key in stale {
            self.sessions.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, poller::Poller};

    #[test]
    fn ping_sockets_carry_echo_requests() {
        if let Err(error) = ping_connect(Ipv4Addr::LOCALHOST) {
            println!("SKIPPED: this host does not allow ping sockets: {error}");
            return;
        }
        let mut link = Link::new(Config::default(), Poller::new().unwrap());
        let guest = link.config.guest_ip;
        link.learn(guest, smoltcp::wire::EthernetAddress([2, 0, 0, 0, 0, 1]));
        let request = Icmpv4Repr::EchoRequest {
            ident: 7,
            seq_no: 9,
            data: b"hello",
        };
        let mut message = vec![0; request.buffer_len()];
        request.emit(
            &mut Icmpv4Packet::new_unchecked(&mut message[..]),
            &ChecksumCapabilities::default(),
        );
        let mut icmp = Icmp::new();
        let remote = Ipv4Addr::new(192, 0, 2, 1);
        icmp.pass_on(&mut link, (guest, remote, 7), Ipv4Addr::LOCALHOST, &message)
            .unwrap();
        let mut events = Vec::new();
        link.poller
            .wait(Some(Duration::from_secs(5)), &mut events)
            .unwrap();
        icmp.event(&mut link, events[0]);
        let frame = link.out.front().expect("no reply");
        let packet = Icmpv4Packet::new_checked(&frame.data[34..]).unwrap();
        assert_eq!((packet.echo_ident(), packet.echo_seq_no()), (7, 9));
        assert!(packet.verify_checksum());
        assert_eq!(packet.data(), b"hello");
    }
}
