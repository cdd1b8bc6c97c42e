//! Values of options that have a syntax of their own.

use std::fmt;
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
}
