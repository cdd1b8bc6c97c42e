//! The set of host descriptors that the stack waits for, and nonblocking host sockets.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::slab::Key;

/// What a descriptor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Wake,
    Tcp,
    Udp,
    Dns,
    Ping,
    Forward,
}

impl Source {
    const ALL: [Self; 6] = [
        Self::Wake,
        Self::Tcp,
        Self::Udp,
        Self::Dns,
        Self::Ping,
        Self::Forward,
    ];
}

/// Something happened on a descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) source: Source,
    pub(crate) key: Key,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) failed: bool,
}

/// Ends a [`Stack::wait`](crate::Stack::wait) early, from any thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Makes the current or the next wait return at once.
    pub fn wake(&self) {
        // The only failure is a full counter, and then a wake-up is pending already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

pub(crate) struct Poller {
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
}

/// Events taken in one go; more are left for the next.
const EVENT_BATCH: usize = 128;

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64((Source::Wake as u64) << 56);
        epoll::add(&epoll, &wake, data, epoll::EventFlags::IN)?;
        Ok(Self {
            epoll,
            wake: Arc::new(wake),
        })
    }

    pub(crate) fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.wake))
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Reports readability again and again until `fd` is drained. Closing `fd` ends it.
    pub(crate) fn watch_input(&self, fd: impl AsFd, source: Source, key: Key) -> io::Result<()> {
        self.watch(fd, source, key, epoll::EventFlags::IN)
    }

    /// Reports each change of readability and writability once. Closing `fd` ends it.
    pub(crate) fn watch_edges(&self, fd: impl AsFd, source: Source, key: Key) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        self.watch(fd, source, key, flags)
    }

    fn watch(
        &self,
        fd: impl AsFd,
        source: Source,
        key: Key,
        flags: epoll::EventFlags,
    ) -> io::Result<()> {
        let data = epoll::EventData::new_u64(((source as u64) << 56) | key.to_bits());
        Ok(epoll::add(&self.epoll, fd, data, flags)?)
    }

    /// Appends what happened to `out`, waiting for at most `timeout` (`None`: until something happens).
    pub(crate) fn wait(&self, timeout: Option<Duration>, out: &mut Vec<Event>) -> io::Result<()> {
        // Older kernels count the timeout in milliseconds: round up, or a wait for a timer would spin, and cap it.
        let timeout = timeout.map(|t| {
            let millis = t
                .min(Duration::from_secs(3600))
                .as_nanos()
                .div_ceil(1_000_000) as u64;
            Timespec {
                tv_sec: (millis / 1000) as i64,
                tv_nsec: (millis % 1000 * 1_000_000) as i64,
            }
        });
        let mut buffer = [MaybeUninit::uninit(); EVENT_BATCH];
        let events = match epoll::wait(&self.epoll, &mut buffer[..], timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for event in events {
            let (data, flags) = (event.data, event.flags);
            let bits = data.u64();
            let Some(&source) = Source::ALL.get((bits >> 56) as usize) else {
                continue;
            };
            if source == Source::Wake {
                let _ = rustix::io::read(&*self.wake, &mut [0u8; 8]);
                continue;
            }
            let failed = flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
            out.push(Event {
                source,
                key: Key::from_bits(bits),
                readable: failed || flags.contains(epoll::EventFlags::IN),
                writable: failed || flags.contains(epoll::EventFlags::OUT),
                failed,
            });
        }
        Ok(())
    }
}

/// Starts a TCP connection to `addr`; it is made, or has failed, when the socket becomes writable.
pub(crate) fn tcp_connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let family = match addr {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // The guest has done its own batching; the host must not delay small writes again.
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    match rustix::net::connect(&socket, &addr) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

/// A nonblocking UDP socket that talks to `addr` alone.
pub(crate) fn udp_connect(addr: SocketAddr) -> io::Result<UdpSocket> {
    let local: SocketAddr = match addr {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(local)?;
    socket.set_nonblocking(true)?;
    socket.connect(addr)?;
    Ok(socket)
}

/// A nonblocking ICMP echo socket that talks to `addr` alone. The host may forbid it (`net.ipv4.ping_group_range`).
pub(crate) fn ping_connect(addr: Ipv4Addr) -> io::Result<UdpSocket> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(rustix::net::ipproto::ICMP);
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, protocol)?;
    rustix::net::connect(&socket, &SocketAddr::from((addr, 0)))?;
    // The standard library's datagram calls do just what a ping socket needs.
    Ok(UdpSocket::from(socket))
}
