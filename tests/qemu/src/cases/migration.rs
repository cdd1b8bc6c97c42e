//! Live migration from one QEMU to another.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Case;
use crate::error::{Result, ensure, wrong};
use crate::vm::{Machine, Run, Vm};

const LIMIT: Duration = Duration::from_secs(120);

/// Writes memory and reads it again until /tmp/stop is there; says how often and whether it was
/// what it wrote.
const JOB: &str = "job() { round=0; bad=0; while [ ! -e /tmp/stop ]; do \
    seq $round $((round + 100000)) >/tmp/data.$1; a=$(sha256sum </tmp/data.$1); \
    b=$(seq $round $((round + 100000)) | sha256sum); [ \"$a\" = \"$b\" ] || bad=$((bad + 1)); \
    round=$((round + 1)); echo $round >/tmp/round.$1; done; echo $bad >/tmp/bad.$1; }";

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::of("migration/idle", |run| {
            migrate(run, Machine::new("q35"), 1, false, "unix")
        }),
        Case::of("migration/idle/exec", |run| {
            migrate(run, Machine::new("pc"), 1, false, "exec")
        }),
        Case::of("migration/microvm", |run| {
            migrate(run, Machine::new("microvm"), 2, false, "unix")
        }),
    ];
    for machine in ["q35", "pc"] {
        cases.push(Case::new(format!("migration/load/{machine}"), move |run| {
            migrate(run, Machine::new(machine), 2, true, "unix").map(|()| None)
        }));
    }
    cases.push(
        Case::of("migration/load/dirty-ring", |run| {
            let mut machine = Machine::new("q35");
            machine.accel = ",dirty-ring-size=4096".into();
            migrate(run, machine, 2, true, "unix")
        })
        .kvm_only(),
    );
    cases
}

fn migrate(run: &Run, machine: Machine, cpus: u32, load: bool, transport: &str) -> Result {
    let machine = machine.smp(cpus.to_string());
    let mut source = Vm::boot(run, &machine)?;
    let place = tempfile::tempdir()?;
    let path: PathBuf = place.path().join("migration");
    let (from, to) = match transport {
        "exec" => (
            format!("exec:cat >{}", path.display()),
            format!("exec:cat {}", path.display()),
        ),
        _ => {
            let address = format!("unix:{}", path.display());
            (address.clone(), address)
        }
    };
    source.command(
        "dd if=/dev/urandom of=/tmp/noise bs=1M count=48 2>/dev/null; sha256sum /tmp/noise >/tmp/sum",
    )?;
    if load {
        source.command(JOB)?;
        for cpu in 0..cpus {
            source.session.type_in(&format!("job {cpu} &\n"))?;
        }
        source.command("until [ -e /tmp/round.0 ]; do sleep 0.1; done")?;
    }
    let mut target = if transport == "exec" {
        send(&mut source, &from)?;
        Vm::start(run, &machine.clone().with("-incoming").argument(&to))?
    } else {
        let target = Vm::start(run, &machine.clone().with("-incoming").argument(&to))?;
        send(&mut source, &from)?;
        target
    };
    target.qmp.until("query-status", LIMIT, |status| {
        Ok(status["status"] == "running")
    })?;
    source.qmp.execute("quit", json!({}))?;
    source.ends()?;
    if load {
        let before: u32 = target.command("cat /tmp/round.0")?.parse().unwrap_or(0);
        let begin = Instant::now();
        loop {
            let now: u32 = target.command("cat /tmp/round.0")?.parse().unwrap_or(0);
            if now > before + 2 {
                break;
            }
            if begin.elapsed() > LIMIT {
                return wrong("the jobs do not go on after migration");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let bad = target.command(&format!(
            "touch /tmp/stop 2>/dev/null || : >/tmp/stop; for cpu in $(seq 0 {}); do \
             until [ -e /tmp/bad.$cpu ]; do sleep 0.1; done; cat /tmp/bad.$cpu; done",
            cpus - 1
        ))?;
        let good = bad.lines().filter(|line| *line == "0").count();
        ensure(good == cpus as usize, || {
            format!("the jobs read other data than they wrote: {bad}")
        })?;
    }
    target.command("sha256sum -c /tmp/sum")?;
    target.works(cpus)?;
    target.quit()
}

fn send(source: &mut Vm, to: &str) -> Result {
    source.qmp.execute(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 4_000_000_000_u64, "downtime-limit": 3000 }),
    )?;
    source.qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": [{ "capability": "auto-converge", "state": true }] }),
    )?;
    source.qmp.execute("migrate", json!({ "uri": to }))?;
    source
        .qmp
        .until(
            "query-migrate",
            LIMIT,
            |state: &Value| match state["status"].as_str() {
                Some("failed" | "cancelled") => wrong(format!("the migration fails: {state}")),
                status => Ok(status == Some("completed")),
            },
        )
        .map(|_| ())
}
