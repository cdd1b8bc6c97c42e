//! The host's own resolver configuration: `/etc/resolv.conf` and `/etc/hosts`.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::config::{Config, Resolvers};

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Like the C library, ask no more servers than this.
const MAX_SERVERS: usize = 3;
const MAX_FILE: u64 = 1 << 20;
const MAX_NAMES: usize = 10_000;
const REFRESH: Duration = Duration::from_secs(5);

/// What is known of the host's name service, read again as it ages.
pub(super) struct HostNames {
    servers: Vec<SocketAddr>,
    names: HashMap<String, Vec<Ipv4Addr>>,
    read_at: Option<Instant>,
}

impl HostNames {
    pub(super) fn new() -> Self {
        Self {
            servers: Vec::new(),
            names: HashMap::new(),
            read_at: None,
        }
    }

    /// Reads the files again if they were read some time ago: the host may have changed networks.
    pub(super) fn refresh(&mut self, config: &Config, now: Instant) {
        let fresh = self
            .read_at
            .is_some_and(|at| now.saturating_duration_since(at) < REFRESH);
        if fresh {
            return;
        }
        self.read_at = Some(now);
        self.servers = match &config.resolvers {
            Resolvers::Fixed(servers) => servers.iter().copied().take(MAX_SERVERS).collect(),
            Resolvers::System => parse_resolv_conf(&read(Path::new(RESOLV_CONF))),
        };
        self.names = config
            .hosts_file
            .as_ref()
            .map(|path| parse_hosts(&read(path)))
            .unwrap_or_default();
    }

    pub(super) fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// The addresses of a name in lower case.
    pub(super) fn lookup(&self, name: &str) -> Option<&[Ipv4Addr]> {
        self.names.get(name).map(Vec::as_slice)
    }
}

/// The text of a file; nothing if it cannot be read, as for a host without one.
fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
    if let Err(error) = read {
        log::debug!("reading {}: {error}", path.display());
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn parse_resolv_conf(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver"))
                .then(|| words.next())
                .flatten()
        })
        // Link-local servers with a scope do not parse and are left out.
        .filter_map(|word| word.parse::<IpAddr>().ok())
        .map(|ip| SocketAddr::new(ip, 53))
        .take(MAX_SERVERS)
        .collect()
}

fn parse_hosts(text: &str) -> HashMap<String, Vec<Ipv4Addr>> {
    let mut names: HashMap<String, Vec<Ipv4Addr>> = HashMap::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let Some(Ok(ip)) = words.next().map(str::parse::<Ipv4Addr>) else {
            continue;
        };
        if ip.is_loopback() || ip.is_unspecified() {
            continue;
        }
        for name in words {
            if names.len() >= MAX_NAMES {
                return names;
            }
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            names.entry(name).or_default().push(ip);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_name_servers() {
        let text = "# by hand\nsearch lan\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\n\
                    nameserver\t2001:db8::1 x\nnameserver\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n";
        let servers: Vec<String> = parse_resolv_conf(text)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            servers,
            ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]
        );
    }

    #[test]
    fn reads_hosts_without_loopback() {
        let names = parse_hosts(
            "127.0.0.1 localhost\n::1 localhost\n192.0.2.9 Box box.lan # a box\n192.0.2.10 box\n#192.0.2.1 x",
        );
        assert_eq!(names.len(), 2);
        assert_eq!(names["box"].len(), 2);
        assert_eq!(names["box.lan"], [Ipv4Addr::new(192, 0, 2, 9)]);
    }
}
