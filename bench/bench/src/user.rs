//! `bench user`, `bench qemu`: the workloads natively, in AnyKVM (or QEMU over it) and in QEMU's TCG.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::machine::{Kind, Machine, Record};
use crate::setup::Setup;
use crate::statistics::{geometric_mean, least, median};
use crate::table::{self, milliseconds, ratio};
use crate::{Outcome, Result};

/// The guest itself ends a workload after 180 s: a machine that says nothing for longer is stuck.
pub const LIMIT: Duration = Duration::from_secs(240);
/// How long a guest may take to its first line.
pub const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// By how much a guest's clock may differ from the host's over a run.
const CLOCK_ERROR: f64 = 0.02;
/// The classes of "integer and floating-point user code".
const USER_CODE: [&str; 3] = ["integer", "calls", "float"];

/// What a machine did with a workload.
#[derive(Default, Clone)]
struct Cell {
    /// One per repetition, all rounds, in milliseconds.
    times: Vec<f64>,
    /// Of programs: the first run of each round, in milliseconds; not in `times`.
    first: Vec<f64>,
    checksum: Option<String>,
    /// Why there is nothing: the CPU lacks an instruction.
    missing: Option<String>,
    /// Why there is nothing: it failed.
    failed: Option<String>,
}

#[derive(Default)]
struct Workload {
    name: String,
    class: String,
    cells: BTreeMap<&'static str, Cell>,
}

struct Suite<'a> {
    /// The machine that is ours: AnyKVM, or QEMU over it.
    own: Kind,
    /// As [`Work::together`].
    together: &'a [&'a str],
    /// In the order of the first machine that reported them.
    workloads: Vec<Workload>,
    /// By machine: seconds of the guest's clock and of the host's, for each round.
    clocks: BTreeMap<&'static str, Vec<(f64, f64)>>,
    /// Machines that did not come to an end, and why.
    broken: Vec<(Kind, String)>,
}

/// What the guest program is to do, and where.
struct Work<'a> {
    /// For messages.
    name: &'a str,
    /// Its arguments on the host.
    native: String,
    initrd: PathBuf,
    /// The classes of a row of their own in the summary.
    together: &'a [&'a str],
}

/// Runs the workloads on each machine in turn; `own` is ours.
///
/// # Errors
/// If nothing can be run, or a workload's name is not known.
pub fn run(setup: &Setup, own: Kind) -> Result<Outcome> {
    let arguments = arguments(setup, "user", "list")?;
    let work = Work {
        name: "user",
        initrd: setup.initrd("user.cpio", &arguments)?,
        native: arguments,
        together: &USER_CODE,
    };
    compare(setup, own, &work)
}

/// Runs the real programs of the root file system `root` on each machine in turn.
///
/// # Errors
/// If nothing can be run, or a program's name is not known.
pub fn programs(setup: &Setup, root: &Path) -> Result<Outcome> {
    let arguments = arguments(setup, "programs", "list-programs")?;
    let work = Work {
        name: "programs",
        initrd: setup.initrd_with("programs.cpio", &arguments, root)?,
        native: format!("{arguments} --root {}", root.display()),
        together: &[],
    };
    compare(setup, Kind::AnyKvm, &work)
}

/// An initial file system that runs what `--only` names: workloads or programs.
///
/// # Errors
/// If neither has such a name, or it cannot be written.
pub fn initrd(setup: &Setup) -> Result<PathBuf> {
    match arguments(setup, "user", "list") {
        Ok(arguments) => setup.initrd("hot.cpio", &arguments),
        Err(why) => {
            let Ok(arguments) = arguments(setup, "programs", "list-programs") else {
                return Err(format!("{why}\nor a program of 'bench programs'"));
            };
            setup.initrd_with("hot.cpio", &arguments, &crate::programs::root()?)
        }
    }
}

/// The guest program's arguments for `what`; `list` names what there is.
///
/// # Errors
/// If `--only` names something else.
pub fn arguments(setup: &Setup, what: &str, list: &str) -> Result<String> {
    let (repetitions, divisor) = if setup.options.quick { (2, 4) } else { (5, 1) };
    let mut arguments = format!("{what} --reps {repetitions} --divide {divisor}");
    if !setup.options.only.is_empty() {
        check_names(setup, list)?;
        arguments += &format!(" --only {}", setup.options.only.join(","));
    }
    Ok(arguments)
}

fn compare(setup: &Setup, own: Kind, work: &Work<'_>) -> Result<Outcome> {
    if setup.export(&work.initrd)? {
        return Ok(Outcome {
            json: Value::Null,
            good: true,
        });
    }
    let rounds = setup.rounds(3);
    let kinds = Kind::available(setup, &[Kind::Native, own, Kind::Tcg]);
    let mut suite = Suite::new(own, work.together);
    let name = work.name;
    for round in 1..=rounds {
        for &kind in &kinds {
            eprintln!("{name}: round {round} of {rounds}, {}", kind.name());
            let machine = Machine::start(kind.command(setup, &work.initrd, &work.native))?;
            if let Err(why) = suite.follow(kind, machine) {
                eprintln!("{name}: {} failed: {why}", kind.name());
                suite.broken.push((kind, why));
            }
        }
    }
    suite.compare_results();
    // Classes together, in their order of appearance.
    let order: Vec<String> = suite.workloads.iter().map(|w| w.class.clone()).collect();
    suite
        .workloads
        .sort_by_key(|w| order.iter().position(|class| *class == w.class));
    suite.print(&kinds);
    Ok(Outcome {
        good: suite.is_good(),
        json: suite.json(),
    })
}

/// Asks the guest program, here on the host, for its names.
fn check_names(setup: &Setup, list: &str) -> Result<()> {
    let output = std::process::Command::new(&setup.guest)
        .arg(list)
        .output()
        .map_err(|e| format!("cannot run {}: {e}", setup.guest.display()))?;
    let list = String::from_utf8_lossy(&output.stdout);
    for name in &setup.options.only {
        let known = list
            .lines()
            .any(|line| line.split_whitespace().take(2).any(|word| word == name));
        if !known {
            return Err(format!(
                "there is no workload or class '{name}'; these are:\n{list}"
            ));
        }
    }
    Ok(())
}

impl<'a> Suite<'a> {
    fn new(own: Kind, together: &'a [&'a str]) -> Self {
        Self {
            own,
            together,
            workloads: Vec::new(),
            clocks: BTreeMap::new(),
            broken: Vec::new(),
        }
    }

    /// Takes the results of one machine until its guest says that it has done all.
    fn follow(&mut self, kind: Kind, mut machine: Machine) -> Result<()> {
        let mut start = None;
        let mut limit = BOOT_LIMIT;
        loop {
            let record = machine.record(limit);
            limit = LIMIT;
            match record {
                Ok(record) => match record.kind() {
                    "start" => start = clock(&record),
                    "end" => {
                        if let Some(((guest, host), (end, at))) = start.zip(clock(&record)) {
                            let times = (end - guest, (at - host).as_secs_f64());
                            self.clocks.entry(kind.name()).or_default().push(times);
                        }
                        machine.ended_within(Duration::from_secs(5));
                        return Ok(());
                    }
                    "result" | "missing" | "failed" => self.take(kind, &record.value),
                    _ => {}
                },
                Err(end) => return Err(machine.describe(&end)),
            }
        }
    }

    fn take(&mut self, kind: Kind, record: &Value) {
        let text = |field: &str| record[field].as_str().unwrap_or_default().to_owned();
        let name = text("name");
        let at = match self.workloads.iter().position(|w| w.name == name) {
            Some(at) => at,
            None => {
                self.workloads.push(Workload {
                    name,
                    class: text("class"),
                    cells: BTreeMap::new(),
                });
                self.workloads.len() - 1
            }
        };
        let cell = self.workloads[at].cells.entry(kind.name()).or_default();
        match record["record"].as_str() {
            Some("missing") => cell.missing = Some(text("why")),
            Some("failed") => cell.failed = Some(text("why")),
            _ => {
                let times = record["ns"].as_array().into_iter().flatten();
                cell.times
                    .extend(times.filter_map(Value::as_f64).map(|ns| ns / 1e6));
                let first = record["first_ns"].as_f64();
                cell.first.extend(first.map(|ns| ns / 1e6));
                let checksum = text("checksum");
                if cell
                    .checksum
                    .as_ref()
                    .is_some_and(|first| *first != checksum)
                {
                    cell.failed = Some("two rounds computed different results".into());
                }
                cell.checksum = Some(checksum);
            }
        }
    }

    /// What differs from the first machine's result, the host's if it takes part, does not count.
    fn compare_results(&mut self) {
        for workload in &mut self.workloads {
            let order = [Kind::Native, self.own, Kind::Tcg].map(Kind::name);
            let expected = order
                .iter()
                .find_map(|kind| workload.cells.get(kind)?.checksum.clone());
            for cell in workload.cells.values_mut() {
                if cell.checksum.is_some() && cell.checksum != expected {
                    cell.failed = Some("WRONG RESULT".into());
                }
                if cell.failed.is_some() {
                    cell.times.clear();
                    cell.first.clear();
                }
            }
        }
    }

    fn print(&self, kinds: &[Kind]) {
        let own = self.own.name();
        println!(
            "Workloads, median (ms), and times native's; the last column: how much faster {own} is than TCG"
        );
        let head = [
            "workload", "native", own, "x native", "tcg", "x native", "tcg/own",
        ];
        let mut rows = Vec::new();
        let mut class = "";
        for workload in &self.workloads {
            if workload.class != class {
                class = &workload.class;
                rows.push(vec![format!("[{class}]")]);
            }
            rows.push(vec![
                workload.name.clone(),
                workload.shown(Kind::Native),
                workload.shown(self.own),
                ratio(workload.ratio(self.own, Kind::Native)),
                workload.shown(Kind::Tcg),
                ratio(workload.ratio(Kind::Tcg, Kind::Native)),
                ratio(workload.ratio(Kind::Tcg, self.own)),
            ]);
        }
        print!("{}", table::text(&head, &rows));
        println!("\nGeometric means");
        let rows: Vec<Vec<String>> = self
            .summary()
            .into_iter()
            .map(|(name, means)| [vec![name], means.map(ratio).to_vec()].concat())
            .collect();
        let head = ["class", "own/native", "tcg/native", "tcg/own"];
        print!("{}", table::text(&head, &rows));

        self.print_first();
        let mut worst: Vec<(f64, &str)> = self
            .workloads
            .iter()
            .filter_map(|w| Some((w.ratio(self.own, Kind::Native)?, w.name.as_str())))
            .collect();
        worst.sort_by(|a, b| b.0.total_cmp(&a.0));
        worst.truncate(10);
        if !worst.is_empty() {
            let list: Vec<String> = worst
                .iter()
                .map(|&(value, name)| format!("{name} {}", ratio(Some(value))))
                .collect();
            println!("\nfarthest from native: {}", list.join(", "));
        }
        let slower: Vec<&str> = self
            .workloads
            .iter()
            .filter(|w| w.ratio(Kind::Tcg, self.own).is_some_and(|r| r < 1.0))
            .map(|w| w.name.as_str())
            .collect();
        if kinds.contains(&self.own) && kinds.contains(&Kind::Tcg) {
            match slower.as_slice() {
                [] => println!("slower than TCG: none"),
                names => println!("slower than TCG: {}", names.join(", ")),
            }
        }
        for (name, times) in &self.clocks {
            println!("{}", clock_line(name, times));
        }
        for workload in &self.workloads {
            for (kind, cell) in &workload.cells {
                if let Some(why) = &cell.failed {
                    println!("{kind}: {} failed: {why}", workload.name);
                } else if let Some(why) = &cell.missing {
                    println!("{kind}: no {}: {why}", workload.name);
                }
            }
        }
        for (kind, why) in &self.broken {
            println!("{}: not all ran: {why}", kind.name());
        }
    }

    /// The first run of each program in a machine: what is translated there is translated for the
    /// runs after it too.
    fn print_first(&self) {
        let mut rows = Vec::new();
        let mut columns = [Vec::new(), Vec::new(), Vec::new()];
        for workload in &self.workloads {
            let first = |kind: Kind| median(&workload.cells.get(kind.name())?.first);
            let (native, own, tcg) = (first(Kind::Native), first(self.own), first(Kind::Tcg));
            if native.or(own).or(tcg).is_none() {
                continue;
            }
            let of = |a: Option<f64>, b: Option<f64>| Some(a? / b?);
            let ratios = [of(own, native), of(tcg, native), of(tcg, own)];
            for (column, ratio) in columns.iter_mut().zip(ratios) {
                column.extend(ratio);
            }
            let times = [native, own, tcg].map(milliseconds);
            rows.push(
                [
                    vec![workload.name.clone()],
                    times.to_vec(),
                    ratios.map(ratio).to_vec(),
                ]
                .concat(),
            );
        }
        if rows.is_empty() {
            return;
        }
        let means = columns.map(|column| ratio(geometric_mean(&column)));
        let blank = vec![
            String::from("geometric mean"),
            "".into(),
            "".into(),
            "".into(),
        ];
        rows.push([blank, means.to_vec()].concat());
        let own = self.own.name();
        println!("\nThe first run in each machine (ms), its translation included");
        let head = [
            "program",
            "native",
            own,
            "tcg",
            "own/native",
            "tcg/native",
            "tcg/own",
        ];
        print!("{}", table::text(&head, &rows));
    }

    /// By class, and over several: AnyKVM to native, TCG to native, TCG to AnyKVM.
    fn summary(&self) -> Vec<(String, [Option<f64>; 3])> {
        let means = |wanted: &dyn Fn(&str) -> bool| {
            [
                (self.own, Kind::Native),
                (Kind::Tcg, Kind::Native),
                (Kind::Tcg, self.own),
            ]
            .map(|(a, b)| {
                let ratios: Vec<f64> = self
                    .workloads
                    .iter()
                    .filter(|w| wanted(&w.class))
                    .filter_map(|w| w.ratio(a, b))
                    .collect();
                geometric_mean(&ratios)
            })
        };
        let mut classes: Vec<&str> = Vec::new();
        for workload in &self.workloads {
            if !classes.contains(&workload.class.as_str()) {
                classes.push(&workload.class);
            }
        }
        let mut rows: Vec<(String, [Option<f64>; 3])> = classes
            .iter()
            .map(|&class| (class.to_owned(), means(&|c| c == class)))
            .collect();
        if !self.together.is_empty() {
            let wanted = |class: &str| self.together.contains(&class);
            rows.push((self.together.join("+"), means(&wanted)));
        }
        rows.push(("all".into(), means(&|_| true)));
        rows
    }

    /// Whether AnyKVM ran all, and computed what the host did. What QEMU cannot do is told only.
    fn is_good(&self) -> bool {
        let ours = |kind: &str| kind != Kind::Tcg.name();
        let failed = self
            .workloads
            .iter()
            .flat_map(|w| &w.cells)
            .any(|(kind, cell)| ours(kind) && cell.failed.is_some());
        let broken = self.broken.iter().any(|(kind, _)| ours(kind.name()));
        let clocks = self
            .clocks
            .iter()
            .all(|(kind, times)| !ours(kind) || is_right(times));
        !failed && !broken && clocks
    }

    fn json(&self) -> Value {
        let workloads: Vec<Value> = self
            .workloads
            .iter()
            .map(|workload| {
                let machines: serde_json::Map<String, Value> = workload
                    .cells
                    .iter()
                    .map(|(kind, cell)| {
                        let value = json!({
                            "ms": cell.times, "median_ms": median(&cell.times),
                            "least_ms": least(&cell.times), "first_ms": cell.first,
                            "checksum": cell.checksum,
                            "missing": cell.missing, "failed": cell.failed,
                        });
                        ((*kind).to_owned(), value)
                    })
                    .collect();
                json!({ "name": workload.name, "class": workload.class, "machines": machines })
            })
            .collect();
        let summary: Vec<Value> = self
            .summary()
            .into_iter()
            .map(|(name, [own, tcg, speed])| {
                json!({ "class": name, "own_to_native": own, "tcg_to_native": tcg, "tcg_to_own": speed })
            })
            .collect();
        let broken: Vec<String> = self
            .broken
            .iter()
            .map(|(kind, why)| format!("{}: {why}", kind.name()))
            .collect();
        json!({
            "own": self.own.name(), "workloads": workloads, "geometric_means": summary,
            "clocks_guest_host_s": self.clocks, "broken": broken,
        })
    }
}

impl Workload {
    fn median(&self, kind: Kind) -> Option<f64> {
        median(&self.cells.get(kind.name())?.times)
    }

    fn shown(&self, kind: Kind) -> String {
        match self.cells.get(kind.name()) {
            Some(cell) if cell.failed.is_some() => "FAILED".into(),
            Some(cell) if cell.missing.is_some() => "missing".into(),
            _ => milliseconds(self.median(kind)),
        }
    }

    /// How many times as long it takes on `kind`.
    fn ratio(&self, kind: Kind, other: Kind) -> Option<f64> {
        Some(self.median(kind)? / self.median(other)?)
    }
}

/// The guest's clock in a record, in seconds, and when the host saw it.
pub fn clock(record: &Record) -> Option<(f64, Instant)> {
    Some((record.value["monotonic_ns"].as_f64()? / 1e9, record.at))
}

fn total(times: &[(f64, f64)]) -> (f64, f64) {
    times
        .iter()
        .fold((0.0, 0.0), |sum, time| (sum.0 + time.0, sum.1 + time.1))
}

/// How fast the clock of the machine `name` went.
pub fn clock_line(name: &str, times: &[(f64, f64)]) -> String {
    let (guest, host) = total(times);
    format!(
        "clock of {name}: {guest:.2} s for {host:.2} s of the host ({:+.2} %){}",
        (guest / host - 1.0) * 1e2,
        if is_right(times) {
            ""
        } else {
            "  WRONG: its figures mean nothing"
        },
    )
}

/// Whether the guest's clock went as fast as the host's, but for the console's delay.
pub fn is_right(times: &[(f64, f64)]) -> bool {
    let (guest, host) = total(times);
    (guest - host).abs() <= CLOCK_ERROR * host + 0.05
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(checksum: &str, ns: u64) -> Value {
        json!({
            "record": "result", "name": "crc32", "class": "integer",
            "checksum": checksum, "ns": [ns, ns + 2, ns + 4],
        })
    }

    #[test]
    fn ratios_are_of_medians() {
        let mut suite = Suite::new(Kind::AnyKvm, &USER_CODE);
        suite.take(Kind::Native, &result("1", 98));
        suite.take(Kind::AnyKvm, &result("1", 198));
        suite.compare_results();
        assert_eq!(
            suite.workloads[0].ratio(Kind::AnyKvm, Kind::Native),
            Some(2.0)
        );
        assert!(suite.is_good());
    }

    #[test]
    fn a_wrong_result_does_not_score() {
        let mut suite = Suite::new(Kind::AnyKvm, &USER_CODE);
        suite.take(Kind::Native, &result("1", 100));
        suite.take(Kind::AnyKvm, &result("2", 10));
        suite.compare_results();
        assert_eq!(suite.workloads[0].ratio(Kind::AnyKvm, Kind::Native), None);
        assert!(!suite.is_good());
    }

    #[test]
    fn a_slow_clock_is_noticed() {
        let mut suite = Suite::new(Kind::AnyKvm, &USER_CODE);
        suite.clocks.insert("anykvm", vec![(10.0, 10.02)]);
        assert!(suite.is_good());
        suite.clocks.insert("anykvm", vec![(5.0, 10.0)]);
        assert!(!suite.is_good());
    }
}
