//! `bench smp`: how much more two CPUs compute than one, natively, in AnyKVM and in QEMU's TCG.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::machine::{Kind, Machine};
use crate::others::Others;
use crate::setup::Setup;
use crate::statistics::{geometric_mean, least, median};
use crate::table::{self, milliseconds, ratio};
use crate::user::{self, BOOT_LIMIT, LIMIT};
use crate::{Outcome, Result};

/// CPUs of each machine, and copies of each workload.
pub const CPUS: u32 = 2;
/// The classes of which copies share no data: "compute".
const COMPUTE: [&str; 2] = ["processes", "threads"];
/// What two CPUs are to do beside one, and what is aimed at.
const BAR: f64 = 1.8;
const GOAL: f64 = 1.95;
/// How many CPUs other processes may use, on average, while a workload runs: then it was disturbed.
const DISTURBED: f64 = 0.05;

/// One round of a workload; times of its repetitions, in milliseconds.
struct Round {
    /// One copy, the other CPU idle.
    alone: Vec<f64>,
    /// Two copies at once, until both are ready.
    together: Vec<f64>,
    /// How many CPUs other processes used meanwhile.
    others: f64,
}

/// What a machine did with a workload.
#[derive(Default)]
struct Cell {
    rounds: Vec<Round>,
    checksum: Option<String>,
    failed: Option<String>,
}

impl Cell {
    /// Whether no round had the machine to itself. If one had, only such rounds count.
    fn is_disturbed(&self) -> bool {
        !self.rounds.is_empty() && self.rounds.iter().all(|round| round.others > DISTURBED)
    }

    /// Times of the rounds that count.
    fn times(&self, times: fn(&Round) -> &Vec<f64>) -> Vec<f64> {
        let disturbed = self.is_disturbed();
        let counts = |round: &&Round| disturbed || round.others <= DISTURBED;
        let rounds = self.rounds.iter().filter(counts);
        rounds.flat_map(times).copied().collect()
    }

    fn alone(&self) -> Vec<f64> {
        self.times(|round| &round.alone)
    }

    fn together(&self) -> Vec<f64> {
        self.times(|round| &round.together)
    }

    /// How much more the machine does in the same time with two copies: repetition by repetition,
    /// as what disturbs the machine comes and goes.
    fn scale(&self) -> Option<f64> {
        let (alone, together) = (self.alone(), self.together());
        let scales: Vec<f64> = alone
            .iter()
            .zip(&together)
            .map(|(alone, together)| f64::from(CPUS) * alone / together)
            .collect();
        median(&scales)
    }

    /// The same from the least times, which were disturbed least.
    fn least_scale(&self) -> Option<f64> {
        Some(f64::from(CPUS) * least(&self.alone())? / least(&self.together())?)
    }
}

#[derive(Default)]
struct Workload {
    name: String,
    class: String,
    cells: BTreeMap<&'static str, Cell>,
}

impl Workload {
    fn scale(&self, kind: Kind) -> Option<f64> {
        self.cells.get(kind.name())?.scale()
    }

    fn alone(&self, kind: Kind) -> Option<f64> {
        median(&self.cells.get(kind.name())?.alone())
    }

    /// How it scales on `kind`, and what part that is of how it does natively.
    fn shown(&self, kind: Kind) -> [String; 2] {
        let Some(cell) = self.cells.get(kind.name()) else {
            return [ratio(None), ratio(None)];
        };
        if cell.failed.is_some() {
            return ["FAILED".into(), "-".into()];
        }
        let part = cell.scale().zip(self.scale(Kind::Native));
        let mark = if cell.is_disturbed() { "?" } else { "" };
        let part = part.map(|(a, b)| a / b);
        [mark.to_owned() + &ratio(cell.scale()), ratio(part)]
    }
}

#[derive(Default)]
struct Suite {
    workloads: Vec<Workload>,
    /// By machine: seconds of the guest's clock and of the host's, for each round.
    clocks: BTreeMap<&'static str, Vec<(f64, f64)>>,
    /// Machines that did not come to an end, and why.
    broken: Vec<(Kind, String)>,
}

/// Runs the workloads on each machine in turn.
///
/// # Errors
/// If nothing can be run, or a workload's name is not known.
pub fn run(setup: &Setup) -> Result<Outcome> {
    if std::thread::available_parallelism().map_or(1, usize::from) < CPUS as usize {
        println!("Two CPUs beside one: left out, as this machine has not {CPUS} CPUs");
        return Ok(Outcome {
            json: Value::Null,
            good: true,
        });
    }
    let arguments = user::arguments(setup, "smp", "list-smp")?;
    let initrd = setup.initrd("smp.cpio", &arguments)?;
    if setup.export(&initrd)? {
        return Ok(Outcome {
            json: Value::Null,
            good: true,
        });
    }
    let rounds = setup.rounds(3);
    let kinds = Kind::available(setup, &[Kind::Native, Kind::AnyKvm, Kind::Tcg]);
    let mut suite = Suite::default();
    for round in 1..=rounds {
        for &kind in &kinds {
            eprintln!("smp: round {round} of {rounds}, {}", kind.name());
            suite.run(setup, kind, &initrd, &arguments)?;
        }
    }
    // What never had the machine to itself has as many chances again.
    for again in 1..=rounds {
        for &kind in &kinds {
            let names = suite.disturbed(kind);
            if names.is_empty() || suite.broken.iter().any(|(broken, _)| *broken == kind) {
                continue;
            }
            let list = names.join(",");
            eprintln!("smp: again {again} of {rounds}, {}: {list}", kind.name());
            let arguments = format!("{arguments} --only {list}");
            let initrd = setup.initrd("smp-again.cpio", &arguments)?;
            suite.run(setup, kind, &initrd, &arguments)?;
        }
    }
    suite.compare_results();
    suite.print();
    Ok(Outcome {
        good: suite.is_good(),
        json: suite.json(),
    })
}

impl Suite {
    fn run(&mut self, setup: &Setup, kind: Kind, initrd: &Path, arguments: &str) -> Result<()> {
        let machine = Machine::start(kind.command(setup, initrd, arguments))?;
        if let Err(why) = self.follow(kind, machine) {
            eprintln!("smp: {} failed: {why}", kind.name());
            self.broken.push((kind, why));
        }
        Ok(())
    }

    /// Workloads that were disturbed on `kind` whenever they ran.
    fn disturbed(&self, kind: Kind) -> Vec<&str> {
        let disturbed = |w: &&Workload| w.cells.get(kind.name()).is_some_and(Cell::is_disturbed);
        let workloads = self.workloads.iter().filter(disturbed);
        workloads.map(|w| w.name.as_str()).collect()
    }

    fn follow(&mut self, kind: Kind, mut machine: Machine) -> Result<()> {
        let mut start: Option<(f64, Instant)> = None;
        let mut limit = BOOT_LIMIT;
        let mut others = Others::new(machine.pid());
        loop {
            let record = machine
                .record(limit)
                .map_err(|end| machine.describe(&end))?;
            limit = LIMIT;
            match record.kind() {
                "start" => {
                    start = user::clock(&record);
                    others.look();
                }
                "end" => {
                    if let Some(((guest, host), (end, at))) = start.zip(user::clock(&record)) {
                        let times = (end - guest, (at - host).as_secs_f64());
                        self.clocks.entry(kind.name()).or_default().push(times);
                    }
                    machine.ended_within(Duration::from_secs(5));
                    return Ok(());
                }
                "result" | "failed" => {
                    let others = others.look().unwrap_or(0.0);
                    self.take(kind, &record.value, others);
                }
                _ => {}
            }
        }
    }

    fn take(&mut self, kind: Kind, record: &Value, others: f64) {
        let text = |field: &str| record[field].as_str().map(str::to_owned);
        let times = |field: &str| {
            let times = record[field].as_array().into_iter().flatten();
            times
                .filter_map(Value::as_f64)
                .map(|ns| ns / 1e6)
                .collect::<Vec<f64>>()
        };
        let name = text("name").unwrap_or_default();
        let at = match self.workloads.iter().position(|w| w.name == name) {
            Some(at) => at,
            None => {
                self.workloads.push(Workload {
                    name,
                    class: text("class").unwrap_or_default(),
                    cells: BTreeMap::new(),
                });
                self.workloads.len() - 1
            }
        };
        let cell = self.workloads[at].cells.entry(kind.name()).or_default();
        cell.rounds.push(Round {
            alone: times("alone_ns"),
            together: times("together_ns"),
            others,
        });
        let checksum = text("checksum");
        if cell.checksum.is_some() && checksum.is_some() && cell.checksum != checksum {
            cell.failed = Some("two rounds computed different results".into());
        }
        cell.checksum = checksum.or(cell.checksum.take());
        cell.failed = text("why").or(cell.failed.take());
    }

    /// What differs from the first machine's result, the host's if it takes part, does not count.
    fn compare_results(&mut self) {
        for workload in &mut self.workloads {
            let expected = [Kind::Native, Kind::AnyKvm, Kind::Tcg]
                .iter()
                .find_map(|kind| workload.cells.get(kind.name())?.checksum.clone());
            for cell in workload.cells.values_mut() {
                if cell.checksum.is_some() && cell.checksum != expected {
                    cell.failed = Some("WRONG RESULT".into());
                }
                if cell.failed.is_some() {
                    cell.rounds.clear();
                }
            }
        }
    }

    fn print(&self) {
        println!(
            "What two CPUs compute in the time of one, medians; times native's; one copy's time (ms)"
        );
        let head = [
            "workload", "native", "anykvm", "x native", "tcg", "x native", "native", "anykvm",
            "tcg",
        ];
        let mut rows = Vec::new();
        let mut class = "";
        for workload in &self.workloads {
            if workload.class != class {
                class = &workload.class;
                rows.push(vec![format!("[{class}]")]);
            }
            let [native, _] = workload.shown(Kind::Native);
            let mut row = vec![workload.name.clone(), native];
            row.extend(workload.shown(Kind::AnyKvm));
            row.extend(workload.shown(Kind::Tcg));
            let alone = |kind| milliseconds(workload.alone(kind));
            row.extend([Kind::Native, Kind::AnyKvm, Kind::Tcg].map(alone));
            rows.push(row);
        }
        print!("{}", table::text(&head, &rows));
        println!("\nGeometric means");
        let mut rows = Vec::new();
        for (name, [native, own, tcg]) in self.summary() {
            let part = |scale: Option<f64>| ratio(scale.zip(native).map(|(a, b)| a / b));
            rows.push(vec![
                name,
                ratio(native),
                ratio(own),
                part(own),
                ratio(tcg),
                part(tcg),
            ]);
        }
        let head = ["class", "native", "anykvm", "x native", "tcg", "x native"];
        print!("{}", table::text(&head, &rows));
        println!(
            "bar: {BAR}x in classes {}, goal {GOAL}x",
            COMPUTE.join(", ")
        );
        for (name, times) in &self.clocks {
            println!("{}", user::clock_line(name, times));
        }
        for workload in &self.workloads {
            for (kind, cell) in &workload.cells {
                if let Some(why) = &cell.failed {
                    println!("{kind}: {} failed: {why}", workload.name);
                }
            }
        }
        for (kind, why) in &self.broken {
            println!("{}: not all ran: {why}", kind.name());
        }
    }

    /// By class, and of those that compute: how native, AnyKVM and TCG scale, all of the workloads
    /// that each machine did undisturbed.
    fn summary(&self) -> Vec<(String, [Option<f64>; 3])> {
        type Scale = fn(&Cell) -> Option<f64>;
        let means = |wanted: &dyn Fn(&str) -> bool, scale: Scale| {
            [Kind::Native, Kind::AnyKvm, Kind::Tcg].map(|kind| {
                let scales: Vec<f64> = self
                    .workloads
                    .iter()
                    .filter(|w| wanted(&w.class))
                    .filter_map(|w| w.cells.get(kind.name()))
                    .filter(|cell| !cell.is_disturbed())
                    .filter_map(scale)
                    .collect();
                geometric_mean(&scales)
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
            .map(|&class| (class.to_owned(), means(&|c| c == class, Cell::scale)))
            .collect();
        let compute = COMPUTE.join("+");
        let wanted = |class: &str| COMPUTE.contains(&class);
        rows.push((compute.clone(), means(&wanted, Cell::scale)));
        rows.push((
            format!("{compute}, least times"),
            means(&wanted, Cell::least_scale),
        ));
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
            .all(|(kind, times)| !ours(kind) || user::is_right(times));
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
                        let rounds: Vec<Value> = cell
                            .rounds
                            .iter()
                            .map(|round| {
                                json!({
                                    "alone_ms": round.alone, "together_ms": round.together,
                                    "cpus_others_used": round.others,
                                })
                            })
                            .collect();
                        let value = json!({
                            "rounds": rounds, "disturbed": cell.is_disturbed(),
                            "scale": cell.scale(), "least_scale": cell.least_scale(),
                            "checksum": cell.checksum,
                            "failed": cell.failed,
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
            .map(|(name, [native, own, tcg])| {
                json!({ "class": name, "native": native, "anykvm": own, "tcg": tcg })
            })
            .collect();
        let broken: Vec<String> = self
            .broken
            .iter()
            .map(|(kind, why)| format!("{}: {why}", kind.name()))
            .collect();
        json!({
            "cpus": CPUS, "workloads": workloads, "geometric_means": summary,
            "clocks_guest_host_s": self.clocks, "broken": broken,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(checksum: &str, alone: [u64; 3], together: [u64; 3]) -> Value {
        json!({
            "record": "result", "name": "sha256", "class": "processes", "checksum": checksum,
            "alone_ns": alone, "together_ns": together,
        })
    }

    #[test]
    fn repetitions_are_compared_one_by_one() {
        let mut suite = Suite::default();
        // All but the last are twice as fast with two; the machine became slower on the way.
        let record = result("1", [100, 200, 200], [100, 200, 400]);
        suite.take(Kind::Native, &record, 0.0);
        suite.take(Kind::AnyKvm, &result("1", [300; 3], [400; 3]), 0.0);
        suite.compare_results();
        let shown = suite.workloads[0].shown(Kind::AnyKvm);
        assert_eq!(suite.workloads[0].scale(Kind::Native), Some(2.0));
        assert_eq!(shown, ["1.50x", "0.75x"]);
        assert!(suite.is_good());
    }

    #[test]
    fn a_disturbed_round_counts_only_if_all_are() {
        let mut suite = Suite::default();
        suite.take(Kind::Native, &result("1", [100; 3], [200; 3]), 0.9);
        assert_eq!(suite.workloads[0].shown(Kind::Native)[0], "?1.00x");
        suite.take(Kind::Native, &result("1", [100; 3], [100; 3]), 0.01);
        assert_eq!(suite.workloads[0].shown(Kind::Native)[0], "2.00x");
    }

    #[test]
    fn a_wrong_result_does_not_score() {
        let mut suite = Suite::default();
        suite.take(Kind::Native, &result("1", [100; 3], [100; 3]), 0.0);
        suite.take(Kind::AnyKvm, &result("2", [100; 3], [100; 3]), 0.0);
        suite.compare_results();
        assert_eq!(suite.workloads[0].shown(Kind::AnyKvm), ["FAILED", "-"]);
        assert_eq!(suite.summary()[0].1, [Some(2.0), None, None]);
        assert!(!suite.is_good());
    }

    #[test]
    fn a_failure_in_one_round_counts() {
        let mut suite = Suite::default();
        let failed = json!({
            "record": "failed", "name": "sha256", "class": "processes", "why": "took too long",
        });
        suite.take(Kind::AnyKvm, &failed, 0.0);
        suite.take(Kind::AnyKvm, &result("1", [100; 3], [100; 3]), 0.0);
        suite.compare_results();
        assert_eq!(suite.workloads[0].scale(Kind::AnyKvm), None);
        assert!(!suite.is_good());
    }
}
