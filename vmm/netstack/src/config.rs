//! What a network stack is set up with, and the textual form of port forwards.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Largest IPv4 packet that the stack exchanges with a guest, in bytes.
pub const MAX_MTU: usize = 65520;
/// Smallest MTU that every IPv4 host must accept, in bytes.
pub const MIN_MTU: usize = 576;

/// Settings of a [`Stack`](crate::Stack). [`Config::default`] gives a guest the outside network and the host's loopback.
#[derive(Clone, Debug)]
pub struct Config {
    /// The address that DHCP leases to the guest.
    pub guest_ip: Ipv4Addr,
    /// Length of the guest network's prefix, in bits.
    pub prefix_len: u8,
    /// The stack's own address: router and DHCP server. Connections to it reach the host's loopback.
    pub gateway_ip: Ipv4Addr,
    /// The address that answers DNS queries.
    pub dns_ip: Ipv4Addr,
    /// Ethernet address of the stack.
    pub gateway_mac: [u8; 6],
    /// Name that DHCP gives to the guest.
    pub hostname: Option<String>,
    /// Largest IPv4 packet on the guest link, in bytes, from [`MIN_MTU`] to [`MAX_MTU`]; DHCP tells the guest if it
    /// is not 1500.
    pub mtu: usize,
    /// What the guest's network card can finish for the stack.
    pub offloads: GuestOffloads,
    /// Where DNS queries go.
    pub resolvers: Resolvers,
    /// A file in the format of `/etc/hosts` whose names are answered before any resolver is asked. Loopback entries
    /// are left out, since they would mean the guest itself.
    pub hosts_file: Option<PathBuf>,
    /// Whether `gateway_ip` reaches the services on the host's 127.0.0.1.
    pub host_loopback: bool,
    /// Whether the guest may open connections at all. Without it only DHCP, ARP, echo to the gateway and port forwards
    /// work.
    pub outbound: bool,
    /// Host ports that lead to the guest.
    pub forwards: Vec<Forward>,
    /// Limit of TCP connections; further ones are refused.
    pub max_tcp: usize,
    /// Limit of UDP flows; a new one takes the place of the one idle for longest.
    pub max_udp: usize,
    /// Buffer of a TCP connection in each direction, in bytes; allocated as it is needed.
    pub tcp_buffer: usize,
    /// How long an idle UDP flow is kept.
    pub udp_idle: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            guest_ip: Ipv4Addr::new(10, 0, 2, 15),
            prefix_len: 24,
            gateway_ip: Ipv4Addr::new(10, 0, 2, 2),
            dns_ip: Ipv4Addr::new(10, 0, 2, 3),
            gateway_mac: [0x52, 0x55, 0x0a, 0x00, 0x02, 0x02],
            hostname: None,
            mtu: 1500,
            offloads: GuestOffloads::default(),
            resolvers: Resolvers::System,
            hosts_file: Some(PathBuf::from("/etc/hosts")),
            host_loopback: true,
            outbound: true,
            forwards: Vec::new(),
            max_tcp: 512,
            max_udp: 512,
            tcp_buffer: 256 * 1024,
            udp_idle: Duration::from_secs(60),
        }
    }
}

/// Offloads that the guest accepts on frames sent to it, as negotiated by its network card.
///
/// Frames from the guest say for themselves what is left to do: see [`Offload`](crate::Offload).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestOffloads {
    /// The guest accepts TCP and UDP frames with a partial checksum (`VIRTIO_NET_F_GUEST_CSUM`).
    pub checksum: bool,
    /// The guest accepts TCP frames of many segments (`VIRTIO_NET_F_GUEST_TSO4`); needs `checksum`.
    pub tso: bool,
}

/// Where DNS queries go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolvers {
    /// The name servers of the host's `/etc/resolv.conf`, read again when it may have changed.
    System,
    /// These, tried in order. An empty list answers every query with SERVFAIL.
    Fixed(Vec<SocketAddr>),
}

/// A setting that a stack cannot be made with. The message is one line for the user.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The MTU is out of range.
    #[error("MTU {0} is out of range: use {MIN_MTU} to {MAX_MTU}")]
    Mtu(usize),
    /// The addresses do not form a usable network.
    #[error(
        "guest {guest}, gateway {gateway} and DNS {dns} must be three different host addresses in one /{prefix} network"
    )]
    Addresses {
        /// The guest's address.
        guest: Ipv4Addr,
        /// The stack's address.
        gateway: Ipv4Addr,
        /// The DNS address.
        dns: Ipv4Addr,
        /// Prefix length in bits.
        prefix: u8,
    },
    /// The host name does not fit in DHCP.
    #[error("host name {0:?} is not usable: use 1 to 63 letters, digits, '-' and '.'")]
    Hostname(String),
    /// The gateway's Ethernet address is a group address.
    #[error("the gateway's Ethernet address must be a unicast address")]
    Mac,
    /// Segmentation without checksum offload.
    #[error("segmentation offload needs checksum offload")]
    Offloads,
    /// The TCP buffer is out of range.
    #[error("TCP buffer of {0} bytes is out of range: use 4096 to 16777216")]
    Buffer(usize),
}

impl Config {
    /// Checks that the settings fit together.
    ///
    /// # Errors
    /// The first setting that does not, as a [`ConfigError`].
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(MIN_MTU..=MAX_MTU).contains(&self.mtu) {
            return Err(ConfigError::Mtu(self.mtu));
        }
        let ips = [self.guest_ip, self.gateway_ip, self.dns_ip];
        let distinct = ips[0] != ips[1] && ips[0] != ips[2] && ips[1] != ips[2];
        let usable = (8..=30).contains(&self.prefix_len)
            && distinct
            && ips.iter().all(|&ip| self.is_local_host(ip))
            && !self.guest_ip.is_loopback()
            && !self.guest_ip.is_multicast();
        if !usable {
            return Err(ConfigError::Addresses {
                guest: self.guest_ip,
                gateway: self.gateway_ip,
                dns: self.dns_ip,
                prefix: self.prefix_len,
            });
        }
        if let Some(name) = &self.hostname {
            let valid = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
            if name.is_empty() || name.len() > 63 || !name.bytes().all(valid) {
                return Err(ConfigError::Hostname(name.clone()));
            }
        }
        if self.gateway_mac[0] & 1 != 0 || self.gateway_mac == [0; 6] {
            return Err(ConfigError::Mac);
        }
        if self.offloads.tso && !self.offloads.checksum {
            return Err(ConfigError::Offloads);
        }
        if !(4096..=16 << 20).contains(&self.tcp_buffer) {
            return Err(ConfigError::Buffer(self.tcp_buffer));
        }
        Ok(())
    }

    /// The guest network's mask.
    pub fn netmask(&self) -> Ipv4Addr {
        let host_bits = 32u32.saturating_sub(u32::from(self.prefix_len));
        Ipv4Addr::from_bits(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }

    /// Whether `ip` is in the guest network, its broadcast address included.
    pub(crate) fn is_local(&self, ip: Ipv4Addr) -> bool {
        let mask = self.netmask().to_bits();
        ip.to_bits() & mask == self.gateway_ip.to_bits() & mask
    }

    /// Whether `ip` is an address in the guest network that one host can have.
    pub(crate) fn is_local_host(&self, ip: Ipv4Addr) -> bool {
        let host_part = ip.to_bits() & !self.netmask().to_bits();
        self.is_local(ip) && host_part != 0 && host_part != !self.netmask().to_bits()
    }
}

/// Transport protocol of a [`Forward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Proto {
    /// TCP connections.
    Tcp,
    /// UDP datagrams.
    Udp,
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A host port that leads to a port of the guest.
///
/// Written `[ADDR:]HOST:GUEST[/tcp|/udp]`: `8080:80`, `0.0.0.0:5353:53/udp`, `[::1]:2222:22`. Without ADDR the port is
/// open to this host alone (127.0.0.1). HOST 0 lets the host choose a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forward {
    /// Transport protocol.
    pub proto: Proto,
    /// Host address to listen on.
    pub host_addr: IpAddr,
    /// Host port to listen on; 0 for one of the host's choice.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
}

/// Text that is not a [`Forward`]. The message is one line for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "port forward {text:?}: {reason}; write [ADDR:]HOST:GUEST[/tcp|/udp], for example 8080:80 or 127.0.0.1:5353:53/udp"
)]
pub struct ForwardParseError {
    text: String,
    reason: &'static str,
}

impl FromStr for Forward {
    type Err = ForwardParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |reason| ForwardParseError {
            text: text.chars().take(80).collect(),
            reason,
        };
        let (ports, proto) = match text.rsplit_once('/') {
            None => (text, Proto::Tcp),
            Some((ports, "tcp")) => (ports, Proto::Tcp),
            Some((ports, "udp")) => (ports, Proto::Udp),
            Some(_) => return Err(fail("the protocol must be tcp or udp")),
        };
        let port = |text: &str, reason| {
            // `parse` alone would take a sign.
            if text.bytes().all(|b| b.is_ascii_digit()) {
                text.parse::<u16>().map_err(|_| fail(reason))
            } else {
                Err(fail(reason))
            }
        };
        let (rest, guest) = ports
            .rsplit_once(':')
            .ok_or_else(|| fail("the guest port is missing"))?;
        let (addr, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((addr, host)) => (Some(addr), host),
        };
        let guest_port = port(guest, "the guest port must be 1 to 65535")?;
        if guest_port == 0 {
            return Err(fail("the guest port must be 1 to 65535"));
        }
        let host_port = port(host, "the host port must be 0 to 65535")?;
        let host_addr = match addr {
            None => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(addr) => addr
                .strip_prefix('[')
                .and_then(|a| a.strip_suffix(']'))
                .map_or_else(
                    || addr.parse::<Ipv4Addr>().map(IpAddr::V4).ok(),
                    |v6| v6.parse().map(IpAddr::V6).ok(),
                )
                .ok_or_else(|| {
                    fail("the address must be an IPv4 address or an IPv6 address in brackets")
                })?,
        };
        Ok(Self {
            proto,
            host_addr,
            host_port,
            guest_port,
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = SocketAddr::new(self.host_addr, self.host_port);
        write!(f, "{host}:{}/{}", self.guest_port, self.proto)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_parse_and_print() {
        for (text, printed) in [
            ("8080:80", "127.0.0.1:8080:80/tcp"),
            ("0.0.0.0:5353:53/udp", "0.0.0.0:5353:53/udp"),
            ("[::1]:2222:22/tcp", "[::1]:2222:22/tcp"),
            ("0:22", "127.0.0.1:0:22/tcp"),
        ] {
            let forward: Forward = text.parse().unwrap();
            assert_eq!(forward.to_string(), printed);
            assert_eq!(printed.parse::<Forward>().unwrap(), forward);
        }
    }

    #[test]
    fn bad_forwards_say_what_is_wrong() {
        for text in [
            "",
            "80",
            ":",
            "80:",
            "80:0",
            "80:65536",
            "+80:80",
            "x:80:80",
            "::1:80:80",
            "80:80/sctp",
            "127.0.0.1:80",
        ] {
            let error = text.parse::<Forward>().unwrap_err().to_string();
            assert!(error.contains("write [ADDR:]HOST:GUEST"), "{error}");
            assert!(!error.contains('\n'));
        }
    }

    #[test]
    fn unusable_settings_are_refused() {
        assert_eq!(Config::default().check(), Ok(()));
        let with = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.check()
        };
        assert_eq!(with(|c| c.mtu = 100), Err(ConfigError::Mtu(100)));
        assert!(with(|c| c.dns_ip = c.guest_ip).is_err());
        assert!(with(|c| c.guest_ip = Ipv4Addr::new(10, 0, 2, 255)).is_err());
        assert!(with(|c| c.guest_ip = Ipv4Addr::new(10, 0, 3, 15)).is_err());
        assert!(with(|c| c.prefix_len = 40).is_err());
        assert!(with(|c| c.hostname = Some("a b".into())).is_err());
        assert!(with(|c| c.offloads.tso = true).is_err());
        assert!(with(|c| c.gateway_mac[0] = 1).is_err());
    }
}
