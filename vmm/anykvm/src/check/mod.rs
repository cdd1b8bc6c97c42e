//! `anykvm check`: what this machine offers, and which engine that means.

pub mod facts;

use std::fmt::Write as _;

use serde::Serialize;

use crate::cli;
use crate::error::Error;
use facts::{Facts, ServedBy, Virtualization};

/// What executes a guest's instructions, decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// AnyKVM's translator.
    Jit,
    /// `/dev/kvm`.
    Kvm,
}

/// An engine and why it was chosen, as a sentence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// The engine.
    pub engine: Engine,
    /// Why.
    pub reason: String,
}

/// Decides which engine runs a machine.
///
/// A `/dev/kvm` that software serves is never chosen by itself: it emulates the guest's kernel far
/// more slowly than AnyKVM's translator runs it.
///
/// # Errors
/// If the user asks for `/dev/kvm` and it cannot be used.
pub fn choose(wanted: cli::Engine, facts: &Facts) -> Result<Choice, Error> {
    let kvm = &facts.dev_kvm;
    let unusable = || {
        let problem = kvm.problem.as_deref().unwrap_or("this machine has none");
        Error::new(format!("cannot use /dev/kvm: {problem}"))
            .hint("leave '--engine kvm' out to use AnyKVM's own engine")
    };
    let (engine, reason) = match (wanted, kvm.served_by) {
        (cli::Engine::Jit, _) => (Engine::Jit, "you asked for it".to_owned()),
        (cli::Engine::Kvm, _) if !kvm.usable => return Err(unusable()),
        (cli::Engine::Kvm, _) => (Engine::Kvm, "you asked for it".to_owned()),
        (cli::Engine::Auto, Some(ServedBy::Hardware)) if kvm.usable => (
            Engine::Kvm,
            "this machine has hardware virtualization and you may use it: guests run at nearly full speed"
                .to_owned(),
        ),
        (cli::Engine::Auto, served_by) => (Engine::Jit, why_jit(facts, served_by)),
    };
    Ok(Choice { engine, reason })
}

fn why_jit(facts: &Facts, served_by: Option<ServedBy>) -> String {
    let why = match (served_by, facts.cpu.virtualization) {
        (Some(ServedBy::Hardware), _) => "you may not open /dev/kvm",
        (Some(ServedBy::Software), _) => {
            "the /dev/kvm here is made in software and emulates the guest's kernel very slowly"
        }
        (None, Some(_)) => {
            "the processor has hardware virtualization, but there is no /dev/kvm to use it with"
        }
        (None, None) => "this machine has no hardware virtualization",
    };
    format!(
        "{why}; AnyKVM's own engine translates the guest's code and needs nothing from the machine"
    )
}

/// All that `anykvm check` finds out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether virtual machines can be run here.
    pub can_run: bool,
    /// What stands in the way, as sentences.
    pub problems: Vec<String>,
    /// Which engine `anykvm run` uses.
    pub engine: Choice,
    /// What the machine offers.
    #[serde(flatten)]
    pub facts: Facts,
}

/// A guest of the default size with AnyKVM around it.
const LEAST_MEMORY: u64 = 256 << 20;
/// The translator and a guest's memory take few mappings; fewer than this is not enough even so.
const LEAST_MAP_COUNT: u64 = 1024;

impl Report {
    /// Judges the facts.
    pub fn new(facts: Facts) -> Self {
        let mut problems = Vec::new();
        let (limit, of_what) = facts.memory.limit();
        if limit < LEAST_MEMORY {
            problems.push(format!(
                "{} of memory is all that {of_what}; a small guest needs {}",
                size(limit),
                size(LEAST_MEMORY)
            ));
        }
        if facts
            .memory
            .max_map_count
            .is_some_and(|count| count < LEAST_MAP_COUNT)
        {
            problems.push(format!(
                "vm.max_map_count is below {LEAST_MAP_COUNT}; 'sysctl vm.max_map_count=65530' as root sets the usual value"
            ));
        }
        // Nothing is asked for, so that there is always an engine.
        let engine = choose(cli::Engine::Auto, &facts).unwrap_or_else(|e| Choice {
            engine: Engine::Jit,
            reason: e.to_string(),
        });
        Self {
            can_run: problems.is_empty(),
            problems,
            engine,
            facts,
        }
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let Facts {
            cpu,
            dev_kvm,
            memory,
        } = &self.facts;
        let mut text = String::new();
        let mut line = |what: &str, finding: &str| {
            let _ = writeln!(text, "{what:<24} {finding}");
        };
        let guest = if cpu.is_guest {
            "; this machine is a virtual machine itself"
        } else {
            ""
        };
        line(
            "Processor",
            &format!("{}, {} CPUs{guest}", cpu.model, cpu.count),
        );
        let not_shown = if cpu.is_guest {
            "no: whoever runs this virtual machine does not pass it on"
        } else {
            "no: the processor lacks it, or it is turned off in the firmware's setup"
        };
        let (virtualization, tables) = match cpu.virtualization {
            Some(Virtualization::Vmx) => ("yes: Intel VT-x (vmx)", "EPT"),
            Some(Virtualization::Svm) => ("yes: AMD-V (svm)", "NPT"),
            None => (not_shown, ""),
        };
        line("Hardware virtualization", virtualization);
        if cpu.virtualization.is_some() {
            let nested = match cpu.nested_paging {
                Some(true) => format!("yes: {tables}"),
                Some(false) => format!("no {tables}: hardware virtualization is slow"),
                None => "the kernel does not say".to_owned(),
            };
            line("Nested page tables", &nested);
        }
        let served = match dev_kvm.served_by {
            Some(ServedBy::Hardware) => "served by the hardware",
            Some(ServedBy::Software) => {
                "served by software (such as PVM), since the processor shows no vmx or svm: slow for a guest's kernel"
            }
            None => "",
        };
        let kvm = match (dev_kvm.exists, &dev_kvm.problem) {
            (false, _) => "not there (AnyKVM does not need it)".to_owned(),
            (true, None) => format!("there, and you may use it; {served}"),
            (true, Some(problem)) => format!("there, but {problem}; {served}"),
        };
        line("/dev/kvm", &kvm);
        let fsgsbase = if cpu.fsgsbase {
            "yes: the fast way to reach a virtual CPU's state"
        } else {
            "no: AnyKVM's own engine takes a slower way"
        };
        line("FSGSBASE", fsgsbase);
        let (limit, of_what) = memory.limit();
        line(
            "Memory",
            &format!(
                "{} available; {} is what {of_what}",
                size(memory.available),
                size(limit)
            ),
        );
        if let Some(count) = memory.max_map_count {
            line("vm.max_map_count", &count.to_string());
        }
        let engine = match self.engine.engine {
            Engine::Jit => "jit",
            Engine::Kvm => "kvm",
        };
        line("Engine", &format!("{engine}: {}", self.engine.reason));
        text.push('\n');
        if self.can_run {
            text.push_str("This machine can run virtual machines: try 'anykvm run'.\n");
        } else {
            text.push_str("This machine cannot run virtual machines:\n");
            for problem in &self.problems {
                let _ = writeln!(text, "- {problem}");
            }
        }
        text
    }
}

/// A size for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use facts::{Cpu, DevKvm, Memory};

    fn machine(virtualization: Option<Virtualization>, kvm: Option<(ServedBy, bool)>) -> Facts {
        Facts {
            cpu: Cpu {
                virtualization,
                ..Cpu::default()
            },
            dev_kvm: DevKvm {
                exists: kvm.is_some(),
                usable: kvm.is_some_and(|(_, usable)| usable),
                problem: kvm.filter(|(_, usable)| !usable).map(|_| "no".into()),
                served_by: kvm.map(|(served_by, _)| served_by),
            },
            memory: Memory {
                total: 8 << 30,
                max_map_count: Some(65530),
                ..Memory::default()
            },
        }
    }

    #[test]
    fn the_engine_by_machine_and_wish() {
        use Virtualization::Svm;
        let hardware = machine(Some(Svm), Some((ServedBy::Hardware, true)));
        let locked = machine(Some(Svm), Some((ServedBy::Hardware, false)));
        let pvm = machine(None, Some((ServedBy::Software, true)));
        let none = machine(None, None);
        for (wanted, facts, engine) in [
            (cli::Engine::Auto, &hardware, Some(Engine::Kvm)),
            (cli::Engine::Auto, &locked, Some(Engine::Jit)),
            (cli::Engine::Auto, &pvm, Some(Engine::Jit)),
            (cli::Engine::Auto, &none, Some(Engine::Jit)),
            (cli::Engine::Jit, &hardware, Some(Engine::Jit)),
            (cli::Engine::Kvm, &pvm, Some(Engine::Kvm)),
            (cli::Engine::Kvm, &locked, None),
            (cli::Engine::Kvm, &none, None),
        ] {
            let choice = choose(wanted, facts).map(|c| c.engine).ok();
            assert_eq!(choice, engine, "{wanted:?} {facts:?}");
        }
    }

    #[test]
    fn a_machine_without_anything_can_run() {
        let report = Report::new(machine(None, None));
        assert!(report.can_run);
        assert!(report.text().contains("Engine                   jit"));
    }

    #[test]
    fn too_little_is_told() {
        let mut facts = machine(None, None);
        facts.memory.cgroup_limit = Some(64 << 20);
        facts.memory.max_map_count = Some(100);
        let report = Report::new(facts);
        assert!(!report.can_run);
        assert_eq!(report.problems.len(), 2);
        assert!(report.text().contains("cannot run"));
    }
}
