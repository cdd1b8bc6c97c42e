//! User-mode networking for a virtual machine: a private IPv4 network behind one guest Ethernet port, with no
//! privileges on the host.
//!
//! The guest sees a router (10.0.2.2 by default) that leases it an address by DHCP, a DNS server (10.0.2.3), and the
//! world behind the router. Nothing is routed: every TCP connection ends in the stack and goes on in a host socket,
//! every UDP flow and echo session has a host socket of its own, and DNS queries go to the host's resolvers. Host ports
//! can be forwarded to the guest.
//!
//! ```text
//!   virtio-net ── Handle ── thread ── Stack ─┬─ ARP, DHCP           (answered here)
//!   (any NIC)     queues               │     ├─ TCP ── Conn ─────── host TCP sockets
//!                                      │     ├─ UDP, DNS, echo ──── host UDP and ping sockets
//!                                      └ Link: frames to the guest, addresses, epoll
//! ```
//!
//! Frames from the guest are hostile input: whatever does not parse is dropped, and every table and queue is bounded
//! (see [`Config`] for the limits that can be set). TCP towards the guest relies on the link being lossless except for
//! what the guest drops itself; it does flow control and retransmission but no congestion control.
//!
//! Not there: IPv6 on the guest's side, more than one guest per stack, IP options, ICMP other than echo and
//! destination unreachable.

mod checksum;
mod config;
mod dhcp;
mod dns;
mod driver;
mod frame;
mod icmp;
mod link;
pub mod passt;
mod poller;
mod reassembly;
mod slab;
mod stack;
mod tcp;
mod udp;

pub use config::{
    Config, ConfigError, Forward, ForwardParseError, GuestOffloads, MAX_MTU, MIN_MTU, Proto,
    Resolvers,
};
pub use driver::{Handle, MAX_FRAME, SendError, spawn};
pub use frame::{Frame, Offload, PartialChecksum};
pub use poller::Waker;
pub use stack::Stack;
