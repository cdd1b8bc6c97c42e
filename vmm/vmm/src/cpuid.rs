//! CPUID per vCPU: what the engine supports, plus the topology that this machine has.
//!
//! The machine is one package with one thread per core; APIC ids count from 0. See "CPUID -
//! CPU Identification" in the SDM and "CPUID" in the APM, volume 3.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::hypervisor::{Cap, Hypervisor, Result};

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;

/// The CPUID that all vCPUs share.
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    cpus: u32,
    tsc_deadline: bool,
}

impl Template {
    /// Asks `hypervisor` what it supports, for a machine with `cpus` vCPUs.
    ///
    /// # Errors
    /// What the engine answers.
    pub fn new(hypervisor: &Hypervisor, cpus: u32) -> Result<Self> {
        Ok(Self {
            entries: hypervisor.supported_cpuid()?.as_slice().to_vec(),
            cpus,
            tsc_deadline: hypervisor.check_extension(Cap::TscDeadlineTimer) > 0,
        })
    }

    /// The CPUID of the vCPU with `apic_id`, or `None` if the engine offers more leaves than
    /// KVM takes.
    #[must_use]
    pub fn for_vcpu(&self, apic_id: u32) -> Option<CpuId> {
        CpuId::from_entries(&self.entries_for(apic_id)).ok()
    }

    fn entries_for(&self, apic_id: u32) -> Vec<kvm_cpuid_entry2> {
        // Bits of the APIC id that number the cores of the package.
        let core_bits = self.cpus.next_power_of_two().trailing_zeros();
        let logical = (1u32 << core_bits).min(0xff);
        let others = self.cpus - 1;
        let max_leaf = self
            .entries
            .iter()
            .find(|e| e.function == 0)
            .map_or(0, |e| e.eax);
        let mut entries: Vec<_> = self
            .entries
            .iter()
            .filter(|e| !matches!(e.function, 0xb | 0x1f))
            .copied()
            .collect();
        for e in &mut entries {
            match e.function {
                1 => {
                    e.ebx = (e.ebx & 0xffff) | logical << 16 | (apic_id & 0xff) << 24;
                    e.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
                    if self.tsc_deadline {
                        e.ecx |= LEAF1_ECX_TSC_DEADLINE;
                    }
                    e.edx &= !LEAF1_EDX_HTT;
                    if self.cpus > 1 {
                        e.edx |= LEAF1_EDX_HTT;
                    }
                }
                4 | 0x8000_001d => {
                    let level = (e.eax >> 5) & 7;
                    let sharing = if level >= 3 { others } else { 0 };
                    e.eax = (e.eax & !(0xfff << 14)) | (sharing & 0xfff) << 14;
                    if e.function == 4 && e.eax & 0x1f != 0 {
                        e.eax = (e.eax & 0x03ff_ffff) | (logical - 1).min(0x3f) << 26;
                    }
                }
                0x8000_0001 if self.cpus > 1 => e.ecx |= EXT1_ECX_CMP_LEGACY,
                0x8000_0001 => e.ecx &= !EXT1_ECX_CMP_LEGACY,
                0x8000_0008 => e.ecx = (e.ecx & !0xf0ff) | core_bits << 12 | others.min(0xff),
                0x8000_001e => {
                    e.eax = apic_id;
                    e.ebx = apic_id & 0xff;
                    e.ecx = 0;
                }
                // AMD's other description of the topology is the host's: none rather than that.
                0x8000_0026 => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
                _ => {}
            }
        }
        for leaf in [0xb, 0x1f].into_iter().filter(|&leaf| leaf <= max_leaf) {
            let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: index | kind << 8,
                edx: apic_id,
                ..Default::default()
            };
            // Thread, core, end of list.
            entries.extend([
                level(0, 0, 1, 1),
                level(1, core_bits, self.cpus, 2),
                level(2, 0, 0, 0),
            ]);
        }
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(cpus: u32) -> Template {
        let entry = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let entries = vec![
            entry(0, 0xd),
            entry(1, 0),
            entry(4, 0x121),
            entry(4, 0x163),
            entry(0xb, 0),
            entry(0x8000_0008, 0),
            entry(0x8000_001e, 0),
        ];
        Template {
            entries,
            cpus,
            tsc_deadline: true,
        }
    }

    #[test]
    fn each_vcpu_has_its_apic_id_and_the_same_topology() {
        let template = template(3);
        for id in 0..3 {
            let entries = template.entries_for(id);
            let find = |leaf, index| {
                entries
                    .iter()
                    .find(|e| (e.function, e.index) == (leaf, index))
                    .unwrap()
            };
            assert_eq!(find(1, 0).ebx, id << 24 | 4 << 16);
            assert_ne!(find(1, 0).edx & LEAF1_EDX_HTT, 0);
            assert_eq!(
                (find(0xb, 0).edx, find(0xb, 1).eax, find(0xb, 1).ebx),
                (id, 2, 3)
            );
            assert_eq!(find(0x8000_001e, 0).eax, id);
            assert_eq!(find(0x8000_0008, 0).ecx, 2 << 12 | 2);
            assert!(!entries.iter().any(|e| e.function == 0x1f));
            let l3 = entries.iter().filter(|e| e.function == 4).nth(1).unwrap();
            assert_eq!((l3.eax >> 14) & 0xfff, 2);
        }
    }

    #[test]
    fn one_vcpu_is_no_multiprocessor() {
        let entries = template(1).entries_for(0);
        assert_eq!(entries[1].edx & LEAF1_EDX_HTT, 0);
        assert_eq!(entries[1].ebx, 1 << 16);
    }
}
