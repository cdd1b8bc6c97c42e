//! What the machine says about itself, read from `/proc`, `/sys` and `/dev/kvm`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use crate::error::reason;

/// What this machine offers for virtual machines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// Processor.
    pub cpu: Cpu,
    /// The device `/dev/kvm`.
    pub dev_kvm: DevKvm,
    /// Memory and limits.
    pub memory: Memory,
}

/// The processor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// Model name as the processor gives it.
    pub model: String,
    /// CPUs that this process may use.
    pub count: usize,
    /// `vmx` (Intel VT-x) or `svm` (AMD-V), if the processor offers one here.
    pub virtualization: Option<Virtualization>,
    /// Whether it has nested page tables: EPT or NPT. `None` if the kernel does not say.
    pub nested_paging: Option<bool>,
    /// This machine is a virtual machine itself.
    pub is_guest: bool,
    /// FSGSBASE, and the kernel lets programs use it.
    pub fsgsbase: bool,
}

/// Hardware virtualization by its flag in `/proc/cpuinfo`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Virtualization {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

/// `/dev/kvm`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DevKvm {
    /// It exists.
    pub exists: bool,
    /// This user can open it and it answers as KVM does.
    pub usable: bool,
    /// Why it is not usable.
    pub problem: Option<String>,
    /// Who serves it.
    pub served_by: Option<ServedBy>,
}

/// Who serves a `/dev/kvm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ServedBy {
    /// VT-x or AMD-V of this processor.
    Hardware,
    /// Software, such as PVM: it runs without VT-x and AMD-V, and emulates the guest's kernel.
    Software,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Of the machine.
    pub total: u64,
    /// That programs can still take.
    pub available: u64,
    /// Swap space.
    pub swap: u64,
    /// The least of the control groups' limits.
    pub cgroup_limit: Option<u64>,
    /// Limit of a process's address space (`ulimit -v`).
    pub address_space_limit: Option<u64>,
    /// `vm.max_map_count`: how many pieces of memory a process may map.
    pub max_map_count: Option<u64>,
}

impl Memory {
    /// The most that a guest's memory can take, and what sets that limit.
    pub fn limit(&self) -> (u64, &'static str) {
        let machine = (
            self.total.saturating_add(self.swap),
            "this machine has with swap",
        );
        let cgroup = self.cgroup_limit.map(|l| (l, "this container may use"));
        let process = self
            .address_space_limit
            .map(|l| (l, "a process may have here ('ulimit -v')"));
        [cgroup, process]
            .into_iter()
            .flatten()
            .fold(
                machine,
                |least, other| if other.0 < least.0 { other } else { least },
            )
    }
}

impl Facts {
    /// Looks at this machine.
    pub fn gather() -> Self {
        let mut cpu = Cpu::from_cpuinfo(&read("/proc/cpuinfo"));
        cpu.count = std::thread::available_parallelism().map_or(1, usize::from);
        cpu.fsgsbase = cpu.fsgsbase && kernel_allows_fsgsbase();
        let dev_kvm = DevKvm::gather(&cpu);
        Self {
            dev_kvm,
            memory: Memory::gather(),
            cpu,
        }
    }
}

impl Cpu {
    fn from_cpuinfo(text: &str) -> Self {
        let field = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim() == name).then(|| value.trim())
            })
        };
        let words = |name| -> BTreeSet<&str> {
            field(name).unwrap_or_default().split_whitespace().collect()
        };
        let flags = words("flags");
        let vmx_flags = words("vmx flags");
        let (virtualization, nested_paging) = if flags.contains("vmx") {
            // Kernels before 5.6 have "ept" among the flags.
            let ept = vmx_flags.contains("ept") || flags.contains("ept");
            let told = !vmx_flags.is_empty() || ept;
            (Some(Virtualization::Vmx), told.then_some(ept))
        } else if flags.contains("svm") {
            (Some(Virtualization::Svm), Some(flags.contains("npt")))
        } else {
            (None, None)
        };
        Self {
            model: field("model name").unwrap_or("unknown").to_owned(),
            count: 1,
            virtualization,
            nested_paging,
            is_guest: flags.contains("hypervisor"),
            fsgsbase: flags.contains("fsgsbase"),
        }
    }
}

/// Whether the kernel has enabled FSGSBASE for programs: bit 1 of `AT_HWCAP2` (Linux, "Using FS
/// and GS segments in user space applications").
fn kernel_allows_fsgsbase() -> bool {
    const AT_HWCAP2: u64 = 26;
    let vector = fs::read("/proc/self/auxv").unwrap_or_default();
    vector.as_chunks::<16>().0.iter().any(|entry| {
        let word = |at: usize| {
            entry[at..at + 8]
                .iter()
                .rev()
                .fold(0, |value, &byte| value << 8 | u64::from(byte))
        };
        word(0) == AT_HWCAP2 && word(8) & 2 != 0
    })
}

impl DevKvm {
    fn gather(cpu: &Cpu) -> Self {
        let path = Path::new("/dev/kvm");
        if !path.exists() {
            return Self::default();
        }
        let problem = match fs::File::options().read(true).write(true).open(path) {
            Ok(_) => None,
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Some(
                "you may not open it; ask the administrator to add you to the group 'kvm'"
                    .to_owned(),
            ),
            Err(e) => Some(reason(&e)),
        };
        let modules = ["kvm_pvm", "kvm_intel", "kvm_amd"]
            .map(|name| Path::new("/sys/module").join(name).is_dir());
        Self {
            exists: true,
            usable: problem.is_none(),
            problem,
            served_by: Some(served_by(cpu, modules)),
        }
    }
}

/// Hardware virtualization cannot be used behind the processor's back: without its flag, whatever
/// serves the device is software.
fn served_by(cpu: &Cpu, [pvm, intel, amd]: [bool; 3]) -> ServedBy {
    let software = cpu.virtualization.is_none() || (pvm && !intel && !amd);
    if software {
        ServedBy::Software
    } else {
        ServedBy::Hardware
    }
}

impl Memory {
    fn gather() -> Self {
        use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
        let text = read("/proc/meminfo");
        let limit = getrlimit(Resource::RLIMIT_AS).map_or(RLIM_INFINITY, |(soft, _)| soft);
        Self {
            cgroup_limit: cgroup_limit(),
            address_space_limit: (limit != RLIM_INFINITY).then_some(limit),
            max_map_count: read("/proc/sys/vm/max_map_count").trim().parse().ok(),
            ..Self::from_meminfo(&text)
        }
    }

    fn from_meminfo(text: &str) -> Self {
        let field = |name: &str| -> u64 {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
                .map_or(0, |kib| kib.saturating_mul(1024))
        };
        Self {
            total: field("MemTotal"),
            available: field("MemAvailable"),
            swap: field("SwapTotal"),
            ..Self::default()
        }
    }
}

/// The least memory limit from this process's control group up to the root.
fn cgroup_limit() -> Option<u64> {
    let groups = read("/proc/self/cgroup");
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    root.join(group)
        .ancestors()
        .take_while(|path| path.starts_with(root))
        .filter_map(|path| fs::read_to_string(path.join("memory.max")).ok())
        .filter_map(|text| text.trim().parse().ok())
        .min()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors() {
        let intel = "model name\t: Intel(R) Core(TM)\nflags\t\t: fpu vmx fsgsbase\n\
                     vmx flags\t: vnmi ept vpid\n";
        let cpu = Cpu::from_cpuinfo(intel);
        assert_eq!(cpu.virtualization, Some(Virtualization::Vmx));
        assert_eq!(cpu.nested_paging, Some(true));
        assert!(cpu.fsgsbase && !cpu.is_guest);
        let cpu = Cpu::from_cpuinfo("flags\t\t: fpu vmx\n");
        assert_eq!(cpu.nested_paging, None, "the kernel does not say");
        let cpu = Cpu::from_cpuinfo("flags : fpu svm hypervisor\n");
        assert_eq!(cpu.virtualization, Some(Virtualization::Svm));
        assert_eq!(cpu.nested_paging, Some(false));
        assert!(cpu.is_guest);
        let cpu = Cpu::from_cpuinfo("");
        assert_eq!((cpu.model.as_str(), cpu.virtualization), ("unknown", None));
    }

    #[test]
    fn no_flag_means_software() {
        let mut cpu = Cpu::default();
        assert_eq!(served_by(&cpu, [false, false, false]), ServedBy::Software);
        assert_eq!(served_by(&cpu, [false, true, true]), ServedBy::Software);
        cpu.virtualization = Some(Virtualization::Svm);
        assert_eq!(served_by(&cpu, [false, false, true]), ServedBy::Hardware);
        assert_eq!(
            served_by(&cpu, [false, false, false]),
            ServedBy::Hardware,
            "built in"
        );
        assert_eq!(served_by(&cpu, [true, false, false]), ServedBy::Software);
    }

    #[test]
    fn memory() {
        let text = "MemTotal:       2048 kB\nMemAvailable:   1024 kB\nSwapTotal: 1 kB\n";
        let mut memory = Memory::from_meminfo(text);
        assert_eq!(memory.limit().0, 2049 * 1024);
        memory.cgroup_limit = Some(4096);
        assert_eq!(memory.limit(), (4096, "this container may use"));
        memory.address_space_limit = Some(1 << 40);
        assert_eq!(memory.limit().0, 4096);
        assert_eq!(Memory::from_meminfo("MemTotal: x kB\n").total, 0);
    }
}
