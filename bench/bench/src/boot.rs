//! `bench boot`: time from the start of the process to the first line of `/init`.

use std::time::Duration;

use serde_json::json;

use crate::machine::{Kind, Machine};
use crate::setup::Setup;
use crate::statistics::{least, median};
use crate::table::{self, milliseconds, ratio};
use crate::{Outcome, Result};

const LIMIT: Duration = Duration::from_secs(90);
/// How long a guest that switches itself off may take.
const POWER_OFF: Duration = Duration::from_secs(10);

/// What one machine did, in milliseconds.
#[derive(Default)]
struct Figures {
    wall: Vec<f64>,
    cpu: Vec<f64>,
    end: Vec<f64>,
    failures: Vec<String>,
}

/// Boots each machine in turn; others are compared with the first.
///
/// # Errors
/// If nothing can be measured.
pub fn run(setup: &Setup, machines: &[Kind]) -> Result<Outcome> {
    let rounds = setup.rounds(5);
    let kinds = Kind::available(setup, machines);
    let mut all: Vec<(Kind, Figures)> = kinds.iter().map(|&k| (k, Figures::default())).collect();
    let initrd = setup.initrd("boot.cpio", "boot")?;
    for round in 1..=rounds {
        for (kind, figures) in &mut all {
            eprintln!("boot: round {round} of {rounds}, {}", kind.name());
            if let Err(why) = once(setup, *kind, &initrd, figures) {
                eprintln!("boot: {} failed: {why}", kind.name());
                figures.failures.push(why);
            }
        }
    }
    let own = all
        .iter()
        .find(|(kind, _)| *kind == machines[0])
        .and_then(|(_, figures)| median(&figures.wall));
    println!("Power-on to /init, median of {rounds} (ms)");
    let mut rows = Vec::new();
    let mut results = serde_json::Map::new();
    for (kind, figures) in &all {
        let wall = median(&figures.wall);
        let speed = wall.zip(own).map(|(theirs, own)| theirs / own);
        rows.push(vec![
            kind.name().to_owned(),
            milliseconds(wall),
            milliseconds(least(&figures.wall)),
            milliseconds(median(&figures.cpu)),
            milliseconds(median(&figures.end)),
            ratio(speed),
        ]);
        results.insert(
            kind.name().into(),
            json!({
                "wall_ms": figures.wall, "cpu_ms": figures.cpu, "power_off_ms": figures.end,
                "median_wall_ms": wall, "times_first": speed, "failures": figures.failures,
            }),
        );
    }
    let head = [
        "machine",
        "to /init",
        "least",
        "CPU time",
        "powered off",
        "times the first",
    ];
    print!("{}", table::text(&head, &rows));
    for (kind, figures) in &all {
        if let Some(why) = figures.failures.last() {
            let times = figures.failures.len();
            println!(
                "{} failed in {times} of {rounds} rounds: {why}",
                kind.name()
            );
        }
    }
    Ok(Outcome {
        good: all
            .iter()
            .all(|(kind, figures)| kind.is_tcg() || figures.failures.is_empty()),
        json: results.into(),
    })
}

fn once(setup: &Setup, kind: Kind, initrd: &std::path::Path, figures: &mut Figures) -> Result<()> {
    let mut machine = Machine::start(kind.command(setup, initrd, "boot"))?;
    let init = machine.wait_for("init", LIMIT)?;
    let cpu = machine.cpu_time();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    figures.wall.push(ms(init.at - machine.start));
    figures.cpu.extend(cpu.map(ms));
    // Not every machine has a switch that the guest finds: that is no failure of the boot.
    if machine.ended_within(POWER_OFF).is_some() {
        figures.end.push(ms(machine.start.elapsed()));
    }
    Ok(())
}
