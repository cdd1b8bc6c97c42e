//! What the figures depend on: host, programs, kernel.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::setup::{COMMAND_LINE, Setup};

/// The facts as JSON.
pub fn gather(setup: &Setup) -> Value {
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, name)| name);
    let load = read("/proc/loadavg");
    json!({
        "cpu": cpu,
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "host_kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_before": load.split(' ').next(),
        "guest_kernel": kernel_version(&setup.kernel),
        "command_line": COMMAND_LINE,
        "guest_memory_mib": setup.options.memory,
        "anykvm": setup.anykvm.as_deref().and_then(version),
        "engine": setup.options.engine,
        "qemu": setup.qemu.as_deref().and_then(version),
        "quick": setup.options.quick,
    })
}

/// The facts for a reader.
pub fn text(facts: &Value) -> String {
    let word = |name: &str| match &facts[name] {
        Value::String(text) => text.clone(),
        Value::Null => "not measured".into(),
        other => other.to_string(),
    };
    let setup_memory = &facts["guest_memory_mib"];
    let mut text = format!(
        "host:   {}, {} CPUs, Linux {}, load {}\nguest:  Linux {}, {}, 1 CPU (smp: 2), \"{}\"\nanykvm: {} (engine {})\ntcg:    {}",
        word("cpu"),
        word("cpus"),
        word("host_kernel"),
        word("load_before"),
        word("guest_kernel"),
        match setup_memory {
            Value::Null => "512 MiB (programs: 1024)".to_owned(),
            memory => format!("{memory} MiB"),
        },
        word("command_line"),
        word("anykvm"),
        word("engine"),
        word("qemu"),
    );
    let load: f64 = word("load_before").parse().unwrap_or(0.0);
    if load > 0.5 {
        text.push_str("\nnote:   this machine is busy; the figures will be noisy");
    }
    text
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The first line of `program --version`.
fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().next()?.to_owned())
}

/// The version in a bzImage's header (Linux/x86 boot protocol, field `kernel_version`).
fn kernel_version(kernel: &Path) -> Option<String> {
    let image = std::fs::read(kernel).ok()?;
    let field = image.get(0x20e..0x210)?;
    let at = usize::from(u16::from_le_bytes([field[0], field[1]])) + 0x200;
    let text: Vec<u8> = image
        .get(at..)?
        .iter()
        .copied()
        .take(100)
        .take_while(|byte| byte.is_ascii_graphic())
        .collect();
    String::from_utf8(text).ok().filter(|text| !text.is_empty())
}
