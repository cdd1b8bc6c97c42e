//! Which kernel modules the guest needs and the order in which they load.
//!
//! The kernel's package has no `modules.dep` (it is made when a kernel is installed), so the
//! dependencies are read from where `depmod` would read them: the `.modinfo` section of each
//! module, zero-terminated `key=value` strings.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Error;

/// The drivers the default guest uses. One that the kernel has built in is not in the package.
pub const WANTED: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
];

/// A module's name as the kernel writes it: from the file's name, with `_` for `-`.
/// `None` if the file is no module.
pub fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit_once('/').map_or(path, |(_, file)| file);
    let (stem, kind) = file.rsplit_once(".ko")?;
    matches!(kind, "" | ".xz" | ".gz" | ".zst").then(|| stem.replace('-', "_"))
}

/// The `depends=` entry of a module's `.modinfo` section.
///
/// # Errors
/// If `module` is not a little-endian ELF file with such a section.
pub fn dependencies(name: &str, module: &[u8]) -> Result<Vec<String>, Error> {
    let info = modinfo_section(module).ok_or_else(|| {
        Error::new(format!(
            "the kernel module {name} is not an ELF file with module information"
        ))
    })?;
    Ok(info
        .split(|&byte| byte == 0)
        .filter_map(|entry| entry.strip_prefix(b"depends="))
        .flat_map(|list| list.split(|&byte| byte == b','))
        .filter(|depended| !depended.is_empty())
        .map(|depended| String::from_utf8_lossy(depended).replace('-', "_"))
        .collect())
}

/// Where the fields of a file header and of a section header are (ELF-32 and ELF-64 object file
/// formats): offset and size.
struct Fields {
    table: (usize, usize),
    entry_size: usize,
    count: usize,
    names_index: usize,
    section_start: (usize, usize),
    section_size: (usize, usize),
}

const ELF32: Fields = Fields {
    table: (0x20, 4),
    entry_size: 0x2e,
    count: 0x30,
    names_index: 0x32,
    section_start: (0x10, 4),
    section_size: (0x14, 4),
};
const ELF64: Fields = Fields {
    table: (0x28, 8),
    entry_size: 0x3a,
    count: 0x3c,
    names_index: 0x3e,
    section_start: (0x18, 8),
    section_size: (0x20, 8),
};

/// Finds the section `.modinfo` by the ELF section headers.
fn modinfo_section(elf: &[u8]) -> Option<&[u8]> {
    let fields = match elf.get(..6)? {
        b"\x7fELF\x01\x01" => ELF32,
        b"\x7fELF\x02\x01" => ELF64,
        _ => return None,
    };
    let table = number(elf, fields.table.0, fields.table.1)?;
    let entry_size = number(elf, fields.entry_size, 2)?;
    let count = number(elf, fields.count, 2)?;
    let names_index = number(elf, fields.names_index, 2)?;
    let header = |index: usize| {
        let start = table.checked_add(index.checked_mul(entry_size)?)?;
        elf.get(start..start.checked_add(entry_size)?)
    };
    let content = |header: &[u8]| {
        let start = number(header, fields.section_start.0, fields.section_start.1)?;
        let size = number(header, fields.section_size.0, fields.section_size.1)?;
        elf.get(start..start.checked_add(size)?)
    };
    let names = content(header(names_index)?)?;
    (0..count).filter_map(header).find_map(|header| {
        let name = names.get(number(header, 0, 4)?..)?;
        name.starts_with(b".modinfo\0").then(|| content(header))?
    })
}

/// A little-endian number of `size` bytes at `offset`.
fn number(bytes: &[u8], offset: usize, size: usize) -> Option<usize> {
    let field = bytes.get(offset..offset.checked_add(size)?)?;
    let value = field.iter().rev().try_fold(0u64, |value, &byte| {
        Some(value.checked_shl(8)? | u64::from(byte))
    })?;
    usize::try_from(value).ok()
}

/// Puts `wanted` and all that they need in an order in which each follows its dependencies.
///
/// `depends` tells a module's dependencies. Modules it does not know are taken as built into the
/// kernel and left out.
pub fn load_order(wanted: &[&str], depends: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    // A stack of (module, dependencies visited?) instead of recursion: the depth is the package's
    // to choose. A module seen before is skipped, so that a cycle ends too.
    let mut stack: Vec<(String, bool)> = wanted
        .iter()
        .rev()
        .map(|&name| (name.to_owned(), false))
        .collect();
    while let Some((name, visited)) = stack.pop() {
        if visited {
            order.push(name);
            continue;
        }
        let Some(needed) = depends.get(&name) else {
            continue;
        };
        if !seen.insert(name.clone()) {
            continue;
        }
        stack.push((name, true));
        stack.extend(needed.iter().rev().map(|name| (name.clone(), false)));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF file with a section name table and a `.modinfo` section.
    fn module(info: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0";
        let names_at = 64;
        let info_at = names_at + names.len();
        let table_at = info_at + info.len();
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x28..0x30].copy_from_slice(&(table_at as u64).to_le_bytes());
        elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3c..0x3e].copy_from_slice(&2u16.to_le_bytes());
        elf.extend_from_slice(names);
        elf.extend_from_slice(info);
        for (name, start, size) in [(0u32, names_at, names.len()), (1, info_at, info.len())] {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(start as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend(header);
        }
        elf
    }

    /// The same for a 32-bit kernel.
    fn module32(info: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0";
        let mut elf = vec![0; 52];
        elf[..6].copy_from_slice(b"\x7fELF\x01\x01");
        let table_at = (52 + names.len() + info.len()) as u32;
        elf[0x20..0x24].copy_from_slice(&table_at.to_le_bytes());
        elf[0x2e..0x30].copy_from_slice(&40u16.to_le_bytes());
        elf[0x30..0x32].copy_from_slice(&2u16.to_le_bytes());
        elf.extend_from_slice(names);
        elf.extend_from_slice(info);
        for (name, start, size) in [(0u32, 52, names.len()), (1, 52 + names.len(), info.len())] {
            let mut header = vec![0; 40];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x10..0x14].copy_from_slice(&(start as u32).to_le_bytes());
            header[0x14..0x18].copy_from_slice(&(size as u32).to_le_bytes());
            elf.extend(header);
        }
        elf
    }

    #[test]
    fn reads_the_dependencies() {
        let elf = module(b"name=virtio_net\0depends=virtio_ring,net-failover\0retpoline=Y\0");
        let found = dependencies("virtio_net", &elf).unwrap();
        assert_eq!(found, ["virtio_ring", "net_failover"]);
        let elf = module(b"depends=\0");
        assert!(dependencies("x", &elf).unwrap().is_empty());
        let elf = module32(b"depends=virtio_ring\0");
        assert_eq!(dependencies("virtio_net", &elf).unwrap(), ["virtio_ring"]);
    }

    #[test]
    fn broken_modules_are_errors_not_panics() {
        let elf = module(b"depends=a\0");
        for length in 0..elf.len() {
            let _ = dependencies("x", &elf[..length]);
        }
        for at in 0..elf.len() {
            let mut broken = elf.clone();
            broken[at] = 0xff;
            let _ = dependencies("x", &broken);
        }
        assert!(dependencies("x", b"not an ELF file").is_err());
    }

    #[test]
    fn dependencies_load_first_and_cycles_end() {
        let depends: BTreeMap<String, Vec<String>> = [
            ("net", vec!["ring", "failover", "built_in"]),
            ("failover", vec!["ring"]),
            ("ring", vec![]),
            ("a", vec!["b"]),
            ("b", vec!["a"]),
        ]
        .map(|(name, needs)| (name.to_owned(), needs.into_iter().map(Into::into).collect()))
        .into();
        assert_eq!(
            load_order(&["net", "missing", "ring", "a"], &depends),
            ["ring", "failover", "net", "b", "a"]
        );
    }

    #[test]
    fn names() {
        assert_eq!(
            name_of("kernel/a/virtio-rng.ko.xz").as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(name_of("virtio.ko").as_deref(), Some("virtio"));
        assert_eq!(name_of("kernel/a/notes.kot"), None);
        assert_eq!(name_of("modules.order"), None);
    }
}
