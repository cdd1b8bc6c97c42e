//! The stack itself: frames in, frames out, and the turns in between.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet};

use crate::config::{Config, Forward, Proto};
use crate::dhcp;
use crate::dns::{self, Dns};
use crate::frame::{Frame, Offload};
use crate::icmp::Icmp;
use crate::link::Link;
use crate::poller::{Event, Poller, Source, Waker};
use crate::reassembly::Reassembly;
use crate::slab::{Key, Slab};
use crate::tcp::{self, Tcp};
use crate::udp::{self, Udp};

/// Rounds of service in one call of [`Stack::process`]; what is left makes the next wait return at once.
const ROUNDS: usize = 4;
const MAX_FORWARDS: usize = 1024;

enum ForwardSocket {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

struct ActiveForward {
    socket: ForwardSocket,
    guest: SocketAddrV4,
}

/// A user-mode network for one guest Ethernet port, without threads of its own.
///
/// The owner hands in the guest's frames with [`Stack::from_guest`], calls [`Stack::process`] (or [`Stack::wait`]),
/// and takes frames for the guest with [`Stack::to_guest`]; [`Stack::poll_fd`] and [`Stack::next_timeout`] say when
/// there is something to process. [`spawn`](crate::spawn) does all that in a thread.
pub struct Stack {
    link: Link,
    tcp: Tcp,
    udp: Udp,
    icmp: Icmp,
    dns: Dns,
    reassembly: Reassembly,
    forwards: Slab<ActiveForward>,
    bound: Vec<(Forward, SocketAddr)>,
    events: Vec<Event>,
}

impl Stack {
    /// Makes a stack and opens the host ports of its forwards.
    ///
    /// # Errors
    /// A setting that does not fit ([`ConfigError`](crate::ConfigError), as `InvalidInput`), a forward whose host port
    /// cannot be opened, or no descriptors left. The message is one line for the user.
    pub fn new(config: Config) -> io::Result<Self> {
        config
            .check()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let link = Link::new(config, Poller::new()?);
        let mut stack = Self {
            tcp: Tcp::new(link.config.max_tcp),
            udp: Udp::new(link.config.max_udp, link.now),
            icmp: Icmp::new(),
            dns: Dns::new(),
            reassembly: Reassembly::default(),
            forwards: Slab::new(MAX_FORWARDS),
            bound: Vec::new(),
            events: Vec::new(),
            link,
        };
        for forward in stack.link.config.forwards.clone() {
            stack.add_forward(forward)?;
        }
        Ok(stack)
    }

    /// Opens another forward and returns the host address it listens on.
    ///
    /// # Errors
    /// The host port cannot be opened. The message is one line for the user.
    pub fn add_forward(&mut self, forward: Forward) -> io::Result<SocketAddr> {
        let explain = |error: io::Error| {
            io::Error::new(error.kind(), format!("port forward {forward}: {error}"))
        };
        let (addr, port) = (forward.host_addr, forward.host_port);
        let (socket, local) = match forward.proto {
            Proto::Tcp => {
                let listener = tcp::listen(addr, port).map_err(explain)?;
                let local = listener.local_addr()?;
                (ForwardSocket::Tcp(listener), local)
            }
            Proto::Udp => {
                let socket = UdpSocket::bind((addr, port)).map_err(explain)?;
                socket.set_nonblocking(true)?;
                let local = socket.local_addr()?;
                (ForwardSocket::Udp(socket), local)
            }
        };
        let guest = SocketAddrV4::new(self.link.config.guest_ip, forward.guest_port);
        let poller = &self.link.poller;
        let mut watched = Ok(());
        let key = self.forwards.insert_with(|key| {
            watched = match &socket {
                ForwardSocket::Tcp(listener) => poller.watch_input(listener, Source::Forward, key),
                ForwardSocket::Udp(socket) => poller.watch_input(socket, Source::Forward, key),
            };
            watched.is_ok().then_some(ActiveForward { socket, guest })
        });
        watched.map_err(explain)?;
        key.ok_or_else(|| explain(io::Error::other("too many port forwards")))?;
        self.bound.push((forward, local));
        Ok(local)
    }

    /// The forwards and the host addresses that they listen on.
    pub fn forwards(&self) -> &[(Forward, SocketAddr)] {
        &self.bound
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.link.config
    }

    /// Number of TCP connections and of UDP flows.
    pub fn flow_counts(&self) -> (usize, usize) {
        (self.tcp.len(), self.udp.len())
    }

    /// Something that ends [`Stack::wait`] early from another thread.
    pub fn waker(&self) -> Waker {
        self.link.poller.waker()
    }

    /// Readable when [`Stack::process`] has something to do, timers aside. It is an epoll descriptor, which can itself
    /// be polled.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.link.poller.fd()
    }

    /// How long from now until [`Stack::process`] must be called even if [`Stack::poll_fd`] stays quiet.
    pub fn next_timeout(&self) -> Option<Duration> {
        if self.tcp.busy(&self.link) {
            return Some(Duration::ZERO);
        }
        let next = [
            self.tcp.next_timer(),
            self.udp.next_timer(),
            self.icmp.next_timer(),
            self.dns.next_timer(),
        ];
        let next = next.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Does what has become possible on the host's side, without waiting.
    ///
    /// # Errors
    /// The host's polling mechanism failed; the stack cannot go on.
    pub fn process(&mut self) -> io::Result<()> {
        self.turn(Some(Duration::ZERO))
    }

    /// Waits until there is something to do, for at most `limit` (`None`: as long as it takes), and does it.
    ///
    /// # Errors
    /// As for [`Stack::process`].
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let timeout = match (self.next_timeout(), limit) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.turn(timeout)
    }

    fn turn(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        self.link.poller.wait(timeout, &mut events)?;
        self.link.now = Instant::now();
        for event in events.drain(..) {
            self.dispatch(event);
        }
        self.events = events;
        self.tcp.timers(&mut self.link);
        self.udp.timers(&self.link);
        self.icmp.timers(&self.link);
        self.dns.timers(&mut self.link);
        self.service();
        Ok(())
    }

    /// The part of [`Stack::process`] that frames from the guest make necessary, leaving descriptors alone.
    pub(crate) fn service(&mut self) {
        for _ in 0..ROUNDS {
            if !self.tcp.service(&mut self.link) {
                break;
            }
        }
    }

    fn dispatch(&mut self, event: Event) {
        match event.source {
            Source::Wake => {}
            Source::Tcp => self.tcp.event(&mut self.link, event),
            Source::Udp => self.udp.event(&mut self.link, event),
            Source::Dns => self.dns.event(&mut self.link, event),
            Source::Ping => self.icmp.event(&mut self.link, event),
            Source::Forward => self.forward_event(event.key),
        }
    }

    fn forward_event(&mut self, key: Key) {
        let Some(forward) = self.forwards.get_mut(key) else {
            return;
        };
        match &forward.socket {
            ForwardSocket::Tcp(listener) => {
                self.tcp.accept(&mut self.link, listener, forward.guest);
            }
            ForwardSocket::Udp(socket) => {
                self.udp
                    .forward_event(&mut self.link, key, socket, forward.guest);
            }
        }
    }

    /// Hands frames for the guest to `sink` until none is left or `sink` returns `false`, which keeps the frame for
    /// the next call.
    pub fn to_guest(&mut self, mut sink: impl FnMut(&Frame) -> bool) {
        loop {
            while let Some(frame) = self.link.out.front() {
                if !sink(frame) {
                    return;
                }
                self.link.out.consume();
            }
            if !self.tcp.busy(&self.link) {
                return;
            }
            self.tcp.service(&mut self.link);
            if self.link.out.front().is_none() {
                // Bytes moved to the host alone: the next turn goes on with that.
                return;
            }
        }
    }

    /// Takes the next frame for the guest. [`Stack::to_guest`] does the same without giving buffers away.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if let Some(frame) = self.link.out.pop() {
            return Some(frame);
        }
        if self.tcp.busy(&self.link) {
            self.tcp.service(&mut self.link);
        }
        self.link.out.pop()
    }

    /// Gives a buffer to the stack for a frame to come.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        self.link.out.recycle(buffer);
    }

    /// Takes a frame from the guest. `offload` says what the guest left unfinished. Frames that make no sense are
    /// dropped. Call [`Stack::process`] after a batch of frames.
    pub fn from_guest(&mut self, frame: &[u8], offload: Offload) {
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            return;
        };
        if !self.link.accepts(frame.dst_addr()) || !frame.src_addr().is_unicast() {
            return;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.link.arp_input(frame.payload()),
            EthernetProtocol::Ipv4 => {
                let verify = offload.checksum.is_none();
                let Ok(packet) = Ipv4Packet::new_checked(frame.payload()) else {
                    return;
                };
                if packet.version() != 4
                    || usize::from(packet.header_len()) < crate::link::IPV4_HEADER
                    || (verify && !packet.verify_checksum())
                {
                    return;
                }
                let src = packet.src_addr();
                if !src.is_unspecified() {
                    self.link.learn(src, frame.src_addr());
                }
                self.ipv4_input(&packet, verify);
            }
            _ => {}
        }
    }

    fn ipv4_input(&mut self, packet: &Ipv4Packet<&[u8]>, verify: bool) {
        if packet.more_frags() || packet.frag_offset() != 0 {
            if let Some(whole) = self.reassembly.add(packet, self.link.now) {
                self.transport_input(packet, &whole, verify);
            }
            return;
        }
        self.transport_input(packet, packet.payload(), verify);
    }

    fn transport_input(&mut self, packet: &Ipv4Packet<&[u8]>, payload: &[u8], verify: bool) {
        let (src, dst) = (packet.src_addr(), packet.dst_addr());
        let protocol = packet.next_header();
        if protocol == IpProtocol::Udp
            && let Some(datagram) = udp::parse(src, dst, payload, verify)
        {
            self.udp_input(&datagram);
            return;
        }
        if !self.is_guest(src) {
            return;
        }
        match protocol {
            IpProtocol::Tcp => {
                let (link, dns) = (&mut self.link, &mut self.dns);
                self.tcp
                    .input(link, src, dst, payload, verify, |config, now| {
                        dns.tcp_server(config, now)
                    });
            }
            IpProtocol::Icmp => self.icmp.input(&mut self.link, src, dst, payload),
            _ => {}
        }
    }

    /// Whether `src` may be an address of the guest.
    fn is_guest(&self, src: Ipv4Addr) -> bool {
        let config = &self.link.config;
        config.is_local_host(src) && src != config.gateway_ip && src != config.dns_ip
    }

    fn udp_input(&mut self, datagram: &udp::Datagram<'_>) {
        let config = &self.link.config;
        let dst = *datagram.dst.ip();
        if datagram.dst.port() == dhcp::SERVER_PORT
            && (dst.is_broadcast() || dst == config.gateway_ip)
        {
            dhcp::input(&mut self.link, datagram.data);
        } else if !self.is_guest(*datagram.src.ip()) || datagram.src.port() == 0 {
            // Nobody could answer it.
        } else if dst == config.dns_ip && datagram.dst.port() == dns::PORT {
            self.dns.input(&mut self.link, datagram);
        } else if !dst.is_broadcast() && !dst.is_multicast() {
            let forwards = &mut self.forwards;
            self.udp.input(&mut self.link, datagram, |key| {
                match &forwards.get_mut(key)?.socket {
                    ForwardSocket::Udp(socket) => Some(socket),
                    ForwardSocket::Tcp(_) => None,
                }
            });
        }
    }
}
