//! Parameters of the kernel modules kvm, kvm_amd and kvm_intel: programs read them in
//! `/sys/module/NAME/parameters/` to learn what `/dev/kvm` is like. What the machine's own modules say there, if
//! it has any, is not about AnyKVM.

use crate::host::Bare;
use kvm_core::cpuid::{Vendor, vendor};
use kvm_core::host::Host;

/// How the paths of all of them begin.
pub const PREFIX: &[u8] = b"/sys/module/kvm";

/// Parameters of the module kvm.
const KVM: &[(&str, &str)] = &[
    ("eager_page_split", "N"),
    ("enable_pmu", "N"),
    ("enable_vmware_backdoor", "N"),
    ("force_emulation_prefix", "0"),
    ("halt_poll_ns", "0"),
    ("ignore_msrs", "N"),
    ("nx_huge_pages", "N"),
    ("report_ignored_msrs", "N"),
    ("tdp_mmu", "N"),
    ("tsc_tolerance_ppm", "250"),
];
/// Parameters of the module kvm_amd.
const AMD: &[(&str, &str)] = &[
    ("avic", "N"),
    ("lbrv", "0"),
    ("nested", "0"),
    ("npt", "N"),
    ("sev", "N"),
    ("sev_es", "N"),
    ("sev_snp", "N"),
    ("vgif", "0"),
    ("vls", "0"),
];
/// Parameters of the module kvm_intel.
const INTEL: &[(&str, &str)] = &[
    ("enable_apicv", "N"),
    ("ept", "N"),
    ("flexpriority", "N"),
    ("nested", "N"),
    ("pml", "N"),
    ("sgx", "N"),
    // Real mode needs nothing special.
    ("unrestricted_guest", "Y"),
    ("vpid", "N"),
];

/// The value of the parameter whose path is [`PREFIX`] and `rest`, if there is one.
pub fn value(rest: &str) -> Option<&'static str> {
    value_on(vendor(Bare.cpuid(0, 0)), rest)
}

fn value_on(vendor: Vendor, rest: &str) -> Option<&'static str> {
    let (module, parameter) = rest.split_once("/parameters/")?;
    let parameters = match (module, vendor) {
        ("", _) => KVM,
        ("_amd", Vendor::Amd) => AMD,
        ("_intel", Vendor::Intel) => INTEL,
        _ => return None,
    };
    let found = parameters.iter().find(|(name, _)| *name == parameter)?;
    Some(found.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_vendor_s_module_is_there() {
        let all = [Vendor::Amd, Vendor::Intel];
        assert_eq!(
            all.map(|v| value_on(v, "/parameters/enable_pmu")),
            [Some("N"); 2]
        );
        assert_eq!(all.map(|v| value_on(v, "/parameters/none")), [None; 2]);
        assert_eq!(
            all.map(|v| value_on(v, "_amd/parameters/npt")),
            [Some("N"), None]
        );
        assert_eq!(
            all.map(|v| value_on(v, "_intel/parameters/ept")),
            [None, Some("N")]
        );
        assert_eq!(all.map(|v| value_on(v, "gt/parameters/x")), [None; 2]);
    }
}
