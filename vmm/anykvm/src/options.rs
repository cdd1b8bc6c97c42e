//! Values of options that have a syntax of their own.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Size of the guest's memory, a whole number of MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(u64);

impl MemorySize {
    /// The least that is accepted: less holds no kernel.
    pub const MIN: Self = Self(16 << 20);

    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "k" | "kb" | "kib" => 10,
            "" | "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err("write a number with M or G, e.g. 512M or 2G".into()),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| "write a number with M or G, e.g. 512M or 2G".to_string())?;
        let bytes = number
            .checked_mul(1 << shift)
            .ok_or_else(|| "that is more than any machine has".to_string())?;
        if bytes < Self::MIN.0 {
            return Err(format!("a guest needs at least {}", Self::MIN));
        }
        if bytes % (1 << 20) != 0 {
            return Err("it must be a whole number of MiB".into());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1 << 30) {
            write!(f, "{}G", self.0 >> 30)
        } else {
            write!(f, "{}M", self.0 >> 20)
        }
    }
}

/// How a disk image's content is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// `--disk FILE[,ro][,format=raw|qcow2]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Image file or block device.
    pub path: PathBuf,
    /// The guest may not write to it.
    pub read_only: bool,
    /// Given by the user; `None`: find out.
    pub format: Option<DiskFormat>,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = split_commas(text).into_iter();
        let path = fields.next().unwrap_or_default();
        if path.is_empty() {
            return Err("the file's name is missing".into());
        }
        let mut disk = Self {
            path: path.into(),
            read_only: false,
            format: None,
        };
        for field in fields {
            match field.as_str() {
                "ro" | "readonly" => disk.read_only = true,
                "format=raw" => disk.format = Some(DiskFormat::Raw),
                "format=qcow2" => disk.format = Some(DiskFormat::Qcow2),
                other => {
                    return Err(format!(
                        "'{other}' is not known; write FILE[,ro][,format=raw|qcow2], and ',,' for a comma in FILE"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// Splits at single commas; two in a row stand for one that belongs to the text, as in QEMU.
fn split_commas(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let field = fields.last_mut();
        if c != ',' {
            field.into_iter().for_each(|f| f.push(c));
        } else if chars.next_if_eq(&',').is_some() {
            field.into_iter().for_each(|f| f.push(','));
        } else {
            fields.push(String::new());
        }
    }
    fields
}

/// The transport protocol of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP, the default.
    Tcp,
    /// UDP.
    Udp,
}

/// `--publish [ADDR:]HOST:GUEST[/udp]`: connections to `host` go to the guest's port `guest`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publish {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where this machine listens. Without an address: 127.0.0.1, so that nothing is opened to the
    /// network unless the user says so.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest: u16,
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some((_, other)) => {
                return Err(format!("'{other}' is not a protocol; write tcp or udp"));
            }
        };
        let form = || "write [ADDR:]HOST:GUEST[/udp], e.g. 8080:80".to_string();
        let (front, guest) = rest.rsplit_once(':').ok_or_else(form)?;
        let (address, host) = match front.rsplit_once(':') {
            None => (IpAddr::from(Ipv4Addr::LOCALHOST), front),
            Some((address, host)) => {
                let bare = address
                    .strip_prefix('[')
                    .and_then(|a| a.strip_suffix(']'))
                    .unwrap_or(address);
                let address = bare.parse().map_err(|_| {
                    format!("'{address}' is not an IP address; write e.g. 0.0.0.0:8080:80")
                })?;
                (address, host)
            }
        };
        Ok(Self {
            protocol,
            host: SocketAddr::new(address, port(host)?),
            guest: port(guest)?,
        })
    }
}

fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("'{text}' is not a port; ports go from 1 to 65535")),
        Ok(port) => Ok(port),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes() {
        let bytes = |text: &str| text.parse::<MemorySize>().map(MemorySize::bytes);
        assert_eq!(bytes("2G"), Ok(2 << 30));
        assert_eq!(bytes("512M"), Ok(512 << 20));
        assert_eq!(bytes("512"), Ok(512 << 20));
        assert_eq!(bytes("1gib"), Ok(1 << 30));
        assert_eq!(bytes("65536K"), Ok(64 << 20));
        for bad in [
            "",
            "G",
            "-1G",
            "1.5G",
            "2X",
            "15M",
            "0",
            "16385K",
            "99999999999999999999",
            "18446744073709551615T",
            "2 G",
            "٣G",
        ] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert_eq!("1536M".parse::<MemorySize>().unwrap().to_string(), "1536M");
        assert_eq!("2048".parse::<MemorySize>().unwrap().to_string(), "2G");
    }

    #[test]
    fn disks() {
        let disk: DiskSpec = "a,,b.img,ro,format=raw".parse().unwrap();
        assert_eq!(disk.path, PathBuf::from("a,b.img"));
        assert!(disk.read_only);
        assert_eq!(disk.format, Some(DiskFormat::Raw));
        let disk: DiskSpec = "x.qcow2".parse().unwrap();
        assert!(!disk.read_only);
        assert_eq!(disk.format, None);
        for bad in ["", ",ro", "x,rw?", "x,format=vmdk", "x,"] {
            assert!(bad.parse::<DiskSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn published_ports() {
        let p: Publish = "8080:80".parse().unwrap();
        assert_eq!(p.host, "127.0.0.1:8080".parse().unwrap());
        assert_eq!((p.guest, p.protocol), (80, Protocol::Tcp));
        let p: Publish = "0.0.0.0:53:5353/udp".parse().unwrap();
        assert_eq!(p.host, "0.0.0.0:53".parse().unwrap());
        assert_eq!((p.guest, p.protocol), (5353, Protocol::Udp));
        let p: Publish = "[::1]:8080:80/tcp".parse().unwrap();
        assert_eq!(p.host, "[::1]:8080".parse().unwrap());
        for bad in [
            "",
            "80",
            "80:",
            ":80",
            "a:b",
            "0:80",
            "80:0",
            "65536:1",
            "1.2.3:1:2",
            "1:2/icmp",
            "1:2:3",
            "localhost:1:2",
        ] {
            assert!(bad.parse::<Publish>().is_err(), "{bad}");
        }
    }
}
