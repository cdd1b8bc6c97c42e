//! The DNS address: queries of the guest are passed to the host's resolvers, each from a socket of its own.

mod message;
mod resolv;

use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use self::resolv::HostNames;
use crate::link::Link;
use crate::poller::{Event, Source, udp_connect};
use crate::slab::{Key, Slab};
use crate::udp::Datagram;

pub(crate) const PORT: u16 = 53;
/// Queries that can be under way at a time; the oldest makes way.
const MAX_QUERIES: usize = 256;
/// How long a resolver has before the next is asked.
const TRY_NEXT: Duration = Duration::from_secs(3);
/// How long the last resolver has.
const GIVE_UP: Duration = Duration::from_secs(12);

struct Query {
    guest: SocketAddrV4,
    id: u16,
    message: Vec<u8>,
    servers: Vec<SocketAddr>,
    /// Towards the server asked last; `None` before the first.
    socket: Option<UdpSocket>,
    asked: usize,
    deadline: Instant,
}

pub(crate) struct Dns {
    names: HostNames,
    queries: Slab<Query>,
    buffer: Vec<u8>,
}

impl Dns {
    pub(crate) fn new() -> Self {
        Self {
            names: HostNames::new(),
            queries: Slab::new(MAX_QUERIES),
            buffer: vec![0; 65536],
        }
    }

    /// Where a DNS connection over TCP goes.
    pub(crate) fn tcp_server(
        &mut self,
        config: &crate::config::Config,
        now: Instant,
    ) -> Option<SocketAddr> {
        self.names.refresh(config, now);
        self.names.servers().first().copied()
    }

    /// Takes a query of the guest.
    pub(crate) fn input(&mut self, link: &mut Link, datagram: &Datagram<'_>) {
        let query = datagram.data;
        let Some(id) = message::query_id(query) else {
            return;
        };
        self.names.refresh(&link.config, link.now);
        let from = datagram.dst;
        if let Some(question) = message::question(query)
            && question.wants_address()
            && let Some(ips) = self.names.lookup(&question.name)
        {
            let answer = message::addresses(query, &question, ips);
            link.send_udp(from, datagram.src, &answer);
            return;
        }
        if self.names.servers().is_empty() || !link.config.outbound {
            link.send_udp(from, datagram.src, &message::server_failure(query));
            return;
        }
        if self.queries.is_full() {
            let oldest = self.queries.iter().min_by_key(|(_, q)| q.deadline);
            if let Some(key) = oldest.map(|(key, _)| key) {
                self.fail(link, key);
            }
        }
        let deadline = link.now;
        let key = self.queries.insert_with(|_| {
            Some(Query {
                guest: datagram.src,
                id,
                message: query.to_vec(),
                servers: self.names.servers().to_vec(),
                socket: None,
                asked: 0,
                deadline,
            })
        });
        if let Some(key) = key {
            self.ask_next(link, key);
        }
    }

    /// Asks the next resolver that takes the query, or gives the query up.
    fn ask_next(&mut self, link: &mut Link, key: Key) {
        let Some(query) = self.queries.get_mut(key) else {
            return;
        };
        while let Some(&server) = query.servers.get(query.asked) {
            query.asked += 1;
            let asked = udp_connect(server).and_then(|socket| {
                link.poller.watch_input(&socket, Source::Dns, key)?;
                socket.send(&query.message)?;
                Ok(socket)
            });
            match asked {
                Ok(socket) => {
                    query.socket = Some(socket);
                    let last = query.asked == query.servers.len();
                    query.deadline = link.now + if last { GIVE_UP } else { TRY_NEXT };
                    return;
                }
                Err(error) => log::debug!("asking resolver {server}: {error}"),
            }
        }
        self.fail(link, key);
    }

    fn fail(&mut self, link: &mut Link, key: Key) {
        if let Some(query) = self.queries.remove(key) {
            let from = SocketAddrV4::new(link.config.dns_ip, PORT);
            link.send_udp(from, query.guest, &message::server_failure(&query.message));
        }
    }

    /// A resolver has answered or refused.
    pub(crate) fn event(&mut self, link: &mut Link, event: Event) {
        let Some(query) = self.queries.get_mut(event.key) else {
            return;
        };
        let Some(socket) = &query.socket else {
            return;
        };
        loop {
            match socket.recv(&mut self.buffer) {
                Ok(n) if message::answers(&self.buffer[..n], query.id) => {
                    let from = SocketAddrV4::new(link.config.dns_ip, PORT);
                    link.send_udp(from, query.guest, &self.buffer[..n]);
                    self.queries.remove(event.key);
                    return;
                }
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    log::debug!("resolver: {error}");
                    self.ask_next(link, event.key);
                    return;
                }
            }
        }
    }

    /// When [`Dns::timers`] is next due.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.queries.iter().map(|(_, q)| q.deadline).min()
    }

    /// Moves queries that were not answered in time to the next resolver.
    pub(crate) fn timers(&mut self, link: &mut Link) {
        let late: Vec<Key> = self
            .queries
            .iter()
            .filter(|(_, q)| q.deadline <= link.now)
            .map(|(key, _)| key)
            .collect();
        for key in late {
            self.ask_next(link, key);
        }
    }
}
