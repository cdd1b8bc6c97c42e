//! `bench memory`: memory of the machine's process beside the guest's RAM, idle after boot.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use crate::machine::{Kind, Machine};
use crate::setup::Setup;
use crate::statistics::median;
use crate::{Outcome, Result, table};

const LIMIT: Duration = Duration::from_secs(90);
/// How long the guest is idle before its process is looked at.
const SETTLE: Duration = Duration::from_secs(2);
/// In the name of the mappings of the guest's RAM: AnyKVM's own name, and QEMU's name for its.
const RAM_NAMES: [&str; 2] = ["memfd:guest-ram", "memfd:memory-backend-memfd"];

/// Memory of a process, in MiB.
#[derive(Debug, Default, Clone, PartialEq)]
struct Usage {
    /// Resident pages of the guest's RAM, each once for each mapping.
    ram: f64,
    /// Resident pages of everything else.
    rss: f64,
    /// As `rss`, shared pages divided by who shares them.
    pss: f64,
    /// The process's page tables.
    tables: f64,
    /// `pss` by the name of the mapping.
    by_name: BTreeMap<String, f64>,
}

/// Boots each machine to an idle `/init` and looks at its process.
///
/// # Errors
/// If nothing can be measured.
pub fn run(setup: &Setup) -> Result<Outcome> {
    let rounds = setup.rounds(3).min(3);
    let initrd = setup.initrd("idle.cpio", "idle")?;
    let kinds = Kind::available(setup, &[Kind::AnyKvm, Kind::Tcg, Kind::Microvm]);
    let mut rows = Vec::new();
    let mut results = serde_json::Map::new();
    let mut failures = Vec::new();
    let mut details = Vec::new();
    for kind in kinds {
        let mut usages = Vec::new();
        for round in 1..=rounds {
            eprintln!("memory: round {round} of {rounds}, {}", kind.name());
            let mut machine = Machine::start(kind.command(setup, &initrd, "idle"))?;
            match machine.wait_for("init", LIMIT) {
                Ok(_) => {
                    std::thread::sleep(SETTLE);
                    usages.push(usage(machine.pid())?);
                }
                Err(why) => failures.push((kind, why)),
            }
        }
        let middle = |get: fn(&Usage) -> f64| median(&usages.iter().map(get).collect::<Vec<_>>());
        let values = [
            middle(|u| u.rss),
            middle(|u| u.pss),
            middle(|u| u.tables),
            middle(|u| u.ram),
        ];
        let mut row = vec![kind.name().to_owned()];
        row.extend(values.map(|v| v.map_or("-".into(), |mib| format!("{mib:.1}"))));
        rows.push(row);
        let [rss, pss, tables, ram] = values;
        let largest = usages.last().map(Usage::largest).unwrap_or_default();
        let parts: Vec<String> = largest
            .iter()
            .map(|(name, mib)| format!("{name} {mib:.1}"))
            .collect();
        details.push(format!("{}: {}", kind.name(), parts.join(", ")));
        results.insert(
            kind.name().into(),
            json!({ "rss_mib": rss, "pss_mib": pss, "page_tables_mib": tables, "guest_ram_mapped_mib": ram, "largest_pss_mib": largest }),
        );
    }
    println!("Memory of the process beside the guest's RAM, idle after boot, median (MiB)");
    let head = ["machine", "RSS", "PSS", "page tables", "guest RAM, mapped"];
    print!("{}", table::text(&head, &rows));
    println!("\nlargest parts of the PSS:");
    for detail in &details {
        println!("  {detail}");
    }
    for (kind, why) in &failures {
        println!("{} failed: {why}", kind.name());
    }
    Ok(Outcome {
        good: failures.iter().all(|(kind, _)| kind.is_tcg()),
        json: results.into(),
    })
}

impl Usage {
    /// The names with the most PSS.
    fn largest(&self) -> Vec<(String, f64)> {
        let mut parts: Vec<(String, f64)> = self.by_name.clone().into_iter().collect();
        parts.sort_by(|a, b| b.1.total_cmp(&a.1));
        parts.truncate(6);
        parts
    }
}

fn usage(pid: u32) -> Result<Usage> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        std::fs::read_to_string(&path).map_err(|e| format!("cannot read {path}: {e}"))
    };
    let mut usage = parse(&read("smaps")?);
    usage.tables = read("status")?
        .lines()
        .find_map(|line| line.strip_prefix("VmPTE:"))
        .map_or(0.0, mib);
    Ok(usage)
}

/// MiB of a value like `   123 kB`.
fn mib(value: &str) -> f64 {
    let number = value.split_whitespace().next().unwrap_or_default();
    number.parse::<f64>().unwrap_or(0.0) / 1024.0
}

fn parse(smaps: &str) -> Usage {
    let mut usage = Usage::default();
    let mut ram = false;
    let mut name = "";
    for line in smaps.lines() {
        match line.split_once(':') {
            Some(("Rss", value)) if ram => usage.ram += mib(value),
            Some(("Rss", value)) => usage.rss += mib(value),
            Some(("Pss", value)) if !ram => {
                usage.pss += mib(value);
                *usage.by_name.entry(name.to_owned()).or_default() += mib(value);
            }
            // A mapping's first line starts with its addresses, the others with a name.
            _ if line.contains('-')
                && line.starts_with(|c: char| c.is_ascii_hexdigit() && !c.is_ascii_uppercase()) =>
            {
                ram = RAM_NAMES.iter().any(|name| line.contains(name));
                // After addresses, permissions, offset, device and inode; none: anonymous.
                let path = line.split_whitespace().nth(5).unwrap_or("anonymous");
                name = path.rsplit('/').next().unwrap_or(path);
            }
            _ => {}
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_ram_is_counted_apart() {
        let smaps = "\
00400000-00500000 r-xp 00000000 08:01 99 /usr/bin/anykvm
Size:               1024 kB
Rss:                1024 kB
Pss:                 512 kB
Pss_Dirty:           512 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0020000000 rw-s 00000000 00:01 7 /memfd:guest-ram (deleted)
Rss:               10240 kB
Pss:                5120 kB
7f1000000000-7f1000200000 rw-p 00000000 00:00 0
Rss:                2048 kB
Pss:                2048 kB
";
        let usage = parse(smaps);
        assert_eq!((usage.ram, usage.rss, usage.pss), (10.0, 3.0, 2.5));
        let expected = [("anonymous".to_owned(), 2.0), ("anykvm".to_owned(), 0.5)];
        assert_eq!(usage.largest(), expected);
    }
}
