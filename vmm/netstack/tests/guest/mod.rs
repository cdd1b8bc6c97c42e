//! A fake guest: a complete smoltcp host on the other end of a stack's Ethernet port.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use netstack::{Config, Frame, Handle, Offload, PartialChecksum, Resolvers, SendError, Stack};
use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const PATIENCE: Duration = Duration::from_secs(60);

/// Settings that keep all traffic on this host.
pub fn config() -> Config {
    Config {
        resolvers: Resolvers::Fixed(Vec::new()),
        hosts_file: None,
        ..Config::default()
    }
}

/// What the guest's port is plugged into.
pub enum Port {
    Core(Box<Stack>),
    Thread(Handle),
}

impl Port {
    fn offload(frame: &[u8], unfinished: bool) -> Offload {
        let tcp = frame.len() > 34 && frame[12..14] == [8, 0] && frame[23] == 6;
        Offload {
            checksum: (unfinished && tcp).then_some(PartialChecksum {
                start: 34,
                offset: 16,
            }),
            ..Offload::default()
        }
    }
}

pub struct Wire {
    pub rx: VecDeque<Vec<u8>>,
    pub tx: VecDeque<Vec<u8>>,
    pub mtu: usize,
    /// The guest leaves TCP checksums to the stack and believes the stack's.
    pub offload: bool,
    /// Drop every n-th frame to and from the guest; 0 for none.
    pub lose_every: (usize, usize),
    pub largest: usize,
    count: usize,
}

impl Wire {
    fn lost(&mut self, every: usize) -> bool {
        self.count += 1;
        every != 0 && self.count.is_multiple_of(every)
    }

    fn received(&mut self, frame: &Frame) {
        self.largest = self.largest.max(frame.data.len());
        if !self.lost(self.lose_every.0) {
            self.rx.push_back(frame.data.clone());
        }
    }
}

pub struct Rx(Vec<u8>);
pub struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.rx.pop_front()?;
        Some((Rx(frame), Tx(&mut self.tx)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Tx<'_>> {
        (self.tx.len() < 64).then_some(Tx(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.max_transmission_unit = self.mtu + 14;
        caps.medium = Medium::Ethernet;
        if self.offload {
            caps.checksum.tcp = Checksum::None;
        }
        caps
    }
}

pub struct Guest {
    pub port: Port,
    pub wire: Wire,
    pub iface: Interface,
    pub sockets: SocketSet<'static>,
    epoch: Instant,
    next_port: u16,
}

impl Guest {
    /// A guest without an address.
    pub fn unconfigured(port: Port, mtu: usize, offload: bool) -> Self {
        let mut wire = Wire {
            rx: VecDeque::new(),
            tx: VecDeque::new(),
            mtu,
            offload,
            lose_every: (0, 0),
            largest: 0,
            count: 0,
        };
        let hardware = HardwareAddress::Ethernet(EthernetAddress(MAC));
        let iface = Interface::new(
            smoltcp::iface::Config::new(hardware),
            &mut wire,
            smoltcp::time::Instant::ZERO,
        );
        Self {
            port,
            wire,
            iface,
            sockets: SocketSet::new(Vec::new()),
            epoch: Instant::now(),
            next_port: 40000,
        }
    }

    /// A guest with its address set by hand, on a stack in this thread.
    pub fn new(config: Config) -> Self {
        let (mtu, offload) = (config.mtu, config.offloads.checksum);
        let stack = Stack::new(config).unwrap();
        let mut guest = Self::unconfigured(Port::Core(Box::new(stack)), mtu, offload);
        guest.configure(GUEST);
        guest
    }

    /// The same on a stack in a thread of its own.
    pub fn threaded(config: Config) -> Self {
        let (mtu, offload) = (config.mtu, config.offloads.checksum);
        let handle = netstack::spawn(config).unwrap();
        let mut guest = Self::unconfigured(Port::Thread(handle), mtu, offload);
        guest.configure(GUEST);
        guest
    }

    pub fn configure(&mut self, ip: Ipv4Addr) {
        self.iface
            .update_ip_addrs(|addrs| addrs.push(IpCidr::new(ip.into(), 24)).unwrap());
        self.iface
            .routes_mut()
            .add_default_ipv4_route(GATEWAY)
            .unwrap();
    }

    pub fn stack(&mut self) -> &mut Stack {
        match &mut self.port {
            Port::Core(stack) => stack,
            Port::Thread(_) => panic!("the stack is in its thread"),
        }
    }

    /// Moves frames once in each direction.
    pub fn poll(&mut self) {
        let now = smoltcp::time::Instant::from_micros(self.epoch.elapsed().as_micros() as i64);
        self.iface.poll(now, &mut self.wire, &mut self.sockets);
        match &mut self.port {
            Port::Core(stack) => {
                while let Some(frame) = self.wire.tx.pop_front() {
                    if !self.wire.lost(self.wire.lose_every.1) {
                        stack.from_guest(&frame, Port::offload(&frame, self.wire.offload));
                    }
                }
                stack.process().unwrap();
                let wire = &mut self.wire;
                stack.to_guest(|frame| {
                    if wire.rx.len() >= 64 {
                        return false;
                    }
                    wire.received(frame);
                    true
                });
            }
            Port::Thread(handle) => {
                handle.clear_event();
                while let Some(frame) = self.wire.tx.pop_front() {
                    if self.wire.lost(self.wire.lose_every.1) {
                        continue;
                    }
                    let offload = Port::offload(&frame, self.wire.offload);
                    match handle.send(&frame, offload) {
                        Ok(()) => {}
                        Err(SendError::Full) => {
                            self.wire.tx.push_front(frame);
                            break;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                while self.wire.rx.len() < 64
                    && let Some(frame) = handle.recv()
                {
                    self.wire.received(&frame);
                    handle.recycle(frame);
                }
            }
        }
        if self.wire.rx.is_empty() && self.wire.tx.is_empty() {
            self.rest();
        }
    }

    fn rest(&mut self) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let fd = match &self.port {
            Port::Core(stack) => stack.poll_fd(),
            Port::Thread(handle) => handle.event_fd(),
        };
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        };
        let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit));
    }

    /// Polls until `done` has a result.
    pub fn run_until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(result) = done(self) {
                return result;
            }
            assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
            self.poll();
        }
    }

    pub fn run_for(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.poll();
        }
    }

    pub fn tcp_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 1 << 21]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    /// A TCP socket that is connecting to `remote`.
    pub fn tcp_connect(&mut self, remote: SocketAddrV4) -> SocketHandle {
        let handle = self.tcp_socket();
        self.next_port += 1;
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket
            .connect(
                self.iface.context(),
                (*remote.ip(), remote.port()),
                self.next_port,
            )
            .unwrap();
        handle
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn udp_socket(&mut self, port: u16) -> SocketHandle {
        let buffer =
            || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 32], vec![0; 1 << 17]);
        let handle = self.sockets.add(udp::Socket::new(buffer(), buffer()));
        let socket = self.sockets.get_mut::<udp::Socket>(handle);
        socket.bind(port).unwrap();
        handle
    }

    pub fn udp_send(&mut self, handle: SocketHandle, remote: SocketAddrV4, data: &[u8]) {
        let socket = self.sockets.get_mut::<udp::Socket>(handle);
        socket
            .send_slice(data, (*remote.ip(), remote.port()))
            .unwrap();
    }

    pub fn udp_recv(&mut self, handle: SocketHandle) -> (Vec<u8>, SocketAddrV4) {
        self.run_until("a datagram", |guest| {
            let socket = guest.sockets.get_mut::<udp::Socket>(handle);
            let (data, meta) = socket.recv().ok()?;
            let std::net::IpAddr::V4(ip) = meta.endpoint.addr.into() else {
                panic!("not IPv4");
            };
            Some((data.to_vec(), SocketAddrV4::new(ip, meta.endpoint.port)))
        })
    }

    /// Sends everything `data` yields, closes if asked, and returns what came back until the other side closed.
    pub fn exchange(&mut self, handle: SocketHandle, data: &[u8], close: bool) -> Vec<u8> {
        let mut sent = 0;
        let mut received = Vec::new();
        self.run_until("the end of the stream", |guest| {
            let socket = guest.tcp(handle);
            if sent < data.len() && socket.can_send() {
                sent += socket.send_slice(&data[sent..]).unwrap();
                if sent == data.len() && close {
                    socket.close();
                }
            }
            while socket.can_recv() {
                socket
                    .recv(|bytes| {
                        received.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .unwrap();
            }
            (!socket.may_recv() && sent == data.len() && socket.state() != tcp::State::SynSent)
                .then_some(())
        });
        received
    }
}

/// Bytes that differ along any stream.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
