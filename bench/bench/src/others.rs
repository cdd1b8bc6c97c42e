//! What other processes of this machine did meanwhile: a figure that needs several CPUs is worth
//! nothing if they were not free.

use std::time::Instant;

/// Ticks of the times in `/proc`, per second; the same on every x86 machine (proc(5), USER_HZ).
const TICKS: f64 = 100.0;

/// Looks at the machine and at one process and its children, in turn.
pub struct Others {
    pid: u32,
    at: Instant,
    /// Seconds of CPU time: of the machine, and of the process.
    used: Option<(f64, f64)>,
}

impl Others {
    /// From now on.
    pub fn new(pid: u32) -> Self {
        Self {
            pid,
            at: Instant::now(),
            used: used(pid),
        }
    }

    /// How many CPUs others used on average since the last look; `None` if the system does not say.
    pub fn look(&mut self) -> Option<f64> {
        let before = std::mem::replace(self, Self::new(self.pid));
        let time = (self.at - before.at).as_secs_f64();
        let ((all, own), (all_before, own_before)) = self.used.zip(before.used)?;
        Some((((all - all_before) - (own - own_before)) / time.max(1e-3)).max(0.0))
    }
}

fn used(pid: u32) -> Option<(f64, f64)> {
    let machine = std::fs::read_to_string("/proc/stat").ok()?;
    let process = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some((machine_seconds(&machine)?, process_seconds(&process)?))
}

/// All but the time when CPUs were idle, that which the hypervisor took included.
fn machine_seconds(stat: &str) -> Option<f64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<f64> = line.split_whitespace().flat_map(str::parse).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user's.
    let busy = [0, 1, 2, 5, 6, 7].map(|field| fields.get(field).copied());
    Some(busy.into_iter().sum::<Option<f64>>()? / TICKS)
}

/// User and system time, its own and that of the children that it waited for.
fn process_seconds(stat: &str) -> Option<f64> {
    // The name, which may hold anything, ends with the last parenthesis; the state is field 3.
    let fields = stat.rsplit_once(')')?.1.split_whitespace();
    let times: Vec<f64> = fields.skip(11).take(4).flat_map(str::parse).collect();
    (times.len() == 4).then(|| times.iter().sum::<f64>() / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_the_machine_and_of_a_process() {
        let stat = "cpu  100 20 3 9999 888 0 5 2 77 0\ncpu0 1 2 3\n";
        assert_eq!(machine_seconds(stat), Some(1.3));
        let stat = "42 (a ) name) S 1 42 42 0 -1 4194560 9 9 9 9 150 50 20 30 20 0 1 0";
        assert_eq!(process_seconds(stat), Some(2.5));
        assert_eq!(process_seconds("42 (a) S 1"), None);
    }
}
